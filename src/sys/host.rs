//! This machine: mounts, processes, limits, locks.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};

use super::stat::{stat_at, stat_fd};
use super::{Result, check};

/// Opens an absolute directory as the user wrote it (symlinks are followed).
pub fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

/// What statfs(2) and statvfs(3) say about the file system of an fd.
#[derive(Debug, Clone, Copy)]
pub struct FsStat {
    /// f_type: the magic number of linux/magic.h.
    pub magic: u64,
    /// Unit of the block counts, bytes.
    pub frsize: u64,
    /// Preferred I/O size, bytes.
    pub bsize: u64,
    /// Blocks: all, free, free for users.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Blocks free for users.
    pub bavail: u64,
    /// Inodes: all, free.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Longest name, bytes.
    pub namelen: u64,
    /// ST_RDONLY, ST_NOSUID ... of the mount that the fd came through.
    pub flags: u64,
}

/// btrfs' f_type: the file system that needs a barrier before a directory is published (D6).
pub const BTRFS_MAGIC: u64 = 0x9123_683e;
/// f_type of ext2, ext3 and ext4 (linux/magic.h).
pub const EXT4_MAGIC: u64 = 0xef53;
/// f_type of xfs (linux/magic.h).
pub const XFS_MAGIC: u64 = 0x5846_5342;
/// statfs(2) magic of tmpfs.
pub const TMPFS_MAGIC: u64 = 0x0102_1994;

/// statfs(2) and fstatvfs(3) of an fd.
pub fn fs_stat(fd: BorrowedFd<'_>) -> Result<FsStat> {
    let s = rustix::fs::fstatfs(fd)?;
    let v = rustix::fs::fstatvfs(fd)?;
    Ok(FsStat {
        magic: s.f_type as u64,
        frsize: v.f_frsize,
        bsize: v.f_bsize,
        blocks: v.f_blocks,
        bfree: v.f_bfree,
        bavail: v.f_bavail,
        files: v.f_files,
        ffree: v.f_ffree,
        namelen: v.f_namemax,
        flags: v.f_flag.bits(),
    })
}

/// True for the `lost+found` that mke2fs and e2fsck make: root's, for nobody else, directly in the root of
/// an ext2, ext3 or ext4. It belongs to the file system, whatever a tree in it is a copy of. False also
/// when that cannot be told.
pub fn is_lost_found(dir: BorrowedFd<'_>, name: &CStr) -> bool {
    // EXT4_ROOT_INO
    const ROOT: u64 = 2;
    name == c"lost+found"
        && stat_fd(dir).is_ok_and(|s| s.key.ino == ROOT)
        && fs_stat(dir).is_ok_and(|s| s.magic == EXT4_MAGIC)
        && stat_at(dir, name).is_ok_and(|s| s.is_dir() && s.uid == 0 && s.perm() == 0o700)
}

/// Takes an exclusive flock(2) without waiting. EWOULDBLOCK: somebody holds it.
pub fn try_lock(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::flock(fd, rustix::fs::FlockOperation::NonBlockingLockExclusive)
}

/// Releases a lock of `try_lock`, whoever else has the same open file.
pub fn unlock(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::flock(fd, rustix::fs::FlockOperation::Unlock)
}

/// Takes a shared flock(2), without waiting.
pub fn try_lock_shared(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::flock(fd, rustix::fs::FlockOperation::NonBlockingLockShared)
}

/// As [`try_lock`]; where a server knows no locks nobody else can hold one either. NFS locks only what
/// is open for writing.
pub fn try_lock_if_any(fd: BorrowedFd<'_>) -> Result<()> {
    match try_lock(fd) {
        Err(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
        other => other,
    }
}

/// Raises RLIMIT_NOFILE to its hard limit; returns the limit now in force.
pub fn raise_nofile() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let want = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    match setrlimit(Resource::Nofile, want) {
        Ok(()) => now.maximum.unwrap_or(1 << 20),
        Err(_) => now.current.unwrap_or(1024),
    }
}

/// What the table of fds is made for at once: directories that are kept open, files in flight, users' open files.
const FDS: u64 = 4096;

/// Makes the table of fds as large as it is going to be, while there is one thread. Later the kernel doubles it
/// step by step, and every thread that opens something then waits until all CPUs have left the old one: tens of ms.
pub fn widen_fd_table(limit: u64) {
    let last = RawFd::try_from(limit.min(FDS)).map_or(0, |n| n - 1);
    let any = std::io::stderr();
    // Without memory or a descriptor for it the table grows when it must.
    drop(rustix::io::fcntl_dupfd_cloexec(any, last));
}

/// The CPUs that this process may run on.
pub fn cpus() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|c| set.is_set(*c))
            .collect(),
        Err(_) => vec![0],
    }
}

/// Pins the calling thread to one CPU. A CPU that went offline is no error: it stays unpinned.
pub fn pin_to_cpu(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let _ = rustix::thread::sched_setaffinity(None, &set); // Slower, not wrong.
}

/// Whether the calling thread, which was pinned there, runs on this CPU: false while that is offline.
pub fn runs_on_cpu(cpu: usize) -> bool {
    pin_to_cpu(cpu); // It may have come online since.
    rustix::thread::sched_getcpu() == cpu
}

/// Lowers the calling thread's share of a CPU that others want too (nice(2); Linux keeps the value
/// per thread). On an idle CPU nothing changes.
pub fn be_nice(nice: i32) {
    let me = rustix::thread::gettid();
    // A hint: without it foreground requests wait longer for a busy CPU.
    rustix::process::setpriority_process(Some(me), nice).ok();
}

/// What fork(2) returned.
#[derive(Debug)]
pub enum Forked {
    /// In the parent: the child's pid.
    Parent(i32),
    /// In the child.
    Child,
}

/// Forks. Only before any thread was started: the child has just the calling thread.
pub fn fork() -> Result<Forked> {
    // SAFETY: the process is single-threaded here (the function's contract), so no lock can be
    // held by a thread that the child lacks.
    match check(libc::c_long::from(unsafe { libc::fork() }))? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Leaves the terminal: a session of its own, standard input and output on /dev/null, and standard
/// error on `log` (or /dev/null), working directory `/` so that no mount is kept busy.
pub fn detach_from_terminal(log: Option<BorrowedFd<'_>>) -> Result<()> {
    rustix::process::setsid()?;
    rustix::process::chdir(c"/")?;
    let null = rustix::fs::openat(CWD, c"/dev/null", OFlags::RDWR, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    match log {
        Some(log) => rustix::stdio::dup2_stderr(log),
        None => rustix::stdio::dup2_stderr(&null),
    }
}

/// A FUSE file system that is not attached anywhere yet.
#[derive(Debug)]
pub struct FuseMount {
    /// The open /dev/fuse, for the session.
    pub dev: OwnedFd,
    /// The open context: `attach` makes the mount after the session's handshake has begun.
    context: OwnedFd,
}

/// How the mount treats what is in it; taken over from DST's own mount.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountFlags {
    /// No setuid.
    pub nosuid: bool,
    /// No device nodes.
    pub nodev: bool,
    /// No programs.
    pub noexec: bool,
    /// Read-only.
    pub rdonly: bool,
}

/// Opens /dev/fuse and configures a `fuse.mirrorfs` superblock on it.
/// `allow_other` and `default_permissions` are always set for root.
pub fn fuse_open(source: &str, root_mode: u32, uid: u32, gid: u32) -> Result<FuseMount> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string};
    let dev = rustix::fs::openat(
        CWD,
        c"/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let context = rustix::mount::fsopen(c"fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let ctx = &context;
    fsconfig_set_string(ctx, c"source", source)?;
    fsconfig_set_string(ctx, c"subtype", c"mirrorfs")?;
    fsconfig_set_string(ctx, c"fd", dev.as_raw_fd().to_string())?;
    fsconfig_set_string(ctx, c"rootmode", format!("{root_mode:o}"))?;
    fsconfig_set_string(ctx, c"user_id", uid.to_string())?;
    fsconfig_set_string(ctx, c"group_id", gid.to_string())?;
    fsconfig_set_flag(ctx, c"default_permissions")?;
    fsconfig_set_flag(ctx, c"allow_other")?;
    fsconfig_create(ctx)?;
    Ok(FuseMount { dev, context })
}

impl FuseMount {
    /// Makes the mount object: the kernel's INIT request can be answered from now on, nobody can
    /// see the file system yet. `attach` gives it a place.
    pub fn into_mount(self, flags: MountFlags) -> Result<(OwnedFd, OwnedFd)> {
        let mut attr = MountAttrFlags::empty();
        attr.set(MountAttrFlags::MOUNT_ATTR_NOSUID, flags.nosuid);
        attr.set(MountAttrFlags::MOUNT_ATTR_NODEV, flags.nodev);
        attr.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, flags.noexec);
        attr.set(MountAttrFlags::MOUNT_ATTR_RDONLY, flags.rdonly);
        let mnt = rustix::mount::fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attr)?;
        Ok((self.dev, mnt))
    }
}

/// Attaches a detached mount on top of an open directory.
pub fn attach(mnt: BorrowedFd<'_>, on: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mnt, c"", on, c"", flags)
}

/// Attaches a detached mount under the mount whose root `top` is: what is below the two is never
/// seen. EINVAL from kernels before 6.5.
pub fn attach_beneath(mnt: BorrowedFd<'_>, top: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_BENEATH;
    rustix::mount::move_mount(mnt, c"", top, c"", flags)
}

/// FUSE_NOTIFY_INC_EPOCH: every name that the kernel has cached is looked up again from now on.
/// EINVAL from kernels before 6.16.
pub fn fuse_inc_epoch(dev: BorrowedFd<'_>) -> Result<()> {
    const FUSE_NOTIFY_INC_EPOCH: i32 = 8;
    // struct fuse_out_header: len, error (the notification's code), unique (0: a notification).
    let mut message = [0u8; 16];
    message[..4].copy_from_slice(&16u32.to_ne_bytes());
    message[4..8].copy_from_slice(&FUSE_NOTIFY_INC_EPOCH.to_ne_bytes());
    rustix::io::write(dev, &message).map(|_| ())
}

/// `umount -l`: the topmost mount on `path` leaves the tree at once; open files live on.
pub fn detach(path: &Path) -> Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

/// True for what a mount answers whose daemon is dead. The last two for requests of the very moment.
pub fn is_mount_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED)
}

/// One line of /proc/self/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// The mount's id (statx's stx_mnt_id).
    pub id: u64,
    /// Where it is attached.
    pub point: std::path::PathBuf,
    /// File system type with subtype, such as `fuse.mirrorfs`.
    pub fs_type: String,
    /// The source, such as a device.
    pub source: String,
    /// Per-mount options, comma separated.
    pub options: String,
    /// The device (major:minor): one for each file system.
    pub device: String,
    /// What of the file system it shows: a path from its root.
    pub root: std::path::PathBuf,
    /// Neither the mount nor the file system is read-only.
    pub writable: bool,
    /// It cannot be bound elsewhere.
    pub unbindable: bool,
}

/// All mounts that the calling thread can see, in the order of attachment.
pub fn mounts() -> std::io::Result<Vec<MountLine>> {
    let bytes = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(bytes
        .split(|b| *b == b'\n')
        .filter_map(parse_mount_line)
        .collect())
}

/// Joins threads, those that end within `limit`; says how many do not. A panic was logged by its hook.
pub fn join_all(
    mut threads: Vec<std::thread::JoinHandle<()>>,
    limit: std::time::Duration,
) -> usize {
    let until = std::time::Instant::now() + limit;
    loop {
        let (over, left): (Vec<_>, Vec<_>) = threads.into_iter().partition(|t| t.is_finished());
        for thread in over {
            if thread.join().is_err() {
                tracing::error!("a thread panicked; what it left is still pending");
            }
        }
        if left.is_empty() || std::time::Instant::now() >= until {
            return left.len();
        }
        threads = left;
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// True for the device of a file system that a server or another process answers for: its calls may
/// never return. Asks nobody; what is not known is a disk.
pub fn may_hang(dev: (u32, u32)) -> bool {
    const SERVED: [&str; 9] = [
        "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "lustre", "gpfs",
    ];
    type_of(dev).is_some_and(|kind| is_fuse_type(&kind) || SERVED.contains(&kind.as_str()))
}

/// True for the device of a file system whose server may look under a path for what is asked of an open file.
/// NFS, SMB and the like ask for the file that was opened. Asks nobody.
pub fn goes_by_paths(dev: (u32, u32)) -> bool {
    type_of(dev).is_some_and(|kind| is_fuse_type(&kind) || kind == "9p")
}

/// True for the device of a FUSE file system. Asks nobody.
pub fn is_fuse(dev: (u32, u32)) -> bool {
    type_of(dev).is_some_and(|kind| is_fuse_type(&kind))
}

fn is_fuse_type(kind: &str) -> bool {
    kind == "fuse" || kind.starts_with("fuse.")
}

/// The type of the mounted file system with this device number; `None` for a block device's.
fn type_of(dev: (u32, u32)) -> Option<String> {
    let lines = match dev.0 {
        0 => std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default(),
        _ => return None,
    };
    let device = format!("{}:{}", dev.0, dev.1);
    let here = |line: &&[u8]| line.split(|b| *b == b' ').nth(2) == Some(device.as_bytes());
    let line = lines.split(|b| *b == b'\n').find(here)?;
    parse_mount_line(line).map(|m| m.fs_type)
}

/// See proc_pid_mountinfo(5). Space, tab, newline and backslash in a field are octal escapes.
fn parse_mount_line(line: &[u8]) -> Option<MountLine> {
    use std::os::unix::ffi::OsStringExt;
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let text = |f: &[u8]| String::from_utf8_lossy(&unescape(f)).into_owned();
    let rw = |options: &&[u8]| options.split(|b| *b == b',').any(|o| o == b"rw");
    Some(MountLine {
        id: text(fields.first()?).parse().ok()?,
        point: std::ffi::OsString::from_vec(unescape(fields.get(4)?)).into(),
        options: text(fields.get(5)?),
        device: text(fields.get(2)?),
        root: std::ffi::OsString::from_vec(unescape(fields.get(3)?)).into(),
        writable: fields.get(5).is_some_and(rw) && fields.get(dash + 3).is_some_and(rw),
        unbindable: fields.get(6..dash)?.contains(&b"unbindable".as_slice()),
        fs_type: text(fields.get(dash + 1)?),
        source: text(fields.get(dash + 2)?),
    })
}

pub(super) fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field
            .get(at + 1..at + 4)
            .filter(|o| o.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(o) if field[at] == b'\\' => {
                out.push(
                    o.iter()
                        .fold(0u8, |v, b| v.wrapping_mul(8).wrapping_add(b - b'0')),
                );
                at += 4;
            }
            _ => {
                out.push(field[at]);
                at += 1;
            }
        }
    }
    out
}

/// True for a file system that asks somebody else (a server, a daemon) for what it is asked: a call
/// may wait for as long as that takes, and many can wait at once.
pub fn asks_others(fs: &FsStat) -> bool {
    // FUSE, NFS, SMB2, CIFS, SMB1, Ceph, Lustre, 9p, AFS (kafs, OpenAFS), GPFS, BeeGFS, OrangeFS,
    // GFS2, OCFS2: linux/magic.h, and the sources of those that are not in it.
    const MAGIC: [u64; 15] = [
        0x6573_5546,
        0x6969,
        0xfe53_4d42,
        0xff53_4d42,
        0x517b,
        0x00c3_6400,
        0x0bd0_0bd0,
        0x0102_1997,
        0x6b41_4653,
        0x5346_414f,
        0x4750_4653,
        0x1983_0326,
        0x2003_0528,
        0x0116_1970,
        0x7461_636f,
    ];
    MAGIC.contains(&(fs.magic & 0xffff_ffff))
}

/// Whether this is Linux `major.minor` or later; false when uname(2) gives no such number.
pub fn is_linux_at_least(major: u32, minor: u32) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|n| n.parse::<u32>().ok());
    next().zip(next()).is_some_and(|v| v >= (major, minor))
}

/// Which boot of this machine it is; `None` where /proc does not tell.
pub fn boot_id() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

/// Duplicates an fd that a user of `sys` only borrowed.
pub fn dup(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC returns a new fd that nobody else owns, or -1.
    let new = check(libc::c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3)
    }))?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(new as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_spaces_and_newlines_is_read_back() {
        let line =
            b"36 35 98:0 /mnt1 /mnt\\0402\\012x rw,noatime master:1 - fuse.mirrorfs /old\\134x rw";
        let m = parse_mount_line(line).expect("a line");
        assert_eq!(m.id, 36);
        assert_eq!(m.point, Path::new("/mnt 2\nx"));
        assert_eq!(m.fs_type, "fuse.mirrorfs");
        assert_eq!(m.source, "/old\\x");
        assert_eq!((m.device.as_str(), m.writable), ("98:0", true));
        assert!(!m.unbindable);
        assert_eq!(m.root, Path::new("/mnt1"));
    }

    #[test]
    fn a_kernel_is_as_new_as_its_release_says() {
        assert!(is_linux_at_least(2, 6) && is_linux_at_least(5, 5));
        assert!(!is_linux_at_least(1000, 0) && !is_linux_at_least(u32::MAX, u32::MAX));
    }

    #[test]
    fn this_process_sees_its_root_mount() {
        assert!(
            mounts()
                .expect("mountinfo")
                .iter()
                .any(|m| m.point == Path::new("/"))
        );
    }
}
