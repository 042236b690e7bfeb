//! Ctime: what the migration does to an inode is no change of it for those who look.
//!
//! dst's inodes get a new ctime when data comes in and when a mark goes. Who compares the ctime before
//! and after a look (tar: "file changed as we read it"; git) would take that for somebody's change. So
//! a node keeps the ctime with which it was first shown, until a user changes the inode: from then on,
//! and once everything is here, users see dst's own.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use crate::sys::stat::Time;

const NANOS: i64 = 1_000_000_000;
/// Not shown yet.
const NONE: i64 = i64::MAX;
/// A user has changed the inode.
const USERS: i64 = i64::MIN;

/// The ctime of a node, in nanoseconds since 1970, or one of the two above.
#[derive(Debug)]
pub struct SteadyCtime(AtomicI64);

impl Default for SteadyCtime {
    fn default() -> SteadyCtime {
        SteadyCtime(AtomicI64::new(NONE))
    }
}

impl SteadyCtime {
    /// What to show for an inode whose ctime is `now`; `complete`: the migration changes nothing any
    /// more.
    pub fn show(&self, now: Time, complete: bool) -> Time {
        let Some(nanos) = pack(now) else { return now };
        if complete && self.0.load(Relaxed) == NONE {
            return now;
        }
        match self.0.compare_exchange(NONE, nanos, Relaxed, Relaxed) {
            Ok(_) | Err(USERS) => now,
            Err(first) => Time {
                sec: first.div_euclid(NANOS),
                nsec: first.rem_euclid(NANOS) as u32,
            },
        }
    }

    /// A user is about to change the inode, or has.
    pub fn is_users(&self) {
        self.0.store(USERS, Relaxed);
    }
}

/// `None` for a time outside the years 1678 to 2262.
fn pack(time: Time) -> Option<i64> {
    let nanos = time.sec.checked_mul(NANOS)?;
    nanos
        .checked_add(i64::from(time.nsec))
        .filter(|n| *n != NONE && *n != USERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(sec: i64, nsec: u32) -> Time {
        Time { sec, nsec }
    }

    #[test]
    fn what_was_shown_first_stays_until_a_user_changes_the_inode() {
        let ctime = SteadyCtime::default();
        for first in [
            at(-1, 500_000_000),
            at(0, 0),
            at(1_700_000_000, 999_999_999),
        ] {
            let ctime = SteadyCtime::default();
            assert_eq!(ctime.show(first, false), first);
            assert_eq!(ctime.show(at(1_800_000_000, 1), false), first);
            assert_eq!(ctime.show(at(1_800_000_000, 2), true), first);
        }
        assert_eq!(ctime.show(at(5, 0), false), at(5, 0));
        ctime.is_users();
        assert_eq!(ctime.show(at(6, 0), false), at(6, 0));
        assert_eq!(ctime.show(at(7, 0), true), at(7, 0));
    }

    #[test]
    fn when_all_is_here_and_for_times_out_of_range_it_is_dsts_own() {
        let ctime = SteadyCtime::default();
        assert_eq!(ctime.show(at(5, 0), true), at(5, 0));
        assert_eq!(ctime.show(at(i64::MAX / 2, 0), false), at(i64::MAX / 2, 0));
        assert_eq!(ctime.show(at(6, 0), false), at(6, 0));
    }
}
