//! A publication that dst refuses: it is tried again, and nobody who could not get what he asks for
//! anyway waits for that.

use std::sync::Arc;

use rustix::io::Errno;

use super::{Commit, Publish};
use crate::error::{Context, Error, Side};
use crate::mirror::Mirror;
use crate::mirror::node::Ino;

impl Commit {
    /// Who waits to change something in the directory is told why not. The gate stays closed: a change
    /// below a P would be stamped over (D5).
    fn refuse(&self, ino: Ino, error: &Error) {
        let mut queue = self.queue.lock();
        let waiters = std::mem::take(&mut queue.waiters);
        let (told, wait): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|(i, _)| *i == ino);
        queue.waiters = wait;
        drop(queue);
        told.into_iter().for_each(|(_, w)| w(Err(error.clone())));
    }
}

impl Mirror {
    /// The directory's mark could not be set.
    pub(super) fn publish_refused(self: &Arc<Self>, publish: Publish, errno: Errno) {
        let origin = publish.dir.shown();
        if let Err(error) = Err::<(), _>(errno).on("setxattr", Side::Dst, origin) {
            match error.is_dst_full() {
                true => {
                    self.note_full(&error);
                    self.commit.refuse(publish.dir.ino, &error);
                }
                false => tracing::warn!("publish a directory: {error}; it is tried again"),
            }
        }
        self.commit.publish_again(publish);
    }
}
