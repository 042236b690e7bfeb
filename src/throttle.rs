//! Throttle: what holds the background back. Demand never asks here.
//!
//!   Running  -> Paused   set_background()   everything in the background stays where it is
//!   Running  -> Off      set_background()   nothing new is begun in the background
//!   open     -> closed   spend()            more was read than the limit allows by now
//!   closed   -> open     time, or a change  `wait` and `wait_open` return
//!
//! The limit is kept as one moment: when all that was spent is paid for at the present rate. Whoever
//! spends may go into debt, so that a piece need not be cut to fit. Lock order: `changed` is a leaf.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What was not spent is kept this long.
const BURST: Duration = Duration::from_millis(50);
/// How often a wait looks whether it should give up.
const LOOK: Duration = Duration::from_millis(50);

/// Whether the background works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    /// It pulls what nobody asks for.
    Running,
    /// It stays where it is.
    Paused,
    /// It pulls nothing; what was begun has ended.
    Off,
}

/// The limits of the background, changed while it works.
#[derive(Debug)]
pub struct Throttle {
    background: AtomicU8,
    jobs: AtomicUsize,
    /// Bytes per second; 0: no limit.
    bytes_per_s: AtomicU64,
    /// The limit is not applied for now.
    lifted: AtomicBool,
    /// The background ends: nobody waits for the limit any more.
    ended: AtomicBool,
    /// Nanoseconds since `base`: when everything spent is paid for.
    paid_at_ns: AtomicU64,
    base: Instant,
    changed: Mutex<()>,
    wake: Condvar,
}

impl Default for Throttle {
    fn default() -> Throttle {
        Throttle {
            background: AtomicU8::new(0),
            jobs: AtomicUsize::new(usize::MAX),
            bytes_per_s: AtomicU64::new(0),
            lifted: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            paid_at_ns: AtomicU64::new(0),
            base: Instant::now(),
            changed: Mutex::new(()),
            wake: Condvar::new(),
        }
    }
}

impl Throttle {
    /// Whether the background works.
    pub fn background(&self) -> Background {
        match self.background.load(SeqCst) {
            0 => Background::Running,
            1 => Background::Paused,
            _ => Background::Off,
        }
    }

    /// Lets it work, or not.
    pub fn set_background(&self, to: Background) {
        self.background.store(to as u8, SeqCst);
        self.tell();
    }

    /// How many threads of each kind may work in the background: thread `n` does when `n` is less.
    pub fn jobs(&self) -> usize {
        self.jobs.load(Relaxed)
    }

    /// Sets that number; `None`: as many as there are.
    pub fn set_jobs(&self, jobs: Option<usize>) {
        self.jobs.store(jobs.unwrap_or(usize::MAX).max(1), Relaxed);
        self.tell();
    }

    /// The limit that was set, bytes per second.
    pub fn limit(&self) -> Option<u64> {
        Some(self.bytes_per_s.load(Relaxed)).filter(|rate| *rate > 0)
    }

    /// Sets the limit and applies it, bytes per second; `None` or 0: there is none.
    pub fn set_limit(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s.store(bytes_per_s.unwrap_or(0), Relaxed);
        self.lifted.store(false, Relaxed);
        self.forgive();
    }

    /// Lifts the limit, or applies it again; true when it is applied now.
    pub fn toggle_limit(&self) -> bool {
        let applied = self.lifted.fetch_not(Relaxed);
        self.forgive();
        applied
    }

    /// True while a limit is set and not applied.
    pub fn is_lifted(&self) -> bool {
        self.lifted.load(Relaxed) && self.limit().is_some()
    }

    /// Counts bytes that the background has read, or is about to read.
    pub fn spend(&self, bytes: u64) {
        let Some(rate) = self.applied() else { return };
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let earliest = self.now_ns().saturating_sub(BURST.as_nanos() as u64);
        let pay = |paid: u64| Some(paid.max(earliest).saturating_add(cost));
        self.paid_at_ns.fetch_update(SeqCst, SeqCst, pay).ok(); // `pay` never declines.
    }

    /// True when the background may go on now.
    pub fn is_open(&self) -> bool {
        self.opens_in() == Some(Duration::ZERO)
    }

    /// The background ends: who waits for the limit hears it at once.
    pub fn end(&self) {
        self.ended.store(true, SeqCst);
        self.tell();
    }

    /// Waits until the limit allows more. False: `give_up` said so, or the background does not run, or ends.
    pub fn wait(&self, give_up: impl Fn() -> bool) -> bool {
        loop {
            let ends = self.ended.load(SeqCst) || give_up();
            if ends || self.background() != Background::Running {
                return false;
            }
            match self.opens_in() {
                Some(Duration::ZERO) => return true,
                time => self.sleep(time),
            }
        }
    }

    /// Waits until the background may go on. False: `give_up` said so.
    pub fn wait_open(&self, give_up: impl Fn() -> bool) -> bool {
        loop {
            match self.opens_in() {
                _ if give_up() => return false,
                Some(Duration::ZERO) => return true,
                time => self.sleep(time),
            }
        }
    }

    /// Wakes who waits, to look whether to give up.
    pub fn tell(&self) {
        let _changed = self.changed.lock();
        self.wake.notify_all();
    }

    /// When the gate opens; `None`: when somebody resumes the background.
    fn opens_in(&self) -> Option<Duration> {
        if self.background() == Background::Paused {
            return None;
        }
        if self.applied().is_none() {
            return Some(Duration::ZERO);
        }
        let debt = self.paid_at_ns.load(SeqCst).saturating_sub(self.now_ns());
        Some(Duration::from_nanos(debt))
    }

    fn sleep(&self, time: Option<Duration>) {
        let mut changed = self.changed.lock();
        self.wake
            .wait_for(&mut changed, time.unwrap_or(LOOK).min(LOOK));
    }

    fn applied(&self) -> Option<u64> {
        self.limit().filter(|_| !self.lifted.load(Relaxed))
    }

    /// What was spent at another rate is no debt at this one.
    fn forgive(&self) {
        self.paid_at_ns.store(self.now_ns(), SeqCst);
        self.tell();
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_over_the_limit_close_the_gate_until_they_are_paid_for() {
        let throttle = Throttle::default();
        throttle.spend(1 << 40);
        assert!(throttle.is_open(), "no limit");
        throttle.set_limit(Some(1 << 20));
        let begun = Instant::now();
        throttle.spend(200 << 10);
        assert!(!throttle.is_open());
        assert!(throttle.wait(|| false));
        let took = begun.elapsed();
        // 200 KiB at 1 MiB/s, less the burst.
        assert!(took >= Duration::from_millis(140), "{took:?}");
        assert!(took < Duration::from_millis(1000), "{took:?}");
    }

    #[test]
    fn a_toggle_lifts_the_limit_and_forgives_what_was_spent() {
        let throttle = Throttle::default();
        throttle.set_limit(Some(1));
        throttle.spend(1 << 30);
        assert!(!throttle.is_open());
        assert!(!throttle.toggle_limit());
        assert!(throttle.is_open() && throttle.is_lifted());
        assert!(throttle.toggle_limit());
        assert_eq!(throttle.limit(), Some(1));
        throttle.spend(1 << 30);
        throttle.end();
        assert!(!throttle.wait(|| false), "no wait for years");
        throttle.set_limit(Some(1));
        assert!(throttle.is_open() && !throttle.is_lifted());
    }

    #[test]
    fn a_pause_closes_the_gate_whatever_the_limit_is_and_off_does_not() {
        let throttle = Throttle::default();
        throttle.set_background(Background::Paused);
        assert!(!throttle.is_open() && !throttle.wait(|| false));
        assert!(!throttle.wait_open(|| true));
        throttle.set_background(Background::Off);
        assert!(throttle.is_open(), "what was begun ends");
        assert!(!throttle.wait(|| false));
        throttle.set_background(Background::Running);
        assert!(throttle.wait(|| false) && throttle.wait_open(|| false));
    }
}
