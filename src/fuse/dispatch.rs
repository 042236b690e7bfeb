//! From a decoded request to the handler that answers it.

use std::ffi::CString;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::MirrorFs;
use super::answer::{Answer, Done, Statfs, decode_dev};
use super::reply::{Channel, Reply};
use super::request::{self, Header, Op};
use crate::mirror::{Asker, Caller, Creator, Make, asking};

impl MirrorFs {
    /// Answers one request, now or later from another thread.
    pub(super) fn dispatch(&self, header: &Header, fields: &[u8], rest: &[u8], channel: Channel) {
        // Held while the daemon hands over: the kernel sends again what is left unanswered.
        let _inside = self.shared.mirror.requests().enter();
        let progress = self.shared.mirror.progress();
        progress.requests.count(header.opcode);
        match request::parse(header.opcode, fields, rest) {
            Some(op) => {
                let asker = Asker {
                    request: header.unique,
                    tid: header.pid,
                    told: matches!(channel, Channel::Dev(_)),
                };
                asking(Some(asker), || self.act(header, op, channel));
            }
            None => reply::<Done>(header, channel).error(Errno::INVAL),
        }
    }

    /// From now on users see what is on the disk of the inodes that the request may change.
    fn note_change(&self, ino: u64, op: &Op<'_>) {
        let other = match op {
            Op::Open { flags } if is_reading(user_flags(*flags)) => return,
            Op::Link { ino, .. } => *ino,
            Op::Rename { to_dir, .. } => *to_dir,
            Op::Open { .. }
            | Op::Setattr { .. }
            | Op::Setxattr { .. }
            | Op::Removexattr(_)
            | Op::Symlink { .. }
            | Op::Mknod { .. }
            | Op::Mkdir { .. }
            | Op::Create { .. }
            | Op::Unlink(_)
            | Op::Rmdir(_) => ino,
            _ => return,
        };
        for ino in [ino, other] {
            if let Some(node) = self.shared.mirror.nodes().find(ino) {
                node.ctime().is_users();
            }
        }
    }

    fn act(&self, header: &Header, op: Op<'_>, channel: Channel) {
        let ino = header.node;
        self.note_change(ino, &op);
        match op {
            Op::Lookup(name) => self.lookup(ino, name, reply(header, channel)),
            Op::Getattr => self.getattr(ino, reply(header, channel)),
            Op::Open { flags } => {
                let by = Caller {
                    uid: header.uid,
                    pid: header.pid,
                };
                self.open(ino, user_flags(flags), by, reply(header, channel));
            }
            Op::Read(at) => self.read(at, reply(header, channel)),
            Op::Write { fh, offset, data } => {
                self.write(fh, offset, data, reply(header, channel));
            }
            Op::Release { fh } => self.release(ino, fh, reply(header, channel)),
            Op::Opendir => self.opendir(ino, reply(header, channel)),
            Op::Readdir(at) => self.readdir(at, reply(header, channel)),
            Op::Readdirplus(at) => self.readdirplus(at, reply(header, channel)),
            Op::Releasedir { fh } => self.releasedir(fh, reply(header, channel)),
            Op::Setattr { change, fh } => self.setattr(ino, change, fh, reply(header, channel)),
            Op::Readlink => self.readlink(ino, reply(header, channel)),
            Op::Link { ino: node, name } => self.link(node, ino, name, reply(header, channel)),
            Op::Unlink(name) => self.unlink(ino, name, reply(header, channel)),
            Op::Rmdir(name) => self.rmdir(ino, name, reply(header, channel)),
            Op::Rename {
                from,
                to_dir,
                to,
                flags,
            } => self.rename((ino, from), (to_dir, to), flags, reply(header, channel)),
            Op::Fsync { fh, data_only } => self.fsync(fh, data_only, reply(header, channel)),
            Op::Fsyncdir { fh, data_only } => self.fsyncdir(fh, data_only, reply(header, channel)),
            Op::Statfs => {
                let stat = self.shared.mirror.stat_fs();
                reply(header, channel).send(stat.map(Statfs));
            }
            Op::Fallocate {
                fh,
                offset,
                len,
                mode,
            } => self.fallocate(
                fh,
                mode,
                offset..offset.saturating_add(len),
                reply(header, channel),
            ),
            Op::Lseek { fh, offset, whence } => {
                self.lseek(fh, offset, whence, reply(header, channel));
            }
            Op::CopyFileRange { from, to, len } => {
                self.copy_file_range(from, to, len, reply(header, channel));
            }
            Op::Symlink { .. } | Op::Mknod { .. } | Op::Mkdir { .. } | Op::Create { .. } => {
                self.make_any(header, op, channel);
            }
            Op::Setxattr { .. }
            | Op::Getxattr { .. }
            | Op::Listxattr { .. }
            | Op::Removexattr(_) => self.xattr(ino, header, op, channel),
            // Nobody waits for an answer to these.
            Op::Forget(times) => self.shared.mirror.forget(ino, times),
            Op::BatchForget(all) => {
                for (ino, times) in all {
                    self.shared.mirror.forget(ino, times);
                }
            }
            // Nor to this. One that comes before its request is kept, not sent back: the kernel takes
            // it back only where it was read with its request (/dev/fuse has clones, and io_uring is
            // another place).
            Op::Interrupt(request) => self.shared.mirror.signalled(request),
            Op::Destroy => reply(header, channel).ok(Done),
            // ENOSYS: the kernel does not ask again, for what it can do without us.
            Op::Unknown => reply::<Done>(header, channel).error(Errno::NOSYS),
        }
    }

    fn make_any(&self, header: &Header, op: Op<'_>, channel: Channel) {
        let creator = |umask| Creator {
            uid: header.uid,
            gid: header.gid,
            umask,
        };
        let parent = header.node;
        let (name, what, umask) = match op {
            Op::Symlink { name, target } => (name, Make::Symlink(target.to_vec()), 0),
            Op::Mkdir { name, mode, umask } => (name, Make::Dir(mode), umask),
            Op::Mknod {
                name,
                mode,
                umask,
                rdev,
            } => (name, Make::Node(mode, decode_dev(rdev)), umask),
            Op::Create {
                name,
                flags,
                mode,
                umask,
            } => {
                let ours = OFlags::RDWR | user_flags(flags) & (OFlags::SYNC | OFlags::DSYNC);
                let what = Make::File(mode, ours);
                let reply = reply(header, channel);
                return self.create(parent, name, what, creator(umask), reply);
            }
            _ => return reply::<Done>(header, channel).error(Errno::NOSYS),
        };
        self.make(parent, name, what, creator(umask), reply(header, channel));
    }

    fn xattr(&self, ino: u64, header: &Header, op: Op<'_>, channel: Channel) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply::<Done>(header, channel).error(e),
        };
        if let Op::Listxattr { size } = op {
            return self.listxattr(&node, size, reply(header, channel));
        }
        let (Op::Setxattr { name, .. } | Op::Getxattr { name, .. } | Op::Removexattr(name)) = op
        else {
            return reply::<Done>(header, channel).error(Errno::NOSYS);
        };
        let Ok(name) = CString::new(name) else {
            return reply::<Done>(header, channel).error(Errno::INVAL);
        };
        match op {
            Op::Setxattr { value, flags, .. } => {
                self.setxattr(&node, &name, value, flags, reply(header, channel));
            }
            Op::Getxattr { size, .. } => self.getxattr(&node, &name, size, reply(header, channel)),
            _ => self.removexattr(&node, &name, reply(header, channel)),
        }
    }
}

fn reply<T: Answer>(header: &Header, channel: Channel) -> Reply<T> {
    Reply::new(header.unique, channel)
}

fn is_reading(flags: OFlags) -> bool {
    flags & (OFlags::ACCMODE | OFlags::TRUNC) == OFlags::RDONLY
}

/// The flags of a user's open(2).
fn user_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags)
}
