//! Gate: lets work through, or holds it back, and knows when nobody is inside.
//!
//!   open   -> closed   close()   what is inside ends; what comes waits (`enter`) or is put aside (`pass`)
//!   closed -> open     open()    who waits goes on, what was put aside is done
//!
//! A daemon that hands over to another program closes its gates: what is done before that is done whole,
//! and what is not done has not begun. Lock order: `aside` is a leaf.

use std::cell::Cell;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crate::locks::{self, AtomicBool, AtomicUsize, Condvar, Mutex, Ordering::SeqCst};

/// What a gate is in front of. A thread may be inside both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// What users ask for, until they are answered.
    Requests,
    /// Changes of what is remembered of marks.
    Marks,
}

// loom's macro takes no `const`.
#[allow(clippy::missing_const_for_thread_local)]
mod inside {
    use super::{Cell, locks};

    locks::thread_local! {
        /// How often this thread is inside each of them.
        pub(super) static DEPTH: [Cell<u32>; 2] = [Cell::new(0), Cell::new(0)];
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// One gate.
pub struct Gate {
    place: Place,
    closed: AtomicBool,
    inside: AtomicUsize,
    aside: Mutex<Vec<Work>>,
    changed: Condvar,
}

/// A thread inside; it may enter again.
pub struct Inside<'a> {
    gate: &'a Gate,
    /// The depth is the thread's own.
    stays: PhantomData<*const ()>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.gate.depth(|d| d.wrapping_sub(1)) == 0 {
            self.gate.leave();
        }
    }
}

impl Gate {
    /// An open gate.
    pub fn new(place: Place) -> Gate {
        Gate {
            place,
            closed: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            aside: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Changes how often this thread is inside.
    fn depth(&self, change: impl FnOnce(u32) -> u32) -> u32 {
        inside::DEPTH.with(|depth| {
            let cell = &depth[self.place as usize];
            cell.set(change(cell.get()));
            cell.get()
        })
    }

    fn leave(&self) {
        // SeqCst here and in `close`: whoever closes sees us, or we see that it is closed.
        let last = self.inside.fetch_sub(1, SeqCst) == 1;
        locks::in_order();
        if last && self.closed.load(SeqCst) {
            drop(self.aside.lock());
            self.changed.notify_all();
        }
    }

    fn try_enter(&self) -> Option<Inside<'_>> {
        if self.depth(|d| d) == 0 {
            self.inside.fetch_add(1, SeqCst);
            locks::in_order();
            if self.closed.load(SeqCst) {
                self.leave();
                return None;
            }
        }
        self.depth(|d| d + 1);
        Some(Inside {
            gate: self,
            stays: PhantomData,
        })
    }

    /// Goes in, and waits while the gate is closed. Who is inside already never waits.
    pub fn enter(&self) -> Inside<'_> {
        loop {
            if let Some(inside) = self.try_enter() {
                return inside;
            }
            let mut aside = self.aside.lock();
            while self.closed.load(SeqCst) {
                self.changed.wait(&mut aside);
            }
        }
    }

    /// Does the work inside, now; while the gate is closed it is put aside. Never waits.
    pub fn pass(&self, work: impl FnOnce() + Send + 'static) {
        loop {
            if let Some(_inside) = self.try_enter() {
                return work();
            }
            let mut aside = self.aside.lock();
            if self.closed.load(SeqCst) {
                return aside.push(Box::new(work));
            }
        }
    }

    /// Lets nobody in any more and waits until nobody is inside. False: somebody still was when the
    /// patience was over; the gate is open again.
    pub fn close(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        self.closed.store(true, SeqCst);
        locks::in_order();
        let mut aside = self.aside.lock();
        while self.inside.load(SeqCst) > 0 {
            if self.changed.wait_until(&mut aside, end).timed_out() {
                drop(aside);
                self.open();
                return false;
            }
        }
        true
    }

    /// Lets everybody in again; what was put aside is done on this thread.
    pub fn open(&self) {
        let mut aside = self.aside.lock();
        self.closed.store(false, SeqCst);
        let work = std::mem::take(&mut *aside);
        drop(aside);
        self.changed.notify_all();
        for one in work {
            self.pass(one);
        }
    }
}
