//! Steps: what of a mixed file's rest is asked for next.
//!
//!   large pieces   in the file's order, around what is the users' and what is being changed
//!   close ones     what src could not read in one piece, once all else is here: first in pieces of `CLOSE`, then
//!                  block by block
//!   the end        what is missing then cannot be read; it is tried again when somebody asks for the file
//!
//! Pure but for the map: no call into the kernel.

use std::ops::Range;

use super::super::bytemap::BLOCK;
use super::super::hydrate::{Stage, State};
use super::super::populate::Waiter;
use super::super::turn::overlap;
use crate::engine::job::Priority;
use crate::error::Error;
use crate::ranges::RangeSet;

/// Bytes of one job: a change of some of them waits for it.
const JOB: u64 = 1 << 20;
/// Where src could not read a job's bytes: first in pieces of so many bytes, then block by block.
const CLOSE: u64 = 64 << 10;
/// Jobs of one file at a time.
const JOBS: usize = 4;

/// How far the background is with one mixed file.
#[derive(Default)]
pub(in crate::mirror) struct Fill {
    pub(super) on: bool,
    /// Everything before is here.
    pub(super) to: u64,
    /// src has data up to here, as far as was looked.
    pub(super) looked: u64,
    /// What could not be read in one piece: to be tried in pieces of `CLOSE`, and in blocks.
    pub(super) doubtful: [RangeSet; 2],
    /// Blocks that could not be read in this try; and in this or the last one.
    pub(super) bad: RangeSet,
    pub(super) known_bad: RangeSet,
    /// Why, of the last one; and whether something was asked for in this try.
    pub(super) error: Option<Error>,
    pub(super) tried: bool,
    /// What is known of bad blocks may be of another src.
    pub(super) unsure: bool,
    pub(super) completing: bool,
    /// Jobs in the engine's queue, also those that gave way meanwhile.
    pub(super) queued: usize,
}

pub(super) enum Step {
    Nothing,
    Complete,
    Failed(Failed),
    Look(Range<u64>),
    Job(u64, Range<u64>, Priority),
}

/// A try has ended without some bytes.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) waiters: Vec<Waiter>,
    /// The blocks that could not be read, when nobody has been told yet.
    pub(super) news: Option<Vec<Range<u64>>>,
}

impl Fill {
    /// What an earlier daemon could not read.
    pub(in crate::mirror) fn knows(&mut self, bad: RangeSet) {
        (self.bad, self.known_bad) = (bad.clone(), bad);
    }

    pub(in crate::mirror) fn known_bad(&self) -> &RangeSet {
        &self.known_bad
    }

    /// src could not read some of it.
    pub(in crate::mirror) fn is_odd(&self) -> bool {
        let doubts = self.doubtful.iter().any(|set| !set.is_empty());
        doubts || !self.known_bad.is_empty()
    }

    pub(super) fn begin(&mut self, again: bool) {
        if std::mem::replace(&mut self.on, true) {
            return;
        }
        self.tried = false;
        if again {
            // Each block was looked at by itself.
            for block in std::mem::take(&mut self.bad).iter() {
                self.doubtful[1].insert(block);
            }
            (self.error, self.unsure) = (None, !self.known_bad.is_empty());
        }
    }

    /// src could not read the bytes of a job.
    pub(super) fn failed(&mut self, range: &Range<u64>, error: &Error) {
        let len = range.end - range.start;
        self.error = Some(error.clone());
        if len > BLOCK {
            return self.doubtful[usize::from(len <= CLOSE)].insert(range.clone());
        }
        self.bad.insert(range.clone());
        self.known_bad.insert(range.clone());
    }

    /// Nothing of these bytes is to be asked for now in large pieces.
    fn first_good(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let mut at = range.start;
        'next: while at < range.end {
            for set in self.doubtful.iter().chain([&self.bad]) {
                if let Some(hit) = set.next(at).filter(|hit| hit.start <= at) {
                    at = hit.end;
                    continue 'next;
                }
            }
            let sets = self.doubtful.iter().chain([&self.bad]);
            let next = sets.filter_map(|set| set.next(at)).map(|hit| hit.start);
            return Some(at..next.fold(range.end, u64::min));
        }
        None
    }
}

impl State {
    /// A job goes into the engine's queue; whether that counts.
    pub(in crate::mirror) fn job_queued(&mut self, id: u64) -> bool {
        let fills = self.ranges.iter().any(|r| r.id == id && r.fill.is_some());
        match self.mixed.as_mut().filter(|_| fills) {
            Some(mixed) => mixed.fill.queued += 1,
            None => return false,
        }
        true
    }

    /// Such a job has left the engine's queue.
    pub(in crate::mirror) fn job_taken(&mut self) {
        if let Some(mixed) = &mut self.mixed {
            mixed.fill.queued = mixed.fill.queued.saturating_sub(1);
        }
    }

    fn obstacles(&self) -> impl Iterator<Item = &Range<u64>> {
        let busy = self.mixed.iter().flat_map(|m| m.busy.iter().map(|b| &b.1));
        busy.chain(self.ranges.iter().map(|job| &job.range))
    }

    /// The missing bytes from `start` on, up to `end`, the next job or the next change. `start` is
    /// missing, and nobody is there.
    pub(in crate::mirror) fn piece(&self, start: u64, end: u64) -> Range<u64> {
        let gap = self.first_missing(&(start..end)).unwrap_or(start..start);
        let next = self.obstacles().map(|o| o.start).filter(|s| *s > start);
        gap.start..next.fold(gap.end, u64::min)
    }

    pub(super) fn fill_step(&mut self) -> Step {
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
            Priority::Ahead | Priority::Background => begun + mixed.fill.queued,
        };
        if !mixed.fill.on || under_way >= JOBS {
            return Step::Nothing;
        }
        let looked = mixed.fill.looked;
        let Some(gap) = self.next_gap(first.start) else {
            return match self.next_close() {
                Some(range) => self.fill_job(range, priority, true),
                None => self.fill_stuck(),
            };
        };
        if gap.start >= looked && gap.end - gap.start > JOB {
            return Step::Look(gap);
        }
        let range = gap.start..gap.end.min(gap.start + JOB);
        self.fill_job(range, priority, false)
    }

    fn fill_job(&mut self, range: Range<u64>, priority: Priority, close: bool) -> Step {
        let id = self.new_job(range.clone(), Some(priority));
        if let Some(job) = self.ranges.last_mut() {
            job.close = close;
        }
        if let Some(mixed) = &mut self.mixed {
            mixed.fill.tried = true;
        }
        Step::Job(id, range, priority)
    }

    /// The next missing bytes that nobody pulls or changes and that src can give, as far as is known.
    fn next_gap(&self, from: u64) -> Option<Range<u64>> {
        let mut at = from;
        loop {
            let missing = self.first_missing(&(at..u64::MAX))?;
            let fill = &self.mixed.as_deref()?.fill;
            let Some(good) = fill.first_good(&missing) else {
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

    /// The next piece of what could not be read in a larger one, where nobody is.
    fn next_close(&mut self) -> Option<Range<u64>> {
        for (n, unit) in [(0, CLOSE), (1, BLOCK)] {
            let mut at = 0;
            while let Some(part) = self.mixed.as_ref()?.fill.doubtful[n].next(at) {
                let missing = self.first_missing(&part);
                let fill = &mut self.mixed.as_mut()?.fill;
                let Some(missing) = missing else {
                    fill.doubtful[n].remove(&part); // It has come another way.
                    continue;
                };
                let end = missing.end.min((missing.start / unit + 1) * unit);
                let piece = missing.start..end;
                if self.obstacles().any(|o| overlap(o, &piece)) {
                    at = end;
                    continue;
                }
                let fill = &mut self.mixed.as_mut()?.fill;
                fill.doubtful[n].remove(&(part.start..end));
                return Some(piece);
            }
        }
        None
    }

    /// Nothing more can be asked for. With nothing under way that is the end of the try.
    fn fill_stuck(&mut self) -> Step {
        let idle = self.ranges.is_empty() && self.is_quiet();
        let Some(mixed) = self.mixed.as_mut().filter(|_| idle) else {
            return Step::Nothing;
        };
        let was_on = std::mem::replace(&mut mixed.fill.on, false) && mixed.fill.tried;
        let Some(error) = mixed.fill.error.clone() else {
            return Step::Nothing;
        };
        let fill = &mut mixed.fill;
        let news = was_on.then(|| fill.bad.iter().collect());
        if was_on {
            fill.known_bad = fill.bad.clone();
        }
        let waiters = self.take_waiters();
        match news.is_none() && waiters.is_empty() {
            true => Step::Nothing,
            false => Step::Failed(Failed {
                error,
                waiters,
                news,
            }),
        }
    }
}
