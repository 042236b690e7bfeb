//! A user's new file in a huge directory whose names are not all here: it waits for none of them, and whatever
//! happens it stays (src/mirror/own.rs).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use crate::badsource::apart;
use crate::compare::{self, Ignore};
use crate::crash::FAULT_EXIT;
use crate::fixture::{
    Hold, LIMIT, Mounted, World, as_user, bytes, is_marked, is_unpopulated, mirrorfs, run,
    wait_until,
};
use crate::huge::{MANY, count, name, world};
use crate::keeper::KEEP;
use crate::nasty::{At, acl};
use crate::raw;
use crate::upgrade::upgrade;

/// What a plain copy of src would be.
fn plain_copy(w: &World) -> PathBuf {
    let plain = w.src.with_file_name("plain");
    run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
    plain
}

/// Everything comes now, and the migration is finished.
fn resume_and_finish(m: Mounted) {
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
}

/// Everything that is done to files of one's own; on the mount, and on a plain copy.
fn work(huge: &Path) -> io::Result<()> {
    let at = |name: &str| huge.join(name);
    for n in 0..5_u64 {
        let mut file = File::create_new(at(&format!("new {n}")))?;
        file.write_all(&bytes(n, 10_000))?;
        file.sync_all()?;
    }
    OpenOptions::new()
        .append(true)
        .open(at("new 0"))?
        .write_all(b"more")?;
    let cut = OpenOptions::new().write(true).open(at("new 1"))?;
    cut.set_len(77)?;
    cut.write_all_at(b"far", 1 << 20)?;
    fs::set_permissions(at("new 2"), fs::Permissions::from_mode(0o640))?;
    std::os::unix::fs::chown(at("new 2"), Some(4321), Some(1234))?;
    let old = UNIX_EPOCH + Duration::from_secs(1_200_000_000);
    File::open(at("new 2"))?.set_modified(old)?;
    rustix::fs::setxattr(
        at("new 2"),
        "user.of mine",
        b"value",
        rustix::fs::XattrFlags::empty(),
    )?;
    fs::remove_file(at("new 3"))?;
    fs::remove_file(at("new 4"))?;
    fs::write(at("new 4"), b"made again")?;
    Ok(())
}

fn expect_like(w: &World, plain: &Path) {
    let ignore = Ignore {
        recent_mtime: true,
        ..Ignore::default()
    };
    let (want, got) = (compare::manifest(plain), compare::manifest(&w.dst));
    let found = compare::differences(&want, &got, ignore);
    assert!(found.is_empty(), "{}", found.join("\n"));
    w.expect_no_trace();
}

#[test]
pub(crate) fn a_new_file_in_a_huge_directory_waits_for_no_other_name() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(w) = world(kind, MANY) else { return };
        let plain = plain_copy(&w);
        let raw = w.dst.join("huge");
        let m = w.mount_lazy();
        let huge = m.path("huge");
        work(&huge).unwrap();
        work(&plain.join("huge")).unwrap();
        assert!(is_unpopulated(&raw), "{kind}");
        assert_eq!(count(&raw), 4, "{kind}: nothing else was placed");
        // It is a directory in which something was changed.
        assert!(huge.metadata().unwrap().mtime() > 1_700_000_000, "{kind}");
        // What src has is taken, and is src's.
        let taken = File::create_new(huge.join(name(7))).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        let seven = Path::new("huge").join(name(7));
        let (got, want) = (m.path(&seven).metadata(), w.src.join(&seven).metadata());
        assert_eq!(got.unwrap().mtime_nsec(), want.unwrap().mtime_nsec());
        assert!(is_unpopulated(&raw), "{kind}");
        // Who lists it sees all of it.
        assert_eq!(count(&huge), MANY + 4, "{kind}");
        wait_until("its mark says L", LIMIT, || !is_unpopulated(&raw));
        fs::rename(huge.join("new 0"), huge.join("renamed")).unwrap();
        fs::rename(plain.join("huge/new 0"), plain.join("huge/renamed")).unwrap();
        resume_and_finish(m);
        expect_like(&w, &plain);
    }
}

#[test]
fn what_was_made_in_a_huge_directory_outlives_kills_and_the_directory_s_other_names() {
    for kind in ["ext4", "btrfs"] {
        let Some(w) = world(kind, MANY) else { return };
        let plain = plain_copy(&w);
        let raw = w.dst.join("huge");
        work(&plain.join("huge")).unwrap();
        let m = w.mount_lazy();
        work(&m.path("huge")).unwrap();
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        assert!(is_unpopulated(&raw), "{kind}: it was too late");
        // The next daemon knows nothing of them.
        let m = w.mount_lazy();
        let own = m.path("huge/new 2");
        let meta = own.metadata().unwrap();
        assert_eq!((meta.uid(), meta.mtime()), (4321, 1_200_000_000));
        OpenOptions::new()
            .append(true)
            .open(m.path("huge/new 0"))
            .unwrap()
            .write_all(b"after the kill")
            .unwrap();
        fs::remove_file(m.path("huge/new 1")).unwrap();
        assert!(is_unpopulated(&raw), "{kind}: it waited");
        for done in [
            OpenOptions::new()
                .append(true)
                .open(plain.join("huge/new 0"))
                .and_then(|mut f| f.write_all(b"after the kill")),
            fs::remove_file(plain.join("huge/new 1")),
        ] {
            done.unwrap();
        }
        assert_eq!(count(&m.path("huge")), MANY + 3, "{kind}");
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        let m = w.mount();
        m.wait_complete();
        assert!(m.path("huge").metadata().unwrap().mtime() > 1_700_000_000);
        assert_eq!(m.errors(), "", "{kind}");
        m.finish();
        expect_like(&w, &plain);
    }
}

#[test]
fn an_exit_while_a_file_of_one_s_own_is_made_loses_nothing() {
    for kind in ["ext4", "btrfs"] {
        for (point, n) in [
            ("own-named", 1),
            ("own-made", 1),
            ("own-made", 3),
            ("own-marked", 1),
            ("own-marked", 4),
            ("own-linked", 1),
            ("own-linked", 4),
        ] {
            let Some(w) = world(kind, 3000) else { return };
            let plain = plain_copy(&w);
            let fault = format!("{point}:{n}");
            let env = [("MIRRORFS_FAULT", fault.as_str())];
            let mut m = w.mount_with(&["--no-background"], &env);
            let mut done = 0;
            for i in 0..6_u64 {
                let at = m.path("huge").join(format!("own {i}"));
                if fs::write(&at, bytes(i, 5000)).is_err() {
                    break;
                }
                fs::write(plain.join("huge").join(format!("own {i}")), bytes(i, 5000)).unwrap();
                done = i + 1;
            }
            assert!(done < 6, "{fault}: it was not met");
            assert_eq!(m.wait_exit(LIMIT), Some(FAULT_EXIT));
            let m = w.mount();
            let at = |root: &Path| root.join("huge").join(format!("own {done}"));
            fs::write(at(&m.at), b"once more").unwrap();
            fs::write(at(&plain), b"once more").unwrap();
            fs::write(m.path("huge/another"), b"another").unwrap();
            fs::write(plain.join("huge/another"), b"another").unwrap();
            assert_eq!(m.errors(), "", "{kind} {fault}");
            m.finish();
            expect_like(&w, &plain);
        }
    }
}

#[test]
fn a_name_that_src_shows_only_later_takes_no_file_of_a_user_away() {
    let Some(w) = world("ext4", 3000) else { return };
    let m = w.mount_lazy();
    fs::write(m.path("huge/mine"), b"a user's").unwrap();
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    fs::write(w.src.join("huge/mine"), b"src's, which must not change").unwrap();
    let m = w.mount();
    assert_eq!(fs::read(m.path("huge/mine")).unwrap(), b"a user's");
    wait_until("the ledger tells of it", LIMIT, || {
        m.errors().contains("huge/mine")
    });
    assert_eq!(count(&m.path("huge")), 3001);
    assert_eq!(fs::read(m.path("huge/mine")).unwrap(), b"a user's");
    assert_eq!(fs::read(w.dst.join("huge/mine")).unwrap(), b"a user's");
}

/// The daemon is killed while it makes the file, another one goes on with the request, and then src shows the
/// name.
#[test]
fn a_file_of_one_s_own_that_a_killed_daemon_was_making_is_a_user_s() {
    for point in ["own-made", "own-marked", "own-linked"] {
        let Some(w) = world("ext4", 3000) else { return };
        let killed = w.scratch_path("killed");
        let fault = format!("{point}:1");
        let env = [
            ("MIRRORFS_FAULT", fault.as_str()),
            ("MIRRORFS_FAULT_KILL", killed.to_str().unwrap()),
        ];
        let args = [KEEP, &["--no-background"]].concat();
        let m = w.mount_with(&args, &env);
        let raw = w.dst.join("huge");
        let mut file = File::create_new(m.path("huge/mine")).unwrap();
        assert!(killed.exists(), "{point} was not passed");
        file.write_all(b"a user's").unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(m.unmount(), 20);
        assert!(is_unpopulated(&raw), "{point}: it was too late");
        fs::write(w.src.join("huge/mine"), b"src's, which must not change").unwrap();
        let m = w.mount();
        assert_eq!(
            fs::read(m.path("huge/mine")).unwrap(),
            b"a user's",
            "{point}"
        );
        wait_until("the ledger tells of it", LIMIT, || {
            m.errors().contains("huge/mine")
        });
        assert_eq!(count(&m.path("huge")), 3001);
    }
}

#[test]
fn a_new_file_inherits_what_its_directory_gives() {
    let Some(w) = world("ext4", 3000) else { return };
    let no = u32::MAX;
    let default = acl(&[
        (1, 6, no),
        (2, 7, 4321),
        (4, 5, no),
        (16, 7, no),
        (32, 0, no),
    ]);
    At::open(&w.src.join("huge")).xattr(".", "system.posix_acl_default", &default);
    fs::set_permissions(w.src.join("huge"), fs::Permissions::from_mode(0o2775)).unwrap();
    std::os::unix::fs::chown(w.src.join("huge"), None, Some(1234)).unwrap();
    let plain = plain_copy(&w);
    let m = w.mount_lazy();
    for at in [&m.at, &plain] {
        fs::write(at.join("huge/new"), b"new").unwrap();
    }
    resume_and_finish(m);
    expect_like(&w, &plain);
}

#[test]
fn a_new_file_has_its_directory_s_group_and_its_maker_s_umask() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(w) = world(kind, 3000) else { return };
        let huge = w.src.join("huge");
        std::os::unix::fs::chown(&huge, None, Some(1234)).unwrap();
        fs::set_permissions(&huge, fs::Permissions::from_mode(0o2777)).unwrap();
        let plain = plain_copy(&w);
        let m = w.mount_lazy();
        for at in [&m.at, &plain] {
            as_user(4321, 4321, 0o027, || {
                let huge = at.join("huge");
                fs::write(huge.join("new"), b"new").unwrap();
                let mut only_read = OpenOptions::new();
                only_read.write(true).create_new(true).mode(0o2555);
                let mut file = only_read.open(huge.join("r")).unwrap();
                file.write_all(b"by who has made it").unwrap();
                let again = File::create_new(huge.join("new")).unwrap_err();
                assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
            });
        }
        assert!(is_unpopulated(&w.dst.join("huge")), "{kind}: it waited");
        resume_and_finish(m);
        expect_like(&w, &plain);
    }
}

/// Makes, changes and removes files of one's own, and looks at them, until `over`; how many there were.
fn busy(huge: &Path, me: usize, over: &AtomicBool) -> usize {
    let mut n = 0;
    while !over.load(Relaxed) || n < 50 {
        let at = huge.join(format!("of {me}: {n}"));
        let mut file = File::create_new(&at).unwrap();
        file.write_all(&bytes(n as u64, 3000)).unwrap();
        drop(file);
        assert_eq!(fs::read(&at).unwrap(), bytes(n as u64, 3000));
        match n % 3 {
            0 => fs::remove_file(&at).unwrap(),
            1 => fs::set_permissions(&at, fs::Permissions::from_mode(0o600)).unwrap(),
            _ => {}
        }
        n += 1;
        if n >= 3000 {
            break;
        }
    }
    n
}

#[test]
fn files_that_are_made_while_their_directory_is_populated_are_all_there_and_carry_no_mark() {
    for (kind, walker) in [("ext4", true), ("xfs", false), ("btrfs", true)] {
        let Some(w) = world(kind, MANY) else { return };
        let plain = plain_copy(&w);
        let m = if walker { w.mount() } else { w.mount_lazy() };
        let huge = m.path("huge");
        let over = AtomicBool::new(false);
        let done: Vec<usize> = thread::scope(|scope| {
            let users: Vec<_> = (0..3)
                .map(|me| {
                    let (huge, over) = (&huge, &over);
                    scope.spawn(move || busy(huge, me, over))
                })
                .collect();
            thread::sleep(Duration::from_millis(100));
            let listed = fs::read_dir(&huge).unwrap();
            let names = listed.map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
            assert!(names.len() >= MANY, "{kind}: {}", names.len());
            over.store(true, Relaxed);
            users.into_iter().map(|u| u.join().unwrap()).collect()
        });
        for (me, n) in done.into_iter().enumerate() {
            for n in (0..n).filter(|n| n % 3 != 0) {
                let at = plain.join("huge").join(format!("of {me}: {n}"));
                fs::write(&at, bytes(n as u64, 3000)).unwrap();
                if n % 3 == 1 {
                    fs::set_permissions(&at, fs::Permissions::from_mode(0o600)).unwrap();
                }
            }
        }
        if walker {
            m.wait_complete();
        }
        for entry in fs::read_dir(w.dst.join("huge")).unwrap().filter(|_| walker) {
            let path = entry.unwrap().path();
            assert!(!is_marked(&path), "{kind}: {}", path.display());
        }
        resume_and_finish(m);
        expect_like(&w, &plain);
    }
}

#[test]
fn the_next_program_knows_that_there_are_more_names_than_src_has() {
    let Some(w) = world("ext4", 3000) else { return };
    let plain = plain_copy(&w);
    let m = w.mount_lazy();
    work(&m.path("huge")).unwrap();
    work(&plain.join("huge")).unwrap();
    let held = OpenOptions::new()
        .write(true)
        .open(m.path("huge/new 2"))
        .unwrap();
    upgrade(&m);
    fs::write(m.path("huge/later"), b"later").unwrap();
    fs::write(plain.join("huge/later"), b"later").unwrap();
    assert!(is_unpopulated(&w.dst.join("huge")));
    for file in [&held, &File::create(plain.join("huge/new 2")).unwrap()] {
        file.set_len(0).unwrap();
        file.write_all_at(b"through both programs", 0).unwrap();
    }
    assert_eq!(count(&m.path("huge")), 3005);
    drop(held);
    resume_and_finish(m);
    expect_like(&w, &plain);
}

/// The name comes after the inode, and fdatasync need not make it durable where nothing was written.
#[test]
fn a_new_file_that_was_synced_and_never_written_outlives_a_power_cut() {
    for (kind, option) in [("ext4", "loop"), ("xfs", "loop,nouuid")] {
        let Some(w) = world(kind, 2000) else { return };
        let hold = Hold::at(&w, "own-marked");
        let m = w.mount_with(&["--no-background"], &hold.env());
        let path = m.path("huge/new");
        let made = apart(move || File::create_new(path)?.sync_data());
        hold.wait_met();
        // The journal is written between the file and its name, and not by itself after that.
        let fs = w.dst.parent().unwrap();
        if kind == "ext4" {
            let remount = ["-o", "remount,commit=600"];
            run(Command::new("mount").args(remount).arg(fs)).expect_code(0);
        }
        rustix::fs::syncfs(File::open(fs).unwrap()).unwrap();
        hold.let_go();
        made.recv_timeout(LIMIT).unwrap().unwrap();
        // What is on the disk now.
        let (copy, cut) = (w.scratch_path("copy"), w.scratch_path("cut"));
        let image = fs.with_file_name("image");
        let mut cp = Command::new("cp");
        run(cp.arg("--sparse=always").args([&image, &copy])).expect_code(0);
        fs::create_dir(&cut).unwrap();
        let mut mount = Command::new("mount");
        run(mount.args(["-o", option]).args([&copy, &cut])).expect_code(0);
        let is_there = cut.join("dst/huge/new").exists();
        run(Command::new("umount").arg(&cut)).expect_code(0);
        assert!(is_there, "{kind}");
        m.unmount();
    }
}
