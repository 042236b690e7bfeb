//! Rest: what `finish` makes of a file that src could not give whole, when the loss is accepted.
//!
//!   look()      what there is of it, by its mark, its map and its record
//!   give_up()   the good bytes stay, at the full size, and where nothing could be read there is a hole
//!
//! Without a daemon, or when the daemon has let go of the file (`shut_rescues`).

use std::collections::HashSet;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;

use super::super::Mirror;
use super::super::bytemap::ByteMap;
use super::super::hydrate::{Hydration, Stage};
use super::super::node::{Ino, Phase};
use super::super::perms::Perms;
use super::pulled::Pulled;
use crate::error::{Context, Error, Printable, Result, Side};
use crate::mark::{Mark, MarkName};
use crate::meta;
use crate::sys::name::RelPath;
use crate::sys::xattr::Target;
use crate::sys::{copy, fault, fd, stat};

/// PUNCH_HOLE, and the size stays.
const PUNCH: i32 = 2 | 1;
/// The longest that `finish` waits for what is being read.
const QUIET_MAX: Duration = Duration::from_secs(10);

/// A file that is in dst without some bytes, as it was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rest {
    /// Its path in DST, printable.
    pub path: String,
    /// dst's inode number.
    #[serde(skip)]
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes that src could not give: from, to (not included). They are holes.
    pub ranges: Vec<(u64, u64)>,
}

/// A file that no user has changed, and some of it is here.
pub(in crate::mirror) struct Remains {
    path: RelPath,
    file: OwnedFd,
    mark: Mark,
    ino: u64,
    size: u64,
    missing: Vec<Range<u64>>,
}

/// What there is of a file that src could not give whole.
pub(in crate::mirror) enum Found {
    /// It is whole by now, or deleted.
    Gone,
    /// A user has changed it.
    Changed,
    Nothing,
    Some(Box<Remains>),
}

/// Looks at what is marked as salvaged.
pub(in crate::mirror) fn look(
    (root, maps): (BorrowedFd<'_>, BorrowedFd<'_>),
    name: MarkName,
    path: &RelPath,
) -> Result<Found> {
    let file = match fd::open_beneath(root, path, OFlags::RDWR | OFlags::NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(Found::Gone),
        other => other.on("open", Side::Dst, path)?,
    };
    let mark = name.get(Target::Open(file.as_fd()));
    let mark = mark.on("getxattr", Side::Dst, path)?;
    let Some(mark) = mark.filter(|m| m.mixed.is_some()) else {
        return Ok(Found::Gone);
    };
    let Some((_, mtime)) = mark.salvage else {
        return Ok(Found::Changed);
    };
    let there = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, path)?;
    let (ino, size) = (there.key.ino, mark.mixed.unwrap_or(0));
    let at = ".mirrorfs/maps";
    let map = match ByteMap::open(maps, ino) {
        // It is made durable before the mark is written.
        Err(Errno::NOENT) => Err(Errno::IO),
        other => other,
    };
    let map = map.on("open", Side::Dst, at)?;
    map.believe(file.as_fd(), size)
        .on("lseek", Side::Dst, path)?;
    if !map.is_empty() || there.size != size {
        return Ok(Found::Changed);
    }
    let pulled = Pulled::load(maps, ino).on("open", Side::Dst, at)?;
    let Some(pulled) = pulled.filter(|p| p.src == (size, mtime) && !p.present.is_empty()) else {
        return Ok(Found::Nothing);
    };
    let (mut missing, mut from) = (Vec::new(), 0);
    while let Some(gap) = pulled.present.first_gap(&(from..size)) {
        from = gap.end;
        missing.push(gap);
    }
    Ok(Found::Some(Box::new(Remains {
        path: path.clone(),
        file,
        mark,
        ino,
        size,
        missing,
    })))
}

impl Remains {
    /// D1: what is here is durable by its record; the holes and times are, and then the mark goes.
    pub(in crate::mirror) fn give_up(self, perms: &Perms<'_>) -> Result<Rest> {
        let (path, file) = (&self.path, self.file.as_fd());
        for range in &self.missing {
            // An earlier version of the file may have had something there.
            let punched = copy::fallocate(file, PUNCH, range.start, range.end - range.start);
            punched.on("fallocate", Side::Dst, path)?;
        }
        self.set_times(perms.mark)
            .on("utimensat", Side::Dst, path)?;
        fd::fsync(file).on("fsync", Side::Dst, path)?;
        fault::point("salvage-given");
        let taken = perms.take_mark_alone(file);
        taken.on("removexattr", Side::Dst, path)?;
        let rest = Rest {
            path: Printable(path.as_ref().as_os_str()).to_string(),
            ino: self.ino,
            size: self.size,
            ranges: self.missing.iter().map(|r| (r.start, r.end)).collect(),
        };
        let lost: u64 = self.missing.iter().map(|r| r.end - r.start).sum();
        tracing::warn!(
            "\"{}\": {lost} of {} bytes lost, as accepted: holes in {} places",
            rest.path,
            rest.size,
            rest.ranges.len()
        );
        if self.mark.capability {
            tracing::warn!("\"{}\": security.capability lost, as accepted", rest.path);
        }
        Ok(rest)
    }

    /// D9: a user may set them at any moment; he writes the mark first, and then those of the file.
    fn set_times(&self, name: MarkName) -> Result<(), Errno> {
        let file = self.file.as_fd();
        let mut set = None;
        while let Some(mark) = name.get(Target::Open(file))?
            && let Some(times) = mark.times.or(mark.salvage)
            && set.replace(times) != Some(times)
        {
            meta::set_times_fd(file, times.0, times.1)?;
        }
        Ok(())
    }
}

impl Mirror {
    /// `finish` looks at dst itself: nothing is pulled any more into files that src cannot give whole, and what
    /// is here of them is on record. Whatever comes of it, the gate is shut: `open_gate` or `end_rescues` follows.
    pub(in crate::mirror) fn shut_rescues(&self) -> Result<Vec<Arc<Hydration>>> {
        // First: who changes one of them from now on waits, and who has begun is waited for.
        self.spoiled.gate.shut();
        let stages = self.hydrations.stages().into_iter();
        let mixed = stages.filter(|(_, stage)| *stage == Stage::Mixed);
        let mixed = mixed.filter_map(|(ino, _)| self.hydrations.by_number(ino));
        let is_salvaged = |h: &Arc<Hydration>| {
            let state = h.state.lock();
            let mixed = state.mixed.as_ref();
            mixed.is_some_and(|m| m.ground.salvage_of().is_some())
        };
        let salvaged: Vec<_> = mixed.filter(is_salvaged).collect();
        let until = Instant::now() + QUIET_MAX;
        let is_busy = |h: &Arc<Hydration>| {
            let mut state = h.state.lock();
            state.drop_idle_jobs(&(0..u64::MAX));
            !state.ranges.is_empty() || !state.is_quiet()
        };
        let begins = |stage| matches!(stage, Stage::Truncating | Stage::Mixing);
        let some_begin = || self.hydrations.stages().into_values().any(begins);
        while salvaged.iter().any(is_busy) || some_begin() {
            if Instant::now() >= until {
                let line = "a file that SRC cannot give whole is being read; try again, or umount and \
                            finish DST then";
                return Err(Error::Unusable(line.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        salvaged.iter().for_each(|h| self.keep_pulled(h));
        Ok(salvaged)
    }

    /// `finish` has ended with these, and has removed some. Not under a lock: waiters are told.
    pub(in crate::mirror) fn end_rescues(
        &self,
        salvaged: &[Arc<Hydration>],
        rests: &[Rest],
        removed: HashSet<Ino>,
    ) {
        for hydration in salvaged {
            if !removed.contains(&hydration.file.ino) {
                self.note_file_phase(&hydration.file, Phase::Unmarked);
            }
            self.source.unlearn(hydration.file.ino);
            self.end(hydration, Ok(()));
        }
        // Those that were not open, or were opened since.
        for rest in rests {
            if let Some(hydration) = self.hydrations.by_number(rest.ino) {
                self.end(&hydration, Ok(()));
            }
            if let Some(node) = self.nodes.find(rest.ino) {
                node.set_phase(Phase::Unmarked);
            }
        }
        self.end_gate(removed);
    }
}
