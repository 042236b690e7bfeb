//! Changed: src's file is another than the kernel was told of.
//!
//! The kernel asks for pages up to the size that it was told. An answer that ends before them is the end of
//! the file for it only if nothing was said of the inode's attributes since it asked; what is missing is
//! zeros otherwise (fs/fuse/file.c: fuse_short_read, fuse_read_update_size). So what it asked for before it
//! heard of the change must not end early.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Mirror;
use super::hydrate::{Hydration, Stage, State};
use super::node::{Ino, Node};
use super::ranged::ReadDone;
use super::source::SrcInfo;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::sys::stat::{self, Stat};
use crate::sys::{fault, fd};

/// A request has waited in the kernel for no longer, when it comes.
const QUEUED_MAX: Duration = Duration::from_secs(10);
/// Microseconds since this program began take the other bits.
const RUNNING_BITS: u32 = 8;

/// When the kernel was last told that src's file was changed: the time, and how many times it is being told.
#[derive(Debug, Default)]
pub struct Changes(AtomicU64);

impl Changes {
    fn begin(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn end(&self, now: Moment) {
        let told = |was: u64| (now.0 << RUNNING_BITS) | (running(was) - 1);
        self.0.update(Ordering::AcqRel, Ordering::Acquire, told);
    }

    /// The kernel may have asked, through a file that was opened at that time, before it was told: an answer
    /// that ends pages before what it wants is no end of the file.
    pub fn may_precede(&self, opened: Moment, asked: Moment) -> bool {
        let value = self.0.load(Ordering::Acquire);
        let told = Moment(value >> RUNNING_BITS);
        let since = asked.0.saturating_sub(told.0);
        running(value) > 0 || opened < told && u128::from(since) <= QUEUED_MAX.as_micros()
    }
}

fn running(value: u64) -> u64 {
    value & ((1 << RUNNING_BITS) - 1)
}

/// A time of this program's: microseconds since its first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// Before all others: of the program before us.
    pub const FIRST: Moment = Moment(0);

    /// Now.
    pub fn now() -> Moment {
        static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
        Moment(1 + BEGIN.elapsed().as_micros() as u64)
    }
}

impl Mirror {
    /// Bytes that were pulled before. If fewer are here, a copy of a shorter file has begun meanwhile; and if src
    /// was not looked at since they came, they may be what the kernel has in the place of what a server lacks.
    pub(super) fn read_pulled(
        self: &Arc<Self>,
        hydration: &Arc<Hydration>,
        range: Range<u64>,
        then: ReadDone,
    ) {
        let bytes = match self.read_here(&hydration.file, &hydration.path, range.clone()) {
            Ok(bytes) => bytes,
            Err(e) => return then(Err(e)),
        };
        let path = hydration.path.to_path();
        // I8: who waits is told without the lock.
        let (comes, unsure) = {
            let state = hydration.state.lock();
            let comes = matches!(state.stage, Stage::Queued | Stage::Copying);
            let unsure = state.is_served() && !state.sure.contains(&range);
            (comes && state.mixed.is_none(), unsure)
        };
        if comes && (bytes.len() as u64) < range.end - range.start {
            return then(Err(Error::SrcChanged { path }));
        }
        if !(comes && unsure && may_be_cut(range.start, &bytes)) {
            return then(Ok(bytes));
        }
        let then = self.waiting(path, then);
        let (mirror, hydration) = (Arc::clone(self), Arc::clone(hydration));
        let task = move || {
            then(
                mirror
                    .expect_unchanged(&hydration, range.end)
                    .map(|()| bytes),
            )
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// Asks src whether its file is what it was last known to be, and still so long.
    fn expect_unchanged(&self, hydration: &Hydration, end: u64) -> Result<()> {
        let path = &hydration.path;
        let (dir, name) = self.open_origin(hydration)?;
        let file = fd::open_src(dir.fd.as_fd(), &name).on("open", Side::Src, path)?;
        let now = stat::stat_fd_fresh(file.as_fd()).on("statx", Side::Src, path)?;
        let known = self.source.recall(hydration.file.ino);
        let same = known.is_some_and(|k| k.is_still(&now));
        match same && end <= now.size {
            true => Ok(()),
            false => Err(Error::SrcChanged {
                path: path.to_path(),
            }),
        }
    }

    /// What has landed of a file that is about to be mixed counts if src is asked once more and is as it was known:
    /// where a server answers, some of it may be the kernel's zeros. Nothing looks at it when it is read, and the
    /// rest of a user's block would be of it for ever. May wait for src.
    pub(super) fn look_at_landed(&self, hydration: &Hydration) {
        let landed = hydration.state.lock().unsure();
        let served = || self.open_origin(hydration).map(|(dir, _)| dir.may_hang);
        if landed.is_empty() || matches!(served(), Ok(false)) {
            return;
        }
        let same = self.expect_unchanged(hydration, 0).is_ok();
        let mut state = hydration.state.lock();
        for range in landed {
            match same {
                true => state.sure.insert(range),
                false => state.present.remove(&range),
            }
        }
    }

    /// Bytes that were read from src's open file, of so many that were asked for, are all that there are by what
    /// the kernel was told; those that may be the kernel's own zeros have src asked once more.
    pub(super) fn expect_as_told(
        &self,
        node: &Node,
        (src, offset): (BorrowedFd<'_>, u64),
        (bytes, len): (&[u8], u32),
    ) -> Result<()> {
        let Some(told) = self.source.recall(node.ino) else {
            return Ok(());
        };
        let path = || node.display_name();
        let end = told.size.min(offset.saturating_add(len.into()));
        let is_all = offset.saturating_add(bytes.len() as u64) >= end;
        let origin = node.origin().map(|o| o.dir);
        let served = || origin.is_none_or(|dir| !self.source.is_at_hand(&dir));
        if is_all && !(may_be_cut(offset, bytes) && served()) {
            return Ok(());
        }
        let now = stat::stat_fd_fresh(src).on("statx", Side::Src, path())?;
        if is_all && told.is_still(&now) {
            return Ok(());
        }
        self.src_was_changed(node.ino, || {
            self.source.learn(node.ino, SrcInfo::from(&now))
        });
        Err(Error::SrcChanged { path: path() })
    }

    /// Remembers what src says of a file; nobody knows what the kernel was told of it.
    pub(super) fn learn_anew(&self, ino: Ino, info: SrcInfo) {
        while_in_doubt(self.nodes.find(ino).as_deref(), || {
            self.source.learn(ino, info)
        });
    }

    /// I6: all that was written while a whole file was copied is of the file that is there. ESTALE: it may not
    /// be, and what is here counts for nothing. A file that was replaced stays as it was for whoever has it
    /// open, and a server that goes by paths tells of it what the new one is: it has said something else before.
    pub(super) fn is_of_one_src(&self, hydration: &Hydration, whole: &Stat) -> Result<()> {
        let ino = hydration.file.ino;
        let known = self.source.recall(ino);
        let changed = known.is_some_and(|k| !k.is_still(whole));
        let mut state = hydration.state.lock();
        let doubtful = state.is_served() && changed;
        if state.is_of_one_src(whole) && !doubtful || fault::breaks("I6") {
            return Ok(());
        }
        state.forget_pulled();
        drop(state);
        let turn = || self.source.learn(ino, SrcInfo::from(whole));
        match changed {
            true => self.src_was_changed(ino, turn),
            false => turn(),
        }
        Err(Errno::STALE).on("read", Side::Src, &hydration.path)
    }

    /// src's file is not the one that the kernel was told of: `turn` is what has answers be of the new one.
    pub(super) fn src_was_changed(&self, ino: Ino, turn: impl FnOnce()) {
        let node = self.nodes.find(ino);
        node.iter().for_each(|n| n.note_old_pages());
        while_in_doubt(node.as_deref(), || {
            turn();
            self.invalidate(ino);
        });
    }
}

fn while_in_doubt(node: Option<&Node>, turn: impl FnOnce()) {
    node.iter().for_each(|n| n.changes().begin());
    turn();
    node.iter().for_each(|n| n.changes().end(Moment::now()));
}

impl State {
    /// A server or a daemon answers for src.
    pub(super) fn is_served(&self) -> bool {
        let dir = self.src.as_ref().map(|(dir, _)| dir);
        dir.is_some_and(|dir| dir.may_hang)
    }

    /// What has landed, and src was not looked at since.
    fn unsure(&self) -> Vec<Range<u64>> {
        let mut unsure = Vec::new();
        for mut range in self.present.iter() {
            while let Some(gap) = self.sure.first_gap(&range) {
                range.start = gap.end;
                unsure.push(gap);
            }
        }
        unsure
    }

    /// What a server's file has brought counts no more, unless src was looked at since.
    pub(super) fn keep_sure(&mut self) {
        if self.is_served() {
            let unsure = self.unsure();
            unsure.iter().for_each(|range| self.present.remove(range));
        }
    }

    /// A range job has ended, and this is what it saw of src after its copy. Beside the whole-file job it may
    /// have written over its bytes.
    pub(super) fn looked_again(&mut self, id: u64, src: Option<Stat>) {
        let Some(job) = self.ranges.iter().find(|r| r.id == id && r.begun) else {
            return;
        };
        if let Some(src) = src.filter(|_| !job.void) {
            let (start, end) = (job.range.start, job.range.end.min(src.size));
            self.sure.insert(start..end);
        }
        if self.stage == Stage::Copying && !self.beside.contains(&src) {
            self.beside.push(src);
        }
    }

    /// False where something that was written while the whole file was copied is of another src.
    fn is_of_one_src(&mut self, whole: &Stat) -> bool {
        let same = |src: &Stat| src.key == whole.key && !whole.changed_since(src);
        let beside = std::mem::take(&mut self.beside);
        beside.iter().all(|src| src.as_ref().is_some_and(same))
    }
}

/// A page of these bytes ends in a zero: it may be what the kernel puts behind the end of a file.
pub(super) fn may_be_cut(offset: u64, bytes: &[u8]) -> bool {
    const PAGE: u64 = 4096;
    let last = (PAGE - 1 - offset % PAGE) as usize;
    let mut ends = bytes.iter().skip(last).step_by(PAGE as usize);
    bytes.last() == Some(&0) || ends.any(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_before_the_kernel_was_told_is_in_doubt_and_nothing_else() {
        let changes = Changes::default();
        let (opened, told) = (Moment(5), Moment(1000));
        assert!(!changes.may_precede(opened, Moment(6)));
        changes.begin();
        assert!(changes.may_precede(Moment(2000), Moment(2001)));
        changes.begin();
        changes.end(Moment(900));
        assert!(changes.may_precede(Moment(2000), Moment(2001)));
        changes.end(told);
        assert!(changes.may_precede(opened, Moment(6)));
        assert!(changes.may_precede(opened, Moment(1001)));
        assert!(changes.may_precede(Moment::FIRST, Moment(1001)));
        assert!(!changes.may_precede(opened, Moment(1001 + 10_000_000)));
        // Opened since: what it asks for was asked since.
        assert!(!changes.may_precede(told, Moment(1001)));
    }

    #[test]
    fn zeros_at_the_end_of_a_page_may_be_the_kernels() {
        let mut bytes = vec![1; 10_000];
        bytes[5000] = 0;
        assert!(!may_be_cut(4096, &bytes));
        assert!(!may_be_cut(0, &[]));
        for (offset, zero) in [(0, 4095), (4096, 8191), (100, 3995), (8191, 0), (0, 9999)] {
            let mut bytes = vec![1; 10_000];
            assert!(!may_be_cut(offset, &bytes));
            bytes[zero] = 0;
            assert!(may_be_cut(offset, &bytes), "{offset} {zero}");
        }
    }
}
