//! The `mount` command: preflight, mirror, session, walker; then events until the mount is gone.
//!
//!   Preparing -> Serving    attach()              the parent is told, users are in
//!   Serving   -> Finished   finish()              nothing pending: traces removed, detached
//!   Serving   -> Stopping   INT, TERM, Stop       detached; what is pending stays pending
//!   Serving   -> Stopping   somebody's umount     likewise
//!   any       -> (exit)     the last open file was closed

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::control::{self, Handler, Listener, Request};
use super::daemon::{self, Parent};
use super::live::Screen;
use super::log::Log;
use super::out::quoted;
use super::preflight::{self, Ground};
use super::status::{Live, Phase};
use super::{Failure, Outcome, exit};
use crate::config::MountConfig;
use crate::error::Error;
use crate::fuse::session::Session;
use crate::mirror::Mirror;
use crate::progress::Progress;
use crate::sys::host;
use crate::walk::{Mode, Walker};

/// How often the main loop looks around when nothing happens.
const TICK: Duration = Duration::from_millis(200);

/// `--finish` that was refused is tried again after this long.
const FINISH_PAUSE: Duration = Duration::from_secs(10);

/// What the main loop waits for.
enum Event {
    Signal(i32),
    Finish {
        accept_loss: bool,
        reply: Sender<Result<Value, Failure>>,
    },
    Stop {
        reply: Sender<Result<Value, Failure>>,
    },
}

/// `mirrorfs mount`.
pub(super) fn run(config: MountConfig) -> Outcome {
    // In front of everything, the log too: a refusal changes nothing.
    let ground = preflight::mount(absolute(config)?)?;
    let config = &ground.config;
    if config.foreground {
        let screen = Screen::new();
        let log = match &config.log_file {
            Some(path) => Log::file(path)?,
            None => Log::stderr(screen.bars()),
        };
        log.install(config.log_level);
        return serve(ground, &log, &mut Parent::none(), Some(screen));
    }
    let path = match &config.log_file {
        Some(path) => path.clone(),
        None => control::make_run_dir()?.join(log_name(&config.dst)),
    };
    let log = Log::file(&path)?;
    daemon::start(&log, |parent| {
        log.install(ground.config.log_level);
        let outcome = serve(ground, &log, parent, None);
        if let Err(failure) = &outcome {
            tracing::error!("{}", failure.line);
        }
        outcome
    })
}

/// The daemon's working directory is `/`: from here on every path says where it starts.
fn absolute(mut config: MountConfig) -> Result<MountConfig, Failure> {
    let absolute = |path: &mut PathBuf| -> Result<(), Failure> {
        let full = std::path::absolute(&*path)
            .map_err(|e| Failure::new(exit::USAGE, format!("{}: {e}", quoted(path))))?;
        *path = full.components().collect();
        Ok(())
    };
    absolute(&mut config.src)?;
    absolute(&mut config.dst)?;
    absolute(&mut config.mountpoint)?;
    if let Some(path) = &mut config.log_file {
        absolute(path)?;
    }
    Ok(config)
}

/// One log for each dst: its last name for people, a hash for uniqueness.
fn log_name(dst: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let hash = xxhash_rust::xxh3::xxh3_64(dst.as_os_str().as_bytes());
    let name = dst.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(48)
        .collect();
    format!("{name}-{hash:016x}.log")
}

fn serve(ground: Ground, log: &Log, parent: &mut Parent, mut screen: Option<Screen>) -> Outcome {
    host::raise_nofile();
    let progress = Arc::new(Progress::default());
    progress.paused.store(!ground.config.background, Relaxed);
    let live = Arc::new(Live::new(&ground, progress.clone())?);
    let Ground {
        config,
        trees,
        dead,
        ..
    } = ground;
    let listener = Listener::bind()?;
    let mirror = Mirror::open(&config, trees, progress)?;
    let (events_in, events) = bounded(64);
    watch_signals(events_in.clone())?;
    // Before the mount is seen: who sees it finds its daemon.
    let socket = listener.serve(handler(live.clone(), mirror.clone(), events_in))?;
    let session = match Session::start(mirror.clone(), &config, dead.on_mountpoint) {
        Ok(session) => session,
        Err(error) => {
            socket.close();
            return Err(error.into());
        }
    };
    session.attach()?;
    dead.detach_elsewhere();
    live.set_phase(Phase::Serving);
    let mode = if config.background {
        Mode::Pull
    } else {
        Mode::Sweep
    };
    let walker = match Walker::start(mirror.clone(), mode) {
        Ok(walker) => walker,
        Err(error) => {
            session.detach()?;
            return Err(error.into());
        }
    };
    tracing::info!(
        "usable: {} on {}",
        quoted(&config.src),
        quoted(&config.mountpoint)
    );

    let served = Served {
        config: &config,
        log,
        live: &live,
        mirror: &mirror,
        session: &session,
    };
    let end = match parent.ready() {
        true => served.until_the_end(&events, &mut screen),
        false => served.detach().map(|()| Phase::Stopping),
    };
    // Whoever asks from now on is told so, instead of waiting for an answer.
    drop(events);
    walker.stop();
    if let Ok(phase) = &end {
        live.set_phase(*phase);
    }
    let waited = session.wait();
    mirror.stop();
    socket.close();
    let report = live.report();
    tracing::info!("{}", report.line());
    if let Some(screen) = &mut screen {
        screen.close(report.state_name(), &report.counts);
    }
    let end = end?;
    waited?;
    Ok(match end {
        Phase::Finished if report.counts.errors > 0 => exit::SOME_FAILED,
        Phase::Finished => exit::DONE,
        _ if mirror.progress().complete.load(Relaxed) && report.counts.errors == 0 => exit::DONE,
        _ => exit::INTERRUPTED,
    })
}

/// The pieces of a mount in service.
struct Served<'a> {
    config: &'a MountConfig,
    log: &'a Log,
    live: &'a Live,
    mirror: &'a Mirror,
    session: &'a Session,
}

impl Served<'_> {
    /// Handles events until the mount is detached; says how it ended.
    fn until_the_end(
        &self,
        events: &Receiver<Event>,
        screen: &mut Option<Screen>,
    ) -> Result<Phase, Failure> {
        let mut sampled = Instant::now();
        let mut told_degraded = false;
        let mut finish_again: Option<Instant> = None;
        self.live.tick();
        loop {
            let event = match events.recv_timeout(TICK) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                // The signal thread lives as long as the process; without it the tick remains.
                Err(RecvTimeoutError::Disconnected) => {
                    std::thread::sleep(TICK);
                    None
                }
            };
            match event {
                Some(Event::Signal(SIGHUP)) => self.log.reopen(),
                Some(Event::Signal(SIGUSR1)) => self.line(screen),
                // What cannot be detached (something is mounted on top) is served on.
                Some(Event::Signal(_)) => match self.detach() {
                    Ok(()) => return Ok(Phase::Stopping),
                    Err(failure) => tracing::error!("{}", failure.line),
                },
                Some(Event::Stop { reply }) => {
                    let detached = self.detach();
                    let stopped = detached.is_ok();
                    answer(&reply, detached.map(|()| json!({})));
                    if stopped {
                        return Ok(Phase::Stopping);
                    }
                }
                Some(Event::Finish { accept_loss, reply }) => match self.finish(accept_loss) {
                    Ok(()) => {
                        answer(&reply, Ok(json!({})));
                        return Ok(Phase::Finished);
                    }
                    Err(failure) => answer(&reply, Err(failure)),
                },
                None => {}
            }
            let finished = self.live.phase() == Phase::Finished;
            if self.session.is_detached() {
                tracing::info!("unmounted by somebody else");
                return Ok(if finished {
                    Phase::Finished
                } else {
                    Phase::Stopping
                });
            }
            if self.config.finish && !finished && self.mirror.progress().complete.load(Relaxed) {
                if self.mirror.progress().errors.get() == 0 {
                    if finish_again.is_none_or(|at| Instant::now() >= at) {
                        match self.finish(false) {
                            Ok(()) => return Ok(Phase::Finished),
                            Err(failure) => tracing::error!("{}", failure.line),
                        }
                        finish_again = Some(Instant::now() + FINISH_PAUSE);
                    }
                } else if !std::mem::replace(&mut told_degraded, true) {
                    tracing::warn!("not finished: {}", self.live.report().action);
                }
            }
            if sampled.elapsed() >= Duration::from_secs(1) {
                sampled = Instant::now();
                self.live.tick();
            }
            if let Some(screen) = screen {
                let report = self.live.report();
                screen.show(report.state_name(), &report.counts);
            }
        }
    }

    fn line(&self, screen: &mut Option<Screen>) {
        let report = self.live.report();
        match screen {
            Some(screen) => screen.line(report.state_name(), &report.counts),
            None => tracing::info!("{}", report.line()),
        }
    }

    fn detach(&self) -> Result<(), Failure> {
        if !self.session.is_detached() {
            self.session.detach()?;
        }
        Ok(())
    }

    /// While users still work in the mount: dst is the truth, so they notice nothing.
    fn finish(&self, accept_loss: bool) -> Result<(), Failure> {
        self.mirror.finish(accept_loss).map_err(|error| {
            let errors = self.mirror.progress().errors.get();
            refused(error, errors)
        })?;
        self.live.set_phase(Phase::Finished);
        tracing::info!("finished");
        Ok(self.session.detach()?)
    }
}

/// A refusal to finish: 23 when the ledger is the reason, 1 otherwise.
pub(super) fn refused(error: Error, ledger: u64) -> Failure {
    match error {
        Error::Unusable(line) if ledger > 0 => Failure::new(exit::SOME_FAILED, line),
        Error::Unusable(line) => Failure::new(exit::FAILURE, line),
        other => other.into(),
    }
}

fn answer(reply: &Sender<Result<Value, Failure>>, result: Result<Value, Failure>) {
    let _ = reply.send(result); // A client that went away does not need it.
}

fn handler(live: Arc<Live>, mirror: Arc<Mirror>, events: Sender<Event>) -> Arc<Handler> {
    let json = |value: serde_json::Result<Value>| {
        value.map_err(|e| Failure::new(exit::FAILURE, format!("json: {e}")))
    };
    Arc::new(move |request| {
        let (reply, answer) = bounded(1);
        let event = match request {
            Request::Status => return json(serde_json::to_value(live.report())),
            Request::Errors => return json(serde_json::to_value(mirror.ledger_entries())),
            Request::Finish { accept_loss } => Event::Finish { accept_loss, reply },
            Request::Stop => Event::Stop { reply },
        };
        let stopping = || Failure::new(exit::FAILURE, "the daemon is stopping");
        events.send(event).map_err(|_| stopping())?;
        answer.recv().map_err(|_| stopping())?
    })
}

/// Signals become events; a second INT or TERM exits at once.
fn watch_signals(events: Sender<Event>) -> Result<(), Failure> {
    let fail = |e: std::io::Error| Failure::new(exit::FAILURE, format!("signals: {e}"));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]).map_err(fail)?;
    let watch = move || {
        let mut stopping = false;
        for signal in signals.forever() {
            if matches!(signal, SIGINT | SIGTERM) && std::mem::replace(&mut stopping, true) {
                signal_hook::low_level::exit(i32::from(exit::INTERRUPTED));
            }
            // Full: the main loop is busy; a line of progress more or less is nothing, and INT
            // comes again.
            let _ = events.try_send(Event::Signal(signal)); // See above.
        }
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(watch).map(|_| ()).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_name_is_one_safe_component() {
        let name = log_name(Path::new("/srv/a b\n"));
        assert!(
            name.starts_with("a_b_-") && name.ends_with(".log"),
            "{name}"
        );
        assert_ne!(log_name(Path::new("/a/x")), log_name(Path::new("/b/x")));
    }
}
