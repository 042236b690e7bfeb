//! Anchor: the inode that stands for a src inode with several names, where these may be in directories
//! of several shards. `.mirrorfs/shards/links/KEY` is one more link to it.
//!
//! KEY is the inode number, a hash of the path below SRC where its file system begins (st_dev means
//! nothing on another machine), type, size and mtime: so an anchor of what src was before is never met.
//! Whoever finds the anchor links to it. Whoever does not makes the inode under its name, and
//! publishes it by linkat: EEXIST says that another shard was first, and then the name becomes a link
//! to that one's. An inode that takes no more names (EMLINK) has a successor, KEY with the next number.
//!
//! An inode that was in dst before with several names is claimed by `of-INODE`, a symlink to the KEY
//! that it stands for: two files of src that were one in dst become two.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::data::Buffers;
use super::dir::Dir;
use super::link::Step;
use super::round::{self, Round};
use super::{Work, stamp};
use crate::error::{Context, Result, Side};
use crate::links::StandIn;
use crate::meta::LATE_FLAGS;
use crate::sys::name::Name;
use crate::sys::stat::{FileKey, Stat, stat_at};
use crate::sys::xattr::Target;
use crate::sys::{fault, fd};

/// Successors of an inode that takes no more names.
const GENERATIONS: u32 = 1 << 16;
/// Anchors that one process remembers to have compared.
const SETTLED_MAX: usize = 1 << 16;

/// An inode of src, as all shards call it.
pub(super) struct Key<'a> {
    round: &'a Round,
    text: String,
}

impl Key<'_> {
    fn anchor(&self, generation: u32) -> Result<Name, Errno> {
        Name::new(format!("{}.{generation}", self.text).as_bytes()).ok_or(Errno::INVAL)
    }
}

impl Work<'_, '_> {
    /// `None`: no other shard has names of this inode, or nobody can tell which it is.
    pub(super) fn key(&self, dir: &Dir, src: &Stat) -> Option<Key<'_>> {
        let shards = self.job.shards.as_ref()?;
        let round = shards.round.as_ref()?;
        let domain = shards.domain(dir.src_stat(), src)?;
        let (kind, mtime) = (src.mode >> 12, src.mtime);
        let text = format!(
            "{:x}-{domain:x}-{kind:x}-{:x}-{:x}.{:x}",
            src.key.ino, src.size, mtime.sec, mtime.nsec
        );
        Some(Key { round, text })
    }

    /// Links a name to the inode that this or another shard has made; `None`: nobody has.
    pub(super) fn join(
        &self,
        buffers: &mut Buffers,
        dir: &Arc<Dir>,
        name: &Name,
        src: &Stat,
    ) -> Result<Option<Step>> {
        let Some(key) = self.key(dir, src) else {
            return Ok(None);
        };
        for generation in 0..GENERATIONS {
            let Some(anchor) = self.anchor(buffers, dir, name, src, &key, generation)? else {
                return Ok(None);
            };
            match self.link(dir, name, src.kind(), src.key, &anchor) {
                Err(e) if e.errno() == Errno::MLINK => {}
                done => return done.map(Some),
            }
        }
        Ok(None)
    }

    /// Says to the other shards that the inode under a name is the one. Another one may have been
    /// first: then the name becomes a link to his. False: it is not what src is, and stays alone.
    pub(super) fn share(&self, dir: &Dir, name: &Name, src: &Stat) -> Result<bool> {
        let Some(key) = self.key(dir, src) else {
            return Ok(false);
        };
        let path = dir.path(name);
        let (dst, links) = (dir.pair.dst.as_fd(), key.round.links.as_fd());
        let now = stat_at(dst, name.as_cstr()).on("statx", Side::Dst, &path)?;
        if !is_copy(&now, src) {
            return Ok(false);
        }
        fault::point("shard-made");
        for generation in 0..GENERATIONS {
            let anchor = key.anchor(generation).on("linkat", Side::Dst, &path)?;
            let to = anchor.as_cstr();
            let ours = StandIn {
                path: path.clone(),
                key: now.key,
            };
            let publish = || rustix::fs::linkat(dst, name.as_cstr(), links, to, AtFlags::empty());
            match self.unlocked(&ours, publish) {
                Ok(()) => {
                    fault::point("shard-shared");
                    return Ok(true);
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e).on("linkat", Side::Dst, &path),
            }
            let first = stat_at(links, to).on("statx", Side::Dst, &path)?;
            if first.key == now.key {
                return Ok(true);
            }
            let temp = self.job.temp_name();
            let join = || rustix::fs::linkat(links, to, dst, temp.as_cstr(), AtFlags::empty());
            match self.unlocked(&stand_in(&anchor, first.key), join) {
                Ok(()) => return self.publish(dir, &temp, name, Some(&now)).map(|()| true),
                Err(Errno::MLINK) => {}
                Err(e) => return Err(e).on("linkat", Side::Dst, &path),
            }
        }
        Ok(false)
    }

    /// An existing dst inode was met under a name of a src inode: false when it stands for another.
    pub(super) fn may_stand(&self, dir: &Dir, now: &Stat, src: &Stat) -> Result<bool> {
        if !self.job.config.keep.hard_links {
            return Ok(true); // A change gives it an inode of its own.
        }
        let shared = self.job.shards.as_ref().is_some_and(|s| s.round.is_some());
        if !shared {
            return Ok(self.job.groups.may_stand_for(now, src.key));
        }
        if now.nlink < 2 {
            return Ok(true);
        }
        // Its other names may be in anybody's directories.
        let Some(key) = self.key(dir, src).filter(|_| src.nlink > 1) else {
            return Ok(false);
        };
        let links = key.round.links.as_fd();
        let claim = format!("of-{:x}", now.key.ino);
        match rustix::fs::symlinkat(&key.text, links, &claim) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => {
                let owner = rustix::fs::readlinkat(links, &claim, Vec::new());
                let owner = owner.on("readlinkat", Side::Dst, dir.pair.path.clone())?;
                Ok(owner.as_bytes() == key.text.as_bytes())
            }
            Err(e) => Err(e).on("symlinkat", Side::Dst, dir.pair.path.clone()),
        }
    }

    /// The anchor, if there is one and it is what src is.
    fn anchor(
        &self,
        buffers: &mut Buffers,
        dir: &Dir,
        name: &Name,
        src: &Stat,
        key: &Key<'_>,
        generation: u32,
    ) -> Result<Option<StandIn>> {
        let path = dir.path(name);
        let anchor = key.anchor(generation).on("statx", Side::Dst, &path)?;
        let links = key.round.links.as_fd();
        let now = match stat_at(links, anchor.as_cstr()) {
            Ok(now) => now,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e).on("statx", Side::Dst, &path),
        };
        if !self.is_settled(&anchor) {
            if !self.settle_anchor(buffers, dir, name, src, &anchor, &now, key)? {
                // Only the one that was looked at: somebody may have made another meanwhile.
                let still = stat_at(links, anchor.as_cstr());
                if still.is_ok_and(|s| s.key == now.key) {
                    let gone = round::unlink_anchor(links, &anchor, now.kind());
                    gone.on("unlinkat", Side::Dst, &path)?;
                }
                return Ok(None);
            }
            self.note_settled(anchor.clone());
        }
        Ok(Some(stand_in(&anchor, now.key)))
    }

    /// Compares an anchor, which an earlier run may have left, with src.
    #[allow(clippy::too_many_arguments)] // One name's whole state; a struct would be used once.
    fn settle_anchor(
        &self,
        buffers: &mut Buffers,
        dir: &Dir,
        name: &Name,
        src: &Stat,
        anchor: &Name,
        now: &Stat,
        key: &Key<'_>,
    ) -> Result<bool> {
        let path = dir.path(name);
        let links = key.round.links.as_fd();
        if !is_copy(now, src) {
            return Ok(false);
        }
        if src.kind() != FileType::RegularFile {
            let at = Target::At(dir.pair.src.as_fd(), name);
            let meta = self.capture(at, *src, &path)?;
            if src.kind() == FileType::Symlink {
                let read = |dir, name: &Name, side| {
                    let target = rustix::fs::readlinkat(dir, name.as_cstr(), Vec::new());
                    target.on("readlinkat", side, &path)
                };
                let ours = read(dir.pair.src.as_fd(), name, Side::Src)?;
                if ours != read(links, anchor, Side::Dst)? {
                    return Ok(false);
                }
            }
            let at = Target::At(links, anchor);
            let (_, changes) = self.special_changes(at, &path, &meta, now)?;
            return Ok(!changes.any());
        }
        let open = |dir, name, side| fd::open_src(dir, name).on("openat", side, &path);
        let file = open(dir.pair.src.as_fd(), name, Side::Src)?;
        let copy = open(links, anchor, Side::Dst)?;
        if (self.job.config.checksum || self.job.record.doubts(now))
            && !self.same_bytes(buffers, &file, &copy, &path, src.size)?.0
        {
            return Ok(false);
        }
        let meta = self.capture(Target::Open(file.as_fd()), *src, &path)?;
        let (was, flags) = self.dst_meta(copy.as_fd(), *now, &path)?;
        let flags = flags && self.job.src_flags;
        let mut changes = stamp::changes(&meta, &was, flags, self.job.uid == 0);
        // +i and +a are set at the end of each shard's run.
        changes.flags &= (meta.flags ^ was.flags) & !LATE_FLAGS != 0;
        if changes.any() {
            return Ok(false); // Other names may be somebody else's: an inode of its own, as in `file`.
        }
        if meta.flags & LATE_FLAGS != 0 {
            self.late(&path, meta.flags & LATE_FLAGS);
        }
        Ok(true)
    }

    fn is_settled(&self, anchor: &Name) -> bool {
        let Some(shards) = &self.job.shards else {
            return false;
        };
        let settled = shards.settled.lock();
        settled
            .unwrap_or_else(PoisonError::into_inner)
            .contains(anchor)
    }

    fn note_settled(&self, anchor: Name) {
        if let Some(shards) = &self.job.shards {
            let mut settled = shards
                .settled
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if settled.len() >= SETTLED_MAX {
                settled.clear();
            }
            settled.insert(anchor);
        }
    }
}

/// A dst inode that may be a whole copy of a src inode. Some file systems keep whole seconds only.
fn is_copy(dst: &Stat, src: &Stat) -> bool {
    let time =
        dst.mtime.sec == src.mtime.sec && (dst.mtime.nsec == src.mtime.nsec || dst.mtime.nsec == 0);
    let size = dst.size == src.size || !src.is_file();
    dst.kind() == src.kind() && dst.rdev == src.rdev && size && time
}

fn stand_in(anchor: &Name, key: FileKey) -> StandIn {
    let path = round::links_path().join(anchor);
    StandIn { path, key }
}
