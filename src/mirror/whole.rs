//! Whole: what the engine tells of a job that copies a whole file.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Mirror;
use super::hydrate::{Hydration, Stage, State};
use super::proof::Hashing;
use crate::engine::job::{Completion, Copied, Lent, Priority};
use crate::error::{Error, Result};

/// The whole-file job's report.
pub(super) struct Whole {
    mirror: Arc<Mirror>,
    hydration: Arc<Hydration>,
    /// The lane that this job is in.
    priority: Priority,
    /// This job, and no other, copies the file.
    begun: bool,
    /// For the manifest, if there is one.
    hashing: Option<Hashing>,
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
            hashing: None,
        }
    }
}

impl Completion for Whole {
    fn begin(&mut self) -> bool {
        let mut state = self.hydration.state.lock();
        let won = state.stage == Stage::Queued;
        if won {
            state.stage = Stage::Copying;
            state.beside.clear();
            state.readahead.whole_at = 0;
            state.hashed = None;
            state.moved = Instant::now();
            drop(state);
            self.mirror.keep_times(&self.hydration);
            let proof = self.mirror.proof();
            self.hashing = proof.map(|proof| Hashing::begin(proof, self.priority));
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

    fn wants_data(&self) -> bool {
        self.hashing.is_some()
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) {
        let wanted = self.priority == Priority::Background && self.wanted();
        if let Some(hashing) = &mut self.hashing {
            if wanted {
                hashing.put_off();
            }
            hashing.bytes(offset, bytes);
        }
    }

    fn keeps(&self, len: usize) -> bool {
        self.hashing.as_ref().is_some_and(|h| h.keeps(len))
    }

    fn kept(&mut self, offset: u64, piece: Option<Lent>) {
        if let Some(hashing) = &mut self.hashing {
            hashing.kept(offset, piece);
        }
    }

    /// Such a file is read again in the end: what was handed on is of another time.
    fn again(&mut self) {
        self.hashing = None;
    }

    fn hole(&mut self, range: Range<u64>) {
        if let Some(hashing) = &mut self.hashing {
            hashing.hole(range);
        }
    }

    fn landed(&mut self, range: Range<u64>) {
        let mut state = self.hydration.state.lock();
        state.readahead.whole_at = state.readahead.whole_at.max(range.end);
        state.sure.remove(&range);
        state.present.insert(range);
        state.moved = Instant::now();
    }

    fn done(mut self: Box<Self>, outcome: Result<Copied>) {
        let leaves = self.begun && outcome.is_err() && self.leaves();
        match outcome {
            _ if leaves => self.mirror.whole_left(&self.hydration),
            Err(Error::Stopped) if self.priority == Priority::Background => {
                self.mirror.background_stopped(&self.hydration, self.begun);
            }
            Ok(copied) => {
                let path = &self.hydration.path;
                let hashed = self.hashing.take().map(|hashing| hashing.done(path));
                let ready = {
                    let mut state = self.hydration.state.lock();
                    state.whole = Some(copied);
                    state.hashed = hashed;
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

impl State {
    /// The whole-file job's failure is the file's: no other way to its bytes has been taken since.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self.stage, Stage::Queued | Stage::Copying)
    }

    /// The whole job's outcome, when every job of the file has ended: then it can land.
    pub(super) fn whole_if_last(&mut self) -> Option<Copied> {
        if self.stage != Stage::Copying || self.whole.is_none() {
            return None;
        }
        // What is ahead of a reader is here now.
        self.drop_idle_jobs(&(0..u64::MAX));
        match self.ranges.is_empty() {
            true => self.whole.take(),
            false => None,
        }
    }
}
