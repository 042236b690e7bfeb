//! The engine against plain std::fs::copy on one thread: small files, one large file.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mirrorfs::engine::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use mirrorfs::engine::{Engine, EngineConfig};
use mirrorfs::error::Result;
use mirrorfs::sys::name::{Name, RelPath};

struct Report(Sender<Result<Copied>>);

impl Completion for Report {
    fn done(self: Box<Self>, outcome: Result<Copied>) {
        let _ = self.0.send(outcome); // The bench has ended.
    }
}

/// Copies the files `names` from one directory into a new one.
fn copy(engine: &Engine, src_dir: &Arc<OwnedFd>, dst: &Path, names: &[String]) {
    let (report, reports) = channel();
    for name in names {
        let src_name = Name::new(name.as_bytes()).expect("a name");
        let job = CopyJob {
            src_dir: Arc::clone(src_dir),
            dst: Arc::new(File::create(dst.join(name)).expect("create").into()),
            path: RelPath::root().join(&src_name),
            src_name,
            span: Span::Whole,
            priority: Priority::Background,
            durability: Durability::Later,
            done: Box::new(Report(report.clone())),
        };
        engine.submit(job).expect("submitted");
    }
    drop(report);
    reports
        .iter()
        .for_each(|outcome| assert!(outcome.is_ok(), "copied"));
}

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("tempdir");
    for (label, count, size) in [
        ("small_4k", 2000, 4 << 10),
        ("small_64k", 500, 64 << 10),
        ("large_256m", 1, 256 << 20),
    ] {
        let src = dir.path().join(label);
        std::fs::create_dir(&src).expect("mkdir");
        let names: Vec<String> = (0..count).map(|i| format!("{i}")).collect();
        for name in &names {
            std::fs::write(src.join(name), vec![1; size]).expect("write");
        }
        let src_dir = Arc::new(OwnedFd::from(File::open(&src).expect("open")));
        let fresh = || tempfile::tempdir_in(dir.path()).expect("tempdir");
        let mut group = c.benchmark_group(label);
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(5));
        group.throughput(Throughput::Bytes((count * size) as u64));
        for (way, io_uring) in [("engine", true), ("engine_plain_calls", false)] {
            let engine = Engine::start(&EngineConfig {
                io_uring,
                ..EngineConfig::default()
            });
            let engine = engine.expect("an engine");
            group.bench_function(way, |b| {
                b.iter_batched(
                    fresh,
                    |dst| {
                        copy(&engine, &src_dir, dst.path(), &names);
                        dst
                    },
                    BatchSize::PerIteration,
                );
            });
        }
        group.bench_function("read_write_one_thread", |b| {
            b.iter_batched(
                fresh,
                |dst| {
                    for name in &names {
                        let bytes = std::fs::File::open(src.join(name)).and_then(|mut from| {
                            let mut to = File::create(dst.path().join(name))?;
                            let mut buffer = vec![0; size.min(1 << 20)];
                            loop {
                                let n = std::io::Read::read(&mut from, &mut buffer)?;
                                if n == 0 {
                                    return Ok(());
                                }
                                std::io::Write::write_all(&mut to, &buffer[..n])?;
                            }
                        });
                        bytes.expect("copied");
                    }
                    dst
                },
                BatchSize::PerIteration,
            );
        });
        group.finish();
    }
}

criterion_group!(all, benches);
criterion_main!(all);
