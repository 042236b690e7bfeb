//! Nobody waits for a larger table of fds: the kernel doubles one that is full, and with several threads
//! whoever opens something meanwhile waits for that.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::fixture::{LIMIT, Scratch, World, can_mount_on, mirrorfs};

#[test]
fn a_daemon_has_room_for_its_fds_before_anybody_comes() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    let dirs: Vec<_> = (0..200).map(|n| format!("d{n}")).collect();
    for dir in &dirs {
        fs::create_dir(w.src.join(dir)).unwrap();
        fs::write(w.src.join(dir).join("f"), b"data").unwrap();
    }
    let m = w.mount_lazy();
    let before = number_of(m.pid, "FDSize:");
    for dir in &dirs {
        assert_eq!(fs::read(m.path(dir).join("f")).unwrap(), b"data");
    }
    let fds = fs::read_dir(format!("/proc/{}/fd", m.pid)).unwrap().count();
    assert!(fds > 256, "{fds} fds are not many");
    let slots = number_of(m.pid, "FDSize:");
    assert_eq!(before, slots, "slots for {fds} fds");
}

#[test]
fn a_sync_has_room_for_its_fds_before_it_has_threads() {
    let scratch = Scratch::new();
    let (src, dst) = (scratch.dir("src"), scratch.dir("dst"));
    fs::write(src.join("f"), vec![1; 8 << 20]).unwrap();
    let mut sync = mirrorfs();
    sync.args(["sync", "--bwlimit", "64K"]).args([src, dst]);
    let mut sync = sync.spawn().unwrap();
    let end = Instant::now() + LIMIT;
    while number_of(sync.id(), "Threads:") == 1 && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    let now = ["Threads:", "FDSize:"].map(|what| number_of(sync.id(), what));
    sync.kill().unwrap();
    sync.wait().unwrap();
    assert!(now[0] > 1 && now[1] >= 4096, "{now:?}");
}

/// Of a process that runs (proc_pid_status(5)).
fn number_of(pid: u32, what: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(what)).unwrap();
    line[what.len()..].trim().parse().unwrap()
}
