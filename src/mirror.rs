//! Mirror: the two roots and the rules between them.
//!
//! dst's own names, sizes and marks are the truth (docs/ARCHITECTURE.md); what is here in memory is
//! derived from them, or waits to be written to them. Nothing here knows FUSE.
//!
//! Lock order, outermost first: `moves`, a mark lock, a hydration's state, everything else is a
//! leaf. No lock is held across a copy, an fsync or a waiter (I8).

mod absent;
mod acts;
mod ahead;
mod anchor;
mod aside;
mod asker;
mod attr;
mod barrier;
mod bytemap;
mod carry;
mod changed;
mod commit;
mod control;
mod crowd;
mod ctime;
mod extras;
mod file;
mod fill;
mod finish;
mod found;
mod hydrate;
mod kept;
mod late;
mod ledger;
mod links;
mod mix;
mod mixed;
mod namespace;
mod native;
mod node;
mod outage;
mod overwrite;
mod own;
mod partial;
mod patience;
mod perms;
mod place;
mod populate;
mod prefetch;
mod prepare;
mod proof;
mod ranged;
mod readahead;
mod room;
mod running;
mod salvage;
mod settle;
mod source;
mod tally;
mod through;
mod trace;
mod turn;
mod unseen;
mod upgrade;
mod whole;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{FileType, OFlags};

pub use acts::{is_again, number_of};
pub use ahead::Stream;
pub use anchor::Anchor;
pub use asker::{Asker, asking};
pub use attr::{Attr, Change, Stamp};
pub use carry::{Carrier, Placed};
pub use changed::Moment;
pub use commit::DoneDir;
pub use control::{CONTROL, is_locked};
pub use file::{Locate, user_errno};
pub use finish::{Rest, Survey, accept_offline, finish_offline, read_ledger, survey};
pub use found::Found;
pub use hydrate::{FileRef, Need};
pub use kept::{Left, gone_fd, kind, write_json};
pub use ledger::LedgerEntry;
pub use namespace::{Creator, Entry, Make};
pub use node::{Ino, Node, NodeTable, Origin, Phase, ROOT};
pub use populate::{Access, DirRef, Marked, Waiter};
pub use ranged::ReadDone;
pub use source::{Face, SrcInfo};
pub use through::Caller;
pub use trace::{Traced, parse_trace};
pub use upgrade::{DirState, State};

use crate::config::{MountConfig, NoStore};
use crate::engine::Engine;
use crate::engine::passing::Allowance;
use crate::error::{Context, Errno, Error, Result, Side};
use crate::gate::{Gate, Place};
use crate::mark::{Mark, MarkName};
use crate::meta::{Meta, Refused};
use crate::progress::Progress;
use crate::sys::name::RelPath;
use crate::sys::xattr::Target;
use crate::sys::{caps, fd, host, stat};
use crate::throttle::{Background, Throttle};
use commit::Commit;
use control::{Control, Request};
use hydrate::Hydrations;
use ledger::Ledger;
use links::Anchors;
use partial::Partials;
use patience::Patience;
use prefetch::Prefetch;
use running::Populates;
use source::Source;
use tally::Tally;

/// What the mirror tells whoever caches its answers.
pub trait Invalidate: Send + Sync {
    /// The attributes of an inode changed without a request for it.
    fn attributes(&self, ino: Ino);
}

/// Both roots, open, and the paths that the migration remembers them by.
#[derive(Debug)]
pub struct Trees {
    /// SRC without symlinks.
    pub src_path: PathBuf,
    /// DST without symlinks.
    pub dst_path: PathBuf,
    /// SRC's root.
    pub src: OwnedFd,
    /// DST's root, from before anything is mounted on it.
    pub dst: OwnedFd,
}

impl Trees {
    /// Opens both. `Error::Unusable` (one line) when one cannot be used.
    pub fn open(src: &Path, dst: &Path) -> Result<Trees> {
        let (src_path, dst_path) = (absolute(src)?, absolute(dst)?);
        Ok(Trees {
            src: open_root(&src_path, "SRC")?,
            dst: open_root(&dst_path, "DST")?,
            src_path,
            dst_path,
        })
    }
}

/// Both trees and the rules.
pub struct Mirror {
    dst: Arc<OwnedFd>,
    control: Control,
    mark: MarkName,
    /// Without CAP_DAC_OVERRIDE: see perms.rs.
    modes_bind: bool,
    /// Small files may come with their data: inodes are had by handle, modes do not bind, and nothing
    /// unmarked in a P directory is ever believed.
    carries: bool,
    /// dst is btrfs: publishing needs a barrier (D6).
    btrfs: bool,
    source: Source,
    crowd: crowd::Crowd,
    shares: carry::Shares,
    nodes: NodeTable,
    anchors: Anchors,
    ledger: Ledger,
    partials: Partials,
    populates: Populates,
    hydrations: Hydrations,
    prefetch: Prefetch,
    /// Whether neighbours of what is opened come unasked.
    with_neighbours: bool,
    /// Writes down what is accessed first, when that is asked for; and where to, until it begins.
    recorder: Option<trace::Recorder>,
    trace_file: Mutex<Option<std::fs::File>>,
    proof: Mutex<Option<Arc<proof::Proof>>>,
    /// Whose reads leave nothing behind.
    no_store: NoStore,
    commit: Commit,
    engine: Engine,
    throttle: Arc<Throttle>,
    progress: Arc<Progress>,
    outage: outage::Outage,
    room: room::Room,
    aside: aside::Aside,
    spoiled: salvage::Spoiled,
    unseen: unseen::Unseen,
    patience: Arc<Patience>,
    source_timeout: Duration,
    large_file_bytes: u64,
    /// Large files may be changed before they are here (mixed.rs).
    mixes: bool,
    allowance: Allowance,
    /// Users change dst without us (native.rs).
    native: bool,
    /// Held while something marked is moved, and while a directory's mark is removed.
    moves: Mutex<()>,
    /// How often something marked was moved: a walker's finding is void when it changed.
    epoch: AtomicU64,
    mark_locks: perms::MarkLocks,
    /// What users ask for, from the first look at it to its answer.
    requests: Gate,
    keep: kept::Keep,
    /// What removes and changes marks for good, and the end of a populate.
    marks: Gate,
    stopping: AtomicBool,
    /// Set under `moves`: the control directory is gone.
    finished: AtomicBool,
    invalidate: OnceLock<Box<dyn Invalidate>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Mirror {
    /// Takes the lock, starts or resumes the migration, starts the engine.
    /// `Error::Unusable` (one line) when SRC or DST cannot be used; nothing was changed then.
    pub fn open(
        config: &MountConfig,
        trees: Trees,
        progress: Arc<Progress>,
    ) -> Result<Arc<Mirror>> {
        host::raise_nofile();
        let mark = mark_name(config);
        let Trees {
            src_path,
            dst_path,
            src,
            dst,
        } = trees;
        let control = Control::open(&Request {
            src: &src_path,
            src_root: src.as_fd(),
            dst: &dst_path,
            dst_root: dst.as_fd(),
            adopt: config.adopt,
            checksum: config.adopt_checksum,
            delete: config.adopt_delete,
            mark,
        })?;
        if !config.native && native::was_native(control.dir.as_fd()) {
            return Err(Error::Unusable(format!(
                "DST \"{}\" was without a mount: go on with --experimental-native",
                dst_path.display()
            )));
        }
        let again = path_again(config, src_path);
        let source = Source::new(src, again, mark)?;
        let mirror = Mirror::assemble(config, (source, dst), control, progress)?;
        mirror.perms().replay()?;
        mirror.stamp_root()?;
        mirror.start_threads()?;
        Ok(mirror)
    }

    /// All the pieces; no thread of ours runs yet.
    fn assemble(
        config: &MountConfig,
        (source, dst): (Source, OwnedFd),
        control: Control,
        progress: Arc<Progress>,
    ) -> Result<Arc<Mirror>> {
        let mark = mark_name(config);
        let fs = host::fs_stat(dst.as_fd()).on("statfs", Side::Dst, ".")?;
        let btrfs = fs.magic == host::BTRFS_MAGIC;
        let by_handle = caps::have_read_search() && anchor::can_open_handles(dst.as_fd());
        let dst = Arc::new(dst);
        let root = root_node(&dst, mark, by_handle)?;
        // What an earlier copy left is taken by size and times alone: a power cut could leave a carried
        // file that looks like that, without its bytes. There everything is marked.
        let carries = by_handle && !perms::are_binding(mark) && !control.identity.adopt;
        let anchors =
            Anchors::load(&control.links).on("getdents64", Side::Dst, ".mirrorfs/links")?;
        let ledger = Ledger::open(control.dir.as_fd())?;
        progress.errors.set(ledger.len() as u64);
        progress.extras.set(ledger.extras());
        Tally::load(control.dir.as_fd()).begin(&progress);
        let throttle = Arc::new(Throttle::default());
        throttle.set_limit(config.bwlimit);
        throttle.set_jobs(config.jobs);
        if !config.background {
            throttle.set_background(Background::Off);
        }
        let engine_config = proof::engine_config(config);
        let engine = Engine::start_throttled(&engine_config, Arc::clone(&throttle))?;
        Ok(Arc::new(Mirror {
            source,
            crowd: crowd::Crowd::default(),
            shares: carry::Shares::default(),
            nodes: NodeTable::new(Arc::clone(&dst), root),
            dst,
            unseen: unseen::Unseen::load(control.unseen.as_fd())?,
            control,
            mark,
            modes_bind: perms::are_binding(mark),
            carries,
            btrfs,
            anchors,
            ledger,
            partials: Partials::default(),
            populates: Populates::default(),
            hydrations: Hydrations::default(),
            prefetch: Prefetch::default(),
            with_neighbours: config.prefetch,
            recorder: config.record.is_some().then(trace::Recorder::default),
            trace_file: Mutex::default(),
            proof: Mutex::default(),
            no_store: config.no_store.clone(),
            commit: Commit::default(),
            engine,
            throttle,
            progress,
            outage: outage::Outage::default(),
            room: room::Room::default(),
            aside: aside::Aside::default(),
            spoiled: salvage::Spoiled::default(),
            patience: Patience::new(config.on_error, config.source_timeout),
            source_timeout: config.source_timeout,
            large_file_bytes: config.large_file_bytes,
            mixes: !config.native && mixed::is_possible(&fs),
            allowance: Allowance::new(config.cache),
            native: config.native,
            moves: Mutex::new(()),
            epoch: AtomicU64::new(0),
            mark_locks: perms::MarkLocks::default(),
            requests: Gate::new(Place::Requests),
            keep: kept::Keep::default(),
            marks: Gate::new(Place::Marks),
            stopping: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            invalidate: OnceLock::new(),
            threads: Mutex::default(),
        }))
    }

    fn start_threads(self: &Arc<Self>) -> Result<()> {
        self.spawn("commit", Mirror::commit_loop)?;
        self.spawn("prefetch", Mirror::prefetch_loop)?;
        self.spawn("src", Mirror::watch_loop)
    }

    fn spawn(self: &Arc<Self>, name: &str, run: fn(&Arc<Mirror>)) -> Result<()> {
        let mirror = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&mirror))
            .map_err(|e| Error::Unusable(format!("cannot start a thread: {e}")))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Until it is populated the root has the attributes of whatever directory DST was: give it
    /// src's at once, since everybody looks at it first.
    fn stamp_root(&self) -> Result<()> {
        let root = self.nodes.get(ROOT).on("lookup", Side::Dst, ".")?;
        if !root.is_pending_dir() {
            return Ok(());
        }
        let src = self.source.dir(&Arc::new(RelPath::root()))?;
        let meta = Meta::capture_fd(src.capture, src.fd.as_fd()).on("statx", Side::Src, ".")?;
        let dst = self.dst.as_fd();
        let perm = self.stamp(&meta, dst, &RelPath::root())?;
        if perm.is_some() {
            let mark = Mark {
                perm,
                ..Mark::pending()
            };
            self.replace_mark(dst, &mark)
                .on("setxattr", Side::Dst, ".")?;
        }
        Ok(())
    }

    /// Counters for status.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// What holds the background back.
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// What was set at the throttle counts from now on, for those too who sleep.
    pub fn throttle_changed(&self) {
        self.engine.terms_changed();
    }

    /// Ends what waits or has just begun in the background: it stays pending.
    pub fn cancel_background(&self) {
        self.throttle.set_background(Background::Off);
        self.engine.cancel_background();
    }

    /// What could not be pulled.
    pub fn ledger_entries(&self) -> Vec<LedgerEntry> {
        self.ledger.entries()
    }

    /// Gives up what the ledger says of a path of src, if it stays so; durable. How many entries.
    pub fn accept_loss(&self, path: &RelPath) -> Result<usize> {
        let accepted = self.ledger.accept(path);
        self.ledger.sync(self.control.dir.as_fd())?;
        Ok(accepted)
    }

    /// True when this start found a migration to resume.
    pub fn is_resumed(&self) -> bool {
        self.control.resumed
    }

    /// dst's root, opened before anything was mounted over it.
    pub fn dst_root(&self) -> &Arc<OwnedFd> {
        &self.dst
    }

    /// The inodes that the kernel holds.
    pub fn nodes(&self) -> &NodeTable {
        &self.nodes
    }

    /// How often something marked was moved (see `DoneDir::epoch`): the last one has arrived. Waits for one
    /// that is under way, which is counted before it is at its new place.
    pub fn epoch(&self) -> u64 {
        let _guard = self.moves.lock();
        self.epoch.load(Ordering::Acquire)
    }

    /// The root as the walker knows it, and whether it still carries a mark.
    pub fn root_dir(&self) -> Result<Option<DirRef>> {
        let mark = self
            .mark
            .get(Target::Fd(self.dst.as_fd()))
            .on("getxattr", Side::Dst, ".")?;
        let node = self.nodes.get(ROOT).on("lookup", Side::Dst, ".")?;
        Ok(mark.map(|_| DirRef {
            ino: ROOT,
            anchor: node.anchor.clone(),
            origin: Some(Arc::new(RelPath::root())),
        }))
    }

    /// True while src keeps most calls waiting.
    pub fn src_is_slow(&self) -> bool {
        self.crowd.pace.is_slow()
    }

    /// Who is told when cached answers become wrong. Once.
    pub fn set_invalidate(&self, to: Box<dyn Invalidate>) {
        // A second session on one mirror does not exist.
        let _ = self.invalidate.set(to); // The first one stays.
    }

    /// True once `stop` has begun: long work ends early.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Ends all work: what has landed is committed, what was queued stays pending.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.stop_watching_src();
        self.engine.stop();
        self.commit.stop();
        self.prefetch.stop();
        if let Some(recorder) = &self.recorder {
            recorder.stop();
        }
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                tracing::error!("the {name} thread panicked; its files are still pending");
            }
        }
        if let Err(e) = self.ledger.sync(self.control.dir.as_fd()) {
            tracing::warn!("{e}");
        }
    }

    fn finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    fn invalidate(&self, ino: Ino) {
        if let Some(to) = self.invalidate.get() {
            to.attributes(ino);
        }
    }

    /// Records a failure: the ledger, the log, the count. dst that takes nothing is no entry's failure.
    fn fail(&self, path: &RelPath, error: &Error) {
        if error.is_dst_full() {
            return self.note_full(error);
        }
        self.ledger.record(path, error);
        self.progress.errors.set(self.ledger.len() as u64);
    }

    /// As `fail`, for the bytes of a file that src cannot read.
    fn fail_ranges(&self, path: &RelPath, error: &Error, bad: &[std::ops::Range<u64>], all: bool) {
        self.ledger.record_ranges(path, error, bad, all);
        self.progress.errors.set(self.ledger.len() as u64);
    }

    fn fail_unless_stopped(&self, path: &RelPath, error: &Error) {
        if !matches!(error, Error::Stopped) {
            self.fail(path, error);
        }
    }

    /// A later try succeeded.
    fn settle_ledger(&self, path: &RelPath) {
        if self.progress.errors.get() > 0 {
            self.ledger.settle(path);
            self.progress.errors.set(self.ledger.len() as u64);
        }
    }

    /// Records metadata that dst would not take. Without privilege an owner that cannot be set is
    /// no news, as with any other copy.
    fn refused(&self, path: &RelPath, refused: &Refused) {
        let unprivileged = [Errno::PERM, Errno::INVAL].contains(&refused.errno);
        if self.mark == MarkName::User && refused.what == "chown" && unprivileged {
            return;
        }
        self.ledger.record_refused(path, refused);
        self.progress.errors.set(self.ledger.len() as u64);
    }

    /// Records xattrs of src that we may not read.
    fn unread(&self, path: &RelPath, meta: &Meta) {
        for (name, errno) in &meta.unread {
            self.ledger
                .record_unread(path, &name.to_string_lossy(), *errno);
            self.progress.errors.set(self.ledger.len() as u64);
        }
    }

    /// Serialises reading, changing and writing back a mark.
    fn lock_mark(&self, ino: Ino) -> MutexGuard<'_, ()> {
        self.mark_locks.lock(ino)
    }
}

/// A path that leads into our own mount leads nowhere else any more.
fn path_again(config: &MountConfig, src: PathBuf) -> Option<PathBuf> {
    Some(src).filter(|p| !p.starts_with(&config.mountpoint))
}

fn mark_name(config: &MountConfig) -> MarkName {
    match config.rootless || !caps::have_sys_admin() {
        true => MarkName::User,
        false => MarkName::Trusted,
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|e| Error::Unusable(format!("\"{}\": {e}", path.display())))
}

fn open_root(path: &Path, what: &str) -> Result<OwnedFd> {
    host::open_dir(path)
        .map_err(|errno| Error::Unusable(format!("{what} \"{}\": open: {errno}", path.display())))
}

fn root_node(dst: &Arc<OwnedFd>, mark: MarkName, by_handle: bool) -> Result<Node> {
    let anchor = Anchor::root(dst, by_handle).on("name_to_handle_at", Side::Dst, ".")?;
    let phase = match mark
        .get(Target::Fd(dst.as_fd()))
        .on("getxattr", Side::Dst, ".")?
    {
        None => Phase::Unmarked,
        Some(m) if m.populated => Phase::Populated,
        Some(_) => Phase::Pending,
    };
    let origin = Some(Origin {
        dir: Arc::new(RelPath::root()),
        name: None,
    });
    stat::stat_fd(dst.as_fd()).on("statx", Side::Dst, ".")?;
    fd::open_beneath(dst.as_fd(), &RelPath::root(), OFlags::PATH).on("open", Side::Dst, ".")?;
    Ok(Node::new(
        ROOT,
        anchor,
        FileType::Directory,
        phase,
        origin,
        None,
    ))
}
