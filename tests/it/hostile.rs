//! Users who plant things: each attack of docs/SECURITY.md, with a control that shows that it works
//! against a copy that is made by paths.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with, setxattr};

use crate::fixture::{
    LIMIT, Mounted, World, as_user, bytes, can_mount, can_mount_on, mirrorfs, run,
};

const MALLORY: u32 = 1000;
const SECRET: &[u8] = b"what only root may read";
/// How long a control has to be hit by a race that it does not guard against.
const CONTROL_LIMIT: Duration = Duration::from_secs(30);

/// Does `evil` over and over while `work` runs.
fn meanwhile<T>(evil: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                evil();
            }
        });
        let _stop = Stop(&over); // Also when `work` panics.
        work()
    })
}

fn exchange(a: &Path, b: &Path) {
    // One of them may just be in the middle of something: the next round comes at once.
    let _ = renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE);
}

/// All regular files below, without following anything.
fn files_below(dir: &Path, each: &mut impl FnMut(&Path)) {
    // What vanishes meanwhile, or cannot be pulled just now, leaks nothing.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.symlink_metadata() {
            Ok(m) if m.is_dir() => files_below(&path, each),
            Ok(m) if m.is_file() => each(&path),
            _ => {}
        }
    }
}

fn has_secret(dir: &Path) -> bool {
    let mut found = false;
    files_below(dir, &mut |path| {
        found |= fs::read(path).unwrap_or_default() == SECRET;
    });
    found
}

/// A copy as one would write it without a thought: every step by path.
fn naive_copy(src: &Path, dst: &Path) -> io::Result<()> {
    fs::create_dir_all(dst)?;
    for entry in fs::read_dir(src)?.flatten() {
        let (from, to) = (entry.path(), dst.join(entry.file_name()));
        let meta = from.symlink_metadata()?;
        if meta.is_dir() {
            naive_copy(&from, &to)?;
        } else if meta.is_file() {
            fs::copy(&from, &to)?;
        }
    }
    Ok(())
}

/// In src, mallory's directories of files; `outside`, root's files of the same names.
struct Swap {
    w: World,
    outside: PathBuf,
}

const DIRS: usize = 8;
const FILES: usize = 60;

fn swap_world() -> Option<Swap> {
    if !can_mount() {
        return None;
    }
    let w = World::on("ext4");
    let outside = w.src.parent().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    for d in 0..DIRS {
        let dir = w.src.join(format!("d{d}"));
        fs::create_dir(&dir).unwrap();
        symlink(&outside, w.src.join(format!("l{d}"))).unwrap();
        for f in 0..FILES {
            fs::write(dir.join(format!("f{f}")), format!("mine {d} {f}")).unwrap();
        }
    }
    for f in 0..FILES {
        let path = outside.join(format!("f{f}"));
        fs::write(&path, SECRET).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o700)).unwrap();
    Some(Swap { w, outside })
}

impl Swap {
    /// Each directory is now itself, now a symlink to what its owner may not read.
    fn evil(&self) {
        for d in 0..DIRS {
            let [dir, link] = [format!("d{d}"), format!("l{d}")].map(|n| self.w.src.join(n));
            exchange(&dir, &link);
        }
    }

    fn outside_is_untouched(&self) {
        assert_eq!(fs::read_dir(&self.outside).unwrap().count(), FILES);
        for f in 0..FILES {
            assert_eq!(
                fs::read(self.outside.join(format!("f{f}"))).unwrap(),
                SECRET
            );
        }
    }
}

#[test]
fn a_directory_that_becomes_a_symlink_during_a_sync_leads_nowhere() {
    let Some(s) = swap_world() else { return };
    let control = s.w.scratch_path("control");
    meanwhile(
        || s.evil(),
        || {
            let begin = Instant::now();
            loop {
                let _ = naive_copy(&s.w.src, &control); // What vanishes under it is not the point.
                if has_secret(&control) {
                    break;
                }
                assert!(begin.elapsed() < CONTROL_LIMIT, "the attack does not work");
            }
            for round in 0..20 {
                let code = run(mirrorfs().arg("sync").args([&s.w.src, &s.w.dst])).code();
                assert!([0, 23, 24].contains(&code), "exit {code}");
                assert!(!has_secret(&s.w.dst), "round {round}");
                if round % 4 == 0 {
                    fs::remove_dir_all(&s.w.dst).unwrap();
                }
            }
        },
    );
    s.outside_is_untouched();
}

#[test]
fn a_directory_that_becomes_a_symlink_during_a_migration_leads_nowhere() {
    let Some(s) = swap_world() else { return };
    meanwhile(
        || s.evil(),
        || {
            let mounted = s.w.mount();
            let end = Instant::now() + Duration::from_secs(5);
            while Instant::now() < end && mounted.status()["state"] != "COMPLETE" {
                assert!(!has_secret(&mounted.at));
            }
            assert!(!has_secret(&s.w.dst));
            mounted.kill();
        },
    );
    s.outside_is_untouched();
}

#[test]
fn a_user_who_swaps_directories_in_the_mount_sends_the_walker_nowhere() {
    let Some(s) = swap_world() else { return };
    let before = s.w.src_state();
    chown(&s.w.src, Some(MALLORY), Some(MALLORY)).unwrap();
    for d in 0..DIRS {
        let dir = s.w.src.join(format!("d{d}"));
        chown(dir, Some(MALLORY), Some(MALLORY)).unwrap();
    }
    // The control writes through the mount, by path, what src has.
    let evil = |root: &Path| {
        for d in 0..DIRS {
            exchange(&root.join(format!("d{d}")), &root.join(format!("l{d}")));
        }
    };
    let mounted = s.w.mount_with(&["--bwlimit", "4K"], &[]);
    as_user(MALLORY, MALLORY, 0o022, || evil(&mounted.at));
    meanwhile(
        || as_user(MALLORY, MALLORY, 0o022, || evil(&mounted.at)),
        || {
            run(mirrorfs()
                .arg("set")
                .arg(&mounted.at)
                .args(["--bwlimit", "0"]))
            .expect_code(0);
            thread::sleep(Duration::from_millis(500));
        },
    );
    mounted.wait_complete();
    s.outside_is_untouched();
    // Every file of mallory's is whole, under one of the two names of its directory.
    for d in 0..DIRS {
        for f in 0..FILES {
            let at = |dir: &str| mounted.path(format!("{dir}{d}/f{f}"));
            let dir = match mounted.path(format!("d{d}")).symlink_metadata() {
                Ok(m) if m.is_dir() => at("d"),
                _ => at("l"),
            };
            assert_eq!(fs::read_to_string(dir).unwrap(), format!("mine {d} {f}"));
        }
    }
    mounted.finish();
    assert!(!has_secret(&s.w.dst));
    drop(before);
    // The control: a copy by path into a tree that is being swapped writes outside.
    let target = s.w.scratch_path("target");
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(&target).unwrap();
    for d in 0..DIRS {
        fs::create_dir(target.join(format!("d{d}"))).unwrap();
        symlink(&s.outside, target.join(format!("l{d}"))).unwrap();
    }
    open(&target);
    meanwhile(
        || evil(&target),
        || {
            let begin = Instant::now();
            while (0..FILES).all(|f| fs::read(s.outside.join(format!("f{f}"))).unwrap() == SECRET) {
                let _ = naive_copy(&s.w.src, &target); // What fails is tried again.
                assert!(begin.elapsed() < CONTROL_LIMIT, "the attack does not work");
            }
        },
    );
}

/// dst has a hard link to a file of somebody else's where src has a file.
struct Planted {
    w: World,
    victim: PathBuf,
}

fn planted(content: &[u8], same_time: bool) -> Option<Planted> {
    if !can_mount() {
        return None;
    }
    let w = World::on("ext4");
    let src = w.src.join("a");
    fs::write(&src, content).unwrap();
    chown(&src, Some(MALLORY), Some(MALLORY)).unwrap();
    fs::set_permissions(&src, fs::Permissions::from_mode(0o666)).unwrap();
    setxattr(&src, "user.planted", b"x", XattrFlags::empty()).unwrap();
    let victim = w.src.parent().unwrap().join("victim");
    fs::write(&victim, SECRET).unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    if same_time {
        let time = File::open(&victim).unwrap().metadata().unwrap().modified();
        File::options()
            .write(true)
            .open(&src)
            .unwrap()
            .set_modified(time.unwrap())
            .unwrap();
    }
    fs::hard_link(&victim, w.dst.join("a")).unwrap();
    Some(Planted { w, victim })
}

impl Planted {
    fn victim_is_untouched(&self) {
        let meta = self.victim.metadata().unwrap();
        assert_eq!(fs::read(&self.victim).unwrap(), SECRET);
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600));
        let mut buf = [0u8; 8];
        assert!(rustix::fs::getxattr(&self.victim, "user.planted", &mut buf[..]).is_err());
    }

    /// dst's own file is what src has, and no longer the victim.
    fn dst_is_srcs(&self) {
        let [src, dst] = [&self.w.src, &self.w.dst].map(|d| d.join("a"));
        assert_eq!(fs::read(&dst).unwrap(), fs::read(&src).unwrap());
        let meta = dst.metadata().unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (MALLORY, 0o666));
        assert_ne!(meta.ino(), self.victim.metadata().unwrap().ino());
    }
}

#[test]
fn a_hard_link_that_was_planted_in_dst_is_not_written_through() {
    // Other content; content of the same size and time, so that only metadata would be set.
    for (content, same_time) in [(&b"mallory's"[..], false), (SECRET, true)] {
        let Some(p) = planted(content, same_time) else {
            return;
        };
        run(mirrorfs().arg("sync").args([&p.w.src, &p.w.dst])).expect_code(0);
        p.victim_is_untouched();
        p.dst_is_srcs();

        let Some(p) = planted(content, same_time) else {
            return;
        };
        let mounted = p.w.mount_with(&["--adopt"], &[]);
        mounted.finish();
        p.victim_is_untouched();
        p.dst_is_srcs();
    }
    // The control: a copy by path writes into the victim.
    let Some(p) = planted(b"mallory's", false) else {
        return;
    };
    naive_copy(&p.w.src, &p.w.dst).unwrap();
    assert_eq!(fs::read(&p.victim).unwrap(), b"mallory's");
}

#[test]
fn a_setuid_file_is_never_there_with_another_owner() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    let names: Vec<String> = (0..300).map(|i| format!("s{i}")).collect();
    for name in &names {
        let path = w.src.join(name);
        fs::write(&path, bytes(1, 3000)).unwrap();
        chown(&path, Some(MALLORY), Some(MALLORY)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    }
    let trap = |dir: &Path| {
        let mut trapped = false;
        for name in &names {
            let Ok(m) = dir.join(name).symlink_metadata() else {
                continue;
            };
            trapped |= m.mode() & 0o4000 != 0 && m.uid() == 0;
            trapped |= m.mode() & 0o2000 != 0 && m.gid() == 0;
        }
        trapped
    };
    let seen = AtomicBool::new(false);
    let watch = |dir: &Path, work: &dyn Fn()| {
        seen.store(false, Relaxed);
        meanwhile(|| _ = trap(dir).then(|| seen.store(true, Relaxed)), work);
        seen.load(Relaxed)
    };
    for _ in 0..3 {
        let sync = || drop(run(mirrorfs().arg("sync").args([&w.src, &w.dst])).expect_code(0));
        assert!(!watch(&w.dst, &sync), "sync");
        names
            .iter()
            .for_each(|n| fs::remove_file(w.dst.join(n)).unwrap());
    }
    let migrate = || w.mount().finish();
    assert!(!watch(&w.dst, &migrate), "mount");
    w.expect_finished_copy();
    // The control: mode before owner, as many a script has it.
    let begin = Instant::now();
    let control = w.scratch_path("control");
    fs::create_dir(&control).unwrap();
    let naive = || {
        for name in &names {
            let (from, to) = (w.src.join(name), control.join(name));
            let _ = fs::remove_file(&to); // Of the round before.
            fs::copy(from, &to).unwrap(); // With its mode.
            chown(&to, Some(MALLORY), Some(MALLORY)).unwrap();
        }
    };
    while !watch(&control, &naive) {
        assert!(begin.elapsed() < CONTROL_LIMIT, "the attack does not work");
    }
}

#[test]
fn a_name_with_newlines_forges_no_line_of_a_log_or_a_list() {
    if !can_mount_on("xfs") || !can_mount_on("ext4") {
        return;
    }
    let w = World::on_two("xfs", "ext4");
    let name = "x\n2026-01-01T00:00:00.000000Z ERROR everything is lost\n\u{1b}[2Jy";
    fs::write(w.src.join(name), b"content").unwrap();
    // More than an inode of ext4 can have: the entry comes without it and is in the ledger.
    let big = vec![b'v'; 40 << 10];
    setxattr(w.src.join(name), "user.big", &big, XattrFlags::empty()).unwrap();
    let mounted = w.mount();
    let end = Instant::now() + LIMIT;
    while mounted.status()["errors"] == 0 {
        assert!(Instant::now() < end, "no error in the ledger");
        thread::sleep(Duration::from_millis(20));
    }
    let at = &mounted.at;
    let said = |args: &[&str]| run(mirrorfs().args(args).arg(at)).out;
    let forged = |text: &str| {
        let line = |l: &str| l.starts_with("2026-01-01") || l.contains('\u{1b}');
        text.lines().any(line)
    };
    let log = mounted.log();
    assert!(log.contains("everything is lost") && !forged(&log), "{log}");
    for args in [&["errors"][..], &["errors", "--json"], &["status"]] {
        let text = said(args);
        assert!(!forged(&text), "{args:?}: {text}");
    }
    let list = said(&["errors", "-0"]);
    assert_eq!(list.split_terminator('\0').collect::<Vec<_>>(), [name]);
    assert_eq!(fs::read(mounted.path(name)).unwrap(), b"content");
    let sync = run(mirrorfs()
        .args(["sync", "-i"])
        .arg(&w.src)
        .arg(w.scratch_path("copy")));
    assert!(!forged(&sync.out) && !forged(&sync.err), "{sync:?}");
    // The control: the name as it is forges one.
    assert!(forged(&format!(
        "\"{name}\": setxattr dst: No space left on device"
    )));
}

#[test]
fn directories_that_chase_each_other_do_not_keep_a_copy_from_ending() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    for d in ["a", "b"] {
        fs::create_dir_all(w.src.join(d).join("x/y/z")).unwrap();
        fs::write(w.src.join(d).join("x/y/z/f"), d).unwrap();
    }
    let (a, b) = (w.src.join("a"), w.src.join("b"));
    let evil = || {
        // a below b, and back; then the other way round.
        for (from, to) in [(&a, b.join("x/a")), (&b, a.join("x/b"))] {
            if fs::rename(from, &to).is_ok() {
                fs::rename(&to, from).unwrap();
            }
        }
    };
    meanwhile(evil, || {
        for _ in 0..30 {
            let code = run(mirrorfs().arg("sync").args([&w.src, &w.dst])).code();
            assert!([0, 23, 24].contains(&code), "exit {code}");
        }
    });
    let mut deepest = 0;
    files_below(&w.dst, &mut |p| {
        deepest = deepest.max(p.components().count() - w.dst.components().count());
    });
    assert!(deepest <= 12, "{deepest} levels");
    run(mirrorfs().args(["sync", "--delete"]).args([&w.src, &w.dst])).expect_code(0);
    w.expect_finished_copy();
}

#[test]
fn a_mark_that_a_user_planted_in_src_is_no_mark_in_dst() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    let path = w.src.join("f");
    fs::write(&path, b"content").unwrap();
    fs::create_dir(w.src.join("d")).unwrap();
    fs::write(w.src.join("d/g"), b"inside").unwrap();
    // "Pending, and comes from ../../etc/shadow": in the one name that users may set.
    let mut mark = vec![0x12];
    mark.extend(b"../../etc/shadow");
    for planted in [&path, &w.src.join("d")] {
        setxattr(planted, "user.mirrorfs", &mark, XattrFlags::empty()).unwrap();
    }
    let mounted = w.mount_lazy();
    assert_eq!(fs::read(mounted.path("f")).unwrap(), b"content");
    assert_eq!(fs::read(mounted.path("d/g")).unwrap(), b"inside");
    let refused = setxattr(
        mounted.path("f"),
        "trusted.mirrorfs",
        &mark,
        XattrFlags::empty(),
    );
    assert!(
        refused.is_err(),
        "root cannot set the mark through the mount either"
    );
    drop(mounted);
    finishes(&w);
    assert_eq!(fs::read(w.dst.join("f")).unwrap(), b"content");
    assert_eq!(fs::read(w.dst.join("d/g")).unwrap(), b"inside");
}

fn finishes(w: &World) {
    let mounted: Mounted = w.mount();
    mounted.finish();
}

/// Removes a tree as one would without a thought: every step by path.
fn naive_remove(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            naive_remove(&path);
        } else {
            let _ = fs::remove_file(&path); // The rest goes on.
        }
    }
    let _ = fs::remove_dir(dir); // Likewise.
}

#[test]
fn a_directory_of_dst_that_becomes_a_symlink_during_a_sync_leads_nowhere() {
    let Some(s) = swap_world() else { return };
    let is_touched = || {
        let here = fs::read_dir(&s.outside).unwrap().count();
        let same = |f| fs::read(s.outside.join(format!("f{f}"))).is_ok_and(|b| b == SECRET);
        here != FILES || !(0..FILES).all(same)
    };
    let sync = |args: &[&str]| {
        let code = run(mirrorfs().arg("sync").args(args).args([&s.w.src, &s.w.dst])).code();
        assert!([0, 11, 23, 24].contains(&code), "exit {code}");
        assert!(!is_touched(), "{args:?}");
    };
    sync(&[]);
    // What is swapped in dst: what src has, and what --delete is to remove.
    let pairs: Vec<[PathBuf; 2]> = (0..DIRS)
        .flat_map(|d| {
            [
                [format!("d{d}"), format!("l{d}")],
                [format!("x{d}"), format!("y{d}")],
            ]
        })
        .map(|pair| pair.map(|name| s.w.dst.join(name)))
        .collect();
    let plant = || {
        for [dir, link] in &pairs {
            for path in [dir, link] {
                let _ = fs::create_dir(path); // Unless it is there.
                let _ = symlink(&s.outside, path); // Likewise.
            }
            for f in 0..FILES {
                let _ = fs::write(dir.join(format!("f{f}")), SECRET); // It may be the symlink now.
            }
        }
    };
    let evil = || pairs.iter().for_each(|[a, b]| exchange(a, b));
    for args in [&["-I"][..], &["--delete"], &["-I", "--delete"]] {
        for _ in 0..6 {
            plant();
            meanwhile(evil, || sync(args));
        }
    }
    let begin = Instant::now();
    while !is_touched() {
        plant();
        meanwhile(evil, || pairs.iter().for_each(|[dir, _]| naive_remove(dir)));
        assert!(begin.elapsed() < CONTROL_LIMIT, "the attack does not work");
    }
}

#[test]
fn a_fifo_of_dst_that_becomes_a_symlink_gives_nobody_the_file_behind_it() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    let victim = w.src.parent().unwrap().join("victim");
    fs::write(&victim, SECRET).unwrap();
    let closed = || victim.metadata().unwrap().mode() & 0o7777 == 0o600;
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let fifo = |path: &Path, mode: u32| {
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(CWD, path, kind, mode.into(), 0).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let names: Vec<String> = (0..100).map(|i| format!("p{i}")).collect();
    let pairs: Vec<[PathBuf; 2]> = names
        .iter()
        .map(|n| [w.dst.join(n), w.dst.join(format!("q{n}"))])
        .collect();
    let plant = || {
        for [path, link] in &pairs {
            for old in [path, link] {
                let _ = fs::remove_file(old); // Of the round before.
            }
            fifo(path, 0o600);
            symlink(&victim, link).unwrap();
        }
    };
    let evil = || pairs.iter().for_each(|[a, b]| exchange(a, b));
    names.iter().for_each(|n| fifo(&w.src.join(n), 0o666));
    for _ in 0..10 {
        plant();
        meanwhile(evil, || {
            let code = run(mirrorfs().arg("sync").args([&w.src, &w.dst])).code();
            assert!([0, 23].contains(&code), "exit {code}");
        });
        assert!(closed());
    }
    // The control: look first, then change what has the name.
    let begin = Instant::now();
    while closed() {
        plant();
        meanwhile(evil, || {
            for [path, _] in &pairs {
                use std::os::unix::fs::FileTypeExt;
                if path
                    .symlink_metadata()
                    .is_ok_and(|m| m.file_type().is_fifo())
                {
                    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o666)); // Or not.
                }
            }
        });
        assert!(begin.elapsed() < CONTROL_LIMIT, "the attack does not work");
    }
}

#[test]
fn the_daemon_has_no_capability_that_it_has_no_use_for() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    fs::write(w.src.join("f"), b"content").unwrap();
    let mounted = w.mount();
    mounted.wait_complete();
    let of = |status: &str, key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    };
    // linux/capability.h: 0-4, 6-9, 14, 21, 24, 27, 31, 33.
    let needed = [0, 1, 2, 3, 4, 6, 7, 8, 9, 14, 21, 24, 27, 31, 33];
    let needed: u64 = needed.iter().map(|n| 1 << n).sum();
    let kernel = 12; // CAP_NET_ADMIN, for one.
    let tasks = fs::read_dir(format!("/proc/{}/task", mounted.pid)).unwrap();
    let mut threads = 0;
    for task in tasks.flatten() {
        let task = task.path();
        // The kernel's own threads for io_uring come and go.
        let Ok(status) = fs::read_to_string(task.join("status")) else {
            continue;
        };
        let task = task.display();
        for set in ["CapPrm", "CapEff", "CapBnd", "CapInh"] {
            let has = of(&status, set);
            assert_eq!(has & !needed, 0, "{task} {set}: {has:x}");
        }
        assert_eq!(of(&status, "NoNewPrivs"), 1, "{task}");
        threads += 1;
    }
    assert!(threads > 5, "{threads} threads");
    assert_ne!(
        of(&fs::read_to_string("/proc/self/status").unwrap(), "CapEff") & 1 << kernel,
        0,
        "the control: root has it"
    );
    mounted.finish();
}
