//! Depth: how many threads work at once, by what src has answered so far. Pure.
//!
//!   Few    -> Open    it keeps us waiting: at once as many as latency times rate say (Little's law)
//!   Open   -> Trial   answers take several times as long as the quickest did: they stand in line in src,
//!                     so fewer threads should bring as much. Tried, half the threads at most
//!   Trial  -> Trial   as much or more was answered, and they still stand in line
//!   Trial  -> Held    as much was answered: so many for a while. Or less was: as many as before
//!   Held   -> Rise    the while is over: twice as many are tried
//!   Rise   -> Rise    more was answered, and src deserves more
//!   Rise   -> Held    no more was answered: as many as before, for twice as long
//!   any    -> Few     it answers from memory
//!
//! Each change is judged by what was answered in a window before and in one after it, never by
//! latency alone: latency grows as well when our own processors are the limit. Windows in which
//! threads had no work say nothing.

use std::time::Duration;

/// From this on a small file's time is waiting.
pub(super) const SLOW: Duration = Duration::from_micros(150);
/// Our own work for a small file.
const WORK: Duration = Duration::from_micros(30);
/// Answers that take this many times as long as the quickest stand in line.
const IN_LINE: u32 = 3;
/// Windows that a setting is held.
const HOLD_MIN: u32 = 8;
const HOLD_MAX: u32 = 128;
/// The least answers that a window is judged by.
const ANSWERS_MIN: u64 = 32;

/// What a run may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// For a source that answers from memory.
    pub(super) few: usize,
    /// The most.
    pub(super) most: usize,
    /// Processors.
    pub(super) cpus: usize,
}

/// What is known of src at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// Since the run began.
    pub(super) at: Duration,
    /// Answers so far, and how long they took together.
    pub(super) answers: u64,
    pub(super) waited: Duration,
    /// Running median of one answer.
    pub(super) median: Duration,
    /// The quickest answer since the last look, if there was one.
    pub(super) quickest: Option<Duration>,
    /// Threads that have nothing to do.
    pub(super) idle: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Few,
    Open,
    /// Fewer than `was`; `rate` is the best that was seen on the way down.
    Trial {
        was: usize,
        rate: f64,
    },
    /// More than `was`.
    Rise {
        was: usize,
        rate: f64,
    },
    Held {
        left: u32,
    },
}

/// The number of threads.
pub(super) struct Depth {
    limits: Limits,
    threads: usize,
    state: State,
    /// Windows that the next setting is held.
    hold: u32,
    /// Where the window begins; `None`: it has to be opened.
    since: Option<Look>,
    /// Answers of the setting before, not to be judged.
    skip: u64,
    /// The quickest answer, forgotten slowly.
    quickest: Option<Duration>,
}

impl Depth {
    pub(super) fn new(limits: Limits) -> Depth {
        Depth {
            limits,
            threads: limits.few,
            state: State::Few,
            hold: HOLD_MIN,
            since: None,
            skip: 0,
            quickest: None,
        }
    }

    /// How many threads there should be from now on.
    pub(super) fn after(&mut self, look: Look) -> usize {
        if let Some(quick) = look.quickest {
            self.quickest = Some(self.quickest.map_or(quick, |q| q.min(quick)));
        }
        // What is known to be slow has to be fast beyond doubt.
        let slow = match self.state {
            State::Few => look.median >= SLOW,
            _ => look.median >= SLOW / 2,
        };
        if !slow {
            (self.state, self.quickest) = (State::Few, None);
            self.set(self.limits.few);
            return self.threads;
        }
        if matches!(self.state, State::Few | State::Open) {
            self.state = State::Open;
            let deserved = self.deserved(&look);
            if deserved > self.threads {
                self.set(deserved);
            }
        }
        if let Some(window) = self.window(look) {
            self.judge(look, &window);
        }
        self.threads
    }

    /// As many as keep the processors busy while the others wait.
    fn deserved(&self, look: &Look) -> usize {
        let each = look.median.as_nanos() / WORK.as_nanos();
        let each = usize::try_from(each).unwrap_or(usize::MAX);
        let all = each.saturating_mul(self.limits.cpus);
        all.clamp(1, self.limits.most)
    }

    fn set(&mut self, threads: usize) {
        if threads != self.threads {
            self.threads = threads;
            self.skip = threads as u64;
            self.since = None;
        }
    }

    /// The window that ends now, if it is long enough to be judged.
    fn window(&mut self, look: Look) -> Option<Window> {
        let Some(since) = self.since else {
            self.since = Some(look);
            return None;
        };
        if look.idle > self.threads / 4 {
            self.since = Some(look);
            return None;
        }
        let answers = look.answers - since.answers;
        if self.skip > 0 {
            if answers >= self.skip {
                self.skip = 0;
                self.since = Some(look);
            }
            return None;
        }
        if answers < ANSWERS_MIN.max(self.threads as u64) {
            return None;
        }
        self.since = Some(look);
        let took = (look.at - since.at).as_secs_f64().max(1e-9);
        let waited = look.waited.saturating_sub(since.waited);
        let mean = waited / u32::try_from(answers).unwrap_or(u32::MAX);
        let quickest = self.quickest.unwrap_or(mean).max(Duration::from_nanos(1));
        // What was quick long ago proves less and less.
        self.quickest = Some(quickest + quickest / 32);
        Some(Window {
            rate: answers as f64 / took,
            in_line: mean.as_secs_f64() / quickest.as_secs_f64(),
        })
    }

    fn judge(&mut self, look: Look, w: &Window) {
        let deserved = self.deserved(&look);
        match self.state {
            State::Few => {}
            State::Open => self.fewer(w, w.rate),
            State::Trial { was, rate } => {
                if w.rate < 0.9 * rate {
                    self.set(was);
                    self.held();
                } else {
                    self.hold = HOLD_MIN;
                    self.fewer(w, rate.max(w.rate));
                }
            }
            State::Held { left } if left > 1 => self.state = State::Held { left: left - 1 },
            State::Held { .. } => self.more(deserved, w.rate),
            State::Rise { was, rate } => {
                // A quarter of what so many more would bring if nobody stood in line.
                let asked = self.threads as f64 / was.max(1) as f64 - 1.0;
                if w.rate < rate * (1.0 + asked / 4.0) {
                    self.set(was);
                    self.held();
                } else {
                    self.hold = HOLD_MIN;
                    self.more(deserved, w.rate);
                }
            }
        }
    }

    /// Tries fewer threads, if answers stand in line.
    fn fewer(&mut self, w: &Window, rate: f64) {
        let was = self.threads;
        if w.in_line < f64::from(IN_LINE) || was == 1 {
            if self.state != State::Open {
                self.held();
            }
            return;
        }
        let useful = (was as f64 / w.in_line * 1.25).ceil() as usize;
        self.state = State::Trial { was, rate };
        self.set(useful.clamp(was.div_ceil(2), was - 1));
    }

    /// Tries more threads, if src deserves them.
    fn more(&mut self, deserved: usize, rate: f64) {
        let was = self.threads;
        if was >= deserved {
            self.state = State::Open;
            return;
        }
        self.state = State::Rise { was, rate };
        self.set((2 * was).min(deserved));
    }

    fn held(&mut self) {
        self.state = State::Held { left: self.hold };
        self.hold = (2 * self.hold).min(HOLD_MAX);
    }
}

struct Window {
    /// Answers a second.
    rate: f64,
    /// How many times as long as the quickest answer the usual one took.
    in_line: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A source: the rate of answers a second that it has with so many threads.
    struct Source<R: Fn(usize) -> f64> {
        rate: R,
        alone: Duration,
        depth: Depth,
        at: Duration,
        answers: f64,
        waited: Duration,
        noise: u64,
    }

    impl<R: Fn(usize) -> f64> Source<R> {
        fn new(alone: Duration, rate: R) -> Source<R> {
            Source {
                rate,
                alone,
                depth: Depth::new(Limits {
                    few: 4,
                    most: 128,
                    cpus: 2,
                }),
                at: Duration::ZERO,
                answers: 0.0,
                waited: Duration::ZERO,
                noise: 1,
            }
        }

        /// Goes on for a while; returns the number of threads at each tick.
        fn run(&mut self, time: Duration) -> Vec<usize> {
            let (mut seen, end) = (Vec::new(), self.at + time);
            while self.at < end {
                let n = self.depth.threads;
                // Up to a twentieth more or less.
                self.noise = self.noise.wrapping_mul(6364136223846793005).wrapping_add(1);
                let noise = 0.95 + (self.noise >> 40) as f64 / (1u64 << 24) as f64 / 10.0;
                let rate = (self.rate)(n) * noise;
                let each = Duration::from_secs_f64(n as f64 / rate);
                let begin = self.answers;
                self.answers += rate * 4e-3;
                self.at += 4 * MS;
                self.waited += each.mul_f64(self.answers.floor() - begin.floor());
                let look = Look {
                    at: self.at,
                    answers: self.answers as u64,
                    waited: self.waited,
                    median: each,
                    quickest: Some(if self.at == 4 * MS { self.alone } else { each }),
                    idle: 0,
                };
                seen.push(self.depth.after(look));
            }
            seen
        }
    }

    fn mean(threads: &[usize]) -> f64 {
        threads.iter().sum::<usize>() as f64 / threads.len() as f64
    }

    fn serves(n: usize, at_once: usize) -> f64 {
        n.min(at_once) as f64 * 1000.0
    }

    #[test]
    fn a_source_that_serves_all_gets_all_at_once_and_keeps_them() {
        let mut s = Source::new(MS, |n| serves(n, 1000));
        let seen = s.run(2000 * MS);
        // 1 ms, 30 us of work, 2 processors.
        assert!(seen.iter().all(|n| (60..80).contains(n)), "{seen:?}");
    }

    #[test]
    fn a_source_that_serves_8_at_once_gets_about_8() {
        let mut s = Source::new(MS, |n| serves(n, 8));
        s.run(500 * MS);
        let seen = s.run(3000 * MS);
        let mean = mean(&seen);
        assert!((8.0..20.0).contains(&mean), "{mean} {seen:?}");
    }

    #[test]
    fn a_source_that_thrashes_beyond_16_gets_about_16() {
        let rate = |n: usize| match n {
            0..=16 => n as f64 * 1000.0,
            n => 16_000.0 * (16.0 / n as f64),
        };
        let mut s = Source::new(MS, rate);
        let before = s.run(500 * MS);
        let seen = s.run(3000 * MS);
        let mean = mean(&seen);
        assert!((12.0..24.0).contains(&mean), "{mean} {before:?} {seen:?}");
    }

    #[test]
    fn a_source_that_gets_worse_loses_threads_and_gets_them_back() {
        use std::cell::Cell;
        use std::rc::Rc;
        let at_once = Rc::new(Cell::new(1000));
        let now = Rc::clone(&at_once);
        let mut s = Source::new(MS, move |n| serves(n, now.get()));
        assert!(mean(&s.run(500 * MS)) > 60.0);
        at_once.set(4);
        s.run(1000 * MS);
        let bad = mean(&s.run(2000 * MS));
        assert!((4.0..12.0).contains(&bad), "{bad}");
        at_once.set(1000);
        s.run(3000 * MS);
        let good = mean(&s.run(1000 * MS));
        assert!(good > 40.0, "{good}");
    }

    #[test]
    fn a_source_that_only_became_slower_keeps_its_threads() {
        use std::cell::Cell;
        use std::rc::Rc;
        // Ten times as slow for each, as with a longer way to it: threads still help.
        let slower = Rc::new(Cell::new(1.0));
        let now = Rc::clone(&slower);
        let mut s = Source::new(MS, move |n| n as f64 * 1000.0 / now.get());
        s.run(500 * MS);
        slower.set(10.0);
        s.run(1000 * MS);
        let seen = s.run(3000 * MS);
        assert!(mean(&seen) > 115.0, "{} {seen:?}", mean(&seen));
    }

    #[test]
    fn where_processors_are_the_limit_fewer_threads_do_as_much() {
        // 6,000 files a second, whatever the threads: 24 of them at 4 ms each.
        let mut s = Source::new(4 * MS, |n| (n as f64 * 250.0).min(6000.0));
        s.run(1000 * MS);
        let seen = s.run(2000 * MS);
        let mean = mean(&seen);
        assert!((24.0..80.0).contains(&mean), "{mean} {seen:?}");
    }

    #[test]
    fn a_source_that_answers_from_memory_gets_few_threads_from_the_start_and_again() {
        use std::cell::Cell;
        use std::rc::Rc;
        let us = Rc::new(Cell::new(10.0));
        let now = Rc::clone(&us);
        let mut s = Source::new(MS, move |n| n as f64 * 1e6 / now.get());
        assert!(s.run(100 * MS).iter().all(|n| *n == 4));
        us.set(1000.0);
        assert!(mean(&s.run(200 * MS)) > 50.0);
        us.set(10.0);
        assert_eq!(s.run(100 * MS).last(), Some(&4));
    }

    #[test]
    fn never_more_than_asked_for_and_no_judgement_where_work_was_short() {
        let limits = Limits {
            few: 2,
            most: 2,
            cpus: 2,
        };
        let look = |i: u64, idle| Look {
            at: Duration::from_millis(4 * i),
            answers: 1000 * i,
            waited: 5 * MS * 1000 * i as u32,
            median: 5 * MS,
            quickest: Some(MS / 10),
            idle,
        };
        let mut depth = Depth::new(limits);
        assert!((1..100).all(|i| depth.after(look(i, 0)) <= 2));
        let mut depth = Depth::new(Limits {
            most: 100,
            ..limits
        });
        assert!((1..100).all(|i| depth.after(look(i, 30)) == 100));
    }
}
