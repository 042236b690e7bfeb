//! Commit: what becomes durable in batches, on a thread of its own.
//!
//! A round takes what has come in, calls syncfs(dst) once, and then removes the marks of the files
//! that had landed before (D1), publishes directories (btrfs, D6), and removes the marks of
//! directories with nothing pending below (I2, `dirs`). What a round removed is durable with the next
//! round's syncfs: only then a file leaves the table of hydrations and may be written (D2).
//!
//! A round starts a second after the first arrival (D10: seconds at the most), at once when
//! somebody waits for it, and soon when the walker does. Lock order: `queue` is a leaf.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::hydrate::{Hydration, Stage};
use super::node::{Ino, Origin, Phase};
use super::partial::Partial;
use super::populate::{DirRef, Waiter};
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::sys::xattr::Target;
use crate::sys::{cache, dir, fault, fd, stat};
use crate::throttle::Background;

mod dirs;
pub use dirs::DoneDir;

/// Rounds after the mirror has stopped, at the most: what is durable needs three.
const LAST_ROUNDS: u8 = 8;
/// How long a round waits for more. Each stops the journal for a moment, so few large ones are
/// cheaper than many small ones.
const GATHER: Duration = Duration::from_secs(1);
/// How long a round without files waits at most. It waits as long as the last syncfs took: half of
/// the time then goes into syncing, and a deep tree is not held up.
const GATHER_DIRS_MAX: Duration = Duration::from_millis(20);
/// How long a round waits at least while the walker has nothing to do before it.
const GATHER_HUNGRY: Duration = Duration::from_millis(20);
/// How long a round that failed is put off.
const RETRY: Duration = Duration::from_secs(1);
/// A round starts at once with this many files.
const BATCH_MAX: usize = 16 << 10;
/// The walker waits when so many files have landed and no round has taken them.
const WAITING_MAX: usize = 2 * BATCH_MAX;

/// A directory with all its names whose mark is to go from P to `mark` behind a barrier.
pub(super) struct Publish {
    pub(super) dir: DirRef,
    pub(super) mark: Mark,
    /// The files in it that came with their data, and have no mark of their own.
    pub(super) carried: Carried,
    /// A syncfs failed since they were carried: their data may be lost.
    pub(super) doubtful: bool,
    /// Told when the mark is set.
    pub(super) then: Option<Waiter>,
    /// What the next program has to know of it until then (kept.rs).
    pub(super) _partial: Option<Arc<Partial>>,
}

/// Files that are as durable as their directory's publication.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Carried {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

#[derive(Default)]
struct Queue {
    files: Vec<Arc<Hydration>>,
    publishes: Vec<Publish>,
    dirs: Vec<DoneDir>,
    /// Carried files in `publishes`.
    carried: u64,
    /// Directories whose publication is not durable yet: the round that makes it so.
    gates: HashMap<Ino, u64>,
    /// Changes that wait for a gate.
    waiters: Vec<(Ino, Waiter)>,
    /// Files that the round with this number unmarked.
    unmarked: Vec<(u64, Arc<Hydration>)>,
    first: Option<Instant>,
    urgent: bool,
    /// Rounds begun.
    round: u64,
    /// The last of them whose syncfs has worked.
    synced: u64,
    /// How long the last syncfs took.
    sync_time: Duration,
    /// The walker has nothing to do before the next round.
    hungry: bool,
    stopped: bool,
    /// How many rounds there are still, once it has stopped.
    last_rounds: u8,
    /// A round has been taken and is not over.
    in_round: bool,
}

/// What waits for the next syncfs.
#[derive(Default)]
pub struct Commit {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// A round has taken what had landed.
    room: Condvar,
}

/// A publication that no round has taken yet.
const NOT_YET: u64 = u64::MAX;

impl Queue {
    /// Files that no round has taken.
    fn waiting(&self) -> usize {
        self.files.len() + usize::try_from(self.carried).unwrap_or(usize::MAX)
    }

    /// Something has come since the last round.
    fn has_work(&self) -> bool {
        !(self.files.is_empty() && self.publishes.is_empty() && self.dirs.is_empty())
    }

    /// What a round has done is not durable yet.
    fn has_tail(&self) -> bool {
        !self.unmarked.is_empty() || !self.gates.is_empty()
    }

    /// When the next round starts, if the last one was over at `begun`. While the background does not run
    /// only accesses bring something, and nobody waits for a round who does not say so: it gathers.
    fn due(&self, begun: Instant, runs: bool) -> Option<Instant> {
        let hungry = self.hungry && runs;
        match self.first {
            Some(first) if self.urgent || self.stopped => Some(first),
            // One level of the tree a round: directories alone don't wait for company.
            Some(first) if self.waiting() == 0 => Some(first + self.sync_time.min(GATHER_DIRS_MAX)),
            Some(first) if hungry => Some(first + self.sync_time.clamp(GATHER_HUNGRY, GATHER)),
            Some(first) => Some(first + GATHER),
            None if !self.has_tail() => None,
            None if hungry => Some(begun + GATHER_HUNGRY),
            None => Some(begun + GATHER),
        }
    }
}

impl Commit {
    /// The file's bytes are in dst's page cache, its times are restored.
    pub(super) fn file_landed(&self, hydration: Arc<Hydration>) {
        let mut queue = self.queue.lock();
        queue.files.push(hydration);
        queue.urgent |= queue.waiting() >= BATCH_MAX;
        self.arrived(&mut queue);
    }

    /// Waits while so many files have landed that memory would grow without end. For walker threads.
    pub(super) fn wait_for_room(&self, stopping: impl Fn() -> bool) {
        let mut queue = self.queue.lock();
        while queue.waiting() >= WAITING_MAX && !queue.stopped && !stopping() {
            self.room.wait_for(&mut queue, GATHER);
        }
    }

    /// Every name of the directory is in dst; its mark changes behind a barrier.
    pub(super) fn publish_later(&self, publish: Publish) {
        let mut queue = self.queue.lock();
        queue.gates.insert(publish.dir.ino, NOT_YET);
        queue.carried += publish.carried.files;
        queue.publishes.push(publish);
        queue.urgent |= queue.waiting() >= BATCH_MAX;
        self.arrived(&mut queue);
    }

    fn publish_again(&self, publish: Publish) {
        let mut queue = self.queue.lock();
        queue.carried += publish.carried.files;
        queue.publishes.push(publish);
        queue.first = Some(Instant::now() + RETRY);
    }

    /// A file without its mark whose removal is not durable yet.
    pub(super) fn unmarked_again(&self, hydration: Arc<Hydration>) {
        let mut queue = self.queue.lock();
        let round = queue.round;
        hydration.state.lock().stage = Stage::Unmarked(round);
        queue.unmarked.push((round, hydration));
        self.arrived(&mut queue);
    }

    /// True while the directory has all its names but its mark still says P.
    pub(super) fn is_publishing(&self, ino: Ino) -> bool {
        self.queue.lock().gates.get(&ino) == Some(&NOT_YET)
    }

    /// True while no directory waits for its publication.
    pub(super) fn has_no_gates(&self) -> bool {
        self.queue.lock().gates.is_empty()
    }

    /// True while the directory's publication is not durable.
    pub(super) fn is_gated(&self, ino: Ino) -> bool {
        self.queue.lock().gates.contains_key(&ino)
    }

    /// Calls `then` when a change in the directory cannot be undone by a crash any more (D6).
    pub(super) fn when_published(&self, ino: Ino, then: Waiter) {
        let mut queue = self.queue.lock();
        if !queue.gates.contains_key(&ino) {
            drop(queue);
            return then(Ok(()));
        }
        queue.waiters.push((ino, then));
        queue.urgent = true;
        self.arrived(&mut queue);
    }

    /// Somebody waits: the next round starts at once.
    pub fn hurry(&self) {
        let mut queue = self.queue.lock();
        queue.urgent = true;
        self.arrived(&mut queue);
    }

    /// Whether the walker brings more, so that a round is worth waiting for.
    fn gather(&self, more: bool) {
        let mut queue = self.queue.lock();
        if queue.hungry == more {
            queue.hungry = !more;
            self.wake.notify_all();
        }
    }

    /// Every directory with all its names has its mark; nothing is between the queue and dst.
    pub(super) fn is_settled(&self) -> bool {
        let q = self.queue.lock();
        !q.in_round && q.publishes.is_empty() && q.gates.values().all(|g| *g != NOT_YET)
    }

    /// True when nothing waits for a round, and none is at work: what it has taken still has its marks.
    pub fn is_idle(&self) -> bool {
        let q = self.queue.lock();
        !q.in_round
            && q.files.is_empty()
            && q.publishes.is_empty()
            && q.dirs.is_empty()
            && q.gates.is_empty()
            && q.unmarked.is_empty()
    }

    /// One last round, then the thread ends.
    pub(super) fn stop(&self) {
        let mut queue = self.queue.lock();
        queue.stopped = true;
        queue.last_rounds = LAST_ROUNDS;
        self.wake.notify_all();
    }

    fn arrived(&self, queue: &mut Queue) {
        queue.first.get_or_insert_with(Instant::now);
        self.wake.notify_all();
    }

    /// Waits until a round is due; `None` when the mirror stops and nothing is left to do. `runs`: whether
    /// the background does.
    fn next(&self, runs: impl Fn() -> bool) -> Option<Round> {
        let begun = Instant::now();
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped && (!queue.has_work() && !queue.has_tail() || queue.last_rounds == 0) {
                return None; // With no round left: dst takes nothing. What is marked stays pending.
            }
            match queue.due(begun, runs()) {
                Some(due) if due <= Instant::now() || queue.stopped => break,
                Some(due) => {
                    self.wake.wait_until(&mut queue, due);
                }
                None => self.wake.wait(&mut queue),
            }
        }
        if queue.stopped {
            queue.last_rounds -= 1;
        }
        queue.first = None;
        queue.urgent = false;
        queue.round += 1;
        queue.carried = 0;
        queue.in_round = true;
        self.room.notify_all();
        Some(Round {
            number: queue.round,
            files: std::mem::take(&mut queue.files),
            publishes: std::mem::take(&mut queue.publishes),
            dirs: std::mem::take(&mut queue.dirs),
        })
    }

    /// The syncfs of round `number` has returned: what earlier rounds did is durable.
    fn earlier_is_durable(&self, number: u64) -> (Vec<Arc<Hydration>>, Vec<Waiter>) {
        let mut queue = self.queue.lock();
        let (done, open): (Vec<_>, Vec<_>) = std::mem::take(&mut queue.unmarked)
            .into_iter()
            .partition(|(n, _)| *n < number);
        queue.unmarked = open;
        queue
            .gates
            .retain(|_, gate| *gate == NOT_YET || *gate > number);
        let waiters = std::mem::take(&mut queue.waiters);
        let (ready, wait): (Vec<_>, Vec<_>) = waiters
            .into_iter()
            .partition(|(ino, _)| !queue.gates.contains_key(ino));
        queue.waiters = wait;
        if !queue.waiters.is_empty() {
            queue.urgent = true;
            queue.first.get_or_insert_with(Instant::now);
        }
        (
            done.into_iter().map(|(_, h)| h).collect(),
            ready.into_iter().map(|(_, w)| w).collect(),
        )
    }
}

struct Round {
    number: u64,
    files: Vec<Arc<Hydration>>,
    publishes: Vec<Publish>,
    dirs: Vec<DoneDir>,
}

impl Mirror {
    /// Whether the walker brings more at the moment, so that a round is worth waiting for.
    pub fn gather(&self, more: bool) {
        self.commit.gather(more);
    }

    /// The commit thread: rounds until the mirror stops.
    pub(super) fn commit_loop(self: &Arc<Self>) {
        let mut failing = false;
        let runs = || self.throttle().background() == Background::Running;
        while let Some(round) = self.commit.next(runs) {
            let inside = self.marks.enter();
            let begun = Instant::now();
            let sync = || fd::syncfs(self.dst.as_fd());
            let synced = fault::unless_broken("D1", sync).on("syncfs", Side::Dst, ".");
            let took = begun.elapsed();
            let (number, files) = (round.number, round.files.len());
            {
                let mut queue = self.commit.queue.lock();
                queue.sync_time = took;
                if synced.is_ok() {
                    queue.synced = number;
                }
            }
            tracing::debug!(number, files, ?took, "synced");
            match synced {
                Ok(()) => {
                    failing = false;
                    self.commit_round(round);
                }
                Err(e) => self.commit_failed(round, &e, std::mem::replace(&mut failing, true)),
            }
            self.commit.queue.lock().in_round = false;
            drop(inside);
            if let Err(e) = self.ledger.sync(self.control.dir.as_fd())
                && !failing
            {
                tracing::warn!("{e}");
            }
        }
    }

    fn commit_round(self: &Arc<Self>, round: Round) {
        let (durable, waiters) = self.commit.earlier_is_durable(round.number);
        for hydration in durable {
            self.finish_unmarked(&hydration);
        }
        waiters.into_iter().for_each(|w| w(Ok(())));
        for publish in round.publishes {
            self.publish_now(publish, round.number);
        }
        for hydration in round.files {
            self.unmark_file(hydration, round.number);
        }
        self.unmark_dirs(round.dirs);
    }

    /// The names of the directory and what was carried into it are durable: P becomes L.
    fn publish_now(self: &Arc<Self>, publish: Publish, round: u64) {
        if publish.doubtful {
            return self.commit.publish_again(self.without_carried(publish));
        }
        fault::point("publish-durable");
        match self.mark_by_anchor(&publish.dir.anchor, &publish.mark) {
            Ok(()) | Err(Errno::STALE) => {}
            Err(errno) => return self.publish_refused(publish, errno),
        }
        fault::point("publish-marked");
        let Publish {
            dir, carried, then, ..
        } = publish;
        self.commit.queue.lock().gates.insert(dir.ino, round + 1);
        self.progress.files_pulled.add(carried.files);
        self.progress.bytes_pulled.add(carried.bytes);
        self.progress.bytes_left.sub(carried.bytes);
        then.into_iter().for_each(|w| w(Ok(())));
    }

    /// The removal of the mark is durable. A writer that has joined settles it by itself.
    fn finish_unmarked(&self, hydration: &Arc<Hydration>) {
        self.hydrations.remove_if(hydration, |_| true);
        let mut state = hydration.state.lock();
        if matches!(state.stage, Stage::Unmarked(_)) && state.writers.is_empty() {
            state.stage = Stage::Over;
        }
    }

    fn unmark_file(self: &Arc<Self>, hydration: Arc<Hydration>, round: u64) {
        fault::point("hydrate-durable");
        let guard = self.lock_perms(hydration.file.ino);
        let ((bytes, passes), told) = {
            let mut state = hydration.state.lock();
            if state.stage != Stage::Landed {
                return;
            }
            self.partials.note_unmark(&hydration.file);
            // In this order under one lock: whoever sees Unmarked may rely on it.
            let removed = match self.remove_mark(&hydration.file.anchor) {
                // Deleted meanwhile.
                Err(Errno::STALE | Errno::NOENT) => Ok(()),
                other => other,
            };
            if let Err(errno) = removed {
                drop(state);
                drop(guard);
                let error: Result<()> = Err(errno).on("removexattr", Side::Dst, &hydration.path);
                let error = error.err().unwrap_or(Error::Stopped);
                return self.fail_hydration(&hydration, error);
            }
            state.stage = Stage::Unmarked(round);
            let passes = state.passes && state.asked == Some(Priority::Background);
            ((state.bytes, passes), state.take_settled())
        };
        drop(guard);
        if passes {
            self.forget_pages(&hydration.file.anchor);
        }
        fault::point("hydrate-unmarked");
        self.count_pulled(bytes);
        self.commit.queue.lock().unmarked.push((round, hydration));
        told.into_iter().for_each(|w| w(Ok(())));
    }

    /// A file that was only to pass through the page cache is durable now, so its pages are clean.
    fn forget_pages(&self, anchor: &Anchor) {
        let flags = OFlags::RDONLY | OFlags::NOATIME;
        // Deleted, or not ours to open: the kernel will find other pages to drop.
        if let Ok(file) = anchor.open(self.dst.as_fd(), flags) {
            cache::forget(file.as_fd(), &(0..i64::MAX as u64));
        }
    }

    /// A handle is opened for reading, which spares the way through /proc.
    fn remove_mark(&self, anchor: &Anchor) -> Result<(), Errno> {
        let (dst, reading) = (self.dst.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK);
        match anchor {
            Anchor::Handle(handle) if !self.modes_bind => {
                let opened = handle.open(dst, reading | OFlags::NOFOLLOW)?;
                self.mark.remove(Target::Open(opened.as_fd()))
            }
            _ => self.take_mark(anchor.open(dst, OFlags::PATH)?.as_fd()),
        }
    }

    fn mark_by_anchor(&self, anchor: &Anchor, mark: &Mark) -> Result<(), Errno> {
        let (dst, reading) = (self.dst.as_fd(), OFlags::RDONLY | OFlags::NOFOLLOW);
        match anchor {
            Anchor::Handle(handle) if !self.modes_bind => {
                let opened = handle.open(dst, reading)?;
                self.mark.set(Target::Open(opened.as_fd()), mark)
            }
            _ => {
                let opened = anchor.open(dst, OFlags::PATH)?;
                self.mark.set(Target::Fd(opened.as_fd()), mark)
            }
        }
    }

    /// syncfs failed: some page of some file did not reach the device, and the kernel will not say
    /// it twice. Every file of the round is pending again, and every file that was carried.
    fn commit_failed(self: &Arc<Self>, round: Round, error: &Error, again: bool) {
        // A disk that is gone fails fifty times a second: once is enough where nothing is lost.
        if !again || !round.files.is_empty() {
            tracing::error!("{error}: {} files are pulled again", round.files.len());
        }
        for hydration in round.files {
            if hydration.state.lock().stage == Stage::Landed {
                if let Some(node) = self
                    .nodes
                    .find_same(hydration.file.ino, &hydration.file.anchor)
                {
                    node.set_phase(Phase::Pending);
                }
                self.fail_hydration(&hydration, error.clone());
            }
        }
        for dir in round.dirs {
            (dir.then)(false);
        }
        for publish in round.publishes {
            let doubtful = publish.carried.files > 0;
            if let Some(board) = self.board().filter(|_| doubtful)
                && board.spoil()
            {
                tracing::warn!("the mount is not kept any more: {error}");
            }
            let publish = Publish {
                doubtful,
                ..publish
            };
            self.commit.publish_again(publish);
        }
    }

    /// What was carried into the directory is pending again, as if it had been placed without data.
    fn without_carried(&self, publish: Publish) -> Publish {
        let Err(error) = self.mark_carried(&publish.dir) else {
            let path = publish.dir.shown();
            let then = publish.then.map(|then| -> Waiter {
                Box::new(move |_| then(Err(Errno::IO).on("syncfs", Side::Dst, path)))
            });
            return Publish {
                carried: Carried::default(),
                doubtful: false,
                then,
                ..publish
            };
        };
        tracing::warn!("{error}; it is tried again");
        publish
    }

    /// Marks every file that may have been carried into a directory that nobody could change yet.
    fn mark_carried(&self, dir: &DirRef) -> Result<()> {
        let opened = self.open_dir(dir)?;
        let shown = dir.shown();
        let entries = dir::list(opened.as_fd()).on("getdents64", Side::Dst, &shown)?;
        for entry in entries {
            let target = Target::At(opened.as_fd(), &entry.name);
            let there = stat::stat_at(opened.as_fd(), entry.name.as_cstr());
            let there = there.on("statx", Side::Dst, shown.join(&entry.name))?;
            // One with several names is never carried, and may be a user's by another name.
            if !there.is_file() || there.size == 0 || there.nlink > 1 {
                continue;
            }
            let marked = self.mark.get(target);
            if marked
                .on("getxattr", Side::Dst, shown.join(&entry.name))?
                .is_some()
            {
                continue;
            }
            // Whether src has a capability is asked when it is hydrated.
            let mark = Mark {
                capability: true,
                ..Mark::pending()
            };
            let set = self.mark.set(target, &mark);
            set.on("setxattr", Side::Dst, shown.join(&entry.name))?;
            if let Some(node) = self.nodes.find(there.key.ino) {
                node.set_origin(
                    dir.origin
                        .as_ref()
                        .map(|o| Origin::of(&o.join(&entry.name))),
                );
                node.set_phase(Phase::Pending);
            }
        }
        Ok(())
    }
}

mod refused;
#[cfg(test)]
mod tests;
