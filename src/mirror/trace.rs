//! Trace: in which order things were accessed first, so that another mount can have them in that order.
//!
//! The file begins with a line that says what it is. Then come records, each ended by a NUL, because a
//! path may hold anything else:
//!
//!   d PATH              a directory was listed
//!   f PATH              a file was opened
//!   r OFFSET LEN PATH   bytes of a large file were read before it was here
//!
//! Paths are as users see them, below the mount point. A session thread only hands a record over; a
//! thread of its own writes. What there is no room for is left out and counted: a trace is advice.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::Mirror;
use super::node::{Ino, Node, ROOT};
use super::ranged::ReadDone;
use super::source::SrcInfo;
use crate::error::Result;
use crate::sys::name::RelPath;

/// The first line.
const MAGIC: &[u8] = b"mirrorfs trace 1\n";
/// Records that wait for the disk.
const WAITING_MAX: usize = 4096;
/// First accesses that are told apart.
const SEEN_MAX: usize = 1 << 20;
/// Ranges of large files are told in this unit.
const UNIT: u64 = 256 << 10;
/// How long a record stays in memory at the most.
const FLUSH: Duration = Duration::from_secs(1);

/// A first access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traced {
    /// A directory was listed.
    Listed(RelPath),
    /// A file was opened.
    Opened(RelPath),
    /// A part of a large file was read.
    Read(RelPath, Range<u64>),
}

/// Reads a trace, or says in a few words what it is not.
pub fn parse_trace(text: &[u8]) -> Result<Vec<Traced>, String> {
    let records = text
        .strip_prefix(MAGIC)
        .ok_or("not a trace of mirrorfs mount --record")?;
    // What is behind the last NUL is half a record, left by a daemon that was killed.
    let Some(whole) = records.iter().rposition(|b| *b == 0) else {
        return Ok(Vec::new());
    };
    let records = records[..whole].split(|b| *b == 0);
    let all: Option<Vec<Traced>> = records.map(record).collect();
    all.ok_or_else(|| "a record in it is none".to_owned())
}

/// The path of a file: the root is none.
fn file(bytes: &[u8]) -> Option<RelPath> {
    RelPath::from_bytes(bytes).filter(|path| !path.is_root())
}

fn record(bytes: &[u8]) -> Option<Traced> {
    let (kind, rest) = (bytes.get(..2)?, bytes.get(2..)?);
    match kind {
        b"d " => RelPath::from_bytes(rest).map(Traced::Listed),
        b"f " => file(rest).map(Traced::Opened),
        b"r " => {
            let mut fields = rest.splitn(3, |b| *b == b' ');
            let mut number = || {
                std::str::from_utf8(fields.next()?)
                    .ok()?
                    .parse::<u64>()
                    .ok()
            };
            let (offset, len) = (number()?, number()?);
            let path = file(fields.next()?)?;
            Some(Traced::Read(path, offset..offset.checked_add(len)?))
        }
        _ => None,
    }
}

fn encode(access: &Traced) -> Vec<u8> {
    let (mut bytes, path) = match access {
        Traced::Listed(path) => (b"d ".to_vec(), path),
        Traced::Opened(path) => (b"f ".to_vec(), path),
        Traced::Read(path, range) => {
            let len = range.end - range.start;
            (format!("r {} {len} ", range.start).into_bytes(), path)
        }
    };
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    bytes
}

/// Writes first accesses down.
pub struct Recorder {
    tell: Sender<Vec<u8>>,
    told: Receiver<Vec<u8>>,
    seen: Mutex<HashSet<(Ino, u64)>>,
    lost: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Recorder {
        let (tell, told) = bounded(WAITING_MAX);
        Recorder {
            tell,
            told,
            seen: Mutex::default(),
            lost: AtomicU64::new(0),
        }
    }
}

impl Recorder {
    /// Notes an access, if it is the first one.
    fn note(&self, ino: Ino, part: u64, access: impl FnOnce() -> Option<Traced>) {
        {
            let mut seen = self.seen.lock();
            if seen.len() >= SEEN_MAX || !seen.insert((ino, part)) {
                return;
            }
        }
        let Some(access) = access() else { return };
        if self.tell.try_send(encode(&access)).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Ends the thread, after what waits.
    pub(super) fn stop(&self) {
        // With an empty record. Full: the disk does not take them; the thread looks again.
        let _ = self.tell.send_timeout(Vec::new(), FLUSH); // Else the trace lacks its end.
    }

    /// The thread that writes.
    pub(super) fn write(&self, file: File) {
        // After an upgrade of the daemon it goes on.
        let goes_on = file.metadata().is_ok_and(|m| m.len() > 0);
        let mut out = BufWriter::new(file);
        let mut done = match goes_on {
            true => Ok(()),
            false => out.write_all(MAGIC),
        };
        while done.is_ok() {
            done = match self.told.recv_timeout(FLUSH) {
                Ok(record) if record.is_empty() => break,
                Ok(record) => out.write_all(&record),
                Err(_) => out.flush(),
            };
        }
        if let Err(e) = done.and_then(|()| out.flush()) {
            tracing::warn!("trace: write: {e}; it ends here");
        }
        match self.lost.load(Relaxed) {
            0 => {}
            lost => tracing::warn!("trace: {lost} accesses came too fast and are not in it"),
        }
    }
}

impl Mirror {
    /// Writes the trace that was asked for into this file, on a thread of its own.
    pub fn record_into(self: &Arc<Self>, file: File) -> Result<()> {
        *self.trace_file.lock() = Some(file);
        self.spawn("record", |mirror| {
            let file = mirror.trace_file.lock().take();
            if let (Some(recorder), Some(file)) = (&mirror.recorder, file) {
                recorder.write(file);
            }
        })
    }

    /// A directory is listed.
    pub(super) fn trace_listing(&self, node: &Node) {
        if let Some(recorder) = &self.recorder {
            let path = || self.path_in_mount(node).map(Traced::Listed);
            recorder.note(node.ino, 0, path);
        }
    }

    /// A file is opened.
    pub(super) fn trace_open(&self, node: &Node) {
        if let Some(recorder) = &self.recorder {
            let path = || self.path_in_mount(node).map(Traced::Opened);
            recorder.note(node.ino, 0, path);
        }
    }

    /// A part of a pending file is read.
    fn trace_read(&self, node: &Node, range: &Range<u64>) {
        if let Some(recorder) = &self.recorder {
            let start = range.start / UNIT * UNIT;
            let range = start..range.end.next_multiple_of(UNIT);
            let path = || {
                let path = self.path_in_mount(node)?;
                Some(Traced::Read(path, range.clone()))
            };
            recorder.note(node.ino, start + 1, path);
        }
    }

    /// A user reads from a pending file.
    pub(super) fn read_traced(
        self: &Arc<Self>,
        node: &Arc<Node>,
        info: SrcInfo,
        range: Range<u64>,
        then: ReadDone,
    ) {
        self.trace_read(node, &range);
        self.read_range(node, info, range.clone(), then);
        self.read_ahead(node, info, &range);
    }

    /// The path by which it was seen last; `None`: a directory above is not known any more.
    fn path_in_mount(&self, node: &Node) -> Option<RelPath> {
        let mut names = Vec::new();
        let mut place = node.place();
        while let Some(at) = place {
            names.push(at.name);
            place = match at.parent {
                ROOT => None,
                parent => Some(self.nodes.find(parent)?.place()?),
            };
        }
        let join = |path: RelPath, name| path.join(&name);
        Some(names.into_iter().rev().fold(RelPath::root(), join))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::from_bytes(text.as_bytes()).expect("a path")
    }

    #[test]
    fn a_trace_is_read_as_it_was_written_whatever_is_in_the_names() {
        let all = [
            Traced::Listed(RelPath::root()),
            Traced::Listed(path("a b\nc")),
            Traced::Opened(path("d/f x")),
            Traced::Read(path("r 1 2 3/x"), UNIT..3 * UNIT),
        ];
        let mut text = MAGIC.to_vec();
        assert_eq!(parse_trace(&text), Ok(vec![]));
        for access in &all {
            text.extend(encode(access));
        }
        assert_eq!(parse_trace(&text).as_deref(), Ok(&all[..]));
        // Cut anywhere behind the first line it still is one.
        for len in MAGIC.len()..text.len() {
            let some = parse_trace(&text[..len]).expect("a trace");
            assert_eq!(some[..], all[..some.len()]);
        }
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        for bad in [
            "",
            "mirrorfs trace 2\n",
            "mirrorfs trace 1\nx a\0",
            "mirrorfs trace 1\nf /etc/passwd\0",
            "mirrorfs trace 1\nf ../a\0",
            "mirrorfs trace 1\nf \0",
            "mirrorfs trace 1\nr 1 x\0",
            "mirrorfs trace 1\nr 18446744073709551615 1 a\0",
            "mirrorfs trace 1\n\0",
        ] {
            assert!(parse_trace(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
