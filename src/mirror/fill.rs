//! Fill: the rest of a mixed file comes, and then it is a plain one.
//!
//!   step      range jobs in the background, some at a time, around what is the users' and what is
//!             being changed; holes of src are not asked for
//!   complete  Mixed -> Settling: everything is durable, changes wait, the mark goes, durably; then the
//!             map (M5)
//!
//! What src cannot give is left out and told at the end: users may still write over it.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::Mirror;
use super::hydrate::{Hydration, Stage, State};
use super::mixed::{Ground, Mixed};
use super::node::{Node, Phase};
use super::populate::Waiter;
use super::ranged::{RangeJob, ReadDone};
use super::turn::overlap;
use crate::engine::job::{Copied, Priority};
use crate::error::{Context, Error, Result, Side};
use crate::meta;
use crate::ranges::RangeSet;
use crate::sys::stat::{self, Stat};
use crate::sys::{copy, fault, fd};

/// Bytes of one job: a change of some of them waits for it.
const JOB: u64 = 1 << 20;
/// Jobs of one file at a time.
const JOBS: usize = 4;
/// Between two looks whether the last change has ended.
const LOOK: Duration = Duration::from_micros(100);

/// How far the background is with one mixed file.
#[derive(Default)]
pub(super) struct Fill {
    on: bool,
    /// Everything before is here.
    to: u64,
    /// src has data up to here, as far as was looked.
    looked: u64,
    /// What could not be pulled, and why.
    bad: RangeSet,
    error: Option<Error>,
    completing: bool,
    /// Jobs in the engine's queue, also those that gave way meanwhile.
    queued: usize,
}

enum Step {
    Nothing,
    Complete,
    Failed(Error, Vec<Waiter>),
    Look(Range<u64>),
    Job(u64, Range<u64>, Priority),
}

impl Mirror {
    /// The rest of the file is to come, also what failed before.
    pub(super) fn fill(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        {
            let mut state = hydration.state.lock();
            let Some(mixed) = &mut state.mixed else {
                return;
            };
            (mixed.fill.on, mixed.fill.error) = (true, None);
            mixed.fill.bad = RangeSet::new();
        }
        self.fill_on(hydration);
    }

    /// Something has changed: the next steps, on a pool thread, if there are any.
    pub(super) fn fill_on(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let (mirror, held) = (Arc::clone(self), Arc::clone(hydration));
        {
            let state = hydration.state.lock();
            let Some(mixed) = state.mixed.as_ref() else {
                return;
            };
            let idle = state.ranges.is_empty() && mixed.busy.is_empty();
            // Without the background only the end is to be found.
            if state.stage != Stage::Mixed || !(mixed.fill.on || idle) {
                return;
            }
        }
        let task = move || mirror.fill_steps(&held);
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn fill_steps(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        loop {
            let step = hydration.state.lock().fill_step();
            match step {
                Step::Nothing => return,
                Step::Complete => return self.complete(hydration),
                Step::Failed(error, waiters) => {
                    return waiters.into_iter().for_each(|w| w(Err(error.clone())));
                }
                Step::Look(gap) => self.look_for_data(hydration, &gap),
                Step::Job(id, range, priority) => self.submit_range(hydration, id, range, priority),
            }
        }
    }

    /// Where src has a hole dst's is as good.
    fn look_for_data(&self, hydration: &Hydration, gap: &Range<u64>) {
        let found = self.first_data(hydration, gap);
        let mut state = hydration.state.lock();
        let data = match found {
            // M6, as for what is pulled.
            Ok((data, src)) if state.is_of_same_src(&src) => data,
            // The job will say what is wrong.
            _ => gap.start..u64::MAX,
        };
        state.present.insert(gap.start..data.start);
        if let Some(mixed) = &mut state.mixed {
            mixed.fill.looked = data.end;
        }
    }

    /// The first bytes of `gap` that have to be pulled: data of src, or of dst (what is left there of
    /// an earlier try is not src's any more).
    fn first_data(&self, hydration: &Hydration, gap: &Range<u64>) -> Result<(Range<u64>, Stat)> {
        let path = &hydration.path;
        let Some((dst, dir, name)) = self.prepare(hydration)? else {
            return Err(Error::Stopped);
        };
        let file = fd::open_src(dir.fd.as_fd(), &name).on("open", Side::Src, path)?;
        let theirs = copy::next_data(file.as_fd(), gap.start, gap.end);
        let theirs = theirs.on("lseek", Side::Src, path)?;
        let theirs = theirs.unwrap_or(gap.end..gap.end);
        let ours = copy::next_data(dst.as_fd(), gap.start, theirs.start.min(gap.end));
        let ours = ours.on("lseek", Side::Dst, path)?;
        let start = ours.map_or(theirs.start, |ours| ours.start);
        // After the look: what was changed before it is seen.
        let src = stat::stat_fd(file.as_fd()).on("statx", Side::Src, path)?;
        Ok((start.clamp(gap.start, gap.end)..theirs.end, src))
    }

    /// M5: every byte is in dst.
    fn complete(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let _inside = self.marks.enter();
        let ground = {
            let mut state = hydration.state.lock();
            let whole = state.stage == Stage::Mixed
                && state.ranges.is_empty()
                && state.first_missing(&(0..u64::MAX)).is_none();
            match &mut state.mixed {
                Some(mixed) if whole && !mixed.fill.completing => {
                    mixed.fill.completing = true;
                    Arc::clone(&mixed.ground)
                }
                _ => return,
            }
        };
        fault::point("mixed-full");
        let (path, losses) = (&hydration.path, ground.losses.load(Ordering::Acquire));
        // The most of it while users go on.
        let sync = || fd::fdatasync(ground.file.as_fd());
        let synced = fault::unless_broken("M5", sync).on("fdatasync", Side::Dst, path);
        {
            let mut state = hydration.state.lock();
            if !state.settles() {
                drop(state);
                return self.fill_on(hydration);
            }
        }
        while !hydration.state.lock().is_quiet() {
            std::thread::sleep(LOOK);
        }
        let done = synced.and_then(|()| self.take_mixed_mark(hydration, &ground, losses));
        if let Err(e) = done {
            return self.fail_hydration(hydration, e);
        }
        self.note_file_phase(&hydration.file, Phase::Unmarked);
        fault::point("mixed-unmarked");
        if let Err(errno) = fd::fsync(ground.file.as_fd()) {
            let failed = Err::<(), _>(errno).on("fsync", Side::Dst, path);
            return self.unmarked_only(hydration, &failed.err().unwrap_or(Error::Stopped));
        }
        let ino = hydration.file.ino;
        self.source.unlearn(ino);
        self.settle_ledger(path);
        self.mend(ino);
        self.count_pulled(ground.src_end());
        self.remove_map(hydration);
        fault::point("mixed-forgotten");
        self.end(hydration, Ok(()));
    }

    /// What users wrote must not be lost by the mark's going: it may be durable before they sync.
    fn take_mixed_mark(&self, hydration: &Hydration, ground: &Ground, losses: u64) -> Result<()> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        let file = ground.file.as_fd();
        let mut synced = fault::unless_broken("M5", || fd::fdatasync(file));
        if ground.losses.load(Ordering::Acquire) != losses {
            synced = Err(Errno::IO); // A user has heard of it; what was pulled is lost too.
        }
        synced.on("fdatasync", Side::Dst, path)?;
        self.store_mark(ground, ino)
            .on("setxattr", Side::Dst, path)?;
        let (atime, mtime) = ground.times();
        meta::set_times_fd(file, atime, mtime).on("utimensat", Side::Dst, path)?;
        self.partials.note_unmark(&hydration.file);
        let _guard = self.lock_perms(ino);
        self.take_mark(file).on("removexattr", Side::Dst, path)
    }

    /// Reads from a mixed file: what is missing comes first. `then` is called once.
    pub(super) fn read_mixed(
        self: &Arc<Self>,
        node: &Arc<Node>,
        hydration: &Arc<Hydration>,
        range: Range<u64>,
        then: ReadDone,
    ) {
        let mut state = hydration.state.lock();
        let gap = match state.stage {
            Stage::Mixed => state.first_missing(&range),
            // All here; or it failed, and the read will say so.
            _ => None,
        };
        let over = state.stage == Stage::Over;
        let Some(gap) = gap else {
            drop(state);
            if over && node.is_pending_file() {
                return self.read_pending(node, range, then);
            }
            return then(self.read_here(&hydration.file, &hydration.path, range));
        };
        state.drop_idle_jobs(&gap);
        let busy = state.mixed.as_ref().is_some_and(|m| m.busy_at(&gap));
        let job = state.ranges.iter().find(|job| overlap(&job.range, &gap));
        let job = job.map(|job| job.id);
        let (mirror, node, held) = (Arc::clone(self), Arc::clone(node), Arc::clone(hydration));
        let again = move |ready: Result<()>| match ready {
            Ok(()) => mirror.read_mixed(&node, &held, range, then),
            Err(e) => then(Err(e)),
        };
        let waits = self.waiting(hydration.path.to_path(), again);
        if let Some(id) = job {
            state.after(id, waits);
            drop(state);
            return self.engine.hurry();
        }
        if busy {
            if let Some(mixed) = &mut state.mixed {
                mixed.waiting.push(waits);
            }
            return;
        }
        let unit = match self.spoiled.contains(hydration.file.ino) {
            true => gap.end - gap.start,
            false => super::ranged::RANGE_UNIT,
        };
        let piece = state.piece(gap.start, gap.start + unit.max(gap.end - gap.start));
        let id = state.new_job(piece.clone(), None);
        state.after(id, waits);
        drop(state);
        self.demand_range(hydration, id, piece);
    }

    /// M6: what a range job has brought counts when it is of the same src as all the rest.
    pub(super) fn count_range(
        &self,
        hydration: &Hydration,
        id: u64,
        copied: &Copied,
    ) -> Result<()> {
        let mut state = hydration.state.lock();
        if state.mixed.is_none() {
            return Ok(());
        }
        if !state.is_of_same_src(&copied.src) {
            drop(state);
            self.src_was_changed(hydration.file.ino);
            return Err(Error::SrcChanged {
                path: hydration.path.to_path(),
            });
        }
        let job = state.ranges.iter().find(|job| job.id == id);
        if let Some(range) = job.filter(|job| !job.void).map(|job| job.range.clone()) {
            state.present.insert(range);
        }
        Ok(())
    }

    /// A range job of a mixed file has failed for good. Bytes that src cannot give are left out; any
    /// other failure would be that of all jobs, and ends this try.
    pub(super) fn fill_failed(&self, hydration: &Hydration, job: &RangeJob, error: &Error) {
        let told = {
            let mut state = hydration.state.lock();
            let waited_for = state.is_waited_for();
            let Some(mixed) = state.mixed.as_deref_mut().filter(|_| job.fill.is_some()) else {
                return;
            };
            if matches!(error, Error::Stopped) && waited_for {
                Vec::new() // The background was cancelled: it comes as demand.
            } else if matches!(error, Error::Stopped) {
                mixed.fill.on = false;
                state.take_settled()
            } else if error.is_bad_read() {
                mixed.fill.bad.insert(job.range.clone());
                mixed.fill.error = Some(error.clone());
                Vec::new()
            } else {
                mixed.fill.on = false;
                state.take_waiters()
            }
        };
        told.into_iter().for_each(|w| w(Err(error.clone())));
    }
}

impl State {
    /// Changes wait from now on, unless bytes are missing again.
    fn settles(&mut self) -> bool {
        let whole = self.stage == Stage::Mixed
            && self.ranges.is_empty()
            && self.first_missing(&(0..u64::MAX)).is_none();
        match (whole, &mut self.mixed) {
            (true, _) => self.stage = Stage::Settling,
            (false, Some(mixed)) => mixed.fill.completing = false,
            (false, None) => {}
        }
        whole
    }

    /// M6: src is the file that all which is here was pulled from, and reaches as far as it is
    /// needed. Else all of it counts for nothing, and the next try takes src as it is by then.
    fn is_of_same_src(&mut self, now: &Stat) -> bool {
        let Some(mixed) = &mut self.mixed else {
            return true;
        };
        let seen = (now.size, now.mtime);
        let reaches = now.size >= mixed.ground.src_end();
        if reaches && *mixed.src.get_or_insert(seen) == seen || fault::breaks("M6") {
            return true;
        }
        mixed.src = None;
        self.forget_pulled();
        false
    }

    /// What is here of src's bytes counts for nothing.
    pub(super) fn forget_pulled(&mut self) {
        self.present = RangeSet::new();
        self.ranges.iter_mut().for_each(|job| job.void = true);
        if let Some(mixed) = &mut self.mixed {
            (mixed.fill.to, mixed.fill.looked) = (0, 0);
        }
    }

    /// A job goes into the engine's queue; whether that counts.
    pub(super) fn job_queued(&mut self, id: u64) -> bool {
        let fills = self.ranges.iter().any(|r| r.id == id && r.fill.is_some());
        match self.mixed.as_mut().filter(|_| fills) {
            Some(mixed) => mixed.fill.queued += 1,
            None => return false,
        }
        true
    }

    /// Such a job has left the engine's queue.
    pub(super) fn job_taken(&mut self) {
        if let Some(mixed) = &mut self.mixed {
            mixed.fill.queued = mixed.fill.queued.saturating_sub(1);
        }
    }

    /// No change is under way.
    fn is_quiet(&self) -> bool {
        self.mixed.as_ref().is_none_or(|m| m.busy.is_empty())
    }

    fn obstacles(&self) -> impl Iterator<Item = &Range<u64>> {
        let busy = self.mixed.iter().flat_map(|m| m.busy.iter().map(|b| &b.1));
        busy.chain(self.ranges.iter().map(|job| &job.range))
    }

    /// The missing bytes from `start` on, up to `end`, the next job or the next change. `start` is
    /// missing, and nobody is there.
    pub(super) fn piece(&self, start: u64, end: u64) -> Range<u64> {
        let gap = self.first_missing(&(start..end)).unwrap_or(start..start);
        let next = self.obstacles().map(|o| o.start).filter(|s| *s > start);
        gap.start..next.fold(gap.end, u64::min)
    }

    fn fill_step(&mut self) -> Step {
        if self.stage != Stage::Mixed {
            return Step::Nothing;
        }
        let priority = self.lane();
        if priority == Priority::Demand {
            // What is held in the background's lane comes now.
            self.drop_idle_jobs(&(0..u64::MAX));
        }
        let from = self.mixed.as_ref().map_or(0, |m| m.fill.to);
        let Some(first) = self.first_missing(&(from..u64::MAX)) else {
            return match self.ranges.is_empty() {
                true => Step::Complete,
                false => Step::Nothing,
            };
        };
        let fills = self.ranges.iter().filter(|job| job.fill.is_some());
        let (live, begun) = fills.fold((0, 0), |(all, begun), job| {
            (all + 1, begun + usize::from(job.begun))
        });
        let Some(mixed) = &mut self.mixed else {
            return Step::Nothing;
        };
        mixed.fill.to = first.start;
        let under_way = match priority {
            Priority::Demand => live,
            // What gave way is still in the queue: it must not grow without end.
            Priority::Background => begun + mixed.fill.queued,
        };
        if !mixed.fill.on || under_way >= JOBS {
            return Step::Nothing;
        }
        let looked = mixed.fill.looked;
        let Some(gap) = self.next_gap(first.start) else {
            return self.fill_stuck();
        };
        if gap.start >= looked && gap.end - gap.start > JOB {
            return Step::Look(gap);
        }
        let range = gap.start..gap.end.min(gap.start + JOB);
        let id = self.new_job(range.clone(), Some(priority));
        Step::Job(id, range, priority)
    }

    /// The next missing bytes that nobody pulls or changes and that src can give, as far as is known.
    fn next_gap(&self, from: u64) -> Option<Range<u64>> {
        let mut at = from;
        loop {
            let missing = self.first_missing(&(at..u64::MAX))?;
            let bad = self.mixed.as_deref().map(bad_of)?;
            let Some(good) = bad.first_gap(&missing) else {
                at = missing.end;
                continue;
            };
            let inside = self.obstacles().find(|o| o.contains(&good.start));
            match inside {
                Some(obstacle) => at = obstacle.end,
                None => {
                    let next = self.obstacles().map(|o| o.start);
                    let next = next.filter(|s| *s > good.start);
                    return Some(good.start..next.fold(good.end, u64::min));
                }
            }
        }
    }

    /// Nothing more can be asked for. With nothing under way that is the end of the try.
    fn fill_stuck(&mut self) -> Step {
        let idle = self.ranges.is_empty() && self.is_quiet();
        let Some(mixed) = self.mixed.as_mut().filter(|_| idle) else {
            return Step::Nothing;
        };
        mixed.fill.on = false;
        match mixed.fill.error.take() {
            Some(error) => Step::Failed(error, self.take_waiters()),
            None => Step::Nothing,
        }
    }
}

fn bad_of(mixed: &Mixed) -> &RangeSet {
    &mixed.fill.bad
}
