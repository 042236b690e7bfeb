//! Handing over: another program in this process, with the fds that it is to have.
//!
//! execve(2) keeps the process, its locks and whatever fds are not close-on-exec; every other thread is
//! gone. An execve that fails before that has changed nothing.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::MemfdFlags;
use rustix::io::{Errno, FdFlags};

use super::{Result, check, last_errno};

/// A file in memory, for what one program leaves to the next.
pub fn memory_file() -> Result<File> {
    rustix::fs::memfd_create(c"mirrorfs-upgrade", MemfdFlags::CLOEXEC).map(File::from)
}

/// Keeps an fd over execve; its number says which it is.
pub fn keep(fd: BorrowedFd<'_>) -> Result<RawFd> {
    rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
    Ok(fd.as_raw_fd())
}

/// The execve did not happen: these fds are ours alone again.
pub fn keep_no_more(numbers: &[RawFd]) {
    for number in numbers {
        // SAFETY: fcntl with integers; a number that is no fd is EBADF.
        unsafe { libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// An fd that the program before has kept, as one of our own. The number itself stays open, for who
/// may have to go back (`let_go`).
pub fn adopt(number: RawFd) -> Result<OwnedFd> {
    // SAFETY: fcntl with integers returns a new fd that nobody else owns, or -1 (EBADF).
    let new = check(libc::c_long::from(unsafe {
        libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3)
    }))?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(new as RawFd) })
}

/// Closes what the program before has kept: everything of it is adopted.
pub fn let_go(numbers: &[RawFd]) {
    for number in numbers {
        // SAFETY: these numbers are from the program before and nobody here has taken one over:
        // `adopt` duplicates.
        unsafe { libc::close(*number) };
    }
}

/// Runs another program in this process. It comes back only with what went wrong; nothing has
/// changed then.
pub fn exec(program: &CString, words: &[CString]) -> Errno {
    let mut argv: Vec<*const libc::c_char> = words.iter().map(|w| w.as_ptr()).collect();
    argv.push(std::ptr::null());
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: path and words are C strings that live for the whole call, the array ends with a null
    // pointer, and nobody changes the environment of this program.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), environ) };
    last_errno()
}

/// Holds back the signals that the program after this one will handle, or lets them come: held back,
/// they wait over execve instead of ending a program that does not handle them yet.
pub fn hold_signals(hold: bool) -> Result<()> {
    let how = if hold {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    // SAFETY: the set is initialised by sigemptyset before it is used; the mask is this thread's.
    let ret = unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in [
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGUSR1,
            libc::SIGUSR2,
        ] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    match ret {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}
