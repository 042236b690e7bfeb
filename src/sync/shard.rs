//! Shards: several processes, on one machine or many, copy one tree together, without a message.
//!
//! A directory belongs to the shard that the hash of its path says (`config::Shard`). Every process
//! walks all of src and works in its own directories only, so `--delete` stays with the owner.
//!
//!   pass()       a directory of another shard: only its subdirectories are of interest
//!   open_owned() whoever needs a directory in dst makes it and its missing parents, mode 0700
//!   (dir)        the owner makes all subdirectories, files, links, and deletes; then owner, mode and
//!                times: from then on every name is there, so nobody changes them any more
//!
//! Names of one inode may be in directories of several shards: `anchor`.
//!
//! When all that is over, and what stays in dst meanwhile: `round`.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::data::Buffers;
use super::dir::Dir;
use super::round::Round;
use super::select::Selection;
use super::{Item, Work, stamp};
use crate::config::Shard;
use crate::error::{Context, Error, Result, Side};
use crate::mark::CONTROL_DIR;
use crate::meta::LATE_FLAGS;
use crate::sys::name::{Name, RelPath};
use crate::sys::pair::Place;
use crate::sys::stat::{Stat, stat_at, stat_fd};
use crate::sys::{dir as sys_dir, fd, host};

/// A mount and the device that it shows: what only this machine calls a file system or subvolume.
type Mounted = (u64, (u32, u32));

/// What one shard knows of the others.
pub(super) struct Shards {
    shard: Shard,
    /// `None` in a dry run.
    pub(super) round: Option<Round>,
    /// Where each file system of src begins: a hash of the path, which all machines agree on.
    domains: Mutex<HashMap<Mounted, u64>>,
    /// Anchors that were compared with src already.
    pub(super) settled: Mutex<std::collections::HashSet<Name>>,
}

impl Shards {
    pub(super) fn begin(root: BorrowedFd<'_>, shard: Shard, dry_run: bool) -> Result<Shards> {
        let round = match dry_run {
            true => None,
            false => Some(Round::begin(root, shard)?),
        };
        Ok(Shards {
            shard,
            round,
            domains: Mutex::default(),
            settled: Mutex::default(),
        })
    }

    pub(super) fn owns(&self, path: &RelPath) -> bool {
        self.shard.owns(path.as_bytes())
    }

    /// Notes where a file system of src begins: a directory is met before what is below it.
    pub(super) fn entered(&self, src: &Stat, path: &RelPath) {
        let mut domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = || xxhash_rust::xxh3::xxh3_64(path.as_bytes());
        domains
            .entry((src.mnt_id, src.key.dev))
            .or_insert_with(hash);
    }

    /// The file system that an entry of a directory is on. `None`: not that of its directory, so that
    /// its inode number means nothing on another machine (layers of an overlay).
    pub(super) fn domain(&self, dir: &Stat, entry: &Stat) -> Option<u64> {
        let domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (dir.mnt_id, dir.key.dev);
        domains
            .get(&key)
            .copied()
            .filter(|_| entry.key.dev == dir.key.dev)
    }
}

impl Work<'_, '_> {
    /// True for a directory that another shard copies.
    pub(super) fn is_others(&self, path: &RelPath) -> bool {
        self.job.shards.as_ref().is_some_and(|s| !s.owns(path))
    }

    /// A directory of another shard: on to its subdirectories. What cannot be listed here hides what is
    /// ours below it, so it is an error here too.
    pub(super) fn pass(&self, buffers: &mut Buffers, place: &Place) {
        let begin = Instant::now();
        let path = &place.path;
        let opened = self
            .job
            .roots
            .open_src(place)
            .on("openat2", Side::Src, path);
        let opened = opened.and_then(|src| {
            let stat = stat_fd(src.as_fd()).on("statx", Side::Src, path)?;
            let root = self.job.roots.dst.as_fd();
            Ok((src, stat, host::dup(root).on("dup", Side::Dst, path)?))
        });
        let (src, stat, dst) = match opened {
            Ok(opened) => opened,
            Err(e) => return self.fail(path, &e),
        };
        self.job.totals.src_took(begin.elapsed());
        self.entered(&stat, path);
        let pair = self.job.roots.half(path.clone(), src, dst);
        let mut dirs = Vec::new();
        let listed = sys_dir::read_dir(pair.src.as_fd(), 0, &mut buffers.names, |e| {
            let control = path.is_root() && e.name.as_bytes() == CONTROL_DIR.as_bytes();
            if !control && matches!(e.kind, FileType::Directory | FileType::Unknown) {
                dirs.push(e);
            }
            !self.crew.stopping()
        });
        let mut items = Vec::with_capacity(dirs.len());
        for entry in dirs {
            let mut shallow = false;
            if entry.kind == FileType::Unknown || self.job.config.one_file_system {
                match stat_at(pair.src.as_fd(), entry.name.as_cstr()) {
                    Ok(stat) if !stat.is_dir() => continue,
                    Ok(stat) => {
                        let other = stat.key.dev != self.job.root_dev;
                        shallow = self.job.config.one_file_system && other;
                    }
                    Err(e) => {
                        self.src_failed("statx", &path.join(&entry.name), e);
                        continue;
                    }
                }
            }
            items.push(Item::Dir {
                place: pair.place(&entry.name),
                fresh: false,
                shallow,
                selection: Selection::default(),
            });
        }
        self.crew.push(items);
        if let Err(e) = listed {
            self.src_failed("getdents64", path, e);
        }
    }

    /// Notes a directory of src for the keys of hard links.
    pub(super) fn entered(&self, src: &Stat, path: &RelPath) {
        if let Some(shards) = &self.job.shards {
            shards.entered(src, path);
        }
    }

    /// In a dry run: a directory that is ours and not in dst, whoever would make it.
    pub(super) fn would_be_made(&self, place: &Place) -> bool {
        self.job.config.dry_run
            && self.job.shards.is_some()
            && matches!(
                self.job.roots.open_dst(place),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
            )
    }

    /// Opens a directory of dst that is ours; it and those above it are made where they are missing.
    pub(super) fn open_owned(&self, place: &Place) -> Result<OwnedFd> {
        let opened = self.job.roots.open_dst(place);
        match opened {
            // LOOP: a symlink is in the way.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !self.job.config.dry_run => {}
            other => return other.on("openat2", Side::Dst, &place.path),
        }
        let root = self.job.roots.dst.as_fd();
        let mut at = host::dup(root).on("dup", Side::Dst, &place.path)?;
        let mut path = RelPath::root();
        for part in place.path.as_bytes().split(|b| *b == b'/') {
            let Some(name) = Name::new(part) else {
                continue;
            };
            path = path.join(&name);
            self.make_one(at.as_fd(), &name, &path)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            at = fd::open_at(at.as_fd(), &name, flags).on("openat", Side::Dst, &path)?;
        }
        Ok(at)
    }

    /// Makes one directory, in the place of whatever no directory is there; true: it was missing.
    /// Others may do the same at this moment.
    fn make_one(&self, at: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<bool> {
        for _ in 0..10 {
            let mut made = rustix::fs::mkdirat(at, name.as_cstr(), Mode::RWXU);
            if made == Err(Errno::PERM) {
                // +i or +a of an earlier run; the owner, who is still to come, sets them again.
                stamp::clear_flags(at, LATE_FLAGS).on("FS_IOC_SETFLAGS", Side::Dst, path)?;
                made = rustix::fs::mkdirat(at, name.as_cstr(), Mode::RWXU);
            }
            match made {
                Ok(()) => return Ok(true),
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e).on("mkdirat", Side::Dst, path),
            }
            match stat_at(at, name.as_cstr()) {
                Ok(stat) if stat.is_dir() => return Ok(false),
                Ok(_) if self.job.config.ignore_existing => {
                    return Err(Error::WrongType {
                        path: path.to_path(),
                    });
                }
                Ok(stat) => match self.unlink(at, name, path, &stat, true) {
                    Err(e) if e.errno() == Errno::ISDIR => {}
                    other => other?,
                },
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e).on("statx", Side::Dst, path),
            }
        }
        Err(Errno::EXIST).on("mkdirat", Side::Dst, path)
    }

    /// As `make_one`, for a subdirectory of a directory that is ours.
    pub(super) fn make_shared(&self, dir: &Dir, name: &Name) -> Result<bool> {
        let made = self.make_one(dir.pair.dst.as_fd(), name, &dir.path(name))?;
        self.job.totals.created.add(u64::from(made));
        Ok(made)
    }
}
