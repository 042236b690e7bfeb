//! Proof: `mount --manifest`. What comes whole and in one pass is hashed on its way.
//!
//!   begin   nobody waits for the file: its worker hashes each piece; else, and behind large holes, a thread
//!           of its own does: a worker copies the piece for it, or, where it cannot keep up, gives the digest up
//!   done    all of it was read, and src was looked at again and has not changed
//!   landed  these bytes are what dst has, of one src (I6): a line
//!
//! A line says what src's file was, by its path there, when it was read. Nothing that users do in dst makes it wrong,
//! so it needs no order with marks, and a crash may lose it: whoever ends the manifest (run/manifest.rs) goes
//! through src once more, takes the digest of each file that is as it was then, and reads those that have none:
//! what came by ranges, was shared (FICLONE), was here already, or was never asked for.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::Mirror;
use super::source::Face;
use crate::engine::job::Priority;
use crate::error::{Error, Result};
use crate::manifest::{Digest, Entry, Scope, Stream, Trouble, Writer, is_settled_at};
use crate::sys::host;
use crate::sys::name::RelPath;
use crate::sys::stat::Stat;

/// Pieces that wait for the thread: of a MiB at the most, each.
const WAITING_MAX: usize = 32;
/// Behind so many bytes of holes a worker hands a file on: more would keep others waiting.
const HOLES_HERE: u64 = 1 << 20;
/// Behind so many the thread gives it up.
const HOLES_MAX: u64 = 1 << 30;
/// The thread's share of a CPU that others want.
const NICE: i32 = 19;

/// The manifest of a mount.
pub struct Proof {
    writer: Writer,
    scope: Scope,
    away: Away,
}

/// The thread that hashes what workers hand on.
struct Away {
    tell: Sender<Task>,
    /// Memory of pieces that were hashed: new memory costs more than the copy into it.
    free: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A file that was handed on.
#[derive(Default)]
struct Handed {
    stream: Mutex<Stream>,
    /// Not all of it was: set without waiting for who hashes.
    lost: AtomicBool,
}

enum Task {
    Bytes(Arc<Handed>, u64, Vec<u8>),
    Hole(Arc<Handed>, Range<u64>),
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
    Away(Arc<Handed>),
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
        let free = Arc::default();
        let freed = Arc::clone(&free);
        let thread = thread.spawn(move || hash(&told, &freed));
        let thread = thread.map_err(|e| Error::Unusable(format!("thread: {e}")))?;
        let proof = Proof {
            writer,
            scope: Scope::ours(),
            away: Away {
                tell,
                free,
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
                Priority::Demand => Place::Away(Arc::default()),
                Priority::Background => Place::Here(Box::default()),
            },
            holes: 0,
            begun: SystemTime::now(),
        }
    }

    pub(super) fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        let proof = &self.proof;
        match &mut self.stream {
            Place::Here(stream) => stream.bytes(offset, bytes),
            Place::Away(stream) => {
                let task = || {
                    let mut copy = proof.away.free.lock().pop().unwrap_or_default();
                    copy.extend_from_slice(bytes);
                    Task::Bytes(Arc::clone(stream), offset, copy)
                };
                proof.away.hand_on(stream, task);
            }
        }
    }

    pub(super) fn hole(&mut self, range: Range<u64>) {
        let proof = &self.proof;
        self.holes += range.end - range.start;
        if self.holes > HOLES_HERE
            && let Place::Here(stream) = &mut self.stream
        {
            let stream = std::mem::take(&mut **stream);
            self.stream = Place::Away(Arc::new(Handed {
                stream: Mutex::new(stream),
                lost: AtomicBool::new(false),
            }));
        }
        match &mut self.stream {
            Place::Here(stream) => stream.hole(range),
            Place::Away(handed) if self.holes > HOLES_MAX => handed.lost.store(true, Relaxed),
            Place::Away(stream) => {
                let task = || Task::Hole(Arc::clone(stream), range);
                proof.away.hand_on(stream, task);
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
            Place::Away(stream) => {
                let proof_ = Arc::downgrade(&proof);
                let of = Arc::clone(&stream);
                let done = move || {
                    if let Some(proof) = proof_.upgrade()
                        && !of.lost.load(Relaxed)
                        && let Some(digest) = of.stream.lock().digest(src.size)
                    {
                        proof.add(&path, &src, begun, digest);
                    }
                };
                proof.away.hand_on(&stream, || Task::Done(Box::new(done)));
            }
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

fn hash(told: &Receiver<Task>, free: &Mutex<Vec<Vec<u8>>>) {
    host::be_nice(NICE);
    for task in told {
        match task {
            Task::Bytes(handed, ..) | Task::Hole(handed, _) if handed.lost.load(Relaxed) => {}
            Task::Bytes(handed, offset, mut bytes) => {
                handed.stream.lock().bytes(offset, &bytes);
                bytes.clear();
                let mut free = free.lock();
                if free.len() < WAITING_MAX {
                    free.push(bytes);
                }
            }
            Task::Hole(handed, range) => handed.stream.lock().hole(range),
            Task::Done(done) => done(),
            Task::End => return,
        }
    }
}
