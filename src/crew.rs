//! Crew: a few threads over one stack of work, for whole-tree jobs (sync, verify).
//!
//! Work is taken from the top, so a tree is walked depth first and the stack stays short: what one
//! directory holds is finished before its neighbour is opened. A worker that has much left asks
//! [`Crew::hungry`] and gives half away; so one huge directory, one huge file, or a slow source
//! keeps everybody busy. The calling thread copies nothing: it hands on what the workers
//! [`Crew::tell`], starts more workers when told that the source is slow, and lets some rest when
//! told that there are too many: a worker rests between two items, and looks for that within long
//! ones ([`Crew::crowded`]). One that rests has work in sight and is not idle.
//!
//! Locks: `stack` and `outbox`, never both at once, never across a step.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Messages that wait for the calling thread before workers have to wait.
const OUTBOX_MAX: usize = 4096;
/// How often the calling thread looks at how many workers there should be.
const TICK: Duration = Duration::from_millis(4);

/// The stack of work `T`, and the messages `M` to the calling thread.
pub struct Crew<'s, T, M> {
    stack: Mutex<Stack<T>>,
    work: Condvar,
    outbox: Mutex<Vec<M>>,
    /// The calling thread waits here.
    news: Condvar,
    /// Workers with a message wait here.
    room: Condvar,
    idle: AtomicUsize,
    /// Workers that do something (as in `stack`), and how many may.
    busy: AtomicUsize,
    allowed: AtomicUsize,
    finished: AtomicBool,
    stop: &'s AtomicBool,
}

struct Stack<T> {
    items: Vec<T>,
    busy: usize,
}

/// Counts a worker as busy until it is dropped: also when a step panics, or the rest would wait.
struct Busy<'a, T>(&'a Mutex<Stack<T>>, &'a AtomicUsize);

impl<T> Drop for Busy<'_, T> {
    fn drop(&mut self) {
        let mut stack = lock(self.0);
        stack.busy -= 1;
        self.1.store(stack.busy, Relaxed);
    }
}

/// What workers did instead of working, all of them together.
#[derive(Default)]
struct Pauses {
    idle_us: AtomicUsize,
    rested_us: AtomicUsize,
}

/// How a crew spent its time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shift {
    /// Most workers at once.
    pub threads: usize,
    /// Part of the workers' time that they had work, 0 to 1.
    pub utilisation: f64,
}

impl<'s, T: Send, M: Send> Crew<'s, T, M> {
    /// Works until the stack is empty or `stop` is set, with as many workers as `wanted` says from time
    /// to time. Each worker has a `W` of its own; `step` does one item.
    pub fn run<W>(
        first: Vec<T>,
        stop: &'s AtomicBool,
        wanted: impl Fn() -> usize,
        worker: impl Fn() -> W + Sync,
        step: impl Fn(&Crew<'s, T, M>, &mut W, T) + Sync,
        on: impl FnMut(M),
    ) -> Shift {
        Crew::led(first, stop, |_| wanted(), worker, step, on)
    }

    /// As `run`; `wanted` is told how many workers have nothing to do.
    pub fn led<W>(
        first: Vec<T>,
        stop: &'s AtomicBool,
        mut wanted: impl FnMut(usize) -> usize,
        worker: impl Fn() -> W + Sync,
        step: impl Fn(&Crew<'s, T, M>, &mut W, T) + Sync,
        mut on: impl FnMut(M),
    ) -> Shift {
        let crew = Crew {
            stack: Mutex::new(Stack {
                items: first,
                busy: 0,
            }),
            work: Condvar::new(),
            outbox: Mutex::new(Vec::new()),
            news: Condvar::new(),
            room: Condvar::new(),
            idle: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            allowed: AtomicUsize::new(1),
            finished: AtomicBool::new(false),
            stop,
        };
        let pauses = Pauses::default();
        let mut threads = 0;
        let mut alive_us = 0;
        std::thread::scope(|scope| {
            let begin = Instant::now();
            while !crew.finished.load(Relaxed) {
                let allowed = wanted(crew.idle.load(Relaxed)).max(1);
                if crew.allowed.swap(allowed, Relaxed) < allowed {
                    crew.work.notify_all();
                }
                while threads < allowed {
                    threads += 1;
                    alive_us -= begin.elapsed().as_micros() as i64;
                    scope.spawn(|| crew.work(&worker, &step, &pauses));
                }
                crew.hand_on(&mut on);
            }
            alive_us += begin.elapsed().as_micros() as i64 * threads as i64;
        });
        crew.hand_on(&mut on);
        let idle = pauses.idle_us.load(Relaxed) as f64;
        let there = alive_us - pauses.rested_us.load(Relaxed) as i64;
        Shift {
            threads,
            utilisation: (1.0 - idle / there.max(1) as f64).clamp(0.0, 1.0),
        }
    }

    /// Adds work; the last item is done first.
    pub fn push(&self, items: impl IntoIterator<Item = T>) {
        let mut stack = lock(&self.stack);
        let before = stack.items.len();
        stack.items.extend(items);
        // As many as there is work for: a crowd that wakes for nothing costs more than the work.
        let may = self.allowed.load(Relaxed).saturating_sub(stack.busy);
        let wake = (stack.items.len() - before).min(may);
        drop(stack);
        let wake = wake.min(self.idle.load(Relaxed));
        (0..wake).for_each(|_| self.work.notify_one());
    }

    /// The top of the stack, if there is anything, for a worker that is in a step and can do it now.
    pub fn take(&self) -> Option<T> {
        lock(&self.stack).items.pop()
    }

    /// True when somebody has nothing to do: whoever has much left may push half of it.
    pub fn hungry(&self) -> bool {
        self.idle.load(Relaxed) > 0
    }

    /// True when more are at work than should be: whoever has much left may push it and end his step.
    pub fn crowded(&self) -> bool {
        self.busy.load(Relaxed) > self.allowed.load(Relaxed)
    }

    /// True when the run was asked to stop: finish what has begun, begin nothing.
    pub fn stopping(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Hands a message to the calling thread; waits while it is far behind.
    pub fn tell(&self, message: M) {
        let mut outbox = lock(&self.outbox);
        while outbox.len() >= OUTBOX_MAX {
            outbox = wait(&self.room, outbox);
        }
        outbox.push(message);
        if outbox.len() == 1 {
            self.news.notify_one();
        }
    }

    fn work<W>(
        &self,
        worker: &impl Fn() -> W,
        step: &impl Fn(&Crew<'s, T, M>, &mut W, T),
        pauses: &Pauses,
    ) {
        let mut own = worker();
        while let Some(item) = self.next(pauses) {
            let busy = Busy(&self.stack, &self.busy);
            step(self, &mut own, item);
            drop(busy);
        }
    }

    /// The top of the stack; `None` when all is done. Counts the caller busy.
    fn next(&self, pauses: &Pauses) -> Option<T> {
        let mut stack = lock(&self.stack);
        loop {
            if self.finished.load(Relaxed) {
                return None;
            }
            let may = stack.busy < self.allowed.load(Relaxed);
            if let Some(item) = (may && !self.stopping())
                .then(|| stack.items.pop())
                .flatten()
            {
                stack.busy += 1;
                self.busy.store(stack.busy, Relaxed);
                return Some(item);
            }
            if stack.busy == 0 {
                self.finished.store(true, Relaxed);
                self.work.notify_all();
                self.news.notify_one();
                return None;
            }
            let since = Instant::now();
            let pause = match may {
                true => &pauses.idle_us,
                false => &pauses.rested_us,
            };
            self.idle.fetch_add(usize::from(may), Relaxed);
            // The last one to finish its step comes here and wakes us: it counts down first.
            stack = wait_a_moment(&self.work, stack);
            self.idle.fetch_sub(usize::from(may), Relaxed);
            pause.fetch_add(since.elapsed().as_micros() as usize, Relaxed);
        }
    }

    /// Waits for a tick or a message, and passes on all messages.
    fn hand_on(&self, on: &mut impl FnMut(M)) {
        let mut outbox = lock(&self.outbox);
        if outbox.is_empty() && !self.finished.load(Relaxed) {
            outbox = self
                .news
                .wait_timeout(outbox, TICK)
                .map_or_else(|e| e.into_inner().0, |(guard, _)| guard);
        }
        let messages = std::mem::take(&mut *outbox);
        self.room.notify_all();
        drop(outbox);
        messages.into_iter().for_each(on);
    }
}

/// A worker that panicked has not left these locks half changed: every critical section is a few
/// moves, so the others go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits for work; not for ever, so that `stop` is seen.
fn wait_a_moment<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar
        .wait_timeout(guard, Duration::from_millis(50))
        .map_or_else(|e| e.into_inner().0, |(guard, _)| guard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_and_every_message_arrives() {
        let stop = AtomicBool::new(false);
        let mut sum = 0u64;
        let shift = Crew::run(
            vec![1u64],
            &stop,
            || 4,
            || (),
            |crew, (), n| {
                crew.tell(n);
                if n < 10_000 {
                    crew.push([2 * n, 2 * n + 1]);
                }
            },
            |n| sum += n,
        );
        assert_eq!(sum, (1..20_000).sum::<u64>());
        assert_eq!(shift.threads, 4);
    }

    /// 8 workers, then 2, then 8 again, a hundred milliseconds each: the most at once in the middle of
    /// each part.
    fn at_once_in_three_parts() -> [Option<usize>; 3] {
        use std::sync::Mutex;
        let stop = AtomicBool::new(false);
        let (begin, at_once) = (Instant::now(), AtomicUsize::new(0));
        let seen = Mutex::new(Vec::new());
        let allowed = |at: Instant| match at.duration_since(begin).as_millis() {
            100..200 => 2,
            _ => 8,
        };
        Crew::led(
            (0..2400).collect(),
            &stop,
            |_| allowed(Instant::now()),
            || (),
            |_: &Crew<'_, u32, ()>, (), _| {
                let n = at_once.fetch_add(1, Relaxed) + 1;
                seen.lock().expect("no panic").push((begin.elapsed(), n));
                std::thread::sleep(Duration::from_millis(1));
                at_once.fetch_sub(1, Relaxed);
            },
            |()| {},
        );
        [(0, 100), (150, 195), (250, 1000)].map(|(from, to)| {
            let time = Duration::from_millis(from)..Duration::from_millis(to);
            let seen = seen.lock().expect("no panic");
            let of = seen.iter().filter(|(at, _)| time.contains(at));
            of.map(|(_, n)| *n).max()
        })
    }

    #[test]
    fn too_many_workers_rest_and_come_back() {
        // A machine that stands still for a moment spoils one try, not all.
        let want = [Some(8), Some(2), Some(8)];
        let mut tries = Vec::new();
        while tries.last() != Some(&want) && tries.len() < 10 {
            tries.push(at_once_in_three_parts());
        }
        assert!(tries.contains(&want), "{tries:?}");
    }

    #[test]
    fn stop_ends_the_run_with_work_left() {
        let stop = AtomicBool::new(false);
        let mut seen = 0;
        Crew::run(
            vec![0u64],
            &stop,
            || 2,
            || (),
            |crew, (), n| {
                crew.tell(n);
                if n == 100 {
                    crew.stop.store(true, Relaxed);
                }
                crew.push([n + 1]);
            },
            |_| seen += 1,
        );
        assert!((100..110).contains(&seen), "{seen}");
    }
}
