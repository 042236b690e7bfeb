//! Varlink: the messages between `mirrorfs` and its daemon, and how they travel.
//!
//! https://varlink.org: a JSON object and a NUL each way over a Unix stream socket,
//! `{"method":"org.mirrorfs.Status","parameters":{}}` and `{"parameters":{...}}` or
//! `{"error":"org.mirrorfs.Refused","parameters":{...}}`. docs/org.mirrorfs.varlink describes the
//! methods, and the daemon gives it out as org.varlink.service wants it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Failure;
use crate::config::LogLevel;

/// The interface of a daemon.
pub(crate) const INTERFACE: &str = "org.mirrorfs";
/// Every Varlink service has this one.
const SERVICE: &str = "org.varlink.service";
/// What the interface is, in Varlink's own language.
const IDL: &str = include_str!("../../docs/org.mirrorfs.varlink");

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
    /// Give up what the ledger says of these paths of SRC.
    AcceptLoss {
        /// As the ledger has them.
        paths: Vec<PathBuf>,
    },
    /// Try again what is in the ledger.
    Retry,
    /// Detach and exit; what is pending stays pending.
    Stop,
    /// Hold the background.
    Pause,
    /// Let the background go on.
    Resume,
    /// End the background.
    Cancel,
    /// Change the background's limits.
    Set(Settings),
    /// Let another program take over.
    Upgrade {
        /// `None`: what the daemon was started from, as it is now.
        binary: Option<PathBuf>,
    },
    /// Pull these now: paths below the mount point.
    Pull {
        /// Relative; the empty one is the mount point itself.
        paths: Vec<PathBuf>,
    },
}

/// What `set` changes; `None` stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Bytes per second; 0: no limit.
    pub(crate) bwlimit: Option<u64>,
    /// Threads of each kind in the background; 0: all.
    pub(crate) jobs: Option<usize>,
    /// How much is logged.
    pub(crate) log: Option<LogLevel>,
}

/// A request on the wire.
#[derive(Serialize, Deserialize)]
pub(super) struct Call {
    method: String,
    #[serde(default)]
    parameters: Value,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) oneway: bool,
}

/// A reply on the wire.
#[derive(Serialize, Deserialize)]
pub(super) struct Reply {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    #[serde(default)]
    pub(super) parameters: Value,
}

/// What a message asks of us.
pub(super) enum Asked {
    /// The daemon decides.
    Request(Request),
    /// Answered here.
    Reply(Reply),
}

impl Request {
    /// As it is sent.
    pub(super) fn to_call(&self) -> Call {
        let (name, parameters) = match self {
            Request::Status => ("Status", json!({})),
            Request::Finish { accept_loss } => ("Finish", json!({ "accept_loss": accept_loss })),
            Request::Errors => ("Errors", json!({})),
            Request::AcceptLoss { paths } => {
                let paths: Vec<Value> = paths.iter().map(|p| path_to_json(p)).collect();
                ("AcceptLoss", json!({ "paths": paths }))
            }
            Request::Retry => ("Retry", json!({})),
            Request::Stop => ("Stop", json!({})),
            Request::Pause => ("Pause", json!({})),
            Request::Resume => ("Resume", json!({})),
            Request::Cancel => ("Cancel", json!({})),
            Request::Set(settings) => ("Set", settings.to_json()),
            Request::Upgrade { binary } => {
                let binary = binary.as_deref().map(path_to_json);
                ("Upgrade", json!({ "binary": binary }))
            }
            Request::Pull { paths } => {
                let paths: Vec<Value> = paths.iter().map(|p| path_to_json(p)).collect();
                ("Pull", json!({ "paths": paths }))
            }
        };
        Call {
            method: format!("{INTERFACE}.{name}"),
            parameters,
            oneway: false,
        }
    }
}

impl Settings {
    fn to_json(self) -> Value {
        let mut fields = serde_json::Map::new();
        if let Some(rate) = self.bwlimit {
            fields.insert("bwlimit".into(), rate.into());
        }
        if let Some(jobs) = self.jobs {
            fields.insert("jobs".into(), jobs.into());
        }
        if let Some(level) = self.log {
            fields.insert("log".into(), level.name().into());
        }
        Value::Object(fields)
    }

    fn from_json(parameters: &Value) -> Result<Settings, &'static str> {
        let number = |key: &'static str| match parameters.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or(key),
        };
        let jobs = number("jobs")?.map(usize::try_from);
        let log = match parameters.get("log") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let level = value.as_str().and_then(LogLevel::from_name);
                Some(level.ok_or("log")?)
            }
        };
        Ok(Settings {
            bwlimit: number("bwlimit")?,
            jobs: jobs.transpose().map_err(|_| "jobs")?,
            log,
        })
    }
}

impl Call {
    /// What it asks; a message that is no call is a method that nobody has.
    pub(super) fn parse(message: &[u8]) -> (Asked, bool) {
        match serde_json::from_slice::<Call>(message) {
            Ok(call) => (call.asked(), call.oneway),
            Err(_) => (
                Asked::Reply(service_error("MethodNotFound", "method", "")),
                false,
            ),
        }
    }

    fn asked(&self) -> Asked {
        let unknown = || Asked::Reply(service_error("MethodNotFound", "method", &self.method));
        let Some((interface, method)) = self.method.rsplit_once('.') else {
            return unknown();
        };
        match (interface, method) {
            (SERVICE, "GetInfo") => Asked::Reply(Reply::of(json!({
                "vendor": "mirrorfs",
                "product": "mirrorfs",
                "version": env!("CARGO_PKG_VERSION"),
                "url": "",
                "interfaces": [SERVICE, INTERFACE],
            }))),
            (SERVICE, "GetInterfaceDescription") => self.description(),
            (INTERFACE, method) => match self.request(method) {
                Ok(Some(request)) => Asked::Request(request),
                Ok(None) => unknown(),
                Err(field) => Asked::Reply(service_error("InvalidParameter", "parameter", field)),
            },
            _ => unknown(),
        }
    }

    fn description(&self) -> Asked {
        let name = self.parameters.get("interface").and_then(Value::as_str);
        Asked::Reply(match name {
            Some(INTERFACE) => Reply::of(json!({ "description": IDL })),
            Some(other) => service_error("InterfaceNotFound", "interface", other),
            None => service_error("InvalidParameter", "parameter", "interface"),
        })
    }

    fn paths(&self) -> Result<Vec<PathBuf>, &'static str> {
        let paths = self.parameters.get("paths").and_then(Value::as_array);
        let paths = paths.ok_or("paths")?.iter().map(path_from_json);
        paths.collect::<Option<Vec<_>>>().ok_or("paths")
    }

    /// `None`: there is no such method. `Err`: the parameter that is wrong.
    fn request(&self, method: &str) -> Result<Option<Request>, &'static str> {
        Ok(Some(match method {
            "Status" => Request::Status,
            "Finish" => Request::Finish {
                accept_loss: match self.parameters.get("accept_loss") {
                    None | Some(Value::Null) => false,
                    Some(value) => value.as_bool().ok_or("accept_loss")?,
                },
            },
            "Errors" => Request::Errors,
            "Stop" => Request::Stop,
            "Pause" => Request::Pause,
            "Resume" => Request::Resume,
            "Cancel" => Request::Cancel,
            "Set" => Request::Set(Settings::from_json(&self.parameters)?),
            "Upgrade" => Request::Upgrade {
                binary: match self.parameters.get("binary") {
                    None | Some(Value::Null) => None,
                    Some(path) => Some(path_from_json(path).ok_or("binary")?),
                },
            },
            "Pull" => Request::Pull {
                paths: self.paths()?,
            },
            "AcceptLoss" => Request::AcceptLoss {
                paths: self.paths()?,
            },
            "Retry" => Request::Retry,
            _ => return Ok(None),
        }))
    }
}

impl Reply {
    /// All went well.
    pub(super) fn of(parameters: Value) -> Reply {
        Reply {
            error: None,
            parameters,
        }
    }
}

fn service_error(name: &str, key: &str, value: &str) -> Reply {
    Reply {
        error: Some(format!("{SERVICE}.{name}")),
        parameters: json!({ key: value }),
    }
}

/// A path as the ledger writes it too: the text, and the bytes where it is not UTF-8.
pub(super) fn path_to_json(path: &Path) -> Value {
    match path.to_str() {
        Some(text) => json!({ "path": text }),
        None => {
            let bytes = path.as_os_str().as_bytes();
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            json!({ "path": path.to_string_lossy(), "path_hex": hex })
        }
    }
}

fn path_from_json(value: &Value) -> Option<PathBuf> {
    let Some(hex) = value.get("path_hex").and_then(Value::as_str) else {
        return value.get("path")?.as_str().map(PathBuf::from);
    };
    let pairs = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes = pairs.map(byte).collect::<Option<Vec<u8>>>()?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes)))
}

/// Why not, and the exit code that says so.
pub(super) fn refusal(failure: &Failure) -> Reply {
    Reply {
        error: Some(format!("{INTERFACE}.Refused")),
        parameters: json!({ "message": failure.line, "exit": failure.exit }),
    }
}

/// Sends one message.
pub(super) fn send(stream: &mut UnixStream, message: &impl Serialize) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(0);
    stream.write_all(&bytes)
}

/// One message without its NUL; `None` when the other side has closed.
pub(super) fn receive(stream: &mut UnixStream, max: u64) -> std::io::Result<Option<Vec<u8>>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        use std::os::unix::ffi::OsStringExt;
        let odd = std::ffi::OsString::from_vec(b"a\xff/b".to_vec());
        for request in [
            Request::Status,
            Request::Finish { accept_loss: true },
            Request::Finish { accept_loss: false },
            Request::Errors,
            Request::AcceptLoss {
                paths: vec!["a".into()],
            },
            Request::Retry,
            Request::Stop,
            Request::Pause,
            Request::Resume,
            Request::Cancel,
            Request::Set(Settings::default()),
            Request::Set(Settings {
                bwlimit: Some(0),
                jobs: Some(3),
                log: Some(LogLevel::Debug),
            }),
            Request::Upgrade { binary: None },
            Request::Upgrade {
                binary: Some("/usr/bin/mirrorfs".into()),
            },
            Request::Pull {
                paths: vec!["a/b".into(), odd.into(), "".into()],
            },
        ] {
            let message = serde_json::to_vec(&request.to_call()).expect("JSON");
            match Call::parse(&message) {
                (Asked::Request(back), false) => assert_eq!(back, request),
                _ => panic!("{request:?}"),
            }
        }
    }

    #[track_caller]
    fn expect_error(message: &str, error: &str, parameters: Value) {
        match Call::parse(message.as_bytes()) {
            (Asked::Reply(reply), _) => {
                assert_eq!(reply.error.as_deref(), Some(error), "{message}");
                assert_eq!(reply.parameters, parameters, "{message}");
            }
            (Asked::Request(request), _) => panic!("{message}: {request:?}"),
        }
    }

    #[test]
    fn what_is_wrong_with_a_call_is_told_in_varlinks_own_errors() {
        let not_found = "org.varlink.service.MethodNotFound";
        expect_error("nonsense", not_found, json!({ "method": "" }));
        for method in ["org.mirrorfs.Frob", "org.other.Status", "Status"] {
            let call = json!({ "method": method }).to_string();
            expect_error(&call, not_found, json!({ "method": method }));
        }
        for (method, parameters, wrong) in [
            ("Set", json!({ "bwlimit": -1 }), "bwlimit"),
            ("Set", json!({ "jobs": "all" }), "jobs"),
            ("Set", json!({ "log": "loud" }), "log"),
            ("Finish", json!({ "accept_loss": "yes" }), "accept_loss"),
            ("Pull", json!({ "paths": ["a"] }), "paths"),
            ("Pull", json!({}), "paths"),
        ] {
            let call =
                json!({ "method": format!("org.mirrorfs.{method}"), "parameters": parameters });
            let invalid = "org.varlink.service.InvalidParameter";
            expect_error(&call.to_string(), invalid, json!({ "parameter": wrong }));
        }
    }

    #[test]
    fn the_service_describes_itself() {
        let call = |name: &str, parameters: Value| {
            let call = json!({ "method": format!("org.varlink.service.{name}"), "parameters": parameters });
            match Call::parse(call.to_string().as_bytes()) {
                (Asked::Reply(reply), _) => reply.parameters,
                (Asked::Request(request), _) => panic!("{request:?}"),
            }
        };
        let info = call("GetInfo", json!({}));
        assert!(
            info["interfaces"]
                .as_array()
                .expect("a list")
                .contains(&json!(INTERFACE))
        );
        let described = call("GetInterfaceDescription", json!({ "interface": INTERFACE }));
        let idl = described["description"].as_str().expect("text");
        for method in [
            "Status",
            "Finish",
            "Errors",
            "AcceptLoss",
            "Retry",
            "Stop",
            "Pause",
            "Resume",
            "Cancel",
            "Set",
            "Pull",
            "Upgrade",
        ] {
            assert!(idl.contains(&format!("method {method}(")), "{method}");
        }
    }
}
