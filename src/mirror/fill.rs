//! Fill: the rest of a mixed file comes, and then it is a plain one.
//!
//!   step      range jobs in the background, some at a time, around what is the users' and what is
//!             being changed; holes of src are not asked for
//!   complete  Mixed -> Settling: everything is durable, changes wait, the mark goes, durably; then the
//!             map (M5)
//!
//! What src cannot read in one piece is asked for in smaller ones when all else is here; what it cannot give
//! is left out and told at the end: users may still write over it, and it is tried again with the file.

mod steps;

use std::ops::Range;
use std::os::fd::AsFd;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::Mirror;
use super::bytemap::BLOCK;
use super::hydrate::{Hydration, Stage, State};
use super::mixed::Ground;
use super::node::{Node, Phase};
use super::ranged::{RangeJob, ReadDone};
use super::turn::overlap;
use crate::engine::job::{Copied, Priority};
use crate::error::{Context, Error, Result, Side};
use crate::meta;
use crate::ranges::RangeSet;
use crate::sys::stat::{self, Stat};
use crate::sys::{copy, fault, fd};
use crate::throttle::Background;
pub(super) use steps::Fill;
use steps::{Failed, Step};

/// Between two looks whether the last change has ended.
const LOOK: Duration = Duration::from_micros(100);

fn bad_block(hydration: &Hydration) -> Error {
    Error::Call {
        call: "read",
        side: Side::Src,
        path: hydration.path.to_path(),
        errno: Errno::IO,
    }
}

impl Mirror {
    /// The rest of the file is to come, also what failed before, unless that was a moment ago.
    pub(super) fn fill(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let again = !self.spoiled.is_fresh(hydration.file.ino);
        self.fill_rest(hydration, again);
    }

    /// The rest of the file is to come; `again`: also what could not be read before.
    pub(super) fn fill_rest(self: &Arc<Self>, hydration: &Arc<Hydration>, again: bool) {
        {
            let mut state = hydration.state.lock();
            let Some(mixed) = &mut state.mixed else {
                return;
            };
            mixed.fill.begin(again);
            if !mixed.fill.bad.is_empty() {
                let error = || bad_block(hydration);
                mixed.fill.error.get_or_insert_with(error);
            }
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
            if state.stage != Stage::Mixed
                || !(mixed.fill.on || idle)
                || self.spoiled.gate.is_shut()
            {
                return;
            }
        }
        let task = move || {
            mirror.fill_steps(&held);
            mirror.let_go(&held);
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn fill_steps(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        self.look_at_src(hydration);
        loop {
            let step = hydration.state.lock().fill_step();
            match step {
                Step::Nothing => return,
                Step::Complete => return self.complete(hydration),
                Step::Failed(failed) => return self.fill_ended(hydration, failed),
                Step::Look(gap) => self.look_for_data(hydration, &gap),
                Step::Job(id, range, priority) => self.submit_range(hydration, id, range, priority),
            }
        }
    }

    /// Nothing more can be had of src for now: what is here is kept, and the rest told.
    fn fill_ended(&self, hydration: &Hydration, failed: Failed) {
        let Failed {
            error,
            waiters,
            news,
        } = failed;
        if let Some(bad) = news {
            // In this order: what is told to be all that is missing is all that is missing after a crash.
            self.keep_pulled_and_place(hydration);
            self.fail_ranges(&hydration.path, &error, &bad, true);
        }
        waiters.into_iter().for_each(|w| w(Err(error.clone())));
    }

    /// M6: a job that fails does not say of which file. So src is looked at before what failed is tried again.
    fn look_at_src(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        {
            let mut state = hydration.state.lock();
            let mixed = state.mixed.as_deref_mut();
            if !mixed.is_some_and(|m| std::mem::take(&mut m.fill.unsure)) {
                return;
            }
        }
        let path = &hydration.path;
        let found = self.open_origin(hydration).and_then(|(dir, name)| {
            let file = fd::open_src(dir.fd.as_fd(), &name).on("open", Side::Src, path)?;
            stat::stat_fd_fresh(file.as_fd()).on("statx", Side::Src, path)
        });
        // The jobs will say what is wrong.
        let Ok(src) = found else { return };
        let same = hydration.state.lock().is_of_same_src(&src);
        if !same {
            let path = path.to_path();
            self.fail(&hydration.path, &Error::SrcChanged { path });
            self.src_was_changed(hydration.file.ino, || ());
            self.leave(hydration, &src);
        }
    }

    /// Where src has a hole dst's is as good.
    fn look_for_data(self: &Arc<Self>, hydration: &Arc<Hydration>, gap: &Range<u64>) {
        let found = self.first_data(hydration, gap);
        let other = {
            let mut state = hydration.state.lock();
            let (data, other) = match found {
                // M6, as for what is pulled.
                Ok((data, src)) if state.is_of_same_src(&src) => (data, None),
                Ok((_, src)) => (gap.start..u64::MAX, Some(src)),
                // The job will say what is wrong.
                Err(_) => (gap.start..u64::MAX, None),
            };
            state.present.insert(gap.start..data.start);
            if let Some(mixed) = &mut state.mixed {
                mixed.fill.looked = data.end;
                mixed.unsaved = true;
                if mixed.apart {
                    self.keep_soon(hydration);
                }
            }
            other
        };
        if let Some(src) = other {
            self.leave(hydration, &src);
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
        let src = stat::stat_fd_fresh(file.as_fd()).on("statx", Side::Src, path)?;
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
        let mut times = None;
        if ground.salvage_of().is_some() {
            times = self.restore_salvaged(hydration, file)?;
        } else {
            self.store_mark(ground, ino)
                .on("setxattr", Side::Dst, path)?;
        }
        let (atime, mtime) = times.unwrap_or_else(|| ground.times());
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
        if state.stage == Stage::Leaving {
            let (mirror, node) = (Arc::clone(self), Arc::clone(node));
            return state.changers.push(Box::new(move |left| match left {
                Ok(()) => mirror.read_pending(&node, range, then),
                Err(e) => then(Err(e)),
            }));
        }
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
        if let Some(error) = self.known_bad(hydration, &state, &gap) {
            drop(state);
            return then(Err(error));
        }
        state.drop_idle_jobs(&gap);
        let busy = state.mixed.as_ref().is_some_and(|m| m.busy_at(&gap));
        let job = state.ranges.iter().find(|job| overlap(&job.range, &gap));
        let job = job.map(|job| (job.id, job.range != gap));
        let (mirror, node, held) = (Arc::clone(self), Arc::clone(node), Arc::clone(hydration));
        let is_wider = job.is_some_and(|(_, wider)| wider);
        let again = move |ready: Result<()>| match ready {
            // Others of its bytes may be the bad ones.
            Err(e) if is_wider && e.is_bad_read() => mirror.read_mixed(&node, &held, range, then),
            Ok(()) => mirror.read_mixed(&node, &held, range, then),
            Err(e) => then(Err(e)),
        };
        let waits = self.waiting(hydration.path.to_path(), again);
        if let Some((id, _)) = job {
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

    /// Bytes that src could not read are left to the background's next try; where there is none, only for a
    /// moment, or while src is away. After `finish` has begun none are asked for.
    fn known_bad(&self, hydration: &Hydration, state: &State, gap: &Range<u64>) -> Option<Error> {
        let fill = &state.mixed.as_ref()?.fill;
        let known = fill.known_bad.next(gap.start);
        let left = self.throttle.background() != Background::Off
            || self.spoiled.is_fresh(hydration.file.ino)
            || self.src_is_away();
        let known = left && known.is_some_and(|bad| bad.start <= gap.start);
        (known || self.spoiled.gate.is_shut()).then(|| bad_block(hydration))
    }

    /// M6: what a range job has brought counts when it is of the same src as all the rest.
    pub(super) fn count_range(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        copied: &Copied,
    ) -> Result<()> {
        let mut state = hydration.state.lock();
        if state.mixed.is_none() {
            return Ok(());
        }
        if !state.is_of_same_src(&copied.src) {
            drop(state);
            self.src_was_changed(hydration.file.ino, || ());
            self.leave(hydration, &copied.src);
            return Err(Error::SrcChanged {
                path: hydration.path.to_path(),
            });
        }
        let job = state.ranges.iter().find(|job| job.id == id);
        if let Some(range) = job.filter(|job| !job.void).map(|job| job.range.clone()) {
            state.present.insert(range);
            if let Some(mixed) = &mut state.mixed {
                mixed.unsaved = true;
                if mixed.apart {
                    self.keep_soon(hydration);
                }
            }
        }
        Ok(())
    }

    /// A range job of a mixed file has failed for good. Bytes that src cannot give are left out; any
    /// other failure would be that of all jobs, and ends this try.
    pub(super) fn fill_failed(&self, hydration: &Hydration, job: &RangeJob, error: &Error) {
        let told = {
            let mut state = hydration.state.lock();
            let waited_for = state.is_waited_for();
            if error.is_bad_read() {
                state.is_worth_a_record();
            }
            let is_mixed = state.stage == Stage::Mixed;
            let Some(mixed) = state.mixed.as_deref_mut().filter(|_| is_mixed) else {
                return;
            };
            if error.is_bad_read() {
                mixed.fill.failed(&job.range, error);
                let len = job.range.end - job.range.start;
                let is_asked = job.fill.is_none();
                drop(state);
                match is_asked && len <= BLOCK {
                    true => {
                        self.fail_ranges(&hydration.path, error, slice::from_ref(&job.range), false)
                    }
                    false if is_asked => self.fail(&hydration.path, error),
                    false => {}
                }
                return;
            }
            if job.fill.is_none() {
                return;
            }
            if matches!(error, Error::Stopped) && waited_for {
                Vec::new() // The background was cancelled: it comes as demand.
            } else if matches!(error, Error::Stopped) {
                mixed.fill.on = false;
                state.take_settled()
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
    /// needed. Else all of it counts for nothing, and the next try takes src as it is by then: a file that no
    /// user has changed is to be pending again for that.
    fn is_of_same_src(&mut self, now: &Stat) -> bool {
        let leaves = self.is_quiet() && self.stage == Stage::Mixed;
        let Some(mixed) = &mut self.mixed else {
            return true;
        };
        let seen = (now.size, now.mtime);
        let of = mixed.ground.salvage_of();
        let same = match of {
            Some(of) => seen == of,
            None => {
                let reaches = now.size >= mixed.ground.src_end();
                reaches && *mixed.src.get_or_insert(seen) == seen
            }
        };
        if same || fault::breaks("M6") {
            return true;
        }
        mixed.src = of;
        // Its bad blocks are others.
        let on = mixed.fill.on;
        let queued = mixed.fill.queued;
        mixed.fill = Fill {
            on,
            queued,
            ..Fill::default()
        };
        self.forget_pulled();
        if of.is_some() && leaves {
            self.stage = Stage::Leaving;
        }
        false
    }

    /// What is here of src's bytes counts for nothing.
    pub(super) fn forget_pulled(&mut self) {
        (self.present, self.sure) = (RangeSet::new(), RangeSet::new());
        self.ranges.iter_mut().for_each(|job| job.void = true);
        if let Some(mixed) = &mut self.mixed {
            (mixed.fill.to, mixed.fill.looked) = (0, 0);
            // From now on no job runs over the bytes of another.
            (mixed.apart, mixed.stale, mixed.unsaved) = (true, true, false);
            mixed.epoch += 1;
        }
    }

    /// src cannot read some of it: what is here should stay.
    fn is_worth_a_record(&mut self) {
        if self.mixed.as_ref().is_some_and(|m| !m.apart) {
            self.forget_pulled();
        }
    }

    /// Nobody waits for it or works on it, and nothing more is to come by itself.
    pub(super) fn is_idle(&self) -> bool {
        let waits = [&self.readers, &self.writers, &self.settled, &self.changers];
        let filled = self.mixed.as_ref().is_none_or(|m| !m.fill.on);
        let quiet = self.ranges.is_empty() && self.is_quiet();
        filled && quiet && waits.iter().all(|w| w.is_empty())
    }

    /// No change is under way.
    pub(super) fn is_quiet(&self) -> bool {
        self.mixed.as_ref().is_none_or(|m| m.busy.is_empty())
    }
}
