//! getdents64 as an iterator over raw entries.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, RawDir, SeekFrom};

use super::Result;
use super::name::Name;

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name; `.` and `..` are never reported.
    pub name: Name,
    /// d_ino: the inode number (of the covered directory where something is mounted on it).
    pub ino: u64,
    /// d_type; `Unknown` on file systems that don't tell.
    pub kind: FileType,
    /// Where the next entry starts (d_off): seek here to go on after this entry.
    pub next: u64,
}

/// Calls `each` for the entries of an open directory from offset `from` (0: the start; else an
/// [`Entry::next`]), until the end or until `each` says stop (`false`). Returns true at the end.
pub fn read_dir(
    dir: BorrowedFd<'_>,
    from: u64,
    buf: &mut Vec<u8>,
    mut each: impl FnMut(Entry) -> bool,
) -> Result<bool> {
    if buf.capacity() < 32 * 1024 {
        buf.reserve(64 * 1024);
    }
    rustix::fs::seek(dir, SeekFrom::Start(from))?;
    let mut raw = RawDir::new(dir, buf.spare_capacity_mut());
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let bytes = entry.file_name().to_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        // A name with a slash can only come from a broken or hostile server: it names nothing here.
        let Some(name) = Name::new(bytes) else {
            return Err(rustix::io::Errno::IO);
        };
        let next = entry.next_entry_cookie();
        if !each(Entry {
            name,
            ino: entry.ino(),
            kind: entry.file_type(),
            next,
        }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// All entries of an open directory.
pub fn list(dir: BorrowedFd<'_>) -> Result<Vec<Entry>> {
    let mut buf: Vec<u8> = Vec::with_capacity(64 * 1024);
    let mut all = Vec::new();
    read_dir(dir, 0, &mut buf, |e| {
        all.push(e);
        true
    })?;
    Ok(all)
}
