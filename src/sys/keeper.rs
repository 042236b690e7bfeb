//! Two processes with one table of fds: one works, the other keeps the table when the first one dies.
//!
//! The kernel closes a process's fds with the last process that has its table. So /dev/fuse, the requests
//! that were read from it and not answered, open files and locks live on, under the same numbers.

use std::collections::HashSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{Result, check};

/// Which of the two this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The parent; the other one's pid.
    Keeper(i32),
    /// The child.
    Worker,
}

/// How the worker has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

/// struct clone_args, as far as every kernel with clone3(2) knows it.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// How long the kernel may take to end a thread that was joined.
const JOINED_MAX: Duration = Duration::from_secs(10);

/// Makes a child that shares our fds. Only while no other thread runs: the child has just the calling
/// thread. EBUSY when there is one; ENOSYS where clone3(2) is not allowed.
pub fn split() -> Result<Split> {
    // A join is over before the thread is gone: one with a mount namespace of its own (`in_private_mounts`)
    // has that taken down first, which takes as long as the kernel's readers of mounts do.
    let end = Instant::now() + JOINED_MAX;
    while std::fs::read_dir("/proc/self/task")
        .map(Iterator::count)
        .ok()
        != Some(1)
    {
        if Instant::now() > end {
            return Err(Errno::BUSY);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    let args = with_tid(CloneArgs {
        flags: libc::CLONE_FILES as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    });
    // SAFETY: without CLONE_VM and with no stack of its own the child goes on here with a copy of this
    // process, as after fork(2); the process is single-threaded (the function's contract), so no lock can
    // be held by a thread that the child lacks. The kernel reads `args`, and writes the child's number to
    // the place in the child's copy that glibc has named for that.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            std::mem::size_of::<CloneArgs>(),
        )
    };
    match check(ret)? {
        0 => Ok(Split::Worker),
        pid => Ok(Split::Keeper(pid as i32)),
    }
}

/// As glibc's own fork: its word for the thread's number is the child's from the start.
#[cfg(target_env = "gnu")]
fn with_tid(mut args: CloneArgs) -> CloneArgs {
    const PR_GET_TID_ADDRESS: libc::c_int = 40;
    let mut address = 0u64;
    // SAFETY: prctl writes one pointer to `address`.
    let known = unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut address) };
    if known == 0 && address != 0 {
        args.flags |= (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
        args.child_tid = address;
    }
    args
}

/// musl keeps that number where nobody is told.
#[cfg(not(target_env = "gnu"))]
fn with_tid(args: CloneArgs) -> CloneArgs {
    args
}

/// What the keeper passes on.
const PASSED: [libc::c_int; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

fn signals() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in PASSED.into_iter().chain([libc::SIGCHLD]) {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Holds back what the keeper waits for, or lets it come. Over execve it stays so.
pub fn hold_signals(hold: bool) -> Result<()> {
    let how = if hold {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    let set = signals();
    // SAFETY: the set is initialised; a default action has no handler.
    let ret = unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    match ret {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Waits until the worker has ended, every thread of it, and passes signals on. They must be held.
pub fn wait(worker: i32) -> Result<Ended> {
    let set = signals();
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int.
        let pid = unsafe { libc::waitpid(worker, &raw mut status, libc::WNOHANG) };
        match check(libc::c_long::from(pid)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) if libc::WIFSIGNALED(status) => return Ok(Ended::Killed(libc::WTERMSIG(status))),
            Ok(_) if libc::WIFEXITED(status) => {
                return Ok(Ended::Exited(libc::WEXITSTATUS(status) as u8));
            }
            Ok(_) => {}
            Err(errno) => return Err(errno),
        }
        // SAFETY: sigwaitinfo reads an initialised set and writes one siginfo.
        let (signal, from_kernel) = unsafe {
            let mut info = std::mem::zeroed::<libc::siginfo_t>();
            let signal = libc::sigwaitinfo(&raw const set, &raw mut info);
            (signal, info.si_code > 0)
        };
        // A terminal's has reached the worker already.
        if PASSED.contains(&signal) && !from_kernel {
            // SAFETY: our child, which nobody else waits for: the number is its own.
            unsafe { libc::kill(worker, signal) };
        }
    }
}

/// The fds of this process, without the first three.
fn numbers() -> Result<Vec<RawFd>> {
    let list = std::fs::read_dir("/proc/self/fd")
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let all = list.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    Ok(all.filter(|n| *n > 2).collect())
}

/// Every fd stays open over execve.
pub fn keep_all() -> Result<()> {
    for number in numbers()? {
        // SAFETY: fcntl with integers; a number that is no fd is EBADF.
        unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
    }
    Ok(())
}

/// Closes every fd but these and the first three; these are close-on-exec from now on. Only at the start of
/// a program, before it has opened anything.
pub fn close_others(kept: &HashSet<RawFd>) -> Result<()> {
    for number in numbers()? {
        match kept.contains(&number) {
            // SAFETY: fcntl with integers; a number that is no fd is EBADF.
            true => unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) },
            // SAFETY: nobody in this program owns it: the function's contract.
            false => unsafe { libc::close(number) },
        };
    }
    Ok(())
}

/// An fd that the process before has left, under its own number. Each one once.
pub fn take(number: RawFd) -> Result<OwnedFd> {
    // SAFETY: fcntl with integers; a number that is no fd is EBADF.
    check(libc::c_long::from(unsafe {
        libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC)
    }))?;
    // SAFETY: it is open, and nobody in this program owns it: the function's contract.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What ps(1) calls this process; 15 bytes at the most.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: prctl reads a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Whether the process that made this one is still there.
pub fn parent() -> u32 {
    std::os::unix::process::parent_id()
}

/// Ends this process at once: nothing that it owns is dropped, and so no fd is closed by a number that may
/// be the other process's by now.
pub fn exit(code: u8) -> ! {
    // SAFETY: _exit does not return.
    unsafe { libc::_exit(i32::from(code)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_taken_and_what_is_not_kept_is_listed() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        use std::os::fd::{AsRawFd, IntoRawFd};
        let all = numbers().expect("listed");
        assert!(all.contains(&reader.as_raw_fd()) && all.contains(&writer.as_raw_fd()));
        let number = OwnedFd::from(writer).into_raw_fd();
        let taken = take(number).expect("open");
        assert_eq!(taken.as_raw_fd(), number);
    }
}
