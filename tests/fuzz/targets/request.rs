//! A FUSE request: names and data in it come from users.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorfs::fuse::fuzz_request(bytes));
