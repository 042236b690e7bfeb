//! `Task`: a directory in work. It counts what is left of it, and takes its mark away with the last.
//!
//!   one_more()       before a step or anything below it is handed to somebody else
//!   child_done()     when that is over, in whatever order: one for each
//!   stays_pending()  something was left: the mark stays, here and above
//!
//! A count that is too small takes a mark away while something below is pending, which a restart would
//! take for the user's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crossbeam_channel::Sender;

use crate::mirror::{DirRef, DoneDir, Mirror};

/// A directory in work.
pub(super) struct Task {
    pub(super) dir: DirRef,
    parent: Option<Arc<Task>>,
    /// Its own steps and everything below it that is not done.
    left: AtomicUsize,
    /// False once something below stayed pending.
    clean: AtomicBool,
    /// `Mirror::epoch` when the pass began.
    epoch: u64,
    /// `Mirror::moment` of the last thing that was done, directories below left out.
    since: AtomicU64,
    /// Told when the root is done: whether its mark is gone.
    tell: Option<Sender<bool>>,
}

impl Task {
    /// The root, with its first step. `epoch`: from before the pass; `tell` hears whether its mark is gone.
    pub(super) fn of_root(dir: DirRef, epoch: u64, tell: Sender<bool>) -> Arc<Task> {
        Task::new(dir, None, epoch, Some(tell))
    }

    /// A directory in another, with its first step; one more that is left of that other.
    pub(super) fn below(parent: &Arc<Task>, dir: DirRef) -> Arc<Task> {
        parent.one_more();
        Task::new(dir, Some(Arc::clone(parent)), parent.epoch, None)
    }

    fn new(
        dir: DirRef,
        parent: Option<Arc<Task>>,
        epoch: u64,
        tell: Option<Sender<bool>>,
    ) -> Arc<Task> {
        Arc::new(Task {
            dir,
            parent,
            left: AtomicUsize::new(1),
            clean: AtomicBool::new(true),
            epoch,
            since: AtomicU64::new(0),
            tell,
        })
    }

    /// One more thing in it is not done.
    pub(super) fn one_more(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    /// Something in it is left pending.
    pub(super) fn stays_pending(&self) {
        self.clean.store(false, Ordering::Release);
    }

    /// One of the things in it is done, and no directory; `clean`: it is not pending any more.
    pub(super) fn child_done(self: &Arc<Self>, mirror: &Arc<Mirror>, clean: bool) {
        self.since.fetch_max(mirror.moment(), Ordering::AcqRel);
        self.one_less(mirror, clean);
    }

    /// One of the things below is done; `clean`: nothing of it is pending any more. The last one
    /// takes the directory's mark away and goes on with its parent.
    fn one_less(self: &Arc<Self>, mirror: &Arc<Mirror>, clean: bool) {
        let mut at = Arc::clone(self);
        let mut clean = clean;
        loop {
            if !clean {
                at.stays_pending();
            }
            if at.left.fetch_sub(1, Ordering::AcqRel) != 1 {
                return;
            }
            let gone = match at.clean.load(Ordering::Acquire) {
                false => Some(false),
                true => mirror.dir_done(at.as_done(mirror)),
            };
            // `None`: the commit thread goes on from here.
            let Some(gone) = gone else { return };
            match at.settled(gone) {
                Some(parent) => (at, clean) = (parent, gone),
                None => return,
            }
        }
    }

    fn as_done(self: &Arc<Self>, mirror: &Arc<Mirror>) -> DoneDir {
        let (task, mirror) = (Arc::clone(self), Arc::clone(mirror));
        DoneDir {
            ino: self.dir.ino,
            anchor: self.dir.anchor.clone(),
            epoch: self.epoch,
            since: self.since.load(Ordering::Acquire),
            then: Box::new(move |gone| {
                if let Some(parent) = task.settled(gone) {
                    parent.one_less(&mirror, gone);
                }
            }),
        }
    }

    /// The parent that hears of it; the root tells the pass.
    fn settled(&self, gone: bool) -> Option<Arc<Task>> {
        if let Some(tell) = &self.tell {
            // A pass that was stopped does not listen any more.
            let _ = tell.send(gone); // Nothing is lost: the marks say it too.
        }
        self.parent.clone()
    }
}
