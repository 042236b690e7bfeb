//! `sync` beside the real rsync: the same options on the same trees give the same itemized lines, the
//! same tree and the same kind of exit code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::compare::{self, Ignore, manifest};
use crate::fixture::{Random, Scratch, find_program, mirrorfs, need, run};

/// What `sync` always does, in rsync's words. Without -r, for `--files-from`.
const ALWAYS: &[&str] = &["-lptgoDHAXS", "--numeric-ids"];

fn can_compare() -> bool {
    need(rustix::process::geteuid().is_root(), "root")
        && need(find_program("rsync").is_some(), "rsync")
}

/// Runs a script in a new directory.
fn build(at: &Path, script: &str) {
    fs::create_dir_all(at).unwrap();
    let script = format!("set -e\n{script}");
    run(Command::new("sh").args(["-c", &script]).current_dir(at)).expect_code(0);
}

fn copy(from: &Path, to: &Path) {
    if from.exists() {
        run(Command::new("cp").arg("-a").arg(from).arg(to)).expect_code(0);
    }
}

/// The lines, sorted. Which of several links is copied and which are linked to it is a matter of
/// order: all lines of such a group say the same names.
fn lines(out: &str) -> Vec<String> {
    let is_item = |l: &&str| {
        l.len() > 12 && l.as_bytes()[11] == b' ' && (l.starts_with('*') || !l.starts_with("cannot"))
    };
    let items: Vec<&str> = out.lines().filter(is_item).collect();
    let mut groups: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (name, to) in items.iter().filter_map(|l| l[12..].split_once(" => ")) {
        groups.entry(to).or_default().extend([name, to]);
    }
    let group_of = |name: &str| groups.values().find(|g| g.contains(name));
    let mut all: Vec<String> = items
        .iter()
        .map(|line| {
            let (code, name) = line.split_at(12);
            let name = name.split(" => ").next().unwrap_or(name);
            match group_of(name) {
                Some(group) => format!("{code}{group:?}"),
                None => format!("{code}{name}"),
            }
        })
        .collect();
    all.sort();
    all
}

/// One run of each: the lines, and the exit code.
struct Ran {
    lines: Vec<String>,
    code: i32,
    said: String,
}

impl Ran {
    /// rsync -n says that a directory goes also when something protected keeps it.
    fn without_kept_dirs(mut self) -> Ran {
        self.lines
            .retain(|l| !l.starts_with("*deleting") || !l.ends_with('/'));
        self
    }
}

fn rsync(args: &[String], src: &Path, dst: &Path) -> Ran {
    let mut command = Command::new("rsync");
    // `sync` compares nanoseconds.
    command
        .args(ALWAYS)
        .args(["-i", "--modify-window=-1"])
        .args(args);
    let out = run(command.arg(src.join("")).arg(dst.join("")));
    Ran {
        lines: lines(&out.out),
        code: out.code(),
        said: out.err,
    }
}

fn ours(args: &[String], src: &Path, dst: &Path) -> Ran {
    let mut command = mirrorfs();
    command.arg("sync").args(ALWAYS).arg("-i").args(args);
    let out = run(command.arg(src).arg(dst));
    Ran {
        lines: lines(&out.out),
        // Usage is 2 here, and 1 there.
        code: match out.code() {
            2 => 1,
            other => other,
        },
        said: out.err,
    }
}

#[track_caller]
fn expect_same(what: &str, theirs: &Ran, ours: &Ran) {
    let missing: Vec<_> = theirs
        .lines
        .iter()
        .filter(|l| !ours.lines.contains(l))
        .collect();
    let extra: Vec<_> = ours
        .lines
        .iter()
        .filter(|l| !theirs.lines.contains(l))
        .collect();
    assert!(
        theirs.lines == ours.lines && theirs.code == ours.code,
        "{what}:\nonly rsync: {missing:#?}\nonly mirrorfs: {extra:#?}\nexit codes {} and {}\nrsync: {}\nmirrorfs: {}",
        theirs.code,
        ours.code,
        theirs.said,
        ours.said,
    );
}

/// A src, two equal dsts, and files for the options.
struct Bench {
    scratch: Scratch,
}

impl Bench {
    fn new(src: &str, dst: &str) -> Bench {
        let scratch = Scratch::new();
        build(&scratch.path().join("src"), src);
        build(&scratch.path().join("was"), dst);
        Bench { scratch }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.scratch.path().join(name)
    }

    /// `-n` and then the run itself; then the run once more, which finds nothing.
    #[track_caller]
    fn compare(&self, args: &[&str]) {
        let args: Vec<String> = args
            .iter()
            .map(|a| a.replace("{}", &self.scratch.path().display().to_string()))
            .collect();
        let (src, was) = (self.path("src"), self.path("was"));
        let dry = [vec!["-n".to_owned()], args.clone()].concat();
        let before = manifest(&was);
        expect_same(
            &format!("-n {args:?}"),
            &rsync(&dry, &src, &was).without_kept_dirs(),
            &ours(&dry, &src, &was).without_kept_dirs(),
        );
        compare::expect_equal(&before, &manifest(&was));
        let (a, b) = (self.path("a"), self.path("b"));
        copy(&was, &a);
        copy(&was, &b);
        expect_same(
            &format!("{args:?}"),
            &rsync(&args, &src, &a),
            &ours(&args, &src, &b),
        );
        self.expect_trees(&args, &a, &b);
        expect_same(
            &format!("again: {args:?}"),
            &rsync(&args, &src, &a),
            &ours(&args, &src, &b),
        );
        fs::remove_dir_all(a).unwrap();
        fs::remove_dir_all(b).unwrap();
    }

    #[track_caller]
    fn expect_trees(&self, args: &[String], a: &Path, b: &Path) {
        let ignore = Ignore {
            // -S looks for zeros; we keep the holes that there are.
            allocated: true,
            atime: true,
            recent_mtime: true,
            ..Ignore::default()
        };
        let found = compare::differences(&manifest(a), &manifest(b), ignore);
        assert!(found.is_empty(), "{args:?}:\n{}", found.join("\n"));
    }
}

/// Entries of all kinds.
const SRC: &str = "
    mkdir -p d/sub e empty
    echo one > d/one; echo two > d/sub/two.o; echo x > x; echo y > y.c; echo z > 'a b'
    ln -s x link; ln -s gone e/dangling; mkfifo pipe; mknod null c 1 3
    echo h > h1; ln h1 d/h2; echo g > e/h3; ln e/h3 h4
    head -c 300000 /dev/zero > zeros; truncate -s 1M hole
    setfattr -n user.a -v 1 x; setfacl -m u:5:r y.c
    chmod 4711 x; chown 7:8 y.c; touch -d '2001-02-03 04:05:06.7' x d/one d/sub d
";

/// What an earlier copy may look like: some equal, some changed, some of another type, some extra.
const DST: &str = "
    cp -a ../src/. .
    echo TWO > d/sub/two.o; touch -d 2009-01-01 d/sub/two.o; echo more >> y.c; touch -d 2010-01-01 zeros; touch -d 2035-01-01 y.c
    chmod 600 x; setfattr -x user.a x; ln -sfn y.c link; rm pipe; mkfifo -m 600 pipe
    rm -r e h4; echo e > e; mkdir extra; echo q > extra/q; mkdir extra/deep; echo r > extra/deep/r.o
    rm empty -r; rm h1 d/h2; for f in h1 d/h2; do echo h > $f; touch -d 2011-01-01 $f; done
    touch extra.c $(printf 'tab#there' | tr '#' '\\011')
";

#[test]
fn options_mean_what_rsync_means() {
    if !can_compare() {
        return;
    }
    let empty = Bench::new(SRC, "");
    for args in [
        &["-r"][..],
        &["-r", "--delete"],
        &["-r", "-c"],
        &["-r", "-x"],
    ] {
        empty.compare(args);
    }
    let full = Bench::new(SRC, DST);
    for args in [
        &["-r", "--delete"][..],
        &["-r", "--delete", "-c"],
        &["-r", "--delete", "-I"],
        &["-r", "--delete", "-u"],
        &["-r", "--delete", "--size-only"],
        &["-r", "--delete", "--existing"],
        &["-r", "--delete", "--ignore-existing", "--exclude=/e"],
        &[
            "-r",
            "--existing",
            "--ignore-existing",
            "--delete",
            "--exclude=/e",
        ],
        &["-r", "--delete", "--exclude=*.o"],
        &["-r", "--delete", "--exclude=*.o", "--delete-excluded"],
        &["-r", "--delete", "--filter=P *.o"],
        &["-r", "--delete", "--filter=P extra/deep"],
        &[
            "-r",
            "--delete-excluded",
            "--filter=P extra/deep/",
            "--exclude=d",
        ],
        &["-r", "--delete", "--filter=-p *.o"],
        &["-r", "--delete", "--filter=H /d"],
        &[
            "-r",
            "--delete",
            "--include=*/",
            "--include=*.c",
            "--exclude=*",
        ],
        &["-r", "--delete", "-F", "-F"],
        &["-r", "--del", "--force"],
    ] {
        full.compare(args);
    }
}

#[test]
fn what_is_not_kept_is_what_rsync_does_not_keep() {
    if !can_compare() {
        return;
    }
    let empty = Bench::new(SRC, "");
    let full = Bench::new(SRC, DST);
    let inherits = Bench::new(
        SRC,
        "mkdir d; chmod 2770 d; setfacl -d -m u:5:rwx,g::rx,o::- . d; setfattr -n user.kept -v 1 d",
    );
    for args in [
        // With -X rsync sets SRC's mode all the same where an xattr differs.
        &["--no-perms", "--no-acls", "--no-xattrs"][..],
        &["--no-p", "--no-A", "--no-X", "--no-times"],
        &["--no-times"],
        &["--no-t", "--size-only"],
        &["--no-t", "-c"],
        &["--no-owner"],
        &["--no-o", "--no-group"],
        &["--no-g", "-u"],
        &["--no-acls"],
        &["--no-xattrs"],
        &["--no-X", "--no-A", "-I"],
        &["--no-hard-links"],
        &["--no-links"],
        &["--no-D", "--no-l"],
        &["--no-devices"],
        &["--no-specials"],
        &["--no-D", "--specials"],
        &["-a", "--no-o", "--no-owner", "--owner"],
        &["--no-o", "--no-t", "-a"],
        &["--no-numeric-ids", "--no-S"],
        &[
            "--no-p", "--no-t", "--no-o", "--no-g", "--no-A", "--no-X", "--no-H", "--no-l",
            "--no-D",
        ],
    ] {
        let args = [&["-r", "--delete"], args].concat();
        empty.compare(&args);
        full.compare(&args);
        inherits.compare(&args);
    }
}

#[test]
fn what_is_left_out_is_told_and_what_is_not_kept_lends_nobody_s_rights() {
    if !need(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let scratch = Scratch::new();
    let (src, dst) = (scratch.dir("src"), scratch.dir("dst"));
    build(
        &src,
        "echo x > new; echo x > there; chown 7:8 new there; chmod 6755 new there
         ln -s new link; mkfifo pipe; truncate -s 1M hole",
    );
    build(&dst, "cp -a ../src/there .; chown 0:0 there");
    let mut command = mirrorfs();
    command.args([
        "sync", "-aH", "--no-o", "--no-g", "--no-l", "--no-D", "--no-S",
    ]);
    let said = run(command.args([&src, &dst])).expect_code(0);
    let mut lines: Vec<&str> = said.out.lines().collect();
    lines.sort_unstable();
    let skipping = |name: &str| format!("skipping non-regular file \"{name}\"");
    assert_eq!(lines, [skipping("link"), skipping("pipe")]);
    for name in ["new", "there"] {
        let stat = fs::symlink_metadata(dst.join(name)).unwrap();
        let is = (stat.uid(), stat.gid(), stat.mode() & 0o7777);
        assert_eq!(is, (0, 0, 0o755), "{name}");
    }
    let hole = fs::symlink_metadata(dst.join("hole")).unwrap();
    assert!(hole.blocks() >= 2048, "{} blocks", hole.blocks());
    assert!(!dst.join("link").exists() && !dst.join("pipe").exists());
    let quiet = run(command.arg("-q")).expect_code(0);
    assert_eq!(quiet.out, "");
}

#[test]
fn a_mount_point_is_left_alone_as_rsync_leaves_it() {
    if !can_compare() {
        return;
    }
    let bench = Bench::new(
        "mkdir m d; touch f",
        "mkdir -p m/kept d; touch m/kept/x extra",
    );
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(bench.path("src/m"))
        .output();
    assert!(mount.unwrap().status.success());
    fs::write(bench.path("src/m/other"), "x").unwrap();
    bench.compare(&["-r", "-x", "--delete"]);
    bench.compare(&["-r", "--delete"]);
    rustix::mount::unmount(bench.path("src/m"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Directories with rules of their own.
const RULES: &str = "
    mkdir -p a/b/c x/y
    for d in . a a/b a/b/c x x/y; do touch $d/f.o $d/f.c $d/keep.o $d/top; done
    echo '- *.o' > .rsync-filter; printf '+ keep.o\n- /top\n: .more\n' > a/.rsync-filter
    printf '!\n- f.c\n' > a/b/.rsync-filter; echo '- c/' > a/b/.more; echo '-! *.c' > x/.bare
    printf 'f.c\nkeep.o\n' > x/y/.words; printf '# no\n; no\n\n- top\n+ *\n' > x/y/.rsync-filter
";

#[test]
fn filters_mean_what_rsync_means() {
    if !can_compare() {
        return;
    }
    let bench = Bench::new(
        RULES,
        &format!("{RULES} touch a/extra.o a/b/extra.o x/extra; rm a/f.c"),
    );
    build(
        &bench.path("files"),
        "printf -- '- *.o\n+ x\n# c\n' > old; printf -- 'H /a/b\nP extra*\n' > rules; printf 'top\\0f.c\\0' > nul",
    );
    for args in [
        &["-r", "-F"][..],
        &["-r", "-FF", "--delete"],
        &["-r", "-F", "--delete-excluded"],
        &["-r", "--filter=: .rsync-filter", "--delete"],
        &["-r", "--filter=:n .rsync-filter", "--delete"],
        &["-r", "--filter=:e- .words", "--delete"],
        &[
            "-r",
            "--filter=dir-merge,w- .words",
            "--exclude=a",
            "--delete",
        ],
        &["-r", "--filter=:s .rsync-filter", "--delete"],
        &["-r", "--filter=:r .rsync-filter", "--delete"],
        &["-r", "--filter=: .bare", "--filter=: .rsync-filter"],
        &["-r", "--exclude-from={}/files/old", "--delete"],
        &["-r", "--include-from={}/files/old", "--exclude=*.c"],
        &["-r", "--filter=. {}/files/rules", "--delete"],
        &["-r", "--filter=merge,-0 {}/files/rules"],
        &["-r", "-0", "--exclude-from={}/files/nul", "--delete"],
        &[
            "-r",
            "--exclude=- *.o",
            "--exclude=+ f.o",
            "--include=!",
            "--exclude=top",
        ],
        &["-r", "--filter=-/ {}/src/a/b", "--delete"],
        &["-r", "--filter=-/ {}/was/a", "--delete"],
        &["-r", "--exclude=a/*/c", "--exclude=/x/**", "--delete"],
        &["-r", "--exclude=a/***", "--delete"],
        &["-r", "--exclude=**/b/", "--delete-excluded"],
        &["-r", "--filter=-! */", "--delete"],
        &["-r", "--filter=nope"],
        &["-r", "--filter=- "],
    ] {
        bench.compare(args);
    }
}

#[test]
fn lists_of_names_mean_what_rsync_means() {
    if !can_compare() {
        return;
    }
    let bench = Bench::new(SRC, DST);
    build(
        &bench.path("files"),
        "printf 'x\nd/sub/two.o\n/e/h3\n./zeros\n' > some; printf 'd/\nempty\n' > dirs
         printf '# c\n;d\n\nx\ngone\n' > gone; printf 'x\\0a b\\0' > nul; printf 'd/sub\nd/one\n../../y.c\n' > deep
         printf '.\n' > all; printf './\n' > top; printf 'd\nd/sub/two.o\n' > both",
    );
    for list in ["some", "dirs", "gone", "deep", "all", "top", "both"] {
        let list = format!("--files-from={{}}/files/{list}");
        for more in [&[][..], &["-r"], &["--delete"], &["-r", "--delete"]] {
            let args: Vec<&str> = more.iter().copied().chain([list.as_str()]).collect();
            bench.compare(&args);
        }
    }
    bench.compare(&["-0", "--files-from={}/files/nul"]);
    bench.compare(&["-r", "--exclude=*.o", "--files-from={}/files/dirs"]);
}

/// rsync copies through the symlink, or fails as a whole; a file is no way to its name here.
#[test]
fn what_is_listed_below_no_directory_is_an_error() {
    let scratch = Scratch::new();
    let (src, dst) = (scratch.dir("src"), scratch.dir("dst"));
    build(
        &src,
        "mkdir real; echo x > real/file; ln -s real link; echo y > plain; echo z > other",
    );
    let list = scratch.path().join("list");
    fs::write(&list, "link/file\nplain/below\nother\n").unwrap();
    let errors = scratch.path().join("errors");
    let said = run(mirrorfs()
        .args(["sync", "--files-from"])
        .arg(&list)
        .arg("--error-file")
        .arg(&errors)
        .args([&src, &dst]))
    .expect_code(23);
    let lines: Vec<_> = said
        .err
        .lines()
        .filter(|l| l.contains("Not a directory"))
        .collect();
    assert_eq!(lines.len(), 2, "{}", said.err);
    assert!(dst.join("other").exists());
    let mut left: Vec<_> = fs::read_to_string(&errors)
        .unwrap()
        .lines()
        .map(String::from)
        .collect();
    left.sort();
    assert_eq!(left, ["link/file", "plain/below"]);
}

/// Names that patterns are about, and some that they are not.
const NAMES: &[&str] = &["a", "b", "ab", "a.o", "b.c", "x y", "[a]", "-z", "c\\d"];

fn random_tree(r: &mut Random, at: &Path, depth: u32, dirs: &mut Vec<String>, below: &str) {
    fs::create_dir_all(at).unwrap();
    dirs.push(below.to_owned());
    for _ in 0..1 + r.below(5) {
        let name = r.one_of(NAMES);
        let path = at.join(name);
        if path.exists() {
            continue;
        }
        // rsync takes a directory's own name for part of the pattern where its merge file has a slash.
        let plain = !name.contains(['\\', '[']);
        if plain && depth < 3 && r.below(2) == 0 {
            random_tree(r, &path, depth + 1, dirs, &format!("{below}/{name}"));
        } else {
            fs::write(&path, *name).unwrap();
        }
    }
    if r.below(4) == 0 {
        let rules: Vec<String> = (0..1 + r.below(3)).map(|_| random_rule(r, true)).collect();
        fs::write(at.join(".f"), rules.join("\n") + "\n").unwrap();
    }
}

fn random_pattern(r: &mut Random) -> String {
    const PARTS: &[&str] = &[
        "a",
        "b",
        "ab",
        "*",
        "**",
        "?",
        "[ab]",
        "[!a]",
        "*.o",
        "a*",
        "*b",
        "x y",
        "[[:alpha:]]",
        "\\[a]",
        "-z",
        "c\\d",
        "c?d",
        "[]a-]",
        "[a",
        "***",
        "*[.]*",
    ];
    let mut pattern = String::new();
    if r.below(3) == 0 {
        pattern.push('/');
    }
    for n in 0..1 + r.below(3) {
        if n > 0 && r.below(4) > 0 {
            pattern.push('/');
        }
        let part: &&str = r.one_of(PARTS);
        pattern.push_str(part);
    }
    if r.below(4) == 0 {
        pattern.push('/');
    }
    pattern
}

fn random_rule(r: &mut Random, in_file: bool) -> String {
    let pattern = random_pattern(r);
    match r.below(if in_file { 10 } else { 12 }) {
        0..4 => format!("- {pattern}"),
        4..6 => format!("+ {pattern}"),
        6 => format!("{} {pattern}", r.one_of(&["P", "R", "H", "S"])),
        7 => format!("-{} {pattern}", r.one_of(&["!", "p", "s", "r", "sr"])),
        8 if r.below(4) == 0 => "!".to_owned(),
        8 | 9 => format!("- {pattern}"),
        10 => format!(":{} .f", r.one_of(&["", "n", "e", "s", "r", "p"])),
        _ => format!("+! {pattern}"),
    }
}

#[test]
fn random_rules_on_random_trees_choose_what_rsync_chooses() {
    if !can_compare() {
        return;
    }
    let rounds = std::env::var("MIRRORFS_RSYNC_ROUNDS").map_or(8, |n| n.parse().unwrap());
    let mut r = Random::seeded(7);
    let (mut compared, mut refused) = (0, 0);
    for _ in 0..rounds {
        let scratch = Scratch::new();
        let (src, dst) = (scratch.path().join("src"), scratch.path().join("dst"));
        random_tree(&mut r, &src, 0, &mut Vec::new(), "");
        random_tree(&mut r, &dst, 0, &mut Vec::new(), "");
        for last in [false, false, false, false, false, false, false, true] {
            let rules =
                (0..1 + r.below(5)).map(|_| format!("--filter={}", random_rule(&mut r, false)));
            let mut args: Vec<String> = rules.collect();
            args.push("-r".to_owned());
            args.push((*r.one_of(&["--delete", "--delete-excluded", "-v", "--delete"])).to_owned());
            if !last {
                args.push("-n".to_owned());
                let theirs = rsync(&args, &src, &dst).without_kept_dirs();
                let ours = ours(&args, &src, &dst).without_kept_dirs();
                // A merge file that is not understood: its directory fails, there the whole run.
                // Protected entries keep a directory that has to make way: rsync -n does not see it.
                if ours.said.contains("an entry of another type") {
                    refused += 1;
                } else if theirs.code == 1 {
                    assert!(ours.code == 1 || ours.code == 23, "{args:?}: {}", ours.said);
                    refused += 1;
                } else {
                    expect_same(&format!("{args:?}"), &theirs, &ours);
                    compared += 1;
                }
                continue;
            }
            let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
            copy(&dst, &a);
            copy(&dst, &b);
            let (theirs, ours) = (rsync(&args, &src, &a), ours(&args, &src, &b));
            if theirs.code == 1 {
                assert!(ours.code == 1 || ours.code == 23, "{args:?}: {}", ours.said);
                refused += 1;
                continue;
            }
            expect_same(&format!("{args:?}"), &theirs, &ours);
            compared += 1;
            let ignore = Ignore {
                atime: true,
                recent_mtime: true,
                ..Ignore::default()
            };
            let found = compare::differences(&manifest(&a), &manifest(&b), ignore);
            assert!(found.is_empty(), "{args:?}:\n{}", found.join("\n"));
        }
    }
    eprintln!("{compared} runs compared, {refused} that rsync refuses");
    assert!(compared > 4 * refused, "{compared} {refused}");
}
