//! Huge directories: the promises of docs/SEMANTICS.md about those with too many entries to wait for,
//! named as the promises are.
//!
//! `LARGE_DIR` entries are where a directory begins to be one (mirror/populate.rs). What is read here
//! comes while the directory's mark says P in the raw tree; what changes something waits for its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use mirrorfs::sys::dir::{self, Entry};

use crate::compare;
use crate::fixture::{
    LIMIT, LoopFs, MARK, Random, World, bytes, can_mount_on, is_unpopulated, run,
};
use crate::nasty::{At, acl};
use crate::raw;

/// More than a listing waits for, and so many that placing them takes a while.
pub(crate) const MANY: usize = 20_000;

pub(crate) fn name(i: usize) -> String {
    format!("entry {i:06}")
}

fn content(i: usize) -> Vec<u8> {
    bytes(i as u64, 1 + i * 37 % 300)
}

/// src holds `huge` with `count` entries; every hundredth is a directory, a symlink or an empty file.
pub(crate) fn world(kind: &str, count: usize) -> Option<World> {
    if !can_mount_on(kind) {
        return None;
    }
    let fs = LoopFs::sized(kind, 4 << 30);
    let w = World::from(fs.dir("src"), fs.dir("dst"), vec![fs]);
    fill(&w.src, count);
    Some(w)
}

fn fill(src: &Path, count: usize) {
    let huge = At::open(src).dir("huge");
    for i in 0..count {
        match i % 300 {
            100 => huge.dir(name(i)).file("inside", &content(i)),
            200 => huge.symlink("nowhere", name(i)),
            299 => huge.file(name(i), b""),
            _ => huge.file(name(i), &content(i)),
        }
    }
    huge.stamp(".", 1_300_000_000, 77);
}

pub(crate) fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Some entries of an open directory from an offset on, and whether it ended.
fn some(dir: &File, from: u64, len: usize) -> (Vec<Entry>, bool) {
    let mut found = Vec::new();
    let at_end = dir::read_dir(dir.as_fd(), from, &mut Vec::new(), |e| {
        found.push(e);
        found.len() < len
    });
    (found, at_end.unwrap())
}

#[test]
fn one_name_of_a_huge_directory_comes_before_the_rest() {
    let Some(w) = world("ext4", MANY) else { return };
    let (before, raw) = (w.src_state(), w.dst.join("huge"));
    let m = w.mount_lazy();
    let huge = m.path("huge");
    let some = [4321, 100, 19_999, 299, 700];
    let mut inodes = BTreeMap::new();
    for i in some {
        let path = huge.join(name(i));
        let meta = path.symlink_metadata().unwrap();
        let want = w.src.join("huge").join(name(i)).symlink_metadata().unwrap();
        assert_eq!(
            (meta.mode(), meta.size(), meta.mtime(), meta.mtime_nsec()),
            (want.mode(), want.size(), want.mtime(), want.mtime_nsec()),
        );
        inodes.insert(i, meta.ino());
    }
    assert_eq!(fs::read(huge.join(name(4321))).unwrap(), content(4321));
    let inside = huge.join(name(100)).join("inside");
    assert_eq!(fs::read(inside).unwrap(), content(100));
    let none = huge.join("no such name").symlink_metadata().unwrap_err();
    assert_eq!(none.kind(), io::ErrorKind::NotFound);
    assert_eq!(count(&raw), some.len(), "nothing else was placed");
    assert!(is_unpopulated(&raw));
    // Its own attributes are src's all the while.
    assert_eq!(huge.metadata().unwrap().mtime(), 1_300_000_000);
    assert_eq!(raw.metadata().unwrap().mtime_nsec(), 77);
    // What was placed ahead is what it was when all the others have come.
    assert_eq!(count(&huge), MANY);
    for (i, ino) in &inodes {
        assert_eq!(huge.join(name(*i)).symlink_metadata().unwrap().ino(), *ino);
    }
    compare::manifest(&m.at);
    m.finish();
    for (i, ino) in &inodes {
        assert_eq!(raw.join(name(*i)).symlink_metadata().unwrap().ino(), *ino);
    }
    w.expect_finished_copy();
    w.expect_src_untouched(&before);
}

#[test]
fn a_directory_that_was_looked_into_is_populated_when_it_is_not_huge() {
    let Some(w) = world("ext4", 900) else { return };
    let m = w.mount_lazy();
    m.path("huge").join(name(3)).symlink_metadata().unwrap();
    let raw = w.dst.join("huge");
    crate::fixture::wait_until("its mark says L", LIMIT, || !is_unpopulated(&raw));
    assert_eq!(count(&raw), 900);
}

#[test]
fn a_huge_directory_is_listed_while_it_is_populated() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(w) = world(kind, MANY) else { return };
        let m = w.mount_lazy();
        let raw = w.dst.join("huge");
        let listing = File::open(m.path("huge")).unwrap();
        let (first, at_end) = some(&listing, 0, 1);
        assert!(!at_end && first.len() == 1);
        assert!(is_unpopulated(&raw), "{kind}: the first waits for no other");
        // Slowly at first, so that the directory is populated in the middle of the listing.
        let mut all = first;
        let mut places = Vec::new();
        loop {
            let (more, at_end) = some(&listing, all.last().unwrap().next, 500);
            places.push((all.len(), all.last().unwrap().next));
            all.extend(more);
            if at_end {
                break;
            }
            if all.len() < 5000 {
                thread::sleep(Duration::from_millis(100));
            }
        }
        let names: BTreeSet<_> = all.iter().map(|e| e.name.as_bytes().to_vec()).collect();
        assert_eq!((all.len(), names.len()), (MANY, MANY), "{kind}: each once");
        for entry in all.iter().step_by(37) {
            let meta = m.path("huge").join(entry.name.as_os_str());
            let meta = meta.symlink_metadata().unwrap();
            assert_eq!(entry.ino, meta.ino(), "{kind}: {:?}", entry.name);
            let kind = rustix::fs::FileType::from_raw_mode(meta.mode());
            assert_eq!(entry.kind, kind, "{:?}", entry.name);
        }
        // Every place can be returned to.
        for (at, offset) in places.iter().rev().step_by(3) {
            let (again, _) = some(&listing, *offset, 5);
            let want: Vec<_> = all.iter().skip(*at).take(5).map(|e| &e.name).collect();
            let got: Vec<_> = again.iter().map(|e| &e.name).collect();
            assert_eq!(want, got, "{kind}: from {at} on");
        }
        // A listing that begins anew shows what has changed since.
        fs::remove_file(m.path("huge").join(name(1))).unwrap();
        fs::write(m.path("huge/new"), b"new").unwrap();
        let (anew, _) = some(&listing, 0, usize::MAX);
        let mut want = names.clone();
        want.remove(name(1).as_bytes());
        want.insert(b"new".to_vec());
        let got: BTreeSet<_> = anew.iter().map(|e| e.name.as_bytes().to_vec()).collect();
        assert!(got == want && anew.len() == MANY, "{kind}: {}", anew.len());
    }
}

#[test]
fn changes_in_a_huge_directory_wait_for_all_of_its_names() {
    let Some(w) = world("ext4", MANY) else { return };
    let raw = w.dst.join("huge");
    for case in 0..5 {
        let m = w.mount_lazy();
        let huge = m.path("huge");
        // It is known, and read, before anything is changed.
        let path = huge.join(name(4321));
        assert_eq!(fs::read(&path).unwrap(), content(4321));
        let inside = huge.join(name(100)).join("inside");
        assert_eq!(fs::read(&inside).unwrap(), content(100));
        assert!(is_unpopulated(&raw), "case {case}");
        match case {
            0 => {
                // What src has is taken, before it is here.
                let taken = File::create_new(huge.join(name(7))).unwrap_err();
                assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
                fs::create_dir(huge.join("new")).unwrap();
            }
            1 => {
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(b"x", 0).unwrap();
            }
            2 => fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap(),
            // Below it.
            3 => fs::write(&inside, b"written").unwrap(),
            _ => fs::set_permissions(huge.join(name(100)), fs::Permissions::from_mode(0o700))
                .unwrap(),
        }
        assert!(!is_unpopulated(&raw), "case {case}: it did not wait");
        assert_eq!(count(&raw), MANY + usize::from(case == 0), "case {case}");
        m.unmount();
        for made in fs::read_dir(&w.dst).unwrap() {
            let made = made.unwrap().path();
            run(Command::new("rm").arg("-rf").arg(made)).expect_code(0);
        }
        rustix::fs::lremovexattr(&w.dst, MARK).unwrap();
    }
}

#[test]
fn a_default_acl_of_a_huge_directory_is_no_business_of_its_entries() {
    let Some(w) = world("ext4", 3000) else { return };
    let no = u32::MAX;
    let default = acl(&[(1, 7, no), (4, 5, no), (32, 0, no)]);
    At::open(&w.src.join("huge")).xattr(".", "system.posix_acl_default", &default);
    let m = w.mount_lazy();
    m.path("huge").join(name(5)).symlink_metadata().unwrap();
    m.path("huge").join(name(100)).symlink_metadata().unwrap();
    let mut value = [0; 4096];
    let n = rustix::fs::lgetxattr(m.path("huge"), "system.posix_acl_default", &mut value);
    assert_eq!(&value[..n.unwrap()], &default);
    compare::manifest(&m.at);
    m.finish();
    w.expect_finished_copy();
}

/// One change of one thread, on the mount and on the plain copy; the answers must be equal.
fn change(at: &Path, i: usize, what: u64) -> String {
    let path = at.join("huge").join(name(i));
    let done = match what {
        0 => fs::remove_file(&path),
        1 => fs::rename(&path, at.join("huge").join(format!("renamed {i}"))),
        2 => OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut f| f.write_all(b"appended")),
        3 => File::create_new(&path).map(drop),
        4 => fs::set_permissions(&path, fs::Permissions::from_mode(0o640)),
        5 => symlink("x", at.join("huge").join(format!("link {i}"))),
        6 => fs::create_dir(&path),
        7 => fs::write(at.join("huge").join(format!("new {i}")), b"new"),
        _ => fs::rename(&path, at.join(format!("out {i}"))),
    };
    match done {
        Ok(()) => "ok".into(),
        Err(e) => rustix::io::Errno::from_io_error(&e).map_or(e.to_string(), |e| e.to_string()),
    }
}

/// One look of one thread: what it saw. Nobody changes the entries that are looked at.
fn look(at: &Path, i: usize) -> String {
    let path = at.join("huge").join(name(i));
    let meta = path.symlink_metadata().unwrap();
    let bytes = match meta.is_file() {
        true => fs::read(&path).unwrap(),
        false => Vec::new(),
    };
    format!("{:o} {} {bytes:?}", meta.mode(), meta.mtime_nsec())
}

#[test]
fn looks_listings_and_changes_at_once_are_as_in_a_plain_directory() {
    for (kind, walker) in [("ext4", true), ("ext4", false), ("btrfs", true)] {
        let count = 6000;
        let Some(w) = world(kind, count) else { return };
        let plain = w.src.with_file_name("plain");
        run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
        let m = if walker { w.mount() } else { w.mount_lazy() };
        let seed = Random::seeded(kind.len() as u64).next();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            // Even numbers are looked at, odd ones are changed: each by one thread alone.
            for t in 0..3_u64 {
                let (at, plain) = (&m.at, &plain);
                threads.push(scope.spawn(move || {
                    let mut random = Random::new(seed + t);
                    for _ in 0..150 {
                        let i = random.below(count as u64 / 6) as usize * 6 + 2 * t as usize;
                        assert_eq!(look(at, i), look(plain, i), "{i}");
                    }
                }));
                threads.push(scope.spawn(move || {
                    let mut random = Random::new(seed + 10 + t);
                    // The others look before anybody waits for all of it.
                    thread::sleep(Duration::from_millis(20));
                    for _ in 0..150 {
                        let i = random.below(count as u64 / 6) as usize * 6 + 2 * t as usize + 1;
                        let what = random.below(9);
                        assert_eq!(change(at, i, what), change(plain, i, what), "{what} {i}");
                    }
                }));
            }
            let (at, over) = (&m.at, &over);
            let lister = scope.spawn(move || {
                let untouched: BTreeSet<_> = (0..count).step_by(2).map(name).collect();
                while !over.load(Relaxed) {
                    let mut seen = BTreeSet::new();
                    for entry in fs::read_dir(at.join("huge")).unwrap() {
                        let name = entry.unwrap().file_name().into_string().unwrap();
                        assert!(seen.insert(name.clone()), "{name} twice");
                    }
                    let missing: Vec<_> = untouched.difference(&seen).collect();
                    assert!(missing.is_empty(), "missing: {missing:?}");
                }
            });
            let failed = threads.into_iter().any(|t| t.join().is_err());
            over.store(true, Relaxed);
            lister.join().unwrap();
            assert!(!failed);
        });
        compare::manifest(&m.at);
        m.finish();
        w.expect_no_trace();
        w.expect_same_tree(&plain);
    }
}

#[test]
fn a_kill_in_the_middle_of_a_huge_directory_loses_nothing_and_keeps_what_was_changed() {
    for kind in ["ext4", "btrfs"] {
        let Some(w) = world(kind, MANY) else { return };
        let (raw, plain) = (w.dst.join("huge"), w.src.with_file_name("plain"));
        run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
        // Killed while names are looked up and listed.
        for round in 0..3 {
            let m = w.mount_lazy();
            let listing = File::open(m.path("huge")).unwrap();
            for i in 0..20 {
                let i = (i * 977 + round * 31) % MANY;
                m.path("huge").join(name(i)).symlink_metadata().unwrap();
            }
            some(&listing, 0, 40 + 900 * round);
            let i = 4321 + round;
            assert_eq!(fs::read(m.path("huge").join(name(i))).unwrap(), content(i));
            raw::kill(m.pid, libc::SIGKILL);
            m.kill();
            assert!(is_unpopulated(&raw), "{kind}: round {round} was too late");
        }
        // Killed after a change below what was looked into.
        let m = w.mount_lazy();
        let below = Path::new("huge").join(name(100)).join("inside");
        for at in [&m.at, &plain] {
            let path = at.join("huge").join(name(4321));
            fs::read(&path).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(b"a user's", 0).unwrap();
            fs::write(at.join(&below), b"below").unwrap();
            fs::remove_file(at.join("huge").join(name(5))).unwrap();
        }
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        let m = w.mount();
        m.finish();
        w.expect_no_trace();
        w.expect_same_tree(&plain);
    }
}

#[test]
fn a_directory_that_is_removed_right_after_a_look_into_it_is_no_error() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    let names: Vec<String> = (0..400).map(|i| format!("d{i}")).collect();
    for name in &names {
        fs::create_dir(w.src.join(name)).unwrap();
    }
    let m = w.mount_lazy();
    for name in &names {
        let dir = m.path(name);
        // The rest of it is placed after the answer, for nobody.
        assert!(dir.join("x").symlink_metadata().is_err());
        fs::remove_dir(&dir).unwrap();
    }
    assert_eq!(m.errors(), "");
    m.finish();
    assert_eq!(fs::read_dir(&w.dst).unwrap().count(), 0);
}
