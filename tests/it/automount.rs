//! Automount points: an access starts the mount that it waits for (fstab's `x-systemd.automount`).
//!
//! This process is the automounter, as systemd is one: what it starts is in its process group, and meets
//! the automount point as a directory. Everybody else who goes there waits until it says that the mount is
//! there.

use std::fs::{self, File};
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::fixture::{
    LIMIT, Output, World, bytes, can_mount_on, fuse_mount_at, mirrorfs, need, run, run_for, status,
    wait_dead, wait_until,
};
use crate::raw;

/// How long a mount may take that waits for nobody.
const SOON: Duration = Duration::from_secs(20);

/// A direct automount point, and the end of the kernel's pipe.
struct Automount {
    at: PathBuf,
    root: File,
    asks: PipeReader,
}

impl Automount {
    fn new(at: &Path) -> Automount {
        run(&mut Command::new("true")); // This thread's own mount namespace.
        let (asks, kernel) = std::io::pipe().unwrap();
        let group = rustix::process::getpgrp().as_raw_nonzero();
        let (fd, versions) = (kernel.as_raw_fd(), "minproto=5,maxproto=5");
        let options = format!("fd={fd},pgrp={group},{versions},direct\0");
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        rustix::mount::mount("test", at, "autofs", MountFlags::empty(), options).unwrap();
        let root = File::open(at).unwrap();
        let at = at.to_owned();
        Automount { at, root, asks }
    }

    /// Whether somebody waits.
    fn is_asked(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(&self.asks, PollFlags::IN)];
        let patience = rustix::time::Timespec::try_from(patience).unwrap();
        poll(&mut fds, Some(&patience)).unwrap() > 0
    }

    /// What the kernel says of somebody who has come: struct autofs_v5_packet. The token that answers it.
    fn next(&mut self) -> u32 {
        const MISSING_DIRECT: u32 = 5;
        assert!(self.is_asked(LIMIT), "nobody has come");
        let mut packet = [0; 304];
        self.asks.read_exact(&mut packet).unwrap();
        let word = |at: usize| u32::from_ne_bytes(packet[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (5, MISSING_DIRECT));
        word(8)
    }

    /// The mount is there: whoever waits goes on.
    fn ready(&self, token: u32) {
        raw::autofs_ready(&self.root, token).unwrap();
    }

    fn takes_off(&self) -> bool {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).is_ok()
    }
}

impl Drop for Automount {
    fn drop(&mut self) {
        // Whoever still waits is told that nothing comes.
        let _ = raw::autofs_give_up(&self.root);
        while self.takes_off() {}
    }
}

fn world() -> Option<World> {
    let autofs = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = need(autofs.contains("autofs"), "autofs");
    (has && can_mount_on("ext4")).then(|| World::on("ext4"))
}

/// As systemd's mount unit starts it: in the automounter's process group.
fn helper(w: &World, options: &str) -> Output {
    let path = w.scratch_path("mount.mirrorfs");
    if !path.exists() {
        std::os::unix::fs::symlink(mirrorfs().get_program(), &path).unwrap();
    }
    let mut command = Command::new(path);
    command.args([&w.src, &w.at]).args(["-o", options]);
    run_for(&mut command, SOON)
}

/// Somebody who is no part of the automounter reads a file.
fn reader(path: &Path) -> Child {
    let mut cat = Command::new("cat");
    cat.arg(path).stdout(Stdio::piped()).process_group(0);
    raw::die_with_parent(&mut cat).spawn().unwrap()
}

fn expect_reads(reader: Child, want: &[u8]) {
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, want);
}

fn stop(w: &World) {
    let pid = status(&w.at)["pid"].as_u64().unwrap();
    run(Command::new("umount").arg(&w.at)).expect_code(0);
    let proc = PathBuf::from(format!("/proc/{pid}"));
    wait_until("the daemon has gone", LIMIT, || !proc.exists());
}

#[test]
fn who_comes_to_an_automount_point_starts_the_migration_and_reads() {
    let Some(w) = world() else { return };
    fs::write(w.src.join("a"), bytes(1, 1000)).unwrap();
    let mut point = Automount::new(&w.at);
    helper(&w, "rw").expect_code(32); // DST cannot be below it.
    let options = format!("dst={},x-systemd.automount", w.dst.display());
    // Again: as after a stop of the unit.
    for _ in 0..2 {
        let waits = reader(&w.at.join("a"));
        let token = point.next();
        helper(&w, &options).expect_code(0);
        assert!(fuse_mount_at(&w.at).is_some());
        point.ready(token);
        expect_reads(waits, &bytes(1, 1000));
        assert_eq!(status(&w.at)["mountpoint"], w.at.to_str().unwrap());
        stop(&w);
    }
}

/// Who mounts by hand starts nobody else's mount.
#[test]
fn an_automount_point_may_be_mounted_on_by_hand() {
    let Some(w) = world() else { return };
    fs::write(w.src.join("a"), bytes(1, 1000)).unwrap();
    let point = Automount::new(&w.at);
    for slash in ["", "/"] {
        let at = format!("{}{slash}", w.at.display());
        let mut mount = mirrorfs();
        mount.arg("mount").args([&w.src, &w.dst]).arg(at);
        run_for(mount.process_group(0), SOON).expect_code(0);
        expect_reads(reader(&w.at.join("a")), &bytes(1, 1000));
        stop(&w);
    }
    assert!(!point.is_asked(Duration::ZERO));
}

#[test]
fn a_dead_mount_on_an_automount_point_is_replaced() {
    let Some(w) = world() else { return };
    fs::write(w.src.join("a"), bytes(1, 1000)).unwrap();
    let point = Automount::new(&w.at);
    let options = format!("dst={}", w.dst.display());
    helper(&w, &options).expect_code(0);
    let pid = status(&w.at)["pid"].as_u64().unwrap();
    raw::kill(u32::try_from(pid).unwrap(), libc::SIGKILL);
    wait_dead(&w.at);
    helper(&w, &options).expect_code(0);
    expect_reads(reader(&w.at.join("a")), &bytes(1, 1000));
    // And by who is not in the automounter's group.
    let pid = status(&w.at)["pid"].as_u64().unwrap();
    raw::kill(u32::try_from(pid).unwrap(), libc::SIGKILL);
    wait_dead(&w.at);
    let mut mount = mirrorfs();
    mount.arg("mount").args([&w.src, &w.dst, &w.at]);
    run_for(mount.process_group(0), SOON).expect_code(0);
    expect_reads(reader(&w.at.join("a")), &bytes(1, 1000));
    stop(&w);
    assert!(!point.is_asked(Duration::ZERO));
}

/// The next access would start the migration again: whoever ends one does not go there.
#[test]
fn finish_leaves_an_automount_point_alone() {
    let Some(w) = world() else { return };
    fs::write(w.src.join("a"), bytes(1, 1000)).unwrap();
    let point = Automount::new(&w.at);
    let options = format!("dst={}", w.dst.display());
    helper(&w, &options).expect_code(0);
    run(mirrorfs().arg("wait").arg(&w.at)).expect_code(0);
    let pid = status(&w.at)["pid"].as_u64().unwrap();
    let mut finish = mirrorfs();
    run(finish.arg("finish").arg(&w.at).process_group(0)).expect_code(0);
    let proc = PathBuf::from(format!("/proc/{pid}"));
    wait_until("the daemon has gone", LIMIT, || !proc.exists());
    assert!(!point.is_asked(Duration::ZERO));
    // What the next access would start.
    helper(&w, &options).expect_code(32);
    assert_eq!(fs::read(w.dst.join("a")).unwrap(), bytes(1, 1000));
}

/// In the automounter's process group it looks like an empty directory, and nothing comes.
#[test]
pub(crate) fn what_is_to_be_copied_is_no_automount_point() {
    let Some(w) = world() else { return };
    fs::write(w.src.join("a"), bytes(1, 1000)).unwrap();
    let point = Automount::new(&w.at);
    for (src, dst) in [(&w.at, &w.dst), (&w.src, &w.at)] {
        let mut mount = mirrorfs();
        mount.arg("mount").args([src, dst]);
        run_for(&mut mount, SOON).expect_code(3);
    }
    assert!(!point.is_asked(Duration::ZERO));
}
