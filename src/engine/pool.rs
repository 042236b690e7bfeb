//! Pool: threads for calls that may wait on src and have no ring opcode.
//!
//! getdents64, listxattr, readlink, SEEK_DATA, copy_file_range, a whole populate. Two lanes:
//! demand first, and the background never takes the last half of the threads, so that demand
//! finds a thread even when every background task hangs on a dead server.

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::job::Priority;
use crate::error::{Context, Errno, Result, Side};

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
}

struct Lanes {
    demand: VecDeque<Task>,
    background: VecDeque<Task>,
    background_running: usize,
    stopped: bool,
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
            }),
            work: Condvar::new(),
            room: Condvar::new(),
            len_max: len_max.max(1),
            background_max: threads / 2,
        });
        let pool = Pool {
            shared,
            threads: Mutex::new(Vec::with_capacity(threads)),
        };
        for i in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let started = std::thread::Builder::new()
                .name(format!("mirrorfs-p{i}"))
                .spawn(move || {
                    enter_own_thread();
                    shared.work();
                });
            match started {
                Ok(thread) => pool.threads.lock().push(thread),
                Err(e) => {
                    pool.stop();
                    let errno = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
                    return Err(errno).on("clone", Side::Host, "thread");
                }
            }
        }
        Ok(pool)
    }

    /// Runs a task on a thread of the pool. Demand returns at once, always; background waits
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
            Priority::Demand => lanes.demand.push_back(task),
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
        for thread in threads {
            let _ = thread.join(); // Tasks' panics were caught; there is no value.
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
                if lanes.stopped {
                    return;
                }
                self.work.wait(&mut lanes);
                continue;
            };
            if background {
                lanes.background_running += 1;
                self.room.notify_one();
            }
            drop(lanes);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(task)) {
                tracing::error!(panic = panic_text(panic.as_ref()), "a task panicked");
            }
            lanes = self.lanes.lock();
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
