//! Delete: names that go from dst: what src does not have, what is of another type, and what an
//! earlier run that was killed left behind.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::dir::Dir;
use super::{Event, Line, Work, stamp};
use crate::error::{Context, Error, Result, Side};
use crate::meta::LATE_FLAGS;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{Stat, stat_at, stat_fd};
use crate::sys::{dir as sys_dir, fd};

/// How the name of an entry that is not complete yet begins.
pub(super) const TEMP: &str = ".mirrorfs-tmp.";

impl Work<'_, '_> {
    /// Removes an extraneous name of a directory, with all below it.
    pub(super) fn delete(&self, dir: &Dir, name: &Name) {
        let path = dir.path(name);
        if let Err(e) = self.remove(dir.pair.dst.as_fd(), name, &path) {
            self.fail(&path, &e);
        }
    }

    /// Makes room for a src entry of another type: a directory goes only with `--delete`.
    pub(super) fn remove_other_type(&self, dir: &Dir, name: &Name) -> Result<()> {
        let path = dir.path(name);
        let stat = stat_at(dir.pair.dst.as_fd(), name.as_cstr()).on("statx", Side::Dst, &path)?;
        if stat.is_dir() && !self.job.config.delete {
            return Err(Error::WrongType {
                path: path.to_path(),
            });
        }
        self.remove(dir.pair.dst.as_fd(), name, &path)
    }

    /// Removes one name: depth first, with a stack of open directories instead of recursion.
    fn remove(&self, top: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<()> {
        let stat = stat_at(top, name.as_cstr()).on("statx", Side::Dst, path)?;
        if !stat.is_dir() {
            return self.unlink(top, name, path, &stat);
        }
        let dev = stat_fd(top).on("statx", Side::Dst, path)?.key.dev;
        let mut stack = vec![self.enter(top, name, path.clone(), dev)?];
        while let Some(open) = stack.last_mut() {
            let Some(entry) = open.names.pop() else {
                let done = stack.pop();
                let Some(done) = done else { break };
                let parent = stack.last().map_or(top, |d| d.fd.as_fd());
                drop(done.fd);
                self.unlink_as(parent, &done.name, &done.path, AtFlags::REMOVEDIR)?;
                continue;
            };
            let below = open.path.join(&entry.name);
            let stat = stat_at(open.fd.as_fd(), entry.name.as_cstr());
            let stat = stat.on("statx", Side::Dst, &below)?;
            if stat.is_dir() {
                let next = self.enter(open.fd.as_fd(), &entry.name, below, dev)?;
                stack.push(next);
            } else {
                self.unlink(open.fd.as_fd(), &entry.name, &below, &stat)?;
            }
        }
        Ok(())
    }

    fn enter(
        &self,
        parent: BorrowedFd<'_>,
        name: &Name,
        path: RelPath,
        dev: (u32, u32),
    ) -> Result<Open> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = fd::open_at(parent, name, flags).on("openat", Side::Dst, &path)?;
        let stat = stat_fd(fd.as_fd()).on("statx", Side::Dst, &path)?;
        if stat.mount_root && stat.key.dev != dev {
            // Another file system is mounted here: not ours to empty.
            return Err(Errno::BUSY).on("unlinkat", Side::Dst, &path);
        }
        if (stat.immutable || stat.append) && !self.job.config.dry_run {
            stamp::clear_flags(fd.as_fd(), LATE_FLAGS).on("FS_IOC_SETFLAGS", Side::Dst, &path)?;
        }
        let names = sys_dir::list(fd.as_fd()).on("getdents64", Side::Dst, &path)?;
        let name = name.clone();
        Ok(Open {
            fd,
            name,
            path,
            names,
        })
    }

    pub(super) fn unlink(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
        path: &RelPath,
        stat: &Stat,
    ) -> Result<()> {
        if (stat.immutable || stat.append)
            && stat.kind() == FileType::RegularFile
            && !self.job.config.dry_run
        {
            let fd = fd::open_at(dir, name, OFlags::RDONLY).on("openat", Side::Dst, path)?;
            stamp::clear_flags(fd.as_fd(), LATE_FLAGS).on("FS_IOC_SETFLAGS", Side::Dst, path)?;
        }
        self.unlink_as(dir, name, path, AtFlags::empty())
    }

    fn unlink_as(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
        path: &RelPath,
        flags: AtFlags,
    ) -> Result<()> {
        let totals = &self.job.totals;
        let left = &self.job.deletes_left;
        let allowed = left.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
        if allowed.is_err() {
            totals.max_delete_reached.store(true, Relaxed);
            return Ok(());
        }
        if !self.job.config.dry_run {
            match rustix::fs::unlinkat(dir, name.as_cstr(), flags) {
                // Its names were kept by --max-delete.
                Err(Errno::NOTEMPTY | Errno::EXIST) if totals.max_delete_reached.load(Relaxed) => {
                    return Ok(());
                }
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e).on("unlinkat", Side::Dst, path),
            }
        }
        totals.deleted.add(1);
        if self.job.lines {
            self.crew.tell(Event::Line(Line {
                code: "*deleting  ".to_owned(),
                path: path.to_path(),
                is_dir: flags.contains(AtFlags::REMOVEDIR),
                note: String::new(),
            }));
        }
        Ok(())
    }
}

/// A directory that is being emptied.
struct Open {
    fd: OwnedFd,
    name: Name,
    path: RelPath,
    names: Vec<sys_dir::Entry>,
}
