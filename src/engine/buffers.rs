//! BufferPool: aligned memory for reading and writing; a fixed number, never grows (I9).
//!
//! A buffer is a value: whoever holds it is the only one who can touch its bytes. While the kernel
//! works on it the ring's slab holds it. `index` is its place in the ring's registered buffers.

use std::ops::Range;

use super::job::Priority;

/// Files up to this size need one small buffer only.
pub(super) const SMALL_BYTES: usize = 64 * 1024;

const ALIGN: usize = 4096;

/// Aligned memory with a name.
#[derive(Debug)]
pub(super) struct Buffer {
    mem: Vec<u8>,
    start: usize,
    len: usize,
    /// Place among the registered buffers.
    pub(super) index: u16,
}

impl Buffer {
    fn new(len: usize, index: u16) -> Buffer {
        let mem = vec![0u8; len + ALIGN];
        let start = mem.as_ptr().align_offset(ALIGN).min(ALIGN);
        Buffer {
            mem,
            start,
            len,
            index,
        }
    }

    /// How many bytes it holds.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Some of the bytes. An empty slice when `range` is not inside.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.mem[self.start..self.start + self.len]
            .get(range)
            .unwrap_or_default()
    }

    /// Some of the bytes, to be filled.
    pub(super) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.mem[self.start..self.start + self.len]
            .get_mut(range)
            .unwrap_or_default()
    }
}

/// One worker's buffers in two sizes.
#[derive(Debug)]
pub(super) struct BufferPool {
    small: Vec<Buffer>,
    large: Vec<Buffer>,
    small_count: usize,
    /// The last ones, that background work leaves to demand.
    small_reserve: usize,
    large_reserve: usize,
}

impl BufferPool {
    /// `small_count` buffers of [`SMALL_BYTES`], and `large_count` of `large_bytes` each.
    pub(super) fn new(small_count: usize, large_count: usize, large_bytes: usize) -> BufferPool {
        let index = |i: usize| u16::try_from(i).unwrap_or(u16::MAX);
        let small = (0..small_count)
            .map(|i| Buffer::new(SMALL_BYTES, index(i)))
            .collect();
        let large = (0..large_count)
            .map(|i| Buffer::new(large_bytes, index(small_count + i)))
            .collect();
        BufferPool {
            small,
            large,
            small_count,
            small_reserve: (small_count / 4).max(1),
            large_reserve: (large_count / 4).max(1),
        }
    }

    /// A buffer for `len` bytes, if there is one for somebody of this priority.
    pub(super) fn take(&mut self, len: usize, priority: Priority) -> Option<Buffer> {
        let (free, reserve) = if len <= SMALL_BYTES {
            (&mut self.small, self.small_reserve)
        } else {
            (&mut self.large, self.large_reserve)
        };
        let reserve = if priority == Priority::Demand {
            0
        } else {
            reserve
        };
        if free.len() > reserve {
            free.pop()
        } else {
            None
        }
    }

    /// Takes a buffer back.
    pub(super) fn give(&mut self, buffer: Buffer) {
        if usize::from(buffer.index) < self.small_count {
            self.small.push(buffer);
        } else {
            self.large.push(buffer);
        }
    }

    /// Every buffer that is free now, by index: at the start that is all of them.
    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut Buffer> {
        self.small.iter_mut().chain(self.large.iter_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn background_leaves_the_last_buffers_to_demand() {
        let mut pool = BufferPool::new(4, 4, 1 << 20);
        for len in [1, 1 << 20] {
            let mut held = Vec::new();
            while let Some(b) = pool.take(len, Priority::Background) {
                held.push(b);
            }
            assert_eq!(held.len(), 3);
            let last = pool.take(len, Priority::Demand).expect("the reserve");
            assert!(pool.take(len, Priority::Demand).is_none(), "never grows");
            held.push(last);
            held.into_iter().for_each(|b| pool.give(b));
        }
        assert_eq!((pool.small.len(), pool.large.len()), (4, 4));
    }

    #[test]
    fn buffers_are_aligned_for_direct_io() {
        let mut pool = BufferPool::new(2, 2, 1 << 18);
        for b in pool.all_mut() {
            assert_eq!(b.bytes(0..1).as_ptr() as usize % ALIGN, 0);
            let len = b.len();
            assert_eq!(b.bytes_mut(0..len).len(), len);
        }
    }
}
