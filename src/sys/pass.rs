//! Messages of fixed size with file descriptors, over a Unix socket of whole packets.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::Result;

/// Bytes of a message.
pub const LEN: usize = 16;

fn socket() -> Result<OwnedFd> {
    let (unix, packets) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socket_with(unix, packets, SocketFlags::CLOEXEC, None)
}

/// A name in an open directory that may lie too deep for an address.
fn address(dir: BorrowedFd<'_>, name: &str) -> Result<SocketAddrUnix> {
    use std::os::fd::AsRawFd;
    SocketAddrUnix::new(PathBuf::from(format!(
        "/proc/self/fd/{}/{name}",
        dir.as_raw_fd()
    )))
}

/// Two ends.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let (unix, packets) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socketpair(unix, packets, SocketFlags::CLOEXEC, None)
}

/// Listens under a name that is free.
pub fn listen(dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::bind(&socket, &address(dir, name)?)?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// Connects. ECONNREFUSED when nobody listens any more.
pub fn connect(dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &address(dir, name)?)?;
    Ok(socket)
}

/// The next one who connects, and his process, if he is the user that we are.
pub fn accept(listener: BorrowedFd<'_>) -> Result<Option<(OwnedFd, i32)>> {
    let socket = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?;
    let peer = rustix::net::sockopt::socket_peercred(&socket)?;
    let ours = peer.uid == rustix::process::geteuid();
    Ok(ours.then_some((socket, peer.pid.as_raw_pid())))
}

/// Sends one message and, with it, some fds. EAGAIN when there is no room and `wait` is false.
pub fn send(
    to: BorrowedFd<'_>,
    message: &[u8; LEN],
    fds: &[BorrowedFd<'_>],
    wait: bool,
) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let mut flags = SendFlags::NOSIGNAL;
    flags.set(SendFlags::DONTWAIT, !wait);
    let parts = [IoSlice::new(message)];
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(to, &parts, &mut control, flags)).map(|_| ())
}

/// Takes one message; `None`: the other end is gone.
pub fn receive(from: BorrowedFd<'_>) -> Result<Option<([u8; LEN], Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut message = [0; LEN];
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut message)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(from.as_fd(), &mut parts, &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            other => break other?.bytes,
        }
    };
    let fds = control.drain().flat_map(|part| match part {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    Ok((got == LEN).then_some((message, fds)))
}
