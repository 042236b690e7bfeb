//! Finished: which trees a migration was finished into, so that nobody's work since is taken back.
//!
//! After `finish` DST holds nothing of ours and cannot say so itself. A line that was left in fstab, a
//! unit or a cron job would then `mount --adopt` or `sync` the old tree over what users have changed,
//! and end with 0. So `finish` leaves a note on this machine, and both are refused while it is there.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::control::env_dir;
use super::front::file_name;
use super::out::quoted;
use super::{Failure, exit};
use crate::sys::local;
use crate::sys::stat::{Time, stat_fd};

/// Where notes are: `$MIRRORFS_STATE_DIR`, /var/lib/mirrorfs for root, `$XDG_STATE_HOME/mirrorfs`,
/// ~/.local/state/mirrorfs.
fn state_dir() -> Option<PathBuf> {
    if let Some(dir) = env_dir("MIRRORFS_STATE_DIR") {
        return Some(dir);
    }
    if local::uid() == 0 {
        return Some(PathBuf::from("/var/lib/mirrorfs"));
    }
    let home = || env_dir("HOME").map(|home| home.join(".local/state"));
    Some(env_dir("XDG_STATE_HOME").or_else(home)?.join("mirrorfs"))
}

/// The note of the directory that DST is, by whatever path it is reached: its inode and its birth; its
/// path where the file system keeps no births.
fn note_of(dst: &Path, root: BorrowedFd<'_>) -> Option<PathBuf> {
    let root = stat_fd(root).ok()?; // Whoever works with it meets the same, and tells.
    let name = match root.btime {
        born if born == Time::default() => file_name(dst, "finished.json"),
        born => format!(
            "{}-{}.{:09}.finished.json",
            root.key.ino, born.sec, born.nsec
        ),
    };
    Some(state_dir()?.join(name))
}

/// Notes that a migration is being finished into DST. Before the last of its marks goes: a note too
/// many is of a DST that can still be resumed, where nobody asks for it.
pub(super) fn remember(src: &Path, dst: &Path, root: BorrowedFd<'_>) {
    let Some(path) = note_of(dst, root) else {
        return;
    };
    if let Err(e) = write(src, dst, &path) {
        tracing::warn!("{}: write: {e}", quoted(&path));
    }
}

fn write(src: &Path, dst: &Path, path: &Path) -> std::io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let note = json!({
        "src": src.to_string_lossy(),
        "dst": dst.to_string_lossy(),
        "finished_unix": now.map_or(0, |d| d.as_secs()),
    });
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut make = std::fs::DirBuilder::new();
    make.recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(note.to_string().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(dir)?.sync_all()
}

/// `finish` was refused: the migration goes on.
pub(super) fn forget(dst: &Path, root: BorrowedFd<'_>) {
    if let Some(path) = note_of(dst, root) {
        let _ = std::fs::remove_file(path); // There may be none.
    }
}

/// The note on a tree that a migration was finished into.
pub(super) struct Note {
    /// Where it is.
    path: PathBuf,
    /// When that was, for people.
    pub(super) at: String,
}

/// The note on a tree that carries nothing of ours; `None`: there is none.
pub(super) fn note(dst: &Path, root: impl AsFd) -> Option<Note> {
    let path = note_of(dst, root.as_fd())?;
    let text = std::fs::read(&path).ok()?;
    let note: Value = serde_json::from_slice(&text).unwrap_or_default();
    let at = note.get("finished_unix").and_then(Value::as_u64);
    let at = UNIX_EPOCH + Duration::from_secs(at.unwrap_or(0));
    let at = humantime::format_rfc3339_seconds(at).to_string();
    Some(Note { path, at })
}

/// Refuses to take a DST that was finished for a copy that is still being made. `what` would.
pub(super) fn refuse(what: &str, dst: &Path, root: impl AsFd) -> Result<(), Failure> {
    let Some(note) = note(dst, root) else {
        return Ok(());
    };
    let line = format!(
        "DST {} was finished on {}: {what} would take back what users have changed since; \
         to begin anew all the same: rm {}",
        quoted(dst),
        note.at,
        quoted(&note.path),
    );
    Err(Failure::new(exit::UNUSABLE, line))
}
