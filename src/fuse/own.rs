//! Own: requests that we have the kernel make, and the file that they are about.
//!
//! FUSE_NOTIFY_RETRIEVE makes a request (NOTIFY_REPLY) on the CPU of who writes it. A kernel with
//! the fix "fuse: reject fuse_notify() pagecache ops on directories" (6.18.44 has it) wants a regular file
//! for it, and it may have been asked for none yet. So it is told of one under a name that
//! nobody can know, which is nowhere listed, and of which nothing is asked. It forgets it when memory is
//! short; then any file of the users' will do.

use std::collections::hash_map::RandomState;
use std::ffi::CString;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use super::answer::{Entry, Found};
use super::reply::{Reply, TTL};
use super::shared::Shared;
use crate::mirror::{Attr, Ino, ROOT};
use crate::sys::name::Name;
use crate::sys::{local, stat};

/// Its number: no file of dst's has it.
const OWN: Ino = Ino::MAX;
/// Files of the users' that are tried.
const CANDIDATES: usize = 256;

/// Our own file.
pub(super) struct Own {
    name: String,
    /// What the last request was about.
    last: AtomicU64,
}

impl Own {
    pub(super) fn new() -> Own {
        let number = || RandomState::new().build_hasher().finish();
        Own {
            name: format!(".mirrorfs.{:016x}{:016x}", number(), number()),
            last: AtomicU64::new(OWN),
        }
    }
}

impl Shared {
    /// Has the kernel look at our own file, so that it knows it. `root`: the mount's.
    pub(super) fn show_own(&self, root: BorrowedFd<'_>, patience: Duration) -> Result<(), Errno> {
        let name = CString::new(self.own.name.as_str()).map_err(|_| Errno::INVAL)?;
        local::look_from_a_child(root, &name, patience)
    }

    pub(super) fn is_own(&self, parent: Ino, name: &Name) -> bool {
        parent == ROOT && name.as_bytes() == self.own.name.as_bytes()
    }

    /// The answer to who looks at our own file.
    pub(super) fn reply_own(&self, reply: Reply<Found>) {
        let root = stat::stat_fd(self.mirror.dst_root().as_fd());
        let entry = root.map(|mut stat| {
            stat.mode = 0o100000;
            (stat.size, stat.blocks, stat.nlink) = (0, 0, 1);
            Found::Entry(Entry {
                ino: OWN,
                generation: 0,
                attr: Attr { stat },
                // With less the kernel forgets it at once.
                entry_ttl: TTL,
                attr_ttl: TTL,
            })
        });
        reply.send(entry);
    }

    /// Has the kernel make a request on the calling thread's CPU. ENOENT: it knows no file.
    pub(super) fn ask_for_a_request(&self) -> Result<(), Errno> {
        let dev = self.dev().ok_or(Errno::NOTCONN)?;
        let last = &self.own.last;
        let asked = dev.ask_for_a_request(last.load(Ordering::Relaxed));
        let is_of_no_use = |asked| matches!(asked, Err(Errno::INVAL | Errno::NOENT));
        if !is_of_no_use(asked) {
            return asked;
        }
        let others = self.mirror.nodes().some_files(CANDIDATES);
        for ino in [OWN, ROOT].into_iter().chain(others) {
            let asked = dev.ask_for_a_request(ino);
            if !is_of_no_use(asked) {
                last.store(ino, Ordering::Relaxed);
                return asked;
            }
        }
        Err(Errno::NOENT)
    }
}
