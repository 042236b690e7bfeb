//! Room: dst that takes nothing more: full, out of inodes, over a quota, read-only.
//!
//!   note_full()   a call said so: `status` tells, and why; the background waits
//!   has_room()    dst is asked for a little, as the background would: true, and it goes on
//!   expect_room() a large file that does not fit is not begun
//!   applied()     metadata that found no room is no metadata that dst cannot hold: the entry waits
//!
//! Nothing is begun that could not be undone by beginning it again: what has no room stays pending,
//! and its bytes are read from src. One user's quota keeps nobody but him.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::Mirror;
use super::hydrate::Hydration;
use crate::error::{Context, Error, Result, Side};
use crate::meta::Refused;
use crate::sys::name::RelPath;
use crate::sys::{fd, host, room, stat};

/// What is known of dst's room.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// It is neither one user's quota nor one large file: the next entry would fare no better.
    none: AtomicBool,
    /// What the log has said, and when.
    told: Mutex<Option<(Errno, Instant)>>,
}

/// The log says the same again after this long.
const TELL_AGAIN: Duration = Duration::from_secs(600);
/// Tries of what finds no room although dst has some, when that is less than `MUCH`, bytes; and the
/// pause between them, longer each time.
const TRIES: u32 = 8;
const PAUSE: Duration = Duration::from_millis(5);
const MUCH: u64 = 256 << 20;
/// From this size on, bytes, a file that does not fit is not begun: what was written of it would be in
/// everybody's way.
const WEIGHED: u64 = 1 << 20;

impl Mirror {
    /// dst has refused something for want of room, or because it is read-only.
    pub(super) fn note_full(&self, error: &Error) {
        if !self.is_dst_shut() && self.ask_room().is_err() {
            self.room.none.store(true, Ordering::Relaxed);
        }
        *self.progress.dst_says.lock() = Some(error.to_string());
        self.progress.dst_full.store(true, Ordering::Relaxed);
        let mut told = self.room.told.lock();
        let news =
            |(errno, at): (Errno, Instant)| errno != error.errno() || at.elapsed() > TELL_AGAIN;
        if told.is_none_or(news) {
            *told = Some((error.errno(), Instant::now()));
            tracing::warn!("dst takes nothing more: {error}; the background waits until it does");
        }
    }

    /// ENOSPC for a file that is larger than what is free in dst: its copy need not begin. Only where
    /// free blocks are counted as they are written (ext4, xfs), and src's cannot be shared.
    pub(super) fn expect_room(
        &self,
        hydration: &Hydration,
        (src, dst): (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<()> {
        let path = &hydration.path;
        // How much of it is data only src tells.
        let known = self.source.recall(hydration.file.ino);
        let Some(known) = known.filter(|known| known.size >= WEIGHED) else {
            return Ok(());
        };
        let there = stat::stat_fd(dst).on("statx", Side::Dst, path)?;
        let fs = host::fs_stat(dst).on("statfs", Side::Dst, path)?;
        let counted = [host::EXT4_MAGIC, host::XFS_MAGIC].contains(&fs.magic);
        if !counted || fd::device_of(src).is_ok_and(|dev| dev == there.key.dev) {
            return Ok(());
        }
        let want = there.size.min(known.blocks.saturating_mul(512));
        let want = want.saturating_sub(there.blocks.saturating_mul(512));
        match want > fs.bfree.saturating_mul(fs.frsize) {
            true => Err(Errno::NOSPC).on("fallocate", Side::Dst, path),
            false => Ok(()),
        }
    }

    /// True while dst takes nothing, from anybody.
    pub fn is_dst_shut(&self) -> bool {
        self.room.none.load(Ordering::Relaxed)
    }

    /// Asks dst for a little room, after it has refused some. True: the background may try.
    pub fn has_room(&self) -> bool {
        if !self.progress.dst_full.load(Ordering::Relaxed) {
            return true;
        }
        if self.is_dst_shut()
            && let Err(errno) = self.ask_room()
        {
            tracing::debug!("dst takes nothing yet: {errno}");
            return false;
        }
        self.room.none.store(false, Ordering::Relaxed);
        self.progress.dst_full.store(false, Ordering::Relaxed);
        *self.progress.dst_says.lock() = None;
        tracing::info!("dst is asked again");
        true
    }

    fn ask_room(&self) -> Result<(), Errno> {
        room::ask(self.control.dir.as_fd())
    }

    /// Why something does not fit into a mark: dst has no room, or the mark has none.
    pub(super) fn full_or_xdev(&self) -> Errno {
        match self.ask_room() {
            Ok(()) => Errno::XDEV,
            Err(_) => Errno::NOSPC,
        }
    }

    /// Applies metadata. What dst refuses is in the ledger, unless it was for want of room: then it is
    /// an error, and the entry is to be made again. ENOSPC says both, so dst is asked which.
    pub(super) fn applied(
        &self,
        path: &RelPath,
        mut apply: impl FnMut() -> Vec<Refused>,
    ) -> Result<()> {
        let mut refused = Vec::new();
        self.insist(path, || {
            refused = apply();
            wants_room(&refused)
        })?;
        for refused in &refused {
            self.refused(path, refused);
        }
        Ok(())
    }

    /// Does something again while it finds no room and dst has some: there may be room since, and where
    /// dst is nearly full others take and give back what is left. What is refused after that has no room
    /// in its inode. `step` returns the errno that asks for room.
    pub(super) fn insist(
        &self,
        path: &RelPath,
        mut step: impl FnMut() -> Option<Errno>,
    ) -> Result<()> {
        let mut tries = 0;
        while let Some(want) = step() {
            self.no_room(want, path)?;
            tries += 1;
            if tries > 1 && (tries > TRIES || self.has_much_room()) {
                break;
            }
            std::thread::sleep(PAUSE * (tries - 1));
        }
        Ok(())
    }

    fn has_much_room(&self) -> bool {
        let fs = host::fs_stat(self.dst.as_fd());
        let roomy = |fs: host::FsStat| fs.bavail.saturating_mul(fs.frsize) > MUCH;
        !self.progress.dst_full.load(Ordering::Relaxed) && fs.is_ok_and(roomy)
    }

    /// An error when this refusal was for want of room.
    fn no_room(&self, errno: Errno, path: &RelPath) -> Result<()> {
        let asked = match errno {
            Errno::NOSPC => self.ask_room(),
            other => Err(other),
        };
        match asked {
            Ok(()) => Ok(()),
            Err(_) => Err(errno).on("setxattr", Side::Dst, path),
        }
    }
}

fn wants_room(refused: &[Refused]) -> Option<Errno> {
    let mut all = refused.iter().map(|r| r.errno);
    all.find(|e| [Errno::NOSPC, Errno::DQUOT, Errno::ROFS].contains(e))
}

/// Errors that will not pass: dst's file system has no room for such a thing, of its kind.
pub(super) fn cannot_hold(error: &Error) -> bool {
    match error {
        Error::Call {
            side: Side::Dst,
            errno,
            ..
        } => matches!(
            *errno,
            Errno::NAMETOOLONG
                | Errno::TOOBIG
                | Errno::INVAL
                | Errno::PERM
                | Errno::FBIG
                | Errno::OVERFLOW
                | Errno::OPNOTSUPP
                | Errno::MLINK
                | Errno::ILSEQ
        ),
        Error::WrongType { .. } => true,
        _ => false,
    }
}
