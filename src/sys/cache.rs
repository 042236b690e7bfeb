//! The page cache around file data: past it, through it once, or out of it again.
//!
//! RWF_DONTCACHE (Linux 6.14; ext4, xfs) takes out what the call itself brought in, and leaves what
//! somebody else uses; a write with it starts writing back at once. O_DIRECT goes past the cache.
//! Where there is neither, sync_file_range and fadvise do the same by hand.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::Result;

/// linux/fs.h.
pub(crate) const RWF_DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
/// cachestat(2), the same number everywhere.
const SYS_CACHESTAT: libc::c_long = 451;

/// Reads once, and leaves no page in the cache that was not there. EOPNOTSUPP: not here.
pub fn read_once(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize> {
    loop {
        match rustix::io::preadv2(fd, &mut [IoSliceMut::new(buf)], offset, RWF_DONTCACHE) {
            Err(Errno::INTR) => {}
            Err(Errno::INVAL | Errno::NOSYS) => return Err(Errno::OPNOTSUPP),
            other => return other,
        }
    }
}

/// Reads what of the beginning of a range is in the cache. EAGAIN: nothing is, and the kernel has
/// begun to read it (its readahead) where it can. EOPNOTSUPP: not here.
pub fn read_cached(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize> {
    const NOWAIT: ReadWriteFlags = ReadWriteFlags::NOWAIT;
    loop {
        match rustix::io::preadv2(fd, &mut [IoSliceMut::new(buf)], offset, NOWAIT) {
            Err(Errno::INTR) => {}
            Err(Errno::INVAL | Errno::NOSYS) => return Err(Errno::OPNOTSUPP),
            other => return other,
        }
    }
}

/// Writes all of `buf`, starts to write it back and leaves no page in the cache once that is done.
/// EOPNOTSUPP: not here; nothing was written.
pub fn write_once(fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = [IoSlice::new(&buf[done..])];
        match rustix::io::pwritev2(fd, &rest, offset + done as u64, RWF_DONTCACHE) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            // As pwrite(2) does it: the rest of a write that has begun cannot be "not here".
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if done == 0 => {
                return Err(Errno::OPNOTSUPP);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// How many bytes of a range are in the cache; `None` before Linux 6.5.
pub fn cached(fd: BorrowedFd<'_>, range: &Range<u64>) -> Option<u64> {
    let (asked, mut stat) = ([range.start, range.end - range.start], [0u64; 5]);
    // SAFETY: struct cachestat_range is two u64, struct cachestat five; both live for the whole call,
    // and the fd is open (borrowed).
    let ret = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            asked.as_ptr(),
            stat.as_mut_ptr(),
            0,
        )
    };
    super::check(ret).ok()?;
    Some(stat[0].saturating_mul(rustix::param::page_size() as u64))
}

/// Starts to write back what is dirty in a range (sync_file_range): it bounds the dirty pages, it makes
/// nothing durable.
pub fn start_writeback(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    sync_range(fd, range, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until what is dirty in a range was written back.
pub fn finish_writeback(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    let before = libc::SYNC_FILE_RANGE_WAIT_BEFORE;
    let after = libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(fd, range, before | libc::SYNC_FILE_RANGE_WRITE | after)
}

fn sync_range(fd: BorrowedFd<'_>, range: &Range<u64>, flags: libc::c_uint) -> Result<()> {
    let start = libc::off64_t::try_from(range.start).map_err(|_| Errno::OVERFLOW)?;
    let len = libc::off64_t::try_from(range.end - range.start).map_err(|_| Errno::OVERFLOW)?;
    // SAFETY: integers only; the fd is open for the whole call (borrowed).
    let ret = unsafe { libc::sync_file_range(fd.as_raw_fd(), start, len, flags) };
    match super::check(libc::c_long::from(ret)) {
        // Not for this file system: then the kernel writes back when it likes.
        Err(Errno::NOSYS | Errno::INVAL | Errno::SPIPE) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Takes what is clean in a range out of the cache. A hint: nothing depends on it.
pub fn forget(fd: BorrowedFd<'_>, range: &Range<u64>) {
    let len = std::num::NonZeroU64::new(range.end - range.start);
    let advice = rustix::fs::Advice::DontNeed;
    if len.is_some() {
        let _ = rustix::fs::fadvise(fd, range.start, len, advice); // A hint.
    }
}

/// Switches O_DIRECT on or off; false where this file cannot have it.
pub fn set_direct(fd: BorrowedFd<'_>, on: bool) -> Result<bool> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    flags.set(OFlags::DIRECT, on);
    match rustix::fs::fcntl_setfl(fd, flags) {
        Ok(()) => Ok(true),
        // O_NOATIME is only for the owner, here too: it was set when the file was opened.
        Err(Errno::INVAL | Errno::PERM | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Memory that O_DIRECT can read into and write from.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Where such memory begins, and what offsets and lengths must be multiples of: the page size
    /// covers every device that is usual.
    pub const UNIT: usize = 4096;

    /// `len` zeros.
    pub fn new(len: usize) -> Aligned {
        let memory = vec![0u8; len + Aligned::UNIT];
        let start = memory
            .as_ptr()
            .align_offset(Aligned::UNIT)
            .min(Aligned::UNIT);
        Aligned { memory, start, len }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_written_once_is_whole_and_what_is_forgotten_is_still_there() {
        let file = tempfile::tempfile().expect("file");
        let bytes: Vec<u8> = (0..1_000_003u32).map(|i| (i % 251) as u8).collect();
        let once = write_once(file.as_fd(), &bytes, 0);
        if once.is_err() {
            assert_eq!(once, Err(Errno::OPNOTSUPP));
            file.write_all_at(&bytes, 0).expect("write");
        }
        let all = 0..bytes.len() as u64;
        start_writeback(file.as_fd(), &all).expect("started");
        finish_writeback(file.as_fd(), &all).expect("finished");
        forget(file.as_fd(), &all);
        let mut back = vec![0; bytes.len()];
        file.read_exact_at(&mut back, 0).expect("read");
        assert!(back == bytes);
    }

    #[test]
    fn aligned_memory_is_aligned() {
        for len in [1, 4096, 1 << 20] {
            let mut memory = Aligned::new(len);
            assert_eq!(memory.bytes().len(), len);
            assert_eq!(memory.bytes().as_ptr().align_offset(Aligned::UNIT), 0);
        }
    }
}
