//! Queue: one bounded queue with three lanes, from which all workers pull.
//!
//! Demand overtakes whatever waits in the other lanes, and never waits for room: its lane holds at
//! most what callers are waiting for (outstanding FUSE requests), which the kernel bounds. Nor does what
//! is read ahead of them, which is a window for each at most.
//! Background waits while its lane is full: the only backpressure there is.

use std::collections::VecDeque;

use super::job::Priority;
use super::sync::{AtomicUsize, Condvar, Mutex, Ordering::Relaxed};

/// Three lanes of `T`.
pub(super) struct Queue<T> {
    lanes: Mutex<Lanes<T>>,
    /// Signalled when the background lane has room again, or the queue was closed.
    room: Condvar,
    len_max: usize,
    /// How many wait in each lane, readable without the lock.
    demand_len: AtomicUsize,
    ahead_len: AtomicUsize,
    background_len: AtomicUsize,
}

struct Lanes<T> {
    demand: VecDeque<T>,
    ahead: VecDeque<T>,
    background: VecDeque<T>,
    closed: bool,
}

impl<T> Queue<T> {
    /// A queue whose background lane holds `len_max` items.
    pub(super) fn new(len_max: usize) -> Queue<T> {
        let len_max = len_max.max(1);
        Queue {
            lanes: Mutex::new(Lanes {
                demand: VecDeque::new(),
                ahead: VecDeque::new(),
                background: VecDeque::with_capacity(len_max),
                closed: false,
            }),
            room: Condvar::new(),
            len_max,
            demand_len: AtomicUsize::new(0),
            ahead_len: AtomicUsize::new(0),
            background_len: AtomicUsize::new(0),
        }
    }

    /// Appends an item to its lane; gives it back when the queue was closed. A caller that must
    /// not wait (`may_wait` false: a worker, which would wait for itself) goes over the limit.
    pub(super) fn push(&self, item: T, priority: Priority, may_wait: bool) -> Result<(), T> {
        let mut lanes = self.lanes.lock();
        if priority == Priority::Background && may_wait {
            while !lanes.closed && lanes.background.len() >= self.len_max {
                self.room.wait(&mut lanes);
            }
        }
        if lanes.closed {
            return Err(item);
        }
        match priority {
            Priority::Demand => lanes.demand.push_back(item),
            Priority::Ahead => lanes.ahead.push_back(item),
            Priority::Background => lanes.background.push_back(item),
        }
        self.publish(&lanes);
        Ok(())
    }

    /// The next item: demand first, and nothing from below the lane `down_to`.
    pub(super) fn pop(&self, down_to: Option<Priority>) -> Option<T> {
        if !self.has(down_to) {
            return None;
        }
        let mut lanes = self.lanes.lock();
        let mut item = lanes.demand.pop_front();
        if item.is_none() && down_to >= Some(Priority::Ahead) {
            item = lanes.ahead.pop_front();
        }
        if item.is_none() && down_to >= Some(Priority::Background) {
            item = lanes.background.pop_front();
            // Half empty: then a waiting caller can fill it in one go, not item by item.
            if lanes.background.len() <= self.len_max / 2 {
                self.room.notify_all();
            }
        }
        self.publish(&lanes);
        item
    }

    /// True when `pop` with the same arguments would probably find something.
    pub(super) fn has(&self, down_to: Option<Priority>) -> bool {
        let lens = [
            (Priority::Demand, &self.demand_len),
            (Priority::Ahead, &self.ahead_len),
            (Priority::Background, &self.background_len),
        ];
        let mut lanes = lens.iter().filter(|(lane, _)| down_to >= Some(*lane));
        lanes.any(|(_, len)| len.load(Relaxed) > 0)
    }

    /// True when something waits in the background.
    pub(super) fn has_background(&self) -> bool {
        self.background_len.load(Relaxed) > 0
    }

    /// Takes nothing more in; returns what waited, but for demand, which is still served.
    pub(super) fn close(&self) -> Vec<T> {
        let mut lanes = self.lanes.lock();
        lanes.closed = true;
        self.room.notify_all();
        let Lanes {
            ahead, background, ..
        } = &mut *lanes;
        let dropped = ahead.drain(..).chain(background.drain(..)).collect();
        self.publish(&lanes);
        dropped
    }

    /// What waits in the background now.
    pub(super) fn take_background(&self) -> Vec<T> {
        let mut lanes = self.lanes.lock();
        let taken = lanes.background.drain(..).collect();
        self.room.notify_all();
        self.publish(&lanes);
        taken
    }

    /// Everything that is left, after the last worker has gone.
    pub(super) fn drain(&self) -> Vec<T> {
        let mut lanes = self.lanes.lock();
        let Lanes {
            demand,
            ahead,
            background,
            ..
        } = &mut *lanes;
        let rest = demand.drain(..).chain(ahead.drain(..));
        let rest = rest.chain(background.drain(..)).collect();
        self.publish(&lanes);
        rest
    }

    /// True after `close`.
    pub(super) fn is_closed(&self) -> bool {
        self.lanes.lock().closed
    }

    fn publish(&self, lanes: &Lanes<T>) {
        self.demand_len.store(lanes.demand.len(), Relaxed);
        self.ahead_len.store(lanes.ahead.len(), Relaxed);
        self.background_len.store(lanes.background.len(), Relaxed);
    }
}
