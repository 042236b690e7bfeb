//! Finish: dst becomes a plain tree that owes mirrorfs nothing.
//!
//!   scan     every inode of dst is looked at: nothing is pending (I2 is not taken on trust here)
//!   sync     syncfs
//!   links    the anchors' names
//!   flags    +i and +a, which would have forbidden everything before
//!   control  ledger, identity, then the directory itself; the root's own +i after that
//!
//! A crash between any two steps leaves either a migration that finish can end, or a plain tree.

use std::cell::RefCell;
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;
use serde::Serialize;

use super::Mirror;
use super::control::{self, CONTROL, Control, Identity};
use super::ledger::{self, Ledger, LedgerEntry};
use super::native;
use super::perms::{MarkLocks, Perms};
use super::salvage::rest;
pub use super::salvage::rest::Rest;
use crate::crew::Crew;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{Mark, MarkName};
use crate::sys::handle::Handle;
use crate::sys::name::{Name, RelPath};
use crate::sys::xattr::Target;
use crate::sys::{copy, dir, fault, fd, host, stat};

/// What the marks in a dst say, without a daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// SRC, when DST holds a migration.
    pub identity_src: Option<PathBuf>,
    /// Files without their data.
    pub pending_files: u64,
    /// Directories without their names: what is in them is not counted.
    pub pending_dirs: u64,
    /// Bytes of the pending files.
    pub bytes_left: u64,
    /// Entries in the ledger.
    pub ledger: u64,
}

/// Answers `status` from DST's marks.
pub fn survey(dst: &Path) -> Result<Survey> {
    let root = open_root(dst)?;
    let Some(control) = control::open_dir(root.as_fd())? else {
        return Ok(Survey::default());
    };
    let identity = control::read_identity(control.as_fd())?;
    let mut survey = Survey {
        ledger: failures(&ledger::read(control.as_fd())?.0),
        ..Survey::default()
    };
    if let Some(identity) = identity {
        scan(root.as_fd(), mark_of(&identity), &mut |found| {
            match (found.kind, found.mark.populated) {
                _ if found.mark.own => {}
                (FileType::Directory, false) => survey.pending_dirs += 1,
                (FileType::Directory, true) => {}
                _ => {
                    survey.pending_files += 1;
                    survey.bytes_left += found.size;
                }
            }
            Ok(())
        })?;
        survey.identity_src = Some(identity.src);
    }
    Ok(survey)
}

fn failures(entries: &ledger::Entries) -> u64 {
    entries.values().filter(|e| !e.is_extra()).count() as u64
}

/// The ledger of a DST without a daemon; empty when there is none.
pub fn read_ledger(dst: &Path) -> Result<Vec<LedgerEntry>> {
    let root = open_root(dst)?;
    let Some(control) = control::open_dir(root.as_fd())? else {
        return Ok(Vec::new());
    };
    Ok(ledger::read(control.as_fd())?.0.into_values().collect())
}

/// The control directory of a DST without a daemon.
fn control_of(dst: &Path, root: BorrowedFd<'_>) -> Result<Control> {
    Control::existing(dst, root)?.ok_or_else(|| {
        Error::Unusable(format!(
            "\"{}\" is not the DST of a migration",
            dst.display()
        ))
    })
}

/// Gives up what the ledger says of these paths of SRC, without a daemon; how many entries.
pub fn accept_offline(dst: &Path, paths: &[RelPath]) -> Result<usize> {
    let root = open_root(dst)?;
    let control = control_of(dst, root.as_fd())?;
    let ledger = Ledger::open(control.dir.as_fd())?;
    let accepted = paths.iter().map(|p| ledger.accept(p)).sum();
    ledger.sync(control.dir.as_fd())?;
    Ok(accepted)
}

/// Finishes a migration that has no daemon; the files that are in DST without some bytes, as accepted. DST
/// without a migration is refused.
pub fn finish_offline(dst: &Path, accept_loss: bool) -> Result<Vec<Rest>> {
    let root = open_root(dst)?;
    let control = control_of(dst, root.as_fd())?;
    let mark = mark_of(&control.identity);
    let ledger = Ledger::open(control.dir.as_fd())?;
    Finisher {
        root: root.as_fd(),
        control: &control,
        ledger: &ledger,
        mark,
        locks: None,
        removed: RefCell::default(),
    }
    .run(accept_loss)
}

impl Mirror {
    /// Ends the migration: see the module. Refuses (`Error::Unusable`, one line) while something is
    /// pending, or in the ledger and not accepted as lost. The mount can go on afterwards. The files that
    /// are in dst without some bytes, as accepted, come back.
    pub fn finish(&self, accept_loss: bool) -> Result<Vec<Rest>> {
        for _ in 0..600 {
            if self.commit.is_idle() {
                break;
            }
            self.commit.hurry();
            std::thread::sleep(Duration::from_millis(50));
        }
        let guard = self.moves.lock();
        let (root, mark) = (self.dst.as_fd(), self.mark);
        let finisher = Finisher {
            root,
            control: &self.control,
            ledger: &self.ledger,
            mark,
            locks: Some(&self.mark_locks),
            removed: RefCell::default(),
        };
        finisher.check_accepted(accept_loss)?;
        let finished = self.shut_rescues().and_then(|rescues| {
            fault::point("finish-shut");
            Ok((rescues, finisher.run(accept_loss)?))
        });
        let removed = finisher.removed.take();
        // Waiters take it too: the walker's, for the mark of the directory.
        drop(guard);
        let (rescues, rests) = finished.inspect_err(|_| self.open_gate())?;
        self.end_rescues(&rescues, &rests, removed);
        self.finished.store(true, Ordering::Relaxed);
        self.progress.complete.store(true, Ordering::Relaxed);
        Ok(rests)
    }
}

struct Finisher<'a> {
    root: BorrowedFd<'a>,
    control: &'a Control,
    ledger: &'a Ledger,
    mark: MarkName,
    /// With a daemon: users change marked inodes under them (perms.rs).
    locks: Option<&'a MarkLocks>,
    /// What was given up, and is not there any more.
    removed: RefCell<HashSet<u64>>,
}

impl Finisher<'_> {
    fn check_accepted(&self, accept_loss: bool) -> Result<Vec<LedgerEntry>> {
        let entries = self.ledger.entries();
        let open = entries.iter().filter(|e| !e.accepted).count();
        if open > 0 && !accept_loss {
            return Err(Error::Unusable(format!(
                "{open} entries could not be copied whole (see: mirrorfs errors); errors --accept-loss gives \
                 up one path, finish --accept-loss gives up all",
            )));
        }
        Ok(entries)
    }

    fn run(&self, accept_loss: bool) -> Result<Vec<Rest>> {
        let entries = self.check_accepted(accept_loss)?;
        let mut pending = Vec::new();
        let mut populated = Vec::new();
        let (mut mixed, mut remains) = (Vec::new(), Vec::new());
        let at = (self.root, self.control.maps.as_fd());
        let mut own = Vec::new();
        scan(self.root, self.mark, &mut |found| {
            let source = found.mark.origin.as_ref().unwrap_or(&found.path);
            match found.mark.populated {
                false if found.mark.own => own.push(found.path),
                true => populated.push(found.path),
                false if found.mark.salvage.is_some() && is_lost(&entries, source) => {
                    match rest::look(at, self.mark, &found.path)? {
                        rest::Found::Gone => {}
                        rest::Found::Changed => mixed.push(found.path),
                        rest::Found::Nothing => pending.push((found.path, found.kind)),
                        rest::Found::Some(some) => remains.push(some),
                    }
                }
                false if found.mark.salvage.is_some() => pending.push((found.path, found.kind)),
                false if found.mark.mixed.is_some() => mixed.push(found.path),
                false => pending.push((found.path, found.kind)),
            }
            Ok(())
        })?;
        if let Some(first) = mixed.first() {
            return Err(changed(mixed.len(), first));
        }
        self.give_up(pending, &entries)?;
        let perms = Perms {
            root: self.root,
            notes: self.control.perms.as_fd(),
            mark: self.mark,
            locks: self.locks,
        };
        self.unmark_own(&own, &perms)?;
        perms.replay()?;
        let rests: Vec<Rest> = remains
            .into_iter()
            .map(|some| some.give_up(&perms))
            .collect::<Result<_>>()?;
        for path in &populated {
            let opened = fd::open_beneath(self.root, path, OFlags::PATH | OFlags::DIRECTORY).on(
                "open",
                Side::Dst,
                path,
            )?;
            perms
                .take_mark_alone(opened.as_fd())
                .on("removexattr", Side::Dst, path)?;
        }
        native::remove_index(self.control.dir.as_fd(), self.mark)?;
        fd::syncfs(self.root).on("syncfs", Side::Dst, ".")?;
        fault::point("finish-synced");
        // Before the flags: +i would keep the anchors' names.
        control::empty_dir(self.control.links.as_fd(), ".mirrorfs/links")?;
        fault::point("finish-links");
        let root_flags = self.set_late_flags()?;
        fault::point("finish-flags");
        control::remove(self.root, self.control)?;
        fault::point("finish-control");
        if root_flags != 0 {
            self.add_flags(self.root, root_flags)?;
        }
        fd::syncfs(self.root).on("syncfs", Side::Dst, ".")?;
        Ok(rests)
    }

    /// Users' own files that the walker did not come to.
    fn unmark_own(&self, own: &[RelPath], perms: &Perms<'_>) -> Result<()> {
        for path in own {
            let opened = fd::open_beneath(self.root, path, OFlags::PATH | OFlags::NOFOLLOW);
            let opened = opened.on("open", Side::Dst, path)?;
            let removed = perms.take_mark_alone(opened.as_fd());
            removed.on("removexattr", Side::Dst, path)?;
        }
        Ok(())
    }

    /// What is pending and in the ledger was accepted as lost: it must not stay as a file of zeros.
    /// What is pending and not in the ledger is still to come.
    fn give_up(&self, pending: Vec<(RelPath, FileType)>, entries: &[LedgerEntry]) -> Result<()> {
        let left: Vec<_> = pending
            .iter()
            .filter(|(path, _)| !is_lost(entries, path))
            .collect();
        if let Some((first, _)) = left.first() {
            return Err(Error::Unusable(format!(
                "{} entries are still pending, \"{}\" among them",
                left.len(),
                crate::error::Printable(first.as_ref().as_os_str()),
            )));
        }
        // Deepest first: a lost directory holds nothing but what was lost.
        for (path, kind) in pending.iter().rev() {
            let Some((parent, name)) = path.split_last() else {
                continue;
            };
            let opened = fd::open_beneath(self.root, &parent, OFlags::PATH | OFlags::DIRECTORY)
                .on("open", Side::Dst, &parent)?;
            let flags = match kind {
                FileType::Directory => AtFlags::REMOVEDIR,
                _ => AtFlags::empty(),
            };
            if *kind == FileType::RegularFile && !self.is_still_lost(path)? {
                continue;
            }
            tracing::warn!("lost, as accepted: {path:?}");
            rustix::fs::unlinkat(&opened, name.as_cstr(), flags).on("unlink", Side::Dst, path)?;
        }
        Ok(())
    }

    /// Nothing of it has come, and nobody has changed it, since it was looked at.
    fn is_still_lost(&self, path: &RelPath) -> Result<bool> {
        let opened = match fd::open_beneath(self.root, path, OFlags::PATH | OFlags::NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            other => other.on("open", Side::Dst, path)?,
        };
        let mark = self.mark.get(Target::Fd(opened.as_fd()));
        let Some(mark) = mark.on("getxattr", Side::Dst, path)? else {
            return Ok(false);
        };
        if mark.mixed.is_some() && mark.salvage.is_none() {
            return Err(changed(1, path));
        }
        let stat = stat::stat_fd(opened.as_fd()).on("statx", Side::Dst, path)?;
        self.removed.borrow_mut().insert(stat.key.ino);
        Ok(true)
    }

    /// Sets +i and +a; the root's come back: they would keep the control directory.
    fn set_late_flags(&self) -> Result<u32> {
        let at = ".mirrorfs/flags";
        let root_ino = stat::stat_fd(self.root)
            .on("statx", Side::Dst, ".")?
            .key
            .ino;
        let mut root_flags = 0;
        for entry in dir::list(self.control.flags.as_fd()).on("getdents64", Side::Dst, at)? {
            let Some((late, handle)) = parse_flags(&entry.name) else {
                continue;
            };
            let opened = match handle.open(self.root, OFlags::RDONLY | OFlags::NONBLOCK) {
                Ok(opened) => opened,
                // Deleted by a user.
                Err(Errno::STALE | Errno::NOENT) => continue,
                Err(e) => return Err(e).on("open_by_handle_at", Side::Dst, at),
            };
            let ino = stat::stat_fd(opened.as_fd())
                .on("statx", Side::Dst, at)?
                .key
                .ino;
            match ino == root_ino {
                true => root_flags = late,
                false => self.add_flags(opened.as_fd(), late)?,
            }
        }
        Ok(root_flags)
    }

    fn add_flags(&self, opened: BorrowedFd<'_>, late: u32) -> Result<()> {
        let at = ".mirrorfs/flags";
        let now = copy::inode_flags(opened).on("FS_IOC_GETFLAGS", Side::Dst, at)?;
        match copy::set_inode_flags(opened, now.unwrap_or(0) | late) {
            // Flags are kept where both file systems know them.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => Ok(()),
            Err(e) => Err(e).on("FS_IOC_SETFLAGS", Side::Dst, at),
        }
    }
}

fn changed(files: usize, first: &RelPath) -> Error {
    Error::Unusable(format!(
        "{files} files that users have changed are not whole, \"{}\" among them: what SRC cannot give of \
         them can be written over, or the file deleted; nobody else gives them up",
        crate::error::Printable(first.as_ref().as_os_str()),
    ))
}

/// The ledger has the data of a path of src.
fn is_lost(entries: &[LedgerEntry], path: &RelPath) -> bool {
    let shown = crate::error::Printable(path.as_ref().as_os_str()).to_string();
    entries.iter().any(|e| e.data && e.path == shown)
}

fn parse_flags(name: &Name) -> Option<(u32, Handle)> {
    let text = std::str::from_utf8(name.as_bytes()).ok()?;
    let (flags, handle) = text.split_once('-')?;
    Some((
        u32::from_str_radix(flags, 16).ok()?,
        Handle::from_text(handle)?,
    ))
}

struct Found {
    path: RelPath,
    kind: FileType,
    mark: Mark,
    size: u64,
}

/// Looks at every inode below a dst root, on all CPUs; calls `each` for what carries a mark, on this
/// thread, parents before what is in them.
fn scan(
    root: BorrowedFd<'_>,
    mark: MarkName,
    each: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    if let Some(found) = mark.get(Target::Fd(root)).on("getxattr", Side::Dst, ".")? {
        each(Found {
            path: RelPath::root(),
            kind: FileType::Directory,
            mark: found,
            size: 0,
        })?;
    }
    let stop = AtomicBool::new(false);
    let mut result = Ok(());
    let threads = host::cpus().len();
    Crew::run(
        vec![RelPath::root()],
        &stop,
        || threads,
        || (),
        |crew: &Crew<'_, RelPath, Result<Found>>, (), path| {
            if let Err(e) = scan_dir(root, mark, crew, &path) {
                crew.tell(Err(e));
            }
        },
        |found| {
            if let Err(e) = found.and_then(&mut *each) {
                stop.store(true, Ordering::Relaxed);
                result = Err(e);
            }
        },
    );
    result
}

/// One directory: tells what carries a mark in it, and hands on its subdirectories.
fn scan_dir(
    root: BorrowedFd<'_>,
    mark: MarkName,
    crew: &Crew<'_, RelPath, Result<Found>>,
    path: &RelPath,
) -> Result<()> {
    let opened = match fd::open_beneath(root, path, OFlags::RDONLY | OFlags::DIRECTORY) {
        // What carries a mark can be read by whoever set it (perms.rs), and below a directory
        // without one nothing is pending (I2).
        Err(Errno::ACCESS) if mark == MarkName::User => return Ok(()),
        other => other.on("open", Side::Dst, path)?,
    };
    for entry in dir::list(opened.as_fd()).on("getdents64", Side::Dst, path)? {
        if path.is_root() && entry.name.as_bytes() == CONTROL.as_bytes() {
            continue;
        }
        let mut kind = entry.kind;
        if kind == FileType::Unknown {
            let stat = stat::stat_at(opened.as_fd(), entry.name.as_cstr());
            kind = stat.on("statx", Side::Dst, path.join(&entry.name))?.kind();
        }
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            continue;
        }
        let found = match mark.get(Target::At(opened.as_fd(), &entry.name)) {
            // Deleted meanwhile.
            Err(Errno::NOENT) => continue,
            other => other.on("getxattr", Side::Dst, path.join(&entry.name))?,
        };
        if let Some(found) = found {
            let stat = stat::stat_at(opened.as_fd(), entry.name.as_cstr());
            crew.tell(Ok(Found {
                path: path.join(&entry.name),
                kind,
                mark: found,
                size: stat.map_or(0, |s| s.size),
            }));
        }
        if kind == FileType::Directory {
            crew.push([path.join(&entry.name)]);
        }
    }
    Ok(())
}

fn mark_of(identity: &Identity) -> MarkName {
    if identity.rootless {
        MarkName::User
    } else {
        MarkName::Trusted
    }
}

fn open_root(dst: &Path) -> Result<OwnedFd> {
    host::open_dir(dst)
        .map_err(|errno| Error::Unusable(format!("DST \"{}\": open: {errno}", dst.display())))
}
