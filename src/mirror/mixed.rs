//! Mixed files: large pending files that users write into before all of src's bytes are here, and files
//! of any size that src cannot give whole (salvage.rs).
//!
//!   Queued  -> Mixing  change()    the first change: a map is made, then the mark says so (mix.rs)
//!   Copying -> Queued  leave       the whole-file job ends where it is; then as above
//!   Mixing  -> Mixed   install()   from now on only range jobs pull it, around what is the users'
//!   Mixed   -> Settling -> (gone)  complete(): see fill.rs
//!
//! A change takes a turn (turn.rs). Upholds I6 and M1 to M6. Lock order: a hydration's state,
//! then the map, the times.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Mirror;
use super::bytemap::{self, BLOCK, ByteMap};
use super::fill::Fill;
use super::hydrate::{FileRef, Hydration, Need, Stage};
use super::node::Node;
use super::populate::Waiter;
use super::salvage::pulled::Pulled;
use super::source::SrcInfo;
use super::turn::{Span, overlap};
use crate::engine::job::Priority;
use crate::error::{Context, Result, Side};
use crate::mark::Mark;
use crate::sys::stat::{self, Time};
use crate::sys::xattr::Target;
use crate::sys::{fault, fd, host};

/// A mark is not written more often for a new time than this.
const STAMP: Duration = Duration::from_secs(1);

/// What a mixed file rests on.
pub(super) struct Ground {
    pub(super) file: Arc<OwnedFd>,
    pub(super) map: ByteMap,
    /// src's bytes count before this offset; behind it dst's do.
    pub(super) src_end: AtomicU64,
    /// The mark that says so is durable.
    mark_is_durable: AtomicBool,
    /// So is its mark (mix.rs). Locked before the mark is.
    pub(super) young: Mutex<bool>,
    /// Syncs that have failed.
    pub(super) losses: AtomicU64,
    /// Whoever writes or removes the record of what is here (pulled.rs).
    pub(super) record: Mutex<()>,
    /// No user has changed it: it is src's, and what src cannot give is missing (rescue.rs).
    salvaged: AtomicBool,
    /// Then: size and time of the file in src.
    of: Option<(u64, Time)>,
    /// Then: one of those that are open.
    pub(super) open: Option<Arc<()>>,
    times: Mutex<Times>,
}

/// The file's times: dst's own are disturbed by what is pulled.
struct Times {
    atime: Time,
    mtime: Time,
    stored: Instant,
    stale: bool,
}

/// A mixed file's part of a hydration's state.
pub(super) struct Mixed {
    pub(super) ground: Arc<Ground>,
    /// Changes under way, in whole blocks.
    pub(super) busy: Vec<(u64, Range<u64>)>,
    pub(super) next_turn: u64,
    /// Who waits for a turn, or for the end of somebody's.
    pub(super) waiting: Vec<Waiter>,
    pub(super) fill: Fill,
    /// M6: src's size and time when the first bytes were pulled: others are of another file.
    pub(super) src: Option<(u64, Time)>,
    /// No job may have written over what counts as here: only then is there a record (M7).
    pub(super) apart: bool,
    /// What was pulled has counted for nothing so often; and whether a record of it may still be there.
    pub(super) epoch: u64,
    pub(super) stale: bool,
    /// More is here than the record says, and when that was written.
    pub(super) unsaved: bool,
    pub(super) saved: Instant,
    /// It is on its way to be pending again.
    pub(super) left: bool,
}

/// What is here when a file becomes mixed.
#[derive(Default)]
pub(super) struct Start {
    /// What src's file was when the bytes that are here were pulled.
    pub(super) info: Option<SrcInfo>,
    /// What an earlier daemon has recorded.
    pub(super) pulled: Option<Pulled>,
    /// What was pulled counts for nothing.
    pub(super) anew: bool,
}

/// What a change is made on: a mixed file, or (`None`) a plain one that is all here.
pub(super) type On = Option<Arc<Ground>>;
pub(super) type Work = Box<dyn FnOnce(&Arc<Mirror>, Result<On>) + Send>;

impl Ground {
    pub(super) fn src_end(&self) -> u64 {
        self.src_end.load(Ordering::Acquire)
    }

    pub(super) fn times(&self) -> (Time, Time) {
        let times = self.times.lock();
        (times.atime, times.mtime)
    }

    /// No user has changed it: size and time of the file in src.
    pub(super) fn salvage_of(&self) -> Option<(u64, Time)> {
        self.of.filter(|_| self.salvaged.load(Ordering::Acquire))
    }

    /// Its mark says that users have changed it, and is not durable.
    pub(super) fn is_changed(&self) {
        self.mark_is_durable.store(false, Ordering::Release);
        self.salvaged.store(false, Ordering::Release);
    }

    pub(super) fn set_times(&self, (atime, mtime): (Time, Time)) {
        let mut times = self.times.lock();
        (times.atime, times.mtime) = (atime, mtime);
        (times.stored, times.stale) = (Instant::now(), false);
    }
}

/// True where dst's file system can hold mixed files: it tells holes from data block by block, and
/// never takes written zeros for a hole.
pub(super) fn is_possible(fs: &host::FsStat) -> bool {
    let known = [
        host::EXT4_MAGIC,
        host::XFS_MAGIC,
        host::BTRFS_MAGIC,
        host::TMPFS_MAGIC,
    ];
    known.contains(&fs.magic) && fs.frsize == BLOCK
}

impl Mirror {
    /// Calls `work` when the bytes may be changed, and nothing else touches them until it returns.
    /// The caller has waited for the directory (`when_parent_published`).
    pub(super) fn change(self: &Arc<Self>, node: &Arc<Node>, span: Span, work: Work) {
        // In this order: a hydration is in the table before the node stops being pending.
        let pending = node.is_pending_file();
        if !pending && self.hydrations.find(node.ino, &node.anchor).is_none() {
            return work(self, Ok(None));
        }
        let (hydration, _) = self.hydrations.join(&FileRef::of(node));
        let mut state = hydration.state.lock();
        if self.spoiled.gate.stops(node.ino) {
            drop(state);
            let told = self.waiting_for(node, self.again(node, span, work));
            return self.spoiled.gate.after(node, told);
        }
        match state.stage {
            Stage::Over => {
                drop(state);
                self.change(node, span, work);
            }
            Stage::Mixing | Stage::Leaving => {
                let again = self.again(node, span, work);
                state.changers.push(again);
            }
            Stage::Mixed => self.take_turn(node, &hydration, state, span, work),
            Stage::Queued | Stage::Copying if state.mixes && self.mixes => {
                if state.stage == Stage::Queued && !state.looked {
                    drop(state);
                    return match self.look(&hydration) {
                        Ok(()) => self.change(node, span, work),
                        Err(e) => work(self, Err(e)),
                    };
                }
                let begin = state.stage == Stage::Queued;
                drop(state);
                let Some(info) = self.source.recall(node.ino) else {
                    let then = self.again(node, span, work);
                    return self.with_info(node, move |info| then(info.map(|_| ())));
                };
                if info.size <= self.large_file_bytes {
                    return self.change_plain(node, span, work);
                }
                match begin {
                    true => self.begin(node, &hydration, info, span, work),
                    false => self.leave_whole(node, &hydration, span, work),
                }
            }
            _ => {
                drop(state);
                self.change_plain(node, span, work);
            }
        }
    }

    /// A change of a file that is hydrated first; one that src cannot give whole is mixed by then.
    fn change_plain(self: &Arc<Self>, node: &Arc<Node>, span: Span, work: Work) {
        let (mirror, held) = (Arc::clone(self), Arc::clone(node));
        self.when_hydrated(node, Need::Write, move |ready| match ready {
            Err(e) if e.is_bad_read() && matches!(mirror.mixed(&held), Ok(Some(_))) => {
                mirror.change(&held, span, work);
            }
            ready => work(&mirror, ready.map(|()| None)),
        });
    }

    /// Tries once more, on any thread. Not while another program takes over.
    pub(super) fn again(self: &Arc<Self>, node: &Arc<Node>, span: Span, work: Work) -> Waiter {
        let node = Arc::clone(node);
        Box::new(self.acting(move |mirror, ready: Result<()>| match ready {
            Ok(()) => mirror.change(&node, span, work),
            Err(e) => work(mirror, Err(e)),
        }))
    }

    /// The whole-file job that runs is told to end.
    fn leave_whole(
        self: &Arc<Self>,
        node: &Arc<Node>,
        hydration: &Arc<Hydration>,
        span: Span,
        work: Work,
    ) {
        let again = self.again(node, span, work);
        let told = self.waiting(hydration.path.to_path(), again);
        let mut state = hydration.state.lock();
        if state.stage != Stage::Copying {
            drop(state);
            return told(Ok(()));
        }
        state.leaves = true;
        state.changers.push(told);
        drop(state);
        self.engine.hurry();
    }

    /// The whole-file job has ended because a user changes the file.
    pub(super) fn whole_left(self: &Arc<Self>, hydration: &Arc<Hydration>) {
        let changers = {
            let mut state = hydration.state.lock();
            (state.stage, state.leaves) = (Stage::Queued, false);
            (state.asked, state.whole) = (None, None);
            std::mem::take(&mut state.changers)
        };
        changers.into_iter().for_each(|w| w(Ok(())));
        // Unless they wait no longer: then it is whole again what the others wait for.
        self.background_stopped(hydration, false);
    }

    fn begin(
        self: &Arc<Self>,
        node: &Arc<Node>,
        hydration: &Arc<Hydration>,
        info: SrcInfo,
        span: Span,
        work: Work,
    ) {
        let again = self.again(node, span, work);
        let mut state = hydration.state.lock();
        match state.stage {
            Stage::Queued => {
                state.stage = Stage::Mixing;
                state.changers.push(again);
                drop(state);
            }
            Stage::Mixing => return state.changers.push(again),
            // A job has begun.
            _ => {
                drop(state);
                return again(Ok(()));
            }
        }
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            mirror.look_at_landed(&hydration);
            let begun = mirror.mix(&hydration, info);
            mirror.mixing_ended(&hydration, info, begun);
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    fn mixing_ended(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        info: SrcInfo,
        begun: Result<Option<Ground>>,
    ) {
        match begun {
            Ok(Some(ground)) => {
                hydration.state.lock().keep_sure();
                let info = Some(info);
                let start = Start {
                    info,
                    ..Start::default()
                };
                self.install(hydration, ground, start);
            }
            other => {
                if let Err(e) = &other {
                    tracing::warn!("{e}; the file is pulled whole before it is changed");
                }
                let changers = {
                    let mut state = hydration.state.lock();
                    (state.stage, state.asked, state.mixes) = (Stage::Queued, None, false);
                    std::mem::take(&mut state.changers)
                };
                if let Ok(None) = other {
                    self.already_done(hydration);
                }
                // `hydrate` asks for the whole file again, for all who wait.
                changers.into_iter().for_each(|w| w(Ok(())));
            }
        }
    }

    /// The file is mixed from now on; the rest follows.
    pub(super) fn install(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        mut ground: Ground,
        start: Start,
    ) {
        ground.open = ground.salvage_of().map(|_| self.spoiled.count());
        let (changers, asked) = {
            let mut state = hydration.state.lock();
            state.looked = true;
            // Two have looked; or a whole-file job had begun, which has looked too.
            if !matches!(state.stage, Stage::Queued | Stage::Mixing) {
                return;
            }
            state.stage = Stage::Mixed;
            state.mix(ground, start);
            let asked = state.is_waited_for() || !state.settled.is_empty();
            (std::mem::take(&mut state.changers), asked)
        };
        changers.into_iter().for_each(|w| w(Ok(())));
        match asked {
            true => self.fill(hydration),
            false => self.fill_rest(hydration, false),
        }
        self.mature_soon(hydration);
    }

    /// True while it is mixed, as far as this daemon has seen.
    pub(super) fn is_mixed(&self, node: &Node) -> bool {
        let found = self.hydrations.find(node.ino, &node.anchor);
        found.is_some_and(|h| h.state.lock().stage == Stage::Mixed)
    }

    /// A mixed file, and what it is mixed on; an earlier daemon's is loaded.
    pub(super) fn mixed(
        self: &Arc<Self>,
        node: &Node,
    ) -> Result<Option<(Arc<Hydration>, Arc<Ground>)>> {
        if !self.mixes || !node.is_pending_file() {
            return Ok(None);
        }
        let found = self.hydrations.find(node.ino, &node.anchor);
        let hydration = match found {
            Some(found) => found,
            None => {
                let shown = || node.display_name();
                let opened = self.nodes.open(node, OFlags::PATH);
                let opened = opened.on("open", Side::Dst, shown())?;
                let mark = self.mark.get(Target::Fd(opened.as_fd()));
                let mark = mark.on("getxattr", Side::Dst, shown())?;
                if mark.is_none_or(|m| m.mixed.is_none()) {
                    return Ok(None);
                }
                self.hydrations.join(&FileRef::of(node)).0
            }
        };
        let looked = {
            let state = hydration.state.lock();
            state.looked || state.stage != Stage::Queued
        };
        if !looked {
            self.look(&hydration)?;
        }
        let (ground, over) = {
            let state = hydration.state.lock();
            let ground = state.mixed.as_ref().map(|m| Arc::clone(&m.ground));
            (ground, state.stage == Stage::Over)
        };
        match ground {
            // It has become whole, or was closed (`let_go`): look again.
            None if over => self.mixed(node),
            ground => Ok(ground.map(|ground| (hydration, ground))),
        }
    }

    /// The times of a mixed file, as they are now.
    pub(super) fn mixed_times(&self, node: &Node) -> Option<(Time, Time)> {
        let hydration = self.hydrations.find(node.ino, &node.anchor)?;
        let state = hydration.state.lock();
        state.mixed.as_ref().map(|m| m.ground.times())
    }

    /// They were written into its mark.
    pub(super) fn set_mixed_times(&self, node: &Node, times: (Time, Time)) {
        let Some(hydration) = self.hydrations.find(node.ino, &node.anchor) else {
            return;
        };
        let state = hydration.state.lock();
        if let Some(mixed) = &state.mixed {
            mixed.ground.set_times(times);
        }
    }

    /// Writes the mark of a mixed file anew: where src ends, and the times.
    pub(super) fn store_mark(&self, ground: &Ground, ino: u64) -> Result<(), Errno> {
        let _guard = self.lock_mark(ino);
        let file = ground.file.as_fd();
        let times = {
            let mut times = ground.times.lock();
            (times.stored, times.stale) = (Instant::now(), false);
            (times.atime, times.mtime)
        };
        let stored = self
            .mark
            .get(Target::Open(file))
            .and_then(|mark| match mark {
                Some(mark) if mark.mixed.is_some() => {
                    let (mixed, times) = (Some(ground.src_end()), Some(times));
                    let mark = Mark {
                        mixed,
                        times,
                        ..mark
                    };
                    self.replace_mark(file, &mark)
                }
                _ => Ok(()),
            });
        ground.times.lock().stale |= stored.is_err();
        stored
    }

    /// The file was changed now. Its mark hears of it once a second at most.
    pub(super) fn touch(&self, ground: &Ground, ino: u64) {
        let due = {
            let mut times = ground.times.lock();
            times.mtime = super::attr::now();
            times.stale = true;
            times.stored.elapsed() >= STAMP
        };
        if due && let Err(errno) = self.store_mark(ground, ino) {
            tracing::debug!("setxattr dst: {errno}"); // A time: it is tried again in a second.
        }
    }

    /// M3: fsync of a mixed file through a user's open file (each is told of a lost page once). Its
    /// bytes, then the map; the mark with the bytes.
    pub(super) fn sync_mixed(
        &self,
        ground: &Ground,
        ino: u64,
        file: BorrowedFd<'_>,
        data_only: bool,
    ) -> Result<(), Errno> {
        self.mature(ground, ino)?;
        if ground.times.lock().stale {
            self.store_mark(ground, ino)?;
        }
        let written = ground.map.snapshot();
        let data_only = data_only && ground.mark_is_durable.load(Ordering::Acquire);
        let sync = || self.sync_bytes(ground, ino, file, data_only);
        fault::unless_broken("M3", sync)?;
        ground.mark_is_durable.store(true, Ordering::Release);
        fault::point("mixed-synced");
        ground.map.promote(&written)?;
        fault::point("mixed-promoted");
        ground.map.sync()
    }

    /// fsync or fdatasync of dst's file. A failure counts for all that rests on it.
    pub(super) fn sync_bytes(
        &self,
        ground: &Ground,
        ino: u64,
        file: BorrowedFd<'_>,
        data_only: bool,
    ) -> Result<(), Errno> {
        let synced = match data_only {
            true => fd::fdatasync(file),
            false => fd::fsync(file),
        };
        if synced.is_err() {
            ground.losses.fetch_add(1, Ordering::AcqRel);
            self.doubt(ino, ground);
        }
        synced
    }

    /// A page of the file did not reach the device, and the kernel will not say it twice: what was
    /// pulled counts for nothing.
    fn doubt(&self, ino: u64, ground: &Ground) {
        let Some(hydration) = self.hydrations.by_number(ino) else {
            return;
        };
        let mut state = hydration.state.lock();
        let same = |m: &Mixed| std::ptr::eq(Arc::as_ptr(&m.ground), ground);
        if state.mixed.as_deref().is_some_and(same) {
            state.forget_pulled();
        }
    }

    /// The kernel returns references to an inode. When it has let go of a deleted mixed file nothing
    /// of that is needed any more.
    pub fn forget(&self, ino: u64, times: u64) {
        if !self.nodes.forget(ino, times) {
            return;
        }
        let Some(hydration) = self.hydrations.by_number(ino) else {
            return;
        };
        let deleted = {
            let state = hydration.state.lock();
            let Some(mixed) = &state.mixed else { return };
            let there = stat::stat_fd(mixed.ground.file.as_fd());
            state.stage == Stage::Mixed && there.is_ok_and(|s| s.nlink == 0)
        };
        if deleted {
            self.remove_map(&hydration);
            self.end(&hydration, Err(crate::error::Error::Stopped));
        }
    }

    /// While the file is open: its number is not another's yet.
    pub(super) fn remove_map(&self, hydration: &Hydration) {
        let maps = self.control.maps.as_fd();
        if let Err(errno) = bytemap::remove(maps, hydration.file.ino) {
            tracing::warn!("unlink dst \".mirrorfs/maps\": {errno}"); // `finish` does it.
        }
    }
}

impl Ground {
    /// As the mark says it; a mixed one.
    pub(super) fn new(file: Arc<OwnedFd>, map: ByteMap, mark: &Mark) -> Ground {
        let (atime, mtime) = mark.times.or(mark.salvage).unwrap_or_default();
        Ground {
            file,
            map,
            src_end: AtomicU64::new(mark.mixed.unwrap_or(0)),
            young: Mutex::new(mark.young),
            mark_is_durable: AtomicBool::new(false),
            losses: AtomicU64::new(0),
            record: Mutex::new(()),
            salvaged: AtomicBool::new(mark.salvage.is_some()),
            of: mark.mixed.zip(mark.salvage.map(|(_, mtime)| mtime)),
            open: None,
            times: Mutex::new(Times {
                atime,
                mtime,
                stored: Instant::now(),
                stale: false,
            }),
        }
    }
}

impl Mixed {
    pub(super) fn new(ground: Ground, src: Option<(u64, Time)>) -> Mixed {
        Mixed {
            ground: Arc::new(ground),
            busy: Vec::new(),
            next_turn: 0,
            waiting: Vec::new(),
            fill: Fill::default(),
            src,
            apart: false,
            epoch: 0,
            stale: false,
            unsaved: false,
            saved: Instant::now(),
            left: false,
        }
    }

    /// A change that runs there.
    pub(super) fn busy_at(&self, range: &Range<u64>) -> bool {
        self.busy.iter().any(|(_, b)| overlap(b, range))
    }
}
