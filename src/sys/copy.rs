//! Calls that move or describe file data: clone, copy_file_range, data extents, preallocation.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::Result;

/// Clones all of `src` into `dst`. `Ok(false)` when the pair of file systems cannot share extents.
pub fn clone_file(src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> Result<bool> {
    match rustix::fs::ioctl_ficlone(dst, src) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// Copies up to `len` bytes inside the kernel; returns how many (0: src ends here).
/// EXDEV, EOPNOTSUPP and EINVAL mean: not for this pair, read and write instead.
pub fn copy_range(
    src: BorrowedFd<'_>,
    src_offset: u64,
    dst: BorrowedFd<'_>,
    dst_offset: u64,
    len: usize,
) -> Result<usize> {
    let (mut from, mut to) = (src_offset, dst_offset);
    rustix::fs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), len)
}

/// A pipe that carries file data: the pages of src's cache go into it by reference, so that they are
/// copied once, into dst, where a read and a write copy them twice.
pub struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    /// Bytes that it may take at once.
    room: usize,
    /// Bytes that are in it.
    full: usize,
}

impl Pipe {
    /// An empty one for about `room` bytes.
    pub fn new(room: usize) -> Result<Pipe> {
        use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
        let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
        // Over the limit of an unprivileged user: then it stays at its 64 KiB.
        let _ = fcntl_setpipe_size(&into, room); // As said.
        let room = fcntl_getpipe_size(&into)?.min(room);
        Ok(Pipe {
            out,
            into,
            room,
            full: 0,
        })
    }

    /// Takes up to `len` bytes of src into the empty pipe; returns how many (0: src ends here).
    /// EINVAL: not from this file.
    pub fn fill(&mut self, src: BorrowedFd<'_>, offset: u64, len: usize) -> Result<usize> {
        let mut from = offset;
        let len = len.min(self.room);
        self.full = retry(|| {
            let flags = rustix::pipe::SpliceFlags::empty();
            rustix::pipe::splice(src, Some(&mut from), &self.into, None, len, flags)
        })?;
        Ok(self.full)
    }

    /// Writes all that is in the pipe into dst. After an error the pipe is of no use any more.
    pub fn drain(&mut self, dst: BorrowedFd<'_>, offset: u64) -> Result<()> {
        let mut to = offset;
        while self.full > 0 {
            let n = retry(|| {
                let flags = rustix::pipe::SpliceFlags::empty();
                rustix::pipe::splice(&self.out, None, dst, Some(&mut to), self.full, flags)
            })?;
            if n == 0 {
                return Err(Errno::IO);
            }
            self.full -= n;
        }
        Ok(())
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// The first data extent at or after `from`, clipped to `size`; `None` when only hole is left.
/// A file system without SEEK_DATA reports everything as data. So is what is behind the end of a file that
/// has become shorter than `size`: whoever reads it meets the end, where zeros would be taken for bytes.
pub fn next_data(fd: BorrowedFd<'_>, from: u64, size: u64) -> Result<Option<Range<u64>>> {
    if from >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(fd, SeekFrom::Data(from)) {
        Ok(start) => start,
        // Only hole is left, or nothing is.
        Err(Errno::NXIO) => {
            return match rustix::fs::seek(fd, SeekFrom::Hole(from)) {
                Ok(_) => Ok(None),
                Err(Errno::NXIO) => Ok(Some(from..size)),
                Err(e) => Err(e),
            };
        }
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some(from..size)),
        Err(e) => return Err(e),
    };
    if start >= size {
        return Ok(None);
    }
    let end = match rustix::fs::seek(fd, SeekFrom::Hole(start)) {
        Ok(end) => end.min(size),
        // It shrank between the two calls.
        Err(Errno::NXIO) => size,
        Err(e) => return Err(e),
    };
    Ok(Some(start..end))
}

/// lseek(2) with SEEK_DATA or SEEK_HOLE, as a user asks it.
pub fn seek_data_or_hole(fd: BorrowedFd<'_>, offset: u64, data: bool) -> Result<u64> {
    let to = if data {
        SeekFrom::Data(offset)
    } else {
        SeekFrom::Hole(offset)
    };
    rustix::fs::seek(fd, to)
}

/// Reserves room without moving the end of the file (size must never run ahead of data).
/// A file system that cannot do it is no error: it was a hint for layout and an early ENOSPC.
pub fn preallocate(fd: BorrowedFd<'_>, range: Range<u64>) -> Result<()> {
    let len = range.end.saturating_sub(range.start);
    if len == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, range.start, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// Gives `dst` the room that `src` has without data in it: unwritten extents inside `size`, as
/// fallocate(2) makes them. Where src's file system does not tell (no FIEMAP) nothing is done.
pub fn reserve_like(src: BorrowedFd<'_>, dst: BorrowedFd<'_>, size: u64) -> Result<()> {
    let mut from = 0;
    while from < size {
        let extents = match extents(src, from, size - from) {
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => return Ok(()),
            other => other?,
        };
        let Some(last) = extents.last() else {
            return Ok(());
        };
        from = last.logical.saturating_add(last.length).max(from + 1);
        for e in extents.iter().filter(|e| e.flags & EXTENT_UNWRITTEN != 0) {
            preallocate(dst, e.logical..e.logical.saturating_add(e.length).min(size))?;
        }
    }
    Ok(())
}

const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENTS_MAX: usize = 128;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_flags: [u32; 3],
}

/// `struct fiemap` with room for a fixed number of extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS_MAX],
}

/// Some extents of a file from `start` on (ioctl FS_IOC_FIEMAP, without a sync of src).
fn extents(fd: BorrowedFd<'_>, start: u64, length: u64) -> Result<Vec<Extent>> {
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
    let mut map = Fiemap {
        start,
        length,
        flags: 0,
        mapped: 0,
        count: EXTENTS_MAX as u32,
        reserved: 0,
        extents: [Extent::default(); EXTENTS_MAX],
    };
    // SAFETY: `map` is a struct fiemap followed by as many extents as `count` says; it lives for the
    // whole call, and the fd is open (borrowed).
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) };
    super::check(libc::c_long::from(ret))?;
    Ok(map.extents[..(map.mapped as usize).min(EXTENTS_MAX)].to_vec())
}

/// fallocate(2) with the mode that a user asked for.
pub fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Result<()> {
    let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
    rustix::fs::fallocate(fd, flags, offset, len)
}

/// Sets the size; a longer file reads as zeros behind its old end.
pub fn truncate(fd: BorrowedFd<'_>, size: u64) -> Result<()> {
    rustix::fs::ftruncate(fd, size)
}

/// Inode flags as chattr(1) knows them (FS_IOC_GETFLAGS); `None` where there are none.
pub fn inode_flags(fd: BorrowedFd<'_>) -> Result<Option<u32>> {
    match rustix::fs::ioctl_getflags(fd) {
        Ok(f) => Ok(Some(f.bits())),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets inode flags (FS_IOC_SETFLAGS). EOPNOTSUPP when the file system has none or not these.
pub fn set_inode_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<()> {
    rustix::fs::ioctl_setflags(fd, rustix::fs::IFlags::from_bits_retain(flags))
}

/// posix_fadvise(2) for sequential reading: a hint, its failure means nothing.
pub fn advise_sequential(fd: BorrowedFd<'_>) {
    // SAFETY: integers only; the fd is open for the whole call (borrowed).
    let _ = unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_SEQUENTIAL) }; // A hint.
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_behind_the_end_is_no_hole() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(100_000).expect("a hole");
        let next = |from| next_data(file.as_fd(), from, 200_000).expect("lseek");
        // tmpfs and others know of holes; one that does not says that all is data.
        assert!([None, Some(0..100_000), Some(0..200_000)].contains(&next(0)));
        assert_eq!(next(150_000), Some(150_000..200_000), "it was cut");
        assert_eq!(next(200_000), None);
    }
}
