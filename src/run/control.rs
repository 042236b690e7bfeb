//! Control: how `status`, `finish` and `errors` talk to the daemon.
//!
//! One Unix stream socket for each daemon, `<run directory>/<pid>.sock`, mode 0600. Varlink's
//! framing: a JSON object and a NUL each way, `{"method":"org.mirrorfs.Status","parameters":{}}`
//! and `{"parameters":{...}}` or `{"error":"org.mirrorfs.Refused","parameters":{...}}`.
//!
//! A client finds the daemon by a path, comparing text: a dead mount must not hang it.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::out::quoted;
use super::report::Report;
use super::{Failure, exit};
use crate::error::Printable;
use crate::sys::local;

/// Prefix of all names on the wire.
const INTERFACE: &str = "org.mirrorfs.";
/// Longest request.
const REQUEST_MAX: u64 = 64 << 10;
/// Longest reply that a client reads: a ledger of some hundred thousand entries.
const REPLY_MAX: u64 = 256 << 20;
/// Clients served at a time; one more is turned away.
const CLIENTS_MAX: usize = 16;
/// How long a client may take to say what it wants, and a daemon to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// How far are you?
    Status,
    /// End the migration.
    Finish {
        /// Although the ledger is not empty.
        accept_loss: bool,
    },
    /// The ledger.
    Errors,
    /// Detach and exit; what is pending stays pending.
    Stop,
}

/// A request on the wire.
#[derive(Serialize, Deserialize)]
struct Call {
    method: String,
    #[serde(default)]
    parameters: Value,
}

/// A reply on the wire.
#[derive(Serialize, Deserialize)]
struct Reply {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(default)]
    parameters: Value,
}

impl Request {
    fn to_call(&self) -> Call {
        let (name, parameters) = match self {
            Request::Status => ("Status", json!({})),
            Request::Finish { accept_loss } => ("Finish", json!({ "accept_loss": accept_loss })),
            Request::Errors => ("Errors", json!({})),
            Request::Stop => ("Stop", json!({})),
        };
        Call {
            method: format!("{INTERFACE}{name}"),
            parameters,
        }
    }

    fn from_call(call: &Call) -> Option<Request> {
        match call.method.strip_prefix(INTERFACE)? {
            "Status" => Some(Request::Status),
            "Finish" => Some(Request::Finish {
                accept_loss: call.parameters.get("accept_loss") == Some(&Value::Bool(true)),
            }),
            "Errors" => Some(Request::Errors),
            "Stop" => Some(Request::Stop),
            _ => None,
        }
    }
}

/// What answers a request; called on a thread of its own for each client.
pub(crate) type Handler = dyn Fn(Request) -> Result<Value, Failure> + Send + Sync;

/// Where sockets and logs live: `$MIRRORFS_RUN_DIR`, /run/mirrorfs for root,
/// `$XDG_RUNTIME_DIR/mirrorfs`, /tmp/mirrorfs-UID.
pub(crate) fn run_dir() -> PathBuf {
    let env = |key| {
        std::env::var_os(key)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if let Some(dir) = env("MIRRORFS_RUN_DIR") {
        return dir;
    }
    match local::uid() {
        0 => PathBuf::from("/run/mirrorfs"),
        uid => env("XDG_RUNTIME_DIR").map_or_else(
            || PathBuf::from(format!("/tmp/mirrorfs-{uid}")),
            |dir| dir.join("mirrorfs"),
        ),
    }
}

/// The run directory, made when it is missing. It must be ours: /tmp is everybody's.
pub(crate) fn make_run_dir() -> Result<PathBuf, Failure> {
    let dir = run_dir();
    let fail = |call: &str, e: &dyn std::fmt::Display| {
        Failure::new(exit::FAILURE, format!("{}: {call}: {e}", quoted(&dir)))
    };
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir);
    made.map_err(|e| fail("mkdir", &e))?;
    let meta = std::fs::symlink_metadata(&dir).map_err(|e| fail("lstat", &e))?;
    if !meta.is_dir() || meta.uid() != local::uid() {
        return Err(fail("lstat", &"not a directory of this user"));
    }
    Ok(dir)
}

/// The daemon's socket; nobody is served yet.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds this process's socket and sweeps away those of daemons that died.
    pub(crate) fn bind() -> Result<Listener, Failure> {
        let dir = make_run_dir()?;
        for path in sockets(&dir) {
            if let Err(e) = UnixStream::connect(&path)
                && e.kind() == ErrorKind::ConnectionRefused
            {
                let _ = std::fs::remove_file(&path); // Another daemon may have been quicker.
            }
        }
        let path = dir.join(format!("{}.sock", std::process::id()));
        let fail = |call: &str, e: std::io::Error| {
            Failure::new(exit::FAILURE, format!("{}: {call}: {e}", quoted(&path)))
        };
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail("unlink", e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(|e| fail("bind", e))?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, mode).map_err(|e| fail("chmod", e))?;
        Ok(Listener { listener, path })
    }

    /// Serves clients until the process ends.
    pub(crate) fn serve(self, handler: Arc<Handler>) -> Result<Socket, Failure> {
        let socket = Socket { path: self.path };
        let clients = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for stream in self.listener.incoming() {
                let Ok(stream) = stream else {
                    // Out of fds, most likely: others give some back.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                if clients.fetch_add(1, SeqCst) >= CLIENTS_MAX {
                    clients.fetch_sub(1, SeqCst);
                    continue;
                }
                let (handler, clients) = (handler.clone(), clients.clone());
                let gone = clients.clone();
                let spawned = std::thread::Builder::new()
                    .name("client".into())
                    .spawn(move || {
                        if let Err(e) = serve_client(stream, &*handler) {
                            tracing::debug!("control: {e}");
                        }
                        clients.fetch_sub(1, SeqCst);
                    });
                if spawned.is_err() {
                    gone.fetch_sub(1, SeqCst);
                }
            }
        };
        std::thread::Builder::new()
            .name("control".into())
            .spawn(accept)
            .map_err(|e| Failure::new(exit::FAILURE, format!("control thread: {e}")))?;
        Ok(socket)
    }
}

/// The name of a socket that is served.
pub(crate) struct Socket {
    path: PathBuf,
}

impl Socket {
    /// Takes the name away: no client finds us any more.
    pub(crate) fn close(self) {
        let _ = std::fs::remove_file(&self.path); // Left behind, the next daemon sweeps it.
    }
}

fn serve_client(mut stream: UnixStream, handler: &Handler) -> std::io::Result<()> {
    let peer = local::peer_uid(stream.as_fd()).map_err(std::io::Error::from)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    if peer != 0 && peer != local::uid() {
        return send(
            &mut stream,
            &refusal(&Failure::new(exit::FAILURE, "not allowed")),
        );
    }
    // One connection may carry several calls, one after the other.
    while let Some(message) = receive(&mut stream, REQUEST_MAX)? {
        let call: Option<Call> = serde_json::from_slice(&message).ok();
        let reply = match call.as_ref().and_then(Request::from_call) {
            Some(request) => match handler(request) {
                Ok(parameters) => Reply {
                    error: None,
                    parameters,
                },
                Err(failure) => refusal(&failure),
            },
            None => Reply {
                error: Some("org.varlink.service.MethodNotFound".into()),
                parameters: json!({ "method": call.map(|c| c.method) }),
            },
        };
        send(&mut stream, &reply)?;
    }
    Ok(())
}

fn refusal(failure: &Failure) -> Reply {
    Reply {
        error: Some(format!("{INTERFACE}Refused")),
        parameters: json!({ "message": failure.line, "exit": failure.exit }),
    }
}

fn send(stream: &mut UnixStream, message: &impl Serialize) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(0);
    stream.write_all(&bytes)
}

/// One message without its NUL; `None` when the other side has closed.
fn receive(stream: &mut UnixStream, max: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut message = Vec::new();
    let mut buf = [0; 16 << 10];
    loop {
        let n = match stream.read(&mut buf) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            n => n?,
        };
        if n == 0 {
            return match message.is_empty() {
                true => Ok(None),
                false => Err(ErrorKind::UnexpectedEof.into()),
            };
        }
        // A peer sends its next call after our reply only, so that the NUL ends the buffer.
        message.extend_from_slice(&buf[..n]);
        if message.last() == Some(&0) {
            message.pop();
            return Ok(Some(message));
        }
        if message.len() as u64 > max {
            return Err(ErrorKind::InvalidData.into());
        }
    }
}

/// A daemon that answered, seen from a client.
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
}

fn ask(socket: &Path, request: &Request, patience: Option<Duration>) -> Result<Value, Failure> {
    let fail = |call: &str, e: std::io::Error| {
        Failure::new(exit::FAILURE, format!("{}: {call}: {e}", quoted(socket)))
    };
    let mut stream = UnixStream::connect(socket).map_err(|e| fail("connect", e))?;
    let timed = stream.set_read_timeout(patience);
    timed.map_err(|e| fail("setsockopt", e))?;
    send(&mut stream, &request.to_call()).map_err(|e| fail("write", e))?;
    let message = receive(&mut stream, REPLY_MAX)
        .and_then(|m| m.ok_or_else(|| ErrorKind::UnexpectedEof.into()))
        .map_err(|e| fail("read", e))?;
    let reply: Reply =
        serde_json::from_slice(&message).map_err(|e| fail("read", std::io::Error::from(e)))?;
    let Some(error) = reply.error else {
        return Ok(reply.parameters);
    };
    let line = reply.parameters.get("message").and_then(Value::as_str);
    let code = reply.parameters.get("exit").and_then(Value::as_u64);
    Err(Failure::new(
        code.and_then(|c| u8::try_from(c).ok())
            .unwrap_or(exit::FAILURE),
        line.unwrap_or(&error),
    ))
}

fn sockets(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "sock"))
        .collect();
    paths.sort();
    paths
}

/// All daemons of this user that answer.
pub(crate) fn daemons() -> Vec<Daemon> {
    let report = |socket: PathBuf| {
        let value = ask(&socket, &Request::Status, Some(PATIENCE)).ok()?;
        let report = serde_json::from_value(value).ok()?;
        Some(Daemon { socket, report })
    };
    let dir = run_dir();
    // In a directory of another user anybody could answer. Root may look where it wants.
    let me = local::uid();
    let ours = std::fs::metadata(&dir).is_ok_and(|m| me == 0 || m.uid() == me || m.uid() == 0);
    if !ours {
        return Vec::new();
    }
    sockets(&dir).into_iter().filter_map(report).collect()
}

/// The daemon whose mount point, dst or src is `path`.
pub(crate) fn find(path: &Path) -> Result<Option<Daemon>, Failure> {
    let mut daemons = daemons();
    if daemons.is_empty() {
        return Ok(None);
    }
    // First by the text alone; only then by what the path resolves to, which may hang.
    let text = lexical(path);
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

/// What `path` resolves to; `None` when that fails or takes too long.
fn resolved(path: &Path) -> Option<PathBuf> {
    let path = path.to_path_buf();
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .spawn(move || {
            let _ = tx.send(std::fs::canonicalize(path)); // Nobody waits any more: too late.
        })
        .ok()?;
    rx.recv_timeout(Duration::from_secs(2)).ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        for request in [
            Request::Status,
            Request::Finish { accept_loss: true },
            Request::Finish { accept_loss: false },
            Request::Errors,
            Request::Stop,
        ] {
            assert_eq!(Request::from_call(&request.to_call()), Some(request));
        }
    }

    #[test]
    fn a_daemon_answers_and_refuses_with_its_reason_and_exit_code() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("1.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let handler: Arc<Handler> = Arc::new(|request| match request {
            Request::Errors => Ok(json!([1, 2])),
            _ => Err(Failure::new(23, "3 entries in the ledger")),
        });
        let _socket = Listener {
            listener,
            path: path.clone(),
        }
        .serve(handler)
        .expect("serve");
        assert_eq!(ask(&path, &Request::Errors, None), Ok(json!([1, 2])));
        assert_eq!(
            ask(&path, &Request::Stop, None),
            Err(Failure::new(23, "3 entries in the ledger"))
        );
        let mut stream = UnixStream::connect(&path).expect("connect");
        stream.write_all(b"nonsense\0").expect("write");
        let reply = receive(&mut stream, REPLY_MAX)
            .expect("read")
            .expect("a reply");
        assert!(String::from_utf8_lossy(&reply).contains("MethodNotFound"));
    }

    #[test]
    fn a_path_is_compared_as_text() {
        assert_eq!(
            lexical(Path::new("/a//b/./c/")),
            Some(PathBuf::from("/a/b/c"))
        );
        assert_eq!(lexical(Path::new("/a/../b")), None);
    }
}
