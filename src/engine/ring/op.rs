//! Op: what the ring can be asked to do, and what it answers. Values; no kernel in sight.
//!
//! An operation owns everything it works on: fds by their `Arc`, paths, buffers. It moves into the
//! ring with `push` and what it lent comes back with its [`Completed`].

use std::ffi::{CStr, CString};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::XattrFlags;
use rustix::fs::{Advice, AtFlags, FallocateFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::opcode::Opcode;
use crate::engine::buffers::Buffer;
use crate::sys::name::Name;
use crate::sys::stat::Stat;

/// A place in the ring's table of open files (a direct descriptor), from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub u32);

/// The open file that an operation works on.
#[derive(Debug, Clone)]
pub enum Target {
    /// An fd of the process.
    Fd(Arc<OwnedFd>),
    /// A file in a slot of the same ring; EBADF when the slot is empty.
    Slot(Slot),
}

impl From<Arc<OwnedFd>> for Target {
    fn from(fd: Arc<OwnedFd>) -> Target {
        Target::Fd(fd)
    }
}

impl From<Slot> for Target {
    fn from(slot: Slot) -> Target {
        Target::Slot(slot)
    }
}

/// How a file is opened (openat2(2)). O_CLOEXEC is always added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// O_RDONLY, O_CREAT and so on.
    pub flags: OFlags,
    /// Permissions of a file that is made; empty without O_CREAT and O_TMPFILE.
    pub mode: Mode,
    /// Where the path may lead.
    pub resolve: ResolveFlags,
}

impl How {
    /// As `sys::fd::open_src` opens a name of src; without O_NOATIME if told (it is EPERM for who is
    /// neither the owner nor has CAP_FOWNER).
    pub fn src(noatime: bool) -> How {
        let mut flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
        flags.set(OFlags::NOATIME, noatime);
        How {
            flags,
            mode: Mode::empty(),
            resolve: ResolveFlags::BENEATH
                | ResolveFlags::NO_SYMLINKS
                | ResolveFlags::NO_MAGICLINKS,
        }
    }
}

/// One operation. Errors are those of the system call in the opcode's row ([`Opcode::table`]).
/// Paths are relative to their directory's fd.
#[allow(missing_docs)] // Fields have the names that the manual pages have.
#[derive(Debug)]
pub enum Op {
    /// Opens a file: as an fd ([`Reply::Fd`]), or into a slot ([`Reply::Slot`]; what was there is
    /// closed; EINVAL behind the table's end, ENXIO without a table, both after the opening).
    Open {
        dir: Arc<OwnedFd>,
        path: CString,
        how: How,
        slot: Option<Slot>,
    },
    /// statx of an open file (no path), or of a path whose last name is not followed; `fresh`: a server is
    /// asked, whatever is cached of it (AT_STATX_FORCE_SYNC). [`Reply::Stat`].
    Statx {
        dir: Arc<OwnedFd>,
        path: Option<CString>,
        fresh: bool,
    },
    /// Reads into `buffer[range]`; fewer bytes than asked for is no error, 0 is the end of the file.
    /// On what has no offsets (a pipe) `offset` means nothing. [`Reply::Count`]. `once`: leaves no
    /// page in the cache that was not there (RWF_DONTCACHE); EOPNOTSUPP or EINVAL where there is
    /// no such thing.
    Read {
        file: Target,
        buffer: Buffer,
        range: Range<usize>,
        offset: u64,
        once: bool,
    },
    /// Writes from `buffer[range]`; may write less. [`Reply::Count`]. `once` as for a read.
    Write {
        file: Target,
        buffer: Buffer,
        range: Range<usize>,
        offset: u64,
        once: bool,
    },
    /// fsync, or fdatasync with `data_only`.
    Fsync { file: Target, data_only: bool },
    /// Reserves, punches, zeroes: as `mode` says.
    Fallocate {
        file: Target,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
    /// Tells the page cache what comes; `len` 0 is up to the end.
    Fadvise {
        file: Target,
        offset: u64,
        len: u64,
        advice: Advice,
    },
    /// Sets the size.
    Ftruncate { file: Target, len: u64 },
    /// Moves up to `len` bytes between a pipe and something else; the offset of a pipe is `None`,
    /// that of a file may be (its own position counts and moves then). [`Reply::Count`].
    Splice {
        from: Target,
        from_offset: Option<u64>,
        to: Target,
        to_offset: Option<u64>,
        len: usize,
    },
    /// A hard link; AT_EMPTY_PATH and AT_SYMLINK_FOLLOW are known.
    Link {
        old_dir: Arc<OwnedFd>,
        old_path: CString,
        new_dir: Arc<OwnedFd>,
        new_path: CString,
        flags: AtFlags,
    },
    /// Removes a name; with AT_REMOVEDIR that of an empty directory.
    Unlink {
        dir: Arc<OwnedFd>,
        path: CString,
        flags: AtFlags,
    },
    /// Makes a directory with the permissions `mode` less the umask.
    Mkdir {
        dir: Arc<OwnedFd>,
        path: CString,
        mode: Mode,
    },
    /// Makes a symlink.
    Symlink {
        target: CString,
        dir: Arc<OwnedFd>,
        path: CString,
    },
    /// Renames, exchanges, or renames what must not replace anything.
    Rename {
        old_dir: Arc<OwnedFd>,
        old_path: CString,
        new_dir: Arc<OwnedFd>,
        new_path: CString,
        flags: RenameFlags,
    },
    /// Reads an xattr into `value`, which comes back with the completion. Its length is the room
    /// (ERANGE when that is too little); without room the answer is the size.
    /// [`Reply::Count`]: how many bytes of `value` are the xattr's.
    GetXattr {
        fd: Arc<OwnedFd>,
        name: CString,
        value: Vec<u8>,
    },
    /// Sets an xattr; `value` comes back with the completion.
    SetXattr {
        fd: Arc<OwnedFd>,
        name: CString,
        value: Vec<u8>,
        flags: XattrFlags,
    },
    /// close. The fd is gone whatever the answer is.
    Close { fd: OwnedFd },
    /// Empties a slot; EBADF when it is empty, EINVAL behind the table's end, ENXIO without a table.
    CloseSlot { slot: Slot },
    /// Waits until somebody raises an eventfd, and takes it back to zero. [`Reply::Count`]: 8.
    /// Through the ring wherever there is one: no opcode that is switched off makes it wait in
    /// `push`.
    EventFd { fd: Arc<OwnedFd> },
}

/// What a successful operation returned.
#[derive(Debug)]
pub enum Reply {
    /// A new fd.
    Fd(OwnedFd),
    /// The slot that was opened into.
    Slot(Slot),
    /// The answer of statx.
    Stat(Stat),
    /// How many bytes.
    Count(usize),
    /// Nothing but success.
    Done,
}

/// A finished operation.
#[derive(Debug)]
pub struct Completed {
    /// The number given to `push`.
    pub token: u64,
    /// The buffer of a read or write.
    pub buffer: Option<Buffer>,
    /// The value of an xattr operation.
    pub value: Option<Vec<u8>>,
    /// The answer, or the errno.
    pub result: Result<Reply, Errno>,
    /// Since `push`.
    pub took: Duration,
}

impl Op {
    /// Opens a name of src for reading, as `sys::fd::open_src` does.
    pub fn open_src(dir: Arc<OwnedFd>, name: &Name, noatime: bool) -> Op {
        Op::Open {
            dir,
            path: <CStr>::to_owned(name.as_cstr()),
            how: How::src(noatime),
            slot: None,
        }
    }

    /// Reads into `buffer[range]`, from `offset` of the file on.
    pub fn read(file: impl Into<Target>, buffer: Buffer, range: Range<usize>, offset: u64) -> Op {
        Op::Read {
            file: file.into(),
            buffer,
            range,
            offset,
            once: false,
        }
    }

    /// Writes `buffer[range]`, to `offset` of the file on.
    pub fn write(file: impl Into<Target>, buffer: Buffer, range: Range<usize>, offset: u64) -> Op {
        Op::Write {
            file: file.into(),
            buffer,
            range,
            offset,
            once: false,
        }
    }

    /// A read or write that leaves no page in the cache that was not there, if told.
    pub fn once(mut self, on: bool) -> Op {
        if let Op::Read { once, .. } | Op::Write { once, .. } = &mut self {
            *once = on;
        }
        self
    }

    /// Its opcode. A read or write of a registered buffer has the fixed one besides.
    pub fn opcode(&self) -> Opcode {
        match self {
            Op::Open { .. } => Opcode::OpenAt2,
            Op::Statx { .. } => Opcode::Statx,
            Op::Read { .. } | Op::EventFd { .. } => Opcode::Read,
            Op::Write { .. } => Opcode::Write,
            Op::Fsync { .. } => Opcode::Fsync,
            Op::Fallocate { .. } => Opcode::Fallocate,
            Op::Fadvise { .. } => Opcode::Fadvise,
            Op::Ftruncate { .. } => Opcode::Ftruncate,
            Op::Splice { .. } => Opcode::Splice,
            Op::Link { .. } => Opcode::LinkAt,
            Op::Unlink { .. } => Opcode::UnlinkAt,
            Op::Mkdir { .. } => Opcode::MkdirAt,
            Op::Symlink { .. } => Opcode::SymlinkAt,
            Op::Rename { .. } => Opcode::RenameAt,
            Op::GetXattr { .. } => Opcode::FGetXattr,
            Op::SetXattr { .. } => Opcode::FSetXattr,
            Op::Close { .. } | Op::CloseSlot { .. } => Opcode::Close,
        }
    }

    /// EINVAL for what ring and system call would take differently: a range outside the buffer, and
    /// offsets over `i64::MAX` (to the ring -1 is "the file's own position").
    pub(super) fn check(&self) -> Result<(), Errno> {
        let good = match self {
            Op::Read {
                buffer,
                range,
                offset,
                ..
            }
            | Op::Write {
                buffer,
                range,
                offset,
                ..
            } => range.start <= range.end && range.end <= buffer.len() && is_offset(*offset),
            Op::Ftruncate { len, .. } => is_offset(*len),
            Op::Splice {
                from_offset,
                to_offset,
                ..
            } => [from_offset, to_offset]
                .into_iter()
                .flatten()
                .all(|o| is_offset(*o)),
            Op::Fallocate { offset, len, .. } | Op::Fadvise { offset, len, .. } => {
                is_offset(*offset) && is_offset(*len)
            }
            _ => true,
        };
        good.then_some(()).ok_or(Errno::INVAL)
    }

    /// What it works on that may be in a slot.
    pub(super) fn targets_mut(&mut self) -> [Option<&mut Target>; 2] {
        match self {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::Fsync { file, .. }
            | Op::Fallocate { file, .. }
            | Op::Fadvise { file, .. }
            | Op::Ftruncate { file, .. } => [Some(file), None],
            Op::Splice { from, to, .. } => [Some(from), Some(to)],
            _ => [None, None],
        }
    }

    /// What was lent, when the operation ends before the kernel saw it.
    pub(super) fn into_lent(self) -> (Option<Buffer>, Option<Vec<u8>>) {
        match self {
            Op::Read { buffer, .. } | Op::Write { buffer, .. } => (Some(buffer), None),
            Op::GetXattr { value, .. } | Op::SetXattr { value, .. } => (None, Some(value)),
            _ => (None, None),
        }
    }
}

fn is_offset(n: u64) -> bool {
    i64::try_from(n).is_ok()
}
