//! Pool: threads for calls that may wait on src and have no ring opcode.
//!
//! getdents64, listxattr, readlink, SEEK_DATA, copy_file_range, a whole populate. Two lanes:
//! demand first, and the background never takes the last half of the threads, so that demand
//! finds a thread even when every background task hangs on a dead server. A thread whose task does not
//! come back is replaced while demand waits (`relieve`), up to `SUBSTITUTES`; when it does come back
//! there is one too many, which ends.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::job::Priority;
use crate::error::{Context, Errno, Result, Side};
use crate::sys::host;

/// A task that takes longer is taken to hang.
const STUCK: Duration = Duration::from_millis(200);
/// Threads in the place of those that hang, at the most (I9).
const SUBSTITUTES: usize = 224;
/// The longest that a stop waits for tasks that have not come back.
const STOP_MAX: Duration = Duration::from_secs(3);

/// A piece of work.
pub type Task = Box<dyn FnOnce() + Send>;

thread_local! {
    /// True on the engine's own threads: they never wait for room, it is they who make it.
    static OWN_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one of the engine's.
pub(super) fn enter_own_thread() {
    OWN_THREAD.set(true);
}

/// True on a worker or pool thread.
pub(super) fn on_own_thread() -> bool {
    OWN_THREAD.get()
}

/// A fixed number of threads and two lanes of tasks.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    lanes: Mutex<Lanes>,
    /// Signalled when a task was added, a background thread became free, or the pool stops.
    work: Condvar,
    /// Signalled when the background lane has room again, or the pool stops.
    room: Condvar,
    len_max: usize,
    background_max: usize,
    /// Threads while nothing hangs.
    usual: usize,
}

struct Lanes {
    demand: VecDeque<Task>,
    background: VecDeque<Task>,
    background_running: usize,
    stopped: bool,
    /// Threads, and those that have no task.
    threads: usize,
    idle: usize,
    /// When each running task began.
    running: BTreeMap<u64, Instant>,
    next: u64,
}

impl Lanes {
    /// Tasks that are taken to hang.
    fn stuck(&self) -> usize {
        // In the order in which they began.
        let stuck = self.running.values().take_while(|at| at.elapsed() > STUCK);
        stuck.count()
    }
}

impl Pool {
    /// Starts `threads` threads (at least two) with room for `len_max` background tasks.
    pub(super) fn start(threads: usize, len_max: usize) -> Result<Pool> {
        let threads = threads.max(2);
        let shared = Arc::new(Shared {
            lanes: Mutex::new(Lanes {
                demand: VecDeque::new(),
                background: VecDeque::new(),
                background_running: 0,
                stopped: false,
                threads: 0,
                idle: 0,
                running: BTreeMap::new(),
                next: 0,
            }),
            work: Condvar::new(),
            room: Condvar::new(),
            len_max: len_max.max(1),
            background_max: threads / 2,
            usual: threads,
        });
        let pool = Pool {
            shared,
            threads: Mutex::new(Vec::with_capacity(threads)),
        };
        for i in 0..threads {
            if let Err(e) = pool.add_thread(i) {
                pool.stop();
                let errno = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
                return Err(errno).on("clone", Side::Host, "thread");
            }
        }
        Ok(pool)
    }

    fn add_thread(&self, i: usize) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(format!("mirrorfs-p{i}"));
        shared.lanes.lock().threads += 1;
        let started = thread.spawn(move || {
            enter_own_thread();
            shared.work();
        });
        match started {
            Ok(thread) => {
                let mut threads = self.threads.lock();
                threads.retain(|t| !t.is_finished());
                threads.push(thread);
                Ok(())
            }
            Err(e) => {
                self.shared.lanes.lock().threads -= 1;
                Err(e)
            }
        }
    }

    /// Replaces threads that hang, where somebody waits for one. To be called every second or so.
    pub fn relieve(&self) {
        let (missing, all) = {
            let lanes = self.shared.lanes.lock();
            let free = lanes.threads - lanes.stuck().min(lanes.threads);
            let missing = self.shared.usual.saturating_sub(free);
            let room = (self.shared.usual + SUBSTITUTES).saturating_sub(lanes.threads);
            let wanted = lanes.idle == 0 && !lanes.demand.is_empty() && !lanes.stopped;
            (if wanted { missing.min(room) } else { 0 }, lanes.threads)
        };
        for i in 0..missing {
            if let Err(e) = self.add_thread(all + i) {
                tracing::warn!("cannot start a thread: {e}");
                return;
            }
        }
        if missing > 0 {
            tracing::debug!(missing, "threads that hang in calls were replaced");
        }
    }

    /// Runs a task on a thread of the pool. Demand returns at once, always, and so does what is ahead of it,
    /// for which somebody may wait by the time that it runs; background waits
    /// while its lane is full, except on a thread of the engine itself. A task that comes after
    /// the engine was stopped is dropped without being run.
    pub fn run(&self, priority: Priority, task: Task) {
        let shared = &self.shared;
        let mut lanes = shared.lanes.lock();
        if priority == Priority::Background && !on_own_thread() {
            while !lanes.stopped && lanes.background.len() >= shared.len_max {
                shared.room.wait(&mut lanes);
            }
        }
        if lanes.stopped {
            drop(lanes); // What a task holds may run code of its own when it is dropped.
            return;
        }
        match priority {
            Priority::Demand | Priority::Ahead => lanes.demand.push_back(task),
            Priority::Background => lanes.background.push_back(task),
        }
        drop(lanes);
        shared.work.notify_one();
    }

    /// Runs the demand tasks that wait, drops the background ones, joins the threads.
    pub(super) fn stop(&self) {
        let dropped = {
            let mut lanes = self.shared.lanes.lock();
            lanes.stopped = true;
            std::mem::take(&mut lanes.background)
        };
        self.shared.work.notify_all();
        self.shared.room.notify_all();
        drop(dropped);
        let threads = std::mem::take(&mut *self.threads.lock());
        let hung = host::join_all(threads, STOP_MAX);
        if hung > 0 {
            tracing::warn!("{hung} threads wait for src, and are left to it");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn work(&self) {
        let mut lanes = self.lanes.lock();
        loop {
            let mut background = false;
            let mut task = lanes.demand.pop_front();
            if task.is_none() && lanes.background_running < self.background_max {
                task = lanes.background.pop_front();
                background = task.is_some();
            }
            let Some(task) = task else {
                // What hung is back: there is a thread too many.
                if lanes.stopped || lanes.threads - lanes.stuck().min(lanes.threads) > self.usual {
                    lanes.threads -= 1;
                    return;
                }
                lanes.idle += 1;
                self.work.wait(&mut lanes);
                lanes.idle -= 1;
                continue;
            };
            let id = lanes.next;
            lanes.next += 1;
            lanes.running.insert(id, Instant::now());
            if background {
                lanes.background_running += 1;
                self.room.notify_one();
            }
            drop(lanes);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(task)) {
                tracing::error!(panic = panic_text(panic.as_ref()), "a task panicked");
            }
            lanes = self.lanes.lock();
            lanes.running.remove(&id);
            if background {
                lanes.background_running -= 1;
                if !lanes.background.is_empty() {
                    self.work.notify_one();
                }
            }
        }
    }
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn demand_finds_a_thread_when_every_background_task_hangs() {
        let pool = Pool::start(4, 100).expect("threads");
        let (hang, hung) = mpsc::channel::<()>();
        let hung = Arc::new(Mutex::new(hung));
        for _ in 0..10 {
            let hung = Arc::clone(&hung);
            pool.run(
                Priority::Background,
                Box::new(move || {
                    let _ = hung.lock().recv(); // Until the sender goes.
                }),
            );
        }
        let (tx, rx) = mpsc::channel();
        for i in 0..20 {
            let tx = tx.clone();
            pool.run(
                Priority::Demand,
                Box::new(move || tx.send(i).expect("receiver is there")),
            );
        }
        for _ in 0..20 {
            rx.recv_timeout(SOON).expect("demand ran");
        }
        drop(hang);
        pool.stop();
    }

    #[test]
    fn threads_that_hang_are_replaced_while_somebody_waits_and_no_longer() {
        let pool = Pool::start(4, 100).expect("threads");
        let (hang, hung) = mpsc::channel::<()>();
        let hung = Arc::new(Mutex::new(hung));
        for _ in 0..12 {
            let hung = Arc::clone(&hung);
            pool.run(
                Priority::Demand,
                Box::new(move || {
                    let _ = hung.lock().recv(); // Until the sender goes.
                }),
            );
        }
        let (tx, rx) = mpsc::channel();
        pool.run(
            Priority::Demand,
            Box::new(move || tx.send(()).expect("receiver is there")),
        );
        assert!(rx.recv_timeout(2 * STUCK).is_err(), "all four hang");
        let end = Instant::now() + SOON;
        while rx.try_recv().is_err() {
            assert!(Instant::now() < end);
            pool.relieve();
            std::thread::sleep(STUCK / 4);
        }
        drop(hang);
        while pool.shared.lanes.lock().threads > 4 {
            assert!(Instant::now() < end);
            pool.run(Priority::Demand, Box::new(|| ()));
            std::thread::sleep(STUCK / 100);
        }
        pool.stop();
    }

    #[test]
    fn a_panic_in_a_task_kills_no_thread() {
        let pool = Pool::start(2, 10).expect("threads");
        for _ in 0..8 {
            pool.run(Priority::Demand, Box::new(|| panic!("as this test wants")));
        }
        let (tx, rx) = mpsc::channel();
        pool.run(
            Priority::Background,
            Box::new(move || tx.send(()).expect("receiver is there")),
        );
        rx.recv_timeout(SOON).expect("a thread is left");
    }

    #[test]
    fn after_the_stop_tasks_are_dropped_and_nobody_waits() {
        let pool = Pool::start(2, 1).expect("threads");
        pool.stop();
        let (tx, rx) = mpsc::channel::<()>();
        for _ in 0..3 {
            let tx = tx.clone();
            pool.run(Priority::Background, Box::new(move || drop(tx)));
        }
        drop(tx);
        assert!(rx.recv().is_err());
        pool.stop();
    }
}
