//! What verify promises, on real trees.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::*;

/// Makes the same small tree on both sides, lets `change` disturb dst, and returns what is found.
fn found(change: impl Fn(&Path, &Path)) -> Vec<(String, Kind)> {
    let dir = tempfile::tempdir().expect("a directory");
    let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
    for side in [&src, &dst] {
        fs::create_dir_all(side.join("a/b")).expect("mkdir");
        fs::write(side.join("a/b/file"), vec![7u8; 300_000]).expect("write");
        fs::write(side.join("a/x"), b"x").expect("write");
        fs::hard_link(side.join("a/x"), side.join("a/y")).expect("link");
        symlink("x", side.join("a/l")).expect("symlink");
        let hole = fs::File::create(side.join("hole")).expect("create");
        hole.set_len(1 << 40).expect("truncate");
        still(side);
    }
    change(&src, &dst);
    let atime = |p: &Path| fs::metadata(p.join("a/x")).map(|m| (m.atime(), m.atime_nsec()));
    let atimes = (atime(&src).ok(), atime(&dst).ok());
    let mut all = Vec::new();
    let report = verify(&src, &dst, &VerifyOptions::default(), &mut |d| {
        all.push((d.path.display().to_string(), d.kind));
    })
    .expect("verify");
    assert_eq!(atimes, (atime(&src).ok(), atime(&dst).ok()));
    assert_eq!(report.differences, all.len() as u64);
    assert_eq!(report.is_equal(), all.is_empty());
    all.sort();
    all
}

/// Sets the same times everywhere below.
fn still(top: &Path) {
    for entry in fs::read_dir(top).expect("list").flatten() {
        if entry.file_type().expect("type").is_dir() {
            still(&entry.path());
        } else {
            quiet(&entry.path());
        }
    }
    quiet(top);
}

fn quiet(path: &Path) {
    let times = crate::meta::timestamps(
        crate::sys::stat::Time { sec: 1, nsec: 2 },
        crate::sys::stat::Time { sec: 3, nsec: 4 },
    );
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, flags).expect("utimensat");
}

fn one(path: &str, kind: Kind) -> Vec<(String, Kind)> {
    vec![(path.to_owned(), kind)]
}

#[test]
fn equal_trees_have_no_difference() {
    assert_eq!(found(|_, _| {}), []);
}

#[test]
fn one_changed_byte_of_a_file_with_the_same_size_and_mtime_is_found() {
    let at = found(|_, dst| {
        let mut bytes = vec![7u8; 300_000];
        bytes[299_999] = 8;
        fs::write(dst.join("a/b/file"), bytes).expect("write");
        still(dst);
    });
    assert_eq!(at, one("a/b/file", Kind::Content));
}

#[test]
fn data_in_a_hole_is_found() {
    let at = found(|_, dst| {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(dst.join("hole"));
        file.expect("open").write_at(b"x", 1 << 39).expect("write");
        still(dst);
    });
    assert_eq!(at, one("hole", Kind::Content));
}

#[test]
fn one_nanosecond_of_mtime_is_found() {
    let at = found(|_, dst| {
        let time = |nsec| crate::sys::stat::Time { sec: 3, nsec };
        let times = crate::meta::timestamps(time(4), time(5));
        rustix::fs::utimensat(
            rustix::fs::CWD,
            dst.join("a/b/file"),
            &times,
            rustix::fs::AtFlags::empty(),
        )
        .expect("utimensat");
    });
    assert_eq!(at, one("a/b/file", Kind::Mtime));
}

#[test]
fn mode_target_and_names_are_found() {
    let mode = found(|_, dst| {
        fs::set_permissions(dst.join("a/b"), fs::Permissions::from_mode(0o1777)).expect("chmod");
    });
    assert_eq!(mode, one("a/b", Kind::Mode));
    let target = found(|_, dst| {
        fs::remove_file(dst.join("a/l")).expect("unlink");
        symlink("y", dst.join("a/l")).expect("symlink");
        still(dst);
    });
    assert_eq!(target, one("a/l", Kind::Target));
    let names = found(|src, dst| {
        fs::rename(dst.join("a/b"), dst.join("a/c")).expect("rename");
        still(src);
        still(dst);
    });
    let want = [("a/b", Kind::OnlyInSrc), ("a/c", Kind::OnlyInDst)];
    assert_eq!(names, want.map(|(p, k)| (p.to_owned(), k)));
    let kinds = found(|_, dst| {
        fs::remove_file(dst.join("a/l")).expect("unlink");
        fs::create_dir(dst.join("a/l")).expect("mkdir");
        still(dst);
    });
    assert_eq!(kinds, one("a/l", Kind::Type));
}

#[test]
fn other_link_groups_are_found_both_ways() {
    let split = found(|_, dst| {
        fs::remove_file(dst.join("a/y")).expect("unlink");
        fs::write(dst.join("a/y"), b"x").expect("write");
        still(dst);
    });
    assert_eq!(split.len(), 1);
    assert_eq!(split[0].1, Kind::Links);
    let joined = found(|src, dst| {
        fs::remove_file(src.join("a/y")).expect("unlink");
        fs::write(src.join("a/y"), b"x").expect("write");
        still(src);
        still(dst);
    });
    assert_eq!(joined.len(), 1);
    assert_eq!(joined[0].1, Kind::Links);
}

#[test]
fn xattrs_are_compared_and_a_migration_that_has_not_finished_is_named() {
    let name = Name::new(b"file").expect("a name");
    let xattr = found(|_, dst| {
        let dir = host::open_dir(&dst.join("a/b")).expect("open");
        xattr::set(Target::At(dir.as_fd(), &name), c"user.k", b"v").expect("setxattr");
    });
    assert_eq!(xattr, one("a/b/file", Kind::Xattr));
    let control = found(|_, dst| {
        fs::create_dir(dst.join(".mirrorfs")).expect("mkdir");
        still(dst);
    });
    assert_eq!(control, one(".mirrorfs", Kind::NotFinished));
    let mark = found(|_, dst| {
        let dir = host::open_dir(dst).expect("open");
        MarkName::User
            .set(Target::Open(dir.as_fd()), &crate::mark::Mark::populated())
            .expect("setxattr");
    });
    assert_eq!(mark, one(".", Kind::NotFinished));
}

#[test]
fn a_directory_larger_than_a_batch_is_compared_whole() {
    let at = found(|src, dst| {
        for i in 0..3 * BATCH {
            fs::write(src.join(format!("a/b/{i}")), b"").expect("write");
            if i != 1500 {
                fs::write(dst.join(format!("a/b/{i}")), b"").expect("write");
            }
        }
        fs::write(dst.join("a/b/extra"), b"").expect("write");
        still(src);
        still(dst);
    });
    let want = [
        ("a/b/1500", Kind::OnlyInSrc),
        ("a/b/extra", Kind::OnlyInDst),
    ];
    assert_eq!(at, want.map(|(p, k)| (p.to_owned(), k)));
}
