//! The handshake: the kernel says what it has, we say what we want of it.

use rustix::io::Errno;

use super::abi::{Fields, MAJOR, MINOR, init, opcode};
use super::dev::{self, DATA_MAX, Dev};
use super::ring;
use crate::sys::caps;

/// What both sides have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Opens may go to dst's files past us.
    pub(super) passthrough: bool,
    /// Requests come through io_uring.
    pub(super) ring: bool,
    /// The kernel can send requests again.
    pub(super) resend: bool,
}

/// What each kernel is asked for, as far as it has it.
const WANTED: [(u64, &str); 13] = [
    (init::ASYNC_READ, "ASYNC_READ"),
    (init::BIG_WRITES, "BIG_WRITES"),
    (init::MAX_PAGES, "MAX_PAGES"),
    (init::INIT_EXT, "INIT_EXT"),
    (init::ATOMIC_O_TRUNC, "ATOMIC_O_TRUNC"),
    (init::DONT_MASK, "DONT_MASK"),
    (init::POSIX_ACL, "POSIX_ACL"),
    (init::PARALLEL_DIROPS, "PARALLEL_DIROPS"),
    (init::DO_READDIRPLUS, "DO_READDIRPLUS"),
    (init::READDIRPLUS_AUTO, "READDIRPLUS_AUTO"),
    (init::CACHE_SYMLINKS, "CACHE_SYMLINKS"),
    (init::HANDLE_KILLPRIV_V2, "HANDLE_KILLPRIV_V2"),
    (init::ASYNC_DIO, "ASYNC_DIO"),
];

/// Requests that may wait in the background (readahead), and from how many on the kernel calls that
/// congestion.
const BACKGROUND_MAX: u16 = 64;

/// The kernel's side: struct fuse_init_in.
#[derive(Debug, Clone, Copy)]
struct Offer {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Offer {
    fn parse(mut f: Fields<'_>) -> Option<Offer> {
        let (major, minor) = (f.u32()?, f.u32()?);
        if major != MAJOR {
            // A later major version sends the first two fields, and asks again.
            return Some(Offer {
                major,
                minor,
                max_readahead: 0,
                flags: 0,
            });
        }
        let max_readahead = f.u32()?;
        let mut flags = u64::from(f.u32()?);
        if flags & init::INIT_EXT != 0 {
            flags |= u64::from(f.u32()?) << 32;
        }
        Some(Offer {
            major,
            minor,
            max_readahead,
            flags,
        })
    }
}

/// Answers INIT, the first request of a connection.
/// `ring`: our side of io_uring is ready.
pub(super) fn answer(dev: &Dev, ring: bool) -> Result<Agreed, Errno> {
    let mut buf = dev::buffer();
    loop {
        let request = dev.receive(&mut buf)?.ok_or(Errno::NOTCONN)?;
        let unique = request.header.unique;
        let offer = Offer::parse(Fields(request.fields));
        let Some(offer) = offer.filter(|_| request.header.opcode == opcode::INIT) else {
            dev.send(unique, Err(Errno::IO));
            return Err(Errno::PROTO);
        };
        if offer.major > MAJOR {
            let (reply, _) = agree(&offer, false, false);
            dev.send(unique, Ok((&reply[..8], &[])));
            continue;
        }
        // 7.12: the first with umask in create, which we rely on.
        if offer.major < MAJOR || offer.minor < 12 {
            dev.send(unique, Err(Errno::PROTO));
            return Err(Errno::PROTO);
        }
        for (_, name) in WANTED.iter().filter(|(flag, _)| offer.flags & flag == 0) {
            tracing::info!("this kernel's FUSE lacks {name}");
        }
        let (reply, agreed) = agree(&offer, caps::have_sys_admin(), ring);
        // Older kernels want a shorter answer.
        let len = if offer.minor < 23 { 24 } else { reply.len() };
        dev.send(unique, Ok((&reply[..len], &[])));
        return Ok(agreed);
    }
}

/// struct fuse_init_out, and what it means.
fn agree(offer: &Offer, may_pass: bool, ring: bool) -> ([u8; 64], Agreed) {
    let wanted = WANTED.iter().fold(0, |all, (flag, _)| all | flag);
    let mut flags = offer.flags & wanted;
    let passthrough = may_pass && offer.flags & init::PASSTHROUGH != 0;
    if passthrough {
        flags |= init::PASSTHROUGH;
    }
    let ring = ring && offer.flags & init::OVER_IO_URING != 0;
    if ring {
        flags |= init::OVER_IO_URING;
    }
    let page = rustix::param::page_size() as u32;
    let data_max = match flags & init::MAX_PAGES != 0 {
        true if ring => ring::DATA_MAX,
        true => DATA_MAX,
        false => 32 * page,
    };
    let mut out = [0u8; 64];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAJOR.to_ne_bytes());
    put(4, &MINOR.min(offer.minor).to_ne_bytes());
    put(8, &offer.max_readahead.to_ne_bytes());
    put(12, &(flags as u32).to_ne_bytes());
    put(16, &BACKGROUND_MAX.to_ne_bytes());
    put(18, &(BACKGROUND_MAX / 4 * 3).to_ne_bytes());
    put(20, &data_max.to_ne_bytes());
    put(24, &1u32.to_ne_bytes()); // Times to the nanosecond.
    put(28, &((data_max / page) as u16).to_ne_bytes());
    put(32, &((flags >> 32) as u32).to_ne_bytes());
    // Files on a plain file system; 2 would be on overlayfs.
    put(36, &u32::from(passthrough).to_ne_bytes());
    let resend = offer.flags & init::HAS_RESEND != 0;
    let agreed = Agreed {
        passthrough,
        ring,
        resend,
    };
    (out, agreed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_asked_for_that_the_kernel_did_not_offer() {
        let mut offer = Offer {
            major: MAJOR,
            minor: 31,
            max_readahead: 1 << 17,
            flags: init::ASYNC_READ | init::INIT_EXT | init::PASSTHROUGH,
        };
        let (reply, agreed) = agree(&offer, true, true);
        assert!(agreed.passthrough);
        let mut f = Fields(&reply);
        assert_eq!((f.u32(), f.u32()), (Some(MAJOR), Some(31)));
        assert_eq!(f.u32(), Some(1 << 17));
        let low = (init::ASYNC_READ | init::INIT_EXT) as u32;
        assert_eq!(f.u32(), Some(low));
        assert_eq!(reply[32..36], 32u32.to_ne_bytes(), "PASSTHROUGH, bit 37");
        assert_eq!(reply[36..40], 1u32.to_ne_bytes(), "max_stack_depth");
        assert!(
            !agree(&offer, false, false).1.passthrough,
            "without CAP_SYS_ADMIN"
        );
        offer.flags = 0;
        let (reply, agreed) = agree(&offer, true, true);
        assert!(!agreed.passthrough);
        assert_eq!(reply[12..16], [0; 4]);
        assert_eq!(reply[32..40], [0; 8]);
    }
}
