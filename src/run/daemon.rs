//! Daemon: a child that leaves the terminal and tells its parent over a pipe how the start went.
//!
//! The parent exits with 0 only once the mount is usable, otherwise with the child's line and exit
//! code. The pipe carries one byte, the exit code, and then the line.

use std::io::{PipeWriter, Read, Write};
use std::os::fd::AsFd;

use super::log::Log;
use super::{Failure, Outcome, exit};
use crate::sys::host::{self, Forked};

/// The child's way to report once, at the earliest when the mount is usable.
pub(super) struct Parent(Option<PipeWriter>);

impl Parent {
    /// There is nobody to tell: we stay in front.
    pub(super) fn none() -> Parent {
        Parent(None)
    }

    /// The mount is usable. `false`: the parent was interrupted, nobody wants it any more.
    pub(super) fn ready(&mut self) -> bool {
        self.tell(exit::DONE, "")
    }

    fn tell(&mut self, exit: u8, line: &str) -> bool {
        match self.0.take() {
            Some(mut pipe) => {
                let mut message = vec![exit];
                message.extend_from_slice(line.as_bytes());
                pipe.write_all(&message).is_ok()
            }
            None => true,
        }
    }
}

/// Forks; the child runs `serve`. Before this no thread may exist.
pub(super) fn start(log: &Log, serve: impl FnOnce(&mut Parent) -> Outcome) -> Outcome {
    let fail = |call: &str, e: &dyn std::fmt::Display| {
        Failure::new(exit::FAILURE, format!("daemon: {call}: {e}"))
    };
    let (mut reader, writer) = std::io::pipe().map_err(|e| fail("pipe", &e))?;
    if let Forked::Parent(_) = host::fork().map_err(|e| fail("fork", &e))? {
        drop(writer);
        let mut message = Vec::new();
        let read = reader.read_to_end(&mut message);
        read.map_err(|e| fail("read", &e))?;
        return match message.split_first() {
            Some((&exit::DONE, _)) => Ok(exit::DONE),
            Some((&code, line)) => Err(Failure::new(code, String::from_utf8_lossy(line))),
            None => Err(Failure::new(
                exit::FAILURE,
                "the daemon died before the mount was usable; its log says more",
            )),
        };
    }
    drop(reader);
    let mut parent = Parent(Some(writer));
    let file = log.dup();
    let outcome = host::detach_from_terminal(file.as_ref().map(|f| f.as_fd()))
        .map_err(|e| fail("setsid", &e))
        .and_then(|()| serve(&mut parent));
    outcome.map_err(|failure| {
        // After `ready` this tells nobody; the log has the line in any case.
        parent.tell(failure.exit, &failure.line);
        Failure::new(failure.exit, "")
    })
}
