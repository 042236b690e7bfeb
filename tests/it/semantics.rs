//! Semantics: one test for each promise of docs/SEMANTICS.md, named as the promise is.
//!
//! Its headings: Before anything was copied / Reading / Writing / Names / Metadata / Links /
//! Owners and permissions / Locks, mappings and direct I/O / Space / The mark and the control
//! directory / Mounting over dst, and going away.
//!
//! Most promises are "as on a plain file system". `same_as_plain` checks that: it makes the same
//! change on a mount where everything is pending, on one where everything is here, and on a plain
//! copy, wants the same answers, and compares the trees after `finish`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FlockOperation, RenameFlags, SeekFrom as Seek2, Timespec,
    Timestamps, XattrFlags,
};

use crate::compare::{self, Ignore};
use crate::fixture::{
    self, CONTROL, LARGE, LIMIT, LoopFs, MARK, Mounted, Scratch, World, as_user, bytes,
    can_mount_on, find_program, fuse_mount_at, is_marked, mirrorfs, mounts, need, run, shell_as,
    wait_until,
};
use crate::nasty::{At, acl, named_acl};
use crate::raw::{self, Map, Page};

/// A world on a small ext4, src filled by the test.
fn world(fill: impl FnOnce(&At)) -> Option<World> {
    if !can_mount_on("ext4") {
        return None;
    }
    let fs = LoopFs::sized("ext4", 3 << 30);
    let w = World::from(fs.dir("src"), fs.dir("dst"), vec![fs]);
    fill(&At::open(&w.src));
    Some(w)
}

/// "ok", a value, or the errno's name.
fn told<T: ToString>(result: io::Result<T>) -> String {
    match result {
        Ok(value) => value.to_string(),
        Err(e) => rustix::io::Errno::from_io_error(&e).map_or(e.to_string(), |e| e.to_string()),
    }
}

/// Like `told`, for what has no value.
fn done(result: io::Result<()>) -> String {
    told(result.map(|()| "ok"))
}

fn same_as_plain(fill: impl FnOnce(&At), change: impl Fn(&Path) -> String) {
    let Some(w) = world(fill) else { return };
    let plain = w.src.with_file_name("plain");
    run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
    let want = change(&plain);
    let before = w.src_state();
    let here = World::from(w.src.clone(), w.dst.with_file_name("here"), vec![]);
    fs::create_dir(&here.dst).unwrap();
    for (world, m, state) in [
        (&w, w.mount_lazy(), "pending"),
        (&here, here.mount(), "here"),
    ] {
        if state == "here" {
            m.wait_complete();
        }
        assert_eq!(want, change(&m.at), "answers while everything is {state}");
        // The mount shows the tree as the plain directory does, before and after its end.
        let ignore = Ignore {
            recent_mtime: true,
            ..Ignore::default()
        };
        let plain = compare::manifest(&plain);
        let seen = compare::manifest_without_content(&m.at);
        let no_links = Ignore {
            links: true,
            allocated: true,
            ..ignore
        };
        compare::expect_equal_with(&plain, &seen, no_links);
        m.finish_rest();
        world.expect_no_trace();
        compare::expect_equal_with(&plain, &compare::manifest(&world.dst), ignore);
        w.expect_src_untouched(&before);
    }
}

impl Mounted {
    /// Reads what is still pending, as nobody else may, and finishes.
    #[track_caller]
    fn finish_rest(self) {
        let pending = self.status()["state"] != "COMPLETE";
        if pending {
            compare::manifest(&self.at);
        }
        self.finish();
    }
}

fn set_times(path: &Path, sec: i64, nsec: i64) -> io::Result<()> {
    let t = Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    };
    let times = Timestamps {
        last_access: t,
        last_modification: t,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn set_xattr(path: &Path, key: &str, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(
        path,
        key,
        value,
        XattrFlags::empty(),
    )?)
}

fn get_xattr(path: &Path, key: &str) -> io::Result<String> {
    let mut value = [0; 256];
    let n = rustix::fs::lgetxattr(path, key, &mut value)?;
    Ok(value[..n].escape_ascii().to_string())
}

/// A file, a directory of files, and a larger file.
fn some_files(d: &At) {
    d.file("f", &bytes(1, 30_000));
    d.file("g", &bytes(2, 5_000));
    d.file("large", &bytes(3, LARGE + 70_000));
    let sub = d.dir("dir");
    sub.file("a", b"a");
    sub.file("b", &bytes(4, 70_000));
    sub.dir("deeper").file("c", b"c");
    for name in [
        "f",
        "g",
        "large",
        "dir/a",
        "dir/b",
        "dir/deeper/c",
        "dir/deeper",
        "dir",
        ".",
    ] {
        d.stamp(name, 1_000_000_000, 123_456_789);
    }
}

// Before anything was copied.

#[test]
fn looking_at_a_pending_file_shows_srcs_size_blocks_and_holes_and_copies_nothing() {
    let Some(w) = world(|d| {
        d.sparse(
            "holes",
            9 << 20,
            &[(1 << 20, &bytes(1, 1 << 20)), (8 << 20, b"end")],
        );
        d.file("f", &bytes(2, 50_000));
    }) else {
        return;
    };
    let m = w.mount_lazy();
    for name in ["holes", "f"] {
        let (a, b) = (
            w.src.join(name).metadata().unwrap(),
            m.path(name).metadata().unwrap(),
        );
        assert_eq!(
            (a.len(), a.blocks(), a.mtime_nsec()),
            (b.len(), b.blocks(), b.mtime_nsec())
        );
        assert!(is_marked(&w.dst.join(name)), "{name} should be pending");
        assert_eq!(
            w.dst.join(name).metadata().unwrap().blocks(),
            0,
            "{name} was copied"
        );
    }
    let (a, b) = (
        File::open(w.src.join("holes")).unwrap(),
        File::open(m.path("holes")).unwrap(),
    );
    for at in [0, 1 << 20, 3 << 20, 8 << 20] {
        for seek in [Seek2::Data(at), Seek2::Hole(at)] {
            assert_eq!(
                rustix::fs::seek(&a, seek),
                rustix::fs::seek(&b, seek),
                "{seek:?}"
            );
        }
    }
    let past = Seek2::Data(9 << 20);
    assert_eq!(rustix::fs::seek(&a, past), rustix::fs::seek(&b, past));
}

#[test]
fn looking_at_an_unpopulated_directory_shows_its_metadata_and_places_none_of_its_entries() {
    let no = u32::MAX;
    let default = acl(&[(1, 7, no), (4, 5, no), (32, 0, no)]);
    let Some(w) = world(|d| {
        let dir = d.dir("dir");
        for i in 0..500 {
            dir.file(format!("entry {i}"), b"x");
        }
        dir.xattr(".", "user.x", b"of the directory");
        dir.xattr(".", "system.posix_acl_default", &default);
    }) else {
        return;
    };
    let m = w.mount_lazy();
    let (a, b) = (w.src.join("dir"), m.path("dir"));
    // What `ls -l` asks about every directory that it lists.
    for key in [
        "security.selinux",
        "system.posix_acl_access",
        "system.posix_acl_default",
        "user.x",
    ] {
        assert_eq!(told(get_xattr(&a, key)), told(get_xattr(&b, key)), "{key}");
    }
    let list = |path: &Path| {
        let mut names = [0; 4096];
        let n = rustix::fs::llistxattr(path, &mut names).unwrap();
        let mut names: Vec<_> = names[..n].split(|b| *b == 0).map(<[u8]>::to_vec).collect();
        names.sort();
        names
    };
    assert_eq!(list(&a), list(&b));
    let (x, y) = (a.metadata().unwrap(), b.metadata().unwrap());
    assert_eq!(
        (x.mode(), x.mtime(), x.mtime_nsec()),
        (y.mode(), y.mtime(), y.mtime_nsec())
    );
    assert_eq!(
        fs::read_dir(w.dst.join("dir")).unwrap().count(),
        0,
        "nobody looked inside"
    );
}

#[test]
fn inode_numbers_stay_the_same_through_hydration_restart_and_finish() {
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    let names = ["f", "large", "dir", "dir/a", "dir/deeper/c"];
    let inos = |root: &Path| names.map(|n| root.join(n).symlink_metadata().unwrap().ino());
    let m = w.mount_lazy();
    let first = inos(&m.at);
    fs::read(m.path("f")).unwrap();
    assert_eq!(first, inos(&m.at), "after hydration");
    m.unmount();
    let m = w.mount();
    assert_eq!(first, inos(&m.at), "after restart");
    m.finish();
    assert_eq!(first, inos(&w.dst), "after finish");
}

// Reading.

#[test]
pub(crate) fn reading_a_pending_file_gives_srcs_bytes_and_leaves_them_in_dst() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    for name in ["f", "dir/b", "dir/deeper/c"] {
        assert_eq!(
            fs::read(m.path(name)).unwrap(),
            fs::read(w.src.join(name)).unwrap(),
            "{name}"
        );
        wait_until("the mark goes", LIMIT, || !is_marked(&w.dst.join(name)));
        assert_eq!(
            fs::read(w.dst.join(name)).unwrap(),
            fs::read(w.src.join(name)).unwrap()
        );
    }
    assert!(is_marked(&w.dst.join("g")), "nobody asked for g");
}

#[test]
pub(crate) fn the_first_bytes_of_a_large_file_come_before_the_whole_and_the_rest_follows() {
    let size = 600 << 20;
    let chunk = bytes(5, 1 << 20);
    let Some(w) = world(|d| {
        let pieces: Vec<_> = (0..600).map(|i| (i << 20, &chunk[..])).collect();
        d.sparse("large", size, &pieces);
    }) else {
        return;
    };
    let m = w.mount_lazy();
    let file = File::open(m.path("large")).unwrap();
    let mut buf = [0; 4096];
    file.read_exact_at(&mut buf, 0).unwrap();
    assert!(is_marked(&w.dst.join("large")), "the whole file came first");
    assert_eq!(buf, chunk[..4096]);
    let mut random = fixture::Random::seeded(2);
    for _ in 0..200 {
        let at = random.below(size - 4096);
        file.read_exact_at(&mut buf, at).unwrap();
        let want: Vec<u8> = (at..at + 4096)
            .map(|i| chunk[(i % (1 << 20)) as usize])
            .collect();
        assert!(buf[..] == want[..], "wrong bytes at {at}");
    }
    wait_until("the rest follows", LIMIT, || {
        !is_marked(&w.dst.join("large"))
    });
    drop(file);
    m.finish();
    w.expect_finished_copy();
}

#[test]
fn a_reader_of_a_file_that_was_deleted_while_it_was_pending_still_reads_srcs_bytes() {
    same_as_plain(some_files, |at| {
        let file = File::open(at.join("large")).unwrap();
        fs::remove_file(at.join("large")).unwrap();
        let mut all = Vec::new();
        (&file).read_to_end(&mut all).unwrap();
        assert!(all == bytes(3, LARGE + 70_000), "wrong bytes");
        format!("{}", file.metadata().unwrap().nlink())
    });
}

#[test]
fn a_file_that_grows_whole_while_cached_handles_are_open_can_be_opened_again() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    let want = bytes(3, LARGE + 70_000);
    let early = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("large"))
        .unwrap();
    let mut buf = [0; 100];
    early.read_exact_at(&mut buf, 0).unwrap();
    let map = Map::shared(early.as_fd(), want.len(), false).unwrap();
    assert_eq!(map.read(LARGE, 1000), want[LARGE..LARGE + 1000]);
    wait_until("the rest follows", LIMIT, || {
        !is_marked(&w.dst.join("large"))
    });
    // One io mode for each inode: the kernel answers EIO to the wrong one.
    for _ in 0..3 {
        assert!(fs::read(m.path("large")).unwrap() == want);
        let late = OpenOptions::new()
            .read(true)
            .write(true)
            .open(m.path("large"))
            .unwrap();
        late.write_all_at(b"late", 5).unwrap();
        early.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(&buf[5..9], b"late");
        early.write_all_at(&want[5..9], 5).unwrap();
        late.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, want[..100]);
    }
    drop((map, early));
    assert!(fs::read(m.path("large")).unwrap() == want);
}

#[test]
pub(crate) fn a_program_in_the_mount_can_be_executed() {
    let Some(program) = find_program("true").filter(|_| can_mount_on("ext4")) else {
        return;
    };
    let program = fs::read(program).unwrap();
    same_as_plain(
        |d| {
            d.file("program", &program);
            d.chmod("program", 0o755);
            d.file("script", b"#!/bin/sh\necho \"$0 ran\" | sed 's|.*/||'\n");
            d.chmod("script", 0o755);
            d.file("not", &program);
        },
        |at| {
            let code = run(&mut Command::new(at.join("program"))).code();
            let said = run(&mut Command::new(at.join("script"))).out;
            let not = Command::new(at.join("not")).status().map(|_| "ran");
            format!("{code} {said} {}", told(not))
        },
    );
}

// Writing.

#[test]
pub(crate) fn writing_into_a_pending_file_keeps_the_rest_of_it() {
    same_as_plain(some_files, |at| {
        for name in ["f", "large", "dir/b"] {
            let file = OpenOptions::new().write(true).open(at.join(name)).unwrap();
            file.write_all_at(b"new bytes", 10_000).unwrap();
            file.write_all_at(b"past the end", 9 << 20).unwrap();
        }
        let mut append = OpenOptions::new().append(true).open(at.join("g")).unwrap();
        append.write_all(b"appended").unwrap();
        let read = OpenOptions::new()
            .read(true)
            .write(true)
            .open(at.join("dir/a"))
            .unwrap();
        read.write_all_at(b"A", 0).unwrap();
        let mut buf = [0; 1];
        read.read_exact_at(&mut buf, 0).unwrap();
        format!("{buf:?} {}", at.join("large").metadata().unwrap().len())
    });
}

#[test]
pub(crate) fn truncating_a_pending_file_keeps_what_is_before_the_cut() {
    same_as_plain(
        |d| {
            for name in ["a", "b", "c", "d", "e", "f"] {
                d.file(name, &bytes(6, 100_000));
            }
            d.file("large", &bytes(7, LARGE + 5));
            d.file("large 0", &bytes(8, LARGE + 5));
        },
        |at| {
            let set_len = |name: &str, len| {
                let file = OpenOptions::new().write(true).open(at.join(name)).unwrap();
                file.set_len(len).unwrap();
            };
            set_len("a", 0);
            set_len("b", 1);
            set_len("c", 50_001);
            set_len("d", 100_000);
            set_len("e", 300_000);
            set_len("large", 70_001);
            set_len("large 0", 0);
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(at.join("f"))
                .unwrap();
            let lens = ["a", "b", "c", "d", "e", "f"].map(|n| at.join(n).metadata().unwrap().len());
            let c = fs::read(at.join("c")).unwrap();
            format!("{lens:?} {}", c == bytes(6, 100_000)[..50_001])
        },
    );
}

#[test]
fn opening_with_o_trunc_needs_no_data_from_src() {
    let size = 400 << 20;
    let Some(w) = world(|d| d.sparse("large", size, &[(0, &bytes(1, 1 << 20))])) else {
        return;
    };
    let m = w.mount_lazy();
    fs::write(m.path("large"), b"short").unwrap();
    assert_eq!(fs::read(m.path("large")).unwrap(), b"short");
    assert_eq!(
        m.status()["bytes_pulled"].as_u64(),
        Some(0),
        "{:#}",
        m.status()
    );
    m.finish_rest();
    assert_eq!(fs::read(w.dst.join("large")).unwrap(), b"short");
}

#[test]
pub(crate) fn fallocate_and_punching_holes_work_on_pending_files() {
    same_as_plain(some_files, |at| {
        let mut said = String::new();
        for name in ["f", "large"] {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(at.join(name))
                .unwrap();
            let keep = FallocateFlags::KEEP_SIZE;
            let call = |flags, at, len| {
                rustix::fs::fallocate(&file, flags, at, len).map_err(io::Error::from)
            };
            said += &done(call(FallocateFlags::empty(), 20_000, 200_000));
            said += &done(call(FallocateFlags::PUNCH_HOLE | keep, 4096, 8192));
            said += &done(call(FallocateFlags::ZERO_RANGE, 16_384, 4096));
            said += &done(call(keep, 1 << 20, 4096));
            let mut buf = vec![0; 30_000];
            file.read_exact_at(&mut buf, 0).unwrap();
            said += &format!("{} {:?}", file.metadata().unwrap().len(), &buf[4090..4100]);
        }
        said
    });
}

#[test]
pub(crate) fn copy_file_range_from_and_into_pending_files_copies_the_bytes() {
    same_as_plain(some_files, |at| {
        let copy = |from: &str, to: &str, len| {
            let from = File::open(at.join(from)).unwrap();
            let to = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(at.join(to))
                .unwrap();
            let (mut a, mut b, mut left) = (100, 50, len);
            while left > 0 {
                match rustix::fs::copy_file_range(&from, Some(&mut a), &to, Some(&mut b), left) {
                    Ok(0) => break,
                    Ok(n) => left -= n,
                    Err(e) => return e.to_string(),
                }
            }
            format!("{left} left")
        };
        [
            copy("f", "new", 20_000),
            copy("large", "g", 100_000),
            copy("dir/b", "large", 1 << 20),
        ]
        .join(" ")
    });
}

#[test]
fn fsync_of_files_and_directories_works_in_every_state() {
    same_as_plain(some_files, |at| {
        let mut file = OpenOptions::new().append(true).open(at.join("f")).unwrap();
        file.write_all(b"x").unwrap();
        file.sync_all().unwrap();
        file.sync_data().unwrap();
        File::open(at.join("large")).unwrap().sync_all().unwrap();
        File::open(at.join("dir")).unwrap().sync_all().unwrap();
        let sync = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DSYNC)
            .open(at.join("g"));
        sync.unwrap().write_all(b"synced").unwrap();
        String::new()
    });
}

// Names.

#[test]
pub(crate) fn every_kind_of_entry_can_be_made_in_a_pending_directory() {
    same_as_plain(some_files, |at| {
        let dir = at.join("dir");
        fs::write(dir.join("file"), b"new").unwrap();
        fs::create_dir(dir.join("directory")).unwrap();
        fs::write(dir.join("directory/in"), b"side").unwrap();
        symlink("nowhere", dir.join("symlink")).unwrap();
        let again = [
            done(symlink("x", dir.join("a"))),
            done(fs::create_dir(dir.join("b"))),
            told(File::create_new(dir.join("deeper")).map(|_| "made")),
            told(File::create_new(dir.join("a")).map(|_| "made")),
        ];
        use rustix::fs::{FileType, Mode};
        let mode = Mode::from_raw_mode(0o640);
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, mode, 0).unwrap();
        rustix::fs::mknodat(CWD, dir.join("null"), FileType::CharacterDevice, mode, null).unwrap();
        rustix::fs::mknodat(CWD, dir.join("plain"), FileType::RegularFile, mode, 0).unwrap();
        let listener = UnixListener::bind(dir.join("socket")).unwrap();
        let mut client = UnixStream::connect(dir.join("socket")).unwrap();
        client.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        listener.accept().unwrap().0.read_exact(&mut said).unwrap();
        format!("{again:?} {:?}", said)
    });
}

#[test]
pub(crate) fn what_was_listed_or_was_not_there_is_seen_anew_as_soon_as_it_changes() {
    let fill = |at: &At| {
        let (d, e) = (at.dir("d"), at.dir("e"));
        for n in 0..40 {
            d.file(format!("f{n:02}"), b"some");
        }
        e.file("x", b"x");
    };
    same_as_plain(fill, |root| {
        let (d, e) = (root.join("d"), root.join("e"));
        let mut open = rustix::fs::Dir::new(File::open(&d).unwrap()).unwrap();
        let mut said = String::new();
        let mut look = |what: &str| {
            said += &format!("{what}:");
            // By a handle that stays open, and by a new one: from the kernel's memory the second time.
            open.rewind();
            let mut again: Vec<String> = (&mut open)
                .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
                .filter(|n| !n.starts_with('.'))
                .collect();
            again.sort();
            for _ in 0..2 {
                let mut listed: Vec<String> = fs::read_dir(&d)
                    .unwrap()
                    .map(|e| e.unwrap().file_name().into_string().unwrap())
                    .collect();
                listed.sort();
                assert_eq!(listed, again, "{what}");
            }
            said += &again.join(" ");
            for name in ["new", "made", "link", "sym", "f01", "f02", "x", "moved"] {
                let found = d.join(name).symlink_metadata().map(|m| m.is_dir());
                said += &format!(" {name}={}", told(found));
            }
            said.push('\n');
        };
        look("at first");
        fs::write(d.join("new"), b"n").unwrap();
        look("a file");
        fs::create_dir(d.join("made")).unwrap();
        fs::hard_link(d.join("f00"), d.join("link")).unwrap();
        symlink("f00", d.join("sym")).unwrap();
        look("a directory and links");
        fs::remove_file(d.join("f01")).unwrap();
        fs::rename(d.join("f02"), e.join("f02")).unwrap();
        fs::rename(e.join("x"), d.join("x")).unwrap();
        look("removed, and moved out and in");
        let (dir, x) = (File::open(&d).unwrap(), "x");
        rustix::fs::renameat_with(&dir, "made", &dir, x, RenameFlags::EXCHANGE).unwrap();
        look("exchanged");
        fs::rename(d.join("made"), d.join("moved")).unwrap();
        fs::write(d.join("made"), b"again").unwrap();
        look("a name that was free again");
        fs::remove_file(d.join("made")).unwrap();
        fs::remove_file(d.join("new")).unwrap();
        look("removed again");
        // Xattrs that are asked for all the time.
        let (file, acl) = (d.join("f03"), "system.posix_acl_access");
        for value in [None, Some(named_acl()), None, Some(named_acl())] {
            let set = match value {
                Some(value) => rustix::fs::setxattr(&file, acl, &value, XattrFlags::empty()),
                None => rustix::fs::removexattr(&file, acl).or(Ok(())),
            };
            let mut buf = [0; 128];
            let got = [(); 2].map(|()| rustix::fs::getxattr(&file, acl, &mut buf));
            said += &format!("{set:?} {got:?}\n");
        }
        said
    });
}

#[test]
fn deleting_pending_entries_never_brings_them_back() {
    same_as_plain(some_files, |at| {
        fs::remove_file(at.join("f")).unwrap();
        fs::remove_file(at.join("large")).unwrap();
        let full = done(fs::remove_dir(at.join("dir")));
        fs::remove_dir_all(at.join("dir")).unwrap();
        fs::create_dir(at.join("dir")).unwrap();
        fs::write(at.join("f"), b"another").unwrap();
        fs::remove_file(at.join("f")).unwrap();
        let list = fs::read_dir(at).unwrap().count();
        format!("{full} {list} {}", done(fs::remove_file(at.join("f"))))
    });
}

#[test]
fn nothing_deleted_comes_back_after_a_restart() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    fs::remove_file(m.path("f")).unwrap();
    fs::remove_file(m.path("dir/a")).unwrap();
    fs::rename(m.path("dir/deeper"), m.path("moved")).unwrap();
    fs::rename(m.path("g"), m.path("moved/g")).unwrap();
    let gone = ["f", "dir/a", "dir/deeper", "g"];
    m.unmount();
    for last in [false, true] {
        let m = if last { w.mount() } else { w.mount_lazy() };
        for name in gone {
            assert!(!m.path(name).exists(), "{name} came back");
        }
        assert_eq!(fs::read(m.path("moved/c")).unwrap(), b"c");
        if last {
            m.finish();
        } else {
            m.unmount();
        }
    }
    for name in gone {
        assert!(!w.dst.join(name).exists(), "{name} came back");
    }
    assert_eq!(fs::read(w.dst.join("moved/g")).unwrap(), bytes(2, 5_000));
}

#[test]
fn the_directory_that_was_never_looked_into_is_not_empty() {
    same_as_plain(
        |d| {
            d.dir("full").file("f", b"x");
            d.dir("empty");
            d.dir("other");
        },
        |at| {
            let full = done(fs::remove_dir(at.join("full")));
            let over = done(fs::rename(at.join("other"), at.join("full")));
            let onto_empty = done(fs::rename(at.join("other"), at.join("empty")));
            format!(
                "{full} {over} {onto_empty} {}",
                done(fs::remove_dir(at.join("empty")))
            )
        },
    );
}

#[test]
fn the_files_of_a_renamed_pending_directory_still_come() {
    same_as_plain(some_files, |at| {
        fs::rename(at.join("dir"), at.join("renamed")).unwrap();
        fs::create_dir(at.join("dir")).unwrap();
        fs::rename(at.join("renamed/deeper"), at.join("dir/deep")).unwrap();
        fs::create_dir(at.join("renamed/deeper")).unwrap();
        fs::rename(at.join("f"), at.join("dir/f")).unwrap();
        fs::rename(at.join("g"), at.join("f")).unwrap();
        let list = |d: &str| fs::read_dir(at.join(d)).unwrap().count();
        format!(
            "{} {} {}",
            list("dir"),
            list("renamed"),
            list("renamed/deeper")
        )
    });
}

#[test]
pub(crate) fn renaming_over_replaces_and_exchanges_and_refuses_as_told() {
    same_as_plain(
        |d| {
            some_files(d);
            d.dir("dir 2").file("z", b"z");
            d.dir("empty");
        },
        |at| {
            let with = |a: &str, b: &str, flags| {
                let call = rustix::fs::renameat_with(CWD, at.join(a), CWD, at.join(b), flags);
                done(call.map_err(io::Error::from))
            };
            [
                with("f", "g", RenameFlags::NOREPLACE),
                with("f", "g", RenameFlags::empty()),
                with("g", "large", RenameFlags::EXCHANGE),
                with("dir", "dir 2", RenameFlags::EXCHANGE),
                with("dir", "dir 2/deeper", RenameFlags::EXCHANGE),
                with("dir 2", "dir 2/deeper/inside", RenameFlags::empty()),
                with("dir/a", "empty", RenameFlags::empty()),
                with("empty", "large", RenameFlags::empty()),
                with("nothing", "large", RenameFlags::empty()),
                with("large", "nothing", RenameFlags::NOREPLACE),
            ]
            .join(", ")
        },
    );
}

#[test]
pub(crate) fn a_large_pending_directory_can_be_listed_and_removed() {
    same_as_plain(
        |d| {
            let big = d.dir("big");
            for i in 0..3000 {
                big.file(format!("entry {i:05}"), b"x");
            }
        },
        |at| {
            let count = fs::read_dir(at.join("big")).unwrap().count();
            fs::remove_dir_all(at.join("big")).unwrap();
            format!("{count}")
        },
    );
}

// Metadata.

#[test]
fn what_the_user_sets_on_a_pending_entry_survives_its_hydration() {
    same_as_plain(
        |d| {
            some_files(d);
            d.symlink("target", "symlink");
            d.stamp("symlink", 1, 1);
            d.xattr("f", "user.old", b"from src");
            d.xattr("f", "user.gone", b"from src");
        },
        |at| {
            for name in ["f", "large", "dir", "dir/b"] {
                set_times(&at.join(name), 1_111_111_111, 222_222_222).unwrap();
            }
            set_times(&at.join("symlink"), 1_111_111_111, 222_222_222).unwrap();
            fs::set_permissions(at.join("g"), fs::Permissions::from_mode(0o4711)).unwrap();
            fs::set_permissions(at.join("dir"), fs::Permissions::from_mode(0o1770)).unwrap();
            fs::set_permissions(at.join("large"), fs::Permissions::from_mode(0o400)).unwrap();
            chown(at.join("dir/a"), Some(1000), Some(33)).unwrap();
            lchown(at.join("symlink"), Some(1000), Some(33)).unwrap();
            set_xattr(&at.join("f"), "user.new", b"new").unwrap();
            set_xattr(&at.join("f"), "user.old", b"changed").unwrap();
            rustix::fs::removexattr(at.join("f"), "user.gone").unwrap();
            set_xattr(&at.join("dir"), "trusted.new", b"new").unwrap();
            set_xattr(&at.join("g"), "system.posix_acl_access", &named_acl()).unwrap();
            let f = at.join("f");
            format!(
                "{} {} {} {:o}",
                told(get_xattr(&f, "user.old")),
                told(get_xattr(&f, "user.gone")),
                told(get_xattr(&at.join("dir/a"), "user.new")),
                at.join("g").metadata().unwrap().mode(),
            )
        },
    );
}

#[test]
fn times_before_1970_and_after_2038_can_be_set_through_the_mount() {
    same_as_plain(some_files, |at| {
        let mut seen = Vec::new();
        for (name, sec, nsec) in [
            ("f", -315_619_200 + 4, 500_000_000),
            ("g", -1, 999_999_999),
            ("large", 1 - (1 << 31), 1),
            ("dir", 1 << 32, 7),
            ("dir/a", -1, 0),
            ("dir/b", 0, 5),
        ] {
            set_times(&at.join(name), sec, nsec).unwrap();
            let m = at.join(name).metadata().unwrap();
            seen.push((m.mtime(), m.mtime_nsec(), m.atime(), m.atime_nsec()));
            assert_eq!((m.mtime(), m.mtime_nsec()), (sec, nsec), "{name}");
        }
        format!("{seen:?}")
    });
}

#[test]
fn what_is_copied_meanwhile_has_not_changed_for_who_looks_until_a_user_changes_it() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    let ctime = |path: &Path| {
        let stat = fs::metadata(path).unwrap();
        (stat.ctime(), stat.ctime_nsec())
    };
    // After a read the kernel asks for the attributes again.
    let look = |name: &str| {
        let path = m.path(name);
        match path.is_dir() {
            true => assert!(fs::read_dir(&path).unwrap().count() > 0),
            false => assert!(!fs::read(&path).unwrap().is_empty()),
        }
        ctime(&path)
    };
    for name in ["f", "large", "dir"] {
        let (shown, raw) = (m.path(name), w.dst.join(name));
        let before = ctime(&shown);
        assert_eq!(look(name), before, "{name}");
        let done = || ctime(&raw) != before && (raw.is_dir() || !is_marked(&raw));
        wait_until("it is here", LIMIT, done);
        assert_eq!(look(name), before, "{name} after it was copied");
        fs::set_permissions(&shown, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(look(name) > before, "{name} after chmod");
        wait_until("dst's own", LIMIT, || look(name) == ctime(&raw));
    }
    m.finish_rest();
}

#[test]
fn what_a_user_has_made_gets_a_new_ctime_with_each_change() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    for (parent, name) in [("", "new"), ("dir", "new")] {
        let path = m.path(parent).join(name);
        let file = fs::File::create_new(&path).unwrap();
        let look = || {
            let stat = fs::metadata(&path).unwrap();
            (stat.ctime(), stat.ctime_nsec())
        };
        let mut last = look();
        let mut expect_later = |what: &str| {
            let now = look();
            assert!(now > last, "{} after {what}", path.display());
            last = now;
            thread::sleep(Duration::from_millis(20));
        };
        thread::sleep(Duration::from_millis(20));
        file.write_all_at(b"text", 0).unwrap();
        expect_later("a write");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 100).unwrap();
        expect_later("fallocate");
        file.write_all_at(b"text", 50).unwrap();
        expect_later("another write");
    }
    m.finish_rest();
}

#[test]
fn writing_a_pending_file_gives_it_a_new_time_and_reading_does_not() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    let time = |name: &str| m.path(name).metadata().unwrap().modified().unwrap();
    let old = time("f");
    fs::read(m.path("f")).unwrap();
    fs::read(m.path("large")).unwrap();
    assert_eq!(old, time("f"));
    assert_eq!(old, time("large"));
    let before = SystemTime::now() - Duration::from_secs(2);
    for name in ["f", "g", "large"] {
        let mut file = OpenOptions::new().append(true).open(m.path(name)).unwrap();
        file.write_all(b"x").unwrap();
        assert!(
            time(name) > before,
            "{name} was written and shows {:?}",
            time(name)
        );
    }
    m.finish_rest();
    for name in ["f", "g", "large"] {
        assert!(
            w.dst.join(name).metadata().unwrap().modified().unwrap() > before,
            "{name}"
        );
    }
    assert_eq!(
        old,
        w.dst.join("dir/b").metadata().unwrap().modified().unwrap()
    );
}

// Links.

fn linked_files(d: &At) {
    d.file("one", &bytes(1, 20_000));
    d.file("large", &bytes(2, LARGE + 3));
    let (a, b) = (d.dir("a"), d.dir("b"));
    d.link("one", &a, "two");
    d.link("one", &b, "three");
    d.link("large", &a, "large too");
    d.symlink("x", "symlink");
    d.link("symlink", &b, "symlink too");
    for name in ["one", "large", "symlink", "a", "b"] {
        d.stamp(name, 1_000_000_000, 3);
    }
}

#[test]
fn hard_links_are_counted_and_shared_while_they_are_pending() {
    let Some(w) = world(linked_files) else { return };
    let m = w.mount_lazy();
    let nlink = |name: &str| m.path(name).symlink_metadata().unwrap().nlink();
    assert_eq!([nlink("one"), nlink("large"), nlink("symlink")], [3, 2, 2]);
    assert_eq!([nlink("a/two"), nlink("b/three"), nlink("one")], [3, 3, 3]);
    let ino = |name: &str| m.path(name).symlink_metadata().unwrap().ino();
    assert_eq!(ino("one"), ino("b/three"));
    fs::write(m.path("a/two"), b"through another name").unwrap();
    assert_eq!(
        fs::read(m.path("b/three")).unwrap(),
        b"through another name"
    );
    assert_eq!([nlink("a/two"), nlink("b/three"), nlink("one")], [3, 3, 3]);
    m.finish_rest();
    assert_eq!(w.dst.join("one").metadata().unwrap().nlink(), 3);
    assert_eq!(
        fs::read(w.dst.join("one")).unwrap(),
        b"through another name"
    );
}

#[test]
pub(crate) fn hard_links_behave_as_on_a_plain_file_system() {
    same_as_plain(linked_files, |at| {
        fs::remove_file(at.join("one")).unwrap();
        fs::hard_link(at.join("a/two"), at.join("again")).unwrap();
        fs::rename(at.join("b/three"), at.join("a/3")).unwrap();
        // Two names of one inode: rename does nothing.
        fs::rename(at.join("a/3"), at.join("again")).unwrap();
        fs::hard_link(at.join("b/symlink too"), at.join("another")).unwrap();
        let file = OpenOptions::new()
            .write(true)
            .open(at.join("a/large too"))
            .unwrap();
        file.write_all_at(b"shared", 100).unwrap();
        let mut buf = [0; 6];
        File::open(at.join("large"))
            .unwrap()
            .read_exact_at(&mut buf, 100)
            .unwrap();
        let to_dir = done(fs::hard_link(at.join("a"), at.join("c")));
        format!("{buf:?} {to_dir} {}", at.join("a/3").exists())
    });
}

// Owners and permissions.

#[test]
fn what_is_made_belongs_to_its_maker_and_follows_umask_setgid_and_default_acls() {
    let no = u32::MAX;
    let default = acl(&[
        (1, 7, no),
        (2, 7, 1000),
        (4, 5, no),
        (16, 7, no),
        (32, 0, no),
    ]);
    same_as_plain(
        |d| {
            for (name, mode) in [("open", 0o777), ("setgid", 0o2777), ("acl", 0o777)] {
                d.dir(name).file("old", b"x");
                d.chown(name, 0, 33);
                d.chmod(name, mode);
            }
            d.xattr("acl", "system.posix_acl_default", &default);
            d.dir("closed").file("f", b"x");
            d.chmod("closed", 0o700);
            d.chmod(".", 0o755);
        },
        |at| {
            as_user(1000, 1000, 0o027, || {
                let mut said = String::new();
                for dir in ["open", "setgid", "acl"] {
                    let at = at.join(dir);
                    OpenOptions::new()
                        .write(true)
                        .create_new(true)
                        .mode(0o666)
                        .open(at.join("f"))
                        .unwrap();
                    fs::create_dir(at.join("d")).unwrap();
                    symlink("x", at.join("s")).unwrap();
                    rustix::fs::mknodat(
                        CWD,
                        at.join("p"),
                        rustix::fs::FileType::Fifo,
                        0o666.into(),
                        0,
                    )
                    .unwrap();
                    for name in ["f", "d", "s", "p"] {
                        let m = at.join(name).symlink_metadata().unwrap();
                        said += &format!("{dir}/{name} {}:{} {:o}, ", m.uid(), m.gid(), m.mode());
                    }
                }
                said += &told(fs::read(at.join("closed/f")).map(|_| "read"));
                said += &told(fs::read_dir(at.join("closed")).map(|_| "listed"));
                said += &told(File::create(at.join("new")).map(|_| "made"));
                said += &done(fs::remove_file(at.join("open/old")));
                said += &done(chown(at.join("open/f"), Some(0), None));
                said
            })
        },
    );
}

#[test]
pub(crate) fn permissions_are_checked_for_the_caller_in_every_state() {
    same_as_plain(
        |d| {
            for (name, mode, uid) in [
                ("mine", 0o600, 1000),
                ("roots", 0o600, 0),
                ("shared", 0o644, 0),
                ("acl", 0o600, 0),
            ] {
                d.file(name, b"content");
                d.chown(name, uid, uid);
                d.chmod(name, mode);
            }
            d.xattr("acl", "system.posix_acl_access", &named_acl());
            let sticky = d.dir("sticky");
            sticky.file("roots", b"x");
            d.chmod("sticky", 0o1777);
            d.chmod(".", 0o755);
        },
        |at| {
            as_user(1000, 1000, 0o022, || {
                let read = |n: &str| told(fs::read(at.join(n)).map(|b| b.len()));
                let write = |n: &str| {
                    told(
                        OpenOptions::new()
                            .write(true)
                            .open(at.join(n))
                            .map(|_| "open"),
                    )
                };
                let mode = |n: &str| {
                    done(fs::set_permissions(
                        at.join(n),
                        fs::Permissions::from_mode(0o640),
                    ))
                };
                let all = ["mine", "roots", "shared", "acl"];
                format!(
                    "{:?} {:?} {:?} {} {}",
                    all.map(read),
                    all.map(write),
                    all.map(mode),
                    done(fs::remove_file(at.join("sticky/roots"))),
                    done(set_times(&at.join("shared"), 1, 1)),
                )
            })
        },
    );
}

#[test]
fn an_unprivileged_write_clears_the_setuid_bit() {
    same_as_plain(
        |d| {
            for (i, mode) in [0o4777, 0o6777, 0o2777, 0o2767].into_iter().enumerate() {
                for how in ["write", "truncate", "append", "late"] {
                    let name = format!("{how} {i}");
                    d.file(&name, &bytes(i as u64, 5000));
                    d.chown(&name, 1000, 1000);
                    d.chmod(&name, mode);
                }
            }
            d.chmod(".", 0o755);
        },
        |at| {
            as_user(1001, 1001, 0o022, || {
                let mut modes = String::new();
                for i in 0..4 {
                    let open = |how: &str| {
                        OpenOptions::new()
                            .write(true)
                            .open(at.join(format!("{how} {i}")))
                    };
                    open("write").unwrap().write_all(b"x").unwrap();
                    open("truncate").unwrap().set_len(10).unwrap();
                    let append = at.join(format!("append {i}"));
                    OpenOptions::new()
                        .append(true)
                        .open(append)
                        .unwrap()
                        .write_all(b"x")
                        .unwrap();
                    // A handle that was open before and is written after other things happened.
                    let late = open("late").unwrap();
                    fs::read(at.join(format!("late {i}"))).unwrap();
                    late.write_all_at(b"x", 100).unwrap();
                    for how in ["write", "truncate", "append", "late"] {
                        let m = at.join(format!("{how} {i}")).metadata().unwrap();
                        modes += &format!("{how} {i} {:o}, ", m.mode());
                    }
                }
                modes
            })
        },
    );
}

// Locks, mappings and direct I/O.

#[test]
pub(crate) fn a_shared_mapping_of_a_pending_file_shows_and_changes_its_bytes() {
    same_as_plain(some_files, |at| {
        let mut said = String::new();
        for (name, len) in [("f", 30_000), ("large", LARGE + 70_000)] {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(at.join(name))
                .unwrap();
            let map = Map::shared(file.as_fd(), len, true).unwrap();
            let before = map.read(len - 10_000, 20);
            map.write(len - 9_000, b"through the mapping");
            map.sync().unwrap();
            let mut buf = [0; 19];
            file.read_exact_at(&mut buf, len as u64 - 9_000).unwrap();
            file.write_all_at(b"written", 100).unwrap();
            said += &format!("{before:?} {buf:?} {:?}", map.read(100, 7));
        }
        said
    });
}

#[test]
fn a_write_through_a_mapping_shows_in_the_files_time() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount();
    m.wait_complete();
    let before = SystemTime::now() - Duration::from_secs(2);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("f"))
        .unwrap();
    let map = Map::shared(file.as_fd(), 4096, true).unwrap();
    map.write(0, b"x");
    map.sync().unwrap();
    assert!(
        m.path("f").metadata().unwrap().modified().unwrap() > before,
        "while it is open"
    );
    drop((map, file));
    assert!(
        m.path("f").metadata().unwrap().modified().unwrap() > before,
        "after it was closed"
    );
}

#[test]
pub(crate) fn direct_io_reads_and_writes_pending_and_hydrated_files() {
    same_as_plain(some_files, |at| {
        let mut said = String::new();
        for name in ["f", "large"] {
            let mut open = OpenOptions::new();
            open.read(true).write(true).custom_flags(libc::O_DIRECT);
            let file = open.open(at.join(name)).unwrap();
            let mut page = Box::new(Page([0; 4096]));
            said += &told(file.read_at(&mut page.0, 4096));
            said += &format!("{:?}", &page.0[..4]);
            page.0.fill(b'D');
            said += &told(file.write_at(&page.0, 8192));
            let mut buf = [0; 8];
            File::open(at.join(name))
                .unwrap()
                .read_exact_at(&mut buf, 8188)
                .unwrap();
            said += &format!("{buf:?}");
        }
        said
    });
}

#[test]
fn flock_and_fcntl_locks_hold_between_processes() {
    if !need(find_program("python3").is_some(), "python3") {
        return;
    }
    // Another process tries both kinds of lock on the whole file.
    let script = "import fcntl, sys\n\
        f = open(sys.argv[1], 'r+')\n\
        for lock in fcntl.flock, fcntl.lockf:\n\
        \x20   try:\n\
        \x20       lock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n\
        \x20       print('got', end=' ')\n\
        \x20   except OSError as e:\n\
        \x20       print('held', end=' ')\n";
    same_as_plain(some_files, |at| {
        let path = at.join("f");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let other = || run(Command::new("python3").args(["-c", script]).arg(&path)).out;
        let mut said = other();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        said += &other();
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        said += &other();
        rustix::fs::flock(&file, FlockOperation::Unlock).unwrap();
        said += &other();
        rustix::fs::fcntl_lock(&file, FlockOperation::Unlock).unwrap();
        said + &other()
    });
}

#[test]
pub(crate) fn a_blocked_lock_does_not_stop_anybody_else() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount();
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("f"))
        .unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    let file = File::open(m.path("f")).unwrap();
                    rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(200));
        assert_eq!(fs::read(m.path("dir/a")).unwrap(), b"a");
        fs::write(m.path("new"), b"x").unwrap();
        assert!(!waiters.iter().any(|w| w.is_finished()));
        rustix::fs::flock(&held, FlockOperation::Unlock).unwrap();
    });
}

#[test]
pub(crate) fn many_readers_of_one_pending_file_all_get_its_bytes() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    for (name, want) in [("f", bytes(1, 30_000)), ("large", bytes(3, LARGE + 70_000))] {
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| assert!(fs::read(m.path(name)).unwrap() == want, "{name}"));
            }
        });
    }
    let pulled = || m.status()["files_pulled"].as_u64().unwrap();
    wait_until("both are pulled", LIMIT, || pulled() >= 2);
    assert_eq!(pulled(), 2, "each is pulled once: {:#}", m.status());
}

// Space.

#[test]
fn statfs_never_promises_space_that_pending_files_will_need() {
    let Some(w) = world(|d| d.sparse("large", 100 << 20, &[(0, &bytes(1, 100 << 20))])) else {
        return;
    };
    let m = w.mount_lazy();
    let free = rustix::fs::statvfs(&w.dst).unwrap();
    m.path("large").metadata().unwrap();
    let seen = rustix::fs::statvfs(&m.at).unwrap();
    assert_eq!(
        (seen.f_blocks, seen.f_frsize),
        (free.f_blocks, free.f_frsize)
    );
    let less = (free.f_bavail - seen.f_bavail.min(free.f_bavail)) * free.f_frsize;
    assert!(less > 90 << 20, "only {less} bytes less than dst has");
}

#[test]
fn with_dst_full_pending_files_can_still_be_read() {
    if !can_mount_on("ext4") {
        return;
    }
    let (a, b) = (LoopFs::new("ext4"), LoopFs::sized("ext4", 32 << 20));
    let w = World::from(a.dir("src"), b.dir("dst"), vec![a, b]);
    let at = At::open(&w.src);
    for i in 0..30 {
        at.file(format!("f{i}"), &bytes(i, 2 << 20));
    }
    at.file("large", &bytes(99, 40 << 20));
    let m = w.mount_lazy();
    for i in 0..30 {
        let got = fs::read(m.path(format!("f{i}"))).unwrap();
        assert!(got == bytes(i, 2 << 20), "f{i}: wrong bytes");
    }
    assert!(
        fs::read(m.path("large")).unwrap() == bytes(99, 40 << 20),
        "large: wrong bytes"
    );
    let full = fs::write(m.path("new"), bytes(1, 8 << 20)).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    assert_ne!(m.status()["state"], "COMPLETE");
    m.unmount();

    // The background waits, says so all the while, and goes on when there is room.
    let m = w.mount();
    let is_full = || m.status()["state"] == "DEGRADED";
    wait_until("the state says that dst is full", LIMIT, is_full);
    let says = (0..15).filter(|_| {
        thread::sleep(Duration::from_millis(200));
        is_full()
    });
    let says = says.count();
    assert!(says >= 12, "DEGRADED in {says} of 15 looks");
    fs::remove_file(m.path("large")).unwrap();
    for i in 10..30 {
        fs::remove_file(m.path(format!("f{i}"))).unwrap();
    }
    m.wait_complete();
    m.finish();
    for i in 0..10 {
        assert!(
            fs::read(w.dst.join(format!("f{i}"))).unwrap() == bytes(i, 2 << 20),
            "f{i}"
        );
    }
}

// The mark and the control directory.

#[test]
pub(crate) fn the_mark_and_the_control_directory_are_invisible_and_out_of_reach() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    m.path("f").metadata().unwrap();
    assert!(is_marked(&w.dst.join("f")) && w.dst.join(CONTROL).is_dir());
    for (path, entry) in compare::manifest_without_content(&m.at).entries() {
        assert!(
            !entry.has_xattr(MARK),
            "{} shows its mark",
            compare::show(path)
        );
        assert_ne!(path, CONTROL.as_bytes());
    }
    let f = m.path("f");
    assert_eq!(
        told(get_xattr(&f, MARK)),
        rustix::io::Errno::NODATA.to_string()
    );
    assert!(set_xattr(&f, MARK, b"x").is_err());
    assert!(rustix::fs::removexattr(&f, MARK).is_err());
    let control = m.path(CONTROL);
    assert!(!control.exists());
    assert!(fs::create_dir(&control).is_err());
    assert!(fs::write(&control, b"x").is_err());
    assert!(fs::rename(&f, &control).is_err());
    assert!(fs::hard_link(&f, &control).is_err());
    assert!(symlink("x", &control).is_err());
    assert!(fs::read_dir(&control).is_err());
    // The name is nobody's below the root.
    fs::create_dir(m.path("dir").join(CONTROL)).unwrap();
    assert!(is_marked(&w.dst.join("f")), "f is still pending");
}

// Mounting over dst, and going away.

#[test]
pub(crate) fn mounted_over_dst_the_path_stays_the_same_through_finish() {
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    let m = w.mount();
    assert!(fuse_mount_at(&w.dst).is_some());
    fs::write(w.dst.join("dir/new"), b"new").unwrap();
    let open = File::open(w.dst.join("f")).unwrap();
    m.wait_complete();
    run(mirrorfs().arg("finish").arg(&w.dst)).expect_code(0);
    assert!(
        fuse_mount_at(&w.dst).is_none(),
        "the native tree is there at once"
    );
    assert_eq!(fs::read(w.dst.join("dir/new")).unwrap(), b"new");
    assert_eq!(fs::read(w.dst.join("g")).unwrap(), bytes(2, 5_000));
    // What was open before still reads.
    let mut buf = [0; 100];
    open.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf, bytes(1, 100)[..]);
    drop(open);
    let mut m = m;
    assert_eq!(m.wait_exit(Duration::from_secs(30)), Some(0), "{}", m.log());
    w.expect_no_trace();
}

#[test]
pub(crate) fn open_files_live_on_in_a_mount_that_was_detached() {
    let Some(w) = world(some_files) else { return };
    let mut m = w.mount_lazy();
    let large = File::open(m.path("large")).unwrap();
    let write = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("g"))
        .unwrap();
    run(Command::new("umount").arg("-l").arg(&m.at)).expect_code(0);
    write.write_all_at(b"later", 0).unwrap();
    write.sync_all().unwrap();
    let mut all = Vec::new();
    (&large).read_to_end(&mut all).unwrap();
    assert!(all == bytes(3, LARGE + 70_000), "wrong bytes");
    assert!(
        m.runs(),
        "the daemon must live as long as somebody uses the mount"
    );
    drop((large, write));
    // 20: run again to continue.
    assert_eq!(
        m.wait_exit(Duration::from_secs(30)),
        Some(20),
        "{}",
        m.log()
    );
    let m = w.mount();
    assert_eq!(&fs::read(m.path("g")).unwrap()[..5], b"later");
    m.finish();
}

#[test]
pub(crate) fn a_daemon_that_was_killed_leaves_a_dead_mount_and_mounting_again_resumes() {
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    let m = w.mount_lazy();
    fs::write(m.path("dir/new"), b"new").unwrap();
    fs::remove_file(m.path("f")).unwrap();
    m.kill();
    let dead = fs::read(w.dst.join("g")).unwrap_err();
    assert_eq!(
        dead.raw_os_error(),
        Some(libc::ENOTCONN),
        "dst must stay hidden"
    );
    let m = w.mount();
    assert_eq!(fs::read(m.path("dir/new")).unwrap(), b"new");
    assert!(!m.path("f").exists());
    m.finish();
    assert!(!w.dst.join("f").exists());
    w.expect_no_trace();
}

/// Restarts over the dead mounts at `w.at` while a program looks at a pending file in a tight loop.
fn restart_shows_nothing_unfinished(w: &World) {
    let (stop, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (at, end) = (w.at.join("g"), w.at.join("dir"));
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !stop.load(Relaxed) {
                match fs::read(&at) {
                    Ok(got) => assert!(got == bytes(2, 5_000), "an unfinished file was seen"),
                    Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTCONN), "{e}"),
                }
                match fs::read_dir(&end) {
                    Ok(list) => assert!(list.count() > 0, "an unfinished directory was seen"),
                    Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTCONN), "{e}"),
                }
                looks.fetch_add(1, Relaxed);
            }
        });
        let m = w.mount();
        let enough = looks.load(Relaxed) + 50;
        wait_until("the watcher sees the new mount", LIMIT, || {
            looks.load(Relaxed) > enough || watcher.is_finished()
        });
        stop.store(true, Relaxed);
        watcher.join().unwrap();
        assert_eq!(
            mounts()
                .iter()
                .filter(|m| m.at == w.at && m.kind == "fuse.mirrorfs")
                .count(),
            1,
            "no dead mount may be left"
        );
        m.finish();
    });
    assert!(fuse_mount_at(&w.at).is_none());
}

#[test]
fn mounting_again_over_a_dead_mount_never_shows_the_unfinished_tree() {
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    w.mount_lazy().kill();
    restart_shows_nothing_unfinished(&w);
    w.expect_no_trace();
}

#[test]
fn dead_mounts_that_lie_on_each_other_are_all_replaced() {
    let (Some(w), Some(other)) = (world(some_files), world(some_files)) else {
        return;
    };
    let w = w.over();
    w.mount_lazy().kill();
    // As after a kill between the new mount's arrival and the dead one's departure.
    other.mount_lazy().kill();
    rustix::mount::mount_move(&other.at, &w.at).unwrap();
    restart_shows_nothing_unfinished(&w);
    w.expect_no_trace();
}

#[test]
fn a_dead_mount_on_the_root_of_a_file_system_or_beside_dst_is_replaced_too() {
    if !can_mount_on("ext4") {
        return;
    }
    // DST is the root of a file system of its own.
    let (src, fs) = (Scratch::new(), LoopFs::new("ext4"));
    some_files(&At::open(src.path()));
    let dst = fs.path().to_path_buf();
    fs::remove_dir(dst.join("lost+found")).unwrap();
    let w = World::from(src.path().to_path_buf(), dst, vec![fs]).over();
    w.mount_lazy().kill();
    restart_shows_nothing_unfinished(&w);
    w.expect_no_trace();
    // The mount point is a directory of its own.
    let Some(w) = world(some_files) else { return };
    w.mount_lazy().kill();
    let m = w.mount();
    assert_eq!(fs::read(m.path("g")).unwrap(), bytes(2, 5_000));
    m.finish();
    assert!(fuse_mount_at(&w.at).is_none());
    w.expect_no_trace();
}

#[test]
fn a_dead_mount_that_is_named_by_a_symlink_is_replaced_too() {
    let mount = |w: &World, paths: &[&Path]| {
        let mut command = mirrorfs();
        command.arg("mount").arg(&w.src).args(paths);
        run(&mut command).expect_code(0);
        assert_eq!(fs::read(w.at.join("g")).unwrap(), bytes(2, 5_000));
        let lies = |m: &&crate::fixture::Mount| m.at == w.at || m.at == w.dst;
        assert_eq!(
            mounts().iter().filter(lies).count(),
            1,
            "a dead one is left"
        );
        run(mirrorfs().arg("wait").arg(&w.at)).expect_code(0);
        run(mirrorfs().arg("finish").arg(&w.at)).expect_code(0);
        w.expect_no_trace();
    };
    let link = |w: &World, name: &str, to: &Path| {
        let link = w.scratch_path(name);
        std::os::unix::fs::symlink(to, &link).unwrap();
        link
    };
    // DST itself is the mount point; the second link is relative.
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    w.mount_lazy().kill();
    let near = link(&w, "near", &w.dst);
    let far = link(&w, "far", Path::new(near.file_name().unwrap()));
    mount(&w, &[&far]);
    // The mount point is a directory of its own.
    let Some(w) = world(some_files) else { return };
    w.mount_lazy().kill();
    let at = link(&w, "at", &w.at);
    mount(&w, &[&w.dst, &at]);
    // The dead mount is on DST, and the new one is elsewhere.
    let Some(w) = world(some_files) else { return };
    let w = w.over();
    w.mount_lazy().kill();
    let dst = link(&w, "dst", &w.dst);
    let elsewhere = w.scratch_path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let w = w.at(&elsewhere);
    mount(&w, &[&dst, &elsewhere]);
}

#[test]
fn adopting_a_copy_made_earlier_pulls_only_what_differs() {
    let Some(w) = world(|d| {
        some_files(d);
        let deep = d.dir("deep");
        deep.file("same", &bytes(7, 3_000));
        deep.file("changed", &bytes(8, 3_000));
        deep.file("longer", &bytes(9, 3_000));
        deep.file("linked", &bytes(10, 3_000));
        deep.link("linked", d, "other name");
        for name in ["same", "changed", "longer", "linked"] {
            deep.stamp(name, 1_200_000_000, 5);
        }
    }) else {
        return;
    };
    let sync = || run(mirrorfs().arg("sync").args([&w.src, &w.dst]));
    sync().expect_code(0);
    // What is equal in size and time is not looked at: these bytes stay.
    let kept = w.dst.join("deep/same");
    fs::write(&kept, bytes(11, 3_000)).unwrap();
    set_times(&kept, 1_200_000_000, 5).unwrap();
    fs::write(w.dst.join("deep/only here"), "x").unwrap();
    // SRC goes on after the copy.
    fs::write(w.src.join("deep/changed"), bytes(12, 3_000)).unwrap();
    fs::write(w.src.join("deep/longer"), bytes(13, 4_000)).unwrap();
    fs::write(w.src.join("deep/new"), bytes(14, 100_000)).unwrap();
    fs::create_dir_all(w.src.join("new/below")).unwrap();
    fs::write(w.src.join("new/below/file"), bytes(15, 200)).unwrap();

    let (code, said) = w.try_mount(&[], &[]).err().expect("DST is not empty");
    assert!(code == 3 && said.contains("--adopt"), "{code}: {said}");
    let m = w.mount_with(&["--adopt"], &[]);
    assert_eq!(fs::read(m.path("deep/longer")).unwrap(), bytes(13, 4_000));
    m.wait_complete();
    // A restart of an adopted migration needs the word no more.
    m.unmount();
    let m = w.mount();
    m.finish();
    assert_eq!(fs::read(&kept).unwrap(), bytes(11, 3_000));
    assert_eq!(fs::read(w.dst.join("deep/only here")).unwrap(), b"x");
    fs::write(&kept, bytes(7, 3_000)).unwrap();
    set_times(&kept, 1_200_000_000, 5).unwrap();
    fs::remove_file(w.dst.join("deep/only here")).unwrap();
    set_times(
        &w.dst.join("deep"),
        w.src.join("deep").metadata().unwrap().mtime(),
        w.src.join("deep").metadata().unwrap().mtime_nsec(),
    )
    .unwrap();
    w.expect_finished_copy();
}

#[test]
pub(crate) fn a_sync_that_is_not_durable_is_not_adopted() {
    let Some(w) = world(some_files) else { return };
    let sync = || run(mirrorfs().arg("sync").args([&w.src, &w.dst]));
    sync().expect_code(0);
    let record = w.dst.join(CONTROL).join("sync");
    fs::create_dir(w.dst.join(CONTROL)).unwrap();
    fs::write(&record, "of another boot").unwrap();
    let (code, said) = w.try_mount(&["--adopt"], &[]).err().expect("refused");
    assert!(
        code == 3 && said.contains("run mirrorfs sync once more"),
        "{code}: {said}"
    );
    assert!(record.exists(), "nothing is changed");
    let expect_no_migration = || {
        for command in ["status", "wait", "finish", "errors"] {
            let said = run(mirrorfs().arg(command).arg(&w.dst)).expect_code(3).err;
            assert!(
                said.contains("a sync into it did not end"),
                "{command}: {said}"
            );
        }
    };
    expect_no_migration();
    let shards = w.dst.join(CONTROL).join("shards");
    fs::rename(&record, &shards).unwrap();
    expect_no_migration();
    fs::rename(&shards, &record).unwrap();
    sync().expect_code(0);
    assert!(!record.exists());
    w.mount_with(&["--adopt"], &[]).finish();
    w.expect_finished_copy();
}

#[test]
fn the_daemonized_mount_is_usable_when_the_command_returns() {
    let Some(w) = world(some_files) else { return };
    run(mirrorfs().arg("mount").arg(&w.src).arg(&w.dst).arg(&w.at)).expect_code(0);
    assert_eq!(fs::read(w.at.join("f")).unwrap(), bytes(1, 30_000));
    let pid = fixture::status(&w.at)["pid"].as_u64().unwrap() as u32;
    let running = || Path::new(&format!("/proc/{pid}")).exists();
    assert!(running());
    wait_until("COMPLETE", LIMIT, || {
        fixture::status(&w.at)["state"] == "COMPLETE"
    });
    let finish = run(mirrorfs().arg("finish").arg(&w.at));
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while running() && std::time::Instant::now() < end {
        thread::sleep(Duration::from_millis(10));
    }
    if running() {
        raw::kill(pid, libc::SIGKILL);
        panic!("the daemon is still there");
    }
    finish.expect_code(0);
    w.expect_finished_copy();
}

#[test]
fn finish_names_the_tree_that_is_plain() {
    let Some(w) = world(some_files) else { return };
    let mut m = w.mount();
    m.wait_complete();
    let said = run(mirrorfs().arg("finish").arg(&m.at)).expect_code(0).out;
    let (dst, at) = (w.dst.display(), w.at.display());
    let first = format!("finished: \"{dst}\" is a plain tree\n");
    let second = format!("\"{at}\" is what it was before the mount: go on in \"{dst}\"");
    assert!(said.starts_with(&first) && said.contains(&second), "{said}");
    assert_eq!(m.wait_exit(LIMIT), Some(0), "{}", m.log());
    w.expect_finished_copy();
}

#[test]
pub(crate) fn finish_refuses_while_something_is_pending() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount_lazy();
    fs::read(m.path("f")).unwrap();
    let refused = run(mirrorfs().arg("finish").arg(&m.at));
    assert_ne!(refused.code(), 0, "{refused:?}");
    assert_eq!(
        fs::read(m.path("g")).unwrap(),
        bytes(2, 5_000),
        "the mount goes on"
    );
    m.finish_rest();
    w.expect_finished_copy();
}

#[test]
fn other_users_may_use_a_mount_of_root() {
    let Some(w) = world(some_files) else { return };
    let m = w.mount();
    let out = shell_as(1000, 1000, &m.at, "ls | wc -l; cat dir/a; touch new 2>&1").out;
    assert!(out.starts_with("4\na"), "{out}");
    assert!(out.contains("Permission denied"), "{out}");
}

#[test]
fn the_kinds_of_entries_in_a_listing_are_right() {
    let Some(w) = world(|d| {
        d.file("f", b"x");
        d.dir("d");
        d.symlink("x", "l");
        d.node("p", rustix::fs::FileType::Fifo, 0);
    }) else {
        return;
    };
    let m = w.mount_lazy();
    let mut kinds: Vec<_> = fs::read_dir(&m.at)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| {
            let t = e.file_type().unwrap();
            let kind = (t.is_dir(), t.is_file(), t.is_symlink(), t.is_fifo());
            (e.file_name().into_string().unwrap(), kind)
        })
        .collect();
    kinds.sort();
    let kind = |n: &str, at: usize| (n.to_owned(), (at == 0, at == 1, at == 2, at == 3));
    assert_eq!(
        kinds,
        [kind("d", 0), kind("f", 1), kind("l", 2), kind("p", 3)]
    );
}

#[test]
fn reading_at_the_end_and_seeking_work_as_everywhere() {
    same_as_plain(some_files, |at| {
        let mut file = File::open(at.join("large")).unwrap();
        let end = file.seek(SeekFrom::End(-3)).unwrap();
        let mut rest = Vec::new();
        file.read_to_end(&mut rest).unwrap();
        let past = told(file.read_at(&mut [0; 10], 1 << 40));
        format!("{end} {rest:?} {past}")
    });
}

/// A change waits for its directory, and its file has landed by then: the mark, which does not know of
/// the change, is still to go.
#[test]
fn times_that_are_set_while_files_land_survive_a_kill() {
    const DIRS: usize = 40;
    const NONE: [usize; 0] = [];
    for kind in ["ext4", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let src = At::open(&w.src);
        for d in 0..DIRS {
            src.dir(format!("d{d}"));
            for n in 0..5 {
                src.file(format!("d{d}/f{n}"), &bytes(n, 3000));
            }
        }
        let m = w.mount_lazy();
        let file = |d: usize| m.path(format!("d{d}/f0"));
        thread::scope(|scope| {
            for d in 0..DIRS {
                let at = file(d);
                at.symlink_metadata().unwrap();
                let read = file(d);
                scope.spawn(move || fs::read(read).unwrap());
                scope.spawn(move || set_times(&at, 1_234_567, 0).unwrap());
            }
        });
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        let m = w.mount();
        let is_lost = |at: &Path| at.metadata().unwrap().mtime() != 1_234_567;
        let all = |root: &Path| -> Vec<usize> {
            (0..DIRS)
                .filter(|d| is_lost(&root.join(format!("d{d}/f0"))))
                .collect()
        };
        assert_eq!(all(&m.at), NONE, "{kind}");
        m.finish();
        assert_eq!(all(&w.dst), NONE, "{kind}");
    }
}

/// The walker finds a mark, an inode and a name, and they must belong together.
#[test]
fn files_that_change_names_while_the_walker_looks_keep_their_bytes() {
    const FILES: usize = 1500;
    let Some(w) = world(|src| {
        for n in 0..FILES {
            src.file(format!("f{n}"), format!("I am {n}").as_bytes());
        }
    }) else {
        return;
    };
    for round in 0..3 {
        let m = w.mount_lazy();
        assert_eq!(fs::read_dir(&m.at).unwrap().count(), FILES);
        let at = File::open(&m.at).unwrap();
        let is_over = AtomicBool::new(false);
        let names = thread::scope(|scope| {
            let swaps = scope.spawn(|| {
                let mut names: Vec<usize> = (0..FILES).collect();
                for i in (0..FILES).cycle() {
                    let (a, b) = (i, (i * 7 + 13) % FILES);
                    let [from, to] = [a, b].map(|n| format!("f{n}"));
                    let exchange = RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(&at, from, &at, to, exchange).unwrap();
                    names.swap(a, b);
                    if is_over.load(Relaxed) {
                        break;
                    }
                }
                names
            });
            run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
            let pulled = || m.status()["files_pulled"].as_u64().unwrap();
            wait_until("most is pulled", LIMIT, || pulled() > FILES as u64 * 9 / 10);
            is_over.store(true, Relaxed);
            swaps.join().unwrap()
        });
        drop(at); // An open file would keep the mount.
        m.wait_complete();
        m.finish();
        let wrong = |(n, was): &(usize, &usize)| {
            fs::read(w.dst.join(format!("f{n}"))).unwrap() != format!("I am {was}").as_bytes()
        };
        let wrong: Vec<_> = names.iter().enumerate().filter(wrong).collect();
        assert_eq!(wrong, [], "round {round}: at this name should be that file");
        w.empty_dst();
    }
}
