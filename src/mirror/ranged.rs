//! Ranged reads: a pending file's bytes for whoever cannot wait for the whole of it.
//!
//! A range job pulls the unit around what was asked for, in the demand lane, and answers from the
//! bytes as they come from src, before they are stored. Its file cannot land while it runs, nor with what it
//! wrote over the whole-file job's bytes if that was of another src (I6).

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::fs::OFlags;

use super::Mirror;
use super::changed::may_be_cut;
use super::hydrate::{FileRef, Hydration, Stage, State};
use super::node::Node;
use super::populate::Waiter;
use super::source::SrcInfo;
use crate::engine::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use crate::error::{Context, Error, Result, Side};
use crate::progress::waits::Wait;
use crate::ranges::RangeSet;
use crate::sys::name::RelPath;
use crate::sys::{fault, fd};

/// Range pulls are widened to this unit, bytes: the kernel's largest readahead on FUSE is near it.
pub(super) const RANGE_UNIT: u64 = 256 * 1024;

pub(super) struct RangeJob {
    pub(super) id: u64,
    pub(super) range: Range<u64>,
    bytes: Vec<u8>,
    got: RangeSet,
    /// Tries that failed as if src were away.
    pub(super) attempts: u32,
    pub(super) readers: Vec<RangeReader>,
    /// Told when its bytes are in dst.
    pub(super) after: Vec<Waiter>,
    /// In front of who reads in order (readahead.rs); and it was asked for once more, as demand.
    pub(super) ahead: bool,
    pub(super) promoted: bool,
    /// Of a mixed file's rest, and in which lane; `None`: for who reads or changes these bytes.
    pub(super) fill: Option<Priority>,
    /// Of bytes that could not be read in a larger piece.
    pub(super) close: bool,
    /// A worker has it, since when; and its first bytes have come.
    pub(super) begun: bool,
    since: Instant,
    heard: bool,
    /// dst has lost bytes since it began: what it brings counts for nothing.
    pub(super) void: bool,
}

impl RangeJob {
    /// Nobody has asked for it, and no worker has it: it can be left out.
    pub(super) fn is_idle(&self) -> bool {
        let unasked = self.ahead || self.fill == Some(Priority::Background);
        unasked && !self.begun && !self.is_waited_for()
    }

    fn is_waited_for(&self) -> bool {
        !self.readers.is_empty() || !self.after.is_empty()
    }

    /// The lane in which it is asked for once more.
    pub(super) fn lane_now(&mut self, whole_is_waited_for: bool) -> Priority {
        if whole_is_waited_for || self.is_waited_for() {
            self.fill = self.fill.map(|_| Priority::Demand);
        }
        self.fill.unwrap_or(Priority::Demand)
    }
}

pub(super) struct RangeReader {
    pub(super) range: Range<u64>,
    pub(super) then: ReadDone,
    pub(super) wait: Wait,
}

/// Told the bytes of a read, once.
pub type ReadDone = Box<dyn FnOnce(Result<Vec<u8>>) + Send>;

impl Mirror {
    /// Reads a range of a file that may be pending: what is here from dst, the rest from src, and
    /// the answer does not wait until it is stored. `then` is called once.
    pub fn read_range(
        self: &Arc<Self>,
        node: &Arc<Node>,
        info: SrcInfo,
        range: Range<u64>,
        then: ReadDone,
    ) {
        let file = FileRef::of(node);
        let (hydration, _) = self.hydrations.join(&file);
        let asked = range.clone();
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
            if matches!(state.stage, Stage::Mixed | Stage::Leaving) {
                drop(state);
                return self.read_mixed(node, &hydration, asked, then);
            }
            if self.mixes && state.stage == Stage::Queued && !state.looked {
                drop(state);
                return match self.look(&hydration) {
                    Ok(()) => self.read_range(node, info, asked, then),
                    Err(e) => then(Err(e)),
                };
            }
            if state.stage == Stage::Truncating {
                let (mirror, path) = (Arc::clone(self), hydration.path.clone());
                return state.writers.push(Box::new(move |ready| {
                    then(ready.and_then(|()| mirror.read_here(&file, &path, range)));
                }));
            }
            let begins = matches!(state.stage, Stage::Queued | Stage::Mixing);
            let here = !begins && state.stage != Stage::Copying;
            if here || state.present.contains(&range) {
                drop(state);
                return self.read_pulled(&hydration, range, then);
            }
            let joins = self.join_ahead(node, info, (&hydration, state), &range, then);
            let Some((mut state, then)) = joins else {
                return;
            };
            let path = hydration.path.to_path();
            let wait = self.progress.waits.begin(path.clone());
            let then = self.limit(path, then);
            let job = state.wait_for_range(range, info.size, then, wait);
            (job, room && state.ask(Priority::Background))
        };
        if let Some((id, wanted)) = job {
            self.demand_range(&hydration, id, wanted);
        }
        if whole {
            let (mirror, hydration) = (Arc::clone(self), Arc::clone(&hydration));
            let go = move || mirror.start(&hydration, Priority::Background);
            self.engine.pool().run(Priority::Demand, Box::new(go));
        }
    }

    pub(super) fn read_here(
        &self,
        file: &FileRef,
        path: &RelPath,
        range: Range<u64>,
    ) -> Result<Vec<u8>> {
        let opened =
            file.anchor
                .open(self.dst.as_fd(), OFlags::RDONLY)
                .on("open", Side::Dst, path)?;
        fault::point("read-here");
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let n =
            fd::pread_all(opened.as_fd(), &mut bytes, range.start).on("read", Side::Dst, path)?;
        bytes.truncate(n);
        Ok(bytes)
    }

    /// Asks for a range for somebody who waits: here if src's directory is open already, else on a
    /// pool thread.
    pub(super) fn demand_range(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        range: Range<u64>,
    ) {
        self.ask_range(hydration, id, range, Priority::Demand);
    }

    /// As `demand_range`, in any lane.
    pub(super) fn ask_range(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        range: Range<u64>,
        priority: Priority,
    ) {
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let at_hand = hydration.state.lock().src.is_some();
        let go = move || mirror.submit_range(&hydration, id, range, priority);
        match at_hand {
            true => go(),
            false => self.engine.pool().run(Priority::Demand, Box::new(go)),
        }
    }

    /// Opens both sides and submits a range job. May wait for src.
    pub(super) fn submit_range(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        range: Range<u64>,
        priority: Priority,
    ) {
        let prepared = self.drop_pulled(hydration);
        let result = prepared.and_then(|()| self.prepare(hydration));
        let result = result.and_then(|prepared| {
            let Some((dst, src, name)) = prepared else {
                self.already_done(hydration);
                return Ok(());
            };
            let queued = hydration.state.lock().job_queued(id);
            let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
            self.engine.submit(CopyJob {
                src_dir: Arc::clone(&src.fd),
                src_name: name,
                dst,
                span: Span::Range(range),
                priority,
                durability: Durability::Later,
                path: hydration.path.clone(),
                done: Box::new(Part {
                    mirror,
                    hydration,
                    id,
                    queued,
                    priority,
                    won: false,
                }),
            })
        });
        if let Err(e) = result {
            self.range_done(hydration, id, Err(e));
        }
    }

    pub(super) fn range_done(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        result: Result<()>,
    ) {
        // Who waits for it asks again, for himself: nobody is told of what nobody has asked for.
        let unasked = match &result {
            Ok(()) | Err(Error::Stopped) => false,
            Err(_) => hydration.state.lock().failed_ahead(id),
        };
        if let Err(e) = &result
            && !unasked
            && self.range_later(hydration, id, e)
        {
            return;
        }
        if let Err(e) = &result
            && !unasked
            && !matches!(e, Error::Stopped)
        {
            match e.is_bad_read() {
                // The readers look closer, and tell which bytes.
                true => self.spoil(hydration.file.ino),
                false => self.fail(&hydration.path, e),
            }
        }
        let (job, waiting, whole) = {
            let mut state = hydration.state.lock();
            let at = state.ranges.iter().position(|r| r.id == id);
            let job = at.map(|at| state.ranges.swap_remove(at));
            let mixed = state.mixed.as_mut();
            let waiting = mixed.map(|m| std::mem::take(&mut m.waiting));
            (job, waiting, state.whole_if_last())
        };
        let is_mixed = waiting.is_some();
        if let (true, false, Some(job), Err(e)) = (is_mixed, unasked, &job, &result) {
            self.fill_failed(hydration, job, e);
        }
        let (left, after) = job.map(|job| (job.readers, job.after)).unwrap_or_default();
        // src may have shrunk meanwhile: dst's placeholder has zeros there.
        let here: Vec<bool> = {
            let state = hydration.state.lock();
            let is_here = |r: &RangeReader| match state.mixed {
                Some(_) => state.first_missing(&r.range).is_none(),
                None => is_mixed || state.present.contains(&r.range),
            };
            left.iter().map(is_here).collect()
        };
        let told = if unasked { Ok(()) } else { result.clone() };
        after.into_iter().for_each(|w| w(told.clone()));
        let waiting = waiting.unwrap_or_default();
        waiting.into_iter().for_each(|w| w(Ok(())));
        let idle = {
            let state = hydration.state.lock();
            state.stage == Stage::Queued && state.asked.is_none() && state.ranges.is_empty()
        };
        for (reader, here) in left.into_iter().zip(here) {
            match &result {
                Ok(()) if !here => (reader.then)(Err(Error::SrcChanged {
                    path: hydration.path.to_path(),
                })),
                Ok(()) => self.read_pulled(hydration, reader.range, reader.then),
                // Not even begun, where dst is read-only: src has the bytes all the same, unless some
                // are a user's.
                Err(e) if e.is_bad_read() || e.is_dst_full() && !is_mixed => {
                    self.salvage_later(hydration, reader);
                }
                Err(e) => (reader.then)(Err(e.clone())),
            }
        }
        if let Some(copied) = whole {
            self.land(hydration, copied);
        } else if idle {
            self.end(hydration, Err(Error::Stopped));
        } else if is_mixed {
            self.fill_on(hydration);
        }
    }
}

impl Mirror {
    fn salvage_later(self: &Arc<Self>, hydration: &Arc<Hydration>, reader: RangeReader) {
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            let file = &hydration.file;
            let origin = file.origin.as_ref();
            let origin = origin.ok_or_else(|| super::populate::no_origin(&hydration.path));
            let bytes = origin.and_then(|o| mirror.salvaged(file.ino, o, reader.range));
            (reader.then)(bytes);
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }
}

impl State {
    /// Adds a reader to a range job that covers its range; a new job's id and range come back.
    fn wait_for_range(
        &mut self,
        range: Range<u64>,
        size: u64,
        then: ReadDone,
        wait: Wait,
    ) -> Option<(u64, Range<u64>)> {
        let reader = RangeReader {
            range: range.clone(),
            then,
            wait,
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
        let id = self.new_job(start..end, None);
        if let Some(job) = self.ranges.last_mut() {
            job.bytes = vec![0; (end - start) as usize];
            job.readers.push(reader);
        }
        Some((id, start..end))
    }

    /// A job for these bytes.
    pub(super) fn new_job(&mut self, range: Range<u64>, fill: Option<Priority>) -> u64 {
        let id = self.next_range;
        self.next_range += 1;
        self.moved = Instant::now();
        self.ranges.push(RangeJob {
            id,
            range,
            bytes: Vec::new(),
            got: RangeSet::new(),
            attempts: 0,
            readers: Vec::new(),
            after: Vec::new(),
            ahead: false,
            promoted: false,
            fill,
            close: false,
            begun: false,
            since: Instant::now(),
            heard: false,
            void: false,
        });
        id
    }

    /// True for a job that is ahead of who reads: no more is.
    fn failed_ahead(&mut self, id: u64) -> bool {
        let job = self.ranges.iter().find(|r| r.id == id);
        let Some(range) = job.filter(|job| job.ahead).map(|job| job.range.clone()) else {
            return false;
        };
        self.readahead.failed(&range);
        true
    }

    /// Tells `then` when a job has ended.
    pub(super) fn after(&mut self, id: u64, then: Waiter) {
        if let Some(job) = self.ranges.iter_mut().find(|r| r.id == id) {
            job.after.push(then);
        }
    }
}

/// A range job's report.
struct Part {
    mirror: Arc<Mirror>,
    hydration: Arc<Hydration>,
    id: u64,
    /// Of a mixed file's background, and in the engine's queue.
    queued: bool,
    priority: Priority,
    /// It has begun.
    won: bool,
}

impl Part {
    fn taken(&mut self) {
        if std::mem::take(&mut self.queued) {
            self.hydration.state.lock().job_taken();
        }
    }
}

impl Completion for Part {
    /// The whole-file job may have been faster: then the readers are answered from dst, and nothing
    /// is written a second time (which would undo a clone's sharing).
    fn begin(&mut self) -> bool {
        self.taken();
        let here = {
            let mut state = self.hydration.state.lock();
            let at = state.ranges.iter().position(|r| r.id == self.id);
            if at.is_some_and(|at| state.ranges[at].begun) {
                return false; // It was ahead, and in both lanes.
            }
            at.map(|at| {
                let now = Instant::now();
                (state.ranges[at].begun, state.ranges[at].since) = (true, now);
                state.moved = now;
                state.present.contains(&state.ranges[at].range)
            })
        };
        self.won = true;
        let Some(here) = here else {
            // A user's change has taken its place.
            self.mirror.fill_on(&self.hydration);
            return false;
        };
        if here {
            self.mirror.range_done(&self.hydration, self.id, Ok(()));
        }
        !here
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) {
        let ready = {
            let mut state = self.hydration.state.lock();
            let state = &mut *state;
            let served = state.is_served();
            let Some(job) = state.ranges.iter_mut().find(|r| r.id == self.id) else {
                return;
            };
            if !std::mem::replace(&mut job.heard, true) {
                state.readahead.note(job.since.elapsed());
            }
            job.take_bytes(offset, bytes, served)
        };
        for (reader, bytes) in ready {
            drop(reader.wait);
            self.mirror.progress.demand_bytes.add(bytes.len() as u64);
            (reader.then)(Ok(bytes));
        }
    }

    fn again(&mut self) {
        let mut state = self.hydration.state.lock();
        let state = &mut *state;
        if let Some(job) = state.ranges.iter_mut().find(|r| r.id == self.id) {
            job.got = RangeSet::new();
            state.present.remove(&job.range);
            state.sure = RangeSet::new();
        }
    }

    fn wanted(&self) -> bool {
        let state = self.hydration.state.lock();
        let job = state.ranges.iter().find(|r| r.id == self.id);
        job.is_some_and(RangeJob::is_waited_for)
            || state.is_waited_for()
            || state.mixed.as_ref().is_some_and(|m| !m.waiting.is_empty())
    }

    fn landed(&mut self, range: Range<u64>) {
        let after = {
            let mut state = self.hydration.state.lock();
            let state = &mut *state;
            state.moved = Instant::now();
            // M6: of a mixed file it counts when it is known to be of the same src.
            if state.mixed.is_some() {
                return;
            }
            let job = state.ranges.iter_mut().find(|r| r.id == self.id);
            let Some(job) = job.filter(|job| !job.void) else {
                return;
            };
            state.present.insert(range);
            match job.ahead {
                true => std::mem::take(&mut job.after),
                false => return,
            }
        };
        // They look whether it was theirs.
        after.into_iter().for_each(|w| w(Ok(())));
    }

    fn done(mut self: Box<Self>, outcome: Result<Copied>) {
        self.taken();
        let promoted = |job: &RangeJob| job.id == self.id && job.promoted;
        if !self.won && self.priority == Priority::Ahead {
            let state = self.hydration.state.lock();
            if state.ranges.iter().any(promoted) {
                return; // It is demand by now, and still served.
            }
        }
        let src = outcome.as_ref().ok().map(|copied| copied.src);
        self.hydration.state.lock().looked_again(self.id, src);
        let outcome =
            outcome.and_then(|copied| self.mirror.count_range(&self.hydration, self.id, &copied));
        self.mirror.range_done(&self.hydration, self.id, outcome);
    }
}

impl RangeJob {
    /// Stores bytes that were read from src; gives back the readers that have all of theirs now. `served`: the
    /// kernel asked a server for them, and zeros may be its own, in the place of what is there no more: who
    /// would get such waits for the look after the copy.
    fn take_bytes(
        &mut self,
        offset: u64,
        bytes: &[u8],
        served: bool,
    ) -> Vec<(RangeReader, Vec<u8>)> {
        let Some(at) = offset.checked_sub(self.range.start) else {
            return Vec::new();
        };
        let at = at as usize;
        let Some(room) = self.bytes.get_mut(at..at + bytes.len()) else {
            return Vec::new();
        };
        room.copy_from_slice(bytes);
        self.got.insert(offset..offset + bytes.len() as u64);
        let part = |r: &Range<u64>| {
            let start = (r.start - self.range.start) as usize;
            &self.bytes[start..start + (r.end - r.start) as usize]
        };
        let is_ready = |r: &RangeReader| {
            self.got.contains(&r.range) && !(served && may_be_cut(r.range.start, part(&r.range)))
        };
        let (ready, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.readers)
            .into_iter()
            .partition(is_ready);
        self.readers = wait;
        let with_bytes = |r: RangeReader| {
            let bytes = part(&r.range).to_vec();
            (r, bytes)
        };
        ready.into_iter().map(with_bytes).collect()
    }
}
