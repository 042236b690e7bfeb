//! Settling: the end of a hydration, and the one that reads nothing.
//!
//!   restore            what writing disturbed: room, security.capability, times (D7, D9)
//!   settle_soon        a writer waits: fdatasync, unmark, fsync at once (D2)
//!   truncate_pending   a pending file loses all its data: nothing is read from src (D3)

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::bytemap;
use super::hydrate::{FileRef, Hydration, Stage};
use super::node::{Node, Phase};
use super::populate::{Waiter, no_origin};
use super::source::SrcDir;
use crate::engine::job::{Copied, Priority};
use crate::error::{Context, Error, Result, Side};
use crate::meta::{self, CAPABILITY};
use crate::sys::name::{Name, RelPath};
use crate::sys::xattr::{self, Target};
use crate::sys::{caps, copy, fault, fd, stat};

/// Fewer missing blocks (of 512 bytes) than this are the file systems' own business.
const RESERVE_BLOCKS: u64 = 128;

impl Mirror {
    /// D7 and D9: security.capability from src, then times: the user's where he set them.
    pub(super) fn restore(&self, hydration: &Hydration, copied: &Copied) -> Result<()> {
        let path = &hydration.path;
        let (dst, src) = {
            let state = hydration.state.lock();
            (state.dst.clone(), state.src.clone())
        };
        let (Some(dst), Some((src, name))) = (dst, src) else {
            return Err(no_origin(path));
        };
        let target = Target::Fd(dst.as_fd());
        let _guard = self.lock_mark(hydration.file.ino);
        let mark = self
            .mark
            .get(target)
            .on("getxattr", Side::Dst, path)?
            .unwrap_or_default();
        self.reserve_like_src(hydration, copied, dst.as_fd(), &src, &name)?;
        if mark.capability {
            let value = xattr::get(Target::At(src.fd.as_fd(), &name), CAPABILITY);
            if let Some(value) = value.on("getxattr", Side::Src, path)? {
                let what = CAPABILITY.to_string_lossy().into_owned();
                self.applied(path, || {
                    let set = xattr::set(target, CAPABILITY, &value);
                    let what = what.clone();
                    set.map_err(|errno| meta::Refused { what, errno })
                        .err()
                        .into_iter()
                        .collect()
                })?;
            }
        }
        let (atime, mtime) = mark.times.unwrap_or((copied.src.atime, copied.src.mtime));
        let times = || meta::set_times_fd(dst.as_fd(), atime, mtime);
        fault::unless_broken("D7", times).on("utimensat", Side::Dst, path)
    }

    /// Room that src's file has without data in it (fallocate) is part of what it is.
    fn reserve_like_src(
        &self,
        hydration: &Hydration,
        copied: &Copied,
        dst: BorrowedFd<'_>,
        src: &SrcDir,
        name: &Name,
    ) -> Result<()> {
        let path = &hydration.path;
        let there = stat::stat_fd(dst).on("statx", Side::Dst, path)?;
        if copied.src.blocks <= there.blocks + RESERVE_BLOCKS {
            return Ok(());
        }
        let file = fd::open_src(src.fd.as_fd(), name).on("open", Side::Src, path)?;
        copy::reserve_like(file.as_fd(), dst, copied.src.size).on("fallocate", Side::Dst, path)
    }

    /// Makes a landed file writable soon: on a pool thread, because it waits for the device.
    pub(super) fn settle_soon(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            let _inside = mirror.marks.enter();
            let unmarked = {
                let mut state = hydration.state.lock();
                match state.stage {
                    Stage::Landed => {
                        state.stage = Stage::Settling;
                        false
                    }
                    Stage::Unmarked(_) => {
                        state.stage = Stage::Settling;
                        true
                    }
                    // Another writer's task does it, or the hydration failed and told everybody.
                    _ => return,
                }
            };
            let done = if unmarked {
                Ok(())
            } else {
                mirror.unmark_now(&hydration)
            };
            match done.map(|()| mirror.fsync_now(&hydration)) {
                Ok(Ok(())) => mirror.end(&hydration, Ok(())),
                Ok(Err(e)) => mirror.unmarked_only(&hydration, &e),
                Err(e) => mirror.fail_hydration(&hydration, e),
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// D2, first part: fdatasync; removexattr.
    fn unmark_now(&self, hydration: &Hydration) -> Result<()> {
        let path = &hydration.path;
        let file = self.open_to_sync(hydration)?;
        let sync = || fd::fdatasync(file.as_fd());
        fault::unless_broken("D1", sync).on("fdatasync", Side::Dst, path)?;
        fault::point("hydrate-durable");
        self.partials.note_unmark(&hydration.file);
        {
            let _guard = self.lock_perms(hydration.file.ino);
            self.take_mark(file.as_fd())
                .on("removexattr", Side::Dst, path)?;
        }
        fault::point("hydrate-unmarked");
        self.count_pulled(hydration.state.lock().bytes);
        Ok(())
    }

    /// D2, second part: fsync, so that the mark cannot come back over what a user writes.
    fn fsync_now(&self, hydration: &Hydration) -> Result<()> {
        let path = &hydration.path;
        match self.open_to_sync(hydration) {
            // Its permissions have come true, and are not for reading.
            Err(e) if e.errno() == Errno::ACCESS => {
                fd::syncfs(self.dst.as_fd()).on("syncfs", Side::Dst, path)
            }
            file => {
                let file = file?;
                let sync = || fd::fsync(file.as_fd());
                fault::unless_broken("D2", sync).on("fsync", Side::Dst, path)
            }
        }
    }

    fn open_to_sync(&self, hydration: &Hydration) -> Result<OwnedFd> {
        let file = hydration.file.anchor.open(self.dst.as_fd(), OFlags::RDONLY);
        file.on("open", Side::Dst, &hydration.path)
    }

    /// The mark is gone, but not for certain: no writer gets in before a commit says so.
    pub(super) fn unmarked_only(&self, hydration: &Arc<Hydration>, error: &Error) {
        let waiters = hydration.state.lock().take_waiters();
        self.commit.unmarked_again(Arc::clone(hydration));
        waiters.into_iter().for_each(|w| w(Err(error.clone())));
    }

    /// D3: a pending file loses all its data: nothing is read from src. Calls `then` when it can be
    /// written. A hydration that has begun is waited for instead.
    pub fn truncate_pending(self: &Arc<Self>, node: &Arc<Node>, then: Waiter) {
        let (hydration, _) = self.hydrations.join(&FileRef::of(node));
        let mut state = hydration.state.lock();
        state.drop_idle_jobs(&(0..u64::MAX));
        if state.stage != Stage::Queued || !state.ranges.is_empty() {
            drop(state);
            return self.change_size(node, 0, None, then);
        }
        if self.spoiled.gate.stops(node.ino) {
            drop(state);
            return self.truncate_after_finish(node, then);
        }
        state.stage = Stage::Truncating;
        drop(state);
        let (mirror, node) = (Arc::clone(self), Arc::clone(node));
        let task = move || {
            let _inside = mirror.marks.enter();
            let result = mirror.truncate_and_unmark(&hydration.file, &hydration.path);
            match result {
                Ok(bytes) => {
                    mirror.progress.bytes_left.sub(bytes);
                    mirror.progress.bytes_dropped.add(bytes);
                    mirror.progress.files_pulled.add(1);
                    node.set_phase(Phase::Unmarked);
                    mirror.source.unlearn(node.ino);
                    mirror.end(&hydration, Ok(()));
                    then(Ok(()));
                }
                Err(e) => {
                    mirror.fail_hydration(&hydration, e.clone());
                    then(Err(e));
                }
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn truncate_after_finish(self: &Arc<Self>, node: &Arc<Node>, then: Waiter) {
        let held = Arc::clone(node);
        let again = self.acting(move |mirror, ended: Result<()>| match ended {
            Ok(()) if held.is_pending_file() => mirror.truncate_pending(&held, then),
            Ok(()) => mirror.change_size(&held, 0, None, then),
            Err(e) => then(Err(e)),
        });
        let told = self.waiting_for(node, again);
        self.spoiled.gate.after(node, told);
    }

    fn truncate_and_unmark(&self, file: &FileRef, path: &RelPath) -> Result<u64> {
        let opened =
            file.anchor
                .open(self.dst.as_fd(), OFlags::RDWR)
                .on("open", Side::Dst, path)?;
        let before = stat::stat_fd(opened.as_fd()).on("statx", Side::Dst, path)?;
        let truncate = || caps::without_fsetid(|| copy::truncate(opened.as_fd(), 0));
        fault::unless_broken("D3", truncate).on("ftruncate", Side::Dst, path)?;
        {
            let _guard = self.lock_perms(file.ino);
            self.take_mark(opened.as_fd())
                .on("removexattr", Side::Dst, path)?;
        }
        fd::fsync(opened.as_fd()).on("fsync", Side::Dst, path)?;
        if fault::breaks("D3") {
            truncate().on("ftruncate", Side::Dst, path)?;
        }
        // An earlier daemon may have left it mixed.
        let map = bytemap::remove(self.control.maps.as_fd(), file.ino);
        map.on("unlink", Side::Dst, ".mirrorfs/maps")?;
        Ok(before.size)
    }
}
