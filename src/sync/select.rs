//! Select: what of src is copied and what of dst may be removed: filter rules and `--files-from`.
//!
//! A directory that is left out is not opened. The rules of merge files are those of the side that they
//! are about: src's say what is copied, dst's (as they were before this run) what is kept there.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::dir::Dir;
use super::report::SyncError;
use super::{Event, Work};
use crate::config::SyncConfig;
use crate::error::{Error, Printable, Result, Side};
use crate::filter::{Filter, How, Purpose, Scope};
use crate::sys::dir::Entry;
use crate::sys::fd;
use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{stat_at, stat_fd};

/// The longest merge file of a directory.
const FILE_MAX: u64 = 1 << 20;
/// The longest line of a list of names.
const LINE_MAX: usize = 4096;

/// What counts in one directory.
#[derive(Debug, Clone, Default)]
pub(super) struct Selection {
    copy: Option<Scope>,
    remove: Option<Scope>,
    extent: Extent,
}

/// How much of a directory is copied.
#[derive(Debug, Clone, Default)]
enum Extent {
    #[default]
    Whole,
    /// All names, but nothing below its directories except what is listed.
    Level(Arc<Pick>),
    /// What is listed.
    Picked(Arc<Pick>),
}

/// A directory of `--files-from`, and what is listed in it.
#[derive(Debug, Default)]
struct Pick {
    listed: bool,
    /// Listed with a slash at the end.
    contents: bool,
    /// Some name was listed with `./` in front: the root itself counts.
    dotted: bool,
    /// Sorted.
    children: Vec<(Name, Arc<Pick>)>,
}

impl Pick {
    fn child(&self, name: &Name) -> Option<&Arc<Pick>> {
        let at = self.children.binary_search_by(|(n, _)| n.cmp(name)).ok()?;
        Some(&self.children[at].1)
    }
}

impl Selection {
    /// The selection of the two roots before they are entered; `Err(Usage)`: rules or lists that
    /// cannot be read.
    pub(super) fn new(config: &SyncConfig) -> Result<Selection> {
        let whole = |path: &Path| -> Result<Option<Vec<u8>>, String> {
            let text = match path.as_os_str() == "-" {
                true => {
                    let mut text = Vec::new();
                    std::io::stdin().read_to_end(&mut text).map(|_| text)
                }
                false => std::fs::read(path),
            };
            text.map(Some)
                .map_err(|e| format!("{}: {e}", path.display()))
        };
        let how = How {
            delete_excluded: config.delete_excluded,
            from0: config.from0,
        };
        let filter = Filter::new(&config.filters, how, &mut { whole }).map_err(Error::Usage)?;
        let absolute = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let optional = |path: &Path| match path.is_file() {
            true => whole(path),
            false => Ok(None),
        };
        let scope = |purpose, root: PathBuf| {
            let scope = filter.scope(purpose, &root, &mut { optional });
            scope.map_err(Error::Usage)
        };
        let extent = match &config.files_from {
            Some(list) => {
                let text = whole(list).map_err(Error::Usage)?.unwrap_or_default();
                let root = Arc::new(picked(&text, config.from0).map_err(Error::Usage)?);
                extent_of(&root, config.recursive)
            }
            None => Extent::Whole,
        };
        Ok(Selection {
            copy: scope(Purpose::Copy, absolute(&config.src))?,
            remove: match config.delete {
                true => scope(Purpose::Remove, absolute(&config.dst))?,
                false => None,
            },
            extent,
        })
    }

    /// The directory itself is one of what is copied: all but a root that is not listed.
    pub(super) fn counts_itself(&self, path: &RelPath) -> bool {
        match &self.extent {
            Extent::Picked(root) if path.is_root() => root.listed || root.contents || root.dotted,
            _ => true,
        }
    }

    /// What is not here in src may be removed from dst.
    pub(super) fn sweeps(&self) -> bool {
        !matches!(self.extent, Extent::Picked(_))
    }
}

/// How much of a listed directory is copied.
fn extent_of(pick: &Arc<Pick>, recursive: bool) -> Extent {
    match pick.listed || pick.contents {
        true if recursive => Extent::Whole,
        _ if pick.contents => Extent::Level(Arc::clone(pick)),
        _ => Extent::Picked(Arc::clone(pick)),
    }
}

/// The names of a list, as a tree.
fn picked(text: &[u8], from0: bool) -> Result<Pick, String> {
    #[derive(Default)]
    struct Building {
        listed: bool,
        contents: bool,
        children: BTreeMap<Name, Building>,
    }
    fn built(from: Building) -> Pick {
        let children = from.children.into_iter();
        Pick {
            listed: from.listed,
            contents: from.contents,
            dotted: false,
            children: children.map(|(n, b)| (n, Arc::new(built(b)))).collect(),
        }
    }
    let mut root = Building::default();
    let mut dotted = false;
    let ends = |b: &u8| match from0 {
        true => *b == 0,
        false => matches!(b, b'\n' | b'\r' | 0),
    };
    for line in text.split(ends) {
        if line.is_empty() || matches!(line[0], b'#' | b';') {
            continue;
        }
        if line.len() > LINE_MAX {
            return Err("--files-from: a line is longer than a path may be".to_owned());
        }
        dotted |= line.starts_with(b"./");
        let mut names: Vec<&[u8]> = Vec::new();
        let mut contents = false;
        for part in line.split(|b| *b == b'/') {
            contents = matches!(part, b"" | b"." | b"..");
            match part {
                b"" | b"." => {}
                // As rsync: not above the root.
                b".." => drop(names.pop()),
                name => names.push(name),
            }
        }
        let mut at = &mut root;
        for name in names {
            let name = Name::new(name).ok_or("--files-from: a line holds a NUL")?;
            at = at.children.entry(name).or_default();
        }
        at.listed = true;
        at.contents |= contents;
    }
    Ok(Pick {
        dotted,
        ..built(root)
    })
}

impl Work<'_, '_> {
    /// What counts in a directory: its parent's selection (the root's own), and its merge files.
    pub(super) fn selected(
        &self,
        of: &Selection,
        path: &RelPath,
        src: BorrowedFd<'_>,
        dst: Option<BorrowedFd<'_>>,
    ) -> Result<Selection> {
        let enter = |scope: &Option<Scope>, dir: Option<BorrowedFd<'_>>, side| match (scope, dir) {
            (Some(scope), Some(dir)) => {
                let entered = scope.enter(path.as_bytes(), &mut |name| merge_file(dir, name));
                let entered = entered.map_err(|e| rules_error(path, side, &e));
                entered.map(Some)
            }
            (scope, _) => Ok(scope.clone()),
        };
        Ok(Selection {
            copy: enter(&of.copy, Some(src), Side::Src)?,
            remove: enter(&of.remove, dst, Side::Dst)?,
            extent: of.extent.clone(),
        })
    }

    /// The listed names of a directory from the given one on; `None`: all of src's count.
    pub(super) fn picked(&self, dir: &Dir, from: u64, max: usize) -> Option<(Vec<Entry>, bool)> {
        let Extent::Picked(pick) = &dir.selection.extent else {
            return None;
        };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let rest = pick.children.get(from..).unwrap_or_default();
        let some = &rest[..rest.len().min(max)];
        let mut entries = Vec::with_capacity(some.len());
        let missing = |path: RelPath, errno| {
            let error = Error::Call {
                call: "statx",
                side: Side::Src,
                path: path.to_path(),
                errno,
            };
            // It was asked for by name: not there is an error, and not a change of src.
            let error = SyncError {
                vanished: false,
                ..SyncError::new(&path, &error)
            };
            self.crew.tell(Event::Error(error));
        };
        for (name, pick) in some {
            match stat_at(dir.pair.src.as_fd(), name.as_cstr()) {
                Ok(stat) => {
                    if !stat.is_dir()
                        && let Some((below, _)) = pick.children.first()
                    {
                        missing(dir.path(name).join(below), Errno::NOTDIR);
                    }
                    entries.push(Entry {
                        name: name.clone(),
                        ino: stat.key.ino,
                        kind: stat.kind(),
                        next: 0,
                    });
                }
                Err(errno) => missing(dir.path(name), errno),
            }
        }
        Some((entries, some.len() == rest.len()))
    }

    /// Leaves out of a listing what the rules leave out.
    pub(super) fn choose(&self, dir: &Dir, names: &mut Vec<Entry>) {
        let Some(scope) = &dir.selection.copy else {
            return;
        };
        names.retain_mut(|entry| {
            if entry.kind == FileType::Unknown
                && let Ok(stat) = stat_at(dir.pair.src.as_fd(), entry.name.as_cstr())
            {
                entry.kind = stat.kind();
            }
            let is_dir = entry.kind == FileType::Directory;
            !scope.excludes(dir.path(&entry.name).as_bytes(), is_dir)
        });
    }

    /// What counts below a subdirectory before its own rules, and whether nothing in it does.
    pub(super) fn below(&self, dir: &Dir, name: &Name) -> (Selection, bool) {
        let of = &dir.selection;
        let (Extent::Picked(pick) | Extent::Level(pick)) = &of.extent else {
            return (of.clone(), false);
        };
        let extent = pick
            .child(name)
            .map(|child| extent_of(child, self.job.config.recursive));
        let empty = match &extent {
            None => true,
            Some(Extent::Picked(child)) => child.children.is_empty(),
            Some(_) => false,
        };
        let selection = Selection {
            extent: extent.unwrap_or_default(),
            ..of.clone()
        };
        (selection, empty)
    }

    /// False for a name of dst that the rules protect.
    pub(super) fn may_go(&self, dir: &Dir, name: &Name) -> bool {
        let Some(scope) = &dir.selection.remove else {
            return true;
        };
        match stat_at(dir.pair.dst.as_fd(), name.as_cstr()) {
            Ok(stat) => !scope.excludes(dir.path(name).as_bytes(), stat.is_dir()),
            // The removal says what is wrong, if anything is.
            Err(_) => true,
        }
    }

    /// True for a name that src does not have, or that the rules leave out.
    pub(super) fn not_in_src(&self, dir: &Dir, name: &Name) -> bool {
        match (
            stat_at(dir.pair.src.as_fd(), name.as_cstr()),
            &dir.selection.copy,
        ) {
            (Err(Errno::NOENT), _) => true,
            (Ok(stat), Some(scope)) => scope.excludes(dir.path(name).as_bytes(), stat.is_dir()),
            _ => false,
        }
    }

    /// The rules that protect what is in a directory of dst.
    pub(super) fn protection<'d>(&self, dir: &'d Dir) -> Option<&'d Scope> {
        dir.selection.remove.as_ref()
    }
}

/// The scope of a directory that is being removed.
pub(super) fn protection_in(
    of: Option<&Scope>,
    path: &RelPath,
    dir: BorrowedFd<'_>,
) -> Result<Option<Scope>> {
    let Some(scope) = of else {
        return Ok(None);
    };
    let entered = scope.enter(path.as_bytes(), &mut |name| merge_file(dir, name));
    entered
        .map(Some)
        .map_err(|e| rules_error(path, Side::Dst, &e))
}

/// Rules that cannot be read: the directory is left as it is, as nobody knows what they protect.
fn rules_error(path: &RelPath, side: Side, why: &str) -> Error {
    Error::Rules {
        side,
        path: path.to_path(),
        why: why.to_owned(),
    }
}

/// A merge file of a directory; what is no regular file is none.
fn merge_file(dir: BorrowedFd<'_>, name: &Path) -> Result<Option<Vec<u8>>, String> {
    let told = |e: Errno| format!("{}: {e}", Printable(name.as_os_str()));
    let Some(name) = Name::new(name.as_os_str().as_bytes()) else {
        return Ok(None);
    };
    match stat_at(dir, name.as_cstr()) {
        Ok(stat) if stat.is_file() => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(told(e)),
    }
    let file = fd::open_src(dir, &name).map_err(told)?;
    let stat = stat_fd(file.as_fd()).map_err(told)?;
    if !stat.is_file() || stat.size > FILE_MAX {
        return Err(told(Errno::FBIG));
    }
    let mut text = vec![0; usize::try_from(stat.size).unwrap_or_default()];
    let len = fd::pread_all(file.as_fd(), &mut text, 0).map_err(told)?;
    text.truncate(len);
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pick: &Pick, at: &str, out: &mut Vec<String>) {
        let mark = |on: bool, sign| if on { sign } else { "" };
        let signs = [mark(pick.listed, "!"), mark(pick.contents, "/")].concat();
        if !signs.is_empty() {
            out.push(format!("{at}{signs}"));
        }
        for (name, child) in &pick.children {
            let name = String::from_utf8_lossy(name.as_bytes());
            shown(
                child,
                &format!("{at}{}{name}", mark(!at.is_empty(), "/")),
                out,
            );
        }
    }

    #[test]
    fn a_list_of_names_becomes_a_tree() {
        let text = b"a/b\n# no\n\n/c/\n./d/./e\nx/../y\n../z\r\nb/.\n";
        let mut out = Vec::new();
        shown(&picked(text, false).expect("a list"), "", &mut out);
        assert_eq!(out, ["a/b!", "b!/", "c!/", "d/e!", "y!", "z!"]);
        let mut out = Vec::new();
        shown(&picked(b"a\nb\0.\0", true).expect("a list"), "", &mut out);
        assert_eq!(out, ["!/", "a\nb!"]);
        assert!(picked(&[b'x'; 5000], false).is_err());
    }
}
