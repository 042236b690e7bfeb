//! Stream: BLAKE3 of a file whose pieces come almost in their order, as several reads in flight bring them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Digest;

/// So many pieces may be ahead of the one that is waited for.
const AHEAD_MAX: usize = 32;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file on its way.
pub struct Stream {
    hasher: Box<blake3::Hasher>,
    /// All before this was hashed.
    at: u64,
    ahead: BTreeMap<u64, Piece>,
    /// A piece came twice, or too many came early: there is no digest.
    lost: bool,
}

enum Piece {
    Bytes(Vec<u8>),
    /// A hole, up to this offset.
    Hole(u64),
}

impl Default for Stream {
    fn default() -> Stream {
        Stream {
            hasher: Box::new(blake3::Hasher::new()),
            at: 0,
            ahead: BTreeMap::new(),
            lost: false,
        }
    }
}

impl Stream {
    /// Bytes that were read at an offset.
    pub fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        if offset == self.at && !self.lost {
            self.next(bytes);
            self.follow();
        } else {
            self.hold(offset, || Piece::Bytes(bytes.to_vec()));
        }
    }

    /// What src has no data in.
    pub fn hole(&mut self, range: Range<u64>) {
        self.hold(range.start, || Piece::Hole(range.end));
        self.follow();
    }

    /// It will have no digest.
    pub fn lose(&mut self) {
        self.lost = true;
        self.ahead.clear();
    }

    /// Of a file of that size, of which all was there, once; else `None`.
    pub fn digest(&self, size: u64) -> Option<Digest> {
        let whole = !self.lost && self.at == size && self.ahead.is_empty();
        whole.then(|| Digest::from(self.hasher.finalize()))
    }

    fn hold(&mut self, offset: u64, piece: impl FnOnce() -> Piece) {
        if self.lost {
            return;
        }
        // Read again, because src has changed: which of them counts is not for us to say.
        let again = offset < self.at || self.ahead.contains_key(&offset);
        if again || self.ahead.len() >= AHEAD_MAX {
            return self.lose();
        }
        self.ahead.insert(offset, piece());
    }

    fn follow(&mut self) {
        while let Some(piece) = self.ahead.remove(&self.at) {
            match piece {
                Piece::Bytes(bytes) => self.next(&bytes),
                Piece::Hole(end) => {
                    while self.at < end {
                        let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
                        self.next(&ZEROS[..left.min(ZEROS.len())]);
                    }
                }
            }
        }
    }

    fn next(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
    }
}
