//! Served: files of src whose server may go by their paths: FUSE (sshfs and the like), 9p.
//!
//! It says of an open file what is under its name by now. So a file that is replaced between its opening and
//! the first look at it would be taken for the new one, with the old one's bytes, and no later look and no
//! later run would tell. Such files are looked at before they are opened (`open_src_seen`): that asks the
//! server nothing more.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::dir::Dir;
use crate::sys::name::Name;
use crate::sys::stat::{Stat, stat_fd};
use crate::sys::{fault, fd, host};

/// By device, whether a server goes by paths.
#[derive(Default)]
pub(super) struct Served(Mutex<HashMap<(u32, u32), bool>>);

impl Served {
    pub(super) fn is(&self, dev: (u32, u32)) -> bool {
        let mut known = self.0.lock();
        *known.entry(dev).or_insert_with(|| host::goes_by_paths(dev))
    }
}

impl Dir {
    /// Opens a file of src; what it was before, or is now, where that comes to the same.
    pub(super) fn open_file(&self, name: &Name) -> Result<(OwnedFd, Stat), (&'static str, Errno)> {
        let dir = self.pair.src.as_fd();
        if self.served && !fault::breaks("I6") {
            return fd::open_src_seen(dir, name).map_err(|e| ("openat", e));
        }
        let file = fd::open_src(dir, name).map_err(|e| ("openat", e))?;
        let stat = stat_fd(file.as_fd()).map_err(|e| ("statx", e))?;
        Ok((file, stat))
    }
}
