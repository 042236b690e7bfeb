//! Succession: a session that goes on under another program, in the same process.
//!
//! The kernel's side stays as it is: the connection and what was agreed on it, the handles it holds,
//! the files it has as backing. Requests that were read and not answered lie with the fd that they were
//! read from; closing it would end them with an error, so every such fd stays open. NOTIFY_RESEND makes
//! them come again, before anybody reads: a request must not come twice. Those that came through
//! io_uring stay in their slots: `ring/relay.rs`.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::answer::{Created, How, Opened};
use super::dev::Dev;
use super::handles::{Listing, OpenFile};
use super::passthrough::IoMode;
use super::reply::{Reply, errno};
use super::ring::relay::{self, Relay};
use super::session::{LOOK_MAX, Session};
use super::shared::Shared;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{DirState, Ino, Left, Mirror, Moment, Node, Stream, kind, write_json};
use crate::sys::board::Record;
use crate::sys::fusedev::BackingId;
use crate::sys::{fault, host, local, stat};

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
#[derive(Debug, Clone, Serialize, Deserialize)]
struct FileState {
    handle: u64,
    ino: Ino,
    fd: RawFd,
    /// The number of the backing file; `None`: reads and writes come to us.
    backing: Option<i32>,
    write: bool,
    /// The request that it was opened by.
    #[serde(default)]
    request: u64,
}

/// An open directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
        let root = local::open_mount_point(&self.mountpoint);
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
                request: 0,
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
        let bare = self.bare_state(keep)?;
        let mut kept = |fd: BorrowedFd<'_>| keep(fd).on("fcntl", Side::Host, &self.mountpoint);
        Ok(State {
            files,
            listings,
            next: (
                self.shared.files.next().load(Ordering::Relaxed),
                self.shared.listings.next().load(Ordering::Relaxed),
            ),
            // The last: who waits to answer may hold any lock.
            ring: self.relay.state(hold, &mut kept)?,
            ..bare
        })
    }

    /// What the next program has to know besides what is open, which is written down one by one.
    pub fn bare_state(&self, keep: &mut Keep<'_>) -> Result<State> {
        let mut kept = |fd: BorrowedFd<'_>| keep(fd).on("fcntl", Side::Host, &self.mountpoint);
        let lanes = self.lanes.lock();
        let lanes = lanes.iter().map(|d| kept(d.as_fd()));
        let lanes = lanes.collect::<Result<_>>()?;
        Ok(State {
            mountpoint: self.mountpoint.clone(),
            mount_id: self.mount_id.load(Ordering::Relaxed),
            passthrough: self.shared.backings.are_enabled(),
            dev: kept(self.dev.fd().as_fd())?,
            lanes,
            ring: None,
            files: Vec::new(),
            listings: Vec::new(),
            next: (0, 0),
        })
    }

    fn is_known(&self, ino: Ino) -> Result<()> {
        let node = self.shared.node(ino);
        node.map(|_| ())
            .on("lookup", Side::Dst, format!("inode {ino}"))
    }

    /// The session of the program before us; nobody is served before `go_on`. `left`: what is open, where
    /// that program was killed.
    pub fn resume(
        mirror: Arc<Mirror>,
        state: &State,
        adopt: &mut Adopt<'_>,
        left: Option<&mut Left>,
    ) -> Result<Session> {
        let mut adopted = |fd: RawFd| adopt(fd).on("fcntl", Side::Host, &state.mountpoint);
        let node = |ino| mirror.nodes().known(ino, "lookup");
        let dev = Arc::new(Dev::new(adopted(state.dev)?));
        let lanes: Result<Vec<_>> = state.lanes.iter().map(|n| adopted(*n)).collect();
        let lanes = lanes?;
        let was_killed = left.is_some();
        let (mut open, mut lists) = (Vec::new(), Vec::new());
        open.extend(state.files.iter().map(|f| (f.clone(), None)));
        lists.extend(state.listings.iter().map(|l| (l.clone(), None)));
        if let Some(left) = left {
            take_left(&mut left.files, &mut open)?;
            take_left(&mut left.listings, &mut lists)?;
            // Nobody has it any more but a request to close it.
            open.retain(|(f, _)| node(f.ino).is_ok());
            lists.retain(|(l, _)| node(l.ino).is_ok());
        }
        let files = open
            .into_iter()
            .map(|(f, record)| Ok((node(f.ino)?, adopted(f.fd)?, f, record)));
        let files = files.collect::<Result<Vec<_>>>()?;
        let shared = Arc::new(Shared::new(Arc::clone(&mirror)));
        for (listing, record) in lists {
            let unreadable =
                || Error::Unusable("a listing that was handed over makes no sense".into());
            let stream = match &listing.stream {
                Some(saved) => Some(Arc::new(Stream::of(saved).ok_or_else(unreadable)?)),
                None => None,
            };
            let open = Listing {
                record: Mutex::new(record),
                node: node(listing.ino)?,
                dir: adopted(listing.fd)?,
                stream: Mutex::new(stream),
                ahead: Mutex::default(),
            };
            shared.listings.restore(listing.handle, open);
        }
        let queues = match &state.ring {
            Some(ring) => Some(relay::resume(
                dev.fd(),
                &shared,
                lanes.len(),
                ring,
                &mut adopted,
            )?),
            None => None,
        };
        // From here on nothing fails: who drops an id takes it from the kernel.
        if state.passthrough {
            shared.backings.enable();
        }
        if was_killed && state.passthrough {
            forget_unknown(dev.fd(), files.iter().filter_map(|(_, _, f, _)| f.backing));
        }
        for (node, fd, file, record) in files {
            let known = |number| BackingId::known(dev.fd(), number);
            let (backings, number) = (&shared.backings, file.backing);
            shared.opened.lock().insert(file.request, file.handle);
            if file.write {
                node.ctime().is_users();
            }
            let open = OpenFile {
                _record: record,
                node,
                file: Arc::new(fd),
                // Who read through reads as everybody does from now on.
                src: None,
                mode: backings.restore(file.ino, number, file.write, known),
                write: file.write,
                since: Moment::FIRST,
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
        if was_killed {
            // A request to close one that is closed already may come again: its number is nobody's.
            let never = now_ms() << 20;
            shared.files.next().fetch_max(never, Ordering::Relaxed);
            shared.listings.next().fetch_max(never, Ordering::Relaxed);
        }
        let session = Session {
            shared,
            mountpoint: state.mountpoint.clone(),
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
        if was_killed && session.is_detached() {
            session.shared.expire();
        }
        session.introduce(&mirror);
        Ok(session)
    }

    /// Serves: first what the program before us has read and not answered.
    pub fn go_on(&self) -> Result<()> {
        self.dev
            .resend()
            .on("resend", Side::Host, &self.mountpoint)?;
        if self.shared.mirror.has_begun()
            && let Err(errno) = host::fuse_inc_epoch(self.dev.fd().as_fd())
        {
            // An older kernel: who gave up a change that was made may not see it for a day.
            tracing::debug!("FUSE_NOTIFY_INC_EPOCH: {errno}");
        }
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

/// Milliseconds since the boot.
fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// What a program that was killed has left of one kind, with its records.
fn take_left<T: serde::de::DeserializeOwned>(
    left: &mut Vec<Record>,
    all: &mut Vec<(T, Option<Record>)>,
) -> Result<()> {
    for record in left.drain(..) {
        let state = serde_json::from_slice(record.bytes());
        let state =
            state.map_err(|_| Error::Unusable("what was left open makes no sense".into()))?;
        all.push((state, Some(record)));
    }
    Ok(())
}

/// Numbers of backing files that were asked for and not written down any more (or not yet): they would
/// keep their files for as long as the mount is there. The kernel counts up.
fn forget_unknown(dev: &Arc<OwnedFd>, known: impl Iterator<Item = i32>) {
    const AROUND: i32 = 256;
    let known: HashSet<i32> = known.collect();
    let last = known.iter().copied().max().unwrap_or(0);
    for number in (last - AROUND).max(1)..=last.saturating_add(AROUND) {
        if !known.contains(&number) {
            drop(BackingId::known(dev, number));
        }
    }
}

/// The fd of a `kind::FILE` or `kind::LISTING`.
pub fn fd_of(bytes: &[u8]) -> Option<RawFd> {
    #[derive(Deserialize)]
    struct Fd {
        fd: RawFd,
    }
    serde_json::from_slice::<Fd>(bytes).ok().map(|f| f.fd)
}

impl State {
    /// The fds in it.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        self.lanes.iter().copied().chain([self.dev])
    }
}

impl Shared {
    /// Writes an open file down, before its number is given out.
    pub(super) fn write_file(
        &self,
        (handle, request): (u64, u64),
        node: &Node,
        file: &OwnedFd,
        (mode, write): (&IoMode, bool),
    ) -> Option<Record> {
        let state = FileState {
            handle,
            ino: node.ino,
            fd: file.as_raw_fd(),
            backing: match mode {
                IoMode::Cached { .. } => None,
                IoMode::Passthrough(id) => Some(id.number()),
            },
            write,
            request,
        };
        write_json(self.mirror.board()?, kind::FILE, 0, &state)
    }

    /// As `write_file`, for a directory.
    pub(super) fn write_listing(
        &self,
        handle: u64,
        ino: Ino,
        dir: &OwnedFd,
        stream: Option<&Stream>,
    ) -> Option<Record> {
        let state = ListingState {
            handle,
            ino,
            fd: dir.as_raw_fd(),
            stream: stream.and_then(Stream::save),
        };
        write_json(self.mirror.board()?, kind::LISTING, 0, &state)
    }

    /// Answers an open that the program before us has done; gives back one that it has not.
    pub(super) fn open_again(&self, reply: Reply<Opened>) -> Option<Reply<Opened>> {
        match self.opened_before(&reply) {
            Some((handle, open)) => {
                let how = How::File(open.mode.clone());
                reply.ok(Opened { handle, how });
                None
            }
            None => Some(reply),
        }
    }

    /// As `open_again`, for a file that was made.
    pub(super) fn create_again(
        shared: &Arc<Shared>,
        reply: Reply<Created>,
    ) -> Option<Reply<Created>> {
        let Some((handle, open)) = shared.opened_before(&reply) else {
            return Some(reply);
        };
        let (again, node) = (Arc::clone(shared), Arc::clone(&open.node));
        shared.mirror.with_attr(&node, move |attr| match attr {
            Ok(attr) => {
                let entry = again.entry(&open.node, attr);
                let how = How::File(open.mode.clone());
                reply.ok(Created(entry, Opened { handle, how }));
            }
            Err(e) => reply.error(errno("create", &e)),
        });
        None
    }

    fn opened_before<T: super::answer::Answer>(
        &self,
        reply: &Reply<T>,
    ) -> Option<(u64, Arc<OpenFile>)> {
        if !reply.is_again() || fault::breaks("K2") {
            return None;
        }
        let handle = *self.opened.lock().get(&reply.request())?;
        Some((handle, self.files.get(handle)?))
    }
}

impl Listing {
    /// It lists dst from now on.
    pub(super) fn write_without_stream(&self) {
        let mut record = self.record.lock();
        let Some(old) = record.take() else { return };
        let state = serde_json::from_slice(old.bytes()).map(|state| ListingState {
            stream: None,
            ..state
        });
        match state.and_then(|state| serde_json::to_vec(&state)) {
            Ok(bytes) => *record = old.changed(&bytes),
            Err(_) => drop(old.board().spoil()),
        }
    }
}
