//! `sync --manifest` and `verify --manifest`: what DST is, against what SRC was, without SRC.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::fixture::{
    LIMIT, LoopFs, Output, Scratch, World, bytes, can_mount_on, mirrorfs, run, shell_as, wait_until,
};
use crate::nasty;

/// `verify --manifest`, of a tree without SRC.
pub(crate) fn verify(manifest: &Path, dst: &Path, args: &[&str]) -> Output {
    let mut command = mirrorfs();
    command.arg("verify").arg("--manifest").arg(manifest);
    run(command.arg(dst).args(args))
}

struct Trees {
    scratch: Scratch,
    src: PathBuf,
    dst: PathBuf,
    manifest: PathBuf,
}

impl Trees {
    fn new() -> Trees {
        let scratch = Scratch::new();
        let (src, dst) = (scratch.dir("src"), scratch.path().join("dst"));
        let manifest = scratch.path().join("manifest");
        Trees {
            scratch,
            src,
            dst,
            manifest,
        }
    }

    /// Files of every size that has a way of its own, a directory, links.
    fn filled() -> Trees {
        let t = Trees::new();
        fs::create_dir(t.src.join("d")).unwrap();
        fs::write(t.src.join("empty"), b"").unwrap();
        for (n, len) in [1, 5000, 200_000, 300_000, 1 << 20, 5_000_001]
            .into_iter()
            .enumerate()
        {
            fs::write(t.src.join(format!("d/f{n}")), bytes(n as u64, len)).unwrap();
        }
        fs::hard_link(t.src.join("d/f1"), t.src.join("other name")).unwrap();
        symlink("d/f0", t.src.join("link")).unwrap();
        let hole = File::create(t.src.join("hole")).unwrap();
        hole.set_len(9 << 20).unwrap();
        hole.write_all_at(&bytes(9, 70_000), (3 << 20) + 4096)
            .unwrap();
        t
    }

    fn sync(&self, args: &[&str]) -> Output {
        run(self.syncs().args(args))
    }

    fn syncs(&self) -> Command {
        let mut command = mirrorfs();
        command.arg("sync").arg("--manifest").arg(&self.manifest);
        command.arg(&self.src).arg(&self.dst);
        command
    }

    fn verify(&self, args: &[&str]) -> Output {
        verify(&self.manifest, &self.dst, args)
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.manifest).unwrap()
    }

    /// The digest of each file that has one, by the path as it is written.
    fn digests(&self) -> BTreeMap<String, String> {
        let text = self.text();
        let lines = text.lines().filter(|l| l.starts_with('.'));
        let of = |line: &str| {
            let digest = line.split("blake3digest=").nth(1)?.split(' ').next()?;
            Some((line.split(' ').next()?.to_owned(), digest.to_owned()))
        };
        lines.filter_map(of).collect()
    }

    /// Each of them is what BLAKE3 says of src's file, and every file has one.
    #[track_caller]
    fn expect_digests_of_src(&self) {
        let digests = self.digests();
        let mut files = 0;
        for (path, digest) in &digests {
            let bytes = fs::read(self.src.join(unescaped(path))).unwrap();
            assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digest, "{path}");
        }
        let mut dirs = vec![self.src.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let kind = entry.file_type().unwrap();
                files += usize::from(kind.is_file());
                dirs.extend(kind.is_dir().then(|| entry.path()));
            }
        }
        assert_eq!(digests.len(), files, "{}", self.text());
    }
}

fn unescaped(path: &str) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = path.as_bytes();
    while let Some(b) = rest.first() {
        match b {
            b'\\' => {
                let octal = std::str::from_utf8(&rest[1..4]).unwrap();
                out.push(u8::from_str_radix(octal, 8).unwrap());
                rest = &rest[4..];
            }
            b => {
                out.push(*b);
                rest = &rest[1..];
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&out))
}

/// Other bytes, size and mtime as they were.
fn corrupt(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let was = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.set_modified(was).unwrap();
}

/// Every file of a directory, so old that no change can have the ctime that it has now.
fn let_settle() {
    std::thread::sleep(Duration::from_millis(3100));
}

#[test]
pub(crate) fn a_copy_is_verified_without_src_and_what_was_done_to_it_is_told_apart() {
    let t = Trees::filled();
    t.sync(&[]).expect_code(0);
    t.expect_digests_of_src();
    fs::remove_dir_all(&t.src).unwrap();
    let said = t.verify(&[]).expect_code(0);
    assert!(
        said.out
            .contains("0 corrupt, 0 changed since, 0 missing, 0 extra"),
        "{}",
        said.out
    );

    corrupt(&t.dst.join("d/f1"), 4999);
    corrupt(&t.dst.join("d/f5"), 3_000_000);
    corrupt(&t.dst.join("hole"), 8 << 20);
    File::options()
        .append(true)
        .open(t.dst.join("d/f2"))
        .unwrap()
        .write_all(b"x")
        .unwrap();
    fs::write(t.dst.join("d/f3"), bytes(77, 300_000)).unwrap();
    fs::set_permissions(t.dst.join("empty"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(t.dst.join("d/f4")).unwrap();
    fs::write(t.dst.join("new"), b"").unwrap();
    fs::create_dir(t.dst.join("newdir")).unwrap();
    fs::write(t.dst.join("newdir/below"), b"").unwrap();
    fs::remove_file(t.dst.join("link")).unwrap();
    symlink("elsewhere", t.dst.join("link")).unwrap();
    let list = t.scratch.path().join("list");
    let said = t
        .verify(&["--combined", list.to_str().unwrap()])
        .expect_code(9);
    let told: BTreeSet<_> = said
        .out
        .lines()
        .filter_map(|l| l.split_once("\": ").or(Some((l, ""))))
        .map(|(l, _)| l.trim_end_matches('"').to_owned())
        .filter(|l| !l.starts_with("verified"))
        .collect();
    let want = [
        "changed: \".",
        "changed: \"d",
        "changed: \"d/f2",
        "changed: \"d/f3",
        "changed: \"empty",
        "changed: \"link",
        "corrupt: \"d/f1",
        "corrupt: \"d/f5",
        "corrupt: \"hole",
        "corrupt: \"other name",
        "extra: \"new",
        "extra: \"newdir",
        "missing: \"d/f4",
    ];
    assert_eq!(
        told,
        BTreeSet::from(want.map(str::to_owned)),
        "{}",
        said.out
    );
    assert!(
        said.out
            .contains("4 corrupt, 6 changed since, 1 missing, 2 extra"),
        "{}",
        said.out
    );
    let list = fs::read_to_string(list).unwrap();
    let lines: BTreeSet<_> = list.lines().collect();
    let want = [
        "* .",
        "* d",
        "= d/f0",
        "X d/f1",
        "* d/f2",
        "* d/f3",
        "+ d/f4",
        "X d/f5",
        "* empty",
        "X hole",
        "* link",
        "- new",
        "- newdir",
        "X other name",
    ];
    assert_eq!(lines, BTreeSet::from(want));
    // What users do is no difference; what nobody did is.
    let said = t.verify(&["--ignore-changed"]).expect_code(9);
    assert_eq!(said.out.lines().count(), 5, "{}", said.out);
    for name in ["d/f1", "d/f5", "hole"] {
        fs::remove_file(t.dst.join(name)).unwrap();
    }
    fs::remove_file(t.dst.join("other name")).unwrap();
    t.verify(&["--ignore-changed"]).expect_code(0);
    t.verify(&[]).expect_code(9);
}

#[test]
fn a_directory_that_is_gone_is_told_once_and_another_type_is_changed() {
    let t = Trees::new();
    fs::create_dir_all(t.src.join("a/b/c")).unwrap();
    fs::create_dir_all(t.src.join("e/f")).unwrap();
    for n in 0..50 {
        fs::write(t.src.join(format!("a/b/{n}")), b"x").unwrap();
    }
    fs::write(t.src.join("file"), b"x").unwrap();
    t.sync(&[]).expect_code(0);
    fs::remove_dir_all(t.dst.join("a/b")).unwrap();
    fs::remove_dir_all(t.dst.join("e")).unwrap();
    fs::write(t.dst.join("e"), b"now a file").unwrap();
    fs::remove_file(t.dst.join("file")).unwrap();
    fs::create_dir(t.dst.join("file")).unwrap();
    let said = t.verify(&["--combined", "-"]).expect_code(9);
    let lines: BTreeSet<_> = said.out.lines().collect();
    assert_eq!(
        lines,
        BTreeSet::from(["* .", "* a", "+ a/b", "* e", "* file"])
    );
}

#[test]
fn every_name_and_kind_of_entry_is_in_it() {
    let t = Trees::new();
    let at = nasty::At::open(&t.src);
    let names: [&[u8]; 8] = [
        b"new\nline",
        b"sp ace",
        b"\xff\xfe",
        b"#hash",
        b"a=b",
        b"back\\slash\\101",
        b"*?[",
        b"-",
    ];
    for name in names {
        at.file(name, name);
        let dir = [b"dir ", name].concat();
        at.dir(&dir).file(name, b"below");
        at.symlink(name, [b"link ", name].concat());
        at.stamp(name, -5, 500_000_000);
    }
    if rustix::process::geteuid().is_root() {
        use rustix::fs::FileType;
        at.node("fifo", FileType::Fifo, 0);
        at.node("socket", FileType::Socket, 0);
        at.node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        at.node("loop", FileType::BlockDevice, rustix::fs::makedev(7, 0));
        at.chmod("null", 0o4711);
        at.chown("fifo", 12, 13);
    }
    t.sync(&[]).expect_code(0);
    t.expect_digests_of_src();
    assert!(t.text().is_ascii());
    let said = t.verify(&[]).expect_code(0);
    let entries = t.text().lines().filter(|l| l.starts_with('.')).count();
    // The root is not counted.
    let counted = format!("verified {} entries", entries - 1);
    assert!(said.out.starts_with(&counted), "{counted}: {}", said.out);
    if rustix::process::geteuid().is_root() {
        fs::remove_file(t.dst.join("null")).unwrap();
        let dst = nasty::At::open(&t.dst);
        dst.node(
            "null",
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::makedev(1, 5),
        );
        let said = t.verify(&[]).expect_code(9);
        assert!(said.out.contains("changed: \"null\""), "{}", said.out);
        assert!(said.out.contains("device 1:5, was 1:3"), "{}", said.out);
    }
}

#[test]
fn names_of_one_inode_that_are_two_now_are_told() {
    let t = Trees::filled();
    t.sync(&[]).expect_code(0);
    let (name, other) = (t.dst.join("other name"), t.dst.join("d/f1"));
    fs::remove_file(&name).unwrap();
    run(Command::new("cp").arg("-p").arg(&other).arg(&name)).expect_code(0);
    let root = fs::metadata(&t.src).unwrap().modified().unwrap();
    File::open(&t.dst).unwrap().set_modified(root).unwrap();
    let said = t.verify(&[]).expect_code(9);
    assert!(
        said.out.contains("other names are one inode"),
        "{}",
        said.out
    );
    assert!(
        said.out.contains("0 corrupt, 1 changed since"),
        "{}",
        said.out
    );
}

/// Bytes that a command has read by system calls, its own start included.
fn bytes_read(command: &Command) -> u64 {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words: Vec<_> = words.collect();
    let mut shell = Command::new("sh");
    // The shell's own counter has what its children read.
    shell
        .arg("-c")
        .arg("\"$@\" || exit; cat /proc/$$/io")
        .arg("sh")
        .args(words);
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            shell.env(key, value);
        }
    }
    let said = run(&mut shell).expect_code(0);
    let line = said.out.lines().find(|l| l.starts_with("rchar:"));
    line.unwrap().split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn what_is_equal_is_read_from_src_once_and_never_again() {
    let t = Trees::new();
    const LEN: u64 = 24 << 20;
    fs::write(t.src.join("large"), bytes(1, LEN as usize)).unwrap();
    fs::write(t.src.join("small"), bytes(2, 5000)).unwrap();
    run(mirrorfs().arg("sync").arg(&t.src).arg(&t.dst)).expect_code(0);
    let_settle();
    let first = bytes_read(&t.syncs());
    assert!(first >= LEN, "{first}");
    t.expect_digests_of_src();
    let second = bytes_read(&t.syncs());
    assert!(second < LEN, "{second}");
    t.expect_digests_of_src();
    t.verify(&[]).expect_code(0);
    // A change that leaves size and mtime as they were is one of the ctime, and read.
    corrupt(&t.src.join("large"), 5);
    let third = bytes_read(&t.syncs());
    assert!(third >= LEN, "{third}");
    t.expect_digests_of_src();
    // So the manifest is of src, and dst is not.
    let said = t.verify(&[]).expect_code(9);
    assert!(said.out.contains("corrupt: \"large\""), "{}", said.out);
    t.sync(&["--checksum"]).expect_code(0);
    t.expect_digests_of_src();
    t.verify(&[]).expect_code(0);
}

fn line_of_young(t: &Trees) -> String {
    let text = t.text();
    let line = text.lines().find(|l| l.starts_with("./young"));
    line.unwrap().to_owned()
}

#[test]
fn a_digest_of_a_file_that_changed_a_moment_ago_is_not_used_again() {
    let t = Trees::new();
    fs::write(t.src.join("young"), b"young").unwrap();
    // Times of the future: whatever they say, the clock has not passed them.
    t.sync(&[]).expect_code(0);
    let line = line_of_young(&t);
    assert!(!line.contains(" ctime="), "{line}");
    let_settle();
    t.sync(&[]).expect_code(0);
    let line = line_of_young(&t);
    assert!(line.contains(" ctime="), "{line}");
}

#[test]
fn whatever_way_the_bytes_take_the_digest_is_src_s() {
    for args in [
        &["--cache=direct", "-j4"][..],
        &["--cache=drop", "-j4"],
        &["--reflink=never", "-j1"],
        &["--checksum"],
        &["--ignore-times"],
        &["--fsync=file"],
    ] {
        let t = Trees::filled();
        fs::write(t.src.join("larger"), bytes(30, (40 << 20) + 12345)).unwrap();
        t.sync(args).expect_code(0);
        t.expect_digests_of_src();
        t.verify(&[]).expect_code(0);
        // And when dst has it all.
        t.sync(args).expect_code(0);
        t.expect_digests_of_src();
        t.verify(&[]).expect_code(0);
    }
}

#[test]
fn of_shared_extents_too() {
    for kind in ["xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let fs = LoopFs::new(kind);
        let mut t = Trees::filled();
        let src = fs.dir("src");
        run(Command::new("cp").arg("-a").arg(t.src.join(".")).arg(&src)).expect_code(0);
        (t.src, t.dst) = (src, fs.path().join("dst"));
        let said = t.sync(&["--reflink=always", "--stats"]).expect_code(0);
        assert!(said.out.contains("made"), "{}", said.out);
        t.expect_digests_of_src();
        t.verify(&[]).expect_code(0);
        corrupt(&t.dst.join("d/f5"), 1 << 20);
        let said = t.verify(&[]).expect_code(9);
        assert!(said.out.contains("1 corrupt, 0 changed"), "{}", said.out);
    }
}

#[test]
pub(crate) fn a_run_that_was_killed_leaves_what_it_knew_and_the_next_one_ends_it() {
    let t = Trees::new();
    const LEN: u64 = 8 << 20;
    fs::create_dir(t.src.join("a")).unwrap();
    for n in 0..8 {
        fs::write(t.src.join(format!("a/f{n}")), bytes(n, LEN as usize / 8)).unwrap();
    }
    fs::write(t.src.join("z"), bytes(99, LEN as usize)).unwrap();
    let_settle();
    let mut child = t.syncs().args(["--bwlimit=3M", "-j1"]).spawn().unwrap();
    wait_until("a digest", LIMIT, || {
        t.manifest.exists() && !t.digests().is_empty()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let known = t.digests();
    assert!(known.len() < 9, "{known:?}");
    let said = t.verify(&[]);
    assert!(said.err.contains("did not end"), "{}{}", said.out, said.err);
    assert_eq!(said.code(), 9, "what is not in it is extra: {}", said.out);
    // As a kill in the middle of a line leaves it.
    let torn = File::options().append(true).open(&t.manifest).unwrap();
    (&torn).write_all(b"./a/f0 type=file mode=06").unwrap();
    let read = bytes_read(&t.syncs());
    let size = |path: &String| fs::metadata(t.src.join(path)).unwrap().len();
    let spared: u64 = known.keys().map(size).sum();
    // Once for what is copied, and never for what was.
    let all = 2 * LEN - spared;
    assert!(
        (all..all + spared / 2).contains(&read),
        "{read}, {all}, {spared}"
    );
    t.expect_digests_of_src();
    let said = t.verify(&[]).expect_code(0);
    assert!(!said.err.contains("did not end"), "{}", said.err);
}

#[test]
fn a_stop_by_a_signal_is_not_the_end_of_a_manifest() {
    let t = Trees::new();
    for n in 0..6 {
        fs::write(t.src.join(format!("f{n}")), bytes(n, 1 << 20)).unwrap();
    }
    let mut child = t.syncs().args(["--bwlimit=2M", "-j1"]).spawn().unwrap();
    wait_until("a copy", LIMIT, || {
        t.manifest.exists() && !t.digests().is_empty()
    });
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::INT,
    )
    .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(20));
    assert!(!t.text().contains("# end"), "{}", t.text());
    t.sync(&[]).expect_code(0);
    assert_eq!(t.text().matches("# end").count(), 1, "{}", t.text());
    t.verify(&[]).expect_code(0);
}

#[test]
pub(crate) fn what_changes_while_it_is_copied_has_no_digest() {
    let t = Trees::new();
    let large = t.src.join("large");
    fs::write(&large, bytes(1, 4 << 20)).unwrap();
    fs::write(t.src.join("other"), b"other").unwrap();
    let mut child = t.syncs().args(["--bwlimit=1M", "-j1"]).spawn().unwrap();
    wait_until("some of it", LIMIT, || {
        fs::metadata(t.dst.join("large")).is_ok_and(|m| m.blocks() > 0)
    });
    File::options()
        .append(true)
        .open(&large)
        .unwrap()
        .write_all(b"x")
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(24));
    let text = t.text();
    assert!(text.lines().any(|l| l == "./large type=file"), "{text}");
    let said = t.verify(&[]).expect_code(23);
    assert!(said.out.contains("unproven: \"large\""), "{}", said.out);
    assert!(said.out.contains("1 without a digest"), "{}", said.out);
    t.sync(&[]).expect_code(0);
    t.expect_digests_of_src();
    t.verify(&[]).expect_code(0);
}

#[test]
fn what_was_left_alone_in_dst_is_not_said_to_be_src_s() {
    for arg in ["--update", "--ignore-existing"] {
        let t = Trees::filled();
        fs::create_dir_all(t.dst.join("d")).unwrap();
        fs::write(t.dst.join("d/f2"), b"theirs").unwrap();
        let future = SystemTime::now() + Duration::from_secs(3600);
        File::options()
            .write(true)
            .open(t.dst.join("d/f2"))
            .unwrap()
            .set_modified(future)
            .unwrap();
        t.sync(&[arg]).expect_code(0);
        assert!(!t.digests().contains_key("./d/f2"), "{}", t.text());
        let said = t.verify(&[]).expect_code(23);
        assert!(said.out.contains("unproven: \"d/f2\""), "{}", said.out);
    }
}

#[test]
pub(crate) fn what_failed_leaves_a_manifest_without_an_end() {
    let t = Trees::filled();
    t.sync(&[]).expect_code(0);
    // A file that cannot take the place of a directory which is not empty.
    fs::remove_file(t.src.join("empty")).unwrap();
    fs::remove_file(t.dst.join("empty")).unwrap();
    fs::create_dir(t.dst.join("empty")).unwrap();
    fs::write(t.dst.join("empty/below"), b"").unwrap();
    fs::write(t.src.join("empty"), b"").unwrap();
    t.sync(&[]).expect_code(23);
    let said = t.verify(&[]).expect_code(9);
    assert!(
        said.err.contains("did not end, or some entries failed"),
        "{}",
        said.err
    );
    t.sync(&["--delete"]).expect_code(0);
    t.verify(&[]).expect_code(0);
}

#[test]
fn with_deletions_and_filters_it_holds_what_the_run_saw() {
    let t = Trees::filled();
    t.sync(&[]).expect_code(0);
    fs::remove_file(t.src.join("d/f0")).unwrap();
    fs::write(t.src.join("left out"), b"").unwrap();
    t.sync(&["--delete", "--exclude=left*"]).expect_code(0);
    let text = t.text();
    assert!(!text.contains("./d/f0 "), "{text}");
    assert!(!text.contains("./left"), "{text}");
    t.verify(&[]).expect_code(0);
}

#[test]
fn samples_find_each_corrupt_file_in_exactly_one_of_n_runs() {
    let t = Trees::new();
    const FILES: usize = 60;
    for n in 0..FILES {
        fs::write(t.src.join(format!("f{n}")), format!("bytes {n}")).unwrap();
    }
    t.sync(&[]).expect_code(0);
    for n in 0..FILES {
        corrupt(&t.dst.join(format!("f{n}")), 0);
    }
    let mut all = Vec::new();
    for number in 1..=4 {
        let said = t
            .verify(&["--sample", &format!("{number}/4")])
            .expect_code(9);
        let found = said.out.lines().filter(|l| l.starts_with("corrupt: "));
        let found: Vec<_> = found
            .map(|l| l.split('"').nth(1).unwrap().to_owned())
            .collect();
        assert!((1..FILES).contains(&found.len()), "{found:?}");
        all.extend(found);
    }
    assert_eq!(
        (all.len(), all.iter().collect::<BTreeSet<_>>().len()),
        (FILES, FILES)
    );
}

#[test]
pub(crate) fn a_manifest_that_cannot_be_used_is_refused_in_one_line() {
    let t = Trees::filled();
    let refused = |said: Output, words: &str| {
        let said = said.expect_code(3);
        assert_eq!(said.err.lines().count(), 1, "{}", said.err);
        assert!(said.err.contains(words), "{words}: {}", said.err);
    };
    let mut inside = Trees::filled();
    inside.manifest = inside.src.join("manifest");
    refused(inside.sync(&[]), "it must not be inside SRC");
    fs::create_dir_all(inside.dst.join("d")).unwrap();
    inside.manifest = inside.dst.join("d/manifest");
    refused(inside.sync(&[]), "it must not be inside DST");
    assert!(!inside.manifest.exists());

    fs::write(&t.manifest, b"precious").unwrap();
    refused(t.sync(&[]), "it is not a manifest of mirrorfs");
    assert_eq!(fs::read(&t.manifest).unwrap(), b"precious");
    assert!(!t.dst.exists());
    fs::remove_file(&t.manifest).unwrap();
    refused(t.verify(&[]), "DST");
    t.sync(&[]).expect_code(0);
    let good = t.text();
    let changed = good.replacen("type=file", "type=fine", 1);
    let line = 1 + changed
        .lines()
        .position(|l| l.contains("type=fine"))
        .unwrap();
    fs::write(&t.manifest, &changed).unwrap();
    refused(
        t.verify(&[]),
        &format!("manifest\": line {line}: \"type\": no such value: \"fine\""),
    );
    fs::write(&t.manifest, good.replacen("mode=0644", "mode=0640", 1)).unwrap();
    refused(
        t.verify(&[]),
        "the lines before it were changed since they were written",
    );
    fs::remove_file(&t.manifest).unwrap();
    refused(t.verify(&[]), "manifest\": open: ");
    for args in [
        &["sync", "--manifest", "m", "-n", "a", "b"][..],
        &["sync", "--manifest", "m", "--shard=1/2", "a", "b"],
        &["sync", "--manifest", "m", "--files-from=l", "a", "b"],
        &["verify", "--manifest", "m", "a", "b"],
        &["verify", "--ignore-changed", "a", "b"],
        &["verify", "--json", "--combined", "-", "a", "b"],
        &["verify", "a"],
    ] {
        run(mirrorfs().args(args)).expect_code(2);
    }
}

#[test]
pub(crate) fn a_full_disk_under_the_manifest_is_an_error_of_the_run() {
    if !can_mount_on("ext4") {
        return;
    }
    let fs = LoopFs::with("ext4", 4 << 20, &["-O", "^has_journal"], "loop");
    let mut t = Trees::new();
    for n in 0..3000 {
        File::create(t.src.join(format!("{n:0200}"))).unwrap();
    }
    t.manifest = fs.path().join("manifest");
    let filler = fs.path().join("filler");
    run(Command::new("sh").arg("-c").arg(format!(
        "head -c 100M /dev/zero >{} || truncate -s -200K {0}",
        filler.display()
    )));
    let said = t.sync(&[]).expect_code(1);
    assert!(said.err.contains("manifest"), "{}", said.err);
    assert!(said.err.contains("No space left"), "{}", said.err);
    fs::remove_file(filler).unwrap();
    t.sync(&[]).expect_code(0);
    t.verify(&[]).expect_code(0);
}

fn take(src: &Path, file: &Path) -> Command {
    let mut command = mirrorfs();
    command.arg("manifest").arg(src).arg(file);
    command
}

#[test]
fn a_manifest_of_a_tree_is_that_of_its_sync() {
    let t = Trees::filled();
    let at = nasty::At::open(&t.src);
    at.file(b"new\nline \xff", b"odd");
    at.stamp(b"new\nline \xff", -5, 500_000_000);
    let_settle();
    t.sync(&[]).expect_code(0);
    let lines = |text: &str| {
        let lines = text.lines().filter(|l| l.starts_with('.'));
        lines.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let synced = lines(&t.text());
    let other = t.scratch.path().join("other");
    run(&mut take(&t.src, &other)).expect_code(0);
    let taken = fs::read_to_string(&other).unwrap();
    assert_eq!(lines(&taken), synced);
    assert!(
        taken.lines().last().unwrap().starts_with("# end "),
        "{taken}"
    );
    // Of either the other one goes on without reading the files again.
    let all = bytes_read(&take(&t.src, &t.scratch.path().join("third")));
    let again = bytes_read(&take(&t.src, &t.manifest));
    assert!(again + (4 << 20) < all, "{again} {all}");
    assert_eq!(lines(&t.text()), synced);
    assert!(bytes_read(&t.syncs()) + (4 << 20) < all);
    assert_eq!(lines(&t.text()), synced);
    t.verify(&[]).expect_code(0);
}

#[test]
fn what_a_mount_has_brought_is_verified_without_src() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::create_dir(w.src.join("d")).unwrap();
    for n in 0..20 {
        let len = [10, 70_000, 9 << 20][n % 3];
        fs::write(w.src.join(format!("d/f{n}")), bytes(n as u64, len)).unwrap();
    }
    fs::hard_link(w.src.join("d/f1"), w.src.join("again")).unwrap();
    let scratch = Scratch::new();
    let manifest = scratch.path().join("manifest");
    let m = w.mount();
    // Users work while it is taken: SRC is what they began with.
    fs::write(m.path("d/f3"), b"theirs").unwrap();
    run(&mut take(&w.src, &manifest)).expect_code(0);
    let large = File::options().write(true).open(m.path("d/f2")).unwrap();
    large.write_all_at(b"theirs", 5 << 20).unwrap();
    drop(large);
    fs::write(m.path("new"), b"new").unwrap();
    fs::remove_file(m.path("d/f4")).unwrap();
    let verify = |at: &Path, args: &[&str]| {
        let mut command = mirrorfs();
        command.args(["verify", "--manifest"]).arg(&manifest);
        run(command.arg(at).args(args))
    };
    m.wait_complete();
    let expect = |said: Output| {
        let said = said.expect_code(9);
        let told: BTreeSet<_> = said
            .out
            .lines()
            .filter_map(|l| {
                l.split_once("\"")
                    .map(|(kind, rest)| format!("{kind}{}", rest.split('"').next().unwrap()))
            })
            .collect();
        let want = [
            "changed: .",
            "changed: d",
            "changed: d/f2",
            "changed: d/f3",
            "missing: d/f4",
            "extra: new",
        ];
        assert_eq!(
            told,
            BTreeSet::from(want.map(str::to_owned)),
            "{}",
            said.out
        );
    };
    expect(verify(&m.path("."), &[]));
    m.finish();
    fs::remove_dir_all(&w.src).unwrap();
    expect(verify(&w.dst, &[]));
    verify(&w.dst, &["--ignore-changed"]).expect_code(0);
    corrupt(&w.dst.join("d/f5"), 8 << 20);
    let said = verify(&w.dst, &["--ignore-changed"]).expect_code(9);
    assert!(said.out.starts_with("corrupt: \"d/f5\""), "{}", said.out);
}

#[test]
pub(crate) fn what_is_pending_is_in_no_manifest_and_is_not_called_corrupt() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    let scratch = Scratch::new();
    for n in 0..3 {
        fs::write(w.src.join(format!("f{n}")), bytes(n, 5000)).unwrap();
    }
    let manifest = scratch.path().join("manifest");
    run(&mut take(&w.src, &manifest)).expect_code(0);
    let m = w.mount_lazy();
    fs::read_dir(m.path(".")).unwrap().count();
    assert_eq!(fs::read(m.path("f0")).unwrap(), bytes(0, 5000));
    m.unmount();
    // The raw tree: names without bytes.
    let said = run(&mut take(&w.dst, &scratch.path().join("other"))).expect_code(3);
    assert!(said.err.contains("live mark"), "{}", said.err);
    let mut verify = mirrorfs();
    verify
        .args(["verify", "--manifest"])
        .arg(&manifest)
        .arg(&w.dst);
    let said = run(&mut verify).expect_code(9);
    assert!(
        said.out.contains("not finished: \"f1\": it is pending"),
        "{}",
        said.out
    );
    assert!(said.out.contains(": 0 corrupt"), "{}", said.out);
}

#[test]
pub(crate) fn what_cannot_be_read_or_changes_is_not_in_a_manifest() {
    let t = Trees::filled();
    let refused = run(&mut take(&t.src, &t.src.join("d/manifest"))).expect_code(3);
    assert!(
        refused.err.contains("it must not be inside SRC"),
        "{}",
        refused.err
    );
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for path in [t.scratch.path(), &t.src, &t.src.join("d")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(t.src.join("d/f0"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(t.scratch.dir("theirs"), fs::Permissions::from_mode(0o777)).unwrap();
    let program = t.scratch.path().join("mirrorfs");
    fs::copy(mirrorfs().get_program(), &program).unwrap();
    let script = "./mirrorfs manifest src theirs/manifest";
    let said = shell_as(65534, 65534, t.scratch.path(), script).expect_code(23);
    assert!(said.err.contains("unreadable: \"d/f0\""), "{}", said.err);
    let text = fs::read_to_string(t.scratch.path().join("theirs/manifest")).unwrap();
    assert!(
        !text.contains("# end") && !text.contains("./d/f0"),
        "{text}"
    );
    // Owners that a user's copy cannot have.
    assert!(!text.contains("uid="), "{text}");
}

#[test]
fn a_hole_that_nobody_could_hash_has_no_digest_and_keeps_nobody() {
    if !can_mount_on("ext4") {
        return;
    }
    let fs = LoopFs::new("ext4");
    let mut t = Trees::filled();
    (t.src, t.dst) = (fs.dir("src"), fs.path().join("dst"));
    let hole = File::create(t.src.join("hole")).unwrap();
    hole.set_len(6 << 40).unwrap();
    hole.write_all_at(b"x", 3 << 40).unwrap();
    fs::write(t.src.join("other"), b"other").unwrap();
    let expect = || {
        assert_eq!(t.digests().keys().collect::<Vec<_>>(), ["./other"]);
        let said = t.verify(&[]).expect_code(23);
        assert!(said.out.contains("unproven: \"hole\""), "{}", said.out);
    };
    for args in [&[][..], &[], &["--checksum"], &["--ignore-times"]] {
        t.sync(args).expect_code(0);
        expect();
    }
    run(&mut take(&t.src, &t.manifest)).expect_code(0);
    expect();
}
