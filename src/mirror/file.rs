//! Open files: which bytes come from dst and which from src.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::hydrate::Need;
use super::node::Node;
use super::ranged::ReadDone;
use super::source::SrcInfo;
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
    /// opened at once (I6: mixed.rs).
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
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        let access = flags & OFlags::ACCMODE;
        let write = access != OFlags::RDONLY;
        let ours = if write { OFlags::RDWR } else { OFlags::RDONLY } | flags & KEPT;
        let open = move |ready: Result<Locate>| {
            then(ready.and_then(|locate| {
                // It was cut, and is not all here.
                let locate = match locate {
                    Locate::Here if held.is_pending_file() => Locate::Ranged,
                    locate => locate,
                };
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
        if write && !(node.is_pending_file() && self.mixes) {
            return self.when_hydrated(node, Need::Write, |done| open(done.map(|()| Locate::Here)));
        }
        if !node.is_pending_file() {
            return open(Ok(Locate::Here));
        }
        if write {
            return self.open_to_write(node, open);
        }
        match self.known_mixed(node) {
            Ok(false) => {}
            Ok(true) => return open(Ok(Locate::Ranged)),
            Err(e) => return open(Err(e)),
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

    /// A large pending file is opened at once for writing too: its changes take turns with what is
    /// pulled. Any other is hydrated first.
    fn open_to_write(
        self: &Arc<Self>,
        node: &Arc<Node>,
        open: impl FnOnce(Result<Locate>) + Send + 'static,
    ) {
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        let large = move |large: Result<bool>| match large {
            Err(e) => open(Err(e)),
            Ok(true) => mirror.when_parent_published(
                &held,
                Box::new(|ready| open(ready.map(|()| Locate::Ranged))),
            ),
            Ok(false) => {
                let (again, node) = (Arc::clone(&mirror), Arc::clone(&held));
                mirror.when_hydrated(&held, Need::Write, move |done| {
                    open(match done {
                        // src has not all bytes: others can be written.
                        Err(e) if e.is_bad_read() && matches!(again.mixed(&node), Ok(Some(_))) => {
                            Ok(Locate::Ranged)
                        }
                        done => done.map(|()| Locate::Here),
                    });
                });
            }
        };
        match self.known_mixed(node) {
            Ok(false) => {}
            Ok(true) => return large(Ok(true)),
            Err(e) => return large(Err(e)),
        }
        let limit = self.large_file_bytes;
        self.with_info(node, move |info| large(info.map(|i| i.size > limit)));
    }

    /// It is mixed. Src has not been asked about it, and need not be, where an earlier daemon has left it so.
    fn known_mixed(self: &Arc<Self>, node: &Node) -> Result<bool> {
        if self.is_mixed(node) {
            return Ok(true);
        }
        Ok(self.source.recall(node.ino).is_none() && self.mixed(node)?.is_some())
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
        self.read_pending(node, offset..offset.saturating_add(len.into()), then);
    }

    /// Reads a range of a file that was pending a moment ago.
    pub(super) fn read_pending(
        self: &Arc<Self>,
        node: &Arc<Node>,
        range: std::ops::Range<u64>,
        then: ReadDone,
    ) {
        match self.mixed(node) {
            Ok(None) => {}
            Ok(Some((hydration, _))) => return self.read_mixed(node, &hydration, range, then),
            Err(e) => return then(Err(e)),
        }
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        self.with_info(node, move |info| match info {
            Ok(info) => {
                if let Some(then) = mirror.salvage(&held, range.clone(), then) {
                    mirror.read_traced(&held, info, range, then);
                }
            }
            Err(e) => then(Err(e)),
        });
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
        let ground = match self.mixed(node) {
            Ok(mixed) => mixed.map(|(_, ground)| ground),
            Err(e) => return told(Err(e)),
        };
        let ask = move |mirror: &Mirror, node: &Node| match &ground {
            Some(ground) => mirror.seek_mixed(node, ground, (offset, data)),
            None => mirror.seek_src(node, (offset, data)),
        };
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

    /// copy_file_range(2) between two open files; the first is hydrated first. EOPNOTSUPP: the kernel
    /// is to read and write, because the bytes of a large file come, or go, range by range; and src cannot give
    /// some of another's.
    pub fn copy_range(
        self: &Arc<Self>,
        from: (Arc<Node>, Arc<OwnedFd>, u64),
        to: (Arc<Node>, Arc<OwnedFd>, u64),
        len: usize,
        then: impl FnOnce(Result<usize, Errno>) + Send + 'static,
    ) {
        let (node, src, src_offset) = from;
        let by_range = |node: &Node| {
            let large = |i: SrcInfo| i.size > self.large_file_bytes;
            let ranged = || {
                self.spoiled.contains(node.ino)
                    || self.mixes && self.source.recall(node.ino).is_none_or(large)
            };
            node.is_pending_file() && ranged()
        };
        let (to_node, to, to_offset) = to;
        if by_range(&node) || by_range(&to_node) {
            return then(Err(Errno::OPNOTSUPP));
        }
        let to = (to, to_offset);
        let mirror = Arc::clone(self);
        self.when_hydrated(&to_node, Need::Write, move |ready| match ready {
            Ok(()) => mirror.copy_range_here((node, src, src_offset), to, len, then),
            Err(e) => then(Err(copy_errno(&e))),
        });
    }

    fn copy_range_here(
        self: &Arc<Self>,
        (node, src, src_offset): (Arc<Node>, Arc<OwnedFd>, u64),
        to: (Arc<OwnedFd>, u64),
        len: usize,
        then: impl FnOnce(Result<usize, Errno>) + Send + 'static,
    ) {
        self.when_hydrated(&node, Need::Read, move |ready| {
            then(ready.map_err(|e| copy_errno(&e)).and_then(|()| {
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
    pub fn sync_file(
        self: &Arc<Self>,
        node: &Node,
        file: BorrowedFd<'_>,
        data_only: bool,
    ) -> Result<(), Errno> {
        if let Some((_, ground)) = self.mixed(node).map_err(|e| user_errno(&e))? {
            return self.sync_mixed(&ground, node.ino, file, data_only);
        }
        // The name of a user's own came after its inode, so the journal may have been written in between: ext4's
        // fdatasync of a file that was never written would leave the name to the next commit.
        match data_only && !node.is_own() {
            true => fd::fdatasync(file),
            false => fd::fsync(file),
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

/// What copy_file_range(2) says of a file that cannot be had whole: who reads and writes instead meets what
/// is wrong where it is.
fn copy_errno(error: &Error) -> Errno {
    match error.is_bad_read() {
        true => Errno::OPNOTSUPP,
        false => user_errno(error),
    }
}
