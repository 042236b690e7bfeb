//! What the benches share: trees to copy, ways to copy them, and the look that says a copy is right.
//!
//! `MIRRORFS_BENCH_DIR` says where: on which file system. Without it cargo's temporary directory.

#![allow(dead_code)] // Each bench is a crate of its own and uses a part.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};

use mirrorfs::config::{Fsync, MountConfig, SyncConfig};
use mirrorfs::engine::Engine;
use mirrorfs::engine::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use mirrorfs::error::Result;
use mirrorfs::mark::MarkName;
use mirrorfs::meta::Capture;
use mirrorfs::mirror::{Access, Carrier, FileRef, Mirror, Need, ROOT, Trees, Waiter};
use mirrorfs::progress::Progress;
use mirrorfs::sync::SyncReport;
use mirrorfs::sys::name::{Name, RelPath};
use mirrorfs::sys::xattr;
use tempfile::TempDir;

/// How a source's metadata is captured here.
pub const CAPTURE: Capture = Capture {
    mark: MarkName::Trusted,
    flags: true,
};

/// An empty directory on the file system that is measured.
pub fn scratch() -> TempDir {
    match std::env::var_os("MIRRORFS_BENCH_DIR") {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    }
    .expect("a temporary directory")
}

/// `dir/src` with files, and `dir/dst`, empty.
pub struct Pair {
    pub src: PathBuf,
    pub dst: PathBuf,
    pub names: Vec<Name>,
}

impl Pair {
    /// The same names, bytes, modes and xattrs each time: every fourth file is not 0644, every
    /// eighth has an xattr.
    pub fn make(dir: &Path, count: usize, size: usize) -> Pair {
        let pair = Pair::at(dir, count);
        std::fs::create_dir(&pair.src).expect("mkdir");
        std::fs::create_dir(&pair.dst).expect("mkdir");
        for (i, name) in pair.names.iter().enumerate() {
            let path = pair.src.join(name.as_os_str());
            std::fs::write(&path, bytes(i, size)).expect("write");
            if i % 4 == 1 {
                std::fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).expect("chmod");
            }
            if i % 8 == 2 {
                let file = File::open(&path).expect("open");
                let target = xattr::Target::Open(std::os::fd::AsFd::as_fd(&file));
                xattr::set(target, c"user.bench", b"value").expect("setxattr");
            }
        }
        pair
    }

    /// One that `make` has made.
    pub fn at(dir: &Path, count: usize) -> Pair {
        let name = |i| Name::new(format!("file-{i:05}").as_bytes()).expect("a name");
        Pair {
            src: dir.join("src"),
            dst: dir.join("dst"),
            names: (0..count).map(name).collect(),
        }
    }

    /// Another, empty dst: the next copy.
    pub fn fresh_dst(&mut self, dir: &Path, n: usize) {
        self.dst = dir.join(format!("dst-{n}"));
        std::fs::create_dir(&self.dst).expect("mkdir");
    }

    /// Every byte of every file is in `dst`, and nothing else but what mirrorfs keeps there.
    pub fn assert_copied(&self) {
        self.assert_bytes(&self.dst);
        self.assert_placed();
    }

    /// Every byte of every file is below `root`.
    pub fn assert_bytes(&self, root: &Path) {
        for (i, name) in self.names.iter().enumerate() {
            let src = std::fs::read(self.src.join(name.as_os_str())).expect("read src");
            let dst = std::fs::read(root.join(name.as_os_str())).expect("read dst");
            assert!(src == dst, "file {i} differs");
        }
    }

    /// Every name is in `dst`, with src's metadata and size.
    pub fn assert_placed(&self) {
        for name in &self.names {
            let stat = |root: &Path| std::fs::metadata(root.join(name.as_os_str())).expect("stat");
            let (src, dst) = (stat(&self.src), stat(&self.dst));
            assert_eq!(src.len(), dst.len(), "size");
            assert_eq!(src.permissions(), dst.permissions(), "mode");
            assert_eq!(
                src.modified().expect("mtime"),
                dst.modified().expect("mtime")
            );
        }
        let entries = std::fs::read_dir(&self.dst).expect("list dst");
        let there = entries.filter(|e| e.as_ref().expect("entry").file_name() != ".mirrorfs");
        assert_eq!(there.count(), self.names.len(), "names in dst");
    }
}

/// Not zeros, and not the same in two files.
pub fn bytes(i: usize, size: usize) -> Vec<u8> {
    (0..size).map(|at| (at * 31 + i * 7 + 1) as u8).collect()
}

/// `mirrorfs sync` of the pair, nothing flushed.
pub fn sync(pair: &Pair, jobs: usize) -> SyncReport {
    let mut config = SyncConfig::new(&pair.src, &pair.dst);
    config.fsync = Fsync::Never;
    config.jobs = Some(jobs);
    let report = mirrorfs::sync::run(
        &config,
        Arc::new(Progress::default()),
        &AtomicBool::new(false),
        &mut |_| {},
    );
    report.expect("synced")
}

/// A migration of the pair, nobody at work in it yet.
pub fn mirror(pair: &Pair, workers: usize, io_uring: bool) -> Arc<Mirror> {
    let mut config = MountConfig::new(&pair.src, &pair.dst);
    config.workers = workers;
    config.io_uring = io_uring;
    let trees = Trees::open(&pair.src, &pair.dst).expect("both roots");
    Mirror::open(&config, trees, Arc::new(Progress::default())).expect("a mirror")
}

/// Waits for what `ask` begins.
pub fn wait(ask: impl FnOnce(Waiter)) {
    let (tell, told) = channel();
    ask(Box::new(move |result| {
        let _ = tell.send(result); // The bench has ended.
    }));
    told.recv().expect("an answer").expect("done");
}

/// Placeholders for everything in the root, as for a user who looks at it.
pub fn populate(mirror: &Arc<Mirror>) {
    wait(|then| mirror.when_populated(ROOT, Access::Look, then));
}

/// The same with the data of small files, as the walker does it, until their marks are gone.
/// Returns how many came with their data.
pub fn carry(mirror: &Arc<Mirror>) -> usize {
    let (tell, told) = channel::<Result<()>>();
    let settled = || -> Waiter {
        let tell = tell.clone();
        Box::new(move |result| {
            let _ = tell.send(result); // The bench has ended.
        })
    };
    let carrier = Carrier::new(&settled);
    let root = mirror.root_dir().expect("the root").expect("a mark");
    mirror
        .populate_now(&root, &carrier, || false)
        .expect("populated");
    drop(carrier);
    drop(tell);
    told.iter()
        .inspect(|r| assert!(r.is_ok(), "settled"))
        .count()
}

/// The files of a populated root that wait for their data.
pub fn pending(mirror: &Arc<Mirror>, names: &[Name]) -> Vec<FileRef> {
    let file = |name: &Name| {
        let (tell, told) = channel();
        mirror.lookup(ROOT, name.clone(), move |entry| {
            let _ = tell.send(entry); // The bench has ended.
        });
        let entry = told.recv().expect("an answer").expect("an entry");
        assert!(entry.node.is_pending_file(), "pending");
        FileRef::of(&entry.node)
    };
    names.iter().map(file).collect()
}

/// One file's data, as for a user who opens it.
pub fn hydrate(mirror: &Arc<Mirror>, file: &FileRef) {
    wait(|then| mirror.hydrate(file, Need::Read, Priority::Demand, then));
}

/// Copies files from one open directory into a new one by the engine, all of them asked for at once.
pub fn copy(engine: &Engine, src_dir: &Arc<OwnedFd>, dst: &Path, names: &[Name]) {
    let (report, reports) = channel();
    for name in names {
        let job = CopyJob {
            src_dir: Arc::clone(src_dir),
            dst: Arc::new(
                File::create(dst.join(name.as_os_str()))
                    .expect("create")
                    .into(),
            ),
            path: RelPath::root().join(name),
            src_name: name.clone(),
            span: Span::Whole,
            priority: Priority::Background,
            durability: Durability::Later,
            done: Box::new(Report(report.clone())),
        };
        engine.submit(job).expect("submitted");
    }
    drop(report);
    let copied = reports
        .iter()
        .inspect(|outcome| assert!(outcome.is_ok(), "copied"));
    assert_eq!(copied.count(), names.len(), "every job reports once");
}

struct Report(Sender<Result<Copied>>);

impl Completion for Report {
    fn done(self: Box<Self>, outcome: Result<Copied>) {
        let _ = self.0.send(outcome); // The bench has ended.
    }
}
