//! Aside: threads for requests that wait for a device (an fsync, a large write). The thread of a queue
//! is the only one that its CPU has: while it waits nobody there gets an answer.

use crossbeam_channel::{Receiver, Sender};

use super::MirrorFs;
use super::abi::{Fields, fattr, opcode};
use super::request::Header;
use super::ring::Taken;
use crate::sys::caps;

/// Threads for all queues: what waits for one device is done by it in batches.
const THREADS: usize = 8;

/// From how many bytes on a write may be held back by the kernel, and is worth the way here.
const LARGE_WRITE: usize = 64 << 10;

/// Takes requests until it and its clones are dropped.
#[derive(Clone)]
pub(super) struct Aside(Sender<Taken>);

impl Aside {
    /// Starts the threads. The queue is as long as there are slots.
    pub(super) fn start(fs: impl Fn() -> MirrorFs) -> std::io::Result<Aside> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        for n in 0..THREADS {
            let (fs, receiver) = (fs(), receiver.clone());
            std::thread::Builder::new()
                .name(format!("fuse-aside{n}"))
                .spawn(move || serve(&fs, &receiver))?;
        }
        Ok(Aside(sender))
    }

    /// Has a request answered by another thread.
    pub(super) fn answer(&self, request: Taken) {
        // The threads live as long as this sender; without them the drop answers, with EIO.
        let _ = self.0.send(request); // See above.
    }
}

fn serve(fs: &MirrorFs, requests: &Receiver<Taken>) {
    // For good: see sys::caps.
    caps::drop_fsetid();
    let mut scratch = Vec::new();
    while let Ok(request) = requests.recv() {
        request.answer(fs, &mut scratch);
        scratch.shrink_to(LARGE_WRITE);
    }
}

/// True for what waits for a device as a rule.
pub(super) fn is_slow(header: &Header, fields: &[u8], payload_len: usize) -> bool {
    match header.opcode {
        opcode::FSYNC | opcode::FSYNCDIR | opcode::FALLOCATE | opcode::COPY_FILE_RANGE => true,
        opcode::WRITE => payload_len >= LARGE_WRITE,
        opcode::SETATTR => Fields(fields).u32().is_some_and(|v| v & fattr::SIZE != 0),
        _ => false,
    }
}
