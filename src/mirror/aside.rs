//! Aside: calls on src that another thread waits for only so long.
//!
//!   run()   hands a call to a helper; `None` when it has not returned in time: the helper stays with
//!           it, and serves others again when it comes back
//!
//! A call that hangs in the kernel cannot be taken back, so that the thread is what is given up. Their
//! number is bounded (I9): when all hang, nothing is tried any more.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

type Call = Box<dyn FnOnce() + Send>;

/// Helpers at the most.
const HELPERS: usize = 192;

/// The helpers.
#[derive(Default)]
pub(super) struct Aside {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    idle: Vec<Sender<Call>>,
    all: usize,
}

impl Aside {
    /// What `call` returns, if it does within `limit`.
    pub(super) fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let helper = self.helper()?;
        let (tell, told) = bounded(1);
        let call: Call = Box::new(move || {
            let _ = tell.send(call()); // Too late: nobody waits any more.
        });
        helper.send(call).ok()?;
        told.recv_timeout(limit).ok()
    }

    fn helper(&self) -> Option<Sender<Call>> {
        let mut free = self.shared.free.lock();
        if let Some(idle) = free.idle.pop() {
            return Some(idle);
        }
        if free.all >= HELPERS {
            return None;
        }
        let (give, take) = bounded::<Call>(1);
        let (shared, me) = (Arc::downgrade(&self.shared), give.clone());
        let work = move || {
            while let Ok(call) = take.recv() {
                call();
                let Some(shared) = shared.upgrade() else {
                    return;
                };
                shared.free.lock().idle.push(me.clone());
            }
        };
        let name = "aside".to_owned();
        std::thread::Builder::new().name(name).spawn(work).ok()?;
        free.all += 1;
        Some(give)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_keeps_its_helper_and_nobody_else() {
        let aside = Aside::default();
        let soon = Duration::from_millis(20);
        let long = Duration::from_secs(20);
        assert_eq!(aside.run(long, || 1), Some(1));
        let (go, hung) = bounded::<()>(0);
        assert_eq!(aside.run(soon, move || hung.recv().is_ok()), None);
        for n in 0..100 {
            assert_eq!(aside.run(long, move || n), Some(n));
        }
        let counts = || {
            let free = aside.shared.free.lock();
            (free.idle.len(), free.all)
        };
        assert!(counts().1 < 60, "{:?}", counts());
        go.send(()).expect("it hangs");
        while counts().0 < counts().1 {
            std::thread::yield_now();
        }
    }
}
