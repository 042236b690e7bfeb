//! Through: reads for whoever goes over everything once (a virus scanner, updatedb, a backup), which
//! would pull the whole tree in his order. They are answered from src and leave nothing behind: dst,
//! the mark and what is likely to be opened next stay as they were.
//!
//!   open_through()  src's file is opened and looked at; nothing is asked of the engine
//!   read_through()  while the file is pending from src, from dst as soon as it is not: somebody else
//!                   has opened it, and may have changed it
//!
//! Only reading: who opens a file to write is like everybody else.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::Mirror;
use super::file::Locate;
use super::node::Node;
use super::populate::no_origin;
use super::ranged::ReadDone;
use super::source::SrcInfo;
use crate::config::NoStore;
use crate::error::{Context, Error, Result, Side};
use crate::sys::xattr::Target;
use crate::sys::{fd, process, stat};

/// Who makes a request.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// His user.
    pub uid: u32,
    /// His thread, 0 where it is not in sight.
    pub pid: u32,
}

impl NoStore {
    /// Whether what this caller reads is not stored. Asks the kernel about his process.
    fn has(&self, by: Caller) -> bool {
        if self.uids.contains(&by.uid) {
            return true;
        }
        if by.pid == 0 {
            return false;
        }
        if self.idle && process::io_is_idle(by.pid) {
            return true;
        }
        !self.cgroups.is_empty() && self.has_cgroup(&process::cgroups(by.pid))
    }

    /// Whether one of the lines of /proc/PID/cgroup names one of ours, or one below it.
    fn has_cgroup(&self, lines: &[u8]) -> bool {
        let lines = lines.split(|b| *b == b'\n');
        let mut paths = lines.filter_map(|line| line.splitn(3, |b| *b == b':').nth(2));
        paths.any(|path| {
            self.cgroups.iter().any(|ours| {
                path.strip_prefix(ours.as_bytes())
                    .is_some_and(|rest| rest.first().is_none_or(|b| *b == b'/'))
            })
        })
    }
}

impl Mirror {
    /// Whether this open is answered from src without storing anything.
    pub(super) fn reads_through(self: &Arc<Self>, node: &Node, flags: OFlags, by: Caller) -> bool {
        let reads = flags & OFlags::ACCMODE == OFlags::RDONLY && !flags.contains(OFlags::TRUNC);
        reads
            && node.is_pending_file()
            && !self.no_store.is_empty()
            && self.no_store.has(by)
            && matches!(self.mixed(node), Ok(None))
    }

    /// Opens src's file for a reader, and dst's for the time after it was hydrated.
    pub(super) fn open_through(
        self: &Arc<Self>,
        node: &Arc<Node>,
        then: impl FnOnce(Result<(OwnedFd, Locate)>) + Send + 'static,
    ) {
        let told = self.limit(path_of(node), then);
        let open = |mirror: &Mirror, node: &Node| {
            let opened = mirror.nodes.open(node, OFlags::RDONLY);
            let dst = opened.on("open", Side::Dst, node.display_name())?;
            match mirror.src_file(node) {
                // Hydrated meanwhile: that is better still.
                _ if !node.is_pending_file() => Ok((dst, Locate::Here)),
                Ok(src) => Ok((dst, Locate::Through(Arc::new(src)))),
                Err(e) => Err(e),
            }
        };
        self.ask_later(Arc::clone(node), open, 0, told);
    }

    /// Reads from a file that was opened through.
    pub fn read_through(
        self: &Arc<Self>,
        node: &Arc<Node>,
        (dst, src): (BorrowedFd<'_>, &Arc<OwnedFd>),
        (offset, len): (u64, u32),
        then: ReadDone,
    ) {
        if !node.is_pending_file() {
            return self.read(node, dst, offset, len, then);
        }
        if let Ok(Some(_)) | Err(_) = self.mixed(node) {
            return self.read(node, dst, offset, len, then);
        }
        let told = self.limit(path_of(node), then);
        let src = Arc::clone(src);
        let read = move |mirror: &Mirror, node: &Node| {
            let shown = || node.display_name();
            let mut bytes = vec![0; len as usize];
            let n = match fd::pread_all(src.as_fd(), &mut bytes, offset) {
                Ok(n) => n,
                Err(_) if !node.is_pending_file() => {
                    let here = mirror.nodes.open(node, OFlags::RDONLY);
                    let here = here.on("open", Side::Dst, shown())?;
                    let n = fd::pread_all(here.as_fd(), &mut bytes, offset);
                    n.on("read", Side::Dst, shown())?
                }
                // It was away: the handle may not have come back with it.
                Err(_) => {
                    let again = mirror.src_file(node)?;
                    let n = fd::pread_all(again.as_fd(), &mut bytes, offset);
                    n.on("read", Side::Src, shown())?
                }
            };
            bytes.truncate(n);
            if node.is_pending_file() {
                mirror.expect_as_told(node, (src.as_fd(), offset), (&bytes, len))?;
            }
            Ok(bytes)
        };
        self.ask_later(Arc::clone(node), read, 0, told);
    }

    /// Opens src's file of a pending node, as a hydration would: never one that is itself pending.
    fn src_file(&self, node: &Node) -> Result<OwnedFd> {
        let origin = node.origin();
        let path = origin.as_ref().map(|o| o.path()).unwrap_or_default();
        let origin = origin.ok_or_else(|| no_origin(&path))?;
        let name = origin.name.clone().ok_or_else(|| no_origin(&path))?;
        let dir = self.source.dir(&origin.dir)?;
        let file = fd::open_src(dir.fd.as_fd(), &name).on("open", Side::Src, &path)?;
        let mark = self.mark.get(Target::Fd(file.as_fd()));
        if mark.on("getxattr", Side::Src, &path)?.is_some() {
            let path = path.to_path();
            return Err(Error::SrcPending { path });
        }
        let now = stat::stat_fd(file.as_fd()).on("statx", Side::Src, &path)?;
        if !now.is_file() {
            let path = path.to_path();
            return Err(Error::SrcChanged { path });
        }
        let known = self.source.recall(node.ino);
        if known.is_none_or(|k| !k.is_still(&now)) {
            let turn = || self.source.learn(node.ino, SrcInfo::from(&now));
            self.src_was_changed(node.ino, turn);
        }
        Ok(file)
    }
}

/// What he waits for.
fn path_of(node: &Node) -> std::path::PathBuf {
    node.origin()
        .map(|o| o.path().to_path())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_counts_with_those_below_it_and_no_other() {
        let mut no_store = NoStore::default();
        no_store.add("cgroup:/system.slice/scan").expect("parses");
        for (lines, is) in [
            ("0::/system.slice/scan\n", true),
            ("5:cpu:/\n0::/system.slice/scan/a:b\n", true),
            ("5:cpu:/system.slice/scan\n0::/\n", true),
            ("0::/system.slice/scanner\n", false),
            ("0::/system.slice\n", false),
            ("0::/\n", false),
            ("", false),
        ] {
            assert_eq!(no_store.has_cgroup(lines.as_bytes()), is, "{lines:?}");
        }
    }
}
