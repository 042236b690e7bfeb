//! The `sync` command: the copy on a thread of its own, progress and signals here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use super::counts::Counts;
use super::live::Screen;
use super::log::Log;
use super::out::{bytes, count, duration};
use super::rate::Rate;
use super::records::Records;
use super::{Failure, Outcome, exit, out, preflight};
use crate::config::{LogLevel, Shard, SyncConfig};
use crate::error::Printable;
use crate::progress::Progress;
use crate::sync::{Event, SyncReport};
use crate::sys::host;
use crate::throttle::Throttle;

/// How often the screen is drawn.
const TICK: Duration = Duration::from_millis(200);

/// `mirrorfs sync`.
pub(super) fn run(config: SyncConfig) -> Outcome {
    preflight::sync(&config)?;
    host::widen_fd_table(host::raise_nofile());
    let progress = Arc::new(Progress::default());
    let mut screen = Screen::new();
    Log::stderr(screen.bars()).install(if config.quiet {
        LogLevel::Error
    } else {
        LogLevel::Warn
    });
    if let Some((shard, by)) = config.shard.and_then(|s| Some((s, s.by()?)))
        && !config.quiet
    {
        out::complain(&format!("shard {shard}, by {by}"));
    }
    let fail = |e: std::io::Error| Failure::new(exit::FAILURE, format!("sync: {e}"));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2])
            .map_err(fail)?;
    let stop = Arc::new(AtomicBool::new(false));
    let throttle = Arc::new(Throttle::default());
    throttle.set_limit(config.bwlimit);
    let done = start(&config, &progress, &stop, &throttle)?;

    let begin = Instant::now();
    let mut late = false;
    let mut rate = Rate::default();
    let mut sampled: Option<Instant> = None;
    let result = loop {
        match done.recv_timeout(TICK) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new(exit::FAILURE, "sync: the copy died"));
            }
        }
        if sampled.is_none_or(|t| t.elapsed() >= Duration::from_secs(1)) {
            sampled = Some(Instant::now());
            rate.sample(Instant::now(), progress.bytes_pulled.get());
        }
        if !late && config.stop_after.is_some_and(|t| begin.elapsed() >= t) {
            late = true;
            stop.store(true, Relaxed);
        }
        let counts = Counts::of(&progress, &rate, None);
        for signal in signals.pending() {
            match signal {
                // The first one lets what has begun become whole; files appear whole or not at
                // all, so leaving at once is safe too.
                SIGINT | SIGTERM if !stop.swap(true, Relaxed) => {}
                SIGINT | SIGTERM => {
                    screen.close("INTERRUPTED", &counts);
                    return Err(interrupted());
                }
                SIGUSR1 => screen.line("SYNC", &counts),
                SIGUSR2 => toggled(throttle.toggle_limit(), throttle.limit()),
                _ => {}
            }
        }
        if config.progress {
            screen.show("SYNC", &counts);
        }
    };
    if config.progress {
        screen.close("SYNC", &Counts::of(&progress, &rate, None));
    }
    match (report(&config, &result?), late) {
        (Err(failure), true) if failure.exit == exit::INTERRUPTED => {
            let line = "--stop-after: the time is over; the same command goes on where it stopped";
            Err(Failure::new(exit::STALLED, line))
        }
        (outcome, _) => outcome,
    }
}

/// Starts the copy on a thread of its own; what it says is printed there.
fn start(
    config: &SyncConfig,
    progress: &Arc<Progress>,
    stop: &Arc<AtomicBool>,
    throttle: &Arc<Throttle>,
) -> Result<Receiver<crate::error::Result<SyncReport>>, Failure> {
    let (done_in, done) = crossbeam_channel::bounded(1);
    let (job, counters) = (config.clone(), Arc::clone(progress));
    let (stopping, pace) = (Arc::clone(stop), Arc::clone(throttle));
    let mut records = Records::open(config)?;
    let copy = move || {
        let mut tell = |event: Event| match event {
            Event::Line(line) => {
                let text = line.to_string();
                if job.itemize {
                    out::say(&text);
                } else if job.verbose > 0 {
                    out::say(line.named(&text));
                }
                records.line(&text);
            }
            Event::LeftOut(path) if !job.quiet => out::say(&format!(
                "skipping non-regular file \"{}\"",
                Printable(path.as_os_str())
            )),
            Event::LeftOut(_) => {}
            Event::Error(error) => {
                out::complain(&error.message);
                records.failed(&error);
            }
        };
        let result = crate::sync::run_throttled(&job, counters, &stopping, &pace, &mut tell);
        let _ = done_in.send(result); // Gone only after a second signal.
    };
    let thread = std::thread::Builder::new().name("sync".into());
    let started = thread.spawn(copy);
    started.map_err(|e| Failure::new(exit::FAILURE, format!("sync: {e}")))?;
    Ok(done)
}

/// The log says what SIGUSR2 has done.
pub(super) fn toggled(applied: bool, limit: Option<u64>) {
    match limit {
        Some(rate) if applied => tracing::warn!("bandwidth limit: {}/s", bytes(rate)),
        Some(_) => tracing::warn!("bandwidth limit: lifted"),
        None => tracing::warn!("bandwidth limit: none is set"),
    }
}

fn interrupted() -> Failure {
    Failure::new(
        exit::INTERRUPTED,
        "interrupted; the same command goes on where it stopped",
    )
}

/// The totals, where they were asked for, and the exit code.
fn report(config: &SyncConfig, report: &SyncReport) -> Outcome {
    if config.json {
        out::say(&json(report).to_string());
    } else if config.stats {
        stats(report);
        if let Some(shard) = config.shard {
            out::say(&format!("shard        {}", shard_line(shard, report)));
        }
    }
    let seen = report.failed + report.vanished;
    if report.interrupted {
        return Err(interrupted());
    }
    if let Some(why) = &report.manifest {
        return Err(Failure::new(exit::FAILURE, why.clone()));
    }
    if report.dst_full {
        let line = "DST is full, or read-only: the copy ended early; the same command goes on";
        return Err(Failure::new(exit::IO, line));
    }
    if report.failed > 0 {
        let line = format!("{} entries failed, see above", count(seen));
        return Err(Failure::new(exit::SOME_FAILED, line));
    }
    if report.max_delete_reached {
        let line = "--max-delete was reached: not all that is extraneous was removed";
        return Err(Failure::new(exit::MAX_DELETE, line));
    }
    if report.vanished > 0 && !config.ignore_vanished {
        let line = format!(
            "{} entries vanished or kept changing",
            count(report.vanished)
        );
        return Err(Failure::new(exit::VANISHED, line));
    }
    match config.verify {
        true => super::verify::run(&config.src, &config.dst, config.one_file_system),
        false => Ok(exit::DONE),
    }
}

fn shard_line(shard: Shard, report: &SyncReport) -> String {
    let left: Vec<String> = report.shards_left.iter().map(u32::to_string).collect();
    match left.is_empty() {
        true => format!("{shard}"),
        false => format!("{shard}; not ended yet: {}", left.join(", ")),
    }
}

fn json(report: &SyncReport) -> serde_json::Value {
    serde_json::json!({
        "entries": report.entries,
        "files": report.files,
        "dirs": report.dirs,
        "symlinks": report.symlinks,
        "specials": report.specials,
        "hardlinks": report.hardlinks,
        "created": report.created,
        "updated": report.updated,
        "skipped": report.skipped,
        "deleted": report.deleted,
        "transferred": report.transferred,
        "bytes_copied": report.bytes_copied,
        "bytes_total": report.bytes_total,
        "failed": report.failed,
        "vanished": report.vanished,
        "elapsed_s": report.elapsed.as_secs_f64(),
        "shards_left": report.shards_left,
        "threads": report.threads,
        "utilisation": report.utilisation,
    })
}

fn stats(report: &SyncReport) {
    out::say(&format!(
        "entries      {} ({} files, {} directories, {} symlinks, {} other)",
        count(report.entries),
        count(report.files),
        count(report.dirs),
        count(report.symlinks),
        count(report.specials),
    ));
    out::say(&format!(
        "done         {} made, {} changed, {} equal, {} links, {} removed",
        count(report.created),
        count(report.updated),
        count(report.skipped),
        count(report.hardlinks),
        count(report.deleted),
    ));
    out::say(&format!(
        "data         {} of {} copied",
        bytes(report.bytes_copied),
        bytes(report.bytes_total),
    ));
    out::say(&format!(
        "time         {} ({:.3} s), {} threads, {:.0} % busy",
        duration(report.elapsed),
        report.elapsed.as_secs_f64(),
        report.threads,
        100.0 * report.utilisation,
    ));
}
