//! The `finish` command: by the daemon, or offline on a dst that is not mounted.

use std::path::Path;

use super::mount::refused;
use super::varlink::Request;
use super::{Outcome, client, exit, out, preflight};

/// `mirrorfs finish`.
pub(super) fn run(path: &Path, accept_loss: bool) -> Outcome {
    let lost = match client::find(path)? {
        Some(daemon) => {
            daemon.call(&Request::Finish { accept_loss })?;
            daemon.report.counts.errors
        }
        None => {
            preflight::migration(path)?;
            let survey = crate::mirror::survey(path)?;
            crate::mirror::finish_offline(path, accept_loss)
                .map_err(|e| refused(e, survey.ledger))?;
            survey.ledger
        }
    };
    out::say(&format!("finished: {} is a plain tree", out::quoted(path)));
    Ok(if lost > 0 {
        exit::SOME_FAILED
    } else {
        exit::DONE
    })
}
