//! An ordinary user who changes permissions while `finish` takes marks away that hold others.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::thread;

use crate::badsource::{BadSrc, NOT_YET};
use crate::fixture::{Hold, LoopFs, bytes, can_mount_on, find_program, kit, need};
use crate::rootless::{Home, as_him, can_run};
use crate::salvage::{PAGE, SMALL};

/// `finish` stays where the mark of the only entry that is read-only has gone, and its permissions are not
/// true yet; then he changes them.
fn changed_while_finish_takes_the_mark(home: &Home, name: &str, mode: u32, errors: u64) {
    let hold = Hold::by(home.run_dir.join("hold"), "perm-unmarked");
    let mut command = home.command();
    command.envs(hold.env());
    let lazy: &[&str] = match errors {
        0 => &["--no-background"],
        _ => &[],
    };
    let mount = home.mount_by(command, lazy);
    match errors {
        0 => as_him(|| {
            assert_eq!(fs::read(mount.path("locked/f")).unwrap(), b"f");
        }),
        n => mount.wait_settled(n),
    }
    let (path, there) = (mount.path(name), home.dst.join(name));
    let open = as_him(|| File::open(path).unwrap());
    let (args, code): (&[&str], i32) = match errors {
        0 => (&[], 0),
        _ => (&["--accept-loss"], 23),
    };
    thread::scope(|s| {
        let change = s.spawn(|| {
            hold.wait_met();
            let to = Permissions::from_mode(mode);
            let chmod = s.spawn(move || as_him(|| open.set_permissions(to)));
            thread::sleep(NOT_YET);
            hold.let_go();
            chmod.join().unwrap().unwrap();
        });
        mount.finish(args, code);
        change.join().unwrap();
    });
    let now = there.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(now, mode, "{now:o}");
}

#[test]
fn permissions_that_are_given_while_finish_takes_a_directory_s_mark_are_what_it_has() {
    if !can_run() {
        return;
    }
    let home = Home::new();
    let locked = home.src.join("locked");
    fs::create_dir(&locked).unwrap();
    fs::write(locked.join("f"), "f").unwrap();
    fs::set_permissions(&locked, Permissions::from_mode(0o555)).unwrap();
    home.give_src();
    changed_while_finish_takes_the_mark(&home, "locked", 0o750, 0);
}

#[test]
fn permissions_that_are_given_while_finish_gives_up_the_rest_of_a_file_are_what_it_has() {
    let tools = need(kit("badsrc.py").is_some(), "badsrc.py of the test kit")
        && need(find_program("python3").is_some(), "python3");
    if !can_run() || !tools || !can_mount_on("ext4") {
        return;
    }
    let fs = LoopFs::new("ext4");
    let mut bad = BadSrc::new(&fs);
    bad.write("bad", &bytes(1, SMALL));
    let file = bad.real.join("bad");
    fs::set_permissions(&file, Permissions::from_mode(0o444)).unwrap();
    let mut home = Home::on("ext4");
    home.src = bad.real.clone();
    home.give_src();
    home.src = bad.at.clone();
    let rule = format!("path=bad op=read off={}-{} err=EIO", 5 * PAGE, 6 * PAGE);
    bad.start(&[&rule]);
    changed_while_finish_takes_the_mark(&home, "bad", 0o640, 1);
}
