//! What a hydration has looked at it does not open again.

use std::path::Path;

use super::*;
use crate::config::MountConfig;
use crate::mirror::hydrate::{FileRef, Stage};
use crate::mirror::{Origin, Trees};
use crate::progress::Progress;
use crate::sys::caps;

/// A placeholder, and its hydration, which nobody has begun. `None` where there are no mixed files.
fn pending(dir: &Path) -> Option<(Arc<Mirror>, Arc<Hydration>)> {
    let (src, dst) = (dir.join("src"), dir.join("dst"));
    std::fs::create_dir(&src).expect("mkdir");
    std::fs::create_dir(&dst).expect("mkdir");
    std::fs::write(src.join("f"), b"a small file").expect("write");
    let config = MountConfig::new(&src, &dst);
    let trees = Trees::open(&src, &dst).expect("trees");
    let mirror = Mirror::open(&config, trees, Arc::new(Progress::default())).expect("mirror");
    if !mirror.mixes || !caps::have_read_search() {
        return None;
    }
    let root = mirror.root_dir().expect("root").expect("pending");
    mirror.populate_names(&root).expect("populated");
    let name = Name::new(b"f").expect("a name");
    let (at, origin) = (mirror.dst.as_fd(), root.origin.as_ref().expect("origin"));
    let file = FileRef {
        ino: stat::stat_at(at, name.as_cstr()).expect("statx").key.ino,
        anchor: root.anchor.child(at, &name).expect("an anchor"),
        origin: Some(Origin::of(&origin.join(&name))),
    };
    let (hydration, _) = mirror.hydrations.join(&file);
    Some((mirror, hydration))
}

#[test]
fn what_was_opened_to_look_for_a_mixed_file_is_what_the_copy_writes_to() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some((mirror, hydration)) = pending(dir.path()) else {
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
    let Some((mirror, hydration)) = pending(dir.path()) else {
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
    let Some((mirror, hydration)) = pending(dir.path()) else {
        return;
    };
    let at = mirror.dst.as_fd();
    let name = Name::new(b"f").expect("a name");
    mirror.mark.remove(Target::At(at, &name)).expect("removed");
    let opened = mirror.look_to_pull(&hydration).expect("looked");
    assert!(opened.is_none());
    let prepared = mirror.prepare_with(&hydration, opened);
    assert!(prepared.expect("prepared").is_none());
    mirror.engine.stop();
}
