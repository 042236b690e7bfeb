//! Errors: what we did, to what, on which side, and what the kernel said.
//!
//! One type for the whole crate and one map from it to an errno (`Error::errno`, the only one).
//! Functions of `sys` return a bare [`Errno`]; whoever knows the path adds it with [`Context::on`].

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use rustix::io::Errno;

/// The result of everything above `sys`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Which tree a call was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The tree that is copied from; never written.
    Src,
    /// The tree that is copied into.
    Dst,
    /// The mount point, /dev/fuse, or another part of this machine.
    Host,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Src => "src",
            Side::Dst => "dst",
            Side::Host => "host",
        })
    }
}

/// What went wrong.
#[derive(Debug, Clone)]
pub enum Error {
    /// A system call failed.
    Call {
        /// The call, as its man page is named.
        call: &'static str,
        /// Which tree it was about.
        side: Side,
        /// The path inside that tree (relative), or an absolute path for `Side::Host`.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
    /// src changed between the look before and the look after a copy, more often than we retry.
    SrcChanged {
        /// The path in src.
        path: PathBuf,
    },
    /// The src entry carries a live mark: it is itself only half migrated, its bytes may be zeros.
    SrcPending {
        /// The path in src.
        path: PathBuf,
    },
    /// src has listed the name and does not say what it is: a stand-in keeps its place in dst.
    Unseen {
        /// The path in src.
        path: PathBuf,
    },
    /// Something else stands where src has an entry of another type.
    WrongType {
        /// The path in dst.
        path: PathBuf,
    },
    /// A run of `sync` that did not end may have left a part of src's file here, or somebody has changed
    /// it since; nobody can say which.
    MayBePart {
        /// The path in dst.
        path: PathBuf,
    },
    /// Filter rules of a directory cannot be read: nobody knows what they say.
    Rules {
        /// Whose directory.
        side: Side,
        /// The directory.
        path: PathBuf,
        /// Which file, and what is wrong with it.
        why: String,
    },
    /// The engine or the mount is shutting down; nothing was lost, the entry is still pending.
    Stopped,
    /// Usage or configuration: one line that says what is wrong.
    Usage(String),
    /// SRC, DST or the mount point cannot be used: one line that says which and why.
    Unusable(String),
}

impl Error {
    /// The errno that a user of the mount gets for this error. The only such map.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Call { errno, .. } => *errno,
            Error::SrcChanged { .. } => Errno::IO,
            Error::SrcPending { .. } => Errno::IO,
            Error::Unseen { .. } => Errno::IO,
            Error::WrongType { .. } => Errno::IO,
            Error::MayBePart { .. } => Errno::EXIST,
            Error::Rules { .. } => Errno::INVAL,
            Error::Stopped => Errno::NOTCONN,
            Error::Usage(_) => Errno::INVAL,
            Error::Unusable(_) => Errno::IO,
        }
    }

    /// Which side failed, where that is known.
    pub fn side(&self) -> Side {
        match self {
            Error::Call { side, .. } => *side,
            Error::SrcChanged { .. } | Error::SrcPending { .. } | Error::Unseen { .. } => Side::Src,
            Error::WrongType { .. } | Error::MayBePart { .. } => Side::Dst,
            Error::Rules { side, .. } => *side,
            Error::Stopped | Error::Usage(_) | Error::Unusable(_) => Side::Host,
        }
    }

    /// The call or the reason, as the ledger names it.
    pub fn what(&self) -> &'static str {
        match self {
            Error::Call { call, .. } => call,
            Error::SrcChanged { .. } => "changed",
            Error::SrcPending { .. } => "pending",
            Error::Unseen { .. } => "unseen",
            Error::WrongType { .. } => "type",
            Error::MayBePart { .. } => "part",
            Error::Rules { .. } => "rules",
            Error::Stopped => "stopped",
            Error::Usage(_) => "usage",
            Error::Unusable(_) => "unusable",
        }
    }

    /// True for failures of src that may pass: the connection or the device is gone, the server does not
    /// answer or has forgotten a handle. EIO may be such a one too, or a bad block.
    pub fn may_pass(&self) -> bool {
        const PASSING: [Errno; 19] = [
            Errno::IO,
            Errno::STALE,
            Errno::TIMEDOUT,
            Errno::NOTCONN,
            Errno::HOSTDOWN,
            Errno::HOSTUNREACH,
            Errno::NXIO,
            Errno::NODEV,
            Errno::CONNREFUSED,
            Errno::CONNRESET,
            Errno::CONNABORTED,
            Errno::NETDOWN,
            Errno::NETUNREACH,
            Errno::NETRESET,
            Errno::SHUTDOWN,
            Errno::NOLINK,
            Errno::COMM,
            Errno::PROTO,
            Errno::REMOTEIO,
        ];
        matches!(self, Error::Call { side: Side::Src, errno, .. } if PASSING.contains(errno))
    }

    /// True when src cannot give some bytes of a file that it has: a bad block, a wrong checksum.
    pub fn is_bad_read(&self) -> bool {
        const BAD: [Errno; 4] = [Errno::IO, Errno::BADMSG, Errno::UCLEAN, Errno::NODATA];
        matches!(self, Error::Call { call: "read", side: Side::Src, errno, .. } if BAD.contains(errno))
    }

    /// True when dst takes nothing more at the moment: it has no room or no inodes, a quota is used up,
    /// or it is read-only. The only failures after which the walker waits and goes on.
    pub fn is_dst_full(&self) -> bool {
        const FULL: [Errno; 3] = [Errno::NOSPC, Errno::DQUOT, Errno::ROFS];
        matches!(self, Error::Call { side: Side::Dst, errno, .. } if FULL.contains(errno))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Call {
                call,
                side: Side::Host,
                path,
                errno,
            } => {
                write!(f, "\"{}\": {call}: {errno}", Printable(path.as_os_str()))
            }
            Error::Call {
                call,
                side,
                path,
                errno,
            } => {
                write!(
                    f,
                    "\"{}\": {call} {side}: {errno}",
                    Printable(path.as_os_str())
                )
            }
            Error::SrcChanged { path } => {
                write!(
                    f,
                    "\"{}\": src kept changing while it was copied",
                    Printable(path.as_os_str())
                )
            }
            Error::SrcPending { path } => write!(
                f,
                "\"{}\": src carries a live mark: it is itself a migration that has not finished",
                Printable(path.as_os_str())
            ),
            Error::Unseen { path } => write!(
                f,
                "\"{}\": src has listed it and does not say what it is",
                Printable(path.as_os_str())
            ),
            Error::WrongType { path } => {
                write!(
                    f,
                    "\"{}\": dst has an entry of another type here",
                    Printable(path.as_os_str())
                )
            }
            Error::MayBePart { path } => write!(
                f,
                "\"{}\": dst: a part of it that an earlier run has left, or changed since; left as it is",
                Printable(path.as_os_str())
            ),
            Error::Rules { side, path, why } => write!(
                f,
                "{side} \"{}\": filter rules: {why}; left as it is",
                Printable(path.as_os_str())
            ),
            Error::Stopped => f.write_str("stopped; run again to continue"),
            Error::Usage(s) | Error::Unusable(s) => f.write_str(s),
        }
    }
}

impl std::error::Error for Error {}

/// Something that has a path, which is put together only when an error asks for it.
pub trait Located {
    /// The path, for a message.
    fn located(&self) -> PathBuf;
}

impl<P: AsRef<Path>> Located for P {
    fn located(&self) -> PathBuf {
        self.as_ref().to_path_buf()
    }
}

/// Adds the call, the side and the path to a bare errno.
pub trait Context<T> {
    /// Names what was done, to what.
    fn on(self, call: &'static str, side: Side, path: impl Located) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn on(self, call: &'static str, side: Side, path: impl Located) -> Result<T> {
        self.map_err(|errno| Error::Call {
            call,
            side,
            path: path.located(),
            errno,
        })
    }
}

/// A name as unambiguous printable text: bytes that are not UTF-8, control characters, quotes and
/// backslashes come out as `\xNN`, so that a name can never forge a line of output.
pub struct Printable<'a>(pub &'a OsStr);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_bytes().utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() || c == '\\' || c == '"' {
                    let mut buf = [0; 4];
                    for b in c.encode_utf8(&mut buf).bytes() {
                        write!(f, "\\x{b:02x}")?;
                    }
                } else {
                    write!(f, "{c}")?;
                }
            }
            for b in chunk.invalid() {
                write!(f, "\\x{b:02x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_the_path_the_call_the_side_and_the_reason() {
        let e: Result<()> = Err(Errno::NOSPC).on("fdatasync", Side::Dst, "mail/inbox");
        let e = e.expect_err("was an error");
        assert_eq!(
            e.to_string(),
            "\"mail/inbox\": fdatasync dst: No space left on device (os error 28)"
        );
        assert!(e.is_dst_full());
    }

    #[test]
    fn a_name_cannot_forge_a_line_of_output() {
        let name = OsStr::from_bytes(b"a\nb\"\\\xff");
        assert_eq!(Printable(name).to_string(), "a\\x0ab\\x22\\x5c\\xff");
    }
}
