//! Xattrs: what a manifest says of an entry's extended attributes, POSIX ACLs among them.
//!
//!   xattrs=all xattr.user.note=aGVsbG8= xattrblake3.user.long=6437b3...
//!
//! `xattrs` says that they were looked at, and which of them: `all`, or `user` by who sees only users' own
//! and ACLs. A short value is there in base64, as other tools of mtree(5) have it; a long one by its BLAKE3,
//! so that a line stays a line: with the longest list that Linux gives (64 KiB of names) it has less than
//! 800 KiB.

use std::collections::BTreeMap;
use std::ffi::CString;

use data_encoding::BASE64;

use super::Digest;
use super::line::{escape_bytes, unescape};
use crate::sys::{caps, local};

/// Longer values are told by their digest; and all that come when so many bytes of values are there.
const VALUE_MAX: usize = 1 << 10;
const VALUES_MAX: usize = 16 << 10;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Bytes(Vec<u8>),
    Digest(Digest),
}

impl Value {
    fn is(&self, bytes: &[u8]) -> bool {
        match self {
            Value::Bytes(was) => was == bytes,
            Value::Digest(was) => *was == Digest::of(bytes),
        }
    }
}

/// What of an entry a run of ours can say, and a copy of ours can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    /// Owners, and the bits that lend them.
    pub owners: bool,
    /// Xattrs of all classes, `trusted.*` too; else users' own and ACLs.
    pub all_xattrs: bool,
}

impl Scope {
    /// This process's.
    pub fn ours() -> Scope {
        Scope {
            owners: local::uid() == 0,
            all_xattrs: caps::have_sys_admin() && local::in_initial_user_namespace(),
        }
    }
}

/// The xattrs of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattrs {
    all: bool,
    list: BTreeMap<Vec<u8>, Value>,
}

/// What became of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Became {
    /// It has another value.
    Other,
    /// It is not there any more.
    Gone,
    /// It was not there.
    New,
}

impl Xattrs {
    /// Of names and values that were read, all of a class.
    pub fn of(read: &[(CString, Vec<u8>)], scope: Scope) -> Xattrs {
        let all = scope.all_xattrs;
        let mut room = VALUES_MAX;
        let mut list = BTreeMap::new();
        for (name, value) in read {
            if !counts(name.to_bytes(), all) {
                continue;
            }
            let short = value.len() <= VALUE_MAX.min(room);
            let told = match short {
                true => Value::Bytes(value.clone()),
                false => Value::Digest(Digest::of(value)),
            };
            room -= if short { value.len() } else { 0 };
            list.insert(name.to_bytes().to_vec(), told);
        }
        Xattrs { all, list }
    }

    /// How `now` differs, by name; of what both sides can see.
    pub fn compare(&self, now: &[(CString, Vec<u8>)], scope: Scope) -> Vec<(Vec<u8>, Became)> {
        let all = self.all && scope.all_xattrs;
        let mut out = Vec::new();
        for (name, was) in self.list.iter().filter(|(name, _)| counts(name, all)) {
            match now.iter().find(|(n, _)| n.to_bytes() == name) {
                Some((_, value)) if was.is(value) => {}
                Some(_) => out.push((name.clone(), Became::Other)),
                None => out.push((name.clone(), Became::Gone)),
            }
        }
        for (name, _) in now {
            let name = name.to_bytes();
            if counts(name, all) && !self.list.contains_key(name) {
                out.push((name.to_vec(), Became::New));
            }
        }
        out
    }

    /// True when it has some that only root can see.
    pub fn has_root_s(&self) -> bool {
        self.list.keys().any(|name| !counts(name, false))
    }

    /// Appends the words, each with a space before it.
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(match self.all {
            true => b" xattrs=all",
            false => b" xattrs=user",
        });
        for (name, value) in &self.list {
            let (key, value) = match value {
                Value::Bytes(bytes) => (&b" xattr."[..], BASE64.encode(bytes)),
                Value::Digest(digest) => (&b" xattrblake3."[..], digest.to_string()),
            };
            to.extend_from_slice(key);
            for part in name.split_inclusive(|b| *b == b'=') {
                // The first one ends the word's key.
                let (plain, end) = match part.strip_suffix(b"=") {
                    Some(plain) => (plain, &b"\\075"[..]),
                    None => (part, &b""[..]),
                };
                escape_bytes(plain, to);
                to.extend_from_slice(end);
            }
            to.push(b'=');
            to.extend_from_slice(value.as_bytes());
        }
    }
}

/// What of a line's words is about xattrs.
#[derive(Default)]
pub(super) struct Words {
    all: Option<bool>,
    list: BTreeMap<Vec<u8>, Value>,
}

impl Words {
    /// A word. `None`: it is none of these, `Some(None)`: its value is none.
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> Option<Option<()>> {
        if key == b"xattrs" {
            let all = match value {
                b"all" => Some(true),
                b"user" => Some(false),
                _ => None,
            };
            self.all = all;
            return Some(all.map(drop));
        }
        let (name, value) = match key.strip_prefix(b"xattr.") {
            Some(name) => (name, BASE64.decode(value).ok().map(Value::Bytes)),
            None => {
                let name = key.strip_prefix(b"xattrblake3.")?;
                (name, Digest::from_hex(value).map(Value::Digest))
            }
        };
        Some((|| {
            self.list.insert(unescape(name)?, value?);
            Some(())
        })())
    }

    /// Without `xattrs` nobody says that these are all.
    pub(super) fn end(self) -> Option<Xattrs> {
        let list = self.list;
        self.all.map(|all| Xattrs { all, list })
    }
}

/// True for an xattr that a manifest tells of. What a file system makes of itself
/// (`btrfs.compression`, `system.nfs4_acl`) is not part of a tree.
fn counts(name: &[u8], all: bool) -> bool {
    let of = |class: &[u8]| name.starts_with(class);
    of(b"user.")
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || all && (of(b"trusted.") || of(b"security."))
}
