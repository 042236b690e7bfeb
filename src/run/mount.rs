//! The `mount` command: preflight, what is opened before a daemon begins, and its two beginnings.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::daemon::{self, Parent};
use super::ending;
use super::front::Front;
use super::keeper::Keeper;
use super::preflight::{self, Ground};
use super::serve::serve;
use super::steer::{self, absolute};
use super::trace::Traces;
use super::upgrade::Predecessor;
use super::web;
use super::{Failure, Outcome, exit, out};
use crate::cli;
use crate::config::MountConfig;
use crate::error::{Context, Side};
use crate::mark::CONTROL_DIR;
use crate::sys::name::Name;
use crate::sys::{caps, host, local, stat};

/// `mirrorfs mount`.
pub(super) fn run(args: cli::Mount) -> Outcome {
    let config = steer::mount_config(&args)?;
    ending::wait_for(&config.dst);
    start(config, args)
}

fn start(config: MountConfig, args: cli::Mount) -> Outcome {
    // In front of everything, the log too: a refusal changes nothing.
    let ground = preflight::mount(all_absolute(config)?)?;
    hint_at_room(&ground);
    let config = &ground.config;
    if config.native && !config.over_mounts_dst() {
        let line = "--experimental-native: DST itself has to be the MOUNTPOINT";
        return Err(Failure::new(exit::USAGE, line));
    }
    let web = config.metrics.map(web::Server::bind).transpose()?;
    let args = with_absolute_file(args)?;
    let traces = Traces::open(config)?;
    // After the last port was bound; before there is a thread.
    caps::shed(config.helper).on("capset", Side::Host, ".")?;
    let (log, front) = Front::open(config)?;
    if config.foreground {
        let keeper = Keeper::start(config)?;
        log.install(config.log_level);
        let with = (args, log, web, traces, keeper);
        return serve(ground, with, &mut Parent::none(), front, None);
    }
    daemon::start(&log.clone(), |parent| {
        let keeper = Keeper::start(&ground.config)?;
        log.install(ground.config.log_level);
        let with = (args, log, web, traces, keeper);
        let outcome = serve(ground, with, parent, front, None);
        if let Err(failure) = &outcome {
            tracing::error!("{}", failure.line);
        }
        outcome
    })
}

/// Where SRC is the whole of a file system, what is in use there and free in DST can be told at once. No more than
/// a hint: holes, compression and block sizes differ, and what an earlier copy or daemon has brought is in DST already.
fn hint_at_room(ground: &Ground) {
    let trees = &ground.trees;
    let (src, dst) = (
        host::fs_stat(trees.src.as_fd()),
        host::fs_stat(trees.dst.as_fd()),
    );
    let whole =
        local::place(trees.src.as_fd()).is_ok_and(|p| p.is_some_and(|p| p.path == Path::new("/")));
    let begins = !ground.config.adopt && !holds(trees.dst.as_fd(), CONTROL_DIR);
    if let (Ok(src), Ok(dst), true, true) = (src, dst, whole, begins) {
        let used = src
            .blocks
            .saturating_sub(src.bfree)
            .saturating_mul(src.frsize);
        let free = dst.bavail.saturating_mul(dst.frsize);
        if used > free {
            out::complain(&format!(
                "SRC's file system has {} in use, DST has {} free: it may not be enough",
                out::bytes(used),
                out::bytes(free)
            ));
        }
    }
}

fn holds(dir: BorrowedFd<'_>, name: &str) -> bool {
    let name = Name::new(name.as_bytes());
    name.is_some_and(|name| stat::stat_at(dir, name.as_cstr()).is_ok())
}

/// Goes on with a mount that another program has served in this process, or under this keeper.
pub(super) fn take_over(before: &Predecessor, keeper: Option<Keeper>) -> Outcome {
    let saved = before.saved();
    let (log, front) = Front::open(&saved.config)?;
    log.install(saved.config.log_level);
    caps::shed(saved.config.helper).on("capset", Side::Host, ".")?;
    let web = saved.config.metrics.map(web::Server::bind).transpose();
    let web = web.unwrap_or_else(|failure| {
        tracing::warn!("{}; metrics are not served any more", failure.line);
        None
    });
    let traces = Traces::resumed(&saved.config);
    let (ground, args) = (before.ground()?, saved.args.clone());
    serve(
        ground,
        (args, log, web, traces, keeper),
        &mut Parent::none(),
        front,
        Some(before),
    )
}

/// The daemon's working directory is `/`: from here on every path says where it starts.
fn all_absolute(mut config: MountConfig) -> Result<MountConfig, Failure> {
    let paths = [&mut config.src, &mut config.dst, &mut config.mountpoint];
    let files = [
        &mut config.log_file,
        &mut config.metrics_file,
        &mut config.record,
        &mut config.replay,
        &mut config.manifest,
    ];
    for path in paths.into_iter().chain(files.into_iter().flatten()) {
        *path = absolute(path)?;
    }
    Ok(config)
}

/// SIGHUP reads the file again.
fn with_absolute_file(mut args: cli::Mount) -> Result<cli::Mount, Failure> {
    if let Some(path) = args.config_file() {
        let path = absolute(&path)?;
        args.options.push(format!("config={}", path.display()));
        args.options.rotate_right(1); // The first one counts.
    }
    Ok(args)
}
