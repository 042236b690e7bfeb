//! One queue of FUSE over io_uring (Documentation/filesystems/fuse/fuse-io-uring.rst; Linux 6.14).
//!
//!   registered -> with the kernel   `register`: the kernel owns the slot's memory
//!   with the kernel -> taken        a completion: the request is in it, and it is ours alone
//!   taken -> with the kernel        `commit`: the answer is in it, and the next request may come
//!   any -> gone                     the kernel has ended the connection
//!
//! A queue belongs to the thread that made it; a slot that was taken may go anywhere and comes back
//! through its [`Bell`].
//!
//! The kernel knows a slot by the address that it was registered with, in whichever program commits it.
//! So that another program in this process can go on with a queue, its slots are a file in memory,
//! mapped where every program has room ([`Layout`]).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

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

/// Where the first queue's slots are: far from where programs, their heaps and libraries are put, with
/// or without randomisation (x86-64, arm64 with 48 bits). A kernel with less room puts them elsewhere.
const PLACE: u64 = 0x2000_0000_0000;

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
    /// Maps a part of a file in memory, at an address that is free as a rule, or nowhere else (EEXIST).
    fn map(
        file: BorrowedFd<'_>,
        from: usize,
        len: usize,
        at: usize,
        only_there: bool,
    ) -> Result<Memory> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let mut flags = MapFlags::SHARED | MapFlags::NORESERVE;
        if only_there {
            flags |= MapFlags::FIXED_NOREPLACE;
        }
        let at = std::ptr::without_provenance_mut(at);
        // SAFETY: a new mapping, which replaces no other one; nobody else maps or cuts this file.
        let base = unsafe { rustix::mm::mmap(at, len, prot, flags, file, from as u64) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Memory { base, len })
    }

    fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; every slot in it holds a reference, and so does the
        // queue while the kernel may write.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) }; // Only EINVAL.
    }
}

/// Where a queue's slots are, for the program that goes on with it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Layout {
    qid: u16,
    /// The first slot's address.
    place: usize,
    /// So many slots were registered.
    slots: usize,
    payload_len: usize,
}

impl Layout {
    fn len(&self) -> Option<usize> {
        let each = self.payload_len.checked_next_multiple_of(HEAD_LEN)?;
        each.checked_add(HEAD_LEN)?.checked_mul(self.slots)
    }

    /// Whether this program has room there.
    pub fn is_free(&self) -> bool {
        let Some(len) = self.len().filter(|len| *len > 0) else {
            return false;
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        let at = std::ptr::without_provenance_mut(self.place);
        // SAFETY: a new mapping, which replaces no other one and which nobody is told of.
        let tried = unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) };
        let Ok(base) = tried else {
            return false;
        };
        // SAFETY: the mapping that was just made.
        let _ = unsafe { rustix::mm::munmap(base, len) }; // Only EINVAL.
        base.addr() == self.place
    }

    /// The queue that it is of.
    pub fn qid(&self) -> u16 {
        self.qid
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
    /// Its number in its queue.
    pub fn number(&self) -> u32 {
        self.number
    }

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
    /// What the slots' memory is mapped from, one behind the other.
    file: Arc<OwnedFd>,
    /// Where the first of them is, if each is where it should be.
    place: Option<usize>,
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
    with_kernel: bool,
}

impl Queue {
    /// A queue for one CPU, of at most `most` slots; `payload_len` is what the largest request or answer
    /// carries. Memory for the `first` slots is there when this returns.
    pub fn new(
        dev: Arc<OwnedFd>,
        qid: u16,
        payload_len: usize,
        (first, most): (usize, usize),
    ) -> io::Result<Queue> {
        let room = slot_len(payload_len) * most.max(first);
        let place = usize::try_from(PLACE)
            .ok()
            .and_then(|place| place.checked_add(room.checked_mul(usize::from(qid))?));
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
        let file = rustix::fs::memfd_create(c"mirrorfs-slots", flags)?;
        let mut queue = Queue::empty(dev, qid, payload_len, (file, place))?;
        queue.spare = Some(queue.more_memory(first)?);
        Ok(queue)
    }

    /// The queue that the program before this one in the process had: all slots are taken, those that
    /// the kernel had are lost.
    pub fn again(dev: Arc<OwnedFd>, layout: &Layout, file: OwnedFd) -> io::Result<Queue> {
        let len = layout.len().ok_or(Errno::INVAL)?;
        let memory = Memory::map(file.as_fd(), 0, len, layout.place, true)?;
        if memory.address() != layout.place {
            return Err(Errno::EXIST.into());
        }
        let memory = Arc::new(memory);
        let source = (file, Some(layout.place));
        let mut queue = Queue::empty(dev, layout.qid, layout.payload_len, source)?;
        queue.slots = (0..layout.slots)
            .map(|n| Room {
                memory: Arc::clone(&memory),
                at: n * slot_len(layout.payload_len),
                with_kernel: false,
            })
            .collect();
        Ok(queue)
    }

    fn empty(
        dev: Arc<OwnedFd>,
        qid: u16,
        payload_len: usize,
        (file, place): (OwnedFd, Option<usize>),
    ) -> io::Result<Queue> {
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let mut queue = Queue {
            ring: builder().build(SUBMISSIONS)?,
            dev,
            qid,
            payload_len,
            bell: Arc::new(Bell(bell)),
            count: Box::new([0; 8]),
            slots: Vec::new(),
            file: Arc::new(file),
            place,
            spare: None,
            with_kernel: 0,
            _of_one_thread: std::marker::PhantomData,
        };
        queue.listen()?;
        Ok(queue)
    }

    /// Memory for slots that follow those that are there.
    fn more_memory(&mut self, count: usize) -> Result<Memory> {
        let each = slot_len(self.payload_len);
        let (from, len) = (each * self.slots.len(), each * count);
        rustix::fs::ftruncate(&self.file, (from + len) as u64)?;
        let wanted = self.place.and_then(|place| place.checked_add(from));
        let memory = Memory::map(self.file.as_fd(), from, len, wanted.unwrap_or(0), false)?;
        if Some(memory.address()) != wanted {
            self.place = None;
        }
        Ok(memory)
    }

    /// What another program needs to go on with this queue, besides its file. `None`: the slots are
    /// where another program may have something else.
    pub fn layout(&self) -> Option<Layout> {
        Some(Layout {
            qid: self.qid,
            place: self.place?,
            slots: self.slots.len(),
            payload_len: self.payload_len,
        })
    }

    /// What the slots' memory is mapped from.
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// Its CPU.
    pub fn qid(&self) -> u16 {
        self.qid
    }

    /// The numbers of all slots that were taken and not committed.
    pub fn all_taken(&self) -> impl Iterator<Item = u32> {
        let taken = |(n, room): (u32, &Room)| (!room.with_kernel).then_some(n);
        (0..).zip(&self.slots).filter_map(taken)
    }

    /// A slot that was taken by the program before this one, once for each number.
    pub fn taken(&self, number: u32) -> Option<Slot> {
        let room = self.slots.get(number as usize)?;
        Some(self.slot(room, number))
    }

    fn slot(&self, room: &Room, number: u32) -> Slot {
        Slot {
            memory: Arc::clone(&room.memory),
            at: room.at,
            payload_len: self.payload_len,
            number,
        }
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
            None => self.more_memory(count)?,
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
                with_kernel: true,
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
        if let Some(room) = self.slots.get_mut(slot.number as usize) {
            room.with_kernel = true;
        }
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
            if let Some(room) = self.slots.get_mut(number as usize) {
                room.with_kernel = false;
            }
            events.push_back(match (result, self.slots.get(number as usize)) {
                (0.., Some(room)) => Event::Request(self.slot(room, number as u32)),
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
