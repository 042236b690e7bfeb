//! A request of the kernel's, decoded. A transport hands over three pieces: the header, the fields of
//! the operation (a fixed length for each), and what follows them: names and data.

use super::abi::{FSYNC_FDATASYNC, Fields, IN_HEADER, fattr, opcode};
use crate::mirror::{Change, Stamp};
use crate::sys::stat::Time;

/// struct fuse_in_header, as far as we need it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The thread that asks; 0 where it is in another pid namespace.
    pub(super) pid: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8]) -> Option<Header> {
        let mut f = Fields(bytes.get(..IN_HEADER)?);
        f.u32()?; // The length: what was read says it too.
        Some(Header {
            opcode: f.u32()?,
            unique: f.u64()?,
            node: f.u64()?,
            uid: f.u32()?,
            gid: f.u32()?,
            pid: f.u32()?,
        })
    }
}

/// What is asked for.
#[derive(Debug)]
pub(super) enum Op<'a> {
    Lookup(&'a [u8]),
    Forget(u64),
    BatchForget(Forgets<'a>),
    Getattr,
    Setattr {
        change: Change,
        fh: Option<u64>,
    },
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        name: &'a [u8],
        mode: u32,
        umask: u32,
        rdev: u32,
    },
    Mkdir {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Unlink(&'a [u8]),
    Rmdir(&'a [u8]),
    Rename {
        from: &'a [u8],
        to_dir: u64,
        to: &'a [u8],
        flags: u32,
    },
    Link {
        ino: u64,
        name: &'a [u8],
    },
    Open {
        flags: u32,
    },
    Create {
        name: &'a [u8],
        flags: u32,
        mode: u32,
        umask: u32,
    },
    Read(At),
    Write {
        fh: u64,
        offset: u64,
        data: &'a [u8],
    },
    Release {
        fh: u64,
    },
    Fsync {
        fh: u64,
        data_only: bool,
    },
    Opendir,
    Readdir(At),
    Readdirplus(At),
    Releasedir {
        fh: u64,
    },
    Fsyncdir {
        fh: u64,
        data_only: bool,
    },
    Statfs,
    Setxattr {
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
    },
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr(&'a [u8]),
    Fallocate {
        fh: u64,
        offset: u64,
        len: u64,
        mode: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange {
        from: (u64, u64),
        to: (u64, u64),
        len: u64,
    },
    Destroy,
    /// A signal has reached who waits for the answer to this request.
    Interrupt(u64),
    /// Nothing that we have: ENOSYS.
    Unknown,
}

/// A place in an open file or listing, and how much is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub(super) fh: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
}

/// Pairs of an inode and how often it is forgotten.
#[derive(Debug)]
pub(super) struct Forgets<'a>(Fields<'a>, u32);

impl Iterator for Forgets<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        self.1 = self.1.checked_sub(1)?;
        Some((self.0.u64()?, self.0.u64()?))
    }
}

/// How many bytes of a request are its operation's fields; names and data follow.
pub(super) fn fields_len(code: u32) -> usize {
    match code {
        opcode::SETATTR => 88,
        opcode::INIT => 64,
        opcode::COPY_FILE_RANGE => 56,
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS | opcode::WRITE => 40,
        opcode::FALLOCATE => 32,
        opcode::RELEASE | opcode::RELEASEDIR | opcode::FLUSH | opcode::LSEEK => 24,
        opcode::GETATTR
        | opcode::MKNOD
        | opcode::RENAME2
        | opcode::CREATE
        | opcode::FSYNC
        | opcode::FSYNCDIR => 16,
        opcode::FORGET
        | opcode::BATCH_FORGET
        | opcode::MKDIR
        | opcode::RENAME
        | opcode::LINK
        | opcode::OPEN
        | opcode::OPENDIR
        | opcode::SETXATTR
        | opcode::GETXATTR
        | opcode::LISTXATTR
        | opcode::ACCESS
        | opcode::INTERRUPT => 8,
        _ => 0,
    }
}

/// Decodes an operation. `None`: it is shorter than it must be.
pub(super) fn parse<'a>(code: u32, fields: &'a [u8], rest: &'a [u8]) -> Option<Op<'a>> {
    let (mut f, mut r) = (Fields(fields), Fields(rest));
    Some(match code {
        opcode::LOOKUP => Op::Lookup(r.text()?),
        opcode::FORGET => Op::Forget(f.u64()?),
        opcode::BATCH_FORGET => Op::BatchForget(Forgets(r, f.u32()?)),
        opcode::GETATTR => Op::Getattr,
        opcode::SETATTR => setattr(f)?,
        opcode::READLINK => Op::Readlink,
        opcode::UNLINK => Op::Unlink(r.text()?),
        opcode::RMDIR => Op::Rmdir(r.text()?),
        opcode::LINK => Op::Link {
            ino: f.u64()?,
            name: r.text()?,
        },
        opcode::RENAME | opcode::RENAME2 => Op::Rename {
            to_dir: f.u64()?,
            flags: if code == opcode::RENAME2 { f.u32()? } else { 0 },
            from: r.text()?,
            to: r.text()?,
        },
        opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::CREATE => made(code, f, r)?,
        opcode::OPEN => Op::Open { flags: f.u32()? },
        opcode::OPENDIR => Op::Opendir,
        opcode::READ => Op::Read(at(f)?),
        opcode::READDIR => Op::Readdir(at(f)?),
        opcode::READDIRPLUS => Op::Readdirplus(at(f)?),
        opcode::WRITE => {
            let at = at(f)?;
            Op::Write {
                fh: at.fh,
                offset: at.offset,
                data: r.bytes(at.size as usize)?,
            }
        }
        opcode::RELEASE => Op::Release { fh: f.u64()? },
        opcode::RELEASEDIR => Op::Releasedir { fh: f.u64()? },
        opcode::FSYNC => Op::Fsync {
            fh: f.u64()?,
            data_only: f.u32()? & FSYNC_FDATASYNC != 0,
        },
        opcode::FSYNCDIR => Op::Fsyncdir {
            fh: f.u64()?,
            data_only: f.u32()? & FSYNC_FDATASYNC != 0,
        },
        opcode::STATFS => Op::Statfs,
        opcode::SETXATTR | opcode::GETXATTR | opcode::LISTXATTR | opcode::REMOVEXATTR => {
            xattr(code, f, r)?
        }
        opcode::FALLOCATE => Op::Fallocate {
            fh: f.u64()?,
            offset: f.u64()?,
            len: f.u64()?,
            mode: f.u32()?,
        },
        opcode::LSEEK => Op::Lseek {
            fh: f.u64()?,
            offset: f.u64()?,
            whence: f.u32()?,
        },
        opcode::COPY_FILE_RANGE => {
            let from = (f.u64()?, f.u64()?);
            f.u64()?; // The target's inode: its handle says the same.
            Op::CopyFileRange {
                from,
                to: (f.u64()?, f.u64()?),
                len: f.u64()?,
            }
        }
        opcode::INTERRUPT => Op::Interrupt(f.u64()?),
        opcode::DESTROY => Op::Destroy,
        _ => Op::Unknown,
    })
}

/// The beginning of fuse_read_in and of fuse_write_in.
fn at(mut f: Fields<'_>) -> Option<At> {
    Some(At {
        fh: f.u64()?,
        offset: f.u64()?,
        size: f.u32()?,
    })
}

fn made<'a>(code: u32, mut f: Fields<'a>, mut r: Fields<'a>) -> Option<Op<'a>> {
    let name = r.text()?;
    Some(match code {
        opcode::SYMLINK => Op::Symlink {
            name,
            target: r.text()?,
        },
        opcode::MKNOD => Op::Mknod {
            name,
            mode: f.u32()?,
            rdev: f.u32()?,
            umask: f.u32()?,
        },
        opcode::MKDIR => Op::Mkdir {
            name,
            mode: f.u32()?,
            umask: f.u32()?,
        },
        _ => Op::Create {
            name,
            flags: f.u32()?,
            mode: f.u32()?,
            umask: f.u32()?,
        },
    })
}

fn xattr<'a>(code: u32, mut f: Fields<'a>, mut r: Fields<'a>) -> Option<Op<'a>> {
    Some(match code {
        opcode::SETXATTR => {
            let (size, flags) = (f.u32()? as usize, f.u32()?);
            Op::Setxattr {
                name: r.text()?,
                value: r.bytes(size)?,
                flags,
            }
        }
        opcode::GETXATTR => Op::Getxattr {
            size: f.u32()?,
            name: r.text()?,
        },
        opcode::LISTXATTR => Op::Listxattr { size: f.u32()? },
        _ => Op::Removexattr(r.text()?),
    })
}

/// struct fuse_setattr_in.
fn setattr(mut f: Fields<'_>) -> Option<Op<'static>> {
    let valid = f.u32()?;
    f.u32()?;
    let (fh, size) = (f.u64()?, f.u64()?);
    f.u64()?; // The lock's owner.
    let seconds = [f.u64()?, f.u64()?, f.u64()?].map(u64::cast_signed);
    let nanos = [f.u32()?, f.u32()?, f.u32()?];
    let mode = f.u32()?;
    f.u32()?;
    let (uid, gid) = (f.u32()?, f.u32()?);
    let has = |bit: u32| valid & bit != 0;
    let stamp = |set: u32, now: u32, which: usize| {
        has(set).then(|| match has(now) {
            true => Stamp::Now,
            false => Stamp::At(Time {
                sec: seconds[which],
                nsec: nanos[which],
            }),
        })
    };
    Some(Op::Setattr {
        change: Change {
            perm: has(fattr::MODE).then_some(mode & 0o7777),
            uid: has(fattr::UID).then_some(uid),
            gid: has(fattr::GID).then_some(gid),
            size: has(fattr::SIZE).then_some(size),
            atime: stamp(fattr::ATIME, fattr::ATIME_NOW, 0),
            mtime: stamp(fattr::MTIME, fattr::MTIME_NOW, 1),
        },
        fh: has(fattr::FH).then_some(fh),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_request_that_is_cut_short_is_taken_for_a_whole_one() {
        let fields = [0u8; 88];
        for code in 1..60 {
            let len = fields_len(code);
            let whole = parse(code, &fields[..len], b"a\0b\0");
            assert!(whole.is_some(), "opcode {code}");
            let needed = !matches!(
                code,
                opcode::GETATTR | opcode::OPENDIR | opcode::FLUSH | opcode::ACCESS
            ) && !matches!(whole, Some(Op::Unknown));
            if needed && len > 0 {
                assert!(parse(code, &[], b"a\0b\0").is_none(), "opcode {code}");
            }
        }
        assert!(parse(opcode::LOOKUP, &[], b"no end").is_none());
        assert!(parse(opcode::WRITE, &[1; 40], b"short").is_none());
    }

    #[test]
    fn a_time_before_1970_keeps_its_fraction() {
        let mut bytes = [0u8; 88];
        bytes[..4].copy_from_slice(&fattr::MTIME.to_ne_bytes());
        bytes[40..48].copy_from_slice(&(-3i64).to_ne_bytes());
        bytes[60..64].copy_from_slice(&4u32.to_ne_bytes());
        let Some(Op::Setattr { change, fh }) = parse(opcode::SETATTR, &bytes, &[]) else {
            panic!("no setattr");
        };
        assert_eq!(change.mtime, Some(Stamp::At(Time { sec: -3, nsec: 4 })));
        assert_eq!((change.atime, change.size, fh), (None, None, None));
    }

    #[test]
    fn a_batch_forgets_no_more_than_it_holds() {
        let mut body = Vec::new();
        for n in 1u64..=4 {
            body.extend(n.to_ne_bytes());
        }
        let count = |n: u32| {
            let fields = u64::from(n).to_ne_bytes();
            match parse(opcode::BATCH_FORGET, &fields, &body) {
                Some(Op::BatchForget(all)) => all.collect(),
                _ => Vec::new(),
            }
        };
        assert_eq!(count(1), [(1, 2)]);
        assert_eq!(count(9), [(1, 2), (3, 4)]);
    }
}
