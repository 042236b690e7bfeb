//! The `finish` command: by the daemon, or offline on a dst that is not mounted.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::control::make_run_dir;
use super::counts::Counts;
use super::front::file_name;
use super::manifest::Unended;
use super::serve::refused;
use super::varlink::Request;
use super::{Outcome, client, exit, finished, out, preflight};
use crate::mirror::{LedgerEntry, Rest};

/// `mirrorfs finish`.
pub(super) fn run(path: &Path, accept_loss: bool) -> Outcome {
    let mut tree = path.to_owned();
    let mut uncovered = None;
    let (lost, report, manifest) = match client::find(path)? {
        Some(daemon) => {
            let (reply, uid) = daemon.call_whose(&Request::Finish { accept_loss })?;
            let told = |key| reply.get(key).and_then(Value::as_str).map(PathBuf::from);
            tree = told("dst").unwrap_or(tree);
            uncovered = told("mountpoint").filter(|point| *point != tree);
            let lost = reply.get("lost").and_then(Value::as_u64).unwrap_or(0);
            let manifest = reply.get("manifest").and_then(Unended::from_json);
            (lost, told("report"), manifest.map(|m| (m, uid)))
        }
        None => {
            preflight::migration(path)?;
            let survey = crate::mirror::survey(path)?;
            let entries = crate::mirror::read_ledger(path)?;
            let src = survey.identity_src.unwrap_or_default();
            let root = preflight::root_of(path)?;
            finished::remember(&src, path, root.as_fd());
            let rests = crate::mirror::finish_offline(path, accept_loss).map_err(|e| {
                finished::forget(path, root.as_fd());
                refused(e, survey.ledger)
            })?;
            let report = write_report(&src, path, (&entries, &rests), None);
            (survey.ledger, report, None)
        }
    };
    let tree = out::quoted(&tree);
    out::say(&format!("finished: {tree} is a plain tree"));
    if let Some(point) = uncovered {
        let point = out::quoted(&point);
        out::say(&format!(
            "{point} is what it was before the mount: go on in {tree}, or mount that there"
        ));
    }
    if let Some(report) = report {
        out::say(&format!("report: {}", report.display()));
    }
    let proved = manifest.map_or(Ok(exit::DONE), |(manifest, uid)| manifest.end(uid))?;
    Ok(if lost > 0 { exit::SOME_FAILED } else { proved })
}

/// The final report of a migration, in the run directory: DST holds nothing of ours any more. `None`
/// where it could not be written: the log says the same.
pub(super) fn write_report(
    src: &Path,
    dst: &Path,
    (ledger, rests): (&[LedgerEntry], &[Rest]),
    counts: Option<&Counts>,
) -> Option<PathBuf> {
    let (extra, lost): (Vec<_>, Vec<_>) = ledger.iter().partition(|e| e.is_extra());
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let report = json!({
        "src": src.to_string_lossy(),
        "dst": dst.to_string_lossy(),
        "finished_unix": now.map_or(0, |d| d.as_secs()),
        "version": env!("CARGO_PKG_VERSION"),
        "counts": counts,
        "lost": lost,
        "not_whole": rests,
        "only_in_dst": extra,
    });
    let path = make_run_dir().ok()?.join(file_name(dst, "report.json"));
    let text = serde_json::to_string_pretty(&report).ok()?;
    match std::fs::write(&path, text + "\n") {
        Ok(()) => Some(path),
        Err(e) => {
            tracing::warn!("{}: write: {e}", out::quoted(&path));
            None
        }
    }
}
