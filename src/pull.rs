//! Pull: brings what somebody names into dst now, before the background comes to it.
//!
//! The way down from the root goes through names only: every directory on it is populated first.
//! Below it each marked file is hydrated in the demand lane, a few at a time, so that users who wait
//! are behind a few files at the most. Only marks lead it: what is here already costs a look.

pub mod replay;

use std::os::fd::AsFd;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::engine::job::Priority;
use crate::error::{Context, Error, Result, Side};
use crate::mirror::{DirRef, FileRef, Marked, Mirror, Need, Origin};
use crate::sys::dir::{self, Entry};
use crate::sys::fd;
use crate::sys::name::{Name, RelPath};

/// Files under way at a time.
const IN_FLIGHT: usize = 16;
/// Failures that are told in words.
const FAILURES_TOLD: usize = 100;

/// What a pull did.
#[derive(Debug, Default)]
pub struct Pulled {
    /// Files that were pulled.
    pub files: u64,
    /// Files and directories that could not be.
    pub failed: u64,
    /// The first failures.
    pub failures: Vec<Error>,
}

/// A pull at work.
struct Pull<'a> {
    mirror: &'a Arc<Mirror>,
    in_flight: usize,
    tell: Sender<Result<()>>,
    told: Receiver<Result<()>>,
    pulled: Pulled,
}

/// Pulls the entry at `path` of dst, a directory with all that is below it. An error says why there
/// is nothing to pull; `Pulled` has those of single files.
pub fn pull(mirror: &Arc<Mirror>, path: &RelPath) -> Result<Pulled> {
    let (tell, told) = unbounded(); // At most IN_FLIGHT at a time.
    let mut pull = Pull {
        mirror,
        in_flight: 0,
        tell,
        told,
        pulled: Pulled::default(),
    };
    let found = find(mirror, path)?;
    match found {
        None => {}
        Some(Found::Dir(dir)) => pull.tree(dir),
        Some(Found::File(file, _)) => pull.file(&file),
    }
    while pull.in_flight > 0 {
        pull.hear();
    }
    Ok(pull.pulled)
}

/// Something that carries a mark; of a file also its size in dst.
enum Found {
    Dir(DirRef),
    File(FileRef, u64),
}

impl From<Marked> for Found {
    fn from(marked: Marked) -> Found {
        let DirRef {
            ino,
            anchor,
            origin,
        } = marked.dir;
        match marked.kind {
            FileType::Directory => Found::Dir(DirRef {
                ino,
                anchor,
                origin,
            }),
            _ => {
                let origin = origin.as_deref().map(Origin::of);
                Found::File(
                    FileRef {
                        ino,
                        anchor,
                        origin,
                    },
                    marked.size,
                )
            }
        }
    }
}

impl Pull<'_> {
    /// A directory and all that is below it.
    fn tree(&mut self, root: DirRef) {
        let mut stack = vec![root];
        while let Some(dir) = stack.pop() {
            if self.mirror.stopping() {
                return self.failed(Error::Stopped);
            }
            if let Err(e) = self.dir(&dir, &mut stack) {
                self.failed(e);
            }
        }
    }

    fn dir(&mut self, dir: &DirRef, stack: &mut Vec<DirRef>) -> Result<()> {
        self.mirror.populate_names(dir)?;
        let opened = self.mirror.open_dir(dir)?;
        let shown = || {
            dir.origin
                .as_deref()
                .map_or_else(RelPath::root, Clone::clone)
        };
        for entry in dir::list(opened.as_fd()).on("getdents64", Side::Dst, shown())? {
            let marked = self
                .mirror
                .revealed_child((dir, opened.as_fd()), &entry, true);
            let marked = match marked {
                Err(e @ Error::Unseen { .. }) => {
                    self.failed(e);
                    continue;
                }
                other => other?,
            };
            match marked.map(Found::from) {
                None => {}
                Some(Found::Dir(below)) => stack.push(below),
                Some(Found::File(file, _)) => self.file(&file),
            }
        }
        Ok(())
    }

    fn file(&mut self, file: &FileRef) {
        while self.in_flight >= IN_FLIGHT {
            self.hear();
        }
        self.in_flight += 1;
        let tell = self.tell.clone();
        let then = move |result| {
            let _ = tell.send(result); // The receiver outlives all of them but a panic.
        };
        self.mirror
            .hydrate(file, Need::Read, Priority::Demand, Box::new(then));
    }

    fn hear(&mut self) {
        // `tell` lives as long as we do, so that there is no other error.
        match self.told.recv().unwrap_or(Err(Error::Stopped)) {
            Ok(()) => self.pulled.files += 1,
            Err(e) => self.failed(e),
        }
        self.in_flight -= 1;
    }

    fn failed(&mut self, error: Error) {
        self.pulled.failed += 1;
        if self.pulled.failures.len() < FAILURES_TOLD {
            self.pulled.failures.push(error);
        }
    }
}

/// What the path leads to; `None` when it carries no mark any more, or never did.
fn find(mirror: &Arc<Mirror>, path: &RelPath) -> Result<Option<Found>> {
    let Some(mut dir) = mirror.root_dir()? else {
        return exists(mirror, path).map(|()| None);
    };
    let mut names = path.as_bytes().split(|b| *b == b'/').filter_map(Name::new);
    let Some(mut name) = names.next() else {
        return Ok(Some(Found::Dir(dir)));
    };
    loop {
        mirror.populate_names(&dir)?;
        let opened = mirror.open_dir(&dir)?;
        let entry = Entry {
            name: name.clone(),
            kind: FileType::Unknown,
            ino: 0,
            next: 0,
        };
        let marked = mirror.revealed_child((&dir, opened.as_fd()), &entry, true)?;
        let Some(found) = marked.map(Found::from) else {
            return exists(mirror, path).map(|()| None);
        };
        dir = match (names.next(), found) {
            (None, found) => return Ok(Some(found)),
            (Some(next), Found::Dir(below)) => {
                name = next;
                below
            }
            (Some(_), Found::File(..)) => {
                return Err(Errno::NOTDIR).on("open", Side::Dst, path);
            }
        };
    }
}

/// What carries no mark is complete, if it is there at all.
fn exists(mirror: &Mirror, path: &RelPath) -> Result<()> {
    let root = mirror.dst_root().as_fd();
    let opened = fd::open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW);
    opened.map(|_| ()).on("open", Side::Dst, path)
}
