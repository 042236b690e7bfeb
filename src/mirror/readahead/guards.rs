//! When nothing is asked for in front of a reader, though he reads in order and src is slow.

use super::*;
use crate::mirror::prepare::tests::pending;
use crate::throttle::Background;

const MIB: u64 = 1 << 20;
/// As the kernel's readahead asks.
const READ: u64 = 128 << 10;
/// He begins where the whole copy, as it begins, is not just in front of him.
const START: u64 = SOON + MIB;

/// Whether a reader in order has something asked for in front of him, in the mirror that `set` has made.
/// `None`: this cannot be tried here.
fn asks(set: impl Fn(&Arc<Mirror>, &Arc<Hydration>)) -> Option<bool> {
    let dir = tempfile::tempdir().expect("tempdir");
    let (mirror, node) = pending(dir.path(), &vec![7; (START + 4 * MIB) as usize])?;
    let info = mirror.source.recall(node.ino).expect("placed");
    let (hydration, _) = mirror.hydrations.join(&FileRef::of(&node));
    {
        let readahead = &mut hydration.state.lock().readahead;
        (0..3).for_each(|_| readahead.note(Duration::from_millis(1)));
    }
    set(&mirror, &hydration);
    for at in (START..START + 4 * FIRST).step_by(READ as usize) {
        mirror.read_ahead(&node, info, &(at..at + READ));
    }
    // Jobs may be over by now; their numbers are not given out again.
    let jobs = hydration.state.lock().next_range;
    mirror.engine.stop();
    Some(jobs > 0)
}

/// The whole-file job has come so far, bytes.
fn copying(hydration: &Hydration, at: u64) {
    let mut state = hydration.state.lock();
    state.stage = Stage::Copying;
    state.readahead.whole_at = at;
}

#[test]
fn who_reads_in_order_has_what_comes_next_asked_for() {
    assert_ne!(asks(|_, _| ()), Some(false));
}

#[test]
fn nothing_is_asked_for_ahead_of_anybody_while_src_is_away() {
    let away = asks(|mirror, _| {
        // It would find that src answers.
        mirror.stop_watching_src();
        let progress = &mirror.progress;
        progress.src_is_away.store(true, Ordering::Relaxed);
    });
    assert_ne!(away, Some(true));
}

#[test]
fn nothing_is_asked_for_ahead_of_anybody_while_dst_is_full() {
    let full = asks(|mirror, _| mirror.progress.dst_full.store(true, Ordering::Relaxed));
    assert_ne!(full, Some(true));
}

#[test]
fn nothing_is_asked_for_ahead_of_anybody_in_a_file_with_bad_blocks() {
    let bad = asks(|mirror, hydration| mirror.spoil(hydration.file.ino));
    assert_ne!(bad, Some(true));
}

#[test]
fn nothing_is_asked_for_ahead_of_who_is_just_behind_the_whole_copy() {
    let followed = asks(|_, hydration| copying(hydration, START));
    assert_ne!(followed, Some(true), "it brings that in a moment");
    let far = asks(|_, hydration| copying(hydration, 0));
    assert_ne!(far, Some(false), "it is far behind him");
    // Held back it brings nothing, unless somebody waits for the whole file.
    let pause = |mirror: &Arc<Mirror>| mirror.throttle().set_background(Background::Paused);
    let held = asks(|mirror, hydration| {
        pause(mirror);
        copying(hydration, START);
    });
    assert_ne!(held, Some(false), "it is held back");
    let waited_for = asks(|mirror, hydration| {
        pause(mirror);
        copying(hydration, START);
        let reader: crate::mirror::Waiter = Box::new(|_| ());
        hydration.state.lock().readers.push(reader);
    });
    assert_ne!(waited_for, Some(true), "nothing holds it back");
}
