//! Turns: when a change of a mixed file may be made, and what is missing of one.
//!
//! A change has the blocks that it is about for itself: no range job runs there, and none begins
//! there until it is over. Two changes may have the same blocks: the kernel orders users' writes.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::MutexGuard;

use super::Mirror;
use super::bytemap::{BLOCK, blocks};
use super::hydrate::{Hydration, State};
use super::mixed::{Ground, Work};
use super::node::Node;
use crate::error::{Context, Side};

/// The bytes that a change is about.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub(super) range: Range<u64>,
    /// Blocks at its ends that it changes in part keep the rest.
    pub(super) edges: bool,
}

enum Turn {
    Mine(u64, Arc<Ground>),
    Wait,
    Pull(u64, Range<u64>),
}

impl Mirror {
    pub(super) fn take_turn(
        self: &Arc<Self>,
        node: &Arc<Node>,
        hydration: &Arc<Hydration>,
        mut state: MutexGuard<'_, State>,
        span: Span,
        work: Work,
    ) {
        match state.turn(&span) {
            Turn::Mine(id, ground) => {
                drop(state);
                let owned = self.now_users(&ground, node.ino);
                let owned = owned.on("setxattr", Side::Dst, node.display_name());
                work(self, owned.map(|()| Some(ground)));
                self.turn_over(hydration, id);
            }
            Turn::Wait => {
                let again = self.again(node, span, work);
                let told = self.waiting(hydration.path.to_path(), again);
                if let Some(mixed) = &mut state.mixed {
                    mixed.waiting.push(told);
                }
                drop(state);
                // What the throttle holds is waited for now.
                self.engine.hurry();
            }
            Turn::Pull(id, range) => {
                let again = self.again(node, span, work);
                let told = self.waiting(hydration.path.to_path(), again);
                state.after(id, told);
                drop(state);
                self.demand_range(hydration, id, range);
            }
        }
    }

    fn turn_over(self: &Arc<Self>, hydration: &Arc<Hydration>, id: u64) {
        let waiting = {
            let mut state = hydration.state.lock();
            let Some(mixed) = &mut state.mixed else {
                return;
            };
            mixed.busy.retain(|(turn, _)| *turn != id);
            std::mem::take(&mut mixed.waiting)
        };
        waiting.into_iter().for_each(|w| w(Ok(())));
        self.fill_on(hydration);
    }
}

pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    /// The first bytes of `range` that are neither pulled nor the users', of those that src has.
    pub(super) fn first_missing(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let ground = &self.mixed.as_ref()?.ground;
        let end = range.end.min(ground.src_end());
        let mut at = range.start;
        while at < end {
            let gap = self.present.first_gap(&(at..end))?;
            match ground.map.first_free(&gap) {
                Some(free) => return Some(free),
                None => at = gap.end,
            }
        }
        None
    }

    /// Whether a change may begin; else what stands in its way.
    fn turn(&mut self, span: &Span) -> Turn {
        let range = blocks(&span.range);
        self.drop_idle_jobs(&range);
        if self.ranges.iter().any(|job| overlap(&job.range, &range)) {
            return Turn::Wait;
        }
        if span.edges {
            let (start, end) = (span.range.start, span.range.end);
            let first = (start % BLOCK != 0).then(|| blocks(&(start..start + 1)));
            let last = (end % BLOCK != 0).then(|| blocks(&(end - 1..end)));
            for edge in [first, last].into_iter().flatten() {
                // Beyond src's end nothing is missing; a tail that is overwritten is not either.
                let kept = match (edge.start < start, edge.end > end) {
                    (_, true) => edge.clone(),
                    (true, false) => edge.start..start,
                    (false, false) => continue,
                };
                if self.first_missing(&kept).is_some() {
                    return self.pull_edge(&edge);
                }
            }
        }
        let Some(mixed) = &mut self.mixed else {
            return Turn::Wait;
        };
        let id = mixed.next_turn;
        mixed.next_turn += 1;
        mixed.busy.push((id, range));
        Turn::Mine(id, Arc::clone(&mixed.ground))
    }

    fn pull_edge(&mut self, edge: &Range<u64>) -> Turn {
        let Some(missing) = self.first_missing(edge) else {
            return Turn::Wait;
        };
        match self.mixed.as_ref().is_some_and(|m| m.busy_at(&missing)) {
            true => Turn::Wait,
            false => Turn::Pull(self.new_job(missing.clone(), None), missing),
        }
    }

    /// Background jobs that have not begun give way: the throttle may hold them for hours.
    pub(super) fn drop_idle_jobs(&mut self, range: &Range<u64>) {
        self.ranges
            .retain(|job| !(job.is_idle() && overlap(&job.range, range)));
    }
}
