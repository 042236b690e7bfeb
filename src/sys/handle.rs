//! File handles: an inode's lasting name (name_to_handle_at(2), open_by_handle_at(2)).
//!
//! A handle survives renames and restarts and needs no open fd. When the inode is gone it is
//! ESTALE, even when the inode number is in use again: the handle carries the generation.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Result, check};

/// Largest handle that Linux knows (MAX_HANDLE_SZ).
const HANDLE_MAX: usize = 128;

/// ext4 says ENOMEM also while the inode's number is just being given to a new file (`iget_locked` finds one that is
/// being created): a moment later it is ESTALE. So many times it is asked again, after a
/// pause that grows by this.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_micros(50);

/// An inode's handle on one file system.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
struct Raw {
    len: u32,
    kind: i32,
    bytes: [u8; HANDLE_MAX],
}

impl Handle {
    /// The handle of `name` in `dir`; an empty name is `dir` itself. A symlink is not followed.
    /// EOPNOTSUPP when the file system has no handles.
    pub fn of(dir: BorrowedFd<'_>, name: &CStr) -> Result<Handle> {
        let mut raw = Raw {
            len: HANDLE_MAX as u32,
            kind: 0,
            bytes: [0; HANDLE_MAX],
        };
        let mut mount_id = 0;
        let flags = if name.is_empty() {
            libc::AT_EMPTY_PATH
        } else {
            0
        };
        // SAFETY: `raw` starts like struct file_handle, says how much room follows its two fields,
        // and lives for the whole call, as do name and mount_id.
        let ret = unsafe {
            libc::name_to_handle_at(
                dir.as_raw_fd(),
                name.as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount_id,
                flags,
            )
        };
        check(libc::c_long::from(ret))?;
        let len = (raw.len as usize).min(HANDLE_MAX);
        Ok(Handle {
            kind: raw.kind,
            bytes: raw.bytes[..len].into(),
        })
    }

    /// Opens the inode on the file system that `root` is on. ESTALE when it is gone; ENOMEM.
    /// Needs CAP_DAC_READ_SEARCH; refuses nothing that a path would (O_NOFOLLOW is implied by
    /// O_PATH|O_NOFOLLOW for symlinks: pass it).
    pub fn open(&self, root: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
        let mut raw = Raw {
            len: self.bytes.len() as u32,
            kind: self.kind,
            bytes: [0; HANDLE_MAX],
        };
        raw.bytes[..self.bytes.len()].copy_from_slice(&self.bytes);
        let flags = (flags | OFlags::CLOEXEC).bits().cast_signed();
        let mut tries = 0;
        loop {
            // SAFETY: `raw` is a struct file_handle that describes its own length; it is only read.
            let ret =
                unsafe { libc::open_by_handle_at(root.as_raw_fd(), (&raw mut raw).cast(), flags) };
            match check(libc::c_long::from(ret)) {
                // SAFETY: the kernel just gave us this fd and nobody else knows it.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
                Err(Errno::INTR) => {}
                Err(Errno::NOMEM) if tries < TRIES => {
                    std::thread::sleep(PAUSE * tries);
                    tries += 1;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The handle as hexadecimal text: type, dot, bytes. At most 265 characters.
    pub fn to_text(&self) -> String {
        let hex: String = self.bytes.iter().map(|b| format!("{b:02x}")).collect();
        format!("{:x}.{hex}", self.kind)
    }

    /// The inverse of [`Handle::to_text`].
    pub fn from_text(text: &str) -> Option<Handle> {
        let (kind, hex) = text.split_once('.')?;
        let kind = i32::from_str_radix(kind, 16).ok()?;
        if hex.len() % 2 != 0 || hex.len() > 2 * HANDLE_MAX || !hex.is_ascii() {
            return None;
        }
        let bytes = (0..hex.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).ok());
        Some(Handle {
            kind,
            bytes: bytes.collect::<Option<Vec<u8>>>()?.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_the_whole_handle() {
        let handle = Handle {
            kind: 1,
            bytes: Box::from([0u8, 255, 16]),
        };
        assert_eq!(Handle::from_text(&handle.to_text()), Some(handle));
        assert_eq!(Handle::from_text("1.0"), None);
        assert_eq!(Handle::from_text("x"), None);
    }
}
