//! The `wait` command: until nothing is pending, or there is no hope of that.

use std::path::Path;
use std::time::{Duration, Instant};

use super::client::{self, Daemon};
use super::report::State;
use super::{Failure, Outcome, exit, out, preflight};

/// How often the daemon is asked: soon after the start, then less.
const EVERY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// `mirrorfs wait`.
pub(super) fn run(path: &Path, timeout: Option<Duration>) -> Outcome {
    let Some(mut daemon) = client::find(path)? else {
        return no_daemon(path);
    };
    let begun = Instant::now();
    let mut pause = EVERY.0;
    loop {
        if let Some(outcome) = end(&daemon) {
            return outcome;
        }
        let left = timeout.map(|t| t.saturating_sub(begun.elapsed()));
        if left == Some(Duration::ZERO) {
            let line = format!("still {} after --timeout", daemon.report.state_text());
            return Err(Failure::new(exit::STALLED, line));
        }
        std::thread::sleep(left.map_or(pause, |left| left.min(pause)));
        pause = (pause * 2).min(EVERY.1);
        daemon = match daemon.again() {
            Some(now) => now,
            None => return ended(&daemon),
        };
    }
}

/// What a daemon's state says about waiting on; `None`: wait on.
fn end(daemon: &Daemon) -> Option<Outcome> {
    let report = &daemon.report;
    match report.state {
        State::Complete | State::Finished => Some(Ok(exit::DONE)),
        State::Degraded if report.background == "done" => Some(Err(Failure::new(
            exit::SOME_FAILED,
            format!(
                "complete, except for {} entries",
                out::count(report.counts.errors)
            ),
        ))),
        State::Degraded if report.stuck => Some(Err(Failure::new(
            exit::SOME_FAILED,
            format!(
                "{} entries could not be pulled: {}",
                out::count(report.counts.errors),
                report.action
            ),
        ))),
        State::Stopped => Some(Err(stopped())),
        _ => None,
    }
}

/// It has gone: finished, or stopped before the end.
fn ended(daemon: &Daemon) -> Outcome {
    match crate::mirror::survey(Path::new(&daemon.report.dst)) {
        Ok(survey) if survey.identity_src.is_some() => Err(stopped()),
        _ => Ok(exit::DONE),
    }
}

fn no_daemon(path: &Path) -> Outcome {
    // `mount --finish` may have come to its end before.
    if preflight::is_finished(path) {
        return Ok(exit::DONE);
    }
    preflight::migration(path)?;
    Err(stopped())
}

fn stopped() -> Failure {
    let line = "the daemon has ended before nothing was pending; the same mount command resumes";
    Failure::new(exit::INTERRUPTED, line)
}
