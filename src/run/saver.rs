//! Saver: writes the tally, on a thread of its own. A DST that is frozen (fsfreeze(8)), or whose disk does not answer,
//! holds that thread and nobody else: signals and requests are still heard.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{Failure, exit};
use crate::mirror::Mirror;

/// How long DST may take for a small write before that counts as none.
pub(super) const WRITE_MAX: Duration = Duration::from_secs(10);

/// The thread. It ends with this.
pub(super) struct Saver {
    /// With who is to hear that it was done.
    ask: Sender<Option<Sender<()>>>,
}

impl Saver {
    pub(super) fn start(mirror: &Arc<Mirror>) -> Result<Saver, Failure> {
        let (ask, asked) = bounded(1);
        let mirror = Arc::clone(mirror);
        let thread = std::thread::Builder::new().name("tally".into());
        thread
            .spawn(move || save(&mirror, &asked))
            .map_err(|e| Failure::new(exit::FAILURE, format!("tally thread: {e}")))?;
        Ok(Saver { ask })
    }

    /// Soon.
    pub(super) fn save(&self) {
        let _ = self.ask.try_send(None); // Full: it is about to.
    }

    /// Now. False: DST has not taken it within the limit.
    pub(super) fn save_within(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let (done, is_done) = bounded(1);
        self.ask.send_deadline(Some(done), end).is_ok() && is_done.recv_deadline(end).is_ok()
    }
}

fn save(mirror: &Mirror, asked: &Receiver<Option<Sender<()>>>) {
    for done in asked {
        if let Err(e) = mirror.save_tally() {
            tracing::debug!("{e}"); // For people only: dst is full, most likely, and they know.
        }
        if let Some(done) = done {
            let _ = done.try_send(()); // Who has given up does not need it.
        }
    }
}
