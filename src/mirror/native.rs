//! What the mirror does for a tree without a mount (native.rs): everything marked is made able to do
//! without names.
//!
//! A user who works in dst itself moves and links what is marked, and nobody tells us. So before the
//! mount goes each pending file gets its origin into its mark, whatever its name will be, and a link
//! in `.mirrorfs/pending`, under its inode number in hexadecimal: by it the file is found again,
//! wherever it is. Nothing is pending when that directory is empty.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::anchor::Anchor;
use super::hydrate::{FileRef, Hydration, Need};
use super::node::Origin;
use super::populate::{DirRef, Marked, Waiter};
use crate::crew::Crew;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{Mark, MarkName};
use crate::sys::handle::Handle;
use crate::sys::name::Name;
use crate::sys::xattr::Target;
use crate::sys::{dir, fd, host, stat};
use crate::throttle::Background;

/// The directory of links, in the control directory.
pub(super) const PENDING: &str = "pending";
/// Messages show where.
const AT: &str = ".mirrorfs/pending";

/// What one look at everything that is marked gave.
#[derive(Debug, Default)]
pub struct Pinned {
    /// Files that are pending.
    pub files: u64,
    /// Directories that are not populated, and files that could not be pinned.
    pub left: u64,
}

impl Mirror {
    /// Populates every directory, without data.
    pub fn populate_all(self: &Arc<Self>) -> Result<Pinned> {
        self.each_marked(&|_| Ok(()))
    }

    /// Pins every pending file. What does not fit into a mark is pulled instead; it counts as left.
    pub fn pin_all(self: &Arc<Self>, index: BorrowedFd<'_>) -> Result<Pinned> {
        self.each_marked(&|found| self.pin(index, found))
    }

    /// True when nothing that was begun waits for a syncfs: what carries no mark lost it for good (D2).
    pub fn is_settled(&self) -> bool {
        if self.commit.is_idle() && self.hydrations.is_empty() {
            return true;
        }
        self.commit.hurry();
        false
    }

    /// All that was done in dst is durable from now on.
    pub fn sync_dst(&self) -> Result<()> {
        fd::syncfs(self.dst.as_fd()).on("syncfs", Side::Dst, ".")
    }

    /// The directory of links; made when it is missing.
    pub fn pending_index(&self) -> Result<OwnedFd> {
        let control = self.control.dir.as_fd();
        match rustix::fs::mkdirat(control, PENDING, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).on("mkdir", Side::Dst, AT),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(control, PENDING, flags, Mode::empty()).on("open", Side::Dst, AT)
    }

    /// The control directory, open.
    pub fn control_dir(&self) -> BorrowedFd<'_> {
        self.control.dir.as_fd()
    }

    /// True when dst can do without a mount: inodes are had by handle, marks are no user's.
    pub fn can_go_native(&self) -> bool {
        let by_handle = self.nodes.get(super::node::ROOT);
        let by_handle = by_handle.is_ok_and(|n| matches!(n.anchor, Anchor::Handle(_)));
        by_handle && !self.modes_bind && self.mark == MarkName::Trusted
    }

    /// Goes over all that carries a mark, on all CPUs; populates what is not.
    fn each_marked(
        self: &Arc<Self>,
        on_file: &(dyn Fn(&Marked) -> Result<()> + Sync),
    ) -> Result<Pinned> {
        let Some(root) = self.root_dir()? else {
            return Ok(Pinned::default());
        };
        let (files, left) = (AtomicU64::new(0), AtomicU64::new(0));
        let threads = host::cpus().len() * 2;
        let stop = AtomicBool::new(false);
        let step = |crew: &Crew<'_, DirRef, Error>, (): &mut (), dir: DirRef| {
            let fail = |e| {
                left.fetch_add(1, Ordering::Relaxed);
                crew.tell(e);
            };
            let seen = self.each_marked_in(&dir, crew, &|found| {
                files.fetch_add(1, Ordering::Relaxed);
                on_file(found).unwrap_or_else(fail);
            });
            seen.unwrap_or_else(fail);
            if self.stopping() {
                stop.store(true, Ordering::Relaxed);
            }
        };
        Crew::run(
            vec![root],
            &stop,
            || threads,
            || (),
            step,
            |e: Error| {
                tracing::warn!("native: {e}");
            },
        );
        match self.stopping() {
            true => Err(Error::Stopped),
            false => Ok(Pinned {
                files: files.into_inner(),
                left: left.into_inner(),
            }),
        }
    }

    fn each_marked_in(
        self: &Arc<Self>,
        at: &DirRef,
        crew: &Crew<'_, DirRef, Error>,
        on_file: &dyn Fn(&Marked),
    ) -> Result<()> {
        let opened = self.open_dir(at)?;
        if self.is_pending(opened.as_fd())? {
            self.populate_names(at)?;
        }
        let shown = || {
            at.origin
                .as_ref()
                .map_or_else(Default::default, |o| o.to_path())
        };
        for entry in dir::list(opened.as_fd()).on("getdents64", Side::Dst, shown())? {
            let found = self.marked_child(at, opened.as_fd(), &entry.name, entry.kind)?;
            match found {
                Some(found) if found.kind == FileType::Directory => crew.push([found.dir]),
                Some(found) => on_file(&found),
                None => {}
            }
        }
        Ok(())
    }

    /// Writes a pending file's origin into its mark, and gives it a name in the index.
    fn pin(self: &Arc<Self>, index: BorrowedFd<'_>, found: &Marked) -> Result<()> {
        let (ino, origin) = (found.dir.ino, &found.dir.origin);
        let shown = || {
            origin
                .as_ref()
                .map_or_else(Default::default, |o| o.to_path())
        };
        let opened = match found.dir.anchor.open(self.dst.as_fd(), OFlags::PATH) {
            // Deleted meanwhile.
            Err(Errno::STALE | Errno::NOENT) => return Ok(()),
            other => other.on("open", Side::Dst, shown())?,
        };
        let written = {
            let _guard = self.lock_mark(ino);
            let mark = self.mark.get(Target::Fd(opened.as_fd()));
            match mark.on("getxattr", Side::Dst, shown())? {
                None => return Ok(()),
                // A user's chown must take it away, and would not any more.
                Some(mark) if mark.capability => Err(Errno::NOSPC),
                Some(mark) if mark.origin.is_some() => Ok(()),
                Some(mark) => {
                    let origin = origin.as_deref().cloned();
                    self.replace_mark(opened.as_fd(), &Mark { origin, ..mark })
                }
            }
        };
        let name = index_name(ino);
        let linked = written.and_then(|()| {
            match rustix::fs::linkat(&opened, c"", index, name.as_str(), AtFlags::EMPTY_PATH) {
                Err(Errno::EXIST | Errno::NOENT) => Ok(()),
                other => other,
            }
        });
        if linked.is_err() {
            // No room in its mark, or too many links: it comes now.
            let file = FileRef {
                ino,
                anchor: found.dir.anchor.clone(),
                origin: origin.as_deref().map(Origin::of),
            };
            self.hydrate(&file, Need::Unmarked, Priority::Demand, Box::new(|_| {}));
        }
        linked.on("link", Side::Dst, shown())
    }

    /// Somebody wants a file that may be pending: `then` hears when it can be read and written.
    pub fn when_here(self: &Arc<Self>, file: BorrowedFd<'_>, then: Waiter) {
        let shown = || match stat::stat_fd(file) {
            Ok(stat) => format!("inode {}", stat.key.ino),
            Err(_) => "an open file".to_owned(),
        };
        match self.file_behind(file).on("getxattr", Side::Dst, shown()) {
            Err(e) => then(Err(e)),
            Ok(None) => then(Ok(())),
            Ok(Some(file)) => self.hydrate_waiting(&file, Need::Write, then),
        }
    }

    /// D9, where nobody tells us of a utimens(2): before the first byte is written the times that the
    /// file has go into its mark, unless they are src's. What a read of a range has written before
    /// has changed them already.
    pub(super) fn keep_times(&self, hydration: &Hydration) {
        let begun = {
            let state = hydration.state.lock();
            let untouched = state.ranges.is_empty() && state.present.is_empty();
            state.dst.clone().filter(|_| self.native && untouched)
        };
        let Some(dst) = begun else { return };
        let kept = stat::stat_fd(dst.as_fd()).and_then(|there| {
            let known = self.source.recall(hydration.file.ino);
            if known.is_some_and(|k| (k.atime, k.mtime) == (there.atime, there.mtime)) {
                return Ok(());
            }
            let _guard = self.lock_mark(hydration.file.ino);
            match self.mark.get(Target::Open(dst.as_fd()))? {
                Some(mark) if mark.times.is_none() => {
                    let times = Some((there.atime, there.mtime));
                    self.replace_mark(dst.as_fd(), &Mark { times, ..mark })
                }
                _ => Ok(()),
            }
        });
        if let Err(errno) = kept {
            tracing::warn!("{:?}: its times are src's again: {errno}", hydration.path);
        }
    }

    /// The pending file, or one whose mark's removal is not durable yet (D2); `None`: it is here.
    fn file_behind(&self, file: BorrowedFd<'_>) -> std::result::Result<Option<FileRef>, Errno> {
        let anchor = Anchor::Handle(Handle::of(file, c"")?);
        let ino = stat::stat_fd(file)?.key.ino;
        // In this order: a hydration leaves the table after its mark has gone.
        let mark = self.mark.get(Target::Open(file))?;
        if mark.is_none() && self.hydrations.find(ino, &anchor).is_none() {
            return Ok(None);
        }
        let origin = mark.and_then(|m| m.origin).map(|o| Origin::of(&o));
        Ok(Some(FileRef {
            ino,
            anchor,
            origin,
        }))
    }

    /// One pass over the index: asks for what is pending in the background, drops what is not.
    /// `each` gives the one who is told of each file. Returns how many entries are left.
    pub fn pull_index(
        self: &Arc<Self>,
        index: BorrowedFd<'_>,
        each: &dyn Fn() -> Waiter,
    ) -> Result<u64> {
        let mut left = 0;
        for entry in dir::list(index).on("getdents64", Side::Dst, AT)? {
            if self.stopping() {
                return Err(Error::Stopped);
            }
            self.wait_for_room();
            match self
                .look_up_index(index, &entry.name)
                .on("getxattr", Side::Dst, AT)?
            {
                // It is left to whoever asks.
                Some(_) if self.throttle.background() == Background::Off => left += 1,
                Some(file) => {
                    left += 1;
                    self.hydrate(&file, Need::Unmarked, Priority::Background, each());
                }
                None if self.is_over(index, &entry.name) => {
                    let unlinked =
                        rustix::fs::unlinkat(index, entry.name.as_cstr(), AtFlags::empty());
                    unlinked.on("unlink", Side::Dst, AT)?;
                }
                None => left += 1,
            }
        }
        Ok(left)
    }

    /// The pending file under a name of the index; `None`: unmarked, or of no use to anybody.
    fn look_up_index(
        &self,
        index: BorrowedFd<'_>,
        name: &Name,
    ) -> std::result::Result<Option<FileRef>, Errno> {
        let Some(mark) = self.mark.get(Target::At(index, name))? else {
            return Ok(None);
        };
        let there = stat::stat_at(index, name.as_cstr())?;
        if there.nlink < 2 {
            return Ok(None);
        }
        Ok(Some(FileRef {
            ino: there.key.ino,
            anchor: Anchor::Handle(Handle::of(index, name.as_cstr())?),
            origin: mark.origin.map(|o| Origin::of(&o)),
        }))
    }

    /// True when a file needs its link no more: its mark is gone for good, or users have deleted it.
    fn is_over(&self, index: BorrowedFd<'_>, name: &Name) -> bool {
        let Ok(there) = stat::stat_at(index, name.as_cstr()) else {
            return false;
        };
        let handle = Handle::of(index, name.as_cstr()).map(Anchor::Handle);
        handle.is_ok_and(|anchor| self.hydrations.find(there.key.ino, &anchor).is_none())
    }
}

/// True when a migration was without a mount before.
pub(super) fn was_native(control: BorrowedFd<'_>) -> bool {
    stat::stat_at(control, c"pending").is_ok()
}

/// Takes the index away. Refuses while a file in it is pending: it may be outside of dst by now, where
/// no look at dst's names finds it.
pub(super) fn remove_index(control: BorrowedFd<'_>, mark: MarkName) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let index = match rustix::fs::openat(control, PENDING, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.on("open", Side::Dst, AT)?,
    };
    for entry in dir::list(index.as_fd()).on("getdents64", Side::Dst, AT)? {
        let marked = mark.get(Target::At(index.as_fd(), &entry.name));
        let there = stat::stat_at(index.as_fd(), entry.name.as_cstr());
        let names = there.on("statx", Side::Dst, AT)?.nlink;
        if marked.on("getxattr", Side::Dst, AT)?.is_some() && names > 1 {
            let name = crate::error::Printable(entry.name.as_os_str());
            let line = format!("a file that was moved is still pending ({AT}/{name})");
            return Err(Error::Unusable(line));
        }
        rustix::fs::unlinkat(&index, entry.name.as_cstr(), AtFlags::empty()).on(
            "unlink",
            Side::Dst,
            AT,
        )?;
    }
    rustix::fs::unlinkat(control, PENDING, AtFlags::REMOVEDIR).on("rmdir", Side::Dst, AT)
}

fn index_name(ino: u64) -> String {
    format!("{ino:x}")
}
