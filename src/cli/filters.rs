//! The options that select names. They are one list: which of two comes first decides.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::OsStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::config::FilterArg;

/// `--exclude`, `--include`, `--filter`, `-F` and the files of the first two, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters(pub Vec<FilterArg>);

/// Name, short form, what its value is called, help.
const OPTIONS: [(&str, Option<char>, &str, &str); 6] = [
    (
        "exclude",
        None,
        "PATTERN",
        "Leave out what the pattern is about",
    ),
    (
        "include",
        None,
        "PATTERN",
        "Do not leave it out, whatever comes behind",
    ),
    (
        "exclude-from",
        None,
        "FILE",
        "Read patterns of --exclude from a file; -: standard input",
    ),
    (
        "include-from",
        None,
        "FILE",
        "Read patterns of --include from a file; -: standard input",
    ),
    ("filter", Some('f'), "RULE", "Add a rule of rsync's filters"),
    (
        "per-dir-filter",
        Some('F'),
        "",
        "Rules from .rsync-filter in each directory; twice: leave that file out",
    ),
];
const HEADING: &str = "What is copied";

impl Args for Filters {
    fn augment_args(command: Command) -> Command {
        OPTIONS.iter().fold(command, |command, option| {
            let (name, short, value, help) = *option;
            let mut arg = Arg::new(name)
                .action(ArgAction::Append)
                .help(help)
                .help_heading(HEADING)
                .value_parser(OsStringValueParser::new());
            arg = match value {
                "" => arg.num_args(0).default_missing_value(""),
                _ => arg.long(name).value_name(value).allow_hyphen_values(true),
            };
            command.arg(match short {
                Some(short) => arg.short(short),
                None => arg,
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Filters::augment_args(command)
    }
}

impl FromArgMatches for Filters {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Filters, clap::Error> {
        let mut all = Vec::new();
        for (name, ..) in OPTIONS {
            let values = matches.get_many::<OsString>(name).into_iter().flatten();
            let at = matches.indices_of(name).into_iter().flatten();
            for (at, value) in at.zip(values) {
                let value = value.clone();
                let arg = match name {
                    "exclude" => FilterArg::Exclude(value),
                    "include" => FilterArg::Include(value),
                    "exclude-from" => FilterArg::ExcludeFrom(PathBuf::from(value)),
                    "include-from" => FilterArg::IncludeFrom(PathBuf::from(value)),
                    "filter" => FilterArg::Rule(value),
                    _ => FilterArg::PerDir,
                };
                all.push((at, arg));
            }
        }
        all.sort_by_key(|(at, _)| *at);
        Ok(Filters(all.into_iter().map(|(_, arg)| arg).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Filters::from_arg_matches(matches)?;
        Ok(())
    }
}
