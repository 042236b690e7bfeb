//! Client: finding the daemon that serves a path, and asking it.
//!
//! A daemon is found by comparing text: a dead mount, or a src that does not answer, must not hang
//! whoever asks about it.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

use super::control::{PATIENCE, run_dir, sockets};
use super::out::quoted;
use super::report::Report;
use super::varlink::{Reply, Request, receive, send};
use super::{Failure, exit};
use crate::error::Printable;
use crate::sys::local;

/// Longest reply that a client reads: a ledger of some hundred thousand entries.
const REPLY_MAX: u64 = 256 << 20;

/// When a path's daemon has answered, others are waited for so long: several may have that path.
const OTHERS: Duration = Duration::from_millis(200);

/// A daemon that answered, seen from a client.
#[derive(Clone)]
pub(crate) struct Daemon {
    socket: PathBuf,
    /// Its answer to the first question.
    pub(crate) report: Report,
}

impl Daemon {
    /// Asks. A request that ends the migration may take as long as it takes.
    pub(crate) fn call(&self, request: &Request) -> Result<Value, Failure> {
        ask(&self.socket, request, None)
    }

    /// As `call`, and whose process it is that has answered.
    pub(crate) fn call_whose(&self, request: &Request) -> Result<(Value, u32), Failure> {
        ask_whose(&self.socket, request, None)
    }

    /// The same daemon now; `None`: it has ended, or does not answer.
    pub(crate) fn again(&self) -> Option<Daemon> {
        let value = ask(&self.socket, &Request::Status, Some(PATIENCE)).ok()?;
        let report: Report = serde_json::from_value(value).ok()?;
        let same = report.pid == self.report.pid && report.since_unix == self.report.since_unix;
        same.then(|| Daemon {
            socket: self.socket.clone(),
            report,
        })
    }
}

/// Asks the daemon behind a socket.
pub(super) fn ask(
    socket: &Path,
    request: &Request,
    patience: Option<Duration>,
) -> Result<Value, Failure> {
    ask_whose(socket, request, patience).map(|(value, _)| value)
}

fn ask_whose(
    socket: &Path,
    request: &Request,
    patience: Option<Duration>,
) -> Result<(Value, u32), Failure> {
    let fail = |call: &str, e: std::io::Error| {
        Failure::new(exit::FAILURE, format!("{}: {call}: {e}", quoted(socket)))
    };
    // A daemon that hangs, stopped by a signal or a debugger, has a full queue some day.
    let stream = local::connect(socket).map_err(|e| fail("connect", e.into()))?;
    let mut stream = UnixStream::from(stream);
    let uid = local::peer_uid(stream.as_fd()).map_err(|e| fail("getsockopt", e.into()))?;
    let timed = stream.set_read_timeout(patience);
    timed.map_err(|e| fail("setsockopt", e))?;
    send(&mut stream, &request.to_call()).map_err(|e| fail("write", e))?;
    let message = receive(&mut stream, REPLY_MAX)
        .and_then(|m| m.ok_or_else(|| ErrorKind::UnexpectedEof.into()))
        .map_err(|e| fail("read", e))?;
    let reply: Reply =
        serde_json::from_slice(&message).map_err(|e| fail("read", std::io::Error::from(e)))?;
    let Some(error) = reply.error else {
        return Ok((reply.parameters, uid));
    };
    let line = reply.parameters.get("message").and_then(Value::as_str);
    let code = reply.parameters.get("exit").and_then(Value::as_u64);
    Err(Failure::new(
        code.and_then(|c| u8::try_from(c).ok())
            .unwrap_or(exit::FAILURE),
        line.unwrap_or(&error),
    ))
}

/// All daemons of this user that answer.
pub(crate) fn daemons() -> Vec<Daemon> {
    let mut all: Vec<Daemon> = answers().iter().collect();
    all.sort_by(|a, b| a.socket.cmp(&b.socket));
    all
}

/// The same, each as soon as it answers: one that hangs keeps nobody waiting who does not ask for it.
fn answers() -> Receiver<Daemon> {
    let (tell, told) = channel();
    for socket in own_sockets() {
        let tell = tell.clone();
        let report = move || {
            let value = ask(&socket, &Request::Status, Some(PATIENCE)).ok()?;
            let report = serde_json::from_value(value).ok()?;
            tell.send(Daemon { socket, report }).ok() // Nobody listens any more: another was meant.
        };
        if let Err(e) = std::thread::Builder::new().spawn(report) {
            tracing::debug!("a thread: {e}"); // As one that does not answer.
        }
    }
    told
}

fn own_sockets() -> Vec<PathBuf> {
    let dir = run_dir();
    // In a directory of another user anybody could answer. Root may look where it wants.
    let me = local::uid();
    let ours = std::fs::metadata(&dir).is_ok_and(|m| me == 0 || m.uid() == me || m.uid() == 0);
    if !ours {
        return Vec::new();
    }
    sockets(&dir)
}

/// The daemon whose mount point, dst or src is `path`.
pub(crate) fn find(path: &Path) -> Result<Option<Daemon>, Failure> {
    // First by the text alone; only then by what the path resolves to, which may hang.
    let text = lexical(path);
    let home = text.as_deref().map(printable);
    let mut daemons = Vec::new();
    let (answers, mut found) = (answers(), false);
    while let Ok(daemon) = answers.recv_timeout(if found { OTHERS } else { 2 * PATIENCE }) {
        found |= home.iter().any(|h| daemon.report.home_names.contains(h));
        daemons.push(daemon);
    }
    if daemons.is_empty() {
        return Ok(None);
    }
    let at = match text.as_deref().map(|t| position(&daemons, t, path)) {
        Some(Ok(Some(at))) => Some(at),
        Some(Err(failure)) => return Err(failure),
        _ => match resolved(path) {
            Some(real) => position(&daemons, &real, path)?,
            None => None,
        },
    };
    Ok(at.map(|at| daemons.swap_remove(at)))
}

/// Which daemon it is: the mount point and dst decide before src, which several may share.
fn position(daemons: &[Daemon], path: &Path, said: &Path) -> Result<Option<usize>, Failure> {
    let text = Printable(path.as_os_str()).to_string();
    for names in [
        (|r: &Report| &r.home_names) as fn(&Report) -> &Vec<String>,
        |r: &Report| &r.src_names,
    ] {
        let mut found = (0..daemons.len()).filter(|i| names(&daemons[*i].report).contains(&text));
        match (found.next(), found.next()) {
            (Some(at), None) => return Ok(Some(at)),
            (Some(_), Some(_)) => {
                let line = format!("{}: several migrations use it: name DST", quoted(said));
                return Err(Failure::new(exit::USAGE, line));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// `path` as absolute text, without a look at the file system; `None` when `..` needs that look.
pub(crate) fn lexical(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let plain = path.components().all(|c| c != Component::ParentDir);
    // Collecting the components drops `.` and every slash too many.
    plain.then(|| path.components().collect())
}

/// A path as reports write it.
pub(super) fn printable(path: &Path) -> String {
    Printable(path.as_os_str()).to_string()
}

/// What `path` resolves to; `None` when that fails or takes too long.
pub(super) fn resolved(path: &Path) -> Option<PathBuf> {
    let path = path.to_path_buf();
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .spawn(move || {
            let _ = tx.send(std::fs::canonicalize(path)); // Nobody waits any more: too late.
        })
        .ok()?;
    rx.recv_timeout(Duration::from_secs(2)).ok()?.ok()
}

/// The daemon in whose tree `path` is, and the path below its mount point.
pub(crate) fn holder<'a>(daemons: &'a [Daemon], path: &Path) -> Option<(&'a Daemon, PathBuf)> {
    let text = lexical(path);
    let found = text.as_deref().and_then(|t| below(daemons, t));
    // The parent may be a symlink; the last name is what it is.
    found.or_else(|| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => below(daemons, &resolved(parent)?.join(name)),
        _ => below(daemons, &resolved(path)?),
    })
}

/// The innermost home that is `path` or above it; then the same with SRC.
fn below<'a>(daemons: &'a [Daemon], path: &Path) -> Option<(&'a Daemon, PathBuf)> {
    for names in [
        (|r: &Report| &r.home_names) as fn(&Report) -> &Vec<String>,
        |r: &Report| &r.src_names,
    ] {
        let found = path.ancestors().find_map(|above| {
            let text = Printable(above.as_os_str()).to_string();
            let daemon = daemons.iter().find(|d| names(&d.report).contains(&text))?;
            Some((daemon, path.strip_prefix(above).ok()?.to_path_buf()))
        });
        if found.is_some() {
            return found;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_compared_as_text() {
        assert_eq!(
            lexical(Path::new("/a//b/./c/")),
            Some(PathBuf::from("/a/b/c"))
        );
        assert_eq!(lexical(Path::new("/a/../b")), None);
    }
}
