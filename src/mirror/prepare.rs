//! Prepare: both sides of a hydration, opened once and kept while it lasts.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::hydrate::Hydration;
use super::populate::no_origin;
use super::source::{SrcDir, SrcInfo};
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::sys::name::Name;
use crate::sys::stat;
use crate::sys::xattr::Target;

/// dst's file, src's directory and the name in it.
type Prepared = (Arc<OwnedFd>, Arc<SrcDir>, Name);

impl Mirror {
    /// Opens src's directory and dst's file for a hydration, once. `None`: there is nothing to do,
    /// the file was unmarked before this hydration began (a walker's look was too old).
    pub(super) fn prepare(&self, hydration: &Hydration) -> Result<Option<Prepared>> {
        self.prepare_with(hydration, None)
    }

    /// As `prepare`; with the file that `look_to_pull` has opened, if it has.
    pub(super) fn prepare_with(
        &self,
        hydration: &Hydration,
        opened: Option<Arc<OwnedFd>>,
    ) -> Result<Option<Prepared>> {
        let begun = {
            let state = hydration.state.lock();
            let mixed = state.mixed.as_ref().map(|m| Arc::clone(&m.ground.file));
            let dst = mixed.clone().or_else(|| state.dst.clone());
            if let (Some(dst), Some(src)) = (dst, &state.src) {
                return Ok(Some((dst, Arc::clone(&src.0), src.1.clone())));
            }
            mixed.or(opened)
        };
        let dst = match begun {
            Some(dst) => dst,
            None => match self.open_marked(hydration)? {
                Some((dst, _)) => dst,
                None => return Ok(None),
            },
        };
        let (src, name) = self.open_origin(hydration)?;
        let mut state = hydration.state.lock();
        state.dst = Some(Arc::clone(&dst));
        state.src = Some((Arc::clone(&src), name.clone()));
        Ok(Some((dst, src, name)))
    }

    /// dst's file, open for writing, and its mark, if it carries one.
    pub(super) fn open_marked(
        &self,
        hydration: &Hydration,
    ) -> Result<Option<(Arc<OwnedFd>, Mark)>> {
        let path = &hydration.path;
        let dst = match hydration.file.anchor.open(self.dst.as_fd(), OFlags::RDWR) {
            // Deleted meanwhile.
            Err(Errno::STALE | Errno::NOENT) => return Ok(None),
            other => Arc::new(other.on("open", Side::Dst, path)?),
        };
        let mark = self
            .mark
            .get(Target::Open(dst.as_fd()))
            .on("getxattr", Side::Dst, path)?;
        self.check_seen(hydration.file.ino, mark.as_ref(), || path.to_path())?;
        // Only a hydration removes the mark, and this inode's only one is ours: the answer holds.
        Ok(mark.map(|mark| (dst, mark)))
    }

    /// src's directory and the name in it, of a file that is not itself pending there.
    pub(super) fn open_origin(&self, hydration: &Hydration) -> Result<(Arc<SrcDir>, Name)> {
        let path = &hydration.path;
        let origin = hydration
            .file
            .origin
            .as_ref()
            .ok_or_else(|| no_origin(path))?;
        let name = origin.name.clone().ok_or_else(|| no_origin(path))?;
        let src = self.source.dir(&origin.dir)?;
        let marked = self.mark.get(Target::At(src.fd.as_fd(), &name));
        if marked.on("getxattr", Side::Src, path)?.is_some() {
            return Err(Error::SrcPending {
                path: path.to_path(),
            });
        }
        // Before it is opened, as when it was placed (`is_of_one_src`): an earlier daemon has placed it.
        if src.may_hang && self.source.recall(hydration.file.ino).is_none() {
            let stat = stat::stat_at(src.fd.as_fd(), name.as_cstr());
            let stat = stat.on("statx", Side::Src, path)?;
            self.learn_anew(hydration.file.ino, SrcInfo::from(&stat));
        }
        Ok((src, name))
    }
}

#[cfg(test)]
pub(super) mod tests;
