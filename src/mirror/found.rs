//! Found: what is under a name of dst, for the kernel to hold.
//!
//! Every lookup, listing and new name comes through here. Each look costs every user of the mount, so
//! nothing is asked twice: below a directory without a mark nothing is marked, and what statx said of the
//! name there is what it would say of the inode.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::attr::Attr;
use super::control::CONTROL;
use super::namespace::Entry;
use super::node::{Ino, Node, Phase, Place};
use super::populate::{DirRef, origin_of};
use crate::error::{Context, Result, Side};
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::xattr::Target;

/// An inode that was found under a name; the kernel holds one more reference to its node.
#[derive(Debug)]
pub struct Found {
    /// The inode.
    pub node: Arc<Node>,
    /// What statx said, where no migration could have changed it since.
    seen: Option<Stat>,
}

impl DirRef {
    /// For messages: where it is in src.
    pub(super) fn shown(&self) -> RelPath {
        self.origin.as_deref().cloned().unwrap_or_default()
    }
}

impl Mirror {
    /// The entry of what was just found; on failure the reference is returned.
    pub(super) fn with_entry(
        self: &Arc<Self>,
        found: Found,
        then: impl FnOnce(Result<Entry>) + Send + 'static,
    ) {
        let (mirror, node) = (Arc::clone(self), Arc::clone(&found.node));
        let entry = move |attr: Result<Attr>| match attr {
            Ok(attr) => then(Ok(Entry { node, attr })),
            Err(e) => {
                mirror.nodes.forget(node.ino, 1);
                then(Err(e));
            }
        };
        match self.attr_of(&found) {
            Ok(Some(attr)) => entry(Ok(attr)),
            Ok(None) => self.with_attr(&found.node, entry),
            Err(e) => entry(Err(e)),
        }
    }

    /// The attributes of what was just found, without waiting; `None` when src has to be asked.
    pub fn attr_of(&self, found: &Found) -> Result<Option<Attr>> {
        match found.seen {
            Some(stat) if found.node.phase() == Phase::Unmarked => {
                Ok(Some(self.whole_attr(&found.node, stat)))
            }
            _ => self.attr_now(&found.node),
        }
    }

    /// Finds a name in a populated directory and counts a reference to its node.
    pub(super) fn child(&self, parent: Ino, name: &Name) -> Result<Found> {
        if self.is_control(parent, name.as_bytes()) {
            return Err(Errno::NOENT).on("lookup", Side::Dst, CONTROL);
        }
        let shown = name.as_os_str();
        let dir_node = self.nodes.get(parent).on("lookup", Side::Dst, shown)?;
        let dir = self.nodes.dir(&dir_node).on("open", Side::Dst, shown)?;
        self.child_in(&dir_node, dir.as_fd(), name)
    }

    /// As `child`, in a directory that is open already (readdirplus).
    pub fn child_in(&self, parent: &Arc<Node>, dir: BorrowedFd<'_>, name: &Name) -> Result<Found> {
        let shown = name.as_os_str();
        // Before statx: what lands while the directory is marked may land after it.
        let is_bare = || parent.phase() == Phase::Unmarked;
        let was_bare = is_bare();
        let stat = stat::stat_at(dir, name.as_cstr()).on("lookup", Side::Dst, shown)?;
        let anchor = parent.anchor.child(dir, name);
        let anchor = anchor.on("name_to_handle_at", Side::Dst, shown)?;
        // Below an unmarked directory nothing is marked: spare the look.
        let mark = match (stat.is_file() || stat.is_dir()) && !is_bare() {
            true => self
                .mark
                .get(Target::At(dir, name))
                .on("getxattr", Side::Dst, shown)?,
            false => None,
        };
        self.check_seen(stat.key.ino, mark.as_ref(), || shown.into())?;
        let own = mark.as_ref().is_some_and(|m| m.own);
        let mark = mark.filter(|m| !m.own);
        let phase = match &mark {
            None => Phase::Unmarked,
            Some(mark) if mark.populated => Phase::Populated,
            Some(_) => Phase::Pending,
        };
        let origin = mark.and_then(|m| origin_of(parent.origin().as_ref(), name, &m));
        let landed = stat.is_file() && self.has_landed(stat.key.ino, &anchor);
        let phase = if landed { Phase::Unmarked } else { phase };
        let place = Place {
            parent: parent.ino,
            name: name.clone(),
        };
        let kind = stat.kind();
        let node = Node::new(stat.key.ino, anchor, kind, phase, origin, Some(place));
        let node = self.nodes.remember(node);
        if own {
            node.set_own();
        }
        // Something marked that was moved here meanwhile has marked the directory first.
        let seen = (was_bare && is_bare()).then_some(stat);
        Ok(Found { node, seen })
    }

    /// The node under a name, with a reference that the caller returns.
    pub(super) fn node_at(
        &self,
        parent: &Arc<Node>,
        dir: BorrowedFd<'_>,
        name: &Name,
    ) -> Option<Arc<Node>> {
        self.child_in(parent, dir, name)
            .ok()
            .map(|found| found.node)
    }

    /// A file's bytes are in dst although its mark is still to go.
    pub(super) fn has_landed(&self, ino: Ino, anchor: &Anchor) -> bool {
        self.hydrations
            .find(ino, anchor)
            .is_some_and(|h| h.has_landed())
    }
}
