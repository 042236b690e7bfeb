//! Groups: whether names that are one inode in src are one inode in dst, and only those; and that the
//! content of two inodes that stand for each other is compared by one of their names.
//!
//! Two partitions of the same names are equal when each src inode always meets the same dst inode
//! and the reverse. Only inodes with several names are kept, and only until all of them were seen.
//!
//!   Unread    -> Comparing  claim()     the first name: it compares
//!   Comparing -> Comparing  claim()     another name meanwhile: it is parked, nobody waits
//!   Comparing -> Compared   compared()  the parked names are handed back, to be told what was found

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Kind;
use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Stat};

/// Why the content of two files is not the same, or not known to be.
pub(super) type Finding = (Kind, String);

/// Which src inode has met which dst inode.
#[derive(Default)]
pub(super) struct Groups(Mutex<Maps>);

#[derive(Default)]
struct Maps {
    by_src: HashMap<FileKey, Met>,
    by_dst: HashMap<FileKey, Met>,
    /// Names of src inodes whose content is being compared, that wait to be told.
    parked: HashMap<FileKey, Vec<RelPath>>,
    /// What was found in those that differ.
    found: HashMap<FileKey, Finding>,
}

struct Met {
    other: FileKey,
    names_left: u32,
    content: Content,
}

/// What is known of the content of an inode and the one that it met first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Unread,
    Comparing,
    Equal,
    Differs,
}

/// Who compares the content of a name.
pub(super) enum Claim {
    /// This name, for itself.
    Alone,
    /// This name; [`Groups::compared`] is due then.
    First,
    /// Another name, now: this one was parked.
    Parked,
    /// Another name has; this was found.
    Known(Option<Finding>),
}

impl Groups {
    /// Records that the two inodes have the same name. False when that breaks the partition.
    pub(super) fn meet(&self, src: Inode, dst: Inode) -> bool {
        if src.nlink < 2 && dst.nlink < 2 {
            return true;
        }
        let mut maps = self.lock();
        let forth = meet_one(&mut maps.by_src, src, dst.key);
        let back = meet_one(&mut maps.by_dst, dst, src.key);
        forth && back
    }

    /// Whether the content of a name is to be read. The two have met, and have not left.
    pub(super) fn claim(&self, src: Inode, dst: Inode, path: &RelPath) -> Claim {
        if src.nlink < 2 || dst.nlink < 2 {
            return Claim::Alone;
        }
        let mut maps = self.lock();
        let Maps {
            by_src,
            parked,
            found,
            ..
        } = &mut *maps;
        let Some(met) = by_src.get_mut(&src.key).filter(|m| m.other == dst.key) else {
            return Claim::Alone;
        };
        match met.content {
            Content::Unread => {
                met.content = Content::Comparing;
                parked.entry(src.key).or_default();
                Claim::First
            }
            Content::Comparing => {
                parked.entry(src.key).or_default().push(path.clone());
                Claim::Parked
            }
            Content::Equal => Claim::Known(None),
            Content::Differs => Claim::Known(found.get(&src.key).cloned()),
        }
    }

    /// What the first name has found; returns the names to be told.
    pub(super) fn compared(&self, src: FileKey, finding: Option<&Finding>) -> Vec<RelPath> {
        let mut maps = self.lock();
        if let Some(met) = maps.by_src.get_mut(&src) {
            met.content = match finding {
                None => Content::Equal,
                Some(_) => Content::Differs,
            };
            if let Some(finding) = finding {
                maps.found.insert(src, finding.clone());
            }
        }
        maps.parked.remove(&src).unwrap_or_default()
    }

    /// Nothing more is asked for this name.
    pub(super) fn leave(&self, src: Inode, dst: Inode) {
        if src.nlink < 2 && dst.nlink < 2 {
            return;
        }
        let mut maps = self.lock();
        if leave_one(&mut maps.by_src, src) {
            maps.found.remove(&src.key);
        }
        leave_one(&mut maps.by_dst, dst);
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An inode, and how many names it has.
#[derive(Clone, Copy)]
pub(super) struct Inode {
    pub(super) key: FileKey,
    pub(super) nlink: u32,
}

impl From<&Stat> for Inode {
    fn from(stat: &Stat) -> Inode {
        Inode {
            key: stat.key,
            nlink: stat.nlink,
        }
    }
}

fn meet_one(map: &mut HashMap<FileKey, Met>, inode: Inode, other: FileKey) -> bool {
    if inode.nlink < 2 {
        return true;
    }
    let met = map.entry(inode.key).or_insert(Met {
        other,
        names_left: inode.nlink,
        content: Content::Unread,
    });
    met.other == other
}

/// True with the last name.
fn leave_one(map: &mut HashMap<FileKey, Met>, inode: Inode) -> bool {
    let Some(met) = map.get_mut(&inode.key) else {
        return false;
    };
    met.names_left = met.names_left.saturating_sub(1);
    if met.names_left > 0 {
        return false;
    }
    map.remove(&inode.key);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_an_inode_is_as_large_as_its_number_and_a_count() {
        assert!(size_of::<Met>() <= 24, "{}", size_of::<Met>());
    }
}
