//! Ahead: names of a P directory for whoever cannot wait for all of them.
//!
//!   look_ahead()    one name is looked up: src is asked for that one, and dst gets it
//!   list_ahead()    a directory that takes long is listed: in src's order, and what a reply tells is placed first,
//!                   because a listing shows dst's inode numbers
//!
//! Whoever has looked into a directory that is not large gets the rest of it placed right after his
//! answer. A listing that began in src's order ends in it, although the directory may be populated
//! meanwhile: a name that dst has no more was deleted by then, one that src never had came later, and
//! POSIX leaves both open; no other is missed or told twice. All of it runs on pool threads. Upholds
//! I1, I6 and I7 (partial.rs), I9.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::Mirror;
use super::node::{Ino, Node, ROOT};
use super::outage::{Again, pause_before};
use super::partial::Partial;
use super::place::Placer;
use super::populate::{Access, DirRef, Waiter};
use super::running::Extent;
use super::upgrade::DirState;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::meta;
use crate::sys::dir::{self, Entry};
use crate::sys::name::{Name, RelPath};
use crate::sys::{fault, stat};

/// After so many names that were looked up one by one the whole directory is cheaper.
const ASKED_MAX: u64 = 1024;
/// Entries of the first reply of a listing, and of the largest.
const BATCH: (usize, usize) = (16, 512);
/// The first offset of a listing's own; below are its start, `.` and `..`.
const FIRST: u64 = 3;
/// Every so many entries a place in src is remembered, for who seeks back.
const STRIDE: u64 = 256;

/// A listing of a P directory in src's order. Offset `FIRST + n` is behind its n-th entry, counted from 0.
#[derive(Debug)]
pub struct Stream {
    dir: DirRef,
    cursor: Mutex<Cursor>,
}

impl Stream {
    /// For the next program; offsets mean the same there as long as src lists in the same order.
    pub fn save(&self) -> Option<DirState> {
        let origin = self.dir.origin.as_ref()?;
        DirState::of(self.dir.ino, &self.dir.anchor, origin)
    }

    /// A listing that began in the program before.
    pub fn of(saved: &DirState) -> Option<Stream> {
        Some(Stream {
            dir: saved.to_ref()?,
            cursor: Mutex::default(),
        })
    }
}

/// Where a listing is in src.
#[derive(Debug, Default)]
struct Cursor {
    /// src's directory, open for this listing alone.
    src: Option<OwnedFd>,
    /// Entries before `from`.
    at: u64,
    /// Where src goes on.
    from: u64,
    /// Where src has the entries 0, STRIDE, 2 * STRIDE and so on.
    places: Vec<u64>,
    /// Entries of the last batch.
    batch: usize,
}

impl Cursor {
    /// The entries from the `want`-th on, at the most `len` of them; none at the end.
    fn read(&mut self, want: u64, len: usize) -> Result<Vec<Entry>, Errno> {
        let Some(src) = &self.src else {
            return Err(Errno::BADF);
        };
        if want < self.at {
            let known = usize::try_from(want / STRIDE).unwrap_or(usize::MAX);
            let known = known.min(self.places.len().saturating_sub(1));
            self.at = known as u64 * STRIDE;
            self.from = self.places.get(known).copied().unwrap_or(0);
        }
        let mut found = Vec::new();
        let (at, places) = (&mut self.at, &mut self.places);
        let mut from = self.from;
        let mut buf = Vec::new();
        dir::read_dir(src.as_fd(), self.from, &mut buf, |entry| {
            if *at == places.len() as u64 * STRIDE {
                places.push(from);
            }
            from = entry.next;
            *at += 1;
            if *at > want {
                let next = FIRST - 1 + *at;
                found.push(Entry { next, ..entry });
            }
            found.len() < len
        })?;
        self.from = from;
        Ok(found)
    }
}

impl Mirror {
    /// True when the names of a directory can be looked up in dst: all of them, or this one.
    pub(super) fn has_name(&self, parent: &Node, name: &Name) -> bool {
        let partial = || self.partials.find(parent.ino, &parent.anchor);
        !parent.is_pending_dir() || partial().is_some_and(|p| p.has(name))
    }

    /// Calls `then` on a pool thread when a name of a P directory can be looked up in dst.
    pub(super) fn look_ahead(self: &Arc<Self>, parent: &Node, name: Name, then: Waiter) {
        let dir = DirRef::of(parent);
        let shown = dir.origin.as_ref().map(|o| o.join(&name).to_path());
        let then = self.waiting(shown.unwrap_or_default(), then);
        self.look_later(dir, name, 0, then);
    }

    fn look_later(self: &Arc<Self>, dir: DirRef, name: Name, attempt: u32, then: Waiter) {
        let mirror = Arc::clone(self);
        let task = move || {
            let error = match mirror.look_for(&dir, &name) {
                // What only dst has may be about to go: nobody is shown it before that is decided.
                Ok(Some(partial)) if mirror.control.identity.delete && !partial.has(&name) => {
                    return mirror.when_populated(dir.ino, Access::Look, then);
                }
                Ok(partial) => {
                    then(Ok(()));
                    partial.inspect(|p| mirror.place_rest(&dir, p));
                    return;
                }
                Err(e) => e,
            };
            let Some(pause) = pause_before(attempt, &error) else {
                if let Some(origin) = &dir.origin {
                    mirror.fail_unless_stopped(&origin.join(&name), &error);
                }
                return then(Err(error));
            };
            dir.origin.iter().for_each(|o| mirror.source.forget_dir(o));
            Arc::clone(&mirror).later(pause, move |again| match again {
                Again::Stopping => then(Err(Error::Stopped)),
                Again::Back => mirror.look_later(dir, name, 0, then),
                Again::Here => mirror.look_later(dir, name, attempt + 1, then),
            });
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// Asks src for one name. What the directory is by then comes back.
    fn look_for(&self, dir: &DirRef, name: &Name) -> Result<Option<Arc<Partial>>> {
        let Some(partial) = self.partial(dir, None)? else {
            return Ok(None);
        };
        if !partial.has(name) {
            self.place_ahead(dir, &partial, std::slice::from_ref(name), false)?;
        }
        Ok(Some(partial))
    }

    /// One who has looked into a directory will look again.
    pub(super) fn place_rest(self: &Arc<Self>, dir: &DirRef, partial: &Partial) {
        let asked = partial.count_asked();
        if !partial.is_large() {
            self.populate_for_nobody(dir, Extent::UnlessLarge);
        } else if asked >= ASKED_MAX {
            self.populate_for_nobody(dir, Extent::Whole);
        }
    }

    /// Places some names of a P directory; `last`: of those that src lists and does not show, stand-ins.
    pub(super) fn place_ahead(
        &self,
        dir: &DirRef,
        partial: &Partial,
        names: &[Name],
        last: bool,
    ) -> Result<()> {
        let src = self.src_of(dir)?;
        let opened = self.open_dir(dir)?;
        let times = match partial.times() {
            Some(times) => times,
            None => {
                let stat = stat::stat_fd(src.fd.as_fd());
                let stat = stat.on("statx", Side::Src, src.path.as_ref())?;
                partial.set_times((stat.atime, stat.mtime));
                (stat.atime, stat.mtime)
            }
        };
        let placer = Placer::new(self, &src, opened.as_fd(), partial, None);
        self.crowd.each(placer.priority(), names, |name| {
            let Some(claimed) = partial.claim(name) else {
                return Ok(());
            };
            fault::point("ahead-before");
            let placed = match placer.place(name) {
                Err(e) if last && e.errno() != Errno::NOENT => self
                    .stand_in(opened.as_fd(), &src.path, name, e)
                    .map(|()| true),
                placed => placed,
            };
            match placed {
                Ok(true) => {
                    // After a crash nobody remembers them.
                    let set = meta::set_times_fd(opened.as_fd(), times.0, times.1);
                    set.on("utimensat", Side::Dst, src.path.as_ref())?;
                    claimed.here();
                }
                Ok(false) => claimed.not_in_src(),
                Err(e) => return Err(e),
            }
            fault::point("ahead-placed");
            Ok(())
        })
    }

    /// Calls `then` when a directory can be listed: in dst, or by the stream that comes with it.
    pub fn when_listable(
        self: &Arc<Self>,
        ino: Ino,
        then: impl FnOnce(Result<Option<Stream>>) + Send + 'static,
    ) {
        let node = match self.nodes.known(ino, "opendir") {
            Ok(node) => node,
            Err(e) => return then(Err(e)),
        };
        if !node.is_pending_dir() {
            return then(Ok(None));
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(&node));
        let ready = move |ready: Result<()>| match ready {
            Err(e) => then(Err(e)),
            Ok(()) if mirror.can_stream(&held) => then(Ok(Some(Stream {
                dir: DirRef::of(&held),
                cursor: Mutex::default(),
            }))),
            Ok(()) => {
                mirror.when_populated(held.ino, Access::Look, |ready| then(ready.map(|()| None)))
            }
        };
        self.when_large_or_populated(&node, Box::new(ready));
    }

    /// Whether src's names are all that there is to list. Where dst may hold others too, whoever lists
    /// waits for all of them.
    fn can_stream(&self, node: &Node) -> bool {
        if !node.is_pending_dir() || self.control.identity.adopt {
            return false;
        }
        let partial = self.partials.find(node.ino, &node.anchor);
        let whole = node.ino == ROOT && !partial.as_ref().is_some_and(|p| p.is_clean());
        !whole && !partial.is_some_and(|p| p.is_named())
    }

    /// The entries of a listing from `offset` on, placed: some of them, none at the end. May wait for
    /// src: not for session threads. `dst` is the same directory there.
    pub fn list_ahead(
        self: &Arc<Self>,
        stream: &Stream,
        dst: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<Vec<Entry>> {
        let (mut attempt, mut last, began) = (0, false, Instant::now());
        let mut cursor = stream.cursor.lock();
        loop {
            let error = match self.list_once(stream, &mut cursor, (dst, last), offset) {
                Ok(entries) => return Ok(entries),
                Err(e) => e,
            };
            // Where src goes on may have another offset in what is mounted anew: from the start.
            *cursor = Cursor::default();
            let origin = stream.dir.origin.as_ref();
            origin.iter().for_each(|o| self.source.forget_dir(o));
            if !self.wait_here(&mut attempt, &error, began) {
                if !std::mem::replace(&mut last, true) {
                    continue;
                }
                if let (
                    Some(path),
                    Error::Call {
                        side: Side::Src, ..
                    },
                ) = (origin, &error)
                {
                    self.fail(path, &error);
                }
                return Err(error);
            }
        }
    }

    fn list_once(
        self: &Arc<Self>,
        stream: &Stream,
        cursor: &mut Cursor,
        (dst, at_last): (BorrowedFd<'_>, bool),
        offset: u64,
    ) -> Result<Vec<Entry>> {
        let shown = stream.dir.origin.as_deref().cloned().unwrap_or_default();
        if cursor.src.is_none() {
            cursor.src = Some(self.source.open_again(&shown)?);
        }
        let mut offset = offset;
        loop {
            let len = (cursor.batch * 2).clamp(BATCH.0, BATCH.1);
            cursor.batch = len;
            let want = (offset + 1).saturating_sub(FIRST);
            let listed = cursor.read(want, len);
            let listed = listed.on("getdents64", Side::Src, &shown)?;
            let Some(last) = listed.last() else {
                return Ok(listed);
            };
            offset = last.next;
            let partial = self.partial(&stream.dir, Some(dst))?;
            if let Some(partial) = &partial {
                let names: Vec<_> = listed.iter().map(|e| e.name.clone()).collect();
                self.place_ahead(&stream.dir, partial, &names, at_last)?;
            }
            let mut here = as_in_dst(&listed, dst, &shown)?;
            if partial.is_some() && here.len() < listed.len() {
                // Listed, and src says that it is not there: the populate looks again, and decides.
                self.populate_names(&stream.dir)?;
                here = as_in_dst(&listed, dst, &shown)?;
            }
            if !here.is_empty() {
                return Ok(here);
            }
        }
    }
}

/// src's entries with the numbers and types that they have in dst; what is not there is left out.
fn as_in_dst(listed: &[Entry], dst: BorrowedFd<'_>, shown: &RelPath) -> Result<Vec<Entry>> {
    let mut here = Vec::with_capacity(listed.len());
    for entry in listed {
        match stat::stat_at(dst, entry.name.as_cstr()) {
            Ok(stat) => here.push(Entry {
                ino: stat.key.ino,
                kind: stat.kind(),
                ..entry.clone()
            }),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).on("statx", Side::Dst, shown.join(&entry.name)),
        }
    }
    Ok(here)
}
