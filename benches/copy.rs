//! The engine against read and write on one thread: small files, one large file.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use common::Pair;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mirrorfs::engine::{Engine, EngineConfig};

/// What one would write by hand.
fn read_write(pair: &Pair, dst: &std::path::Path, size: usize) -> std::io::Result<()> {
    for name in &pair.names {
        let mut from = File::open(pair.src.join(name.as_os_str()))?;
        let mut to = File::create(dst.join(name.as_os_str()))?;
        let mut buffer = vec![0; size.min(1 << 20)];
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            to.write_all(&buffer[..n])?;
        }
    }
    Ok(())
}

fn benches(c: &mut Criterion) {
    for (label, count, size) in [
        ("small_4k", 2000, 4 << 10),
        ("small_64k", 500, 64 << 10),
        ("large_256m", 1, 256 << 20),
    ] {
        let dir = common::scratch();
        let pair = Pair::make(dir.path(), count, size);
        let src_dir = Arc::new(OwnedFd::from(File::open(&pair.src).expect("open")));
        let fresh = || tempfile::tempdir_in(dir.path()).expect("tempdir");
        let mut group = c.benchmark_group(label);
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3));
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
                        common::copy(&engine, &src_dir, dst.path(), &pair.names);
                        dst
                    },
                    BatchSize::PerIteration,
                );
            });
            // Once more, looked at.
            let last = fresh();
            common::copy(&engine, &src_dir, last.path(), &pair.names);
            pair.assert_bytes(last.path());
        }
        group.bench_function("read_write_one_thread", |b| {
            b.iter_batched(
                fresh,
                |dst| {
                    read_write(&pair, dst.path(), size).expect("copied");
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
