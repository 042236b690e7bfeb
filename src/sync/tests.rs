//! What sync promises, on real trees.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::*;
use crate::config::{Cache, FilterArg, Reflink};
use crate::verify::{Difference, VerifyOptions, verify};

/// A src and a dst that does not exist yet.
struct Trees {
    _dir: tempfile::TempDir,
    src: PathBuf,
    dst: PathBuf,
}

fn trees() -> Trees {
    let dir = tempfile::tempdir().expect("a directory");
    let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
    fs::create_dir_all(src.join("a/b")).expect("mkdir");
    fs::write(src.join("a/b/large"), vec![7u8; 3 << 20]).expect("write");
    fs::write(src.join("a/x"), b"x").expect("write");
    fs::write(src.join("empty"), b"").expect("write");
    fs::hard_link(src.join("a/x"), src.join("y")).expect("link");
    fs::hard_link(src.join("a/x"), src.join("a/b/z")).expect("link");
    symlink("nowhere", src.join("a/l")).expect("symlink");
    let hole = fs::File::create(src.join("hole")).expect("create");
    hole.set_len(1 << 40).expect("truncate");
    fs::set_permissions(src.join("a"), fs::Permissions::from_mode(0o2750)).expect("chmod");
    Trees {
        _dir: dir,
        src,
        dst,
    }
}

impl Trees {
    fn config(&self) -> SyncConfig {
        SyncConfig {
            itemize: true,
            fsync: Fsync::Never,
            ..SyncConfig::new(&self.src, &self.dst)
        }
    }

    fn sync(&self) -> (SyncReport, Vec<String>) {
        sync(&self.config())
    }

    fn differences(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut on = |d: Difference| all.push(d.to_string());
        verify(&self.src, &self.dst, &VerifyOptions::default(), &mut on).expect("verify");
        all
    }
}

fn sync(config: &SyncConfig) -> (SyncReport, Vec<String>) {
    let mut lines = Vec::new();
    let stop = AtomicBool::new(false);
    let report = run(config, Arc::default(), &stop, &mut |event| match event {
        Event::Line(line) => lines.push(line.to_string()),
        Event::Error(error) => lines.push(error.to_string()),
        Event::LeftOut(path) => lines.push(format!("left out {}", path.display())),
    });
    lines.sort();
    (report.expect("sync"), lines)
}

fn set_mtime(path: &Path, sec: i64) {
    let time = crate::sys::stat::Time { sec, nsec: 5 };
    let times = crate::meta::timestamps(time, time);
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(CWD, path, &times, flags).expect("utimensat");
}

#[test]
fn a_copy_is_equal_and_a_second_run_changes_nothing() {
    let t = trees();
    let (first, _) = t.sync();
    assert_eq!((first.failed, first.vanished), (0, 0));
    assert_eq!(first.hardlinks, 2);
    assert_eq!(t.differences(), [] as [String; 0]);
    let hole = fs::metadata(t.dst.join("hole")).expect("stat");
    assert_eq!(hole.blocks(), 0);
    let (second, lines) = t.sync();
    assert_eq!(lines, [] as [String; 0]);
    assert_eq!((second.created, second.updated), (0, 0));
    assert_eq!(second.skipped, second.entries);
}

#[test]
fn what_changed_is_replaced_and_only_that() {
    let t = trees();
    t.sync();
    let other = fs::metadata(t.dst.join("a/x")).expect("stat");
    fs::write(t.src.join("a/b/large"), b"short").expect("write");
    fs::set_permissions(t.src.join("empty"), fs::Permissions::from_mode(0o640)).expect("chmod");
    fs::remove_file(t.src.join("a/l")).expect("unlink");
    symlink("elsewhere", t.src.join("a/l")).expect("symlink");
    let (report, lines) = t.sync();
    assert_eq!(t.differences(), [] as [String; 0]);
    assert_eq!(report.transferred, 1);
    assert!(
        lines.contains(&">f.st...... a/b/large".to_owned()),
        "{lines:?}"
    );
    assert!(lines.contains(&".f...p..... empty".to_owned()), "{lines:?}");
    let after = fs::metadata(t.dst.join("a/x")).expect("stat");
    assert_eq!(
        (after.ino(), after.ctime_nsec()),
        (other.ino(), other.ctime_nsec())
    );
}

#[test]
fn delete_removes_what_src_lacks_and_never_the_control_directory() {
    let t = trees();
    t.sync();
    fs::create_dir_all(t.dst.join("old/deep/er")).expect("mkdir");
    fs::write(t.dst.join("old/deep/er/f"), b"x").expect("write");
    fs::create_dir(t.dst.join(".mirrorfs")).expect("mkdir");
    fs::write(t.dst.join(".mirrorfs-tmp.1.2"), b"x").expect("write");
    let kept = t.sync().0;
    assert!(t.dst.join("old").exists());
    assert_eq!(kept.deleted, 1);
    assert!(!t.dst.join(".mirrorfs-tmp.1.2").exists());
    let limited = SyncConfig {
        delete: true,
        max_delete: Some(1),
        ..t.config()
    };
    assert!(sync(&limited).0.max_delete_reached);
    let all = SyncConfig {
        delete: true,
        ..t.config()
    };
    assert_eq!(sync(&all).0.failed, 0);
    assert!(!t.dst.join("old").exists());
    assert!(t.dst.join(".mirrorfs").exists());
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let t = trees();
    let dry = SyncConfig {
        dry_run: true,
        delete: true,
        ..t.config()
    };
    let (report, said) = sync(&dry);
    assert!(!t.dst.exists());
    let (real, did) = t.sync();
    assert_eq!(report.created, real.created);
    assert_eq!(report.hardlinks, real.hardlinks);
    assert_eq!(said.len(), did.len());
    fs::write(t.dst.join("extra"), b"").expect("write");
    let (_, said) = sync(&dry);
    assert_eq!(said, ["*deleting   extra", ".d..t...... ./"]);
    assert!(t.dst.join("extra").exists());
}

#[test]
fn checksum_finds_what_size_and_mtime_hide() {
    let t = trees();
    t.sync();
    let at = t.dst.join("a/b/large");
    let mtime = fs::metadata(&at).expect("stat");
    let mut bytes = vec![7u8; 3 << 20];
    bytes[1 << 20] = 8;
    fs::write(&at, bytes).expect("write");
    let time = crate::sys::stat::Time {
        sec: mtime.mtime(),
        nsec: mtime.mtime_nsec() as u32,
    };
    let times = crate::meta::timestamps(time, time);
    rustix::fs::utimensat(CWD, &at, &times, rustix::fs::AtFlags::empty()).expect("utimensat");
    assert_eq!(t.sync().0.transferred, 0);
    let checksum = SyncConfig {
        checksum: true,
        ..t.config()
    };
    assert_eq!(sync(&checksum).0.transferred, 1);
    assert_eq!(t.differences(), [] as [String; 0]);
}

#[test]
fn update_leaves_alone_what_is_newer_in_dst() {
    let t = trees();
    t.sync();
    fs::write(t.dst.join("empty"), b"newer").expect("write");
    set_mtime(&t.src.join("empty"), 1000);
    let update = SyncConfig {
        update: true,
        ..t.config()
    };
    sync(&update);
    assert_eq!(fs::read(t.dst.join("empty")).expect("read"), b"newer");
    t.sync();
    assert_eq!(fs::read(t.dst.join("empty")).expect("read"), b"");
}

#[test]
fn wrong_link_groups_in_dst_are_put_right() {
    let t = trees();
    t.sync();
    // One name of the group is a copy; a file of its own is a link to the group.
    fs::remove_file(t.dst.join("y")).expect("unlink");
    fs::copy(t.dst.join("a/x"), t.dst.join("y")).expect("copy");
    fs::remove_file(t.dst.join("empty")).expect("unlink");
    fs::hard_link(t.dst.join("a/b/large"), t.dst.join("empty")).expect("link");
    t.sync();
    assert_eq!(t.differences(), [] as [String; 0]);
}

#[test]
fn another_type_is_replaced_a_directory_only_with_delete() {
    let t = trees();
    fs::create_dir_all(t.dst.join("y/in")).expect("mkdir");
    fs::write(t.dst.join("a"), b"a file").expect("write");
    let (report, _) = t.sync();
    assert_eq!(report.failed, 1);
    assert!(t.dst.join("y/in").exists());
    assert!(t.dst.join("a/b/large").exists());
    let delete = SyncConfig {
        delete: true,
        ..t.config()
    };
    assert_eq!(sync(&delete).0.failed, 0);
    assert_eq!(t.differences(), [] as [String; 0]);
}

#[test]
fn a_src_that_is_itself_half_migrated_is_refused() {
    let t = trees();
    let dir = host::open_dir(&t.src).expect("open");
    let mark = crate::mark::Mark::populated();
    MarkName::User
        .set(Target::Open(dir.as_fd()), &mark)
        .expect("setxattr");
    let stop = AtomicBool::new(false);
    let result = run(&t.config(), Arc::default(), &stop, &mut |_| {});
    assert!(matches!(result, Err(Error::SrcPending { .. })));
    assert!(fs::read_dir(&t.dst).map_or(0, Iterator::count) == 0);
}

#[test]
fn a_directory_larger_than_a_batch_keeps_its_times_and_loses_what_is_extraneous() {
    let t = trees();
    for i in 0..6000 {
        fs::write(t.src.join(format!("a/b/{i}")), b"").expect("write");
    }
    t.sync();
    assert_eq!(t.differences(), [] as [String; 0]);
    fs::write(t.dst.join("a/b/extra"), b"").expect("write");
    fs::write(t.src.join("a/b/17"), b"17").expect("write");
    let delete = SyncConfig {
        delete: true,
        ..t.config()
    };
    let (report, lines) = sync(&delete);
    assert_eq!((report.deleted, report.transferred), (1, 1), "{lines:?}");
    assert_eq!(t.differences(), [] as [String; 0]);
}

/// Makes dst look as a power cut may leave it: a file with the right size and times and without
/// its bytes, and the record of a run that another boot began.
fn cut_power(t: &Trees) {
    let mtime = fs::metadata(t.src.join("a/b/large"))
        .and_then(|m| m.modified())
        .expect("mtime");
    let lost = fs::File::create(t.dst.join("a/b/large")).expect("create");
    lost.set_len(3 << 20).expect("truncate");
    lost.set_modified(mtime).expect("utimes");
    fs::create_dir_all(t.dst.join(".mirrorfs")).expect("mkdir");
    fs::write(t.dst.join(".mirrorfs/sync"), "another boot\n").expect("write");
}

#[test]
fn bytes_that_a_power_cut_took_are_seen_by_the_next_run() {
    let t = trees();
    t.sync();
    cut_power(&t);
    let end = SyncConfig {
        fsync: Fsync::End,
        ..t.config()
    };
    let (report, lines) = sync(&end);
    assert_eq!((report.failed, report.transferred), (0, 1), "{lines:?}");
    assert_eq!(t.differences(), [] as [String; 0]);
    assert!(!t.dst.join(".mirrorfs").exists());
}

#[test]
fn the_record_of_another_boot_stays_until_every_file_was_looked_at() {
    let t = trees();
    t.sync();
    cut_power(&t);
    let some = |change: fn(&mut SyncConfig)| {
        let mut config = SyncConfig {
            fsync: Fsync::End,
            ..t.config()
        };
        change(&mut config);
        config
    };
    for left_out in [
        some(|c| c.ignore_existing = true),
        some(|c| c.one_file_system = true),
        some(|c| c.filters = vec![FilterArg::Exclude("large".into())]),
    ] {
        sync(&left_out);
        assert!(t.dst.join(".mirrorfs/sync").exists(), "{left_out:?}");
    }
    // What another boot has left is not taken away by a run that makes nothing durable.
    t.sync();
    assert!(t.dst.join(".mirrorfs/sync").exists());
}

#[test]
fn a_run_beside_another_leaves_the_record_to_it() {
    let t = trees();
    let roots = open_roots(&t.config()).expect("roots").0;
    let dst = roots.dst.as_fd();
    let (first, late) = (
        Record::look(dst, None).expect("look"),
        Record::look(dst, None).expect("look"),
    );
    assert!(first.begin(dst, None, true).expect("begin"));
    // It looked before there was a record: each of its files is synced by itself.
    assert!(!late.begin(dst, None, true).expect("begin"));
    let end = SyncConfig {
        fsync: Fsync::End,
        ..t.config()
    };
    let (report, lines) = sync(&end);
    assert_eq!(report.failed, 0, "{lines:?}");
    assert!(
        t.dst.join(".mirrorfs/sync").exists(),
        "the first is at work"
    );
    let durable = record::End {
        durable: true,
        carefree: false,
        judged: true,
        whole: true,
    };
    late.end(dst, durable).expect("not its own");
    assert!(t.dst.join(".mirrorfs/sync").exists());
    first.end(dst, durable).expect("its own");
    assert!(!t.dst.join(".mirrorfs").exists());
    assert_eq!(t.differences(), [] as [String; 0]);
}

#[test]
fn a_run_that_was_killed_in_this_boot_is_believed() {
    let t = trees();
    t.sync();
    fs::write(t.src.join("new"), b"new").expect("write");
    let roots = open_roots(&t.config()).expect("roots").0;
    let record = Record::look(roots.dst.as_fd(), None).expect("look");
    assert!(record.begin(roots.dst.as_fd(), None, true).expect("begin"));
    drop(record);
    let again = Record::look(roots.dst.as_fd(), None).expect("look");
    let file = crate::sys::stat::stat_path(&t.dst.join("a/b/large")).expect("stat");
    // Before Linux 6.8 nobody is: the mounts have no numbers of their own.
    let told = crate::sys::stat::unique_mount(roots.dst.as_fd()).is_some();
    assert_eq!(again.doubts(&file), !told);
    drop(again);
    let end = SyncConfig {
        fsync: Fsync::End,
        ..t.config()
    };
    sync(&end);
    assert!(!t.dst.join(".mirrorfs").exists());
    assert_eq!(t.differences(), [] as [String; 0]);
}

#[test]
fn every_way_through_or_past_the_cache_brings_every_byte() {
    use std::io::{Seek, SeekFrom, Write};
    for cache in [Cache::Auto, Cache::Keep, Cache::Drop, Cache::Direct] {
        let t = trees();
        let odd: Vec<u8> = (0..(40 << 20) + 4097u32).map(|i| (i % 249) as u8).collect();
        fs::write(t.src.join("a/odd"), &odd).expect("write");
        let mut holes = fs::File::create(t.src.join("a/holes")).expect("create");
        for at in [5000u64, 3 << 20, (33 << 20) + 1] {
            holes.seek(SeekFrom::Start(at)).expect("seek");
            holes.write_all(&odd[..100_001]).expect("write");
        }
        holes.set_len(64 << 20).expect("truncate");
        for jobs in [1, 8] {
            let config = SyncConfig {
                cache,
                jobs: Some(jobs),
                ignore_times: true,
                ..t.config()
            };
            let (report, lines) = sync(&config);
            assert_eq!((report.failed, report.vanished), (0, 0), "{lines:?}");
            assert_eq!(t.differences(), Vec::<String>::new(), "{cache:?} {jobs}");
        }
    }
}

#[test]
fn a_dropped_copy_is_not_in_the_page_cache_and_a_kept_one_is() {
    const TMPFS: u64 = 0x0102_1994;
    for (cache, kept) in [
        (Cache::Keep, true),
        (Cache::Drop, false),
        (Cache::Direct, false),
    ] {
        let t = trees();
        fs::write(t.src.join("big"), vec![3u8; 64 << 20]).expect("write");
        let src = fs::File::open(t.src.join("big")).expect("open");
        if host::fs_stat(src.as_fd()).expect("statfs").magic == TMPFS {
            return; // Its pages are the file.
        }
        src.sync_all().expect("fsync");
        let all = 0..64u64 << 20;
        crate::sys::cache::forget(src.as_fd(), &all);
        let config = SyncConfig {
            cache,
            reflink: Reflink::Never,
            fsync: Fsync::End,
            ..t.config()
        };
        assert_eq!(sync(&config).0.failed, 0);
        let dst = fs::File::open(t.dst.join("big")).expect("open");
        for file in [&src, &dst] {
            let Some(cached) = crate::sys::cache::cached(file.as_fd(), &all) else {
                return; // A kernel that does not tell.
            };
            assert_eq!(cached > 32 << 20, kept, "{cache:?}: {cached}");
        }
    }
}

#[test]
fn as_many_threads_as_asked_for_at_most_whatever_the_source_and_the_cpus() {
    let totals = Totals::default();
    let few = |most| Limits {
        few: 4.min(most),
        most,
        cpus: 2,
    };
    let at = std::time::Duration::from_secs(1);
    let after = |most| Depth::new(few(most)).after(totals.look(at, 0));
    assert_eq!((after(128), after(2)), (4, 2));
    totals.src_asks.store(true, Relaxed);
    (0..50).for_each(|_| totals.src_took(std::time::Duration::from_millis(5)));
    assert!(totals.is_slow());
    assert_eq!((after(128), after(2)), (128, 2));
}

#[test]
fn a_source_that_many_threads_slow_down_is_copied_from_by_fewer() {
    use std::time::Duration;
    // 1 ms for each answer while 16 wait; beyond that all of them lose more than they gain.
    let asked = AtomicU64::new(0);
    let answer = || {
        let n = asked.fetch_add(1, Relaxed) + 1;
        let crowd = (n as f64 / 16.0).max(1.0);
        std::thread::sleep(Duration::from_secs_f64(1e-3 * crowd * crowd));
        asked.fetch_sub(1, Relaxed);
    };
    let (totals, stop, begin) = (Totals::default(), AtomicBool::new(false), Instant::now());
    totals.src_asks.store(true, Relaxed);
    let mut depth = Depth::new(Limits {
        few: 4,
        most: 128,
        cpus: 4,
    });
    // The most threads so far, and the fewest since.
    let (mut most, mut fewest_since) = (0, usize::MAX);
    Crew::led(
        (0..3000).collect::<Vec<u32>>(),
        &stop,
        |idle| {
            let threads = depth.after(totals.look(begin.elapsed(), idle));
            if threads > most {
                (most, fewest_since) = (threads, threads);
            }
            fewest_since = fewest_since.min(threads);
            threads
        },
        || (),
        |_: &Crew<'_, u32, ()>, (), _| {
            let begin = Instant::now();
            answer();
            totals.file_took(begin.elapsed());
        },
        |()| {},
    );
    assert!(most > 32, "{most} threads at the most");
    assert!(fewest_since <= most / 2, "{most}, then {fewest_since}");
}

/// Takes the data of files out of the page cache; false where the file system has it nowhere else.
fn chill(files: &[PathBuf]) -> bool {
    files.iter().all(|path| {
        let file = fs::File::open(path).expect("open");
        file.sync_all().expect("fsync");
        let all = 0..file.metadata().expect("stat").len();
        crate::sys::cache::forget(file.as_fd(), &all);
        crate::sys::cache::cached(file.as_fd(), &all) == Some(0)
    })
}

#[test]
fn what_is_not_in_memory_is_asked_for_first_and_copied_as_it_is_by_then() {
    let t = trees();
    let files: Vec<PathBuf> = (0..20).map(|i| t.src.join(format!("a/f{i}"))).collect();
    let bytes = |n: u8| vec![n; 5000];
    for path in &files {
        fs::write(path, bytes(1)).expect("write");
    }
    let config = SyncConfig {
        reflink: Reflink::Never,
        jobs: Some(1),
        ..t.config()
    };
    if !chill(&files) {
        eprintln!("skipped: no file system with a page cache of its own");
        return;
    }
    let throttle = Throttle::default();
    let (roots, _view, fresh) = open_roots(&config).expect("roots");
    let job = Job::new(&config, Arc::default(), roots, &throttle).expect("a job");
    let first = Item::Dir {
        place: job.roots.root(),
        fresh,
        shallow: false,
        selection: Selection::default(),
    };
    let (halt, put_off) = (AtomicBool::new(false), AtomicU64::new(0));
    Crew::run(
        vec![first],
        &halt,
        || 1,
        Buffers::new,
        |crew: &Crew<'_, Item, Event>, buffers, item| {
            let work = Work { crew, job: &job };
            work.one(buffers, item);
            // All that was put off changes before its turn comes: longer, and other bytes.
            if put_off.fetch_add(buffers.later.len() as u64, Relaxed) == 0 {
                for path in files.iter().filter(|_| !buffers.later.is_empty()) {
                    fs::write(path, [bytes(2), bytes(2)].concat()).expect("write");
                }
            }
            work.rest(buffers);
        },
        |event| assert!(!matches!(event, Event::Error(_)), "{event:?}"),
    );
    assert_eq!(put_off.load(Relaxed), 20);
    job.settle(&SyncReport::default()).expect("the end");
    assert_eq!(t.differences(), [] as [String; 0]);
}
