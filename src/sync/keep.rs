//! Keep: what a dst inode is to be where not everything of src's is kept (rsync's `--no-...`).
//!
//! What is not kept is what dst has: an inode that stays keeps its own; one that is new has what it
//! was born with, and src's permissions as far as the umask or a default ACL lets them (rsync's
//! rule). Everything else is compared and applied as ever.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::FileType;

use super::Work;
use super::dir::Dir;
use crate::error::{Context, Result, Side};
use crate::mark::MarkName;
use crate::meta::{DEFAULT_ACL, Meta, is_acl, is_copied};
use crate::sys::name::RelPath;
use crate::sys::stat::{Stat, stat_fd};
use crate::sys::xattr::{self, Target};

impl Work<'_, '_> {
    /// Whether entries of this kind are copied at all.
    pub(super) fn is_kept(&self, kind: FileType) -> bool {
        let keep = &self.job.config.keep;
        match kind {
            FileType::RegularFile | FileType::Directory => true,
            FileType::Symlink => keep.symlinks,
            FileType::CharacterDevice | FileType::BlockDevice => keep.devices,
            FileType::Fifo | FileType::Socket | FileType::Unknown => keep.specials,
        }
    }

    /// What an inode that has `has` in dst is to have.
    pub(super) fn wanted<'m>(&self, src: &'m Meta, has: &Meta) -> Cow<'m, Meta> {
        let keep = &self.job.config.keep;
        if keep.has_all_metadata() {
            return Cow::Borrowed(src);
        }
        let mut meta = src.clone();
        let (want, now) = (&mut meta.stat, &has.stat);
        if !keep.owner {
            want.uid = now.uid;
        }
        if !keep.group {
            want.gid = now.gid;
        }
        let perm = match keep.perms {
            true => unlent(&src.stat, want.uid, want.gid),
            false => now.perm(),
        };
        want.mode = want.mode & !0o7777 | perm;
        if !keep.times {
            want.mtime = now.mtime;
        }
        if !keep.atimes {
            want.atime = now.atime;
        }
        Cow::Owned(meta)
    }

    /// Whether an xattr counts, on either side: an ACL or an xattr of dst that is not kept stays as
    /// it is.
    pub(super) fn counts(&self, name: &CStr) -> bool {
        let keep = &self.job.config.keep;
        let kept = if is_acl(name) { keep.acls } else { keep.xattrs };
        kept && is_copied(name, MarkName::Trusted) && name != MarkName::User.as_cstr()
    }

    /// As `wanted`, of an inode that this run has made in `dir`; `was`: what had its name.
    pub(super) fn wanted_new<'m>(
        &self,
        dir: &Dir,
        src: &'m Meta,
        mut has: Meta,
        was: Option<&Stat>,
    ) -> Cow<'m, Meta> {
        let mut perm = self.new_perm(dir, &src.stat, was);
        if let Some(was) = was {
            let keep = &self.job.config.keep;
            let uid = if keep.owner {
                src.stat.uid
            } else {
                has.stat.uid
            };
            let gid = if keep.group {
                src.stat.gid
            } else {
                has.stat.gid
            };
            perm &= !0o6000 | unlent(was, uid, gid);
        }
        has.stat.mode = has.stat.mode & !0o7777 | perm;
        self.wanted(src, &has)
    }

    /// What a directory that this run has made is to have, now that everything is in it.
    pub(super) fn wanted_dir<'m>(&self, dir: &'m Dir, path: &RelPath) -> Result<Cow<'m, Meta>> {
        let keep = &self.job.config.keep;
        if keep.has_all_metadata() {
            return Ok(Cow::Borrowed(&dir.meta));
        }
        let fd = dir.pair.dst.as_fd();
        let now = stat_fd(fd).on("statx", Side::Dst, path)?;
        let (mut has, _) = self.dst_meta(fd, now, path)?;
        // setgid of its parent: it was born with that.
        let perm = self.new_perm(dir, &dir.meta.stat, None) | dir.before.perm() & 0o2000;
        has.stat.mode = has.stat.mode & !0o7777 | perm;
        Ok(self.wanted(&dir.meta, &has))
    }

    /// What new inodes in a directory inherit has to be taken off again.
    pub(super) fn drops_acl(&self, dir: &Dir) -> bool {
        dir.inherits && self.job.config.keep.acls
    }

    /// The permissions of what gets a name where `was` had it: src's, or, where they are not kept,
    /// those of what was there (of the same type), or as much of src's as a new inode is given.
    pub(super) fn new_perm(&self, dir: &Dir, src: &Stat, was: Option<&Stat>) -> u32 {
        match was.filter(|was| was.kind() == src.kind()) {
            _ if self.job.config.keep.perms => src.perm(),
            Some(was) => was.perm(),
            None => src.perm() & dir.default_perm,
        }
    }

    /// What a new inode in a directory of dst is let have of its permissions.
    pub(super) fn default_perm(&self, dst: BorrowedFd<'_>, path: &RelPath) -> Result<u32> {
        let own = 0o777 & !self.job.umask;
        if self.job.config.keep.perms {
            return Ok(own);
        }
        let acl = xattr::get(Target::Open(dst), DEFAULT_ACL);
        let acl = acl.on("getxattr", Side::Dst, path)?;
        Ok(acl.as_deref().and_then(acl_perm).unwrap_or(own))
    }
}

/// An inode's permissions for another owner, another group: what lends them to others was not meant.
fn unlent(stat: &Stat, uid: u32, gid: u32) -> u32 {
    let lent = |same: bool, bit: u32| if same { 0 } else { bit };
    stat.perm() & !lent(stat.uid == uid, 0o4000) & !lent(stat.gid == gid, 0o2000)
}

/// The permissions that an ACL gives owner, group and others, its mask being the group's. Its form
/// is that of the xattr: a version (u32), then entries of tag (u16), bits (u16), id (u32).
fn acl_perm(acl: &[u8]) -> Option<u32> {
    const USER_OBJ: u16 = 0x01;
    const GROUP_OBJ: u16 = 0x04;
    const MASK: u16 = 0x10;
    const OTHER: u16 = 0x20;
    let bits = |tag: u16| {
        let mut entries = acl.get(4..)?.chunks_exact(8);
        let entry = entries.find(|e| u16::from_le_bytes([e[0], e[1]]) == tag)?;
        Some(u32::from(u16::from_le_bytes([entry[2], entry[3]])) & 7)
    };
    let group = bits(MASK).or_else(|| bits(GROUP_OBJ))?;
    Some(bits(USER_OBJ)? << 6 | group << 3 | bits(OTHER)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_acl_says_what_new_inodes_may_have() {
        let entry = |tag: u16, bits: u16| {
            let (tag, bits) = (tag.to_le_bytes(), bits.to_le_bytes());
            [&tag[..], &bits, &[0xff; 4]].concat()
        };
        let plain = [vec![2, 0, 0, 0], entry(1, 7), entry(4, 5), entry(0x20, 0)].concat();
        assert_eq!(acl_perm(&plain), Some(0o750));
        let masked = [plain, entry(2, 7), entry(0x10, 1)].concat();
        assert_eq!(acl_perm(&masked), Some(0o710));
        assert_eq!(acl_perm(&[2, 0, 0]), None);
    }
}
