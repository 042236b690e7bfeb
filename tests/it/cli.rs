//! The command line: help, exit codes, one clear line for bad input, and nothing changed by it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::compare;
use crate::fixture::{
    Output, Scratch, World, can_mount, can_mount_on, find_program, fuse_mount_at, mirrorfs, need,
    run,
};

const COMMANDS: [&str; 16] = [
    "mount",
    "sync",
    "status",
    "wait",
    "pause",
    "resume",
    "cancel",
    "upgrade",
    "set",
    "pull",
    "verify",
    "manifest",
    "finish",
    "errors",
    "completions",
    "man",
];

#[track_caller]
fn mirrorfs_with(args: &[&str]) -> Output {
    run(mirrorfs().args(args).env("COLUMNS", "100"))
}

/// Expects an exit code and one line on standard error that has all of `words`.
#[track_caller]
fn expect_refusal(output: Output, code: i32, words: &[&str]) {
    let output = output.expect_code(code);
    let lines: Vec<&str> = output.err.lines().collect();
    assert_eq!(lines.len(), 1, "one line: {:?}", output.err);
    assert!(lines[0].starts_with("mirrorfs: "), "{:?}", output.err);
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is not in {:?}", lines[0]);
    }
}

/// The help of all commands is tests/it/help.txt; MIRRORFS_BLESS=1 writes it anew.
#[test]
fn help_is_as_documented() {
    let mut all = mirrorfs_with(&["--help"]).expect_code(0).out;
    for command in COMMANDS {
        all += &format!("\n======== mirrorfs {command} --help\n\n");
        all += &mirrorfs_with(&[command, "--help"]).expect_code(0).out;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/help.txt");
    if std::env::var_os("MIRRORFS_BLESS").is_some() {
        fs::write(&path, &all).unwrap();
    }
    let want = fs::read_to_string(&path).unwrap_or_default();
    let differs = want.lines().zip(all.lines()).find(|(a, b)| a != b);
    assert!(
        want == all,
        "help.txt is not what --help says (MIRRORFS_BLESS=1 writes it): {differs:?}"
    );
}

#[test]
fn help_names_every_exit_code() {
    for command in COMMANDS
        .iter()
        .filter(|c| !["completions", "man"].contains(c))
    {
        let help = mirrorfs_with(&[command, "--help"]).expect_code(0).out;
        for code in [0, 1, 2, 3, 9, 11, 20, 23, 24, 25, 30] {
            let line = format!("  {code:2}  ");
            assert!(help.contains(&line), "{command}: {code}");
        }
    }
}

#[test]
fn man_pages_and_completions_are_printed() {
    let man = mirrorfs_with(&["man"]).expect_code(0).out;
    assert!(man.contains(".TH"), "{man:.200}");
    for command in COMMANDS {
        let page = mirrorfs_with(&["man", command]).expect_code(0).out;
        assert!(page.contains(".TH") && page.contains(command), "{command}");
    }
    expect_refusal(mirrorfs_with(&["man", "nothing"]), 2, &["nothing"]);
    for shell in ["bash", "zsh", "fish"] {
        let text = mirrorfs_with(&["completions", shell]).expect_code(0).out;
        assert!(text.contains("no-background"), "{shell}");
    }
}

#[test]
pub(crate) fn what_cannot_be_meant_is_a_usage_error() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["frob"], &["frob"]),
        (
            &["umount", "/srv"],
            &["umount PATH", "mirrorfs finish PATH"],
        ),
        (
            &["unmount", "/srv"],
            &["umount PATH", "mirrorfs finish PATH"],
        ),
        (&["stop", "/srv"], &["umount PATH", "mirrorfs finish PATH"]),
        (&["mount"], &["<SRC>", "<DST>"]),
        (&["mount", "a"], &["<DST>"]),
        (&["mount", "--bogus", "a", "b"], &["--bogus"]),
        (&["mount", "a", "b", "-o", "bogus"], &["bogus"]),
        (&["mount", "a", "b", "-o", "rw,large=x"], &["large", "x"]),
        (
            &["mount", "a", "b", "-o", "large=x\nmirrorfs: y\u{1b}[2J"],
            &["large", "x\\nmirrorfs: y\\u{1b}[2J"],
        ),
        (&["mount", "a", "b", "--log-level", "loud"], &["loud"]),
        (
            &["mount", "a", "b", "--finish", "--no-background"],
            &["--finish"],
        ),
        (&["sync", "a"], &["<DST>"]),
        (&["sync", "--jobs", "0", "a", "b"], &["--jobs"]),
        (&["sync", "--max-delete", "x", "a", "b"], &["--max-delete"]),
        (&["errors", "--json", "-0", "a"], &["--json"]),
        (&["finish"], &["<PATH>"]),
        (&["set", "a"], &["--bwlimit"]),
        (&["set", "a", "--bwlimit", "fast"], &["fast"]),
        (&["mount", "a", "b", "--bwlimit", "1X"], &["1X"]),
        (&["mount", "a", "b", "--metrics", "host:1"], &["host:1"]),
        (&["mount", "a", "b", "--jobs", "300"], &["--jobs"]),
        (&["sync", "a", "b", "--bwlimit", "x"], &["x"]),
        (&["sync", "a", "b", "--info=flist"], &["progress2"]),
        (
            &["sync", "a", "b", "--verify", "--exclude=x"],
            &["--verify"],
        ),
        (&["mount", "a", "b", "--delete"], &["--adopt"]),
        (&["wait", "a", "--timeout", "soon"], &["--timeout"]),
        (&["pull"], &["<PATHS>"]),
        (&["status", "-H", "--json"], &["--json"]),
    ];
    for (args, words) in cases {
        eprintln!("{args:?}");
        expect_refusal(mirrorfs_with(args), 2, words);
    }
    // Without a command there is nothing to say but the help.
    let help = mirrorfs_with(&[]).expect_code(2);
    assert!(help.err.contains("Usage: mirrorfs"), "{}", help.err);
}

/// What rsync has and sync has not is known, and refused with what to do instead.
#[test]
pub(crate) fn what_only_rsync_has_is_refused_with_a_hint() {
    let refused: &[(&[&str], &[&str])] = &[
        (&["sync", "-az", "a", "b"], &["-z"]),
        (&["sync", "-e", "ssh", "a", "b"], &["-e"]),
        (&["sync", "--link-dest", "c", "a", "b"], &["--link-dest"]),
        (&["sync", "--inplace", "a", "b"], &["--inplace"]),
        (&["sync", "--partial", "a", "b"], &["--partial"]),
        (&["sync", "host:a", "b"], &["host:a", "./host:a"]),
        (&["sync", "a", "me@host:b"], &["me@host:b"]),
        (&["sync", "--delete-after", "a", "b"], &["give --delete"]),
        (&["sync", "-L", "a", "b"], &["-L", "symlinks"]),
        (
            &["sync", "--files-from=host:list", "a", "b"],
            &["host:list"],
        ),
    ];
    for (args, words) in refused {
        eprintln!("{args:?}");
        expect_refusal(mirrorfs_with(args), 1, words);
    }
}

/// Two directories, some things that are none, and links to them.
fn bad_places() -> Scratch {
    let s = Scratch::new();
    fs::write(s.dir("src").join("file"), "content").unwrap();
    fs::create_dir(s.path().join("src/inner")).unwrap();
    s.dir("dst");
    s.dir("mnt");
    fs::create_dir(s.path().join("dst/inner")).unwrap();
    fs::write(s.path().join("file"), "").unwrap();
    symlink("src", s.path().join("link-to-src")).unwrap();
    symlink("src/inner", s.path().join("link-to-inner")).unwrap();
    symlink("nowhere", s.path().join("dangling")).unwrap();
    s
}

/// SRC and DST that no command that copies accepts, and what its line says.
const BAD_PAIRS: [(&str, &str, &[&str]); 11] = [
    ("none", "dst", &["SRC", "none", "open", "No such file"]),
    ("file", "dst", &["SRC", "file", "open", "Not a directory"]),
    ("src", "file", &["DST", "file", "open", "Not a directory"]),
    ("dangling", "dst", &["SRC", "dangling", "No such file"]),
    ("src", "src", &["same"]),
    ("src", "src/../src//", &["same"]),
    ("src", "link-to-src", &["same"]),
    ("src", "src/inner", &["DST", "inside SRC"]),
    ("src", "link-to-inner", &["DST", "inside SRC"]),
    ("link-to-inner", "src", &["SRC", "inside DST"]),
    ("src", "none/new", &["DST", "No such file"]),
];

#[test]
pub(crate) fn mount_refuses_bad_places_and_changes_nothing() {
    if !can_mount() {
        return;
    }
    let s = bad_places();
    let before = compare::manifest(s.path());
    let at = |name: &str| s.path().join(name);
    for (src, dst, words) in BAD_PAIRS {
        for front in [&["mount"][..], &["mount", "-f"]] {
            eprintln!("{front:?} {src} {dst}");
            let output = run(mirrorfs().args(front).arg(at(src)).arg(at(dst)));
            expect_refusal(output, 3, words);
        }
    }
    for (point, words) in [
        ("none", &["MOUNTPOINT", "none", "No such file"][..]),
        ("file", &["MOUNTPOINT", "file", "Not a directory"]),
        ("src/inner", &["MOUNTPOINT", "inside SRC"]),
        ("dst/inner", &["MOUNTPOINT", "inside DST"]),
    ] {
        let mut command = mirrorfs();
        command.arg("mount").arg(at("src")).arg(at("dst"));
        expect_refusal(run(command.arg(at(point))), 3, words);
    }
    compare::expect_equal(&before, &compare::manifest(s.path()));
}

#[test]
fn sync_refuses_bad_places_and_changes_nothing() {
    let s = bad_places();
    let before = compare::manifest(s.path());
    let at = |name: &str| s.path().join(name);
    for (src, dst, words) in BAD_PAIRS {
        eprintln!("{src} {dst}");
        let output = run(mirrorfs().arg("sync").arg(at(src)).arg(at(dst)));
        expect_refusal(output, 3, words);
    }
    compare::expect_equal(&before, &compare::manifest(s.path()));
}

#[test]
fn a_bind_mount_does_not_hide_that_dst_is_inside_src() {
    if !need(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let s = bad_places();
    let at = |name: &str| s.path().join(name);
    let bind = |from: &str, to: &str| {
        run(Command::new("mount")
            .arg("--bind")
            .arg(at(from))
            .arg(at(to)))
        .expect_code(0);
    };
    bind("src/inner", "mnt");
    for command in ["mount", "sync"] {
        let to_inner = run(mirrorfs().arg(command).arg(at("src")).arg(at("mnt")));
        expect_refusal(to_inner, 3, &["DST", "inside SRC"]);
        let from_inner = run(mirrorfs().arg(command).arg(at("mnt")).arg(at("src")));
        expect_refusal(from_inner, 3, &["SRC", "inside DST"]);
    }
    run(Command::new("umount").arg(at("mnt"))).expect_code(0);
    bind("src", "mnt");
    for command in ["mount", "sync"] {
        let output = run(mirrorfs().arg(command).arg(at("src")).arg(at("mnt")));
        expect_refusal(output, 3, &["same"]);
    }
    run(Command::new("umount").arg(at("mnt"))).expect_code(0);
}

#[test]
pub(crate) fn mount_says_when_the_helper_or_dev_fuse_is_missing() {
    if !can_mount() {
        return;
    }
    let s = bad_places();
    let at = |name: &str| s.path().join(name);
    let program = mirrorfs().get_program().to_owned();
    let unprivileged = run(Command::new(find_program("setpriv").unwrap())
        .env("PATH", s.path())
        .args(["--bounding-set=-sys_admin", "--inh-caps=-all"])
        .arg(&program)
        .arg("mount")
        .args([at("src"), at("dst")]));
    expect_refusal(unprivileged, 1, &["fusermount3", "root"]);
    let script = "mount -t tmpfs none /dev && exec \"$@\"";
    let without_fuse = run(Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&program)
        .arg("mount")
        .args([at("src"), at("dst")]));
    expect_refusal(without_fuse, 1, &["/dev/fuse", "open", "No such file"]);
}

#[test]
pub(crate) fn a_path_that_is_no_migration_is_refused() {
    let s = bad_places();
    let at = |name: &str| s.path().join(name);
    for command in [
        "status", "finish", "errors", "wait", "pause", "resume", "cancel",
    ] {
        for path in ["dst", "none"] {
            eprintln!("{command} {path}");
            let output = run(mirrorfs().arg(command).arg(at(path)));
            expect_refusal(output, 3, &[path]);
        }
    }
    let nothing = run(mirrorfs()
        .arg("status")
        .env("MIRRORFS_RUN_DIR", s.path().join("run")))
    .expect_code(0);
    assert_eq!(nothing.out, "no migration is running\n");
}

#[test]
fn verify_tells_equal_from_different_from_unusable() {
    let s = bad_places();
    let at = |name: &str| s.path().join(name);
    let verify = |a: &str, b: &str| run(mirrorfs().arg("verify").arg(at(a)).arg(at(b)));
    verify("src", "src").expect_code(0);
    let different = verify("src", "mnt").expect_code(9);
    assert!(different.out.contains("only in src"), "{}", different.out);
    expect_refusal(verify("src", "none"), 3, &["none"]);
    expect_refusal(verify("file", "src"), 3, &["file"]);
}

#[test]
pub(crate) fn a_daemon_is_usable_when_mount_returns_and_is_found_by_each_of_its_paths() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::write(w.src.join("a"), "content").unwrap();
    let mut mount = mirrorfs();
    mount.arg("mount").args([&w.src, &w.dst, &w.at]);
    let said = run(&mut mount).expect_code(0);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("", ""));
    assert_eq!(fs::read(w.at.join("a")).unwrap(), b"content");

    for path in [&w.src, &w.dst, &w.at] {
        let page = run(mirrorfs().arg("status").arg(path)).expect_code(0).out;
        assert!(page.contains(w.at.to_str().unwrap()), "{page}");
        assert!(page.contains("usable"), "{page}");
        run(mirrorfs().arg("errors").arg(path)).expect_code(0);
    }
    // The same again: nothing happens to the first one.
    for (words, dst, point) in [
        (&["busy"][..], &w.dst, &w.at),
        (&["DST"][..], &w.dst, &w.dst),
    ] {
        let mut again = mirrorfs();
        expect_refusal(run(again.arg("mount").args([&w.src, dst, point])), 3, words);
    }
    assert_eq!(fs::read(w.at.join("a")).unwrap(), b"content");
    crate::fixture::wait_until("COMPLETE", crate::fixture::LIMIT, || {
        crate::fixture::status(&w.at)["state"] == "COMPLETE"
    });
    let finished = run(mirrorfs().arg("finish").arg(&w.src)).expect_code(0);
    assert!(finished.out.starts_with("finished"), "{}", finished.out);
    assert!(fuse_mount_at(&w.at).is_none());
    w.expect_finished_copy();
}

#[test]
pub(crate) fn mount_refuses_a_dst_that_is_somebody_elses_and_a_src_with_marks() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    let other = w.src.parent().unwrap().join("other");
    let third = w.src.parent().unwrap().join("third");
    for (dir, file) in [(&w.src, "a"), (&other, "b")] {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(file), "content").unwrap();
    }
    fs::create_dir(&third).unwrap();
    let mount = |src: &Path, dst: &Path| run(mirrorfs().arg("mount").args([src, dst, &w.at]));

    fs::write(third.join("mine"), "").unwrap();
    expect_refusal(mount(&w.src, &third), 3, &["third", "--adopt"]);
    assert_eq!(fs::read_dir(&third).unwrap().count(), 1, "nothing changed");
    fs::remove_file(third.join("mine")).unwrap();

    let m = w.mount_lazy();
    // The root of dst is populated now, and `a` is pending.
    assert_eq!(fs::read_dir(&m.at).unwrap().count(), 1);
    assert_eq!(m.unmount(), 20);
    expect_refusal(mount(&other, &w.dst), 3, &["DST"]);
    expect_refusal(mount(&w.dst, &third), 3, &["SRC"]);
    assert_eq!(fs::read_dir(&third).unwrap().count(), 0, "nothing changed");

    let page = run(mirrorfs().arg("status").arg(&w.dst)).expect_code(0).out;
    assert!(page.contains("STOPPED"), "{page}");
    let refused = run(mirrorfs().arg("finish").arg(&w.dst));
    expect_refusal(refused, 1, &["pending"]);
}

/// A hint before the first byte is copied, where it costs nothing to know.
#[test]
pub(crate) fn a_dst_that_is_too_small_for_all_of_src_is_told_at_once() {
    if !can_mount_on("ext4") {
        return;
    }
    use crate::fixture::{LoopFs, bytes};
    let (a, b) = (LoopFs::new("ext4"), LoopFs::sized("ext4", 64 << 20));
    let (src, dst) = (a.path().to_path_buf(), b.dir("dst"));
    let part = a.dir("part");
    let w = World::from(src.clone(), dst, vec![a, b]);
    let mount = |src: &Path| {
        let mut mount = mirrorfs();
        let mount = mount.args(["mount", "--no-background"]);
        let said = run(mount.args([src, &w.dst, &w.at])).expect_code(0).err;
        run(Command::new("umount").arg(&w.at)).expect_code(0);
        said
    };
    fs::write(part.join("large"), bytes(1, 80 << 20)).unwrap();
    run(Command::new("sync").arg("-f").arg(&src)).expect_code(0);
    let said = mount(&src);
    assert!(said.contains("it may not be enough"), "{said}");
    // Not again, and not of a directory in it, of which nobody knows.
    assert_eq!(mount(&src), "");
    w.empty_dst();
    assert_eq!(mount(&part), "");
}

/// An empty directory is what is left of a SRC that is not mounted.
#[test]
pub(crate) fn a_src_that_is_not_mounted_any_more_is_told_from_another_one() {
    if !can_mount_on("ext4") {
        return;
    }
    let disk = crate::fixture::LoopFs::new("ext4");
    let point = crate::fixture::Scratch::new();
    let src = point.dir("old");
    rustix::mount::mount_bind(disk.path(), &src).unwrap();
    fs::write(src.join("a"), "content").unwrap();
    let fs_ = crate::fixture::LoopFs::new("ext4");
    let dst = fs_.dir("dst");
    let w = World::from(src.clone(), dst, vec![disk, fs_]);
    assert_eq!(w.mount_lazy().unmount(), 20);
    rustix::mount::unmount(&src, rustix::mount::UnmountFlags::DETACH).unwrap();
    let mount = run(mirrorfs().arg("mount").args([&w.src, &w.dst, &w.at]));
    expect_refusal(mount, 3, &["SRC", "old", "is it mounted?"]);
}

#[test]
fn signals_stop_a_mount_and_print_a_line() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::write(w.src.join("a"), "content").unwrap();
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut m = w.mount_lazy();
        let lines = m.log().lines().count();
        crate::raw::kill(m.pid, libc::SIGUSR1);
        crate::fixture::wait_until("a line", crate::fixture::LIMIT, || {
            m.log().lines().count() > lines
        });
        crate::raw::kill(m.pid, signal);
        assert_eq!(m.wait_exit(crate::fixture::LIMIT), Some(20));
        assert!(fuse_mount_at(&w.at).is_none());
    }
}
