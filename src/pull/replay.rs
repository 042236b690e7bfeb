//! Replay: pulls what a trace says was accessed, in its order, before anybody asks for it again.
//!
//! A few threads go through it, because the way to a file may wait for src; files are pulled in the
//! demand lane with few in flight, as neighbours are. What is here already costs a look, what has gone
//! is skipped and counted. A pause of the background holds it; that the background is off does not.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Instant;

use super::{Found, find};
use crate::error::{Error, Result};
use crate::mirror::{FileRef, Mirror, Traced};
use crate::sys::name::RelPath;

/// Threads that find the way.
const THREADS: usize = 4;

/// A trace that is being replayed.
pub struct Replay {
    threads: Vec<JoinHandle<()>>,
}

struct Work {
    mirror: Arc<Mirror>,
    trace: Vec<Traced>,
    next: AtomicUsize,
    /// Files that were asked for; entries that are not there any more.
    asked: AtomicUsize,
    gone: AtomicUsize,
    /// Threads that are not done.
    left: AtomicUsize,
    begun: Instant,
}

impl Replay {
    /// Begins.
    pub fn start(mirror: &Arc<Mirror>, trace: Vec<Traced>) -> Result<Replay> {
        let work = Arc::new(Work {
            mirror: Arc::clone(mirror),
            trace,
            next: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            gone: AtomicUsize::new(0),
            left: AtomicUsize::new(THREADS),
            begun: Instant::now(),
        });
        let mut threads = Vec::new();
        for n in 0..THREADS {
            let work = Arc::clone(&work);
            let thread = std::thread::Builder::new().name(format!("replay-{n}"));
            let thread = thread.spawn(move || work.run());
            let failed = |e| Error::Unusable(format!("cannot start a thread: {e}"));
            threads.push(thread.map_err(failed)?);
        }
        Ok(Replay { threads })
    }

    /// Waits for its threads: they end by themselves when the mirror stops.
    pub fn join(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a replay thread panicked; what it left is still pending");
            }
        }
    }
}

impl Work {
    fn run(&self) {
        while let Some(access) = self.trace.get(self.next.fetch_add(1, Relaxed)) {
            if !self.mirror.may_replay() {
                break;
            }
            if let Err(e) = self.one(access) {
                tracing::debug!("replay: {e}");
                self.gone.fetch_add(1, Relaxed);
            }
        }
        if self.left.fetch_sub(1, Relaxed) == 1 {
            tracing::info!(
                "replay: {} accesses, {} files asked for, {} entries have gone, {:.1?}",
                self.trace.len(),
                self.asked.load(Relaxed),
                self.gone.load(Relaxed),
                self.begun.elapsed()
            );
        }
    }

    fn one(&self, access: &Traced) -> Result<()> {
        match access {
            Traced::Listed(path) => match find(&self.mirror, path)? {
                Some(Found::Dir(dir)) => self.mirror.populate_names(&dir),
                _ => Ok(()),
            },
            Traced::Opened(path) => {
                if let Some((file, bytes)) = self.file(path)?
                    && !self.mirror.is_large(bytes)
                {
                    self.asked.fetch_add(1, Relaxed);
                    self.mirror.pull_ahead(file);
                }
                Ok(())
            }
            Traced::Read(path, range) => self.range(path, range.clone()),
        }
    }

    fn range(&self, path: &RelPath, range: Range<u64>) -> Result<()> {
        match self.file(path)? {
            Some((file, _)) => self.mirror.pull_range_ahead(&file, range),
            None => Ok(()),
        }
    }

    /// A file that is still pending, and how large it is in dst (a guess).
    fn file(&self, path: &RelPath) -> Result<Option<(FileRef, u64)>> {
        Ok(match find(&self.mirror, path)? {
            Some(Found::File(file, bytes)) => Some((file, bytes)),
            _ => None,
        })
    }
}
