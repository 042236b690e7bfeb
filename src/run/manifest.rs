//! The `manifest` command; and the end of the manifest of a `mount`, which is the same of what that has left.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::out::{self, bytes, count, duration, quoted};
use super::{Failure, Outcome, exit, preflight, reading, verify};
use crate::cli::Manifest;
use crate::config::MountConfig;
use crate::manifest::{Trouble, Writer};
use crate::mirror::{Face, Mirror};
use crate::sys::{host, local};
use crate::verify::{Reading, Told, VerifyOptions, take_manifest};

/// `mirrorfs manifest`.
pub(super) fn take(args: &Manifest) -> Outcome {
    let mut options = verify::options()?;
    options.one_file_system = args.one_file_system;
    preflight::manifest(&args.src, &args.file)?;
    let to = To {
        say: out::say,
        complain: out::complain,
        lines: None,
    };
    write(&args.src, &args.file, &options, &to)
}

/// Where lines go.
struct To {
    say: fn(&str),
    complain: fn(&str),
    /// Where progress goes, line by line; `None`: to standard error, bars where they can be drawn.
    lines: Option<fn(&str)>,
}

/// Writes the manifest of a tree, with the digests that are in it already.
fn write(src: &Path, file: &Path, options: &VerifyOptions, to: &To) -> Outcome {
    let unusable = |t: Trouble| Failure::new(exit::UNUSABLE, t.to_string());
    let (writer, before, bad) = Writer::begin(file).map_err(unusable)?;
    if let Some(bad) = bad.filter(|bad| bad.line > 0) {
        (to.complain)(&format!("{bad}; what is behind it is read again"));
    }
    let report = reading::shown(&options.reading, to.lines, || {
        take_manifest(src, (&writer, &before), options, &mut |told| {
            if let Told::Difference(difference) = told {
                (to.complain)(&difference.to_string());
            }
        })
    })?;
    let whole = report.unreadable == 0 && !report.stopped;
    let ended = writer.end(whole);
    ended.map_err(|t| Failure::new(exit::FAILURE, t.to_string()))?;
    (to.say)(&format!(
        "{} entries, {} of {} files read in {}",
        count(report.entries),
        bytes(report.bytes),
        count(report.files),
        duration(report.elapsed),
    ));
    if report.stopped {
        let line = "interrupted; the same command goes on where it stopped";
        Err(Failure::new(exit::INTERRUPTED, line))
    } else if report.unreadable > 0 {
        let line = format!("{} entries failed, see above", count(report.unreadable));
        Err(Failure::new(exit::SOME_FAILED, line))
    } else if report.differences > 0 {
        let line = format!("{} entries kept changing", count(report.differences));
        Err(Failure::new(exit::VANISHED, line))
    } else {
        Ok(exit::DONE)
    }
}

/// The manifest of a mount that is over: what it lacks SRC still has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unended {
    file: PathBuf,
    src: PathBuf,
    root: Face,
}

/// The daemon begins to write. `served`: users are in the mount already.
pub(super) fn begin(mirror: &Mirror, config: &MountConfig, served: bool) -> Result<(), Failure> {
    let Some(path) = &config.manifest else {
        return Ok(());
    };
    match mirror.prove_into(path) {
        Err(error) if served => {
            tracing::error!("{error}; what is pulled from now on is read once more in the end");
            Ok(())
        }
        begun => Ok(begun?),
    }
}

/// The daemon lets go of its manifest. `None`: none was asked for.
pub(super) fn unended(mirror: &Mirror, config: &MountConfig) -> Option<Unended> {
    let file = config.manifest.clone()?;
    if let Some(Err(trouble)) = mirror.end_proof() {
        tracing::error!("{trouble}");
    }
    Some(Unended {
        file,
        src: config.src.clone(),
        root: mirror.src_face(),
    })
}

impl Unended {
    pub(super) fn from_json(value: &Value) -> Option<Unended> {
        Unended::deserialize(value).ok()
    }

    /// For `finish`. `daemon`: whose process says so: root reads and writes no file because a user names it.
    pub(super) fn end(&self, daemon: u32) -> Outcome {
        if daemon != local::uid() {
            let line = format!("its daemon is user {daemon}'s");
            return Err(self.unended(Failure::new(exit::SOME_FAILED, line)));
        }
        let to = To {
            say: |line| out::say(&format!("manifest: {line}")),
            complain: out::complain,
            lines: None,
        };
        self.end_with(&verify::options()?, &to)
    }

    /// For `mount --finish`: into the log.
    pub(super) fn end_in_daemon(&self, stop: &Arc<AtomicBool>, reading: &Arc<Reading>) {
        let options = VerifyOptions {
            stop: Arc::clone(stop),
            reading: Arc::clone(reading),
            ..VerifyOptions::default()
        };
        let to = To {
            say: |line| tracing::info!("manifest: {line}"),
            complain: |line| tracing::warn!("{line}"),
            lines: Some(|line| tracing::info!("{line}")),
        };
        if let Err(failure) = self.end_with(&options, &to) {
            tracing::error!("{}", failure.line);
        }
    }

    fn end_with(&self, options: &VerifyOptions, to: &To) -> Outcome {
        let ended = match self.is_there() {
            Ok(true) => write(&self.src, &self.file, options, to),
            Ok(false) => Err(Failure::new(
                exit::SOME_FAILED,
                format!("SRC {} is another directory now", quoted(&self.src)),
            )),
            Err(failure) => Err(failure),
        };
        ended.map_err(|failure| self.unended(failure))
    }

    fn unended(&self, failure: Failure) -> Failure {
        let (why, src, file) = (&failure.line, quoted(&self.src), quoted(&self.file));
        let line = format!(
            "the manifest has no end: {why}; mirrorfs manifest {src} {file} completes it while SRC is there"
        );
        Failure::new(failure.exit, line)
    }

    /// SRC's path leads to SRC: the mount was above it, perhaps, and something else may be.
    fn is_there(&self) -> Result<bool, Failure> {
        let opened = host::open_dir(&self.src).map_err(|errno| {
            let line = format!("SRC {}: open: {errno}", quoted(&self.src));
            Failure::new(exit::SOME_FAILED, line)
        })?;
        Ok(Face::of(opened.as_fd())? == self.root)
    }
}
