//! Overwrite: what users change of a file's bytes, whether it is plain or mixed (mixed.rs).
//!
//!   write      the map first, then the bytes (M2)
//!   cut        ftruncate, fsync, then the mark says where src ends (M4)
//!   punch      what is weak there becomes sure, the hole is made, then the map says so (M2)

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::attr::{Attr, Change};
use super::bytemap::BLOCK;
use super::file::user_errno;
use super::mixed::{Ground, On};
use super::node::Node;
use super::turn::Span;
use crate::error::{Context, Error, Result, Side};
use crate::sys::{caps, copy, fault, fd, stat};

const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;

impl Mirror {
    /// Writes to an open file. `then` is called once.
    pub fn write(
        self: &Arc<Self>,
        node: &Arc<Node>,
        file: &Arc<OwnedFd>,
        offset: u64,
        data: &[u8],
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let pending = node.is_pending_file();
        if !pending && self.hydrations.find(node.ino, &node.anchor).is_none() {
            return then(self.write_plain(node, file, offset, data));
        }
        let (held, file, data) = (Arc::clone(node), Arc::clone(file), data.to_vec());
        let range = offset..offset.saturating_add(data.len() as u64);
        let span = Span { range, edges: true };
        let work = move |mirror: &Arc<Mirror>, ready: Result<On>| {
            then(ready.and_then(|on| {
                caps::without_fsetid(|| match on {
                    None => mirror.write_plain(&held, &file, offset, &data),
                    Some(ground) => mirror
                        .write_mixed(&held, &ground, file.as_fd(), offset, &data)
                        .on("write", Side::Dst, held.display_name()),
                })
            }));
        };
        self.change(node, span, Box::new(work));
    }

    fn write_plain(&self, node: &Node, file: &OwnedFd, offset: u64, data: &[u8]) -> Result<()> {
        fd::pwrite_all(file.as_fd(), data, offset).on("write", Side::Dst, node.display_name())
    }

    fn write_mixed(
        &self,
        node: &Node,
        ground: &Ground,
        file: BorrowedFd<'_>,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Errno> {
        let end = (offset + data.len() as u64).min(ground.src_end());
        let range = offset.min(end)..end;
        let new = ground.map.claim(&range)?;
        fault::point("mixed-claimed");
        if let Err(errno) = fd::pwrite_all(file, data, offset) {
            ground.map.release(&new)?;
            return Err(errno);
        }
        ground.map.written(&range);
        if fault::breaks("M2") {
            ground.map.sure(&range)?;
        }
        self.touch(ground, node.ino);
        fault::point("mixed-written");
        // What the user gets from O_SYNC is more than the bytes.
        let flags = rustix::fs::fcntl_getfl(file)?;
        match flags.intersects(OFlags::DSYNC | OFlags::SYNC) {
            true => self.sync_mixed(ground, node.ino, file, false),
            false => Ok(()),
        }
    }

    /// A size of a file that is pending, or was a moment ago; then the rest of the change.
    pub(super) fn set_size(
        self: &Arc<Self>,
        node: &Arc<Node>,
        size: u64,
        change: Change,
        file: Option<Arc<OwnedFd>>,
        then: impl FnOnce(Result<Attr>) + Send + 'static,
    ) {
        let rest = Change {
            size: None,
            ..change
        };
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        let rest = self.acting(move |mirror, done: Result<()>| match done {
            Ok(()) => mirror.set_attr(&held, rest, None, then),
            Err(e) => then(Err(e)),
        });
        let held = Arc::clone(node);
        let cut = move |ready: Result<()>| match (ready, size) {
            (Ok(()), 0) => mirror.truncate_pending(&held, Box::new(rest)),
            (Ok(()), size) => mirror.change_size(&held, size, file, rest),
            (Err(e), _) => rest(Err(e)),
        };
        self.when_parent_published(node, Box::new(cut));
    }

    /// Gives the file a size and calls `then`. `file`: through which open file, whatever the
    /// permissions are by now.
    pub(super) fn change_size(
        self: &Arc<Self>,
        node: &Arc<Node>,
        size: u64,
        file: Option<Arc<OwnedFd>>,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let held = Arc::clone(node);
        let range = size..u64::MAX;
        let span = Span {
            range,
            edges: false,
        };
        let work = move |mirror: &Arc<Mirror>, ready: Result<On>| {
            then(ready.and_then(|on| {
                let Some(ground) = on else {
                    return mirror.truncate_plain(&held, size, file.as_deref());
                };
                let cut = caps::without_fsetid(|| mirror.cut(&held, &ground, size));
                cut.on("ftruncate", Side::Dst, held.display_name())
            }));
        };
        self.change(node, span, Box::new(work));
    }

    /// A user's truncate of dst's file: it clears setuid and setgid.
    pub(super) fn truncate_plain(
        &self,
        node: &Node,
        size: u64,
        file: Option<&OwnedFd>,
    ) -> Result<()> {
        let shown = || node.display_name();
        let again;
        let file = match file {
            Some(file) => file,
            None => {
                let opened = self.nodes.open(node, OFlags::WRONLY);
                again = opened.on("open", Side::Dst, shown())?;
                &again
            }
        };
        let cut = caps::without_fsetid(|| copy::truncate(file.as_fd(), size));
        cut.on("ftruncate", Side::Dst, shown())
    }

    fn cut(&self, node: &Node, ground: &Ground, size: u64) -> Result<(), Errno> {
        let file = ground.file.as_fd();
        let is_shorter = size < ground.src_end();
        if is_shorter {
            // A young file's size is made good from its mark.
            self.mature(ground, node.ino)?;
        }
        copy::truncate(file, size)?;
        if is_shorter {
            // The mark must not say it before: what is behind it would be zeros.
            let sync = || self.sync_bytes(ground, node.ino, file, false);
            fault::unless_broken("M4", sync)?;
            fault::point("mixed-cut");
            ground.src_end.store(size, Ordering::Release);
            let mut times = ground.times();
            times.1 = super::attr::now();
            ground.set_times(times);
            return self.store_mark(ground, node.ino);
        }
        self.touch(ground, node.ino);
        Ok(())
    }

    /// fallocate(2) on a file that is open for writing.
    pub fn fallocate(
        self: &Arc<Self>,
        node: &Arc<Node>,
        file: &Arc<OwnedFd>,
        mode: i32,
        (offset, len): (u64, u64),
        then: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let (held, file, synced) = (Arc::clone(node), Arc::clone(file), Arc::clone(file));
        let range = offset..offset.saturating_add(len);
        let zeros = mode & !KEEP_SIZE == PUNCH_HOLE || mode & !KEEP_SIZE == ZERO_RANGE;
        let plain = move |ready: Result<(), Errno>| {
            let fallocate = || copy::fallocate(file.as_fd(), mode, offset, len);
            ready.and_then(|()| caps::without_fsetid(fallocate))
        };
        if !zeros && mode & !KEEP_SIZE != 0 {
            // What moves bytes needs all of them.
            return self.when_hydrated(node, super::hydrate::Need::Write, move |ready| {
                then(plain(ready.map_err(|e| user_errno(&e))));
            });
        }
        let span = Span {
            range: range.clone(),
            edges: zeros,
        };
        let work = move |mirror: &Arc<Mirror>, ready: Result<On>| {
            let on = match ready {
                Ok(on) => on,
                Err(e) => return then(Err(user_errno(&e))),
            };
            let Some(ground) = on else {
                return then(plain(Ok(())));
            };
            let sure = match zeros && ground.map.has_weak(&range) {
                true => mirror.sync_mixed(&ground, held.ino, synced.as_fd(), false),
                false => Ok(()),
            };
            let done = plain(sure).and_then(|()| {
                if zeros {
                    fault::point("mixed-punched");
                    mirror.claim_zeros(&ground, &range)?;
                }
                mirror.touch(&ground, held.ino);
                Ok(())
            });
            then(done);
        };
        self.change(node, span, Box::new(work));
    }

    /// Whole blocks are holes on purpose; those at the ends keep some of their bytes.
    fn claim_zeros(&self, ground: &Ground, range: &std::ops::Range<u64>) -> Result<(), Errno> {
        let end = range.end.min(ground.src_end());
        let range = range.start.min(end)..end;
        let first = range.start.next_multiple_of(BLOCK);
        // The last one of src is whole when nothing of src is behind.
        let last = match end == ground.src_end() {
            true => end,
            false => end / BLOCK * BLOCK,
        };
        if first < last {
            ground.map.sure(&(first..last))?;
        }
        for edge in [range.start..first.min(end), last.max(range.start)..end] {
            if !edge.is_empty() {
                ground.map.claim(&edge)?;
                ground.map.written(&edge);
            }
        }
        Ok(())
    }

    /// SEEK_DATA or SEEK_HOLE in a mixed file: a hole is one of both sides. May wait for src.
    pub(super) fn seek_mixed(
        &self,
        node: &Node,
        ground: &Ground,
        (offset, data): (u64, bool),
    ) -> Result<u64> {
        /// Holes of one side that are looked behind; then the rest counts as data.
        const LOOKS: usize = 1000;
        let shown = || node.display_name();
        let dst = ground.file.as_fd();
        let src_end = ground.src_end();
        let here = |at: u64, data: bool| copy::seek_data_or_hole(dst, at, data);
        let there = |at: u64, data: bool| match at < src_end {
            true => self.seek_src(node, (at, data)).map(|to| to.min(src_end)),
            false => Err(Errno::NXIO).on("lseek", Side::Dst, shown()),
        };
        let none = |e: &Error| e.side() == Side::Dst && e.errno() == Errno::NXIO;
        let size = stat::stat_fd(dst).on("statx", Side::Dst, shown())?.size;
        if offset >= size {
            return Err(Errno::NXIO).on("lseek", Side::Dst, shown());
        }
        if data {
            let ours = match here(offset, true) {
                Err(Errno::NXIO) => u64::MAX,
                other => other.on("lseek", Side::Dst, shown())?,
            };
            let theirs = match there(offset, true) {
                Ok(at) if at < src_end => at,
                Ok(_) => u64::MAX,
                Err(e) if none(&e) => u64::MAX,
                Err(e) => return Err(e),
            };
            return match ours.min(theirs) {
                u64::MAX => Err(Errno::NXIO).on("lseek", Side::Dst, shown()),
                at => Ok(at),
            };
        }
        let mut at = offset;
        for _ in 0..LOOKS {
            at = here(at, false).on("lseek", Side::Dst, shown())?;
            if at >= src_end {
                return Ok(at);
            }
            let next = match there(at, false) {
                Ok(next) => next,
                Err(e) if none(&e) => at,
                Err(e) => return Err(e),
            };
            if next == at || next >= size {
                return Ok(next.min(size));
            }
            at = next;
        }
        Ok(size)
    }
}
