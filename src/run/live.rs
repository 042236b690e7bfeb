//! Live: progress in front of the user: bars on a terminal, a line every ten seconds elsewhere.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::counts::Counts;

/// How often a line is written where no bar can be drawn.
pub(super) const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is on the screen.
pub(super) struct Screen {
    bars: MultiProgress,
    files: ProgressBar,
    data: ProgressBar,
    last_line: Option<Instant>,
}

impl Screen {
    /// An empty screen: standard error.
    pub(super) fn new() -> Screen {
        let bars = MultiProgress::new();
        let style = |template: &str| {
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
        };
        let files = ProgressBar::new(0).with_style(style(
            "files {wide_bar} {human_pos} / {prefix}{human_len}{msg}",
        ));
        let data = ProgressBar::new(0).with_style(style(
            "data  {wide_bar} {binary_bytes} / {prefix}{binary_total_bytes}{msg}",
        ));
        Screen {
            files: bars.add(files),
            data: bars.add(data),
            bars,
            last_line: None,
        }
    }

    /// For the log, so that its lines go above the bars.
    pub(super) fn bars(&self) -> MultiProgress {
        self.bars.clone()
    }

    /// Shows the counters; called a few times a second.
    pub(super) fn show(&mut self, state: &str, counts: &Counts) {
        if self.bars.is_hidden() {
            if self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY) {
                self.line(state, counts);
            }
            return;
        }
        let about = counts.about();
        let files_about = if counts.walk_done { "" } else { "~" };
        self.files.set_length(counts.files_seen);
        self.files.set_position(counts.files_pulled);
        self.files.set_prefix(files_about);
        let mut files = format!("  {state}");
        if counts.waiting > 0 {
            files += &format!("  waiting {}", counts.waits());
        }
        self.files
            .set_message(format!("{files}  errors {}", counts.errors));
        self.data.set_length(counts.bytes_total);
        self.data.set_position(counts.bytes_pulled);
        self.data.set_prefix(about);
        let rate = super::out::bytes(counts.bytes_per_s);
        let eta = counts
            .eta()
            .map_or_else(String::new, |eta| format!("  {eta}"));
        self.data.set_message(format!("  {rate}/s{eta}"));
    }

    /// One line now.
    pub(super) fn line(&mut self, state: &str, counts: &Counts) {
        self.last_line = Some(Instant::now());
        let text = format!("{state}  {}", counts.line());
        let written = self.bars.suspend(|| writeln!(std::io::stderr(), "{text}"));
        let _ = written; // Progress that nobody can see is no failure.
    }

    /// Takes the bars away and leaves one line.
    pub(super) fn close(&mut self, state: &str, counts: &Counts) {
        self.files.finish_and_clear();
        self.data.finish_and_clear();
        self.line(state, counts);
    }
}

/// When something is due again.
pub(super) struct Every(Duration, Instant);

impl Every {
    pub(super) fn new(time: Duration) -> Every {
        Every(time, Instant::now())
    }

    pub(super) fn is_due(&mut self) -> bool {
        let due = self.1.elapsed() >= self.0;
        if due {
            self.1 = Instant::now();
        }
        due
    }
}
