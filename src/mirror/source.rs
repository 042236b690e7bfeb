//! Source: src's directories, opened by their path below SRC, and what was last seen of its files.
//!
//! Everything here may wait for src: it is called on pool and walker threads, or answers from cache.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result, Side};
use crate::mark::MarkName;
use crate::meta::Capture;
use crate::sys::name::RelPath;
use crate::sys::stat::{self, Stat, Time};
use crate::sys::view::{MountWatch, View};
use crate::sys::{fd, host};

const OPEN_DIRS: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");
/// About 100 bytes each.
const KNOWN_FILES: NonZeroUsize = NonZeroUsize::new(1 << 17).expect("not zero");

/// File systems whose inode flags (chattr) are worth an open per file: ext, xfs, btrfs, f2fs.
const FLAG_MAGICS: [u64; 4] = [
    host::EXT4_MAGIC,
    host::XFS_MAGIC,
    host::BTRFS_MAGIC,
    0xf2f5_2010,
];

/// A directory of src, open.
#[derive(Debug)]
pub struct SrcDir {
    /// The directory.
    pub fd: Arc<OwnedFd>,
    /// Its path below SRC.
    pub path: Arc<RelPath>,
    /// Where its file system (or subvolume) begins below SRC: part of a hard link's key.
    pub mount: Arc<RelPath>,
    /// How metadata is captured here.
    pub capture: Capture,
    /// A server or a daemon answers, or does not.
    pub may_hang: bool,
}

/// What src says of a pending file: the mount answers from it (D4: never from dst).
#[derive(Debug, Clone, Copy)]
pub struct SrcInfo {
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// Times at the last look.
    pub atime: Time,
    /// Times at the last look.
    pub mtime: Time,
}

impl SrcInfo {
    /// What src says `now` is of the same bytes, as far as size and time tell.
    pub(super) fn is_still(&self, now: &Stat) -> bool {
        (self.size, self.mtime) == (now.size, now.mtime)
    }
}

impl From<&Stat> for SrcInfo {
    fn from(s: &Stat) -> SrcInfo {
        SrcInfo {
            size: s.size,
            blocks: s.blocks,
            atime: s.atime,
            mtime: s.mtime,
        }
    }
}

type FsId = (u64, (u32, u32));
/// Of a directory: where its file system begins, how metadata is captured, whether calls may hang.
type Mount = (Arc<RelPath>, Capture, bool);

/// What SRC's root is known by when its path leads to it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Face {
    ino: u64,
    /// The empty directory below a mount that is gone has the same path, and is none.
    mount_root: bool,
    magic: u64,
}

impl Face {
    /// Looks at an open directory; a server is asked.
    pub fn of(root: BorrowedFd<'_>) -> Result<Face> {
        let stat = stat::stat_fd_fresh(root).on("statx", Side::Src, ".")?;
        let fs = host::fs_stat(root).on("statfs", Side::Src, ".")?;
        Ok(Face {
            ino: stat.key.ino,
            mount_root: stat.mount_root,
            magic: fs.magic,
        })
    }
}

/// The tree that is copied from.
#[derive(Debug)]
pub struct Source {
    view: RwLock<Arc<View>>,
    /// Tells when the view may lack a mount.
    mounts_changed: Option<MountWatch>,
    face: Face,
    /// SRC's path, where it leads past our own mount.
    path: Option<PathBuf>,
    mark: MarkName,
    dirs: Mutex<LruCache<Arc<RelPath>, Arc<SrcDir>>>,
    mounts: Mutex<HashMap<FsId, Mount>>,
    known: Mutex<LruCache<u64, SrcInfo>>,
}

impl Source {
    /// A source with its root open; `path`: where it can be found again after it was away.
    pub fn new(root: OwnedFd, path: Option<PathBuf>, mark: MarkName) -> Result<Source> {
        let face = Face::of(root.as_fd())?;
        let source = Source::again(root, path, face, mark);
        source.look_for_private_view();
        Ok(source)
    }

    /// A root that was opened past dead mounts lies in no namespace any more; by its path it may.
    fn look_for_private_view(&self) {
        let Some(path) = self.path.as_ref().filter(|_| !self.view().is_private()) else {
            return;
        };
        let here = stat::stat_fd(self.view().original()).map(|s| s.key);
        if let Ok(root) = host::open_dir(path)
            && here.is_ok()
            && stat::stat_fd(root.as_fd()).map(|s| s.key) == here
        {
            let view = View::of(root);
            if view.is_private() {
                *self.view.write() = Arc::new(view);
            }
        }
    }

    /// The one of the program before us, which is not asked for anything.
    pub fn again(root: OwnedFd, path: Option<PathBuf>, face: Face, mark: MarkName) -> Source {
        Source {
            face,
            mounts_changed: MountWatch::new().ok(),
            view: RwLock::new(Arc::new(View::of(root))),
            path,
            mark,
            dirs: Mutex::new(LruCache::new(OPEN_DIRS)),
            mounts: Mutex::new(HashMap::new()),
            known: Mutex::new(LruCache::new(KNOWN_FILES)),
        }
    }

    /// What the next program has to know, besides the root.
    pub fn face(&self) -> Face {
        self.face
    }

    /// SRC's root, and through what it is seen.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read())
    }

    /// The view to open a directory in: a new one, when something was mounted below SRC since.
    fn fresh_view(&self) -> Arc<View> {
        let view = self.view();
        let changed = self.mounts_changed.as_ref().is_some_and(|w| w.changed());
        if !changed || !view.is_stale() {
            return view;
        }
        match view.again() {
            Ok(new) => self.replace(new),
            Err(_) => view, // No fd is free for it: the next one who asks tries again.
        }
    }

    fn replace(&self, new: View) -> Arc<View> {
        let new = Arc::new(new);
        *self.view.write() = Arc::clone(&new);
        self.dirs.lock().clear();
        self.mounts.lock().clear();
        new
    }

    /// Asks the root whether it is there, past all caches; opens it anew where it is not and its path
    /// leads to the same directory. May hang.
    pub fn ask(&self) -> Result<()> {
        let asked = self.view();
        let old = Face::of(asked.original());
        let (Err(_), Some(path)) = (&old, &self.path) else {
            return old.map(|_| ());
        };
        let new = host::open_dir(path).on("open", Side::Src, path)?;
        if Face::of(new.as_fd())? != self.face {
            return old.map(|_| ());
        }
        self.replace(View::of(new));
        Ok(())
    }

    /// The directory is opened anew the next time.
    pub fn forget_dir(&self, path: &RelPath) {
        self.dirs.lock().pop(path);
    }

    /// The directory, if it is open already: never waits.
    pub fn cached_dir(&self, path: &RelPath) -> Option<Arc<SrcDir>> {
        self.dirs.lock().get(path).map(Arc::clone)
    }

    /// The directory is open, and a call on what is in it does not wait for long: a session thread may
    /// make one.
    pub fn is_at_hand(&self, path: &RelPath) -> bool {
        self.cached_dir(path).is_some_and(|dir| !dir.may_hang)
    }

    /// Opens a directory of src. May wait for src.
    pub fn dir(&self, path: &Arc<RelPath>) -> Result<Arc<SrcDir>> {
        if let Some(dir) = self.cached_dir(path) {
            return Ok(dir);
        }
        let view = self.fresh_view();
        let opened = fd::open_src_dir(view.root(), path).on("open", Side::Src, path.as_ref())?;
        let stat = stat::stat_fd(opened.as_fd()).on("statx", Side::Src, path.as_ref())?;
        let (mount, capture, may_hang) = self.mount_of(path, &stat, &opened)?;
        let dir = Arc::new(SrcDir {
            fd: Arc::new(opened),
            path: Arc::clone(path),
            mount,
            capture,
            may_hang,
        });
        self.dirs.lock().put(Arc::clone(path), Arc::clone(&dir));
        Ok(dir)
    }

    /// Opens a directory of src for somebody who lists it at an offset of his own. May wait for src.
    pub fn open_again(&self, path: &RelPath) -> Result<OwnedFd> {
        fd::open_src_dir(self.view().root(), path).on("open", Side::Src, path)
    }

    /// Remembers what src said of the file that dst's inode stands for.
    pub fn learn(&self, dst_ino: u64, info: SrcInfo) {
        self.known.lock().put(dst_ino, info);
    }

    /// What src said last, if it is still remembered: never waits.
    pub fn recall(&self, dst_ino: u64) -> Option<SrcInfo> {
        self.known.lock().get(&dst_ino).copied()
    }

    /// The inode is hydrated: dst answers from now on.
    pub fn unlearn(&self, dst_ino: u64) {
        self.known.lock().pop(&dst_ino);
    }

    fn mount_of(&self, path: &Arc<RelPath>, stat: &Stat, dir: &OwnedFd) -> Result<Mount> {
        let id = (stat.mnt_id, stat.key.dev);
        if let Some(known) = self.mounts.lock().get(&id) {
            return Ok(known.clone());
        }
        let magic = host::fs_stat(dir.as_fd())
            .on("statfs", Side::Src, path.as_ref())?
            .magic;
        let capture = Capture {
            mark: self.mark,
            flags: FLAG_MAGICS.contains(&magic),
        };
        // Climb while the parent is on the same file system.
        let mut top = (**path).clone();
        while let Some((parent, _)) = top.split_last() {
            let up = fd::open_beneath(self.view().root(), &parent, OFlags::PATH).on(
                "open",
                Side::Src,
                &parent,
            )?;
            let up = stat::stat_fd(up.as_fd()).on("statx", Side::Src, &parent)?;
            if (up.mnt_id, up.key.dev) != id {
                break;
            }
            top = parent;
        }
        let known = (Arc::new(top), capture, host::may_hang(stat.key.dev));
        self.mounts.lock().insert(id, known.clone());
        Ok(known)
    }
}
