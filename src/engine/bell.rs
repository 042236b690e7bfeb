//! Bell: how others reach a worker, asleep or not, without a lock on the way of a file.
//!
//!   awake -> asleep   lie_down()   then the worker looks at the queue once more, and sleeps only if
//!                                  there is nothing: who came before that look is seen by it
//!   asleep -> awake   ring()       who came after it sees the sleeper, and raises the signal
//!   asleep -> awake   get_up()     whatever woke it
//!
//! The two fences make one of the two true: both sides first say what they did, then look.

use super::job::Priority;
use super::sync::{AtomicU8, AtomicUsize, Mutex, Ordering::SeqCst, Signal, fence};

const AWAKE: u8 = 0;

/// What a worker that sleeps has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Room {
    Nothing = 1,
    Demand = 2,
    Ahead = 3,
    All = 4,
}

impl Room {
    /// Down to which lane there is room.
    pub(super) fn down_to(lane: Option<Priority>) -> Room {
        match lane {
            None => Room::Nothing,
            Some(Priority::Demand) => Room::Demand,
            Some(Priority::Ahead) => Room::Ahead,
            Some(Priority::Background) => Room::All,
        }
    }
}

/// One worker's bell, and results of calls that the pool made for it.
pub(super) struct Bell<R> {
    /// AWAKE, or asleep with a [`Room`].
    state: AtomicU8,
    signal: Signal,
    results: Mutex<Vec<R>>,
    results_len: AtomicUsize,
}

impl<R> Bell<R> {
    pub(super) fn new(signal: Signal) -> Bell<R> {
        Bell {
            state: AtomicU8::new(AWAKE),
            signal,
            results: Mutex::new(Vec::new()),
            results_len: AtomicUsize::new(0),
        }
    }

    /// What the worker waits for when it sleeps.
    pub(super) fn signal(&self) -> &Signal {
        &self.signal
    }

    /// The worker is about to sleep; it must look for work once more after this.
    pub(super) fn lie_down(&self, room: Room) {
        self.state.store(room as u8, SeqCst);
        fence(SeqCst); // The store before the second look; see `wake_one`.
    }

    /// The worker is awake again.
    pub(super) fn get_up(&self) {
        self.state.store(AWAKE, SeqCst);
    }

    /// True when the worker sleeps and has room for all.
    pub(super) fn is_idle(&self) -> bool {
        self.state.load(SeqCst) == Room::All as u8
    }

    /// Wakes the worker; true when it slept.
    pub(super) fn ring(&self) -> bool {
        fence(SeqCst); // What the caller did before this, and `lie_down`'s store.
        let mut state = self.state.load(SeqCst);
        while state != AWAKE {
            match self.state.compare_exchange(state, AWAKE, SeqCst, SeqCst) {
                Ok(_) => {
                    self.signal.raise();
                    return true;
                }
                Err(now) => state = now,
            }
        }
        false
    }

    /// A call that the pool made for this worker came back.
    pub(super) fn deliver(&self, result: R) {
        let mut results = self.results.lock();
        results.push(result);
        self.results_len.store(results.len(), SeqCst);
        drop(results);
        self.ring();
    }

    /// True when `take_results` would find something.
    pub(super) fn has_results(&self) -> bool {
        self.results_len.load(SeqCst) > 0
    }

    /// What came back.
    pub(super) fn take_results(&self) -> Vec<R> {
        if !self.has_results() {
            return Vec::new();
        }
        let mut results = self.results.lock();
        self.results_len.store(0, SeqCst);
        std::mem::take(&mut *results)
    }
}

/// Wakes one sleeping worker that has room for a job of this priority, if there is one. Who is
/// awake looks at the queue before it sleeps.
pub(super) fn wake_one<R>(bells: &[Bell<R>], priority: Priority) -> bool {
    fence(SeqCst); // The push before this, and `lie_down`'s store before its second look.
    let needed = Room::down_to(Some(priority));
    bells
        .iter()
        .any(|b| b.state.load(SeqCst) >= needed as u8 && b.ring())
}
