//! What becomes of a name of a directory that is P.

use super::*;
use std::time::Duration;

fn partial() -> Partial {
    let root = tempfile::tempdir().expect("a directory");
    let dst = Arc::new(crate::sys::host::open_dir(root.path()).expect("opens"));
    let anchor = Anchor::root(&dst, true).expect("an anchor");
    Partial::new(7, anchor, Arc::new(RelPath::root()), true, None)
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).expect("a name")
}

#[test]
fn a_name_is_placed_by_one_and_a_failed_one_by_the_next() {
    let (partial, a) = (partial(), name("a"));
    let claimed = partial.claim(&a).expect("ours");
    assert!(!partial.has(&a));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| partial.claim(&a).map(Claimed::here));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!other.is_finished());
        drop(claimed);
        assert!(other.join().expect("no panic").is_some());
    });
    assert!(partial.has(&a) && !partial.is_clean());
    assert!(partial.claim(&a).is_none());
}

#[test]
fn what_src_does_not_have_is_asked_again_and_leaves_the_directory_clean() {
    let (partial, a) = (partial(), name("a"));
    partial.claim(&a).expect("ours").not_in_src();
    assert!(!partial.has(&a) && partial.is_clean());
    assert!(partial.claim(&a).is_some());
}

#[test]
fn a_closed_directory_waits_for_who_is_at_work_and_takes_no_more() {
    let (partial, a, b) = (partial(), name("a"), name("b"));
    let claimed = partial.claim(&a).expect("ours");
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| partial.close());
        while !partial.has(&b) {
            std::thread::yield_now();
        }
        assert!(partial.claim(&b).is_none());
        assert!(!closing.is_finished());
        claimed.here();
        closing.join().expect("no panic");
    });
    partial.reopen();
    assert!(partial.claim(&b).is_some());
}
