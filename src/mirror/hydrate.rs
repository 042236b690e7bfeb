//! Hydration: bringing one pending file's data into its placeholder.
//!
//!   Queued   -> Copying   begin()      the whole-file job was claimed; losers join
//!   Copying  -> Landed    land()       every byte is in dst's page cache, times are restored
//!   Landed   -> Unmarked  commit.rs    one syncfs for a batch, then the mark goes (D1)
//!   Landed   -> Settling  settle()     a writer waits: fdatasync, unmark, fsync at once (D2)
//!   Unmarked -> (gone)    commit.rs    the next syncfs made the removal durable (D2)
//!   Queued   -> Truncating  truncate_pending()  O_TRUNC: nothing is read from src (D3)
//!   any      -> (gone)    fail_hydration()  the mark was never touched, so a retry starts clean
//!
//! Readers are answered from Landed on, writers only when the hydration is gone. Upholds I3, I4,
//! I6, I7 and D1, D2, D3, D7, D9. Lock order: the table, then a hydration's state; neither is held
//! across a copy, an fsync or a waiter.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::node::{Anchor, Ino, Node, Origin, Phase};
use super::populate::{Waiter, no_origin};
use super::source::{SrcDir, SrcInfo};
use crate::engine::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use crate::error::{Context, Error, Result, Side};
use crate::meta::{self, CAPABILITY};
use crate::ranges::RangeSet;
use crate::sys::name::{Name, RelPath};
use crate::sys::xattr::{self, Target};
use crate::sys::{caps, copy, fault, fd, stat};

/// A pending file, as the walker and the table know it.
#[derive(Debug, Clone)]
pub struct FileRef {
    /// dst's inode number.
    pub ino: Ino,
    /// How to open it.
    pub anchor: Anchor,
    /// Where it comes from.
    pub origin: Option<Origin>,
}

impl FileRef {
    /// The file that a node is.
    pub fn of(node: &Node) -> FileRef {
        FileRef {
            ino: node.ino,
            anchor: node.anchor.clone(),
            origin: node.origin(),
        }
    }
}

/// Where a hydration is: see the module's states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Queued,
    Copying,
    Landed,
    Settling,
    Truncating,
    /// Unmarked by the commit with this number; durable with the next.
    Unmarked(u64),
    /// Out of the table: whoever still holds it joins anew.
    Over,
}

/// One file that is being hydrated, until its mark's removal is durable.
pub struct Hydration {
    pub(super) file: FileRef,
    path: RelPath,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) stage: Stage,
    /// The lane in which the whole file was asked of the engine.
    asked: Option<Priority>,
    /// Range jobs under way: the file cannot land before they end (I6).
    ranges: Vec<RangeJob>,
    whole: Option<Copied>,
    present: RangeSet,
    dst: Option<Arc<OwnedFd>>,
    src: Option<(Arc<SrcDir>, Name)>,
    readers: Vec<Waiter>,
    writers: Vec<Waiter>,
    settled: Vec<Waiter>,
    started: Instant,
    pub(super) bytes: u64,
    next_range: u64,
}

struct RangeJob {
    id: u64,
    range: Range<u64>,
    bytes: Vec<u8>,
    got: RangeSet,
    readers: Vec<RangeReader>,
}

struct RangeReader {
    range: Range<u64>,
    then: ReadDone,
}

/// Told the bytes of a read, once.
pub type ReadDone = Box<dyn FnOnce(Result<Vec<u8>>) + Send>;

/// All hydrations that are not over.
#[derive(Default)]
pub struct Hydrations {
    table: Mutex<HashMap<Ino, Arc<Hydration>>>,
}

impl Hydrations {
    /// The hydration of an inode, if there is one. The anchor tells it from an earlier inode with
    /// the same number.
    pub fn find(&self, ino: Ino, anchor: &Anchor) -> Option<Arc<Hydration>> {
        self.table
            .lock()
            .get(&ino)
            .filter(|h| h.file.anchor.same_inode(anchor))
            .cloned()
    }

    pub(super) fn remove(&self, hydration: &Arc<Hydration>) {
        let mut table = self.table.lock();
        if table
            .get(&hydration.file.ino)
            .is_some_and(|h| Arc::ptr_eq(h, hydration))
        {
            table.remove(&hydration.file.ino);
        }
    }

    fn join(&self, file: &FileRef) -> (Arc<Hydration>, bool) {
        let mut table = self.table.lock();
        if let Some(found) = table.get(&file.ino)
            && found.file.anchor.same_inode(&file.anchor)
        {
            return (Arc::clone(found), false);
        }
        let path = file.origin.as_ref().map(Origin::path).unwrap_or_default();
        let state = State {
            stage: Stage::Queued,
            asked: None,
            ranges: Vec::new(),
            whole: None,
            present: RangeSet::new(),
            dst: None,
            src: None,
            readers: Vec::new(),
            writers: Vec::new(),
            settled: Vec::new(),
            started: Instant::now(),
            bytes: 0,
            next_range: 0,
        };
        let new = Arc::new(Hydration {
            file: file.clone(),
            path,
            state: Mutex::new(state),
        });
        table.insert(file.ino, Arc::clone(&new));
        (new, true)
    }
}

/// What somebody wants of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Its bytes.
    Read,
    /// To change it: its mark must be gone for good (D2).
    Write,
    /// To know that its mark is gone: the walker.
    Unmarked,
}

impl Mirror {
    /// Calls `then` when the file can be read or written: at once on this thread when nothing
    /// stands in the way, else later on a worker or pool thread.
    pub fn when_hydrated(
        self: &Arc<Self>,
        node: &Node,
        need: Need,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        // In this order: a hydration is in the table before the node stops being pending.
        let pending = node.is_pending_file();
        let settled = || self.hydrations.find(node.ino, &node.anchor).is_none();
        if !pending && (need == Need::Read || settled()) {
            return then(Ok(()));
        }
        self.progress.waiting.add(1);
        let mirror = Arc::clone(self);
        let then: Waiter = Box::new(move |result| {
            mirror.progress.waiting.sub(1);
            then(result);
        });
        self.hydrate(&FileRef::of(node), need, Priority::Demand, then);
    }

    /// Hydrates a file and calls `then` when it can be read or written.
    pub fn hydrate(self: &Arc<Self>, file: &FileRef, need: Need, priority: Priority, then: Waiter) {
        let (hydration, _) = self.hydrations.join(file);
        let mut state = hydration.state.lock();
        match (state.stage, need) {
            (Stage::Over, _) => {
                drop(state);
                return self.hydrate(file, need, priority, then);
            }
            (Stage::Landed | Stage::Unmarked(_), Need::Read) => {
                drop(state);
                return then(Ok(()));
            }
            (Stage::Unmarked(_), Need::Unmarked) => {
                drop(state);
                return then(Ok(()));
            }
            (Stage::Landed, Need::Unmarked) => return state.settled.push(then),
            (Stage::Landed | Stage::Unmarked(_), Need::Write) => {
                state.writers.push(then);
                drop(state);
                return self.settle_soon(&hydration);
            }
            (Stage::Settling | Stage::Truncating, _) => return state.writers.push(then),
            (Stage::Queued | Stage::Copying, Need::Read) => state.readers.push(then),
            (Stage::Queued | Stage::Copying, Need::Write) => state.writers.push(then),
            (Stage::Queued | Stage::Copying, Need::Unmarked) => state.settled.push(then),
        }
        let start = state.ask(priority);
        drop(state);
        if start {
            self.start(&hydration, priority);
        }
    }

    /// Opens both sides and submits the whole-file job: here if src's directory is open already or
    /// nobody waits (a walker thread), else on a pool thread.
    fn start(self: &Arc<Self>, hydration: &Arc<Hydration>, priority: Priority) {
        let origin_dir = hydration.file.origin.as_ref().map(|o| Arc::clone(&o.dir));
        let at_hand = origin_dir.is_none_or(|d| self.source.cached_dir(&d).is_some());
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let go = move || {
            if let Err(e) = mirror.submit_whole(&hydration, priority) {
                mirror.fail_hydration(&hydration, e);
            }
        };
        if at_hand || priority == Priority::Background {
            go();
        } else {
            self.engine.pool().run(Priority::Demand, Box::new(go));
        }
    }

    /// Opens src's directory and dst's file for a hydration, once. `None`: there is nothing to do,
    /// the file was unmarked before this hydration began (a walker's look was too old).
    fn prepare(&self, hydration: &Hydration) -> Result<Option<Prepared>> {
        let path = &hydration.path;
        {
            let state = hydration.state.lock();
            if let (Some(dst), Some(src)) = (&state.dst, &state.src) {
                return Ok(Some((Arc::clone(dst), Arc::clone(&src.0), src.1.clone())));
            }
        }
        let dst = match hydration.file.anchor.open(self.dst.as_fd(), OFlags::RDWR) {
            // Deleted meanwhile.
            Err(Errno::STALE | Errno::NOENT) => return Ok(None),
            other => Arc::new(other.on("open", Side::Dst, path)?),
        };
        let mark = self
            .mark
            .get(Target::Fd(dst.as_fd()))
            .on("getxattr", Side::Dst, path)?;
        // Only a hydration removes the mark, and this inode's only one is ours: the answer holds.
        if mark.is_none() {
            return Ok(None);
        }
        let origin = hydration
            .file
            .origin
            .as_ref()
            .ok_or_else(|| no_origin(path))?;
        let name = origin.name.clone().ok_or_else(|| no_origin(path))?;
        let src = self.source.dir(&origin.dir)?;
        let marked = self.mark.get(Target::At(src.fd.as_fd(), &name));
        if marked.on("getxattr", Side::Src, path)?.is_some() {
            return Err(Error::SrcPending {
                path: path.to_path(),
            });
        }
        let mut state = hydration.state.lock();
        state.dst = Some(Arc::clone(&dst));
        state.src = Some((Arc::clone(&src), name.clone()));
        Ok(Some((dst, src, name)))
    }

    fn submit_whole(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        priority: Priority,
    ) -> Result<()> {
        if hydration.state.lock().stage != Stage::Queued {
            return Ok(());
        }
        let Some((dst, src, name)) = self.prepare(hydration)? else {
            self.already_done(hydration);
            return Ok(());
        };
        fault::point("hydrate-begin");
        let done = Whole {
            mirror: Arc::clone(self),
            hydration: Arc::clone(hydration),
        };
        self.engine.submit(CopyJob {
            src_dir: Arc::clone(&src.fd),
            src_name: name,
            dst,
            span: Span::Whole,
            priority,
            durability: Durability::Later,
            path: hydration.path.clone(),
            done: Box::new(done),
        })
    }

    /// The file carries no mark any more: everybody who waits can go on.
    fn already_done(&self, hydration: &Arc<Hydration>) {
        // Unless it is being truncated: that ends by itself.
        if hydration.state.lock().stage == Stage::Queued {
            self.note_file_phase(&hydration.file, Phase::Unmarked);
            self.end(hydration, Ok(()));
        }
    }

    /// The last job has ended: restore what writing disturbed, then wake the readers.
    fn land(self: &Arc<Self>, hydration: &Arc<Hydration>, copied: Copied) {
        if let Err(e) = self.restore(hydration, &copied) {
            return self.fail_hydration(hydration, e);
        }
        fault::point("hydrate-landed");
        let ino = hydration.file.ino;
        self.note_file_phase(&hydration.file, Phase::Unmarked);
        let known = self.source.recall(ino);
        self.source.unlearn(ino);
        if known.is_some_and(|k| k.size != copied.src.size || k.mtime != copied.src.mtime) {
            self.invalidate(ino);
        }
        self.ledger.settle(&hydration.path);
        let mut state = hydration.state.lock();
        state.stage = Stage::Landed;
        state.bytes = copied.src.size;
        state.dst = None;
        let readers = std::mem::take(&mut state.readers);
        let writers_wait = !state.writers.is_empty();
        if state.asked == Some(Priority::Demand) {
            self.progress.demand_files.add(1);
            self.progress.demand_bytes.add(copied.bytes);
            tracing::debug!(path = ?hydration.path, elapsed = ?state.started.elapsed(), "pulled on access");
        }
        drop(state);
        readers.into_iter().for_each(|r| r(Ok(())));
        match writers_wait {
            true => self.settle_soon(hydration),
            false => self.commit.file_landed(Arc::clone(hydration)),
        }
    }

    /// D7 and D9: security.capability from src, then times: the user's where he set them.
    fn restore(&self, hydration: &Hydration, copied: &Copied) -> Result<()> {
        let path = &hydration.path;
        let (dst, src) = {
            let state = hydration.state.lock();
            (state.dst.clone(), state.src.clone())
        };
        let (Some(dst), Some((src, name))) = (dst, src) else {
            return Err(no_origin(path));
        };
        let target = Target::Fd(dst.as_fd());
        let _guard = self.lock_mark(hydration.file.ino);
        let mark = self
            .mark
            .get(target)
            .on("getxattr", Side::Dst, path)?
            .unwrap_or_default();
        if mark.capability {
            let value = xattr::get(Target::At(src.fd.as_fd(), &name), CAPABILITY);
            if let Some(value) = value.on("getxattr", Side::Src, path)?
                && let Err(errno) = xattr::set(target, CAPABILITY, &value)
            {
                let what = CAPABILITY.to_string_lossy().into_owned();
                self.refused(path, &meta::Refused { what, errno });
            }
        }
        self.reserve_like_src(hydration, copied, dst.as_fd(), &src, &name)?;
        let (atime, mtime) = mark.times.unwrap_or((copied.src.atime, copied.src.mtime));
        meta::set_times_fd(dst.as_fd(), atime, mtime).on("utimensat", Side::Dst, path)
    }

    /// Room that src's file has without data in it (fallocate) is part of what it is.
    fn reserve_like_src(
        &self,
        hydration: &Hydration,
        copied: &Copied,
        dst: BorrowedFd<'_>,
        src: &SrcDir,
        name: &Name,
    ) -> Result<()> {
        let path = &hydration.path;
        let there = stat::stat_fd(dst).on("statx", Side::Dst, path)?;
        if copied.src.blocks <= there.blocks + RESERVE_BLOCKS {
            return Ok(());
        }
        let file = fd::open_src(src.fd.as_fd(), name).on("open", Side::Src, path)?;
        copy::reserve_like(file.as_fd(), dst, copied.src.size).on("fallocate", Side::Dst, path)
    }

    /// Makes a landed file writable soon: on a pool thread, because it waits for the device.
    fn settle_soon(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            let unmarked = {
                let mut state = hydration.state.lock();
                match state.stage {
                    Stage::Landed => {
                        state.stage = Stage::Settling;
                        false
                    }
                    Stage::Unmarked(_) => {
                        state.stage = Stage::Settling;
                        true
                    }
                    // Another writer's task does it, or the hydration failed and told everybody.
                    _ => return,
                }
            };
            let result = mirror.settle(&hydration, unmarked);
            match result {
                Ok(()) => mirror.end(&hydration, Ok(())),
                Err(e) => mirror.fail_hydration(&hydration, e),
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// D2: fdatasync; removexattr; fsync.
    fn settle(&self, hydration: &Hydration, unmarked: bool) -> Result<()> {
        let path = &hydration.path;
        let file = hydration.file.anchor.open(self.dst.as_fd(), OFlags::RDONLY);
        let file = file.on("open", Side::Dst, path)?;
        if !unmarked {
            fd::fdatasync(file.as_fd()).on("fdatasync", Side::Dst, path)?;
            fault::point("hydrate-durable");
            self.mark
                .remove(Target::Fd(file.as_fd()))
                .on("removexattr", Side::Dst, path)?;
            fault::point("hydrate-unmarked");
            self.count_pulled(hydration.state.lock().bytes);
        }
        fd::fsync(file.as_fd()).on("fsync", Side::Dst, path)
    }

    /// One more file is complete and durable.
    pub(super) fn count_pulled(&self, bytes: u64) {
        self.progress.files_pulled.add(1);
        self.progress.bytes_pulled.add(bytes);
        self.progress.bytes_left.sub(bytes);
    }

    /// The hydration is over: everybody who still waits is told.
    pub(super) fn end(&self, hydration: &Arc<Hydration>, result: Result<()>) {
        self.hydrations.remove(hydration);
        let mut state = hydration.state.lock();
        state.stage = Stage::Over;
        let waiters = state.take_waiters();
        drop(state);
        waiters.into_iter().for_each(|w| w(result.clone()));
    }

    /// Everybody who waits for the whole file is told why not. Range jobs that still run keep the
    /// hydration in the table: a late write of theirs must not meet a user's (I6).
    pub(super) fn fail_hydration(&self, hydration: &Arc<Hydration>, error: Error) {
        if error.is_dst_full() {
            self.progress.dst_full.store(true, Ordering::Relaxed);
        } else if !matches!(error, Error::Stopped) {
            self.fail(&hydration.path, &error);
        }
        let mut state = hydration.state.lock();
        if state.ranges.is_empty() {
            drop(state);
            return self.end(hydration, Err(error));
        }
        state.stage = Stage::Queued;
        state.asked = None;
        state.whole = None;
        let waiters = state.take_waiters();
        drop(state);
        waiters.into_iter().for_each(|w| w(Err(error.clone())));
    }

    fn note_file_phase(&self, file: &FileRef, phase: Phase) {
        if let Some(node) = self.nodes.find_same(file.ino, &file.anchor) {
            node.set_phase(phase);
        }
    }

    /// D3: a pending file loses all its data: nothing is read from src. Calls `then` when it can be
    /// written. A hydration that has begun is waited for instead.
    pub fn truncate_pending(self: &Arc<Self>, node: &Arc<Node>, then: Waiter) {
        let (hydration, _) = self.hydrations.join(&FileRef::of(node));
        let mut state = hydration.state.lock();
        if state.stage != Stage::Queued || !state.ranges.is_empty() {
            drop(state);
            let (mirror, held) = (Arc::clone(self), Arc::clone(node));
            return self.when_hydrated(node, Need::Write, move |result| {
                then(result.and_then(|()| mirror.truncate_now(&held)));
            });
        }
        state.stage = Stage::Truncating;
        drop(state);
        let (mirror, node) = (Arc::clone(self), Arc::clone(node));
        let task = move || {
            let result = mirror.truncate_and_unmark(&hydration.file, &hydration.path);
            match result {
                Ok(bytes) => {
                    mirror.progress.bytes_left.sub(bytes);
                    mirror.progress.files_pulled.add(1);
                    node.set_phase(Phase::Unmarked);
                    mirror.source.unlearn(node.ino);
                    mirror.end(&hydration, Ok(()));
                    then(Ok(()));
                }
                Err(e) => {
                    mirror.fail_hydration(&hydration, e.clone());
                    then(Err(e));
                }
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn truncate_and_unmark(&self, file: &FileRef, path: &RelPath) -> Result<u64> {
        let opened =
            file.anchor
                .open(self.dst.as_fd(), OFlags::RDWR)
                .on("open", Side::Dst, path)?;
        let before = stat::stat_fd(opened.as_fd()).on("statx", Side::Dst, path)?;
        caps::without_fsetid(|| copy::truncate(opened.as_fd(), 0)).on(
            "ftruncate",
            Side::Dst,
            path,
        )?;
        self.mark
            .remove(Target::Fd(opened.as_fd()))
            .on("removexattr", Side::Dst, path)?;
        fd::fsync(opened.as_fd()).on("fsync", Side::Dst, path)?;
        Ok(before.size)
    }

    fn truncate_now(&self, node: &Node) -> Result<()> {
        let opened =
            self.nodes
                .open(node, OFlags::WRONLY)
                .on("open", Side::Dst, node.display_name())?;
        caps::without_fsetid(|| copy::truncate(opened.as_fd(), 0)).on(
            "ftruncate",
            Side::Dst,
            node.display_name(),
        )
    }

    /// Reads a range of a file that may be pending: what is here from dst, the rest from src, and
    /// the answer does not wait until it is stored. `then` is called once.
    pub fn read_range(
        self: &Arc<Self>,
        node: &Node,
        info: SrcInfo,
        range: Range<u64>,
        then: ReadDone,
    ) {
        let file = FileRef::of(node);
        let (hydration, _) = self.hydrations.join(&file);
        let range = range.start.min(info.size)..range.end.min(info.size);
        // The rest follows, unless dst has no room for it.
        let room = !self.progress.dst_full.load(Ordering::Relaxed);
        let (job, whole) = {
            let mut state = hydration.state.lock();
            if state.stage == Stage::Over {
                drop(state);
                return match node.is_pending_file() {
                    true => self.read_range(node, info, range, then),
                    false => then(self.read_here(&file, &hydration.path, range)),
                };
            }
            if state.stage == Stage::Truncating {
                let (mirror, path) = (Arc::clone(self), hydration.path.clone());
                return state.writers.push(Box::new(move |ready| {
                    then(ready.and_then(|()| mirror.read_here(&file, &path, range)));
                }));
            }
            let here = !matches!(state.stage, Stage::Queued | Stage::Copying);
            if here || state.present.contains(&range) {
                drop(state);
                return then(self.read_here(&file, &hydration.path, range));
            }
            let job = state.wait_for_range(range, info.size, then);
            (job, room && state.ask(Priority::Background))
        };
        self.progress.waiting.add(1);
        if let Some((id, wanted)) = job {
            let (mirror, hydration) = (Arc::clone(self), Arc::clone(&hydration));
            let at_hand = hydration.state.lock().src.is_some();
            let go = move || mirror.submit_range(&hydration, id, wanted);
            match at_hand {
                true => go(),
                false => self.engine.pool().run(Priority::Demand, Box::new(go)),
            }
        }
        if whole {
            let (mirror, hydration) = (Arc::clone(self), Arc::clone(&hydration));
            let go = move || mirror.start(&hydration, Priority::Background);
            self.engine.pool().run(Priority::Demand, Box::new(go));
        }
    }

    fn read_here(&self, file: &FileRef, path: &RelPath, range: Range<u64>) -> Result<Vec<u8>> {
        let opened =
            file.anchor
                .open(self.dst.as_fd(), OFlags::RDONLY)
                .on("open", Side::Dst, path)?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let n =
            fd::pread_all(opened.as_fd(), &mut bytes, range.start).on("read", Side::Dst, path)?;
        bytes.truncate(n);
        Ok(bytes)
    }

    fn submit_range(self: &Arc<Self>, hydration: &Arc<Hydration>, id: u64, range: Range<u64>) {
        let result = self.prepare(hydration).and_then(|prepared| {
            let Some((dst, src, name)) = prepared else {
                self.already_done(hydration);
                return Ok(());
            };
            let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
            self.engine.submit(CopyJob {
                src_dir: Arc::clone(&src.fd),
                src_name: name,
                dst,
                span: Span::Range(range),
                priority: Priority::Demand,
                durability: Durability::Later,
                path: hydration.path.clone(),
                done: Box::new(Part {
                    mirror,
                    hydration,
                    id,
                }),
            })
        });
        if let Err(e) = result {
            self.range_done(hydration, id, Err(e));
        }
    }

    fn range_done(self: &Arc<Self>, hydration: &Arc<Hydration>, id: u64, result: Result<()>) {
        if let Err(e) = &result {
            match e.is_dst_full() {
                true => self.progress.dst_full.store(true, Ordering::Relaxed),
                false => self.fail(&hydration.path, e),
            }
        }
        let (left, whole) = {
            let mut state = hydration.state.lock();
            let at = state.ranges.iter().position(|r| r.id == id);
            let left = at
                .map(|at| state.ranges.swap_remove(at).readers)
                .unwrap_or_default();
            (left, state.whole_if_last())
        };
        let idle = {
            let state = hydration.state.lock();
            state.stage == Stage::Queued && state.asked.is_none() && state.ranges.is_empty()
        };
        for reader in left {
            self.progress.waiting.sub(1);
            match &result {
                Ok(()) => {
                    (reader.then)(self.read_here(&hydration.file, &hydration.path, reader.range))
                }
                Err(e) => (reader.then)(Err(e.clone())),
            }
        }
        if let Some(copied) = whole {
            self.land(hydration, copied);
        } else if idle {
            self.end(hydration, Err(Error::Stopped));
        }
    }
}

impl Hydration {
    /// Every byte is in dst, though the mark may still be there.
    pub(super) fn has_landed(&self) -> bool {
        let stage = self.state.lock().stage;
        matches!(stage, Stage::Landed | Stage::Settling | Stage::Unmarked(_))
    }
}

type Prepared = (Arc<OwnedFd>, Arc<SrcDir>, Name);

/// Fewer missing blocks (of 512 bytes) than this are the file systems' own business.
const RESERVE_BLOCKS: u64 = 128;

/// Range pulls are widened to this unit, bytes: the kernel's largest readahead on FUSE is near it.
const RANGE_UNIT: u64 = 256 * 1024;

impl State {
    /// True when the whole file has to be asked of the engine (again, in a faster lane).
    fn ask(&mut self, priority: Priority) -> bool {
        let faster = priority == Priority::Demand && self.asked == Some(Priority::Background);
        let ask = self.asked.is_none() || faster && self.stage == Stage::Queued;
        if ask {
            self.asked = Some(priority);
        }
        ask
    }

    fn take_waiters(&mut self) -> Vec<Waiter> {
        let mut waiters = std::mem::take(&mut self.readers);
        waiters.append(&mut self.writers);
        waiters.append(&mut self.settled);
        waiters
    }

    pub(super) fn take_settled(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.settled)
    }

    pub(super) fn has_writers(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Adds a reader to a range job that covers its range; a new job's id and range come back.
    fn wait_for_range(
        &mut self,
        range: Range<u64>,
        size: u64,
        then: ReadDone,
    ) -> Option<(u64, Range<u64>)> {
        let reader = RangeReader {
            range: range.clone(),
            then,
        };
        let covers = |r: &RangeJob| r.range.start <= range.start && range.end <= r.range.end;
        if let Some(job) = self
            .ranges
            .iter_mut()
            .find(|r| covers(r) && !r.got.contains(&range))
        {
            job.readers.push(reader);
            return None;
        }
        let start = range.start / RANGE_UNIT * RANGE_UNIT;
        let end = range.end.next_multiple_of(RANGE_UNIT).min(size);
        let id = self.next_range;
        self.next_range += 1;
        self.ranges.push(RangeJob {
            id,
            range: start..end,
            bytes: vec![0; (end - start) as usize],
            got: RangeSet::new(),
            readers: vec![reader],
        });
        Some((id, start..end))
    }

    /// The whole job's outcome, when every job of the file has ended: then it can land.
    fn whole_if_last(&mut self) -> Option<Copied> {
        if self.stage != Stage::Copying || !self.ranges.is_empty() {
            return None;
        }
        self.whole.take()
    }
}

/// The whole-file job's report.
struct Whole {
    mirror: Arc<Mirror>,
    hydration: Arc<Hydration>,
}

impl Completion for Whole {
    fn begin(&mut self) -> bool {
        let mut state = self.hydration.state.lock();
        let won = state.stage == Stage::Queued;
        if won {
            state.stage = Stage::Copying;
        }
        won
    }

    fn landed(&mut self, range: Range<u64>) {
        self.hydration.state.lock().present.insert(range);
    }

    fn done(self: Box<Self>, outcome: Result<Copied>) {
        match outcome {
            Ok(copied) => {
                let ready = {
                    let mut state = self.hydration.state.lock();
                    state.whole = Some(copied);
                    state.present.insert(0..u64::MAX);
                    state.whole_if_last()
                };
                if let Some(copied) = ready {
                    self.mirror.land(&self.hydration, copied);
                }
            }
            Err(e) => self.mirror.fail_hydration(&self.hydration, e),
        }
    }
}

/// A range job's report.
struct Part {
    mirror: Arc<Mirror>,
    hydration: Arc<Hydration>,
    id: u64,
}

impl Completion for Part {
    fn data(&mut self, offset: u64, bytes: &[u8]) {
        let ready = {
            let mut state = self.hydration.state.lock();
            let Some(job) = state.ranges.iter_mut().find(|r| r.id == self.id) else {
                return;
            };
            job.take_bytes(offset, bytes)
        };
        for (reader, bytes) in ready {
            self.mirror.progress.waiting.sub(1);
            self.mirror.progress.demand_bytes.add(bytes.len() as u64);
            (reader.then)(Ok(bytes));
        }
    }

    fn landed(&mut self, range: Range<u64>) {
        self.hydration.state.lock().present.insert(range);
    }

    fn done(self: Box<Self>, outcome: Result<Copied>) {
        self.mirror
            .range_done(&self.hydration, self.id, outcome.map(|_| ()));
    }
}

impl RangeJob {
    /// Stores bytes that were read from src; gives back the readers that have all of theirs now.
    fn take_bytes(&mut self, offset: u64, bytes: &[u8]) -> Vec<(RangeReader, Vec<u8>)> {
        let Some(at) = offset.checked_sub(self.range.start) else {
            return Vec::new();
        };
        let at = at as usize;
        let Some(room) = self.bytes.get_mut(at..at + bytes.len()) else {
            return Vec::new();
        };
        room.copy_from_slice(bytes);
        self.got.insert(offset..offset + bytes.len() as u64);
        let (ready, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.readers)
            .into_iter()
            .partition(|r| self.got.contains(&r.range));
        self.readers = wait;
        let part = |r: &Range<u64>| {
            let start = (r.start - self.range.start) as usize;
            self.bytes[start..start + (r.end - r.start) as usize].to_vec()
        };
        ready
            .into_iter()
            .map(|r| (part(&r.range), r))
            .map(|(b, r)| (r, b))
            .collect()
    }
}
