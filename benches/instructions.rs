//! Instructions of the hot paths, counted by callgrind: the same each time, on a busy machine too.
//!
//! Counted is what a whole process executes in user space, all of its threads. (An entry point
//! would count its own thread only; and the requests that switch counting on and off need libclang
//! to build.) So the trees are made, and the copies looked at, by another process, which is not
//! counted; and what starting a process costs, and a mirror or an engine in it, is measured by the
//! benches that are called `none`. scripts/bench/regress.py takes that off, divides by the number
//! of files, and compares with benches/baseline.json.
//!
//! One worker wherever workers are, and no ring: valgrind stops all threads while one waits in
//! io_uring_enter(2), and what goes through the ring depends on the clock. The kernel's work is not in the figures: the system calls are
//! counted elsewhere (scripts/bench/compare.sh).

#![allow(missing_docs)] // What the macros make.

mod common;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use common::Pair;
use gungraun::{
    Callgrind, EntryPoint, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main,
};
use mirrorfs::crew::Crew;
use mirrorfs::engine::{Engine, EngineConfig};
use mirrorfs::mark::Mark;
use mirrorfs::meta::Meta;
use mirrorfs::ranges::RangeSet;
use mirrorfs::sys::name::RelPath;

/// Files of a tree.
const FILES: usize = 500;
/// Their size, bytes.
const SIZE: usize = 4096;
/// Rounds of what needs no files.
const ROUNDS: u64 = 10_000;
/// Set for the process that makes a tree or looks at it: `make DIR COUNT` or `check DIR COUNT`.
const HELP: &str = "MIRRORFS_BENCH_HELP";

/// Has another process do it: this one is counted.
fn help(what: &str, dir: &Path, count: usize) {
    let exe = std::env::current_exe().expect("our name");
    let task = format!("{what} {count} {}", dir.display());
    let status = Command::new(exe).env(HELP, task).status();
    assert!(status.expect("a process").success(), "{what}");
}

fn helped(task: &str) {
    let mut words = task.splitn(3, ' ');
    let mut word = || words.next().expect("three words");
    let (what, count) = (word(), word().parse().expect("a number"));
    let dir = PathBuf::from(word());
    match what {
        "make" => drop(Pair::make(&dir, count, SIZE)),
        "placed" => Pair::at(&dir, count).assert_placed(),
        "copied" => Pair::at(&dir, count).assert_copied(),
        other => unreachable!("{other}"),
    }
}

/// A pair of trees, until the end of the process.
struct Fixture {
    dir: tempfile::TempDir,
    pair: Pair,
}

fn trees(count: usize) -> Fixture {
    let dir = common::scratch();
    help("make", dir.path(), count);
    let pair = Pair::at(dir.path(), count);
    Fixture { dir, pair }
}

fn placed(fixture: Fixture) {
    help("placed", fixture.dir.path(), fixture.pair.names.len());
}

fn copied(fixture: Fixture) {
    help("copied", fixture.dir.path(), fixture.pair.names.len());
}

// The whole of `mirrorfs sync`, from the open roots to the report.
#[library_benchmark(setup = trees, teardown = copied)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn sync(fixture: Fixture) -> Fixture {
    let report = common::sync(&fixture.pair, 1);
    assert_eq!(report.transferred, fixture.pair.names.len() as u64);
    fixture
}

// The same again, where nothing is to be done.
#[library_benchmark(setup = trees, teardown = copied)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn sync_twice(fixture: Fixture) -> Fixture {
    common::sync(&fixture.pair, 1);
    assert_eq!(common::sync(&fixture.pair, 1).transferred, 0);
    fixture
}

// Placeholders.
#[library_benchmark(setup = trees, teardown = placed)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn populate(fixture: Fixture) -> Fixture {
    let mirror = common::mirror(&fixture.pair, 1, false);
    common::populate(&mirror);
    mirror.stop();
    fixture
}

// Placeholders with their data: what the walker does.
#[library_benchmark(setup = trees, teardown = copied)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn carry(fixture: Fixture) -> Fixture {
    let mirror = common::mirror(&fixture.pair, 1, false);
    common::carry(&mirror);
    mirror.stop();
    fixture
}

// Placeholders, a lookup of each, and the data of each in turn: what a user does.
#[library_benchmark(setup = trees, teardown = copied)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn hydrate(fixture: Fixture) -> Fixture {
    let mirror = common::mirror(&fixture.pair, 1, false);
    common::populate(&mirror);
    for file in common::pending(&mirror, &fixture.pair.names) {
        common::hydrate(&mirror, &file);
    }
    mirror.stop();
    fixture
}

// The engine alone: its queue, a plan for each file, plain calls (which of the two ways a worker
// takes depends on its clock).
#[library_benchmark(setup = trees)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn engine(fixture: Fixture) -> Fixture {
    let config = EngineConfig {
        workers: 1,
        io_uring: false,
        ..EngineConfig::default()
    };
    let engine = Engine::start(&config).expect("an engine");
    let src = std::fs::File::open(&fixture.pair.src).expect("open");
    let src = Arc::new(src.into());
    common::copy(&engine, &src, &fixture.pair.dst, &fixture.pair.names);
    engine.stop();
    fixture
}

// One file's metadata, captured and applied to another file.
#[library_benchmark(setup = trees)]
#[bench::none(0)]
#[bench::files_500(FILES)]
fn metadata(fixture: Fixture) -> Fixture {
    for name in &fixture.pair.names {
        let open = |root: &Path| std::fs::File::open(root.join(name.as_os_str())).expect("open");
        let to = std::fs::File::create(fixture.pair.dst.join(name.as_os_str())).expect("create");
        let meta = Meta::capture_fd(
            common::CAPTURE,
            std::os::fd::AsFd::as_fd(&open(&fixture.pair.src)),
        );
        let refused = meta
            .expect("captured")
            .apply_fd(std::os::fd::AsFd::as_fd(&to));
        assert!(refused.is_empty(), "applied");
    }
    fixture
}

// A mark with everything in it, to bytes and back.
#[library_benchmark]
#[bench::none(0)]
#[bench::rounds_10000(ROUNDS)]
fn mark(rounds: u64) {
    for n in 0..rounds {
        let mark = Mark {
            origin: RelPath::from_bytes(b"some/where/else"),
            capability: n % 2 == 0,
            ..Mark::pending()
        };
        let value = black_box(mark.encode());
        assert_eq!(Mark::decode(&value).as_ref(), Some(&mark));
    }
}

// Ranges that come out of order and meet.
#[library_benchmark]
#[bench::none(0)]
#[bench::rounds_10000(ROUNDS)]
fn ranges(rounds: u64) {
    let mut set = RangeSet::new();
    for n in 0..rounds {
        let start = n.wrapping_mul(7919) % rounds * 64;
        set.insert(start..start + 64);
        black_box(set.contains(&(0..start)));
    }
    assert_eq!(set.len(), rounds * 64);
}

// The stack of work that `sync` and `verify` take from. (How many messages to the calling thread come
// at once depends on who runs when, so they are left out.)
#[library_benchmark]
#[bench::none(0)]
#[bench::rounds_10000(ROUNDS)]
fn crew(rounds: u64) {
    let sum = AtomicU64::new(0);
    Crew::<u64, ()>::run(
        vec![rounds],
        &AtomicBool::new(false),
        || 1,
        || (),
        |crew, (), n| {
            sum.fetch_add(n, Relaxed);
            crew.push((n > 0).then(|| n - 1));
        },
        |()| {},
    );
    assert_eq!(sum.into_inner(), rounds * (rounds + 1) / 2);
}

library_benchmark_group!(
    name = hot,
    benchmarks = [
        sync, sync_twice, populate, carry, hydrate, engine, metadata, mark, ranges, crew
    ]
);

fn main() {
    if let Ok(task) = std::env::var(HELP) {
        return helped(&task);
    }
    main!(
        config = LibraryBenchmarkConfig::default()
            .valgrind_args(["--trace-children=no"])
            .pass_through_env("MIRRORFS_BENCH_DIR")
            // Memory of the engine's buffers is the kernel's zeros, whatever was freed before.
            .env("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")
            .tool(Callgrind::default().entry_point(EntryPoint::None)),
        library_benchmark_groups = hot
    );
    main() // The one that the macro has made, here inside.
}
