//! Config: what a run was asked to do, as plain data that was validated once.
//!
//! `cli` parses the text, the constructors here check what one value says about another, and
//! everything below only reads the fields.

mod keep;
mod shard;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use keep::Keep;
pub use shard::Shard;

/// Files up to this many bytes are hydrated inside open(2); larger ones are pulled by range.
pub const LARGE_FILE_BYTES: u64 = 8 << 20;

/// FUSE session threads: as many clients' requests can wait for dst's device at once.
const THREADS: usize = 16;
/// Most FUSE session threads and copy workers that can be asked for.
pub const THREADS_MAX: usize = 256;

/// After this long a source that does not answer counts as away.
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(30);

/// What becomes of an access that needs src while src is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// It waits until src is back.
    Wait,
    /// It is EIO after `source_timeout`.
    Fail,
}

/// How much the log says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LogLevel {
    /// Only what stops us.
    Error,
    /// And entries that could not be pulled.
    Warn,
    /// And the life of the mount.
    Info,
    /// And every decision.
    Debug,
    /// And every request.
    Trace,
}

impl LogLevel {
    /// The level of this name.
    pub fn from_name(name: &str) -> Option<LogLevel> {
        use LogLevel::{Debug, Error, Info, Trace, Warn};
        [Error, Warn, Info, Debug, Trace]
            .into_iter()
            .find(|l| l.name() == name)
    }

    /// The level's name, as the log filter and `--log-level` spell it.
    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// What `mirrorfs mount` was asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountConfig {
    /// The tree copied from.
    pub src: PathBuf,
    /// The tree copied into.
    pub dst: PathBuf,
    /// Where the whole tree is visible; by default on top of `dst`.
    pub mountpoint: PathBuf,
    /// A dst that is not empty is taken over: what is equal counts as hydrated.
    pub adopt: bool,
    /// With `adopt`: only what has the same bytes counts as copied.
    pub adopt_checksum: bool,
    /// With `adopt`: what dst has and src has not is removed.
    pub adopt_delete: bool,
    /// The walker pulls what nobody asks for.
    pub background: bool,
    /// Stay in front and show progress, instead of becoming a daemon.
    pub foreground: bool,
    /// Files over this many bytes are opened at once and pulled by range.
    pub large_file_bytes: u64,
    /// What background copies of large files leave in the page cache; not `Direct`.
    pub cache: Cache,
    /// Neighbours of what is opened are pulled before the rest.
    pub prefetch: bool,
    /// How requests come from the kernel.
    pub transport: Transport,
    /// Another daemon goes on with the mount when this one is killed.
    #[serde(default)]
    pub keep_mount: bool,
    /// Where the order of first accesses is written.
    pub record: Option<PathBuf>,
    /// Such a file: what it names is pulled in that order.
    pub replay: Option<PathBuf>,
    /// Where it is written what src's entries are, with a digest of each file.
    #[serde(default)]
    pub manifest: Option<PathBuf>,
    /// Whose reads are answered from src and not stored.
    #[serde(default)]
    pub no_store: NoStore,
    /// FUSE session threads; with io_uring also as many for requests that wait for a device.
    pub threads: usize,
    /// Copy workers.
    pub workers: usize,
    /// False: plain system calls only, as on a kernel without io_uring.
    pub io_uring: bool,
    /// Most bytes per second that the background reads.
    pub bwlimit: Option<u64>,
    /// How many walker threads and copy workers the background uses; `None`: all.
    pub jobs: Option<usize>,
    /// After how long a source that does not answer counts as away.
    pub source_timeout: Duration,
    /// What becomes of an access while src is away.
    pub on_error: OnError,
    /// The mount goes when every directory is populated; fanotify does the rest (native.rs).
    pub native: bool,
    /// When nothing is pending: finish, unmount and exit.
    pub finish: bool,
    /// Where the log goes; `None`: standard error in front, a file in the run directory else.
    pub log_file: Option<PathBuf>,
    /// How much is logged.
    pub log_level: LogLevel,
    /// Where OpenMetrics and the status page are served.
    pub metrics: Option<SocketAddr>,
    /// Where OpenMetrics are written.
    pub metrics_file: Option<PathBuf>,
    /// Mount flags that the mount itself honours: of `ro`, `nosuid`, `nodev`, `noexec`.
    pub mount_options: Vec<String>,
    /// Marks are `user.mirrorfs`: `trusted.*` is not for us.
    pub rootless: bool,
    /// Without CAP_SYS_ADMIN: the mount is made by fusermount3.
    pub helper: bool,
    /// `-o allow_other`: what the helper is asked for. Root's own mounts always have it.
    pub allow_other: bool,
}

impl MountConfig {
    /// A migration from `src` to `dst`, over-mounted on `dst`, everything else as by default.
    pub fn new(src: impl Into<PathBuf>, dst: impl Into<PathBuf>) -> MountConfig {
        let dst = dst.into();
        MountConfig {
            src: src.into(),
            mountpoint: dst.clone(),
            dst,
            adopt: false,
            adopt_checksum: false,
            adopt_delete: false,
            background: true,
            foreground: false,
            large_file_bytes: LARGE_FILE_BYTES,
            cache: Cache::Auto,
            prefetch: true,
            transport: Transport::default(),
            keep_mount: false,
            record: None,
            replay: None,
            manifest: None,
            no_store: NoStore::default(),
            threads: THREADS,
            workers: cpus(),
            io_uring: true,
            bwlimit: None,
            jobs: None,
            source_timeout: SOURCE_TIMEOUT,
            on_error: OnError::Wait,
            native: false,
            finish: false,
            log_file: None,
            log_level: LogLevel::Info,
            metrics: None,
            metrics_file: None,
            mount_options: Vec::new(),
            rootless: false,
            helper: false,
            allow_other: false,
        }
    }

    /// This configuration, or one line that says which value cannot be.
    pub fn validated(self) -> Result<MountConfig, String> {
        in_range("threads", self.threads)?;
        in_range("workers", self.workers)?;
        in_range("--jobs", self.jobs.unwrap_or(1))?;
        if self.source_timeout < Duration::from_millis(100) {
            return Err("--source-timeout: not below 100ms".into());
        }
        if (self.adopt_checksum || self.adopt_delete) && !self.adopt {
            return Err("--checksum and --delete are about what --adopt takes over".into());
        }
        if self.finish && !self.background {
            return Err("--finish needs the background that --no-background switches off".into());
        }
        Ok(self)
    }

    /// True when the mount goes on top of dst itself.
    pub fn over_mounts_dst(&self) -> bool {
        self.mountpoint == self.dst
    }
}

/// Whose reads of pending files are answered from src and not stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoStore {
    /// Users.
    pub uids: Vec<u32>,
    /// Control groups, with those below them: paths as in /proc/PID/cgroup.
    pub cgroups: Vec<String>,
    /// The idle I/O class.
    pub idle: bool,
}

impl NoStore {
    /// Adds `uid:NUMBER`, `cgroup:/PATH` or `idle`.
    pub fn add(&mut self, who: &str) -> Result<(), String> {
        let bad = || format!("{who}: not uid:NUMBER, cgroup:/PATH or idle");
        match who.split_once(':') {
            None if who == "idle" => self.idle = true,
            Some(("uid", number)) => self.uids.push(number.parse().map_err(|_| bad())?),
            Some(("cgroup", path)) => match path.trim_end_matches('/') {
                "" if path.starts_with('/') => return Err(format!("{who}: that is everybody")),
                path if path.starts_with('/') => self.cgroups.push(path.to_owned()),
                _ => return Err(bad()),
            },
            _ => return Err(bad()),
        }
        Ok(())
    }

    /// Everybody's reads are stored.
    pub fn is_empty(&self) -> bool {
        self == &NoStore::default()
    }
}

/// When `sync` makes durable what it wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Each file before it gets its name.
    File,
    /// Everything, once, at the end.
    End,
    /// The kernel decides.
    Never,
}

/// How the kernel's requests come to the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Transport {
    /// Through io_uring from Linux 6.18 on, unless the mount is kept; else read from /dev/fuse.
    #[default]
    Auto,
    /// Read from /dev/fuse.
    Dev,
    /// Through io_uring, a queue for each CPU; /dev/fuse where the kernel or its setting lacks that.
    Uring,
}

impl Transport {
    /// The transport of this name.
    pub fn from_name(name: &str) -> Option<Transport> {
        match name {
            "auto" => Some(Transport::Auto),
            "dev" => Some(Transport::Dev),
            "uring" => Some(Transport::Uring),
            _ => None,
        }
    }
}

/// What a copy of large files leaves in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cache {
    /// Everything, until that is a quarter of the free memory; then nothing.
    Auto,
    /// Everything.
    Keep,
    /// Nothing that was not there before.
    Drop,
    /// Data goes past it (O_DIRECT).
    Direct,
}

/// Whether `sync` shares extents between src and dst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reflink {
    /// Where the file system can.
    Auto,
    /// Or fail.
    Always,
    /// Never: dst gets blocks of its own.
    Never,
}

/// What `mirrorfs sync` was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncConfig {
    /// The tree copied from.
    pub src: PathBuf,
    /// The tree copied into; its last component is made when it is missing.
    pub dst: PathBuf,
    /// Change nothing, say what would be done.
    pub dry_run: bool,
    /// One line of rsync's `%i %n` for each change, on standard output.
    pub itemize: bool,
    /// Remove from dst what src does not have.
    pub delete: bool,
    /// Remove at most this many entries.
    pub max_delete: Option<u64>,
    /// Compare by content, not by size and mtime.
    pub checksum: bool,
    /// Copy also what is equal in size and mtime.
    pub ignore_times: bool,
    /// Leave alone what is newer in dst.
    pub update: bool,
    /// Equal size is equal.
    pub size_only: bool,
    /// Leave alone whatever is there.
    pub ignore_existing: bool,
    /// Leave alone what is not there yet: nothing is made.
    pub existing: bool,
    /// What is not copied, and not removed: rsync's rules, in their order.
    pub filters: Vec<FilterArg>,
    /// What the rules leave out of the copy is removed from dst.
    pub delete_excluded: bool,
    /// Only what this file names, below src; `-`: standard input.
    pub files_from: Option<PathBuf>,
    /// Lines of files with names or rules end with NUL.
    pub from0: bool,
    /// With `files_from`: a directory means all that is in it.
    pub recursive: bool,
    /// Access times are compared, and told when they differ.
    pub atimes: bool,
    /// What is kept of each entry, and which kinds are copied at all.
    pub keep: Keep,
    /// Do not descend into other file systems mounted below src.
    pub one_file_system: bool,
    /// Which part of the tree is this process's; `None`: all of it.
    pub shard: Option<Shard>,
    /// When what was written is made durable.
    pub fsync: Fsync,
    /// Most copy workers; `None`: what the source deserves.
    pub jobs: Option<usize>,
    /// Most bytes per second that are copied.
    pub bwlimit: Option<u64>,
    /// Whether extents are shared.
    pub reflink: Reflink,
    /// Whether large files stay in the page cache.
    pub cache: Cache,
    /// Compare both trees after the copy, bytes too.
    pub verify: bool,
    /// A page of totals at the end.
    pub stats: bool,
    /// The totals as JSON.
    pub json: bool,
    /// Names of what is copied; twice: of what is skipped too.
    pub verbose: u8,
    /// Nothing but errors.
    pub quiet: bool,
    /// Live progress.
    pub progress: bool,
    /// What is done and what failed is written to this file too.
    pub log_file: Option<PathBuf>,
    /// The paths that failed are written to this file.
    pub error_file: Option<PathBuf>,
    /// What each entry is, and the digest of each file, is written to this file.
    pub manifest: Option<PathBuf>,
    /// The run ends after so long.
    pub stop_after: Option<Duration>,
    /// Entries that vanish from src are no failure.
    pub ignore_vanished: bool,
}

/// One option that selects names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterArg {
    /// `--exclude`.
    Exclude(OsString),
    /// `--include`.
    Include(OsString),
    /// `--exclude-from`.
    ExcludeFrom(PathBuf),
    /// `--include-from`.
    IncludeFrom(PathBuf),
    /// `--filter`.
    Rule(OsString),
    /// `-F`: the rules of `.rsync-filter` in each directory; once more: that file is left out.
    PerDir,
}

impl SyncConfig {
    /// A copy of everything from `src` to `dst`, everything else as by default.
    pub fn new(src: impl Into<PathBuf>, dst: impl Into<PathBuf>) -> SyncConfig {
        SyncConfig {
            src: src.into(),
            dst: dst.into(),
            dry_run: false,
            itemize: false,
            delete: false,
            max_delete: None,
            checksum: false,
            ignore_times: false,
            update: false,
            size_only: false,
            ignore_existing: false,
            existing: false,
            filters: Vec::new(),
            delete_excluded: false,
            files_from: None,
            from0: false,
            recursive: false,
            atimes: false,
            keep: Keep::ALL,
            one_file_system: false,
            shard: None,
            fsync: Fsync::End,
            jobs: None,
            bwlimit: None,
            reflink: Reflink::Auto,
            cache: Cache::Auto,
            verify: false,
            stats: false,
            json: false,
            verbose: 0,
            quiet: false,
            progress: false,
            log_file: None,
            error_file: None,
            manifest: None,
            stop_after: None,
            ignore_vanished: false,
        }
    }

    /// This configuration, or one line that says which value cannot be.
    pub fn validated(self) -> Result<SyncConfig, String> {
        self.jobs.map_or(Ok(()), |n| in_range("--jobs", n))?;
        if self.dry_run && self.verify {
            return Err("--verify after --dry-run would compare what was not copied".into());
        }
        if self.shard.is_some() && self.verify {
            return Err("--verify with --shard would compare what others still copy".into());
        }
        if self.keep != Keep::ALL && (self.verify || self.manifest.is_some()) {
            return Err("--verify and --manifest are of whole copies: not with --no-...".into());
        }
        if self.manifest.is_some() {
            if self.dry_run {
                return Err("--manifest after --dry-run would hold what was not copied".into());
            }
            if self.shard.is_some() || self.files_from.is_some() {
                return Err(
                    "--manifest is of a whole tree: not with --shard or --files-from".into(),
                );
            }
        }
        let selects = !self.filters.is_empty() || self.files_from.is_some();
        if self.shard.is_some() && (selects || self.existing) {
            return Err(
                "--shard is for whole trees: not with filters, --files-from, --existing".into(),
            );
        }
        if self.error_file.is_some() && self.error_file == self.files_from {
            return Err("--error-file would empty the list of --files-from".into());
        }
        if self.verify && selects {
            return Err("--verify compares whole trees: not with filters or --files-from".into());
        }
        Ok(self)
    }
}

fn in_range(what: &str, n: usize) -> Result<(), String> {
    if (1..=THREADS_MAX).contains(&n) {
        Ok(())
    } else {
        Err(format!("{what}: {n} is not between 1 and {THREADS_MAX}"))
    }
}

/// The CPUs that this process may run on.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().min(THREADS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_stores_nothing_is_a_user_a_control_group_or_the_idle_class() {
        let mut all = NoStore::default();
        assert!(all.is_empty());
        for who in ["uid:65534", "cgroup:/a/b/", "idle"] {
            assert_eq!(all.add(who), Ok(()), "{who}");
        }
        assert_eq!((&all.uids[..], all.idle), (&[65534][..], true));
        assert_eq!(all.cgroups, ["/a/b"]);
        for who in [
            "", "uid:", "uid:root", "cgroup:", "cgroup:a", "cgroup:/", "Idle", "gid:1",
        ] {
            assert!(all.add(who).is_err(), "{who}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused_in_one_line() {
        let mut mount = MountConfig::new("/a", "/b");
        assert!(mount.over_mounts_dst());
        assert!(mount.clone().validated().is_ok());
        mount.threads = 0;
        assert_eq!(
            mount.validated(),
            Err("threads: 0 is not between 1 and 256".to_owned())
        );
        let mut sync = SyncConfig::new("/a", "/b");
        assert!(sync.clone().validated().is_ok());
        (sync.dry_run, sync.verify) = (true, true);
        assert!(sync.validated().is_err());
        let mut sync = SyncConfig::new("/a", "/b");
        sync.files_from = Some("/list".into());
        sync.error_file = Some("/others".into());
        assert!(sync.clone().validated().is_ok());
        sync.error_file = Some("/list".into());
        assert!(sync.validated().is_err(), "it would be empty");
    }
}
