//! Aside: threads for requests that wait for a device (an fsync, a large write). The thread of a queue
//! is the only one that its CPU has: while it waits nobody there gets an answer.
//!
//! What waits for a device cannot be told by its kind alone: a lookup reads a disk, or nothing. So it is
//! measured ([`Stays`]): a kind of request that has kept its threads long of late goes aside, until it
//! does so no more. To go aside costs waking a thread, some 50 us.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::MirrorFs;
use super::abi::{Fields, fattr, opcode};
use super::request::Header;
use super::ring::Taken;
use crate::sys::caps;

/// From how many bytes on a write may be held back by the kernel, and is worth the way here.
const LARGE_WRITE: usize = 64 << 10;

/// A kind of request whose mean stay is longer goes aside: several times what waking a thread takes.
const LONG_NS: u32 = 200_000;
/// No stay counts for more: one thread that was preempted once says little, two stays are enough.
const STAY_MAX_NS: u32 = 6 * LONG_NS;
/// As many kinds as the kernel may have; what is beyond is never asked for.
const KINDS: usize = 64;

/// For how long requests of each kind have kept the threads that answered them, of late: means of all
/// queues, in nanoseconds. One update may be lost to another.
pub(super) struct Stays([AtomicU32; KINDS]);

impl Stays {
    fn new() -> Stays {
        Stays([const { AtomicU32::new(0) }; KINDS])
    }

    fn mean(&self, opcode: u32) -> Option<&AtomicU32> {
        self.0.get(usize::try_from(opcode).ok()?)
    }

    fn learn(&self, opcode: u32, stay: Duration) {
        if let Some(mean) = self.mean(opcode) {
            let stay = u32::try_from(stay.as_nanos()).unwrap_or(u32::MAX);
            let was = mean.load(Relaxed);
            mean.store(was - was / 8 + stay.min(STAY_MAX_NS) / 8, Relaxed);
        }
    }

    fn are_long(&self, opcode: u32) -> bool {
        self.mean(opcode).is_some_and(|m| m.load(Relaxed) > LONG_NS)
    }
}

/// Takes requests until it and its clones are dropped.
#[derive(Clone)]
pub(super) struct Aside {
    queue: Sender<(Header, Taken)>,
    stays: Arc<Stays>,
}

impl Aside {
    /// Starts so many threads. The queue is as long as there are slots.
    pub(super) fn start(threads: usize, fs: impl Fn() -> MirrorFs) -> std::io::Result<Aside> {
        let (queue, receiver) = crossbeam_channel::unbounded();
        let stays = Arc::new(Stays::new());
        for n in 0..threads {
            let (fs, receiver, stays) = (fs(), receiver.clone(), Arc::clone(&stays));
            std::thread::Builder::new()
                .name(format!("fuse-aside{n}"))
                .spawn(move || serve(&fs, &receiver, &stays))?;
        }
        Ok(Aside { queue, stays })
    }

    /// Has a request answered: here, or by another thread if this one would have to wait.
    pub(super) fn answer(
        &self,
        header: Header,
        request: Taken,
        fs: &MirrorFs,
        scratch: &mut Vec<u8>,
    ) {
        if is_slow(&header, &request) || self.stays.are_long(header.opcode) {
            // The threads live as long as this sender; without them the drop answers, with EIO.
            let _ = self.queue.send((header, request)); // See above.
            return;
        }
        answer(&header, request, fs, scratch, &self.stays);
    }
}

fn answer(header: &Header, request: Taken, fs: &MirrorFs, scratch: &mut Vec<u8>, stays: &Stays) {
    let begin = Instant::now();
    request.answer(fs, scratch);
    stays.learn(header.opcode, begin.elapsed());
}

fn serve(fs: &MirrorFs, requests: &Receiver<(Header, Taken)>, stays: &Stays) {
    // For good: see sys::caps.
    caps::drop_fsetid();
    let mut scratch = Vec::new();
    while let Ok((header, request)) = requests.recv() {
        answer(&header, request, fs, &mut scratch, stays);
        scratch.shrink_to(LARGE_WRITE);
    }
}

/// True for what waits for a device as a rule.
fn is_slow(header: &Header, request: &Taken) -> bool {
    match header.opcode {
        opcode::FSYNC | opcode::FSYNCDIR | opcode::FALLOCATE | opcode::COPY_FILE_RANGE => true,
        opcode::WRITE => request.data_len() >= LARGE_WRITE,
        opcode::SETATTR => {
            let what = Fields(request.fields()).u32();
            what.is_some_and(|v| v & fattr::SIZE != 0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_micros(5);
    const DISK: Duration = Duration::from_millis(8);

    #[test]
    fn a_kind_that_waits_goes_aside_until_it_waits_no_more() {
        let stays = Stays::new();
        for _ in 0..1000 {
            stays.learn(opcode::LOOKUP, FAST);
        }
        stays.learn(opcode::LOOKUP, DISK);
        assert!(!stays.are_long(opcode::LOOKUP), "one stay says little");
        stays.learn(opcode::LOOKUP, DISK);
        assert!(stays.are_long(opcode::LOOKUP));
        assert!(!stays.are_long(opcode::GETATTR), "each kind by itself");
        let back = (1..100).find(|_| {
            stays.learn(opcode::LOOKUP, FAST);
            !stays.are_long(opcode::LOOKUP)
        });
        assert!(back.is_some_and(|calls| calls < 10), "{back:?}");
        for _ in 0..1000 {
            stays.learn(opcode::LOOKUP, DISK);
        }
        let back = (1..100).find(|_| {
            stays.learn(opcode::LOOKUP, FAST);
            !stays.are_long(opcode::LOOKUP)
        });
        assert!(
            back.is_some_and(|calls| (5..40).contains(&calls)),
            "{back:?}"
        );
    }

    #[test]
    fn what_the_kernel_has_no_name_for_is_never_long() {
        let stays = Stays::new();
        for opcode in [KINDS as u32, u32::MAX] {
            stays.learn(opcode, DISK);
            stays.learn(opcode, DISK);
            assert!(!stays.are_long(opcode));
        }
    }
}
