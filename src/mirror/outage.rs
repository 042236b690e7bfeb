//! Outage: src that is away, and what waits until it is back.
//!
//!   Here   -> Doubted  later()   a call failed as if src were gone: it is put off, src's root is asked
//!   Doubted -> Here    it answers: the failure was that entry's own; what was put off is tried again
//!   Doubted -> Away    it does not: nothing more is asked of src but its root, at growing intervals
//!   Away   -> Here     it answers, or SRC's path leads to the same directory again: all is tried again
//!
//! Only the root decides: one file that gives EIO or ESTALE for ever ends after a few tries as a
//! failure of its own, while an outage fails nothing (`--on-error wait`; with `fail` see patience.rs).
//! The thread that watches never calls src itself: a root that does not answer has no thread but its
//! own. Lock order: `held` is a leaf.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::{Condvar, Mutex};

use super::Mirror;
use super::hydrate::{Hydration, Stage};
use super::node::Node;
use super::patience::Told;
use super::populate::DirRef;
use super::running::Extent;
use crate::engine::job::Priority;
use crate::error::{Error, Result};
use crate::progress::Away;

/// Tries of one entry beside the first, while src's root answers.
const TRIES: u32 = 3;
/// EIO is a bad block more often than not, and a disk has tried hard already.
const TRIES_EIO: u32 = 1;
/// The pause before the first of them; each is four times as long.
const PAUSE: Duration = Duration::from_millis(100);
/// Pauses between questions to a root that is away.
const ASK: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Questions that have got no answer yet, at most: each has a thread.
const ASKING_MAX: usize = 4;

/// Why something that was put off may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// src answers, and did all the time.
    Here,
    /// src was away and is back.
    Back,
    /// The mirror stops.
    Stopping,
}

type Held = Box<dyn FnOnce(Again) + Send>;

/// What waits for src, and whether src is there.
#[derive(Default)]
pub(super) struct Outage {
    held: Mutex<Vec<(Instant, Held)>>,
    wake: Condvar,
    stopped: AtomicBool,
    asking: Arc<AtomicUsize>,
}

/// How often a failure is tried again before it counts, and when.
pub(super) fn pause_before(attempt: u32, error: &Error) -> Option<Duration> {
    let tries = match error.errno() {
        rustix::io::Errno::IO => TRIES_EIO,
        _ => TRIES,
    };
    (error.may_pass() && attempt < tries).then(|| PAUSE * 4u32.pow(attempt))
}

impl Outage {
    /// Calls `then` on a pool thread after the pause, as soon as src answers.
    fn hold(&self, pause: Duration, then: Held) {
        let mut held = self.held.lock();
        if self.stopped.load(Ordering::Relaxed) {
            drop(held);
            return then(Again::Stopping);
        }
        held.push((Instant::now() + pause, then));
        drop(held);
        self.wake.notify_all();
    }

    /// What is due at `now`.
    fn take_due(&self, now: Instant) -> Vec<Held> {
        let mut held = self.held.lock();
        let all = std::mem::take(&mut *held);
        let (due, later): (Vec<_>, Vec<_>) = all.into_iter().partition(|(at, _)| *at <= now);
        *held = later;
        due.into_iter().map(|(_, then)| then).collect()
    }

    /// Sleeps until something is due, at most `tick`.
    fn sleep(&self, tick: Duration) {
        let mut held = self.held.lock();
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let first = held.iter().map(|(at, _)| *at).min();
        let tick = Instant::now() + tick;
        self.wake
            .wait_until(&mut held, first.map_or(tick, |at| at.min(tick)));
    }

    fn has_due(&self) -> bool {
        let now = Instant::now();
        self.held.lock().iter().any(|(at, _)| *at <= now)
    }
}

impl Mirror {
    /// Ends the thread that watches src: what was put off hears `Stopping`.
    pub(super) fn stop_watching_src(&self) {
        self.outage.stopped.store(true, Ordering::Relaxed);
        let held = std::mem::take(&mut *self.outage.held.lock());
        self.outage.wake.notify_all();
        held.into_iter().for_each(|(_, then)| then(Again::Stopping));
    }

    /// True while src is away: nothing in the background asks it anything.
    pub fn src_is_away(&self) -> bool {
        self.progress.src_is_away.load(Ordering::Relaxed)
    }

    /// For how long src has been away.
    pub(super) fn src_is_late(&self) -> Duration {
        match self.src_is_away() {
            true => self
                .progress
                .src_away
                .lock()
                .as_ref()
                .map_or(Duration::ZERO, |a| a.since.elapsed()),
            false => Duration::ZERO,
        }
    }

    /// `then`, told at the latest when nobody has to wait any longer.
    pub(super) fn limit<T: Send + 'static>(
        &self,
        path: std::path::PathBuf,
        then: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Told<T> {
        self.patience.limit(path, self.src_is_late(), then)
    }

    /// As `limit`, for an access that counts as one that waits until it is told.
    pub(super) fn waiting<T: Send + 'static>(
        &self,
        path: std::path::PathBuf,
        then: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Told<T> {
        let wait = self.progress.waits.begin(path.clone());
        self.limit(path, move |result| {
            drop(wait);
            then(result);
        })
    }

    /// A signal has reached who asked this (`Asker::request`): if it ends him he waits no longer.
    pub fn signalled(&self, request: u64) {
        self.patience.signalled(request);
        self.outage.wake.notify_all();
    }

    /// Puts off what has failed: `then` is called on a pool thread after the pause, when src answers.
    pub(super) fn later(&self, pause: Duration, then: impl FnOnce(Again) + Send + 'static) {
        self.outage.hold(pause, Box::new(then));
    }

    /// The thread that watches src.
    pub(super) fn watch_loop(self: &Arc<Self>) {
        let mut ask_pause = ASK.0;
        let mut open: Vec<Receiver<Result<()>>> = Vec::new();
        while !self.outage.stopped.load(Ordering::Relaxed) {
            self.tick();
            self.engine.pool().relieve();
            self.leave_hung();
            let away = self.src_is_away();
            if !away && !self.outage.has_due() && !self.somebody_is_late() {
                self.outage.sleep(self.patience.tick());
                continue;
            }
            let began = Instant::now();
            match self.ask_root(&mut open) {
                Ok(()) => {
                    ask_pause = ASK.0;
                    self.src_answers(began);
                    self.outage.sleep(PAUSE);
                }
                Err(error) => {
                    self.src_fails(&error);
                    let tick = self.patience.tick();
                    let until = Instant::now() + ask_pause;
                    while Instant::now() < until && !self.outage.stopped.load(Ordering::Relaxed) {
                        std::thread::sleep(tick.min(ASK.0));
                        self.tick();
                    }
                    ask_pause = (ask_pause * 2).min(ASK.1);
                }
            }
        }
    }

    /// What is not to wait for an answer of src.
    fn tick(self: &Arc<Self>) {
        self.patience.expire();
        self.keep_what_came();
    }

    /// A file whose copy does not come forward is in the ledger, and no pass of the walker waits for it.
    fn leave_hung(&self) {
        // What the throttle holds does not hang.
        if self.throttle.limit().is_some() || !self.throttle.is_open() {
            return;
        }
        for (hydration, new) in self.hydrations.hung(self.source_timeout) {
            if new {
                let error = Error::Call {
                    call: "wait",
                    side: crate::error::Side::Src,
                    path: hydration.path.to_path(),
                    errno: rustix::io::Errno::TIMEDOUT,
                };
                self.fail(&hydration.path, &error);
            }
            let settled = hydration.state.lock().take_settled();
            settled.into_iter().for_each(|w| w(Err(Error::Stopped)));
        }
    }

    /// Somebody waits so long that src's root is to be asked.
    fn somebody_is_late(&self) -> bool {
        let longest = self.progress.waits.longest(1);
        longest
            .first()
            .is_some_and(|(t, _)| *t > self.source_timeout)
    }

    /// One question to src's root, on a thread of its own; the answers to earlier ones count too.
    fn ask_root(self: &Arc<Self>, open: &mut Vec<Receiver<Result<()>>>) -> Result<()> {
        let asking = &self.outage.asking;
        if asking.load(Ordering::Relaxed) < ASKING_MAX {
            asking.fetch_add(1, Ordering::Relaxed);
            let (tell, told) = bounded(1);
            let (mirror, count) = (Arc::clone(self), Arc::clone(asking));
            let ask = move || {
                let _ = tell.send(mirror.source.ask()); // Too late: nobody listens any more.
                count.fetch_sub(1, Ordering::Relaxed);
            };
            match std::thread::Builder::new()
                .name("src-ask".into())
                .spawn(ask)
            {
                Ok(_) => open.push(told),
                Err(_) => {
                    asking.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
        let until = Instant::now() + self.source_timeout;
        loop {
            let mut last = None;
            open.retain(|told| match told.try_recv() {
                Ok(answer) => {
                    // The newest answer, and any good one, counts.
                    if !matches!(last, Some(Ok(()))) {
                        last = Some(answer);
                    }
                    false
                }
                Err(e) => e.is_empty(),
            });
            if let Some(answer) = last {
                return answer;
            }
            if Instant::now() >= until || self.outage.stopped.load(Ordering::Relaxed) {
                return Err(Error::Call {
                    call: "statx",
                    side: crate::error::Side::Src,
                    path: ".".into(),
                    errno: rustix::io::Errno::TIMEDOUT,
                });
            }
            self.tick();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn src_answers(self: &Arc<Self>, asked: Instant) {
        let was = self.progress.src_away.lock().take();
        self.progress.src_is_away.store(false, Ordering::Relaxed);
        let again = match was {
            Some(away) => {
                tracing::warn!("src is back after {:.1?}", away.since.elapsed());
                Again::Back
            }
            None => Again::Here,
        };
        // After an outage nothing waits for its time.
        let far = Duration::from_secs(1 << 30);
        let due = match again {
            Again::Back => self.outage.take_due(asked + far),
            _ => self.outage.take_due(asked),
        };
        for then in due {
            self.engine
                .pool()
                .run(Priority::Demand, Box::new(move || then(again)));
        }
    }

    fn src_fails(&self, error: &Error) {
        let mut away = self.progress.src_away.lock();
        if away.is_none() {
            tracing::error!("src is away: {error}; it is asked again until it is back");
            *away = Some(Away::now(error.to_string()));
            self.progress.src_is_away.store(true, Ordering::Relaxed);
        }
    }

    /// The whole-file job has failed. Where that may pass, everybody goes on waiting and it is asked
    /// for again when src answers; else they are told. A file that goes another way by now (it is
    /// truncated, or mixed) has nothing to do with it.
    pub(super) fn whole_failed(self: &Arc<Self>, hydration: &Arc<Hydration>, error: Error) {
        let pause = {
            let mut state = hydration.state.lock();
            if !state.is_whole() {
                return;
            }
            let pause = pause_before(state.attempts, &error);
            if pause.is_some() {
                state.attempts += 1;
                state.stage = Stage::Queued;
                // Whoever comes waits with the others.
                state.asked = Some(Priority::Demand);
                (state.whole, state.dst, state.src) = (None, None, None);
            }
            pause
        };
        let bad = error.is_bad_read();
        let Some(pause) = pause else {
            return match bad {
                true => self.rescue(hydration, error),
                false => self.fail_hydration(hydration, error),
            };
        };
        tracing::debug!("{error}; it is tried again");
        self.forget_src_dir(hydration);
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        self.later(pause, move |again| {
            let priority = {
                let mut state = hydration.state.lock();
                if !state.is_whole() {
                    return;
                }
                if again == Again::Back {
                    state.attempts = 0;
                }
                let priority = state.lane();
                state.asked = Some(priority);
                priority
            };
            match again {
                Again::Stopping => mirror.fail_hydration(&hydration, Error::Stopped),
                // src is there, and was: what can be read is not read a second time for nothing.
                Again::Here if bad && mirror.mixes => mirror.rescue(&hydration, error),
                _ => mirror.start(&hydration, priority),
            }
        });
    }

    /// Asks src about a pending file on a pool thread, again while that may help.
    pub(super) fn ask_later<T: Send + 'static>(
        self: &Arc<Self>,
        node: Arc<Node>,
        ask: impl Fn(&Mirror, &Node) -> Result<T> + Send + 'static,
        attempt: u32,
        then: Told<T>,
    ) {
        let mirror = Arc::clone(self);
        let task = move || {
            let result = ask(&mirror, &node);
            let again = result.as_ref().err().and_then(|e| pause_before(attempt, e));
            let Some(pause) = again else {
                return then(result);
            };
            if let Some(origin) = node.origin() {
                mirror.source.forget_dir(&origin.dir);
            }
            let mirror = Arc::clone(&mirror);
            Arc::clone(&mirror).later(pause, move |again| match again {
                Again::Stopping => then(Err(Error::Stopped)),
                Again::Back => mirror.ask_later(node, ask, 0, then),
                Again::Here => mirror.ask_later(node, ask, attempt + 1, then),
            });
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// For a pool thread that has met a failure: sleeps until another try is worth it. False: it is not.
    /// `began`: when somebody began to wait for this thread.
    pub(super) fn wait_here(&self, attempt: &mut u32, error: &Error, began: Instant) -> bool {
        let Some(pause) = pause_before(*attempt, error) else {
            return false;
        };
        *attempt += 1;
        self.later(pause, |_| ());
        std::thread::sleep(pause);
        while self.src_is_away() && !self.stopping() {
            *attempt = 0;
            if self.patience.is_over(began) {
                return false;
            }
            std::thread::sleep(ASK.0);
        }
        !self.stopping()
    }

    /// Puts off a populate that has failed; whoever waits for it goes on waiting. False: it counts.
    pub(super) fn populate_later(
        self: &Arc<Self>,
        dir: &DirRef,
        extent: Extent,
        attempt: u32,
        error: &Error,
    ) -> bool {
        let Some(pause) = pause_before(attempt, error) else {
            return false;
        };
        tracing::debug!("{error}; it is tried again");
        if let Some(origin) = &dir.origin {
            self.source.forget_dir(origin);
        }
        let (mirror, dir) = (Arc::clone(self), dir.clone());
        self.later(pause, move |again| match again {
            Again::Stopping => mirror.populate_ended(&dir, &Err(Error::Stopped)),
            Again::Back => mirror.populate_claimed(&dir, None, extent, 0),
            Again::Here => mirror.populate_claimed(&dir, None, extent, attempt + 1),
        });
        true
    }

    /// Puts off a range job that has failed; its readers go on waiting. False: it counts.
    pub(super) fn range_later(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        id: u64,
        error: &Error,
    ) -> bool {
        let found = {
            let mut state = hydration.state.lock();
            let queued = state.stage == Stage::Queued;
            let job = state.ranges.iter_mut().find(|r| r.id == id);
            // It is looked at closely already.
            let job = job.filter(|job| !(error.is_bad_read() && job.close));
            let found = job.and_then(|job| {
                let pause = pause_before(job.attempts, error)?;
                job.attempts += 1;
                job.begun = false;
                Some((pause, job.range.clone()))
            });
            if found.is_some() && queued {
                (state.dst, state.src) = (None, None);
            }
            if state.stage == Stage::Mixed {
                state.src = None;
            }
            found
        };
        let Some((pause, range)) = found else {
            return false;
        };
        tracing::debug!("{error}; it is tried again");
        self.forget_src_dir(hydration);
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        self.later(pause, move |again| {
            if again == Again::Stopping {
                return mirror.range_done(&hydration, id, Err(Error::Stopped));
            }
            let priority = {
                let mut state = hydration.state.lock();
                let waited_for = state.is_waited_for();
                let Some(job) = state.ranges.iter_mut().find(|r| r.id == id) else {
                    return; // A change has taken its place.
                };
                if again == Again::Back {
                    job.attempts = 0;
                }
                job.lane_now(waited_for)
            };
            mirror.submit_range(&hydration, id, range, priority);
        });
        true
    }

    /// A directory that was opened before the outage, or that the server has forgotten.
    pub(super) fn forget_src_dir(&self, hydration: &Hydration) {
        if let Some(origin) = &hydration.file.origin {
            self.source.forget_dir(&origin.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Side;
    use rustix::io::Errno;

    #[test]
    fn only_what_may_pass_is_tried_again_and_not_for_ever() {
        let error = |side, errno| Error::Call {
            call: "read",
            side,
            path: "a".into(),
            errno,
        };
        let tries = |error: &Error| (0..9).filter(|n| pause_before(*n, error).is_some()).count();
        assert_eq!(tries(&error(Side::Src, Errno::NOTCONN)), 3);
        assert_eq!(tries(&error(Side::Src, Errno::STALE)), 3);
        assert_eq!(tries(&error(Side::Src, Errno::IO)), 1);
        assert_eq!(tries(&error(Side::Src, Errno::ACCESS)), 0);
        assert_eq!(tries(&error(Side::Src, Errno::NOENT)), 0);
        assert_eq!(tries(&error(Side::Dst, Errno::IO)), 0);
        assert_eq!(tries(&Error::Stopped), 0);
    }
}
