//! Keeper: the parent of a daemon whose mount outlives it (`--keep-mount`).
//!
//!   made       start(): a process and its child with one table of fds; the child is the daemon
//!   written    whatever the kernel relies on is on a board at any moment (`mirror/kept.rs`)
//!   killed     the keeper runs the program again in its own place, with the board and every fd
//!   resumed    that closes what no record names, makes itself a child, which goes on with the mount
//!
//! The keeper's pid stays the same, so it is what a shell or systemd has started: it passes signals on, and
//! ends with the daemon's exit code. A daemon that ends by itself, with whatever code, is not replaced; nor
//! one that is killed again and again right after its start.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::out;
use super::upgrade::{Predecessor, Saved, Served};
use super::{Failure, exit, mount};
use crate::config::{MountConfig, Transport};
use crate::fuse::succession;
use crate::mirror::{Left, gone_fd, kind};
use crate::sys::board::{Board, Record};
use crate::sys::keeper::{self, Ended, Split};
use crate::sys::view::View;
use crate::sys::{fault, host, local, succeed};

/// First word of a program that goes on after a kill. The fds of the board and of the program follow, and
/// how often in a row a daemon was killed right after its start.
const KEPT: &str = "--kept";
/// Words before those that the daemon was started with.
const OWN_WORDS: usize = 4;
/// A daemon that dies sooner has hardly served anybody.
const SOON: Duration = Duration::from_secs(5);
/// So many of them in a row, and the mount is given up.
const SOON_MAX: u32 = 20;

/// The keeper's pid, in its daemon.
static PID: OnceLock<u32> = OnceLock::new();

/// The number that the daemon's socket is known by: it outlives the daemon.
pub(super) fn lasting_pid() -> u32 {
    PID.get().copied().unwrap_or_else(std::process::id)
}

/// A daemon's side of its keeper.
pub(super) struct Keeper {
    board: Arc<Board>,
    written: RefCell<Written>,
}

#[derive(Default)]
struct Written {
    base: Option<(Vec<u8>, Record)>,
    /// SRC's root under a number that stays its own.
    src: Option<(Arc<View>, OwnedFd)>,
    told_alone: bool,
}

impl Keeper {
    /// Makes a keeper of this process, and comes back in its child, the daemon. No thread may exist yet.
    /// `None`: none is asked for.
    pub(super) fn start(config: &MountConfig) -> Result<Option<Keeper>, Failure> {
        if !config.keep_mount {
            return Ok(None);
        }
        let refuse = |why: &str| Failure::new(exit::USAGE, format!("--keep-mount: {why}"));
        if config.transport == Transport::Uring {
            return Err(refuse(
                "not with --transport uring: its queues die with the daemon",
            ));
        }
        if config.native {
            return Err(refuse("not with --experimental-native"));
        }
        if config.rootless || config.helper || local::uid() != 0 {
            return Err(refuse("for root only"));
        }
        let fail = |call: &str, e: &dyn std::fmt::Display| {
            Failure::new(exit::FAILURE, format!("--keep-mount: {call}: {e}"))
        };
        let board = Board::create().map_err(|e| fail("memory", &e))?;
        let program = File::open("/proc/self/exe").map_err(|e| fail("/proc/self/exe", &e))?;
        // Both live as long as the table of fds.
        let memory = host::dup(board.memory()).map_err(|e| fail("dup", &e))?;
        let numbers = (memory.into_raw_fd(), program.into_raw_fd());
        part(numbers, 0).map_err(|e| fail("clone3", &e))?;
        keeper::hold_signals(false).map_err(|e| fail("sigmask", &e))?;
        Ok(Some(Keeper::of(board, None)))
    }

    fn of(board: Arc<Board>, base: Option<Record>) -> Keeper {
        let _ = PID.set(keeper::parent()); // Once.
        let written = Written {
            base: base.map(|record| (record.bytes().to_vec(), record)),
            ..Written::default()
        };
        Keeper {
            board,
            written: RefCell::new(written),
        }
    }

    pub(super) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Right before anybody can see the mount: from here on it is kept, if the kernel and dst are good
    /// for it.
    pub(super) fn begin(&self, served: &Served<'_>) {
        let cannot = served.session.cannot_hand_over();
        if let Some(line) = cannot.or_else(|| served.mirror.cannot_hand_over())
            && self.board.spoil()
        {
            tracing::warn!("the mount is not kept: {line}");
        }
        self.write(served);
    }

    /// Writes down what is not a record of its own. Called every second.
    pub(super) fn write(&self, served: &Served<'_>) {
        let mut written = self.written.borrow_mut();
        if keeper::parent() != lasting_pid() && !std::mem::replace(&mut written.told_alone, true) {
            tracing::warn!("the mount is not kept any more: its keeper is gone");
        }
        if let Err(line) = written.write(&self.board, served)
            && self.board.spoil()
        {
            tracing::warn!("the mount is not kept any more: {line}");
        }
    }
}

impl Written {
    fn write(&mut self, board: &Arc<Board>, served: &Served<'_>) -> Result<(), String> {
        let (view, _) = served.mirror.kept();
        let same = |(old, _): &(Arc<View>, OwnedFd)| Arc::ptr_eq(old, &view);
        let before = match self.src.as_ref().is_some_and(same) {
            true => None,
            false => {
                let root = host::dup(view.original()).map_err(|e| format!("dup: {e}"))?;
                self.src.replace((Arc::clone(&view), root))
            }
        };
        let src = self.src.as_ref().map_or(-1, |(_, fd)| fd.as_raw_fd());
        let base = served.base(src).map_err(|e| e.to_string())?;
        let bytes = serde_json::to_vec(&base).map_err(|e| e.to_string())?;
        if self.base.as_ref().is_none_or(|(old, _)| *old != bytes) {
            // The new one is there before the old one goes; `put` has told when there is no room.
            let record = board.put(kind::BASE, 0, &bytes);
            self.base = record.map(|record| (bytes, record));
        }
        drop(before); // Named by no record any more.
        Ok(())
    }
}

/// Parts in two; comes back in the daemon. The keeper never does.
fn part((board, program): (RawFd, RawFd), soon: u32) -> rustix::io::Result<()> {
    keeper::hold_signals(true)?;
    match keeper::split() {
        Ok(Split::Worker) => {
            keeper::set_name(c"mirrorfs");
            Ok(())
        }
        Ok(Split::Keeper(pid)) => keep(pid, (board, program), soon),
        Err(errno) => {
            keeper::hold_signals(false)?;
            Err(errno)
        }
    }
}

/// Waits for the daemon's end. Whatever this process owns is the daemon's too: nothing of it is touched.
fn keep(daemon: i32, (board, program): (RawFd, RawFd), soon: u32) -> ! {
    keeper::set_name(c"mirrorfs-keeper");
    let begun = Instant::now();
    let end = |line: &str| -> ! {
        out::complain(&format!("keeper: {line}"));
        keeper::exit(exit::FAILURE)
    };
    let signal = match keeper::wait(daemon) {
        Ok(Ended::Exited(code)) => keeper::exit(code),
        Ok(Ended::Killed(signal)) => signal,
        Err(errno) => end(&format!("wait: {errno}")),
    };
    let soon = match begun.elapsed() < SOON {
        true => soon + 1,
        false => 0,
    };
    if soon >= SOON_MAX {
        end(&format!(
            "the daemon was ended by signal {signal}, {soon} times within {} s of its start: the mount \
             is dead: the same `mirrorfs mount` resumes",
            SOON.as_secs()
        ));
    }
    out::complain(&format!(
        "keeper: the daemon was ended by signal {signal}: another one goes on"
    ));
    if let Err(errno) = keeper::keep_all() {
        end(&format!("fcntl: {errno}"));
    }
    end(&exec((board, program), soon))
}

/// Runs the program again in this process. It comes back only with why not.
fn exec((board, program): (RawFd, RawFd), soon: u32) -> String {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    if words.get(1).is_some_and(|w| w == KEPT) {
        words.drain(1..(1 + OWN_WORDS).min(words.len()));
    }
    let own = [
        KEPT.to_owned(),
        board.to_string(),
        program.to_string(),
        soon.to_string(),
    ];
    let at = 1.min(words.len());
    words.splice(at..at, own.map(OsString::from));
    let words = words.iter().map(|word| CString::new(word.as_bytes()));
    match (
        words.collect::<Result<Vec<_>, _>>(),
        CString::new(format!("/proc/self/fd/{program}")),
    ) {
        (Ok(words), Ok(program)) => format!("exec: {}", succeed::exec(&program, &words)),
        _ => "a NUL in a word".to_owned(),
    }
}

/// When this program was started by a keeper, in its place.
pub(super) fn called(words: &[OsString]) -> Option<ExitCode> {
    if words.get(1)? != KEPT {
        return None;
    }
    let number = |n: usize| words.get(n)?.to_str()?.parse::<i32>().ok();
    let (board, program) = (number(2)?, number(3)?);
    let soon = u32::try_from(number(4)?).ok()?;
    Some(ExitCode::from(match go_on((board, program), soon) {
        Ok(code) => code,
        Err(line) => {
            out::complain(&format!(
                "keeper: {line}; the mount is dead: the same `mirrorfs mount` resumes"
            ));
            exit::FAILURE
        }
    }))
}

fn go_on(numbers: (RawFd, RawFd), soon: u32) -> Result<u8, String> {
    let memory = keeper::take(numbers.0).map_err(|e| format!("board: {e}"))?;
    let copy = host::dup(memory.as_fd()).map_err(|e| format!("dup: {e}"))?;
    // The number itself is the next keeper's.
    let _ = memory.into_raw_fd(); // As said.
    let board = Board::open(copy).map_err(|e| format!("board: {e}"))?;
    if !board.is_whole() {
        return Err("the mount was not kept".to_owned());
    }
    let (saved, mut kept) = look(&board)?;
    kept.extend([numbers.0, numbers.1, board.memory().as_raw_fd()]);
    keeper::close_others(&kept).map_err(|e| format!("close: {e}"))?;
    drop(kept);
    part(numbers, soon).map_err(|e| format!("clone3: {e}"))?;
    let mut left = Left::of(board.take_over());
    // Until a new one is written this is what the next keeper finds.
    let base = left.base.pop();
    fault::point("left-taken");
    let keeper = Keeper::of(Arc::clone(&board), base);
    let before = Predecessor::killed(saved, board, left);
    match mount::take_over(&before, Some(keeper)) {
        Ok(code) => Ok(code),
        Err(failure) => {
            tracing::error!("{}", failure.line);
            Err(failure.line)
        }
    }
}

/// The last base, and every fd that a record names.
fn look(board: &Arc<Board>) -> Result<(Saved, HashSet<RawFd>), String> {
    let (mut bases, mut kept) = (Vec::new(), HashSet::new());
    board.each(|kind, bytes| match kind {
        kind::BASE => bases.push(Saved::parse(bytes)),
        kind::GONE => kept.extend(gone_fd(bytes)),
        kind::FILE | kind::LISTING => kept.extend(succession::fd_of(bytes)),
        _ => {}
    });
    // Two, while one takes the other's place: both are true.
    let saved = bases.pop().ok_or("nothing was served yet")??;
    kept.extend(saved.fds());
    for other in bases.into_iter().flatten() {
        kept.extend(other.fds());
    }
    Ok((saved, kept))
}
