//! Control: the daemon's socket, where clients steer it.
//!
//! One Unix stream socket for each daemon, `<run directory>/<pid>.sock`, mode 0600, with the messages
//! of `varlink`. Only root and the daemon's own user are answered.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use rustix::io::Errno;
use serde_json::Value;

use super::keeper;
use super::out::quoted;
use super::varlink::{Asked, Call, Reply, Request, receive, refusal, send};
use super::{Failure, exit};
use crate::sys::local;

/// Longest request, bytes.
pub(super) const REQUEST_MAX: u64 = 64 << 10;
/// Clients served at a time; one more is turned away.
const CLIENTS_MAX: usize = 16;
/// How long a client may take to say what it wants, and a daemon to say who it is.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What answers a request; called on a thread of its own for each client.
/// With the client's connection, for an answer that comes from elsewhere.
pub(crate) type Handler = dyn Fn(Request, BorrowedFd<'_>) -> Result<Value, Failure> + Send + Sync;

/// Where sockets and logs live: `$MIRRORFS_RUN_DIR`, /run/mirrorfs for root,
/// `$XDG_RUNTIME_DIR/mirrorfs`, /tmp/mirrorfs-UID.
pub(crate) fn run_dir() -> PathBuf {
    if let Some(dir) = env_dir("MIRRORFS_RUN_DIR") {
        return dir;
    }
    match local::uid() {
        0 => PathBuf::from("/run/mirrorfs"),
        uid => env_dir("XDG_RUNTIME_DIR").map_or_else(
            || PathBuf::from(format!("/tmp/mirrorfs-{uid}")),
            |dir| dir.join("mirrorfs"),
        ),
    }
}

/// A directory that the environment names.
pub(super) fn env_dir(key: &str) -> Option<PathBuf> {
    let value = std::env::var_os(key).filter(|v| !v.is_empty());
    value.map(PathBuf::from)
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
        Listener::bind_in(&dir, &format!("{}.sock", keeper::lasting_pid()))
    }

    fn bind_in(dir: &Path, name: &str) -> Result<Listener, Failure> {
        let path = dir.join(name);
        let fail = |call: &str, e: std::io::Error| {
            Failure::new(exit::FAILURE, format!("{}: {call}: {e}", quoted(&path)))
        };
        // A socket that does not listen yet looks like one of a daemon that died.
        let alone = File::open(dir).map_err(|e| fail("open", e))?;
        alone.lock().map_err(|e| fail("flock", e))?;
        for path in sockets(dir) {
            // One that hangs must not keep us.
            if matches!(local::connect(&path), Err(Errno::CONNREFUSED)) {
                let _ = std::fs::remove_file(&path); // Its own daemon may have been quicker.
            }
        }
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail("unlink", e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(|e| fail("bind", e))?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, mode).map_err(|e| fail("chmod", e))?;
        Ok(Listener { listener, path })
    }

    /// The socket of the program before us in this process.
    pub(crate) fn inherited(fd: OwnedFd) -> Listener {
        Listener {
            listener: UnixListener::from(fd),
            path: run_dir().join(format!("{}.sock", keeper::lasting_pid())),
        }
    }

    /// Serves clients until the process ends.
    pub(crate) fn serve(self, handler: Arc<Handler>) -> Result<Socket, Failure> {
        let listener = Arc::new(self.listener);
        let socket = Socket {
            path: self.path,
            listener: Arc::clone(&listener),
        };
        let clients = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for stream in listener.incoming() {
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
    listener: Arc<UnixListener>,
}

impl Socket {
    /// For the next program.
    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

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
        // Read first: who hangs up on what was asked takes the answer away with it.
        receive(&mut stream, REQUEST_MAX)?;
        return send(
            &mut stream,
            &refusal(&Failure::new(exit::FAILURE, "not allowed")),
        );
    }
    // One connection may carry several calls, one after the other.
    while let Some(message) = receive(&mut stream, REQUEST_MAX)? {
        let (asked, oneway) = Call::parse(&message);
        let reply = match asked {
            Asked::Reply(reply) => reply,
            Asked::Request(request) => match handler(request, stream.as_fd()) {
                Ok(parameters) => Reply::of(parameters),
                Err(failure) => refusal(&failure),
            },
        };
        if !oneway {
            send(&mut stream, &reply)?;
        }
    }
    Ok(())
}

/// All sockets of the run directory.
pub(super) fn sockets(dir: &Path) -> Vec<PathBuf> {
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde_json::json;

    use super::super::client::ask;
    use super::*;

    #[test]
    fn who_sweeps_takes_no_socket_away_that_is_just_being_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let bind = |name: &str| {
            for n in 0..3000 {
                let listener = Listener::bind_in(dir.path(), name);
                let listener = listener.unwrap_or_else(|e| panic!("{name} {n}: {}", e.line));
                local::connect(&listener.path).unwrap_or_else(|e| panic!("{name} {n}: {e}"));
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| bind("1.sock"));
            bind("2.sock");
        });
    }

    #[test]
    fn a_daemon_answers_and_refuses_with_its_reason_and_exit_code() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("1.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let handler: Arc<Handler> = Arc::new(|request, _| match request {
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
        let reply = receive(&mut stream, 1 << 20)
            .expect("read")
            .expect("a reply");
        assert!(String::from_utf8_lossy(&reply).contains("MethodNotFound"));
    }
}
