//! rsync's options that `sync` does not have: known, so that each can say why, and what to do instead.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// What was asked for and is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refused(pub Option<String>);

/// Whether an option has a value.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    Value,
}
use Takes::{Nothing, Value};

const NO_NETWORK: &str = "nothing goes over a network here; leave it out";
const NO_REMOTE: &str = "there is no remote side; mount it (NFS, sshfs) and give the path";
const NO_SECOND: &str = "not available; on btrfs or xfs --reflink shares extents instead";
const WHOLE: &str = "files appear in DST complete or not at all; leave it out";
const AGAIN: &str =
    "a file that was not complete is copied again; leave it out (-P shows progress)";
const NO_BACKUP: &str = "nothing that is replaced is kept; take a snapshot of DST before";
const AS_LINK: &str = "symlinks are copied as symlinks; copy what they lead to with another sync";
const AS_IS: &str = "owner and mode are copied as they are; change them in DST afterwards";
const ROOTS: &str =
    "SRC and DST are the roots of the two trees; --files-from takes paths below SRC";
const IN_PLACE: &str = "a directory's deletions come when its new names are there; give --delete";
const READ_ONLY: &str = "SRC is never written; remove it yourself, after --verify";
const WHOLE_FILES: &str = "whole files are copied, no differences; leave it out";
const SELECT: &str = "not available; write --filter rules, or a list for --files-from";
const EXACT: &str = "times are compared to the nanosecond; --size-only ignores them";
const LINES: &str = "the lines are rsync's own \"%i %n%L\"; -i prints them";
const KEPT: &str = "all times are kept; leave it out";

/// Option, short form, value, why not and what to do instead.
const OPTIONS: [(&str, Option<char>, Takes, &str); 62] = [
    ("compress", Some('z'), Nothing, NO_NETWORK),
    ("compress-choice", None, Value, NO_NETWORK),
    ("compress-level", None, Value, NO_NETWORK),
    ("skip-compress", None, Value, NO_NETWORK),
    ("timeout", None, Value, NO_NETWORK),
    ("contimeout", None, Value, NO_NETWORK),
    ("blocking-io", None, Nothing, NO_NETWORK),
    ("rsh", Some('e'), Value, NO_REMOTE),
    ("rsync-path", None, Value, NO_REMOTE),
    ("remote-option", Some('M'), Value, NO_REMOTE),
    ("protocol", None, Value, NO_REMOTE),
    (
        "iconv",
        None,
        Value,
        "names are copied byte for byte; leave it out",
    ),
    ("link-dest", None, Value, NO_SECOND),
    ("copy-dest", None, Value, NO_SECOND),
    ("compare-dest", None, Value, NO_SECOND),
    ("inplace", None, Nothing, WHOLE),
    ("append", None, Nothing, WHOLE),
    ("append-verify", None, Nothing, WHOLE),
    ("delay-updates", None, Nothing, WHOLE),
    ("temp-dir", Some('T'), Value, WHOLE),
    (
        "write-devices",
        None,
        Nothing,
        "devices are copied as devices; use dd",
    ),
    (
        "copy-devices",
        None,
        Nothing,
        "devices are copied as devices; use dd",
    ),
    ("partial", None, Nothing, AGAIN),
    ("partial-dir", None, Value, AGAIN),
    ("backup", Some('b'), Nothing, NO_BACKUP),
    ("backup-dir", None, Value, NO_BACKUP),
    ("suffix", None, Value, NO_BACKUP),
    ("copy-links", Some('L'), Nothing, AS_LINK),
    ("copy-dirlinks", Some('k'), Nothing, AS_LINK),
    ("safe-links", None, Nothing, AS_LINK),
    ("munge-links", None, Nothing, AS_LINK),
    ("keep-dirlinks", Some('K'), Nothing, AS_LINK),
    ("chmod", None, Value, AS_IS),
    ("chown", None, Value, AS_IS),
    ("usermap", None, Value, AS_IS),
    ("groupmap", None, Value, AS_IS),
    ("executability", Some('E'), Nothing, AS_IS),
    (
        "fake-super",
        None,
        Nothing,
        "needs root, or a tree of one's own; leave it out",
    ),
    (
        "super",
        None,
        Nothing,
        "needs root, or a tree of one's own; leave it out",
    ),
    ("relative", Some('R'), Nothing, ROOTS),
    ("dirs", Some('d'), Nothing, ROOTS),
    (
        "list-only",
        None,
        Nothing,
        "-n -i says what would be copied",
    ),
    ("delete-before", None, Nothing, IN_PLACE),
    ("delete-after", None, Nothing, IN_PLACE),
    ("delete-delay", None, Nothing, IN_PLACE),
    ("remove-source-files", None, Nothing, READ_ONLY),
    ("block-size", Some('B'), Value, WHOLE_FILES),
    ("fuzzy", Some('y'), Nothing, WHOLE_FILES),
    ("no-whole-file", None, Nothing, WHOLE_FILES),
    ("max-size", None, Value, SELECT),
    ("min-size", None, Value, SELECT),
    ("prune-empty-dirs", Some('m'), Nothing, SELECT),
    ("cvs-exclude", Some('C'), Nothing, SELECT),
    ("modify-window", None, Value, EXACT),
    ("out-format", None, Value, LINES),
    ("log-file-format", None, Value, LINES),
    ("omit-dir-times", Some('O'), Nothing, KEPT),
    ("omit-link-times", Some('J'), Nothing, KEPT),
    (
        "crtimes",
        Some('N'),
        Nothing,
        "Linux cannot set the time of birth; leave it out",
    ),
    ("no-recursive", None, Nothing, ROOTS),
    ("no-r", None, Nothing, ROOTS),
    (
        "mkpath",
        None,
        Nothing,
        "DST's parent must be there; mkdir -p makes it",
    ),
];

impl Args for Refused {
    fn augment_args(command: Command) -> Command {
        OPTIONS.iter().fold(command, |command, option| {
            let (name, short, takes, _) = *option;
            let mut arg = Arg::new(name).long(name).hide(true);
            arg = match takes {
                Value => arg.action(ArgAction::Set).allow_hyphen_values(true),
                Nothing => arg.action(ArgAction::SetTrue),
            };
            command.arg(match short {
                Some(short) => arg.short(short),
                None => arg,
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Refused::augment_args(command)
    }
}

impl FromArgMatches for Refused {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Refused, clap::Error> {
        use clap::parser::ValueSource::CommandLine;
        let given = |name: &str| matches.value_source(name) == Some(CommandLine);
        let first = OPTIONS.iter().find(|(name, ..)| given(name));
        Ok(Refused(first.map(|(name, short, _, why)| match short {
            Some(short) => format!("-{short}, --{name}: {why}"),
            None => format!("--{name}: {why}"),
        })))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Refused::from_arg_matches(matches)?;
        Ok(())
    }
}
