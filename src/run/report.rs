//! Report: what is known about a migration at one moment, as a page, as one line and as JSON.
//!
//! Only what is known is said: a total that still grows is written with a `+`.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::out::{bytes, count, duration, percent};
use crate::progress::Progress;

/// The states of DESIGN section 9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Not usable yet.
    Preparing,
    /// Usable; totals still grow.
    Walking,
    /// Usable; totals are known.
    Migrating,
    /// Usable; only what is opened is copied.
    Paused,
    /// Usable; something needs you.
    Degraded,
    /// Nothing is pending.
    Complete,
    /// Finished; waits for the last open file.
    Finished,
    /// No daemon; can be resumed.
    Stopped,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            State::Preparing => "PREPARING",
            State::Walking => "WALKING",
            State::Migrating => "MIGRATING",
            State::Paused => "PAUSED",
            State::Degraded => "DEGRADED",
            State::Complete => "COMPLETE",
            State::Finished => "FINISHED",
            State::Stopped => "STOPPED",
        }
    }
}

/// The counters, at one moment. They start at 0 with each daemon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Entries that have their name and metadata in dst.
    pub entries_placed: u64,
    /// Entries seen in src.
    pub entries_seen: u64,
    /// Files complete and durable in dst.
    pub files_pulled: u64,
    /// Files seen in src.
    pub files_seen: u64,
    /// Bytes complete and durable in dst.
    pub bytes_pulled: u64,
    /// Bytes seen in src.
    pub bytes_seen: u64,
    /// Bytes known to be left.
    pub bytes_left: u64,
    /// Files pulled because somebody waited.
    pub demand_files: u64,
    /// Bytes pulled because somebody waited.
    pub demand_bytes: u64,
    /// Accesses that wait for src now.
    pub waiting: u64,
    /// Entries in the ledger.
    pub errors: u64,
    /// Every directory was seen: the totals are final.
    pub walk_done: bool,
    /// Bytes per second, over the last half minute.
    pub bytes_per_s: u64,
}

impl Counts {
    /// The counters now.
    pub fn of(progress: &Progress, bytes_per_s: u64) -> Counts {
        Counts {
            entries_placed: progress.entries_placed.get(),
            entries_seen: progress.entries_seen.get(),
            files_pulled: progress.files_pulled.get(),
            files_seen: progress.files_seen.get(),
            bytes_pulled: progress.bytes_pulled.get(),
            bytes_seen: progress.bytes_seen.get(),
            bytes_left: progress.bytes_left.get(),
            demand_files: progress.demand_files.get(),
            demand_bytes: progress.demand_bytes.get(),
            waiting: progress.waiting.get(),
            errors: progress.errors.get(),
            walk_done: progress.walk_done.load(Relaxed),
            bytes_per_s,
        }
    }

    /// A `+` while the total can still grow.
    fn more(&self) -> &'static str {
        if self.walk_done { "" } else { "+" }
    }

    /// Time for what is known to be left; `None` while nothing moves.
    fn eta(&self) -> Option<Duration> {
        (self.bytes_per_s > 0 && self.bytes_left > 0)
            .then(|| Duration::from_secs(self.bytes_left / self.bytes_per_s))
    }

    /// One line for a log or a pipe.
    pub(crate) fn line(&self) -> String {
        let more = self.more();
        let mut line = format!(
            "entries {} / {}{more}  files {} / {}{more}  data {} / {}{more}  {}/s",
            count(self.entries_placed),
            count(self.entries_seen),
            count(self.files_pulled),
            count(self.files_seen),
            bytes(self.bytes_pulled),
            bytes(self.bytes_seen),
            bytes(self.bytes_per_s),
        );
        if let Some(eta) = self.eta() {
            line += &format!("  ETA {}{more}", duration(eta));
        }
        line + &format!("  errors {}", count(self.errors))
    }
}

/// All that a status page says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The state.
    pub state: State,
    /// Programs can work in the mount.
    pub usable: bool,
    /// Where the tree is seen.
    pub mountpoint: String,
    /// The tree copied from.
    pub src: String,
    /// The tree copied into.
    pub dst: String,
    /// File system types.
    pub src_fs: String,
    /// Likewise.
    pub dst_fs: String,
    /// All names of mount point and dst, unambiguous text: how a client finds its daemon.
    pub home_names: Vec<String>,
    /// All names of src.
    pub src_names: Vec<String>,
    /// The daemon.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// When it started.
    pub since_unix: u64,
    /// What the background does: running, off, paused, waits for room, done.
    pub background: String,
    /// The counters.
    #[serde(flatten)]
    pub counts: Counts,
    /// Free in dst, bytes.
    pub dst_free: Option<u64>,
    /// What you should do.
    pub action: String,
}

impl Report {
    /// The page.
    pub(super) fn page(&self) -> Vec<String> {
        let c = &self.counts;
        let usable = if self.usable { ", usable" } else { "" };
        let since = UNIX_EPOCH + Duration::from_secs(self.since_unix);
        let age = SystemTime::now().duration_since(since).unwrap_or_default();
        let total = |part, whole| match c.walk_done {
            true => percent(part, whole),
            false => "(not all directories were seen yet)".to_owned(),
        };
        let mut data = format!(
            "data    {} pulled / {}{}  {}",
            bytes(c.bytes_pulled),
            bytes(c.bytes_seen),
            c.more(),
            total(c.bytes_pulled, c.bytes_seen),
        );
        if c.bytes_per_s > 0 {
            data += &format!("  {}/s", bytes(c.bytes_per_s));
        }
        if let Some(eta) = c.eta() {
            data += &format!("  ETA {}{}", duration(eta), c.more());
        }
        let mut page = vec![
            format!(
                "{}  {} ({}) -> {} ({})   {}{usable}",
                self.mountpoint,
                self.src,
                self.src_fs,
                self.dst,
                self.dst_fs,
                self.state.name()
            ),
            format!(
                "since {} ({})  pid {}  background {}",
                humantime::format_rfc3339_seconds(since),
                duration(age),
                self.pid,
                self.background
            ),
            format!(
                "entries {} placed / {}{}  {}",
                count(c.entries_placed),
                count(c.entries_seen),
                c.more(),
                total(c.entries_placed, c.entries_seen),
            ),
            format!(
                "files   {} pulled / {}{}  {}",
                count(c.files_pulled),
                count(c.files_seen),
                c.more(),
                total(c.files_pulled, c.files_seen),
            ),
            data,
            format!(
                "on access {} files, {}; waiting {}",
                count(c.demand_files),
                bytes(c.demand_bytes),
                count(c.waiting)
            ),
        ];
        if let Some(free) = self.dst_free {
            page.push(format!(
                "dst free {}, needed {}{}",
                bytes(free),
                bytes(c.bytes_left),
                c.more()
            ));
        }
        page.push(match c.errors {
            0 => "errors  0".to_owned(),
            n => format!(
                "errors  {}   list: mirrorfs errors {}",
                count(n),
                self.mountpoint
            ),
        });
        page.push(format!("action  {}", self.action));
        page
    }

    /// The state as it is printed.
    pub(crate) fn state_name(&self) -> &'static str {
        self.state.name()
    }

    /// One line for a log or a pipe.
    pub(crate) fn line(&self) -> String {
        format!("{}  {}", self.state.name(), self.counts.line())
    }
}

/// Bytes per second over the last half minute.
#[derive(Debug, Default)]
pub(crate) struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    /// Adds a sample.
    pub(crate) fn sample(&mut self, now: Instant, bytes: u64) {
        self.0.push_back((now, bytes));
        while self.0.len() > 2
            && self
                .0
                .front()
                .is_some_and(|(t, _)| now.duration_since(*t).as_secs() > 30)
        {
            self.0.pop_front();
        }
    }

    /// The rate; 0 until there are two samples.
    pub(crate) fn bytes_per_s(&self) -> u64 {
        let (Some((t0, b0)), Some((t1, b1))) = (self.0.front(), self.0.back()) else {
            return 0;
        };
        let s = t1.duration_since(*t0).as_secs_f64();
        if s < 0.1 {
            0
        } else {
            (b1.saturating_sub(*b0) as f64 / s) as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_that_can_grow_is_marked() {
        let mut counts = Counts {
            bytes_left: 1 << 30,
            bytes_per_s: 1 << 20,
            ..Counts::default()
        };
        assert!(counts.line().contains("/ 0+"), "{}", counts.line());
        counts.walk_done = true;
        assert!(counts.line().contains("ETA 17 m 4 s"), "{}", counts.line());
    }
}
