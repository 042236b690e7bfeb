//! Stamp: metadata onto a dst inode that is open. `meta` knows the one right order; here is the
//! short way for what has nothing unusual, and what to do to an inode that was there before.

use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use super::report::Changes;
use crate::meta::{self, COPIED_FLAGS, LATE_FLAGS, Meta, Refused};
use crate::sys::copy;
use crate::sys::xattr::{self, Target};

/// What an inode that was just made already has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Born {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// `None`: not known (a default ACL had its say), or not to be trusted.
    pub(super) perm: Option<u32>,
}

/// Everything but data and [`LATE_FLAGS`] onto a new inode. The usual file costs one utimensat, and
/// fchown or fchmod only where it was not born right.
pub(super) fn fresh(fd: BorrowedFd<'_>, meta: &Meta, born: Born, root: bool) -> Vec<Refused> {
    let usual_time = (0..=i64::from(i32::MAX)).contains(&meta.stat.mtime.sec);
    if !meta.xattrs.is_empty() || meta.flags & !LATE_FLAGS != 0 || !usual_time {
        let refused = meta.apply_fd(fd);
        if !root {
            own_group(fd, meta);
        }
        return refused;
    }
    let mut refused = Vec::new();
    let mut note = |what: &str, result: Result<(), Errno>| {
        if let Err(errno) = result {
            let what = what.to_owned();
            refused.push(Refused { what, errno });
        }
    };
    let mut perm = born.perm;
    if (born.uid, born.gid) != (meta.stat.uid, meta.stat.gid) {
        let ids = (Uid::from_raw(meta.stat.uid), Gid::from_raw(meta.stat.gid));
        note("chown", rustix::fs::fchown(fd, Some(ids.0), Some(ids.1)));
        if !root {
            own_group(fd, meta);
        }
        // chown clears setuid and setgid.
        perm = perm.filter(|p| p & 0o6000 == 0);
    }
    if perm != Some(meta.stat.perm()) {
        note("chmod", meta::chmod_fd(fd, meta.stat.perm()));
    }
    let times = meta::set_times_fd(fd, meta.stat.atime, meta.stat.mtime);
    note("utimensat", times);
    refused
}

/// Without privilege: the group at least, if we are a member.
fn own_group(fd: BorrowedFd<'_>, meta: &Meta) {
    // EPERM: not a member; like every copy without privilege the file keeps our own group.
    let group = Some(Gid::from_raw(meta.stat.gid));
    let _ = rustix::fs::fchown(fd, None, group); // As said.
    let _ = meta::chmod_fd(fd, meta.stat.perm()); // chown cleared setgid; a failure was told.
}

/// What differs between a src inode and the dst inode of the same name, data aside.
pub(super) fn changes(src: &Meta, dst: &Meta, dst_flags: bool, root: bool) -> Changes {
    let symlink = src.stat.kind() == rustix::fs::FileType::Symlink;
    let is_acl = |name: &std::ffi::CStr| name.to_bytes().starts_with(b"system.posix_acl");
    let differs = |acl: bool| {
        let of = |m: &Meta| {
            let mut all: Vec<_> = m
                .xattrs
                .iter()
                .filter(|(n, _)| is_acl(n) == acl)
                .cloned()
                .collect();
            all.sort();
            all
        };
        of(src) != of(dst)
    };
    let some = !src.xattrs.is_empty() || !dst.xattrs.is_empty();
    Changes {
        data: false,
        size: false,
        time: src.stat.mtime != dst.stat.mtime,
        mode: !symlink && src.stat.perm() != dst.stat.perm(),
        owner: root && src.stat.uid != dst.stat.uid,
        group: root && src.stat.gid != dst.stat.gid,
        acl: some && differs(true),
        xattr: some && differs(false),
        flags: dst_flags && (src.flags ^ dst.flags) & COPIED_FLAGS != 0,
    }
}

/// Makes an existing, open dst inode what src is, data and [`LATE_FLAGS`] aside. Flags that forbid
/// it must be cleared already.
pub(super) fn amend(fd: BorrowedFd<'_>, src: &Meta, dst: &Meta, root: bool) -> Vec<Refused> {
    let mut refused = Vec::new();
    for (name, _) in &dst.xattrs {
        if src.xattr(name).is_none()
            && let Err(errno) = xattr::remove(Target::Open(fd), name)
            && errno != Errno::NODATA
        {
            let what = name.to_string_lossy().into_owned();
            refused.push(Refused { what, errno });
        }
    }
    let gone = dst.flags & !src.flags & !LATE_FLAGS;
    if gone != 0
        && let Err(errno) = clear_flags(fd, gone)
    {
        let what = "flags".to_owned();
        refused.push(Refused { what, errno });
    }
    refused.extend(src.apply_fd(fd));
    if !root {
        own_group(fd, src);
    }
    refused
}

/// Sets inode flags. Flags are kept where both sides know them: no error where dst has none.
pub(super) fn add_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    let Some(now) = copy::inode_flags(fd)? else {
        return Ok(());
    };
    match copy::set_inode_flags(fd, now | flags) {
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// Clears inode flags.
pub(super) fn clear_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    match copy::inode_flags(fd)? {
        Some(now) if now & flags != 0 => copy::set_inode_flags(fd, now & !flags),
        _ => Ok(()),
    }
}
