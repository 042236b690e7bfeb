//! `sync` that was killed: whatever is asked of the next run, no part of a file passes for the file.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mirrorfs::sys::fault::POINTS;

use crate::compare::{self, Ignore, manifest};
use crate::fixture::{Scratch, mirrorfs, need, run};

/// Entries of each kind, all older than any copy.
const SRC: &str = "
    mkdir -p d/e; cd d
    echo small > small; : > empty; head -c 3000000 /dev/urandom > large; echo x > e/x
    truncate -s 8M sparse; for at in 1 7; do
        head -c 300000 /dev/urandom | dd of=sparse bs=1M seek=$at conv=notrunc status=none; done
    ln -s small link; mkfifo pipe; echo h > h1; ln h1 h2
    chown 7:8 small large link pipe; chmod 640 small; setfattr -n user.a -v 1 small
    find .. -exec touch -h -d '2001-02-03 04:05:06.7' {} +
";

struct Trees {
    scratch: Scratch,
}

impl Trees {
    fn new() -> Trees {
        let scratch = Scratch::new();
        let script = format!("set -e; {SRC}");
        let src = scratch.dir("src");
        run(Command::new("sh").args(["-c", &script]).current_dir(&src)).expect_code(0);
        Trees { scratch }
    }

    fn src(&self) -> PathBuf {
        self.scratch.path().join("src")
    }

    fn dst(&self) -> PathBuf {
        self.scratch.path().join("dst")
    }

    fn sync(&self) -> Command {
        let mut command = mirrorfs();
        command.args(["sync", "-j1", "--reflink=never"]);
        command.args([self.src(), self.dst()]);
        command
    }

    /// A first run that ends at the n-th passage of a point; false: it has come to its end.
    fn killed_at(&self, point: &str, n: usize) -> bool {
        if self.dst().exists() {
            fs::remove_dir_all(self.dst()).unwrap();
        }
        let ran = run(self.sync().env("MIRRORFS_FAULT", format!("{point}:{n}")));
        assert!([0, 99].contains(&ran.code()), "{}", ran.err);
        ran.code() == 99
    }

    /// What differs from src.
    fn wrong(&self) -> Vec<String> {
        let ignore = Ignore {
            atime: true,
            allocated: true,
            ..Ignore::default()
        };
        let found = compare::differences(&manifest(&self.src()), &manifest(&self.dst()), ignore);
        let ours = |line: &String| !line.starts_with(".mirrorfs");
        found.into_iter().filter(ours).collect()
    }

    /// The same command without anything: all is src's, and nothing is doubted any more.
    #[track_caller]
    fn expect_whole_after_a_plain_run(&self) {
        run(&mut self.sync()).expect_code(0);
        assert_eq!(self.wrong(), [""; 0]);
        assert!(!self.dst().join(".mirrorfs").exists());
    }
}

/// The paths that a run says it cannot tell of.
fn told(err: &str) -> BTreeSet<PathBuf> {
    let lines = err
        .lines()
        .filter(|l| l.contains("a part of it that an earlier run has left"));
    lines
        .map(|line| PathBuf::from(line.split('"').nth(1).unwrap()))
        .collect()
}

#[test]
pub(crate) fn what_a_killed_sync_has_left_passes_for_no_file() {
    if !need(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let trees = Trees::new();
    let mut names = BTreeSet::new();
    for point in POINTS.iter().filter(|p| p.starts_with("sync")) {
        let mut met = false;
        for n in 1.. {
            for option in ["-u", "--ignore-existing", "--size-only"] {
                if !trees.killed_at(point, n) {
                    continue;
                }
                met = true;
                let ran = run(trees.sync().arg(option));
                let told = told(&ran.err);
                let what = format!("{point}:{n} {option}: {}", ran.err);
                let may_be_told = option != "--size-only";
                assert_eq!(ran.code(), if told.is_empty() { 0 } else { 23 }, "{what}");
                assert!(may_be_told || told.is_empty(), "{what}");
                for line in trees.wrong() {
                    let name = Path::new(line.split(": ").next().unwrap());
                    // One inode: the other name cannot be linked to what stays as it is.
                    let other = Path::new("d").join(if name.ends_with("h1") { "h2" } else { "h1" });
                    let linked = line.contains("link") && told.contains(&other);
                    assert!(linked || told.contains(name), "{what}{line}");
                }
                names.extend(told);
                trees.expect_whole_after_a_plain_run();
            }
            if !trees.killed_at(point, n) {
                break;
            }
        }
        assert!(met, "{point} was never met");
    }
    for name in [
        "d/small", "d/empty", "d/large", "d/sparse", "d/link", "d/pipe",
    ] {
        assert!(names.contains(Path::new(name)), "{name} was never told of");
    }
}

#[test]
fn what_users_did_after_a_killed_sync_is_kept_or_told_and_never_written_over() {
    if !need(rustix::process::geteuid().is_root(), "root") {
        return;
    }
    let trees = Trees::new();
    let files = ["small", "large", "h1", "empty"];
    let at = |root: PathBuf, name: &str| root.join("d").join(name);
    let mtime = |path: PathBuf| fs::symlink_metadata(path).map(|s| (s.mtime(), s.mtime_nsec()));
    let is_whole = |name: &&str| {
        let there = mtime(at(trees.dst(), name)).ok();
        there == mtime(at(trees.src(), name)).ok()
    };
    // One is done, and another is not there.
    let (whole, new) = (1..)
        .map_while(|n| trees.killed_at("sync-made", n).then_some(()))
        .map(|()| {
            let (whole, others): (Vec<&str>, Vec<&str>) = files.into_iter().partition(is_whole);
            let new = others
                .into_iter()
                .filter(|name| !at(trees.dst(), name).exists());
            (whole, new.collect::<Vec<_>>())
        })
        .find(|(whole, new)| !whole.is_empty() && !new.is_empty())
        .expect("a run that is half done");
    for name in whole.iter().chain(&new) {
        fs::write(at(trees.dst(), name), "a user's").unwrap();
    }
    for option in ["-u", "--ignore-existing"] {
        let ran = run(trees.sync().arg(option));
        let told = told(&ran.err);
        assert_eq!(
            ran.code(),
            if told.is_empty() { 0 } else { 23 },
            "{}",
            ran.err
        );
        for name in &whole {
            assert!(
                !told.contains(&Path::new("d").join(name)),
                "{name} {option}"
            );
        }
        for name in &new {
            assert!(told.contains(&Path::new("d").join(name)), "{name} {option}");
        }
    }
    // Not before: who reads a file makes its access time newer than the file.
    for name in whole.iter().chain(&new) {
        let is = fs::read_to_string(at(trees.dst(), name)).unwrap();
        assert_eq!(is, "a user's", "{name}");
    }
    trees.expect_whole_after_a_plain_run();
}
