//! Listing: readdir and readdirplus over dst's own directory, at dst's own offsets.
//!
//! Directories are populated before they are opened, so every name is here. Attributes of pending
//! files come from src: after a restart they have to be asked for, on a pool thread.

use std::os::fd::AsFd;
use std::sync::Arc;

use fuser::{Errno, FileHandle, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::handles::{Ahead, Listing};
use super::reply::{file_attr, file_type, generation, raw};
use super::shared::Shared;
use crate::engine::job::Priority;
use crate::error::Result;
use crate::mirror::{Attr, CONTROL, Ino, Node, ROOT};
use crate::sys::dir::{self, Entry};

/// The offsets after `.` and `..`. dst's own offsets of real entries are larger on every file system
/// that keeps these two first (ext4, xfs, btrfs, tmpfs); they are passed on as they are.
const DOT: u64 = 1;
const DOTDOT: u64 = 2;

/// How many entries are read ahead of the reply.
const AHEAD_MAX: usize = 512;

impl Shared {
    pub(super) fn open_listing(&self, ino: INodeNo) -> Result<FileHandle, Errno> {
        let node = self.node(ino)?;
        let dir = self.mirror.open_listing(&node).map_err(raw)?;
        Ok(self.listings.insert(Listing {
            node,
            dir,
            ahead: Default::default(),
        }))
    }

    /// The entries from `offset` on, from what was read ahead or from dst.
    fn entries(&self, listing: &Listing, offset: u64) -> Result<Vec<Entry>, rustix::io::Errno> {
        let mut ahead = listing.ahead.lock();
        if offset != 0 && ahead.from == offset && (!ahead.entries.is_empty() || ahead.at_end) {
            return Ok(std::mem::take(&mut *ahead).entries);
        }
        let mut entries = Vec::new();
        let mut buf = Vec::new();
        dir::read_dir(listing.dir.as_fd(), offset, &mut buf, |entry| {
            entries.push(entry);
            entries.len() < AHEAD_MAX
        })?;
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

    pub(super) fn readdir(&self, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(listing) = self.listings.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        let directory = fuser::FileType::Directory;
        let own = INodeNo(listing.node.ino);
        if offset == 0 && reply.add(own, DOT, directory, ".") {
            return reply.ok();
        }
        let up = INodeNo(Self::parent_of(&listing));
        if (offset == 0 || offset == DOT) && reply.add(up, DOTDOT, directory, "..") {
            return reply.ok();
        }
        let from = if offset == DOT || offset == DOTDOT {
            0
        } else {
            offset
        };
        let entries = match self.entries(&listing, from) {
            Ok(entries) => entries,
            Err(e) => return reply.error(raw(e)),
        };
        let mut at = from;
        let mut rest = entries.into_iter();
        while let Some(entry) = rest.next() {
            let next = entry.next;
            if !Self::is_hidden(&listing, &entry) {
                let kind = file_type(entry.kind);
                if reply.add(INodeNo(entry.ino), next, kind, entry.name.as_os_str()) {
                    let left = std::iter::once(entry).chain(rest).collect();
                    Self::keep_ahead(&listing, at, left);
                    break;
                }
            }
            at = next;
        }
        reply.ok();
    }

    /// Fills the reply here as long as nothing has to be asked of src; the rest on a pool thread.
    pub(super) fn readdirplus(
        shared: &Arc<Shared>,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(listing) = shared.listings.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        if offset == 0 || offset == DOT {
            match shared.add_dots(&listing, offset, &mut reply) {
                Ok(false) => {}
                Ok(true) => return reply.ok(),
                Err(e) => return reply.error(e),
            }
        }
        let from = if offset == DOT || offset == DOTDOT {
            0
        } else {
            offset
        };
        let entries = match shared.entries(&listing, from) {
            Ok(entries) => entries,
            Err(e) => return reply.error(raw(e)),
        };
        let fill = Fill {
            listing,
            at: from,
            entries: entries.into_iter(),
            reply,
        };
        if let Some(fill) = shared.fill(fill, Wait::No) {
            let again = Arc::clone(shared);
            let task = move || {
                // With Wait::Yes it always ends.
                let _ = again.fill(fill, Wait::Yes); // Replied inside.
            };
            shared.mirror.run_demand(Priority::Demand, Box::new(task));
        }
    }

    /// `.` and `..`: the kernel takes no node from them.
    fn add_dots(
        &self,
        listing: &Listing,
        offset: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> Result<bool, Errno> {
        let attr = self
            .mirror
            .attr_now(&listing.node)
            .map_err(|e| raw(e.errno()))?;
        let Some(attr) = attr else {
            return Err(Errno::EIO);
        };
        let mut add = |ino: Ino, offset: u64, name: &str| {
            let shown = file_attr(ino, &attr);
            let none = std::time::Duration::ZERO;
            reply.add(
                INodeNo(ino),
                offset,
                name,
                &none,
                &shown,
                fuser::Generation(0),
            )
        };
        let full = offset == 0 && add(listing.node.ino, DOT, ".");
        Ok(full || add(Self::parent_of(listing), DOTDOT, ".."))
    }

    /// Adds entries until the reply is full or the directory ends, and sends it. With `Wait::No`
    /// comes back unfinished, before the first entry that src has to be asked about.
    fn fill(&self, mut fill: Fill, wait: Wait) -> Option<Fill> {
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
            // Deleted between the listing and the look: as if it had not been listed.
            let Ok(node) = found else {
                fill.at = next;
                continue;
            };
            let attr = match (self.mirror.attr_now(&node), wait) {
                (Ok(Some(attr)), _) => Some(attr),
                (Ok(None), Wait::No) => {
                    self.mirror.nodes().forget(node.ino, 1);
                    let left: Vec<_> = std::iter::once(entry).chain(fill.entries).collect();
                    return Some(Fill {
                        entries: left.into_iter(),
                        ..fill
                    });
                }
                (Ok(None), Wait::Yes) => self.mirror.attr_asking(&node).ok(),
                (Err(_), _) => None,
            };
            let Some(attr) = attr else {
                // src does not answer for this one: it must not look missing.
                self.mirror.nodes().forget(node.ino, 1);
                fill.reply.error(Errno::EIO);
                return None;
            };
            if self.add_plus(&mut fill.reply, &node, &attr, &entry) {
                self.mirror.nodes().forget(node.ino, 1);
                let left = std::iter::once(entry).chain(fill.entries).collect();
                Self::keep_ahead(&fill.listing, fill.at, left);
                fill.reply.ok();
                return None;
            }
            fill.at = next;
        }
        fill.reply.ok();
        None
    }

    fn add_plus(
        &self,
        reply: &mut ReplyDirectoryPlus,
        node: &Node,
        attr: &Attr,
        entry: &Entry,
    ) -> bool {
        // One time for the name and the attributes: the shorter.
        let ttl = self.attr_ttl(node.ino, attr);
        let shown = file_attr(node.ino, attr);
        let name = entry.name.as_os_str();
        reply.add(
            INodeNo(node.ino),
            entry.next,
            name,
            &ttl,
            &shown,
            generation(node),
        )
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    No,
    Yes,
}

/// A reply in work.
struct Fill {
    listing: Arc<Listing>,
    /// The offset that the next entry was asked for with.
    at: u64,
    entries: std::vec::IntoIter<Entry>,
    reply: ReplyDirectoryPlus,
}
