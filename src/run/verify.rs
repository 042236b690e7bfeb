//! The `verify` command: one line for each difference, then the sum.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use super::out::{self, bytes, count, duration};
use super::{Failure, Outcome, exit, preflight};
use crate::sys::host;
use crate::verify::{Difference, VerifyOptions, VerifyReport, verify};

/// `mirrorfs verify`.
pub(super) fn run(src: &Path, dst: &Path, one_file_system: bool) -> Outcome {
    preflight::verify(src, dst)?;
    host::raise_nofile();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first one ends the comparison, the second one the process.
        signal_hook::flag::register_conditional_shutdown(
            signal,
            i32::from(exit::INTERRUPTED),
            stop.clone(),
        )
        .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
        .map_err(|e| Failure::new(exit::FAILURE, format!("signals: {e}")))?;
    }
    let options = VerifyOptions {
        stop,
        one_file_system,
        ..VerifyOptions::default()
    };
    let mut print = |difference: Difference| out::say(&difference.to_string());
    let report = verify(src, dst, &options, &mut print)?;
    out::say(&summary(&report));
    conclude(&report)
}

/// One line: what was compared, and what came of it.
pub(super) fn summary(report: &VerifyReport) -> String {
    let mut line = format!(
        "verified {} entries, {} files, {} in {}: {} differences",
        count(report.entries),
        count(report.files),
        bytes(report.bytes),
        duration(report.elapsed),
        count(report.differences.saturating_sub(report.unreadable)),
    );
    if report.unreadable > 0 {
        line += &format!(", {} unreadable", count(report.unreadable));
    }
    line
}

/// The exit code. A difference weighs more than what could not be read.
pub(super) fn conclude(report: &VerifyReport) -> Outcome {
    if report.stopped {
        let line = "interrupted: the trees were not compared to the end";
        Err(Failure::new(exit::INTERRUPTED, line))
    } else if report.differences > report.unreadable {
        Ok(exit::DIFFERENT)
    } else if report.unreadable > 0 {
        Ok(exit::SOME_FAILED)
    } else {
        Ok(exit::DONE)
    }
}
