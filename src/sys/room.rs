//! Room: whether a file system takes anything more.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use super::xattr::{self, Target};
use super::{Result, copy, fd};

/// What is asked for at once, bytes: less is no room to work in.
const ROOM: u64 = 64 << 10;
const NAME: &std::ffi::CStr = c"user.mirrorfs.room";
/// Larger than what fits into most inodes, so that it takes a block; and fits into ext4's smallest one.
const XATTR: [u8; 600] = [1; 600];

/// Asks the file system of a directory for an inode, some blocks and a block of xattrs, and gives them
/// back. ENOSPC, EDQUOT or EROFS: it takes nothing more. What statfs(2) says is no answer: it knows
/// neither quotas nor what was promised to writes that are on their way.
pub fn ask(dir: BorrowedFd<'_>) -> Result<()> {
    let file = match fd::tmpfile(dir, 0o600) {
        // No such thing here: the next entry that is made will say it.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => return Ok(()),
        other => other?,
    };
    match xattr::set(Target::Open(file.as_fd()), NAME, &XATTR) {
        // Not for us to set, or larger than it may be: no matter of room.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::TOOBIG | Errno::RANGE) => {}
        Err(e) => return Err(e),
    }
    copy::preallocate(file.as_fd(), 0..ROOM)
}
