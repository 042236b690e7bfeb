//! What a hydration has looked at it does not open again.

use std::path::Path;

use super::*;
use crate::config::MountConfig;
use crate::mirror::Trees;
use crate::mirror::hydrate::{FileRef, Stage};
use crate::mirror::node::{Node, ROOT};
use crate::progress::Progress;
use crate::sys::caps;

/// A mirror of a src that has one file, `f`, and its node: it is pending, and nobody has asked for it.
/// `None` where there are no mixed files.
pub(in crate::mirror) fn pending(dir: &Path, bytes: &[u8]) -> Option<(Arc<Mirror>, Arc<Node>)> {
    let (src, dst) = (dir.join("src"), dir.join("dst"));
    std::fs::create_dir(&src).expect("mkdir");
    std::fs::create_dir(&dst).expect("mkdir");
    std::fs::write(src.join("f"), bytes).expect("write");
    let config = MountConfig::new(&src, &dst);
    let trees = Trees::open(&src, &dst).expect("trees");
    let mirror = Mirror::open(&config, trees, Arc::new(Progress::default())).expect("mirror");
    if !mirror.mixes || !caps::have_read_search() {
        return None;
    }
    let root = mirror.root_dir().expect("root").expect("pending");
    mirror.populate_names(&root).expect("populated");
    let found = mirror.child(ROOT, &f()).expect("found");
    Some((mirror, found.node))
}

fn f() -> Name {
    Name::new(b"f").expect("a name")
}

/// A small one, and its hydration.
fn small(dir: &Path) -> Option<(Arc<Mirror>, Arc<Hydration>)> {
    let (mirror, node) = pending(dir, b"a small file")?;
    let (hydration, _) = mirror.hydrations.join(&FileRef::of(&node));
    Some((mirror, hydration))
}

#[test]
fn what_was_opened_to_look_for_a_mixed_file_is_what_the_copy_writes_to() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some((mirror, hydration)) = small(dir.path()) else {
        return;
    };
    let opened = mirror.look_to_pull(&hydration).expect("looked");
    let opened = opened.expect("it is pending");
    assert!(hydration.state.lock().looked);
    let prepared = mirror.prepare_with(&hydration, Some(Arc::clone(&opened)));
    let (dst, ..) = prepared.expect("prepared").expect("it is pending");
    assert!(Arc::ptr_eq(&dst, &opened), "it was opened twice");
    // Whoever comes now has the same.
    let again = mirror.prepare(&hydration).expect("prepared");
    assert!(Arc::ptr_eq(&again.expect("it is pending").0, &opened));
    mirror.engine.stop();
}

#[test]
fn a_mixed_file_of_an_earlier_daemon_is_not_copied_whole() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some((mirror, hydration)) = small(dir.path()) else {
        return;
    };
    let info = mirror.source.recall(hydration.file.ino).expect("placed");
    let left = mirror.mix(&hydration, info).expect("mixed");
    drop(left.expect("it carries a mark"));
    assert_eq!(hydration.state.lock().stage, Stage::Queued, "nobody knows");
    let opened = mirror.look_to_pull(&hydration).expect("looked");
    assert!(opened.is_none(), "its bytes are a user's");
    let state = hydration.state.lock();
    assert!(state.looked && state.stage == Stage::Mixed);
    drop(state);
    mirror.engine.stop();
}

#[test]
fn a_file_without_a_mark_is_not_copied() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some((mirror, hydration)) = small(dir.path()) else {
        return;
    };
    let (dst, name) = (mirror.dst.as_fd(), f());
    mirror.mark.remove(Target::At(dst, &name)).expect("removed");
    let opened = mirror.look_to_pull(&hydration).expect("looked");
    assert!(opened.is_none());
    let prepared = mirror.prepare_with(&hydration, opened);
    assert!(prepared.expect("prepared").is_none());
    mirror.engine.stop();
}
