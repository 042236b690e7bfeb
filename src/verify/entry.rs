//! Entry: one name, compared on both sides: everything but the bytes.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::content::{self, Buffers, File, Slice};
use super::groups::Claim;
use super::{Item, Kind, Work};
use crate::error::Side;
use crate::mark::MarkName;
use crate::meta::COPIED_FLAGS;
use crate::sys::copy;
use crate::sys::name::{Name, RelPath};
use crate::sys::pair::Pair;
use crate::sys::stat::{Stat, Time, stat_at, stat_fd};
use crate::sys::xattr::{self, Target};

impl Work<'_, '_> {
    /// Compares one name of a directory.
    pub(super) fn compare(&self, buffers: &mut Buffers, pair: &Arc<Pair>, name: &Name) {
        let path = pair.path.join(name);
        let src = match stat_at(pair.src.as_fd(), name.as_cstr()) {
            Ok(stat) => stat,
            Err(e) => return self.unreadable(&path, Side::Src, "statx", e),
        };
        let dst = match stat_at(pair.dst.as_fd(), name.as_cstr()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return self.tell(&path, Kind::OnlyInSrc, ""),
            Err(e) => return self.unreadable(&path, Side::Dst, "statx", e),
        };
        if src.kind() != dst.kind() {
            let detail = format!("{} != {}", type_name(src.kind()), type_name(dst.kind()));
            return self.tell(&path, Kind::Type, detail);
        }
        match src.kind() {
            FileType::Directory => {
                let other = src.key.dev != self.shared.root_dev;
                match self.shared.options.one_file_system && other {
                    true => {
                        self.stats(&path, &src, &dst);
                        self.done(&path);
                    }
                    false => self.crew.push([Item::Dir(pair.place(name))]),
                }
            }
            FileType::RegularFile => {
                self.file(buffers, pair, name, path, (src, dst));
                self.shared.groups.leave((&src).into(), (&dst).into());
            }
            _ => {
                self.special(pair, name, &path, (src, dst));
                self.shared.groups.leave((&src).into(), (&dst).into());
                self.done(&path);
            }
        }
    }

    /// A directory's own metadata, both sides open.
    pub(super) fn compare_dir(&self, pair: &Pair) {
        let stats = (stat_fd(pair.src.as_fd()), stat_fd(pair.dst.as_fd()));
        match stats {
            (Ok(src), Ok(dst)) => self.stats(&pair.path, &src, &dst),
            (Err(e), _) => self.unreadable(&pair.path, Side::Src, "statx", e),
            (_, Err(e)) => self.unreadable(&pair.path, Side::Dst, "statx", e),
        }
        self.opened_meta(&pair.path, &pair.src, &pair.dst);
    }

    fn file(
        &self,
        buffers: &mut Buffers,
        pair: &Pair,
        name: &Name,
        path: RelPath,
        (src, dst): (Stat, Stat),
    ) {
        self.stats(&path, &src, &dst);
        self.links(&path, &src, &dst);
        let open = |dir: &OwnedFd, side| {
            content::open(dir.as_fd(), name).map_err(|e| self.unreadable(&path, side, "openat2", e))
        };
        let (Ok(src_fd), Ok(dst_fd)) = (open(&pair.src, Side::Src), open(&pair.dst, Side::Dst))
        else {
            return self.done(&path);
        };
        self.opened_meta(&path, &src_fd, &dst_fd);
        if src.size != dst.size {
            self.tell(&path, Kind::Size, format!("{} != {}", src.size, dst.size));
            return self.done(&path);
        }
        let sample = self.shared.options.sample;
        let in_sample = sample.is_none_or(|s| s.owns(path.as_bytes()));
        if !self.shared.options.content || !in_sample {
            return self.done(&path);
        }
        self.shared.files.add(1);
        let claim = self
            .shared
            .groups
            .claim((&src).into(), (&dst).into(), &path);
        let group = match claim {
            Claim::Alone => None,
            Claim::First => Some(src.key),
            Claim::Parked => return,
            Claim::Known(finding) => return self.tell_found(&path, finding.as_ref()),
        };
        let file = File {
            path,
            src: src_fd,
            dst: dst_fd,
            sparse: [&src, &dst].iter().any(|s| s.blocks * 512 < s.size),
            group,
            found: OnceLock::new(),
        };
        self.slice(buffers, Slice::whole(file, src.size));
    }

    /// Symlinks, fifos, sockets, devices.
    fn special(&self, pair: &Pair, name: &Name, path: &RelPath, (src, dst): (Stat, Stat)) {
        self.stats(path, &src, &dst);
        self.links(path, &src, &dst);
        if matches!(
            src.kind(),
            FileType::CharacterDevice | FileType::BlockDevice
        ) && src.rdev != dst.rdev
        {
            let (a, b) = (src.rdev, dst.rdev);
            let detail = format!("{}:{} != {}:{}", a.0, a.1, b.0, b.1);
            self.tell(path, Kind::Device, detail);
        }
        if src.kind() == FileType::Symlink {
            let read = |dir: &OwnedFd, side| {
                rustix::fs::readlinkat(dir, name.as_cstr(), Vec::new())
                    .map_err(|e| self.unreadable(path, side, "readlinkat", e))
            };
            if let (Ok(a), Ok(b)) = (read(&pair.src, Side::Src), read(&pair.dst, Side::Dst))
                && a != b
            {
                self.tell(path, Kind::Target, format!("{a:?} != {b:?}"));
            }
        }
        self.xattrs(
            path,
            Target::At(pair.src.as_fd(), name),
            Target::At(pair.dst.as_fd(), name),
        );
    }

    /// What statx tells and both sides must agree on.
    fn stats(&self, path: &RelPath, src: &Stat, dst: &Stat) {
        // A symlink's mode means nothing and cannot be set.
        if src.perm() != dst.perm() && src.kind() != FileType::Symlink {
            let detail = format!("{:04o} != {:04o}", src.perm(), dst.perm());
            self.tell(path, Kind::Mode, detail);
        }
        if src.uid != dst.uid {
            self.tell(path, Kind::Owner, format!("{} != {}", src.uid, dst.uid));
        }
        if src.gid != dst.gid {
            self.tell(path, Kind::Group, format!("{} != {}", src.gid, dst.gid));
        }
        if src.mtime != dst.mtime {
            let show = |t: Time| format!("{}+{:09}ns", t.sec, t.nsec);
            let detail = format!("{} != {}", show(src.mtime), show(dst.mtime));
            self.tell(path, Kind::Mtime, detail);
        }
    }

    fn links(&self, path: &RelPath, src: &Stat, dst: &Stat) {
        if !self.shared.groups.meet(src.into(), dst.into()) {
            let detail = format!("other names are one inode ({} != {})", src.nlink, dst.nlink);
            self.tell(path, Kind::Links, detail);
        }
    }

    /// Xattrs and inode flags of two open files or directories.
    fn opened_meta(&self, path: &RelPath, src: &OwnedFd, dst: &OwnedFd) {
        self.xattrs(path, Target::Open(src.as_fd()), Target::Open(dst.as_fd()));
        let flags = (
            copy::inode_flags(src.as_fd()),
            copy::inode_flags(dst.as_fd()),
        );
        match flags {
            (Ok(Some(a)), Ok(Some(b))) if (a ^ b) & COPIED_FLAGS != 0 => {
                let (a, b) = (a & COPIED_FLAGS, b & COPIED_FLAGS);
                self.tell(path, Kind::Flags, format!("{a:#x} != {b:#x}"));
            }
            (Ok(_), Ok(_)) => {}
            (Err(e), _) => self.unreadable(path, Side::Src, "FS_IOC_GETFLAGS", e),
            (_, Err(e)) => self.unreadable(path, Side::Dst, "FS_IOC_GETFLAGS", e),
        }
    }

    fn xattrs(&self, path: &RelPath, src: Target<'_>, dst: Target<'_>) {
        let read = |target, side| {
            all(target).map_err(|e| self.unreadable(path, side, "listxattr, getxattr", e))
        };
        let (Ok(a), Ok(b)) = (read(src, Side::Src), read(dst, Side::Dst)) else {
            return;
        };
        for (name, value) in &a {
            match b.iter().find(|(n, _)| n == name) {
                Some((_, other)) if other == value => {}
                Some(_) => self.tell(path, Kind::Xattr, format!("{name:?} has other values")),
                None => self.tell(path, Kind::Xattr, format!("{name:?} only in src")),
            }
        }
        for (name, _) in &b {
            if !a.iter().any(|(n, _)| n == name) {
                self.tell(path, Kind::Xattr, format!("{name:?} only in dst"));
            }
        }
    }
}

/// Every xattr but the live mark.
pub(super) fn all(target: Target<'_>) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    let mut out = Vec::new();
    for name in xattr::list(target)? {
        if name.as_c_str() != MarkName::Trusted.as_cstr()
            && name.as_c_str() != MarkName::User.as_cstr()
            // xfs shows each POSIX ACL a second time, under this name.
            && !name.to_bytes().starts_with(b"trusted.SGI_ACL_")
            && let Some(value) = xattr::get(target, &name)?
        {
            out.push((name, value));
        }
    }
    Ok(out)
}

pub(super) fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "unknown",
    }
}
