//! CopyJob: what a caller asks of the engine, and how the engine reports back.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use super::buffers::Lent;
use crate::error::Result;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::Stat;

/// Who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for it: overtakes everything in the background at once.
    Demand,
    /// Nobody waits for it yet, but whoever reads will come to it: before the background, in its share of
    /// slots and buffers, and no throttle holds it.
    Ahead,
    /// Nobody waits for it.
    Background,
}

/// Which part of a file a job copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Span {
    /// All of it: every data extent, then dst gets src's size. Holes stay holes.
    Whole,
    /// Only these bytes, clipped to src's size; dst's size is not touched. Holes inside the range are
    /// not written (dst has a hole there already) but count as landed, and reach `Completion::data`
    /// as zeros.
    Range(Range<u64>),
}

/// Whether a job's bytes must be on the device before it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The page cache is enough: the caller batches syncfs.
    Later,
    /// fdatasync, through the ring, before `done`.
    Now,
}

/// One file, or one range of it, to copy.
pub struct CopyJob {
    /// src's directory, open for reading.
    pub src_dir: Arc<OwnedFd>,
    /// The file's name in it.
    pub src_name: Name,
    /// dst's file, open for writing.
    pub dst: Arc<OwnedFd>,
    /// How much of it.
    pub span: Span,
    /// Who waits.
    pub priority: Priority,
    /// Whether `done` waits for the device.
    pub durability: Durability,
    /// For messages and errors: the path in src.
    pub path: RelPath,
    /// Told what happens; every method is called on a worker thread, without any lock held.
    pub done: Box<dyn Completion>,
}

/// What a finished job did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// src's statx after the copy; equal in size, mtime and ctime to the one before it.
    pub src: Stat,
    /// Bytes that were read and written (or shared by a clone); holes don't count.
    pub bytes: u64,
}

/// How the engine reports on a job.
pub trait Completion: Send {
    /// Called right before the first byte of src is read. `false`: somebody else does this file
    /// already, so the job ends here, without another word (no `done`).
    fn begin(&mut self) -> bool {
        true
    }

    /// True when somebody waits for the end of a background job that has begun: nothing holds it
    /// back then.
    fn wanted(&self) -> bool {
        false
    }

    /// Asked while it copies: true when the rest is not wanted any more. The job ends with `Stopped`.
    fn leaves(&self) -> bool {
        false
    }

    /// Asked once, when it is known how much data src has (bytes, not for small files): true when
    /// the file is to leave nothing in the page cache that was not there.
    fn passes(&self, bytes: u64) -> bool {
        let _ = bytes; // Through the cache, as everybody copies.
        false
    }

    /// Asked once, after `begin`: a `Span::Whole` job tells `data` and `hole`, too.
    fn wants_data(&self) -> bool {
        false
    }

    /// src has changed, and is copied once more from its beginning, perhaps in another way.
    fn again(&mut self) {}

    /// A hole of src: only for `Span::Whole` jobs, where `wants_data`. All of them and what `data` tells
    /// are the file, once, unless its extents were shared, or copied by a server.
    fn hole(&mut self, range: Range<u64>) {
        let _ = range; // As above.
    }

    /// Source bytes as soon as they were read, before they are written to dst: for `Span::Range` jobs, in
    /// pieces, any order, that together cover the clipped range; and where `wants_data`.
    fn data(&mut self, offset: u64, bytes: &[u8]) {
        let _ = (offset, bytes); // Most jobs have no reader to answer early.
    }

    /// Asked for a piece of so many bytes before it goes to `data`: true when it is to come by `kept` instead.
    fn keeps(&self, len: usize) -> bool {
        let _ = len; // As above.
        false
    }

    /// A piece that `keeps` has asked for, after it was written, uncopied. `None`: too many are out, or it is small.
    fn kept(&mut self, offset: u64, piece: Option<Lent>) {
        let _ = (offset, piece); // Never asked for.
    }

    /// These bytes are in dst's page cache (data written, or hole left alone). Any order.
    fn landed(&mut self, range: Range<u64>) {
        let _ = range; // Only whoever keeps a RangeSet cares.
    }

    /// The end: exactly once. After `Ok` every byte of the span is in dst.
    fn done(self: Box<Self>, outcome: Result<Copied>);
}
