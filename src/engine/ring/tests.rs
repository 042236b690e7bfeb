//! Each operation through io_uring and as a system call: the same answers, the same effects.
//!
//! A test is a script of operations in a fresh directory. It runs with everything that the kernel
//! has, with what older kernels had, with each opcode switched off, and without io_uring; each run
//! must tell the story that the test expects, word by word.

mod files;
mod names;
mod whole;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::*;
use crate::engine::job::Priority;

const SMALL: usize = 3;
const SLOTS: u32 = 4;

/// A ring, a directory and what was heard.
struct Rig {
    ring: Ring,
    buffers: BufferPool,
    start: Start,
    dir: tempfile::TempDir,
    root: Arc<OwnedFd>,
    story: Vec<String>,
}

/// The ways to run a script: name, ring, and where operations begin.
fn ways() -> Vec<(String, RingConfig, Start)> {
    let config = |off: Opcodes, kernel| RingConfig {
        slots: SLOTS,
        off,
        kernel,
        ..RingConfig::default()
    };
    let mut ways = vec![(
        "no io_uring".to_owned(),
        config(Opcodes::NONE, false),
        Start::Here,
    )];
    let whole = Ring::new(&RingConfig::default());
    if let Some(errno) = whole.no_kernel() {
        let all = std::env::var_os("MIRRORFS_TEST_ALL").is_some();
        assert!(!all, "no io_uring: {errno}");
        eprintln!("skipped: no io_uring ({errno})");
        return ways;
    }
    let table = Opcode::table();
    for since in [(5, 6), (5, 7), (5, 11), (5, 15), (5, 19), (6, 9)] {
        let newer = table.iter().filter(|row| row.since > since);
        let off: Opcodes = newer.map(|row| row.opcode).collect();
        for start in [Start::Here, Start::Elsewhere] {
            ways.push((format!("as {since:?}, {start:?}"), config(off, true), start));
        }
    }
    for row in table {
        let off = config(row.opcode.into(), true);
        ways.push((format!("without {}", row.name), off, Start::Here));
    }
    let plain = Opcodes::parse("read_fixed,write_fixed").expect("names");
    ways.push(("plain buffers".into(), config(plain, true), Start::Here));
    let none = config(Opcodes::all(), true);
    ways.push(("all switched off".into(), none, Start::Here));
    ways
}

/// Runs a script in every way; each must tell this story.
#[track_caller]
fn tells(story: &str, script: impl Fn(&mut Rig)) {
    let expected: Vec<_> = story
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    for (way, config, start) in ways() {
        let mut rig = Rig::new(&config, start);
        script(&mut rig);
        assert_eq!(rig.story, expected, "{way}");
        assert_eq!(rig.ring.in_flight(), 0, "{way}");
    }
}

impl Rig {
    fn new(config: &RingConfig, start: Start) -> Rig {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = Arc::new(File::open(dir.path()).expect("open").into());
        let mut ring = Ring::new(config);
        let mut buffers = BufferPool::new(SMALL, 2, 1 << 17);
        if ring.no_kernel().is_none() {
            ring.register(&mut buffers).expect("buffers are few");
        }
        Rig {
            ring,
            buffers,
            start,
            dir,
            root,
            story: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn root(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.root)
    }

    /// A file with this content, open for reading and writing.
    fn file(&self, name: &str, content: &[u8]) -> Arc<OwnedFd> {
        std::fs::write(self.path(name), content).expect("write");
        self.open(name, true)
    }

    fn open(&self, name: &str, write: bool) -> Arc<OwnedFd> {
        let file = File::options()
            .read(true)
            .write(write)
            .open(self.path(name));
        Arc::new(file.expect("open").into())
    }

    fn content(&mut self, name: &str) {
        let content = std::fs::read(self.path(name)).expect("read");
        self.say(String::from_utf8_lossy(&content).replace('\0', "."));
    }

    fn say(&mut self, text: impl Into<String>) {
        self.story.push(text.into());
    }

    /// What a file's metadata says.
    fn meta(&mut self, name: &str, tell: impl Fn(&std::fs::Metadata) -> String) {
        let meta = std::fs::symlink_metadata(self.path(name));
        let text = meta.map_or_else(|e| format!("{:?}", e.kind()), |m| tell(&m));
        self.say(text);
    }

    /// Makes an operation, and notes its answer.
    fn run(&mut self, op: Op) -> Completed {
        let completed = self.make(op);
        self.say(told(&completed.result));
        completed
    }

    fn make(&mut self, op: Op) -> Completed {
        self.ring.push(7, op, self.start);
        let completed = self.wait();
        assert_eq!(completed.token, 7);
        completed
    }

    fn wait(&mut self) -> Completed {
        loop {
            if let Some(completed) = self.ring.pop() {
                return completed;
            }
            self.ring.enter(true).expect("enter");
        }
    }

    /// Reads, notes the count and the bytes.
    fn read(&mut self, file: impl Into<Target>, len: usize, offset: u64) {
        let mut buffer = self.buffer();
        buffer.bytes_mut(0..64).fill(b'-');
        let op = Op::Read {
            file: file.into(),
            buffer,
            range: 10..10 + len,
            offset,
            once: false,
        };
        let completed = self.run(op);
        let buffer = completed.buffer.expect("given back");
        assert!(buffer.bytes(0..10).iter().all(|b| *b == b'-'), "before");
        if let Ok(Reply::Count(n)) = completed.result {
            let bytes = String::from_utf8_lossy(buffer.bytes(10..10 + n)).into_owned();
            self.say(bytes);
        }
        self.buffers.give(buffer);
    }

    fn write(&mut self, file: impl Into<Target>, bytes: &[u8], offset: u64) {
        let mut buffer = self.buffer();
        buffer.bytes_mut(5..5 + bytes.len()).copy_from_slice(bytes);
        let op = Op::Write {
            file: file.into(),
            buffer,
            range: 5..5 + bytes.len(),
            offset,
            once: false,
        };
        let completed = self.run(op);
        self.buffers.give(completed.buffer.expect("given back"));
    }

    fn buffer(&mut self) -> Buffer {
        self.buffers.take(1, Priority::Demand).expect("a buffer")
    }
}

fn told(result: &Result<Reply, Errno>) -> String {
    match result {
        Ok(Reply::Fd(_)) => "fd".into(),
        Ok(Reply::Slot(slot)) => format!("slot {}", slot.0),
        Ok(Reply::Stat(_)) => "stat".into(),
        Ok(Reply::Count(n)) => format!("{n}"),
        Ok(Reply::Done) => "done".into(),
        Err(errno) => name_of(*errno),
    }
}

fn name_of(errno: Errno) -> String {
    let known = [
        (Errno::NOENT, "ENOENT"),
        (Errno::EXIST, "EEXIST"),
        (Errno::BADF, "EBADF"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::ISDIR, "EISDIR"),
        (Errno::NOTEMPTY, "ENOTEMPTY"),
        (Errno::INVAL, "EINVAL"),
        (Errno::LOOP, "ELOOP"),
        (Errno::XDEV, "EXDEV"),
        (Errno::SPIPE, "ESPIPE"),
        (Errno::NOSPC, "ENOSPC"),
        (Errno::NODATA, "ENODATA"),
        (Errno::RANGE, "ERANGE"),
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::NXIO, "ENXIO"),
        (Errno::PERM, "EPERM"),
        (Errno::AGAIN, "EAGAIN"),
        (Errno::NAMETOOLONG, "ENAMETOOLONG"),
        (Errno::FBIG, "EFBIG"),
        (Errno::TOOBIG, "E2BIG"),
    ];
    let found = known.iter().find(|(e, _)| *e == errno);
    found.map_or_else(|| format!("{errno:?}"), |(_, name)| (*name).into())
}

fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

fn pipe() -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let (out, into) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    (Arc::new(out), Arc::new(into))
}

fn how(flags: OFlags, mode: u32) -> How {
    How {
        flags,
        mode: Mode::from_raw_mode(mode),
        resolve: ResolveFlags::BENEATH,
    }
}

use std::ffi::CString;
