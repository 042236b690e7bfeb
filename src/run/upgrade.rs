//! Upgrade: another program in the place of the daemon, while its mount is in use.
//!
//!   asked     `mirrorfs upgrade`: the new program runs here, knows this version of the state, and can read
//!             the state as it is at this moment
//!   held      no request is in work, nothing of a mark is only in memory (`Mirror::freeze`)
//!   written   everything the kernel relies on, as JSON in a memory file
//!   execve    same process, same fds for /dev/fuse, open files, both roots, lock and socket
//!   resumed   the new program has all of it, has the kernel send again what was not answered, answers
//!
//! Up to execve a failure is a thaw. After it, until requests are taken, the old program is run again
//! from the file that it was started from, with the same state.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::control::Listener;
use super::out::{self, quoted};
use super::preflight::{Dead, Ground};
use super::varlink::{Reply, Request, refusal, send};
use super::watch::{Before, Watch};
use super::{Failure, Outcome, client, exit, mount, preflight, steer};
use crate::cli;
use crate::config::MountConfig;
use crate::error::Error;
use crate::fuse::session::Session;
use crate::fuse::succession;
use crate::mirror::{self, Left, Mirror, Trees};
use crate::progress::Progress;
use crate::sys::board::Board;
use crate::sys::{caps, fault, keeper, local, succeed};
use crate::throttle::Background;

/// What `Saved` and everything in it looks like. Any change of it is another number.
const VERSION: u32 = 3;
/// First word of a program that is asked whether it could take over; the version follows.
const CHECK: &str = "--upgrade-check";
/// First word of a program that takes over. The fds of the state and of the old program follow, why the
/// new one could not (empty: this is the new one), and the words that the daemon was started with.
const TAKE_OVER: &str = "--upgraded";
/// Words before those.
const OWN_WORDS: usize = 4;
/// How long a program may take to say whether it could.
const CHECK_MAX: Duration = Duration::from_secs(10);

/// What one program leaves to the next.
#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    version: u32,
    pub(super) config: MountConfig,
    pub(super) args: cli::Mount,
    pub(super) watch: Before,
    fds: Fds,
    mirror: Option<mirror::State>,
    session: succession::State,
    /// When requests were held, milliseconds of the boot's clock.
    held_ms: u64,
}

impl Saved {
    /// The state that a keeper's daemon has left.
    pub(super) fn parse(bytes: &[u8]) -> Result<Saved, String> {
        let saved: Saved = serde_json::from_slice(bytes).map_err(|e| format!("state: {e}"))?;
        match saved.version {
            VERSION => Ok(saved),
            other => Err(format!("state {other}, this program knows {VERSION}")),
        }
    }

    /// Every fd that is named, without the client's.
    pub(super) fn fds(&self) -> Vec<RawFd> {
        let Fds {
            src,
            dst,
            lock,
            listener,
            client: _,
        } = self.fds;
        let mut all = vec![src, dst, lock, listener];
        all.extend(self.session.fds());
        all
    }
}

#[derive(Serialize, Deserialize)]
struct Fds {
    src: RawFd,
    dst: RawFd,
    lock: RawFd,
    listener: RawFd,
    client: RawFd,
}

/// `mirrorfs upgrade`.
pub(super) fn run(args: &cli::Upgrade) -> Outcome {
    let binary = args.binary.as_deref().map(steer::absolute).transpose()?;
    let Some(daemon) = client::find(&args.path)? else {
        preflight::migration(&args.path)?;
        let line = format!("PATH {}: no daemon serves it", quoted(&args.path));
        return Err(Failure::new(exit::UNUSABLE, line));
    };
    let answer = daemon.call(&Request::Upgrade { binary })?;
    let version = answer["version"].as_str().unwrap_or("?");
    let ms = answer["stopped_ms"].as_u64().unwrap_or(0);
    out::say(&format!(
        "mirrorfs {version} serves; requests waited {ms} ms"
    ));
    Ok(exit::DONE)
}

/// When this program was started by a daemon that wants to hand over.
pub(super) fn called(words: &[OsString]) -> Option<ExitCode> {
    let number = |n: usize| words.get(n)?.to_str()?.parse::<i32>().ok();
    match words.get(1)?.to_str()? {
        CHECK => {
            let known = number(2) == i32::try_from(VERSION).ok();
            // It has what execve leaves of the daemon's privileges.
            let can = caps::have_sys_admin() && caps::have_read_search();
            Some(ExitCode::from(match known && can && understands() {
                true => exit::DONE,
                false => exit::FAILURE,
            }))
        }
        TAKE_OVER => {
            let (state, old) = (number(2)?, number(3)?);
            let reason = words.get(4)?.to_string_lossy().into_owned();
            Some(ExitCode::from(take_over(state, old, reason)))
        }
        _ => None,
    }
}

/// Whether what the daemon would leave makes sense to this program: it comes through stdin. Nothing
/// comes from one that could not write it while users are served.
fn understands() -> bool {
    let mut state = BufReader::with_capacity(1 << 20, std::io::stdin().lock());
    match state.fill_buf().map(<[u8]>::is_empty) {
        Ok(true) => true,
        Ok(false) => serde_json::from_reader(state)
            .is_ok_and(|s: Saved| s.version == VERSION && s.session.fits()),
        Err(_) => false,
    }
}

/// The words that the daemon was started with.
fn own_words() -> Vec<OsString> {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    if words.get(1).is_some_and(|w| w == TAKE_OVER) {
        words.drain(1..(1 + OWN_WORDS).min(words.len()));
    }
    words
}

/// Runs `program` here. It comes back only with why not.
fn exec(program: &OsStr, state: RawFd, old: RawFd, reason: &str) -> String {
    let mut words = own_words();
    let own = [TAKE_OVER.to_owned(), state.to_string(), old.to_string()];
    let own = own.into_iter().chain([reason.to_owned()]);
    let at = 1.min(words.len());
    words.splice(at..at, own.map(OsString::from));
    let text = |word: &OsStr| CString::new(word.as_bytes());
    let words: Result<Vec<_>, _> = words.iter().map(|w| text(w)).collect();
    match (text(program), words) {
        (Ok(program), Ok(words)) => succeed::exec(&program, &words).to_string(),
        _ => "a NUL in a word".to_owned(),
    }
}

/// The pieces of a mount that is to be handed over.
pub(super) struct Served<'a> {
    pub(super) config: &'a MountConfig,
    pub(super) args: &'a cli::Mount,
    pub(super) watch: &'a Watch,
    pub(super) mirror: &'a Mirror,
    pub(super) session: &'a Session,
    pub(super) listener: BorrowedFd<'a>,
}

impl Served<'_> {
    /// Lets another program take over. It comes back only with why not; then all is as before.
    pub(super) fn hand_over(&self, binary: Option<&Path>, client: BorrowedFd<'_>) -> Failure {
        match self.prepare(binary, client) {
            Err(failure) => failure,
            Ok(binary) => {
                tracing::info!("upgrade to {}", quoted(&binary));
                let throttle = self.mirror.throttle();
                let background = throttle.background();
                if background == Background::Running {
                    throttle.set_background(Background::Paused);
                    self.mirror.throttle_changed();
                }
                let failure = match self.mirror.freeze(|patience| self.session.pause(patience)) {
                    Err(error) => Failure::new(exit::FAILURE, format!("upgrade: {error}")),
                    Ok(()) => {
                        let failure = self.replace(&binary, client, background);
                        self.mirror.thaw();
                        failure
                    }
                };
                self.session.unpause();
                throttle.set_background(background);
                self.mirror.throttle_changed();
                failure
            }
        }
    }

    /// Everything that can be known while users are served.
    fn prepare(&self, binary: Option<&Path>, client: BorrowedFd<'_>) -> Result<PathBuf, Failure> {
        let refuse = |line: &str| Failure::new(exit::FAILURE, format!("upgrade: {line}"));
        let cannot = self.session.cannot_hand_over();
        if let Some(line) = cannot.or_else(|| self.mirror.cannot_hand_over()) {
            return Err(refuse(line));
        }
        if local::uid() != 0 {
            return Err(refuse("only a daemon of root's keeps its privileges"));
        }
        let binary = match binary {
            Some(binary) => binary.to_path_buf(),
            None => own_binary().map_err(|e| refuse(&format!("/proc/self/exe: {e}")))?,
        };
        let shown = quoted(&binary);
        let file = File::open(&binary).map_err(|e| refuse(&format!("{shown}: open: {e}")))?;
        let inside = |path: &Option<PathBuf>| {
            let path = path.as_ref();
            path.is_some_and(|p| p.starts_with(&self.config.mountpoint))
        };
        if self.session.holds(file.as_fd()) {
            return Err(refuse(&format!(
                "{shown} is on this mount, which waits for it"
            )));
        }
        if inside(&self.config.log_file) {
            return Err(refuse("the log is on this mount, which waits for it"));
        }
        // As it is now: users are served, so it may be impossible, and it is not what is handed over.
        let draft = self.write(client, Background::Off, false, |fd| Ok(fd.as_raw_fd()));
        let draft = draft
            .map(|(state, _)| state)
            .inspect_err(|e| tracing::debug!("draft: {e}"));
        check(&binary, draft.ok()).map_err(|e| refuse(&format!("{shown}: {e}")))?;
        Ok(binary)
    }

    /// What a keeper has to know besides the records of single things; `src`: SRC's root, which stays
    /// open under this number.
    pub(super) fn base(&self, src: RawFd) -> Result<Saved, Error> {
        let (_, lock) = self.mirror.kept();
        let mut keep = |fd: BorrowedFd<'_>| Ok(fd.as_raw_fd());
        let background = self.mirror.throttle().background();
        Ok(Saved {
            version: VERSION,
            config: self.config.clone(),
            args: self.args.clone(),
            watch: self.watch.before(),
            fds: Fds {
                src,
                dst: self.mirror.dst_root().as_raw_fd(),
                lock: lock.as_raw_fd(),
                listener: self.listener.as_raw_fd(),
                client: -1,
            },
            mirror: Some(self.mirror.bare_state(background)),
            session: self.session.bare_state(&mut keep)?,
            held_ms: 0,
        })
    }

    fn replace(&self, binary: &Path, client: BorrowedFd<'_>, was: Background) -> Failure {
        let kept = RefCell::new(Vec::new());
        let keep = |fd: BorrowedFd<'_>| {
            let number = succeed::keep(fd)?;
            kept.borrow_mut().push(number);
            Ok(number)
        };
        let line = match self.write(client, was, true, keep) {
            Err(line) => line,
            Ok((state, old)) => {
                let numbers = (keep(state.as_fd()), keep(old.as_fd()));
                let held = succeed::hold_signals(true);
                let line = match (numbers, held) {
                    ((Ok(state), Ok(old)), Ok(())) => exec(binary.as_os_str(), state, old, ""),
                    ((Err(e), _) | (_, Err(e)), _) | (_, Err(e)) => format!("fcntl: {e}"),
                };
                if let Err(e) = succeed::hold_signals(false) {
                    tracing::error!("sigmask: {e}");
                }
                line
            }
        };
        succeed::keep_no_more(&kept.into_inner());
        Failure::new(
            exit::FAILURE,
            format!("upgrade: {}: {line}", quoted(binary)),
        )
    }

    /// The state, and the program that could go on with it if the new one cannot. `hold`: it is the
    /// one that is handed over.
    fn write(
        &self,
        client: BorrowedFd<'_>,
        was: Background,
        hold: bool,
        keep: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<RawFd>,
    ) -> Result<(File, File), String> {
        let held_ms = now_ms();
        let fail = |e: &dyn std::fmt::Display| e.to_string();
        let kept = |fd: BorrowedFd<'_>| keep(fd).map_err(|e| format!("fcntl: {e}"));
        let (src, lock) = self.mirror.kept();
        let mut keep = &keep;
        let saved = Saved {
            version: VERSION,
            config: self.config.clone(),
            args: self.args.clone(),
            watch: self.watch.before(),
            fds: Fds {
                src: kept(src.original())?,
                dst: kept(self.mirror.dst_root().as_fd())?,
                lock: kept(lock.as_fd())?,
                listener: kept(self.listener)?,
                client: kept(client)?,
            },
            mirror: Some(self.mirror.state(was).map_err(|e| fail(&e))?),
            session: self.session.state(hold, &mut keep).map_err(|e| fail(&e))?,
            held_ms,
        };
        let state = succeed::memory_file().map_err(|e| format!("memfd_create: {e}"))?;
        let mut out = BufWriter::with_capacity(1 << 20, state);
        serde_json::to_writer(&mut out, &saved).map_err(|e| fail(&e))?;
        let state = out.into_inner().map_err(|e| fail(&e))?;
        let old = File::open("/proc/self/exe").map_err(|e| format!("/proc/self/exe: {e}"))?;
        Ok((state, old))
    }
}

/// The file that this program was started from, as it is now.
fn own_binary() -> std::io::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let bytes = exe.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Asks a program whether it could take over; it reads the state of this moment from its stdin.
fn check(binary: &Path, draft: Option<File>) -> Result<(), String> {
    let stdin = match draft {
        Some(mut state) => {
            state.rewind().map_err(|e| format!("state: {e}"))?;
            Stdio::from(state)
        }
        None => Stdio::null(),
    };
    let mut child = Command::new(binary)
        .args([CHECK, &VERSION.to_string()])
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("exec: {e}"))?;
    let end = Instant::now() + CHECK_MAX;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => {
                let _ = child.kill(); // Gone already, then.
                let _ = child.wait(); // It was killed.
                return Err("it does not say whether it can take over".to_owned());
            }
            Err(e) => return Err(format!("wait: {e}")),
        }
    };
    match status.success() {
        true => Ok(()),
        false => Err(format!(
            "it cannot take over from this version ({}, state {VERSION}): {status}",
            env!("CARGO_PKG_VERSION")
        )),
    }
}

fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (sec, nsec) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    sec * 1000 + nsec / 1_000_000
}

/// What the program before us in this process has left.
pub(super) struct Predecessor {
    saved: Saved,
    /// Why the new program could not go on; empty: that is us.
    reason: String,
    /// Every number that was kept, for `let_go`.
    numbers: RefCell<Vec<RawFd>>,
    mirror: Cell<Option<mirror::State>>,
    /// Requests are taken: there is no way back.
    serving: Cell<bool>,
    /// It was killed in another process, and this is what it had written down.
    killed: Option<(Arc<Board>, RefCell<Left>)>,
}

/// Goes on with the mount, or has the old program do it.
fn take_over(state: RawFd, old: RawFd, reason: String) -> u8 {
    let new = reason.is_empty();
    let back = |line: &str| {
        if new {
            let why = exec(
                OsStr::new(&format!("/proc/self/fd/{old}")),
                state,
                old,
                line,
            );
            tracing::error!("back to the old program: {why}");
        }
        out::complain(&format!(
            "upgrade: {line}; the mount is dead: the same `mirrorfs mount` resumes"
        ));
        exit::FAILURE
    };
    let mut saved = match read(state) {
        Ok(saved) => saved,
        Err(line) => return back(&line),
    };
    let told = saved.mirror.take();
    let before = Predecessor {
        saved,
        reason,
        numbers: RefCell::new(vec![state, old]),
        mirror: Cell::new(told),
        serving: Cell::new(false),
        killed: None,
    };
    match mount::take_over(&before, None) {
        Ok(code) => code,
        Err(failure) if !before.serving.get() => back(&failure.line),
        Err(failure) => {
            tracing::error!("{}", failure.line);
            if before.saved.config.foreground {
                out::complain(&failure.line);
            }
            failure.exit
        }
    }
}

fn read(state: RawFd) -> Result<Saved, String> {
    let file = succeed::adopt(state).map_err(|e| format!("state: {e}"))?;
    let mut file = File::from(file);
    file.rewind().map_err(|e| format!("state: {e}"))?;
    let saved: Saved = serde_json::from_reader(BufReader::with_capacity(1 << 20, file))
        .map_err(|e| format!("state: {e}"))?;
    match saved.version {
        VERSION => Ok(saved),
        other => Err(format!("state {other}, this program knows {VERSION}")),
    }
}

impl Predecessor {
    pub(super) fn saved(&self) -> &Saved {
        &self.saved
    }

    /// One that was killed.
    pub(super) fn killed(mut saved: Saved, board: Arc<Board>, left: Left) -> Predecessor {
        let told = saved.mirror.take();
        Predecessor {
            saved,
            reason: String::new(),
            numbers: RefCell::default(),
            mirror: Cell::new(told),
            serving: Cell::new(false),
            killed: Some((board, RefCell::new(left))),
        }
    }

    fn adopt(&self, number: RawFd) -> rustix::io::Result<OwnedFd> {
        if self.killed.is_some() {
            // Under its number: that is written down.
            return keeper::take(number);
        }
        let fd = succeed::adopt(number)?;
        self.numbers.borrow_mut().push(number);
        Ok(fd)
    }

    fn adopted(&self, number: RawFd) -> Result<OwnedFd, Failure> {
        let fail = |e| Failure::new(exit::FAILURE, format!("fcntl: {e}"));
        self.adopt(number).map_err(fail)
    }

    /// What the mount works with.
    pub(super) fn ground(&self) -> Result<Ground, Failure> {
        let (config, watch) = (self.saved.config.clone(), &self.saved.watch);
        Ok(Ground {
            trees: Trees {
                src_path: config.src.clone(),
                dst_path: config.dst.clone(),
                src: self.adopted(self.saved.fds.src)?,
                dst: self.adopted(self.saved.fds.dst)?,
            },
            src_fs: watch.src_fs.clone(),
            dst_fs: watch.dst_fs.clone(),
            config,
            dead: Dead::default(),
            point: None,
        })
    }

    pub(super) fn listener(&self) -> Result<Listener, Failure> {
        let fd = self.adopted(self.saved.fds.listener)?;
        Ok(Listener::inherited(fd))
    }

    pub(super) fn mirror(
        &self,
        config: &MountConfig,
        trees: Trees,
        progress: Arc<Progress>,
    ) -> Result<Arc<Mirror>, Failure> {
        let lock = self.adopted(self.saved.fds.lock)?;
        let twice = || Failure::from(Error::Stopped);
        let state = self.mirror.take().ok_or_else(twice)?;
        let fds = (trees.src, trees.dst, lock);
        let mut left = self.killed.as_ref().map(|(b, l)| (b, l.borrow_mut()));
        let left = left.as_mut().map(|(b, l)| (Arc::clone(b), &mut **l));
        let mirror = Mirror::resume(config, fds, state, progress, left)?;
        match self.reason.is_empty() && fault::refuses("upgrade") {
            true => Err(Failure::new(exit::FAILURE, "refused by a test")),
            false => Ok(mirror),
        }
    }

    /// The session, at work. Signals come from here on.
    pub(super) fn session(&self, mirror: Arc<Mirror>) -> Result<Session, Failure> {
        let mut adopt = |number| self.adopt(number);
        let mut left = self.killed.as_ref().map(|(_, left)| left.borrow_mut());
        let (state, left) = (&self.saved.session, left.as_deref_mut());
        let session = Session::resume(mirror, state, &mut adopt, left)?;
        session.go_on()?;
        self.serving.set(true);
        let held = match self.killed {
            Some(_) => keeper::hold_signals(false),
            None => succeed::hold_signals(false),
        };
        if let Err(e) = held {
            tracing::error!("sigmask: {e}");
        }
        Ok(session)
    }

    /// Everything works: the client hears how it went, and what we have twice is closed.
    pub(super) fn answer(&self) {
        if self.killed.is_some() {
            tracing::warn!("the daemon before this one was killed: its mount goes on");
            return;
        }
        let stopped_ms = now_ms().saturating_sub(self.saved.held_ms);
        let version = env!("CARGO_PKG_VERSION");
        let reply = match self.reason.as_str() {
            "" => {
                tracing::info!("mirrorfs {version} serves; requests waited {stopped_ms} ms");
                Reply::of(json!({ "version": version, "stopped_ms": stopped_ms }))
            }
            reason => {
                tracing::warn!("upgrade: the new program could not go on: {reason}");
                let line = format!("upgrade: {reason}; mirrorfs {version} serves on");
                refusal(&Failure::new(exit::FAILURE, line))
            }
        };
        match self.adopt(self.saved.fds.client) {
            Ok(client) => {
                let mut client = UnixStream::from(client);
                let sent = send(&mut client, &reply).and_then(|()| client.flush());
                if let Err(e) = sent {
                    tracing::debug!("control: {e}"); // The client has gone.
                }
            }
            Err(e) => tracing::debug!("control: {e}"),
        }
        succeed::let_go(&self.numbers.take());
    }
}
