//! The `verify` command: one line for each difference, then the sum.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use super::out::{self, bytes, count, duration};
use super::{Failure, Outcome, exit, preflight};
use crate::cli::Verify;
use crate::error::Printable;
use crate::sys::host;
use crate::verify::{Difference, Kind, Told, VerifyOptions, VerifyReport, verify, verify_each};

/// `mirrorfs verify`.
pub(super) fn run_with(args: &Verify) -> Outcome {
    let mut options = options()?;
    options.sample = args.sample;
    options.tell_all = args.combined.is_some();
    let Some(to) = &args.combined else {
        return compare(&args.src, &args.dst, &options);
    };
    preflight::verify(&args.src, &args.dst)?;
    let quiet = to.as_os_str() == "-";
    let failed = |e: std::io::Error| {
        Failure::new(exit::FAILURE, format!("--combined {}: {e}", to.display()))
    };
    let mut lines = match quiet {
        true => Combined::new(Box::new(std::io::stdout())),
        false => Combined::new(Box::new(File::create(to).map_err(failed)?)),
    };
    let report = verify_each(&args.src, &args.dst, &options, &mut |told| {
        if let (Told::Difference(difference), false) = (&told, quiet) {
            out::say(&difference.to_string());
        }
        lines.add(told);
    })?;
    lines.end().map_err(failed)?;
    match quiet {
        true => out::complain(&summary(&report)),
        false => out::say(&summary(&report)),
    }
    conclude(&report)
}

/// The comparison after a `sync`.
pub(super) fn run(src: &Path, dst: &Path, one_file_system: bool) -> Outcome {
    let options = VerifyOptions {
        one_file_system,
        ..options()?
    };
    compare(src, dst, &options)
}

/// All of both trees, until a signal comes.
fn options() -> Result<VerifyOptions, Failure> {
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
    Ok(VerifyOptions {
        stop,
        ..VerifyOptions::default()
    })
}

fn compare(src: &Path, dst: &Path, options: &VerifyOptions) -> Outcome {
    preflight::verify(src, dst)?;
    let mut print = |difference: Difference| out::say(&difference.to_string());
    let report = verify(src, dst, options, &mut print)?;
    out::say(&summary(&report));
    conclude(&report)
}

/// A line for each entry, in rclone's symbols.
struct Combined {
    to: BufWriter<Box<dyn Write>>,
    /// Entries that differ and are not compared to their end yet.
    open: HashMap<PathBuf, char>,
    /// The first line that could not be written.
    failed: std::io::Result<()>,
}

impl Combined {
    fn new(to: Box<dyn Write>) -> Combined {
        Combined {
            to: BufWriter::new(to),
            open: HashMap::new(),
            failed: Ok(()),
        }
    }

    fn add(&mut self, told: Told) {
        match told {
            Told::Done(path) => {
                let symbol = self.open.remove(&path).unwrap_or('=');
                self.line(symbol, &path);
            }
            Told::Difference(Difference { path, kind, .. }) => match kind {
                Kind::OnlyInSrc => self.line('+', &path),
                Kind::OnlyInDst => self.line('-', &path),
                Kind::Type => self.line('*', &path),
                // What could not be read may be equal or not.
                Kind::Unreadable => {
                    self.open.insert(path, '!');
                }
                _ => {
                    self.open.entry(path).or_insert('*');
                }
            },
        }
    }

    fn line(&mut self, symbol: char, path: &Path) {
        if self.failed.is_ok() {
            let path = Printable(path.as_os_str());
            self.failed = writeln!(self.to, "{symbol} {path}");
        }
    }

    /// What nobody has compared to its end: it could not be opened, or the run was stopped.
    fn end(mut self) -> std::io::Result<()> {
        for (path, symbol) in std::mem::take(&mut self.open) {
            self.line(symbol, &path);
        }
        self.failed.and_then(|()| self.to.flush())
    }
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
