//! `mount --adopt`: what counts as copied, what only DST has, and what users make meanwhile.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::crash::FAULT_EXIT;
use crate::fixture::{
    LIMIT, LoopFs, Scratch, World, bytes, can_mount_on, find_program, mirrorfs, need, run, status,
    wait_until,
};

fn sync(w: &World) {
    run(mirrorfs().arg("sync").args([&w.src, &w.dst])).expect_code(0);
}

/// A tree that was copied, and then changed on both sides.
fn copied(kind: &str) -> Option<World> {
    if !can_mount_on(kind) {
        return None;
    }
    let w = World::on(kind);
    for dir in ["a/b", "c", "gone/deep", "swap", "empty"] {
        fs::create_dir_all(w.src.join(dir)).unwrap();
    }
    for (n, file) in ["a/one", "a/b/two", "c/three", "gone/deep/four", "five"]
        .iter()
        .enumerate()
    {
        fs::write(w.src.join(file), bytes(n as u64, 3_000 * (n + 1))).unwrap();
    }
    fs::write(w.src.join("swap/file"), "x").unwrap();
    fs::write(w.src.join("turns"), "file").unwrap();
    fs::write(w.src.join("large"), bytes(40, 700_000)).unwrap();
    sync(&w);
    // SRC goes on: names go, change their type, and come.
    fs::remove_dir_all(w.src.join("gone")).unwrap();
    fs::remove_file(w.src.join("a/one")).unwrap();
    fs::remove_dir_all(w.src.join("swap")).unwrap();
    fs::write(w.src.join("swap"), "a file now").unwrap();
    fs::remove_file(w.src.join("turns")).unwrap();
    fs::create_dir(w.src.join("turns")).unwrap();
    fs::write(w.src.join("turns/in"), "y").unwrap();
    fs::write(w.src.join("c/new"), bytes(50, 10)).unwrap();
    // What cannot be removed without more ado.
    fs::write(w.dst.join("c/fixed"), "z").unwrap();
    run(Command::new("chattr").arg("+i").arg(w.dst.join("c/fixed"))).expect_code(0);
    Some(w)
}

/// What users make in every directory that they find, and in some names of what is about to go.
fn work(at: &Path) {
    for dir in ["", "a", "a/b", "c", "turns", "empty"] {
        fs::write(at.join(dir).join("made by a user"), dir).unwrap();
    }
    fs::create_dir_all(at.join("gone/deep")).unwrap();
    fs::write(at.join("gone/deep/mine"), "mine").unwrap();
    fs::write(at.join("a/one"), "mine").unwrap();
}

/// DST is SRC, and what `work` has made.
#[track_caller]
fn expect_src_and_work(w: &World) {
    w.expect_no_trace();
    work(&w.src);
    w.expect_same_tree(&w.src);
}

#[test]
fn with_delete_what_only_dst_has_goes_and_what_users_make_stays() {
    let Some(w) = copied("ext4") else { return };
    let m = w.mount_with(&["--adopt", "--delete", "--no-background"], &[]);
    // Nobody is shown what is about to go, whether he looks for it or lists.
    assert!(!m.path("gone").exists() && !m.path("a/one").exists());
    assert!(!m.path("c/fixed").exists());
    assert!(m.path("swap").is_file());
    work(&m.at);
    m.kill();
    let m = w.mount_with(&["--adopt", "--delete"], &[]);
    m.wait_complete();
    assert_eq!(m.status()["extras_kept"], 0);
    m.finish();
    expect_src_and_work(&w);
}

#[test]
pub(crate) fn without_delete_what_only_dst_has_is_kept_counted_and_listed() {
    let Some(w) = copied("ext4") else { return };
    run(Command::new("chattr").arg("-i").arg(w.dst.join("c/fixed"))).expect_code(0);
    // A directory in the place of a file would be an error.
    fs::remove_dir_all(w.dst.join("swap")).unwrap();
    let m = w.mount_with(&["--adopt"], &[]);
    m.wait_complete();
    m.unmount();
    let m = w.mount();
    m.wait_complete();
    assert_eq!(m.status()["extras_kept"], 3, "{:#}", m.status());
    assert_eq!(m.status()["errors"], 0);
    let listed = run(mirrorfs().arg("errors").arg(&m.at)).expect_code(0).out;
    let page = run(mirrorfs().arg("status").arg(&m.at)).expect_code(0).out;
    m.finish();
    for extra in [
        "\"gone\": only dst has it, kept",
        "\"a/one\": only",
        "\"c/fixed\": only",
    ] {
        assert!(listed.contains(extra), "{extra}: {listed}");
    }
    assert!(
        page.contains("extra   3 names that only DST has, kept"),
        "{page}"
    );
    assert_eq!(
        fs::read(w.dst.join("gone/deep/four")).unwrap(),
        bytes(3, 12_000)
    );
    assert!(w.dst.join("a/one").exists() && w.dst.join("c/fixed").exists());
}

#[test]
fn an_exit_while_extras_go_loses_nothing_that_users_made() {
    for kind in ["ext4", "btrfs"] {
        for (point, n) in [
            ("extra-before", 1),
            ("extra-removed", 1),
            ("extra-removed", 2),
        ] {
            let Some(w) = copied(kind) else { return };
            let fault = format!("{point}:{n}");
            let args = ["--adopt", "--delete", "--no-background"];
            // The first half of the work, until the daemon dies.
            let mounted = w.try_mount(&args, &[("MIRRORFS_FAULT", &fault)]);
            if let Err((code, log)) = &mounted {
                assert_eq!(*code, FAULT_EXIT, "{fault}: {log}");
            }
            if let Ok(mut m) = mounted {
                let early = m.path("empty/early");
                let made = fs::write(&early, "early").is_ok();
                let _ = fs::metadata(m.path("c/gone")); // Populates, or dies.
                let _ = fs::metadata(m.path("gone"));
                let died = m.wait_exit(LIMIT);
                assert_eq!(died, Some(FAULT_EXIT), "{fault}: {}", m.log());
                drop(m);
                let m = w.mount_with(&args, &[]);
                assert_eq!(m.path("empty/early").exists(), made, "{kind} {fault}");
                let _ = fs::remove_file(m.path("empty/early"));
                work(&m.at);
                m.kill();
            }
            let m = w.mount_with(&["--adopt", "--delete"], &[]);
            m.finish();
            expect_src_and_work(&w);
        }
    }
}

#[test]
fn with_checksum_equal_is_what_has_the_same_bytes() {
    for (option, repaired) in [
        (&["--adopt"][..], false),
        (&["--adopt", "--checksum"], true),
    ] {
        if !can_mount_on("ext4") {
            return;
        }
        let w = World::on("ext4");
        fs::create_dir(w.src.join("d")).unwrap();
        let sizes = [("same", 3_000), ("small", 3_000), ("large", 300_000)];
        for (n, (name, size)) in sizes.iter().enumerate() {
            fs::write(w.src.join("d").join(name), bytes(n as u64, *size)).unwrap();
        }
        sync(&w);
        let inode = w.dst.join("d/same").metadata().unwrap().ino();
        for (n, (name, size)) in sizes.iter().enumerate().skip(1) {
            let file = w.dst.join("d").join(name);
            let modified = file.metadata().unwrap().modified().unwrap();
            fs::write(&file, bytes(n as u64 + 100, *size)).unwrap();
            let file = fs::File::options().write(true).open(&file).unwrap();
            file.set_modified(modified).unwrap();
        }
        w.mount_with(option, &[]).finish();
        for (n, (name, size)) in sizes.iter().enumerate().skip(1) {
            let good = fs::read(w.dst.join("d").join(name)).unwrap() == bytes(n as u64, *size);
            assert_eq!(good, repaired, "{option:?} {name}");
        }
        if repaired {
            w.expect_finished_copy();
            let now = w.dst.join("d/same").metadata().unwrap().ino();
            assert_eq!(now, inode, "what is equal is not copied again");
        }
    }
}

#[test]
pub(crate) fn what_delete_could_not_be_told_from_later_is_refused() {
    let Some(w) = copied("ext4") else { return };
    let refused = |args: &[&str], code: i32, words: &str| {
        let (got, said) = w.try_mount(args, &[]).err().expect("refused");
        assert!(got == code && said.contains(words), "{got}: {said}");
    };
    refused(&["--delete"], 2, "--adopt");
    refused(&["--checksum"], 2, "--adopt");
    let kept = w.scratch_path("kept");
    fs::rename(&w.src, &kept).unwrap_or_else(|_| {
        run(Command::new("mv").args([&w.src, &kept])).expect_code(0);
    });
    fs::create_dir(&w.src).unwrap();
    refused(&["--adopt", "--delete"], 3, "is empty");
    assert!(w.dst.join("five").exists());
    fs::write(w.src.join("file"), "x").unwrap();
    let mut m = w.mount_with(&["--adopt", "--no-background"], &[]);
    assert!(m.runs());
    m.unmount();
    refused(&["--adopt", "--delete"], 3, "cannot be added later");
    run(Command::new("chattr").arg("-i").arg(w.dst.join("c/fixed"))).expect_code(0);
}

fn chattr(flag: &str, path: &Path) {
    run(Command::new("chattr").arg(flag).arg(path)).expect_code(0);
}

/// Files and directories with +i and +a that were copied, in `d/` for each kind, and then changed in SRC.
fn flagged(w: &World) {
    for dir in ["i/in", "a/in", "plain"] {
        fs::create_dir_all(w.src.join(dir)).unwrap();
    }
    let all = ["i/in/x", "a/in/x", "plain/x"];
    for dir in ["plain", "i", "a"] {
        for file in [
            "same+i", "same+a", "new+i", "new+a", "gone+i", "gone+a", "off+i",
        ] {
            fs::write(w.src.join(dir).join(file), "one").unwrap();
        }
    }
    for file in all {
        fs::write(w.src.join(file), "one").unwrap();
    }
    fs::write(w.src.join("linked+i"), "one").unwrap();
    fs::hard_link(w.src.join("linked+i"), w.src.join("plain/linked")).unwrap();
    set_flags(w, "+");
    sync(w);
    set_flags(w, "-");
    for dir in ["plain", "i", "a"] {
        let at = |file: &str| w.src.join(dir).join(file);
        for file in ["new+i", "new+a"] {
            fs::write(at(file), "two and more").unwrap();
        }
        for file in ["gone+i", "gone+a"] {
            fs::remove_file(at(file)).unwrap();
        }
    }
    fs::write(w.src.join("linked+i"), "two").unwrap();
    fs::write(w.src.join("i/in/x"), "two").unwrap();
    set_flags(w, "+");
    // What has lost its flag.
    chattr("-i", &w.src.join("i"));
    chattr("-i", &w.src.join("i/off+i"));
    chattr("+i", &w.src.join("i"));
}

/// +i and +a in SRC, or off again; directories last, or first.
fn set_flags(w: &World, to: &str) {
    let on = |path: &str, flag: &str| chattr(&format!("{to}{flag}"), &w.src.join(path));
    let dirs = || {
        on("i", "i");
        on("a", "a");
        on("a/in", "i");
        on("", "a");
    };
    if to == "-" {
        dirs();
    }
    for dir in ["plain", "i", "a"] {
        for file in ["same", "new", "gone"] {
            for flag in ["i", "a"] {
                let path = format!("{dir}/{file}+{flag}");
                if w.src.join(&path).exists() {
                    on(&path, flag);
                }
            }
        }
        on(&format!("{dir}/off+i"), "i");
    }
    on("linked+i", "i");
    if to == "+" {
        dirs();
    }
}

/// The mount shows SRC: its names and its bytes.
fn expect_srcs(w: &World, at: &Path) {
    let listed = |root: &Path| {
        let mut find = Command::new("find");
        find.arg(root).args(["-printf", "%P %y %s %m\\n"]);
        let out = run(&mut find).expect_code(0).out;
        let mut lines: Vec<_> = out
            .lines()
            .filter(|l| !l.starts_with("lost+found"))
            .map(str::to_owned)
            .collect();
        lines.retain(|line| !line.contains(" d ")); // Sizes of directories are dst's.
        lines.sort();
        lines
    };
    assert_eq!(listed(at), listed(&w.src));
    for dir in ["plain", "i", "a"] {
        for (file, want) in [
            ("same+i", "one"),
            ("same+a", "one"),
            ("new+i", "two and more"),
            ("new+a", "two and more"),
        ] {
            let got = fs::read_to_string(at.join(dir).join(file)).unwrap();
            assert_eq!(got, want, "{dir}/{file}");
        }
        assert!(!at.join(dir).join("gone+i").exists());
    }
    assert_eq!(fs::read_to_string(at.join("linked+i")).unwrap(), "two");
    assert_eq!(fs::read_to_string(at.join("plain/linked")).unwrap(), "two");
    assert_eq!(fs::read_to_string(at.join("i/in/x")).unwrap(), "two");
}

#[test]
fn what_is_immutable_or_append_only_in_an_earlier_copy_is_taken_over() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            continue;
        }
        let w = World::on(kind);
        flagged(&w);
        let inode = |path: &str| w.dst.join(path).metadata().unwrap().ino();
        let same = inode("plain/same+i");
        let options = ["--adopt", "--delete", "--no-background"];
        for (point, number) in [
            ("populate-after-child", "3"),
            ("extra-before", "1"),
            ("extra-removed", "2"),
        ] {
            let exit = format!("{point}:{number}");
            if let Ok(m) = w.try_mount(&options, &[("MIRRORFS_FAULT", &exit)]) {
                let _ = fs::read_dir(m.path("plain")).map(Iterator::count); // It dies of it.
                m.kill();
            }
        }
        let m = w.mount_with(&options, &[]);
        expect_srcs(&w, &m.at);
        // Nothing has its flags before the end.
        for file in ["plain/same+i", "a/same+a", "plain/new+i"] {
            let opened = fs::File::options().write(true).open(m.path(file));
            opened.unwrap_or_else(|e| panic!("{kind} {file}: {e}"));
        }
        m.kill();
        let m = w.mount_with(&["--adopt", "--delete"], &[]);
        m.wait_complete();
        expect_srcs(&w, &m.at);
        assert_eq!(
            (m.status()["errors"].clone(), m.errors()),
            (0.into(), String::new()),
            "{kind}"
        );
        m.finish();
        expect_srcs(&w, &w.dst);
        assert_eq!(
            inode("plain/same+i"),
            same,
            "what is equal is not copied again"
        );
        run(mirrorfs().arg("verify").args([&w.src, &w.dst])).expect_code(0);
        w.expect_same_tree(&w.src);
        for root in [&w.src, &w.dst] {
            let flags = run(Command::new("chattr").args(["-R", "-f", "-ia"]).arg(root));
            flags.expect_code(0);
        }
    }
}

/// In /proc.
fn daemon_of(dst: &Path) -> PathBuf {
    let pid = status(dst)["pid"].as_u64().unwrap();
    format!("/proc/{pid}").into()
}

/// A line that was left in fstab, a unit, a cron job.
#[test]
pub(crate) fn what_users_did_after_finish_is_not_taken_back_by_the_command_of_before() {
    let Some(w) = copied("ext4") else { return };
    let state = w.scratch_path("state");
    let command = |words: &[&str]| {
        let mut command = mirrorfs();
        command.env("MIRRORFS_STATE_DIR", &state).args(words);
        command
    };
    let sync = |more: &[&str]| run(command(&["sync"]).args(more).args([&w.src, &w.dst]));
    let mount = || {
        let words = ["mount", "--adopt", "--delete"];
        run(command(&words).args([&w.src, &w.dst]))
    };
    let finish = || run(command(&["finish"]).arg(&w.dst));
    let users = |at: &Path| {
        fs::write(at.join("five"), "a user's").unwrap();
        fs::write(at.join("new"), "a user's").unwrap();
    };
    let expect_users = || {
        for name in ["five", "new"] {
            assert_eq!(fs::read_to_string(w.dst.join(name)).unwrap(), "a user's");
        }
    };
    mount().expect_code(0);
    users(&w.dst);
    let into_mount = sync(&[]).expect_code(3).err;
    assert!(
        into_mount.contains("a migration shows its tree there"),
        "{into_mount}"
    );
    run(command(&["wait"]).arg(&w.dst)).expect_code(0);
    let daemon = daemon_of(&w.dst);
    finish().expect_code(0);
    wait_until("the daemon's end", LIMIT, || !daemon.exists());
    expect_users();
    // Who asks for it again is not told that he has the wrong path.
    run(command(&["wait"]).arg(&w.dst)).expect_code(0);
    for words in [&["finish"][..], &["status"], &["errors"]] {
        let said = run(command(words).arg(&w.dst)).expect_code(3).err;
        assert!(
            said.contains("a migration into it was finished on 2") && said.contains("a plain tree"),
            "{said}"
        );
    }
    // The same tree by another path is the same.
    let link = w.scratch_path("link");
    std::os::unix::fs::symlink(&w.dst, &link).unwrap();
    let by_link = run(command(&["sync"]).args([&w.src, &link]));
    for refused in [mount(), sync(&[]), sync(&["--delete"]), by_link] {
        let said = refused.expect_code(3).err;
        assert!(
            said.contains("take back what users have changed since"),
            "{said}"
        );
    }
    expect_users();
    sync(&["-n"]).expect_code(0);
    let notes: Vec<_> = fs::read_dir(&state).unwrap().flatten().collect();
    assert_eq!(notes.len(), 1);
    // Who wants the old tree again says so.
    fs::remove_file(notes[0].path()).unwrap();
    sync(&[]).expect_code(0);
    mount().expect_code(0);
    run(command(&["wait"]).arg(&w.dst)).expect_code(0);
    assert!(!w.dst.join("new").exists());
    // Without a daemon too.
    let daemon = daemon_of(&w.dst);
    run(Command::new("umount").arg(&w.dst)).expect_code(0);
    wait_until("the daemon's end", LIMIT, || !daemon.exists());
    finish().expect_code(0);
    let said = mount().expect_code(3).err;
    assert!(said.contains("take back"), "{said}");
}

/// A daemon that may not take +i off: root without CAP_LINUX_IMMUTABLE.
#[test]
fn what_cannot_be_taken_over_is_not_read_as_srcs() {
    if !can_mount_on("ext4") || !need(find_program("setpriv").is_some(), "setpriv") {
        return;
    }
    let w = World::on("ext4");
    fs::create_dir(w.src.join("d")).unwrap();
    for file in ["d/fixed", "d/same", "beside"] {
        fs::write(w.src.join(file), "one").unwrap();
    }
    sync(&w);
    chattr("+i", &w.dst.join("d/fixed"));
    fs::write(w.src.join("d/fixed"), "two!").unwrap();
    let program = mirrorfs();
    let mut mount = Command::new("setpriv");
    mount.args([
        "--bounding-set=-linux_immutable",
        "--inh-caps=-linux_immutable",
    ]);
    for (name, value) in program.get_envs() {
        mount.env(name, value.unwrap_or_default());
    }
    mount.arg(program.get_program()).args(["mount", "--adopt"]);
    run(mount.args([&w.src, &w.dst, &w.at])).expect_code(0);
    for _ in 0..2 {
        let read = fs::read(w.at.join("d/fixed")).map_err(|e| e.raw_os_error());
        assert_eq!(read, Err(Some(libc::EIO)));
        let listed = fs::read_dir(w.at.join("d")).map(Iterator::count);
        assert_eq!(listed.map_err(|e| e.raw_os_error()), Err(Some(libc::EIO)));
    }
    assert_eq!(fs::read(w.at.join("d/same")).unwrap(), b"one");
    assert_eq!(fs::read(w.at.join("beside")).unwrap(), b"one");
    let listed = run(mirrorfs().arg("errors").arg(&w.at)).out;
    assert!(
        listed.contains("\"d/fixed\": FS_IOC_SETFLAGS") || listed.contains("\"d/fixed\": unlink"),
        "{listed}"
    );
    assert_eq!(
        fs::read(w.dst.join("d/fixed")).unwrap(),
        b"one",
        "it is not touched"
    );
    run(Command::new("umount").arg(&w.at)).expect_code(0);
    // Who may takes it over.
    let m = w.mount_with(&["--adopt"], &[]);
    assert_eq!(fs::read(m.path("d/fixed")).unwrap(), b"two!");
    m.finish();
    w.expect_finished_copy();
}

/// rsync would remove it; who makes a file system and copies into its root has it in the way otherwise.
#[test]
fn the_lost_found_of_an_ext4_is_the_file_systems_own_and_another_one_is_not() {
    if !can_mount_on("ext4") {
        return;
    }
    let (disk, other) = (LoopFs::new("ext4"), LoopFs::new("ext4"));
    let own = disk.path().join("lost+found");
    let (src, dst) = (other.dir("src"), disk.path().to_path_buf());
    let w = World::from(src, dst, vec![disk, other]).over();
    fs::write(w.src.join("a"), "content").unwrap();
    let scratch = Scratch::new();
    let manifest = scratch.path().join("manifest");
    let litter = || {
        fs::create_dir_all(w.dst.join("only in dst/lost+found")).unwrap();
        fs::write(own.join("#12"), "fsck has found this").unwrap();
    };
    litter();
    let mut command = mirrorfs();
    command
        .args(["sync", "-i", "--delete", "--manifest"])
        .arg(&manifest);
    let said = run(command.args([&w.src, &w.dst])).expect_code(0);
    assert_eq!(said.out.matches("*deleting").count(), 2, "{}", said.out);
    assert!(own.join("#12").exists() && !w.dst.join("only in dst").exists());
    let verify = || {
        run(mirrorfs().arg("verify").args([&w.src, &w.dst])).expect_code(0);
        let mut command = mirrorfs();
        command
            .arg("verify")
            .arg("--manifest")
            .args([&manifest, &w.dst]);
        run(&mut command).expect_code(0);
    };
    verify();
    litter();
    let m = w.mount_with(&["--adopt", "--delete"], &[]);
    m.wait_complete();
    assert_eq!(
        (&m.status()["extras_removed"], &m.status()["extras_kept"]),
        (&1.into(), &0.into())
    );
    assert!(m.path("lost+found/#12").exists() && !m.path("only in dst").exists());
    m.finish();
    assert!(own.join("#12").exists());
    verify();

    // Anywhere else it is a directory like all others.
    let w = World::on("ext4");
    let named = w.dst.join("lost+found");
    let make = || {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().mode(0o700).create(&named).unwrap();
    };
    make();
    run(mirrorfs().arg("verify").args([&w.src, &w.dst])).expect_code(9);
    run(mirrorfs().args(["sync", "--delete"]).args([&w.src, &w.dst])).expect_code(0);
    assert!(!named.exists());
    fs::write(w.src.join("a"), "content").unwrap();
    sync(&w);
    make();
    let m = w.mount_with(&["--adopt", "--delete"], &[]);
    m.wait_complete();
    assert_eq!(m.status()["extras_removed"], 1);
    m.finish();
    assert!(!named.exists());
}
