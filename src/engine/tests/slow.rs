//! The engine on a source that takes its time: a FUSE file system with a delay for every call,
//! and files that never answer.

use std::ffi::OsStr;
use std::time::UNIX_EPOCH;

use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request,
};
use parking_lot::Mutex;

use super::*;

const FILE_BYTES: usize = 3000;
const DELAY: Duration = Duration::from_millis(1);

/// Files named by their numbers; reads of those from HANGS on are answered when it is dropped.
struct SlowFs {
    hung: Arc<Mutex<Vec<ReplyData>>>,
}

const HANGS: u64 = 1_000_000;

fn attr(ino: u64) -> FileAttr {
    let is_dir = ino == 1;
    FileAttr {
        ino: INodeNo(ino),
        size: FILE_BYTES as u64,
        blocks: 8,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_dir {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for SlowFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Without it the kernel sends one lookup per directory at a time.
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS); // Slower, not wrong.
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        std::thread::sleep(DELAY);
        match name.to_str().and_then(|n| n.parse::<u64>().ok()) {
            Some(n) => reply.entry(&Duration::ZERO, &attr(n + 2), Generation(0)),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        std::thread::sleep(DELAY);
        reply.attr(&Duration::ZERO, &attr(ino.into()));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        std::thread::sleep(DELAY);
        let n = u64::from(ino) - 2;
        if n >= HANGS {
            return self.hung.lock().push(reply);
        }
        let bytes = noise(FILE_BYTES, n);
        let start = (offset as usize).min(bytes.len());
        reply.data(&bytes[start..(start + size as usize).min(bytes.len())]);
    }
}

/// Runs a test whose mounts go when this process does, however that ends.
fn in_mounts_of_its_own(test: impl FnOnce() + Send) {
    match rustix::process::geteuid().is_root() {
        true => sys::local::in_private_mounts(test).expect("unshare"),
        false => test(),
    }
}

/// A bench over a slow source, the replies that it holds back, and what unmounts it.
type SlowBench = (Bench, Arc<Mutex<Vec<ReplyData>>>, Unmount);

/// `None` where nothing can be mounted.
fn slow_bench(config: &EngineConfig) -> Option<SlowBench> {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = dir.path().join("src");
    std::fs::create_dir(&src).expect("mkdir");
    let hung = Arc::new(Mutex::new(Vec::new()));
    let mut options = fuser::Config::default();
    options.n_threads = Some(64);
    options.clone_fd = true;
    let session = fuser::spawn_mount(
        SlowFs {
            hung: Arc::clone(&hung),
        },
        &src,
        &options,
    );
    let Ok(session) = session else {
        eprintln!("skipped: cannot mount FUSE: {:?}", session.err());
        assert!(std::env::var_os("MIRRORFS_TEST_ALL").is_none());
        return None;
    };
    Some((
        Bench::on(dir, config, usize::MAX),
        hung,
        Unmount(Some(session)),
    ))
}

struct Unmount(Option<fuser::BackgroundSession>);

impl Drop for Unmount {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

#[test]
fn a_slow_source_is_asked_for_many_files_at_once() {
    in_mounts_of_its_own(|| {
        let Some((b, _, unmount)) = slow_bench(&config()) else {
            return;
        };
        let since = Instant::now();
        let mut waiting = Vec::new();
        for i in 0..1000 {
            let (job, heard) = b.job(&i.to_string(), Span::Whole, Priority::Background);
            b.engine.submit(job).expect("submitted");
            waiting.push(heard);
        }
        for (i, heard) in waiting.iter().enumerate() {
            ok(wait(heard));
            let copy = std::fs::read(b.dst(&i.to_string())).expect("read");
            assert!(copy == noise(FILE_BYTES, i as u64));
        }
        let took = since.elapsed();
        eprintln!("1000 files, 1 ms per call: {took:?}");
        // lookup, statx, read, statx, one after the other, would take four seconds and more.
        assert!(took < Duration::from_secs(4), "{took:?}");
        drop(b);
        drop(unmount);
    });
}

#[test]
fn files_that_hang_hold_up_nobody_else() {
    others_are_served_beside(Priority::Background);
}

#[test]
fn what_is_read_ahead_and_hangs_holds_up_nobody_who_waits() {
    others_are_served_beside(Priority::Ahead);
}

/// Files that hang, more of this lane than may be in flight.
fn others_are_served_beside(lane: Priority) {
    in_mounts_of_its_own(|| {
        let config = EngineConfig {
            workers: 1,
            files_in_flight_max: 32,
            ..config()
        };
        let Some((b, hung, unmount)) = slow_bench(&config) else {
            return;
        };
        let mut waiting = Vec::new();
        // And some that somebody waits for.
        for i in 0..40 {
            let priority = if i < 4 { Priority::Demand } else { lane };
            let (job, heard) = b.job(&(HANGS + i).to_string(), Span::Whole, priority);
            b.engine.submit(job).expect("submitted");
            waiting.push(heard);
        }
        for i in 0..50 {
            ok(b.run(&i.to_string(), Span::Whole, Priority::Demand));
        }
        // The server dies; every job hears of it.
        while !waiting.is_empty() {
            for reply in hung.lock().drain(..) {
                reply.error(fuser::Errno::EIO);
            }
            waiting.retain(|heard| match heard.recv_timeout(Duration::from_millis(5)) {
                Ok(heard) => {
                    let outcome = heard.outcome.expect("done");
                    assert!(matches!(
                        outcome,
                        Err(Error::Call {
                            call: "read",
                            errno: Errno::IO,
                            ..
                        })
                    ));
                    false
                }
                Err(_) => true,
            });
        }
        drop(b);
        drop(unmount);
    });
}
