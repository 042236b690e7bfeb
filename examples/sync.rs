//! Copies a tree with everything preserved: `cargo run --release --example sync -- SRC DST`.

#![allow(clippy::print_stdout)] // A program's output.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mirrorfs::config::SyncConfig;
use mirrorfs::progress::Progress;
use mirrorfs::sync::{self, Event};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(src), Some(dst)) = (args.next(), args.next()) else {
        return Err("usage: sync SRC DST [--delete] [--checksum] [--dry-run] [--no-fsync]".into());
    };
    let mut config = SyncConfig::new(src, dst);
    for arg in args {
        match arg.as_str() {
            "--delete" => config.delete = true,
            "--checksum" => config.checksum = true,
            "--dry-run" => config.dry_run = true,
            "--itemize" => config.itemize = true,
            "--no-fsync" => config.fsync = mirrorfs::config::Fsync::Never,
            other => match other.strip_prefix("-j").and_then(|n| n.parse().ok()) {
                Some(jobs) => config.jobs = Some(jobs),
                None => return Err(format!("unknown option {other}").into()),
            },
        }
    }
    let stop = AtomicBool::new(false);
    let report = sync::run(
        &config,
        Arc::new(Progress::default()),
        &stop,
        &mut |event| match event {
            Event::Line(line) => println!("{line}"),
            Event::Error(error) => eprintln!("{error}"),
            Event::LeftOut(_) => {}
        },
    )?;
    eprintln!(
        "{} entries, {} made, {} updated, {} equal, {} links, {} bytes, {} errors, {:.3} s, {} threads, {:.0} % busy",
        report.entries,
        report.created,
        report.updated,
        report.skipped,
        report.hardlinks,
        report.bytes_copied,
        report.failed + report.vanished,
        report.elapsed.as_secs_f64(),
        report.threads,
        100.0 * report.utilisation
    );
    Ok(())
}
