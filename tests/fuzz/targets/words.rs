//! The command line and -o: sizes, rates, durations, addresses.
#![no_main]

use clap::Parser;
use mirrorfs::cli::{Cli, Command};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let words = text.split('\0').filter(|w| !w.starts_with("--config"));
    let Ok(cli) = Cli::try_parse_from(std::iter::once("mirrorfs").chain(words)) else {
        return;
    };
    match cli.command {
        Command::Mount(mount) => {
            if let Ok(config) = mount.config() {
                assert!((1..=256).contains(&config.threads) && (1..=256).contains(&config.workers));
            }
        }
        Command::Sync(sync) => drop(sync.config()),
        _ => {}
    }
});
