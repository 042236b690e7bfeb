//! Reading: a file, or a part of it, on its way into a digest. What is a hole counts as zeros, unread.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::{Feed, Tree};
use crate::error::Errno;
use crate::sys::{copy, fd};

/// A part of a file that is read from its beginning to its end.
pub struct Part<'a> {
    /// Open for reading.
    pub file: BorrowedFd<'a>,
    /// It has fewer blocks than bytes.
    pub sparse: bool,
    /// Where its bytes count; `None`: nobody wants a digest.
    pub hash: Option<(&'a Tree, &'a mut Feed)>,
}

impl Part<'_> {
    /// Where the next data of a range are. `None`: only a hole is left.
    pub fn data(&mut self, range: &Range<u64>) -> Result<Option<Range<u64>>, Errno> {
        if !self.sparse {
            return Ok(Some(range.clone()));
        }
        let data = copy::next_data(self.file, range.start, range.end)?;
        if let (None, Some((tree, feed))) = (&data, &mut self.hash) {
            tree.zeros(feed, range.end);
        }
        Ok(data)
    }

    /// Bytes that were read at an offset.
    pub fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        if let Some((tree, feed)) = &mut self.hash {
            tree.bytes(feed, offset, bytes);
        }
    }

    /// Reads the beginning of `data`, as much as `buf` takes; returns how much. 0: the file ends here.
    pub fn read(&mut self, data: &Range<u64>, buf: &mut [u8]) -> Result<usize, Errno> {
        let left = usize::try_from(data.end - data.start).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let n = fd::pread_all(self.file, &mut buf[..len], data.start)?;
        self.bytes(data.start, &buf[..n]);
        Ok(n)
    }

    /// Reads the next piece of a range; returns where to go on, and how much was read. Nothing, and not at the end:
    /// the file ends here, and there is no digest. The error names the call.
    pub fn step(
        &mut self,
        range: &Range<u64>,
        buf: &mut [u8],
    ) -> Result<(u64, usize), (&'static str, Errno)> {
        let Some(data) = self.data(range).map_err(|e| ("lseek", e))? else {
            return Ok((range.end, 0));
        };
        let n = self.read(&data, buf).map_err(|e| ("read", e))?;
        match n {
            0 => Ok((range.end, 0)),
            n => Ok((data.start + n as u64, n)),
        }
    }
}
