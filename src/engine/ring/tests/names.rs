//! Operations on names.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::fs::{AtFlags, RenameFlags};

use super::*;
use crate::sys;

fn open(dir: Arc<OwnedFd>, path: &str, flags: OFlags, mode: u32) -> Op {
    Op::Open {
        dir,
        path: c(path),
        how: how(flags, mode),
        slot: None,
    }
}

#[test]
fn open_finds_makes_and_refuses() {
    let story = "fd\nENOENT\nENOTDIR\nENOTDIR\nEEXIST\nfd\n600\nELOOP\nEXDEV\nEINVAL\nEISDIR\nfd\n\
        ENAMETOOLONG\nENOENT";
    tells(story, |rig| {
        let file = rig.file("f", b"hello");
        symlink("f", rig.path("link")).expect("symlink");
        let opened = rig.run(open(rig.root(), "f", OFlags::RDONLY, 0));
        let Ok(Reply::Fd(fd)) = opened.result else {
            panic!("not opened")
        };
        let flags = rustix::io::fcntl_getfd(&fd).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        rig.run(open(rig.root(), "nope", OFlags::RDONLY, 0));
        rig.run(open(rig.root(), "f/x", OFlags::RDONLY, 0));
        rig.run(open(file, "x", OFlags::RDONLY, 0)); // Not a directory.
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
        rig.run(open(rig.root(), "f", new, 0o600));
        rig.run(open(rig.root(), "new", new, 0o600));
        rig.meta("new", |m| format!("{:o}", m.permissions().mode() & 0o7777));
        rig.run(open(rig.root(), "link", OFlags::NOFOLLOW, 0));
        rig.run(open(rig.root(), "../x", OFlags::RDONLY, 0));
        rig.run(open(rig.root(), "f", OFlags::RDONLY, 0o600)); // A mode without O_CREAT.
        rig.run(open(rig.root(), ".", OFlags::RDWR, 0));
        rig.run(open(rig.root(), ".", OFlags::TMPFILE | OFlags::RDWR, 0o600));
        rig.run(open(rig.root(), &"x".repeat(300), OFlags::RDONLY, 0));
        rig.run(open(rig.root(), "", OFlags::RDONLY, 0));
    });
}

#[test]
fn a_name_of_src_is_opened_as_the_system_call_does() {
    tells("fd\nENOENT\nELOOP", |rig| {
        drop(rig.file("f", b"hello"));
        symlink("f", rig.path("link")).expect("symlink");
        for name in ["f", "nope", "link"] {
            let name = crate::sys::name::Name::new(name.as_bytes()).expect("a name");
            rig.run(Op::open_src(rig.root(), &name, true));
        }
    });
}

#[test]
fn statx_sees_what_the_system_call_sees() {
    tells("stat\nstat\nstat\nstat\nENOENT\nENOTDIR", |rig| {
        let file = rig.file("f", b"hello");
        symlink("f", rig.path("link")).expect("symlink");
        let at = |dir: Arc<OwnedFd>, path: Option<&str>| Op::Statx {
            dir,
            path: path.map(c),
            fresh: false,
        };
        let fresh = Op::Statx {
            dir: Arc::clone(&file),
            path: None,
            fresh: true,
        };
        let root = rig.root();
        for (op, plain) in [
            (fresh, sys::stat::stat_fd_fresh(file.as_fd())),
            (
                at(Arc::clone(&file), None),
                sys::stat::stat_fd(file.as_fd()),
            ),
            (
                at(rig.root(), Some("f")),
                sys::stat::stat_at(root.as_fd(), c"f"),
            ),
            (
                at(rig.root(), Some("link")),
                sys::stat::stat_at(root.as_fd(), c"link"),
            ),
        ] {
            let Ok(Reply::Stat(stat)) = rig.run(op).result else {
                panic!("no stat")
            };
            assert_eq!(stat, plain.expect("stat"));
        }
        rig.run(at(rig.root(), Some("nope")));
        rig.run(at(file, Some("x")));
    });
}

#[test]
fn a_hard_link_is_another_name() {
    let story = "done\n2\nEEXIST\nENOENT\nEPERM\ndone\n1\ndone\nlink";
    tells(story, |rig| {
        drop(rig.file("f", b"hello"));
        let with = |rig: &Rig, old: &str, new: &str, flags| Op::Link {
            old_dir: rig.root(),
            old_path: c(old),
            new_dir: rig.root(),
            new_path: c(new),
            flags,
        };
        let none = AtFlags::empty();
        rig.run(with(rig, "f", "g", none));
        rig.meta("g", |m| m.nlink().to_string());
        rig.run(with(rig, "f", "g", none));
        rig.run(with(rig, "nope", "h", none));
        rig.run(with(rig, ".", "h", none));
        // A nameless file gets its name.
        let tmp = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let tmp = rustix::fs::openat(rig.root(), c".", tmp, Mode::from_raw_mode(0o600));
        rig.run(Op::Link {
            old_dir: Arc::new(tmp.expect("O_TMPFILE")),
            old_path: c(""),
            new_dir: rig.root(),
            new_path: c("h"),
            flags: AtFlags::EMPTY_PATH,
        });
        rig.meta("h", |m| m.nlink().to_string());
        symlink("f", rig.path("s")).expect("symlink");
        rig.run(with(rig, "s", "t", none)); // The symlink itself.
        rig.meta("t", |m| if m.is_symlink() { "link" } else { "file" }.into());
    });
}

#[test]
fn unlink_takes_names_and_empty_directories() {
    let story = "done\nNotFound\nENOENT\nEISDIR\nENOTEMPTY\ndone\ndone\nNotFound\nENOTDIR";
    tells(story, |rig| {
        drop(rig.file("f", b"hello"));
        std::fs::create_dir(rig.path("d")).expect("mkdir");
        drop((rig.file("d/f", b""), rig.file("g", b"")));
        let with = |rig: &Rig, path: &str, flags| Op::Unlink {
            dir: rig.root(),
            path: c(path),
            flags,
        };
        let none = AtFlags::empty();
        rig.run(with(rig, "f", none));
        rig.meta("f", |_| "there".into());
        rig.run(with(rig, "f", none));
        rig.run(with(rig, "d", none));
        rig.run(with(rig, "d", AtFlags::REMOVEDIR));
        rig.run(with(rig, "d/f", none));
        rig.run(with(rig, "d", AtFlags::REMOVEDIR));
        rig.meta("d", |_| "there".into());
        rig.run(with(rig, "g", AtFlags::REMOVEDIR));
    });
}

#[test]
fn mkdir_makes_a_directory_once() {
    tells("done\n700\nEEXIST\nENOENT\nENOTDIR", |rig| {
        drop(rig.file("f", b"hello"));
        let with = |rig: &Rig, path: &str| Op::Mkdir {
            dir: rig.root(),
            path: c(path),
            mode: Mode::from_raw_mode(0o700),
        };
        rig.run(with(rig, "d"));
        rig.meta("d", |m| format!("{:o}", m.permissions().mode() & 0o7777));
        rig.run(with(rig, "d"));
        rig.run(with(rig, "nope/d"));
        rig.run(with(rig, "f/d"));
    });
}

#[test]
fn a_symlink_keeps_its_target() {
    tells("done\nany/where\nEEXIST\nENOENT\nENOENT", |rig| {
        let with = |rig: &Rig, target: &str, path: &str| Op::Symlink {
            target: c(target),
            dir: rig.root(),
            path: c(path),
        };
        rig.run(with(rig, "any/where", "s"));
        let target = std::fs::read_link(rig.path("s")).expect("readlink");
        rig.say(target.to_string_lossy());
        rig.run(with(rig, "x", "s"));
        rig.run(with(rig, "x", "nope/s"));
        rig.run(with(rig, "", "t"));
    });
}

#[test]
fn rename_moves_exchanges_and_spares() {
    let story = "done\none\nEEXIST\ndone\ntwo\ndone\nNotFound\nENOENT\nENOTEMPTY\nEISDIR\nEINVAL";
    tells(story, |rig| {
        drop((rig.file("a", b"one"), rig.file("x", b"two")));
        for dir in ["d", "e"] {
            std::fs::create_dir(rig.path(dir)).expect("mkdir");
            drop(rig.file(&format!("{dir}/f"), b""));
        }
        let with = |rig: &Rig, old: &str, new: &str, flags| Op::Rename {
            old_dir: rig.root(),
            old_path: c(old),
            new_dir: rig.root(),
            new_path: c(new),
            flags,
        };
        let none = RenameFlags::empty();
        rig.run(with(rig, "a", "b", none));
        rig.content("b");
        rig.run(with(rig, "x", "b", RenameFlags::NOREPLACE));
        rig.run(with(rig, "x", "b", RenameFlags::EXCHANGE));
        rig.content("b");
        rig.run(with(rig, "x", "b", none)); // Replaces.
        rig.meta("x", |_| "there".into());
        rig.run(with(rig, "x", "b", none));
        rig.run(with(rig, "d", "e", none));
        rig.run(with(rig, "b", "e", none));
        let both = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        rig.run(with(rig, "b", "c", both));
    });
}
