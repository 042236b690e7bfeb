//! Proof: dst against the manifest that was written when it was copied. src is not needed.
//!
//!   size, mtime, mode, owner, target, type, xattrs  somebody has changed it since: `Changed`
//!     or ACLs differ
//!   none of these differs, the bytes do             nobody has: `Corrupt`
//!   only one of the two has the name                `Missing`, `Extra`
//!   the manifest has no digest of a file            `Unproven`
//!
//! A file whose size or time differ is not read: its bytes are the user's. Only an inode's ctime tells of a
//! change of its xattrs, and that of dst is in no manifest: so what differs there is never `Corrupt`. Each name of dst (`one`) is
//! asked of the manifest's index; what nobody asked for is missing.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::entry::type_name;
use super::groups::{Groups, Inode};
use super::one::{File, Met, Next, One, Teller, Visit, difference, is_marked, is_marked_at};
use super::{Kind, Told, VerifyOptions, VerifyReport};
use crate::error::{Error, Printable, Result, Side};
use crate::manifest::{Became, Digest, Entry, Index, Scope};
use crate::meta::CAPABILITY;
use crate::progress::Counter;
use crate::sys::name::RelPath;
use crate::sys::stat::{Stat, Time, stat_at, stat_fd_after};
use crate::sys::xattr::Target;
use crate::sys::{fd, host};

/// Compares the tree below a directory with a manifest; `on` gets each difference, in no order, and
/// each entry when all of it was compared.
pub fn verify_manifest(
    manifest: &Index,
    dst: &Path,
    options: &VerifyOptions,
    on: &mut dyn FnMut(Told),
) -> Result<ProofReport> {
    let begin = Instant::now();
    let root = host::open_dir(dst);
    let root = root.map_err(|e| Error::Unusable(format!("{}: {e}", dst.display())))?;
    let one = One::new(root, Side::Dst);
    let proof = Proof {
        manifest,
        options,
        groups: Groups::default(),
        scope: Scope::ours(),
        silent: Counter::default(),
        unseen: Counter::default(),
    };
    let (mut differences, mut unreadable) = (0, 0);
    let mut told = |told: Told| {
        if let Told::Difference(difference) = &told {
            differences += 1;
            let unsure = matches!(difference.kind, Kind::Unreadable | Kind::Unproven);
            unreadable += u64::from(unsure);
        }
        on(told);
    };
    one.walk(options, &proof, &mut told);
    let stopped = options.stop.load(Relaxed);
    if !stopped {
        proof.missing(&one, &mut told);
    }
    Ok(ProofReport {
        tree: one.report(begin, (differences, unreadable), stopped),
        without_xattrs: proof.silent.get(),
        xattrs_unseen: proof.unseen.get(),
    })
}

/// The result of a comparison with a manifest.
#[derive(Debug, Clone, Copy)]
pub struct ProofReport {
    /// As of two trees.
    pub tree: VerifyReport,
    /// Entries whose xattrs the manifest does not tell: they were not compared.
    pub without_xattrs: u64,
    /// Entries with xattrs that only root can compare, and we are not root.
    pub xattrs_unseen: u64,
}

/// The comparison.
struct Proof<'a> {
    manifest: &'a Index,
    options: &'a VerifyOptions,
    groups: Groups,
    /// What this process can see.
    scope: Scope,
    /// Entries that the manifest tells no xattrs of.
    silent: Counter,
    /// Entries of which it tells some that we cannot see.
    unseen: Counter,
}

impl Visit<Digest> for Proof<'_> {
    fn opened(&self, to: &Teller<'_>, path: &RelPath, dir: BorrowedFd<'_>, stat: &Stat) {
        if path.is_root() {
            if let Some(entry) = self.asked(to, path, Target::Open(dir)) {
                let met = Met {
                    path,
                    stat,
                    link: None,
                    at: Target::Open(dir),
                };
                self.looks(to, &entry, &met);
            }
            if is_marked(dir) {
                to.tell(path, Kind::NotFinished, "dst carries a mark");
            }
        }
        self.done(to, path);
    }

    fn entry(&self, to: &Teller<'_>, met: &Met<'_>) -> Next<Digest> {
        let (path, stat) = (met.path, met.stat);
        let Some(entry) = self.asked(to, path, met.at) else {
            return Next::Over;
        };
        if entry.kind != stat.kind() {
            let (now, was) = (type_name(stat.kind()), type_name(entry.kind));
            to.tell(path, Kind::Changed, format!("{now}, was {was}"));
            return self.over(to, path);
        }
        let same = self.looks(to, &entry, met);
        match stat.kind() {
            FileType::Directory => return Next::List,
            FileType::RegularFile if same => {}
            _ => return self.over(to, path),
        }
        let Some(want) = entry.digest else {
            let why = "the manifest has no digest of it";
            to.tell(path, Kind::Unproven, why);
            return self.over(to, path);
        };
        let sample = self.options.sample;
        match self.options.content && sample.is_none_or(|s| s.owns(path.as_bytes())) {
            true => Next::Read(want),
            false => self.over(to, path),
        }
    }

    fn read(&self, to: &Teller<'_>, file: &File<Digest>, digest: Option<Digest>) {
        self.judge(to, file, digest);
        self.done(to, &file.path);
    }
}

impl Proof<'_> {
    /// What the manifest has and nobody has met.
    fn missing(&self, one: &One, told: &mut dyn FnMut(Told)) {
        let walked = self.manifest.rest(|entry| {
            let Some((parent, name)) = entry.path.split_last() else {
                return; // The root could not be read: told already.
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let parent = fd::open_beneath(one.root.as_fd(), &parent, flags);
            let found = parent.map(|dir| stat_at(dir.as_fd(), name.as_cstr()));
            // Without its directory that one is told; with its name its directory could not be listed.
            if let Ok(Err(Errno::NOENT)) = found {
                told(difference(&entry.path, Kind::Missing, ""));
            }
        });
        if let Err(trouble) = walked {
            let root = RelPath::root();
            told(difference(&root, Kind::Unreadable, trouble.to_string()));
        }
    }

    fn done(&self, to: &Teller<'_>, path: &RelPath) {
        if self.options.tell_all {
            to.done(path);
        }
    }

    fn over(&self, to: &Teller<'_>, path: &RelPath) -> Next<Digest> {
        self.done(to, path);
        Next::Over
    }

    /// What the manifest has of a path. `None`: nothing; that was told.
    fn asked(&self, to: &Teller<'_>, path: &RelPath, at: Target<'_>) -> Option<Entry> {
        match (self.manifest.get(path), at) {
            (Ok(Some(entry)), _) => return Some(entry),
            (Ok(None), Target::At(dir, name)) if host::is_lost_found(dir, name.as_cstr()) => {}
            (Ok(None), _) => to.tell(path, Kind::Extra, ""),
            (Err(trouble), _) => to.tell(path, Kind::Unreadable, trouble.to_string()),
        }
        None
    }

    /// Compares all but the bytes. True: size and time say that these are as they were.
    fn looks(&self, to: &Teller<'_>, was: &Entry, met: &Met<'_>) -> bool {
        let now = met.stat;
        let mut changes = Vec::new();
        fn note<T: PartialEq>(
            changes: &mut Vec<String>,
            what: &str,
            (now, was): (T, Option<T>),
            show: impl Fn(&T) -> String,
        ) -> bool {
            let same = was.as_ref().is_none_or(|was| now == *was);
            if let (false, Some(was)) = (same, &was) {
                changes.push(format!("{what} {}, was {}", show(&now), show(was)));
            }
            same
        }
        let text = |n: &u32| n.to_string();
        let time = |t: &Time| format!("{}.{:09}", t.sec, t.nsec);
        let size = note(&mut changes, "size", (now.size, was.size), u64::to_string);
        let same = note(&mut changes, "mtime", (now.mtime, was.time), time) && size;
        note(&mut changes, "mode", (now.perm(), was.mode), |m| {
            format!("{m:04o}")
        });
        note(&mut changes, "owner", (now.uid, was.uid), text);
        note(&mut changes, "group", (now.gid, was.gid), text);
        let shown = |d: &(u32, u32)| format!("{}:{}", d.0, d.1);
        note(&mut changes, "device", (now.rdev, was.device), shown);
        if let (Some(now), Some(was)) = (met.link, &was.link)
            && now.to_bytes() != was
        {
            changes.push("another target".into());
        }
        if let Some((nlink, key)) = was.group {
            let was = Inode { key, nlink };
            if !self.groups.meet(was, now.into()) {
                changes.push("other names are one inode".into());
            }
            self.groups.leave(was, now.into());
        }
        self.xattrs(to, was, met, &mut changes);
        if !changes.is_empty() {
            to.tell(&was.path, Kind::Changed, changes.join("; "));
        }
        same
    }

    /// Compares xattrs and ACLs, as far as both sides know them.
    fn xattrs(&self, to: &Teller<'_>, was: &Entry, met: &Met<'_>, changes: &mut Vec<String>) {
        let Some(were) = &was.xattrs else {
            // Of an entry of which it tells nothing at all something else is told.
            self.silent.add(u64::from(was.time.is_some()));
            return;
        };
        let unseen = !self.scope.all_xattrs && were.has_root_s();
        self.unseen.add(u64::from(unseen));
        let now = match super::entry::all(met.at) {
            Ok(now) => now,
            Err(e) => return to.unreadable(met.path, "listxattr, getxattr", e),
        };
        for (name, became) in were.compare(&now, self.scope) {
            let due = name == CAPABILITY.to_bytes() && became == Became::Gone;
            if due && is_marked_at(met.at) {
                continue; // It comes with the bytes.
            }
            let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&name);
            let became = match became {
                Became::Other => "has another value",
                Became::Gone => "is gone",
                Became::New => "is new",
            };
            changes.push(format!("xattr {} {became}", Printable(name)));
        }
    }

    /// All of a file was read, or it could not be.
    fn judge(&self, to: &Teller<'_>, file: &File<Digest>, digest: Option<Digest>) {
        let want = file.about;
        if file.failed.load(Relaxed) || digest == Some(want) {
            return;
        }
        match stat_fd_after(file.fd.as_fd(), &file.stat) {
            Err(e) => return to.unreadable(&file.path, "statx", e),
            Ok(now) if now.changed_since(&file.stat) => {
                return to.tell(&file.path, Kind::Changed, "while it was read");
            }
            Ok(_) => {}
        }
        if is_marked(file.fd.as_fd()) {
            return to.tell(&file.path, Kind::NotFinished, "it is pending");
        }
        let detail = match digest {
            Some(digest) => {
                format!("BLAKE3 {digest}, was {want}; size and mtime are as they were")
            }
            None => "it ends early".to_owned(),
        };
        to.tell(&file.path, Kind::Corrupt, detail);
    }
}
