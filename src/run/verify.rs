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
    let Some(to) = &args.combined else {
        let mut said = Said::new(args.ignore_changed, false);
        let report = told(args, proof.as_ref(), &options, &mut |told| {
            said.tell(&told);
        })?;
        return said.end(report, proof.as_ref());
    };
    let quiet = to.as_os_str() == "-";
    let failed = |e: std::io::Error| {
        Failure::new(exit::FAILURE, format!("--combined {}: {e}", to.display()))
    };
    let mut said = Said::new(args.ignore_changed, quiet);
    let mut lines = match quiet {
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

/// What was said of the differences.
struct Said {
    /// What users did since does not count.
    forgives: bool,
    /// Standard output is for something else.
    quiet: bool,
    counts: HashMap<Kind, u64>,
    forgiven: u64,
}

impl Said {
    fn new(forgives: bool, quiet: bool) -> Said {
        Said {
            forgives,
            quiet,
            counts: HashMap::new(),
            forgiven: 0,
        }
    }

    fn tell(&mut self, told: &Told) {
        let Told::Difference(difference) = told else {
            return;
        };
        *self.counts.entry(difference.kind).or_default() += 1;
        let theirs = [Kind::Changed, Kind::Missing, Kind::Extra].contains(&difference.kind);
        if self.forgives && theirs {
            self.forgiven += 1;
        } else if !self.quiet {
            out::say(&difference.to_string());
        }
    }

    /// The sum, and the exit code.
    fn end(self, compared: ProofReport, proof: Option<&Index>) -> Outcome {
        let mut report = compared.tree;
        let say = match self.quiet {
            true => out::complain,
            false => out::say,
        };
        match proof {
            None => say(&summary(&report)),
            Some(manifest) => {
                if !manifest.has_ended() {
                    let line = "the run that wrote the manifest did not end, or some entries failed: \
                                it does not hold all of the tree; the same sync completes it";
                    out::complain(line);
                }
                if compared.without_xattrs > 0 {
                    out::complain(&format!(
                        "the manifest tells no xattrs and ACLs of {} entries: these were not compared",
                        count(compared.without_xattrs)
                    ));
                }
                if compared.xattrs_unseen > 0 {
                    out::complain(&format!(
                        "xattrs of {} entries were not compared: security.* and trusted.* are for root",
                        count(compared.xattrs_unseen)
                    ));
                }
                say(&self.proof_summary(&report));
            }
        }
        report.differences -= self.forgiven;
        conclude(&report)
    }

    fn proof_summary(&self, report: &VerifyReport) -> String {
        let of = |kind| self.counts.get(&kind).copied().unwrap_or(0);
        let mut line = format!("{}: {} corrupt", verified(report), count(of(Kind::Corrupt)));
        for (kind, what) in [
            (Kind::Changed, "changed since"),
            (Kind::Missing, "missing"),
            (Kind::Extra, "extra"),
            (Kind::NotFinished, "not finished"),
            (Kind::Unproven, "without a digest"),
            (Kind::Unreadable, "unreadable"),
        ] {
            let basic = [Kind::Changed, Kind::Missing, Kind::Extra].contains(&kind);
            if basic || of(kind) > 0 {
                line += &format!(", {} {what}", count(of(kind)));
            }
        }
        line
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

fn verified(report: &VerifyReport) -> String {
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
