//! Open files: which bytes come from dst and which from src.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::hydrate::Need;
use super::node::Node;
use super::ranged::ReadDone;
use super::through::Caller;
use crate::error::{Context, Error, Result, Side};
use crate::sys::host::FsStat;
use crate::sys::{caps, copy, fd, host};

/// Where the bytes of a file that was just opened are.
#[derive(Debug, Clone)]
pub enum Locate {
    /// All in dst: the kernel may go there without us.
    Here,
    /// Still coming: reads go through `Mirror::read`.
    Ranged,
    /// In src's file, and not to come: reads go through `Mirror::read_through`.
    Through(Arc<OwnedFd>),
}

/// Flags of a user's open that our own open takes over.
const KEPT: OFlags = OFlags::SYNC.union(OFlags::DSYNC);

impl Mirror {
    /// Opens a file for a user. Small and middle pending files are hydrated first; large ones are
    /// opened at once for reading, and hydrated first for writing (I6).
    pub fn open_file(
        self: &Arc<Self>,
        node: &Arc<Node>,
        flags: OFlags,
        by: Caller,
        then: impl FnOnce(Result<(OwnedFd, Locate)>) + Send + 'static,
    ) {
        if self.reads_through(node, flags, by) {
            return self.open_through(node, then);
        }
        if !flags.contains(OFlags::TRUNC) {
            self.trace_open(node);
            self.note_open(node);
        }
        if node.is_pending_file()
            && let Some(place) = node.place()
        {
            self.note_use(place.parent);
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        let access = flags & OFlags::ACCMODE;
        let write = access != OFlags::RDONLY;
        let ours = if write { OFlags::RDWR } else { OFlags::RDONLY } | flags & KEPT;
        let open = move |ready: Result<Locate>| {
            then(ready.and_then(|locate| {
                let opened = match mirror.nodes.open(&held, ours) {
                    // Not for us to read; the user does not ask for that either.
                    Err(Errno::ACCESS) if access == OFlags::WRONLY => {
                        mirror.nodes.open(&held, OFlags::WRONLY | flags & KEPT)
                    }
                    opened => opened,
                };
                Ok((opened.on("open", Side::Dst, held.display_name())?, locate))
            }));
        };
        if flags.contains(OFlags::TRUNC) {
            let truncate = super::attr::Change {
                size: Some(0),
                ..Default::default()
            };
            return self.set_attr(node, truncate, None, |done| {
                open(done.map(|_| Locate::Here))
            });
        }
        if write {
            return self.when_hydrated(node, Need::Write, |done| open(done.map(|()| Locate::Here)));
        }
        if !node.is_pending_file() {
            return open(Ok(Locate::Here));
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        self.with_info(node, move |info| match info {
            Err(e) => open(Err(e)),
            Ok(info) if info.size > mirror.large_file_bytes => open(Ok(Locate::Ranged)),
            Ok(_) if mirror.spoiled.is_fresh(held.ino) => open(Ok(Locate::Ranged)),
            Ok(_) => mirror.when_hydrated(&held, Need::Read, |done| {
                open(match done {
                    Ok(()) => Ok(Locate::Here),
                    // dst has no room, or src not all bytes: reads go on, from src.
                    Err(e) if e.is_dst_full() || e.is_bad_read() => Ok(Locate::Ranged),
                    Err(e) => Err(e),
                });
            }),
        });
    }

    /// Reads from an open file.
    pub fn read(
        self: &Arc<Self>,
        node: &Arc<Node>,
        file: BorrowedFd<'_>,
        offset: u64,
        len: u32,
        then: ReadDone,
    ) {
        if !node.is_pending_file() {
            let mut bytes = vec![0; len as usize];
            let result = fd::pread_all(file, &mut bytes, offset)
                .on("read", Side::Dst, node.display_name())
                .map(|n| {
                    bytes.truncate(n);
                    bytes
                });
            return then(result);
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        self.with_info(node, move |info| match info {
            Ok(info) => {
                let range = offset..offset + u64::from(len);
                if let Some(then) = mirror.salvage(&held, range.clone(), then) {
                    mirror.read_traced(&held, info, range, then);
                }
            }
            Err(e) => then(Err(e)),
        });
    }

    /// Writes to an open file: it was hydrated before it was opened for writing.
    pub fn write(&self, node: &Node, file: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<()> {
        fd::pwrite_all(file, data, offset).on("write", Side::Dst, node.display_name())
    }

    /// lseek with SEEK_DATA or SEEK_HOLE: a placeholder is all hole, so a pending file answers from
    /// src.
    pub fn seek(
        self: &Arc<Self>,
        node: &Arc<Node>,
        file: BorrowedFd<'_>,
        offset: u64,
        data: bool,
        then: impl FnOnce(Result<u64, Errno>) + Send + 'static,
    ) {
        if !node.is_pending_file() {
            return then(copy::seek_data_or_hole(file, offset, data));
        }
        let path = node.origin().map(|o| o.path().to_path());
        let told = move |at: Result<u64>| then(at.map_err(|e| user_errno(&e)));
        let told = self.limit(path.unwrap_or_default(), told);
        let ask = move |mirror: &Mirror, node: &Node| mirror.seek_src(node, (offset, data));
        self.ask_later(Arc::clone(node), ask, 0, told);
    }

    /// SEEK_DATA or SEEK_HOLE in src.
    pub(super) fn seek_src(&self, node: &Node, (offset, data): (u64, bool)) -> Result<u64> {
        let shown = || node.display_name();
        let origin = node.origin().and_then(|o| Some((o.dir, o.name?)));
        let (dir, name) = origin
            .ok_or(Errno::STALE)
            .on("origin", Side::Dst, shown())?;
        let opened = self.source.dir(&dir)?;
        let file = fd::open_src(opened.fd.as_fd(), &name).on("open", Side::Src, dir.join(&name))?;
        match copy::seek_data_or_hole(file.as_fd(), offset, data) {
            // The answer, not a failure: nothing follows.
            Err(Errno::NXIO) => Err(Errno::NXIO).on("lseek", Side::Dst, dir.join(&name)),
            other => other.on("lseek", Side::Src, dir.join(&name)),
        }
    }

    /// fallocate(2) on a file that is open for writing.
    pub fn fallocate(
        &self,
        file: BorrowedFd<'_>,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        caps::without_fsetid(|| copy::fallocate(file, mode, offset, len))
    }

    /// copy_file_range(2) between two open files; the first is hydrated first.
    pub fn copy_range(
        self: &Arc<Self>,
        from: (Arc<Node>, Arc<OwnedFd>, u64),
        to: (Arc<OwnedFd>, u64),
        len: usize,
        then: impl FnOnce(Result<usize, Errno>) + Send + 'static,
    ) {
        let (node, src, src_offset) = from;
        self.when_hydrated(&node, Need::Read, move |ready| {
            then(ready.map_err(|e| user_errno(&e)).and_then(|()| {
                let copy = || copy::copy_range(src.as_fd(), src_offset, to.0.as_fd(), to.1, len);
                caps::without_fsetid(copy)
            }));
        });
    }

    /// readlink(2).
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>, Errno> {
        let opened = self.nodes.open(node, OFlags::PATH)?;
        rustix::fs::readlinkat(&opened, c"", Vec::new()).map(|t| t.into_bytes())
    }

    /// Opens a directory for listing: an fd with an offset of its own.
    pub fn open_listing(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.trace_listing(node);
        self.nodes.open(node, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// fsync(2), or fdatasync(2) with `data_only`.
    pub fn sync_file(&self, file: BorrowedFd<'_>, data_only: bool) -> Result<(), Errno> {
        if data_only {
            fd::fdatasync(file)
        } else {
            fd::fsync(file)
        }
    }

    /// statfs(2) of dst, less what is known to be still to come.
    pub fn stat_fs(&self) -> Result<FsStat, Errno> {
        let mut s = host::fs_stat(self.dst.as_fd())?;
        let due = self.progress.bytes_left.get() / s.frsize.max(1);
        s.bfree = s.bfree.saturating_sub(due);
        s.bavail = s.bavail.saturating_sub(due);
        Ok(s)
    }
}

/// The errno that a user of the mount gets: trouble with src is EIO, never ENOENT.
pub fn user_errno(error: &Error) -> Errno {
    match error.side() {
        Side::Src => Errno::IO,
        Side::Dst | Side::Host => error.errno(),
    }
}
