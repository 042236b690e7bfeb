//! A manifest: whatever is in the file, it is read or refused in one line, and asked about any path.
#![no_main]

use std::io::Write;

use mirrorfs::manifest::{Entry, Index, Scope};
use mirrorfs::sys::name::RelPath;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // A line alone: what is read is written and read back as it was.
    match Entry::parse(data) {
        Ok(Some(entry)) => {
            let mut line = Vec::new();
            entry.write(&mut line);
            let line = line.strip_suffix(b"\n").expect("an end");
            if let Some(xattrs) = &entry.xattrs {
                // Against what an inode may have: nothing, and one that is there by chance.
                let now = [(c"user.a".to_owned(), b"a".to_vec())];
                for (owners, all_xattrs) in [(true, true), (false, false)] {
                    let scope = Scope { owners, all_xattrs };
                    let few = xattrs.compare(&now, scope).len();
                    assert!(few <= xattrs.compare(&[], scope).len() + 1);
                }
            }
            assert_eq!(Entry::parse(line), Ok(Some(entry)));
        }
        Ok(None) => {}
        Err(why) => assert!(!why.contains('\n'), "{why:?}"),
    }
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    // Most bytes are no header; those that are one come from the corpus.
    if data.first() != Some(&b'!') {
        let header = b"#mtree v2.0\n# mirrorfs manifest 1\n";
        file.write_all(header).expect("write");
    }
    file.write_all(data).expect("write");
    match Index::open(file.path()) {
        Ok(index) => {
            let mut paths = Vec::new();
            index.rest(|entry| paths.push(entry.path)).expect("read");
            for path in paths {
                assert!(index.get(&path).expect("read").is_some());
            }
            let none = RelPath::from_bytes(b"no such path, hopefully").expect("a path");
            let _ = index.get(&none); // There or not.
        }
        Err(trouble) => assert!(!trouble.to_string().contains('\n'), "{trouble}"),
    }
});
