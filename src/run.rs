//! Run: the commands. Builds the pieces, wires them, waits, reports, and sets the exit code.
//!
//! The only place that prints. An error is one line on standard error that begins with
//! `mirrorfs: `; what a command was asked for goes to standard output.

mod background;
mod client;
mod control;
mod counts;
mod daemon;
mod ending;
mod errors;
mod finish;
mod finished;
mod front;
mod helper;
mod keeper;
mod live;
mod log;
mod manifest;
mod metrics;
mod mount;
mod out;
mod preflight;
mod pull;
mod rate;
mod reading;
mod records;
mod remount;
mod report;
mod saver;
mod serve;
mod signals;
mod status;
mod steer;
mod sync;
mod told;
mod trace;
mod upgrade;
mod varlink;
mod verify;
mod wait;
mod watch;
mod web;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::varlink::Request;
use crate::cli::{self, Cli, Command};
use crate::error::{Errno, Error, Side};
use crate::native;

pub use counts::{Counts, Estimate, Total, Waiting};
pub use rate::Rate;
pub use report::{Report, State};

/// Exit codes: a promise (docs/OPERATIONS.md). `cli::EXIT_CODES` is their text.
pub(crate) mod exit {
    /// Done.
    pub(crate) const DONE: u8 = 0;
    /// Another failure.
    pub(crate) const FAILURE: u8 = 1;
    /// Usage.
    pub(crate) const USAGE: u8 = 2;
    /// SRC, DST or the mount point cannot be used.
    pub(crate) const UNUSABLE: u8 = 3;
    /// verify found differences.
    pub(crate) const DIFFERENT: u8 = 9;
    /// An I/O error stopped the run, or DST is full.
    pub(crate) const IO: u8 = 11;
    /// Interrupted: run again to continue.
    pub(crate) const INTERRUPTED: u8 = 20;
    /// Done, but some entries failed.
    pub(crate) const SOME_FAILED: u8 = 23;
    /// Done, but some entries of SRC vanished or kept changing.
    pub(crate) const VANISHED: u8 = 24;
    /// --max-delete was reached.
    pub(crate) const MAX_DELETE: u8 = 25;
    /// SRC stopped answering.
    pub(crate) const STALLED: u8 = 30;
}

/// Why a command ends without success: one line, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: u8,
    /// What is said on standard error; empty when all was said already.
    pub(crate) line: String,
}

impl Failure {
    pub(crate) fn new(exit: u8, line: impl Into<String>) -> Failure {
        Failure {
            exit,
            line: line.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let exit = match &error {
            Error::Usage(_) => exit::USAGE,
            Error::Unusable(_) | Error::SrcPending { .. } => exit::UNUSABLE,
            Error::Call {
                side: Side::Src,
                errno,
                ..
            } if *errno == Errno::TIMEDOUT => exit::STALLED,
            Error::Call {
                side: Side::Src | Side::Dst,
                ..
            } => exit::IO,
            Error::Call {
                side: Side::Host, ..
            } => exit::FAILURE,
            Error::SrcChanged { .. } => exit::VANISHED,
            Error::WrongType { .. }
            | Error::MayBePart { .. }
            | Error::Rules { .. }
            | Error::Unseen { .. } => exit::SOME_FAILED,
            Error::Stopped => exit::INTERRUPTED,
        };
        Failure::new(exit, error.to_string())
    }
}

/// What a command returns: its exit code, or the line that says why there is none.
pub(crate) type Outcome = Result<u8, Failure>;

/// Runs the program with the given words, the program's name first.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut words: Vec<OsString> = words.into_iter().collect();
    if let Some(code) = upgrade::called(&words) {
        return code;
    }
    if let Some(code) = keeper::called(&words) {
        return code;
    }
    if let Some(helper) = helper::Call::of(&words) {
        return ExitCode::from(helper.run());
    }
    if words.get(1).is_some_and(|w| w == native::GUARD_WORD) {
        return match background::guard() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    cli::help_alone(&mut words);
    let outcome = match Cli::try_parse_from(words) {
        Ok(cli) => dispatch(cli.command),
        Err(error) => usage(&error),
    };
    ExitCode::from(match outcome {
        Ok(exit) => exit,
        Err(failure) => {
            if !failure.line.is_empty() {
                out::complain(&failure.line);
            }
            failure.exit
        }
    })
}

fn dispatch(command: Command) -> Outcome {
    let usage = |line| Failure::new(exit::USAGE, line);
    match command {
        Command::Mount(args) => mount::run(*args),
        Command::Sync(args) => {
            if let Some(line) = args.refusal() {
                return Err(Failure::new(exit::FAILURE, line));
            }
            let file = steer::config_file(args.config.as_deref())?;
            sync::run(args.config_with(&file.sync).map_err(usage)?)
        }
        Command::Status(args) => status::run(&args),
        Command::Wait(args) => wait::run(&args.path, args.timeout),
        Command::Pause(args) => steer::run(&args.path, &Request::Pause),
        Command::Resume(args) => steer::run(&args.path, &Request::Resume),
        Command::Cancel(args) => steer::run(&args.path, &Request::Cancel),
        Command::Set(args) => steer::set(&args),
        Command::Upgrade(args) => upgrade::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Verify(args) => verify::run_with(&args),
        Command::Manifest(args) => manifest::take(&args),
        Command::Finish(args) => finish::run(&args.path, args.accept_loss),
        Command::Errors(args) => errors::run(&args),
        Command::Completions(args) => {
            let mut text = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "mirrorfs", &mut text);
            out::raw(&text);
            Ok(exit::DONE)
        }
        Command::Man(args) => man(args.command.as_deref()),
    }
}

/// clap's help goes out as it is; its errors become one line.
fn usage(error: &clap::Error) -> Outcome {
    use clap::error::ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion,
    };
    match error.kind() {
        DisplayHelp | DisplayVersion => {
            out::raw(error.render().to_string().as_bytes());
            Ok(exit::DONE)
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let text = error.render().to_string();
            let _ = std::io::stderr().write_all(text.as_bytes()); // The exit code says it too.
            Err(Failure::new(exit::USAGE, ""))
        }
        _ => {
            if let Some(line) = no_such_command(error) {
                return Err(Failure::new(exit::USAGE, line));
            }
            let text = error.render().to_string();
            let lines = text
                .lines()
                .take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"))
                .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
                .filter(|l| !l.is_empty());
            let mut line = String::new();
            for part in lines {
                if !line.is_empty() {
                    line += if part.starts_with("tip:") { "; " } else { " " };
                }
                line += &part;
            }
            let line = line.strip_prefix("error: ").unwrap_or(&line);
            Err(Failure::new(
                exit::USAGE,
                format!("{line} (see mirrorfs --help)"),
            ))
        }
    }
}

/// What others call by a name that clap would take for `mount`.
fn no_such_command(error: &clap::Error) -> Option<String> {
    use clap::error::{ContextKind, ContextValue};
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else {
        return None;
    };
    ["umount", "unmount", "stop"]
        .contains(&word.as_str())
        .then(|| {
            format!(
                "{word}: no command of mirrorfs: umount PATH stops a migration (without root fusermount3 -u PATH), \
                 and the same mirrorfs mount resumes it; mirrorfs finish PATH ends a complete one (see mirrorfs --help)"
            )
        })
}

fn man(command: Option<&str>) -> Outcome {
    let mut root = Cli::command();
    root.build();
    let page = match command {
        None => root,
        Some(name) => root
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| Failure::new(exit::USAGE, format!("{name}: no such command")))?,
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page)
        .render(&mut text)
        .map_err(|e| Failure::new(exit::FAILURE, format!("man page: {e}")))?;
    out::raw(&text);
    Ok(exit::DONE)
}

/// What anybody may send to a daemon, for `make fuzz`.
#[cfg(fuzzing)]
pub fn fuzz_message(bytes: &[u8]) {
    if let (varlink::Asked::Request(request), _) = varlink::Call::parse(bytes) {
        let call = serde_json::to_vec(&request.to_call()).unwrap_or_default();
        let again = varlink::Call::parse(&call).0;
        assert!(matches!(again, varlink::Asked::Request(r) if r == request));
    }
}
