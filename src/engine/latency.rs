//! Latencies: whether a call goes straight to the kernel or through the ring. Pure.
//!
//!   Ring   -> Direct   the ring answered fast, and a direct call took under DIRECT_NS
//!   Direct -> Ring     direct calls got slower than DIRECT_NS on average, or one stalled
//!
//! On a page-cached local source the plain call is cheapest; on a source that waits (FUSE, NFS) a
//! direct call stops the whole worker. So an unknown source is asked through the ring first, and
//! a direct call is only tried when the ring's best answer lately was fast. Failed tries become
//! rarer. Even a fast source is asked through the ring now and then.

use std::time::Duration;

/// Kinds of calls with a latency of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Open,
    Stat,
    Read,
    Write,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A plain system call.
    Direct,
    /// A ring operation with IOSQE_ASYNC.
    Ring,
}

/// Direct calls that take longer than this on average go through the ring.
const DIRECT_NS: u64 = 30_000;
/// One direct call that took this long is enough.
const STALL_NS: u64 = 20_000_000;
/// The ring's best answer must be under this for a direct try: waking a kernel worker on another
/// CPU alone takes some 50 us, and a busy worker reaps late.
const RING_FAST_NS: u64 = 300_000;
/// Every so many calls of a fast source one goes through the ring.
const PROBE_EVERY: u32 = 1024;
const TRY_EVERY_MIN: u32 = 1;
const TRY_EVERY_MAX: u32 = 4096;

#[derive(Debug, Clone, Copy)]
struct Meter {
    /// A direct call may never come back.
    never: bool,
    direct: bool,
    mean_ns: u64,
    calls: u32,
    ring_best_ns: u64,
    ring_answers: u32,
    try_every: u32,
}

const UNKNOWN: Meter = Meter {
    never: false,
    direct: false,
    mean_ns: 0,
    calls: 0,
    ring_best_ns: u64::MAX,
    ring_answers: 0,
    try_every: TRY_EVERY_MIN,
};

/// A source's latencies, as one worker has seen them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Latencies([Meter; 4]);

impl Latencies {
    /// A source that nobody has asked yet.
    pub(super) fn unknown() -> Latencies {
        Latencies([UNKNOWN; 4])
    }

    /// A source whose calls may hang: a thread of ours is never given to one.
    pub(super) fn of_a_server() -> Latencies {
        let meter = Meter {
            never: true,
            ..UNKNOWN
        };
        Latencies([meter; 4])
    }

    /// Which way the next call of this kind goes.
    pub(super) fn choose(&mut self, kind: Kind) -> Way {
        let m = &mut self.0[kind as usize];
        m.calls = m.calls.wrapping_add(1);
        if m.direct {
            return if m.calls.is_multiple_of(PROBE_EVERY) {
                Way::Ring
            } else {
                Way::Direct
            };
        }
        if m.ring_answers >= m.try_every {
            let fast = m.ring_best_ns < RING_FAST_NS;
            (m.ring_answers, m.ring_best_ns) = (0, u64::MAX);
            if fast && !m.never {
                return Way::Direct;
            }
        }
        Way::Ring
    }

    /// True when direct calls of this kind are known to be cheap.
    pub(super) fn is_fast(&self, kind: Kind) -> bool {
        self.0[kind as usize].direct
    }

    /// A direct call came back.
    pub(super) fn direct(&mut self, kind: Kind, took: Duration) {
        let ns = nanos(took);
        let m = &mut self.0[kind as usize];
        // One call that was preempted says little: clipped, it takes several to turn the mean.
        let clipped = ns.min(4 * DIRECT_NS);
        m.mean_ns = if m.mean_ns == 0 {
            clipped
        } else {
            (m.mean_ns * 7 + clipped) / 8
        };
        let fast = m.mean_ns < DIRECT_NS && ns < STALL_NS;
        if fast && m.direct && m.calls.is_multiple_of(64) {
            m.try_every = TRY_EVERY_MIN;
        } else if !fast {
            m.try_every = (m.try_every * 2).min(TRY_EVERY_MAX);
            (m.ring_answers, m.ring_best_ns, m.mean_ns) = (0, u64::MAX, 0);
        }
        m.direct = fast;
    }

    /// A ring operation came back.
    pub(super) fn ring(&mut self, kind: Kind, took: Duration) {
        let ns = nanos(took);
        let m = &mut self.0[kind as usize];
        m.ring_best_ns = m.ring_best_ns.min(ns);
        m.ring_answers = m.ring_answers.saturating_add(1);
        if ns > STALL_NS {
            m.direct = false;
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Makes `n` calls; returns how many went directly.
    fn calls(l: &mut Latencies, n: usize, direct: Duration, ring: Duration) -> usize {
        let mut directly = 0;
        for _ in 0..n {
            match l.choose(Kind::Open) {
                Way::Direct => {
                    directly += 1;
                    l.direct(Kind::Open, direct);
                }
                Way::Ring => l.ring(Kind::Open, ring),
            }
        }
        directly
    }

    #[test]
    fn the_first_call_to_an_unknown_source_goes_through_the_ring() {
        assert_eq!(Latencies::unknown().choose(Kind::Read), Way::Ring);
    }

    #[test]
    fn a_cached_source_is_called_directly() {
        let mut l = Latencies::unknown();
        assert!(calls(&mut l, 10_000, 3 * US, 60 * US) > 9_900);
        assert!(l.is_fast(Kind::Open) && !l.is_fast(Kind::Read));
    }

    #[test]
    fn a_source_with_a_millisecond_is_never_called_directly() {
        assert_eq!(
            calls(&mut Latencies::unknown(), 10_000, 1000 * US, 1050 * US),
            0
        );
    }

    #[test]
    fn a_source_that_may_hang_is_never_called_directly_however_fast_it_is() {
        let mut l = Latencies::of_a_server();
        assert_eq!(calls(&mut l, 10_000, 3 * US, 60 * US), 0);
        assert!(!l.is_fast(Kind::Open));
    }

    #[test]
    fn a_source_near_the_limit_is_tried_more_and_more_rarely() {
        assert!(calls(&mut Latencies::unknown(), 100_000, 200 * US, 250 * US) < 50);
    }

    #[test]
    fn one_preempted_call_changes_nothing_and_one_stall_does() {
        let mut l = Latencies::unknown();
        calls(&mut l, 100, 3 * US, 60 * US);
        l.direct(Kind::Open, 5000 * US);
        assert!(l.is_fast(Kind::Open));
        l.direct(Kind::Open, 50_000 * US);
        assert!(!l.is_fast(Kind::Open));
        assert!(calls(&mut l, 100, 3 * US, 60 * US) > 90, "and it recovers");
    }
}
