//! Manifests: lines read back as they were written, digests of parts, files that are torn or changed.

use std::ffi::CString;

use proptest::prelude::*;
use rustix::fs::FileType;

use super::*;
use crate::sys::name::RelPath;
use crate::sys::stat::{FileKey, Time};

fn name() -> impl Strategy<Value = Vec<u8>> {
    let any = proptest::collection::vec(1u8.., 1..20);
    any.prop_filter("a name", |n| !n.contains(&b'/') && n != b"." && n != b"..")
}

fn path() -> impl Strategy<Value = RelPath> {
    let names = proptest::collection::vec(name(), 0..4);
    names.prop_map(|n| RelPath::from_bytes(&n.join(&b'/')).expect("a path"))
}

fn time() -> impl Strategy<Value = Time> {
    (any::<i64>(), 0..1_000_000_000u32).prop_map(|(sec, nsec)| Time { sec, nsec })
}

fn scope(all: bool) -> Scope {
    Scope {
        owners: all,
        all_xattrs: all,
    }
}

/// Names of all classes, with every byte; values that are short, and some that are not.
fn xattrs() -> impl Strategy<Value = Vec<(CString, Vec<u8>)>> {
    let classes = ["user.", "trusted.", "security.", "system.posix_acl_access"];
    let name = (
        prop::sample::select(classes.to_vec()),
        proptest::collection::vec(1u8.., 0..6),
    );
    let name = name.prop_map(|(class, rest)| [class.as_bytes(), &rest].concat());
    let name = name.prop_map(|name| CString::new(name).expect("no NUL"));
    let value = (
        proptest::collection::vec(any::<u8>(), 0..40),
        prop::sample::select(vec![1, 1, 1, 100]),
    );
    let value = value.prop_map(|(bytes, times)| bytes.repeat(times));
    proptest::collection::vec((name, value), 0..5)
}

fn entry() -> impl Strategy<Value = Entry> {
    let kinds = prop::sample::select(vec![
        FileType::RegularFile,
        FileType::Directory,
        FileType::Symlink,
        FileType::Fifo,
        FileType::Socket,
        FileType::CharacterDevice,
        FileType::BlockDevice,
    ]);
    let group = any::<(u32, u32, u32, u64)>().prop_map(|(n, major, minor, ino)| {
        let dev = (major, minor);
        (n, FileKey { dev, ino })
    });
    let option = proptest::option::of::<BoxedStrategy<Time>>;
    (
        (path(), kinds, proptest::option::of(0..0o10000u32)),
        any::<(Option<u32>, Option<u32>, Option<u64>, Option<(u32, u32)>)>(),
        (option(time().boxed()), option(time().boxed())),
        proptest::option::of(proptest::collection::vec(1u8.., 0..40)),
        proptest::option::of(group),
        any::<Option<Vec<u8>>>(),
        proptest::option::of((any::<bool>(), xattrs())),
    )
        .prop_map(
            |((path, kind, mode), ids, times, link, group, bytes, xattrs)| Entry {
                mode,
                uid: ids.0,
                gid: ids.1,
                size: ids.2,
                device: ids.3,
                time: times.0,
                ctime: times.1,
                link,
                group,
                digest: bytes.map(|b| Digest::of(&b)),
                xattrs: xattrs.map(|(all, read)| Xattrs::of(&read, scope(all))),
                ..Entry::bare(path, kind)
            },
        )
}

proptest! {
    #[test]
    fn an_entry_is_read_back_as_it_was_written(entry in entry()) {
        let mut line = Vec::new();
        entry.write(&mut line);
        prop_assert!(line.iter().all(|b| matches!(b, b' '..=b'~' | b'\n')));
        prop_assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        let read = Entry::parse(line.strip_suffix(b"\n").expect("an end"));
        prop_assert_eq!(read, Ok(Some(entry)));
    }

    #[test]
    fn any_line_is_read_or_refused_in_one_line(line in proptest::collection::vec(any::<u8>(), 0..80)) {
        if let Err(why) = Entry::parse(&line) {
            prop_assert!(!why.contains('\n'));
        }
    }
}

/// As `size` bytes that are nowhere the same.
fn bytes(size: usize) -> Vec<u8> {
    (0..size)
        .map(|i| (i ^ (i >> 8) ^ (i >> 17)) as u8)
        .collect()
}

#[test]
fn parts_in_any_order_have_the_digest_of_the_whole() {
    const B: usize = BLOCK as usize;
    let mut sizes = vec![0, 1, 1023, 1024, 1025, B - 1, B, B + 1, B + 1024];
    sizes.extend((2..=9).flat_map(|n| [n * B - 1, n * B, n * B + 1]));
    sizes.extend([13 * B + 70_000, 16 * B, 17 * B + 1]);
    for size in sizes {
        let bytes = bytes(size);
        let tree = Tree::new(size as u64);
        // Two blocks each, the last one first.
        for at in (0..size.div_ceil(2 * B)).rev() {
            assert!(tree.digest().is_none(), "{size}: not all is here");
            let begin = at * 2 * B;
            let mut feed = tree.feed(begin as u64);
            let mut offset = begin;
            // Pieces that do not end where blocks do.
            for piece in bytes[begin..size.min(begin + 2 * B)].chunks(300_001) {
                tree.bytes(&mut feed, offset as u64, piece);
                offset += piece.len();
            }
        }
        assert_eq!(tree.digest(), Some(Digest::of(&bytes)), "{size}");
    }
}

#[test]
fn what_is_not_fed_is_a_hole_before_other_bytes_and_nothing_at_the_end() {
    let size = 3 * BLOCK + 10;
    let mut all = vec![0; size as usize];
    all[(BLOCK + 5) as usize] = 1;
    let tree = Tree::new(size);
    let mut feed = tree.feed(0);
    tree.bytes(&mut feed, BLOCK + 5, &[1]);
    assert_eq!(tree.digest(), None);
    tree.zeros(&mut feed, size);
    assert_eq!(tree.digest(), Some(Digest::of(&all)));
}

#[test]
fn what_comes_in_disorder_or_beyond_the_end_has_no_digest() {
    let size = BLOCK + 10;
    let all = bytes(size as usize);
    let tree = Tree::new(size);
    let mut feed = tree.feed(0);
    tree.bytes(&mut feed, 0, &all[..100]);
    tree.bytes(&mut feed, 50, &all[50..]);
    assert_eq!(tree.digest(), None);
    let mut feed = tree.feed(7);
    tree.bytes(&mut feed, 7, &all[7..]);
    assert_eq!(tree.digest(), None);
    let mut feed = tree.feed(0);
    tree.bytes(&mut feed, 0, &[&all[..], b"x"].concat());
    assert_eq!(tree.digest(), None);
}

fn of(path: &str, size: u64) -> Entry {
    Entry {
        size: Some(size),
        ..Entry::bare(
            RelPath::from_bytes(path.as_bytes()).expect("a path"),
            FileType::RegularFile,
        )
    }
}

#[test]
fn the_last_line_of_a_path_counts_and_a_whole_run_leaves_its_own_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let run = |entries: &[Entry], whole| {
        let (writer, index, bad) = Writer::begin(&path).expect("begin");
        assert!(bad.is_none());
        entries.iter().for_each(|e| writer.add(e));
        writer.end(whole).expect("end");
        index
    };
    let a = RelPath::from_bytes(b"a").expect("a path");
    let size = |index: &Index, path: &RelPath| index.get(path).expect("get").and_then(|e| e.size);
    assert_eq!(size(&run(&[of("a", 1), of("b", 2)], true), &a), None);
    let index = Index::open(&path).expect("open");
    assert!(index.has_ended());
    // A run that did not come to its end: both count.
    let before = run(&[of("a", 7)], false);
    assert_eq!(size(&before, &a), Some(1));
    let index = Index::open(&path).expect("open");
    assert!(!index.has_ended());
    assert_eq!(size(&index, &a), Some(7));
    let mut rest = Vec::new();
    index.rest(|e| rest.push(e)).expect("rest");
    assert_eq!(rest, [of("b", 2)]);
    // One that did.
    run(&[of("a", 8)], true);
    let index = Index::open(&path).expect("open");
    assert!(index.has_ended());
    let mut all = Vec::new();
    index.rest(|e| all.push(e)).expect("rest");
    assert_eq!(all, [of("a", 8)]);
}

#[test]
fn what_is_wrong_with_a_manifest_is_told_with_its_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let head = String::from_utf8([SIGNATURE, HEADER].concat()).expect("text");
    let told = |text: &str| {
        std::fs::write(&path, text).expect("write");
        let told = Index::open(&path).err().map(|t| t.to_string());
        let told = told.map(|t| t.split_once("\": ").expect("a path").1.to_owned());
        told.unwrap_or_default()
    };
    assert_eq!(told("hello\n"), "it is not a manifest of mirrorfs");
    assert_eq!(
        told("#mtree v2.0\n. type=dir\n"),
        "it is not a manifest of mirrorfs"
    );
    assert_eq!(
        told("#mtree v2.0\n# mirrorfs manifest 2\n"),
        "line 2: it is of another version of mirrorfs"
    );
    let with = |line: &str| told(&format!("{head}. type=dir\n{line}\n"));
    assert_eq!(with("./a size=1"), "line 4: it has no type=");
    assert_eq!(
        with("./a type=file size=x"),
        "line 4: \"size\": no such value: \"x\""
    );
    assert_eq!(
        with("./a/../b type=file"),
        "line 4: not a path below the root, ./...: \"./a/../b\""
    );
    assert_eq!(
        with("./a\\9 type=file"),
        "line 4: no such path: \"./a\\x5c9\""
    );
    assert_eq!(
        with("./a type=file xattrs=some"),
        "line 4: \"xattrs\": no such value: \"some\""
    );
    assert_eq!(
        with("./a type=file xattrs=all xattr.user.a=b"),
        "line 4: \"xattr.user.a\": no such value: \"b\""
    );
    assert_eq!(with(""), "");
    assert_eq!(with("./a type=file optional sha256digest=0"), "");
    // Torn: a run was killed.
    assert_eq!(told(&format!("{head}. type=dir\n./a type=fi")), "");
    // Zeros: a power cut.
    let zeros = "\0".repeat(3);
    assert_eq!(
        with(&format!("{zeros} type=file")),
        "line 4: not a path below the root, ./...: \"\\x00\\x00\\x00\""
    );
}

#[test]
fn a_manifest_that_somebody_has_changed_is_not_believed() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let (writer, _, _) = Writer::begin(&path).expect("begin");
    writer.add(&of("a", 1));
    writer.end(true).expect("end");
    drop(writer);
    let text = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, text.replace("size=1", "size=2")).expect("write");
    let told = Index::open(&path)
        .map(|_| ())
        .expect_err("refused")
        .to_string();
    assert!(
        told.ends_with("line 4: the lines before it were changed since they were written"),
        "{told}"
    );
    // The next run knows nothing: which of the lines it was nobody can say.
    let (writer, index, bad) = Writer::begin(&path).expect("begin");
    assert_eq!(bad.map(|b| b.line), Some(4));
    let a = RelPath::from_bytes(b"a").expect("a path");
    assert!(index.get(&a).expect("get").is_none());
    writer.add(&of("b", 1));
    writer.end(true).expect("end");
    drop(writer);
    assert!(Index::open(&path).expect("open").has_ended());
}

#[test]
fn two_runs_do_not_write_one_manifest() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let _first = Writer::begin(&path).expect("begin");
    let told = Writer::begin(&path)
        .map(|_| ())
        .expect_err("refused")
        .to_string();
    assert!(told.ends_with("another run is writing it"), "{told}");
}

fn attr(name: &str, value: &[u8]) -> (CString, Vec<u8>) {
    (CString::new(name).expect("no NUL"), value.to_vec())
}

#[test]
fn xattrs_are_words_that_other_tools_know_and_say_what_became_of_each() {
    let read = [
        attr("user.note", b"hello"),
        attr("user.a=b c", b""),
        attr("user.long", &[7; 5000]),
        attr("system.posix_acl_access", b"acl"),
        attr("trusted.t", b"t"),
        attr("btrfs.compression", b"zstd"),
    ];
    let mut entry = of("a", 1);
    entry.xattrs = Some(Xattrs::of(&read, scope(true)));
    let mut line = Vec::new();
    entry.write(&mut line);
    let long = blake3::hash(&[7; 5000]).to_hex();
    let want = format!(
        "./a type=file size=1 xattrs=all xattr.system.posix_acl_access=YWNs xattr.trusted.t=dA== \
         xattr.user.a\\075b\\040c= xattrblake3.user.long={long} xattr.user.note=aGVsbG8=\n"
    );
    assert_eq!(String::from_utf8(line).expect("text"), want);

    let xattrs = entry.xattrs.expect("xattrs");
    let became = |now: &[(CString, Vec<u8>)], all| {
        let all = xattrs.compare(now, scope(all)).into_iter();
        all.map(|(name, became)| (String::from_utf8(name).expect("text"), became))
            .collect::<Vec<_>>()
    };
    assert_eq!(became(&read, true), []);
    let now = [
        attr("user.a=b c", b"x"),
        attr("user.long", &[7; 5001]),
        attr("system.posix_acl_access", b"acl"),
        attr("security.new", b""),
    ];
    let all = [
        ("trusted.t", Became::Gone),
        ("user.a=b c", Became::Other),
        ("user.long", Became::Other),
        ("user.note", Became::Gone),
        ("security.new", Became::New),
    ];
    assert_eq!(became(&now, true), all.map(|(n, b)| (n.to_owned(), b)));
    // A user sees no others.
    let users = [all[1], all[2], all[3]];
    assert_eq!(became(&now, false), users.map(|(n, b)| (n.to_owned(), b)));
    assert!(xattrs.has_root_s());
    // Whoever could not see them has not said that they are not there.
    let xattrs = Xattrs::of(&read, scope(false));
    assert!(!xattrs.has_root_s());
    assert_eq!(xattrs.compare(&read, scope(true)), []);
}

#[test]
fn a_line_with_the_longest_list_of_xattrs_is_a_line() {
    // listxattr(2) gives 64 KiB at most: names of two bytes and more, each byte four of the line.
    let names = (0u32..8192).map(|n| {
        [
            b"user.".as_slice(),
            &[128 + (n >> 6) as u8, 128 + (n & 63) as u8],
        ]
        .concat()
    });
    let read: Vec<_> = names
        .map(|name| (CString::new(name).expect("no NUL"), vec![1; 2000]))
        .collect();
    let mut entry = of("a", 1);
    entry.xattrs = Some(Xattrs::of(&read, scope(true)));
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let (writer, _, _) = Writer::begin(&path).expect("begin");
    writer.add(&entry);
    writer.end(true).expect("end");
    let index = Index::open(&path).expect("open");
    assert_eq!(index.get(&entry.path).expect("get"), Some(entry));
}

#[test]
fn a_child_that_has_the_file_open_still_does_not_keep_the_next_run_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("manifest");
    let (writer, _, _) = Writer::begin(&path).expect("begin");
    // What fork(2) gives a child until it has become another program.
    let same = writer.same_open_file();
    writer.end(true).expect("end");
    drop(writer);
    let (writer, _, _) = Writer::begin(&path).expect("begin again");
    drop((same, writer));
}
