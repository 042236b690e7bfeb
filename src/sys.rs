//! The kernel: the only floor that makes system calls, and (with engine::ring) the only `unsafe`.
//!
//! Wrappers take borrowed fds, `&CStr` and slices, so that calling them wrongly does not compile.
//! They return a bare `Errno`: the caller knows the path and adds it (`error::Context`).
//! EINTR is retried here where the call can be repeated.

pub mod board;
pub mod cache;
pub mod caps;
pub mod copy;
pub mod dir;
pub mod fanotify;
pub mod fault;
pub mod fd;
pub mod fusedev;
pub mod fusering;
pub mod handle;
pub mod helper;
pub mod host;
pub mod keeper;
pub mod local;
pub mod memory;
pub mod name;
pub mod pair;
pub mod pass;
pub mod process;
pub mod room;
pub mod stat;
pub mod succeed;
pub mod view;
pub mod xattr;

use rustix::io::Errno;

/// What every function of this floor returns.
pub type Result<T> = std::result::Result<T, Errno>;

/// The errno left behind by a libc call that returned -1.
fn last_errno() -> Errno {
    let code = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    Errno::from_raw_os_error(code)
}

/// -1 becomes the errno, everything else is the value.
fn check(ret: libc::c_long) -> Result<libc::c_long> {
    if ret == -1 {
        Err(last_errno())
    } else {
        Ok(ret)
    }
}
