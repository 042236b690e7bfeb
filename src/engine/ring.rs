//! Ring: io_uring plus a slab that owns whatever the kernel is using.
//!
//!   push()   the operation moves into the slab, its entry into the submission queue
//!   enter()  the kernel takes the entries; completions arrive
//!   pop()    the operation comes back with its result; only now may its buffer be touched
//!
//! The only `unsafe` above sys. The argument is always the same: every pointer in an entry points
//! to heap memory owned by the slab (a buffer, a name, a statx block), or into a static; it is
//! given back by `pop` after the kernel's completion, and dropping the ring waits for the rest.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, OpenHow};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;

use super::buffers::{Buffer, BufferPool};
use crate::sys;
use crate::sys::name::Name;
use crate::sys::stat::{FileKey, Stat, Time};

/// What the ring can be asked to do.
pub(super) enum Op {
    /// Open a name of src for reading, as `sys::fd::open_src` does.
    Open {
        dir: Arc<OwnedFd>,
        name: Name,
        noatime: bool,
    },
    /// statx of an open file.
    Stat { fd: Arc<OwnedFd> },
    /// Read into `buffer[at..at + len]`.
    Read {
        fd: Arc<OwnedFd>,
        buffer: Buffer,
        at: usize,
        len: usize,
        offset: u64,
    },
    /// Write from `buffer[at..at + len]`.
    Write {
        fd: Arc<OwnedFd>,
        buffer: Buffer,
        at: usize,
        len: usize,
        offset: u64,
    },
    /// fdatasync.
    Sync { fd: Arc<OwnedFd> },
    /// fallocate with FALLOC_FL_KEEP_SIZE.
    Preallocate { fd: Arc<OwnedFd>, len: u64 },
    /// close.
    Close { fd: OwnedFd },
    /// Read an eventfd: somebody wakes this worker.
    Wake { fd: Arc<OwnedFd> },
}

/// What an operation returned.
pub(super) enum Reply {
    Fd(OwnedFd),
    Stat(Stat),
    Count(usize),
}

/// A finished operation.
pub(super) struct Completed {
    /// The number given to `push`.
    pub(super) token: u64,
    /// A buffer that was lent to the kernel.
    pub(super) buffer: Option<Buffer>,
    pub(super) result: Result<Reply, Errno>,
    /// Since `push`.
    pub(super) took: Duration,
}

/// An operation in the slab, with the memory that its entry points to.
enum Held {
    Open {
        _dir: Arc<OwnedFd>,
        _name: Name,
        _how: Box<OpenHow>,
    },
    Stat {
        _fd: Arc<OwnedFd>,
        block: Box<libc::statx>,
    },
    Buffer {
        _fd: Arc<OwnedFd>,
        buffer: Buffer,
    },
    File {
        _fd: Arc<OwnedFd>,
    },
    Wake {
        _fd: Arc<OwnedFd>,
        _value: Box<[u8; 8]>,
    },
    Nothing,
}

struct Entry {
    held: Held,
    token: u64,
    since: Instant,
}

/// One io_uring and its slab.
pub(super) struct Ring {
    uring: IoUring,
    slab: Vec<Option<Entry>>,
    free: Vec<usize>,
    /// Operations in the slab, without the wake.
    in_flight: usize,
    registered: bool,
    probe: Probe,
}

const EMPTY_PATH: &std::ffi::CStr = c"";

impl Ring {
    /// A ring for at most `ops_max` operations, with all of `buffers` registered where the memory
    /// limit allows. Must be called, and used, on the worker's own thread.
    pub(super) fn new(ops_max: usize, buffers: &mut BufferPool) -> sys::Result<Ring> {
        let entries = u32::try_from(ops_max.next_power_of_two()).map_err(|_| Errno::INVAL)?;
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
        uring
            .submitter()
            .register_probe(&mut probe)
            .map_err(errno_of)?;
        for needed in [opcode::Read::CODE, opcode::Write::CODE] {
            if !probe.is_supported(needed) {
                return Err(Errno::NOSYS);
            }
        }
        // Every operation that hangs holds a kernel worker; with fewer than we have in flight,
        // demand would wait behind hung background work. Unbounded ones (sockets) we don't use.
        let mut workers = [u32::try_from(ops_max).unwrap_or(u32::MAX), 0];
        if let Err(e) = uring.submitter().register_iowq_max_workers(&mut workers) {
            tracing::debug!(error = %e, "io_uring worker limit not raised");
        }
        let vecs: Vec<libc::iovec> = buffers
            .all_mut()
            .map(|b| {
                let len = b.len();
                let bytes = b.bytes_mut(0..len);
                libc::iovec {
                    iov_base: bytes.as_mut_ptr().cast(),
                    iov_len: len,
                }
            })
            .collect();
        // SAFETY: the vectors describe heap memory of buffers that are freed only after the ring
        // (the worker drops its ring first, and the slab owns what is lent); registering pins the
        // pages and reads or writes nothing.
        let registered = match unsafe { uring.submitter().register_buffers(&vecs) } {
            Ok(()) => true,
            Err(e) => {
                tracing::debug!(error = %e, "buffers not registered");
                false
            }
        };
        Ok(Ring {
            uring,
            slab: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            registered,
            probe,
        })
    }

    /// True when the running kernel has the operation.
    pub(super) fn supports(&self, op: OpKind) -> bool {
        self.probe.is_supported(match op {
            OpKind::Open => opcode::OpenAt2::CODE,
            OpKind::Stat => opcode::Statx::CODE,
            OpKind::Sync => opcode::Fsync::CODE,
            OpKind::Preallocate => opcode::Fallocate::CODE,
            OpKind::Close => opcode::Close::CODE,
        })
    }

    /// Queues an operation. `wait` says that it may wait (IOSQE_ASYNC): the kernel then does not
    /// try it on this thread first.
    pub(super) fn push(&mut self, token: u64, op: Op, wait: bool) {
        let fixed = self.registered;
        let (held, entry) = prepare(op, fixed);
        if !matches!(held, Held::Wake { .. }) {
            self.in_flight += 1;
        }
        let entry_of = Entry {
            held,
            token,
            since: Instant::now(),
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.slab[index] = Some(entry_of);
                index
            }
            None => {
                self.slab.push(Some(entry_of));
                self.slab.len() - 1
            }
        };
        let mut entry = entry.user_data(index as u64);
        if wait {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        // SAFETY: everything that the entry points to is now owned by the slab's heap memory
        // (moving a Box, Vec or CString moves no pointee), until its completion was popped.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            if let Err(e) = self.enter(false) {
                // Cannot happen with a ring that worked until now; the entry must not be lost.
                tracing::error!(error = %e, "io_uring_enter");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Gives the queued entries to the kernel and lets completions arrive; waits for one if told.
    pub(super) fn enter(&mut self, wait: bool) -> sys::Result<()> {
        if !wait {
            let submission = self.uring.submission();
            if submission.is_empty() && !submission.taskrun() {
                return Ok(());
            }
        }
        loop {
            match self.uring.submit_and_wait(usize::from(wait)) {
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
    pub(super) fn pop(&mut self) -> Option<Completed> {
        let cqe = self.uring.completion().next()?;
        let index = usize::try_from(cqe.user_data()).ok()?;
        let Entry { held, token, since } = self.slab.get_mut(index)?.take()?;
        self.free.push(index);
        let result = match cqe.result() {
            n if n < 0 => Err(Errno::from_raw_os_error(-n)),
            n => Ok(n),
        };
        let mut buffer = None;
        if !matches!(held, Held::Wake { .. }) {
            self.in_flight -= 1;
        }
        let count = |n: i32| Reply::Count(n.unsigned_abs() as usize);
        let result = match held {
            Held::Open { .. } => result.map(|n| {
                // SAFETY: a successful open's result is a new fd that nobody else owns.
                Reply::Fd(unsafe { OwnedFd::from_raw_fd(n) })
            }),
            Held::Stat { block, .. } => result.map(|_| Reply::Stat(stat_of(&block))),
            Held::Buffer { buffer: b, .. } => {
                buffer = Some(b);
                result.map(count)
            }
            Held::File { .. } | Held::Wake { .. } | Held::Nothing => result.map(count),
        };
        Some(Completed {
            token,
            buffer,
            result,
            took: since.elapsed(),
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write into what the slab owns: wait for it. What cannot be waited
        // for is leaked, not freed.
        while self.in_flight > 0 {
            if self.enter(true).is_err() {
                break;
            }
            while self.pop().is_some() {}
        }
        if self.slab.iter().any(Option::is_some) {
            // The wake's 8 bytes: nobody signals it any more, but the kernel could still write.
            self.slab.drain(..).for_each(std::mem::forget);
        }
    }
}

/// Operations that a kernel may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpKind {
    Open,
    Stat,
    Sync,
    Preallocate,
    Close,
}

/// Splits an operation into what the slab keeps and the entry that points to it.
fn prepare(op: Op, fixed: bool) -> (Held, squeue::Entry) {
    match op {
        Op::Open { dir, name, noatime } => {
            let mut flags = OFlags::RDONLY
                | OFlags::NONBLOCK
                | OFlags::NOCTTY
                | OFlags::NOFOLLOW
                | OFlags::CLOEXEC;
            flags.set(OFlags::NOATIME, noatime);
            let resolve =
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let how = OpenHow::new()
                .flags(u64::from(flags.bits()))
                .resolve(resolve.bits());
            let how = Box::new(how);
            let entry = opcode::OpenAt2::new(
                Fd(dir.as_raw_fd()),
                name.as_cstr().as_ptr(),
                &raw const *how,
            )
            .build();
            (
                Held::Open {
                    _dir: dir,
                    _name: name,
                    _how: how,
                },
                entry,
            )
        }
        Op::Stat { fd } => {
            // SAFETY: statx is plain integers; all zeros is a value.
            let mut block: Box<libc::statx> = Box::new(unsafe { std::mem::zeroed() });
            let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
            let to = (&raw mut *block).cast();
            let entry = opcode::Statx::new(Fd(fd.as_raw_fd()), EMPTY_PATH.as_ptr(), to)
                .flags(libc::AT_EMPTY_PATH)
                .mask(mask)
                .build();
            (Held::Stat { _fd: fd, block }, entry)
        }
        Op::Read {
            fd,
            mut buffer,
            at,
            len,
            offset,
        } => {
            let bytes = buffer.bytes_mut(at..at + len);
            let (to, len) = (bytes.as_mut_ptr(), bytes.len() as u32); // A buffer is under 4 GiB.
            let on = Fd(fd.as_raw_fd());
            let entry = if fixed {
                opcode::ReadFixed::new(on, to, len, buffer.index)
                    .offset(offset)
                    .build()
            } else {
                opcode::Read::new(on, to, len).offset(offset).build()
            };
            (Held::Buffer { _fd: fd, buffer }, entry)
        }
        Op::Write {
            fd,
            buffer,
            at,
            len,
            offset,
        } => {
            let bytes = buffer.bytes(at..at + len);
            let (from, len) = (bytes.as_ptr(), bytes.len() as u32); // A buffer is under 4 GiB.
            let on = Fd(fd.as_raw_fd());
            let entry = if fixed {
                opcode::WriteFixed::new(on, from, len, buffer.index)
                    .offset(offset)
                    .build()
            } else {
                opcode::Write::new(on, from, len).offset(offset).build()
            };
            (Held::Buffer { _fd: fd, buffer }, entry)
        }
        Op::Sync { fd } => {
            let entry = opcode::Fsync::new(Fd(fd.as_raw_fd()))
                .flags(FsyncFlags::DATASYNC)
                .build();
            (Held::File { _fd: fd }, entry)
        }
        Op::Preallocate { fd, len } => {
            let entry = opcode::Fallocate::new(Fd(fd.as_raw_fd()), len)
                .mode(libc::FALLOC_FL_KEEP_SIZE)
                .build();
            (Held::File { _fd: fd }, entry)
        }
        Op::Close { fd } => {
            (
                Held::Nothing,
                opcode::Close::new(Fd(fd.into_raw_fd())).build(),
            ) // The kernel's now.
        }
        Op::Wake { fd } => {
            let mut value = Box::new([0u8; 8]);
            let entry = opcode::Read::new(Fd(fd.as_raw_fd()), value.as_mut_ptr(), 8).build();
            (
                Held::Wake {
                    _fd: fd,
                    _value: value,
                },
                entry,
            )
        }
    }
}

fn errno_of(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}

/// `sys::stat` keeps its own conversion private; this is the same from libc's struct.
fn stat_of(x: &libc::statx) -> Stat {
    let time = |t: &libc::statx_timestamp| Time {
        sec: t.tv_sec,
        nsec: t.tv_nsec,
    };
    let has = |bit: i32| x.stx_attributes & u64::from(bit.unsigned_abs()) != 0;
    Stat {
        key: FileKey {
            dev: (x.stx_dev_major, x.stx_dev_minor),
            ino: x.stx_ino,
        },
        mnt_id: x.stx_mnt_id,
        mode: u32::from(x.stx_mode),
        nlink: x.stx_nlink,
        uid: x.stx_uid,
        gid: x.stx_gid,
        size: x.stx_size,
        blocks: x.stx_blocks,
        blksize: x.stx_blksize,
        rdev: (x.stx_rdev_major, x.stx_rdev_minor),
        atime: time(&x.stx_atime),
        mtime: time(&x.stx_mtime),
        ctime: time(&x.stx_ctime),
        btime: time(&x.stx_btime),
        immutable: has(libc::STATX_ATTR_IMMUTABLE),
        append: has(libc::STATX_ATTR_APPEND),
        mount_root: has(libc::STATX_ATTR_MOUNT_ROOT),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn wait(ring: &mut Ring) -> Completed {
        loop {
            if let Some(c) = ring.pop() {
                return c;
            }
            ring.enter(true).expect("enter");
        }
    }

    #[test]
    fn the_ring_sees_the_same_file_as_plain_calls_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::write(dir.path().join("f"), b"hello").expect("write");
        let dir = Arc::new(OwnedFd::from(
            std::fs::File::open(dir.path()).expect("open"),
        ));
        let mut buffers = BufferPool::new(2, 2, 1 << 17);
        let Ok(mut ring) = Ring::new(16, &mut buffers) else {
            eprintln!("skipped: no io_uring");
            return;
        };
        let name = Name::new(b"f").expect("name");
        let open = Op::Open {
            dir: Arc::clone(&dir),
            name: name.clone(),
            noatime: true,
        };
        ring.push(7, open, true);
        let done = wait(&mut ring);
        assert_eq!(done.token, 7);
        let Ok(Reply::Fd(fd)) = done.result else {
            panic!("not opened")
        };
        let fd = Arc::new(fd);
        ring.push(
            8,
            Op::Stat {
                fd: Arc::clone(&fd),
            },
            true,
        );
        let Ok(Reply::Stat(stat)) = wait(&mut ring).result else {
            panic!("no stat")
        };
        assert_eq!(stat, sys::stat::stat_fd(fd.as_fd()).expect("fstat"));
        let buffer = buffers
            .take(9, super::super::job::Priority::Demand)
            .expect("a buffer");
        let read = Op::Read {
            fd: Arc::clone(&fd),
            buffer,
            at: 10,
            len: 9,
            offset: 1,
        };
        ring.push(9, read, false);
        let done = wait(&mut ring);
        assert!(matches!(done.result, Ok(Reply::Count(4))));
        assert_eq!(done.buffer.expect("given back").bytes(10..14), b"ello");
        let missing = Name::new(b"nope").expect("name");
        ring.push(
            10,
            Op::Open {
                dir,
                name: missing,
                noatime: true,
            },
            true,
        );
        assert!(matches!(wait(&mut ring).result, Err(Errno::NOENT)));
        assert_eq!(ring.in_flight, 0);
    }
}
