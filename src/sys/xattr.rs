//! Extended attributes of any inode, by fd (O_PATH too) or by directory fd and name.
//!
//! The f*xattr calls refuse O_PATH fds and there is no l*xattrat before Linux 6.13, so both go
//! through /proc/self/fd: `/proc/self/fd/N` is the inode itself (setxattr follows the magic link
//! once, to exactly that inode), `/proc/self/fd/N/name` the entry (l*xattr: a symlink stays one).

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Result;
use super::name::Name;

/// Which inode: an fd, or a name in a directory.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// The inode behind an fd of any kind.
    Fd(BorrowedFd<'a>),
    /// The inode behind an fd that is open for reading or writing (not O_PATH): the shortest way.
    Open(BorrowedFd<'a>),
    /// The inode that a name in a directory is; never what a symlink points to.
    At(BorrowedFd<'a>, &'a Name),
}

impl Target<'_> {
    fn path(&self) -> CString {
        let bytes = match self {
            Target::Open(_) => Vec::new(),
            Target::Fd(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes(),
            Target::At(dir, name) => {
                let mut p = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
                p.extend_from_slice(name.as_bytes());
                p
            }
        };
        CString::new(bytes).unwrap_or_default() // A Name holds no NUL.
    }
}

/// Largest value that Linux knows (XATTR_SIZE_MAX) and largest list (XATTR_LIST_MAX).
const MAX: usize = 65536;

/// The names. EOPNOTSUPP (the file system has none) is an empty list.
pub fn list(target: Target<'_>) -> Result<Vec<CString>> {
    let path = target.path();
    let call = |buf: &mut [u8]| match target {
        Target::Open(fd) => rustix::fs::flistxattr(fd, buf),
        Target::Fd(_) => rustix::fs::listxattr(&path, buf),
        Target::At(..) => rustix::fs::llistxattr(&path, buf),
    };
    let mut small = [0u8; 1024];
    let bytes = match call(&mut small) {
        Ok(0) => return Ok(Vec::new()),
        Ok(n) => small[..n].to_vec(),
        Err(Errno::RANGE) => {
            let mut big = vec![0u8; MAX];
            let n = call(&mut big)?;
            big.truncate(n);
            big
        }
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let names = bytes.split(|b| *b == 0).filter(|n| !n.is_empty());
    Ok(names.map(|n| CString::new(n).unwrap_or_default()).collect()) // Split at NULs: none inside.
}

/// The value; `None` when there is no such attribute (ENODATA, EOPNOTSUPP).
pub fn get(target: Target<'_>, name: &CStr) -> Result<Option<Vec<u8>>> {
    match get_exact(target, name) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The value; every errno as the kernel gave it.
pub fn get_exact(target: Target<'_>, name: &CStr) -> Result<Vec<u8>> {
    let path = target.path();
    let call = |buf: &mut [u8]| match target {
        Target::Open(fd) => rustix::fs::fgetxattr(fd, name, buf),
        Target::Fd(_) => rustix::fs::getxattr(&path, name, buf),
        Target::At(..) => rustix::fs::lgetxattr(&path, name, buf),
    };
    let mut small = [0u8; 512];
    match call(&mut small) {
        Ok(n) => Ok(small[..n].to_vec()),
        Err(Errno::RANGE) => {
            let mut big = vec![0u8; MAX];
            let n = call(&mut big)?;
            big.truncate(n);
            Ok(big)
        }
        Err(e) => Err(e),
    }
}

/// Sets the value, whether it was there or not.
pub fn set(target: Target<'_>, name: &CStr, value: &[u8]) -> Result<()> {
    set_flags(target, name, value, XattrFlags::empty())
}

/// setxattr(2) with XATTR_CREATE or XATTR_REPLACE.
pub fn set_flags(target: Target<'_>, name: &CStr, value: &[u8], flags: XattrFlags) -> Result<()> {
    let path = target.path();
    match target {
        Target::Open(fd) => rustix::fs::fsetxattr(fd, name, value, flags),
        Target::Fd(_) => rustix::fs::setxattr(&path, name, value, flags),
        Target::At(..) => rustix::fs::lsetxattr(&path, name, value, flags),
    }
}

/// Removes the attribute. ENODATA when it was not there.
pub fn remove(target: Target<'_>, name: &CStr) -> Result<()> {
    let path = target.path();
    match target {
        Target::Open(fd) => rustix::fs::fremovexattr(fd, name),
        Target::Fd(_) => rustix::fs::removexattr(&path, name),
        Target::At(..) => rustix::fs::lremovexattr(&path, name),
    }
}
