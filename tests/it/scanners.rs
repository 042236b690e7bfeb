//! Who goes over everything leaves nothing behind: looking at names and metadata, and the readers of
//! `--no-store`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fixture::{
    LARGE, LIMIT, Mounted, Output, World, as_user, bytes, can_mount_on, find_program, is_marked,
    mirrorfs, mounts, need, run, wait_until,
};

const SCANNER: u32 = 4711;

/// Small, middle and large files, in one directory.
const FILES: [(&str, usize); 5] = [
    ("a", 100),
    ("b", 5_000),
    ("c", 70_000),
    ("middle", 1 << 20),
    ("large", LARGE + 70_000),
];

fn world() -> Option<World> {
    if !can_mount_on("ext4") {
        return None;
    }
    let w = World::on("ext4");
    for (name, len) in FILES {
        let path = w.src.join("dir").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes(len as u64, len)).unwrap();
    }
    Some(w)
}

/// Nothing of the file was pulled: it has its mark and no block.
fn is_untouched(path: &Path) -> bool {
    is_marked(path) && fs::metadata(path).unwrap().blocks() == 0
}

#[track_caller]
fn expect_nothing_pulled(w: &World, m: &Mounted) {
    let status = m.status();
    for key in ["demand_files", "demand_bytes", "prefetched_files", "errors"] {
        assert_eq!(status[key], 0, "{key}: {status:#}");
    }
    for (name, _) in FILES {
        let raw = w.dst.join("dir").join(name);
        assert!(is_untouched(&raw), "{name} was pulled");
    }
}

fn sh(script: &str, dir: &Path) -> Output {
    run(Command::new("sh").args(["-ec", script]).current_dir(dir))
}

/// Reads everything in every way that does not write into the mount; what was read is in `$OUT`.
fn scan(out: &Path) -> String {
    format!(
        "for f in a b c middle large; do cat $f > {out}/cat-$f; cp $f {out}/cp-$f; dd if=$f of={out}/dd-$f bs=64K iflag=direct status=none; done; tar cf {out}/tar . ; head -c 10 large | wc -c; tail -c 10 large | wc -c",
        out = out.display()
    )
}

#[track_caller]
fn expect_scanned(out: &Path) {
    for (name, len) in FILES {
        for way in ["cat", "cp", "dd"] {
            let read = fs::read(out.join(format!("{way}-{name}"))).unwrap();
            assert!(read == bytes(len as u64, len), "{way} {name}");
        }
    }
    let untar = out.join("untar");
    fs::create_dir(&untar).unwrap();
    sh(&format!("tar xf ../tar -C {}", untar.display()), &untar).expect_code(0);
    for (name, len) in FILES {
        assert!(
            fs::read(untar.join(name)).unwrap() == bytes(len as u64, len),
            "tar {name}"
        );
    }
}

/// A control group of version 2 that goes away with this; `None`: there is none to be had.
struct Cgroup {
    dir: PathBuf,
    path: String,
}

impl Cgroup {
    fn new(w: &World) -> Option<Cgroup> {
        let mounted = mounts().into_iter().find(|m| m.kind == "cgroup2");
        let root = match mounted {
            Some(mount) => mount.at,
            None => {
                let at = w.scratch_path("cgroup");
                fs::create_dir(&at).unwrap();
                let mount = ["-t", "cgroup2", "none"];
                let done = run(Command::new("mount").args(mount).arg(&at));
                if !need(done.code() == 0, "cgroup2") {
                    return None;
                }
                at
            }
        };
        let name = format!("mirrorfs-it-{}", std::process::id());
        let dir = root.join(&name);
        if !need(fs::create_dir(&dir).is_ok(), "a control group of our own") {
            return None;
        }
        // As the daemon sees it, whatever is between.
        let line = sh(
            &format!(
                "echo $$ > {}/cgroup.procs; cat /proc/self/cgroup",
                dir.display()
            ),
            Path::new("/"),
        );
        let line = line.expect_code(0).out;
        let path = line.lines().find_map(|l| l.strip_prefix("0::")).unwrap();
        assert!(path.ends_with(&name), "{line}");
        let path = path.to_owned();
        Some(Cgroup { dir, path })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy until its last process was reaped: one more directory is no harm.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// A fresh mount with `--no-store who`; `scan` reads in it, and its control does the same in one
/// without the option.
fn check(w: &World, who: &str, scan_in: impl Fn(&Path, &str) -> Output) {
    for with in [true, false] {
        let name = who.replace(['/', ':'], "-");
        let dst = w.scratch_path(&format!("dst-{name}-{with}"));
        // On the same file system: the scratch directory need not have xattrs.
        let dst = w.dst.with_file_name(dst.file_name().unwrap());
        fs::create_dir(&dst).unwrap();
        let world = World::from(w.src.clone(), dst, vec![]);
        let args = match with {
            true => &["--no-background", "--no-store", who][..],
            false => &["--no-background"],
        };
        let m = world.mount_with(args, &[]);
        let out = world.scratch_path("out");
        fs::create_dir(&out).unwrap();
        rustix::fs::chmod(&out, 0o777.into()).unwrap();
        let said = scan_in(&m.path("dir"), &scan(&out)).expect_code(0);
        assert_eq!(said.out, "10\n10\n");
        expect_scanned(&out);
        if with {
            expect_nothing_pulled(&world, &m);
            // Somebody else reads as ever.
            let read = fs::read(m.path("dir/c")).unwrap();
            assert!(read == bytes(70_000, 70_000));
            wait_until("it is pulled", LIMIT, || {
                !is_untouched(&world.dst.join("dir/c"))
            });
        } else {
            let status = m.status();
            assert!(status["demand_files"].as_u64().unwrap() >= 4, "{status:#}");
            assert!(!is_untouched(&world.dst.join("dir/a")));
        }
    }
}

#[test]
fn a_user_whose_reads_are_not_stored_gets_srcs_bytes() {
    let Some(w) = world() else { return };
    check(&w, &format!("uid:{SCANNER}"), |dir, script| {
        crate::fixture::shell_as(SCANNER, SCANNER, dir, &format!("set -e; {script}"))
    });
}

#[test]
fn processes_of_the_idle_io_class_get_srcs_bytes() {
    let Some(w) = world() else { return };
    if !need(find_program("ionice").is_some(), "ionice") {
        return;
    }
    check(&w, "idle", |dir, script| {
        run(Command::new("ionice")
            .args(["-c3", "sh", "-ec", script])
            .current_dir(dir))
    });
}

#[test]
fn processes_of_a_control_group_get_srcs_bytes() {
    let Some(w) = world() else { return };
    let Some(group) = Cgroup::new(&w) else { return };
    let below = group.dir.join("below");
    fs::create_dir(&below).unwrap();
    let procs = below.join("cgroup.procs");
    check(&w, &format!("cgroup:{}", group.path), |dir, script| {
        sh(&format!("echo $$ > {}; {script}", procs.display()), dir)
    });
    wait_until("the group is empty", LIMIT, || {
        fs::remove_dir(&below).is_ok()
    });
}

fn first_byte(file: &mut File) -> u8 {
    let mut byte = [0];
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut byte).unwrap();
    byte[0]
}

#[test]
fn others_open_read_and_change_a_file_that_a_scanner_holds_open() {
    let Some(w) = world() else { return };
    let who = format!("uid:{SCANNER}");
    let m = w.mount_with(&["--no-background", "--no-store", &who], &[]);
    for (name, len) in FILES {
        let path = m.path("dir").join(name);
        let want = bytes(len as u64, len);
        let mut scanner = as_user(SCANNER, SCANNER, 0o22, || File::open(&path).unwrap());
        assert_eq!(first_byte(&mut scanner), want[0]);
        assert!(is_untouched(&w.dst.join("dir").join(name)), "{name}");
        // Nobody gets EIO for the way in which somebody else has it open.
        assert!(fs::read(&path).unwrap() == want, "{name}");
        let user = OpenOptions::new().read(true).write(true).open(&path);
        let mut user = user.unwrap();
        user.write_all_at(b"\x01", 0).unwrap();
        user.sync_all().unwrap();
        assert_eq!(first_byte(&mut scanner), 1, "{name}: what the user wrote");
        user.seek(SeekFrom::End(0)).unwrap();
        user.write_all(b"more").unwrap();
        let mut end = vec![0; 4];
        scanner.read_exact_at(&mut end, len as u64).unwrap();
        assert_eq!(end, b"more", "{name}");
        let second = as_user(SCANNER, SCANNER, 0o22, || File::open(&path));
        assert_eq!(first_byte(&mut second.unwrap()), 1);
        drop((scanner, user));
        // Past the daemon again, then a scanner beside it.
        let mut user = File::open(&path).unwrap();
        let again = as_user(SCANNER, SCANNER, 0o22, || File::open(&path));
        assert_eq!(first_byte(&mut again.unwrap()), first_byte(&mut user));
    }
    // A truncation while a scanner has it open.
    fs::write(w.src.join("late"), bytes(9, 90_000)).unwrap();
    drop(m);
    let w2 = World::from(w.src.clone(), w.dst.with_file_name("dst2"), vec![]);
    fs::create_dir(&w2.dst).unwrap();
    let m = w2.mount_with(&["--no-background", "--no-store", &who], &[]);
    let path = m.path("late");
    let mut scanner = as_user(SCANNER, SCANNER, 0o22, || File::open(&path).unwrap());
    assert_eq!(first_byte(&mut scanner), bytes(9, 1)[0]);
    fs::write(&path, b"new").unwrap();
    let mut all = Vec::new();
    scanner.seek(SeekFrom::Start(0)).unwrap();
    scanner.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"new");
    assert_eq!(m.status()["errors"], 0);
}

#[test]
fn a_scanner_that_writes_is_like_everybody_else() {
    let Some(w) = world() else { return };
    fs::set_permissions(
        w.src.join("dir/b"),
        std::os::unix::fs::PermissionsExt::from_mode(0o666),
    )
    .unwrap();
    let who = format!("uid:{SCANNER}");
    let m = w.mount_with(&["--no-background", "--no-store", &who], &[]);
    let path = m.path("dir/b");
    as_user(SCANNER, SCANNER, 0o22, || {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"\x01", 1).unwrap();
    });
    let mut want = bytes(5_000, 5_000);
    want[1] = 1;
    assert!(fs::read(&path).unwrap() == want);
    assert!(fs::read(w.dst.join("dir/b")).unwrap() == want);
}

#[test]
fn a_scanner_hears_of_a_src_that_cannot_be_read() {
    let Some(w) = world() else { return };
    let who = format!("uid:{SCANNER}");
    let m = w.mount_with(&["--no-background", "--no-store", &who], &[]);
    fs::metadata(m.path("dir/a")).unwrap();
    fs::remove_file(w.src.join("dir/a")).unwrap();
    let read = as_user(SCANNER, SCANNER, 0o22, || fs::read(m.path("dir/a")));
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
}

/// What it was told of is not all there any more: that is no end of the file.
#[test]
fn a_scanner_under_whom_a_file_of_src_shrinks_gets_no_early_end() {
    let Some(w) = world() else { return };
    let who = format!("uid:{SCANNER}");
    let m = w.mount_with(&["--no-background", "--no-store", &who], &[]);
    let path = m.path("dir/middle");
    let open = || as_user(SCANNER, SCANNER, 0o22, || File::open(&path).unwrap());
    let (mut scanner, all) = (open(), bytes(1 << 20, 1 << 20));
    assert_eq!(first_byte(&mut scanner), all[0]);
    let src = OpenOptions::new()
        .write(true)
        .open(w.src.join("dir/middle"));
    src.unwrap().set_len(5_000).unwrap();
    let read = |file: &File| file.read_at(&mut [0; 10], 900_000);
    assert_eq!(read(&scanner).unwrap_err().raw_os_error(), Some(libc::EIO));
    let again = open();
    assert_eq!(read(&again).unwrap(), 0);
    assert_eq!(again.metadata().unwrap().len(), 5_000);
    let mut now = Vec::new();
    (&again).read_to_end(&mut now).unwrap();
    assert!(now == all[..5_000]);
    assert!(is_untouched(&w.dst.join("dir/middle")));
}

#[test]
fn looking_at_names_and_metadata_pulls_no_data() {
    let Some(w) = world() else { return };
    let m = w.mount_lazy();
    for script in [
        "ls -lR . > /dev/null",
        "find . -size +1 -newermt 1970-01-02 -perm -400 | wc -l",
        "find . -type f -links 1 -empty",
        "du -a . > /dev/null; du --apparent-size . > /dev/null",
        "stat dir/* > /dev/null; readlink -f dir/a > /dev/null",
        "getfattr -d -m - -R . > /dev/null 2>&1 || true; getfacl -R . > /dev/null 2>&1 || true",
        "tree -s . > /dev/null 2>&1 || true; test -x dir/a || test -r dir/a",
        "chmod 640 dir/a; touch -h -d 2001-01-01 dir/b; ln dir/c dir/c2; mv dir/middle dir/m; mv dir/m dir/middle; rm dir/c2",
    ] {
        sh(script, &m.at).expect_code(0);
        expect_nothing_pulled(&w, &m);
    }
    let du = sh("du -sk --apparent-size dir | cut -f1", &m.at).expect_code(0);
    let want: usize = FILES.iter().map(|(_, len)| len).sum();
    let kib: usize = du.out.trim().parse().unwrap();
    assert!(kib >= want / 1024, "{kib} KiB of {want} bytes");
    // The control: a byte of data.
    sh("head -c 1 dir/a", &m.at).expect_code(0);
    assert_eq!(m.status()["demand_files"], 1);
}

#[test]
fn who_is_not_to_be_stored_is_checked_at_the_start() {
    let Some(w) = world() else { return };
    for who in ["uid:x", "cgroup:/", "gid:1"] {
        let mut mount = mirrorfs();
        mount
            .args(["mount", "--no-store", who])
            .args([&w.src, &w.dst]);
        let output = run(&mut mount).expect_code(2);
        assert!(output.err.contains(who), "{}", output.err);
        assert_eq!(output.err.lines().count(), 1, "{}", output.err);
    }
    let m = w.mount_with(&["-o", "nostore=idle,nostore=uid:1,nobackground"], &[]);
    assert!(m.status()["usable"].as_bool().unwrap());
}
