//! What the engine's queue and bells are made of: locks, atomics, and a signal that wakes a thread.
//!
//! They name these, not the crates, so that `tests/loom.rs` can put loom's in their place and try
//! every order in which threads may run.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
pub(super) use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering, fence};

pub(super) use parking_lot::{Condvar, Mutex};

use crate::sys;

/// An eventfd: one thread waits for it, others raise it. Raised before somebody waits it stays so.
pub(super) struct Signal(Arc<OwnedFd>);

impl Signal {
    pub(super) fn new() -> sys::Result<Signal> {
        Ok(Signal(Arc::new(sys::fd::eventfd()?)))
    }

    /// For a ring to read.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    pub(super) fn wait(&self) -> sys::Result<()> {
        sys::fd::eventfd_wait(self.0.as_fd())
    }

    pub(super) fn raise(&self) {
        if let Err(e) = sys::fd::eventfd_signal(self.0.as_fd()) {
            tracing::error!(error = %e, "eventfd"); // Only a closed or full eventfd fails.
        }
    }
}
