//! Meta: everything about an inode that is not its data or its names; captured from src, applied to
//! dst in the one right order.
//!
//! The order is D7's: owner (chown clears setuid and capabilities), mode, ACLs and xattrs,
//! security.capability, inode flags, times. What dst cannot hold comes back as a list of
//! [`Refused`], for the ledger; it never stops the rest.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::mark::MarkName;
use crate::sys::name::Name;
use crate::sys::stat::{self, Stat, Time};
use crate::sys::xattr::{self, Target};
use crate::sys::{caps, copy, fd};

/// The xattr that file capabilities live in; any write removes it.
pub const CAPABILITY: &CStr = c"security.capability";
/// A directory's ACL for what is created in it.
pub const DEFAULT_ACL: &CStr = c"system.posix_acl_default";
/// btrfs' compression property of a file or directory.
const COMPRESSION: &CStr = c"btrfs.compression";
/// An inode's own ACL: beyond owner, group and others.
pub const ACCESS_ACL: &CStr = c"system.posix_acl_access";

/// FS_IMMUTABLE_FL and FS_APPEND_FL: they forbid all further work, so they are set at finish.
pub const LATE_FLAGS: u32 = 0x10 | 0x20;
/// Flags that mean the same on every file system that knows them: sync, immutable, append, nodump,
/// noatime, dirsync. Layout flags (extents, compression, COW) belong to the file system below.
pub const COPIED_FLAGS: u32 = 0x8 | LATE_FLAGS | 0x40 | 0x80 | 0x1_0000;

/// An inode's metadata.
#[derive(Debug, Clone)]
pub struct Meta {
    /// Owner, mode, times, type, device number, size.
    pub stat: Stat,
    /// Every xattr that we copy, ACLs and labels included.
    pub xattrs: Vec<(CString, Vec<u8>)>,
    /// The inode flags that we copy (FS_*_FL).
    pub flags: u32,
    /// xattrs that we may not read: of a file that we may not read.
    pub unread: Vec<(CString, Errno)>,
}

/// One piece of metadata that dst would not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What: `chown`, `chmod`, an xattr's name, `flags`, `utimensat`.
    pub what: String,
    /// Why.
    pub errno: Errno,
}

/// What became of an inode.
#[derive(Debug)]
pub struct Applied {
    /// What dst would not take.
    pub refused: Vec<Refused>,
    /// The permissions that it should have.
    pub perm: u32,
}

/// What an inode that was just made already has.
#[derive(Debug, Clone, Copy)]
pub struct Born {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions; `None`: not known (a default ACL had its say), or not to be trusted.
    pub perm: Option<u32>,
    /// Inode flags; `None`: there are none, or they are to stay.
    pub flags: Option<u32>,
}

/// What a capture is told about the source.
#[derive(Debug, Clone, Copy)]
pub struct Capture {
    /// The live mark's name: never copied.
    pub mark: MarkName,
    /// The source file system has inode flags (FS_IOC_GETFLAGS): worth an open per file.
    pub flags: bool,
}

impl Meta {
    /// Captures `name` in `dir` (src); `stat` is what statx just said of it.
    pub fn capture(
        how: Capture,
        dir: BorrowedFd<'_>,
        name: &Name,
        stat: Stat,
    ) -> Result<Meta, Errno> {
        let flags = match stat.kind() {
            FileType::RegularFile | FileType::Directory if how.flags => {
                match fd::open_src(dir, name) {
                    Ok(fd) => copy::inode_flags(fd.as_fd())?.unwrap_or(0) & COPIED_FLAGS,
                    // Not for us to read: that its data is not either says whoever pulls it.
                    Err(Errno::ACCESS | Errno::PERM) => 0,
                    Err(e) => return Err(e),
                }
            }
            _ => 0,
        };
        Meta::with_xattrs(Target::At(dir, name), how.mark, stat, flags)
    }

    /// As `capture`, of a regular file that is open for reading. `None`: it carries a live mark.
    pub fn capture_open(
        how: Capture,
        fd: BorrowedFd<'_>,
        stat: Stat,
    ) -> Result<Option<Meta>, Errno> {
        let target = Target::Open(fd);
        let names = xattr::list(target)?;
        if names.iter().any(|n| n.as_c_str() == how.mark.as_cstr()) {
            return Ok(None);
        }
        let flags = match how.flags {
            true => copy::inode_flags(fd)?.unwrap_or(0) & COPIED_FLAGS,
            false => 0,
        };
        Meta::with_names(target, names, how.mark, stat, flags).map(Some)
    }

    /// Captures an open file or directory (src).
    pub fn capture_fd(how: Capture, fd: BorrowedFd<'_>) -> Result<Meta, Errno> {
        let stat = stat::stat_fd(fd)?;
        let flags = match stat.kind() {
            FileType::RegularFile | FileType::Directory if how.flags => {
                copy::inode_flags(fd)?.unwrap_or(0) & COPIED_FLAGS
            }
            _ => 0,
        };
        Meta::with_xattrs(Target::Fd(fd), how.mark, stat, flags)
    }

    fn with_xattrs(
        target: Target<'_>,
        mark: MarkName,
        stat: Stat,
        flags: u32,
    ) -> Result<Meta, Errno> {
        Meta::with_names(target, xattr::list(target)?, mark, stat, flags)
    }

    fn with_names(
        target: Target<'_>,
        names: Vec<CString>,
        mark: MarkName,
        stat: Stat,
        flags: u32,
    ) -> Result<Meta, Errno> {
        let (mut xattrs, mut unread) = (Vec::new(), Vec::new());
        for name in names {
            if !is_copied(&name, mark) {
                continue;
            }
            match xattr::get(target, &name) {
                Ok(Some(value)) => xattrs.push((name, value)),
                Ok(None) => {}
                Err(e @ (Errno::ACCESS | Errno::PERM)) => unread.push((name, e)),
                Err(e) => return Err(e),
            }
        }
        Ok(Meta {
            stat,
            xattrs,
            flags,
            unread,
        })
    }

    /// The value of one xattr.
    pub fn xattr(&self, name: &CStr) -> Option<&[u8]> {
        self.xattrs
            .iter()
            .find(|(n, _)| n.as_c_str() == name)
            .map(|(_, v)| v.as_slice())
    }

    /// The same, of a directory that was changed at this time.
    pub fn changed_at(&self, mtime: Time) -> Meta {
        let mut meta = self.clone();
        meta.stat.mtime = mtime;
        meta
    }

    /// Applies everything to an open file or directory of dst, except the data, the mark and the
    /// flags of [`LATE_FLAGS`]. Whoever makes children in the directory takes its default ACL away
    /// before and applies again after: they would inherit it, and disturb its times (D8).
    pub fn apply_fd(&self, fd: BorrowedFd<'_>) -> Vec<Refused> {
        self.apply_fd_adding(fd, 0).refused
    }

    /// As `apply_fd`, with `add` to the permissions that the inode has afterwards. Which it should
    /// have comes back.
    pub fn apply_fd_adding(&self, fd: BorrowedFd<'_>, add: u32) -> Applied {
        let mut refused = Refusals::default();
        let own = |uid, gid| rustix::fs::fchown(fd, uid, gid);
        let perm = self.apply_owner(own, || stat::stat_fd(fd), &mut refused);
        refused.note("chmod", chmod_fd(fd, perm | add));
        self.apply_xattrs(Target::Fd(fd), &mut refused);
        if add != 0 && self.xattr(ACCESS_ACL).is_some() {
            // The ACL has set the owner's bits.
            refused.note("chmod", chmod_fd(fd, perm | add));
        }
        self.apply_flags(fd, &mut refused);
        self.apply_times_fd(fd, &mut refused);
        Applied {
            refused: refused.0,
            perm,
        }
    }

    /// Owner and group, or the group alone. Which permissions the inode may have comes back: setuid
    /// for another user than src's, or setgid for another group, was never meant (cp(1) too).
    fn apply_owner(
        &self,
        own: impl Fn(Option<Uid>, Option<Gid>) -> Result<(), Errno>,
        now: impl Fn() -> Result<Stat, Errno>,
        refused: &mut Refusals,
    ) -> u32 {
        let (uid, gid) = self.ids();
        let mut perm = self.stat.perm();
        if let Err(errno) = own(Some(uid), Some(gid)) {
            refused.note("chown", Err(errno));
            let _ = own(None, Some(gid)); // Of a group that is not ours: refused with the owner.
            let (uid, gid) = match now() {
                Ok(stat) => (Some(stat.uid), Some(stat.gid)),
                Err(_) => (None, None),
            };
            if uid != Some(self.stat.uid) {
                perm &= !0o4000;
            }
            if gid != Some(self.stat.gid) {
                perm &= !0o2000;
            }
        }
        perm
    }

    /// As `apply_fd`, to an inode that was just made. What is right already costs nothing.
    pub fn apply_new(&self, fd: BorrowedFd<'_>, born: Born) -> Vec<Refused> {
        let mut refused = Refusals::default();
        let chown = (born.uid, born.gid) != (self.stat.uid, self.stat.gid);
        let own = |uid, gid| rustix::fs::fchown(fd, uid, gid);
        let perm = match chown {
            true => self.apply_owner(own, || stat::stat_fd(fd), &mut refused),
            false => self.stat.perm(),
        };
        // chown clears setuid and setgid.
        if born.perm != Some(perm) || chown && perm & 0o6000 != 0 {
            refused.note("chmod", chmod_fd(fd, perm));
        }
        self.apply_xattrs(Target::Open(fd), &mut refused);
        self.change_flags(fd, born.flags, &mut refused);
        self.apply_times_fd(fd, &mut refused);
        refused.0
    }

    /// Applies everything to a symlink, fifo, socket or device of dst that was just made, or has no
    /// other name. Whoever may write in the directory may have put something else there meanwhile:
    /// what is not that, and every other inode, stays as it is (EBUSY).
    pub fn apply_at(&self, dir: BorrowedFd<'_>, name: &Name) -> Vec<Refused> {
        let mut refused = Refusals::default();
        let inode = fd::open_at(dir, name, OFlags::PATH).and_then(|inode| {
            let now = stat::stat_fd(inode.as_fd())?;
            let ours = now.kind() == self.stat.kind() && now.rdev == self.stat.rdev;
            (ours && now.nlink < 2).then_some(inode).ok_or(Errno::BUSY)
        });
        let inode = match inode {
            Ok(inode) => inode,
            Err(errno) => {
                refused.note("open", Err(errno));
                return refused.0;
            }
        };
        let fd = inode.as_fd();
        let own = |uid, gid| rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH);
        let perm = self.apply_owner(own, || stat::stat_fd(fd), &mut refused);
        if self.stat.kind() != FileType::Symlink {
            refused.note("chmod", chmod_fd(fd, perm));
        }
        self.apply_xattrs(Target::Fd(fd), &mut refused);
        self.apply_times_fd(fd, &mut refused);
        refused.0
    }

    /// Exactly src's flags: dirsync, nodump and others are inherited from the directory.
    fn apply_flags(&self, fd: BorrowedFd<'_>, refused: &mut Refusals) {
        self.change_flags(fd, copy::inode_flags(fd).ok().flatten(), refused);
    }

    fn change_flags(&self, fd: BorrowedFd<'_>, now: Option<u32>, refused: &mut Refusals) {
        // Flags are kept where both sides know them: a file system without them is no loss.
        let Some(now) = now else { return };
        let want = now & !COPIED_FLAGS | self.flags & !LATE_FLAGS;
        if want != now {
            match copy::set_inode_flags(fd, want) {
                Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => {}
                other => refused.note("flags", other),
            }
        }
    }

    fn ids(&self) -> (Uid, Gid) {
        (Uid::from_raw(self.stat.uid), Gid::from_raw(self.stat.gid))
    }

    fn apply_xattrs(&self, target: Target<'_>, refused: &mut Refusals) {
        // Capabilities last: setting an ACL or a label must not be able to disturb them.
        let (caps, others): (Vec<_>, Vec<_>) = self
            .xattrs
            .iter()
            .partition(|(name, _)| name.as_c_str() == CAPABILITY);
        for (name, value) in others.into_iter().chain(caps) {
            let set = set_copied_xattr(target, name, value);
            refused.note(&name.to_string_lossy(), set);
        }
    }

    fn apply_times_fd(&self, fd: BorrowedFd<'_>, refused: &mut Refusals) {
        refused.note(
            "utimensat",
            set_times_fd(fd, self.stat.atime, self.stat.mtime),
        );
        // File systems clamp what they cannot hold, silently. Ordinary times fit everywhere.
        let mtime = self.stat.mtime;
        if !(0..=i64::from(i32::MAX)).contains(&mtime.sec)
            && let Ok(now) = stat::stat_fd(fd)
        {
            refused.note_times(mtime, now.mtime);
        }
    }
}

#[derive(Default)]
struct Refusals(Vec<Refused>);

impl Refusals {
    fn note(&mut self, what: &str, result: Result<(), Errno>) {
        if let Err(errno) = result {
            self.0.push(Refused {
                what: what.to_owned(),
                errno,
            });
        }
    }

    fn note_times(&mut self, want: Time, got: Time) {
        if want.sec != got.sec {
            self.0.push(Refused {
                what: "mtime".to_owned(),
                errno: Errno::RANGE,
            });
        }
    }
}

/// Removes the ACLs that an inode inherited from its parent's default ACL but src does not have.
pub fn drop_inherited_acl(target: Target<'_>, meta: &Meta) -> Result<(), Errno> {
    for name in [ACCESS_ACL, DEFAULT_ACL] {
        if meta.xattr(name).is_none() {
            match xattr::remove(target, name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// chmod of an open inode (O_PATH too); keeps S_ISGID whatever the groups of the daemon are.
pub fn chmod_fd(fd: BorrowedFd<'_>, perm: u32) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(perm & 0o7777);
    let set = || match rustix::fs::fchmod(fd, mode) {
        // An O_PATH fd.
        Err(Errno::BADF) => {
            use std::os::fd::AsRawFd;
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::chmod(path, mode)
        }
        other => other,
    };
    if perm & 0o2000 != 0 {
        caps::with_fsetid(set)
    } else {
        set()
    }
}

/// utimensat of an open inode (O_PATH too).
pub fn set_times_fd(fd: BorrowedFd<'_>, atime: Time, mtime: Time) -> Result<(), Errno> {
    utimens(fd, &timestamps(atime, mtime))
}

/// utimensat(2) with any timespec (UTIME_NOW, UTIME_OMIT) on an open inode (O_PATH too).
pub fn utimens(fd: BorrowedFd<'_>, times: &Timestamps) -> Result<(), Errno> {
    match rustix::fs::futimens(fd, times) {
        // An O_PATH fd: by its empty path, which costs a walk.
        Err(Errno::BADF) => rustix::fs::utimensat(fd, c"", times, AtFlags::EMPTY_PATH),
        other => other,
    }
}

/// The kernel's form of two times.
pub fn timestamps(atime: Time, mtime: Time) -> Timestamps {
    let spec = |t: Time| Timespec {
        tv_sec: t.sec,
        tv_nsec: t.nsec.into(),
    };
    Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    }
}

/// True for an xattr that a copy carries over: users', root's, labels, capabilities, POSIX ACLs.
/// Not the live mark, and not what a file system computes (`system.nfs4_acl`, `ceph.*`).
pub fn is_copied(name: &CStr, mark: MarkName) -> bool {
    let bytes = name.to_bytes();
    // xfs shows each POSIX ACL a second time, as trusted.SGI_ACL_*: not to be copied elsewhere.
    if name == mark.as_cstr() || bytes.starts_with(b"trusted.SGI_ACL_") {
        return false;
    }
    [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .any(|p| bytes.starts_with(p))
        || name == ACCESS_ACL
        || name == DEFAULT_ACL
        || name == COMPRESSION
}

/// True for the two POSIX ACLs.
pub fn is_acl(name: &CStr) -> bool {
    name == ACCESS_ACL || name == DEFAULT_ACL
}

/// Sets an xattr of a copy. btrfs' compression property is kept where both sides know it: another
/// file system without it is no loss.
pub fn set_copied_xattr(target: Target<'_>, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    match caps::with_fsetid(|| xattr::set(target, name, value)) {
        Err(Errno::OPNOTSUPP | Errno::INVAL) if name == COMPRESSION => Ok(()),
        // A label that dst has given by itself already.
        Err(e) if e == Errno::PERM || e == Errno::ACCESS => match xattr::get(target, name) {
            Ok(Some(now)) if now == value => Ok(()),
            _ => Err(e),
        },
        other => other,
    }
}

/// Opens a directory of dst to apply metadata to it or to work in it.
pub fn open_dst_dir(dir: BorrowedFd<'_>, name: &Name) -> Result<std::os::fd::OwnedFd, Errno> {
    fd::open_at(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::CWD;

    use super::*;

    #[test]
    fn metadata_by_name_reaches_only_the_inode_that_was_meant() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let perm = |name: &str| at(name).metadata().expect("stat").permissions().mode() & 0o7777;
        fs::write(at("victim"), "x").expect("write");
        fs::set_permissions(at("victim"), fs::Permissions::from_mode(0o600)).expect("chmod");
        symlink("victim", at("symlink")).expect("symlink");
        fs::hard_link(at("victim"), at("link")).expect("link");
        for name in ["fifo", "twice"] {
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(CWD, at(name), FileType::Fifo, mode, 0).expect("mkfifo");
        }
        fs::hard_link(at("twice"), at("other")).expect("link");
        let root = fs::File::open(dir.path()).expect("open");
        let name = |n: &str| Name::new(n.as_bytes()).expect("a name");
        let mut stat = stat::stat_at(root.as_fd(), name("fifo").as_cstr()).expect("stat");
        stat.mode |= 0o666;
        let meta = Meta {
            stat,
            xattrs: Vec::new(),
            flags: 0,
            unread: Vec::new(),
        };
        for taken in ["symlink", "link", "twice"] {
            let refused = meta.apply_at(root.as_fd(), &name(taken));
            assert_eq!(refused.len(), 1, "{taken}");
            assert_eq!(refused[0].errno, Errno::BUSY, "{taken}");
        }
        assert_eq!((perm("victim"), perm("twice")), (0o600, 0o600));
        assert!(meta.apply_at(root.as_fd(), &name("fifo")).is_empty());
        assert_eq!(perm("fifo"), 0o666);
    }
}
