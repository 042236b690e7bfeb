//! `mount -o remount,ro DIR` and `remount,rw`: the mount helper makes a mount of ours read-only, or writable
//! again. What is pending comes meanwhile: the daemon writes to DST, not through the mount. Everything else
//! that is to be changed is not changed by a remount, and is refused.

use super::helper::{Call, code};
use super::out::{self, quoted};
use super::{ending, helper};
use crate::error::Errno;
use crate::sys::{host, view};
use std::os::fd::AsFd;

/// What the table of mounts says of a FUSE mount, which mount(8) hands back to us.
const KERNELS: [&[u8]; 6] = [
    b"remount",
    b"user_id=",
    b"group_id=",
    b"rootmode=",
    b"max_read=",
    b"blksize=",
];

/// Remounts, and returns an exit code of mount(8).
pub(super) fn run(call: &Call) -> u8 {
    let mut words = call.clone();
    let is_kernels = |o: &[u8]| KERNELS.iter().any(|k| o.starts_with(k));
    words
        .options
        .retain(|o| !is_kernels(o) && o != b"default_permissions");
    let known = words.words_say().map_err(|line| (line, code::USAGE));
    let known = known.and_then(|args| {
        let config = super::steer::mount_config(&args);
        config.map_err(|failure| (failure.line, code::USAGE))
    });
    let done = known.and_then(|_| turn(&words).map_err(|line| (line, code::FAILED)));
    match done {
        Ok(()) => helper::code::DONE,
        Err((line, code)) => {
            out::complain(&line);
            code
        }
    }
}

fn turn(call: &Call) -> Result<(), String> {
    let at = quoted(&call.dir);
    let Some(mount) = ending::mount_at(&call.places()) else {
        return Err(format!("{at}: remount: no mirrorfs is mounted there"));
    };
    let is_read_only = mount.options.split(',').any(|o| o == "ro");
    let modes = call.options.iter().rev();
    let read_only = modes.filter_map(|o| match o.as_slice() {
        b"ro" => Some(true),
        b"rw" => Some(false),
        _ => None,
    });
    match read_only.into_iter().next() {
        Some(read_only) if read_only != is_read_only => {
            if call.fake {
                return Ok(());
            }
            let set =
                host::open_dir(&call.dir).and_then(|d| view::set_read_only(d.as_fd(), read_only));
            set.map_err(|e| match e {
                Errno::BUSY => format!("{at}: remount: files are open for writing; see fuser -vm"),
                e => format!("{at}: remount: {e}"),
            })
        }
        // With `dst=` they are fstab's, which mount(8) adds to what was asked for.
        Some(_) if call.dst != call.dir || !call.options.iter().any(|o| is_own(o)) => Ok(()),
        _ => Err(format!(
            "{at}: remount changes only ro and rw; mirrorfs set changes limits, umount and mount the rest"
        )),
    }
}

/// An option that only mirrorfs has a meaning for.
fn is_own(option: &[u8]) -> bool {
    option.contains(&b'=') && !option.starts_with(b"x-") && !option.starts_with(b"X-")
}
