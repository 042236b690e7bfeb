//! Prefetch: what is read together comes together.
//!
//! Who opens a second file of a directory will likely open more of them. Its next files are pulled
//! then, some at a time, in the order of the listing; while they are opened the steps grow, and when
//! they are not it ends.
//!
//!   opened()     a user opens a file: a first access counts for its directory, and what was pulled
//!                ahead is a hit
//!   Window       the next pending files of one directory, handed to the prefetch thread
//!   fly()        one file of them, in the demand lane, with few others: real demand is never behind
//!                more than these
//!
//! It is the background's: off when that is off or paused. What it reads counts against the limit, but
//! does not wait for it: the walker waits longer instead.
//! Memory is bounded (I9): directories, files that were pulled ahead and not opened, windows that
//! wait. What is forgotten there is pulled by the walker or on access, as ever. Lock order: leaves.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};
use rustix::fs::FileType;

use super::Mirror;
use super::hydrate::{FileRef, Need};
use super::node::{Ino, Node, Origin, Phase};
use super::populate::DirRef;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::sys::dir;
use crate::throttle::Background;

/// First accesses to files of one directory that begin it.
const OPENS: u32 = 2;
/// Files of one step: at first, and at the most.
const WINDOW: (u32, u32) = (16, 256);
/// Files up to this size, bytes, come unasked.
const FILE_MAX: u64 = 1 << 20;
/// Entries of a directory that are looked at for one step.
const LOOKS_MAX: usize = 4096;
/// Files under way: while src is slow, which costs nothing beside the waiting; else; and else while
/// somebody waits.
const IN_FLIGHT: [usize; 3] = [24, 8, 2];
/// Steps that wait; a directory that finds no room asks again with its next access.
const WINDOWS_MAX: usize = 64;
const DIRS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
const FILES: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");
/// What came by a trace has no directory that goes on.
const TRACE: Ino = 0;
/// How often it is looked whether a pause is over.
const PAUSE: Duration = Duration::from_millis(50);
/// How often it is looked whether there is room in flight.
const LOOK: Duration = Duration::from_millis(2);

/// A directory of which files were opened while they were pending.
#[derive(Debug, Default)]
struct Dir {
    /// First accesses, those to what came unasked not counted.
    opens: u32,
    /// Files that came unasked and were not opened yet.
    unused: u32,
    /// Files of the next step.
    window: u32,
    /// Where in the directory it begins.
    from: u64,
    /// A step is under way, or there is nothing more.
    busy: bool,
}

/// One step.
struct Window {
    dir: DirRef,
    from: u64,
    files: u32,
}

#[derive(Default)]
struct Table {
    dirs: Option<LruCache<Ino, Dir>>,
    /// What came unasked and was not opened yet, and its directory.
    unused: Option<LruCache<Ino, Ino>>,
    windows: VecDeque<Window>,
}

/// What is pulled because its neighbours were opened.
#[derive(Default)]
pub struct Prefetch {
    table: Mutex<Table>,
    wake: Condvar,
    /// Length of `Table::unused`: a complete tree costs one look at it for each open.
    unused_len: AtomicUsize,
    in_flight: AtomicUsize,
    stopped: AtomicBool,
}

impl Table {
    fn dirs(&mut self) -> &mut LruCache<Ino, Dir> {
        self.dirs.get_or_insert_with(|| LruCache::new(DIRS))
    }

    fn unused(&mut self) -> &mut LruCache<Ino, Ino> {
        self.unused.get_or_insert_with(|| LruCache::new(FILES))
    }

    /// A file of this directory was opened; `hit`: it had come unasked. The step that follows.
    fn count(&mut self, dir: Ino, hit: bool) -> Option<(u64, u32)> {
        let dir = self.dirs().get_or_insert_mut(dir, Dir::default);
        match hit {
            true => dir.unused = dir.unused.saturating_sub(1),
            false => dir.opens = dir.opens.saturating_add(1),
        }
        if dir.busy || dir.opens < OPENS || dir.unused > dir.window / 2 {
            return None;
        }
        dir.window = match dir.window {
            0 => WINDOW.0,
            // Opened past what came: no reason for more at a time.
            n if !hit => n,
            n => (n * 2).min(WINDOW.1),
        };
        dir.busy = true;
        Some((dir.from, dir.window))
    }

    /// A step has ended: so many files are on their way; `next`: where the directory goes on.
    fn step_done(&mut self, dir: Ino, files: u32, next: Option<u64>) {
        if let Some(dir) = self.dirs().get_mut(&dir) {
            dir.unused += files;
            dir.busy = next.is_none();
            dir.from = next.unwrap_or(dir.from);
        }
    }
}

impl Prefetch {
    /// Ends the thread, when it has nothing in hand.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Relaxed);
        let _table = self.table.lock();
        self.wake.notify_all();
    }

    /// Notes a file that comes unasked. `false`: it does already.
    fn note(&self, file: Ino, dir: Ino) -> bool {
        let mut table = self.table.lock();
        if table.unused().contains(&file) {
            return false;
        }
        table.unused().put(file, dir);
        self.unused_len.store(table.unused().len(), Relaxed);
        true
    }

    /// Forgets one; the directory that it was noted with.
    fn forget(&self, file: Ino) -> Option<Ino> {
        let mut table = self.table.lock();
        let dir = table.unused().pop(&file);
        self.unused_len.store(table.unused().len(), Relaxed);
        dir
    }

    fn landed(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
        self.wake.notify_all();
    }
}

impl Mirror {
    /// A user opens a file, to read or to change what is in it.
    pub(super) fn note_open(&self, node: &Node) {
        let prefetch = &self.prefetch;
        let pending = node.is_pending_file();
        if !pending && prefetch.unused_len.load(Relaxed) == 0 {
            return;
        }
        let hit = prefetch.forget(node.ino);
        if hit.is_some() {
            self.progress.prefetch_hits.add(1);
        }
        if !self.with_neighbours || hit.is_none() && !pending {
            return;
        }
        let place = node.place().map(|p| p.parent);
        let Some(parent) = hit.or(place) else { return };
        let mut table = prefetch.table.lock();
        let Some((from, files)) = table.count(parent, hit.is_some()) else {
            return;
        };
        let dir = self.nodes.find(parent).map(|node| DirRef {
            ino: parent,
            anchor: node.anchor.clone(),
            origin: node.origin().map(|o| Arc::new(o.path())),
        });
        match dir {
            Some(dir) if table.windows.len() < WINDOWS_MAX => {
                table.windows.push_back(Window { dir, from, files });
                prefetch.wake.notify_all();
            }
            _ => table.step_done(parent, 0, Some(from)),
        }
    }

    /// The prefetch thread.
    pub(super) fn prefetch_loop(self: &Arc<Self>) {
        let prefetch = &self.prefetch;
        loop {
            let window = {
                let mut table = prefetch.table.lock();
                loop {
                    if prefetch.stopped.load(Relaxed) {
                        return;
                    }
                    match table.windows.pop_front() {
                        Some(window) => break window,
                        None => prefetch.wake.wait(&mut table),
                    }
                }
            };
            let (dir, from) = (window.dir.ino, window.from);
            let (files, next) = match self.may_prefetch() {
                true => self.step(&window).unwrap_or_else(|e| {
                    tracing::debug!("prefetch: {e}");
                    (0, None)
                }),
                false => (0, Some(from)),
            };
            prefetch.table.lock().step_done(dir, files, next);
        }
    }

    /// The background runs, and dst has room.
    fn may_prefetch(&self) -> bool {
        self.throttle.background() == Background::Running
            && !self.progress.dst_full.load(Relaxed)
            && !self.stopping()
    }

    /// Sends the next files of a directory on their way: how many, and where it goes on; `None`: it
    /// has no more.
    fn step(self: &Arc<Self>, window: &Window) -> Result<(u32, Option<u64>)> {
        let node = self.nodes.find(window.dir.ino);
        if node.is_some_and(|n| n.is_pending_dir()) {
            // Its names are still coming: the next access asks again.
            return Ok((0, Some(window.from)));
        }
        let opened = self.open_dir(&window.dir)?;
        let shown = || window.dir.origin.as_deref().map(|o| o.to_path());
        let mut entries = Vec::new();
        let mut buf = Vec::new();
        let at_end = dir::read_dir(opened.as_fd(), window.from, &mut buf, |entry| {
            entries.push(entry);
            entries.len() < LOOKS_MAX
        })
        .on("getdents64", Side::Dst, shown().unwrap_or_default())?;
        let (mut files, mut next) = (0, window.from);
        for entry in entries {
            if files == window.files {
                return Ok((files, Some(next)));
            }
            next = entry.next;
            let marked = self.marked_child(&window.dir, opened.as_fd(), &entry.name, entry.kind);
            let marked = match marked {
                Err(Error::Unseen { .. }) => continue,
                other => other?,
            };
            let Some(found) = marked else { continue };
            let here = self.has_landed(found.dir.ino, &found.dir.anchor);
            if here || found.kind != FileType::RegularFile || found.size > FILE_MAX {
                continue;
            }
            let file = FileRef {
                ino: found.dir.ino,
                anchor: found.dir.anchor,
                origin: found.dir.origin.as_deref().map(Origin::of),
            };
            if self.prefetch.note(file.ino, window.dir.ino) {
                files += 1;
                self.throttle.spend(found.size);
                if !self.fly(file, Mirror::may_prefetch) {
                    return Ok((files, Some(next)));
                }
            }
        }
        Ok((files, (!at_end).then_some(next)))
    }

    /// Pulls one file, as soon as there is room in flight. `false`: no more for now.
    fn fly(self: &Arc<Self>, file: FileRef, may: fn(&Mirror) -> bool) -> bool {
        let prefetch = &self.prefetch;
        while prefetch.in_flight.load(Relaxed) >= self.in_flight_max() {
            if !may(self) {
                prefetch.forget(file.ino);
                return false;
            }
            let mut table = prefetch.table.lock();
            prefetch.wake.wait_for(&mut table, LOOK);
        }
        prefetch.in_flight.fetch_add(1, Relaxed);
        let (mirror, ino) = (Arc::clone(self), file.ino);
        let done = move |result: Result<()>| {
            match result {
                Ok(()) => mirror.progress.prefetched.add(1),
                Err(_) => drop(mirror.prefetch.forget(ino)),
            }
            mirror.prefetch.landed();
        };
        let mirror = Arc::clone(self);
        let go = move || {
            mirror.hydrate(&file, Need::Ahead, Priority::Demand, Box::new(done));
        };
        // What is asked of src before the copy begins would hold up the next file.
        match self.src_is_slow() {
            true => self.engine.pool().run(Priority::Demand, Box::new(go)),
            false => go(),
        }
        true
    }

    /// For replays: false when the mirror stops or dst is full. Sleeps while the background is paused;
    /// that it is off does not matter.
    pub fn may_replay(&self) -> bool {
        while self.throttle.background() == Background::Paused && !self.stopping() {
            std::thread::sleep(PAUSE);
        }
        !self.stopping() && !self.progress.dst_full.load(Relaxed)
    }

    /// Pulls a file that a trace names, as soon as there is room in flight.
    pub fn pull_ahead(self: &Arc<Self>, file: FileRef) {
        let here = self.has_landed(file.ino, &file.anchor);
        if !here && self.prefetch.note(file.ino, TRACE) {
            self.fly(file, Mirror::may_replay);
        }
    }

    /// Whether opening the file pulls nothing: its parts come as they are read.
    pub fn is_large(&self, bytes: u64) -> bool {
        bytes > self.large_file_bytes
    }

    /// Pulls a part of a large file that a trace names; returns when it is here.
    pub fn pull_range_ahead(self: &Arc<Self>, file: &FileRef, range: Range<u64>) -> Result<()> {
        let (ino, anchor, origin) = (file.ino, file.anchor.clone(), file.origin.clone());
        let kind = FileType::RegularFile;
        let node = Arc::new(Node::new(ino, anchor, kind, Phase::Pending, origin, None));
        let (tell, told) = crossbeam_channel::bounded(1);
        let (mirror, held) = (Arc::clone(self), Arc::clone(&node));
        self.with_info(&node, move |info| {
            let then = move |read: Result<Vec<u8>>| {
                let _ = tell.send(read.map(drop)); // Whoever asked waits below.
            };
            match info {
                Ok(info) => mirror.read_range(&held, info, range, Box::new(then)),
                Err(e) => then(Err(e)),
            }
        });
        told.recv().unwrap_or(Err(Error::Stopped))
    }

    fn in_flight_max(&self) -> usize {
        match (self.src_is_slow(), self.progress.is_waited_for()) {
            (true, _) => IN_FLIGHT[0],
            (false, false) => IN_FLIGHT[1],
            (false, true) => IN_FLIGHT[2],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What follows from opening files one after the other; `true`: one that came unasked.
    fn steps(opens: &[bool], per_step: u32) -> Vec<u32> {
        let mut table = Table::default();
        let mut steps = Vec::new();
        for hit in opens {
            if let Some((from, files)) = table.count(7, *hit) {
                steps.push(files);
                table.step_done(7, per_step.min(files), Some(from + 1));
            }
        }
        steps
    }

    #[test]
    fn one_file_of_a_directory_brings_no_other_and_the_second_does() {
        assert!(steps(&[false], 16).is_empty());
        assert_eq!(steps(&[false, false], 16), [16]);
    }

    #[test]
    fn steps_grow_while_what_came_is_opened_and_not_when_it_is_not() {
        let opened = [&[false; 2][..], &[true; 8], &[true; 24]].concat();
        assert_eq!(steps(&opened, 256), [16, 32, 64]);
        assert_eq!(steps(&[false; 100], 256), [16]);
        // A step that finds nothing to bring leaves it to the next access.
        assert_eq!(steps(&[false; 4], 0), [16, 16, 16]);
    }

    #[test]
    fn at_the_end_of_the_directory_it_is_over() {
        let mut table = Table::default();
        table.count(7, false);
        assert_eq!(table.count(7, false), Some((0, 16)));
        table.step_done(7, 3, None);
        for _ in 0..9 {
            assert_eq!(table.count(7, true), None);
        }
    }
}
