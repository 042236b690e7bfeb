//! `--experimental-native`: dst without a mount while data is still to come (docs/NATIVE.md).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixture::{
    CONTROL, LIMIT, LoopFs, World, bytes, can_mount_on, fuse_mount_at, is_marked, mirrorfs, need,
    run, wait_until,
};
use crate::raw;

/// How long a reader is watched who must not get an answer.
const HANGS: Duration = Duration::from_millis(400);

/// A daemon, and the guard that it started; both are gone after the test.
struct Daemon {
    child: Child,
    guard: Option<u32>,
    dst: PathBuf,
    log: PathBuf,
}

impl Daemon {
    #[track_caller]
    fn start(w: &World, args: &[&str]) -> Daemon {
        let log = w.scratch_path("log");
        let file = File::create(&log).unwrap();
        let mut command = mirrorfs();
        command
            .args(["mount", "-f", "--experimental-native"])
            .args(args);
        command.arg(&w.src).arg(&w.dst).stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = raw::die_with_parent(&mut command).spawn().unwrap();
        Daemon {
            child,
            guard: None,
            dst: w.dst.clone(),
            log,
        }
    }

    /// Waits until users are in the native tree and a guard watches.
    #[track_caller]
    fn native(mut self) -> Daemon {
        let pid = self.child.id();
        wait_until("the mount is gone", LIMIT, || {
            let log = fs::read_to_string(&self.log).unwrap();
            assert!(self.child.try_wait().unwrap().is_none(), "{log}");
            assert!(!log.contains("the mount stays"), "{log}");
            log.contains("native: the mount is gone")
        });
        assert!(fuse_mount_at(&self.dst).is_none());
        self.guard = guard_of(pid);
        assert!(self.guard.is_some());
        self
    }

    #[track_caller]
    fn state(&self) -> String {
        let status = crate::fixture::status(&self.dst);
        assert_eq!(status["errors"], 0, "{status:#}");
        status["state"].as_str().unwrap().to_owned()
    }

    /// Waits until nothing is pending, and finishes.
    #[track_caller]
    fn finish(mut self) {
        wait_until("COMPLETE", LIMIT, || self.state() == "COMPLETE");
        run(mirrorfs().arg("finish").arg(&self.dst)).expect_code(0);
        wait_until("the daemon ends", LIMIT, || {
            self.child.try_wait().unwrap().is_some()
        });
        let guard = self.guard.take().unwrap();
        wait_until("the guard ends", LIMIT, || !is_guard(guard));
    }

    /// kill -9. The guard, which nobody ends any more.
    fn kill(mut self) -> Guard {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Guard(self.guard.take().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
        let _ = self.child.kill(); // It may have ended.
        let _ = self.child.wait();
        drop(self.guard.map(Guard));
    }
}

/// A guard without a daemon; killed in the end.
struct Guard(u32);

impl Drop for Guard {
    fn drop(&mut self) {
        if is_guard(self.0) {
            raw::kill(self.0, libc::SIGKILL);
        }
    }
}

fn is_guard(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains("native-guard"))
}

/// The guard that a daemon has started.
fn guard_of(daemon: u32) -> Option<u32> {
    let parent = format!("PPid:\t{daemon}\n");
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let mut guards = pids.filter(|pid| {
        is_guard(*pid)
            && fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|s| s.contains(&parent))
    });
    guards.next()
}

/// src: files of many sizes in two directories, one of them with a hard link.
fn world(kind: &str) -> Option<World> {
    let have = can_mount_on(kind) && need(kernel() >= (6, 14), "Linux 6.14");
    have.then(|| {
        let w = World::on(kind).over();
        for dir in ["a/deep", "b"] {
            fs::create_dir_all(w.src.join(dir)).unwrap();
        }
        for n in 0..40 {
            fs::write(w.src.join(name(n)), content(n)).unwrap();
        }
        fs::hard_link(w.src.join(name(39)), w.src.join("b/link")).unwrap();
        fs::write(w.src.join("large"), bytes(99, 9 << 20)).unwrap();
        w
    })
}

fn name(n: usize) -> String {
    format!("{}/f{n:02}", ["a/deep", "b"][n % 2])
}

fn content(n: usize) -> Vec<u8> {
    bytes(n as u64, 1 + n * n * 100)
}

fn kernel() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut parts = text.split('.').map(|p| p.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// `cat`, in a process that can be left waiting.
fn cat(path: &Path) -> Child {
    let mut command = Command::new("cat");
    command
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    raw::die_with_parent(&mut command).spawn().unwrap()
}

#[track_caller]
fn expect_waits(reader: &mut Child) {
    let end = Instant::now() + HANGS;
    while Instant::now() < end {
        assert!(reader.try_wait().unwrap().is_none(), "it was let through");
        thread::sleep(Duration::from_millis(10));
    }
}

#[track_caller]
fn output(mut reader: Child) -> Vec<u8> {
    wait_until("cat ends", LIMIT, || reader.try_wait().unwrap().is_some());
    let mut all = Vec::new();
    reader.stdout.take().unwrap().read_to_end(&mut all).unwrap();
    all
}

fn users_work_in_the_native_tree(kind: &str) {
    let Some(w) = world(kind) else { return };
    let before = w.src_state();
    let d = Daemon::start(&w, &["--no-background"]).native();
    let at = |n: usize| w.dst.join(name(n));
    assert!((0..40).all(|n| is_marked(&at(n))), "something was pulled");
    // Reading, by names that src does not know too.
    assert!(fs::read(at(0)).unwrap() == content(0));
    fs::rename(at(1), w.dst.join("b/other")).unwrap();
    assert!(fs::read(w.dst.join("b/other")).unwrap() == content(1));
    fs::rename(w.dst.join("a"), w.dst.join("b/a")).unwrap();
    let at = |n: usize| {
        w.dst
            .join(["b/a/deep", "b"][n % 2])
            .join(format!("f{n:02}"))
    };
    assert!(fs::read(at(2)).unwrap() == content(2));
    let mut middle = [0; 100];
    let large = File::open(w.dst.join("large")).unwrap();
    large.read_exact_at(&mut middle, 5 << 20).unwrap();
    assert_eq!(middle, bytes(99, 9 << 20)[5 << 20..(5 << 20) + 100]);
    // Writing.
    fs::write(at(4), "all new").unwrap();
    let append = OpenOptions::new().append(true).open(at(6));
    append.unwrap().write_all(b"tail").unwrap();
    let middle = OpenOptions::new().write(true).open(at(8));
    middle.unwrap().write_all_at(b"MIDDLE", 1000).unwrap();
    rustix::fs::ftruncate(OpenOptions::new().write(true).open(at(10)).unwrap(), 7).unwrap();
    let by_name = std::ffi::CString::new(at(12).into_os_string().into_encoded_bytes()).unwrap();
    raw::truncate(&by_name, 9).unwrap();
    // What no event tells of.
    let day = rustix::fs::Timespec {
        tv_sec: 1_000_000_000,
        tv_nsec: 1,
    };
    let times = rustix::fs::Timestamps {
        last_access: day,
        last_modification: day,
    };
    let no_flags = rustix::fs::AtFlags::empty();
    rustix::fs::utimensat(rustix::fs::CWD, at(14), &times, no_flags).unwrap();
    std::os::unix::fs::chown(at(16), Some(7), Some(8)).unwrap();
    fs::remove_file(at(18)).unwrap();
    fs::hard_link(at(20), w.dst.join("b/second")).unwrap();
    let outside = w.dst.parent().unwrap().join("outside");
    fs::rename(at(22), &outside).unwrap();
    let read_outside = w.dst.parent().unwrap().join("read-outside");
    fs::rename(at(24), &read_outside).unwrap();
    assert!(fs::read(&read_outside).unwrap() == content(24));
    // The rest comes in the background.
    run(mirrorfs().arg("resume").arg(&w.dst)).expect_code(0);
    d.finish();
    assert!(!w.dst.join(CONTROL).exists());
    w.expect_no_trace();
    w.expect_src_untouched(&before);
    let mut want = content(6);
    want.extend(b"tail");
    assert_eq!(fs::read(at(6)).unwrap(), want);
    assert_eq!(fs::read(at(4)).unwrap(), b"all new");
    let mut want = content(8);
    want[1000..1006].copy_from_slice(b"MIDDLE");
    assert_eq!(fs::read(at(8)).unwrap(), want);
    assert_eq!(fs::read(at(10)).unwrap(), content(10)[..7]);
    assert_eq!(fs::read(at(12)).unwrap(), content(12)[..9]);
    let touched = fs::metadata(at(14)).unwrap();
    assert_eq!((touched.mtime(), touched.mtime_nsec()), (1_000_000_000, 1));
    let owned = fs::metadata(at(16)).unwrap();
    assert_eq!((owned.uid(), owned.gid()), (7, 8));
    assert!(!at(18).exists());
    assert_eq!(fs::metadata(at(20)).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(at(39)).unwrap().nlink(), 2);
    assert!(fs::read(&outside).unwrap() == content(22));
    assert!(!is_marked(&outside) && fs::metadata(&outside).unwrap().nlink() == 1);
    for n in [14, 16, 20, 26, 27, 38, 39] {
        assert!(fs::read(at(n)).unwrap() == content(n), "{n}");
    }
    assert_eq!(fs::read(w.dst.join("large")).unwrap(), bytes(99, 9 << 20));
}

#[test]
fn users_work_in_the_native_tree_on_ext4() {
    users_work_in_the_native_tree("ext4");
}

#[test]
fn users_work_in_the_native_tree_on_xfs() {
    users_work_in_the_native_tree("xfs");
}

#[test]
fn users_work_in_the_native_tree_on_btrfs() {
    users_work_in_the_native_tree("btrfs");
}

#[test]
fn a_killed_daemon_never_shows_zeros_while_the_guard_lives() {
    let Some(w) = world("ext4") else { return };
    let d = Daemon::start(&w, &["--no-background"]).native();
    let at = |n: usize| w.dst.join(name(n));
    assert!(fs::read(at(3)).unwrap() == content(3));
    let guard = d.kill();
    // What is here needs nobody.
    assert!(fs::read(at(3)).unwrap() == content(3));
    fs::write(w.dst.join("new"), "new").unwrap();
    let mut readers: Vec<_> = [5, 7, 9].map(|n| (n, cat(&at(n)))).into();
    readers.iter_mut().for_each(|(_, r)| expect_waits(r));
    fs::rename(at(9), w.dst.join("moved")).unwrap();
    // One who gives up harms nobody.
    readers[0].1.kill().unwrap();
    readers.remove(0).1.wait().unwrap();
    let mut d = Daemon::start(&w, &[]);
    d.guard = Some(guard.0);
    std::mem::forget(guard); // It has its daemon again.
    for (n, reader) in readers {
        assert!(output(reader) == content(n), "{n}");
    }
    assert!(
        fuse_mount_at(&w.dst).is_none(),
        "there was no need for a mount"
    );
    wait_until("it answers", LIMIT, || {
        run(mirrorfs().arg("status").arg(&w.dst)).code() == 0
    });
    d.finish();
    fs::rename(w.dst.join("moved"), at(9)).unwrap();
    fs::remove_file(w.dst.join("new")).unwrap();
    w.expect_no_trace();
    for n in 0..40 {
        assert!(fs::read(at(n)).unwrap() == content(n), "{n}");
    }
}

/// The control: what the guard protects from.
#[test]
fn without_the_guard_a_killed_daemon_lets_zeros_through() {
    let Some(w) = world("ext4") else { return };
    let d = Daemon::start(&w, &["--no-background"]).native();
    let guard = d.kill();
    let mut reader = cat(&w.dst.join(name(5)));
    expect_waits(&mut reader);
    drop(guard);
    assert!(output(reader) == vec![0; content(5).len()]);
    assert!(fs::read(w.dst.join(name(7))).unwrap() == vec![0; content(7).len()]);
    // As after a reboot: the mount comes first, and nothing is lost.
    let d = Daemon::start(&w, &[]).native();
    d.finish();
    w.expect_finished_copy();
}

#[test]
fn a_killed_guard_is_replaced_and_lets_nobody_through() {
    let Some(w) = world("ext4") else { return };
    let mut d = Daemon::start(&w, &["--no-background"]).native();
    let first = d.guard.take().unwrap();
    raw::kill(first, libc::SIGKILL);
    let pid = d.child.id();
    for n in 0..40 {
        match fs::read(w.dst.join(name(n))) {
            Ok(read) => assert!(read == content(n), "{n}"),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "{e}"),
        }
    }
    wait_until("another guard", LIMIT, || {
        d.guard = guard_of(pid).filter(|g| *g != first);
        d.guard.is_some()
    });
    run(mirrorfs().arg("resume").arg(&w.dst)).expect_code(0);
    d.finish();
    w.expect_finished_copy();
}

#[test]
fn a_stopped_daemon_leaves_errors_instead_of_zeros() {
    let Some(w) = world("ext4") else { return };
    let mut d = Daemon::start(&w, &["--no-background"]).native();
    assert!(fs::read(w.dst.join(name(3))).unwrap() == content(3));
    raw::kill(d.child.id(), libc::SIGTERM);
    wait_until("the daemon ends", LIMIT, || {
        d.child.try_wait().unwrap().is_some()
    });
    assert!(fs::read(w.dst.join(name(3))).unwrap() == content(3));
    let refused = File::open(w.dst.join(name(5))).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    // Without the word it is refused: what users moved is found by nobody but us.
    let plain = run(mirrorfs().arg("mount").arg(&w.src).arg(&w.dst)).expect_code(3);
    assert!(plain.err.contains("--experimental-native"), "{}", plain.err);
    let mut again = Daemon::start(&w, &[]);
    again.guard = d.guard.take();
    wait_until("it answers", LIMIT, || {
        run(mirrorfs().arg("status").arg(&w.dst)).code() == 0
    });
    again.finish();
    w.expect_finished_copy();
}

#[test]
fn what_src_cannot_give_is_an_error_and_blocks_finish() {
    let Some(w) = world("ext4") else { return };
    let mut d = Daemon::start(&w, &["--no-background"]).native();
    fs::remove_file(w.src.join(name(5))).unwrap();
    let refused = File::open(w.dst.join(name(5))).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    assert!(is_marked(&w.dst.join(name(5))));
    run(mirrorfs().arg("finish").arg(&w.dst)).expect_code(23);
    raw::kill(d.child.id(), libc::SIGTERM);
    wait_until("the daemon ends", LIMIT, || {
        d.child.try_wait().unwrap().is_some()
    });
}

/// Tools that look at allocated blocks and holes: those of a placeholder say that there is nothing.
#[test]
fn tools_that_skip_holes_copy_pending_files_whole() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(w) = world(kind) else { continue };
        let _d = Daemon::start(&w, &["--no-background"]).native();
        let out = LoopFs::new("ext4");
        let tools: [(&str, &str); 4] = [
            ("a", "cp -a --sparse=auto \"$1\"/a \"$2\""),
            ("b", "tar -C \"$1\" --sparse -cf - b | tar -C \"$2\" -xf -"),
            ("large", "rsync -aS \"$1\"/large \"$2\""),
            (
                "large",
                "rm \"$2\"/large; cp --sparse=always \"$1\"/large \"$2\"",
            ),
        ];
        for (what, script) in tools {
            let mut command = Command::new("sh");
            command
                .args(["-ec", script, "sh"])
                .arg(&w.dst)
                .arg(out.path());
            run(&mut command).expect_code(0);
            let mut diff = Command::new("diff");
            diff.arg("-r")
                .arg(w.src.join(what))
                .arg(out.path().join(what));
            run(&mut diff).expect_code(0);
        }
    }
}
