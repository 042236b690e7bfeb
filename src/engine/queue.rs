//! Queue: one bounded queue with two lanes, from which all workers pull.
//!
//! Demand overtakes whatever waits in the background, and never waits for room: its lane holds at
//! most what callers are waiting for (outstanding FUSE requests), which the kernel bounds.
//! Background waits while its lane is full: the only backpressure there is.

use std::collections::VecDeque;

use super::job::Priority;
use super::sync::{AtomicUsize, Condvar, Mutex, Ordering::Relaxed};

/// Two lanes of `T`.
pub(super) struct Queue<T> {
    lanes: Mutex<Lanes<T>>,
    /// Signalled when the background lane has room again, or the queue was closed.
    room: Condvar,
    len_max: usize,
    /// How many wait in each lane, readable without the lock.
    demand_len: AtomicUsize,
    background_len: AtomicUsize,
}

struct Lanes<T> {
    demand: VecDeque<T>,
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
                background: VecDeque::with_capacity(len_max),
                closed: false,
            }),
            room: Condvar::new(),
            len_max,
            demand_len: AtomicUsize::new(0),
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
            Priority::Background => lanes.background.push_back(item),
        }
        self.publish(&lanes);
        Ok(())
    }

    /// The next item: demand first; of the background only if `background` allows it.
    pub(super) fn pop(&self, demand: bool, background: bool) -> Option<T> {
        if !self.has(demand, background) {
            return None;
        }
        let mut lanes = self.lanes.lock();
        let mut item = None;
        if demand {
            item = lanes.demand.pop_front();
        }
        if item.is_none() && background {
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
    pub(super) fn has(&self, demand: bool, background: bool) -> bool {
        (demand && self.demand_len.load(Relaxed) > 0)
            || (background && self.background_len.load(Relaxed) > 0)
    }

    /// Takes nothing more in; returns what waited in the background. Demand is still served.
    pub(super) fn close(&self) -> Vec<T> {
        let mut lanes = self.lanes.lock();
        lanes.closed = true;
        self.room.notify_all();
        let dropped = lanes.background.drain(..).collect();
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
            demand, background, ..
        } = &mut *lanes;
        let rest = demand.drain(..).chain(background.drain(..)).collect();
        self.publish(&lanes);
        rest
    }

    /// True after `close`.
    pub(super) fn is_closed(&self) -> bool {
        self.lanes.lock().closed
    }

    fn publish(&self, lanes: &Lanes<T>) {
        self.demand_len.store(lanes.demand.len(), Relaxed);
        self.background_len.store(lanes.background.len(), Relaxed);
    }
}
