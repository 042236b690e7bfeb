//! Late flags: +i and +a, which forbid all further work.
//!
//!   free()             what an earlier copy has of them goes from what is taken over, before anything else
//!   note_late_flags()  src's are written down, `.mirrorfs/flags`
//!   finish.rs          sets those, at the end of everything
//!
//! Nothing is lost by a crash in between: while a directory is P its entries are taken over again, and
//! what they get at the end is src's, whatever dst had.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::place::Placer;
use crate::error::{Context, Result, Side};
use crate::mark::MarkName;
use crate::meta::{LATE_FLAGS, Meta, Refused};
use crate::sys::handle::Handle;
use crate::sys::name::Name;
use crate::sys::stat::{self, Stat};
use crate::sys::{copy, fd};

/// Takes the flags off an open file or directory of dst; `stat` is what statx said of it.
pub(super) fn free(stat: &Stat, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    match stat.late_flags() != 0 {
        true => take(fd).map(drop),
        false => Ok(()),
    }
}

/// As `free`, of what statx has not been asked about.
pub(super) fn free_fd(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    free(&stat::stat_fd(fd)?, fd)
}

/// Takes the flags off; which flags it had comes back, where it had these.
fn take(fd: BorrowedFd<'_>) -> Result<Option<u32>, Errno> {
    match copy::inode_flags(fd)? {
        Some(now) if now & LATE_FLAGS != 0 => {
            copy::set_inode_flags(fd, now & !LATE_FLAGS)?;
            Ok(Some(now))
        }
        _ => Ok(None),
    }
}

/// Removes a name of dst that is no directory, whatever its flags are. An inode that has other names,
/// which may be somebody else's, keeps its flags.
pub(super) fn unlink(dir: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    let there = stat::stat_at(dir, name.as_cstr())?;
    let remove = || rustix::fs::unlinkat(dir, name.as_cstr(), AtFlags::empty());
    if !there.is_file() || there.late_flags() == 0 {
        return remove();
    }
    let file = fd::open_at(dir, name, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let had = take(file.as_fd())?;
    let removed = remove();
    if let Some(had) = had
        && (removed.is_err() || there.nlink > 1)
    {
        copy::set_inode_flags(file.as_fd(), had)?;
    }
    removed
}

impl Placer<'_> {
    /// Notes +i and +a for finish: they would forbid the rest of the migration.
    pub fn note_late_flags(&self, meta: &Meta, fd: BorrowedFd<'_>) -> Result<()> {
        let late = meta.flags & LATE_FLAGS;
        if late == 0 {
            return Ok(());
        }
        let path = self.src.path.as_ref();
        if self.mirror.mark == MarkName::User {
            let refused = Refused {
                what: "flags".to_owned(),
                errno: Errno::PERM,
            };
            self.mirror.refused(path, &refused);
            return Ok(());
        }
        let handle = Handle::of(fd, c"").on("name_to_handle_at", Side::Dst, path)?;
        let name = format!("{late:x}-{}", handle.to_text());
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(
            self.mirror.control.flags.as_fd(),
            name,
            flags,
            Mode::from_raw_mode(0o600),
        )
        .map(drop)
        .on("open", Side::Dst, ".mirrorfs/flags")
    }
}
