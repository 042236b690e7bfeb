//! Listing: readdir and readdirplus over dst's own directory, at dst's own offsets.
//!
//! Directories are populated before they are opened, so every name is here; but a large one is listed
//! while it is populated, on pool threads, in src's order and at offsets of that listing's own
//! (`Stream`). Attributes of pending files come from src: after a restart they have to be asked for,
//! on a pool thread.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::answer::{self, Answer, Dirent, Entries, How, Opened};
use super::handles::{Ahead, Listing};
use super::reply::{Reply, errno};
use super::request::At;
use super::shared::Shared;
use crate::engine::job::Priority;
use crate::error::{Error, Result};
use crate::mirror::{Attr, CONTROL, Ino, Node, ROOT, Stream};
use crate::sys::dir::{self, Entry};

/// The offsets after `.` and `..`. dst's own offsets of real entries are larger on every file system
/// that keeps these two first (ext4, xfs, btrfs, tmpfs); they are passed on as they are.
const DOT: u64 = 1;
const DOTDOT: u64 = 2;

/// How many entries are read ahead of the reply.
const AHEAD_MAX: usize = 512;

impl Shared {
    /// Whoever may list a directory that has all its names finds in the kernel what was listed before:
    /// only through the mount do they change.
    pub(super) fn open_listing(&self, ino: Ino, stream: Option<Stream>) -> Result<Opened, Errno> {
        let node = self.node(ino)?;
        let dir = self.mirror.open_listing(&node)?;
        let complete = stream.is_none() && !node.is_pending_dir() && !self.names_ttl().is_zero();
        let handle = self.listings.insert(|handle| Listing {
            record: Mutex::new(self.write_listing(handle, ino, &dir, stream.as_ref())),
            node,
            dir,
            stream: Mutex::new(stream.map(Arc::new)),
            ahead: Default::default(),
        });
        let how = How::Dir { complete };
        Ok(Opened { handle, how })
    }

    /// The entries from `offset` on, from what was read ahead or from dst.
    fn entries(&self, listing: &Listing, offset: u64) -> Result<Vec<Entry>, Errno> {
        let mut ahead = listing.ahead.lock();
        if offset != 0 && ahead.from == offset && (!ahead.entries.is_empty() || ahead.at_end) {
            return Ok(std::mem::take(&mut *ahead).entries);
        }
        drop(ahead);
        let stream = listing.stream.lock().clone();
        if let Some(stream) = stream {
            let dst = listing.dir.as_fd();
            let entries = self.mirror.list_ahead(&stream, dst, offset);
            let mut entries = entries.map_err(|e| errno("readdir", &e))?;
            self.mirror.unsee(&mut entries);
            return Ok(entries);
        }
        let mut entries = Vec::new();
        let mut buf = Vec::new();
        dir::read_dir(listing.dir.as_fd(), offset, &mut buf, |entry| {
            entries.push(entry);
            entries.len() < AHEAD_MAX
        })?;
        self.mirror.unsee(&mut entries);
        Ok(entries)
    }

    fn keep_ahead(listing: &Listing, from: u64, entries: Vec<Entry>) {
        *listing.ahead.lock() = Ahead {
            from,
            entries,
            at_end: false,
        };
    }

    fn is_hidden(listing: &Listing, entry: &Entry) -> bool {
        listing.node.ino == ROOT && entry.name.as_bytes() == CONTROL.as_bytes()
    }

    fn parent_of(listing: &Listing) -> Ino {
        listing.node.place().map_or(ROOT, |p| p.parent)
    }

    /// True when this listing waits for src. One that begins anew has no need to, once the directory
    /// is populated.
    fn is_streamed(listing: &Listing, offset: u64) -> bool {
        if offset == 0 && !listing.node.is_pending_dir() {
            // What was read ahead has the other's offsets.
            if listing.stream.lock().take().is_some() {
                *listing.ahead.lock() = Ahead::default();
                listing.write_without_stream();
            }
            return false;
        }
        listing.stream.lock().is_some()
    }

    /// Calls `then` with the entries from an offset on: now, or on a pool thread where src is listed.
    fn when_entries(
        shared: &Arc<Shared>,
        listing: &Arc<Listing>,
        offset: u64,
        then: impl FnOnce(Result<Vec<Entry>, Errno>) + Send + 'static,
    ) {
        let (from, streamed) = (first_real(offset), Self::is_streamed(listing, offset));
        if !streamed {
            return then(shared.entries(listing, from));
        }
        let told = move |entries: Result<Result<Vec<Entry>, Errno>>| {
            then(entries.map_err(|e| errno("readdir", &e)).flatten());
        };
        let told = shared.mirror.waiting_for(&listing.node, told);
        let (again, listing) = (Arc::clone(shared), Arc::clone(listing));
        let task = move || told(Ok(again.entries(&listing, from)));
        shared.mirror.run_demand(Priority::Demand, Box::new(task));
    }

    pub(super) fn readdir(shared: &Arc<Shared>, at: At, reply: Reply<Entries>) {
        let Some(listing) = shared.listings.get(at.fh) else {
            return reply.error(Errno::BADF);
        };
        let mut out = Entries::with_room(at.size);
        let own = Dirent::dir(listing.node.ino, DOT, b".");
        if at.offset == 0 && !out.add(None, &own) {
            return reply.ok(out);
        }
        let up = Dirent::dir(Self::parent_of(&listing), DOTDOT, b"..");
        if at.offset <= DOT && !out.add(None, &up) {
            return reply.ok(out);
        }
        let held = Arc::clone(&listing);
        Self::when_entries(shared, &listing, at.offset, move |entries| match entries {
            Ok(entries) => {
                Self::add_names(&held, at.offset, entries, &mut out);
                reply.ok(out);
            }
            Err(e) => reply.error(e),
        });
    }

    fn add_names(listing: &Listing, offset: u64, entries: Vec<Entry>, out: &mut Entries) {
        let mut from = first_real(offset);
        let mut rest = entries.into_iter();
        while let Some(entry) = rest.next() {
            let next = entry.next;
            let hidden = Self::is_hidden(listing, &entry);
            if !hidden && !out.add(None, &Dirent::of(&entry, entry.ino)) {
                let left = std::iter::once(entry).chain(rest).collect();
                return Self::keep_ahead(listing, from, left);
            }
            from = next;
        }
    }

    /// Fills the reply here as long as nothing has to be asked of src; the rest on a pool thread.
    pub(super) fn readdirplus(shared: &Arc<Shared>, at: At, reply: Reply<Entries>) {
        let Some(listing) = shared.listings.get(at.fh) else {
            return reply.error(Errno::BADF);
        };
        let mut out = Entries::with_room(at.size);
        if at.offset <= DOT {
            match shared.add_dots(&listing, at.offset, &mut out) {
                Ok(true) => {}
                Ok(false) => return reply.ok(out),
                Err(e) => return reply.error(e),
            }
        }
        let (again, held) = (Arc::clone(shared), Arc::clone(&listing));
        Self::when_entries(shared, &listing, at.offset, move |entries| match entries {
            Err(e) => reply.error(e),
            Ok(entries) => {
                let fill = Fill {
                    listing: held,
                    at: first_real(at.offset),
                    entries: entries.into_iter(),
                    out,
                    reply,
                };
                Shared::fill_asking(&again, fill, Ask::Src);
            }
        });
    }

    /// Fills the reply; where src has to be asked, it goes on when src has answered.
    fn fill_asking(shared: &Arc<Shared>, fill: Fill, first: Ask) {
        let Some((fill, node)) = shared.fill(fill, first) else {
            return;
        };
        let again = Arc::clone(shared);
        shared.mirror.with_attr(&node, move |attr| match attr {
            Ok(_) => Shared::fill_asking(&again, fill, Ask::Src),
            // A signal ends who asks. What is in the reply counts as told, so it is sent.
            Err(e) if e.errno() == Errno::INTR => fill.end_early(),
            Err(_) => Shared::fill_asking(&again, fill, Ask::Nobody),
        });
    }

    /// `.` and `..`: the kernel takes no node from them. False: no room.
    fn add_dots(&self, listing: &Listing, offset: u64, out: &mut Entries) -> Result<bool, Errno> {
        let attr = self.mirror.attr_now(&listing.node).map_err(|e| e.errno())?;
        let attr = attr.ok_or(Errno::IO)?;
        let mut add = |ino: Ino, next: u64, name: &[u8]| {
            let shown = answer::Entry {
                ino,
                generation: 0,
                attr,
                entry_ttl: Duration::ZERO,
                attr_ttl: Duration::ZERO,
            };
            out.add(Some(&shown), &Dirent::dir(ino, next, name))
        };
        Ok((offset != 0 || add(listing.node.ino, DOT, b"."))
            && add(Self::parent_of(listing), DOTDOT, b".."))
    }

    /// Adds entries until the reply is full or the directory ends, and sends it. Comes back unfinished
    /// before the first entry that src has to be asked about. `first`: what is to be done about that.
    fn fill(&self, mut fill: Fill, mut first: Ask) -> Option<(Fill, Arc<Node>)> {
        while let Some(entry) = fill.entries.next() {
            let next = entry.next;
            if Self::is_hidden(&fill.listing, &entry) {
                fill.at = next;
                continue;
            }
            let listing = &fill.listing;
            let found = self
                .mirror
                .child_in(&listing.node, listing.dir.as_fd(), &entry.name);
            let found = match found {
                Ok(found) => found,
                // A name and nothing else. Whoever wants more asks, and so asks src.
                Err(Error::Unseen { .. }) => {
                    let Some(shown) = self.name_only(&fill.listing) else {
                        fill.reply.error(Errno::IO);
                        return None;
                    };
                    if !fill.out.add(Some(&shown), &Dirent::of(&entry, entry.ino)) {
                        let left = std::iter::once(entry).chain(fill.entries).collect();
                        Self::keep_ahead(&fill.listing, fill.at, left);
                        fill.reply.ok(fill.out);
                        return None;
                    }
                    fill.at = next;
                    continue;
                }
                // Deleted between the listing and the look: as if it had not been listed.
                Err(_) => {
                    fill.at = next;
                    continue;
                }
            };
            let attr = self.mirror.attr_of(&found);
            let node = found.node;
            let attr = match attr {
                Ok(Some(attr)) => Some(attr),
                // It must not look missing: whoever wants more than its name asks again.
                Ok(None) if std::mem::replace(&mut first, Ask::Src) == Ask::Nobody => None,
                Ok(None) => {
                    self.mirror.nodes().forget(node.ino, 1);
                    let left: Vec<_> = std::iter::once(entry).chain(fill.entries).collect();
                    let entries = left.into_iter();
                    return Some((Fill { entries, ..fill }, node));
                }
                Err(_) => {
                    self.mirror.nodes().forget(node.ino, 1);
                    fill.reply.error(Errno::IO);
                    return None;
                }
            };
            let Some(shown) = self.plus(&node, attr, &fill.listing) else {
                self.mirror.nodes().forget(node.ino, 1);
                fill.reply.error(Errno::IO);
                return None;
            };
            if shown.ino == 0 {
                self.mirror.nodes().forget(node.ino, 1);
            }
            if !fill.out.add(Some(&shown), &Dirent::of(&entry, node.ino)) {
                if shown.ino != 0 {
                    self.mirror.nodes().forget(node.ino, 1);
                }
                let left = std::iter::once(entry).chain(fill.entries).collect();
                Self::keep_ahead(&fill.listing, fill.at, left);
                fill.reply.ok(fill.out);
                return None;
            }
            fill.at = next;
        }
        fill.reply.ok(fill.out);
        None
    }

    /// One time for the name and the attributes: the shorter. Without attributes the entry is number
    /// 0, which tells the kernel that there is the name only.
    fn plus(&self, node: &Node, attr: Option<Attr>, listing: &Listing) -> Option<answer::Entry> {
        let Some(attr) = attr else {
            return self.name_only(listing);
        };
        let shown = self.entry(node, attr);
        Some(answer::Entry {
            entry_ttl: shown.attr_ttl,
            ..shown
        })
    }

    fn name_only(&self, listing: &Listing) -> Option<answer::Entry> {
        Some(answer::Entry {
            ino: 0,
            generation: 0,
            // The kernel does not look at these.
            attr: self.mirror.attr_now(&listing.node).ok()??,
            entry_ttl: Duration::ZERO,
            attr_ttl: Duration::ZERO,
        })
    }
}

/// Where dst's own entries begin for a reader that wants what follows `offset`.
fn first_real(offset: u64) -> u64 {
    if offset == DOT || offset == DOTDOT {
        0
    } else {
        offset
    }
}

/// What is done about an entry whose attributes only src knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// It is asked.
    Src,
    /// It was, and said nothing.
    Nobody,
}

/// A reply in work.
struct Fill {
    listing: Arc<Listing>,
    /// The offset that the next entry was asked for with.
    at: u64,
    entries: std::vec::IntoIter<Entry>,
    out: Entries,
    reply: Reply<Entries>,
}

impl Fill {
    /// Sends what there is; nothing would mean the end of the directory.
    fn end_early(self) {
        match self.out.data().is_empty() {
            true => self.reply.error(Errno::INTR),
            false => {
                Shared::keep_ahead(&self.listing, self.at, self.entries.collect());
                self.reply.ok(self.out);
            }
        }
    }
}
