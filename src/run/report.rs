//! Report: what is known about a migration at one moment, as a page, as one line and as JSON.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::counts::Counts;
use super::out::{bytes, count, duration};
use crate::error::Printable;

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
    /// All of them.
    pub(super) const ALL: [State; 8] = [
        State::Preparing,
        State::Walking,
        State::Migrating,
        State::Paused,
        State::Degraded,
        State::Complete,
        State::Finished,
        State::Stopped,
    ];

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

/// All that a status page says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The state.
    pub state: State,
    /// What goes on while the state says DEGRADED: WALKING, MIGRATING or PAUSED. Null in another state,
    /// and when nothing goes on.
    #[serde(default)]
    pub meanwhile: Option<State>,
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
    /// The background's limit, bytes per second.
    pub bwlimit: Option<u64>,
    /// The limit is not applied for now (SIGUSR2).
    pub bwlimit_lifted: bool,
    /// Threads of each kind that the background may use.
    pub jobs: Option<u64>,
    /// The counters.
    #[serde(flatten)]
    pub counts: Counts,
    /// Whole passes changed nothing: what is left needs somebody.
    pub stuck: bool,
    /// What src's root answered when it was found to be away; null while it is there.
    #[serde(default)]
    pub src_away: Option<String>,
    /// When that was.
    #[serde(default)]
    pub src_away_since_unix: Option<u64>,
    /// What dst said when it took nothing more; null while it does.
    #[serde(default)]
    pub dst_full: Option<String>,
    /// Bytes of SRC that were read for the manifest, after the end; null before that.
    #[serde(default)]
    pub manifest_read: Option<u64>,
    /// Bytes of the files that are to be read for it, as far as they were met.
    #[serde(default)]
    pub manifest_found: Option<u64>,
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
        let about = c.about();
        let mut data = format!(
            "data    {} pulled / {about}{}{}",
            bytes(c.bytes_pulled),
            bytes(c.bytes_total),
            c.share(c.bytes_pulled, c.bytes_total),
        );
        if c.bytes_per_s > 0 {
            data += &format!("  {}/s", bytes(c.bytes_per_s));
        }
        if let Some(eta) = c.eta() {
            data += &format!("  {eta}");
        }
        let mut page = vec![
            format!(
                "{}  {} ({}) -> {} ({})   {}{usable}",
                self.mountpoint,
                self.src,
                self.src_fs,
                self.dst,
                self.dst_fs,
                self.state_text()
            ),
            format!(
                "since {} ({})  pid {}  background {}",
                humantime::format_rfc3339_seconds(since),
                duration(age),
                self.pid,
                self.background_text()
            ),
            format!(
                "entries {} placed / {about}{}{}",
                count(c.entries_placed),
                count(c.entries_total),
                c.share(c.entries_placed, c.entries_total),
            ),
            format!(
                "files   {} pulled / {}{} seen",
                count(c.files_pulled),
                if c.walk_done { "" } else { "~" },
                count(c.files_seen),
            ),
            data,
            format!(
                "on access {} files, {}; waiting {}",
                count(c.demand_files),
                bytes(c.demand_bytes),
                c.waits()
            ),
        ];
        if c.prefetched_files > 0 {
            page.push(format!(
                "ahead   {} files, {} of them opened since",
                count(c.prefetched_files),
                count(c.prefetch_hits.min(c.prefetched_files)),
            ));
        }
        if let Some(free) = self.dst_free {
            let needed = c.bytes_left.max(c.bytes_total - c.bytes_pulled);
            page.push(format!(
                "dst free {}, needed {about}{}",
                bytes(free),
                bytes(if c.walk_done { c.bytes_left } else { needed }),
            ));
        }
        if c.extras_kept > 0 {
            page.push(format!(
                "extra   {} names that only DST has, kept   list: mirrorfs errors {}",
                count(c.extras_kept),
                self.mountpoint
            ));
        }
        if c.extras_removed > 0 {
            page.push(format!(
                "extra   {} names that only DST had, removed",
                count(c.extras_removed),
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
        if let Some(manifest) = self.manifest() {
            page.push(format!("manifest {manifest} read"));
        }
        page.push(format!("action  {}", self.action));
        page
    }

    /// `running, limit 200.0 MiB/s, 2 jobs`.
    fn background_text(&self) -> String {
        let mut text = self.background.clone();
        if let Some(rate) = self.bwlimit {
            text += &format!(", limit {}/s", bytes(rate));
            if self.bwlimit_lifted {
                text += " (lifted)";
            }
        }
        if let Some(jobs) = self.jobs {
            text += &format!(", {jobs} jobs");
        }
        text
    }

    /// For scripts: tab-separated, numbers exact, fields only ever added at the end.
    pub(super) fn script_line(&self) -> String {
        let c = &self.counts;
        let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        [
            escaped(&self.mountpoint),
            escaped(&self.src),
            escaped(&self.dst),
            self.state.name().to_owned(),
            c.entries_placed.to_string(),
            c.entries_total.to_string(),
            c.files_pulled.to_string(),
            c.files_seen.to_string(),
            c.bytes_pulled.to_string(),
            c.bytes_total.to_string(),
            u8::from(c.walk_done).to_string(),
            c.bytes_per_s.to_string(),
            number(c.eta_s),
            c.waiting.to_string(),
            number(c.longest_wait_ms),
            c.errors.to_string(),
        ]
        .join("\t")
    }

    /// The state as people read it, with what goes on beside it: `DEGRADED (WALKING)`.
    pub(crate) fn state_text(&self) -> String {
        let state = self.state.name();
        match self.meanwhile {
            Some(meanwhile) => format!("{state} ({})", meanwhile.name()),
            None => state.to_owned(),
        }
    }

    /// One line for a log or a pipe.
    pub(crate) fn line(&self) -> String {
        match self.manifest() {
            Some(manifest) => format!("{}  manifest {manifest} read", self.state_text()),
            None => format!("{}  {}", self.state_text(), self.counts.line()),
        }
    }

    /// `1.0 MiB of ~3.0 MiB`.
    fn manifest(&self) -> Option<String> {
        let (read, found) = (self.manifest_read?, self.manifest_found?);
        Some(format!("{} of ~{}", bytes(read), bytes(found)))
    }
}

/// A path that is one field whatever is in it.
fn escaped(path: &str) -> String {
    Printable(path.as_ref()).to_string()
}
