//! Pace: the thread that wakes the workers when the gate opens that they sleep behind.

use parking_lot::{Condvar, Mutex};

use super::Shared;

/// Who sleeps behind the gate.
#[derive(Default)]
pub(super) struct Pace {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    wanted: bool,
    stopped: bool,
}

impl Pace {
    /// A worker goes to sleep while the gate is closed; its bell says so already.
    pub(super) fn wanted(&self) {
        self.state.lock().wanted = true;
        self.changed.notify_one();
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_one();
    }

    fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Waits until somebody sleeps behind the gate. False: the engine stops.
    fn next(&self) -> bool {
        let mut state = self.state.lock();
        while !state.wanted && !state.stopped {
            self.changed.wait(&mut state);
        }
        state.wanted = false;
        !state.stopped
    }
}

impl Shared {
    /// The pace thread: rings every bell when the gate has opened.
    pub(super) fn keep_pace(&self) {
        while self.pace.next() && self.throttle.wait_open(|| self.pace.is_stopped()) {
            self.ring_all();
        }
    }
}
