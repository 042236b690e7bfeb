//! Absent: xattrs that programs ask every inode for (`ls -l`, the kernel before it runs or writes a
//! file), and that most do not have. The kernel remembers no such answer, so a node does.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::meta::{ACCESS_ACL, CAPABILITY, DEFAULT_ACL};

const NAMES: [&CStr; 4] = [ACCESS_ACL, DEFAULT_ACL, CAPABILITY, c"security.selinux"];
const BITS: u32 = NAMES.len() as u32;

/// Which of them an inode is known not to have. Above their bits: how often its xattrs have changed.
#[derive(Debug, Default)]
pub(super) struct Absent(AtomicU32);

/// What was known before somebody looked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen(u32);

fn bit_of(name: &CStr) -> Option<u32> {
    let at = NAMES.iter().position(|n| *n == name)?;
    Some(1 << at)
}

impl Absent {
    /// True when the inode does not have it (ENODATA).
    pub(super) fn has(&self, name: &CStr) -> bool {
        let known = self.0.load(Ordering::Acquire);
        bit_of(name).is_some_and(|bit| known & bit != 0)
    }

    /// Taken before a look whose answer `note` is told.
    pub(super) fn seen(&self) -> Seen {
        Seen(self.0.load(Ordering::Acquire))
    }

    /// The look has found that it is not there; that counts unless something was changed meanwhile.
    pub(super) fn note(&self, seen: Seen, name: &CStr) {
        let Some(bit) = bit_of(name) else {
            return;
        };
        self.change(|now| (now >> BITS == seen.0 >> BITS).then_some(now | bit));
    }

    /// Before an xattr is set, and once more after it.
    pub(super) fn forget(&self) {
        self.change(|now| Some(((now >> BITS) + 1) << BITS));
    }

    /// `None` changes nothing.
    fn change(&self, next: impl Fn(u32) -> Option<u32>) {
        let (set, get) = (Ordering::AcqRel, Ordering::Acquire);
        let _ = self.0.fetch_update(set, get, next); // What it was is not asked for.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_there_is_known_until_something_is_set_even_during_the_look() {
        let absent = Absent::default();
        absent.note(absent.seen(), CAPABILITY);
        assert!(absent.has(CAPABILITY) && !absent.has(ACCESS_ACL));
        let early = absent.seen();
        absent.forget();
        assert!(!absent.has(CAPABILITY));
        absent.note(early, CAPABILITY);
        assert!(!absent.has(CAPABILITY), "the look was too early");
        let between = absent.seen();
        absent.forget();
        absent.note(between, CAPABILITY);
        assert!(!absent.has(CAPABILITY), "set while somebody looked");
        absent.note(absent.seen(), c"user.any");
        assert!(!absent.has(c"user.any"), "it is not one of those");
    }
}
