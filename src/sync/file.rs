//! File: one regular file: new, replaced by a complete new one, or amended in its metadata.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::data::{Buffers, SMALL, Transfer};
use super::dir::Dir;
use super::flow::Flow;
use super::link::Step;
use super::report::Changes;
use super::stamp;
use super::{What, Work};
use crate::config::Fsync;
use crate::error::{Context, Error, Result, Side};
use crate::manifest::{self, Digest, Tree};
use crate::meta::{Born, LATE_FLAGS, Meta};
use crate::sys::name::Name;
use crate::sys::stat::{FileKey, Stat, fd_changed_since, stat_fd};
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, fd};

impl Work<'_, '_> {
    /// Copies one file, or sees that nothing is to be done.
    pub(super) fn file(&self, buffers: &mut Buffers, dir: &Arc<Dir>, name: Name) {
        let begin = Instant::now();
        let opened = dir.open_file(&name);
        let opened = opened.or_else(|(call, e)| Err(e).on(call, Side::Src, dir.at(&name)));
        buffers.waited = begin.elapsed();
        let step = match opened {
            // It was a file when its directory was listed.
            Ok((_, stat)) if !stat.is_file() => return self.special(buffers, dir, name),
            Ok((src, stat)) => return self.now_or_later(buffers, dir, name, src, stat),
            Err(e) => Err(e),
        };
        self.job.totals.src_took(buffers.waited);
        self.stepped(buffers, dir, &name, step);
    }

    /// Copies a file that is open.
    pub(super) fn copy_open(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: OwnedFd,
        stat: Stat,
    ) {
        let step = self.opened(buffers, dir, name, src, stat);
        match stat.size > 0 && stat.nlink == 1 {
            true => self.job.totals.file_took(buffers.waited),
            false => self.job.totals.src_took(buffers.waited),
        }
        self.stepped(buffers, dir, name, step);
    }

    /// Accounts for one name of a directory.
    pub(super) fn stepped(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        step: Result<Step>,
    ) {
        match step {
            Ok(Step::Elsewhere) => return,
            Ok(Step::Done(_) | Step::Skipped) => {}
            // Not an error of this entry; the run says that it was interrupted.
            Err(Error::Stopped) => return,
            Err(e) => self.fail(&dir.path(name), &e),
        }
        self.done(buffers, dir, 1);
    }

    fn opened(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: OwnedFd,
        stat: Stat,
    ) -> Result<Step> {
        self.job.totals.files.add(1);
        self.job.progress.files_seen.add(1);
        self.grouped(buffers, dir, name, &stat, |buffers, group| {
            self.job.totals.bytes_total.add(stat.size);
            self.job.progress.bytes_seen.add(stat.size);
            let meta = self.capture(Target::Open(src.as_fd()), stat, dir.at(name))?;
            let Some(now) = dir.dst_stat(name)? else {
                if self.job.config.existing {
                    return Ok(self.skipped());
                }
                return self.create(buffers, dir, name, src, meta, group, None, What::New);
            };
            if self.job.config.ignore_existing {
                return self.leave_alone(dir, name, &now, &stat);
            }
            if !now.is_file() {
                if now.is_dir() {
                    self.remove_other_type(dir, name)?;
                }
                let now = (!now.is_dir()).then_some(now);
                return self.create(buffers, dir, name, src, meta, group, now, What::New);
            }
            self.existing(buffers, dir, name, src, meta, group, now)
        })
    }

    /// What is not in dst stays so (`--existing`).
    pub(super) fn skipped(&self) -> Step {
        self.job.totals.skipped.add(1);
        self.placed();
        Step::Skipped
    }

    /// What dst has stays (`-u`, `--ignore-existing`), unless an earlier run may have left it half done.
    pub(super) fn leave_alone(
        &self,
        dir: &Dir,
        name: &Name,
        now: &Stat,
        src: &Stat,
    ) -> Result<Step> {
        let path = dir.path(name);
        if now.kind() == src.kind() && self.job.record.may_be_part(now, src) {
            let path = path.to_path();
            return Err(Error::MayBePart { path });
        }
        self.prove_nothing(&path, src.kind());
        Ok(self.left_alone(now.key))
    }

    pub(super) fn left_alone(&self, key: FileKey) -> Step {
        self.job.totals.skipped.add(1);
        self.placed();
        Step::Done(key)
    }

    /// dst has a file of that name.
    #[allow(clippy::too_many_arguments)] // One file's whole state; a struct would be used once.
    fn existing(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: OwnedFd,
        meta: Meta,
        group: Option<FileKey>,
        now: Stat,
    ) -> Result<Step> {
        let config = self.job.config;
        let path = dir.path(name);
        if config.update && now.mtime > meta.stat.mtime {
            return self.leave_alone(dir, name, &now, &meta.stat);
        }
        let size = now.size != meta.stat.size;
        let time = now.mtime != meta.stat.mtime;
        let alone = self.may_stand(dir, &now, &meta.stat)?;
        let looks_same = !size && (!time || config.size_only || config.checksum);
        let half = config.size_only && self.job.record.may_be_part(&now, &meta.stat);
        let reads = config.checksum || half || self.job.record.doubts(&now);
        let settled = self.job.proof.is_some() && manifest::is_settled(&meta.stat);
        let mut dst = None;
        let mut read = None;
        let mut same = alone && looks_same && !config.ignore_times;
        if same {
            let file = fd::open_src(dir.pair.dst.as_fd(), name).on("openat", Side::Dst, &path)?;
            if reads {
                (same, read) = self.same_bytes(buffers, &src, &file, &path, meta.stat.size)?;
            }
            dst = Some(file);
        }
        let Some(file) = dst.filter(|_| same) else {
            let differs = (reads, size, time);
            let changes = self.replaced(dir, name, &meta, &now, differs)?;
            let what = What::Changed(changes);
            return self.create(buffers, dir, name, src, meta, group, Some(now), what);
        };
        let (was, flags) = self.dst_meta(file.as_fd(), now, &path)?;
        let root = self.job.uid == 0;
        let want = self.wanted(&meta, &was);
        let mut changes = stamp::changes(&want, &was, flags && self.job.src_flags, root);
        changes.atime = config.atimes && now.atime != meta.stat.atime;
        if !changes.any() || now.nlink < 2 {
            self.prove_equal(buffers, &path, (&src, &meta), read, settled)?;
        }
        if !changes.any() {
            return Ok(self.left_alone(now.key));
        }
        if now.nlink > 1 {
            // Other names may be somebody else's: whoever could plant a link here would get its file.
            drop(want);
            let what = What::Changed(changes);
            return self.create(buffers, dir, name, src, meta, group, Some(now), what);
        }
        self.job.totals.updated.add(1);
        self.line(
            '.',
            FileType::RegularFile,
            &path,
            What::Changed(changes),
            "",
        );
        self.placed();
        if config.dry_run {
            return Ok(Step::Done(now.key));
        }
        if was.flags & LATE_FLAGS != 0 {
            let cleared = stamp::clear_flags(file.as_fd(), LATE_FLAGS);
            cleared.on("FS_IOC_SETFLAGS", Side::Dst, &path)?;
        }
        let refused = stamp::amend(file.as_fd(), &want, &was);
        self.refused(&path, refused);
        self.late_flags_of(dir, name, &file, &meta)?;
        Ok(Step::Done(now.key))
    }

    /// What is said of a file that another one replaces; `differs`: bytes, size, time.
    fn replaced(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        now: &Stat,
        (data, size, time): (bool, bool, bool),
    ) -> Result<Changes> {
        let keep = self.job.config.keep;
        let mut changes = Changes {
            data,
            size,
            time: time && keep.times,
            now: !keep.times,
            atime: self.job.config.atimes && now.atime != meta.stat.atime,
            mode: keep.perms && now.perm() != meta.stat.perm(),
            owner: keep.owner && now.uid != meta.stat.uid,
            group: keep.group && now.gid != meta.stat.gid,
            ..Changes::default()
        };
        if self.job.lines {
            let at = Target::At(dir.pair.dst.as_fd(), name);
            let was = self.named_meta(at, &dir.path(name), now)?;
            let want = self.wanted(meta, &was);
            let all = stamp::changes(&want, &was, false, self.job.uid == 0);
            (changes.acl, changes.xattr) = (all.acl, all.xattr);
        }
        Ok(changes)
    }

    /// A new file, under its own name or a temporary one; large ones are finished elsewhere.
    #[allow(clippy::too_many_arguments)] // One file's whole state; a struct would be used once.
    fn create(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: OwnedFd,
        meta: Meta,
        group: Option<FileKey>,
        now: Option<Stat>,
        what: What,
    ) -> Result<Step> {
        if self.job.lines {
            self.line('>', FileType::RegularFile, &dir.path(name), what, "");
        }
        match what {
            What::New => self.job.totals.created.add(1),
            What::Changed(_) => self.job.totals.updated.add(1),
        }
        self.job.totals.transferred.add(1);
        if self.job.config.dry_run {
            self.job.totals.bytes_copied.add(meta.stat.size);
            return Ok(Step::Done(meta.stat.key));
        }
        let root = self.job.roots.dst.as_fd();
        let sync = self.job.config.fsync != Fsync::Never;
        let recorded = self.job.record.begin(root, self.job.round(), sync)?;
        let direct = recorded && dir.is_ours() && now.is_none();
        let temp = (!direct).then(|| self.job.temp_name());
        let (dst, born) = self.born(dir, temp.as_ref().unwrap_or(name), &meta, now.as_ref())?;
        fault::point("sync-made");
        let sparse = meta.stat.is_sparse() && self.job.config.keep.holes;
        let size = meta.stat.size;
        let proves = self.job.proof.is_some();
        let settled = proves && manifest::is_settled(&meta.stat);
        let mut transfer = Transfer {
            dir: Arc::clone(dir),
            name: name.clone(),
            temp,
            now,
            src,
            dst,
            meta,
            born,
            group,
            sparse,
            unchanged: size == 0,
            recorded,
            flow: Flow::keep(),
            pipes: AtomicBool::new(true),
            digest: (proves && size == 0).then(|| Digest::of(&[])),
            tree: None,
            settled,
            cloned: false,
            parts: AtomicUsize::new(1),
            failed: Mutex::new(None),
        };
        transfer.cloned = size > 0 && self.clone_whole(&transfer)?;
        if size > 0 && (!transfer.cloned || proves) {
            if size > SMALL as u64 || sparse {
                self.large(buffers, transfer)?;
                return Ok(Step::Elsewhere);
            }
            let copied = match transfer.cloned {
                true => self.hash_clone(buffers, &mut transfer),
                false => self.small(buffers, &mut transfer),
            };
            copied.inspect_err(|_| self.abandon(&transfer))?;
        }
        self.seal(&transfer).map(Step::Done)
    }

    /// An empty file in dst, and what it has of owner and mode already.
    fn born(
        &self,
        dir: &Dir,
        name: &Name,
        meta: &Meta,
        was: Option<&Stat>,
    ) -> Result<(OwnedFd, Born)> {
        let perm = self.new_perm(dir, &meta.stat, was);
        // Not while the wrong owner could be let in by setuid, and not through an umask or an ACL.
        let direct = perm & (0o7000 | self.job.umask) == 0 && !dir.inherits;
        let mode = Mode::from_raw_mode(if direct { perm } else { 0o600 });
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&dir.pair.dst, name.as_cstr(), flags, mode);
        let file = file.on("openat", Side::Dst, dir.at(name))?;
        let perm = direct.then_some(perm);
        Ok((file, Born { perm, ..dir.born }))
    }

    /// Data is here: metadata, durability if asked for, the name.
    pub(super) fn seal(&self, transfer: &Transfer) -> Result<FileKey> {
        let sealed = self.sealed(transfer);
        if sealed.is_err() {
            self.abandon(transfer);
        }
        sealed
    }

    fn sealed(&self, t: &Transfer) -> Result<FileKey> {
        let path = t.at();
        let dst = t.dst.as_fd();
        fault::point("sync-copied");
        if self.drops_acl(&t.dir) {
            let dropped = crate::meta::drop_inherited_acl(Target::Open(dst), &t.meta);
            dropped.on("removexattr", Side::Dst, path)?;
        }
        if !t.recorded && t.meta.stat.size > 0 && self.job.config.fsync != Fsync::Never {
            // Nothing would tell the next run that these bytes may be lost.
            fd::fdatasync(dst).on("fdatasync", Side::Dst, path)?;
        }
        let changed = !t.unchanged && self.src_changed(t)?.is_some();
        if changed {
            // What was read is better than nothing; but it must not pass the next run's quick
            // check, so it keeps the time of this copy.
            let mut meta = self.wanted_file(t)?.into_owned();
            meta.stat.mtime = stat_fd(dst).on("statx", Side::Dst, path)?.mtime;
            let refused = stamp::fresh(dst, &meta, t.born);
            let path = path.path();
            self.refused(&path, refused);
            let changed = Error::SrcChanged {
                path: path.to_path(),
            };
            self.fail(&path, &changed);
        } else {
            let want = self.wanted_file(t)?;
            let refused = stamp::fresh(dst, &want, t.born);
            if !refused.is_empty() {
                self.refused(&path.path(), refused);
            }
        }
        fault::point("sync-stamped");
        if self.job.config.fsync == Fsync::File {
            fd::fsync(dst).on("fsync", Side::Dst, path)?;
        }
        if let Some(temp) = &t.temp {
            self.publish(&t.dir, temp, &t.name, t.now.as_ref())?;
        }
        self.late_flags_of(&t.dir, &t.name, &t.dst, &t.meta)?;
        self.prove_copied(t, changed);
        self.placed();
        self.job.progress.files_pulled.add(1);
        // Only a group asks for it: the usual file is not looked at again.
        match t.group {
            Some(_) => Ok(stat_fd(dst).on("statx", Side::Dst, path)?.key),
            None => Ok(t.meta.stat.key),
        }
    }

    /// What the new inode is to have.
    fn wanted_file<'t>(&self, t: &'t Transfer) -> Result<Cow<'t, Meta>> {
        if self.job.config.keep.has_all_metadata() {
            return Ok(Cow::Borrowed(&t.meta));
        }
        let now = stat_fd(t.dst.as_fd()).on("statx", Side::Dst, t.at())?;
        let (has, _) = self.dst_meta(t.dst.as_fd(), now, &t.at().path())?;
        Ok(self.wanted_new(&t.dir, &t.meta, has, t.now.as_ref()))
    }

    /// +i and +a: now, or when all names are there.
    fn late_flags_of(&self, dir: &Dir, name: &Name, file: &OwnedFd, meta: &Meta) -> Result<()> {
        match meta.flags & LATE_FLAGS {
            0 => {}
            flags if meta.stat.nlink > 1 => self.late(&dir.path(name), flags),
            flags => {
                let set = stamp::add_flags(file.as_fd(), flags);
                set.on("FS_IOC_SETFLAGS", Side::Dst, dir.at(name))?;
            }
        }
        Ok(())
    }

    /// Takes back a file that is not complete.
    pub(super) fn abandon(&self, t: &Transfer) {
        let name = t.temp.as_ref().unwrap_or(&t.name);
        match rustix::fs::unlinkat(&t.dir.pair.dst, name.as_cstr(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            // What failed before is told; what is left here is replaced by the next run.
            Err(_) => {}
        }
    }

    /// Whether the bytes of both files are equal (`--checksum`); for the manifest src's digest.
    pub(super) fn same_bytes(
        &self,
        buffers: &mut Buffers,
        src: &OwnedFd,
        dst: &OwnedFd,
        path: &crate::sys::name::RelPath,
        size: u64,
    ) -> Result<(bool, Option<Digest>)> {
        let stat = match self.job.proof.is_some() {
            true => Some(stat_fd(src.as_fd()).on("statx", Side::Src, path)?),
            false => None,
        };
        let tree = stat.filter(manifest::is_hashed).map(|_| Tree::new(size));
        let mut fed = tree.as_ref().map(|tree| (tree, tree.feed(0)));
        let mut offset = 0;
        while offset < size {
            if self.stopping() {
                return Err(Error::Stopped);
            }
            // Where both have a hole nothing is read: only from the nearer data on.
            let data = |fd: &OwnedFd, side| {
                let next = copy::next_data(fd.as_fd(), offset, size).on("lseek", side, path)?;
                Ok::<u64, Error>(next.map_or(size, |extent| extent.start))
            };
            offset = data(src, Side::Src)?.min(data(dst, Side::Dst)?);
            let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
            let (a, b) = buffers.two();
            let len = a.len().min(left);
            let (a, b) = (&mut a[..len], &mut b[..len]);
            let n = fd::pread_all(src.as_fd(), a, offset).on("read", Side::Src, path)?;
            let m = fd::pread_all(dst.as_fd(), b, offset).on("read", Side::Dst, path)?;
            if a[..n] != b[..m] {
                return Ok((false, None));
            }
            if let Some((tree, feed)) = &mut fed {
                tree.bytes(feed, offset, &a[..n]);
            }
            if n == 0 {
                break;
            }
            offset += n as u64;
        }
        Ok((true, tree.and_then(|tree| tree.digest())))
    }

    /// A dry run or a clone counts like a copy.
    pub(super) fn copied(&self, bytes: u64) {
        self.job.totals.bytes_copied.add(bytes);
        self.job.progress.bytes_pulled.add(bytes);
    }

    /// Waits as --bwlimit wants it.
    pub(super) fn pace(&self, bytes: u64) {
        self.job.throttle.spend(bytes);
        self.job.throttle.wait(|| self.stopping()); // Stopping: the caller sees that too.
    }

    /// Looks at src again after a copy.
    pub(super) fn src_changed(&self, t: &Transfer) -> Result<Option<Stat>> {
        let changed = fd_changed_since(t.src.as_fd(), &t.meta.stat);
        if !changed.on("fstat", Side::Src, t.at())? {
            return Ok(None);
        }
        let after = stat_fd(t.src.as_fd());
        after.on("statx", Side::Src, t.at()).map(Some)
    }

    /// The run was asked to stop.
    pub(super) fn stopping(&self) -> bool {
        self.crew.stopping() || self.job.totals.dst_full.load(Relaxed)
    }
}
