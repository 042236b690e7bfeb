//! What the background leaves in the page cache (`-o cache=`).

use std::fs::{self, File};
use std::os::fd::AsFd;

use mirrorfs::sys::cache;

use crate::fixture::{World, bytes, can_mount_on};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;

/// MiB of src's and of dst's file that are cached once the background has copied it; before, `warm`
/// says whether src is.
fn cached_after(kind: &str, option: &str, warm: bool) -> [u64; 2] {
    let w = World::on_two(kind, kind);
    let all = 0..SIZE;
    fs::write(w.src.join("big"), bytes(5, SIZE as usize)).unwrap();
    let src = File::open(w.src.join("big")).unwrap();
    src.sync_all().unwrap();
    if !warm {
        cache::forget(src.as_fd(), &all);
    }
    let mounted = w.mount_with(&["-o", option], &[]);
    mounted.wait_complete();
    let dst = File::open(w.dst.join("big")).unwrap();
    let cached = [&src, &dst].map(|file| cache::cached(file.as_fd(), &all).unwrap() / MIB);
    assert!(fs::read(mounted.path("big")).unwrap() == bytes(5, SIZE as usize));
    mounted.finish();
    w.expect_finished_copy();
    cached
}

#[test]
fn what_the_background_copies_passes_through_the_page_cache_when_told() {
    // btrfs knows no RWF_DONTCACHE: there it is done by hand.
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let kept = cached_after(kind, "cache=keep", false);
        assert!(kept.iter().all(|mib| *mib > 40), "{kind}: {kept:?}");
        let [src, dst] = cached_after(kind, "cache=drop", false);
        assert!(src < 8 && dst < 8, "{kind}: src {src}, dst {dst} MiB");
    }
}

#[test]
fn what_others_have_in_the_page_cache_stays_there() {
    for kind in ["ext4", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let [src, dst] = cached_after(kind, "cache=drop", true);
        assert!(src > 40 && dst < 8, "{kind}: src {src}, dst {dst} MiB");
    }
}
