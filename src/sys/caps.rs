//! Capabilities and identity of the calling thread.
//!
//! Linux keeps all of these per thread: what a session thread drops or assumes is its own affair.

use std::cell::Cell;

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::{Result, check};

thread_local! {
    /// What the calling thread has: nothing but this module changes it.
    static CURRENT: Cell<Option<CapabilitySets>> = const { Cell::new(None) };
    /// Whom it is for the file system when it works for nobody else.
    static BASE: Cell<Option<Base>> = const { Cell::new(None) };
}

fn current() -> Result<CapabilitySets> {
    match CURRENT.get() {
        Some(caps) => Ok(caps),
        None => capabilities(None).inspect(|caps| CURRENT.set(Some(*caps))),
    }
}

fn change(caps: CapabilitySets) -> Result<()> {
    set_capabilities(None, caps).inspect(|()| CURRENT.set(Some(caps)))
}

fn have(which: CapabilitySet) -> bool {
    current().is_ok_and(|c| c.effective.contains(which))
}

/// True when the effective set holds CAP_SYS_ADMIN: `trusted.*` xattrs and passthrough work.
pub fn have_sys_admin() -> bool {
    have(CapabilitySet::SYS_ADMIN)
}

/// True when the effective set holds CAP_DAC_READ_SEARCH: open_by_handle_at(2) works.
pub fn have_read_search() -> bool {
    have(CapabilitySet::DAC_READ_SEARCH)
}

/// True when the effective set holds CAP_DAC_OVERRIDE: modes do not keep us from our own work.
pub fn have_dac_override() -> bool {
    have(CapabilitySet::DAC_OVERRIDE)
}

/// Without the first a write clears setuid and setgid, as a user's write must (DESIGN: passthrough
/// keeps the credentials of the thread that registered the backing file); without the second it keeps
/// to the user's quota.
const NOT_FOR_USERS: CapabilitySet = CapabilitySet::FSETID.union(CapabilitySet::SYS_RESOURCE);

/// Drops CAP_FSETID from the calling thread for good, and CAP_SYS_RESOURCE, with which users' writes
/// and creations would pass their quotas; threads that it spawns inherit that.
pub fn drop_fsetid() {
    if let Ok(mut caps) = current() {
        caps.effective -= NOT_FOR_USERS;
        let _ = change(caps); // Giving up is never refused.
    }
}

/// Runs `f` with CAP_FSETID in effect, so that chmod and create keep S_ISGID as asked.
pub fn with_fsetid<T>(f: impl FnOnce() -> T) -> T {
    // Not permitted (rootless): then there is no privilege to add.
    with_effective(|c| c.effective | (CapabilitySet::FSETID & c.permitted), f)
}

/// Runs `f` without CAP_FSETID and CAP_SYS_RESOURCE: for truncate, write and BACKING_OPEN on a user's
/// behalf.
pub fn without_fsetid<T>(f: impl FnOnce() -> T) -> T {
    with_effective(|c| c.effective - NOT_FOR_USERS, f)
}

/// Runs `f` with another effective set. It makes no call when the set is that already.
fn with_effective<T>(
    wanted: impl FnOnce(CapabilitySets) -> CapabilitySet,
    f: impl FnOnce() -> T,
) -> T {
    let Ok(was) = current() else {
        return f();
    };
    let effective = wanted(was);
    let changed = effective != was.effective && change(CapabilitySets { effective, ..was }).is_ok();
    let value = f();
    if changed {
        let _ = change(was); // It was permitted before.
    }
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
    let mut caps = current()?;
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
    change(caps)?;
    if !helper {
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

/// Whom a thread is for the file system, and whose name it can create in.
#[derive(Debug, Clone, Copy)]
struct Base {
    uid: u32,
    gid: u32,
    umask: u32,
    /// It can create in anybody's name; else only in its own user's.
    any: bool,
}

/// Gives the calling thread its own umask and working directory (unshare CLONE_FS), and keeps its
/// capabilities over setfsuid (SECBIT_NO_SETUID_FIXUP), if it has any. Once per thread.
fn own_fs_identity() -> Result<Base> {
    // SAFETY: unshare(CLONE_FS) only separates umask, cwd and root of this thread.
    check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_FS) }))?;
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: prctl with integer arguments only.
    let ret = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) };
    let any = match check(libc::c_long::from(ret)) {
        Ok(_) => true,
        Err(Errno::PERM) => false,
        Err(e) => return Err(e),
    };
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask);
    Ok(Base {
        uid: set_fs_uid(u32::MAX),
        gid: set_fs_gid(u32::MAX),
        umask: umask.as_raw_mode(),
        any,
    })
}

/// Sets this thread's user for the file system and returns what it was; nobody's number (-1) changes
/// nothing. There is no error: what is not permitted changes nothing either.
fn set_fs_uid(uid: u32) -> u32 {
    // SAFETY: setfsuid takes an integer and concerns this thread alone.
    unsafe { libc::setfsuid(uid).cast_unsigned() }
}

/// As `set_fs_uid`, of the group.
fn set_fs_gid(gid: u32) -> u32 {
    // SAFETY: setfsgid takes an integer and concerns this thread alone.
    unsafe { libc::setfsgid(gid).cast_unsigned() }
}

/// Runs `f` as somebody else for the file system: owner, group and umask of what it creates.
/// The thread's capabilities stay in effect. EPERM when the thread cannot get an identity of its
/// own, or has no privilege and `uid` is another user.
pub fn as_creator<T>(uid: u32, gid: u32, umask: u32, f: impl FnOnce() -> T) -> Result<T> {
    let base = match BASE.get() {
        Some(base) => base,
        None => own_fs_identity()?,
    };
    BASE.set(Some(base));
    if !base.any && uid != rustix::process::geteuid().as_raw() {
        return Err(Errno::PERM);
    }
    become_other(base, (uid, gid, umask));
    let value = f();
    become_other(
        Base {
            uid,
            gid,
            umask,
            ..base
        },
        (base.uid, base.gid, base.umask),
    );
    Ok(value)
}

/// From `was` to what follows; a call for each that differs. Without privilege a group that is not
/// ours changes nothing: the new inode has our own.
fn become_other(was: Base, (uid, gid, umask): (u32, u32, u32)) {
    if gid != was.gid {
        set_fs_gid(gid);
    }
    if uid != was.uid {
        set_fs_uid(uid);
    }
    if umask != was.umask {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// The calling thread's effective capabilities, as the kernel has them.
    fn effective() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("procfs");
        let line = status.lines().find_map(|l| l.strip_prefix("CapEff:\t"));
        u64::from_str_radix(line.expect("a line"), 16).expect("a number")
    }

    #[test]
    fn what_a_thread_has_taken_or_dropped_comes_back_and_memory_is_right() {
        const FSETID: u64 = 1 << 4;
        let whole = effective();
        without_fsetid(|| {
            assert_eq!(effective() & FSETID, 0);
            with_fsetid(|| assert_eq!(effective() & FSETID, whole & FSETID));
            assert_eq!(effective() & FSETID, 0);
        });
        assert_eq!(effective(), whole);
        drop_fsetid();
        let less = effective();
        assert_eq!(less & FSETID, 0);
        with_fsetid(|| assert_eq!(effective() & FSETID, whole & FSETID));
        assert_eq!(effective(), less);
    }

    #[test]
    fn what_is_made_for_others_is_theirs_and_the_next_is_ours_again() {
        if !have_sys_admin() {
            assert!(std::env::var_os("MIRRORFS_TEST_ALL").is_none());
            eprintln!("not here: it needs root");
            return;
        }
        let tree = tempfile::tempdir().expect("a directory");
        let made = |name: &str| {
            let path = tree.path().join(name);
            std::fs::File::create(&path).expect("it is made");
            let meta = path.metadata().expect("it is there");
            (meta.uid(), meta.gid(), meta.mode() & 0o777)
        };
        let before = made("before");
        let theirs = as_creator(1234, 0, 0o077, || made("theirs")).expect("root may");
        assert_eq!(theirs, (1234, 0, 0o600));
        assert_eq!(made("between"), before);
        let theirs = as_creator(0, 5678, 0o002, || made("others")).expect("root may");
        assert_eq!(theirs, (0, 5678, 0o664));
        assert_eq!(made("after"), before);
    }
}
