//! Opening below a root, temporary files, reading and writing all of a buffer.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::Result;
use super::name::{Name, RelPath};
use super::stat::{self, Stat};

/// One openat2 call resolves at most this much: PATH_MAX is 4096 with the NUL.
const STEP_MAX: usize = 4000;

/// Opens `path` below `root`: no symlink and no magic link on the way, never above `root`.
/// Works for paths longer than PATH_MAX. Mounts below `root` are crossed.
pub fn open_beneath(root: BorrowedFd<'_>, path: &RelPath, flags: OFlags) -> Result<OwnedFd> {
    let bytes = path.as_bytes();
    if bytes.is_empty() {
        return openat2(root, b".", flags);
    }
    let mut rest = bytes;
    let mut dir: Option<OwnedFd> = None;
    while rest.len() > STEP_MAX {
        // Names are at most 255 bytes, so a slash is always near.
        let cut = rest[..STEP_MAX]
            .iter()
            .rposition(|b| *b == b'/')
            .ok_or(Errno::NAMETOOLONG)?;
        let at = dir.as_ref().map_or(root, |d| d.as_fd());
        dir = Some(openat2(at, &rest[..cut], OFlags::PATH | OFlags::DIRECTORY)?);
        rest = &rest[cut + 1..];
    }
    openat2(dir.as_ref().map_or(root, |d| d.as_fd()), rest, flags)
}

/// Opens one name in `dir`, never following it. A name is one component, so plain openat(2) stays as
/// near as openat2(2) with all its restrictions would, and is cheaper.
pub fn open_at(dir: BorrowedFd<'_>, name: &Name, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        match rustix::fs::openat(dir, name.as_cstr(), flags, Mode::empty()) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

fn openat2(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), how) {
            // EAGAIN: a rename raced with the resolution (openat2(2)); EINTR: a signal.
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A filter of system calls, or valgrind.
            Err(Errno::NOSYS) => return open_by_names(dir, path, flags),
            other => return other,
        }
    }
}

/// As openat2, one name at a time: none of them is a link that would be followed, none leads up.
fn open_by_names(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut names = path.split(|b| *b == b'/').peekable();
    let mut at: Option<OwnedFd> = None;
    while let Some(name) = names.next() {
        let flags = if names.peek().is_some() { step } else { flags };
        let here = at.as_ref().map_or(dir, |d| d.as_fd());
        let next = loop {
            match rustix::fs::openat(here, name, flags, Mode::empty()) {
                Err(Errno::INTR) => {}
                // Asked for as a directory, a link is not one; openat2 says what it is.
                Err(Errno::NOTDIR) if flags == step && is_symlink(here, name) => {
                    return Err(Errno::LOOP);
                }
                other => break other,
            }
        };
        at = Some(next?);
    }
    at.ok_or(Errno::NOENT)
}

fn is_symlink(dir: BorrowedFd<'_>, name: &[u8]) -> bool {
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_symlink())
}

/// Opens an inode of src for reading: the one function that opens anything of src's content.
/// Read-only, without changing access times where the kernel lets us (O_NOATIME needs the owner
/// or CAP_FOWNER), and without waiting for the writer of a fifo that was swapped in.
pub fn open_src(dir: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    match open_at(dir, name, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open_at(dir, name, flags),
        other => other,
    }
}

/// As [`open_src`], and what the inode was before that. A server that goes by paths says of an open file
/// what is under its name by then: that it was replaced shows only in what was said before. What is no file
/// is not opened for reading.
pub fn open_src_seen(dir: BorrowedFd<'_>, name: &Name) -> Result<(OwnedFd, Stat)> {
    let seen = open_at(dir, name, OFlags::PATH)?;
    let stat = stat::stat_fd(seen.as_fd())?;
    if !stat.is_file() {
        return Ok((seen, stat));
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = match reopen(seen.as_fd(), flags | OFlags::NOATIME) {
        Err(Errno::PERM) => reopen(seen.as_fd(), flags),
        other => other,
    };
    Ok((opened?, stat))
}

/// Opens a directory of src for reading its names.
pub fn open_src_dir(root: BorrowedFd<'_>, path: &RelPath) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    match open_beneath(root, path, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open_beneath(root, path, flags),
        other => other,
    }
}

/// Opens an existing inode again with other flags, through /proc/self/fd (works for O_PATH fds).
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::openat(
        rustix::fs::CWD,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// A new file under a name, open for reading and writing. Its mode is `perm` less this process's
/// umask. EEXIST when the name is taken.
pub fn create_new(dir: BorrowedFd<'_>, name: &Name, perm: u32) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(dir, name.as_cstr(), flags, Mode::from_raw_mode(perm))
}

/// A nameless file in `dir`, open for reading and writing (O_TMPFILE). Its mode is `perm` less this
/// process's umask; nobody can open it before it gets a name.
pub fn tmpfile(dir: BorrowedFd<'_>, perm: u32) -> Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c".", flags, Mode::from_raw_mode(perm))
}

/// Gives an open file (or an O_PATH fd) a name. EEXIST when the name is taken.
pub fn link_fd(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    match rustix::fs::linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH) {
        // Without CAP_DAC_READ_SEARCH the kernel says ENOENT (linkat(2)).
        Err(Errno::NOENT) => {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::linkat(rustix::fs::CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)
        }
        other => other,
    }
}

/// Reads until `buf` is full or the file ends; returns how many bytes were read.
pub fn pread_all(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// True for an open file of a FUSE file system that its server reads around the page cache
/// (FOPEN_DIRECT_IO). Such a file has no shared mapping (ENODEV); of a server that allows those all the
/// same (FUSE_DIRECT_IO_ALLOW_MMAP) it is not seen.
pub fn is_read_around_cache(file: BorrowedFd<'_>) -> bool {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    const LEN: usize = 4096;
    // SAFETY: a mapping of its own, at an address that the kernel picks, which nobody looks into.
    let mapped = unsafe {
        let none = std::ptr::null_mut();
        mmap(none, LEN, ProtFlags::READ, MapFlags::SHARED, file, 0)
    };
    match mapped {
        // SAFETY: the mapping that was just made.
        Ok(at) => unsafe { munmap(at, LEN) }.is_err(),
        Err(errno) => errno == Errno::NODEV,
    }
}

/// Writes all of `buf`. A write that makes no progress is ENOSPC's cousin and ends as EIO.
pub fn pwrite_all(fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pwrite(fd, &buf[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// fdatasync(2).
pub fn fdatasync(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::fdatasync(fd)
}

/// fsync(2).
pub fn fsync(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::fsync(fd)
}

/// syncfs(2) of the file system that `fd` is on. Since Linux 5.8 it reports write-back errors.
pub fn syncfs(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::syncfs(fd)
}

/// One pread(2); a short count is the caller's business.
pub fn pread_some(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize> {
    rustix::io::pread(fd, buf, offset)
}

/// One pwrite(2); a short count is the caller's business.
pub fn pwrite_some(fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize> {
    rustix::io::pwrite(fd, buf, offset)
}

/// The device that an open file is on; asks no server, whatever the file system.
pub fn device_of(fd: BorrowedFd<'_>) -> Result<(u32, u32)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(libc::AT_STATX_DONT_SYNC as u32);
    let x = rustix::fs::statx(fd, c"", flags, rustix::fs::StatxFlags::empty())?;
    Ok((x.stx_dev_major, x.stx_dev_minor))
}

/// A counter that one thread waits for and others raise (eventfd).
pub fn eventfd() -> Result<OwnedFd> {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
}

/// Raises an eventfd: whoever waits for it goes on.
pub fn eventfd_signal(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::io::write(fd, &1u64.to_ne_bytes()).map(|_| ())
}

/// Waits until an eventfd was raised, and takes it back to zero.
pub fn eventfd_wait(fd: BorrowedFd<'_>) -> Result<()> {
    let mut value = [0u8; 8];
    loop {
        match rustix::io::read(fd, &mut value) {
            Err(Errno::INTR) => {}
            other => return other.map(|_| ()),
        }
    }
}

/// close(2), for who wants its answer: an error of a delayed write on NFS. The fd is gone either way.
pub fn close(fd: OwnedFd) -> Result<()> {
    // SAFETY: the fd is owned and given up here: nobody closes it again.
    let ret = unsafe { libc::close(fd.into_raw_fd()) };
    super::check(libc::c_long::from(ret)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_openat2_the_same_is_opened_and_the_same_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("a/b")).expect("mkdir");
        std::fs::write(at("a/b/file"), b"x").expect("write");
        std::os::unix::fs::symlink("a", at("link")).expect("symlink");
        std::os::unix::fs::symlink("/etc", at("a/away")).expect("symlink");
        let root = std::fs::File::open(dir.path()).expect("open");
        let ino = |fd: OwnedFd| rustix::fs::fstat(fd).expect("fstat").st_ino;
        for path in [
            ".",
            "a",
            "a/b",
            "a/b/file",
            "none",
            "a/none",
            "none/a",
            "link",
            "link/b",
            "a/away",
            "a/away/passwd",
            "a/b/file/c",
        ] {
            for flags in [OFlags::RDONLY, OFlags::PATH, OFlags::DIRECTORY] {
                let one = openat2(root.as_fd(), path.as_bytes(), flags).map(ino);
                let other = open_by_names(root.as_fd(), path.as_bytes(), flags).map(ino);
                assert_eq!(one, other, "{path} {flags:?}");
            }
        }
    }
}
