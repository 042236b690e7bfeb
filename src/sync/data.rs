//! Data: the bytes of one file. Shared where both sides can (FICLONE), else read and written:
//! small files at once, large ones by data extents, in parts that idle threads take over.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::dir::{At, Dir};
use super::flow::{BULK, Flow};
use super::{Item, Work};
use crate::config::Reflink;
use crate::error::{Context, Error, Result, Side};
use crate::manifest::{self, Digest, Feed, Part, Tree};
use crate::meta::{Born, Meta};
use crate::sys::cache::Aligned;
use crate::sys::dir::Entry;
use crate::sys::name::Name;
use crate::sys::stat::{FileKey, Stat, stat_fd_fresh};
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, fd};

/// Files up to this size are copied by one read and one write.
pub(super) const SMALL: usize = 256 << 10;
/// Larger ones are copied in pieces of this size, as much as a pipe may hold for everybody: pages of
/// src travel by reference, and dst's file system takes them in large folios.
const PIECE: usize = 1 << 20;
/// A file with more than this left is shared with whoever has nothing to do.
const SHARE: u64 = 8 << 20;
/// Below this a clone costs more than the copy that it saves.
const CLONE_MIN: u64 = 16 << 10;

/// One thread's buffers.
pub(super) struct Buffers {
    pub(super) data: Vec<u8>,
    /// So much of the present file is in `data` already: all of it.
    pub(super) ready: Option<usize>,
    /// Files that wait for their data.
    pub(super) later: super::ahead::Queue,
    /// For large files.
    pipe: Option<copy::Pipe>,
    /// For large files that leave nothing in the page cache.
    bulk: Option<Aligned>,
    /// How long src has kept the present file waiting.
    pub(super) waited: Duration,
    /// Names of a directory that this thread has still before it.
    pub(super) rest: (Option<Arc<Dir>>, Vec<Entry>),
    /// For getdents64.
    pub(super) names: Vec<u8>,
}

impl Buffers {
    pub(super) fn new() -> Buffers {
        Buffers {
            data: vec![0; SMALL],
            ready: None,
            later: super::ahead::Queue::new(),
            pipe: None,
            bulk: None,
            waited: Duration::ZERO,
            rest: (None, Vec::new()),
            names: Vec::with_capacity(32 << 10),
        }
    }

    /// Two halves, to compare.
    pub(super) fn two(&mut self) -> (&mut [u8], &mut [u8]) {
        self.data.split_at_mut(SMALL / 2)
    }
}

/// A file that is being copied.
pub(super) struct Transfer {
    pub(super) dir: Arc<Dir>,
    pub(super) name: Name,
    /// Where it is until it is complete; `None`: already under its own name.
    pub(super) temp: Option<Name>,
    /// What it replaces.
    pub(super) now: Option<Stat>,
    pub(super) src: OwnedFd,
    pub(super) dst: OwnedFd,
    pub(super) meta: Meta,
    pub(super) born: Born,
    /// Other names wait for this inode.
    pub(super) group: Option<FileKey>,
    /// It has fewer blocks than bytes.
    pub(super) sparse: bool,
    /// src was looked at after the copy: it is what it was.
    pub(super) unchanged: bool,
    /// A power cut would be told by the run's record.
    pub(super) recorded: bool,
    /// Whether its data stays in the page cache.
    pub(super) flow: Flow,
    /// Its data can go through a pipe.
    pub(super) pipes: AtomicBool,
    /// For the manifest: of the whole file, where it went through one buffer.
    pub(super) digest: Option<Digest>,
    /// Where it goes through in parts.
    pub(super) tree: Option<Tree>,
    /// src's ctime tells of each change after this copy.
    pub(super) settled: bool,
    /// dst shares src's extents: what is read is only hashed.
    pub(super) cloned: bool,
    /// Parts that are not copied yet.
    pub(super) parts: AtomicUsize,
    pub(super) failed: Mutex<Option<Error>>,
}

impl Transfer {
    /// Which file it is, for an error.
    pub(super) fn at(&self) -> At<'_> {
        self.dir.at(&self.name)
    }
}

/// A part of a large file.
pub(super) struct Slice {
    transfer: Arc<Transfer>,
    range: Range<u64>,
    /// What of it was hashed.
    feed: Option<Feed>,
}

impl Slice {
    fn new(transfer: Arc<Transfer>, range: Range<u64>) -> Slice {
        let feed = transfer.tree.as_ref().map(|tree| tree.feed(range.start));
        Slice {
            transfer,
            range,
            feed,
        }
    }
}

/// What `Job::clone` knows; 0 is nothing.
const YES: u8 = 1;
const NO: u8 = 2;

impl Work<'_, '_> {
    /// A file of this size may be shared with src rather than read.
    pub(super) fn may_clone(&self, size: u64) -> bool {
        match self.job.config.reflink {
            Reflink::Never => false,
            Reflink::Always => true,
            Reflink::Auto if !self.job.config.keep.holes => false,
            Reflink::Auto => size >= CLONE_MIN && self.job.clone.load(Relaxed) != NO,
        }
    }

    /// Shares all extents with src, where that is wanted and possible.
    pub(super) fn clone_whole(&self, t: &Transfer) -> Result<bool> {
        let size = t.meta.stat.size;
        let always = match self.job.config.reflink {
            Reflink::Never => return Ok(false),
            Reflink::Always => true,
            Reflink::Auto if !self.may_clone(size) => return Ok(false),
            Reflink::Auto => false,
        };
        let path = t.at();
        let cloned = copy::clone_file(t.src.as_fd(), t.dst.as_fd())
            .and_then(|done| match always && !done {
                true => Err(Errno::OPNOTSUPP),
                false => Ok(done),
            })
            .on("FICLONE", Side::Dst, path)
            .inspect_err(|_| self.abandon(t))?;
        if t.meta.stat.key.dev == self.job.root_dev {
            self.job.clone.store(if cloned { YES } else { NO }, Relaxed);
        }
        if cloned {
            self.copied(size);
        }
        Ok(cloned)
    }

    /// One read, one write. A file that changed meanwhile is read again, once.
    pub(super) fn small(&self, buffers: &mut Buffers, t: &mut Transfer) -> Result<()> {
        for attempt in 0..2 {
            let path = || t.at();
            let size = usize::try_from(t.meta.stat.size).map_or(SMALL, |n| n.min(SMALL));
            let buf = &mut buffers.data[..size];
            let n = match buffers.ready.take() {
                Some(n) => n.min(size),
                None => {
                    let begin = Instant::now();
                    let n = fd::pread_all(t.src.as_fd(), buf, 0).on("read", Side::Src, path())?;
                    buffers.waited += begin.elapsed();
                    n
                }
            };
            fd::pwrite_all(t.dst.as_fd(), &buf[..n], 0).on("write", Side::Dst, path())?;
            self.copied(n as u64);
            self.pace(n as u64);
            if self.src_changed(t)?.is_none() {
                if n < size {
                    return self.ends_early(t);
                }
                t.unchanged = true;
                t.digest = self
                    .job
                    .proof
                    .as_ref()
                    .map(|_| Digest::of(&buffers.data[..n]));
                break;
            }
            // By name again: it may have been replaced; and where a server goes by names (sshfs) the
            // attributes of an open file may be another's.
            let opened = t.dir.open_file(&t.name);
            let opened = opened.or_else(|(call, e)| Err(e).on(call, Side::Src, t.at()));
            let (src, after) = opened?;
            // Its other names are not this file's.
            let other = t.group.is_some() && after.key != t.meta.stat.key;
            if attempt > 0 || other || !after.is_file() || after.size > SMALL as u64 {
                break; // seal() sees it too, and tells.
            }
            let again = self.capture(Target::Open(src.as_fd()), after, t.at());
            copy::truncate(t.dst.as_fd(), 0).on("ftruncate", Side::Dst, path())?;
            (t.meta, t.src) = (again?, src);
            t.settled = manifest::is_settled(&t.meta.stat);
        }
        Ok(())
    }

    /// Starts a large or sparse file here; whoever has nothing to do takes parts of it.
    pub(super) fn large(&self, buffers: &mut Buffers, mut transfer: Transfer) -> Result<()> {
        let stat = transfer.meta.stat;
        let size = stat.size;
        let hashes = self.job.proof.is_some() && manifest::is_hashed(&stat);
        transfer.tree = hashes.then(|| Tree::new(size));
        if transfer.cloned {
            self.start(buffers, transfer);
            return Ok(());
        }
        let data = size.min(stat.blocks.saturating_mul(512));
        transfer.flow = Flow::of(data, &self.job.allowance);
        if transfer.sparse {
            // Its size first: a write that extends a file makes xfs preallocate behind it, and the
            // next one makes that fill the hole.
            copy::truncate(transfer.dst.as_fd(), size)
                .on("ftruncate", Side::Dst, transfer.at())
                .inspect_err(|_| self.abandon(&transfer))?;
        }
        if self.job.reserves && !transfer.sparse {
            copy::preallocate(transfer.dst.as_fd(), 0..size)
                .on("fallocate", Side::Dst, transfer.at())
                .inspect_err(|_| self.abandon(&transfer))?;
        }
        if transfer.flow.passing {
            let (src, dst) = (transfer.src.as_fd(), transfer.dst.as_fd());
            let begun = transfer.flow.begin(src, dst, &stat);
            begun
                .on("fcntl", Side::Dst, transfer.at())
                .inspect_err(|_| self.abandon(&transfer))?;
        }
        self.start(buffers, transfer);
        Ok(())
    }

    fn start(&self, buffers: &mut Buffers, transfer: Transfer) {
        copy::advise_sequential(transfer.src.as_fd());
        let range = 0..transfer.meta.stat.size;
        self.slice(buffers, Slice::new(Arc::new(transfer), range));
    }

    /// Copies a part of a file; with the last part the file is finished.
    pub(super) fn slice(&self, buffers: &mut Buffers, slice: Slice) {
        let Slice {
            transfer: t,
            mut range,
            mut feed,
        } = slice;
        while range.start < range.end {
            if t.failed.lock().is_some() {
                break;
            }
            if self.crew.crowded() {
                let transfer = t;
                self.crew.push([Item::Slice(Slice {
                    transfer,
                    range,
                    feed,
                })]);
                return;
            }
            if self.crew.hungry() && !buffers.rest.1.is_empty() {
                self.give_rest(buffers);
            }
            // From memory two on one file only wait for its lock: on ext4, xfs and btrfs it takes as
            // long as one, and twice the processor.
            let may_share = self.job.totals.is_slow() || t.flow.is_direct();
            if range.end - range.start > SHARE && may_share && self.crew.hungry() {
                let middle = range.start + (range.end - range.start) / 2;
                let middle = middle.next_multiple_of(1 << 20).min(range.end);
                t.parts.fetch_add(1, Relaxed);
                let rest = Slice::new(Arc::clone(&t), middle..range.end);
                self.crew.push([Item::Slice(rest)]);
                range.end = middle;
            }
            match self.chunk(buffers, &t, &range, &mut feed) {
                Ok(next) => range.start = next,
                Err(e) => {
                    t.failed.lock().get_or_insert(e);
                    break;
                }
            }
        }
        if t.parts.fetch_sub(1, AcqRel) == 1 {
            self.complete(buffers, &t);
        }
    }

    /// Gives away the names that wait behind a large file: all of them, it will take a while.
    pub(super) fn give_rest(&self, buffers: &mut Buffers) {
        let names = std::mem::take(&mut buffers.rest.1);
        if let Some(dir) = buffers.rest.0.as_ref().filter(|_| !names.is_empty()) {
            self.crew.push([Item::Names(Arc::clone(dir), names)]);
        }
    }

    /// Copies the next piece of data in a range; returns where to go on.
    fn chunk(
        &self,
        buffers: &mut Buffers,
        t: &Transfer,
        range: &Range<u64>,
        feed: &mut Option<Feed>,
    ) -> Result<u64> {
        let path = || t.at();
        // A second signal ends the process; the first ends this file: it has no name yet.
        if self.stopping() {
            return Err(Error::Stopped);
        }
        let mut part = Part {
            file: t.src.as_fd(),
            sparse: t.sparse,
            hash: t.tree.as_ref().zip(feed.as_mut()),
        };
        let next = part.data(range).on("lseek", Side::Src, path())?;
        let Some(mut data) = next else {
            return Ok(range.end);
        };
        while data.start < data.end {
            let n = match part.hash {
                Some(_) => self.hashed(buffers, t, &data, &mut part)?,
                None => self.piece(buffers, t, &data)?,
            };
            if n == 0 {
                let now = stat_fd_fresh(t.src.as_fd()).on("statx", Side::Src, path())?;
                return match now.size < range.end {
                    true => Ok(range.end), // src shrank: seal() sees it.
                    false => self.ends_early(t),
                };
            }
            if !t.cloned {
                self.copied(n); // Else it counts as copied already.
            }
            self.pace(n);
            fault::point("sync-piece");
            data.start += n;
            if self.crew.hungry() || self.stopping() {
                break;
            }
        }
        Ok(data.start)
    }

    /// src says that a file ends, and that it does not: what is there is not all.
    fn ends_early<T>(&self, t: &Transfer) -> Result<T> {
        Err(Errno::IO).on("read", Side::Src, t.at())
    }

    /// Copies the beginning of a range of data; returns how much, 0 at src's end.
    fn piece(&self, buffers: &mut Buffers, t: &Transfer, data: &Range<u64>) -> Result<u64> {
        let (src, dst, at) = (t.src.as_fd(), t.dst.as_fd(), t.at());
        if t.flow.passing {
            let memory = buffers.bulk.get_or_insert_with(|| Aligned::new(BULK));
            let n = t.flow.read(t, memory, data);
            let n = n.on("read", Side::Src, at)?;
            let written = t.flow.write(t, memory, data.start, n);
            written.on("write", Side::Dst, at)?;
            return Ok(n as u64);
        }
        let left = usize::try_from(data.end - data.start).unwrap_or(usize::MAX);
        let len = left.min(PIECE);
        if buffers.pipe.is_none() && t.pipes.load(Relaxed) {
            buffers.pipe = copy::Pipe::new(PIECE).ok(); // No pipe left: read and write.
        }
        if let Some(mut pipe) = buffers.pipe.take_if(|_| t.pipes.load(Relaxed)) {
            match pipe.fill(src, data.start, len) {
                // Not from a file of this kind.
                Err(Errno::INVAL | Errno::NOSYS) => t.pipes.store(false, Relaxed),
                // Some servers' files give nothing this way before they end.
                Ok(0) => t.pipes.store(false, Relaxed),
                filled => {
                    let n = filled.on("splice", Side::Src, at)?;
                    let drained = pipe.drain(dst, data.start);
                    drained.on("splice", Side::Dst, at)?;
                    buffers.pipe = Some(pipe);
                    return Ok(n as u64);
                }
            }
        }
        let buf = &mut buffers.data[..left.min(SMALL)];
        let n = fd::pread_all(src, buf, data.start).on("read", Side::Src, at)?;
        fd::pwrite_all(dst, &buf[..n], data.start).on("write", Side::Dst, at)?;
        Ok(n as u64)
    }

    /// As `piece`, through memory, for the manifest.
    fn hashed(
        &self,
        buffers: &mut Buffers,
        t: &Transfer,
        data: &Range<u64>,
        part: &mut Part<'_>,
    ) -> Result<u64> {
        let memory = buffers.bulk.get_or_insert_with(|| Aligned::new(BULK));
        if !t.flow.passing {
            let n = part.read(data, memory.bytes());
            let n = n.on("read", Side::Src, t.at())?;
            if !t.cloned {
                let written = fd::pwrite_all(t.dst.as_fd(), &memory.bytes()[..n], data.start);
                written.on("write", Side::Dst, t.at())?;
            }
            return Ok(n as u64);
        }
        let n = t.flow.read(t, memory, data);
        let n = n.on("read", Side::Src, t.at())?;
        if !t.cloned {
            let written = t.flow.write(t, memory, data.start, n);
            written.on("write", Side::Dst, t.at())?;
        }
        part.bytes(data.start, &memory.bytes()[..n]);
        Ok(n as u64)
    }

    /// All parts are done.
    fn complete(&self, buffers: &mut Buffers, t: &Transfer) {
        let outcome = match t.failed.lock().take() {
            Some(e) => {
                self.abandon(t);
                Err(e)
            }
            None if t.flow.passing => {
                let ended = t.flow.end(t);
                ended
                    .on("sync_file_range", Side::Dst, t.at())
                    .and_then(|()| self.seal(t))
            }
            None => self.seal(t),
        };
        match (&outcome, t.group) {
            (Ok(key), Some(_)) => self.made(buffers, &t.dir, &t.name, &t.meta.stat, *key),
            (Err(_), Some(group)) => self.not_made(group),
            (_, None) => {}
        }
        let step = outcome.map(super::link::Step::Done);
        self.stepped(buffers, &t.dir, &t.name, step);
    }
}
