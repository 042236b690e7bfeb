//! Fidelity: after a migration or a `sync`, dst is src in every respect that a comparer can see,
//! src is as it was, and nothing tells that the program was there. On every file system.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::time::Duration;

use crate::compare::{self, Ignore};
use crate::fixture::{self, Random, World, can_mount_on, kit, need, run_for, tests_all};
use crate::{nasty, raw};

/// One module of tests for each file system.
macro_rules! on_every_file_system {
    ($($test:ident),* $(,)?) => {
        mod ext4 { $(#[test] fn $test() { super::$test("ext4") })* }
        mod xfs { $(#[test] fn $test() { super::$test("xfs") })* }
        mod btrfs { $(#[test] fn $test() { super::$test("btrfs") })* }
    };
}

on_every_file_system!(
    the_comparer_sees_what_cp_a_keeps,
    reading_nothing_gives_an_equal_tree,
    reading_everything_gives_an_equal_tree,
    reading_a_random_half_while_the_walker_runs_gives_an_equal_tree,
    sync_gives_an_equal_tree_and_a_second_sync_changes_nothing,
    the_kits_nasty_tree_comes_over_whole,
    flags_come_over,
);

fn nasty_world(kind: &str) -> Option<World> {
    if !can_mount_on(kind) {
        return None;
    }
    let w = World::on(kind);
    nasty::fill(&w.src);
    Some(w)
}

/// Proves the tests' own tools: a copy by another tool has no difference, a changed one has.
fn the_comparer_sees_what_cp_a_keeps(kind: &str) {
    let Some(w) = nasty_world(kind) else { return };
    // cp cannot name what is deeper than PATH_MAX.
    std::fs::remove_dir_all(w.src.join("deep-long")).unwrap();
    run_for(
        Command::new("cp")
            .arg("-a")
            .arg(w.src.join("."))
            .arg(&w.dst),
        fixture::LIMIT,
    )
    .expect_code(0);
    w.expect_finished_copy();
    let names = compare::manifest(&w.dst);
    nasty::At::open(&w.dst.join("links")).file("one more", b"");
    assert_eq!(
        compare::differences(&names, &compare::manifest(&w.dst), Ignore::default()).len(),
        2,
        "a new name and its directory's time"
    );
}

fn reading_nothing_gives_an_equal_tree(kind: &str) {
    let Some(w) = nasty_world(kind) else { return };
    let before = w.src_state();
    w.mount().finish();
    w.expect_finished_copy();
    w.expect_src_untouched(&before);
}

fn reading_everything_gives_an_equal_tree(kind: &str) {
    let Some(w) = nasty_world(kind) else { return };
    let w = w.over();
    let before = w.src_state();
    let m = w.mount_lazy();
    // The mount shows src's tree while everything is pending, and while it is read.
    compare::expect_equal(&before, &compare::manifest_without_content(&m.at));
    // xfs gives a file that just grew more blocks for a while.
    let ignore = Ignore {
        allocated: true,
        ..Ignore::default()
    };
    compare::expect_equal_with(&before, &compare::manifest(&m.at), ignore);
    // Of a file that is all hole the comparer reads nothing.
    for (path, entry) in before.entries() {
        if entry.kind == rustix::fs::FileType::RegularFile
            && entry.allocated == 0
            && path.len() < 3000
        {
            let mut file = File::open(m.at.join(OsStr::from_bytes(path))).unwrap();
            let _ = file.read(&mut [0]).unwrap(); // What it says is known: zeros.
        }
    }
    m.finish();
    w.expect_finished_copy();
    w.expect_src_untouched(&before);
}

fn reading_a_random_half_while_the_walker_runs_gives_an_equal_tree(kind: &str) {
    let Some(w) = nasty_world(kind) else { return };
    let before = w.src_state();
    let m = w.mount();
    let mut random = Random::seeded(1);
    for (path, entry) in before.entries() {
        let short = path.len() < 3000;
        if entry.kind == rustix::fs::FileType::RegularFile
            && entry.size < 1 << 30
            && short
            && random.below(2) == 0
        {
            let path = m.at.join(OsStr::from_bytes(path));
            let mut all = Vec::new();
            File::open(&path).unwrap().read_to_end(&mut all).unwrap();
            assert_eq!(all.len() as u64, entry.size, "{}", path.display());
        }
    }
    m.finish();
    w.expect_finished_copy();
    w.expect_src_untouched(&before);
}

fn sync_gives_an_equal_tree_and_a_second_sync_changes_nothing(kind: &str) {
    let Some(w) = nasty_world(kind) else { return };
    let before = w.src_state();
    sync(&w);
    w.expect_finished_copy();
    let first = compare::manifest(&w.dst);
    sync(&w);
    let second = compare::manifest(&w.dst);
    compare::expect_equal(&first, &second);
    for (path, entry) in second.entries() {
        let ino = first
            .entries()
            .find(|(p, _)| *p == path)
            .map(|(_, e)| e.ino);
        assert_eq!(
            ino,
            Some(entry.ino),
            "{} was made anew",
            compare::show(path)
        );
    }
    w.expect_src_untouched(&before);
    run_for(
        fixture::mirrorfs().arg("verify").arg(&w.src).arg(&w.dst),
        fixture::LIMIT,
    )
    .expect_code(0);
}

fn sync(w: &World) {
    run_for(
        fixture::mirrorfs().arg("sync").arg(&w.src).arg(&w.dst),
        fixture::LIMIT,
    )
    .expect_code(0);
}

/// The kit's generator and comparer, which know more and share nothing with ours.
fn the_kits_nasty_tree_comes_over_whole(kind: &str) {
    let tools = kit("nasty.py").zip(kit("treecmp.py"));
    if !need(tools.is_some(), "the test kit (MIRRORFS_KIT)") || !can_mount_on(kind) {
        return;
    }
    let (make, compare) = tools.unwrap();
    let w = World::on(kind);
    let python = |tool: &std::path::Path, args: &[&std::path::Path], more: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(tool).args(more).args(args);
        run_for(&mut command, Duration::from_secs(200))
    };
    // The whole of it (50,000 entries, paths of 2,200 directories) where time does not matter.
    let whole = tests_all();
    python(&make, &[&w.src], if whole { &[] } else { &["--small"] }).expect_code(0);
    w.mount().finish();
    // xfs gives a src that grew more blocks than its data needs: only a dst with more is wrong.
    let holes = ["--holes", "more"];
    python(&compare, &[&w.src, &w.dst], &holes).expect_code(0);
    // It goes down 2,200 directories by recursion.
    std::thread::scope(|scope| {
        let deep = std::thread::Builder::new().stack_size(512 << 20);
        let look = deep.spawn_scoped(scope, || w.expect_no_trace()).unwrap();
        look.join().unwrap();
    });
    let synced = w.dst.with_file_name("synced");
    std::fs::create_dir(&synced).unwrap();
    run_for(
        fixture::mirrorfs().arg("sync").arg(&w.src).arg(&synced),
        fixture::LIMIT,
    )
    .expect_code(0);
    python(&compare, &[&w.src, &synced], &holes).expect_code(0);
}

fn flags_come_over(kind: &str) {
    use std::os::fd::AsFd;
    if !can_mount_on(kind) {
        return;
    }
    const APPEND: u32 = 0x20;
    const IMMUTABLE: u32 = 0x10;
    const NODUMP: u32 = 0x40;
    let all = [
        ("append", APPEND),
        ("immutable", IMMUTABLE),
        ("nodump", NODUMP),
    ];
    let w = World::on(kind);
    let at = nasty::At::open(&w.src);
    let set = |path: &std::path::Path, flags| {
        let file = File::open(path).unwrap();
        let have = raw::flags(file.as_fd()).unwrap();
        raw::set_flags(file.as_fd(), have & !(APPEND | IMMUTABLE | NODUMP) | flags).unwrap();
    };
    for (name, flag) in all {
        at.file(name, name.as_bytes());
        at.dir(format!("{name}-dir")).file("in", b"side");
        at.stamp(name, 1_000_000_000, 1);
        set(&w.src.join(name), flag);
        set(&w.src.join(format!("{name}-dir")), flag);
    }
    w.mount().finish();
    w.expect_finished_copy();
    for (name, flag) in all {
        for name in [name.to_owned(), format!("{name}-dir")] {
            let have = raw::flags(File::open(w.dst.join(&name)).unwrap().as_fd()).unwrap();
            assert_eq!(have & (APPEND | IMMUTABLE | NODUMP), flag, "{name}");
        }
    }
}

/// From one kind of file system to another: what dst can hold of the nasty tree is held.
fn between(src: &str, dst: &str) {
    if !can_mount_on(src) || !can_mount_on(dst) {
        return;
    }
    let w = World::on_two(src, dst);
    nasty::fill(&w.src);
    // What only one side can hold is another test's subject (the ledger): long xattrs and symlinks,
    // large device numbers, times at the ends of the calendar.
    let only_some = [
        "xattrs/bigger",
        "nodes/to 1024 bytes",
        "nodes/to 4000 bytes",
        "nodes/c4095",
        "nodes/b4095",
    ];
    for name in only_some {
        if let Err(e) = std::fs::remove_file(w.src.join(name)) {
            assert_eq!(e.kind(), std::io::ErrorKind::NotFound, "{name}");
        }
    }
    let at = nasty::At::open(&w.src.join("times"));
    for name in std::fs::read_dir(w.src.join("times"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
    {
        let words: Vec<_> = name.to_str().unwrap().split(' ').collect();
        if ["0", "9"].contains(&words[1]) && words[2] != "0" {
            at.stamp(name.as_bytes(), 1_000_000_000, 0);
        }
    }
    let before = w.src_state();
    w.mount().finish();
    w.expect_finished_copy();
    w.expect_src_untouched(&before);
    let synced = w.dst.with_file_name("synced");
    std::fs::create_dir(&synced).unwrap();
    run_for(
        fixture::mirrorfs().arg("sync").arg(&w.src).arg(&synced),
        fixture::LIMIT,
    )
    .expect_code(0);
    compare::expect_equal(&before, &compare::manifest(&synced));
}

#[test]
fn from_ext4_to_xfs() {
    between("ext4", "xfs");
}

#[test]
fn from_xfs_to_ext4() {
    between("xfs", "ext4");
}

#[test]
fn from_ext4_to_btrfs() {
    between("ext4", "btrfs");
}

#[test]
fn from_btrfs_to_ext4() {
    between("btrfs", "ext4");
}
