//! Who pulls what nobody asks for: the walker below a mount, or what does without one.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::config::MountConfig;
use crate::error::{Errno, Result};
use crate::mirror::Mirror;
use crate::native::{self, Native};
use crate::sys::host;
use crate::walk::Walker;

/// Who pulls what nobody asks for.
pub(super) enum Background {
    Walker(Arc<Walker>),
    Native(Native),
}

impl Background {
    pub(super) fn start(
        config: &MountConfig,
        mirror: &Arc<Mirror>,
        guard: Option<native::Taken>,
    ) -> Result<Background> {
        if config.native {
            tracing::warn!(
                "--experimental-native is a study: see docs/NATIVE.md for what it breaks"
            );
            return Native::start(mirror.clone(), guard).map(Background::Native);
        }
        Ok(Background::Walker(Arc::new(Walker::start(mirror.clone())?)))
    }

    pub(super) fn stop(&self) {
        match self {
            Background::Walker(walker) => walker.stop(),
            Background::Native(native) => native.stop(),
        }
    }

    /// The migration is over.
    pub(super) fn end(&self) {
        if let Background::Native(native) = self {
            native.end();
        }
    }

    pub(super) fn native(&self) -> Option<&Native> {
        match self {
            Background::Walker(_) => None,
            Background::Native(native) => Some(native),
        }
    }
}

/// The guard of an `--experimental-native`: its daemon is at the other end of standard input.
pub(super) fn guard() -> std::result::Result<(), Errno> {
    let daemon = host::dup(std::io::stdin().as_fd())?;
    native::guard::run(daemon)
}
