//! Perform: what a plan's actions mean in system calls and ring operations.
//!
//! Each action goes one of three ways: at once, as a plain call (cheap, or known to be fast);
//! through the ring, with IOSQE_ASYNC where it may wait; or on a thread of the pool where it may
//! wait and the ring has no opcode. What the running kernel's ring lacks is called directly.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;

use super::buffers::{Buffer, SMALL_BYTES};
use super::copy::{Action, Event, Failure, Offer, Piece};
use super::job::{Copied, Priority};
use super::latency::{Kind, Latencies, Way};
use super::passing::{self, Passing};
use super::ring::{Completed, Op, Opcode, Reply, Ring};
use super::worker::{Pair, Worker, call};
use crate::error::{Error, Side};
use crate::sys;
use crate::sys::name::RelPath;

/// Up to this size a clone is made on the spot; a larger src may have to be written back first.
const CLONE_HERE_BYTES: u64 = 1 << 20;
/// What a token says besides the slot (its low half).
const CONTROL: u64 = 0;
const CHUNK: u64 = 1;
const CLOSE_DEMAND: u64 = 1 << 20;
const CLOSE_BACKGROUND: u64 = CLOSE_DEMAND + 1;
const CLOSE_OLD: u64 = CLOSE_DEMAND + 2;

impl Worker {
    /// Performs one action: the event if it is done, `None` if it is under way or has no answer.
    pub(super) fn perform(&mut self, slot: usize, action: Action) -> Option<Event> {
        match action {
            Action::Open { noatime } => self.open(slot, noatime),
            Action::StatSrc { fresh } => self.stat_src(slot, fresh),
            Action::StatDst => self.stat_dst(slot),
            Action::Clone => {
                let size = self.files[slot].as_ref()?.size;
                let here = size <= CLONE_HERE_BYTES && self.is_fast(slot);
                self.on_pool(slot, here, action, |src, dst| {
                    sys::copy::clone_file(src.as_fd(), dst.as_fd()).map(Event::Cloned)
                })
            }
            Action::SeekData { from, end } => {
                let here = self.is_fast(slot);
                self.on_pool(slot, here, action, move |src, _| {
                    sys::copy::next_data(src.as_fd(), from, end).map(Event::Extent)
                })
            }
            Action::CopyRange { offset, len } => {
                self.on_pool(slot, false, action, move |src, dst| {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    sys::copy::copy_range(src.as_fd(), offset, dst.as_fd(), offset, len)
                        .map(|n| Event::CopiedRange(n as u64))
                })
            }
            Action::Preallocate { len } => {
                if self.ring_has(Opcode::Fallocate) {
                    let fd = Arc::clone(&self.files[slot].as_ref()?.dst);
                    return self.control(slot, action, preallocate(fd, len));
                }
                self.on_pool(slot, true, action, move |_, dst| {
                    sys::copy::preallocate(dst.as_fd(), 0..len).map(|()| Event::Preallocated)
                })
            }
            Action::Punch(ref range) => {
                let range = range.clone();
                self.on_pool(slot, true, action, move |_, dst| punch(dst, range))
            }
            Action::Truncate { size } => self.on_pool(slot, true, action, move |_, dst| {
                sys::copy::truncate(dst.as_fd(), size).map(|()| Event::Truncated)
            }),
            Action::Sync => {
                if self.ring_has(Opcode::Fsync) {
                    let fd = Arc::clone(&self.files[slot].as_ref()?.dst);
                    return self.control(slot, action, fdatasync(fd));
                }
                self.on_pool(slot, false, action, |_, dst| {
                    sys::fd::fdatasync(dst.as_fd()).map(|()| Event::Synced)
                })
            }
            Action::Read(piece) => self.read(slot, piece),
            Action::Write(piece) => self.write(slot, piece),
            announcement => self.announce(slot, announcement),
        }
    }

    /// Remembers what an event tells about the file and its file systems.
    pub(super) fn learn(&mut self, slot: usize, event: &Event) {
        let Some(file) = self.files[slot].as_mut() else {
            return;
        };
        match event {
            Event::SrcStat(stat) => {
                file.size = stat.size;
                file.device = stat.key.dev;
                let bytes = stat.size.min(stat.blocks.saturating_mul(512));
                if file.passing.is_none() && bytes > SMALL_BYTES as u64 {
                    let passes = file.done.passes(bytes);
                    file.passing = passes.then(|| Passing::new(self.ring.is_some()));
                }
            }
            Event::DstStat { device, offer, .. } => {
                file.dst_device = *device;
                let pair = self.pairs.entry((file.device, *device)).or_default();
                pair.offload = offer.offload;
            }
            Event::Cloned(worked) => {
                let pair = self
                    .pairs
                    .entry((file.device, file.dst_device))
                    .or_default();
                // One file may refuse where others share (inline data, swap files).
                if pair.clone != Some(true) {
                    pair.clone = Some(*worked);
                }
            }
            _ => {}
        }
    }

    /// The event that a completed ring operation is, and for which file.
    pub(super) fn event_of(&mut self, completed: Completed) -> Option<(usize, Event)> {
        let Completed {
            token,
            buffer,
            result,
            took,
            ..
        } = completed;
        let (slot, what) = ((token & 0xffff_ffff) as usize, token >> 32); // By `token_of`.
        match what {
            CLOSE_OLD => return None,
            CLOSE_DEMAND | CLOSE_BACKGROUND => {
                // close(2) frees the fd whatever it returns; src was only read.
                let demand = what == CLOSE_DEMAND;
                self.release(
                    slot,
                    if demand {
                        Priority::Demand
                    } else {
                        Priority::Background
                    },
                );
                return None;
            }
            _ => {}
        }
        let file = self.files[slot].as_mut()?;
        let action = if what == CONTROL {
            file.control.take()?
        } else {
            let chunk = (what - CHUNK) as usize; // By `token_of`.
            let small = buffer.as_ref().is_some_and(|b| b.len() <= SMALL_BYTES);
            file.buffers[chunk] = buffer;
            let action = file.pieces[chunk].take()?;
            if small {
                let kind = if let Action::Read(_) = action {
                    Kind::Read
                } else {
                    Kind::Write
                };
                self.meter(slot).ring(kind, took);
            }
            action
        };
        match action {
            Action::Open { .. } => self.meter(slot).ring(Kind::Open, took),
            Action::StatSrc { .. } => self.meter(slot).ring(Kind::Stat, took),
            _ => {}
        }
        if let Err(errno) = result
            && self.refused_once(slot, &action, errno)
        {
            return self.perform(slot, action).map(|event| (slot, event));
        }
        let event = match (action, result) {
            (Action::StatSrc { .. }, Ok(Reply::Stat(stat))) => Event::SrcStat(stat),
            (Action::Open { .. }, Ok(Reply::Fd(fd))) => {
                self.files[slot].as_mut()?.src = Some(Arc::new(fd));
                Event::Opened
            }
            (Action::Read(p), Ok(Reply::Count(len))) => Event::Read {
                chunk: p.chunk,
                len,
            },
            (Action::Write(p), Ok(Reply::Count(len))) => Event::Written {
                chunk: p.chunk,
                len,
            },
            (Action::Sync, Ok(_)) => Event::Synced,
            (Action::Preallocate { .. }, Ok(_)) => Event::Preallocated,
            // As sys::copy::preallocate: it was only a hint.
            (Action::Preallocate { .. }, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)) => {
                Event::Preallocated
            }
            (action, Err(errno)) => Event::Failed(action, errno),
            (action, Ok(_)) => Event::Failed(action, Errno::IO), // Not an answer to this.
        };
        Some((slot, event))
    }

    /// Reads into a buffer just taken.
    pub(super) fn read_into(&mut self, slot: usize, piece: Piece, buffer: Buffer) -> Option<Event> {
        let file = self.files[slot].as_mut()?;
        file.buffers[piece.chunk] = Some(buffer);
        if file.priority == Priority::Background {
            self.shared.throttle.spend(piece.len as u64);
        }
        self.read_more(slot, piece)
    }

    fn read(&mut self, slot: usize, piece: Piece) -> Option<Event> {
        if piece.at > 0 {
            return self.read_more(slot, piece); // The chunk has its buffer.
        }
        let priority = self.files[slot].as_ref()?.priority;
        let lane = priority as usize;
        if piece.len <= SMALL_BYTES
            && self.is_free(slot)
            && self.reads[..=lane].iter().all(|lane| lane.is_empty())
            && let Some(buffer) = self.buffers.take(piece.len, priority)
        {
            return self.read_into(slot, piece, buffer);
        }
        self.reads[lane].push_back((slot, piece));
        None
    }

    fn read_more(&mut self, slot: usize, piece: Piece) -> Option<Event> {
        let Piece {
            chunk,
            offset,
            at,
            len,
        } = piece;
        let len = len.min(self.io_max);
        let action = Action::Read(piece);
        let file = self.files[slot].as_ref()?;
        let small = file.buffers[chunk].as_ref()?.len() <= SMALL_BYTES;
        let (through_ring, wait) = self.data_way(slot, Kind::Read, small);
        let (away, once) = (self.reads_away(slot), self.once(slot, chunk, Side::Src));
        let file = self.files[slot].as_mut()?;
        let Some(src) = file.src.as_ref() else {
            return Some(Event::Failed(action, Errno::BADF)); // A plan reads what it has opened.
        };
        if away {
            return self.read_away(slot, piece, len);
        }
        if through_ring {
            let (fd, buffer) = (Arc::clone(src), file.buffers[chunk].take()?);
            file.pieces[chunk] = Some(action);
            let op = Op::read(fd, buffer, at..at + len, offset).once(once);
            self.push(token_of(slot, CHUNK + chunk as u64), op, wait);
            return None;
        }
        let buffer = file.buffers[chunk].as_mut()?;
        let since = Instant::now();
        let read = sys::fd::pread_some(src.as_fd(), buffer.bytes_mut(at..at + len), offset);
        if small {
            self.meter(slot).direct(Kind::Read, since.elapsed());
        }
        Some(match read {
            Ok(len) => Event::Read { chunk, len },
            Err(errno) => Event::Failed(action, errno),
        })
    }

    fn write(&mut self, slot: usize, piece: Piece) -> Option<Event> {
        let Piece {
            chunk,
            offset,
            at,
            len,
        } = piece;
        let len = len.min(self.io_max);
        let action = Action::Write(piece);
        let file = self.files[slot].as_ref()?;
        let small = file.buffers[chunk].as_ref()?.len() <= SMALL_BYTES;
        let (through_ring, wait) = self.data_way(slot, Kind::Write, small);
        let once = self.once(slot, chunk, Side::Dst);
        let file = self.files[slot].as_mut()?;
        if through_ring {
            let (fd, buffer) = (Arc::clone(&file.dst), file.buffers[chunk].take()?);
            file.pieces[chunk] = Some(action);
            let op = Op::write(fd, buffer, at..at + len, offset).once(once);
            self.push(token_of(slot, CHUNK + chunk as u64), op, wait);
            return None;
        }
        let buffer = file.buffers[chunk].as_ref()?;
        let since = Instant::now();
        let written = sys::fd::pwrite_some(file.dst.as_fd(), buffer.bytes(at..at + len), offset);
        if small {
            self.meter(slot).direct(Kind::Write, since.elapsed());
        }
        Some(match written {
            Ok(len) => Event::Written { chunk, len },
            Err(errno) => Event::Failed(action, errno),
        })
    }

    /// Whether data goes through the ring, and whether it may wait there.
    fn data_way(&mut self, slot: usize, kind: Kind, small: bool) -> (bool, bool) {
        if self.ring.is_none() {
            (false, false)
        } else if small {
            (self.meter(slot).choose(kind) == Way::Ring, true)
        } else {
            // A cached page is copied on the spot; what is not cached the kernel waits for itself.
            (true, kind == Kind::Write || !self.is_fast(slot))
        }
    }

    fn open(&mut self, slot: usize, noatime: bool) -> Option<Event> {
        if let Some(old) = self.files[slot].as_mut()?.src.take() {
            self.close(slot, old, CLOSE_OLD);
        }
        let action = Action::Open { noatime };
        if self.way(slot, Kind::Open, Opcode::OpenAt2) == Way::Ring {
            let file = self.files[slot].as_ref()?;
            let op = Op::open_src(Arc::clone(&file.src_dir), &file.src_name, noatime);
            return self.control(slot, action, op);
        }
        let file = self.files[slot].as_mut()?;
        let since = Instant::now();
        let opened = sys::fd::open_src(file.src_dir.as_fd(), &file.src_name);
        let took = since.elapsed();
        let event = match opened {
            Ok(fd) => {
                file.src = Some(Arc::new(fd));
                Event::Opened
            }
            // open_src has tried without O_NOATIME already.
            Err(errno) => Event::Failed(Action::Open { noatime: false }, errno),
        };
        self.meter(slot).direct(Kind::Open, took);
        Some(event)
    }

    fn stat_src(&mut self, slot: usize, fresh: bool) -> Option<Event> {
        let action = Action::StatSrc { fresh };
        let ring = self.way(slot, Kind::Stat, Opcode::Statx) == Way::Ring;
        let Some(src) = self.files[slot].as_ref()?.src.clone() else {
            return Some(Event::Failed(action, Errno::BADF));
        };
        if ring {
            return self.control(slot, action, fstat(src, fresh));
        }
        let since = Instant::now();
        let stat = match fresh {
            true => sys::stat::stat_fd_fresh(src.as_fd()),
            false => sys::stat::stat_fd(src.as_fd()),
        };
        self.meter(slot).direct(Kind::Stat, since.elapsed());
        Some(match stat {
            Ok(stat) => Event::SrcStat(stat),
            Err(errno) => Event::Failed(action, errno),
        })
    }

    fn stat_dst(&mut self, slot: usize) -> Option<Event> {
        let file = self.files[slot].as_ref()?;
        let device = file.device;
        let stat = match sys::stat::stat_fd(file.dst.as_fd()) {
            Ok(stat) => stat,
            Err(errno) => return Some(Event::Failed(Action::StatDst, errno)),
        };
        let (size, used) = (stat.size, stat.blocks > 0);
        let pair = self.pairs.get(&(device, stat.key.dev)).copied();
        if let Some(Pair { clone, offload }) = pair {
            let offer = Offer {
                clone: clone != Some(false),
                offload,
            };
            return Some(Event::DstStat {
                size,
                used,
                device: stat.key.dev,
                offer,
            });
        }
        // The first file of this pair; statfs may ask a server.
        self.on_pool(slot, false, Action::StatDst, move |src, dst| {
            let magic = |fd: &OwnedFd| sys::host::fs_stat(fd.as_fd()).map(|s| s.magic).ok();
            let (from, to) = (magic(src), magic(dst));
            let offload = from == to && from.is_some_and(|m| COPIES_BY_ITSELF.contains(&m));
            let offer = Offer {
                clone: true,
                offload,
            };
            Ok(Event::DstStat {
                size,
                used,
                device: stat.key.dev,
                offer,
            })
        })
    }

    /// Announces something; an event when nobody wants the rest.
    fn announce(&mut self, slot: usize, action: Action) -> Option<Event> {
        let file = self.files[slot].as_mut()?;
        match action {
            Action::Data { chunk, offset, len } => self.tell_data(slot, chunk, offset, len),
            Action::Zeros(range) => {
                for at in range.clone().step_by(SMALL_BYTES) {
                    let len = (range.end - at).min(SMALL_BYTES as u64) as usize; // By the min.
                    call(&file.path, || file.done.data(at, &ZEROS[..len]));
                }
            }
            Action::Again => {
                call(&file.path, || file.done.again());
            }
            Action::Hole(range) => {
                call(&file.path, || file.done.hole(range));
            }
            Action::Landed(range) => {
                call(&file.path, || file.done.landed(range.clone()));
                self.pass_by(slot, &range);
                if self.leaves(slot) {
                    return Some(Event::Cancel);
                }
            }
            Action::Free { chunk } => self.free_chunk(slot, chunk),
            Action::Finish(outcome) => {
                let outcome = match outcome {
                    Ok(done) => Ok(Copied {
                        src: done.src,
                        bytes: done.bytes,
                    }),
                    Err(failure) => Err(error_of(failure, &file.path)),
                };
                self.finish(slot, outcome);
            }
            _ => {} // Asked for in `perform`.
        }
        None
    }

    fn finish(&mut self, slot: usize, outcome: crate::error::Result<Copied>) {
        let fast = self.is_fast(slot);
        let Some(file) = self.files[slot].take() else {
            return;
        };
        // The caller's files are let go of before it hears the end.
        let (path, done, priority) = (file.path, file.done, file.priority);
        drop((file.src_dir, file.dst));
        passing::end(file.passing, file.src.as_ref());
        call(&path, || done.done(outcome));
        match file.src {
            Some(src) if !fast => {
                let what = match priority {
                    Priority::Demand => CLOSE_DEMAND,
                    Priority::Ahead | Priority::Background => CLOSE_BACKGROUND,
                };
                self.close(slot, src, what);
            }
            _ => self.release(slot, priority),
        }
    }

    /// Closes src through the ring: on FUSE and NFS close(2) waits for the server.
    fn close(&mut self, slot: usize, src: Arc<OwnedFd>, what: u64) {
        let fd = Arc::into_inner(src);
        match fd {
            Some(fd) if self.ring_has(Opcode::Close) => {
                self.push(token_of(slot, what), Op::Close { fd }, true);
            }
            _ => match what {
                CLOSE_DEMAND => self.release(slot, Priority::Demand),
                CLOSE_BACKGROUND => self.release(slot, Priority::Background),
                _ => {}
            },
        }
    }

    /// A ring operation about no chunk.
    fn control(&mut self, slot: usize, action: Action, op: Op) -> Option<Event> {
        self.files[slot].as_mut()?.control = Some(action);
        self.push(token_of(slot, CONTROL), op, true);
        None
    }

    fn way(&mut self, slot: usize, kind: Kind, op: Opcode) -> Way {
        if !self.ring_has(op) {
            return Way::Direct;
        }
        self.meter(slot).choose(kind)
    }

    fn ring_has(&self, op: Opcode) -> bool {
        self.ring
            .as_ref()
            .is_some_and(|ring: &Ring| ring.supports(op))
    }

    fn meter(&mut self, slot: usize) -> &mut Latencies {
        let source = self.files[slot].as_ref().map_or((0, 0), |f| f.source);
        self.latencies
            .entry(source)
            .or_insert_with(|| match sys::host::may_hang(source) {
                true => Latencies::of_a_server(),
                false => Latencies::unknown(),
            })
    }

    /// True when the file's source answers opens faster than a thread can be woken, or when there
    /// is no ring to be faster with.
    fn is_fast(&mut self, slot: usize) -> bool {
        self.ring.is_none() || self.meter(slot).is_fast(Kind::Open)
    }
}

const ZEROS: &[u8] = &[0; SMALL_BYTES];

/// File systems whose servers copy between two of their files: NFS, CIFS, SMB, Ceph.
const COPIES_BY_ITSELF: [u64; 4] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400];

fn token_of(slot: usize, what: u64) -> u64 {
    what << 32 | slot as u64
}

fn preallocate(fd: Arc<OwnedFd>, len: u64) -> Op {
    Op::Fallocate {
        file: fd.into(),
        mode: rustix::fs::FallocateFlags::KEEP_SIZE,
        offset: 0,
        len,
    }
}

fn fdatasync(fd: Arc<OwnedFd>) -> Op {
    Op::Fsync {
        file: fd.into(),
        data_only: true,
    }
}

fn fstat(fd: Arc<OwnedFd>, fresh: bool) -> Op {
    Op::Statx {
        dir: fd,
        path: None,
        fresh,
    }
}

fn punch(dst: &OwnedFd, range: Range<u64>) -> sys::Result<Event> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    match sys::copy::fallocate(dst.as_fd(), mode, range.start, range.end - range.start) {
        Ok(()) => Ok(Event::Punched(true)),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(Event::Punched(false)),
        Err(errno) => Err(errno),
    }
}

fn error_of(failure: Failure, path: &RelPath) -> Error {
    match failure {
        Failure::Call { call, side, errno } => Error::Call {
            call,
            side,
            path: path.to_path(),
            errno,
        },
        Failure::SrcChanged => Error::SrcChanged {
            path: path.to_path(),
        },
        Failure::WrongType => Error::WrongType {
            path: path.to_path(),
        },
        Failure::Stopped => Error::Stopped,
    }
}
