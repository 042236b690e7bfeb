//! Large pending files that users change before they are here: the same bytes as in a plain file, at
//! once, after a kill at any step, after an upgrade, with a src that fails, and at the end.
//!
//! MIRRORFS_TEST_SEED repeats a random run. Power cuts are scripts/crash.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom};

use crate::badsource::{self, BadSrc, entries};
use crate::compare;
use crate::crash::{FAULT_EXIT, is_dead};
use crate::fixture::{
    LIMIT, Mounted, Random, World, bytes, can_mount_on, mirrorfs, run, wait_until,
};
use crate::nasty::At;
use crate::raw;

/// Over this a file is large: tests need no hundred megabytes.
const LARGE: &[&str] = &["-o", "large=64K"];
const BLOCK: u64 = 4096;
/// The file's size in src: no multiple of anything.
const SIZE: usize = 3_000_001;

/// A mount that pulls nothing but what is asked for.
fn lazy(w: &World, env: &[(&str, &str)]) -> Mounted {
    let m = w.mount_with(&["-o", "large=64K", "--no-background"], env);
    run(mirrorfs().arg("pause").arg(&m.at)).expect_code(0);
    m
}

fn rw() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}

/// A src with one file `f`: data, holes of all kinds, data.
fn world(kind: &str) -> (World, Vec<u8>) {
    let w = World::on(kind);
    let all = fill(&w.src, SIZE);
    (w, all)
}

fn fill(src: &Path, size: usize) -> Vec<u8> {
    let at = At::open(src);
    let dense = bytes(5, size);
    let mut all = vec![0; size];
    let pieces = [
        0..700_000,
        720_000..725_000,
        1_000_001..1_500_000,
        2_000_000..size,
    ];
    let pieces: Vec<(u64, &[u8])> = pieces
        .iter()
        .map(|p| (p.start as u64, &dense[p.clone()]))
        .collect();
    for (offset, piece) in &pieces {
        all[*offset as usize..][..piece.len()].copy_from_slice(piece);
    }
    at.sparse("f", size as u64, &pieces);
    at.stamp("f", 1_300_000_000, 5);
    all
}

/// The bytes of a file are these, also where it says that it has holes.
#[track_caller]
fn expect_bytes(path: &Path, want: &[u8], what: &str) {
    let got = fs::read(path).unwrap();
    assert_eq!(got.len(), want.len(), "{what}: size");
    if let Some(at) = (0..want.len()).find(|i| got[*i] != want[*i]) {
        let zeros = got[at..].iter().take(100).all(|b| *b == 0);
        panic!(
            "{what}: byte {at} (block {}): {} instead of {}, zeros: {zeros}",
            at as u64 / BLOCK,
            got[at],
            want[at]
        );
    }
}

#[track_caller]
fn finish(w: &World, m: Mounted, want: &[u8], what: &str) {
    m.wait_complete();
    expect_bytes(&m.path("f"), want, what);
    m.finish();
    w.expect_no_trace();
    expect_bytes(&w.dst.join("f"), want, what);
}

fn overwrite(all: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let end = offset as usize + data.len();
    if all.len() < end {
        all.resize(end, 0);
    }
    all[offset as usize..end].copy_from_slice(data);
}

#[test]
pub(crate) fn writing_into_a_large_pending_file_pulls_only_the_blocks_that_it_changes_in_part() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let mut all = bytes(3, 40 << 20);
        At::open(&w.src).file("f", &all);
        let m = lazy(&w, &[]);
        let f = rw().open(m.path("f")).unwrap();
        for (offset, len) in [
            (5 << 20, 4096),
            (9_000_001, 10),
            (20 << 20, 1 << 20),
            (all.len() as u64, 5000),
        ] {
            let data = bytes(offset, len);
            f.write_all_at(&data, offset).unwrap();
            overwrite(&mut all, offset, &data);
        }
        f.sync_all().unwrap();
        let there = w.dst.join("f").metadata().unwrap();
        assert!(there.blocks() * 512 < 3 << 20, "{kind}: {}", there.blocks());
        assert_eq!(f.metadata().unwrap().len(), all.len() as u64);
        let mut part = vec![0; 50_000];
        f.read_exact_at(&mut part, 8_990_000).unwrap();
        assert!(part == all[8_990_000..9_040_000], "{kind}: around a write");
        drop(f);
        m.unmount();
        finish(&w, w.mount_with(LARGE, &[]), &all, kind);
    }
}

/// One random change or look, on the mount and on what the file should be.
fn step(r: &mut Random, f: &File, all: &mut Vec<u8>, log: &mut Vec<String>) -> io::Result<()> {
    let edge = [0u64, 4096, 8192, 65_536, 262_144, 700_000, 1 << 20, 2 << 20];
    let offset = match r.below(4) {
        0 => r.one_of(&edge).saturating_sub(r.below(3)),
        1 => (all.len() as u64).saturating_sub(r.below(9000)),
        2 => r.below(SIZE as u64 + 50_000) / BLOCK * BLOCK,
        _ => r.below(SIZE as u64),
    };
    let len = *r.one_of(&[1u64, 100, 4095, 4096, 4097, 8192, 70_000, 300_000]);
    let end = (offset + len).min(all.len() as u64);
    let what = r.below(24);
    log.push(format!("{what}: {offset} + {len}, size {}", all.len()));
    match what {
        0..=8 => {
            let data = bytes(r.next(), len as usize);
            f.write_all_at(&data, offset)?;
            overwrite(all, offset, &data);
        }
        9..=13 => {
            let mut got = vec![0; len as usize];
            let mut n = 0;
            while n < got.len() {
                match f.read_at(&mut got[n..], offset + n as u64)? {
                    0 => break,
                    more => n += more,
                }
            }
            let want = all.get(offset as usize..end as usize).unwrap_or_default();
            if let Some(at) = (0..want.len().min(n)).find(|i| got[*i] != want[*i]) {
                panic!("byte {} is wrong: {log:#?}", offset + at as u64);
            }
            assert_eq!(n, want.len(), "{log:#?}");
        }
        14 => {
            let size = r.below(all.len() as u64 + 20_000);
            let size = size.max(SIZE as u64 / 2);
            log.push(format!("   size {size}"));
            f.set_len(size)?;
            all.resize(size as usize, 0);
        }
        15 | 16 => {
            let flags = match what {
                15 => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                _ => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            };
            match rustix::fs::fallocate(f, flags, offset, len) {
                Err(rustix::io::Errno::OPNOTSUPP) => {}
                other => {
                    other?;
                    let range = (offset as usize).min(all.len())..end.max(offset) as usize;
                    let range = range.start..range.end.min(all.len()).max(range.start);
                    all[range].fill(0);
                }
            }
        }
        17 => {
            rustix::fs::fallocate(f, FallocateFlags::empty(), offset, len)?;
            let size = all.len().max((offset + len) as usize);
            all.resize(size, 0);
        }
        18 => f.sync_data()?,
        19 => f.sync_all()?,
        20 => {
            // A hole that it tells of is one.
            if let Ok(hole) = rustix::fs::seek(f, SeekFrom::Hole(offset)) {
                let data = rustix::fs::seek(f, SeekFrom::Data(hole)).unwrap_or(all.len() as u64);
                let zeros = all.get(hole as usize..data as usize).unwrap_or_default();
                assert!(zeros.iter().all(|b| *b == 0), "{hole}..{data}: {log:#?}");
            }
            if let Ok(data) = rustix::fs::seek(f, SeekFrom::Data(offset)) {
                let zeros = all.get(offset as usize..data as usize).unwrap_or_default();
                assert!(zeros.iter().all(|b| *b == 0), "{offset}..{data}: {log:#?}");
            }
        }
        21 => {
            let at = offset / BLOCK * BLOCK;
            if at + 8192 <= all.len() as u64 {
                let map = raw::Map::shared(f.as_fd(), all.len(), true)?;
                let data = bytes(r.next(), 5000);
                map.write(at as usize, &data);
                map.sync()?;
                overwrite(all, at, &data);
            }
        }
        22 => {
            assert_eq!(f.metadata()?.len(), all.len() as u64, "{log:#?}");
        }
        _ => {
            let mut to = r.below(SIZE as u64);
            let mut from = offset.min(all.len() as u64);
            let apart = from.abs_diff(to) > len;
            if apart && from + len <= all.len() as u64 && to + len <= all.len() as u64 {
                let (start, target) = (from as usize, to);
                let mut left = len as usize;
                while left > 0 {
                    let n =
                        rustix::fs::copy_file_range(f, Some(&mut from), f, Some(&mut to), left)?;
                    left -= n.max(1);
                }
                let copy = all[start..start + len as usize].to_vec();
                overwrite(all, target, &copy);
            }
        }
    }
    Ok(())
}

fn random(kind: &str, background: bool, seed: u64, kills: usize) {
    if !can_mount_on(kind) {
        return;
    }
    let (w, mut all) = world(kind);
    let mut r = Random::seeded(seed);
    let mut log = vec![format!("{kind} background {background} seed {seed}")];
    for round in 0..=kills {
        let m = match background {
            true => w.mount_with(LARGE, &[]),
            false => lazy(&w, &[]),
        };
        log.push(format!("mount {round}"));
        let f = rw().open(m.path("f")).unwrap();
        for _ in 0..60 {
            if let Err(e) = step(&mut r, &f, &mut all, &mut log) {
                panic!("{e}: {log:#?}\n{}", m.log());
            }
        }
        drop(f);
        if round < kills {
            raw::kill(m.pid, libc::SIGKILL);
            m.kill();
        } else {
            expect_bytes(&m.path("f"), &all, &log.join("\n"));
            m.unmount();
        }
    }
    finish(&w, w.mount_with(LARGE, &[]), &all, &log.join("\n"));
}

#[test]
pub(crate) fn random_changes_are_those_of_a_plain_file() {
    random("ext4", false, 1, 0);
    random("ext4", true, 2, 0);
    random("xfs", false, 3, 0);
    random("btrfs", false, 4, 0);
}

#[test]
fn random_changes_survive_kills() {
    random("ext4", false, 31, 4);
    random("ext4", true, 32, 4);
    random("xfs", false, 41, 4);
    random("btrfs", false, 42, 4);
}

/// A change, of the file and of what it should be.
type Step = fn(&File, &mut Vec<u8>) -> io::Result<()>;

/// What is done around each fault point: changes and syncs of every kind.
const STEPS: &[Step] = &[
    |f, all| write(f, all, 1_000, 10),
    |f, all| write(f, all, 40_960, 8_192),
    |f, _| f.sync_data(),
    |f, all| write(f, all, 2_500_000, 100_000),
    |f, _| f.sync_all(),
    |f, all| zero(f, all, 100_000, 200_000, FallocateFlags::PUNCH_HOLE),
    |f, all| zero(f, all, 41_000, 5_000, FallocateFlags::PUNCH_HOLE),
    |f, all| cut(f, all, 2_550_123),
    |f, all| cut(f, all, 2_700_000),
    |f, all| write(f, all, 2_649_999, 7),
    |f, _| f.sync_data(),
    |f, all| write(f, all, 600_000, 4_097),
    |f, all| write(f, all, 2_700_000, 9_000),
];

fn write(f: &File, all: &mut Vec<u8>, offset: u64, len: usize) -> io::Result<()> {
    let data = bytes(offset + 1, len);
    f.write_all_at(&data, offset)?;
    overwrite(all, offset, &data);
    Ok(())
}

fn zero(f: &File, all: &mut [u8], offset: u64, len: u64, how: FallocateFlags) -> io::Result<()> {
    rustix::fs::fallocate(f, how | FallocateFlags::KEEP_SIZE, offset, len)?;
    all[offset as usize..(offset + len) as usize].fill(0);
    Ok(())
}

fn cut(f: &File, all: &mut Vec<u8>, size: u64) -> io::Result<()> {
    f.set_len(size)?;
    all.resize(size as usize, 0);
    Ok(())
}

/// Exits at the n-th passage of a point; goes on with what was not done; what was done stays. False
/// when it was not met.
fn exit_at(kind: &str, point: &str, n: u32) -> bool {
    let (w, mut all) = world(kind);
    let fault = format!("{point}:{n}");
    let mut m = lazy(&w, &[("MIRRORFS_FAULT", &fault)]);
    let mut left = STEPS;
    let f = rw().open(m.path("f")).unwrap();
    while let Some((first, rest)) = left.split_first() {
        if let Err(e) = first(&f, &mut all) {
            assert!(is_dead(&e), "{fault}: {e}: {}", m.log());
            break;
        }
        left = rest;
    }
    drop(f);
    if left.is_empty() {
        // Whoever reads it all brings the rest.
        let _ = fs::read(m.path("f")); // It may die of that.
        let end = std::time::Instant::now() + Duration::from_millis(1500);
        while m.runs() && std::time::Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
    }
    let code = match left.is_empty() {
        true => None,
        false => m.wait_exit(LIMIT),
    };
    let met = match code.is_none() && m.runs() {
        true => {
            raw::kill(m.pid, libc::SIGKILL);
            m.kill();
            false
        }
        false => {
            let code = code.or_else(|| m.wait_exit(LIMIT));
            assert_eq!(code, Some(FAULT_EXIT), "{fault}: {}", m.log());
            drop(m);
            true
        }
    };
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    for next in left {
        next(&f, &mut all).unwrap();
    }
    drop(f);
    expect_bytes(&m.path("f"), &all, &fault);
    m.unmount();
    finish(&w, w.mount_with(LARGE, &[]), &all, &fault);
    met
}

#[test]
fn an_exit_at_each_point_of_a_mixed_file_loses_nothing() {
    let points = mirrorfs::sys::fault::POINTS.iter();
    for point in points.filter(|p| p.starts_with("mixed")) {
        let mut met = false;
        for (kind, n) in [("ext4", 1), ("ext4", 3), ("btrfs", 1)] {
            if !can_mount_on(kind) {
                return;
            }
            met |= exit_at(kind, point, n);
        }
        assert!(met, "{point} was never met");
    }
}

/// What a power cut may leave of a file whose first change nobody has synced: its map, its size, both or
/// neither.
#[test]
fn what_a_power_cut_takes_of_a_young_mixed_file_is_srcs_again() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        for (map_is_lost, size_is_lost) in [(true, true), (true, false), (false, true)] {
            let what = format!("{kind}, map {map_is_lost}, size {size_is_lost}");
            let (w, all) = world(kind);
            let mut m = lazy(&w, &[("MIRRORFS_FAULT", "mixed-mature:1")]);
            let f = rw().open(m.path("f")).unwrap();
            // In data of src, in a hole, and behind its end.
            for offset in [8192, 704_512, SIZE as u64 + 10_000] {
                let written = f.write_all_at(&bytes(offset, 5000), offset);
                assert!(
                    written.as_ref().err().is_none_or(is_dead),
                    "{what}: {written:?}"
                );
            }
            drop(f);
            assert_eq!(m.wait_exit(LIMIT), Some(FAULT_EXIT), "{what}: {}", m.log());
            drop(m);
            let maps = w.dst.join(".mirrorfs/maps");
            let maps: Vec<_> = fs::read_dir(maps)
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            assert_eq!(maps.len(), 1, "{what}");
            if map_is_lost {
                fs::remove_file(&maps[0]).unwrap();
            }
            if size_is_lost {
                rw().open(w.dst.join("f")).unwrap().set_len(0).unwrap();
            }
            let m = lazy(&w, &[]);
            if size_is_lost {
                let size = m.path("f").metadata().unwrap().len();
                assert_eq!(size, SIZE as u64, "{what}: before it is opened");
            }
            expect_bytes(&m.path("f"), &all, &what);
            m.unmount();
            finish(&w, w.mount_with(LARGE, &[]), &all, &what);
        }
    }
}

#[test]
fn a_mixed_file_that_was_synced_and_has_lost_its_map_is_an_error() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, _) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    f.write_all_at(&bytes(1, 5000), 8192).unwrap();
    f.sync_all().unwrap();
    drop(f);
    m.kill();
    for map in fs::read_dir(w.dst.join(".mirrorfs/maps")).unwrap() {
        fs::remove_file(map.unwrap().path()).unwrap();
    }
    let m = lazy(&w, &[]);
    let read = fs::read(m.path("f"));
    let errno = read
        .expect_err("nobody knows whose bytes they are")
        .raw_os_error();
    assert_eq!(errno, Some(libc::EIO));
}

#[test]
pub(crate) fn writers_and_readers_at_once_see_whole_blocks() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, all) = world("ext4");
    let m = w.mount_with(LARGE, &[]);
    let path = m.path("f");
    const WRITERS: u64 = 4;
    let stop = AtomicBool::new(false);
    // Each writer has the blocks whose number is his, modulo their number, and writes parts of them.
    let blocks = SIZE as u64 / BLOCK;
    let written: Vec<Vec<(u64, Vec<u8>)>> = thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|n| {
                let (path, stop, all) = (&path, &stop, &all);
                scope.spawn(move || {
                    let f = File::open(path).unwrap();
                    let mut r = Random::new(90 + n);
                    while !stop.load(Ordering::Relaxed) {
                        let at = r.below(blocks) * BLOCK;
                        let mut got = [0; BLOCK as usize];
                        f.read_exact_at(&mut got, at).unwrap();
                        // Nobody writes into the last quarter of a block.
                        let want = &all[at as usize..][..BLOCK as usize];
                        assert!(got[3072..] == want[3072..], "block {}", at / BLOCK);
                    }
                })
            })
            .collect();
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let path = &path;
                scope.spawn(move || {
                    let f = match n % 2 {
                        0 => rw().open(path).unwrap(),
                        _ => rw().custom_flags(libc::O_DSYNC).open(path).unwrap(),
                    };
                    let mut r = Random::new(n);
                    let mut done = Vec::new();
                    for i in 0..60 {
                        let block = r.below(blocks / WRITERS) * WRITERS + n;
                        let at = block * BLOCK + r.below(2000);
                        let data = bytes(i * WRITERS + n, 1 + r.below(1000) as usize);
                        f.write_all_at(&data, at).unwrap();
                        done.push((at, data));
                    }
                    done
                })
            })
            .collect();
        let written = writers.into_iter().map(|w| w.join().unwrap()).collect();
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|r| r.join().unwrap());
        written
    });
    let mut want = all;
    for (at, data) in written.into_iter().flatten() {
        overwrite(&mut want, at, &data);
    }
    finish(&w, m, &want, "writers at once");
}

#[test]
fn a_mixed_file_has_the_time_of_its_last_change_and_the_one_that_was_set() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    assert_eq!(f.metadata().unwrap().mtime(), 1_300_000_000);
    write(&f, &mut all, 5_000, 10).unwrap();
    let changed = f.metadata().unwrap().modified().unwrap();
    assert!(changed.elapsed().unwrap() < LIMIT);
    // What is pulled changes nothing of it.
    let mut part = [0; 10];
    f.read_exact_at(&mut part, 2_900_000).unwrap();
    assert_eq!(f.metadata().unwrap().modified().unwrap(), changed);
    let old = std::time::UNIX_EPOCH + Duration::new(1_200_000_000, 7);
    f.set_modified(old).unwrap();
    raw::kill(m.pid, libc::SIGKILL);
    drop(f);
    m.kill();
    let m = lazy(&w, &[]);
    let there = m.path("f").metadata().unwrap();
    assert_eq!(there.modified().unwrap(), old);
    assert!(there.blocks() > 0);
    m.unmount();
    let m = w.mount_with(LARGE, &[]);
    m.wait_complete();
    assert_eq!(m.path("f").metadata().unwrap().modified().unwrap(), old);
    finish(&w, m, &all, "times");
    let left = w.dst.join("f").metadata().unwrap();
    assert_eq!(left.modified().unwrap(), old);
}

#[test]
fn o_trunc_and_o_append_on_a_mixed_file() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = OpenOptions::new().append(true).open(m.path("f")).unwrap();
    io::Write::write_all(&mut &f, b"at the end").unwrap();
    all.extend_from_slice(b"at the end");
    expect_bytes(&m.path("f"), &all, "appended");
    let held = rw().open(m.path("f")).unwrap();
    write(&held, &mut all, 1_000_000, 5).unwrap();
    let new = rw().truncate(true).open(m.path("f")).unwrap();
    new.write_all_at(b"new", 100_000).unwrap();
    let mut want = vec![0; 100_003];
    want[100_000..].copy_from_slice(b"new");
    let mut got = vec![1; 100_003];
    held.read_exact_at(&mut got, 0).unwrap();
    assert!(got == want);
    drop((f, held, new));
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    finish(&w, w.mount_with(LARGE, &[]), &want, "O_TRUNC");
}

#[test]
fn direct_io_writes_into_a_mixed_file() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().custom_flags(libc::O_DIRECT).open(m.path("f")).unwrap();
    let mut room = vec![0u8; 3 * 4096];
    let skew = room.as_ptr().align_offset(4096);
    room[skew..skew + 8192].copy_from_slice(&bytes(8, 8192));
    f.write_all_at(&room[skew..skew + 8192], 1 << 20).unwrap();
    overwrite(&mut all, 1 << 20, &bytes(8, 8192));
    f.read_exact_at(&mut room[skew..skew + 4096], (1 << 20) - 4096)
        .unwrap();
    assert!(room[skew..skew + 4096] == all[(1 << 20) - 4096..1 << 20]);
    drop(f);
    m.unmount();
    finish(&w, w.mount_with(LARGE, &[]), &all, "O_DIRECT");
}

#[test]
fn a_deleted_mixed_file_gives_back_its_room() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    write(&f, &mut all, 4_096, 50_000).unwrap();
    fs::remove_file(m.path("f")).unwrap();
    write(&f, &mut all, 500_000, 5).unwrap();
    // Not all of it: then it would be whole, and no mixed file any more.
    let mut got = vec![0; 600_000];
    f.read_exact_at(&mut got, 0).unwrap();
    assert!(got == all[..600_000], "a deleted file reads as before");
    let maps = w.dst.join(".mirrorfs/maps");
    assert_eq!(fs::read_dir(&maps).unwrap().count(), 1);
    drop(f);
    // What waits in the engine's queue holds it.
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    wait_until("the map goes", LIMIT, || {
        fs::read_dir(&maps).unwrap().count() == 0
    });
    let held = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", m.pid)).unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        links
            .filter(|l: &PathBuf| l.to_string_lossy().contains("deleted"))
            // The memory of io_uring's slots.
            .filter(|l| !l.to_string_lossy().starts_with("/memfd:"))
            .count()
    };
    wait_until("the file is let go of", LIMIT, || held() == 0);
    m.unmount();
    let m = w.mount();
    m.wait_complete();
    m.finish();
    assert!(!w.dst.join("f").exists());
}

#[test]
fn a_file_that_is_open_for_writing_becomes_whole_and_stays_writable() {
    for kind in ["ext4", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let (w, mut all) = world(kind);
        let m = w.mount_with(LARGE, &[]);
        let f = rw().open(m.path("f")).unwrap();
        for i in 0..200u64 {
            write(&f, &mut all, i * 14_000, 100).unwrap();
            if i % 20 == 0 {
                f.sync_data().unwrap();
            }
        }
        m.wait_complete();
        write(&f, &mut all, 77, 100_000).unwrap();
        let again = rw().open(m.path("f")).unwrap();
        write(&again, &mut all, 1_234_567, 100_000).unwrap();
        again.sync_all().unwrap();
        drop((f, again));
        finish(&w, m, &all, kind);
    }
}

#[test]
pub(crate) fn an_upgrade_goes_on_with_a_mixed_file() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    for i in 0..6u64 {
        write(&f, &mut all, i * 400_001, 9_000).unwrap();
        if i % 2 == 0 {
            let program = mirrorfs().get_program().to_owned();
            let up = run(mirrorfs()
                .arg("upgrade")
                .arg(&m.at)
                .arg("--binary")
                .arg(&program));
            assert_eq!(up.code(), 0, "{}{}\n{}", up.out, up.err, m.log());
        }
    }
    f.sync_data().unwrap();
    expect_bytes(&m.path("f"), &all, "after upgrades");
    drop(f);
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    finish(&w, w.mount_with(LARGE, &[]), &all, "upgrade");
}

#[test]
fn a_renamed_and_linked_mixed_file_is_the_same_file() {
    if !can_mount_on("ext4") {
        return;
    }
    let (w, mut all) = world("ext4");
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    write(&f, &mut all, 10_000, 5).unwrap();
    fs::create_dir(m.path("d")).unwrap();
    fs::rename(m.path("f"), m.path("d/g")).unwrap();
    fs::hard_link(m.path("d/g"), m.path("f")).unwrap();
    write(&f, &mut all, 20_000, 5).unwrap();
    drop(f);
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    let m = lazy(&w, &[]);
    expect_bytes(&m.path("d/g"), &all, "renamed");
    m.unmount();
    finish(&w, w.mount_with(LARGE, &[]), &all, "linked");
    let ino = |name: &str| w.dst.join(name).metadata().unwrap().ino();
    assert_eq!(ino("f"), ino("d/g"));
    compare::manifest(&w.dst);
}

/// A source that fails, with one file.
fn bad_world(size: usize) -> Option<(BadSrc, World, Vec<u8>)> {
    let all = bytes(9, size);
    let (bad, w) = badsource::world(|bad| bad.write("f", &all))?;
    Some((bad, w, all))
}

#[test]
pub(crate) fn what_src_cannot_read_can_be_written_over_and_the_rest_is_usable() {
    let Some((mut bad, w, mut all)) = bad_world(3_000_000) else {
        return;
    };
    bad.start(&["path=f op=read off=1048576-1052672 err=EIO"]);
    let m = w.mount_with(LARGE, &[]);
    let f = rw().open(m.path("f")).unwrap();
    write(&f, &mut all, 40_960, 8_192).unwrap();
    let mut part = vec![0; 4096];
    f.read_exact_at(&mut part, 2_500_000).unwrap();
    assert!(part == all[2_500_000..2_504_096]);
    wait_until("it is in the ledger", LIMIT, || !entries(&m).is_empty());
    assert!(f.read_exact_at(&mut part, 1_048_576).is_err());
    // A part of the block needs the rest of it.
    let unreadable = f.write_all_at(b"x", 1_049_000).unwrap_err();
    assert_eq!(unreadable.raw_os_error(), Some(libc::EIO));
    // Its neighbours can be read, and what users wrote is not given up.
    f.read_exact_at(&mut part, 1_044_480).unwrap();
    assert!(part == all[1_044_480..1_048_576]);
    let refused = run(mirrorfs().arg("finish").arg(&m.at).arg("--accept-loss"));
    assert_ne!(refused.code(), 0);
    assert!(
        refused.err.contains("users have changed"),
        "{}",
        refused.err
    );
    write(&f, &mut all, 1_048_576, 4_096).unwrap();
    f.sync_all().unwrap();
    drop(f);
    run(mirrorfs().arg("errors").arg(&m.at).arg("--retry")).expect_code(0);
    wait_until("nothing is in the ledger", LIMIT, || {
        m.status()["errors"] == 0
    });
    finish(&w, m, &all, "written over");
}

#[test]
pub(crate) fn whole_blocks_are_written_while_src_is_away() {
    let Some((mut bad, w, mut all)) = bad_world(3_000_000) else {
        return;
    };
    bad.start(&[]);
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    write(&f, &mut all, 0, 100).unwrap();
    bad.die();
    write(&f, &mut all, 1_048_576, 65_536).unwrap();
    f.sync_data().unwrap();
    let mut part = vec![0; 65_536];
    f.read_exact_at(&mut part, 1_048_576).unwrap();
    assert!(part == all[1_048_576..][..65_536]);
    raw::kill(m.pid, libc::SIGKILL);
    drop(f);
    m.kill();
    bad.come_back();
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    let mut part = vec![0; 65_536];
    f.read_exact_at(&mut part, 1_048_576).unwrap();
    assert!(part == all[1_048_576..][..65_536]);
    bad.die();
    // It waits for the rest of its block.
    let (path, waits) = (m.path("f"), bytes(2, 10));
    let written = badsource::apart(move || rw().open(path)?.write_all_at(&waits, 2_000_001));
    assert!(written.recv_timeout(Duration::from_millis(700)).is_err());
    bad.come_back();
    written.recv_timeout(LIMIT).unwrap().unwrap();
    overwrite(&mut all, 2_000_001, &bytes(2, 10));
    drop(f);
    m.unmount();
    finish(&w, w.mount_with(LARGE, &[]), &all, "src was away");
}

#[test]
pub(crate) fn a_change_elsewhere_does_not_wait_for_bytes_that_hang() {
    let Some((mut bad, w, mut all)) = bad_world(12 << 20) else {
        return;
    };
    bad.start(&["path=f op=read off=0-1M hang"]);
    let m = lazy(&w, &[]);
    let f = rw().open(m.path("f")).unwrap();
    write(&f, &mut all, 8 << 20, 4096).unwrap();
    let hung = badsource::apart({
        let path = m.path("f");
        move || File::open(path)?.read_exact_at(&mut [0; 4096], 100_000)
    });
    assert!(hung.recv_timeout(Duration::from_millis(300)).is_err());
    // Whole blocks: a source that is FUSE itself lets nobody open a file while a read of it hangs.
    write(&f, &mut all, (8 << 20) + 4096, 65_536).unwrap();
    write(&f, &mut all, (8 << 20) + 100, 10_000).unwrap();
    f.sync_data().unwrap();
    bad.tell("off");
    bad.tell("release");
    hung.recv_timeout(LIMIT).unwrap().unwrap();
    drop(f);
    m.unmount();
    finish(&w, w.mount_with(LARGE, &[]), &all, "hung");
}
