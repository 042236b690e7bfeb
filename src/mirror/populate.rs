//! Populate: giving a directory the placeholders of all its entries.
//!
//!   Pending   -> placing    when_populated() or populate_now(): one per directory, losers wait
//!   placing   -> published  publish(): every name of src has its placeholder; the mark goes P to L
//!   any       -> Pending    an error: the mark was never touched; what was placed is kept (partial.rs)
//!
//! Single names are looked up and listed meanwhile (ahead.rs), new ones made (own.rs); whatever else changes something waits, in
//! the directory and in everything below it. While a directory is P everything in it is provisional
//! (D5): what a crash left is stamped again or made anew. Upholds I1, I2, I7 and D5, D6, D8.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::carry::Carrier;
use super::commit::Publish;
use super::control::CONTROL;
use super::node::{Ino, Node, Origin, Phase};
use super::partial::Partial;
use super::place::Placer;
use super::running::Extent;
use super::source::SrcDir;
use super::unseen::Lost;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::meta::Meta;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat;
use crate::sys::xattr::Target;
use crate::sys::{dir, fault, fd};

/// How often a src directory that changes while it is listed is listed again.
const LISTINGS_MAX: u32 = 3;
/// Who lists a directory with more entries does not wait for all of them.
const LISTED_WHOLE: usize = 256;
/// A directory with more entries is large: somebody who looks into it is no reason to populate it.
pub(super) const LARGE_DIR: usize = 1024;
/// How long the rest is put off for who has just begun to list.
const HEAD_START: Duration = Duration::from_millis(5);
/// Entries of a large directory that are read, sorted and placed at a time.
const CHUNK: usize = 32 << 10;

/// How often a walker that waits for others looks whether it is to stop.
const LOOK_UP: Duration = Duration::from_millis(200);

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

impl DirRef {
    /// The directory that a node is.
    pub(super) fn of(node: &Node) -> DirRef {
        DirRef {
            ino: node.ino,
            anchor: node.anchor.clone(),
            origin: node.origin().map(|o| Arc::new(o.path())),
        }
    }
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

impl Mirror {
    /// Calls `then` as soon as the directory has all its names (and, for a change, is published
    /// durably enough): at once on this thread, or later on a pool thread.
    pub fn when_populated(
        self: &Arc<Self>,
        ino: Ino,
        access: Access,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let node = match self.nodes.known(ino, "lookup") {
            Ok(node) => node,
            Err(e) => return then(Err(e)),
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
        if !self.populates.join(ino, self.waiting_for(&node, after)) {
            self.populate_on_pool(&node);
        }
    }

    /// Calls `then` when the directory can be listed: it has all its names, or it is large and they
    /// are on their way.
    pub(super) fn when_large_or_populated(self: &Arc<Self>, node: &Arc<Node>, then: Waiter) {
        let then = self.waiting_for(node, then);
        match self.populates.join_to_list(node.ino, then) {
            Ok(true) => {}
            Ok(false) => self.populate_on_pool(node),
            Err(then) => then(Ok(())),
        }
    }

    /// Runs the populate that this thread has begun on a pool thread.
    fn populate_on_pool(self: &Arc<Self>, node: &Node) {
        let (mirror, dir) = (Arc::clone(self), DirRef::of(node));
        let task = move || mirror.populate_claimed(&dir, None, Extent::Whole, 0);
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// Populates a directory on this thread, unless somebody does it already.
    pub(super) fn populate_for_nobody(self: &Arc<Self>, dir: &DirRef, extent: Extent) {
        if self.populates.begin(dir.ino) {
            self.populate_claimed(dir, None, extent, 0);
        }
    }

    /// Somebody waits for a directory: it is shown until he hears.
    pub fn waiting_for<T: Send + 'static>(
        &self,
        node: &Node,
        then: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Box<dyn FnOnce(Result<T>) + Send> {
        let origin = node.origin().map(|o| o.path().to_path());
        self.waiting(origin.unwrap_or_default(), then)
    }

    /// Populates a directory on the calling thread, with the data of its small files, or waits for
    /// whoever does it already. For the walker; a session thread must not call it.
    pub fn populate_now(
        self: &Arc<Self>,
        dir: &DirRef,
        carrier: &Carrier<'_>,
        stopping: impl Fn() -> bool,
    ) -> Result<()> {
        self.populate_here(dir, Some(carrier), stopping)
    }

    /// Populates a directory on the calling thread: names only.
    pub fn populate_names(self: &Arc<Self>, dir: &DirRef) -> Result<()> {
        self.populate_here(dir, None, || self.stopping())
    }

    fn populate_here(
        self: &Arc<Self>,
        dir: &DirRef,
        carrier: Option<&Carrier<'_>>,
        stopping: impl Fn() -> bool,
    ) -> Result<()> {
        let (tell, told) = crossbeam_channel::bounded(1);
        let waiter: Waiter = Box::new(move |result| {
            let _ = tell.send(result); // Too late, while we stop.
        });
        if self.populates.join(dir.ino, waiter) {
            carrier.inspect(|c| c.must_list());
        } else {
            carrier.inspect(|c| c.enter(dir.ino));
            self.populate_claimed(dir, carrier, Extent::Whole, 0);
        }
        loop {
            match told.recv_timeout(LOOK_UP) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !stopping() => {}
                Err(_) => return Err(Error::Stopped),
            }
        }
    }

    /// Waits while more files have landed or were carried than memory is for. For walker threads.
    pub fn wait_for_room(&self) {
        self.commit.wait_for_room(|| self.stopping());
    }

    /// Runs the populate that `join` gave to this thread, and tells all who wait.
    pub(super) fn populate_claimed(
        self: &Arc<Self>,
        dir: &DirRef,
        carrier: Option<&Carrier<'_>>,
        extent: Extent,
        attempt: u32,
    ) {
        let mut attempt = attempt;
        let result = match self.populate(dir, carrier, extent, &mut attempt) {
            Ok(true) => Ok(()),
            Ok(false) => return,
            Err(e) => Err(e),
        };
        if let Err(e) = &result
            && self.populate_later(dir, extent, attempt, e)
        {
            // Somebody else ends it.
            carrier.inspect(|c| c.must_list());
            return;
        }
        self.populate_ended(dir, &result);
    }

    /// Tells all who wait.
    pub(super) fn populate_ended(&self, dir: &DirRef, result: &Result<()>) {
        if let Err(e) = result
            && let Some(origin) = &dir.origin
            && !matches!(e, Error::Stopped)
            && !was_removed(e)
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

    /// False: it is too large for this extent, and the populate is over.
    fn populate(
        self: &Arc<Self>,
        dir: &DirRef,
        carrier: Option<&Carrier<'_>>,
        extent: Extent,
        attempt: &mut u32,
    ) -> Result<bool> {
        let opened = self.open_dir(dir)?;
        let Some(partial) = self.partial(dir, Some(opened.as_fd()))? else {
            // Somebody was faster between our look and our claim.
            carrier.inspect(|c| c.must_list());
            return Ok(true);
        };
        let src = self.src_of(dir)?;
        let placer = Placer::new(self, &src, opened.as_fd(), &partial, carrier);
        self.settle_ledger(&src.path);
        let placed = self.place_all(&src, &partial, &placer, extent, attempt)?;
        let Some((meta, settled)) = placed else {
            return Ok(false);
        };
        if settled {
            self.see_to_extras(&src, opened.as_fd(), &partial)?;
        }
        partial.close();
        if partial.is_named() {
            // Users' own files carry a mark that the walker takes off.
            carrier.inspect(|c| c.must_list());
        }
        // While another program is to take over the directory stays in the table of partials.
        let _inside = self.marks.enter();
        let published = self.stamp_and_publish(dir, &opened, &placer, &meta, carrier);
        match &published {
            Ok(()) => self.partials.remove(dir.ino),
            Err(_) => partial.reopen(),
        }
        published.map(|()| true)
    }

    /// Places every name of a src directory; `None`: it is too large for this extent; false with the
    /// metadata: src's names are not known for sure. One that changes
    /// meanwhile, or lists what it says is not there, is listed again; one that keeps changing is
    /// published as it was last seen, and is in the ledger. A name that stays listed without being
    /// there, or fails for itself, may be a file: it gets a stand-in (unseen.rs).
    fn place_all(
        &self,
        src: &SrcDir,
        partial: &Partial,
        placer: &Placer<'_>,
        extent: Extent,
        attempt: &mut u32,
    ) -> Result<Option<(Meta, bool)>> {
        let path = src.path.as_ref();
        let mut tries_left = LISTINGS_MAX;
        loop {
            let meta =
                Meta::capture_fd(src.capture, src.fd.as_fd()).on("statx", Side::Src, path)?;
            partial.set_times((meta.stat.atime, meta.stat.mtime));
            let lost = Lost::new(*attempt);
            if !self.place_listed(src, partial, placer, extent, &lost)? {
                return Ok(None);
            }
            tries_left -= 1;
            let after = stat::stat_fd(src.fd.as_fd()).on("statx", Side::Src, path)?;
            let same = after.mtime == meta.stat.mtime;
            if tries_left > 0 && (lost.has_gone() || !same) {
                continue;
            }
            self.stand_in_for(placer, lost, same, attempt)?;
            if !same {
                let path = path.to_path();
                self.fail(&src.path, &Error::SrcChanged { path });
            }
            return Ok(Some((meta, same)));
        }
    }

    /// Lists a src directory once and places what is not here; false: it is too large. `lost`: names
    /// that are listed, and that is all.
    fn place_listed(
        &self,
        src: &SrcDir,
        partial: &Partial,
        placer: &Placer<'_>,
        extent: Extent,
        lost: &Lost,
    ) -> Result<bool> {
        let (mut from, mut len_max, mut buf) = (0, LARGE_DIR, Vec::new());
        loop {
            let mut entries = Vec::new();
            let at_end = dir::read_dir(src.fd.as_fd(), from, &mut buf, |entry| {
                entries.push(entry);
                entries.len() < len_max
            })
            .on("getdents64", Side::Src, src.path.as_ref())?;
            if !at_end {
                partial.note_large();
                if !self.populates.goes_on(partial.ino, extent) {
                    return Ok(false);
                }
            }
            let many = !at_end || entries.len() > LISTED_WHOLE;
            let slow = many || placer.priority() == Priority::Background;
            if slow && self.populates.takes_long(partial.ino) {
                // His first reply before the rest, in the same directory of dst.
                std::thread::sleep(HEAD_START);
            }
            from = entries.last().map_or(from, |e| e.next);
            len_max = CHUNK;
            // Inode order: statx of src reads its inode tables in order.
            entries.sort_unstable_by_key(|e| e.ino);
            self.crowd.each(placer.priority(), &entries, |entry| {
                if self.stopping() {
                    return Err(Error::Stopped);
                }
                let Some(claimed) = partial.claim(&entry.name) else {
                    placer.skip();
                    return Ok(());
                };
                fault::point("populate-before-child");
                match placer.place_listed(entry) {
                    Ok(true) => claimed.here(),
                    Ok(false) => {
                        claimed.not_in_src();
                        lost.note_gone(&entry.name);
                    }
                    Err(e) => lost.note_bad(&entry.name, &src.path, e)?,
                }
                fault::point("populate-after-child");
                Ok(())
            })?;
            if at_end {
                return Ok(true);
            }
        }
    }

    /// Every name is here: the directory gets its own metadata, and its mark goes from P to L.
    fn stamp_and_publish(
        self: &Arc<Self>,
        dir: &DirRef,
        opened: &OwnedFd,
        placer: &Placer<'_>,
        meta: &Meta,
        carrier: Option<&Carrier<'_>>,
    ) -> Result<()> {
        let src = placer.src;
        let changed = placer.partial.changed().map(|at| meta.changed_at(at));
        let meta = changed.as_ref().unwrap_or(meta);
        let mark = Mark {
            origin: placer.recorded_origin(opened)?,
            perm: match fault::breaks("D8") {
                true => None,
                false => self.stamp(meta, opened.as_fd(), &src.path)?,
            },
            ..Mark::populated()
        };
        placer.note_late_flags(meta, opened.as_fd())?;
        self.publish(dir, opened, placer.partial, mark, carrier)
    }

    /// The mark goes from P to L (D6); behind a barrier on btrfs, and where files are here whose own
    /// marks nobody can wait for (D1, D2). Readers go on meanwhile, changes wait.
    fn publish(
        self: &Arc<Self>,
        dir: &DirRef,
        opened: &OwnedFd,
        partial: &Partial,
        mark: Mark,
        carrier: Option<&Carrier<'_>>,
    ) -> Result<()> {
        fault::point("populate-before-mark");
        let carried = partial.carried();
        let behind = self.btrfs || carried.files > 0 || partial.has_kept();
        if behind && !fault::breaks("D6") {
            self.commit.publish_later(Publish {
                dir: dir.clone(),
                mark,
                carried,
                doubtful: false,
                then: carrier.map(Carrier::published),
                _partial: self.partials.find(dir.ino, &dir.anchor),
            });
        } else {
            let shown = || dir.origin.as_deref().cloned().unwrap_or_default();
            let set = self.mark.set(Target::Fd(opened.as_fd()), &mark);
            set.on("setxattr", Side::Dst, shown())?;
            // Asked after that: a mark that goes later is behind this one in dst's journal.
            if partial.had_unmarked() {
                fd::fsync(opened.as_fd()).on("fsync", Side::Dst, shown())?;
            }
        }
        fault::point("populate-after-mark");
        self.progress.dirs_populated.add(1);
        self.note_phase(dir, Phase::Populated);
        Ok(())
    }

    /// Notes a new phase, if the kernel holds the inode.
    pub(super) fn note_phase(&self, dir: &DirRef, phase: Phase) {
        if let Some(node) = self.nodes.find_same(dir.ino, &dir.anchor) {
            node.set_phase(phase);
        }
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

    /// The entry of a populated directory that `name` is: what the walker goes on with.
    /// `None` for what carries no mark, and for a user's own file.
    pub fn marked_child(
        &self,
        parent: &DirRef,
        opened: BorrowedFd<'_>,
        name: &Name,
        kind: FileType,
    ) -> Result<Option<Marked>> {
        let marked = self.marked_or_own(parent, opened, name, kind)?;
        Ok(marked.filter(|m| !m.mark.own))
    }

    pub(super) fn marked_or_own(
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
        // By its name: most entries carry none.
        match self.mark.get(Target::At(opened, name)) {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e).on("getxattr", Side::Dst, shown()),
        }
        // Users rename meanwhile. All that is told is of one inode: with another's origin it would get
        // another's bytes. One whose mark tells of no origin has the name that it was placed under.
        let file = match fd::open_at(opened, name, OFlags::PATH) {
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            other => other.on("open", Side::Dst, shown())?,
        };
        let mark = self.mark.get(Target::Fd(file.as_fd()));
        let Some(mark) = mark.on("getxattr", Side::Dst, shown())? else {
            return Ok(None);
        };
        let stat = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, shown())?;
        self.check_seen(stat.key.ino, Some(&mark), || shown().to_path())?;
        let anchor = parent
            .anchor
            .child_at(opened, name, file.as_fd(), stat.key.ino);
        let anchor = match anchor {
            Err(Errno::NOENT | Errno::STALE) => return Ok(None),
            other => other.on("name_to_handle_at", Side::Dst, shown())?,
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

/// A directory that is gone from dst: populated, and then removed, by somebody who was faster. One that
/// is P cannot be removed.
fn was_removed(error: &Error) -> bool {
    match error {
        Error::Call {
            call, side, errno, ..
        } => *call == "open" && *side == Side::Dst && [Errno::STALE, Errno::NOENT].contains(errno),
        _ => false,
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
