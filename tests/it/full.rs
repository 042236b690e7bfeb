//! A target that takes nothing more: full at any byte, out of inodes, over a quota, read-only
//! (docs/FAULTS.md). What has no room stays pending and is read from src; nothing is lost.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use serde_json::Value;

use crate::compare;
use crate::fixture::{
    LIMIT, LoopFs, Mounted, World, bytes, can_mount_on, find_program, mirrorfs, need, run,
    tests_all, wait_until,
};
use crate::nasty::{self, At};

/// A target of its own, and what fills it up.
struct Target {
    at: PathBuf,
    ballast: PathBuf,
}

impl Target {
    fn free(&self) -> u64 {
        let s = rustix::fs::statvfs(&self.at).unwrap();
        s.f_bfree * s.f_frsize
    }

    /// Leaves so many bytes, as nearly as the file system lets us.
    fn leave(&self, want: u64) {
        let dir = File::open(&self.at).unwrap();
        rustix::fs::syncfs(&dir).unwrap();
        let file = File::create(&self.ballast).unwrap();
        let mut len = 0;
        for _ in 0..40 {
            let over = self.free().saturating_sub(want) / 4096 * 4096;
            if over == 0 {
                break;
            }
            // A half, where the rest is needed to say where the blocks are.
            for piece in [over, over / 2, 4096] {
                let none = FallocateFlags::empty();
                if rustix::fs::fallocate(&file, none, len, piece).is_ok() {
                    len += piece;
                    break;
                }
            }
        }
        rustix::fs::syncfs(&dir).unwrap();
    }

    fn make_room(&self) {
        fs::remove_file(&self.ballast).unwrap();
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
    }
}

/// src on a file system of its own, dst on one with these properties.
fn world(kind: &str, bytes: u64, mkfs: &[&str], mount: &str) -> Option<(Target, World)> {
    if !can_mount_on("ext4") || !can_mount_on(kind) {
        return None;
    }
    let (a, b) = (LoopFs::new("ext4"), LoopFs::with(kind, bytes, mkfs, mount));
    let at = b.path().to_path_buf();
    let ballast = at.join("ballast");
    let w = World::from(a.dir("src"), b.dir("dst"), vec![a, b]);
    Some((Target { at, ballast }, w))
}

/// Everything that takes room somewhere: inodes, blocks of data, of xattrs, of long symlinks, of
/// directories.
fn fill(root: &Path) {
    let root = At::open(root);
    for i in 0..5_usize {
        let d = root.dir(format!("d{i}"));
        d.xattr(".", "user.big", &[b'd'; 1500]);
        for j in 0..16_usize {
            let (tag, name) = ((i * 16 + j) as u64, format!("f{j}"));
            d.file(&name, &bytes(tag, j * j * 400 + i));
            if j % 3 == 0 {
                d.xattr(&name, "user.big", &bytes(tag, 1500));
            }
            if j % 5 == 0 {
                d.xattr(&name, "system.posix_acl_access", &nasty::named_acl());
            }
            d.chown(&name, 1000 * (j as u32 % 3), 0);
            if j % 7 == 0 {
                d.xattr(&name, "security.capability", &nasty::capability());
            }
            if j % 4 == 0 {
                d.symlink(format!("{j}").repeat(150), format!("s{j}"));
            }
            d.stamp(&name, 1_400_000_000 + tag as i64, 5);
        }
        d.link("f15", &root, &format!("link{i}"));
        let long = d.dir("names");
        for j in 0..40 {
            long.file(format!("{j:0200}"), b"x");
        }
        d.stamp(".", 1_400_000_000, 1);
    }
    root.file("large", &bytes(1, 3 << 20));
    root.sparse("holes", 4 << 20, &[(1 << 20, &bytes(2, 300_000))]);
    root.stamp(".", 1_400_000_000, 2);
}

/// Small ones are made for small files: xattrs would have no room from the start.
const EXT4: [&str; 6] = ["-m", "0", "-b", "4096", "-I", "256"];

fn files_of(root: &Path) -> Vec<PathBuf> {
    let (mut files, mut dirs) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => dirs.push(path),
                kind if kind.is_file() => files.push(path),
                _ => {}
            }
        }
    }
    files
}

fn is_full(m: &Mounted) -> bool {
    let status = m.status();
    status["state"] == "DEGRADED" && status["dst_full"].is_string()
}

/// Every file that can be seen can be read, right to the last byte; `errno` for what has no name yet.
#[track_caller]
fn expect_readable(m: &Mounted, src: &Path, files: &[PathBuf], errno: i32) -> usize {
    let mut seen = 0;
    for file in files {
        match fs::symlink_metadata(m.path(file)) {
            Ok(_) => {
                let got = fs::read(m.path(file)).unwrap_or_else(|e| panic!("{file:?}: {e}"));
                assert!(got == fs::read(src.join(file)).unwrap(), "{file:?}");
                seen += 1;
            }
            Err(e) => assert_eq!(e.raw_os_error(), Some(errno), "{file:?}"),
        }
    }
    seen
}

/// Migrates with nothing but what `leave` leaves, then with room; the copy must be whole. True: dst was
/// full.
#[track_caller]
fn migrate_through(
    w: &World,
    files: &[PathBuf],
    leave: impl FnOnce(),
    room: impl FnOnce(),
) -> bool {
    leave();
    let m = match w.try_mount(&[], &[]) {
        Ok(m) => m,
        // Not even the control directory: nothing has begun.
        Err((code, log)) => {
            assert!(code != 0 && log.contains("No space left"), "{code}: {log}");
            room();
            let m = w.mount();
            m.finish();
            w.expect_finished_copy();
            w.empty_dst();
            return true;
        }
    };
    wait_until("COMPLETE or full", LIMIT, || {
        is_full(&m) || m.status()["state"] == "COMPLETE"
    });
    let full = is_full(&m);
    let seen = expect_readable(&m, &w.src, files, libc::ENOSPC);
    let status = m.status();
    eprintln!(
        "{}: {seen} of {} files seen, {} pulled",
        status["state"],
        files.len(),
        status["files_pulled"]
    );
    let write = fs::write(m.path("new"), bytes(1, 100_000));
    if let Err(e) = write {
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
    }
    match fs::remove_file(m.path("new")) {
        Ok(()) => nasty::At::open(&m.at).stamp(".", 1_400_000_000, 2),
        // In a directory that is not populated it could not even be made, or asked for.
        Err(e) => {
            let errno = e.raw_os_error();
            assert!(
                [Some(libc::ENOENT), Some(libc::ENOSPC)].contains(&errno),
                "{e}"
            );
        }
    }
    room();
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_finished_copy();
    w.empty_dst();
    full
}

fn more<T>(few: Vec<T>, many: impl FnOnce() -> Vec<T>) -> Vec<T> {
    if tests_all() { many() } else { few }
}

fn sweep(kind: &str, size: u64, mkfs: &[&str]) {
    let Some((target, w)) = world(kind, size, mkfs, "loop") else {
        return;
    };
    fill(&w.src);
    let files = files_of(&w.src);
    let few = vec![300, 1700];
    let steps = more(few, || {
        let close = (0..24).map(|n| n * 36);
        close.chain((4..32).map(|n| n * 256)).collect()
    });
    let mut full = 0;
    for kib in steps {
        eprintln!("{kind}, {kib} KiB free");
        let leave = || target.leave(kib << 10);
        full += usize::from(migrate_through(&w, &files, leave, || target.make_room()));
    }
    assert!(full > 0, "DST was never full");
}

#[test]
fn nothing_is_lost_wherever_ext4_is_full() {
    sweep("ext4", 64 << 20, &EXT4);
}

#[test]
fn nothing_is_lost_wherever_xfs_is_full() {
    sweep("xfs", 320 << 20, &[]);
}

#[test]
fn nothing_is_lost_wherever_btrfs_is_full() {
    sweep("btrfs", 160 << 20, &["--mixed"]);
}

#[test]
fn nothing_is_lost_wherever_the_inodes_run_out() {
    let few = [&EXT4[..], &["-N", "1024"]].concat();
    let Some((target, w)) = world("ext4", 64 << 20, &few, "loop") else {
        return;
    };
    fill(&w.src);
    let files = files_of(&w.src);
    let fillers = target.at.join("fillers");
    let steps = more(vec![40, 200], || {
        vec![0, 1, 2, 3, 5, 7, 8, 9, 12, 20, 60, 100, 150, 250, 300]
    });
    let mut full = 0;
    for left in steps {
        eprintln!("{left} inodes free");
        let leave = || {
            fs::create_dir(&fillers).unwrap();
            let free = rustix::fs::statvfs(&target.at).unwrap().f_ffree;
            for n in left..free {
                File::create(fillers.join(n.to_string())).unwrap();
            }
        };
        let room = || fs::remove_dir_all(&fillers).unwrap();
        full += usize::from(migrate_through(&w, &files, leave, room));
    }
    assert!(full > 0, "DST never lacked inodes");
}

/// What a metadata block could not be had for is set when it can: ENOSPC says "too large" as well.
#[test]
pub(crate) fn an_xattr_that_found_no_room_is_not_left_out_and_one_that_never_fits_is_in_the_ledger()
{
    // SRC on xfs holds what no ext4 inode can.
    if !can_mount_on("ext4") || !can_mount_on("xfs") {
        return;
    }
    let w = World::on_two("xfs", "ext4");
    let root = At::open(&w.src);
    for name in ["a", "b"] {
        root.file(name, name.as_bytes());
        root.xattr(name, "user.small", b"small");
    }
    root.xattr("a", "user.huge", &[b'h'; 30_000]);
    let m = w.mount();
    wait_until("an entry in the ledger", LIMIT, || {
        m.status()["errors"] == 1
    });
    wait_until("the data", LIMIT, || m.status()["files_pulled"] == 2);
    let entry: Value = serde_json::from_str(m.errors().trim()).unwrap();
    assert_eq!(
        (&entry["path"], &entry["call"]),
        (&"a".into(), &"user.huge".into())
    );
    assert!(m.status()["dst_full"].is_null(), "{:#}", m.status());
    let small = compare::manifest(&m.at);
    assert!(
        small
            .entries()
            .filter(|(_, e)| e.has_xattr("user.small"))
            .count()
            == 2
    );
}

/// Ticks of CPU that a process has used.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_full_target_keeps_nobody_busy_and_is_told_of_once() {
    let Some((target, w)) = world("ext4", 64 << 20, &EXT4, "loop") else {
        return;
    };
    let root = At::open(&w.src);
    for n in 0..1500_u64 {
        root.file(format!("f{n}"), &bytes(n, 30_000));
    }
    target.leave(20 << 20);
    let m = w.mount();
    wait_until("full", LIMIT, || is_full(&m));
    assert_eq!(m.status()["background"], "waits for room in dst");
    let why = m.status()["dst_full"].as_str().unwrap().to_owned();
    assert!(why.contains("No space left on device"), "{why}");
    // What was under way ends.
    thread::sleep(Duration::from_secs(3));
    let before = cpu_ticks(m.pid);
    thread::sleep(Duration::from_secs(12));
    let used = cpu_ticks(m.pid) - before;
    eprintln!("{used} ticks of CPU in 12 s");
    assert!(used < 150, "{used} ticks of CPU in 12 s of waiting");
    assert!(is_full(&m));
    let log = m.log();
    assert_eq!(log.matches("dst takes nothing more").count(), 1, "{log}");
    target.make_room();
    m.finish();
    w.expect_finished_copy();
}

fn loop_device(at: &Path) -> String {
    let found = run(Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(at)).expect_code(0);
    found.out.trim().trim_start_matches("/dev/").to_owned()
}

#[test]
fn a_target_that_is_read_only_after_an_error_is_read_on_and_goes_on_after_repair() {
    let mount = "loop,errors=remount-ro";
    let Some((target, w)) = world("ext4", 256 << 20, &EXT4, mount) else {
        return;
    };
    fill(&w.src);
    let files = files_of(&w.src);
    let m = w.mount_lazy();
    for dir in ["d0", "d1", "d2", "d3", "d4", "d0/names", "d1/names"] {
        fs::read_dir(m.path(dir)).unwrap().for_each(drop);
    }
    fs::read(m.path("d0/f9")).unwrap();
    fs::write(m.path("d0/synced"), b"synced").unwrap();
    File::open(m.path("d0/synced")).unwrap().sync_all().unwrap();
    let device = loop_device(&target.at);
    let backing = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")).unwrap();
    let image = target
        .at
        .parent()
        .unwrap()
        .join(Path::new(backing.trim()).file_name().unwrap());
    fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    wait_until("DEGRADED", LIMIT, || is_full(&m));
    let why = m.status()["dst_full"].as_str().unwrap().to_owned();
    assert!(why.contains("Read-only file system"), "{why}");
    let seen = expect_readable(&m, &w.src, &files, libc::EROFS);
    assert!(seen > 100, "{seen}");
    for error in [
        fs::write(m.path("d0/new"), b"x").unwrap_err(),
        fs::remove_file(m.path("d0/f1")).unwrap_err(),
        fs::rename(m.path("d0/f1"), m.path("d1/f1")).unwrap_err(),
        File::options()
            .append(true)
            .open(m.path("d0/f2"))
            .map(drop)
            .unwrap_err(),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    }
    // Nothing that src has is an entry's failure.
    assert_eq!(m.status()["errors"], 0, "{}", m.errors());
    m.unmount();
    run(Command::new("umount").arg(&target.at)).expect_code(0);
    let fsck = run(Command::new(find_program("e2fsck").unwrap())
        .args(["-f", "-y"])
        .arg(&image));
    assert!(fsck.code() < 4, "{} {}", fsck.out, fsck.err);
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(&target.at))
    .expect_code(0);
    let m = w.mount();
    assert_eq!(fs::read(m.path("d0/synced")).unwrap(), b"synced");
    fs::remove_file(m.path("d0/synced")).unwrap();
    At::open(&m.path("d0")).stamp(".", 1_400_000_000, 1);
    m.finish();
    w.expect_finished_copy();
}

/// btrfs' quota groups need no more of the kernel than btrfs.
#[test]
fn a_quota_that_is_used_up_is_told_and_waited_for() {
    if !can_mount_on("ext4")
        || !can_mount_on("btrfs")
        || !need(find_program("btrfs").is_some(), "btrfs")
    {
        return;
    }
    let (a, b) = (LoopFs::new("ext4"), LoopFs::sized("btrfs", 400 << 20));
    let (fs_root, dst) = (b.path().to_path_buf(), b.path().join("dst"));
    let btrfs = |args: &[&str]| run(Command::new("btrfs").args(args).arg(&dst)).expect_code(0);
    run(Command::new("btrfs")
        .args(["quota", "enable"])
        .arg(&fs_root))
    .expect_code(0);
    btrfs(&["subvolume", "create"]);
    btrfs(&["qgroup", "limit", "4M"]);
    let w = World::from(a.dir("src"), dst.clone(), vec![a, b]);
    let root = At::open(&w.src);
    for n in 0..20_u64 {
        root.file(format!("f{n}"), &bytes(n, 500_000));
    }
    root.file("large", &bytes(99, 9 << 20));
    let m = w.mount();
    wait_until("DEGRADED", LIMIT, || is_full(&m));
    let why = m.status()["dst_full"].as_str().unwrap().to_owned();
    assert!(why.contains("quota"), "{why}");
    let files = files_of(&w.src);
    let seen = expect_readable(&m, &w.src, &files, libc::EDQUOT);
    assert_eq!(seen, 21);
    let write = fs::write(m.path("new"), bytes(1, 8 << 20)).unwrap_err();
    assert_eq!(write.raw_os_error(), Some(libc::EDQUOT));
    assert_eq!(m.status()["errors"], 0, "{}", m.errors());
    btrfs(&["qgroup", "limit", "none"]);
    // What was written, and its name, where there was room for that.
    let _ = fs::remove_file(m.path("new"));
    At::open(&m.at).stamp(".", 1_400_000_000, 2);
    root.stamp(".", 1_400_000_000, 2);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_finished_copy();
}

fn effective(status: &Path) -> u64 {
    let status = fs::read_to_string(status).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
}

/// With CAP_SYS_RESOURCE what users write would pass their quotas. (The kernel checks nothing else.)
#[test]
pub(crate) fn threads_that_serve_users_pass_no_quota() {
    const FSETID: u32 = 4;
    const SYS_RESOURCE: u32 = 24;
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    let m = w.mount_lazy();
    // The daemon itself keeps both, where it has them: root of some containers has no CAP_SYS_RESOURCE.
    let main = effective(format!("/proc/{}/status", m.pid).as_ref());
    assert!(main >> FSETID & 1 == 1, "{main:x}");
    let mut seen = 0;
    for task in fs::read_dir(format!("/proc/{}/task", m.pid)).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap();
        if name.starts_with("fuse-") {
            let own = effective(&task.join("status"));
            assert_eq!(
                own & (1 << FSETID | 1 << SYS_RESOURCE),
                0,
                "{name}: {own:x}"
            );
            seen += 1;
        }
    }
    assert!(seen >= 2, "{seen} threads");
}

/// `sync` stops with one line, and the next run makes the copy whole.
fn sync_sweep(kind: &str, size: u64, mkfs: &[&str]) {
    let Some((target, w)) = world(kind, size, mkfs, "loop") else {
        return;
    };
    fill(&w.src);
    let steps = more(vec![300, 1700], || (0..40).map(|n| n * 90).collect());
    let mut refused = 0;
    for kib in steps {
        target.leave(kib << 10);
        let sync = || run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst));
        let first = sync();
        eprintln!("{kind}, {kib} KiB free: {} {}", first.code(), first.err);
        if first.code() != 0 {
            refused += 1;
            let full = first
                .err
                .lines()
                .filter(|l| l.contains("DST is full"))
                .count();
            assert_eq!((first.code(), full), (11, 1), "{}", first.err);
        }
        target.make_room();
        sync().expect_code(0);
        w.expect_finished_copy();
        w.empty_dst();
    }
    assert!(refused > 0, "DST was never full");
}

#[test]
fn sync_into_a_full_ext4_stops_and_goes_on() {
    sync_sweep("ext4", 64 << 20, &EXT4);
}

#[test]
fn sync_into_a_full_xfs_stops_and_goes_on() {
    sync_sweep("xfs", 320 << 20, &[]);
}

#[test]
pub(crate) fn sync_into_a_read_only_target_stops_with_one_line() {
    let Some((target, w)) = world("ext4", 64 << 20, &EXT4, "loop") else {
        return;
    };
    fill(&w.src);
    run(Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&target.at))
    .expect_code(0);
    let first = run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(11);
    assert!(first.err.lines().count() < 20, "{}", first.err);
    assert!(first.err.contains("Read-only file system"), "{}", first.err);
    run(Command::new("mount")
        .args(["-o", "remount,rw"])
        .arg(&target.at))
    .expect_code(0);
    run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(0);
    w.expect_finished_copy();
    assert!(target.free() > 0);
}
