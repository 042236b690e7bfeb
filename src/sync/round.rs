//! Round: what the shards of one copy have in common, in dst: `.mirrorfs/shards/`.
//!
//! A round begins with the first shard that starts, and is over when each has ended since:
//!
//!   (absent) -> round     begin()  `.mirrorfs/shards/` is made; this shard's K.done goes. If the shard is
//!                                  at work already that process goes on, and this one ends
//!   round    -> round     end()    this shard's K.done is made
//!   round    -> (absent)  end()    every K.done is there: anchors and all go, root's times stay
//!
//! While a shard works, its own K.done is missing: so nobody ends the round under it. A run without
//! `--shard` that has looked at everything ends a round that was given up.
//!
//! | name | content |
//! | --- | --- |
//! | `N/K.done` | shard K of N has ended since the round began: `whole`, or `partial` with errors |
//! | `N/K.run` | flock(2)ed while shard K works |
//! | `N/K.sync` | its record (`record`) |
//! | `links/` | anchors of hard links (`anchor`) |

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::record::{self, End};
use super::stamp;
use crate::config::Shard;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{self, CONTROL_DIR, SHARDS_DIR};
use crate::meta::LATE_FLAGS;
use crate::sys::name::{Name, RelPath};
use crate::sys::{copy, dir as sys_dir, fault, fd, host, local};

/// Where anchors are, in the round's directory.
const LINKS: &str = "links";

/// The round's directories in dst, open.
pub(super) struct Round {
    shard: Shard,
    /// `.mirrorfs`.
    control: OwnedFd,
    /// `.mirrorfs/shards`.
    shards: OwnedFd,
    /// `.mirrorfs/shards/N`.
    pub(super) own: OwnedFd,
    /// `.mirrorfs/shards/links`.
    pub(super) links: OwnedFd,
    /// `K.run`, flock(2)ed while this process works.
    running: Mutex<Option<OwnedFd>>,
}

impl Round {
    /// Joins the round, or begins it.
    pub(super) fn begin(root: BorrowedFd<'_>, shard: Shard) -> Result<Round> {
        // Once more when others have just ended the round that we were about to join.
        for _ in 0..100 {
            match Round::join(root, shard) {
                Ok(Some(round)) => return Ok(round),
                Ok(None) | Err(Errno::NOENT) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::Unusable(format!(
                        "shard {shard} is at work already, here or on another machine: that one goes on"
                    )));
                }
                Err(e) => return Err(e).on("mkdirat", Side::Dst, path()),
            }
        }
        Err(Errno::AGAIN).on("mkdirat", Side::Dst, path())
    }

    fn join(root: BorrowedFd<'_>, shard: Shard) -> Result<Option<Round>, Errno> {
        let control = match open_dir(root, CONTROL_DIR) {
            Err(Errno::NOENT) => {
                // Its owner may have ended: its times, +i and +a stay.
                record::at_root(root, || make_dir(root, CONTROL_DIR).map(drop))?;
                open_dir(root, CONTROL_DIR)?
            }
            other => other?,
        };
        let shards = make_dir(control.as_fd(), SHARDS_DIR)?;
        let own = make_dir(shards.as_fd(), &shard.count().to_string())?;
        // In this order: whoever ends this shard now sees that it has begun again, or its K.done goes.
        let running = lock_run(own.as_fd(), shard)?;
        ignore_missing(rustix::fs::unlinkat(
            &own,
            done(shard.number()),
            AtFlags::empty(),
        ))?;
        let links = make_dir(shards.as_fd(), LINKS)?;
        let round = Round {
            shard,
            control,
            shards,
            own,
            links,
            running: Mutex::new(Some(running)),
        };
        let joined = round.is_current()?
            && [&round.own, &round.links]
                .iter()
                .all(|d| rustix::fs::fstat(d).is_ok_and(|s| s.st_nlink > 0));
        Ok(joined.then_some(round))
    }

    /// Nobody has taken the round away.
    fn is_current(&self) -> Result<bool, Errno> {
        let there = rustix::fs::statat(&self.control, SHARDS_DIR, AtFlags::SYMLINK_NOFOLLOW);
        let Some(there) = absent(there)? else {
            return Ok(false);
        };
        let ours = rustix::fs::fstat(&self.shards)?;
        Ok((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino))
    }

    /// The name of this shard's record.
    pub(super) fn record(&self) -> String {
        format!("{}.sync", self.shard.number())
    }

    /// Makes the round's directories durable, up to the root.
    pub(super) fn sync_dirs(&self, root: BorrowedFd<'_>) -> Result<(), Errno> {
        for dir in [
            self.own.as_fd(),
            self.shards.as_fd(),
            self.control.as_fd(),
            root,
        ] {
            fd::fsync(dir)?;
        }
        Ok(())
    }

    /// This shard has seen all of its directories. Ends the round if it is the last one; returns the
    /// shards that are still to come.
    pub(super) fn end(&self, root: BorrowedFd<'_>, end: End) -> Result<Vec<u32>> {
        let ended = match self.ended(root, end) {
            // The last shard, which ends at the same moment, has taken it away under us.
            Err(Errno::NOENT) => self.is_current().and_then(|current| match current {
                true => Err(Errno::NOENT),
                false => Ok(Vec::new()),
            }),
            Ok(left) if !left.is_empty() => self
                .is_current()
                .map(|current| if current { left } else { Vec::new() }),
            other => other,
        };
        ended.on("unlinkat", Side::Dst, path())
    }

    fn ended(&self, root: BorrowedFd<'_>, end: End) -> Result<Vec<u32>, Errno> {
        let name = run(self.shard.number());
        ignore_missing(rustix::fs::unlinkat(&self.own, name, AtFlags::empty()))?;
        // NFS keeps another name of what is open.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        drop(running.take());
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW;
        let flags = flags | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&self.own, done(self.shard.number()), flags, mode)?;
        let whole = end.whole && end.durable;
        let text: &[u8] = if whole { b"whole\n" } else { b"partial\n" };
        fd::pwrite_all(file.as_fd(), text, 0)?;
        drop(file);
        let again = run(self.shard.number());
        if absent(rustix::fs::statat(
            &self.own,
            &again,
            AtFlags::SYMLINK_NOFOLLOW,
        ))?
        .is_some()
        {
            // Another process has begun this shard since its lock went: it is not over.
            let taken =
                rustix::fs::unlinkat(&self.own, done(self.shard.number()), AtFlags::empty());
            ignore_missing(taken)?;
            return self.missing(self.own.as_fd());
        }
        fault::point("shard-ended");
        let left = self.missing(self.own.as_fd())?;
        if !left.is_empty() {
            return Ok(left);
        }
        let all_whole = self.all_whole()?;
        if !all_whole && has_records(self.shards.as_fd())? {
            return Ok(left); // Some bytes are still doubted: the next round looks at them.
        }
        take_away(root, self.control.as_fd(), |old| {
            // Whoever has started meanwhile took his mark away first, and goes on in what we moved.
            let own = open_dir(old, &self.shard.count().to_string())?;
            Ok(self.missing(own.as_fd())?.is_empty())
        })?;
        if all_whole {
            record::forget(root)?;
        }
        Ok(left)
    }

    fn missing(&self, own: BorrowedFd<'_>) -> Result<Vec<u32>, Errno> {
        let mut left = Vec::new();
        for number in 1..=self.shard.count() {
            match rustix::fs::statat(own, done(number), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => {}
                Err(Errno::NOENT) => left.push(number),
                Err(e) => return Err(e),
            }
        }
        Ok(left)
    }

    fn all_whole(&self) -> Result<bool, Errno> {
        for number in 1..=self.shard.count() {
            let name = Name::new(done(number).as_bytes()).ok_or(Errno::INVAL)?;
            let file = fd::open_at(self.own.as_fd(), &name, OFlags::RDONLY)?;
            let mut text = [0; 16];
            let len = fd::pread_all(file.as_fd(), &mut text, 0)?;
            if &text[..len] != b"whole\n" {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Records of other runs than `round`'s: files that say that a run began, and is not durable yet.
pub(super) fn records(root: BorrowedFd<'_>, round: Option<&Round>) -> Result<Vec<OwnedFd>, Errno> {
    let mut all = Vec::new();
    if round.is_some() {
        match fd::open_beneath(root, &record::path(), OFlags::RDONLY) {
            Ok(file) => all.push(file),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
    }
    let Some(shards) = absent(open_path(root))? else {
        return Ok(all);
    };
    let siblings = round.map(|r| r.shard.count().to_string());
    for count in sys_dir::list(shards.as_fd())? {
        let theirs = siblings.as_deref().map(str::as_bytes) == Some(count.name.as_bytes());
        if theirs || count.kind != FileType::Directory || count.name.as_bytes() == LINKS.as_bytes()
        {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let Some(dir) = absent(fd::open_at(shards.as_fd(), &count.name, flags))? else {
            continue;
        };
        for entry in sys_dir::list(dir.as_fd())? {
            if entry.name.as_bytes().ends_with(b".sync")
                && let Some(file) = absent(fd::open_at(dir.as_fd(), &entry.name, OFlags::RDONLY))?
            {
                all.push(file);
            }
        }
    }
    Ok(all)
}

/// A run without shards that has looked at everything ends a round that nobody works on any more.
pub(super) fn give_up(root: BorrowedFd<'_>) -> Result<()> {
    let gone = || {
        let Some(control) = absent(open_dir(root, CONTROL_DIR))? else {
            return Ok(());
        };
        match absent(open_path(root))? {
            Some(shards) if is_running(shards.as_fd())? => Ok(()),
            Some(_) => take_away(root, control.as_fd(), |_| Ok(true)),
            None => remove_moved(root, control.as_fd()),
        }
    };
    gone().on("unlinkat", Side::Dst, path())
}

/// Takes the round's directory away, and then all that is in it, if `still` says so of the moved one.
fn take_away(
    root: BorrowedFd<'_>,
    control: BorrowedFd<'_>,
    still: impl FnOnce(BorrowedFd<'_>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    let old = format!("{SHARDS_DIR}-{}", local::run_id());
    match rustix::fs::renameat(control, SHARDS_DIR, control, &old) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(()), // Another one was as fast.
        Err(e) => return Err(e),
    }
    fault::point("shard-moved");
    let dir = open_dir(control, &old)?;
    if !still(dir.as_fd())? {
        return rustix::fs::renameat(control, &old, control, SHARDS_DIR);
    }
    remove_moved(root, control)
}

/// Removes what was moved away, also by others who were killed then.
fn remove_moved(root: BorrowedFd<'_>, control: BorrowedFd<'_>) -> Result<(), Errno> {
    let moved = format!("{SHARDS_DIR}-");
    let mut found = false;
    for entry in sys_dir::list(control)? {
        if entry.name.as_bytes().starts_with(moved.as_bytes()) {
            remove_round(control, &entry.name)?;
            found = true;
        }
    }
    match found {
        true => record::at_root(root, || record::remove_control(root)),
        false => Ok(()),
    }
}

/// Removes two levels of directories; somebody else may do the same.
fn remove_round(control: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    let Some(top) = absent(fd::open_at(
        control,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY,
    ))?
    else {
        return Ok(());
    };
    for entry in sys_dir::list(top.as_fd())? {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let Some(dir) = absent(fd::open_at(top.as_fd(), &entry.name, flags))? else {
            continue;
        };
        // Once more where a shard that was about to join has just made a name: it looks again, and joins another.
        for attempt in 0..10 {
            for file in sys_dir::list(dir.as_fd())? {
                unlink_anchor(dir.as_fd(), &file.name, file.kind)?;
            }
            let gone = rustix::fs::unlinkat(&top, entry.name.as_cstr(), AtFlags::REMOVEDIR);
            match ignore_missing(gone) {
                Err(Errno::NOTEMPTY) if attempt < 9 => {}
                other => {
                    other?;
                    break;
                }
            }
        }
    }
    ignore_missing(rustix::fs::unlinkat(
        control,
        name.as_cstr(),
        AtFlags::REMOVEDIR,
    ))
}

/// Removes a name of an inode that may have +i or +a: they stay.
pub(super) fn unlink_anchor(dir: BorrowedFd<'_>, name: &Name, kind: FileType) -> Result<(), Errno> {
    let unlink = || ignore_missing(rustix::fs::unlinkat(dir, name.as_cstr(), AtFlags::empty()));
    match unlink() {
        Err(Errno::PERM) if kind == FileType::RegularFile => {
            let file = fd::open_at(dir, name, OFlags::RDONLY | OFlags::NONBLOCK)?;
            let flags = copy::inode_flags(file.as_fd())?.unwrap_or(0) & LATE_FLAGS;
            stamp::clear_flags(file.as_fd(), flags)?;
            let gone = unlink();
            stamp::add_flags(file.as_fd(), flags)?;
            gone
        }
        other => other,
    }
}

fn is_running(shards: BorrowedFd<'_>) -> Result<bool, Errno> {
    any_file(shards, |dir, name| {
        if !name.as_bytes().ends_with(b".run") {
            return Ok(false);
        }
        let open = record::open_to_lock(|flags| fd::open_at(dir, name, flags));
        let Some(file) = absent(open)? else {
            return Ok(false);
        };
        Ok(matches!(
            host::try_lock(file.as_fd()),
            Err(Errno::WOULDBLOCK)
        ))
    })
}

fn has_records(shards: BorrowedFd<'_>) -> Result<bool, Errno> {
    any_file(shards, |_, name| Ok(name.as_bytes().ends_with(b".sync")))
}

/// True when `is` says so of one file of one shard, of whatever number of shards.
fn any_file(
    shards: BorrowedFd<'_>,
    is: impl Fn(BorrowedFd<'_>, &Name) -> Result<bool, Errno>,
) -> Result<bool, Errno> {
    for count in sys_dir::list(shards)? {
        if count.name.as_bytes() == LINKS.as_bytes() {
            continue;
        }
        let Some(dir) = absent(fd::open_at(shards, &count.name, OFlags::RDONLY))? else {
            continue;
        };
        for entry in sys_dir::list(dir.as_fd())? {
            if is(dir.as_fd(), &entry.name)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// How long the lock of a process that has just ended is waited for: a server may be slow to hear of it.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Says that this shard is at work. EWOULDBLOCK: it is already. Where a file system knows no locks nobody can
/// say that.
fn lock_run(own: BorrowedFd<'_>, shard: Shard) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let since = Instant::now();
    loop {
        let name = run(shard.number());
        let running = rustix::fs::openat(own, name, flags, Mode::RUSR | Mode::WUSR)?;
        match host::try_lock_if_any(running.as_fd()) {
            Ok(()) if rustix::fs::fstat(&running)?.st_nlink > 0 => return Ok(running),
            // Its name has gone with who held it, perhaps with the whole round.
            Ok(()) => return Err(Errno::NOENT),
            Err(Errno::WOULDBLOCK) if since.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_WAIT / 20);
            }
            Err(e) => return Err(e),
        }
    }
}

fn run(number: u32) -> String {
    format!("{number}.run")
}

fn done(number: u32) -> String {
    format!("{number}.done")
}

/// `.mirrorfs/shards`.
pub(super) fn path() -> RelPath {
    mark::in_control(SHARDS_DIR)
}

/// `.mirrorfs/shards/links`.
pub(super) fn links_path() -> RelPath {
    let name = Name::new(LINKS.as_bytes()).unwrap_or_else(|| unreachable!("a valid name"));
    path().join(&name)
}

fn open_path(root: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    fd::open_beneath(root, &path(), OFlags::RDONLY | OFlags::DIRECTORY)
}

fn open_dir(at: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let name = Name::new(name.as_bytes()).ok_or(Errno::INVAL)?;
    fd::open_at(at, &name, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// A directory for the owner alone, made where it is missing.
fn make_dir(at: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let mut made = rustix::fs::mkdirat(at, name, Mode::RWXU);
    if made == Err(Errno::PERM) && name == CONTROL_DIR {
        // +i and +a of the root: its owner sets them again.
        stamp::clear_flags(at, LATE_FLAGS)?;
        made = rustix::fs::mkdirat(at, name, Mode::RWXU);
    }
    match made {
        Ok(()) | Err(Errno::EXIST) => open_dir(at, name),
        Err(e) => Err(e),
    }
}

fn ignore_missing(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn absent<T>(result: Result<T, Errno>) -> Result<Option<T>, Errno> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}
