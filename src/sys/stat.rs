//! statx into `Stat`: all that one call tells about an inode.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, StatxAttributes, StatxFlags};

use super::Result;

/// Seconds since 1970 (negative before) and nanoseconds (0 to 999,999,999) after that second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds; floor, not truncation: half a second before 1970 is -1 s and 500,000,000 ns.
    pub sec: i64,
    /// Nanoseconds, always forward from `sec`.
    pub nsec: u32,
}

/// Which inode this is: unique on this machine while it runs. Never stored: st_dev changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileKey {
    /// st_dev, major and minor.
    pub dev: (u32, u32),
    /// st_ino.
    pub ino: u64,
}

/// The answer of statx(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// st_dev and st_ino.
    pub key: FileKey,
    /// The mount that the inode was reached through (stx_mnt_id).
    pub mnt_id: u64,
    /// st_mode with the type bits.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Preferred I/O size, bytes.
    pub blksize: u32,
    /// Device number of a device node, major and minor.
    pub rdev: (u32, u32),
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Birth, where the file system keeps it.
    pub btime: Time,
    /// STATX_ATTR_IMMUTABLE.
    pub immutable: bool,
    /// STATX_ATTR_APPEND.
    pub append: bool,
    /// STATX_ATTR_MOUNT_ROOT.
    pub mount_root: bool,
}

impl Stat {
    /// FS_IMMUTABLE_FL and FS_APPEND_FL, where they are set.
    pub fn late_flags(&self) -> u32 {
        (0x10 * u32::from(self.immutable)) | (0x20 * u32::from(self.append))
    }

    /// The file type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    /// Permission bits, setuid, setgid and sticky.
    pub fn perm(&self) -> u32 {
        self.mode & 0o7777
    }

    /// True for a regular file.
    pub fn is_file(&self) -> bool {
        self.kind() == FileType::RegularFile
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == FileType::Directory
    }

    /// True for a file with fewer blocks than bytes: it has holes, or is packed.
    pub fn is_sparse(&self) -> bool {
        self.blocks.saturating_mul(512) < self.size
    }

    /// True when the content may have changed between the two looks (size, mtime or ctime).
    pub fn changed_since(&self, earlier: &Stat) -> bool {
        (self.size, self.mtime, self.ctime) != (earlier.size, earlier.mtime, earlier.ctime)
    }

    /// Whether the look after its bytes were read goes past what the kernel has cached of it (NFS, FUSE).
    pub fn is_asked_again(&self) -> bool {
        self.size > ASK_BYTES
    }

    /// `(major << 8 | minor)` as the FUSE protocol and mknod(2) want it (new_encode_dev).
    pub fn rdev_encoded(&self) -> u64 {
        rustix::fs::makedev(self.rdev.0, self.rdev.1)
    }
}

/// After a copy of a larger file a server is asked what it is now, whatever is cached of it: one question
/// more is little beside its bytes. To ext4, xfs, btrfs and tmpfs it makes no difference.
const ASK_BYTES: u64 = 64 << 10;

/// What every statx asks for.
pub(crate) fn want() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID
}

/// The inode behind an open fd (O_PATH too).
pub fn stat_fd(fd: BorrowedFd<'_>) -> Result<Stat> {
    stat_as(fd, None, false)
}

/// As [`stat_fd`], and a server is asked, whatever is cached of it.
pub fn stat_fd_fresh(fd: BorrowedFd<'_>) -> Result<Stat> {
    stat_as(fd, None, true)
}

/// [`stat_fd`], [`stat_fd_fresh`] or [`stat_at`].
pub(crate) fn stat_as(dir: BorrowedFd<'_>, name: Option<&CStr>, fresh: bool) -> Result<Stat> {
    let (name, flags) = match name {
        None => (c"", AtFlags::EMPTY_PATH),
        Some(name) => (name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT),
    };
    let flags = flags | sync_flag(fresh);
    rustix::fs::statx(dir, name, flags, want()).map(|x| from_statx(&x))
}

/// Whether a server is asked, whatever is cached.
pub(crate) fn sync_flag(fresh: bool) -> AtFlags {
    match fresh {
        true => AtFlags::STATX_FORCE_SYNC,
        false => AtFlags::empty(),
    }
}

/// As [`stat_fd`], after the bytes of an inode were read that was like this before.
pub fn stat_fd_after(fd: BorrowedFd<'_>, earlier: &Stat) -> Result<Stat> {
    match earlier.is_asked_again() {
        true => stat_fd_fresh(fd),
        false => stat_fd(fd),
    }
}

/// [`Stat::changed_since`] of an open inode after its bytes were read; of a small one by the shorter fstat(2).
pub fn fd_changed_since(fd: BorrowedFd<'_>, earlier: &Stat) -> Result<bool> {
    if earlier.is_asked_again() {
        return stat_fd_fresh(fd).map(|now| now.changed_since(earlier));
    }
    let s = rustix::fs::fstat(fd)?;
    let same = |t: Time, sec: i64, nsec: u64| t.sec == sec && u64::from(t.nsec) == nsec;
    Ok(s.st_size as u64 != earlier.size
        || !same(earlier.mtime, s.st_mtime, s.st_mtime_nsec)
        || !same(earlier.ctime, s.st_ctime, s.st_ctime_nsec))
}

/// The inode that `name` in `dir` is; a symlink is not followed, an automount not triggered.
pub fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<Stat> {
    stat_as(dir, Some(name), false)
}

/// The inode at an absolute path, symlinks followed, as the kernel remembers it: no server is asked.
/// A FUSE daemon that asked itself, and was killed meanwhile, could never end.
pub fn stat_path(path: &std::path::Path) -> Result<Stat> {
    let flags = AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(rustix::fs::CWD, path, flags, want()).map(|x| from_statx(&x))
}

/// The mount that an open fd came through, as in /proc/self/mountinfo. No server is asked.
pub fn mount_id(fd: BorrowedFd<'_>) -> Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(fd, c"", flags, StatxFlags::MNT_ID).map(|x| x.stx_mnt_id)
}

/// The mount that an open fd came through, by a number that is not used again while the machine
/// runs (STATX_MNT_ID_UNIQUE); `None` before Linux 6.8.
pub fn unique_mount(fd: BorrowedFd<'_>) -> Option<u64> {
    const MNT_ID_UNIQUE: u32 = 0x4000;
    let want = StatxFlags::from_bits_retain(MNT_ID_UNIQUE);
    let x = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, want).ok()?;
    (x.stx_mask & MNT_ID_UNIQUE != 0).then_some(x.stx_mnt_id)
}

/// The kernel's struct as ours.
pub(crate) fn from_statx(x: &rustix::fs::Statx) -> Stat {
    let time = |t: &rustix::fs::StatxTimestamp| Time {
        sec: t.tv_sec,
        nsec: t.tv_nsec,
    };
    Stat {
        key: FileKey {
            dev: (x.stx_dev_major, x.stx_dev_minor),
            ino: x.stx_ino,
        },
        mnt_id: x.stx_mnt_id,
        mode: u32::from(x.stx_mode),
        nlink: x.stx_nlink,
        uid: x.stx_uid,
        gid: x.stx_gid,
        size: x.stx_size,
        blocks: x.stx_blocks,
        blksize: x.stx_blksize,
        rdev: (x.stx_rdev_major, x.stx_rdev_minor),
        atime: time(&x.stx_atime),
        mtime: time(&x.stx_mtime),
        ctime: time(&x.stx_ctime),
        btime: time(&x.stx_btime),
        immutable: x.stx_attributes.contains(StatxAttributes::IMMUTABLE),
        append: x.stx_attributes.contains(StatxAttributes::APPEND),
        mount_root: x.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_short_look_sees_each_change_that_the_long_one_sees() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let mut file = std::fs::File::create_new(&path).expect("a file");
        // Before 1970 as well: nanoseconds count forward from the second.
        let times = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec {
                tv_sec: -2,
                tv_nsec: 5,
            },
            last_modification: rustix::fs::Timespec {
                tv_sec: -2,
                tv_nsec: 999_999_999,
            },
        };
        rustix::fs::futimens(&file, &times).expect("its times");
        let changed = |was: &Stat| fd_changed_since(file_fd(&path).as_fd(), was).expect("a look");
        let was = stat_fd(file.as_fd()).expect("a look");
        assert!(!changed(&was));
        for other in [
            Stat { size: 1, ..was },
            Stat {
                mtime: Time { sec: -2, nsec: 0 },
                ..was
            },
            Stat {
                ctime: Time {
                    sec: was.ctime.sec - 1,
                    ..was.ctime
                },
                ..was
            },
        ] {
            assert!(changed(&other) && was.changed_since(&other));
        }
        file.write_all(b"x").expect("a byte");
        let now = stat_fd(file.as_fd()).expect("a look");
        assert!(changed(&was) && now.changed_since(&was) && !changed(&now));
    }

    fn file_fd(path: &std::path::Path) -> std::fs::File {
        std::fs::File::open(path).expect("it is there")
    }
}
