//! Own: a user's new file in a directory that is P.
//!
//! Who makes a file in a huge directory does not wait for all of its names: src is asked for that one name,
//! and if it has none the file is made at once.
//!
//!   make_own()    only what is above the directory must be certain (D5, D6)
//!   make_once()   the name is claimed, so that nobody places it; the directory's mark says that users have
//!                 made files in it, durably; the file is made without a name (O_TMPFILE), gets a mark of its
//!                 own, and then its name
//!   disown()      the walker takes that mark off, in the directory that is L by then
//!
//! The file is no part of what a crash makes anew: no populate places anything over an inode with this mark, and
//! src, asked for the name, had none. So it is written, changed and removed like any other file. Renames and
//! links of it wait for all names, as changes of src's entries do. Who lists the directory waits too: a listing
//! in src's order would lack it. Not with `--adopt`, where dst has names that src does not have already.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::asker;
use super::attr::now;
use super::found::Found;
use super::namespace::{Creator, Make, MakeDone};
use super::node::Ino;
use super::partial::Partial;
use super::place::Placer;
use super::populate::{DirRef, LARGE_DIR, Marked};
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{Mark, MarkName};
use crate::meta;
use crate::sys::name::Name;
use crate::sys::xattr::Target;
use crate::sys::{dir, fault, fd, stat};

impl Mirror {
    /// Whether users' own files can be made in a directory now.
    pub(super) fn may_hold_own(&self, parent: Ino) -> bool {
        let can = self.mark == MarkName::Trusted && !self.modes_bind;
        let pending = || self.nodes.find(parent).is_some_and(|d| d.is_pending_dir());
        can && !self.control.identity.adopt && pending()
    }

    /// As `make`, in a directory that is P: behind the populate only if src has the name, or the directory is
    /// not large.
    pub(super) fn make_own(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        what: Make,
        creator: Creator,
        then: MakeDone,
    ) {
        let node = match self.nodes.get(parent) {
            Ok(node) => node,
            Err(errno) => return then(Err(errno).on("create", Side::Dst, name.as_os_str())),
        };
        let (dir, wanted) = (DirRef::of(&node), name.clone());
        let make = self.acting(move |mirror, ready: Result<Option<Arc<Partial>>>| {
            let partial = match ready {
                Ok(partial) => partial,
                Err(e) => return then(Err(e)),
            };
            let made = partial.and_then(|p| mirror.make_claimed(&p, &name, &what, creator));
            match made {
                Some(made) => mirror.with_made(made, then),
                None => mirror.make_in_populated(parent, name, what, creator, then),
            }
        });
        let make = self.waiting_for(&node, make);
        let (mirror, again) = (Arc::clone(self), Arc::clone(self));
        let look = asker::kept(move |ready: Result<()>| {
            make(ready.map(|()| again.look_for_own(&dir, &wanted)));
        });
        let on_pool = move |ready| {
            let task = move || look(ready);
            mirror.engine.pool().run(Priority::Demand, Box::new(task));
        };
        self.when_above_published(parent, Box::new(on_pool));
    }

    /// The directory, if a name that src does not have can be made in it now. Whatever fails here is met
    /// again behind the populate, which knows what to do.
    fn look_for_own(self: &Arc<Self>, dir: &DirRef, name: &Name) -> Option<Arc<Partial>> {
        let partial = self.partial(dir, None).ok()??;
        let inherits = self.partials.default_acl(dir.ino).is_some();
        if inherits || !self.is_large_dir(dir, &partial).ok()? {
            return None;
        }
        if !partial.has(name) {
            self.place_ahead(dir, &partial, std::slice::from_ref(name), false)
                .ok()?;
        }
        Some(partial)
    }

    fn is_large_dir(&self, dir: &DirRef, partial: &Partial) -> Result<bool> {
        if partial.is_large() {
            return Ok(true);
        }
        let path = dir.shown();
        let listing = self.source.open_again(&path)?;
        let mut entries = 0;
        let at_end = dir::read_dir(listing.as_fd(), 0, &mut Vec::new(), |_| {
            entries += 1;
            entries <= LARGE_DIR
        })
        .on("getdents64", Side::Src, &path)?;
        if !at_end {
            partial.note_large();
        }
        Ok(!at_end)
    }

    /// `None`: somebody places the name, or every name is here.
    fn make_claimed(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
        name: &Name,
        what: &Make,
        creator: Creator,
    ) -> Option<Result<(Found, Option<OwnedFd>)>> {
        let (claimed, known) = partial.claim_own(name)?;
        let made = self.note_named(partial).and_then(|()| {
            fault::point("own-named");
            let what = match what {
                Make::File(mode, flags) => &Make::Own(*mode, *flags),
                other => other,
            };
            self.make_once(partial.ino, name, what, creator)
        });
        if made.is_ok() {
            // While the claim keeps its directory from getting src's time.
            partial.note_changed(now());
        }
        let taken = |e: &Error| e.errno() == Errno::EXIST;
        match &made {
            Err(e) if !known && !taken(e) => claimed.not_in_src(),
            _ => claimed.here(),
        }
        if made.is_ok() {
            let (mirror, partial) = (Arc::clone(self), Arc::clone(partial));
            let rest = move || mirror.place_rest(&partial.dir(), &partial);
            self.engine.pool().run(Priority::Demand, Box::new(rest));
        }
        Some(made)
    }

    /// Before the first of them, durably: after a crash nobody else says that src's names are not all. The
    /// caller's claim keeps the directory P.
    fn note_named(&self, partial: &Partial) -> Result<()> {
        if partial.is_named() {
            return Ok(());
        }
        let dir = partial.dir();
        let path = dir.shown();
        let opened = self.open_dir(&dir)?;
        let guard = self.lock_mark(dir.ino);
        let target = Target::Fd(opened.as_fd());
        let mark = self.mark.get(target).on("getxattr", Side::Dst, &path)?;
        if let Some(mark) = mark.filter(|m| !m.named) {
            let mark = Mark {
                named: true,
                ..mark
            };
            let set = self.replace_mark(opened.as_fd(), &mark);
            set.on("setxattr", Side::Dst, &path)?;
        }
        drop(guard);
        fd::fsync(opened.as_fd()).on("fsync", Side::Dst, &path)?;
        partial.note_named();
        Ok(())
    }

    /// What was just made, and has no name yet, is a user's own. Only then does it get its name: who comes
    /// after a kill in between finds all of it, or nothing.
    pub(super) fn name_own(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
        file: BorrowedFd<'_>,
    ) -> Result<()> {
        let shown = || name.as_os_str();
        fault::point("own-made");
        let set = self.mark.set(Target::Open(file), &Mark::own());
        set.on("setxattr", Side::Dst, shown())?;
        fault::point("own-marked");
        let named = fd::link_fd(file, dir, name.as_cstr());
        named.on("create", Side::Dst, shown())?;
        fault::point("own-linked");
        Ok(())
    }

    /// For a request that comes again (`--keep-mount`) and had begun to make a file of a user's own: under the
    /// name is what it made, or else src's, which shows it only now.
    pub(super) fn expect_own(&self, parent: Ino, name: &Name) -> Result<()> {
        match self.has_own(parent, name) {
            true => Ok(()),
            false => Err(Errno::EXIST).on("create", Side::Dst, name.as_os_str()),
        }
    }

    /// Whether a name of a directory that is P is a user's own file.
    pub(super) fn has_own(&self, parent: Ino, name: &Name) -> bool {
        if self.partials.is_empty() || !self.may_hold_own(parent) {
            return false;
        }
        let Ok(node) = self.nodes.get(parent) else {
            return false;
        };
        let Ok(opened) = self.nodes.dir(&node) else {
            return false;
        };
        let mark = self.mark.get(Target::At(opened.as_fd(), name));
        matches!(mark, Ok(Some(mark)) if mark.own)
    }

    /// A user has removed a file of his own.
    pub(super) fn own_removed(&self, parent: Ino) {
        let node = self.nodes.find(parent);
        let partial = node.and_then(|n| self.partials.find(n.ino, &n.anchor));
        partial.inspect(|p| p.note_changed(now()));
    }

    /// Every name of its directory is here: a user's own file is a file like any other. A directory that was
    /// made anew since has src's time: it has that of this file then.
    pub(super) fn disown(
        &self,
        parent: &DirRef,
        opened: BorrowedFd<'_>,
        found: &Marked,
    ) -> Result<()> {
        let shown = || parent.shown();
        let file = match found.dir.anchor.open(self.dst.as_fd(), OFlags::PATH) {
            Err(Errno::NOENT | Errno::STALE) => return Ok(()),
            file => file.on("open", Side::Dst, shown())?,
        };
        let born = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, shown())?;
        let now = stat::stat_fd(opened).on("statx", Side::Dst, shown())?;
        let src = parent
            .origin
            .as_ref()
            .and_then(|o| self.source.dir(o).ok())
            .and_then(|src| stat::stat_fd(src.fd.as_fd()).ok());
        if src.is_some_and(|src| src.mtime == now.mtime) && now.mtime < born.btime {
            let set = meta::set_times_fd(opened, now.atime, born.btime);
            set.on("utimensat", Side::Dst, shown())?;
            self.invalidate(parent.ino);
        }
        let _guard = self.lock_mark(found.dir.ino);
        let removed = self.mark.remove(Target::Fd(file.as_fd()));
        removed.on("removexattr", Side::Dst, shown())
    }
}

impl Placer<'_> {
    /// A user's own file has the name: src had none when he made it. It stays.
    pub(super) fn is_users(&self, name: &Name) -> Result<bool> {
        if !self.partial.is_named() {
            return Ok(false);
        }
        let path = self.src.path.join(name);
        let own = match self.mirror.mark.get(Target::At(self.dst, name)) {
            Err(Errno::NOENT) => false,
            mark => mark
                .on("getxattr", Side::Dst, &path)?
                .is_some_and(|m| m.own),
        };
        if own && stat::stat_at(self.src.fd.as_fd(), name.as_cstr()).is_ok() {
            let changed = Error::SrcChanged {
                path: path.to_path(),
            };
            self.mirror.fail(&path, &changed);
        }
        Ok(own)
    }
}
