//! The configuration file: what is wrong with it is one line.
#![no_main]

use clap::Parser;
use mirrorfs::cli::{Cli, Command, ConfigFile};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let file = match ConfigFile::parse(text) {
        Ok(file) => file,
        Err(line) => return assert!(!line.contains('\n'), "{line:?}"),
    };
    for words in [
        ["mirrorfs", "mount", "/a", "/b"],
        ["mirrorfs", "sync", "/a", "/b"],
    ] {
        // What a value holds is told as it is; whoever prints it escapes it.
        let told = match Cli::parse_from(words).command {
            Command::Mount(mount) => mount.config_with(&file.mount).map(drop),
            Command::Sync(sync) => sync.config_with(&file.sync).map(drop),
            _ => unreachable!(),
        };
        assert!(
            told.as_ref().err().is_none_or(|line| !line.is_empty()),
            "{told:?}"
        );
    }
});
