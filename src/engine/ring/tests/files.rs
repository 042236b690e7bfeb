//! Operations on open files: by fd, and through slots.

use std::os::unix::fs::MetadataExt;

use rustix::fs::{Advice, FallocateFlags, XattrFlags};

use super::*;

#[test]
fn a_read_is_short_at_the_end_and_empty_behind_it() {
    let story = "2\nlo\n0\n\n0\n\nEINVAL\nEINVAL\nEISDIR\nEBADF\n4\npipe\n5\nhello";
    tells(&story.replace("\n\n", "\n(none)\n"), |rig| {
        let file = rig.file("f", b"hello");
        let root = rig.root();
        let written: Arc<OwnedFd> = {
            let file = File::options().write(true).open(rig.path("f"));
            Arc::new(file.expect("open").into())
        };
        let (out, into) = pipe();
        rustix::io::write(&into, b"pipe").expect("write");
        rig.read(Arc::clone(&file), 40, 3);
        rig.read(Arc::clone(&file), 40, 5);
        rig.read(Arc::clone(&file), 40, 1 << 40);
        rig.read(Arc::clone(&file), 40, u64::MAX);
        rig.read(Arc::clone(&file), 1 << 20, 0); // Larger than the buffer.
        rig.read(root, 40, 0);
        rig.read(written, 40, 0);
        rig.read(out, 40, 99); // A pipe has no offsets.
        rig.read(file, 5, 0);
        for line in &mut rig.story {
            if line.is_empty() {
                *line = "(none)".into();
            }
        }
    });
}

#[test]
fn a_write_lands_where_it_was_told() {
    let story = "3\n2\nhexxx...yy\nEBADF\nEINVAL\nENOSPC\n4\n4\nabcd";
    tells(story, |rig| {
        let file = rig.file("f", b"hello");
        rig.write(Arc::clone(&file), b"xxx", 2);
        rig.write(Arc::clone(&file), b"yy", 8);
        rig.content("f");
        let readable = rig.open("f", false);
        rig.write(readable, b"zz", 0);
        rig.write(file, b"zz", u64::MAX);
        let full = File::options().write(true).open("/dev/full").expect("open");
        rig.write(Arc::new(OwnedFd::from(full)), b"zz", 0);
        let (out, into) = pipe();
        rig.write(into, b"abcd", 77);
        rig.read(out, 10, 0);
    });
}

#[test]
fn fsync_and_fdatasync_are_for_files() {
    tells("done\ndone\nEINVAL", |rig| {
        let file = rig.file("f", b"hello");
        for data_only in [true, false] {
            let file = Arc::clone(&file).into();
            rig.run(Op::Fsync { file, data_only });
        }
        let file = pipe().0.into();
        rig.run(Op::Fsync {
            file,
            data_only: true,
        });
    });
}

#[test]
fn fallocate_reserves_extends_and_punches() {
    let story = "done\n5 bytes, reserved\ndone\n8192 bytes, reserved\ndone\nh...o\n\
        EINVAL\nEINVAL\nEINVAL\nEBADF\nESPIPE";
    tells(story, |rig| {
        let file = rig.file("f", b"hello");
        let with = |file: &Arc<OwnedFd>, mode, offset, len| Op::Fallocate {
            file: Arc::clone(file).into(),
            mode,
            offset,
            len,
        };
        let tell = |m: &std::fs::Metadata| {
            let reserved = if m.blocks() * 512 >= m.len() && m.blocks() > 8 {
                "reserved"
            } else {
                "not"
            };
            format!("{} bytes, {reserved}", m.len())
        };
        let keep = FallocateFlags::KEEP_SIZE;
        rig.run(with(&file, keep, 0, 1 << 20));
        rig.meta("f", tell);
        rig.run(with(&file, FallocateFlags::empty(), 0, 8192));
        rig.meta("f", tell);
        rig.run(with(&file, FallocateFlags::PUNCH_HOLE | keep, 1, 3));
        let mut content = std::fs::read(rig.path("f")).expect("read");
        content.truncate(5);
        rig.say(String::from_utf8_lossy(&content).replace('\0', "."));
        rig.run(with(&file, keep, 0, 0));
        rig.run(with(&file, keep, u64::MAX, 1));
        rig.run(with(&file, keep, 0, u64::MAX));
        let readable = rig.open("f", false);
        rig.run(with(&readable, keep, 0, 10));
        let (_out, into) = pipe();
        rig.run(with(&into, keep, 0, 10));
    });
}

#[test]
fn fadvise_knows_ranges_of_any_length() {
    tells("done\ndone\ndone\nEINVAL\nESPIPE", |rig| {
        let file = rig.file("f", b"hello");
        let with = |file: &Arc<OwnedFd>, offset, len| Op::Fadvise {
            file: Arc::clone(file).into(),
            offset,
            len,
            advice: Advice::DontNeed,
        };
        rig.run(with(&file, 0, 0));
        rig.run(with(&file, 1, 4096));
        rig.run(with(&file, 4096, 5 << 30)); // An entry has 32 bits for it.
        rig.run(with(&file, 0, u64::MAX));
        rig.run(with(&pipe().0, 0, 0));
    });
}

#[test]
fn ftruncate_grows_and_shrinks() {
    tells("done\nhello...\ndone\nhe\nEINVAL\nEINVAL\nEINVAL", |rig| {
        let file = rig.file("f", b"hello");
        let with = |file: &Arc<OwnedFd>, len| Op::Ftruncate {
            file: Arc::clone(file).into(),
            len,
        };
        rig.run(with(&file, 8));
        rig.content("f");
        rig.run(with(&file, 2));
        rig.content("f");
        rig.run(with(&file, u64::MAX));
        rig.run(with(&rig.open("f", false), 1));
        rig.run(with(&pipe().1, 1));
    });
}

#[test]
fn splice_carries_a_file_through_a_pipe() {
    let story = "4\n4\n..ello\n5\n0\nEINVAL\nESPIPE\nEBADF\n0";
    tells(story, |rig| {
        let (from, to) = (rig.file("from", b"hello"), rig.file("to", b""));
        let (out, into) = pipe();
        let with =
            |from: &Arc<OwnedFd>, from_offset, to: &Arc<OwnedFd>, to_offset, len| Op::Splice {
                from: Arc::clone(from).into(),
                from_offset,
                to: Arc::clone(to).into(),
                to_offset,
                len,
            };
        rig.run(with(&from, Some(1), &into, None, 4));
        rig.run(with(&out, None, &to, Some(2), 100));
        rig.content("to");
        rig.run(with(&from, None, &into, None, 5)); // At the file's own position,
        rig.run(with(&from, None, &into, None, 5)); // which has moved to the end.
        rig.run(with(&from, Some(0), &to, Some(0), 5));
        rig.run(with(&from, Some(0), &into, Some(0), 5));
        let readable = rig.open("to", false);
        rig.run(with(&out, None, &readable, Some(0), 5));
        rig.run(with(&from, Some(0), &into, None, 0));
    });
}

#[test]
fn an_xattr_is_set_read_and_measured() {
    let story = "done\n5\nvalue\n5\nERANGE\nENODATA\nEEXIST\nENODATA\ndone\n3\nnew\nEOPNOTSUPP\n\
        done\n0\nE2BIG\nEBADF";
    tells(story, |rig| {
        let file = rig.file("f", b"hello");
        let set = |fd: &Arc<OwnedFd>, name, value: &[u8], flags| Op::SetXattr {
            fd: Arc::clone(fd),
            name: c(name),
            value: value.to_vec(),
            flags,
        };
        let get = |name, room| Op::GetXattr {
            fd: Arc::clone(&file),
            name: c(name),
            value: vec![0; room],
        };
        let value = |rig: &mut Rig, completed: Completed| {
            let Ok(Reply::Count(n)) = completed.result else {
                panic!("no count")
            };
            let value = completed.value.expect("given back");
            rig.say(String::from_utf8_lossy(&value[..n]));
        };
        let none = XattrFlags::empty();
        let given = rig.run(set(&file, "user.a", b"value", none)).value;
        assert_eq!(given.as_deref(), Some(&b"value"[..]));
        let completed = rig.run(get("user.a", 100));
        value(rig, completed);
        rig.run(get("user.a", 0));
        rig.run(get("user.a", 3));
        rig.run(get("user.b", 3));
        rig.run(set(&file, "user.a", b"x", XattrFlags::CREATE));
        rig.run(set(&file, "user.b", b"x", XattrFlags::REPLACE));
        rig.run(set(&file, "user.a", b"new", XattrFlags::REPLACE));
        let completed = rig.run(get("user.a", 3));
        value(rig, completed);
        rig.run(set(&file, "nonsense.a", b"x", none));
        rig.run(set(&file, "user.empty", b"", none));
        rig.run(get("user.empty", 10));
        rig.run(set(&file, "user.a", &[b'x'; 70_000], none));
        let path = rustix::fs::open(rig.path("f"), OFlags::PATH, Mode::empty()).expect("open");
        rig.run(set(&Arc::new(path), "user.a", b"x", none));
    });
}

#[test]
fn close_closes() {
    // The other end of the pipe sees it.
    tells("done\n0\n(end)", |rig| {
        let (out, into) = pipe();
        let fd = Arc::into_inner(into).expect("the only one");
        rig.run(Op::Close { fd });
        rig.read(out, 10, 0);
        rig.story.pop();
        rig.say("(end)");
    });
}

#[test]
fn a_file_in_a_slot_is_read_written_and_closed() {
    let story = "slot 1\n5\nhello\n3\nhelabc\ndone\ndone\ndone\ndone\nhel\n2\nel\n3\n\
        slot 1\n3\nnew\ndone\nEBADF\nEBADF";
    tells(story, |rig| {
        let slot = Slot(1);
        let open = |rig: &Rig, name, flags| Op::Open {
            dir: rig.root(),
            path: c(name),
            how: how(flags, 0),
            slot: Some(slot),
        };
        drop((rig.file("f", b"hello"), rig.file("g", b"new")));
        rig.run(open(rig, "f", OFlags::RDWR | OFlags::CLOEXEC));
        rig.read(slot, 40, 0);
        rig.write(slot, b"abc", 3);
        rig.content("f");
        let file = Target::Slot(slot);
        rig.run(Op::Fsync {
            file: file.clone(),
            data_only: false,
        });
        rig.run(Op::Fallocate {
            file: file.clone(),
            mode: FallocateFlags::KEEP_SIZE,
            offset: 0,
            len: 4096,
        });
        rig.run(Op::Fadvise {
            file: file.clone(),
            offset: 0,
            len: 0,
            advice: Advice::Sequential,
        });
        rig.run(Op::Ftruncate {
            file: file.clone(),
            len: 3,
        });
        rig.content("f");
        let (out, into) = pipe();
        rig.run(Op::Splice {
            from: file.clone(),
            from_offset: Some(1),
            to: into.clone().into(),
            to_offset: None,
            len: 10,
        });
        rig.story.push("el".into());
        rustix::io::write(&into, b"!").expect("write");
        rig.run(Op::Splice {
            from: out.into(),
            from_offset: None,
            to: file,
            to_offset: Some(0),
            len: 10,
        });
        assert_eq!(std::fs::read(rig.path("f")).expect("read"), b"el!");
        rig.run(open(rig, "g", OFlags::RDONLY)); // What was there is closed.
        rig.read(slot, 40, 0);
        rig.run(Op::CloseSlot { slot });
        rig.run(Op::CloseSlot { slot });
        rig.read(slot, 40, 0);
    });
}

#[test]
fn slots_end_where_the_table_does() {
    let story = "EINVAL\nEINVAL\nEBADF\nEINVAL\nEINVAL\nEBADF\nENOENT\nEBADF";
    tells(story, |rig| {
        drop(rig.file("f", b"hello"));
        let open = |rig: &Rig, name, slot| Op::Open {
            dir: rig.root(),
            path: c(name),
            how: how(OFlags::RDONLY, 0),
            slot: Some(slot),
        };
        for slot in [Slot(SLOTS), Slot(u32::MAX)] {
            rig.run(open(rig, "f", slot));
            rig.run(Op::CloseSlot { slot });
            rig.read(slot, 1, 0);
        }
        rig.run(open(rig, "nope", Slot(0)));
        rig.read(Slot(0), 1, 0);
    });
}

#[test]
fn without_a_table_there_are_no_slots() {
    for kernel in [true, false] {
        let config = RingConfig {
            kernel,
            ..RingConfig::default()
        };
        let mut rig = Rig::new(&config, Start::Here);
        drop(rig.file("f", b"hello"));
        let slot = Slot(0);
        rig.run(Op::Open {
            dir: rig.root(),
            path: c("f"),
            how: how(OFlags::RDONLY, 0),
            slot: Some(slot),
        });
        rig.run(Op::CloseSlot { slot });
        rig.read(slot, 1, 0);
        assert_eq!(rig.story, ["ENXIO", "ENXIO", "EBADF"]);
    }
}
