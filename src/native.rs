//! Native: dst without a mount while data is still to come (`--experimental-native`).
//!
//!   Placing   every directory is populated, through the mount meanwhile
//!   Pinning   each pending file can do without its name (mirror/native.rs)
//!   Guarded   the guard watches dst's file system; the mount may go     wants_detach()
//!   Native    it is gone: who opens a pending file waits until it is here   detached()
//!   Walking   it could not be done: the mount stays, and the walker pulls
//!
//! An access is judged when a file is opened (or truncated by name), because neither its bytes nor its
//! holes, its allocated blocks nor the question whether it is going to be written can be told apart
//! later. So every open counts as a write (D2).

pub mod guard;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{Mirror, Waiter, user_errno};
use crate::sys::fanotify::Group;
use crate::sys::pass;
use crate::walk::Walker;
use guard::Message;

/// The word that makes the program a guard.
pub const GUARD_WORD: &str = "native-guard";
/// Where the guard listens, in the control directory.
const SOCKET: &str = "guard";
/// How often what others do is looked at.
const TICK: Duration = Duration::from_millis(20);
/// The pause after a pass that pulled nothing, growing.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often everything is pinned once more because something moved meanwhile.
const PINS_MAX: u32 = 20;
/// How long before now a removal must lie to count as durable with it: clocks of inodes are coarse.
const MARGIN_SECS: i64 = 2;

/// Where it is: see the module's states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Placing = 0,
    Guarded = 1,
    Native = 2,
}

/// A migration that goes on without a mount.
pub struct Native {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    mirror: Arc<Mirror>,
    stage: AtomicU8,
    stop: AtomicBool,
    /// The connection to the guard.
    guard: Mutex<Option<Arc<OwnedFd>>>,
    /// The guard's group: held so that its death lets nobody through.
    group: Mutex<Option<OwnedFd>>,
    /// When the mount has to stay.
    walker: Mutex<Option<Walker>>,
}

impl Native {
    /// Begins; the mount is there, or a guard that an earlier daemon left behind.
    pub fn start(mirror: Arc<Mirror>, guard: Option<Taken>) -> Result<Native> {
        let stage = match guard {
            Some(_) => Stage::Native,
            None => Stage::Placing,
        };
        let shared = Arc::new(Shared {
            mirror,
            stage: AtomicU8::new(stage as u8),
            stop: AtomicBool::new(false),
            guard: Mutex::default(),
            group: Mutex::default(),
            walker: Mutex::default(),
        });
        let native = Native {
            shared: Arc::clone(&shared),
            threads: Mutex::default(),
        };
        if let Some(taken) = guard {
            shared.serve(taken)?;
        }
        let thread = std::thread::Builder::new().name("native".into());
        let thread = thread.spawn(move || shared.live()).map_err(no_thread)?;
        native.threads.lock().push(thread);
        Ok(native)
    }

    /// True when the guard watches and the mount is in the way.
    pub fn wants_detach(&self) -> bool {
        self.shared.stage() == Stage::Guarded
    }

    /// The mount is gone.
    pub fn detached(&self) {
        self.shared.set_stage(Stage::Native);
    }

    /// True when there is no mount any more.
    pub fn is_native(&self) -> bool {
        self.shared.stage() == Stage::Native
    }

    /// Nothing is pending and dst is plain: the guard goes.
    pub fn end(&self) {
        self.shared.tell(Message::End);
    }

    /// Stops to pull. Who wants a pending file gets EIO from now on, until the next daemon.
    pub fn stop(&self) {
        self.shared.tell(Message::Refuse);
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(walker) = self.shared.walker.lock().take() {
            walker.stop();
        }
        for thread in std::mem::take(&mut *self.threads.lock()) {
            if thread.join().is_err() {
                tracing::error!("the native thread panicked; its files are still pending");
            }
        }
    }
}

/// A guard that watches, and its group.
pub struct Taken {
    guard: OwnedFd,
    group: OwnedFd,
}

/// The guard that an earlier daemon of this dst left behind: with it there is no need for a mount.
pub fn find_guard(mirror: &Mirror) -> Result<Option<Taken>> {
    let mut tries_left = 50;
    loop {
        tries_left -= 1;
        let taken = match pass::connect(mirror.control_dir(), SOCKET) {
            Ok(guard) => expect_watching(guard),
            // Nobody listens any more.
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
            Err(e) => return Err(e).on("connect", Side::Dst, ".mirrorfs/guard"),
        };
        match taken {
            // It has not seen yet that the last daemon is gone.
            Err(_) if tries_left > 0 => std::thread::sleep(TICK),
            taken => return taken.map(Some),
        }
    }
}

fn expect_watching(guard: OwnedFd) -> Result<Taken> {
    let fail = |errno| -> Result<Taken> { Err(errno).on("fanotify", Side::Dst, ".") };
    let Some((bytes, fds)) =
        pass::receive(guard.as_fd()).on("recvmsg", Side::Dst, ".mirrorfs/guard")?
    else {
        return Err(Error::Unusable("the guard ended at once".into()));
    };
    match (Message::decode(&bytes), fds.into_iter().next()) {
        (Some(Message::Watching), Some(group)) => Ok(Taken { guard, group }),
        (Some(Message::Failed(errno)), _) => fail(Errno::from_raw_os_error(errno)),
        _ => fail(Errno::PROTO),
    }
}

/// Starts a guard; with the group of one that has died.
fn start_guard(mirror: &Mirror, group: Option<&OwnedFd>) -> Result<Taken> {
    let at = ".mirrorfs/guard";
    let control = mirror.control_dir();
    match rustix::fs::unlinkat(control, SOCKET, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e).on("unlink", Side::Dst, at),
    }
    let listener = pass::listen(control, SOCKET).on("bind", Side::Dst, at)?;
    let (ours, theirs) = pass::pair().on("socketpair", Side::Host, at)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("mirrorfs")
        .arg(GUARD_WORD)
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    // It outlives us: nobody waits for it.
    command
        .spawn()
        .map_err(|e| Error::Unusable(format!("cannot start the guard: {e}")))?;
    let mut fds = vec![control, listener.as_fd()];
    fds.extend(group.map(AsFd::as_fd));
    pass::send(ours.as_fd(), &Message::Watch.encode(), &fds, true).on("sendmsg", Side::Host, at)?;
    drop(command); // Our copy of its end: else its death would not be seen.
    expect_watching(ours)
}

impl Shared {
    fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Placing,
            1 => Stage::Guarded,
            _ => Stage::Native,
        }
    }

    fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Release);
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.mirror.stopping()
    }

    fn tell(&self, message: Message) {
        let guard = self.guard.lock().clone();
        if let Some(guard) = guard
            && let Err(errno) = pass::send(guard.as_fd(), &message.encode(), &[], true)
        {
            tracing::debug!("guard: sendmsg: {errno}");
        }
    }

    /// The whole life, on a thread of its own.
    fn live(self: &Arc<Self>) {
        let lived = match self.stage() {
            Stage::Native => self.pull(),
            _ => self.make_ready().and_then(|ready| match ready {
                true => self.pull(),
                false => Ok(()),
            }),
        };
        let Err(error) = lived else { return };
        if matches!(error, Error::Stopped) {
            return;
        }
        if self.stage() == Stage::Native {
            return tracing::error!("native: {error}");
        }
        tracing::warn!("the mount stays: {error}");
        match Walker::start(Arc::clone(&self.mirror)) {
            Ok(walker) => *self.walker.lock() = Some(walker),
            Err(e) => tracing::error!("{e}"),
        }
    }

    /// Until the mount is gone. False: nothing is pending, it need not go for us.
    fn make_ready(self: &Arc<Self>) -> Result<bool> {
        if !self.mirror.can_go_native() {
            let line = "needs root, file handles and trusted.* on DST's file system";
            return Err(Error::Unusable(line.into()));
        }
        let begun = Instant::now();
        let placed = self.mirror.populate_all()?;
        if placed.left > 0 {
            let line = format!("{} directories could not be populated", placed.left);
            return Err(Error::Unusable(line));
        }
        tracing::info!("native: all names are placed, {:?}", begun.elapsed());
        let files = self.pin()?;
        if files == 0 {
            self.complete();
            return Ok(false);
        }
        tracing::info!("native: {files} files pinned, {:?}", begun.elapsed());
        self.serve(start_guard(&self.mirror, None)?)?;
        self.settled()?;
        self.set_stage(Stage::Guarded);
        while self.stage() != Stage::Native {
            self.nap()?;
        }
        tracing::info!("native: the mount is gone, {:?}", begun.elapsed());
        Ok(true)
    }

    /// Pins until nothing moved meanwhile. The files that are pending.
    fn pin(self: &Arc<Self>) -> Result<u64> {
        let index = self.mirror.pending_index()?;
        for _ in 0..PINS_MAX {
            while !self.mirror.is_settled() {
                self.nap()?;
            }
            let epoch = self.mirror.epoch();
            let pinned = self.mirror.pin_all(index.as_fd())?;
            self.mirror.sync_dst()?;
            if pinned.left == 0 && self.mirror.epoch() == epoch {
                return Ok(pinned.files);
            }
        }
        Err(Error::Unusable("not everything could be pinned".into()))
    }

    /// Pulls what is in the index, over and over, until it is empty.
    fn pull(self: &Arc<Self>) -> Result<()> {
        let index = self.mirror.pending_index()?;
        let mut pause = PAUSE.0;
        loop {
            let before = self.mirror.progress().files_pulled.get();
            let under_way = Arc::new(AtomicU64::new(0));
            let each = || -> Waiter {
                under_way.fetch_add(1, Ordering::AcqRel);
                let under_way = Arc::clone(&under_way);
                Box::new(move |_| {
                    under_way.fetch_sub(1, Ordering::AcqRel);
                })
            };
            let left = self.mirror.pull_index(index.as_fd(), &each)?;
            while under_way.load(Ordering::Acquire) > 0 {
                self.nap()?;
            }
            self.settled()?;
            if left == 0 {
                self.complete();
                return Ok(());
            }
            pause = match self.mirror.progress().files_pulled.get() == before {
                true => (pause * 2).min(PAUSE.1),
                false => TICK,
            };
            let until = Instant::now() + pause;
            while Instant::now() < until {
                self.nap()?;
            }
        }
    }

    fn complete(&self) {
        let progress = self.mirror.progress();
        progress.walk_done.store(true, Ordering::Relaxed);
        progress.bytes_left.set(0);
        progress.complete.store(true, Ordering::Relaxed);
        tracing::info!("native: nothing is pending");
    }

    /// Waits until nothing is on its way to the disk, and tells the guard.
    fn settled(&self) -> Result<()> {
        let now = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        };
        let until = Instant::now() + PAUSE.0;
        loop {
            let second = now().as_secs() as i64 - MARGIN_SECS;
            if self.mirror.is_settled() {
                self.tell(Message::Settled(second));
                return Ok(());
            }
            if Instant::now() > until {
                return Ok(()); // Demand never rests: the next pass asks again.
            }
            self.nap()?;
        }
    }

    fn nap(&self) -> Result<()> {
        std::thread::sleep(TICK);
        match self.stopping() {
            true => Err(Error::Stopped),
            false => Ok(()),
        }
    }

    /// Listens to a guard, on a thread that ends with it or with the process.
    fn serve(self: &Arc<Self>, taken: Taken) -> Result<()> {
        let guard = Arc::new(taken.guard);
        *self.guard.lock() = Some(Arc::clone(&guard));
        *self.group.lock() = Some(taken.group);
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name("guard".into());
        let listen = move || {
            while let Ok(Some((bytes, fds))) = pass::receive(guard.as_fd()) {
                if let Some(Message::Wanted(id)) = Message::decode(&bytes)
                    && let Some(file) = fds.into_iter().next()
                {
                    shared.wanted(&guard, id, file);
                }
            }
            shared.guard_lost();
        };
        thread.spawn(listen).map(|_| ()).map_err(no_thread)
    }

    /// Somebody waits for a file.
    fn wanted(self: &Arc<Self>, guard: &Arc<OwnedFd>, id: i32, file: OwnedFd) {
        let (mirror, guard) = (Arc::clone(&self.mirror), Arc::clone(guard));
        let answer: Waiter = Box::new(move |result| {
            let errno = match result {
                Ok(()) => 0,
                // He waits for the next daemon, or the guard refuses him.
                Err(Error::Stopped) => return,
                Err(e) => user_errno(&e).raw_os_error(),
            };
            let message = Message::Answer(id, errno).encode();
            if let Err(errno) = pass::send(guard.as_fd(), &message, &[], true) {
                tracing::debug!("guard: sendmsg: {errno}");
            }
        });
        let task = move || mirror.when_here(file.as_fd(), answer);
        self.mirror.run_demand(Priority::Demand, Box::new(task));
    }

    /// The guard was killed. Nobody gets through while we hold its group: who had asked it gets EIO
    /// (a new guard's numbers would be taken for the old one's), and there is a new one.
    fn guard_lost(self: &Arc<Self>) {
        if self.stopping() || self.mirror.progress().complete.load(Ordering::Relaxed) {
            return;
        }
        tracing::error!("the guard is gone; starting another");
        let taken = {
            let group = self.group.lock();
            let Some(group) = group.as_ref() else { return };
            Group::refuse_all(group.as_fd());
            start_guard(&self.mirror, Some(group))
        };
        if let Err(e) = taken.and_then(|taken| self.serve(taken)) {
            tracing::error!("no guard: {e}; pending files stay closed until this daemon ends");
        }
    }
}

fn no_thread(e: std::io::Error) -> Error {
    Error::Unusable(format!("cannot start a thread: {e}"))
}
