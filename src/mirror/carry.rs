//! Carry: small files bring their data along while the walker populates their directory.
//!
//! A file of up to `CARRY_MAX` bytes costs less to copy than to ask for: no second look at the
//! directory, no job, no ring. It is made under its own name, which nobody sees before the directory
//! is populated, and it gets no mark: nothing in a P directory counts after a crash (D5), and the
//! directory stays P until a syncfs has made it all durable (D1). Until that is so whoever wants to
//! change anything in it waits (D6).
//!
//!   wants_data()   small, one name, no holes, in a directory with nothing from an earlier start
//!   carry()        read, captured, looked at again; made, written, stamped
//!   publish        populate.rs, commit.rs: one syncfs for many directories, P to L, one more
//!
//! Whatever is unusual (src changed, an error on either side, dst full) goes the usual way, which
//! knows what to do. Somebody who waits for the directory ends it too: names come first. On a slow src
//! several threads do it in one directory (crowd.rs). Upholds I1, I3, I6, I9.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::Mirror;
use super::control::CONTROL;
use super::hydrate::FileRef;
use super::node::{Ino, Origin};
use super::place::Placer;
use super::populate::{DirRef, Waiter};
use crate::engine::job::Priority;
use crate::error::{Context, Result, Side};
use crate::meta::{Capture, Meta};
use crate::sys::dir::Entry;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::{copy, fault, fd};

/// Files up to this size, bytes, are carried.
const CARRY_MAX: u64 = 64 << 10;
/// From this size on extents are shared where that works: it saves more than it costs.
const CLONE_MIN: u64 = 16 << 10;
/// A read that takes longer is left to the engine, where it keeps nobody.
const HANG: Duration = Duration::from_secs(1);
/// Entries that are handed to the walker in memory; a directory with more is listed.
const PLACED_MAX: usize = 16 << 10;
/// What a populate by the walker takes along, and what is left to do afterwards.
pub struct Carrier<'a> {
    /// Makes what is told when the directory is published.
    published: &'a (dyn Fn() -> Waiter + Sync),
    /// The directory in work.
    ino: AtomicU64,
    placed: Mutex<Vec<Placed>>,
    /// Something was placed that the list does not tell: the directory must be listed.
    incomplete: AtomicBool,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::default();
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
    /// `published` makes a waiter for a directory whose files are not durable yet.
    pub fn new(published: &'a (dyn Fn() -> Waiter + Sync)) -> Carrier<'a> {
        Carrier {
            published,
            ino: AtomicU64::new(0),
            placed: Mutex::default(),
            incomplete: AtomicBool::new(false),
        }
    }

    /// What is told when the directory is published.
    pub(super) fn published(&self) -> Waiter {
        (self.published)()
    }

    /// Begins a directory.
    pub(super) fn enter(&self, ino: Ino) {
        self.ino.store(ino, Relaxed);
    }

    /// The populate did not tell all: somebody else ran it, or it met what was there before.
    pub(super) fn must_list(&self) {
        self.incomplete.store(true, Relaxed);
    }

    pub(super) fn push(&self, placed: Placed) {
        let mut all = self.placed.lock();
        if all.len() < PLACED_MAX {
            all.push(placed);
        } else {
            self.must_list();
        }
    }

    /// The entries that are still marked and not carried; `None`: the directory must be listed.
    pub fn placed(self) -> Option<Vec<Placed>> {
        (!self.incomplete.into_inner()).then(|| self.placed.into_inner())
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
            && self.mirror.may_carry(carrier.ino.load(Relaxed))
    }

    /// A file of src, open, where what is listed as one will probably be carried, and opening it keeps
    /// nobody waiting. `None`: it is looked at first.
    pub(super) fn open_ahead(&self, entry: &Entry) -> Option<(OwnedFd, Stat)> {
        let control = entry.name.as_bytes() == CONTROL.as_bytes(); // `place` refuses it in the root.
        let file = entry.kind == FileType::RegularFile;
        if !file || control || !self.carries() || self.src.may_hang {
            return None;
        }
        let file = fd::open_src(self.src.fd.as_fd(), &entry.name).ok()?;
        let stat = stat::stat_fd(file.as_fd()).ok()?;
        stat.is_file().then_some((file, stat))
    }

    /// Copies a small file and gives it its name. `false`: nothing was done, it is placed as usual.
    pub(super) fn carry(
        &self,
        name: &Name,
        path: &RelPath,
        stat: &Stat,
        open: Option<OwnedFd>,
    ) -> Result<bool> {
        BUFFER.with_borrow_mut(|buffer| self.carry_through(buffer, name, path, stat, open))
    }

    fn carry_through(
        &self,
        buffer: &mut Vec<u8>,
        name: &Name,
        path: &RelPath,
        stat: &Stat,
        open: Option<OwnedFd>,
    ) -> Result<bool> {
        let begun = Instant::now();
        let proof = self.mirror.proof().map(|proof| (proof, SystemTime::now()));
        let read = match open {
            Some(file) => read_open(file, self.src.capture, stat, buffer),
            None => self.read(name, stat, buffer),
        };
        let Some((meta, src)) = read else {
            return Ok(false);
        };
        self.mirror.crowd.pace.note(begun.elapsed());
        let made = fd::create_new(self.dst, name, stat.perm() & 0o777);
        let file = match made {
            Err(Errno::EXIST) => return Ok(false),
            other => other.on("openat", Side::Dst, path)?,
        };
        let done = self.fill(path, (&meta, &src, &file), buffer);
        if let (Ok(true), Some((proof, begun))) = (&done, proof) {
            proof.carried(path, stat, begun, buffer);
        }
        if !matches!(done, Ok(true)) {
            // What failed is what is told; in a P directory nothing that is left over counts (D5).
            let _ = rustix::fs::unlinkat(self.dst, name.as_cstr(), AtFlags::empty()); // As said.
        }
        done
    }

    /// Reads on this thread where src is a disk; one that may hang is given up after a while: others
    /// wait for the directory, and nobody for this file.
    fn read(&self, name: &Name, stat: &Stat, buffer: &mut Vec<u8>) -> Option<(Meta, OwnedFd)> {
        if !self.src.may_hang {
            return read_small(&self.src.fd, self.src.capture, name, stat, buffer);
        }
        let mut lent = std::mem::take(buffer);
        let (dir, capture) = (Arc::clone(&self.src.fd), self.src.capture);
        let (name, stat) = (name.clone(), *stat);
        let read = self.mirror.aside.run(HANG, move || {
            let found = read_small(&dir, capture, &name, &stat, &mut lent);
            (found, lent)
        });
        let (found, lent) = read?;
        *buffer = lent;
        found
    }

    /// Whether dst's file has the bytes of src's (`--adopt --checksum`). Only small files are compared,
    /// where nobody waits for the directory: to copy another one again is to read it once, too.
    pub(super) fn has_same_bytes(&self, name: &Name, there: &Stat, stat: &Stat) -> bool {
        if stat.size == 0 {
            return true;
        }
        let background = self.priority() == Priority::Background;
        if !background || stat.size > CARRY_MAX || there.size != stat.size {
            return false;
        }
        BUFFER.with_borrow_mut(|buffer| {
            if self.read(name, stat, buffer).is_none() {
                return false;
            }
            let mut theirs = vec![0; buffer.len() + 1];
            let len = fd::open_src(self.dst, name)
                .and_then(|file| fd::pread_all(file.as_fd(), &mut theirs, 0));
            len.is_ok_and(|len| theirs[..len] == buffer[..])
        })
    }

    /// Everything that makes a new file complete.
    fn fill(
        &self,
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
        fault::point("carry-written");
        let now = self
            .born(meta.stat.perm() & 0o777, dst)
            .on("statx", Side::Dst, path)?;
        self.mirror.applied(path, || meta.apply_new(dst, now))?;
        self.note_late_flags(meta, dst)?;
        fault::point("carry-stamped");
        let progress = &self.mirror.progress;
        progress.files_seen.add(1);
        progress.bytes_seen.add(size);
        progress.bytes_left.add(size);
        if !shared {
            self.mirror.throttle.spend(size);
        }
        self.partial.add_carried(size);
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
    dir: &OwnedFd,
    capture: Capture,
    name: &Name,
    stat: &Stat,
    buffer: &mut Vec<u8>,
) -> Option<(Meta, OwnedFd)> {
    let file = fd::open_src(dir.as_fd(), name).ok()?;
    read_open(file, capture, stat, buffer)
}

/// As `read_small`, of a file that is open.
fn read_open(
    file: OwnedFd,
    capture: Capture,
    stat: &Stat,
    buffer: &mut Vec<u8>,
) -> Option<(Meta, OwnedFd)> {
    let meta = Meta::capture_open(capture, file.as_fd(), *stat).ok()??;
    let size = usize::try_from(stat.size).ok()?;
    // One byte more than there should be: a file that grew is seen.
    buffer.resize(size + 1, 0);
    let mut n = fd::pread_some(file.as_fd(), buffer, 0).ok()?;
    if n < size {
        n += fd::pread_all(file.as_fd(), &mut buffer[n..], n as u64).ok()?;
    }
    if n != size {
        return None;
    }
    buffer.truncate(size);
    let after = stat::stat_fd(file.as_fd()).ok()?;
    (after.key == stat.key && !after.changed_since(stat)).then_some((meta, file))
}

impl Mirror {
    /// Waits as the background's limit wants it, unless somebody waits for the directory.
    fn may_carry(&self, dir: Ino) -> bool {
        let wanted = || self.populates.is_wanted(dir);
        self.throttle.wait(|| self.stopping() || wanted()) && !wanted()
    }
}
