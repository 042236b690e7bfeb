//! Walker: finishes everything that nobody asks for.
//!
//! A pass goes depth-first over what is still marked in dst: it populates directories, submits their
//! pending files to the background lane, and removes a directory's mark when nothing below it is
//! pending any more. Only marks lead it, so a restart costs what is left.
//!
//!   Scan       a directory is populated and its entries are looked at, some at a time
//!   Waiting    its files are being hydrated, its subdirectories walked
//!   Done       nothing below is pending: its mark goes, and its parent hears of it
//!
//! The migration is complete when a pass removed the root's own mark; that fails when anything
//! marked was moved since the pass began (`Mirror::epoch`), and then another pass follows. Memory is
//! bounded by the depth of the tree times `CHUNK`, not by its size.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::fs::FileType;

use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{Carrier, DirRef, FileRef, Mirror, Need, Origin, Placed, Waiter};
use crate::sys::dir::{self, Entry};
use crate::sys::{fault, host};
use crate::throttle::Background;

mod task;

use task::Task;

/// Entries of one directory that are looked at before its subdirectories are walked.
const CHUNK: usize = 1024;
/// Threads for each CPU: they wait for src, so more than one. And how many at the least and the most.
const THREADS_PER_CPU: usize = 2;
const THREADS: (usize, usize) = (4, 32);
/// Threads while src is slow: what they wait for costs no CPU.
const THREADS_SLOW: usize = 32;
/// Session threads, which users wait for, take the CPU from walker threads at once.
const NICE: i32 = 15;
/// The pause after a pass that left something, growing up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long a step is put off at most while somebody waits.
const YIELD: Duration = Duration::from_millis(4);
/// The longest that a stop waits for threads that wait for src.
const STOP_MAX: Duration = Duration::from_secs(3);
/// An access that waits so long is not waited for.
const HANGS: Duration = Duration::from_secs(2);
/// The pause, at least, after a pass that met a full dst, and between questions to it.
const PAUSE_FULL: Duration = Duration::from_secs(5);

/// The threads that walk.
pub struct Walker {
    shared: Arc<Shared>,
}

struct Shared {
    mirror: Arc<Mirror>,
    stack: Mutex<Vec<Step>>,
    /// `CHUNK`.
    chunk: usize,
    /// Threads that have no step.
    idle: AtomicUsize,
    /// Threads that take steps.
    workers: AtomicUsize,
    /// Of those, how many take steps while src is fast.
    workers_fast: usize,
    threads: Mutex<Vec<JoinHandle<()>>>,
    wake: Condvar,
    stop: AtomicBool,
    /// The background's terms have changed: the next pass need not wait.
    kicked: AtomicBool,
    /// The pass that runs left something to whoever asks.
    swept: AtomicBool,
    /// It could not look somewhere.
    missed: AtomicBool,
    /// Steps of this pass that are on the stack or being taken: at 0 every directory was seen.
    steps: AtomicUsize,
    /// The pass that runs now: 0 is the first.
    pass: AtomicU64,
}

/// One piece of work for a thread.
struct Step {
    task: Arc<Task>,
    /// Where in the directory to go on.
    from: u64,
    /// Its mark said P when its parent was scanned.
    populate: bool,
}

impl Walker {
    /// Starts to walk, as `Mirror::throttle` wants it: while the background is off, pending entries
    /// are left to whoever asks, and only the marks of directories that are done are removed.
    pub fn start(mirror: Arc<Mirror>) -> Result<Walker> {
        let workers = (THREADS_PER_CPU * host::cpus().len()).clamp(THREADS.0, THREADS.1);
        let shared = Arc::new(Shared {
            mirror,
            stack: Mutex::new(Vec::new()),
            chunk: fault::lowered("CHUNK", CHUNK),
            idle: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            workers_fast: workers,
            threads: Mutex::new(Vec::new()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            swept: AtomicBool::new(false),
            missed: AtomicBool::new(false),
            steps: AtomicUsize::new(0),
            pass: AtomicU64::new(0),
        });
        for _ in 0..workers {
            shared.add_worker()?;
        }
        shared.spawn("walk".to_owned(), Shared::passes)?;
        Ok(Walker { shared })
    }

    /// The background's terms have changed.
    pub fn kick(&self) {
        self.shared.kicked.store(true, Ordering::Relaxed);
        self.shared.wake.notify_all();
    }

    /// Stops to walk: what is in the engine goes on, nothing new is asked for.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.mirror.throttle().end();
        self.shared.wake.notify_all();
        let threads = std::mem::take(&mut *self.shared.threads.lock());
        let hung = host::join_all(threads, STOP_MAX);
        if hung > 0 {
            tracing::warn!("{hung} walker threads wait for src, and are left to it");
        }
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.mirror.stopping()
    }

    fn spawn(
        self: &Arc<Self>,
        name: String,
        run: impl FnOnce(&Arc<Shared>) + Send + 'static,
    ) -> Result<()> {
        let mut threads = self.threads.lock();
        if self.stopping() {
            return Err(Error::Stopped);
        }
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                host::be_nice(NICE);
                run(&shared);
            })
            .map_err(|e| Error::Unusable(format!("cannot start a thread: {e}")))?;
        threads.push(thread);
        Ok(())
    }

    /// One more thread that takes steps.
    fn add_worker(self: &Arc<Self>) -> Result<()> {
        let n = self.workers.fetch_add(1, Ordering::Relaxed);
        let added = self.spawn(format!("walk-{n}"), move |shared| shared.work(n));
        if added.is_err() {
            self.workers.fetch_sub(1, Ordering::Relaxed);
        }
        added
    }

    /// A slow src keeps the threads waiting: there should be one for each step, up to a limit.
    fn add_workers(self: &Arc<Self>, steps: usize) {
        if self.mirror.throttle().background() != Background::Running || !self.mirror.src_is_slow()
        {
            return;
        }
        let spare = self.idle.load(Ordering::Relaxed);
        for _ in spare..steps {
            if self.workers.load(Ordering::Relaxed) >= THREADS_SLOW || self.add_worker().is_err() {
                return;
            }
        }
    }

    /// Sleeps, unless the walker is to stop. False: it is.
    fn pause(&self, time: Duration) -> bool {
        let mut stack = self.stack.lock();
        let until = std::time::Instant::now() + time;
        let kicked = || self.kicked.swap(false, Ordering::Relaxed);
        while !self.stopping() && !kicked() && std::time::Instant::now() < until {
            self.wake
                .wait_until(&mut stack, until.min(std::time::Instant::now() + PAUSE.0));
        }
        !self.stopping()
    }

    /// One pass after another until nothing is pending.
    fn passes(self: &Arc<Self>) {
        let progress = Arc::clone(self.mirror.progress());
        let mut pause = PAUSE.0;
        loop {
            let before = progress.files_pulled.get() + progress.dirs_populated.get();
            self.swept.store(false, Ordering::Relaxed);
            self.missed.store(false, Ordering::Relaxed);
            match self.pass() {
                Ok(true) => {
                    progress.walk_done.store(true, Ordering::Relaxed);
                    // What users have deleted meanwhile is no longer to come either.
                    progress.bytes_left.set(0);
                    progress.complete.store(true, Ordering::Relaxed);
                    return;
                }
                Ok(false) => {}
                Err(e) => tracing::warn!("walk: {e}"),
            }
            // What could not be looked at now will be in the ledger: it is not what is to come.
            if !self.swept.load(Ordering::Relaxed) {
                progress.walk_done.store(true, Ordering::Relaxed);
            }
            self.pass.fetch_add(1, Ordering::Relaxed);
            // Work that went on meanwhile is a reason to look again soon.
            let moved_on = progress.files_pulled.get() + progress.dirs_populated.get() != before;
            progress
                .stuck
                .store(!moved_on && progress.errors.get() > 0, Ordering::Relaxed);
            pause = if moved_on {
                PAUSE.0
            } else {
                (pause * 2).min(PAUSE.1)
            };
            if progress.dst_full.load(Ordering::Relaxed) {
                pause = pause.max(PAUSE_FULL);
            }
            if !self.pause(pause) || !self.wait_for_room() {
                return;
            }
        }
    }

    /// Waits while dst takes nothing: it is asked, no pass is made. False: the walker is to stop.
    fn wait_for_room(&self) -> bool {
        while !self.mirror.has_room() {
            if !self.pause(PAUSE_FULL) {
                return false;
            }
        }
        !self.stopping()
    }

    /// The rest of this pass would meet the same refusal.
    fn finds_no_room(&self) -> bool {
        let none = self.mirror.is_dst_shut();
        if none {
            self.missed.store(true, Ordering::Relaxed);
        }
        none
    }

    /// Walks what is marked once. True when the root's mark is gone.
    fn pass(self: &Arc<Self>) -> Result<bool> {
        let Some(root) = self.mirror.root_dir()? else {
            return Ok(true);
        };
        let (tell, told) = crossbeam_channel::bounded(1);
        let task = Task::of_root(root, self.mirror.epoch(), tell);
        self.push(vec![Step {
            task,
            from: 0,
            populate: true,
        }]);
        loop {
            match told.recv_timeout(Duration::from_millis(200)) {
                Ok(gone) => return Ok(gone),
                Err(crossbeam_channel::RecvTimeoutError::Timeout) if !self.stopping() => {}
                // Disconnected: every task of the pass was dropped, so it was stopped.
                Err(_) => return Ok(false),
            }
        }
    }

    fn push(self: &Arc<Self>, steps: Vec<Step>) {
        self.steps.fetch_add(steps.len(), Ordering::Relaxed);
        self.add_workers(steps.len());
        self.stack.lock().extend(steps);
        self.wake.notify_all();
    }

    /// Whether this thread may take a step now. Those beyond the usual number rest while src is fast.
    fn may_work(&self, n: usize) -> bool {
        let throttle = self.mirror.throttle();
        let rests = n >= self.workers_fast && !self.mirror.src_is_slow();
        match throttle.background() {
            Background::Running => n < throttle.jobs() && !rests && !self.mirror.src_is_away(),
            Background::Paused => false,
            Background::Off => n == 0,
        }
    }

    /// Whether pending entries are left to whoever asks.
    fn sweeps(&self) -> bool {
        let sweeps = self.mirror.throttle().background() == Background::Off;
        if sweeps {
            self.swept.store(true, Ordering::Relaxed);
        }
        sweeps
    }

    /// Takes steps.
    fn work(self: &Arc<Self>, n: usize) {
        loop {
            let step = {
                let mut stack = self.stack.lock();
                loop {
                    if self.stopping() {
                        stack.clear();
                        return;
                    }
                    if self.may_work(n)
                        && let Some(step) = stack.pop()
                    {
                        break step;
                    }
                    let idle = self.idle.fetch_add(1, Ordering::Relaxed) + 1;
                    // Nothing more comes before what is under way has been made durable.
                    if stack.is_empty() && idle == self.workers.load(Ordering::Relaxed) {
                        self.mirror.gather(false);
                    }
                    self.wake.wait_for(&mut stack, PAUSE.0);
                    self.idle.fetch_sub(1, Ordering::Relaxed);
                }
            };
            self.mirror.gather(true);
            self.yield_to_demand();
            let task = Arc::clone(&step.task);
            let scanned = self.scan(step);
            self.step_taken(scanned.is_ok());
            if let Err(e) = &scanned
                && !matches!(e, Error::Stopped)
            {
                tracing::debug!("walk: {e}");
            }
            task.child_done(&self.mirror, scanned.is_ok());
        }
    }

    /// The last step of a pass that saw everything: what is to come is known, though not here yet.
    fn step_taken(&self, seen: bool) {
        if !seen {
            self.missed.store(true, Ordering::Relaxed);
        }
        let last = self.steps.fetch_sub(1, Ordering::AcqRel) == 1;
        let blind = [&self.swept, &self.missed];
        if last && !blind.iter().any(|b| b.load(Ordering::Relaxed)) {
            let progress = self.mirror.progress();
            progress.walk_done.store(true, Ordering::Relaxed);
        }
    }

    /// Somebody waits, for src or for a barrier: let him go first, for a moment each step. No longer:
    /// one who waits for a file that src never gives must not stop everything.
    fn yield_to_demand(&self) {
        let until = std::time::Instant::now() + YIELD;
        let progress = self.mirror.progress();
        // Who waits for what hangs waits for ever, and is helped by nobody's going slower.
        let newest = progress.waits.newest();
        let hangs = progress.barriers.get() == 0 && newest.is_some_and(|t| t > HANGS);
        while !hangs && progress.is_waited_for() && std::time::Instant::now() < until {
            std::thread::sleep(YIELD / 8);
        }
    }

    /// Looks at some entries of a directory; the rest is another step, which may be over before this.
    fn scan(self: &Arc<Self>, step: Step) -> Result<()> {
        let Step {
            task,
            from,
            populate,
        } = step;
        let sweeps = self.sweeps() || self.finds_no_room();
        if populate && !sweeps && self.populate(&task)? {
            return Ok(());
        }
        let opened = self.mirror.open_dir(&task.dir)?;
        if populate && sweeps && self.mirror.is_pending(opened.as_fd())? {
            task.stays_pending();
            return Ok(());
        }
        let mut entries = Vec::new();
        let mut buf = Vec::new();
        let at_end = dir::read_dir(opened.as_fd(), from, &mut buf, |entry| {
            entries.push(entry);
            entries.len() < self.chunk
        })
        .on("getdents64", Side::Dst, self.shown(&task.dir))?;
        let next = entries.last().map_or(from, |e| e.next);
        if !at_end {
            // Below the subdirectories on the stack: they come first.
            self.push(vec![Shared::step_on(&task, next)]);
            fault::point("walk-rest");
        }
        let mut below = Vec::new();
        for entry in entries {
            if self.stopping() {
                return Err(Error::Stopped);
            }
            self.look(&task, opened.as_fd(), &entry, &mut below)?;
        }
        self.push(below);
        Ok(())
    }

    /// Populates a directory with the data of its small files. True when that told everything that
    /// is still marked in it, so that it need not be listed.
    fn populate(self: &Arc<Self>, task: &Arc<Task>) -> Result<bool> {
        let published = || self.child_of(task);
        let carrier = Carrier::new(&published);
        let stopping = || self.stopping();
        self.mirror.populate_now(&task.dir, &carrier, stopping)?;
        self.mirror.wait_for_room();
        let Some(placed) = carrier.placed() else {
            return Ok(false);
        };
        let mut below = Vec::new();
        for placed in placed {
            match placed {
                Placed::Dir(dir) => below.push(Shared::step_below(task, dir, true)),
                Placed::File(file) => self.hydrate(task, &file),
            }
        }
        self.push(below);
        Ok(true)
    }

    /// One more thing below a directory is not done: told when it is.
    fn child_of(self: &Arc<Self>, task: &Arc<Task>) -> Waiter {
        task.one_more();
        let (mirror, task) = (Arc::clone(&self.mirror), Arc::clone(task));
        Box::new(move |result: Result<()>| task.child_done(&mirror, result.is_ok()))
    }

    fn hydrate(self: &Arc<Self>, task: &Arc<Task>, file: &FileRef) {
        if self.finds_no_room() {
            task.stays_pending();
            return;
        }
        self.mirror.wait_for_hashes(|| self.stopping());
        let then = self.child_of(task);
        self.mirror
            .hydrate(file, Need::Unmarked, Priority::Background, then);
    }

    fn step_on(task: &Arc<Task>, from: u64) -> Step {
        task.one_more();
        Step {
            task: Arc::clone(task),
            from,
            populate: false,
        }
    }

    fn step_below(task: &Arc<Task>, dir: DirRef, populate: bool) -> Step {
        let child = Task::below(task, dir);
        Step {
            task: child,
            from: 0,
            populate,
        }
    }

    /// One entry: a marked file goes to the engine, a marked directory to the stack.
    fn look(
        self: &Arc<Self>,
        task: &Arc<Task>,
        opened: std::os::fd::BorrowedFd<'_>,
        entry: &Entry,
        below: &mut Vec<Step>,
    ) -> Result<()> {
        let at = (&task.dir, opened);
        let found = self.mirror.revealed_child(at, entry, !self.sweeps());
        if matches!(found, Err(Error::Unseen { .. })) {
            task.stays_pending();
            return Ok(());
        }
        let Some(found) = found? else { return Ok(()) };
        if found.kind == FileType::Directory {
            below.push(Shared::step_below(task, found.dir, !found.mark.populated));
            return Ok(());
        }
        if self.sweeps() || self.finds_no_room() {
            task.stays_pending();
            return Ok(());
        }
        if self.pass.load(Ordering::Relaxed) == 0 && self.mirror.is_resumed() {
            self.mirror.note_left(found.dir.ino, found.size);
        }
        let file = FileRef {
            ino: found.dir.ino,
            anchor: found.dir.anchor,
            origin: found.dir.origin.as_deref().map(Origin::of),
        };
        self.hydrate(task, &file);
        Ok(())
    }

    fn shown(&self, dir: &DirRef) -> std::path::PathBuf {
        dir.origin
            .as_deref()
            .map_or_else(Default::default, |o| o.to_path())
    }
}
