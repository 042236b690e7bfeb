//! Ring: file operations that the kernel makes while this thread does something else.
//!
//!   push()   the operation moves into the slab, its entry into the submission queue
//!   enter()  the kernel takes the entries; completions arrive
//!   pop()    the operation comes back with its result and what it lent; only now may its buffer
//!            be touched
//!
//! A part of its own: the engine's workers use it, and so can anybody (`examples/ring.rs`). One ring
//! belongs to one thread. What the running kernel has is asked once (IORING_REGISTER_PROBE); what it
//! lacks, or what [`RingConfig::off`] switches off, is made as the system call that does the same,
//! within `push`, on this thread, with the same answer (`call.rs`). On a kernel without io_uring, or
//! where it is forbidden, that is everything: [`Ring::no_kernel`] says why.
//!
//! With the entries (`entry.rs`) the only `unsafe` above sys. The argument is always the same: every
//! pointer in an entry points to heap memory owned by the slab (a buffer, a path, a statx block), or
//! into a static; it is given back by `pop` after the kernel's completion, and dropping the ring
//! waits for the rest.
//!
//! There are no linked chains (IOSQE_IO_LINK). A chain cannot look at a result, so a short read ends
//! it or writes what was not read; whoever waits for it learns of no step's latency; and for small
//! files it was measured slower than the same calls one by one.

mod call;
mod entry;
mod lent;
mod op;
mod opcode;
mod setup;
mod slab;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::opcode::AsyncCancel;
use io_uring::{IoUring, squeue};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use self::call::{Outcome, call};
use self::entry::Held;
pub use self::op::{Completed, How, Op, Reply, Slot, Target};
pub use self::opcode::{Opcode, Opcodes, Row};
pub use self::setup::RingConfig;
use self::setup::{errno_of, kernel_ring};
use self::slab::Slab;
use self::slots::Slots;
use super::buffers::{Buffer, BufferPool};
use crate::sys;

/// Where the kernel begins an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// On this thread, at `enter`; it goes to a kernel thread only if it would wait and the file
    /// system can say so before it waits (ext4, xfs and btrfs for reads; FUSE and NFS never: they
    /// hold this thread). Cheapest for what is in the page cache.
    Here,
    /// On a kernel thread at once (IOSQE_ASYNC): a few microseconds more, and this thread never waits.
    Elsewhere,
}

/// One io_uring, or system calls in its place, and the slab of what is in flight.
pub struct Ring {
    kernel: Result<IoUring, Errno>,
    /// Opcodes that go through the kernel's ring.
    has: Opcodes,
    slab: Slab<InFlight>,
    /// Ended within `push`.
    done: VecDeque<Completed>,
    /// Eventfds that are waited for without io_uring.
    waiting: VecDeque<(u64, Arc<OwnedFd>, Instant)>,
    slots: Slots,
    /// The pool whose buffers are registered.
    registered: Option<u64>,
    /// The kernel takes entries only from the thread that made the ring.
    _one_thread: PhantomData<*const ()>,
}

struct InFlight {
    held: Held,
    token: u64,
    /// The slot of our own that a file is opened for.
    into: Option<Slot>,
    since: Instant,
}

/// The user_data of what nobody waits for.
const NOBODY: u64 = u64::MAX;
/// Between two tries to cancel what is left.
const CANCEL_AGAIN: Duration = Duration::from_millis(1);

impl Ring {
    /// A ring for this thread. Always there: without io_uring it makes system calls.
    pub fn new(config: &RingConfig) -> Ring {
        let made = match config.kernel {
            true => kernel_ring(config),
            false => Err(Errno::NOSYS),
        };
        let (kernel, has) = match made {
            Ok((uring, has)) => (Ok(uring), has.without(config.off)),
            Err(errno) => (Err(errno), Opcodes::NONE),
        };
        let mut slots = Slots::here(config.slots);
        if config.slots > 0 && has.keeps_slots() {
            let table = kernel.as_ref().map(|u| u.submitter());
            if table.is_ok_and(|t| t.register_files_sparse(config.slots).is_ok()) {
                slots = Slots::Kernel;
            }
        }
        Ring {
            kernel,
            has,
            slab: Slab::with_capacity(config.ops_max.min(1 << 16)),
            done: VecDeque::new(),
            waiting: VecDeque::new(),
            slots,
            registered: None,
            _one_thread: PhantomData,
        }
    }

    /// Why there is no io_uring: ENOSYS (the kernel has none, or before 5.6, or it was not asked for),
    /// EPERM (kernel.io_uring_disabled, seccomp), ENOMEM (RLIMIT_MEMLOCK before 5.12).
    pub fn no_kernel(&self) -> Option<Errno> {
        self.kernel.as_ref().err().copied()
    }

    /// True when the operation goes through io_uring; else it is made within `push`, and may wait there.
    pub fn supports(&self, opcode: Opcode) -> bool {
        self.has.has(opcode)
    }

    /// Registers a pool's buffers: their pages stay mapped for the kernel, which saves it that work
    /// at every read and write. Once per ring, before any buffer was taken (else EINVAL); ENOMEM over
    /// RLIMIT_MEMLOCK, ENOSYS without io_uring. Buffers that are not registered work as well.
    pub fn register(&mut self, buffers: &mut BufferPool) -> sys::Result<()> {
        let uring = self.kernel.as_ref().map_err(|errno| *errno)?;
        let id = buffers.id();
        if self.registered.is_some() || !buffers.is_untouched() {
            return Err(Errno::INVAL);
        }
        let vecs: Vec<libc::iovec> = buffers.all_mut().map(iovec).collect();
        // SAFETY: the vectors describe heap memory; registering pins its pages and reads or writes
        // nothing. Only entries use them, and an entry's buffer is in the slab. A buffer that is
        // freed before the ring leaves pinned pages that no entry names: `is_fixed` goes by the pool
        // that a buffer was made in, not by its address.
        unsafe { uring.submitter().register_buffers(&vecs) }.map_err(errno_of)?;
        self.registered = Some(id);
        Ok(())
    }

    /// Queues an operation; its completion carries `token`. The kernel sees it at the next `enter`.
    pub fn push(&mut self, token: u64, mut op: Op, start: Start) {
        if let Err(errno) = self.admit(&mut op) {
            return self.end(token, Err(errno), op);
        }
        let into = match (&mut op, &self.slots) {
            (Op::Open { slot, .. }, Slots::Here(_)) => slot.take(),
            _ => None,
        };
        match op {
            Op::EventFd { fd } if self.kernel.is_err() => {
                self.waiting.push_back((token, fd, Instant::now()));
            }
            Op::CloseSlot { slot } if !matches!(self.slots, Slots::Kernel) => {
                let cleared = self.slots.clear(slot).map(|()| Reply::Done);
                self.end(token, cleared, Op::CloseSlot { slot });
            }
            op if self.goes_through(&op) => self.submit(token, op, into, start),
            op => self.make(token, op, into),
        }
    }

    /// Gives the queued entries to the kernel and lets completions arrive; with `wait` it returns only
    /// when there is one to `pop`, at once when nothing is in flight, or without one for a signal.
    pub fn enter(&mut self, wait: bool) -> sys::Result<()> {
        let wait = wait && self.done.is_empty();
        let Ok(uring) = &mut self.kernel else {
            return self.wait_for_eventfd(wait);
        };
        if !wait || self.slab.is_empty() {
            let submission = uring.submission();
            if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
                return Ok(());
            }
        }
        let wanted = usize::from(wait && !self.slab.is_empty());
        loop {
            match uring.submit_and_wait(wanted) {
                Ok(_) => return Ok(()),
                Err(e) => match errno_of(e) {
                    Errno::INTR => {}
                    // Out of kernel memory, or completions to reap first: the caller's next turn.
                    Errno::AGAIN | Errno::BUSY => return Ok(()),
                    errno => return Err(errno),
                },
            }
        }
    }

    /// The next completion that has arrived.
    pub fn pop(&mut self) -> Option<Completed> {
        if let Some(completed) = self.done.pop_front() {
            return Some(completed);
        }
        loop {
            let cqe = self.kernel.as_mut().ok()?.completion().next()?;
            let Some(in_flight) = self.slab.remove(cqe.user_data()) else {
                continue; // A cancellation's own answer.
            };
            let InFlight {
                held,
                token,
                into,
                since,
            } = in_flight;
            let mut outcome = entry::finish(held, cqe.result());
            if into.is_some() {
                outcome.result = self.slots.fill(into, outcome.result);
            }
            return Some(completed(token, since, outcome));
        }
    }

    /// How many operations were pushed and not yet popped.
    pub fn in_flight(&self) -> usize {
        self.slab.len() + self.done.len() + self.waiting.len()
    }

    /// Whether an operation can be begun at all; makes a slot of our own an fd.
    fn admit(&self, op: &mut Op) -> sys::Result<()> {
        op.check()?;
        for target in op.targets_mut().into_iter().flatten() {
            self.slots.resolve(target)?;
        }
        Ok(())
    }

    fn goes_through(&self, op: &Op) -> bool {
        match op {
            Op::EventFd { .. } => true,
            Op::Read { buffer, .. } if self.is_fixed(buffer, Opcode::ReadFixed) => true,
            Op::Write { buffer, .. } if self.is_fixed(buffer, Opcode::WriteFixed) => true,
            op => self.has.has(op.opcode()) && entry::fits(op),
        }
    }

    fn is_fixed(&self, buffer: &Buffer, opcode: Opcode) -> bool {
        self.registered == Some(buffer.pool()) && self.has.has(opcode)
    }

    fn submit(&mut self, token: u64, op: Op, into: Option<Slot>, start: Start) {
        let fixed = match &op {
            Op::Read { buffer, .. } => self.is_fixed(buffer, Opcode::ReadFixed),
            Op::Write { buffer, .. } => self.is_fixed(buffer, Opcode::WriteFixed),
            _ => false,
        };
        let (held, entry) = entry::prepare(op, fixed);
        let key = self.slab.insert(InFlight {
            held,
            token,
            into,
            since: Instant::now(),
        });
        let mut entry = entry.user_data(key);
        if start == Start::Elsewhere {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        self.queue(&entry);
    }

    fn queue(&mut self, entry: &squeue::Entry) {
        loop {
            let Ok(uring) = &mut self.kernel else { return };
            // SAFETY: everything that the entry points to is owned by a value in the slab, at an
            // address that does not move with it, until its completion was popped.
            if unsafe { uring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(e) = self.enter(false) {
                // Cannot happen with a ring that worked until now; the entry must not be lost.
                tracing::error!(error = %e, "io_uring_enter");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Makes the system call, here and now.
    fn make(&mut self, token: u64, op: Op, into: Option<Slot>) {
        let since = Instant::now();
        let mut outcome = call(op);
        outcome.result = self.slots.fill(into, outcome.result);
        self.done.push_back(completed(token, since, outcome));
    }

    /// Ends an operation that no kernel saw.
    fn end(&mut self, token: u64, result: sys::Result<Reply>, op: Op) {
        let (buffer, value) = op.into_lent();
        let outcome = Outcome {
            result,
            buffer,
            value,
        };
        self.done
            .push_back(completed(token, Instant::now(), outcome));
    }

    /// Without io_uring only eventfds can be in flight.
    fn wait_for_eventfd(&mut self, wait: bool) -> sys::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let fds = self.waiting.iter();
        let mut fds: Vec<_> = fds
            .map(|(_, fd, _)| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
            .collect();
        let at_once = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, (!wait).then_some(&at_once)) {
            Err(Errno::INTR) => return Ok(()),
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for ready in ready {
            let Some((token, fd, since)) = self.waiting.pop_front() else {
                break;
            };
            if !ready {
                self.waiting.push_back((token, fd, since));
                continue;
            }
            let outcome = Outcome {
                result: sys::fd::eventfd_wait(fd.as_fd()).map(|()| Reply::Count(8)),
                buffer: None,
                value: None,
            };
            self.done.push_back(completed(token, since, outcome));
        }
        Ok(())
    }
}

impl Ring {
    /// Has the kernel cancel what may be cancelled; false: there is nothing.
    fn cancel_all(&mut self) -> bool {
        let keys = self.slab.iter().filter(|(_, f)| f.held.may_be_cancelled());
        let keys: Vec<u64> = keys.map(|(key, _)| key).collect();
        for key in &keys {
            self.queue(&AsyncCancel::new(*key).build().user_data(NOBODY));
        }
        !keys.is_empty()
    }
}

impl Drop for Ring {
    /// Waits for what is in flight: the kernel may still write into what the slab owns. Reads, splices
    /// and eventfds are cancelled first, again and again: what the kernel is just moving from a thread of
    /// its own to a poll is found in neither place. What cannot be waited for is leaked, not freed.
    fn drop(&mut self) {
        while !self.slab.is_empty() {
            let before = self.slab.len();
            let asked = self.cancel_all();
            if self.enter(true).is_err() {
                break;
            }
            while self.pop().is_some() {}
            if asked && self.slab.len() == before {
                std::thread::sleep(CANCEL_AGAIN);
            }
        }
        self.slab.leak(); // Empty, unless the ring is broken.
    }
}

fn iovec(buffer: &mut Buffer) -> libc::iovec {
    let len = buffer.len();
    let bytes = buffer.bytes_mut(0..len);
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: len,
    }
}

fn completed(token: u64, since: Instant, outcome: Outcome) -> Completed {
    let Outcome {
        result,
        buffer,
        value,
    } = outcome;
    Completed {
        token,
        buffer,
        value,
        result,
        took: since.elapsed(),
    }
}
