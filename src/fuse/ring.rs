//! The transport over io_uring: a queue for each CPU, its thread pinned there, so that a request is
//! answered where it was made.
//!
//!   prepare()   threads and queues are there; the kernel knows nothing of them
//!   go()        after the handshake: each queue gives the kernel its first slots
//!   serve()     take requests, answer, send the answers, until the connection is over
//!
//! The kernel uses the queues as soon as all have a slot, and /dev/fuse until then; FORGET, INTERRUPT
//! and notifications go over /dev/fuse for good. If it refuses a slot it stays with /dev/fuse.
//!
//! Another program in this process goes on with all of it: `relay.rs`.
//!
//! A request that waits for src keeps its slot. So that nobody else waits for slots, a queue that runs
//! low gives the kernel more of them: address space, of which only what is used becomes memory.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

use self::relay::{Left, Pause};
use super::MirrorFs;
use super::abi::{OUT_HEADER, opcode};
use super::aside::Aside;
use super::dev::out_header;
use super::reply::Channel;
use super::request::{Header, fields_len};
use super::shared::Shared;
use crate::sys::fusering::{self, Bell, Event, Layout, Queue, Slot};
use crate::sys::{caps, fault, host};

pub(super) mod relay;

/// Largest data of one request: a slot has room for it, of which only what is used becomes memory.
pub(super) const DATA_MAX: u32 = 256 << 10;
/// Slots that a queue begins with, and gets more of at a time.
const SLOTS: usize = 64;
/// With fewer than these at the kernel's disposal a queue gets more.
const SLOTS_LOW: usize = 32;
/// Requests of one CPU that can be with us at once. One for each thread of users that waits for src
/// there; what comes then waits until one of them is answered.
pub(super) const SLOTS_MAX: usize = 4096;

/// Whether the kernel offers io_uring to a mount that is made now; switches it on when we may.
pub(super) fn switch_on() -> bool {
    match fusering::is_enabled() {
        Some(true) => true,
        Some(false) => match fusering::enable() {
            Ok(()) => true,
            Err(e) => {
                tracing::info!("fuse.enable_uring is off: {e}");
                false
            }
        },
        None => false,
    }
}

/// The queue that a slot goes back to.
struct Station {
    answered: Mutex<Answered>,
    bell: Arc<Bell>,
    /// Shared by who puts an answer into a slot; kept by who hands over.
    answering: RwLock<()>,
    /// Where the slots are; `None`: where another program may have something else.
    layout: Mutex<Option<Layout>>,
    /// What their memory is mapped from.
    file: Arc<OwnedFd>,
}

#[derive(Default)]
struct Answered {
    slots: Vec<Slot>,
    /// The queue's thread waits for the kernel: it must be woken.
    asleep: bool,
    /// The queue's thread is to take up nothing for now.
    pause: Option<Pause>,
    /// It has ended.
    over: bool,
}

impl Station {
    fn give(&self, slot: Slot) {
        let mut answered = self.answered.lock();
        answered.slots.push(slot);
        let asleep = std::mem::take(&mut answered.asleep);
        drop(answered);
        if asleep {
            self.bell.ring();
        }
    }
}

/// A request that came through a queue, and the room for its answer.
pub(super) struct Taken {
    /// `None`: it was answered.
    slot: Option<Slot>,
    station: Arc<Station>,
}

impl Taken {
    pub(super) fn fields(&self) -> &[u8] {
        self.slot.as_ref().map_or(&[], Slot::fields)
    }

    /// Bytes of names and data.
    pub(super) fn data_len(&self) -> usize {
        self.slot.as_ref().map_or(0, |s| s.payload().len())
    }

    /// Has `fs` answer it, now or later.
    pub(super) fn answer(self, fs: &MirrorFs, scratch: &mut Vec<u8>) {
        let Some(slot) = &self.slot else {
            return;
        };
        let mut fields = [0; fusering::FIELDS_LEN];
        fields.copy_from_slice(slot.fields());
        scratch.clear();
        scratch.extend_from_slice(slot.payload());
        // All requests of the kernel's have a header: the slot is longer than one.
        if let Some(header) = Header::parse(slot.header()) {
            let fields = &fields[..fields_len(header.opcode)];
            fs.dispatch(&header, fields, scratch, Channel::Ring(self));
        }
    }

    pub(super) fn send(mut self, unique: u64, result: Result<(&[u8], &[u8]), Errno>) {
        self.put(unique, result);
    }

    fn put(&mut self, unique: u64, result: Result<(&[u8], &[u8]), Errno>) {
        let Some(mut slot) = self.slot.take() else {
            return;
        };
        let _answering = self.station.answering.read();
        let parts = result.unwrap_or_default();
        let len = OUT_HEADER + parts.0.len() + parts.1.len();
        let header = out_header(len, result.err(), unique);
        if let Err(errno) = slot.fill(&header, parts.0, parts.1) {
            tracing::warn!("the answer to request {unique} does not fit: {errno}");
            let header = out_header(OUT_HEADER, Some(Errno::IO), unique);
            // A header alone always fits.
            let _ = slot.fill(&header, &[], &[]); // Cannot fail.
        }
        self.station.give(slot);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let header = self.slot.as_ref().and_then(|s| Header::parse(s.header()));
        if let Some(header) = header {
            self.put(header.unique, Err(Errno::IO));
        }
    }
}

/// The threads of all queues, until the handshake is done.
pub(super) struct Queues {
    threads: Vec<JoinHandle<Result<(), Errno>>>,
    go: Vec<SyncSender<()>>,
    stations: Vec<Arc<Station>>,
}

/// How a queue begins.
enum Begin {
    /// Empty, for this CPU.
    New(u16),
    /// With what the program before us has left, and its slots' memory.
    Again(Left, OwnedFd),
}

impl Begin {
    fn qid(&self) -> u16 {
        match self {
            Begin::New(qid) => *qid,
            Begin::Again(left, _) => left.layout.qid(),
        }
    }

    fn queue(self, dev: Arc<OwnedFd>) -> std::io::Result<(Queue, Option<Left>)> {
        Ok(match self {
            Begin::New(qid) => {
                let queue = Queue::new(dev, qid, DATA_MAX as usize, (SLOTS, SLOTS_MAX))?;
                (queue, None)
            }
            Begin::Again(left, file) => {
                let queue = Queue::again(dev, &left.layout, file)?;
                (queue, Some(left))
            }
        })
    }
}

/// Makes a thread and a queue for each CPU, and `aside` threads for what waits. An error: io_uring is
/// of no use here.
pub(super) fn prepare(
    dev: &Arc<OwnedFd>,
    shared: &Arc<Shared>,
    aside: usize,
) -> std::io::Result<Queues> {
    let count = fusering::queues().ok_or(std::io::ErrorKind::Unsupported)?;
    start(dev, shared, aside, (0..count).map(Begin::New).collect())
}

fn start(
    dev: &Arc<OwnedFd>,
    shared: &Arc<Shared>,
    aside: usize,
    begin: Vec<Begin>,
) -> std::io::Result<Queues> {
    let mut queues = Queues {
        threads: Vec::new(),
        go: Vec::new(),
        stations: Vec::new(),
    };
    let aside = Aside::start(aside, || MirrorFs::new(Arc::clone(shared)))?;
    let (ready, result) = sync_channel(begin.len());
    for begin in begin {
        let (go, start) = sync_channel(1);
        let (dev, ready, aside) = (Arc::clone(dev), ready.clone(), aside.clone());
        let fs = MirrorFs::new(Arc::clone(shared));
        let thread = std::thread::Builder::new()
            .name(format!("fuse-cpu{}", begin.qid()))
            .spawn(move || run(dev, begin, &fs, aside, &ready, &start))?;
        queues.threads.push(thread);
        queues.go.push(go);
    }
    for _ in 0..queues.threads.len() {
        // Dropped senders end the other threads.
        let station = result
            .recv()
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::Other))??;
        queues.stations.push(station);
    }
    Ok(queues)
}

impl Queues {
    /// The handshake is done: the kernel gets its slots.
    pub(super) fn go(self) -> Vec<JoinHandle<Result<(), Errno>>> {
        for go in self.go {
            // A thread that has ended told why.
            let _ = go.send(()); // Its result is looked at in the end.
        }
        self.threads
    }
}

fn run(
    dev: Arc<OwnedFd>,
    begin: Begin,
    fs: &MirrorFs,
    aside: Aside,
    ready: &SyncSender<std::io::Result<Arc<Station>>>,
    start: &Receiver<()>,
) -> Result<(), Errno> {
    // For good: see sys::caps.
    caps::drop_fsetid();
    let qid = begin.qid();
    host::pin_to_cpu(usize::from(qid));
    let (queue, left) = match begin.queue(dev) {
        Ok(made) => made,
        Err(e) => {
            // The receiver is there until everybody has told.
            let _ = ready.send(Err(e)); // It has failed already, then.
            return Ok(());
        }
    };
    let station = Arc::new(Station {
        answered: Mutex::default(),
        bell: queue.bell(),
        answering: RwLock::default(),
        layout: Mutex::new(queue.layout()),
        file: Arc::clone(queue.file()),
    });
    let _ = ready.send(Ok(Arc::clone(&station))); // As above.
    if start.recv().is_err() {
        return Ok(());
    }
    let worker = Worker {
        queue,
        station: Arc::clone(&station),
        fs,
        aside,
        scratch: Vec::new(),
        backlog: Backlog::None,
        slots_max: fault::lowered("SLOTS", SLOTS_MAX),
        over: false,
    };
    let ended = worker.serve(left.as_ref());
    let mut answered = station.answered.lock();
    answered.over = true;
    drop(answered.pause.take());
    ended.map_err(|e| {
        tracing::error!("FUSE over io_uring, CPU {qid}: {e}");
        Errno::from_io_error(&e).unwrap_or(Errno::IO)
    })
}

/// One queue at work.
struct Worker<'a> {
    queue: Queue,
    station: Arc<Station>,
    fs: &'a MirrorFs,
    aside: Aside,
    /// A request's names and data: its slot belongs to the answer.
    scratch: Vec<u8>,
    backlog: Backlog,
    /// No more slots than these.
    slots_max: usize,
    /// The connection is over: the kernel gives the slots back, one by one.
    over: bool,
}

/// Whether requests wait in the kernel for a slot. A slot that is registered takes only what comes
/// later; one that is committed takes what waits first. So when the last slot was taken and nothing
/// is there to commit, we ask the kernel for a request that we can answer at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Backlog {
    /// Nobody waits.
    None,
    /// The kernel had no slot left: somebody may wait.
    Possible,
    /// And a request of our own is under way.
    Asked,
}

impl Worker<'_> {
    fn serve(mut self, left: Option<&Left>) -> std::io::Result<()> {
        let mut events = VecDeque::new();
        match left {
            None => self.register()?,
            Some(left) => self.take_up(left, &mut events)?,
        }
        loop {
            match events.pop_front() {
                Some(Event::Request(slot)) => {
                    self.answer(slot);
                    if !events.is_empty() {
                        // Nobody's answer waits for the next request's.
                        self.send_answers(&mut events)?;
                    }
                }
                Some(Event::Bell) => {}
                Some(Event::Gone(errno)) => {
                    self.over = true;
                    if !host::is_mount_gone(errno) {
                        tracing::warn!("the kernel refuses FUSE over io_uring: {errno}");
                    }
                    if self.queue.with_kernel() == 0 {
                        return Ok(());
                    }
                }
                None => {
                    self.send_answers(&mut events)?;
                    if events.is_empty() && self.sleeps() {
                        self.queue.wait(&mut events)?;
                        self.station.answered.lock().asleep = false;
                        self.look(&events);
                    }
                }
            }
        }
    }

    fn register(&mut self) -> std::io::Result<()> {
        let registered = self.queue.register(SLOTS);
        *self.station.layout.lock() = self.queue.layout();
        registered
    }

    /// False: answers have come meanwhile. Else whoever brings one rings from now on.
    fn sleeps(&self) -> bool {
        let mut answered = self.station.answered.lock();
        answered.asleep = answered.slots.is_empty() && answered.pause.is_none();
        answered.asleep
    }

    /// Gives the answers that are there to the kernel, at once if there is more to do before we sleep.
    fn send_answers(&mut self, events: &mut VecDeque<Event>) -> std::io::Result<()> {
        let (slots, pause) = {
            let mut answered = self.station.answered.lock();
            (std::mem::take(&mut answered.slots), answered.pause.take())
        };
        let committed = slots.len();
        for slot in slots {
            self.queue.commit(slot)?;
        }
        if let Some(pause) = pause {
            self.pause(pause, events)?;
        }
        if self.over {
            return self.queue.poll(events);
        }
        if self.queue.with_kernel() < SLOTS_LOW && self.queue.registered() < self.slots_max {
            match self.register() {
                // The others may have run out meanwhile.
                Ok(()) => self.backlog = Backlog::Possible,
                // It works with what it has: nobody else would answer on this CPU.
                Err(e) => {
                    self.slots_max = self.queue.registered();
                    tracing::warn!("no more than {} slots for requests: {e}", self.slots_max);
                }
            }
        }
        if self.backlog == Backlog::Possible && committed == 0 && self.queue.with_kernel() > 0 {
            // The new slots first.
            self.queue.poll(events)?;
            self.backlog = match self.fs.shared.ask_for_a_request() {
                Ok(()) => Backlog::Asked,
                Err(errno) => {
                    tracing::warn!("requests may wait for a slot: {errno}");
                    Backlog::None
                }
            };
        }
        if events.is_empty() && self.backlog == Backlog::None {
            return Ok(());
        }
        let before = events.len();
        self.queue.poll(events)?;
        // A commit that found nobody waiting has brought nothing back.
        if committed > 0 && self.backlog != Backlog::None && events.len() == before {
            self.backlog = Backlog::None;
        }
        self.look(events);
        Ok(())
    }

    /// After something has come back.
    fn look(&mut self, events: &VecDeque<Event>) {
        if self.queue.with_kernel() == 0 && !events.is_empty() && self.backlog == Backlog::None {
            self.backlog = Backlog::Possible;
        }
    }

    fn answer(&mut self, slot: Slot) {
        let Some(header) = Header::parse(slot.header()) else {
            return;
        };
        let request = Taken {
            slot: Some(slot),
            station: Arc::clone(&self.station),
        };
        if header.opcode == opcode::NOTIFY_REPLY {
            // What we asked for: its slot is free for who waits.
            if self.backlog == Backlog::Asked {
                self.backlog = Backlog::Possible;
            }
            return request.send(header.unique, Ok((&[], &[])));
        }
        self.fs.shared.ring_works();
        self.aside
            .answer(header, request, self.fs, &mut self.scratch);
    }
}
