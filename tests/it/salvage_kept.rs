//! What is kept of files that src cannot give whole: how many are open, and when it is on record.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::fixture::{LIMIT, Mounted, wait_until};
use crate::raw;
use crate::salvage::{
    Bad, FAIL, LARGE, PAGE, content, expect_salvaged, expect_whole, wait_told, world_of,
};

/// Files of dst, and their maps, that the daemon has open.
fn open_files(m: &Mounted) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{}/fd", m.pid)).unwrap();
    let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let links = links.map(|l| l.to_string_lossy().into_owned());
    let is_one = |l: &String| l.contains("/many-") || l.contains("/.mirrorfs/maps/");
    links.filter(is_one).collect()
}

const SOME: usize = 24;
/// Twice as many as this are open at most, with two fds each; and one that is being read just now.
const SALVAGED: usize = 3;
const OPEN_MAX: usize = 2 * (2 * SALVAGED + 1);

#[test]
fn few_of_many_bad_files_are_open_and_all_are_there() {
    let names: Vec<String> = (0..SOME).map(|n| format!("many-{n}")).collect();
    let files: Vec<Bad<'_>> = names
        .iter()
        .map(|name| (name.as_str(), 70_000, &[3, 7][..]))
        .collect();
    let Some((mut bad, w)) = world_of(&files) else {
        return;
    };
    let m = w.mount_with(FAIL, &[("MIRRORFS_FAULT_SALVAGED", &SALVAGED.to_string())]);
    wait_told(&m, &files);
    let few = |what: &str| {
        wait_until(what, LIMIT, || open_files(&m).len() <= OPEN_MAX);
    };
    few("few open files");
    bad.die();
    // Whoever comes opens them again, and several at once.
    for _ in 0..2 {
        thread::scope(|scope| {
            for file in &files {
                let m = &m;
                scope.spawn(move || expect_salvaged(m, *file));
            }
        });
        few("few open files when src is dead");
    }
    bad.come_back();
    expect_whole(&bad, &w, m);
}

/// Some of a file has come, and all that is still asked for hangs, or src is away; then the daemon is killed.
fn kept_when_nothing_more_comes(src_dies: bool) {
    const OF: Bad<'_> = ("large", LARGE, &[5]);
    // What was read beside the bad page, and what is read together with what hangs, may come or not.
    const SURE: std::ops::Range<usize> = (1 << 20) / PAGE..(9 << 19) / PAGE;
    let Some((mut bad, w)) = world_of(&[OF]) else {
        return;
    };
    bad.tell("add path=large op=read off=6M-13M hang");
    let m = w.mount();
    let hangs = || {
        let all = bad.tell("list");
        let rule = all.lines().find(|l| l.ends_with("hang"));
        !rule.unwrap().contains("acted 0")
    };
    wait_until("a read that hangs", LIMIT, hangs);
    if src_dies {
        bad.die();
    }
    let records = || {
        let maps = fs::read_dir(w.dst.join(".mirrorfs/maps")).unwrap();
        let names = maps.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.ends_with(".pulled")).count()
    };
    let end = Instant::now() + Duration::from_secs(8);
    while records() == 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(50));
    }
    let kept = records();
    raw::kill(m.pid, libc::SIGKILL);
    // It has ended when nothing of it hangs.
    bad.die();
    m.kill();
    assert_eq!(kept, 1, "records");
    bad.come_back();
    let m = w.mount_with(&[FAIL, &["--no-background"]].concat(), &[]);
    bad.die();
    let (file, all) = (File::open(m.path("large")).unwrap(), content(LARGE));
    for page in SURE {
        let mut got = vec![0; PAGE];
        let read = file.read_exact_at(&mut got, (page * PAGE) as u64);
        assert!(read.is_ok(), "page {page}: {read:?}");
        assert!(got == all[page * PAGE..][..PAGE], "page {page}");
    }
    drop(file);
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    bad.come_back();
    expect_whole(&bad, &w, w.mount());
}

#[test]
fn what_has_come_of_a_bad_file_is_on_record_while_the_rest_hangs() {
    kept_when_nothing_more_comes(false);
}

#[test]
fn what_has_come_of_a_bad_file_is_on_record_while_src_is_away() {
    kept_when_nothing_more_comes(true);
}
