//! Dir: one directory, from its opening on both sides until its times are set.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use super::data::Buffers;
use super::report::Changes;
use super::select::Selection;
use super::stamp;
use super::{Item, What, Work};
use crate::error::{Context, Error, Located, Result, Side};
use crate::mark::CONTROL_DIR;
use crate::meta::{Born, DEFAULT_ACL, LATE_FLAGS, Meta};
use crate::sys::dir::{self as sys_dir, Entry};
use crate::sys::name::{Name, RelPath};
use crate::sys::pair::{Pair, Place};
use crate::sys::stat::{Stat, stat_at, stat_fd};
use crate::sys::xattr::{self, Target};
use crate::sys::{copy, host};

/// Entries that are listed at once.
pub(super) const BATCH: usize = 1024;
/// dst names that are remembered to answer "is it there?"; beyond it the kernel is asked.
const LISTED_MAX: usize = 4096;

/// A directory that is being copied.
pub(super) struct Dir {
    pub(super) pair: Arc<Pair>,
    /// This run has made it: what is not ours cannot be in it, and nobody looks inside.
    pub(super) fresh: bool,
    /// What src's directory is.
    pub(super) meta: Meta,
    /// What dst's directory was before anything was made in it.
    pub(super) before: Stat,
    /// What of it counts.
    pub(super) selection: Selection,
    /// What src does not have may be removed.
    sweeps: bool,
    /// What new inodes in it are born with.
    pub(super) born: Born,
    /// What new inodes may have of their permissions, where src's are not kept.
    pub(super) default_perm: u32,
    /// It has a default ACL that new inodes inherit.
    pub(super) inherits: bool,
    /// src is a server that may go by paths.
    pub(super) served: bool,
    /// All of dst's names when it was opened; `None`: too many, or fresh.
    listed: Option<HashSet<Name>>,
    /// dst's names that src does not have, where both were listed whole.
    extra: Mutex<Option<Vec<Name>>>,
    /// Not all of src's names are known: nothing may be removed.
    unsure: AtomicBool,
    /// Batches and names that are not done yet.
    left: AtomicUsize,
}

impl Dir {
    /// What src's directory is.
    pub(super) fn src_stat(&self) -> &Stat {
        &self.meta.stat
    }

    /// Something more has to be done before the directory is finished.
    pub(super) fn hold(&self, n: usize) {
        self.left.fetch_add(n, Relaxed);
    }

    /// What dst has under a name; `None`: nothing. No call where that is known already.
    pub(super) fn dst_stat(&self, name: &Name) -> Result<Option<Stat>> {
        if self.is_new(name) {
            return Ok(None);
        }
        match stat_at(self.pair.dst.as_fd(), name.as_cstr()) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e).on("statx", Side::Dst, self.path(name)),
        }
    }

    /// dst is known to have nothing under a name.
    pub(super) fn is_new(&self, name: &Name) -> bool {
        self.fresh || self.listed.as_ref().is_some_and(|l| !l.contains(name))
    }

    /// Where an entry is, for an error.
    pub(super) fn at<'a>(&'a self, name: &'a Name) -> At<'a> {
        At(self, name)
    }

    /// The path of an entry.
    pub(super) fn path(&self, name: &Name) -> RelPath {
        self.pair.path.join(name)
    }

    /// A name may be given to a file before it is complete: nobody can mistake it.
    pub(super) fn is_ours(&self) -> bool {
        self.fresh || self.listed.as_ref().is_some_and(HashSet::is_empty)
    }
}

/// An entry of a directory: its path is put together only when somebody asks for it.
#[derive(Clone, Copy)]
pub(super) struct At<'a>(&'a Dir, &'a Name);

impl At<'_> {
    pub(super) fn path(&self) -> RelPath {
        self.0.path(self.1)
    }
}

impl Located for At<'_> {
    fn located(&self) -> std::path::PathBuf {
        self.path().to_path()
    }
}

impl Work<'_, '_> {
    /// Opens a directory on both sides and does its first batch.
    pub(super) fn dir(
        &self,
        buffers: &mut Buffers,
        place: &Place,
        selection: &Selection,
        fresh: bool,
        shallow: bool,
    ) {
        if self.is_others(&place.path) {
            if !shallow {
                self.pass(buffers, place);
            }
            return;
        }
        let fresh = fresh || self.would_be_made(place);
        match self.open(buffers, place, selection, fresh, shallow) {
            Ok(dir) if shallow => self.done(buffers, &Arc::new(dir), 1),
            Ok(dir) => self.batch(buffers, &Arc::new(dir), 0),
            Err(e) => self.fail(&place.path, &e),
        }
    }

    fn open(
        &self,
        buffers: &mut Buffers,
        place: &Place,
        of: &Selection,
        fresh: bool,
        shallow: bool,
    ) -> Result<Dir> {
        let roots = &self.job.roots;
        let path = &place.path;
        self.job.totals.dirs.add(1);
        if path.is_root() {
            self.seen();
        }
        let begin = Instant::now();
        let src = roots.open_src(place).on("openat2", Side::Src, path)?;
        let stat = stat_fd(src.as_fd()).on("statx", Side::Src, path)?;
        self.job.totals.src_took(begin.elapsed());
        self.entered(&stat, path);
        let meta = self.capture(Target::Open(src.as_fd()), stat, path)?;
        let dst = match self.job.config.dry_run && fresh {
            // Never looked at: nothing is in a directory that would be made.
            true => host::dup(roots.dst.as_fd()).on("dup", Side::Dst, path)?,
            false => self.open_dst(place)?,
        };
        let now = stat_fd(dst.as_fd()).on("statx", Side::Dst, path)?;
        let theirs = (!fresh).then(|| dst.as_fd());
        let selection = self.selected(of, path, src.as_fd(), theirs)?;
        if now.mount_root || self.job.shards.is_some() {
            let noted = self.job.on_device(now.key.dev, dst.as_fd());
            noted.on("dup", Side::Dst, path)?;
        }
        let mut inherits = false;
        let mut listed = None;
        let mut extra = Vec::new();
        if !(self.job.config.dry_run && fresh) {
            // A fresh one may have inherited it from a parent that was there before.
            let acl = xattr::get(Target::Open(dst.as_fd()), DEFAULT_ACL);
            inherits = acl.on("getxattr", Side::Dst, path)?.is_some();
        }
        if !fresh {
            if (now.immutable || now.append) && !self.job.config.dry_run {
                stamp::clear_flags(dst.as_fd(), LATE_FLAGS).on(
                    "FS_IOC_SETFLAGS",
                    Side::Dst,
                    path,
                )?;
            }
            listed = list(buffers, &dst).on("getdents64", Side::Dst, path)?;
            extra = listed.iter().flatten().cloned().collect();
        }
        // New inodes take the directory's group when it is setgid (or the file system is grpid).
        let gid = if now.gid == self.job.gid {
            now.gid
        } else {
            u32::MAX
        };
        let default_perm = self.default_perm(dst.as_fd(), path)?;
        Ok(Dir {
            default_perm,
            pair: roots.pair(path.clone(), src, dst),
            served: self.job.served.is(meta.stat.key.dev),
            fresh,
            meta,
            before: now,
            sweeps: !fresh && !shallow && selection.sweeps(),
            selection,
            born: Born {
                uid: self.job.uid,
                gid,
                perm: None,
                // What is inherited from the directory may stay, as with cp(1).
                flags: None,
            },
            inherits,
            extra: Mutex::new(listed.is_some().then_some(extra)),
            listed,
            unsure: AtomicBool::new(false),
            left: AtomicUsize::new(1),
        })
    }

    fn open_dst(&self, place: &Place) -> Result<OwnedFd> {
        if self.job.shards.is_some() {
            return self.open_owned(place);
        }
        self.job
            .roots
            .open_dst(place)
            .on("openat2", Side::Dst, &place.path)
    }

    /// Lists a batch of src's names. Subdirectories first. Whoever has nothing to do lists the next
    /// batch; if nobody is, this thread does after this one: two that make names in one directory
    /// wait for each other.
    pub(super) fn batch(&self, buffers: &mut Buffers, dir: &Arc<Dir>, from: u64) {
        let mut names = Vec::new();
        let mut next = from;
        let all = match self.picked(dir, from, BATCH) {
            Some((listed, all)) => {
                next += BATCH as u64;
                names = listed;
                all
            }
            None => self.listing(buffers, dir, &mut next, &mut names),
        };
        self.choose(dir, &mut names);
        let mut more = (!all).then(|| {
            dir.hold(1);
            Item::More(Arc::clone(dir), next)
        });
        if self.job.totals.is_slow() {
            self.crew.push(more.take());
        }
        self.known(dir, &names);
        let (mut dirs, mut others): (Vec<Entry>, Vec<Entry>) = (Vec::new(), Vec::new());
        for mut entry in names {
            self.seen();
            if dir.pair.path.is_root() && entry.name.as_bytes() == CONTROL_DIR.as_bytes() {
                let reserved: Result<()> = Err(Errno::EXIST).on(
                    "the control directory's name",
                    Side::Dst,
                    dir.path(&entry.name),
                );
                let _ = reserved.map_err(|e| self.fail(&dir.path(&entry.name), &e)); // Told.
                continue;
            }
            if entry.kind == FileType::Unknown {
                match stat_at(dir.pair.src.as_fd(), entry.name.as_cstr()) {
                    Ok(stat) => entry.kind = stat.kind(),
                    Err(e) => {
                        self.src_failed("statx", &dir.path(&entry.name), e);
                        continue;
                    }
                }
            }
            match entry.kind {
                FileType::Directory => dirs.push(entry),
                _ => others.push(entry),
            }
        }
        // Inode tables are read from their start: what src has to fetch comes in larger pieces.
        // The stack gives the last first.
        others.sort_unstable_by_key(|e| std::cmp::Reverse(e.ino));
        dirs.sort_unstable_by_key(|e| std::cmp::Reverse(e.ino));
        self.subdirs(dir, dirs);
        dir.hold(others.len());
        self.names(buffers, dir, others, &mut more);
        self.crew.push(more);
        self.done(buffers, dir, 1);
    }

    /// A batch of src's names; true at the end.
    fn listing(
        &self,
        buffers: &mut Buffers,
        dir: &Dir,
        next: &mut u64,
        names: &mut Vec<Entry>,
    ) -> bool {
        let src = dir.pair.src.as_fd();
        let end = sys_dir::read_dir(src, *next, &mut buffers.names, |e| {
            *next = e.next;
            names.push(e);
            names.len() < BATCH
        });
        end.unwrap_or_else(|e| {
            dir.unsure.store(true, Relaxed);
            let error: Result<()> = Err(e).on("getdents64", Side::Src, &dir.pair.path);
            let _ = error.map_err(|e| self.fail(&dir.pair.path, &e)); // Told; the rest goes on.
            true
        })
    }

    /// Takes src's names out of dst's: what is left in the end only dst has.
    fn known(&self, dir: &Dir, names: &[Entry]) {
        let mut extra = dir.extra.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(extra) = extra.as_mut().filter(|e| !e.is_empty()) {
            let src: HashSet<&Name> = names.iter().map(|e| &e.name).collect();
            extra.retain(|name| !src.contains(name));
        }
    }

    fn seen(&self) {
        self.job.totals.entries.add(1);
        self.job.progress.entries_seen.add(1);
    }

    pub(super) fn placed(&self) {
        self.job.progress.entries_placed.add(1);
    }

    pub(super) fn src_failed(&self, call: &'static str, path: &RelPath, errno: Errno) {
        let side = Side::Src;
        let path_buf = path.to_path();
        self.fail(
            path,
            &Error::Call {
                call,
                side,
                path: path_buf,
                errno,
            },
        );
    }

    /// Makes the subdirectories, all of them before any is entered.
    fn subdirs(&self, dir: &Arc<Dir>, dirs: Vec<Entry>) {
        let mut items = Vec::with_capacity(dirs.len());
        for entry in dirs {
            if self.skips_new(dir, &entry.name) {
                continue;
            }
            let made = self.shallow(dir, &entry.name).and_then(|shallow| {
                let fresh = self.make_dir(dir, &entry.name)?;
                Ok((shallow, fresh))
            });
            match made {
                Ok((shallow, fresh)) => {
                    let (selection, empty) = self.below(dir, &entry.name);
                    items.push(Item::Dir {
                        place: dir.pair.place(&entry.name),
                        fresh,
                        shallow: shallow || empty,
                        selection,
                    });
                }
                Err(e) => self.fail(&dir.path(&entry.name), &e),
            }
        }
        self.crew.push(items);
    }

    /// True for what is not in dst and is not to be made (`--existing`).
    fn skips_new(&self, dir: &Dir, name: &Name) -> bool {
        let skips = self.job.config.existing && matches!(dir.dst_stat(name), Ok(None));
        if skips {
            self.job.totals.skipped.add(1);
        }
        skips
    }

    /// True for a mount point that `-x` keeps us out of.
    fn shallow(&self, dir: &Dir, name: &Name) -> Result<bool> {
        if !self.job.config.one_file_system {
            return Ok(false);
        }
        let stat = stat_at(dir.pair.src.as_fd(), name.as_cstr());
        let stat = stat.on("statx", Side::Src, dir.path(name))?;
        Ok(stat.key.dev != self.job.root_dev)
    }

    /// The dst directory of that name; true when it was not there.
    fn make_dir(&self, dir: &Dir, name: &Name) -> Result<bool> {
        if self.job.shards.is_some() && !self.job.config.dry_run {
            return self.make_shared(dir, name);
        }
        match dir.dst_stat(name)? {
            Some(stat) if stat.is_dir() => return Ok(false),
            Some(_) if self.job.config.ignore_existing => {
                return Err(Error::WrongType {
                    path: dir.path(name).to_path(),
                });
            }
            Some(_) => self.remove_other_type(dir, name)?,
            None => {}
        }
        if self.job.config.dry_run {
            self.job.totals.created.add(1);
            return Ok(true);
        }
        match rustix::fs::mkdirat(&dir.pair.dst, name.as_cstr(), Mode::RWXU) {
            Ok(()) => {
                self.job.totals.created.add(1);
                Ok(true)
            }
            Err(Errno::EXIST) => Ok(false),
            Err(e) => Err(e).on("mkdirat", Side::Dst, dir.path(name)),
        }
    }

    /// Copies names of a directory; gives `more`, or half of them, away whenever somebody has nothing
    /// to do.
    pub(super) fn names(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        names: Vec<Entry>,
        more: &mut Option<Item>,
    ) {
        // Where `slice` finds them, if one of them is a large file.
        buffers.rest = (Some(Arc::clone(dir)), names);
        while let Some(entry) = buffers.rest.1.pop() {
            if self.crew.stopping() {
                break;
            }
            let names = &mut buffers.rest.1;
            if self.crew.crowded() {
                names.push(entry);
                let rest = std::mem::take(names);
                self.crew.push([Item::Names(Arc::clone(dir), rest)]);
                break;
            }
            if more.is_some() && self.crew.hungry() {
                self.crew.push(more.take());
            } else if names.len() > 1 && self.crew.hungry() {
                let half = names.split_off(names.len() / 2);
                self.crew.push([Item::Names(Arc::clone(dir), half)]);
            }
            self.entry(buffers, dir, entry);
        }
        buffers.rest = (None, Vec::new());
    }

    /// One entry that is no directory. It counts as done here or, when others finish it, there.
    pub(super) fn entry(&self, buffers: &mut Buffers, dir: &Arc<Dir>, entry: Entry) {
        match entry.kind {
            FileType::RegularFile if self.linked(buffers, dir, &entry) => {}
            FileType::RegularFile => self.file(buffers, dir, entry.name),
            _ => self.special(buffers, dir, entry.name),
        }
    }

    /// `n` parts of a directory are done; with the last of them it is finished.
    pub(super) fn done(&self, buffers: &mut Buffers, dir: &Arc<Dir>, n: usize) {
        if dir.left.fetch_sub(n, AcqRel) == n
            && let Err(e) = self.finish(buffers, dir)
        {
            self.fail(&dir.pair.path, &e);
        }
    }

    fn finish(&self, buffers: &mut Buffers, dir: &Dir) -> Result<()> {
        if dir.sweeps && !dir.unsure.load(Relaxed) {
            let extra = dir
                .extra
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            self.sweep(buffers, dir, extra);
        }
        let (fd, path) = (dir.pair.dst.as_fd(), &dir.pair.path);
        let root = self.job.uid == 0;
        let _still = path.is_root().then(|| self.job.record.still());
        self.placed();
        self.job.progress.dirs_populated.add(1);
        if !dir.selection.counts_itself(path) {
            // Only what was taken off to work in it comes back.
            return match dir.before.late_flags() {
                flags if flags == 0 || dir.fresh || self.job.config.dry_run => Ok(()),
                flags => stamp::add_flags(fd, flags).on("FS_IOC_SETFLAGS", Side::Dst, path),
            };
        }
        if dir.fresh {
            self.line('c', FileType::Directory, path, What::New, "");
            if self.job.config.dry_run {
                return Ok(());
            }
            if self.drops_acl(dir) {
                // Made in a directory with a default ACL, it inherited one.
                let dropped = crate::meta::drop_inherited_acl(Target::Open(fd), &dir.meta);
                dropped.on("removexattr", Side::Dst, path)?;
            }
            let want = self.wanted_dir(dir, path)?;
            let refused = stamp::fresh(fd, &want, dir.born);
            self.refused(path, refused);
        } else {
            let now = stat_fd(fd).on("statx", Side::Dst, path)?;
            let now = self.dst_meta(fd, now, path)?;
            let want = self.wanted(&dir.meta, &now.0);
            let flags = self.job.src_flags && now.1;
            // +i and +a were cleared when it was opened: compared with the rest, set below.
            let mut changes = stamp::changes(&want, &now.0, flags, root);
            changes.flags &= (dir.meta.flags ^ now.0.flags) & !LATE_FLAGS != 0;
            // What this run did in it has changed its time too: that is nobody's news.
            let kept = self.job.config.keep.times;
            let told = Changes {
                time: kept && dir.meta.stat.mtime != dir.before.mtime,
                ..changes
            };
            if told.any() {
                self.job.totals.updated.add(1);
                self.line('.', FileType::Directory, path, What::Changed(told), "");
            } else {
                self.job.totals.skipped.add(1);
            }
            if self.job.config.dry_run {
                return Ok(());
            }
            if changes.any() {
                let refused = stamp::amend(fd, &want, &now.0);
                self.refused(path, refused);
            }
        }
        self.prove(path, &dir.meta, None);
        match dir.meta.flags & LATE_FLAGS {
            0 => Ok(()),
            late => stamp::add_flags(fd, late).on("FS_IOC_SETFLAGS", Side::Dst, path),
        }
    }

    /// What an open dst inode is now, and whether it has inode flags.
    pub(super) fn dst_meta(
        &self,
        fd: std::os::fd::BorrowedFd<'_>,
        stat: Stat,
        path: &RelPath,
    ) -> Result<(Meta, bool)> {
        let target = Target::Open(fd);
        let mut xattrs = Vec::new();
        for name in xattr::list(target).on("listxattr", Side::Dst, path)? {
            if self.counts(&name)
                && let Some(value) = xattr::get(target, &name).on("getxattr", Side::Dst, path)?
            {
                xattrs.push((name, value));
            }
        }
        let flags = match self.job.src_flags {
            true => copy::inode_flags(fd).on("FS_IOC_GETFLAGS", Side::Dst, path)?,
            false => None,
        };
        let known = flags.is_some();
        let flags = flags.unwrap_or(0) & crate::meta::COPIED_FLAGS;
        Ok((
            Meta {
                stat,
                xattrs,
                flags,
                unread: Vec::new(),
            },
            known,
        ))
    }
}

/// All names of dst's directory, unless there are too many.
fn list(buffers: &mut Buffers, dst: &OwnedFd) -> Result<Option<HashSet<Name>>, Errno> {
    let mut listed = HashSet::new();
    let all = sys_dir::read_dir(dst.as_fd(), 0, &mut buffers.names, |e| {
        listed.insert(e.name);
        listed.len() <= LISTED_MAX
    })?;
    Ok(all.then_some(listed))
}
