//! The engine's queue and bells in every order in which threads may run.
//!
//! The sources are the engine's own; only what they are made of (`engine/sync.rs`) is loom's here.
//! A lost wake-up is a deadlock, and loom finds that.
//!
//!     make loom

#![allow(dead_code, clippy::unwrap_used)] // What the models do not call; a test may panic.

use std::sync::Arc;

use loom::thread;

#[path = "../src/engine/bell.rs"]
mod bell;
#[path = "../src/engine/queue.rs"]
mod queue;
mod job {
    pub use mirrorfs::engine::job::Priority;
}

/// `engine/sync.rs` with loom's parts, under the names and with the signatures of parking_lot.
mod sync {
    use std::ops::{Deref, DerefMut};

    pub use loom::sync::atomic::{AtomicU8, AtomicUsize, Ordering, fence};

    pub struct Mutex<T>(loom::sync::Mutex<T>);

    /// `None` only inside `Condvar::wait`.
    pub struct Guard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> Guard<'_, T> {
            Guard(Some(self.0.lock().unwrap()))
        }
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().unwrap()
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().unwrap()
        }
    }

    pub struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub fn new() -> Condvar {
            Condvar(loom::sync::Condvar::new())
        }

        pub fn wait<T>(&self, guard: &mut Guard<'_, T>) {
            let inner = guard.0.take().unwrap();
            guard.0 = Some(self.0.wait(inner).unwrap());
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// As an eventfd: raised before somebody waits it stays so.
    pub struct Signal(Mutex<bool>, Condvar);

    impl Signal {
        pub fn new() -> Signal {
            Signal(Mutex::new(false), Condvar::new())
        }

        pub fn wait(&self) {
            let mut raised = self.0.lock();
            while !*raised {
                self.1.wait(&mut raised);
            }
            *raised = false;
        }

        pub fn raise(&self) {
            *self.0.lock() = true;
            self.1.notify_all();
        }
    }
}

use bell::{Bell, Room, wake_one};
use job::Priority::{self, Background, Demand};
use queue::Queue;
use sync::Signal;

/// What workers share: the queue, and a bell each.
struct Shared {
    queue: Queue<u32>,
    bells: Vec<Bell<u32>>,
}

impl Shared {
    fn new(len_max: usize, workers: usize) -> Arc<Shared> {
        Arc::new(Shared {
            queue: Queue::new(len_max),
            bells: (0..workers).map(|_| Bell::new(Signal::new())).collect(),
        })
    }

    fn submit(&self, job: u32, priority: Priority) {
        if self.queue.push(job, priority, true).is_ok() {
            wake_one(&self.bells, priority);
        }
    }

    fn stop(&self) -> Vec<u32> {
        let dropped = self.queue.close();
        self.bells.iter().for_each(|b| {
            b.ring();
        });
        dropped
    }

    /// As `Worker::run` and `Worker::sleep` do it: everything until the stop, or until `enough`.
    fn work(&self, index: usize, enough: usize) -> Vec<u32> {
        let bell = &self.bells[index];
        let mut done = Vec::new();
        while done.len() < enough {
            let stopping = self.queue.is_closed();
            done.extend(bell.take_results());
            if let Some(job) = self.queue.pop(true, true) {
                done.push(job);
                continue;
            }
            if stopping {
                break;
            }
            bell.lie_down(Room::All);
            let called = self.queue.has(true, true)
                || bell.has_results()
                || self.queue.is_closed() != stopping;
            if !called && done.len() < enough {
                bell.signal().wait();
            }
            bell.get_up();
        }
        done
    }
}

/// Every order with at most two switches that no thread asked for (three when everything is tested).
fn model(f: impl Fn() + Send + Sync + 'static) {
    let all = std::env::var_os("MIRRORFS_TEST_ALL").is_some();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(if all { 3 } else { 2 });
    builder.check(f);
}

#[test]
fn no_wake_up_is_lost() {
    model(|| {
        let shared = Shared::new(4, 1);
        let submitter = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                shared.submit(1, Background);
                shared.submit(2, Demand);
            }
        });
        let mut done = shared.work(0, 2); // Sleeps for ever if nobody rings.
        submitter.join().unwrap();
        done.sort_unstable();
        assert_eq!(done, [1, 2]);
    });
}

#[test]
fn what_the_pool_delivers_wakes_its_worker() {
    model(|| {
        let shared = Shared::new(4, 1);
        let pool = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.bells[0].deliver(7)
        });
        assert_eq!(shared.work(0, 1), [7]);
        pool.join().unwrap();
    });
}

#[test]
fn a_full_lane_waits_and_is_woken_when_there_is_room() {
    model(|| {
        let shared = Shared::new(1, 1);
        let submitter = thread::spawn({
            let shared = Arc::clone(&shared);
            move || (1..=3).for_each(|job| shared.submit(job, Background))
        });
        assert_eq!(shared.work(0, 3), [1, 2, 3]);
        submitter.join().unwrap();
    });
}

#[test]
fn demand_overtakes_whatever_waits_at_that_moment() {
    model(|| {
        let shared = Shared::new(4, 1);
        shared.submit(1, Background);
        shared.submit(2, Background);
        let submitter = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.submit(9, Demand)
        });
        let first = shared.queue.pop(true, true);
        submitter.join().unwrap();
        let next = shared.queue.pop(true, true);
        assert!(first == Some(9) || next == Some(9), "{first:?} {next:?}");
    });
}

#[test]
fn the_stop_wakes_everybody_and_loses_nothing() {
    model(|| {
        let shared = Shared::new(1, 1);
        let submitter = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let jobs = [1, 2]; // The second waits for room, or for the stop.
                let refused = jobs.map(|job| shared.queue.push(job, Background, true).err());
                wake_one(&shared.bells, Background);
                refused.into_iter().flatten().collect::<Vec<_>>()
            }
        });
        let worker = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.work(0, usize::MAX)
        });
        let mut all = shared.stop();
        all.extend(submitter.join().unwrap());
        all.extend(worker.join().unwrap());
        all.sort_unstable();
        assert_eq!(all, [1, 2], "each ends once");
    });
}
