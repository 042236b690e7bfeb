//! FUSE over io_uring: its own promises. The rest of the suite runs over it too, where the kernel has it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};

use crate::fixture::{self, LoopFs, Mounted, World, bytes, can_mount, need, wait_until};
use crate::upgrade::upgrade;

const URING: [&str; 3] = ["--no-background", "-o", "transport=uring"];

/// True when mounts through io_uring can be made here.
pub(crate) fn can_ring() -> bool {
    let setting = Path::new("/sys/module/fuse/parameters/enable_uring");
    can_mount()
        && need(setting.exists(), "FUSE over io_uring (Linux 6.14)")
        && need(
            fs::write(setting, "Y").is_ok() || fs::read(setting).is_ok_and(|v| v[0] == b'Y'),
            "fuse.enable_uring",
        )
}

fn pin_to_cpu(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    // A machine with one CPU has one queue: all are there anyway.
    let _ = rustix::thread::sched_setaffinity(None, &set); // See above.
}

/// A file's size, as the daemon says it: not from the kernel's cache.
fn size_asked_for(path: &Path) -> u64 {
    let flags = rustix::fs::AtFlags::STATX_FORCE_SYNC;
    let mask = rustix::fs::StatxFlags::BASIC_STATS;
    let found = rustix::fs::statx(rustix::fs::CWD, path, flags, mask).unwrap();
    found.stx_size
}

#[track_caller]
fn expect_ring(mounted: &Mounted) {
    let log = mounted.log();
    assert!(log.contains("requests come through io_uring"), "{log}");
}

/// A src whose files `h*` keep every read waiting, until they are let go.
struct Hung {
    files: u64,
    gate: Arc<(Mutex<Gate>, Condvar)>,
}

#[derive(Default)]
struct Gate {
    open: bool,
    waiting: usize,
}

const TTL: Duration = Duration::from_secs(60);
const LEN: usize = 100;

impl Hung {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let at = std::time::UNIX_EPOCH + Duration::from_secs(1);
        let dir = ino.0 == 1;
        FileAttr {
            ino,
            size: if dir { 0 } else { LEN as u64 },
            blocks: 1,
            atime: at,
            mtime: at,
            ctime: at,
            crtime: at,
            kind: if dir {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if dir { 0o755 } else { 0o644 },
            nlink: if dir { 2 } else { 1 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The first half of the files hangs.
    fn name(&self, ino: u64) -> String {
        let kind = if ino - 2 < self.files / 2 { 'h' } else { 'f' };
        format!("{kind}{}", (ino - 2) % (self.files / 2))
    }
}

impl Filesystem for Hung {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = (2..2 + self.files).find(|i| OsStr::new(&self.name(*i)) == name);
        match found {
            Some(ino) => reply.entry(&TTL, &self.attr(INodeNo(ino)), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(ino.0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let answer = move || {
            let data = bytes(ino.0, LEN);
            reply.data(&data[LEN.min(offset as usize)..]);
        };
        if !self.name(ino.0).starts_with('h') {
            return answer();
        }
        let gate = Arc::clone(&self.gate);
        thread::spawn(move || {
            let mut state = gate.0.lock().unwrap();
            state.waiting += 1;
            while !state.open {
                state = gate.1.wait(state).unwrap();
            }
            answer();
        });
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, from: u64, mut r: ReplyDirectory) {
        for at in from..self.files {
            let kind = FileType::RegularFile;
            if r.add(INodeNo(at + 2), at + 1, kind, self.name(at + 2)) {
                break;
            }
        }
        r.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}

/// A migration whose source hangs for half of its files.
struct Dead {
    world: World,
    gate: Arc<(Mutex<Gate>, Condvar)>,
    source: fuser::BackgroundSession,
    _scratch: tempfile::TempDir,
}

const WAITING: u64 = 300;

impl Dead {
    fn new() -> Dead {
        let fs = LoopFs::new("ext4");
        let dst = fs.dir("dst");
        let scratch = tempfile::tempdir().unwrap();
        let src = scratch.path().join("src");
        fs::create_dir(&src).unwrap();
        let gate = Arc::new((Mutex::new(Gate::default()), Condvar::new()));
        let hung = Hung {
            files: 2 * WAITING,
            gate: Arc::clone(&gate),
        };
        let source = fuser::spawn_mount(hung, &src, &fuser::Config::default()).unwrap();
        Dead {
            world: World::from(src, dst, vec![fs]),
            gate,
            source,
            _scratch: scratch,
        }
    }

    /// The files that come are here, and as many users as there are others wait for them, all on the
    /// first CPU, while `act` works. Then the source answers, and everybody gets his bytes.
    /// `still`: nobody has them before `act` has ended.
    fn while_users_wait(self, env: &[(&str, &str)], still: bool, act: impl FnOnce(&Mounted)) {
        let mounted = self.world.mount_with(&URING, env);
        expect_ring(&mounted);
        for n in 0..WAITING {
            let read = fs::read(mounted.path(format!("f{n}"))).unwrap();
            assert_eq!(read, bytes(2 + WAITING + n, LEN), "f{n}");
        }
        let barrier = Barrier::new(WAITING as usize);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..WAITING)
                .map(|n| {
                    let (barrier, path) = (&barrier, mounted.path(format!("h{n}")));
                    scope.spawn(move || {
                        // One queue has them all.
                        pin_to_cpu(0);
                        barrier.wait();
                        fs::read(path).unwrap()
                    })
                })
                .collect();
            wait_until("reads that hang", Duration::from_secs(20), || {
                self.gate.0.lock().unwrap().waiting > 0
            });
            // Whatever becomes of it, nobody waits for ever.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(&mounted)));
            let waited = readers.iter().all(|r| !r.is_finished());
            let log = mounted.log();
            assert!(!log.contains("requests may wait for a slot"), "{log}");
            self.gate.0.lock().unwrap().open = true;
            self.gate.1.notify_all();
            for (n, reader) in readers.into_iter().enumerate() {
                assert_eq!(reader.join().unwrap(), bytes(2 + n as u64, LEN), "h{n}");
            }
            done.unwrap();
            assert!(waited || !still, "they waited all the time");
        });
        assert!(matches!(mounted.unmount(), 0 | 20));
        self.source.umount_and_join().unwrap();
    }
}

/// A thousand looks at files that are here, and opens of them; how long the longest took.
fn look(mounted: &Mounted, cpu: usize) -> Duration {
    pin_to_cpu(cpu);
    let mut longest = Duration::ZERO;
    for n in 0..1000 {
        let begin = Instant::now();
        let path = mounted.path(format!("f{}", n % WAITING));
        assert_eq!(size_asked_for(&path), LEN as u64);
        let file = fs::File::open(&path).unwrap();
        file.read_exact_at(&mut [0], 7).unwrap();
        longest = longest.max(begin.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    longest
}

/// Also on the CPU that those who wait came from.
#[test]
fn users_who_wait_for_a_dead_source_stop_nobody_else() {
    if !can_ring() {
        return;
    }
    Dead::new().while_users_wait(&[], true, |mounted| {
        thread::scope(|scope| {
            for looker in [0, 1].map(|cpu| scope.spawn(move || look(mounted, cpu))) {
                let longest = looker.join().unwrap();
                assert!(longest < Duration::from_secs(5), "{longest:?}");
            }
        });
    });
}

/// Each of them holds a slot, in memory that the queue got as it needed it: the next program has all of
/// them, and takes up what each asked for.
#[test]
fn hundreds_who_wait_get_their_bytes_from_the_next_program() {
    if !can_ring() {
        return;
    }
    let dead = Dead::new();
    let gate = Arc::clone(&dead.gate);
    dead.while_users_wait(&[], false, |mounted| {
        // The old program ends when its own reads of this source have: it is another FUSE file system.
        let opener = thread::spawn(move || {
            thread::sleep(Duration::from_secs(2));
            gate.0.lock().unwrap().open = true;
            gate.1.notify_all();
        });
        upgrade(mounted);
        opener.join().unwrap();
        assert_eq!(size_asked_for(&mounted.path("f0")), LEN as u64);
    });
}

/// The control: a queue that does not grow is full of those who wait, and one who looks waits too.
#[test]
fn with_too_few_slots_everybody_on_that_cpu_would_wait() {
    if !can_ring() || !need(cfg!(feature = "fault"), "the feature fault") {
        return;
    }
    let few = [("MIRRORFS_FAULT_SLOTS", "64")];
    let (told, hears) = std::sync::mpsc::channel();
    Dead::new().while_users_wait(&few, true, |mounted| {
        let path = mounted.path("f0");
        thread::spawn(move || {
            pin_to_cpu(0);
            // The barrier has let them all go; this one comes after the most of them.
            thread::sleep(Duration::from_millis(500));
            let _ = told.send(size_asked_for(&path)); // Only when the test has failed already.
        });
        let early = hears.recv_timeout(Duration::from_secs(3));
        assert!(early.is_err(), "it was answered: {early:?}");
    });
    assert_eq!(hears.recv_timeout(Duration::from_secs(20)), Ok(LEN as u64));
}

#[test]
fn a_daemon_that_is_killed_leaves_errors_and_a_new_one_takes_over() {
    if !can_ring() {
        return;
    }
    let world = World::on("ext4").over();
    fs::write(world.src.join("file"), "text").unwrap();
    let mounted = world.mount_with(&URING, &[]);
    expect_ring(&mounted);
    assert_eq!(fs::read(mounted.path("file")).unwrap(), b"text");
    mounted.kill();
    let gone = fs::read(world.at.join("file")).unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(libc::ENOTCONN));
    let again = world.mount_with(&URING, &[]);
    expect_ring(&again);
    assert_eq!(fs::read(again.path("file")).unwrap(), b"text");
    again.finish();
    world.expect_finished_copy();
}

#[test]
fn open_files_live_on_through_io_uring_after_a_lazy_unmount() {
    if !can_ring() {
        return;
    }
    let world = World::on("ext4");
    fs::create_dir(world.src.join("dir")).unwrap();
    fs::write(world.src.join("dir/file"), bytes(1, 100_000)).unwrap();
    let mut mounted = world.mount_with(&URING, &[]);
    expect_ring(&mounted);
    let dir = fs::File::open(mounted.path("dir")).unwrap();
    rustix::mount::unmount(&world.at, rustix::mount::UnmountFlags::DETACH).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(mounted.runs(), "a directory is open");
    // Hydrated in the detached mount, by its daemon.
    let flags = rustix::fs::OFlags::RDONLY;
    let file = rustix::fs::openat(&dir, "file", flags, rustix::fs::Mode::empty()).unwrap();
    let mut read = vec![0; 100_000];
    fs::File::from(file).read_exact_at(&mut read, 0).unwrap();
    assert!(read == bytes(1, 100_000));
    drop(dir);
    let code = mounted.wait_exit(Duration::from_secs(10));
    assert!(matches!(code, Some(0 | 20)), "{code:?}");
}

/// CAP_FSETID is dropped on the threads of the queues, and on those that help them.
#[test]
fn a_users_write_clears_setuid_over_io_uring_too() {
    if !can_ring() {
        return;
    }
    let world = World::on("ext4");
    let mounted = world.mount_with(&URING, &[]);
    expect_ring(&mounted);
    fs::set_permissions(mounted.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    for (name, script) in [
        ("write", "chmod 6755 write; printf x >> write"),
        ("cut", "chmod 6755 cut; truncate -s 1 cut"),
        ("room", "chmod 6755 room; fallocate -l 100000 room"),
    ] {
        let path = mounted.path(name);
        fs::write(&path, "0123456789").unwrap();
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
        fixture::shell_as(65534, 65534, &mounted.path(""), script).expect_code(0);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o6000, 0, "{name}: {mode:o}");
    }
    assert!(matches!(mounted.unmount(), 0 | 20));
}

/// Asking for what is not there is no error.
/// Whether this kernel is one that io_uring is the default on.
fn is_default() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_str().unwrap();
    let numbers = release
        .split(['.', '-'])
        .map(|n| n.parse::<u32>().unwrap_or(0));
    numbers.take(2).collect::<Vec<_>>() >= vec![6, 18]
}

#[test]
fn dev_and_uring_can_be_asked_for_and_give_the_same_tree() {
    if !can_ring() {
        return;
    }
    let world = World::on("ext4");
    fs::write(world.src.join("file"), bytes(3, 3_000_000)).unwrap();
    let ways: [(&[&str], bool); 4] = [
        (&["--transport", "dev"], false),
        (&["--transport", "uring"], true),
        (&["--transport", "auto"], is_default()),
        (&["--transport", "auto", "--keep-mount"], false),
    ];
    for (way, by_ring) in ways {
        let args = [&["--no-background"], way].concat();
        let mounted = world.mount_with(&args, &[]);
        assert!(fs::read(mounted.path("file")).unwrap() == bytes(3, 3_000_000));
        let log = mounted.log();
        let says = log.contains("requests come through io_uring");
        assert_eq!(says, by_ring, "{way:?}: {log}");
        // 20: not complete.
        assert!(matches!(mounted.unmount(), 0 | 20));
    }
}
