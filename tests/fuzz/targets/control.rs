//! The control socket: whoever can connect can send anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorfs::run::fuzz_message(bytes));
