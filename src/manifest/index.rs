//! Index: where in a manifest a path's line is. 16 bytes of memory for each line, whatever the names.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use xxhash_rust::xxh3::xxh3_64;

use super::{Digest, END, Entry, HEADER, HEADER_ANY, SIGNATURE};
use crate::error::Printable;
use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Stat};

/// A line of this length is none of ours: paths are at most some thousand bytes, four for each.
const LINE_MAX: usize = 1 << 20;

/// Why a manifest cannot be used.
#[derive(Debug)]
pub struct Trouble {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1; 0: of none.
    pub line: u64,
    /// One line.
    pub why: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = Printable(self.path.as_os_str());
        match self.line {
            0 => write!(f, "manifest \"{path}\": {}", self.why),
            line => write!(f, "manifest \"{path}\": line {line}: {}", self.why),
        }
    }
}

/// A manifest, open to be asked.
pub struct Index {
    file: File,
    path: PathBuf,
    /// Hash of the path and place of the line, in order.
    lines: Vec<(u64, u64)>,
    /// Likewise, by the inode in src: of files with several names and a digest.
    groups: Vec<(u64, u64)>,
    /// A bit for each line that was asked for.
    asked: Vec<AtomicU64>,
    /// The run that wrote it came to its end.
    ended: bool,
}

/// What was read of a manifest.
pub(super) struct Scan {
    pub(super) index: Index,
    /// The file is good up to here.
    pub(super) good: u64,
    /// What is behind that.
    pub(super) bad: Option<Trouble>,
}

impl Index {
    /// Reads a manifest that somebody wants to rely on: each of its lines is good, or it is refused. Only
    /// its last line may be torn, where its run was killed.
    pub fn open(path: &Path) -> Result<Index, Trouble> {
        let trouble = |e: io::Error| io_trouble(path, "open", &e);
        let file = File::open(path).map_err(trouble)?;
        let scan = scan(file, path)?;
        match scan.bad {
            Some(bad) if bad.line > 0 => Err(bad),
            _ => Ok(scan.index),
        }
    }

    /// True when the run that wrote it came to its end.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What the manifest says of a path; it counts as asked for.
    pub fn get(&self, path: &RelPath) -> Result<Option<Entry>, Trouble> {
        let hash = hash(path);
        let first = self.lines.partition_point(|(h, _)| *h < hash);
        let mut found = None;
        for (at, (_, offset)) in self.lines.iter().enumerate().skip(first) {
            if self.lines[at].0 != hash {
                break;
            }
            // The same hash: most probably the same path, which then was told of several times.
            let entry = self.read(*offset)?;
            if entry.path == *path {
                self.asked[at / 64].fetch_or(1 << (at % 64), Relaxed);
                found = Some(entry);
            }
        }
        Ok(found)
    }

    /// The digest that it has of a file, by this name or another, if the file has not changed since.
    pub fn known(&self, path: &RelPath, src: &Stat) -> Option<Digest> {
        let same = |entry: &Entry| {
            entry.size == Some(src.size)
                && entry.time == Some(src.mtime)
                && entry.ctime == Some(src.ctime)
        };
        // A manifest that cannot be read any more only costs another reading of the file.
        let by_name = self.get(path).ok().flatten().filter(same);
        by_name.and_then(|entry| entry.digest).or_else(|| {
            let hash = hash_of(&src.key);
            let first = self.groups.partition_point(|(h, _)| *h < hash);
            let all = self.groups.get(first..)?.iter();
            let mut all = all.take_while(|(h, _)| *h == hash && src.nlink > 1);
            all.find_map(|(_, offset)| {
                let entry = self.read(*offset).ok()?;
                let its = entry.group.is_some_and(|(_, key)| key == src.key);
                entry.digest.filter(|_| its && same(&entry))
            })
        })
    }

    /// Each path that nobody has asked for, once.
    pub fn rest(&self, mut on: impl FnMut(Entry)) -> Result<(), Trouble> {
        for (at, (_, offset)) in self.lines.iter().enumerate() {
            if self.asked[at / 64].load(Relaxed) & 1 << (at % 64) == 0 {
                let path = self.read(*offset)?.path;
                if let Some(entry) = self.get(&path)? {
                    on(entry);
                }
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64) -> Result<Entry, Trouble> {
        let trouble = |e: io::Error| io_trouble(&self.path, "read", &e);
        let mut line = vec![0; 512];
        let mut len = 0;
        loop {
            let n = self.file.read_at(&mut line[len..], offset + len as u64);
            let n = n.map_err(trouble)?;
            let end = line[len..len + n].iter().position(|b| *b == b'\n');
            len += end.unwrap_or(n);
            if end.is_some() || n == 0 || len > LINE_MAX {
                break;
            }
            if len == line.len() {
                line.resize(2 * len, 0);
            }
        }
        match Entry::parse(&line[..len]) {
            Ok(Some(entry)) => Ok(entry),
            Ok(None) | Err(_) => Err(Trouble {
                path: self.path.clone(),
                line: 0,
                why: "it was changed while it was read".into(),
            }),
        }
    }
}

fn hash_of(inode: &FileKey) -> u64 {
    let FileKey { dev, ino } = inode;
    let [a, b] = [dev.0, dev.1].map(u32::to_le_bytes);
    xxh3_64(&[&a[..], &b, &ino.to_le_bytes()].concat())
}

fn hash(path: &RelPath) -> u64 {
    xxh3_64(path.as_bytes())
}

pub(super) fn io_trouble(path: &Path, call: &str, error: &io::Error) -> Trouble {
    Trouble {
        path: path.to_path_buf(),
        line: 0,
        why: format!("{call}: {error}"),
    }
}

/// Reads all lines. An error: it is no manifest of ours, or cannot be read.
pub(super) fn scan(file: File, path: &Path) -> Result<Scan, Trouble> {
    let trouble = |line: u64, why: String| Trouble {
        path: path.to_path_buf(),
        line,
        why,
    };
    let fail = |e: io::Error| io_trouble(path, "read", &e);
    let mut reader = BufReader::with_capacity(256 << 10, &file);
    let mut hasher = blake3::Hasher::new();
    let (mut lines, mut ended, mut bad) = (Vec::new(), false, None);
    let mut groups = Vec::new();
    let (mut offset, mut number) = (0u64, 0u64);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = reader.by_ref().take(LINE_MAX as u64);
        let read = limited.read_until(b'\n', &mut line).map_err(fail)?;
        if read == 0 {
            break;
        }
        number += 1;
        match number {
            1 if line != SIGNATURE => {
                return Err(trouble(0, "it is not a manifest of mirrorfs".into()));
            }
            2 if line != HEADER && line.starts_with(HEADER_ANY) => {
                return Err(trouble(2, "it is of another version of mirrorfs".into()));
            }
            2 if line != HEADER => {
                return Err(trouble(0, "it is not a manifest of mirrorfs".into()));
            }
            1 | 2 => {}
            _ => {
                let Some(body) = line.strip_suffix(b"\n") else {
                    // Of a run that was killed while it wrote, or of no line that anybody wrote.
                    let number = if line.len() < LINE_MAX { 0 } else { number };
                    bad = Some(trouble(number, "the last line is not whole".into()));
                    ended = false;
                    break;
                };
                match Entry::parse(body) {
                    Ok(Some(entry)) => {
                        ended = false;
                        lines.push((hash(&entry.path), offset));
                        if let (Some((_, key)), Some(_)) = (entry.group, entry.digest) {
                            groups.push((hash_of(&key), offset));
                        }
                    }
                    Ok(None) if body.starts_with(END) => {
                        ended = true;
                        let want = end_line(lines.len() as u64, &hasher);
                        if line != want.as_bytes() {
                            let why = "the lines before it were changed since they were written";
                            bad = Some(trouble(number, why.into()));
                            // Nobody knows which: none of them serves another run.
                            (lines, groups) = (Vec::new(), Vec::new());
                            offset = 0;
                            break;
                        }
                    }
                    Ok(None) => {}
                    Err(why) => {
                        bad = Some(trouble(number, why));
                        break;
                    }
                }
            }
        }
        hasher.update(&line);
        offset += read as u64;
    }
    if number < 2 && number > 0 {
        return Err(trouble(0, "it is not a manifest of mirrorfs".into()));
    }
    lines.sort_unstable();
    groups.sort_unstable();
    let asked = (0..lines.len().div_ceil(64)).map(|_| AtomicU64::new(0));
    Ok(Scan {
        index: Index {
            asked: asked.collect(),
            file,
            path: path.to_path_buf(),
            lines,
            groups,
            ended,
        },
        good: offset,
        bad,
    })
}

/// The last line of a run that came to its end: how many entries are before it, and the BLAKE3 of all
/// that is before it.
pub(super) fn end_line(entries: u64, before: &blake3::Hasher) -> String {
    format!(
        "# end {entries} entries, blake3 {}\n",
        before.finalize().to_hex()
    )
}
