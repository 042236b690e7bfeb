//! The mark's value: what is taken for a mark is written back as it was, and names nothing outside.
#![no_main]

use mirrorfs::mark::Mark;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some(mark) = Mark::decode(bytes) else {
        return;
    };
    assert_eq!(mark.encode(), bytes);
    if let Some(origin) = &mark.origin {
        let names = origin.as_bytes().split(|b| *b == b'/');
        assert!(
            origin.is_root()
                || names
                    .into_iter()
                    .all(|n| ![&b""[..], b".", b".."].contains(&n))
        );
    }
});
