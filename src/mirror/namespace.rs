//! Names: lookup, create, link, unlink, rename.
//!
//! From the moment a directory is populated its names in dst are the truth, and these are plain
//! operations on dst. What makes them more: a directory that is not populated is populated before it is
//! changed, a name that is looked up in it is placed ahead (ahead.rs), and something marked that moves
//! takes its origin with it (which is otherwise its parent's origin and its name).

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::Mirror;
use super::attr::Attr;
use super::control::CONTROL;
use super::found::Found;
use super::hydrate::Need;
use super::node::{Ino, Node, Phase, ROOT};
use super::populate::Access;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::sys::name::Name;
use crate::sys::stat;
use crate::sys::xattr::Target;
use crate::sys::{caps, fault, fd};

/// An entry that was found or made; the kernel holds one more reference to its node.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The inode.
    pub node: Arc<Node>,
    /// Its attributes.
    pub attr: Attr,
}

/// On whose behalf something is created.
#[derive(Debug, Clone, Copy)]
pub struct Creator {
    /// Owner of the new inode.
    pub uid: u32,
    /// Its group, unless the directory is setgid.
    pub gid: u32,
    /// The caller's umask: used where the directory has no default ACL.
    pub umask: u32,
}

/// What to create.
#[derive(Debug, Clone)]
pub enum Make {
    /// A directory with these permission bits.
    Dir(u32),
    /// A file, fifo, socket or device: mode with type bits, and the device number.
    Node(u32, u64),
    /// A symlink with this target.
    Symlink(Vec<u8>),
    /// A file that is open when it appears: mode and open flags.
    File(u32, OFlags),
    /// The same, in a directory that is P (own.rs).
    Own(u32, OFlags),
}

/// Told what was made; of a file also how it is open.
pub(super) type MakeDone = Box<dyn FnOnce(Result<(Entry, Option<OwnedFd>)>) + Send>;

impl Mirror {
    /// Looks a name up. ENOENT is an answer.
    pub fn lookup(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<Entry>) + Send + 'static,
    ) {
        let dir = match self.nodes.get(parent) {
            Ok(dir) => dir,
            Err(errno) => return then(Err(errno).on("lookup", Side::Dst, name.as_os_str())),
        };
        let (mirror, wanted) = (Arc::clone(self), name.clone());
        let look = move |ready: Result<()>| match ready.and_then(|()| mirror.child(parent, &wanted))
        {
            Ok(found) => mirror.with_entry(found, then),
            Err(Error::Unseen { .. }) => mirror.lookup_revealed(parent, wanted, then),
            Err(e) => then(Err(e)),
        };
        if self.is_control(parent, name.as_bytes()) || self.has_name(&dir, &name) {
            return look(Ok(()));
        }
        self.look_ahead(&dir, name, Box::new(look));
    }

    pub(super) fn is_control(&self, parent: Ino, name: &[u8]) -> bool {
        parent == ROOT && name == CONTROL.as_bytes()
    }

    /// Creates something. `open` comes back for `Make::File`.
    pub fn make(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        what: Make,
        creator: Creator,
        then: impl FnOnce(Result<(Entry, Option<OwnedFd>)>) + Send + 'static,
    ) {
        if self.is_control(parent, name.as_bytes()) {
            return then(Err(Errno::PERM).on("create", Side::Dst, CONTROL));
        }
        match matches!(what, Make::File(..)) && self.may_hold_own(parent) {
            true => self.make_own(parent, name, what, creator, Box::new(then)),
            false => self.make_in_populated(parent, name, what, creator, then),
        }
    }

    /// As `make`, behind the populate.
    pub(super) fn make_in_populated(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        what: Make,
        creator: Creator,
        then: impl FnOnce(Result<(Entry, Option<OwnedFd>)>) + Send + 'static,
    ) {
        let make = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            let made = ready.and_then(|()| mirror.make_once(parent, &name, &what, creator));
            mirror.with_made(made, then);
        };
        self.when_populated(parent, Access::Change, self.acting(make));
    }

    /// The entry of what was just made.
    pub(super) fn with_made(
        self: &Arc<Self>,
        made: Result<(Found, Option<OwnedFd>)>,
        then: impl FnOnce(Result<(Entry, Option<OwnedFd>)>) + Send + 'static,
    ) {
        match made {
            Err(e) => then(Err(e)),
            Ok((found, opened)) => {
                self.with_entry(found, move |entry| then(entry.map(|e| (e, opened))));
            }
        }
    }

    pub(super) fn make_now(
        &self,
        parent: Ino,
        name: &Name,
        what: &Make,
        creator: Creator,
    ) -> Result<(Found, Option<OwnedFd>)> {
        let shown = name.as_os_str();
        let dir_node = self.nodes.get(parent).on("create", Side::Dst, shown)?;
        let dir = self.nodes.dir(&dir_node).on("open", Side::Dst, shown)?;
        let at = name.as_cstr();
        let perm = |mode: u32| Mode::from_raw_mode(mode & 0o7777);
        let make = || match what {
            Make::Dir(mode) => rustix::fs::mkdirat(&dir, at, perm(*mode)).map(|()| None),
            Make::Symlink(target) => {
                rustix::fs::symlinkat(OsStr::from_bytes(target), &dir, at).map(|()| None)
            }
            Make::Node(mode, rdev) => {
                let kind = match FileType::from_raw_mode(*mode) {
                    FileType::Unknown => FileType::RegularFile,
                    kind => kind,
                };
                rustix::fs::mknodat(&dir, at, kind, perm(*mode), *rdev).map(|()| None)
            }
            Make::File(mode, flags) => {
                let flags = *flags | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&dir, at, flags, perm(*mode)).map(Some)
            }
            Make::Own(mode, flags) => {
                let flags = *flags | OFlags::TMPFILE | OFlags::CLOEXEC;
                rustix::fs::openat(&dir, c".", flags, perm(*mode)).map(Some)
            }
        };
        let create = || caps::with_fsetid(make);
        let _changing = self.unseen.changing();
        let made = caps::as_creator(creator.uid, creator.gid, creator.umask, create)
            .and_then(|made| made)
            .on("create", Side::Dst, shown)?;
        if let (Make::Own(..), Some(file)) = (what, &made) {
            self.name_own(dir.as_fd(), name, file.as_fd())?;
        }
        let found = self.child_in(&dir_node, dir.as_fd(), name)?;
        // Whoever has it open from now on may change it without a word to us.
        found.node.ctime().is_users();
        Ok((found, made))
    }

    /// unlink(2).
    pub fn unlink(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        if self.is_control(parent, name.as_bytes()) {
            return then(Err(Errno::NOENT).on("unlink", Side::Dst, CONTROL));
        }
        let own = self.has_own(parent, &name);
        let unlink = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            let gone = ready.and_then(|()| mirror.unlink_once(parent, &name, AtFlags::empty()));
            if own {
                mirror.own_removed(parent);
            }
            then(gone);
        };
        match own {
            true => self.when_above_published(parent, Box::new(self.acting(unlink))),
            false => self.when_populated(parent, Access::Change, self.acting(unlink)),
        }
    }

    pub(super) fn unlink_now(&self, parent: Ino, name: &Name, flags: AtFlags) -> Result<()> {
        let shown = name.as_os_str();
        let dir_node = self.nodes.get(parent).on("unlink", Side::Dst, shown)?;
        let dir = self.nodes.dir(&dir_node).on("open", Side::Dst, shown)?;
        let _changing = self.changing_name(dir.as_fd(), name)?;
        if flags.is_empty() {
            self.pin_origin_of_open(dir.as_fd(), name)?;
        }
        self.unlink_at((&dir_node, dir.as_fd(), name), flags)
            .on("unlink", Side::Dst, shown)
    }

    /// A pending file that is open lives on without its name: its origin is in its node. One that
    /// keeps another name may be found there after a restart, under an origin that was implicit.
    fn pin_origin_of_open(&self, dir: BorrowedFd<'_>, name: &Name) -> Result<()> {
        let Ok(stat) = stat::stat_at(dir, name.as_cstr()) else {
            return Ok(());
        };
        let Some(node) = self.nodes.find(stat.key.ino) else {
            return Ok(());
        };
        node.ctime().is_users();
        if stat.nlink > 1 && self.may_be_marked(&node) {
            self.pin_origin(&node, dir, name)?;
        }
        Ok(())
    }

    /// rmdir(2): an unpopulated directory is not empty just because dst's is.
    pub fn rmdir(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        if self.is_control(parent, name.as_bytes()) {
            return then(Err(Errno::NOENT).on("rmdir", Side::Dst, CONTROL));
        }
        let wanted = name.clone();
        let remove = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            then(ready.and_then(|()| mirror.unlink_once(parent, &name, AtFlags::REMOVEDIR)));
        };
        self.when_target_ready(parent, wanted, self.acting(remove));
    }

    /// Calls `then` when the directory can be changed and, if `name` is a directory, that one is
    /// populated. A name that is not there is the operation's own ENOENT.
    fn when_target_ready(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let mirror = Arc::clone(self);
        self.when_populated(parent, Access::Change, move |ready| {
            if let Err(e) = ready {
                return then(Err(e));
            }
            match mirror.child(parent, &name) {
                Err(_) => then(Ok(())),
                Ok(Found { node, .. }) => {
                    node.ctime().is_users();
                    let ino = node.ino;
                    let again = Arc::clone(&mirror);
                    let done = move |ready| {
                        again.nodes.forget(ino, 1);
                        then(ready);
                    };
                    match node.kind {
                        FileType::Directory => mirror.when_populated(ino, Access::Change, done),
                        _ => done(Ok(())),
                    }
                }
            }
        });
    }

    /// link(2).
    pub fn link(
        self: &Arc<Self>,
        node: &Arc<Node>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<Entry>) + Send + 'static,
    ) {
        if self.is_control(parent, name.as_bytes()) {
            return then(Err(Errno::PERM).on("link", Side::Dst, CONTROL));
        }
        let held = Arc::clone(node);
        let link = move |mirror: &Arc<Mirror>, ready: Result<()>| match ready
            .and_then(|()| mirror.link_once(&held, parent, &name))
        {
            Ok(found) => mirror.with_entry(found, then),
            Err(e) => then(Err(e)),
        };
        let (mirror, link) = (Arc::clone(self), self.acting(link));
        let gate = move |ready: Result<()>| match ready {
            Ok(()) => mirror.when_populated(parent, Access::Change, link),
            Err(e) => link(Err(e)),
        };
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        // The answer tells the attributes: src is asked before there is one name more, not after.
        self.with_attr(node, move |attr| match attr {
            Ok(_) => mirror.when_parent_published(&held, Box::new(gate)),
            Err(e) => gate(Err(e)),
        });
    }

    pub(super) fn link_now(&self, node: &Arc<Node>, parent: Ino, name: &Name) -> Result<Found> {
        let shown = name.as_os_str();
        let dir_node = self.nodes.get(parent).on("link", Side::Dst, shown)?;
        let dir = self.nodes.dir(&dir_node).on("open", Side::Dst, shown)?;
        let opened = self
            .nodes
            .open(node, OFlags::PATH)
            .on("open", Side::Dst, shown)?;
        let _guard = self.moves.lock();
        if self.write_origin(node, opened.as_fd())? {
            self.mark_up(&dir_node)?;
            self.epoch.fetch_add(1, Ordering::Release);
        }
        fault::point("rename-origin");
        let _changing = self.unseen.changing();
        fd::link_fd(opened.as_fd(), dir.as_fd(), name.as_cstr()).on("link", Side::Dst, shown)?;
        self.child_in(&dir_node, dir.as_fd(), name)
    }

    /// renameat2(2) with any flags that dst supports.
    pub fn rename(
        self: &Arc<Self>,
        from: (Ino, Name),
        to: (Ino, Name),
        flags: u32,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        if self.is_control(from.0, from.1.as_bytes()) || self.is_control(to.0, to.1.as_bytes()) {
            return then(Err(Errno::PERM).on("rename", Side::Dst, CONTROL));
        }
        let flags = RenameFlags::from_bits_retain(flags);
        let (mirror, source) = (Arc::clone(self), from.clone());
        // A directory is populated too: its mark then has one writer only.
        self.when_target_ready(source.0, source.1, move |ready| {
            if let Err(e) = ready {
                return then(Err(e));
            }
            let (parent, wanted) = to.clone();
            let rename = move |mirror: &Arc<Mirror>, ready: Result<()>| {
                if let Err(e) = ready {
                    return then(Err(e));
                }
                match mirror.rename_once(&from, &to, flags) {
                    Err(Retry::Hydrate(node)) => {
                        mirror.rename_hydrated(node, from, to, flags, then);
                    }
                    Err(Retry::Failed(e)) => then(Err(e)),
                    Ok(()) => then(Ok(())),
                }
            };
            mirror.when_target_ready(parent, wanted, mirror.acting(rename));
        });
    }

    /// A file whose origin does not fit into its mark is pulled first: then it needs none.
    fn rename_hydrated(
        self: &Arc<Self>,
        node: Arc<Node>,
        from: (Ino, Name),
        to: (Ino, Name),
        flags: RenameFlags,
        then: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let rename = move |mirror: &Arc<Mirror>, ready: Result<()>| {
            then(
                ready.and_then(|()| match mirror.rename_once(&from, &to, flags) {
                    Ok(()) => Ok(()),
                    Err(Retry::Failed(e)) => Err(e),
                    Err(Retry::Hydrate(_)) => {
                        Err(Errno::XDEV).on("rename", Side::Dst, from.1.as_os_str())
                    }
                }),
            );
        };
        self.when_hydrated(&node, Need::Write, self.acting(rename));
    }

    pub(super) fn rename_now(
        &self,
        from: &(Ino, Name),
        to: &(Ino, Name),
        flags: RenameFlags,
    ) -> Result<(), Retry> {
        let shown = from.1.as_os_str();
        let from_node = self.nodes.get(from.0).on("rename", Side::Dst, shown)?;
        let to_node = self.nodes.get(to.0).on("rename", Side::Dst, shown)?;
        let from_dir = self.nodes.dir(&from_node).on("open", Side::Dst, shown)?;
        let to_dir = self.nodes.dir(&to_node).on("open", Side::Dst, shown)?;
        let moved = self.node_at(&from_node, from_dir.as_fd(), &from.1);
        let other = match flags.contains(RenameFlags::EXCHANGE) {
            true => self.node_at(&to_node, to_dir.as_fd(), &to.1),
            false => None,
        };
        let result = {
            let _guard = self.moves.lock();
            self.prepare_move(&moved, from_dir.as_fd(), &from.1, &to_node)
                .and_then(|()| self.prepare_move(&other, to_dir.as_fd(), &to.1, &from_node))
                .and_then(|()| {
                    fault::point("rename-origin");
                    drop(self.changing_name(from_dir.as_fd(), &from.1)?);
                    let _changing = self.changing_name(to_dir.as_fd(), &to.1)?;
                    let from = (&*from_node, from_dir.as_fd(), &from.1);
                    let to = (&*to_node, to_dir.as_fd(), &to.1);
                    self.rename_at(from, to, flags)
                        .on("rename", Side::Dst, shown)
                        .map_err(Retry::from)
                })
        };
        fault::point("rename-done");
        if result.is_ok() {
            moved.iter().for_each(|n| n.set_place(to.0, &to.1));
            other.iter().for_each(|n| n.set_place(from.0, &from.1));
        }
        for node in [moved, other].into_iter().flatten() {
            self.nodes.forget(node.ino, 1);
        }
        result
    }

    /// Before something marked moves: its origin is in its mark, and every directory above its new
    /// place is marked, so that a restart finds it. `moves` is held.
    fn prepare_move(
        &self,
        node: &Option<Arc<Node>>,
        dir: BorrowedFd<'_>,
        name: &Name,
        new_parent: &Arc<Node>,
    ) -> Result<(), Retry> {
        let Some(node) = node else { return Ok(()) };
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Ok(());
        }
        if self.pin_origin(node, dir, name)? {
            self.mark_up(new_parent)?;
            self.epoch.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    /// Writes a marked node's origin into its mark. False when it carries no mark.
    fn pin_origin(
        &self,
        node: &Arc<Node>,
        dir: BorrowedFd<'_>,
        name: &Name,
    ) -> Result<bool, Retry> {
        let path = OFlags::PATH | OFlags::NOFOLLOW;
        let opened = fd::open_at(dir, name, path).on("open", Side::Dst, name.as_os_str())?;
        match self.write_origin(node, opened.as_fd()) {
            Err(Error::Call {
                errno: Errno::NOSPC | Errno::TOOBIG | Errno::RANGE,
                ..
            }) => {
                match node.kind {
                    FileType::RegularFile => Err(Retry::Hydrate(Arc::clone(node))),
                    // mv(1) copies then, as between file systems; where dst is full it could not.
                    _ => Err(self.full_or_xdev()).on("rename", Side::Dst, name.as_os_str())?,
                }
            }
            other => Ok(other?),
        }
    }

    fn write_origin(&self, node: &Node, fd: BorrowedFd<'_>) -> Result<bool> {
        let shown = || node.display_name();
        let _guard = self.lock_mark(node.ino);
        let mark = self
            .mark
            .get(Target::Fd(fd))
            .on("getxattr", Side::Dst, shown())?;
        let Some(mark) = mark else { return Ok(false) };
        if mark.own {
            // Where it goes nobody looks for it.
            let removed = self.mark.remove(Target::Fd(fd));
            return removed
                .on("removexattr", Side::Dst, shown())
                .map(|()| false);
        }
        if mark.origin.is_none() {
            match node.origin() {
                Some(origin) => {
                    let mark = Mark {
                        origin: Some(origin.path()),
                        ..mark
                    };
                    self.replace_mark(fd, &mark)
                        .on("setxattr", Side::Dst, shown())?;
                }
                // A user's directory, marked because something pending was moved below it: that
                // carries its own origin.
                None if mark.populated => {}
                None => return Err(Errno::STALE).on("origin", Side::Dst, shown()),
            }
        }
        Ok(true)
    }

    /// Marks a directory and all above it as populated with something pending below, where they
    /// carry no mark any more. `moves` is held: no mark is removed meanwhile.
    fn mark_up(&self, dir: &Arc<Node>) -> Result<()> {
        let mut unmarked = Vec::new();
        let mut at = Some(Arc::clone(dir));
        while let Some(node) = at {
            let place = node.place();
            let shown = node.display_name();
            let opened = self.nodes.dir(&node).on("open", Side::Dst, &shown)?;
            // The disk, not the node, has the last word on what is marked.
            let mark = self.mark.get(Target::Fd(opened.as_fd()));
            if mark.on("getxattr", Side::Dst, &shown)?.is_none() {
                unmarked.push(node);
            }
            at = match place {
                Some(place) => Some(self.nodes.known(place.parent, "lookup")?),
                None => None,
            };
        }
        for node in unmarked.iter().rev() {
            let shown = node.display_name();
            let opened = self.nodes.dir(node).on("open", Side::Dst, &shown)?;
            self.mark_dir(node, &opened)
                .on("setxattr", Side::Dst, &shown)?;
            node.set_phase(Phase::Populated);
            if self.btrfs {
                // Its log may hold the new name without this mark.
                fd::fsync(opened.as_fd()).on("fsync", Side::Dst, &shown)?;
            }
        }
        if !unmarked.is_empty() {
            self.progress.complete.store(false, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Why a rename did not happen; `Hydrate`: the origin does not fit into the mark.
pub(super) enum Retry {
    Failed(Error),
    Hydrate(Arc<Node>),
}

impl From<Error> for Retry {
    fn from(error: Error) -> Retry {
        Retry::Failed(error)
    }
}

impl From<Retry> for Error {
    fn from(retry: Retry) -> Error {
        match retry {
            Retry::Failed(e) => e,
            Retry::Hydrate(node) => Error::Call {
                call: "setxattr",
                side: Side::Dst,
                path: node.display_name(),
                errno: Errno::NOSPC,
            },
        }
    }
}
