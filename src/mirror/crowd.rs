//! Crowd: the entries of one directory placed by several threads, while src is slow.
//!
//! A src that answers from memory is served best by the one thread that has the directory. One that
//! keeps each call waiting (a network, a disk that seeks) would hold a directory of 10,000 entries for
//! their number times its latency; there threads cost nothing beside the waiting.
//!
//!   Pace    how long src takes for one entry, lately
//!   Crowd   how many threads help at the moment: a fixed number, the larger part of it for demand
//!
//! A helper lives as long as the listing that it helps with. Upholds I9.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::job::Priority;
use crate::error::{Error, Result};

/// A src that takes longer than this for what there is to know of a file, or for a small one, is slow.
const SLOW_NS: u64 = 200_000;
/// Helpers at once, of all directories: for the background, and when somebody waits.
const HELPERS: (usize, usize) = (64, 128);
/// Entries for each helper at the least.
const SHARE: usize = 3;

/// How long src takes for one entry, lately.
#[derive(Debug, Default)]
pub struct Pace {
    mean_ns: AtomicU64,
}

impl Pace {
    /// True while most calls had to wait for src.
    pub fn is_slow(&self) -> bool {
        self.mean_ns.load(Relaxed) > SLOW_NS
    }

    pub(super) fn note(&self, took: Duration) {
        // Clipped: a call that met a busy CPU does not make src slow, most of them must.
        let ns = u64::try_from(took.as_nanos()).map_or(2 * SLOW_NS, |n| n.min(2 * SLOW_NS));
        let mean = self.mean_ns.load(Relaxed);
        self.mean_ns.store((mean * 7 + ns) / 8, Relaxed);
    }
}

/// How many threads help.
#[derive(Debug, Default)]
pub struct Crowd {
    pub(super) pace: Pace,
    helpers: AtomicUsize,
}

impl Crowd {
    /// Calls `each` for every item, on this thread and, while src is slow, on helpers too. The first
    /// error ends it and comes back.
    pub(super) fn each<T: Sync>(
        &self,
        priority: Priority,
        items: &[T],
        each: impl Fn(&T) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let one = || {
            let Some(item) = items.get(next.fetch_add(1, Relaxed)) else {
                return false;
            };
            match each(item) {
                Ok(()) => true,
                Err(e) => {
                    // Nobody begins another.
                    next.store(items.len(), Relaxed);
                    failed.lock().get_or_insert(e);
                    false
                }
            }
        };
        let mut mine = 0;
        std::thread::scope(|scope| {
            loop {
                let left = items.len().saturating_sub(next.load(Relaxed));
                while self.pace.is_slow() && left / SHARE > mine && self.enter(priority) {
                    mine += 1;
                    let help = || {
                        while one() {}
                        self.helpers.fetch_sub(1, Relaxed);
                    };
                    let name = "place".to_owned();
                    if let Err(e) = std::thread::Builder::new()
                        .name(name)
                        .spawn_scoped(scope, help)
                    {
                        // We go on alone.
                        tracing::debug!("cannot start a thread: {e}");
                        self.helpers.fetch_sub(1, Relaxed);
                        break;
                    }
                }
                if !one() {
                    break;
                }
            }
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    /// Counts one more helper, unless there are enough.
    fn enter(&self, priority: Priority) -> bool {
        let max = match priority {
            Priority::Ahead | Priority::Background => HELPERS.0,
            Priority::Demand => HELPERS.1,
        };
        let more = |now| (now < max).then_some(now + 1);
        self.helpers.fetch_update(Relaxed, Relaxed, more).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn crowd(slow: bool) -> Crowd {
        let crowd = Crowd::default();
        for _ in 0..40 {
            crowd
                .pace
                .note(Duration::from_micros(if slow { 1000 } else { 1 }));
        }
        crowd
    }

    #[test]
    fn a_slow_source_is_asked_by_many_threads_and_each_entry_is_placed_once() {
        let (crowd, seen) = (crowd(true), Mutex::new(Vec::new()));
        let items: Vec<u32> = (0..500).collect();
        let result = crowd.each(Priority::Background, &items, |n| {
            std::thread::sleep(Duration::from_millis(1));
            seen.lock().push((*n, std::thread::current().id()));
            Ok(())
        });
        assert!(result.is_ok());
        let seen = seen.into_inner();
        let mut placed: Vec<_> = seen.iter().map(|(n, _)| *n).collect();
        placed.sort_unstable();
        assert_eq!(placed, items);
        let threads: HashSet<_> = seen.iter().map(|(_, t)| *t).collect();
        assert!(threads.len() > 8, "{} threads", threads.len());
        assert!(threads.len() <= HELPERS.0 + 1, "{} threads", threads.len());
        assert_eq!(crowd.helpers.load(Relaxed), 0);
    }

    #[test]
    fn a_fast_source_is_asked_by_one_thread() {
        let (crowd, me) = (crowd(false), std::thread::current().id());
        let items: Vec<u32> = (0..500).collect();
        let alone = crowd.each(Priority::Demand, &items, |_| {
            match std::thread::current().id() == me {
                true => Ok(()),
                false => Err(Error::Stopped),
            }
        });
        assert!(alone.is_ok());
    }

    #[test]
    fn the_first_error_ends_a_listing() {
        let (crowd, done) = (crowd(true), AtomicUsize::new(0));
        let items: Vec<u32> = (0..5000).collect();
        let result = crowd.each(Priority::Background, &items, |n| {
            std::thread::sleep(Duration::from_millis(1));
            done.fetch_add(1, Relaxed);
            if *n == 100 {
                Err(Error::Stopped)
            } else {
                Ok(())
            }
        });
        assert!(matches!(result, Err(Error::Stopped)));
        assert!(done.load(Relaxed) < 1000, "{done:?} were placed");
    }

    #[test]
    fn one_call_that_met_a_busy_cpu_does_not_make_a_source_slow() {
        let pace = Pace::default();
        for n in 0..1000 {
            let busy = n % 4 == 0;
            pace.note(Duration::from_micros(if busy { 50_000 } else { 2 }));
            assert!(!pace.is_slow(), "after {n}");
        }
    }
}
