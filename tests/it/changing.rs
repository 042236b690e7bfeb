//! A source that changes while it is copied, or answers a little at a time (docs/FAULTS.md): what was
//! copied meanwhile is copied again, and no reader meets zeros or an early end.

use std::cell::{Cell, RefCell};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::badsource::{BadSrc, apart, entries, errno, expect_copy, world};
use rustix::fs::{Advice, fadvise};

use crate::fixture::{Hold, LIMIT, World, bytes, can_mount, mirrorfs, over, run, wait_until};
use crate::raw;

const LARGE: usize = 3 << 20;
const SMALL: usize = 20_000;

/// A name for it, and the change itself.
type Change = (&'static str, fn(&Path));

fn append(path: &Path) {
    let mut file = File::options().append(true).open(path).unwrap();
    file.write_all(&bytes(8, 100_000)).unwrap();
}

fn cut(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 3).unwrap();
}

/// Other bytes, the size and even the mtime as they were.
fn rewrite(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let was = file.metadata().unwrap();
    file.write_all_at(&bytes(9, was.len() as usize), 0).unwrap();
    file.set_modified(was.modified().unwrap()).unwrap();
}

/// As an editor does it. The directory's own time is not what is looked at here.
fn replace(path: &Path) {
    let new = path.with_extension("new");
    let dir = File::open(path.parent().unwrap()).unwrap();
    let was = dir.metadata().unwrap().modified().unwrap();
    fs::write(&new, bytes(7, fs::metadata(path).unwrap().len() as usize)).unwrap();
    fs::rename(&new, path).unwrap();
    dir.set_modified(was).unwrap();
}

const CHANGES: [Change; 4] = [
    ("grows", append),
    ("shrinks", cut),
    ("is rewritten", rewrite),
    ("is replaced", replace),
];

fn fill(bad: &BadSrc) {
    bad.write("large", &bytes(1, LARGE));
    bad.write("small", &bytes(2, SMALL));
    bad.write("other", b"other");
}

/// The first read hangs; the last part of the large file's.
const HANGS: [(&str, &str); 2] = [
    ("large", "path=large op=read off=2M-3M hang"),
    ("small", "path=small op=read hang"),
];

#[track_caller]
fn wait_for_hang(bad: &BadSrc) {
    wait_until("a read that hangs", LIMIT, || {
        !bad.tell("list").contains("acted 0")
    });
}

/// Lets the reads go on that hang, and no other hang.
fn let_go(bad: &BadSrc) {
    bad.tell("off");
    bad.tell("release");
}

type Copy<'a> = &'a mut dyn FnMut(&mut BadSrc, &World, &str, &dyn Fn(&BadSrc));

/// For each file and change, in a world of its own: the change comes while `copy` is under way.
#[track_caller]
fn each(mut copy: impl FnMut(&mut BadSrc, &World, &str, &dyn Fn(&BadSrc))) {
    each_of(&HANGS, &CHANGES, BadSrc::start, &mut copy);
}

/// Likewise, and what the kernel has cached of the file says nothing of it. Not of small files: they are read in
/// one piece.
#[track_caller]
fn each_behind_a_cache(mut copy: impl FnMut(&mut BadSrc, &World, &str, &dyn Fn(&BadSrc))) {
    // What was replaced is found by its name, which is cached too.
    let changes = &CHANGES[..3];
    each_of(&HANGS[..1], changes, BadSrc::start_cached, &mut copy);
}

#[track_caller]
fn each_of(
    hangs: &[(&str, &str)],
    changes: &[Change],
    start: fn(&mut BadSrc, &[&str]),
    copy: Copy<'_>,
) {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    for (name, rule) in hangs {
        for (what, change) in changes {
            eprintln!("{name} {what}");
            start(&mut bad, &[rule]);
            copy(&mut bad, &w, name, &|bad| {
                wait_for_hang(bad);
                change(&bad.real.join(name));
                let_go(bad);
            });
            expect_copy(&bad, &w);
            bad.end(&w);
            fill(&bad);
        }
    }
}

#[test]
fn a_file_that_changes_while_the_background_copies_it_is_copied_again() {
    each(in_background);
}

fn in_background(bad: &mut BadSrc, w: &World, _: &str, change: &dyn Fn(&BadSrc)) {
    let m = w.mount();
    change(bad);
    m.finish();
}

#[test]
fn a_file_that_changes_while_somebody_waits_for_it_is_copied_again() {
    each(for_who_waits);
}

fn for_who_waits(bad: &mut BadSrc, w: &World, name: &str, change: &dyn Fn(&BadSrc)) {
    let m = w.mount_lazy();
    let path = m.path(name);
    let read = apart(move || fs::read(path));
    change(bad);
    // All of it is of one time, and that is the later one.
    let got = read.recv_timeout(LIMIT).unwrap().unwrap();
    assert!(got == fs::read(bad.real.join(name)).unwrap(), "{name}");
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
}

#[test]
fn a_file_that_changes_behind_what_the_kernel_has_cached_of_it_is_copied_again() {
    each_behind_a_cache(in_background);
    each_behind_a_cache(for_who_waits);
    each_behind_a_cache(by_sync);
}

#[test]
fn a_file_that_changes_while_a_range_of_it_is_read_shows_no_zeros() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    let (name, rule) = HANGS[0];
    for (what, change) in CHANGES {
        eprintln!("{name} {what}");
        let old = bytes(1, LARGE);
        bad.start(&[rule]);
        let m = w.mount_with(&["--no-background", "-o", "large=1M"], &[]);
        let file = File::open(m.path(name)).unwrap();
        let at = LARGE - 300_000;
        let read = apart(move || {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, at as u64).map(|()| page)
        });
        wait_for_hang(&bad);
        change(&bad.real.join(name));
        let_go(&bad);
        let new = fs::read(bad.real.join(name)).unwrap();
        match read.recv_timeout(LIMIT).unwrap() {
            Ok(page) => {
                let is = |all: &[u8]| all.get(at..at + 4096) == Some(&page[..]);
                let same = |all: &[u8]| {
                    (0..4096)
                        .filter(|i| all.get(at + i) == Some(&page[*i]))
                        .count()
                };
                assert!(
                    is(&old) || is(&new),
                    "neither the old nor the new bytes: {} of 4096 old, {} new, {} zeros; at {at}, new {}",
                    same(&old),
                    same(&new),
                    page.iter().filter(|b| **b == 0).count(),
                    new.len()
                );
            }
            // The end, where the file has become so short.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => assert!(new.len() <= at),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "{e}"),
        }
        run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
        m.finish();
        expect_copy(&bad, &w);
        bad.end(&w);
        fill(&bad);
    }
}

/// What was pulled before is read from dst, and dst's file becomes shorter under the read: the kernel was told
/// of another size when it asked, and would fill a short answer up with zeros.
#[test]
fn a_read_under_which_the_file_is_copied_as_a_shorter_one_shows_no_zeros() {
    // Over io_uring the thread that is held serves all requests of a CPU, and who starts a program there waits
    // for one of them.
    over("dev", a_read_is_held_while_the_file_gets_shorter);
}

fn a_read_is_held_while_the_file_gets_shorter() {
    if !can_mount() {
        return;
    }
    let w = World::on("ext4");
    let large = w.src.join("large");
    fs::write(&large, bytes(1, LARGE)).unwrap();
    let hold = Hold::at(&w, "read-here");
    // The copy of the whole file takes seconds, and what is read here does not.
    let slow = ["--no-background", "--bwlimit", "256K", "-o", "large=1M"];
    let m = w.mount_with(&slow, &hold.env());
    let file = File::open(m.path("large")).unwrap();
    fadvise(&file, 0, None, Advice::Random).unwrap();
    let read = |file: &File, at: u64| {
        let mut page = vec![0; 4096];
        file.read_exact_at(&mut page, at).map(|()| page)
    };
    // Both are in one piece.
    let (first, second) = (2 << 20, (2 << 20) + 65_536);
    assert!(read(&file, first).unwrap() == bytes(1, LARGE)[first as usize..][..4096]);
    let held = file.try_clone().unwrap();
    let answer = apart(move || read(&held, second));
    hold.wait_met();
    cut(&large);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.wait_complete();
    hold.let_go();
    let answer = answer.recv_timeout(LIMIT).unwrap();
    assert_eq!(errno(answer), libc::EIO);
    // Who opens it now meets its new end.
    let now = File::open(m.path("large")).unwrap();
    let end = read(&now, second).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    drop((file, now));
    m.finish();
    assert!(fs::read(w.dst.join("large")).unwrap() == bytes(1, LARGE)[..LARGE / 3]);
}

/// The kernel fills a short answer of the source's up with zeros, as it does with ours, where it has heard of the
/// file's attributes since it asked: what comes is no file's bytes, and only a later look tells.
#[test]
fn zeros_that_the_kernel_puts_in_the_place_of_what_a_source_lacks_are_shown_to_nobody() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    let (name, rule) = HANGS[0];
    // The copy of the whole file hears nothing of the new size before the range's bytes have come.
    bad.start(&[rule, "path=large op=read off=0-1M hang"]);
    let m = w.mount_with(&["--no-background", "-o", "large=1M"], &[]);
    let file = File::open(m.path(name)).unwrap();
    let read = apart(move || {
        let mut page = vec![0; 4096];
        file.read_exact_at(&mut page, (LARGE - 300_000) as u64)
    });
    // Both, or one: the source's kernel lets nobody open the file while pages of it are read.
    for _ in 0..20 {
        if !bad.tell("list").contains("acted 0") {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let size = |at: &Path| fs::metadata(at.join(name)).unwrap().len();
    assert_eq!(size(&bad.at), LARGE as u64);
    cut(&bad.real.join(name));
    let_go(&bad);
    // The end, where the kernel has heard of the new size before it asks again.
    let failed = read.recv_timeout(LIMIT).unwrap().unwrap_err();
    let is_end = failed.kind() == io::ErrorKind::UnexpectedEof;
    assert!(
        is_end || failed.raw_os_error() == Some(libc::EIO),
        "{failed}"
    );
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

/// As above, of what the copy of the whole file brings, when a user changes the file before that has looked at
/// the source again: the rest of his block would be such zeros for ever.
#[test]
fn zeros_that_have_landed_before_a_user_changes_the_file_are_no_part_of_it() {
    if !(0..8).any(|_| zeros_land_and_a_user_changes_the_file()) {
        panic!("the copy saw the new size each time before it asked for more");
    }
}

/// False: it was not brought about.
fn zeros_land_and_a_user_changes_the_file() -> bool {
    let (name, size) = ("large", 12 << 20);
    let Some((mut bad, w)) = world(|bad| bad.write("large", &bytes(1, 12 << 20))) else {
        return true;
    };
    let old = bytes(1, size);
    // The end of a piece that the copy reads at once.
    bad.start(&["path=large op=read off=6528K-6656K hang"]);
    let m = w.mount_with(&["-o", "large=1M"], &[]);
    wait_for_hang(&bad);
    // The source's kernel hears of its attributes: it has the end for no end then.
    assert_eq!(fs::metadata(bad.at.join(name)).unwrap().len(), size as u64);
    cut(&bad.real.join(name));
    // A hang would not outlive the release.
    bad.tell("add path=large op=read off=6656K-12M delay=4");
    bad.tell("del 0");
    bad.tell("release");
    let reads_on = || {
        let rules = bad.tell("list");
        let mut rules = rules.lines();
        rules.any(|l| l.contains("delay=4") && !l.contains("acted 0"))
    };
    let is_here = || m.status()["files_pulled"] == 1;
    wait_until("a later read", LIMIT, || reads_on() || is_here());
    if is_here() {
        m.finish();
        expect_copy(&bad, &w);
        return false;
    }
    let at = (6528 << 10) + 65_536;
    let path = m.path(name);
    let written = apart(move || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(&[7; 100], at + 1000)
    });
    wait_until("who writes waits", LIMIT, || m.status()["waiting"] == 1);
    bad.tell("off");
    // It works, or fails because the rest of his block is not there any more.
    if let Err(e) = written.recv_timeout(LIMIT).unwrap() {
        assert_eq!(e.raw_os_error(), Some(libc::EIO), "{e}");
    }
    for at in [at, at + 8192, (6528 << 10) + 90_112] {
        let mut page = [0; 4096];
        let file = File::open(m.path(name)).unwrap();
        fadvise(&file, 0, None, Advice::Random).unwrap();
        match file.read_exact_at(&mut page, at) {
            Ok(()) => {
                let is_old = |i: &usize| old[at as usize + i] == page[*i];
                let other = (0..4096).filter(|i| !is_old(i) && page[*i] != 7).count();
                assert_eq!(other, 0, "at {at}: bytes that are nobody's");
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "at {at}: {e}"),
        }
    }
    m.unmount();
    true
}

#[test]
fn a_file_that_changes_while_sync_copies_it_is_told_and_the_next_run_has_it() {
    each(by_sync);
}

fn by_sync(bad: &mut BadSrc, w: &World, _: &str, change: &dyn Fn(&BadSrc)) {
    let sync = || {
        let mut command = mirrorfs();
        command.arg("sync").arg(&w.src).arg(&w.dst);
        command
    };
    let mut first = raw::die_with_parent(&mut sync()).spawn().unwrap();
    change(bad);
    wait_until("sync", LIMIT, || first.try_wait().unwrap().is_some());
    let first = first.wait().unwrap().code();
    // 24: it kept changing, or its bytes are of two times. 0: it was copied again.
    assert!([Some(0), Some(24)].contains(&first), "{first:?}");
    run(&mut sync()).expect_code(0);
}

/// What src says is of another time with every look ends in the ledger, and is tried again.
#[test]
pub(crate) fn a_file_that_never_stops_changing_is_in_the_ledger_until_it_does() {
    for rule in [
        "path=large now",
        "path=large op=read,getattr,open grow=10",
        "path=large op=read eof=1000000",
    ] {
        let Some((mut bad, w)) = world(fill) else {
            return;
        };
        bad.start(&[rule]);
        let m = w.mount();
        wait_until("an entry in the ledger", LIMIT, || !entries(&m).is_empty());
        let entry = entries(&m).remove(0);
        assert_eq!(
            (&entry["path"], &entry["side"]),
            (&"large".into(), &"src".into()),
            "{rule}"
        );
        assert_eq!(entry["call"], "changed", "{rule}: {entry}");
        // Neither a short file nor one with zeros at its end.
        assert_eq!(errno(fs::read(m.path("large"))), libc::EIO, "{rule}");
        assert_eq!(fs::read(m.path("small")).unwrap(), bytes(2, SMALL));
        run(mirrorfs().arg("finish").arg(&m.at)).expect_code(23);
        bad.tell("off");
        run(mirrorfs().args(["errors", "--retry"]).arg(&m.at)).expect_code(0);
        wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
        m.finish();
        expect_copy(&bad, &w);
    }
}

/// The kernel's io_uring asks for the rest of a short answer by itself, and gets the same bytes again.
#[test]
fn a_server_that_answers_a_little_at_a_time_gives_every_byte() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    type Copy = fn(&World);
    let copies: [(&str, Copy); 3] = [
        ("background", |w| w.mount().finish()),
        ("demand", |w| {
            let m = w.mount_with(&["--no-background", "-o", "large=1M"], &[]);
            let file = File::open(m.path("large")).unwrap();
            let mut page = vec![0; 10_000];
            file.read_exact_at(&mut page, 2_000_001).unwrap();
            assert!(page == bytes(1, LARGE)[2_000_001..2_010_001]);
            drop(file);
            assert!(fs::read(m.path("small")).unwrap() == bytes(2, SMALL));
            run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
            m.finish();
        }),
        ("sync", |w| {
            run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(0);
        }),
    ];
    for (what, copy) in copies {
        eprintln!("{what}");
        bad.start(&["path=* short=1111"]);
        copy(&w);
        bad.tell("off");
        expect_copy(&bad, &w);
        bad.end(&w);
    }
}

/// A file whose reads end before its size is no copy of it, and no success.
#[test]
fn sync_takes_no_early_end_for_the_file() {
    let Some((mut bad, w)) = world(fill) else {
        return;
    };
    let sync = || run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst));
    for (name, end) in [("large", "1000000"), ("small", "5000")] {
        bad.start(&[&format!("path={name} op=read eof={end}")]);
        let said = sync().expect_code(23);
        assert!(said.err.contains(name), "{}", said.err);
        assert!(!w.dst.join(name).exists(), "{name}");
        bad.tell("off");
        sync().expect_code(0);
        expect_copy(&bad, &w);
        bad.end(&w);
    }
}

/// A tree `d` with one file, and another one beside the source, which takes its place: a link to a release or
/// a snapshot that is switched. The size is the same, and no ctime tells.
fn two_times(bad: &BadSrc, len: usize) -> PathBuf {
    let (here, aside) = (bad.real.join("d"), bad.real.with_file_name("aside"));
    let time = SystemTime::now();
    for (n, dir) in [&here, &aside].into_iter().enumerate() {
        fs::create_dir(dir).unwrap();
        let file = File::create(dir.join("f")).unwrap();
        file.write_all_at(&bytes(n as u64, len), 0).unwrap();
        let later = time + Duration::from_secs(100 * n as u64);
        file.set_modified(later).unwrap();
        File::open(dir).unwrap().set_modified(time).unwrap();
    }
    // Ctimes count from then on.
    std::thread::sleep(Duration::from_millis(3100));
    aside
}

fn exchange(bad: &BadSrc, aside: &Path) {
    let flags = rustix::fs::RenameFlags::EXCHANGE;
    let (cwd, dir) = (rustix::fs::CWD, bad.real.join("d"));
    // The root's own time is not what is looked at here.
    let root = File::open(&bad.real).unwrap();
    let was = root.metadata().unwrap().modified().unwrap();
    rustix::fs::renameat_with(cwd, &dir, cwd, aside, flags).unwrap();
    root.set_modified(was).unwrap();
}

#[derive(PartialEq, Eq)]
pub(crate) enum Look {
    First,
    /// All names are in dst already.
    Resumed,
}

/// At each look at a file, the one after the other, it becomes another file under the server's hands. What
/// `copy` is given waits for that, and is told when there was none.
#[track_caller]
pub(crate) fn at_each_look(when: Look, mut copy: impl FnMut(&World, &dyn Fn(&dyn Fn() -> bool))) {
    for len in [LARGE, SMALL] {
        let Some((mut bad, w)) = world(|bad| bad.write("other", b"other")) else {
            return;
        };
        let aside = two_times(&bad, len);
        let mut looks = 0;
        let hung = Cell::new(true);
        while hung.replace(false) {
            eprintln!("{len} bytes, behind {looks} looks");
            bad.start(&[]);
            if when == Look::Resumed {
                // What the first daemon knew is gone with it.
                let m = w.mount_lazy();
                fs::metadata(m.path("d/f")).unwrap();
                m.unmount();
            }
            bad.tell(&format!("add path=d/f op=getattr hang after={looks}"));
            copy(&w, &|is_over| {
                let acted = || !bad.tell("list").contains("acted 0");
                wait_until("a look", LIMIT, || acted() || is_over());
                hung.set(acted());
                if hung.get() {
                    exchange(&bad, &aside);
                }
                let_go(&bad);
            });
            expect_copy(&bad, &w);
            bad.end(&w);
            looks += 1;
        }
        assert!(looks > 2, "{len}: {looks}");
    }
}

/// The bytes would be those of the one, size and time the other's, and no later run would see it.
#[test]
fn sync_takes_no_file_for_the_one_that_has_taken_its_place() {
    at_each_look(Look::First, |w, change| {
        let sync = || {
            let mut command = mirrorfs();
            command.arg("sync").arg(&w.src).arg(&w.dst);
            command
        };
        let first = RefCell::new(raw::die_with_parent(&mut sync()).spawn().unwrap());
        change(&|| first.borrow_mut().try_wait().unwrap().is_some());
        let first = first.into_inner().wait().unwrap().code();
        assert!([Some(0), Some(24)].contains(&first), "{first:?}");
        run(&mut sync()).expect_code(0);
    });
}

fn pull(w: &World, change: &dyn Fn(&dyn Fn() -> bool)) {
    let m = w.mount();
    change(&|| m.status()["state"] == "COMPLETE");
    m.finish();
}

#[test]
fn a_mount_takes_no_file_for_the_one_that_has_taken_its_place() {
    at_each_look(Look::First, |w, change| pull(w, change));
}

#[test]
fn a_mount_that_is_resumed_takes_no_file_for_the_one_that_has_taken_its_place() {
    at_each_look(Look::Resumed, |w, change| pull(w, change));
}
