//! Verify: compares two trees, every name, every byte and every piece of metadata; or one tree with
//! the manifest of what it was when it was copied (`proof`).
//!
//! Both trees are walked together, by directory fds only, by a crew of threads: a directory's src
//! entries in batches, each next to the dst entry of the same name, then dst's names that src does
//! not have. Nothing is written and no access time changes. The bytes of an inode are read once, however
//! many names it has. Memory is bounded by one batch per thread and by the inodes with several names of
//! which some were not seen yet (`groups`, `inodes`): 0.1 KiB or so each.

mod content;
mod entry;
mod groups;
mod inodes;
mod one;
mod proof;
mod take;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::config::Shard;
use crate::crew::Crew;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{CONTROL_DIR, MarkName};
use crate::progress::Counter;
use crate::sys::name::{Name, RelPath};
use crate::sys::pair::{Pair, Place, Roots};
use crate::sys::stat::stat_at;
use crate::sys::xattr::{self, Target};
use crate::sys::{dir, host};

use content::Slice;
use groups::Groups;

pub use proof::{ProofReport, verify_manifest};
pub use take::take_manifest;

/// Entries of one directory that a thread takes at once.
const BATCH: usize = 1024;
/// Pairs of directories that may be open at once.
const PAIRS_MAX: usize = 2000;

/// What to compare, and how.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// Threads; 0: two for each CPU.
    pub threads: usize,
    /// Compare the bytes of files too.
    pub content: bool,
    /// Tell also what is equal.
    pub tell_all: bool,
    /// Of these files only; names and metadata of all are compared. `None`: of all files.
    pub sample: Option<Shard>,
    /// Do not descend into other file systems mounted below src.
    pub one_file_system: bool,
    /// Set from outside to end the comparison early.
    pub stop: Arc<AtomicBool>,
    /// Counts, for who looks on from outside, what a single tree's files have been read for.
    pub reading: Arc<Reading>,
}

/// How far the reading of a single tree is.
#[derive(Debug, Default)]
pub struct Reading {
    /// Bytes of the files that were met so far and are to be read; holes do not count.
    pub found: Counter,
    /// Bytes that were read.
    pub read: Counter,
}

impl Reading {
    /// Bytes read, and found: those of a file that has grown count in both.
    pub fn now(&self) -> (u64, u64) {
        let read = self.read.get();
        (read, self.found.get().max(read))
    }
}

impl Default for VerifyOptions {
    fn default() -> VerifyOptions {
        VerifyOptions {
            threads: 0,
            content: true,
            tell_all: false,
            sample: None,
            one_file_system: false,
            stop: Arc::default(),
            reading: Arc::default(),
        }
    }
}

/// One thing that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Below both roots; `.` is the root itself.
    pub path: PathBuf,
    /// What differs.
    pub kind: Kind,
    /// Both values, or what went wrong; one line.
    pub detail: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = crate::error::Printable(self.path.as_os_str());
        match self.detail.is_empty() {
            true => write!(f, "{}: \"{path}\"", self.kind),
            false => write!(f, "{}: \"{path}\": {}", self.kind, self.detail),
        }
    }
}

/// What can differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// dst has no such name; of a directory only its own name is reported.
    OnlyInSrc,
    /// src has no such name; of a directory only its own name is reported.
    OnlyInDst,
    /// File against directory, and so on.
    Type,
    /// Permission bits, setuid, setgid, sticky.
    Mode,
    /// User.
    Owner,
    /// Group.
    Group,
    /// Bytes of a file.
    Size,
    /// The bytes themselves.
    Content,
    /// Modification time, nanoseconds included.
    Mtime,
    /// Where a symlink points.
    Target,
    /// An xattr, POSIX ACLs, labels and capabilities included.
    Xattr,
    /// Which device a node is.
    Device,
    /// Which names are one inode.
    Links,
    /// Inode flags that both file systems know.
    Flags,
    /// The manifest has another size, time, mode, owner or target: somebody has changed it since.
    Changed,
    /// As the manifest has it in all else, the bytes are not.
    Corrupt,
    /// In the manifest, not in dst; of a directory only its own name is reported.
    Missing,
    /// In dst, not in the manifest; of a directory only its own name is reported.
    Extra,
    /// The manifest has no digest of a file.
    Unproven,
    /// dst is a migration that has not finished: control directory or mark are still there.
    NotFinished,
    /// One side could not be read.
    Unreadable,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::OnlyInSrc => "only in src",
            Kind::OnlyInDst => "only in dst",
            Kind::Type => "type",
            Kind::Mode => "mode",
            Kind::Owner => "owner",
            Kind::Group => "group",
            Kind::Size => "size",
            Kind::Content => "content",
            Kind::Mtime => "mtime",
            Kind::Target => "target",
            Kind::Xattr => "xattr",
            Kind::Device => "device",
            Kind::Links => "links",
            Kind::Flags => "flags",
            Kind::Changed => "changed",
            Kind::Corrupt => "corrupt",
            Kind::Missing => "missing",
            Kind::Extra => "extra",
            Kind::Unproven => "unproven",
            Kind::NotFinished => "not finished",
            Kind::Unreadable => "unreadable",
        })
    }
}

/// What was compared.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyReport {
    /// Names in src, the root not counted.
    pub entries: u64,
    /// Regular files whose bytes were compared, each name of one; of a manifest that is written, those that
    /// were read.
    pub files: u64,
    /// Bytes that were read on each side, once for all names of an inode; holes are not read.
    pub bytes: u64,
    /// Differences, unreadable ones included.
    pub differences: u64,
    /// Entries or directories that could not be read on one side.
    pub unreadable: u64,
    /// It was stopped before the end.
    pub stopped: bool,
    /// How long it took.
    pub elapsed: Duration,
}

impl VerifyReport {
    /// True when all was compared and nothing differs.
    pub fn is_equal(&self) -> bool {
        self.differences == 0 && !self.stopped
    }
}

/// What a comparison tells while it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Something is not the same.
    Difference(Difference),
    /// All of an entry that both sides have was compared; its differences were told before.
    Done(PathBuf),
}

/// Compares the trees below two directories; `on` gets each difference, in no order.
/// An error is only what prevents the comparison: a root that cannot be opened.
pub fn verify(
    src: &Path,
    dst: &Path,
    options: &VerifyOptions,
    on: &mut dyn FnMut(Difference),
) -> Result<VerifyReport> {
    verify_each(src, dst, options, &mut |told| {
        if let Told::Difference(difference) = told {
            on(difference);
        }
    })
}

/// As [`verify`]; `on` also gets each entry when all of it was compared.
pub fn verify_each(
    src: &Path,
    dst: &Path,
    options: &VerifyOptions,
    on: &mut dyn FnMut(Told),
) -> Result<VerifyReport> {
    let begin = Instant::now();
    let open = |path: &Path| {
        host::open_dir(path).map_err(|e| Error::Unusable(format!("{}: {e}", path.display())))
    };
    let roots = Roots::new(open(src)?, open(dst)?, PAIRS_MAX);
    let shared = Shared {
        options,
        groups: Groups::default(),
        root_dev: crate::sys::stat::stat_fd(roots.src.as_fd())
            .on("statx", Side::Src, src)?
            .key
            .dev,
        entries: Counter::default(),
        files: Counter::default(),
        bytes: Counter::default(),
    };
    let (mut differences, mut unreadable) = (0, 0);
    let threads = match options.threads {
        0 => 2 * host::cpus().len().max(1),
        n => n,
    };
    Crew::run(
        vec![Item::Dir(roots.root())],
        &options.stop,
        || threads,
        content::Buffers::new,
        |crew: &Crew<'_, Item, Told>, buffers, item| {
            let on = Work {
                crew,
                shared: &shared,
                roots: &roots,
            };
            on.step(buffers, item);
        },
        |told: Told| {
            if let Told::Difference(difference) = &told {
                differences += 1;
                unreadable += u64::from(difference.kind == Kind::Unreadable);
            }
            on(told);
        },
    );
    Ok(VerifyReport {
        entries: shared.entries.get(),
        files: shared.files.get(),
        bytes: shared.bytes.get(),
        differences,
        unreadable,
        stopped: options.stop.load(std::sync::atomic::Ordering::Relaxed),
        elapsed: begin.elapsed(),
    })
}

/// What all threads share.
struct Shared<'a> {
    options: &'a VerifyOptions,
    groups: Groups,
    root_dev: (u32, u32),
    entries: Counter,
    files: Counter,
    bytes: Counter,
}

/// One piece of work.
enum Item {
    /// A directory that both sides have.
    Dir(Place),
    /// The rest of an open directory, from this offset in src.
    More(Arc<Pair>, u64),
    /// Some names of a directory.
    Names(Arc<Pair>, Vec<dir::Entry>),
    /// A part of a large file.
    Slice(Slice),
}

/// One step's surroundings.
struct Work<'a, 's> {
    crew: &'a Crew<'s, Item, Told>,
    shared: &'a Shared<'a>,
    roots: &'a Arc<Roots>,
}

impl Work<'_, '_> {
    fn step(&self, buffers: &mut content::Buffers, item: Item) {
        match item {
            Item::Dir(place) => self.dir(buffers, &place),
            Item::More(pair, from) => self.batch(buffers, &pair, from),
            Item::Names(pair, names) => self.names(buffers, &pair, names),
            Item::Slice(slice) => self.slice(buffers, slice),
        }
    }

    fn tell(&self, path: &RelPath, kind: Kind, detail: impl Into<String>) {
        self.crew.tell(Told::Difference(Difference {
            path: path.to_path(),
            kind,
            detail: detail.into(),
        }));
    }

    /// All of an entry was compared.
    fn done(&self, path: &RelPath) {
        if self.shared.options.tell_all {
            self.crew.tell(Told::Done(path.to_path()));
        }
    }

    fn unreadable(&self, path: &RelPath, side: Side, call: &str, errno: Errno) {
        self.tell(path, Kind::Unreadable, format!("{call} {side}: {errno}"));
    }

    fn dir(&self, buffers: &mut content::Buffers, place: &Place) {
        let Some(src) = self.opened(place, Side::Src, self.roots.open_src(place)) else {
            return;
        };
        let Some(dst) = self.opened(place, Side::Dst, self.roots.open_dst(place)) else {
            return;
        };
        let pair = self.roots.pair(place.path.clone(), src, dst);
        if place.path.is_root() {
            self.root_state(&pair);
        }
        self.compare_dir(&pair);
        self.done(&pair.path);
        self.batch(buffers, &pair, 0);
    }

    fn opened(&self, place: &Place, side: Side, result: Result<OwnedFd, Errno>) -> Option<OwnedFd> {
        result
            .map_err(|e| self.unreadable(&place.path, side, "openat2", e))
            .ok()
    }

    /// The control directory or a mark on dst's root: a migration that has not finished.
    fn root_state(&self, pair: &Pair) {
        for mark in [MarkName::Trusted, MarkName::User] {
            match xattr::get(Target::Open(pair.dst.as_fd()), mark.as_cstr()) {
                Ok(None) => {}
                Ok(Some(_)) => {
                    let what = mark.as_cstr().to_string_lossy();
                    self.tell(&pair.path, Kind::NotFinished, format!("dst carries {what}"));
                }
                Err(e) => self.unreadable(&pair.path, Side::Dst, "getxattr", e),
            }
        }
    }

    /// One batch of src's names; the rest goes below whatever the batch finds.
    fn batch(&self, buffers: &mut content::Buffers, pair: &Arc<Pair>, from: u64) {
        let mut names = Vec::new();
        let mut next = from;
        let end = dir::read_dir(pair.src.as_fd(), from, &mut buffers.names, |e| {
            next = e.next;
            names.push(e);
            names.len() < BATCH
        });
        let all = match end {
            Ok(end) => end,
            Err(e) => {
                self.unreadable(&pair.path, Side::Src, "getdents64", e);
                true // What was listed is compared; what was not cannot be.
            }
        };
        if !all {
            self.crew.push([Item::More(Arc::clone(pair), next)]);
        }
        if all && end.is_ok() {
            let listed = (from == 0).then_some(names.as_slice());
            self.extra(buffers, pair, listed);
        }
        self.names(buffers, pair, names);
    }

    /// Names that only dst has. `listed`: all that src has, where that fitted into one batch.
    fn extra(&self, buffers: &mut content::Buffers, pair: &Pair, listed: Option<&[dir::Entry]>) {
        let known: Option<std::collections::HashSet<&Name>> =
            listed.map(|l| l.iter().map(|e| &e.name).collect());
        let end = dir::read_dir(pair.dst.as_fd(), 0, &mut buffers.names, |e| {
            let in_src = match &known {
                Some(known) => known.contains(&e.name),
                None => !matches!(
                    stat_at(pair.src.as_fd(), e.name.as_cstr()),
                    Err(Errno::NOENT)
                ),
            };
            if !in_src && !host::is_lost_found(pair.dst.as_fd(), e.name.as_cstr()) {
                let path = pair.path.join(&e.name);
                match pair.path.is_root() && e.name.as_bytes() == CONTROL_DIR.as_bytes() {
                    true => self.tell(&path, Kind::NotFinished, "the control directory"),
                    false => self.tell(&path, Kind::OnlyInDst, ""),
                }
            }
            !self.crew.stopping()
        });
        if let Err(e) = end {
            self.unreadable(&pair.path, Side::Dst, "getdents64", e);
        }
    }

    /// Compares names of a directory; gives half away whenever somebody has nothing to do.
    fn names(&self, buffers: &mut content::Buffers, pair: &Arc<Pair>, mut names: Vec<dir::Entry>) {
        while let Some(entry) = names.pop() {
            if self.crew.stopping() {
                return;
            }
            if names.len() > 1 && self.crew.hungry() {
                let half = names.split_off(names.len() / 2);
                self.crew.push([Item::Names(Arc::clone(pair), half)]);
            }
            self.shared.entries.add(1);
            self.compare(buffers, pair, &entry.name);
        }
    }
}

#[cfg(test)]
mod tests;
