//! Locks: what gates and tables of the mirror are made of.
//!
//! They name these, not the crates, so that `tests/loom.rs` can put loom's in their place and try
//! every order in which threads may run. The engine has its own (`engine/sync.rs`).

pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
pub(crate) use std::thread_local;

pub(crate) use parking_lot::{Condvar, Mutex};

/// Between a SeqCst write and a SeqCst read of something else. These are in one order already; loom knows
/// of that order by fences only.
#[inline(always)]
pub(crate) fn in_order() {}
