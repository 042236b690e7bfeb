//! Report: what a run says while it works (lines, errors) and at its end (totals).

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::depth::{Look, SLOW};
use crate::error::{Error, Printable, Side};
use crate::progress::Counter;
use crate::sys::name::RelPath;

/// Errors that the report keeps; all are counted and told.
pub(super) const ERRORS_KEPT_MAX: usize = 10_000;

/// What a run tells while it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// One change, when the configuration asks for lines.
    Line(Line),
    /// One entry failed; the rest goes on.
    Error(SyncError),
    /// One entry is of a kind that is not copied (`--no-links`, `--no-D`).
    LeftOut(PathBuf),
}

/// One line of rsync's `%i %n%L`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Eleven characters, `>f.st......` and so on, or `*deleting  `.
    pub code: String,
    /// The entry, below the root.
    pub path: PathBuf,
    /// A directory: its name is shown with a slash.
    pub is_dir: bool,
    /// ` -> target`, ` => other name`, or nothing.
    pub note: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.is_dir { "/" } else { "" };
        let path = AsRsync(self.path.as_os_str());
        write!(f, "{} {path}{slash}{}", self.code, self.note)
    }
}

/// A name as rsync prints it: `\#ooo` for each byte that is not part of printable text.
pub(super) struct AsRsync<'a>(pub(super) &'a OsStr);

impl fmt::Display for AsRsync<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.as_bytes();
        let octal = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|b| write!(f, "\\#{b:03o}"))
        };
        let mut at = 0;
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                let len = c.len_utf8();
                // What would read as such a byte is one itself.
                let looks_so = c == '\\'
                    && bytes.get(at + 1) == Some(&b'#')
                    && bytes
                        .get(at + 2..at + 5)
                        .is_some_and(|d| d.iter().all(u8::is_ascii_digit));
                match c.is_control() || looks_so {
                    true => octal(f, &bytes[at..at + len])?,
                    false => write!(f, "{c}")?,
                }
                at += len;
            }
            octal(f, chunk.invalid())?;
            at += chunk.invalid().len();
        }
        Ok(())
    }
}

impl Line {
    /// What `text`, the whole line, says without the code.
    pub fn named<'t>(&self, text: &'t str) -> &'t str {
        text.get(self.code.len() + 1..).unwrap_or(text)
    }
}

/// One entry that could not be copied, or not in all respects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncError {
    /// The entry, below the root.
    pub path: PathBuf,
    /// Which side failed.
    pub side: Side,
    /// The call, or the piece of metadata that dst refused.
    pub call: String,
    /// What the kernel said.
    pub errno: Errno,
    /// One line for people.
    pub message: String,
    /// src lost the entry or changed it while it was copied.
    pub vanished: bool,
}

impl fmt::Display for SyncError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl SyncError {
    pub(super) fn new(path: &RelPath, error: &Error) -> SyncError {
        let vanished = match error {
            Error::Call {
                side: Side::Src,
                errno,
                ..
            } => *errno == Errno::NOENT,
            Error::SrcChanged { .. } => true,
            _ => false,
        };
        SyncError {
            path: path.to_path(),
            side: error.side(),
            call: error.what().to_owned(),
            errno: error.errno(),
            message: error.to_string(),
            vanished,
        }
    }

    /// A piece of metadata that dst does not take.
    pub(super) fn refused(path: &RelPath, what: &str, errno: Errno) -> SyncError {
        let path = path.to_path();
        let message = format!(
            "\"{}\": dst does not take {what}: {errno}",
            Printable(path.as_os_str())
        );
        SyncError {
            path,
            side: Side::Dst,
            call: what.to_owned(),
            errno,
            message,
            vanished: false,
        }
    }
}

/// What a run did.
#[derive(Debug, Clone, Default)]
pub struct SyncReport {
    /// Names seen in src, the root included.
    pub entries: u64,
    /// Of these, regular files.
    pub files: u64,
    /// Directories.
    pub dirs: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// Fifos, sockets, devices.
    pub specials: u64,
    /// Names that were linked to an inode that was there.
    pub hardlinks: u64,
    /// Entries made.
    pub created: u64,
    /// Files whose data was copied.
    pub transferred: u64,
    /// Bytes read and written, or shared by a clone.
    pub bytes_copied: u64,
    /// Sizes of all regular files in src, each inode once.
    pub bytes_total: u64,
    /// Entries that were equal already, or left alone as asked.
    pub skipped: u64,
    /// Existing entries whose data or metadata was changed.
    pub updated: u64,
    /// Entries removed from dst.
    pub deleted: u64,
    /// Errors, vanished ones not counted.
    pub failed: u64,
    /// Entries that vanished from src or kept changing.
    pub vanished: u64,
    /// The first errors, vanished ones included.
    pub errors: Vec<SyncError>,
    /// dst had no room: the run ended early.
    pub dst_full: bool,
    /// `--max-delete` was reached: not all was removed.
    pub max_delete_reached: bool,
    /// Shards of this round that have not ended yet.
    pub shards_left: Vec<u32>,
    /// Why the manifest is not written.
    pub manifest: Option<String>,
    /// The run was stopped from outside; what has a name is whole.
    pub interrupted: bool,
    /// How long it took, the final syncfs included.
    pub elapsed: Duration,
    /// Most threads at once.
    pub threads: usize,
    /// Part of the threads' time that they had work, 0 to 1.
    pub utilisation: f64,
}

/// The totals while threads add to them.
#[derive(Default)]
pub(super) struct Totals {
    pub(super) entries: Counter,
    pub(super) files: Counter,
    pub(super) dirs: Counter,
    pub(super) symlinks: Counter,
    pub(super) specials: Counter,
    pub(super) hardlinks: Counter,
    pub(super) created: Counter,
    pub(super) transferred: Counter,
    pub(super) bytes_copied: Counter,
    pub(super) bytes_total: Counter,
    pub(super) skipped: Counter,
    pub(super) updated: Counter,
    pub(super) deleted: Counter,
    pub(super) dst_full: AtomicBool,
    pub(super) max_delete_reached: AtomicBool,
    /// Running median of how long src takes to open, stat and read a small file, nanoseconds.
    src_ns: AtomicU64,
    /// How often it was asked so, how long that took together, and the quickest answer since
    /// somebody looked.
    answers: Counter,
    waited_ns: Counter,
    quickest_ns: AtomicU64,
    /// src may have to ask somebody: its first answers are believed at once.
    pub(super) src_asks: AtomicBool,
}

impl Totals {
    /// Notes how long src took for one small file, or to open a directory. A step towards it,
    /// whatever the distance: so the value follows the median, and a thread that lost its CPU for a
    /// while (on a busy machine, or because we have too many threads) does not make the source look
    /// slow. Threads may overwrite each other: it is an estimate. What is known to be far away is
    /// believed sooner: half the way with each answer.
    pub(super) fn src_took(&self, time: Duration) {
        let now = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let was = self.src_ns.load(Relaxed);
        let next = match now > was {
            true if self.src_asks.load(Relaxed) => was + (now - was) / 2,
            true => was + was / 8 + 500,
            false => was - was / 8,
        };
        self.src_ns.store(next.min(1 << 40), Relaxed);
        self.answers.add(1);
        self.waited_ns.add(now);
    }

    /// As `src_took`, for a file that was opened and read: only they are alike, so that the quickest
    /// says something of the others.
    pub(super) fn file_took(&self, time: Duration) {
        self.src_took(time);
        let now = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let quickest = self.quickest_ns.load(Relaxed);
        if quickest == 0 || now < quickest {
            self.quickest_ns.store(now, Relaxed);
        }
    }

    /// What src has answered so far.
    pub(super) fn look(&self, at: Duration, idle: usize) -> Look {
        let quickest = self.quickest_ns.swap(0, Relaxed);
        Look {
            at,
            answers: self.answers.get(),
            waited: Duration::from_nanos(self.waited_ns.get()),
            median: self.src_latency(),
            quickest: (quickest > 0).then(|| Duration::from_nanos(quickest)),
            idle,
        }
    }

    /// True when threads mostly wait for src; else it answers from memory, and more threads than a
    /// few only get in each other's way.
    pub(super) fn is_slow(&self) -> bool {
        self.src_latency() >= SLOW
    }

    /// How long src takes for a small file.
    pub(super) fn src_latency(&self) -> Duration {
        Duration::from_nanos(self.src_ns.load(Relaxed))
    }

    pub(super) fn fill(&self, report: &mut SyncReport) {
        report.entries = self.entries.get();
        report.files = self.files.get();
        report.dirs = self.dirs.get();
        report.symlinks = self.symlinks.get();
        report.specials = self.specials.get();
        report.hardlinks = self.hardlinks.get();
        report.created = self.created.get();
        report.transferred = self.transferred.get();
        report.bytes_copied = self.bytes_copied.get();
        report.bytes_total = self.bytes_total.get();
        report.skipped = self.skipped.get();
        report.updated = self.updated.get();
        report.deleted = self.deleted.get();
        report.dst_full = self.dst_full.load(Relaxed);
        report.max_delete_reached = self.max_delete_reached.load(Relaxed);
    }
}

/// What differs between src and dst, for the itemized line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) data: bool,
    pub(super) size: bool,
    pub(super) time: bool,
    /// It gets the time of the copy (`--no-times`).
    pub(super) now: bool,
    /// Only where somebody asks for it (`-U`).
    pub(super) atime: bool,
    pub(super) mode: bool,
    pub(super) owner: bool,
    pub(super) group: bool,
    pub(super) acl: bool,
    pub(super) xattr: bool,
    pub(super) flags: bool,
}

impl Changes {
    /// Something is not the same.
    pub(super) fn any(&self) -> bool {
        *self != Changes::default()
    }

    /// The nine letters after type and update: `cstpoguax`.
    pub(super) fn letters(&self) -> String {
        let on = |is: bool, letter: char| if is { letter } else { '.' };
        let time = if self.now { 'T' } else { 't' };
        [
            on(self.data, 'c'),
            on(self.size, 's'),
            on(self.time || self.now, time),
            on(self.mode, 'p'),
            on(self.owner, 'o'),
            on(self.group, 'g'),
            on(self.atime, 'u'),
            on(self.acl, 'a'),
            on(self.xattr || self.flags, 'x'),
        ]
        .iter()
        .collect()
    }
}

/// rsync's letter for a file type.
pub(super) fn type_letter(kind: FileType) -> char {
    match kind {
        FileType::RegularFile => 'f',
        FileType::Directory => 'd',
        FileType::Symlink => 'L',
        FileType::CharacterDevice | FileType::BlockDevice => 'D',
        FileType::Fifo | FileType::Socket | FileType::Unknown => 'S',
    }
}
