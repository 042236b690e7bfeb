//! The terms of a plan: what it may ask for (actions) and what it can be told (events).

use std::ops::Range;

use rustix::io::Errno;

use crate::error::Side;
use crate::sys::stat::Stat;

/// Sizes that a plan works with.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Limits {
    /// Up to this many bytes: one read, one write.
    pub(in crate::engine) small_bytes: u64,
    /// The most that one read asks for.
    pub(in crate::engine) chunk_bytes: u64,
    /// Chunks in flight per file.
    pub(in crate::engine) chunks_max: usize,
    /// The most that one copy_file_range asks for.
    pub(in crate::engine) offload_bytes: u64,
}

/// What the worker knows about a pair of file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::engine) struct Offer {
    /// FICLONE worked, or was not tried yet.
    pub(in crate::engine) clone: bool,
    /// copy_file_range happens on the server.
    pub(in crate::engine) offload: bool,
}

/// What the worker is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) enum Action {
    /// Open src by name; with or without O_NOATIME.
    Open { noatime: bool },
    /// statx of the open src; `fresh`: a server is asked, whatever is cached.
    StatSrc { fresh: bool },
    /// dst's size, and what the pair of file systems can do.
    StatDst,
    /// FICLONE.
    Clone,
    /// The first data extent at or after `from`, clipped to `end`.
    SeekData { from: u64, end: u64 },
    /// Room for `len` bytes from 0 on, the size kept.
    Preallocate { len: u64 },
    /// Make dst a hole here.
    Punch(Range<u64>),
    /// copy_file_range at the same offset on both sides.
    CopyRange { offset: u64, len: u64 },
    /// Read src into the chunk's buffer.
    Read(Piece),
    /// Write the chunk's buffer to dst.
    Write(Piece),
    /// ftruncate dst.
    Truncate { size: u64 },
    /// fdatasync dst.
    Sync,

    /// Tell the reader: these bytes of the chunk's buffer were read.
    Data {
        chunk: usize,
        offset: u64,
        len: usize,
    },
    /// Tell the reader: zeros.
    Zeros(Range<u64>),
    /// Tell the owner: src has changed, and what was told of it counts for nothing.
    Again,
    /// Tell the owner: src has no data there.
    Hole(Range<u64>),
    /// Tell the owner: these bytes are in dst.
    Landed(Range<u64>),
    /// The chunk's buffer is free again.
    Free { chunk: usize },
    /// The end; nothing is in flight.
    Finish(Result<Done, Failure>),
}

/// A part of one chunk: `len` bytes at `offset` in both files, at `at` in the chunk's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Piece {
    pub(in crate::engine) chunk: usize,
    pub(in crate::engine) offset: u64,
    pub(in crate::engine) at: usize,
    pub(in crate::engine) len: usize,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) enum Event {
    Start,
    Opened,
    SrcStat(Stat),
    DstStat {
        size: u64,
        /// It has room already, and perhaps bytes: of an earlier try, when src was another.
        used: bool,
        device: (u32, u32),
        offer: Offer,
    },
    /// Did FICLONE share everything?
    Cloned(bool),
    Extent(Option<Range<u64>>),
    Preallocated,
    /// False: dst's file system cannot punch holes.
    Punched(bool),
    CopiedRange(u64),
    Read {
        chunk: usize,
        len: usize,
    },
    Written {
        chunk: usize,
        len: usize,
    },
    Truncated,
    Synced,
    /// The action did not work.
    Failed(Action, Errno),
    /// The engine stops: give up unless the end is already in sight.
    Cancel,
}

/// A job that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Done {
    /// src after the copy.
    pub(in crate::engine) src: Stat,
    /// Bytes written, or shared by a clone.
    pub(in crate::engine) bytes: u64,
}

/// A job that did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Failure {
    Call {
        call: &'static str,
        side: Side,
        errno: Errno,
    },
    SrcChanged,
    WrongType,
    Stopped,
}
