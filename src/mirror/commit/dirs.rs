//! Dirs: the marks of directories below which nothing is pending.
//!
//! On ext4 and xfs the journal keeps the order of what is done. On btrfs an fsync may log a parent's inode
//! without its children's, so before a directory's mark goes all that a walker would have to find below it
//! must be durable: the names, the L of directories, the files without their marks. Each of those was done
//! before some round began, and is durable when a later round's syncfs has worked (`covers`). The marks
//! of directories in between may come back: an L below which nothing is pending leads to nothing, and
//! finish takes it away. So a chain of directories goes in one round, however deep it is.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::super::node::ROOT;
use super::{Anchor, Commit, Ino, Mirror, NOT_YET, Phase};
use crate::sys::fault;
use std::os::fd::AsFd;

/// A directory below which nothing is pending, as the walker found it.
pub struct DoneDir {
    /// dst's inode number.
    pub ino: Ino,
    /// How to open it.
    pub anchor: Anchor,
    /// `Mirror::epoch` when the walker began to look: anything moved since may be in it.
    pub epoch: u64,
    /// `Mirror::moment` of the last thing in it that was done, other directories left out.
    pub since: u64,
    /// Told whether the mark is gone.
    pub then: Box<dyn FnOnce(bool) + Send>,
}

impl Commit {
    fn dir_later(&self, dir: DoneDir) {
        let mut queue = self.queue.lock();
        queue.dirs.push(dir);
        self.arrived(&mut queue);
    }

    /// All that was done in the directory, and its own L, is durable. One whose L could not be set yet
    /// is not asked about here: `unmark_dir` leaves it alone.
    pub(super) fn covers(&self, dir: &DoneDir) -> bool {
        let queue = self.queue.lock();
        let gate = queue.gates.get(&dir.ino);
        let published = gate.is_none_or(|gate| *gate == NOT_YET || *gate <= queue.synced);
        published && dir.since < queue.synced
    }
}

impl Mirror {
    /// What is done now is durable once a round that begins later has synced: their number so far.
    pub fn moment(&self) -> u64 {
        match self.btrfs {
            true => self.commit.queue.lock().round,
            false => 0,
        }
    }

    /// Nothing below the directory is pending: its mark may go. `Some`: whether it is gone. `None`
    /// on btrfs, where something below is not durable yet: the commit thread does it behind a syncfs
    /// and calls `then`.
    pub fn dir_done(&self, dir: DoneDir) -> Option<bool> {
        if self.btrfs && !self.commit.covers(&dir) {
            self.commit.dir_later(dir);
            return None;
        }
        let _inside = self.marks.enter();
        Some(self.unmark_dir(&dir))
    }

    /// A round's syncfs has worked.
    pub(super) fn unmark_dirs(self: &Arc<Self>, dirs: Vec<DoneDir>) {
        for dir in dirs {
            if self.commit.covers(&dir) {
                let gone = self.unmark_dir(&dir);
                (dir.then)(gone);
            } else {
                self.commit.dir_later(dir);
            }
        }
    }

    /// I2 and the rule for renames: the mark goes only when nothing was moved since the walker
    /// began to look.
    fn unmark_dir(&self, dir: &DoneDir) -> bool {
        let _guard = self.moves.lock();
        if self.epoch.load(Ordering::Acquire) != dir.epoch || self.commit.is_publishing(dir.ino) {
            return false;
        }
        fault::point("dir-unmark");
        let _perms = self.lock_perms(dir.ino);
        let removed = match dir.ino == ROOT {
            true => self.take_mark(self.dst.as_fd()),
            false => self.remove_mark(&dir.anchor),
        };
        match removed {
            Ok(()) => {
                if let Some(node) = self.nodes.find_same(dir.ino, &dir.anchor) {
                    node.set_phase(Phase::Unmarked);
                }
                true
            }
            Err(Errno::STALE | Errno::NOENT) => true,
            Err(errno) => {
                tracing::warn!("removexattr dst directory: {errno}");
                false
            }
        }
    }
}
