//! Pair: the same directory on both sides, open, for whoever walks two trees at once.
//!
//! A subdirectory is opened in its open parent: one lookup, never a path walk, and paths may be
//! longer than PATH_MAX. The number of open pairs is limited; beyond it a pair is reached from the
//! roots again, in steps (`fd::open_beneath`).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustix::fs::OFlags;

use super::Result;
use super::fd;
use super::name::{Name, RelPath};

/// The two roots, and how many pairs below them are open.
#[derive(Debug)]
pub struct Roots {
    /// src's root.
    pub src: OwnedFd,
    /// dst's root.
    pub dst: OwnedFd,
    open: AtomicUsize,
    open_max: usize,
}

impl Roots {
    /// Two roots, with at most about `open_max` pairs open below them.
    pub fn new(src: OwnedFd, dst: OwnedFd, open_max: usize) -> Arc<Roots> {
        Arc::new(Roots {
            src,
            dst,
            open: AtomicUsize::new(0),
            open_max,
        })
    }

    /// Where the roots themselves are.
    pub fn root(self: &Arc<Self>) -> Place {
        Place {
            parent: None,
            path: RelPath::root(),
        }
    }

    /// Opens src's directory of a place.
    pub fn open_src(&self, place: &Place) -> Result<OwnedFd> {
        open(&self.src, place, |p| Some(&p.src))
    }

    /// Opens dst's directory of a place.
    pub fn open_dst(&self, place: &Place) -> Result<OwnedFd> {
        open(&self.dst, place, |p| (!p.half).then_some(&p.dst))
    }

    /// Two open directories become a pair.
    pub fn pair(self: &Arc<Self>, path: RelPath, src: OwnedFd, dst: OwnedFd) -> Arc<Pair> {
        self.count(path, (src, dst), false)
    }

    /// A directory of which only src is open; `dst` is any directory in dst.
    pub fn half(self: &Arc<Self>, path: RelPath, src: OwnedFd, dst: OwnedFd) -> Arc<Pair> {
        self.count(path, (src, dst), true)
    }

    /// One more that is open.
    fn count(
        self: &Arc<Self>,
        path: RelPath,
        (src, dst): (OwnedFd, OwnedFd),
        half: bool,
    ) -> Arc<Pair> {
        self.open.fetch_add(1, Relaxed);
        Arc::new(Pair {
            roots: Arc::clone(self),
            path,
            src,
            dst,
            half,
        })
    }
}

/// Where a directory is: in an open parent, or only by its path.
#[derive(Debug, Clone)]
pub struct Place {
    parent: Option<Arc<Pair>>,
    /// The path below the roots.
    pub path: RelPath,
}

/// A directory that is open on both sides.
#[derive(Debug)]
pub struct Pair {
    roots: Arc<Roots>,
    /// The path below the roots.
    pub path: RelPath,
    /// src's directory, open for reading.
    pub src: OwnedFd,
    /// dst's directory, open for reading.
    pub dst: OwnedFd,
    /// `dst` is another directory.
    half: bool,
}

impl Pair {
    /// Where the subdirectory `name` is. Keeps this pair open while the limit allows it.
    pub fn place(self: &Arc<Self>, name: &Name) -> Place {
        let room = self.roots.open.load(Relaxed) < self.roots.open_max;
        Place {
            parent: room.then(|| Arc::clone(self)),
            path: self.path.join(name),
        }
    }

    /// The roots.
    pub fn roots(&self) -> &Arc<Roots> {
        &self.roots
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.roots.open.fetch_sub(1, Relaxed);
    }
}

fn open(
    root: &OwnedFd,
    place: &Place,
    side: impl Fn(&Pair) -> Option<&OwnedFd>,
) -> Result<OwnedFd> {
    let name = place.path.split_last().map(|(_, name)| name);
    let quiet = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
    let parent = place.parent.as_deref().and_then(side);
    let at = |flags| match (parent, &name) {
        (Some(parent), Some(name)) => fd::open_at(parent.as_fd(), name, flags),
        _ => fd::open_beneath(root.as_fd(), &place.path, flags),
    };
    match at(quiet) {
        // O_NOATIME is for the owner and CAP_FOWNER.
        Err(rustix::io::Errno::PERM) => at(quiet - OFlags::NOATIME),
        other => other,
    }
}
