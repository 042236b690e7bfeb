//! Ahead: small files whose data src has not in memory are asked for and put off, so that a thread
//! that copies from a cold disk has many reads under way and not one.
//!
//!   (open) -> Here    peek()   all of it is in the page cache, and now in this thread's buffer
//!   (open) -> Later   peek()   the kernel has begun to read it: other names come first
//!   Later  -> (copied) catch_up(), when there are many, or when nothing else is to be done
//!
//! Which of the two it is the kernel says (RWF_NOWAIT), not a clock; so a tree in memory costs no
//! call more, and one that is half there is copied in any mixture. File systems that ask others
//! (FUSE, NFS) have no such reads: there threads wait (`crew`).

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::data::{Buffers, SMALL};
use super::dir::Dir;
use super::{Item, Work};
use crate::sys::cache;
use crate::sys::name::Name;
use crate::sys::stat::Stat;

/// Files that one thread has asked for and not copied yet.
const LATER_MAX: usize = 32;

/// A file of src that is open, and whose data is on its way into memory.
pub(super) struct Later {
    dir: Arc<Dir>,
    name: Name,
    src: OwnedFd,
    stat: Stat,
    /// How long src has taken for it so far.
    waited: Duration,
}

/// The files that a thread has put off, the oldest first.
pub(super) type Queue = VecDeque<Later>;

impl Work<'_, '_> {
    /// Copies a file that is open, or puts it off until its data is in memory.
    pub(super) fn now_or_later(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: Name,
        src: OwnedFd,
        stat: Stat,
    ) {
        buffers.ready = None;
        if self.may_peek(dir, &name, &stat) {
            let begin = Instant::now();
            let size = usize::try_from(stat.size).map_or(SMALL, |n| n.min(SMALL));
            let read = cache::read_cached(src.as_fd(), &mut buffers.data[..size], 0);
            buffers.waited += begin.elapsed();
            match read {
                Ok(n) if n == size => buffers.ready = Some(n),
                // Shorter than it was, or only its beginning is here: to be read as always.
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    let dir = Arc::clone(dir);
                    let waited = buffers.waited;
                    buffers.later.push_back(Later {
                        dir,
                        name,
                        src,
                        stat,
                        waited,
                    });
                    if buffers.later.len() > LATER_MAX {
                        self.catch_up(buffers);
                    }
                    return;
                }
                Err(Errno::OPNOTSUPP) => self.job.peeks.store(false, Relaxed),
                Err(_) => {} // The read that follows says it.
            }
        }
        self.copy_open(buffers, dir, &name, src, stat);
    }

    /// True for what will be read whole, at once and for certain.
    fn may_peek(&self, dir: &Dir, name: &Name, stat: &Stat) -> bool {
        self.job.peeks.load(Relaxed)
            && stat.size > 0
            && stat.size <= SMALL as u64
            && stat.nlink == 1
            && !stat.is_sparse()
            && !self.job.config.dry_run
            && !self.may_clone(stat.size)
            && dir.is_new(name)
    }

    /// Copies the oldest of the files that were put off.
    fn catch_up(&self, buffers: &mut Buffers) {
        if let Some(later) = buffers.later.pop_front() {
            buffers.ready = None;
            buffers.waited = later.waited;
            self.copy_open(buffers, &later.dir, &later.name, later.src, later.stat);
        }
    }

    /// Does an item, and then what was put off, unless there is another item: that has more to
    /// ask for.
    pub(super) fn step(&self, buffers: &mut Buffers, item: Item) {
        self.one(buffers, item);
        self.rest(buffers);
    }

    /// What was put off, and whatever else there is to be done.
    pub(super) fn rest(&self, buffers: &mut Buffers) {
        while !buffers.later.is_empty() {
            if self.crew.stopping() {
                // Not begun: nothing of it is in dst.
                buffers.later.clear();
                return;
            }
            match (!self.crew.crowded()).then(|| self.crew.take()).flatten() {
                Some(item) => self.one(buffers, item),
                None => self.catch_up(buffers),
            }
        }
    }
}
