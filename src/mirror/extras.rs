//! Extras: names that only dst has, in a directory that is still P, when an earlier copy is adopted.
//!
//! While a directory is P nobody can have made anything in it or below (D5, I6): whatever is there and
//! not in src's listing was there before the migration. So this is the only moment at which it can be
//! told from what users make, and the only one at which `--delete` removes anything: after all of src's
//! names were placed, before the directory is L. A crash in between leaves it P, and it is done again.
//! Without `--delete` extras stay, and are noted in the ledger.
//!
//! A name is claimed (partial.rs) while it goes, and who looks for a name that src has not waits for the
//! populate (ahead.rs): nobody is shown what is about to go.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::control::CONTROL;
use super::late;
use super::node::ROOT;
use super::partial::Partial;
use super::source::SrcDir;
use crate::error::{Context, Error, Result, Side};
use crate::sys::dir::{self, Entry};
use crate::sys::name::{Name, RelPath};
use crate::sys::xattr::Target;
use crate::sys::{fault, fd, host, stat};

/// Names of dst that are looked at, at a time.
const BATCH: usize = 1024;

impl Mirror {
    /// What only dst has goes, or is noted. Every name of src is placed; the directory is P.
    pub(super) fn see_to_extras(
        &self,
        src: &SrcDir,
        dst: BorrowedFd<'_>,
        partial: &Partial,
    ) -> Result<()> {
        if !self.control.identity.adopt {
            return Ok(());
        }
        let delete = self.control.identity.delete;
        let (mut from, mut buf) = (0, Vec::new());
        loop {
            let mut extras = Vec::new();
            let at_end = dir::read_dir(dst, from, &mut buf, |entry| {
                from = entry.next;
                let control = partial.ino == ROOT && entry.name.as_bytes() == CONTROL.as_bytes();
                let lost_found = host::is_lost_found(dst, entry.name.as_cstr());
                if !control && !lost_found && !partial.has(&entry.name) {
                    extras.push(entry.name);
                }
                extras.len() < BATCH
            })
            .on("getdents64", Side::Dst, src.path.as_ref())?;
            for name in &extras {
                if self.stopping() {
                    return Err(Error::Stopped);
                }
                let path = src.path.join(name);
                // Somebody may be about to place it after all.
                let Some(claimed) = partial.claim(name) else {
                    continue;
                };
                match stat::stat_at(src.fd.as_fd(), name.as_cstr()) {
                    Err(Errno::NOENT) => {}
                    // Not listed, and there: src changes, or is not to be believed.
                    Ok(_) => {
                        claimed.not_in_src();
                        return Err(Error::SrcChanged {
                            path: path.to_path(),
                        });
                    }
                    Err(e) => return Err(e).on("statx", Side::Src, &path),
                }
                if delete && self.is_foreign(dst, name, &path)? {
                    fault::point("extra-before");
                    match remove(dst, name, &path) {
                        Ok(()) => {
                            tracing::info!("removed: only dst had {path:?}");
                            self.progress.extras_removed.add(1);
                        }
                        Err(e) => self.fail(&path, &e),
                    }
                    fault::point("extra-removed");
                } else if self.ledger.note_extra(&path) {
                    self.progress.extras.add(1);
                }
                claimed.not_in_src();
            }
            if at_end {
                return Ok(());
            }
        }
    }

    /// False for what this migration has made: src had it at an earlier start. That is no copy of
    /// somebody else's, and stays.
    fn is_foreign(&self, dst: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<bool> {
        let mark = self.mark.get(Target::At(dst, name));
        Ok(mark.on("getxattr", Side::Dst, path)?.is_none())
    }
}

/// A directory that is being emptied.
struct Open {
    fd: OwnedFd,
    name: Name,
    path: RelPath,
    names: Vec<Entry>,
}

/// Removes a name with all below it: depth first, with a stack instead of recursion. What is mounted in
/// it stays, and is an error.
pub(super) fn remove(top: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<()> {
    if !stat::stat_at(top, name.as_cstr())
        .on("statx", Side::Dst, path)?
        .is_dir()
    {
        return unlink(top, name, path);
    }
    let mut stack = vec![enter(top, name, path.clone())?];
    while let Some(open) = stack.last_mut() {
        let Some(entry) = open.names.pop() else {
            let Some(done) = stack.pop() else { break };
            let parent = stack.last().map_or(top, |d| d.fd.as_fd());
            drop(done.fd);
            rustix::fs::unlinkat(parent, done.name.as_cstr(), AtFlags::REMOVEDIR).on(
                "rmdir",
                Side::Dst,
                &done.path,
            )?;
            continue;
        };
        let below = open.path.join(&entry.name);
        let stat = stat::stat_at(open.fd.as_fd(), entry.name.as_cstr());
        if stat.on("statx", Side::Dst, &below)?.is_dir() {
            let next = enter(open.fd.as_fd(), &entry.name, below)?;
            stack.push(next);
        } else {
            unlink(open.fd.as_fd(), &entry.name, &below)?;
        }
    }
    Ok(())
}

fn enter(parent: BorrowedFd<'_>, name: &Name, path: RelPath) -> Result<Open> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let fd = fd::open_at(parent, name, flags).on("open", Side::Dst, &path)?;
    let stat = stat::stat_fd(fd.as_fd()).on("statx", Side::Dst, &path)?;
    if stat.mount_root {
        return Err(Errno::BUSY).on("rmdir", Side::Dst, &path);
    }
    late::free(&stat, fd.as_fd()).on("FS_IOC_SETFLAGS", Side::Dst, &path)?;
    let names = dir::list(fd.as_fd()).on("getdents64", Side::Dst, &path)?;
    let name = name.clone();
    Ok(Open {
        fd,
        name,
        path,
        names,
    })
}

fn unlink(dir: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<()> {
    match late::unlink(dir, name) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e).on("unlink", Side::Dst, path),
    }
}
