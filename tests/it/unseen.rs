//! A name that SRC lists, and of which it does not say what it is: its directory can be used all the same,
//! and nothing happens under the name until SRC shows it or it is given up (src/mirror/unseen.rs).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use crate::badsource::{BadSrc, entries, errno, expect_copy};
use crate::fixture::{
    LIMIT, LoopFs, Mounted, World, bytes, can_mount_on, find_program, kit, mirrorfs, need, run,
    wait_until,
};
use crate::keeper::{KEEP, kill};
use crate::upgrade::upgrade;

/// Everything that a name can be, and a directory around each.
pub(crate) fn fill(bad: &BadSrc) {
    for n in 0..6_u64 {
        bad.write(&format!("d/f{n}"), &bytes(n, 3000 + n as usize));
    }
    bad.write("d/dir/below", b"below");
    bad.write("d/large", &bytes(7, 9 << 20));
    bad.write("d/empty", b"");
    bad.write("other/twice", b"twice");
    let at = |name: &str| bad.real.join(name);
    std::os::unix::fs::symlink("f0", at("d/symlink")).unwrap();
    fs::hard_link(at("other/twice"), at("d/twice")).unwrap();
    run(std::process::Command::new("mkfifo").arg(at("d/fifo"))).expect_code(0);
    run(std::process::Command::new("chmod")
        .arg("2711")
        .arg(at("d/dir")))
    .expect_code(0);
    let old = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let dir = fs::File::open(at("d")).unwrap();
    dir.set_modified(old).unwrap();
}

fn world(kind: &str) -> Option<(BadSrc, World)> {
    let able = can_mount_on(kind)
        && need(kit("badsrc.py").is_some(), "badsrc.py of the test kit")
        && need(find_program("python3").is_some(), "python3");
    if !able {
        return None;
    }
    let fs = LoopFs::new(kind);
    let bad = BadSrc::new(&fs);
    fill(&bad);
    let w = World::from(bad.at.clone(), fs.dir("dst"), vec![fs]);
    Some((bad, w))
}

fn names(dir: &Path) -> Vec<String> {
    let all = fs::read_dir(dir).unwrap();
    let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut all: Vec<_> = all.map(name).collect();
    all.sort();
    all
}

/// What the ledger has of paths below SRC.
fn failed(m: &Mounted) -> Vec<String> {
    let path = |e: &serde_json::Value| e["path"].as_str().unwrap().to_owned();
    entries(m).iter().map(path).collect()
}

/// Nothing can be done with the name, and nothing says that it is not there.
#[track_caller]
pub(crate) fn expect_unseen(path: &Path, dir: &Path) {
    let other = dir.join("of the test");
    fs::write(&other, b"mine").unwrap();
    let create = || OpenOptions::new().append(true).create(true).open(path);
    let create_new = || OpenOptions::new().write(true).create_new(true).open(path);
    assert_eq!(errno(fs::symlink_metadata(path)), libc::EIO);
    assert_eq!(errno(fs::read(path)), libc::EIO);
    assert_eq!(errno(create()), libc::EIO);
    assert_eq!(errno(create_new()), libc::EIO);
    assert_eq!(errno(fs::create_dir(path)), libc::EIO);
    assert_eq!(errno(std::os::unix::fs::symlink("x", path)), libc::EIO);
    assert_eq!(errno(fs::hard_link(&other, path)), libc::EIO);
    assert_eq!(errno(fs::rename(&other, path)), libc::EIO);
    assert_eq!(errno(fs::rename(path, &other)), libc::EIO);
    assert_eq!(errno(fs::remove_file(path)), libc::EIO);
    assert_eq!(errno(fs::remove_dir(path)), libc::EIO);
    assert_eq!(errno(fs::remove_dir(dir)), libc::ENOTEMPTY);
    assert_eq!(fs::read(&other).unwrap(), b"mine");
    fs::remove_file(&other).unwrap();
}

#[test]
fn a_directory_with_a_name_that_src_does_not_show_can_be_used() {
    for (kind, rule, code) in [
        ("ext4", "path=d/f3 hide", libc::ENOENT),
        ("xfs", "path=d/f3 op=lookup err=EIO", libc::EIO),
        ("btrfs", "path=d/f3 op=lookup err=EUCLEAN", libc::EUCLEAN),
    ] {
        let Some((mut bad, w)) = world(kind) else {
            return;
        };
        bad.start(&[rule]);
        let m = w.mount();
        wait_until("an entry in the ledger", LIMIT, || failed(&m) == ["d/f3"]);
        assert_eq!(entries(&m)[0]["errno"], code);
        let d = m.path("d");
        assert_eq!(names(&d), names(&bad.real.join("d")), "{rule}");
        let kind_of = |name: &str| {
            let mut all = fs::read_dir(&d).unwrap().map(Result::unwrap);
            all.find(|e| e.file_name() == name).unwrap().file_type()
        };
        assert!(kind_of("f4").unwrap().is_file());
        // Nobody knows: whoever asks for more than the name hears so.
        assert_eq!(errno(kind_of("f3")), libc::EIO);
        expect_unseen(&d.join("f3"), &d);
        // Beside it all is as everywhere.
        assert_eq!(fs::read(d.join("f4")).unwrap(), bytes(4, 3004));
        fs::write(d.join("new"), b"new").unwrap();
        fs::rename(d.join("f5"), d.join("f6")).unwrap();
        fs::remove_file(d.join("f2")).unwrap();
        wait_until("all but one", LIMIT, || m.status()["files_pulled"] == 9);
        run(mirrorfs().arg("finish").arg(&m.at)).expect_code(23);
        fs::rename(&d, m.path("renamed")).unwrap();
        let d = m.path("renamed");
        assert_eq!(errno(fs::read(d.join("f3"))), libc::EIO);
        fs::write(d.join("f4"), b"users'").unwrap();
        bad.tell("off");
        run(mirrorfs().args(["errors", "--retry"]).arg(&m.at)).expect_code(0);
        assert_eq!(fs::read(d.join("f3")).unwrap(), bytes(3, 3003), "{rule}");
        m.finish();
        w.expect_no_trace();
        let d = w.dst.join("renamed");
        assert_eq!(fs::read(d.join("f3")).unwrap(), bytes(3, 3003));
        assert_eq!(fs::read(d.join("f4")).unwrap(), b"users'");
        let stat = |path: &Path| {
            let m = path.symlink_metadata().unwrap();
            (m.mode(), m.uid(), m.mtime(), m.mtime_nsec())
        };
        assert_eq!(stat(&d.join("f3")), stat(&bad.real.join("d/f3")));
        let mut want = names(&bad.real.join("d"));
        want.retain(|n| n != "f2" && n != "f5");
        want.extend(["f6".to_owned(), "new".to_owned()]);
        want.sort();
        assert_eq!(names(&d), want);
    }
}

#[test]
fn whatever_a_name_is_it_comes_whole_when_src_shows_it() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some((mut bad, w)) = world(kind) else {
            return;
        };
        bad.start(&["path=d/* hide", "path=large op=lookup err=EIO"]);
        let m = w.mount();
        let all = names(&bad.real.join("d"));
        wait_until("all of them", LIMIT, || failed(&m).len() == all.len());
        assert_eq!(names(&m.path("d")), all);
        // A restart learns of them.
        m.unmount();
        let m = w.mount();
        for name in &all {
            assert_eq!(
                errno(fs::symlink_metadata(m.path("d").join(name))),
                libc::EIO
            );
        }
        let before = fs::metadata(m.path("d")).unwrap();
        bad.tell("off");
        run(mirrorfs().args(["errors", "--retry"]).arg(&m.at)).expect_code(0);
        wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
        let d = m.path("d");
        assert_eq!(fs::read(d.join("f3")).unwrap(), bytes(3, 3003));
        assert_eq!(fs::read(d.join("dir/below")).unwrap(), b"below");
        assert_eq!(fs::read_link(d.join("symlink")).unwrap(), Path::new("f0"));
        assert!(
            d.join("fifo")
                .symlink_metadata()
                .unwrap()
                .file_type()
                .is_fifo()
        );
        let twice = |path: &Path| path.metadata().map(|m| (m.ino(), m.nlink())).unwrap();
        assert_eq!(twice(&d.join("twice")), twice(&m.path("other/twice")));
        let after = fs::metadata(&d).unwrap();
        assert_eq!(
            (after.mtime(), after.ctime()),
            (before.mtime(), before.ctime())
        );
        m.finish();
        expect_copy(&bad, &w);
    }
}

#[test]
pub(crate) fn what_is_given_up_of_them_is_missing_and_nothing_else() {
    let Some((mut bad, w)) = world("ext4") else {
        return;
    };
    bad.start(&["path=d/f3 hide", "path=d/dir op=lookup err=EUCLEAN"]);
    let mut m = w.mount();
    wait_until("two in the ledger", LIMIT, || {
        failed(&m) == ["d/dir", "d/f3"]
    });
    wait_until("all but two", LIMIT, || m.status()["files_pulled"] == 8);
    assert_eq!(errno(fs::read(m.path("d/f3"))), libc::EIO);
    let pulled = run(mirrorfs().arg("pull").arg(m.path("d"))).expect_code(23);
    assert!(pulled.err.contains("f3"), "{}", pulled.err);
    let lose = |path: &str| {
        let args = ["errors", "--accept-loss", path];
        run(mirrorfs().args(args).arg(&w.at)).expect_code(0);
    };
    lose("d/f3");
    run(mirrorfs().arg("finish").arg(&w.at)).expect_code(23);
    lose("d/dir");
    run(mirrorfs().arg("finish").arg(&w.at)).expect_code(23);
    m.wait_exit(LIMIT);
    w.expect_no_trace();
    let mut want = names(&bad.real.join("d"));
    want.retain(|n| n != "f3" && n != "dir");
    assert_eq!(names(&w.dst.join("d")), want);
}

/// What an earlier copy has under such a name may be all that is left of it.
#[test]
fn an_earlier_copy_of_a_name_that_src_does_not_show_is_not_touched() {
    let Some((mut bad, w)) = world("ext4") else {
        return;
    };
    fs::create_dir(w.dst.join("d")).unwrap();
    fs::write(w.dst.join("d/f3"), b"the last copy").unwrap();
    bad.start(&["path=d/f3 hide"]);
    let m = w.mount_with(&["--adopt"], &[]);
    wait_until("an entry in the ledger", LIMIT, || !entries(&m).is_empty());
    assert_eq!(failed(&m), ["d"]);
    assert_eq!(
        errno(fs::read_dir(m.path("d")).map(Iterator::count)),
        libc::EIO
    );
    assert_eq!(fs::read(w.dst.join("d/f3")).unwrap(), b"the last copy");
    bad.tell("off");
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    expect_copy(&bad, &w);
}

/// Exits at a point on the way; the directory is whole afterwards, and a user's change stays.
fn exit_at(kind: &str, point: &str, n: u32) -> bool {
    let Some((mut bad, w)) = world(kind) else {
        return true;
    };
    bad.start(&["path=d/f3 hide", "path=d/dir op=lookup err=EUCLEAN"]);
    let fault = format!("{point}:{n}");
    let env = [("MIRRORFS_FAULT", fault.as_str())];
    let mut met = false;
    let mut changed = false;
    if let Ok(mut m) = w.try_mount(&[], &env) {
        // Until it exits: first they are not there, then they are.
        let end = std::time::Instant::now() + Duration::from_secs(5);
        let mut told = false;
        while std::time::Instant::now() < end {
            if m.wait_exit(Duration::from_millis(50)).is_some() {
                met = true;
                break;
            }
            if !told && m.errors().lines().count() == 2 {
                changed = fs::write(m.path("d/f4"), b"users'").is_ok();
                let file = fs::File::open(m.path("d/f4"));
                changed &= file.and_then(|f| f.sync_all()).is_ok();
                bad.tell("off");
                told = true;
            }
        }
        if !met {
            m.unmount();
        }
    } else {
        met = true;
    }
    bad.tell("off");
    let m = w.mount();
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    assert_eq!(names(&m.path("d")), names(&bad.real.join("d")), "{fault}");
    m.finish();
    w.expect_no_trace();
    if changed {
        assert_eq!(fs::read(w.dst.join("d/f4")).unwrap(), b"users'", "{fault}");
        fs::write(w.dst.join("d/f4"), bytes(4, 3004)).unwrap();
        let times = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
        let file = fs::File::open(w.dst.join("d/f4")).unwrap();
        file.set_modified(times(&bad.real.join("d/f4"))).unwrap();
    }
    expect_copy(&bad, &w);
    met
}

#[test]
fn an_exit_at_each_point_of_a_stand_in_loses_nothing() {
    let points = mirrorfs::sys::fault::POINTS.iter();
    for point in points.filter(|p| p.starts_with("unseen")) {
        let mut met = false;
        for (kind, n) in [("ext4", 1), ("ext4", 2), ("xfs", 2), ("btrfs", 1)] {
            met |= exit_at(kind, point, n);
        }
        assert!(met, "{point} was never met");
    }
}

/// A huge directory is listed before it has all its names.
#[test]
fn a_listing_of_a_huge_directory_has_the_names_that_src_does_not_show() {
    for rule in ["path=big/f0700 hide", "path=big/f0700 op=lookup err=EIO"] {
        let Some((mut bad, w)) = world("ext4") else {
            return;
        };
        for n in 0..1500_u64 {
            bad.write(&format!("big/f{n:04}"), b"x");
        }
        bad.start(&[rule]);
        let m = w.mount_lazy();
        assert_eq!(
            names(&m.path("big")),
            names(&bad.real.join("big")),
            "{rule}"
        );
        assert_eq!(errno(fs::read(m.path("big/f0700"))), libc::EIO, "{rule}");
        assert_eq!(fs::read(m.path("big/f0701")).unwrap(), b"x");
        bad.tell("off");
        run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        run(mirrorfs().args(["errors", "--retry"]).arg(&m.at)).expect_code(0);
        wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
        m.finish();
        expect_copy(&bad, &w);
    }
}

/// Another daemon knows of the stand-ins at once, also in a directory that was renamed.
#[track_caller]
fn stay_over(args: &[&str], replace: fn(&Mounted)) {
    let Some((mut bad, w)) = world("ext4") else {
        return;
    };
    bad.start(&["path=d/f3 hide", "path=d/dir op=lookup err=EIO"]);
    let m = w.mount_with(args, &[]);
    wait_until("both of them", LIMIT, || failed(&m).len() == 2);
    let inos = |dir: &Path| {
        let all = fs::read_dir(dir).unwrap().map(Result::unwrap);
        let mut all: Vec<_> = all.map(|e| (e.file_name(), e.ino())).collect();
        all.sort();
        all
    };
    let before = inos(&m.path("d"));
    replace(&m);
    expect_unseen(&m.path("d/f3"), &m.path("d"));
    assert_eq!(inos(&m.path("d")), before);
    fs::rename(m.path("d"), m.path("moved")).unwrap();
    replace(&m);
    expect_unseen(&m.path("moved/f3"), &m.path("moved"));
    expect_unseen(&m.path("moved/dir"), &m.path("moved"));
    assert_eq!(inos(&m.path("moved")), before);
    bad.tell("off");
    run(mirrorfs().args(["errors", "--retry"]).arg(&m.at)).expect_code(0);
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    assert_eq!(fs::read(m.path("moved/f3")).unwrap(), bytes(3, 3003));
    assert_eq!(fs::read(m.path("moved/dir/below")).unwrap(), b"below");
    fs::rename(m.path("moved"), m.path("d")).unwrap();
    for name in ["d", "."] {
        let time = bad.real.join(name).metadata().unwrap().modified().unwrap();
        let dir = fs::File::open(m.path(name)).unwrap();
        dir.set_modified(time).unwrap();
    }
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
fn stand_ins_stay_when_another_program_takes_over() {
    stay_over(&[], |m| _ = upgrade(m));
}

#[test]
fn stand_ins_stay_when_the_daemon_of_a_kept_mount_is_killed() {
    stay_over(KEEP, |m| _ = kill(m));
}
