//! Worker: one thread that takes jobs, advances their plans, and feeds and reaps its ring.
//!
//! One turn: take jobs (demand first), issue the reads that wait for a buffer (demand first), give
//! the ring its entries, advance the plans whose operations came back. A large file comes by once
//! per chunk, so demand overtakes it within a turn. With nothing to do the worker sleeps on its
//! ring, where an eventfd read wakes it. What an action means in calls is in `perform`.
//!
//! A slot belongs to one file from take to the end of src's close; a call on src that hangs keeps
//! its slot and nothing else. The limits (I9): slots, buffers, the ring's entries.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::away::Brought;
use super::bell::{Bell, Room};
use super::buffers::{Buffer, BufferPool, SMALL_BYTES};
use super::copy::{Action, CopyPlan, Event, Limits, Piece};
use super::job::{Completion, CopyJob, Priority};
use super::latency::Latencies;
use super::passing::Passing;
use super::pool::{Pool, panic_text};
use super::ring::{Completed, Op, Opcode, Ring, RingConfig, Start};
use super::{EngineConfig, Shared};
use crate::error::Error;
use crate::sys;
use crate::sys::name::{Name, RelPath};

/// Jobs taken, and large background reads issued, in one turn.
const TAKE_PER_TURN: usize = 8;
const READS_PER_TURN: usize = 2;
/// Chunks of one file in flight.
const CHUNKS_MAX: usize = 4;
/// What one copy_file_range asks for: on a server that copies by itself a second or so.
const OFFLOAD_BYTES: u64 = 64 << 20;

pub(super) type Device = (u32, u32);

/// A file in flight.
pub(super) struct File {
    pub(super) src_dir: Arc<OwnedFd>,
    pub(super) src_name: Name,
    pub(super) dst: Arc<OwnedFd>,
    pub(super) priority: Priority,
    pub(super) path: RelPath,
    pub(super) done: Box<dyn Completion>,
    pub(super) plan: CopyPlan,
    pub(super) src: Option<Arc<OwnedFd>>,
    /// Its data does not come through the ring (away.rs), once that is known.
    pub(super) away: Option<bool>,
    /// The device of src's directory: whose latencies count.
    pub(super) source: Device,
    /// Of src, once it is known.
    pub(super) device: Device,
    pub(super) dst_device: Device,
    pub(super) size: u64,
    /// It leaves nothing in the page cache.
    pub(super) passing: Option<Passing>,
    /// The chunks' buffers that are not with the kernel.
    pub(super) buffers: Vec<Option<Buffer>>,
    /// Where the bytes of a chunk begin that are to be kept, and how many they are.
    pub(super) keeps: Vec<Option<(u64, usize)>>,
    /// What is under way on the ring, per chunk; and the one action that is about no chunk.
    pub(super) pieces: Vec<Option<Action>>,
    pub(super) control: Option<Action>,
}

/// What was learned about a pair of file systems.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pair {
    /// FICLONE: whether it worked.
    pub(super) clone: Option<bool>,
    /// copy_file_range happens on the server.
    pub(super) offload: bool,
}

/// The state of one copy thread.
pub(super) struct Worker {
    index: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Arc<Pool>,
    /// Before the buffers: dropped first, and waits for the kernel.
    pub(super) ring: Option<Ring>,
    pub(super) buffers: BufferPool,
    limits: Limits,
    pub(super) files: Vec<Option<File>>,
    free: Vec<usize>,
    background: usize,
    background_max: usize,
    /// Reads that wait for a buffer or their turn, by lane.
    pub(super) reads: [VecDeque<(usize, Piece)>; 3],
    pub(super) latencies: HashMap<Device, Latencies>,
    /// Sources that are FUSE file systems.
    pub(super) fuse: HashMap<Device, bool>,
    pub(super) pairs: HashMap<(Device, Device), Pair>,
    last_dir: Option<(Weak<OwnedFd>, Device)>,
    /// Actions to perform, kept for their capacity.
    todo: VecDeque<Action>,
    out: Vec<Action>,
    wake_armed: bool,
    /// Cancellations of the background that were carried out.
    cancels: u64,
    /// Calls to all workers that this turn has seen.
    calls: u64,
    /// Something of this turn stayed behind the throttle: the pace thread is to wake us.
    held: Cell<bool>,
    /// The most that one read or write may transfer: tests make it small.
    pub(super) io_max: usize,
}

/// Ends a job that no worker saw.
pub(super) fn finish_unstarted(job: CopyJob) {
    let CopyJob { done, path, .. } = job;
    call(&path, || done.done(Err(Error::Stopped)));
}

/// Calls a Completion; its panic is logged and kills no thread.
pub(super) fn call<T>(path: &RelPath, f: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(value) => Some(value),
        Err(panic) => {
            let panic = panic_text(panic.as_ref());
            tracing::error!(?path, panic, "a completion panicked");
            None
        }
    }
}

impl Worker {
    /// Sets up a worker on its own thread. The errno says why there is no ring.
    pub(super) fn new(
        index: usize,
        config: &EngineConfig,
        io_max: usize,
        shared: Arc<Shared>,
        pool: Arc<Pool>,
    ) -> (Worker, Option<Errno>) {
        let slots = config.files_in_flight_max.clamp(4, 4096);
        let large = config.buffers_per_worker.clamp(2, 4096);
        let chunk = config
            .buffer_bytes
            .clamp(2 * SMALL_BYTES, 1 << 30)
            .next_multiple_of(4096);
        let mut buffers =
            BufferPool::new(slots, large, chunk).with_spares(config.spare_buffers.min(4096), chunk);
        // Per file one operation about no chunk and one close; per buffer one; the wake.
        let ops_max = slots * 3 + large + 1;
        let ring = config.io_uring.then(|| {
            Ring::new(&RingConfig {
                ops_max,
                // Demand would wait behind hung background work if these were fewer.
                kernel_workers_max: u32::try_from(ops_max).unwrap_or(u32::MAX),
                off: config.ring_off,
                ..RingConfig::default()
            })
        });
        let no_ring = ring.as_ref().and_then(Ring::no_kernel);
        // A ring that makes its reads within `push` would only be in the way.
        let data = [Opcode::Read, Opcode::Write];
        let mut ring = ring.filter(|ring| data.iter().all(|opcode| ring.supports(*opcode)));
        if let Some(Err(e)) = ring.as_mut().map(|ring| ring.register(&mut buffers)) {
            tracing::debug!(error = %e, "buffers not registered");
        }
        let limits = Limits {
            small_bytes: SMALL_BYTES as u64,
            chunk_bytes: chunk as u64,
            chunks_max: CHUNKS_MAX,
            offload_bytes: OFFLOAD_BYTES,
        };
        let worker = Worker {
            index,
            shared,
            pool,
            ring,
            buffers,
            limits,
            files: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            background: 0,
            background_max: slots - slots / 4,
            reads: [VecDeque::new(), VecDeque::new(), VecDeque::new()],
            latencies: HashMap::new(),
            fuse: HashMap::new(),
            pairs: HashMap::new(),
            last_dir: None,
            todo: VecDeque::new(),
            out: Vec::new(),
            wake_armed: false,
            cancels: 0,
            calls: 0,
            held: Cell::new(false),
            io_max,
        };
        (worker, no_ring)
    }

    /// Works until the engine was stopped and nothing is left.
    pub(super) fn run(mut self) {
        loop {
            self.calls = self.shared.calls.load(SeqCst);
            let mut busy = self.take_jobs();
            for (slot, event) in self.take_brought() {
                self.drive(slot, event);
                busy = true;
            }
            busy |= self.issue_reads();
            let stopping = self.shared.queue.is_closed();
            let cancels = self.shared.cancels.load(SeqCst);
            if stopping || cancels != self.cancels {
                self.cancels = cancels;
                self.cancel_background();
            }
            if !busy {
                if stopping && self.free.len() == self.files.len() {
                    return;
                }
                self.sleep(stopping);
            }
            self.reap();
        }
    }

    /// Gives a file's plan an event and performs what it answers, as far as that goes at once.
    pub(super) fn drive(&mut self, slot: usize, event: Event) {
        let mut todo = std::mem::take(&mut self.todo);
        let mut out = std::mem::take(&mut self.out);
        let mut event = Some(event);
        loop {
            if let Some(event) = event.take() {
                self.learn(slot, &event);
                if let Some(file) = self.files[slot].as_mut() {
                    file.plan.step(event, &mut out);
                    todo.extend(out.drain(..));
                }
            }
            let Some(action) = todo.pop_front() else {
                break;
            };
            event = self.perform(slot, action);
        }
        self.todo = todo;
        self.out = out;
    }

    /// A file has ended, and its src is closed.
    pub(super) fn release(&mut self, slot: usize, priority: Priority) {
        if priority != Priority::Demand {
            self.background -= 1;
        }
        self.free.push(slot);
    }

    /// How others reach this worker.
    pub(super) fn bell(&self) -> &Bell<Brought> {
        &self.shared.bells[self.index]
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Down to which lane there is room for a job.
    fn room(&self) -> Option<Priority> {
        if self.free.is_empty() {
            return None;
        }
        // With reads that wait for a buffer another file would only wait as well.
        let starved = |lane: Priority| self.reads[..=lane as usize].iter().any(|r| !r.is_empty());
        if self.background >= self.background_max || starved(Priority::Ahead) {
            return Some(Priority::Demand);
        }
        let all = !starved(Priority::Background)
            && self.index < self.shared.throttle.jobs()
            && self.is_open();
        match all {
            true => Some(Priority::Background),
            false => Some(Priority::Ahead),
        }
    }

    fn take_jobs(&mut self) -> bool {
        for taken in 0..TAKE_PER_TURN {
            let mut room = self.room();
            let background = room == Some(Priority::Background);
            let more = self.background > 0 && background && self.shared.queue.has_background();
            // A second file is better off with a worker that has none.
            if more && self.shared.anyone_idle() {
                self.shared.wake_one(Priority::Background);
                room = Some(Priority::Ahead);
            }
            let Some(job) = self.shared.queue.pop(room) else {
                return taken > 0;
            };
            self.start(job);
        }
        true
    }

    fn start(&mut self, job: CopyJob) {
        let CopyJob {
            src_dir,
            src_name,
            dst,
            span,
            priority,
            durability,
            path,
            mut done,
        } = job;
        if call(&path, || done.begin()) == Some(false) {
            return; // Somebody else does this file.
        }
        let Some(slot) = self.free.pop() else {
            // `room` said that there is one; a job is never lost all the same.
            call(&path, || done.done(Err(Error::Stopped)));
            return;
        };
        if priority != Priority::Demand {
            self.background += 1;
        }
        let source = self.device_of(&src_dir);
        let chunks = self.limits.chunks_max;
        let tells = call(&path, || done.wants_data()) == Some(true);
        self.files[slot] = Some(File {
            src_dir,
            src_name,
            dst,
            priority,
            path,
            done,
            plan: CopyPlan::new(span, durability, self.limits).telling(tells),
            src: None,
            away: None,
            source,
            device: source,
            dst_device: source,
            size: 0,
            passing: None,
            buffers: (0..chunks).map(|_| None).collect(),
            keeps: vec![None; chunks],
            pieces: (0..chunks).map(|_| None).collect(),
            control: None,
        });
        self.drive(slot, Event::Start);
    }

    /// The device of a directory; remembered, because a directory's files come in a row.
    fn device_of(&mut self, dir: &Arc<OwnedFd>) -> Device {
        if let Some((last, device)) = &self.last_dir
            && std::ptr::eq(last.as_ptr(), Arc::as_ptr(dir))
        {
            return *device;
        }
        let device = sys::fd::device_of(dir.as_fd()).unwrap_or_default(); // Then: one source.
        self.last_dir = Some((Arc::downgrade(dir), device));
        device
    }

    /// True when the background may go on; else it is remembered that something stays behind.
    fn is_open(&self) -> bool {
        let open = self.shared.throttle.is_open();
        if !open {
            self.held.set(true);
        }
        open
    }

    /// True when this file's reads need not wait until the gate opens.
    pub(super) fn is_free(&self, slot: usize) -> bool {
        let file = self.files[slot].as_ref();
        self.is_open()
            || self.shared.queue.is_closed() // The last piece of what ends now.
            || file.is_none_or(|f| f.priority != Priority::Background || f.done.wanted())
    }

    /// Nobody wants the rest of the file.
    pub(super) fn leaves(&self, slot: usize) -> bool {
        let file = self.files[slot].as_ref();
        file.is_some_and(|f| call(&f.path, || f.done.leaves()) == Some(true))
    }

    /// What is ahead of somebody who has come to it is demand.
    fn lane_of(&self, slot: usize, priority: Priority) -> Priority {
        let file = self.files[slot].as_ref();
        let wanted = priority == Priority::Ahead && file.is_some_and(|f| f.done.wanted());
        if wanted { Priority::Demand } else { priority }
    }

    /// Behind a closed gate: what somebody waits for goes first, the rest stays.
    fn first_read(&mut self, lane: usize) -> Option<(usize, Piece)> {
        if lane == Priority::Ahead as usize {
            let wanted = |at: &usize| {
                let slot = self.reads[lane][*at].0;
                self.lane_of(slot, Priority::Ahead) == Priority::Demand
            };
            if let Some(at) = (0..self.reads[lane].len()).find(wanted) {
                self.reads[lane].swap(0, at);
            }
        }
        let first = self.reads[lane].front().copied()?;
        if self.is_free(first.0) {
            return Some(first);
        }
        let at = (0..self.reads[lane].len()).find(|at| self.is_free(self.reads[lane][*at].0))?;
        self.reads[lane].swap(0, at);
        self.reads[lane].front().copied()
    }

    /// Issues reads for which there are buffers: all of demand, some of the others.
    fn issue_reads(&mut self) -> bool {
        let mut issued = 0;
        for priority in [Priority::Demand, Priority::Ahead, Priority::Background] {
            let lane = priority as usize;
            while priority == Priority::Demand || issued < READS_PER_TURN {
                let Some((slot, piece)) = self.first_read(lane) else {
                    break;
                };
                let for_whom = self.lane_of(slot, priority);
                let Some(buffer) = self.buffers.take(piece.len, for_whom) else {
                    break;
                };
                self.reads[lane].pop_front();
                issued += 1;
                if let Some(event) = self.read_into(slot, piece, buffer) {
                    self.drive(slot, event);
                }
            }
        }
        issued > 0
    }

    fn cancel_background(&mut self) {
        for slot in 0..self.files.len() {
            if self.files[slot]
                .as_ref()
                .is_some_and(|f| f.priority == Priority::Background)
            {
                self.drive(slot, Event::Cancel);
            }
        }
    }

    /// Gives the ring its entries and advances the plans whose operations came back.
    fn reap(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        if let Err(e) = ring.enter(false) {
            tracing::error!(error = %e, "io_uring_enter");
        }
        while let Some(completed) = self.ring.as_mut().and_then(Ring::pop) {
            if completed.token == WAKE {
                self.wake_armed = false;
            } else {
                self.completed(completed);
            }
        }
    }

    /// Sleeps until an operation completes or somebody rings the bell.
    fn sleep(&mut self, stopping: bool) {
        let room = self.room();
        self.bell().lie_down(Room::down_to(room));
        let called = self.shared.queue.has(room)
            || self.bell().has_results()
            || self.shared.calls.load(SeqCst) != self.calls
            || self.shared.queue.is_closed() != stopping;
        if !called {
            if self.held.take() {
                self.shared.pace.wanted();
            }
            let shared = Arc::clone(&self.shared);
            let signal = shared.bells[self.index].signal();
            let slept = match &mut self.ring {
                Some(ring) => {
                    if !self.wake_armed {
                        self.wake_armed = true;
                        ring.push(WAKE, Op::EventFd { fd: signal.fd() }, Start::Here);
                    }
                    ring.enter(true)
                }
                None => signal.wait(),
            };
            if let Err(e) = slept {
                tracing::error!(error = %e, "a copy thread cannot sleep");
            }
        }
        self.bell().get_up();
    }

    /// For `perform`: a ring operation about a file. `wait`: it may.
    pub(super) fn push(&mut self, token: u64, op: Op, wait: bool) {
        let start = if wait { Start::Elsewhere } else { Start::Here };
        if let Some(ring) = &mut self.ring {
            ring.push(token, op, start);
        }
    }

    fn completed(&mut self, completed: Completed) {
        if let Some((slot, event)) = self.event_of(completed) {
            self.drive(slot, event);
        }
    }
}

/// The token of the eventfd read.
const WAKE: u64 = u64::MAX;
