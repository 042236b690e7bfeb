//! This process's surroundings, as the command line needs them: who we are, who is at the other
//! end of a socket, and which directories lie above one.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::stat::{FileKey, stat_fd};
use super::{Result, check, host};

/// Effective user id.
pub fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Effective group id.
pub fn gid() -> u32 {
    rustix::process::getegid().as_raw()
}

/// False for the root of a container or of `unshare --user`: `trusted.*` xattrs are not for us.
pub fn in_initial_user_namespace() -> bool {
    match std::fs::read_to_string("/proc/self/uid_map") {
        Ok(map) => map.split_whitespace().eq(["0", "0", "4294967295"]),
        Err(_) => true,
    }
}

/// This process's umask. Without /proc, or before Linux 4.7, it can only be read by setting it: another
/// thread that creates something at this very moment creates it without one.
pub fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let told = status.lines().find_map(|l| l.strip_prefix("Umask:"));
    let told = told.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok());
    told.unwrap_or_else(|| {
        let mask = rustix::process::umask(Mode::empty());
        rustix::process::umask(mask);
        mask.as_raw_mode()
    })
}

/// What no other run has had for a name of its own: process ids come again, in a container each time.
pub fn run_id() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.unwrap_or_default().as_nanos();
    format!("{:x}-{nanos:x}", std::process::id())
}

/// The user at the other end of a Unix stream socket, as of its connect(2).
pub fn peer_uid(socket: BorrowedFd<'_>) -> Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw())
}

/// Connects to a Unix stream socket without waiting: EAGAIN when so many wait already that nobody
/// can have been served for long, ECONNREFUSED when nobody listens.
pub fn connect(path: &Path) -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// Opens a directory without a look at its content (O_PATH); symlinks are followed.
pub fn open_dir_path(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

/// As [`open_dir_path`], and an automount point (autofs) is opened as the directory that it is, instead of
/// starting what it waits for: so the last component may not be asked to be a directory, nor end with a
/// slash (fs/namei.c, `follow_automount`). ENOTDIR: it is something else.
pub fn open_mount_point(path: &Path) -> Result<OwnedFd> {
    let path: PathBuf = path.components().collect();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    // No server is asked: that is for who looks at what is there.
    let at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let mode = rustix::fs::statx(&fd, c"", at, StatxFlags::TYPE)?.stx_mode;
    match FileType::from_raw_mode(mode.into()) {
        FileType::Directory => Ok(fd),
        _ => Err(Errno::NOTDIR),
    }
}

/// statx(2) of a name in an open directory (of that itself without one), by a child that has nothing else
/// open and is killed when it takes longer than `patience`. The errno is the child's.
///
/// For the server of that file system: a process that waits for its own answer cannot end when it is
/// killed, because it holds its /dev/fuse open until then.
pub fn look_from_a_child(at: BorrowedFd<'_>, name: &CStr, patience: Duration) -> Result<()> {
    use std::os::fd::AsRawFd;
    let fd = at.as_raw_fd().cast_unsigned();
    // SAFETY: between fork and _exit the child makes system calls only: other threads' locks may be
    // held for ever there, and none is taken.
    let child = check(libc::c_long::from(unsafe { libc::fork() }))?;
    if child == 0 {
        // SAFETY: as above; `stat` is plain data on the child's own stack, and _exit never returns.
        unsafe {
            if fd > 0 {
                libc::syscall(libc::SYS_close_range, 0, fd - 1, 0);
            }
            libc::syscall(libc::SYS_close_range, fd + 1, u32::MAX, 0);
            let mut stat: libc::statx = std::mem::zeroed();
            let (at, mask) = (fd.cast_signed(), libc::STATX_BASIC_STATS);
            let done = libc::statx(at, name.as_ptr(), libc::AT_EMPTY_PATH, mask, &mut stat);
            libc::_exit(match done {
                0 => 0,
                _ => *libc::__errno_location(),
            });
        }
    }
    let child = rustix::process::Pid::from_raw(child as i32).ok_or(Errno::CHILD)?;
    let (end, mut killed) = (Instant::now() + patience, false);
    let status = loop {
        use rustix::process::{Signal, WaitOptions, kill_process, waitpid};
        match waitpid(Some(child), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => break status,
            Ok(None) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        if !killed && Instant::now() > end {
            killed = true;
            let _ = kill_process(child, Signal::KILL); // Gone already, then.
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    match status.exit_status() {
        Some(0) => Ok(()),
        errno => Err(errno.map_or(Errno::INTR, Errno::from_raw_os_error)),
    }
}

/// Runs `f` in a thread with a private copy of the mount namespace: what it unmounts there stays
/// mounted for everybody else. Directories that it opens stay usable: they are in detached mounts
/// once the copy is gone. Needs CAP_SYS_ADMIN; EINVAL when `/` is no mount point (a plain chroot).
pub fn in_private_mounts<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    let inside = || {
        // SAFETY: the thread gets its own mount namespace (and with it its own working directory
        // and umask); memory and file descriptors stay shared, and it ends with `f`.
        check(libc::c_long::from(unsafe {
            libc::unshare(libc::CLONE_NEWNS)
        }))?;
        // Else an unmount here would travel to where the mounts were copied from.
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )?;
        Ok(f())
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// access(2) with the effective ids, for a directory that is to be read.
pub fn may_list(dir: BorrowedFd<'_>) -> Result<()> {
    use rustix::fs::{Access, accessat};
    accessat(
        dir,
        c".",
        Access::READ_OK | Access::EXEC_OK,
        AtFlags::EACCESS,
    )
}

/// access(2) with the effective ids, for a directory that is to be mounted on.
pub fn may_write(dir: BorrowedFd<'_>) -> Result<()> {
    use rustix::fs::{Access, accessat};
    accessat(dir, c".", Access::WRITE_OK, AtFlags::EACCESS)
}

/// Longest chain of `..` that is followed: deeper trees exist only to break programs.
const DEPTH_MAX: usize = 100_000;

/// The directory itself and all directories above it, up to the root, by following `..`.
pub fn ancestors(dir: BorrowedFd<'_>) -> Result<Vec<FileKey>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut keys = vec![stat_fd(dir)?.key];
    let mut at = rustix::fs::openat(dir, c"..", flags, Mode::empty())?;
    let mut mount = stat_fd(dir)?.mnt_id;
    while keys.len() < DEPTH_MAX {
        let stat = stat_fd(at.as_fd())?;
        if keys.last() == Some(&stat.key) && mount == stat.mnt_id {
            return Ok(keys);
        }
        keys.push(stat.key);
        mount = stat.mnt_id;
        at = rustix::fs::openat(&at, c"..", flags, Mode::empty())?;
    }
    Err(Errno::LOOP)
}

/// Where a directory lies inside its file system, whichever mount it was reached through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The device of the mount, as mountinfo writes it: one per file system (btrfs too).
    pub device: String,
    /// The path from the file system's own root.
    pub path: PathBuf,
}

impl Place {
    /// True when `other` is this directory or below it.
    pub fn contains(&self, other: &Place) -> bool {
        self.device == other.device && other.path.starts_with(&self.path)
    }
}

/// Where `dir` lies inside its file system; `None` when the kernel does not tell (the directory
/// was deleted, or its mount belongs to another namespace).
pub fn place(dir: BorrowedFd<'_>) -> Result<Option<Place>> {
    let id = stat_fd(dir)?.mnt_id;
    let link = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", raw(dir)), Vec::new())?;
    let path = Path::new(std::ffi::OsStr::from_bytes(link.to_bytes()));
    let info = std::fs::read("/proc/thread-self/mountinfo").map_err(|_| Errno::NOENT)?;
    for line in info.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let (Some(line_id), Some(device), Some(root), Some(point)) =
            (fields.first(), fields.get(2), fields.get(3), fields.get(4))
        else {
            continue;
        };
        if std::str::from_utf8(line_id)
            .ok()
            .and_then(|t| t.parse().ok())
            != Some(id)
        {
            continue;
        }
        let Ok(inside) = path.strip_prefix(unescaped(point)) else {
            return Ok(None);
        };
        return Ok(Some(Place {
            device: String::from_utf8_lossy(device).into_owned(),
            path: unescaped(root).join(inside),
        }));
    }
    Ok(None)
}

fn unescaped(field: &[u8]) -> PathBuf {
    std::ffi::OsString::from_vec(host::unescape(field)).into()
}

fn raw(fd: BorrowedFd<'_>) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_found_among_the_ancestors_of_what_is_below_it() {
        let above = tempfile::tempdir().expect("a directory");
        let below = above.path().join("a/b");
        std::fs::create_dir_all(&below).expect("directories");
        let (above, below) = (
            open_dir_path(above.path()).expect("open"),
            open_dir_path(&below).expect("open"),
        );
        let key = stat_fd(above.as_fd()).expect("stat").key;
        assert!(ancestors(below.as_fd()).expect("ancestors").contains(&key));
        let (a, b) = (
            place(above.as_fd()).expect("place").expect("known"),
            place(below.as_fd()).expect("place").expect("known"),
        );
        assert!(a.contains(&b) && !b.contains(&a));
    }

    #[test]
    fn the_umask_is_read_and_not_touched() {
        let inside = || (umask(), umask());
        let told = crate::sys::caps::as_creator(uid(), gid(), 0o027, inside);
        assert_eq!(told.expect("an identity"), (0o027, 0o027));
    }
}
