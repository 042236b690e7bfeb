//! The engine on real files: what a job promises, with and without a ring, with short transfers.

mod ahead;
mod queue;
mod slow;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use super::ring::Opcodes;
use super::{Engine, EngineConfig};
use crate::error::{Errno, Error, Result, Side};
use crate::ranges::RangeSet;
use crate::sys;
use crate::sys::name::{Name, RelPath};

/// What a job said.
#[derive(Default)]
struct Heard {
    data: Vec<(u64, Vec<u8>)>,
    landed: RangeSet,
    outcome: Option<Result<Copied>>,
}

struct Listener {
    heard: Heard,
    to: Sender<Heard>,
    /// Runs at the first landed range.
    at_landed: Option<Box<dyn FnOnce() + Send>>,
}

impl Completion for Listener {
    fn data(&mut self, offset: u64, bytes: &[u8]) {
        self.heard.data.push((offset, bytes.to_vec()));
    }

    fn landed(&mut self, range: Range<u64>) {
        self.heard.landed.insert(range);
        if let Some(f) = self.at_landed.take() {
            f();
        }
    }

    fn done(mut self: Box<Self>, outcome: Result<Copied>) {
        self.heard.outcome = Some(outcome);
        let _ = self.to.send(self.heard); // A test may not be interested any more.
    }
}

/// Two directories and an engine.
struct Bench {
    dir: tempfile::TempDir,
    src: Arc<OwnedFd>,
    engine: Engine,
}

fn config() -> EngineConfig {
    EngineConfig {
        workers: 2,
        buffers_per_worker: 4,
        pool_threads: 4,
        ..EngineConfig::default()
    }
}

impl Bench {
    fn new(config: &EngineConfig, io_max: usize) -> Bench {
        Bench::on(tempfile::tempdir().expect("tempdir"), config, io_max)
    }

    fn on(dir: tempfile::TempDir, config: &EngineConfig, io_max: usize) -> Bench {
        for side in ["src", "dst"] {
            std::fs::create_dir_all(dir.path().join(side)).expect("mkdir");
        }
        let src = Arc::new(OwnedFd::from(
            File::open(dir.path().join("src")).expect("open"),
        ));
        let engine = Engine::launch(config, io_max, Arc::default()).expect("an engine");
        Bench { dir, src, engine }
    }

    fn src(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("src").join(name)
    }

    fn dst(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("dst").join(name)
    }

    fn job(&self, name: &str, span: Span, priority: Priority) -> (CopyJob, Receiver<Heard>) {
        let options = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .to_owned();
        let dst = options.open(self.dst(name)).expect("dst");
        let (to, heard) = channel();
        let job = CopyJob {
            src_dir: Arc::clone(&self.src),
            src_name: Name::new(name.as_bytes()).expect("a name"),
            dst: Arc::new(dst.into()),
            span,
            priority,
            durability: Durability::Later,
            path: RelPath::from_bytes(name.as_bytes()).expect("a path"),
            done: Box::new(Listener {
                heard: Heard::default(),
                to,
                at_landed: None,
            }),
        };
        (job, heard)
    }

    fn run(&self, name: &str, span: Span, priority: Priority) -> Heard {
        let (job, heard) = self.job(name, span, priority);
        self.engine.submit(job).expect("submitted");
        wait(&heard)
    }

    fn same(&self, name: &str) {
        let (a, b) = (std::fs::read(self.src(name)), std::fs::read(self.dst(name)));
        assert!(
            a.expect("src") == b.expect("dst"),
            "{name}: the bytes differ"
        );
    }
}

fn wait(heard: &Receiver<Heard>) -> Heard {
    heard
        .recv_timeout(Duration::from_secs(120))
        .expect("done was called")
}

fn ok(heard: Heard) -> Copied {
    heard.outcome.expect("an outcome").expect("success")
}

/// Bytes that differ from place to place.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let word = |x: &mut u64| {
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
        x.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| word(&mut x)).collect();
    bytes.truncate(len);
    bytes
}

/// The engine in each of its ways: ring, ring without what may be missing, plain calls; each with
/// short transfers too.
fn each_way(mut check: impl FnMut(&Bench)) {
    let data = Opcodes::parse("read,write").expect("names");
    for (io_uring, ring_off) in [
        (true, Opcodes::NONE),
        (true, Opcodes::all().without(data)),
        (true, Opcodes::all()),
        (false, Opcodes::NONE),
    ] {
        for io_max in [usize::MAX, 4097] {
            let config = EngineConfig {
                io_uring,
                ring_off,
                ..config()
            };
            check(&Bench::new(&config, io_max));
        }
    }
}

fn extents(path: &Path) -> Vec<Range<u64>> {
    let file = File::open(path).expect("open");
    let size = file.metadata().expect("stat").len();
    let mut all = Vec::new();
    let mut at = 0;
    while let Some(r) = sys::copy::next_data(file.as_fd(), at, size).expect("lseek") {
        at = r.end;
        all.push(r);
    }
    all
}

#[test]
fn files_of_every_size_around_a_limit_arrive_whole() {
    const K: usize = 1024;
    each_way(|b| {
        let mut sizes = vec![0, 1, 4095, 4096, 4097, 300 * K];
        for limit in [64 * K, 512 * K, 1024 * K, 4 * 512 * K] {
            sizes.extend([limit - 1, limit, limit + 1]);
        }
        for priority in [Priority::Demand, Priority::Background] {
            for &size in &sizes {
                let name = format!("{size}-{priority:?}");
                std::fs::write(b.src(&name), noise(size, size as u64)).expect("write");
                let heard = b.run(&name, Span::Whole, priority);
                assert!(heard.landed.contains(&(0..size as u64)), "{name} landed");
                assert!(heard.data.is_empty());
                assert_eq!(ok(heard).src.size, size as u64);
                b.same(&name);
            }
        }
    });
}

#[test]
fn a_longer_dst_gets_the_size_of_src() {
    each_way(|b| {
        for size in [0usize, 10, 200_000] {
            let name = size.to_string();
            std::fs::write(b.src(&name), noise(size, 1)).expect("write");
            std::fs::write(b.dst(&name), noise(300_000, 2)).expect("write");
            ok(b.run(&name, Span::Whole, Priority::Demand));
            b.same(&name);
        }
    });
}

#[test]
fn holes_stay_holes_and_cost_no_time() {
    each_way(|b| {
        let file = File::create(b.src("sparse")).expect("create");
        for at in [0u64, 5 << 20, 700 << 30] {
            file.write_all_at(&noise(400_000, at), at).expect("write");
        }
        file.set_len(1 << 40).expect("truncate");
        file.sync_all().expect("sync"); // Else delayed allocation hides the extents.
        let since = Instant::now();
        let heard = b.run("sparse", Span::Whole, Priority::Background);
        assert!(since.elapsed() < Duration::from_secs(20));
        assert!(heard.landed.contains(&(0..1 << 40)));
        assert!(ok(heard).bytes < 3 << 20);
        File::open(b.dst("sparse"))
            .and_then(|f| f.sync_all())
            .expect("sync");
        assert_eq!(extents(&b.src("sparse")), extents(&b.dst("sparse")));
        let blocks = |p| std::fs::metadata(p).expect("stat").blocks();
        assert!(blocks(b.dst("sparse")) <= blocks(b.src("sparse")) + 64);
        for r in extents(&b.src("sparse")) {
            let mut bytes = [
                vec![0; (r.end - r.start) as usize],
                vec![0; (r.end - r.start) as usize],
            ];
            for (path, buf) in [b.src("sparse"), b.dst("sparse")].iter().zip(&mut bytes) {
                File::open(path)
                    .and_then(|f| f.read_exact_at(buf, r.start))
                    .expect("read");
            }
            assert!(bytes[0] == bytes[1]);
        }
    });
}

#[test]
fn a_range_job_answers_its_reader_and_leaves_the_size_alone() {
    each_way(|b| {
        let file = File::create(b.src("f")).expect("create");
        file.write_all_at(&noise(700_000, 1), 0).expect("write");
        file.write_all_at(&noise(700_000, 2), 4 << 20)
            .expect("write");
        file.set_len(6 << 20).expect("truncate");
        let all = std::fs::read(b.src("f")).expect("read");
        for range in [
            0..1,
            100..70_000,
            0..1 << 20,
            600_000..(5 << 20),
            (5 << 20)..(9 << 20),
            1 << 30..1 << 31,
        ] {
            let dst = File::create(b.dst("f")).expect("create");
            dst.set_len(6 << 20).expect("a placeholder");
            let heard = b.run("f", Span::Range(range.clone()), Priority::Demand);
            let part = range.start.min(6 << 20)..range.end.min(6 << 20);
            assert!(heard.landed.contains(&part), "{range:?}");
            let mut seen = RangeSet::new();
            for (offset, bytes) in &heard.data {
                let end = offset + bytes.len() as u64;
                assert!(*offset >= part.start && end <= part.end);
                assert_eq!(bytes, &all[*offset as usize..end as usize]);
                seen.insert(*offset..end);
            }
            assert!(seen.contains(&part));
            ok(heard);
            let copy = std::fs::read(b.dst("f")).expect("read");
            assert_eq!(copy.len(), all.len());
            let r = part.start as usize..part.end as usize;
            assert!(copy[r.clone()] == all[r.clone()]);
            assert!(
                copy[..r.start]
                    .iter()
                    .chain(&copy[r.end..])
                    .all(|b| *b == 0)
            );
        }
    });
}

#[test]
fn many_files_at_once_all_arrive() {
    each_way(|b| {
        let mut waiting = Vec::new();
        for i in 0..600usize {
            let size = if i % 97 == 0 { 1_500_000 } else { i * 31 };
            std::fs::write(b.src(&i.to_string()), noise(size, i as u64)).expect("write");
        }
        for i in 0..600 {
            let priority = if i % 5 == 0 {
                Priority::Demand
            } else {
                Priority::Background
            };
            let (mut job, heard) = b.job(&i.to_string(), Span::Whole, priority);
            if i % 50 == 0 {
                job.durability = Durability::Now;
            }
            b.engine.submit(job).expect("submitted");
            waiting.push(heard);
        }
        for (i, heard) in waiting.iter().enumerate() {
            ok(wait(heard));
            b.same(&i.to_string());
        }
    });
}

#[test]
fn what_is_no_regular_file_is_refused_and_what_is_missing_is_named() {
    each_way(|b| {
        std::fs::create_dir(b.src("dir")).expect("mkdir");
        let heard = b.run("dir", Span::Whole, Priority::Demand);
        assert!(matches!(heard.outcome, Some(Err(Error::WrongType { .. }))));
        std::os::unix::fs::symlink("dir", b.src("link")).expect("symlink");
        let heard = b.run("link", Span::Whole, Priority::Demand);
        let outcome = heard.outcome.expect("done");
        assert!(
            matches!(
                outcome,
                Err(Error::Call {
                    call: "openat2",
                    side: Side::Src,
                    errno: Errno::LOOP,
                    ..
                })
            ),
            "{outcome:?}"
        );
        let heard = b.run("gone", Span::Whole, Priority::Demand);
        assert!(matches!(
            heard.outcome,
            Some(Err(Error::Call {
                errno: Errno::NOENT,
                ..
            }))
        ));
    });
}

#[test]
fn a_src_that_grows_or_shrinks_meanwhile_is_copied_again() {
    each_way(|b| {
        for (name, size) in [
            ("grows", 5_000_000u64),
            ("shrinks", 1_000_000),
            ("sparser", 3_000_000),
        ] {
            std::fs::write(b.src(name), noise(3_000_000, 1)).expect("write");
            let (mut job, heard) = b.job(name, Span::Whole, Priority::Background);
            let (to, src) = (channel().0, b.src(name));
            let (sender, receiver) = channel();
            drop::<Sender<Heard>>(to);
            let change = move || {
                let file = OpenOptions::new().write(true).open(&src).expect("open");
                if name == "sparser" {
                    file.set_len(0).expect("truncate");
                }
                file.set_len(size).expect("truncate");
                file.write_all_at(&noise(1000, 3), size - 1000)
                    .expect("write");
            };
            job.done = Box::new(Listener {
                heard: Heard::default(),
                to: sender,
                at_landed: Some(Box::new(change)),
            });
            drop(heard);
            b.engine.submit(job).expect("submitted");
            assert_eq!(ok(wait(&receiver)).src.size, size);
            b.same(name);
        }
    });
}

#[test]
fn a_full_dst_is_an_error_of_dst() {
    let dir = tempfile::tempdir().expect("tempdir");
    std::fs::create_dir(dir.path().join("dst")).expect("mkdir");
    let dst = dir.path().join("dst");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&dst)
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        eprintln!("skipped: cannot mount a tmpfs");
        assert!(std::env::var_os("MIRRORFS_TEST_ALL").is_none());
        return;
    }
    let b = Bench::on(dir, &config(), usize::MAX);
    std::fs::write(b.src("big"), noise(3_000_000, 1)).expect("write");
    let file = File::create(b.src("sparse")).expect("create");
    file.write_all_at(&noise(2_000_000, 1), 1_000_000)
        .expect("write");
    for i in 0..20 {
        std::fs::write(b.src(&format!("small{i}")), noise(60_000, 1)).expect("write");
    }
    let full = |h: Heard| h.outcome.expect("done").expect_err("full").is_dst_full();
    assert!(full(b.run("big", Span::Whole, Priority::Background)));
    assert!(full(b.run("sparse", Span::Whole, Priority::Background)));
    let last = (0..20).find_map(|i| {
        b.run(&format!("small{i}"), Span::Whole, Priority::Demand)
            .outcome?
            .err()
    });
    assert!(last.expect("1.2 MB do not fit").is_dst_full());
    b.engine.stop();
    let umount = std::process::Command::new("umount")
        .arg("-l")
        .arg(&dst)
        .status();
    assert!(umount.is_ok_and(|s| s.success()));
}

#[test]
fn stopping_tells_every_job_exactly_once() {
    for io_uring in [true, false] {
        let b = Bench::new(
            &EngineConfig {
                io_uring,
                workers: 1,
                ..config()
            },
            4097,
        );
        std::fs::write(b.src("large"), noise(8_000_000, 1)).expect("write");
        std::fs::write(b.src("small"), noise(1000, 1)).expect("write");
        let mut waiting = Vec::new();
        for i in 0..200 {
            let name = if i % 2 == 0 { "large" } else { "small" };
            let (job, heard) = b.job(name, Span::Whole, Priority::Background);
            b.engine.submit(job).expect("submitted");
            waiting.push(heard);
        }
        b.engine.stop();
        let mut stopped = 0;
        for heard in waiting {
            match heard.try_recv().expect("told before stop returned").outcome {
                Some(Err(Error::Stopped)) => stopped += 1,
                outcome => drop(outcome.expect("done").expect("success")),
            }
            assert!(heard.try_recv().is_err(), "and only once");
        }
        assert!(stopped > 0);
        let (job, heard) = b.job("small", Span::Whole, Priority::Demand);
        assert!(matches!(b.engine.submit(job), Err(Error::Stopped)));
        assert!(matches!(wait(&heard).outcome, Some(Err(Error::Stopped))));
        b.engine.stop();
    }
}

#[test]
fn demand_overtakes_a_worker_that_is_busy_with_large_background_files() {
    for io_uring in [true, false] {
        let b = Bench::new(
            &EngineConfig {
                io_uring,
                workers: 1,
                ..config()
            },
            usize::MAX,
        );
        let file = File::create(b.src("large")).expect("create");
        for i in 0..64 {
            file.write_all_at(&noise(1 << 20, i), i << 20)
                .expect("write");
        }
        std::fs::write(b.src("small"), noise(1000, 1)).expect("write");
        let (mut job, _) = b.job("large", Span::Whole, Priority::Background);
        let (to, large) = channel();
        let (began, begun) = channel();
        job.done = Box::new(Listener {
            heard: Heard::default(),
            to,
            at_landed: Some(Box::new(move || began.send(()).expect("the test waits"))),
        });
        b.engine.submit(job).expect("submitted");
        begun
            .recv_timeout(Duration::from_secs(60))
            .expect("the large file has begun");
        ok(b.run("small", Span::Whole, Priority::Demand));
        assert!(
            large.try_recv().is_err(),
            "the large file is still being copied"
        );
        ok(wait(&large));
        b.same("large");
    }
}

#[test]
fn a_job_that_somebody_else_does_ends_without_a_word() {
    struct Never(Sender<()>);
    impl Completion for Never {
        fn begin(&mut self) -> bool {
            self.0.send(()).expect("the test waits");
            false
        }
        fn done(self: Box<Self>, _: Result<Copied>) {
            panic!("done after begin said no");
        }
    }
    let b = Bench::new(&config(), usize::MAX);
    File::create(b.src("f"))
        .and_then(|mut f| f.write_all(b"x"))
        .expect("write");
    let (mut job, _) = b.job("f", Span::Whole, Priority::Demand);
    let (tx, rx) = channel();
    job.done = Box::new(Never(tx));
    b.engine.submit(job).expect("submitted");
    rx.recv_timeout(Duration::from_secs(60))
        .expect("begin was called");
    assert!(
        rx.recv_timeout(Duration::from_secs(60)).is_err(),
        "and then dropped"
    );
    assert_eq!(std::fs::read(b.dst("f")).expect("read"), b"");
}

#[test]
fn a_completion_that_panics_harms_nobody_else() {
    struct Bad;
    impl Completion for Bad {
        fn done(self: Box<Self>, _: Result<Copied>) {
            panic!("as this test wants");
        }
    }
    let b = Bench::new(
        &EngineConfig {
            workers: 1,
            ..config()
        },
        usize::MAX,
    );
    std::fs::write(b.src("f"), b"x").expect("write");
    for _ in 0..100 {
        let (mut job, _) = b.job("f", Span::Whole, Priority::Background);
        job.done = Box::new(Bad);
        b.engine.submit(job).expect("submitted");
    }
    ok(b.run("f", Span::Whole, Priority::Background));
}
