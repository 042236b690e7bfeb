//! Watch: what the daemon knows of itself. It makes a report whenever somebody asks, and keeps the
//! rate and the past.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::client::lexical;
use super::counts::{Counts, Estimate};
use super::out::{count, quoted};
use super::preflight::Ground;
use super::rate::{History, Point, Rate, unix_now};
use super::report::{Report, State};
use super::{Failure, exit};
use crate::config::{MountConfig, OnError};
use crate::error::Printable;
use crate::mirror::{LedgerEntry, Mirror};
use crate::progress::Progress;
use crate::sys::{host, local};
use crate::throttle::{Background, Throttle};
use crate::verify::Reading;

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
pub(crate) struct Watch {
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
    history: Mutex<History>,
    estimate: Option<Estimate>,
    /// The mirror's, once it is there.
    mirror: OnceLock<Arc<Mirror>>,
    /// How far the end of the manifest is, from when it has begun.
    reading: OnceLock<Arc<Reading>>,
}

/// What a daemon knew before it was another program.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Before {
    since_unix: u64,
    pub(crate) src_fs: String,
    pub(crate) dst_fs: String,
    home_names: Vec<String>,
    src_names: Vec<String>,
    estimate: Option<Estimate>,
}

impl Watch {
    /// Before the mount is attached: later these paths lead into ourselves.
    pub(crate) fn new(ground: &Ground, progress: Arc<Progress>) -> Result<Watch, Failure> {
        let config = &ground.config;
        let dst = host::dup(ground.trees.dst.as_fd()).map_err(|e| {
            let line = format!("{}: dup: {e}", quoted(&config.dst));
            Failure::new(exit::UNUSABLE, line)
        })?;
        // The daemon may not walk to an automount point: `Over::Directory`.
        let point = ground.point.as_ref().map(|p| p.path.clone());
        let mut home_names = both(lexical(&config.mountpoint), point);
        home_names.extend(names(&config.dst));
        Ok(Watch {
            progress,
            since: SystemTime::now(),
            src_fs: ground.src_fs.clone(),
            dst_fs: ground.dst_fs.clone(),
            home_names,
            src_names: names(&config.src),
            dst,
            phase: Mutex::new(Phase::Preparing),
            rate: Mutex::default(),
            history: Mutex::default(),
            estimate: estimate(ground),
            mirror: OnceLock::new(),
            reading: OnceLock::new(),
            config: config.clone(),
        })
    }

    /// Of a mount that the program before us has served: its paths lead into ourselves, and wait.
    pub(crate) fn again(
        ground: &Ground,
        progress: Arc<Progress>,
        before: &Before,
    ) -> Result<Watch, Failure> {
        let dst = host::dup(ground.trees.dst.as_fd())
            .map_err(|e| Failure::new(exit::UNUSABLE, format!("dup: {e}")))?;
        Ok(Watch {
            progress,
            since: UNIX_EPOCH + Duration::from_secs(before.since_unix),
            src_fs: ground.src_fs.clone(),
            dst_fs: ground.dst_fs.clone(),
            home_names: before.home_names.clone(),
            src_names: before.src_names.clone(),
            dst,
            phase: Mutex::new(Phase::Preparing),
            rate: Mutex::default(),
            history: Mutex::default(),
            estimate: before.estimate,
            mirror: OnceLock::new(),
            reading: OnceLock::new(),
            config: ground.config.clone(),
        })
    }

    /// What the next program has to be told.
    pub(crate) fn before(&self) -> Before {
        let report = self.report();
        Before {
            since_unix: report.since_unix,
            src_fs: report.src_fs,
            dst_fs: report.dst_fs,
            home_names: report.home_names,
            src_names: report.src_names,
            estimate: self.estimate,
        }
    }

    /// Tells where the main loop is.
    pub(crate) fn set_phase(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    /// Where the main loop is.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.lock()
    }

    /// The mirror whose background is told of. Once.
    pub(crate) fn set_mirror(&self, mirror: Arc<Mirror>) {
        let _ = self.mirror.set(mirror); // There is one.
    }

    /// SRC is read for the manifest from now on. Once.
    pub(crate) fn set_reading(&self, reading: Arc<Reading>) {
        let _ = self.reading.set(reading); // It ends once.
    }

    fn throttle(&self) -> Option<&Throttle> {
        self.mirror.get().map(|m| m.throttle())
    }

    /// Takes a sample for the rate and the history; called about once a second.
    pub(crate) fn tick(&self) {
        let pulled = self.progress.bytes_pulled.get();
        self.rate.lock().sample(Instant::now(), pulled);
        self.history.lock().sample(unix_now(), |time_unix| Point {
            time_unix,
            bytes_pulled: self.progress.earlier[2].get() + pulled,
            files_pulled: self.progress.earlier[1].get() + self.progress.files_pulled.get(),
            waiting: self.progress.waits.len() as u64,
        });
    }

    /// The past, the oldest point first.
    pub(crate) fn history(&self) -> Vec<Point> {
        self.history.lock().points().to_vec()
    }

    /// What the counters are made of.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What could not be pulled.
    pub(crate) fn ledger(&self) -> Vec<LedgerEntry> {
        self.mirror
            .get()
            .map(|m| m.ledger_entries())
            .unwrap_or_default()
    }

    /// The report of this moment.
    pub(crate) fn report(&self) -> Report {
        let mut counts = Counts::of(&self.progress, &self.rate.lock(), self.estimate);
        let state = self.state(&counts);
        // What does not move has no end in sight.
        if !matches!(state, State::Walking | State::Migrating) {
            counts.eta_s = None;
        }
        let throttle = self.throttle();
        let jobs = throttle.map(|t| t.jobs()).filter(|n| *n != usize::MAX);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let away = self.progress.src_away.lock().clone();
        let free = host::fs_stat(self.dst.as_fd()).ok();
        let reading = self.reading.get().map(|r| r.now());
        Report {
            state,
            meanwhile: self.meanwhile(state, &counts),
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
            bwlimit: throttle.and_then(|t| t.limit()),
            bwlimit_lifted: throttle.is_some_and(|t| t.is_lifted()),
            jobs: jobs.map(|n| n as u64),
            action: self.action(state, &counts),
            counts,
            stuck: self.progress.stuck.load(Relaxed),
            src_away: away.as_ref().map(|a| a.why.clone()),
            src_away_since_unix: away.map(|a| {
                let since = a.since_wall.duration_since(UNIX_EPOCH);
                since.unwrap_or_default().as_secs()
            }),
            dst_full: self.dst_says(),
            manifest_read: reading.map(|r| r.0),
            manifest_found: reading.map(|r| r.1),
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
            Phase::Serving if is(&self.progress.src_is_away) => State::Degraded,
            Phase::Serving if is(&self.progress.complete) => State::Degraded,
            Phase::Serving if is(&self.progress.dst_full) => State::Degraded,
            Phase::Serving if is(&self.progress.stuck) => State::Degraded,
            Phase::Serving => self.background_state(counts),
        }
    }

    /// How far the background is, whether it needs somebody or not.
    fn background_state(&self, counts: &Counts) -> State {
        if self.pulls() != Background::Running {
            State::Paused
        } else if counts.walk_done {
            State::Migrating
        } else {
            State::Walking
        }
    }

    /// What goes on in a state that does not say it.
    fn meanwhile(&self, state: State, counts: &Counts) -> Option<State> {
        let over = self.progress.complete.load(Relaxed) || self.progress.stuck.load(Relaxed);
        (state == State::Degraded && !over).then(|| self.background_state(counts))
    }

    /// Why dst takes nothing, while that is so.
    fn dst_says(&self) -> Option<String> {
        let full = self.progress.dst_full.load(Relaxed);
        full.then(|| self.progress.dst_says.lock().clone())
            .flatten()
    }

    fn background(&self) -> &'static str {
        if self.progress.complete.load(Relaxed) {
            "done"
        } else if self.pulls() == Background::Off {
            "off"
        } else if self.pulls() == Background::Paused {
            "paused"
        } else if self.progress.src_is_away.load(Relaxed) {
            "waits for src"
        } else if self.progress.dst_full.load(Relaxed) {
            "waits for room in dst"
        } else {
            "running"
        }
    }

    fn pulls(&self) -> Background {
        self.throttle()
            .map_or(Background::Running, |t| t.background())
    }

    fn action(&self, state: State, counts: &Counts) -> String {
        let mountpoint = Printable(self.config.mountpoint.as_os_str());
        match state {
            State::Complete if self.config.finish => "none; it finishes by itself".into(),
            State::Complete => format!("mirrorfs finish {mountpoint}"),
            State::Degraded
                if self.progress.src_is_away.load(Relaxed)
                    && !self.progress.complete.load(Relaxed) =>
            {
                let what = match self.config.on_error {
                    OnError::Wait => "who needs it waits",
                    OnError::Fail => "who needs it gets EIO",
                };
                format!("bring src back; {what}, and the background goes on by itself")
            }
            State::Degraded if self.progress.dst_full.load(Relaxed) => {
                let why = self.dst_says().unwrap_or_default();
                format!(
                    "make room in dst, or raise the quota, or make it writable ({why}); reading goes on, from src"
                )
            }
            State::Degraded => format!(
                "{} entries could not be pulled: mirrorfs errors {mountpoint}; mend and mount \
                 again, or mirrorfs finish --accept-loss {mountpoint}",
                count(counts.errors)
            ),
            State::Paused => {
                format!("none; only what is opened is copied (mirrorfs resume {mountpoint})")
            }
            State::Walking | State::Migrating => {
                format!("none; when this says COMPLETE: mirrorfs finish {mountpoint}")
            }
            State::Finished if self.reading.get().is_some() => {
                "none; reads SRC for the manifest".into()
            }
            State::Finished => "none; waits for the last open file".into(),
            State::Stopped => "none; waits for the last open file, then mount resumes".into(),
            State::Preparing => "none".into(),
        }
    }
}

/// What is in SRC, when SRC is the whole of a file system that counts its inodes.
fn estimate(ground: &Ground) -> Option<Estimate> {
    const COUNTING: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "f2fs"];
    let src = ground.trees.src.as_fd();
    let whole = local::place(src).ok()??.path == Path::new("/");
    if !whole || !COUNTING.contains(&ground.src_fs.as_str()) {
        return None;
    }
    let stat = host::fs_stat(src).ok()?;
    Some(Estimate {
        entries: stat.files.saturating_sub(stat.ffree),
        bytes: stat
            .blocks
            .saturating_sub(stat.bfree)
            .saturating_mul(stat.frsize),
    })
}

/// How a client may spell a path: as the user did, and as it resolved before the mount.
fn names(path: &Path) -> Vec<String> {
    both(lexical(path), std::fs::canonicalize(path).ok())
}

fn both(spelled: Option<PathBuf>, resolved: Option<PathBuf>) -> Vec<String> {
    let mut names: Vec<String> = [spelled, resolved]
        .into_iter()
        .flatten()
        .map(|p| Printable(p.as_os_str()).to_string())
        .collect();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::super::preflight::Dead;
    use super::*;
    use crate::mirror::Trees;

    fn live() -> Watch {
        let config = MountConfig::new("/usr", "/tmp");
        let ground = Ground {
            trees: Trees::open(&config.src, &config.dst).expect("opens"),
            config,
            src_fs: "ext4".to_owned(),
            dst_fs: "xfs".to_owned(),
            dead: Dead::default(),
            point: None,
        };
        Watch::new(&ground, Arc::new(Progress::default())).expect("opens")
    }

    #[test]
    fn the_state_says_what_the_user_should_do() {
        let live = live();
        let state = |live: &Watch| live.report().state;
        assert_eq!(state(&live), State::Preparing);
        live.set_phase(Phase::Serving);
        assert_eq!(live.report().state_text(), "WALKING");
        live.progress.dst_full.store(true, Relaxed);
        assert_eq!(state(&live), State::Degraded);
        assert_eq!(live.report().state_text(), "DEGRADED (WALKING)");
        live.progress.dst_full.store(false, Relaxed);
        live.progress.walk_done.store(true, Relaxed);
        assert_eq!(state(&live), State::Migrating);
        live.progress.src_is_away.store(true, Relaxed);
        assert_eq!(live.report().meanwhile, Some(State::Migrating));
        live.progress.src_is_away.store(false, Relaxed);
        live.progress.stuck.store(true, Relaxed);
        assert_eq!(live.report().state_text(), "DEGRADED");
        live.progress.stuck.store(false, Relaxed);
        live.progress.complete.store(true, Relaxed);
        assert_eq!(state(&live), State::Complete);
        assert_eq!(live.report().action, "mirrorfs finish /tmp");
        live.progress.errors.set(1);
        assert_eq!(live.report().state_text(), "DEGRADED");
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
