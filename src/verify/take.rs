//! Take: the manifest of a tree as it is now, its files read for nothing else.
//!
//! For src when something else than `sync` copies it, above all a mount: src does not change then, and
//! what is read from it owes nothing to the copy. What an earlier manifest has of a file with the same
//! size, mtime and ctime is not read again.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::one::{File, Met, Next, One, Teller, Visit, is_marked};
use super::{Kind, Told, VerifyOptions, VerifyReport};
use crate::error::{Context, Error, Result, Side};
use crate::manifest::{Digest, Entry, Index, Scope, Writer, is_hashed, is_settled};
use crate::sys::name::RelPath;
use crate::sys::stat::{Stat, fd_changed_since, stat_fd};
use crate::sys::view::View;
use crate::sys::xattr::Target;
use crate::sys::{fd, host};

/// Writes a line for each entry of the tree. `on` gets what could not be read or changed meanwhile:
/// of these the manifest has nothing, or no digest. Its end is the caller's.
pub fn take_manifest(
    tree: &Path,
    (writer, before): (&Writer, &Index),
    options: &VerifyOptions,
    on: &mut dyn FnMut(Told),
) -> Result<VerifyReport> {
    let begin = Instant::now();
    let unusable = |e| Error::Unusable(format!("\"{}\": {e}", tree.display()));
    let view = View::of(host::open_dir(tree).map_err(unusable)?);
    let root = fd::open_src_dir(view.root(), &RelPath::root()).map_err(unusable)?;
    if is_marked(root.as_fd()) {
        let path = tree.to_path_buf();
        return Err(Error::SrcPending { path });
    }
    let stat = stat_fd(root.as_fd()).on("statx", Side::Src, tree)?;
    let one = One::new(root, Side::Src).watched(options);
    let take = Take {
        writer,
        before,
        stays_on: options.one_file_system.then_some(stat.key.dev),
        scope: Scope::ours(),
    };
    let (mut differences, mut unreadable) = (0, 0);
    one.walk(options, &take, &mut |told| {
        if let Told::Difference(difference) = &told {
            differences += 1;
            unreadable += u64::from(difference.kind != Kind::Changed);
        }
        on(told);
    });
    let stopped = options.stop.load(Relaxed);
    let report = one.report(begin, (differences, unreadable), stopped);
    Ok(VerifyReport {
        files: one.files_read(),
        ..report
    })
}

/// Names and values.
type List = Vec<(CString, Vec<u8>)>;

struct Take<'a> {
    writer: &'a Writer,
    before: &'a Index,
    /// The only file system whose directories are gone into.
    stays_on: Option<(u32, u32)>,
    /// What our copies can have.
    scope: Scope,
}

impl Visit<Entry> for Take<'_> {
    fn opened(&self, to: &Teller<'_>, path: &RelPath, dir: BorrowedFd<'_>, stat: &Stat) {
        if path.is_root() {
            let xattrs = self.xattrs(to, path, Target::Open(dir));
            let entry = Entry::copied(path.clone(), stat, xattrs.as_deref(), self.scope);
            self.writer.add(&entry);
        }
        if is_marked(dir) {
            to.tell(path, Kind::NotFinished, "it is pending");
        }
    }

    fn entry(&self, to: &Teller<'_>, met: &Met<'_>) -> Next<Entry> {
        let (path, stat) = (met.path, met.stat);
        let xattrs = self.xattrs(to, path, met.at);
        let mut entry = Entry::copied(path.clone(), stat, xattrs.as_deref(), self.scope);
        entry.link = met.link.map(|t| t.to_bytes().to_vec());
        match stat.kind() {
            FileType::RegularFile => {
                entry.ctime = is_settled(stat).then_some(stat.ctime);
                entry.digest = self.before.known(path, stat);
                if entry.digest.is_none() && is_hashed(stat) {
                    return Next::Read(entry);
                }
                self.writer.add(&entry);
                Next::Over
            }
            FileType::Directory => {
                self.writer.add(&entry);
                match self.stays_on.is_none_or(|dev| dev == stat.key.dev) {
                    true => Next::List,
                    false => Next::Over,
                }
            }
            _ => {
                self.writer.add(&entry);
                Next::Over
            }
        }
    }

    fn read(&self, to: &Teller<'_>, file: &File<Entry>, digest: Option<Digest>) {
        let path = &file.path;
        if file.failed.load(Relaxed) {
            return; // Nothing is said of it: the manifest has no end then.
        }
        if is_marked(file.fd.as_fd()) {
            return to.tell(path, Kind::NotFinished, "it is pending");
        }
        match fd_changed_since(file.fd.as_fd(), &file.stat) {
            Err(e) => return to.unreadable(path, "fstat", e),
            Ok(true) => {
                self.writer
                    .add(&Entry::bare(path.clone(), file.stat.kind()));
                return to.tell(path, Kind::Changed, "while it was read");
            }
            Ok(false) => {}
        }
        let Some(digest) = digest else {
            return to.unreadable(path, "read", Errno::IO); // It ends, and says it does not.
        };
        self.writer.add(&Entry {
            digest: Some(digest),
            ..file.about.clone()
        });
    }
}

impl Take<'_> {
    /// What there is; `None`: it could not be read. That is told, but where the whole entry is not for us.
    fn xattrs(&self, to: &Teller<'_>, path: &RelPath, at: Target<'_>) -> Option<List> {
        match super::entry::all(at) {
            Ok(list) => Some(list),
            Err(Errno::ACCESS | Errno::PERM) => None,
            Err(e) => {
                to.unreadable(path, "listxattr, getxattr", e);
                None
            }
        }
    }
}
