//! Asker: for whom a thread works, and what becomes of his waits when a signal ends him.
//!
//!   asking()     what this thread does is done for somebody; what it puts off stays his (`kept`)
//!   Signals      his waits, by his request, until each is told
//!   signalled()  a signal has reached him; his waits are over if it ends him, else he is watched
//!
//! Only a wait ends early, and whoever waits is told so as of any other failure: what had not begun does not
//! happen, what has begun is answered as ever, and what is being pulled is pulled on. A signal that he
//! catches or ignores ends nothing, as on a disk: there no program expects EINTR.

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker {
    /// The number of his request; no two have the same.
    pub request: u64,
    /// His thread; 0 when it cannot be seen from here (another pid namespace).
    pub tid: u32,
    /// `signalled` is called for each signal of his. Else he is looked at as long as he waits: over
    /// io_uring the kernel keeps a signal to itself that comes before we have seen the request.
    pub told: bool,
}

thread_local! {
    static CURRENT: Cell<Option<Asker>> = const { Cell::new(None) };
}

/// Sets a thread's asker back.
struct Before(Option<Asker>);

impl Drop for Before {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// For whom this thread works.
pub(super) fn current() -> Option<Asker> {
    CURRENT.get()
}

/// Does work for somebody, or for nobody.
pub fn asking<R>(asker: Option<Asker>, work: impl FnOnce() -> R) -> R {
    let _before = Before(CURRENT.replace(asker));
    work()
}

/// `work`, done for whom this thread works now, wherever it is done.
pub(super) fn kept<T>(work: impl FnOnce(T) + Send) -> impl FnOnce(T) + Send {
    let asker = current();
    move |told| asking(asker, || work(told))
}

/// Ends a wait, unless it has been told already.
pub(super) type End = Arc<dyn Fn() + Send + Sync>;

/// Signals of which the waits have not begun, at most. Most are of requests that were answered
/// meanwhile, and will never be needed.
const EARLY_MAX: usize = 1024;

/// What waits for whom, and who had a signal.
#[derive(Default)]
pub(super) struct Signals(Mutex<Table>);

#[derive(Default)]
struct Table {
    next: u64,
    waits: HashMap<u64, Waits>,
    /// Requests that wait, and whose asker had a signal that did not end him yet. The kernel tells the
    /// first only.
    watched: HashSet<u64>,
    /// As above, with nothing that waits: not yet, or no longer.
    early: VecDeque<u64>,
}

struct Waits {
    tid: u32,
    told: bool,
    ends: Vec<(u64, End)>,
}

impl Signals {
    /// Remembers a wait of `asker`'s; `forget` takes the number.
    pub(super) fn park(&self, asker: Asker, end: End) -> u64 {
        let mut table = self.0.lock();
        table.next += 1;
        let id = table.next;
        let waits = table.waits.entry(asker.request).or_insert_with(|| Waits {
            tid: asker.tid,
            told: asker.told,
            ends: Vec::new(),
        });
        waits.ends.push((id, end));
        if let Some(at) = table.early.iter().position(|r| *r == asker.request) {
            table.early.remove(at);
            table.watched.insert(asker.request);
        }
        if !asker.told && asker.tid != 0 {
            table.watched.insert(asker.request);
        }
        id
    }

    /// A wait is over.
    pub(super) fn forget(&self, request: u64, id: u64) {
        let mut table = self.0.lock();
        let Some(waits) = table.waits.get_mut(&request) else {
            return;
        };
        let told = waits.told;
        waits.ends.retain(|(other, _)| *other != id);
        if waits.ends.is_empty() {
            table.waits.remove(&request);
            if table.watched.remove(&request) && told {
                table.remember(request);
            }
        }
    }

    /// A signal has reached who asked.
    pub(super) fn signalled(&self, request: u64) {
        let mut table = self.0.lock();
        match table.waits.contains_key(&request) {
            true => drop(table.watched.insert(request)),
            false => table.remember(request),
        }
    }

    /// How many have to be looked at again.
    pub(super) fn watching(&self) -> usize {
        self.0.lock().watched.len()
    }

    /// Ends the waits of those who had a signal that ends them.
    pub(super) fn look(&self, is_ending: impl Fn(u32) -> bool) {
        let watched: Vec<u64> = self.0.lock().watched.iter().copied().collect();
        for request in watched {
            self.look_at(request, &is_ending);
        }
    }

    /// As `look`, for one request.
    pub(super) fn look_at(&self, request: u64, is_ending: impl Fn(u32) -> bool) {
        let tid = {
            let table = self.0.lock();
            let waits = table.waits.get(&request);
            waits
                .filter(|_| table.watched.contains(&request))
                .map(|w| w.tid)
        };
        // Who cannot be seen, and had a signal, is taken for ending.
        if tid.is_none_or(|tid| tid != 0 && !is_ending(tid)) {
            return;
        }
        let waits = {
            let mut table = self.0.lock();
            table.watched.remove(&request);
            table.waits.remove(&request)
        };
        // The innermost first: it tells the others.
        for (_, end) in waits.into_iter().flat_map(|w| w.ends).rev() {
            end();
        }
    }
}

impl Table {
    fn remember(&mut self, request: u64) {
        if self.early.len() == EARLY_MAX {
            self.early.pop_front();
        }
        self.early.push_back(request);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const ME: Asker = Asker {
        request: 8,
        tid: 7,
        told: true,
    };

    fn counting() -> (End, Arc<AtomicU32>) {
        let count = Arc::new(AtomicU32::new(0));
        let ended = Arc::clone(&count);
        let end: End = Arc::new(move || {
            ended.fetch_add(1, Ordering::Relaxed);
        });
        (end, count)
    }

    #[test]
    fn a_signal_ends_the_waits_of_whom_it_ends_and_of_nobody_else() {
        let signals = Signals::default();
        let ((mine, me), (others, other)) = (counting(), counting());
        signals.park(ME, mine);
        let them = Asker {
            request: 10,
            tid: 9,
            ..ME
        };
        signals.park(them, others);
        signals.look(|_| true);
        assert_eq!(me.load(Ordering::Relaxed), 0, "no signal");
        signals.signalled(ME.request);
        signals.look(|_| false);
        assert_eq!(me.load(Ordering::Relaxed), 0, "it did not end him");
        assert_eq!(signals.watching(), 1);
        signals.look(|tid| tid == 7);
        assert_eq!(signals.watching(), 0);
        signals.look(|_| true);
        let counts = (me.load(Ordering::Relaxed), other.load(Ordering::Relaxed));
        assert_eq!(counts, (1, 0));
    }

    #[test]
    fn a_signal_that_comes_before_the_wait_or_between_two_is_not_lost() {
        let signals = Signals::default();
        signals.signalled(ME.request);
        let ((first, one), (second, two)) = (counting(), counting());
        let id = signals.park(ME, first);
        signals.look(|_| false);
        signals.forget(ME.request, id);
        assert_eq!(signals.watching(), 0);
        signals.park(ME, second);
        signals.look(|_| true);
        let counts = (one.load(Ordering::Relaxed), two.load(Ordering::Relaxed));
        assert_eq!(counts, (0, 1));
    }

    #[test]
    fn whose_signals_nobody_tells_of_is_looked_at_while_he_waits() {
        let signals = Signals::default();
        let ((first, one), (second, two)) = (counting(), counting());
        let untold = Asker { told: false, ..ME };
        let id = signals.park(untold, first);
        signals.look(|_| false);
        signals.forget(ME.request, id);
        assert_eq!((signals.watching(), signals.0.lock().early.len()), (0, 0));
        signals.park(untold, second);
        signals.look(|tid| tid == 7);
        let counts = (one.load(Ordering::Relaxed), two.load(Ordering::Relaxed));
        assert_eq!(counts, (0, 1));
    }

    #[test]
    fn who_cannot_be_seen_is_taken_for_ending_and_old_signals_are_forgotten() {
        let signals = Signals::default();
        for n in 0..2000 {
            signals.signalled(100 + n);
        }
        assert_eq!(signals.0.lock().early.len(), EARLY_MAX);
        let (end, count) = counting();
        signals.park(Asker { tid: 0, ..ME }, end);
        signals.signalled(ME.request);
        signals.look(|_| false);
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert!(signals.0.lock().waits.is_empty());
    }

    #[test]
    fn what_is_put_off_is_done_for_who_asked() {
        let seen = asking(Some(ME), || kept(|()| assert_eq!(current(), Some(ME))));
        assert_eq!(current(), None);
        asking(Some(Asker { request: 1, ..ME }), || seen(()));
        assert_eq!(current(), None);
    }
}
