//! The comparer: what a tree is, as a list of facts, and how two such lists differ.
//!
//! Independent of the program: it shares no code with `verify`. Names are walked by directory fd,
//! so paths may be longer than PATH_MAX, and nothing is read in a way that changes access times.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use xxhash_rust::xxh3::Xxh3;

/// Differences that are printed; all are counted.
const SHOWN_MAX: usize = 30;
/// Allocation may differ by this much, or by a twentieth.
const HOLES_TOLERANCE: u64 = 256 << 10;
/// Bytes of content that one look reads.
const BLOCK: usize = 256 << 10;

/// Everything that is compared about one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: FileType,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Not of directories: file systems count theirs differently.
    pub(crate) size: u64,
    pub(crate) allocated: u64,
    pub(crate) mtime: (i64, u32),
    pub(crate) atime: (i64, u32),
    pub(crate) rdev: u64,
    /// Not of directories.
    pub(crate) nlink: u64,
    pub(crate) ino: u64,
    pub(crate) target: Vec<u8>,
    /// A hash of the content that does not see where the holes are, or why it cannot be read.
    pub(crate) content: String,
    pub(crate) xattrs: BTreeMap<String, String>,
    /// The first name, in order, of the same inode.
    pub(crate) first_name: Vec<u8>,
}

impl Entry {
    pub(crate) fn has_xattr(&self, name: &str) -> bool {
        self.xattrs.contains_key(name)
    }
}

/// A tree, by relative path; the root is the empty path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manifest(BTreeMap<Vec<u8>, Entry>);

impl Manifest {
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&[u8], &Entry)> {
        self.0.iter().map(|(path, entry)| (path.as_slice(), entry))
    }
}

/// What is not compared. The default leaves out access times only.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ignore {
    pub(crate) atime: bool,
    pub(crate) allocated: bool,
    pub(crate) content: bool,
    /// Link counts and which names share an inode.
    pub(crate) links: bool,
    pub(crate) mtime: bool,
    /// Two times that are both from the last hour: the same thing was done here and there.
    pub(crate) recent_mtime: bool,
}

impl Default for Ignore {
    fn default() -> Ignore {
        Ignore {
            atime: true,
            allocated: false,
            content: false,
            links: false,
            mtime: false,
            recent_mtime: false,
        }
    }
}

/// Bytes of a path as text.
pub(crate) fn show(path: &[u8]) -> String {
    if path.is_empty() {
        ".".to_owned()
    } else {
        path.escape_ascii().to_string()
    }
}

/// Reads a whole tree.
#[track_caller]
pub(crate) fn manifest(root: &Path) -> Manifest {
    read_tree(root, true)
}

/// Reads a whole tree except what its files contain.
#[track_caller]
pub(crate) fn manifest_without_content(root: &Path) -> Manifest {
    read_tree(root, false)
}

#[track_caller]
fn read_tree(root: &Path, content: bool) -> Manifest {
    let fd = open(
        rustix::fs::CWD,
        root.as_os_str().as_bytes(),
        OFlags::DIRECTORY,
    )
    .unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut all = Manifest::default();
    let stat = rustix::fs::fstat(&fd).unwrap();
    all.0
        .insert(Vec::new(), entry(fd.as_fd(), b".", &stat, b"", content));
    walk(fd.as_fd(), &mut Vec::new(), stat.st_dev, content, &mut all);
    let mut first: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for (path, entry) in &mut all.0 {
        if entry.kind != FileType::Directory {
            entry.first_name = first
                .entry(entry.ino)
                .or_insert_with(|| path.clone())
                .clone();
        }
    }
    all
}

fn open(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(dir, name, flags, Mode::empty()),
        other => other,
    }
}

fn walk(dir: BorrowedFd<'_>, path: &mut Vec<u8>, dev: u64, content: bool, all: &mut Manifest) {
    let mut names = Vec::new();
    for item in Dir::read_from(dir).unwrap_or_else(|e| panic!("{}: readdir: {e}", show(path))) {
        let item = item.unwrap_or_else(|e| panic!("{}: readdir: {e}", show(path)));
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    let listed = names.len();
    names.sort();
    names.dedup();
    assert_eq!(
        listed,
        names.len(),
        "{}: readdir gives a name twice",
        show(path)
    );
    for name in names {
        let len = path.len();
        if len > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let stat = rustix::fs::statat(dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)
            .unwrap_or_else(|e| panic!("{}: listed, but stat says {e}", show(path)));
        all.0
            .insert(path.clone(), entry(dir, &name, &stat, path, content));
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && stat.st_dev == dev {
            let sub = open(dir, &name, OFlags::DIRECTORY)
                .unwrap_or_else(|e| panic!("{}: open: {e}", show(path)));
            walk(sub.as_fd(), path, dev, content, all);
        }
        path.truncate(len);
    }
}

fn entry(dir: BorrowedFd<'_>, name: &[u8], stat: &Stat, path: &[u8], content: bool) -> Entry {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut stat = *stat;
    let mut hash = String::new();
    if kind == FileType::RegularFile && content {
        match hash_content(dir, name) {
            // A file that was hydrated by being read has got its blocks by now.
            Ok((text, later)) => (hash, stat.st_blocks) = (text, later.st_blocks),
            Err(e) => hash = format!("unreadable: {e}"),
        }
    }
    let is_dir = kind == FileType::Directory;
    Entry {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if is_dir { 0 } else { stat.st_size as u64 },
        allocated: if kind == FileType::RegularFile {
            stat.st_blocks as u64 * 512
        } else {
            0
        },
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        atime: (stat.st_atime, stat.st_atime_nsec as u32),
        rdev: match kind {
            FileType::CharacterDevice | FileType::BlockDevice => stat.st_rdev,
            _ => 0,
        },
        nlink: if is_dir { 0 } else { stat.st_nlink },
        ino: stat.st_ino,
        target: match kind {
            FileType::Symlink => rustix::fs::readlinkat(dir, name, Vec::new())
                .unwrap_or_else(|e| panic!("{}: readlink: {e}", show(path)))
                .into_bytes(),
            _ => Vec::new(),
        },
        content: hash,
        xattrs: xattrs(dir, name).unwrap_or_else(|e| panic!("{}: listxattr: {e}", show(path))),
        first_name: Vec::new(),
    }
}

/// A hash over (offset, bytes) of the blocks that are not all zeros: equal for equal content,
/// wherever the holes are. Only what SEEK_DATA shows is read, so a terabyte of hole is free.
fn hash_content(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(String, Stat), Errno> {
    let fd = open(dir, name, OFlags::empty())?;
    let size = rustix::fs::fstat(&fd)?.st_size as u64;
    let mut hash = Xxh3::new();
    let mut buf = vec![0; BLOCK];
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(&fd, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e),
        };
        let end = rustix::fs::seek(&fd, SeekFrom::Hole(start))?;
        // Whole pages, at page borders: the same pieces whatever the extents are.
        at = start & !4095;
        while at < end {
            let want = BLOCK.min((end - at) as usize);
            let n = rustix::io::pread(&fd, &mut buf[..want], at)?;
            if n == 0 {
                return Ok((format!("ends at {at} of {size}"), rustix::fs::fstat(&fd)?));
            }
            for (i, page) in buf[..n].chunks(4096).enumerate() {
                // The end of a page may be cut off by the extent's end: zeros are not counted.
                let used = page.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
                if used > 0 {
                    hash.update(&(at + i as u64 * 4096).to_le_bytes());
                    hash.update(&page[..used]);
                }
            }
            at += n as u64;
            if n < want && at % 4096 != 0 && at < size {
                at &= !4095;
                return Ok((
                    format!("short read at {at} of {size}"),
                    rustix::fs::fstat(&fd)?,
                ));
            }
        }
        at = end;
    }
    Ok((
        format!("{:032x}", hash.digest128()),
        rustix::fs::fstat(&fd)?,
    ))
}

fn xattrs(dir: BorrowedFd<'_>, name: &[u8]) -> Result<BTreeMap<String, String>, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(&path));
    let mut list = vec![0; 64 << 10];
    let n = match rustix::fs::llistxattr(&path, &mut list) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    let mut all = BTreeMap::new();
    for name in list[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        // How xfs stores the ACLs that it also lists under their own names.
        if name.starts_with(b"trusted.SGI_ACL_") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let n = match rustix::fs::lgetxattr(&path, name, &mut value) {
            // btrfs lists its compression property on some files that then have none.
            Err(Errno::NODATA) => continue,
            other => other?,
        };
        all.insert(
            name.escape_ascii().to_string(),
            value[..n].escape_ascii().to_string(),
        );
    }
    Ok(all)
}

/// How `b` differs from `a`, one line each.
pub(crate) fn differences(a: &Manifest, b: &Manifest, ignore: Ignore) -> Vec<String> {
    let mut found = Vec::new();
    for path in a.0.keys().filter(|p| !b.0.contains_key(*p)) {
        found.push(format!("{}: missing", show(path)));
    }
    for (path, y) in &b.0 {
        match a.0.get(path) {
            None => found.push(format!("{}: should not be there", show(path))),
            Some(x) => compare_entries(&show(path), x, y, ignore, &mut found),
        }
    }
    found
}

fn compare_entries(path: &str, a: &Entry, b: &Entry, ignore: Ignore, found: &mut Vec<String>) {
    let mut check = |what: &str, a: &dyn fmt::Debug, b: &dyn fmt::Debug, same: bool| {
        if !same {
            found.push(format!("{path}: {what}: {a:?}, but is {b:?}"));
        }
    };
    macro_rules! same {
        ($($field:ident),*) => {$(
            check(stringify!($field), &a.$field, &b.$field, a.$field == b.$field);
        )*};
    }
    if a.kind != b.kind {
        check("kind", &a.kind, &b.kind, false);
        return;
    }
    if a.mode != b.mode {
        check(
            "mode",
            &format!("{:o}", a.mode),
            &format!("{:o}", b.mode),
            false,
        );
    }
    same!(uid, gid, size, rdev);
    if a.target != b.target {
        check("target", &show(&a.target), &show(&b.target), false);
    }
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let recent = |sec: i64| sec.abs_diff(now as i64) < 3600;
    let both_recent = recent(a.mtime.0) && recent(b.mtime.0);
    if !(ignore.mtime || ignore.recent_mtime && both_recent) {
        same!(mtime);
    }
    // readlink changes a symlink's access time and nothing can be done about it.
    if !ignore.atime && a.kind != FileType::Symlink {
        same!(atime);
    }
    if !ignore.content && !a.content.is_empty() && !b.content.is_empty() {
        same!(content);
    }
    if !ignore.allocated {
        let close = HOLES_TOLERANCE.max(a.allocated.max(b.allocated) / 20);
        let same = a.allocated.abs_diff(b.allocated) <= close;
        check("allocated", &a.allocated, &b.allocated, same);
    }
    if !ignore.links {
        same!(nlink);
        if a.first_name != b.first_name {
            check(
                "first of its links",
                &show(&a.first_name),
                &show(&b.first_name),
                false,
            );
        }
    }
    for name in a
        .xattrs
        .keys()
        .chain(b.xattrs.keys().filter(|n| !a.xattrs.contains_key(*n)))
    {
        let (x, y) = (a.xattrs.get(name), b.xattrs.get(name));
        check(&format!("xattr {name}"), &x, &y, x == y);
    }
}

/// Fails the test unless two trees are equal.
#[track_caller]
pub(crate) fn expect_equal(a: &Manifest, b: &Manifest) {
    expect_equal_with(a, b, Ignore::default());
}

/// Fails the test unless two trees are equal in what is not ignored.
#[track_caller]
pub(crate) fn expect_equal_with(a: &Manifest, b: &Manifest, ignore: Ignore) {
    let found = differences(a, b, ignore);
    assert!(
        found.is_empty(),
        "{} differences:\n{}",
        found.len(),
        found[..found.len().min(SHOWN_MAX)].join("\n")
    );
}
