//! Files that src cannot give whole: what can be read of them is kept in dst, whatever becomes of src and of
//! the daemon; never zeros, never two versions.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::badsource::{self, BadSrc, bad_pages, entries, errno, expect_copy};
use crate::crash::{FAULT_EXIT, is_dead};
use crate::fixture::{Hold, LIMIT, Mounted, World, bytes, mirrorfs, run, wait_until};
use crate::raw;

pub(crate) const PAGE: usize = 4096;
pub(crate) const SMALL: usize = 600_001;
/// cap_net_raw=ep.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const FAIL: &[&str] = &["--on-error", "fail", "--source-timeout", "2s"];
pub(crate) const LARGE: usize = (12 << 20) + 123;

/// A file, and the pages of it that cannot be read.
pub(crate) type Bad<'a> = (&'a str, usize, &'a [usize]);

/// The first page, some in the middle, many, and an odd tail.
const FILES: &[Bad<'_>] = &[
    ("small", SMALL, &[0, 100]),
    ("tail", SMALL, &[146]),
    ("large", LARGE, &[0, 1000, 1001, 2000, 3072]),
    (
        "many",
        1_000_000,
        &[3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 100, 101, 102, 140],
    ),
    ("none", 10_000, &[0, 1, 2]),
];

pub(crate) fn content(size: usize) -> Vec<u8> {
    bytes(size as u64, size)
}

/// The rules that make these pages bad; pages that touch are one range.
pub(crate) fn rules(files: &[Bad<'_>]) -> Vec<String> {
    let ranges = |(name, size, pages): &Bad<'_>| -> Vec<String> {
        let rule = |(from, to): &(u64, u64)| format!("path={name} op=read off={from}-{to} err=EIO");
        ranges(*size, pages).iter().map(rule).collect()
    };
    files.iter().flat_map(ranges).collect()
}

pub(crate) fn ranges(size: usize, pages: &[usize]) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        let (from, to) = (page * PAGE, ((page + 1) * PAGE).min(size));
        match all.last_mut() {
            Some(last) if last.1 == from as u64 => last.1 = to as u64,
            _ => all.push((from as u64, to as u64)),
        }
    }
    all
}

pub(crate) fn world_of(files: &[Bad<'_>]) -> Option<(BadSrc, World)> {
    let (mut bad, w) = badsource::world(|bad| {
        for (name, size, _) in files {
            bad.write(name, &content(*size));
            let file = File::options().write(true).open(bad.real.join(name));
            let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_300_000_000);
            file.unwrap().set_modified(old).unwrap();
            if *name == "small" {
                // What every write into it takes away.
                let (at, none) = (bad.real.join(name), rustix::fs::XattrFlags::empty());
                rustix::fs::setxattr(at, "security.capability", CAPABILITY, none).unwrap();
            }
        }
    })?;
    let rules = rules(files);
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    bad.start(&rules);
    Some((bad, w))
}

pub(crate) fn told(m: &Mounted, name: &str) -> Option<Value> {
    let all = entries(m);
    let entry = all.iter().find(|e| e["path"] == name);
    entry.and_then(|e| e.get("ranges").cloned())
}

/// The background has found all that cannot be read, and nothing else.
#[track_caller]
pub(crate) fn wait_told(m: &Mounted, files: &[Bad<'_>]) {
    for (name, size, pages) in files {
        let want = json!(ranges(*size, pages));
        wait_until("the ledger has what is bad", LIMIT, || {
            told(m, name).as_ref() == Some(&want)
        });
    }
}

#[track_caller]
pub(crate) fn expect_salvaged(m: &Mounted, (name, size, pages): Bad<'_>) {
    assert_eq!(bad_pages(&m.path(name), &content(size)), pages, "{name}");
    let meta = m.path(name).metadata().unwrap();
    assert_eq!(
        (meta.len(), meta.mtime()),
        (size as u64, 1_300_000_000),
        "{name}"
    );
}

pub(crate) fn retry(m: &Mounted) {
    run(mirrorfs().arg("errors").arg(&m.at).arg("--retry")).expect_code(0);
}

/// Whole again: the ledger is empty, and dst equal to src.
#[track_caller]
pub(crate) fn expect_whole(bad: &BadSrc, w: &World, m: Mounted) {
    wait_until("an empty ledger", LIMIT, || {
        retry(&m);
        thread::sleep(Duration::from_millis(200));
        m.status()["errors"] == 0
    });
    m.finish();
    expect_copy(bad, w);
}

/// The ledger has told of all of them, then the daemon was killed.
fn told_and_killed() -> Option<(BadSrc, World)> {
    let (bad, w) = world_of(FILES)?;
    let m = w.mount();
    wait_told(&m, FILES);
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    Some((bad, w))
}

#[test]
pub(crate) fn what_can_be_read_of_a_bad_file_is_here_when_src_is_dead() {
    let Some((mut bad, w)) = told_and_killed() else {
        return;
    };
    // The next daemon has no src.
    let m = w.mount_with(FAIL, &[]);
    bad.die();
    for file in FILES {
        expect_salvaged(&m, *file);
    }
    // Again without a daemon between.
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    bad.come_back();
    let m = w.mount();
    expect_whole(&bad, &w, m);
}

#[test]
pub(crate) fn both_names_of_a_bad_file_have_what_can_be_read() {
    const OF: Bad<'_> = ("a", SMALL, &[17]);
    let Some((mut bad, w)) = world_of(&[OF]) else {
        return;
    };
    bad.die();
    bad.unmount();
    fs::hard_link(bad.real.join("a"), bad.real.join("b")).unwrap();
    let rules: Vec<String> = ["a", "b"]
        .iter()
        .flat_map(|n| rules(&[(n, OF.1, OF.2)]))
        .collect();
    bad.start(&rules.iter().map(String::as_str).collect::<Vec<_>>());
    let m = w.mount();
    wait_until("the ledger has what is bad", LIMIT, || {
        ["a", "b"]
            .iter()
            .any(|name| told(&m, name) == Some(json!(ranges(OF.1, OF.2))))
    });
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    let m = w.mount_with(FAIL, &[]);
    bad.die();
    for name in ["a", "b"] {
        expect_salvaged(&m, (name, OF.1, OF.2));
        assert_eq!(m.path(name).metadata().unwrap().nlink(), 2);
    }
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    bad.come_back();
    expect_whole(&bad, &w, w.mount());
}

/// copy_file_range(2) until nothing is left, or it fails: where, and why.
fn copied(from: &File, to: &File, range: std::ops::Range<u64>) -> (u64, Option<i32>) {
    let (mut a, mut b) = (range.start, range.start);
    while a < range.end {
        let left = (range.end - a) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut a), to, Some(&mut b), left) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => return (a, Some(e.raw_os_error())),
        }
    }
    (a, None)
}

#[test]
pub(crate) fn copy_file_range_gives_what_can_be_read_of_a_bad_file_and_fails_at_the_exact_place() {
    const OF: &[Bad<'_>] = &[("small", SMALL, &[100])];
    for known in [true, false] {
        let Some((bad, w)) = world_of(OF) else {
            return;
        };
        let m = match known {
            true => w.mount(),
            false => w.mount_lazy(),
        };
        if known {
            wait_told(&m, OF);
        }
        let (from, to) = (rw(&m, "small"), File::create_new(m.path("copy")).unwrap());
        let (size, page) = (SMALL as u64, PAGE as u64);
        let bad_page = (100 * page, Some(libc::EIO));
        assert_eq!(copied(&from, &to, 0..size), bad_page, "known: {known}");
        let behind = 101 * page..size;
        assert_eq!(copied(&from, &to, behind), (size, None), "known: {known}");
        let mut want = content(SMALL);
        want[100 * PAGE..101 * PAGE].fill(0);
        assert!(fs::read(m.path("copy")).unwrap() == want, "known: {known}");
        // And into it: the bytes that are missing.
        let (patch, mut want) = (bytes(5, PAGE), content(SMALL));
        want[100 * PAGE..101 * PAGE].copy_from_slice(&patch);
        let other = rw(&m, "copy");
        other.write_all_at(&patch, 100 * page).unwrap();
        let all = 100 * page..101 * page;
        assert_eq!(copied(&other, &from, all), (101 * page, None), "{known}");
        assert!(fs::read(m.path("small")).unwrap() == want, "known: {known}");
        drop((from, to, other));
        if !known {
            run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        }
        wait_until("an empty ledger", LIMIT, || {
            retry(&m);
            thread::sleep(Duration::from_millis(100));
            m.status()["errors"] == 0
        });
        m.finish();
        assert!(fs::read(w.dst.join("small")).unwrap() == want);
        drop(bad);
    }
}

pub(crate) fn rw(m: &Mounted, name: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(m.path(name)).unwrap()
}

#[test]
pub(crate) fn what_a_user_writes_over_bad_pages_makes_the_file_whole() {
    const OF: &[Bad<'_>] = &[("small", SMALL, &[0, 100]), ("large", LARGE, &[5, 2000])];
    let Some((_bad, w)) = world_of(OF) else {
        return;
    };
    let m = w.mount();
    wait_told(&m, OF);
    let mut wanted = Vec::new();
    for (name, size, pages) in OF {
        let mut all = content(*size);
        let file = rw(&m, name);
        // A part of what cannot be read needs the rest of it.
        let part = file.write_all_at(b"x", (pages[1] * PAGE + 7) as u64);
        assert_eq!(errno(part), libc::EIO, "{name}");
        for page in *pages {
            let new = bytes(*page as u64 + 7, PAGE);
            file.write_all_at(&new, (page * PAGE) as u64).unwrap();
            all[page * PAGE..][..PAGE].copy_from_slice(&new);
        }
        // And a part of one that is here.
        file.write_all_at(b"user", 20_000).unwrap();
        all[20_000..20_004].copy_from_slice(b"user");
        wanted.push((name, all));
    }
    wait_until("an empty ledger", LIMIT, || {
        retry(&m);
        thread::sleep(Duration::from_millis(100));
        m.status()["errors"] == 0
    });
    m.finish();
    for (name, all) in wanted {
        assert!(fs::read(w.dst.join(name)).unwrap() == all, "{name}");
        let changed = w.dst.join(name).metadata().unwrap().mtime();
        assert!(changed > 1_600_000_000, "{name}: {changed}");
    }
}

/// What a user has changed of a bad file is his, after a kill too, and nobody gives it up.
#[test]
pub(crate) fn a_bad_file_that_a_user_has_changed_is_not_given_up() {
    const OF: &[Bad<'_>] = &[("small", SMALL, &[0, 100]), ("cut", LARGE, &[5, 2000])];
    let Some((mut bad, w)) = world_of(OF) else {
        return;
    };
    let m = w.mount();
    wait_told(&m, OF);
    let new = bytes(3, 3 * PAGE);
    rw(&m, "small")
        .write_all_at(&new, (40 * PAGE) as u64)
        .unwrap();
    rw(&m, "cut").set_len(9_000_001).unwrap();
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    let mut m = w.mount_with(FAIL, &[]);
    let refused = run(mirrorfs().arg("finish").arg(&m.at).arg("--accept-loss")).expect_code(23);
    assert!(
        refused.err.contains("users have changed"),
        "{}",
        refused.err
    );
    bad.die();
    let mut small = content(SMALL);
    small[40 * PAGE..][..3 * PAGE].copy_from_slice(&new);
    assert_eq!(bad_pages(&m.path("small"), &small), [0, 100]);
    let cut = &content(LARGE)[..9_000_001];
    assert_eq!(bad_pages(&m.path("cut"), cut), [5, 2000]);
    assert_eq!(m.path("cut").metadata().unwrap().len(), 9_000_001);
    assert!(m.runs());
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    bad.come_back();
    let m = w.mount();
    wait_until("an empty ledger", LIMIT, || {
        retry(&m);
        thread::sleep(Duration::from_millis(200));
        m.status()["errors"] == 0
    });
    m.finish();
    assert!(fs::read(w.dst.join("small")).unwrap() == small);
    assert!(fs::read(w.dst.join("cut")).unwrap() == cut);
}

/// The bytes of one version, of another size or not, and its times.
#[test]
pub(crate) fn a_bad_file_that_is_another_in_src_is_pulled_again_whole() {
    const OF: &[Bad<'_>] = &[
        ("grows", SMALL, &[0, 100]),
        ("shrinks", LARGE, &[5, 2000]),
        ("same", SMALL, &[3]),
        ("late", 1_000_000, &[9]),
    ];
    let sizes = [LARGE, SMALL, SMALL, 2_000_000];
    let Some((mut bad, w)) = world_of(OF) else {
        return;
    };
    let mut m = w.mount();
    wait_told(&m, OF);
    let new = |n: usize| bytes(1000 + n as u64, sizes[n]);
    for (n, (name, ..)) in OF.iter().enumerate() {
        if *name == "late" {
            // While nobody looks; and there it has a bad page too.
            raw::kill(m.pid, libc::SIGKILL);
            m.kill();
            bad.die();
            bad.unmount();
            bad.write(name, &new(n));
            bad.start(&["path=late op=read off=409600-413696 err=EIO"]);
            m = w.mount();
        } else {
            bad.write(name, &new(n));
            retry(&m);
        }
        if *name == "late" {
            wait_until("the ledger has what is bad", LIMIT, || {
                retry(&m);
                thread::sleep(Duration::from_millis(300));
                told(&m, name) == Some(json!([[409_600, 413_696]]))
            });
            assert_eq!(bad_pages(&m.path(name), &new(n)), [100], "{name}");
            bad.tell("off");
        } else {
            wait_until("it is the new one", LIMIT, || {
                let page = read_page(&m, name, 50);
                page.is_ok_and(|page| page == new(n)[50 * PAGE..][..PAGE])
            });
            let len = m.path(name).metadata().unwrap().len();
            assert_eq!(len, sizes[n] as u64, "{name}");
        }
    }
    expect_whole(&bad, &w, m);
}

pub(crate) fn read_page(m: &Mounted, name: &str, page: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE];
    File::open(m.path(name))?.read_exact_at(&mut bytes, (page * PAGE) as u64)?;
    Ok(bytes)
}

/// As it was accepted: the good bytes, the full size, src's times, holes; what has nothing good is not there.
#[track_caller]
fn expect_given_up(w: &World, said: &str) {
    w.expect_no_trace();
    let report = said.lines().find_map(|l| l.strip_prefix("report: "));
    let report: Value =
        serde_json::from_str(&fs::read_to_string(report.unwrap()).unwrap()).unwrap();
    let kept = report["not_whole"].as_array().unwrap();
    assert_eq!(kept.len(), FILES.len() - 1, "{report:#}");
    for (name, size, pages) in FILES {
        let path = w.dst.join(name);
        if pages.len() * PAGE >= *size {
            assert!(!path.exists(), "{name}");
            continue;
        }
        let entry = kept.iter().find(|e| e["path"] == *name).unwrap();
        assert_eq!(entry["ranges"], json!(ranges(*size, pages)), "{name}");
        let mut all = content(*size);
        for (from, to) in ranges(*size, pages) {
            all[from as usize..to as usize].fill(0);
        }
        assert!(fs::read(&path).unwrap() == all, "{name}");
        let (meta, lost) = (path.metadata().unwrap(), pages.len() as u64 * 8);
        assert_eq!(
            (meta.len(), meta.mtime()),
            (*size as u64, 1_300_000_000),
            "{name}"
        );
        assert!(
            meta.blocks() <= (*size as u64).div_ceil(4096) * 8 - lost + 64,
            "{name}"
        );
    }
}

fn given_up(live: bool) {
    let Some((mut bad, w)) = world_of(FILES) else {
        return;
    };
    let mut m = w.mount();
    wait_told(&m, FILES);
    run(mirrorfs().arg("finish").arg(&m.at)).expect_code(23);
    for (name, ..) in FILES {
        run(mirrorfs()
            .args(["errors", "--accept-loss", name])
            .arg(&m.at))
        .expect_code(0);
    }
    // The disk dies wholly.
    bad.die();
    let said = match live {
        true => {
            let open = File::open(m.path("small")).unwrap();
            let said = run(mirrorfs().arg("finish").arg(&m.at)).expect_code(23);
            // Whoever has it open sees what is in dst.
            let mut page = vec![1; PAGE];
            open.read_exact_at(&mut page, (5 * PAGE) as u64).unwrap();
            assert!(page == content(SMALL)[5 * PAGE..][..PAGE]);
            drop(open);
            m.wait_exit(LIMIT);
            said
        }
        false => {
            raw::kill(m.pid, libc::SIGKILL);
            m.kill();
            rustix::mount::unmount(&w.at, rustix::mount::UnmountFlags::DETACH).unwrap();
            run(mirrorfs().arg("finish").arg(&w.dst)).expect_code(23)
        }
    };
    expect_given_up(&w, &said.out);
}

#[test]
pub(crate) fn what_can_be_read_stays_when_the_rest_is_given_up() {
    given_up(true);
}

#[test]
pub(crate) fn what_can_be_read_stays_when_the_rest_is_given_up_without_a_daemon() {
    given_up(false);
}

#[test]
fn an_exit_while_the_rest_is_given_up_loses_nothing_that_could_be_read() {
    for n in ["1", "3"] {
        let Some((mut bad, w)) = told_and_killed() else {
            return;
        };
        rustix::mount::unmount(&w.at, rustix::mount::UnmountFlags::DETACH).unwrap();
        bad.die();
        let finish = || {
            let mut command = mirrorfs();
            command.args(["finish", "--accept-loss"]).arg(&w.dst);
            command
        };
        let fault = format!("salvage-given:{n}");
        run(finish().env("MIRRORFS_FAULT", fault)).expect_code(FAULT_EXIT);
        run(&mut finish()).expect_code(23);
        w.expect_no_trace();
        for (name, size, pages) in &FILES[..4] {
            let mut all = content(*size);
            for (from, to) in ranges(*size, pages) {
                all[from as usize..to as usize].fill(0);
            }
            assert!(fs::read(w.dst.join(name)).unwrap() == all, "{n}: {name}");
        }
    }
}

/// What the pages of a file show: each is of the version, or cannot be read.
fn is_of(m: &Mounted, name: &str, all: &[u8], pages: &[usize]) -> bool {
    (0..all.len().div_ceil(PAGE)).all(|page| {
        let from = page * PAGE;
        let mut got = vec![0; PAGE.min(all.len() - from)];
        let file = File::open(m.path(name)).unwrap();
        match file.read_exact_at(&mut got, from as u64) {
            Ok(()) => got == all[from..][..got.len()],
            Err(e) => e.raw_os_error() == Some(libc::EIO) && pages.contains(&page),
        }
    })
}

const OF: &[Bad<'_>] = &[
    ("kept", LARGE, &[0, 1000, 3072]),
    ("users", SMALL, &[3, 100]),
    ("other", SMALL, &[5, 7]),
];

/// Whether the daemon has told of everything, or is dead.
fn is_told_or_dead(m: &mut Mounted) -> bool {
    let out = run(mirrorfs().arg("errors").arg(&m.at).arg("--json")).out;
    let lines = out.lines().filter_map(|l| serde_json::from_str(l).ok());
    let lines: Vec<Value> = lines.collect();
    let told = |(name, size, pages): &Bad<'_>| {
        let found = lines.iter().find(|e| e["path"] == *name);
        found.is_some_and(|e| e["ranges"] == json!(ranges(*size, pages)))
    };
    OF.iter().all(told) || !m.runs()
}

/// One whole page, durable if that can be.
fn write_page(m: &Mounted, page: usize, new: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(m.path("users"))?;
    file.write_all_at(new, (page * PAGE) as u64)?;
    file.sync_all()
}

/// Exits at the n-th passage of a point; the next daemon goes on. False when it was not met.
fn exit_at(point: &str, n: u32) -> bool {
    let Some((mut bad, w)) = world_of(OF) else {
        return true;
    };
    let fault = format!("{point}:{n}");
    let mut m = w.mount_with(&[], &[("MIRRORFS_FAULT", &fault)]);
    wait_until("all is told", LIMIT, || is_told_or_dead(&mut m));
    let (new, other) = (bytes(11, PAGE), bytes(12, LARGE));
    let written = write_page(&m, 40, &new);
    let lost = written.as_ref().err();
    assert!(lost.is_none_or(is_dead), "{fault}: {written:?}");
    bad.write("other", &other);
    run(mirrorfs().arg("errors").arg(&m.at).arg("--retry")); // It may be dead.
    let end = std::time::Instant::now() + Duration::from_secs(3);
    while m.runs() && std::time::Instant::now() < end {
        thread::sleep(Duration::from_millis(50));
    }
    let met = !m.runs();
    match met {
        true => assert_eq!(m.wait_exit(LIMIT), Some(FAULT_EXIT), "{fault}: {}", m.log()),
        false => raw::kill(m.pid, libc::SIGKILL),
    }
    drop(m);
    let m = w.mount_with(FAIL, &[]);
    let kept = content(LARGE);
    assert!(is_of(&m, "kept", &kept, &[0, 1000, 3072]), "{fault}: kept");
    let mut users = content(SMALL);
    let page = read_page(&m, "users", 40).unwrap();
    let old = &mut users[40 * PAGE..][..PAGE];
    assert!(
        page == new || page == *old && written.is_err(),
        "{fault}: users"
    );
    old.copy_from_slice(&page);
    assert!(is_of(&m, "users", &users, &[3, 100]), "{fault}: users");
    wait_until("the new one is there", LIMIT, || {
        retry(&m);
        is_of(&m, "other", &other, &[5, 7])
    });
    bad.tell("off");
    wait_until("an empty ledger", LIMIT, || {
        retry(&m);
        thread::sleep(Duration::from_millis(200));
        m.status()["errors"] == 0
    });
    m.finish();
    w.expect_no_trace();
    for (name, all) in [("kept", &kept), ("users", &users), ("other", &other)] {
        assert!(
            fs::read(w.dst.join(name)).unwrap() == *all,
            "{fault}: {name}"
        );
    }
    bad.die();
    met
}

/// Exits at the first passage of each point, or also at the second.
fn exit_at_each(passages: u32) {
    let points = mirrorfs::sys::fault::POINTS.iter();
    // That of the end has a test of its own.
    let points = points.filter(|p| p.starts_with("salvage") && **p != "salvage-given");
    for point in points {
        for n in 1..=passages {
            let met = exit_at(point, n);
            assert!(met || n > 1, "{point} was never met");
        }
    }
}

#[test]
fn an_exit_at_each_point_of_a_bad_file_loses_nothing() {
    exit_at_each(2);
}

/// For other file systems than ext4.
pub(crate) fn an_exit_at_each_point_once_loses_nothing() {
    exit_at_each(1);
}

#[test]
fn a_file_that_became_whole_while_a_reader_met_its_bad_pages_is_in_no_ledger() {
    let files = [("f", SMALL, &[0][..])];
    let Some((bad, w)) = world_of(&files) else {
        return;
    };
    let hold = Hold::at(&w, "salvage-bad");
    let m = w.mount_with(&["--no-background", "-o", "large=64K"], &hold.env());
    let late = badsource::read_apart(m.path("f"));
    hold.wait_met();
    // SRC is mended, and all of the file comes before that reader's failure is told.
    bad.tell("off");
    // A copy that was under way when it was mended may still fail.
    wait_until("whole", LIMIT, || {
        run(mirrorfs().arg("pull").arg(m.path("f")));
        m.status()["files_pulled"] == 1
    });
    hold.let_go();
    let late = late.recv_timeout(LIMIT).unwrap();
    assert!(late.is_err() || late.unwrap() == content(SMALL));
    assert_eq!(entries(&m), Vec::<Value>::new());
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}
