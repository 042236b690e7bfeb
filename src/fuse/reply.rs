//! Reply: the one answer that a request gets, from whichever thread has it. How long the kernel may
//! keep an answer, and at which level a failure is logged.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::answer::{Answer, Done, Fixed, Xattr};
use super::dev::Dev;
use super::ring::Taken;
use crate::error::{Error, Result, Side};
use crate::mirror::{Attr, Node, is_again, number_of, user_errno};

/// How long the kernel may keep names and attributes: only we change dst, and we tell it.
pub(super) const TTL: Duration = Duration::from_secs(24 * 3600);

/// Where a reply goes: the transport that its request came from.
pub(super) enum Channel {
    /// Written where the request was read.
    Dev(Arc<Dev>),
    /// Put where the request was.
    Ring(Taken),
}

impl Channel {
    /// Sends an answer, or an errno and nothing else.
    fn send(self, unique: u64, result: Result<(&[u8], &[u8]), Errno>) {
        match self {
            Channel::Dev(dev) => dev.send(unique, result),
            Channel::Ring(taken) => taken.send(unique, result),
        }
    }
}

/// A request that has not been answered yet, and what it wants. It can wait anywhere, and is answered
/// once: also when it is dropped (EIO), because somebody sleeps until then.
pub(super) struct Reply<T> {
    unique: u64,
    channel: Option<Channel>,
    wants: PhantomData<fn(T)>,
}

impl<T: Answer> Reply<T> {
    pub(super) fn new(unique: u64, channel: Channel) -> Reply<T> {
        Reply {
            unique,
            channel: Some(channel),
            wants: PhantomData,
        }
    }

    /// The number of its request, however often the kernel has sent it.
    pub(super) fn request(&self) -> u64 {
        number_of(self.unique)
    }

    /// The kernel has sent it to the program before us too.
    pub(super) fn is_again(&self) -> bool {
        is_again(self.unique)
    }

    pub(super) fn ok(self, answer: T) {
        self.send(Ok(answer));
    }

    pub(super) fn error(self, errno: Errno) {
        self.send(Err(errno));
    }

    pub(super) fn send(mut self, result: Result<T, Errno>) {
        let Some(channel) = self.channel.take() else {
            return;
        };
        match result {
            Ok(answer) => {
                let mut fixed = Fixed::new();
                answer.fixed(&mut fixed);
                channel.send(self.unique, Ok((fixed.bytes(), answer.data())));
            }
            Err(errno) => channel.send(self.unique, Err(errno)),
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take() {
            tracing::warn!("request {} was dropped without an answer", self.unique);
            channel.send(self.unique, Err(Errno::IO));
        }
    }
}

/// True when the kernel must ask again each time: bits that a write through passthrough clears.
pub(super) fn is_volatile(attr: &Attr) -> bool {
    attr.stat.is_file() && attr.stat.mode & 0o6000 != 0
}

/// A node's generation.
pub(super) fn generation(node: &Node) -> u64 {
    u64::from(node.anchor.generation())
}

/// The errno of a failed request, logged at the level that it deserves.
pub(super) fn errno(what: &str, error: &Error) -> Errno {
    match error.side() {
        Side::Src => tracing::warn!("{what}: {error}"),
        Side::Dst | Side::Host => tracing::debug!("{what}: {error}"),
    }
    user_errno(error)
}

pub(super) fn reply_empty(what: &str, result: Result<()>, reply: Reply<Done>) {
    reply.send(result.map(|()| Done).map_err(|e| errno(what, &e)));
}

pub(super) fn reply_raw(result: Result<(), Errno>, reply: Reply<Done>) {
    reply.send(result.map(|()| Done));
}

pub(super) fn reply_xattr(result: Result<Vec<u8>, Errno>, size: u32, reply: Reply<Xattr>) {
    reply.send(match result {
        Ok(value) if size == 0 => Ok(Xattr::Size(value.len() as u32)),
        Ok(value) if value.len() > size as usize => Err(Errno::RANGE),
        Ok(value) => Ok(Xattr::Value(value)),
        Err(e) => Err(e),
    });
}
