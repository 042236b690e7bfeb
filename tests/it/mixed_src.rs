//! Large pending files and a src that is another by the time that the rest of them is pulled: no file
//! ends with bytes of two versions, and who needs the whole of one does not wait for the background.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::fs::XattrFlags;

use crate::badsource::{self, NOT_YET, apart};
use crate::fixture::{LIMIT, Mounted, World, bytes, can_mount_on, mirrorfs, run, wait_until};
use crate::nasty::At;
use crate::raw;

const LARGE: &[&str] = &["-o", "large=64K"];
const SIZE: usize = 3 << 20;
/// cap_net_raw=ep.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A mount that pulls nothing but what is asked for.
fn lazy(w: &World) -> Mounted {
    let m = w.mount_with(&["-o", "large=64K", "--no-background"], &[]);
    run(mirrorfs().arg("pause").arg(&m.at)).expect_code(0);
    m
}

fn read(m: &Mounted, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut part = vec![0; len];
    File::open(m.path("f"))?.read_exact_at(&mut part, offset)?;
    Ok(part)
}

fn write(m: &Mounted, all: &mut [u8], offset: usize, len: usize) {
    let data = bytes(offset as u64 + 1, len);
    let f = OpenOptions::new().write(true).open(m.path("f")).unwrap();
    f.write_all_at(&data, offset as u64).unwrap();
    all[offset..][..len].copy_from_slice(&data);
}

/// src's file is another: the same size, a hole where data was, data where a hole was.
fn second_version(w: &World) -> Vec<u8> {
    let mut all = vec![0; SIZE];
    let data = bytes(77, SIZE / 2);
    all[SIZE / 2..].copy_from_slice(&data);
    fs::remove_file(w.src.join("f")).unwrap();
    At::open(&w.src).sparse("f", SIZE as u64, &[(SIZE as u64 / 2, &data)]);
    all
}

fn first_version(w: &World) -> Vec<u8> {
    let all = bytes(5, SIZE);
    At::open(&w.src).file("f", &all);
    all
}

#[track_caller]
fn expect_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: size");
    let at = (0..want.len()).find(|i| got[*i] != want[*i]);
    assert_eq!(at, None, "{what}: the first byte that is another's");
}

#[test]
fn a_mixed_file_has_bytes_of_one_version_of_src_and_the_users() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let first = first_version(&w);
        let m = lazy(&w);
        let mut all = first.clone();
        write(&m, &mut all, 8192, 100);
        assert!(read(&m, 512 << 10, 4096).unwrap() == first[512 << 10..][..4096]);
        all = second_version(&w);
        let user = bytes(8193, 100);
        // What is asked for now is of another file than what is here: all of it is pulled anew.
        // Who asks hears of it, unless his kernel asks once more.
        if let Err(e) = read(&m, 2 << 20, 4096) {
            assert_eq!(e.raw_os_error(), Some(libc::EIO), "{kind}");
        }
        assert_eq!(m.status()["errors"], 1, "{kind}");
        for at in [2 << 20, 512 << 10] {
            // The kernel is told to forget what it has of the file.
            wait_until("only the new bytes are read", LIMIT, || {
                read(&m, at as u64, 4096).unwrap() == all[at..][..4096]
            });
        }
        run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        run(mirrorfs().arg("pull").arg(m.path("f"))).expect_code(0);
        assert_eq!(m.status()["files_pulled"], 1, "{kind}");
        assert_eq!(m.status()["errors"], 0, "{kind}");
        // The user's block has the rest of the file that he wrote into.
        all[8192..12_288].copy_from_slice(&first[8192..12_288]);
        all[8192..8292].copy_from_slice(&user);
        expect_same(&fs::read(m.path("f")).unwrap(), &all, kind);
        m.unmount();
        let m = w.mount_with(LARGE, &[]);
        m.wait_complete();
        m.finish();
        expect_same(&fs::read(w.dst.join("f")).unwrap(), &all, kind);
    }
}

#[test]
fn what_an_earlier_try_has_left_of_another_version_does_not_stay() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let first = first_version(&w);
        let m = lazy(&w);
        assert!(read(&m, 0, 256 << 10).unwrap() == first[..256 << 10]);
        wait_until("it is in dst", LIMIT, || {
            let mut there = vec![0; 4096];
            let file = File::open(w.dst.join("f")).unwrap();
            file.read_exact_at(&mut there, 0).unwrap();
            there == first[..4096]
        });
        raw::kill(m.pid, libc::SIGKILL);
        m.kill();
        let all = second_version(&w);
        let m = w.mount_with(LARGE, &[]);
        m.wait_complete();
        m.finish();
        expect_same(&fs::read(w.dst.join("f")).unwrap(), &all, kind);
    }
}

#[test]
fn who_needs_the_whole_of_a_mixed_file_does_not_wait_for_the_background() {
    for kind in ["ext4", "xfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let w = World::on(kind);
        let mut all = bytes(5, 12 << 20);
        At::open(&w.src).file("f", &all);
        let m = lazy(&w);
        write(&m, &mut all, 4096, 4096);
        // The background's jobs are in the queue by now, and held.
        thread::sleep(NOT_YET);
        let path = m.path("f");
        // A capability is src's until the whole file is here.
        let set = apart(move || {
            let flags = XattrFlags::empty();
            rustix::fs::setxattr(path, "security.capability", CAPABILITY, flags)?;
            std::io::Result::Ok(())
        });
        set.recv_timeout(LIMIT).unwrap().unwrap();
        assert_eq!(m.status()["files_pulled"], 1, "{kind}");
        run(mirrorfs().arg("resume").arg(&m.at)).expect_code(0);
        m.wait_complete();
        m.finish();
        expect_same(&fs::read(w.dst.join("f")).unwrap(), &all, kind);
    }
}

#[test]
fn what_users_wrote_is_read_after_a_restart_while_src_is_away() {
    let mut all = bytes(9, SIZE);
    let Some((mut bad, w)) = badsource::world(|bad| bad.write("f", &bytes(9, SIZE))) else {
        return;
    };
    bad.start(&[]);
    let m = lazy(&w);
    write(&m, &mut all, 1 << 20, 65_536);
    raw::kill(m.pid, libc::SIGKILL);
    m.kill();
    let m = lazy(&w);
    assert_eq!(fs::read_dir(m.path(".")).unwrap().count(), 1);
    bad.die();
    let path = m.path("f");
    let part = apart(move || {
        let mut part = vec![0; 65_536];
        File::open(path)?.read_exact_at(&mut part, 1 << 20)?;
        std::io::Result::Ok(part)
    });
    let part = part.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    expect_same(&part, &all[1 << 20..][..65_536], "away");
    bad.come_back();
    m.unmount();
}
