//! Line: one entry as a line of mtree(5), and back.
//!
//!   ./a\040b type=file mode=0644 uid=0 gid=0 size=3 time=1700000000.000000001 blake3digest=6437b3...
//!
//! Bytes that are not printable ASCII, the backslash, and what a shell or mtree(8) takes for a pattern
//! or a comment, are a backslash and three octal digits.

use std::ffi::CString;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use super::xattrs::Words;
use super::{Digest, Scope, Xattrs};
use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Stat, Time};

/// What a manifest says of one entry. What is `None` it does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Below the root.
    pub path: RelPath,
    /// The type.
    pub kind: FileType,
    /// Permission bits, setuid, setgid, sticky.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes of a file.
    pub size: Option<u64>,
    /// Modification time.
    pub time: Option<Time>,
    /// src's ctime, of a file whose digest holds as long as src still has it.
    pub ctime: Option<Time>,
    /// Where a symlink points.
    pub link: Option<Vec<u8>>,
    /// Which device a node is, major and minor.
    pub device: Option<(u32, u32)>,
    /// Names of the inode in src, and the inode: of those that have several.
    pub group: Option<(u32, FileKey)>,
    /// Of a file's bytes.
    pub digest: Option<Digest>,
    /// Extended attributes and ACLs.
    pub xattrs: Option<Xattrs>,
}

impl Entry {
    /// An entry of which nothing is known but its type.
    pub fn bare(path: RelPath, kind: FileType) -> Entry {
        Entry {
            path,
            kind,
            mode: None,
            uid: None,
            gid: None,
            size: None,
            time: None,
            ctime: None,
            link: None,
            device: None,
            group: None,
            digest: None,
            xattrs: None,
        }
    }

    /// An entry that is what `stat` says.
    pub fn of(path: RelPath, stat: &Stat) -> Entry {
        let kind = stat.kind();
        let device = [FileType::CharacterDevice, FileType::BlockDevice].contains(&kind);
        Entry {
            // A symlink's means nothing and cannot be set.
            mode: (kind != FileType::Symlink).then(|| stat.perm()),
            uid: Some(stat.uid),
            gid: Some(stat.gid),
            size: stat.is_file().then_some(stat.size),
            time: Some(stat.mtime),
            device: device.then_some(stat.rdev),
            group: (stat.nlink > 1 && !stat.is_dir()).then_some((stat.nlink, stat.key)),
            ..Entry::bare(path, kind)
        }
    }

    /// As `of`, of what a copy of it by us is. `xattrs`: all that were read; `None`: they could not be.
    pub fn copied(
        path: RelPath,
        stat: &Stat,
        xattrs: Option<&[(CString, Vec<u8>)]>,
        scope: Scope,
    ) -> Entry {
        let mut entry = Entry::of(path, stat);
        entry.xattrs = xattrs.map(|read| Xattrs::of(read, scope));
        if !scope.owners {
            // What may belong to another one there, and the bits that would lend it.
            (entry.uid, entry.gid) = (None, None);
            entry.mode = entry.mode.filter(|mode| mode & 0o6000 == 0);
        }
        entry
    }

    /// Appends the line, its end included.
    pub fn write(&self, to: &mut Vec<u8>) {
        escape(&self.path, to);
        let mut word = |text: String| {
            to.push(b' ');
            to.extend_from_slice(text.as_bytes());
        };
        word(format!("type={}", type_word(self.kind)));
        let known = [
            self.mode.map(|mode| format!("mode={mode:04o}")),
            self.uid.map(|uid| format!("uid={uid}")),
            self.gid.map(|gid| format!("gid={gid}")),
            self.size.map(|size| format!("size={size}")),
            self.time.map(|time| format!("time={}", seconds(time))),
            self.ctime.map(|time| format!("ctime={}", seconds(time))),
            self.device
                .map(|(major, minor)| format!("device=linux,{major},{minor}")),
            self.group.map(|(nlink, FileKey { dev, ino })| {
                format!(
                    "nlink={nlink} resdevice=linux,{},{} inode={ino}",
                    dev.0, dev.1
                )
            }),
            self.digest.map(|digest| format!("blake3digest={digest}")),
        ];
        known.into_iter().flatten().for_each(&mut word);
        if let Some(link) = &self.link {
            to.extend_from_slice(b" link=");
            escape_bytes(link, to);
        }
        if let Some(xattrs) = &self.xattrs {
            xattrs.write(to);
        }
        to.push(b'\n');
    }

    /// From a line without its end; `None`: a comment or nothing. The error is why it is neither.
    pub fn parse(line: &[u8]) -> Result<Option<Entry>, String> {
        let mut words = line
            .split(|b| matches!(b, b' ' | b'\t'))
            .filter(|word| !word.is_empty());
        let Some(first) = words.next().filter(|word| word[0] != b'#') else {
            return Ok(None);
        };
        let mut entry = Entry::bare(path(first)?, FileType::Unknown);
        let (mut nlink, mut ino, mut dev) = (None, None, None);
        let mut xattrs = Words::default();
        for word in words {
            let at = word.iter().position(|b| *b == b'=');
            let (key, value) = word.split_at(at.unwrap_or(word.len()));
            let value = value.get(1..).unwrap_or_default();
            let bad = || format!("{}: no such value: {}", text(key), text(value));
            match key {
                b"type" => entry.kind = kind(value).ok_or_else(bad)?,
                b"mode" => entry.mode = Some(octal(value).ok_or_else(bad)?),
                b"uid" => entry.uid = Some(number(value).ok_or_else(bad)?),
                b"gid" => entry.gid = Some(number(value).ok_or_else(bad)?),
                b"size" => entry.size = Some(number(value).ok_or_else(bad)?),
                b"time" => entry.time = Some(time(value).ok_or_else(bad)?),
                b"ctime" => entry.ctime = Some(time(value).ok_or_else(bad)?),
                b"nlink" => nlink = Some(number(value).ok_or_else(bad)?),
                b"inode" => ino = Some(number(value).ok_or_else(bad)?),
                b"device" => entry.device = Some(device(value).ok_or_else(bad)?),
                b"resdevice" => dev = Some(device(value).ok_or_else(bad)?),
                b"link" => entry.link = Some(unescape(value).ok_or_else(bad)?),
                b"blake3digest" => entry.digest = Some(Digest::from_hex(value).ok_or_else(bad)?),
                // Other tools' words say nothing to us.
                _ => xattrs.add(key, value).unwrap_or(Some(())).ok_or_else(bad)?,
            }
        }
        if entry.kind == FileType::Unknown {
            return Err("it has no type=".into());
        }
        if let (Some(nlink), Some(ino), Some(dev)) = (nlink, ino, dev) {
            entry.group = Some((nlink, FileKey { dev, ino }));
        }
        entry.xattrs = xattrs.end();
        Ok(Some(entry))
    }
}

/// A ctime this young may be the same after another change: clocks of file systems are coarse.
const YOUNG_S: i64 = 2;

/// True when another change would give the file another ctime. To be asked before it is read.
pub fn is_settled(src: &Stat) -> bool {
    is_settled_at(src, SystemTime::now())
}

/// As `is_settled`, of a file that was read from `begun` on.
pub fn is_settled_at(src: &Stat, begun: SystemTime) -> bool {
    let now = begun.duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(i64::MAX));
    src.ctime.sec < now.saturating_sub(YOUNG_S)
}

const TYPES: [(FileType, &str); 7] = [
    (FileType::RegularFile, "file"),
    (FileType::Directory, "dir"),
    (FileType::Symlink, "link"),
    (FileType::Fifo, "fifo"),
    (FileType::Socket, "socket"),
    (FileType::CharacterDevice, "char"),
    (FileType::BlockDevice, "block"),
];

fn type_word(kind: FileType) -> &'static str {
    let found = TYPES.iter().find(|(k, _)| *k == kind);
    found.map_or("file", |(_, word)| word)
}

fn kind(word: &[u8]) -> Option<FileType> {
    let found = TYPES.iter().find(|(_, w)| w.as_bytes() == word);
    found.map(|(kind, _)| *kind)
}

/// Nanoseconds with all their digits: who reads them as a fraction and who as a number agree.
fn seconds(time: Time) -> String {
    format!("{}.{:09}", time.sec, time.nsec)
}

fn time(word: &[u8]) -> Option<Time> {
    let word = str::from_utf8(word).ok()?;
    let (sec, nsec) = word.split_once('.').unwrap_or((word, "000000000"));
    let digits = nsec.len() == 9 && nsec.bytes().all(|b| b.is_ascii_digit());
    Some(Time {
        sec: sec.parse().ok()?,
        nsec: digits.then(|| nsec.parse().ok())??,
    })
}

fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    str::from_utf8(word).ok()?.parse().ok()
}

fn octal(word: &[u8]) -> Option<u32> {
    let mode = u32::from_str_radix(str::from_utf8(word).ok()?, 8).ok()?;
    (mode <= 0o7777).then_some(mode)
}

/// `linux,MAJOR,MINOR`.
fn device(word: &[u8]) -> Option<(u32, u32)> {
    let rest = word.strip_prefix(b"linux,")?;
    let at = rest.iter().position(|b| *b == b',')?;
    Some((number(&rest[..at])?, number(&rest[at + 1..])?))
}

/// `.`, or what begins with `./`.
fn path(word: &[u8]) -> Result<RelPath, String> {
    let bytes = unescape(word).ok_or_else(|| format!("no such path: {}", text(word)))?;
    if bytes == b"." {
        return Ok(RelPath::root());
    }
    let below = bytes.strip_prefix(b"./").filter(|below| !below.is_empty());
    let found = below.and_then(RelPath::from_bytes);
    found.ok_or_else(|| format!("not a path below the root, ./...: {}", text(word)))
}

fn escape(path: &RelPath, to: &mut Vec<u8>) {
    to.push(b'.');
    if !path.is_root() {
        to.push(b'/');
        escape_bytes(path.as_bytes(), to);
    }
}

pub(super) fn escape_bytes(bytes: &[u8], to: &mut Vec<u8>) {
    for b in bytes {
        match b {
            b'\\' | b'#' | b'*' | b'?' | b'[' => {}
            0x21..=0x7e => {
                to.push(*b);
                continue;
            }
            _ => {}
        }
        to.extend_from_slice(format!("\\{b:03o}").as_bytes());
    }
}

pub(super) fn unescape(word: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((b, after)) = rest.split_first() {
        rest = after;
        if *b != b'\\' {
            out.push(*b);
            continue;
        }
        let (digits, after) = rest.split_at_checked(3)?;
        let octal = digits.iter().all(|d| (b'0'..=b'7').contains(d));
        let value = octal.then(|| digits.iter().fold(0u32, |n, d| n * 8 + u32::from(d - b'0')))?;
        out.push(u8::try_from(value).ok()?);
        rest = after;
    }
    Some(out)
}

/// A piece of a line for a message.
fn text(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 60;
    let (shown, dots) = match bytes.split_at_checked(SHOWN_MAX) {
        Some((shown, rest)) if !rest.is_empty() => (shown, "..."),
        _ => (bytes, ""),
    };
    let shown = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(shown);
    format!("\"{}{dots}\"", crate::error::Printable(shown))
}
