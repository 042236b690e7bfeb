//! What comes before anybody asks for it, because of what was opened.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::fixture::{
    LARGE, LIMIT, Mounted, World, bytes, can_mount_on, fuse_mount_at, is_marked, mirrorfs, run,
    wait_until,
};

fn world() -> Option<World> {
    can_mount_on("ext4").then(|| World::on("ext4"))
}

/// A file of src that no hole and no extent can make cheaper.
fn file(w: &World, name: &str, len: usize) {
    let path = w.src.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes(len as u64, len)).unwrap();
}

fn number(status: &Value, key: &str) -> u64 {
    status[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key}: {status:#}"))
}

/// How many files of a directory of dst have their data, whether it is durable yet or not. It was
/// populated on access: all have their names.
fn pulled_in(w: &World, dir: &str) -> usize {
    let list = fs::read_dir(w.dst.join(dir)).unwrap();
    let raw = list.map(|e| fs::read(e.unwrap().path()).unwrap());
    raw.filter(|data| data[0] != 0).count()
}

/// A mount whose walker is far from `dir`: what it reads before is more than its limit gives it in the
/// time that a test takes.
fn far_from_the_walker(args: &[&str]) -> Option<(World, Mounted)> {
    let w = world()?;
    // Placed first, walked last.
    for n in 0..40 {
        file(&w, &format!("dir/{n:02}"), 100);
    }
    file(&w, "dir/large", 3 << 20);
    for n in 0..150 {
        file(&w, &format!("busy{n:03}/f"), 60 << 10);
    }
    // The order of the walk is chance (ext4 hashes names): it must not get past its first files.
    let args = [&["--bwlimit", "10K"], args].concat();
    let m = w.mount_with(&args, &[]);
    Some((w, m))
}

fn open(m: &Mounted, n: usize) {
    let path = m.path(format!("dir/{n:02}"));
    assert_eq!(fs::read(path).unwrap(), bytes(100, 100));
}

const A_WHILE: Duration = Duration::from_millis(300);

#[test]
fn the_second_file_of_a_directory_brings_its_neighbours_and_the_first_does_not() {
    let Some((w, m)) = far_from_the_walker(&[]) else {
        return;
    };
    open(&m, 10);
    std::thread::sleep(A_WHILE);
    assert_eq!(pulled_in(&w, "dir"), 1);
    open(&m, 11);
    wait_until("a step of neighbours", LIMIT, || {
        pulled_in(&w, "dir") >= 2 + 16
    });
    std::thread::sleep(A_WHILE);
    let status = m.status();
    assert_eq!(number(&status, "prefetched_files"), 16, "{status:#}");
    assert_eq!(number(&status, "prefetch_hits"), 0, "{status:#}");
    assert_eq!(number(&status, "demand_files"), 2, "{status:#}");
    // While they are opened more come, in larger steps.
    (0..40).for_each(|n| open(&m, n));
    let status = m.status();
    assert!(number(&status, "prefetched_files") > 16, "{status:#}");
    assert!(number(&status, "prefetch_hits") > 16, "{status:#}");
    assert!(is_marked(&w.dst.join("dir/large")), "that is not small");
    let page = run(mirrorfs().arg("status").arg(&m.at)).expect_code(0).out;
    assert!(page.contains("ahead   "), "{page}");
    run(mirrorfs().args(["set", "--bwlimit", "off"]).arg(&m.at)).expect_code(0);
    m.finish();
    w.expect_finished_copy();
}

#[test]
fn nothing_comes_unasked_with_noprefetch_without_the_background_and_while_it_is_paused() {
    for args in [&["-o", "noprefetch"][..], &["--no-background"], &[]] {
        let Some((w, m)) = far_from_the_walker(args) else {
            return;
        };
        if args.is_empty() {
            run(mirrorfs().arg("pause").arg(&m.at)).expect_code(0);
        }
        (0..10).for_each(|n| open(&m, n));
        std::thread::sleep(A_WHILE);
        assert_eq!(number(&m.status(), "prefetched_files"), 0, "{args:?}");
        assert_eq!(pulled_in(&w, "dir"), 10, "{args:?}");
    }
}

/// A file of dst has this at its end.
fn ends_with(path: &Path, end: &[u8]) -> bool {
    fs::read(path).unwrap().ends_with(end)
}

#[test]
fn a_recorded_trace_is_pulled_in_advance_and_nothing_else() {
    let Some(w) = world() else { return };
    let odd = "dir/odd \n name";
    for name in ["dir/a", "dir/b", "dir/never", "deep/er/c", "gone", odd] {
        file(&w, name, 5_000);
    }
    file(&w, "listed/only", 100);
    file(&w, "large", LARGE + (1 << 20));
    let trace = w.scratch_path("trace");
    let record = ["--no-background", "--record", trace.to_str().unwrap()];
    let m = w.mount_with(&record, &[]);
    let order = ["deep/er/c", "dir/b", "gone", odd, "dir/a", "dir/b"];
    for name in order {
        fs::read(m.path(name)).unwrap();
    }
    fs::read_dir(m.path("listed")).unwrap().count();
    let mut end = [0; 100];
    let large = fs::File::open(m.path("large")).unwrap();
    large
        .read_exact_at(&mut end, (LARGE + (1 << 20) - 100) as u64)
        .unwrap();
    drop(large);
    m.unmount();
    let text = fs::read_to_string(&trace).unwrap();
    let opened: Vec<&str> = text.split('\0').filter(|r| r.starts_with("f ")).collect();
    let want = [
        "f dir/b",
        "f gone",
        "f dir/odd \n name",
        "f dir/a",
        "f large",
    ];
    assert_eq!(opened[..], want, "{text:?}");
    assert!(
        text.starts_with("mirrorfs trace 1\nf deep/er/c\0"),
        "{text:?}"
    );

    fs::remove_file(w.src.join("gone")).unwrap();
    let again = World::from(w.src.clone(), w.dst.with_file_name("again"), vec![]);
    fs::create_dir(&again.dst).unwrap();
    let replay = ["--no-background", "--replay", trace.to_str().unwrap()];
    let m = again.mount_with(&replay, &[]);
    wait_until("the trace is replayed", LIMIT, || {
        m.log().contains("1 entries have gone")
    });
    wait_until("its files are here", LIMIT, || {
        number(&m.status(), "prefetched_files") == 4
    });
    let status = m.status();
    assert_eq!(number(&status, "demand_files"), 0, "{status:#}");
    let want = bytes(5_000, 5_000);
    for name in ["deep/er/c", "dir/b", odd, "dir/a"] {
        assert!(fs::read(again.dst.join(name)).unwrap() == want, "{name:?}");
        assert!(fs::read(m.path(name)).unwrap() == want, "{name:?}");
    }
    assert!(again.dst.join("listed/only").exists(), "it was listed");
    assert!(ends_with(&again.dst.join("large"), &end));
    for name in ["dir/never", "listed/only"] {
        assert!(is_marked(&again.dst.join(name)), "{name}");
    }
    assert_eq!(number(&m.status(), "prefetch_hits"), 4);
    assert_eq!(number(&m.status(), "errors"), 0);
}

#[test]
pub(crate) fn a_trace_that_cannot_be_used_is_one_line_and_nothing_is_mounted() {
    let Some(w) = world() else { return };
    file(&w, "a", 100);
    let bad = w.scratch_path("bad");
    fs::write(&bad, "f a\0").unwrap();
    let inside = w.dst.join("trace");
    let nowhere = w.scratch_path("no/where");
    for (option, path, code) in [
        ("--replay", &bad, 2),
        ("--replay", &nowhere, 3),
        ("--record", &nowhere, 3),
        ("--record", &inside, 2),
        ("--record", &w.src.join("trace"), 2),
    ] {
        let mut mount = mirrorfs();
        mount.args(["mount", option]).arg(path);
        let output = run(mount.args([&w.src, &w.dst, &w.at])).expect_code(code);
        assert_eq!(output.err.lines().count(), 1, "{}", output.err);
        assert!(output.err.contains(option), "{}", output.err);
        assert!(fuse_mount_at(&w.at).is_none());
    }
    assert!(!inside.exists() && !w.src.join("trace").exists());
    let dst: Vec<_> = fs::read_dir(&w.dst).unwrap().collect();
    assert!(dst.is_empty(), "{dst:?}");
}
