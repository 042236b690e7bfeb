//! Patience: how long an access waits for src before it hears EIO (`--on-error fail`).
//!
//!   limit()    wraps what is to be called with the answer: called once, by whoever is first
//!   expire()   calls what has waited too long with ETIMEDOUT, whatever src does with the request
//!
//! With `--on-error wait` everything waits as long as it takes, and nothing here is used. The work
//! itself goes on: who comes later may find it done. Lock order: `open`, then nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::OnError;
use crate::error::{Errno, Error, Result, Side};

/// What is told an answer.
pub(super) type Told<T> = Box<dyn FnOnce(Result<T>) + Send>;

type Expire = Box<dyn FnOnce() + Send>;

/// All accesses with a limit.
pub(super) struct Patience {
    limit: Option<Duration>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next: u64,
    /// By deadline.
    waits: BTreeMap<(Instant, u64), Expire>,
}

impl Patience {
    pub(super) fn new(on_error: OnError, timeout: Duration) -> Arc<Patience> {
        Arc::new(Patience {
            limit: (on_error == OnError::Fail).then_some(timeout),
            open: Mutex::default(),
        })
    }

    /// How often `expire` has to be called.
    pub(super) fn tick(&self) -> Duration {
        let tick = self.limit.map_or(Duration::MAX, |l| l / 4);
        tick.clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// True when who began to wait at `began` waits no longer.
    pub(super) fn is_over(&self, began: Instant) -> bool {
        self.limit.is_some_and(|limit| began.elapsed() > limit)
    }

    /// `then`, called at the latest when the limit is reached. `late`: for how long src has been away.
    pub(super) fn limit<T: Send + 'static>(
        self: &Arc<Self>,
        path: PathBuf,
        late: Duration,
        then: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Told<T> {
        let Some(limit) = self.limit else {
            return Box::new(then);
        };
        let slot = Arc::new(Mutex::new(Some(then)));
        let taken = Arc::clone(&slot);
        let expire: Expire = Box::new(move || {
            let then = taken.lock().take();
            if let Some(then) = then {
                then(Err(Error::Call {
                    call: "wait",
                    side: Side::Src,
                    path,
                    errno: Errno::TIMEDOUT,
                }));
            }
        });
        // Who comes when src has been away for long does not wait all of it again.
        let due = Instant::now() + limit.saturating_sub(late);
        let key = {
            let mut open = self.open.lock();
            open.next += 1;
            let key = (due, open.next);
            open.waits.insert(key, expire);
            key
        };
        let patience = Arc::clone(self);
        Box::new(move |result| {
            let then = slot.lock().take();
            let gone = patience.open.lock().waits.remove(&key);
            drop(gone); // Not under the lock: it holds what `then` held.
            if let Some(then) = then {
                then(result);
            }
        })
    }

    /// Tells all whose time is over.
    pub(super) fn expire(&self) {
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
}
