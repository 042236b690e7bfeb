//! Waits: who waits for src now, for how long, and how long others have waited.
//!
//!   begin()   an access has to wait for src; its `Wait` lives as long as it waits
//!   drop      it was answered: its time is one more of the recent ones, and in the histogram
//!
//! The number of waits is bounded by the kernel's outstanding requests. Lock order: a leaf.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How many of the last waits the percentile is taken from.
const RECENT: usize = 1000;
/// Upper bounds of the histogram, seconds; one more bucket holds the rest.
pub const BOUNDS_S: [f64; 12] = [
    0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0,
];

/// All waits of a mount.
#[derive(Debug, Default, Clone)]
pub struct Waits(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    len: AtomicUsize,
    open: Mutex<Open>,
    recent: Mutex<VecDeque<Duration>>,
    buckets: [AtomicU64; BOUNDS_S.len() + 1],
    total_us: AtomicU64,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// In the order in which they began.
    waits: BTreeMap<u64, (Instant, PathBuf)>,
}

/// One access that waits; it ends when this is dropped.
#[derive(Debug)]
pub struct Wait {
    inner: Arc<Inner>,
    id: u64,
}

/// How long waits have taken, by buckets.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// How many fell into each bucket of `BOUNDS_S`, and how many were longer.
    pub counts: Vec<u64>,
    /// All their time, seconds.
    pub sum_s: f64,
}

impl Waits {
    /// Somebody waits for the entry at `path` of src.
    pub fn begin(&self, path: PathBuf) -> Wait {
        let mut open = self.0.open.lock();
        let id = open.next;
        open.next += 1;
        open.waits.insert(id, (Instant::now(), path));
        self.0.len.store(open.waits.len(), Relaxed);
        Wait {
            inner: Arc::clone(&self.0),
            id,
        }
    }

    /// How many wait now.
    pub fn len(&self) -> usize {
        self.0.len.load(Relaxed)
    }

    /// Nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How long the one waits that came last.
    pub fn newest(&self) -> Option<Duration> {
        let open = self.0.open.lock();
        open.waits.values().next_back().map(|(t, _)| t.elapsed())
    }

    /// Those that wait longest, the longest first; at most `max`.
    pub fn longest(&self, max: usize) -> Vec<(Duration, PathBuf)> {
        let open = self.0.open.lock();
        let oldest = open.waits.values().take(max);
        oldest.map(|(t, p)| (t.elapsed(), p.clone())).collect()
    }

    /// What 99 of 100 of the last thousand waits did not exceed; `None`: nobody has waited.
    pub fn p99(&self) -> Option<Duration> {
        let mut recent: Vec<Duration> = self.0.recent.lock().iter().copied().collect();
        recent.sort_unstable();
        let at = (recent.len() * 99).div_ceil(100).checked_sub(1)?;
        recent.get(at).copied()
    }

    /// All waits that have ended.
    pub fn histogram(&self) -> Histogram {
        Histogram {
            counts: self.0.buckets.iter().map(|b| b.load(Relaxed)).collect(),
            sum_s: self.0.total_us.load(Relaxed) as f64 / 1e6,
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let begun = {
            let mut open = self.inner.open.lock();
            let begun = open.waits.remove(&self.id).map(|(t, _)| t);
            self.inner.len.store(open.waits.len(), Relaxed);
            begun
        };
        let Some(took) = begun.map(|t| t.elapsed()) else {
            return;
        };
        let s = took.as_secs_f64();
        let at = BOUNDS_S.iter().position(|bound| s <= *bound);
        self.inner.buckets[at.unwrap_or(BOUNDS_S.len())].fetch_add(1, Relaxed);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.inner.total_us.fetch_add(us, Relaxed);
        let mut recent = self.inner.recent.lock();
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_longest_is_told_first_and_the_ended_ones_are_counted() {
        let waits = Waits::default();
        assert_eq!((waits.len(), waits.p99()), (0, None));
        let a = waits.begin("a".into());
        std::thread::sleep(Duration::from_millis(5));
        let b = waits.begin("b".into());
        let names: Vec<_> = waits.longest(9).into_iter().map(|(_, p)| p).collect();
        assert_eq!(names, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(waits.longest(1).len(), 1);
        drop(a);
        assert_eq!((waits.len(), waits.is_empty()), (1, false));
        assert!(waits.p99().expect("one has waited") >= Duration::from_millis(5));
        drop(b);
        let histogram = waits.histogram();
        assert_eq!(histogram.counts.iter().sum::<u64>(), 2);
        assert!(histogram.sum_s >= 0.005);
    }

    #[test]
    fn the_percentile_is_of_the_last_thousand() {
        let waits = Waits::default();
        let long = Duration::from_secs(9);
        for n in 0..RECENT + 500 {
            // Hours ago as far as the percentile is concerned.
            let took = if n < 500 {
                long
            } else {
                Duration::from_millis(1)
            };
            let mut recent = waits.0.recent.lock();
            if recent.len() == RECENT {
                recent.pop_front();
            }
            recent.push_back(took);
        }
        assert_eq!(waits.p99(), Some(Duration::from_millis(1)));
    }
}
