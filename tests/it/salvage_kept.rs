//! What is kept of files that src cannot give whole: how many are open, and when it is on record.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;

use rustix::fs::{Advice, fadvise};
use serde_json::Value;

use crate::badsource::apart;
use crate::fixture::{LIMIT, Mounted, World, mirrorfs, run, wait_until};
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

/// What is kept of mixed files.
fn maps(w: &World) -> impl Iterator<Item = PathBuf> + use<> {
    let maps = fs::read_dir(w.dst.join(".mirrorfs/maps")).unwrap();
    maps.map(|e| e.unwrap().path())
}

/// The record of the one file that has one says that these bytes are in dst.
fn has_on_record(w: &World, (from, to): (u64, u64)) -> bool {
    let mut records = maps(w).filter(|p| p.extension().is_some_and(|e| e == "pulled"));
    let Some(record) = records.next().and_then(|at| fs::read(at).ok()) else {
        return false;
    };
    let record: Value = serde_json::from_slice(&record).unwrap();
    let present: Vec<(u64, u64)> = serde_json::from_value(record["present"].clone()).unwrap();
    present.iter().any(|(f, t)| *f <= from && to <= *t)
}

/// Some of a file has come, and all that is still asked for hangs, or src is away; then the daemon is killed.
fn kept_when_nothing_more_comes(src_dies: bool) {
    const OF: Bad<'_> = ("large", LARGE, &[5]);
    const SURE: std::ops::Range<usize> = (1 << 20) / PAGE..(9 << 19) / PAGE;
    let Some((mut bad, w)) = world_of(&[OF]) else {
        return;
    };
    let all = content(LARGE);
    // So slow that the rest of it is still to come.
    let m = w.mount_with(&["--bwlimit", "512K"], &[]);
    wait_until("a mixed file", LIMIT, || maps(&w).next().is_some());
    // A source that is a FUSE server lets nobody open a file of which a page is being read, so all that is sure
    // comes before the first read hangs; from behind, so nothing is read ahead.
    let (file, below) = (File::open(m.path("large")).unwrap(), w.dst.join("large"));
    let below = File::open(below).unwrap();
    let in_dst = || {
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let pieces = SURE.rev().step_by(16).map(|page| (page - 15) * PAGE);
        let (mut got, mut there) = (vec![0; 16 * PAGE], true);
        for at in pieces {
            file.read_exact_at(&mut got, at as u64).unwrap();
            assert!(got == all[at..][..got.len()], "at {at}");
            below.read_exact_at(&mut got, at as u64).unwrap();
            there &= got == all[at..][..got.len()];
        }
        there
    };
    wait_until("what is sure in dst", LIMIT, in_dst);
    drop((file, below));
    bad.tell("add path=large op=read off=6M-13M hang");
    let hangs = || {
        let all = bad.tell("list");
        let rule = all.lines().find(|l| l.ends_with("hang"));
        !rule.unwrap().contains("acted 0")
    };
    wait_until("a read that hangs", LIMIT, hangs);
    if src_dies {
        bad.die();
    }
    let sure = ((SURE.start * PAGE) as u64, (SURE.end * PAGE) as u64);
    wait_until("a record of it", LIMIT, || has_on_record(&w, sure));
    raw::kill(m.pid, libc::SIGKILL);
    // It has ended when nothing of it hangs.
    bad.die();
    m.kill();
    bad.come_back();
    let m = w.mount_with(&[FAIL, &["--no-background"]].concat(), &[]);
    bad.die();
    let file = File::open(m.path("large")).unwrap();
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

/// What a reader is about to be given must not change below him, and finish does not wait for ever.
#[test]
pub(crate) fn finish_says_what_it_waits_for_when_what_cannot_be_read_is_asked_for_and_hangs() {
    const OF: Bad<'_> = ("large", LARGE, &[5]);
    let Some((bad, w)) = world_of(&[OF]) else {
        return;
    };
    bad.tell("add path=large op=read off=6M-13M hang");
    let m = w.mount_with(&["--source-timeout", "1s"], &[]);
    wait_until("an entry of the ledger", LIMIT / 4, || {
        m.status()["errors"] == 1
    });
    let at = m.path("large");
    let read = apart(move || {
        let mut page = vec![0; PAGE];
        let file = File::open(at)?;
        file.read_exact_at(&mut page, 8 << 20).map(|()| page)
    });
    wait_until("a reader that waits", LIMIT / 4, || {
        m.status()["waiting"] == 1
    });
    let finish = || {
        let mut command = mirrorfs();
        run(command.arg("finish").arg(&m.at).arg("--accept-loss"))
    };
    let refused = finish().expect_code(23).err;
    assert!(
        refused.contains("that SRC cannot give whole is being read; try again"),
        "{refused}"
    );
    bad.tell("off");
    bad.tell("release");
    let page = read.recv_timeout(LIMIT).unwrap().unwrap();
    assert!(page == content(LARGE)[8 << 20..][..PAGE]);
    expect_whole(&bad, &w, m);
}
