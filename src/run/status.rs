//! The `status` command: a page, a line or JSON, once or again every second.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::client::{self, Daemon};
use super::out::{self, bytes, count};
use super::preflight;
use super::report::{Report, State};
use super::{Failure, Outcome, exit};
use crate::cli;
use crate::error::Printable;
use crate::fuse::session::FS_TYPE;
use crate::sys::{host, local};

/// How often a live page is drawn.
const EVERY: Duration = Duration::from_secs(1);
/// To the first line, the first column; and what is below goes.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR_ALL: &str = "\x1b[2J";

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Page,
    Script,
    Json,
}

/// `mirrorfs status`.
pub(super) fn run(args: &cli::Status) -> Outcome {
    let format = match (args.json, args.script) {
        (true, _) => Format::Json,
        (_, true) => Format::Script,
        _ => Format::Page,
    };
    let path = args.path.as_deref();
    if args.watch {
        return watch(path, format);
    }
    let Some(path) = path else {
        let reports = all();
        match format {
            Format::Json => print_json(&reports)?,
            Format::Page if reports.is_empty() => out::say(&none_runs()),
            _ => print(&reports, format),
        }
        return Ok(exit::DONE);
    };
    match client::find(path)? {
        Some(daemon) if format == Format::Json => print_json(&daemon.report)?,
        Some(daemon) => print(&[daemon.report], format),
        None => stopped(path, format)?,
    }
    Ok(exit::DONE)
}

/// A mount of somebody else's is seen in the table of mounts, and its daemon answers only him and root.
fn none_runs() -> String {
    let mut mounts = host::mounts().unwrap_or_default();
    mounts.retain(|m| m.fs_type == FS_TYPE && local::uid() != 0);
    match mounts.first() {
        None => "no migration is running".to_owned(),
        Some(m) => format!(
            "no migration of this user's is running; mirrorfs is mounted on {}: try as root",
            Printable(m.point.as_os_str())
        ),
    }
}

fn all() -> Vec<Report> {
    client::daemons().into_iter().map(|d| d.report).collect()
}

fn print(reports: &[Report], format: Format) {
    lines(reports, format)
        .iter()
        .for_each(|line| out::say(line));
}

fn lines(reports: &[Report], format: Format) -> Vec<String> {
    let mut lines = Vec::new();
    for report in reports {
        match format {
            Format::Script => lines.push(report.script_line()),
            Format::Json => lines.extend(serde_json::to_string(report)),
            Format::Page => {
                if !lines.is_empty() {
                    lines.push(String::new());
                }
                lines.extend(report.page());
            }
        }
    }
    lines
}

/// Until the daemon ends. On a terminal the page stays in its place.
fn watch(path: Option<&Path>, format: Format) -> Outcome {
    let mut daemon = match path {
        None => None,
        Some(path) => match client::find(path)? {
            Some(daemon) => Some(daemon),
            None => {
                stopped(path, format)?;
                return Ok(exit::DONE);
            }
        },
    };
    let in_place = format == Format::Page && std::io::stdout().is_terminal();
    if in_place {
        out::raw(CLEAR_ALL.as_bytes());
    }
    loop {
        let reports = match &daemon {
            Some(daemon) => vec![daemon.report.clone()],
            None => all(),
        };
        let text = page(&lines(&reports, format), in_place);
        let mut stdout = std::io::stdout().lock();
        let written = stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush());
        // Nobody looks any more (`| head`).
        if written.is_err() || (path.is_none() && reports.is_empty()) {
            return Ok(exit::DONE);
        }
        drop(stdout);
        std::thread::sleep(EVERY);
        if let Some(before) = daemon.take() {
            match before.again() {
                Some(now) => daemon = Some(now),
                None => return Ok(gone(&before)),
            }
        }
    }
}

fn page(lines: &[String], in_place: bool) -> String {
    if !in_place {
        return lines.iter().map(|line| format!("{line}\n")).collect();
    }
    let lines = lines.iter().map(|line| format!("{line}{CLEAR_LINE}\n"));
    format!("{HOME}{}{CLEAR_BELOW}", lines.collect::<String>())
}

fn gone(daemon: &Daemon) -> u8 {
    out::say(&format!("the daemon {} has ended", daemon.report.pid));
    exit::DONE
}

/// No daemon: the marks in dst tell what is left.
fn stopped(dst: &Path, format: Format) -> Result<(), Failure> {
    preflight::migration(dst)?;
    let survey = crate::mirror::survey(dst)?;
    let dst: PathBuf = client::lexical(dst).unwrap_or_else(|| dst.to_path_buf());
    let src = survey.identity_src.as_deref().map(Path::to_string_lossy);
    let done = survey.pending_files == 0 && survey.pending_dirs == 0 && survey.ledger == 0;
    let action = match (&src, done) {
        (_, true) => format!("mirrorfs finish {}", Printable(dst.as_os_str())),
        (Some(src), _) => format!("mirrorfs mount {src} {}", Printable(dst.as_os_str())),
        (None, _) => "mirrorfs mount SRC DST, as before".to_owned(),
    };
    if format == Format::Script {
        let src = src.as_deref().unwrap_or("-");
        let dst = Printable(dst.as_os_str());
        let left = ["-"; 12].join("\t");
        out::say(&format!(
            "-\t{src}\t{dst}\t{}\t{left}",
            State::Stopped.name()
        ));
        return Ok(());
    }
    if format == Format::Json {
        return print_json(&serde_json::json!({
            "state": State::Stopped,
            "usable": false,
            "src": src,
            "dst": dst.to_string_lossy(),
            "pending_files": survey.pending_files,
            "pending_dirs": survey.pending_dirs,
            "bytes_left": survey.bytes_left,
            "errors": survey.ledger,
            "action": action,
        }));
    }
    let src = src.unwrap_or("?".into());
    out::say(&format!(
        "{}  from {src}   {}",
        dst.display(),
        State::Stopped.name()
    ));
    out::say(&format!(
        "pending {} files, {} directories, {} known to be left",
        count(survey.pending_files),
        count(survey.pending_dirs),
        bytes(survey.bytes_left)
    ));
    out::say(&format!("errors  {}", count(survey.ledger)));
    out::say(&format!("action  {action}"));
    Ok(())
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(exit::FAILURE, format!("json: {e}")))?;
    out::say(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_in_place_leaves_nothing_of_the_page_before() {
        let lines = ["a".to_owned(), "b".to_owned()];
        assert_eq!(page(&lines, false), "a\nb\n");
        assert_eq!(page(&lines, true), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
