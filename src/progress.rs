//! Progress: counters that everybody adds to and that only status and run read.
//!
//! Counters only grow, except the gauges (named so). Bytes count when they are durable in dst.

pub mod requests;
pub mod waits;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use self::requests::Requests;
use self::waits::Waits;

/// A counter: any thread adds, status reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Subtracts `n` from a gauge.
    pub fn sub(&self, n: u64) {
        // A gauge that was started below what is taken from it must not wrap to a huge number.
        let floor = |v: u64| Some(v.saturating_sub(n));
        self.0.fetch_update(Relaxed, Relaxed, floor).ok();
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Sets a gauge.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }
}

/// What has been done and what is known to be left.
#[derive(Debug, Default)]
pub struct Progress {
    /// Entries of src that were seen (each name once).
    pub entries_seen: Counter,
    /// Entries that have their name and metadata in dst.
    pub entries_placed: Counter,
    /// Directories populated.
    pub dirs_populated: Counter,
    /// Bytes of regular files that were seen (st_size of each inode once).
    pub bytes_seen: Counter,
    /// Bytes of files that are complete and durable in dst.
    pub bytes_pulled: Counter,
    /// Files that are complete and durable in dst.
    pub files_pulled: Counter,
    /// Regular files that were seen.
    pub files_seen: Counter,
    /// Files that were pulled because somebody waited.
    pub demand_files: Counter,
    /// Bytes that were pulled because somebody waited.
    pub demand_bytes: Counter,
    /// Files that were pulled because their neighbours were opened, or by a trace.
    pub prefetched: Counter,
    /// Of those, files that were opened then.
    pub prefetch_hits: Counter,
    /// Gauge: bytes that are known to be still to pull (statfs subtracts them).
    pub bytes_left: Counter,
    /// Requests of the kernel's.
    pub requests: Requests,
    /// Accesses that wait for src.
    pub waits: Waits,
    /// Gauge: changes that wait until their directory's publication is durable.
    pub barriers: Counter,
    /// Bytes that need not be pulled any more: users have truncated or deleted their files.
    pub bytes_dropped: Counter,
    /// What earlier daemons of this migration have pulled: entries, files, bytes. Part of no other
    /// counter.
    pub earlier: [Counter; 3],
    /// Names that only dst has, kept: an earlier copy was adopted without `--delete`.
    pub extras: Counter,
    /// Such names that were removed, by this daemon.
    pub extras_removed: Counter,
    /// Failures now in the ledger (gauge).
    pub errors: Counter,
    /// The walker has seen every directory once: totals are no longer estimates.
    pub walk_done: AtomicBool,
    /// Nothing is pending.
    pub complete: AtomicBool,
    /// Whole passes of the walker changed nothing any more: what is left needs somebody.
    pub stuck: AtomicBool,
    /// dst takes nothing more: the background waits.
    pub dst_full: AtomicBool,
    /// What dst said, in one line, for people.
    pub dst_says: Mutex<Option<String>>,
    /// src is away.
    pub src_is_away: AtomicBool,
    /// Since when, and what it says.
    pub src_away: Mutex<Option<Away>>,
}

/// A src that does not answer.
#[derive(Debug, Clone)]
pub struct Away {
    /// When that was found.
    pub since: Instant,
    /// Likewise, for people.
    pub since_wall: SystemTime,
    /// What its root answered, in one line.
    pub why: String,
}

impl Away {
    /// As of now.
    pub fn now(why: String) -> Away {
        Away {
            since: Instant::now(),
            since_wall: SystemTime::now(),
            why,
        }
    }
}

impl Progress {
    /// Somebody waits, for src or for a barrier.
    pub fn is_waited_for(&self) -> bool {
        !self.waits.is_empty() || self.barriers.get() > 0
    }
}
