//! A bad source: one that dies, hangs, lies and comes back (docs/FAULTS.md). SRC is a FUSE view that
//! misbehaves by rule; a rule that is off is the control.

use std::cell::Cell;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use serde_json::Value;

use crate::compare;
use crate::fixture::{
    LIMIT, LoopFs, Mounted, World, bytes, can_mount_on, find_program, kit, mirrorfs, need, run,
    wait_until,
};
use crate::raw;

/// How long something that must not happen is waited for.
pub(crate) const NOT_YET: Duration = Duration::from_millis(700);

/// A view of `real` that misbehaves on demand, at `at`.
pub(crate) struct BadSrc {
    pub(crate) real: PathBuf,
    pub(crate) at: PathBuf,
    ctl: PathBuf,
    child: Option<Child>,
}

impl BadSrc {
    pub(crate) fn new(fs: &LoopFs) -> BadSrc {
        let (real, at) = (fs.dir("real"), fs.dir("bad"));
        let ctl = fs.path().join("ctl");
        BadSrc {
            real,
            at,
            ctl,
            child: None,
        }
    }

    /// Mounts the view. Rules come after `--rule`.
    #[track_caller]
    pub(crate) fn start(&mut self, rules: &[&str]) {
        self.start_with(rules, &[]);
    }

    /// As `start`, and the kernel may cache names and attributes for an hour.
    #[track_caller]
    pub(crate) fn start_cached(&mut self, rules: &[&str]) {
        self.start_with(rules, &["--cache", "3600"]);
    }

    #[track_caller]
    fn start_with(&mut self, rules: &[&str], more: &[&str]) {
        let script = kit("badsrc.py").unwrap();
        let mut command = Command::new("python3");
        command.arg(script).arg(&self.real).arg(&self.at);
        command.args(more);
        command.arg("--ctl").arg(&self.ctl);
        for rule in rules {
            command.args(["--rule", rule]);
        }
        command.stdin(Stdio::null());
        self.child = Some(raw::die_with_parent(&mut command).spawn().unwrap());
        let probe = self.at.clone();
        // The socket of a view before this one may still have its name: nobody listens there.
        wait_until("the bad source", LIMIT, || {
            crate::fixture::fuse_mount_at(&probe).is_some()
                && rustix::fs::statvfs(&probe).is_ok()
                && UnixStream::connect(&self.ctl).is_ok()
        });
    }

    /// One of its commands: `add RULE`, `del N`, `release`, ...
    #[track_caller]
    pub(crate) fn tell(&self, command: &str) -> String {
        let mut stream = UnixStream::connect(&self.ctl).unwrap();
        stream.write_all(command.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(!answer.starts_with("error"), "{command}: {answer}");
        answer
    }

    /// kill -9: every call on the view is ENOTCONN from now on.
    pub(crate) fn die(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// The dead view is unmounted and mounted anew.
    #[track_caller]
    pub(crate) fn come_back(&mut self) {
        self.unmount();
        self.start(&[]);
    }

    pub(crate) fn unmount(&self) {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }

    /// Both are as they were before `start`, for another round of a test.
    #[track_caller]
    pub(crate) fn end(&mut self, w: &World) {
        self.die();
        self.unmount();
        w.empty_dst();
    }

    pub(crate) fn write(&self, name: &str, data: &[u8]) {
        let path = self.real.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
}

impl Drop for BadSrc {
    fn drop(&mut self) {
        self.die();
        // Dead, or gone already.
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
    }
}

thread_local! {
    /// What the worlds of this thread's test are on.
    static KIND: Cell<&'static str> = const { Cell::new("ext4") };
}

/// Runs a test on another file system than ext4.
pub(crate) fn on(kind: &'static str, test: fn()) {
    KIND.set(kind);
    test();
    KIND.set("ext4");
}

/// A bad source with a tree, and a world whose src it is.
pub(crate) fn world(fill: impl FnOnce(&BadSrc)) -> Option<(BadSrc, World)> {
    let kind = KIND.get();
    let able = can_mount_on(kind)
        && need(kit("badsrc.py").is_some(), "badsrc.py of the test kit")
        && need(find_program("python3").is_some(), "python3");
    if !able {
        return None;
    }
    let fs = LoopFs::new(kind);
    let bad = BadSrc::new(&fs);
    fill(&bad);
    let w = World::from(bad.at.clone(), fs.dir("dst"), vec![fs]);
    Some((bad, w))
}

/// Does something in a thread; the answer comes when it comes.
pub(crate) fn apart<T: Send + 'static>(
    act: impl FnOnce() -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        // A test that has failed does not listen any more.
        let _ = tell.send(act());
    });
    told
}

pub(crate) fn read_apart(path: PathBuf) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    apart(move || fs::read(path))
}

fn is_away(m: &Mounted) -> bool {
    let status = m.status();
    status["state"] == "DEGRADED" && status["src_away"].is_string()
}

/// The ledger.
pub(crate) fn entries(m: &Mounted) -> Vec<Value> {
    let text = m.errors();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

/// docs/FAULTS.md promises what is tested, and nothing else.
#[test]
fn every_row_of_the_fault_matrix_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/FAULTS.md")).unwrap();
    let mut rows = 0;
    for line in text
        .lines()
        .filter(|l| l.starts_with("| ") && l.contains("::"))
    {
        let last = line.trim_end_matches('|').rsplit('|').next().unwrap();
        for test in last.split(',').map(|t| t.trim().trim_matches('`')) {
            let (module, name) = test.split_once("::").unwrap_or_else(|| panic!("{line}"));
            let file = fs::read_to_string(root.join(format!("tests/it/{module}.rs")));
            let (file, it) = (file.unwrap_or_default(), format!("fn {name}()"));
            let has = file
                .lines()
                .any(|l| l.trim_start_matches("pub(crate) ").starts_with(&it));
            assert!(
                has,
                "docs/FAULTS.md names {test}, and there is no such test"
            );
            rows += 1;
        }
    }
    assert!(rows > 4, "docs/FAULTS.md: {rows} tests");
}

#[track_caller]
pub(crate) fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it worked"),
        Err(e) => e.raw_os_error().unwrap(),
    }
}

#[track_caller]
pub(crate) fn expect_copy(bad: &BadSrc, w: &World) {
    w.expect_no_trace();
    compare::expect_equal(&compare::manifest(&bad.real), &compare::manifest(&w.dst));
}

pub(crate) fn tree(bad: &BadSrc) {
    for n in 0..30_u64 {
        bad.write(&format!("d{}/f{n}", n % 3), &bytes(n, 3000 + n as usize));
    }
    bad.write("large", &bytes(99, 9 << 20));
    bad.write("top", &bytes(98, 70_000));
}

#[test]
pub(crate) fn who_needs_a_source_that_died_waits_until_it_is_back() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&[]);
    let m = w.mount_lazy();
    // Names of the top and of d0 are known, d1 was never looked at, and large is read by range.
    assert_eq!(fs::read(m.path("d0/f0")).unwrap(), bytes(0, 3000));
    let mut large = fs::File::open(m.path("large")).unwrap();
    bad.die();
    let file = read_apart(m.path("d0/f3"));
    let list = m.path("d1");
    let list = apart(move || fs::read_dir(list).map(Iterator::count));
    let range = apart(move || {
        let mut all = Vec::new();
        large.read_to_end(&mut all).map(|_| all)
    });
    wait_until("DEGRADED", LIMIT, || is_away(&m));
    assert!(m.status()["src_away_since_unix"].as_u64().unwrap() > 0);
    assert_eq!(m.status()["waiting"], 3, "{:#}", m.status());
    thread::sleep(NOT_YET);
    assert!(file.try_recv().is_err() && list.try_recv().is_err() && range.try_recv().is_err());
    // What is in dst already needs no src.
    assert_eq!(fs::read(m.path("d0/f0")).unwrap(), bytes(0, 3000));
    bad.come_back();
    assert_eq!(file.recv_timeout(LIMIT).unwrap().unwrap(), bytes(3, 3003));
    assert_eq!(list.recv_timeout(LIMIT).unwrap().unwrap(), 10);
    assert_eq!(
        range.recv_timeout(LIMIT).unwrap().unwrap(),
        bytes(99, 9 << 20)
    );
    wait_until("no longer DEGRADED", LIMIT, || !is_away(&m));
    assert_eq!(
        entries(&m),
        Vec::<Value>::new(),
        "an outage is no entry's failure"
    );
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn with_on_error_fail_an_access_ends_and_the_next_one_works_when_src_is_back() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&[]);
    let args = [
        "--no-background",
        "--on-error",
        "fail",
        "--source-timeout",
        "1s",
    ];
    let m = w.mount_with(&args, &[]);
    assert_eq!(fs::read_dir(m.path("d0")).unwrap().count(), 10);
    bad.die();
    let begun = Instant::now();
    let file = read_apart(m.path("d0/f3"));
    let list = m.path("d1");
    let list = apart(move || fs::read_dir(list).map(Iterator::count));
    assert_eq!(errno(file.recv_timeout(LIMIT).unwrap()), libc::EIO);
    assert_eq!(errno(list.recv_timeout(LIMIT).unwrap()), libc::EIO);
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(900), "{took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(is_away(&m));
    // It has been away for longer than anybody waits.
    let begun = Instant::now();
    assert_eq!(errno(fs::read(m.path("d0/f6"))), libc::EIO);
    eprintln!(
        "the first access ended after {took:?}, a later one after {:?}",
        begun.elapsed()
    );
    bad.come_back();
    wait_until("back", LIMIT, || !is_away(&m));
    assert_eq!(fs::read(m.path("d0/f3")).unwrap(), bytes(3, 3003));
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
fn the_background_goes_on_when_its_source_is_back() {
    let Some((mut bad, w)) = world(|bad| {
        for n in 0..600_u64 {
            bad.write(&format!("d{}/f{n}", n % 20), &bytes(n, 2000));
        }
        bad.write("large", &bytes(1, 20 << 20));
    }) else {
        return;
    };
    bad.start(&["path=large rate=1M"]);
    let m = w.mount();
    wait_until("some files", LIMIT, || {
        m.status()["files_pulled"].as_u64().unwrap() > 40
    });
    bad.die();
    wait_until("DEGRADED", LIMIT, || is_away(&m));
    assert_eq!(m.status()["background"], "waits for src");
    // What needs somebody hides nothing of how far it is.
    let meanwhile = m.status()["meanwhile"].as_str().unwrap().to_owned();
    assert!(
        ["WALKING", "MIGRATING"].contains(&meanwhile.as_str()),
        "{meanwhile}"
    );
    let page = run(mirrorfs().arg("status").arg(&m.at)).expect_code(0).out;
    let shown = format!("   DEGRADED ({meanwhile}), usable");
    assert!(page.lines().next().unwrap().ends_with(&shown), "{page}");
    let script = run(mirrorfs().args(["status", "-H"]).arg(&m.at)).expect_code(0);
    assert_eq!(script.out.split('\t').nth(3), Some("DEGRADED"));
    thread::sleep(NOT_YET);
    bad.come_back();
    m.finish();
    expect_copy(&bad, &w);
}

/// The directory below a mount that is gone is not SRC come back: its emptiness would be taken over.
#[test]
fn the_empty_directory_below_a_source_that_is_gone_is_not_taken_for_it() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&[]);
    let m = w.mount_lazy();
    bad.die();
    bad.unmount();
    let list = m.path("d1");
    let list = apart(move || fs::read_dir(list).map(Iterator::count));
    wait_until("DEGRADED", LIMIT, || is_away(&m));
    thread::sleep(NOT_YET);
    assert!(is_away(&m) && list.try_recv().is_err());
    bad.start(&[]);
    assert_eq!(list.recv_timeout(LIMIT).unwrap().unwrap(), 10);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

/// Whatever one entry answers for ever, while the root answers: a failure of that entry's own.
#[test]
fn a_file_that_fails_for_ever_is_in_the_ledger_and_leaves_it_when_it_works() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    for (name, rule, code) in [
        ("d0/f3", "path=d0/f3 op=open err=ESTALE", libc::ESTALE),
        ("d1/f4", "path=d1/f4 op=open err=EIO", libc::EIO),
        ("d2/f5", "path=d2/f5 op=open err=EACCES", libc::EACCES),
    ] {
        bad.start(&[rule]);
        let m = w.mount();
        assert_eq!(errno(fs::read(m.path(name))), libc::EIO, "{rule}");
        wait_until("all but one", LIMIT, || {
            m.status()["files_pulled"] == 31 && entries(&m).len() == 1
        });
        let entry = entries(&m).remove(0);
        assert_eq!(
            (&entry["path"], &entry["side"]),
            (&name.into(), &"src".into())
        );
        assert_eq!(entry["errno"], code, "{entry}");
        assert!(!is_away(&m), "{:#}", m.status());
        bad.tell("off");
        wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
        m.finish();
        expect_copy(&bad, &w);
        bad.end(&w);
    }
}

#[test]
fn a_name_that_is_listed_and_not_there_is_never_left_out() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&["path=d0/f3 hide"]);
    let m = w.mount();
    wait_until("an entry in the ledger", LIMIT, || !entries(&m).is_empty());
    assert_eq!(entries(&m)[0]["path"], "d0/f3");
    assert_eq!(fs::read_dir(m.path("d0")).unwrap().count(), 10);
    assert_eq!(errno(fs::metadata(m.path("d0/f3"))), libc::EIO);
    // The others of its directory can be read.
    fs::read(m.path("d0/f6")).unwrap();
    assert!(m.status()["state"] != "COMPLETE", "{:#}", m.status());
    run(mirrorfs().arg("finish").arg(&m.at)).expect_code(23);
    bad.tell("off");
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    expect_copy(&bad, &w);
}

/// Reads a file page by page, past the readahead: which pages cannot be read. The others are right.
#[track_caller]
pub(crate) fn bad_pages(path: &Path, want: &[u8]) -> Vec<usize> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::open(path).unwrap();
    let mut bad = Vec::new();
    for (n, want) in want.chunks(4096).enumerate() {
        let mut page = vec![0; want.len()];
        match file.read_exact_at(&mut page, n as u64 * 4096) {
            Ok(()) => assert!(page == want, "page {n} of {} is wrong", path.display()),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO), "page {n}: {e}");
                bad.push(n);
            }
        }
    }
    bad
}

#[test]
fn what_can_be_read_of_a_file_with_bad_blocks_is_read_and_the_rest_is_in_the_ledger() {
    let (small, large) = (bytes(1, 600_000), bytes(2, 12 << 20));
    let filled = world(|bad| {
        bad.write("small", &small);
        bad.write("large", &large);
        bad.write("good", b"good");
    });
    let Some((mut bad, w)) = filled else { return };
    // Block 100 of the one, 2000 and 2001 of the other.
    bad.start(&[
        "path=small op=read off=409600-413696 err=EIO",
        "path=large op=read off=8192000-8200192 err=EIO",
    ]);
    let m = w.mount();
    assert_eq!(bad_pages(&m.path("small"), &small), [100]);
    assert_eq!(bad_pages(&m.path("large"), &large), [2000, 2001]);
    assert_eq!(fs::read(m.path("good")).unwrap(), b"good");
    // A program that reads from the start meets the error, not the end.
    assert_eq!(errno(fs::read(m.path("small"))), libc::EIO);
    assert_eq!(fs::metadata(m.path("small")).unwrap().len(), 600_000);
    let ranges = |name: &str| {
        let all = entries(&m);
        let of = |e: &&Value| e["path"] == name && e["ranges"].is_array();
        all.iter().find(of).map(|e| e["ranges"].clone())
    };
    // Those that the background finds, when it is through with the file.
    let bad_small = serde_json::json!([[409_600, 413_696]]);
    let bad_large = serde_json::json!([[8_192_000, 8_200_192]]);
    wait_until("the ledger has what is bad", LIMIT, || {
        ranges("small").as_ref() == Some(&bad_small) && ranges("large").as_ref() == Some(&bad_large)
    });
    bad.tell("off");
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    assert_eq!(bad_pages(&m.path("small"), &small), [0_usize; 0]);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn finish_waives_what_was_given_up_by_path_and_nothing_else() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&[
        "path=d0/f3 op=open err=EACCES",
        "path=d1/f4 op=read err=EIO",
        "path=d2/f5 op=open err=EACCES",
    ]);
    let mut m = w.mount();
    let done = |left: usize| {
        let all = run(mirrorfs().arg("errors").arg(&w.at).arg("-0")).out;
        all.matches('\0').count() == left
    };
    wait_until("all but three", LIMIT, || {
        m.status()["files_pulled"] == 29 && done(3)
    });
    let lose = |path: &str| {
        run(mirrorfs()
            .args(["errors", "--accept-loss", path])
            .arg(&w.at))
    };
    lose("d0/typo").expect_code(1);
    lose("d0/f3").expect_code(0);
    let finish = || run(mirrorfs().arg("finish").arg(&w.at));
    let refused = finish().expect_code(23);
    assert!(refused.err.contains("2 entries"), "{}", refused.err);
    lose("d1/f4").expect_code(0);
    // The third is mended, and tried again at once.
    bad.tell("del 2");
    run(mirrorfs().args(["errors", "--retry"]).arg(&w.at)).expect_code(0);
    wait_until("the third", Duration::from_secs(20), || {
        done(2) && m.status()["files_pulled"] == 30
    });
    let listed = run(mirrorfs().arg("errors").arg(&w.at)).expect_code(0).out;
    assert_eq!(listed.matches(", given up").count(), 2, "{listed}");
    let entry = entries(&m).remove(0);
    assert!(entry["attempts"].as_u64().unwrap() > 1, "{entry}");
    assert!(entry["first_unix"].as_u64() <= entry["time_unix"].as_u64());
    let finished = finish().expect_code(23);
    let report = finished
        .out
        .lines()
        .find_map(|l| l.strip_prefix("report: "));
    let report = fs::read_to_string(report.unwrap()).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["lost"].as_array().unwrap().len(), 2, "{report:#}");
    m.wait_exit(LIMIT);
    w.expect_no_trace();
    // Missing, not empty and not zeros.
    for lost in ["d0/f3", "d1/f4"] {
        assert!(!w.dst.join(lost).exists());
    }
    assert_eq!(fs::read(w.dst.join("d2/f5")).unwrap(), bytes(5, 3005));
}

fn p99(mut all: Vec<Duration>) -> Duration {
    all.sort();
    all[all.len() * 99 / 100]
}

/// 1,000 operations on hydrated files, each timed.
fn operations(m: &Mounted) -> Vec<Duration> {
    (0..1000_u64)
        .map(|n| {
            let path = m.path(format!("d{}/f{}", n % 3, n % 30));
            let begun = Instant::now();
            match n % 4 {
                0 => drop(fs::metadata(&path).unwrap()),
                1 => drop(fs::OpenOptions::new().append(true).open(&path).unwrap()),
                _ => assert!(fs::read(&path).unwrap().len() >= 3000),
            }
            begun.elapsed()
        })
        .collect()
}

#[test]
pub(crate) fn a_file_that_hangs_delays_nobody_who_does_not_wait_for_it() {
    let filled = world(|bad| {
        tree(bad);
        for n in 0..100 {
            bad.write(&format!("hung/f{n}"), &bytes(n, 5000));
            bad.write(&format!("asked/d{n}/f"), &bytes(n, 500));
            bad.write(&format!("stuck/f{n}"), &bytes(n, 700));
        }
        bad.write("more/a", b"a");
    });
    let Some((mut bad, w)) = filled else { return };
    bad.start(&[]);
    let m = w.mount_with(&["--no-background", "--source-timeout", "2s"], &[]);
    for n in 0..30_u64 {
        let path = m.path(format!("d{}/f{n}", n % 3));
        assert_eq!(fs::read(path).unwrap(), bytes(n, 3000 + n as usize));
    }
    let without = p99(operations(&m));
    assert_eq!(fs::read_dir(m.path("hung")).unwrap().count(), 100);
    assert_eq!(fs::read_dir(m.path("asked")).unwrap().count(), 100);
    assert_eq!(fs::read_dir(m.path("stuck")).unwrap().count(), 100);
    // The ring keeps a file that hangs when it is opened or read. No ring asks for a name or an xattr: a
    // thread does, and more of those hang than the pool has, or sessions.
    bad.tell("add path=hung/* op=read,open hang");
    bad.tell("add path=asked/*/f op=lookup hang");
    bad.tell("add path=stuck/* op=lookup,getxattr hang");
    let hung: Vec<_> = (0..100)
        .map(|n| read_apart(m.path(format!("hung/f{n}"))))
        .collect();
    let asked: Vec<_> = (0..100)
        .map(|n| read_apart(m.path(format!("asked/d{n}/f"))))
        .collect();
    let stuck: Vec<_> = (0..100)
        .map(|n| read_apart(m.path(format!("stuck/f{n}"))))
        .collect();
    wait_until("300 wait", LIMIT, || m.status()["waiting"] == 300);
    thread::sleep(Duration::from_millis(300));
    let with = p99(operations(&m));
    eprintln!("p99 of 1,000 operations: {without:?}, while 300 accesses hang {with:?}");
    // What is not here yet comes too, and writers and new files do not wait.
    let more = read_apart(m.path("more/a")).recv_timeout(LIMIT);
    assert_eq!(more.expect("a thread for it").unwrap(), b"a");
    let top = read_apart(m.path("top")).recv_timeout(LIMIT);
    assert_eq!(top.expect("a worker for it").unwrap(), bytes(98, 70_000));
    fs::write(m.path("d0/new"), b"new").unwrap();
    fs::remove_file(m.path("d0/new")).unwrap();
    assert!(!is_away(&m), "some names are not src: {:#}", m.status());
    assert!(
        hung.iter()
            .chain(&asked)
            .chain(&stuck)
            .all(|h| h.try_recv().is_err())
    );
    bad.tell("off");
    bad.tell("release");
    for (all, len) in [(hung, 5000), (asked, 500), (stuck, 700)] {
        for (n, told) in all.into_iter().enumerate() {
            let read = told.recv_timeout(LIMIT).unwrap();
            assert_eq!(read.unwrap(), bytes(n as u64, len));
        }
    }
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    w.expect_no_trace();
}

#[test]
pub(crate) fn the_background_leaves_what_hangs_and_comes_back_for_it() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&["path=d1/f4 op=read hang", "path=d2/f5 op=read err=EIO"]);
    let m = w.mount_with(&["--source-timeout", "2s"], &[]);
    wait_until("all but two", LIMIT, || {
        m.status()["files_pulled"] == 30 && entries(&m).len() == 2
    });
    let all = entries(&m);
    let waits = all.iter().find(|e| e["path"] == "d1/f4").unwrap();
    assert_eq!(waits["call"], "wait");
    assert_eq!(waits["errno"], libc::ETIMEDOUT);
    // What failed is tried again although the other hangs.
    bad.tell("del 1");
    wait_until("the one that failed", LIMIT, || {
        m.status()["files_pulled"] == 31 && entries(&m).len() == 1
    });
    bad.tell("off");
    bad.tell("release");
    wait_until("an empty ledger", LIMIT, || entries(&m).is_empty());
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn a_source_that_hangs_keeps_no_daemon_from_ending() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&[]);
    let mut m = w.mount_lazy();
    assert_eq!(fs::read_dir(m.path("d0")).unwrap().count(), 10);
    bad.tell("add path=d0/f3 op=read hang");
    // A file hangs in a copy worker's ring, a directory keeps a thread of the pool, and another one the
    // walker's.
    let asks = |program: &str, path: &str| {
        let mut command = Command::new(program);
        command.arg(m.path(path)).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        raw::die_with_parent(&mut command).spawn().unwrap()
    };
    let copied = asks("cat", "d0/f3");
    wait_until("one is read", LIMIT, || {
        let listed = bad.tell("list");
        listed.lines().any(|l| l.contains("acted 1"))
    });
    bad.tell("add path=* op=open,read,lookup,getattr hang");
    let waiting = [copied, asks("ls", "d1")];
    wait_until("two wait", LIMIT, || m.status()["waiting"] == 2);
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    thread::sleep(NOT_YET);
    run(Command::new("umount").arg("-l").arg(&m.at)).expect_code(0);
    let begun = Instant::now();
    // They are the last who have something open in the mount.
    for mut child in waiting {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(m.wait_exit(Duration::from_secs(60)), Some(20));
    eprintln!("the daemon ended after {:?}", begun.elapsed());
    bad.tell("release");
}
