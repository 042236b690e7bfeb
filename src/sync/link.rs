//! Link: names of a src inode that has several. The first makes the dst inode, the others become
//! links to it; whoever comes while it is being made is parked and nobody waits (`links`).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::data::Buffers;
use super::dir::Dir;
use super::report::{AsRsync, Changes};
use super::{Item, Parked, What, Work, stamp};
use crate::error::{Context, Error, Result, Side};
use crate::links::{Claim, StandIn};
use crate::meta::LATE_FLAGS;
use crate::sys::dir::Entry;
use crate::sys::fd;
use crate::sys::name::Name;
use crate::sys::stat::{FileKey, Stat, stat_at};
use crate::sys::xattr::Target;

/// How far one name came.
pub(super) enum Step {
    /// In dst, as this inode (in a dry run: as src's).
    Done(FileKey),
    /// Not in dst, and not to be made.
    Skipped,
    /// Others finish it: it is parked, or large and being copied.
    Elsewhere,
}

impl Work<'_, '_> {
    /// Makes the first name of an inode by `make`, links the others.
    pub(super) fn grouped(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        stat: &Stat,
        make: impl FnOnce(&mut Buffers, Option<FileKey>) -> Result<Step>,
    ) -> Result<Step> {
        if stat.nlink < 2 || !self.job.config.keep.hard_links {
            return make(buffers, None);
        }
        let claim = self.job.groups.claim(stat.key, stat.nlink, || Parked {
            dir: Arc::clone(dir),
            name: name.clone(),
            kind: stat.kind(),
        });
        match claim {
            Claim::First => {}
            Claim::Parked => return Ok(Step::Elsewhere),
            Claim::Made(stand_in) => {
                return self.link(dir, name, stat.kind(), stat.key, &stand_in);
            }
        }
        match self.join(buffers, dir, name, stat) {
            Ok(None) => {}
            joined => {
                // The names that waited join it as well.
                self.not_made(stat.key);
                return joined.map(|step| step.unwrap_or(Step::Elsewhere));
            }
        }
        match make(buffers, Some(stat.key)) {
            Ok(Step::Done(key)) => {
                self.made(buffers, dir, name, stat, key);
                Ok(Step::Done(key))
            }
            Ok(Step::Elsewhere) => Ok(Step::Elsewhere),
            Ok(Step::Skipped) => {
                self.not_made(stat.key);
                Ok(Step::Skipped)
            }
            Err(e) => {
                self.not_made(stat.key);
                Err(e)
            }
        }
    }

    /// A name whose inode number belonged to an inode with several names: true when it is one of that
    /// inode's, and linked or parked. Then src's file need not be opened.
    pub(super) fn linked(&self, buffers: &mut Buffers, dir: &Arc<Dir>, entry: &Entry) -> bool {
        if !self.job.groups.may_have(entry.ino) {
            return false;
        }
        // The number alone says nothing: of another file system, or of what was replaced since.
        let begin = Instant::now();
        let stat = match stat_at(dir.pair.src.as_fd(), entry.name.as_cstr()) {
            Ok(stat) if stat.is_file() && stat.nlink > 1 => stat,
            _ => return false, // Opened, it says the same again.
        };
        let took = begin.elapsed();
        let name = &entry.name;
        let claim = self.job.groups.claim_known(stat.key, || Parked {
            dir: Arc::clone(dir),
            name: name.clone(),
            kind: stat.kind(),
        });
        let step = match claim {
            None | Some(Claim::First) => return false,
            Some(Claim::Parked) => Ok(Step::Elsewhere),
            Some(Claim::Made(stand_in)) => self.link(dir, name, stat.kind(), stat.key, &stand_in),
        };
        self.job.totals.src_took(took);
        self.job.totals.files.add(1);
        self.job.progress.files_seen.add(1);
        self.stepped(buffers, dir, name, step);
        true
    }

    /// The inode of a group is in dst: links the names that waited for it.
    pub(super) fn made(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: &Stat,
        key: FileKey,
    ) {
        let group = src.key;
        match self.share(dir, name, src) {
            Ok(false) => {}
            Ok(true) => return self.not_made(group), // They join it, as other shards do.
            Err(e) => self.fail(&dir.path(name), &e),
        }
        let stand_in = StandIn {
            path: dir.path(name),
            key,
        };
        for parked in self.job.groups.made(group, stand_in.clone()) {
            let Parked { dir, name, kind } = parked;
            if let Err(e) = self.link(&dir, &name, kind, group, &stand_in) {
                self.fail(&dir.path(&name), &e);
            }
            self.done(buffers, &dir, 1);
        }
    }

    /// The inode of a group could not be made: the names that waited try for themselves.
    pub(super) fn not_made(&self, group: FileKey) {
        for Parked { dir, name, kind } in self.job.groups.failed(group) {
            let entry = Entry {
                name,
                ino: group.ino,
                kind,
                next: 0,
            };
            self.crew.push([Item::Names(dir, vec![entry])]);
        }
    }

    /// One more name for the inode that stands for `group`.
    pub(super) fn link(
        &self,
        dir: &Dir,
        name: &Name,
        kind: FileType,
        group: FileKey,
        stand_in: &StandIn,
    ) -> Result<Step> {
        let path = dir.path(name);
        let now = dir.dst_stat(name)?;
        if now.is_none() && self.job.config.existing {
            return Ok(self.skipped());
        }
        if let Some(now) = now {
            if self.job.shards.is_none() {
                // The inode is compared with the stand-in right below.
                let _ = self.job.groups.may_stand_for(&now, group); // Only counts the name.
            }
            if now.key == stand_in.key {
                self.prove_link(&path, kind, group);
                return Ok(self.left_alone(stand_in.key));
            }
            if self.job.config.ignore_existing {
                let src = stat_at(dir.pair.src.as_fd(), name.as_cstr());
                let src = src.on("statx", Side::Src, &path)?;
                return self.leave_alone(dir, name, &now, &src);
            }
            if now.is_dir() {
                self.remove_other_type(dir, name)?;
            }
        }
        let what = match &now {
            Some(now) if self.job.lines && now.kind() == kind => {
                What::Changed(self.changes_of_link(dir, name, now)?)
            }
            _ => What::New,
        };
        let tell = || {
            let note = format!(" => {}", AsRsync(stand_in.path.to_path().as_os_str()));
            self.line('h', kind, &path, what, &note);
            self.job.totals.hardlinks.add(1);
            self.placed();
        };
        if self.job.config.dry_run {
            tell();
            return Ok(Step::Done(stand_in.key));
        }
        let on = |call, e: Errno| -> Error {
            Error::Call {
                call,
                side: Side::Dst,
                path: path.to_path(),
                errno: e,
            }
        };
        let temp = now.filter(|n| !n.is_dir()).map(|_| self.job.temp_name());
        let new = temp.as_ref().unwrap_or(name);
        if let Err(e) = self.unlocked(stand_in, || self.link_once(dir, new, stand_in)) {
            // As many names as dst can hold (EMLINK), or removed meanwhile: the next name of this
            // inode makes another one.
            self.job.groups.forget(group);
            return Err(on("linkat", e));
        }
        if temp.is_some() {
            self.publish(dir, new, name, now.as_ref())?;
        }
        self.prove_link(&path, kind, group);
        tell();
        Ok(Step::Done(stand_in.key))
    }

    /// How dst's entry differs from what takes its name.
    fn changes_of_link(&self, dir: &Dir, name: &Name, now: &Stat) -> Result<Changes> {
        let path = dir.path(name);
        let src = dir.pair.src.as_fd();
        let stat = stat_at(src, name.as_cstr()).on("statx", Side::Src, &path)?;
        let meta = self.capture(Target::At(src, name), stat, &path)?;
        let dst = Target::At(dir.pair.dst.as_fd(), name);
        let was = self.named_meta(dst, &path, now)?;
        Ok(Changes {
            size: stat.is_file() && stat.size != now.size,
            now: !self.job.config.keep.times,
            ..stamp::changes(&self.wanted(&meta, &was), &was, false, self.job.uid == 0)
        })
    }

    fn link_once(&self, dir: &Dir, new: &Name, stand_in: &StandIn) -> Result<(), Errno> {
        let (parent, old) = stand_in.path.split_last().ok_or(Errno::INVAL)?;
        let dst = dir.pair.dst.as_fd();
        if parent == dir.pair.path {
            return rustix::fs::linkat(dst, old.as_cstr(), dst, new.as_cstr(), AtFlags::empty());
        }
        let root = self.job.roots.dst.as_fd();
        let from = fd::open_beneath(root, &parent, OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::linkat(from, old.as_cstr(), dst, new.as_cstr(), AtFlags::empty())
    }

    /// Links once more without +i and +a where they forbid it.
    pub(super) fn unlocked(
        &self,
        of: &StandIn,
        link: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        match link() {
            Err(Errno::PERM) if self.unlock(of)? => link(),
            other => other,
        }
    }

    /// Clears +i and +a, which forbid links; they are set again at the end. False: there are none.
    fn unlock(&self, stand_in: &StandIn) -> Result<bool, Errno> {
        let root = self.job.roots.dst.as_fd();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let fd = fd::open_beneath(root, &stand_in.path, flags)?;
        let now = crate::sys::copy::inode_flags(fd.as_fd())?.unwrap_or(0) & LATE_FLAGS;
        if now == 0 {
            return Ok(false);
        }
        stamp::clear_flags(fd.as_fd(), LATE_FLAGS)?;
        self.late(&stand_in.path, now);
        Ok(true)
    }

    /// Notes +i and +a of an inode with several names, for the end of the run.
    pub(super) fn late(&self, path: &crate::sys::name::RelPath, flags: u32) {
        let mut late = self.job.late.lock().unwrap_or_else(|e| e.into_inner());
        late.push((path.clone(), flags));
    }

    /// Gives a complete entry its name, over whatever (no directory) has it now.
    pub(super) fn publish(
        &self,
        dir: &Dir,
        temp: &Name,
        name: &Name,
        now: Option<&Stat>,
    ) -> Result<()> {
        let dst = dir.pair.dst.as_fd();
        if now.is_some_and(|n| n.is_file() && (n.immutable || n.append)) {
            let cleared = fd::open_at(dst, name, OFlags::RDONLY)
                .and_then(|fd| stamp::clear_flags(fd.as_fd(), LATE_FLAGS));
            cleared.on("FS_IOC_SETFLAGS", Side::Dst, dir.path(name))?;
        }
        let renamed = rustix::fs::renameat(dst, temp.as_cstr(), dst, name.as_cstr());
        if renamed.is_err() {
            // The error of the rename is what counts; a name left here goes with the next run.
            let _ = rustix::fs::unlinkat(dst, temp.as_cstr(), AtFlags::empty()); // As said.
        }
        renamed.on("renameat", Side::Dst, dir.path(name))
    }

    /// What dst has under a name now, for the group's stand-in.
    pub(super) fn key_of(&self, dir: &Dir, name: &Name) -> Result<FileKey> {
        let stat = stat_at(dir.pair.dst.as_fd(), name.as_cstr());
        Ok(stat.on("statx", Side::Dst, dir.path(name))?.key)
    }
}
