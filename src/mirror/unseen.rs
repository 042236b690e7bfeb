//! Unseen: names that src lists, and of which it does not say what they are: a bad inode, a server that has
//! lost an entry. One such name must not keep a whole directory from being used.
//!
//!   stand_in()  in a directory that is P the name gets a stand-in, an empty file whose mark says so: all
//!               names are here then, and the directory can be published
//!   reveal()    src is asked again. What it has is made aside, in `.mirrorfs/unseen`, and changes places
//!               with the stand-in in one step (RENAME_EXCHANGE): after a crash one of them is there
//!
//! Nobody is given a stand-in's inode: a look at its name asks src, and is EIO while that says nothing. So
//! nobody makes, moves, replaces or removes anything under the name (`changing_name` for those who have
//! looked before), and the directory is not empty. Its mark keeps the directory and those above it from
//! being done, and `finish` from ending. Only where dst has nothing under the name: what an earlier copy
//! has there may be all that is left of it, and the directory stays P.
//!
//! `.mirrorfs/unseen/INO` is a link to each: a start learns them from it, and no other inode gets the
//! number. `new-INO` is where one is being revealed. Lock order: `moves`, `changing`; the table is a leaf.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::Mirror;
use super::extras;
use super::namespace::Entry as Found;
use super::node::Ino;
use super::outage::{Again, pause_before};
use super::partial::Partial;
use super::place::Placer;
use super::populate::{DirRef, Marked};
use super::source::SrcDir;
use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mark::{Mark, in_control};
use crate::meta;
use crate::sys::dir::{self, Entry};
use crate::sys::name::{Name, RelPath};
use crate::sys::xattr::Target;
use crate::sys::{fault, fd, stat};

/// The directory of their links.
pub(super) const DIR: &str = "unseen";
/// For so long after a failure nobody who looks waits for another try.
const AGAIN: Duration = Duration::from_secs(10);
/// What an entry fails with that is broken for itself. What a whole source fails with is not among them,
/// nor what a whole directory does that we may not search.
const OWN: [Errno; 11] = [
    Errno::NOENT,
    Errno::IO,
    Errno::STALE,
    Errno::UCLEAN, // ext4 and xfs: EFSCORRUPTED
    Errno::BADMSG, // and EFSBADCRC
    Errno::NODATA,
    Errno::REMOTEIO,
    Errno::OVERFLOW,
    Errno::NAMETOOLONG,
    Errno::LOOP,
    Errno::INVAL,
];

/// The stand-ins of dst.
#[derive(Debug, Default)]
pub(super) struct Unseen {
    table: Mutex<HashMap<Ino, Asked>>,
    /// One is not asked for any more.
    free: Condvar,
    /// There has been one while this daemon lives.
    ever: AtomicBool,
    /// Whether dst's file system can exchange two names; found out when it is needed.
    exchanges: OnceLock<bool>,
    /// Held shared by whoever changes a directory of dst for a user, alone for an exchange: it gives
    /// the directory its times back.
    changing: RwLock<()>,
}

/// What was asked of src about one.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    busy: bool,
    failed: Option<Instant>,
}

impl Unseen {
    /// Those that the control directory knows; what a crash left half done goes.
    pub(super) fn load(links: BorrowedFd<'_>) -> Result<Unseen> {
        let at = in_control(DIR);
        let unseen = Unseen::default();
        let mut entries = dir::list(links).on("getdents64", Side::Dst, &at)?;
        // First what may hold a stand-in that has left its place.
        entries.sort_by_key(|e| e.kind != FileType::Directory);
        for entry in entries {
            let path = at.join(&entry.name);
            let stat = stat::stat_at(links, entry.name.as_cstr()).on("statx", Side::Dst, &path)?;
            match stat.is_file() && stat.nlink > 1 {
                true => unseen.add(stat.key.ino),
                false => extras::remove(links, &entry.name, &path)?,
            }
        }
        Ok(unseen)
    }

    fn add(&self, ino: Ino) {
        self.ever.store(true, Ordering::SeqCst);
        self.table.lock().entry(ino).or_default();
    }

    fn contains(&self, ino: Ino) -> bool {
        self.ever.load(Ordering::SeqCst) && self.table.lock().contains_key(&ino)
    }

    /// Nobody has tried.
    pub(super) fn forget_failures(&self) {
        self.table.lock().values_mut().for_each(|a| a.failed = None);
    }

    /// Makes one the caller's to ask for; waits for whoever is at it. `None`: it is none any more.
    fn claim(&self, ino: Ino, at_once: bool) -> Result<Option<Claimed<'_>>, ()> {
        let mut table = self.table.lock();
        loop {
            match table.get_mut(&ino) {
                None => return Ok(None),
                Some(asked) if asked.busy => self.free.wait(&mut table),
                Some(Asked {
                    failed: Some(at), ..
                }) if !at_once && at.elapsed() < AGAIN => return Err(()),
                Some(asked) => {
                    asked.busy = true;
                    return Ok(Some(Claimed { unseen: self, ino }));
                }
            }
        }
    }

    /// To be held by whoever changes a directory for a user.
    pub(super) fn changing(&self) -> RwLockReadGuard<'_, ()> {
        self.changing.read()
    }
}

/// One that the caller asks src for.
struct Claimed<'a> {
    unseen: &'a Unseen,
    ino: Ino,
}

impl Claimed<'_> {
    fn failed(&self) {
        if let Some(asked) = self.unseen.table.lock().get_mut(&self.ino) {
            asked.failed = Some(Instant::now());
        }
    }

    /// It has left its place.
    fn is_gone(&self) {
        self.unseen.table.lock().remove(&self.ino);
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if let Some(asked) = self.unseen.table.lock().get_mut(&self.ino) {
            asked.busy = false;
        }
        self.unseen.free.notify_all();
    }
}

/// What a populate has met of names that src lists and does not show.
pub(super) struct Lost {
    /// How often the directory was tried before.
    attempt: u32,
    /// Listed, and not there.
    gone: Mutex<Vec<Name>>,
    /// They fail, and there is no use in trying the directory again.
    bad: Mutex<Vec<(Name, Error)>>,
}

impl Lost {
    pub(super) fn new(attempt: u32) -> Lost {
        Lost {
            attempt,
            gone: Mutex::default(),
            bad: Mutex::default(),
        }
    }

    pub(super) fn has_gone(&self) -> bool {
        !self.gone.lock().is_empty()
    }

    pub(super) fn note_gone(&self, name: &Name) {
        self.gone.lock().push(name.clone());
    }

    /// The failure of a name; `Err`: it is the directory's, or may pass.
    pub(super) fn note_bad(&self, name: &Name, dir: &RelPath, error: Error) -> Result<()> {
        if !is_own(&error, dir, name) || pause_before(self.attempt, &error).is_some() {
            return Err(error);
        }
        if error.errno() == Errno::NOENT {
            self.note_gone(name); // Between two looks: the next listing tells.
            return Ok(());
        }
        self.bad.lock().push((name.clone(), error));
        Ok(())
    }
}

/// Whether src fails for this name alone.
fn is_own(error: &Error, dir: &RelPath, name: &Name) -> bool {
    match error {
        Error::Call {
            side: Side::Src,
            errno,
            path,
            ..
        } => OWN.contains(errno) && *path == dir.join(name).to_path(),
        _ => false,
    }
}

impl Mirror {
    /// What failed a moment ago is tried again by whoever comes.
    pub fn forget_failures(&self) {
        self.spoiled.forget();
        self.unseen.forget_failures();
    }

    /// Whether a name that is not here, or a listing, may become another without a user.
    pub fn has_unseen(&self) -> bool {
        self.unseen.ever.load(Ordering::SeqCst)
    }

    /// What the kinds of entries of dst are to users: those of stand-ins are not known.
    pub fn unsee(&self, entries: &mut [Entry]) {
        if self.has_unseen() {
            let hidden = |e: &&mut Entry| self.unseen.contains(e.ino);
            let all = entries.iter_mut().filter(hidden);
            all.for_each(|e| e.kind = FileType::Unknown);
        }
    }

    /// Refuses an inode of dst that is a stand-in.
    pub(super) fn check_seen(
        &self,
        ino: Ino,
        mark: Option<&Mark>,
        path: impl FnOnce() -> std::path::PathBuf,
    ) -> Result<()> {
        if mark.is_some_and(|m| m.unseen) {
            self.unseen.add(ino);
        }
        match self.unseen.contains(ino) {
            true => Err(Error::Unseen { path: path() }),
            false => Ok(()),
        }
    }

    /// For who changes what a name of dst is: nobody changes a stand-in's.
    pub(super) fn changing_name(
        &self,
        dir: BorrowedFd<'_>,
        name: &Name,
    ) -> Result<RwLockReadGuard<'_, ()>> {
        let guard = self.unseen.changing();
        let hidden = |s: stat::Stat| self.unseen.contains(s.key.ino);
        match self.has_unseen() && stat::stat_at(dir, name.as_cstr()).is_ok_and(hidden) {
            true => Err(Error::Unseen {
                path: name.as_os_str().into(),
            }),
            false => Ok(guard),
        }
    }

    /// Gives the names that a populate has lost their stand-ins. An error where one cannot have one, or
    /// where src as a whole is the reason; then `attempt` begins anew.
    pub(super) fn stand_in_for(
        &self,
        placer: &Placer<'_>,
        lost: Lost,
        with_gone: bool,
        attempt: &mut u32,
    ) -> Result<()> {
        let (bad, gone) = (lost.bad.into_inner(), lost.gone.into_inner());
        if bad.iter().any(|(_, e)| e.may_pass())
            && let Err(e) = self.source.ask()
        {
            *attempt = 0;
            return Err(e);
        }
        let dir = &placer.src.path;
        let not_there = |name: Name| {
            let error = Error::Call {
                call: "statx",
                side: Side::Src,
                path: dir.join(&name).to_path(),
                errno: Errno::NOENT,
            };
            (name, error)
        };
        let gone = gone.into_iter().filter(|_| with_gone).map(not_there);
        for (name, error) in bad.into_iter().chain(gone) {
            placer.skip();
            let Some(claimed) = placer.partial.claim(&name) else {
                continue; // Somebody has placed it since.
            };
            self.stand_in(placer.dst, dir, &name, error)?;
            claimed.here();
        }
        Ok(())
    }

    /// Gives a name of a P directory that the caller has claimed a stand-in. `Err`: not for this error,
    /// or dst has something under the name, or cannot exchange names later.
    pub(super) fn stand_in(
        &self,
        dst: BorrowedFd<'_>,
        dir: &RelPath,
        name: &Name,
        error: Error,
    ) -> Result<()> {
        if self.native || !is_own(&error, dir, name) || !self.can_exchange() {
            return Err(error);
        }
        let path = dir.join(name);
        match stat::stat_at(dst, name.as_cstr()) {
            Err(Errno::NOENT) => {
                if !self.make_stand_in(dst, name, &path)? {
                    return Err(error);
                }
            }
            // From before a crash.
            Ok(there) if there.is_file() => {
                let file = fd::open_at(dst, name, OFlags::PATH).on("open", Side::Dst, &path)?;
                let mark = self.mark.get(Target::Fd(file.as_fd()));
                if !mark
                    .on("getxattr", Side::Dst, &path)?
                    .is_some_and(|m| m.unseen)
                {
                    return Err(error);
                }
                self.keep_number(file.as_fd(), there.key.ino)?;
            }
            Ok(_) => return Err(error),
            Err(e) => return Err(e).on("statx", Side::Dst, &path),
        }
        self.fail(&path, &error);
        Ok(())
    }

    /// False: dst's directory lies where the control directory cannot link to.
    fn make_stand_in(&self, dst: BorrowedFd<'_>, name: &Name, path: &RelPath) -> Result<bool> {
        let file = fd::tmpfile(dst, 0o600).on("open O_TMPFILE", Side::Dst, path)?;
        let marked = self.mark.set(Target::Open(file.as_fd()), &Mark::unseen());
        marked.on("setxattr", Side::Dst, path)?;
        let stat = stat::stat_fd(file.as_fd()).on("statx", Side::Dst, path)?;
        match self.keep_number(file.as_fd(), stat.key.ino) {
            Err(e) if e.errno() == Errno::XDEV => return Ok(false),
            other => other?,
        }
        fault::point("unseen-linked");
        let linked = fd::link_fd(file.as_fd(), dst, name.as_cstr());
        linked.on("linkat", Side::Dst, path)?;
        fault::point("unseen-placed");
        Ok(true)
    }

    /// Before it has its name: whoever finds it there knows it.
    fn keep_number(&self, file: BorrowedFd<'_>, ino: Ino) -> Result<()> {
        let key = key_of("", ino);
        match fd::link_fd(file, self.control.unseen.as_fd(), key.as_cstr()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).on("linkat", Side::Dst, in_control(DIR)),
        }
        self.unseen.add(ino);
        Ok(())
    }

    fn can_exchange(&self) -> bool {
        let try_it = || {
            let dir = self.control.unseen.as_fd();
            let names: [&CStr; 2] = [c"try-a", c"try-b"];
            for name in names {
                let _ = rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)); // The exchange tells.
            }
            let flags = RenameFlags::EXCHANGE;
            let done = rustix::fs::renameat_with(dir, names[0], dir, names[1], flags);
            for name in names {
                let _ = rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR); // The next start does it.
            }
            if let Err(e) = done {
                tracing::debug!("dst cannot exchange two names: {e}");
            }
            done.is_ok()
        };
        *self.unseen.exchanges.get_or_init(try_it)
    }

    /// Looks up a name that has a stand-in, once src has been asked for it.
    pub(super) fn lookup_revealed(
        self: &Arc<Self>,
        parent: Ino,
        name: Name,
        then: impl FnOnce(Result<Found>) + Send + 'static,
    ) {
        let node = match self.nodes.get(parent) {
            Ok(node) => node,
            Err(errno) => return then(Err(errno).on("lookup", Side::Dst, name.as_os_str())),
        };
        let dir = DirRef::of(&node);
        let shown = dir.origin.as_ref().map(|o| o.join(&name).to_path());
        let (mirror, wanted) = (Arc::clone(self), name.clone());
        let look = move |asked: Result<()>| match asked.and_then(|()| mirror.child(parent, &wanted))
        {
            Ok(found) => mirror.with_entry(found, then),
            Err(e) => then(Err(e)),
        };
        let look = self.waiting(shown.unwrap_or_default(), look);
        self.reveal_later(dir, name, 0, look);
    }

    fn reveal_later(
        self: &Arc<Self>,
        dir: DirRef,
        name: Name,
        attempt: u32,
        then: super::patience::Told<()>,
    ) {
        let mirror = Arc::clone(self);
        let task = move || {
            let error = match mirror.reveal(&dir, &name, false) {
                Ok(()) => return then(Ok(())),
                Err(e) => e,
            };
            let Some(pause) = pause_before(attempt, &error) else {
                return then(Err(error));
            };
            Arc::clone(&mirror).later(pause, move |again| match again {
                Again::Stopping => then(Err(Error::Stopped)),
                Again::Back => mirror.reveal_later(dir, name, 0, then),
                Again::Here => mirror.reveal_later(dir, name, attempt + 1, then),
            });
        };
        self.engine.pool().run(Priority::Demand, Box::new(task));
    }

    /// As `marked_child`; with `ask` src is asked again for a name that has a stand-in, and it may wait.
    pub fn revealed_child(
        &self,
        (parent, opened): (&DirRef, BorrowedFd<'_>),
        entry: &Entry,
        ask: bool,
    ) -> Result<Option<Marked>> {
        let (name, kind) = (&entry.name, entry.kind);
        match self.marked_or_own(parent, opened, name, kind) {
            Ok(Some(found)) if found.mark.own => self.disown(parent, opened, &found).map(|()| None),
            Err(unseen @ Error::Unseen { .. }) if ask => match self.reveal(parent, name, true) {
                // Its kind is another one now.
                Ok(()) => self.marked_child(parent, opened, name, FileType::Unknown),
                Err(Error::Stopped) => Err(Error::Stopped),
                Err(_) => Err(unseen), // Why is in the ledger, or dst is full.
            },
            other => other,
        }
    }

    /// Asks src for a name that has a stand-in; `Ok`: it is none any more. `at_once`: also right after
    /// a failure.
    fn reveal(&self, dir: &DirRef, name: &Name, at_once: bool) -> Result<()> {
        let path = dir
            .origin
            .as_ref()
            .map_or_else(RelPath::root, |o| o.join(name));
        let unseen = || Error::Unseen {
            path: path.to_path(),
        };
        let opened = self.open_dir(dir)?;
        let ino = match stat::stat_at(opened.as_fd(), name.as_cstr()) {
            Ok(stat) => stat.key.ino,
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e).on("statx", Side::Dst, &path),
        };
        let Some(claimed) = self.unseen.claim(ino, at_once).map_err(|()| unseen())? else {
            return Ok(());
        };
        let revealed = self.src_of(dir).and_then(|src| {
            let parent = (dir, opened.as_fd());
            self.reveal_claimed(&claimed, &src, parent, name, &path)
        });
        if let Err(e) = &revealed {
            dir.origin.iter().for_each(|o| self.source.forget_dir(o));
            // An outage is no entry's failure.
            if !matches!(e, Error::Stopped) && (!e.may_pass() || e.errno() == Errno::IO) {
                claimed.failed();
                self.fail(&path, e);
            }
        }
        revealed
    }

    /// Makes aside what src has under the name, and gives it the place of the stand-in.
    fn reveal_claimed(
        &self,
        claimed: &Claimed<'_>,
        src: &SrcDir,
        (dir, opened): (&DirRef, BorrowedFd<'_>),
        name: &Name,
        path: &RelPath,
    ) -> Result<()> {
        let (links, key) = (self.control.unseen.as_fd(), key_of("new-", claimed.ino));
        let at = in_control(DIR).join(&key);
        match rustix::fs::mkdirat(links, key.as_cstr(), Mode::from_raw_mode(0o700)) {
            // What an earlier try could not take away.
            Err(Errno::EXIST) => {
                extras::remove(links, &key, &at)?;
                rustix::fs::mkdirat(links, key.as_cstr(), Mode::from_raw_mode(0o700))
            }
            other => other,
        }
        .on("mkdir", Side::Dst, &at)?;
        let aside = fd::open_at(links, &key, OFlags::RDONLY | OFlags::DIRECTORY);
        let aside = aside.on("open", Side::Dst, &at)?;
        let made = || {
            let (anchor, origin) = (dir.anchor.clone(), Arc::clone(&src.path));
            let partial = Partial::new(dir.ino, anchor, origin, true, None);
            let placer = Placer::new(self, src, aside.as_fd(), &partial, None);
            match placer.place(name)? {
                true => self.exchange(aside.as_fd(), opened, name, path),
                false => Err(Errno::NOENT).on("statx", Side::Src, path),
            }
        };
        let made = made();
        if made.is_ok() {
            claimed.is_gone();
            let link = key_of("", claimed.ino);
            // A stand-in that nobody can find is taken away by the next start.
            let _ = rustix::fs::unlinkat(links, link.as_cstr(), AtFlags::empty()); // As said.
            self.invalidate(dir.ino);
        }
        if let Err(e) = extras::remove(links, &key, &at) {
            tracing::debug!("{e}"); // The next start, or the next try, does it.
        }
        made
    }

    /// The one step, durable when it returns.
    fn exchange(
        &self,
        aside: BorrowedFd<'_>,
        opened: BorrowedFd<'_>,
        name: &Name,
        path: &RelPath,
    ) -> Result<()> {
        fault::point("unseen-aside");
        let _inside = self.marks.enter();
        {
            let _guard = self.moves.lock();
            if self.finished() {
                return Err(Error::Stopped);
            }
            // A walker that has passed the name has not seen what carries a mark now.
            self.epoch.fetch_add(1, Ordering::Release);
            let _alone = self.unseen.changing.write();
            let before = stat::stat_fd(opened).on("statx", Side::Dst, path)?;
            let (flags, name) = (RenameFlags::EXCHANGE, name.as_cstr());
            match rustix::fs::renameat_with(aside, name, opened, name, flags) {
                // dst cannot hold it: that is in the ledger.
                Err(Errno::NOENT) => Err(Error::Unseen {
                    path: path.to_path(),
                })?,
                other => other.on("rename", Side::Dst, path)?,
            }
            // It was there all the time.
            let times = meta::set_times_fd(opened, before.atime, before.mtime);
            times.on("utimensat", Side::Dst, path)?;
        }
        fault::point("unseen-revealed");
        match self.btrfs {
            true => fd::syncfs(opened).on("syncfs", Side::Dst, path),
            false => fd::fsync(opened).on("fsync", Side::Dst, path),
        }
    }
}

fn key_of(prefix: &str, ino: Ino) -> Name {
    Name::new(format!("{prefix}{ino:x}").as_bytes()).expect("a valid name")
}
