//! Rate: how fast it goes, now and over the past hours.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The time that the rate is taken from.
const WINDOW: Duration = Duration::from_secs(30);
/// From so much time on the rate tells something about the time that is to come.
const STEADY: Duration = Duration::from_secs(10);
/// Points of the history. When they are used up, every second one goes.
const POINTS_MAX: usize = 720;
/// Seconds between the first points.
const POINT_S: u64 = 5;

/// Bytes per second over the last half minute.
#[derive(Debug, Default)]
pub struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    /// Adds a sample: all bytes so far.
    pub(crate) fn sample(&mut self, now: Instant, bytes: u64) {
        self.0.push_back((now, bytes));
        let old = |sample: &(Instant, u64)| now.duration_since(sample.0) > WINDOW;
        while self.0.len() > 2 && self.0.front().is_some_and(old) {
            self.0.pop_front();
        }
    }

    /// The rate; 0 until there are two samples.
    pub(crate) fn bytes_per_s(&self) -> u64 {
        match self.span() {
            Some((time, bytes)) if time.as_secs_f64() >= 0.1 => {
                (bytes as f64 / time.as_secs_f64()) as u64
            }
            _ => 0,
        }
    }

    /// The rate, when it is that of more than a moment.
    pub(crate) fn steady_bytes_per_s(&self) -> Option<u64> {
        let (time, _) = self.span()?;
        (time >= STEADY).then(|| self.bytes_per_s())
    }

    fn span(&self) -> Option<(Duration, u64)> {
        let (t0, b0) = self.0.front()?;
        let (t1, b1) = self.0.back()?;
        Some((t1.duration_since(*t0), b1.saturating_sub(*b0)))
    }
}

/// A rate that has been the same for a minute.
#[cfg(test)]
pub(super) fn steady(bytes_per_s: u64) -> Rate {
    let now = Instant::now();
    Rate(VecDeque::from([
        (now, 0),
        (now + Duration::from_secs(20), 20 * bytes_per_s),
    ]))
}

/// One moment of the past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Point {
    /// Seconds since 1970.
    pub(crate) time_unix: u64,
    /// All bytes pulled until then.
    pub(crate) bytes_pulled: u64,
    /// All files pulled until then.
    pub(crate) files_pulled: u64,
    /// Accesses that waited then.
    pub(crate) waiting: u64,
}

/// The past of this daemon, in a bounded number of points.
#[derive(Debug)]
pub(crate) struct History {
    points: Vec<Point>,
    step_s: u64,
}

impl Default for History {
    fn default() -> History {
        History {
            points: Vec::new(),
            step_s: POINT_S,
        }
    }
}

impl History {
    /// Adds a point when it is time for one. `now`: seconds since 1970.
    pub(crate) fn sample(&mut self, now: u64, point: impl FnOnce(u64) -> Point) {
        let due = |p: &Point| now >= p.time_unix.saturating_add(self.step_s);
        if !self.points.last().is_none_or(due) {
            return;
        }
        self.points.push(point(now));
        if self.points.len() >= POINTS_MAX {
            let mut n = 0;
            self.points.retain(|_| {
                n += 1;
                n % 2 == 1
            });
            self.step_s *= 2;
        }
    }

    /// All points, the oldest first.
    pub(crate) fn points(&self) -> &[Point] {
        &self.points
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_of_a_long_migration_stays_small_and_reaches_back_to_its_start() {
        let mut history = History::default();
        for now in 0..1_000_000 {
            history.sample(now, |time_unix| Point {
                time_unix,
                bytes_pulled: time_unix,
                files_pulled: 0,
                waiting: 0,
            });
        }
        let points = history.points();
        assert!(
            (POINTS_MAX / 2 - 1..POINTS_MAX).contains(&points.len()),
            "{}",
            points.len()
        );
        assert_eq!(points[0].time_unix, 0);
        assert!(points.is_sorted_by_key(|p| p.time_unix));
        assert!(points[points.len() - 1].time_unix > 990_000);
    }

    #[test]
    fn a_rate_forgets_what_is_older_than_its_window() {
        let begin = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.bytes_per_s(), 0);
        for s in 0..100 {
            let bytes = if s < 50 { 0 } else { (s - 50) * 1000 };
            rate.sample(begin + Duration::from_secs(s), bytes);
        }
        assert_eq!(rate.bytes_per_s(), 1000);
        assert_eq!(rate.steady_bytes_per_s(), Some(1000));
    }
}
