//! Random operations, the same ones on a mount over a pending tree and on a plain copy of src:
//! the same results and errnos all the way, and the same tree at the end.
//!
//! MIRRORFS_TEST_SEED repeats a run, MIRRORFS_TEST_OPS makes it longer. Where the two differ, the
//! operation, its number and those before it are printed.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use rustix::fs::{
    Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec,
    Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::compare::{self, Ignore};
use crate::fixture::{Random, World, as_user, bytes, can_mount_on, run};

/// Names that entries have: few, so that operations meet.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Handles that are open at the same time.
const SLOTS: usize = 4;
/// Operations in one run.
const OPS: u64 = 3000;
/// Permission bits that chmod and create choose from.
const MODES: [u32; 6] = [0o644, 0o600, 0o755, 0o700, 0o444, 0o4755];

/// One operation; paths are relative, `slot` is an open handle.
#[derive(Debug, Clone)]
enum Op {
    Create {
        path: PathBuf,
        flags: OFlags,
        mode: u32,
    },
    Mkdir {
        path: PathBuf,
        mode: u32,
    },
    Mknod {
        path: PathBuf,
    },
    Symlink {
        target: PathBuf,
        path: PathBuf,
    },
    Link {
        old: PathBuf,
        new: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    Rmdir {
        path: PathBuf,
    },
    Rename {
        old: PathBuf,
        new: PathBuf,
        flags: RenameFlags,
    },
    Write {
        path: PathBuf,
        offset: u64,
        len: usize,
        flags: OFlags,
    },
    Read {
        path: PathBuf,
    },
    Truncate {
        path: PathBuf,
        len: u64,
    },
    Chmod {
        path: PathBuf,
        mode: u32,
    },
    Chown {
        path: PathBuf,
        uid: u32,
        gid: u32,
    },
    Utimens {
        path: PathBuf,
        sec: i64,
        nsec: i64,
    },
    SetXattr {
        path: PathBuf,
        key: &'static str,
        len: usize,
        flags: XattrFlags,
    },
    GetXattr {
        path: PathBuf,
        key: &'static str,
    },
    RemoveXattr {
        path: PathBuf,
        key: &'static str,
    },
    ListXattr {
        path: PathBuf,
    },
    Stat {
        path: PathBuf,
    },
    Access {
        path: PathBuf,
        access: Access,
    },
    ReadDir {
        path: PathBuf,
    },
    ReadLink {
        path: PathBuf,
    },
    Fallocate {
        path: PathBuf,
        flags: FallocateFlags,
        offset: u64,
        len: u64,
    },
    CopyRange {
        from: PathBuf,
        to: PathBuf,
        from_offset: u64,
        to_offset: u64,
        len: usize,
    },
    Open {
        slot: usize,
        path: PathBuf,
        flags: OFlags,
    },
    Pread {
        slot: usize,
        offset: u64,
        len: usize,
    },
    Pwrite {
        slot: usize,
        offset: u64,
        len: usize,
    },
    Ftruncate {
        slot: usize,
        len: u64,
    },
    Fstat {
        slot: usize,
    },
    Fsync {
        slot: usize,
    },
    Close {
        slot: usize,
    },
}

fn path(r: &mut Random) -> PathBuf {
    let depth = 1 + r.below(3);
    (0..depth).map(|_| *r.one_of(&NAMES)).collect()
}

fn offset(r: &mut Random) -> u64 {
    let near = [0u64, 100, 4096, 65_536, 70_000, 1 << 20, 9 << 20];
    r.one_of(&near).saturating_sub(r.below(3)) + r.below(2) * r.below(5000)
}

fn random_op(r: &mut Random, as_root: bool) -> Op {
    let keys = [
        "user.a",
        "user.b",
        "user.long name",
        "trusted.mirrorfs.no",
        "other",
    ];
    let mode = *r.one_of(&MODES[..if as_root { 5 } else { 6 }]);
    let slot = r.below(SLOTS as u64) as usize;
    let len = *r.one_of(&[0, 1, 10, 4096, 5000, 70_000]);
    match r.below(46) {
        0..=3 => {
            let more = *r.one_of(&[
                OFlags::empty(),
                OFlags::EXCL,
                OFlags::TRUNC,
                OFlags::NOFOLLOW,
            ]);
            let flags = OFlags::CREATE | OFlags::RDWR | more;
            Op::Create {
                path: path(r),
                flags,
                mode,
            }
        }
        4..=6 => Op::Mkdir {
            path: path(r),
            mode: mode | 0o700,
        },
        7 => Op::Mknod { path: path(r) },
        8 => Op::Symlink {
            target: path(r),
            path: path(r),
        },
        9 | 10 => Op::Link {
            old: path(r),
            new: path(r),
        },
        11 | 12 => Op::Unlink { path: path(r) },
        13 => Op::Rmdir { path: path(r) },
        14..=18 => {
            let none = RenameFlags::empty();
            let flags = *r.one_of(&[
                none,
                none,
                none,
                RenameFlags::NOREPLACE,
                RenameFlags::EXCHANGE,
            ]);
            Op::Rename {
                old: path(r),
                new: path(r),
                flags,
            }
        }
        19..=22 => {
            let flags = *r.one_of(&[OFlags::empty(), OFlags::APPEND, OFlags::TRUNC]);
            Op::Write {
                path: path(r),
                offset: offset(r),
                len,
                flags,
            }
        }
        23..=25 => Op::Read { path: path(r) },
        26 => Op::Truncate {
            path: path(r),
            len: offset(r) * r.below(2),
        },
        27 => Op::Chmod {
            path: path(r),
            mode,
        },
        28 => {
            let ids = [0, 1000, 1001];
            Op::Chown {
                path: path(r),
                uid: *r.one_of(&ids),
                gid: *r.one_of(&ids),
            }
        }
        29 => {
            let secs = [-1_000_000_000, -1, 0, 1_000_000_000, 1 << 32];
            let nsec = r.below(1_000_000_000) as i64;
            Op::Utimens {
                path: path(r),
                sec: *r.one_of(&secs),
                nsec,
            }
        }
        30 => {
            let none = XattrFlags::empty();
            let flags = *r.one_of(&[none, none, XattrFlags::CREATE, XattrFlags::REPLACE]);
            Op::SetXattr {
                path: path(r),
                key: r.one_of::<&'static str>(&keys),
                len: len.min(300),
                flags,
            }
        }
        31 => Op::GetXattr {
            path: path(r),
            key: r.one_of::<&'static str>(&keys),
        },
        32 => Op::RemoveXattr {
            path: path(r),
            key: r.one_of::<&'static str>(&keys),
        },
        33 => Op::ListXattr { path: path(r) },
        34 | 35 => Op::Stat { path: path(r) },
        36 => {
            let all = [
                Access::EXISTS,
                Access::READ_OK,
                Access::WRITE_OK,
                Access::EXEC_OK,
            ];
            Op::Access {
                path: path(r),
                access: *r.one_of(&all),
            }
        }
        37 => Op::ReadDir { path: path(r) },
        38 => Op::ReadLink { path: path(r) },
        39 => {
            let keep = FallocateFlags::KEEP_SIZE;
            let all = [
                FallocateFlags::empty(),
                keep,
                keep | FallocateFlags::PUNCH_HOLE,
            ];
            let flags = *r.one_of(&all);
            Op::Fallocate {
                path: path(r),
                flags,
                offset: offset(r),
                len: 1 + r.below(100_000),
            }
        }
        40 => {
            let (from, to) = (path(r), path(r));
            Op::CopyRange {
                from,
                to,
                from_offset: offset(r),
                to_offset: offset(r),
                len,
            }
        }
        41 => {
            let all = [
                OFlags::RDONLY,
                OFlags::RDWR,
                OFlags::WRONLY,
                OFlags::RDWR | OFlags::APPEND,
            ];
            Op::Open {
                slot,
                path: path(r),
                flags: *r.one_of(&all),
            }
        }
        42 => Op::Pread {
            slot,
            offset: offset(r),
            len,
        },
        43 => Op::Pwrite {
            slot,
            offset: offset(r),
            len,
        },
        44 => match r.below(3) {
            0 => Op::Ftruncate {
                slot,
                len: offset(r),
            },
            1 => Op::Fsync { slot },
            _ => Op::Close { slot },
        },
        _ => Op::Fstat { slot },
    }
}

/// One of the two sides: a root and its open handles.
pub(crate) struct Side {
    root: PathBuf,
    open: [Option<OwnedFd>; SLOTS],
    start: i64,
}

impl Side {
    pub(crate) fn new(root: &Path) -> Side {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let open = std::array::from_fn(|_| None);
        Side {
            root: root.to_owned(),
            open,
            start: now.as_secs() as i64 - 10,
        }
    }

    /// A tree as random operations of root's leave it.
    pub(crate) fn fill(&mut self, seed: u64, ops: u64) {
        let mut random = Random::new(seed);
        for i in 0..ops {
            let op = random_op(&mut random, true);
            let _ = self.apply(&op, i); // Whatever it leaves.
        }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn open(&self, path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        // Never waits for the other end of a fifo.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(self.at(path), flags, Mode::from_raw_mode(mode))?;
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Fifo => Err(Errno::SPIPE),
            _ => Ok(fd),
        }
    }

    fn slot(&self, slot: usize) -> Result<&OwnedFd, Errno> {
        self.open[slot].as_ref().ok_or(Errno::BADF)
    }

    /// Not the link count: while src's other names are pending the mount counts those too, and
    /// one that was deleted cannot be told from one that was not placed yet (docs/SEMANTICS.md).
    fn seen(&self, stat: &rustix::fs::Stat) -> String {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_dir = kind == FileType::Directory;
        let time = if stat.st_mtime >= self.start {
            "now".to_owned()
        } else {
            format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec)
        };
        format!(
            "{kind:?} {:o} {}:{} size {} {time}",
            stat.st_mode,
            stat.st_uid,
            stat.st_gid,
            if is_dir { 0 } else { stat.st_size },
        )
    }

    /// Does it, and says what came of it.
    fn apply(&mut self, op: &Op, tag: u64) -> Result<String, Errno> {
        let ok = |()| String::new();
        let write_all = |fd: &OwnedFd, data: &[u8], offset: u64| {
            rustix::io::pwrite(fd, data, offset).map(|n| format!("wrote {n}"))
        };
        match op {
            Op::Create { path, flags, mode } => {
                self.open(path, *flags, *mode).map(|_| String::new())
            }
            Op::Mkdir { path, mode } => {
                rustix::fs::mkdir(self.at(path), Mode::from_raw_mode(*mode)).map(ok)
            }
            Op::Mknod { path } => {
                let mode = Mode::from_raw_mode(0o640);
                rustix::fs::mknodat(CWD, self.at(path), FileType::Fifo, mode, 0).map(ok)
            }
            Op::Symlink { target, path } => rustix::fs::symlink(target, self.at(path)).map(ok),
            Op::Link { old, new } => {
                let (old, new) = (self.at(old), self.at(new));
                rustix::fs::linkat(CWD, old, CWD, new, AtFlags::empty()).map(ok)
            }
            Op::Unlink { path } => rustix::fs::unlink(self.at(path)).map(ok),
            Op::Rmdir { path } => rustix::fs::rmdir(self.at(path)).map(ok),
            Op::Rename { old, new, flags } => {
                rustix::fs::renameat_with(CWD, self.at(old), CWD, self.at(new), *flags).map(ok)
            }
            Op::Write {
                path,
                offset,
                len,
                flags,
            } => {
                let fd = self.open(path, OFlags::WRONLY | *flags, 0)?;
                write_all(&fd, &bytes(tag, *len), *offset)
            }
            Op::Read { path } => self.read(&self.open(path, OFlags::RDONLY, 0)?, 0, 1 << 30),
            Op::Truncate { path, len } => {
                let path =
                    CString::new(self.at(path).into_os_string().into_encoded_bytes()).unwrap();
                crate::raw::truncate(&path, *len)
                    .map(ok)
                    .map_err(|e| Errno::from_io_error(&e).unwrap())
            }
            Op::Chmod { path, mode } => {
                rustix::fs::chmod(self.at(path), Mode::from_raw_mode(*mode)).map(ok)
            }
            Op::Chown { path, uid, gid } => {
                let (uid, gid) = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
                rustix::fs::chownat(CWD, self.at(path), uid, gid, AtFlags::SYMLINK_NOFOLLOW).map(ok)
            }
            Op::Utimens { path, sec, nsec } => {
                let t = Timespec {
                    tv_sec: *sec,
                    tv_nsec: *nsec,
                };
                let times = Timestamps {
                    last_access: t,
                    last_modification: t,
                };
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(CWD, self.at(path), &times, flags).map(ok)
            }
            Op::SetXattr {
                path,
                key,
                len,
                flags,
            } => {
                let value = bytes(tag, *len);
                rustix::fs::lsetxattr(self.at(path), *key, &value, *flags).map(ok)
            }
            Op::GetXattr { path, key } => {
                let mut value = [0; 400];
                let n = rustix::fs::lgetxattr(self.at(path), *key, &mut value)?;
                Ok(value[..n].escape_ascii().to_string())
            }
            Op::RemoveXattr { path, key } => rustix::fs::lremovexattr(self.at(path), *key).map(ok),
            Op::ListXattr { path } => {
                let mut list = [0; 4096];
                let n = rustix::fs::llistxattr(self.at(path), &mut list)?;
                let mut names: Vec<_> = list[..n].split(|b| *b == 0).collect();
                names.sort();
                Ok(format!(
                    "{:?}",
                    names
                        .iter()
                        .map(|n| n.escape_ascii().to_string())
                        .collect::<Vec<_>>()
                ))
            }
            Op::Stat { path } => rustix::fs::lstat(self.at(path)).map(|s| self.seen(&s)),
            Op::Access { path, access } => {
                rustix::fs::accessat(CWD, self.at(path), *access, AtFlags::EACCESS).map(ok)
            }
            Op::ReadDir { path } => {
                let list =
                    fs::read_dir(self.at(path)).and_then(Iterator::collect::<io::Result<Vec<_>>>);
                let list = list.map_err(|e| Errno::from_io_error(&e).unwrap())?;
                let mut names: Vec<_> = list
                    .iter()
                    .map(|e| format!("{:?} {:?}", e.file_name(), e.file_type().unwrap()))
                    .collect();
                names.sort();
                Ok(names.join(" "))
            }
            Op::ReadLink { path } => {
                rustix::fs::readlink(self.at(path), Vec::new()).map(|t| format!("{t:?}"))
            }
            Op::Fallocate {
                path,
                flags,
                offset,
                len,
            } => {
                let fd = self.open(path, OFlags::WRONLY, 0)?;
                rustix::fs::fallocate(fd, *flags, *offset, *len).map(ok)
            }
            Op::CopyRange {
                from,
                to,
                from_offset,
                to_offset,
                len,
            } => {
                let from = self.open(from, OFlags::RDONLY, 0)?;
                let to = self.open(to, OFlags::WRONLY, 0)?;
                let (mut a, mut b) = (*from_offset, *to_offset);
                let mut done = 0;
                // How much one call copies is the file system's choice.
                while done < *len {
                    let n = rustix::fs::copy_file_range(
                        &from,
                        Some(&mut a),
                        &to,
                        Some(&mut b),
                        *len - done,
                    )?;
                    if n == 0 {
                        break;
                    }
                    done += n;
                }
                Ok(format!("copied {done}"))
            }
            Op::Open { slot, path, flags } => {
                self.open[*slot] = None;
                self.open[*slot] = Some(self.open(path, *flags, 0)?);
                Ok(String::new())
            }
            Op::Pread { slot, offset, len } => self.read(self.slot(*slot)?, *offset, *len),
            Op::Pwrite { slot, offset, len } => {
                write_all(self.slot(*slot)?, &bytes(tag, *len), *offset)
            }
            Op::Ftruncate { slot, len } => rustix::fs::ftruncate(self.slot(*slot)?, *len).map(ok),
            Op::Fstat { slot } => rustix::fs::fstat(self.slot(*slot)?).map(|s| self.seen(&s)),
            Op::Fsync { slot } => rustix::fs::fsync(self.slot(*slot)?).map(ok),
            Op::Close { slot } => {
                self.open[*slot] = None;
                Ok(String::new())
            }
        }
    }

    fn read(&self, fd: &OwnedFd, offset: u64, len: usize) -> Result<String, Errno> {
        let mut buf = vec![0; len.min(128 << 10)];
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        let mut done = 0;
        while done < len {
            let want = buf.len().min(len - done);
            let n = rustix::io::pread(fd, &mut buf[..want], offset + done as u64)?;
            if n == 0 {
                break;
            }
            hash.update(&buf[..n]);
            done += n;
        }
        Ok(format!("{done} bytes {:x}", hash.digest()))
    }
}

/// Runs `ops` operations on both sides; they must never tell two stories.
pub(crate) fn run_both(seed: u64, ops: u64, as_root: bool, a: &mut Side, b: &mut Side) {
    let mut random = Random::new(seed);
    let mut past = Vec::new();
    for i in 0..ops {
        let op = random_op(&mut random, as_root);
        let (x, y) = (a.apply(&op, i), b.apply(&op, i));
        past.push(format!("{i} {op:?} -> {x:?}"));
        if x != y {
            // What touched the same names before.
            let last = past.len().saturating_sub(25);
            panic!(
                "seed {seed}, operation {i}: {op:?}\n  plain directory: {x:?}\n  mount: {y:?}\nbefore it:\n  {}",
                past[last..].join("\n  ")
            );
        }
    }
}

fn differs_nowhere(kind: &str, default_seed: u64, uid: u32, background: bool) {
    if !can_mount_on(kind) {
        return;
    }
    let seed = std::env::var("MIRRORFS_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or(default_seed);
    let ops = std::env::var("MIRRORFS_TEST_OPS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(OPS);
    eprintln!("MIRRORFS_TEST_SEED={seed}");
    let w = World::on(kind);
    // src is what another run of random operations leaves, by the same user.
    rustix::fs::chown(&w.src, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).unwrap();
    let make = || {
        let mut src = Side::new(&w.src);
        let mut random = Random::new(seed ^ 0xabcd);
        for i in 0..600 {
            let op = random_op(&mut random, uid == 0);
            let _ = src.apply(&op, i); // Whatever it leaves is the src.
        }
    };
    as_user(uid, uid, 0o022, make);
    let plain = w.src.with_file_name("plain");
    run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
    let before = w.src_state();
    let m = if background {
        w.mount()
    } else {
        w.mount_lazy()
    };
    as_user(uid, uid, 0o022, || {
        run_both(
            seed,
            ops,
            uid == 0,
            &mut Side::new(&plain),
            &mut Side::new(&m.at),
        );
    });
    compare::manifest(&m.at);
    m.finish();
    w.expect_no_trace();
    w.expect_same_tree(&plain);
    w.expect_src_untouched(&before);
}

#[test]
pub(crate) fn root_sees_no_difference_from_a_plain_directory() {
    for seed in [1, 2] {
        differs_nowhere("ext4", seed, 0, false);
    }
}

#[test]
fn root_sees_no_difference_while_the_walker_runs() {
    for seed in [3, 4] {
        differs_nowhere("ext4", seed, 0, true);
    }
}

#[test]
fn a_user_sees_no_difference_from_a_plain_directory() {
    for seed in [5, 6] {
        differs_nowhere("ext4", seed, 1000, seed % 2 == 0);
    }
}

#[test]
fn nobody_sees_a_difference_on_xfs() {
    differs_nowhere("xfs", 7, 0, false);
    differs_nowhere("xfs", 8, 1000, true);
}

#[test]
fn nobody_sees_a_difference_on_btrfs() {
    differs_nowhere("btrfs", 9, 0, false);
    differs_nowhere("btrfs", 10, 1000, true);
}

/// The test's own test: two plain directories, no program.
#[test]
fn two_plain_directories_do_not_differ() {
    if !can_mount_on("ext4") {
        return;
    }
    for (seed, uid) in [(11, 0), (12, 1000)] {
        let w = World::on("ext4");
        for dir in [&w.src, &w.dst] {
            rustix::fs::chown(dir, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).unwrap();
        }
        as_user(uid, uid, 0o022, || {
            run_both(
                seed,
                OPS,
                uid == 0,
                &mut Side::new(&w.src),
                &mut Side::new(&w.dst),
            );
        });
        let ignore = Ignore {
            recent_mtime: true,
            ..Ignore::default()
        };
        compare::expect_equal_with(
            &compare::manifest(&w.src),
            &compare::manifest(&w.dst),
            ignore,
        );
    }
}
