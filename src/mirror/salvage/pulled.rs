//! Pulled: which of src's bytes in a mixed file are durable in dst, in `.mirrorfs/maps/INO.pulled` (M7).
//!
//!   (nothing) -> there   keep_pulled()    dst's file is synced, then the record is written beside and renamed
//!   there     -> there   keep_pulled()    likewise: an older one says less, and nothing wrong
//!   there     -> gone    drop_pulled()    what is here counts for nothing any more: before anything else comes
//!
//! Only files with bytes that src cannot read have one: of any other all is pulled again after a restart.
//! Lock order: a ground's `record` before a hydration's state.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::super::Mirror;
use super::super::hydrate::{Hydration, Stage, State};
use super::super::mixed::Ground;
use super::super::node::Ino;
use crate::engine::job::Priority;
use crate::error::{Context, Result, Side};
use crate::ranges::RangeSet;
use crate::sys::name::Name;
use crate::sys::stat::Time;
use crate::sys::{fault, fd};

/// While something comes it is written so often; who looks whether it is time does so every second.
const PAUSE: Duration = Duration::from_secs(4);

/// What a record says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::mirror) struct Pulled {
    /// Size and time of the file in src that the bytes are of.
    pub(in crate::mirror) src: (u64, Time),
    /// Durable in dst.
    pub(in crate::mirror) present: RangeSet,
    /// Could not be read, block by block.
    pub(in crate::mirror) bad: RangeSet,
}

#[derive(Serialize, Deserialize)]
struct Text {
    size: u64,
    mtime: (i64, u32),
    present: Vec<(u64, u64)>,
    bad: Vec<(u64, u64)>,
}

impl Pulled {
    /// Replaces the record of a mixed file, durably.
    fn store(&self, dir: BorrowedFd<'_>, ino: Ino) -> Result<(), Errno> {
        let list = |set: &RangeSet| set.iter().map(|r| (r.start, r.end)).collect();
        let text = Text {
            size: self.src.0,
            mtime: (self.src.1.sec, self.src.1.nsec),
            present: list(&self.present),
            bad: list(&self.bad),
        };
        let text = serde_json::to_vec(&text).map_err(|_| Errno::INVAL)?;
        let (name, new) = (name_of(ino, "pulled")?, name_of(ino, "new")?);
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, new.as_cstr(), flags, Mode::from_raw_mode(0o600))?;
        let mut file = File::from(file);
        let written = file.write_all(&text);
        written.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        fd::fsync(file.as_fd())?;
        rustix::fs::renameat(dir, new.as_cstr(), dir, name.as_cstr())?;
        fd::fsync(dir)
    }

    /// The record of a mixed file. `None`: there is none that can be believed.
    pub(in crate::mirror) fn load(dir: BorrowedFd<'_>, ino: Ino) -> Result<Option<Pulled>, Errno> {
        let file = match fd::open_at(dir, &name_of(ino, "pulled")?, OFlags::RDONLY) {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        let mut text = Vec::new();
        let read = File::from(file).read_to_end(&mut text);
        read.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        Ok(Pulled::parse(&text))
    }

    fn parse(text: &[u8]) -> Option<Pulled> {
        let text: Text = serde_json::from_slice(text).ok()?;
        let set = |list: &[(u64, u64)]| {
            let mut set = RangeSet::new();
            list.iter().for_each(|(from, to)| set.insert(*from..*to));
            set
        };
        let (sec, nsec) = text.mtime;
        Some(Pulled {
            src: (text.size, Time { sec, nsec }),
            present: set(&text.present),
            bad: set(&text.bad),
        })
    }
}

/// True when there was one.
pub(in crate::mirror) fn remove(dir: BorrowedFd<'_>, ino: Ino) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(dir, name_of(ino, "pulled")?.as_cstr(), AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn name_of(ino: Ino, what: &str) -> Result<Name, Errno> {
    Name::new(format!("{ino:x}.{what}").as_bytes()).ok_or(Errno::INVAL)
}

impl Mirror {
    /// More is here than the record of a file with bytes that src cannot read says: it is written when it is
    /// time, also when nothing more comes, because all that is still asked for hangs.
    pub(in crate::mirror) fn keep_soon(&self, hydration: &Arc<Hydration>) {
        let mut unkept = self.spoiled.unkept.lock();
        unkept.insert(hydration.file.ino, Arc::downgrade(hydration));
    }

    /// By the thread that watches src: those whose time has come, on pool threads.
    pub(in crate::mirror) fn keep_what_came(self: &Arc<Self>) {
        if self.spoiled.gate.is_shut() {
            return; // `finish` has seen to them.
        }
        let unkept = std::mem::take(&mut *self.spoiled.unkept.lock());
        let there = unkept.into_values().filter_map(|h| h.upgrade());
        for hydration in there {
            let time = hydration.state.lock().unkept_for();
            match time {
                None => {}
                Some(time) if time < PAUSE => self.keep_soon(&hydration),
                Some(_) => {
                    let (mirror, held) = (Arc::clone(self), Arc::clone(&hydration));
                    let task = move || mirror.keep_now(&held);
                    self.engine.pool().run(Priority::Demand, Box::new(task));
                }
            }
        }
    }

    fn keep_now(&self, hydration: &Arc<Hydration>) {
        if !self.spoiled.gate.is_shut() {
            self.keep_pulled(hydration);
        }
        // It has failed, or something has come meanwhile.
        if hydration.state.lock().unkept_for().is_some() {
            self.keep_soon(hydration);
        }
        self.let_go(hydration);
    }

    /// As `keep_pulled`, before somebody is told. ext4 and xfs have one journal: with the record's name all that
    /// came before is durable, the `L` of the file's directory too. btrfs logs the record alone (D6).
    pub(in crate::mirror) fn keep_pulled_and_place(&self, hydration: &Hydration) {
        self.keep_pulled(hydration);
        if self.btrfs
            && let Err(e) = fd::syncfs(self.dst.as_fd()).on("syncfs", Side::Dst, ".")
        {
            tracing::warn!("{e}"); // Then its directory comes again, and all that is in it.
        }
    }

    /// M7: what is here of src's bytes is durable in dst, and then a record says so.
    pub(in crate::mirror) fn keep_pulled(&self, hydration: &Hydration) {
        let _inside = self.marks.enter();
        let ground = {
            let state = hydration.state.lock();
            state.mixed.as_ref().map(|m| Arc::clone(&m.ground))
        };
        let Some(ground) = ground else { return };
        // All of it: who comes second finds the record of the first.
        let _one = ground.record.lock();
        if let Err(e) = self.try_keep(hydration, &ground) {
            tracing::warn!("{e}"); // What it does not say is pulled again.
            if let Some(mixed) = hydration.state.lock().mixed.as_deref_mut() {
                mixed.unsaved = true;
            }
        }
    }

    fn try_keep(&self, hydration: &Hydration, ground: &Ground) -> Result<()> {
        let (path, ino) = (&hydration.path, hydration.file.ino);
        let (epoch, pulled) = {
            let mut state = hydration.state.lock();
            let present = state.present.clone();
            let is_mixed = state.stage == Stage::Mixed;
            let mixed = state.mixed.as_deref_mut();
            let Some(mixed) = mixed.filter(|m| is_mixed && m.apart && m.unsaved) else {
                return Ok(());
            };
            let Some(src) = mixed.src else {
                return Ok(());
            };
            (mixed.unsaved, mixed.saved) = (false, Instant::now());
            let bad = mixed.fill.known_bad().clone();
            let pulled = Pulled { src, present, bad };
            (mixed.epoch, pulled)
        };
        let sync = || self.sync_bytes(ground, ino, ground.file.as_fd(), false);
        let synced = self.mature(ground, ino);
        let synced = synced.and_then(|()| fault::unless_broken("M7", sync));
        synced.on("fsync", Side::Dst, path)?;
        fault::point("salvage-synced");
        let same = |e: u64| e == epoch;
        let epoch_now = hydration.state.lock().mixed.as_ref().map(|m| m.epoch);
        if !epoch_now.is_some_and(same) {
            return Ok(()); // It is another file by now.
        }
        let stored = pulled.store(self.control.maps.as_fd(), ino);
        stored.on("write", Side::Dst, ".mirrorfs/maps")?;
        fault::point("salvage-kept");
        Ok(())
    }

    /// M7: a record of what counts for nothing any more is gone, durably, before other bytes come.
    pub(in crate::mirror) fn drop_pulled(&self, hydration: &Hydration) -> Result<()> {
        let (ground, epoch) = {
            let state = hydration.state.lock();
            match state.mixed.as_deref().filter(|m| m.stale) {
                Some(mixed) => (Arc::clone(&mixed.ground), mixed.epoch),
                None => return Ok(()),
            }
        };
        let _inside = self.marks.enter();
        let _one = ground.record.lock();
        let (ino, maps) = (hydration.file.ino, self.control.maps.as_fd());
        let gone = remove(maps, ino).and_then(|was| match was {
            true => fd::fsync(maps),
            false => Ok(()),
        });
        gone.on("unlink", Side::Dst, ".mirrorfs/maps")?;
        fault::point("salvage-dropped");
        let mut state = hydration.state.lock();
        if let Some(mixed) = state.mixed.as_deref_mut().filter(|m| m.epoch == epoch) {
            mixed.stale = false;
        }
        Ok(())
    }
}

impl State {
    /// For how long something has been here that a record is to say and does not, or not for long.
    fn unkept_for(&self) -> Option<Duration> {
        let mixed = self.mixed.as_deref().filter(|m| m.unsaved && m.apart)?;
        let odd = mixed.fill.is_odd() || mixed.ground.salvage_of().is_some();
        (odd && self.stage == Stage::Mixed).then(|| mixed.saved.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_half_of_one_does_not() {
        let tree = tempfile::tempdir().expect("a directory");
        let dir = File::open(tree.path()).expect("opens");
        assert_eq!(Pulled::load(dir.as_fd(), 9), Ok(None));
        let mut pulled = Pulled {
            src: (70_000, Time { sec: -5, nsec: 7 }),
            ..Pulled::default()
        };
        pulled.present.insert(0..4096);
        pulled.present.insert(8192..70_000);
        pulled.bad.insert(4096..8192);
        pulled.store(dir.as_fd(), 9).expect("stores");
        assert_eq!(Pulled::load(dir.as_fd(), 9), Ok(Some(pulled)));
        let text = std::fs::read(tree.path().join("9.pulled")).expect("reads");
        for len in 0..text.len() {
            assert_eq!(Pulled::parse(&text[..len]), None, "{len} bytes");
        }
        assert_eq!(remove(dir.as_fd(), 9), Ok(true));
        assert_eq!(remove(dir.as_fd(), 9), Ok(false));
    }
}
