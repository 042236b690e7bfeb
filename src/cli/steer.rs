//! The commands that watch and steer a running migration: `status`, `wait`, `pause`, `resume`,
//! `cancel`, `set`, `pull`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{EXIT_CODES, Level, rate};

pub(super) const STATUS_ABOUT: &str = "\
Shows how far a migration is. PATH is the mount point, DST or SRC; without PATH every running \
migration is shown. Without a daemon `status DST` answers from the marks in DST.

States: PREPARING (not usable yet), WALKING (usable; totals are estimates until every directory was \
seen), MIGRATING (usable; totals are known), PAUSED (usable; only what is opened is copied), \
DEGRADED (usable; something needs you, see `action`; behind it in parentheses what goes on \
all the same: `DEGRADED (WALKING)`), COMPLETE (nothing is pending: finish), \
FINISHED (waits for the last open file), STOPPED (no daemon; the mount command resumes).";

pub(super) const WAIT_ABOUT: &str = "\
Waits until nothing is pending, and exits with 0 then. Exits with 23 when all that is left could not \
be pulled (mirrorfs errors), with 20 when the daemon ends before, with 30 after --timeout.";

pub(super) const PAUSE_ABOUT: &str = "\
Holds the background where it is. What users open is pulled as before. `mirrorfs resume` lets it go \
on.";

pub(super) const CANCEL_ABOUT: &str = "\
Ends the background, as if the mount had been made with --no-background: what is under way and not \
nearly done is given up and stays pending. `mirrorfs resume` starts it again.";

pub(super) const UPGRADE_ABOUT: &str = "\
Puts another program in the place of the daemon, while its mount is in use. Open files, mappings, \
listings and working directories live on, and what users ask for in this moment waits: no operation \
fails. The process stays the same.

The new program is asked first whether it can take over; if it cannot, or cannot be started, nothing \
changes and the exit code is 1. Needs Linux 6.9 and a mount of root's.";

pub(super) const SET_ABOUT: &str = "\
Changes limits of a running migration. They last until the daemon ends or gets SIGHUP, which applies \
its command line and configuration file again.";

pub(super) const PULL_ABOUT: &str = "\
Pulls files and directories, with all that is below them, before the background comes to them, and \
returns when their data is in DST. PATH is a path in the mount, or the same below DST or SRC. `-` \
reads paths from standard input, one on each line.";

/// `mirrorfs status`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Status {
    /// Mount point, DST or SRC
    pub path: Option<PathBuf>,
    /// Stay and show it again every second
    ///
    /// Ends with the daemon, or with Ctrl-C.
    #[arg(short = 'w', long)]
    pub watch: bool,
    /// One line for each migration, for scripts
    ///
    /// Fields are separated by tabs, numbers are exact, what is not known is `-`: mount point, SRC,
    /// DST, state, entries placed, entries in all, files pulled, files seen, bytes pulled, bytes in
    /// all, 1 when the totals are final, bytes per second, seconds left, accesses that wait, the
    /// longest of these waits in milliseconds, errors.
    #[arg(short = 'H', long, conflicts_with = "json")]
    pub script: bool,
    /// Print JSON
    ///
    /// docs/status.schema.json describes it. With -w an object on each line.
    #[arg(long)]
    pub json: bool,
}

/// `mirrorfs wait`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Wait {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// Wait no longer than this: 30s, 10m, 2h
    #[arg(long, value_name = "DUR", value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
}

/// `mirrorfs pause`, `resume` and `cancel`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Steer {
    /// Mount point, DST or SRC
    pub path: PathBuf,
}

/// `mirrorfs set`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Set {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// What the background may read in a second; 0 or off: no limit
    ///
    /// KiB unless there is a unit, as in rsync: 500, 200M, 1.5G, 100MB.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bwlimit: Option<u64>,
    /// How many walker threads and copy workers the background uses; 0: all
    #[arg(long, value_name = "N")]
    pub jobs: Option<usize>,
    /// How much to log
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<Level>,
}

/// `mirrorfs pull`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Pull {
    /// Files and directories; `-` reads them from standard input
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    /// The paths on standard input end with a NUL
    #[arg(short = '0', long)]
    pub null: bool,
    /// Say nothing about how much was pulled
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

/// `mirrorfs upgrade`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Upgrade {
    /// Mount point, DST or SRC
    pub path: PathBuf,
    /// The program that takes over
    ///
    /// Default: the file that the daemon was started from, as it is on disk now.
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,
}
