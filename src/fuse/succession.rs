//! Succession: a session that goes on under another program, in the same process.
//!
//! The kernel's side stays as it is: the connection and what was agreed on it, the handles it holds,
//! the files it has as backing. Requests that were read and not answered lie with the fd that they were
//! read from; closing it would end them with an error, so every such fd stays open. NOTIFY_RESEND makes
//! them come again, before anybody reads: a request must not come twice. Those that came through
//! io_uring stay in their slots: `ring/relay.rs`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::dev::Dev;
use super::handles::{Listing, OpenFile};
use super::passthrough::IoMode;
use super::ring::relay::{self, Relay};
use super::session::{LOOK_MAX, Session};
use super::shared::Shared;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{DirState, Ino, Mirror, Stream};
use crate::sys::fusedev::BackingId;
use crate::sys::{host, local, stat};

/// What the next program has to be told of a session. Fds are numbers in this process.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    mountpoint: PathBuf,
    mount_id: u64,
    passthrough: bool,
    dev: RawFd,
    lanes: Vec<RawFd>,
    ring: Option<relay::State>,
    files: Vec<FileState>,
    listings: Vec<ListingState>,
    next: (u64, u64),
}

/// An open file.
#[derive(Debug, Serialize, Deserialize)]
struct FileState {
    handle: u64,
    ino: Ino,
    fd: RawFd,
    /// The number of the backing file; `None`: reads and writes come to us.
    backing: Option<i32>,
    write: bool,
}

/// An open directory.
#[derive(Debug, Serialize, Deserialize)]
struct ListingState {
    handle: u64,
    ino: Ino,
    fd: RawFd,
    /// It is listed in src's order.
    stream: Option<DirState>,
}

impl State {
    /// True when this program has room for what must be where it was.
    pub fn fits(&self) -> bool {
        self.ring.as_ref().is_none_or(relay::State::fits)
    }
}

/// How the fds come over: `keep` on the old side, `adopt` on the new one.
pub type Keep<'a> = dyn FnMut(BorrowedFd<'_>) -> Result<RawFd, Errno> + 'a;
/// See `Keep`.
pub type Adopt<'a> = dyn FnMut(RawFd) -> Result<OwnedFd, Errno> + 'a;

impl Session {
    /// Why another program could not go on with this session.
    pub fn cannot_hand_over(&self) -> Option<&'static str> {
        if self.helper.is_some() {
            return Some("fusermount3 has made this mount");
        }
        if self.shared.expired.load(Ordering::Relaxed) {
            return Some("the mount is detached");
        }
        if let Some(line) = *self.bound.lock() {
            return Some(line);
        }
        if !self.relay.has_queues() {
            return None;
        }
        self.show_own_again();
        self.relay.cannot_hand_over(&self.shared)
    }

    /// The kernel may have forgotten our own file.
    fn show_own_again(&self) {
        if self.shared.ask_for_a_request().is_ok() {
            return;
        }
        let root = local::open_dir_path(&self.mountpoint);
        let root = root.ok().filter(|root| self.holds(root.as_fd()));
        let shown = root.map(|root| self.shared.show_own(root.as_fd(), LOOK_MAX));
        if shown != Some(Ok(())) {
            tracing::debug!("our own file: {shown:?}");
        }
    }

    /// Keeps what comes through io_uring waiting, until `unpause`; false: not within `patience`.
    pub fn pause(&self, patience: Duration) -> bool {
        self.relay.pause(patience)
    }

    /// Nothing came of handing over: what waits since `pause` or `state` is answered.
    pub fn unpause(&self) {
        self.relay.unpause();
    }

    /// True when a file is on this very mount.
    pub fn holds(&self, file: BorrowedFd<'_>) -> bool {
        let id = self.mount_id.load(Ordering::Relaxed);
        stat::stat_fd(file).is_ok_and(|s| s.mnt_id == id)
    }

    /// What the next program has to know, once no request is in work. `hold`: nobody is answered any
    /// more, until `unpause`; without it what is there is only like it.
    pub fn state(&self, hold: bool, keep: &mut Keep<'_>) -> Result<State> {
        let mut kept = |fd: BorrowedFd<'_>| keep(fd).on("fcntl", Side::Host, &self.mountpoint);
        let files = self.shared.files.all().into_iter().map(|(handle, open)| {
            self.is_known(open.node.ino)?;
            Ok(FileState {
                handle,
                ino: open.node.ino,
                fd: kept(open.file.as_fd())?,
                backing: match &open.mode {
                    IoMode::Cached { .. } => None,
                    IoMode::Passthrough(id) => Some(id.number()),
                },
                write: open.write,
            })
        });
        let files = files.collect::<Result<_>>()?;
        let listings = self
            .shared
            .listings
            .all()
            .into_iter()
            .map(|(handle, open)| {
                self.is_known(open.node.ino)?;
                let stream = open.stream.lock().clone();
                Ok(ListingState {
                    handle,
                    ino: open.node.ino,
                    fd: kept(open.dir.as_fd())?,
                    stream: stream.and_then(|s| s.save()),
                })
            });
        let listings = listings.collect::<Result<_>>()?;
        let lanes = self.lanes.lock();
        let lanes = lanes.iter().map(|d| kept(d.as_fd()));
        let lanes = lanes.collect::<Result<_>>()?;
        Ok(State {
            mountpoint: self.mountpoint.clone(),
            mount_id: self.mount_id.load(Ordering::Relaxed),
            passthrough: self.shared.backings.are_enabled(),
            dev: kept(self.dev.fd().as_fd())?,
            lanes,
            files,
            listings,
            next: (
                self.shared.files.next().load(Ordering::Relaxed),
                self.shared.listings.next().load(Ordering::Relaxed),
            ),
            // The last: who waits to answer may hold any lock.
            ring: self.relay.state(hold, &mut kept)?,
        })
    }

    fn is_known(&self, ino: Ino) -> Result<()> {
        let node = self.shared.node(ino);
        node.map(|_| ()).on("lookup", Side::Dst, "")
    }

    /// The session of the program before us in this process; nobody is served before `go_on`.
    pub fn resume(mirror: Arc<Mirror>, state: &State, adopt: &mut Adopt<'_>) -> Result<Session> {
        let mut adopted = |fd: RawFd| adopt(fd).on("fcntl", Side::Host, &state.mountpoint);
        let node = |ino| mirror.nodes().get(ino).on("lookup", Side::Dst, "");
        let dev = Arc::new(Dev::new(adopted(state.dev)?));
        let lanes: Result<Vec<_>> = state.lanes.iter().map(|n| adopted(*n)).collect();
        let (lanes, on) = (lanes?, host::dup(mirror.dst_root().as_fd()));
        let on = on.on("dup", Side::Dst, ".")?;
        let files = state
            .files
            .iter()
            .map(|f| Ok((f, node(f.ino)?, adopted(f.fd)?)));
        let files = files.collect::<Result<Vec<_>>>()?;
        let shared = Arc::new(Shared::new(Arc::clone(&mirror)));
        for listing in &state.listings {
            let unreadable =
                || Error::Unusable("a listing that was handed over makes no sense".into());
            let stream = match &listing.stream {
                Some(saved) => Some(Arc::new(Stream::of(saved).ok_or_else(unreadable)?)),
                None => None,
            };
            let open = Listing {
                node: node(listing.ino)?,
                dir: adopted(listing.fd)?,
                stream: Mutex::new(stream),
                ahead: Mutex::default(),
            };
            shared.listings.restore(listing.handle, open);
        }
        let queues = match &state.ring {
            Some(ring) => Some(relay::resume(dev.fd(), &shared, ring, &mut adopted)?),
            None => None,
        };
        // From here on nothing fails: who drops an id takes it from the kernel.
        if state.passthrough {
            shared.backings.enable();
        }
        for (file, node, fd) in files {
            let known = |number| BackingId::known(dev.fd(), number);
            let (backings, number) = (&shared.backings, file.backing);
            let open = OpenFile {
                node,
                file: Arc::new(fd),
                // Who read through reads as everybody does from now on.
                src: None,
                mode: backings.restore(file.ino, number, file.write, known),
                write: file.write,
            };
            shared.files.restore(file.handle, open);
        }
        shared
            .files
            .next()
            .fetch_max(state.next.0, Ordering::Relaxed);
        shared
            .listings
            .next()
            .fetch_max(state.next.1, Ordering::Relaxed);
        let session = Session {
            shared,
            mountpoint: state.mountpoint.clone(),
            on,
            dead: 0,
            mount: Mutex::new(None),
            helper: None,
            mount_id: AtomicU64::new(state.mount_id),
            dev,
            lanes: Mutex::new(lanes.into_iter().map(Arc::new).collect()),
            relay: Relay::default(),
            inherited: Mutex::new(queues),
            bound: Mutex::default(),
            threads: Mutex::default(),
        };
        session.introduce(&mirror);
        Ok(session)
    }

    /// Serves: first what the program before us has read and not answered.
    pub fn go_on(&self) -> Result<()> {
        self.dev
            .resend()
            .on("resend", Side::Host, &self.mountpoint)?;
        let lanes = std::mem::take(&mut *self.lanes.lock());
        for lane in lanes {
            if let Err(e) = self.read_from(Dev::shared(lane)) {
                // With one of them the mount lives.
                tracing::error!("cannot start a thread: {e}");
            }
        }
        let mut threads = self.threads.lock();
        if let (false, Some(queues)) = (threads.is_empty(), self.inherited.lock().take()) {
            self.relay.know(&queues);
            threads.extend(queues.go());
        }
        match threads.is_empty() {
            true => Err(Error::Unusable("cannot start a session thread".into())),
            false => Ok(()),
        }
    }
}
