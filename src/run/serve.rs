//! A mount in service: mirror, session, walker; then events until the mount is gone.
//!
//!   Preparing -> Serving    attach()              the parent is told, users are in
//!   Serving   -> Finished   finish()              nothing pending: traces removed, detached
//!   Serving   -> Stopping   INT, TERM, Stop       detached; what is pending stays pending
//!   Serving   -> Stopping   somebody's umount     likewise
//!   any       -> (exit)     the last open file was closed

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use sd_notify::NotifyState;
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use super::background::Background;
use super::control::{Handler, Listener, Socket};
use super::daemon::Parent;
use super::front::Front;
use super::keeper::Keeper;
use super::live::{Every, LINE_EVERY};
use super::log::Log;
use super::manifest::{self, Unended};
use super::metrics::Exporter;
use super::out::quoted;
use super::preflight::Ground;
use super::saver::{Saver, WRITE_MAX};
use super::signals;
use super::steer::Wheel;
use super::trace::Traces;
use super::upgrade::{self, Predecessor};
use super::varlink::Request;
use super::watch::{Phase, Watch};
use super::web;
use super::{Failure, Outcome, exit, finish, finished};
use crate::cli;
use crate::config::MountConfig;
use crate::error::Error;
use crate::fuse::session::{Point, Session};
use crate::mirror::Mirror;
use crate::native::{self, Native};
use crate::progress::Progress;
use crate::pull::replay::Replay;
use crate::sys::{fault, host, view};

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
    Upgrade {
        binary: Option<PathBuf>,
        client: OwnedFd,
        reply: Sender<Result<Value, Failure>>,
    },
}

/// SRC must not change; what could change it at another place is worth a line.
fn warn_of_writers(ground: &Ground) {
    let points = view::writable_elsewhere(ground.trees.src.as_fd());
    if let Some(first) = points.first() {
        let more = match points.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        tracing::warn!(
            "SRC can be written at {}{more} too: nobody should, until the migration is finished",
            quoted(first)
        );
    }
}

/// What a mount is served with.
pub(super) type Given = (cli::Mount, Log, Option<web::Server>, Traces, Option<Keeper>);

/// Serves until the mount is gone.
pub(super) fn serve(
    ground: Ground,
    (args, log, web, traces, keeper): Given,
    parent: &mut Parent,
    mut front: Front,
    before: Option<&Predecessor>,
) -> Outcome {
    host::widen_fd_table(host::raise_nofile());
    fault::end_at_a_deadlock();
    let progress = Arc::new(Progress::default());
    if before.is_none() {
        warn_of_writers(&ground);
    }
    let watch = match before {
        None => Watch::new(&ground, progress.clone()),
        Some(before) => Watch::again(&ground, progress.clone(), &before.saved().watch),
    };
    let watch = Arc::new(watch?);
    let Ground {
        config,
        trees,
        dead,
        point,
        ..
    } = ground;
    let (listener, mirror) = match before {
        None => (Listener::bind()?, Mirror::open(&config, trees, progress)?),
        Some(before) => (before.listener()?, before.mirror(&config, trees, progress)?),
    };
    if let (Some(keeper), None) = (&keeper, before) {
        mirror.keep_on(Arc::clone(keeper.board()));
    }
    watch.set_mirror(mirror.clone());
    if let Some(file) = traces.record {
        mirror.record_into(file)?;
    }
    manifest::begin(&mirror, &config, before.is_some())?;
    let wheel = Arc::new(Wheel::new(args.clone(), log, mirror.clone()));
    let (events_in, events) = bounded(64);
    let told = events_in.clone();
    // Full: the main loop is busy; a line of progress more or less is nothing, and INT comes again.
    let tell = move |signal| drop(told.try_send(Event::Signal(signal)));
    signals::watch(keeper.is_some(), tell)?;
    // Before the mount is seen: who sees it finds its daemon.
    let socket = listener.serve(handler(watch.clone(), wheel.clone(), events_in))?;
    let may_find = config.native && before.is_none();
    let guard = may_find.then(|| native::find_guard(&mirror)).transpose()?;
    let guard = guard.flatten();
    let point = point.filter(|_| guard.is_none());
    let session = match begin(&mirror, &config, point, before) {
        Ok(session) => session,
        Err(failure) if before.is_some() => return Err(failure),
        Err(failure) => {
            socket.close();
            return Err(failure);
        }
    };
    if let Some(session) = &session {
        let state = upgrade::Served {
            config: &config,
            args: &args,
            watch: &watch,
            mirror: &mirror,
            session,
            listener: socket.listener(),
        };
        session.attach(|| keeper.iter().for_each(|k| k.begin(&state)))?;
    }
    dead.detach_elsewhere();
    watch.set_phase(Phase::Serving);
    let background = match Background::start(&config, &mirror, guard) {
        Ok(background) => background,
        Err(error) => {
            session.as_ref().map_or(Ok(()), Session::detach)?;
            return Err(error.into());
        }
    };
    if let Background::Walker(walker) = &background {
        wheel.set_walker(walker.clone());
    }
    let replay = traces.replay.map(|trace| Replay::start(&mirror, trace));
    let replay = replay.transpose()?;
    tracing::info!(
        "usable: {} on {}",
        quoted(&config.src),
        quoted(&config.mountpoint)
    );
    tell_systemd(&[NotifyState::Ready]);

    let served = Served {
        exporter: Exporter::start(config.metrics_file.clone(), web, &watch),
        config: &config,
        wheel: &wheel,
        watch: &watch,
        mirror: &mirror,
        session: session.as_ref(),
        background: &background,
        args: &args,
        socket,
        saver: Saver::start(&mirror)?,
        keeper: keeper.as_ref(),
    };
    served.keep();
    if let Some(before) = before {
        before.answer();
    }
    let end = match parent.ready() {
        true => served.until_the_end(&events, &mut front),
        false => served.detach().map(|()| Phase::Stopping),
    };
    // Whoever asks from now on is told so, instead of waiting for an answer.
    drop(events);
    served.close(end, replay, front)
}

/// The session: a new mount, or the predecessor's. What a guard watches needs none, and has no point.
fn begin(
    mirror: &Arc<Mirror>,
    config: &MountConfig,
    point: Option<Point>,
    before: Option<&Predecessor>,
) -> Result<Option<Session>, Failure> {
    let new = |point| Session::start(mirror.clone(), config, point).map_err(Failure::from);
    match before {
        None => point.map(new).transpose(),
        Some(before) => before.session(mirror.clone()).map(Some),
    }
}

/// Nothing happens unless systemd has started us and wants to know.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        tracing::debug!("systemd: {e}");
    }
}

/// The pieces of a mount in service.
struct Served<'a> {
    config: &'a MountConfig,
    wheel: &'a Wheel,
    watch: &'a Watch,
    mirror: &'a Mirror,
    /// Without one a guard watches.
    session: Option<&'a Session>,
    background: &'a Background,
    args: &'a cli::Mount,
    socket: Socket,
    exporter: Exporter,
    saver: Saver,
    /// Who keeps the mount when we are killed.
    keeper: Option<&'a Keeper>,
}

impl Served<'_> {
    /// What the next program has to know.
    fn state(&self) -> Option<upgrade::Served<'_>> {
        Some(upgrade::Served {
            config: self.config,
            args: self.args,
            watch: self.watch,
            mirror: self.mirror,
            session: self.session?,
            listener: self.socket.listener(),
        })
    }

    /// Writes down what may have changed.
    fn keep(&self) {
        if let (Some(keeper), Some(state)) = (self.keeper, self.state()) {
            keeper.write(&state);
        }
    }

    /// Stops everything in its order; the exit code.
    fn close(
        self,
        end: Result<Phase, Failure>,
        replay: Option<Replay>,
        mut front: Front,
    ) -> Outcome {
        self.background.stop();
        if let Ok(phase) = &end {
            self.watch.set_phase(*phase);
        }
        tell_systemd(&[NotifyState::Stopping]);
        let waited = self.session.map_or(Ok(()), Session::wait);
        self.mirror.stop();
        if let Some(replay) = replay {
            replay.join();
        }
        self.saver.save_within(WRITE_MAX);
        manifest::unended(self.mirror, self.config);
        self.exporter.stop();
        self.socket.close();
        let report = self.watch.report();
        tracing::info!("{}", report.line());
        if let Front::Screen(screen) = &mut front {
            screen.close(&report.state_text(), &report.counts);
        }
        let end = end?;
        waited?;
        let complete = self.mirror.progress().complete.load(Relaxed);
        Ok(match end {
            Phase::Finished if report.counts.errors > 0 => exit::SOME_FAILED,
            Phase::Finished => exit::DONE,
            _ if complete && report.counts.errors == 0 => exit::DONE,
            _ => exit::INTERRUPTED,
        })
    }

    /// Handles events until the mount is detached; says how it ended.
    fn until_the_end(&self, events: &Receiver<Event>, front: &mut Front) -> Result<Phase, Failure> {
        let mut second = Every::new(Duration::from_secs(1));
        let mut line = Every::new(LINE_EVERY);
        let mut told_degraded = false;
        let mut finish_again: Option<Instant> = None;
        self.watch.tick();
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
            if let Some(event) = event
                && let Some(phase) = self.on(event, front)
            {
                return Ok(phase);
            }
            let finished = self.watch.phase() == Phase::Finished;
            self.go_native();
            if self.is_detached() && !self.is_native() {
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
                            Ok(report) => {
                                self.end_manifest(&report, events);
                                return Ok(Phase::Finished);
                            }
                            Err(failure) => tracing::error!("{}", failure.line),
                        }
                        finish_again = Some(Instant::now() + FINISH_PAUSE);
                    }
                } else if !std::mem::replace(&mut told_degraded, true) {
                    tracing::warn!("not finished: {}", self.watch.report().action);
                }
            }
            if second.is_due() {
                self.watch.tick();
                self.keep();
            }
            let line_due = line.is_due();
            if line_due {
                self.saver.save();
                self.mirror.flush_proof();
                tell_systemd(&[NotifyState::Status(&self.watch.report().line())]);
            }
            front.show(self.watch, line_due);
        }
    }

    /// One event; a phase when it ends the mount.
    fn on(&self, event: Event, front: &mut Front) -> Option<Phase> {
        match event {
            Event::Signal(SIGHUP) => self.wheel.reread(),
            Event::Signal(SIGUSR1) => front.line(self.watch),
            Event::Signal(SIGUSR2) => self.wheel.toggle(),
            // What cannot be detached (something is mounted on top) is served on.
            Event::Signal(_) => match self.detach() {
                Ok(()) => return Some(Phase::Stopping),
                Err(failure) => tracing::error!("{}", failure.line),
            },
            Event::Stop { reply } => {
                let detached = self.detach();
                let stopped = detached.is_ok();
                answer(&reply, detached.map(|()| json!({})));
                return stopped.then_some(Phase::Stopping);
            }
            Event::Upgrade {
                binary,
                client,
                reply,
            } => {
                let refused = match (self.keeper, self.background.native()) {
                    (Some(_), _) => Some("upgrade: not with --keep-mount: stop it and mount again"),
                    (_, Some(_)) => {
                        Some("upgrade: not with --experimental-native: stop it and mount again")
                    }
                    _ => None,
                };
                let (Some(served), None) = (self.state(), refused) else {
                    let line = refused.unwrap_or("upgrade: without a mount");
                    answer(&reply, Err(Failure::new(exit::FAILURE, line)));
                    return None;
                };
                if !self.saver.save_within(WRITE_MAX) {
                    let line = "upgrade: DST takes no writes: it is frozen, or its disk does not answer; try again then";
                    answer(&reply, Err(Failure::new(exit::FAILURE, line)));
                    return None;
                }
                self.mirror.flush_proof();
                // It comes back only when there is no other program.
                let failure = served.hand_over(binary.as_deref(), client.as_fd());
                self.wheel.kick();
                tracing::warn!("{}", failure.line);
                answer(&reply, Err(failure));
            }
            Event::Finish { accept_loss, reply } => match self.finish(accept_loss) {
                Ok(report) => {
                    answer(&reply, Ok(report));
                    return Some(Phase::Finished);
                }
                Err(failure) => answer(&reply, Err(failure)),
            },
        }
        None
    }

    /// Ends the manifest, until a signal comes.
    fn end_manifest(&self, report: &Value, events: &Receiver<Event>) {
        if let Some(manifest) = report.get("manifest").and_then(Unended::from_json) {
            let (stop, reading) = (Arc::default(), Arc::default());
            self.watch.set_reading(Arc::clone(&reading));
            let mut line = Every::new(LINE_EVERY);
            std::thread::scope(|scope| {
                let work = scope.spawn(|| manifest.end_in_daemon(&stop, &reading));
                while !work.is_finished() {
                    if line.is_due() {
                        tell_systemd(&[NotifyState::Status(&self.watch.report().line())]);
                    }
                    if let Ok(Event::Signal(SIGINT | SIGTERM)) = events.recv_timeout(TICK) {
                        stop.store(true, Relaxed);
                    }
                }
            });
        }
    }

    fn detach(&self) -> Result<(), Failure> {
        match self.session {
            Some(session) if !self.is_detached() => Ok(session.detach()?),
            _ => Ok(()),
        }
    }

    fn is_detached(&self) -> bool {
        self.session.is_none_or(Session::is_detached)
    }

    fn is_native(&self) -> bool {
        self.background.native().is_some_and(Native::is_native)
    }

    /// The mount goes as soon as it may.
    fn go_native(&self) {
        let Some(native) = self.background.native().filter(|n| n.wants_detach()) else {
            return;
        };
        match self.detach() {
            Ok(()) => native.detached(),
            Err(failure) => tracing::error!("{}", failure.line),
        }
    }

    /// While users still work in the mount: dst is the truth, so they notice nothing.
    fn finish(&self, accept_loss: bool) -> Result<Value, Failure> {
        let (src, dst) = (&self.config.src, &self.config.dst);
        let root = self.mirror.dst_root().as_fd();
        finished::remember(src, dst, root);
        let lost = self.mirror.ledger_entries();
        let rests = self.mirror.finish(accept_loss).map_err(|error| {
            finished::forget(dst, root);
            let errors = self.mirror.progress().errors.get();
            refused(error, errors)
        })?;
        self.watch.set_phase(Phase::Finished);
        tracing::info!("finished");
        for entry in lost.iter().filter(|e| !e.is_extra()) {
            tracing::warn!("lost or not whole, as accepted: {}", entry.message);
        }
        let counts = self.watch.report().counts;
        let report = finish::write_report(src, dst, (&lost, &rests), Some(&counts));
        self.background.end();
        self.detach()?;
        let lost = lost.iter().filter(|e| !e.is_extra()).count();
        let manifest = manifest::unended(self.mirror, self.config);
        Ok(json!({
            "lost": lost,
            "dst": dst,
            "mountpoint": self.config.mountpoint,
            "report": report,
            "manifest": manifest,
        }))
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

fn handler(watch: Arc<Watch>, wheel: Arc<Wheel>, events: Sender<Event>) -> Arc<Handler> {
    let json = |value: serde_json::Result<Value>| {
        value.map_err(|e| Failure::new(exit::FAILURE, format!("json: {e}")))
    };
    Arc::new(move |request, client| {
        let (reply, answer) = bounded(1);
        let event = match request {
            Request::Status => return json(serde_json::to_value(watch.report())),
            Request::Errors => {
                return json(serde_json::to_value(watch.ledger()).map(|e| json!({ "entries": e })));
            }
            Request::Finish { accept_loss } => Event::Finish { accept_loss, reply },
            Request::Stop => Event::Stop { reply },
            Request::Upgrade { binary } => Event::Upgrade {
                binary,
                client: host::dup(client)
                    .map_err(|e| Failure::new(exit::FAILURE, format!("dup: {e}")))?,
                reply,
            },
            other => match wheel.turn(&other) {
                Some(result) => return result,
                None => return Err(Failure::new(exit::FAILURE, "no such request")),
            },
        };
        let stopping = || Failure::new(exit::FAILURE, "the daemon is stopping");
        events.send(event).map_err(|_| stopping())?;
        answer.recv().map_err(|_| stopping())?
    })
}
