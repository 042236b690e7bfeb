//! Digest: BLAKE3, also of a file whose blocks are read in any order by several threads.
//!
//! BLAKE3 is a tree: a block of 2^n KiB that begins at a multiple of its length is a subtree, whose
//! value depends on its bytes and its offset only. So each block is hashed where it is read, and the
//! values are put together at the end: the result is what b3sum(1) says of the whole file.

use std::fmt;

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use parking_lot::Mutex;

use crate::sys::stat::Stat;

/// Bytes of one block of a [`Tree`].
pub const BLOCK: u64 = 1 << 20;

/// Zeros in holes take as long as bytes in memory: half an hour for so many of them, on one processor.
const HOLES_MAX: u64 = 4 << 40;

/// False for a file that has no digest, because almost all of it is a hole, and that is too large.
pub fn is_hashed(stat: &Stat) -> bool {
    stat.size.saturating_sub(stat.blocks.saturating_mul(512)) <= HOLES_MAX
}

/// The BLAKE3 of a file's bytes, holes as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of bytes that are all in memory.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// From 64 hexadecimal digits; `None`: they are not.
    pub fn from_hex(text: &[u8]) -> Option<Digest> {
        let hash = blake3::Hash::from_hex(text).ok()?;
        Some(Digest(*hash.as_bytes()))
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Digest {
        Digest(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The digest of a file of a known size whose parts come in any order: 32 bytes for each MiB.
pub struct Tree {
    size: u64,
    blocks: Mutex<Vec<Option<ChainingValue>>>,
    /// Of a file that is one block: it is the root.
    only: Mutex<Option<Digest>>,
}

/// A part of a file: its bytes come in their order.
pub struct Feed {
    /// On the heap: it is 2 KiB, and a part is handed on.
    hasher: Box<blake3::Hasher>,
    /// Up to here, from the last multiple of [`BLOCK`].
    at: u64,
    /// Something came in another order: there is no value.
    lost: bool,
}

impl Tree {
    /// Of a file of so many bytes.
    pub fn new(size: u64) -> Tree {
        let blocks = match size > BLOCK {
            true => usize::try_from(size.div_ceil(BLOCK)).unwrap_or(usize::MAX),
            false => 0,
        };
        Tree {
            size,
            blocks: Mutex::new(vec![None; blocks]),
            only: Mutex::new((size == 0).then(|| Digest::of(&[]))),
        }
    }

    /// For the part that begins at `offset`, a multiple of [`BLOCK`]: without, its digest stays unknown.
    pub fn feed(&self, offset: u64) -> Feed {
        let mut hasher = Box::new(blake3::Hasher::new());
        if offset.is_multiple_of(BLOCK) {
            hasher.set_input_offset(offset);
        }
        Feed {
            hasher,
            at: offset,
            lost: !offset.is_multiple_of(BLOCK),
        }
    }

    /// The next bytes of a part, at `offset` of the file; what is between is a hole.
    pub fn bytes(&self, feed: &mut Feed, offset: u64, bytes: &[u8]) {
        self.zeros(feed, offset);
        self.next(feed, bytes);
    }

    /// A hole of a part, up to `offset` of the file.
    pub fn zeros(&self, feed: &mut Feed, offset: u64) {
        feed.lost |= offset < feed.at;
        while feed.at < offset && !feed.lost {
            let left = usize::try_from(offset - feed.at).unwrap_or(usize::MAX);
            self.next(feed, &ZEROS[..left.min(ZEROS.len())]);
        }
    }

    fn next(&self, feed: &mut Feed, mut bytes: &[u8]) {
        feed.lost |= bytes.len() as u64 > self.size.saturating_sub(feed.at);
        while !bytes.is_empty() && !feed.lost {
            let end = (feed.at / BLOCK + 1) * BLOCK;
            let left = usize::try_from(end - feed.at).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(left.min(bytes.len()));
            feed.hasher.update(now);
            feed.at += now.len() as u64;
            bytes = rest;
            if feed.at == end || feed.at == self.size {
                self.block(feed);
            }
        }
    }

    /// A block is whole.
    fn block(&self, feed: &mut Feed) {
        if self.size <= BLOCK {
            *self.only.lock() = Some(Digest(*feed.hasher.finalize().as_bytes()));
            return;
        }
        let at = usize::try_from((feed.at - 1) / BLOCK).unwrap_or(usize::MAX);
        if let Some(slot) = self.blocks.lock().get_mut(at) {
            *slot = Some(feed.hasher.finalize_non_root());
        }
        if feed.at < self.size {
            // Anew: one that has an offset cannot be reset to another.
            *feed.hasher = blake3::Hasher::new();
            feed.hasher.set_input_offset(feed.at);
        }
    }

    /// Of the whole file; `None`: not all of it was there.
    pub fn digest(&self) -> Option<Digest> {
        if self.size <= BLOCK {
            return *self.only.lock();
        }
        let blocks: Option<Vec<ChainingValue>> = self.blocks.lock().iter().copied().collect();
        let blocks = blocks?;
        let (left, right) = halves(&blocks, self.size);
        let (left, right) = (subtree(left.0, left.1), subtree(right.0, right.1));
        let root = hazmat::merge_subtrees_root(&left, &right, Mode::Hash);
        Some(Digest(*root.as_bytes()))
    }
}

/// The two subtrees of more than one block: their blocks, their bytes.
fn halves(blocks: &[ChainingValue], size: u64) -> (Part<'_>, Part<'_>) {
    let left = hazmat::left_subtree_len(size);
    // A power of two, and not less than a block: there is more than one.
    let at = usize::try_from(left / BLOCK).unwrap_or(usize::MAX);
    let (a, b) = blocks.split_at(at.min(blocks.len()));
    ((a, left), (b, size - left))
}

/// Blocks that are a subtree, and how many bytes it has.
type Part<'a> = (&'a [ChainingValue], u64);

/// As deep as the number of blocks has bits.
fn subtree(blocks: &[ChainingValue], size: u64) -> ChainingValue {
    match blocks {
        [one] => *one,
        _ => {
            let (left, right) = halves(blocks, size);
            let (left, right) = (subtree(left.0, left.1), subtree(right.0, right.1));
            hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}
