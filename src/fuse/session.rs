//! Session: the mount's life.
//!
//!   start()   superblock, handshake, threads: the mount works but is nowhere yet
//!   attach()  it is on the mount point
//!   detach()  umount -l: the native tree is there at once, open files live on here
//!   wait()    the kernel has dropped the last of them
//!
//! Without CAP_SYS_ADMIN the helper mounts: then start() has put it on the mount point already, and
//! whoever looks into it waits for the handshake.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::MirrorFs;
use super::dev::{self, Dev};
use super::ring::Queues;
use super::ring::relay::Relay;
use super::shared::Shared;
use super::{handshake, ring};
use crate::config::{MountConfig, Transport};
use crate::error::{Context, Error, Printable, Result, Side};
use crate::mirror::{Ino, Invalidate, Mirror};
use crate::sys::helper::{Helper, Wanted};
use crate::sys::{caps, host, local, stat};

/// How long a look at the mount may take: it waits for nobody.
pub(super) const LOOK_MAX: Duration = Duration::from_secs(5);

/// A FUSE session that serves one mirror.
pub struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) mountpoint: PathBuf,
    /// Held until `attach`, then given to the kernel, and what it goes over. `None`: it is attached already.
    pub(super) mount: Mutex<Option<(OwnedFd, Over)>>,
    /// Who mounts and unmounts for us, without CAP_SYS_ADMIN.
    pub(super) helper: Option<Helper>,
    pub(super) mount_id: AtomicU64,
    /// For notifications; the session threads have their own.
    pub(super) dev: Arc<Dev>,
    /// What the session threads read from: a request is answered where it was read.
    pub(super) lanes: Mutex<Vec<Arc<OwnedFd>>>,
    /// The queues of io_uring, for another program.
    pub(super) relay: Relay,
    /// Those of the program before us, until we serve.
    pub(super) inherited: Mutex<Option<Queues>>,
    /// Why another program could not go on with it.
    pub(super) bound: Mutex<Option<&'static str>>,
    pub(super) threads: Mutex<Vec<JoinHandle<Result<(), Errno>>>>,
}

/// Where a mount goes.
#[derive(Debug)]
pub struct Point {
    /// Without symlinks.
    pub path: PathBuf,
    /// What is there.
    pub over: Over,
}

/// What a mount goes over.
#[derive(Debug)]
pub enum Over {
    /// This directory. The path is not walked again: it may be an automount point, where everybody waits for
    /// the mount but the process group that was started to make it, which a daemon leaves.
    Directory(OwnedFd),
    /// So many mounts without a daemon, one on the other; they go away when the new one is there.
    Dead(usize),
}

/// Tells the kernel what it must not believe any more.
struct Notify(Arc<Dev>);

impl Invalidate for Notify {
    fn attributes(&self, ino: Ino) {
        self.0.void_attributes(ino);
    }
}

impl Session {
    /// Makes the superblock, answers the kernel's handshake, starts the threads.
    pub fn start(mirror: Arc<Mirror>, config: &MountConfig, point: Point) -> Result<Session> {
        let (mountpoint, over) = (point.path, point.over);
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
        let helper = match config.helper {
            true => Some(Helper::find().ok_or_else(|| Error::Unusable(NO_HELPER.into()))?),
            false => None,
        };
        // Before the kernel makes its offer, which is when it mounts.
        let wants_ring = wants_ring(config) && ring::switch_on();
        let (dev, mount) = match &helper {
            Some(helper) => (mount_by(helper, &mountpoint, config, flags)?, None),
            None => {
                let source = config.src.to_string_lossy();
                let uid = rustix::process::geteuid().as_raw();
                let gid = rustix::process::getegid().as_raw();
                let (dev, mount) = host::fuse_open(&source, root.mode & 0o170000, uid, gid)
                    .and_then(|fuse| fuse.into_mount(flags))
                    .on("mount", Side::Host, &mountpoint)?;
                (dev, Some(mount))
            }
        };
        let session = Session {
            shared: Arc::new(Shared::new(Arc::clone(&mirror))),
            mountpoint,
            mount: Mutex::new(mount.map(|mount| (mount, over))),
            helper,
            mount_id: AtomicU64::new(0),
            dev: Arc::new(Dev::new(dev)),
            lanes: Mutex::default(),
            relay: Relay::default(),
            inherited: Mutex::default(),
            bound: Mutex::default(),
            threads: Mutex::default(),
        };
        let served = session.serve(&mirror, config, wants_ring);
        if let (Err(_), Some(helper)) = (&served, &session.helper)
            && let Err(e) = helper.unmount(&session.mountpoint)
        {
            tracing::error!("{e}");
        }
        served.map(|()| session)
    }

    /// Answers the kernel's handshake and starts the threads.
    fn serve(&self, mirror: &Mirror, config: &MountConfig, wants_ring: bool) -> Result<()> {
        let unusable = |e: std::io::Error| Error::Unusable(format!("/dev/fuse: handshake: {e}"));
        let queues = wants_ring
            .then(|| ring::prepare(self.dev.fd(), &self.shared, config.threads.max(1)))
            .and_then(|made| {
                made.inspect_err(|e| tell_of_dev(config, &format!("io_uring: {e}")))
                    .ok()
            });
        let agreed = handshake::answer(&self.dev, queues.is_some());
        let agreed = agreed.map_err(|e| unusable(e.into()))?;
        if agreed.passthrough {
            self.shared.backings.enable();
        }
        *self.bound.lock() = match agreed.resend {
            false => Some("this kernel does not send requests again (before Linux 6.9)"),
            true => None,
        };
        self.introduce(mirror);
        for _ in 0..config.threads.max(1) {
            let dev = self.dev.another().map_err(|e| unusable(e.into()))?;
            self.read_from(dev).map_err(unusable)?;
        }
        match queues.filter(|_| agreed.ring) {
            Some(queues) => {
                tracing::info!("requests come through io_uring");
                self.relay.know(&queues);
                self.threads.lock().extend(queues.go());
            }
            None if wants_ring => tell_of_dev(config, "no FUSE over io_uring"),
            None => {}
        }
        if self.helper.is_some() {
            let id = mount_id(&self.mountpoint)?;
            self.mount_id.store(id, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn introduce(&self, mirror: &Mirror) {
        mirror.set_invalidate(Box::new(Notify(Arc::clone(&self.dev))));
        self.shared.set_dev(Arc::clone(&self.dev));
    }

    /// One more session thread.
    pub(super) fn read_from(&self, dev: Dev) -> std::io::Result<()> {
        let fs = MirrorFs::new(Arc::clone(&self.shared));
        let (mut lanes, mut threads) = (self.lanes.lock(), self.threads.lock());
        let thread = std::thread::Builder::new().name(format!("fuse-{}", threads.len()));
        lanes.push(Arc::clone(dev.fd()));
        threads.push(thread.spawn(move || {
            // For good: see sys::caps.
            caps::drop_fsetid();
            dev::serve(dev, &fs)
        })?);
        Ok(())
    }

    /// Puts the mount on the mount point: visible from now on. Dead mounts there hide what is below
    /// until the new one does. `known`: called right before, when what `bare_state` tells is true.
    pub fn attach(&self, known: impl FnOnce()) -> Result<()> {
        let Some((mount, over)) = self.mount.lock().take() else {
            if self.helper.is_some()
                && let Ok(root) = local::open_dir_path(&self.mountpoint)
            {
                show_root(&self.shared, self.relay.has_queues(), root.as_fd());
            }
            return Ok(());
        };
        show_root(&self.shared, self.relay.has_queues(), mount.as_fd());
        let id = stat::mount_id(mount.as_fd()).on("statx", Side::Host, &self.mountpoint)?;
        self.mount_id.store(id, Ordering::Relaxed);
        known();
        let attached = match over {
            Over::Directory(on) => host::attach(mount.as_fd(), on.as_fd()),
            Over::Dead(count) => self.replace(mount.as_fd(), count),
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
                let on = local::open_mount_point(&self.mountpoint)?;
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
        take_off(&self.mountpoint, self.helper.as_ref())?;
        self.shared.expire();
        if let Err(errno) = host::fuse_inc_epoch(self.dev.fd().as_fd()) {
            // An older kernel: names in the detached mount may be stale for those still in it.
            tracing::debug!("FUSE_NOTIFY_INC_EPOCH: {errno}");
        }
        Ok(())
    }

    /// True when the mount is on no mount point of this namespace (any more).
    pub fn is_detached(&self) -> bool {
        let id = self.mount_id.load(Ordering::Relaxed);
        match host::mounts() {
            Ok(mounts) => !mounts.iter().any(|m| m.id == id && m.fs_type == FS_TYPE),
            Err(_) => false,
        }
    }

    /// True when the kernel has ended the session: nothing refers to the mount any more.
    pub fn is_over(&self) -> bool {
        self.threads.lock().iter().all(JoinHandle::is_finished)
    }

    /// Waits until nothing refers to the mount any more.
    pub fn wait(&self) -> Result<()> {
        let threads = std::mem::take(&mut *self.threads.lock());
        let mut result = Ok(());
        for thread in threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => result = Err(Error::Unusable(format!("/dev/fuse: {e}"))),
                Err(_) => result = Err(Error::Unusable("a session thread panicked".into())),
            }
        }
        result
    }
}

/// Whether requests are to come through io_uring.
fn wants_ring(config: &MountConfig) -> bool {
    match config.transport {
        Transport::Dev => false,
        Transport::Uring => true,
        // Queues die with their daemon. 6.18 is the first kernel that all tests were run on.
        Transport::Auto => !config.keep_mount && host::is_linux_at_least(6, 18),
    }
}

/// Why io_uring does not serve: nothing to worry about unless it was asked for.
fn tell_of_dev(config: &MountConfig, why: &str) {
    match config.transport {
        Transport::Uring => tracing::warn!("{why}: requests come by /dev/fuse"),
        Transport::Auto | Transport::Dev => tracing::info!("{why}: requests come by /dev/fuse"),
    }
}

/// Until the kernel knows the root's mode it refuses everybody but root (EACCES), and it drops an answer
/// that crosses a notification (fs/fuse/inode.c, attr_version): so the root is asked for before anything
/// sends one.
fn show_root(shared: &Shared, ring: bool, root: BorrowedFd<'_>) {
    if let Err(errno) = local::look_from_a_child(root, c"", LOOK_MAX) {
        tracing::debug!("the first look at the root: {errno}"); // The next one shows it.
    }
    if ring && let Err(errno) = shared.show_own(root, LOOK_MAX) {
        tracing::debug!("our own file: {errno}"); // The kernel may know another one.
    }
}

/// Takes the topmost mount off a mount point, by ourselves or through the helper.
pub fn take_off(point: &Path, helper: Option<&Helper>) -> Result<()> {
    match helper {
        Some(helper) => helper.unmount(point).map_err(|line| refused(point, &line)),
        None => host::detach(point).on("umount", Side::Host, point),
    }
}

/// The type of our mounts in the table of mounts.
pub const FS_TYPE: &str = "fuse.mirrorfs";

/// Why nobody but root can mount.
pub const NO_HELPER: &str =
    "mount: no fusermount3 in PATH: without root mirrorfs mounts through it (package fuse3)";

fn mount_by(
    helper: &Helper,
    point: &Path,
    config: &MountConfig,
    flags: host::MountFlags,
) -> Result<OwnedFd> {
    let options: Vec<&str> = [
        (config.allow_other, "allow_other"),
        (flags.rdonly, "ro"),
        (flags.nosuid, "nosuid"),
        (flags.nodev, "nodev"),
        (flags.noexec, "noexec"),
    ]
    .into_iter()
    .filter_map(|(on, name)| on.then_some(name))
    .collect();
    let wanted = Wanted {
        source: &config.src,
        options: &options,
    };
    helper
        .mount(point, &wanted)
        .map_err(|line| refused(point, &line))
}

fn refused(point: &Path, line: &str) -> Error {
    Error::Unusable(format!(
        "MOUNTPOINT \"{}\": {line}",
        Printable(point.as_os_str())
    ))
}

/// The mount that the helper has just made, found as text: asking it would ask ourselves.
fn mount_id(point: &Path) -> Result<u64> {
    let gone = || refused(point, "the helper's mount is not there");
    let mounts = host::mounts().map_err(|_| gone())?;
    let top = mounts.iter().rfind(|m| m.point == point).ok_or_else(gone)?;
    match top.fs_type == FS_TYPE {
        true => Ok(top.id),
        false => Err(gone()),
    }
}
