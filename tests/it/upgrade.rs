//! Upgrade: another program takes over while the mount is in use, and nobody notices.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::compare::{self, Ignore};
use crate::fixture::{
    LARGE, LIMIT, Mounted, Output, Random, World, bytes, can_mount_on, find_program, kit, mirrorfs,
    need, run, wait_until,
};
use crate::nasty::{self, At};
use crate::raw;

/// The program's own path, as `--binary` takes it.
pub(crate) fn program() -> PathBuf {
    mirrorfs().get_program().into()
}

pub(crate) fn try_upgrade(m: &Mounted, binary: &Path) -> Output {
    run(mirrorfs()
        .arg("upgrade")
        .arg(&m.at)
        .arg("--binary")
        .arg(binary))
}

#[track_caller]
pub(crate) fn upgrade(m: &Mounted) -> String {
    let out = try_upgrade(m, &program());
    assert_eq!(out.code(), 0, "{}{}\n{}", out.out, out.err, m.log());
    out.out
}

/// A file of src that no hole and no extent can make cheaper.
pub(crate) fn file(w: &World, name: &str, len: usize) {
    let path = w.src.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes(len as u64, len)).unwrap();
}

/// What users hold while the program changes under them.
struct Held {
    /// Read by ranges: the file is larger than what open waits for.
    large: File,
    /// Past the daemon.
    small: File,
    written: File,
    unlinked: File,
    map: raw::Map,
    pub(crate) list: fs::ReadDir,
    pub(crate) listed: usize,
}

pub(crate) const NAMES: usize = 3000;

/// Lists on; how many there were.
fn list_some(list: &mut fs::ReadDir, max: usize) -> usize {
    list.take(max)
        .inspect(|e| assert!(e.is_ok(), "{e:?}"))
        .count()
}

fn hold(m: &Mounted) -> Held {
    let mut rw = OpenOptions::new();
    rw.read(true).write(true);
    let unlinked = rw.open(m.path("held/unlinked")).unwrap();
    fs::remove_file(m.path("held/unlinked")).unwrap();
    let mapped = rw.open(m.path("held/mapped")).unwrap();
    let map = raw::Map::shared(mapped.as_fd(), 8192, true).unwrap();
    map.write(0, b"before");
    let mut list = fs::read_dir(m.path("many")).unwrap();
    let listed = list_some(&mut list, 100);
    let large = File::open(m.path("large")).unwrap();
    let mut start = [0; 4096];
    large.read_exact_at(&mut start, 0).unwrap();
    Held {
        large,
        small: File::open(m.path("held/small")).unwrap(),
        written: rw.open(m.path("held/written")).unwrap(),
        unlinked,
        map,
        list,
        listed,
    }
}

impl Held {
    pub(crate) fn use_again(&mut self, n: u8) {
        let whole = bytes(LARGE as u64 * 2, LARGE * 2);
        let mut part = vec![0; 100_000];
        let at = usize::from(n) * 300_000;
        self.large.read_exact_at(&mut part, at as u64).unwrap();
        assert!(part == whole[at..at + 100_000], "round {n}");
        let mut part = vec![0; 5000];
        self.small.read_exact_at(&mut part, 0).unwrap();
        assert!(part == bytes(5000, 5000), "round {n}");
        self.written
            .write_all_at(&[n; 4096], u64::from(n) * 4096)
            .unwrap();
        self.written.sync_data().unwrap();
        assert_eq!(self.written.metadata().unwrap().len(), 200_000);
        self.unlinked.write_all_at(&[n; 10], 0).unwrap();
        let mut part = [0; 10];
        self.unlinked.read_exact_at(&mut part, 0).unwrap();
        assert_eq!(part, [n; 10]);
        assert_eq!(self.unlinked.metadata().unwrap().nlink(), 0);
        self.map.write(usize::from(n), &[n]);
        self.map.sync().unwrap();
        self.listed += list_some(&mut self.list, 100);
    }
}

/// What one of many users does in a directory of his own, the same on the mount and on a plain copy.
/// Every step must succeed.
pub(crate) fn work(root: &Path, me: u64, round: u64) -> io::Result<()> {
    let mine = root.join(format!("user{me}"));
    let mut random = Random::new(me * 1_000_003 + round);
    let dir = mine.join(format!("r{round}"));
    fs::create_dir(&dir)?;
    for n in 0..4 {
        let path = dir.join(format!("new{n}"));
        let mut new = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        new.write_all(&bytes(random.next(), 500 + n * 3000))?;
        if n == 0 {
            new.sync_all()?;
        }
    }
    fs::rename(dir.join("new0"), dir.join("renamed"))?;
    fs::hard_link(dir.join("renamed"), dir.join("linked"))?;
    fs::remove_file(dir.join("new1"))?;
    std::os::unix::fs::symlink("renamed", dir.join("symlink"))?;
    assert_eq!(fs::read_link(dir.join("symlink"))?, Path::new("renamed"));
    fs::create_dir(dir.join("d"))?;
    fs::remove_dir(dir.join("d"))?;
    // What is pulled: read, changed, moved, removed.
    let old = |n: u64| {
        let (d, f) = (n / 8 % 8, n % 8);
        let sub = if f % 2 == 0 { "" } else { "e/" };
        root.join(format!("tree{me}/d{d}/{sub}f{f}"))
    };
    let at = round * 3;
    if at + 3 <= 64 {
        assert_eq!(
            fs::read(old(at))?.len() as u64,
            fs::metadata(old(at))?.len()
        );
        let changed = OpenOptions::new().write(true).open(old(at))?;
        changed.write_all_at(b"changed", 1)?;
        fs::rename(old(at + 1), dir.join("moved"))?;
        fs::remove_file(old(at + 2))?;
    }
    assert_eq!(
        fs::read_dir(&dir)?.count(),
        if at + 3 <= 64 { 6 } else { 5 }
    );
    fs::set_permissions(dir.join("new2"), fs::Permissions::from_mode(0o640))?;
    let target = dir.join("new3");
    let flags = rustix::fs::XattrFlags::CREATE;
    rustix::fs::setxattr(&target, "user.one", b"1", flags)?;
    rustix::fs::removexattr(&target, "user.one")?;
    OpenOptions::new().write(true).open(&target)?.set_len(100)?;
    Ok(())
}

fn on_many_users(kind: &str) {
    const UPGRADES: u8 = 20;
    let (mut longest, mut pid) = (0, None);
    while_users_work(kind, 8, UPGRADES, &[], |m| {
        let pid = pid.get_or_insert_with(|| m.status()["pid"].clone());
        let said = upgrade(m);
        let ms = said.split(' ').rev().nth(1).and_then(|ms| ms.parse().ok());
        longest = longest.max(ms.unwrap_or_else(|| panic!("{said}")));
        assert_eq!(m.status()["pid"], *pid, "the process stays");
    });
    eprintln!("{UPGRADES} upgrades, requests waited {longest} ms at the most");
}

/// Does something to a mount again and again, while so many users work in it and somebody holds all kinds of
/// things open. No operation fails, and the result is that of the same work in a plain directory.
pub(crate) fn while_users_work(
    kind: &str,
    users: u64,
    times: u8,
    args: &[&str],
    mut what: impl FnMut(&Mounted),
) {
    if !can_mount_on(kind) {
        return;
    }
    let w = World::on(kind).over();
    for me in 0..users {
        nasty::ordinary(&w.src.join(at_dir(&w, &format!("tree{me}"))), 8, 8);
        fs::create_dir(w.src.join(format!("user{me}"))).unwrap();
    }
    nasty::ordinary(&w.src.join(at_dir(&w, "rest")), 60, 40);
    for (name, len) in [("small", 5000), ("written", 200_000), ("unlinked", 9000)] {
        file(&w, &format!("held/{name}"), len);
    }
    file(&w, "held/mapped", 8192);
    file(&w, "large", LARGE * 2);
    for n in 0..NAMES {
        file(&w, &format!("many/{n:05}"), 0);
    }
    let plain = w.scratch_path("plain");
    run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
    // Slow enough that there is something to pull until the last of them.
    let m = w.mount_with(&[args, &["--bwlimit", "600K"]].concat(), &[]);
    let mut held = hold(&m);
    fs::remove_file(plain.join("held/unlinked")).unwrap();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut done = Vec::new();
    thread::scope(|scope| {
        let working: Vec<_> = (0..users)
            .map(|me| {
                let (at, stop, rounds) = (m.at.clone(), &stop, &rounds);
                scope.spawn(move || {
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        work(&at, me, round)
                            .unwrap_or_else(|e| panic!("user {me}, round {round}: {e}"));
                        round += 1;
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    round
                })
            })
            .collect();
        for n in 0..times {
            let before = rounds.load(Ordering::Relaxed);
            what(&m);
            held.use_again(n);
            let end = Instant::now() + LIMIT;
            while rounds.load(Ordering::Relaxed) < before + users
                && Instant::now() < end
                && working.iter().all(|u| !u.is_finished())
            {
                thread::sleep(Duration::from_millis(5));
            }
            if working.iter().any(|u| u.is_finished()) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        done.extend(working.into_iter().map(|u| u.join()));
    });
    let done: Vec<u64> = done.into_iter().map(|d| d.unwrap()).collect();
    eprintln!("rounds {done:?}");
    let open = |name: &str| {
        OpenOptions::new()
            .write(true)
            .open(plain.join(name))
            .unwrap()
    };
    let (written, mapped) = (open("held/written"), open("held/mapped"));
    mapped.write_all_at(b"before", 0).unwrap();
    for n in 0..times {
        written
            .write_all_at(&[n; 4096], u64::from(n) * 4096)
            .unwrap();
        mapped.write_all_at(&[n], u64::from(n)).unwrap();
    }
    held.listed += list_some(&mut held.list, usize::MAX);
    assert_eq!(held.listed, NAMES);
    for (me, rounds) in (0..).zip(done) {
        (0..rounds).for_each(|round| work(&plain, me, round).unwrap());
    }
    run(mirrorfs().args(["set", "--bwlimit", "0"]).arg(&m.at)).expect_code(0);
    m.wait_complete();
    drop(held);
    m.finish();
    w.expect_no_trace();
    expect_like(&plain, &w.dst);
}

/// Equal, but for the times of what was changed just now.
#[track_caller]
pub(crate) fn expect_like(want: &Path, dst: &Path) {
    let ignore = Ignore {
        recent_mtime: true,
        ..Ignore::default()
    };
    let (want, dst) = (compare::manifest(want), compare::manifest(dst));
    let found = compare::differences(&want, &dst, ignore);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// A new directory of src.
fn at_dir(w: &World, name: &str) -> String {
    At::open(&w.src).dir(name);
    name.to_owned()
}

#[test]
pub(crate) fn no_operation_fails_while_the_program_is_replaced_twenty_times_on_ext4() {
    on_many_users("ext4");
}

#[test]
fn no_operation_fails_while_the_program_is_replaced_twenty_times_on_xfs() {
    on_many_users("xfs");
}

#[test]
fn no_operation_fails_while_the_program_is_replaced_twenty_times_on_btrfs() {
    on_many_users("btrfs");
}

/// A source that misbehaves on command, and its end.
pub(crate) struct BadSource(Child, PathBuf);

impl BadSource {
    pub(crate) fn start(w: &World, at: &Path, rules: &[&str]) -> Option<BadSource> {
        let tool = kit("badsrc.py");
        if !need(tool.is_some(), "badsrc.py") {
            return None;
        }
        let mut command = Command::new("python3");
        command.arg(tool.unwrap()).arg(&w.src).arg(at);
        for rule in rules {
            command.args(["--rule", rule]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = raw::die_with_parent(&mut command).spawn().unwrap();
        wait_until("the bad source", LIMIT, || {
            crate::fixture::fuse_mount_at(at).is_some()
        });
        Some(BadSource(child, at.to_path_buf()))
    }
}

impl Drop for BadSource {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.1, rustix::mount::UnmountFlags::DETACH);
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
pub(crate) fn who_waits_for_a_slow_source_gets_his_file_from_the_next_program() {
    if !can_mount_on("ext4") {
        return;
    }
    let real = World::on("ext4");
    file(&real, "dir/slow", 200_000);
    file(&real, "dir/other", 3000);
    let scratch = crate::fixture::Scratch::new();
    let view = scratch.dir("view");
    let rule = "path=dir/slow op=read delay=4";
    let Some(_bad) = BadSource::start(&real, &view, &[rule]) else {
        return;
    };
    let w = World::from(view, real.dst.clone(), Vec::new()).over();
    let m = w.mount_lazy();
    thread::scope(|scope| {
        let path = m.path("dir/slow");
        let reader = scope.spawn(move || fs::read(path));
        wait_until("somebody waits", LIMIT, || m.status()["waiting"] == 1);
        let (mut n, end) = (0, Instant::now() + LIMIT);
        while n < 3 && !reader.is_finished() && Instant::now() < end {
            upgrade(&m);
            assert_eq!(fs::read(m.path("dir/other")).unwrap(), bytes(3000, 3000));
            n += 1;
        }
        assert!(n > 0, "he did not wait for it");
        let read = reader.join().unwrap().unwrap();
        assert!(read == bytes(200_000, 200_000));
    });
}

#[test]
pub(crate) fn names_that_were_seen_before_their_directory_was_populated_keep_their_inodes() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    for n in 0..NAMES {
        file(&w, &format!("huge/{n:05}"), 100 + n % 50);
    }
    let m = w.mount_lazy();
    let names = ["00007", "01500", "02999"];
    let inode = |name: &&str| fs::metadata(m.path("huge").join(name)).unwrap().ino();
    let before: Vec<u64> = names.iter().map(inode).collect();
    let open = File::open(m.path("huge/01500")).unwrap();
    upgrade(&m);
    let raw = |name: &&str| fs::metadata(m.path("huge").join(name)).unwrap();
    assert_eq!(names.iter().map(inode).collect::<Vec<_>>(), before);
    assert_eq!(open.metadata().unwrap().ino(), before[1]);
    // Now all of it: what was seen is not made anew.
    assert_eq!(fs::read_dir(m.path("huge")).unwrap().count(), NAMES);
    fs::write(m.path("huge/new"), "populated").unwrap();
    fs::remove_file(m.path("huge/new")).unwrap();
    assert_eq!(names.iter().map(inode).collect::<Vec<_>>(), before);
    assert_eq!(raw(&names[2]).len(), 100 + 2999 % 50);
    drop(open);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_no_trace();
    expect_like(&w.src, &w.dst);
}

/// A program that is not the one it should be.
pub(crate) fn script(w: &World, name: &str, text: &str) -> PathBuf {
    let path = w.scratch_path(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
pub(crate) fn a_program_that_cannot_take_over_changes_nothing() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/small", 1000);
    file(&w, "a/other", 2000);
    let m = w.mount_lazy();
    let mut open = File::open(m.path("a/small")).unwrap();
    let not_executable = w.scratch_path("text");
    fs::write(&not_executable, "no program").unwrap();
    let own = program();
    let on_mount = m.path("mirrorfs");
    fs::copy(&own, &on_mount).unwrap();
    let own = own.display();
    let cases = [
        (w.scratch_path("nowhere"), "No such file"),
        (not_executable, "exec: "),
        (script(&w, "old", "#!/bin/sh\nexit 2\n"), "cannot take over"),
        (
            // One that knows another version of the state.
            script(
                &w,
                "other version",
                &format!("#!/bin/sh\nexec {own} \"$1\" 999\n"),
            ),
            "cannot take over",
        ),
        (
            // One of the same version to which what is handed over makes no sense.
            script(
                &w,
                "other shape",
                &format!("#!/bin/sh\nsed 's/\"nodes\":/\"inodes\":/' | {own} \"$@\"\n"),
            ),
            "cannot take over",
        ),
        (
            script(&w, "slow", "#!/bin/sh\nexec sleep 1000\n"),
            "does not say",
        ),
        (on_mount, "is on this mount"),
        (
            // It says that it can, and then cannot: the program before goes on.
            script(
                &w,
                "fails",
                &format!("#!/bin/sh\nexport MIRRORFS_FAULT=refuse-upgrade\nexec {own} \"$@\"\n"),
            ),
            "refused by a test",
        ),
        (
            script(
                &w,
                "gone",
                "#!/bin/sh\n[ \"$1\" = --upgrade-check ] && rm \"$0\"\nexit 0\n",
            ),
            "No such file",
        ),
    ];
    for (binary, why) in cases {
        let out = try_upgrade(&m, &binary).expect_code(1);
        assert!(out.err.contains(why), "{why}: {}\n{}", out.err, m.log());
        assert_eq!(out.err.lines().count(), 1, "{}", out.err);
        // These are told so before anything is held; they come before those that are believed.
        if why == "cannot take over" {
            assert!(!m.log().contains("upgrade to"), "{}", m.log());
        }
        assert_eq!(fs::read(m.path("a/other")).unwrap(), bytes(2000, 2000));
        fs::write(m.path("new"), why).unwrap();
    }
    let mut all = Vec::new();
    open.read_to_end(&mut all).unwrap();
    assert!(all == bytes(1000, 1000));
    // And one that can, after all of them.
    let text = format!("#!/bin/sh\nunset MIRRORFS_FAULT\nexec {own} \"$@\"\n");
    try_upgrade(&m, &script(&w, "works", &text)).expect_code(0);
    fs::remove_file(m.path("new")).unwrap();
    fs::remove_file(m.path("mirrorfs")).unwrap();
    drop(open);
    m.unmount();
}

#[test]
pub(crate) fn limits_and_a_pause_stay_and_the_daemon_is_the_same_one() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    nasty::ordinary(&w.src, 4, 4);
    // So that the background is not done before it is paused.
    fs::write(w.src.join("large"), bytes(6, 48 << 20)).unwrap();
    let m = w.mount_with(&["--bwlimit", "3M"], &[]);
    run(mirrorfs().arg("pause").arg(&m.at)).expect_code(0);
    run(mirrorfs().args(["set", "--jobs", "3"]).arg(&m.at)).expect_code(0);
    let before = m.status();
    // Without --binary: the file that it was started from.
    run(mirrorfs().arg("upgrade").arg(&m.at)).expect_code(0);
    let after = m.status();
    for key in [
        "pid",
        "since_unix",
        "background",
        "bwlimit",
        "jobs",
        "home_names",
        "src_fs",
    ] {
        assert_eq!(before[key], after[key], "{key}");
    }
    assert_eq!(after["background"], "paused");
    let fds = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let open = fds(m.pid);
    for _ in 0..3 {
        upgrade(&m);
    }
    assert!(fds(m.pid) <= open + 2, "{} and now {}", open, fds(m.pid));
    let parent = m.path("");
    let link = fs::read_link(format!("/proc/{}/exe", m.pid)).unwrap();
    assert_eq!(
        link,
        program().canonicalize().unwrap(),
        "{}",
        parent.display()
    );
    // Signals are heard as before.
    raw::kill(m.pid, libc::SIGUSR1);
    run(mirrorfs().args(["set", "--bwlimit", "0"]).arg(&m.at)).expect_code(0);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_finished_copy();
}

/// A file system that takes no writes until this goes, or this process.
struct Frozen(Child);

impl Frozen {
    fn new(at: &Path) -> Frozen {
        let script = "fsfreeze -f \"$0\" && echo frozen && cat; fsfreeze -u \"$0\"";
        let mut child = Command::new("sh");
        child.args(["-c", script]).arg(at);
        child.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.spawn().unwrap();
        let mut said = [0; 7];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut said)
            .unwrap();
        Frozen(child)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let status = self.0.wait().unwrap();
        assert!(status.success() || thread::panicking(), "{status}");
    }
}

#[test]
pub(crate) fn a_frozen_dst_is_no_time_for_an_upgrade_and_nobody_is_kept() {
    if !can_mount_on("ext4") || !need(find_program("fsfreeze").is_some(), "fsfreeze") {
        return;
    }
    let w = World::on_two("ext4", "ext4");
    for n in 0..5 {
        file(&w, &format!("dir/f{n}"), 5000);
    }
    let m = w.mount();
    m.wait_complete();
    let read = || {
        for n in 0..5 {
            let path = m.path(format!("dir/f{n}"));
            assert_eq!(fs::read(path).unwrap(), bytes(5000, 5000));
        }
    };
    read();
    let frozen = Frozen::new(w.dst.parent().unwrap());
    let mut command = mirrorfs();
    command
        .arg("upgrade")
        .arg(&m.at)
        .arg("--binary")
        .arg(program());
    let mut asked = command.stderr(Stdio::piped()).spawn().unwrap();
    // Whoever reads, and whoever asks, is served meanwhile.
    wait_until("an answer", LIMIT, || {
        read();
        assert_eq!(m.status()["state"], "COMPLETE");
        asked.try_wait().unwrap().is_some()
    });
    let said = asked.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&said.stderr);
    crate::messages::heard(&err, said.status.code());
    assert_eq!(said.status.code(), Some(1), "{err}");
    let line = "upgrade: DST takes no writes: it is frozen, or its disk does not answer";
    assert!(err.contains(line), "{err}");
    drop(frozen);
    upgrade(&m);
    read();
    fs::write(m.path("new"), b"new").unwrap();
    m.finish();
}
