//! Engine: how bytes get from one file to another. It has never heard of marks.
//!
//!   submit()   a CopyJob enters one of two lanes; background waits while its lane is full
//!   worker     one thread per CPU takes jobs, demand first, and runs several at once on its ring
//!   done()     the job's Completion hears the end, exactly once
//!   cancel_background()  what waits in the background ends as Stopped
//!   stop()     likewise; what is in flight ends, threads go
//!
//! The background goes no faster than the [`Throttle`] allows: its jobs and its reads wait in their
//! queues, and the pace thread wakes the workers when the gate opens.
//!
//! Floor 3. Upholds I8 (no lock is held while a Completion runs) and I9 (jobs, open files, buffers
//! and ring entries have limits fixed at start).

mod away;
mod bell;
pub mod buffers;
mod copy;
pub mod job;
mod keep;
mod latency;
mod pace;
pub mod passing;
mod perform;
pub mod pool;
mod queue;
#[allow(unsafe_code)]
pub mod ring;
mod sync;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use self::bell::Bell;
use self::job::{CopyJob, Priority};
use self::pace::Pace;
pub use self::pool::Pool;
use self::queue::Queue;
use self::ring::Opcodes;
use self::sync::Signal;
use self::worker::Worker;
use crate::error::{Context, Errno, Error, Result, Side};
use crate::sys;
use crate::throttle::Throttle;

/// The longest that a stop waits for calls that have not come back.
const STOP_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// The engine's limits, fixed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Copy threads; 0: one per CPU that this process may run on.
    pub workers: usize,
    /// Background jobs that wait before `submit` does.
    pub queue_len_max: usize,
    /// Buffers per worker for large files (small files have their own, one per file in flight).
    pub buffers_per_worker: usize,
    /// Size of such a buffer: the most that is read at once.
    pub buffer_bytes: usize,
    /// Such buffers more per worker, for `Completion::kept`.
    pub spare_buffers: usize,
    /// Files that one worker works on at the same time; a quarter is left to demand.
    pub files_in_flight_max: usize,
    /// Threads of the [`Pool`].
    pub pool_threads: usize,
    /// False: plain system calls only, as on a kernel without io_uring.
    pub io_uring: bool,
    /// Opcodes of io_uring that are not used although the kernel has them. Without read and write
    /// there are plain system calls only.
    pub ring_off: Opcodes,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            workers: 0,
            queue_len_max: 1024,
            buffers_per_worker: 8,
            buffer_bytes: 512 * 1024,
            spare_buffers: 0,
            files_in_flight_max: 64,
            pool_threads: 32,
            io_uring: true,
            ring_off: ring_off(),
        }
    }
}

/// The copy threads, their queue, and the [`Pool`]. Dropping it stops it.
pub struct Engine {
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the threads. Where io_uring is missing or forbidden, plain system calls do the same.
    pub fn start(config: &EngineConfig) -> Result<Engine> {
        Engine::start_throttled(config, Arc::new(Throttle::default()))
    }

    /// Starts the threads; `throttle` holds the background back.
    pub fn start_throttled(config: &EngineConfig, throttle: Arc<Throttle>) -> Result<Engine> {
        Engine::launch(config, io_max(), throttle)
    }

    /// `io_max`: the most that one read or write may transfer.
    fn launch(config: &EngineConfig, io_max: usize, throttle: Arc<Throttle>) -> Result<Engine> {
        let cpus = sys::host::cpus();
        let workers = if config.workers == 0 {
            cpus.len().max(1)
        } else {
            config.workers
        };
        let bells = (0..workers)
            .map(|_| Signal::new().map(Bell::new))
            .collect::<sys::Result<_>>()
            .on("eventfd", Side::Host, "worker")?;
        let shared = Arc::new(Shared {
            queue: Queue::new(config.queue_len_max),
            bells,
            throttle,
            pace: Pace::default(),
            cancels: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        });
        let pool = Arc::new(Pool::start(config.pool_threads, config.queue_len_max)?);
        let engine = Engine {
            shared,
            pool,
            threads: Mutex::new(Vec::with_capacity(workers)),
        };
        let (up, ups) = std::sync::mpsc::channel();
        for index in 0..workers {
            let (shared, pool) = (Arc::clone(&engine.shared), Arc::clone(&engine.pool));
            let (config, up) = (config.clone(), up.clone());
            let cpu = cpus.get(index % cpus.len().max(1)).copied();
            let work = move || {
                pool::enter_own_thread();
                if let Some(cpu) = cpu {
                    sys::host::pin_to_cpu(cpu);
                }
                let (worker, no_ring) = Worker::new(index, &config, io_max, shared, pool);
                let _ = up.send(no_ring); // `start` waits for it.
                drop(up);
                worker.run();
            };
            let thread = std::thread::Builder::new().name(format!("mirrorfs-w{index}"));
            match thread.spawn(work) {
                Ok(thread) => engine.threads.lock().push(thread),
                Err(e) => {
                    // Dropping `engine` stops the threads that are there.
                    let errno = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
                    return Err(errno).on("clone", Side::Host, "thread");
                }
            }
        }
        drop(up);
        let shared = Arc::clone(&engine.shared);
        let pace = std::thread::Builder::new().name("mirrorfs-pace".into());
        match pace.spawn(move || shared.keep_pace()) {
            Ok(thread) => engine.threads.lock().push(thread),
            Err(e) => {
                let errno = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
                return Err(errno).on("clone", Side::Host, "thread");
            }
        }
        if let Some(errno) = ups.iter().flatten().next() {
            tracing::warn!(error = %errno, "no io_uring: copying with plain system calls");
        }
        Ok(engine)
    }

    /// Hands a job over. Background waits while its lane is full; demand never waits. After the
    /// stop began the job's `done` hears `Stopped`, and so does the caller.
    pub fn submit(&self, job: CopyJob) -> Result<()> {
        let priority = job.priority;
        match self
            .shared
            .queue
            .push(job, priority, !pool::on_own_thread())
        {
            Ok(()) => {
                self.shared.wake_one(priority);
                Ok(())
            }
            Err(job) => {
                worker::finish_unstarted(job);
                Err(Error::Stopped)
            }
        }
    }

    /// Ends what waits in the background, and what has most of a large file before it: it hears
    /// `Stopped`. What comes later is done as before.
    pub fn cancel_background(&self) {
        for job in self.shared.queue.take_background() {
            worker::finish_unstarted(job);
        }
        self.shared.cancels.fetch_add(1, SeqCst);
        self.shared.call_all();
    }

    /// The throttle's terms have changed: everybody looks again.
    pub fn terms_changed(&self) {
        self.shared.call_all();
    }

    /// Somebody waits now for a background job that has begun: see `Completion::wanted`.
    pub fn hurry(&self) {
        if !self.shared.throttle.is_open() {
            self.shared.call_all();
        }
    }

    /// Somebody has come to what was read ahead of him, and begun.
    pub fn come_to(&self) {
        self.shared.call_all();
    }

    /// Threads for calls that may wait on src.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Ends the engine: background jobs that wait hear `Stopped`, and so do background jobs with
    /// most of a large file before them; everything else in flight, and all demand, is finished.
    /// Never called on one of the engine's own threads.
    pub fn stop(&self) {
        for job in self.shared.queue.close() {
            worker::finish_unstarted(job);
        }
        self.shared.ring_all();
        self.shared.pace.stop();
        self.shared.throttle.tell();
        let threads = std::mem::take(&mut *self.threads.lock());
        let hung = sys::host::join_all(threads, STOP_MAX);
        if hung > 0 {
            tracing::warn!("{hung} copy threads wait for src, and are left to it");
        }
        for job in self.shared.queue.drain() {
            worker::finish_unstarted(job); // Only if every worker panicked.
        }
        self.pool.stop();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// MIRRORFS_SHORT_IO=4097 makes every read and write short, as a signal or a full disk could.
#[cfg(feature = "fault")]
fn io_max() -> usize {
    let text = std::env::var("MIRRORFS_SHORT_IO").ok();
    text.and_then(|t| t.parse().ok())
        .filter(|n| *n > 0)
        .unwrap_or(usize::MAX)
}

#[cfg(not(feature = "fault"))]
fn io_max() -> usize {
    usize::MAX
}

/// MIRRORFS_RING_OFF=openat2,fsync (or `all`) switches opcodes off, as on a kernel without them.
#[cfg(feature = "fault")]
fn ring_off() -> Opcodes {
    let text = std::env::var("MIRRORFS_RING_OFF").unwrap_or_default();
    Opcodes::parse(&text).unwrap_or_else(|| {
        tracing::error!(text, "MIRRORFS_RING_OFF: no such opcode");
        Opcodes::NONE
    })
}

#[cfg(not(feature = "fault"))]
fn ring_off() -> Opcodes {
    Opcodes::NONE
}

/// What the workers share.
struct Shared {
    queue: Queue<CopyJob>,
    bells: Vec<Bell<away::Brought>>,
    throttle: Arc<Throttle>,
    pace: Pace,
    /// How often the background was cancelled.
    cancels: AtomicU64,
    /// How often all workers were called to look at their files again.
    calls: AtomicU64,
}

impl Shared {
    /// Makes every worker look at its files, also one that is just about to sleep.
    fn call_all(&self) {
        self.calls.fetch_add(1, SeqCst);
        self.ring_all();
    }

    fn ring_all(&self) {
        for bell in &self.bells {
            bell.ring();
        }
    }

    /// Wakes a sleeping worker that has room for a job of this priority, if there is one.
    fn wake_one(&self, priority: Priority) -> bool {
        bell::wake_one(&self.bells, priority)
    }

    /// True when somebody sleeps who could take a background job.
    fn anyone_idle(&self) -> bool {
        self.bells.iter().any(Bell::is_idle)
    }
}
