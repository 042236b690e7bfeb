//! Manifest: what a tree was when it was copied, one line for each entry, with the BLAKE3 of each file.
//!
//! A file in the words of mtree(5) that only grows while a run goes on:
//!
//!   (absent) -> open    Writer::begin()   a header; of an older one all lines stay, for `Index`
//!   open     -> open    Writer::add()     a line for an entry that is done; a later line of a path counts
//!   open     -> ended   Writer::end()     only this run's lines, and a last one with their number and BLAKE3
//!
//! So a run that was killed leaves what it knew, and the next one need not read it again; who reads a
//! manifest sees whether its run came to its end, and whether somebody has changed it since.
//!
//! A digest is of bytes that were read from src, by the run whose metadata stand beside it, and src was
//! not changed meanwhile. Where that cannot be said the line has none.

mod digest;
mod index;
mod line;
mod reading;
mod stream;
mod writer;
mod xattrs;

pub use digest::{BLOCK, Digest, Feed, Tree, is_hashed};
pub use index::{Index, Trouble};
pub use line::{Entry, is_settled, is_settled_at};
pub use reading::Part;
pub use stream::Stream;
pub use writer::Writer;
pub use xattrs::{Became, Scope, Xattrs};

/// The first line: the format, for who reads any mtree(5).
const SIGNATURE: &[u8] = b"#mtree v2.0\n";
/// The second: what of ours it is, and its version.
const HEADER: &[u8] = b"# mirrorfs manifest 1\n";
/// What the second begins with, whatever the version.
const HEADER_ANY: &[u8] = b"# mirrorfs manifest ";
/// What the last line of a run that came to its end begins with.
const END: &[u8] = b"# end ";

#[cfg(test)]
mod tests;
