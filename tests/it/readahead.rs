//! What comes in front of who reads a large pending file in order: many pieces at once where src is slow,
//! nothing for anybody else, and never a wrong byte or an error that nobody has asked for.
//!
//! Src is slow by rule; what hangs is counted, not timed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime};

use crate::badsource::{BadSrc, NOT_YET, apart, entries, errno, expect_copy, world};
use crate::fixture::{LIMIT, Mounted, World, bytes, mirrorfs, run, wait_until};
use crate::raw;

const SIZE: usize = (24 << 20) + 12_345;
const MIB: usize = 1 << 20;
/// Around the page cache: else the kernel keeps who opens a file of src waiting for its pages that hang.
const DIRECT: &str = "path=* op=read short=1M";
/// Every read of src waits.
const SLOW: &str = "path=f op=read delay=0.02";
/// What is asked for here is not answered: nobody comes so far by himself.
const HANGS: &str = "path=f op=read off=4M-64M hang";
/// The kernel's own readahead in the mount, which counts as the reader. The smallest window reaches further.
const KERNEL: usize = MIB / 4;

fn fill(bad: &BadSrc) {
    bad.write("f", &bytes(6, SIZE));
}

/// A mount that pulls nothing of a large file but what is asked for.
fn lazy(w: &World) -> Mounted {
    let m = w.mount_with(&["-o", "large=64K", "--no-background"], &[]);
    run(mirrorfs().arg("pause").arg(&m.at)).expect_code(0);
    m
}

fn resume(m: &Mounted) {
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
}

/// Reads in order, as `cat` does.
#[track_caller]
fn read_on(f: &File, from: usize, to: usize, want: &[u8]) {
    let mut part = vec![0; 64 << 10];
    for at in (from..to).step_by(part.len()) {
        f.read_exact_at(&mut part, at as u64).unwrap();
        assert!(part == want[at..][..part.len()], "wrong bytes at {at}");
    }
}

/// How often a rule has acted.
#[track_caller]
fn acted(bad: &BadSrc, rule: &str) -> u32 {
    let list = bad.tell("list");
    let line = list.lines().find(|l| l.ends_with(rule)).unwrap();
    let count = line.split("acted ").nth(1).unwrap();
    count.split_whitespace().next().unwrap().parse().unwrap()
}

/// Nothing hangs any more.
fn let_go(bad: &BadSrc) {
    bad.tell("off");
    // On a busy machine one of many may not look in time.
    (0..3).for_each(|_| drop(bad.tell("release")));
}

/// A reader is half of what is ahead of him away from what hangs.
fn with_jobs_in_flight(bad: &BadSrc, m: &Mounted) -> File {
    let f = File::open(m.path("f")).unwrap();
    read_on(&f, 0, 4 * MIB - KERNEL, &bytes(6, SIZE));
    wait_until("a job ahead", LIMIT, || acted(bad, HANGS) > 0);
    f
}

#[test]
pub(crate) fn a_reader_in_order_has_many_pieces_asked_for_at_once_on_a_slow_source() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    // Each job opens the file.
    const OPENS: &str = "path=f op=open hang";
    bad.start(&[DIRECT, SLOW]);
    let m = lazy(&w);
    // Though the background is paused: it is for somebody who reads.
    let (f, all) = (File::open(m.path("f")).unwrap(), bytes(6, SIZE));
    read_on(&f, 0, 8 * MIB, &all);
    bad.tell(&format!("add {OPENS}"));
    let rest = apart(move || read_on(&f, 8 * MIB, SIZE - SIZE % MIB, &all));
    // Without that two units at the most: the kernel's readahead in the mount.
    let some = Duration::from_secs(20);
    wait_until("jobs at once", some, || acted(&bad, OPENS) >= 4);
    assert!(rest.recv_timeout(NOT_YET).is_err(), "it hangs");
    // Nor more than a window; and he waits for what is on its way, and asks for none of it again.
    assert!(acted(&bad, OPENS) <= 12, "{}", bad.tell("list"));
    let_go(&bad);
    rest.recv_timeout(LIMIT).unwrap();
    assert_eq!(entries(&m).len(), 0);
    resume(&m);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn the_window_ends_at_the_end_of_the_file_and_all_of_it_comes_by_reading() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    bad.start(&[DIRECT, SLOW]);
    let m = lazy(&w);
    assert!(fs::read(m.path("f")).unwrap() == bytes(6, SIZE));
    // The jobs are in dst as any range is; nothing but the file's own bytes was asked for.
    let here = || fs::read(w.dst.join("f")).unwrap() == bytes(6, SIZE);
    wait_until("all ranges in dst", LIMIT, here);
    resume(&m);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn nothing_is_asked_for_ahead_of_who_reads_here_and_there() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    bad.start(&[DIRECT, SLOW]);
    let m = lazy(&w);
    let (f, want) = (File::open(m.path("f")).unwrap(), bytes(6, SIZE));
    // Forwards in steps, and here and there, each in a unit of its own.
    let places = [1, 3, 5, 7, 9, 22, 11, 20, 13, 18];
    for at in places.map(|n| n * MIB + 5000) {
        read_on(&f, at, at + 1, &want);
    }
    std::thread::sleep(NOT_YET);
    let pulled = w.dst.join("f").metadata().unwrap().blocks() * 512;
    assert!(pulled <= places.len() as u64 * (256 << 10), "{pulled}");
    // Two units in order are not yet a reader in order.
    read_on(&f, 0, MIB / 4, &want);
    std::thread::sleep(NOT_YET);
    let more = w.dst.join("f").metadata().unwrap().blocks() * 512 - pulled;
    assert!(more <= 3 * (256 << 10), "{more}");
}

#[test]
pub(crate) fn a_bad_block_ahead_hurts_nobody_who_does_not_ask_for_it() {
    const BAD: &str = "path=f op=read off=4325376-4329472 err=EIO";
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    bad.start(&[DIRECT, BAD, SLOW]);
    let m = lazy(&w);
    let (f, want) = (File::open(m.path("f")).unwrap(), bytes(6, SIZE));
    read_on(&f, 0, 4 * MIB - KERNEL, &want);
    wait_until("the bad block was met", LIMIT, || acted(&bad, BAD) > 0);
    // The kernel tries its pages one by one; nobody tries the job again, or all tries are over.
    let mut tries = 0;
    while std::mem::replace(&mut tries, acted(&bad, BAD)) != tries {
        std::thread::sleep(3 * NOT_YET);
    }
    assert_eq!(entries(&m), Vec::<serde_json::Value>::new());
    assert_eq!(m.status()["errors"], 0);
    // Nor is it a file that is known to have bad blocks, whose bytes are read past dst.
    read_on(&f, 12 * MIB, 12 * MIB + 1, &want);
    wait_until("it is in dst", Duration::from_secs(10), || {
        let raw = File::open(w.dst.join("f")).unwrap();
        let mut there = vec![0; 4096];
        raw.read_exact_at(&mut there, 12 * MIB as u64).unwrap();
        there == want[12 * MIB..][..4096]
    });
    // Who asks for it hears of it, as ever; and what is behind it comes.
    let mut page = [0; 4096];
    let asked = f.read_exact_at(&mut page, 4_325_376);
    assert_eq!(errno(asked), libc::EIO);
    wait_until("the ledger", LIMIT, || entries(&m).len() == 1);
    read_on(&f, 5 * MIB, 5 * MIB + 1, &want);
    bad.tell("off");
    drop(f);
    resume(&m);
    run(mirrorfs().arg("errors").arg("--retry").arg(&m.at)).expect_code(0);
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    expect_copy(&bad, &w);
}

/// A change of a file while jobs ahead of a reader hang; what it is then.
type Change = (&'static str, fn(&Path), fn(Vec<u8>) -> Vec<u8>);

fn rw(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn new() -> Vec<u8> {
    bytes(9, 2 * MIB)
}

const CHANGES: [Change; 5] = [
    (
        "written into",
        |path| rw(path).write_all_at(&new(), 5 * MIB as u64).unwrap(),
        |mut all| {
            all[5 * MIB..7 * MIB].copy_from_slice(&new());
            all
        },
    ),
    (
        "written in part",
        |path| rw(path).write_all_at(b"user", 6_000_001).unwrap(),
        |mut all| {
            all[6_000_001..6_000_005].copy_from_slice(b"user");
            all
        },
    ),
    (
        "cut",
        |path| rw(path).set_len(5_000_001).unwrap(),
        |all| all[..5_000_001].to_vec(),
    ),
    (
        "cut and extended",
        |path| {
            rw(path).set_len(5_000_001).unwrap();
            rw(path).set_len(7_000_000).unwrap();
        },
        |all| {
            let mut all = all[..5_000_001].to_vec();
            all.resize(7_000_000, 0);
            all
        },
    ),
    (
        "truncated by open",
        |path| fs::write(path, new()).unwrap(),
        |_| new(),
    ),
];

#[test]
pub(crate) fn a_change_while_jobs_ahead_are_in_flight_gives_the_users_bytes() {
    for (what, change, then) in CHANGES {
        eprintln!("{what}");
        let Some((mut bad, w)) = world(fill) else {
            return;
        };
        bad.start(&[DIRECT, HANGS, SLOW]);
        let m = lazy(&w);
        let f = with_jobs_in_flight(&bad, &m);
        let path = m.path("f");
        let changed: Receiver<()> = apart(move || change(&path));
        // It may have to wait for what is being pulled into the same place.
        std::thread::sleep(Duration::from_millis(200));
        let_go(&bad);
        changed.recv_timeout(LIMIT).unwrap();
        let want = then(bytes(6, SIZE));
        assert!(fs::read(m.path("f")).unwrap() == want, "{what}: read");
        drop(f);
        resume(&m);
        m.wait_complete();
        assert!(fs::read(m.path("f")).unwrap() == want, "{what}: complete");
        m.finish();
        assert!(fs::read(w.dst.join("f")).unwrap() == want, "{what}: dst");
        w.expect_no_trace();
    }
}

#[test]
pub(crate) fn a_file_that_is_deleted_or_another_in_src_while_jobs_ahead_are_in_flight_is_right() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    // Deleted: an open file lives on.
    bad.start(&[DIRECT, HANGS, SLOW]);
    let m = lazy(&w);
    let f = with_jobs_in_flight(&bad, &m);
    fs::remove_file(m.path("f")).unwrap();
    let all = bytes(6, SIZE);
    let rest = apart(move || read_on(&f, 4 * MIB - KERNEL, 12 * MIB, &all));
    let_go(&bad);
    rest.recv_timeout(LIMIT).unwrap();
    m.unmount();
    bad.end(&w);
    // Another by now: what came ahead of the old one counts for nothing.
    bad.start(&[DIRECT, HANGS, SLOW]);
    let m = lazy(&w);
    let f = with_jobs_in_flight(&bad, &m);
    let path = bad.real.join("f");
    let dir = File::open(&bad.real).unwrap();
    let was = dir.metadata().unwrap().modified().unwrap();
    fs::write(bad.real.join("new"), bytes(7, SIZE)).unwrap();
    fs::rename(bad.real.join("new"), &path).unwrap();
    rw(&path).set_modified(SystemTime::UNIX_EPOCH).unwrap();
    dir.set_modified(was).unwrap();
    let_go(&bad);
    drop(f);
    resume(&m);
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn a_daemon_that_is_killed_while_jobs_ahead_are_in_flight_leaves_nothing_wrong() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    bad.start(&[DIRECT, HANGS, SLOW]);
    let m = lazy(&w);
    let f = with_jobs_in_flight(&bad, &m);
    raw::kill(m.pid, libc::SIGKILL);
    let_go(&bad);
    drop(f);
    m.kill();
    let m = lazy(&w);
    let f = File::open(m.path("f")).unwrap();
    read_on(&f, 3 * MIB, 8 * MIB, &bytes(6, SIZE));
    drop(f);
    resume(&m);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn nothing_is_asked_for_ahead_while_src_is_away_and_reading_goes_on_when_it_is_back() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    bad.start(&[DIRECT, HANGS, SLOW]);
    let m = lazy(&w);
    let f = with_jobs_in_flight(&bad, &m);
    // The kernel asks once more for a page that it could not read, but not for this one.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT);
    let direct = options.open(m.path("f")).unwrap();
    let all = bytes(6, SIZE);
    let rest = apart(move || read_on(&direct, 4 * MIB - KERNEL, 12 * MIB, &all));
    assert!(rest.recv_timeout(NOT_YET).is_err(), "it hangs");
    bad.die();
    wait_until("src is away", LIMIT, || m.status()["src_away"].is_string());
    assert!(rest.recv_timeout(NOT_YET).is_err(), "there is no src");
    assert_eq!(entries(&m).len(), 0);
    bad.come_back();
    drop(f);
    rest.recv_timeout(LIMIT).unwrap();
    assert_eq!(entries(&m).len(), 0);
    resume(&m);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn who_reads_in_order_does_not_wait_for_other_files_that_hang() {
    const OTHERS: &str = "path=h* op=read off=1M-2M hang";
    let Some((mut bad, w)) = world(|bad| {
        fill(bad);
        for n in 0..20 {
            bad.write(&format!("h{n:02}"), &bytes(n, 2 * MIB));
        }
    }) else {
        return;
    };
    bad.start(&[DIRECT, OTHERS, SLOW]);
    let m = w.mount_with(&["-o", "large=64K", "--no-background"], &[]);
    // Their rest follows in the background, which has all of its buffers there.
    for n in 0..20 {
        let mut page = [0; 4096];
        let h = File::open(m.path(format!("h{n:02}"))).unwrap();
        h.read_exact_at(&mut page, 0).unwrap();
    }
    wait_until("other files that hang", LIMIT, || acted(&bad, OTHERS) > 0);
    let mut hung = 0;
    while std::mem::replace(&mut hung, acted(&bad, OTHERS)) != hung {
        std::thread::sleep(2 * NOT_YET);
    }
    let (f, all) = (File::open(m.path("f")).unwrap(), bytes(6, SIZE));
    let read = apart(move || read_on(&f, 0, SIZE - SIZE % MIB, &all));
    let read = read.recv_timeout(Duration::from_secs(40));
    let_go(&bad);
    assert!(read.is_ok(), "he waits for a buffer that others have");
    m.finish();
    expect_copy(&bad, &w);
}
