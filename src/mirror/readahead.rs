//! Readahead: what a sequential reader of a large pending file comes to next, pulled before he asks.
//!
//! Where src keeps each request waiting, who reads a file in order would wait for one unit after the other
//! (ranged.rs). So range jobs are kept in flight in front of him, in a lane behind all demand:
//!
//!   nothing -> window   two units were read in order, one more is waited for, and src is slow
//!   window  -> twice    half of it was read, and some of that was waited for; up to `WINDOW`
//!   window  -> nothing  src answers at once, a job ahead has failed, the whole-file job is just in front
//!
//! A read of what is on its way waits for it (`Mirror::join_ahead`), and a job that no worker has is demand
//! from then on. A job ahead that fails has failed for nobody: who waits asks again for himself. It has no
//! memory of its own, as its bytes are read from dst; dst has them as it has those of any range (I6).
//!
//! Several readers of one file have a stream each; who reads here and there has none. No more than what he
//! touches is pulled for him. Upholds I9: a window for each stream at most.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::Mirror;
use super::hydrate::{FileRef, Hydration, Stage, State};
use super::node::Node;
use super::ranged::{RANGE_UNIT, ReadDone};
use super::source::SrcInfo;
use super::turn::overlap;
use crate::engine::job::Priority;

/// The most that is asked for in front of one reader, bytes.
const WINDOW: u64 = 8 << 20;
/// The first window, and what was read in order before it opens, bytes.
const FIRST: u64 = 2 * RANGE_UNIT;
/// The most that one job brings, bytes: each opens the file.
const PIECE: u64 = 1 << 20;
/// A src whose first bytes take longer than this for most jobs is slow.
const SLOW_NS: u64 = 500_000;
/// Readers of one file that are told apart.
const STREAMS: usize = 4;
/// The whole-file job brings what is so close in front of it, bytes.
const SOON: u64 = WINDOW / 2;

/// The readers of one file, and what is known of src. Pure.
#[derive(Default)]
pub(super) struct Readahead {
    streams: Vec<Stream>,
    reads: u64,
    mean_ns: u64,
    /// Up to here the whole-file job has come.
    pub(super) whole_at: u64,
}

/// One reader.
struct Stream {
    start: u64,
    at: u64,
    /// Up to here it was asked for; more than `at` only while there is a window.
    to: u64,
    window: u64,
    /// Something of this window was not here when it was read.
    waited: bool,
    /// A job ahead has failed: nothing is asked for before this.
    not_before: u64,
    /// When it was last read.
    last: u64,
}

/// What follows from a read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// To be asked for, in pieces of so many bytes.
    ask: Range<u64>,
    piece: u64,
    /// Nobody comes to this any more.
    left: Range<u64>,
}

impl Readahead {
    /// How long the first bytes of a job took.
    pub(super) fn note(&mut self, took: Duration) {
        // Clipped, as in crowd.rs: three that waited in a row are slow, and one that met a busy CPU is not.
        let ns = u64::try_from(took.as_nanos()).map_or(2 * SLOW_NS, |n| n.min(2 * SLOW_NS));
        self.mean_ns = (self.mean_ns * 3 + ns) / 4;
    }

    /// Somebody reads these bytes. `waits`: not all are here. `may`: something can be asked for.
    fn read(&mut self, read: &Range<u64>, waits: bool, may: bool) -> Step {
        self.reads += 1;
        let may = may && self.mean_ns > SLOW_NS;
        let Some(found) = self.streams.iter().position(|s| s.has(read)) else {
            return self.begin(read);
        };
        let stream = &mut self.streams[found];
        stream.last = self.reads;
        stream.at = stream.at.max(read.end);
        stream.waited |= waits;
        let ask = stream.next(may);
        let len = (read.end - read.start).next_multiple_of(RANGE_UNIT);
        let piece = (stream.window / 4).clamp(RANGE_UNIT, PIECE).max(len);
        Step {
            ask,
            piece,
            left: 0..0,
        }
    }

    fn begin(&mut self, read: &Range<u64>) -> Step {
        let mut left = 0..0;
        if self.streams.len() == STREAMS {
            let oldest = (0..STREAMS).min_by_key(|n| self.streams[*n].last);
            let gone = self.streams.swap_remove(oldest.unwrap_or(0));
            left = gone.at..gone.to.max(gone.at);
        }
        self.streams.push(Stream {
            start: read.start,
            at: read.end,
            to: 0,
            window: 0,
            waited: false,
            not_before: 0,
            last: self.reads,
        });
        Step {
            left,
            ..Step::default()
        }
    }

    /// A job ahead has failed.
    pub(super) fn failed(&mut self, range: &Range<u64>) {
        for stream in &mut self.streams {
            if range.end > stream.at && range.start < stream.to {
                stream.not_before = range.end;
                stream.close();
            }
        }
    }
}

impl Stream {
    /// A read that goes on where it is; the kernel's come a little out of order.
    fn has(&self, read: &Range<u64>) -> bool {
        read.start <= self.at + RANGE_UNIT && read.end + RANGE_UNIT > self.at
    }

    fn close(&mut self) {
        (self.window, self.waited) = (0, false);
    }

    /// What is to be asked for now.
    fn next(&mut self, may: bool) -> Range<u64> {
        if !may || self.at < self.not_before {
            self.close();
            return 0..0;
        }
        let here = self.at.next_multiple_of(RANGE_UNIT);
        if self.window == 0 {
            if !self.waited || self.at - self.start < FIRST {
                self.waited = false;
                return 0..0;
            }
            (self.window, self.to) = (FIRST, here);
        } else if self.to.saturating_sub(self.at) > self.window / 2 {
            return 0..0;
        } else if self.waited {
            self.window = (self.window * 2).min(WINDOW);
        }
        self.waited = false;
        let from = self.to.max(here);
        self.to = from.max(here + self.window);
        from..self.to
    }
}

impl Mirror {
    /// A user reads these bytes of a pending file: what comes next is asked for, if that helps. His own
    /// were asked for before.
    pub(super) fn read_ahead(self: &Arc<Self>, node: &Node, info: SrcInfo, read: &Range<u64>) {
        let Some(hydration) = self.hydrations.find(node.ino, &node.anchor) else {
            return;
        };
        let may = !self.progress.dst_full.load(Ordering::Relaxed)
            && !self.src_is_away()
            && !self.stopping()
            && !self.spoiled.contains(node.ino)
            && !self.spoiled.gate.is_shut();
        let jobs = {
            let mut state = hydration.state.lock();
            let followed = state.is_followed(read, self.throttle.is_open());
            state.ask_ahead(read, info.size, may && !followed)
        };
        for (id, range) in jobs {
            self.ask_range(&hydration, id, range, Priority::Ahead);
        }
    }

    /// What a read lacks first is on its way for nobody, or for others who read in order: it waits for that,
    /// and then looks again. Else everything comes back.
    pub(super) fn join_ahead<'a>(
        self: &Arc<Self>,
        node: &Arc<Node>,
        info: SrcInfo,
        (hydration, mut state): (&Arc<Hydration>, MutexGuard<'a, State>),
        range: &Range<u64>,
        then: ReadDone,
    ) -> Option<(MutexGuard<'a, State>, ReadDone)> {
        let gap = state.present.first_gap(range);
        let ahead = gap.and_then(|gap| {
            let mut jobs = state.ranges.iter_mut();
            jobs.find(|job| job.ahead && job.range.contains(&gap.start))
        });
        let Some(job) = ahead else {
            return Some((state, then));
        };
        let (mirror, node, asked) = (Arc::clone(self), Arc::clone(node), range.clone());
        let again = move |ready| match ready {
            Ok(()) if node.is_pending_file() => mirror.read_range(&node, info, asked, then),
            Ok(()) => {
                let path = node.origin().map(|o| o.path()).unwrap_or_default();
                then(mirror.read_here(&FileRef::of(&node), &path, asked));
            }
            Err(e) => then(Err(e)),
        };
        job.after
            .push(self.waiting(hydration.path.to_path(), again));
        // In the engine's queue it is behind all demand; the first of the two that is taken does it.
        let queued = !job.begun && !std::mem::replace(&mut job.promoted, true);
        let queued = queued.then(|| (job.id, job.range.clone()));
        drop(state);
        match queued {
            Some((id, range)) => self.demand_range(hydration, id, range),
            // A worker has it: its reads may wait for a buffer.
            None => self.engine.come_to(),
        }
        None
    }
}

impl State {
    /// The whole-file job, which nothing holds back, brings these bytes in a moment.
    fn is_followed(&self, read: &Range<u64>, open: bool) -> bool {
        let goes = self.stage == Stage::Copying && (open || self.is_waited_for());
        goes && read.end < self.readahead.whole_at + SOON
    }

    /// New jobs in front of who reads.
    fn ask_ahead(&mut self, read: &Range<u64>, size: u64, may: bool) -> Vec<(u64, Range<u64>)> {
        let read = read.start.min(size)..read.end.min(size);
        if !matches!(self.stage, Stage::Queued | Stage::Copying) || read.is_empty() {
            return Vec::new();
        }
        let waits = !self.present.contains(&read);
        let step = self.readahead.read(&read, waits, may);
        self.drop_idle_jobs(&step.left);
        let mut jobs = Vec::new();
        let (mut at, end) = (step.ask.start, step.ask.end.min(size));
        while at < end {
            let piece = at..(at + step.piece).min(end);
            let Some(gap) = self.present.first_gap(&piece) else {
                at = piece.end;
                continue;
            };
            let mut others = self.ranges.iter().filter(|job| overlap(&job.range, &gap));
            let near = others.clone().map(|job| job.range.start).min();
            if let Some(inside) = others.find(|job| job.range.contains(&gap.start)) {
                at = inside.range.end;
                continue;
            }
            let gap = gap.start..near.unwrap_or(gap.end);
            at = gap.end;
            let id = self.new_job(gap.clone(), None);
            if let Some(job) = self.ranges.last_mut() {
                job.ahead = true;
            }
            jobs.push((id, gap));
        }
        jobs
    }
}

#[cfg(test)]
mod guards;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNIT: u64 = RANGE_UNIT;
    /// As the kernel's readahead asks.
    const READ: u64 = 128 << 10;

    fn on(took: Duration) -> Readahead {
        let mut readahead = Readahead::default();
        (0..3).for_each(|_| readahead.note(took));
        readahead
    }

    fn slow() -> Readahead {
        on(Duration::from_millis(1))
    }

    /// Reads in order; what is asked for. `waits`: whether a read has to wait.
    fn in_order(r: &mut Readahead, read: Range<u64>, waits: impl Fn(u64) -> bool) -> Vec<Step> {
        let reads = read.step_by(READ as usize);
        let steps = reads.map(|at| r.read(&(at..at + READ), waits(at), true));
        steps.filter(|step| !step.ask.is_empty()).collect()
    }

    #[test]
    fn a_source_that_answers_at_once_is_asked_for_nothing_ahead() {
        let mut fast = on(Duration::from_micros(100));
        assert_eq!(in_order(&mut fast, 0..64 << 20, |_| true), []);
        assert_eq!(
            in_order(&mut Readahead::default(), 0..64 << 20, |_| true),
            []
        );
    }

    #[test]
    fn one_call_that_met_a_busy_cpu_makes_no_source_slow_and_three_that_waited_do() {
        let mut r = on(Duration::from_micros(100));
        for n in 0..1000 {
            let busy = n % 4 == 0;
            r.note(Duration::from_micros(if busy { 50_000 } else { 100 }));
            assert!(r.mean_ns <= SLOW_NS, "after {n}");
        }
        (0..3).for_each(|_| r.note(Duration::from_millis(5)));
        assert!(r.mean_ns > SLOW_NS);
    }

    #[test]
    fn the_window_opens_behind_two_units_and_doubles_while_the_reader_waits() {
        let steps = in_order(&mut slow(), 0..64 << 20, |_| true);
        assert_eq!(steps[0].ask, 2 * UNIT..4 * UNIT);
        // Without a gap, in larger pieces, and never further than the window.
        for pair in steps.windows(2) {
            assert_eq!(pair[0].ask.end, pair[1].ask.start);
            assert!(pair[0].piece <= pair[1].piece && pair[1].piece <= PIECE);
        }
        let mut r = slow();
        let mut widest = 0;
        for at in (0..64 << 20).step_by(READ as usize) {
            r.read(&(at..at + READ), true, true);
            widest = widest.max(r.streams[0].to.saturating_sub(at + READ));
        }
        assert!(
            (WINDOW - UNIT..=WINDOW + UNIT).contains(&widest),
            "{widest}"
        );
    }

    #[test]
    fn the_window_does_not_grow_for_who_waits_no_more() {
        let mut r = slow();
        in_order(&mut r, 0..2 << 20, |_| true);
        let window = r.streams[0].window;
        assert!(window > 0 && window < WINDOW, "{window}");
        let steps = in_order(&mut r, 2 << 20..64 << 20, |_| false);
        // The last read of the first part may count for the second one's first step.
        assert!(r.streams[0].window <= 2 * window, "{}", r.streams[0].window);
        assert_eq!(steps.last().map(|step| step.ask.end > 64 << 20), Some(true));
    }

    #[test]
    fn who_reads_one_unit_only_or_here_and_there_is_asked_for_nothing_ahead() {
        let mut r = slow();
        assert_eq!(in_order(&mut r, 0..2 * UNIT - READ, |_| true), []);
        for n in 0..1000_u64 {
            let at = (n * 7919 % 1000) * 4 * UNIT;
            let step = r.read(&(at..at + 4096), true, true);
            assert!(step.ask.is_empty(), "{step:?}");
        }
    }

    #[test]
    fn a_seek_begins_anew_and_what_nobody_comes_to_is_left() {
        let mut r = slow();
        in_order(&mut r, 0..8 << 20, |_| true);
        let to = r.streams[0].to;
        assert_eq!(in_order(&mut r, 1 << 30..(1 << 30) + UNIT, |_| true), []);
        let next = (1 << 30) + UNIT;
        let steps = in_order(&mut r, next..next + 2 * UNIT, |_| true);
        assert_eq!(steps[0].ask.end - steps[0].ask.start, FIRST);
        // Three more readers, and the first one is forgotten.
        let far = |n: u64| (n << 31)..(n << 31) + READ;
        let left: Vec<_> = (1..4).map(|n| r.read(&far(n), true, true).left).collect();
        assert_eq!(left, [0..0, 0..0, 8 << 20..to]);
    }

    #[test]
    fn nothing_is_asked_for_again_before_the_end_of_what_has_failed() {
        let mut r = slow();
        in_order(&mut r, 0..4 << 20, |_| true);
        let failed = (5 << 20)..(6 << 20);
        r.failed(&failed);
        assert_eq!(in_order(&mut r, 4 << 20..(6 << 20) - READ, |_| true), []);
        let steps = in_order(&mut r, (6 << 20) - READ..8 << 20, |_| true);
        assert_eq!(steps[0].ask, 6 << 20..(6 << 20) + FIRST);
        // What is nowhere near is somebody else's.
        r.failed(&(1 << 40..(1 << 40) + UNIT));
        assert!(r.streams[0].window > 0);
    }

    proptest! {
        /// Whatever happens: no stream asks for a byte behind its reader or further than the window, none
        /// asks where it must not, and there are never more streams than there may be.
        #[test]
        fn no_reader_is_asked_for_more_than_a_window(
            events in prop::collection::vec((0u8..8, 0u64..64, prop::bool::ANY, prop::bool::weighted(0.9)), 0..400),
        ) {
            let mut r = slow();
            let mut at = [0, 1 << 30, 2 << 30];
            for (what, n, waits, may) in events {
                match what {
                    0 => at[n as usize % 3] = n * (5 << 20),
                    1 => r.failed(&(n * UNIT..(n + 4) * UNIT)),
                    2 => r.note(Duration::from_micros(n * 50)),
                    _ => {
                        let reader = &mut at[what as usize % 3];
                        let read = *reader..*reader + (n + 1) * 4096;
                        *reader = read.end;
                        let is_slow = r.mean_ns > SLOW_NS;
                        let step = r.read(&read, waits, may);
                        let ask = &step.ask;
                        prop_assert!(ask.is_empty() || may && is_slow);
                        let stream = r.streams.iter().find(|s| s.last == r.reads).expect("his");
                        if !ask.is_empty() {
                            prop_assert!(ask.start >= stream.at && ask.start.is_multiple_of(UNIT));
                            prop_assert!(ask.end <= stream.at + WINDOW + UNIT);
                            prop_assert!(stream.at >= stream.not_before);
                        }
                        prop_assert!(stream.window <= WINDOW);
                        prop_assert!((UNIT..=PIECE).contains(&step.piece) || ask.is_empty());
                    }
                }
                prop_assert!(r.streams.len() <= STREAMS);
            }
        }
    }
}
