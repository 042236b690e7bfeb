//! Signals: who waits for a src that hangs can be ended, and nothing that he asked for happens later.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use crate::badsource::{BadSrc, NOT_YET, apart, expect_copy, read_apart, tree, world};
use crate::fixture::{LIMIT, Mounted, World, bytes, mirrorfs, run, wait_until};
use crate::raw;
use crate::ring::can_ring;
use crate::upgrade::upgrade;

/// A program of a user's; killed when the test ends.
struct User(Child, String);

impl User {
    #[track_caller]
    fn runs(script: &str, at: &Path) -> User {
        let mut command = Command::new("bash");
        command.arg("-c").arg(format!("exec {script}"));
        command.current_dir(at).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // Whoever runs the tests in the background ignores them, and so would we.
        raw::take_signals(&mut command);
        User(command.spawn().unwrap(), script.to_owned())
    }

    /// Opens a file, and exits with the errno of that; catches SIGUSR1.
    #[track_caller]
    fn catches_and_opens(name: &str, m: &Mounted) -> User {
        let script = m.at.with_file_name("opens.py");
        let mut file = fs::File::create(&script).unwrap();
        file.write_all(
            b"import ctypes, signal, sys\n\
              signal.signal(signal.SIGUSR1, lambda *_: None)\n\
              open(sys.argv[2], 'w').close()\n\
              libc = ctypes.CDLL(None, use_errno=True)\n\
              fd = libc.open(sys.argv[1].encode(), 0)\n\
              sys.exit(0 if fd >= 0 else ctypes.get_errno())\n",
        )
        .unwrap();
        let ready =
            m.at.with_file_name(format!("ready.{}", name.replace('/', ".")));
        // Another one may have been here.
        let _ = fs::remove_file(&ready);
        let line = format!("python3 {} {name} {}", script.display(), ready.display());
        let user = User::runs(&line, &m.at);
        wait_until("a handler", LIMIT, || ready.exists());
        user
    }

    fn gets(&self, signal: i32) {
        raw::kill(self.0.id(), signal);
    }

    fn waits(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    #[track_caller]
    fn ends(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "{}: it cannot be ended", self.1);
            thread::sleep(std::time::Duration::from_millis(3));
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // Dead already, if all went well; else it ends when its mount does.
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

/// Lets everything go when a test fails: the daemon could not end.
struct Let<'a>(&'a BadSrc);

impl Drop for Let<'_> {
    fn drop(&mut self) {
        self.0.tell("off");
        self.0.tell("release");
    }
}

fn waiting(m: &Mounted) -> u64 {
    m.status()["waiting"].as_u64().unwrap()
}

/// Whoever waits for anything is ended; none of the changes he asked for happens.
fn all_can_be_ended(bad: &mut BadSrc, w: &World, args: &[&str]) {
    bad.start(&[]);
    let bad = &*bad;
    let m = w.mount_with(&[&["--no-background"], args].concat(), &[]);
    let _let = Let(bad);
    // Their names are known, and what is read of `large` is not.
    assert_eq!(fs::read_dir(m.path("d0")).unwrap().count(), 10);
    assert_eq!(fs::read(m.path("d0/f0")).unwrap(), bytes(0, 3000));
    bad.tell("add path=d0/* op=open,read hang");
    bad.tell("add path=large op=read hang");
    bad.tell("add path=d1 op=opendir,readdir hang");
    bad.tell("add path=d1/* op=lookup hang");
    let file = read_apart(m.path("d0/f3"));
    let (large, list) = (read_apart(m.path("large")), m.path("d1"));
    let list = apart(move || fs::read_dir(list).map(Iterator::count));
    wait_until("others wait", LIMIT, || waiting(&m) == 3);
    let scripts = [
        "cat d0/f3",
        "cat d0/f6",
        "dd if=large bs=4k count=1 skip=2000",
        "truncate -s 5 d0/f9",
        "truncate -s 0 d0/f3",
        "dd if=/dev/null of=d0/f12 conv=notrunc oflag=append",
        "ls d1",
        "cat d1/f4",
        "touch d1/new",
        "mkdir d1/newdir",
        "rm d1/f4",
        "mv d1 d2",
        "mv d0/f0 d1/f0",
        "ln d0/f0 d1/link",
        "chmod 700 d1",
    ];
    let signals = [libc::SIGINT, libc::SIGKILL, libc::SIGTERM, libc::SIGQUIT];
    let mut users: Vec<_> = scripts.map(|s| User::runs(s, &m.at)).into();
    thread::sleep(NOT_YET);
    // What needs no src was done (it shows that the mount works); the rest waits.
    let mut wait: Vec<_> = users
        .iter_mut()
        .filter_map(|u| u.waits().then_some(u))
        .collect();
    assert!(wait.len() >= 12, "{}", wait.len());
    // All of them, then all deaths: who changes a directory holds the kernel's lock of it, and who
    // waits for that lock ends after him.
    let signal = |n: usize| signals[n % signals.len()];
    for (n, user) in wait.iter().enumerate() {
        user.gets(signal(n));
    }
    for (n, user) in wait.iter_mut().enumerate() {
        assert_eq!(user.ends().signal(), Some(signal(n)), "{}", user.1);
    }
    assert!(waiting(&m) >= 3, "the others still wait");
    assert!(file.try_recv().is_err() && list.try_recv().is_err());
    bad.tell("off");
    bad.tell("release");
    assert_eq!(file.recv_timeout(LIMIT).unwrap().unwrap(), bytes(3, 3003));
    assert_eq!(list.recv_timeout(LIMIT).unwrap().unwrap(), 10);
    assert_eq!(
        large.recv_timeout(LIMIT).unwrap().unwrap(),
        bytes(99, 9 << 20)
    );
    for user in &mut users {
        assert!(!user.waits(), "{}", user.1);
    }
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(bad, w);
}

#[test]
fn who_waits_can_be_ended_and_nothing_that_he_asked_for_happens_later() {
    if let Some((mut bad, w)) = world(tree) {
        all_can_be_ended(&mut bad, &w, &["-o", "transport=dev"]);
    }
}

#[test]
fn who_waits_can_be_ended_over_io_uring_too() {
    if !can_ring() {
        return;
    }
    if let Some((mut bad, w)) = world(tree) {
        all_can_be_ended(&mut bad, &w, &["-o", "transport=uring"]);
    }
}

/// As on a disk: no program expects EINTR of open(2).
#[test]
pub(crate) fn a_signal_with_a_handler_ends_no_wait_and_a_later_kill_does() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    bad.start(&["path=d0/* op=read,open hang"]);
    let m = w.mount_lazy();
    let _let = Let(&bad);
    let mut one = User::catches_and_opens("d0/f3", &m);
    let mut other = User::catches_and_opens("d0/f6", &m);
    wait_until("both wait", LIMIT, || waiting(&m) == 2);
    for user in [&one, &other] {
        user.gets(libc::SIGUSR1);
    }
    thread::sleep(NOT_YET);
    assert!(one.waits() && other.waits() && waiting(&m) == 2);
    other.gets(libc::SIGKILL);
    assert_eq!(other.ends().signal(), Some(libc::SIGKILL));
    assert_eq!(waiting(&m), 1);
    bad.tell("off");
    bad.tell("release");
    assert_eq!(one.ends().code(), Some(0), "his open(2) worked");
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
pub(crate) fn who_waits_can_be_ended_after_an_upgrade_whether_he_had_a_signal_before_or_not() {
    let Some((mut bad, w)) = world(tree) else {
        return;
    };
    let w = w.over();
    bad.start(&["path=d0/* op=read,open hang"]);
    let m = w.mount_lazy();
    let _let = Let(&bad);
    let mut before = User::catches_and_opens("d0/f3", &m);
    let mut after = User::catches_and_opens("d0/f6", &m);
    let mut never = User::catches_and_opens("d0/f9", &m);
    wait_until("all wait", LIMIT, || waiting(&m) == 3);
    before.gets(libc::SIGUSR1);
    thread::sleep(NOT_YET);
    upgrade(&m);
    wait_until("all wait again", LIMIT, || waiting(&m) == 3);
    before.gets(libc::SIGKILL);
    after.gets(libc::SIGKILL);
    assert_eq!(before.ends().signal(), Some(libc::SIGKILL));
    assert_eq!(after.ends().signal(), Some(libc::SIGKILL));
    assert!(never.waits());
    bad.tell("off");
    bad.tell("release");
    assert_eq!(never.ends().code(), Some(0));
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    expect_copy(&bad, &w);
}

#[test]
fn who_writes_while_the_whole_file_hangs_can_be_ended_and_the_file_comes_all_the_same() {
    let all = bytes(3, 3 << 20);
    let Some((mut bad, w)) = world(|bad| bad.write("f", &all)) else {
        return;
    };
    bad.start(&["path=f op=read off=1M-2M hang"]);
    let bad = &bad;
    let m = w.mount_with(&["-o", "large=64K"], &[]);
    let _let = Let(bad);
    wait_until("the pull has begun", LIMIT, || {
        fs::read(w.dst.join("f")).is_ok_and(|there| there.starts_with(&all[..4096]))
    });
    // It waits until the pull, which hangs, has ended.
    let mut user = User::runs("dd if=/dev/zero of=f bs=4k count=1 conv=notrunc", &m.at);
    wait_until("he waits", LIMIT, || waiting(&m) == 1);
    assert!(user.waits());
    user.gets(libc::SIGKILL);
    assert_eq!(user.ends().signal(), Some(libc::SIGKILL));
    bad.tell("off");
    bad.tell("release");
    m.wait_complete();
    assert!(fs::read(m.path("f")).unwrap() == all, "it was written");
    m.finish();
    assert!(fs::read(w.dst.join("f")).unwrap() == all);
}
