//! Salvage: the bytes of a file that cannot be read whole.
//!
//!   spoil()     a copy met a block that src cannot read: the file can be opened, it stays pending
//!   rescue()    what can be read comes to dst and stays there: it becomes a mixed file (rescue.rs) with a
//!               durable record of what is here (pulled.rs)
//!   salvaged()  where that is not possible, and until then, reads go straight to src, block by block
//!               where need be, and are not stored
//!   mend()      it was pulled whole after all
//!
//! What can be read is answered, the rest is EIO and in the ledger with its offsets.
//! An answer is whole or EIO: a short one would be the end of the file for the kernel.

mod gate;
pub(super) mod pulled;
mod rescue;
pub(super) mod rest;

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::gate::Gate;
use super::Mirror;
use super::hydrate::Hydration;
use super::node::{Ino, Node, Origin};
use super::populate::no_origin;
use super::ranged::ReadDone;
use crate::error::{Context, Errno, Error, Result, Side};
use crate::sys::name::RelPath;
use crate::sys::{fault, fd, stat};

/// The smallest piece that is read by itself, bytes.
const BLOCK: u64 = 4096;
/// For so long after a failure nobody waits for another try of the whole file.
const AGAIN: Duration = Duration::from_secs(10);
/// Files that are remembered; of more, reads fail without a closer look.
const SPOILED_MAX: usize = 1 << 16;
/// Files that are kept open, with their maps, while nothing can be had of src for them.
const OPEN_MAX: usize = 512;

/// The files with bytes that src cannot read, and when that was found.
#[derive(Default)]
pub(super) struct Spoiled {
    found: Mutex<HashMap<Ino, Instant>>,
    pub(super) gate: Gate,
    /// More is here than their record says (pulled.rs).
    unkept: Mutex<HashMap<Ino, Weak<Hydration>>>,
    /// Of those that are kept, as many more as are open.
    open: Arc<()>,
}

impl Spoiled {
    pub(super) fn contains(&self, ino: Ino) -> bool {
        self.found.lock().contains_key(&ino)
    }

    /// Nobody has tried.
    pub(super) fn forget(&self) {
        self.found.lock().clear();
    }

    /// One more of them is open, until it is dropped.
    pub(super) fn count(&self) -> Arc<()> {
        Arc::clone(&self.open)
    }

    /// Too many of them are open; and whether far too many.
    fn are_many(&self) -> Option<bool> {
        let (now, most) = (
            Arc::strong_count(&self.open),
            fault::lowered("SALVAGED", OPEN_MAX),
        );
        (now > most).then_some(now > 2 * most)
    }

    /// It was found a moment ago.
    pub(super) fn is_fresh(&self, ino: Ino) -> bool {
        self.found
            .lock()
            .get(&ino)
            .is_some_and(|at| at.elapsed() < AGAIN)
    }
}

impl Mirror {
    /// A copy of the file has met bytes that cannot be read.
    pub(super) fn spoil(&self, ino: Ino) {
        let mut spoiled = self.spoiled.found.lock();
        if spoiled.len() < SPOILED_MAX || spoiled.contains_key(&ino) {
            spoiled.insert(ino, Instant::now());
        }
    }

    /// The file is here, whole.
    pub(super) fn mend(&self, ino: Ino) {
        self.spoiled.found.lock().remove(&ino);
    }

    /// Answers a read of a spoiled file on a pool thread; gives `then` back for any other.
    pub(super) fn salvage(
        self: &Arc<Self>,
        node: &Arc<Node>,
        range: Range<u64>,
        then: ReadDone,
    ) -> Option<ReadDone> {
        if !self.spoiled.contains(node.ino) {
            return Some(then);
        }
        let path = node.origin().map(|o| o.path().to_path());
        let then = self.waiting(path.unwrap_or_default(), then);
        let ask = move |mirror: &Mirror, node: &Node| {
            let origin = node.origin();
            let origin = origin
                .ok_or(Errno::STALE)
                .on("origin", Side::Dst, node.display_name())?;
            mirror.salvaged(node.ino, &origin, range.clone())
        };
        self.ask_later(Arc::clone(node), ask, 0, then);
        None
    }

    /// Reads a range from src, whole. May wait for src.
    pub(super) fn salvaged(&self, ino: Ino, origin: &Origin, range: Range<u64>) -> Result<Vec<u8>> {
        let path = origin.path();
        let changed = || Error::SrcChanged {
            path: path.to_path(),
        };
        let name = origin.name.as_ref().ok_or_else(|| no_origin(&path))?;
        let dir = self.source.dir(&origin.dir)?;
        let file = fd::open_src(dir.fd.as_fd(), name).on("open", Side::Src, &path)?;
        let before = stat::stat_fd(file.as_fd()).on("statx", Side::Src, &path)?;
        if let Some(known) = self.source.recall(ino)
            && !known.is_still(&before)
        {
            return Err(changed());
        }
        let range = range.start.min(before.size)..range.end.min(before.size);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        match read_whole(file.as_fd(), &mut bytes, range.start) {
            Ok(true) => {}
            Ok(false) => return Err(changed()),
            Err(errno) => {
                let error = Err::<(), _>(errno).on("read", Side::Src, &path);
                if let Err(error) = error
                    && !error.is_bad_read()
                {
                    return Err(error);
                }
                let bad = read_blocks(file.as_fd(), &mut bytes, range.start);
                let bad = bad.on("read", Side::Src, &path)?;
                if !bad.is_empty() {
                    let error = Error::Call {
                        call: "read",
                        side: Side::Src,
                        path: path.to_path(),
                        errno,
                    };
                    fault::point("salvage-bad");
                    self.fail_ranges(&path, &error, &bad, false);
                    self.settle_if_here(ino, &path);
                    return Err(error);
                }
            }
        }
        let after = stat::stat_fd_after(file.as_fd(), &before).on("statx", Side::Src, &path)?;
        match after.changed_since(&before) {
            true => Err(changed()),
            false => Ok(bytes),
        }
    }

    /// A file that has become whole since a read of src failed is no entry of the ledger: what lands takes its
    /// entries away, and this one came after that. In this order: its phase changes before they go.
    fn settle_if_here(&self, ino: Ino, path: &RelPath) {
        if self.nodes.get(ino).is_ok_and(|n| !n.is_pending_file()) {
            self.settle_ledger(path);
        }
    }
}

/// False: the file ends before.
fn read_whole(file: BorrowedFd<'_>, bytes: &mut [u8], offset: u64) -> Result<bool, Errno> {
    let len = bytes.len();
    fd::pread_all(file, bytes, offset).map(|n| n == len)
}

/// Reads block by block; the ranges that cannot be read come back.
fn read_blocks(
    file: BorrowedFd<'_>,
    bytes: &mut [u8],
    offset: u64,
) -> Result<Vec<Range<u64>>, Errno> {
    let mut bad: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = offset + at as u64;
        let len = (BLOCK - start % BLOCK) as usize;
        let end = bytes.len().min(at + len);
        match read_whole(file, &mut bytes[at..end], start) {
            Ok(true) => {}
            Ok(false) => return Err(Errno::IO),
            Err(errno) if is_bad_block(errno) => match bad.last_mut() {
                Some(last) if last.end == start => last.end = offset + end as u64,
                _ => bad.push(start..offset + end as u64),
            },
            Err(errno) => return Err(errno),
        }
        at = end;
    }
    Ok(bad)
}

fn is_bad_block(errno: Errno) -> bool {
    let error = Err::<(), _>(errno).on("read", Side::Src, ".");
    error.is_err_and(|e| e.is_bad_read())
}
