//! What a round does when the kernel fails it.

use super::*;
use crate::config::MountConfig;
use crate::mirror::{Carrier, Trees};
use crate::progress::Progress;
use crate::sys::caps;

/// A mirror whose commit thread has ended: the test does its rounds.
fn quiet(src: &std::path::Path, dst: &std::path::Path) -> Arc<Mirror> {
    let config = MountConfig::new(src, dst);
    let trees = Trees::open(src, dst).expect("trees");
    let mirror = Mirror::open(&config, trees, Arc::new(Progress::default())).expect("mirror");
    mirror.commit.stop();
    let thread = mirror.threads.lock().remove(0);
    thread.join().expect("it ends");
    mirror
}

fn mark_of(mirror: &Mirror, at: &std::path::Path) -> Option<Mark> {
    let opened = rustix::fs::open(at, OFlags::RDONLY, rustix::fs::Mode::empty()).expect("open");
    mirror.mark.get(Target::Fd(opened.as_fd())).expect("mark")
}

#[test]
fn what_was_carried_before_a_syncfs_that_failed_is_pending_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
    std::fs::create_dir_all(src.join("below")).expect("mkdir");
    std::fs::create_dir(&dst).expect("mkdir");
    std::fs::write(src.join("small"), b"a small file").expect("write");
    std::fs::write(src.join("empty"), b"").expect("write");
    let mirror = quiet(&src, &dst);
    if !caps::have_read_search() {
        return; // Without handles nothing is carried.
    }
    let (tell, told) = crossbeam_channel::unbounded();
    let published = || -> Waiter {
        let tell = tell.clone();
        Box::new(move |result: Result<()>| tell.send(result.is_ok()).expect("heard"))
    };
    let root = mirror.root_dir().expect("root").expect("pending");
    let carrier = Carrier::new(&published);
    mirror
        .populate_now(&root, &carrier, || false)
        .expect("populated");
    let (small, empty) = (dst.join("small"), dst.join("empty"));
    assert_eq!(std::fs::read(&small).expect("read"), b"a small file");
    assert_eq!(
        mark_of(&mirror, &small),
        None,
        "nothing in a P directory counts"
    );
    assert_eq!(mark_of(&mirror, &dst), Some(Mark::pending()));

    let take = || std::mem::take(&mut mirror.commit.queue.lock().publishes);
    let publishes = take();
    assert_eq!(publishes.len(), 1);
    let round = Round {
        number: 1,
        files: Vec::new(),
        publishes,
        dirs: Vec::new(),
    };
    mirror.commit_failed(round, &Error::Stopped, false);
    assert_eq!(mark_of(&mirror, &dst), Some(Mark::pending()));
    // The next syncfs works; it says nothing of what the one before lost.
    take().into_iter().for_each(|p| mirror.publish_now(p, 2));
    assert!(mark_of(&mirror, &small).is_some_and(|m| !m.populated));
    assert_eq!(mark_of(&mirror, &empty), None, "there is no data to lose");
    assert_eq!(
        mark_of(&mirror, &dst),
        Some(Mark::pending()),
        "behind a barrier"
    );
    assert!(told.is_empty());
    take().into_iter().for_each(|p| mirror.publish_now(p, 3));
    assert_eq!(mark_of(&mirror, &dst), Some(Mark::populated()));
    assert_eq!(told.try_recv(), Ok(false), "the walker comes again");
    mirror.engine.stop();
}

#[test]
fn what_is_in_a_directory_must_be_older_than_a_syncfs_that_worked() {
    let dir = tempfile::tempdir().expect("tempdir");
    let dst = Arc::new(crate::sys::host::open_dir(dir.path()).expect("opens"));
    let commit = Commit::default();
    let covers = |since: u64, synced: u64, gate: Option<u64>| {
        let mut queue = commit.queue.lock();
        queue.synced = synced;
        queue.gates = gate.map(|gate| (7, gate)).into_iter().collect();
        drop(queue);
        commit.covers(&DoneDir {
            ino: 7,
            anchor: Anchor::root(&dst, true).expect("an anchor"),
            epoch: 0,
            since,
            then: Box::new(|_| {}),
        })
    };
    assert!(!covers(0, 0, None), "nothing was synced");
    assert!(!covers(3, 3, None), "it may have come after that syncfs");
    assert!(covers(3, 4, None));
    assert!(!covers(3, 4, Some(5)), "its own L is not durable");
    assert!(covers(3, 5, Some(5)));
    assert!(covers(3, 4, Some(NOT_YET)), "it is told to come again");
}

#[test]
fn a_round_gathers_for_a_second_unless_somebody_waits_for_it() {
    let begun = Instant::now();
    let mut queue = Queue::default();
    queue.gates.insert(7, 3);
    assert_eq!(Queue::default().due(begun, true), None, "there is nothing");
    // The tail: what the last round did is to be durable.
    assert_eq!(queue.due(begun, true), Some(begun + GATHER));
    queue.hungry = true;
    assert_eq!(queue.due(begun, true), Some(begun + GATHER_HUNGRY));
    assert_eq!(
        queue.due(begun, false),
        Some(begun + GATHER),
        "nobody waits"
    );
    // What has landed meanwhile.
    queue.carried = 1;
    let first = begun + GATHER / 4;
    queue.first = Some(first);
    assert_eq!(queue.due(begun, true), Some(first + GATHER_HUNGRY));
    queue.sync_time = GATHER / 2;
    assert_eq!(queue.due(begun, true), Some(first + GATHER / 2));
    assert_eq!(queue.due(begun, false), Some(first + GATHER));
    queue.hungry = false;
    assert_eq!(queue.due(begun, true), Some(first + GATHER));
    // Somebody waits: whatever else there is.
    queue.urgent = true;
    assert_eq!(queue.due(begun, false), Some(first));
}

#[test]
fn who_waits_for_a_publication_does_not_wait_until_more_is_gathered() {
    let commit = Arc::new(Commit::default());
    commit.queue.lock().gates.insert(7, 2);
    let thread = {
        let commit = Arc::clone(&commit);
        std::thread::spawn(move || commit.next(|| false).map(|round| round.number))
    };
    // It sleeps now because of the gate, for a second; parking_lot says when.
    while !commit.wake.notify_one() {
        std::thread::yield_now();
    }
    let asked = Instant::now();
    commit.when_published(7, Box::new(|_| {}));
    assert_eq!(thread.join().expect("it ends"), Some(1));
    assert!(asked.elapsed() < GATHER / 2, "{:?}", asked.elapsed());
}
