//! What is kept of files that src cannot give whole: how many are open, and when it is on record.

use std::fs;
use std::thread;

use crate::fixture::{LIMIT, Mounted, wait_until};
use crate::salvage::{Bad, FAIL, expect_salvaged, expect_whole, wait_told, world_of};

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
