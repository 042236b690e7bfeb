//! The engine's queue and bells, the gates of an upgrade and the table of populates, in every order in
//! which threads may run.
//!
//! The sources are the program's own; only what they are made of (`engine/sync.rs`, `locks.rs`) is
//! loom's here. A lost wake-up is a deadlock, and loom finds that.
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
#[path = "../src/gate.rs"]
mod gate;
#[path = "../src/mirror/running.rs"]
mod running;
mod node {
    pub use mirrorfs::mirror::Ino;
}
mod populate {
    pub type Waiter = Box<dyn FnOnce(mirrorfs::error::Result<()>) + Send>;
}

/// `locks.rs` with loom's parts.
mod locks {
    pub use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    pub use loom::thread_local;

    pub use crate::sync::{Condvar, Mutex};

    pub fn in_order() {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
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

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Mutex<T> {
            Mutex::new(T::default())
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

        /// Nobody is ever out of patience here: who is not woken stays.
        pub fn wait_until<T>(&self, guard: &mut Guard<'_, T>, _: std::time::Instant) -> Woken {
            self.wait(guard);
            Woken
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    pub struct Woken;

    impl Woken {
        pub fn timed_out(&self) -> bool {
            false
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
use gate::{Gate, Place};
use job::Priority::{self, Background, Demand};
use queue::Queue;
use running::{Extent, Populates};
use sync::{AtomicUsize, Ordering, Signal};

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
            if let Some(job) = self.queue.pop(Some(Background)) {
                done.push(job);
                continue;
            }
            if stopping {
                break;
            }
            bell.lie_down(Room::All);
            let called = self.queue.has(Some(Background))
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
        let first = shared.queue.pop(Some(Background));
        submitter.join().unwrap();
        let next = shared.queue.pop(Some(Background));
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

/// How long somebody waits at a gate: for ever.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

#[test]
fn nobody_is_inside_a_closed_gate_and_everybody_gets_in_when_it_opens() {
    model(|| {
        let gate = Arc::new(Gate::new(Place::Requests));
        let inside = Arc::new(AtomicUsize::new(0));
        let users: Vec<_> = (0..2)
            .map(|_| {
                let (gate, inside) = (Arc::clone(&gate), Arc::clone(&inside));
                thread::spawn(move || {
                    let _first = gate.enter();
                    let _again = gate.enter(); // Who is inside never waits.
                    inside.fetch_add(1, Ordering::SeqCst);
                    inside.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        assert!(gate.close(PATIENCE));
        assert_eq!(inside.load(Ordering::SeqCst), 0);
        thread::yield_now();
        assert_eq!(inside.load(Ordering::SeqCst), 0);
        gate.open();
        users.into_iter().for_each(|u| u.join().unwrap());
    });
}

#[test]
fn what_passes_a_gate_is_done_once_and_never_while_it_is_closed() {
    model(|| {
        let gate = Arc::new(Gate::new(Place::Requests));
        let done = Arc::new(AtomicUsize::new(0));
        let held = Arc::new(AtomicUsize::new(0));
        let user = thread::spawn({
            let (gate, done, held) = (Arc::clone(&gate), Arc::clone(&done), Arc::clone(&held));
            move || {
                gate.pass(move || {
                    assert_eq!(held.load(Ordering::SeqCst), 0);
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert!(gate.close(PATIENCE));
        held.store(1, Ordering::SeqCst);
        held.store(0, Ordering::SeqCst);
        gate.open();
        user.join().unwrap();
        assert_eq!(done.load(Ordering::SeqCst), 1);
    });
}

/// Two who want a directory and one who populates it for nobody: as populate.rs does it.
#[test]
fn one_populate_runs_at_a_time_and_every_waiter_is_told_once() {
    model(|| {
        let all = Arc::new(Populates::default());
        let (running, told) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let run = {
            let (all, running) = (Arc::clone(&all), Arc::clone(&running));
            move |extent| {
                let alone = |all: &Populates, step: fn(&Populates, Extent) -> bool| {
                    assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two at a time");
                    running.fetch_sub(1, Ordering::SeqCst);
                    step(all, extent)
                };
                // It turns out to be large.
                if alone(&all, |all, extent| all.goes_on(7, extent)) {
                    all.takes_long(7);
                    let waiters = alone(&all, |_, _| true).then(|| all.take(7));
                    waiters.into_iter().flatten().for_each(|w| w(Ok(())));
                }
            }
        };
        let waiter = |told: &Arc<AtomicUsize>| -> populate::Waiter {
            let told = Arc::clone(told);
            Box::new(move |_| {
                told.fetch_add(1, Ordering::SeqCst);
            })
        };
        let nobody = thread::spawn({
            let (all, run) = (Arc::clone(&all), run.clone());
            move || {
                if all.begin(7) {
                    run(Extent::UnlessLarge);
                }
            }
        });
        let lister = thread::spawn({
            let (all, run, told) = (Arc::clone(&all), run.clone(), Arc::clone(&told));
            move || match all.join_to_list(7, waiter(&told)) {
                Ok(true) => {}
                Ok(false) => run(Extent::Whole),
                Err(waiter) => waiter(Ok(())),
            }
        });
        if !all.join(7, waiter(&told)) {
            run(Extent::Whole);
        }
        nobody.join().unwrap();
        lister.join().unwrap();
        assert_eq!(told.load(Ordering::SeqCst), 2);
    });
}
