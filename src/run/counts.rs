//! Counts: the counters at one moment, and what may be said about the end.
//!
//! Two counters for each thing: what was seen, and what was pulled. A total is told with a `~` until
//! every directory was seen: it is an estimate where SRC is a whole file system that knows how much
//! is in it, else what was seen so far. What is pulled never runs backwards, and counts when it is
//! durable. A time is told only when there is a total and the rate is that of some seconds.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::out::{bytes, count, duration, percent, seconds};
use super::rate::Rate;
use crate::progress::Progress;

/// Accesses that are told by name.
const WAITS_TOLD: usize = 20;
/// A time that is this far away, seconds, is no forecast.
const ETA_MAX_S: u64 = 365 * 86400;

/// What the totals are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Total {
    /// What was seen so far: more is to come.
    #[default]
    Growing,
    /// What SRC's file system says that is in it.
    Estimate,
    /// Every directory was seen.
    Final,
}

/// What a whole file system says that is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Inodes in use.
    pub entries: u64,
    /// Bytes in use.
    pub bytes: u64,
}

/// An access that waits for src now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The entry of src.
    pub path: String,
    /// For how long, milliseconds.
    pub ms: u64,
}

/// The counters, at one moment. They go on where an earlier daemon of the migration ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Entries that have their name and metadata in dst.
    pub entries_placed: u64,
    /// Entries seen in src.
    pub entries_seen: u64,
    /// Entries that there will be: see `total`.
    pub entries_total: u64,
    /// Files complete and durable in dst.
    pub files_pulled: u64,
    /// Files seen in src.
    pub files_seen: u64,
    /// Bytes complete and durable in dst.
    pub bytes_pulled: u64,
    /// Bytes seen in src.
    pub bytes_seen: u64,
    /// Bytes that there will be: see `total`.
    pub bytes_total: u64,
    /// Bytes known to be left.
    pub bytes_left: u64,
    /// What the totals are.
    pub total: Total,
    /// Files pulled because somebody waited, or by `pull`.
    pub demand_files: u64,
    /// Their bytes.
    pub demand_bytes: u64,
    /// Files pulled because their neighbours were opened, or by `--replay`.
    #[serde(default)]
    pub prefetched_files: u64,
    /// Of those, files that were opened then.
    #[serde(default)]
    pub prefetch_hits: u64,
    /// Accesses that wait for src now.
    pub waiting: u64,
    /// How long the longest of them waits, milliseconds.
    pub longest_wait_ms: Option<u64>,
    /// What 99 of 100 of the last thousand waits did not exceed, milliseconds.
    pub wait_p99_ms: Option<f64>,
    /// Those that wait longest.
    pub waits: Vec<Waiting>,
    /// Names that only dst has, kept.
    #[serde(default)]
    pub extras_kept: u64,
    /// Such names that were removed, by this daemon.
    #[serde(default)]
    pub extras_removed: u64,
    /// Failures in the ledger.
    pub errors: u64,
    /// Every directory was seen: the totals are final.
    pub walk_done: bool,
    /// Bytes per second, over the last half minute.
    pub bytes_per_s: u64,
    /// Seconds until all is pulled; null while nothing can be said.
    pub eta_s: Option<u64>,
}

impl Counts {
    /// The counters now.
    pub fn of(progress: &Progress, rate: &Rate, estimate: Option<Estimate>) -> Counts {
        let [entries, files, data] = progress.earlier.each_ref().map(|c| c.get());
        let dropped = progress.bytes_dropped.get();
        let longest = progress.waits.longest(WAITS_TOLD);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut counts = Counts {
            entries_placed: entries + progress.entries_placed.get(),
            entries_seen: entries + progress.entries_seen.get(),
            files_pulled: files + progress.files_pulled.get(),
            files_seen: files + progress.files_seen.get(),
            bytes_pulled: data + progress.bytes_pulled.get(),
            // What users have made needless is not to come any more.
            bytes_seen: (data + progress.bytes_seen.get()).saturating_sub(dropped),
            bytes_left: progress.bytes_left.get(),
            demand_files: progress.demand_files.get(),
            demand_bytes: progress.demand_bytes.get(),
            prefetched_files: progress.prefetched.get(),
            prefetch_hits: progress.prefetch_hits.get(),
            waiting: progress.waits.len() as u64,
            longest_wait_ms: longest.first().map(|(time, _)| ms(*time)),
            wait_p99_ms: progress.waits.p99().map(|t| t.as_secs_f64() * 1e3),
            extras_kept: progress.extras.get(),
            extras_removed: progress.extras_removed.get(),
            errors: progress.errors.get(),
            walk_done: progress.walk_done.load(Relaxed),
            bytes_per_s: rate.bytes_per_s(),
            ..Counts::default()
        };
        counts.waits = longest
            .into_iter()
            .map(|(time, path)| Waiting {
                path: path.to_string_lossy().into_owned(),
                ms: ms(time),
            })
            .collect();
        // Read one after the other, while others count: a part is never more than the whole.
        counts.entries_seen = counts.entries_seen.max(counts.entries_placed);
        counts.files_seen = counts.files_seen.max(counts.files_pulled);
        counts.bytes_seen = counts.bytes_seen.max(counts.bytes_pulled);
        counts.foresee(rate, estimate);
        counts
    }

    /// Totals and what follows from them.
    fn foresee(&mut self, rate: &Rate, estimate: Option<Estimate>) {
        let seen = (self.entries_seen, self.bytes_seen);
        // A file system that holds less than was seen (sparse files, shared extents) says nothing.
        let usable = |e: &Estimate| e.entries >= seen.0 && e.bytes >= seen.1;
        let (total, whole) = match estimate.filter(usable) {
            _ if self.walk_done => (Total::Final, seen),
            Some(e) => (Total::Estimate, (e.entries, e.bytes)),
            None => (Total::Growing, seen),
        };
        self.total = total;
        (self.entries_total, self.bytes_total) = whole;
        let left = match total {
            Total::Growing => 0,
            Total::Estimate => self.bytes_total - self.bytes_pulled,
            Total::Final => self.bytes_left,
        };
        self.eta_s = rate
            .steady_bytes_per_s()
            .filter(|rate| *rate > 0 && left > 0)
            .map(|rate| left.div_ceil(rate))
            .filter(|s| *s < ETA_MAX_S);
    }

    /// `~` while a total can still change.
    pub(super) fn about(&self) -> &'static str {
        match self.total {
            Total::Final => "",
            Total::Estimate | Total::Growing => "~",
        }
    }

    /// How much of a total is there, if that can be said.
    pub(super) fn share(&self, part: u64, whole: u64) -> String {
        match self.total {
            Total::Final => format!("  {}", percent(part, whole)),
            Total::Estimate => format!("  {}  (estimate: walk not finished)", percent(part, whole)),
            Total::Growing => "  (so far: walk not finished)".to_owned(),
        }
    }

    /// `ETA ~2 h 41 m`, if something can be said.
    pub(super) fn eta(&self) -> Option<String> {
        let time = Duration::from_secs(self.eta_s?);
        Some(format!("ETA ~{}", duration(time)))
    }

    /// `2 (longest 0.4 s), p99 38 ms`.
    pub(super) fn waits(&self) -> String {
        let mut text = count(self.waiting);
        if let Some(ms) = self.longest_wait_ms {
            text += &format!(" (longest {})", seconds(ms as f64));
        }
        if let Some(ms) = self.wait_p99_ms {
            text += &format!(", p99 {}", seconds(ms));
        }
        text
    }

    /// One line for a log or a pipe.
    pub(crate) fn line(&self) -> String {
        let about = self.about();
        let mut line = format!(
            "entries {} / {about}{}  files {} / {about}{}  data {} / {about}{}  {}/s",
            count(self.entries_placed),
            count(self.entries_total),
            count(self.files_pulled),
            count(self.files_seen),
            bytes(self.bytes_pulled),
            bytes(self.bytes_total),
            bytes(self.bytes_per_s),
        );
        if let Some(eta) = self.eta() {
            line += &format!("  {eta}");
        }
        if self.waiting > 0 {
            line += &format!("  waiting {}", self.waits());
        }
        line + &format!("  errors {}", count(self.errors))
    }
}

#[cfg(test)]
mod tests {
    use super::super::rate;
    use super::*;

    fn progress() -> Progress {
        let progress = Progress::default();
        progress.entries_seen.set(10);
        progress.entries_placed.set(10);
        progress.bytes_seen.set(1 << 30);
        progress.bytes_pulled.set(1 << 29);
        progress.bytes_left.set(1 << 29);
        progress
    }

    #[test]
    fn a_total_has_a_tilde_and_no_share_until_every_directory_was_seen() {
        let progress = progress();
        let rate = rate::steady(1 << 20);
        let counts = Counts::of(&progress, &rate, None);
        assert_eq!(counts.total, Total::Growing);
        assert_eq!(counts.eta_s, None, "nobody knows how much is to come");
        assert!(
            counts.line().contains("data 512.0 MiB / ~1.0 GiB"),
            "{}",
            counts.line()
        );
        assert!(!counts.share(1, 2).contains('%'));
        progress.walk_done.store(true, Relaxed);
        let counts = Counts::of(&progress, &rate, None);
        assert_eq!(counts.eta_s, Some(512));
        assert!(counts.line().contains("ETA ~8 m 32 s"), "{}", counts.line());
        assert!(!counts.line().contains("/ ~"), "{}", counts.line());
    }

    #[test]
    fn an_estimate_is_told_as_one_and_dropped_when_more_was_seen() {
        let progress = progress();
        let rate = rate::steady(1 << 20);
        let of = |entries, bytes| Counts::of(&progress, &rate, Some(Estimate { entries, bytes }));
        let counts = of(100, 2 << 30);
        assert_eq!(
            (counts.total, counts.bytes_total),
            (Total::Estimate, 2 << 30)
        );
        assert_eq!(counts.eta_s, Some(1536));
        let share = counts.share(counts.bytes_pulled, counts.bytes_total);
        assert!(
            share.contains("25 %") && share.contains("estimate"),
            "{share}"
        );
        let counts = of(100, 1 << 20);
        assert_eq!(
            (counts.total, counts.bytes_total),
            (Total::Growing, 1 << 30)
        );
    }

    #[test]
    fn what_an_earlier_daemon_pulled_counts_on_both_sides() {
        let progress = progress();
        progress.earlier[2].set(1 << 30);
        let counts = Counts::of(&progress, &Rate::default(), None);
        assert_eq!((counts.bytes_pulled, counts.bytes_seen), (3 << 29, 2 << 30));
    }

    #[test]
    fn no_time_is_told_for_a_rate_of_an_instant() {
        let progress = progress();
        progress.walk_done.store(true, Relaxed);
        assert_eq!(Counts::of(&progress, &Rate::default(), None).eta_s, None);
    }
}
