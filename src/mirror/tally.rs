//! Tally: what this migration has pulled so far, kept in `.mirrorfs/tally` for the next daemon.
//!
//! It is for people only: nothing is decided by it, and a tally that is missing, old or not readable
//! costs no more than counters that are too small. So it is written without an fsync.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Mirror;
use super::node::Ino;
use crate::error::{Context, Result, Side};
use crate::progress::Progress;

/// A tally longer than this, bytes, is none of ours.
const LEN_MAX: u64 = 4096;

/// The counters that outlive a daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Entries placed.
    pub entries: u64,
    /// Files complete and durable.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Tally {
    fn of(progress: &Progress) -> Tally {
        let [entries, files, bytes] = &progress.earlier;
        Tally {
            entries: entries.get() + progress.entries_placed.get(),
            files: files.get() + progress.files_pulled.get(),
            bytes: bytes.get() + progress.bytes_pulled.get(),
        }
    }

    /// What the last daemon left; zeros when it left nothing.
    pub(super) fn load(control: BorrowedFd<'_>) -> Tally {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let Ok(file) = rustix::fs::openat(control, c"tally", flags, Mode::empty()) else {
            return Tally::default();
        };
        let mut text = Vec::new();
        let read = std::fs::File::from(file)
            .take(LEN_MAX)
            .read_to_end(&mut text);
        read.ok()
            .and_then(|_| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    /// Makes these the counters that the present daemon starts from.
    pub(super) fn begin(self, progress: &Progress) {
        let [entries, files, bytes] = &progress.earlier;
        entries.set(self.entries);
        files.set(self.files);
        bytes.set(self.bytes);
    }

    fn save(self, control: BorrowedFd<'_>) -> std::io::Result<()> {
        let flags =
            OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o600);
        let file = rustix::fs::openat(control, c"tally.new", flags, mode)?;
        std::fs::File::from(file).write_all(&serde_json::to_vec(&self)?)?;
        rustix::fs::renameat(control, c"tally.new", control, c"tally")?;
        Ok(())
    }
}

impl Mirror {
    /// A restart met a pending file that an earlier daemon placed: it is still to pull.
    pub fn note_left(&self, ino: Ino, bytes: u64) {
        // What this daemon placed itself is counted already.
        if self.source.recall(ino).is_none() {
            self.progress.bytes_left.add(bytes);
            self.progress.files_seen.add(1);
            self.progress.bytes_seen.add(bytes);
        }
    }

    /// Writes down what has been pulled. Not after `finish`: the control directory is gone then.
    pub fn save_tally(&self) -> Result<()> {
        let _finish = self.moves.lock(); // `finish` removes what is in the directory under it.
        if self.finished() {
            return Ok(());
        }
        let saved = Tally::of(&self.progress).save(self.control.dir.as_fd());
        saved
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
            .on("write", Side::Dst, ".mirrorfs/tally")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_is_what_was_before_and_what_came_since() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = std::fs::File::open(dir.path()).expect("open");
        assert_eq!(Tally::load(open.as_fd()), Tally::default());
        let progress = Progress::default();
        progress.bytes_pulled.add(5);
        Tally::of(&progress).save(open.as_fd()).expect("saved");
        let next = Progress::default();
        Tally::load(open.as_fd()).begin(&next);
        next.bytes_pulled.add(2);
        next.files_pulled.add(1);
        let (entries, files, bytes) = (0, 1, 7);
        assert_eq!(
            Tally::of(&next),
            Tally {
                entries,
                files,
                bytes
            }
        );
        std::fs::write(dir.path().join("tally"), "not JSON").expect("write");
        assert_eq!(Tally::load(open.as_fd()), Tally::default());
    }
}
