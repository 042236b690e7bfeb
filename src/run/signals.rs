//! Signals: what INT, TERM, HUP, USR1 and USR2 are told to.

use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use super::{Failure, exit};

/// A keeper passes on what may have come here by itself: that is no second one.
const SAME: Duration = Duration::from_millis(500);

/// Tells of each signal, on a thread of its own; a second INT or TERM exits at once. `kept`: a keeper
/// passes them on.
pub(super) fn watch(kept: bool, tell: impl Fn(i32) + Send + 'static) -> Result<(), Failure> {
    let fail = |e: std::io::Error| Failure::new(exit::FAILURE, format!("signals: {e}"));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2])
            .map_err(fail)?;
    let watch = move || {
        let mut stopping: Option<Instant> = None;
        for signal in signals.forever() {
            if matches!(signal, SIGINT | SIGTERM) {
                let again = |first: Instant| !kept || first.elapsed() > SAME;
                if stopping.is_some_and(again) {
                    signal_hook::low_level::exit(i32::from(exit::INTERRUPTED));
                }
                stopping.get_or_insert_with(Instant::now);
            }
            tell(signal);
        }
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(watch).map(|_| ()).map_err(fail)
}
