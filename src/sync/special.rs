//! Special: symlinks, fifos, sockets and devices: made complete, replaced when they differ.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use super::data::Buffers;
use super::dir::Dir;
use super::link::Step;
use super::report::{AsRsync, Changes};
use super::{Event, What, Work, stamp};
use crate::config::Fsync;
use crate::error::{Context, Error, Result, Side};
use crate::meta::Meta;
use crate::sys::fault;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{FileKey, Stat, stat_at};
use crate::sys::xattr::{self, Target};

/// What becomes of what dst has under a name.
enum There {
    Stays(Step),
    /// Something new takes the name.
    Goes(What),
}

impl Work<'_, '_> {
    /// Copies one entry that is neither file nor directory.
    pub(super) fn special(&self, buffers: &mut Buffers, dir: &Arc<Dir>, name: Name) {
        let stat = stat_at(dir.pair.src.as_fd(), name.as_cstr());
        let step = match stat.on("statx", Side::Src, dir.path(&name)) {
            Ok(stat) => match stat.kind() {
                FileType::RegularFile => return self.file(buffers, dir, name),
                FileType::Directory => Err(Error::SrcChanged {
                    path: dir.path(&name).to_path(),
                }),
                kind if !self.is_kept(kind) => Ok(self.left_out(&dir.path(&name), kind)),
                _ => self.grouped(buffers, dir, &name, &stat, |_, group| {
                    self.one_special(dir, &name, stat, group)
                }),
            },
            Err(e) => Err(e),
        };
        self.stepped(buffers, dir, &name, step);
    }

    fn one_special(
        &self,
        dir: &Dir,
        name: &Name,
        stat: Stat,
        group: Option<FileKey>,
    ) -> Result<Step> {
        match stat.kind() {
            FileType::Symlink => self.job.totals.symlinks.add(1),
            _ => self.job.totals.specials.add(1),
        }
        let path = dir.path(name);
        let src = dir.pair.src.as_fd();
        let meta = self.capture(Target::At(src, name), stat, &path)?;
        let target = match stat.kind() {
            FileType::Symlink => Some(rustix::fs::readlinkat(src, name.as_cstr(), Vec::new()).on(
                "readlinkat",
                Side::Src,
                &path,
            )?),
            _ => None,
        };
        let now = dir.dst_stat(name)?;
        if now.is_none() && self.job.config.existing {
            return Ok(self.skipped());
        }
        let note = target.as_ref().map_or_else(String::new, |t| {
            let text = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(t.to_bytes());
            format!(" -> {}", AsRsync(text))
        });
        let what = match &now {
            None => What::New,
            Some(now) => {
                match self.special_there(dir, name, &meta, target.as_deref(), now, &note)? {
                    There::Stays(step) => return Ok(step),
                    There::Goes(what) => what,
                }
            }
        };
        self.make_special(dir, name, &meta, target.as_deref(), now, what, &note)?;
        match group {
            Some(_) if !self.job.config.dry_run => self.key_of(dir, name).map(Step::Done),
            _ => Ok(Step::Done(stat.key)),
        }
    }

    /// dst has something under the name.
    fn special_there(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        target: Option<&CStr>,
        now: &Stat,
        note: &str,
    ) -> Result<There> {
        let path = dir.path(name);
        let stat = &meta.stat;
        if self.job.config.ignore_existing {
            return self.leave_alone(dir, name, now, stat).map(There::Stays);
        }
        if now.is_dir() {
            self.remove_other_type(dir, name)?;
            return Ok(There::Goes(What::New));
        }
        if self.is_same(dir, name, meta, target, now)? {
            let at = Target::At(dir.pair.dst.as_fd(), name);
            let (was, changes) = self.special_changes(at, &path, meta, now)?;
            if !changes.any() || now.nlink < 2 {
                self.prove(&path, meta, target);
            }
            if !changes.any() {
                return Ok(There::Stays(self.left_alone(now.key)));
            }
            // Other names may be somebody else's: as with files, those get an inode of their own.
            if now.nlink < 2 {
                let amended = self.amend_special(dir, name, meta, &was, (changes, note));
                return amended.map(There::Stays);
            }
            return Ok(There::Goes(What::Changed(changes)));
        }
        let kept = self.job.config.keep.times;
        Ok(There::Goes(match now.kind() == stat.kind() {
            true => What::Changed(Changes {
                data: true,
                time: kept && now.mtime != stat.mtime,
                now: !kept,
                ..Changes::default()
            }),
            false => What::New,
        }))
    }

    /// A new inode, complete before it has its name where somebody could mistake it.
    #[allow(clippy::too_many_arguments)] // One entry's whole state; a struct would be used once.
    fn make_special(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        target: Option<&CStr>,
        now: Option<Stat>,
        what: What,
        note: &str,
    ) -> Result<()> {
        let path = dir.path(name);
        self.line('c', meta.stat.kind(), &path, what, note);
        let count = || {
            self.placed();
            match what {
                What::New => self.job.totals.created.add(1),
                What::Changed(_) => self.job.totals.updated.add(1),
            }
        };
        if self.job.config.dry_run {
            count();
            return Ok(());
        }
        let now = now.filter(|n| !n.is_dir());
        let sync = self.job.config.fsync != Fsync::Never;
        let root = self.job.roots.dst.as_fd();
        let direct = self.job.record.begin(root, self.job.round(), sync)?;
        let direct = direct && dir.is_ours() && now.is_none();
        let temp = (!direct).then(|| self.job.temp_name());
        let new = temp.as_ref().unwrap_or(name);
        self.make(dir, new, &meta.stat, target).on(
            if target.is_some() {
                "symlinkat"
            } else {
                "mknodat"
            },
            Side::Dst,
            &path,
        )?;
        fault::point("sync-made");
        let dst = dir.pair.dst.as_fd();
        if self.drops_acl(dir) && target.is_none() {
            let dropped = crate::meta::drop_inherited_acl(Target::At(dst, new), meta);
            dropped.on("removexattr", Side::Dst, &path)?;
        }
        let want = self.wanted_special(dir, new, meta, now.as_ref())?;
        let refused = want.apply_at(dst, new);
        self.refused(&path, refused);
        if temp.is_some() {
            self.publish(dir, new, name, now.as_ref())?;
        }
        self.prove(&path, meta, target);
        count();
        Ok(())
    }

    /// dst has the same link target or device, in an inode that stands for no other.
    fn is_same(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        target: Option<&CStr>,
        now: &Stat,
    ) -> Result<bool> {
        let alone = self.may_stand(dir, now, &meta.stat)?;
        if !alone || now.kind() != meta.stat.kind() || now.rdev != meta.stat.rdev {
            return Ok(false);
        }
        let Some(target) = target else {
            return Ok(true);
        };
        let has = rustix::fs::readlinkat(&dir.pair.dst, name.as_cstr(), Vec::new());
        let has = has.on("readlinkat", Side::Dst, dir.path(name))?;
        Ok(has.as_c_str() == target)
    }

    /// dst's metadata, and what of it differs.
    pub(super) fn special_changes(
        &self,
        dst: Target<'_>,
        path: &RelPath,
        meta: &Meta,
        now: &Stat,
    ) -> Result<(Meta, Changes)> {
        let was = self.named_meta(dst, path, now)?;
        let want = self.wanted(meta, &was);
        let mut changes = stamp::changes(&want, &was, false, self.job.uid == 0);
        let symlink = now.kind() == FileType::Symlink;
        changes.atime = self.job.config.atimes && !symlink && now.atime != meta.stat.atime;
        Ok((was, changes))
    }

    /// What dst has under a name, inode flags aside.
    pub(super) fn named_meta(&self, dst: Target<'_>, path: &RelPath, now: &Stat) -> Result<Meta> {
        let mut was = Meta {
            stat: *now,
            xattrs: Vec::new(),
            flags: 0,
            unread: Vec::new(),
        };
        for attr in xattr::list(dst).on("listxattr", Side::Dst, path)? {
            if self.counts(&attr)
                && let Some(value) = xattr::get(dst, &attr).on("getxattr", Side::Dst, path)?
            {
                was.xattrs.push((attr, value));
            }
        }
        Ok(was)
    }

    fn amend_special(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        was: &Meta,
        (changes, note): (Changes, &str),
    ) -> Result<Step> {
        let path = dir.path(name);
        let dst = Target::At(dir.pair.dst.as_fd(), name);
        self.job.totals.updated.add(1);
        self.line('.', was.stat.kind(), &path, What::Changed(changes), note);
        self.placed();
        if self.job.config.dry_run {
            return Ok(Step::Done(was.stat.key));
        }
        let want = self.wanted(meta, was);
        for (attr, _) in &was.xattrs {
            if want.xattr(attr).is_none() {
                match xattr::remove(dst, attr) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(e) => return Err(e).on("removexattr", Side::Dst, &path),
                }
            }
        }
        let refused = want.apply_at(dir.pair.dst.as_fd(), name);
        self.refused(&path, refused);
        Ok(Step::Done(was.stat.key))
    }

    /// What a new inode is to have.
    fn wanted_special<'m>(
        &self,
        dir: &Dir,
        new: &Name,
        meta: &'m Meta,
        was: Option<&Stat>,
    ) -> Result<Cow<'m, Meta>> {
        if self.job.config.keep.has_all_metadata() {
            return Ok(Cow::Borrowed(meta));
        }
        let (dst, path) = (dir.pair.dst.as_fd(), dir.path(new));
        let now = stat_at(dst, new.as_cstr()).on("statx", Side::Dst, &path)?;
        let has = self.named_meta(Target::At(dst, new), &path, &now)?;
        Ok(self.wanted_new(dir, meta, has, was))
    }

    /// A kind of entries that is not copied; what dst has under the name stays.
    fn left_out(&self, path: &RelPath, kind: FileType) -> Step {
        match kind {
            FileType::Symlink => self.job.totals.symlinks.add(1),
            _ => self.job.totals.specials.add(1),
        }
        self.crew.tell(Event::LeftOut(path.to_path()));
        self.skipped()
    }

    fn make(
        &self,
        dir: &Dir,
        name: &Name,
        stat: &Stat,
        target: Option<&CStr>,
    ) -> Result<(), Errno> {
        match target {
            Some(target) => rustix::fs::symlinkat(target, &dir.pair.dst, name.as_cstr()),
            None => rustix::fs::mknodat(
                &dir.pair.dst,
                name.as_cstr(),
                stat.kind(),
                Mode::from_raw_mode(0o600),
                stat.rdev_encoded(),
            ),
        }
    }
}
