//! One: a single tree, walked by a crew of threads, its files hashed, large ones in parts.
//!
//!   Visit::entry    each name but the root's: whether a directory is gone into, or a file is read
//!   Visit::opened   a directory, the root too, before its names
//!   Visit::read     a file, when all of it was hashed
//!
//! The bytes of an inode with several names are read for one of them (`inodes`); `Visit::read` is told each.
//!
//! What is done with it is the visitor's: compare it with a manifest (`proof`), or write one (`take`).

use std::ffi::CStr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::content::{CHUNK, SHARE};
use super::inodes::{Claim, Inodes};
use super::{BATCH, Difference, Kind, Reading, Told, VerifyOptions, VerifyReport};
use crate::crew::Crew;
use crate::error::Side;
use crate::manifest::{BLOCK, Digest, Feed, Part, Tree};
use crate::mark::{CONTROL_DIR, MarkName};
use crate::progress::Counter;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{Stat, fd_changed_since, stat_at, stat_fd};
use crate::sys::xattr::Target;
use crate::sys::{dir, fd, host};

/// What is done with a tree. `T` is what the visitor wants to remember of a file that is read.
pub(super) trait Visit<T>: Sync {
    /// A directory is open, and will be listed.
    fn opened(&self, to: &Teller<'_>, path: &RelPath, dir: BorrowedFd<'_>, stat: &Stat);
    /// A name.
    fn entry(&self, to: &Teller<'_>, met: &Met<'_>) -> Next<T>;
    /// All of a file was read; `digest`: unless it could not be (that was told), or ended early.
    fn read(&self, to: &Teller<'_>, file: &File<T>, digest: Option<Digest>);
}

/// A name that was met.
pub(super) struct Met<'a> {
    pub(super) path: &'a RelPath,
    pub(super) stat: &'a Stat,
    /// Where a symlink points.
    pub(super) link: Option<&'a CStr>,
    /// Where its xattrs are.
    pub(super) at: Target<'a>,
}

/// How to go on with a name.
pub(super) enum Next<T> {
    /// Nothing more is to be done.
    Over,
    /// Its names.
    List,
    /// Its bytes.
    Read(T),
}

/// A file that is read.
pub(super) struct File<T> {
    pub(super) path: RelPath,
    pub(super) fd: OwnedFd,
    /// What it was before it was read.
    pub(super) stat: Stat,
    pub(super) about: T,
    tree: Tree,
    /// It could not be read: told.
    pub(super) failed: AtomicBool,
    /// Other names of the inode wait for it.
    first: bool,
}

impl<T> File<T> {
    fn new(name: Waiting<T>, fd: OwnedFd, first: bool) -> File<T> {
        File {
            path: name.path,
            fd,
            tree: Tree::new(name.stat.size),
            stat: name.stat,
            about: name.about,
            failed: AtomicBool::new(false),
            first,
        }
    }
}

/// A name whose bytes are to be read.
struct Waiting<T> {
    path: RelPath,
    stat: Stat,
    about: T,
}

/// The tree and what was counted in it.
pub(super) struct One {
    pub(super) root: OwnedFd,
    /// Whose errors they are.
    pub(super) side: Side,
    entries: Counter,
    files: Counter,
    /// Those whose bytes were read by another name.
    again: Counter,
    bytes: Counter,
    reading: Arc<Reading>,
}

impl One {
    pub(super) fn new(root: OwnedFd, side: Side) -> One {
        One {
            root,
            side,
            entries: Counter::default(),
            files: Counter::default(),
            again: Counter::default(),
            bytes: Counter::default(),
            reading: Arc::default(),
        }
    }

    /// Somebody looks on.
    pub(super) fn watched(mut self, options: &VerifyOptions) -> One {
        self.reading = Arc::clone(&options.reading);
        self
    }

    /// Files that were read, by one name each.
    pub(super) fn files_read(&self) -> u64 {
        self.files.get() - self.again.get()
    }

    /// What came of it.
    pub(super) fn report(
        &self,
        begin: Instant,
        (differences, unreadable): (u64, u64),
        stopped: bool,
    ) -> VerifyReport {
        VerifyReport {
            entries: self.entries.get(),
            files: self.files.get(),
            bytes: self.bytes.get(),
            differences,
            unreadable,
            stopped,
            elapsed: begin.elapsed(),
        }
    }

    /// Goes through all of it, until `options.stop`.
    pub(super) fn walk<T: Send + Sync>(
        &self,
        options: &VerifyOptions,
        visit: &impl Visit<T>,
        on: &mut dyn FnMut(Told),
    ) {
        let threads = match options.threads {
            0 => 2 * host::cpus().len().max(1),
            n => n,
        };
        let inodes = Inodes::default();
        Crew::run(
            vec![Item::Dir(RelPath::root())],
            &options.stop,
            || threads,
            Buffers::default,
            |crew: &Crew<'_, Item<T>, Told>, buffers, item| {
                let tell = |told| crew.tell(told);
                let to = Teller {
                    tell: &tell,
                    side: self.side,
                };
                let one = self;
                Work {
                    crew,
                    one,
                    inodes: &inodes,
                    visit,
                    to,
                }
                .step(buffers, item);
            },
            on,
        );
    }
}

/// Where differences go.
pub(super) struct Teller<'a> {
    tell: &'a dyn Fn(Told),
    side: Side,
}

impl Teller<'_> {
    pub(super) fn tell(&self, path: &RelPath, kind: Kind, detail: impl Into<String>) {
        (self.tell)(difference(path, kind, detail));
    }

    /// All of an entry was compared.
    pub(super) fn done(&self, path: &RelPath) {
        (self.tell)(Told::Done(path.to_path()));
    }

    pub(super) fn unreadable(&self, path: &RelPath, call: &str, errno: Errno) {
        let side = self.side;
        self.tell(path, Kind::Unreadable, format!("{call} {side}: {errno}"));
    }
}

pub(super) fn difference(path: &RelPath, kind: Kind, detail: impl Into<String>) -> Told {
    Told::Difference(Difference {
        path: path.to_path(),
        kind,
        detail: detail.into(),
    })
}

/// One piece of work.
enum Item<T> {
    /// A directory.
    Dir(RelPath),
    /// The rest of an open directory, from this offset.
    More(Arc<Dir>, u64),
    /// Some names of a directory.
    Names(Arc<Dir>, Vec<dir::Entry>),
    /// A part of a file, and what of it was hashed.
    Slice(Arc<File<T>>, Range<u64>, Feed),
    /// Another name of a file that was read, and its digest; without one it is to be read.
    Again(Waiting<T>, Option<Digest>),
}

struct Dir {
    path: RelPath,
    fd: OwnedFd,
}

/// One thread's buffers.
struct Buffers {
    data: Vec<u8>,
    names: Vec<u8>,
}

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers {
            data: vec![0; CHUNK],
            names: Vec::with_capacity(64 << 10),
        }
    }
}

/// One step's surroundings.
struct Work<'a, 's, T, V> {
    crew: &'a Crew<'s, Item<T>, Told>,
    one: &'a One,
    inodes: &'a Inodes<Waiting<T>>,
    visit: &'a V,
    to: Teller<'a>,
}

impl<T: Send + Sync, V: Visit<T>> Work<'_, '_, T, V> {
    fn step(&self, buffers: &mut Buffers, item: Item<T>) {
        match item {
            Item::Dir(path) => self.dir(buffers, path),
            Item::More(dir, from) => self.batch(buffers, &dir, from),
            Item::Names(dir, names) => self.names(buffers, &dir, names),
            Item::Slice(file, range, feed) => self.slice(buffers, file, range, feed),
            Item::Again(name, digest) => self.again(buffers, name, digest),
        }
    }

    fn dir(&self, buffers: &mut Buffers, path: RelPath) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
        let open = |flags| fd::open_beneath(self.one.root.as_fd(), &path, flags);
        let opened = match open(flags) {
            // O_NOATIME is for the owner and CAP_FOWNER.
            Err(Errno::PERM) => open(flags - OFlags::NOATIME),
            other => other,
        };
        let fd = match opened {
            Ok(fd) => fd,
            Err(e) => return self.to.unreadable(&path, "openat2", e),
        };
        match stat_fd(fd.as_fd()) {
            Ok(stat) => self.visit.opened(&self.to, &path, fd.as_fd(), &stat),
            Err(e) => self.to.unreadable(&path, "statx", e),
        }
        self.batch(buffers, &Arc::new(Dir { path, fd }), 0);
    }

    /// One batch of names; the rest goes below whatever the batch finds.
    fn batch(&self, buffers: &mut Buffers, dir: &Arc<Dir>, from: u64) {
        let mut names = Vec::new();
        let mut next = from;
        let end = dir::read_dir(dir.fd.as_fd(), from, &mut buffers.names, |e| {
            next = e.next;
            names.push(e);
            names.len() < BATCH
        });
        match end {
            Ok(true) => {}
            Ok(false) => self.crew.push([Item::More(Arc::clone(dir), next)]),
            Err(e) => self.to.unreadable(&dir.path, "getdents64", e),
        }
        self.names(buffers, dir, names);
    }

    /// Compares names of a directory; gives half away whenever somebody has nothing to do.
    fn names(&self, buffers: &mut Buffers, dir: &Arc<Dir>, mut names: Vec<dir::Entry>) {
        while let Some(entry) = names.pop() {
            if self.crew.stopping() {
                return;
            }
            if names.len() > 1 && self.crew.hungry() {
                let half = names.split_off(names.len() / 2);
                self.crew.push([Item::Names(Arc::clone(dir), half)]);
            }
            self.name(buffers, dir, &entry.name);
        }
    }

    fn name(&self, buffers: &mut Buffers, dir: &Dir, name: &Name) {
        let path = dir.path.join(name);
        if dir.path.is_root() && name.as_bytes() == CONTROL_DIR.as_bytes() {
            let what = "the control directory";
            return self.to.tell(&path, Kind::NotFinished, what);
        }
        self.one.entries.add(1);
        let stat = match stat_at(dir.fd.as_fd(), name.as_cstr()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return, // Removed since it was listed.
            Err(e) => return self.to.unreadable(&path, "statx", e),
        };
        let is_link = stat.kind() == FileType::Symlink;
        let link = is_link.then(|| rustix::fs::readlinkat(&dir.fd, name.as_cstr(), Vec::new()));
        let link = match link.transpose() {
            Ok(link) => link,
            Err(e) => return self.to.unreadable(&path, "readlinkat", e),
        };
        let met = Met {
            path: &path,
            stat: &stat,
            link: link.as_deref(),
            at: Target::At(dir.fd.as_fd(), name),
        };
        let about = match self.visit.entry(&self.to, &met) {
            Next::Over => return,
            Next::List => return self.crew.push([Item::Dir(path)]),
            Next::Read(about) => about,
        };
        match super::content::open(dir.fd.as_fd(), name) {
            Ok(fd) => self.content(buffers, fd, Waiting { path, stat, about }),
            Err(e) => self.to.unreadable(&path, "openat2", e),
        }
    }

    fn content(&self, buffers: &mut Buffers, fd: OwnedFd, name: Waiting<T>) {
        self.one.files.add(1);
        let stat = name.stat;
        match self.inodes.claim(&stat, name) {
            Claim::Alone(name) => self.read(buffers, File::new(name, fd, false)),
            Claim::First(name) => self.read(buffers, File::new(name, fd, true)),
            Claim::Parked => {}
            Claim::Known(name, digest) => self.known(File::new(name, fd, false), digest),
        }
    }

    /// Another name of a file that was read.
    fn again(&self, buffers: &mut Buffers, name: Waiting<T>, digest: Option<Digest>) {
        let Some((parent, last)) = name.path.split_last() else {
            return; // The root is no file.
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let parent = fd::open_beneath(self.one.root.as_fd(), &parent, flags);
        let fd = match parent.and_then(|p| super::content::open(p.as_fd(), &last)) {
            Ok(fd) => fd,
            Err(e) => return self.to.unreadable(&name.path, "openat2", e),
        };
        let file = File::new(name, fd, false);
        match digest {
            Some(digest) => self.known(file, digest),
            None => self.read(buffers, file),
        }
    }

    fn known(&self, file: File<T>, digest: Digest) {
        self.one.again.add(1);
        self.visit.read(&self.to, &file, Some(digest));
    }

    fn read(&self, buffers: &mut Buffers, file: File<T>) {
        let stat = &file.stat;
        let data = stat.size.min(stat.blocks.saturating_mul(512));
        self.one.reading.found.add(data);
        let (feed, range) = (file.tree.feed(0), 0..stat.size);
        self.slice(buffers, Arc::new(file), range, feed);
    }

    fn slice(
        &self,
        buffers: &mut Buffers,
        file: Arc<File<T>>,
        mut range: Range<u64>,
        mut feed: Feed,
    ) {
        while range.start < range.end && !file.failed.load(Relaxed) && !self.crew.stopping() {
            if range.end - range.start > SHARE && self.crew.hungry() {
                let half = (range.end - range.start) / 2;
                let middle = (range.start + half).next_multiple_of(BLOCK);
                let rest = file.tree.feed(middle);
                let other = Arc::clone(&file);
                self.crew
                    .push([Item::Slice(other, middle..range.end, rest)]);
                range.end = middle;
            }
            match self.chunk(buffers, &file, &range, &mut feed) {
                Ok(next) => range.start = next,
                Err((call, errno)) => {
                    if !file.failed.swap(true, Relaxed) {
                        self.to.unreadable(&file.path, call, errno);
                    }
                }
            }
        }
        // With the last part of it; a run that was stopped has not seen all.
        if let Some(file) = Arc::into_inner(file)
            && !self.crew.stopping()
        {
            let digest = file.tree.digest();
            if file.first {
                self.hand_back(&file, digest);
            }
            self.visit.read(&self.to, &file, digest);
        }
    }

    /// To the other names of an inode that was read, as far as it has not changed meanwhile.
    fn hand_back(&self, file: &File<T>, digest: Option<Digest>) {
        let failed = file.failed.load(Relaxed);
        let still = !failed && matches!(fd_changed_since(file.fd.as_fd(), &file.stat), Ok(false));
        let digest = digest.filter(|_| still);
        let parked = self.inodes.read(&file.stat, digest);
        self.crew.push(parked.into_iter().map(|name| {
            let same = name.stat.ctime == file.stat.ctime;
            Item::Again(name, digest.filter(|_| same))
        }));
    }

    /// Hashes the next chunk of a range; returns where to go on.
    fn chunk(
        &self,
        buffers: &mut Buffers,
        file: &File<T>,
        range: &Range<u64>,
        feed: &mut Feed,
    ) -> std::result::Result<u64, (&'static str, Errno)> {
        let mut part = Part {
            file: file.fd.as_fd(),
            sparse: file.stat.is_sparse(),
            hash: Some((&file.tree, feed)),
        };
        let (next, read) = part.step(range, &mut buffers.data)?;
        self.one.bytes.add(read as u64);
        self.one.reading.read.add(read as u64);
        Ok(next)
    }
}

/// An unfinished migration has left it.
pub(super) fn is_marked(fd: BorrowedFd<'_>) -> bool {
    is_marked_at(Target::Open(fd))
}

/// As `is_marked`.
pub(super) fn is_marked_at(target: Target<'_>) -> bool {
    let marks = [MarkName::Trusted, MarkName::User];
    marks
        .iter()
        .any(|mark| matches!(mark.get(target), Ok(Some(_))))
}
