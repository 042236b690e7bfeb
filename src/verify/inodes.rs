//! Inodes: the bytes of an inode with several names are read by one of them, in the walk of a single tree.
//!
//!   (absent) -> Reading   claim()  the first name: it reads
//!   Reading  -> Reading   claim()  another name meanwhile: its work is parked, nobody waits
//!   Reading  -> Read      read()   the parked work is handed back, with the digest
//!   Reading  -> (absent)  read()   likewise, where there is no digest: they read for themselves
//!   Read     -> (absent)           all names were seen, or the inode has changed since

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::manifest::Digest;
use crate::sys::stat::{FileKey, Stat, Time};

/// The inodes with several names of which some were not seen yet; `W`: the work for a name.
pub(super) struct Inodes<W>(Mutex<HashMap<FileKey, Inode<W>>>);

struct Inode<W> {
    names_left: u32,
    state: State<W>,
}

enum State<W> {
    Reading(Vec<W>),
    /// Of the inode as it was at this ctime.
    Read(Digest, Time),
}

/// Who reads the bytes of a name.
pub(super) enum Claim<W> {
    /// This name, for itself.
    Alone(W),
    /// This name; [`Inodes::read`] is due then.
    First(W),
    /// Another name, now: the work was parked.
    Parked,
    /// Another name has.
    Known(W, Digest),
}

impl<W> Default for Inodes<W> {
    fn default() -> Inodes<W> {
        Inodes(Mutex::default())
    }
}

impl<W> Inodes<W> {
    pub(super) fn claim(&self, stat: &Stat, work: W) -> Claim<W> {
        if stat.nlink < 2 {
            return Claim::Alone(work);
        }
        let mut inodes = self.lock();
        let Some(inode) = inodes.get_mut(&stat.key) else {
            let inode = Inode {
                names_left: stat.nlink - 1,
                state: State::Reading(Vec::new()),
            };
            inodes.insert(stat.key, inode);
            return Claim::First(work);
        };
        inode.names_left = inode.names_left.saturating_sub(1);
        match &mut inode.state {
            State::Reading(parked) => {
                parked.push(work);
                Claim::Parked
            }
            State::Read(digest, ctime) if *ctime == stat.ctime => {
                let digest = *digest;
                if inode.names_left == 0 {
                    inodes.remove(&stat.key);
                }
                Claim::Known(work, digest)
            }
            State::Read(..) => {
                inodes.remove(&stat.key);
                Claim::Alone(work)
            }
        }
    }

    /// The first name was read; `None`: not, or the inode has changed meanwhile. Returns what was parked.
    pub(super) fn read(&self, stat: &Stat, digest: Option<Digest>) -> Vec<W> {
        let mut inodes = self.lock();
        let Some(inode) = inodes.remove(&stat.key) else {
            return Vec::new();
        };
        let (State::Reading(parked), names_left) = (inode.state, inode.names_left) else {
            return Vec::new();
        };
        if let (Some(digest), 1..) = (digest, names_left) {
            let state = State::Read(digest, stat.ctime);
            inodes.insert(stat.key, Inode { names_left, state });
        }
        parked
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FileKey, Inode<W>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
