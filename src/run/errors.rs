//! The `errors` command: the ledger, from the daemon or from dst; what is tried again, or given up.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::varlink::Request;
use super::{Failure, Outcome, client, exit, out, preflight};
use crate::cli;
use crate::sys::name::RelPath;

/// How the entries are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A line for people.
    Text,
    /// An object on each line.
    Json,
    /// Paths, each ended by a NUL.
    Null,
}

impl Format {
    /// What the flags say.
    pub(super) fn of(args: &cli::Errors) -> Format {
        match (args.json, args.null) {
            (true, _) => Format::Json,
            (_, true) => Format::Null,
            _ => Format::Text,
        }
    }
}

/// A path below SRC, as the ledger has it.
pub(super) fn rel_path(path: &Path) -> Result<RelPath, Failure> {
    RelPath::from_bytes(path.as_os_str().as_bytes()).ok_or_else(|| {
        let line = format!("{}: not a path below SRC", out::quoted(path));
        Failure::new(exit::USAGE, line)
    })
}

/// `mirrorfs errors`.
pub(super) fn run(args: &cli::Errors) -> Outcome {
    if args.retry {
        return match client::find(&args.path)? {
            Some(daemon) => daemon.call(&Request::Retry).map(|_| exit::DONE),
            None => {
                let line = format!("PATH {}: no daemon serves it", out::quoted(&args.path));
                Err(Failure::new(exit::UNUSABLE, line))
            }
        };
    }
    match args.accept_loss.is_empty() {
        true => list(&args.path, Format::of(args)),
        false => accept(&args.path, &args.accept_loss),
    }
}

/// Each path must be in the ledger: who mistypes one is told.
fn accept(path: &Path, lost: &[PathBuf]) -> Outcome {
    let daemon = client::find(path)?;
    if daemon.is_none() {
        preflight::migration(path)?;
    }
    for lost in lost {
        let rest = lost.strip_prefix(path).unwrap_or(lost).to_path_buf();
        let accepted = match &daemon {
            Some(daemon) => {
                let paths = vec![rest];
                let reply = daemon.call(&Request::AcceptLoss { paths })?;
                reply.get("accepted").and_then(Value::as_u64).unwrap_or(0)
            }
            None => crate::mirror::accept_offline(path, &[rel_path(&rest)?])? as u64,
        };
        if accepted == 0 {
            let line = format!("{}: not in the ledger", out::quoted(lost));
            return Err(Failure::new(exit::FAILURE, line));
        }
    }
    Ok(exit::DONE)
}

fn list(path: &Path, format: Format) -> Outcome {
    let bad = |e: &dyn std::fmt::Display| Failure::new(exit::FAILURE, format!("ledger: {e}"));
    let value = match client::find(path)? {
        Some(daemon) => daemon.call(&Request::Errors)?["entries"].take(),
        None => {
            preflight::migration(path)?;
            serde_json::to_value(crate::mirror::read_ledger(path)?).map_err(|e| bad(&e))?
        }
    };
    let Value::Array(entries) = value else {
        return Err(bad(&"not a list"));
    };
    for entry in &entries {
        match format {
            Format::Text => out::say(&text(entry)),
            Format::Json => out::say(&entry.to_string()),
            Format::Null => {
                let mut bytes = path_of(entry);
                bytes.push(0);
                out::raw(&bytes);
            }
        }
    }
    Ok(exit::DONE)
}

/// The path's bytes: the text when it is UTF-8, otherwise the hexadecimal form.
fn path_of(entry: &Value) -> Vec<u8> {
    let field = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default();
    let hex = field("path_hex").as_bytes();
    let decoded: Option<Vec<u8>> = hex
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    match decoded {
        Some(bytes) if !bytes.is_empty() => bytes,
        _ => field("path").as_bytes().to_vec(),
    }
}

/// The ledger's own line: it names the path, the call, the side and the reason.
fn text(entry: &Value) -> String {
    let field = |key: &str| entry.get(key).and_then(Value::as_str);
    let mut text = field("message").unwrap_or("?").to_owned();
    let pairs = entry.get("ranges").and_then(Value::as_array);
    for pair in pairs.into_iter().flatten() {
        if let (Some(from), Some(to)) = (pair[0].as_u64(), pair[1].as_u64()) {
            text += &format!(", bytes {from}-{}", to.saturating_sub(1));
        }
    }
    if let Some(n) = entry.get("attempts").and_then(Value::as_u64)
        && n > 1
    {
        text += &format!(", {n} times");
    }
    if field("call") != Some("extra")
        && entry.get("accepted").and_then(Value::as_bool) == Some(true)
    {
        text += ", given up";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_path_that_is_not_utf_8_comes_back_as_its_bytes() {
        let entry = json!({
            "path": "a\u{fffd}", "path_hex": "61ff", "side": "src", "call": "open",
            "errno": 13, "message": "\"a\\xff\": open src: Permission denied", "time_unix": 0
        });
        assert_eq!(path_of(&entry), b"a\xff");
        assert_eq!(text(&entry), "\"a\\xff\": open src: Permission denied");
        assert_eq!(path_of(&json!({ "path": "b" })), b"b");
    }
}
