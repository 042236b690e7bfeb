//! Stamp: metadata onto a dst inode that is open. `meta` knows the one right order; here is the
//! short way for what has nothing unusual, and what to do to an inode that was there before.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::report::Changes;
use crate::meta::{Born, COPIED_FLAGS, LATE_FLAGS, Meta, Refused, is_acl};
use crate::sys::copy;
use crate::sys::xattr::{self, Target};

/// Everything but data and [`LATE_FLAGS`] onto a new inode. The usual file costs one utimensat, and
/// fchown or fchmod only where it was not born right.
pub(super) fn fresh(fd: BorrowedFd<'_>, meta: &Meta, born: Born) -> Vec<Refused> {
    match meta.xattrs.is_empty() && meta.flags & !LATE_FLAGS == 0 {
        true => meta.apply_new(fd, born),
        false => meta.apply_fd(fd),
    }
}

/// What differs between a src inode and the dst inode of the same name, data aside.
pub(super) fn changes(src: &Meta, dst: &Meta, dst_flags: bool, root: bool) -> Changes {
    let symlink = src.stat.kind() == rustix::fs::FileType::Symlink;
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
    // Where an owner or group cannot be kept the bit that lends it to others is not either.
    let other = |same: bool, bit: u32| if same || root { 0 } else { bit };
    let lent =
        other(src.stat.uid == dst.stat.uid, 0o4000) | other(src.stat.gid == dst.stat.gid, 0o2000);
    let some = !src.xattrs.is_empty() || !dst.xattrs.is_empty();
    Changes {
        data: false,
        size: false,
        time: src.stat.mtime != dst.stat.mtime,
        now: false,
        atime: false,
        mode: !symlink && src.stat.perm() & !lent != dst.stat.perm(),
        owner: root && src.stat.uid != dst.stat.uid,
        group: root && src.stat.gid != dst.stat.gid,
        acl: some && differs(true),
        xattr: some && differs(false),
        flags: dst_flags && (src.flags ^ dst.flags) & COPIED_FLAGS != 0,
    }
}

/// Makes an existing, open dst inode what src is, data and [`LATE_FLAGS`] aside. Flags that forbid
/// it must be cleared already.
pub(super) fn amend(fd: BorrowedFd<'_>, src: &Meta, dst: &Meta) -> Vec<Refused> {
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
