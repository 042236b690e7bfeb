//! The `pull` command, and the daemon's side of it.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::client::{self, Daemon};
use super::control::REQUEST_MAX;
use super::out::{self, count, quoted};
use super::varlink::Request;
use super::{Failure, Outcome, exit};
use crate::cli;
use crate::mirror::Mirror;
use crate::sys::name::RelPath;

/// Paths in one call, at most.
const PATHS_MAX: usize = 128;
/// Their bytes, at most: in hexadecimal they still fit into a request.
const BYTES_MAX: usize = REQUEST_MAX as usize / 4;

/// `mirrorfs pull`.
pub(super) fn run(args: &cli::Pull) -> Outcome {
    let paths = paths(args)?;
    let mut pulled = (0, 0);
    for (daemon, rests) in by_daemon(&paths)? {
        for batch in batches(rests) {
            let reply = daemon.call(&Request::Pull { paths: batch })?;
            let number = |key| reply.get(key).and_then(Value::as_u64).unwrap_or(0);
            pulled.0 += number("files");
            pulled.1 += number("failed");
            let failures = reply.get("failures").and_then(Value::as_array);
            for failure in failures.into_iter().flatten() {
                out::complain(failure.as_str().unwrap_or("?"));
            }
        }
    }
    if !args.quiet {
        out::say(&format!("pulled {} files", count(pulled.0)));
    }
    match pulled.1 {
        0 => Ok(exit::DONE),
        failed => {
            let line = format!("{} could not be pulled, see above", count(failed));
            Err(Failure::new(exit::SOME_FAILED, line))
        }
    }
}

/// Those of the command line, with standard input's in the place of `-`.
fn paths(args: &cli::Pull) -> Result<Vec<PathBuf>, Failure> {
    let mut all = Vec::new();
    for path in &args.paths {
        if path.as_os_str() != "-" {
            all.push(path.clone());
            continue;
        }
        let mut text = Vec::new();
        let read = std::io::stdin().lock().read_to_end(&mut text);
        read.map_err(|e| Failure::new(exit::FAILURE, format!("standard input: read: {e}")))?;
        let end = if args.null { 0 } else { b'\n' };
        let lines = text.split(|b| *b == end).filter(|line| !line.is_empty());
        all.extend(lines.map(|l| PathBuf::from(std::ffi::OsString::from_vec(l.to_vec()))));
    }
    Ok(all)
}

/// Each daemon with the paths that are below its mount point.
fn by_daemon(paths: &[PathBuf]) -> Result<Vec<(Daemon, Vec<PathBuf>)>, Failure> {
    let mut all: Vec<(Daemon, Vec<PathBuf>)> = Vec::new();
    let mut known: HashMap<u32, usize> = HashMap::new();
    let daemons = client::daemons();
    for path in paths {
        let Some((daemon, rest)) = client::holder(&daemons, path) else {
            let line = format!("PATH {}: no daemon serves it", quoted(path));
            return Err(Failure::new(exit::UNUSABLE, line));
        };
        let at = *known.entry(daemon.report.pid).or_insert_with(|| {
            all.push((daemon.clone(), Vec::new()));
            all.len() - 1
        });
        all[at].1.push(rest);
    }
    Ok(all)
}

fn batches(paths: Vec<PathBuf>) -> Vec<Vec<PathBuf>> {
    let mut batches: Vec<Vec<PathBuf>> = Vec::new();
    let mut room = 0;
    for path in paths {
        let len = path.as_os_str().len();
        match batches.last_mut() {
            Some(last) if last.len() < PATHS_MAX && len <= room => {
                room -= len;
                last.push(path);
            }
            _ => {
                room = BYTES_MAX.saturating_sub(len);
                batches.push(vec![path]);
            }
        }
    }
    batches
}

/// The daemon's side: what became of these paths.
pub(super) fn serve(mirror: &Arc<Mirror>, paths: &[PathBuf]) -> Value {
    let (mut files, mut failed) = (0, 0);
    let mut failures = Vec::new();
    for path in paths {
        let pulled = relative(path)
            .ok_or_else(|| format!("{}: not a path below the mount point", quoted(path)))
            .and_then(|path| crate::pull::pull(mirror, &path).map_err(|e| e.to_string()));
        match pulled {
            Ok(pulled) => {
                files += pulled.files;
                failed += pulled.failed;
                failures.extend(pulled.failures.iter().map(ToString::to_string));
            }
            Err(line) => {
                failed += 1;
                failures.push(line);
            }
        }
    }
    failures.truncate(100);
    json!({ "files": files, "failed": failed, "failures": failures })
}

fn relative(path: &Path) -> Option<RelPath> {
    match path.as_os_str().as_bytes() {
        b"" => Some(RelPath::root()),
        bytes => RelPath::from_bytes(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_fits_into_a_request() {
        let long = "x".repeat(4000);
        let paths: Vec<PathBuf> = (0..1000).map(|n| format!("{n}/{long}").into()).collect();
        let batches = batches(paths.clone());
        for batch in &batches {
            assert!(batch.iter().map(|p| p.as_os_str().len()).sum::<usize>() <= BYTES_MAX);
        }
        assert_eq!(batches.concat(), paths);
        let short: Vec<PathBuf> = (0..300).map(|n| n.to_string().into()).collect();
        assert_eq!(super::batches(short).len(), 3);
    }

    #[test]
    fn only_a_path_below_the_root_is_taken() {
        assert!(relative(Path::new("")).is_some_and(|p| p.is_root()));
        assert!(relative(Path::new("a/b")).is_some());
        for bad in ["/a", "../a", "a/../b", "a//b"] {
            assert!(relative(Path::new(bad)).is_none(), "{bad}");
        }
    }
}
