//! The `verify` command: one line for each difference, then the sum.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use super::out::{self, bytes, count, duration};
use super::told::{Form, Said};
use super::{Failure, Outcome, exit, preflight};
use crate::cli::Verify;
use crate::error::Printable;
use crate::manifest::Index;
use crate::sys::host;
use crate::verify::{
    Difference, Kind, ProofReport, Told, VerifyOptions, VerifyReport, verify, verify_each,
    verify_manifest,
};

/// `mirrorfs verify`.
pub(super) fn run_with(args: &Verify) -> Outcome {
    let mut options = options()?;
    options.sample = args.sample;
    options.tell_all = args.combined.is_some();
    if args.manifest.is_some() && args.second.is_some() {
        let line = "verify --manifest FILE DST: there is no SRC";
        return Err(Failure::new(exit::USAGE, line));
    }
    let proof = args.manifest.as_deref().map(|path| {
        preflight::verify_one(&args.first)?;
        Index::open(path).map_err(|t| Failure::new(exit::UNUSABLE, t.to_string()))
    });
    let proof = proof.transpose()?;
    let stdout = args
        .combined
        .as_ref()
        .is_some_and(|to| to.as_os_str() == "-");
    let form = match (args.json, stdout) {
        (true, true) => {
            let line = "verify --json with --combined -: one of them can have standard output";
            return Err(Failure::new(exit::USAGE, line));
        }
        (true, false) => Form::Json,
        (false, true) => Form::Quiet,
        (false, false) => Form::Lines,
    };
    let mut said = Said::new(args.ignore_changed, form);
    let Some(to) = &args.combined else {
        let report = told(args, proof.as_ref(), &options, &mut |told| {
            said.tell(&told);
        })?;
        return said.end(report, proof.as_ref());
    };
    let failed = |e: std::io::Error| {
        Failure::new(exit::FAILURE, format!("--combined {}: {e}", to.display()))
    };
    let mut lines = match stdout {
        true => Combined::new(Box::new(std::io::stdout())),
        false => Combined::new(Box::new(File::create(to).map_err(failed)?)),
    };
    let report = told(args, proof.as_ref(), &options, &mut |told| {
        said.tell(&told);
        lines.add(told);
    })?;
    lines.end().map_err(failed)?;
    said.end(report, proof.as_ref())
}

/// The comparison that was asked for.
fn told(
    args: &Verify,
    proof: Option<&Index>,
    options: &VerifyOptions,
    on: &mut dyn FnMut(Told),
) -> Result<ProofReport, Failure> {
    match (proof, &args.second) {
        (Some(manifest), _) => Ok(verify_manifest(manifest, &args.first, options, on)?),
        (None, Some(dst)) => {
            preflight::verify(&args.first, dst)?;
            let tree = verify_each(&args.first, dst, options, on)?;
            Ok(ProofReport {
                tree,
                without_xattrs: 0,
                xattrs_unseen: 0,
            })
        }
        (None, None) => Err(Failure::new(exit::USAGE, "DST is missing")),
    }
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
pub(super) fn options() -> Result<VerifyOptions, Failure> {
    host::widen_fd_table(host::raise_nofile());
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
                Kind::OnlyInSrc | Kind::Missing => self.line('+', &path),
                Kind::OnlyInDst | Kind::Extra => self.line('-', &path),
                Kind::Type => self.line('*', &path),
                // What could not be read may be equal or not.
                Kind::Unreadable | Kind::Unproven => {
                    self.open.insert(path, '!');
                }
                Kind::Corrupt => {
                    self.open.insert(path, 'X');
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
    let differences = report.differences.saturating_sub(report.unreadable);
    let mut line = format!("{}: {} differences", verified(report), count(differences));
    if report.unreadable > 0 {
        line += &format!(", {} unreadable", count(report.unreadable));
    }
    line
}

pub(super) fn verified(report: &VerifyReport) -> String {
    format!(
        "verified {} entries, {} files, {} in {}",
        count(report.entries),
        count(report.files),
        bytes(report.bytes),
        duration(report.elapsed),
    )
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
