//! Content: whether two files hold the same bytes. Where both have a hole nothing is read, and of inodes
//! with several names only one name is (`groups`).

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;

use super::groups::Finding;
use super::{Item, Kind, Work};
use crate::error::Side;
use crate::sys::name::RelPath;
use crate::sys::stat::FileKey;
use crate::sys::{copy, fd};

/// Bytes that are read at once on each side.
pub(super) const CHUNK: usize = 256 << 10;
/// A file with more than this left is shared with whoever has nothing to do.
pub(super) const SHARE: u64 = 16 << 20;

/// One thread's buffers.
pub(super) struct Buffers {
    src: Vec<u8>,
    dst: Vec<u8>,
    /// For getdents64.
    pub(super) names: Vec<u8>,
}

impl Buffers {
    pub(super) fn new() -> Buffers {
        Buffers {
            src: vec![0; CHUNK],
            dst: vec![0; CHUNK],
            names: Vec::with_capacity(64 << 10),
        }
    }
}

/// A part of a file of the same size on both sides.
pub(super) struct Slice {
    file: Arc<File>,
    range: Range<u64>,
}

/// A file that is compared.
pub(super) struct File {
    pub(super) path: RelPath,
    pub(super) src: OwnedFd,
    pub(super) dst: OwnedFd,
    /// Worth asking for holes: fewer blocks than bytes on one side.
    pub(super) sparse: bool,
    /// The src inode whose other names are told what is found.
    pub(super) group: Option<FileKey>,
    /// What differs: told, and once is enough.
    pub(super) found: OnceLock<Finding>,
}

impl Slice {
    /// All of a file.
    pub(super) fn whole(file: File, size: u64) -> Slice {
        Slice {
            file: Arc::new(file),
            range: 0..size,
        }
    }
}

impl Work<'_, '_> {
    pub(super) fn slice(&self, buffers: &mut Buffers, slice: Slice) {
        let Slice { file, mut range } = slice;
        while range.start < range.end && file.found.get().is_none() && !self.crew.stopping() {
            if range.end - range.start > SHARE && self.crew.hungry() {
                let middle = range.start + (range.end - range.start) / 2 / 4096 * 4096;
                self.crew.push([Item::Slice(Slice {
                    file: Arc::clone(&file),
                    range: middle..range.end,
                })]);
                range.end = middle;
            }
            match self.chunk(buffers, &file, &range) {
                Ok(next) => range.start = next,
                Err(()) => break,
            }
        }
        // With the last part of it; a run that was stopped has not seen all.
        if let Some(file) = Arc::into_inner(file)
            && !self.crew.stopping()
        {
            self.done(&file.path);
            self.tell_group(&file);
        }
    }

    /// The other names of an inode hold the same bytes.
    fn tell_group(&self, file: &File) {
        let Some(group) = file.group else { return };
        let finding = file.found.get();
        for path in self.shared.groups.compared(group, finding) {
            self.tell_found(&path, finding);
        }
    }

    /// What was found in the content of an inode, by another name.
    pub(super) fn tell_found(&self, path: &RelPath, finding: Option<&Finding>) {
        if let Some((kind, detail)) = finding {
            self.tell(path, *kind, detail.clone());
        }
        self.done(path);
    }

    /// Compares the next chunk of data of a range; returns where to go on. `Err`: reported.
    fn chunk(&self, buffers: &mut Buffers, file: &File, range: &Range<u64>) -> Result<u64, ()> {
        let mut start = range.start;
        let mut end = range.end;
        if file.sparse {
            let extent = |fd: &OwnedFd, side| {
                copy::next_data(fd.as_fd(), range.start, range.end)
                    .map_err(|e| self.failed(file, side, "lseek", e))
            };
            // The nearer data; and only as far as one side is known to have some.
            let found = [extent(&file.src, Side::Src)?, extent(&file.dst, Side::Dst)?];
            let Some(first) = found.into_iter().flatten().min_by_key(|r| r.start) else {
                return Ok(range.end);
            };
            (start, end) = (first.start, first.end);
        }
        let len = usize::try_from(end - start).map_or(CHUNK, |n| n.min(CHUNK));
        let src = self.read(file, &file.src, Side::Src, &mut buffers.src[..len], start)?;
        let dst = self.read(file, &file.dst, Side::Dst, &mut buffers.dst[..len], start)?;
        self.shared.bytes.add(len as u64);
        let (a, b) = (&buffers.src[..src], &buffers.dst[..dst]);
        if a != b {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            let detail = format!("first difference at byte {}", start + same as u64);
            self.found(file, (Kind::Content, detail));
            return Err(());
        }
        if src < len {
            // Both ended early, at the same byte: they shrank while we looked.
            return Ok(range.end);
        }
        Ok(start + len as u64)
    }

    fn read(
        &self,
        file: &File,
        fd: &OwnedFd,
        side: Side,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<usize, ()> {
        fd::pread_all(fd.as_fd(), buf, offset).map_err(|e| self.failed(file, side, "read", e))
    }

    fn failed(&self, file: &File, side: Side, call: &str, errno: Errno) {
        let finding = (Kind::Unreadable, format!("{call} {side}: {errno}"));
        self.found(file, finding);
    }

    fn found(&self, file: &File, (kind, detail): Finding) {
        if file.found.set((kind, detail.clone())).is_ok() {
            self.tell(&file.path, kind, detail);
        }
    }
}

/// Opens a file of either side for reading, without changing its access time where that is
/// allowed (`fd::open_src` is that, and as good for dst).
pub(super) fn open(dir: BorrowedFd<'_>, name: &crate::sys::name::Name) -> Result<OwnedFd, Errno> {
    fd::open_src(dir, name)
}
