//! The `sync` command: the copy on a thread of its own, progress and signals here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::live::Screen;
use super::log::Log;
use super::report::{Counts, Rate};
use super::{Failure, Outcome, exit, out, preflight};
use crate::config::{LogLevel, SyncConfig};
use crate::progress::Progress;
use crate::sync::SyncReport;
use crate::sys::host;

/// How often the screen is drawn.
const TICK: Duration = Duration::from_millis(200);

/// `mirrorfs sync`.
pub(super) fn run(config: SyncConfig) -> Outcome {
    preflight::sync(&config)?;
    host::raise_nofile();
    let progress = Arc::new(Progress::default());
    let mut screen = Screen::new();
    Log::stderr(screen.bars()).install(if config.quiet {
        LogLevel::Error
    } else {
        LogLevel::Warn
    });
    let fail = |e: std::io::Error| Failure::new(exit::FAILURE, format!("sync: {e}"));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]).map_err(fail)?;

    let (done_in, done) = crossbeam_channel::bounded(1);
    let (job, counters) = (config.clone(), progress.clone());
    let copy = move || {
        let _ = done_in.send(crate::sync::run(&job, counters)); // Gone only after a signal.
    };
    let thread = std::thread::Builder::new().name("sync".into());
    thread.spawn(copy).map_err(fail)?;

    let mut rate = Rate::default();
    let mut sampled: Option<Instant> = None;
    let result = loop {
        match done.recv_timeout(TICK) {
            Ok(result) => break result,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                return Err(Failure::new(exit::FAILURE, "sync: the copy died"));
            }
        }
        if sampled.is_none_or(|t| t.elapsed() >= Duration::from_secs(1)) {
            sampled = Some(Instant::now());
            rate.sample(Instant::now(), progress.bytes_pulled.get());
        }
        let counts = Counts::of(&progress, rate.bytes_per_s());
        for signal in signals.pending() {
            match signal {
                // Files appear whole or not at all: leaving now is safe at any moment.
                SIGINT | SIGTERM => {
                    screen.close("INTERRUPTED", &counts);
                    return Err(Failure::new(
                        exit::INTERRUPTED,
                        "interrupted; the same command goes on where it stopped",
                    ));
                }
                SIGUSR1 => screen.line("SYNC", &counts),
                _ => {}
            }
        }
        if config.progress {
            screen.show("SYNC", &counts);
        }
    };
    if config.progress {
        screen.close("SYNC", &Counts::of(&progress, rate.bytes_per_s()));
    }
    report(&config, &result?)
}

fn report(config: &SyncConfig, report: &SyncReport) -> Outcome {
    out::say(&format!("{report:?} {}", config.json));
    Ok(exit::DONE)
}
