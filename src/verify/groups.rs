//! Groups: whether names that are one inode in src are one inode in dst, and only those.
//!
//! Two partitions of the same names are equal when each src inode always meets the same dst inode
//! and the reverse. Only inodes with several names are kept, and only until all of them were seen.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::sys::stat::{FileKey, Stat};

/// Which src inode has met which dst inode.
#[derive(Default)]
pub(super) struct Groups(Mutex<Maps>);

#[derive(Default)]
struct Maps {
    by_src: HashMap<FileKey, Met>,
    by_dst: HashMap<FileKey, Met>,
}

struct Met {
    other: FileKey,
    names_left: u32,
}

impl Groups {
    /// Records that the two inodes have the same name. False when that breaks the partition.
    pub(super) fn meet(&self, src: Inode, dst: Inode) -> bool {
        if src.nlink < 2 && dst.nlink < 2 {
            return true;
        }
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let forth = meet_one(&mut maps.by_src, src, dst.key);
        let back = meet_one(&mut maps.by_dst, dst, src.key);
        forth && back
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
    });
    let same = met.other == other;
    met.names_left = met.names_left.saturating_sub(1);
    if met.names_left == 0 {
        map.remove(&inode.key);
    }
    same
}
