//! Ledger: the durable list of what could not be pulled, and why.
//!
//!   record()   a path's data or names failed: one entry for each path and side, the last failure counts
//!   settle()   a later try succeeded: the path's failures leave
//!   accept()   somebody gives a path up: `finish` takes it for lost, should it stay
//!
//! `.mirrorfs/ledger` holds one JSON object a line: an entry, or `{"settled": path}` when a later
//! try succeeded. The file is replayed at start and rewritten when it is mostly history.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Printable, Result, Side};
use crate::sys::name::RelPath;

const FILE: &std::ffi::CStr = c"ledger";
const NEW_FILE: &std::ffi::CStr = c"ledger.new";
/// What `call` says of a name that only dst has.
const EXTRA: &str = "extra";
/// Ranges of one entry; the last of so many reaches to the end of all.
const RANGES_MAX: usize = 10_000;
/// Such names that are listed; more are only counted and logged.
const EXTRAS_MAX: usize = 10_000;

/// One thing that could not be pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// The path below SRC, printable: what is not UTF-8 or not printable is `\xNN`.
    pub path: String,
    /// The path's bytes in hexadecimal, where `path` is not the path itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// `src`, `dst` or `host`.
    pub side: String,
    /// The call, the reason, or the piece of metadata (an xattr's name).
    pub call: String,
    /// errno.
    pub errno: i32,
    /// One line for people.
    pub message: String,
    /// When it failed last, seconds since 1970.
    pub time_unix: u64,
    /// When it failed first.
    #[serde(default)]
    pub first_unix: u64,
    /// How often it was tried.
    pub attempts: u32,
    /// The bytes that could not be read, where somebody has looked: from, to (not included).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<(u64, u64)>,
    /// False for metadata that dst cannot hold while the data is here: a retry changes nothing.
    pub data: bool,
    /// Somebody gives it up, if it stays.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepted: bool,
}

impl LedgerEntry {
    /// The path's bytes in hexadecimal.
    fn hex(&self) -> String {
        let exact = || hex(self.path.as_bytes());
        self.path_hex.clone().unwrap_or_else(exact)
    }

    /// A name that only dst has: told, and no failure.
    pub fn is_extra(&self) -> bool {
        self.call == EXTRA && !self.data && self.accepted
    }

    /// One for each path and side; pieces of metadata each for themselves.
    fn key(&self) -> (String, String) {
        let what = match self.data {
            true => &self.side,
            false => &self.call,
        };
        (self.hex(), what.clone())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Entry(LedgerEntry),
    Settled { settled: String },
}

/// The entries, in memory and on disk.
#[derive(Debug)]
pub struct Ledger {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: std::fs::File,
    entries: Entries,
    /// Lines in the file.
    lines: usize,
    /// Of the entries, those that are no failures but names that only dst has.
    extras: usize,
    /// The file lacks a line, or a part of one: it is to be written anew.
    torn: bool,
}

/// Room that the file has from the start, bytes: what cannot be pulled is worth telling above all when
/// dst is full.
const RESERVED: u64 = 64 << 10;

impl Ledger {
    /// Opens the ledger of a control directory, empty when there is none.
    pub fn open(control: BorrowedFd<'_>) -> Result<Ledger> {
        let (entries, lines) = read(control)?;
        let file = open_file(control, FILE)?;
        let extras = entries.values().filter(|e| e.is_extra()).count();
        Ok(Ledger {
            inner: Mutex::new(Inner {
                file,
                entries,
                lines,
                extras,
                torn: false,
            }),
        })
    }

    /// Records a failure of a path's data or names.
    pub fn record(&self, path: &RelPath, error: &Error) {
        self.add(failure_of(path, error), false);
    }

    /// Records bytes of a file that src cannot give; `all`: there are no others.
    pub fn record_ranges(&self, path: &RelPath, error: &Error, bad: &[Range<u64>], all: bool) {
        let mut new = failure_of(path, error);
        new.ranges = bad.iter().map(|r| (r.start, r.end)).collect();
        self.add(new, all);
    }

    /// Records metadata that dst would not take.
    pub fn record_refused(&self, path: &RelPath, refused: &crate::meta::Refused) {
        self.record_metadata(path, Side::Dst, &refused.what, refused.errno);
    }

    /// Records an xattr of src that we may not read.
    pub fn record_unread(&self, path: &RelPath, name: &str, errno: rustix::io::Errno) {
        self.record_metadata(path, Side::Src, name, errno);
    }

    fn record_metadata(&self, path: &RelPath, side: Side, what: &str, errno: rustix::io::Errno) {
        let shown = Printable(path.as_ref().as_os_str()).to_string();
        let message = format!("\"{shown}\": {what} {side}: {errno}");
        self.add(entry(path, side, what, errno, message, false), false);
    }

    /// A later try succeeded: the path's data is here.
    pub fn settle(&self, path: &RelPath) {
        let key = hex(path.as_bytes());
        let mut inner = self.inner.lock();
        let known: Vec<_> = inner
            .entries
            .range((key.clone(), String::new())..)
            .take_while(|((p, _), _)| *p == key)
            .filter(|(_, e)| e.data)
            .map(|(k, _)| k.clone())
            .collect();
        if known.is_empty() {
            return;
        }
        for k in known {
            inner.entries.remove(&k);
        }
        inner.append(&Line::Settled { settled: key });
    }

    /// Gives up what a path's entries say, if it stays so; how many there are.
    pub fn accept(&self, path: &RelPath) -> usize {
        let key = hex(path.as_bytes());
        let mut inner = self.inner.lock();
        let of = |e: &&mut LedgerEntry| e.hex() == key;
        let accepted: Vec<_> = (inner.entries.values_mut().filter(of))
            .map(|entry| {
                entry.accepted = true;
                entry.clone()
            })
            .collect();
        for entry in &accepted {
            inner.append(&Line::Entry(entry.clone()));
        }
        accepted.len()
    }

    /// All entries, by path.
    pub fn entries(&self) -> Vec<LedgerEntry> {
        self.inner.lock().entries.values().cloned().collect()
    }

    /// How many failures.
    pub fn len(&self) -> usize {
        let inner = self.inner.lock();
        inner.entries.len() - inner.extras
    }

    /// How many names that only dst has.
    pub fn extras(&self) -> u64 {
        self.inner.lock().extras as u64
    }

    /// Notes a name that only dst has: no failure, nothing to be given up. False: it is noted already.
    pub fn note_extra(&self, path: &RelPath) -> bool {
        let shown = Printable(path.as_ref().as_os_str()).to_string();
        let message = format!("\"{shown}\": only dst has it, kept");
        let mut new = entry(path, Side::Dst, EXTRA, Errno::EXIST, message, false);
        new.accepted = true;
        let mut inner = self.inner.lock();
        if inner.entries.contains_key(&new.key()) {
            return false;
        }
        tracing::info!("{}", new.message);
        if inner.extras < EXTRAS_MAX {
            inner.extras += 1;
            inner.entries.insert(new.key(), new.clone());
            inner.append(&Line::Entry(new));
        }
        true
    }

    /// Makes what was recorded durable and drops history.
    pub fn sync(&self, control: BorrowedFd<'_>) -> Result<()> {
        let mut inner = self.inner.lock();
        if inner.torn || inner.lines > 2 * inner.entries.len() + 100 {
            let mut file = open_file(control, NEW_FILE)?;
            // What an earlier try has left.
            crate::sys::copy::truncate(file.as_fd(), 0).on(
                "ftruncate",
                Side::Dst,
                ".mirrorfs/ledger.new",
            )?;
            let lines: Vec<Line> = inner.entries.values().cloned().map(Line::Entry).collect();
            for line in &lines {
                write_line(&mut file, line).on("write", Side::Dst, ".mirrorfs/ledger.new")?;
            }
            crate::sys::fd::fsync(file.as_fd()).on("fsync", Side::Dst, ".mirrorfs/ledger.new")?;
            rustix::fs::renameat(control, NEW_FILE, control, FILE).on(
                "rename",
                Side::Dst,
                ".mirrorfs/ledger",
            )?;
            inner.lines = lines.len();
            inner.torn = false;
            inner.file = file;
        }
        crate::sys::fd::fdatasync(inner.file.as_fd()).on("fdatasync", Side::Dst, ".mirrorfs/ledger")
    }

    fn add(&self, mut new: LedgerEntry, all: bool) {
        tracing::warn!("{}", new.message);
        let key = new.key();
        let mut inner = self.inner.lock();
        if let Some(old) = inner.entries.get(&key) {
            new.attempts = old.attempts + 1;
            (new.first_unix, new.accepted) = (old.first_unix, old.accepted);
            let known = old.ranges.iter().filter(|_| !all);
            new.ranges = known.chain(&new.ranges).copied().collect();
        }
        new.ranges = merged(new.ranges);
        inner.entries.insert(key, new.clone());
        inner.append(&Line::Entry(new));
    }
}

impl Inner {
    fn append(&mut self, line: &Line) {
        self.lines += 1;
        if let Err(errno) = write_line(&mut self.file, line) {
            // dst is full, most likely. The entry lives in memory, and the mark, which is what
            // keeps the file from being taken for complete, is still there.
            if !std::mem::replace(&mut self.torn, true) {
                tracing::warn!(
                    "write dst \".mirrorfs/ledger\": {errno}; it is written again later"
                );
            }
        }
    }
}

fn write_line(file: &mut std::fs::File, line: &Line) -> Result<(), rustix::io::Errno> {
    let mut text = serde_json::to_vec(line).map_err(|_| rustix::io::Errno::INVAL)?;
    text.push(b'\n');
    file.write_all(&text)
        .map_err(|e| rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO))
}

fn open_file(control: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<std::fs::File> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(control, name, flags, Mode::from_raw_mode(0o600))
        .map(std::fs::File::from)
        .on("open", Side::Dst, ".mirrorfs/ledger")?;
    // Without it the entries are kept in memory until there is room.
    let _ = crate::sys::copy::preallocate(file.as_fd(), 0..RESERVED); // As said.
    Ok(file)
}

/// By path, then side or piece of metadata.
pub(super) type Entries = BTreeMap<(String, String), LedgerEntry>;

/// Reads the ledger of a control directory. A last line that a crash cut short is skipped: its mark
/// is still there.
pub fn read(control: BorrowedFd<'_>) -> Result<(Entries, usize)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match rustix::fs::openat(control, FILE, flags, Mode::empty()) {
        Ok(fd) => std::fs::File::from(fd),
        Err(rustix::io::Errno::NOENT) => return Ok((Entries::new(), 0)),
        Err(e) => return Err(e).on("open", Side::Dst, ".mirrorfs/ledger"),
    };
    let mut entries = Entries::new();
    let mut lines = 0;
    for line in BufReader::new(file).split(b'\n').map_while(|l| l.ok()) {
        lines += 1;
        match serde_json::from_slice(&line) {
            Ok(Line::Entry(e)) => {
                entries.insert(e.key(), e);
            }
            Ok(Line::Settled { settled }) => entries.retain(|(p, _), e| *p != settled || !e.data),
            Err(_) => {}
        }
    }
    Ok((entries, lines))
}

fn failure_of(path: &RelPath, error: &Error) -> LedgerEntry {
    let (side, what, errno) = (error.side(), error.what(), error.errno());
    entry(path, side, what, errno, error.to_string(), true)
}

fn entry(
    path: &RelPath,
    side: Side,
    call: &str,
    errno: rustix::io::Errno,
    message: String,
    data: bool,
) -> LedgerEntry {
    let os = PathBuf::from(std::ffi::OsString::from_vec(path.as_bytes().to_vec()));
    let printable = Printable(os.as_os_str()).to_string();
    let exact = printable.as_bytes() == os.as_os_str().as_bytes();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |d| d.as_secs());
    LedgerEntry {
        path_hex: (!exact).then(|| hex(path.as_bytes())),
        path: printable,
        side: side.to_string(),
        call: call.to_owned(),
        errno: errno.raw_os_error(),
        message,
        time_unix: now,
        first_unix: now,
        accepted: false,
        attempts: 1,
        ranges: Vec::new(),
        data,
    }
}

/// Sorted, and what touches is one.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut all: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (from, to) in ranges {
        let is_full = all.len() == RANGES_MAX;
        match all.last_mut() {
            Some(last) if from <= last.1 || is_full => last.1 = last.1.max(to),
            _ => all.push((from, to)),
        }
    }
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &[u8]) -> RelPath {
        RelPath::from_bytes(text).expect("a path")
    }

    fn failure(p: &RelPath) -> Error {
        Error::Call {
            call: "read",
            side: Side::Src,
            path: p.to_path(),
            errno: Errno::IO,
        }
    }

    #[test]
    fn entries_survive_a_restart_and_leave_when_a_later_try_succeeds() {
        let dir = tempfile::tempdir().expect("a directory");
        let control = std::fs::File::open(dir.path()).expect("it opens");
        let (a, b) = (path(b"a"), path(b"x\xff/b"));
        let ledger = Ledger::open(control.as_fd()).expect("opens");
        ledger.record(&a, &failure(&a));
        ledger.record(&a, &failure(&a));
        ledger.record(&b, &failure(&b));
        let refused = crate::meta::Refused {
            what: "user.big".into(),
            errno: Errno::NOSPC,
        };
        ledger.record_refused(&b, &refused);
        assert_eq!(ledger.len(), 3);
        assert_eq!(ledger.entries()[0].attempts, 2);
        ledger.settle(&b);
        let again = Ledger::open(control.as_fd()).expect("opens");
        let left: Vec<_> = again.entries().iter().map(|e| e.call.clone()).collect();
        assert_eq!(left, ["read", "user.big"]);
        // Given up, and then it works all the same.
        assert_eq!((again.accept(&a), again.accept(&b)), (1, 1));
        again.record(&a, &failure(&a));
        let third = Ledger::open(control.as_fd()).expect("opens");
        let a_now = third.entries().remove(0);
        assert!(a_now.accepted && a_now.attempts == 3, "{a_now:?}");
        drop(third);
        again.settle(&a);
        for _ in 0..200 {
            again.record(&b, &failure(&b));
        }
        again.sync(control.as_fd()).expect("syncs");
        assert_eq!(Ledger::open(control.as_fd()).expect("opens").len(), 2);
        let text = std::fs::read_to_string(dir.path().join("ledger")).expect("reads");
        assert_eq!(text.lines().count(), 2);
    }
}
