//! Anchors: how to get at an inode of dst again, without an fd for each.
//!
//! By file handle where the daemon may open one (CAP_DAC_READ_SEARCH). Else by name: where the inode
//! was seen last, in a directory that is anchored itself; what is there now must have the identity
//! noted then. Whoever renames or removes a name here moves the anchors with it:
//!
//!   In(directory, name)   child(): seen there
//!   In -> In              rename(): it is somewhere else
//!   In -> Open            unlink(), or another was renamed over it: its name is gone, an fd stays
//!
//! Open fds are few: a bounded number of those used last (I9), and those of deleted inodes that
//! somebody still works with. Lock order: `moving`, then one anchor's place, then leaves.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use rustix::fs::{AtFlags, OFlags, RenameFlags};
use rustix::io::Errno;

use super::Mirror;
use super::kept::Gone;
use super::node::{Ino, Node};
use crate::sys::handle::Handle;
use crate::sys::name::Name;
use crate::sys::stat::{self, Time};
use crate::sys::{fd, host};

/// Share of the fds that this process may have which named anchors may keep open.
const OPEN_SHARE: u64 = 8;
/// And their number at the least and at the most.
const OPEN_MIN: u64 = 64;
const OPEN_MAX: u64 = 1024;

/// How to get at an inode of dst again.
#[derive(Debug, Clone)]
pub enum Anchor {
    /// By file handle: survives renames, costs no fd.
    Handle(Handle),
    /// By name: without CAP_DAC_READ_SEARCH, or on a file system without handles.
    Named(Arc<Named>),
}

impl Anchor {
    /// The anchor of dst's root: all others are of its kind.
    pub fn root(dst: &Arc<OwnedFd>, by_handle: bool) -> Result<Anchor, Errno> {
        if by_handle {
            return Handle::of(dst.as_fd(), c"").map(Anchor::Handle);
        }
        let names = Arc::new(Names {
            held: Mutex::default(),
            open: Mutex::new(LruCache::new(open_max(host::raise_nofile()))),
            moving: RwLock::default(),
        });
        let (ino, identity) = identify(dst.as_fd(), None)?;
        Ok(Anchor::Named(Arc::new(Named {
            ino,
            identity,
            place: Mutex::new(Place::Open(Arc::clone(dst))),
            names,
        })))
    }

    /// The anchor of `name` in `dir`, whose anchor this is.
    pub fn child(&self, dir: BorrowedFd<'_>, name: &Name) -> Result<Anchor, Errno> {
        match self {
            Anchor::Handle(_) => Handle::of(dir, name.as_cstr()).map(Anchor::Handle),
            Anchor::Named(parent) => parent.child(dir, name).map(Anchor::Named),
        }
    }

    /// As `child`, of an inode that is open and was found under that name. ESTALE: another has it now.
    pub fn child_at(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
        inode: BorrowedFd<'_>,
        ino: u64,
    ) -> Result<Anchor, Errno> {
        match self {
            Anchor::Handle(_) => Handle::of(inode, c"").map(Anchor::Handle),
            // While it is open its number is not another's.
            Anchor::Named(parent) => match parent.child(dir, name)? {
                child if child.ino == ino => Ok(Anchor::Named(child)),
                _ => Err(Errno::STALE),
            },
        }
    }

    /// Opens the inode. `root` is any fd on dst's file system. ESTALE when it is gone.
    pub fn open(&self, root: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self {
            Anchor::Handle(handle) => handle.open(root, flags | OFlags::NOFOLLOW),
            Anchor::Named(named) => {
                let fd = named.fd()?;
                match flags.contains(OFlags::PATH) {
                    true => host::dup(fd.as_fd()),
                    false => fd::reopen(fd.as_fd(), flags),
                }
            }
        }
    }

    /// What tells this inode from a later one with the same number (32 bits: the kernel's
    /// i_generation).
    pub fn generation(&self) -> u32 {
        let text = match self {
            Anchor::Handle(handle) => handle.to_text(),
            Anchor::Named(named) => match &named.identity {
                Identity::Handle(handle) => handle.to_text(),
                Identity::Birth(time) => format!("{}.{}", time.sec, time.nsec),
            },
        };
        xxhash_rust::xxh3::xxh3_64(text.as_bytes()) as u32
    }

    /// True when both mean the same inode, not just the same number.
    pub fn same_inode(&self, other: &Anchor) -> bool {
        match (self, other) {
            (Anchor::Handle(a), Anchor::Handle(b)) => a == b,
            (Anchor::Named(a), Anchor::Named(b)) => a.ino == b.ino && a.identity == b.identity,
            _ => false,
        }
    }
}

fn open_max(nofile: u64) -> NonZeroUsize {
    let max = (nofile / OPEN_SHARE).clamp(OPEN_MIN, OPEN_MAX);
    NonZeroUsize::new(max as usize).unwrap_or(NonZeroUsize::MIN)
}

/// What an inode number alone does not say: it is used again.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Identity {
    /// Its handle: anybody may ask for that.
    Handle(Handle),
    /// Its birth, on a file system without handles.
    Birth(Time),
}

fn identify(dir: BorrowedFd<'_>, name: Option<&Name>) -> Result<(Ino, Identity), Errno> {
    let stat = match name {
        Some(name) => stat::stat_at(dir, name.as_cstr())?,
        None => stat::stat_fd(dir)?,
    };
    let identity = match Handle::of(dir, name.map_or(c"", Name::as_cstr)) {
        Ok(handle) => Identity::Handle(handle),
        Err(Errno::OPNOTSUPP | Errno::OVERFLOW) => Identity::Birth(stat.btime),
        Err(e) => return Err(e),
    };
    Ok((stat.key.ino, identity))
}

/// Where an inode can be had.
#[derive(Debug)]
enum Place {
    In(Arc<Named>, Name),
    /// The root, or an inode without a name.
    Open(Arc<OwnedFd>),
    /// Only while it is dropped.
    Nowhere,
}

/// An inode that is known by its place.
#[derive(Debug)]
pub struct Named {
    ino: Ino,
    identity: Identity,
    place: Mutex<Place>,
    names: Arc<Names>,
}

/// All named anchors of a dst.
#[derive(Debug)]
struct Names {
    held: Mutex<HashMap<Ino, Weak<Named>>>,
    /// O_PATH, with the identity: file systems mounted below dst use the same numbers.
    open: Mutex<LruCache<Ino, (Identity, Arc<OwnedFd>)>>,
    /// Read: a name means an inode. Written while that changes.
    moving: RwLock<()>,
}

impl Named {
    fn child(self: &Arc<Self>, dir: BorrowedFd<'_>, name: &Name) -> Result<Arc<Named>, Errno> {
        let names = &self.names;
        let _still = names.moving.read();
        let (ino, identity) = identify(dir, Some(name))?;
        let place = Place::In(Arc::clone(self), name.clone());
        // An older inode's anchor may be let go of here: not under the lock that its end takes.
        let mut held = names.held.lock();
        let known = held.get(&ino).and_then(Weak::upgrade);
        if let Some(known) = &known
            && known.identity == identity
        {
            drop(held);
            known.put(place);
            return Ok(Arc::clone(known));
        }
        let new = Arc::new(Named {
            ino,
            identity,
            place: Mutex::new(place),
            names: Arc::clone(names),
        });
        held.insert(ino, Arc::downgrade(&new));
        Ok(new)
    }

    fn put(&self, place: Place) {
        // The place before may hold the last of a directory's anchor: dropped without the lock.
        let before = std::mem::replace(&mut *self.place.lock(), place);
        drop(before);
    }

    /// An O_PATH fd. ESTALE when the inode is gone.
    fn fd(self: &Arc<Self>) -> Result<Arc<OwnedFd>, Errno> {
        match self.find() {
            // A rename may have come between two steps: once more while nothing moves.
            Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR | Errno::LOOP) => {
                let _still = self.names.moving.read();
                self.find().map_err(|e| match e {
                    Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
                    e => e,
                })
            }
            found => found,
        }
    }

    /// Climbs until something is open, then goes down by name.
    fn find(self: &Arc<Self>) -> Result<Arc<OwnedFd>, Errno> {
        let mut below = Vec::new();
        let mut at = Arc::clone(self);
        let mut found = loop {
            if let Some((identity, open)) = self.names.open.lock().get(&at.ino)
                && *identity == at.identity
            {
                break Arc::clone(open);
            }
            let up = match &*at.place.lock() {
                Place::In(parent, name) => Ok((Arc::clone(parent), name.clone())),
                Place::Open(open) => Err(Arc::clone(open)),
                Place::Nowhere => return Err(Errno::STALE),
            };
            match up {
                Ok((parent, name)) => below.push((std::mem::replace(&mut at, parent), name)),
                Err(open) => break open,
            }
        };
        for (inode, name) in below.into_iter().rev() {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let opened = Arc::new(fd::open_at(found.as_fd(), &name, flags)?);
            let (ino, identity) = identify(opened.as_fd(), None)?;
            if ino != inode.ino || identity != inode.identity {
                return Err(Errno::STALE);
            }
            let kept = (identity, Arc::clone(&opened));
            let over = self.names.open.lock().push(ino, kept);
            drop(over); // Closed without the lock.
            found = opened;
        }
        Ok(found)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let mut held = self.names.held.lock();
        if held.get(&self.ino).is_some_and(|w| w.strong_count() == 0) {
            held.remove(&self.ino);
        }
        drop(held);
        // A deleted inode's room is given back.
        let open = self.names.open.lock().pop(&self.ino);
        drop(open);
        // By hand: the chain of directories may be deeper than a stack.
        let mut place = std::mem::replace(self.place.get_mut(), Place::Nowhere);
        while let Place::In(parent, _) = place {
            place = match Arc::into_inner(parent) {
                Some(mut parent) => std::mem::replace(parent.place.get_mut(), Place::Nowhere),
                None => return,
            };
        }
    }
}

impl Names {
    /// The anchor of what `name` is now, if somebody holds one.
    fn held(&self, dir: BorrowedFd<'_>, name: &Name) -> Option<Arc<Named>> {
        let ino = stat::stat_at(dir, name.as_cstr()).ok()?.key.ino;
        self.held.lock().get(&ino).and_then(Weak::upgrade)
    }

    /// A name is about to go. What it meant stays open if somebody holds it.
    fn leaving(&self, dir: BorrowedFd<'_>, name: &Name) -> Option<(Arc<Named>, Arc<OwnedFd>)> {
        let held = self.held(dir, name)?;
        let open = fd::open_at(dir, name, OFlags::PATH | OFlags::NOFOLLOW).ok()?;
        Some((held, Arc::new(open)))
    }
}

/// A name in an open directory.
pub(super) type Entry<'a> = (&'a Node, BorrowedFd<'a>, &'a Name);

/// What a name means that is about to go.
fn leaving(dir: BorrowedFd<'_>, name: &Name) -> Option<OwnedFd> {
    fd::open_at(dir, name, OFlags::PATH | OFlags::NOFOLLOW).ok()
}

impl Mirror {
    /// What has no name any more, and the kernel holds, stays until it is forgotten. Somebody may be
    /// about to open it; and a new inode with its number would make the kernel call the old one bad:
    /// EIO for him.
    fn keep_while_held(&self, gone: Option<Gone>) {
        let Some(gone) = gone else { return };
        if let Ok(stat) = stat::stat_fd(gone.inode.as_fd())
            && stat.nlink == 0
            && let Some(node) = self.nodes.find(stat.key.ino)
        {
            node.keep(gone);
        }
    }

    /// unlinkat(2) of a name in dst.
    pub(super) fn unlink_at(&self, at: Entry<'_>, flags: AtFlags) -> Result<(), Errno> {
        let (node, dir, name) = at;
        let unlink = || rustix::fs::unlinkat(dir, name.as_cstr(), flags);
        let Anchor::Named(parent) = &node.anchor else {
            let gone = self.gone(leaving(dir, name));
            unlink()?;
            self.keep_while_held(gone);
            return Ok(());
        };
        let _moving = parent.names.moving.write();
        let gone = parent.names.leaving(dir, name);
        unlink()?;
        if let Some((held, open)) = gone {
            held.put(Place::Open(open));
        }
        Ok(())
    }

    /// renameat2(2) in dst.
    pub(super) fn rename_at(
        &self,
        from: Entry<'_>,
        to: Entry<'_>,
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let ((_, from_dir, from_name), (_, to_dir, to_name)) = (from, to);
        let rename = || {
            let (from, to) = (from_name.as_cstr(), to_name.as_cstr());
            rustix::fs::renameat_with(from_dir, from, to_dir, to, flags)
        };
        let (Anchor::Named(from_in), Anchor::Named(to_in)) = (&from.0.anchor, &to.0.anchor) else {
            let gone = self.gone(leaving(to_dir, to_name));
            rename()?;
            self.keep_while_held(gone);
            return Ok(());
        };
        let names = &from_in.names;
        let _moving = names.moving.write();
        let moved = names.held(from_dir, from_name);
        let other = names.leaving(to_dir, to_name);
        let ino = |dir, name: &Name| stat::stat_at(dir, name.as_cstr()).map(|s| s.key.ino);
        // Of one inode: rename(2) does nothing.
        let two_names = ino(from_dir, from_name)? == ino(to_dir, to_name).unwrap_or(0);
        rename()?;
        if two_names {
            return Ok(());
        }
        if let Some((other, open)) = other {
            other.put(match flags.contains(RenameFlags::EXCHANGE) {
                true => Place::In(Arc::clone(from_in), from_name.clone()),
                false => Place::Open(open),
            });
        }
        if let Some(moved) = moved {
            moved.put(Place::In(Arc::clone(to_in), to_name.clone()));
        }
        Ok(())
    }
}

/// True when this process may open handles of dst's file system.
pub(super) fn can_open_handles(dst: BorrowedFd<'_>) -> bool {
    Handle::of(dst, c"").is_ok_and(|h| h.open(dst, OFlags::PATH).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text.as_bytes()).expect("a name")
    }

    fn ino(anchor: &Anchor, root: &OwnedFd) -> Result<Ino, Errno> {
        let opened = anchor.open(root.as_fd(), OFlags::PATH)?;
        Ok(stat::stat_fd(opened.as_fd())?.key.ino)
    }

    #[test]
    fn a_named_anchor_means_its_inode_or_nothing() {
        let tree = tempfile::tempdir().expect("a directory");
        let at = |path: &str| tree.path().join(path);
        std::fs::create_dir(at("dir")).expect("mkdir");
        std::fs::write(at("dir/a"), "a").expect("write");
        let dst = Arc::new(host::open_dir(tree.path()).expect("opens"));
        let root = Anchor::root(&dst, false).expect("an anchor");
        let dir = root.child(dst.as_fd(), &name("dir")).expect("an anchor");
        let opened = dir.open(dst.as_fd(), OFlags::RDONLY).expect("opens");
        let a = dir.child(opened.as_fd(), &name("a")).expect("an anchor");
        let was = ino(&a, &dst).expect("it is there");
        let again = dir.child(opened.as_fd(), &name("a")).expect("an anchor");
        assert!(a.same_inode(&again));
        let Anchor::Named(named) = &a else {
            panic!("by name");
        };
        // Another inode has its name, and nothing is open any more.
        std::fs::rename(at("dir/a"), at("b")).expect("rename");
        std::fs::write(at("dir/a"), "another").expect("write");
        named.names.open.lock().clear();
        assert_eq!(ino(&a, &dst), Err(Errno::STALE));
        let b = root.child(dst.as_fd(), &name("b")).expect("an anchor");
        assert!(a.same_inode(&b));
        assert_eq!(ino(&a, &dst), Ok(was));
    }

    #[test]
    fn few_fds_stay_open_and_none_of_what_nobody_holds() {
        let tree = tempfile::tempdir().expect("a directory");
        let dst = Arc::new(host::open_dir(tree.path()).expect("opens"));
        let root = Anchor::root(&dst, false).expect("an anchor");
        let Anchor::Named(named) = &root else {
            panic!("by name");
        };
        named
            .names
            .open
            .lock()
            .resize(NonZeroUsize::new(4).expect("not zero"));
        let mut held = Vec::new();
        for i in 0..20 {
            let text = i.to_string();
            std::fs::write(tree.path().join(&text), &text).expect("write");
            let anchor = root.child(dst.as_fd(), &name(&text)).expect("an anchor");
            ino(&anchor, &dst).expect("it is there");
            held.push(anchor);
        }
        assert_eq!(named.names.open.lock().len(), 4);
        assert!(held.iter().all(|a| ino(a, &dst).is_ok()));
        held.clear();
        assert_eq!(named.names.open.lock().len(), 0);
        assert!(named.names.held.lock().is_empty());
    }
}
