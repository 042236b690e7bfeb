//! Proof: the manifest of a run (`--manifest`), a line for each entry that is in dst as src has it.
//!
//! Where a file's digest comes from:
//!
//!   small        the buffer that was read from src and written to dst
//!   large        the same, each part as it goes through (`data`); holes as zeros, unread
//!   shared       its extents went by no buffer: src is read once more, before it is looked at again
//!   equal        src is read, or the manifest has the digest from an earlier run and src the same
//!                size, mtime and ctime
//!
//! In all of them src is looked at afterwards: if it changed meanwhile, or dst's entry was left as it
//! was, the line has a type and no more. A line is written when the entry has its name; on disk it is
//! after everything else, with the end of the run.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use parking_lot::Mutex;
use rustix::fs::FileType;

use super::Work;
use super::data::{Buffers, Transfer};
use crate::error::{Context, Error, Result, Side};
use crate::manifest::{Digest, Entry, Index, Part, Scope, Tree, Trouble, Writer, is_hashed};
use crate::meta::Meta;
use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Stat, fd_changed_since};

/// The manifest of a run.
pub(super) struct Proof {
    writer: Writer,
    /// What earlier runs have said.
    before: Index,
    /// Inodes with several names, one of them done: what is said of the next ones, and how many are left.
    groups: Mutex<HashMap<FileKey, (Entry, u32)>>,
    /// What our copies can have.
    scope: Scope,
}

impl Proof {
    pub(super) fn begin(path: &Path) -> Result<Proof> {
        let begun = Writer::begin(path).map_err(|t| Error::Unusable(t.to_string()))?;
        let (writer, before, bad) = begun;
        if let Some(bad) = bad.filter(|bad| bad.line > 0) {
            tracing::warn!("{bad}; what is behind it is read again");
        }
        Ok(Proof {
            writer,
            before,
            groups: Mutex::default(),
            scope: Scope::ours(),
        })
    }

    /// After the run, when all of it is durable. `whole`: nothing has failed.
    pub(super) fn end(&self, whole: bool) -> std::result::Result<(), Trouble> {
        self.writer.end(whole)
    }

    fn entry(&self, path: RelPath, meta: &Meta) -> Entry {
        Entry::copied(path, &meta.stat, Some(&meta.xattrs), self.scope)
    }

    /// A name is done; others of its inode may follow.
    fn add(&self, entry: Entry, src: &Stat) {
        self.writer.add(&entry);
        if src.nlink > 1 && !src.is_dir() {
            let mut groups = self.groups.lock();
            groups.insert(src.key, (entry, src.nlink - 1));
        }
    }

    fn link(&self, path: RelPath, kind: FileType, group: FileKey) {
        let mut groups = self.groups.lock();
        let mut entry = Entry::bare(path, kind);
        if let Some((first, left)) = groups.get_mut(&group) {
            let path = entry.path;
            entry = Entry {
                path,
                ..first.clone()
            };
            *left = left.saturating_sub(1);
            if *left == 0 {
                groups.remove(&group);
            }
        }
        drop(groups);
        self.writer.add(&entry);
    }
}

impl Work<'_, '_> {
    /// A directory, symlink, fifo, socket or device is as src has it.
    pub(super) fn prove(&self, path: &RelPath, src: &Meta, target: Option<&std::ffi::CStr>) {
        if let Some(proof) = &self.job.proof {
            let mut entry = proof.entry(path.clone(), src);
            entry.link = target.map(|t| t.to_bytes().to_vec());
            proof.add(entry, &src.stat);
        }
    }

    /// A file was copied. `changed`: src is not any more what was read.
    pub(super) fn prove_copied(&self, t: &Transfer, changed: bool) {
        let Some(proof) = &self.job.proof else {
            return;
        };
        let path = t.at().path();
        let src = &t.meta.stat;
        let entry = match changed {
            true => Entry::bare(path, src.kind()),
            false => Entry {
                digest: t.digest.or_else(|| t.tree.as_ref()?.digest()),
                ctime: t.settled.then_some(src.ctime),
                ..proof.entry(path, &t.meta)
            },
        };
        proof.add(entry, src);
    }

    /// One more name of an inode that is done.
    pub(super) fn prove_link(&self, path: &RelPath, kind: FileType, group: FileKey) {
        if let Some(proof) = &self.job.proof {
            proof.link(path.clone(), kind, group);
        }
    }

    /// dst's entry was left as it is, whatever that is.
    pub(super) fn prove_nothing(&self, path: &RelPath, kind: FileType) {
        if let Some(proof) = &self.job.proof {
            proof.writer.add(&Entry::bare(path.clone(), kind));
        }
    }

    /// dst's file is equal. `read`: src's digest, where it was read already.
    pub(super) fn prove_equal(
        &self,
        buffers: &mut Buffers,
        path: &RelPath,
        (src, meta): (&OwnedFd, &Meta),
        read: Option<Digest>,
        settled: bool,
    ) -> Result<()> {
        let Some(proof) = &self.job.proof else {
            return Ok(());
        };
        let stat = &meta.stat;
        let digest = match read.or_else(|| proof.before.known(path, stat)) {
            Some(digest) => Some(digest),
            None => self.digest_of(buffers, src.as_fd(), stat, path)?,
        };
        if fd_changed_since(src.as_fd(), stat).on("fstat", Side::Src, path)? {
            proof.add(Entry::bare(path.clone(), stat.kind()), stat);
            let path = path.to_path();
            return Err(Error::SrcChanged { path });
        }
        let entry = Entry {
            digest,
            ctime: settled.then_some(stat.ctime),
            ..proof.entry(path.clone(), meta)
        };
        proof.add(entry, stat);
        Ok(())
    }

    /// Reads a small file of src whose extents dst shares. Whether src has changed since is asked later.
    pub(super) fn hash_clone(&self, buffers: &mut Buffers, t: &mut Transfer) -> Result<()> {
        t.digest = self.digest_of(buffers, t.src.as_fd(), &t.meta.stat, &t.at().path())?;
        Ok(())
    }

    /// Reads a file of src for nothing else. `None`: it ended early, or is not hashed.
    pub(super) fn digest_of(
        &self,
        buffers: &mut Buffers,
        src: BorrowedFd<'_>,
        stat: &Stat,
        path: &RelPath,
    ) -> Result<Option<Digest>> {
        if !is_hashed(stat) {
            return Ok(None);
        }
        let tree = Tree::new(stat.size);
        let mut feed = tree.feed(0);
        let mut offset = 0;
        let mut part = Part {
            file: src,
            sparse: stat.is_sparse(),
            hash: Some((&tree, &mut feed)),
        };
        while offset < stat.size {
            if self.stopping() {
                return Err(Error::Stopped);
            }
            if self.crew.hungry() {
                self.give_rest(buffers);
            }
            let step = part.step(&(offset..stat.size), &mut buffers.data);
            let (next, read) = step.or_else(|(call, e)| Err(e).on(call, Side::Src, path))?;
            self.pace(read as u64);
            offset = next;
        }
        Ok(tree.digest())
    }
}
