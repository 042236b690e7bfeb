//! The transport over /dev/fuse: a thread reads a request, writes the answer where it was read, and
//! reads the next.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::MirrorFs;
use super::abi::{IN_HEADER, NOTIFY_INVAL_INODE, OUT_HEADER};
use super::reply::Channel;
use super::request::{Header, fields_len};
use crate::mirror::Ino;
use crate::sys::fusedev;

/// Largest data of one request. More gains nothing and costs a buffer per thread.
pub(super) const DATA_MAX: u32 = 1 << 20;

/// One open /dev/fuse.
pub(super) struct Dev(Arc<OwnedFd>);

impl Dev {
    pub(super) fn new(fd: OwnedFd) -> Dev {
        Dev(Arc::new(fd))
    }

    /// Another one of the same connection: requests are answered where they were read.
    pub(super) fn another(&self) -> Result<Dev, Errno> {
        fusedev::clone(self.0.as_fd()).map(Dev::new)
    }

    pub(super) fn fd(&self) -> &Arc<OwnedFd> {
        &self.0
    }

    /// Answers a request: the two parts of an answer, or an errno.
    pub(super) fn send(&self, unique: u64, result: Result<(&[u8], &[u8]), Errno>) {
        let (error, (fixed, data)) = match result {
            Ok(parts) => (0, parts),
            Err(errno) => (-errno.raw_os_error(), (&[][..], &[][..])),
        };
        if let Err(errno) = self.write(error, unique, fixed, data) {
            // ENOENT: the request is gone (the connection was aborted). Nobody waits.
            tracing::debug!("reply to request {unique}: {errno}");
        }
    }

    /// Tells the kernel that the attributes it has of an inode are void. An inode that it no longer
    /// has is no error.
    pub(super) fn void_attributes(&self, ino: Ino) {
        let mut body = [0u8; 24];
        body[..8].copy_from_slice(&ino.to_ne_bytes());
        // A negative offset: attributes only.
        body[8..16].copy_from_slice(&(-1i64).to_ne_bytes());
        if let Err(errno) = self.write(NOTIFY_INVAL_INODE, 0, &body, &[]) {
            tracing::debug!("invalidate inode {ino}: {errno}");
        }
    }

    fn write(&self, error: i32, unique: u64, fixed: &[u8], data: &[u8]) -> Result<(), Errno> {
        let len = (OUT_HEADER + fixed.len() + data.len()) as u32;
        let mut header = [0u8; OUT_HEADER];
        header[..4].copy_from_slice(&len.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        fusedev::write(self.0.as_fd(), [&header, fixed, data])
    }

    /// Takes the next request. `None`: the connection is over.
    pub(super) fn receive<'a>(&self, buf: &'a mut [u8]) -> Result<Option<Received<'a>>, Errno> {
        let Some(len) = fusedev::read(self.0.as_fd(), buf)? else {
            return Ok(None);
        };
        let bytes = &buf[..len];
        let header = Header::parse(bytes).ok_or(Errno::PROTO)?;
        let body = bytes.get(IN_HEADER..).ok_or(Errno::PROTO)?;
        let (fields, rest) = body.split_at(fields_len(header.opcode).min(body.len()));
        Ok(Some(Received {
            header,
            fields,
            rest,
        }))
    }
}

/// A request as it was read.
pub(super) struct Received<'a> {
    pub(super) header: Header,
    pub(super) fields: &'a [u8],
    pub(super) rest: &'a [u8],
}

/// A buffer for any request: the header and fields of a write are the longest beside data.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; DATA_MAX as usize + 4096]
}

/// Answers requests until the connection is over.
pub(super) fn serve(dev: Dev, fs: &MirrorFs) -> Result<(), Errno> {
    let dev = Arc::new(dev);
    let mut buf = buffer();
    while let Some(request) = dev.receive(&mut buf)? {
        let channel = Channel::Dev(Arc::clone(&dev));
        fs.dispatch(&request.header, request.fields, request.rest, channel);
    }
    Ok(())
}
