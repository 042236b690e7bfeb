//! The integration tests: the program as its users meet it, on real mounts and file systems.
//!
//! `fixture` makes scratch file systems and mounts, `nasty` awkward trees, `compare` says how two
//! trees differ, `raw` holds what is unsafe. A test that cannot run here says what is missing and
//! passes; under MIRRORFS_TEST_ALL=1 it fails. MIRRORFS_TEST_SEED repeats a random test.

#![allow(clippy::unwrap_used)]

mod adopt;
mod automount;
mod badsource;
mod bench;
mod changing;
mod cli;
mod compare;
mod concurrent;
mod control;
mod crash;
mod dev;
mod differential;
mod documents;
mod fds;
mod fidelity;
mod fixture;
mod full;
mod hostile;
mod huge;
mod keeper;
mod killed;
mod messages;
mod mixed;
mod mixed_src;
mod nasty;
mod native;
mod own;
mod pagecache;
mod prefetch;
mod proof;
mod proof_mount;
mod proof_xattrs;
mod quiet;
mod raw;
mod readahead;
mod ring;
mod rootless;
mod rootless_finish;
mod rsync;
mod salvage;
mod salvage_kept;
mod salvage_on;
mod salvage_users;
mod scanners;
mod scenes;
mod semantics;
mod service;
mod shards;
mod signals;
mod tidy;
mod unseen;
mod upgrade;
mod verifying;
