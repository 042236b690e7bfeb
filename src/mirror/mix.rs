//! Mix: how a pending file becomes a mixed one, and what an earlier daemon has left of one.
//!
//!   (pending) -> young    mix()     the first change, which waits for no sync: the map is made, then
//!                                   the mark says so
//!   young     -> mixed    mature()  map, name and size are durable, then the mark says that (M1): before
//!                                   the first fsync or cut returns, and soon without either
//!   (start)   -> either   load()    from the mark and the map
//!   young     -> pending  load()    the map did not outlive a power cut: nothing had been promised

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::bytemap::{self, ByteMap};
use super::hydrate::{Hydration, State};
use super::mixed::{Ground, Mixed, Start};
use super::node::Node;
use super::salvage::pulled::Pulled;
use super::source::SrcInfo;
use crate::engine::job::Priority;
use crate::error::{Context, Result, Side};
use crate::mark::Mark;
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, stat};

impl Mirror {
    /// Makes a pending file mixed. `None`: it carries no mark any more.
    pub(super) fn mix(&self, hydration: &Hydration, info: SrcInfo) -> Result<Option<Ground>> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        let Some(file) = self.open_as_long(hydration, info.size)? else {
            return Ok(None);
        };
        let maps = self.control.maps.as_fd();
        let map = ByteMap::create(maps, ino).on("create", Side::Dst, ".mirrorfs/maps")?;
        fault::point("mixed-map");
        let _guard = self.lock_mark(ino);
        let target = Target::Open(file.as_fd());
        let Some(mark) = self.mark.get(target).on("getxattr", Side::Dst, path)? else {
            return Ok(None);
        };
        let atime = mark.times.map_or(info.atime, |t| t.0);
        let mark = Mark {
            mixed: Some(info.size),
            young: true,
            times: Some((atime, super::attr::now())),
            // As a chown: what is changed loses its privileges.
            perm: mark.perm.map(|p| p & 0o1777),
            ..mark
        };
        self.replace_mark(file.as_fd(), &mark)
            .on("setxattr", Side::Dst, path)?;
        fault::point("mixed-marked");
        Ok(Some(Ground::new(Arc::new(file), map, &mark)))
    }

    /// The placeholder, open, with src's size (D4). `None`: it is gone.
    pub(super) fn open_as_long(&self, hydration: &Hydration, size: u64) -> Result<Option<OwnedFd>> {
        let path = &hydration.path;
        let file = match hydration.file.anchor.open(self.dst.as_fd(), OFlags::RDWR) {
            Err(Errno::STALE | Errno::NOENT) => return Ok(None),
            other => other.on("open", Side::Dst, path)?,
        };
        let there = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, path)?;
        if there.size != size {
            copy::truncate(file.as_fd(), size).on("ftruncate", Side::Dst, path)?;
        }
        Ok(Some(file))
    }

    /// M1: the map, its name and dst's size are durable before the mark says that they are.
    pub(super) fn mature(&self, ground: &Ground, ino: u64) -> Result<(), Errno> {
        let mut young = ground.young.lock();
        if !*young {
            return Ok(());
        }
        let file = ground.file.as_fd();
        let sync = || {
            ground.map.sync_in(self.control.maps.as_fd())?;
            self.sync_bytes(ground, ino, file, false)
        };
        fault::unless_broken("M1", sync)?;
        fault::point("mixed-mature");
        let _guard = self.lock_mark(ino);
        if let Some(mark) = self.mark.get(Target::Open(file))?
            && mark.young
        {
            let mark = Mark {
                young: false,
                capability: false,
                ..mark
            };
            self.replace_mark(file, &mark)?;
        }
        *young = false;
        Ok(())
    }

    /// As `mature`, while nobody waits for it: a map that is lost later is not taken for one that never
    /// was there.
    pub(super) fn mature_soon(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let ground = {
            let state = hydration.state.lock();
            state.mixed.as_ref().map(|m| Arc::clone(&m.ground))
        };
        let Some(ground) = ground.filter(|g| *g.young.lock()) else {
            return;
        };
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            let _inside = mirror.marks.enter();
            let mature = mirror.mature(&ground, hydration.file.ino);
            if let Err(e) = mature.on("fsync", Side::Dst, &hydration.path) {
                tracing::warn!("{e}"); // Whoever syncs it is told.
            }
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// Looks whether an earlier daemon has left the file mixed; then it is that again.
    pub(super) fn look(self: &Arc<Self>, hydration: &Arc<Hydration>) -> Result<()> {
        let path = &hydration.path;
        let dst = self.dst.as_fd();
        // Not for writing: a dst that is read-only is read on.
        let mark = match hydration.file.anchor.open(dst, OFlags::PATH) {
            // Deleted meanwhile: whoever comes next is told.
            Err(Errno::STALE | Errno::NOENT) => Ok(None),
            other => self
                .mark
                .get(Target::Fd(other.on("open", Side::Dst, path)?.as_fd())),
        };
        let mark = mark.on("getxattr", Side::Dst, path)?;
        let Some(mark) = mark.filter(|m| m.mixed.is_some()) else {
            hydration.state.lock().looked = true;
            return Ok(());
        };
        let file = hydration.file.anchor.open(dst, OFlags::RDWR);
        let file = file.on("open", Side::Dst, path)?;
        self.found_mixed(hydration, Arc::new(file), &mark)
    }

    /// As `look`, for who is about to pull the whole file: what it has opened for that, unless the file is
    /// mixed, or carries no mark any more.
    pub(super) fn look_to_pull(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let opened = self.open_marked(hydration)?;
        if let Some((file, mark)) = &opened
            && mark.mixed.is_some()
        {
            self.found_mixed(hydration, Arc::clone(file), mark)?;
            return Ok(None);
        }
        hydration.state.lock().looked = true;
        Ok(opened.map(|(file, _)| file))
    }

    fn found_mixed(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        file: Arc<OwnedFd>,
        mark: &Mark,
    ) -> Result<()> {
        match self.load(hydration, file, mark)? {
            Some((ground, pulled)) => {
                let start = Start {
                    pulled,
                    ..Start::default()
                };
                self.install(hydration, ground, start);
            }
            None => hydration.state.lock().looked = true,
        }
        Ok(())
    }

    /// M1, M4: what an earlier daemon has left of a mixed file. `None`: it is pending.
    fn load(
        &self,
        hydration: &Hydration,
        file: Arc<OwnedFd>,
        mark: &Mark,
    ) -> Result<Option<(Ground, Option<Pulled>)>> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        let map = match ByteMap::open(self.control.maps.as_fd(), ino) {
            Err(Errno::NOENT) if mark.young => {
                self.unmix(&file, ino).on("ftruncate", Side::Dst, path)?;
                return Ok(None);
            }
            // For whoever reads it the file is there.
            Err(Errno::NOENT) => Err(Errno::IO),
            other => other,
        };
        let map = map.on("open", Side::Dst, ".mirrorfs/maps")?;
        let there = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, path)?;
        let marked = mark.mixed.unwrap_or(0);
        if mark.young && there.size < marked {
            copy::truncate(file.as_fd(), marked).on("ftruncate", Side::Dst, path)?;
        }
        let src_end = match mark.young {
            true => marked,
            false => marked.min(there.size),
        };
        map.believe(file.as_fd(), src_end)
            .on("lseek", Side::Dst, path)?;
        let pulled = Pulled::load(self.control.maps.as_fd(), ino);
        let pulled = pulled.on("open", Side::Dst, ".mirrorfs/maps")?;
        let times = mark.times.or(mark.salvage);
        let times = times.unwrap_or((there.atime, there.mtime));
        // What a user has changed says so, though the mark may not any more.
        let is_changed = !map.is_empty() || there.size != marked;
        let ground = match mark.salvage {
            Some(_) => Ground::new(file, map, mark),
            None => {
                let (mixed, times) = (Some(src_end), Some(times));
                let mark = Mark {
                    mixed,
                    times,
                    ..mark.clone()
                };
                Ground::new(file, map, &mark)
            }
        };
        if mark.salvage.is_some() && is_changed {
            ground.src_end.store(src_end, Ordering::Release);
            self.now_users(&ground, ino)
                .on("setxattr", Side::Dst, path)?;
        }
        if src_end < marked {
            // A cut whose mark was not written any more: before the file can grow again.
            self.store_mark(&ground, ino)
                .on("setxattr", Side::Dst, path)?;
        }
        Ok(Some((ground, pulled)))
    }

    /// False for a young file that is about to be pending again.
    pub(super) fn has_map(&self, node: &Node) -> Result<bool> {
        bytemap::is_there(self.control.maps.as_fd(), node.ino).on(
            "statx",
            Side::Dst,
            ".mirrorfs/maps",
        )
    }

    /// A young file without a map is pending: all of it is src's, and what dst has of it is nobody's.
    fn unmix(&self, file: &OwnedFd, ino: u64) -> Result<(), Errno> {
        let _guard = self.lock_mark(ino);
        match self.mark.get(Target::Open(file.as_fd()))? {
            Some(mark) if mark.young => {
                copy::truncate(file.as_fd(), 0)?;
                copy::truncate(file.as_fd(), mark.mixed.unwrap_or(0))?;
                let mark = Mark {
                    mixed: None,
                    young: false,
                    ..mark
                };
                self.replace_mark(file.as_fd(), &mark)
            }
            _ => Ok(()),
        }
    }
}

impl State {
    /// What is here when the file becomes mixed.
    pub(super) fn mix(&mut self, ground: Ground, start: Start) {
        if start.anew {
            self.forget_pulled();
        }
        self.drop_idle_jobs(&(0..u64::MAX));
        let info = start.info.filter(|_| !self.present.is_empty());
        let info = info.map(|info| (info.size, info.mtime));
        let mut mixed = Mixed::new(ground, info);
        mixed.apart = self.present.is_empty() && self.ranges.iter().all(|job| job.void);
        let of = mixed.ground.salvage_of();
        if of.is_some() {
            mixed.src = of;
        }
        if let Some(pulled) = start.pulled {
            // M6: the record is of another src, or beside what somebody has begun to pull.
            mixed.stale = !mixed.apart || of.is_some_and(|of| of != pulled.src);
            if !mixed.stale {
                mixed.src = Some(pulled.src);
                self.present = pulled.present;
                mixed.fill.knows(pulled.bad);
            }
        }
        self.mixed = Some(Box::new(mixed));
    }
}
