//! A tree with every awkward thing that a source may hold, in a compact form.
//!
//! What the file system below refuses (ext4 keeps all xattrs of an inode in 4 KiB, xfs cuts
//! symlinks at 1,023 bytes) is left out; src is what it is. Not here, because they have tests of
//! their own: a terabyte-long file through `sync` (`HUGE` is in the tree) and chattr flags.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::fixture::bytes;

/// 1 TiB with 1 MiB of data.
const HUGE: u64 = 1 << 40;
/// Sizes at which some part of a copy engine turns.
const BORDERS: [usize; 4] = [4 << 10, 64 << 10, 1 << 20, 8 << 20];
/// Seconds at which some clock turns: 1901, 1969, 1970, 2001, 2038, 2106, 2446 (ext4's last).
const SECONDS: [i64; 10] = [
    -(1 << 31),
    -100,
    -1,
    0,
    1,
    1_000_000_000,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    15_032_385_535,
];

/// One directory, by fd: no path is ever too long.
pub(crate) struct At(OwnedFd);

impl At {
    pub(crate) fn open(path: &Path) -> At {
        At(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Makes a directory.
    pub(crate) fn dir(&self, name: impl AsRef<[u8]>) -> At {
        let name = name.as_ref();
        rustix::fs::mkdirat(self.fd(), name, Mode::from_raw_mode(0o755)).unwrap();
        self.enter(name)
    }

    fn enter(&self, name: &[u8]) -> At {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        At(rustix::fs::openat(self.fd(), name, flags, Mode::empty()).unwrap())
    }

    /// Makes a file.
    pub(crate) fn file(&self, name: impl AsRef<[u8]>, content: &[u8]) {
        self.sparse(name, content.len() as u64, &[(0, content)]);
    }

    /// Makes a file of pieces of data in holes.
    pub(crate) fn sparse(&self, name: impl AsRef<[u8]>, size: u64, pieces: &[(u64, &[u8])]) {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.fd(), name.as_ref(), flags, Mode::from_raw_mode(0o644))
            .unwrap();
        // The length first: xfs allocates ahead of what grows a file, and holes would be filled.
        rustix::fs::ftruncate(&fd, size).unwrap();
        for (offset, piece) in pieces {
            let mut done = 0;
            while done < piece.len() {
                done += rustix::io::pwrite(&fd, &piece[done..], offset + done as u64).unwrap();
            }
        }
    }

    pub(crate) fn symlink(&self, target: impl AsRef<[u8]>, name: impl AsRef<[u8]>) {
        // xfs keeps at most 1,023 bytes.
        match rustix::fs::symlinkat(target.as_ref(), self.fd(), name.as_ref()) {
            Err(Errno::NAMETOOLONG) => {}
            other => other.unwrap(),
        }
    }

    pub(crate) fn node(&self, name: impl AsRef<[u8]>, kind: FileType, dev: Dev) {
        let mode = Mode::from_raw_mode(0o640);
        // xfs keeps 9 bits of a major and 18 of a minor number.
        match rustix::fs::mknodat(self.fd(), name.as_ref(), kind, mode, dev) {
            Err(Errno::INVAL) => {}
            other => other.unwrap(),
        }
    }

    /// Gives an entry of this directory one more name in another.
    pub(crate) fn link(&self, old: &str, dir: &At, new: &str) {
        rustix::fs::linkat(self.fd(), old, dir.fd(), new, AtFlags::empty()).unwrap();
    }

    pub(crate) fn chmod(&self, name: impl AsRef<[u8]>, mode: u32) {
        let mode = Mode::from_raw_mode(mode);
        rustix::fs::chmodat(self.fd(), name.as_ref(), mode, AtFlags::empty()).unwrap();
    }

    pub(crate) fn chown(&self, name: impl AsRef<[u8]>, uid: u32, gid: u32) {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(
            self.fd(),
            name.as_ref(),
            uid,
            gid,
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .unwrap();
    }

    pub(crate) fn stamp(&self, name: impl AsRef<[u8]>, sec: i64, nsec: i64) {
        let t = Timespec {
            tv_sec: sec,
            tv_nsec: nsec,
        };
        let times = Timestamps {
            last_access: t,
            last_modification: t,
        };
        rustix::fs::utimensat(self.fd(), name.as_ref(), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    /// Sets an xattr where the file system has room for it and the type may have it.
    pub(crate) fn xattr(&self, name: impl AsRef<[u8]>, key: impl AsRef<[u8]>, value: &[u8]) {
        let mut path = format!("/proc/self/fd/{}/", self.0.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.as_ref());
        let path = PathBuf::from(OsStr::from_bytes(&path));
        match rustix::fs::lsetxattr(path, key.as_ref(), value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOSPC | Errno::NOTSUP | Errno::PERM | Errno::TOOBIG) => {}
            Err(e) => panic!("setxattr {}: {e}", key.as_ref().escape_ascii()),
        }
    }
}

/// A POSIX ACL as the kernel stores it: (tag, permissions, id).
pub(crate) fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(perm.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// An ACL that lets user 1000 do everything and group 33 read, under a mask.
pub(crate) fn named_acl() -> Vec<u8> {
    let no = u32::MAX;
    acl(&[
        (1, 6, no),
        (2, 7, 1000),
        (4, 4, no),
        (8, 4, 33),
        (16, 5, no),
        (32, 0, no),
    ])
}

/// security.capability, revision 2: CAP_NET_RAW, effective.
pub(crate) fn capability() -> Vec<u8> {
    let mut value = 0x0200_0001u32.to_le_bytes().to_vec();
    value.extend((1u32 << 13).to_le_bytes());
    value.extend([0; 12]);
    value
}

/// Fills `root`. The same each time.
pub(crate) fn fill(root: &Path) {
    let root = At::open(root);
    names(&root.dir("names"));
    deep(&root);
    modes(&root.dir("modes"));
    times(&root.dir("times"));
    xattrs(&root.dir("xattrs"));
    acls(&root.dir("acls"));
    nodes(&root.dir("nodes"));
    links(&root.dir("links"));
    holes(&root.dir("holes"));
    sizes(&root.dir("sizes"));
    let big = root.dir("big");
    for i in 0..2500 {
        big.file(format!("entry {i:05}"), format!("{i}").as_bytes());
    }
    for (i, name) in ["names", "modes", "times", "acls", "links", "big", "."]
        .iter()
        .enumerate()
    {
        root.stamp(name, 1_234_567_890 + i as i64, 123_456_789);
    }
}

fn names(d: &At) {
    for c in (1..=255u8).filter(|c| *c != b'/') {
        d.file([b'c', c], &[c]);
        if c != b'.' {
            d.file([c], &[c]);
        }
    }
    let long = [
        &[b'L'; 255][..],
        &[0xff; 255],
        "\u{e9}".repeat(127).as_bytes(),
    ]
    .concat();
    for name in [
        &long[..255],
        &long[255..510],
        &long[510..],
        b"...",
        b"-rf",
        b"$(id)",
        b"a\nb",
    ] {
        d.file(name, name);
    }
    for name in [
        &b".mirrorfs"[..],
        b".mirrorfs.tmp",
        b".fuse_hidden0001",
        b"lost+found",
    ] {
        d.file(name, b"a user's own");
    }
    for name in [&b"dir\n"[..], b"\xfe\xfd", &[b'D'; 255], b"  "] {
        d.dir(name).file("in", b"side");
    }
}

fn deep(root: &At) {
    for (top, name, depth) in [
        ("deep-long", vec![b'N'; 255], 20),
        ("deep-many", vec![b'd'], 300),
    ] {
        let mut chain = vec![root.dir(top)];
        for i in 0..depth {
            let next = chain[i].dir(&name);
            chain.push(next);
        }
        let last = chain.last().unwrap();
        last.file("bottom", top.as_bytes());
        last.node("fifo", FileType::Fifo, 0);
        last.symlink("../bottom", "up");
        for (i, dir) in chain.iter().enumerate().rev() {
            dir.stamp(".", 1_300_000_000 + i as i64, i as i64);
        }
    }
}

fn modes(d: &At) {
    for mode in [
        0, 0o1, 0o200, 0o444, 0o644, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777, 0o4000,
    ] {
        let file = format!("f{mode:04o}");
        d.file(&file, file.as_bytes());
        d.chown(&file, 1000 + mode, mode);
        d.chmod(&file, mode);
        let dir = format!("d{mode:04o}");
        d.dir(&dir).file("in", b"side");
        d.chown(&dir, mode, u32::MAX - 1);
        d.chmod(&dir, mode);
    }
    // A setgid directory gives its group to what is made in it, unless a copier sets it right.
    let s = d.dir("setgid");
    s.chown(".", 0, 33);
    s.chmod(".", 0o2775);
    s.file("other", b"group 0");
    s.chown("other", 0, 0);
    s.dir("plain");
    s.chown("plain", 0, 0);
    s.chmod("plain", 0o755);
    // chown and writing drop these.
    d.file("suid-and-capability", b"\x7fELF");
    d.chown("suid-and-capability", 1000, 1000);
    d.chmod("suid-and-capability", 0o6755);
    d.xattr("suid-and-capability", "security.capability", &capability());
}

fn times(d: &At) {
    for (i, sec) in SECONDS.into_iter().enumerate() {
        for nsec in [0, 1, 999_999_999] {
            let name = |kind: &str| format!("{kind} {i} {nsec}");
            d.file(name("file"), b"t");
            d.symlink("nowhere", name("symlink"));
            d.node(name("fifo"), FileType::Fifo, 0);
            d.dir(name("dir")).file("in", b"side");
            for kind in ["file", "symlink", "fifo", "dir"] {
                d.stamp(name(kind), sec, nsec);
            }
        }
    }
}

fn xattrs(d: &At) {
    d.file("some", b"x");
    d.dir("dir");
    d.symlink("target", "symlink");
    d.node("fifo", FileType::Fifo, 0);
    d.node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    for name in ["some", "dir", "symlink", "fifo", "null"] {
        d.xattr(name, "user.empty", b"");
        d.xattr(name, b"user.\xff\n", &(0..=255).collect::<Vec<u8>>());
        d.xattr(name, "trusted.t", b"t");
        d.xattr(name, "security.mine", b"s\0");
        d.xattr(name, "user.mirrorfs.not-the-mark", b"1");
        d.xattr(name, "trusted.mirrorfs.not-the-mark", b"1");
        d.xattr(name, "security.selinux", b"system_u:object_r:etc_t:s0\0");
        d.stamp(name, 1_200_000_000, 5);
    }
    d.xattr("some", format!("user.{}", "n".repeat(250)), b"a long name");
    d.file("capability", b"\x7fELF");
    d.chmod("capability", 0o755);
    d.xattr("capability", "security.capability", &capability());
    for (name, len) in [("big", 3000), ("bigger", 60_000)] {
        d.file(name, b"x");
        d.xattr(name, "user.big", &bytes(3, len));
    }
    d.file("read-only", b"x");
    d.xattr("read-only", "user.on-read-only", b"1");
    d.chmod("read-only", 0o400);
}

fn acls(d: &At) {
    let no = u32::MAX;
    let default = acl(&[
        (1, 7, no),
        (2, 7, 1000),
        (4, 5, no),
        (16, 7, no),
        (32, 0, no),
    ]);
    d.file("access", b"x");
    d.xattr("access", "system.posix_acl_access", &named_acl());
    let s = d.dir("with-default");
    // Made before the default ACL, so they have none; in the copy too.
    s.file("without", b"x");
    s.dir("dir-without");
    s.node("fifo-without", FileType::Fifo, 0);
    s.xattr(".", "system.posix_acl_default", &default);
    s.xattr(".", "system.posix_acl_access", &named_acl());
    s.file("with", b"x");
    s.dir("dir-with").file("deeper", b"x");
    s.stamp(".", 1_250_000_000, 7);
}

fn nodes(d: &At) {
    d.node("fifo", FileType::Fifo, 0);
    d.node("socket", FileType::Socket, 0);
    for (major, minor) in [(0, 0), (1, 3), (4095, 1_048_575), (259, 70_000)] {
        let dev = rustix::fs::makedev(major, minor);
        d.node(format!("c{major}"), FileType::CharacterDevice, dev);
        d.node(format!("b{major}"), FileType::BlockDevice, dev);
    }
    for (i, target) in ["x", "..", "/", "loop", "a/../../b\n"].iter().enumerate() {
        d.symlink(target, format!("to {i}"));
    }
    d.symlink("loop", "loop");
    d.symlink(b"\xff\xfe", "bytes");
    for len in [59, 60, 1023, 1024, 4000] {
        d.symlink("t/".repeat(len / 2), format!("to {len} bytes"));
    }
    d.symlink("target", "foreign");
    d.chown("foreign", 1000, 33);
}

fn links(d: &At) {
    let (a, b) = (d.dir("a"), d.dir("b"));
    let c = b.dir("c");
    d.file("file", &bytes(4, 70_000));
    d.xattr("file", "user.h", b"1");
    d.file("empty", b"");
    d.sparse("sparse", 10 << 20, &[(5 << 20, b"mid")]);
    d.symlink("some/where", "symlink");
    d.node("fifo", FileType::Fifo, 0);
    d.node("socket", FileType::Socket, 0);
    d.node(
        "device",
        FileType::CharacterDevice,
        rustix::fs::makedev(1, 5),
    );
    for name in [
        "file", "empty", "sparse", "symlink", "fifo", "socket", "device",
    ] {
        d.link(name, &a, name);
        d.link(name, &c, &format!("{name} again"));
        d.stamp(name, 1_260_000_000, 9);
    }
    // Twins: equal in everything but not the same inode.
    for (name, dir) in [("twin 1", &a), ("twin 2", &b)] {
        d.file(name, b"twin");
        d.stamp(name, 1_260_000_000, 9);
        d.link(name, dir, "twin");
    }
    for i in 0..100 {
        d.link("file", &b, &format!("name {i}"));
    }
}

fn holes(d: &At) {
    let m = 1u64 << 20;
    let x = bytes(5, 1 << 20);
    d.sparse("start", 5 * m, &[(4 * m, &x)]);
    d.sparse("middle", 9 * m, &[(0, &x), (8 * m, &x)]);
    d.sparse("end", 5 * m + 123, &[(0, &x[..777])]);
    d.sparse("all", 8 * m + 1, &[]);
    d.sparse("one byte", 7 * m + 1, &[(7 * m, b"z")]);
    d.sparse(
        "unaligned",
        m,
        &[(3000, &x[..10]), (65535, &x[..3]), (500_001, &x[..70_000])],
    );
    let teeth: Vec<_> = (0..128).map(|i| (i * 8192, &x[..4096])).collect();
    d.sparse("comb", m, &teeth);
    d.file("zeros", &[0; 300_000]);
    let half = HUGE / 2 + 12_345;
    d.sparse(
        "huge",
        HUGE,
        &[(0, &x[..5000]), (half, &x), (HUGE - 10, &x[..10])],
    );
    for name in ["start", "middle", "end", "all", "comb", "huge"] {
        d.stamp(name, 1_270_000_000, 11);
    }
}

fn sizes(d: &At) {
    for (i, border) in BORDERS.into_iter().enumerate() {
        for size in [border - 1, border, border + 1] {
            d.file(format!("{size}"), &bytes(i as u64, size));
        }
    }
    for size in [0, 1, 2, 512, 5000, 12_000_000] {
        d.file(format!("{size}"), &bytes(size as u64, size));
    }
    d.dir("empty");
    d.dir("e1").dir("e2").dir("e3");
}

/// A small ordinary tree: `dirs` directories with `files` files each, two levels deep.
pub(crate) fn ordinary(root: &Path, dirs: usize, files: usize) {
    let root = At::open(root);
    for i in 0..dirs {
        let d = root.dir(format!("d{i}"));
        let e = d.dir("e");
        for j in 0..files {
            let tag = (i * files + j) as u64;
            let at = if j % 2 == 0 { &d } else { &e };
            at.file(format!("f{j}"), &bytes(tag, (tag as usize * 769) % 20_000));
            at.stamp(format!("f{j}"), 1_400_000_000 + tag as i64, 77);
        }
        e.stamp(".", 1_400_000_000, 1);
        d.stamp(".", 1_400_000_000, 2);
    }
    root.stamp(".", 1_400_000_000, 3);
}
