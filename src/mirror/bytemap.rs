//! ByteMap: which blocks of a pending file are users' own, in memory and in `.mirrorfs/maps/INO`.
//!
//!   None    -> Weak     claim()    before the bytes are written: src's must not come here any more
//!   Weak    -> Written  written()  the bytes are in dst's page cache (in memory only; in the file Weak)
//!   Weak    -> None     release()  the write failed
//!   Written -> Sure     promote()  the bytes were durable before the file says so
//!   any     -> Sure     sure()     the block is a hole on purpose
//!
//! Two bits a block. What a crash leaves as Weak counts where dst has data there, and only there
//! (`believe`): then the map may be durable before the bytes, and never shows zeros for it. Sure counts
//! whatever dst has. Lock order: a leaf; the file is written under it (bytes in the page cache).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::node::Ino;
use super::salvage::pulled;
use crate::sys::name::Name;
use crate::sys::{copy, fd, stat};

/// Bytes of a block: the page size and the block size of every file system that may hold a map.
pub(super) const BLOCK: u64 = 4096;
/// Blocks of one piece in memory, 64 MiB of the file.
const PIECE_BLOCKS: u64 = 4 * PIECE_BYTES as u64;
const PIECE_BYTES: usize = 4096;

const NONE: u8 = 0;
const WEAK: u8 = 1;
const SURE: u8 = 2;
const WRITTEN: u8 = 3;

type Piece = [u8; PIECE_BYTES];

/// The map of one file.
#[derive(Debug)]
pub(super) struct ByteMap {
    file: OwnedFd,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pieces: BTreeMap<u64, Box<Piece>>,
    /// Pieces with Written blocks.
    fresh: BTreeSet<u64>,
}

/// The blocks that were Written at one moment.
pub(super) struct Snapshot(Vec<(u64, Box<Piece>)>);

/// The bytes of the whole blocks around `range`.
pub(super) fn blocks(range: &Range<u64>) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(BLOCK);
    range.start / BLOCK * BLOCK..end.unwrap_or(u64::MAX)
}

impl ByteMap {
    /// A new, empty one; it is durable after `sync_in`. What an earlier inode with this number has left
    /// goes, and then the new one is durable at once: they must not be mistaken for each other.
    pub(super) fn create(dir: BorrowedFd<'_>, ino: Ino) -> Result<ByteMap, Errno> {
        let is_other = remove(dir, ino)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let name = name_of(ino)?;
        let file = rustix::fs::openat(dir, name.as_cstr(), flags, Mode::from_raw_mode(0o600))?;
        let map = ByteMap {
            file,
            inner: Mutex::default(),
        };
        if is_other {
            map.sync_in(dir)?;
        }
        Ok(map)
    }

    /// Makes the map and its name durable.
    pub(super) fn sync_in(&self, dir: BorrowedFd<'_>) -> Result<(), Errno> {
        fd::fsync(self.file.as_fd())?;
        fd::fsync(dir)
    }

    /// The one of a file that a map belongs to. ENOENT: it is lost.
    pub(super) fn open(dir: BorrowedFd<'_>, ino: Ino) -> Result<ByteMap, Errno> {
        let file = fd::open_at(dir, &name_of(ino)?, OFlags::RDWR)?;
        let size = stat::stat_fd(file.as_fd())?.size;
        let mut pieces = BTreeMap::new();
        let mut at = 0;
        while let Some(data) = copy::next_data(file.as_fd(), at, size)? {
            let first = data.start / PIECE_BYTES as u64;
            at = data.end.next_multiple_of(PIECE_BYTES as u64);
            for index in first..at / PIECE_BYTES as u64 {
                let mut piece = Box::new([0; PIECE_BYTES]);
                fd::pread_all(file.as_fd(), &mut piece[..], index * PIECE_BYTES as u64)?;
                pieces.insert(index, piece);
            }
        }
        let inner = Inner {
            pieces,
            fresh: BTreeSet::new(),
        };
        Ok(ByteMap {
            file,
            inner: Mutex::new(inner),
        })
    }

    /// After a restart: of what is Weak, the blocks with data in dst are the users', the others not.
    pub(super) fn believe(&self, dst: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        let indices: Vec<u64> = inner.pieces.keys().copied().collect();
        for index in indices {
            let base = index * PIECE_BLOCKS * BLOCK;
            let mut data = 0..0;
            for block in 0..PIECE_BLOCKS {
                if inner.get(index, block) != WEAK {
                    continue;
                }
                let at = base + block * BLOCK;
                if at >= data.end {
                    data = copy::next_data(dst, at, size)?.unwrap_or(u64::MAX..u64::MAX);
                }
                let state = if data.start <= at { WRITTEN } else { NONE };
                inner.put(index, block, state);
            }
        }
        Ok(())
    }

    /// Takes the blocks of a range for users; those that were free before come back.
    pub(super) fn claim(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
        let mut inner = self.inner.lock();
        let mut new: Vec<Range<u64>> = Vec::new();
        each(range, |index, block, at| {
            if inner.get(index, block) == NONE {
                inner.put(index, block, WEAK);
                match new.last_mut() {
                    Some(last) if last.end == at => last.end = at + BLOCK,
                    _ => new.push(at..at + BLOCK),
                }
            }
        });
        for part in &new {
            if let Err(errno) = self.store(&inner, part) {
                for part in &new {
                    each(part, |index, block, _| inner.put(index, block, NONE));
                }
                return Err(errno);
            }
        }
        Ok(new)
    }

    /// The bytes of a claimed range are in dst.
    pub(super) fn written(&self, range: &Range<u64>) {
        let mut inner = self.inner.lock();
        each(range, |index, block, _| {
            if inner.get(index, block) == WEAK {
                inner.put(index, block, WRITTEN);
            }
        });
    }

    /// Gives back what was claimed and not written.
    pub(super) fn release(&self, claimed: &[Range<u64>]) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        for part in claimed {
            each(part, |index, block, _| {
                if inner.get(index, block) == WEAK {
                    inner.put(index, block, NONE);
                }
            });
            self.store(&inner, part)?;
        }
        Ok(())
    }

    /// The blocks are users' whatever dst has there.
    pub(super) fn sure(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        each(range, |index, block, _| inner.put(index, block, SURE));
        self.store(&inner, range)
    }

    /// What is Written now: after a sync of dst's file it may be promoted.
    pub(super) fn snapshot(&self) -> Snapshot {
        let inner = self.inner.lock();
        let of = |index: &u64| Some((*index, inner.pieces.get(index)?.clone()));
        Snapshot(inner.fresh.iter().filter_map(of).collect())
    }

    /// dst's file was synced after the snapshot was taken.
    pub(super) fn promote(&self, snapshot: &Snapshot) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        for (index, old) in &snapshot.0 {
            let mut changed: Option<Range<u64>> = None;
            for block in 0..PIECE_BLOCKS {
                let now = inner.get(*index, block);
                if bits(old, block) == WRITTEN && matches!(now, WEAK | WRITTEN) {
                    inner.put(*index, block, SURE);
                    changed = Some(changed.map_or(block, |c| c.start)..block + 1);
                }
            }
            if let Some(changed) = changed {
                let base = index * PIECE_BLOCKS;
                let part = (base + changed.start) * BLOCK..(base + changed.end) * BLOCK;
                self.store(&inner, &part)?;
            }
            let left = (0..PIECE_BLOCKS).any(|block| inner.get(*index, block) == WRITTEN);
            if !left {
                inner.fresh.remove(index);
            }
        }
        Ok(())
    }

    /// Makes the map durable.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        fd::fdatasync(self.file.as_fd())
    }

    /// True when a block of the range may be taken back by a power cut.
    pub(super) fn has_weak(&self, range: &Range<u64>) -> bool {
        let inner = self.inner.lock();
        let mut weak = false;
        each_known(&inner, range, |state| {
            weak |= matches!(state, WEAK | WRITTEN)
        });
        weak
    }

    /// No block is a user's.
    pub(super) fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        let mut bytes = inner.pieces.values().flat_map(|piece| piece.iter());
        bytes.all(|byte| *byte == 0)
    }

    /// The first run of blocks in `range` (clipped to it) that are not the users'.
    pub(super) fn first_free(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let inner = self.inner.lock();
        let start = inner.skip(range.start, range.end, |state| state != NONE)?;
        let end = inner.skip(start, range.end, |state| state == NONE);
        Some(start..end.unwrap_or(range.end))
    }

    fn store(&self, inner: &Inner, range: &Range<u64>) -> Result<(), Errno> {
        let range = blocks(range);
        let (mut first, last) = (range.start / BLOCK / 4, (range.end / BLOCK).div_ceil(4));
        let len = PIECE_BYTES as u64;
        while first < last {
            let end = last.min((first / len + 1) * len);
            if let Some(piece) = inner.pieces.get(&(first / len)) {
                let at = (first % len) as usize..((end - 1) % len + 1) as usize;
                let bytes: Vec<u8> = piece[at].iter().map(|b| on_disk(*b)).collect();
                fd::pwrite_all(self.file.as_fd(), &bytes, first)?;
            }
            first = end;
        }
        Ok(())
    }
}

/// True when there is one.
pub(super) fn is_there(dir: BorrowedFd<'_>, ino: Ino) -> Result<bool, Errno> {
    match stat::stat_at(dir, name_of(ino)?.as_cstr()) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The map is of no use any more, nor is what was recorded beside it. True when there was one of them.
pub(super) fn remove(dir: BorrowedFd<'_>, ino: Ino) -> Result<bool, Errno> {
    // In this order: a record without a map is nobody's.
    let map = remove_map(dir, ino)?;
    Ok(pulled::remove(dir, ino)? || map)
}

fn remove_map(dir: BorrowedFd<'_>, ino: Ino) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(dir, name_of(ino)?.as_cstr(), AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn name_of(ino: Ino) -> Result<Name, Errno> {
    Name::new(format!("{ino:x}").as_bytes()).ok_or(Errno::INVAL)
}

fn bits(piece: &Piece, block: u64) -> u8 {
    piece[(block / 4) as usize] >> (block % 4 * 2) & 3
}

/// Written is Weak on disk, in each of four pairs of bits.
fn on_disk(byte: u8) -> u8 {
    byte & !((byte & 0x55) << 1)
}

/// Calls `f` with piece, block in it and offset of each block of a range; an empty range has none.
fn each(range: &Range<u64>, mut f: impl FnMut(u64, u64, u64)) {
    if range.is_empty() {
        return;
    }
    for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
        f(block / PIECE_BLOCKS, block % PIECE_BLOCKS, block * BLOCK);
    }
}

/// As `each`, with the states of those that are not None for want of a piece.
fn each_known(inner: &Inner, range: &Range<u64>, mut f: impl FnMut(u8)) {
    let (first, last) = (range.start / BLOCK, range.end.div_ceil(BLOCK));
    for (index, piece) in inner.pieces.range(first / PIECE_BLOCKS..) {
        let base = index * PIECE_BLOCKS;
        if base >= last {
            break;
        }
        for block in first.max(base)..last.min(base + PIECE_BLOCKS) {
            f(bits(piece, block - base));
        }
    }
}

impl Inner {
    fn get(&self, index: u64, block: u64) -> u8 {
        self.pieces.get(&index).map_or(NONE, |p| bits(p, block))
    }

    fn put(&mut self, index: u64, block: u64, state: u8) {
        let piece = self
            .pieces
            .entry(index)
            .or_insert_with(|| Box::new([0; PIECE_BYTES]));
        let byte = &mut piece[(block / 4) as usize];
        let shift = block % 4 * 2;
        *byte = *byte & !(3 << shift) | state << shift;
        if state == WRITTEN {
            self.fresh.insert(index);
        }
    }

    /// The first offset from `from` on whose block is not to be skipped.
    fn skip(&self, from: u64, end: u64, skips: impl Fn(u8) -> bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let block = at / BLOCK;
            let (index, inside) = (block / PIECE_BLOCKS, block % PIECE_BLOCKS);
            match self.pieces.get(&index) {
                None if !skips(NONE) => return Some(at),
                None => at = (index + 1) * PIECE_BLOCKS * BLOCK,
                Some(piece) if !skips(bits(piece, inside)) => return Some(at),
                Some(_) => at = (block + 1) * BLOCK,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scratch() -> (tempfile::TempDir, std::fs::File) {
        let dir = tempfile::tempdir().expect("a directory");
        let opened = std::fs::File::open(dir.path()).expect("opens");
        (dir, opened)
    }

    fn at(block: u64) -> u64 {
        block * BLOCK
    }

    #[test]
    fn weak_counts_only_where_dst_has_data_and_sure_always() {
        let (tree, dir) = scratch();
        let dst = std::fs::File::create_new(tree.path().join("dst")).expect("creates");
        dst.set_len(at(100_000)).expect("sets its size");
        let open = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(tree.path().join("dst"))
            .expect("opens");
        let map = ByteMap::create(dir.as_fd(), 7).expect("creates");
        map.claim(&(at(1)..at(9))).expect("claims");
        map.claim(&(at(70_000)..at(70_001))).expect("claims");
        map.sure(&(at(20)..at(22))).expect("is sure");
        fd::pwrite_all(open.as_fd(), &[1; 4096], at(3)).expect("writes");
        fd::pwrite_all(open.as_fd(), &[1; 4096], at(30)).expect("writes");
        let again = ByteMap::open(dir.as_fd(), 7).expect("opens");
        again.believe(open.as_fd(), at(100_000)).expect("believes");
        let mut owned = Vec::new();
        let mut from = 0;
        while let Some(free) = again.first_free(&(from..at(100_000))) {
            if free.start > from {
                owned.push(from / BLOCK..free.start / BLOCK);
            }
            from = free.end;
        }
        assert_eq!(owned, [3..4, 20..22]);
        assert!(again.has_weak(&(at(3)..at(4))) && !again.has_weak(&(at(20)..at(99))));
        let seen = again.snapshot();
        again.promote(&seen).expect("promotes");
        assert!(!again.has_weak(&(0..at(100_000))));
        ByteMap::create(dir.as_fd(), 7).expect("replaces a stale one");
        let empty = ByteMap::open(dir.as_fd(), 7).expect("opens");
        assert_eq!(
            empty.first_free(&(0..at(100_000))),
            Some(0..at(100_000)),
            "a new map knows nothing of the old one"
        );
    }

    #[test]
    fn an_empty_range_claims_nothing() {
        let (_tree, dir) = scratch();
        let map = ByteMap::create(dir.as_fd(), 1).expect("creates");
        assert_eq!(map.claim(&(5000..5000)), Ok(Vec::new()));
        map.sure(&(5000..5000)).expect("is sure");
        assert_eq!(map.first_free(&(0..at(9))), Some(0..at(9)));
    }

    #[test]
    fn what_was_written_after_the_snapshot_is_not_promoted() {
        let (_tree, dir) = scratch();
        let map = ByteMap::create(dir.as_fd(), 1).expect("creates");
        map.claim(&(0..at(3))).expect("claims");
        map.written(&(0..at(1)));
        let seen = map.snapshot();
        map.written(&(at(1)..at(2)));
        map.promote(&seen).expect("promotes");
        assert!(!map.has_weak(&(0..at(1))));
        assert!(map.has_weak(&(at(1)..at(2))) && map.has_weak(&(at(2)..at(3))));
        let next = map.snapshot();
        map.promote(&next).expect("promotes");
        assert!(!map.has_weak(&(0..at(2))) && map.has_weak(&(at(2)..at(3))));
    }

    proptest! {
        #[test]
        fn the_file_says_what_memory_says(
            ops in prop::collection::vec((0u8..4, 16_380u64..16_390, 1u64..40), 1..40),
        ) {
            let (_tree, dir) = scratch();
            let map = ByteMap::create(dir.as_fd(), 1).expect("creates");
            let mut model = vec![NONE; 20_000];
            for (what, first, len) in ops {
                let range = at(first)..at(first + len);
                let slots = &mut model[first as usize..(first + len) as usize];
                match what {
                    0 => {
                        map.claim(&range).expect("claims");
                        slots.iter_mut().filter(|s| **s == NONE).for_each(|s| *s = WEAK);
                    }
                    1 => {
                        map.written(&range);
                        slots.iter_mut().filter(|s| **s == WEAK).for_each(|s| *s = WRITTEN);
                    }
                    2 => {
                        map.sure(&range).expect("is sure");
                        slots.fill(SURE);
                    }
                    _ => {
                        let seen = map.snapshot();
                        map.promote(&seen).expect("promotes");
                        model.iter_mut().filter(|s| **s == WRITTEN).for_each(|s| *s = SURE);
                    }
                }
            }
            let again = ByteMap::open(dir.as_fd(), 1).expect("opens");
            for (block, state) in model.iter().enumerate() {
                let get = |map: &ByteMap| {
                    let b = block as u64;
                    map.inner.lock().get(b / PIECE_BLOCKS, b % PIECE_BLOCKS)
                };
                prop_assert_eq!(get(&map), *state);
                let stored = if *state == WRITTEN { WEAK } else { *state };
                prop_assert_eq!(get(&again), stored);
            }
        }
    }
}
