//! What handlers and their continuations share: the mirror, the tables of handles, and how the larger
//! replies are made.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{
    Errno, FileHandle, FopenFlags, INodeNo, Notifier, ReplyAttr, ReplyCreate, ReplyEntry, ReplyOpen,
};

use super::handles::{Handles, Listing, OpenFile};
use super::passthrough::{Backings, IoMode};
use super::reply::{TTL, errno, file_attr, generation, is_volatile, raw};
use crate::error::Result;
use crate::mirror::{Attr, Entry, Ino, Locate, Mirror, Node};
use crate::sys::caps;

/// What handlers and their continuations share.
pub(super) struct Shared {
    pub(super) mirror: Arc<Mirror>,
    pub(super) files: Handles<OpenFile>,
    pub(super) listings: Handles<Listing>,
    pub(super) backings: Backings,
    pub(super) notifier: OnceLock<Notifier>,
    /// The mount is detached: dst changes behind the kernel's back from now on.
    pub(super) expired: AtomicBool,
}

impl Shared {
    pub(super) fn new(mirror: Arc<Mirror>) -> Shared {
        Shared {
            mirror,
            files: Handles::default(),
            listings: Handles::default(),
            backings: Backings::default(),
            notifier: OnceLock::new(),
            expired: AtomicBool::new(false),
        }
    }

    pub(super) fn set_notifier(&self, notifier: Notifier) {
        // Called once, right after the handshake.
        let _ = self.notifier.set(notifier); // A second one would be the same channel.
    }

    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    pub(super) fn entry_ttl(&self) -> Duration {
        if self.expired.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            TTL
        }
    }

    pub(super) fn attr_ttl(&self, ino: Ino, attr: &Attr) -> Duration {
        let hidden = attr.stat.is_file() && self.backings.has_hidden_writers(ino);
        if hidden || is_volatile(attr) {
            Duration::ZERO
        } else {
            self.entry_ttl()
        }
    }

    pub(super) fn node(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        self.mirror.nodes().get(ino.0).map_err(raw)
    }

    pub(super) fn reply_entry(&self, what: &str, result: Result<Entry>, reply: ReplyEntry) {
        match result {
            Ok(entry) => {
                let (ino, attr) = (entry.node.ino, &entry.attr);
                let ttl = self.attr_ttl(ino, attr);
                let shown = file_attr(ino, attr);
                reply.entry_with_ttls(&ttl, &self.entry_ttl(), &shown, generation(&entry.node));
            }
            Err(e) => reply.error(errno(what, &e)),
        }
    }

    pub(super) fn reply_attr(
        &self,
        what: &str,
        node: &Node,
        result: Result<Attr>,
        reply: ReplyAttr,
    ) {
        match result {
            Ok(attr) => {
                let shown = file_attr(self.mirror.shown_ino(node, &attr), &attr);
                reply.attr(&self.attr_ttl(node.ino, &attr), &shown);
            }
            Err(e) => reply.error(errno(what, &e)),
        }
    }

    /// Counts a handle that is about to be given out.
    pub(super) fn insert_file(
        &self,
        node: Arc<Node>,
        file: OwnedFd,
        mode: IoMode,
        write: bool,
    ) -> FileHandle {
        self.files.insert(OpenFile {
            node,
            file: Arc::new(file),
            mode,
            write,
        })
    }

    /// What a shared mapping changes through passthrough is seen by nobody: the attributes that the
    /// kernel has are void when such a handle comes and when it goes.
    pub(super) fn void_attributes(&self, ino: Ino, mode: &IoMode, write: bool) {
        if write
            && matches!(mode, IoMode::Passthrough(_))
            && let Some(notifier) = self.notifier.get()
            && let Err(e) = notifier.inval_inode(INodeNo(ino), -1, 0)
        {
            tracing::debug!("invalidate inode {ino}: {e}");
        }
    }

    pub(super) fn reply_open(
        &self,
        node: Arc<Node>,
        file: OwnedFd,
        locate: Locate,
        write: bool,
        reply: ReplyOpen,
    ) {
        let ino = node.ino;
        // The backing file keeps this thread's credentials: without CAP_FSETID a user's write
        // clears setuid, as it must.
        let register = || caps::without_fsetid(|| reply.open_backing(file.as_fd()));
        let mode = self.backings.decide(ino, locate, write, register);
        self.void_attributes(ino, &mode, write);
        let handle = self.insert_file(node, file, mode.clone(), write);
        match &mode {
            IoMode::Cached => reply.opened(handle, FopenFlags::empty()),
            IoMode::Passthrough(id) => reply.opened_passthrough(handle, FopenFlags::empty(), id),
        }
    }

    pub(super) fn reply_create(&self, entry: &Entry, file: OwnedFd, reply: ReplyCreate) {
        let ino = entry.node.ino;
        let register = || caps::without_fsetid(|| reply.open_backing(file.as_fd()));
        let mode = self.backings.decide(ino, Locate::Here, true, register);
        let handle = self.insert_file(Arc::clone(&entry.node), file, mode.clone(), true);
        let ttl = self.attr_ttl(ino, &entry.attr);
        let shown = file_attr(ino, &entry.attr);
        let generation = generation(&entry.node);
        match &mode {
            IoMode::Cached => reply.created(&ttl, &shown, generation, handle, FopenFlags::empty()),
            IoMode::Passthrough(id) => {
                reply.created_passthrough(
                    &ttl,
                    &shown,
                    generation,
                    handle,
                    FopenFlags::empty(),
                    id,
                );
            }
        }
    }
}
