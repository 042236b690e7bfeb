//! From our values to the protocol's: Stat to FileAttr, Error to errno, how long the kernel may keep
//! an answer, and at which level a failure is logged.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, Generation, INodeNo, ReplyEmpty, ReplyXattr, TimeOrNow};

use crate::error::{Error, Result, Side};
use crate::mirror::{Attr, Ino, Node, Stamp, user_errno};
use crate::sys::stat::Time;

/// How long the kernel may keep names and attributes: only we change dst, and we tell it.
pub(super) const TTL: Duration = Duration::from_secs(24 * 3600);

/// The protocol's form of a node's attributes under the number `ino`.
pub(super) fn file_attr(ino: Ino, attr: &Attr) -> FileAttr {
    let s = &attr.stat;
    FileAttr {
        ino: INodeNo(ino),
        size: s.size,
        blocks: s.blocks,
        atime: system_time(s.atime),
        mtime: system_time(s.mtime),
        ctime: system_time(s.ctime),
        crtime: system_time(s.btime),
        kind: file_type(s.kind()),
        perm: s.perm() as u16,
        nlink: s.nlink,
        uid: s.uid,
        gid: s.gid,
        rdev: new_encode_dev(s.rdev),
        blksize: s.blksize,
        flags: 0,
    }
}

/// The protocol's device numbers are the kernel's new_encode_dev: 12 bits major, 20 bits minor.
fn new_encode_dev((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The inverse: what mknod(2) wants.
pub(super) fn decode_dev(dev: u32) -> u64 {
    rustix::fs::makedev((dev & 0xfff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xfff00))
}

/// True when the kernel must ask again each time: bits that a write through passthrough clears.
pub(super) fn is_volatile(attr: &Attr) -> bool {
    attr.stat.is_file() && attr.stat.mode & 0o6000 != 0
}

/// A node's generation.
pub(super) fn generation(node: &Node) -> Generation {
    Generation(u64::from(node.anchor.generation()))
}

/// The protocol's file type.
pub(super) fn file_type(kind: rustix::fs::FileType) -> FileType {
    use rustix::fs::FileType as F;
    match kind {
        F::Directory => FileType::Directory,
        F::Symlink => FileType::Symlink,
        F::Fifo => FileType::NamedPipe,
        F::Socket => FileType::Socket,
        F::CharacterDevice => FileType::CharDevice,
        F::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn system_time(t: Time) -> SystemTime {
    let nsec = Duration::from_nanos(t.nsec.into());
    let whole = Duration::from_secs(t.sec.unsigned_abs());
    let at = match t.sec < 0 {
        true => UNIX_EPOCH.checked_sub(whole),
        false => UNIX_EPOCH.checked_add(whole),
    };
    at.and_then(|t| t.checked_add(nsec)).unwrap_or(UNIX_EPOCH)
}

/// A time from a setattr request. fuser 0.18 turns seconds before 1970 and the nanoseconds that
/// follow them into one negative sum, which is off by up to a second; this undoes it.
pub(super) fn stamp(time: TimeOrNow) -> Stamp {
    match time {
        TimeOrNow::Now => Stamp::Now,
        TimeOrNow::SpecificTime(t) => Stamp::At(match t.duration_since(UNIX_EPOCH) {
            Ok(d) => Time {
                sec: d.as_secs().cast_signed(),
                nsec: d.subsec_nanos(),
            },
            Err(e) => {
                let d = e.duration();
                Time {
                    sec: d.as_secs().cast_signed().wrapping_neg(),
                    nsec: d.subsec_nanos(),
                }
            }
        }),
    }
}

/// The errno of a failed request, logged at the level that it deserves.
pub(super) fn errno(what: &str, error: &Error) -> fuser::Errno {
    let errno = user_errno(error);
    match error.side() {
        Side::Src => tracing::warn!("{what}: {error}"),
        Side::Dst | Side::Host => tracing::debug!("{what}: {error}"),
    }
    raw(errno)
}

/// The protocol's form of an errno.
pub(super) fn raw(errno: rustix::io::Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

pub(super) fn reply_empty(what: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(what, &e)),
    }
}

pub(super) fn reply_raw(result: Result<(), rustix::io::Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(raw(e)),
    }
}

pub(super) fn reply_xattr(
    result: Result<Vec<u8>, rustix::io::Errno>,
    size: u32,
    reply: ReplyXattr,
) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(e) => reply.error(raw(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_second_before_1970_keeps_its_direction() {
        let t = system_time(Time {
            sec: -1,
            nsec: 500_000_000,
        });
        assert_eq!(
            UNIX_EPOCH.duration_since(t).ok(),
            Some(Duration::from_millis(500))
        );
    }

    #[test]
    fn a_time_that_fuser_folded_is_unfolded() {
        // What fuser 0.18 makes of sec -3, nsec 4: if this changes, `stamp` must go.
        let folded = UNIX_EPOCH - Duration::new(3, 4);
        let stamp = stamp(TimeOrNow::SpecificTime(folded));
        assert_eq!(stamp, Stamp::At(Time { sec: -3, nsec: 4 }));
    }

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(1, 3), (259, 70_000), (4095, 0xfffff)] {
            let back = decode_dev(new_encode_dev((major, minor)));
            assert_eq!(back, rustix::fs::makedev(major, minor));
        }
    }
}
