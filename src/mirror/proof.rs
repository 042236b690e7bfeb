//! Proof: `mount --manifest`. What comes whole and in one pass is hashed on its way.
//!
//!   begin    nobody waits for the file: its worker hashes each piece. Else, behind large holes, and from when on
//!            somebody does wait: the pieces are kept
//!   done     all of it was read, and src was looked at again and has not changed
//!   landed   these bytes are what dst has, of one src (I6), and who waited was answered: what was kept goes to
//!            a thread that is nice to all others; then there is a line
//!
//! Large pieces are kept in the engine's own buffers, which are lent: nothing is copied. All that is kept has limits
//! (buffers, bytes, tasks): a demand copy that meets one gives its digest up, and while the thread is behind the
//! walker waits (`wait_for_hashes`).
//!
//! A line says what src's file was, by its path there, when it was read. Nothing that users do in dst makes it wrong,
//! so it needs no order with marks, and a crash may lose it: whoever ends the manifest (run/manifest.rs) goes
//! through src once more, takes the digest of each file that is as it was then, and reads those that have none:
//! what came by ranges, was shared (FICLONE), was here already, or was never asked for.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::Mirror;
use super::source::Face;
use crate::config::MountConfig;
use crate::engine::EngineConfig;
use crate::engine::buffers::SMALL_BYTES;
use crate::engine::job::{Lent, Priority};
use crate::error::{Error, Result};
use crate::manifest::{Digest, Entry, Scope, Stream, Trouble, Writer, is_settled_at};
use crate::sys::host;
use crate::sys::name::RelPath;
use crate::sys::stat::Stat;

/// Files, or parts of large ones, that wait for the thread.
const WAITING_MAX: usize = 512;
/// Bytes of small files, which are copied, that wait for it.
const COPIES_MAX: u64 = 8 << 20;
/// Buffers that are lent, of all workers and of each.
const SPARE_ALL: usize = 64;
const SPARE: (usize, usize) = (8, 24);
/// So many bytes of one file are kept until it has landed; the thread begins with a larger one before.
const KEPT_MAX: usize = 8 << 20;
/// The walker waits while more bytes than this wait for the thread.
const BEHIND: u64 = 4 << 20;
const LOOK: Duration = Duration::from_millis(5);
/// The thread's share of a CPU that others want. Not SCHED_IDLE: it has locks that others want, too.
const NICE: i32 = 19;
/// Behind so many bytes of holes a worker hands a file on: more would keep others waiting.
const HOLES_HERE: u64 = 1 << 20;
/// Behind so many the thread gives it up.
const HOLES_MAX: u64 = 1 << 30;

/// The manifest of a mount.
pub struct Proof {
    writer: Writer,
    scope: Scope,
    away: Away,
}

/// The thread that hashes what workers hand on.
struct Away {
    tell: Sender<Task>,
    behind: Arc<Behind>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Bytes that wait for the thread: of all, and of those that were copied.
#[derive(Default)]
struct Behind {
    all: AtomicU64,
    copies: AtomicU64,
}

/// A file that was handed on.
#[derive(Default)]
struct Handed {
    stream: Mutex<Stream>,
    /// Not all of it was: set without waiting for who hashes.
    lost: AtomicBool,
}

enum Piece {
    Lent(Lent),
    Copy(Vec<u8>),
    /// A hole, up to this offset.
    Hole(u64),
}

/// What is given back when it was hashed, or is not to be.
struct Kept {
    offset: u64,
    piece: Piece,
    behind: Arc<Behind>,
}

enum Task {
    Pieces(Arc<Handed>, Vec<Kept>),
    /// All of it was handed on.
    Done(Box<dyn FnOnce() + Send>),
    End,
}

/// One file on its way.
pub(super) struct Hashing {
    proof: Arc<Proof>,
    stream: Place,
    holes: u64,
    begun: SystemTime,
}

/// A file of which all was read. Dropped, nothing is said of it.
pub(super) struct Hashed {
    hashing: Hashing,
    path: RelPath,
}

enum Place {
    Here(Box<Stream>),
    Away(Later),
}

/// A file of which nothing is hashed before it has landed, or is larger than what is kept.
#[derive(Default)]
struct Later {
    handed: Arc<Handed>,
    kept: Vec<Kept>,
    bytes: usize,
}

/// What a mount's engine is to be.
pub(super) fn engine_config(config: &MountConfig) -> EngineConfig {
    let workers = match config.workers {
        0 => host::cpus().len().max(1),
        n => n,
    };
    let spare = (SPARE_ALL / workers).clamp(SPARE.0, SPARE.1);
    EngineConfig {
        workers: config.workers,
        io_uring: config.io_uring,
        spare_buffers: config.manifest.as_ref().map_or(0, |_| spare),
        ..EngineConfig::default()
    }
}

impl Mirror {
    /// Begins to write a manifest: `Error::Unusable` when the file cannot be used. Once.
    pub fn prove_into(&self, path: &Path) -> Result<()> {
        let begun = Writer::begin(path).map_err(|t| Error::Unusable(t.to_string()))?;
        let (writer, _, bad) = begun;
        if let Some(bad) = bad.filter(|bad| bad.line > 0) {
            tracing::warn!("{bad}; what is behind it is read again");
        }
        let (tell, told) = bounded(WAITING_MAX);
        let thread = std::thread::Builder::new().name("hash".into());
        let thread = thread.spawn(move || hash(&told));
        let thread = thread.map_err(|e| Error::Unusable(format!("thread: {e}")))?;
        let proof = Proof {
            writer,
            scope: Scope::ours(),
            away: Away {
                tell,
                behind: Arc::default(),
                thread: Mutex::new(Some(thread)),
            },
        };
        *self.proof.lock() = Some(Arc::new(proof));
        Ok(())
    }

    /// A manifest is written.
    pub(super) fn proof(&self) -> Option<Arc<Proof>> {
        self.proof.lock().clone()
    }

    /// For the walker, which hands files on: waits while who hashes is behind. `stop`: not any longer.
    pub fn wait_for_hashes(&self, stop: impl Fn() -> bool) {
        while let Some(proof) = self.proof()
            && proof.away.behind.all.load(Relaxed) > BEHIND
            && !stop()
        {
            std::thread::sleep(LOOK);
        }
    }

    /// What is known of it goes to the file: after a kill it is there.
    pub fn flush_proof(&self) {
        if let Some(proof) = self.proof() {
            proof.writer.flush();
        }
    }

    /// No more lines; the file is another's to go on with. Its end is not written here. `None`: there is none.
    /// Else whether all lines are durable.
    pub fn end_proof(&self) -> Option<Result<(), Trouble>> {
        let proof = self.proof.lock().take()?;
        let _ = proof.away.tell.send(Task::End); // The thread ends only then.
        if let Some(thread) = proof.away.thread.lock().take() {
            let _ = thread.join(); // A panic was logged: some files have no digest.
        }
        Some(proof.writer.close())
    }

    /// What SRC's root is known by.
    pub fn src_face(&self) -> Face {
        self.source.face()
    }
}

impl Proof {
    /// A file of src, read into memory at once and looked at again.
    pub(super) fn carried(&self, path: &RelPath, src: &Stat, begun: SystemTime, bytes: &[u8]) {
        self.add(path, src, begun, Digest::of(bytes));
    }

    fn add(&self, path: &RelPath, src: &Stat, begun: SystemTime, digest: Digest) {
        let entry = Entry::copied(path.clone(), src, None, self.scope);
        self.writer.add(&Entry {
            digest: Some(digest),
            ctime: is_settled_at(src, begun).then_some(src.ctime),
            ..entry
        });
    }
}

impl Hashing {
    pub(super) fn begin(proof: Arc<Proof>, priority: Priority) -> Hashing {
        Hashing {
            proof,
            stream: match priority {
                Priority::Demand => Place::Away(Later::default()),
                Priority::Ahead | Priority::Background => Place::Here(Box::default()),
            },
            holes: 0,
            begun: SystemTime::now(),
        }
    }

    /// Somebody waits for the rest.
    pub(super) fn put_off(&mut self) {
        if let Place::Here(stream) = &mut self.stream {
            let handed = Handed {
                stream: Mutex::new(std::mem::take(&mut **stream)),
                lost: AtomicBool::new(false),
            };
            self.stream = Place::Away(Later {
                handed: Arc::new(handed),
                ..Later::default()
            });
        }
    }

    /// A piece of so many bytes is to be lent, not copied.
    pub(super) fn keeps(&self, len: usize) -> bool {
        len > SMALL_BYTES && matches!(self.stream, Place::Away(_))
    }

    pub(super) fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        match &mut self.stream {
            Place::Here(stream) => stream.bytes(offset, bytes),
            Place::Away(later) => {
                let copies = self.proof.away.behind.copies.load(Relaxed);
                let room = copies < COPIES_MAX && !later.handed.lost.load(Relaxed);
                let piece = room.then(|| Piece::Copy(bytes.to_vec()));
                later.keep(&self.proof.away, offset, piece);
            }
        }
    }

    pub(super) fn kept(&mut self, offset: u64, piece: Option<Lent>) {
        match &mut self.stream {
            Place::Away(later) => later.keep(&self.proof.away, offset, piece.map(Piece::Lent)),
            Place::Here(stream) => match piece {
                Some(piece) => stream.bytes(offset, piece.bytes()),
                None => stream.lose(),
            },
        }
    }

    pub(super) fn hole(&mut self, range: Range<u64>) {
        self.holes += range.end - range.start;
        if self.holes > HOLES_HERE {
            self.put_off();
        }
        match &mut self.stream {
            Place::Here(stream) => stream.hole(range),
            Place::Away(later) => {
                let piece = (self.holes <= HOLES_MAX).then_some(Piece::Hole(range.end));
                later.keep(&self.proof.away, range.start, piece);
            }
        }
    }

    /// All of the file was read, and nothing more comes.
    pub(super) fn done(self, path: &RelPath) -> Hashed {
        Hashed {
            hashing: self,
            path: path.clone(),
        }
    }
}

impl Hashed {
    /// The file was looked at afterwards, and is `src`; dst has landed with what was read.
    pub(super) fn landed(self, src: Stat) {
        let Hashing {
            proof,
            stream,
            begun,
            ..
        } = self.hashing;
        let path = self.path;
        match stream {
            Place::Here(stream) => {
                if let Some(digest) = stream.digest(src.size) {
                    proof.add(&path, &src, begun, digest);
                }
            }
            Place::Away(mut later) => {
                later.hand_on(&proof.away);
                let (weak, of) = (Arc::downgrade(&proof), Arc::clone(&later.handed));
                let done = move || {
                    if let Some(proof) = weak.upgrade()
                        && !of.lost.load(Relaxed)
                        && let Some(digest) = of.stream.lock().digest(src.size)
                    {
                        proof.add(&path, &src, begun, digest);
                    }
                };
                let done = || Task::Done(Box::new(done));
                proof.away.hand_on(&later.handed, done);
            }
        }
    }
}

impl Later {
    /// Keeps a piece; without one, or where too much is kept, the file will have no digest.
    fn keep(&mut self, away: &Away, offset: u64, piece: Option<Piece>) {
        let Some(piece) = piece.filter(|_| !self.handed.lost.load(Relaxed)) else {
            self.handed.lost.store(true, Relaxed);
            return self.kept.clear();
        };
        let behind = Arc::clone(&away.behind);
        let kept = Kept::new(offset, piece, behind);
        self.bytes += kept.len();
        self.kept.push(kept);
        if self.bytes > KEPT_MAX || self.kept.len() > WAITING_MAX {
            self.hand_on(away);
        }
    }

    fn hand_on(&mut self, away: &Away) {
        let mut kept = std::mem::take(&mut self.kept);
        self.bytes = 0;
        // Several reads are under way at once.
        kept.sort_by_key(|kept| kept.offset);
        let handed = Arc::clone(&self.handed);
        away.hand_on(&self.handed, || Task::Pieces(handed, kept));
    }
}

impl Kept {
    fn new(offset: u64, piece: Piece, behind: Arc<Behind>) -> Kept {
        let kept = Kept {
            offset,
            piece,
            behind,
        };
        kept.behind.all.fetch_add(kept.len() as u64, Relaxed);
        if let Piece::Copy(bytes) = &kept.piece {
            kept.behind.copies.fetch_add(bytes.len() as u64, Relaxed);
        }
        kept
    }

    fn len(&self) -> usize {
        match &self.piece {
            Piece::Lent(lent) => lent.bytes().len(),
            Piece::Copy(bytes) => bytes.len(),
            Piece::Hole(_) => 0,
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.behind.all.fetch_sub(self.len() as u64, Relaxed);
        if let Piece::Copy(bytes) = &self.piece {
            self.behind.copies.fetch_sub(bytes.len() as u64, Relaxed);
        }
    }
}

impl Away {
    /// Without waiting: a file whose pieces do not all fit has no digest.
    fn hand_on(&self, handed: &Handed, task: impl FnOnce() -> Task) {
        let lost = handed.lost.load(Relaxed);
        if lost || self.tell.is_full() || self.tell.try_send(task()).is_err() {
            handed.lost.store(true, Relaxed);
        }
    }
}

fn hash(told: &Receiver<Task>) {
    host::be_nice(NICE);
    for task in told {
        match task {
            Task::Pieces(handed, pieces) => {
                let mut stream = handed.stream.lock();
                for kept in pieces {
                    if handed.lost.load(Relaxed) {
                        break;
                    }
                    match &kept.piece {
                        Piece::Lent(lent) => stream.bytes(kept.offset, lent.bytes()),
                        Piece::Copy(bytes) => stream.bytes(kept.offset, bytes),
                        Piece::Hole(end) => stream.hole(kept.offset..*end),
                    }
                }
            }
            Task::Done(done) => done(),
            Task::End => return,
        }
    }
}
