//! Recent: the directories that users work in while something there is pending. The walker goes there
//! first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::Mirror;
use super::node::{Ino, ROOT};

/// Directories that are remembered, those above them included.
const DIRS_MAX: usize = 64;

/// The last used first, and those above it right behind it.
#[derive(Debug, Default)]
pub(super) struct Recent {
    len: AtomicUsize,
    dirs: Mutex<VecDeque<Ino>>,
}

impl Recent {
    /// `way`: a directory, and those above it.
    fn note(&self, way: &[Ino]) {
        let mut dirs = self.dirs.lock();
        if dirs.front() == way.first() {
            return;
        }
        dirs.retain(|dir| !way.contains(dir));
        for dir in way.iter().rev() {
            dirs.push_front(*dir);
        }
        dirs.truncate(DIRS_MAX);
        self.len.store(dirs.len(), Ordering::Relaxed);
    }
}

impl Mirror {
    /// Somebody uses something in a directory that is not all here.
    pub(super) fn note_use(&self, dir: Ino) {
        let mut way = Vec::new();
        let mut at = dir;
        while at != ROOT && way.len() < DIRS_MAX {
            way.push(at);
            let place = self.nodes.find(at).and_then(|node| node.place());
            at = place.map_or(ROOT, |p| p.parent);
        }
        self.recent.note(&way);
    }

    /// Where users are, the last used first; each is followed by what is above it.
    pub fn used_dirs(&self) -> Vec<Ino> {
        match self.recent.len.load(Ordering::Relaxed) {
            0 => Vec::new(),
            _ => self.recent.dirs.lock().iter().copied().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_used_comes_first_with_what_is_above_it_and_nothing_twice() {
        let recent = Recent::default();
        let dirs = || recent.dirs.lock().iter().copied().collect::<Vec<_>>();
        recent.note(&[30, 20]);
        recent.note(&[40, 20]);
        assert_eq!(dirs(), [40, 20, 30]);
        recent.note(&[30, 20]);
        assert_eq!(dirs(), [30, 20, 40]);
        recent.note(&[]);
        for n in 100..200 {
            recent.note(&[n]);
        }
        assert_eq!((dirs().len(), dirs()[0]), (DIRS_MAX, 199));
    }
}
