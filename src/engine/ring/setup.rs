//! Setup: a ring's options, and what the running kernel has for it.
//!
//! The kernel is asked once (IORING_REGISTER_PROBE, Linux 5.6). Whatever it refuses that only makes
//! things faster, an older kernel's way takes its place.

use io_uring::{IoUring, Probe};
use rustix::io::Errno;

use super::opcode::{Opcode, Opcodes};
use crate::sys;

/// A ring's limits and options, fixed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingConfig {
    /// Operations in flight that the queues are made for, 1 to 32,768. More are possible, and slower.
    pub ops_max: usize,
    /// Kernel threads for operations that wait (IORING_REGISTER_IOWQ_MAX_WORKERS); 0 leaves it to the
    /// kernel, which takes four times the CPUs at most. Every operation on files that hangs holds
    /// one: with fewer than there are in flight the others wait behind it.
    pub kernel_workers_max: u32,
    /// Places for files that are opened into a slot; 0: none.
    pub slots: u32,
    /// Opcodes that are not used although the kernel has them.
    pub off: Opcodes,
    /// False: system calls only, as on a kernel without io_uring.
    pub kernel: bool,
}

impl Default for RingConfig {
    fn default() -> RingConfig {
        RingConfig {
            ops_max: 64,
            kernel_workers_max: 0,
            slots: 0,
            off: Opcodes::NONE,
            kernel: true,
        }
    }
}

/// The kernel's ring, and what it can do. ENOSYS when it is of no use.
pub(super) fn kernel_ring(config: &RingConfig) -> sys::Result<(IoUring, Opcodes)> {
    let entries = u32::try_from(config.ops_max.next_power_of_two()).map_err(|_| Errno::INVAL)?;
    let entries = entries.clamp(8, 32768);
    let uring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(entries)
        .or_else(|_| IoUring::builder().dontfork().build(entries)) // Before Linux 6.1.
        .map_err(errno_of)?;
    let mut probe = Probe::new();
    // Before 5.6 there is nothing to ask, and too little to find.
    let asked = uring.submitter().register_probe(&mut probe);
    let table = Opcode::table().iter();
    let has: Opcodes = table
        .filter(|row| asked.is_ok() && probe.is_supported(row.code))
        .map(|row| row.opcode)
        .collect();
    if !has.has(Opcode::Read) || !has.has(Opcode::Write) {
        return Err(Errno::NOSYS);
    }
    if config.kernel_workers_max > 0 {
        // The first is for files, the second for sockets and the like, which we don't use.
        let mut workers = [config.kernel_workers_max, 0];
        if let Err(e) = uring.submitter().register_iowq_max_workers(&mut workers) {
            tracing::debug!(error = %e, "io_uring worker limit not raised"); // Before 5.15.
        }
    }
    Ok((uring, has))
}

/// io-uring's errors are all errnos.
pub(super) fn errno_of(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}
