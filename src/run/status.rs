//! Status: the daemon's side (`Live`), which makes a report whenever somebody asks, and the command,
//! which prints it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

use super::control::{self, lexical};
use super::out::{self, bytes, count, quoted};
use super::preflight::{self, Ground};
use super::report::{Counts, Rate, Report, State};
use super::{Failure, Outcome, exit};
use crate::config::MountConfig;
use crate::error::Printable;
use crate::progress::Progress;
use crate::sys::host;

/// What only the main loop knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not attached yet.
    Preparing,
    /// Attached.
    Serving,
    /// Finished: dst is a plain tree.
    Finished,
    /// Detached, still in use by somebody.
    Stopping,
}

/// The daemon's side: everything a report is made of.
pub(crate) struct Live {
    config: MountConfig,
    progress: Arc<Progress>,
    since: SystemTime,
    src_fs: String,
    dst_fs: String,
    home_names: Vec<String>,
    src_names: Vec<String>,
    /// dst from before the mount, for its free space.
    dst: OwnedFd,
    phase: Mutex<Phase>,
    rate: Mutex<Rate>,
}

impl Live {
    /// Before the mount is attached: later these paths lead into ourselves.
    pub(crate) fn new(ground: &Ground, progress: Arc<Progress>) -> Result<Live, Failure> {
        let config = &ground.config;
        let dst = host::dup(ground.trees.dst.as_fd()).map_err(|e| {
            let line = format!("{}: dup: {e}", quoted(&config.dst));
            Failure::new(exit::UNUSABLE, line)
        })?;
        let mut home_names = names(&config.mountpoint);
        home_names.extend(names(&config.dst));
        Ok(Live {
            progress,
            since: SystemTime::now(),
            src_fs: ground.src_fs.clone(),
            dst_fs: ground.dst_fs.clone(),
            home_names,
            src_names: names(&config.src),
            dst,
            phase: Mutex::new(Phase::Preparing),
            rate: Mutex::new(Rate::default()),
            config: config.clone(),
        })
    }

    /// Tells where the main loop is.
    pub(crate) fn set_phase(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    /// Where the main loop is.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.lock()
    }

    /// Takes a sample for the rate; called about once a second.
    pub(crate) fn tick(&self) {
        self.rate
            .lock()
            .sample(Instant::now(), self.progress.bytes_pulled.get());
    }

    /// The report of this moment.
    pub(crate) fn report(&self) -> Report {
        let counts = Counts::of(&self.progress, self.rate.lock().bytes_per_s());
        let state = self.state(&counts);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let free = host::fs_stat(self.dst.as_fd()).ok();
        Report {
            state,
            usable: !matches!(state, State::Preparing | State::Finished | State::Stopped),
            mountpoint: text(&self.config.mountpoint),
            src: text(&self.config.src),
            dst: text(&self.config.dst),
            src_fs: self.src_fs.clone(),
            dst_fs: self.dst_fs.clone(),
            home_names: self.home_names.clone(),
            src_names: self.src_names.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since_unix: self
                .since
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            background: self.background().to_owned(),
            action: self.action(state, &counts),
            counts,
            dst_free: free.map(|s| s.bavail.saturating_mul(s.frsize)),
        }
    }

    fn state(&self, counts: &Counts) -> State {
        let is = |flag: &std::sync::atomic::AtomicBool| flag.load(Relaxed);
        match *self.phase.lock() {
            Phase::Preparing => State::Preparing,
            Phase::Finished => State::Finished,
            Phase::Stopping => State::Stopped,
            Phase::Serving if is(&self.progress.complete) && counts.errors == 0 => State::Complete,
            Phase::Serving if is(&self.progress.complete) => State::Degraded,
            Phase::Serving if is(&self.progress.dst_full) => State::Degraded,
            Phase::Serving if is(&self.progress.stuck) => State::Degraded,
            Phase::Serving if is(&self.progress.paused) => State::Paused,
            Phase::Serving if counts.walk_done => State::Migrating,
            Phase::Serving => State::Walking,
        }
    }

    fn background(&self) -> &'static str {
        if self.progress.complete.load(Relaxed) {
            "done"
        } else if !self.config.background {
            "off"
        } else if self.progress.dst_full.load(Relaxed) {
            "waits for room in dst"
        } else if self.progress.paused.load(Relaxed) {
            "paused"
        } else {
            "running"
        }
    }

    fn action(&self, state: State, counts: &Counts) -> String {
        let mountpoint = Printable(self.config.mountpoint.as_os_str());
        match state {
            State::Complete if self.config.finish => "none; it finishes by itself".into(),
            State::Complete => format!("mirrorfs finish {mountpoint}"),
            State::Degraded if self.progress.dst_full.load(Relaxed) => {
                "make room in dst; reading goes on, from src".into()
            }
            State::Degraded => format!(
                "{} entries could not be pulled: mirrorfs errors {mountpoint}; mend and mount \
                 again, or mirrorfs finish --accept-loss {mountpoint}",
                count(counts.errors)
            ),
            State::Paused => "none; only what is opened is copied".into(),
            State::Walking | State::Migrating => {
                format!("none; when this says COMPLETE: mirrorfs finish {mountpoint}")
            }
            State::Finished => "none; waits for the last open file".into(),
            State::Stopped => "none; waits for the last open file, then mount resumes".into(),
            State::Preparing => "none".into(),
        }
    }
}

/// How a client may spell a path: as the user did, and as it resolved before the mount.
fn names(path: &Path) -> Vec<String> {
    let spelled = [lexical(path), std::fs::canonicalize(path).ok()];
    let mut names: Vec<String> = spelled
        .into_iter()
        .flatten()
        .map(|p| Printable(p.as_os_str()).to_string())
        .collect();
    names.dedup();
    names
}

/// `mirrorfs status`.
pub(crate) fn run(path: Option<&Path>, json: bool) -> Outcome {
    let Some(path) = path else {
        let reports: Vec<Report> = control::daemons().into_iter().map(|d| d.report).collect();
        if json {
            print_json(&reports)?;
        } else if reports.is_empty() {
            out::say("no migration is running");
        }
        for (i, report) in reports.iter().enumerate().filter(|_| !json) {
            if i > 0 {
                out::say("");
            }
            report.page().iter().for_each(|line| out::say(line));
        }
        return Ok(exit::DONE);
    };
    match control::find(path)? {
        Some(daemon) if json => print_json(&daemon.report)?,
        Some(daemon) => daemon.report.page().iter().for_each(|line| out::say(line)),
        None => stopped(path, json)?,
    }
    Ok(exit::DONE)
}

/// No daemon: the marks in dst tell what is left.
fn stopped(dst: &Path, json: bool) -> Result<(), Failure> {
    preflight::migration(dst)?;
    let survey = crate::mirror::survey(dst)?;
    let dst: PathBuf = lexical(dst).unwrap_or_else(|| dst.to_path_buf());
    let src = survey.identity_src.as_deref().map(Path::to_string_lossy);
    let done = survey.pending_files == 0 && survey.pending_dirs == 0 && survey.ledger == 0;
    let action = match (&src, done) {
        (_, true) => format!("mirrorfs finish {}", Printable(dst.as_os_str())),
        (Some(src), _) => format!("mirrorfs mount {src} {}", Printable(dst.as_os_str())),
        (None, _) => "mirrorfs mount SRC DST, as before".to_owned(),
    };
    if json {
        return print_json(&serde_json::json!({
            "state": State::Stopped,
            "usable": false,
            "src": src,
            "dst": dst.to_string_lossy(),
            "pending_files": survey.pending_files,
            "pending_dirs": survey.pending_dirs,
            "bytes_left": survey.bytes_left,
            "errors": survey.ledger,
            "action": action,
        }));
    }
    let src = src.unwrap_or("?".into());
    out::say(&format!(
        "{}  from {src}   {}",
        dst.display(),
        State::Stopped.name()
    ));
    out::say(&format!(
        "pending {} files, {} directories, {} known to be left",
        count(survey.pending_files),
        count(survey.pending_dirs),
        bytes(survey.bytes_left)
    ));
    out::say(&format!("errors  {}", count(survey.ledger)));
    out::say(&format!("action  {action}"));
    Ok(())
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(exit::FAILURE, format!("json: {e}")))?;
    out::say(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::preflight::Dead;
    use super::*;
    use crate::mirror::Trees;

    fn live() -> Live {
        let config = MountConfig::new("/usr", "/tmp");
        let ground = Ground {
            trees: Trees::open(&config.src, &config.dst).expect("opens"),
            config,
            src_fs: "ext4".to_owned(),
            dst_fs: "xfs".to_owned(),
            dead: Dead::default(),
        };
        Live::new(&ground, Arc::new(Progress::default())).expect("opens")
    }

    #[test]
    fn the_state_says_what_the_user_should_do() {
        let live = live();
        let state = |live: &Live| live.report().state;
        assert_eq!(state(&live), State::Preparing);
        live.set_phase(Phase::Serving);
        assert_eq!(state(&live), State::Walking);
        live.progress.walk_done.store(true, Relaxed);
        assert_eq!(state(&live), State::Migrating);
        live.progress.dst_full.store(true, Relaxed);
        assert_eq!(state(&live), State::Degraded);
        live.progress.complete.store(true, Relaxed);
        assert_eq!(state(&live), State::Complete);
        assert_eq!(live.report().action, "mirrorfs finish /tmp");
        live.progress.errors.set(1);
        assert_eq!(state(&live), State::Degraded);
    }

    #[test]
    fn a_report_survives_json() {
        let report = live().report();
        let text = serde_json::to_string(&report).expect("serializes");
        assert!(text.contains("\"state\":\"PREPARING\""), "{text}");
        let back: Report = serde_json::from_str(&text).expect("parses");
        assert_eq!(back, report);
    }
}
