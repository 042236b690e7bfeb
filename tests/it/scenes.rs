//! The situations in which the program has something to say (see `messages`): those that other tests make
//! anyway, and here the others. What a scene asserts is the exit code; the words are the document's.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use crate::badsource::{BadSrc, apart};
use crate::fixture::{
    LIMIT, LoopFs, Mounted, Output, World, bytes, fuse_mount_at, mirrorfs, run, status, wait_until,
};
use crate::messages;
use crate::raw;
use crate::upgrade::{program, script, try_upgrade};

/// Every scene, by its name.
macro_rules! scenes {
    ($($at:ident::$name:ident),* $(,)?) => {
        pub(crate) const SCENES: &[(&str, fn())] =
            &[$((concat!(stringify!($at), "::", stringify!($name)), crate::$at::$name)),*];
    };
}

// The long ones first.
scenes! {
    upgrade::a_program_that_cannot_take_over_changes_nothing,
    scenes::an_upgrade_while_dst_is_frozen,
    scenes::a_quota_and_a_full_and_a_read_only_target,
    rootless::what_a_user_may_not_read_is_in_the_ledger_and_the_rest_goes_on,
    rootless::what_a_user_may_not_make_is_in_the_ledger_and_owners_are_not,
    rootless::a_user_is_told_that_a_migration_is_somebody_elses,
    rootless::what_keeps_a_user_from_mounting_is_said_in_one_line,
    rootless::root_without_the_capability_to_mount_asks_the_helper_and_passes_on_what_it_says,
    rootless::other_users_are_let_in_only_where_root_allows_it,
    rootless::a_migration_goes_on_as_root_or_as_the_user_who_began_it,
    cli::what_cannot_be_meant_is_a_usage_error,
    cli::what_only_rsync_has_is_refused_with_a_hint,
    cli::mount_refuses_bad_places_and_changes_nothing,
    cli::mount_says_when_the_helper_or_dev_fuse_is_missing,
    cli::a_path_that_is_no_migration_is_refused,
    cli::a_daemon_is_usable_when_mount_returns_and_is_found_by_each_of_its_paths,
    cli::mount_refuses_a_dst_that_is_somebody_elses_and_a_src_with_marks,
    cli::a_dst_that_is_too_small_for_all_of_src_is_told_at_once,
    cli::a_src_that_is_not_mounted_any_more_is_told_from_another_one,
    shards::auto_reads_what_the_starter_says_and_says_what_it_went_by,
    adopt::what_delete_could_not_be_told_from_later_is_refused,
    adopt::what_users_did_after_finish_is_not_taken_back_by_the_command_of_before,
    adopt::without_delete_what_only_dst_has_is_kept_counted_and_listed,
    semantics::a_sync_that_is_not_durable_is_not_adopted,
    semantics::finish_refuses_while_something_is_pending,
    prefetch::a_trace_that_cannot_be_used_is_one_line_and_nothing_is_mounted,
    full::an_xattr_that_found_no_room_is_not_left_out_and_one_that_never_fits_is_in_the_ledger,
    full::sync_into_a_read_only_target_stops_with_one_line,
    killed::what_a_killed_sync_has_left_passes_for_no_file,
    badsource::finish_waives_what_was_given_up_by_path_and_nothing_else,
    unseen::what_is_given_up_of_them_is_missing_and_nothing_else,
    badsource::the_background_leaves_what_hangs_and_comes_back_for_it,
    badsource::a_source_that_hangs_keeps_no_daemon_from_ending,
    badsource::with_on_error_fail_an_access_ends_and_the_next_one_works_when_src_is_back,
    proof::a_manifest_that_cannot_be_used_is_refused_in_one_line,
    proof::what_is_pending_is_in_no_manifest_and_is_not_called_corrupt,
    proof::what_cannot_be_read_or_changes_is_not_in_a_manifest,
    proof::a_full_disk_under_the_manifest_is_an_error_of_the_run,
    proof::what_changes_while_it_is_copied_has_no_digest,
    proof::what_failed_leaves_a_manifest_without_an_end,
    proof::a_copy_is_verified_without_src_and_what_was_done_to_it_is_told_apart,
    proof::a_run_that_was_killed_leaves_what_it_knew_and_the_next_one_ends_it,
    rootless::a_user_ends_his_manifest_and_root_does_not_do_it_for_him,
    upgrade::a_frozen_dst_is_no_time_for_an_upgrade_and_nobody_is_kept,
    proof_mount::a_manifest_that_is_gone_at_an_upgrade_is_told_and_the_mount_goes_on,
    proof_mount::without_src_the_manifest_has_no_end_and_the_tree_is_finished_all_the_same,
    proof_mount::src_s_path_may_lead_elsewhere_after_a_migration,
    proof_mount::a_manifest_that_a_mount_cannot_write_is_refused,
    proof_xattrs::a_changed_xattr_or_acl_is_named_and_is_never_corrupt,
    proof_xattrs::a_manifest_of_the_older_form_says_that_xattrs_were_not_compared,
    proof_xattrs::who_is_not_root_compares_what_he_can_see_and_is_told_of_the_rest,
    mixed::what_src_cannot_read_can_be_written_over_and_the_rest_is_usable,
    salvage::what_can_be_read_stays_when_the_rest_is_given_up,
    salvage_kept::finish_says_what_it_waits_for_when_what_cannot_be_read_is_asked_for_and_hangs,
    control::wait_tells_complete_from_stopped_and_from_too_late,
    control::pull_brings_files_and_trees_before_anybody_opens_them,
    control::signals_toggle_the_limit_and_read_the_configuration_again,
    control::only_root_and_the_daemons_user_may_steer,
    service::metrics_say_what_status_says_and_to_this_machine_only,
    changing::a_file_that_never_stops_changing_is_in_the_ledger_until_it_does,
    automount::what_is_to_be_copied_is_no_automount_point,
    scenes::places_that_mount_refuses,
    scenes::files_that_mount_refuses,
    scenes::a_dst_that_is_not_as_it_was,
    scenes::a_start_that_dies,
    scenes::users_of_a_mount_whose_daemon_dies,
    scenes::users_of_a_mount_that_cannot_give_what_they_want,
    scenes::a_trace_that_nobody_takes,
    scenes::a_target_without_room_for_the_ledger_and_for_maps,
    scenes::a_target_without_inodes_for_maps,
    scenes::a_target_whose_disk_fails,
    scenes::a_map_that_was_removed,
    scenes::a_machine_that_lacks_something,
    scenes::a_src_that_others_write_and_one_that_is_half_migrated,
    scenes::a_ledger_that_is_not_empty,
    scenes::a_sync_that_does_not_end_well,
    scenes::manifests_that_are_not_whole,
    scenes::steering_that_is_refused,
    scenes::upgrades_that_are_refused,
    scenes::keepers_that_cannot_go_on,
    keeper::what_a_keeper_cannot_do_is_refused,
    keeper::an_upgrade_of_a_mount_that_is_kept_is_refused,
    keeper::a_daemon_serves_on_when_its_keeper_is_killed,
    keeper::a_daemon_that_is_killed_again_and_again_is_given_up,
}

#[track_caller]
fn ours<S: AsRef<OsStr>>(words: &[&str], paths: &[S]) -> Output {
    run(mirrorfs().args(words).args(paths))
}

#[track_caller]
fn sh(script: &str, args: &[&Path]) -> Output {
    run(Command::new("sh").args(["-c", script, "sh"]).args(args))
}

fn world() -> World {
    let w = World::on("ext4");
    fs::write(w.src.join("a"), "content").unwrap();
    w
}

fn tmpfs(kind: &str, at: &Path) {
    mount("none", at, kind, MountFlags::empty(), None).unwrap();
}

fn take_off(at: &Path) {
    unmount(at, UnmountFlags::DETACH).unwrap();
}

/// A source with rules, and a target on a file system of so many MiB.
fn bad(rules: &[&str], size: Option<u64>, fill: impl FnOnce(&BadSrc)) -> (BadSrc, World) {
    let fs = LoopFs::new("ext4");
    let mut bad = BadSrc::new(&fs);
    fill(&bad);
    bad.start(rules);
    let src = bad.at.clone();
    let w = match size {
        None => World::from(src, fs.dir("dst"), vec![fs]),
        Some(size) => {
            let small = LoopFs::sized("ext4", size << 20);
            World::from(src, small.dir("dst"), vec![fs, small])
        }
    };
    (bad, w)
}

/// Nothing goes into this file system any more.
fn fill_up(fs: &Path) {
    sh(
        "dd if=/dev/zero of=\"$1\"/ballast bs=64k 2>/dev/null; sync -f \"$1\"; \
         dd if=/dev/zero of=\"$1\"/rest bs=4k oflag=append conv=notrunc 2>/dev/null; sync -f \"$1\"",
        &[fs],
    );
}

#[track_caller]
fn wait_for(m: &Mounted, text: &str) {
    wait_until(text, LIMIT, || m.log().contains(text));
}

pub(crate) fn places_that_mount_refuses() {
    let w = world();
    let other = w.src.parent().unwrap().join("other");
    fs::create_dir(&other).unwrap();
    tmpfs("tmpfs", &w.at);
    ours(&["mount"], &[&w.src, &w.dst, &w.at]).expect_code(3);
    take_off(&w.at);
    tmpfs("ramfs", &w.dst);
    ours(&["mount"], &[&w.src, &w.dst, &w.at]).expect_code(3);
    take_off(&w.dst);
    fs::create_dir(w.src.join(".mirrorfs")).unwrap();
    ours(&["mount"], &[&w.src, &w.dst, &w.at]).expect_code(3);
    fs::remove_dir(w.src.join(".mirrorfs")).unwrap();
    // A SRC that is the mount of a daemon that has died.
    let m = w.mount_lazy();
    ours(&["mount"], &[&w.src, &w.dst, &other]).expect_code(3);
    ours(&["mount"], &[&w.src, &w.at]).expect_code(3);
    m.kill();
    ours(&["mount"], &[&w.at, &other]).expect_code(3);
    take_off(&w.at);
}

pub(crate) fn files_that_mount_refuses() {
    let w = world();
    let file = w.scratch_path("file");
    let with = |option: &str, path: &Path| {
        let mut command = mirrorfs();
        command.args(["mount", option]).arg(path);
        run(command.args([&w.src, &w.dst, &w.at])).expect_code(2);
    };
    with("--config", &w.scratch_path("none"));
    fs::write(&file, "[mount]\nbwlimit = \"1M\"\nspeed = 1\n").unwrap();
    with("--config", &file);
    let name = file.to_str().unwrap();
    w.mount_with(&["--no-background", "--record", name], &[])
        .unmount();
    let mut trace = fs::OpenOptions::new().append(true).open(&file).unwrap();
    trace.write_all(b"what is this\0").unwrap();
    with("--replay", &file);
}

/// A migration has begun, and what says so was changed.
pub(crate) fn a_dst_that_is_not_as_it_was() {
    let w = world();
    w.mount_lazy().unmount();
    ours(&["sync"], &[&w.src, &w.dst]).expect_code(3);
    let file = w.dst.join(".mirrorfs/migration");
    let text = fs::read_to_string(&file).unwrap();
    let later = text.replacen("\"version\":1", "\"version\":2", 1);
    assert_ne!(text, later);
    for text in [later.as_str(), "nonsense"] {
        fs::write(&file, text).unwrap();
        ours(&["mount"], &[&w.src, &w.dst, &w.at]).expect_code(3);
    }
    // And copies that are not whole: a sync that was killed, and a shard that waits for the other.
    w.empty_dst();
    for n in 0..60 {
        fs::write(w.src.join(format!("f{n}")), bytes(n, 60_000)).unwrap();
    }
    let mut killed = sync_slowly(&w, &[]);
    wait_until("it is at work", LIMIT, || {
        w.dst.join(".mirrorfs/sync").exists()
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    let refused = || {
        ours(&["verify"], &[&w.src, &w.dst]).expect_code(9);
        ours(&["mount", "--adopt"], &[&w.src, &w.dst, &w.at]).expect_code(3);
    };
    refused();
    w.empty_dst();
    ours(&["sync", "--shard", "1/2"], &[&w.src, &w.dst]).expect_code(0);
    refused();
}

/// A sync that takes half a minute.
fn sync_slowly(w: &World, words: &[&str]) -> Child {
    let mut command = mirrorfs();
    command
        .args(["sync", "--bwlimit", "100"])
        .args(words)
        .args([&w.src, &w.dst]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    raw::die_with_parent(&mut command).spawn().unwrap()
}

/// What it has said at its end.
fn said_by(child: Child) {
    let said = child.wait_with_output().unwrap();
    messages::heard(&String::from_utf8_lossy(&said.stderr), said.status.code());
}

pub(crate) fn a_start_that_dies() {
    let w = world();
    let mut command = mirrorfs();
    command.arg("mount").args([&w.src, &w.dst, &w.at]);
    // The last one before the mount can be used.
    raw::instead_of(
        &mut command,
        libc::SYS_move_mount,
        libc::SECCOMP_RET_KILL_PROCESS,
    );
    run(&mut command).expect_code(1);
}

/// Before, and while they wait for an answer.
pub(crate) fn users_of_a_mount_whose_daemon_dies() {
    let (bad, w) = bad(&["path=a op=read hang"], None, |bad| {
        bad.write("a", b"content")
    });
    let m = w.mount_lazy();
    sh("touch \"$1/.mirrorfs\"", &[&m.at]).expect_code(1);
    sh("ls \"$1/.mirrorfs\"", &[&m.at]).expect_code(2);
    let mut cat = Command::new("cat");
    let waits = cat.arg(m.path("a")).stderr(Stdio::piped()).spawn();
    wait_until("somebody waits", LIMIT, || m.status()["waiting"] == 1);
    m.kill();
    said_by(waits.unwrap());
    run(Command::new("cat").arg(w.at.join("a"))).expect_code(1);
    ours(&["status"], &[&w.at]).expect_code(3);
    bad.tell("release");
    take_off(&w.at);
}

/// A file that cannot be read, and a directory whose path in src has no room in its mark.
pub(crate) fn users_of_a_mount_that_cannot_give_what_they_want() {
    let (bad, w) = bad(&["path=a op=read err=EIO"], None, |bad| {
        bad.write("a", b"content")
    });
    let m = w.mount_lazy();
    sh("cat \"$1/a\"", &[&m.at]).expect_code(1);
    drop((m, w, bad));
    let w = world();
    let python = |script: &str, at: &Path| {
        let down = "import os, sys\nos.chdir(sys.argv[1])\n";
        run(Command::new("python3")
            .args(["-c", &format!("{down}{script}")])
            .arg(at))
    };
    let make = "for n in range(18):\n os.mkdir(250*'d'); os.chdir(250*'d')\nos.mkdir('old')\nopen('old/f', 'w')";
    python(make, &w.src).expect_code(0);
    let m = w.mount_lazy();
    let rename = "for n in range(18): os.chdir(250*'d')\ntry: os.rename('old', 'new')\n\
                  except OSError as e: sys.exit(f'rename: {e.strerror}')";
    python(rename, &m.at).expect_code(1);
}

pub(crate) fn a_quota_and_a_full_and_a_read_only_target() {
    let write = |dst: &Path, w: &World| {
        let m = w.mount();
        sh("dd if=/dev/zero of=\"$1/big\" bs=64k count=4000", &[&m.at]).expect_code(1);
        m.unmount();
        assert!(dst.exists());
    };
    let small = LoopFs::with("ext4", 64 << 20, &[], "loop,errors=remount-ro");
    let (a, b) = (LoopFs::new("ext4"), small);
    let at = b.path().to_path_buf();
    let w = World::from(a.dir("src"), b.dir("dst"), vec![a, b]);
    write(&at, &w);
    let m = w.mount();
    let fail = "echo 1 >/sys/fs/ext4/$(basename $(findmnt -no SOURCE \"$1\"))/trigger_fs_error";
    sh(fail, &[&at]).expect_code(0);
    sh("touch \"$1/new\"", &[&m.at]).expect_code(1);
    drop(m);
    let (a, b) = (LoopFs::new("ext4"), LoopFs::sized("btrfs", 400 << 20));
    let (at, dst) = (b.path().to_path_buf(), b.path().join("dst"));
    let quota = "btrfs quota enable \"$1\" && btrfs subvolume create \"$2\" && btrfs qgroup limit 4M \"$2\"";
    sh(quota, &[&at, &dst]).expect_code(0);
    let w = World::from(a.dir("src"), dst, vec![a, b]);
    write(&at, &w);
}

/// Who takes the record does not read it.
pub(crate) fn a_trace_that_nobody_takes() {
    let w = World::on("ext4");
    let name = |n: usize| format!("{n:0200}");
    for n in 0..5_500 {
        fs::write(w.src.join(name(n)), "x").unwrap();
    }
    let pipe = w.scratch_path("pipe");
    sh("mkfifo \"$1\"", &[&pipe]).expect_code(0);
    let reader = {
        let pipe = pipe.clone();
        thread::spawn(move || File::open(pipe).unwrap())
    };
    let m = w.mount_with(
        &["--no-background", "--record", pipe.to_str().unwrap()],
        &[],
    );
    let reader = reader.join().unwrap();
    for n in 0..5_500 {
        File::open(m.path(name(n))).unwrap();
    }
    drop(reader);
    m.unmount();
}

pub(crate) fn a_target_without_room_for_the_ledger_and_for_maps() {
    let (_bad, w) = bad(&["path=secret op=open err=EACCES"], Some(64), |bad| {
        bad.write("secret", b"secret");
        bad.write("large", &bytes(1, 9 << 20));
        for n in 0..40 {
            bad.write(&format!("f{n}"), &bytes(n, 300_000));
        }
    });
    let at = w.dst.parent().unwrap().to_path_buf();
    let m = w.mount_lazy();
    sh("ls -l \"$1\"", &[&m.at]).expect_code(0);
    fill_up(&at);
    ours(&["resume"], &[&m.at]).expect_code(0);
    wait_for(&m, "dst takes nothing more");
    sh("cat \"$1/secret\"", &[&m.at]).expect_code(1);
}

/// In the middle of a block, so that the rest of it is needed.
const CHANGE_A_BYTE: &str = "printf x | dd of=\"$1/large\" bs=1 seek=5000 conv=notrunc,fsync";

/// It has room for data all the while.
pub(crate) fn a_target_without_inodes_for_maps() {
    let fs = LoopFs::new("ext4");
    let mut bad = BadSrc::new(&fs);
    bad.write("large", &bytes(1, 9 << 20));
    bad.write("spoiled", &bytes(2, 600_000));
    bad.start(&["path=spoiled op=read off=40960-45056 err=EIO"]);
    let small = LoopFs::with("ext4", 64 << 20, &["-b", "4096", "-N", "200"], "loop");
    let (src, dst) = (bad.at.clone(), small.dir("dst"));
    let at = small.path().to_path_buf();
    let w = World::from(src, dst, vec![fs, small]);
    let m = w.mount_lazy();
    sh("ls -l \"$1\"", &[&m.at]).expect_code(0);
    let all = "n=0; while touch \"$1/x$n\" 2>/dev/null; do n=$((n + 1)); done; sync -f \"$1\"";
    sh(all, &[&at]).expect_code(0);
    sh(CHANGE_A_BYTE, &[&m.at]).expect_code(0);
    wait_for(&m, "pulled whole before it is changed");
    sh("cat \"$1/spoiled\"", &[&m.at]).expect_code(1);
    wait_for(&m, "what can be read of the file is not kept");
}

/// As after an error of the journal: nothing that was written is promised to be there.
pub(crate) fn a_target_whose_disk_fails() {
    let w = World::on_two("ext4", "xfs");
    for dir in 0..10 {
        fs::create_dir(w.src.join(format!("d{dir}"))).unwrap();
        for n in 0..200 {
            fs::write(w.src.join(format!("d{dir}/f{n}")), bytes(n, 20_000)).unwrap();
        }
    }
    let m = w.mount_with(&["--bwlimit", "4M"], &[]);
    wait_until("some files", LIMIT, || {
        m.status()["files_pulled"].as_u64() > Some(3)
    });
    let at = w.dst.parent().unwrap();
    run(Command::new("xfs_io")
        .args(["-x", "-c", "shutdown"])
        .arg(at))
    .expect_code(0);
    thread::sleep(Duration::from_secs(4));
}

pub(crate) fn a_map_that_was_removed() {
    // Its end does not come, so it stays what it is.
    let rules = ["path=large op=read off=11M-12M hang"];
    let (bad, w) = bad(&rules, None, |bad| bad.write("large", &bytes(1, 12 << 20)));
    let m = w.mount_lazy();
    sh(CHANGE_A_BYTE, &[&m.at]).expect_code(0);
    // It ends when the read that hangs does.
    raw::kill(m.pid, libc::SIGKILL);
    bad.tell("off");
    bad.tell("release");
    m.kill();
    let maps: Vec<_> = fs::read_dir(w.dst.join(".mirrorfs/maps"))
        .unwrap()
        .collect();
    assert_eq!(maps.len(), 1);
    for map in maps {
        fs::remove_file(map.unwrap().path()).unwrap();
    }
    let m = w.mount();
    sh("cat \"$1/large\"", &[&m.at]).expect_code(1);
    wait_until("it is in the ledger", LIMIT, || m.status()["errors"] == 1);
}

pub(crate) fn a_machine_that_lacks_something() {
    // A DST that is stacked as deep as the kernel lets it be.
    let fs_ = LoopFs::new("ext4");
    let (lower, over) = (fs_.dir("lower"), fs_.dir("over"));
    let stack = |lower: &Path, name: &str, at: &Path| {
        let (upper, work) = (
            fs_.dir(&format!("{name}.upper")),
            fs_.dir(&format!("{name}.work")),
        );
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        run(Command::new("mount")
            .args(["-t", "overlay", "-o", &options, "overlay"])
            .arg(at))
        .expect_code(0);
    };
    let one = fs_.dir("one");
    stack(&lower, "a", &one);
    let lower = fs_.dir("lower2");
    stack(&lower, "b", &over);
    let src = fs_.dir("src");
    fs::write(src.join("a"), "content").unwrap();
    let dst = over.join("dst");
    fs::create_dir(&dst).unwrap();
    let w = World::from(src, dst, vec![]);
    let m = w.mount();
    sh("cat \"$1/a\"; cat \"$1/a\"", &[&m.at]).expect_code(0);
    drop(m);
    take_off(&over);
    take_off(&one);
    drop(w);
    // What a container's seccomp profile does.
    let w = world();
    let log = w.scratch_path("log");
    let file = File::create(&log).unwrap();
    let mut command = mirrorfs();
    command
        .args(["mount", "-f", "-o", "transport=uring", "--finish"])
        .args([&w.src, &w.dst, &w.at]);
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    let mut child = raw::die_with_parent(raw::instead_of(
        &mut command,
        libc::SYS_io_uring_setup,
        libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
    ))
    .spawn()
    .unwrap();
    wait_until("the end", LIMIT, || child.try_wait().unwrap().is_some());
    messages::heard(&fs::read_to_string(&log).unwrap(), None);
}

pub(crate) fn keepers_that_cannot_go_on() {
    let w = world();
    const KEEP: [&str; 4] = ["mount", "--keep-mount", "--transport", "dev"];
    // What the seccomp profiles of containers do.
    let mut command = mirrorfs();
    command.args(KEEP).args([&w.src, &w.dst, &w.at]);
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    run(raw::instead_of(&mut command, libc::SYS_clone3, enosys)).expect_code(1);
    // A daemon that is killed before its mount can be seen.
    let mut command = mirrorfs();
    command.args(KEEP).arg("-f").args([&w.src, &w.dst, &w.at]);
    let kill = libc::SECCOMP_RET_KILL_PROCESS;
    run(raw::instead_of(&mut command, libc::SYS_fsmount, kill)).expect_code(1);
    // The program's file system lets nobody run anything any more.
    let disk = w.scratch_path("disk");
    fs::create_dir(&disk).unwrap();
    tmpfs("tmpfs", &disk);
    let own = disk.join("mirrorfs");
    sh("cp \"$1\" \"$2\"", &[&program(), &own]).expect_code(0);
    let log = w.scratch_path("keeper.log");
    let file = File::create(&log).unwrap();
    let mut command = Command::new(&own);
    command.args(KEEP).arg("-f").args([&w.src, &w.dst, &w.at]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(file);
    let mut keeper = raw::die_with_parent(&mut command).spawn().unwrap();
    wait_until("a mount", LIMIT, || fuse_mount_at(&w.at).is_some());
    run(Command::new("mount")
        .args(["-o", "remount,noexec"])
        .arg(&disk))
    .expect_code(0);
    let pid = status(&w.at)["pid"].as_u64().unwrap();
    raw::kill(u32::try_from(pid).unwrap(), libc::SIGKILL);
    let end = keeper.wait().unwrap();
    messages::heard(&fs::read_to_string(&log).unwrap(), end.code());
    assert_eq!(end.code(), Some(1));
    take_off(&w.at);
    take_off(&disk);
}

pub(crate) fn a_src_that_others_write_and_one_that_is_half_migrated() {
    let w = world();
    let quiet = w.scratch_path("read-only");
    fs::create_dir(&quiet).unwrap();
    mount_bind(&w.src, &quiet).unwrap();
    run(Command::new("mount")
        .args(["-o", "remount,bind,ro"])
        .arg(&quiet))
    .expect_code(0);
    let half = w.src.join("half");
    let other = w.src.parent().unwrap().join("other");
    for dir in [&half, &other] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(other.join("b"), "content").unwrap();
    let there = World::from(other, half, vec![]);
    there.mount_lazy().unmount();
    let w2 = World::from(quiet.clone(), w.dst.clone(), vec![]);
    let m = w2.mount();
    wait_until("an entry in the ledger", LIMIT, || {
        m.status()["errors"].as_u64() > Some(0)
    });
    drop(m);
    take_off(&quiet);
}

/// An entry of another type, which is nothing that is pending; and one that cannot be read.
pub(crate) fn a_ledger_that_is_not_empty() {
    let w = world();
    fs::create_dir_all(w.dst.join("a/deep")).unwrap();
    let m = w.mount_with(&["--adopt", "--finish"], &[]);
    wait_for(&m, "not finished");
    ours(&["wait", "--timeout", "60s"], &[&m.at]).expect_code(23);
    ours(&["errors"], &[&m.at]).expect_code(0);
    ours(&["finish"], &[&m.at]).expect_code(23);
    drop(m);
    let (bad, w) = bad(&["path=secret op=open err=EACCES"], None, |bad| {
        bad.write("secret", b"secret");
    });
    let m = w.mount();
    ours(&["wait", "--timeout", "60s"], &[&m.at]).expect_code(23);
    ours(&["pause"], &[&m.at]).expect_code(0);
    ours(&["errors", "--retry"], &[&m.at]).expect_code(1);
    drop((m, bad));
}

pub(crate) fn a_sync_that_does_not_end_well() {
    let (bad, w) = bad(&["path=secret op=open err=EACCES"], None, |bad| {
        bad.write("secret", b"secret");
        bad.write("gone", b"gone");
        bad.write("rules/.rsync-filter", b"nonsense\n");
        for n in 0..60 {
            bad.write(&format!("f{n}"), &bytes(n, 60_000));
        }
    });
    ours(&["sync", "-F"], &[&w.src, &w.dst]).expect_code(23);
    ours(&["sync", "-f", "nonsense"], &[&w.src, &w.dst]).expect_code(2);
    ours(
        &["sync", "--files-from", "/nowhere/list"],
        &[&w.src, &w.dst],
    )
    .expect_code(2);
    bad.tell("off");
    w.empty_dst();
    ours(
        &["sync", "--stop-after", "0", "--bwlimit", "100"],
        &[&w.src, &w.dst],
    )
    .expect_code(30);
    let first = sync_slowly(&w, &["--ignore-times"]);
    wait_until("it is at work", LIMIT, || {
        w.dst.join(".mirrorfs/sync").exists()
    });
    raw::kill(first.id(), libc::SIGINT);
    said_by(first);
    ours(&["sync"], &[&w.src, &w.dst]).expect_code(0);
    for n in 0..3 {
        fs::write(w.dst.join(format!("extra{n}")), "").unwrap();
    }
    ours(
        &["sync", "--delete", "--max-delete", "1"],
        &[&w.src, &w.dst],
    )
    .expect_code(25);
    w.empty_dst();
    bad.tell("on");
    bad.tell("add path=gone op=lookup hide");
    bad.tell("del 0");
    ours(&["sync"], &[&w.src, &w.dst]).expect_code(24);
    // The same shard twice.
    w.empty_dst();
    let first = sync_slowly(&w, &["--shard", "1/1"]);
    wait_until("it is at work", LIMIT, || {
        w.dst.join(".mirrorfs/shards").exists()
    });
    thread::sleep(Duration::from_millis(300));
    ours(&["sync", "--shard", "1/1"], &[&w.src, &w.dst]).expect_code(3);
    raw::kill(first.id(), libc::SIGINT);
    said_by(first);
}

pub(crate) fn manifests_that_are_not_whole() {
    let w = world();
    for n in 0..60 {
        fs::write(w.src.join(format!("f{n}")), bytes(n, 60_000)).unwrap();
    }
    let (file, other) = (w.scratch_path("manifest"), w.scratch_path("other"));
    let words = ["sync", "--manifest", file.to_str().unwrap()];
    ours(&words, &[&w.src, &w.dst]).expect_code(0);
    let text = fs::read_to_string(&file).unwrap();
    let broken = text.replacen("type=file", "type=fine", 1);
    assert_ne!(text, broken);
    fs::write(&file, broken).unwrap();
    ours(&words, &[&w.src, &w.dst]).expect_code(0);
    fs::write(&other, text.replacen("manifest 1", "manifest 9", 1)).unwrap();
    ours(
        &["verify", "--manifest", other.to_str().unwrap()],
        &[&w.dst],
    )
    .expect_code(3);
    w.empty_dst();
    let first = sync_slowly(&w, &words[1..]);
    wait_until("it is at work", LIMIT, || {
        w.dst.join(".mirrorfs/sync").exists()
    });
    ours(&words, &[&w.src, &w.dst]).expect_code(3);
    raw::kill(first.id(), libc::SIGINT);
    said_by(first);
    let (_bad, w) = bad(&["path=a now"], None, |bad| {
        bad.write("a", &bytes(1, 3 << 20))
    });
    let file = w.scratch_path("manifest");
    ours(&["manifest"], &[&w.src, &file]).expect_code(24);
}

pub(crate) fn steering_that_is_refused() {
    let w = world();
    let run_dir = w.scratch_path("run");
    let env = [("MIRRORFS_RUN_DIR", run_dir.to_str().unwrap())];
    let mut words = vec!["--no-background", "--metrics-file", "/nowhere/metrics"];
    words.extend(["--record", "/dev/full"]);
    let m = w.mount_with(&words, &env);
    let ask = |words: &[&str], path: &Path| {
        let mut command = mirrorfs();
        command.args(words).arg(path).envs(env);
        run(&mut command)
    };
    // Twice the same SRC.
    let (other, there) = (
        w.src.parent().unwrap().join("other"),
        w.scratch_path("there"),
    );
    for dir in [&other, &there] {
        fs::create_dir(dir).unwrap();
    }
    let mut twice = World::from(w.src.clone(), other, vec![]);
    twice.at = there;
    let second = twice.mount_with(&["--no-background"], &env);
    ask(&["status"], &w.src).expect_code(2);
    drop(second);
    // Something on top of the mount.
    ask(&["pull", "-q"], &m.at).expect_code(0);
    ask(&["resume"], &m.at).expect_code(0);
    ask(&["wait"], &m.at).expect_code(0);
    let inner = m.path("a");
    let holds = File::open(&inner).unwrap();
    tmpfs("tmpfs", &m.at);
    ask(&["finish"], &w.dst).expect_code(3);
    take_off(&m.at);
    ours(
        &["verify", "--combined", "/nowhere/list"],
        &[&w.src, &w.dst],
    )
    .expect_code(1);
    // It waits for whoever has a file open.
    run(Command::new("umount").arg("-l").arg(&m.at)).expect_code(0);
    thread::sleep(Duration::from_millis(500));
    ask(&["finish"], &w.dst).expect_code(1);
    drop(holds);
}

/// DST takes nothing from the moment on in which the next program has said that it can take over.
pub(crate) fn an_upgrade_while_dst_is_frozen() {
    let w = World::on_two("ext4", "xfs");
    fs::write(w.src.join("a"), "content").unwrap();
    let m = w.mount();
    m.wait_complete();
    let at = w.dst.parent().unwrap().to_path_buf();
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = --upgrade-check ] || exit 1\nfsfreeze -f '{}'\n\
         (touch '{}' </dev/null >/dev/null 2>&1 &)\nsleep 1\n",
        at.display(),
        m.path("new").display()
    );
    let binary = script(&w, "freezes", &text);
    // Whatever happens, it does not stay so.
    let thaw = {
        let at = at.clone();
        apart(move || {
            thread::sleep(Duration::from_secs(15));
            // Not by `run`: it would give this thread a namespace of its own.
            let done = Command::new("fsfreeze").arg("-u").arg(&at).status();
            assert!(done.unwrap().success());
        })
    };
    let said = try_upgrade(&m, &binary);
    thaw.recv_timeout(LIMIT).unwrap();
    said.expect_code(1);
}

pub(crate) fn upgrades_that_are_refused() {
    let w = world();
    // The record cannot be gone on with by the next program, and the one after it is the last.
    let trace = w.scratch_path("trace");
    let name = trace.to_str().unwrap();
    let m = w.mount_with(&["--no-background", "--record", name], &[]);
    fs::remove_file(&trace).unwrap();
    try_upgrade(&m, &program()).expect_code(0);
    wait_for(&m, "nothing more is recorded");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = --upgrade-check ] && exec {own} \"$@\"\nexport MIRRORFS_FAULT=refuse-upgrade\n\
         way=$1 state=$2; shift 3\nexec {own} \"$way\" \"$state\" 999 \"$@\"\n",
        own = program().display()
    );
    try_upgrade(&m, &script(&w, "breaks", &text)).expect_code(1);
    m.kill();
    take_off(&w.at);
}
