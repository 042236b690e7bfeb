//! Acts: changes that cannot be done twice, when the daemon may be killed in the middle of one.
//!
//!   begin_act() before dst is changed: what the request is to change, and what is there now
//!   answered()  the kernel has the answer, and will not send the request again
//!   begun       the program before us was killed in between: the request comes again, and dst says whether
//!               it was done
//!
//! What is in dst is certain: while a request of these is not answered the kernel holds the lock of its
//! directory (of both, for a rename), or of its inode, and only through the mount does anybody change dst.
//! So after `begin_act` a name is either as it was then, or as the request makes it. All other requests may be
//! done again: a write has its offset, an attribute its value, and an open its number (`Shared::opened`).

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Mirror;
use super::asker;
use super::found::Found;
use super::kept::{kind, write_json};
use super::namespace::{Creator, Make, Retry};
use super::node::{Ino, Node};
use super::upgrade::{bytes_of, text_of};
use crate::error::{Context, Result, Side};
use crate::sys::board::Record;
use crate::sys::name::Name;
use crate::sys::xattr::{self, Target};
use crate::sys::{fault, stat};

/// In the number of a request that the kernel sends again (linux/fuse.h, FUSE_UNIQUE_RESEND).
const RESEND: u64 = 1 << 63;

/// The number of a request, however often it is sent.
pub fn number_of(request: u64) -> u64 {
    request & !RESEND
}

/// The kernel has sent it before.
pub fn is_again(request: u64) -> bool {
    request & RESEND != 0
}

/// What is to be changed; names as text (`upgrade::text_of`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Act {
    /// A name that is not there.
    Make,
    /// A name that is there.
    Remove,
    /// From a directory and name to another; which inodes these are.
    Rename {
        from: (Ino, String),
        to: (Ino, String),
        moved: Ino,
        other: Option<Ino>,
    },
    /// An xattr that is there, or is not: the other way round.
    Xattr,
}

/// All that have begun.
#[derive(Default)]
pub(super) struct Acts {
    count: AtomicUsize,
    table: Mutex<HashMap<u64, (Act, Record, bool)>>,
}

impl Acts {
    /// Of this request the program before us has begun this.
    fn begun(&self, request: u64) -> Option<Act> {
        if fault::breaks("K1") {
            return None;
        }
        let table = self.table.lock();
        let found = table.get(&request).filter(|(_, _, before)| *before);
        found.map(|(act, _, _)| act.clone())
    }

    fn insert(&self, request: u64, act: Act, record: Record, before: bool) {
        let old = self.table.lock().insert(request, (act, record, before));
        if old.is_none() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Mirror {
    /// The kernel has the answer.
    pub fn answered(&self, request: u64) {
        let acts = &self.keep.acts;
        if acts.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let gone = acts.table.lock().remove(&number_of(request));
        if gone.is_some() {
            acts.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The program before us was in the middle of something.
    pub fn has_begun(&self) -> bool {
        self.keep.acts.count.load(Ordering::Relaxed) > 0
    }

    /// The request that this thread works for, where that has to be known.
    fn request(&self) -> Option<u64> {
        self.board()?;
        Some(number_of(asker::current()?.request))
    }

    fn begin_act(&self, request: u64, act: Act) {
        let Some(board) = self.board() else { return };
        if let Some(record) = write_json(board, kind::ACT, 0, &(request, &act)) {
            self.keep.acts.insert(request, act, record, false);
        }
    }

    /// What the program before us had begun. A rename moves what it moves also for who may not ask again.
    pub(super) fn restore_acts(&self, records: impl Iterator<Item = Record>) {
        for record in records {
            let Ok((request, act)) = serde_json::from_slice::<(u64, Act)>(record.bytes()) else {
                continue;
            };
            if let Act::Rename {
                from,
                to,
                moved,
                other,
            } = &act
            {
                self.see_place(Some(*moved), to);
                self.see_place(*other, from);
            }
            self.keep.acts.insert(request, act, record, true);
        }
    }

    /// Notes that an inode is at a place, if it is.
    fn see_place(&self, ino: Option<Ino>, (dir, name): &(Ino, String)) {
        let name = bytes_of(name).and_then(|bytes| Name::new(&bytes));
        if let (Some(ino), Some(name)) = (ino, name)
            && self.ino_at(*dir, &name) == Some(ino)
            && let Some(node) = self.nodes.find(ino)
        {
            node.set_place(*dir, &name);
        }
    }

    fn ino_at(&self, dir: Ino, name: &Name) -> Option<Ino> {
        let node = self.nodes.find(dir)?;
        let dir = self.nodes.dir(&node).ok()?;
        Some(stat::stat_at(dir.as_fd(), name.as_cstr()).ok()?.key.ino)
    }

    /// `make_now`, once.
    pub(super) fn make_once(
        &self,
        parent: Ino,
        name: &Name,
        what: &Make,
        creator: Creator,
    ) -> Result<(Found, Option<OwnedFd>)> {
        let Some(request) = self.request() else {
            return self.make_now(parent, name, what, creator);
        };
        let there = self.ino_at(parent, name);
        match (self.keep.acts.begun(request), there) {
            (Some(Act::Make), Some(_)) => return self.made_before(parent, name, what),
            (None, None) => self.begin_act(request, Act::Make),
            _ => {}
        }
        fault::point("act-begun");
        let made = self.make_now(parent, name, what, creator);
        fault::point("act-done");
        made
    }

    /// What a request for a new name has made before.
    fn made_before(
        &self,
        parent: Ino,
        name: &Name,
        what: &Make,
    ) -> Result<(Found, Option<OwnedFd>)> {
        if let Make::Own(..) = what {
            self.expect_own(parent, name)?;
        }
        let found = self.child(parent, name)?;
        found.node.ctime().is_users();
        let opened = match what {
            Make::File(_, flags) | Make::Own(_, flags) => {
                let opened = self.nodes.open(&found.node, *flags);
                Some(opened.on("open", Side::Dst, name.as_os_str())?)
            }
            _ => None,
        };
        Ok((found, opened))
    }

    /// `unlink_now`, once.
    pub(super) fn unlink_once(&self, parent: Ino, name: &Name, flags: AtFlags) -> Result<()> {
        let Some(request) = self.request() else {
            return self.unlink_now(parent, name, flags);
        };
        let there = self.ino_at(parent, name);
        match (self.keep.acts.begun(request), there) {
            (Some(Act::Remove), None) => return Ok(()),
            (None, Some(_)) => self.begin_act(request, Act::Remove),
            _ => {}
        }
        fault::point("act-begun");
        let gone = self.unlink_now(parent, name, flags);
        fault::point("act-done");
        gone
    }

    /// `link_now`, once.
    pub(super) fn link_once(&self, node: &Arc<Node>, dir: Ino, name: &Name) -> Result<Found> {
        let Some(request) = self.request() else {
            return self.link_now(node, dir, name);
        };
        let there = self.ino_at(dir, name);
        match (self.keep.acts.begun(request), there) {
            (Some(Act::Make), Some(ino)) if ino == node.ino => return self.child(dir, name),
            (None, None) => self.begin_act(request, Act::Make),
            _ => {}
        }
        fault::point("act-begun");
        let made = self.link_now(node, dir, name);
        fault::point("act-done");
        made
    }

    /// `rename_now`, once.
    pub(super) fn rename_once(
        &self,
        from: &(Ino, Name),
        to: &(Ino, Name),
        flags: RenameFlags,
    ) -> Result<(), Retry> {
        let Some(request) = self.request() else {
            return self.rename_now(from, to, flags);
        };
        let (old, new) = (self.ino_at(from.0, &from.1), self.ino_at(to.0, &to.1));
        match (self.keep.acts.begun(request), old) {
            // Two names of one inode: rename(2) leaves both, as often as it is asked.
            (Some(Act::Rename { moved, .. }), _) if new == Some(moved) && old != new => {
                return Ok(()); // `restore_acts` has seen to the places.
            }
            (None, Some(moved)) => {
                let place = |(dir, name): &(Ino, Name)| (*dir, text_of(name.as_bytes()));
                let act = Act::Rename {
                    from: place(from),
                    to: place(to),
                    moved,
                    other: new,
                };
                self.begin_act(request, act);
            }
            _ => {}
        }
        fault::point("act-begun");
        let done = self.rename_now(from, to, flags);
        fault::point("act-done");
        done
    }

    /// setxattr(2), once: XATTR_CREATE finds its own.
    pub(super) fn set_xattr_once(
        &self,
        file: BorrowedFd<'_>,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<(), Errno> {
        let target = Target::Fd(file);
        if self.board().is_none() {
            return xattr::set_flags(target, name, value, flags);
        }
        let again = match self
            .request()
            .filter(|_| flags.contains(XattrFlags::CREATE))
        {
            None => false,
            Some(request) => match self.keep.acts.begun(request) {
                Some(_) => true,
                None => {
                    if xattr::get(target, name)?.is_none() {
                        self.begin_act(request, Act::Xattr);
                    }
                    false
                }
            },
        };
        let flags = match again {
            true => flags - XattrFlags::CREATE,
            false => flags,
        };
        fault::point("act-begun");
        let set = xattr::set_flags(target, name, value, flags);
        fault::point("act-done");
        set
    }

    /// removexattr(2), once.
    pub(super) fn remove_xattr_once(&self, file: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
        let target = Target::Fd(file);
        let Some(request) = self.request() else {
            return xattr::remove(target, name);
        };
        if self.keep.acts.begun(request).is_some() {
            return match xattr::remove(target, name) {
                Err(Errno::NODATA) => Ok(()),
                removed => removed,
            };
        }
        if xattr::get(target, name)?.is_some() {
            self.begin_act(request, Act::Xattr);
        }
        fault::point("act-begun");
        let removed = xattr::remove(target, name);
        fault::point("act-done");
        removed
    }
}
