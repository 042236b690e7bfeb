//! Patience: how long an access waits for src: until it has its answer, until its time is over
//! (`--on-error fail`), or until a signal ends who asked.
//!
//!   limit()    wraps what is to be called with the answer: called once, by whoever is first
//!   expire()   calls what has waited too long with ETIMEDOUT, whatever src does with the request;
//!              and what waits for somebody who is ending with EINTR
//!
//! The work itself goes on: who comes later may find it done. Lock order: `open`, then nothing; the
//! table of signals the same.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::asker::{self, End, Signals};
use crate::config::OnError;
use crate::error::{Errno, Error, Result, Side};
use crate::sys::process;

/// What is told an answer.
pub(super) type Told<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// How often who had a signal that did not end him is looked at again, if there are few such.
const WATCH: Duration = Duration::from_millis(100);

/// All accesses that wait and may not have to.
pub(super) struct Patience {
    limit: Option<Duration>,
    open: Mutex<Open>,
    signals: Signals,
}

#[derive(Default)]
struct Open {
    next: u64,
    /// By deadline.
    waits: BTreeMap<(Instant, u64), End>,
}

impl Patience {
    pub(super) fn new(on_error: OnError, timeout: Duration) -> Arc<Patience> {
        Arc::new(Patience {
            limit: (on_error == OnError::Fail).then_some(timeout),
            open: Mutex::default(),
            signals: Signals::default(),
        })
    }

    /// How often `expire` has to be called.
    pub(super) fn tick(&self) -> Duration {
        let tick = self.limit.map_or(Duration::MAX, |l| l / 4);
        let tick = match self.signals.watching() {
            0 => tick,
            // A look takes some 20 us.
            many => tick.min(WATCH * (1 + many as u32 / 64)),
        };
        tick.clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// True when who began to wait at `began` waits no longer.
    pub(super) fn is_over(&self, began: Instant) -> bool {
        self.limit.is_some_and(|limit| began.elapsed() > limit)
    }

    /// `then`, called at the latest when the limit is reached, or when a signal has ended who asked.
    /// `late`: for how long src has been away.
    pub(super) fn limit<T: Send + 'static>(
        self: &Arc<Self>,
        path: PathBuf,
        late: Duration,
        then: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Told<T> {
        let asker = asker::current();
        if self.limit.is_none() && asker.is_none() {
            return Box::new(then);
        }
        let slot = Arc::new(Mutex::new(Some(then)));
        let end = |side, errno| -> End {
            let (slot, path) = (Arc::clone(&slot), path.clone());
            Arc::new(move || {
                let then = slot.lock().take();
                if let Some(then) = then {
                    then(Err(Error::Call {
                        call: "wait",
                        side,
                        path: path.clone(),
                        errno,
                    }));
                }
            })
        };
        let due = self.limit.map(|limit| {
            // Who comes when src has been away for long does not wait all of it again.
            let due = Instant::now() + limit.saturating_sub(late);
            let mut open = self.open.lock();
            open.next += 1;
            let key = (due, open.next);
            open.waits.insert(key, end(Side::Src, Errno::TIMEDOUT));
            key
        });
        let parked = asker.map(|asker| {
            let id = self.signals.park(asker, end(Side::Host, Errno::INTR));
            (asker.request, id)
        });
        let waiting = Waiting {
            patience: Arc::clone(self),
            due,
            parked,
            slot,
        };
        Box::new(move |result| {
            let then = waiting.slot.lock().take();
            drop(waiting);
            if let Some(then) = then {
                asker::asking(asker, || then(result));
            }
        })
    }

    /// Tells all whose time is over.
    pub(super) fn expire(&self) {
        self.signals.look(process::is_ending);
        loop {
            let expire = {
                let mut open = self.open.lock();
                match open.waits.first_entry() {
                    Some(first) if first.key().0 <= Instant::now() => first.remove(),
                    _ => return,
                }
            };
            expire();
        }
    }

    /// A signal has reached who asked this.
    pub(super) fn signalled(&self, request: u64) {
        self.signals.signalled(request);
        self.signals.look_at(request, process::is_ending);
    }
}

/// An access that waits. Dropped without an answer it is over too: what it holds is dropped.
struct Waiting<F> {
    patience: Arc<Patience>,
    due: Option<(Instant, u64)>,
    parked: Option<(u64, u64)>,
    slot: Arc<Mutex<Option<F>>>,
}

impl<F> Drop for Waiting<F> {
    fn drop(&mut self) {
        if let Some(due) = self.due {
            let gone = self.patience.open.lock().waits.remove(&due);
            drop(gone); // Not under the lock: it holds what `then` held.
        }
        if let Some((request, id)) = self.parked {
            self.patience.signals.forget(request, id);
        }
        let left = self.slot.lock().take();
        drop(left); // Not under the lock, as above.
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn told(patience: &Arc<Patience>, late: Duration) -> (Told<u8>, mpsc::Receiver<Result<u8>>) {
        let (tx, rx) = mpsc::channel();
        let then = patience.limit("a".into(), late, move |r| tx.send(r).expect("is there"));
        (then, rx)
    }

    #[test]
    fn an_access_is_told_once_by_src_or_by_the_clock() {
        let second = Duration::from_secs(1);
        let patience = Patience::new(OnError::Fail, 100 * second);
        let (then, rx) = told(&patience, Duration::ZERO);
        patience.expire();
        assert!(rx.try_recv().is_err(), "its time is not over");
        then(Ok(1));
        assert!(matches!(rx.recv(), Ok(Ok(1))));
        assert!(patience.open.lock().waits.is_empty());
        // src has been away longer than anybody waits.
        let (then, rx) = told(&patience, 200 * second);
        patience.expire();
        let errno = rx.recv().expect("told").map_err(|e| e.errno());
        assert_eq!(errno, Err(Errno::TIMEDOUT));
        then(Ok(2));
        assert!(rx.recv().is_err(), "nobody is told twice");
    }

    #[test]
    fn with_wait_there_is_no_limit() {
        let patience = Patience::new(OnError::Wait, Duration::ZERO);
        let (then, rx) = told(&patience, Duration::from_secs(9));
        patience.expire();
        assert!(rx.try_recv().is_err());
        then(Ok(1));
        assert!(matches!(rx.recv(), Ok(Ok(1))));
    }

    #[test]
    fn an_answer_that_never_comes_is_no_leak() {
        let patience = Patience::new(OnError::Wait, Duration::ZERO);
        let me = asker::Asker {
            request: 2,
            tid: 0,
            told: true,
        };
        let (then, rx) = asker::asking(Some(me), || told(&patience, Duration::ZERO));
        drop(then);
        assert!(rx.recv().is_err(), "what was to be called is gone");
        patience.signalled(2);
        assert_eq!(patience.signals.watching(), 0);
        let (then, rx) = asker::asking(Some(me), || told(&patience, Duration::ZERO));
        patience.expire();
        let errno = rx.recv().expect("told").map_err(|e| e.errno());
        assert_eq!(errno, Err(Errno::INTR), "the signal came before the wait");
        then(Ok(1));
        assert!(rx.recv().is_err(), "nobody is told twice");
    }
}
