//! Ending: a daemon whose mount is gone, and which has not let go of DST yet. Who mounts again at once waits
//! for it, instead of being refused, or of taking it for a mount.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::client;
use super::report::{Report, State};
use crate::fuse::session::FS_TYPE;
use crate::mirror::is_locked;
use crate::sys::host::{self, MountLine};

/// Longest wait for a daemon that is ending: a last open file may keep it for ever.
const LIMIT: Duration = Duration::from_secs(30);
/// The same where nobody answers: it has closed its socket, and is about to exit.
const SILENT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// Waits while a daemon without a mount has DST's lock. Who waited for nothing meets the lock.
pub(super) fn wait_for(dst: &Path) {
    let begun = Instant::now();
    let mut limit = SILENT;
    let Ok(root) = host::open_dir(dst) else {
        return; // It is told elsewhere.
    };
    while begun.elapsed() < limit && is_locked(root.as_fd()) {
        if let Ok(Some(daemon)) = client::find(dst) {
            if !is_ending(&daemon.report) {
                return;
            }
            limit = LIMIT;
        }
        std::thread::sleep(PAUSE);
    }
}

/// It has been mounted, and is not any more.
fn is_ending(report: &Report) -> bool {
    report.state != State::Preparing && mount_at(&report.home_names).is_none()
}

/// The mount of ours that is seen at one of these places now.
pub(super) fn mount_at(names: &[String]) -> Option<MountLine> {
    let mut mounts = host::mounts().unwrap_or_default();
    let at = |m: &MountLine| names.contains(&client::printable(&m.point));
    mounts.retain(at);
    mounts.pop().filter(|top| top.fs_type == FS_TYPE)
}
