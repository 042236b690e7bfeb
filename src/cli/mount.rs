//! `mirrorfs mount`: its flags, and mount(8)'s options.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::EXIT_CODES;
use crate::config::{LogLevel, MountConfig};

pub(super) const ABOUT: &str = "\
Makes the whole tree of SRC usable at MOUNTPOINT, before anything was copied.

Without MOUNTPOINT the mount goes on top of DST itself: nobody sees the half-filled tree below, and \
paths do not change when the mount goes away. The command returns as soon as the mount is usable; a \
daemon stays behind. The same command resumes a migration that was stopped or killed.

SRC is only read. It must not change any more: whoever writes to it now writes to the old home.";

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
    /// loglevel=LEVEL. ro, nosuid, nodev and noexec apply to the mount. allow_other lets other
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
        ("allow_other", None) => config.allow_other = true,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

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
