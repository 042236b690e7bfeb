//! Populate: placeholders for a whole directory, and with the data of small files besides.

mod common;

use std::time::Duration;

use common::Pair;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const FILES: usize = 1000;

fn benches(c: &mut Criterion) {
    let dir = common::scratch();
    let mut pair = Pair::make(dir.path(), FILES, 4096);
    let mut group = c.benchmark_group("populate");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Elements(FILES as u64));
    let mut n = 0;
    for (way, with_data) in [("placeholders", false), ("with_data", true)] {
        group.bench_function(way, |b| {
            b.iter_batched(
                || {
                    n += 1;
                    pair.fresh_dst(dir.path(), n);
                    common::mirror(&pair, 0, true)
                },
                |mirror| {
                    if with_data {
                        common::carry(&mirror);
                    } else {
                        common::populate(&mirror);
                    }
                    mirror // Stopped outside of what is measured.
                },
                BatchSize::PerIteration,
            );
        });
        // Of the last round: the one before it was measured the same way.
        match with_data {
            true => pair.assert_copied(),
            false => pair.assert_placed(),
        }
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
