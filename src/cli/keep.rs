//! rsync's `--no-...`: what `sync` is told not to keep. As in rsync the last word counts:
//! `--no-owner -a` keeps the owner, `-a --no-owner` does not.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::config::Keep;

/// What is kept.
#[derive(Debug, Clone, Copy)]
pub struct KeepArgs(pub Keep);

/// Option, its short form, its help.
const OPTIONS: [(&str, Option<&str>, &str); 14] = [
    (
        "no-perms",
        Some("no-p"),
        "Mode: what is there keeps its own, what is new gets SRC's within the umask",
    ),
    (
        "no-times",
        Some("no-t"),
        "Times: the next run copies each file again, unless --size-only or -c",
    ),
    ("no-atimes", Some("no-U"), "Access times"),
    ("no-owner", Some("no-o"), "Owner"),
    ("no-group", Some("no-g"), "Group"),
    ("no-acls", Some("no-A"), "POSIX ACLs"),
    ("no-xattrs", Some("no-X"), "Extended attributes"),
    (
        "no-hard-links",
        Some("no-H"),
        "Hard links: each name becomes a file of its own",
    ),
    ("no-sparse", Some("no-S"), "Holes: zeros are written"),
    ("no-links", Some("no-l"), "Symlinks: left out"),
    ("no-D", None, "Devices, fifos and sockets: left out"),
    ("no-devices", None, "Devices: left out"),
    ("no-specials", None, "Fifos and sockets: left out"),
    // On one machine a number and its name are the same owner.
    ("no-numeric-ids", None, ""),
];

/// A thing that is kept, the options that turn it off, and those that turn it on again.
type Thing = (
    fn(&mut Keep) -> &mut bool,
    &'static [&'static str],
    &'static [&'static str],
);

const THINGS: [Thing; 12] = [
    // -A brings -p with it.
    (
        |k| &mut k.perms,
        &["no-perms"],
        &["archive", "perms", "acls"],
    ),
    (|k| &mut k.times, &["no-times"], &["archive", "times"]),
    (|k| &mut k.atimes, &["no-atimes"], &["atimes"]),
    (|k| &mut k.owner, &["no-owner"], &["archive", "owner"]),
    (|k| &mut k.group, &["no-group"], &["archive", "group"]),
    (|k| &mut k.acls, &["no-acls"], &["acls"]),
    (|k| &mut k.xattrs, &["no-xattrs"], &["xattrs"]),
    (|k| &mut k.hard_links, &["no-hard-links"], &["hard_links"]),
    (|k| &mut k.holes, &["no-sparse"], &["sparse"]),
    (|k| &mut k.symlinks, &["no-links"], &["archive", "links"]),
    (
        |k| &mut k.devices,
        &["no-devices", "no-D"],
        &["archive", "devices", "devices_specials"],
    ),
    (
        |k| &mut k.specials,
        &["no-specials", "no-D"],
        &["archive", "specials", "devices_specials"],
    ),
];

impl Args for KeepArgs {
    fn augment_args(command: Command) -> Command {
        OPTIONS.iter().fold(command, |command, option| {
            let (name, short, help) = *option;
            let arg = Arg::new(name)
                .long(name)
                .action(ArgAction::SetTrue)
                .help_heading("What is not kept")
                .help(help)
                .hide(help.is_empty());
            command.arg(match short {
                Some(short) => arg.visible_alias(short),
                None => arg,
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        KeepArgs::augment_args(command)
    }
}

impl FromArgMatches for KeepArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<KeepArgs, clap::Error> {
        let place = |id: &&str| match matches.value_source(id) {
            Some(ValueSource::CommandLine) => matches.indices_of(id)?.max(),
            _ => None,
        };
        let last = |ids: &[&str]| ids.iter().filter_map(place).max();
        let mut keep = Keep::ALL;
        for (field, off, on) in THINGS {
            let off = last(off);
            *field(&mut keep) = off.is_none() || last(on) > off;
        }
        Ok(KeepArgs(keep))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = KeepArgs::from_arg_matches(matches)?;
        Ok(())
    }
}
