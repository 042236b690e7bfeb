//! Populates: the directories that are being populated now, and who waits for them.
//!
//!   join()          somebody waits for all names; the first one runs it
//!   join_to_list()  somebody lists: of a large directory he need not wait for all
//!   begin()         nobody waits; it is done because it costs little
//!   take()          it is over, and everybody hears how
//!
//! Upholds I7: one populate per directory. Waiters are called without the lock.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::node::Ino;
use super::populate::Waiter;

/// How much of a directory is to be populated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Whole,
    /// Nothing of a large one, unless somebody has come to wait for it.
    UnlessLarge,
}

/// One directory that is being populated.
#[derive(Default)]
struct Placing {
    waiters: Vec<Waiter>,
    /// Those who need no more than to know that it is large.
    listers: Vec<Waiter>,
    is_large: bool,
}

/// All directories that are being populated now.
#[derive(Default)]
pub struct Populates {
    running: Mutex<HashMap<Ino, Placing>>,
}

impl Populates {
    /// Somebody waits for a directory besides whoever populates it.
    pub(super) fn is_wanted(&self, ino: Ino) -> bool {
        let running = self.running.lock();
        let wanted = |p: &Placing| p.waiters.len() > 1 || !p.listers.is_empty();
        running.get(&ino).is_some_and(wanted)
    }

    /// Joins a running populate, or becomes the one that runs it: then false.
    pub(super) fn join(&self, ino: Ino, waiter: Waiter) -> bool {
        let mut running = self.running.lock();
        let joined = running.contains_key(&ino);
        running.entry(ino).or_default().waiters.push(waiter);
        joined
    }

    /// As `join`, for somebody who lists: `Err` gives the waiter back, the directory is large.
    pub(super) fn join_to_list(&self, ino: Ino, lister: Waiter) -> Result<bool, Waiter> {
        let mut running = self.running.lock();
        let joined = running.contains_key(&ino);
        let placing = running.entry(ino).or_default();
        if placing.is_large {
            return Err(lister);
        }
        placing.listers.push(lister);
        Ok(joined)
    }

    /// Becomes the one that runs a populate for nobody; false: it is running.
    pub(super) fn begin(&self, ino: Ino) -> bool {
        let mut running = self.running.lock();
        let free = !running.contains_key(&ino);
        running.entry(ino).or_default();
        free
    }

    /// The directory turned out to be large: who only lists goes on. False: with this extent nobody
    /// wants the rest of it, and the populate is over.
    pub(super) fn is_large(&self, ino: Ino, extent: Extent) -> bool {
        let (listers, goes_on) = {
            let mut running = self.running.lock();
            let Some(placing) = running.get_mut(&ino) else {
                return true;
            };
            placing.is_large = true;
            let listers = std::mem::take(&mut placing.listers);
            let goes_on =
                extent == Extent::Whole || !placing.waiters.is_empty() || !listers.is_empty();
            if !goes_on {
                running.remove(&ino);
            }
            (listers, goes_on)
        };
        listers.into_iter().for_each(|w| w(Ok(())));
        goes_on
    }

    pub(super) fn take(&self, ino: Ino) -> Vec<Waiter> {
        let placing = self.running.lock().remove(&ino).unwrap_or_default();
        placing.waiters.into_iter().chain(placing.listers).collect()
    }
}
