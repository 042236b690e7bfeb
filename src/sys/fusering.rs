//! One queue of FUSE over io_uring (Documentation/filesystems/fuse/fuse-io-uring.rst; Linux 6.14).
//!
//!   registered -> with the kernel   `register`: the kernel owns the slot's memory
//!   with the kernel -> taken        a completion: the request is in it, and it is ours alone
//!   taken -> with the kernel        `commit`: the answer is in it, and the next request may come
//!   any -> gone                     the kernel has ended the connection
//!
//! A queue belongs to the thread that made it; a slot that was taken may go anywhere and comes back
//! through its [`Bell`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::Result;

/// FUSE_IO_URING_CMD_REGISTER.
const REGISTER: u32 = 1;
/// FUSE_IO_URING_CMD_COMMIT_AND_FETCH.
const COMMIT_AND_FETCH: u32 = 2;

/// struct fuse_uring_req_header: the request's header or the reply's, the operation's fields, and what
/// the transport itself says.
const HEADERS: usize = 288;
const FIELDS_AT: usize = 128;
/// Room for the operation's fields.
pub const FIELDS_LEN: usize = 128;
const TRANSPORT_AT: usize = FIELDS_AT + FIELDS_LEN;
/// In the last: commit_id and payload_sz of struct fuse_uring_ent_in_out.
const COMMIT_ID_AT: usize = TRANSPORT_AT + 8;
const PAYLOAD_SIZE_AT: usize = TRANSPORT_AT + 16;

/// Behind the headers: where the two parts of the slot are, for its registration.
const IOV_AT: usize = 512;

/// A page for the headers; data begins at a page of its own.
const HEAD_LEN: usize = 4096;

/// Submissions that one call takes; what is more goes in several.
const SUBMISSIONS: u32 = 64;

/// The completion of the read that waits for the bell.
const BELL: u64 = u64::MAX;

/// Whether this kernel offers FUSE over io_uring; `None`: it has never heard of it.
pub fn is_enabled() -> Option<bool> {
    let text = std::fs::read("/sys/module/fuse/parameters/enable_uring").ok()?;
    Some(text.first() == Some(&b'Y'))
}

/// Switches it on for connections made from now on. Root only; it stays so until the next boot.
pub fn enable() -> io::Result<()> {
    std::fs::write("/sys/module/fuse/parameters/enable_uring", "Y")
}

/// How many queues the kernel wants: one for each CPU that could ever be there.
pub fn queues() -> Option<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").ok()?;
    let last = text.trim().rsplit(['-', ',']).next()?;
    last.parse::<u16>().ok()?.checked_add(1)
}

/// Memory that the kernel fills and reads, one slot or several.
#[derive(Debug)]
struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; who may touch which part is the slots' affair.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Result<Memory> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Memory { base, len })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; every slot in it holds a reference, and so does the
        // queue while the kernel may write.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) }; // Only EINVAL.
    }
}

/// A request that was taken, and the room for its answer. Ours alone until it is committed.
#[derive(Debug)]
pub struct Slot {
    memory: Arc<Memory>,
    /// Where the slot begins in `memory`.
    at: usize,
    payload_len: usize,
    /// The slot's number in its queue.
    number: u32,
}

impl Slot {
    fn part(&self, at: usize, len: usize) -> &[u8] {
        debug_assert!(at + len <= HEAD_LEN + self.payload_len);
        // SAFETY: inside the slot (its length is HEAD_LEN + payload_len), which is mapped while
        // `memory` lives; nobody else, the kernel included, touches a taken slot.
        unsafe { std::slice::from_raw_parts(self.memory.base.as_ptr().add(self.at + at), len) }
    }

    fn part_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        debug_assert!(at + len <= HEAD_LEN + self.payload_len);
        // SAFETY: as in `part`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base.as_ptr().add(self.at + at), len) }
    }

    fn number_at<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.part(at, N));
        bytes
    }

    /// The request's header.
    pub fn header(&self) -> &[u8] {
        self.part(0, FIELDS_AT)
    }

    /// The operation's fields, and room behind them.
    pub fn fields(&self) -> &[u8] {
        self.part(FIELDS_AT, FIELDS_LEN)
    }

    /// Names and data.
    pub fn payload(&self) -> &[u8] {
        let len = u32::from_ne_bytes(self.number_at(PAYLOAD_SIZE_AT)) as usize;
        self.part(HEAD_LEN, len.min(self.payload_len))
    }

    /// Puts an answer in the request's place: the reply's header, and what follows it.
    /// EMSGSIZE: the answer is longer than the kernel has asked for.
    pub fn fill(&mut self, header: &[u8; 16], fixed: &[u8], data: &[u8]) -> Result<()> {
        let len = fixed.len() + data.len();
        if len > self.payload_len {
            return Err(Errno::MSGSIZE);
        }
        self.part_mut(0, 16).copy_from_slice(header);
        self.part_mut(HEAD_LEN, fixed.len()).copy_from_slice(fixed);
        let at = HEAD_LEN + fixed.len();
        self.part_mut(at, data.len()).copy_from_slice(data);
        let size = (len as u32).to_ne_bytes();
        self.part_mut(PAYLOAD_SIZE_AT, 4).copy_from_slice(&size);
        Ok(())
    }
}

/// Wakes the thread of a queue.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// The queue's next `wait` returns at once.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes()); // EAGAIN: it rings already.
    }
}

/// What came back from the kernel.
#[derive(Debug)]
pub enum Event {
    /// A request.
    Request(Slot),
    /// Somebody rang.
    Bell,
    /// A slot is gone: the connection is over (ENOTCONN, ECONNABORTED), or it was refused.
    Gone(Errno),
}

/// One queue. Not `Send`: the kernel takes submissions from the thread that made it, and no other.
pub struct Queue {
    ring: IoUring<Entry128>,
    dev: Arc<OwnedFd>,
    qid: u16,
    payload_len: usize,
    bell: Arc<Bell>,
    /// Where the read of the bell puts its count.
    count: Box<[u8; 8]>,
    slots: Vec<Room>,
    /// For the first slots.
    spare: Option<Memory>,
    /// Slots that the kernel has.
    with_kernel: usize,
    _of_one_thread: std::marker::PhantomData<*const ()>,
}

/// A slot's place.
struct Room {
    memory: Arc<Memory>,
    at: usize,
}

impl Queue {
    /// A queue for one CPU; `payload_len` is what the largest request or answer carries. Memory for the
    /// `first` slots is there when this returns.
    pub fn new(dev: Arc<OwnedFd>, qid: u16, payload_len: usize, first: usize) -> io::Result<Queue> {
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let mut queue = Queue {
            ring: builder().build(SUBMISSIONS)?,
            dev,
            qid,
            payload_len,
            bell: Arc::new(Bell(bell)),
            count: Box::new([0; 8]),
            slots: Vec::new(),
            spare: Some(Memory::new(slot_len(payload_len) * first)?),
            with_kernel: 0,
            _of_one_thread: std::marker::PhantomData,
        };
        queue.listen()?;
        Ok(queue)
    }

    /// What wakes this queue.
    pub fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    /// Slots that the kernel has, and may put a request into.
    pub fn with_kernel(&self) -> usize {
        self.with_kernel
    }

    /// All slots that were ever registered.
    pub fn registered(&self) -> usize {
        self.slots.len()
    }

    /// Gives the kernel so many slots more.
    pub fn register(&mut self, count: usize) -> io::Result<()> {
        let each = slot_len(self.payload_len);
        let memory = match self.spare.take().filter(|m| m.len >= each * count) {
            Some(memory) => memory,
            None => Memory::new(each * count)?,
        };
        let memory = Arc::new(memory);
        for n in 0..count {
            let at = n * each;
            // SAFETY: all in the slot's first page but the start of its second; the mapping is new,
            // aligned to a page, and nobody else knows it.
            let iov = unsafe {
                let head = memory.base.as_ptr().add(at);
                let iov = head.add(IOV_AT).cast::<[libc::iovec; 2]>();
                let part = |at: usize, len| libc::iovec {
                    iov_base: head.add(at).cast(),
                    iov_len: len,
                };
                iov.write([part(0, HEADERS), part(HEAD_LEN, self.payload_len)]);
                iov
            };
            let entry = self.command(REGISTER, 0, Some(iov));
            let number = self.slots.len() as u64;
            self.slots.push(Room {
                memory: Arc::clone(&memory),
                at,
            });
            self.push(entry.user_data(number))?;
            self.with_kernel += 1;
        }
        Ok(())
    }

    /// Sends the answer that is in a slot, and has the kernel put the next request there.
    pub fn commit(&mut self, slot: Slot) -> io::Result<()> {
        let id = u64::from_ne_bytes(slot.number_at(COMMIT_ID_AT));
        let entry = self.command(COMMIT_AND_FETCH, id, None);
        self.push(entry.user_data(u64::from(slot.number)))?;
        self.with_kernel += 1;
        Ok(())
    }

    /// Sends what was registered and committed, and takes what has come back.
    pub fn poll(&mut self, events: &mut VecDeque<Event>) -> io::Result<()> {
        self.enter(0, events)
    }

    /// The same, and waits for something to come back.
    pub fn wait(&mut self, events: &mut VecDeque<Event>) -> io::Result<()> {
        self.enter(1, events)
    }

    fn enter(&mut self, wanted: usize, events: &mut VecDeque<Event>) -> io::Result<()> {
        // Even with 0 wanted: completions are made only when they are asked for.
        match self.ring.submit_and_wait(wanted) {
            Ok(_) => {}
            // EBUSY: completions first.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
            // No memory for a request, for now. Nobody else would answer on this CPU.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => pause(),
            Err(e) => return Err(e),
        }
        let done: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect();
        for (number, result) in done {
            if number == BELL {
                events.push_back(Event::Bell);
                self.listen()?;
                continue;
            }
            self.with_kernel = self.with_kernel.saturating_sub(1);
            events.push_back(match (result, self.slots.get(number as usize)) {
                (0.., Some(room)) => Event::Request(Slot {
                    memory: Arc::clone(&room.memory),
                    at: room.at,
                    payload_len: self.payload_len,
                    number: number as u32,
                }),
                (errno, _) => Event::Gone(Errno::from_raw_os_error(-errno.min(-1))),
            });
        }
        Ok(())
    }

    /// Has the bell heard by the next `wait`.
    fn listen(&mut self) -> io::Result<()> {
        let fd = Fd(self.bell.0.as_raw_fd());
        let read = opcode::Read::new(fd, self.count.as_mut_ptr(), 8).build();
        self.push(Entry128::from(read).user_data(BELL))
    }

    fn command(&self, code: u32, commit_id: u64, iov: Option<*const [libc::iovec; 2]>) -> Entry128 {
        // struct fuse_uring_cmd_req: flags, commit_id, qid.
        let mut command = [0u8; 80];
        command[8..16].copy_from_slice(&commit_id.to_ne_bytes());
        command[16..18].copy_from_slice(&self.qid.to_ne_bytes());
        let dev = Fd(self.dev.as_raw_fd());
        let entry = opcode::UringCmd80::new(dev, code).cmd(command);
        let Some(iov) = iov else {
            return entry.build();
        };
        let mut entry = entry.addr(Some(iov as u64)).build();
        const { assert!(size_of::<Entry128>() == 128) };
        // SAFETY: an Entry128 is struct io_uring_sqe with its command (repr(C), 128 bytes), whose
        // `len` is the u32 at offset 24; io-uring 0.7 has no setter for it.
        unsafe { (&raw mut entry).cast::<u32>().add(6).write(2) };
        entry
    }

    fn push(&mut self, entry: Entry128) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to (the slots' memory, their iovecs, the bell's count)
            // lives as long as the queue, and longer than the ring's last use of it: see `Drop`.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => pause(),
                Err(e) => return Err(e),
            }
        }
    }
}

fn pause() {
    std::thread::sleep(std::time::Duration::from_millis(1));
}

impl Drop for Queue {
    fn drop(&mut self) {
        // While the kernel has slots it may write into them, in this thread's name, until the ring is
        // gone for good, which nobody tells: that memory is never given back. It happens only when a
        // thread ends before its connection.
        if self.with_kernel > 0 {
            for room in std::mem::take(&mut self.slots) {
                std::mem::forget(room);
            }
        }
        // So may a read of the bell that was on its way.
        std::mem::forget(std::mem::take(&mut self.count));
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue {} of {} slots", self.qid, self.slots.len())
    }
}

fn slot_len(payload_len: usize) -> usize {
    HEAD_LEN + payload_len.next_multiple_of(HEAD_LEN)
}

fn builder() -> io_uring::Builder<Entry128> {
    let mut builder = IoUring::<Entry128>::builder();
    // One thread submits, and completions are made when it asks for them, not by interrupting it.
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    builder.setup_cqsize(4 * SUBMISSIONS);
    builder
}
