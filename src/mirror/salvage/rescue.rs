//! Rescue: a file that src cannot give whole becomes a mixed one, though no user has changed it, so that
//! what can be read of it is kept.
//!
//!   (pending) -> salvaged   rescue()   the map and the size are durable, then the mark says so (M1)
//!   salvaged  -> mixed      now_users() a user changes it: the mark says so before his bytes are there
//!   salvaged  -> (whole)    complete() in fill.rs: it is as any pulled file
//!   salvaged  -> pending    leave()    src's file is another: the record goes, then the mark says so (M7)
//!
//! What can be read then comes as the rest of any mixed file does.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::super::Mirror;
use super::super::attr::now;
use super::super::bytemap::{self, ByteMap};
use super::super::hydrate::{Hydration, Stage};
use super::super::mixed::{Ground, Start};
use super::super::node::Ino;
use super::super::source::SrcInfo;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::Mark;
use crate::meta::{self, CAPABILITY};
use crate::sys::stat::{self, Stat, Time};
use crate::sys::xattr::{self, Target};
use crate::sys::{fault, fd};

/// What was opened, or written down, so long ago may be closed first.
const OLD: Duration = Duration::from_secs(5);

impl Mirror {
    /// The whole-file job has met bytes that src cannot read, for good.
    pub(in crate::mirror) fn rescue(self: &Arc<Self>, hydration: &Arc<Hydration>, error: Error) {
        if !self.mixes || !hydration.state.lock().mixes {
            return self.fail_hydration(hydration, error);
        }
        {
            let mut state = hydration.state.lock();
            if !state.is_whole() {
                return; // Its failure is nobody's any more.
            }
            state.stage = Stage::Mixing;
            (state.asked, state.whole, state.leaves) = (None, None, false);
            state.forget_pulled();
        }
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            // Outside: it may wait for src.
            let src = mirror.src_to_rescue(&hydration);
            let _inside = mirror.marks.enter();
            let laid =
                src.and_then(|src| src.map_or(Ok(None), |s| mirror.lay_ground(&hydration, &s)));
            match laid {
                Ok(Some(ground)) => mirror.rescued(&hydration, ground, &error),
                Ok(None) => {
                    hydration.state.lock().stage = Stage::Queued;
                    mirror.already_done(&hydration);
                }
                Err(e) => {
                    tracing::warn!("{e}; what can be read of the file is not kept");
                    mirror.fail_hydration(&hydration, error);
                }
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn rescued(self: &Arc<Self>, hydration: &Arc<Hydration>, ground: Ground, error: &Error) {
        self.spoil(hydration.file.ino);
        self.fail(&hydration.path, error);
        // They can open it; who waits to hear that it is complete waits on.
        let waiters = {
            let mut state = hydration.state.lock();
            let mut waiters = std::mem::take(&mut state.readers);
            waiters.append(&mut state.writers);
            waiters
        };
        let start = Start {
            anew: true,
            ..Start::default()
        };
        self.install(hydration, ground, start);
        waiters.into_iter().for_each(|w| w(Err(error.clone())));
    }

    /// What src's file is. `None`: dst's carries no mark any more.
    fn src_to_rescue(&self, hydration: &Hydration) -> Result<Option<Stat>> {
        let path = &hydration.path;
        let Some((_, dir, name)) = self.prepare(hydration)? else {
            return Ok(None);
        };
        let src = fd::open_src(dir.fd.as_fd(), &name).on("open", Side::Src, path)?;
        let src = stat::stat_fd(src.as_fd()).on("statx", Side::Src, path)?;
        match src.is_file() {
            true => Ok(Some(src)),
            false => Err(Error::SrcChanged {
                path: path.to_path(),
            }),
        }
    }

    /// M1: map, name and size are durable before the mark says that the file is mixed. `None`: it carries
    /// no mark any more.
    fn lay_ground(&self, hydration: &Hydration, src: &Stat) -> Result<Option<Ground>> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        let Some(file) = self.open_as_long(hydration, src.size)? else {
            return Ok(None);
        };
        let maps = self.control.maps.as_fd();
        let map = ByteMap::create(maps, ino).and_then(|map| map.sync_in(maps).map(|()| map));
        let map = map.on("create", Side::Dst, ".mirrorfs/maps")?;
        fault::point("salvage-map");
        let sync = || fd::fsync(file.as_fd());
        fault::unless_broken("M1", sync).on("fsync", Side::Dst, path)?;
        let _guard = self.lock_mark(ino);
        let target = Target::Open(file.as_fd());
        let mark = self.mark.get(target).on("getxattr", Side::Dst, path)?;
        let Some(mark) = mark.filter(|m| m.mixed.is_none()) else {
            return Ok(None);
        };
        let mark = Mark {
            mixed: Some(src.size),
            salvage: Some((src.atime, src.mtime)),
            ..mark
        };
        self.replace_mark(file.as_fd(), &mark)
            .on("setxattr", Side::Dst, path)?;
        fault::point("salvage-marked");
        Ok(Some(Ground::new(Arc::new(file), map, &mark)))
    }

    /// A user is about to change the file: what it is to be is his to say, and it is not src's any more.
    pub(in crate::mirror) fn now_users(&self, ground: &Ground, ino: Ino) -> Result<(), Errno> {
        if ground.salvage_of().is_none() {
            return Ok(());
        }
        let _guard = self.lock_mark(ino);
        let file = ground.file.as_fd();
        if let Some(mark) = self.mark.get(Target::Open(file))?
            && let Some((atime, _)) = mark.salvage_times()
        {
            let times = (atime, now());
            let mark = Mark {
                mixed: Some(ground.src_end()),
                salvage: None,
                times: Some(times),
                // As a chown: what is changed loses its privileges.
                perm: mark.perm.map(|p| p & 0o1777),
                capability: false,
                ..mark
            };
            self.replace_mark(file, &mark)?;
            ground.set_times(times);
        }
        ground.is_changed();
        fault::point("salvage-owned");
        Ok(())
    }

    /// D7: what writing has disturbed, of a file that is whole after all. Its times, which are to follow.
    pub(in crate::mirror) fn restore_salvaged(
        &self,
        hydration: &Hydration,
        file: BorrowedFd<'_>,
    ) -> Result<Option<(Time, Time)>> {
        let path = &hydration.path;
        let target = Target::Open(file);
        let mark = self.mark.get(target).on("getxattr", Side::Dst, path)?;
        let mark = mark.unwrap_or_default();
        if !mark.capability {
            return Ok(mark.salvage_times());
        }
        let (dir, name) = self.open_origin(hydration)?;
        let value = xattr::get(Target::At(dir.fd.as_fd(), &name), CAPABILITY);
        let Some(value) = value.on("getxattr", Side::Src, path)? else {
            return Ok(mark.salvage_times());
        };
        self.applied(path, || {
            let set = xattr::set(target, CAPABILITY, &value);
            let what = CAPABILITY.to_string_lossy().into_owned();
            let refused = set.map_err(|errno| meta::Refused { what, errno });
            refused.err().into_iter().collect()
        })?;
        Ok(mark.salvage_times())
    }

    /// M6: src's file is another, `now`, than what is here of one that no user has changed: it is pending again.
    pub(in crate::mirror) fn leave(self: &Arc<Self>, hydration: &Arc<Hydration>, now: &Stat) {
        let ground = {
            let mut state = hydration.state.lock();
            let leaves = state.stage == Stage::Leaving;
            match state.mixed.as_deref_mut() {
                Some(mixed) if leaves && !mixed.left => {
                    mixed.left = true;
                    Arc::clone(&mixed.ground)
                }
                _ => return,
            }
        };
        let (mirror, hydration, info) =
            (Arc::clone(self), Arc::clone(hydration), SrcInfo::from(now));
        let task = move || {
            let _inside = mirror.marks.enter();
            if let Err(e) = mirror.unsalvage(&hydration, &ground) {
                // Nothing has come since: whoever looks next finds the same.
                tracing::warn!("{e}");
            }
            mirror.left(&hydration, info);
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn unsalvage(&self, hydration: &Hydration, ground: &Ground) -> Result<()> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        self.drop_pulled(hydration)?;
        let file = ground.file.as_fd();
        {
            let _guard = self.lock_mark(ino);
            let mark = self.mark.get(Target::Open(file));
            let mark = mark.on("getxattr", Side::Dst, path)?;
            if let Some(mark) = mark.filter(|m| m.salvage.is_some()) {
                let mark = Mark {
                    mixed: None,
                    salvage: None,
                    ..mark
                };
                self.replace_mark(file, &mark)
                    .on("setxattr", Side::Dst, path)?;
            }
        }
        // A size that is another than the mark's would be a user's.
        fd::fsync(file).on("fsync", Side::Dst, path)?;
        fault::point("salvage-left");
        bytemap::remove(self.control.maps.as_fd(), ino)
            .on("unlink", Side::Dst, ".mirrorfs/maps")
            .map(|_| ())
    }

    fn left(&self, hydration: &Arc<Hydration>, info: SrcInfo) {
        let ino = hydration.file.ino;
        self.src_was_changed(ino, || self.source.learn(ino, info));
        self.mend(ino);
        let path = hydration.path.to_path();
        let error = Error::SrcChanged { path };
        let (changers, waiters, idle) = {
            let mut state = hydration.state.lock();
            let mut changers = std::mem::take(&mut state.changers);
            if let Some(mixed) = state.mixed.take() {
                changers.extend(mixed.waiting);
            }
            (state.dst, state.src, state.looked) = (None, None, false);
            state.forget_pulled();
            let idle = state.ranges.is_empty();
            if !idle {
                // Range jobs that still run keep it in the table (I6).
                (state.stage, state.asked) = (Stage::Queued, None);
            }
            (changers, state.take_waiters(), idle)
        };
        if idle {
            self.end(hydration, Err(error.clone()));
        }
        waiters.into_iter().for_each(|w| w(Err(error.clone())));
        changers.into_iter().for_each(|w| w(Ok(())));
    }

    /// Two fds each: when many files are open of which nothing more can be had for now, one is closed.
    /// Whoever needs it opens it again, from its mark and its record.
    pub(in crate::mirror) fn let_go(&self, hydration: &Arc<Hydration>) {
        let Some(many) = self.spoiled.are_many() else {
            return;
        };
        let mut closed = None;
        // Whoever opens it is to look at its mark.
        self.source.unlearn(hydration.file.ino);
        self.hydrations.remove_if(hydration, |state| {
            let idle = state.stage == Stage::Mixed
                && state.is_idle()
                && state.mixed.as_deref().is_some_and(|mixed| {
                    let is_src = mixed.ground.salvage_of().is_some();
                    let old = many || mixed.saved.elapsed() >= OLD;
                    // Nobody is writing its record.
                    let recorded = mixed.ground.record.try_lock().is_some();
                    old && recorded
                        && is_src
                        && !mixed.unsaved
                        && !mixed.stale
                        && mixed.waiting.is_empty()
                });
            if idle {
                state.stage = Stage::Over;
                closed = state.mixed.take();
                (state.dst, state.src) = (None, None);
            }
            idle
        });
    }
}
