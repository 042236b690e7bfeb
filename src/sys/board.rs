//! Board: records in memory that outlives the process that writes them.
//!
//! A memory file, mapped shared. A record is one slot: it is there from one store to another (`head`), so a
//! process that is killed at any moment leaves each of its records whole or not at all, and no call is
//! made for one. What is in a slot never changes but for its count; a record that changes is another one,
//! with a higher number (`seq`), before the old one goes.
//!
//!   block 0           the number of blocks in use, the last `seq`, whether something is missing
//!   any other block   64 KiB: 64 bytes that say how large its slots are, then slots
//!   slot              head (kind, 0: free), length, count, seq, bytes
//!
//! A kill is not a power cut: every store that was made is there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::Result;

/// Address space, of which only what is used costs memory.
const SIZE: usize = 16 << 30;
const BLOCK: usize = 64 << 10;
/// Before the slots of a block; also the unit in which slots are numbered.
const UNIT: usize = 64;
/// Before the bytes of a slot.
const HEAD: usize = 24;
/// Sizes of slots, with their heads.
const CLASSES: [usize; 7] = [64, 128, 256, 512, 1024, 4096, 32768];

/// Shared memory with records.
#[derive(Debug)]
pub struct Board {
    base: NonNull<u8>,
    memory: OwnedFd,
    free: [Mutex<Vec<u32>>; CLASSES.len()],
    growing: Mutex<()>,
}

// SAFETY: the mapping lives as long as the board; what is shared in it is atomic, and the bytes of a slot
// are written by the one who has taken it from `free` before its head says that they are there.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

/// One record; it goes when this is dropped.
#[derive(Debug)]
pub struct Record {
    board: Arc<Board>,
    at: u32,
    class: u8,
}

impl Board {
    /// An empty one.
    pub fn create() -> Result<Arc<Board>> {
        let memory = rustix::fs::memfd_create(c"mirrorfs-board", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, SIZE as u64)?;
        let board = Board::map(memory)?;
        board.word(0).store(1, Ordering::Release);
        Ok(Arc::new(board))
    }

    /// The one that another process has left.
    pub fn open(memory: OwnedFd) -> Result<Arc<Board>> {
        let board = Board::map(memory)?;
        if !(1..=SIZE / BLOCK).contains(&board.blocks()) {
            return Err(Errno::BADMSG);
        }
        Ok(Arc::new(board))
    }

    fn map(memory: OwnedFd) -> Result<Board> {
        let (prot, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::NORESERVE,
        );
        // SAFETY: a new mapping at an address of the kernel's choice; the file has SIZE bytes and nobody
        // makes it shorter.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), SIZE, prot, flags, &memory, 0) }?;
        Ok(Board {
            base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?,
            memory,
            free: [const { Mutex::new(Vec::new()) }; CLASSES.len()],
            growing: Mutex::new(()),
        })
    }

    /// The memory file.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Something is not written down: nobody can go on from here any more. True the first time.
    pub fn spoil(&self) -> bool {
        self.word(16).swap(1, Ordering::AcqRel) == 0
    }

    /// Everything is written down.
    pub fn is_whole(&self) -> bool {
        self.word(16).load(Ordering::Acquire) == 0
    }

    /// Writes a record of this kind (not 0). `None`: it is too long, or there is no room; then the board
    /// is not whole any more.
    pub fn put(self: &Arc<Board>, kind: u8, count: u64, bytes: &[u8]) -> Option<Record> {
        let record = self.write(kind, count, bytes);
        if record.is_none() && self.spoil() {
            tracing::warn!("the mount is not kept any more: no room for what it is to be kept by");
        }
        record
    }

    fn write(self: &Arc<Board>, kind: u8, count: u64, bytes: &[u8]) -> Option<Record> {
        let class = CLASSES.iter().position(|c| bytes.len() + HEAD <= *c)?;
        let at = self.take(class)?;
        let slot = at as usize * UNIT;
        self.word(slot + 4)
            .store(bytes.len() as u32, Ordering::Relaxed);
        self.long(slot + 8).store(count, Ordering::Relaxed);
        let seq = self.long(8).fetch_add(1, Ordering::Relaxed);
        self.long(slot + 16).store(seq, Ordering::Relaxed);
        // SAFETY: the slot is ours (it came from `free`), and has room for so many bytes behind its head.
        unsafe {
            let to = self.base.as_ptr().add(slot + HEAD);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        self.word(slot).store(u32::from(kind), Ordering::Release);
        Some(Record {
            board: Arc::clone(self),
            at,
            class: class as u8,
        })
    }

    fn take(&self, class: usize) -> Option<u32> {
        loop {
            if let Some(at) = self.free[class].lock().pop() {
                return Some(at);
            }
            let _growing = self.growing.lock();
            let block = self.blocks();
            if (block + 1) * BLOCK > SIZE {
                return None;
            }
            self.word(block * BLOCK)
                .store(class as u32, Ordering::Relaxed);
            self.word(0).store(block as u32 + 1, Ordering::Release);
            self.free[class].lock().extend(slots(block, class).rev());
        }
    }

    fn blocks(&self) -> usize {
        self.word(0).load(Ordering::Acquire) as usize
    }

    /// Calls `look` with the kind and the bytes of every record. Nobody may write meanwhile.
    pub fn each(&self, mut look: impl FnMut(u8, &[u8])) {
        self.walk(|at, _, kind| {
            if kind != 0 {
                look(kind, self.bytes(at));
            }
        });
    }

    /// Everything that another process has left, in the order in which it was written. Once, before
    /// anything is written.
    pub fn take_over(self: &Arc<Board>) -> Vec<Record> {
        let mut all = Vec::new();
        self.walk(|at, class, kind| match kind {
            0 => self.free[class].lock().push(at),
            _ => all.push(Record {
                board: Arc::clone(self),
                at,
                class: class as u8,
            }),
        });
        all.sort_unstable_by_key(Record::seq);
        all
    }

    fn walk(&self, mut look: impl FnMut(u32, usize, u8)) {
        for block in 1..self.blocks() {
            let class = self.word(block * BLOCK).load(Ordering::Relaxed) as usize;
            if class >= CLASSES.len() {
                continue;
            }
            for at in slots(block, class) {
                let kind = self.word(at as usize * UNIT).load(Ordering::Acquire);
                look(at, class, kind as u8);
            }
        }
    }

    fn bytes(&self, at: u32) -> &[u8] {
        let slot = at as usize * UNIT;
        let len = self.word(slot + 4).load(Ordering::Relaxed) as usize;
        let len = len.min(CLASSES[CLASSES.len() - 1] - HEAD);
        // SAFETY: inside the mapping; the bytes of a slot in use do not change.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(slot + HEAD), len) }
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: inside the mapping, a multiple of 4, and used as an atomic by everybody.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        // SAFETY: inside the mapping, a multiple of 8, and used as an atomic by everybody.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody refers to it any more: each record holds the board.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), SIZE) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The slots of a block, in units.
fn slots(block: usize, class: usize) -> impl DoubleEndedIterator<Item = u32> {
    let size = CLASSES[class];
    let first = (block * BLOCK + UNIT) / UNIT;
    (0..(BLOCK - UNIT) / size).map(move |n| (first + n * size / UNIT) as u32)
}

impl Record {
    /// What it was written as.
    pub fn kind(&self) -> u8 {
        let slot = self.at as usize * UNIT;
        self.board.word(slot).load(Ordering::Acquire) as u8
    }

    /// What was written.
    pub fn bytes(&self) -> &[u8] {
        self.board.bytes(self.at)
    }

    /// A number beside the bytes that may change.
    pub fn count(&self) -> &AtomicU64 {
        self.board.long(self.at as usize * UNIT + 8)
    }

    fn seq(&self) -> u64 {
        let seq = self.board.long(self.at as usize * UNIT + 16);
        seq.load(Ordering::Relaxed)
    }

    /// Where it is written.
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// It says this from now on, or goes; at no moment does neither the old nor the new one say something.
    pub fn changed(self, bytes: &[u8]) -> Option<Record> {
        let count = self.count().load(Ordering::Relaxed);
        self.board.put(self.kind(), count, bytes)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let head = self.board.word(self.at as usize * UNIT);
        head.store(0, Ordering::Release);
        self.board.free[usize::from(self.class)]
            .lock()
            .push(self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As another process would see it.
    fn again(board: &Board) -> Arc<Board> {
        let memory = rustix::io::fcntl_dupfd_cloexec(board.memory(), 3).expect("dup");
        Board::open(memory).expect("maps")
    }

    fn left(board: &Board) -> Vec<(u8, u64, Vec<u8>)> {
        let all = again(board).take_over();
        let told = all.iter().map(|r| {
            let count = r.count().load(Ordering::Relaxed);
            (r.kind(), count, r.bytes().to_vec())
        });
        let told = told.collect();
        // They are the other board's.
        all.into_iter().for_each(std::mem::forget);
        told
    }

    #[test]
    fn what_is_written_is_left_and_what_was_dropped_is_not() {
        let board = Board::create().expect("memory");
        let one = board.put(1, 7, b"one").expect("room");
        let two = board.put(2, 0, &[9; 3000]).expect("room");
        one.count().fetch_add(1, Ordering::Relaxed);
        let want = vec![(1, 8, b"one".to_vec()), (2, 0, vec![9; 3000])];
        assert_eq!(left(&board), want);
        drop(two);
        assert_eq!(left(&board), want[..1]);
        let one = one.changed(b"another").expect("room");
        assert_eq!(left(&board), [(1, 8, b"another".to_vec())]);
        drop(one);
        assert_eq!(left(&board), []);
        assert!(board.is_whole());
        assert!(board.put(1, 0, &[0; 40_000]).is_none());
        assert!(!again(&board).is_whole());
    }

    #[test]
    fn slots_are_used_again_and_never_twice() {
        let board = Board::create().expect("memory");
        for round in 0..3u8 {
            let all: Vec<_> = (0..5000u32)
                .map(|n| board.put(1, 0, &n.to_ne_bytes()).expect("room"))
                .collect();
            let mut seen: Vec<_> = left(&board).into_iter().map(|(_, _, b)| b).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), all.len(), "round {round}");
        }
        assert!(board.blocks() < 8, "{}", board.blocks());
    }

    #[test]
    fn who_takes_over_writes_on() {
        let board = Board::create().expect("memory");
        let _one = board.put(1, 0, b"one").expect("room");
        let next = again(&board);
        let all = next.take_over();
        let two = next.put(2, 0, b"two").expect("room");
        assert_eq!(left(&next).len(), 2);
        drop((all, two));
        assert_eq!(left(&next), []);
    }
}
