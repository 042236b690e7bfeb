//! Backings: which opens go past the daemon, decided per inode in one place.
//!
//! The kernel keeps an inode in one io mode: cached (through us) or passthrough, and answers an open
//! in the other mode with EIO (fs/fuse/iomode.c). So: count what is open, decide, count the new one,
//! then reply; count down at RELEASE (the kernel leaves the mode before it sends that, so the counts
//! here are always on the safe side). One BackingId per inode, while it is open that way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::mirror::{Ino, Locate};
use crate::sys::fusedev::BackingId;

/// How a handle was opened.
#[derive(Debug, Clone)]
pub(super) enum IoMode {
    /// Reads and writes come to us. `keep`: what the kernel has of the file's pages is still right; it
    /// drops them else, and waits for those that are being read.
    Cached { keep: bool },
    /// The kernel goes to dst's file.
    Passthrough(Arc<BackingId>),
}

#[derive(Default)]
struct Open {
    cached: u32,
    through: u32,
    through_writers: u32,
    id: Option<Arc<BackingId>>,
}

/// The io modes of all open inodes.
#[derive(Default)]
pub(super) struct Backings {
    enabled: AtomicBool,
    open: Mutex<HashMap<Ino, Open>>,
}

impl Backings {
    /// The kernel has passthrough and this process may use it.
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    /// Decides how a new handle is opened, and counts it. `old`: what the kernel has of its pages may
    /// be void. `register` asks the kernel for an id.
    pub(super) fn decide(
        &self,
        ino: Ino,
        locate: &Locate,
        (write, old): (bool, bool),
        register: impl FnOnce() -> Result<BackingId, Errno>,
    ) -> IoMode {
        let mut table = self.open.lock();
        let open = table.entry(ino).or_default();
        // What is open that way is all here, whatever it was when this open began.
        let here = matches!(locate, Locate::Here) || open.through > 0;
        let may = here && self.enabled.load(Ordering::Relaxed);
        if may && open.cached == 0 {
            let id = match &open.id {
                Some(id) => Some(Arc::clone(id)),
                None => register()
                    .inspect_err(|e| {
                        // EPERM (rootless), ELOOP (dst is stacked too deep): it will not pass.
                        tracing::info!("passthrough is off: {e}");
                        self.enabled.store(false, Ordering::Relaxed);
                    })
                    .ok()
                    .map(Arc::new),
            };
            if let Some(id) = id {
                open.through += 1;
                open.through_writers += u32::from(write);
                open.id = Some(Arc::clone(&id));
                return IoMode::Passthrough(id);
            }
        }
        // Nothing but cached handles has changed the file since its pages were read: while it is open
        // this way it is open in no other.
        let keep = (!here || open.cached > 0) && !old;
        open.cached += 1;
        IoMode::Cached { keep }
    }

    /// Opens may go past the daemon.
    pub(super) fn are_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Counts a handle that the program before us has opened. `known` makes an id of the number that
    /// the kernel has.
    pub(super) fn restore(
        &self,
        ino: Ino,
        number: Option<i32>,
        write: bool,
        known: impl FnOnce(i32) -> BackingId,
    ) -> IoMode {
        let mut table = self.open.lock();
        let open = table.entry(ino).or_default();
        let Some(number) = number else {
            open.cached += 1;
            return IoMode::Cached { keep: false };
        };
        open.through += 1;
        open.through_writers += u32::from(write);
        let id = open.id.get_or_insert_with(|| Arc::new(known(number)));
        IoMode::Passthrough(Arc::clone(id))
    }

    /// A handle was released (or its reply never reached the kernel).
    pub(super) fn release(&self, ino: Ino, mode: &IoMode, write: bool) {
        let mut table = self.open.lock();
        let Some(open) = table.get_mut(&ino) else {
            return;
        };
        match mode {
            IoMode::Cached { .. } => open.cached = open.cached.saturating_sub(1),
            IoMode::Passthrough(_) => {
                open.through = open.through.saturating_sub(1);
                open.through_writers = open.through_writers.saturating_sub(u32::from(write));
                if open.through == 0 {
                    open.id = None;
                }
            }
        }
        if open.cached == 0 && open.through == 0 {
            table.remove(&ino);
        }
    }

    /// True while somebody may change the inode without our seeing it (a shared mapping).
    pub(super) fn has_hidden_writers(&self, ino: Ino) -> bool {
        self.open
            .lock()
            .get(&ino)
            .is_some_and(|o| o.through_writers > 0)
    }
}
