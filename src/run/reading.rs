//! Reading: how far a manifest is, while a tree is read for it: a bar on a terminal, a line every ten seconds
//! elsewhere.

use std::io::Write;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use indicatif::{ProgressBar, ProgressStyle};

use super::live::{Every, LINE_EVERY};
use super::out::bytes;
use crate::verify::Reading;

/// How often the bar moves.
const FRAME: Duration = Duration::from_millis(200);

/// Does the work, and shows how far it is. `lines`: where lines go, and no bar; else to standard error.
pub(super) fn shown<T>(reading: &Reading, lines: Option<fn(&str)>, work: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (over, ended) = bounded::<()>(0);
        let show = move || {
            let mut screen = Screen::new(lines);
            while ended.recv_timeout(FRAME) == Err(RecvTimeoutError::Timeout) {
                screen.show(reading);
            }
            screen.bar.finish_and_clear();
        };
        let shower = std::thread::Builder::new().name("progress".into());
        // Nobody is shown anything then.
        let _ = shower.spawn_scoped(scope, show); // As said.
        let done = work();
        drop(over);
        done
    })
}

struct Screen {
    bar: ProgressBar,
    lines: Option<fn(&str)>,
    due: Every,
}

impl Screen {
    fn new(lines: Option<fn(&str)>) -> Screen {
        let bar = match lines {
            Some(_) => ProgressBar::hidden(),
            None => ProgressBar::new(0),
        };
        // New files are met until the end, nearly.
        let style =
            "read {wide_bar} {binary_bytes} / ~{binary_total_bytes}  {binary_bytes_per_sec}";
        let style = ProgressStyle::with_template(style);
        Screen {
            bar: bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())),
            lines,
            due: Every::new(LINE_EVERY),
        }
    }

    fn show(&mut self, reading: &Reading) {
        let (read, found) = reading.now();
        if !self.bar.is_hidden() {
            self.bar.set_length(found);
            return self.bar.set_position(read);
        }
        if self.due.is_due() {
            let line = format!("manifest: {} of ~{} read", bytes(read), bytes(found));
            match self.lines {
                Some(say) => say(&line),
                None => {
                    let written = writeln!(std::io::stderr(), "{line}");
                    let _ = written; // Progress that nobody can see is no failure.
                }
            }
        }
    }
}
