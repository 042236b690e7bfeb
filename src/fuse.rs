//! MirrorFs: the FUSE protocol's face of a mirror. A handler decodes, calls `Mirror` once, and
//! replies; the reply object travels with the call when it has to wait, so that a session thread is
//! free for the next request at once.
//!
//! All of fuser's types stay in this floor.

mod handles;
mod listing;
mod passthrough;
mod reply;
pub mod session;
mod shared;

use std::ffi::{CString, OsStr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;

use crate::error::Result;
use crate::mirror::{Access, Change, Creator, Make};
use crate::sys::caps;
use crate::sys::name::Name;
use reply::{errno, raw, reply_empty, reply_raw, reply_xattr, stamp};
use shared::Shared;

/// A mirror as fuser wants it.
pub struct MirrorFs {
    shared: Arc<Shared>,
}

impl MirrorFs {
    fn new(shared: Arc<Shared>) -> MirrorFs {
        MirrorFs { shared }
    }

    fn make(&self, parent: INodeNo, name: &OsStr, what: Make, creator: Creator, reply: ReplyEntry) {
        let Some(name) = Name::new(name.as_bytes()) else {
            return reply.error(Errno::EINVAL);
        };
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .make(parent.0, name, what, creator, move |made| {
                shared.reply_entry("create", made.map(|(entry, _)| entry), reply);
            });
    }
}

fn creator(req: &Request, umask: u32) -> Creator {
    Creator {
        uid: req.uid(),
        gid: req.gid(),
        umask,
    }
}

impl Filesystem for MirrorFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each alone: an older kernel that lacks one still has the others.
        for flag in [
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_ASYNC_DIO,
        ] {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::info!("this kernel's FUSE lacks {missing:?}");
            }
        }
        if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
            && caps::have_sys_admin()
        {
            self.shared.backings.enable();
        }
        // 1 MiB a request: larger ones gain nothing and cost a buffer per thread.
        let _ = config.set_max_write(1 << 20); // Below the largest that fuser takes.
        let _ = config.set_max_background(64); // Not 0, the only value it refuses.
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = Name::new(name.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        let shared = Arc::clone(&self.shared);
        self.shared.mirror.lookup(parent.0, name, move |found| {
            shared.reply_entry("lookup", found, reply);
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.shared.mirror.nodes().forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        self.shared.mirror.with_attr(&node, move |attr| {
            shared.reply_attr("getattr", &held, attr, reply);
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let change = Change {
            perm: mode.map(|m| m & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(stamp),
            mtime: mtime.map(stamp),
        };
        let open = fh.and_then(|fh| self.shared.files.get(fh));
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        let then = move |attr| shared.reply_attr("setattr", &held, attr, reply);
        let file = open.map(|open| Arc::clone(&open.file));
        self.shared.mirror.set_attr(&node, change, file, then);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.shared.node(ino);
        match target.and_then(|node| self.shared.mirror.read_link(&node).map_err(raw)) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(e),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let what = Make::Node(mode, reply::decode_dev(rdev));
        self.make(parent, name, what, creator(req, umask), reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        self.make(parent, name, Make::Dir(mode), creator(req, umask), reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let what = Make::Symlink(target.as_os_str().as_bytes().to_vec());
        self.make(parent, name, what, creator(req, 0), reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(name) = Name::new(name.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        self.shared.mirror.unlink(parent.0, name, move |done| {
            reply_empty("unlink", done, reply)
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(name) = Name::new(name.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        self.shared.mirror.rmdir(parent.0, name, move |done| {
            reply_empty("rmdir", done, reply)
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (Some(from), Some(to)) = (Name::new(name.as_bytes()), Name::new(newname.as_bytes()))
        else {
            return reply.error(Errno::ENOENT);
        };
        let (from, to) = ((parent.0, from), (newparent.0, to));
        self.shared
            .mirror
            .rename(from, to, flags.bits(), move |done| {
                reply_empty("rename", done, reply);
            });
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let Some(name) = Name::new(newname.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .link(&node, newparent.0, name, move |made| {
                shared.reply_entry("link", made, reply);
            });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let flags = OFlags::from_bits_retain(flags.0.cast_unsigned());
        let write = flags & OFlags::ACCMODE != OFlags::RDONLY;
        let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&node));
        self.shared
            .mirror
            .open_file(&node, flags, move |opened| match opened {
                Ok((file, locate)) => shared.reply_open(held, file, locate, write, reply),
                Err(e) => reply.error(errno("open", &e)),
            });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let Some(name) = Name::new(name.as_bytes()) else {
            return reply.error(Errno::EINVAL);
        };
        let user = OFlags::from_bits_retain(flags.cast_unsigned());
        let ours = OFlags::RDWR | user & (OFlags::SYNC | OFlags::DSYNC);
        let what = Make::File(mode, ours);
        let shared = Arc::clone(&self.shared);
        self.shared.mirror.make(
            parent.0,
            name,
            what,
            creator(req, umask),
            move |made| match made {
                Ok((entry, Some(file))) => shared.reply_create(&entry, file, reply),
                Ok((_, None)) => reply.error(Errno::EIO),
                Err(e) => reply.error(errno("create", &e)),
            },
        );
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        let then = Box::new(move |bytes: Result<Vec<u8>>| match bytes {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno("read", &e)),
        });
        self.shared
            .mirror
            .read(&open.node, open.file.as_fd(), offset, size, then);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        match self
            .shared
            .mirror
            .write(&open.node, open.file.as_fd(), offset, data)
        {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(errno("write", &e)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing is held back here; ENOSYS tells the kernel not to ask again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(open) = self.shared.files.remove(fh) {
            self.shared.backings.release(ino.0, &open.mode, open.write);
            self.shared.void_attributes(ino.0, &open.mode, open.write);
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        reply_raw(
            self.shared.mirror.sync_file(open.file.as_fd(), data_only),
            reply,
        );
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let shared = Arc::clone(&self.shared);
        self.shared
            .mirror
            .when_populated(ino.0, Access::Look, move |ready| {
                match ready
                    .map_err(|e| errno("opendir", &e))
                    .and_then(|()| shared.open_listing(ino))
                {
                    Ok(handle) => reply.opened(handle, FopenFlags::empty()),
                    Err(e) => reply.error(e),
                }
            });
    }

    fn readdir(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.shared.readdir(fh, offset, reply);
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        Shared::readdirplus(&self.shared, fh, offset, reply);
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        drop(self.shared.listings.remove(fh));
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let Some(listing) = self.shared.listings.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        reply_raw(
            self.shared.mirror.sync_file(listing.dir.as_fd(), data_only),
            reply,
        );
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.shared.mirror.stat_fs() {
            Ok(s) => reply.statfs(
                s.blocks,
                s.bfree,
                s.bavail,
                s.files,
                s.ffree,
                s.bsize as u32,
                s.namelen as u32,
                s.frsize as u32,
            ),
            Err(e) => reply.error(raw(e)),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (node, name) = match (self.shared.node(ino), CString::new(name.as_bytes())) {
            (Ok(node), Ok(name)) => (node, name),
            (Err(e), _) => return reply.error(e),
            (_, Err(_)) => return reply.error(Errno::EINVAL),
        };
        let done = move |done| reply_raw(done, reply);
        self.shared
            .mirror
            .set_xattr(&node, &name, value.to_vec(), flags, done);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (node, name) = match (self.shared.node(ino), CString::new(name.as_bytes())) {
            (Ok(node), Ok(name)) => (node, name),
            (Err(e), _) => return reply.error(e),
            (_, Err(_)) => return reply.error(Errno::EINVAL),
        };
        self.shared
            .mirror
            .get_xattr(&node, &name, move |value| reply_xattr(value, size, reply));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        self.shared
            .mirror
            .list_xattrs(&node, move |names| reply_xattr(names, size, reply));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (node, name) = match (self.shared.node(ino), CString::new(name.as_bytes())) {
            (Ok(node), Ok(name)) => (node, name),
            (Err(e), _) => return reply.error(e),
            (_, Err(_)) => return reply.error(Errno::EINVAL),
        };
        self.shared
            .mirror
            .remove_xattr(&node, &name, move |done| reply_raw(done, reply));
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        let file = open.file.as_fd();
        reply_raw(
            self.shared.mirror.fallocate(file, mode, offset, length),
            reply,
        );
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let Some(open) = self.shared.files.get(fh) else {
            return reply.error(Errno::EBADF);
        };
        let Ok(at) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        if whence != SEEK_DATA && whence != SEEK_HOLE {
            return reply.error(Errno::EINVAL);
        }
        let done = move |found: Result<u64, rustix::io::Errno>| match found {
            Ok(at) => reply.offset(at.cast_signed()),
            Err(e) => reply.error(raw(e)),
        };
        self.shared
            .mirror
            .seek(&open.node, open.file.as_fd(), at, whence == SEEK_DATA, done);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let files = &self.shared.files;
        let (Some(from), Some(to)) = (files.get(fh_in), files.get(fh_out)) else {
            return reply.error(Errno::EBADF);
        };
        let from = (Arc::clone(&from.node), Arc::clone(&from.file), offset_in);
        let to = (Arc::clone(&to.file), offset_out);
        // The reply counts in 32 bits.
        let len = len.min(1 << 30) as usize;
        self.shared
            .mirror
            .copy_range(from, to, len, move |copied| match copied {
                Ok(n) => reply.written(n as u32),
                Err(e) => reply.error(raw(e)),
            });
    }
}
