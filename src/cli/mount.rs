//! `mirrorfs mount`: its flags, and mount(8)'s options.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{EXIT_CODES, MountFile};
use crate::config::{Cache, LogLevel, MountConfig, OnError, Transport};

pub(super) const ABOUT: &str = "\
Makes the whole tree of SRC usable at MOUNTPOINT, before anything was copied.

Without MOUNTPOINT the mount goes on top of DST itself: nobody sees the half-filled tree below, and \
paths do not change when the mount goes away. The command returns as soon as the mount is usable; a \
daemon stays behind. The same command resumes a migration that was stopped or killed.

SRC is only read. It must not change any more: whoever writes to it now writes to the old home.";

/// `mirrorfs mount`.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
#[command(
    after_help = EXIT_CODES,
    args_override_self = true
)]
pub struct Mount {
    /// The tree to copy from; it is never written
    pub src: PathBuf,
    /// The tree to copy into: an existing directory, empty, or of this same migration
    pub dst: PathBuf,
    /// Where the tree is to be seen; on top of DST unless given
    pub mountpoint: Option<PathBuf>,
    /// Mount options, separated by commas
    ///
    /// large=SIZE (files over it open at once and are pulled by range; 8M), cache=auto|keep|drop
    /// (what background copies of large files leave in the page cache), transport=auto|dev|uring, keep_mount,
    /// threads=N (FUSE session threads), workers=N (copy workers), noprefetch (files are not pulled
    /// because others of their directory were opened), nostore=WHO, record=FILE, replay=FILE, manifest=FILE, adopt, checksum, delete, nobackground, finish,
    /// log=FILE, loglevel=LEVEL,
    /// bwlimit=RATE, jobs=N, source-timeout=DUR, on-error=wait|fail, metrics=ADDR, metrics-file=FILE,
    /// config=FILE. In fstab and for mount.mirrorfs also dst=DIR (where to copy to; the mount point
    /// unless given). ro, nosuid, nodev and noexec apply to the mount. allow_other lets other
    /// users in where root is not asked (/etc/fuse.conf must allow it); root's mounts are open to
    /// all anyway. What mount(8) and
    /// fstab(5) use for themselves (defaults, rw, nofail, noauto, _netdev, x-*, ...) is accepted
    /// and ignored; anything else is an error.
    #[arg(short = 'o', value_name = "OPT,...", action = ArgAction::Append)]
    pub options: Vec<String>,
    /// Stay in front and show progress
    ///
    /// Bars on a terminal, else a line every 10 seconds. The log goes to standard error.
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// Take over a DST that is not empty
    ///
    /// A file that is equal in type, size and mtime counts as copied; what differs is pulled
    /// again. For the `mount` that follows a `sync`.
    #[arg(long)]
    pub adopt: bool,
    /// With --adopt: equal is what has the same bytes
    ///
    /// Files of up to 64 KiB are read on both sides and compared, larger ones are copied again.
    #[arg(long)]
    pub checksum: bool,
    /// With --adopt: remove from DST what SRC does not have
    ///
    /// In each directory before anybody can change it: what users make later is never touched. Without
    /// it what only DST has is kept, counted by `status` and listed by `errors`. The `lost+found` in the root
    /// of an ext4 stays.
    #[arg(long)]
    pub delete: bool,
    /// Copy only what is opened
    ///
    /// The mount is complete when everything was read once.
    #[arg(long)]
    pub no_background: bool,
    /// Finish by itself when nothing is pending, unmount and exit
    #[arg(long)]
    pub finish: bool,
    /// A study (docs/NATIVE.md): drop the mount when all names are there; may show zeros
    #[arg(long)]
    pub experimental_native: bool,
    /// Write down in which order files are opened and directories are listed
    ///
    /// For --replay of a later mount of the same tree. A new file each time; not within the mount.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Pull what such a file names, in its order, before it is asked for
    ///
    /// Also with --no-background. What is not there any more is skipped.
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,
    /// Write down what each entry of SRC is, and the BLAKE3 of each file
    ///
    /// A text in the format of mtree(5), for `mirrorfs verify --manifest`. Files are hashed while they are
    /// pulled; `finish` ends the manifest, and reads from SRC what came by ranges or was here already. One of an
    /// earlier run is gone on with. Not in SRC, DST or MOUNTPOINT.
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Store nothing of what these processes read: uid:NUMBER, cgroup:/PATH or idle
    ///
    /// For scanners, indexers and backups, which would pull the whole tree in their order. What they
    /// read of a file that is not here yet comes from SRC each time; the file stays as it is. `idle` is
    /// the I/O class of `ionice -c3`; a control group counts with those below it. More than once, or
    /// with commas. What they write, and what they read of other files, is as for everybody.
    #[arg(
        long,
        value_name = "WHO",
        env = "MIRRORFS_NO_STORE",
        hide_env_values = true,
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    pub no_store: Vec<String>,
    /// Log to this file; SIGHUP opens it again
    ///
    /// Default: standard error with -f, else a file in /run/mirrorfs, or in
    /// $XDG_RUNTIME_DIR/mirrorfs without root.
    #[arg(
        long,
        value_name = "FILE",
        env = "MIRRORFS_LOG_FILE",
        hide_env_values = true
    )]
    pub log_file: Option<PathBuf>,
    /// How much to log
    #[arg(
        long,
        value_name = "LEVEL",
        env = "MIRRORFS_LOG_LEVEL",
        hide_env_values = true
    )]
    pub log_level: Option<Level>,
    /// What the background may read in a second
    ///
    /// KiB unless there is a unit, as in rsync: 500, 200M, 1.5G, 100MB; 0 or off: no limit, which is
    /// the default. What users open is pulled at full speed. SIGUSR2 lifts the limit and applies it
    /// again.
    #[arg(
        long,
        value_name = "RATE",
        env = "MIRRORFS_BWLIMIT",
        hide_env_values = true,
        value_parser = rate
    )]
    pub bwlimit: Option<u64>,
    /// How many walker threads and copy workers the background uses; 0: all
    #[arg(
        short = 'j',
        long,
        value_name = "N",
        env = "MIRRORFS_JOBS",
        hide_env_values = true
    )]
    pub jobs: Option<usize>,
    /// After how long a SRC that does not answer counts as away: 30s, 5m
    ///
    /// Default: 30s.
    #[arg(
        long,
        value_name = "DUR",
        env = "MIRRORFS_SOURCE_TIMEOUT",
        hide_env_values = true,
        value_parser = humantime::parse_duration
    )]
    pub source_timeout: Option<Duration>,
    /// What becomes of an access that needs SRC while SRC is away
    ///
    /// Default: wait. An entry that cannot be read while SRC answers is an I/O error with both.
    #[arg(
        long,
        value_name = "WHAT",
        env = "MIRRORFS_ON_ERROR",
        hide_env_values = true
    )]
    pub on_error: Option<OnErrorArg>,
    /// Serve OpenMetrics and a status page over HTTP: a port of 127.0.0.1, or ADDRESS:PORT
    ///
    /// Whoever can reach the address can read names of files. /metrics is for Prometheus, / for a
    /// browser.
    #[arg(
        long,
        value_name = "ADDR",
        env = "MIRRORFS_METRICS",
        hide_env_values = true,
        value_parser = address
    )]
    pub metrics: Option<SocketAddr>,
    /// Write OpenMetrics to this file every 15 seconds
    ///
    /// For the textfile collector of the node exporter: *.prom in its directory.
    #[arg(
        long,
        value_name = "FILE",
        env = "MIRRORFS_METRICS_FILE",
        hide_env_values = true
    )]
    pub metrics_file: Option<PathBuf>,
    /// How the kernel's requests come to the mount: auto, dev or uring
    ///
    /// dev: /dev/fuse. uring: io_uring, a queue for each CPU (Linux 6.14), switched on where it is
    /// off; where the kernel does not have it, /dev/fuse. auto, the default: uring from Linux 6.18 on,
    /// dev with --keep-mount.
    #[arg(
        long,
        value_name = "WHICH",
        env = "MIRRORFS_TRANSPORT",
        hide_env_values = true,
        value_parser = transport
    )]
    pub transport: Option<Transport>,
    /// Let the mount outlive the daemon
    ///
    /// A small process keeps what the kernel relies on. When the daemon is killed another one goes
    /// on: open files live, and who waits is answered. For root, over /dev/fuse (Linux 6.9).
    #[arg(long)]
    pub keep_mount: bool,
    /// Read defaults from this file
    ///
    /// TOML; options and environment variables come first. Default: /etc/mirrorfs.toml, if it is
    /// there. SIGHUP reads it again, for the bandwidth limit, jobs and log level.
    #[arg(
        long,
        value_name = "FILE",
        env = "MIRRORFS_CONFIG",
        hide_env_values = true
    )]
    pub config: Option<PathBuf>,
    /// mount(8)'s -s: an option that is not known is no error.
    #[arg(skip)]
    pub sloppy: bool,
}

/// `--on-error`.
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
pub enum OnErrorArg {
    /// It waits until SRC is back
    Wait,
    /// It is an I/O error after --source-timeout
    Fail,
}

impl From<OnErrorArg> for OnError {
    fn from(arg: OnErrorArg) -> OnError {
        match arg {
            OnErrorArg::Wait => OnError::Wait,
            OnErrorArg::Fail => OnError::Fail,
        }
    }
}

/// `--log-level`.
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
pub enum Level {
    /// Only what stops mirrorfs
    Error,
    /// And entries that could not be pulled
    Warn,
    /// And the life of the mount
    Info,
    /// And every decision
    Debug,
    /// And every request
    Trace,
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> LogLevel {
        match level {
            Level::Error => LogLevel::Error,
            Level::Warn => LogLevel::Warn,
            Level::Info => LogLevel::Info,
            Level::Debug => LogLevel::Debug,
            Level::Trace => LogLevel::Trace,
        }
    }
}

impl Mount {
    /// The configuration file that is asked for.
    pub fn config_file(&self) -> Option<PathBuf> {
        let of_option = |option: &str| option.strip_prefix("config=").map(PathBuf::from);
        let mut options = self.options.iter().flat_map(|list| list.split(','));
        options.find_map(of_option).or_else(|| self.config.clone())
    }

    /// The configuration, or one line that says what is wrong with the words.
    pub fn config(self) -> Result<MountConfig, String> {
        self.config_with(&MountFile::default())
    }

    /// The configuration; what is not said here is as the file has it.
    pub fn config_with(self, file: &MountFile) -> Result<MountConfig, String> {
        let mut config = MountConfig::new(self.src, self.dst);
        from_file(&mut config, file)?;
        if let Some(mountpoint) = self.mountpoint {
            config.mountpoint = mountpoint;
        }
        config.adopt = self.adopt;
        (config.adopt_checksum, config.adopt_delete) = (self.checksum, self.delete);
        config.background = !self.no_background;
        config.foreground = self.foreground;
        config.finish = self.finish;
        config.native = self.experimental_native;
        (config.record, config.replay) = (self.record, self.replay);
        config.manifest = self.manifest;
        for who in &self.no_store {
            let added = config.no_store.add(who);
            added.map_err(|e| format!("--no-store {e}"))?;
        }
        config.log_file = self.log_file.or(config.log_file);
        config.log_level = self.log_level.map_or(config.log_level, LogLevel::from);
        set_limits(&mut config, self.bwlimit, self.jobs);
        config.source_timeout = self.source_timeout.unwrap_or(config.source_timeout);
        config.on_error = self.on_error.map_or(config.on_error, OnError::from);
        config.transport = self.transport.unwrap_or(config.transport);
        config.keep_mount |= self.keep_mount;
        config.metrics = self.metrics.or(config.metrics);
        config.metrics_file = self.metrics_file.or(config.metrics_file);
        for option in self.options.iter().flat_map(|list| list.split(',')) {
            match mount_option(&mut config, option) {
                Err(line) if !self.sloppy || !line.contains(UNKNOWN) => return Err(line),
                _ => {}
            }
        }
        config.validated()
    }
}

/// What is said of an option that nobody knows.
const UNKNOWN: &str = "unknown mount option";

/// 0 lifts what was set before.
fn set_limits(config: &mut MountConfig, bwlimit: Option<u64>, jobs: Option<usize>) {
    if let Some(rate) = bwlimit {
        config.bwlimit = Some(rate).filter(|r| *r > 0);
    }
    if let Some(jobs) = jobs {
        config.jobs = Some(jobs).filter(|n| *n > 0);
    }
}

fn from_file(config: &mut MountConfig, file: &MountFile) -> Result<(), String> {
    let in_file = |e: String| format!("configuration file: {e}");
    let bwlimit = file.bwlimit.as_deref().map(rate).transpose();
    set_limits(config, bwlimit.map_err(in_file)?, file.jobs);
    config.log_file = file.log_file.clone();
    if let Some(name) = &file.log_level {
        config.log_level = LogLevel::from_name(name)
            .ok_or_else(|| in_file(format!("log-level = {name:?}: not a level")))?;
    }
    if let Some(text) = &file.source_timeout {
        config.source_timeout = duration(text).map_err(in_file)?;
    }
    if let Some(text) = &file.on_error {
        config.on_error = on_error(text).map_err(in_file)?;
    }
    let metrics = file.metrics.as_deref().map(address).transpose();
    config.metrics = metrics.map_err(in_file)?;
    config.metrics_file = file.metrics_file.clone();
    if let Some(text) = &file.large {
        config.large_file_bytes = size(text).map_err(in_file)?;
    }
    if let Some(word) = &file.cache {
        config.cache = cache(word).map_err(in_file)?;
    }
    if let Some(word) = &file.transport {
        config.transport = transport(word).map_err(in_file)?;
    }
    config.keep_mount = file.keep_mount.unwrap_or(false);
    for who in file.no_store.iter().flatten() {
        config.no_store.add(who).map_err(in_file)?;
    }
    config.threads = file.threads.unwrap_or(config.threads);
    config.workers = file.workers.unwrap_or(config.workers);
    Ok(())
}

/// mount(8)'s and fstab(5)'s own words: they concern others, or say what is so anyway.
const GENERIC: &str = "\
    defaults rw auto noauto user nouser users owner group nofail _netdev suid dev \
    exec async relatime norelatime atime noatime diratime nodiratime strictatime \
    nostrictatime lazytime nolazytime silent loud default_permissions";

fn mount_option(config: &mut MountConfig, option: &str) -> Result<(), String> {
    let (key, value) = match option.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (option, None),
    };
    if option.is_empty()
        || GENERIC.split(' ').any(|word| word == option)
        || key == "comment"
        || ["x-", "X-"].iter().any(|p| key.starts_with(p))
    {
        return Ok(());
    }
    match (key, value) {
        ("ro" | "nosuid" | "nodev" | "noexec", None) => config.mount_options.push(key.to_owned()),
        ("allow_other", None) => config.allow_other = true,
        ("adopt", None) => config.adopt = true,
        ("checksum", None) => config.adopt_checksum = true,
        ("delete", None) => config.adopt_delete = true,
        ("nostore", Some(who)) => {
            let added = config.no_store.add(who);
            added.map_err(|e| format!("-o nostore={e}"))?;
        }
        ("record", Some(file)) => config.record = Some(PathBuf::from(file)),
        ("replay", Some(file)) => config.replay = Some(PathBuf::from(file)),
        ("manifest", Some(file)) => config.manifest = Some(PathBuf::from(file)),
        ("noprefetch", None) => config.prefetch = false,
        ("nobackground", None) => config.background = false,
        ("finish", None) => config.finish = true,
        ("large", Some(text)) => {
            config.large_file_bytes = size(text).map_err(|e| format!("-o large={e}"))?;
        }
        ("cache", Some(word)) => {
            config.cache = cache(word).map_err(|e| format!("-o cache={e}"))?;
        }
        ("transport", Some(word)) => {
            config.transport = transport(word).map_err(|e| format!("-o transport={e}"))?;
        }
        ("keep_mount", None) => config.keep_mount = true,
        ("threads", Some(text)) => config.threads = number(key, text)?,
        ("workers", Some(text)) => config.workers = number(key, text)?,
        ("log", Some(text)) => config.log_file = Some(PathBuf::from(text)),
        ("loglevel", Some(text)) => {
            let level = Level::from_str(text, true).map_err(|e| format!("-o loglevel={text}: {e}"));
            config.log_level = level?.into();
        }
        ("bwlimit", Some(text)) => {
            let rate = rate(text).map_err(|e| format!("-o bwlimit={e}"))?;
            set_limits(config, Some(rate), None);
        }
        ("jobs", Some(text)) => set_limits(config, None, Some(number(key, text)?)),
        ("source-timeout", Some(text)) => {
            let time = duration(text).map_err(|e| format!("-o source-timeout={e}"))?;
            config.source_timeout = time;
        }
        ("on-error", Some(text)) => {
            config.on_error = on_error(text).map_err(|e| format!("-o on-error={e}"))?;
        }
        ("metrics", Some(text)) => {
            config.metrics = Some(address(text).map_err(|e| format!("-o metrics={e}"))?);
        }
        ("metrics-file", Some(text)) => config.metrics_file = Some(PathBuf::from(text)),
        ("config", Some(_)) => {} // See `config_file`.
        (
            "large" | "cache" | "threads" | "workers" | "log" | "loglevel" | "bwlimit" | "jobs"
            | "metrics" | "metrics-file" | "source-timeout" | "on-error" | "config" | "nostore"
            | "record" | "replay" | "manifest" | "transport",
            None,
        ) => {
            return Err(format!("-o {key} needs a value: -o {key}=..."));
        }
        _ => {
            return Err(format!("-o {option}: {UNKNOWN}; see mirrorfs mount --help"));
        }
    }
    Ok(())
}

/// What background copies of large files leave in the page cache.
fn cache(word: &str) -> Result<Cache, String> {
    match word {
        "auto" => Ok(Cache::Auto),
        "keep" => Ok(Cache::Keep),
        "drop" => Ok(Cache::Drop),
        _ => Err(format!("{word}: not auto, keep or drop")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{text}: {e}"))
}

fn on_error(text: &str) -> Result<OnError, String> {
    let arg = OnErrorArg::from_str(text, true).map(OnError::from);
    arg.map_err(|_| format!("{text}: not wait or fail"))
}

/// How requests come from the kernel.
fn transport(word: &str) -> Result<Transport, String> {
    Transport::from_name(word).ok_or_else(|| format!("{word}: not auto, dev or uring"))
}

fn number(key: &str, text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| format!("-o {key}={text}: not a number"))
}

/// A size: `4096`, `64K`, `8M` or `8MiB` (powers of 1024), `8MB` (powers of 1000).
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text}: not a size such as 4096, 64K, 8M or 1GiB");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| bad())?;
    let unit = text[digits..].to_ascii_lowercase();
    let mut rest = unit.chars();
    let power = match rest.next() {
        None | Some('b') => 0,
        Some(letter) => 1 + "kmgtp".find(letter).ok_or_else(bad)? as u32,
    };
    let base: u64 = match (power, rest.as_str()) {
        (_, "") => 1024,
        (1.., "ib") => 1024,
        (1.., "b") => 1000,
        _ => return Err(bad()),
    };
    number.checked_mul(base.pow(power)).ok_or_else(bad)
}

/// A rate as rsync writes it: KiB per second unless there is a unit; `off` and 0 are no limit.
pub fn rate(text: &str) -> Result<u64, String> {
    let bad = || format!("{text}: not a rate such as 500 (KiB), 200M, 1.5G, 100MB or off");
    if text.eq_ignore_ascii_case("off") {
        return Ok(0);
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| bad())?;
    let unit = match &text[digits..] {
        "" => "K",
        unit => unit,
    };
    let unit = size(&format!("1{unit}")).map_err(|_| bad())? as f64;
    let rate = number * unit;
    match (1.0..1e18).contains(&rate) {
        true => Ok(rate as u64),
        false if number == 0.0 => Ok(0),
        false => Err(bad()),
    }
}

/// A port of this machine, or an address and a port.
fn address(text: &str) -> Result<SocketAddr, String> {
    let bad = || format!("{text}: not a port, or an address such as 127.0.0.1:9469 or [::1]:9469");
    if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
        return Ok(SocketAddr::from(([127, 0, 0, 1], port)));
    }
    let local = text
        .strip_prefix("localhost:")
        .map(|p| format!("127.0.0.1:{p}"));
    local.as_deref().unwrap_or(text).parse().map_err(|_| bad())
}

#[cfg(test)]
mod tests;
