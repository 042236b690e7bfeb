//! NodeTable: the inodes that the kernel holds, by dst's inode number.
//!
//! A node lives from the first lookup that named it to the forget that returns the last reference.
//! It holds no fd: `NodeTable::open` opens its inode by its anchor.
//!
//!   Pending   -> Populated   populate.rs, directories: every name is here
//!   Pending   -> Unmarked    hydrate.rs, files: every byte is here (in the page cache at least)
//!   Populated -> Unmarked    commit.rs: nothing below is pending
//!   Unmarked  -> Populated   namespace.rs: something pending was moved below
//!
//! Lock order: a shard of the table, then `Node::place`; neither is held across a call that waits.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use dashmap::DashMap;
use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::absent::Absent;
use super::anchor::Anchor;
use super::changed::Changes;
use super::ctime::SteadyCtime;
use super::kept::Gone;
use crate::error::{self, Context, Side};
use crate::sys::board::{Board, Record};
use crate::sys::fd;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};

/// dst's st_ino, except for the root, which the FUSE protocol calls 1.
pub type Ino = u64;

/// The root's number in the FUSE protocol.
pub const ROOT: Ino = 1;

/// How many directories stay open for the calls that go by directory and name.
const OPEN_DIRS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// What the mark says, in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// No mark: all here, or the user's own.
    Unmarked = 0,
    /// A file without its data, a directory without its names.
    Pending = 1,
    /// A directory with all its names; something below may be pending.
    Populated = 2,
}

/// Where in src a marked entry comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The directory in src.
    pub dir: Arc<RelPath>,
    /// The name in it; `None` for the root itself.
    pub name: Option<Name>,
}

impl Origin {
    /// The whole path in src.
    pub fn path(&self) -> RelPath {
        match &self.name {
            Some(name) => self.dir.join(name),
            None => (*self.dir).clone(),
        }
    }

    /// The origin that a path names.
    pub fn of(path: &RelPath) -> Origin {
        match path.split_last() {
            Some((dir, name)) => Origin {
                dir: Arc::new(dir),
                name: Some(name),
            },
            None => Origin {
                dir: Arc::new(RelPath::root()),
                name: None,
            },
        }
    }
}

/// The last place where a node was seen.
#[derive(Debug, Clone)]
pub struct Place {
    /// The directory.
    pub parent: Ino,
    /// The name in it.
    pub name: Name,
}

/// An inode that the kernel holds.
#[derive(Debug)]
pub struct Node {
    /// Its number in the protocol.
    pub ino: Ino,
    /// How to open it.
    pub anchor: Anchor,
    /// Its type: never changes.
    pub kind: FileType,
    phase: AtomicU8,
    /// Where it comes from: set while it is marked.
    origin: RwLock<Option<Origin>>,
    /// For a directory also the way to the root.
    place: Mutex<Option<Place>>,
    lookups: AtomicU64,
    /// The inode, open, since its last name went.
    kept: Mutex<Option<Gone>>,
    /// What the next program is told of it (kept.rs).
    pub(super) record: Mutex<Option<Record>>,
    ctime: SteadyCtime,
    /// Xattrs that it does not have.
    pub(super) absent: Absent,
    /// The kernel may have pages of what src's file was before it was changed.
    has_old_pages: AtomicBool,
    changes: Changes,
    /// A user has made it in a directory that was P, and it has not moved since (own.rs).
    own: AtomicBool,
}

impl Node {
    /// A node that was just found.
    pub fn new(
        ino: Ino,
        anchor: Anchor,
        kind: FileType,
        phase: Phase,
        origin: Option<Origin>,
        place: Option<Place>,
    ) -> Node {
        Node {
            ino,
            anchor,
            kind,
            phase: AtomicU8::new(phase as u8),
            origin: RwLock::new(origin),
            place: Mutex::new(place),
            lookups: AtomicU64::new(0),
            kept: Mutex::new(None),
            record: Mutex::new(None),
            ctime: SteadyCtime::default(),
            absent: Absent::default(),
            has_old_pages: AtomicBool::new(false),
            changes: Changes::default(),
            own: AtomicBool::new(false),
        }
    }

    /// Nothing that becomes of its directory undoes it.
    pub(super) fn set_own(&self) {
        self.own.store(true, Ordering::Relaxed);
    }

    /// True for a user's own file in a directory that is P, or was.
    pub(super) fn is_own(&self) -> bool {
        self.own.load(Ordering::Relaxed)
    }

    /// src's file is another than its bytes were read from.
    pub(super) fn note_old_pages(&self) {
        self.has_old_pages.store(true, Ordering::Relaxed);
    }

    /// Whether the next open has the kernel drop the pages that it has; asked once for each.
    pub fn take_old_pages(&self) -> bool {
        self.has_old_pages.swap(false, Ordering::Relaxed)
    }

    /// When the kernel was told that src's file was changed.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// The ctime that users see.
    pub fn ctime(&self) -> &SteadyCtime {
        &self.ctime
    }

    /// Its last name has gone. It stays, and its number its own, for as long as the kernel holds it.
    pub(super) fn keep(&self, inode: Gone) {
        let before = self.kept.lock().replace(inode);
        drop(before); // Closed without the lock.
    }

    /// What its mark says.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Unmarked,
            1 => Phase::Pending,
            _ => Phase::Populated,
        }
    }

    /// Notes what its mark says now.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// True for a regular file whose data is not all here.
    pub fn is_pending_file(&self) -> bool {
        self.kind == FileType::RegularFile && self.phase() == Phase::Pending
    }

    /// True for a directory whose names are not all here.
    pub fn is_pending_dir(&self) -> bool {
        self.kind == FileType::Directory && self.phase() == Phase::Pending
    }

    /// Where it comes from, while marked.
    pub fn origin(&self) -> Option<Origin> {
        self.origin.read().clone()
    }

    /// Sets where it comes from.
    pub fn set_origin(&self, origin: Option<Origin>) {
        *self.origin.write() = origin;
    }

    /// The last place where it was seen.
    pub fn place(&self) -> Option<Place> {
        self.place.lock().clone()
    }

    /// Notes that it is at this place now: a user has renamed it.
    pub fn set_place(&self, parent: Ino, name: &Name) {
        *self.place.lock() = Some(Place {
            parent,
            name: name.clone(),
        });
        self.own.store(false, Ordering::Relaxed);
        self.ctime.is_users();
        self.write_place();
    }

    /// For messages: the last name.
    pub fn display_name(&self) -> std::path::PathBuf {
        match &*self.place.lock() {
            Some(place) => place.name.as_os_str().into(),
            None => ".".into(),
        }
    }
}

/// All nodes, and the open directories among them.
#[derive(Debug)]
pub struct NodeTable {
    nodes: DashMap<Ino, Arc<Node>>,
    dirs: Mutex<LruCache<Ino, Arc<OwnedFd>>>,
    /// Any fd on dst's file system, for handles.
    root: Arc<OwnedFd>,
    /// Where nodes are written down, if they are.
    board: OnceLock<Arc<Board>>,
}

impl NodeTable {
    /// A table that holds the root, for ever.
    pub fn new(root_fd: Arc<OwnedFd>, root: Node) -> NodeTable {
        let nodes = DashMap::new();
        root.lookups.store(1, Ordering::Relaxed);
        nodes.insert(ROOT, Arc::new(root));
        NodeTable {
            nodes,
            dirs: Mutex::new(LruCache::new(OPEN_DIRS)),
            root: root_fd,
            board: OnceLock::new(),
        }
    }

    /// From now on nodes are written down there.
    pub(super) fn keep_on(&self, board: Arc<Board>) {
        let _ = self.board.set(board); // Once.
    }

    /// The node of a number that the kernel sent. ESTALE for one that it should not know.
    pub fn get(&self, ino: Ino) -> Result<Arc<Node>, Errno> {
        self.find(ino).ok_or(Errno::STALE)
    }

    /// As `get`, for whoever tells of the failure of a call: its number is all that is known then.
    pub fn known(&self, ino: Ino, call: &'static str) -> error::Result<Arc<Node>> {
        self.get(ino).on(call, Side::Dst, format!("inode {ino}"))
    }

    /// The node, if the kernel holds it.
    pub fn find(&self, ino: Ino) -> Option<Arc<Node>> {
        self.nodes.get(&ino).map(|n| Arc::clone(&n))
    }

    /// The node, if the kernel holds exactly this inode.
    pub fn find_same(&self, ino: Ino, anchor: &Anchor) -> Option<Arc<Node>> {
        self.find(ino).filter(|n| n.anchor.same_inode(anchor))
    }

    /// Counts one more reference of the kernel to an inode that was just found. An older node of
    /// the same inode is kept (its phase and origin are at least as new), one of an earlier inode
    /// with the same number is replaced: the kernel's references to both are counted together,
    /// because its forget names only the number.
    pub fn remember(&self, found: Node) -> Arc<Node> {
        let mut slot = self
            .nodes
            .entry(found.ino)
            .or_insert_with(|| Arc::new(Node::fresh(&found)));
        if !slot.anchor.same_inode(&found.anchor) || slot.kind != found.kind {
            let node = Node::fresh(&found);
            node.lookups
                .store(slot.lookups.load(Ordering::Relaxed), Ordering::Relaxed);
            self.dirs.lock().pop(&found.ino);
            *slot = Arc::new(node);
        }
        let lookups = slot.lookups.fetch_add(1, Ordering::Relaxed) + 1;
        let mut moved = false;
        if let Some(place) = found.place.into_inner() {
            let before = slot.place.lock().replace(place.clone());
            moved = before.is_none_or(|b| (b.parent, &b.name) != (place.parent, &place.name));
        }
        if let Some(board) = self.board.get() {
            slot.write_down(board, lookups, moved);
        }
        Arc::clone(&slot)
    }

    /// Returns `n` references; the last one removes the node. True when it did.
    pub fn forget(&self, ino: Ino, n: u64) -> bool {
        if ino == ROOT {
            return false;
        }
        let gone = self.nodes.remove_if(&ino, |_, node| {
            let before = node.lookups.load(Ordering::Relaxed);
            let left = before.saturating_sub(n);
            node.lookups.store(left, Ordering::Relaxed);
            if let Some(record) = &*node.record.lock() {
                record.count().store(left, Ordering::Relaxed);
            }
            before <= n
        });
        if gone.is_some() {
            self.dirs.lock().pop(&ino);
        }
        gone.is_some()
    }

    /// An open directory, for calls by directory and name. Its offset is shared: never list it.
    pub fn dir(&self, node: &Node) -> Result<Arc<OwnedFd>, Errno> {
        if node.ino == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        if let Some(fd) = self.dirs.lock().get(&node.ino) {
            return Ok(Arc::clone(fd));
        }
        let fd = match self.open(node, OFlags::RDONLY | OFlags::DIRECTORY) {
            // Not for us to list: names are still found in it.
            Err(Errno::ACCESS) => self.open(node, OFlags::PATH | OFlags::DIRECTORY)?,
            other => other?,
        };
        let fd = Arc::new(fd);
        self.dirs.lock().put(node.ino, Arc::clone(&fd));
        Ok(fd)
    }

    /// Opens a node's inode.
    pub fn open(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        if node.ino == ROOT {
            return fd::open_beneath(self.root.as_fd(), &RelPath::root(), flags);
        }
        node.anchor.open(self.root.as_fd(), flags)
    }

    /// statx of a node.
    pub fn stat(&self, node: &Node) -> Result<Stat, Errno> {
        if node.kind == FileType::Directory {
            return stat::stat_fd(self.dir(node)?.as_fd());
        }
        stat::stat_fd(self.open(node, OFlags::PATH)?.as_fd())
    }

    /// All nodes but the root, with the kernel's references to each.
    pub(super) fn all(&self) -> Vec<(Arc<Node>, u64)> {
        let all = self.nodes.iter().filter(|n| n.ino != ROOT);
        all.map(|n| (Arc::clone(&n), n.lookups.load(Ordering::Relaxed)))
            .collect()
    }

    /// Some of the regular files that the kernel holds, or is about to.
    pub fn some_files(&self, max: usize) -> Vec<Ino> {
        let files = self.nodes.iter();
        let files = files.filter(|n| n.kind == FileType::RegularFile);
        files.map(|n| n.ino).take(max).collect()
    }

    /// A node that the kernel holds from the time of the program before us.
    pub(super) fn restore(&self, node: Node, lookups: u64) {
        node.lookups.store(lookups, Ordering::Relaxed);
        self.nodes.insert(node.ino, Arc::new(node));
    }

    /// A node that a program which was killed has written down; of two the later one counts.
    pub(super) fn restore_left(&self, node: Node, record: Record) {
        let lookups = record.count().load(Ordering::Relaxed);
        *node.record.lock() = Some(record);
        self.restore(node, lookups);
    }

    /// How many nodes the kernel holds.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True when it holds none but the root.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }
}

impl Node {
    fn fresh(found: &Node) -> Node {
        Node::new(
            found.ino,
            found.anchor.clone(),
            found.kind,
            found.phase(),
            found.origin(),
            found.place(),
        )
    }
}
