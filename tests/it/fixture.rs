//! Fixtures: scratch file systems, mounts of the program, commands with a time limit.
//!
//! Every test thread has a mount namespace of its own: whatever happens to the test, its mounts
//! and loop devices go away with it, and tests that run at the same time do not see each other's.
//! A mount that hangs is killed by its watchdog, so that the suite fails instead of hanging.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit};

use crate::compare::{self, Ignore, Manifest};
use crate::messages;
use crate::raw;

/// The longest that one command or one step of waiting may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
/// The files above which a pending file is opened before it is whole.
pub(crate) const LARGE: usize = 8 << 20;
/// The longest that one mount may live, after which its watchdog kills it.
const WATCHDOG: Duration = Duration::from_secs(300);
/// The mark, as a dst inode carries it.
pub(crate) const MARK: &str = "trusted.mirrorfs";

/// The first byte of a mark in the raw tree.
pub(crate) fn mark(path: &Path) -> Option<u8> {
    let mut value = [0; 4096];
    match rustix::fs::lgetxattr(path, MARK, &mut value) {
        Ok(n) if n > 0 => Some(value[0]),
        _ => None,
    }
}

/// It is pending, or something below it is.
pub(crate) fn is_marked(path: &Path) -> bool {
    mark(path).is_some()
}

/// Fails the test when anything is pending below a directory that is done: a restart would take it for the
/// user's own, and zeros for its bytes. An `L` without anything pending below may be left anywhere (D6).
#[track_caller]
fn expect_no_strays(dir: &Path, above_done: bool) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name() != CONTROL) {
        let (path, is_dir) = (entry.path(), entry.file_type().is_ok_and(|t| t.is_dir()));
        let is_done = || above_done || !is_marked(dir);
        let is_pending = || mark(&path).is_some_and(|m| !is_dir || m & 1 == 0);
        // Asked twice: a daemon that lives may have moved it here meanwhile, and marked this.
        let stray = is_done() && is_pending() && is_done() && is_pending();
        assert!(!stray, "{} is pending below what is done", path.display());
        if is_dir {
            expect_no_strays(&path, is_done());
        }
    }
}

/// A directory whose mark says P.
pub(crate) fn is_unpopulated(dir: &Path) -> bool {
    mark(dir).is_some_and(|m| m & 1 == 0)
}
/// The control directory's name in the raw root of dst.
pub(crate) const CONTROL: &str = ".mirrorfs";

thread_local! {
    /// What the mounts of this thread's test are told.
    static TRANSPORT: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Runs a test with another transport than the program's own choice.
pub(crate) fn over(transport: &'static str, test: fn()) {
    TRANSPORT.set(Some(transport));
    test();
    TRANSPORT.set(None);
}

/// True when `have`; else says what is missing, and fails when nothing may be left out.
pub(crate) fn need(have: bool, what: &str) -> bool {
    if !have {
        eprintln!("not run: this test needs {what}");
        assert!(
            !tests_all(),
            "MIRRORFS_TEST_ALL=1 and this test needs {what}"
        );
    }
    have
}

/// CI: nothing is left out, and what can be long is.
pub(crate) fn tests_all() -> bool {
    std::env::var_os("MIRRORFS_TEST_ALL").is_some_and(|v| v == "1")
}

/// True when mounts can be made here.
pub(crate) fn can_mount() -> bool {
    need(rustix::process::geteuid().is_root(), "root")
        && need(Path::new("/dev/fuse").exists(), "/dev/fuse")
}

/// True when loop-mounted file systems of this kind and mounts can be made here.
pub(crate) fn can_mount_on(kind: &str) -> bool {
    can_mount()
        && need(Path::new("/dev/loop-control").exists(), "loop devices")
        && need(
            find_program(&format!("mkfs.{kind}")).is_some(),
            &format!("mkfs.{kind}"),
        )
}

/// A program in PATH or in the directories for root's programs.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

/// A tool of the test kit, where there is one.
pub(crate) fn kit(tool: &str) -> Option<PathBuf> {
    let dir = match std::env::var_os("MIRRORFS_KIT") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/kit"),
    };
    Some(dir.join(tool)).filter(|p| p.is_file())
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Output {
    /// The exit code; 128 + n for signal n.
    pub(crate) fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails the test unless the code is `want`.
    #[track_caller]
    pub(crate) fn expect_code(self, want: i32) -> Output {
        assert_eq!(
            self.code(),
            want,
            "stdout: {:.3000}\nstderr: {:.3000}",
            self.out,
            self.err
        );
        self
    }
}

/// Runs a command to its end, at most `limit` long: what takes longer is killed and fails the test.
#[track_caller]
pub(crate) fn run_for(command: &mut Command, limit: Duration) -> Output {
    isolate();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = raw::die_with_parent(command)
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut all = Vec::new();
            from.read_to_end(&mut all).unwrap();
            all
        })
    }
    let out = drain(child.stdout.take().unwrap());
    let err = drain(child.stderr.take().unwrap());
    let Some(status) = wait_child(&mut child, limit) else {
        child.kill().unwrap();
        panic!("{command:?} took longer than {limit:?}");
    };
    // A daemon may have inherited the pipes: its output is not waited for.
    let text = |h: thread::JoinHandle<Vec<u8>>| {
        let end = Instant::now() + Duration::from_secs(2);
        while !h.is_finished() && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        if !h.is_finished() {
            return "(still open: somebody inherited it)".to_owned();
        }
        String::from_utf8_lossy(&h.join().unwrap()).into_owned()
    };
    let output = Output {
        status,
        out: text(out),
        err: text(err),
    };
    for text in [&output.err, &output.out] {
        messages::heard(text, Some(output.code()));
    }
    output
}

/// Runs a command with the usual limit.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Output {
    run_for(command, LIMIT)
}

/// Runs a shell command as another user in `dir`.
#[track_caller]
pub(crate) fn shell_as(uid: u32, gid: u32, dir: &Path, script: &str) -> Output {
    let ids = [format!("--reuid={uid}"), format!("--regid={gid}")];
    run(Command::new("setpriv")
        .args(ids)
        .args(["--clear-groups", "sh", "-c", script])
        .current_dir(dir))
}

/// Runs `act` in a thread of its own as another user.
pub(crate) fn as_user<T: Send>(
    uid: u32,
    gid: u32,
    umask: u32,
    act: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        let user = scope.spawn(|| {
            raw::own_umask(umask);
            raw::become_user(uid, gid).unwrap();
            act()
        });
        match user.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A command of the program under test.
pub(crate) fn mirrorfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mirrorfs"));
    command.env_remove("MIRRORFS_FAULT");
    // Not on this machine's own record of what was finished.
    let state = std::env::temp_dir().join("mirrorfs-it-state");
    command.env("MIRRORFS_STATE_DIR", state);
    // The trees are small, so the parts that the walker takes of a directory are small too.
    command.env("MIRRORFS_FAULT_CHUNK", "16");
    command
}

fn wait_child(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > end {
            return None;
        }
        thread::sleep(Duration::from_millis(3));
    }
}

/// After a daemon was killed: waits until the kernel has noticed. It ends what came in between with
/// ECONNABORTED or ECANCELED: the io_uring of a dead process goes away a moment after the process.
#[track_caller]
pub(crate) fn wait_dead(at: &Path) {
    wait_until("ENOTCONN", LIMIT, || {
        let answer = rustix::fs::statvfs(at).err();
        answer != Some(rustix::io::Errno::CONNABORTED)
            && answer != Some(rustix::io::Errno::CANCELED)
    });
}

/// Waits until `done` says so.
#[track_caller]
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "waited {limit:?} for: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Gives this thread its own mount namespace, once. Other people's loop and FUSE mounts are let
/// go of in it, so that their devices are free when they unmount them.
fn isolate() {
    thread_local!(static DONE: Cell<bool> = const { Cell::new(false) });
    if DONE.replace(true) || !rustix::process::geteuid().is_root() {
        return;
    }
    raw::own_mount_namespace().unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let here = [
        std::env::current_dir().unwrap(),
        std::env::temp_dir(),
        mirrorfs().get_program().into(),
    ];
    for m in mounts() {
        let foreign = m.source.starts_with("/dev/loop") || m.kind.starts_with("fuse");
        if foreign && !here.iter().any(|p| p.starts_with(&m.at)) {
            // One that is below another has gone with it.
            let _ = rustix::mount::unmount(&m.at, UnmountFlags::DETACH);
        }
    }
    let max = rustix::process::getrlimit(Resource::Nofile).maximum;
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: max,
            maximum: max,
        },
    )
    .unwrap();
}

/// One line of mountinfo.
pub(crate) struct Mount {
    pub(crate) at: PathBuf,
    pub(crate) kind: String,
    pub(crate) source: String,
}

/// The mounts that this thread sees.
pub(crate) fn mounts() -> Vec<Mount> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    text.lines()
        .map(|line| {
            let (left, right) = line.split_once(" - ").unwrap();
            let left: Vec<_> = left.split(' ').collect();
            let mut right = right.split(' ');
            Mount {
                at: left[4].replace("\\040", " ").into(),
                kind: right.next().unwrap().to_owned(),
                source: right.next().unwrap().to_owned(),
            }
        })
        .collect()
}

/// The FUSE mount that is on top at a path, if one is.
pub(crate) fn fuse_mount_at(path: &Path) -> Option<Mount> {
    let top = mounts().into_iter().rfind(|m| m.at == path)?;
    Some(top).filter(|m| m.kind.starts_with("fuse"))
}

/// A directory of the test's own that everybody may enter.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        isolate();
        let base = std::env::temp_dir().canonicalize().unwrap();
        let dir = tempfile::Builder::new()
            .prefix("mirrorfs-it.")
            .tempdir_in(base)
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Scratch(dir)
    }

    /// The path of a new directory in it.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A file system of a given kind in a sparse image.
pub(crate) struct LoopFs {
    at: PathBuf,
    scratch: Scratch,
}

impl LoopFs {
    /// Made and mounted; big enough for every test.
    pub(crate) fn new(kind: &str) -> LoopFs {
        LoopFs::sized(kind, 2 << 30)
    }

    pub(crate) fn sized(kind: &str, bytes: u64) -> LoopFs {
        LoopFs::with(kind, bytes, &[], "loop")
    }

    /// With more arguments for mkfs, and mount options.
    pub(crate) fn with(kind: &str, bytes: u64, more: &[&str], mount: &str) -> LoopFs {
        let scratch = Scratch::new();
        let image = scratch.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let options: &[&str] = match kind {
            // An inode for every 4 KiB: some trees are nothing but names.
            "ext4" => &[
                "-q",
                "-F",
                "-i",
                "4096",
                "-E",
                "nodiscard,lazy_itable_init=1",
            ],
            "xfs" => &["-q", "-f", "-K"],
            _ => &["-q", "-f", "-K"],
        };
        let mkfs = find_program(&format!("mkfs.{kind}")).unwrap();
        run(Command::new(mkfs).args(options).args(more).arg(&image)).expect_code(0);
        let at = scratch.dir("fs");
        run(Command::new("mount")
            .args(["-o", mount])
            .arg(&image)
            .arg(&at))
        .expect_code(0);
        fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).unwrap();
        // ext4's lost+found is in nobody's way below a directory of our own.
        LoopFs { at, scratch }
    }

    /// A new directory in its root.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.at.join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// The root of the file system.
    pub(crate) fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        // Lazily, as a failed test may hold fds; the loop device goes with the last of them.
        if let Err(e) = rustix::mount::unmount(&self.at, UnmountFlags::DETACH) {
            eprintln!("{}: umount: {e}", self.at.display());
        }
        let _ = &self.scratch; // Dropped after the unmount.
    }
}

/// A src, a dst and a mount point, on one file system or on two.
pub(crate) struct World {
    pub(crate) src: PathBuf,
    pub(crate) dst: PathBuf,
    /// The separate mount point; `over()` makes it dst itself.
    pub(crate) at: PathBuf,
    scratch: Scratch,
    _fs: Vec<LoopFs>,
}

impl World {
    /// src and dst on one new file system.
    pub(crate) fn on(kind: &str) -> World {
        let fs = LoopFs::new(kind);
        World::from(fs.dir("src"), fs.dir("dst"), vec![fs])
    }

    /// src and dst on two new file systems.
    pub(crate) fn on_two(src: &str, dst: &str) -> World {
        let (a, b) = (LoopFs::new(src), LoopFs::new(dst));
        World::from(a.dir("src"), b.dir("dst"), vec![a, b])
    }

    /// src and dst in directories that the caller made.
    pub(crate) fn from(src: PathBuf, dst: PathBuf, fs: Vec<LoopFs>) -> World {
        let scratch = Scratch::new();
        let at = scratch.dir("mnt");
        World {
            src,
            dst,
            at,
            scratch,
            _fs: fs,
        }
    }

    /// dst as it was in the beginning.
    #[track_caller]
    pub(crate) fn empty_dst(&self) {
        fs::remove_dir_all(&self.dst).unwrap();
        fs::create_dir(&self.dst).unwrap();
    }

    /// The mount goes on top of dst.
    pub(crate) fn over(mut self) -> World {
        self.at = self.dst.clone();
        self
    }

    /// The mount goes there.
    pub(crate) fn at(mut self, at: &Path) -> World {
        self.at = at.to_path_buf();
        self
    }

    /// The path of something that is neither in src nor in dst.
    pub(crate) fn scratch_path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Mounts with the walker.
    #[track_caller]
    pub(crate) fn mount(&self) -> Mounted {
        self.mount_with(&[], &[])
    }

    /// Mounts without the walker: what nobody asks for stays pending.
    #[track_caller]
    pub(crate) fn mount_lazy(&self) -> Mounted {
        self.mount_with(&["--no-background"], &[])
    }

    /// Mounts with more arguments and environment.
    #[track_caller]
    pub(crate) fn mount_with(&self, args: &[&str], env: &[(&str, &str)]) -> Mounted {
        match self.try_mount(args, env) {
            Ok(mounted) => mounted,
            Err((code, log)) => panic!("mount exited with {code}: {log}"),
        }
    }

    /// Mounts, or gives the exit code and what was said. What an earlier mount has left must hold together.
    #[track_caller]
    pub(crate) fn try_mount(
        &self,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Mounted, (i32, String)> {
        if self.dst.join(CONTROL).exists() {
            expect_no_strays(&self.dst, false);
        }
        let log = tempfile::Builder::new()
            .prefix("log.")
            .tempfile_in(self.scratch.path())
            .unwrap();
        let (file, log) = log.keep().unwrap();
        let mut command = mirrorfs();
        command
            .arg("mount")
            .args(args)
            .arg("-f")
            .arg(&self.src)
            .arg(&self.dst)
            .arg(&self.at);
        let transport = TRANSPORT.get().map(|t| ("MIRRORFS_TRANSPORT", t));
        command.envs(transport).envs(env.iter().copied());
        command.stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let mut child = raw::die_with_parent(&mut command).spawn().unwrap();
        let pid = child.id();
        let watchdog = Watchdog::start(pid, WATCHDOG);
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                let code = status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                let said = fs::read_to_string(&log).unwrap_or_default();
                messages::heard(&said, Some(code));
                return Err((code, said));
            }
            // A dead mount may still be there, and its device number may be the next one's: only
            // statfs always asks the daemon. In this order: where it works the dead one is gone.
            if rustix::fs::statvfs(&self.at).is_ok() && fuse_mount_at(&self.at).is_some() {
                break;
            }
            if Instant::now() > end {
                raw::kill(pid, libc::SIGKILL);
                panic!(
                    "no mount after {LIMIT:?}: {}",
                    fs::read_to_string(&log).unwrap_or_default()
                );
            }
            thread::sleep(Duration::from_millis(3));
        }
        let mounted = Mounted {
            at: self.at.clone(),
            child: Some(child),
            pid,
            log,
            _watchdog: watchdog,
        };
        if TRANSPORT.get() == Some("dev") {
            let log = mounted.log();
            assert!(!log.contains("requests come through io_uring"), "{log}");
        }
        Ok(mounted)
    }

    /// What is in src now, with access times.
    pub(crate) fn src_state(&self) -> Manifest {
        compare::manifest(&self.src)
    }

    /// Fails the test unless src is as it was, access times included.
    #[track_caller]
    pub(crate) fn expect_src_untouched(&self, before: &Manifest) {
        compare::expect_equal_with(
            before,
            &self.src_state(),
            compare::Ignore {
                atime: false,
                ..compare::Ignore::default()
            },
        );
    }

    /// Fails the test unless dst is a plain copy of src without a trace of the program.
    #[track_caller]
    pub(crate) fn expect_finished_copy(&self) {
        self.expect_no_trace();
        compare::expect_equal(&compare::manifest(&self.src), &compare::manifest(&self.dst));
    }

    /// Fails the test unless dst is what a plain tree became by the same operations, times of what was
    /// changed just now aside.
    #[track_caller]
    pub(crate) fn expect_same_tree(&self, plain: &Path) {
        let ignore = Ignore {
            recent_mtime: true,
            ..Ignore::default()
        };
        compare::expect_equal_with(
            &compare::manifest(plain),
            &compare::manifest(&self.dst),
            ignore,
        );
    }

    /// Fails the test if dst shows that the program was there.
    #[track_caller]
    pub(crate) fn expect_no_trace(&self) {
        assert!(fuse_mount_at(&self.at).is_none(), "still mounted");
        assert!(
            !self.dst.join(CONTROL).exists(),
            "the control directory is still there"
        );
        for (path, entry) in compare::manifest(&self.dst).entries() {
            for mark in ["trusted.mirrorfs", "user.mirrorfs"] {
                assert!(
                    !entry.has_xattr(mark),
                    "{} still has {mark}",
                    compare::show(path)
                );
            }
        }
    }
}

/// Kills one process when it has lived too long.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn start(pid: u32, limit: Duration) -> Watchdog {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        thread::spawn(move || {
            let end = Instant::now() + limit;
            while !seen.load(Ordering::Relaxed) {
                if Instant::now() > end {
                    eprintln!("watchdog: process {pid} is killed after {limit:?}");
                    raw::kill(pid, libc::SIGKILL);
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        Watchdog(over)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A daemon that stays at the first passage of a fault point until it is let go.
pub(crate) struct Hold {
    fault: String,
    file: PathBuf,
}

impl Hold {
    pub(crate) fn at(w: &World, point: &str) -> Hold {
        Hold::by(w.scratch_path("hold"), point)
    }

    /// With a file of this path, beside which the daemon makes another.
    pub(crate) fn by(file: PathBuf, point: &str) -> Hold {
        let fault = format!("{point}:1");
        File::create(&file).unwrap();
        Hold { fault, file }
    }

    /// For the mount.
    pub(crate) fn env(&self) -> [(&str, &str); 2] {
        let file = self.file.to_str().unwrap();
        [
            ("MIRRORFS_FAULT", &self.fault),
            ("MIRRORFS_FAULT_HOLD", file),
        ]
    }

    /// Returns when it is there.
    #[track_caller]
    pub(crate) fn wait_met(&self) {
        let met = self.file.with_extension("met");
        wait_until("somebody at the point", LIMIT, || met.exists());
    }

    pub(crate) fn let_go(&self) {
        fs::remove_file(&self.file).unwrap();
    }
}

/// A mount by `mirrorfs mount -f`; unmounted and ended on drop.
pub(crate) struct Mounted {
    pub(crate) at: PathBuf,
    pub(crate) pid: u32,
    child: Option<Child>,
    log: PathBuf,
    _watchdog: Watchdog,
}

impl Mounted {
    /// A path in the mount.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.at.join(name)
    }

    /// `status --json`.
    #[track_caller]
    pub(crate) fn status(&self) -> serde_json::Value {
        status(&self.at)
    }

    /// Waits until nothing is pending.
    #[track_caller]
    pub(crate) fn wait_complete(&self) {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if status["state"] == "COMPLETE" {
                return;
            }
            let errors = status["errors"].as_u64().unwrap_or(0);
            assert!(errors == 0, "{status:#}\n{}", self.errors());
            assert!(
                Instant::now() < end,
                "not COMPLETE after {LIMIT:?}: {status:#}\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(30));
        }
    }

    /// `errors --json`, as text.
    #[track_caller]
    pub(crate) fn errors(&self) -> String {
        run(mirrorfs().arg("errors").arg(&self.at).arg("--json")).out
    }

    /// Waits until nothing is pending, then `finish`; the daemon must be gone soon after.
    #[track_caller]
    pub(crate) fn finish(mut self) {
        self.wait_complete();
        run(mirrorfs().arg("finish").arg(&self.at)).expect_code(0);
        let mut child = self.child.take().unwrap();
        if wait_child(&mut child, Duration::from_secs(30)).is_none() {
            raw::kill(self.pid, libc::SIGKILL);
            child.wait().unwrap();
            panic!("the daemon is still there after finish\n{}", self.log());
        }
        assert!(
            fuse_mount_at(&self.at).is_none(),
            "still mounted after finish"
        );
    }

    /// kill -9; the dead mount stays.
    pub(crate) fn kill(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        wait_dead(&self.at);
    }

    /// Unmounts and waits for the daemon to end by itself; its exit code.
    #[track_caller]
    pub(crate) fn unmount(mut self) -> i32 {
        // A child that another test's thread makes at this moment has our files open until its exec.
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let out = run(Command::new("umount").arg(&self.at));
            if !out.err.contains("target is busy") || Instant::now() > end {
                out.expect_code(0);
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let mut child = self.child.take().unwrap();
        let status = wait_child(&mut child, Duration::from_secs(30));
        status
            .expect("the daemon ends after umount")
            .code()
            .unwrap_or(-1)
    }

    /// The exit code of a daemon that is expected to end by itself.
    pub(crate) fn wait_exit(&mut self, limit: Duration) -> Option<i32> {
        let status = wait_child(self.child.as_mut()?, limit)?;
        self.child = None;
        Some(status.code().unwrap_or(-1))
    }

    /// True while the daemon runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|c| c.try_wait().unwrap().is_none())
    }

    /// What the daemon wrote.
    pub(crate) fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let start = text.char_indices().rev().nth(4000).map_or(0, |(i, _)| i);
        text[start..].to_owned()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.end();
        messages::heard(&fs::read_to_string(&self.log).unwrap_or_default(), None);
    }
}

impl Mounted {
    fn end(&mut self) {
        if thread::panicking() {
            eprintln!("log of the mount: {}", self.log());
        }
        // Without a child it was killed on purpose, and its dead mount is what the next one meets.
        let Some(mut child) = self.child.take() else {
            return;
        };
        // A detached mount ends its daemon; a daemon that does not end is killed.
        if fuse_mount_at(&self.at).is_some() {
            let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
        }
        if wait_child(&mut child, Duration::from_secs(5)).is_none() {
            child.kill().unwrap();
            // It waits for a source that hangs: in a test that fails that one comes to its end after it.
            let ended = wait_child(&mut child, Duration::from_secs(10)).is_some();
            assert!(ended || thread::panicking(), "a killed daemon does not end");
        }
    }
}

/// `status --json` of a mount point, a src or a dst.
#[track_caller]
pub(crate) fn status(path: &Path) -> serde_json::Value {
    let out = run(mirrorfs().arg("status").arg(path).arg("--json"))
        .expect_code(0)
        .out;
    match serde_json::from_str(&out) {
        Ok(serde_json::Value::Array(mut all)) if all.len() == 1 => all.remove(0),
        Ok(value) => value,
        Err(e) => panic!("status --json: {e}: {out}"),
    }
}

/// Small random numbers; the same seed gives the same.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The seed of MIRRORFS_TEST_SEED, else `default`; printed, so that a failure can be repeated.
    pub(crate) fn seeded(default: u64) -> Random {
        let seed = std::env::var("MIRRORFS_TEST_SEED")
            .ok()
            .and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or(default);
        eprintln!("MIRRORFS_TEST_SEED={seed}");
        Random::new(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }

    pub(crate) fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

/// `len` bytes that `tag` determines, without a zero among them.
pub(crate) fn bytes(tag: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(tag.wrapping_add(0x5bd1));
    let mut all = Vec::with_capacity(len + 8);
    while all.len() < len {
        all.extend((random.next() | 0x0101_0101_0101_0101).to_le_bytes());
    }
    all.truncate(len);
    all
}
