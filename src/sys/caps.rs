//! Capabilities and identity of the calling thread.
//!
//! Linux keeps all of these per thread: what a session thread drops or assumes is its own affair.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::{Result, check};

/// True when the effective set holds CAP_SYS_ADMIN: `trusted.*` xattrs and passthrough work.
pub fn have_sys_admin() -> bool {
    capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// True when the effective set holds CAP_DAC_READ_SEARCH: open_by_handle_at(2) works.
pub fn have_read_search() -> bool {
    capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::DAC_READ_SEARCH))
}

/// True when the effective set holds CAP_DAC_OVERRIDE: modes do not keep us from our own work.
pub fn have_dac_override() -> bool {
    capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::DAC_OVERRIDE))
}

/// Sets or clears CAP_FSETID in the calling thread's effective set; returns what it was.
/// Without it a write clears setuid and setgid, as a user's write must (DESIGN: passthrough keeps
/// the credentials of the thread that registered the backing file).
fn set_fsetid(on: bool) -> bool {
    set_effective(CapabilitySet::FSETID, on)
}

/// As `set_fsetid`, for any capability or several.
fn set_effective(which: CapabilitySet, on: bool) -> bool {
    let Ok(mut caps) = capabilities(None) else {
        return false;
    };
    let was = caps.effective.contains(which);
    if was != on {
        caps.effective.set(which, on);
        // Not permitted (rootless): then there is no privilege to add or to drop either.
        let _ = set_capabilities(None, caps); // EPERM changes nothing.
    }
    was
}

/// Drops CAP_FSETID from the calling thread for good, and CAP_SYS_RESOURCE, with which users' writes
/// and creations would pass their quotas; threads that it spawns inherit that.
pub fn drop_fsetid() {
    set_fsetid(false);
    set_effective(CapabilitySet::SYS_RESOURCE, false);
}

/// Runs `f` with CAP_FSETID in effect, so that chmod and create keep S_ISGID as asked.
pub fn with_fsetid<T>(f: impl FnOnce() -> T) -> T {
    let was = set_fsetid(true);
    let value = f();
    set_fsetid(was);
    value
}

/// Runs `f` without CAP_FSETID and CAP_SYS_RESOURCE: for truncate, write and BACKING_OPEN on a user's
/// behalf.
pub fn without_fsetid<T>(f: impl FnOnce() -> T) -> T {
    let setid = set_fsetid(false);
    let quota = set_effective(CapabilitySet::SYS_RESOURCE, false);
    let value = f();
    set_fsetid(setid);
    set_effective(CapabilitySet::SYS_RESOURCE, quota);
    value
}

/// What a daemon of root's has a use for: any owner's files and metadata, marks and mounts, creating
/// for others, the reserved blocks and file limits that root has, labels, registered buffers.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_ADMIN)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_RESOURCE);

/// Gives up every other capability for good, for the calling thread and what it starts; and, unless a
/// set-user-ID helper is still to be called, that anything it executes could have more than it has.
pub fn shed(helper: bool) -> Result<()> {
    let mut caps = capabilities(None)?;
    for one in CapabilitySet::all().difference(NEEDED).iter() {
        // EINVAL: this kernel does not have it yet. EPERM: not root, who has nothing to give up.
        match rustix::thread::remove_capability_from_bounding_set(one) {
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    caps.effective &= NEEDED;
    caps.permitted &= NEEDED;
    caps.inheritable &= NEEDED;
    set_capabilities(None, caps)?;
    if !helper {
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

/// Whose name a thread can create in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    /// Anybody's.
    Any,
    /// Its own user's: without privilege.
    Own,
}

/// Gives the calling thread its own umask and working directory (unshare CLONE_FS), and keeps its
/// capabilities over setfsuid (SECBIT_NO_SETUID_FIXUP), if it has any. Once per thread.
fn own_fs_identity() -> Result<Identity> {
    // SAFETY: unshare(CLONE_FS) only separates umask, cwd and root of this thread.
    check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_FS) }))?;
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: prctl with integer arguments only.
    let ret = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) };
    match check(libc::c_long::from(ret)) {
        Ok(_) => Ok(Identity::Any),
        Err(Errno::PERM) => Ok(Identity::Own),
        Err(e) => Err(e),
    }
}

/// Runs `f` as somebody else for the file system: owner, group and umask of what it creates.
/// The thread's capabilities stay in effect. EPERM when the thread cannot get an identity of its
/// own, or has no privilege and `uid` is another user.
pub fn as_creator<T>(uid: u32, gid: u32, umask: u32, f: impl FnOnce() -> T) -> Result<T> {
    thread_local! {
        static READY: std::cell::Cell<Option<Identity>> = const { std::cell::Cell::new(None) };
    }
    let identity = match READY.get() {
        Some(identity) => identity,
        None => own_fs_identity()?,
    };
    READY.set(Some(identity));
    if identity == Identity::Own && uid != rustix::process::geteuid().as_raw() {
        return Err(Errno::PERM);
    }
    // SAFETY: setfsgid, setfsuid and umask take integers and concern this thread alone. Without
    // privilege a group that is not ours changes nothing: the new inode has our own.
    let (old_gid, old_uid, old_mask) = unsafe {
        (
            libc::setfsgid(gid),
            libc::setfsuid(uid),
            libc::umask(umask as libc::mode_t),
        )
    };
    let value = f();
    // SAFETY: as above; restores what was in effect.
    unsafe {
        libc::umask(old_mask);
        libc::setfsuid(old_uid as libc::uid_t);
        libc::setfsgid(old_gid as libc::gid_t);
    }
    Ok(value)
}
