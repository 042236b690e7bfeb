//! Kept: what the next program has to know when this one is killed, written down as it happens.
//!
//! With `--keep-mount` the kernel's handles outlive the daemon (`sys/keeper.rs`), so what `upgrade.rs` tells
//! in one piece is on a board (`sys/board.rs`) at any moment:
//!
//!   NODE      an inode that the kernel holds; the count beside it is how often
//!   GONE      one without a name that stays open while it is held
//!   PARTIAL   a directory that is P, of which names were shown, until it is L in dst
//!   HERE      such a name
//!   ACT       a change that cannot be asked for twice, from before it until its answer (acts.rs)
//!
//! dst stays the truth: what a mark says is read from the mark. A syncfs takes the place of `freeze`: no
//! removal of a mark can be undone once users write (D2), and every carried file is durable.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::acts::Acts;
use super::node::{Ino, Node, Origin, Phase};
use super::partial::Partial;
use super::upgrade::{NodeState, PartialState, text_of};
use crate::error::{Context, Error, Result, Side};
use crate::sys::board::{Board, Record};
use crate::sys::xattr::Target;
use crate::sys::{fault, fd, keeper, stat};

/// What a record is.
pub mod kind {
    /// What does not change: `run/keeper.rs`.
    pub const BASE: u8 = 1;
    /// See the module's head.
    pub const NODE: u8 = 2;
    /// See the module's head: an fd.
    pub const GONE: u8 = 3;
    /// An open file: `fuse/succession.rs`.
    pub const FILE: u8 = 4;
    /// An open directory: `fuse/succession.rs`.
    pub const LISTING: u8 = 5;
    /// See the module's head.
    pub const PARTIAL: u8 = 6;
    /// See the module's head: the directory's number and the name.
    pub const HERE: u8 = 7;
    /// See the module's head.
    pub const ACT: u8 = 8;
}

/// Where it is written, if it is.
#[derive(Default)]
pub(super) struct Keep {
    board: OnceLock<Arc<Board>>,
    pub(super) acts: Acts,
}

/// What a program that was killed has left, by kind, in the order in which it was written.
#[derive(Debug, Default)]
pub struct Left {
    /// `kind::BASE`.
    pub base: Vec<Record>,
    /// `kind::FILE`.
    pub files: Vec<Record>,
    /// `kind::LISTING`.
    pub listings: Vec<Record>,
    nodes: Vec<Record>,
    gone: Vec<Record>,
    partials: Vec<Record>,
    here: Vec<Record>,
    acts: Vec<Record>,
}

impl Left {
    /// Sorts them.
    pub fn of(all: Vec<Record>) -> Left {
        let mut left = Left::default();
        for record in all {
            match record.kind() {
                kind::BASE => left.base.push(record),
                kind::FILE => left.files.push(record),
                kind::LISTING => left.listings.push(record),
                kind::NODE => left.nodes.push(record),
                kind::GONE => left.gone.push(record),
                kind::PARTIAL => left.partials.push(record),
                kind::HERE => left.here.push(record),
                kind::ACT => left.acts.push(record),
                _ => {} // Of nobody: its slot is free again.
            }
        }
        left
    }
}

/// The fd of a `kind::GONE`.
pub fn gone_fd(bytes: &[u8]) -> Option<RawFd> {
    Some(RawFd::from_ne_bytes(bytes.try_into().ok()?))
}

/// A file that was removed, open, and the record of that: it goes before the fd is closed.
#[derive(Debug)]
pub(super) struct Gone {
    _record: Option<Record>,
    pub(super) inode: OwnedFd,
}

impl Gone {
    pub(super) fn new(record: Option<Record>, inode: OwnedFd) -> Gone {
        Gone {
            _record: record,
            inode,
        }
    }
}

/// As JSON, on the board.
pub fn write_json(
    board: &Arc<Board>,
    kind: u8,
    count: u64,
    what: &impl serde::Serialize,
) -> Option<Record> {
    match serde_json::to_vec(what) {
        Ok(bytes) => board.put(kind, count, &bytes),
        Err(_) => {
            board.spoil();
            None
        }
    }
}

impl Node {
    /// Writes the node down with `lookups` references: the first time, and when it is at another place.
    pub(super) fn write_down(&self, board: &Arc<Board>, lookups: u64, moved: bool) {
        let mut record = self.record.lock();
        match &*record {
            Some(record) if !moved => record.count().store(lookups, Ordering::Relaxed),
            _ => self.write_anew(board, lookups, &mut record),
        }
    }

    /// It is at another place, if it was written down.
    pub(super) fn write_place(&self) {
        let mut record = self.record.lock();
        if let Some(old) = &*record {
            let lookups = old.count().load(Ordering::Relaxed);
            let board = Arc::clone(old.board());
            self.write_anew(&board, lookups, &mut record);
        }
    }

    fn write_anew(&self, board: &Arc<Board>, lookups: u64, record: &mut Option<Record>) {
        let new = match NodeState::of(self, lookups, None) {
            Some(state) => write_json(board, kind::NODE, lookups, &state),
            None => {
                board.spoil();
                None
            }
        };
        // The new one is there before the old one goes.
        *record = new;
    }
}

impl Mirror {
    /// From now on what the next program has to know is written there. Before anybody is served.
    pub fn keep_on(&self, board: Arc<Board>) {
        self.nodes.keep_on(Arc::clone(&board));
        let _ = self.keep.board.set(board); // Once.
    }

    /// Where what the next program has to know is written.
    pub fn board(&self) -> Option<&Arc<Board>> {
        self.keep.board.get()
    }

    /// What a name means that is about to go, open; it is written down before the name goes.
    pub(super) fn gone(&self, inode: Option<OwnedFd>) -> Option<Gone> {
        use std::os::fd::AsRawFd;
        let inode = inode?;
        if fault::breaks("K3") {
            return Some(Gone::new(None, inode));
        }
        let number = inode.as_raw_fd().to_ne_bytes();
        let record = self.board().and_then(|b| b.put(kind::GONE, 0, &number));
        Some(Gone::new(record, inode))
    }

    /// Takes up what a program that was killed has left. Nobody is served yet, and no thread of ours runs.
    pub(super) fn restore_left(self: &Arc<Self>, board: Arc<Board>, left: &mut Left) -> Result<()> {
        // As `freeze` does: marks that were removed a moment ago, and what was carried.
        let sync = || fd::syncfs(self.dst.as_fd());
        fault::unless_broken("K5", sync).on("syncfs", Side::Dst, ".")?;
        self.keep_on(board);
        let unreadable =
            || Error::Unusable("an inode in what was left behind makes no sense".into());
        let held = |r: &Record| r.count().load(Ordering::Relaxed) > 0;
        for record in left.nodes.drain(..).filter(held) {
            let saved: NodeState =
                serde_json::from_slice(record.bytes()).map_err(|_| unreadable())?;
            let node = saved.to_node().ok_or_else(unreadable)?;
            self.see_mark(&node)?;
            self.nodes.restore_left(node, record);
        }
        for record in left.gone.drain(..) {
            self.restore_gone(record);
        }
        self.restore_partials(left)?;
        self.restore_acts(left.acts.drain(..));
        Ok(())
    }

    /// What dst says of a node. One that nothing is known of in src has no mark, but a directory may have
    /// got one.
    fn see_mark(&self, node: &Node) -> Result<()> {
        let marked = match node.kind {
            FileType::Directory => true,
            FileType::RegularFile => node.origin().is_some(),
            _ => false,
        };
        node.set_phase(Phase::Unmarked);
        if !marked {
            return Ok(());
        }
        let opened = match self.nodes.open(node, OFlags::PATH) {
            // Deleted: who still has it open reads it past us, or has an fd of ours.
            Err(Errno::STALE | Errno::NOENT) => return Ok(()),
            opened => opened.on("open", Side::Dst, node.display_name())?,
        };
        let mark = self.mark.get(Target::Fd(opened.as_fd()));
        let Some(mark) = mark.on("getxattr", Side::Dst, node.display_name())? else {
            return Ok(());
        };
        node.set_phase(match mark.populated {
            true => Phase::Populated,
            false => Phase::Pending,
        });
        if let Some(origin) = &mark.origin {
            node.set_origin(Some(Origin::of(origin)));
        }
        Ok(())
    }

    fn restore_gone(&self, record: Record) {
        let Some(Ok(inode)) = gone_fd(record.bytes()).map(keeper::take) else {
            return;
        };
        if let Ok(stat) = stat::stat_fd(inode.as_fd())
            && stat.nlink == 0
            && let Some(node) = self.nodes.find(stat.key.ino)
        {
            node.keep(Gone::new(Some(record), inode));
        }
    }

    /// Whatever was noted of such a directory may be older than what became of it: what costs no more than
    /// a barrier is taken for true.
    fn restore_partials(self: &Arc<Self>, left: &mut Left) -> Result<()> {
        let mut here: HashMap<Ino, Vec<Record>> = HashMap::new();
        for record in left.here.drain(..) {
            if let Some((dir, _)) = here_of(record.bytes()) {
                here.entry(dir).or_default().push(record);
            }
        }
        let mut last: HashMap<Ino, (PartialState, Record)> = HashMap::new();
        let unreadable =
            || Error::Unusable("a directory in what was left behind makes no sense".into());
        for record in left.partials.drain(..) {
            let saved: PartialState =
                serde_json::from_slice(record.bytes()).map_err(|_| unreadable())?;
            last.insert(saved.dir.ino(), (saved, record));
        }
        for (ino, (mut saved, record)) in last {
            let names = here.remove(&ino).unwrap_or_default();
            let shown = names.iter().filter_map(|r| here_of(r.bytes()));
            saved.here = shown.map(|(_, name)| text_of(name)).collect();
            (saved.unmarked, saved.kept) = (true, true);
            let partial = Partial::of(saved).ok_or_else(unreadable)?;
            partial.attach(record, names);
            self.restore_partial(partial)?;
        }
        Ok(())
    }
}

/// The directory and the name of a `kind::HERE`.
fn here_of(bytes: &[u8]) -> Option<(Ino, &[u8])> {
    let (dir, name) = bytes.split_first_chunk::<8>()?;
    Some((Ino::from_ne_bytes(*dir), name))
}

/// The bytes of a `kind::HERE`.
pub(super) fn here_bytes(dir: Ino, name: &[u8]) -> Vec<u8> {
    [&dir.to_ne_bytes(), name].concat()
}
