//! Keeper: the daemon is killed, another one goes on with its mount, and nobody notices.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixture::{
    LARGE, LIMIT, Mounted, World, bytes, can_mount_on, mirrorfs, run, wait_until,
};
use crate::raw;
use crate::upgrade::{
    BadSource, NAMES, expect_like, file, program, try_upgrade, while_users_work, work,
};

pub(crate) const KEEP: &[&str] = &["--keep-mount", "--transport", "dev"];
const LAZY: &[&str] = &["--keep-mount", "--transport", "dev", "--no-background"];

/// The daemon's pid; not the keeper's. `None`: it does not answer.
fn daemon(m: &Mounted) -> Option<u32> {
    let out = run(mirrorfs().arg("status").arg(&m.at).arg("--json"));
    let status: serde_json::Value = serde_json::from_str(&out.out).ok()?;
    u32::try_from(status["pid"].as_u64()?).ok()
}

/// kill -9 of the daemon; back when another one answers. How long that took.
#[track_caller]
pub(crate) fn kill(m: &Mounted) -> Duration {
    let old = daemon(m).expect("a daemon");
    assert_ne!(old, m.pid, "the keeper is another process");
    let begun = Instant::now();
    raw::kill(old, libc::SIGKILL);
    next(m, old);
    begun.elapsed()
}

#[track_caller]
fn next(m: &Mounted, old: u32) {
    let end = Instant::now() + LIMIT;
    while daemon(m).is_none_or(|pid| pid == old) {
        assert!(Instant::now() < end, "no other daemon\n{}", m.log());
        thread::sleep(Duration::from_millis(10));
    }
}

fn on_many_users(kind: &str) {
    const KILLS: u8 = 10;
    let mut longest = Duration::ZERO;
    while_users_work(kind, 4, KILLS, KEEP, |m| longest = longest.max(kill(m)));
    eprintln!("{KILLS} kills, {longest:?} at the most");
}

#[test]
pub(crate) fn no_operation_fails_while_the_daemon_is_killed_ten_times_on_ext4() {
    on_many_users("ext4");
}

#[test]
fn no_operation_fails_while_the_daemon_is_killed_ten_times_on_xfs() {
    on_many_users("xfs");
}

#[test]
fn no_operation_fails_while_the_daemon_is_killed_ten_times_on_btrfs() {
    on_many_users("btrfs");
}

#[test]
fn who_waits_for_a_slow_source_gets_his_file_from_the_next_daemon() {
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
    let m = w.mount_with(LAZY, &[]);
    thread::scope(|scope| {
        let path = m.path("dir/slow");
        let reader = scope.spawn(move || fs::read(path));
        wait_until("somebody waits", LIMIT, || m.status()["waiting"] == 1);
        kill(&m);
        assert_eq!(fs::read(m.path("dir/other")).unwrap(), bytes(3000, 3000));
        let read = reader.join().unwrap().unwrap();
        assert!(read == bytes(200_000, 200_000));
    });
}

#[test]
fn who_writes_on_after_a_kill_gives_his_file_a_new_ctime() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let m = w.mount_with(LAZY, &[]);
    let path = m.path("a/f");
    let open = OpenOptions::new().write(true).open(&path).unwrap();
    kill(&m);
    let ctime = || {
        let stat = fs::metadata(&path).unwrap();
        (stat.ctime(), stat.ctime_nsec())
    };
    let before = ctime();
    thread::sleep(Duration::from_millis(20));
    open.write_all_at(b"mine", 10).unwrap();
    assert!(ctime() > before);
    drop(open);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
}

#[test]
fn names_that_were_seen_before_their_directory_was_populated_keep_their_inodes_over_a_kill() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    for n in 0..NAMES {
        file(&w, &format!("huge/{n:05}"), 100 + n % 50);
    }
    let m = w.mount_with(LAZY, &[]);
    let names = ["00007", "01500", "02999"];
    let inode = |name: &&str| fs::metadata(m.path("huge").join(name)).unwrap().ino();
    let before: Vec<u64> = names.iter().map(inode).collect();
    let open = File::open(m.path("huge/01500")).unwrap();
    kill(&m);
    assert_eq!(names.iter().map(inode).collect::<Vec<_>>(), before);
    assert_eq!(open.metadata().unwrap().ino(), before[1]);
    let listed: Vec<_> = fs::read_dir(m.path("huge"))
        .unwrap()
        .map(|e| e.map(|e| (e.file_name(), e.ino())).unwrap())
        .collect();
    assert_eq!(listed.len(), NAMES);
    for (name, ino) in names.iter().zip(&before) {
        let (_, now) = listed.iter().find(|(n, _)| n == *name).unwrap();
        assert_eq!(now, ino, "{name} was made anew");
    }
    kill(&m);
    fs::write(m.path("huge/new"), "populated").unwrap();
    fs::remove_file(m.path("huge/new")).unwrap();
    assert_eq!(names.iter().map(inode).collect::<Vec<_>>(), before);
    drop(open);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_no_trace();
    expect_like(&w.src, &w.dst);
}

#[test]
fn without_a_keeper_a_kill_ends_the_mount() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let m = w.mount();
    let open = File::open(m.path("a/f")).unwrap();
    let at = m.at.clone();
    m.kill();
    // Asked for: what the kernel still knows of a file it says without anybody.
    let ask = rustix::fs::AtFlags::STATX_FORCE_SYNC;
    let stat = rustix::fs::statx(
        rustix::fs::CWD,
        at.join("a/f"),
        ask,
        rustix::fs::StatxFlags::BASIC_STATS,
    );
    for (n, result) in [
        stat.map(drop).map_err(Into::into),
        work(&at, 0, 0),
        open.set_permissions(fs::Permissions::from_mode(0o600)),
        open.sync_all(),
    ]
    .into_iter()
    .enumerate()
    {
        let errno = result.err().and_then(|e| e.raw_os_error());
        assert_eq!(errno, Some(libc::ENOTCONN), "{n}");
    }
}

#[test]
fn a_dead_mount_is_followed_by_one_that_is_kept() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    // More than once: whoever looks below a dead mount may have ended in time.
    for _ in 0..4 {
        w.mount().kill();
        let m = w.mount_with(KEEP, &[]);
        assert_eq!(fs::read(m.path("a/f")).unwrap(), bytes(1000, 1000));
        assert_eq!(m.unmount(), 0);
    }
}

/// What a user does once, and what must be so whether or not the daemon died in the middle.
type Step = (&'static str, fn(&Path) -> std::io::Result<()>);

const STEPS: &[Step] = &[
    ("mkdir", |d| fs::create_dir(d.join("new"))),
    ("create", |d| {
        let mut new = OpenOptions::new();
        let new = new.write(true).create_new(true).open(d.join("new"))?;
        new.write_all_at(b"text", 0)
    }),
    ("symlink", |d| {
        std::os::unix::fs::symlink("f", d.join("new"))
    }),
    ("mknod", |d| {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            d.join("new"),
            rustix::fs::FileType::Fifo,
            mode,
            0,
        )?;
        Ok(())
    }),
    ("link", |d| fs::hard_link(d.join("f"), d.join("new"))),
    ("unlink", |d| fs::remove_file(d.join("f"))),
    ("rmdir", |d| fs::remove_dir(d.join("d"))),
    ("rename", |d| fs::rename(d.join("f"), d.join("new"))),
    ("rename over", |d| fs::rename(d.join("f"), d.join("g"))),
    ("rename into", |d| fs::rename(d.join("f"), d.join("d/f"))),
    ("rename dir", |d| fs::rename(d.join("d"), d.join("e"))),
    ("exchange", |d| {
        let (a, b) = (d.join("f"), d.join("g"));
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags)?;
        Ok(())
    }),
    ("noreplace", |d| {
        let (a, b) = (d.join("f"), d.join("new"));
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags)?;
        Ok(())
    }),
    ("setxattr", |d| {
        let flags = rustix::fs::XattrFlags::CREATE;
        rustix::fs::setxattr(d.join("f"), "user.new", b"1", flags)?;
        Ok(())
    }),
    ("removexattr", |d| {
        rustix::fs::removexattr(d.join("g"), "user.old")?;
        Ok(())
    }),
];

/// Names, kinds, contents and xattrs.
fn picture(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> = walk(dir, dir);
    all.sort();
    all
}

fn walk(root: &Path, dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let what = match meta.file_type() {
            t if t.is_file() => format!("{:?} {}", fs::read(&path).unwrap(), meta.nlink()),
            t => format!("{t:?}"),
        };
        let mut names = vec![0; 256];
        let n = rustix::fs::llistxattr(&path, &mut names).unwrap_or(0);
        let name = path.strip_prefix(root).unwrap().display().to_string();
        all.push(format!(
            "{name} {what} {:?}",
            String::from_utf8_lossy(&names[..n])
        ));
        if meta.is_dir() {
            all.extend(walk(root, &path));
        }
    }
    all
}

fn fill(dir: &Path) {
    fs::create_dir_all(dir.join("d")).unwrap();
    fs::write(dir.join("f"), "f").unwrap();
    fs::write(dir.join("g"), "g").unwrap();
    rustix::fs::setxattr(
        dir.join("g"),
        "user.old",
        b"1",
        rustix::fs::XattrFlags::CREATE,
    )
    .unwrap();
}

/// Each step, with a kill at a point of it.
fn steps_killed_at(point: &str, open: bool) {
    if !can_mount_on("ext4") {
        return;
    }
    for (name, step) in STEPS {
        if open && *name != "create" {
            continue;
        }
        let w = World::on("ext4").over();
        fill(&w.src.join("dir"));
        let plain = w.scratch_path("plain");
        fill(&plain);
        let marker = w.scratch_path("killed");
        let env = [
            ("MIRRORFS_FAULT", format!("{point}:1")),
            ("MIRRORFS_FAULT_KILL", marker.display().to_string()),
        ];
        let env = env.each_ref().map(|(k, v)| (*k, v.as_str()));
        let m = w.mount_with(KEEP, &env);
        let first = daemon(&m).expect("a daemon");
        let dir = m.path("dir");
        let _cwd = File::open(&dir).unwrap();
        step(&dir).unwrap_or_else(|e| panic!("{name}, {point}: {e}\n{}", m.log()));
        assert!(marker.exists(), "{name}: {point} was not passed");
        next(&m, first);
        step(&plain).unwrap();
        assert_eq!(picture(&dir), picture(&plain), "{name}, {point}");
        // Nothing is done to whoever does it again.
        assert_eq!(step(&dir).is_ok(), step(&plain).is_ok(), "{name}, {point}");
        assert_eq!(picture(&dir), picture(&plain), "{name}, {point}");
        if open {
            expect_closed(&m, "dir/new");
        }
        drop(_cwd);
        m.finish();
        w.expect_no_trace();
        assert_eq!(
            picture(&w.dst.join("dir")),
            picture(&plain),
            "{name}, {point}"
        );
    }
}

/// The daemon has nothing open of that name any more.
fn expect_closed(m: &Mounted, name: &str) {
    wait_until("it is closed", LIMIT, || {
        let fds = format!("/proc/{}/fd", daemon(m).expect("a daemon"));
        let fds = fs::read_dir(fds).unwrap();
        let targets = fds.filter_map(|e| fs::read_link(e.ok()?.path()).ok());
        targets.into_iter().all(|t| !t.ends_with(name))
    });
}

#[test]
fn a_change_is_made_once_when_the_daemon_dies_after_it() {
    steps_killed_at("act-done", false);
}

#[test]
fn a_change_is_made_once_when_the_daemon_dies_before_it() {
    steps_killed_at("act-begun", false);
}

#[test]
fn a_file_is_made_once_when_the_daemon_dies_before_its_answer() {
    steps_killed_at("create-written", true);
}

/// A mount whose daemon is killed at a point, and a file that is opened there; what is there once it was.
#[track_caller]
fn opened_and_killed_at(w: &World, fault: &str, args: &[&str]) -> (Mounted, File, PathBuf) {
    file(w, "a/f", 100_000);
    let marker = w.scratch_path("killed");
    let text = marker.display().to_string();
    let env = [("MIRRORFS_FAULT", fault), ("MIRRORFS_FAULT_KILL", &text)];
    let m = w.mount_with(args, &env);
    let mut rw = OpenOptions::new();
    let open = rw.read(true).write(true).open(m.path("a/f")).unwrap();
    (m, open, marker)
}

#[test]
fn a_file_that_is_being_opened_opens_when_the_daemon_dies() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    let (m, open, marker) = opened_and_killed_at(&w, "open-written:1", LAZY);
    assert!(marker.exists());
    open.write_all_at(b"mine", 10).unwrap();
    open.sync_all().unwrap();
    kill(&m);
    let mut want = bytes(100_000, 100_000);
    want[10..14].copy_from_slice(b"mine");
    assert!(fs::read(m.path("a/f")).unwrap() == want);
    drop(open);
    expect_closed(&m, "a/f");
    m.finish();
    w.expect_no_trace();
    assert!(fs::read(w.dst.join("a/f")).unwrap() == want);
}

/// The mark of a file goes about a second after its bytes are here. Until then the next daemon pulls it
/// again, while others read it past the daemon.
#[test]
fn files_that_have_just_come_are_never_zeros_to_who_has_them_open() {
    const FILES: usize = 150;
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    for n in 0..FILES {
        file(&w, &format!("a/{n}"), 20_000 + n);
    }
    let m = w.mount_with(LAZY, &[]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let open: Vec<File> = (0..FILES)
            .map(|n| File::open(m.path(format!("a/{n}"))).unwrap())
            .collect();
        let (at, stop) = (m.at.clone(), &stop);
        let check = move |n: usize, found: &[u8], how: &str| {
            assert!(found == bytes(20_000 + n as u64, 20_000 + n), "{how} {n}");
        };
        let readers: Vec<_> = (0..3)
            .map(|me| {
                let at = at.clone();
                let open: Vec<File> = open.iter().map(|f| f.try_clone().unwrap()).collect();
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !stop.load(Ordering::Relaxed) {
                        for n in (me..FILES).step_by(3) {
                            let mut found = vec![0; 20_000 + n];
                            open[n].read_exact_at(&mut found, 0).unwrap();
                            check(n, &found, "open");
                            check(n, &fs::read(at.join(format!("a/{n}"))).unwrap(), "again");
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        for _ in 0..5 {
            kill(&m);
            thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
        let rounds: Vec<u64> = readers.into_iter().map(|r| r.join().unwrap()).collect();
        eprintln!("rounds {rounds:?}");
    });
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_no_trace();
    expect_like(&w.src, &w.dst);
}

#[test]
fn a_mixed_file_keeps_what_was_written_over_kills() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/large", LARGE * 2);
    let mut want = bytes(LARGE as u64 * 2, LARGE * 2);
    let m = w.mount_with(LAZY, &[]);
    let mut rw = OpenOptions::new();
    let open = rw.read(true).write(true).open(m.path("a/large")).unwrap();
    for n in 0..6usize {
        let at = n * 2_000_003;
        open.write_all_at(&[n as u8 + 1; 5000], at as u64).unwrap();
        want[at..at + 5000].fill(n as u8 + 1);
        if n % 2 == 0 {
            kill(&m);
        }
        let mut part = vec![0; 20_000];
        open.read_exact_at(&mut part, at as u64).unwrap();
        assert!(part == want[at..at + 20_000], "{n}");
    }
    open.sync_all().unwrap();
    kill(&m);
    assert!(fs::read(m.path("a/large")).unwrap() == want);
    drop(open);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_no_trace();
    assert!(fs::read(w.dst.join("a/large")).unwrap() == want);
}

/// A program that works in a directory of the mount, and answers lines.
#[test]
fn a_working_directory_lives_on_also_one_without_a_name() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/b/f", 1000);
    fs::create_dir(w.src.join("gone")).unwrap();
    let m = w.mount_with(KEEP, &[]);
    let shell = |dir: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-c", "while read line; do eval \"$line\" || exit 1; done"]);
        let sh = sh
            .current_dir(m.path(dir))
            .stdin(std::process::Stdio::piped());
        let sh = sh.stdout(std::process::Stdio::piped());
        raw::die_with_parent(sh).spawn().unwrap()
    };
    let (mut here, mut gone) = (shell("a/b"), shell("gone"));
    let ask = |sh: &mut std::process::Child, line: &str| {
        use std::io::{BufRead, Write};
        let input = sh.stdin.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
        let mut answer = String::new();
        let output = sh.stdout.as_mut().unwrap();
        std::io::BufReader::with_capacity(1, output)
            .read_line(&mut answer)
            .unwrap();
        answer.trim_end().to_owned()
    };
    assert_eq!(ask(&mut gone, "stat -c %F ."), "directory");
    fs::remove_dir(m.path("gone")).unwrap();
    for n in 0..3 {
        let name = format!("new{n}");
        kill(&m);
        assert_eq!(
            ask(&mut here, "/bin/pwd -P"),
            m.path("a/b").display().to_string()
        );
        assert_eq!(
            ask(&mut here, &format!("echo {n} > {name}; cat {name}")),
            n.to_string()
        );
        assert_eq!(ask(&mut here, "stat -c %s f"), "1000");
        // It has no name, and is the same as ever.
        assert_eq!(ask(&mut gone, "stat -c %F.%h . 2>&1"), "directory.0");
    }
    for mut sh in [here, gone] {
        drop(sh.stdin.take());
        sh.wait().unwrap();
    }
    m.finish();
    w.expect_no_trace();
    assert_eq!(fs::read_to_string(w.dst.join("a/b/new2")).unwrap(), "2\n");
}

#[test]
fn a_daemon_that_dies_while_it_takes_over_is_followed_by_another() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    let (m, open, marker) = opened_and_killed_at(&w, "left-taken:1", KEEP);
    kill(&m);
    assert!(marker.exists());
    open.write_all_at(b"mine", 10).unwrap();
    let mut want = bytes(100_000, 100_000);
    want[10..14].copy_from_slice(b"mine");
    assert!(fs::read(m.path("a/f")).unwrap() == want);
    drop(open);
    m.finish();
    w.expect_no_trace();
    assert!(fs::read(w.dst.join("a/f")).unwrap() == want);
}

#[test]
pub(crate) fn a_daemon_that_is_killed_again_and_again_is_given_up() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let mut m = w.mount_with(KEEP, &[]);
    let end = Instant::now() + LIMIT;
    let mut kills = 0;
    while m.runs() && Instant::now() < end {
        if let Some(pid) = daemon(&m) {
            raw::kill(pid, libc::SIGKILL);
            kills += 1;
            wait_until("it is gone", LIMIT, || {
                !Path::new(&format!("/proc/{pid}/exe")).exists()
            });
        }
    }
    let log = m.log();
    assert!(
        kills < 100 && log.contains("20 times within 5 s"),
        "{kills} {log}"
    );
    let dead = fs::metadata(m.path("a/f")).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN));
}

#[test]
fn the_keeper_passes_signals_on_and_ends_with_its_daemon() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let mut m = w.mount_with(LAZY, &[]);
    kill(&m);
    let pid = daemon(&m).expect("a daemon");
    raw::kill(m.pid, libc::SIGTERM);
    assert_eq!(m.wait_exit(LIMIT), Some(20));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(crate::fixture::fuse_mount_at(&w.at).is_none());
    // The administrator's umount, likewise.
    let m = w.mount_with(LAZY, &[]);
    kill(&m);
    assert_eq!(m.unmount(), 20);
    let m = w.mount_with(KEEP, &[]);
    m.finish();
    w.expect_no_trace();
}

#[test]
fn a_daemon_in_the_background_is_kept_too() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let log = w.scratch_path("log");
    let mut mount = mirrorfs();
    let mount = mount.args([
        "mount",
        "--transport",
        "dev",
        "-o",
        "keep_mount",
        "--log-file",
    ]);
    run(mount.arg(&log).args([&w.src, &w.dst])).expect_code(0);
    let pid = || {
        let out = run(mirrorfs().arg("status").arg(&w.at).arg("--json"));
        let status: Option<serde_json::Value> = serde_json::from_str(&out.out).ok();
        status.and_then(|s| s["pid"].as_u64())
    };
    let old = pid().expect("a daemon");
    let open = File::open(w.at.join("a/f")).unwrap();
    raw::kill(old as u32, libc::SIGKILL);
    wait_until("another daemon", LIMIT, || pid().is_some_and(|p| p != old));
    assert_eq!(open.metadata().unwrap().len(), 1000);
    drop(open);
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid().unwrap())).unwrap();
    let keeper = stat.rsplit(") ").next().unwrap().split(' ').nth(1).unwrap();
    let name = fs::read_to_string(format!("/proc/{keeper}/comm")).unwrap();
    assert_eq!(name, "mirrorfs-keeper\n");
    run(Command::new("umount").arg(&w.at)).expect_code(0);
    wait_until("it ends", LIMIT, || {
        !Path::new(&format!("/proc/{keeper}")).exists()
    });
}

#[test]
pub(crate) fn what_a_keeper_cannot_do_is_refused() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    for more in [["--transport", "uring"], ["--experimental-native", "-f"]] {
        let mut mount = mirrorfs();
        let mount = mount.args(["mount", "--keep-mount"]).args(more);
        run(mount.args([&w.src, &w.dst])).expect_code(2);
    }
    assert!(crate::fixture::fuse_mount_at(&w.at).is_none());
}

#[test]
pub(crate) fn an_upgrade_of_a_mount_that_is_kept_is_refused() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let m = w.mount_with(KEEP, &[]);
    let out = try_upgrade(&m, &program());
    assert_eq!(out.code(), 1);
    assert!(
        out.err.contains("upgrade: not with --keep-mount"),
        "{}",
        out.err
    );
    assert_eq!(fs::read(m.path("a/f")).unwrap(), bytes(1000, 1000));
    m.finish();
}

#[test]
pub(crate) fn a_daemon_serves_on_when_its_keeper_is_killed() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4").over();
    file(&w, "a/f", 1000);
    let m = w.mount_with(KEEP, &[]);
    let pid = daemon(&m).expect("a daemon");
    raw::kill(m.pid, libc::SIGKILL);
    wait_until("it says so", LIMIT, || {
        m.log().contains("its keeper is gone")
    });
    assert_eq!(fs::read(m.path("a/f")).unwrap(), bytes(1000, 1000));
    assert_eq!(daemon(&m), Some(pid));
    m.wait_complete();
    run(mirrorfs().arg("finish").arg(&m.at)).expect_code(0);
    wait_until("it ends", LIMIT, || daemon(&m).is_none());
    w.expect_no_trace();
}
