//! Metadata: everything about a file but its data, captured, and applied to another file; marks.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use common::Pair;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mirrorfs::mark::{Mark, MarkName};
use mirrorfs::meta::Meta;
use mirrorfs::sys::xattr::Target;

const FILES: usize = 500;

fn benches(c: &mut Criterion) {
    let dir = common::scratch();
    let pair = Pair::make(dir.path(), FILES, 4096);
    let open = |root: &std::path::Path| -> Vec<File> {
        let open = |name: &mirrorfs::sys::name::Name| {
            let path = root.join(name.as_os_str());
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path).expect("open")
        };
        pair.names.iter().map(open).collect()
    };
    let (src, dst) = (open(&pair.src), open(&pair.dst));
    let capture = |file: &File| Meta::capture_fd(common::CAPTURE, file.as_fd()).expect("captured");
    let metas: Vec<Meta> = src.iter().map(capture).collect();

    let mut group = c.benchmark_group("metadata");
    group
        .sample_size(20)
        .measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(FILES as u64));
    group.bench_function("capture", |b| {
        b.iter(|| src.iter().map(capture).collect::<Vec<_>>());
    });
    group.bench_function("apply", |b| {
        b.iter(|| {
            for (meta, file) in metas.iter().zip(&dst) {
                assert!(meta.apply_fd(file.as_fd()).is_empty(), "applied");
            }
        });
    });
    for (meta, file) in metas.iter().zip(&dst) {
        let now = capture(file);
        assert_eq!(now.xattrs, meta.xattrs);
        assert_eq!(
            (now.stat.perm(), now.stat.mtime),
            (meta.stat.perm(), meta.stat.mtime)
        );
    }
    group.bench_function("mark_and_unmark", |b| {
        b.iter(|| {
            for file in &dst {
                let target = Target::Open(file.as_fd());
                let mark = MarkName::User;
                mark.set(target, &Mark::pending()).expect("set");
                assert_eq!(mark.get(target).expect("get"), Some(Mark::pending()));
                mark.remove(target).expect("removed");
            }
        });
    });
    for file in &dst {
        let mark = MarkName::User.get(Target::Open(file.as_fd()));
        assert_eq!(mark.expect("get"), None);
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
