//! Carry: small files bring their data along while the walker populates their directory.
//!
//! A file of up to `CARRY_MAX` bytes costs less to copy than to ask for: no second look at the
//! directory, no job, no ring. It is made under its own name, which nobody sees before the directory
//! is populated, and marked before it looks like src's file. Then it is at once where a hydration is
//! after `land`: the commit thread makes it durable and takes the mark away (D1).
//!
//!   wants_data()   small, one name, no holes, in a directory with nothing from an earlier start
//!   carry()        read, captured, looked at again; made, written, marked, stamped, landed
//!
//! Whatever is unusual (src changed, an error on either side, dst full) goes the usual way, which
//! knows what to do. Somebody who waits for the directory ends it too: names come first. A slow src
//! is left to the engine, which keeps many files in flight. Upholds I1, I3, I6, I9.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::hydrate::{FileRef, Hydrations};
use super::node::{Ino, Origin};
use super::place::Placer;
use super::populate::{DirRef, Waiter};
use super::source::SrcDir;
use crate::error::{Context, Result, Side};
use crate::mark::Mark;
use crate::meta::{Born, CAPABILITY, Meta};
use crate::sys::handle::Handle;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, fd};

/// Files up to this size, bytes, are carried.
const CARRY_MAX: u64 = 64 << 10;
/// From this size on extents are shared where that works: it saves more than it costs.
const CLONE_MIN: u64 = 16 << 10;
/// Entries that are handed to the walker in memory; a directory with more is listed.
const PLACED_MAX: usize = 16 << 10;
/// A src that takes longer than this for a file, on average, is left to the engine.
const FAST_NS: u64 = 200_000;
/// Every so many files a slow src gets another chance.
const PROBE_EVERY: u64 = 256;

/// What a populate by the walker takes along, and what is left to do afterwards.
pub struct Carrier<'a> {
    /// Makes what is told when a carried file's mark is gone.
    settled: &'a dyn Fn() -> Waiter,
    /// The directory in work.
    ino: Cell<Ino>,
    placed: RefCell<Vec<Placed>>,
    /// Something was placed that the list does not tell: the directory must be listed.
    incomplete: Cell<bool>,
    buffer: RefCell<Vec<u8>>,
}

/// An entry that carries a mark when its directory is populated.
#[derive(Debug)]
pub enum Placed {
    /// A directory: still P.
    Dir(DirRef),
    /// A file without its data.
    File(FileRef),
}

impl<'a> Carrier<'a> {
    /// `settled` makes a waiter for each file that is carried.
    pub fn new(settled: &'a dyn Fn() -> Waiter) -> Carrier<'a> {
        Carrier {
            settled,
            ino: Cell::new(0),
            placed: RefCell::default(),
            incomplete: Cell::new(false),
            buffer: RefCell::default(),
        }
    }

    /// Begins a directory.
    pub(super) fn enter(&self, ino: Ino) {
        self.ino.set(ino);
    }

    /// The populate did not tell all: somebody else ran it, or it met what was there before.
    pub(super) fn must_list(&self) {
        self.incomplete.set(true);
    }

    pub(super) fn push(&self, placed: Placed) {
        let mut all = self.placed.borrow_mut();
        if all.len() < PLACED_MAX {
            all.push(placed);
        } else {
            self.incomplete.set(true);
        }
    }

    /// The entries that are still marked and not carried; `None`: the directory must be listed.
    pub fn placed(self) -> Option<Vec<Placed>> {
        (!self.incomplete.get()).then(|| self.placed.into_inner())
    }
}

/// How long src takes for a small file.
#[derive(Debug, Default)]
pub struct Pace {
    mean_ns: AtomicU64,
    asked: AtomicU64,
}

impl Pace {
    fn is_fast(&self) -> bool {
        self.mean_ns.load(Relaxed) < FAST_NS
            || self.asked.fetch_add(1, Relaxed).is_multiple_of(PROBE_EVERY)
    }

    fn note(&self, took: Duration) {
        // Clipped: one file that met a busy CPU does not make src slow.
        let ns = u64::try_from(took.as_nanos()).map_or(4 * FAST_NS, |n| n.min(4 * FAST_NS));
        let mean = self.mean_ns.load(Relaxed);
        self.mean_ns.store((mean * 7 + ns) / 8, Relaxed);
    }
}

/// Whether dst can share src's extents: asked once.
#[derive(Debug, Default)]
pub struct Shares(std::sync::atomic::AtomicU8);

impl Shares {
    const YES: u8 = 1;
    const NO: u8 = 2;

    fn may(&self) -> bool {
        self.0.load(Relaxed) != Shares::NO
    }

    fn note(&self, works: bool) {
        let now = if works { Shares::YES } else { Shares::NO };
        self.0.store(now, Relaxed);
    }
}

impl Placer<'_> {
    /// Whether the file comes with its data.
    pub(super) fn wants_data(&self, carrier: &Carrier<'_>, stat: &Stat) -> bool {
        (1..=CARRY_MAX).contains(&stat.size)
            && stat.nlink == 1
            && is_dense(stat)
            && self.mirror.pace.is_fast()
            && !self.mirror.populates.is_wanted(carrier.ino.get())
    }

    /// Copies a small file and gives it its name. `false`: nothing was done, it is placed as usual.
    pub(super) fn carry(
        &self,
        carrier: &Carrier<'_>,
        name: &Name,
        path: &RelPath,
        stat: &Stat,
    ) -> Result<bool> {
        let begun = Instant::now();
        let mut buffer = carrier.buffer.borrow_mut();
        let Some((meta, src)) = read_small(self.src, name, stat, &mut buffer) else {
            return Ok(false);
        };
        self.mirror.pace.note(begun.elapsed());
        let made = fd::create_new(self.dst, name, stat.perm() & 0o777);
        let file = match made {
            Err(Errno::EXIST) => return Ok(false),
            other => other.on("openat", Side::Dst, path)?,
        };
        let done = self.fill(carrier, name, path, (&meta, &src, &file), &buffer);
        if !matches!(done, Ok(true)) {
            // What failed is what is told; in a P directory nothing that is left over counts (D5).
            let _ = rustix::fs::unlinkat(self.dst, name.as_cstr(), AtFlags::empty()); // As said.
        }
        done
    }

    /// Everything that makes a new file complete. Its times come after its mark: whatever a crash
    /// leaves without a mark does not look like src's file.
    fn fill(
        &self,
        carrier: &Carrier<'_>,
        name: &Name,
        path: &RelPath,
        (meta, src, file): (&Meta, &OwnedFd, &OwnedFd),
        data: &[u8],
    ) -> Result<bool> {
        let (dst, size) = (file.as_fd(), meta.stat.size);
        let shares = &self.mirror.shares;
        let shared = size >= CLONE_MIN && shares.may() && {
            let cloned = copy::clone_file(src.as_fd(), dst);
            shares.note(cloned == Ok(true));
            cloned == Ok(true)
        };
        // What was shared is later than what was read.
        if shared && stat::stat_fd(src.as_fd()).is_ok_and(|now| now.changed_since(&meta.stat)) {
            return Ok(false);
        }
        // ENOSPC above all: the engine knows what to do about it.
        if !shared && fd::pwrite_all(dst, data, 0).is_err() {
            return Ok(false);
        }
        let born = stat::stat_fd(dst).on("statx", Side::Dst, path)?;
        fault::point("carry-written");
        // Hydrated again after a crash it would lose its capability without this (D7).
        let capability = meta.xattr(CAPABILITY).is_some();
        let mark = Mark {
            capability,
            ..Mark::pending()
        };
        let marked = self.mirror.mark.set(Target::Open(dst), &mark);
        marked.on("setxattr", Side::Dst, path)?;
        fault::point("carry-marked");
        let now = Born {
            uid: born.uid,
            gid: born.gid,
            perm: Some(born.perm()),
            flags: self.born_flags(dst),
        };
        for refused in meta.apply_new(dst, now) {
            self.mirror.refused(path, &refused);
        }
        self.note_late_flags(meta, dst)?;
        fault::point("carry-stamped");
        let handle = Handle::of(dst, c"").on("name_to_handle_at", Side::Dst, path)?;
        let progress = &self.mirror.progress;
        progress.files_seen.add(1);
        progress.bytes_seen.add(size);
        progress.bytes_left.add(size);
        let file = FileRef {
            ino: born.key.ino,
            anchor: Anchor::Handle(handle),
            origin: Some(self.origin_of(name)),
        };
        self.mirror.landed_at_once(file, size, (carrier.settled)());
        Ok(true)
    }

    pub(super) fn origin_of(&self, name: &Name) -> Origin {
        Origin {
            dir: Arc::clone(&self.src.path),
            name: Some(name.clone()),
        }
    }
}

/// Neither holes nor much room behind the data: those are the engine's.
fn is_dense(stat: &Stat) -> bool {
    let allocated = stat.blocks * 512;
    allocated >= stat.size && allocated <= stat.size + (64 << 10)
}

/// Reads a whole small file of src and its metadata. `None`: it is not what `stat` says, it is in the
/// middle of a migration itself, or src refused something.
fn read_small(
    src: &SrcDir,
    name: &Name,
    stat: &Stat,
    buffer: &mut Vec<u8>,
) -> Option<(Meta, OwnedFd)> {
    let file = fd::open_src(src.fd.as_fd(), name).ok()?;
    let meta = Meta::capture_open(src.capture, file.as_fd(), *stat).ok()??;
    let size = usize::try_from(stat.size).ok()?;
    // One byte more than there should be: a file that grew is seen.
    buffer.resize(size + 1, 0);
    if fd::pread_all(file.as_fd(), buffer, 0).ok()? != size {
        return None;
    }
    buffer.truncate(size);
    let after = stat::stat_fd(file.as_fd()).ok()?;
    (after.key == stat.key && !after.changed_since(stat)).then_some((meta, file))
}

impl Mirror {
    /// A file whose data came with its name: from here on it is like one that has just landed.
    fn landed_at_once(&self, file: FileRef, bytes: u64, settled: Waiter) {
        let hydration = self.hydrations.landed(file, bytes, settled);
        self.commit.file_landed(hydration);
        self.commit.wait_for_room(|| self.stopping());
    }
}

impl Hydrations {
    /// An entry of the table for a file that nobody has seen yet and that is complete.
    fn landed(&self, file: FileRef, bytes: u64, settled: Waiter) -> Arc<super::hydrate::Hydration> {
        let (hydration, _) = self.join(&file);
        hydration.land_at_once(bytes, settled);
        hydration
    }
}
