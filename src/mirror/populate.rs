//! Populate: giving a directory the placeholders of all its entries, on its first access.
//!
//!   Pending   -> placing    when_populated() or populate_now(): one per directory, losers wait
//!   placing   -> published  publish(): every name of src has its placeholder; the mark goes P to L
//!   any       -> Pending    an error: the mark was never touched, so a retry starts over
//!
//! While a directory is P everything in it is provisional (D5): no user can have made anything
//! there, so what a crash left is stamped again or made anew. Upholds I1, I2, I7 and D5, D6, D8.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::carry::Carrier;
use super::commit::Publish;
use super::control::CONTROL;
use super::node::{Ino, Node, Origin, Phase};
use super::place::Placer;
use super::source::SrcDir;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::meta::{DEFAULT_ACL, Meta};
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Time};
use crate::sys::xattr::{self, Target};
use crate::sys::{dir, fault};

/// How often a src directory that changes while it is listed is listed again.
const LISTINGS_MAX: u32 = 3;

/// What waits for something to be ready: called once, without any lock held.
pub type Waiter = Box<dyn FnOnce(Result<()>) + Send>;

/// What somebody wants of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To look: names and attributes.
    Look,
    /// To change a name in it: waits for the barrier too (D6).
    Change,
}

/// A directory of dst, as the walker and the table know it.
#[derive(Debug, Clone)]
pub struct DirRef {
    /// dst's inode number, or `ROOT`.
    pub ino: Ino,
    /// How to open it.
    pub anchor: Anchor,
    /// Where it comes from.
    pub origin: Option<Arc<RelPath>>,
}

/// Something below a directory that carries a mark.
#[derive(Debug)]
pub struct Marked {
    /// What it is, whatever its type.
    pub dir: DirRef,
    /// What its mark says.
    pub mark: Mark,
    /// Its type.
    pub kind: FileType,
    /// dst's size, bytes: a guess (D4).
    pub size: u64,
}

/// One directory that is being populated.
pub struct Placing {
    /// The times that it will have: placing children disturbs them meanwhile.
    times: Option<(Time, Time)>,
    /// Its default ACL, set aside while its children are made.
    default_acl: Option<Vec<u8>>,
    waiters: Vec<Waiter>,
}

/// All directories that are being populated now.
#[derive(Default)]
pub struct Populates {
    running: Mutex<HashMap<Ino, Placing>>,
}

impl Populates {
    /// The times that a directory in work will end with.
    pub fn times(&self, ino: Ino) -> Option<Option<(Time, Time)>> {
        self.running.lock().get(&ino).map(|p| p.times)
    }

    /// Somebody waits for a directory besides whoever populates it.
    pub(super) fn is_wanted(&self, ino: Ino) -> bool {
        let running = self.running.lock();
        running.get(&ino).is_some_and(|p| p.waiters.len() > 1)
    }

    /// Joins a running populate, or becomes the one that runs it (then the waiter comes back).
    fn join(&self, ino: Ino, waiter: Waiter) -> bool {
        let mut running = self.running.lock();
        if let Some(placing) = running.get_mut(&ino) {
            placing.waiters.push(waiter);
            return true;
        }
        running.insert(
            ino,
            Placing {
                times: None,
                default_acl: None,
                waiters: vec![waiter],
            },
        );
        false
    }

    /// The default ACL of a directory in work.
    pub fn default_acl(&self, ino: Ino) -> Option<Vec<u8>> {
        self.running.lock().get(&ino)?.default_acl.clone()
    }

    fn set_default_acl(&self, ino: Ino, acl: Vec<u8>) {
        if let Some(placing) = self.running.lock().get_mut(&ino) {
            placing.default_acl = Some(acl);
        }
    }

    fn set_times(&self, ino: Ino, times: (Time, Time)) {
        if let Some(placing) = self.running.lock().get_mut(&ino) {
            placing.times = Some(times);
        }
    }

    fn take(&self, ino: Ino) -> Vec<Waiter> {
        self.running
            .lock()
            .remove(&ino)
            .map(|p| p.waiters)
            .unwrap_or_default()
    }
}

impl Mirror {
    /// Calls `then` as soon as the directory has all its names (and, for a change, is published
    /// durably enough): at once on this thread, or later on a pool thread.
    pub fn when_populated(
        self: &Arc<Self>,
        ino: Ino,
        access: Access,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let node = match self.nodes.get(ino) {
            Ok(node) => node,
            Err(errno) => return then(Err(errno).on("lookup", Side::Dst, "")),
        };
        if !node.is_pending_dir() {
            return match access {
                Access::Look => then(Ok(())),
                Access::Change => self.when_published(ino, Box::new(then)),
            };
        }
        let mirror = Arc::clone(self);
        let after: Waiter = match access {
            Access::Look => Box::new(then),
            Access::Change => Box::new(move |ready| match ready {
                Ok(()) => mirror.when_published(ino, Box::new(then)),
                Err(e) => then(Err(e)),
            }),
        };
        if self.populates.join(ino, after) {
            return;
        }
        let origin = node.origin().map(|o| Arc::new(o.path()));
        let dir = DirRef {
            ino,
            anchor: node.anchor.clone(),
            origin,
        };
        let mirror = Arc::clone(self);
        let path = dir.origin.as_ref().map(|o| o.to_path());
        let wait = self.progress.waits.begin(path.unwrap_or_default());
        let task = move || {
            mirror.populate_claimed(&dir, None);
            drop(wait);
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// Calls `then` when a change in the directory cannot be undone by a crash: its own publication
    /// and those above it are durable (D6).
    pub(super) fn when_published(self: &Arc<Self>, ino: Ino, then: Waiter) {
        let Some(gated) = self.gated_at_or_above(ino) else {
            return then(Ok(()));
        };
        let mirror = Arc::clone(self);
        // The walker hears of it and brings nothing more for the next syncfs.
        self.progress.barriers.add(1);
        let again = move |ready| {
            mirror.progress.barriers.sub(1);
            match ready {
                Ok(()) => mirror.when_published(ino, then),
                Err(e) => then(Err(e)),
            }
        };
        self.commit.when_published(gated, Box::new(again));
    }

    fn gated_at_or_above(&self, ino: Ino) -> Option<Ino> {
        if self.commit.has_no_gates() {
            return None;
        }
        let mut at = Some(ino);
        while let Some(ino) = at {
            if self.commit.is_gated(ino) {
                return Some(ino);
            }
            at = self.nodes.find(ino)?.place().map(|p| p.parent);
        }
        None
    }

    /// As `when_published`, for a change of the inode itself: the directory that it was found in.
    pub(super) fn when_parent_published(self: &Arc<Self>, node: &Node, then: Waiter) {
        match node.place() {
            Some(place) => self.when_published(place.parent, then),
            None => then(Ok(())),
        }
    }

    /// Populates a directory on the calling thread, with the data of its small files, or waits for
    /// whoever does it already. For the walker; a session thread must not call it.
    pub fn populate_now(self: &Arc<Self>, dir: &DirRef, carrier: &Carrier<'_>) -> Result<()> {
        self.populate_here(dir, Some(carrier))
    }

    /// Populates a directory on the calling thread: names only.
    pub fn populate_names(self: &Arc<Self>, dir: &DirRef) -> Result<()> {
        self.populate_here(dir, None)
    }

    fn populate_here(self: &Arc<Self>, dir: &DirRef, carrier: Option<&Carrier<'_>>) -> Result<()> {
        let (tell, told) = crossbeam_channel::bounded(1);
        let waiter: Waiter = Box::new(move |result| {
            let _ = tell.send(result); // The receiver below outlives every sender but a panic.
        });
        if self.populates.join(dir.ino, waiter) {
            carrier.inspect(|c| c.must_list());
        } else {
            carrier.inspect(|c| c.enter(dir.ino));
            self.populate_claimed(dir, carrier);
        }
        told.recv().unwrap_or(Err(Error::Stopped))
    }

    /// Waits while more files have landed or were carried than memory is for. For walker threads.
    pub fn wait_for_room(&self) {
        self.commit.wait_for_room(|| self.stopping());
    }

    /// Runs the populate that `join` gave to this thread, and tells all who wait.
    fn populate_claimed(self: &Arc<Self>, dir: &DirRef, carrier: Option<&Carrier<'_>>) {
        let result = self.populate(dir, carrier);
        if let Err(e) = &result
            && let Some(origin) = &dir.origin
            && !matches!(e, Error::Stopped)
        {
            self.fail(origin, e);
        }
        if result.is_ok() && self.nodes.find_same(dir.ino, &dir.anchor).is_some() {
            // Its link count and size are others now, and its times are src's.
            self.invalidate(dir.ino);
        }
        for waiter in self.populates.take(dir.ino) {
            waiter(result.clone());
        }
    }

    fn populate(self: &Arc<Self>, dir: &DirRef, carrier: Option<&Carrier<'_>>) -> Result<()> {
        let found_here = |phase| {
            carrier.inspect(|c| c.must_list());
            self.note_phase(dir, phase)
        };
        if self.commit.is_publishing(dir.ino) {
            // Every name is here; the mark is still P until its barrier (D6).
            return found_here(Phase::Populated);
        }
        let opened = self.open_dir(dir)?;
        let shown = dir.origin.as_deref().cloned().unwrap_or_default();
        let mark = self
            .mark
            .get(Target::Fd(opened.as_fd()))
            .on("getxattr", Side::Dst, &shown)?;
        match mark {
            // Somebody was faster between our look and our claim.
            None => return found_here(Phase::Unmarked),
            Some(mark) if mark.populated => return found_here(Phase::Populated),
            Some(_) => {}
        }
        let origin = dir.origin.as_ref().ok_or_else(|| no_origin(&shown))?;
        let src = self.source.dir(origin)?;
        let marked_src =
            self.mark
                .get(Target::Fd(src.fd.as_fd()))
                .on("getxattr", Side::Src, &shown)?;
        if marked_src.is_some() {
            return Err(Error::SrcPending {
                path: origin.to_path(),
            });
        }
        self.set_acl_aside(dir.ino, opened.as_fd())
            .on("removexattr", Side::Dst, &shown)?;
        let is_root = dir.ino == super::node::ROOT;
        let placer = Placer::new(self, &src, opened.as_fd(), is_root, carrier)?;
        self.settle_ledger(origin);
        let meta = self.place_all(dir, &src, &placer)?;
        let mark = Mark {
            origin: placer.recorded_origin(&opened)?,
            perm: self.stamp(&meta, opened.as_fd(), origin),
            ..Mark::populated()
        };
        placer.note_late_flags(&meta, opened.as_fd())?;
        self.publish(dir, &opened, origin, mark, carrier)
    }

    /// The default ACL comes back when all children are made: they would inherit it (D8). Until then
    /// whoever asks for it is answered from memory.
    fn set_acl_aside(&self, ino: Ino, opened: BorrowedFd<'_>) -> Result<(), Errno> {
        let target = Target::Fd(opened);
        if let Some(acl) = xattr::get(target, DEFAULT_ACL)? {
            self.populates.set_default_acl(ino, acl);
            xattr::remove(target, DEFAULT_ACL)?;
        }
        Ok(())
    }

    /// Places every name of a src directory. One that changes meanwhile is listed again; one that
    /// keeps changing is published as it was last seen, and is in the ledger.
    fn place_all(&self, dir: &DirRef, src: &SrcDir, placer: &Placer<'_>) -> Result<Meta> {
        let path = src.path.as_ref();
        let mut placed = HashSet::new();
        let mut tries_left = LISTINGS_MAX;
        loop {
            let meta =
                Meta::capture_fd(src.capture, src.fd.as_fd()).on("statx", Side::Src, path)?;
            self.populates
                .set_times(dir.ino, (meta.stat.atime, meta.stat.mtime));
            let mut entries = dir::list(src.fd.as_fd()).on("getdents64", Side::Src, path)?;
            // Inode order: statx of src reads its inode tables in order.
            entries.sort_unstable_by_key(|e| e.ino);
            entries.retain(|entry| !placed.contains(&entry.name));
            self.crowd.each(placer.priority(), &entries, |entry| {
                if self.stopping() {
                    return Err(Error::Stopped);
                }
                fault::point("populate-before-child");
                placer.place(&entry.name)?;
                fault::point("populate-after-child");
                Ok(())
            })?;
            placed.extend(entries.into_iter().map(|entry| entry.name));
            tries_left -= 1;
            let after = stat::stat_fd(src.fd.as_fd()).on("statx", Side::Src, path)?;
            if after.mtime == meta.stat.mtime {
                return Ok(meta);
            }
            if tries_left == 0 {
                self.fail(
                    path,
                    &Error::SrcChanged {
                        path: path.to_path(),
                    },
                );
                return Ok(meta);
            }
        }
    }

    /// Every name is here: the mark goes from P to L (D6); behind a barrier on btrfs, and where files
    /// came with their data (D1). Readers go on meanwhile, changes wait.
    fn publish(
        self: &Arc<Self>,
        dir: &DirRef,
        opened: &OwnedFd,
        origin: &Arc<RelPath>,
        mark: Mark,
        carrier: Option<&Carrier<'_>>,
    ) -> Result<()> {
        fault::point("populate-before-mark");
        let carried = carrier.map(Carrier::carried).unwrap_or_default();
        if self.btrfs || carried.files > 0 {
            self.commit.publish_later(Publish {
                dir: dir.clone(),
                mark,
                carried,
                doubtful: false,
                then: carrier.map(Carrier::published),
            });
        } else {
            self.mark.set(Target::Fd(opened.as_fd()), &mark).on(
                "setxattr",
                Side::Dst,
                origin.as_ref(),
            )?;
        }
        fault::point("populate-after-mark");
        self.progress.dirs_populated.add(1);
        self.note_phase(dir, Phase::Populated)
    }

    /// Notes a new phase, if the kernel holds the inode.
    fn note_phase(&self, dir: &DirRef, phase: Phase) -> Result<()> {
        if let Some(node) = self.nodes.find_same(dir.ino, &dir.anchor) {
            node.set_phase(phase);
        }
        Ok(())
    }

    /// Opens a directory of dst, for listing and for calls by name.
    pub fn open_dir(&self, dir: &DirRef) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let shown = dir.origin.as_deref().cloned().unwrap_or_default();
        if dir.ino == super::node::ROOT {
            let root = self.dst.as_fd();
            return crate::sys::fd::open_beneath(root, &RelPath::root(), flags).on(
                "open",
                Side::Dst,
                shown,
            );
        }
        dir.anchor
            .open(self.dst.as_fd(), flags)
            .on("open", Side::Dst, shown)
    }

    /// True while an open directory of dst carries a P.
    pub fn is_pending(&self, opened: BorrowedFd<'_>) -> Result<bool> {
        let mark = self
            .mark
            .get(Target::Fd(opened))
            .on("getxattr", Side::Dst, ".")?;
        Ok(mark.is_some_and(|m| !m.populated))
    }

    /// A restart met a pending file that an earlier daemon placed: it is still to pull.
    pub fn note_left(&self, ino: Ino, bytes: u64) {
        // What this daemon placed itself is counted already.
        if self.source.recall(ino).is_none() {
            self.progress.bytes_left.add(bytes);
            self.progress.files_seen.add(1);
            self.progress.bytes_seen.add(bytes);
        }
    }

    /// The entry of a populated directory that `name` is: what the walker goes on with.
    /// `None` for what carries no mark.
    pub fn marked_child(
        &self,
        parent: &DirRef,
        opened: BorrowedFd<'_>,
        name: &Name,
        kind: FileType,
    ) -> Result<Option<Marked>> {
        if parent.ino == super::node::ROOT && name.as_bytes() == CONTROL.as_bytes() {
            return Ok(None);
        }
        if !matches!(
            kind,
            FileType::RegularFile | FileType::Directory | FileType::Unknown
        ) {
            return Ok(None);
        }
        let shown = || {
            parent
                .origin
                .as_ref()
                .map_or_else(RelPath::root, |o| o.join(name))
        };
        let mark = match self.mark.get(Target::At(opened, name)) {
            Ok(Some(mark)) => mark,
            Ok(None) | Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e).on("getxattr", Side::Dst, shown()),
        };
        let stat = match stat::stat_at(opened, name.as_cstr()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e).on("statx", Side::Dst, shown()),
        };
        let anchor = match parent.anchor.child(opened, name) {
            Ok(anchor) => anchor,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e).on("name_to_handle_at", Side::Dst, shown()),
        };
        let origin = match &mark.origin {
            Some(origin) => Some(Arc::new(origin.clone())),
            None => parent.origin.as_ref().map(|o| Arc::new(o.join(name))),
        };
        let dir = DirRef {
            ino: stat.key.ino,
            anchor,
            origin,
        };
        Ok(Some(Marked {
            dir,
            mark,
            kind: stat.kind(),
            size: stat.size,
        }))
    }
}

/// A marked entry below a directory that has no origin, and no origin of its own: only possible
/// when somebody wrote to the raw tree.
pub(super) fn no_origin(path: &RelPath) -> Error {
    Error::Call {
        call: "origin",
        side: Side::Dst,
        path: path.to_path(),
        errno: Errno::STALE,
    }
}

/// The origin of an entry found under `name` in a directory with origin `parent`.
pub(super) fn origin_of(parent: Option<&Origin>, name: &Name, mark: &Mark) -> Option<Origin> {
    match (&mark.origin, parent) {
        (Some(path), _) => Some(Origin::of(path)),
        (None, Some(parent)) => Some(Origin {
            dir: Arc::new(parent.path()),
            name: Some(name.clone()),
        }),
        (None, None) => None,
    }
}
