//! rsync's filter rules: whatever they say, they are read or refused, and asked about any name.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use mirrorfs::config::FilterArg;
use mirrorfs::filter::{Filter, How, Purpose};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // Rules, a merge file, a path: three parts.
    let mut parts = data.splitn(3, |b| *b == 0xff);
    let mut part = || parts.next().unwrap_or_default();
    let (rules, file, path) = (part(), part(), part());
    let args: Vec<_> = rules
        .split(|b| *b == b'\n')
        .enumerate()
        .map(|(n, rule)| {
            let rule = OsString::from_vec(rule.to_vec());
            match n % 4 {
                0 | 1 => FilterArg::Rule(rule),
                2 => FilterArg::Exclude(rule),
                _ => FilterArg::PerDir,
            }
        })
        .collect();
    let how = How {
        delete_excluded: data.len() % 2 == 0,
        from0: data.len() % 3 == 0,
    };
    let mut read = |_: &Path| Ok(Some(file.to_vec()));
    let Ok(filter) = Filter::new(&args, how, &mut read) else {
        return;
    };
    for purpose in [Purpose::Copy, Purpose::Remove] {
        let Ok(Some(mut scope)) = filter.scope(purpose, Path::new("/a/b"), &mut read) else {
            continue;
        };
        let mut at = 0;
        for (end, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            let Ok(entered) = scope.enter(&path[..at], &mut read) else {
                return;
            };
            scope = entered;
            assert_eq!(
                scope.excludes(&path[..end], true),
                scope.excludes(&path[..end], true)
            );
            at = end;
        }
        for is_dir in [false, true] {
            let (excludes, keeps) = (scope.excludes(path, is_dir), scope.keeps(path, is_dir));
            // Without perishable rules both are the same question.
            assert!(excludes == keeps || rules.contains(&b'p') || file.contains(&b'p'));
        }
    }
});
