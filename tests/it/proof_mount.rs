//! `mount --manifest`: what is pulled is hashed on its way, and `finish` reads from SRC only what was not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::badsource::world;
use crate::changing::{Look, at_each_look};
use crate::fixture::{
    LIMIT, Mounted, Output, World, bytes, can_mount_on, mirrorfs, run, wait_until,
};
use crate::proof;
use crate::raw;
use crate::upgrade::upgrade;

const LARGE: usize = (20 << 20) + 12_345;

/// Files of each kind that has a way of its own into DST; so old that their ctimes count.
fn filled() -> World {
    let w = World::on("ext4");
    fs::create_dir_all(w.src.join("d/e")).unwrap();
    for (n, len) in [1, 5000, 60_000, 65_537, 300_000, 1 << 20, 5_000_001]
        .into_iter()
        .enumerate()
    {
        fs::write(w.src.join(format!("d/f{n}")), bytes(n as u64, len)).unwrap();
        fs::write(w.src.join(format!("d/e/g{n}")), bytes(90 + n as u64, len)).unwrap();
    }
    fs::write(w.src.join("large"), bytes(7, LARGE)).unwrap();
    fs::hard_link(w.src.join("d/f4"), w.src.join("other name")).unwrap();
    let hole = File::create(w.src.join("hole")).unwrap();
    hole.set_len(7 << 20).unwrap();
    for at in [4096, (3 << 20) + 8192, 6 << 20] {
        hole.write_all_at(&bytes(at, 70_000), at).unwrap();
    }
    fs::write(w.src.join("empty"), b"").unwrap();
    std::os::unix::fs::symlink("empty", w.src.join("link")).unwrap();
    std::thread::sleep(Duration::from_millis(3100));
    w
}

fn manifest_of(w: &World) -> PathBuf {
    w.scratch_path("manifest")
}

fn mount(w: &World, args: &[&str]) -> Mounted {
    let manifest = manifest_of(w);
    let all = ["--manifest", manifest.to_str().unwrap()];
    w.mount_with(&[&all[..], args].concat(), &[])
}

/// The digest of each file that has one, by its path.
fn digests(w: &World) -> BTreeMap<String, String> {
    let text = fs::read_to_string(manifest_of(w)).unwrap_or_default();
    let of = |line: &str| {
        let digest = line.split("blake3digest=").nth(1)?.split(' ').next()?;
        let path = line.split(' ').next()?.replace("\\040", " ");
        Some((path, digest.to_owned()))
    };
    text.lines()
        .filter(|l| l.starts_with('.'))
        .filter_map(of)
        .collect()
}

/// Each digest is that of src's file; how many there are.
#[track_caller]
fn expect_digests_of_src(w: &World) -> usize {
    let digests = digests(w);
    for (path, digest) in &digests {
        let bytes = fs::read(w.src.join(path)).unwrap();
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digest, "{path}");
    }
    digests.len()
}

#[track_caller]
fn finish(m: &mut Mounted) -> Output {
    m.wait_complete();
    let said = run(mirrorfs().arg("finish").arg(&m.at));
    assert_eq!(m.wait_exit(LIMIT), Some(0), "{}{}", said.out, said.err);
    said
}

fn verify(w: &World, args: &[&str]) -> Output {
    proof::verify(&manifest_of(w), &w.dst, args)
}

/// The files, bytes and the rest of the line about the manifest that `finish` has printed.
#[track_caller]
fn read_again(said: &Output) -> &str {
    let line = said.out.lines().find(|l| l.starts_with("manifest: "));
    let line = line.unwrap_or_else(|| panic!("{}{}", said.out, said.err));
    line.split(", ")
        .nth(1)
        .unwrap()
        .split(" read in")
        .next()
        .unwrap()
}

#[test]
fn nothing_is_read_twice_of_what_the_background_has_pulled() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &[]);
    let said = finish(&mut m).expect_code(0);
    // The empty one is no work.
    assert_eq!(read_again(&said), "0 B of 1 files", "{}", said.out);
    assert_eq!(expect_digests_of_src(&w), 18);
    let text = fs::read_to_string(manifest_of(&w)).unwrap();
    assert!(
        text.lines().last().unwrap().starts_with("# end 22 entries"),
        "{text}"
    );
    assert!(text.contains("./link type=link "), "{text}");
    fs::remove_dir_all(&w.src).unwrap();
    let said = verify(&w, &[]).expect_code(0);
    assert_eq!(said.err, "");
}

#[test]
fn what_users_wait_for_is_hashed_too_and_what_comes_by_ranges_is_read_in_the_end() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &["--no-background"]);
    for name in ["d/f1", "d/f3", "d/f6", "hole"] {
        assert_eq!(
            fs::read(m.path(name)).unwrap(),
            fs::read(w.src.join(name)).unwrap()
        );
    }
    let large = File::options()
        .read(true)
        .write(true)
        .open(m.path("large"))
        .unwrap();
    let mut piece = [0; 4096];
    large.read_exact_at(&mut piece, 11 << 20).unwrap();
    large.write_all_at(b"theirs", 5 << 20).unwrap();
    drop(large);
    fs::write(m.path("d/f0"), b"theirs").unwrap();
    fs::remove_file(m.path("d/f2")).unwrap();
    fs::write(m.path("new"), b"new").unwrap();
    // What the daemon knows is in the file within seconds.
    wait_until("digests", LIMIT, || {
        let known = digests(&w);
        ["./d/f1", "./d/f3", "./d/f6", "./hole"]
            .iter()
            .all(|path| known.contains_key(*path))
    });
    assert!(!digests(&w).contains_key("./large"));
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    let said = finish(&mut m).expect_code(0);
    assert!(read_again(&said) != "0 B of 1 files", "{}", said.out);
    assert_eq!(expect_digests_of_src(&w), 18);
    fs::remove_dir_all(&w.src).unwrap();
    let said = verify(&w, &[]).expect_code(9);
    let told: BTreeSet<_> = said
        .out
        .lines()
        .filter_map(|l| Some(l.split_once('"')?.0.to_owned() + l.split('"').nth(1)?))
        .collect();
    let want = [
        "changed: .",
        "changed: d",
        "changed: d/f0",
        "changed: large",
        "missing: d/f2",
        "extra: new",
    ];
    assert_eq!(
        told,
        BTreeSet::from(want.map(str::to_owned)),
        "{}",
        said.out
    );
    verify(&w, &["--ignore-changed"]).expect_code(0);
}

#[test]
fn a_kill_and_another_program_cost_no_more_than_another_reading() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let m = mount(&w, &["--bwlimit=4M"]);
    wait_until("a digest", LIMIT, || !digests(&w).is_empty());
    m.kill();
    let before = digests(&w);
    assert!(before.len() < 18, "{before:?}");
    let mut m = mount(&w, &["--bwlimit=4M"]);
    wait_until("another digest", LIMIT, || digests(&w).len() > before.len());
    upgrade(&m);
    run(mirrorfs().arg("set").arg(&m.at).arg("--bwlimit=0")).expect_code(0);
    let said = finish(&mut m).expect_code(0);
    let text = fs::read_to_string(manifest_of(&w)).unwrap();
    assert!(
        text.lines().last().unwrap().starts_with("# end 22 entries"),
        "{text}"
    );
    assert_eq!(expect_digests_of_src(&w), 18, "{}", said.out);
    verify(&w, &[]).expect_code(0);
}

#[test]
pub(crate) fn without_src_the_manifest_has_no_end_and_the_tree_is_finished_all_the_same() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &[]);
    m.wait_complete();
    let away = w.src.with_file_name("away");
    fs::rename(&w.src, &away).unwrap();
    let said = finish(&mut m).expect_code(23);
    assert!(said.out.contains("is a plain tree"), "{}", said.out);
    let why = format!(
        "the manifest has no end: SRC \"{}\": open: No such file or directory",
        w.src.display()
    );
    assert!(said.err.contains(&why), "{}", said.err);
    fs::create_dir(&w.src).unwrap();
    assert!(
        !fs::read_to_string(manifest_of(&w))
            .unwrap()
            .contains("# end")
    );
    fs::remove_dir(&w.src).unwrap();
    fs::rename(&away, &w.src).unwrap();
    let mut take = mirrorfs();
    take.arg("manifest").arg(&w.src).arg(manifest_of(&w));
    let said = run(&mut take).expect_code(0);
    assert!(
        said.out.contains(", 0 B of 1 files read in"),
        "{}",
        said.out
    );
    verify(&w, &[]).expect_code(0);
}

#[test]
pub(crate) fn src_s_path_may_lead_elsewhere_after_a_migration() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &[]);
    m.wait_complete();
    fs::rename(&w.src, w.src.with_file_name("away")).unwrap();
    fs::create_dir(&w.src).unwrap();
    fs::write(w.src.join("other"), b"other").unwrap();
    let said = finish(&mut m).expect_code(23);
    let why = format!("SRC \"{}\" is another directory now", w.src.display());
    assert!(said.err.contains(&why), "{}", said.err);
    let text = fs::read_to_string(manifest_of(&w)).unwrap();
    assert!(
        !text.contains("other type") && !text.contains("# end"),
        "{text}"
    );
}

#[test]
fn over_src_s_own_path_and_by_itself_it_is_src_s_manifest() {
    if !can_mount_on("ext4") {
        return;
    }
    let mut w = filled();
    w.at = w.src.clone();
    let mut m = mount(&w, &["--finish"]);
    assert_eq!(m.wait_exit(LIMIT), Some(0), "{}", m.log());
    let log = m.log();
    assert!(
        log.contains("manifest: 21 entries, 0 B of 1 files read in"),
        "{log}"
    );
    assert_eq!(expect_digests_of_src(&w), 18);
    verify(&w, &[]).expect_code(0);
}

#[test]
fn an_earlier_sync_spares_the_reading_of_what_is_adopted() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut sync = mirrorfs();
    sync.arg("sync").arg("--manifest").arg(manifest_of(&w));
    run(sync.arg(&w.src).arg(&w.dst)).expect_code(0);
    fs::write(w.src.join("d/f3"), bytes(1, 77_000)).unwrap();
    std::thread::sleep(Duration::from_millis(3100));
    let mut m = mount(&w, &["--adopt"]);
    let said = finish(&mut m).expect_code(0);
    assert_eq!(read_again(&said), "0 B of 0 files", "{}", said.out);
    assert_eq!(expect_digests_of_src(&w), 18);
    verify(&w, &[]).expect_code(0);
}

#[test]
pub(crate) fn a_manifest_that_a_mount_cannot_write_is_refused() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let refused = |w: &World, path: &Path, words: &str| {
        let path = path.to_str().unwrap();
        let Err((code, said)) = w.try_mount(&["--manifest", path], &[]) else {
            panic!("{path} was taken");
        };
        assert_eq!(code, 3, "{said}");
        assert!(said.contains(words), "{said}");
    };
    refused(&w, &w.src.join("d/m"), "it must not be inside SRC");
    refused(&w, &w.dst.join("m"), "it must not be inside DST");
    refused(&w, &w.at.join("m"), "it must not be inside MOUNTPOINT");
    fs::write(manifest_of(&w), b"precious").unwrap();
    refused(&w, &manifest_of(&w), "it is not a manifest of mirrorfs");
    assert_eq!(fs::read(manifest_of(&w)).unwrap(), b"precious");
    fs::remove_file(manifest_of(&w)).unwrap();
    let mut m = mount(&w, &[]);
    let other = World::from(w.src.clone(), w.dst.with_file_name("other"), Vec::new());
    fs::create_dir(&other.dst).unwrap();
    refused(&other, &manifest_of(&w), "another run is writing it");
    finish(&mut m).expect_code(0);
}

#[test]
pub(crate) fn a_manifest_that_is_gone_at_an_upgrade_is_told_and_the_mount_goes_on() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &[]);
    m.wait_complete();
    fs::remove_file(manifest_of(&w)).unwrap();
    fs::write(manifest_of(&w), b"precious").unwrap();
    upgrade(&m);
    let log = m.log();
    assert!(
        log.contains("what is pulled from now on is read once more"),
        "{log}"
    );
    assert_eq!(fs::read(manifest_of(&w)).unwrap(), b"precious");
    fs::remove_file(manifest_of(&w)).unwrap();
    let said = finish(&mut m).expect_code(0);
    assert!(!read_again(&said).starts_with("0 B"), "{}", said.out);
    assert_eq!(expect_digests_of_src(&w), 18);
    verify(&w, &[]).expect_code(0);
}

/// A copy that was refused when it was to land was read and hashed all the same. Its line would have src's
/// size and times, and the bytes of the file that was there before.
#[test]
fn a_line_speaks_of_no_bytes_that_were_refused() {
    at_each_look(Look::First, |w, change| {
        let m = mount(w, &[]);
        change(&|| m.status()["state"] == "COMPLETE");
        m.wait_complete();
        assert_eq!(m.unmount(), 0);
        let text = fs::read_to_string(manifest_of(w)).unwrap();
        for line in text.lines().filter(|l| l.contains("blake3digest=")) {
            let bytes = fs::read(w.src.join(line.split(' ').next().unwrap())).unwrap();
            assert!(
                line.contains(blake3::hash(&bytes).to_hex().as_str()),
                "{text}"
            );
        }
        finish(&mut mount(w, &[])).expect_code(0);
        verify(w, &[]).expect_code(0);
        fs::remove_file(manifest_of(w)).unwrap();
    });
}

/// A file that somebody waits for, and that has more pieces than are kept for who hashes.
#[test]
fn what_does_not_fit_into_what_is_kept_has_the_right_digest_or_none() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = filled();
    let mut m = mount(&w, &["--no-background", "-o", "large=64M"]);
    let readers: Vec<_> = ["large", "hole", "d/f6", "d/e/g6", "d/f5", "d/e/g5"]
        .into_iter()
        .map(|name| {
            let (here, there) = (m.path(name), w.src.join(name));
            std::thread::spawn(move || fs::read(here).unwrap() == fs::read(there).unwrap())
        })
        .collect();
    for reader in readers {
        assert!(reader.join().unwrap());
    }
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    finish(&mut m).expect_code(0);
    assert_eq!(expect_digests_of_src(&w), 18);
    verify(&w, &[]).expect_code(0);
}

/// Reads are slow, and all of SRC has to be read: the tree was in DST already.
#[test]
fn what_is_read_in_the_end_is_shown_and_can_be_interrupted() {
    let Some((mut bad, w)) = world(|bad| bad.write("large", &bytes(1, 3 << 20))) else {
        return;
    };
    bad.start(&[]);
    run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(0);
    let m = mount(&w, &["--adopt"]);
    m.wait_complete();
    bad.tell("add path=large op=read delay=3");
    let mut command = mirrorfs();
    command.arg("finish").arg(&m.at);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut finish = raw::die_with_parent(&mut command).spawn().unwrap();
    let mut lines = BufReader::new(finish.stderr.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(
        line.starts_with("manifest: ") && line.ends_with(" of ~3.0 MiB read"),
        "{line}"
    );
    let pid = rustix::process::Pid::from_child(&finish);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    bad.tell("off");
    let code = finish.wait().unwrap().code();
    let said: Vec<_> = lines.map(Result::unwrap).collect();
    assert_eq!(code, Some(20), "{said:?}");
    let said = said.join("\n");
    assert!(
        said.contains("the manifest has no end: interrupted"),
        "{said}"
    );
    assert_eq!(fs::read(w.dst.join("large")).unwrap(), bytes(1, 3 << 20));
    let mut take = mirrorfs();
    take.arg("manifest").arg(&w.src).arg(manifest_of(&w));
    run(&mut take).expect_code(0);
    verify(&w, &[]).expect_code(0);
}

/// The same by a daemon that finishes by itself: `status` tells.
#[test]
fn status_tells_how_far_the_daemon_is_with_reading_for_the_manifest() {
    let Some((mut bad, w)) = world(|bad| bad.write("large", &bytes(1, 3 << 20))) else {
        return;
    };
    bad.start(&[]);
    run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(0);
    bad.tell("add path=large op=read off=2097152-3145728 delay=3");
    let mut m = mount(&w, &["--adopt", "--finish"]);
    let mut before = None;
    wait_until("some of it is read", LIMIT, || {
        let out = run(mirrorfs().arg("status").arg(&m.at).arg("--json")).out;
        let status: serde_json::Value = serde_json::from_str(&out).unwrap();
        let Some(read) = status["manifest_read"].as_u64() else {
            return false;
        };
        assert_eq!(status["state"], "FINISHED");
        assert!(before.replace(read) <= Some(read));
        read > 0 && status["manifest_found"] == 3 << 20
    });
    let page = run(mirrorfs().arg("status").arg(&m.at)).expect_code(0).out;
    assert!(page.contains(" of ~3.0 MiB read\n"), "{page}");
    assert!(page.contains("none; reads SRC for the manifest"), "{page}");
    bad.tell("off");
    assert_eq!(m.wait_exit(LIMIT), Some(0), "{}", m.log());
    verify(&w, &[]).expect_code(0);
}
