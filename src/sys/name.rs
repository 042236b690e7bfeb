//! Name: one valid path component. What is not one never reaches a system call.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One component of a path: not empty, not `.` or `..`, without `/` and NUL. Any other bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(CString);

impl Name {
    /// A name, or `None` when `bytes` is not one component.
    pub fn new(bytes: &[u8]) -> Option<Name> {
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return None;
        }
        CString::new(bytes).ok().map(Name)
    }

    /// For system calls.
    pub fn as_cstr(&self) -> &CStr {
        &self.0
    }

    /// The bytes, without a NUL.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.to_bytes()
    }

    /// For std.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(self.0.to_bytes())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_os_str(), f)
    }
}

/// A path below one of the two roots: names joined by `/`; empty is the root itself.
/// It may be longer than PATH_MAX: `fd::open_beneath` goes in steps.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RelPath(Vec<u8>);

impl RelPath {
    /// The root.
    pub fn root() -> RelPath {
        RelPath(Vec::new())
    }

    /// A path from its bytes, or `None` when a component is not a [`Name`].
    pub fn from_bytes(bytes: &[u8]) -> Option<RelPath> {
        if bytes.is_empty() {
            return Some(RelPath::root());
        }
        bytes
            .split(|b| *b == b'/')
            .all(|c| Name::new(c).is_some())
            .then(|| RelPath(bytes.to_vec()))
    }

    /// This path with one more name.
    #[must_use]
    pub fn join(&self, name: &Name) -> RelPath {
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.as_bytes().len());
        bytes.extend_from_slice(&self.0);
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name.as_bytes());
        RelPath(bytes)
    }

    /// The path without its last name, and that name; `None` for the root.
    pub fn split_last(&self) -> Option<(RelPath, Name)> {
        if self.0.is_empty() {
            return None;
        }
        let at = self.0.iter().rposition(|b| *b == b'/');
        let (dir, name) = match at {
            Some(at) => (&self.0[..at], &self.0[at + 1..]),
            None => (&self.0[..0], &self.0[..]),
        };
        Some((RelPath(dir.to_vec()), Name::new(name)?))
    }

    /// True for the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes, names joined by `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// For messages; the root is `.`.
    pub fn to_path(&self) -> PathBuf {
        if self.0.is_empty() {
            return PathBuf::from(".");
        }
        PathBuf::from(OsString::from_vec(self.0.clone()))
    }
}

impl AsRef<Path> for RelPath {
    fn as_ref(&self) -> &Path {
        Path::new(OsStr::from_bytes(if self.0.is_empty() {
            b"."
        } else {
            &self.0
        }))
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(OsStr::from_bytes(&self.0), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_one_component_is_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b", b"/"] {
            assert!(Name::new(bad).is_none(), "{bad:?}");
        }
        for good in [&b"..."[..], b" ", b"\xff\n", b".mirrorfs"] {
            assert!(Name::new(good).is_some(), "{good:?}");
        }
        assert!(RelPath::from_bytes(b"a/../b").is_none());
        assert!(RelPath::from_bytes(b"/a").is_none());
    }

    #[test]
    fn join_and_split_last_are_inverse() {
        let name = Name::new(b"c").expect("a name");
        let dir = RelPath::from_bytes(b"a/b").expect("a path");
        assert_eq!(dir.join(&name).split_last(), Some((dir, name.clone())));
        assert_eq!(
            RelPath::root().join(&name).split_last(),
            Some((RelPath::root(), name))
        );
        assert_eq!(RelPath::root().split_last(), None);
    }
}
