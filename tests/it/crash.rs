//! Crashes of the daemon: it exits at every fault point, and is killed at a random moment. After
//! the next mount nothing that was done is undone, nothing deleted comes back, and the finished
//! tree is what the operations left.
//!
//! Long random runs, and most power cuts, are scripts/crash; here are a few.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorfs::sys::fault::POINTS;

use crate::compare::{self, Ignore};
use crate::fixture::{
    CONTROL, LARGE, LIMIT, LoopFs, MARK, Mounted, Output, World, bytes, can_mount_on, find_program,
    is_unpopulated, kit, mirrorfs, need, run, run_for, tests_all, wait_dead,
};
use crate::nasty::{self, At};
use crate::raw;

/// What a process that met its fault point exits with.
pub(crate) const FAULT_EXIT: i32 = 99;

/// One step of the workload: on the mount and on the plain copy.
type Step = fn(&Path) -> io::Result<()>;

/// Steps that meet pending entries of every kind. Each can be done again when a crash cut it off.
const STEPS: &[Step] = &[
    |at| fs::read(at.join("d0/f0")).map(drop),
    |at| once_renamed(&at.join("d1"), &at.join("moved")),
    |at| fs::read(at.join("moved/e/f1")).map(drop),
    |at| once_removed(&at.join("d0/f2")),
    |at| once_renamed(&at.join("d2/f0"), &at.join("d0/from elsewhere")),
    |at| once_renamed(&at.join("d2/f2"), &at.join("d0/f4")),
    |at| fs::write(at.join("d3/new"), b"new"),
    |at| write_at(&at.join("d3/f0"), b"written", 10),
    |at| write_at(&at.join("large"), b"written", 5 << 20),
    |at| {
        OpenOptions::new()
            .write(true)
            .open(at.join("d3/f2"))?
            .set_len(0)
    },
    |at| {
        OpenOptions::new()
            .write(true)
            .open(at.join("d3/f4"))?
            .set_len(100)
    },
    |at| set_mode(&at.join("d4/f0"), 0o600),
    |at| once_renamed(&at.join("d4"), &at.join("moved/d4")),
    |at| once_renamed(&at.join("moved"), &at.join("moved again")),
    |at| write_at(&at.join("links/a"), b"through one name", 0),
    |at| once_removed(&at.join("links/b")),
    |at| once_renamed(&at.join("d5/e"), &at.join("e")),
    |at| synced(&at.join("d3/f0")),
];

fn synced(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

fn once_renamed(old: &Path, new: &Path) -> io::Result<()> {
    match fs::rename(old, new) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => new.symlink_metadata().map(drop),
        other => other,
    }
}

fn once_removed(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn write_at(path: &Path, data: &[u8], offset: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(data, offset)?;
    file.sync_all()
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

fn fill(src: &Path) {
    nasty::ordinary(src, 8, 8);
    let at = At::open(src);
    at.file("large", &bytes(77, LARGE + 100_000));
    // Too large to come with their names.
    let medium = at.dir("medium");
    for j in 0..24 {
        medium.file(format!("f{j}"), &bytes(200 + j, 70_000 + 100 * j as usize));
    }
    // Hydrated again after a crash they must not lose what writing takes away.
    let capable = at.dir("capable");
    for j in 0..8 {
        let name = format!("f{j}");
        capable.file(&name, &bytes(300 + j, 3_000));
        capable.xattr(&name, "security.capability", &nasty::capability());
        capable.stamp(&name, 1_350_000_000, 9);
    }
    let links = at.dir("links");
    links.file("a", &bytes(78, 30_000));
    links.link("a", &links, "b");
    links.link("a", &at, "linked");
    links.symlink("nowhere", "symlink");
    for name in ["links/a", "large", "links"] {
        at.stamp(name, 1_300_000_000, 5);
    }
}

pub(crate) fn is_dead(e: &io::Error) -> bool {
    let dead = [
        libc::ENOTCONN,
        libc::ECONNABORTED,
        libc::ECANCELED,
        libc::EIO,
        libc::ESHUTDOWN,
    ];
    e.raw_os_error().is_some_and(|code| dead.contains(&code))
}

/// Exits at the n-th passage of a point, goes on after the next mount, finishes and compares.
/// False when the point was never met so often.
fn exit_at(w: &World, plain: &Path, point: &str, n: u32) -> bool {
    let fault = format!("{point}:{n}");
    let env = [("MIRRORFS_FAULT", fault.as_str())];
    let crashed;
    let mut left = STEPS;
    // The walker would be faster than whoever looks one name up.
    let ahead = point.starts_with("ahead");
    let args: &[&str] = if ahead { &["--no-background"] } else { &[] };
    match w.try_mount(args, &env) {
        Err((code, log)) => {
            assert_eq!(code, FAULT_EXIT, "{fault}: {log}");
            crashed = true;
        }
        Ok(mut m) => {
            left = work(&m, plain, left, &fault);
            if left.is_empty() && ahead {
                crashed = false;
                raw::kill(m.pid, libc::SIGKILL);
                m.kill();
            } else if left.is_empty() {
                crashed = run_into(&mut m, &fault);
            } else {
                crashed = true;
                assert_eq!(m.wait_exit(LIMIT), Some(FAULT_EXIT), "{fault}: {}", m.log());
            }
        }
    }
    if left.is_empty() && !w.dst.join(CONTROL).exists() {
        // It had finished, or was past the point where a finish can be seen to have been cut off.
        w.expect_no_trace_once_settled();
    } else {
        let m = w.mount();
        let left = work(&m, plain, left, &fault);
        assert!(
            left.is_empty(),
            "{fault}: the second mount died too: {}",
            m.log()
        );
        m.finish();
        w.expect_no_trace();
    }
    let ignore = Ignore {
        recent_mtime: true,
        ..Ignore::default()
    };
    let found = compare::differences(
        &compare::manifest(plain),
        &compare::manifest(&w.dst),
        ignore,
    );
    assert!(found.is_empty(), "{fault}: {}", found.join("\n"));
    crashed
}

/// Does the steps until the mount dies; what was done is done on the plain copy too.
fn work<'a>(m: &Mounted, plain: &Path, steps: &'a [Step], fault: &str) -> &'a [Step] {
    for (i, step) in steps.iter().enumerate() {
        match step(&m.at) {
            Ok(()) => step(plain).unwrap(),
            Err(e) => {
                eprintln!("{fault}: step {i} of the last {}: {e}", steps.len());
                assert!(
                    is_dead(&e),
                    "{fault}: step {} of the last {}: {e}",
                    i,
                    steps.len()
                );
                return &steps[i..];
            }
        }
    }
    &[]
}

/// Waits until it has met its point or is COMPLETE; then lets `finish` meet it.
fn run_into(m: &mut Mounted, fault: &str) -> bool {
    let end = Instant::now() + LIMIT;
    while m.runs() {
        let status = run(mirrorfs().arg("status").arg(&m.at).arg("--json"));
        if status.out.contains("\"COMPLETE\"") {
            break;
        }
        assert!(
            Instant::now() < end,
            "{fault}: neither met nor COMPLETE: {}",
            m.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    if !m.runs() {
        assert_eq!(m.wait_exit(LIMIT), Some(FAULT_EXIT), "{fault}: {}", m.log());
        return true;
    }
    // Whichever process does the finishing.
    let finish = run(mirrorfs()
        .arg("finish")
        .arg(&m.at)
        .env("MIRRORFS_FAULT", fault));
    let code = m.wait_exit(Duration::from_secs(30));
    assert!(
        finish.code() != 0 || code == Some(0),
        "{fault}: {code:?}: {}",
        m.log()
    );
    finish.code() == FAULT_EXIT || code == Some(FAULT_EXIT)
}

impl World {
    /// Like `expect_no_trace`, after a crash that may have left a dead mount behind.
    fn expect_no_trace_once_settled(&self) {
        while crate::fixture::fuse_mount_at(&self.at).is_some() {
            run(Command::new("umount").arg("-l").arg(&self.at)).expect_code(0);
        }
        self.expect_no_trace();
    }
}

fn exit_at_each(kind: &str, points: &[&str], passages: &[u32]) {
    let fault = need(
        cfg!(feature = "fault"),
        "the fault points (cargo test --features fault)",
    );
    if !fault || !can_mount_on(kind) {
        return;
    }
    let fs = LoopFs::new(kind);
    let src = fs.dir("src");
    fill(&src);
    let mut never = Vec::new();
    for point in points {
        let mut met = false;
        for n in passages {
            let (dst, plain) = (fs.dir("dst"), fs.path().join("plain"));
            run(Command::new("cp").arg("-a").arg(&src).arg(&plain)).expect_code(0);
            let w = World::from(src.clone(), dst.clone(), vec![]);
            met |= exit_at(&w, &plain, point, *n);
            fs::remove_dir_all(&dst).unwrap();
            fs::remove_dir_all(&plain).unwrap();
        }
        if !met {
            never.push(*point);
        }
    }
    assert!(never.is_empty(), "these points were never met: {never:?}");
}

fn points(of: &str) -> Vec<&'static str> {
    POINTS
        .iter()
        .copied()
        .filter(|p| p.starts_with(of))
        .collect()
}

#[test]
fn an_exit_at_each_point_of_populating_loses_nothing() {
    exit_at_each("ext4", &points("populate"), &[1, 2, 7]);
    exit_at_each("btrfs", &points("populate"), &[2]);
}

#[test]
fn an_exit_while_a_name_is_placed_ahead_loses_nothing() {
    exit_at_each("ext4", &points("ahead"), &[1, 2, 6, 15]);
    exit_at_each("xfs", &points("ahead"), &[3]);
    exit_at_each("btrfs", &points("ahead"), &[4]);
}

#[test]
fn an_exit_while_a_small_file_comes_with_its_name_loses_nothing() {
    exit_at_each("ext4", &points("carry"), &[1, 6]);
    exit_at_each("xfs", &points("carry"), &[3]);
    exit_at_each("btrfs", &points("carry"), &[2]);
}

#[test]
fn a_carried_file_that_lost_its_bytes_is_not_adopted() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::create_dir(w.src.join("new")).unwrap();
    fs::write(w.src.join("new/file"), vec![b'x'; 3_000]).unwrap();
    fs::create_dir_all(w.dst.join("copied earlier")).unwrap();
    // The file has its name, size and times when the daemon ends; then a power cut takes its bytes.
    let env = [("MIRRORFS_FAULT", "carry-stamped:1")];
    let died = match w.try_mount(&["--adopt"], &env) {
        Err(_) => true,
        Ok(mut m) => {
            let died = m.wait_exit(Duration::from_secs(2)).is_some();
            if !died {
                m.unmount();
            }
            died
        }
    };
    if died {
        let file = w.dst.join("new/file");
        let modified = file.metadata().unwrap().modified().unwrap();
        fs::write(&file, vec![0; 3_000]).unwrap();
        let file = OpenOptions::new().write(true).open(&file).unwrap();
        file.set_modified(modified).unwrap();
    }
    w.mount().finish();
    assert_eq!(fs::read(w.dst.join("new/file")).unwrap(), vec![b'x'; 3_000]);
}

#[test]
fn an_exit_while_directories_are_published_loses_nothing() {
    exit_at_each("ext4", &points("publish"), &[1, 4]);
    exit_at_each("xfs", &points("publish"), &[2]);
    exit_at_each("btrfs", &points("publish"), &[3]);
}

#[test]
fn an_exit_at_each_point_of_hydrating_loses_nothing() {
    exit_at_each("ext4", &points("hydrate"), &[1, 3, 20]);
    exit_at_each("xfs", &points("hydrate"), &[5]);
}

#[test]
fn an_exit_at_each_point_of_a_rename_loses_nothing() {
    exit_at_each("ext4", &points("rename"), &[1, 2, 3, 4]);
    exit_at_each("btrfs", &points("rename"), &[2]);
}

#[test]
fn an_exit_at_each_point_of_the_end_loses_nothing() {
    exit_at_each("ext4", &points("dir"), &[1, 4]);
    exit_at_each("ext4", &points("finish"), &[1]);
}

#[test]
fn every_fault_point_is_exited_at() {
    // `perm` in rootless.rs, `shard` in shards.rs, `extra` in adopt.rs, `mixed` in mixed.rs,
    // `unseen` in unseen.rs, `salvage` in salvage.rs, `sync` in killed.rs.
    let tested = [
        "ahead", "populate", "carry", "publish", "hydrate", "rename", "dir", "finish", "perm",
        "shard", "mixed", "extra", "unseen", "salvage", "own", "sync",
    ];
    for point in POINTS {
        assert!(
            tested.iter().any(|t| point.starts_with(t)),
            "{point} is in no test"
        );
    }
}

#[test]
fn after_a_kill_nothing_that_was_durable_is_copied_again() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    nasty::ordinary(&w.src, 150, 20);
    let whole = |dst: &Path| -> BTreeMap<Vec<u8>, (u64, i64, i64)> {
        let all = compare::manifest_without_content(dst);
        // Nothing in a directory that is not populated counts.
        let counts = |p: &[u8]| {
            let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(p);
            let above = Path::new(path).ancestors().skip(1);
            !above.into_iter().any(|d| is_unpopulated(&dst.join(d)))
        };
        let whole = all.entries().filter(|(p, e)| {
            !e.has_xattr(MARK)
                && e.kind == rustix::fs::FileType::RegularFile
                && !p.starts_with(CONTROL.as_bytes())
                && counts(p)
        });
        whole
            .map(|(p, _)| {
                let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(p);
                let m = dst.join(path).symlink_metadata().unwrap();
                (p.to_vec(), (m.ino(), m.ctime(), m.ctime_nsec()))
            })
            .collect()
    };
    let mut total = 0;
    for round in 0..4 {
        let m = w.mount();
        let end = Instant::now() + LIMIT;
        let goal = (round + 1) * 500;
        while Instant::now() < end
            && m.status()["files_pulled"].as_u64().unwrap_or(0) + total < goal
        {
            if m.status()["state"] == "COMPLETE" {
                break;
            }
        }
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        total = whole(&w.dst).len() as u64;
    }
    let before = whole(&w.dst);
    assert!(!before.is_empty(), "nothing was durable after four kills");
    let m = w.mount();
    m.wait_complete();
    let pulled = m.status()["files_pulled"].as_u64().unwrap();
    let left = 3000 - before.len() as u64;
    assert!(pulled <= left, "{pulled} files pulled, {left} were left");
    m.finish();
    w.expect_finished_copy();
    let after = whole(&w.dst);
    for (path, was) in &before {
        assert_eq!(
            Some(was),
            after.get(path),
            "{} was touched again",
            compare::show(path)
        );
    }
}

/// A daemon that waits for itself when it is killed never ends: its /dev/fuse stays open. It takes its
/// mount off when it is told to end, so a kill soon after that must find it waiting for nobody.
#[test]
fn a_kill_soon_after_the_end_was_asked_for_ends_the_daemon() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::write(w.src.join("file"), b"file").unwrap();
    for round in 0..12 {
        let mut m = w.mount_lazy();
        assert_eq!(fs::read(m.path("file")).unwrap(), b"file");
        raw::kill(m.pid, libc::SIGTERM);
        std::thread::sleep(Duration::from_micros(round * 150));
        raw::kill(m.pid, libc::SIGKILL);
        assert!(m.wait_exit(LIMIT).is_some(), "round {round}");
        wait_dead(&w.at);
    }
}

/// Power cuts by scripts/crash/powercut.sh: what it said.
fn power_cuts(what: &str, states: u32, env: &[(&str, &str)]) -> Option<Output> {
    let able = can_mount_on("ext4")
        && can_mount_on("xfs") // Holds the states.
        && need(kit("powercut.py").is_some(), "powercut.py of the test kit")
        && need(find_program("python3").is_some(), "python3");
    if !able {
        return None;
    }
    // In memory if possible: each state is synced again and again.
    let shm = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let scratch = shm.unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/crash/powercut.sh");
    let mut command = Command::new(script);
    command
        .arg(states.to_string())
        .env("WHAT", what)
        .env("MIRRORFS", mirrorfs().get_program())
        .env(
            "MIRRORFS_KIT",
            kit("powercut.py").unwrap().parent().unwrap(),
        )
        .env("TMPDIR", scratch.path())
        .envs([("FS", "ext4"), ("SECONDS_EACH", "15")])
        .envs(env.iter().copied());
    Some(run_for(&mut command, Duration::from_secs(500)))
}

#[track_caller]
fn expect_none_bad(said: &Output, none: bool) {
    let told = said.out.lines().any(|l| l == "0 bad states in all");
    assert_eq!(told, none, "{}", said.out);
}

/// How many states: more when everything is tested.
fn some_states() -> u32 {
    if tests_all() { 30 } else { 4 }
}

#[test]
fn power_cuts_lose_nothing_of_what_programs_were_promised() {
    if let Some(out) = power_cuts("mix", some_states(), &[("MIX", "mail sql log")]) {
        expect_none_bad(&out.expect_code(0), true);
    }
}

/// What counts as here never had a mark: only its directory's says that it is to be believed.
#[test]
fn power_cuts_lose_nothing_that_was_written_into_adopted_files() {
    if let Some(out) = power_cuts("adopt", some_states(), &[]) {
        expect_none_bad(&out.expect_code(0), true);
    }
}

/// The harness's own test: one rule is broken, and it says so.
#[test]
fn power_cuts_see_that_a_rule_is_broken() {
    if !need(cfg!(feature = "fault"), "the feature fault") {
        return;
    }
    if let Some(out) = power_cuts("mount", 3, &[("MIRRORFS_BREAK", "D7")]) {
        let out = out.expect_code(0);
        assert!(out.out.contains("rule D7 was broken"), "{}", out.out);
        expect_none_bad(&out, false);
    }
}

#[test]
fn a_chain_of_directories_on_btrfs_is_done_without_a_syncfs_for_each_of_them() {
    if !can_mount_on("btrfs") {
        return;
    }
    let w = World::on("btrfs");
    let deepest = w.src.join("d/".repeat(40));
    fs::create_dir_all(&deepest).unwrap();
    fs::write(deepest.join("file"), b"data").unwrap();
    let m = w.mount_with(&["--log-level", "debug"], &[]);
    m.wait_complete();
    let log = m.log();
    let rounds = log.matches("synced").count();
    m.finish();
    w.expect_finished_copy();
    // Two or three, and more where the walker is held up: not one for each level.
    assert!((1..20).contains(&rounds), "{rounds} rounds: {log}");
}
