//! Gate: lets work through, or holds it back, and knows when nobody is inside.
//!
//!   open   -> closed   close()   what is inside ends; what comes waits (`enter`) or is put aside (`pass`)
//!   closed -> open     open()    who waits goes on, what was put aside is done
//!
//! A daemon that hands over to another program closes its gates: what is done before that is done whole,
//! and what is not done has not begun. Lock order: `aside` is a leaf.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What a gate is in front of. A thread may be inside both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// What users ask for, until they are answered.
    Requests,
    /// Changes of what is remembered of marks.
    Marks,
}

thread_local! {
    /// How often this thread is inside each of them.
    static DEPTH: [Cell<u32>; 2] = const { [Cell::new(0), Cell::new(0)] };
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
        DEPTH.with(|depth| {
            let cell = &depth[self.place as usize];
            cell.set(change(cell.get()));
            cell.get()
        })
    }

    fn leave(&self) {
        // SeqCst here and in `close`: whoever closes sees us, or we see that it is closed.
        if self.inside.fetch_sub(1, SeqCst) == 1 && self.closed.load(SeqCst) {
            drop(self.aside.lock());
            self.changed.notify_all();
        }
    }

    fn try_enter(&self) -> Option<Inside<'_>> {
        if self.depth(|d| d) == 0 {
            self.inside.fetch_add(1, SeqCst);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn who_closes_waits_for_who_is_inside_and_holds_who_comes() {
        let gate = Gate::new(Place::Requests);
        let inside = gate.enter();
        let again = gate.enter();
        assert!(!gate.close(Duration::from_millis(5)), "we are inside");
        drop(again);
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(Duration::from_secs(10)));
            while !gate.closed.load(SeqCst) {
                std::thread::yield_now();
            }
            assert!(!closing.is_finished());
            drop(gate.enter()); // Inside already: it does not wait.
            drop(inside);
            assert!(closing.join().expect("no panic"));
            let late = scope.spawn(|| drop(gate.enter()));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!late.is_finished());
            gate.open();
            late.join().expect("no panic");
        });
    }

    #[test]
    fn what_passes_a_closed_gate_is_done_when_it_opens_once() {
        let gate = Gate::new(Place::Marks);
        let count = Arc::new(AtomicUsize::new(0));
        let add = || {
            let count = Arc::clone(&count);
            move || {
                count.fetch_add(1, SeqCst);
            }
        };
        gate.pass(add());
        assert!(gate.close(Duration::ZERO));
        gate.pass(add());
        assert_eq!(count.load(SeqCst), 1);
        gate.open();
        gate.pass(add());
        assert_eq!(count.load(SeqCst), 3);
    }

    #[test]
    fn nobody_is_inside_while_it_is_closed_however_many_come() {
        let (gate, busy) = (Gate::new(Place::Requests), AtomicUsize::new(0));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !done.load(SeqCst) {
                        let _inside = gate.enter();
                        busy.fetch_add(1, SeqCst);
                        std::hint::spin_loop();
                        busy.fetch_sub(1, SeqCst);
                    }
                });
            }
            for _ in 0..500 {
                assert!(gate.close(Duration::from_secs(10)));
                assert_eq!(busy.load(SeqCst), 0);
                gate.open();
            }
            done.store(true, SeqCst);
        });
    }
}
