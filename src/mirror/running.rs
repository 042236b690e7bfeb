//! Populates: the directories that are being populated now, and who waits for them.
//!
//!   join()          somebody waits for all names; the first one runs it
//!   join_to_list()  somebody lists: where that takes long he need not wait for all
//!   begin()         nobody waits; it is done because it costs little
//!   take()          it is over, and everybody hears how
//!
//! Upholds I7: one populate per directory. Waiters are called without the lock.

use std::collections::HashMap;

use super::node::Ino;
use super::populate::Waiter;
use crate::locks::Mutex;

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
    /// Those who need no more than to know that it takes long.
    listers: Vec<Waiter>,
    takes_long: bool,
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

    /// As `join`, for somebody who lists: `Err` gives the waiter back, it takes long.
    pub(super) fn join_to_list(&self, ino: Ino, lister: Waiter) -> Result<bool, Waiter> {
        let mut running = self.running.lock();
        let joined = running.contains_key(&ino);
        let placing = running.entry(ino).or_default();
        if placing.takes_long {
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

    /// There is much to place, or nobody hurries: who only lists goes on. True: such have been told,
    /// and nobody waits for the rest.
    pub(super) fn takes_long(&self, ino: Ino) -> bool {
        let (listers, unwanted) = {
            let mut running = self.running.lock();
            let Some(placing) = running.get_mut(&ino) else {
                return false;
            };
            placing.takes_long = true;
            let unwanted = placing.waiters.is_empty();
            (std::mem::take(&mut placing.listers), unwanted)
        };
        let told = !listers.is_empty() && unwanted;
        listers.into_iter().for_each(|w| w(Ok(())));
        told
    }

    /// The directory turned out to be large. False: with this extent nobody wants it, and the populate
    /// is over.
    pub(super) fn goes_on(&self, ino: Ino, extent: Extent) -> bool {
        let mut running = self.running.lock();
        let unwanted = |p: &Placing| p.waiters.is_empty() && p.listers.is_empty() && !p.takes_long;
        if extent == Extent::Whole || !running.get(&ino).is_some_and(unwanted) {
            return true;
        }
        running.remove(&ino);
        false
    }

    pub(super) fn take(&self, ino: Ino) -> Vec<Waiter> {
        let placing = self.running.lock().remove(&ino).unwrap_or_default();
        placing.waiters.into_iter().chain(placing.listers).collect()
    }
}
