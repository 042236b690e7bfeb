//! Session: the mount's life.
//!
//!   start()   superblock, handshake, threads: the mount works but is nowhere yet
//!   attach()  it is on the mount point
//!   detach()  umount -l: the native tree is there at once, open files live on here
//!   wait()    the kernel has dropped the last of them

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use fuser::{Config, INodeNo, Notifier, SessionACL};
use parking_lot::Mutex;
use rustix::io::Errno;

use super::MirrorFs;
use super::shared::Shared;
use crate::config::MountConfig;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{Ino, Invalidate, Mirror};
use crate::sys::{caps, host, local, stat};

/// A FUSE session that serves one mirror.
pub struct Session {
    shared: Arc<Shared>,
    mountpoint: PathBuf,
    /// The directory that is mounted over, or the root of the topmost dead mount on it, opened before
    /// anything was mounted.
    on: OwnedFd,
    /// Dead mounts on the mount point.
    dead: usize,
    /// Held until `attach`, then given to the kernel.
    mount: Mutex<Option<OwnedFd>>,
    mount_id: AtomicU64,
    dev: OwnedFd,
    thread: Mutex<Option<JoinHandle<std::io::Result<()>>>>,
}

/// Tells the kernel what it must not believe any more.
struct Notify(Notifier);

impl Invalidate for Notify {
    fn attributes(&self, ino: Ino) {
        // A negative offset: attributes only. An inode that the kernel no longer has is no error.
        if let Err(e) = self.0.inval_inode(INodeNo(ino), -1, 0) {
            tracing::debug!("invalidate inode {ino}: {e}");
        }
    }
}

impl Session {
    /// Makes the superblock, answers the kernel's handshake, starts the threads. `dead`: so many
    /// mounts without a daemon are stacked on the mount point and go away when this one is there.
    pub fn start(mirror: Arc<Mirror>, config: &MountConfig, dead: usize) -> Result<Session> {
        let on = local::open_dir_path(&config.mountpoint);
        let on = on.on("open", Side::Host, &config.mountpoint)?;
        let mountpoint =
            std::fs::canonicalize(&config.mountpoint).unwrap_or_else(|_| config.mountpoint.clone());
        let root = stat::stat_fd(mirror.dst_root().as_fd()).on("statx", Side::Dst, ".")?;
        let flags = host::fs_stat(mirror.dst_root().as_fd())
            .on("statfs", Side::Dst, ".")?
            .flags;
        let wants = |name: &str| config.mount_options.iter().any(|o| o == name);
        let flags = host::MountFlags {
            rdonly: wants("ro"),
            nosuid: flags & 2 != 0 || wants("nosuid"),
            nodev: flags & 4 != 0 || wants("nodev"),
            noexec: flags & 8 != 0 || wants("noexec"),
        };
        let source = config.src.to_string_lossy();
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let (dev, mount) = host::fuse_open(&source, root.mode & 0o170000, uid, gid)
            .and_then(|fuse| fuse.into_mount(flags))
            .on("mount", Side::Host, &mountpoint)?;
        let ours = host::dup(dev.as_fd()).on("dup", Side::Host, "/dev/fuse")?;
        let shared = Arc::new(Shared::new(Arc::clone(&mirror)));
        let mut threads = Config::default();
        threads.acl = SessionACL::All;
        threads.n_threads = Some(config.threads.max(1));
        threads.clone_fd = true;
        let unusable = |e: std::io::Error| Error::Unusable(format!("/dev/fuse: handshake: {e}"));
        let fs = MirrorFs::new(Arc::clone(&shared));
        let session =
            fuser::Session::from_fd(fs, dev, SessionACL::All, threads).map_err(unusable)?;
        mirror.set_invalidate(Box::new(Notify(session.notifier())));
        shared.set_notifier(session.notifier());
        let thread = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || {
                // The session threads inherit this: see sys::caps.
                caps::drop_fsetid();
                session.run()
            })
            .map_err(unusable)?;
        Ok(Session {
            shared,
            mountpoint,
            on,
            dead,
            mount: Mutex::new(Some(mount)),
            mount_id: AtomicU64::new(0),
            dev: ours,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Puts the mount on the mount point: visible from now on. Dead mounts there hide what is below
    /// until the new one does.
    pub fn attach(&self) -> Result<()> {
        let Some(mount) = self.mount.lock().take() else {
            return Ok(());
        };
        let root = stat::stat_fd(mount.as_fd()).on("statx", Side::Host, &self.mountpoint)?;
        self.mount_id.store(root.mnt_id, Ordering::Relaxed);
        let attached = match self.dead {
            0 => host::attach(mount.as_fd(), self.on.as_fd()),
            dead => self.replace(mount.as_fd(), dead),
        };
        attached.on("move_mount", Side::Host, &self.mountpoint)
        // The last fd of the mount itself closes here: else it could never end.
    }

    /// Attaches beneath the lowest of the dead mounts, then takes that one away too.
    fn replace(&self, mount: BorrowedFd<'_>, dead: usize) -> Result<(), Errno> {
        // Below each of these there is another dead one.
        for _ in 1..dead {
            host::detach(&self.mountpoint)?;
        }
        let top = local::open_dir_path(&self.mountpoint)?;
        match host::attach_beneath(mount, top.as_fd()) {
            Ok(()) => host::detach(&self.mountpoint),
            Err(Errno::INVAL) => {
                tracing::warn!(
                    "this kernel cannot mount beneath (before 6.5): the unfinished tree was in \
                     sight for a moment at \"{}\"",
                    self.mountpoint.display()
                );
                host::detach(&self.mountpoint)?;
                let on = local::open_dir_path(&self.mountpoint)?;
                host::attach(mount, on.as_fd())
            }
            Err(errno) => Err(errno),
        }
    }

    /// Takes the mount off the mount point. Open files and working directories live on.
    pub fn detach(&self) -> Result<()> {
        if self.is_detached() {
            return Ok(());
        }
        let there = stat::stat_path(&self.mountpoint).on("statx", Side::Host, &self.mountpoint)?;
        if there.mnt_id != self.mount_id.load(Ordering::Relaxed) {
            return Err(Error::Unusable(format!(
                "\"{}\": something else is mounted on top of the mirror; unmount that first",
                self.mountpoint.display()
            )));
        }
        host::detach(&self.mountpoint).on("umount", Side::Host, &self.mountpoint)?;
        self.shared.expire();
        if let Err(errno) = host::fuse_inc_epoch(self.dev.as_fd()) {
            // An older kernel: names in the detached mount may be stale for those still in it.
            tracing::debug!("FUSE_NOTIFY_INC_EPOCH: {errno}");
        }
        Ok(())
    }

    /// True when the mount is on no mount point of this namespace (any more).
    pub fn is_detached(&self) -> bool {
        let id = self.mount_id.load(Ordering::Relaxed);
        match host::mounts() {
            Ok(mounts) => !mounts
                .iter()
                .any(|m| m.id == id && m.fs_type == "fuse.mirrorfs"),
            Err(_) => false,
        }
    }

    /// True when the kernel has ended the session: nothing refers to the mount any more.
    pub fn is_over(&self) -> bool {
        self.thread
            .lock()
            .as_ref()
            .is_none_or(JoinHandle::is_finished)
    }

    /// Waits until nothing refers to the mount any more.
    pub fn wait(&self) -> Result<()> {
        let Some(thread) = self.thread.lock().take() else {
            return Ok(());
        };
        match thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Error::Unusable(format!("/dev/fuse: {e}"))),
            Err(_) => Err(Error::Unusable("a session thread panicked".into())),
        }
    }
}
