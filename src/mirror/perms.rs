//! Perms: permissions that would keep a daemon without CAP_DAC_OVERRIDE from its own work.
//!
//! Such a daemon can neither write into a file of mode 0444 nor change the `user.*` xattr that is
//! its mark, nor make entries in a directory of mode 0555. So a marked inode has its owner's bits as
//! well, and its mark says what its permissions are (`Mark::perm`): that is what users see, and what
//! the kernel checks them against. They come true right after the mark has gone.
//!
//!   stamp()      placing: the owner's bits are added, src's permissions go into the mark
//!   set_perm()   a user's chmod: the mark first, then the inode
//!   take_mark()  noted, unmarked, chmod, forgotten
//!   replay()     a start: what was noted and not forgotten is done
//!
//! The mark's removal and the chmod are two calls; what a crash between them leaves is the note,
//! `.mirrorfs/perms/PERM-INODE`, with the path in it. All of it happens under the inode's mark lock, by
//! `finish` too: a user may chmod what it takes a mark off.
//! With CAP_DAC_OVERRIDE nothing is added and nothing noted.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Mirror;
use super::node::{Ino, Node, ROOT};
use crate::error::{Context, Result, Side};
use crate::mark::{Mark, MarkName};
use crate::meta::{self, Meta};
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::xattr::Target;
use crate::sys::{caps, dir, fault, fd};

/// What the owner needs to work on a directory, and on a file.
const DIR_BITS: u32 = 0o700;
const FILE_BITS: u32 = 0o600;

/// Serialise reading, changing and writing back a mark: by inode number.
#[derive(Debug)]
pub struct MarkLocks([Mutex<()>; 64]);

impl Default for MarkLocks {
    fn default() -> MarkLocks {
        MarkLocks([const { Mutex::new(()) }; 64])
    }
}

impl MarkLocks {
    /// That of an inode.
    pub fn lock(&self, ino: Ino) -> MutexGuard<'_, ()> {
        self.0[(ino % 64) as usize].lock()
    }
}

/// The permissions' book of a dst.
#[derive(Debug)]
pub struct Perms<'a> {
    /// dst's root.
    pub root: BorrowedFd<'a>,
    /// `.mirrorfs/perms`.
    pub notes: BorrowedFd<'a>,
    /// Which xattr is the mark.
    pub mark: MarkName,
    /// A daemon's: users are served.
    pub locks: Option<&'a MarkLocks>,
}

/// True when modes bind this daemon. Marks of root's own are not bound by modes either.
pub fn are_binding(mark: MarkName) -> bool {
    mark == MarkName::User && !caps::have_dac_override()
}

/// The bits that are added to a marked inode.
fn bits(kind: FileType) -> u32 {
    match kind {
        FileType::Directory => DIR_BITS,
        _ => FILE_BITS,
    }
}

impl<'a> Perms<'a> {
    /// The mark lock of an inode of dst, by dst's number. Without a daemon there is nobody else.
    pub fn lock(&self, ino: u64) -> Result<Option<MutexGuard<'a, ()>>, Errno> {
        let Some(locks) = self.locks else {
            return Ok(None);
        };
        let is_root = stat::stat_fd(self.root)?.key.ino == ino;
        Ok(Some(locks.lock(if is_root { ROOT } else { ino })))
    }

    /// As `take_mark`, by who has no lock yet.
    pub fn take_mark_alone(&self, inode: BorrowedFd<'_>) -> Result<(), Errno> {
        let _guard = self.lock(stat::stat_fd(inode)?.key.ino)?;
        self.take_mark(inode)
    }

    /// Takes the mark off an inode; its permissions come true. Under its mark lock.
    pub fn take_mark(&self, inode: BorrowedFd<'_>) -> Result<(), Errno> {
        let target = Target::Fd(inode);
        let perm = match self.mark {
            MarkName::Trusted => None,
            MarkName::User => self.mark.get(target)?.and_then(|m| m.perm),
        };
        let Some(perm) = perm else {
            return self.mark.remove(target);
        };
        let note = self.note(inode, perm)?;
        self.mark.remove(target)?;
        fault::point("perm-unmarked");
        meta::chmod_fd(inode, perm)?;
        self.forget(note.as_ref())
    }

    /// Marks a directory that carries no mark (any more).
    fn mark_dir(&self, inode: BorrowedFd<'_>, mark: Mark) -> Result<(), Errno> {
        let target = Target::Fd(inode);
        let perm = stat::stat_fd(inode)?.perm();
        if !are_binding(self.mark) || perm & DIR_BITS == DIR_BITS {
            return self.mark.set(target, &mark);
        }
        let note = self.note(inode, perm)?;
        meta::chmod_fd(inode, perm | DIR_BITS)?;
        let perm = Some(perm);
        self.mark.set(target, &Mark { perm, ..mark })?;
        self.forget(note.as_ref())
    }

    /// Does what an earlier daemon died over.
    pub fn replay(&self) -> Result<()> {
        let at = ".mirrorfs/perms";
        for entry in dir::list(self.notes).on("getdents64", Side::Dst, at)? {
            let _guard = match parse(&entry.name) {
                Some((_, ino)) => self.lock(ino).on("statx", Side::Dst, ".")?,
                None => None,
            };
            if self.replay_one(&entry.name).on("chmod", Side::Dst, at)? {
                self.forget(Some(&entry.name)).on("unlink", Side::Dst, at)?;
            }
        }
        Ok(())
    }

    /// False: whoever made the note has ended meanwhile.
    fn replay_one(&self, name: &Name) -> Result<bool, Errno> {
        let file = match fd::open_at(self.notes, name, OFlags::RDONLY) {
            Err(Errno::NOENT) => return Ok(false),
            other => other?,
        };
        self.replay_note(name, &file).map(|()| true)
    }

    fn replay_note(&self, name: &Name, file: &OwnedFd) -> Result<(), Errno> {
        let Some((perm, ino)) = parse(name) else {
            return Ok(());
        };
        let mut path = vec![0; 1 << 16];
        let len = fd::pread_all(file.as_fd(), &mut path, 0)?;
        let Some(path) = RelPath::from_bytes(&path[..len]) else {
            return Ok(()); // Cut short: nothing had been done yet.
        };
        let opened = match fd::open_beneath(self.root, &path, OFlags::PATH) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            other => other?,
        };
        if stat::stat_fd(opened.as_fd())?.key.ino != ino {
            return Ok(());
        }
        let target = Target::Fd(opened.as_fd());
        match self.mark.get(target)? {
            None => meta::chmod_fd(opened.as_fd(), perm),
            Some(mark) if mark.perm.is_none() => {
                let perm = Some(perm);
                self.mark.set(target, &Mark { perm, ..mark })
            }
            Some(_) => Ok(()),
        }
    }

    /// `None` for an inode whose path does not fit into PATH_MAX: it goes without a note.
    fn note(&self, inode: BorrowedFd<'_>, perm: u32) -> Result<Option<Name>, Errno> {
        let paths = path_of(inode).and_then(|path| Ok((path, path_of(self.root)?)));
        let path = match &paths {
            Ok((path, root)) => path.strip_prefix(root),
            Err(Errno::NAMETOOLONG) => return Ok(None),
            Err(e) => return Err(*e),
        };
        let Ok(path) = path else { return Ok(None) };
        let ino = stat::stat_fd(inode)?.key.ino;
        let name = Name::new(format!("{perm:o}-{ino:x}").as_bytes()).ok_or(Errno::INVAL)?;
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let file = rustix::fs::openat(self.notes, name.as_cstr(), flags, mode)?;
        fd::pwrite_all(file.as_fd(), path.as_os_str().as_bytes(), 0)?;
        Ok(Some(name))
    }

    fn forget(&self, note: Option<&Name>) -> Result<(), Errno> {
        match note {
            Some(note) => rustix::fs::unlinkat(self.notes, note.as_cstr(), AtFlags::empty()),
            None => Ok(()),
        }
    }
}

/// The path of an open inode, as the kernel knows it now.
fn path_of(inode: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
    let link = format!("/proc/self/fd/{}", inode.as_raw_fd());
    let path = rustix::fs::readlinkat(rustix::fs::CWD, link, Vec::new())?;
    Ok(std::ffi::OsStr::from_bytes(path.to_bytes()).into())
}

fn parse(name: &Name) -> Option<(u32, u64)> {
    let text = std::str::from_utf8(name.as_bytes()).ok()?;
    let (perm, ino) = text.split_once('-')?;
    let perm = u32::from_str_radix(perm, 8).ok()?;
    Some((perm, u64::from_str_radix(ino, 16).ok()?))
}

impl Mirror {
    /// The mark lock, where an inode's permissions change with its mark.
    pub(super) fn lock_perms(&self, ino: Ino) -> Option<MutexGuard<'_, ()>> {
        self.modes_bind.then(|| self.lock_mark(ino))
    }

    pub(super) fn perms(&self) -> Perms<'_> {
        Perms {
            root: self.dst.as_fd(),
            notes: self.control.perms.as_fd(),
            mark: self.mark,
            locks: Some(&self.mark_locks),
        }
    }

    /// Applies src's metadata to an open inode of dst that is, or will be, marked. What comes back
    /// belongs into the mark: permissions that are not true yet.
    pub(super) fn stamp(
        &self,
        meta: &Meta,
        inode: BorrowedFd<'_>,
        path: &RelPath,
    ) -> Result<Option<u32>> {
        let add = match self.modes_bind {
            true => bits(meta.stat.kind()),
            false => 0,
        };
        let mut perm = 0;
        self.applied(path, || {
            let applied = meta.apply_fd_adding(inode, add);
            perm = applied.perm;
            applied.refused
        })?;
        Ok((perm & add != add).then_some(perm))
    }

    /// As `stamp`, of an inode that carries no mark: its permissions are true at once.
    pub(super) fn stamp_whole(
        &self,
        meta: &Meta,
        inode: BorrowedFd<'_>,
        path: &RelPath,
    ) -> Result<()> {
        match self.stamp(meta, inode, path)? {
            Some(perm) => meta::chmod_fd(inode, perm).on("chmod", Side::Dst, path),
            None => Ok(()),
        }
    }

    /// A user's chmod.
    pub(super) fn set_perm(
        &self,
        node: &Node,
        inode: BorrowedFd<'_>,
        perm: u32,
    ) -> Result<(), Errno> {
        if !self.modes_bind {
            return meta::chmod_fd(inode, perm);
        }
        let _guard = self.lock_mark(node.ino);
        let Some(mark) = self.mark.get(Target::Fd(inode))? else {
            return meta::chmod_fd(inode, perm);
        };
        let real = perm | bits(node.kind);
        let perm = (real != perm).then_some(perm);
        self.replace_mark(inode, &Mark { perm, ..mark })?;
        meta::chmod_fd(inode, real)
    }

    /// A user has set an ACL, and with it permissions.
    pub(super) fn acl_was_set(&self, node: &Node, inode: BorrowedFd<'_>) -> Result<(), Errno> {
        if !self.modes_bind {
            return Ok(());
        }
        let _guard = self.lock_mark(node.ino);
        let Some(mark) = self.mark.get(Target::Fd(inode))? else {
            return Ok(());
        };
        let perms = self.perms();
        let perm = stat::stat_fd(inode)?.perm();
        let note = perms.note(inode, perm)?;
        let real = perm | bits(node.kind);
        meta::chmod_fd(inode, real)?;
        let perm = (real != perm).then_some(perm);
        self.replace_mark(inode, &Mark { perm, ..mark })?;
        perms.forget(note.as_ref())
    }

    /// Takes the mark off an inode. The caller holds its mark lock where modes bind.
    pub(super) fn take_mark(&self, inode: BorrowedFd<'_>) -> Result<(), Errno> {
        self.perms().take_mark(inode)
    }

    /// Marks a directory again because something marked is moved below it.
    pub(super) fn mark_dir(&self, node: &Node, opened: &OwnedFd) -> Result<(), Errno> {
        let _guard = self.lock_mark(node.ino);
        self.perms().mark_dir(opened.as_fd(), Mark::populated())
    }

    /// statx of a node, with the permissions that users are to see.
    pub(super) fn stat_of(&self, node: &Node) -> Result<Stat, Errno> {
        if !self.modes_bind || !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return self.nodes.stat(node);
        }
        let opened = self.nodes.open(node, OFlags::PATH)?;
        let _guard = self.lock_mark(node.ino);
        let mut stat = stat::stat_fd(opened.as_fd())?;
        if let Some(mark) = self.mark.get(Target::Fd(opened.as_fd()))? {
            show(&mark, &mut stat);
        }
        Ok(stat)
    }

    /// The access ACL of a marked inode names its owner's bits too.
    pub(super) fn show_acl(&self, inode: BorrowedFd<'_>, acl: &mut [u8]) {
        if self.modes_bind
            && let Ok(Some(mark)) = self.mark.get(Target::Fd(inode))
            && let Some(perm) = mark.perm
        {
            set_owner(acl, perm);
        }
    }
}

/// Permissions that are not true yet, as users see them.
pub(super) fn show(mark: &Mark, stat: &mut Stat) {
    if let Some(perm) = mark.perm {
        stat.mode = stat.mode & !0o7777 | perm;
    }
}

/// The xattr of a POSIX ACL: a version (u32), then entries of tag (u16), bits (u16), id (u32).
fn set_owner(acl: &mut [u8], perm: u32) {
    const USER_OBJ: [u8; 2] = [1, 0];
    for entry in acl.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
        if entry[..2] == USER_OBJ {
            entry[2] = (perm >> 6 & 7) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_between_unmarking_and_chmod_is_made_good() {
        let tree = tempfile::tempdir().expect("a directory");
        for name in ["notes", "dst"] {
            std::fs::create_dir(tree.path().join(name)).expect("mkdir");
        }
        let open = |name: &str| std::fs::File::open(tree.path().join(name)).expect("it opens");
        let (notes, root) = (open("notes"), open("dst"));
        let perms = Perms {
            root: root.as_fd(),
            notes: notes.as_fd(),
            mark: MarkName::User,
            locks: None,
        };
        std::fs::write(tree.path().join("dst/a"), "x").expect("write");
        let file = open("dst/a");
        let perm = || stat::stat_fd(file.as_fd()).expect("statx").perm();
        perms.note(file.as_fd(), 0o444).expect("noted");
        assert_ne!(perm(), 0o444);
        perms.replay().expect("replays");
        assert_eq!(perm(), 0o444);
        assert!(dir::list(notes.as_fd()).expect("a list").is_empty());
    }

    #[test]
    fn an_acl_shows_the_owner_s_own_bits() {
        let mut acl = vec![2, 0, 0, 0];
        acl.extend([1, 0, 6, 0, 255, 255, 255, 255]);
        acl.extend([4, 0, 4, 0, 255, 255, 255, 255]);
        set_owner(&mut acl, 0o444);
        assert_eq!(acl[4..8], [1, 0, 4, 0]);
        assert_eq!(acl[12..16], [4, 0, 4, 0]);
        set_owner(&mut [], 0o444);
    }
}
