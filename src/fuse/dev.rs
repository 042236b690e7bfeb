//! The transport over /dev/fuse: a thread reads a request, writes the answer where it was read, and
//! reads the next.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use super::MirrorFs;
use super::abi::{
    IN_HEADER, NOTIFY_INVAL_INODE, NOTIFY_RESEND, NOTIFY_RETRIEVE, OUT_HEADER, opcode,
};
use super::reply::Channel;
use super::request::{Header, fields_len};
use crate::mirror::{Ino, Mirror};
use crate::sys::fusedev;

/// Largest data of one request. More gains nothing and costs a buffer per thread.
pub(super) const DATA_MAX: u32 = 1 << 20;

/// How long a thread leaves forgets alone after one, where all that somebody waits for comes through
/// io_uring: to wake a thread for each costs whoever deletes a file as much as the request for it.
/// Signals to those who wait come here too, and are that late.
const REST: Duration = Duration::from_millis(5);

/// Numbers for requests that we have the kernel make. Its own count up from 2, and will not come here.
static NEXT: AtomicU64 = AtomicU64::new(1 << 62);

/// The number of the next request of our own.
pub(super) fn next_of_our_own() -> u64 {
    NEXT.load(Ordering::Relaxed)
}

/// The numbers below this one were given by the program before us.
pub(super) fn begin_at(number: u64) {
    NEXT.fetch_max(number, Ordering::Relaxed);
}

/// struct fuse_out_header.
pub(super) fn out_header(len: usize, errno: Option<Errno>, unique: u64) -> [u8; OUT_HEADER] {
    let error = errno.map_or(0, |e| -e.raw_os_error());
    let mut header = [0u8; OUT_HEADER];
    header[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// One open /dev/fuse.
pub(super) struct Dev {
    fd: Arc<OwnedFd>,
    /// Who is to know that a request is answered.
    told: Option<Arc<Mirror>>,
}

impl Dev {
    pub(super) fn new(fd: OwnedFd) -> Dev {
        Dev::shared(Arc::new(fd))
    }

    /// One whose fd others hold too.
    pub(super) fn shared(fd: Arc<OwnedFd>) -> Dev {
        Dev { fd, told: None }
    }

    /// It tells the mirror of each answer, where that is to be known.
    fn telling(mut self, mirror: &Arc<Mirror>) -> Dev {
        self.told = mirror.board().map(|_| Arc::clone(mirror));
        self
    }

    /// Another one of the same connection: requests are answered where they were read.
    pub(super) fn another(&self) -> Result<Dev, Errno> {
        fusedev::clone(self.fd.as_fd()).map(Dev::new)
    }

    pub(super) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Answers a request: the two parts of an answer, or an errno.
    pub(super) fn send(&self, unique: u64, result: Result<(&[u8], &[u8]), Errno>) {
        let (fixed, data) = result.unwrap_or_default();
        let len = OUT_HEADER + fixed.len() + data.len();
        let header = out_header(len, result.err(), unique);
        if let Err(errno) = fusedev::write(self.fd.as_fd(), [&header, fixed, data]) {
            // ENOENT: the request is gone (the connection was aborted). Nobody waits.
            tracing::debug!("reply to request {unique}: {errno}");
        }
        if let Some(mirror) = &self.told {
            mirror.answered(unique);
        }
    }

    /// Tells the kernel that the attributes it has of an inode are void. An inode that it no longer
    /// has is no error.
    pub(super) fn void_attributes(&self, ino: Ino) {
        let mut body = [0u8; 24];
        body[..8].copy_from_slice(&ino.to_ne_bytes());
        // A negative offset: attributes only.
        body[8..16].copy_from_slice(&(-1i64).to_ne_bytes());
        if let Err(errno) = self.notify(NOTIFY_INVAL_INODE, &body) {
            tracing::debug!("invalidate inode {ino}: {errno}");
        }
    }

    /// Has the kernel make a request (NOTIFY_REPLY) on the calling thread's CPU: nothing of the inode's
    /// is asked for, and nobody waits for the answer. EINVAL: it must be a regular file, see
    /// `own`; ENOENT: the kernel does not have the inode.
    pub(super) fn ask_for_a_request(&self, ino: Ino) -> Result<(), Errno> {
        let unique = NEXT.fetch_add(2, Ordering::Relaxed);
        let mut body = [0u8; 32];
        body[..8].copy_from_slice(&unique.to_ne_bytes());
        body[8..16].copy_from_slice(&ino.to_ne_bytes());
        self.notify(NOTIFY_RETRIEVE, &body)
    }

    /// Has the kernel send again, to whoever reads next, what was read and not answered.
    pub(super) fn resend(&self) -> Result<(), Errno> {
        self.notify(NOTIFY_RESEND, &[])
    }

    fn notify(&self, code: i32, body: &[u8]) -> Result<(), Errno> {
        // A header without a request: the errno's place says what it is about.
        let mut header = out_header(OUT_HEADER + body.len(), None, 0);
        header[4..8].copy_from_slice(&code.to_ne_bytes());
        fusedev::write(self.fd.as_fd(), [&header, body, &[]])
    }

    /// Takes the next request. `None`: the connection is over.
    pub(super) fn receive<'a>(&self, buf: &'a mut [u8]) -> Result<Option<Received<'a>>, Errno> {
        let Some(len) = fusedev::read(self.fd.as_fd(), buf)? else {
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
    let dev = Arc::new(dev.telling(&fs.shared.mirror));
    let mut buf = buffer();
    if dev.told.is_some() {
        // Every page is there: a thread that is killed takes a request whole. The kernel would not give
        // it a page any more, and end the request with EIO.
        buf.iter_mut().step_by(512).for_each(|byte| *byte = 1);
    }
    while let Some(request) = dev.receive(&mut buf)? {
        let channel = Channel::Dev(Arc::clone(&dev));
        fs.dispatch(&request.header, request.fields, request.rest, channel);
        let forgets = matches!(request.header.opcode, opcode::FORGET | opcode::BATCH_FORGET);
        if forgets && fs.shared.has_ring() {
            std::thread::sleep(REST);
        }
    }
    Ok(())
}
