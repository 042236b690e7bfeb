//! Barrier: a change waits until no crash can undo what it rests on.
//!
//! In a directory that is P, or below one, everything is made anew after a crash (D5); and where the
//! removal of a mark is not durable yet the mark may come back (D2, D6). So whoever wants to change
//! something waits here for the directory and all that are above it.

use std::sync::Arc;

use super::Mirror;
use super::asker;
use super::node::{Ino, Node};
use super::populate::{Access, Waiter};

impl Mirror {
    /// Calls `then` when a change in the directory cannot be undone by a crash: it and those above it
    /// are populated, and their publications are durable (D5, D6).
    pub(super) fn when_published(self: &Arc<Self>, ino: Ino, then: Waiter) {
        if let Some(pending) = self.pending_at_or_above(ino) {
            let mirror = Arc::clone(self);
            return self.when_populated(pending, Access::Look, move |ready| match ready {
                Ok(()) => mirror.when_published(ino, then),
                Err(e) => then(Err(e)),
            });
        }
        let Some(gated) = self.gated_at_or_above(ino) else {
            return then(Ok(()));
        };
        let mirror = Arc::clone(self);
        // The walker hears of it and brings nothing more for the next syncfs.
        self.progress.barriers.add(1);
        let again = asker::kept(move |ready| {
            mirror.progress.barriers.sub(1);
            match ready {
                Ok(()) => mirror.when_published(ino, then),
                Err(e) => then(Err(e)),
            }
        });
        self.commit.when_published(gated, Box::new(again));
    }

    /// A directory that is P, though what is below it was seen: by names that were placed ahead.
    fn pending_at_or_above(&self, ino: Ino) -> Option<Ino> {
        if self.partials.is_empty() {
            return None;
        }
        let mut at = Some(ino);
        while let Some(ino) = at {
            let node = self.nodes.find(ino)?;
            if node.is_pending_dir() {
                return Some(ino);
            }
            at = node.place().map(|p| p.parent);
        }
        None
    }

    fn gated_at_or_above(&self, ino: Ino) -> Option<Ino> {
        if self.commit.has_no_gates() {
            return None;
        }
        let mut at = Some(ino);
        while let Some(ino) = at {
            if self.commit.is_gated(ino) {
                return Some(ino);
            }
            at = self.nodes.find(ino)?.place().map(|p| p.parent);
        }
        None
    }

    /// As `when_published`, for a change of the inode itself: the directory that it was found in. Of a
    /// user's own file nothing there is src's: only the way to it must be certain.
    pub(super) fn when_parent_published(self: &Arc<Self>, node: &Node, then: Waiter) {
        match node.place() {
            Some(place) if node.is_own() => self.when_above_published(place.parent, then),
            Some(place) => self.when_published(place.parent, then),
            None => then(Ok(())),
        }
    }

    /// As `when_published`, for all that is above the directory.
    pub(super) fn when_above_published(self: &Arc<Self>, ino: Ino, then: Waiter) {
        match self.nodes.find(ino).and_then(|dir| dir.place()) {
            Some(place) => self.when_published(place.parent, then),
            None => then(Ok(())),
        }
    }
}
