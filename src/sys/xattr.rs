//! Extended attributes of any inode, by fd (O_PATH too) or by directory fd and name.
//!
//! The f*xattr calls refuse O_PATH fds, so those go through /proc/self/fd: `/proc/self/fd/N` is the
//! inode itself (setxattr follows the magic link once, to exactly that inode). A name in a directory
//! has calls of its own since Linux 6.13 (getxattrat ...); before, `/proc/self/fd/N/name` is the
//! entry (l*xattr: a symlink stays one).

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
    /// The way through /proc, for the calls that need one.
    fn path(&self) -> CString {
        let bytes = match self {
            Target::Open(_) => Vec::new(),
            Target::At(..) if at::available() => Vec::new(),
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
        Target::At(dir, name) => match at::available() {
            true => at::list(dir, name.as_cstr(), buf),
            false => rustix::fs::llistxattr(&path, buf),
        },
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
        Target::At(dir, entry) => match at::available() {
            true => at::get(dir, entry.as_cstr(), name, buf),
            false => rustix::fs::lgetxattr(&path, name, buf),
        },
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
        Target::At(dir, entry) => match at::available() {
            true => at::set(dir, entry.as_cstr(), name, value, flags),
            false => rustix::fs::lsetxattr(&path, name, value, flags),
        },
    }
}

/// Removes the attribute. ENODATA when it was not there.
pub fn remove(target: Target<'_>, name: &CStr) -> Result<()> {
    let path = target.path();
    match target {
        Target::Open(fd) => rustix::fs::fremovexattr(fd, name),
        Target::Fd(_) => rustix::fs::removexattr(&path, name),
        Target::At(dir, entry) => match at::available() {
            true => at::remove(dir, entry.as_cstr(), name),
            false => rustix::fs::lremovexattr(&path, name),
        },
    }
}

/// The calls of Linux 6.13 that take a directory and a name: no walk through /proc.
mod at {
    use std::ffi::CStr;
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::sync::OnceLock;

    use rustix::fs::XattrFlags;
    use rustix::io::Errno;

    use super::super::{Result, check};

    // The numbers are the same on every architecture (include/uapi/asm-generic/unistd.h).
    const SYS_SETXATTRAT: libc::c_long = 463;
    const SYS_GETXATTRAT: libc::c_long = 464;
    const SYS_LISTXATTRAT: libc::c_long = 465;
    const SYS_REMOVEXATTRAT: libc::c_long = 466;
    const NOFOLLOW: libc::c_int = libc::AT_SYMLINK_NOFOLLOW;

    /// `struct xattr_args` of linux/xattr.h.
    #[repr(C)]
    struct Args {
        value: u64,
        size: u32,
        flags: u32,
    }

    /// Whether the running kernel has them and lets us call them (a seccomp filter may not).
    pub(super) fn available() -> bool {
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            let probe = get(rustix::fs::CWD, c"/", c"user.mirrorfs.probe", &mut [0; 8]);
            !matches!(probe, Err(Errno::NOSYS | Errno::PERM | Errno::ACCESS))
        })
    }

    /// # Safety
    ///
    /// `args.value` points to `args.size` bytes that the call `number` may read or write.
    unsafe fn with_args(
        number: libc::c_long,
        dir: BorrowedFd<'_>,
        entry: &CStr,
        name: &CStr,
        args: &Args,
    ) -> Result<usize> {
        // SAFETY: entry and name end with a NUL, args is as long as the last argument says, and what
        // it points to is the caller's promise.
        let ret = unsafe {
            libc::syscall(
                number,
                dir.as_raw_fd(),
                entry.as_ptr(),
                NOFOLLOW,
                name.as_ptr(),
                &raw const *args,
                size_of::<Args>(),
            )
        };
        check(ret).map(|n| n as usize)
    }

    pub(super) fn list(dir: BorrowedFd<'_>, entry: &CStr, buf: &mut [u8]) -> Result<usize> {
        // SAFETY: entry ends with a NUL; the kernel writes at most buf.len() bytes into buf.
        let ret = unsafe {
            libc::syscall(
                SYS_LISTXATTRAT,
                dir.as_raw_fd(),
                entry.as_ptr(),
                NOFOLLOW,
                buf.as_mut_ptr(),
                buf.len(),
            )
        };
        check(ret).map(|n| n as usize)
    }

    pub(super) fn get(
        dir: BorrowedFd<'_>,
        entry: &CStr,
        name: &CStr,
        buf: &mut [u8],
    ) -> Result<usize> {
        let args = Args {
            value: buf.as_mut_ptr() as u64,
            size: u32::try_from(buf.len()).unwrap_or(u32::MAX),
            flags: 0,
        };
        // SAFETY: args describes buf, which is borrowed for the whole call; the kernel writes there.
        unsafe { with_args(SYS_GETXATTRAT, dir, entry, name, &args) }
    }

    pub(super) fn set(
        dir: BorrowedFd<'_>,
        entry: &CStr,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let args = Args {
            value: value.as_ptr() as u64,
            size: u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?,
            flags: flags.bits(),
        };
        // SAFETY: args describes value, which is borrowed for the whole call; the kernel reads it.
        unsafe { with_args(SYS_SETXATTRAT, dir, entry, name, &args) }.map(drop)
    }

    pub(super) fn remove(dir: BorrowedFd<'_>, entry: &CStr, name: &CStr) -> Result<()> {
        // SAFETY: entry and name end with a NUL; integers otherwise.
        let ret = unsafe {
            libc::syscall(
                SYS_REMOVEXATTRAT,
                dir.as_raw_fd(),
                entry.as_ptr(),
                NOFOLLOW,
                name.as_ptr(),
            )
        };
        check(ret).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn every_way_to_an_inode_sees_the_same_attributes() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("file"), "x").expect("write");
        std::os::unix::fs::symlink("file", dir.path().join("link")).expect("symlink");
        let open = |path| {
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW;
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("open")
        };
        let parent = open(dir.path().to_path_buf());
        let name = Name::new(b"file").expect("a name");
        let path = open(dir.path().join("file"));
        let file = std::fs::File::open(dir.path().join("file")).expect("open");
        let ways = [
            Target::At(parent.as_fd(), &name),
            Target::Fd(path.as_fd()),
            Target::Open(file.as_fd()),
        ];
        let long = vec![7; 2000];
        for (i, way) in ways.iter().enumerate() {
            assert_eq!(get(*way, c"user.a"), Ok(None));
            set(*way, c"user.a", b"value").expect("set");
            set_flags(*way, c"user.b", &long, XattrFlags::CREATE).expect("create");
            let again = set_flags(*way, c"user.b", b"", XattrFlags::CREATE);
            assert_eq!(again, Err(Errno::EXIST), "way {i}");
            for other in ways {
                assert_eq!(
                    get(other, c"user.a").expect("get").as_deref(),
                    Some(&b"value"[..])
                );
                assert_eq!(get_exact(other, c"user.b"), Ok(long.clone()));
                let mut names = list(other).expect("list");
                names.retain(|n| n.to_bytes().starts_with(b"user."));
                names.sort();
                assert_eq!(names, [c"user.a".to_owned(), c"user.b".to_owned()]);
            }
            remove(*way, c"user.a").expect("remove");
            remove(*way, c"user.b").expect("remove");
            assert_eq!(remove(*way, c"user.a"), Err(Errno::NODATA));
        }
        // A symlink is itself, not what it points to.
        set(Target::Open(file.as_fd()), c"user.a", b"value").expect("set");
        let link = Name::new(b"link").expect("a name");
        assert_eq!(get(Target::At(parent.as_fd(), &link), c"user.a"), Ok(None));
    }
}
