//! Partial: a directory that is still P, with some of its names here already.
//!
//! Whoever looks one name up, or lists a huge directory, does not wait for all of it: ahead.rs places
//! what is asked for while, or long before, populate.rs places the rest. Both go through one table of
//! names, so each name is placed once and its inode stays the same.
//!
//!   (absent) -> Busy      claim()   the claimant places it; whoever else wants it waits for him
//!   Busy     -> Here      here()    complete in dst, for whoever asks
//!   Busy     -> (absent)  drop      src has none, or an error: the next one tries again
//!   open     -> closed    close()   populate has seen to every name: nobody places any more, because
//!                                   from now on the names in dst are the users'
//!
//! Nothing of src's in a P directory, or below it, is changed by users (I6, own.rs), so that a crash may make all of it
//! anew (D5). Lock order: a mark lock, then the table of partials, then a partial's names; both are
//! leaves. An entry lives until its directory is populated; also after an error, for the inodes.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::commit::Carried;
use super::control::CONTROL;
use super::hydrate::FileRef;
use super::kept::{here_bytes, kind, write_json};
use super::node::{Ino, Phase, ROOT};
use super::populate::{DirRef, no_origin};
use super::upgrade::{DirState, PartialState, bytes_of, text_of};
use crate::error::{Context, Error, Result, Side};
use crate::meta::DEFAULT_ACL;
use crate::sys::board::{Board, Record};
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::Time;
use crate::sys::xattr::{self, Target};
use crate::sys::{dir, fault};

/// What became of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Busy,
    Here,
}

/// A directory that is P, as this daemon knows it.
pub struct Partial {
    pub(super) ino: Ino,
    anchor: Anchor,
    origin: Arc<RelPath>,
    /// Whatever is in dst is in `names`: neither an earlier start left anything, nor a failure.
    clean: AtomicBool,
    /// The mark of a file in it was removed: before anybody may change that file, the directory's own
    /// L must be durable (D2).
    unmarked: AtomicBool,
    /// A file of an earlier copy counts as here: it never had a mark.
    kept: AtomicBool,
    /// It has more entries than who lists it waits for.
    large: AtomicBool,
    /// Its mark says that users have made files in it (own.rs).
    named: AtomicBool,
    /// Names for which src was asked, one by one.
    asked: AtomicU64,
    names: Mutex<Names>,
    /// A name is not busy any more.
    free: Condvar,
    /// What the next program is told of it (kept.rs).
    record: Mutex<Option<Record>>,
}

struct Names {
    all: HashMap<Name, Standing>,
    busy: usize,
    closed: bool,
    /// The times that the directory will have: placing children disturbs them meanwhile.
    times: Option<(Time, Time)>,
    /// When a user last made or removed a file of his own in it.
    changed: Option<Time>,
    /// Its default ACL, set aside while its children are made.
    default_acl: Option<Vec<u8>>,
    /// Files that came with their data and have no mark of their own.
    carried: Carried,
    /// Where names that are here are written down, if they are, and that.
    board: Option<Arc<Board>>,
    written: Vec<Record>,
}

/// A name that is ours to place.
pub(super) struct Claimed<'a> {
    partial: &'a Partial,
    name: &'a Name,
    outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Failed,
    NotInSrc,
    Here,
}

impl Claimed<'_> {
    /// It is complete in dst.
    pub(super) fn here(mut self) {
        self.outcome = Outcome::Here;
    }

    /// src has no such name, and dst was not touched.
    pub(super) fn not_in_src(mut self) {
        self.outcome = Outcome::NotInSrc;
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let mut names = self.partial.names.lock();
        names.busy -= 1;
        match self.outcome {
            Outcome::Here => {
                // Before anybody sees it.
                names.write_down(self.partial.ino, self.name);
                names.all.insert(self.name.clone(), Standing::Here);
            }
            Outcome::NotInSrc => {
                names.all.remove(self.name);
            }
            Outcome::Failed => {
                // Something half made may be under the name.
                self.partial.clean.store(false, Ordering::Relaxed);
                names.all.remove(self.name);
            }
        }
        drop(names);
        self.partial.free.notify_all();
    }
}

impl Names {
    fn write_down(&mut self, dir: Ino, name: &Name) {
        let Some(board) = self.board.as_ref().filter(|_| !fault::breaks("K4")) else {
            return;
        };
        let record = board.put(kind::HERE, 0, &here_bytes(dir, name.as_bytes()));
        self.written.extend(record);
    }
}

impl Partial {
    /// Nothing is here yet; `clean`: dst's directory is empty.
    pub(super) fn new(
        ino: Ino,
        anchor: Anchor,
        origin: Arc<RelPath>,
        clean: bool,
        default_acl: Option<Vec<u8>>,
    ) -> Partial {
        Partial {
            ino,
            anchor,
            origin,
            clean: AtomicBool::new(clean),
            unmarked: AtomicBool::new(false),
            kept: AtomicBool::new(false),
            large: AtomicBool::new(false),
            named: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            names: Mutex::new(Names {
                all: HashMap::new(),
                busy: 0,
                closed: false,
                times: None,
                changed: None,
                default_acl,
                carried: Carried::default(),
                board: None,
                written: Vec::new(),
            }),
            free: Condvar::new(),
            record: Mutex::default(),
        }
    }

    /// True while everything in dst is in the table of names.
    pub(super) fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Relaxed)
    }

    /// Makes a name the caller's to place; waits for whoever is at it. `None`: it is here, or the
    /// directory is populated: dst's names tell.
    pub(super) fn claim<'a>(&'a self, name: &'a Name) -> Option<Claimed<'a>> {
        let mut names = self.names.lock();
        loop {
            if names.closed {
                return None;
            }
            match names.all.get(name) {
                Some(Standing::Here) => return None,
                Some(Standing::Busy) => self.free.wait(&mut names),
                None => break,
            }
        }
        names.all.insert(name.clone(), Standing::Busy);
        names.busy += 1;
        Some(Claimed {
            partial: self,
            name,
            outcome: Outcome::Failed,
        })
    }

    /// Whether a name is here already. Never waits.
    pub(super) fn has(&self, name: &Name) -> bool {
        let names = self.names.lock();
        names.closed || names.all.get(name) == Some(&Standing::Here)
    }

    /// Every name of src is here: no more are placed once this returns. Waits for those in work.
    pub(super) fn close(&self) {
        let mut names = self.names.lock();
        names.closed = true;
        while names.busy > 0 {
            self.free.wait(&mut names);
        }
    }

    /// The directory could not be published: it is as before `close`.
    pub(super) fn reopen(&self) {
        self.names.lock().closed = false;
    }

    pub(super) fn note_large(&self) {
        self.large.store(true, Ordering::Relaxed);
        self.write_again();
    }

    pub(super) fn is_large(&self) -> bool {
        self.large.load(Ordering::Relaxed)
    }

    /// Counts one name that src was asked for alone; how many there were before.
    pub(super) fn count_asked(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn times(&self) -> Option<(Time, Time)> {
        let names = self.names.lock();
        let (atime, mtime) = names.times?;
        Some((atime, names.changed.unwrap_or(mtime)))
    }

    /// When a user last made or removed a file of his own in it, if one has.
    pub(super) fn changed(&self) -> Option<Time> {
        self.names.lock().changed
    }

    pub(super) fn note_changed(&self, at: Time) {
        self.names.lock().changed = Some(at);
    }

    /// Users have made files in it.
    pub(super) fn is_named(&self) -> bool {
        self.named.load(Ordering::SeqCst)
    }

    pub(super) fn note_named(&self) {
        self.named.store(true, Ordering::SeqCst);
        self.write_again();
    }

    /// Makes a name that src does not have a user's. `None`: somebody is at it, or every name is here.
    /// True: it was his before, whatever is there now. Never waits.
    pub(super) fn claim_own<'a>(&'a self, name: &'a Name) -> Option<(Claimed<'a>, bool)> {
        let mut names = self.names.lock();
        if names.closed || names.all.get(name) == Some(&Standing::Busy) {
            return None;
        }
        let before = names.all.insert(name.clone(), Standing::Busy);
        names.busy += 1;
        drop(names);
        let claimed = Claimed {
            partial: self,
            name,
            outcome: Outcome::Failed,
        };
        Some((claimed, before.is_some()))
    }

    pub(super) fn set_times(&self, times: (Time, Time)) {
        self.names.lock().times = Some(times);
        self.write_again();
    }

    pub(super) fn add_carried(&self, bytes: u64) {
        let carried = &mut self.names.lock().carried;
        carried.files += 1;
        carried.bytes += bytes;
    }

    pub(super) fn carried(&self) -> Carried {
        self.names.lock().carried
    }

    /// A file of an earlier copy was taken as it is.
    pub(super) fn note_kept(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Asked after the directory's L was set: whether a mark below it may have gone before.
    pub(super) fn had_unmarked(&self) -> bool {
        self.unmarked.load(Ordering::SeqCst)
    }
}

/// All directories that are partly here.
#[derive(Default)]
pub struct Partials {
    table: Mutex<HashMap<Ino, Arc<Partial>>>,
}

impl Partials {
    /// True while there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }

    pub(super) fn find(&self, ino: Ino, anchor: &Anchor) -> Option<Arc<Partial>> {
        let found = self.table.lock().get(&ino).cloned()?;
        found.anchor.same_inode(anchor).then_some(found)
    }

    /// The times that a directory will end with, where they are disturbed now.
    pub(super) fn times(&self, ino: Ino) -> Option<(Time, Time)> {
        self.table.lock().get(&ino)?.times()
    }

    /// The default ACL of a directory, where it is set aside.
    pub(super) fn default_acl(&self, ino: Ino) -> Option<Vec<u8>> {
        let partial = self.table.lock().get(&ino).cloned()?;
        partial.names.lock().default_acl.clone()
    }

    /// The mark of a file is about to be removed; to be called before that.
    pub(super) fn note_unmark(&self, file: &FileRef) {
        let table = self.table.lock();
        if table.is_empty() {
            return;
        }
        let Some(origin) = &file.origin else { return };
        for partial in table.values().filter(|p| p.origin == origin.dir) {
            partial.unmarked.store(true, Ordering::SeqCst);
        }
    }

    /// The directory is populated.
    pub(super) fn remove(&self, ino: Ino) {
        self.table.lock().remove(&ino);
    }
}

impl Partials {
    pub(super) fn all(&self) -> Vec<Arc<Partial>> {
        self.table.lock().values().cloned().collect()
    }

    pub(super) fn restore(&self, partial: Partial) {
        self.table.lock().insert(partial.ino, Arc::new(partial));
    }
}

impl Partial {
    /// For the next program: the names that are here. One in work counts as absent.
    pub(super) fn save(&self) -> Option<PartialState> {
        self.told(|standing| standing == Standing::Here)
    }

    fn told(&self, name: impl Fn(Standing) -> bool) -> Option<PartialState> {
        let names = self.names.lock();
        let here = names.all.iter().filter(|(_, s)| name(**s));
        Some(PartialState {
            dir: DirState::of(self.ino, &self.anchor, &self.origin)?,
            unmarked: self.unmarked.load(Ordering::SeqCst),
            kept: self.has_kept(),
            large: self.is_large(),
            named: self.is_named(),
            asked: self.asked.load(Ordering::Relaxed),
            here: here.map(|(name, _)| text_of(name.as_bytes())).collect(),
            times: names.times.map(|(a, m)| (a.sec, a.nsec, m.sec, m.nsec)),
            default_acl: names.default_acl.clone(),
            carried: (names.carried.files, names.carried.bytes),
        })
    }

    /// As the program before left it. What it has placed since it told us is made anew.
    pub(super) fn of(saved: PartialState) -> Option<Partial> {
        let DirRef {
            ino,
            anchor,
            origin,
        } = saved.dir.to_ref()?;
        let here = saved.here.iter().map(|text| {
            let name = Name::new(&bytes_of(text)?)?;
            Some((name, Standing::Here))
        });
        let time = |sec, nsec| Time { sec, nsec };
        let (files, bytes) = saved.carried;
        Some(Partial {
            ino,
            anchor,
            origin: origin?,
            clean: AtomicBool::new(false),
            unmarked: AtomicBool::new(saved.unmarked),
            kept: AtomicBool::new(saved.kept),
            large: AtomicBool::new(saved.large),
            named: AtomicBool::new(saved.named),
            asked: AtomicU64::new(saved.asked),
            names: Mutex::new(Names {
                all: here.collect::<Option<_>>()?,
                busy: 0,
                closed: false,
                times: saved.times.map(|(a, an, m, mn)| (time(a, an), time(m, mn))),
                changed: None,
                default_acl: saved.default_acl,
                carried: Carried { files, bytes },
                board: None,
                written: Vec::new(),
            }),
            free: Condvar::new(),
            record: Mutex::default(),
        })
    }

    /// From now on it is written down there: before anybody sees one of its names.
    fn keep_on(&self, board: &Arc<Board>) {
        self.names.lock().board = Some(Arc::clone(board));
        self.write_on(board);
    }

    fn write_again(&self) {
        let board = self.names.lock().board.clone();
        if let Some(board) = board {
            self.write_on(&board);
        }
    }

    fn write_on(&self, board: &Arc<Board>) {
        let mut record = self.record.lock();
        let state = self.told(|_| false);
        let new = match &state {
            Some(state) => write_json(board, kind::PARTIAL, 0, state),
            None => {
                board.spoil();
                None
            }
        };
        // The new one is there before the old one goes.
        *record = new;
    }

    /// What is written of it already, by a program that was killed.
    pub(super) fn attach(&self, record: Record, names: Vec<Record>) {
        let mut mine = self.names.lock();
        mine.board = Some(Arc::clone(record.board()));
        mine.written = names;
        drop(mine);
        *self.record.lock() = Some(record);
    }

    pub(super) fn dir(&self) -> DirRef {
        DirRef {
            ino: self.ino,
            anchor: self.anchor.clone(),
            origin: Some(Arc::clone(&self.origin)),
        }
    }
}

impl Mirror {
    /// What is known of a directory that is P; `None` when it is populated.
    pub(super) fn partial(
        &self,
        dir: &DirRef,
        opened: Option<BorrowedFd<'_>>,
    ) -> Result<Option<Arc<Partial>>> {
        if let Some(found) = self.partials.find(dir.ino, &dir.anchor) {
            return Ok(Some(found));
        }
        let shown = dir.origin.as_deref().cloned().unwrap_or_default();
        let own;
        let opened = match opened {
            Some(opened) => opened,
            None => {
                own = self.open_dir(dir)?;
                own.as_fd()
            }
        };
        // Its names are listed here, and its ACL is set aside, once: by whoever comes first.
        let _guard = self.lock_mark(dir.ino);
        // In this order: a populate that ends removes its entry last.
        if let Some(found) = self.partials.find(dir.ino, &dir.anchor) {
            return Ok(Some(found));
        }
        if self.commit.is_publishing(dir.ino) {
            // Every name is here; the mark is still P until its barrier (D6).
            self.note_phase(dir, Phase::Populated);
            return Ok(None);
        }
        let mark = self.mark.get(Target::Fd(opened));
        let named = match mark.on("getxattr", Side::Dst, &shown)? {
            None => {
                self.note_phase(dir, Phase::Unmarked);
                return Ok(None);
            }
            Some(mark) if mark.populated => {
                self.note_phase(dir, Phase::Populated);
                return Ok(None);
            }
            Some(mark) => mark.named,
        };
        let origin = dir.origin.clone().ok_or_else(|| no_origin(&shown))?;
        let clean = is_empty(dir.ino, opened).on("getdents64", Side::Dst, &shown)?;
        let default_acl = take_default_acl(opened).on("removexattr", Side::Dst, &shown)?;
        let partial = Partial::new(dir.ino, dir.anchor.clone(), origin, clean, default_acl);
        if named {
            partial.note_named();
        }
        if let Some(board) = self.board() {
            partial.keep_on(board);
        }
        let partial = Arc::new(partial);
        self.partials
            .table
            .lock()
            .insert(dir.ino, Arc::clone(&partial));
        Ok(Some(partial))
    }

    /// src's directory, unless it is itself in the middle of a migration.
    pub(super) fn src_of(&self, dir: &DirRef) -> Result<Arc<super::source::SrcDir>> {
        let origin = dir
            .origin
            .as_ref()
            .ok_or_else(|| no_origin(&RelPath::root()))?;
        let src = self.source.dir(origin)?;
        let marked = self.mark.get(Target::Fd(src.fd.as_fd()));
        match marked.on("getxattr", Side::Src, origin.as_ref())? {
            None => Ok(src),
            Some(_) => Err(Error::SrcPending {
                path: origin.to_path(),
            }),
        }
    }
}

/// Nothing is in the directory; the control directory is no trace of an earlier start.
fn is_empty(ino: Ino, opened: BorrowedFd<'_>) -> Result<bool, Errno> {
    dir::read_dir(opened, 0, &mut Vec::new(), |entry| {
        ino == ROOT && entry.name.as_bytes() == CONTROL.as_bytes()
    })
}

/// The default ACL comes back when all children are made: they would inherit it (D8). Until then
/// whoever asks for it is answered from memory.
fn take_default_acl(opened: BorrowedFd<'_>) -> Result<Option<Vec<u8>>, Errno> {
    let target = Target::Fd(opened);
    let acl = xattr::get(target, DEFAULT_ACL)?;
    if acl.is_some() {
        xattr::remove(target, DEFAULT_ACL)?;
    }
    Ok(acl)
}

#[cfg(test)]
mod tests;
