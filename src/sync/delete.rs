//! Delete: names that go from dst: what src does not have, what is of another type, and what an
//! earlier run that was killed left behind.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::data::Buffers;
use super::dir::{BATCH, Dir};
use super::{Event, Line, Work, select, stamp};
use crate::error::{Context, Error, Result, Side};
use crate::filter::Scope;
use crate::mark::CONTROL_DIR;
use crate::meta::LATE_FLAGS;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{Stat, stat_at, stat_fd};
use crate::sys::{dir as sys_dir, fd, host};

/// How the name of an entry that is not complete yet begins.
pub(super) const TEMP: &str = ".mirrorfs-tmp.";

impl Work<'_, '_> {
    /// Removes what an earlier run left behind and, with `--delete`, what src does not have.
    pub(super) fn sweep(&self, buffers: &mut Buffers, dir: &Dir, extra: Option<Vec<Name>>) {
        let wanted = |name: &Name| {
            let control = dir.pair.path.is_root() && name.as_bytes() == CONTROL_DIR.as_bytes();
            let temp = name.as_bytes().starts_with(TEMP.as_bytes());
            let lost_found = host::is_lost_found(dir.pair.dst.as_fd(), name.as_cstr());
            !control && !lost_found && (temp || self.job.config.delete && self.may_go(dir, name))
        };
        if let Some(extra) = extra {
            for name in extra.iter().filter(|n| wanted(n)) {
                self.delete(dir, name);
            }
            return;
        }
        // Too many names to remember: each is asked for in src.
        let mut from = 0;
        loop {
            let mut some = Vec::new();
            let end = sys_dir::read_dir(dir.pair.dst.as_fd(), from, &mut buffers.names, |e| {
                from = e.next;
                if wanted(&e.name) && self.not_in_src(dir, &e.name) {
                    some.push(e.name);
                }
                some.len() < BATCH
            });
            some.iter().for_each(|name| self.delete(dir, name));
            match end {
                Ok(false) if !self.crew.stopping() => {}
                Ok(_) => return,
                Err(e) => {
                    let error: Result<()> = Err(e).on("getdents64", Side::Dst, &dir.pair.path);
                    let _ = error.map_err(|e| self.fail(&dir.pair.path, &e)); // Told.
                    return;
                }
            }
        }
    }

    /// Removes an extraneous name of a directory, with all below it.
    pub(super) fn delete(&self, dir: &Dir, name: &Name) {
        let path = dir.path(name);
        let removed = self.remove(dir, name, &path, false);
        if let Err(e) = removed {
            self.fail(&path, &e);
        }
    }

    /// Makes room for a src entry of another type: a directory goes only with `--delete`.
    pub(super) fn remove_other_type(&self, dir: &Dir, name: &Name) -> Result<()> {
        let path = dir.path(name);
        let stat = stat_at(dir.pair.dst.as_fd(), name.as_cstr()).on("statx", Side::Dst, &path)?;
        let wrong = || Error::WrongType {
            path: path.to_path(),
        };
        if stat.is_dir() && !self.job.config.delete {
            let dst = dir.pair.dst.as_fd();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let open = fd::open_at(dst, name, flags).on("openat", Side::Dst, &path)?;
            let names = sys_dir::list(open.as_fd()).on("getdents64", Side::Dst, &path)?;
            if !names.is_empty() {
                return Err(wrong());
            }
        }
        match self.remove(dir, name, &path, true)? {
            true => Ok(()),
            false => Err(wrong()),
        }
    }

    /// Removes one name: depth first, with a stack of open directories instead of recursion. False:
    /// something in it is protected and stays, and so does what leads to it. `room`: it makes room for
    /// another entry, and is no deletion of its own.
    fn remove(&self, dir: &Dir, name: &Name, path: &RelPath, room: bool) -> Result<bool> {
        let top = dir.pair.dst.as_fd();
        let stat = stat_at(top, name.as_cstr()).on("statx", Side::Dst, path)?;
        if !stat.is_dir() {
            return self.unlink(top, name, path, &stat, room).map(|()| true);
        }
        let dev = stat_fd(top).on("statx", Side::Dst, path)?.key.dev;
        let protection = self.protection(dir);
        let mut stack = vec![self.enter(top, name, path.clone(), dev, protection)?];
        let mut kept = false;
        while let Some(open) = stack.last_mut() {
            let Some(entry) = open.names.pop() else {
                let done = stack.pop();
                let Some(done) = done else { break };
                let last = stack.is_empty();
                match stack.last_mut() {
                    Some(parent) => parent.kept |= done.kept,
                    None => kept = done.kept,
                }
                if !done.kept {
                    let parent = stack.last().map_or(top, |d| d.fd.as_fd());
                    drop(done.fd);
                    let how = Removal {
                        flags: AtFlags::REMOVEDIR,
                        room: room && last,
                    };
                    self.unlink_as(parent, &done.name, &done.path, how)?;
                }
                continue;
            };
            let below = open.path.join(&entry.name);
            let stat = stat_at(open.fd.as_fd(), entry.name.as_cstr());
            let stat = stat.on("statx", Side::Dst, &below)?;
            let protection = open.protection.as_ref();
            if protection.is_some_and(|p| p.keeps(below.as_bytes(), stat.is_dir())) {
                open.kept = true;
            } else if stat.is_dir() {
                let next = self.enter(open.fd.as_fd(), &entry.name, below, dev, protection)?;
                stack.push(next);
            } else {
                self.unlink(open.fd.as_fd(), &entry.name, &below, &stat, false)?;
            }
        }
        Ok(!kept)
    }

    fn enter(
        &self,
        parent: BorrowedFd<'_>,
        name: &Name,
        path: RelPath,
        dev: (u32, u32),
        protection: Option<&Scope>,
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
            protection: select::protection_in(protection, &path, fd.as_fd())?,
            kept: false,
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
        room: bool,
    ) -> Result<()> {
        if (stat.immutable || stat.append)
            && stat.kind() == FileType::RegularFile
            && !self.job.config.dry_run
        {
            let fd = fd::open_at(dir, name, OFlags::RDONLY).on("openat", Side::Dst, path)?;
            stamp::clear_flags(fd.as_fd(), LATE_FLAGS).on("FS_IOC_SETFLAGS", Side::Dst, path)?;
        }
        let how = Removal {
            flags: AtFlags::empty(),
            room,
        };
        self.unlink_as(dir, name, path, how)
    }

    fn unlink_as(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
        path: &RelPath,
        how: Removal,
    ) -> Result<()> {
        let Removal { flags, room } = how;
        let totals = &self.job.totals;
        let left = &self.job.deletes_left;
        let one = || left.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
        if !room && one().is_err() {
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
        if room {
            return Ok(());
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
    /// What of it stays; something does.
    protection: Option<Scope>,
    kept: bool,
}

/// How a name goes.
#[derive(Clone, Copy)]
struct Removal {
    flags: AtFlags,
    /// For another entry of the same name: not counted, not told.
    room: bool,
}
