//! An ordinary user's mounts: through fusermount3, with `user.mirrorfs` marks, without privilege.
//!
//! The program runs as nobody, from a copy that he can execute, in the test's own
//! mount namespace; a /dev/fuse for everybody stands over a private one. Only that user sees what is
//! in his mount, so the tests look at it as him.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode};
use rustix::mount::UnmountFlags;

use crate::badsource::BadSrc;
use crate::compare;
use crate::fixture::{
    CONTROL, LIMIT, LoopFs, Output, Random, Scratch, World, as_user, bytes, can_mount,
    can_mount_on, find_program, fuse_mount_at, kit, mirrorfs, need, run, wait_until,
};
use crate::messages;
use crate::nasty;
use crate::raw;
use crate::unseen;

/// Nobody, as the helper wants users with a name; and somebody else.
const USER: u32 = 65_534;
const OTHER: u32 = 54_322;
const MARK: &str = "user.mirrorfs";

pub(crate) fn can_run() -> bool {
    let named = fs::read_to_string("/etc/passwd").is_ok_and(|t| t.contains(":65534:"));
    can_mount()
        && need(find_program("fusermount3").is_some(), "fusermount3 (fuse3)")
        && need(named, "the user nobody")
}

/// Runs something as the user, with his umask 022.
pub(crate) fn as_him<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    as_user(USER, USER, 0o022, act)
}

/// A user's src, dst and mount point.
pub(crate) struct Home {
    pub(crate) src: PathBuf,
    pub(crate) dst: PathBuf,
    at: PathBuf,
    pub(crate) run_dir: PathBuf,
    program: PathBuf,
    scratch: Scratch,
    _fs: Option<LoopFs>,
}

impl Home {
    pub(crate) fn new() -> Home {
        Home::made(Scratch::new(), None)
    }

    /// With both trees on a new file system of this kind.
    pub(crate) fn on(kind: &str) -> Home {
        let fs = LoopFs::new(kind);
        Home::made(Scratch::new(), Some(fs))
    }

    fn made(scratch: Scratch, fs: Option<LoopFs>) -> Home {
        open_dev_fuse(&scratch);
        let program = scratch.path().join("mirrorfs");
        // By another process: a fd of ours that is open for writing could be in a test's child when
        // the program is started.
        run(Command::new("cp")
            .arg(mirrorfs().get_program())
            .arg(&program))
        .expect_code(0);
        let his = |name: &str| {
            let path = match &fs {
                Some(fs) => fs.dir(name),
                None => scratch.dir(name),
            };
            std::os::unix::fs::chown(&path, Some(USER), Some(USER)).unwrap();
            path
        };
        let (src, dst, run_dir) = (his("src, of\\him"), his("dst"), his("run"));
        Home {
            src,
            at: dst.clone(),
            dst,
            run_dir,
            program,
            scratch,
            _fs: fs,
        }
    }

    /// With a mount point of its own.
    fn beside(mut self) -> Home {
        self.at = self.scratch.dir("mnt");
        std::os::unix::fs::chown(&self.at, Some(USER), Some(USER)).unwrap();
        self
    }

    /// Everything in src becomes the user's.
    pub(crate) fn give_src(&self) {
        let all = format!("{USER}:{USER}");
        run(Command::new("chown")
            .args(["-R", "-h", &all])
            .arg(&self.src))
        .expect_code(0);
    }

    fn command_as(&self, uid: u32) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("MIRRORFS_RUN_DIR", &self.run_dir)
            .env("MIRRORFS_STATE_DIR", &self.run_dir)
            .env_remove("MIRRORFS_FAULT")
            .current_dir("/")
            .uid(uid)
            .gid(uid);
        command
    }

    pub(crate) fn command(&self) -> Command {
        self.command_as(USER)
    }

    fn mount(&self, args: &[&str]) -> Mount<'_> {
        self.mount_by(self.command(), args)
    }

    /// `mount -f` by this command; returns when the mount is usable.
    pub(crate) fn mount_by(&self, mut command: Command, args: &[&str]) -> Mount<'_> {
        let log = self.scratch.path().join("log");
        let file = File::options().create(true).append(true).open(&log);
        let file = file.unwrap();
        command.arg("mount").arg("-f").args(args);
        command.arg(&self.src).arg(&self.dst).arg(&self.at);
        command.stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = raw::die_with_parent(&mut command).spawn().unwrap();
        let mut mount = Mount {
            home: self,
            child: Some(child),
            since: Instant::now(),
            log,
        };
        wait_until("the mount", LIMIT, || {
            if let Some(status) = mount.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("mount ended with {status}: {}", mount.log());
            }
            let works = as_him(|| rustix::fs::statvfs(&self.at).is_ok());
            works && fuse_mount_at(&self.at).is_some() && mount.log().contains("usable")
        });
        mount
    }

    fn refused(&self, command: &mut Command, args: &[&str]) -> Output {
        command.arg("mount").arg("-f").args(args);
        command.arg(&self.src).arg(&self.dst).arg(&self.at);
        let said = run(command);
        assert!(fuse_mount_at(&self.at).is_none(), "mounted: {said:?}");
        assert_eq!(said.err.trim_end().lines().count(), 1, "{said:?}");
        said
    }

    /// As root who may not mount: what is said then.
    fn refused_without_the_capability(&self) -> String {
        let mut command = Command::new("setpriv");
        command
            .args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
            .arg(&self.program)
            .env("MIRRORFS_RUN_DIR", self.scratch.dir("root's run"));
        self.refused(&mut command, &[]).expect_code(3).err
    }

    fn expect_finished_copy(&self) {
        assert!(fuse_mount_at(&self.at).is_none(), "still mounted");
        assert!(!self.dst.join(CONTROL).exists(), "the control directory");
        let dst = compare::manifest(&self.dst);
        for (path, entry) in dst.entries() {
            assert!(!entry.has_xattr(MARK), "{}", compare::show(path));
        }
        compare::expect_equal(&compare::manifest(&self.src), &dst);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for path in [&self.at, &self.dst, Path::new("/dev/fuse")] {
            // What a failed test left; the namespace ends with the test in any case.
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        }
    }
}

/// Puts a /dev/fuse that everybody may open over this namespace's.
fn open_dev_fuse(scratch: &Scratch) {
    let node = scratch.path().join("fuse");
    let dev = rustix::fs::makedev(10, 229);
    let mode = Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::CharacterDevice, mode, dev).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    rustix::mount::mount_bind(&node, "/dev/fuse").unwrap();
}

/// A user's mount by `mirrorfs mount -f`.
pub(crate) struct Mount<'a> {
    home: &'a Home,
    child: Option<Child>,
    since: Instant,
    log: PathBuf,
}

impl Mount<'_> {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.at.join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn ask(&self, command: &str, args: &[&str]) -> Output {
        run(self
            .home
            .command()
            .arg(command)
            .args(args)
            .arg(&self.home.at))
    }

    fn status(&self) -> serde_json::Value {
        let said = self.ask("status", &["--json"]).expect_code(0).out;
        match serde_json::from_str(&said).unwrap() {
            serde_json::Value::Array(mut all) if all.len() == 1 => all.remove(0),
            value => value,
        }
    }

    fn wait_complete(&self) {
        wait_until("COMPLETE", LIMIT, || {
            assert!(self.since.elapsed() < 2 * LIMIT, "{}", self.log());
            let status = self.status();
            assert_eq!(status["errors"], 0, "{status:#}\n{}", self.log());
            status["state"] == "COMPLETE"
        });
    }

    /// Waits until only what is in the ledger is pending.
    pub(crate) fn wait_settled(&self, errors: u64) {
        wait_until("the rest", LIMIT, || {
            let status = self.status();
            status["errors"] == errors && status["state"] == "DEGRADED"
        });
    }

    pub(crate) fn finish(mut self, args: &[&str], code: i32) {
        self.ask("finish", args).expect_code(code);
        assert!(fuse_mount_at(&self.home.at).is_none(), "still mounted");
        let ended = self.end(Duration::from_secs(30));
        assert_eq!(ended, Some(code), "{}", self.log());
    }

    fn kill(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn end(&mut self, limit: Duration) -> Option<i32> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Some(status) = self.child.as_mut()?.try_wait().unwrap() {
                self.child = None;
                return status.code();
            }
            thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        messages::heard(&self.log(), None);
        if thread::panicking() {
            eprintln!("log of the mount: {}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = rustix::mount::unmount(&self.home.at, UnmountFlags::DETACH);
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// A tree with what an ordinary user has: read-only files and directories, links, xattrs, holes.
fn fill(home: &Home) {
    nasty::ordinary(&home.src, 20, 20);
    home.give_src();
    let src = home.src.clone();
    as_him(|| {
        let root = nasty::At::open(&src);
        let d = root.dir("modes");
        for mode in [0o444u32, 0o400, 0o555, 0o640, 0o600, 0o755, 0o666] {
            let name = format!("{mode:o}");
            d.file(&name, &bytes(mode.into(), 3000));
            d.xattr(&name, "user.mode", name.as_bytes());
            d.chmod(&name, mode);
            d.stamp(&name, 1_000_000_000 + i64::from(mode), 7);
        }
        d.file("empty", b"");
        d.xattr("empty", "user.empty", b"yes");
        d.chmod("empty", 0o444);
        d.file("acl", b"acl");
        d.xattr("acl", "system.posix_acl_access", &nasty::named_acl());
        d.chmod("acl", 0o444);
        d.symlink("acl", "symlink");
        d.node("fifo", FileType::Fifo, 0);
        d.file("linked", &bytes(1, 100_000));
        d.link("linked", &root, "hard link");
        d.chmod("linked", 0o444);
        let inner = d.dir("locked");
        inner.file("a", b"in a read-only directory");
        inner.dir("deeper").file("b", b"in another");
        inner.chmod("deeper", 0o500);
        d.chmod("locked", 0o555);
        d.chmod(".", 0o555);
        root.sparse("big", 24 << 20, &[(9 << 20, &bytes(2, 12 << 20))]);
        root.stamp("big", 1_234_567_890, 123_456_789);
    });
}

fn read_half(mount: &Mount<'_>, home: &Home) {
    let src = compare::manifest(&home.src);
    let files = src
        .entries()
        .filter(|(_, e)| e.kind == FileType::RegularFile);
    let half: Vec<PathBuf> = files
        .step_by(2)
        .map(|(p, _)| PathBuf::from(compare::show(p)))
        .collect();
    as_him(|| {
        for path in half {
            let (want, got) = (
                fs::read(home.src.join(&path)).unwrap(),
                fs::read(mount.path(path.to_str().unwrap())).unwrap(),
            );
            assert!(want == got, "{} differs", path.display());
        }
    });
}

#[test]
fn a_user_migrates_on_top_of_dst_and_the_path_stays_the_same() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fill(&home);
    let mount = home.mount(&[]);
    let line = fuse_mount_at(&home.at).unwrap();
    assert_eq!(line.kind, "fuse.mirrorfs");
    assert!(line.source.contains("src,"), "{}", line.source);
    read_half(&mount, &home);
    // Nobody else gets in, not even by the control socket.
    as_user(OTHER, OTHER, 0o022, || {
        let denied = fs::read_dir(&home.at).unwrap_err();
        assert_eq!(denied.kind(), std::io::ErrorKind::PermissionDenied);
    });
    let other = run(home.command_as(OTHER).arg("status").arg(&home.at));
    assert_ne!(other.code(), 0, "{other:?}");
    mount.wait_complete();
    let open = as_him(|| {
        let mut file = File::open(mount.path("modes/444")).unwrap();
        file.read_exact(&mut [0; 10]).unwrap();
        file
    });
    // Somebody is still inside: the native tree is there at once, his file lives on.
    mount.ask("finish", &[]).expect_code(0);
    assert!(fuse_mount_at(&home.at).is_none());
    let rest = as_him(|| {
        let (mut file, mut rest) = (&open, Vec::new());
        file.seek(SeekFrom::Start(10)).unwrap();
        file.read_to_end(&mut rest).unwrap();
        rest
    });
    assert_eq!(rest, bytes(0o444, 3000)[10..]);
    drop(open);
    let mut mount = mount;
    let ended = mount.end(Duration::from_secs(30));
    assert_eq!(ended, Some(0), "{}", mount.log());
    home.expect_finished_copy();
    let verified = run(home.command().arg("verify").arg(&home.src).arg(&home.dst));
    verified.expect_code(0);
}

#[test]
fn a_user_s_mount_beside_dst_survives_kills() {
    if !can_run() {
        return;
    }
    let home = Home::new().beside();
    fill(&home);
    for _ in 0..3 {
        let mount = home.mount(&[]);
        read_half(&mount, &home);
        mount.kill();
        as_him(|| {
            crate::fixture::wait_dead(&home.at);
            let gone = rustix::fs::statvfs(&home.at).err();
            assert_eq!(gone, Some(rustix::io::Errno::NOTCONN));
        });
    }
    let mount = home.mount(&[]);
    let lines = crate::fixture::mounts();
    let ours = lines.iter().filter(|m| m.at == home.at).count();
    assert_eq!(ours, 1, "the dead mounts were cleared away");
    mount.wait_complete();
    mount.finish(&[], 0);
    home.expect_finished_copy();
}

#[test]
fn a_kill_between_the_mark_and_the_mode_leaves_neither_wrong() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fill(&home);
    for n in [1, 2, 4] {
        let mut command = home.command();
        command.env("MIRRORFS_FAULT", format!("perm-unmarked:{n}"));
        let mut mount = home.mount_by(command, &[]);
        let ended = mount.end(LIMIT);
        assert_eq!(ended, Some(99), "{}", mount.log());
    }
    let mount = home.mount(&[]);
    mount.wait_complete();
    mount.finish(&[], 0);
    home.expect_finished_copy();
}

#[test]
pub(crate) fn what_a_user_may_not_read_is_in_the_ledger_and_the_rest_goes_on() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    nasty::ordinary(&home.src, 3, 5);
    let root = nasty::At::open(&home.src);
    root.file("secret", b"not for him");
    root.xattr("secret", "user.secret", b"neither");
    root.chmod("secret", 0o600);
    let closed = root.dir("closed");
    closed.file("inside", b"nor this");
    root.chmod("closed", 0o700);
    root.file("open", b"for everybody");
    let mount = home.mount(&[]);
    as_him(|| {
        assert_eq!(fs::read(mount.path("open")).unwrap(), b"for everybody");
        assert!(fs::read(mount.path("secret")).is_err());
        assert!(fs::read_dir(mount.path("closed")).is_err());
    });
    // Its data, its xattr, the directory's names.
    mount.wait_settled(3);
    let listed = mount.ask("errors", &[]).expect_code(0).out;
    for part in ["\"secret\"", "user.secret", "\"closed\"", "src: Permission"] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    mount.ask("finish", &[]).expect_code(23);
    mount.finish(&["--accept-loss"], 23);
    for gone in ["secret", "closed"] {
        assert!(!home.dst.join(gone).exists(), "{gone}");
        let there = home.src.join(gone);
        match there.is_dir() {
            true => fs::remove_dir_all(there).unwrap(),
            false => fs::remove_file(there).unwrap(),
        }
    }
    home.give_src();
    // Their removal shows in the root's time alone.
    let ignore = compare::Ignore {
        recent_mtime: true,
        ..compare::Ignore::default()
    };
    let (src, dst) = (compare::manifest(&home.src), compare::manifest(&home.dst));
    compare::expect_equal_with(&src, &dst, ignore);
}

#[test]
pub(crate) fn what_a_user_may_not_make_is_in_the_ledger_and_owners_are_not() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    let root = nasty::At::open(&home.src);
    root.file("root's", b"readable");
    root.file("capable", b"program");
    root.xattr("capable", "security.capability", &nasty::capability());
    root.node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    root.file("setuid", b"program");
    root.chmod("setuid", 0o6755);
    let mount = home.mount(&[]);
    mount.wait_settled(2);
    let listed = mount.ask("errors", &[]).expect_code(0).out;
    assert!(listed.contains("\"null\": mknod dst"), "{listed}");
    assert!(listed.contains("security.capability"), "{listed}");
    mount.ask("finish", &[]).expect_code(23);
    mount.finish(&["--accept-loss"], 23);
    for name in ["root's", "capable", "setuid"] {
        let there = home.dst.join(name).metadata().unwrap();
        assert_eq!((there.uid(), there.gid()), (USER, USER), "{name}");
        assert_eq!(
            fs::read(home.src.join(name)).unwrap().len(),
            there.len() as usize
        );
    }
    // The program of another user: it must not become one that gives this user's rights away.
    let mode = home.dst.join("setuid").metadata().unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755);
}

#[test]
fn a_user_s_sync_gives_nobody_his_rights() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    let root = nasty::At::open(&home.src);
    for (name, mode) in [("setuid", 0o4755), ("both", 0o6755), ("setgid", 0o2750)] {
        root.file(name, b"program");
        root.chmod(name, mode);
        root.stamp(name, 1_500_000_000, 1);
    }
    root.chmod("setgid", 0o2755);
    // With an xattr the metadata goes the long way.
    root.xattr("both", "user.note", b"x");
    root.file("his own", b"program");
    root.chown("his own", USER, USER);
    root.chmod("his own", 0o6755);
    let sync = || {
        run(home
            .command()
            .args(["sync", "-i"])
            .args([&home.src, &home.dst]))
    };
    sync().expect_code(0);
    let mode = |name: &str| home.dst.join(name).metadata().unwrap().mode() & 0o7777;
    for name in ["setuid", "both", "setgid"] {
        assert_eq!(mode(name), 0o755, "{name}");
    }
    assert_eq!(mode("his own"), 0o6755);
    // Nor does a second run try again, or call it a difference.
    assert_eq!(sync().expect_code(0).out.trim(), "");
    assert_eq!(mode("both"), 0o755);
}

#[test]
fn pending_read_only_entries_look_and_behave_read_only() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fill(&home);
    let mount = home.mount(&["--no-background"]);
    as_him(|| {
        let mode = |name: &str| mount.path(name).metadata().unwrap().mode() & 0o7777;
        assert_eq!(mode("modes"), 0o555);
        assert_eq!(mode("modes/444"), 0o444);
        assert_eq!(mode("modes/locked/deeper"), 0o500);
        for denied in ["modes/444", "modes/locked/new"] {
            let opened = File::options()
                .append(true)
                .create(true)
                .open(mount.path(denied));
            let error = opened.unwrap_err().kind();
            assert_eq!(error, std::io::ErrorKind::PermissionDenied, "{denied}");
        }
        let acl = rustix::fs::getxattr(
            mount.path("modes/acl"),
            "system.posix_acl_access",
            &mut [0; 256],
        );
        assert!(acl.is_ok());
        // What the user changes of it is what it becomes.
        let chmod = |name: &str, mode| {
            let to = fs::Permissions::from_mode(mode);
            fs::set_permissions(mount.path(name), to).unwrap();
        };
        chmod("modes/640", 0o440);
        chmod("modes/400", 0o600);
        chmod("modes", 0o755);
        fs::rename(mount.path("modes/555"), mount.path("moved")).unwrap();
        fs::rename(mount.path("modes/locked"), mount.path("modes/shut")).unwrap();
        assert_eq!(mode("modes/640"), 0o440);
        assert_eq!(mode("moved"), 0o555);
        // Written through what was open before it was read-only.
        let new = mount.path("new");
        let mut file = File::options()
            .write(true)
            .read(true)
            .create_new(true)
            .mode(0o444)
            .open(&new)
            .unwrap();
        file.write_all(b"0123456789").unwrap();
        file.set_len(4).unwrap();
        drop(file);
        assert_eq!(fs::read(&new).unwrap(), b"0123");
        for name in ["modes/640", "modes/400", "moved", "modes/shut/deeper/b"] {
            assert!(!fs::read(mount.path(name)).unwrap().is_empty());
        }
    });
    let mut mount = mount;
    run(Command::new("fusermount3")
        .args(["-u", "-z"])
        .arg(&home.at)
        .uid(USER)
        .gid(USER))
    .expect_code(0);
    mount.end(Duration::from_secs(30)).expect("it ends");
    let mount = home.mount(&[]);
    mount.wait_complete();
    mount.finish(&[], 0);
    let mode = |name: &str| home.dst.join(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!(mode("modes"), 0o755);
    assert_eq!(mode("modes/640"), 0o440);
    assert_eq!(mode("modes/400"), 0o600);
    assert_eq!(mode("modes/444"), 0o444);
    assert_eq!(mode("moved"), 0o555);
    assert_eq!(mode("modes/shut"), 0o555);
    assert_eq!(mode("modes/shut/deeper"), 0o500);
    assert_eq!(
        fs::read(home.dst.join("moved")).unwrap(),
        bytes(0o555, 3000)
    );
    assert_eq!(
        fs::read(home.dst.join("modes/shut/deeper/b")).unwrap(),
        b"in another"
    );
}

/// Every awkward thing that a source may hold, as a user has it: what is in the ledger may be other
/// than in src, and nothing else.
fn awkward_tree_on(kind: &str) {
    if !can_run() || !can_mount_on(kind) {
        return;
    }
    let home = Home::on(kind);
    nasty::fill(&home.src);
    home.give_src();
    let mount = home.mount(&[]);
    wait_until("the rest", 2 * LIMIT, || {
        mount.status()["state"] == "DEGRADED"
    });
    let lost = mount.ask("errors", &["-0"]).expect_code(0).out;
    let lost: Vec<&str> = lost.split('\0').filter(|p| !p.is_empty()).collect();
    eprintln!("{}", mount.ask("errors", &[]).out);
    mount.finish(&["--accept-loss"], 23);
    let (src, dst) = (compare::manifest(&home.src), compare::manifest(&home.dst));
    let ignore = compare::Ignore::default();
    let mut found = compare::differences(&src, &dst, ignore);
    found.retain(|line| {
        !lost.iter().any(|lost| {
            let below = line.strip_prefix(lost);
            let above = Path::new(lost).parent().unwrap().display().to_string();
            let above = if above.is_empty() {
                "."
            } else {
                above.as_str()
            };
            // Giving it up is a change of the directory that it was in.
            let changed = ["mtime", "nlink"].map(|what| format!("{above}: {what}:"));
            below.is_some_and(|rest| rest.starts_with([':', '/']))
                || changed.iter().any(|c| line.starts_with(c.as_str()))
        })
    });
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn an_awkward_tree_on_ext4_by_a_user() {
    awkward_tree_on("ext4");
}

#[test]
fn an_awkward_tree_on_xfs_by_a_user() {
    awkward_tree_on("xfs");
}

#[test]
fn an_awkward_tree_on_btrfs_by_a_user() {
    awkward_tree_on("btrfs");
}

#[test]
fn what_a_user_makes_has_his_umask() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    let mount = home.mount(&[]);
    as_user(USER, USER, 0o027, || {
        fs::write(mount.path("file"), "x").unwrap();
        fs::create_dir(mount.path("dir")).unwrap();
    });
    let check = |at: &Path| {
        for (name, mode) in [("file", 0o640), ("dir", 0o750)] {
            let made = at.join(name).metadata().unwrap();
            assert_eq!((made.uid(), made.mode() & 0o777), (USER, mode), "{name}");
        }
    };
    as_him(|| check(&home.at));
    mount.wait_complete();
    mount.finish(&[], 0);
    check(&home.dst);
}

#[test]
fn many_inodes_and_few_fds_go_together() {
    let programs = find_program("prlimit").is_some();
    if !can_run() || !need(programs, "prlimit (util-linux)") {
        return;
    }
    let home = Home::new();
    nasty::ordinary(&home.src, 60, 50);
    home.give_src();
    let mut command = Command::new(find_program("prlimit").unwrap());
    command
        .arg("--nofile=1024:1024")
        .arg(&home.program)
        .env("MIRRORFS_RUN_DIR", &home.run_dir)
        .env("MIRRORFS_STATE_DIR", &home.run_dir)
        .current_dir("/")
        .uid(USER)
        .gid(USER);
    let mount = home.mount_by(command, &[]);
    let pid = mount.child.as_ref().unwrap().id();
    let fds = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    as_him(|| {
        let all = compare::manifest(&home.at);
        assert!(all.entries().count() > 3000);
        // Under another name, under none, and under one that is another's now.
        let mut open: Vec<(File, Vec<u8>)> = Vec::new();
        for (i, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let content = bytes(i as u64, 5000);
            fs::write(mount.path(name), &content).unwrap();
            let file = File::options()
                .read(true)
                .write(true)
                .open(mount.path(name));
            open.push((file.unwrap(), content));
        }
        fs::create_dir(mount.path("sub")).unwrap();
        fs::rename(mount.path("a"), mount.path("sub/a")).unwrap();
        fs::rename(mount.path("sub"), mount.path("sub2")).unwrap();
        fs::remove_file(mount.path("b")).unwrap();
        fs::rename(mount.path("c"), mount.path("d")).unwrap();
        for (file, content) in &mut open {
            let mut now = Vec::new();
            file.read_to_end(&mut now).unwrap();
            assert!(now == *content);
            assert_eq!(file.metadata().unwrap().len(), 5000);
            file.set_len(10).unwrap();
            file.set_permissions(fs::Permissions::from_mode(0o600))
                .unwrap();
            assert_eq!(file.metadata().unwrap().len(), 10);
        }
        assert_eq!(fs::read(mount.path("sub2/a")).unwrap(), bytes(0, 10));
        assert_eq!(fs::read(mount.path("d")).unwrap(), bytes(2, 10));
        drop(open);
        for name in ["sub2/a", "d"] {
            fs::remove_file(mount.path(name)).unwrap();
        }
        fs::remove_dir(mount.path("sub2")).unwrap();
    });
    let most = fds();
    assert!(most < 900, "{most} fds are open");
    mount.wait_complete();
    mount.finish(&[], 0);
    let ignore = compare::Ignore {
        mtime: true,
        ..compare::Ignore::default()
    };
    let (src, dst) = (compare::manifest(&home.src), compare::manifest(&home.dst));
    compare::expect_equal_with(&src, &dst, ignore);
}

#[test]
pub(crate) fn other_users_are_let_in_only_where_root_allows_it() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fs::write(home.src.join("a"), "a").unwrap();
    home.give_src();
    let conf = home.scratch.path().join("fuse.conf");
    fs::write(&conf, "# user_allow_other\n").unwrap();
    let there = Path::new("/etc/fuse.conf");
    if !need(there.exists(), "/etc/fuse.conf") {
        return;
    }
    rustix::mount::mount_bind(&conf, there).unwrap();
    let args = ["-o", "allow_other"];
    let said = home.refused(&mut home.command(), &args).expect_code(1);
    assert!(said.err.contains("user_allow_other"), "{}", said.err);
    assert!(
        !home.dst.join(CONTROL).exists(),
        "a refusal changes nothing"
    );
    fs::write(&conf, "user_allow_other\n").unwrap();
    let mount = home.mount(&args);
    as_user(OTHER, OTHER, 0o022, || {
        assert_eq!(fs::read(mount.path("a")).unwrap(), b"a");
        assert!(fs::write(mount.path("a"), "b").is_err());
    });
    // He may not make things in the name of whoever comes by.
    as_him(|| {
        let open = fs::Permissions::from_mode(0o777);
        fs::set_permissions(&home.at, open).unwrap();
    });
    as_user(OTHER, OTHER, 0o022, || {
        let denied = fs::write(mount.path("others"), "x").unwrap_err();
        assert_eq!(denied.kind(), std::io::ErrorKind::PermissionDenied);
    });
    mount.wait_complete();
    mount.finish(&[], 0);
    rustix::mount::unmount(there, UnmountFlags::DETACH).unwrap();
}

/// He may not ask it, and is not told that there is none.
#[test]
pub(crate) fn a_user_is_told_that_a_migration_is_somebody_elses() {
    if !can_run() || !can_mount_on("ext4") {
        return;
    }
    let (home, w) = (Home::new(), World::on("ext4"));
    let m = w.mount_lazy();
    for command in ["status", "finish", "pause"] {
        let said = run(home.command().arg(command).arg(&m.at)).expect_code(3);
        assert!(said.err.contains("another user's"), "{}", said.err);
    }
    let said = run(home.command().arg("status")).expect_code(0).out;
    assert!(said.contains(m.at.to_str().unwrap()), "{said}");
    let at = m.at.clone();
    assert_eq!(m.unmount(), 20);
    let said = run(home.command().arg("status")).expect_code(0).out;
    assert_eq!(said, "no migration is running\n");
    let said = run(home.command().arg("status").arg(at)).expect_code(3).err;
    assert!(said.contains("no daemon serves it"), "{said}");
}

#[test]
pub(crate) fn what_keeps_a_user_from_mounting_is_said_in_one_line() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fs::write(home.src.join("a"), "a").unwrap();
    home.give_src();
    // No helper.
    let mut command = home.command();
    let said = home.refused(command.env("PATH", home.scratch.path()), &[]);
    let said = said.expect_code(1).err;
    assert!(
        said.contains("fusermount3") && said.contains("fuse3"),
        "{said}"
    );
    // A DST, and a mount point, of another user.
    let give = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), Some(uid)).unwrap();
    give(&home.dst, OTHER);
    let said = home.refused(&mut home.command(), &[]).expect_code(3).err;
    assert!(said.contains("DST") && said.contains("54322"), "{said}");
    give(&home.dst, USER);
    let home = home.beside();
    give(&home.at, OTHER);
    let said = home.refused(&mut home.command(), &[]).expect_code(3).err;
    assert!(said.contains("MOUNTPOINT"), "{said}");
    give(&home.at, USER);
    // The helper's own refusal is passed on: its mount point lies where only root mounts.
    let lone = home.scratch.dir("lone");
    fs::set_permissions(&lone, fs::Permissions::from_mode(0o1777)).unwrap();
    let mut home = home;
    let before = std::mem::replace(&mut home.at, lone);
    let said = home.refused(&mut home.command(), &[]).expect_code(3).err;
    assert!(
        said.contains("fusermount3: ") && said.contains("owned"),
        "{said}"
    );
    home.at = before;
    // A file system without users' xattrs.
    rustix::mount::mount(
        "none",
        &home.dst,
        "ramfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    give(&home.dst, USER);
    let said = home.refused(&mut home.command(), &[]).expect_code(3).err;
    assert!(
        said.contains(MARK) && said.contains("extended attributes"),
        "{said}"
    );
    rustix::mount::unmount(&home.dst, UnmountFlags::DETACH).unwrap();
    let said = home.refused(&mut home.command(), &["--keep-mount"]);
    said.expect_code(2);
    // No way to /dev/fuse, and none at all.
    let node = home.scratch.path().join("fuse");
    fs::set_permissions(&node, fs::Permissions::from_mode(0o600)).unwrap();
    let said = home.refused(&mut home.command(), &[]).expect_code(1).err;
    assert!(
        said.contains("/dev/fuse") && said.contains("0666"),
        "{said}"
    );
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    let bare = home.scratch.dir("dev");
    let null = File::open("/dev/null").unwrap();
    rustix::mount::mount_bind(&bare, "/dev").unwrap();
    let mut command = home.command();
    command.arg("mount").arg(&home.src).arg(&home.dst);
    command.stdin(null.as_fd().try_clone_to_owned().unwrap());
    let said = command.output();
    rustix::mount::unmount("/dev", UnmountFlags::DETACH).unwrap();
    let said = said.unwrap();
    let line = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.status.code(), Some(1), "{line}");
    assert!(
        line.contains("/dev/fuse") && line.contains("modprobe"),
        "{line}"
    );
}

#[test]
pub(crate) fn a_migration_goes_on_as_root_or_as_the_user_who_began_it() {
    if !can_run() {
        return;
    }
    let home = Home::on("ext4");
    fs::write(home.src.join("a"), "a").unwrap();
    home.give_src();
    let as_root = || {
        run(mirrorfs()
            .args(["mount", "-f"])
            .args([&home.src, &home.dst]))
        .expect_code(3)
    };
    let mount = home.mount(&["--no-background"]);
    // He may not have it replaced either.
    mount.ask("upgrade", &[]).expect_code(1);
    drop(mount);
    assert!(as_root().err.contains("begun rootless"));
    let mount = home.mount(&[]);
    mount.wait_complete();
    mount.finish(&[], 0);
    // And the reverse: root begins with a DST of the user's.
    let at = home.scratch.dir("at root's");
    let daemon = run(mirrorfs()
        .args(["mount", "--adopt", "--no-background"])
        .args([&home.src, &home.dst, &at]));
    daemon.expect_code(0);
    rustix::mount::unmount(&at, UnmountFlags::DETACH).unwrap();
    wait_until("the daemon has gone", LIMIT, || {
        run(Command::new("flock")
            .args(["-n"])
            .arg(home.dst.join(".mirrorfs/lock"))
            .arg("true"))
        .code()
            == 0
    });
    // The control directory is root's: to see what it is about he needs his rights.
    let said = home.refused_without_the_capability();
    assert!(said.contains("begun as root"), "{said}");
}

#[test]
pub(crate) fn root_without_the_capability_to_mount_asks_the_helper_and_passes_on_what_it_says() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    let said = home.refused_without_the_capability();
    assert!(said.contains("fusermount3: mount failed"), "{said}");
}

/// Modes that a user gives: some keep himself out.
const MODES: [u32; 9] = [
    0o444, 0o644, 0o400, 0o000, 0o555, 0o755, 0o311, 0o600, 0o200,
];

/// One random operation below `root`, the same for the same numbers; its answer.
fn operate(root: &Path, random: &mut Random) -> Result<String, Option<i32>> {
    let dirs = [".", "p", "q", "p/e", "modes", "modes/locked"];
    let names = ["a", "b", "444", "555", "x", "y", "locked", "p", "q", "e"];
    let pick = |random: &mut Random| {
        let dir = *random.one_of(&dirs);
        root.join(dir).join(random.one_of(&names))
    };
    let (one, two) = (pick(random), pick(random));
    let (what, n) = (random.below(16), random.below(20_000));
    let data = bytes(n, n as usize);
    let mode = *random.one_of(&MODES);
    let done = |result: std::io::Result<()>| {
        let done = result.map(|()| String::new());
        done.map_err(|e| e.raw_os_error())
    };
    let xattr = |name: &str| {
        rustix::fs::setxattr(
            &one,
            name,
            &data[..data.len().min(100)],
            rustix::fs::XattrFlags::empty(),
        )
    };
    match what {
        0 => done(fs::write(&one, &data)),
        1 => done(
            File::options()
                .append(true)
                .open(&one)
                .and_then(|mut f| f.write_all(&data)),
        ),
        2 => done(
            File::options()
                .write(true)
                .open(&one)
                .and_then(|f| f.set_len(n)),
        ),
        3 => done(fs::remove_file(&one)),
        4 => done(fs::create_dir(&one)),
        5 => done(fs::remove_dir(&one)),
        6 | 7 => done(fs::rename(&one, &two)),
        8 => done(fs::hard_link(&one, &two)),
        9 => done(std::os::unix::fs::symlink("a", &one)),
        10 | 11 => done(fs::set_permissions(&one, fs::Permissions::from_mode(mode))),
        12 => done(xattr("user.k").map_err(Into::into)),
        13 => {
            let stat = one.symlink_metadata().map_err(|e| e.raw_os_error())?;
            let size = if stat.is_dir() { 0 } else { stat.len() };
            Ok(format!("{:o} {size}", stat.mode()))
        }
        14 => {
            let list = fs::read_dir(&one).map_err(|e| e.raw_os_error())?;
            let mut all: Vec<_> = list.map(|e| e.unwrap().file_name()).collect();
            all.sort();
            Ok(format!("{all:?}"))
        }
        _ => {
            let all = fs::read(&one).map_err(|e| e.raw_os_error())?;
            Ok(format!(
                "{} {:x}",
                all.len(),
                xxhash_rust::xxh3::xxh3_64(&all)
            ))
        }
    }
}

/// The same operations on a user's mount and on a plain copy, with kills in between: the same
/// answers, the same tree.
fn same_as_plain(walks: bool) {
    if !can_run() {
        return;
    }
    let home = Home::new();
    fill(&home);
    as_him(|| {
        for name in ["p", "q", "p/e"] {
            fs::create_dir(home.src.join(name)).unwrap();
            fs::write(home.src.join(name).join("a"), name).unwrap();
        }
    });
    let plain = home.run_dir.join("plain");
    as_him(|| {
        run(Command::new("cp")
            .arg("-a")
            .arg(&home.src)
            .arg(&plain)
            .uid(USER)
            .gid(USER))
        .expect_code(0)
    });
    let args: &[&str] = if walks { &[] } else { &["--no-background"] };
    let (mut ours, mut theirs) = (Random::seeded(7), Random::seeded(7));
    let mut worked = 0;
    for _ in 0..4 {
        let mount = home.mount(args);
        as_him(|| {
            for step in 0..500 {
                let got = operate(&home.at, &mut ours);
                let want = operate(&plain, &mut theirs);
                assert_eq!(got, want, "step {step}");
                worked += usize::from(got.is_ok());
            }
        });
        mount.kill();
    }
    assert!(worked > 300, "only {worked} of 2000 did anything");
    let mount = home.mount(&[]);
    mount.wait_complete();
    mount.finish(&[], 0);
    let ignore = compare::Ignore {
        recent_mtime: true,
        allocated: true,
        ..compare::Ignore::default()
    };
    let (a, b) = (compare::manifest(&plain), compare::manifest(&home.dst));
    compare::expect_equal_with(&a, &b, ignore);
}

#[test]
fn random_operations_of_a_user_give_what_a_plain_tree_gives() {
    same_as_plain(true);
}

#[test]
fn random_operations_of_a_user_on_what_is_pending_give_what_a_plain_tree_gives() {
    same_as_plain(false);
}

#[test]
pub(crate) fn a_user_ends_his_manifest_and_root_does_not_do_it_for_him() {
    if !can_run() {
        return;
    }
    for by_root in [true, false] {
        let home = Home::new().beside();
        fs::write(home.src.join("f"), b"his").unwrap();
        home.give_src();
        let manifest = home.run_dir.join("manifest");
        let m = home.mount(&["--manifest", manifest.to_str().unwrap()]);
        m.wait_complete();
        let mut finish = home.command_as(if by_root { 0 } else { USER });
        let said = run(finish.arg("finish").arg(&home.at));
        let text = fs::read_to_string(&manifest).unwrap();
        if by_root {
            let said = said.expect_code(23);
            let line = format!("the manifest has no end: its daemon is user {USER}'s; ");
            assert!(said.err.contains(&line), "{}", said.err);
            assert!(!text.contains("# end"), "{text}");
        } else {
            said.expect_code(0);
            assert!(
                text.contains("# end 2 entries") && !text.contains("uid="),
                "{text}"
            );
            assert!(text.contains("./f type=file mode=0644 size=3 "), "{text}");
        }
        drop(m);
    }
}

/// Names that a source lists and does not show (unseen.rs), where the daemon has no capability for anything.
#[test]
fn a_directory_with_a_name_that_src_does_not_show_can_be_used_by_a_user() {
    let tools = need(kit("badsrc.py").is_some(), "badsrc.py of the test kit")
        && need(find_program("python3").is_some(), "python3");
    if !can_run() || !tools || !can_mount_on("ext4") {
        return;
    }
    let fs = LoopFs::new("ext4");
    let mut bad = BadSrc::new(&fs);
    unseen::fill(&bad);
    let mut home = Home::new();
    home.src = bad.real.clone();
    home.give_src();
    home.src = bad.at.clone();
    bad.start(&["path=d/f3 hide", "path=d/dir op=lookup err=EIO"]);
    let look = |mount: &Mount<'_>| {
        mount.wait_settled(2);
        as_him(|| {
            let d = mount.path("d");
            unseen::expect_unseen(&d.join("f3"), &d);
            unseen::expect_unseen(&d.join("dir"), &d);
            assert_eq!(fs::read(d.join("f4")).unwrap(), bytes(4, 3004));
        });
    };
    let mount = home.mount(&[]);
    look(&mount);
    mount.kill();
    // The next daemon learns of them.
    let mount = home.mount(&[]);
    look(&mount);
    bad.tell("off");
    mount.ask("errors", &["--retry"]).expect_code(0);
    wait_until("all of it", LIMIT, || mount.status()["state"] == "COMPLETE");
    as_him(|| {
        assert_eq!(fs::read(mount.path("d/f3")).unwrap(), bytes(3, 3003));
        assert_eq!(fs::read(mount.path("d/dir/below")).unwrap(), b"below");
        // The test has made something in it.
        let time = bad.real.join("d").metadata().unwrap().modified().unwrap();
        let dir = File::open(mount.path("d")).unwrap();
        dir.set_modified(time).unwrap();
    });
    mount.finish(&[], 0);
    let (src, dst) = (compare::manifest(&bad.real), compare::manifest(&home.dst));
    compare::expect_equal(&src, &dst);
}
