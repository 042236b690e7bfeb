//! Hydrate: the data of pending files, one after the other as users open them.

mod common;

use std::time::Duration;

use common::Pair;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

fn benches(c: &mut Criterion) {
    for (label, count, size) in [
        ("hydrate_4k", 500, 4 << 10),
        ("hydrate_1m", 100, 1 << 20),
        ("hydrate_64m", 2, 64 << 20),
    ] {
        let dir = common::scratch();
        let mut pair = Pair::make(dir.path(), count, size);
        let mut group = c.benchmark_group(label);
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3));
        group.throughput(Throughput::Bytes((count * size) as u64));
        let mut n = 0;
        group.bench_function("in_turn", |b| {
            b.iter_batched(
                || {
                    n += 1;
                    std::fs::remove_dir_all(&pair.dst).expect("rm");
                    pair.fresh_dst(dir.path(), n);
                    let mirror = common::mirror(&pair, 0, true);
                    common::populate(&mirror);
                    let files = common::pending(&mirror, &pair.names);
                    (mirror, files)
                },
                |(mirror, files)| {
                    files.iter().for_each(|file| common::hydrate(&mirror, file));
                    mirror.stop();
                },
                BatchSize::PerIteration,
            );
        });
        group.finish();
        pair.assert_copied();
    }
}

criterion_group!(all, benches);
criterion_main!(all);
