//! Entry: each operation as a submission entry, and what must stay until its completion.
//!
//!   prepare()   the operation is split: what is held, and the entry that points to it
//!   finish()    the kernel's number becomes the answer; what was lent is given back
//!
//! Every pointer in an entry points to heap memory that the held value owns ([`Lent`], a buffer, a
//! Vec that nobody touches meanwhile), or into a static. Fds are kept open: an entry may wait in the
//! queue before the kernel takes its own reference.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::{DestinationSlot, Fd, Fixed, FsyncFlags, OpenHow};
use io_uring::{opcode, squeue};
use rustix::fs::{AtFlags, OFlags, Statx};
use rustix::io::Errno;

use super::call::Outcome;
use super::lent::Lent;
use super::op::{How, Op, Reply, Slot, Target};
use crate::engine::buffers::Buffer;
use crate::sys;
use crate::sys::cache;

/// What the kernel is using.
pub(super) enum Held {
    Open {
        _dir: Arc<OwnedFd>,
        _path: Lent<CStr>,
        _how: Lent<OpenHow>,
        /// In the kernel's table.
        slot: Option<Slot>,
    },
    Statx {
        _dir: Arc<OwnedFd>,
        _path: Option<Lent<CStr>>,
        block: Lent<Statx>,
    },
    Buffer {
        _file: Target,
        buffer: Buffer,
        write: bool,
    },
    Files {
        _files: [Option<Target>; 2],
        counts: bool,
    },
    Names {
        _dirs: [Option<Arc<OwnedFd>>; 2],
        _paths: [Option<Lent<CStr>>; 2],
    },
    Xattr {
        _fd: Arc<OwnedFd>,
        _name: Lent<CStr>,
        value: Vec<u8>,
        get: bool,
    },
    EventFd {
        _fd: Arc<OwnedFd>,
        _value: Lent<[u8; 8]>,
    },
    Nothing,
}

const EMPTY_PATH: &CStr = c"";
/// What one read, write or splice moves at most (MAX_RW_COUNT).
const COUNT_MAX: usize = 0x7fff_f000;
/// The last number that fits an entry; no table is that large.
const SLOT_MAX: u32 = u32::MAX - 2;

// The kernel fills in 256 bytes.
const _: () = assert!(size_of::<Statx>() == 256);

/// The same entry for a file that is an fd or in a slot.
macro_rules! on {
    ($target:expr, $file:ident => $entry:expr) => {
        match $target {
            Target::Fd(fd) => {
                let $file = Fd(fd.as_raw_fd());
                $entry
            }
            Target::Slot(slot) => {
                let $file = Fixed(slot.0.min(SLOT_MAX));
                $entry
            }
        }
    };
}

impl Held {
    /// True for what may wait for ever, and does no harm when it is cancelled.
    pub(super) fn may_be_cancelled(&self) -> bool {
        match self {
            Held::EventFd { .. } => true,
            Held::Buffer { write, .. } => !write,
            Held::Files { counts, .. } => *counts, // A splice.
            _ => false,
        }
    }
}

/// Splits an operation. `fixed`: its buffer is registered with this ring, and there is the opcode.
pub(super) fn prepare(op: Op, fixed: bool) -> (Held, squeue::Entry) {
    match op {
        Op::Open {
            dir,
            path,
            how,
            slot,
        } => open(dir, path, how, slot),
        Op::Statx { dir, path, fresh } => statx(dir, path, fresh),
        Op::Read {
            file,
            mut buffer,
            range,
            offset,
            once,
        } => {
            let (index, how) = (buffer.index, rw_flags(once));
            let bytes = buffer.bytes_mut(range);
            let (to, len) = (bytes.as_mut_ptr(), count(bytes.len()));
            let entry = on!(&file, f => match fixed {
                true => opcode::ReadFixed::new(f, to, len, index).offset(offset).rw_flags(how).build(),
                false => opcode::Read::new(f, to, len).offset(offset).rw_flags(how).build(),
            });
            (held_buffer(file, buffer, false), entry)
        }
        Op::Write {
            file,
            buffer,
            range,
            offset,
            once,
        } => {
            let (index, how) = (buffer.index, rw_flags(once));
            let bytes = buffer.bytes(range);
            let (from, len) = (bytes.as_ptr(), count(bytes.len()));
            let entry = on!(&file, f => match fixed {
                true => opcode::WriteFixed::new(f, from, len, index).offset(offset).rw_flags(how).build(),
                false => opcode::Write::new(f, from, len).offset(offset).rw_flags(how).build(),
            });
            (held_buffer(file, buffer, true), entry)
        }
        Op::GetXattr {
            fd,
            name,
            mut value,
        } => {
            let name = Lent::from(name.into_boxed_c_str());
            let to = value.as_mut_ptr().cast();
            let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
            let on = Fd(fd.as_raw_fd());
            let entry = opcode::FGetXattr::new(on, name.as_ptr().cast(), to, len).build();
            (held_xattr(fd, name, value, true), entry)
        }
        Op::SetXattr {
            fd,
            name,
            value,
            flags,
        } => {
            let name = Lent::from(name.into_boxed_c_str());
            let from = value.as_ptr().cast();
            let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
            let on = Fd(fd.as_raw_fd());
            let entry = opcode::FSetXattr::new(on, name.as_ptr().cast(), from, len)
                .flags(flags.bits().cast_signed())
                .build();
            (held_xattr(fd, name, value, false), entry)
        }
        Op::EventFd { fd } => {
            let value = Lent::from(Box::new([0u8; 8]));
            let entry = opcode::Read::new(Fd(fd.as_raw_fd()), value.as_ptr().cast(), 8).build();
            let held = Held::EventFd {
                _fd: fd,
                _value: value,
            };
            (held, entry)
        }
        op => match of_files(op) {
            Ok(prepared) => prepared,
            Err(op) => of_names(op),
        },
    }
}

/// What a read or write asks for besides.
fn rw_flags(once: bool) -> i32 {
    let flags = match once {
        true => cache::RWF_DONTCACHE.bits(),
        false => 0,
    };
    flags.cast_signed()
}

/// Operations on open files without memory.
fn of_files(op: Op) -> Result<(Held, squeue::Entry), Op> {
    let mut counts = false;
    let mut second = None;
    let (file, entry) = match op {
        Op::Fsync { file, data_only } => {
            let flags = match data_only {
                true => FsyncFlags::DATASYNC,
                false => FsyncFlags::empty(),
            };
            let entry = on!(&file, f => opcode::Fsync::new(f).flags(flags).build());
            (file, entry)
        }
        Op::Fallocate {
            file,
            mode,
            offset,
            len,
        } => {
            let mode = mode.bits().cast_signed();
            let entry = on!(&file, f => opcode::Fallocate::new(f, len)
                .offset(offset)
                .mode(mode)
                .build());
            (file, entry)
        }
        Op::Fadvise {
            file,
            offset,
            len,
            advice,
        } => {
            let len = len.cast_signed(); // The ring has asked `fits`.
            let entry = on!(&file, f => opcode::Fadvise::new(f, len, advice as i32)
                .offset(offset)
                .build());
            (file, entry)
        }
        Op::Ftruncate { file, len } => {
            let entry = on!(&file, f => opcode::Ftruncate::new(f, len).build());
            (file, entry)
        }
        Op::Splice {
            from,
            from_offset,
            to,
            to_offset,
            len,
        } => {
            let at = |offset: Option<u64>| offset.map_or(-1, u64::cast_signed);
            let (at, to_at, len) = (at(from_offset), at(to_offset), count(len));
            let entry = on!(&from, f => on!(&to, t =>
                opcode::Splice::new(f, at, t, to_at, len).build()));
            counts = true;
            second = Some(to);
            (from, entry)
        }
        Op::CloseSlot { slot } => {
            let entry = opcode::Close::new(Fixed(slot.0.min(SLOT_MAX))).build();
            return Ok((Held::Nothing, entry));
        }
        Op::Close { fd } => {
            let entry = opcode::Close::new(Fd(fd.into_raw_fd())).build(); // The kernel's now.
            return Ok((Held::Nothing, entry));
        }
        op => return Err(op),
    };
    let held = Held::Files {
        _files: [Some(file), second],
        counts,
    };
    Ok((held, entry))
}

/// Operations on names. What is none of them becomes no operation at all.
fn of_names(op: Op) -> (Held, squeue::Entry) {
    let lend = |path: CString| Lent::from(path.into_boxed_c_str());
    let (dir, path, other, entry) = match op {
        Op::Link {
            old_dir,
            old_path,
            new_dir,
            new_path,
            flags,
        } => {
            let (old, new) = (lend(old_path), lend(new_path));
            let (from, to) = (Fd(old_dir.as_raw_fd()), Fd(new_dir.as_raw_fd()));
            let entry = opcode::LinkAt::new(from, old.as_ptr().cast(), to, new.as_ptr().cast())
                .flags(flags.bits().cast_signed())
                .build();
            (old_dir, old, Some((Some(new_dir), new)), entry)
        }
        Op::Rename {
            old_dir,
            old_path,
            new_dir,
            new_path,
            flags,
        } => {
            let (old, new) = (lend(old_path), lend(new_path));
            let (from, to) = (Fd(old_dir.as_raw_fd()), Fd(new_dir.as_raw_fd()));
            let entry = opcode::RenameAt::new(from, old.as_ptr().cast(), to, new.as_ptr().cast())
                .flags(flags.bits())
                .build();
            (old_dir, old, Some((Some(new_dir), new)), entry)
        }
        Op::Unlink { dir, path, flags } => {
            let path = lend(path);
            let entry = opcode::UnlinkAt::new(Fd(dir.as_raw_fd()), path.as_ptr().cast())
                .flags(flags.bits().cast_signed())
                .build();
            (dir, path, None, entry)
        }
        Op::Mkdir { dir, path, mode } => {
            let path = lend(path);
            let entry = opcode::MkDirAt::new(Fd(dir.as_raw_fd()), path.as_ptr().cast())
                .mode(mode.bits())
                .build();
            (dir, path, None, entry)
        }
        Op::Symlink { target, dir, path } => {
            let (target, path) = (lend(target), lend(path));
            let (to, name) = (target.as_ptr().cast(), path.as_ptr().cast());
            let entry = opcode::SymlinkAt::new(Fd(dir.as_raw_fd()), to, name).build();
            (dir, path, Some((None, target)), entry)
        }
        _ => return (Held::Nothing, opcode::Nop::new().build()), // `prepare` had the others.
    };
    let (other_dir, other_path) = other.map_or((None, None), |(dir, path)| (dir, Some(path)));
    let held = Held::Names {
        _dirs: [Some(dir), other_dir],
        _paths: [Some(path), other_path],
    };
    (held, entry)
}

fn open(dir: Arc<OwnedFd>, path: CString, how: How, slot: Option<Slot>) -> (Held, squeue::Entry) {
    let mut flags = how.flags;
    flags.set(OFlags::CLOEXEC, slot.is_none()); // To a slot it means nothing: EINVAL.
    let how = OpenHow::new()
        .flags(u64::from(flags.bits()))
        .mode(u64::from(how.mode.bits()))
        .resolve(how.resolve.bits());
    let (path, how) = (
        Lent::from(path.into_boxed_c_str()),
        Lent::from(Box::new(how)),
    );
    // No table is large enough for a number that does not fit: EINVAL, after the opening.
    let into = slot.and_then(|s| DestinationSlot::try_from_slot_target(s.0.min(SLOT_MAX)).ok());
    let on = Fd(dir.as_raw_fd());
    let entry = opcode::OpenAt2::new(on, path.as_ptr().cast(), how.as_ptr())
        .file_index(into)
        .build();
    let held = Held::Open {
        _dir: dir,
        _path: path,
        _how: how,
        slot,
    };
    (held, entry)
}

fn statx(dir: Arc<OwnedFd>, path: Option<CString>, fresh: bool) -> (Held, squeue::Entry) {
    // SAFETY: the kernel's struct is plain integers; all zeros is a value.
    let block = Box::new(unsafe { MaybeUninit::<Statx>::zeroed().assume_init() });
    let block = Lent::from(block);
    let path = path.map(|p| Lent::from(p.into_boxed_c_str()));
    let (name, flags) = match &path {
        None => (EMPTY_PATH.as_ptr(), AtFlags::EMPTY_PATH),
        Some(path) => (
            path.as_ptr().cast_const().cast(),
            AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        ),
    };
    let flags = flags | sys::stat::sync_flag(fresh);
    let entry = opcode::Statx::new(Fd(dir.as_raw_fd()), name, block.as_ptr().cast())
        .flags(flags.bits().cast_signed())
        .mask(sys::stat::want().bits())
        .build();
    let held = Held::Statx {
        _dir: dir,
        _path: path,
        block,
    };
    (held, entry)
}

/// The answer that a completion's number is.
pub(super) fn finish(held: Held, result: i32) -> Outcome {
    let number = match result {
        n if n < 0 => Err(Errno::from_raw_os_error(-n)),
        n => Ok(n),
    };
    let count = |n: i32| Reply::Count(n.unsigned_abs() as usize);
    let (mut buffer, mut value) = (None, None);
    let result = match held {
        Held::Open {
            slot: Some(slot), ..
        } => number.map(|_| Reply::Slot(slot)),
        Held::Open { slot: None, .. } => number.map(|n| {
            // SAFETY: a successful open's result is a new fd that nobody else owns.
            Reply::Fd(unsafe { OwnedFd::from_raw_fd(n) })
        }),
        Held::Statx { block, .. } => {
            let block = block.take();
            number.map(|_| Reply::Stat(sys::stat::from_statx(&block)))
        }
        Held::Buffer { buffer: b, .. } => {
            buffer = Some(b);
            number.map(count)
        }
        Held::Xattr { value: v, get, .. } => {
            value = Some(v);
            number.map(|n| if get { count(n) } else { Reply::Done })
        }
        Held::Files { counts: true, .. } | Held::EventFd { .. } => number.map(count),
        Held::Files { .. } | Held::Names { .. } | Held::Nothing => number.map(|_| Reply::Done),
    };
    Outcome {
        result,
        buffer,
        value,
    }
}

/// False for what an entry cannot say: its length of an advice has 32 bits.
pub(super) fn fits(op: &Op) -> bool {
    !matches!(op, Op::Fadvise { len, .. } if u32::try_from(*len).is_err())
}

fn held_buffer(file: Target, buffer: Buffer, write: bool) -> Held {
    Held::Buffer {
        _file: file,
        buffer,
        write,
    }
}

fn held_xattr(fd: Arc<OwnedFd>, name: Lent<CStr>, value: Vec<u8>, get: bool) -> Held {
    Held::Xattr {
        _fd: fd,
        _name: name,
        value,
        get,
    }
}

fn count(len: usize) -> u32 {
    len.min(COUNT_MAX) as u32 // By the min.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advice_of_more_than_32_bits_is_no_entry() {
        let file = Arc::new(std::fs::File::open("/dev/null").expect("open").into());
        for (len, can) in [(0, true), (u64::from(u32::MAX), true), (1 << 32, false)] {
            let op = Op::Fadvise {
                file: Target::Fd(Arc::clone(&file)),
                offset: 0,
                len,
                advice: rustix::fs::Advice::Normal,
            };
            assert_eq!(fits(&op), can, "{len}");
        }
    }
}
