//! Flow: whether a large file's data stays in the page cache (`--cache`).
//!
//!   keep     through the cache, as everybody copies: fastest, and whoever reads the copy next finds it
//!   drop     through the cache once: what was not in it before is not in it afterwards, and no more than
//!            two windows of dst are dirty. By RWF_DONTCACHE, or by hand where a file system has none
//!   direct   past it (O_DIRECT); what is not aligned, and who cannot, goes the way of drop
//!   auto     keep, until large files have taken a quarter of the memory that was free; then drop
//!
//! So a copy of a tree larger than memory does not push out what other programs use.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use rustix::io::Errno;

use super::data::Transfer;
use crate::engine::passing::Allowance;
use crate::sys::cache::{self, Aligned};
use crate::sys::stat::Stat;
use crate::sys::{Result, fd};

/// Bytes that go through one buffer at once.
pub(super) const BULK: usize = 1 << 20;
/// What is written back, waited for and forgotten together: large enough for a disk to stream.
const WINDOW: u64 = 16 << 20;
/// One file's way.
pub(super) struct Flow {
    /// It leaves nothing in the cache.
    pub(super) passing: bool,
    /// Somebody else has src in the cache.
    theirs: bool,
    src: Lane,
    dst: Lane,
}

impl Flow {
    /// Through the cache.
    pub(super) fn keep() -> Flow {
        Flow::new(false, false)
    }

    /// As a run's allowance says for a file with that much data.
    pub(super) fn of(bytes: u64, allowance: &Allowance) -> Flow {
        Flow::new(allowance.passes(bytes), allowance.is_direct())
    }

    fn new(passing: bool, direct: bool) -> Flow {
        Flow {
            passing,
            theirs: true,
            src: Lane::new(direct),
            dst: Lane::new(direct),
        }
    }
}

/// What one side's file system can do: tried, and switched off for good when refused.
struct Lane {
    direct: AtomicBool,
    once: AtomicBool,
}

impl Lane {
    fn new(direct: bool) -> Lane {
        Lane {
            direct: AtomicBool::new(direct),
            once: AtomicBool::new(true),
        }
    }

    /// Whether this piece goes past the cache. With the first that cannot, nothing does any more: the
    /// flag belongs to all threads of the file, and nobody sets it again under another's write.
    fn direct(&self, file: BorrowedFd<'_>, aligned: bool) -> Result<bool> {
        if !self.direct.load(Acquire) {
            return Ok(false);
        }
        if !aligned {
            // In this order: who finds it off may write anything.
            cache::set_direct(file, false)?;
            self.direct.store(false, Release);
        }
        Ok(aligned)
    }

    fn read(&self, file: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize> {
        if self.direct(file, aligned(offset, buf.len()))? {
            match fd::pread_some(file, buf, offset) {
                Err(Errno::INVAL) => self.direct(file, false)?,
                other => return other,
            };
        }
        if self.once.load(Relaxed) {
            match cache::read_once(file, buf, offset) {
                Err(Errno::OPNOTSUPP) => self.once.store(false, Relaxed),
                other => return other,
            }
        }
        fd::pread_some(file, buf, offset)
    }

    fn write(&self, file: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<()> {
        if self.direct(file, aligned(offset, buf.len()))? {
            match fd::pwrite_all(file, buf, offset) {
                Err(Errno::INVAL) => self.direct(file, false)?,
                other => return other,
            };
        }
        if self.once.load(Relaxed) {
            match cache::write_once(file, buf, offset) {
                Err(Errno::OPNOTSUPP) => self.once.store(false, Relaxed),
                other => return other,
            }
        }
        fd::pwrite_all(file, buf, offset)
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    const UNIT: u64 = Aligned::UNIT as u64;
    offset.is_multiple_of(UNIT) && len.is_multiple_of(Aligned::UNIT)
}

impl Flow {
    /// Before the first byte: O_DIRECT on whatever takes it, and whether half of src is in the cache
    /// for somebody else. Asked later, it would be our own readahead; what nobody can tell stays.
    pub(super) fn begin(
        &mut self,
        src: BorrowedFd<'_>,
        dst: BorrowedFd<'_>,
        stat: &Stat,
    ) -> Result<()> {
        let bytes = stat.size.min(stat.blocks.saturating_mul(512));
        let cached = cache::cached(src, &(0..stat.size));
        self.theirs = cached.is_none_or(|n| n > bytes / 2);
        for (lane, file) in [(&self.src, src), (&self.dst, dst)] {
            if lane.direct.load(Relaxed) {
                lane.direct.store(cache::set_direct(file, true)?, Relaxed);
            }
        }
        Ok(())
    }

    /// True when nothing is read ahead or written behind by the kernel: several parts at once then do it.
    pub(super) fn is_direct(&self) -> bool {
        self.passing && (self.src.direct.load(Relaxed) || self.dst.direct.load(Relaxed))
    }

    /// Reads the beginning of a range; returns how much, 0 at src's end.
    pub(super) fn read(
        &self,
        t: &Transfer,
        memory: &mut Aligned,
        data: &Range<u64>,
    ) -> Result<usize> {
        let src = t.src.as_fd();
        let left = usize::try_from(data.end - data.start).unwrap_or(usize::MAX);
        let mut len = left.min(BULK);
        if len > Aligned::UNIT && self.is_direct() {
            len -= len % Aligned::UNIT; // The odd end last.
        }
        self.src.read(src, &mut memory.bytes()[..len], data.start)
    }

    /// Writes what was read, and sees to what is behind it.
    pub(super) fn write(
        &self,
        t: &Transfer,
        memory: &mut Aligned,
        offset: u64,
        len: usize,
    ) -> Result<()> {
        let (src, dst) = (t.src.as_fd(), t.dst.as_fd());
        self.dst.write(dst, &memory.bytes()[..len], offset)?;
        let (this, next) = (offset / WINDOW, (offset + len as u64) / WINDOW);
        if this == next {
            return Ok(());
        }
        let of = |first: u64, last: u64| first * WINDOW..last * WINDOW;
        if !self.dst.direct.load(Relaxed) {
            cache::start_writeback(dst, &of(this, next))?;
            let before = of(this.saturating_sub(1), this);
            cache::finish_writeback(dst, &before)?;
            cache::forget(dst, &before);
        }
        if self.src_by_hand() {
            cache::forget(src, &of(this, next));
        }
        Ok(())
    }

    /// After the last byte. With RWF_DONTCACHE the kernel does the rest itself.
    pub(super) fn end(&self, t: &Transfer) -> Result<()> {
        let all = 0..t.meta.stat.size;
        if !self.dst.once.load(Relaxed) {
            cache::finish_writeback(t.dst.as_fd(), &all)?;
            cache::forget(t.dst.as_fd(), &all);
        }
        if self.src_by_hand() {
            cache::forget(t.src.as_fd(), &all);
        }
        Ok(())
    }

    fn src_by_hand(&self) -> bool {
        !self.theirs && !self.src.once.load(Relaxed)
    }
}
