//! mirrorfs: a copy-on-access mirror filesystem.
//!
//! src is the tree copied from, dst the tree copied into. A dst entry that is not all here yet is
//! pending and carries a mark (an xattr). A directory is populated (placeholders for all its
//! entries), a file is hydrated (its data brought into its placeholder), on first access or by the
//! walker. docs/ARCHITECTURE.md has the table of floors that a module may import from.

pub mod cli;
pub mod config;
pub mod crew;
pub mod error;
pub mod filter;
pub mod gate;
mod locks;
pub mod progress;
pub mod ranges;
pub mod throttle;

#[allow(unsafe_code)]
pub mod sys;

pub mod engine;
pub mod links;
pub mod manifest;
pub mod mark;
pub mod meta;
pub mod mirror;
pub mod pull;
pub mod walk;

pub mod fuse;
pub mod native;
pub mod run;
pub mod sync;
pub mod verify;
