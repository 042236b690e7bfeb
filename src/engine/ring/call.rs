//! Call: each operation as the system call that does the same, on the calling thread.
//!
//! For kernels that lack an opcode or forbid io_uring (seccomp, kernel.io_uring_disabled), and for
//! tests, which compare the two. Same errno, same short counts; what was lent is given back.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::op::{How, Op, Reply, Target};
use crate::engine::buffers::Buffer;
use crate::sys;
use crate::sys::cache;

/// The result, and what had been lent.
pub(super) struct Outcome {
    pub(super) result: sys::Result<Reply>,
    pub(super) buffer: Option<Buffer>,
    pub(super) value: Option<Vec<u8>>,
}

/// Makes the call. Targets have been resolved: a slot that is left here is empty.
pub(super) fn call(op: Op) -> Outcome {
    match op {
        Op::Read {
            file,
            mut buffer,
            range,
            offset,
            once,
        } => {
            let bytes = buffer.bytes_mut(range);
            let read = fd_of(&file).and_then(|fd| match once {
                true => cache::read_once(fd, bytes, offset),
                false => match rustix::io::pread(fd, &mut *bytes, offset) {
                    // The ring reads what has no offsets as well.
                    Err(Errno::SPIPE) => rustix::io::read(fd, bytes),
                    other => other,
                },
            });
            with_buffer(read.map(Reply::Count), buffer)
        }
        Op::Write {
            file,
            buffer,
            range,
            offset,
            once,
        } => {
            let bytes = buffer.bytes(range);
            let wrote = fd_of(&file).and_then(|fd| match once {
                true => cache::write_once(fd, bytes, offset).map(|()| bytes.len()),
                false => match rustix::io::pwrite(fd, bytes, offset) {
                    Err(Errno::SPIPE) => rustix::io::write(fd, bytes),
                    other => other,
                },
            });
            with_buffer(wrote.map(Reply::Count), buffer)
        }
        Op::GetXattr {
            fd,
            name,
            mut value,
        } => {
            let got = match value.len() {
                0 => fs::fgetxattr_query(&fd, &name),
                _ => fs::fgetxattr(&fd, &name, &mut value[..]),
            };
            with_value(got.map(Reply::Count), value)
        }
        Op::SetXattr {
            fd,
            name,
            value,
            flags,
        } => {
            let set = fs::fsetxattr(&fd, &name, &value, flags);
            with_value(set.map(|()| Reply::Done), value)
        }
        op => Outcome {
            result: plain(op),
            buffer: None,
            value: None,
        },
    }
}

/// Operations that lend nothing that comes back.
fn plain(op: Op) -> sys::Result<Reply> {
    let done = match op {
        Op::Open { dir, path, how, .. } => return open(dir.as_fd(), &path, how).map(Reply::Fd),
        Op::Statx { dir, path, fresh } => {
            return sys::stat::stat_as(dir.as_fd(), path.as_deref(), fresh).map(Reply::Stat);
        }
        Op::Splice {
            from,
            mut from_offset,
            to,
            mut to_offset,
            len,
        } => {
            let (from, to) = (fd_of(&from)?, fd_of(&to)?);
            let flags = SpliceFlags::empty();
            let moved = splice(
                from,
                from_offset.as_mut(),
                to,
                to_offset.as_mut(),
                len,
                flags,
            );
            return moved.map(Reply::Count);
        }
        Op::Fsync {
            file,
            data_only: true,
        } => fs::fdatasync(fd_of(&file)?),
        Op::Fsync { file, .. } => fs::fsync(fd_of(&file)?),
        Op::Fallocate {
            file,
            mode,
            offset,
            len,
        } => fs::fallocate(fd_of(&file)?, mode, offset, len),
        Op::Fadvise {
            file,
            offset,
            len,
            advice,
        } => fs::fadvise(fd_of(&file)?, offset, NonZeroU64::new(len), advice),
        Op::Ftruncate { file, len } => fs::ftruncate(fd_of(&file)?, len),
        Op::Link {
            old_dir,
            old_path,
            new_dir,
            new_path,
            flags,
        } => fs::linkat(old_dir, old_path, new_dir, new_path, flags),
        Op::Unlink { dir, path, flags } => fs::unlinkat(dir, path, flags),
        Op::Mkdir { dir, path, mode } => fs::mkdirat(dir, path, mode),
        Op::Symlink { target, dir, path } => fs::symlinkat(target, dir, path),
        Op::Rename {
            old_dir,
            old_path,
            new_dir,
            new_path,
            flags,
        } => fs::renameat_with(old_dir, old_path, new_dir, new_path, flags),
        Op::Close { fd } => sys::fd::close(fd),
        // The ring's own, or done above: never come here.
        Op::CloseSlot { .. }
        | Op::EventFd { .. }
        | Op::Read { .. }
        | Op::Write { .. }
        | Op::GetXattr { .. }
        | Op::SetXattr { .. } => Err(Errno::NOSYS),
    };
    done.map(|()| Reply::Done)
}

fn open(dir: BorrowedFd<'_>, path: &std::ffi::CStr, how: How) -> sys::Result<OwnedFd> {
    let flags = how.flags | fs::OFlags::CLOEXEC;
    fs::openat2(dir, path, flags, how.mode, how.resolve)
}

fn fd_of(target: &Target) -> sys::Result<BorrowedFd<'_>> {
    match target {
        Target::Fd(fd) => Ok(fd.as_fd()),
        Target::Slot(_) => Err(Errno::BADF),
    }
}

fn with_buffer(result: sys::Result<Reply>, buffer: Buffer) -> Outcome {
    Outcome {
        result,
        buffer: Some(buffer),
        value: None,
    }
}

fn with_value(result: sys::Result<Reply>, value: Vec<u8>) -> Outcome {
    Outcome {
        result,
        buffer: None,
        value: Some(value),
    }
}
