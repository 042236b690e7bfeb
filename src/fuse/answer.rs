//! What an answer is in the protocol's bytes, behind the reply's header.

use std::time::Duration;

use super::abi::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, FOPEN_PASSTHROUGH};
use super::passthrough::IoMode;
use crate::mirror::{Attr, Ino};
use crate::sys::dir::Entry as DirEntry;
use crate::sys::host::FsStat;

/// The longest answer of fixed length: struct fuse_entry_out and struct fuse_open_out.
const FIXED_MAX: usize = 144;

/// An answer of fixed length, as it is put together.
pub(super) struct Fixed {
    bytes: [u8; FIXED_MAX],
    len: usize,
}

impl Fixed {
    pub(super) fn new() -> Fixed {
        Fixed {
            bytes: [0; FIXED_MAX],
            len: 0,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Fixed {
        let end = self.len + bytes.len();
        self.bytes[self.len..end].copy_from_slice(bytes);
        self.len = end;
        self
    }

    fn u32(&mut self, value: u32) -> &mut Fixed {
        self.put(&value.to_ne_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Fixed {
        self.put(&value.to_ne_bytes())
    }

    /// struct fuse_attr.
    fn attr(&mut self, ino: Ino, attr: &Attr) -> &mut Fixed {
        let s = &attr.stat;
        let times = [s.atime, s.mtime, s.ctime];
        self.u64(ino).u64(s.size).u64(s.blocks);
        times.iter().for_each(|t| {
            self.u64(t.sec.cast_unsigned());
        });
        times.iter().for_each(|t| {
            self.u32(t.nsec);
        });
        self.u32(s.mode).u32(s.nlink).u32(s.uid).u32(s.gid);
        self.u32(new_encode_dev(s.rdev)).u32(s.blksize).u32(0)
    }
}

/// The protocol's device numbers are the kernel's new_encode_dev: 12 bits major, 20 bits minor.
fn new_encode_dev((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The inverse: what mknod(2) wants.
pub(super) fn decode_dev(dev: u32) -> u64 {
    rustix::fs::makedev((dev & 0xfff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xfff00))
}

/// What a reply can carry.
pub(super) trait Answer {
    /// The part of fixed length.
    fn fixed(&self, out: &mut Fixed);

    /// What follows it.
    fn data(&self) -> &[u8] {
        &[]
    }
}

/// It is done.
pub(super) struct Done;

impl Answer for Done {
    fn fixed(&self, _: &mut Fixed) {}
}

/// struct fuse_entry_out: a name's inode.
pub(super) struct Entry {
    pub(super) ino: Ino,
    pub(super) generation: u64,
    pub(super) attr: Attr,
    /// How long the kernel may keep the name, the attributes.
    pub(super) entry_ttl: Duration,
    pub(super) attr_ttl: Duration,
}

impl Answer for Entry {
    fn fixed(&self, out: &mut Fixed) {
        out.u64(self.ino).u64(self.generation);
        out.u64(self.entry_ttl.as_secs())
            .u64(self.attr_ttl.as_secs());
        out.u32(self.entry_ttl.subsec_nanos())
            .u32(self.attr_ttl.subsec_nanos());
        out.attr(self.ino, &self.attr);
    }
}

/// What a name is: an inode, or nothing for so long. The kernel takes a name that is made through the
/// mount for what it is then.
pub(super) enum Found {
    Entry(Entry),
    Nothing(Duration),
}

impl Answer for Found {
    fn fixed(&self, out: &mut Fixed) {
        match self {
            Found::Entry(entry) => entry.fixed(out),
            // Inode 0: there is none.
            Found::Nothing(ttl) => {
                out.u64(0).u64(0).u64(ttl.as_secs()).u64(0);
                out.u32(ttl.subsec_nanos()).u32(0).put(&[0; 88]);
            }
        }
    }
}

/// struct fuse_attr_out.
pub(super) struct Attributes {
    pub(super) ino: Ino,
    pub(super) attr: Attr,
    pub(super) ttl: Duration,
}

impl Answer for Attributes {
    fn fixed(&self, out: &mut Fixed) {
        out.u64(self.ttl.as_secs())
            .u32(self.ttl.subsec_nanos())
            .u32(0);
        out.attr(self.ino, &self.attr);
    }
}

/// struct fuse_open_out: a handle, and how the kernel uses it.
pub(super) struct Opened {
    pub(super) handle: u64,
    pub(super) how: How,
}

/// How the kernel uses an open file, or an open directory.
pub(super) enum How {
    File(IoMode),
    /// `complete`: the kernel may keep what is listed, until it changes a name there itself.
    Dir {
        complete: bool,
    },
}

impl Answer for Opened {
    fn fixed(&self, out: &mut Fixed) {
        let (flags, backing) = match &self.how {
            How::File(IoMode::Cached { keep: false }) | How::Dir { complete: false } => (0, 0),
            How::File(IoMode::Cached { keep: true }) => (FOPEN_KEEP_CACHE, 0),
            How::Dir { complete: true } => (FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR, 0),
            How::File(IoMode::Passthrough(id)) => (FOPEN_PASSTHROUGH, id.number()),
        };
        out.u64(self.handle).u32(flags).u32(backing.cast_unsigned());
    }
}

/// A new file, open.
pub(super) struct Created(pub(super) Entry, pub(super) Opened);

impl Answer for Created {
    fn fixed(&self, out: &mut Fixed) {
        self.0.fixed(out);
        self.1.fixed(out);
    }
}

/// Bytes: of a file, of a symlink's target, of a list.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Answer for Bytes {
    fn fixed(&self, _: &mut Fixed) {}

    fn data(&self) -> &[u8] {
        &self.0
    }
}

/// How many bytes: written, copied, or what an xattr has.
pub(super) struct Count(pub(super) u32);

impl Answer for Count {
    fn fixed(&self, out: &mut Fixed) {
        out.u32(self.0).u32(0);
    }
}

/// An xattr, or its length where only that was asked for.
pub(super) enum Xattr {
    Size(u32),
    Value(Vec<u8>),
}

impl Answer for Xattr {
    fn fixed(&self, out: &mut Fixed) {
        if let Xattr::Size(size) = self {
            Count(*size).fixed(out);
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            Xattr::Size(_) => &[],
            Xattr::Value(value) => value,
        }
    }
}

/// A place in a file.
pub(super) struct Offset(pub(super) u64);

impl Answer for Offset {
    fn fixed(&self, out: &mut Fixed) {
        out.u64(self.0);
    }
}

/// struct fuse_kstatfs.
pub(super) struct Statfs(pub(super) FsStat);

impl Answer for Statfs {
    fn fixed(&self, out: &mut Fixed) {
        let s = &self.0;
        out.u64(s.blocks).u64(s.bfree).u64(s.bavail);
        out.u64(s.files).u64(s.ffree);
        out.u32(s.bsize as u32).u32(s.namelen as u32);
        out.u32(s.frsize as u32).put(&[0; 28]);
    }
}

/// The entries of a directory, as many as the kernel has room for.
pub(super) struct Entries {
    bytes: Vec<u8>,
    max: usize,
}

impl Entries {
    pub(super) fn with_room(size: u32) -> Entries {
        // As much as the kernel wants; a large buffer is touched only as far as it is filled.
        Entries {
            bytes: Vec::with_capacity((size as usize).min(1 << 20)),
            max: size as usize,
        }
    }

    /// struct fuse_dirent, alone or behind a struct fuse_entry_out. False: there is no room left.
    pub(super) fn add(&mut self, plus: Option<&Entry>, dirent: &Dirent<'_>) -> bool {
        let mut fixed = Fixed::new();
        if let Some(entry) = plus {
            entry.fixed(&mut fixed);
        }
        let name = dirent.name;
        // The names of dst's own file system: 255 bytes at most, below any 32-bit limit.
        let name_len = name.len() as u32;
        let len = fixed.len + 24 + name.len();
        let padded = len.next_multiple_of(8);
        if self.bytes.len() + padded > self.max {
            return false;
        }
        self.bytes.extend_from_slice(fixed.bytes());
        self.bytes.extend_from_slice(&dirent.ino.to_ne_bytes());
        self.bytes.extend_from_slice(&dirent.next.to_ne_bytes());
        self.bytes.extend_from_slice(&name_len.to_ne_bytes());
        self.bytes.extend_from_slice(&dirent.kind.to_ne_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len() + padded - len, 0);
        true
    }
}

impl Answer for Entries {
    fn fixed(&self, _: &mut Fixed) {}

    fn data(&self) -> &[u8] {
        &self.bytes
    }
}

/// One name of a directory.
pub(super) struct Dirent<'a> {
    pub(super) ino: Ino,
    /// The offset that the next one is asked for with.
    pub(super) next: u64,
    /// DT_DIR and so on.
    pub(super) kind: u32,
    pub(super) name: &'a [u8],
}

impl<'a> Dirent<'a> {
    pub(super) fn dir(ino: Ino, next: u64, name: &'a [u8]) -> Dirent<'a> {
        Dirent {
            ino,
            next,
            kind: dirent_kind(rustix::fs::FileType::Directory),
            name,
        }
    }

    pub(super) fn of(entry: &'a DirEntry, ino: Ino) -> Dirent<'a> {
        Dirent {
            ino,
            next: entry.next,
            kind: dirent_kind(entry.kind),
            name: entry.name.as_bytes(),
        }
    }
}

/// DT_*: the type bits of st_mode, shifted.
fn dirent_kind(kind: rustix::fs::FileType) -> u32 {
    kind.as_raw_mode() >> 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(1, 3), (259, 70_000), (4095, 0xfffff)] {
            let back = decode_dev(new_encode_dev((major, minor)));
            assert_eq!(back, rustix::fs::makedev(major, minor));
        }
    }

    #[test]
    fn entries_stop_where_the_room_ends_and_are_aligned() {
        let mut entries = Entries::with_room(100);
        let dirent = Dirent::dir(7, 9, b"abc");
        assert!(entries.add(None, &dirent));
        assert_eq!(entries.data().len(), 32);
        assert!(entries.add(None, &dirent) && entries.add(None, &dirent));
        assert!(!entries.add(None, &dirent), "96 of 100 bytes are taken");
        assert_eq!(entries.data().len(), 96);
        assert_eq!(entries.data()[20..24], 4u32.to_ne_bytes(), "DT_DIR");
    }

    #[test]
    fn fixed_answers_have_the_lengths_of_the_protocol() {
        let len = |answer: &dyn Answer| {
            let mut out = Fixed::new();
            answer.fixed(&mut out);
            out.bytes().len()
        };
        let opened = Opened {
            handle: 1,
            how: How::Dir { complete: true },
        };
        assert_eq!(len(&opened), 16);
        assert_eq!(len(&Count(3)), 8);
        assert_eq!(len(&Offset(3)), 8);
        assert_eq!(len(&Done), 0);
        let here = std::env::current_dir().expect("a directory");
        let here = std::fs::File::open(here).expect("open");
        let fs = crate::sys::host::fs_stat(std::os::fd::AsFd::as_fd(&here)).expect("statfs");
        assert_eq!(len(&Statfs(fs)), 80);
        let stat = crate::sys::stat::stat_fd(std::os::fd::AsFd::as_fd(&here)).expect("statx");
        let attr = Attr { stat };
        let ttl = Duration::ZERO;
        let shown = Attributes { ino: 1, attr, ttl };
        assert_eq!(len(&shown), 104);
        let entry = || Entry {
            ino: 1,
            generation: 0,
            attr,
            entry_ttl: ttl,
            attr_ttl: ttl,
        };
        assert_eq!(len(&entry()), 128);
        assert_eq!(len(&Found::Nothing(ttl)), 128);
        assert_eq!(len(&Created(entry(), opened)), FIXED_MAX);
    }
}
