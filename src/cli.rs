//! The command line: flags, help text, value parsers. No behaviour.
//!
//! `sync` takes rsync's grammar and `-o` takes mount(8)'s. What either accepts and we do anyway is
//! accepted; what we cannot do is refused with a hint (`Sync::config`, `Mount::config`).

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::config::{Fsync, LogLevel, MountConfig, Reflink, SyncConfig};

/// What every command's help ends with.
pub const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  another failure
   2  usage
   3  SRC, DST or the mount point cannot be used
   9  verify found differences
  11  an I/O error stopped the run, or DST is full
  20  interrupted or not complete: the same command goes on where it stopped
  23  done, but some entries failed (mirrorfs errors PATH)
  24  done, but some entries of SRC vanished or kept changing
  25  --max-delete stopped the deletions
  30  a time limit was reached, or SRC stopped answering";

const MOUNT_ABOUT: &str = "\
Makes the whole tree of SRC usable at MOUNTPOINT, before anything was copied.

Without MOUNTPOINT the mount goes on top of DST itself: nobody sees the half-filled tree below, and \
paths do not change when the mount goes away. The command returns as soon as the mount is usable; a \
daemon stays behind. The same command resumes a migration that was stopped or killed.

SRC is only read. It must not change any more: whoever writes to it now writes to the old home.";

const SYNC_ABOUT: &str = "\
Copies the tree of SRC to DST: data, holes, owner, mode, times, xattrs, ACLs, capabilities, hard \
links, symlinks, devices. All of that is always on, so rsync's letters for it are accepted and say \
what is done anyway: `mirrorfs sync -aHAX SRC DST` works.

SRC and DST are the roots of the two trees; a slash at the end never matters. A file that is equal \
in size and mtime is not copied again. Files appear in DST complete or not at all.";

const STATUS_ABOUT: &str = "\
Shows how far a migration is. PATH is the mount point, DST or SRC; without PATH every running \
migration is shown. Without a daemon `status DST` answers from the marks in DST.

States: PREPARING (not usable yet), WALKING (usable; totals are estimates until every directory was \
seen), MIGRATING (usable; totals are known), PAUSED (usable; only what is opened is copied), \
DEGRADED (usable; something needs you, see `action`), COMPLETE (nothing is pending: finish), \
FINISHED (waits for the last open file), STOPPED (no daemon; the mount command resumes).";

const VERIFY_ABOUT: &str = "\
Compares two trees: every byte of every file, and type, owner, mode, mtime, xattrs, ACLs, hard \
links, symlink targets, device numbers. Prints one line for each difference and exits with 9 when \
there is any, with 23 when something could not be read. Neither tree is changed.";

const FINISH_ABOUT: &str = "\
Ends a migration: makes DST durable, removes every trace of mirrorfs from it and takes the mount \
away. PATH is the mount point, DST or SRC. Files that are open stay open.

Refuses while something is pending (exit code 1) or in the ledger of failures (23).";

const ERRORS_ABOUT: &str = "\
Lists the ledger: what could not be pulled, or not with all its metadata, and why. PATH is the \
mount point, DST or SRC; without a daemon the ledger is read from DST.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "mirrorfs",
    version,
    about = "Use a tree at its new home before it has been copied",
    long_about = "\
mirrorfs moves a directory tree to another file system without a day of downtime.

`mirrorfs mount SRC DST` shows the whole tree of SRC on top of DST at once. What is opened is copied \
from SRC to DST first, everything else follows in the background, and all changes go to DST. SRC is \
never written. When nothing is left to copy, `mirrorfs finish DST` takes the mount away: DST is a \
plain directory that holds everything, at the same path.

`mirrorfs sync SRC DST` copies a tree without a mount, as `rsync -aHAX` and `cp -a` do.

A migration: sync while SRC is in use; stop writing to SRC; `mount --adopt`; go on working in DST; \
`finish` when `status` says COMPLETE.",
    after_help = EXIT_CODES,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One of the commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the tree of SRC usable at DST now, and copy it there
    #[command(long_about = MOUNT_ABOUT)]
    Mount(Mount),
    /// Copy the tree of SRC to DST, without a mount
    #[command(long_about = SYNC_ABOUT)]
    Sync(Box<Sync>),
    /// Show how far a migration is
    #[command(long_about = STATUS_ABOUT)]
    Status(Status),
    /// Compare two trees: every byte, all metadata
    #[command(long_about = VERIFY_ABOUT)]
    Verify(Verify),
    /// End a complete migration: DST becomes a plain tree
    #[command(long_about = FINISH_ABOUT)]
    Finish(Finish),
    /// List what could not be pulled, and why
    #[command(long_about = ERRORS_ABOUT)]
    Errors(Errors),
    /// Print completions for a shell
    Completions(Completions),
    /// Print the man page
    Man(Man),
}

/// `mirrorfs mount`.
#[derive(Debug, Args)]
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
    /// large=SIZE (files over it open at once and are pulled by range; 8M), threads=N (FUSE
    /// session threads), workers=N (copy workers), adopt, nobackground, finish, log=FILE,
    /// loglevel=LEVEL. ro, nosuid, nodev and noexec apply to the mount. What mount(8) and
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
    /// Copy only what is opened
    ///
    /// The mount is complete when everything was read once.
    #[arg(long)]
    pub no_background: bool,
    /// Finish by itself when nothing is pending, unmount and exit
    #[arg(long)]
    pub finish: bool,
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
        hide_env_values = true,
        default_value = "info"
    )]
    pub log_level: Level,
}

/// `--log-level`.
#[derive(Debug, Clone, Copy, ValueEnum)]
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

/// `mirrorfs sync`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES,
    args_override_self = true
)]
pub struct Sync {
    /// The tree to copy from; it is never written
    pub src: PathBuf,
    /// The tree to copy into; made when its parent exists
    pub dst: PathBuf,

    /// Change nothing; with -i say what would be done
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Print one line for each change, as rsync -i does
    #[arg(short = 'i', long)]
    pub itemize_changes: bool,
    /// Print the names of what is copied
    #[arg(short = 'v', long, action = ArgAction::Count)]
    pub verbose: u8,
    /// Print nothing but errors
    #[arg(short = 'q', long)]
    pub quiet: bool,
    /// Show live progress
    #[arg(short = 'P', long)]
    pub progress: bool,
    /// Print totals at the end
    #[arg(long)]
    pub stats: bool,
    /// Print the totals as JSON
    #[arg(long)]
    pub json: bool,

    /// Stay on SRC's own file system
    #[arg(short = 'x', long, help_heading = "What is copied")]
    pub one_file_system: bool,
    /// Compare by content instead of size and mtime
    #[arg(short = 'c', long, help_heading = "What is copied")]
    pub checksum: bool,
    /// Copy also what is equal in size and mtime
    #[arg(short = 'I', long, help_heading = "What is copied")]
    pub ignore_times: bool,
    /// Leave alone what is newer in DST
    #[arg(short = 'u', long, help_heading = "What is copied")]
    pub update: bool,
    /// Equal size is equal, whatever mtime says
    #[arg(long, help_heading = "What is copied")]
    pub size_only: bool,
    /// Leave alone whatever exists in DST
    #[arg(long, help_heading = "What is copied")]
    pub ignore_existing: bool,
    /// Remove from DST what SRC does not have
    #[arg(long, help_heading = "What is copied")]
    pub delete: bool,
    /// Remove at most N entries; more is exit code 25
    #[arg(long, value_name = "N", help_heading = "What is copied")]
    pub max_delete: Option<u64>,

    /// Copy workers; one for each CPU unless given
    #[arg(short = 'j', long, value_name = "N", help_heading = "How it is copied")]
    pub jobs: Option<usize>,
    /// Share extents between SRC and DST
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "How it is copied"
    )]
    pub reflink: ReflinkArg,
    /// When to make durable what was written
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "end",
        help_heading = "How it is copied"
    )]
    pub fsync: FsyncArg,
    /// Compare both trees afterwards, every byte
    #[arg(long, help_heading = "How it is copied")]
    pub verify: bool,

    /// What is done anyway.
    #[command(flatten)]
    pub always: AlwaysOn,
    /// What is refused with a hint.
    #[command(flatten)]
    pub refused: Refused,
}

/// rsync's letters for what `sync` always does.
#[derive(Debug, Args)]
#[command(next_help_heading = "Always on, accepted as rsync writes it")]
pub struct AlwaysOn {
    /// Everything below
    #[arg(short = 'a', long)]
    pub archive: bool,
    /// Directories with all that is in them
    #[arg(short = 'r', long)]
    pub recursive: bool,
    /// Symlinks as symlinks
    #[arg(short = 'l', long)]
    pub links: bool,
    /// Mode
    #[arg(short = 'p', long)]
    pub perms: bool,
    /// Times
    #[arg(short = 't', long)]
    pub times: bool,
    /// Group
    #[arg(short = 'g', long)]
    pub group: bool,
    /// Owner
    #[arg(short = 'o', long)]
    pub owner: bool,
    /// Devices, fifos and sockets
    #[arg(short = 'D')]
    pub devices_specials: bool,
    /// Hard links
    #[arg(short = 'H', long)]
    pub hard_links: bool,
    /// POSIX ACLs
    #[arg(short = 'A', long)]
    pub acls: bool,
    /// Extended attributes
    #[arg(short = 'X', long)]
    pub xattrs: bool,
    /// Holes
    #[arg(short = 'S', long)]
    pub sparse: bool,
    /// Whole files, no delta
    #[arg(short = 'W', long)]
    pub whole_file: bool,
    /// Owners by number
    #[arg(long)]
    pub numeric_ids: bool,
}

/// rsync's options that `sync` cannot honour.
#[derive(Debug, Args)]
pub struct Refused {
    /// No network, no compression.
    #[arg(short = 'z', long, hide = true)]
    pub compress: bool,
    /// No remote shell.
    #[arg(short = 'e', long, value_name = "COMMAND", hide = true)]
    pub rsh: Option<String>,
    /// No second tree.
    #[arg(long, value_name = "DIR", hide = true)]
    pub link_dest: Option<PathBuf>,
    /// Files appear complete or not at all.
    #[arg(long, hide = true)]
    pub inplace: bool,
    /// Likewise.
    #[arg(long, hide = true)]
    pub partial: bool,
}

/// `--reflink`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ReflinkArg {
    /// Where the file system can
    Auto,
    /// Or fail
    Always,
    /// Blocks of its own
    Never,
}

/// `--fsync`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FsyncArg {
    /// Everything, once
    End,
    /// Each file before it gets its name
    File,
    /// Leave it to the kernel
    Never,
}

/// `mirrorfs status`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Status {
    /// Mount point, DST or SRC
    pub path: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `mirrorfs verify`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Verify {
    /// The one tree
    pub src: PathBuf,
    /// The other tree; its mount shows the same as the finished tree
    pub dst: PathBuf,
}

/// `mirrorfs finish`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Finish {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// Give up what could not be pulled
    ///
    /// What `mirrorfs errors` lists is lost: it is missing in DST, or empty.
    #[arg(long)]
    pub accept_loss: bool,
}

/// `mirrorfs errors`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Errors {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// Print JSON, one object on each line
    #[arg(long, conflicts_with = "null")]
    pub json: bool,
    /// Print only the paths, each ended by a NUL
    #[arg(short = '0', long)]
    pub null: bool,
}

/// `mirrorfs completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// Which shell
    pub shell: clap_complete::Shell,
}

/// `mirrorfs man`.
#[derive(Debug, Args)]
pub struct Man {
    /// The page of one command; of mirrorfs itself unless given
    pub command: Option<String>,
}

impl Mount {
    /// The configuration, or one line that says what is wrong with the words.
    pub fn config(self) -> Result<MountConfig, String> {
        let mut config = MountConfig::new(self.src, self.dst);
        if let Some(mountpoint) = self.mountpoint {
            config.mountpoint = mountpoint;
        }
        config.adopt = self.adopt;
        config.background = !self.no_background;
        config.foreground = self.foreground;
        config.finish = self.finish;
        config.log_file = self.log_file;
        config.log_level = self.log_level.into();
        for option in self.options.iter().flat_map(|list| list.split(',')) {
            mount_option(&mut config, option)?;
        }
        config.validated()
    }
}

/// mount(8)'s and fstab(5)'s own words: they concern others, or say what is so anyway.
const GENERIC: &[&str] = &[
    "defaults",
    "rw",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "suid",
    "dev",
    "exec",
    "async",
    "relatime",
    "norelatime",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "allow_other",
    "default_permissions",
];

fn mount_option(config: &mut MountConfig, option: &str) -> Result<(), String> {
    let (key, value) = match option.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (option, None),
    };
    if option.is_empty()
        || GENERIC.contains(&option)
        || key == "comment"
        || ["x-", "X-"].iter().any(|p| key.starts_with(p))
    {
        return Ok(());
    }
    match (key, value) {
        ("ro" | "nosuid" | "nodev" | "noexec", None) => config.mount_options.push(key.to_owned()),
        ("adopt", None) => config.adopt = true,
        ("nobackground", None) => config.background = false,
        ("finish", None) => config.finish = true,
        ("large", Some(text)) => {
            config.large_file_bytes = size(text).map_err(|e| format!("-o large={e}"))?;
        }
        ("threads", Some(text)) => config.threads = number(key, text)?,
        ("workers", Some(text)) => config.workers = number(key, text)?,
        ("log", Some(text)) => config.log_file = Some(PathBuf::from(text)),
        ("loglevel", Some(text)) => {
            let level = Level::from_str(text, true).map_err(|e| format!("-o loglevel={text}: {e}"));
            config.log_level = level?.into();
        }
        ("large" | "threads" | "workers" | "log" | "loglevel", None) => {
            return Err(format!("-o {key} needs a value: -o {key}=..."));
        }
        _ => {
            return Err(format!(
                "-o {option}: unknown mount option; see mirrorfs mount --help"
            ));
        }
    }
    Ok(())
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

impl Sync {
    /// The configuration, or one line that says what is wrong with the words.
    pub fn config(self) -> Result<SyncConfig, String> {
        self.refused.check()?;
        for path in [&self.src, &self.dst] {
            not_remote(path)?;
        }
        let mut config = SyncConfig::new(self.src, self.dst);
        config.dry_run = self.dry_run;
        config.itemize = self.itemize_changes;
        config.delete = self.delete;
        config.max_delete = self.max_delete;
        config.checksum = self.checksum;
        config.ignore_times = self.ignore_times;
        config.update = self.update;
        config.size_only = self.size_only;
        config.ignore_existing = self.ignore_existing;
        config.one_file_system = self.one_file_system;
        config.fsync = match self.fsync {
            FsyncArg::File => Fsync::File,
            FsyncArg::End => Fsync::End,
            FsyncArg::Never => Fsync::Never,
        };
        config.jobs = self.jobs.unwrap_or(config.jobs);
        config.reflink = match self.reflink {
            ReflinkArg::Auto => Reflink::Auto,
            ReflinkArg::Always => Reflink::Always,
            ReflinkArg::Never => Reflink::Never,
        };
        config.verify = self.verify;
        config.stats = self.stats;
        config.json = self.json;
        config.verbose = self.verbose;
        config.quiet = self.quiet;
        config.progress = self.progress;
        config.validated()
    }
}

impl Refused {
    fn check(&self) -> Result<(), String> {
        let hint = if self.compress {
            "-z: nothing goes over a network here; leave it out"
        } else if self.rsh.is_some() {
            "-e: there is no remote side; mount it (NFS, sshfs) and give the path"
        } else if self.link_dest.is_some() {
            "--link-dest: not available; on btrfs or xfs --reflink shares extents instead"
        } else if self.inplace {
            "--inplace: files appear in DST complete or not at all; leave it out"
        } else if self.partial {
            "--partial: a file that was not complete is copied again; leave it out (-P shows \
             progress)"
        } else {
            return Ok(());
        };
        Err(hint.to_owned())
    }
}

/// rsync's rule: a colon before the first slash means another machine.
fn not_remote(path: &std::path::Path) -> Result<(), String> {
    let text = path.to_string_lossy();
    match (text.find(':'), text.find('/')) {
        (Some(colon), slash) if slash.is_none_or(|slash| colon < slash) => Err(format!(
            "{text}: SRC and DST are directories of this machine; mount the other one (NFS, \
             sshfs), or write ./{text} for a name with a colon"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn sync(args: &str) -> Result<SyncConfig, String> {
        let words = ["mirrorfs", "sync"].into_iter().chain(args.split(' '));
        match Cli::try_parse_from(words)
            .map_err(|e| e.to_string())?
            .command
        {
            Command::Sync(sync) => sync.config(),
            other => Err(format!("{other:?}")),
        }
    }

    fn mount(args: &str) -> Result<MountConfig, String> {
        let words = ["mirrorfs", "mount"].into_iter().chain(args.split(' '));
        match Cli::try_parse_from(words)
            .map_err(|e| e.to_string())?
            .command
        {
            Command::Mount(mount) => mount.config(),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rsync_letters_parse_in_clusters() {
        let config = sync("-aHAXxSWnvvi --numeric-ids -rlptgoD --delete a/ b").expect("parses");
        assert!(config.one_file_system && config.dry_run && config.itemize && config.delete);
        assert_eq!(config.verbose, 2);
        assert!(!config.checksum);
        assert_eq!(sync("-aj3 a b").expect("parses").jobs, 3);
    }

    #[test]
    fn what_sync_cannot_do_is_refused_with_a_hint() {
        for words in [
            "-az a b",
            "-e ssh a b",
            "--link-dest=/c a b",
            "--inplace a b",
            "--partial a b",
            "host:a b",
            "a user@host:/b",
            "--jobs 0 a b",
        ] {
            let line = sync(words).expect_err(words);
            assert!(!line.contains('\n'), "{line}");
        }
        assert!(sync("./host:a /x:y").is_ok());
    }

    #[test]
    fn mount_options_of_mount_8_are_ignored_and_unknown_ones_refused() {
        let config = mount("a b -o nofail,_netdev,x-systemd.automount,rw -o large=64K,noexec")
            .expect("parses");
        assert_eq!(config.large_file_bytes, 65536);
        assert_eq!(config.mount_options, ["noexec"]);
        assert_eq!(config.mountpoint, config.dst);
        for words in [
            "a b -o nonsense",
            "a b -o large",
            "a b -o large=x",
            "a b -o threads=0",
        ] {
            assert!(mount(words).is_err(), "{words}");
        }
    }

    #[test]
    fn a_size_is_a_number_and_a_unit() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("8M"), Ok(8 << 20));
        assert_eq!(size("8MiB"), Ok(8 << 20));
        assert_eq!(size("8mb"), Ok(8_000_000));
        for bad in ["", "M", "8X", "8Mi", "-1", "99999999999P", "8\u{e9}"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
