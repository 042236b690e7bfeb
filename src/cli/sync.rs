//! `mirrorfs sync`: rsync's grammar.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};

use super::{EXIT_CODES, Filters, KeepArgs, Refused, SyncFile, rate};
use crate::config::{Cache, Fsync, Reflink, Shard, SyncConfig};

pub(super) const ABOUT: &str = "\
Copies the tree of SRC to DST: data, holes, owner, mode, times, xattrs, ACLs, capabilities, hard \
links, symlinks, devices. All of that is on, so rsync's letters for it are accepted and say what is \
done anyway: `mirrorfs sync -aHAX SRC DST` works. `--no-owner` and the like turn one thing off.

SRC and DST are the roots of the two trees; a slash at the end never matters. A file that is equal \
in size and mtime is not copied again. Files appear in DST complete or not at all.";

/// `mirrorfs sync`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES,
    args_override_self = true,
    disable_help_flag = true
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
    /// What rsync's flags say: progress2, progress, stats, name, del
    #[arg(long, value_name = "FLAGS", value_delimiter = ',')]
    pub info: Vec<String>,
    /// Print totals at the end
    #[arg(long)]
    pub stats: bool,
    /// Print the totals as JSON
    #[arg(long)]
    pub json: bool,
    /// Write what is done, and what failed, to this file
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Write the paths that failed to this file, as --files-from takes them
    #[arg(long, value_name = "FILE")]
    pub error_file: Option<PathBuf>,
    /// Write what each entry is, and the BLAKE3 of each file, to this file
    ///
    /// A text in the format of mtree(5), for `mirrorfs verify --manifest`, which then needs no SRC. Files
    /// are hashed as they are copied; what was equal already is read from SRC, unless the file has it of
    /// an earlier run. FILE must not be in SRC or DST.
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,

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
    /// Make nothing that is not in DST yet
    #[arg(long, alias = "ignore-non-existing", help_heading = "What is copied")]
    pub existing: bool,
    /// Remove from DST what SRC does not have
    ///
    /// DST becomes what SRC is, with or without a slash: after `sync --delete /old/projects /new` nothing but
    /// what is in projects is left in /new. What `rsync --delete /old/projects /new` does is
    /// `sync --delete /old/projects /new/projects` here.
    ///
    /// In each directory, when its new names are there. Nothing is removed from a directory that could
    /// not be listed whole. The `lost+found` in the root of an ext4 stays (root's, mode 0700): it is the
    /// file system's own.
    #[arg(
        long,
        aliases = ["del", "delete-during"],
        help_heading = "What is copied"
    )]
    pub delete: bool,
    /// With --delete: what the filters leave out too
    #[arg(long, help_heading = "What is copied")]
    pub delete_excluded: bool,
    /// Remove at most N entries; more is exit code 25
    #[arg(long, value_name = "N", help_heading = "What is copied")]
    pub max_delete: Option<u64>,
    /// Rules about names.
    #[command(flatten)]
    pub filters: Filters,
    /// Copy only what this file names, below SRC; -: standard input
    ///
    /// A directory is made without what is in it; with a slash at its end it comes with its names; with
    /// -r with all that is in it. -a does not mean -r here.
    #[arg(long, value_name = "FILE", help_heading = "What is copied")]
    pub files_from: Option<PathBuf>,
    /// Lines of such files, and of files with rules, end with NUL
    #[arg(short = '0', long, help_heading = "What is copied")]
    pub from0: bool,

    /// Threads that copy, at the most; unless given as many as SRC and DST are fast with
    #[arg(
        short = 'j',
        long,
        alias = "queue-depth",
        value_name = "N",
        help_heading = "How it is copied"
    )]
    pub jobs: Option<usize>,
    /// What may be copied in a second
    ///
    /// KiB unless there is a unit, as in rsync: 500, 200M, 1.5G, 100MB; 0: no limit.
    #[arg(
        long,
        value_name = "RATE",
        env = "MIRRORFS_BWLIMIT",
        hide_env_values = true,
        value_parser = rate,
        help_heading = "How it is copied"
    )]
    pub bwlimit: Option<u64>,
    /// Share extents between SRC and DST
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "How it is copied"
    )]
    pub reflink: ReflinkArg,
    /// What large files leave in the page cache
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "auto",
        help_heading = "How it is copied"
    )]
    pub cache: CacheArg,
    /// When to make durable what was written
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "end",
        help_heading = "How it is copied"
    )]
    pub fsync: FsyncArg,
    /// End after so many minutes; exit code 30
    #[arg(
        long,
        value_name = "MINUTES",
        alias = "time-limit",
        help_heading = "How it is copied"
    )]
    pub stop_after: Option<u64>,
    /// Entries of SRC that vanish while they are copied are no reason for exit code 24
    #[arg(long, help_heading = "How it is copied")]
    pub ignore_vanished: bool,
    /// Compare both trees afterwards, every byte
    #[arg(long, help_heading = "How it is copied")]
    pub verify: bool,
    /// Copy only the K-th of N parts: N processes, on any machines, copy the tree together
    ///
    /// K is from 1 to N; each of the N must run once, in any order or at the same time. `auto` reads
    /// K and N from Slurm, Open MPI or another PMI, and K from Kubernetes.
    #[arg(long, value_name = "K/N|auto", value_parser = shard, help_heading = "How it is copied")]
    pub shard: Option<ShardArg>,
    /// With --shard auto: how many there are, where that is not told
    #[arg(
        long,
        value_name = "N",
        requires = "shard",
        help_heading = "How it is copied"
    )]
    pub shards: Option<u32>,

    /// Read defaults from this file
    ///
    /// TOML, table [sync]; options and environment variables come first. Default:
    /// /etc/mirrorfs.toml, if it is there.
    #[arg(
        long,
        value_name = "FILE",
        env = "MIRRORFS_CONFIG",
        hide_env_values = true
    )]
    pub config: Option<PathBuf>,

    /// Print help; -h alone does too
    #[arg(long, action = ArgAction::HelpLong)]
    pub help: Option<bool>,

    /// What is not kept. Before what turns it on: clap takes each option's words out of its matches.
    #[command(flatten)]
    pub keep: KeepArgs,
    /// What is done anyway.
    #[command(flatten)]
    pub always: AlwaysOn,
    /// What is refused with a hint.
    #[command(flatten)]
    pub refused: Refused,
}

/// rsync's letters for what `sync` does anyway.
#[derive(Debug, Args)]
#[command(next_help_heading = "On unless turned off, accepted as rsync writes it")]
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
    /// Access times; with -i they are told
    #[arg(short = 'U', long)]
    pub atimes: bool,
    /// Group
    #[arg(short = 'g', long)]
    pub group: bool,
    /// Owner
    #[arg(short = 'o', long)]
    pub owner: bool,
    /// Devices, fifos and sockets
    #[arg(short = 'D')]
    pub devices_specials: bool,
    /// Devices
    #[arg(long, hide = true)]
    pub devices: bool,
    /// Fifos and sockets
    #[arg(long, hide = true)]
    pub specials: bool,
    /// Room is always made for a file where an empty directory is
    #[arg(long, hide = true)]
    pub force: bool,
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
    /// Sizes with units
    #[arg(short = 'h', long, action = ArgAction::Count)]
    pub human_readable: u8,
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

/// `--cache`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CacheArg {
    /// Everything, up to a quarter of the free memory
    Auto,
    /// Everything
    Keep,
    /// Nothing that was not there before
    Drop,
    /// Nothing: past the cache (O_DIRECT)
    Direct,
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

/// `--shard`.
#[derive(Debug, Clone, Copy)]
pub enum ShardArg {
    /// This one.
    Given(Shard),
    /// The one that the environment says.
    Auto,
}

fn shard(text: &str) -> Result<ShardArg, String> {
    match text {
        "auto" => Ok(ShardArg::Auto),
        text => text.parse().map(ShardArg::Given),
    }
}

impl Sync {
    /// The configuration, or one line that says what is wrong with the words.
    pub fn config(self) -> Result<SyncConfig, String> {
        self.config_with(&SyncFile::default())
    }

    /// What of rsync's is asked for that `sync` does not have: why, and what to do instead.
    pub fn refusal(&self) -> Option<String> {
        let lists = self.files_from.iter();
        let paths = [&self.src, &self.dst].into_iter().chain(lists);
        let remote = || paths.into_iter().find_map(|p| not_remote(p).err());
        self.refused.0.clone().or_else(remote)
    }

    /// The configuration; what is not said here is as the file has it.
    pub fn config_with(self, file: &SyncFile) -> Result<SyncConfig, String> {
        if let Some(line) = self.refusal() {
            return Err(line);
        }
        let mut config = SyncConfig::new(self.src, self.dst);
        config.dry_run = self.dry_run;
        config.itemize = self.itemize_changes;
        // As in rsync, it means --delete too.
        config.delete = self.delete || self.delete_excluded;
        config.delete_excluded = self.delete_excluded;
        config.filters = self.filters.0;
        config.files_from = self.files_from;
        config.from0 = self.from0;
        config.recursive = self.always.recursive;
        config.existing = self.existing;
        config.keep = self.keep.0;
        config.atimes = self.always.atimes && config.keep.atimes;
        config.log_file = self.log_file;
        config.error_file = self.error_file;
        config.manifest = self.manifest;
        config.stop_after = self
            .stop_after
            .map(|minutes| Duration::from_secs(minutes.saturating_mul(60)));
        config.ignore_vanished = self.ignore_vanished;
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
        config.jobs = self.jobs.or(file.jobs);
        let in_file = || file.bwlimit.as_deref().map(rate).transpose();
        let bwlimit = match self.bwlimit {
            None => in_file().map_err(|e| format!("configuration file: {e}"))?,
            given => given,
        };
        config.bwlimit = bwlimit.filter(|rate| *rate > 0);
        config.reflink = match self.reflink {
            ReflinkArg::Auto => Reflink::Auto,
            ReflinkArg::Always => Reflink::Always,
            ReflinkArg::Never => Reflink::Never,
        };
        config.cache = match self.cache {
            CacheArg::Auto => Cache::Auto,
            CacheArg::Keep => Cache::Keep,
            CacheArg::Drop => Cache::Drop,
            CacheArg::Direct => Cache::Direct,
        };
        let variable = |name: &str| std::env::var(name).ok();
        config.shard = match self.shard {
            None => None,
            Some(ShardArg::Auto) => Some(Shard::auto(variable, self.shards)?),
            Some(ShardArg::Given(_)) if self.shards.is_some() => {
                return Err("--shards is for --shard auto: K/N tells how many there are".into());
            }
            Some(ShardArg::Given(shard)) => Some(shard),
        };
        config.verify = self.verify;
        config.verbose = self.verbose;
        config.progress = self.progress;
        config.stats = self.stats;
        for flag in &self.info {
            match flag.trim_end_matches(|c: char| c.is_ascii_digit()) {
                "progress" => config.progress = true,
                "stats" => config.stats = true,
                "name" | "del" => config.verbose = config.verbose.max(1),
                other => {
                    return Err(format!(
                        "--info={other}: not known; progress2, stats, name and del are (or -P, --stats, -v)"
                    ));
                }
            }
        }
        config.json = self.json;
        config.quiet = self.quiet;
        config.validated()
    }
}

/// As with rsync, `-h` alone asks for help; beside other words it is `--human-readable`.
pub fn help_alone(words: &mut [OsString]) {
    if let [_, command, word] = words
        && command == "sync"
        && word == "-h"
    {
        *word = "--help".into();
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
    use crate::cli::{Cli, Command};
    use crate::config::Keep;
    use clap::Parser;

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

    #[test]
    fn rsync_letters_parse_in_clusters() {
        let config = sync("-aHAXxSWnvvi --numeric-ids -rlptgoD --delete a/ b").expect("parses");
        assert!(config.one_file_system && config.dry_run && config.itemize && config.delete);
        assert_eq!(config.verbose, 2);
        assert!(!config.checksum);
        assert_eq!(sync("-aj3 a b").expect("parses").jobs, Some(3));
        assert!(sync("-avhh --human-readable a b").is_ok());
    }

    #[test]
    fn the_last_word_says_what_is_kept() {
        let kept = |words: &str| sync(words).expect(words).keep;
        assert_eq!(kept("-aHAXS a b"), Keep::ALL);
        assert_eq!(kept("--no-o --no-t --no-links -a a b"), Keep::ALL);
        let some = kept("-aHAX --no-D --specials --no-p --no-owner --no-g -g a b");
        assert!(some.specials && some.group && some.acls);
        assert!(!some.devices && !some.perms && !some.owner);
        assert!(kept("--no-perms -A a b").perms);
        assert!(!kept("-D --no-specials a b").specials);
        assert!(sync("--no-xattrs --verify a b").is_err());
        assert!(sync("--no-l --manifest=m a b").is_err());
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
}
