//! Keep: pieces whose owner needs their bytes after they were written, and does not want to copy them.
//!
//!   tell_data    read: the owner is told its bytes, or says that it will have them later
//!   free_chunk   written: the buffer is lent to the owner, and a spare one takes its place

use super::worker::{Worker, call};

impl Worker {
    /// Bytes of a chunk were read, and are in its buffer.
    pub(super) fn tell_data(&mut self, slot: usize, chunk: usize, offset: u64, len: usize) {
        let Some(file) = self.files[slot].as_mut() else {
            return;
        };
        let Some(buffer) = &file.buffers[chunk] else {
            return;
        };
        if call(&file.path, || file.done.keeps(len)) == Some(true) {
            file.keeps[chunk] = Some((offset, len));
        } else {
            call(&file.path, || file.done.data(offset, buffer.bytes(0..len)));
        }
    }

    /// A chunk is over.
    pub(super) fn free_chunk(&mut self, slot: usize, chunk: usize) {
        let Some(file) = self.files[slot].as_mut() else {
            return;
        };
        let keeps = file.keeps[chunk].take();
        let Some(buffer) = file.buffers[chunk].take() else {
            return;
        };
        let Some((offset, len)) = keeps else {
            return self.buffers.give(buffer);
        };
        let lent = match self.buffers.lend(buffer, len) {
            Ok(lent) => Some(lent),
            Err(buffer) => {
                self.buffers.give(buffer);
                None
            }
        };
        call(&file.path, || file.done.kept(offset, lent));
    }
}
