//! The ledger after a crash: any part of it may be missing or torn.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    thread_local!(static DIR: tempfile::TempDir = tempfile::tempdir().expect("a directory"));
    DIR.with(|dir| {
        let control = dir.path().join(".mirrorfs");
        std::fs::create_dir_all(&control).expect("mkdir");
        std::fs::write(control.join("ledger"), bytes).expect("write");
        mirrorfs::mirror::read_ledger(dir.path()).expect("what is torn is skipped");
    });
});
