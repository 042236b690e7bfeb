//! What handlers and their continuations share: the mirror, the tables of handles, and how the larger
//! replies are made.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::answer::{Attributes, Created, Entry, Found, How, Opened};
use super::dev::Dev;
use super::handles::{Handles, Listing, OpenFile};
use super::own::Own;
use super::passthrough::{Backings, IoMode};
use super::reply::{Reply, TTL, errno, generation, is_volatile};
use crate::error::Result;
use crate::mirror::{self, Attr, Ino, Locate, Mirror, Moment, Node};
use crate::sys::caps;
use crate::sys::fault;
use crate::sys::fusedev::BackingId;

/// What handlers and their continuations share.
pub(super) struct Shared {
    pub(super) mirror: Arc<Mirror>,
    pub(super) files: Handles<OpenFile>,
    pub(super) listings: Handles<Listing>,
    pub(super) backings: Backings,
    /// For what the kernel is told without being asked, and for backing files.
    dev: OnceLock<Arc<Dev>>,
    pub(super) own: Own,
    /// The mount is detached: dst changes behind the kernel's back from now on.
    pub(super) expired: AtomicBool,
    /// Requests have come through io_uring: all but forgets and interrupts do, from then on.
    ring: AtomicBool,
    /// The handles that the program before us gave out, by the requests for them.
    pub(super) opened: Mutex<HashMap<u64, u64>>,
}

/// As short as a time can be (the kernel counts its ticks): the attributes of a file that was made
/// hold while the kernel opens it, which would ask for them again else.
const TICK: Duration = Duration::from_nanos(1);

impl Shared {
    pub(super) fn new(mirror: Arc<Mirror>) -> Shared {
        Shared {
            mirror,
            files: Handles::default(),
            listings: Handles::default(),
            backings: Backings::default(),
            dev: OnceLock::new(),
            own: Own::new(),
            expired: AtomicBool::new(false),
            ring: AtomicBool::new(false),
            opened: Mutex::default(),
        }
    }

    pub(super) fn set_dev(&self, dev: Arc<Dev>) {
        // Called once, right after the handshake.
        let _ = self.dev.set(dev); // A second one would be the same connection.
    }

    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    pub(super) fn ring_works(&self) {
        self.ring.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_ring(&self) -> bool {
        self.ring.load(Ordering::Relaxed)
    }

    pub(super) fn entry_ttl(&self) -> Duration {
        if self.expired.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            TTL
        }
    }

    /// How long the kernel may keep what a directory with all its names has, and has not.
    pub(super) fn names_ttl(&self) -> Duration {
        match self.mirror.has_unseen() {
            true => Duration::ZERO,
            false => self.entry_ttl(),
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

    pub(super) fn node(&self, ino: Ino) -> Result<Arc<Node>, Errno> {
        self.mirror.nodes().get(ino)
    }

    /// A node as the protocol shows it under a name.
    pub(super) fn entry(&self, node: &Node, attr: Attr) -> Entry {
        Entry {
            ino: node.ino,
            generation: generation(node),
            attr,
            entry_ttl: self.entry_ttl(),
            attr_ttl: self.attr_ttl(node.ino, &attr),
        }
    }

    pub(super) fn reply_entry(
        &self,
        what: &str,
        result: Result<mirror::Entry>,
        reply: Reply<Entry>,
    ) {
        let shown = result.map(|entry| self.entry(&entry.node, entry.attr));
        reply.send(shown.map_err(|e| errno(what, &e)));
    }

    /// The answer to a lookup. What is not in a directory that has all its names stays so until it is
    /// made through the mount.
    pub(super) fn reply_found(
        &self,
        parent: Ino,
        result: Result<mirror::Entry>,
        reply: Reply<Found>,
    ) {
        reply.send(match result {
            Ok(entry) => Ok(Found::Entry(self.entry(&entry.node, entry.attr))),
            Err(e) => match errno("lookup", &e) {
                // In this order: a directory has its stand-ins before it has all its names.
                Errno::NOENT if self.has_all_names(parent) && !self.names_ttl().is_zero() => {
                    Ok(Found::Nothing(self.entry_ttl()))
                }
                errno => Err(errno),
            },
        });
    }

    fn has_all_names(&self, dir: Ino) -> bool {
        self.node(dir).is_ok_and(|node| !node.is_pending_dir())
    }

    pub(super) fn reply_attr(
        &self,
        what: &str,
        node: &Node,
        result: Result<Attr>,
        reply: Reply<Attributes>,
    ) {
        let shown = result.map(|attr| Attributes {
            ino: self.mirror.shown_ino(node, &attr),
            ttl: self.attr_ttl(node.ino, &attr),
            attr,
        });
        reply.send(shown.map_err(|e| errno(what, &e)));
    }

    /// Counts a handle that is about to be given out.
    pub(super) fn insert_file(
        &self,
        node: Arc<Node>,
        file: OwnedFd,
        src: Option<Arc<OwnedFd>>,
        (mode, write): (IoMode, bool),
        request: u64,
    ) -> u64 {
        self.files.insert(|handle| OpenFile {
            _record: self.write_file((handle, request), &node, &file, (&mode, write)),
            node,
            file: Arc::new(file),
            src,
            mode,
            write,
            since: Moment::now(),
        })
    }

    /// What a shared mapping changes through passthrough is seen by nobody: the attributes that the
    /// kernel has are void when such a handle comes and when it goes.
    pub(super) fn void_attributes(&self, ino: Ino, mode: &IoMode, write: bool) {
        if write
            && matches!(mode, IoMode::Passthrough(_))
            && let Some(dev) = self.dev.get()
        {
            dev.void_attributes(ino);
        }
    }

    pub(super) fn dev(&self) -> Option<&Arc<Dev>> {
        self.dev.get()
    }

    /// Asks the kernel for a number that stands for dst's file. It keeps this thread's credentials:
    /// without CAP_FSETID a user's write clears setuid, as it must.
    fn register(&self, file: &OwnedFd) -> Result<BackingId, Errno> {
        let dev = self.dev.get().ok_or(Errno::NOTCONN)?;
        caps::without_fsetid(|| BackingId::register(dev.fd(), file.as_fd()))
    }

    pub(super) fn reply_open(
        &self,
        node: Arc<Node>,
        file: OwnedFd,
        locate: Locate,
        write: bool,
        reply: Reply<Opened>,
    ) {
        let ino = node.ino;
        let register = || self.register(&file);
        let change = (write, node.take_old_pages());
        let mode = self.backings.decide(ino, &locate, change, register);
        self.void_attributes(ino, &mode, write);
        let src = match locate {
            Locate::Through(src) => Some(src),
            Locate::Here | Locate::Ranged => None,
        };
        let handle = self.insert_file(node, file, src, (mode.clone(), write), reply.request());
        fault::point("open-written");
        let how = How::File(mode);
        reply.ok(Opened { handle, how });
    }

    pub(super) fn reply_create(&self, entry: &mirror::Entry, file: OwnedFd, reply: Reply<Created>) {
        let ino = entry.node.ino;
        let register = || self.register(&file);
        let change = (true, false);
        let mode = self.backings.decide(ino, &Locate::Here, change, register);
        let node = Arc::clone(&entry.node);
        let handle = self.insert_file(node, file, None, (mode.clone(), true), reply.request());
        fault::point("create-written");
        let mut shown = self.entry(&entry.node, entry.attr);
        if shown.attr_ttl.is_zero() && !is_volatile(&entry.attr) {
            shown.attr_ttl = TICK;
        }
        let how = How::File(mode);
        reply.ok(Created(shown, Opened { handle, how }));
    }
}
