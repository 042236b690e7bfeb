//! Open files and listings, by the number that the kernel holds.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::passthrough::IoMode;
use crate::mirror::{Moment, Node, Stream};
use crate::sys::board::Record;
use crate::sys::dir::Entry;

/// A file that a user has open.
pub(super) struct OpenFile {
    /// What the next program is told of it; the first field: it goes before the fd.
    pub(super) _record: Option<Record>,
    pub(super) node: Arc<Node>,
    /// dst's file, as the user opened it.
    pub(super) file: Arc<OwnedFd>,
    /// src's file, for who reads through (`Mirror::read_through`).
    pub(super) src: Option<Arc<OwnedFd>>,
    pub(super) mode: IoMode,
    pub(super) write: bool,
    pub(super) since: Moment,
}

impl OpenFile {
    /// What the kernel gets of bytes that it has asked for. EIO: it would take pages behind them for zeros.
    pub(super) fn answer(
        &self,
        bytes: Vec<u8>,
        want: u32,
        asked: Moment,
    ) -> Result<Vec<u8>, Errno> {
        let lacks_pages = bytes.len() + rustix::param::page_size() <= want as usize;
        match lacks_pages && self.node.changes().may_precede(self.since, asked) {
            true => Err(Errno::IO),
            false => Ok(bytes),
        }
    }
}

/// A directory that a user lists.
pub(super) struct Listing {
    /// What the next program is told of it; the first field: it goes before the fd.
    pub(super) record: Mutex<Option<Record>>,
    pub(super) node: Arc<Node>,
    pub(super) dir: OwnedFd,
    /// src's order, while the directory is not populated; it goes with a rewind.
    pub(super) stream: Mutex<Option<Arc<Stream>>>,
    /// What the last getdents64 gave and no reply had room for yet: the kernel asks on from there.
    pub(super) ahead: Mutex<Ahead>,
}

/// Entries that were read but not sent.
#[derive(Default)]
pub(super) struct Ahead {
    /// The offset of the first of them, as the kernel will ask for it.
    pub(super) from: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) at_end: bool,
}

/// A table by handle number.
pub(super) struct Handles<T> {
    next: AtomicU64,
    table: DashMap<u64, Arc<T>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Handles<T> {
        Handles {
            next: AtomicU64::new(1),
            table: DashMap::new(),
        }
    }
}

impl<T> Handles<T> {
    /// A new one, that is made with its number.
    pub(super) fn insert(&self, make: impl FnOnce(u64) -> T) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.table.insert(number, Arc::new(make(number)));
        number
    }

    /// Everything, by number.
    pub(super) fn all(&self) -> Vec<(u64, Arc<T>)> {
        let all = self.table.iter();
        all.map(|e| (*e.key(), Arc::clone(e.value()))).collect()
    }

    /// A number that the kernel holds from the time of the program before us.
    pub(super) fn restore(&self, number: u64, value: T) {
        self.table.insert(number, Arc::new(value));
        self.next.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// The next number: every one below was given out.
    pub(super) fn next(&self) -> &AtomicU64 {
        &self.next
    }

    pub(super) fn get(&self, handle: u64) -> Option<Arc<T>> {
        self.table.get(&handle).map(|v| Arc::clone(&v))
    }

    pub(super) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        self.table.remove(&handle).map(|(_, v)| v)
    }
}
