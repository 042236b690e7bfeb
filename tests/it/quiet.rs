//! SRC is left as it is: not an access time changes, and nothing that the program does could change
//! anything. It sees SRC through mounts of its own, read-only and without access times.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fixture::{LoopFs, Mounted, World, bytes, can_mount_on, mirrorfs, need, run};

/// src where every read is written down, and dst elsewhere.
fn world() -> Option<(World, PathBuf)> {
    if !can_mount_on("ext4") {
        return None;
    }
    let a = LoopFs::with("ext4", 1 << 30, &[], "loop,strictatime");
    let (b, root) = (LoopFs::new("ext4"), a.path().to_path_buf());
    let w = World::from(a.dir("src"), b.dir("dst"), vec![a, b]);
    for n in 0..8_u64 {
        let dir = w.src.join(format!("d{}", n % 2));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("f{n}")), bytes(n, 30_000 * n as usize)).unwrap();
        symlink(format!("f{n}"), dir.join(format!("s{n}"))).unwrap();
    }
    fs::write(w.src.join("large"), bytes(9, 12 << 20)).unwrap();
    Some((w, root))
}

/// Another way to look, which leaves no trace.
struct Quiet(PathBuf);

impl Quiet {
    fn of(w: &World, root: &Path) -> Quiet {
        let at = w.scratch_path("quiet");
        fs::create_dir(&at).unwrap();
        let mount = |args: &[&str]| run(Command::new("mount").args(args).arg(&at)).expect_code(0);
        run(Command::new("mount").arg("--bind").arg(root).arg(&at)).expect_code(0);
        mount(&["-o", "remount,bind,noatime"]);
        Quiet(at)
    }

    fn access_times(&self) -> Vec<(PathBuf, i64, i64)> {
        let (mut found, mut dirs) = (Vec::new(), vec![self.0.join("src")]);
        while let Some(dir) = dirs.pop() {
            let own = fs::metadata(&dir).unwrap();
            found.push((dir.clone(), own.atime(), own.atime_nsec()));
            for entry in fs::read_dir(&dir).unwrap() {
                let entry = entry.unwrap();
                let now = entry.metadata().unwrap();
                match now.is_dir() {
                    true => dirs.push(entry.path()),
                    false => found.push((entry.path(), now.atime(), now.atime_nsec())),
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // Lazily: a failed test may be in it.
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn no_access_time_of_src_changes() {
    let Some((w, root)) = world() else { return };
    let quiet = Quiet::of(&w, &root);
    let before = quiet.access_times();
    let m = w.mount_lazy();
    // The line for who could change SRC elsewhere.
    let log = m.log();
    assert!(log.contains("SRC can be written at"), "{log}");
    fs::read(m.path("d0/f2")).unwrap();
    fs::read_link(m.path("d0/s2")).unwrap();
    fs::read(m.path("large")).unwrap();
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    assert_eq!(quiet.access_times(), before, "after mount");
    w.expect_no_trace();
    fs::remove_dir_all(&w.dst).unwrap();
    run(mirrorfs().arg("sync").arg(&w.src).arg(&w.dst)).expect_code(0);
    assert_eq!(quiet.access_times(), before, "after sync");
    // The control: this is what reading does there.
    fs::read_link(w.src.join("d0/s2")).unwrap();
    fs::read(w.src.join("d0/f2")).unwrap();
    assert_ne!(quiet.access_times(), before);
}

/// The directories of src's file system that the daemon has open: what making a file in each says.
fn attempts(m: &Mounted, src: &Path) -> Vec<(bool, Result<(), i32>)> {
    let own = fs::metadata(src).unwrap();
    let mut all = Vec::new();
    for fd in fs::read_dir(format!("/proc/{}/fd", m.pid)).unwrap() {
        let fd = fd.unwrap().path();
        let Ok(there) = fs::metadata(&fd) else {
            continue;
        };
        if there.dev() != own.dev() || !there.is_dir() {
            continue;
        }
        let file = fd.join("planted");
        let made = File::create(&file).map(|_| fs::remove_file(&file).unwrap());
        all.push((
            there.ino() == own.ino(),
            made.map_err(|e| e.raw_os_error().unwrap()),
        ));
    }
    all
}

#[test]
fn what_the_daemon_has_open_of_src_takes_no_change() {
    let Some((w, _)) = world() else { return };
    let m = w.mount_lazy();
    for name in ["d0/f2", "d1/f3", "large"] {
        fs::read(m.path(name)).unwrap();
    }
    let all = attempts(&m, &w.src);
    // SRC as it was opened is kept, so that nobody unmounts it by mistake; nothing is opened in it.
    let (made, refused): (Vec<_>, Vec<_>) = all.iter().partition(|(_, made)| made.is_ok());
    assert!(
        made.len() <= 1 && made.iter().all(|(root, _)| *root),
        "{all:?}"
    );
    assert!(refused.len() >= 3, "{all:?}");
    assert!(
        refused.iter().all(|(_, e)| *e == Err(libc::EROFS)),
        "{all:?}"
    );
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
}

#[test]
fn what_is_mounted_below_src_is_copied_also_when_it_came_later() {
    let Some((w, _)) = world() else { return };
    if !need(Path::new("/proc/self/mountinfo").exists(), "/proc") {
        return;
    }
    let tmpfs = |name: &str| {
        let at = w.src.join(name);
        run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&at)).expect_code(0);
        fs::write(at.join("in"), name).unwrap();
        at
    };
    for name in ["first", "later"] {
        fs::create_dir(w.src.join(name)).unwrap();
    }
    tmpfs("first");
    // Where the daemon lives, so that it sees what is mounted later.
    let m = w.mount_lazy();
    assert_eq!(fs::read_to_string(m.path("first/in")).unwrap(), "first");
    let later = tmpfs("later");
    assert_eq!(fs::read_to_string(m.path("later/in")).unwrap(), "later");
    let all = attempts(&m, &later);
    assert!(
        all.iter().all(|(_, made)| *made == Err(libc::EROFS)),
        "{all:?}"
    );
    assert!(!all.is_empty());
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_no_trace();
    for name in ["first", "later"] {
        assert_eq!(
            fs::read_to_string(w.dst.join(name).join("in")).unwrap(),
            name
        );
    }
}
