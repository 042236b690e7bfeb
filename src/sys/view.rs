//! View: a directory tree through mounts of our own, read-only and without access times, that nobody
//! else can see: whoever works through it cannot change the tree, whatever he tries.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::host::{self, MountLine};
use super::{Result, check};

/// A tree, and the way into it.
#[derive(Debug)]
pub struct View {
    /// As it was opened: keeps its mount busy, so that nobody takes it away by mistake.
    original: OwnedFd,
    /// The private mounts' root (O_PATH). Closing it takes the mounts apart.
    private: Option<OwnedFd>,
    /// The mounts below, as of the making.
    below: Vec<u64>,
}

impl View {
    /// A view of an open directory and all that is mounted below it; without privilege, on kernels
    /// before 5.18, or where a mount could not be taken along, the directory itself. Asks nobody: what
    /// is there may be dead.
    pub fn of(original: OwnedFd) -> View {
        let below = below(original.as_fd());
        let may = below.as_ref().is_some_and(|b| b.iter().all(can_be_cloned));
        let private = match may && clones_across_mounts() {
            true => clone_tree(original.as_fd())
                .inspect_err(|errno| tracing::debug!("no private view of src: {errno}"))
                .ok(),
            false => None,
        };
        View {
            original,
            private,
            below: ids(below),
        }
    }

    /// Where to open what is in the tree. O_PATH.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.private.as_ref().unwrap_or(&self.original).as_fd()
    }

    /// The directory as it was opened.
    pub fn original(&self) -> BorrowedFd<'_> {
        self.original.as_fd()
    }

    /// The tree cannot be changed through this view.
    pub fn is_private(&self) -> bool {
        self.private.is_some()
    }

    /// Something was mounted below, or unmounted, since the view was made. Reads mountinfo.
    pub fn is_stale(&self) -> bool {
        self.is_private() && ids(below(self.original())) != self.below
    }

    /// A new view of the same directory.
    pub fn again(&self) -> Result<View> {
        Ok(View::of(host::dup(self.original())?))
    }
}

fn ids(mounts: Option<Vec<MountLine>>) -> Vec<u64> {
    mounts.into_iter().flatten().map(|m| m.id).collect()
}

/// The mounts below a directory; `None`: the kernel does not tell.
fn below(dir: BorrowedFd<'_>) -> Option<Vec<MountLine>> {
    let path = path_of(dir)?;
    let mounts = host::mounts().ok()?;
    let is_below = |m: &MountLine| m.point.starts_with(&path) && m.point != path;
    Some(mounts.into_iter().filter(is_below).collect())
}

fn path_of(dir: BorrowedFd<'_>) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let link = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let link = rustix::fs::readlinkat(CWD, link, Vec::new()).ok()?;
    Some(Path::new(std::ffi::OsStr::from_bytes(link.to_bytes())).to_path_buf())
}

/// What is mounted by need (autofs) comes at the original place only, and an unbindable mount is left
/// out of a copy without a word.
fn can_be_cloned(mount: &MountLine) -> bool {
    mount.fs_type != "autofs" && !mount.unbindable
}

/// Before Linux 5.18 extents were shared within one mount only.
fn clones_across_mounts() -> bool {
    host::is_linux_at_least(5, 18)
}

/// MOUNT_ATTR_RDONLY.
const RDONLY: u64 = 0x1;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Copies the mounts from a directory on down, and makes the copy read-only. What is mounted in the
/// original later may appear in it (kernels from 6.15 on, shared mounts); nothing goes the other way.
fn clone_tree(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    const NOATIME: u64 = 0x10;
    const ATIME_MASK: u64 = 0x70;
    const NODIRATIME: u64 = 0x80;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(dir, c"", flags)?;
    let attr = MountAttr {
        attr_set: RDONLY | NOATIME | NODIRATIME,
        attr_clr: ATIME_MASK,
        propagation: libc::MS_SLAVE,
        userns_fd: 0,
    };
    set_attr(tree.as_fd(), libc::AT_RECURSIVE, &attr)?;
    Ok(tree)
}

/// Makes a mount, by its root, read-only or writable; its other flags stay. EBUSY while somebody has a
/// file open for writing.
pub fn set_read_only(root: BorrowedFd<'_>, on: bool) -> Result<()> {
    let attr = MountAttr {
        attr_set: if on { RDONLY } else { 0 },
        attr_clr: if on { 0 } else { RDONLY },
        propagation: 0,
        userns_fd: 0,
    };
    set_attr(root, 0, &attr)
}

fn set_attr(mount: BorrowedFd<'_>, at: i32, attr: &MountAttr) -> Result<()> {
    let at = at | libc::AT_EMPTY_PATH;
    // SAFETY: an open fd, a NUL-terminated path, and a struct of ours with its size, all of which live
    // through the call; the kernel only reads them.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            at,
            ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    check(ret).map(drop)
}

/// Mount points besides the directory's own through which this tree, or a part of it, can be written.
/// Other mount namespaces, and other clients of a server, are not seen.
pub fn writable_elsewhere(dir: BorrowedFd<'_>) -> Vec<PathBuf> {
    let (Ok(stat), Some(path), Ok(mounts)) =
        (super::stat::stat_fd(dir), path_of(dir), host::mounts())
    else {
        return Vec::new();
    };
    let Some(own) = mounts.iter().find(|m| m.id == stat.mnt_id) else {
        return Vec::new();
    };
    let Ok(inside) = path.strip_prefix(&own.point).map(|p| own.root.join(p)) else {
        return Vec::new();
    };
    let overlaps = |m: &MountLine| m.root.starts_with(&inside) || inside.starts_with(&m.root);
    let others = mounts
        .iter()
        .filter(|m| m.id != own.id && m.device == own.device);
    let writable = others.filter(|m| m.writable && overlaps(m));
    writable.map(|m| m.point.clone()).collect()
}

/// Tells when the mounts of this namespace have changed.
#[derive(Debug)]
pub struct MountWatch(std::fs::File);

impl MountWatch {
    /// From now on.
    pub fn new() -> Result<MountWatch> {
        let file = std::fs::File::open("/proc/self/mountinfo")
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        Ok(MountWatch(file))
    }

    /// Whether something was mounted or unmounted since it was asked last. Never waits.
    pub fn changed(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::new(&self.0, PollFlags::PRI)];
        let now = rustix::time::Timespec::default();
        poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_takes_no_change_or_is_the_directory_itself() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("a"), "x").expect("write");
        let view = View::of(host::open_dir(dir.path()).expect("opens"));
        let name = super::super::name::Name::new(b"new").expect("a name");
        let made = super::super::fd::create_new(view.root(), &name, 0o600);
        match view.is_private() {
            true => assert_eq!(made.err(), Some(Errno::ROFS)),
            false => assert!(made.is_ok()),
        }
        assert!(!view.is_stale());
        assert!(super::super::stat::stat_at(view.root(), c"a").is_ok());
    }
}
