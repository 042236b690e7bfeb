//! Hydration: bringing one pending file's data into its placeholder.
//!
//!   Queued   -> Copying   begin()      the whole-file job was claimed; losers join
//!   Copying  -> Landed    land()       every byte is in dst's page cache, times are restored
//!   Landed   -> Unmarked  commit.rs    one syncfs for a batch, then the mark goes (D1)
//!   Landed   -> Settling  settle()     a writer waits: fdatasync, unmark, fsync at once (D2)
//!   Unmarked -> (gone)    commit.rs    the next syncfs made the removal durable (D2)
//!   Queued   -> Truncating  truncate_pending()  O_TRUNC: nothing is read from src (D3)
//!   Queued   -> Mixing, Mixed  mixed.rs: a large file that is changed before it is here; salvage.rs
//!   any      -> (gone)    fail_hydration()  the mark was never touched, so a retry starts clean
//!
//! Readers are answered from Landed on, writers only when the hydration is gone. Upholds I3, I4,
//! I6, I7 and D1, D2, D3, D7, D9. Lock order: the table, then a hydration's state; neither is held
//! across a copy, an fsync or a waiter.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Mirror;
use super::anchor::Anchor;
use super::mixed::Mixed;
use super::node::{Ino, Node, Origin, Phase};
use super::populate::Waiter;
use super::proof::Hashed;
use super::ranged::RangeJob;
use super::readahead::Readahead;
use super::source::SrcDir;
use super::whole::Whole;
use crate::engine::job::{Copied, CopyJob, Durability, Priority, Span};
use crate::error::{Error, Result};
use crate::ranges::RangeSet;
use crate::sys::fault;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::Stat;

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
    /// On its way to be Mixed.
    Mixing,
    /// Changed by users, or not whole in src, and pulled around that (mixed.rs).
    Mixed,
    /// No longer: it is pending again (salvage.rs).
    Leaving,
    /// Unmarked by the commit with this number; durable with the next.
    Unmarked(u64),
    /// Out of the table: whoever still holds it joins anew.
    Over,
}

/// One file that is being hydrated, until its mark's removal is durable.
pub struct Hydration {
    pub(super) file: FileRef,
    pub(super) path: RelPath,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) stage: Stage,
    /// The lane in which the whole file was asked of the engine.
    pub(super) asked: Option<Priority>,
    /// Somebody waits for it, or has.
    pub(super) demanded: bool,
    /// Range jobs under way: the file cannot land before they end (I6).
    pub(super) ranges: Vec<RangeJob>,
    pub(super) whole: Option<Copied>,
    /// src of each range job that ended while the whole-file job ran; `None`: it failed.
    pub(super) beside: Vec<Option<Stat>>,
    /// For the manifest: what `whole` has read. It counts when that has landed.
    pub(super) hashed: Option<Hashed>,
    pub(super) present: RangeSet,
    /// Of these, what was copied by jobs that have looked at src once more since.
    pub(super) sure: RangeSet,
    pub(super) dst: Option<Arc<OwnedFd>>,
    pub(super) src: Option<(Arc<SrcDir>, Name)>,
    pub(super) readers: Vec<Waiter>,
    pub(super) writers: Vec<Waiter>,
    pub(super) settled: Vec<Waiter>,
    pub(super) started: Instant,
    /// The last step of the whole-file job; and whether it was told that there are no more.
    pub(super) moved: Instant,
    pub(super) hung: bool,
    /// Tries of the whole-file job that failed as if src were away.
    pub(super) attempts: u32,
    pub(super) bytes: u64,
    /// Nothing of it is to stay in the page cache.
    pub(super) passes: bool,
    pub(super) next_range: u64,
    pub(super) readahead: Readahead,
    /// Its mark was read: whether an earlier daemon has left it mixed is known.
    pub(super) looked: bool,
    /// It may become mixed; not after that has failed.
    pub(super) mixes: bool,
    /// The whole-file job is to end: a user changes the file.
    pub(super) leaves: bool,
    pub(super) mixed: Option<Box<Mixed>>,
    /// Changes that wait until it is mixed.
    pub(super) changers: Vec<Waiter>,
}

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

    /// As `find`, whatever inode has the number.
    pub(super) fn by_number(&self, ino: Ino) -> Option<Arc<Hydration>> {
        self.table.lock().get(&ino).cloned()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }

    /// In one step with what is done to its state.
    pub(super) fn remove_if(&self, one: &Arc<Hydration>, goes: impl FnOnce(&mut State) -> bool) {
        let mut table = self.table.lock();
        let found = table.get(&one.file.ino);
        if found.is_some_and(|h| Arc::ptr_eq(h, one)) && goes(&mut one.state.lock()) {
            table.remove(&one.file.ino);
        }
    }

    /// Those that have made no step for so long, and whether that is news.
    pub(super) fn hung(&self, limit: Duration) -> Vec<(Arc<Hydration>, bool)> {
        let all: Vec<_> = self.table.lock().values().cloned().collect();
        let mut hung = Vec::new();
        for hydration in all {
            let mut state = hydration.state.lock();
            let at_work = match state.stage {
                Stage::Copying => true,
                // What no worker has taken is held back, and does not hang.
                Stage::Mixed => state.ranges.iter().any(|job| job.begun),
                _ => false,
            };
            if at_work && state.moved.elapsed() > limit {
                let new = !std::mem::replace(&mut state.hung, true);
                drop(state);
                hung.push((hydration, new));
            }
        }
        hung
    }

    /// A background job has ended without its file. In one step, so that nobody joins in between.
    fn give_up(&self, hydration: &Arc<Hydration>, begun: bool) -> GivenUp {
        let mut table = self.table.lock();
        let mut state = hydration.state.lock();
        let demanded = state.asked == Some(Priority::Demand);
        let ours = match begun {
            true => state.stage == Stage::Copying,
            // Else the file goes another way: a demand job has it, or will; or it is truncated.
            false => state.stage == Stage::Queued && !demanded,
        };
        if !ours {
            return GivenUp::Settled(Vec::new());
        }
        state.stage = Stage::Queued;
        state.asked = None;
        state.whole = None;
        if demanded || state.is_waited_for() {
            state.asked = Some(Priority::Demand);
            return GivenUp::AskedAnew;
        }
        // Range jobs that still run keep it in the table (I6).
        if state.ranges.is_empty() {
            state.stage = Stage::Over;
            let same = |h: &Arc<Hydration>| Arc::ptr_eq(h, hydration);
            if table.get(&hydration.file.ino).is_some_and(same) {
                table.remove(&hydration.file.ino);
            }
        }
        GivenUp::Settled(state.take_settled())
    }

    /// Where all of them are.
    pub(super) fn stages(&self) -> HashMap<Ino, Stage> {
        let table = self.table.lock();
        let stage = |h: &Arc<Hydration>| h.state.lock().stage;
        table.iter().map(|(ino, h)| (*ino, stage(h))).collect()
    }

    pub(super) fn join(&self, file: &FileRef) -> (Arc<Hydration>, bool) {
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
            demanded: false,
            ranges: Vec::new(),
            whole: None,
            beside: Vec::new(),
            hashed: None,
            present: RangeSet::new(),
            sure: RangeSet::new(),
            dst: None,
            src: None,
            readers: Vec::new(),
            writers: Vec::new(),
            settled: Vec::new(),
            started: Instant::now(),
            moved: Instant::now(),
            hung: false,
            attempts: 0,
            bytes: 0,
            passes: false,
            next_range: 0,
            readahead: Readahead::default(),
            looked: false,
            mixes: true,
            leaves: false,
            mixed: None,
            changers: Vec::new(),
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

/// What became of a hydration whose background job was cancelled.
enum GivenUp {
    /// Somebody waits: the whole file is to be asked of the engine again.
    AskedAnew,
    /// Who is to hear that the file is still pending.
    Settled(Vec<Waiter>),
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
    /// Its bytes, before anybody asks for them.
    Ahead,
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
        if !pending && need == Need::Read {
            return then(Ok(()));
        }
        if !pending && settled() {
            return self.when_parent_published(node, Box::new(then));
        }
        let file = FileRef::of(node);
        if need == Need::Write {
            let mirror = Arc::clone(self);
            let go: Waiter = Box::new(move |ready| match ready {
                Ok(()) => mirror.hydrate_waiting(&file, need, Box::new(then)),
                Err(e) => then(Err(e)),
            });
            return self.when_parent_published(node, go);
        }
        self.hydrate_waiting(&file, need, Box::new(then));
    }

    pub(super) fn hydrate_waiting(self: &Arc<Self>, file: &FileRef, need: Need, then: Waiter) {
        let path = file.origin.as_ref().map(|o| o.path().to_path());
        let then: Waiter = self.waiting(path.unwrap_or_default(), then);
        self.hydrate(file, need, Priority::Demand, then);
    }

    /// True while a mark may be found on the file after a crash: it is pending, or it has landed and the
    /// mark, which is to know of what users change, is not gone for good.
    pub(super) fn may_be_marked(&self, node: &Node) -> bool {
        // In this order: a hydration is in the table before the node stops being pending.
        node.is_pending_file() || self.hydrations.find(node.ino, &node.anchor).is_some()
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
            (Stage::Landed | Stage::Unmarked(_), Need::Read | Need::Ahead)
            | (Stage::Unmarked(_), Need::Unmarked) => {
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
            (_, Need::Read | Need::Ahead) => state.readers.push(then),
            (_, Need::Write) => state.writers.push(then),
            (_, Need::Unmarked) => state.settled.push(then),
        }
        state.demanded |= priority == Priority::Demand && need != Need::Ahead;
        match state.stage {
            // `install` asks for the rest.
            Stage::Mixing | Stage::Leaving => return,
            Stage::Mixed => {
                drop(state);
                return self.fill(&hydration);
            }
            _ => {}
        }
        let start = state.ask(priority);
        let begun = state.stage == Stage::Copying;
        drop(state);
        if start {
            self.start(&hydration, priority);
        } else if begun && priority == Priority::Demand {
            self.engine.hurry();
        }
    }

    /// Opens both sides and submits the whole-file job: here if src's directory is open already, on a
    /// disk, or nobody waits (a walker thread), else on a pool thread.
    pub(super) fn start(self: &Arc<Self>, hydration: &Arc<Hydration>, priority: Priority) {
        let origin_dir = hydration.file.origin.as_ref().map(|o| Arc::clone(&o.dir));
        let at_hand = origin_dir.is_none_or(|d| self.source.is_at_hand(&d));
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let go = move || {
            if let Err(e) = mirror.submit_whole(&hydration, priority) {
                mirror.whole_failed(&hydration, e);
            }
        };
        if at_hand || priority == Priority::Background {
            go();
        } else {
            self.engine.pool().run(Priority::Demand, Box::new(go));
        }
    }

    fn submit_whole(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        priority: Priority,
    ) -> Result<()> {
        let is_queued = || hydration.state.lock().stage == Stage::Queued;
        let looks = self.mixes && !hydration.state.lock().looked;
        let opened = match looks && is_queued() {
            true => self.look_to_pull(hydration)?,
            false => None,
        };
        if !is_queued() {
            return Ok(());
        }
        let Some((dst, src, name)) = self.prepare_with(hydration, opened)? else {
            self.already_done(hydration);
            return Ok(());
        };
        self.expect_room(hydration, (src.fd.as_fd(), dst.as_fd()))?;
        fault::point("hydrate-begin");
        let done = Whole::new(self, hydration, priority);
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
    pub(super) fn already_done(&self, hydration: &Arc<Hydration>) {
        // Unless it is being truncated: that ends by itself.
        if hydration.state.lock().stage == Stage::Queued {
            self.note_file_phase(&hydration.file, Phase::Unmarked);
            self.end(hydration, Ok(()));
        }
    }

    /// The last job has ended: restore what writing disturbed, then wake the readers.
    pub(super) fn land(self: &Arc<Self>, hydration: &Arc<Hydration>, copied: Copied) {
        let hashed = hydration.state.lock().hashed.take();
        let one = self.is_of_one_src(hydration, &copied.src);
        if let Err(e) = one.and_then(|()| self.restore(hydration, &copied)) {
            return self.whole_failed(hydration, e);
        }
        fault::point("hydrate-landed");
        let ino = hydration.file.ino;
        let known = self.source.recall(ino);
        let turn = || {
            self.note_file_phase(&hydration.file, Phase::Unmarked);
            self.source.unlearn(ino);
        };
        match known.is_some_and(|k| !k.is_still(&copied.src)) {
            true => self.src_was_changed(ino, turn),
            false => turn(),
        }
        self.settle_ledger(&hydration.path);
        self.mend(ino);
        let mut state = hydration.state.lock();
        state.stage = Stage::Landed;
        state.bytes = copied.src.size;
        state.dst = None;
        let readers = std::mem::take(&mut state.readers);
        let changers = std::mem::take(&mut state.changers);
        let writers_wait = !state.writers.is_empty();
        if state.asked == Some(Priority::Demand) && state.demanded {
            self.progress.demand_files.add(1);
            self.progress.demand_bytes.add(copied.bytes);
            tracing::debug!(path = ?hydration.path, elapsed = ?state.started.elapsed(), "pulled on access");
        }
        drop(state);
        readers.into_iter().for_each(|r| r(Ok(())));
        changers.into_iter().for_each(|w| w(Ok(())));
        hashed.into_iter().for_each(|h| h.landed(copied.src));
        match writers_wait {
            true => self.settle_soon(hydration),
            false => self.commit.file_landed(Arc::clone(hydration)),
        }
    }

    /// One more file is complete and durable.
    pub(super) fn count_pulled(&self, bytes: u64) {
        self.progress.files_pulled.add(1);
        self.progress.bytes_pulled.add(bytes);
        self.progress.bytes_left.sub(bytes);
    }

    /// The hydration is over: everybody who still waits is told. Readers of ranges are answered
    /// from dst when it is whole.
    pub(super) fn end(&self, hydration: &Arc<Hydration>, result: Result<()>) {
        self.hydrations.remove_if(hydration, |_| true);
        let mut state = hydration.state.lock();
        state.stage = Stage::Over;
        let mut waiters = state.take_waiters();
        let mut ranges = std::mem::take(&mut state.ranges);
        if let Some(mixed) = state.mixed.take() {
            waiters.extend(mixed.waiting);
        }
        (state.dst, state.src) = (None, None);
        waiters.extend(ranges.iter_mut().flat_map(|r| std::mem::take(&mut r.after)));
        drop(state);
        waiters.into_iter().for_each(|w| w(result.clone()));
        for reader in ranges.into_iter().flat_map(|r| r.readers) {
            drop(reader.wait);
            let read = || self.read_here(&hydration.file, &hydration.path, reader.range);
            (reader.then)(result.clone().and_then(|()| read()));
        }
    }

    /// Everybody who waits for the whole file is told why not. Range jobs that still run keep the
    /// hydration in the table: a late write of theirs must not meet a user's (I6).
    pub(super) fn fail_hydration(&self, hydration: &Arc<Hydration>, error: Error) {
        if !matches!(error, Error::Stopped) {
            if error.is_bad_read() {
                self.spoil(hydration.file.ino);
            }
            self.fail(&hydration.path, &error);
        }
        let mut state = hydration.state.lock();
        // The mark is still there: whoever comes next must find the file pending.
        if matches!(state.stage, Stage::Landed | Stage::Settling) {
            self.note_file_phase(&hydration.file, Phase::Pending);
        }
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

    /// A background job was cancelled. Whoever waits for the file gets it all the same; the walker
    /// hears that it is still pending.
    pub(super) fn background_stopped(self: &Arc<Self>, hydration: &Arc<Hydration>, begun: bool) {
        match self.hydrations.give_up(hydration, begun) {
            GivenUp::AskedAnew => self.start(hydration, Priority::Demand),
            GivenUp::Settled(settled) => settled.into_iter().for_each(|w| w(Err(Error::Stopped))),
        }
    }

    pub(super) fn note_file_phase(&self, file: &FileRef, phase: Phase) {
        if let Some(node) = self.nodes.find_same(file.ino, &file.anchor) {
            node.set_phase(phase);
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

impl State {
    /// True when the whole file has to be asked of the engine (again, in a faster lane).
    pub(super) fn ask(&mut self, priority: Priority) -> bool {
        let faster = priority == Priority::Demand && self.asked == Some(Priority::Background);
        let ask = self.asked.is_none() || faster && self.stage == Stage::Queued;
        if ask {
            self.asked = Some(priority);
        }
        ask
    }

    pub(super) fn take_waiters(&mut self) -> Vec<Waiter> {
        let mut waiters = std::mem::take(&mut self.readers);
        waiters.append(&mut self.writers);
        waiters.append(&mut self.settled);
        waiters.append(&mut self.changers);
        waiters
    }

    pub(super) fn take_settled(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.settled)
    }

    /// Somebody waits for the whole file, and not only to hear that it is complete.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.readers.is_empty() || !self.writers.is_empty()
    }

    /// The lane for what is asked of the engine now.
    pub(super) fn lane(&self) -> Priority {
        match self.is_waited_for() {
            true => Priority::Demand,
            false => Priority::Background,
        }
    }
}
