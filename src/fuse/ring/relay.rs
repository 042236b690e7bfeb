//! Relay: the queues go on under another program, in the same process.
//!
//!   served -> paused    `pause`: no queue's thread takes up a request
//!   paused -> held      `state`: nobody answers any more, and the kernel has no slot left
//!   held   -> (gone)    execve
//!   (new)  -> served    `resume`, `go`: what was taken and not answered is taken up again
//!   paused, held -> served   `unpause`: nothing came of it
//!
//! A slot of the kernel's can get a request at any moment, and when the io_uring that it was given
//! through goes away that request fails (fs/fuse/dev_uring.c, IO_URING_F_TASK_DEAD). So we ask for
//! requests of our own (FUSE_NOTIFY_RETRIEVE) until they have taken them all: what users ask for then
//! waits in the kernel. The next program commits those through an io_uring of its own: the kernel finds
//! a slot by its request, and the slot's memory at the address that it has been registered with.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Backlog, Begin, Queues, Station, Worker, start};
use crate::error::{Error, Result};
use crate::fuse::abi::{OUT_HEADER, opcode};
use crate::fuse::dev::{self, out_header};
use crate::fuse::request::Header;
use crate::fuse::shared::Shared;
use crate::sys::fusering::{Event, Layout, Slot};
use crate::sys::host;

/// How long the kernel may take to give its slots back: it does so at once.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// What the next program has to be told of the queues.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::fuse) struct State {
    queues: Vec<Left>,
    /// The number that our next request of our own would have.
    next: u64,
}

/// What is left of one queue.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Left {
    pub(super) layout: Layout,
    /// The slots' memory.
    file: RawFd,
    /// Slots with requests of our own.
    ours: Vec<u32>,
    /// Slots with requests that are not answered.
    users: Vec<u32>,
}

impl State {
    /// True when this program has room for all slots.
    pub(in crate::fuse) fn fits(&self) -> bool {
        self.queues.iter().all(|left| left.layout.is_free())
    }
}

/// What a queue's thread hears when it is to pause.
pub(super) struct Pause {
    paused: SyncSender<()>,
    /// To hold; without a sender to go on.
    hold: Receiver<SyncSender<io::Result<Numbers>>>,
}

/// The taken slots: those with requests of our own, and the others.
type Numbers = (Vec<u32>, Vec<u32>);

/// Whom to tell to hold, and what each says of its slots.
type Paused = (Arc<Station>, SyncSender<SyncSender<io::Result<Numbers>>>);

/// The queues of a session, as seen by who hands over.
#[derive(Default)]
pub(in crate::fuse) struct Relay {
    stations: Mutex<Vec<Arc<Station>>>,
    paused: Mutex<Vec<Paused>>,
}

impl Relay {
    pub(in crate::fuse) fn know(&self, queues: &Queues) {
        self.stations.lock().clone_from(&queues.stations);
    }

    /// Why another program could not go on with the queues.
    pub(in crate::fuse) fn cannot_hand_over(&self, shared: &Shared) -> Option<&'static str> {
        let stations = self.stations.lock();
        let movable = |s: &Arc<Station>| s.layout.lock().is_some();
        if !stations.iter().all(movable) {
            return Some("the memory of io_uring is where another program may have its own");
        }
        match shared.ask_for_a_request() {
            Ok(()) => None,
            Err(_) => Some("through io_uring only once a file was looked at: try again then"),
        }
    }

    pub(in crate::fuse) fn has_queues(&self) -> bool {
        !self.stations.lock().is_empty()
    }

    /// Keeps the queues' threads from taking up requests; false when one of them still works on one
    /// after `patience`. Until `unpause`.
    pub(in crate::fuse) fn pause(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let stations = self.stations.lock().clone();
        let (paused, pauses) = sync_channel(stations.len());
        let mut all = self.paused.lock();
        for station in stations {
            let (order, hold) = sync_channel(1);
            let paused = paused.clone();
            let mut answered = station.answered.lock();
            if !answered.over {
                answered.pause = Some(Pause { paused, hold });
                drop(answered);
                station.bell.ring();
                all.push((station, order));
            }
        }
        drop(paused);
        let left = || end.saturating_duration_since(Instant::now());
        all.iter().all(|_| pauses.recv_timeout(left()).is_ok())
    }

    /// The threads go on.
    pub(in crate::fuse) fn unpause(&self) {
        // Without a sender each of them goes on.
        self.paused.lock().clear();
    }

    /// What the next program has to know; `None` without queues. From here on nobody answers, if
    /// `hold`; then the queues are paused.
    pub(in crate::fuse) fn state(
        &self,
        hold: bool,
        keep: &mut dyn FnMut(BorrowedFd<'_>) -> Result<RawFd>,
    ) -> Result<Option<State>> {
        let fail = |e: io::Error| Error::Unusable(format!("io_uring: {e}"));
        let gone = || fail(io::ErrorKind::BrokenPipe.into());
        let stations = self.stations.lock().clone();
        if stations.is_empty() {
            return Ok(None);
        }
        let mut numbers = Vec::new();
        if hold {
            let paused = self.paused.lock();
            let told = paused.iter().map(|(_, order)| {
                let (told, hears) = sync_channel(1);
                order.send(told).map_err(|_| gone())?;
                Ok(hears)
            });
            // All at once: they hold one by one as their CPU lets them.
            let told = told.collect::<Result<Vec<_>>>()?;
            for ((station, _), hears) in paused.iter().zip(told) {
                let slots = hears.recv().map_err(|_| gone())?.map_err(fail)?;
                numbers.push((Arc::clone(station), slots));
            }
        } else {
            numbers.extend(stations.into_iter().map(|s| (s, Numbers::default())));
        }
        let queues = numbers.into_iter().map(|(station, (ours, users))| {
            let layout = *station.layout.lock();
            Ok(Left {
                layout: layout.ok_or_else(gone)?,
                file: keep(station.file.as_fd())?,
                ours,
                users,
            })
        });
        Ok(Some(State {
            queues: queues.collect::<Result<_>>()?,
            next: dev::next_of_our_own(),
        }))
    }
}

/// The queues of the program before us, which nobody serves before they `go`; `aside`: so many threads
/// for what waits.
pub(in crate::fuse) fn resume(
    dev: &Arc<OwnedFd>,
    shared: &Arc<Shared>,
    aside: usize,
    state: &State,
    adopt: &mut dyn FnMut(RawFd) -> Result<OwnedFd>,
) -> Result<Queues> {
    dev::begin_at(state.next);
    let begin = state.queues.iter().map(|left| {
        let file = adopt(left.file)?;
        Ok(Begin::Again(left.clone(), file))
    });
    let begin = begin.collect::<Result<Vec<_>>>()?;
    let fail = |e| Error::Unusable(format!("io_uring: {e}"));
    start(dev, shared, aside, begin).map_err(fail)
}

impl Worker<'_> {
    /// Takes up nothing until it is told to go on, or another program has this thread's place.
    pub(super) fn pause(&mut self, pause: Pause, events: &mut VecDeque<Event>) -> io::Result<()> {
        // Who has not waited for it drops `hold`, too.
        let _ = pause.paused.send(()); // See above.
        let Ok(told) = pause.hold.recv() else {
            return Ok(());
        };
        let station = Arc::clone(&self.station);
        let alone = station.answering.write();
        let mut ours = Vec::new();
        let numbers = self.hold(events, &mut ours).map(|()| {
            let ours: Vec<u32> = ours.iter().map(Slot::number).collect();
            let users = self.queue.all_taken().filter(|n| !ours.contains(n));
            let users = users.collect();
            (ours, users)
        });
        // It waits for this, and for nothing else.
        let _ = told.send(numbers); // See above.
        let _ = pause.hold.recv(); // Only its end is to be waited for.
        drop(alone);
        ours.into_iter().try_for_each(|slot| self.release(slot))
    }

    /// Sends the answers that are there, and takes all slots from the kernel.
    fn hold(&mut self, events: &mut VecDeque<Event>, ours: &mut Vec<Slot>) -> io::Result<()> {
        let answered = std::mem::take(&mut self.station.answered.lock().slots);
        for slot in answered {
            self.queue.commit(slot)?;
        }
        self.queue.poll(events)?;
        take_ours(events, ours);
        // Requests are made for the queue of the CPU that we run on. Nobody asks on one that is
        // offline: the next program registers slots anew.
        if !host::runs_on_cpu(usize::from(self.queue.qid())) {
            return Ok(());
        }
        let end = Instant::now() + HOLD_MAX;
        while self.queue.with_kernel() > 0 {
            self.fs.shared.ask_for_a_request()?;
            self.queue.poll(events)?;
            take_ours(events, ours);
            if let Some(Event::Gone(errno)) = events.back() {
                return Err((*errno).into());
            }
            if Instant::now() > end {
                return Err(Errno::TIMEDOUT.into());
            }
        }
        Ok(())
    }

    /// What the program before us has left.
    pub(super) fn take_up(&mut self, left: &Left, events: &mut VecDeque<Event>) -> io::Result<()> {
        let taken = |n: &u32| self.queue.taken(*n);
        let ours: Vec<Slot> = left.ours.iter().filter_map(taken).collect();
        let mut users: Vec<Slot> = left.users.iter().filter_map(taken).collect();
        // As they came.
        users.sort_by_key(|slot| Header::parse(slot.header()).map(|h| h.unique));
        events.extend(users.into_iter().map(Event::Request));
        ours.into_iter().try_for_each(|slot| self.release(slot))
    }

    /// Answers a request of our own: its slot is free for who waits.
    fn release(&mut self, mut slot: Slot) -> io::Result<()> {
        // The kernel may have had no slot left.
        self.backlog = Backlog::Possible;
        let unique = Header::parse(slot.header()).map_or(0, |h| h.unique);
        // A header alone always fits.
        let _ = slot.fill(&out_header(OUT_HEADER, None, unique), &[], &[]); // Cannot fail.
        self.queue.commit(slot)
    }
}

/// Takes requests of our own out of what has come.
fn take_ours(events: &mut VecDeque<Event>, ours: &mut Vec<Slot>) {
    let is_ours = |slot: &Slot| {
        let header = Header::parse(slot.header());
        header.is_some_and(|h| h.opcode == opcode::NOTIFY_REPLY)
    };
    for event in std::mem::take(events) {
        match event {
            Event::Request(slot) if is_ours(&slot) => ours.push(slot),
            // Nobody waits for it now.
            Event::Bell => {}
            other => events.push_back(other),
        }
    }
}
