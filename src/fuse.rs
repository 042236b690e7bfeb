//! MirrorFs: the FUSE protocol's face of a mirror. A handler takes decoded values, calls `Mirror` once,
//! and replies; the reply object travels with the call when it has to wait, so that a session thread is
//! free for the next request at once.
//!
//! A transport (`dev.rs`) takes a request from the kernel and carries its answer back; `request.rs`
//! decodes, `answer.rs` encodes, `dispatch.rs` finds the handler. No other floor knows the protocol.

mod abi;
mod answer;
mod aside;
mod dev;
mod dispatch;
mod handles;
mod handshake;
mod listing;
mod own;
mod passthrough;
mod reply;
mod request;
mod ring;
pub mod session;
mod shared;
pub mod succession;

use std::ffi::CStr;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::Result;
use crate::mirror::{Caller, Change, Creator, Ino, Make, Moment, Node};
use crate::sys::name::Name;
pub(crate) use abi::request_name;
use answer::{Attributes, Bytes, Count, Created, Done, Entry, Found, Offset, Opened, Xattr};
use reply::{Reply, errno, reply_empty, reply_raw, reply_xattr};
use request::At;
use shared::Shared;

/// What answers the kernel's requests.
pub(crate) struct MirrorFs {
    shared: Arc<Shared>,
}

impl MirrorFs {
    fn new(shared: Arc<Shared>) -> MirrorFs {
        MirrorFs { shared }
    }

    fn make(&self, parent: Ino, name: &[u8], what: Make, creator: Creator, reply: Reply<Entry>) {
        let Some(name) = Name::new(name) else {
            return reply.error(Errno::INVAL);
        };
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .make(parent, name, what, creator, move |made| {
                shared.reply_entry("create", made.map(|(entry, _)| entry), reply);
            });
    }

    fn create(&self, parent: Ino, name: &[u8], what: Make, by: Creator, reply: Reply<Created>) {
        let Some(name) = Name::new(name) else {
            return reply.error(Errno::INVAL);
        };
        let Some(reply) = Shared::create_again(&self.shared, reply) else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .make(parent, name, what, by, move |made| match made {
                Ok((entry, Some(file))) => shared.reply_create(&entry, file, reply),
                Ok((_, None)) => reply.error(Errno::IO),
                Err(e) => reply.error(errno("create", &e)),
            });
    }

    fn lookup(&self, parent: Ino, name: &[u8], reply: Reply<Found>) {
        let Some(name) = Name::new(name) else {
            return reply.error(Errno::NOENT);
        };
        if self.shared.is_own(parent, &name) {
            return self.shared.reply_own(reply);
        }
        let shared = Arc::clone(&self.shared);
        self.shared.mirror.lookup(parent, name, move |found| {
            shared.reply_found(parent, found, reply);
        });
    }

    fn getattr(&self, ino: Ino, reply: Reply<Attributes>) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        self.shared.mirror.with_attr(&node, move |attr| {
            shared.reply_attr("getattr", &held, attr, reply);
        });
    }

    fn setattr(&self, ino: Ino, change: Change, fh: Option<u64>, reply: Reply<Attributes>) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let open = fh.and_then(|fh| self.shared.files.get(fh));
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        let then = move |attr| shared.reply_attr("setattr", &held, attr, reply);
        let file = open.map(|open| Arc::clone(&open.file));
        self.shared.mirror.set_attr(&node, change, file, then);
    }

    fn readlink(&self, ino: Ino, reply: Reply<Bytes>) {
        let target = self.shared.node(ino);
        reply.send(target.and_then(|node| self.shared.mirror.read_link(&node).map(Bytes)));
    }

    fn unlink(&self, parent: Ino, name: &[u8], reply: Reply<Done>) {
        let Some(name) = Name::new(name) else {
            return reply.error(Errno::NOENT);
        };
        self.shared.mirror.unlink(parent, name, move |done| {
            reply_empty("unlink", done, reply);
        });
    }

    fn rmdir(&self, parent: Ino, name: &[u8], reply: Reply<Done>) {
        let Some(name) = Name::new(name) else {
            return reply.error(Errno::NOENT);
        };
        self.shared.mirror.rmdir(parent, name, move |done| {
            reply_empty("rmdir", done, reply);
        });
    }

    fn rename(&self, from: (Ino, &[u8]), to: (Ino, &[u8]), flags: u32, reply: Reply<Done>) {
        let (Some(old), Some(new)) = (Name::new(from.1), Name::new(to.1)) else {
            return reply.error(Errno::NOENT);
        };
        let (from, to) = ((from.0, old), (to.0, new));
        self.shared.mirror.rename(from, to, flags, move |done| {
            reply_empty("rename", done, reply);
        });
    }

    fn link(&self, ino: Ino, newparent: Ino, newname: &[u8], reply: Reply<Entry>) {
        let Some(name) = Name::new(newname) else {
            return reply.error(Errno::NOENT);
        };
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .link(&node, newparent, name, move |made| {
                shared.reply_entry("link", made, reply);
            });
    }

    fn open(&self, ino: Ino, flags: OFlags, by: Caller, reply: Reply<Opened>) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let Some(reply) = self.shared.open_again(reply) else {
            return;
        };
        let write = flags & OFlags::ACCMODE != OFlags::RDONLY;
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        self.shared
            .mirror
            .open_file(&node, flags, by, move |opened| {
                let gate = Arc::clone(&shared.mirror);
                gate.requests().pass(move || match opened {
                    Ok((file, locate)) => shared.reply_open(held, file, locate, write, reply),
                    Err(e) => reply.error(errno("open", &e)),
                });
            });
    }

    fn read(&self, at: At, reply: Reply<Bytes>) {
        let Some(open) = self.shared.files.get(at.fh) else {
            return reply.error(Errno::BADF);
        };
        let (asked, held) = (Moment::now(), Arc::clone(&open));
        let then = Box::new(move |bytes: Result<Vec<u8>>| {
            let bytes = bytes.map_err(|e| errno("read", &e));
            reply.send(
                bytes
                    .and_then(|b| held.answer(b, at.size, asked))
                    .map(Bytes),
            );
        });
        let (node, file, mirror) = (&open.node, open.file.as_fd(), &self.shared.mirror);
        match &open.src {
            None => mirror.read(node, file, at.offset, at.size, then),
            Some(src) => mirror.read_through(node, (file, src), (at.offset, at.size), then),
        }
    }

    fn write(&self, fh: u64, offset: u64, data: &[u8], reply: Reply<Count>) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::BADF);
        };
        let count = Count(data.len() as u32);
        let then = move |written: Result<()>| {
            reply.send(written.map(|()| count).map_err(|e| errno("write", &e)));
        };
        let mirror = &self.shared.mirror;
        mirror.write(&open.node, &open.file, offset, data, then);
    }

    fn release(&self, ino: Ino, fh: u64, reply: Reply<Done>) {
        if let Some(open) = self.shared.files.remove(fh) {
            self.shared.backings.release(ino, &open.mode, open.write);
            self.shared.void_attributes(ino, &open.mode, open.write);
        }
        reply.ok(Done);
    }

    fn fsync(&self, fh: u64, data_only: bool, reply: Reply<Done>) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::BADF);
        };
        let (node, file) = (&open.node, open.file.as_fd());
        reply_raw(self.shared.mirror.sync_file(node, file, data_only), reply);
    }

    fn opendir(&self, ino: Ino, reply: Reply<Opened>) {
        let shared = Arc::clone(&self.shared);
        self.shared.mirror.when_listable(ino, move |ready| {
            let gate = Arc::clone(&shared.mirror);
            gate.requests().pass(move || {
                let opened = ready
                    .map_err(|e| errno("opendir", &e))
                    .and_then(|stream| shared.open_listing(ino, stream));
                reply.send(opened);
            });
        });
    }

    fn readdir(&self, at: At, reply: Reply<answer::Entries>) {
        Shared::readdir(&self.shared, at, reply);
    }

    fn readdirplus(&self, at: At, reply: Reply<answer::Entries>) {
        Shared::readdirplus(&self.shared, at, reply);
    }

    fn releasedir(&self, fh: u64, reply: Reply<Done>) {
        drop(self.shared.listings.remove(fh));
        reply.ok(Done);
    }

    fn fsyncdir(&self, fh: u64, data_only: bool, reply: Reply<Done>) {
        let Some(listing) = self.shared.listings.get(fh) else {
            return reply.error(Errno::BADF);
        };
        let (node, dir) = (&listing.node, listing.dir.as_fd());
        reply_raw(self.shared.mirror.sync_file(node, dir, data_only), reply);
    }

    fn setxattr(&self, node: &Arc<Node>, name: &CStr, value: &[u8], flags: u32, re: Reply<Done>) {
        let (value, flags) = (value.to_vec(), flags.cast_signed());
        self.shared
            .mirror
            .set_xattr(node, name, value, flags, move |done| reply_raw(done, re));
    }

    fn getxattr(&self, node: &Arc<Node>, name: &CStr, size: u32, reply: Reply<Xattr>) {
        self.shared
            .mirror
            .get_xattr(node, name, move |value| reply_xattr(value, size, reply));
    }

    fn listxattr(&self, node: &Arc<Node>, size: u32, reply: Reply<Xattr>) {
        self.shared
            .mirror
            .list_xattrs(node, move |names| reply_xattr(names, size, reply));
    }

    fn removexattr(&self, node: &Arc<Node>, name: &CStr, reply: Reply<Done>) {
        self.shared
            .mirror
            .remove_xattr(node, name, move |done| reply_raw(done, reply));
    }

    fn fallocate(&self, fh: u64, mode: u32, range: Range<u64>, reply: Reply<Done>) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::BADF);
        };
        let (mode, at) = (mode.cast_signed(), (range.start, range.end - range.start));
        let mirror = &self.shared.mirror;
        mirror.fallocate(&open.node, &open.file, mode, at, move |done| {
            reply_raw(done, reply);
        });
    }

    fn lseek(&self, fh: u64, offset: u64, whence: u32, reply: Reply<Offset>) {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::BADF);
        };
        if i64::try_from(offset).is_err() {
            return reply.error(Errno::NXIO);
        }
        if whence != SEEK_DATA && whence != SEEK_HOLE {
            return reply.error(Errno::INVAL);
        }
        let done = move |found: Result<u64, Errno>| reply.send(found.map(Offset));
        let file = open.file.as_fd();
        self.shared
            .mirror
            .seek(&open.node, file, offset, whence == SEEK_DATA, done);
    }

    fn copy_file_range(&self, from: (u64, u64), to: (u64, u64), len: u64, reply: Reply<Count>) {
        let files = &self.shared.files;
        let (Some(src), Some(dst)) = (files.get(from.0), files.get(to.0)) else {
            return reply.error(Errno::BADF);
        };
        if src.src.is_some() && src.node.is_pending_file() {
            // The kernel reads and writes then, and nothing is pulled.
            return reply.error(Errno::OPNOTSUPP);
        }
        let from = (Arc::clone(&src.node), Arc::clone(&src.file), from.1);
        let to = (Arc::clone(&dst.node), Arc::clone(&dst.file), to.1);
        // The reply counts in 32 bits.
        let len = len.min(1 << 30) as usize;
        self.shared.mirror.copy_range(from, to, len, move |copied| {
            reply.send(copied.map(|n| Count(n as u32)));
        });
    }
}

/// A request as the kernel sends it, for `make fuzz`: names and data in it are users'.
#[cfg(fuzzing)]
pub fn fuzz_request(bytes: &[u8]) {
    let Some(header) = request::Header::parse(bytes) else {
        return;
    };
    let body = &bytes[abi::IN_HEADER..];
    let fields = request::fields_len(header.opcode).min(body.len());
    let (fields, rest) = body.split_at(fields);
    if let Some(request::Op::BatchForget(all)) = request::parse(header.opcode, fields, rest) {
        assert!(all.count() <= bytes.len());
    }
}
