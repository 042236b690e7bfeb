//! CopyPlan: what to do next for one file, given what just happened. Pure: no kernel in sight.
//!
//!   Opening  -> Before     src is open: look at it
//!   Before   -> Choosing   a regular file with data to copy, Span::Whole: look at dst too
//!   Choosing -> Cloning    the pair of file systems may share extents
//!   any      -> Copying    extents are walked lazily, several chunks in flight
//!   Copying  -> Ending     all data and holes landed: truncate, then fdatasync, where asked
//!   Ending   -> After      look at src again
//!   After    -> Over       unchanged: `Ok`
//!   After    -> Opening    changed: once more from the start, then `SrcChanged`
//!   any      -> Draining   a call failed: nothing new starts, what is in flight comes back first
//!
//! Every action down to `Sync` is answered by exactly one event; the others are announcements.
//! A retry never makes dst shorter than it was: readers may already use what landed. Holes are
//! punched where the first round, or an earlier job, may have left data, and the size is set at the end.

mod terms;
#[cfg(test)]
mod tests;

use std::ops::Range;

use rustix::io::Errno;

use super::job::{Durability, Span};
use crate::error::Side;
use crate::sys::stat::Stat;
pub(super) use terms::{Action, Done, Event, Failure, Limits, Offer, Piece};

/// How often a call is repeated after EINTR or EAGAIN before the errno counts as an answer.
const AGAIN_MAX: u32 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening,
    Before,
    Choosing,
    Cloning,
    Copying,
    Ending,
    After,
    Over,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    offset: u64,
    len: usize,
    filled: usize,
    written: usize,
}

/// One file's copy.
#[derive(Debug)]
pub(super) struct CopyPlan {
    span: Span,
    durability: Durability,
    limits: Limits,
    phase: Phase,
    retry: bool,
    before: Option<Stat>,
    /// What of src is to be copied in this round, and how far the walk over its extents is.
    part: Range<u64>,
    /// Data whose chunks were not issued yet; always ends at `part.start`.
    extent: Range<u64>,
    /// The hole before `extent` that is being punched.
    hole: Range<u64>,
    /// The next extent is being looked for, or room is being made for it.
    preparing: bool,
    offload: bool,
    no_punch: bool,
    /// src ended before its size: changed, whatever its times say.
    shrunk: bool,
    dst_size: u64,
    /// dst may have bytes where src has a hole.
    used: bool,
    bytes: u64,
    /// The owner is told src's bytes and holes.
    tells: bool,
    chunks: Vec<Option<Chunk>>,
    in_flight: usize,
    again: u32,
    failure: Option<Failure>,
}

impl CopyPlan {
    pub(super) fn new(span: Span, durability: Durability, limits: Limits) -> CopyPlan {
        CopyPlan {
            tells: span != Span::Whole,
            span,
            durability,
            limits,
            phase: Phase::Opening,
            retry: false,
            before: None,
            part: 0..0,
            extent: 0..0,
            hole: 0..0,
            preparing: false,
            offload: false,
            no_punch: false,
            shrunk: false,
            dst_size: 0,
            used: false,
            bytes: 0,
            chunks: vec![None; limits.chunks_max],
            in_flight: 0,
            again: 0,
            failure: None,
        }
    }

    /// Also of a whole file the owner is told what src has, if so.
    pub(super) fn telling(mut self, tells: bool) -> CopyPlan {
        self.tells |= tells;
        self
    }

    /// Takes an event; appends what is to be done now.
    pub(super) fn step(&mut self, event: Event, out: &mut Vec<Action>) {
        if !matches!(event, Event::Start | Event::Cancel) {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        match event {
            Event::Failed(action, errno) => self.failed(action, errno, out),
            Event::Cancel => self.cancel(),
            // Whatever a failed plan still hears only counts down.
            Event::Read { chunk, .. } | Event::Written { chunk, .. } if self.failure.is_some() => {
                self.free(chunk, out);
            }
            _ if self.failure.is_some() => {}
            event => {
                self.again = 0;
                self.advance(event, out);
            }
        }
        if let Some(failure) = self.failure
            && self.in_flight == 0
            && self.phase != Phase::Over
        {
            self.phase = Phase::Over;
            out.push(Action::Finish(Err(failure)));
        }
    }

    fn advance(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Start => self.ask(Action::Open { noatime: true }, out),
            Event::Opened => {
                self.phase = Phase::Before;
                self.ask(Action::StatSrc { fresh: false }, out);
            }
            Event::SrcStat(stat) if self.phase == Phase::After => self.compare(stat, out),
            Event::SrcStat(stat) => self.measure(stat, out),
            Event::DstStat {
                size, used, offer, ..
            } => {
                self.dst_size = size;
                self.used |= used;
                // Whoever reads a range is told its bytes, so they pass through here.
                let whole = self.span == Span::Whole;
                self.offload = offer.offload && whole;
                if offer.clone && whole && !self.part.is_empty() {
                    self.phase = Phase::Cloning;
                    self.ask(Action::Clone, out);
                } else {
                    self.copy(out);
                }
            }
            Event::Cloned(true) => {
                self.bytes = self.part.end;
                self.dst_size = self.dst_size.max(self.part.end);
                out.push(Action::Landed(0..self.part.end));
                self.end(out);
            }
            Event::Cloned(false) => self.copy(out),
            Event::Extent(extent) => self.extent_found(extent, out),
            Event::Preallocated => {
                self.preparing = false;
                self.fill(out);
            }
            Event::Punched(worked) => self.punched(worked, out),
            Event::CopiedRange(len) => {
                self.preparing = false;
                if len == 0 {
                    self.offload = false; // The end, or a file system that only says so: read it.
                } else {
                    let end = self.extent.end.min(self.extent.start + len);
                    let range = self.extent.start..end;
                    self.extent.start = end;
                    self.landed(range, out);
                }
                self.fill(out);
            }
            Event::Read { chunk, len } => self.was_read(chunk, len, out),
            Event::Written { chunk, len } => self.was_written(chunk, len, out),
            Event::Truncated => self.sync(out),
            Event::Synced => self.look_again(out),
            Event::Failed(..) | Event::Cancel => {} // Handled by `step`.
        }
    }

    /// src as it is before the copy: what is there to do?
    fn measure(&mut self, stat: Stat, out: &mut Vec<Action>) {
        if !stat.is_file() {
            self.failure = Some(Failure::WrongType);
            return;
        }
        self.before = Some(stat);
        self.part = match &self.span {
            Span::Whole => 0..stat.size,
            Span::Range(r) => {
                r.start.min(stat.size)..r.end.min(stat.size).max(r.start.min(stat.size))
            }
        };
        self.phase = Phase::Choosing;
        self.ask(Action::StatDst, out);
    }

    fn copy(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Copying;
        let len = self.part.end - self.part.start;
        // A file with holes has fewer blocks than bytes; a small dense one is not worth a seek.
        let dense = self
            .before
            .is_some_and(|s| s.blocks.saturating_mul(512) >= s.size);
        if len <= self.limits.small_bytes && dense && !self.offload {
            self.extent = self.part.clone();
            self.part.start = self.part.end;
        }
        self.fill(out);
    }

    /// Issues as much as may be in flight; ends the copy when all of it is done.
    fn fill(&mut self, out: &mut Vec<Action>) {
        while !self.preparing && self.failure.is_none() {
            if self.extent.is_empty() {
                if self.part.is_empty() {
                    break;
                }
                self.preparing = true;
                let (from, end) = (self.part.start, self.part.end);
                self.ask(Action::SeekData { from, end }, out);
            } else if self.offload {
                self.preparing = true;
                let offset = self.extent.start;
                let len = self.limits.offload_bytes.min(self.extent.end - offset);
                self.ask(Action::CopyRange { offset, len }, out);
            } else {
                let Some(chunk) = self.chunks.iter().position(Option::is_none) else {
                    break;
                };
                let offset = self.extent.start;
                let len = self.limits.chunk_bytes.min(self.extent.end - offset);
                self.extent.start += len;
                let len = len as usize; // At most chunk_bytes.
                self.chunks[chunk] = Some(Chunk {
                    offset,
                    len,
                    filled: 0,
                    written: 0,
                });
                self.ask(
                    Action::Read(Piece {
                        chunk,
                        offset,
                        at: 0,
                        len,
                    }),
                    out,
                );
            }
        }
        let idle = !self.preparing && self.chunks.iter().all(Option::is_none);
        if idle && self.extent.is_empty() && self.part.is_empty() && self.failure.is_none() {
            self.end(out);
        }
    }

    fn extent_found(&mut self, found: Option<Range<u64>>, out: &mut Vec<Action>) {
        self.preparing = false;
        let (at, end) = (self.part.start, self.part.end);
        let data = match found {
            Some(r) if r.start.max(at) < r.end.min(end) => r.start.max(at)..r.end.min(end),
            _ => end..end,
        };
        let hole = at..data.start;
        self.part.start = data.end;
        self.extent = data;
        if !hole.is_empty() && self.used {
            if self.no_punch {
                self.extent.start = hole.start;
            } else {
                self.preparing = true;
                self.hole = hole.clone();
                return self.ask(Action::Punch(hole), out);
            }
        } else if !hole.is_empty() {
            self.hole_landed(hole, out);
        }
        let whole_file = self.span == Span::Whole && self.extent == (0..self.part.end);
        if whole_file && !self.retry && self.part.end > self.limits.chunk_bytes && !self.offload {
            self.preparing = true;
            return self.ask(Action::Preallocate { len: self.part.end }, out);
        }
        self.fill(out);
    }

    fn punched(&mut self, worked: bool, out: &mut Vec<Action>) {
        self.preparing = false;
        let hole = std::mem::take(&mut self.hole);
        if worked {
            self.hole_landed(hole, out);
        } else {
            self.no_punch = true;
            self.extent.start = hole.start; // Read its zeros and write them.
        }
        self.fill(out);
    }

    fn was_read(&mut self, id: usize, len: usize, out: &mut Vec<Action>) {
        let Some(chunk) = self.chunks.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        chunk.filled += len;
        if len == 0 {
            self.shrunk = true;
            chunk.len = chunk.filled;
        }
        let Chunk {
            offset,
            len,
            filled,
            ..
        } = *chunk;
        if filled < len {
            let piece = Piece {
                chunk: id,
                offset: offset + filled as u64,
                at: filled,
                len: len - filled,
            };
            self.ask(Action::Read(piece), out);
        } else if len == 0 {
            self.free(id, out);
            self.fill(out);
        } else {
            if self.tells {
                out.push(Action::Data {
                    chunk: id,
                    offset,
                    len,
                });
            }
            self.ask(
                Action::Write(Piece {
                    chunk: id,
                    offset,
                    at: 0,
                    len,
                }),
                out,
            );
        }
    }

    fn was_written(&mut self, id: usize, len: usize, out: &mut Vec<Action>) {
        let Some(chunk) = self.chunks.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        chunk.written += len;
        let Chunk {
            offset,
            len: all,
            written,
            ..
        } = *chunk;
        if len == 0 {
            // No progress and no errno: another try would say the same.
            self.fail("write", Side::Dst, Errno::IO);
            self.free(id, out);
        } else if written < all {
            let (offset, len) = (offset + written as u64, all - written);
            self.ask(
                Action::Write(Piece {
                    chunk: id,
                    offset,
                    at: written,
                    len,
                }),
                out,
            );
        } else {
            self.landed(offset..offset + all as u64, out);
            self.free(id, out);
            self.fill(out);
        }
    }

    fn landed(&mut self, range: Range<u64>, out: &mut Vec<Action>) {
        self.bytes += range.end - range.start;
        self.dst_size = self.dst_size.max(range.end);
        out.push(Action::Landed(range));
    }

    fn hole_landed(&mut self, hole: Range<u64>, out: &mut Vec<Action>) {
        if self.tells {
            out.push(match self.span {
                Span::Whole => Action::Hole(hole.clone()),
                Span::Range(_) => Action::Zeros(hole.clone()),
            });
        }
        out.push(Action::Landed(hole));
    }

    fn end(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Ending;
        let size = self.before.map_or(0, |s| s.size);
        if self.span == Span::Whole && (self.dst_size != size || self.retry) {
            self.dst_size = size;
            self.ask(Action::Truncate { size }, out);
        } else {
            self.sync(out);
        }
    }

    fn sync(&mut self, out: &mut Vec<Action>) {
        match self.durability {
            Durability::Now => self.ask(Action::Sync, out),
            Durability::Later => self.look_again(out),
        }
    }

    fn look_again(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::After;
        let fresh = self.before.is_some_and(|before| before.is_asked_again());
        self.ask(Action::StatSrc { fresh }, out);
    }

    fn compare(&mut self, after: Stat, out: &mut Vec<Action>) {
        let changed = self.shrunk
            || self
                .before
                .is_none_or(|before| after.changed_since(&before));
        if !changed {
            self.phase = Phase::Over;
            out.push(Action::Finish(Ok(Done {
                src: after,
                bytes: self.bytes,
            })));
        } else if self.retry {
            self.failure = Some(Failure::SrcChanged);
        } else {
            // By name again: an editor may have renamed a new file over the one that we copied.
            if self.tells {
                out.push(Action::Again);
            }
            self.retry = true;
            self.used = true;
            self.shrunk = false;
            self.bytes = 0;
            self.phase = Phase::Opening;
            self.ask(Action::Open { noatime: true }, out);
        }
    }

    fn failed(&mut self, action: Action, errno: Errno, out: &mut Vec<Action>) {
        if let Action::Read(Piece { chunk, .. }) | Action::Write(Piece { chunk, .. }) = action
            && self.failure.is_some()
        {
            return self.free(chunk, out);
        }
        if self.failure.is_some() {
            return;
        }
        if matches!(errno, Errno::INTR | Errno::AGAIN) && self.again < AGAIN_MAX {
            self.again += 1;
            return self.ask(action, out);
        }
        match action {
            Action::Open { noatime: true } if errno == Errno::PERM => {
                self.ask(Action::Open { noatime: false }, out);
            }
            Action::Open { .. } => self.fail("openat2", Side::Src, errno),
            Action::StatSrc { .. } => self.fail("statx", Side::Src, errno),
            Action::StatDst => self.fail("statx", Side::Dst, errno),
            // Reading and writing will say what is really wrong, if anything is.
            Action::Clone => self.copy(out),
            Action::CopyRange { .. } => {
                self.preparing = false;
                self.offload = false;
                self.fill(out);
            }
            Action::SeekData { .. } => self.fail("lseek", Side::Src, errno),
            Action::Preallocate { .. } | Action::Punch(_) => {
                self.fail("fallocate", Side::Dst, errno);
            }
            Action::Read(piece) => {
                self.fail("read", Side::Src, errno);
                self.free(piece.chunk, out);
            }
            Action::Write(piece) => {
                self.fail("write", Side::Dst, errno);
                self.free(piece.chunk, out);
            }
            Action::Truncate { .. } => self.fail("ftruncate", Side::Dst, errno),
            Action::Sync => self.fail("fdatasync", Side::Dst, errno),
            Action::Data { .. }
            | Action::Zeros(_)
            | Action::Hole(_)
            | Action::Again
            | Action::Landed(_)
            | Action::Free { .. }
            | Action::Finish(_) => {} // Announcements cannot fail.
        }
    }

    fn cancel(&mut self) {
        let more = !self.extent.is_empty() || !self.part.is_empty();
        if self.phase == Phase::Copying && more && self.failure.is_none() {
            self.failure = Some(Failure::Stopped);
        }
    }

    fn fail(&mut self, call: &'static str, side: Side, errno: Errno) {
        self.failure
            .get_or_insert(Failure::Call { call, side, errno });
    }

    fn free(&mut self, chunk: usize, out: &mut Vec<Action>) {
        if self.chunks.get_mut(chunk).and_then(Option::take).is_some() {
            out.push(Action::Free { chunk });
        }
    }

    fn ask(&mut self, action: Action, out: &mut Vec<Action>) {
        self.in_flight += 1;
        out.push(action);
    }
}
