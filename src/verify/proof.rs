//! Proof: dst against the manifest that was written when it was copied. src is not needed.
//!
//!   size, mtime, mode, owner, target, type differ   somebody has changed it since: `Changed`
//!   none of these differs, the bytes do             nobody has: `Corrupt`
//!   only one of the two has the name                `Missing`, `Extra`
//!   the manifest has no digest of a file            `Unproven`
//!
//! A file whose size or time differ is not read: its bytes are the user's. dst is walked by a crew,
//! each name is asked of the manifest's index; what nobody asked for is missing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::content::{CHUNK, SHARE};
use super::entry::type_name;
use super::groups::{Groups, Inode};
use super::{BATCH, Difference, Kind, Told, VerifyOptions, VerifyReport};
use crate::crew::Crew;
use crate::error::{Error, Result, Side};
use crate::manifest::{BLOCK, Digest, Entry, Feed, Index, Tree};
use crate::mark::{CONTROL_DIR, MarkName};
use crate::progress::Counter;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{Stat, Time, stat_at, stat_fd};
use crate::sys::xattr::Target;
use crate::sys::{copy, dir, fd, host};

/// Compares the tree below a directory with a manifest; `on` gets each difference, in no order, and
/// each entry when all of it was compared.
pub fn verify_manifest(
    manifest: &Index,
    dst: &Path,
    options: &VerifyOptions,
    on: &mut dyn FnMut(Told),
) -> Result<VerifyReport> {
    let begin = Instant::now();
    let root = host::open_dir(dst);
    let root = root.map_err(|e| Error::Unusable(format!("{}: {e}", dst.display())))?;
    let shared = Shared {
        manifest,
        options,
        root,
        groups: Groups::default(),
        entries: Counter::default(),
        files: Counter::default(),
        bytes: Counter::default(),
    };
    let (mut differences, mut unreadable) = (0, 0);
    let mut told = |told: Told| {
        if let Told::Difference(difference) = &told {
            differences += 1;
            let unsure = matches!(difference.kind, Kind::Unreadable | Kind::Unproven);
            unreadable += u64::from(unsure);
        }
        on(told);
    };
    let threads = match options.threads {
        0 => 2 * host::cpus().len().max(1),
        n => n,
    };
    Crew::run(
        vec![Item::Dir(RelPath::root())],
        &options.stop,
        || threads,
        Buffers::default,
        |crew: &Crew<'_, Item, Told>, buffers, item| {
            let shared = &shared;
            Work { crew, shared }.step(buffers, item);
        },
        &mut told,
    );
    let stopped = options.stop.load(Relaxed);
    if !stopped {
        shared.missing(&mut told);
    }
    Ok(VerifyReport {
        entries: shared.entries.get(),
        files: shared.files.get(),
        bytes: shared.bytes.get(),
        differences,
        unreadable,
        stopped,
        elapsed: begin.elapsed(),
    })
}

/// What all threads share.
struct Shared<'a> {
    manifest: &'a Index,
    options: &'a VerifyOptions,
    root: OwnedFd,
    groups: Groups,
    entries: Counter,
    files: Counter,
    bytes: Counter,
}

/// One piece of work.
enum Item {
    /// A directory that the manifest has.
    Dir(RelPath),
    /// The rest of an open directory, from this offset.
    More(Arc<Dir>, u64),
    /// Some names of a directory.
    Names(Arc<Dir>, Vec<dir::Entry>),
    /// A part of a large file, and what of it was hashed.
    Slice(Arc<File>, std::ops::Range<u64>, Feed),
}

struct Dir {
    path: RelPath,
    fd: OwnedFd,
}

/// A file that is read.
struct File {
    path: RelPath,
    fd: OwnedFd,
    stat: Stat,
    want: Digest,
    tree: Tree,
    /// It could not be read.
    failed: AtomicBool,
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

fn difference(path: &RelPath, kind: Kind, detail: impl Into<String>) -> Told {
    Told::Difference(Difference {
        path: path.to_path(),
        kind,
        detail: detail.into(),
    })
}

impl Shared<'_> {
    /// What the manifest has and nobody has met.
    fn missing(&self, told: &mut dyn FnMut(Told)) {
        let walked = self.manifest.rest(|entry| {
            let Some((parent, name)) = entry.path.split_last() else {
                return; // The root could not be read: told already.
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let parent = fd::open_beneath(self.root.as_fd(), &parent, flags);
            let found = parent.map(|dir| stat_at(dir.as_fd(), name.as_cstr()));
            // Without its directory that one is told; with its name its directory could not be listed.
            if let Ok(Err(Errno::NOENT)) = found {
                told(difference(&entry.path, Kind::Missing, ""));
            }
        });
        if let Err(trouble) = walked {
            let root = RelPath::root();
            told(difference(&root, Kind::Unreadable, trouble.to_string()));
        }
    }
}

/// One step's surroundings.
struct Work<'a, 's> {
    crew: &'a Crew<'s, Item, Told>,
    shared: &'a Shared<'a>,
}

impl Work<'_, '_> {
    fn step(&self, buffers: &mut Buffers, item: Item) {
        match item {
            Item::Dir(path) => self.dir(buffers, path),
            Item::More(dir, from) => self.batch(buffers, &dir, from),
            Item::Names(dir, names) => self.names(buffers, &dir, names),
            Item::Slice(file, range, feed) => self.slice(buffers, file, range, feed),
        }
    }

    fn tell(&self, path: &RelPath, kind: Kind, detail: impl Into<String>) {
        self.crew.tell(difference(path, kind, detail));
    }

    fn done(&self, path: &RelPath) {
        if self.shared.options.tell_all {
            self.crew.tell(Told::Done(path.to_path()));
        }
    }

    fn unreadable(&self, path: &RelPath, call: &str, errno: Errno) {
        let side = Side::Dst;
        self.tell(path, Kind::Unreadable, format!("{call} {side}: {errno}"));
    }

    fn dir(&self, buffers: &mut Buffers, path: RelPath) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
        let open = |flags| fd::open_beneath(self.shared.root.as_fd(), &path, flags);
        let opened = match open(flags) {
            // O_NOATIME is for the owner and CAP_FOWNER.
            Err(Errno::PERM) => open(flags - OFlags::NOATIME),
            other => other,
        };
        let fd = match opened {
            Ok(fd) => fd,
            Err(e) => return self.unreadable(&path, "openat2", e),
        };
        if path.is_root() {
            match stat_fd(fd.as_fd()) {
                Ok(stat) => {
                    if let Some(entry) = self.asked(&path) {
                        self.looks(&entry, &stat, None);
                    }
                }
                Err(e) => self.unreadable(&path, "statx", e),
            }
            if is_marked(fd.as_fd()) {
                self.tell(&path, Kind::NotFinished, "dst carries a mark");
            }
        }
        self.done(&path);
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
            Err(e) => self.unreadable(&dir.path, "getdents64", e),
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
            return self.tell(&path, Kind::NotFinished, "the control directory");
        }
        self.shared.entries.add(1);
        let stat = match stat_at(dir.fd.as_fd(), name.as_cstr()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return, // Removed since it was listed.
            Err(e) => return self.unreadable(&path, "statx", e),
        };
        let Some(entry) = self.asked(&path) else {
            return;
        };
        if entry.kind != stat.kind() {
            let (now, was) = (type_name(stat.kind()), type_name(entry.kind));
            self.tell(&path, Kind::Changed, format!("{now}, was {was}"));
            return self.done(&path);
        }
        let is_link = stat.kind() == FileType::Symlink;
        let target = is_link.then(|| rustix::fs::readlinkat(&dir.fd, name.as_cstr(), Vec::new()));
        let target = match target.transpose() {
            Ok(target) => target.map(std::ffi::CString::into_bytes),
            Err(e) => return self.unreadable(&path, "readlinkat", e),
        };
        let same = self.looks(&entry, &stat, target.as_deref());
        match stat.kind() {
            FileType::RegularFile if same => self.content(buffers, dir, name, entry, stat),
            FileType::Directory => self.crew.push([Item::Dir(path)]),
            _ => self.done(&path),
        }
    }

    /// What the manifest has of a path. `None`: nothing; that was told.
    fn asked(&self, path: &RelPath) -> Option<Entry> {
        match self.shared.manifest.get(path) {
            Ok(Some(entry)) => return Some(entry),
            Ok(None) => self.tell(path, Kind::Extra, ""),
            Err(trouble) => self.tell(path, Kind::Unreadable, trouble.to_string()),
        }
        None
    }

    /// Compares all but the bytes. True: size and time say that these are as they were.
    fn looks(&self, was: &Entry, now: &Stat, target: Option<&[u8]>) -> bool {
        let mut changes = Vec::new();
        fn note<T: PartialEq>(
            changes: &mut Vec<String>,
            what: &str,
            (now, was): (T, Option<T>),
            show: impl Fn(&T) -> String,
        ) -> bool {
            let same = was.as_ref().is_none_or(|was| now == *was);
            if let (false, Some(was)) = (same, &was) {
                changes.push(format!("{what} {}, was {}", show(&now), show(was)));
            }
            same
        }
        let text = |n: &u32| n.to_string();
        let time = |t: &Time| format!("{}.{:09}", t.sec, t.nsec);
        let size = note(&mut changes, "size", (now.size, was.size), u64::to_string);
        let same = note(&mut changes, "mtime", (now.mtime, was.time), time) && size;
        note(&mut changes, "mode", (now.perm(), was.mode), |m| {
            format!("{m:04o}")
        });
        note(&mut changes, "owner", (now.uid, was.uid), text);
        note(&mut changes, "group", (now.gid, was.gid), text);
        let shown = |d: &(u32, u32)| format!("{}:{}", d.0, d.1);
        note(&mut changes, "device", (now.rdev, was.device), shown);
        if let (Some(now), Some(was)) = (target, &was.link)
            && now != was
        {
            changes.push("another target".into());
        }
        if let Some((nlink, key)) = was.group
            && !self.shared.groups.meet(Inode { key, nlink }, now.into())
        {
            changes.push("other names are one inode".into());
        }
        if !changes.is_empty() {
            self.tell(&was.path, Kind::Changed, changes.join("; "));
        }
        same
    }

    fn content(&self, buffers: &mut Buffers, dir: &Dir, name: &Name, entry: Entry, stat: Stat) {
        let path = entry.path;
        let Some(want) = entry.digest else {
            self.tell(&path, Kind::Unproven, "the manifest has no digest of it");
            return self.done(&path);
        };
        let sample = self.shared.options.sample;
        let in_sample = sample.is_none_or(|s| s.owns(path.as_bytes()));
        if !self.shared.options.content || !in_sample {
            return self.done(&path);
        }
        let fd = match super::content::open(dir.fd.as_fd(), name) {
            Ok(fd) => fd,
            Err(e) => {
                self.unreadable(&path, "openat2", e);
                return self.done(&path);
            }
        };
        self.shared.files.add(1);
        let file = Arc::new(File {
            path,
            fd,
            stat,
            want,
            tree: Tree::new(stat.size),
            failed: AtomicBool::new(false),
        });
        let feed = file.tree.feed(0);
        self.slice(buffers, file, 0..stat.size, feed);
    }

    fn slice(
        &self,
        buffers: &mut Buffers,
        file: Arc<File>,
        mut range: std::ops::Range<u64>,
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
                        self.unreadable(&file.path, call, errno);
                    }
                }
            }
        }
        // With the last part of it; a run that was stopped has not seen all.
        if let Some(file) = Arc::into_inner(file)
            && !self.crew.stopping()
        {
            self.judge(&file);
            self.done(&file.path);
        }
    }

    /// Hashes the next chunk of a range; returns where to go on.
    fn chunk(
        &self,
        buffers: &mut Buffers,
        file: &File,
        range: &std::ops::Range<u64>,
        feed: &mut Feed,
    ) -> std::result::Result<u64, (&'static str, Errno)> {
        let mut data = range.clone();
        if file.stat.is_sparse() {
            let found = copy::next_data(file.fd.as_fd(), range.start, range.end);
            match found.map_err(|e| ("lseek", e))? {
                Some(extent) => data = extent,
                None => {
                    file.tree.zeros(feed, range.end);
                    return Ok(range.end);
                }
            }
        }
        let left = usize::try_from(data.end - data.start).unwrap_or(usize::MAX);
        let buf = &mut buffers.data[..left.min(CHUNK)];
        let n = fd::pread_all(file.fd.as_fd(), buf, data.start).map_err(|e| ("read", e))?;
        self.shared.bytes.add(n as u64);
        if n == 0 {
            return Ok(range.end); // Shorter than it was: it has no digest.
        }
        file.tree.bytes(feed, data.start, &buf[..n]);
        Ok(data.start + n as u64)
    }

    /// All of a file was read, or it could not be.
    fn judge(&self, file: &File) {
        let digest = file.tree.digest();
        if file.failed.load(Relaxed) || digest == Some(file.want) {
            return;
        }
        match stat_fd(file.fd.as_fd()) {
            Err(e) => return self.unreadable(&file.path, "statx", e),
            Ok(now) if now.changed_since(&file.stat) => {
                return self.tell(&file.path, Kind::Changed, "while it was read");
            }
            Ok(_) => {}
        }
        if is_marked(file.fd.as_fd()) {
            return self.tell(&file.path, Kind::NotFinished, "it is pending");
        }
        let detail = match digest {
            Some(digest) => format!(
                "BLAKE3 {digest}, was {}; size and mtime are as they were",
                file.want
            ),
            None => "it ends early".to_owned(),
        };
        self.tell(&file.path, Kind::Corrupt, detail);
    }
}

/// An unfinished migration has left it.
fn is_marked(fd: BorrowedFd<'_>) -> bool {
    let marks = [MarkName::Trusted, MarkName::User];
    marks
        .iter()
        .any(|mark| matches!(mark.get(Target::Open(fd)), Ok(Some(_))))
}
