//! Record: `.mirrorfs/sync` in dst, which says that a run has begun and is not durable yet.
//!
//!   (absent) -> here      begin()  before the first file is made: no file can be durable without it
//!   here     -> (absent)  end()    everything that was written is durable
//!   here     -> here      end()    not so, or a copy that had to be compared was not
//!
//! The quick check (size and mtime) may be deceived by a power cut: a file system may have kept a
//! file's size and times and not its bytes, however they were written (on ext4 also those of one
//! small write). So a run that finds the record of another boot or mount compares every file that
//! has changed since byte by byte. A record of the same boot and mount is of a run that was killed:
//! what it wrote is in the page cache, and only becomes durable together with ours.
//!
//! A run that was killed may have left a part of a file under its own name (`Dir::is_ours`), with the
//! time of the copy. The quick check sees that; who asked for another look (`-u`, `--ignore-existing`,
//! `--size-only`) would not. While there is a record such a look asks `may_be_part` first. Where there
//! can be no record files get their names when they are complete.
//!
//! This costs nothing for each file; to write out and wait for one would cost more than its copy.
//! The record is made before the files in the same journal, and synced itself; so it is never later
//! than they are. Where this run can have none (dst's root is not writable for us, or another run is
//! at work and holds a lock on its own) each file is synced before it gets its times.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::round::{self, Round};
use super::stamp;
use crate::error::{Context, Result, Side};
use crate::mark::{self, CONTROL_DIR, SYNC_RECORD};
use crate::meta;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{Stat, Time, stat_fd};
use crate::sys::{fd, host, stat};

/// Clocks are set back by small steps: what is this much older than the record is doubted too.
const MARGIN_S: i64 = 60;

/// The record of one dst.
pub(super) struct Record {
    /// This boot and this mount of dst; `None`: the kernel does not tell, so nobody is trusted.
    ours: Option<String>,
    /// What changed since then may have lost its bytes.
    doubt: Option<Time>,
    /// What changed since then a run that did not end may have left half done.
    left: Option<Time>,
    /// An earlier run has left it.
    found: bool,
    state: Mutex<State>,
    /// A shard's own record is in the round's directory, under this name.
    shard: Option<(OwnedFd, String)>,
    /// The record, flock(2)ed: it is this run's to take away.
    held: Mutex<Option<OwnedFd>>,
    /// The state is not `Absent` any more.
    begun: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Here,
    /// dst's root does not take it, or another run is at work and will take it away.
    Refused,
}

/// How a run ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    /// All that was written is durable.
    pub(super) durable: bool,
    /// Nobody asked for that (`--fsync never`).
    pub(super) carefree: bool,
    /// Every file of src was looked at.
    pub(super) judged: bool,
    /// Every file of src was compared or copied.
    pub(super) whole: bool,
}

impl Record {
    /// Looks for what an earlier run has left in dst.
    pub(super) fn look(root: BorrowedFd<'_>, round: Option<&Round>) -> Result<Record> {
        let ours = host::boot_id()
            .zip(stat::unique_mount(root))
            .map(|(boot, mount)| format!("{boot} {mount}\n"));
        let mut record = Record {
            ours,
            doubt: None,
            left: None,
            found: false,
            state: Mutex::new(State::Absent),
            shard: None,
            held: Mutex::default(),
            begun: AtomicBool::new(false),
        };
        let path = path();
        if let Some(round) = round {
            let own = host::dup(round.own.as_fd()).on("dup", Side::Dst, &path)?;
            record.shard = Some((own, round.record()));
        }
        let others = round::records(root, round).on("openat", Side::Dst, &path)?;
        for file in others {
            record.doubt_since(&file)?;
        }
        let file = match open_to_lock(|flags| record.open(root, flags)) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(record),
            Err(e) => return Err(e).on("openat2", Side::Dst, &path),
        };
        let before = (record.doubt, record.left);
        record.doubt_since(&file)?;
        let ours = host::try_lock_if_any(file.as_fd()).is_ok();
        if ours && stat_fd(file.as_fd()).on("statx", Side::Dst, &path)?.nlink == 0 {
            // Whoever was at work has just ended.
            (record.doubt, record.left) = before;
            return Ok(record);
        }
        record.found = true;
        record.state = Mutex::new(if ours { State::Here } else { State::Refused });
        record.held = Mutex::new(ours.then_some(file));
        record.begun = AtomicBool::new(true);
        Ok(record)
    }

    fn open(&self, root: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        match &self.shard {
            None => fd::open_beneath(root, &path(), flags),
            Some((dir, name)) => {
                let name = Name::new(name.as_bytes()).ok_or(Errno::INVAL)?;
                fd::open_at(dir.as_fd(), &name, flags)
            }
        }
    }

    /// Doubts what has changed since a record was made; its bytes, unless that was in this boot and mount.
    fn doubt_since(&mut self, record: &OwnedFd) -> Result<()> {
        let path = path();
        let since = beginning(&stat_fd(record.as_fd()).on("statx", Side::Dst, &path)?);
        let earliest = |was: Option<Time>| Some(was.map_or(since, |earlier| earlier.min(since)));
        self.left = earliest(self.left);
        let mut text = [0; 256];
        let len = fd::pread_all(record.as_fd(), &mut text, 0).on("read", Side::Dst, &path)?;
        if self.ours.as_deref().map(str::as_bytes) != Some(&text[..len]) {
            self.doubt = earliest(self.doubt);
        }
        Ok(())
    }

    /// True for a dst file whose bytes may be lost, whatever its size and times say.
    pub(super) fn doubts(&self, file: &Stat) -> bool {
        self.doubt.is_some_and(|since| file.ctime >= since)
    }

    /// True for a dst inode that a run which did not end may have left half done: it has not got src's
    /// times, which come last, nor lost them to a change after that (then its access time is older
    /// than itself).
    pub(super) fn may_be_part(&self, now: &Stat, src: &Stat) -> bool {
        let stamped = now.mtime == src.mtime || now.atime < now.btime;
        !stamped && self.left.is_some_and(|since| now.ctime >= since)
    }

    /// Before the first entry: from here on a cut leaves the record. False: dst does not take it.
    pub(super) fn begin(
        &self,
        root: BorrowedFd<'_>,
        round: Option<&Round>,
        sync: bool,
    ) -> Result<bool> {
        // Every entry that is made comes here; only the first waits for the disk, and those who come meanwhile.
        let mut state = match self.begun.load(Acquire) {
            true => return Ok(*self.lock() != State::Refused),
            false => self.lock(),
        };
        if *state == State::Absent {
            let made = match round {
                None => at_root(root, || self.make(root, sync)),
                Some(round) => {
                    let at = (round.own.as_fd(), &*round.record());
                    self.write(at, sync, || round.sync_dirs(root))
                }
            };
            *state = match made {
                Ok(()) => State::Here,
                Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NAMETOOLONG) => {
                    State::Refused
                }
                // Another run has begun meanwhile.
                Err(Errno::EXIST | Errno::WOULDBLOCK) => State::Refused,
                Err(e) => return Err(e).on("making", Side::Dst, path()),
            };
            self.begun.store(true, Release);
        }
        Ok(*state != State::Refused)
    }

    fn make(&self, root: BorrowedFd<'_>, sync: bool) -> Result<(), Errno> {
        match rustix::fs::mkdirat(root, CONTROL_DIR, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        let name = format!("{CONTROL_DIR}/{SYNC_RECORD}");
        self.write((root, &name), sync, || {
            let control = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fd::fsync(rustix::fs::openat(root, CONTROL_DIR, control, Mode::empty())?.as_fd())?;
            fd::fsync(root)
        })
    }

    /// `sync_dirs` makes the record's name durable.
    fn write(
        &self,
        (dir, name): (BorrowedFd<'_>, &str),
        sync: bool,
        sync_dirs: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
        host::try_lock_if_any(file.as_fd())?;
        let text = self.ours.as_deref().unwrap_or("").as_bytes();
        fd::pwrite_all(file.as_fd(), text, 0)?;
        if sync {
            fd::fsync(file.as_fd())?;
            sync_dirs()?;
        }
        *self.held() = Some(file);
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root's times are not to be set while this lives: `begin` keeps them over what it does.
    pub(super) fn still(&self) -> impl Sized + '_ {
        self.lock()
    }

    /// After the run: takes the record away if nothing has to be doubted any more.
    pub(super) fn end(&self, root: BorrowedFd<'_>, end: End) -> Result<()> {
        if *self.lock() != State::Here {
            return Ok(());
        }
        if !end.durable && !end.carefree {
            // Writing out failed, and the kernel says so only once: nobody may trust what is
            // cached either. An empty record is nobody's own.
            let file = self.open(root, OFlags::WRONLY);
            let emptied = file.and_then(|f| rustix::fs::ftruncate(f, 0));
            return emptied.on("ftruncate", Side::Dst, path());
        }
        let settled = self.left.is_none() || end.judged && (self.doubt.is_none() || end.whole);
        if !settled || (end.carefree && self.found) {
            return Ok(());
        }
        if let Some((dir, name)) = &self.shard {
            let gone = rustix::fs::unlinkat(dir, name, AtFlags::empty());
            // Not before: who has the lock must find the name, or none. Then: NFS keeps another name
            // of what is open.
            drop(self.held().take());
            return gone.on("unlinkat", Side::Dst, path());
        }
        let gone = remove(root, || self.held().take());
        gone.on("unlinkat", Side::Dst, path())?;
        match end.carefree {
            true => Ok(()),
            false => fd::fsync(root).on("fsync", Side::Dst, path()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the record away; `held` gives up what is open of it. The directory goes unless it also holds
/// what a migration or shards need.
fn remove(root: BorrowedFd<'_>, held: impl FnOnce() -> Option<OwnedFd>) -> Result<(), Errno> {
    at_root(root, || {
        rustix::fs::unlinkat(root, path().as_bytes(), AtFlags::empty())?;
        drop(held());
        remove_control(root)
    })
}

/// The control directory, if it is empty.
pub(super) fn remove_control(root: BorrowedFd<'_>) -> Result<(), Errno> {
    match rustix::fs::unlinkat(root, CONTROL_DIR, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Takes the record of a run without shards away, which every shard has looked after. One that is at
/// work keeps it.
pub(super) fn forget(root: BorrowedFd<'_>) -> Result<(), Errno> {
    let file = match open_to_lock(|flags| fd::open_beneath(root, &path(), flags)) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    match host::try_lock_if_any(file.as_fd()) {
        Err(Errno::WOULDBLOCK) => return Ok(()),
        other => other?,
    }
    match stat_fd(file.as_fd())?.nlink {
        0 => Ok(()),
        _ => remove(root, || Some(file)),
    }
}

/// For writing, as locks of NFS want it, or where that may not be for reading.
pub(super) fn open_to_lock(
    open: impl Fn(OFlags) -> Result<OwnedFd, Errno>,
) -> Result<OwnedFd, Errno> {
    match open(OFlags::RDWR) {
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => open(OFlags::RDONLY),
        other => other,
    }
}

/// When the run that left a record began: its clock is dst's, like that of the files.
fn beginning(record: &Stat) -> Time {
    let mut first = record.mtime.min(record.ctime);
    if record.btime != Time::default() {
        first = first.min(record.btime);
    }
    first.sec -= MARGIN_S;
    first
}

/// The record of a run that copies all of a tree.
pub(super) fn path() -> RelPath {
    mark::in_control(SYNC_RECORD)
}

/// Changes names in dst's root so that nothing is seen of it after: its times stay, and +i and +a,
/// which would forbid it.
pub(super) fn at_root(
    root: BorrowedFd<'_>,
    change: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    let before = stat_fd(root)?;
    let flags = before.late_flags();
    if flags != 0 {
        stamp::clear_flags(root, flags)?;
    }
    change()?;
    match meta::set_times_fd(root, before.atime, before.mtime) {
        // Not the owner: then its times move, as with every name that is made in it.
        Ok(()) | Err(Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    match flags {
        0 => Ok(()),
        flags => stamp::add_flags(root, flags),
    }
}
