//! The control directory: `.mirrorfs/` in the raw root of dst, invisible in the mount, gone at
//! finish. It holds only what has no inode of its own:
//!
//!   migration   what this is: one JSON object (version, src, adopt, mark)
//!   lock        flock(2)ed by the daemon
//!   links/      one link to each dst inode that stands for a multi-link src inode (links.rs)
//!   flags/      one empty file per inode that gets +i or +a at finish: `FLAGS-HANDLE`
//!   perms/      permissions that are about to come true (perms.rs)
//!   maps/       which blocks of a mixed file are users' (bytemap.rs)
//!   unseen/     one link to each stand-in of a name that src does not show (unseen.rs)
//!   ledger      what could not be pulled (ledger.rs)

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::late;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{Mark, MarkName, SHARDS_DIR, SYNC_RECORD};
use crate::sys::name::Name;
use crate::sys::xattr::Target;
use crate::sys::{dir, fd, host, stat};

pub use crate::mark::CONTROL_DIR as CONTROL;

const VERSION: u32 = 1;

/// What a migration is: written once, read at every start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the control directory and of the marks.
    pub version: u32,
    /// SRC as given at the first start, absolute.
    pub src: PathBuf,
    /// The inode number of SRC's root.
    pub src_ino: u64,
    /// DST had contents of its own: equal entries count as hydrated.
    pub adopt: bool,
    /// Of those, only what has the same bytes.
    #[serde(default)]
    pub checksum: bool,
    /// What DST has and SRC has not is removed.
    #[serde(default)]
    pub delete: bool,
    /// `trusted` or `user`: which xattr carries the marks.
    pub rootless: bool,
}

/// The control directory of a locked dst.
#[derive(Debug)]
pub struct Control {
    /// `.mirrorfs`, open.
    pub dir: OwnedFd,
    /// `.mirrorfs/links`, open.
    pub links: OwnedFd,
    /// `.mirrorfs/flags`, open.
    pub flags: OwnedFd,
    /// `.mirrorfs/perms`, open.
    pub perms: OwnedFd,
    /// `.mirrorfs/maps`, open.
    pub maps: OwnedFd,
    /// `.mirrorfs/unseen`, open.
    pub unseen: OwnedFd,
    /// What this migration is.
    pub identity: Identity,
    /// True when this start found a migration to resume.
    pub resumed: bool,
    /// Held while the daemon lives.
    pub lock: OwnedFd,
}

/// The control directory's name as a component.
pub fn control_name() -> Name {
    Name::new(CONTROL.as_bytes()).expect("a constant that is one component")
}

/// Opens the control directory of a dst root; `None` when there is none.
pub fn open_dir(root: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    match fd::open_at(root, &control_name(), OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e).on("open", Side::Dst, CONTROL),
    }
}

/// The identity in a control directory; `None` when a crash came before it was written.
pub fn read_identity(control: BorrowedFd<'_>) -> Result<Option<Identity>> {
    let file = match rustix::fs::openat(
        control,
        c"migration",
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    ) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e).on("open", Side::Dst, ".mirrorfs/migration"),
    };
    let mut text = Vec::new();
    std::fs::File::from(file)
        .read_to_end(&mut text)
        .map_err(|e| {
            let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
            Error::Call {
                call: "read",
                side: Side::Dst,
                path: ".mirrorfs/migration".into(),
                errno,
            }
        })?;
    let identity: Identity = serde_json::from_slice(&text)
        .map_err(|e| Error::Unusable(format!("DST's .mirrorfs/migration is not readable: {e}")))?;
    if identity.version != VERSION {
        return Err(Error::Unusable(format!(
            "DST holds a migration of format {}, this program knows format {VERSION}",
            identity.version
        )));
    }
    Ok(Some(identity))
}

/// What `Control::open` is asked for.
#[derive(Debug)]
pub struct Request<'a> {
    /// SRC, absolute.
    pub src: &'a Path,
    /// SRC's root.
    pub src_root: BorrowedFd<'a>,
    /// DST, for messages.
    pub dst: &'a Path,
    /// DST's root.
    pub dst_root: BorrowedFd<'a>,
    /// Take DST's contents as a copy made earlier.
    pub adopt: bool,
    /// By its bytes, not by size and time alone.
    pub checksum: bool,
    /// Without what SRC does not have.
    pub delete: bool,
    /// Which xattr carries the marks.
    pub mark: MarkName,
}

impl Control {
    /// Starts or resumes the migration of SRC into DST: lock, identity, mark of the root.
    /// `Error::Unusable` when DST is not for this migration; nothing was changed then.
    pub fn open(ask: &Request<'_>) -> Result<Control> {
        refuse_marked_src(ask)?;
        let found = match open_dir(ask.dst_root)? {
            Some(dir) => {
                if read_identity(dir.as_fd())?.is_none() {
                    // Before the lock is made: who is refused leaves nothing behind.
                    refuse_unsettled_sync(ask)?;
                }
                let lock = lock(dir.as_fd(), ask.dst)?;
                read_identity(dir.as_fd())?.map(|identity| (dir, lock, identity))
            }
            None => None,
        };
        let resumed = found.is_some();
        let (dir, lock, identity) = match found {
            Some((dir, lock, identity)) => {
                check_same(ask, &identity)?;
                (dir, lock, identity)
            }
            None => create(ask)?,
        };
        Control::assemble(dir, lock, identity, resumed)
    }

    /// The migration that DST holds, locked; `None` when it holds none. SRC is not needed.
    pub fn existing(dst: &Path, dst_root: BorrowedFd<'_>) -> Result<Option<Control>> {
        let Some(dir) = open_dir(dst_root)? else {
            return Ok(None);
        };
        let lock = lock(dir.as_fd(), dst)?;
        match read_identity(dir.as_fd())? {
            Some(identity) => Control::assemble(dir, lock, identity, true).map(Some),
            None => Ok(None),
        }
    }

    /// The migration of the program before us in this process, whose lock we hold.
    pub fn inherited(dst_root: BorrowedFd<'_>, lock: OwnedFd) -> Result<Control> {
        let gone = || Error::Unusable(format!("DST holds no migration any more ({CONTROL})"));
        let dir = open_dir(dst_root)?.ok_or_else(gone)?;
        let identity = read_identity(dir.as_fd())?.ok_or_else(gone)?;
        Control::assemble(dir, lock, identity, true)
    }

    fn assemble(dir: OwnedFd, lock: OwnedFd, identity: Identity, resumed: bool) -> Result<Control> {
        let links = subdir(dir.as_fd(), c"links")?;
        let flags = subdir(dir.as_fd(), c"flags")?;
        let perms = subdir(dir.as_fd(), c"perms")?;
        let maps = subdir(dir.as_fd(), c"maps")?;
        let unseen = subdir(dir.as_fd(), c"unseen")?;
        Ok(Control {
            dir,
            links,
            flags,
            perms,
            maps,
            unseen,
            identity,
            resumed,
            lock,
        })
    }
}

fn refuse_marked_src(ask: &Request<'_>) -> Result<()> {
    let src = ask.src.display();
    for mark in [MarkName::Trusted, MarkName::User] {
        if mark
            .get(Target::Fd(ask.src_root))
            .on("getxattr", Side::Src, ask.src)?
            .is_some()
        {
            return Err(Error::Unusable(format!(
                "SRC \"{src}\" carries a live mark: it is itself a migration that has not finished"
            )));
        }
    }
    if stat::stat_at(ask.src_root, control_name().as_cstr()).is_ok() {
        return Err(Error::Unusable(format!(
            "SRC \"{src}\" holds a control directory ({CONTROL}): it is the DST of a migration that has not finished"
        )));
    }
    Ok(())
}

/// After a power cut size and mtime do not tell that a file has its bytes; `sync` compares them.
fn refuse_unsettled_sync(ask: &Request<'_>) -> Result<()> {
    let Some(dir) = open_dir(ask.dst_root)? else {
        return Ok(());
    };
    for name in [SYNC_RECORD, SHARDS_DIR] {
        match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).on("stat", Side::Dst, ask.dst.join(CONTROL).join(name)),
            Ok(_) => {
                return Err(Error::Unusable(format!(
                    "DST \"{}\" holds a sync that did not end, or is not durable ({CONTROL}/{name}): \
                     run mirrorfs sync once more",
                    ask.dst.display()
                )));
            }
        }
    }
    Ok(())
}

fn check_same(ask: &Request<'_>, identity: &Identity) -> Result<()> {
    let ino = stat::stat_fd(ask.src_root)
        .on("statx", Side::Src, ask.src)?
        .key
        .ino;
    if identity.src == ask.src && identity.src_ino != ino {
        return Err(Error::Unusable(format!(
            "SRC \"{}\" is not the directory that this migration began with (root inode {}, not {ino}): is it mounted?",
            ask.src.display(),
            identity.src_ino,
        )));
    }
    if identity.src != ask.src {
        return Err(Error::Unusable(format!(
            "DST \"{}\" belongs to the migration of \"{}\" (root inode {}), not of \"{}\" (root inode {ino})",
            ask.dst.display(),
            identity.src.display(),
            identity.src_ino,
            ask.src.display(),
        )));
    }
    for (asked, began, option) in [
        (ask.checksum, identity.checksum, "--checksum"),
        (ask.delete, identity.delete, "--delete"),
    ] {
        // Later nobody could tell what users have made from what was there before.
        if asked && identity.adopt && !began {
            return Err(Error::Unusable(format!(
                "DST \"{}\" was adopted without {option}: it cannot be added later",
                ask.dst.display(),
            )));
        }
    }
    if identity.rootless != (ask.mark == MarkName::User) {
        return Err(Error::Unusable(format!(
            "DST \"{}\" was begun {}; go on the same way",
            ask.dst.display(),
            if identity.rootless {
                "rootless"
            } else {
                "as root"
            },
        )));
    }
    Ok(())
}

/// The order matters: with a control directory and no identity nothing is marked yet; with an
/// identity the root is marked before anything else is done.
fn create(ask: &Request<'_>) -> Result<(OwnedFd, OwnedFd, Identity)> {
    let dst = ask.dst.display();
    refuse_unsettled_sync(ask)?;
    let mut others = dir::list(ask.dst_root).on("getdents64", Side::Dst, ask.dst)?;
    others.retain(|e| e.name != control_name() && e.name.as_bytes() != b"lost+found");
    if !others.is_empty() && !ask.adopt {
        return Err(Error::Unusable(format!(
            "DST \"{dst}\" is not empty (\"{}\"); --adopt takes what is there as a copy made earlier",
            crate::error::Printable(others[0].name.as_os_str()),
        )));
    }
    if ask.delete && !others.is_empty() {
        let names = dir::list(ask.src_root).on("getdents64", Side::Src, ask.src)?;
        if names.iter().all(|e| e.name.as_bytes() == b"lost+found") {
            return Err(Error::Unusable(format!(
                "SRC \"{}\" is empty: --delete would remove all of DST; is it mounted?",
                ask.src.display()
            )));
        }
    }
    late::free_fd(ask.dst_root).on("FS_IOC_SETFLAGS", Side::Dst, ask.dst)?;
    let root = Target::Fd(ask.dst_root);
    let probe = Mark {
        populated: true,
        ..Mark::default()
    };
    ask.mark.set(root, &probe).and_then(|()| ask.mark.remove(root)).map_err(|errno| {
        Error::Unusable(format!(
            "DST \"{dst}\": setxattr {}: {errno}; mount needs a file system with extended attributes (sync does not)",
            ask.mark.as_cstr().to_string_lossy(),
        ))
    })?;
    let before = stat::stat_fd(ask.dst_root).on("statx", Side::Dst, ask.dst)?;
    match rustix::fs::mkdirat(ask.dst_root, CONTROL, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e).on("mkdir", Side::Dst, ask.dst.join(CONTROL)),
    }
    let dir = open_dir(ask.dst_root)?
        .ok_or_else(|| Error::Unusable("control directory vanished".into()))?;
    let lock = lock(dir.as_fd(), ask.dst)?;
    ask.mark
        .set(root, &Mark::pending())
        .on("setxattr", Side::Dst, ask.dst)?;
    crate::meta::set_times_fd(ask.dst_root, before.atime, before.mtime).on(
        "utimensat",
        Side::Dst,
        ask.dst,
    )?;
    fd::fsync(ask.dst_root).on("fsync", Side::Dst, ask.dst)?;
    let identity = Identity {
        version: VERSION,
        src: ask.src.to_owned(),
        src_ino: stat::stat_fd(ask.src_root)
            .on("statx", Side::Src, ask.src)?
            .key
            .ino,
        adopt: !others.is_empty(),
        checksum: ask.checksum && !others.is_empty(),
        delete: ask.delete && !others.is_empty(),
        rootless: ask.mark == MarkName::User,
    };
    write_identity(dir.as_fd(), &identity)?;
    Ok((dir, lock, identity))
}

fn write_identity(control: BorrowedFd<'_>, identity: &Identity) -> Result<()> {
    let at = ".mirrorfs/migration";
    let text = serde_json::to_vec(identity).map_err(|e| Error::Unusable(e.to_string()))?;
    let flags =
        OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(control, c"migration.new", flags, Mode::from_raw_mode(0o600))
        .on("open", Side::Dst, at)?;
    let mut file = std::fs::File::from(file);
    file.write_all(&text)
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
        .on("write", Side::Dst, at)?;
    fd::fsync(file.as_fd()).on("fsync", Side::Dst, at)?;
    rustix::fs::renameat(control, c"migration.new", control, c"migration").on(
        "rename",
        Side::Dst,
        at,
    )?;
    fd::fsync(control).on("fsync", Side::Dst, CONTROL)
}

/// Whether a daemon, or another command, has the lock of a dst root. An answer for this moment.
pub fn is_locked(root: BorrowedFd<'_>) -> bool {
    let Ok(Some(dir)) = open_dir(root) else {
        return false;
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = rustix::fs::openat(&dir, c"lock", flags, Mode::empty());
    lock.is_ok_and(|lock| host::try_lock_shared(lock.as_fd()) == Err(Errno::WOULDBLOCK))
}

fn lock(control: BorrowedFd<'_>, dst: &Path) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::openat(control, c"lock", flags, Mode::from_raw_mode(0o600)).on(
        "open",
        Side::Dst,
        ".mirrorfs/lock",
    )?;
    match host::try_lock(fd.as_fd()) {
        Ok(()) => Ok(fd),
        Err(Errno::WOULDBLOCK) => Err(Error::Unusable(format!(
            "DST \"{}\" is in use by another mirrorfs (flock .mirrorfs/lock)",
            dst.display()
        ))),
        Err(e) => Err(e).on("flock", Side::Dst, ".mirrorfs/lock"),
    }
}

fn subdir(control: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd> {
    match rustix::fs::mkdirat(control, name, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e).on("mkdir", Side::Dst, CONTROL),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(control, name, flags, Mode::empty()).on("open", Side::Dst, CONTROL)
}

/// Removes every entry of a directory (one level).
pub fn empty_dir(dir_fd: BorrowedFd<'_>, at: &str) -> Result<()> {
    for entry in dir::list(dir_fd).on("getdents64", Side::Dst, at)? {
        rustix::fs::unlinkat(dir_fd, entry.name.as_cstr(), AtFlags::empty()).on(
            "unlink",
            Side::Dst,
            at,
        )?;
    }
    Ok(())
}

/// Removes the control directory; the root's times stay what they were.
pub fn remove(root: BorrowedFd<'_>, control: &Control) -> Result<()> {
    let before = stat::stat_fd(root).on("statx", Side::Dst, ".")?;
    empty_dir(control.links.as_fd(), ".mirrorfs/links")?;
    empty_dir(control.flags.as_fd(), ".mirrorfs/flags")?;
    empty_dir(control.perms.as_fd(), ".mirrorfs/perms")?;
    empty_dir(control.maps.as_fd(), ".mirrorfs/maps")?;
    let unseen = crate::mark::in_control(super::unseen::DIR);
    for entry in dir::list(control.unseen.as_fd()).on("getdents64", Side::Dst, &unseen)? {
        super::extras::remove(
            control.unseen.as_fd(),
            &entry.name,
            &unseen.join(&entry.name),
        )?;
    }
    for name in [c"links", c"flags", c"perms", c"maps", c"unseen"] {
        rustix::fs::unlinkat(control.dir.as_fd(), name, AtFlags::REMOVEDIR).on(
            "rmdir",
            Side::Dst,
            CONTROL,
        )?;
    }
    empty_dir(control.dir.as_fd(), CONTROL)?;
    let rmdir = || rustix::fs::unlinkat(root, CONTROL, AtFlags::REMOVEDIR);
    let removed = match rmdir() {
        // A root that src's owner may not write into, and we are no more than that.
        Err(Errno::ACCESS) => {
            let chmod = |perm| crate::meta::chmod_fd(root, perm).on("chmod", Side::Dst, ".");
            chmod(before.perm() | 0o700)?;
            let removed = rmdir();
            chmod(before.perm())?;
            removed
        }
        other => other,
    };
    removed.on("rmdir", Side::Dst, CONTROL)?;
    crate::meta::set_times_fd(root, before.atime, before.mtime).on("utimensat", Side::Dst, ".")
}
