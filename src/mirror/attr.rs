//! Attributes: what stat says of an inode that may be pending, and what users change of it.
//!
//! A pending file's size, blocks and times come from src (D4), everything else from dst. A user's
//! chmod, chown, utimens and setxattr on a pending file are applied to its placeholder; times are
//! also written into the mark, because hydration disturbs them (D9).

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Gid, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::Mirror;
use super::hydrate::Need;
use super::node::{Node, ROOT};
use super::perms::show;
use super::populate::Access;
use super::source::SrcInfo;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::meta::{self, ACCESS_ACL, CAPABILITY, DEFAULT_ACL};
use crate::sys::fault;
use crate::sys::stat::{self, Stat, Time};
use crate::sys::xattr::{self, Target};

/// What the mount says of an inode.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    /// The answer, with a pending file's size, blocks and times from src.
    pub stat: Stat,
}

/// What a look at a pending file found.
enum PendingAttr {
    Known(Attr),
    /// What only src knows.
    AskSrc,
    /// It carries no mark any more: all is dst's own, whatever the node still says.
    Unmarked,
}

/// A time that a user sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// UTIME_NOW.
    Now,
    /// This time.
    At(Time),
}

/// What a user changes of an inode; `None` stays as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    /// Permission bits.
    pub perm: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<Stamp>,
    /// Modification time.
    pub mtime: Option<Stamp>,
}

impl Mirror {
    /// The attributes, without waiting; `None` when src has to be asked.
    pub fn attr_now(&self, node: &Node) -> Result<Option<Attr>> {
        let shown = || node.display_name();
        loop {
            if node.is_pending_file() {
                match self.pending_attr(node, self.source.recall(node.ino))? {
                    PendingAttr::Known(attr) => return Ok(Some(attr)),
                    PendingAttr::AskSrc => return Ok(None),
                    PendingAttr::Unmarked => {}
                }
            }
            let before = node.phase();
            let placing = self.partials.times(node.ino);
            let mut stat = self.stat_of(node).on("statx", Side::Dst, shown())?;
            if node.kind == FileType::Directory {
                if before != node.phase() {
                    continue;
                }
                if let Some((atime, mtime)) = placing {
                    (stat.atime, stat.mtime) = (atime, mtime);
                }
                if node.is_pending_dir() {
                    // As btrfs says it: nobody may conclude that there are no subdirectories.
                    stat.nlink = 1;
                }
            }
            return Ok(Some(self.whole_attr(node, stat)));
        }
    }

    /// The attributes of an inode of which dst knows all.
    pub(super) fn whole_attr(&self, node: &Node, mut stat: Stat) -> Attr {
        if node.kind != FileType::Directory && stat.nlink > 1 {
            stat.nlink = self.anchors.nlink(&stat);
        }
        self.steady_ctime(node, &mut stat);
        Attr { stat }
    }

    fn steady_ctime(&self, node: &Node, stat: &mut Stat) {
        let complete = self.progress.complete.load(Ordering::Relaxed);
        stat.ctime = node.ctime().show(stat.ctime, complete);
    }

    fn pending_attr(&self, node: &Node, info: Option<SrcInfo>) -> Result<PendingAttr> {
        let shown = || node.display_name();
        let opened = self
            .nodes
            .open(node, OFlags::PATH)
            .on("open", Side::Dst, shown())?;
        let mark = self
            .mark
            .get(Target::Fd(opened.as_fd()))
            .on("getxattr", Side::Dst, shown())?;
        let mut stat = stat::stat_fd(opened.as_fd()).on("statx", Side::Dst, shown())?;
        let Some(mark) = mark.filter(|_| node.is_pending_file()) else {
            return Ok(PendingAttr::Unmarked);
        };
        show(&mark, &mut stat);
        let lost = mark.young && !self.has_map(node)?;
        if let Some(src_end) = mark.mixed.filter(|_| !lost) {
            if mark.young {
                stat.size = stat.size.max(src_end);
            }
            let times = mark.salvage_times().or_else(|| self.mixed_times(node));
            let times = times.or(mark.times);
            (stat.atime, stat.mtime) = times.unwrap_or((stat.atime, stat.mtime));
            let most = stat.size.div_ceil(512);
            stat.blocks = stat.blocks.max(info.map_or(most, |i| i.blocks).min(most));
        } else if let Some(info) = info {
            (stat.atime, stat.mtime) = mark.times.unwrap_or((info.atime, info.mtime));
            if !fault::breaks("D4") {
                (stat.size, stat.blocks) = (info.size, info.blocks);
            }
        } else {
            return Ok(PendingAttr::AskSrc);
        }
        if stat.nlink > 1 {
            stat.nlink = self.anchors.nlink(&stat);
        }
        self.steady_ctime(node, &mut stat);
        Ok(PendingAttr::Known(Attr { stat }))
    }

    /// Calls `then` with the attributes: at once, or after src was asked on a pool thread.
    pub fn with_attr(
        self: &Arc<Self>,
        node: &Arc<Node>,
        then: impl FnOnce(Result<Attr>) + Send + 'static,
    ) {
        match self.attr_now(node) {
            Ok(Some(attr)) => then(Ok(attr)),
            Err(e) => then(Err(e)),
            Ok(None) => {
                let (mirror, held) = (Arc::clone(self), Arc::clone(node));
                self.with_info(node, move |info| match info {
                    Err(e) => then(Err(e)),
                    Ok(info) => then(match mirror.pending_attr(&held, Some(info)) {
                        Ok(PendingAttr::Known(attr)) => Ok(attr),
                        Ok(_) => mirror.attr_now(&held).and_then(|a| a.ok_or(Error::Stopped)),
                        Err(e) => Err(e),
                    }),
                });
            }
        }
    }

    /// Calls `then` with what src says of a pending file: from memory, or asked on a pool thread.
    pub fn with_info(
        self: &Arc<Self>,
        node: &Arc<Node>,
        then: impl FnOnce(Result<SrcInfo>) + Send + 'static,
    ) {
        if let Some(info) = self.source.recall(node.ino) {
            return then(Ok(info));
        }
        let path = node
            .origin()
            .map(|o| o.path().to_path())
            .unwrap_or_default();
        let then = self.waiting(path, then);
        self.ask_later(Arc::clone(node), Mirror::ask_src, 0, then);
    }

    /// Runs something that may wait for src on a pool thread.
    pub fn run_demand(&self, priority: Priority, task: Box<dyn FnOnce() + Send>) {
        self.engine.pool().run(priority, task);
    }

    /// statx in src; may wait for it.
    pub(super) fn ask_src(&self, node: &Node) -> Result<SrcInfo> {
        let shown = || node.display_name();
        let origin = node
            .origin()
            .ok_or(Errno::STALE)
            .on("origin", Side::Dst, shown())?;
        let name = origin
            .name
            .as_ref()
            .ok_or(Errno::STALE)
            .on("origin", Side::Dst, shown())?;
        let dir = self.source.dir(&origin.dir)?;
        let stat = stat::stat_at(dir.fd.as_fd(), name.as_cstr());
        let info = SrcInfo::from(&stat.on("statx", Side::Src, origin.path())?);
        self.learn_anew(node.ino, info);
        Ok(info)
    }

    /// Applies a user's change and calls `then` with the attributes after it. `file`: through which
    /// open file he changes the size, whatever the permissions are by now.
    pub fn set_attr(
        self: &Arc<Self>,
        node: &Arc<Node>,
        change: Change,
        file: Option<Arc<OwnedFd>>,
        then: impl FnOnce(Result<Attr>) + Send + 'static,
    ) {
        if let Some(size) = change.size
            && node.is_pending_file()
            && self.mixes
        {
            return self.set_size(node, size, change, file, then);
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        let apply = move |ready: Result<()>| {
            let done = ready.and_then(|()| mirror.apply_change(&held, change, file.as_deref()));
            match done {
                Ok(()) => mirror.with_attr(&held, then),
                Err(e) => then(Err(e)),
            }
        };
        self.when_changeable(node, change, apply);
    }

    /// A size needs the whole file (or, for 0, nothing of it); other changes of a pending file are
    /// made on its placeholder, but not while its mark is on its way out.
    fn when_changeable(
        self: &Arc<Self>,
        node: &Arc<Node>,
        change: Change,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        if node.kind == FileType::Directory {
            return self.when_populated(node.ino, Access::Change, then);
        }
        match (node.is_pending_file(), change.size) {
            (true, Some(0)) => {
                let (mirror, held) = (Arc::clone(self), Arc::clone(node));
                let truncate = move |ready: Result<()>| match ready {
                    Ok(()) => mirror.truncate_pending(&held, Box::new(then)),
                    Err(e) => then(Err(e)),
                };
                self.when_parent_published(node, Box::new(truncate));
            }
            (true, None) => self.when_parent_published(node, Box::new(then)),
            _ => self.when_hydrated(node, Need::Write, then),
        }
    }

    fn apply_change(&self, node: &Node, change: Change, file: Option<&OwnedFd>) -> Result<()> {
        let shown = || node.display_name();
        let opened = self
            .nodes
            .open(node, OFlags::PATH)
            .on("open", Side::Dst, shown())?;
        let fd = opened.as_fd();
        if let Some(size) = change.size {
            self.truncate_plain(node, size, file)?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            self.forget_privileges(node)?;
            let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
            rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH).on(
                "chown",
                Side::Dst,
                shown(),
            )?;
        }
        if let Some(perm) = change.perm {
            self.set_perm(node, fd, perm)
                .on("chmod", Side::Dst, shown())?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            self.apply_times(node, fd, change)
                .on("utimensat", Side::Dst, shown())?;
        }
        Ok(())
    }

    /// D9: the mark carries the times before the inode does. The mark lock keeps the end of a
    /// hydration, which reads them, on one side of both.
    fn apply_times(
        &self,
        node: &Node,
        fd: std::os::fd::BorrowedFd<'_>,
        change: Change,
    ) -> Result<(), Errno> {
        let _changing = self.unseen.changing();
        let _guard = self.lock_mark(node.ino);
        if self.may_be_marked(node)
            && !fault::breaks("D9")
            && let Some(mark) = self.mark.get(Target::Fd(fd))?
        {
            let mixed = mark.salvage_times().or_else(|| self.mixed_times(node));
            let was = match (mixed.or(mark.times), self.source.recall(node.ino)) {
                (Some(times), _) => times,
                (None, Some(info)) => (info.atime, info.mtime),
                (None, None) => stat::stat_fd(fd).map(|s| (s.atime, s.mtime))?,
            };
            let now = now();
            let pick = |stamp: Option<Stamp>, was| match stamp {
                None => was,
                Some(Stamp::Now) => now,
                Some(Stamp::At(time)) => time,
            };
            let times = (pick(change.atime, was.0), pick(change.mtime, was.1));
            self.replace_mark(
                fd,
                &Mark {
                    times: Some(times),
                    ..mark
                },
            )?;
            self.set_mixed_times(node, times);
            return meta::set_times_fd(fd, times.0, times.1);
        }
        let spec = |stamp| match stamp {
            None => Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            Some(Stamp::Now) => Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_NOW,
            },
            Some(Stamp::At(t)) => Timespec {
                tv_sec: t.sec,
                tv_nsec: t.nsec.into(),
            },
        };
        let times = Timestamps {
            last_access: spec(change.atime),
            last_modification: spec(change.mtime),
        };
        meta::utimens(fd, &times)
    }

    /// Writes a mark only where one is: the kernel decides that atomically. A mark that has just
    /// gone (the file is complete) is no error: it must not come back.
    pub(super) fn replace_mark(
        &self,
        fd: std::os::fd::BorrowedFd<'_>,
        mark: &Mark,
    ) -> Result<(), Errno> {
        let name = self.mark.as_cstr();
        match xattr::set_flags(Target::Fd(fd), name, &mark.encode(), XattrFlags::REPLACE) {
            Err(Errno::NODATA) => Ok(()),
            other => other,
        }
    }

    /// chown clears security.capability, setuid and setgid: the end of a hydration must not bring
    /// src's back.
    fn forget_privileges(&self, node: &Node) -> Result<()> {
        if !self.may_be_marked(node) {
            return Ok(());
        }
        let shown = || node.display_name();
        let opened = self
            .nodes
            .open(node, OFlags::PATH)
            .on("open", Side::Dst, shown())?;
        let _guard = self.lock_mark(node.ino);
        match self
            .mark
            .get(Target::Fd(opened.as_fd()))
            .on("getxattr", Side::Dst, shown())?
        {
            Some(mark) if mark.capability || mark.perm.is_some() => {
                let mark = Mark {
                    capability: false,
                    perm: mark.perm.map(|p| p & 0o1777),
                    ..mark
                };
                self.replace_mark(opened.as_fd(), &mark)
                    .on("setxattr", Side::Dst, shown())
            }
            _ => Ok(()),
        }
    }

    /// True for the names that users neither see nor touch.
    fn is_hidden(&self, name: &CStr) -> bool {
        name == self.mark.as_cstr()
    }

    /// Calls `then` when the inode's xattrs are all here: a directory has them from the start, a file
    /// gets security.capability with its data.
    fn when_xattrs(
        self: &Arc<Self>,
        node: &Arc<Node>,
        name: Option<&CStr>,
        change: bool,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        if node.kind == FileType::Directory {
            return match change {
                true => self.when_populated(node.ino, Access::Change, then),
                false => then(Ok(())),
            };
        }
        let capability = name.is_some_and(|n| n == CAPABILITY);
        match (change, node.is_pending_file()) {
            (true, true) if capability => self.when_hydrated(node, Need::Write, then),
            (true, false) => self.when_hydrated(node, Need::Write, then),
            (false, true) if capability && self.has_pending_capability(node) => {
                self.when_hydrated(node, Need::Read, then)
            }
            (true, true) => self.when_parent_published(node, Box::new(then)),
            _ => then(Ok(())),
        }
    }

    fn has_pending_capability(&self, node: &Node) -> bool {
        let Ok(opened) = self.nodes.open(node, OFlags::PATH) else {
            return true;
        };
        !matches!(self.mark.get(Target::Fd(opened.as_fd())), Ok(Some(m)) if !m.capability)
    }

    /// getxattr; ENODATA for what is not there and for the mark.
    pub fn get_xattr(
        self: &Arc<Self>,
        node: &Arc<Node>,
        name: &CStr,
        then: impl FnOnce(Result<Vec<u8>, Errno>) + Send + 'static,
    ) {
        if self.is_hidden(name) {
            return then(Err(Errno::NODATA));
        }
        // What is pending gets some of them later.
        let complete = !node.is_pending_file() && !node.is_pending_dir();
        if complete && node.absent.has(name) {
            return then(Err(Errno::NODATA));
        }
        let seen = complete.then(|| node.absent.seen());
        let (mirror, held, wanted) = (Arc::clone(self), Arc::clone(node), name.to_owned());
        self.when_xattrs(node, Some(name), false, move |ready| {
            then(ready.map_err(|e| e.errno()).and_then(|()| {
                let opened = mirror.nodes.open(&held, OFlags::PATH)?;
                let value = xattr::get_exact(Target::Fd(opened.as_fd()), &wanted);
                match (value, wanted.as_c_str() == DEFAULT_ACL) {
                    // Set aside for the moment, perhaps.
                    (Err(Errno::NODATA), true)
                        if let Some(aside) = mirror.partials.default_acl(held.ino) =>
                    {
                        Ok(aside)
                    }
                    (Ok(mut value), _) => {
                        if wanted.as_c_str() == ACCESS_ACL {
                            mirror.show_acl(opened.as_fd(), &mut value);
                        }
                        Ok(value)
                    }
                    (Err(e), _) => {
                        if let (Errno::NODATA, Some(seen)) = (e, seen) {
                            held.absent.note(seen, &wanted);
                        }
                        Err(e)
                    }
                }
            }));
        });
    }

    /// listxattr, without the mark: names, each with its NUL.
    pub fn list_xattrs(
        self: &Arc<Self>,
        node: &Arc<Node>,
        then: impl FnOnce(Result<Vec<u8>, Errno>) + Send + 'static,
    ) {
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        self.when_xattrs(node, None, false, move |ready| {
            then(ready.map_err(|e| e.errno()).and_then(|()| {
                let opened = mirror.nodes.open(&held, OFlags::PATH)?;
                let mut names = xattr::list(Target::Fd(opened.as_fd()))?;
                names.retain(|n| !mirror.is_hidden(n));
                let acl = DEFAULT_ACL.to_owned();
                if !names.contains(&acl) && mirror.partials.default_acl(held.ino).is_some() {
                    names.push(acl);
                }
                let due = CAPABILITY.to_owned();
                if held.is_pending_file()
                    && mirror.has_pending_capability(&held)
                    && !names.contains(&due)
                {
                    names.push(due);
                }
                Ok(names
                    .iter()
                    .flat_map(|n| n.to_bytes_with_nul())
                    .copied()
                    .collect())
            }));
        });
    }

    /// setxattr with XATTR_CREATE or XATTR_REPLACE in `flags`; EPERM for the mark.
    pub fn set_xattr(
        self: &Arc<Self>,
        node: &Arc<Node>,
        name: &CStr,
        value: Vec<u8>,
        flags: i32,
        then: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        if self.is_hidden(name) {
            return then(Err(Errno::PERM));
        }
        let (held, wanted) = (Arc::clone(node), name.to_owned());
        let set = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            then(ready.map_err(|e| e.errno()).and_then(|()| {
                let opened = mirror.nodes.open(&held, OFlags::PATH)?;
                let flags = XattrFlags::from_bits_truncate(flags.cast_unsigned());
                held.absent.forget();
                let set = mirror.set_xattr_once(opened.as_fd(), &wanted, &value, flags);
                held.absent.forget();
                set?;
                match wanted.as_c_str() == ACCESS_ACL {
                    true => mirror.acl_was_set(&held, opened.as_fd()),
                    false => Ok(()),
                }
            }));
        };
        self.when_xattrs(node, Some(name), true, self.acting(set));
    }

    /// removexattr; EPERM for the mark.
    pub fn remove_xattr(
        self: &Arc<Self>,
        node: &Arc<Node>,
        name: &CStr,
        then: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        if self.is_hidden(name) {
            return then(Err(Errno::PERM));
        }
        let (held, wanted) = (Arc::clone(node), name.to_owned());
        let remove = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            then(ready.map_err(|e| e.errno()).and_then(|()| {
                let opened = mirror.nodes.open(&held, OFlags::PATH)?;
                mirror.remove_xattr_once(opened.as_fd(), &wanted)
            }));
        };
        self.when_xattrs(node, Some(name), true, self.acting(remove));
    }

    /// The number that stat shows: the root's own, not the protocol's 1.
    pub fn shown_ino(&self, node: &Node, attr: &Attr) -> u64 {
        if node.ino == ROOT {
            attr.stat.key.ino
        } else {
            node.ino
        }
    }
}

pub(super) fn now() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Time {
        sec: now.tv_sec,
        nsec: u32::try_from(now.tv_nsec).unwrap_or(0),
    }
}
