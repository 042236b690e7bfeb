//! Sync: the whole of SRC into DST, everything preserved, without a mount.
//!
//! Both trees are walked together by directory fds (`sys::pair`), by a crew of threads over one
//! stack of directories (`crew`), depth first. A directory's life (`dir`):
//!
//!   open()    both sides; what src's directory is was captured
//!   batch()   its names, at most a batch at once: subdirectories are made first (0700), then
//!             files (`file`, `data`), links (`link`), symlinks and devices (`special`)
//!   finish()  all names are there: deletions (`delete`), owner, mode, ACLs, the default ACL, times,
//!             and +i/+a last of all. Subdirectories go on: they don't change its times.
//!
//! A file gets its name when it is complete (a temporary name in its directory, then rename), except
//! in a directory that this run has made or found empty: there it is made under its own name and gets its mtime
//! last, so that what a kill leaves there can't be taken for a complete copy by the quick check
//! (size and mtime). That saves two journalled directory changes for each file. What a power cut
//! leaves can deceive that check: `record` tells of it.
//!
//! Nothing stops the rest: errors are told one by one and counted. Memory is bounded by batches,
//! open directories and open link groups, never by the size of the tree.

mod ahead;
mod anchor;
mod data;
mod delete;
mod depth;
mod dir;
mod file;
mod flow;
mod keep;
mod link;
mod proof;
mod record;
mod report;
mod round;
mod select;
mod served;
mod shard;
mod special;
mod stamp;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

use crate::config::{Fsync, SyncConfig};
use crate::crew::Crew;
use crate::error::{Context, Error, Located, Result, Side};
use crate::links::LinkGroups;
use crate::mark::MarkName;
use crate::progress::Progress;
use crate::sys::name::{Name, RelPath};
use crate::sys::pair::{Place, Roots};
use crate::sys::stat::{Stat, stat_fd};
use crate::sys::view::View;
use crate::sys::xattr::{self, Target};
use crate::sys::{copy, dir as sys_dir, fd, host, local, room};
use crate::throttle::Throttle;

use crate::engine::passing::Allowance;
use data::{Buffers, Slice};
use depth::{Depth, Limits};
use dir::Dir;
use proof::Proof;
use record::Record;
use report::{Changes, Totals};
use round::Round;
use select::Selection;
use shard::Shards;

pub use report::{Event, Line, SyncError, SyncReport};

/// Pairs of directories that may be open at once.
const PAIRS_MAX: usize = 2000;
/// Threads for a source whose latency leaves the processors idle, unless `--jobs` says otherwise.
const THREADS_SLOW: usize = 128;

/// Where room that was reserved is cheaper to write than room that is found page by page: ext4 (a
/// quarter less) and xfs (an eighth). btrfs takes longer; nobody else was asked.
const RESERVES: [u64; 2] = [host::EXT4_MAGIC, host::XFS_MAGIC];

/// Copies all of `config.src` into `config.dst`. `on` gets lines and errors as they happen; `stop`
/// ends the run early: what has begun is finished, so that every name stands for something whole.
/// `Err` is only what prevents the run: a root that cannot be used.
pub fn run(
    config: &SyncConfig,
    progress: Arc<Progress>,
    stop: &AtomicBool,
    on: &mut dyn FnMut(Event),
) -> Result<SyncReport> {
    let throttle = Throttle::default();
    throttle.set_limit(config.bwlimit);
    run_throttled(config, progress, stop, &throttle, on)
}

/// Like `run`, and copies no faster than `throttle` allows, whatever `config.bwlimit` says.
pub fn run_throttled(
    config: &SyncConfig,
    progress: Arc<Progress>,
    stop: &AtomicBool,
    throttle: &Throttle,
    on: &mut dyn FnMut(Event),
) -> Result<SyncReport> {
    let begin = Instant::now();
    let selection = Selection::new(config)?;
    let proof = config.manifest.as_deref().map(Proof::begin).transpose()?;
    let (roots, _view, fresh) = open_roots(config)?;
    let job = Job {
        proof,
        ..Job::new(config, progress, roots, throttle)?
    };
    let halt = AtomicBool::new(false);
    let cpus = host::cpus().len().max(1);
    let mut report = SyncReport::default();
    let first = Item::Dir {
        place: job.roots.root(),
        fresh,
        shallow: false,
        selection,
    };
    let mut depth = Depth::new(job.limits(cpus));
    let shift = Crew::led(
        vec![first],
        &halt,
        |idle| {
            if stop.load(Relaxed) || job.totals.dst_full.load(Relaxed) {
                halt.store(true, Relaxed);
            }
            depth.after(job.totals.look(begin.elapsed(), idle))
        },
        Buffers::new,
        |crew: &Crew<'_, Item, Event>, buffers, item| {
            Work { crew, job: &job }.step(buffers, item);
        },
        |event| {
            note(&mut report, &event);
            on(event);
        },
    );
    report.interrupted = stop.load(Relaxed);
    job.late_flags(|error| {
        let event = Event::Error(error);
        note(&mut report, &event);
        on(event);
    });
    job.totals.fill(&mut report);
    if !config.dry_run {
        report.shards_left = job.settle(&report)?;
    }
    if let Some(proof) = &job.proof {
        let whole = report.failed == 0 && !report.interrupted && !report.dst_full;
        report.manifest = proof.end(whole).err().map(|trouble| trouble.to_string());
    }
    report.threads = shift.threads;
    report.utilisation = shift.utilisation;
    report.elapsed = begin.elapsed();
    job.progress.walk_done.store(!report.interrupted, Relaxed);
    job.progress
        .complete
        .store(!report.interrupted && report.failed == 0, Relaxed);
    Ok(report)
}

fn note(report: &mut SyncReport, event: &Event) {
    if let Event::Error(error) = event {
        match error.vanished {
            true => report.vanished += 1,
            false => report.failed += 1,
        }
        if report.errors.len() < report::ERRORS_KEPT_MAX {
            report.errors.push(error.clone());
        }
    }
}

/// Opens both roots; makes dst's last component when it is missing (then it is fresh).
fn open_roots(config: &SyncConfig) -> Result<(Arc<Roots>, View, bool)> {
    let unusable = |what: &str, path: &Path, e: Errno| {
        Error::Unusable(format!("{what} \"{}\": {e}", path.display()))
    };
    let src = host::open_dir(&config.src).map_err(|e| unusable("SRC", &config.src, e))?;
    let (dst, fresh) = match host::open_dir(&config.dst) {
        Ok(dst) => (dst, false),
        Err(Errno::NOENT) if config.dry_run => (
            host::dup(src.as_fd()).map_err(|e| unusable("SRC", &config.src, e))?,
            true,
        ),
        Err(Errno::NOENT) => {
            let made = match rustix::fs::mkdirat(CWD, &config.dst, Mode::RWXU) {
                Err(Errno::EXIST) if config.shard.is_some() => Ok(false), // Another shard was faster.
                other => other.map(|()| true),
            };
            let opened = made.and_then(|fresh| Ok((host::open_dir(&config.dst)?, fresh)));
            opened.map_err(|e| unusable("DST", &config.dst, e))?
        }
        Err(e) => return Err(unusable("DST", &config.dst, e)),
    };
    let marked = |fd: &OwnedFd| {
        [MarkName::Trusted, MarkName::User]
            .iter()
            .any(|m| matches!(m.get(Target::Open(fd.as_fd())), Ok(Some(_))))
    };
    if marked(&src) {
        return Err(Error::SrcPending {
            path: config.src.clone(),
        });
    }
    if !fresh && marked(&dst) {
        return Err(Error::Unusable(format!(
            "DST \"{}\" is a migration that has not finished: mount it, or finish it first",
            config.dst.display()
        )));
    }
    // Nothing that we do can change it; kept as long as the run lasts.
    let view = View::of(src);
    let quiet = |src| fd::open_src_dir(src, &RelPath::root());
    let src = quiet(view.root()).map_err(|e| unusable("SRC", &config.src, e))?;
    Ok((Roots::new(src, dst, PAIRS_MAX), view, fresh))
}

/// What all threads share.
struct Job<'a> {
    config: &'a SyncConfig,
    throttle: &'a Throttle,
    progress: Arc<Progress>,
    roots: Arc<Roots>,
    root_dev: (u32, u32),
    totals: Totals,
    groups: LinkGroups<Parked>,
    /// Multi-link inodes that get +i or +a when all their names are there.
    late: Mutex<Vec<(RelPath, u32)>>,
    /// Effective ids: what new inodes belong to.
    uid: u32,
    gid: u32,
    umask: u32,
    /// src has inode flags (FS_IOC_GETFLAGS).
    src_flags: bool,
    lines: bool,
    /// More makers of inodes than CPUs only stand in line in dst.
    dst_queues: bool,
    /// Whether FICLONE works between the two roots: unknown, yes, no.
    clone: AtomicU8,
    /// src tells what of a file is in memory (RWF_NOWAIT).
    peeks: AtomicBool,
    served: served::Served,
    /// What large files may leave in the page cache.
    allowance: Allowance,
    /// Room is reserved in dst for large files.
    reserves: bool,
    deletes_left: AtomicU64,
    /// What names of this run have in common.
    run_id: String,
    temp_count: AtomicU64,
    record: Record,
    proof: Option<Proof>,
    /// The other processes that copy the same tree now.
    shards: Option<Shards>,
    /// File systems that dst reaches into: the root's first.
    dst_devs: Mutex<Vec<((u32, u32), OwnedFd)>>,
}

/// A name that waits until the stand-in of its inode is there.
struct Parked {
    dir: Arc<Dir>,
    name: Name,
    kind: FileType,
}

/// One piece of work.
enum Item {
    /// A directory. `fresh`: this run has made it in dst. `shallow`: only itself, nothing in it.
    Dir {
        place: Place,
        fresh: bool,
        shallow: bool,
        /// What counts in its parent.
        selection: Selection,
    },
    /// The rest of an open directory, from this offset in src.
    More(Arc<Dir>, u64),
    /// Some names of a directory that are no directories themselves.
    Names(Arc<Dir>, Vec<sys_dir::Entry>),
    /// A part of a large file.
    Slice(Slice),
}

impl<'a> Job<'a> {
    fn new(
        config: &'a SyncConfig,
        progress: Arc<Progress>,
        roots: Arc<Roots>,
        throttle: &'a Throttle,
    ) -> Result<Job<'a>> {
        let root = stat_fd(roots.src.as_fd()).on("statx", Side::Src, &config.src)?;
        let flags = copy::inode_flags(roots.src.as_fd());
        let totals = Totals::default();
        let fs = host::fs_stat(roots.src.as_fd()).on("fstatfs", Side::Src, &config.src)?;
        totals.src_asks.store(host::asks_others(&fs), Relaxed);
        let dst = roots.dst.as_fd();
        let dst_dev = fd::device_of(dst).on("statx", Side::Dst, &config.dst)?;
        let dst_fs = host::fs_stat(dst).on("fstatfs", Side::Dst, &config.dst)?;
        let reserves = RESERVES.contains(&dst_fs.magic);
        let dst_fd = host::dup(dst).on("dup", Side::Dst, &config.dst)?;
        let shards = config.shard.map(|s| Shards::begin(dst, s, config.dry_run));
        let shards = shards.transpose()?;
        Ok(Job {
            proof: None,
            record: Record::look(dst, shards.as_ref().and_then(|s| s.round.as_ref()))?,
            shards,
            dst_devs: Mutex::new(vec![(dst_dev, dst_fd)]),
            config,
            throttle,
            progress,
            root_dev: root.key.dev,
            totals,
            groups: LinkGroups::default(),
            late: Mutex::default(),
            uid: local::uid(),
            gid: local::gid(),
            umask: local::umask(),
            src_flags: matches!(flags, Ok(Some(_))),
            lines: config.itemize || config.verbose > 0 || config.log_file.is_some(),
            // 30,000 files on 2 CPUs, 2 and 4 threads: xfs 0.63 s and 0.78 s, btrfs 2.1 s and 2.4 s,
            // but ext4 0.63 s and 0.56 s.
            dst_queues: [host::XFS_MAGIC, host::BTRFS_MAGIC].contains(&dst_fs.magic),
            clone: AtomicU8::new(0),
            peeks: AtomicBool::new(!host::asks_others(&fs)),
            served: served::Served::default(),
            allowance: Allowance::new(config.cache),
            reserves,
            deletes_left: AtomicU64::new(config.max_delete.unwrap_or(u64::MAX)),
            run_id: local::run_id(),
            temp_count: AtomicU64::new(0),
            roots,
        })
    }

    /// How many threads there may be: what was asked for is the most.
    fn limits(&self, cpus: usize) -> Limits {
        let few = if self.dst_queues { cpus } else { 2 * cpus };
        let most = self.config.jobs.unwrap_or(THREADS_SLOW);
        let few = few.min(most);
        Limits { few, most, cpus }
    }

    /// The round that this shard is in.
    fn round(&self) -> Option<&Round> {
        self.shards.as_ref()?.round.as_ref()
    }

    /// A name that no user has, for an entry that is not complete yet.
    fn temp_name(&self) -> Name {
        let n = self.temp_count.fetch_add(1, Relaxed);
        let text = format!("{}{}.{n:x}", delete::TEMP, self.run_id);
        Name::new(text.as_bytes()).unwrap_or_else(|| unreachable!("no slash, no NUL"))
    }

    /// Notes the file system of a directory of dst, for the end.
    fn on_device(&self, dev: (u32, u32), dir: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
        let mut devs = self.dst_devs.lock().unwrap_or_else(|e| e.into_inner());
        if devs.iter().all(|(known, _)| *known != dev) {
            devs.push((dev, host::dup(dir)?));
        }
        Ok(())
    }

    /// The end: everything durable, if that is wanted, and then no record any more.
    /// Returns the shards of the round that are still to come.
    fn settle(&self, report: &SyncReport) -> Result<Vec<u32>> {
        let path = &self.config.dst;
        let mut synced = Ok(());
        if self.config.fsync != Fsync::Never {
            let devs =
                std::mem::take(&mut *self.dst_devs.lock().unwrap_or_else(|e| e.into_inner()));
            for (_, dir) in devs {
                synced = synced.and(fd::syncfs(dir.as_fd()).on("syncfs", Side::Dst, path));
            }
        }
        let c = self.config;
        let chooses = !c.filters.is_empty() || c.files_from.is_some() || c.one_file_system;
        let ended = report.failed == 0 && !report.interrupted && !report.dst_full;
        let judged = ended && !chooses && !c.existing;
        let whole = judged && !c.update && !c.ignore_existing;
        let end = record::End {
            durable: synced.is_ok() && c.fsync != Fsync::Never,
            carefree: c.fsync == Fsync::Never,
            judged,
            whole,
        };
        let root = self.roots.dst.as_fd();
        synced.and(self.record.end(root, end))?;
        match self.round() {
            Some(_) if report.interrupted || report.dst_full => Ok(Vec::new()),
            Some(round) => round.end(root, end),
            None if whole && end.durable => round::give_up(root).map(|()| Vec::new()),
            None => Ok(Vec::new()),
        }
    }

    /// Sets +i and +a on inodes with several names: now all of them have theirs.
    fn late_flags(&self, mut failed: impl FnMut(SyncError)) {
        let late = std::mem::take(&mut *self.late.lock().unwrap_or_else(|e| e.into_inner()));
        for (path, flags) in late {
            let set = fd::open_beneath(
                self.roots.dst.as_fd(),
                &path,
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK,
            )
            .and_then(|fd| stamp::add_flags(fd.as_fd(), flags));
            if let Err(errno) = set {
                failed(SyncError::refused(&path, "flags", errno));
            }
        }
    }
}

/// dst takes nothing more.
fn has_none(errno: Errno) -> bool {
    matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::ROFS)
}

/// One step's surroundings.
#[derive(Clone, Copy)]
struct Work<'a, 's> {
    crew: &'a Crew<'s, Item, Event>,
    job: &'a Job<'a>,
}

impl Work<'_, '_> {
    fn one(&self, buffers: &mut Buffers, item: Item) {
        match item {
            Item::Dir {
                place,
                fresh,
                shallow,
                selection,
            } => self.dir(buffers, &place, &selection, fresh, shallow),
            Item::More(dir, from) => self.batch(buffers, &dir, from),
            Item::Names(dir, names) => self.names(buffers, &dir, names, &mut None),
            Item::Slice(slice) => self.slice(buffers, slice),
        }
    }

    /// Tells one error. dst full ends the run.
    fn fail(&self, path: &RelPath, error: &Error) {
        // What the others say is the same.
        if error.is_dst_full() && self.job.totals.dst_full.swap(true, Relaxed) {
            return;
        }
        self.crew.tell(Event::Error(SyncError::new(path, error)));
    }

    fn refused(&self, path: &RelPath, refused: Vec<crate::meta::Refused>) {
        for r in refused {
            // Like every copy without privilege: what is ours stays ours.
            if self.job.uid != 0 && r.what == "chown" && r.errno == Errno::PERM {
                continue;
            }
            if self.has_no_room(r.errno) {
                if let Err(e) = Err::<(), _>(r.errno).on("setxattr", Side::Dst, path.to_path()) {
                    self.fail(path, &e);
                }
                continue;
            }
            let error = SyncError::refused(path, &r.what, r.errno);
            self.crew.tell(Event::Error(error));
        }
    }

    /// ENOSPC says that an inode takes no more xattrs, too: dst is asked which. What is left out now is
    /// seen by the next run.
    fn has_no_room(&self, errno: Errno) -> bool {
        match errno {
            Errno::NOSPC => room::ask(self.job.roots.dst.as_fd()).is_err_and(has_none),
            other => has_none(other),
        }
    }

    /// One itemized line, when lines are wanted.
    fn line(&self, update: char, kind: FileType, path: &RelPath, what: What, note: &str) {
        if !self.job.lines {
            return;
        }
        let letters = match what {
            What::New => "+".repeat(9),
            // As rsync: nothing but the name is new.
            What::Changed(changes) if update == 'h' && !changes.any() => " ".repeat(9),
            What::Changed(changes) => changes.letters(),
        };
        self.crew.tell(Event::Line(Line {
            code: format!("{update}{}{letters}", report::type_letter(kind)),
            path: path.to_path(),
            is_dir: kind == FileType::Directory,
            note: note.to_owned(),
        }));
    }

    /// True when a src entry carries a live mark.
    fn is_pending(&self, target: Target<'_>, names: &[std::ffi::CString]) -> bool {
        [MarkName::Trusted, MarkName::User].iter().any(|mark| {
            names.iter().any(|n| n.as_c_str() == mark.as_cstr())
                && !matches!(mark.get(target), Ok(None) | Err(Errno::IO))
        })
    }

    /// Everything about an open src file or directory but its data: xattr values are asked for only
    /// where the list names some.
    fn capture(
        &self,
        target: Target<'_>,
        stat: Stat,
        path: impl Located + Copy,
    ) -> Result<crate::meta::Meta> {
        let names = xattr::list(target).on("listxattr", Side::Src, path)?;
        if !names.is_empty() && self.is_pending(target, &names) {
            return Err(Error::SrcPending {
                path: path.located(),
            });
        }
        let mut xattrs = Vec::new();
        for name in names {
            if self.counts(&name)
                && let Some(value) = xattr::get(target, &name).on("getxattr", Side::Src, path)?
            {
                xattrs.push((name, value));
            }
        }
        let flags = match target {
            Target::Open(fd) if self.job.src_flags && (stat.is_file() || stat.is_dir()) => {
                copy::inode_flags(fd).on("FS_IOC_GETFLAGS", Side::Src, path)?
            }
            _ => None,
        };
        Ok(crate::meta::Meta {
            stat,
            xattrs,
            flags: flags.unwrap_or(0) & crate::meta::COPIED_FLAGS,
            unread: Vec::new(),
        })
    }
}

/// What a line is about.
#[derive(Clone, Copy)]
enum What {
    New,
    Changed(Changes),
}

#[cfg(test)]
mod tests;
