//! Whole: what the engine tells of a job that copies a whole file.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Mirror;
use super::hydrate::{Hydration, Stage};
use crate::engine::job::{Completion, Copied, Priority};
use crate::error::{Error, Result};

/// The whole-file job's report.
pub(super) struct Whole {
    mirror: Arc<Mirror>,
    hydration: Arc<Hydration>,
    /// The lane that this job is in.
    priority: Priority,
    /// This job, and no other, copies the file.
    begun: bool,
}

impl Whole {
    pub(super) fn new(
        mirror: &Arc<Mirror>,
        hydration: &Arc<Hydration>,
        priority: Priority,
    ) -> Whole {
        Whole {
            mirror: Arc::clone(mirror),
            hydration: Arc::clone(hydration),
            priority,
            begun: false,
        }
    }
}

impl Completion for Whole {
    fn begin(&mut self) -> bool {
        let mut state = self.hydration.state.lock();
        let won = state.stage == Stage::Queued;
        if won {
            state.stage = Stage::Copying;
            state.moved = Instant::now();
            drop(state);
            self.mirror.keep_times(&self.hydration);
        }
        self.begun = won;
        won
    }

    fn wanted(&self) -> bool {
        let state = self.hydration.state.lock();
        state.is_waited_for() || state.leaves
    }

    fn leaves(&self) -> bool {
        self.hydration.state.lock().leaves
    }

    fn passes(&self, bytes: u64) -> bool {
        let background = self.priority == Priority::Background && !self.wanted();
        let passes = background && self.mirror.allowance.passes(bytes);
        self.hydration.state.lock().passes = passes;
        passes
    }

    fn landed(&mut self, range: Range<u64>) {
        let mut state = self.hydration.state.lock();
        state.present.insert(range);
        state.moved = Instant::now();
    }

    fn done(self: Box<Self>, outcome: Result<Copied>) {
        let leaves = self.begun && outcome.is_err() && self.leaves();
        match outcome {
            _ if leaves => self.mirror.whole_left(&self.hydration),
            Err(Error::Stopped) if self.priority == Priority::Background => {
                self.mirror.background_stopped(&self.hydration, self.begun);
            }
            Ok(copied) => {
                let ready = {
                    let mut state = self.hydration.state.lock();
                    state.whole = Some(copied);
                    state.present.insert(0..u64::MAX);
                    state.whole_if_last()
                };
                if let Some(copied) = ready {
                    self.mirror.land(&self.hydration, copied);
                }
            }
            Err(e) => self.mirror.whole_failed(&self.hydration, e),
        }
    }
}
