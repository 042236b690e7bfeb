//! The command line: flags, help text, value parsers. No behaviour.
//!
//! `sync` takes rsync's grammar and `-o` takes mount(8)'s. What either accepts and we do anyway is
//! accepted; what we cannot do is refused with a hint (`Sync::config`, `Mount::config`).

mod file;
mod filters;
mod keep;
mod mount;
mod refused;
mod steer;
mod sync;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use file::{ConfigFile, MountFile, SyncFile};
pub use filters::Filters;
pub use keep::KeepArgs;
pub use mount::{Level, Mount, rate, size};
pub use refused::Refused;
pub use steer::{Pull, Set, Status, Steer, Upgrade, Wait};
pub use sync::{AlwaysOn, FsyncArg, ReflinkArg, Sync, help_alone};

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

const VERIFY_ABOUT: &str = "\
Compares two trees: every byte of every file, and type, owner, mode, mtime, xattrs, ACLs, hard \
links, symlink targets, device numbers. Prints one line for each difference and exits with 9 when \
there is any, with 23 when something could not be read. Neither tree is changed.

With --manifest one tree is compared with what it was when `mirrorfs sync --manifest` copied it; SRC is \
not needed. `changed`: size, mtime, mode, owner or target are others, so somebody has changed it \
since. `corrupt`: nobody has, but its bytes are others.";

const MANIFEST_ABOUT: &str = "\
Reads a tree and writes what each entry is, and the BLAKE3 of each file, to a file in the format of \
mtree(5), as `mirrorfs sync --manifest` does while it copies. `mirrorfs verify --manifest FILE DST` then \
compares a copy with it, however that was made: for a migration by `mirrorfs mount` take it of SRC, at \
any time before SRC is given away.";

const FINISH_ABOUT: &str = "\
Ends a migration: makes DST durable, removes every trace of mirrorfs from it and takes the mount \
away. PATH is the mount point, DST or SRC. Files that are open stay open.

Refuses while something is pending (exit code 1) or in the ledger of failures (23).";

const ERRORS_ABOUT: &str = "\
Lists the ledger: what could not be pulled, or not with all its metadata, and why. PATH is the \
mount point, DST or SRC; without a daemon the ledger is read from DST. --retry and --accept-loss \
change what becomes of it.";

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
    #[command(long_about = mount::ABOUT)]
    Mount(Box<Mount>),
    /// Copy the tree of SRC to DST, without a mount
    #[command(long_about = sync::ABOUT)]
    Sync(Box<Sync>),
    /// Show how far a migration is
    #[command(long_about = steer::STATUS_ABOUT)]
    Status(Status),
    /// Wait until nothing is pending
    #[command(long_about = steer::WAIT_ABOUT)]
    Wait(Wait),
    /// Hold the background
    #[command(long_about = steer::PAUSE_ABOUT)]
    Pause(Steer),
    /// Let the background go on
    Resume(Steer),
    /// End the background; what is opened is still copied
    #[command(long_about = steer::CANCEL_ABOUT)]
    Cancel(Steer),
    /// Change limits while a migration runs
    #[command(long_about = steer::SET_ABOUT)]
    Set(Set),
    /// Replace the program of a mount in use
    #[command(long_about = steer::UPGRADE_ABOUT)]
    Upgrade(Upgrade),
    /// Pull files and directories now
    #[command(long_about = steer::PULL_ABOUT)]
    Pull(Pull),
    /// Compare two trees: every byte, all metadata
    #[command(long_about = VERIFY_ABOUT)]
    Verify(Verify),
    /// Write what a tree is, and the BLAKE3 of each file, to a file
    #[command(long_about = MANIFEST_ABOUT)]
    Manifest(Manifest),
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

/// `mirrorfs verify`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES,
    override_usage = "mirrorfs verify [OPTIONS] <SRC> <DST>\n       mirrorfs verify [OPTIONS] --manifest <FILE> <DST>"
)]
pub struct Verify {
    /// The one tree; with --manifest there is only DST
    #[arg(value_name = "SRC")]
    pub first: PathBuf,
    /// The other tree; its mount shows the same as the finished tree
    #[arg(value_name = "DST", required_unless_present = "manifest")]
    pub second: Option<PathBuf>,
    /// Compare DST with this manifest, which `mirrorfs sync --manifest` has written
    ///
    /// Files whose size and mtime are in it are read and hashed, the others are not. It knows no inode flags.
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// With --manifest: what somebody has changed, removed or made since is no difference
    #[arg(long, requires = "manifest")]
    pub ignore_changed: bool,
    /// Write a line for each entry: `= path` equal, `* path` different, `+ path` missing in DST,
    /// `- path` only in DST, `! path` not readable
    ///
    /// As rclone check --combined does; with --manifest `X path` is corrupt. Of a directory that one side
    /// lacks only its own name. `-`: standard output, in the place of the lines that say what differs.
    #[arg(long, value_name = "FILE")]
    pub combined: Option<PathBuf>,
    /// Compare the bytes of the K-th of N parts of the files
    ///
    /// Which part a file is in depends on its path alone, so that N runs with K from 1 to N read
    /// everything once. Names and metadata of all entries are compared each time.
    #[arg(long, value_name = "K/N")]
    pub sample: Option<crate::config::Shard>,
    /// Print JSON: an object on a line for each difference, and one with the sum
    ///
    /// docs/verify.schema.json is their schema. Not with --combined -.
    #[arg(long)]
    pub json: bool,
}

/// `mirrorfs manifest`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Manifest {
    /// The tree; it is not changed
    pub src: PathBuf,
    /// The file; not in the tree
    ///
    /// Of one that is there the digests are used again of files with the same size, mtime and ctime.
    pub file: PathBuf,
    /// Stay on SRC's own file system
    #[arg(short = 'x', long)]
    pub one_file_system: bool,
}

/// `mirrorfs finish`.
#[derive(Debug, Args)]
#[command(
    after_help = EXIT_CODES
)]
pub struct Finish {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// Give up all that could not be pulled
    ///
    /// What `mirrorfs errors` lists is lost: it is missing in DST. One path alone: `mirrorfs errors
    /// --accept-loss`.
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
    /// Try again now what can be tried again
    #[arg(long, conflicts_with_all = ["json", "null", "accept_loss"])]
    pub retry: bool,
    /// Give up this path, if it stays as it is; may be repeated
    ///
    /// As the ledger has it: below SRC. It is tried again all the same; `mirrorfs finish` takes what
    /// is still not there for lost.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["json", "null"])]
    pub accept_loss: Vec<PathBuf>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
