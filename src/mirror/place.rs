//! Placer: one entry of src becomes one entry of dst, in a directory that is still P.
//!
//! Files and directories are placeholders (mark, metadata, size, no data); symlinks, fifos, sockets
//! and devices are complete at once. Who calls has claimed the name (partial.rs). Upholds I1 (a name
//! appears complete) and D5 (what a crash left in a P directory is made anew, except what is certainly
//! the same).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::carry::{Carrier, Placed};
use super::control::CONTROL;
use super::hydrate::FileRef;
use super::late;
use super::links::LinkKey;
use super::node::ROOT;
use super::partial::Partial;
use super::populate::DirRef;
use super::room::cannot_hold;
use super::source::{SrcDir, SrcInfo};
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::meta::{self, Born, CAPABILITY, Meta};
use crate::sys::dir::Entry;
use crate::sys::handle::Handle;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, fd};

/// Places the entries of one directory.
pub struct Placer<'a> {
    pub(super) mirror: &'a Mirror,
    pub(super) src: &'a SrcDir,
    pub(super) dst: BorrowedFd<'a>,
    /// The names that are here already, or in work.
    pub(super) partial: &'a Partial,
    /// The walker's: what small files come with their data for.
    carrier: Option<&'a Carrier<'a>>,
    priority: Priority,
    /// What a new file is born with here, made with these permissions; asked once.
    born: OnceLock<(u32, Born)>,
}

impl<'a> Placer<'a> {
    /// With a carrier, which is the walker's, small files may come with their data.
    pub fn new(
        mirror: &'a Mirror,
        src: &'a SrcDir,
        dst: BorrowedFd<'a>,
        partial: &'a Partial,
        carrier: Option<&'a Carrier<'a>>,
    ) -> Placer<'a> {
        let clean = mirror.carries && partial.is_clean();
        if let Some(carrier) = carrier
            && !clean
        {
            carrier.must_list();
        }
        Placer {
            mirror,
            src,
            dst,
            partial,
            carrier: carrier.filter(|_| clean),
            priority: match carrier {
                Some(_) => Priority::Background,
                None => Priority::Demand,
            },
            born: OnceLock::new(),
        }
    }

    /// Whether anybody waits for the names.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// Gives dst the entry; false: src has none. What dst cannot hold goes to the ledger and is `Ok`;
    /// errors that may pass, or that concern everything (no space, src away), come back.
    pub fn place(&self, name: &Name) -> Result<bool> {
        let path = self.src.path.join(name);
        if self.is_users(name)? {
            return Ok(true);
        }
        if self.partial.ino == ROOT && name.as_bytes() == CONTROL.as_bytes() {
            return Err(Error::SrcPending {
                path: path.to_path(),
            });
        }
        let stat = match stat::stat_at(self.src.fd.as_fd(), name.as_cstr()) {
            Ok(stat) => stat,
            // If listed, gone since: the caller sees the directory's new mtime and starts over.
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(e).on("statx", Side::Src, &path),
        };
        self.place_as(name, path, stat, None)
    }

    /// As `place`, for an entry of a listing.
    pub fn place_listed(&self, entry: &Entry) -> Result<bool> {
        match self.open_ahead(entry) {
            Some((file, stat)) if !self.partial.is_named() => {
                let path = self.src.path.join(&entry.name);
                self.place_as(&entry.name, path, stat, Some(file))
            }
            _ => self.place(&entry.name),
        }
    }

    /// Gives dst what src has under the name.
    fn place_as(
        &self,
        name: &Name,
        path: RelPath,
        stat: Stat,
        open: Option<OwnedFd>,
    ) -> Result<bool> {
        self.mirror.progress.entries_seen.add(1);
        let placed = match stat.kind() {
            FileType::RegularFile => self.place_file(name, &path, stat, open),
            FileType::Directory => self.place_dir(name, &path, stat),
            _ => self.place_special(name, &path, stat),
        };
        match placed {
            Ok(()) => {
                self.mirror.progress.entries_placed.add(1);
                self.mirror.settle_ledger(&path);
                Ok(true)
            }
            Err(e) if cannot_hold(&e) => {
                self.mirror.fail(&path, &e);
                match self.hides_another(name, &stat) {
                    true => Err(Error::Unusable(format!(
                        "\"{}\": what DST has there is not SRC's and cannot be replaced",
                        crate::error::Printable(path.as_ref().as_os_str())
                    ))),
                    false => Ok(true),
                }
            }
            Err(e) => Err(e),
        }
    }

    /// dst has something of an earlier copy under a name that could not be placed, and users would take it
    /// for src's: nobody is given the name, and the directory stays P. A directory in the place of
    /// a file is no such thing.
    fn hides_another(&self, name: &Name, src: &Stat) -> bool {
        let Ok(there) = stat::stat_at(self.dst, name.as_cstr()) else {
            return false;
        };
        let is_equal = there.size == src.size && there.mtime == src.mtime;
        let same = there.kind() == src.kind();
        let marked = self.mirror.mark.get(Target::At(self.dst, name));
        self.mirror.control.identity.adopt
            && !there.is_dir()
            && !(same && is_equal)
            && matches!(marked, Ok(None))
    }

    /// Somebody else has placed a name: who has a list of what is to be done lacks it.
    pub fn skip(&self) {
        self.carrier.inspect(|c| c.must_list());
    }

    /// What an earlier start, a copy made earlier or a failure left under the name.
    fn found(&self, name: &Name, path: &RelPath) -> Result<Option<FileType>> {
        if self.partial.is_clean() {
            return Ok(None);
        }
        match stat::stat_at(self.dst, name.as_cstr()) {
            Ok(stat) => Ok(Some(stat.kind())),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e).on("statx", Side::Dst, path),
        }
    }

    /// True for the walker's, where files may come with their data.
    pub(super) fn carries(&self) -> bool {
        self.carrier.is_some()
    }

    /// What a file that was just made in this directory with these permissions has of its metadata: like
    /// any other of them, because nobody else changes the directory, and its default ACL is away.
    pub(super) fn born(&self, asked: u32, file: BorrowedFd<'_>) -> Result<Born, Errno> {
        if let Some((_, born)) = self.born.get().filter(|(perm, _)| *perm == asked) {
            return Ok(*born);
        }
        let stat = stat::stat_fd(file)?;
        let born = Born {
            uid: stat.uid,
            gid: stat.gid,
            perm: Some(stat.perm()),
            flags: match self.born.get() {
                Some((_, known)) => known.flags,
                None => copy::inode_flags(file).ok().flatten(),
            },
        };
        self.born.get_or_init(|| (asked, born));
        Ok(born)
    }

    /// The walker need not look for this marked entry: here it is. One without a place in the list
    /// (several names) makes it look.
    fn tell(&self, placed: impl FnOnce() -> Result<Option<Placed>>) -> Result<()> {
        if let Some(carrier) = self.carrier {
            match placed()? {
                Some(placed) => carrier.push(placed),
                None => carrier.must_list(),
            }
        }
        Ok(())
    }

    fn place_file(
        &self,
        name: &Name,
        path: &RelPath,
        stat: Stat,
        open: Option<OwnedFd>,
    ) -> Result<()> {
        if let Some(carrier) = self.carrier
            && self.wants_data(carrier, &stat)
            && self.carry(name, path, &stat, open)?
        {
            return Ok(());
        }
        let mut meta = self.capture(name, path, stat)?;
        let key = (stat.nlink > 1).then(|| LinkKey::new(&stat, &self.src.mount));
        if let Some(key) = key
            && self.link_to_anchor(key, name, path)?
        {
            return self.tell(|| Ok(None));
        }
        if self.found(name, path)?.is_some() && self.keep_file(key, name, path, &meta)? {
            return Ok(());
        }
        // Read again after the open of capture: the size that the placeholder shows is src's.
        let file = fd::tmpfile(self.dst, 0o600).on("open O_TMPFILE", Side::Dst, path)?;
        let capability = meta.xattr(CAPABILITY).is_some();
        if stat.size > 0 {
            copy::truncate(file.as_fd(), stat.size).on("ftruncate", Side::Dst, path)?;
            // It would be lost with the first byte of data; the mark says that it is to come.
            meta.xattrs.retain(|(n, _)| n.as_c_str() != CAPABILITY);
        }
        self.drop_acl(&meta, file.as_fd(), path)?;
        let perm = self.mirror.stamp(&meta, file.as_fd(), path)?;
        let dst_ino = stat::stat_fd(file.as_fd())
            .on("statx", Side::Dst, path)?
            .key
            .ino;
        if stat.size > 0 {
            // A multi-link inode may be found by any of its names: its origin is written down.
            let origin = key.is_some().then(|| path.clone());
            let mark = Mark {
                origin,
                capability,
                perm,
                ..Mark::pending()
            };
            self.set_mark(file.as_fd(), mark, path)?;
            self.mirror.source.learn(dst_ino, SrcInfo::from(&stat));
        }
        self.note_late_flags(&meta, file.as_fd())?;
        if let Some(key) = key {
            match self.mirror.anchors.publish(
                &self.mirror.control.links,
                key,
                stat.nlink,
                file.as_fd(),
            ) {
                Ok(()) => {}
                // Another populate was faster: its inode stands for this one.
                Err(Errno::EXIST) => {
                    self.mirror.source.unlearn(dst_ino);
                    self.tell(|| Ok(None))?;
                    return self.link_to_others(key, stat.nlink, name, path);
                }
                Err(e) => return Err(e).on("linkat", Side::Dst, path),
            }
        }
        if stat.size == 0
            && let Some(perm) = perm
        {
            meta::chmod_fd(file.as_fd(), perm).on("chmod", Side::Dst, path)?;
        }
        self.clear(name, path)?;
        fd::link_fd(file.as_fd(), self.dst, name.as_cstr()).on("linkat", Side::Dst, path)?;
        let progress = &self.mirror.progress;
        progress.files_seen.add(1);
        progress.bytes_seen.add(stat.size);
        if stat.size == 0 {
            progress.files_pulled.add(1);
            return Ok(());
        }
        progress.bytes_left.add(stat.size);
        self.tell(|| {
            let handle = Handle::of(file.as_fd(), c"");
            let handle = handle.on("name_to_handle_at", Side::Dst, path)?;
            Ok(Some(Placed::File(FileRef {
                ino: dst_ino,
                anchor: Anchor::Handle(handle),
                origin: Some(self.origin_of(name)),
            })))
        })
    }

    /// The mark with its explicit origin if that fits; without it a rename pulls the file first.
    fn set_mark(&self, fd: BorrowedFd<'_>, mark: Mark, path: &RelPath) -> Result<()> {
        let set = || self.mirror.mark.set(Target::Open(fd), &mark);
        match set() {
            Err(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE) if mark.origin.is_some() => {
                let short = Mark {
                    origin: None,
                    ..mark
                };
                self.set_mark(fd, short, path)
            }
            Err(Errno::NOSPC) => {
                let mut done = Ok(());
                self.mirror.insist(path, || {
                    done = set();
                    done.err().filter(|e| *e == Errno::NOSPC)
                })?;
                match done {
                    // There is room in dst, and none in this inode.
                    Err(Errno::NOSPC) => Err(Errno::TOOBIG),
                    other => other,
                }
                .on("setxattr", Side::Dst, path)
            }
            other => other.on("setxattr", Side::Dst, path),
        }
    }

    /// True when dst's entry can stay: a placeholder of ours, stamped again, or (adopting) a file
    /// equal in size and mtime, which counts as hydrated.
    fn keep_file(
        &self,
        key: Option<LinkKey>,
        name: &Name,
        path: &RelPath,
        meta: &Meta,
    ) -> Result<bool> {
        let there = stat::stat_at(self.dst, name.as_cstr()).on("statx", Side::Dst, path)?;
        if !there.is_file() {
            return match there.is_dir() && !self.mirror.control.identity.delete {
                true => Err(Error::WrongType {
                    path: path.to_path(),
                }),
                false => Ok(false),
            };
        }
        let equal = there.size == meta.stat.size && there.mtime == meta.stat.mtime;
        let marked = self.mirror.mark.get(Target::At(self.dst, name));
        let marked = marked.on("getxattr", Side::Dst, path)?.is_some();
        let adopts = self.mirror.control.identity.adopt || fault::breaks("D5");
        if !adopts
            || !equal
            || marked
            // Another name of it may be somebody else's, and src's owner may have planted this one.
            || there.nlink > 1
        {
            return Ok(false);
        }
        if self.mirror.control.identity.checksum && !self.has_same_bytes(name, &there, &meta.stat) {
            return Ok(false);
        }
        let file = match fd::open_at(self.dst, name, OFlags::RDONLY) {
            // Ours to replace, not to read.
            Err(Errno::ACCESS) => return Ok(false),
            other => other.on("open", Side::Dst, path)?,
        };
        late::free(&there, file.as_fd()).on("FS_IOC_SETFLAGS", Side::Dst, path)?;
        self.drop_acl(meta, file.as_fd(), path)?;
        self.partial.note_kept();
        self.mirror.stamp_whole(meta, file.as_fd(), path)?;
        self.note_late_flags(meta, file.as_fd())?;
        self.mirror.progress.files_seen.add(1);
        self.mirror.progress.files_pulled.add(1);
        self.mirror.progress.bytes_seen.add(meta.stat.size);
        self.mirror.progress.bytes_pulled.add(meta.stat.size);
        if let Some(key) = key {
            let links = &self.mirror.control.links;
            let nlink = meta.stat.nlink;
            match self
                .mirror
                .anchors
                .publish_name(links, key, nlink, self.dst, name)
            {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e).on("linkat", Side::Dst, path),
            }
        }
        Ok(true)
    }

    fn place_dir(&self, name: &Name, path: &RelPath, stat: Stat) -> Result<()> {
        let meta = self.capture(name, path, stat)?;
        match self.found(name, path)? {
            Some(FileType::Directory) => {}
            Some(_) => {
                self.clear(name, path)?;
                self.make_dir(name, path)?;
            }
            None => self.make_dir(name, path)?,
        }
        let opened = meta::open_dst_dir(self.dst, name).on("open", Side::Dst, path)?;
        let target = Target::Open(opened.as_fd());
        let mark = self
            .mirror
            .mark
            .get(target)
            .on("getxattr", Side::Dst, path)?;
        if mark.is_some_and(|m| m.populated) {
            return self.tell(|| Ok(None));
        }
        if !self.partial.is_clean() {
            late::free_fd(opened.as_fd()).on("FS_IOC_SETFLAGS", Side::Dst, path)?;
        }
        let perm = self.mirror.stamp(&meta, opened.as_fd(), path)?;
        let mark = Mark {
            perm,
            ..Mark::pending()
        };
        self.mirror
            .mark
            .set(target, &mark)
            .on("setxattr", Side::Dst, path)?;
        self.tell(|| {
            let ino = stat::stat_fd(opened.as_fd()).on("statx", Side::Dst, path)?;
            let handle = Handle::of(opened.as_fd(), c"");
            let handle = handle.on("name_to_handle_at", Side::Dst, path)?;
            Ok(Some(Placed::Dir(DirRef {
                ino: ino.key.ino,
                anchor: Anchor::Handle(handle),
                origin: Some(Arc::new(path.clone())),
            })))
        })
    }

    fn make_dir(&self, name: &Name, path: &RelPath) -> Result<()> {
        rustix::fs::mkdirat(self.dst, name.as_cstr(), Mode::from_raw_mode(0o700)).on(
            "mkdir",
            Side::Dst,
            path,
        )
    }

    fn place_special(&self, name: &Name, path: &RelPath, stat: Stat) -> Result<()> {
        let meta = self.capture(name, path, stat)?;
        let key = (stat.nlink > 1).then(|| LinkKey::new(&stat, &self.src.mount));
        if let Some(key) = key
            && self.link_to_anchor(key, name, path)?
        {
            return Ok(());
        }
        self.clear(name, path)?;
        match stat.kind() {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(
                    self.src.fd.as_fd(),
                    name.as_cstr(),
                    Vec::new(),
                )
                .on("readlink", Side::Src, path)?;
                rustix::fs::symlinkat(target, self.dst, name.as_cstr()).on(
                    "symlink",
                    Side::Dst,
                    path,
                )?;
            }
            kind => rustix::fs::mknodat(
                self.dst,
                name.as_cstr(),
                kind,
                Mode::from_raw_mode(stat.perm()),
                stat.rdev_encoded(),
            )
            .on("mknod", Side::Dst, path)?,
        }
        self.mirror
            .applied(path, || meta.apply_at(self.dst, name))?;
        if let Some(key) = key {
            let links = &self.mirror.control.links;
            match self
                .mirror
                .anchors
                .publish_name(links, key, stat.nlink, self.dst, name)
            {
                Ok(()) => {}
                Err(Errno::EXIST) => return self.link_to_others(key, stat.nlink, name, path),
                Err(e) => return Err(e).on("linkat", Side::Dst, path),
            }
        }
        Ok(())
    }

    /// Gives the inode that already stands for `key` one more name. False when there is none.
    fn link_to_anchor(&self, key: LinkKey, name: &Name, path: &RelPath) -> Result<bool> {
        let Some((anchor, dst_ino)) = self.mirror.anchors.find(key) else {
            return Ok(false);
        };
        if let Ok(there) = stat::stat_at(self.dst, name.as_cstr()) {
            if there.key.ino == dst_ino {
                return Ok(true);
            }
            self.clear_now(name, there.is_dir(), path)?;
        }
        let links = self.mirror.control.links.as_fd();
        let flags = AtFlags::empty();
        match rustix::fs::linkat(links, anchor.as_cstr(), self.dst, name.as_cstr(), flags) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => {
                // The table outlived the file: somebody emptied the control directory.
                let links = &self.mirror.control.links;
                let _ = self.mirror.anchors.withdraw(links, key); // Its file is gone already.
                Ok(false)
            }
            Err(e) => Err(e).on("link", Side::Dst, path),
        }
    }

    /// As `link_to_anchor`, with an anchor that another thread has just published.
    fn link_to_others(&self, key: LinkKey, nlink: u32, name: &Name, path: &RelPath) -> Result<()> {
        let links = &self.mirror.control.links;
        let learned = self.mirror.anchors.learn(links, key, nlink);
        learned.on("statx", Side::Dst, ".mirrorfs/links")?;
        match self.link_to_anchor(key, name, path)? {
            true => Ok(()),
            false => Err(Errno::STALE).on("link", Side::Dst, path),
        }
    }

    fn capture(&self, name: &Name, path: &RelPath, stat: Stat) -> Result<Meta> {
        // Not the statx before it: that may have come with the listing.
        let begun = Instant::now();
        let meta = Meta::capture(self.src.capture, self.src.fd.as_fd(), name, stat);
        self.mirror.crowd.pace.note(begun.elapsed());
        let meta = meta.on("listxattr", Side::Src, path)?;
        self.mirror.unread(path, &meta);
        Ok(meta)
    }

    fn drop_acl(&self, meta: &Meta, fd: BorrowedFd<'_>, path: &RelPath) -> Result<()> {
        match self.mirror.control.identity.adopt {
            true => {
                meta::drop_inherited_acl(Target::Fd(fd), meta).on("removexattr", Side::Dst, path)
            }
            false => Ok(()),
        }
    }

    /// Removes what a crash (or an earlier copy) left under the name.
    fn clear(&self, name: &Name, path: &RelPath) -> Result<()> {
        match self.found(name, path)? {
            None => Ok(()),
            Some(kind) => self.clear_now(name, kind == FileType::Directory, path),
        }
    }

    fn clear_now(&self, name: &Name, is_dir: bool, path: &RelPath) -> Result<()> {
        let mark = self.mirror.mark;
        let ours = || !matches!(mark.get(Target::At(self.dst, name)), Ok(None));
        if is_dir && self.mirror.control.identity.delete && !ours() {
            super::extras::remove(self.dst, name, path)?;
            self.mirror.progress.extras_removed.add(1);
            return Ok(());
        }
        if is_dir {
            return Err(Error::WrongType {
                path: path.to_path(),
            });
        }
        match late::unlink(self.dst, name) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e).on("unlink", Side::Dst, path),
        }
    }

    /// The explicit origin in the directory's own mark: it must survive the change from P to L.
    pub fn recorded_origin(&self, opened: &OwnedFd) -> Result<Option<RelPath>> {
        let mark = self.mirror.mark.get(Target::Fd(opened.as_fd()));
        Ok(mark
            .on("getxattr", Side::Dst, self.src.path.as_ref())?
            .and_then(|m| m.origin))
    }
}
