//! Away: what a thread of the pool does for a worker: calls that may wait and that the ring has no
//! opcode for, and reads for which it would get other bytes.
//!
//! A FUSE server that reads around the page cache (FOPEN_DIRECT_IO) may answer a read short. io_uring
//! then asks for the rest by itself, but the kernel has not moved the position (fuse_direct_IO, seen on
//! Linux 6.18): it gets the same bytes again, and its result does not tell. So no file that is open that
//! way is read through the ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::buffers::Buffer;
use super::copy::{Action, Event, Piece};
use super::worker::Worker;
use crate::sys;

/// What a thread of the pool has done for a worker.
pub(super) struct Brought {
    pub(super) slot: usize,
    pub(super) event: Event,
    /// A buffer that was away with it, of this chunk.
    pub(super) buffer: Option<(usize, Buffer)>,
}

impl Worker {
    /// Makes a call that the ring has no opcode for: `here`, or on a thread of the pool.
    pub(super) fn on_pool(
        &mut self,
        slot: usize,
        here: bool,
        action: Action,
        f: impl FnOnce(&OwnedFd, &OwnedFd) -> sys::Result<Event> + Send + 'static,
    ) -> Option<Event> {
        let file = self.files[slot].as_ref()?;
        let Some(src) = file.src.clone() else {
            return Some(Event::Failed(action, Errno::BADF)); // A plan works on what it has opened.
        };
        let (dst, priority) = (Arc::clone(&file.dst), file.priority);
        let event = move || {
            let event = f(&src, &dst).unwrap_or_else(|errno| Event::Failed(action, errno));
            drop((src, dst)); // The worker closes src.
            event
        };
        if here {
            return Some(event());
        }
        let (shared, index) = (Arc::clone(&self.shared), self.index());
        let task = move || {
            let event = event();
            shared.bells[index].deliver(Brought {
                slot,
                event,
                buffer: None,
            });
        };
        self.pool.run(priority, Box::new(task));
        None
    }

    /// Whether this file's data is read away.
    pub(super) fn reads_away(&mut self, slot: usize) -> bool {
        if self.ring.is_none() {
            return false;
        }
        let Some(file) = self.files[slot].as_mut() else {
            return false;
        };
        if let Some(away) = file.away {
            return away;
        }
        let source = file.source;
        let fuse = self.fuse.entry(source);
        let fuse = *fuse.or_insert_with(|| sys::host::is_fuse(source));
        let around = |src: &Arc<OwnedFd>| sys::fd::is_read_around_cache(src.as_fd());
        let away = fuse && file.src.as_ref().is_some_and(around);
        file.away = Some(away);
        away
    }

    /// Reads into the chunk's buffer on a thread of the pool.
    pub(super) fn read_away(&mut self, slot: usize, piece: Piece, len: usize) -> Option<Event> {
        let file = self.files[slot].as_mut()?;
        let src = Arc::clone(file.src.as_ref()?);
        let Piece {
            chunk, offset, at, ..
        } = piece;
        let mut buffer = file.buffers[chunk].take()?;
        let priority = file.priority;
        let (shared, index) = (Arc::clone(&self.shared), self.index());
        let task = move || {
            let read = sys::fd::pread_some(src.as_fd(), buffer.bytes_mut(at..at + len), offset);
            drop(src); // The worker closes it.
            let event = match read {
                Ok(len) => Event::Read { chunk, len },
                Err(errno) => Event::Failed(Action::Read(piece), errno),
            };
            shared.bells[index].deliver(Brought {
                slot,
                event,
                buffer: Some((chunk, buffer)),
            });
        };
        self.pool.run(priority, Box::new(task));
        None
    }

    /// Takes back what came from the pool.
    pub(super) fn take_brought(&mut self) -> Vec<(usize, Event)> {
        let brought = self.bell().take_results();
        let back = brought.into_iter().map(|b| {
            if let (Some(file), Some((chunk, buffer))) = (self.files[b.slot].as_mut(), b.buffer) {
                file.buffers[chunk] = Some(buffer);
            }
            (b.slot, b.event)
        });
        back.collect()
    }
}
