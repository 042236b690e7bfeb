//! The words of `mount` as people write them.

use super::*;
use crate::cli::{Cli, Command};
use clap::Parser;

fn mount(args: &str) -> Result<MountConfig, String> {
    let words = ["mirrorfs", "mount"].into_iter().chain(args.split(' '));
    match Cli::try_parse_from(words)
        .map_err(|e| e.to_string())?
        .command
    {
        Command::Mount(mount) => mount.config(),
        other => Err(format!("{other:?}")),
    }
}

#[test]
fn mount_options_of_mount_8_are_ignored_and_unknown_ones_refused() {
    let config =
        mount("a b -o nofail,_netdev,x-systemd.automount,rw -o large=64K,noexec").expect("parses");
    assert_eq!(config.large_file_bytes, 65536);
    assert_eq!(config.mount_options, ["noexec"]);
    assert_eq!(config.mountpoint, config.dst);
    for words in [
        "a b -o nonsense",
        "a b -o large",
        "a b -o large=x",
        "a b -o cache=direct",
        "a b -o threads=0",
        "a b -o transport=pigeon",
    ] {
        assert!(mount(words).is_err(), "{words}");
    }
}

#[test]
fn a_rate_is_in_kib_unless_it_says_otherwise() {
    assert_eq!(rate("500"), Ok(500 << 10));
    assert_eq!(rate("200M"), Ok(200 << 20));
    assert_eq!(rate("1.5m"), Ok(3 << 19));
    assert_eq!(rate("100MB"), Ok(100_000_000));
    assert_eq!(rate("4096b"), Ok(4096));
    assert_eq!((rate("0"), rate("off")), (Ok(0), Ok(0)));
    for bad in [
        "",
        "M",
        "-1",
        "1X",
        "1e9",
        "inf",
        "0.1b",
        "1..2",
        "99999999P",
    ] {
        assert!(rate(bad).is_err(), "{bad}");
    }
}

#[test]
fn an_address_is_on_this_machine_unless_it_says_otherwise() {
    let text = |text| address(text).map(|a| a.to_string());
    assert_eq!(text("9469").as_deref(), Ok("127.0.0.1:9469"));
    assert_eq!(text("localhost:1").as_deref(), Ok("127.0.0.1:1"));
    assert_eq!(text("0.0.0.0:1").as_deref(), Ok("0.0.0.0:1"));
    assert_eq!(text("[::1]:1").as_deref(), Ok("[::1]:1"));
    assert!(address("host:1").is_err() && address("99999").is_err());
}

#[test]
fn words_come_before_the_file_and_0_lifts_what_it_says() {
    let file = MountFile {
        bwlimit: Some("1M".into()),
        jobs: Some(2),
        log_level: Some("debug".into()),
        ..MountFile::default()
    };
    let with = |args: &str| {
        let words = ["mirrorfs", "mount"].into_iter().chain(args.split(' '));
        match Cli::try_parse_from(words).expect("parses").command {
            Command::Mount(mount) => mount.config_with(&file).expect("is valid"),
            other => panic!("{other:?}"),
        }
    };
    let config = with("a b");
    assert_eq!((config.bwlimit, config.jobs), (Some(1 << 20), Some(2)));
    assert_eq!(config.log_level, LogLevel::Debug);
    let config = with("a b --bwlimit 0 -o jobs=1 --log-level warn");
    assert_eq!((config.bwlimit, config.jobs), (None, Some(1)));
    assert_eq!(config.log_level, LogLevel::Warn);
}

#[test]
fn a_size_is_a_number_and_a_unit() {
    assert_eq!(size("4096"), Ok(4096));
    assert_eq!(size("8M"), Ok(8 << 20));
    assert_eq!(size("8MiB"), Ok(8 << 20));
    assert_eq!(size("8mb"), Ok(8_000_000));
    for bad in ["", "M", "8X", "8Mi", "-1", "99999999999P", "8\u{e9}"] {
        assert!(size(bad).is_err(), "{bad}");
    }
}
