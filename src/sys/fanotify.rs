//! fanotify permission events before an open and before an access to content (Linux 6.14).
//!
//! A reader or writer waits in the kernel until its event is answered. While any process holds the
//! group's fd it waits on; when the last holder is gone every waiting access is allowed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::{Result, check};

/// FAN_PRE_ACCESS of linux/fanotify.h; older versions of the libc crate do not have it.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;
/// What is asked: whether a file may be opened (in front of O_TRUNC), read, written or truncated.
const MASK: u64 = libc::FAN_OPEN_PERM | FAN_PRE_ACCESS;
/// The errnos that a denied access may have are put above this.
const ERRNO_SHIFT: u32 = 24;
/// The numbers that files of one process usually have.
const NUMBERS: i32 = 1 << 16;
/// struct fanotify_event_metadata.
const METADATA: usize = 24;

/// An access that waits for an answer.
#[derive(Debug)]
pub struct Event {
    /// The file, open for reading; using it raises no events. Its number names the event, so it must
    /// stay open until the answer was given.
    pub file: OwnedFd,
    /// The process that waits.
    pub pid: i32,
}

/// A fanotify group in the class that comes before all content.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// A new group. EINVAL before Linux 6.14, EPERM without CAP_SYS_ADMIN.
    pub fn new() -> Result<Group> {
        let flags = libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS;
        // O_NONBLOCK: a fifo's other end is not waited for.
        let opened = libc::O_RDONLY
            | libc::O_LARGEFILE
            | libc::O_CLOEXEC
            | libc::O_NOATIME
            | libc::O_NONBLOCK;
        // SAFETY: integer arguments only.
        let fd = check(libc::c_long::from(unsafe {
            libc::fanotify_init(flags, opened as u32)
        }))?;
        // SAFETY: the kernel just gave us this fd and nobody else knows it.
        Ok(Group(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Asks about every regular file on the file system that `dir` is on, from now on; for files that
    /// were open before, never.
    pub fn watch_filesystem(&self, dir: BorrowedFd<'_>) -> Result<()> {
        self.mark(libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM, dir)
    }

    /// Asks no more about this file, whatever is done to it, until the kernel forgets its inode.
    pub fn ignore(&self, file: BorrowedFd<'_>) -> Result<()> {
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_IGNORE_SURV | libc::FAN_MARK_EVICTABLE;
        self.mark(flags, file)
    }

    fn mark(&self, flags: u32, at: BorrowedFd<'_>) -> Result<()> {
        // SAFETY: both fds are open for the whole call; no path: `at` itself is meant.
        let ret = unsafe {
            libc::fanotify_mark(
                self.0.as_raw_fd(),
                flags,
                MASK,
                at.as_raw_fd(),
                std::ptr::null(),
            )
        };
        check(libc::c_long::from(ret)).map(|_| ())
    }

    /// Takes the events that are there. EAGAIN when there is none.
    pub fn read(&self, buf: &mut [u8; 4096], mut each: impl FnMut(Event)) -> Result<()> {
        let len = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut buf[..]))?;
        let mut rest = &buf[..len];
        while rest.len() >= METADATA {
            let int = |at: usize| -> Option<i32> {
                Some(i32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?))
            };
            let (Some(event_len), Some(fd), Some(pid)) = (int(0), int(16), int(20)) else {
                return Err(Errno::IO);
            };
            if fd >= 0 {
                // SAFETY: the kernel opened this fd for us when it wrote the event.
                let file = unsafe { OwnedFd::from_raw_fd(fd) };
                each(Event { file, pid });
            }
            let next = usize::try_from(event_len).unwrap_or(0).max(METADATA);
            rest = rest.get(next..).unwrap_or_default();
        }
        Ok(())
    }

    /// Answers an event: the access goes on, or fails with `errno` (EIO for one that the kernel does
    /// not pass on).
    pub fn answer(
        &self,
        file: BorrowedFd<'_>,
        verdict: std::result::Result<(), Errno>,
    ) -> Result<()> {
        let passed_on = [Errno::IO, Errno::NOSPC, Errno::DQUOT];
        let response = match verdict {
            Ok(()) => libc::FAN_ALLOW,
            Err(errno) => {
                let errno = if passed_on.contains(&errno) {
                    errno
                } else {
                    Errno::IO
                };
                libc::FAN_DENY | (errno.raw_os_error() as u32) << ERRNO_SHIFT
            }
        };
        let mut message = [0u8; 8];
        message[..4].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
        message[4..].copy_from_slice(&response.to_ne_bytes());
        rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &message)).map(|_| ())
    }

    /// A group whose fd came from another process.
    pub fn from_fd(fd: OwnedFd) -> Group {
        Group(fd)
    }

    /// Refuses every event that was read and not answered, by number. Nobody may read meanwhile.
    pub fn refuse_all(group: BorrowedFd<'_>) {
        let response = libc::FAN_DENY | (libc::EIO as u32) << ERRNO_SHIFT;
        for number in 0..NUMBERS {
            let mut message = [0u8; 8];
            message[..4].copy_from_slice(&number.to_ne_bytes());
            message[4..].copy_from_slice(&response.to_ne_bytes());
            let _ = rustix::io::write(group, &message); // ENOENT: no event had this number.
        }
    }

    /// One more fd of the group: while somebody has it open, nobody is let through unasked.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
