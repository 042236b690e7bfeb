//! Several clients at once, on what is pending: each on its own subtree, all on the same names, all on
//! one file.
//!
//! Of names that everybody changes the test knows no more than when each call began and ended and what
//! it answered. Some order of all calls, each somewhere between its beginning and its end, must explain
//! every answer and what is there afterwards (linearizability); `explains` looks for one.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use mirrorfs::sys::handle::Handle;
use rustix::fs::{CWD, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::badsource::{apart, read_apart, world};
use crate::differential::{Side, run_both};
use crate::fixture::{
    Hold, LARGE, LIMIT, Random, Scratch, World, bytes, can_mount_on, is_marked, is_unpopulated,
    mirrorfs, run, wait_until,
};

const CLIENTS: u64 = 4;

// Disjoint subtrees: each client's answers are those of a plain directory, whatever the others do.

fn on_own_subtrees(kind: &str, background: bool) {
    if !can_mount_on(kind) {
        return;
    }
    let seed = Random::seeded(21).next();
    let w = World::on(kind);
    for client in 0..CLIENTS {
        fs::create_dir(w.src.join(format!("c{client}"))).unwrap();
        Side::new(&w.src.join(format!("c{client}"))).fill(seed ^ client, 300);
    }
    let plain = w.src.with_file_name("plain");
    run(Command::new("cp").arg("-a").arg(&w.src).arg(&plain)).expect_code(0);
    let m = match background {
        true => w.mount(),
        false => w.mount_lazy(),
    };
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let name = format!("c{client}");
            let sides = (plain.join(&name), m.at.join(&name));
            scope.spawn(move || {
                let (mut a, mut b) = (Side::new(&sides.0), Side::new(&sides.1));
                run_both(seed + client, 800, true, &mut a, &mut b);
            });
        }
    });
    m.finish();
    w.expect_no_trace();
    w.expect_same_tree(&plain);
}

#[test]
pub(crate) fn clients_on_their_own_subtrees_see_plain_directories() {
    on_own_subtrees("ext4", false);
    on_own_subtrees("ext4", true);
}

#[test]
fn clients_on_their_own_subtrees_see_plain_directories_on_xfs_and_btrfs() {
    on_own_subtrees("xfs", true);
    on_own_subtrees("btrfs", true);
}

// The same names.

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// Calls of one client in one round.
const CALLS: usize = 6;
const ROUNDS: u64 = 40;

/// What is behind each name: the number of a file, which never changes its bytes.
type State = [Option<u64>; NAMES.len()];

/// Not link(2): the kernel looks for its file and its new name at two moments.
#[derive(Debug, Clone, Copy)]
enum Call {
    Get(usize),
    /// A new file takes the name, whatever is there; or only if nothing is.
    Put(usize, u64),
    PutNew(usize, u64),
    Unlink(usize),
    Rename(usize, usize),
    RenameNew(usize, usize),
    Exchange(usize, usize),
}

type Answer = Result<Option<u64>, Errno>;

#[derive(Debug, Clone, Copy)]
struct Event {
    call: Call,
    began: u64,
    ended: u64,
    answer: Answer,
}

impl Event {
    fn line(&self) -> String {
        let (call, answer) = (self.call, self.answer);
        format!("\n  {} to {}: {call:?}: {answer:?}", self.began, self.ended)
    }
}

/// What POSIX says.
fn model(state: &mut State, call: Call) -> Answer {
    match call {
        Call::Get(n) => state[n].map(Some).ok_or(Errno::NOENT),
        Call::Put(n, file) => {
            state[n] = Some(file);
            Ok(None)
        }
        Call::PutNew(n, file) => match state[n] {
            Some(_) => Err(Errno::EXIST),
            None => {
                state[n] = Some(file);
                Ok(None)
            }
        },
        Call::Unlink(n) => state[n].take().map(|_| None).ok_or(Errno::NOENT),
        Call::Rename(a, b) => match state[a] {
            None => Err(Errno::NOENT),
            // Two names of one file, or one name: nothing happens.
            same if same == state[b] => Ok(None),
            file => {
                (state[a], state[b]) = (None, file);
                Ok(None)
            }
        },
        Call::RenameNew(a, b) => match (state[a], state[b]) {
            (None, _) => Err(Errno::NOENT),
            (_, Some(_)) => Err(Errno::EXIST),
            (file, None) => {
                (state[a], state[b]) = (None, file);
                Ok(None)
            }
        },
        Call::Exchange(a, b) => match (state[a], state[b]) {
            (Some(_), Some(_)) => {
                state.swap(a, b);
                Ok(None)
            }
            _ => Err(Errno::NOENT),
        },
    }
}

/// Whether some order of the calls explains every answer and leaves `end`.
fn explains(events: &[Event], start: State, end: State) -> bool {
    fn search(
        events: &[Event],
        done: u64,
        state: State,
        end: State,
        seen: &mut HashSet<(u64, State)>,
    ) -> bool {
        if done.count_ones() as usize == events.len() {
            return state == end;
        }
        if !seen.insert((done, state)) {
            return false;
        }
        let open = |i: &usize| done & (1 << i) == 0;
        let first_end = (0..events.len())
            .filter(open)
            .map(|i| events[i].ended)
            .min()
            .unwrap_or(u64::MAX);
        // Whatever began after another had ended comes after it.
        (0..events.len())
            .filter(open)
            .filter(|i| events[*i].began < first_end)
            .any(|i| {
                let mut next = state;
                model(&mut next, events[i].call) == events[i].answer
                    && search(events, done | 1 << i, next, end, seen)
            })
    }
    assert!(events.len() <= 64);
    search(events, 0, start, end, &mut HashSet::new())
}

fn body(file: u64) -> Vec<u8> {
    // Small, middle, and read by ranges.
    let len = [3_000, 90_000, LARGE + 70_000][usize::try_from(file % 3).unwrap()];
    let mut all = file.to_le_bytes().to_vec();
    all.extend(bytes(file, len));
    all
}

/// Which file it is; its bytes must be that file's.
fn file_at(path: &Path) -> Answer {
    let all = fs::read(path).map_err(|e| Errno::from_io_error(&e).unwrap())?;
    let file = u64::from_le_bytes(all[..8].try_into().unwrap());
    assert!(all == body(file), "{} has other bytes", path.display());
    Ok(Some(file))
}

fn perform(dir: &Path, own: &Path, call: Call) -> Answer {
    let at = |n: usize| dir.join(NAMES[n]);
    let rename = |a: PathBuf, b: PathBuf, flags| rustix::fs::renameat_with(CWD, a, CWD, b, flags);
    let none = RenameFlags::empty();
    match call {
        Call::Get(n) => return file_at(&at(n)),
        Call::Put(n, _) => rename(own.to_owned(), at(n), none),
        Call::PutNew(n, _) => rename(own.to_owned(), at(n), RenameFlags::NOREPLACE),
        Call::Unlink(n) => rustix::fs::unlink(at(n)),
        Call::Rename(a, b) => rename(at(a), at(b), none),
        Call::RenameNew(a, b) => rename(at(a), at(b), RenameFlags::NOREPLACE),
        Call::Exchange(a, b) => rename(at(a), at(b), RenameFlags::EXCHANGE),
    }
    .map(|()| None)
}

fn random_call(random: &mut Random, new: u64) -> Call {
    let n = random.below(4) as usize;
    let other = (n + 1 + random.below(3) as usize) % 4;
    match random.below(11) {
        0..=3 => Call::Get(n),
        4 => Call::Put(n, new),
        5 => Call::PutNew(n, new),
        6 | 7 => Call::Unlink(n),
        8 => Call::Rename(n, other),
        9 => Call::RenameNew(n, other),
        _ => Call::Exchange(n, other),
    }
}

/// One directory, that nobody has looked into: all clients at once, then the verdict.
fn round(dir: &Path, private: &Path, start: State, seed: u64) {
    let (clock, all) = (AtomicU64::new(0), Barrier::new(CLIENTS as usize));
    let events: Vec<Event> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (clock, all) = (&clock, &all);
                let own = private.join(format!("own{client}"));
                scope.spawn(move || {
                    let mut random = Random::new(seed * 31 + client);
                    let mut events = Vec::new();
                    all.wait();
                    for i in 0..CALLS as u64 {
                        // Small ones: their bytes are not what this is about.
                        let new = (1000 + client * 100 + i) * 3;
                        let call = random_call(&mut random, new);
                        if matches!(call, Call::Put(..) | Call::PutNew(..)) {
                            fs::write(&own, body(new)).unwrap();
                        }
                        let began = clock.fetch_add(1, SeqCst);
                        let answer = perform(dir, &own, call);
                        let ended = clock.fetch_add(1, SeqCst);
                        events.push(Event {
                            call,
                            began,
                            ended,
                            answer,
                        });
                    }
                    let _ = fs::remove_file(&own); // Only there if the last name was taken.
                    events
                })
            })
            .collect();
        clients
            .into_iter()
            .flat_map(|c| c.join().unwrap())
            .collect()
    });
    let end = NAMES.map(|n| file_at(&dir.join(n)).ok().flatten());
    let listed = fs::read_dir(dir).unwrap().count();
    assert_eq!(listed, end.iter().flatten().count(), "{}", dir.display());
    let mut story = events.clone();
    story.sort_by_key(|e| e.began);
    assert!(
        explains(&events, start, end),
        "seed {seed}, {}: {start:?} became {end:?}, and no order explains:{}",
        dir.display(),
        story.iter().map(Event::line).collect::<String>()
    );
}

/// What the directory of a round begins with; every tenth has files that are read by ranges.
fn start(round: u64) -> State {
    let file = |n: u64| (round * 4 + n) * 3 + (if round.is_multiple_of(10) { 2 } else { n % 2 });
    [Some(file(0)), Some(file(1)), Some(file(2)), None]
}

fn fill(root: &Path) {
    for r in 0..ROUNDS {
        let dir = root.join(format!("r{r}"));
        fs::create_dir(&dir).unwrap();
        for (name, file) in NAMES.iter().zip(start(r)) {
            file.into_iter()
                .for_each(|file| fs::write(dir.join(name), body(file)).unwrap());
        }
    }
    fs::create_dir(root.join("private")).unwrap();
}

fn on_the_same_names(kind: &str, background: bool) {
    if !can_mount_on(kind) {
        return;
    }
    let seed = Random::seeded(31).next();
    let w = World::on(kind);
    fill(&w.src);
    let m = match background {
        true => w.mount(),
        false => w.mount_lazy(),
    };
    let mut left = BTreeMap::new();
    for r in 0..ROUNDS {
        let dir = m.path(format!("r{r}"));
        round(&dir, &m.path("private"), start(r), seed + r);
        left.insert(r, NAMES.map(|n| file_at(&dir.join(n)).ok().flatten()));
    }
    m.finish();
    w.expect_no_trace();
    for (r, state) in left {
        let dir = w.dst.join(format!("r{r}"));
        assert_eq!(
            state,
            NAMES.map(|n| file_at(&dir.join(n)).ok().flatten()),
            "round {r}"
        );
    }
}

#[test]
pub(crate) fn clients_on_the_same_names_are_explained_by_some_order() {
    on_the_same_names("ext4", false);
    on_the_same_names("ext4", true);
}

#[test]
fn clients_on_the_same_names_are_explained_by_some_order_on_btrfs() {
    on_the_same_names("btrfs", true);
}

/// The test's own test: no program.
#[test]
fn clients_on_the_same_names_of_a_plain_directory_are_explained_too() {
    let plain = Scratch::new();
    fill(plain.path());
    for r in 0..ROUNDS {
        let dir = plain.path().join(format!("r{r}"));
        round(&dir, &plain.path().join("private"), start(r), 77 + r);
    }
}

#[test]
fn what_no_order_explains_is_seen() {
    let event = |call, began, ended, answer| Event {
        call,
        began,
        ended,
        answer,
    };
    let start: State = [Some(1), None, None, None];
    let gone: State = [None; 4];
    // Read after it was deleted.
    let events = [
        event(Call::Unlink(0), 0, 1, Ok(None)),
        event(Call::Get(0), 2, 3, Ok(Some(1))),
    ];
    assert!(!explains(&events, start, gone));
    // While it is deleted either is right.
    let events = [
        event(Call::Unlink(0), 0, 3, Ok(None)),
        event(Call::Get(0), 1, 2, Ok(Some(1))),
    ];
    assert!(explains(&events, start, gone));
    // It came back.
    assert!(!explains(&events, start, start));
    // Both have got it.
    let events = [
        event(Call::Rename(0, 1), 0, 2, Ok(None)),
        event(Call::Rename(0, 2), 1, 3, Ok(None)),
    ];
    assert!(!explains(&events, start, [None, Some(1), Some(1), None]));
}

// One file.

const BLOCK: usize = 4096;
const BLOCKS: u64 = 8;
const WRITES: u64 = 150;
/// What src has in every block: not zero, so that a lost byte shows.
const FIRST: u8 = 255;

/// Every client has blocks of his own and writes them again and again, everybody reads all of them: a
/// read sees what had been written when it began, or later.
fn on_one_file(kind: &str, len: usize) {
    if !can_mount_on(kind) {
        return;
    }
    let w = World::on(kind);
    fs::write(w.src.join("file"), vec![FIRST; len]).unwrap();
    let m = w.mount_lazy();
    let path = m.path("file");
    let far = (len / BLOCK) as u64 / (CLIENTS * BLOCKS);
    let place = |block: u64| block * far * BLOCK as u64;
    let counts =
        || -> Vec<AtomicU64> { (0..CLIENTS * BLOCKS).map(|_| AtomicU64::new(0)).collect() };
    let (begun, done) = (counts(), counts());
    let version = |file: &File, block: u64| {
        let mut got = [0; BLOCK];
        file.read_exact_at(&mut got, place(block)).unwrap();
        match got[BLOCK / 2] {
            FIRST => 0,
            v => u64::from(v),
        }
    };
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (begun, done, path, version) = (&begun, &done, &path, &version);
            scope.spawn(move || {
                let mut random = Random::new(client);
                let reading = File::open(path).unwrap();
                // While others have read and written some of it.
                let file = OpenOptions::new().write(true).open(path).unwrap();
                for i in 0..WRITES {
                    let mine = (client * BLOCKS + i % BLOCKS) as usize;
                    let v = begun[mine].fetch_add(1, SeqCst) + 1;
                    let data = [u8::try_from(v).unwrap(); BLOCK];
                    file.write_all_at(&data, place(mine as u64)).unwrap();
                    done[mine].fetch_add(1, SeqCst);
                    let any = random.below(CLIENTS * BLOCKS);
                    let least = done[any as usize].load(SeqCst);
                    let saw = version(&reading, any);
                    let most = begun[any as usize].load(SeqCst);
                    assert!(
                        (least..=most).contains(&saw),
                        "block {any}: version {saw}, {least} was there, {most} had begun"
                    );
                }
            });
        }
    });
    let expect = |path: &Path| {
        let all = fs::read(path).unwrap();
        assert_eq!(all.len(), len);
        let mut want = vec![FIRST; len];
        for (block, done) in (0..).zip(&done) {
            let at = place(block) as usize;
            let v = u8::try_from(done.load(SeqCst)).unwrap();
            want[at..at + BLOCK].fill(v);
        }
        let wrong = all.iter().zip(&want).position(|(a, b)| a != b);
        assert_eq!(
            wrong,
            None,
            "{}: {:?}",
            path.display(),
            wrong.map(|i| all[i])
        );
    };
    expect(&path);
    m.finish();
    expect(&w.dst.join("file"));
}

#[test]
pub(crate) fn clients_that_write_into_one_pending_file_see_each_other() {
    for len in [BLOCK * (CLIENTS * BLOCKS) as usize, 1 << 20, LARGE * 2] {
        on_one_file("ext4", len);
    }
    on_one_file("xfs", LARGE + 1000);
    on_one_file("btrfs", LARGE + 1000);
}

/// Where nobody waits an open has succeeded by then, or there was no such name; here it waits for src.
#[test]
fn a_pending_file_that_is_deleted_while_somebody_opens_it_is_opened() {
    let filled = world(|bad| {
        for name in ["d/deleted", "d/replaced", "d/written", "d/new"] {
            bad.write(name, &bytes(name.len() as u64, 70_000));
        }
    });
    let Some((mut bad, w)) = filled else { return };
    bad.start(&[]);
    let m = w.mount_lazy();
    assert_eq!(fs::read_dir(m.path("d")).unwrap().count(), 4);
    assert_eq!(fs::read(m.path("d/new")).unwrap().len(), 70_000);
    bad.tell("add path=d/* op=read,open hang");
    let written = m.path("d/written");
    let opened = [
        read_apart(m.path("d/deleted")),
        read_apart(m.path("d/replaced")),
        apart(move || {
            let mut file = OpenOptions::new().read(true).write(true).open(written)?;
            file.write_all_at(b"mine", 10)?;
            let mut all = Vec::new();
            file.read_to_end(&mut all).map(|_| all)
        }),
    ];
    wait_until("three wait", LIMIT, || m.status()["waiting"] == 3);
    fs::remove_file(m.path("d/deleted")).unwrap();
    fs::remove_file(m.path("d/written")).unwrap();
    fs::rename(m.path("d/new"), m.path("d/replaced")).unwrap();
    // A new inode must not have the number of one that somebody is about to open.
    let others = || (0..20).map(|n| m.path(format!("d/other{n}")));
    others().for_each(|path| fs::write(path, b"other").unwrap());
    bad.tell("off");
    bad.tell("release");
    let mut want = ["d/deleted", "d/replaced", "d/written"].map(|n| bytes(n.len() as u64, 70_000));
    want[2][10..14].copy_from_slice(b"mine");
    for (told, want) in opened.into_iter().zip(want) {
        let got = told.recv_timeout(LIMIT).unwrap().unwrap();
        assert!(got == want, "{} bytes", got.len());
    }
    others().for_each(|path| fs::remove_file(path).unwrap());
    assert_eq!(fs::read_dir(m.path("d")).unwrap().count(), 1);
    assert_eq!(fs::read(m.path("d/replaced")).unwrap(), bytes(5, 70_000));
    m.finish();
    w.expect_no_trace();
}

/// A rename that has marked its new directory, and has not arrived: a walker that begins now, and sees that
/// directory first and the old one last, finds nothing in either.
#[test]
fn what_moves_while_the_walker_begins_is_pulled_all_the_same() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::create_dir(w.src.join("old")).unwrap();
    fs::write(w.src.join("old/f"), bytes(1, 100_000)).unwrap();
    let hold = Hold::at(&w, "rename-origin");
    let m = w.mount_with(&["--no-background", "--jobs", "1"], &hold.env());
    m.path("old/f").metadata().unwrap();
    // The walker takes what is listed last first.
    let new = (0..)
        .map(|n| format!("new {n}"))
        .find(|name| {
            fs::create_dir(m.path(name)).unwrap();
            let last = fs::read_dir(&w.dst).unwrap().last().unwrap().unwrap();
            last.file_name().to_str() == Some(name)
        })
        .unwrap();
    thread::scope(|scope| {
        let (from, to) = (m.path("old/f"), m.path(&new).join("f"));
        let moving = scope.spawn(move || fs::rename(from, to).unwrap());
        hold.wait_met();
        assert!(is_marked(&w.dst.join(&new)), "its directory");
        run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        // Time for a walker that does not wait; one that waits needs none.
        thread::sleep(Duration::from_millis(500));
        hold.let_go();
        moving.join().unwrap();
    });
    m.finish();
    assert_eq!(
        fs::read(w.dst.join(&new).join("f")).unwrap(),
        bytes(1, 100_000)
    );
    w.expect_no_trace();
}

/// A walker that was the first in a large directory, and is slower than the one that took the rest of it.
#[test]
fn a_directory_is_done_when_each_of_its_parts_was_looked_at() {
    const FILES: u64 = 3000;
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fs::create_dir(w.src.join("d")).unwrap();
    for n in 0..FILES {
        fs::write(w.src.join(format!("d/{n}")), bytes(n, 100)).unwrap();
    }
    let hold = Hold::at(&w, "walk-rest");
    let m = w.mount_with(&["--no-background"], &hold.env());
    assert_eq!(
        fs::read_dir(m.path("d")).unwrap().count() as u64,
        FILES,
        "entries"
    );
    let raw = w.dst.join("d");
    wait_until("it is populated", LIMIT, || !is_unpopulated(&raw));
    let pending = || -> usize {
        let entries = fs::read_dir(&raw).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| is_marked(p)).count()
    };
    assert_eq!(pending() as u64, FILES, "a file came by itself");
    run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
    hold.wait_met();
    // The other parts come; the part of the one that is held back cannot.
    let (mut last, mut same) = (usize::MAX, 0);
    wait_until("the rest has come", LIMIT, || {
        let now = pending();
        same = if now == last { same + 1 } else { 0 };
        last = now;
        now < FILES as usize && same > 30
    });
    assert!(last > 0, "nobody was held back");
    assert!(
        is_marked(&raw),
        "{last} files are pending below a directory that is done"
    );
    assert_ne!(m.status()["state"], "COMPLETE", "{last} files are pending");
    hold.let_go();
    m.finish();
    for n in 0..FILES {
        assert_eq!(fs::read(raw.join(n.to_string())).unwrap(), bytes(n, 100));
    }
    w.expect_no_trace();
}

/// What was deleted is ESTALE, also at the moment when its inode's number is given to a new file.
#[test]
fn a_handle_of_a_file_that_was_deleted_is_stale_while_others_are_made() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let root = File::open(&w.dst).unwrap();
        fs::write(w.dst.join("old"), b"").unwrap();
        let handle = Handle::of(root.as_fd(), c"old").unwrap();
        handle.open(root.as_fd(), OFlags::RDONLY).unwrap();
        fs::remove_file(w.dst.join("old")).unwrap();
        let over = AtomicBool::new(false);
        let end = Instant::now() + Duration::from_secs(3);
        let answers: HashSet<Errno> = thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    fs::write(w.dst.join("new"), b"").unwrap();
                    fs::remove_file(w.dst.join("new")).unwrap();
                }
            });
            let tries = (0..).take_while(|_| Instant::now() < end);
            let answers = tries.map(|_| handle.open(root.as_fd(), OFlags::RDONLY).unwrap_err());
            let answers = answers.collect();
            over.store(true, SeqCst);
            answers
        });
        assert_eq!(answers, HashSet::from([Errno::STALE]), "{kind}");
    }
}
