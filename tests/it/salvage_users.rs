//! Users who change a file that src cannot give whole while it is being given up.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime};

use crate::badsource::{NOT_YET, apart};
use crate::fixture::{Hold, LIMIT, Mounted, Output, World, bytes, mirrorfs, run, wait_until};
use crate::raw;
use crate::salvage::{Bad, LARGE, PAGE, SMALL, content, retry, rw, wait_told, world_of};

/// What a user writes, where it is.
const AT: usize = 40;

/// Each is changed in another way.
const FILES: &[Bad<'_>] = &[
    ("written", SMALL, &[0, 100]),
    ("in-part", LARGE, &[5, 2000]),
    ("mapped", SMALL, &[3]),
    ("cut", SMALL, &[1, 120]),
    ("grown", SMALL, &[1]),
    ("emptied", LARGE, &[7]),
    ("opened", SMALL, &[7]),
    ("punched", SMALL, &[9]),
    ("times", SMALL, &[0]),
    ("mode", SMALL, &[0]),
    ("as-it-was", SMALL, &[0]),
];

/// `finish` that stops at a point until it is told to go on.
struct Held {
    hold: Hold,
    said: Option<Receiver<Output>>,
}

impl Held {
    /// A mount whose `finish` will stop.
    fn mount(w: &World, point: &str) -> (Held, Mounted) {
        let hold = Hold::at(w, point);
        let m = w.mount_with(&[], &hold.env());
        (Held { hold, said: None }, m)
    }

    /// Returns when it has stopped.
    fn finish(&mut self, m: &Mounted) {
        let mut command = mirrorfs();
        command.arg("finish").arg(&m.at).arg("--accept-loss");
        self.said = Some(apart(move || run(&mut command)));
        self.hold.wait_met();
    }

    fn go_on(self) -> Output {
        self.hold.let_go();
        self.said.unwrap().recv_timeout(LIMIT).unwrap()
    }
}

type Change = Receiver<io::Result<()>>;

fn page() -> Vec<u8> {
    bytes(77, PAGE)
}

/// Begins to change all of them, each in a thread; through files that were open before, where that can be.
fn change_all(m: &Mounted, open: Vec<File>) -> Vec<(&'static str, Change)> {
    let mut open = open.into_iter();
    let mut next = || open.next().unwrap();
    let (written, part, mapped, cut, grown, emptied, punched) =
        (next(), next(), next(), next(), next(), next(), next());
    let (opened, times, mode) = (m.path("opened"), m.path("times"), m.path("mode"));
    let at = (AT * PAGE) as u64;
    vec![
        ("written", apart(move || written.write_all_at(&page(), at))),
        ("in-part", apart(move || part.write_all_at(b"user", at + 5))),
        (
            "mapped",
            apart(move || {
                let map = raw::Map::shared(mapped.as_fd(), 60 * PAGE, true)?;
                map.write(AT * PAGE, &page());
                map.sync()
            }),
        ),
        ("cut", apart(move || cut.set_len(300_001))),
        ("grown", apart(move || grown.set_len(700_001))),
        ("emptied", apart(move || emptied.set_len(0))),
        (
            "opened",
            apart(move || {
                let mut options = OpenOptions::new();
                options.write(true).truncate(true).open(opened).map(drop)
            }),
        ),
        (
            "punched",
            apart(move || {
                use rustix::fs::FallocateFlags as F;
                let flags = F::PUNCH_HOLE | F::KEEP_SIZE;
                Ok(rustix::fs::fallocate(punched, flags, at, PAGE as u64)?)
            }),
        ),
        (
            "times",
            apart(move || {
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
                File::open(times)?.set_modified(time)
            }),
        ),
        (
            "mode",
            apart(move || fs::set_permissions(mode, fs::Permissions::from_mode(0o600))),
        ),
    ]
}

fn open_all(m: &Mounted) -> Vec<File> {
    let names = [
        "written", "in-part", "mapped", "cut", "grown", "emptied", "punched",
    ];
    names.map(|name| rw(m, name)).into()
}

/// These need no byte of the file.
const AT_ONCE: [&str; 2] = ["times", "mode"];

/// Those that must wait do; the others are made.
#[track_caller]
fn expect_held(changes: Vec<(&'static str, Change)>) -> Vec<(&'static str, Change)> {
    std::thread::sleep(NOT_YET);
    let mut held = Vec::new();
    for (name, change) in changes {
        if AT_ONCE.contains(&name) {
            change.recv_timeout(LIMIT).unwrap().unwrap();
        } else {
            assert!(change.try_recv().is_err(), "{name} did not wait");
            held.push((name, change));
        }
    }
    held
}

/// What users have made of the files, in what is left of src's bytes.
#[track_caller]
fn expect_changed(w: &World) {
    let mut wrong = Vec::new();
    for (name, size, bad) in FILES {
        let mut all = content(*size);
        for page in *bad {
            let end = all.len().min((page + 1) * PAGE);
            all[page * PAGE..end].fill(0);
        }
        match *name {
            "written" | "mapped" => all[AT * PAGE..][..PAGE].copy_from_slice(&page()),
            "in-part" => all[AT * PAGE + 5..][..4].copy_from_slice(b"user"),
            "cut" => all.truncate(300_001),
            "grown" => all.resize(700_001, 0),
            "emptied" | "opened" => all.clear(),
            "punched" => all[AT * PAGE..][..PAGE].fill(0),
            _ => {}
        }
        let path = w.dst.join(name);
        let (there, meta) = (fs::read(&path).unwrap(), path.metadata().unwrap());
        let time = meta.mtime();
        let right = match *name {
            "times" => time == 1_500_000_000,
            "mode" => meta.mode() & 0o7777 == 0o600 && time == 1_300_000_000,
            "as-it-was" => time == 1_300_000_000,
            _ => time > 1_600_000_000,
        };
        if there != all || !right {
            wrong.push((*name, there.len(), time, there == all));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

fn changed_at(point: &str) {
    let Some((mut bad, w)) = world_of(FILES) else {
        return;
    };
    let (mut held, mut m) = Held::mount(&w, point);
    wait_told(&m, FILES);
    let open = open_all(&m);
    bad.die();
    held.finish(&m);
    let changes = expect_held(change_all(&m, open));
    let said = held.go_on().expect_code(23);
    for (name, change) in changes {
        change
            .recv_timeout(LIMIT)
            .unwrap()
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    m.wait_exit(LIMIT);
    w.expect_no_trace();
    expect_changed(&w);
    assert!(said.out.contains("is a plain tree"), "{}", said.out);
}

#[test]
fn what_users_change_before_the_rest_is_given_up_waits_and_is_theirs() {
    changed_at("finish-shut");
}

#[test]
fn what_users_change_while_the_rest_is_given_up_waits_and_is_theirs() {
    changed_at("salvage-given");
}

/// With a file that somebody has changed before: `finish` is refused.
#[test]
fn what_users_change_while_a_finish_is_refused_is_made_as_ever() {
    const OF: &[Bad<'_>] = &[
        ("written", SMALL, &[0, 100]),
        ("emptied", LARGE, &[7]),
        ("before", SMALL, &[3]),
    ];
    let Some((bad, w)) = world_of(OF) else {
        return;
    };
    let (mut held, m) = Held::mount(&w, "finish-shut");
    wait_told(&m, OF);
    let at = (AT * PAGE) as u64;
    rw(&m, "before").write_all_at(&page(), at).unwrap();
    held.finish(&m);
    let (written, emptied) = (rw(&m, "written"), rw(&m, "emptied"));
    let changes = vec![
        ("written", apart(move || written.write_all_at(&page(), at))),
        ("emptied", apart(move || emptied.set_len(0))),
    ];
    let changes = expect_held(changes);
    let said = held.go_on().expect_code(23);
    assert!(said.err.contains("users have changed"), "{}", said.err);
    for (name, change) in changes {
        let made = change.recv_timeout(LIMIT).unwrap();
        made.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    bad.tell("off");
    wait_until("an empty ledger", LIMIT, || {
        retry(&m);
        std::thread::sleep(NOT_YET / 4);
        m.status()["errors"] == 0
    });
    m.finish();
    for name in ["written", "before"] {
        let mut all = content(SMALL);
        all[AT * PAGE..][..PAGE].copy_from_slice(&page());
        assert!(fs::read(w.dst.join(name)).unwrap() == all, "{name}");
    }
    assert_eq!(fs::read(w.dst.join("emptied")).unwrap(), b"");
}

/// Nothing could be read of them, so they are removed: nobody is told that his bytes are there.
#[test]
fn who_writes_into_what_finish_removes_is_told() {
    const OF: &[Bad<'_>] = &[("none", 10_000, &[0, 1, 2]), ("some", SMALL, &[3])];
    let Some((_bad, w)) = world_of(OF) else {
        return;
    };
    let (mut held, mut m) = Held::mount(&w, "finish-shut");
    wait_told(&m, OF);
    let (none, cut) = (rw(&m, "none"), rw(&m, "none"));
    held.finish(&m);
    let changes = vec![
        ("written", apart(move || none.write_all_at(&page(), 0))),
        ("emptied", apart(move || cut.set_len(0))),
    ];
    let changes = expect_held(changes);
    held.go_on().expect_code(23);
    for (name, change) in changes {
        let made = change.recv_timeout(LIMIT).unwrap();
        let told = made.err().and_then(|e| e.raw_os_error());
        assert_eq!(told, Some(libc::ESTALE), "{name}");
    }
    m.wait_exit(LIMIT);
    w.expect_no_trace();
    assert!(!w.dst.join("none").exists());
    assert!(w.dst.join("some").exists());
}

/// The walker hears of the end of such files when `finish` ends, and takes the root's mark away then.
#[test]
fn a_walker_that_waits_for_what_is_given_up_keeps_finish_from_nothing() {
    const OF: &[Bad<'_>] = &[("small", SMALL, &[3]), ("large", LARGE, &[5, 2000])];
    let Some((_bad, w)) = world_of(OF) else {
        return;
    };
    let (mut held, mut m) = Held::mount(&w, "finish-shut");
    wait_told(&m, OF);
    // A pass begins, and looks at nothing before `finish` asks nothing more of src: so it waits for both.
    let steer = |what: &str| run(mirrorfs().arg(what).arg(&m.at)).expect_code(0);
    steer("pause");
    std::thread::sleep(Duration::from_secs(1));
    held.finish(&m);
    steer("resume");
    std::thread::sleep(Duration::from_secs(1));
    held.go_on().expect_code(23);
    m.wait_exit(LIMIT);
    w.expect_no_trace();
}
