//! Mark: the xattr on a dst inode that says "not all here yet", and its value.
//!
//! The value is one byte in the common case (DESIGN: a 1-byte mark plus a security label stay inside
//! ext4's 256-byte inode):
//!
//!   high four bits: the version: 1; 2 where two bytes of permission bits follow the first; 3 where 8
//!          bytes of a mixed file follow; 4 where both do, permissions first; 5, and nothing else: a
//!          stand-in for a name of which src does not say what it is; 6 and 7 are 3 and 4 of a mixed
//!          file that is young; 8 and 9 are 3 and 4 of one that no user has changed: 24 bytes with atime
//!          and mtime of src's file follow the 8; 10, and nothing else: a user's own file in a directory that is P;
//!          11 is 1 of such a directory
//!   bit 0  the directory is populated (`L`); clear: pending (`P`)
//!   bit 1  an explicit origin follows, to the end of the value
//!   bit 2  24 bytes follow: atime and mtime that the user set (D9)
//!   bit 3  security.capability of src is to be set again after hydration (D7)
//!
//! A program that does not know a version takes the mark for broken (EIO) and touches nothing.
//! Without an explicit origin the origin is the parent's origin and the name.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::sys::name::RelPath;
use crate::sys::stat::Time;
use crate::sys::xattr::{self, Target};

/// The control directory in the raw root of dst: gone at finish, invisible in the mount.
pub const CONTROL_DIR: &str = ".mirrorfs";
/// What `sync` leaves in it while what it wrote is not durable.
pub const SYNC_RECORD: &str = "sync";
/// In the control directory: what the shards of a `sync` on several machines have in common.
pub const SHARDS_DIR: &str = "shards";

/// The path of one of these two.
pub fn in_control(name: &str) -> RelPath {
    let text = format!("{CONTROL_DIR}/{name}");
    RelPath::from_bytes(text.as_bytes()).unwrap_or_else(|| unreachable!("two valid names"))
}

const VERSION: u8 = 1 << 4;
const VERSION_PERM: u8 = 2 << 4;
const VERSION_MIXED: u8 = 3 << 4;
const VERSION_PERM_MIXED: u8 = 4 << 4;
/// The whole value.
const UNSEEN: [u8; 1] = [5 << 4];
const VERSION_YOUNG: u8 = 6 << 4;
const VERSION_PERM_YOUNG: u8 = 7 << 4;
const VERSION_SALVAGED: u8 = 8 << 4;
const VERSION_PERM_SALVAGED: u8 = 9 << 4;
/// The whole value.
const OWN: [u8; 1] = [10 << 4];
const VERSION_NAMED: u8 = 11 << 4;
const POPULATED: u8 = 1;
const ORIGIN: u8 = 1 << 1;
const TIMES: u8 = 1 << 2;
const CAPABILITY: u8 = 1 << 3;

/// Which xattr carries the mark in this migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkName {
    /// `trusted.mirrorfs`: the daemon has CAP_SYS_ADMIN; users can neither see nor set it.
    Trusted,
    /// `user.mirrorfs`: rootless mode.
    User,
}

impl MarkName {
    /// The xattr's name.
    pub fn as_cstr(self) -> &'static CStr {
        match self {
            MarkName::Trusted => c"trusted.mirrorfs",
            MarkName::User => c"user.mirrorfs",
        }
    }

    /// Reads the mark of an inode; `None`: unmarked. EIO for a value that we did not write.
    pub fn get(self, target: Target<'_>) -> Result<Option<Mark>, Errno> {
        match (xattr::get(target, self.as_cstr()), self) {
            (Ok(Some(value)), _) => Mark::decode(&value).ok_or(Errno::IO).map(Some),
            (Ok(None), _) => Ok(None),
            // Whoever marks an inode by a user's xattr can read it.
            (Err(Errno::ACCESS), MarkName::User) => Ok(None),
            (Err(e), _) => Err(e),
        }
    }

    /// Sets the mark.
    pub fn set(self, target: Target<'_>, mark: &Mark) -> Result<(), Errno> {
        xattr::set(target, self.as_cstr(), &mark.encode())
    }

    /// Removes the mark; one that is gone already is no error.
    pub fn remove(self, target: Target<'_>) -> Result<(), Errno> {
        match xattr::remove(target, self.as_cstr()) {
            Err(Errno::NODATA) => Ok(()),
            other => other,
        }
    }
}

/// What a mark says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mark {
    /// A directory whose names are all here, while something below may be pending.
    pub populated: bool,
    /// Where in src it comes from, when that is not parent's origin + name.
    pub origin: Option<RelPath>,
    /// Access and modification time that the user set while the file was pending.
    pub times: Option<(Time, Time)>,
    /// Hydration ends with setting src's security.capability.
    pub capability: bool,
    /// The permissions that users see and that the inode gets when the mark goes: its own let us
    /// work on it meanwhile.
    pub perm: Option<u32>,
    /// Users have written into the file, or src cannot give all of it (`salvage`): `.mirrorfs/maps` says
    /// what is whose, its size and times in dst are the truth, and of src's bytes only those before this
    /// offset count.
    pub mixed: Option<u64>,
    /// The inode is no placeholder: it keeps the place of a name that src has listed (unseen.rs). No
    /// other field says anything then.
    pub unseen: bool,
    /// Of a mixed file: the map may not be durable yet, nor a size of dst that is less than what
    /// `mixed` says. Nothing of what users wrote was promised to outlive a power cut.
    pub young: bool,
    /// Of a mixed file that no user has changed (salvage.rs): access and modification time of the file
    /// in src that its bytes are of; `mixed` is that file's size. It is never young.
    pub salvage: Option<(Time, Time)>,
    /// A user has made the file while its directory was `P`: nothing of it is src's (own.rs). No other field
    /// says anything then.
    pub own: bool,
    /// Of a directory that is `P`, with permissions of its own: users have made files in it.
    pub named: bool,
}

impl Mark {
    /// `P`: nothing is here yet.
    pub fn pending() -> Mark {
        Mark::default()
    }

    /// `L`: a populated directory.
    pub fn populated() -> Mark {
        Mark {
            populated: true,
            ..Mark::default()
        }
    }

    /// A stand-in.
    pub fn unseen() -> Mark {
        Mark {
            unseen: true,
            ..Mark::default()
        }
    }

    /// Times of a file that no user has changed though it is mixed: what he set, or src's.
    pub fn salvage_times(&self) -> Option<(Time, Time)> {
        self.times
            .filter(|_| self.salvage.is_some())
            .or(self.salvage)
    }

    /// A user's own file.
    pub fn own() -> Mark {
        Mark {
            own: true,
            ..Mark::default()
        }
    }

    /// The xattr's value.
    pub fn encode(&self) -> Vec<u8> {
        if self.unseen {
            return UNSEEN.to_vec();
        }
        if self.own {
            return OWN.to_vec();
        }
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let salvage = self.salvage.filter(|_| self.mixed.is_some());
        let version = match (self.perm, self.mixed, self.young) {
            (None, Some(_), _) if salvage.is_some() => VERSION_SALVAGED,
            (Some(_), Some(_), _) if salvage.is_some() => VERSION_PERM_SALVAGED,
            (None, None, _) if self.named => VERSION_NAMED,
            (None, None, _) => VERSION,
            (Some(_), None, _) => VERSION_PERM,
            (None, Some(_), false) => VERSION_MIXED,
            (Some(_), Some(_), false) => VERSION_PERM_MIXED,
            (None, Some(_), true) => VERSION_YOUNG,
            (Some(_), Some(_), true) => VERSION_PERM_YOUNG,
        };
        let mut out = vec![
            version
                | bit(self.populated, POPULATED)
                | bit(self.origin.is_some(), ORIGIN)
                | bit(self.times.is_some(), TIMES)
                | bit(self.capability, CAPABILITY),
        ];
        if let Some(perm) = self.perm {
            out.extend_from_slice(&(perm as u16).to_le_bytes());
        }
        if let Some(src_end) = self.mixed {
            out.extend_from_slice(&src_end.to_le_bytes());
        }
        for (atime, mtime) in [salvage, self.times].into_iter().flatten() {
            for t in [atime, mtime] {
                out.extend_from_slice(&t.sec.to_le_bytes());
                out.extend_from_slice(&t.nsec.to_le_bytes());
            }
        }
        if let Some(origin) = &self.origin {
            out.extend_from_slice(origin.as_bytes());
        }
        out
    }

    /// The inverse of [`Mark::encode`]; `None` for anything else.
    pub fn decode(value: &[u8]) -> Option<Mark> {
        if value == UNSEEN {
            return Some(Mark::unseen());
        }
        if value == OWN {
            return Some(Mark::own());
        }
        let (&head, mut rest) = value.split_first()?;
        let version = head & 0xf0;
        let (has_perm, is_mixed, young) = match version {
            VERSION | VERSION_NAMED => (false, false, false),
            VERSION_PERM => (true, false, false),
            VERSION_MIXED | VERSION_SALVAGED => (false, true, false),
            VERSION_PERM_MIXED | VERSION_PERM_SALVAGED => (true, true, false),
            VERSION_YOUNG => (false, true, true),
            VERSION_PERM_YOUNG => (true, true, true),
            _ => return None,
        };
        let is_salvaged = matches!(version, VERSION_SALVAGED | VERSION_PERM_SALVAGED);
        let mut perm = None;
        if has_perm {
            let (bytes, after) = rest.split_at_checked(2)?;
            rest = after;
            perm = Some(u32::from(u16::from_le_bytes(bytes.try_into().ok()?)));
        }
        let mut mixed = None;
        if is_mixed {
            let (bytes, after) = rest.split_at_checked(8)?;
            rest = after;
            mixed = Some(u64::from_le_bytes(bytes.try_into().ok()?));
        }
        let (mut salvage, mut times) = (None, None);
        for (has, to) in [(is_salvaged, &mut salvage), (head & TIMES != 0, &mut times)] {
            if has {
                let (stamp, after) = rest.split_at_checked(24)?;
                rest = after;
                let (a, m) = stamp.split_at(12);
                *to = Some((decode_time(a)?, decode_time(m)?));
            }
        }
        let origin = match head & ORIGIN != 0 {
            true => Some(RelPath::from_bytes(rest)?),
            false if rest.is_empty() => None,
            false => return None,
        };
        Some(Mark {
            populated: head & POPULATED != 0,
            origin,
            times,
            capability: head & CAPABILITY != 0,
            perm,
            mixed,
            unseen: false,
            young,
            salvage,
            own: false,
            named: version == VERSION_NAMED,
        })
    }
}

fn decode_time(bytes: &[u8]) -> Option<Time> {
    let sec = i64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let nsec = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
    (nsec < 1_000_000_000).then_some(Time { sec, nsec })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_common_marks_are_one_byte() {
        assert_eq!(Mark::pending().encode(), [0x10]);
        assert_eq!(Mark::populated().encode(), [0x11]);
        assert_eq!(Mark::unseen().encode(), [0x50]);
        assert_eq!(Mark::decode(&[0x50]), Some(Mark::unseen()));
        assert_eq!(Mark::decode(&[0x51]), None);
        assert_eq!(Mark::own().encode(), [0xa0]);
        assert_eq!(Mark::decode(&[0xa0]), Some(Mark::own()));
        assert_eq!(Mark::decode(&[0xa1]), None);
    }

    proptest! {
        #[test]
        fn a_mark_survives_its_encoding(
            populated: bool, capability: bool, perm in prop::option::of(0u32..0o10000),
            mixed: Option<u64>, young: bool, named: bool,
            salvage in prop::option::of((any::<i64>(), 0u32..1_000_000_000)),
            times in prop::option::of((any::<i64>(), 0u32..1_000_000_000, any::<i64>(), 0u32..1_000_000_000)),
            origin in prop::option::of("[a-z]{1,9}(/[a-z]{1,9}){0,3}"),
        ) {
            let mark = Mark {
                populated,
                capability,
                perm,
                mixed,
                young: young && mixed.is_some() && salvage.is_none(),
                salvage: salvage.filter(|_| mixed.is_some()).map(|(sec, nsec)| {
                    (Time { sec, nsec }, Time { sec: 1, nsec: 2 })
                }),
                times: times.map(|(a, b, c, d)| (Time { sec: a, nsec: b }, Time { sec: c, nsec: d })),
                origin: origin.and_then(|o| RelPath::from_bytes(o.as_bytes())),
                unseen: false,
                own: false,
                named: named && perm.is_none() && mixed.is_none(),
            };
            prop_assert_eq!(Mark::decode(&mark.encode()), Some(mark));
        }

        #[test]
        fn no_value_makes_decode_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(mark) = Mark::decode(&bytes) {
                prop_assert_eq!(mark.encode(), bytes);
            }
        }
    }
}
