//! BufferPool: aligned memory for reading and writing; a fixed number, never grows (I9).
//!
//! A buffer is a value: whoever holds it is the only one who can touch its bytes. While the kernel
//! works on it the ring's slab holds it. A pool's buffers can be registered with one ring
//! ([`Ring::register`](super::ring::Ring::register)); by pool and index the ring knows them again.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use super::job::Priority;

/// Files up to this size need one small buffer only.
pub const SMALL_BYTES: usize = 64 * 1024;

const ALIGN: usize = 4096;

/// Aligned memory with a name.
#[derive(Debug)]
pub struct Buffer {
    mem: Vec<u8>,
    start: usize,
    len: usize,
    /// Place in its pool.
    pub(super) index: u16,
    /// Its pool's number.
    pool: u64,
}

impl Buffer {
    fn new(len: usize, index: u16, pool: u64) -> Buffer {
        let mem = vec![0u8; len + ALIGN];
        let start = mem.as_ptr().align_offset(ALIGN).min(ALIGN);
        Buffer {
            mem,
            start,
            len,
            index,
            pool,
        }
    }

    /// Which pool it was made in.
    pub(super) fn pool(&self) -> u64 {
        self.pool
    }

    /// How many bytes it holds.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Some of the bytes. An empty slice when `range` is not inside.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.mem[self.start..self.start + self.len]
            .get(range)
            .unwrap_or_default()
    }

    /// Some of the bytes, to be filled.
    pub fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.mem[self.start..self.start + self.len]
            .get_mut(range)
            .unwrap_or_default()
    }
}

/// One worker's buffers in two sizes.
#[derive(Debug)]
pub struct BufferPool {
    /// Never used again while the process runs.
    id: u64,
    small: Vec<Buffer>,
    large: Vec<Buffer>,
    /// Large ones that take the place of those that are lent, and those that have come back.
    spare: Vec<Buffer>,
    home: Arc<Mutex<Vec<Buffer>>>,
    small_count: usize,
    large_count: usize,
    /// The last ones, that background work leaves to demand.
    small_reserve: usize,
    large_reserve: usize,
}

/// A buffer whose bytes somebody else still needs. It goes home when this is dropped, on whatever thread.
#[derive(Debug)]
pub struct Lent {
    buffer: Option<Buffer>,
    len: usize,
    home: Arc<Mutex<Vec<Buffer>>>,
}

impl Lent {
    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        self.buffer
            .as_ref()
            .map_or(&[], |buffer| buffer.bytes(0..self.len))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.lock().extend(self.buffer.take());
    }
}

impl BufferPool {
    /// `small_count` buffers of [`SMALL_BYTES`], and `large_count` of `large_bytes` each.
    /// Sizes are rounded up to a page of 4096 bytes, and buffers begin at one, as O_DIRECT wants it.
    pub fn new(small_count: usize, large_count: usize, large_bytes: usize) -> BufferPool {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Relaxed);
        let large_bytes = large_bytes.max(1).next_multiple_of(ALIGN);
        let index = |i: usize| u16::try_from(i).unwrap_or(u16::MAX);
        let small = (0..small_count)
            .map(|i| Buffer::new(SMALL_BYTES, index(i), id))
            .collect();
        let large = (0..large_count)
            .map(|i| Buffer::new(large_bytes, index(small_count + i), id))
            .collect();
        BufferPool {
            id,
            small,
            large,
            spare: Vec::new(),
            home: Arc::default(),
            small_count,
            large_count,
            small_reserve: (small_count / 4).max(1),
            large_reserve: (large_count / 4).max(1),
        }
    }

    /// As many more large ones, for `lend`. To be asked before anything else.
    pub fn with_spares(mut self, count: usize, large_bytes: usize) -> BufferPool {
        let large_bytes = large_bytes.max(1).next_multiple_of(ALIGN);
        let from = self.small_count + self.large_count;
        let index = |i: usize| u16::try_from(from + i).unwrap_or(u16::MAX);
        self.spare = (0..count)
            .map(|i| Buffer::new(large_bytes, index(i), self.id))
            .collect();
        self
    }

    /// Takes back a large buffer and lends its first `len` bytes to somebody else; a spare one takes its
    /// place, so that nobody finds fewer. `Err`: there is none, and nothing has happened.
    pub fn lend(&mut self, buffer: Buffer, len: usize) -> Result<Lent, Buffer> {
        if self.spare.is_empty() {
            self.spare.append(&mut self.home.lock());
        }
        let large = buffer.pool == self.id && usize::from(buffer.index) >= self.small_count;
        let Some(spare) = self.spare.pop_if(|_| large) else {
            return Err(buffer);
        };
        self.large.push(spare);
        Ok(Lent {
            buffer: Some(buffer),
            len,
            home: Arc::clone(&self.home),
        })
    }

    /// A buffer for `len` bytes, if there is one for somebody of this priority: a quarter of each size
    /// (at least one) is for demand alone. Its content is what it held last.
    pub fn take(&mut self, len: usize, priority: Priority) -> Option<Buffer> {
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

    /// Takes a buffer back. One of another pool is freed.
    pub fn give(&mut self, buffer: Buffer) {
        if buffer.pool != self.id {
            return;
        }
        if usize::from(buffer.index) < self.small_count {
            self.small.push(buffer);
        } else {
            self.large.push(buffer);
        }
    }

    /// The number that its buffers carry.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// True while every buffer is in its place, as at the start.
    pub(super) fn is_untouched(&self) -> bool {
        let free = self.small.iter().chain(&self.large).chain(&self.spare);
        let indices = free.map(|b| usize::from(b.index));
        indices.eq(0..self.small_count + self.large_count + self.spare.len())
    }

    /// Every buffer that is free now, by index as long as the pool is untouched.
    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut Buffer> {
        let large = self.large.iter_mut().chain(self.spare.iter_mut());
        self.small.iter_mut().chain(large)
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
    fn what_is_lent_is_missed_by_nobody_and_comes_home() {
        let mut pool = BufferPool::new(2, 2, 1 << 18).with_spares(2, 1 << 18);
        assert!(pool.is_untouched());
        let demand = |pool: &mut BufferPool, len| pool.take(len, Priority::Demand);
        let small = demand(&mut pool, 1).expect("small");
        pool.lend(small, 1)
            .expect_err("of the small ones none is lent");
        let mut lent = Vec::new();
        for byte in 0..2 {
            let mut buffer = demand(&mut pool, 1 << 18).expect("all of them, still");
            buffer.bytes_mut(0..1).fill(byte);
            lent.push(pool.lend(buffer, 1).expect("a spare one"));
            assert_eq!(pool.large.len(), 2);
        }
        let buffer = demand(&mut pool, 1 << 18).expect("large");
        let buffer = pool.lend(buffer, 1).expect_err("no more spare ones");
        assert_eq!((lent[0].bytes(), lent[1].bytes()), (&[0][..], &[1][..]));
        lent.pop();
        pool.lend(buffer, 1).expect("the one that came home");
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
