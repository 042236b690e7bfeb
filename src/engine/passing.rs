//! Passing: what large background files leave in the page cache, for `mount` as for `sync`.
//!
//! An [`Allowance`] says which files only pass through it: what was not in the cache before is not in
//! it afterwards. [`Passing`] is one such file on a worker: RWF_DONTCACHE on each side whose file
//! system has it. Where src has none its pages are forgotten behind the copy, unless they were
//! somebody else's; where dst has none it is written back and forgotten window by window, and the
//! caller forgets the rest once that is durable.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::io::Errno;

use super::copy::Action;
use super::job::Priority;
use super::worker::Worker;
use crate::config::Cache;
use crate::error::Side;
use crate::sys::cache;

/// Part of the free memory that `auto` fills with large files.
const KEPT_PART: u64 = 4;
/// What is written back and forgotten together: large enough for a disk to stream.
const WINDOW: u64 = 16 << 20;

/// What large files may still leave in the cache.
pub struct Allowance {
    cache: Cache,
    left: AtomicU64,
}

impl Allowance {
    /// Nothing was taken yet; `auto` looks at the memory that is free now.
    pub fn new(cache: Cache) -> Allowance {
        let free = crate::sys::memory::available();
        let left = free.map_or(u64::MAX, |free| free / KEPT_PART);
        Allowance::of(cache, left)
    }

    /// With `left` bytes that `auto` may fill.
    fn of(cache: Cache, left: u64) -> Allowance {
        let left = AtomicU64::new(left);
        Allowance { cache, left }
    }

    /// Takes a file with that many bytes of data: true when it only passes.
    pub fn passes(&self, bytes: u64) -> bool {
        let take = |left: u64| left.checked_sub(bytes);
        match self.cache {
            Cache::Keep => false,
            Cache::Drop | Cache::Direct => true,
            Cache::Auto => self.left.fetch_update(Relaxed, Relaxed, take).is_err(),
        }
    }

    /// Data goes past the cache (O_DIRECT) wherever it can.
    pub fn is_direct(&self) -> bool {
        self.cache == Cache::Direct
    }
}

/// One file that leaves nothing in the cache.
pub(super) struct Passing {
    /// RWF_DONTCACHE has not been refused.
    once: [bool; 2],
    /// The chunks whose call under way asks for it, a bit each.
    asked: u64,
    /// Somebody else has src in the cache.
    theirs: bool,
    /// Up to here windows were given back.
    behind: u64,
}

impl Passing {
    /// `ring`: there is one; plain calls do it by hand.
    pub(super) fn new(ring: bool) -> Passing {
        Passing {
            once: [ring; 2],
            asked: 0,
            theirs: false,
            behind: 0,
        }
    }

    /// RWF_DONTCACHE is asked for on that side.
    fn once(&self, side: Side) -> bool {
        self.once[lane(side)]
    }

    /// Whether the call that begins for a chunk asks for RWF_DONTCACHE.
    fn ask(&mut self, chunk: usize, side: Side) -> bool {
        let bit = 1 << chunk.min(63);
        match self.once(side) {
            true => self.asked |= bit,
            false => self.asked &= !bit,
        }
        self.once(side)
    }

    /// A call failed: true when it was for RWF_DONTCACHE, and is to be made again without.
    fn refused(&mut self, chunk: usize, side: Side, errno: Errno, src: BorrowedFd<'_>) -> bool {
        let asked = self.asked & 1 << chunk.min(63) != 0;
        let why = matches!(errno, Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS);
        if !asked || !why {
            return false;
        }
        // Of several calls in flight the first one is told.
        if std::mem::take(&mut self.once[lane(side)]) && side == Side::Src {
            // Nothing was read yet: what is cached now is not ours. What nobody can tell stays.
            self.theirs = cache::cached(src, &(0..i64::MAX as u64)).is_none_or(|n| n > 0);
        }
        true
    }

    /// The windows that ended before `to`, once; `None` when there are none, or nothing to do.
    fn windows(&mut self, to: u64) -> Option<Range<u64>> {
        let end = to / WINDOW * WINDOW;
        if end <= self.behind || (self.once(Side::Dst) && !self.src_by_hand()) {
            return None;
        }
        Some(std::mem::replace(&mut self.behind, end)..end)
    }

    fn src_by_hand(&self) -> bool {
        !self.once(Side::Src) && !self.theirs
    }
}

fn lane(side: Side) -> usize {
    usize::from(side == Side::Dst)
}

impl Worker {
    /// Whether the call that begins for a file's chunk asks for RWF_DONTCACHE.
    pub(super) fn once(&mut self, slot: usize, chunk: usize, side: Side) -> bool {
        let file = self.files[slot].as_mut();
        file.and_then(|f| f.passing.as_mut())
            .is_some_and(|p| p.ask(chunk, side))
    }

    /// True when it was RWF_DONTCACHE that a read or write failed for: it is to be made again.
    pub(super) fn refused_once(&mut self, slot: usize, action: &Action, errno: Errno) -> bool {
        let (chunk, side) = match action {
            Action::Read(piece) => (piece.chunk, Side::Src),
            Action::Write(piece) => (piece.chunk, Side::Dst),
            _ => return false,
        };
        let Some(file) = self.files[slot].as_mut() else {
            return false;
        };
        match (file.passing.as_mut(), file.src.as_ref()) {
            (Some(passing), Some(src)) => passing.refused(chunk, side, errno, src.as_fd()),
            _ => false,
        }
    }

    /// More of a file is in dst: what is behind it leaves the cache, on a thread of the pool.
    pub(super) fn pass_by(&mut self, slot: usize, landed: &Range<u64>) {
        let Some(file) = self.files[slot].as_mut() else {
            return;
        };
        let Some(passing) = file.passing.as_mut() else {
            return;
        };
        let Some(window) = passing.windows(landed.end) else {
            return;
        };
        let src = file.src.clone().filter(|_| passing.src_by_hand());
        let dst = (!passing.once(Side::Dst)).then(|| Arc::clone(&file.dst));
        let task = move || {
            if let Some(src) = src {
                cache::forget(src.as_fd(), &window);
            }
            // An error of the disk comes back with the syncfs that makes the file durable.
            if let Some(dst) = dst
                && cache::finish_writeback(dst.as_fd(), &window).is_ok()
            {
                cache::forget(dst.as_fd(), &window);
            }
        };
        self.pool.run(Priority::Background, Box::new(task));
    }
}

/// The end of a file: what is left of src in the cache.
pub(super) fn end(passing: Option<Passing>, src: Option<&Arc<OwnedFd>>) {
    if let (Some(passing), Some(src)) = (passing, src)
        && passing.src_by_hand()
    {
        cache::forget(src.as_fd(), &(0..i64::MAX as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_keeps_large_files_until_its_part_of_the_memory_is_taken() {
        let allowance = Allowance::of(Cache::Auto, 100);
        let passing: Vec<bool> = [60, 60, 40, 1].map(|bytes| allowance.passes(bytes)).into();
        assert_eq!(passing, [false, true, false, true]);
        assert!(!Allowance::new(Cache::Keep).passes(u64::MAX));
        assert!(Allowance::new(Cache::Drop).passes(1));
        assert!(Allowance::new(Cache::Direct).is_direct());
    }

    #[test]
    fn each_call_that_asked_for_too_much_is_made_again_and_no_other() {
        let file = tempfile::tempfile().expect("a file");
        let mut passing = Passing::new(true);
        assert!(passing.ask(0, Side::Src) && passing.ask(1, Side::Src));
        let mut refused = |chunk, errno| passing.refused(chunk, Side::Src, errno, file.as_fd());
        assert!(!refused(0, Errno::IO) && !refused(2, Errno::OPNOTSUPP));
        assert!(refused(0, Errno::OPNOTSUPP) && refused(1, Errno::OPNOTSUPP));
        assert!(!passing.ask(0, Side::Src) && passing.ask(1, Side::Dst));
        assert!(!passing.refused(0, Side::Src, Errno::OPNOTSUPP, file.as_fd()));
    }

    #[test]
    fn each_window_is_given_back_once_and_only_by_hand() {
        let mut passing = Passing::new(true);
        assert_eq!(passing.windows(WINDOW * 3), None);
        passing.once[1] = false;
        assert_eq!(passing.windows(WINDOW - 1), None);
        assert_eq!(passing.windows(WINDOW * 2 + 5), Some(0..WINDOW * 2));
        assert_eq!(passing.windows(WINDOW), None); // Out of order.
        assert_eq!(passing.windows(WINDOW * 3), Some(WINDOW * 2..WINDOW * 3));
    }
}
