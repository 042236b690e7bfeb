//! LinkGroups: which dst inode stands for a src inode with several names.
//!
//!   (absent) -> Making   claim()   the first name: its claimant makes the inode in dst
//!   Making   -> Making   claim()   another name meanwhile: its work is parked with the group
//!   Making   -> Made     made()    the parked names are handed back, to be linked
//!   Making   -> (absent) failed()  the parked names are handed back, to try for themselves
//!   Made     -> (absent)           all names of the src inode were seen
//!
//! So nobody waits for anybody, and memory is bounded by the groups that are open, not by the tree.
//! One lock, held for a few moves only; whether there may be a group for an inode number is known
//! without it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Stat};

/// The dst inode that stands for a src inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandIn {
    /// One of its names, below dst's root.
    pub path: RelPath,
    /// The inode.
    pub key: FileKey,
}

/// What to do with a name of a src inode.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// The first: make the inode, then call [`LinkGroups::made`] or [`LinkGroups::failed`].
    First,
    /// Link the name to this.
    Made(StandIn),
    /// Somebody is making it: the work was parked.
    Parked,
}

/// All groups of a tree; `W` is the work that waits for a stand-in.
pub struct LinkGroups<W> {
    maps: Mutex<Maps<W>>,
    /// A bit for each of the last bits of an inode number that had a group.
    met: Box<[AtomicU64]>,
}

/// Bits of `met`: 16 KiB.
const MET: u64 = 1 << 17;

struct Maps<W> {
    groups: HashMap<FileKey, Group<W>>,
    /// dst inodes with several names: the src inode that they stand for, and names not seen yet.
    owners: HashMap<FileKey, (FileKey, u32)>,
}

struct Group<W> {
    names_left: u32,
    state: State<W>,
}

enum State<W> {
    Making(Vec<W>),
    Made(StandIn),
}

impl<W> Default for LinkGroups<W> {
    fn default() -> Self {
        LinkGroups {
            maps: Mutex::new(Maps {
                groups: HashMap::new(),
                owners: HashMap::new(),
            }),
            met: (0..MET / 64).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl<W> LinkGroups<W> {
    /// A name of the src inode `key`, which has `nlink` names, was met. `work` is only called, and
    /// its result only kept, when the answer is [`Claim::Parked`].
    pub fn claim(&self, key: FileKey, nlink: u32, work: impl FnOnce() -> W) -> Claim {
        let mut maps = self.lock();
        if let Some(claim) = join(&mut maps, key, work) {
            return claim;
        }
        let names_left = nlink.saturating_sub(1);
        let state = State::Making(Vec::new());
        maps.groups.insert(key, Group { names_left, state });
        let bit = key.ino % MET;
        self.met[(bit / 64) as usize].fetch_or(1 << (bit % 64), Relaxed);
        Claim::First
    }

    /// As `claim`, for who cannot make the inode now; `None`: that would be for him to do.
    pub fn claim_known(&self, key: FileKey, work: impl FnOnce() -> W) -> Option<Claim> {
        join(&mut self.lock(), key, work)
    }

    /// False: no name of an inode with this number, on whatever file system, was claimed yet.
    pub fn may_have(&self, ino: u64) -> bool {
        let bit = ino % MET;
        self.met[(bit / 64) as usize].load(Relaxed) & 1 << (bit % 64) != 0
    }

    /// The inode is in dst, complete: returns the names that wait to be linked to it.
    pub fn made(&self, key: FileKey, stand_in: StandIn) -> Vec<W> {
        let mut maps = self.lock();
        let Some(group) = maps.groups.get_mut(&key) else {
            return Vec::new();
        };
        let before = std::mem::replace(&mut group.state, State::Made(stand_in));
        if group.names_left == 0 {
            maps.groups.remove(&key);
        }
        parked(before)
    }

    /// The inode could not be made: returns the names that waited; each may claim again.
    pub fn failed(&self, key: FileKey) -> Vec<W> {
        let group = self.lock().groups.remove(&key);
        group.map_or_else(Vec::new, |g| parked(g.state))
    }

    /// The stand-in takes no more names (EMLINK) or is gone: the next claim is a first one.
    pub fn forget(&self, key: FileKey) {
        let mut maps = self.lock();
        if let Some(group) = maps.groups.get(&key)
            && matches!(group.state, State::Made(_))
        {
            maps.groups.remove(&key);
        }
    }

    /// An existing dst inode was met under the name of the src inode `src`. False when it already
    /// stands for another src inode: then this name needs an inode of its own.
    pub fn may_stand_for(&self, dst: &Stat, src: FileKey) -> bool {
        if dst.nlink < 2 {
            return true;
        }
        let mut maps = self.lock();
        let (owner, names_left) = maps.owners.entry(dst.key).or_insert((src, dst.nlink));
        let mine = *owner == src;
        *names_left = names_left.saturating_sub(1);
        if *names_left == 0 {
            maps.owners.remove(&dst.key);
        }
        mine
    }

    fn lock(&self) -> MutexGuard<'_, Maps<W>> {
        // Whoever panicked under this lock has not left it half changed: each change is one move.
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One more name of a group that is there.
fn join<W>(maps: &mut Maps<W>, key: FileKey, work: impl FnOnce() -> W) -> Option<Claim> {
    let group = maps.groups.get_mut(&key)?;
    group.names_left = group.names_left.saturating_sub(1);
    match &mut group.state {
        State::Making(parked) => {
            parked.push(work());
            Some(Claim::Parked)
        }
        State::Made(stand_in) => {
            let stand_in = stand_in.clone();
            if group.names_left == 0 {
                maps.groups.remove(&key);
            }
            Some(Claim::Made(stand_in))
        }
    }
}

fn parked<W>(state: State<W>) -> Vec<W> {
    match state {
        State::Making(parked) => parked,
        State::Made(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(ino: u64) -> FileKey {
        FileKey { dev: (8, 1), ino }
    }

    fn stand_in(ino: u64) -> StandIn {
        StandIn {
            path: RelPath::root(),
            key: key(ino),
        }
    }

    #[test]
    fn the_first_name_makes_the_inode_and_all_others_become_links() {
        let groups = LinkGroups::default();
        assert!(!groups.may_have(1));
        assert_eq!(groups.claim_known(key(1), || 0), None);
        assert_eq!(groups.claim(key(1), 4, || 0), Claim::First);
        assert!(groups.may_have(1) && !groups.may_have(2));
        assert_eq!(groups.claim(key(1), 4, || 7), Claim::Parked);
        assert_eq!(groups.claim(key(2), 2, || 0), Claim::First);
        assert_eq!(groups.made(key(1), stand_in(50)), [7]);
        let made = Some(Claim::Made(stand_in(50)));
        assert_eq!(groups.claim_known(key(1), || 0), made);
        assert_eq!(groups.claim(key(1), 4, || 0), Claim::Made(stand_in(50)));
        assert_eq!(groups.failed(key(2)), [] as [i32; 0]);
        // All four names were seen: nothing is kept.
        assert!(groups.lock().groups.is_empty());
    }

    #[test]
    fn a_failed_maker_hands_the_waiting_names_back() {
        let groups = LinkGroups::default();
        assert_eq!(groups.claim(key(1), 3, || 0), Claim::First);
        assert_eq!(groups.claim(key(1), 3, || 1), Claim::Parked);
        assert_eq!(groups.failed(key(1)), [1]);
        assert_eq!(groups.claim(key(1), 3, || 1), Claim::First);
    }
}
