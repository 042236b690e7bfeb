//! /dev/fuse: reading requests, writing replies, clones of the device, backing files.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::{Result, check};

/// Opens /dev/fuse once more.
pub fn open() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, c"/dev/fuse", flags, Mode::empty())
}

/// A second fd for the connection of `dev`, with a queue of its own for the requests that are read
/// from it: the reply to a request is written where the request was read.
pub fn clone(dev: BorrowedFd<'_>) -> Result<OwnedFd> {
    // _IOR(229, 0, u32) of linux/fuse.h.
    const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500_u32 as libc::Ioctl;
    let new = open()?;
    let mut from = dev.as_raw_fd().cast_unsigned();
    // SAFETY: the ioctl reads one u32, the fd that is cloned, which is open for the whole call.
    let ret = unsafe { libc::ioctl(new.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw mut from) };
    check(libc::c_long::from(ret))?;
    Ok(new)
}

/// Takes the next request. `None`: the kernel has ended the connection.
pub fn read(dev: BorrowedFd<'_>, buf: &mut [u8]) -> Result<Option<usize>> {
    loop {
        match rustix::io::read(dev, &mut *buf) {
            Ok(len) => return Ok(Some(len)),
            Err(Errno::NODEV) => return Ok(None),
            // The last reference went while a request was being taken: fs/fuse/dev.c says that
            // instead of ENODEV.
            Err(Errno::CONNABORTED) => return Ok(None),
            // ENOENT: the request was interrupted while it was being taken.
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Writes one reply or notification, whole.
pub fn write(dev: BorrowedFd<'_>, parts: [&[u8]; 3]) -> Result<()> {
    let parts = parts.map(std::io::IoSlice::new);
    rustix::io::retry_on_intr(|| rustix::io::writev(dev, &parts)).map(|_| ())
}

/// What the kernel knows a backing file by (FUSE passthrough).
#[derive(Debug)]
pub struct BackingId {
    dev: std::sync::Arc<OwnedFd>,
    id: u32,
}

/// struct fuse_backing_map.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

impl BackingId {
    /// Registers an open file: opens through the mount may be sent to it from now on. The file keeps
    /// the calling thread's credentials. EPERM without CAP_SYS_ADMIN, ELOOP when it is stacked.
    pub fn register(dev: &std::sync::Arc<OwnedFd>, file: BorrowedFd<'_>) -> Result<BackingId> {
        // _IOW(229, 1, struct fuse_backing_map).
        const FUSE_DEV_IOC_BACKING_OPEN: libc::Ioctl = 0x4010_e501;
        let map = BackingMap {
            fd: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        };
        // SAFETY: the ioctl reads the 16 bytes of `map`; both fds are open for the whole call.
        let ret =
            unsafe { libc::ioctl(dev.as_raw_fd(), FUSE_DEV_IOC_BACKING_OPEN, &raw const map) };
        let id = check(libc::c_long::from(ret))? as u32;
        Ok(BackingId {
            dev: std::sync::Arc::clone(dev),
            id,
        })
    }

    /// One that the program before us in this process has registered.
    pub fn known(dev: &std::sync::Arc<OwnedFd>, number: i32) -> BackingId {
        BackingId {
            dev: std::sync::Arc::clone(dev),
            id: number.cast_unsigned(),
        }
    }

    /// The number for the reply to an open.
    pub fn number(&self) -> i32 {
        self.id.cast_signed()
    }
}

impl Drop for BackingId {
    fn drop(&mut self) {
        // _IOW(229, 2, u32).
        const FUSE_DEV_IOC_BACKING_CLOSE: libc::Ioctl = 0x4004_e502;
        // SAFETY: the ioctl reads one u32. Opens that use the file keep it; a connection that is over
        // has forgotten the number already.
        unsafe {
            libc::ioctl(
                self.dev.as_raw_fd(),
                FUSE_DEV_IOC_BACKING_CLOSE,
                &raw const self.id,
            );
        }
    }
}
