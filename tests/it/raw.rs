//! What the tests need of the kernel and neither std nor rustix gives safely.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

fn check(ret: i64) -> io::Result<i64> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// A mount namespace for this thread and the children it starts.
pub(crate) fn own_mount_namespace() -> io::Result<()> {
    // SAFETY: takes flags only; the thread gets its own fs struct and namespace.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

/// Gives this thread (not the process: the raw call) another user, for good.
pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: integers only, and no group list is read when its length is 0.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, 0))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

/// The umask of this thread only: without its own fs struct it would be the whole process's.
pub(crate) fn own_umask(mask: u32) {
    // SAFETY: integers only.
    unsafe {
        libc::unshare(libc::CLONE_FS);
        libc::umask(mask);
    }
}

/// The child dies with the thread that started it, so that nothing is left behind.
pub(crate) fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    }
}

/// The child ends by SIGINT and SIGQUIT, also where its parents ignore them (a shell's `&`).
pub(crate) fn take_signals(command: &mut Command) -> &mut Command {
    // SAFETY: signal is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            libc::signal(libc::SIGQUIT, libc::SIG_DFL);
            Ok(())
        })
    }
}

/// What the child gets for one system call, as the seccomp profile of a container has it.
pub(crate) fn instead_of(command: &mut Command, call: libc::c_long, gets: u32) -> &mut Command {
    const fn op(code: u32, jf: u8, k: u32) -> libc::sock_filter {
        let code = code as u16;
        libc::sock_filter { code, jt: 0, jf, k }
    }
    // The number of the call is the first word of what the filter sees.
    let filter = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        op(libc::BPF_RET | libc::BPF_K, 0, gets),
        op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: prctl is async-signal-safe, and reads the filter, which the closure owns.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            let mode = libc::SECCOMP_MODE_FILTER;
            check(libc::prctl(libc::PR_SET_SECCOMP, mode, &program).into()).map(drop)
        })
    }
}

/// Sends a signal to one process that we started.
pub(crate) fn kill(pid: u32, signal: i32) {
    // SAFETY: integers only.
    unsafe { libc::kill(pid as i32, signal) };
}

/// A shared mapping of the start of a file.
pub(crate) struct Map {
    at: *mut libc::c_void,
    len: usize,
}

impl Map {
    /// Maps `len` bytes, writable when asked for.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<Map> {
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Map { at, len })
    }

    /// The mapped bytes, as they are now.
    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        // SAFETY: inside the mapping, which lives as long as self.
        unsafe { std::slice::from_raw_parts(self.at.cast::<u8>().add(offset), len).to_vec() }
    }

    /// Stores bytes through the mapping.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping; the source is a slice of ours and cannot overlap it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.at.cast::<u8>().add(offset),
                bytes.len(),
            );
        }
    }

    /// msync(MS_SYNC).
    pub(crate) fn sync(&self) -> io::Result<()> {
        // SAFETY: the mapping is ours.
        check(unsafe { libc::msync(self.at, self.len, libc::MS_SYNC) }.into()).map(drop)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in shared() with this length, and unmapped once.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

/// A 4 KiB buffer on a 4 KiB border, for O_DIRECT.
#[repr(align(4096))]
pub(crate) struct Page(pub(crate) [u8; 4096]);

/// chattr flags of an open file.
pub(crate) fn flags(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the ioctl writes one int into ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETFLAGS, &mut flags) }.into())?;
    Ok(flags as u32)
}

/// Sets the chattr flags of an open file.
pub(crate) fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let flags = flags as libc::c_int;
    // SAFETY: the ioctl reads one int of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags) }.into()).map(drop)
}

/// truncate(2): by path, which is another request of a mount than ftruncate.
pub(crate) fn truncate(path: &std::ffi::CStr, len: u64) -> io::Result<()> {
    // SAFETY: a NUL-terminated path that lives through the call.
    check(unsafe { libc::truncate(path.as_ptr(), len as libc::off_t) }.into()).map(drop)
}

/// AUTOFS_IOC_READY: whoever waits for this request of an automount point goes on.
pub(crate) fn autofs_ready(root: &std::fs::File, token: u32) -> io::Result<()> {
    const READY: libc::c_ulong = 0x9360;
    // SAFETY: an open fd and integers.
    check(unsafe { libc::ioctl(root.as_raw_fd(), READY, libc::c_ulong::from(token)) }.into())
        .map(drop)
}

/// AUTOFS_IOC_CATATONIC: nobody waits at this automount point any more, now or later.
pub(crate) fn autofs_give_up(root: &std::fs::File) -> io::Result<()> {
    const CATATONIC: libc::c_ulong = 0x9362;
    // SAFETY: an open fd and an integer.
    check(unsafe { libc::ioctl(root.as_raw_fd(), CATATONIC, 0) }.into()).map(drop)
}
