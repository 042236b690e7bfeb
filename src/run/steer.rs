//! Steer: `pause`, `resume`, `cancel` and `set`, as commands and in the daemon; and what SIGHUP
//! reads again.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use super::log::Log;
use super::out::{self, bytes, quoted};
use super::varlink::{Request, Settings};
use super::{Failure, Outcome, client, errors, exit, preflight, pull, sync};
use crate::cli::{self, ConfigFile};
use crate::config::{LogLevel, MountConfig, THREADS_MAX};
use crate::mirror::Mirror;
use crate::throttle::Background;
use crate::walk::Walker;

/// Where defaults are looked for.
const CONFIG_FILE: &str = "/etc/mirrorfs.toml";

/// `mirrorfs pause`, `resume` and `cancel`.
pub(super) fn run(path: &Path, request: &Request) -> Outcome {
    match client::find(path)? {
        Some(daemon) => daemon.call(request).map(|_| exit::DONE),
        None => {
            preflight::migration(path)?;
            let line = format!("PATH {}: no daemon serves it", quoted(path));
            Err(Failure::new(exit::UNUSABLE, line))
        }
    }
}

/// `mirrorfs set`.
pub(super) fn set(args: &cli::Set) -> Outcome {
    let settings = Settings {
        bwlimit: args.bwlimit,
        jobs: args.jobs,
        log: args.log.map(LogLevel::from),
    };
    if settings == Settings::default() {
        let line = "set: nothing to set: give --bwlimit, --jobs or --log";
        return Err(Failure::new(exit::USAGE, line));
    }
    run(&args.path, &Request::Set(settings))
}

/// The configuration file that was asked for, or the usual one if it is there.
pub(super) fn config_file(asked: Option<&Path>) -> Result<ConfigFile, Failure> {
    let path = asked.unwrap_or(Path::new(CONFIG_FILE));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound && asked.is_none() => {
            return Ok(ConfigFile::default());
        }
        Err(e) => {
            let line = format!("configuration file {}: open: {e}", quoted(path));
            return Err(Failure::new(exit::USAGE, line));
        }
    };
    ConfigFile::parse(&text).map_err(|e| {
        let line = format!("configuration file {}: {e}", quoted(path));
        Failure::new(exit::USAGE, line)
    })
}

/// The command line of a mount with its configuration file.
pub(super) fn mount_config(args: &cli::Mount) -> Result<MountConfig, Failure> {
    let file = config_file(args.config_file().as_deref())?;
    let config = args.clone().config_with(&file.mount);
    config.map_err(|line| Failure::new(exit::USAGE, line))
}

/// In the daemon: what can be changed while it runs.
pub(super) struct Wheel {
    args: cli::Mount,
    log: Log,
    mirror: Arc<Mirror>,
    /// Once it walks.
    walker: OnceLock<Arc<Walker>>,
}

impl Wheel {
    /// `args`: what SIGHUP goes back to; its file by an absolute path.
    pub(super) fn new(args: cli::Mount, log: Log, mirror: Arc<Mirror>) -> Wheel {
        Wheel {
            args,
            log,
            mirror,
            walker: OnceLock::new(),
        }
    }

    /// Who is told when the background's terms have changed. Once.
    pub(super) fn set_walker(&self, walker: Arc<Walker>) {
        let _ = self.walker.set(walker); // There is one.
    }

    /// Carries out a request, if it is one of ours.
    pub(super) fn turn(&self, request: &Request) -> Option<Result<Value, Failure>> {
        match request {
            Request::Pause => self.background(Background::Paused),
            Request::Resume => self.background(Background::Running),
            Request::Cancel => {
                self.mirror.cancel_background();
                self.background(Background::Off);
            }
            Request::Set(settings) => {
                if let Err(failure) = self.set(settings) {
                    return Some(Err(failure));
                }
            }
            Request::AcceptLoss { paths } => return Some(self.accept_loss(paths)),
            Request::Retry => {
                if self.mirror.throttle().background() != Background::Running {
                    let line =
                        "the background does not run: mirrorfs resume, or mirrorfs pull PATH";
                    return Some(Err(Failure::new(exit::FAILURE, line)));
                }
                self.mirror.forget_failures();
                self.kick();
            }
            Request::Pull { paths } => return Some(Ok(pull::serve(&self.mirror, paths))),
            _ => return None,
        }
        Some(Ok(json!({})))
    }

    fn accept_loss(&self, paths: &[PathBuf]) -> Result<Value, Failure> {
        let mut accepted = 0;
        for path in paths {
            let path = errors::rel_path(path)?;
            accepted += self.mirror.accept_loss(&path)?;
            tracing::warn!("given up, if it stays: {path:?}");
        }
        Ok(json!({ "accepted": accepted }))
    }

    fn background(&self, to: Background) {
        self.mirror.throttle().set_background(to);
        tracing::info!("background: {}", format!("{to:?}").to_lowercase());
        self.kick();
    }

    fn set(&self, settings: &Settings) -> Result<(), Failure> {
        if settings.jobs.is_some_and(|n| n > THREADS_MAX) {
            let line = format!("jobs: not between 0 and {THREADS_MAX}");
            return Err(Failure::new(exit::USAGE, line));
        }
        let throttle = self.mirror.throttle();
        if let Some(rate) = settings.bwlimit {
            throttle.set_limit(Some(rate).filter(|r| *r > 0));
            match rate {
                0 => tracing::info!("bandwidth limit: none"),
                rate => tracing::info!("bandwidth limit: {}/s", bytes(rate)),
            }
        }
        if let Some(jobs) = settings.jobs {
            throttle.set_jobs(Some(jobs).filter(|n| *n > 0));
            tracing::info!("jobs: {jobs}");
        }
        if let Some(level) = settings.log {
            self.log.set_level(level);
            tracing::info!("log level: {}", level.name());
        }
        self.kick();
        Ok(())
    }

    /// SIGHUP: the log by its name, and the limits of the command line and its file.
    pub(super) fn reread(&self) {
        self.log.reopen();
        let config = match mount_config(&self.args) {
            Ok(config) => config,
            Err(failure) => return tracing::error!("{}; limits stay", failure.line),
        };
        let settings = Settings {
            bwlimit: Some(config.bwlimit.unwrap_or(0)),
            jobs: Some(config.jobs.unwrap_or(0)),
            log: Some(config.log_level),
        };
        if let Err(failure) = self.set(&settings) {
            tracing::error!("{}; limits stay", failure.line);
        }
    }

    /// SIGUSR2.
    pub(super) fn toggle(&self) {
        let throttle = self.mirror.throttle();
        sync::toggled(throttle.toggle_limit(), throttle.limit());
        self.kick();
    }

    pub(super) fn kick(&self) {
        self.mirror.throttle_changed();
        if let Some(walker) = self.walker.get() {
            walker.kick();
        }
    }
}

/// `path` as the daemon will find it, whose working directory is `/`.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map(|p| p.components().collect())
        .map_err(|e| Failure::new(exit::USAGE, format!("{}: {e}", out::quoted(path))))
}
