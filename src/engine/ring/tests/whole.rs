//! The ring as a whole: what it waits for, its end, kernels that forbid it, many operations.

use std::time::Duration;

use super::*;

#[test]
fn an_eventfd_wakes_who_waits() {
    tells("8\n8", |rig| {
        for early in [true, false] {
            let fd = Arc::new(sys::fd::eventfd().expect("eventfd"));
            let raise = {
                let fd = Arc::clone(&fd);
                move || sys::fd::eventfd_signal(fd.as_fd()).expect("signal")
            };
            if early {
                raise();
            }
            rig.ring.push(3, Op::EventFd { fd }, rig.start);
            rig.ring.enter(false).expect("enter");
            assert_eq!(rig.ring.in_flight(), 1);
            let raiser = std::thread::spawn(move || {
                if !early {
                    std::thread::sleep(Duration::from_millis(5));
                    raise();
                }
            });
            let completed = rig.wait();
            assert_eq!(completed.token, 3);
            rig.say(told(&completed.result));
            raiser.join().expect("no panic");
        }
    });
}

#[test]
fn nobody_waits_when_nothing_is_in_flight() {
    tells("", |rig| {
        rig.ring.enter(true).expect("enter");
        assert!(rig.ring.pop().is_none());
    });
}

#[test]
fn a_ring_that_is_dropped_lets_nobody_write_into_freed_memory() {
    for start in [Start::Here, Start::Elsewhere] {
        let config = RingConfig {
            slots: SLOTS,
            ..RingConfig::default()
        };
        let mut rig = Rig::new(&config, start);
        if rig.ring.no_kernel().is_some() {
            return; // Then nothing is ever in flight but an eventfd.
        }
        let file = rig.file("f", &[1; 100_000]);
        let (out, into) = pipe();
        let fd = Arc::new(sys::fd::eventfd().expect("eventfd"));
        rig.ring.push(0, Op::EventFd { fd }, start);
        for source in [out, Arc::clone(&file)] {
            let read = Op::Read {
                file: source.into(),
                buffer: rig.buffer(),
                range: 0..1 << 16,
                offset: 0,
                once: false,
            };
            rig.ring.push(1, read, start); // Of the pipe nothing ever comes.
        }
        let write = Op::Write {
            file: file.into(),
            buffer: rig.buffer(),
            range: 0..1 << 16,
            offset: 1 << 20,
            once: false,
        };
        rig.ring.push(2, write, start);
        for _ in 0..50 {
            let (dir, path) = (rig.root(), Some(c("f")));
            let fresh = false;
            rig.ring.push(3, Op::Statx { dir, path, fresh }, start);
        }
        rig.ring.enter(false).expect("enter");
        let path = rig.path("f");
        let Rig {
            ring, buffers, dir, ..
        } = rig;
        drop(buffers); // Those that nobody uses may go first.
        drop(ring);
        let size = std::fs::metadata(path).expect("stat").len();
        assert_eq!(size, (1 << 20) + (1 << 16), "a write is waited for");
        drop((into, dir));
    }
}

#[test]
fn a_ring_that_is_dropped_waits_for_no_read_that_was_about_to_be_polled() {
    for _ in 0..500 {
        let mut rig = Rig::new(&RingConfig::default(), Start::Elsewhere);
        if rig.ring.no_kernel().is_some() {
            return;
        }
        let pipes: Vec<_> = (0..2).map(|_| pipe()).collect();
        for (n, (out, _)) in pipes.iter().enumerate() {
            let read = Op::Read {
                file: Arc::clone(out).into(),
                buffer: rig.buffer(),
                range: 0..1,
                offset: 0,
                once: false,
            };
            rig.ring.push(n as u64, read, Start::Elsewhere);
        }
        rig.ring.enter(false).expect("enter");
        drop(rig);
    }
}

#[test]
fn an_operation_that_was_never_entered_ends_with_the_ring() {
    let mut rig = Rig::new(&RingConfig::default(), Start::Here);
    let file = rig.file("f", b"hello");
    let count = Arc::strong_count(&file);
    let op = Op::Fsync {
        file: Arc::clone(&file).into(),
        data_only: true,
    };
    rig.ring.push(0, op, Start::Here);
    drop(rig);
    assert_eq!(Arc::strong_count(&file), count, "let go of");
}

#[test]
fn more_operations_than_the_queues_hold_all_come_back() {
    for kernel in [true, false] {
        let config = RingConfig {
            ops_max: 8,
            kernel,
            ..RingConfig::default()
        };
        let mut rig = Rig::new(&config, Start::Here);
        let file = rig.file("f", b"hello");
        let total = 1000;
        for token in 0..total {
            let dir = Arc::clone(&file);
            let start = match token % 2 {
                0 => Start::Here,
                _ => Start::Elsewhere,
            };
            let (path, fresh) = (None, false);
            rig.ring.push(token, Op::Statx { dir, path, fresh }, start);
        }
        let mut tokens: Vec<u64> = (0..total).map(|_| rig.wait().token).collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..total), "each once");
        assert_eq!(rig.ring.in_flight(), 0);
        assert_eq!(Arc::strong_count(&file), 1, "nothing is held any more");
    }
}

#[test]
fn buffers_are_registered_whole_once_and_only_where_there_is_a_ring() {
    let mut ring = Ring::new(&RingConfig::default());
    let mut pool = BufferPool::new(2, 2, 1 << 17);
    if ring.no_kernel().is_none() {
        let taken = pool.take(1 << 17, Priority::Demand).expect("a buffer");
        assert_eq!(ring.register(&mut pool), Err(Errno::INVAL), "one is away");
        pool.give(taken);
        assert_eq!(ring.register(&mut pool), Ok(()));
        assert_eq!(ring.register(&mut pool), Err(Errno::INVAL), "again");
    }
    let config = RingConfig {
        kernel: false,
        ..RingConfig::default()
    };
    let mut none = Ring::new(&config);
    assert_eq!(none.no_kernel(), Some(Errno::NOSYS));
    assert_eq!(none.register(&mut pool), Err(Errno::NOSYS));
}

#[test]
fn a_buffer_of_another_pool_is_no_registered_one() {
    // Same index, other memory: as a registered buffer it would be EFAULT.
    let mut rig = Rig::new(&RingConfig::default(), Start::Here);
    rig.buffers = BufferPool::new(SMALL, 2, 1 << 17);
    let file = rig.file("f", b"hello");
    rig.read(file, 5, 0);
    assert_eq!(rig.story, ["5", "hello"]);
}

#[test]
fn the_kernels_worker_limit_may_be_raised() {
    let config = RingConfig {
        kernel_workers_max: 200,
        ..RingConfig::default()
    };
    let mut rig = Rig::new(&config, Start::Elsewhere);
    let file = rig.file("f", b"hello");
    rig.read(file, 5, 0);
    assert_eq!(rig.story, ["5", "hello"]);
    if let Ok(uring) = &rig.ring.kernel {
        let mut now = [0, 0]; // Zeros only ask.
        let asked = uring.submitter().register_iowq_max_workers(&mut now);
        assert!(asked.is_err() || now[0] == 200, "{now:?}");
    }
}

#[test]
fn where_io_uring_is_forbidden_everything_works_without() {
    // As a container's seccomp profile does it; the filter ends with its thread.
    for errno in [libc::EPERM, libc::ENOSYS] {
        let thread = std::thread::spawn(move || {
            forbid_io_uring(errno);
            let mut rig = Rig::new(
                &RingConfig {
                    slots: SLOTS,
                    ..RingConfig::default()
                },
                Start::Elsewhere,
            );
            assert_eq!(rig.ring.no_kernel().map(Errno::raw_os_error), Some(errno));
            assert!(!rig.ring.supports(Opcode::Read));
            let file = rig.file("f", b"hello");
            rig.read(Arc::clone(&file), 40, 1);
            rig.write(file, b"xx", 0);
            rig.content("f");
            let missing = Op::Unlink {
                dir: rig.root(),
                path: c("nope"),
                flags: rustix::fs::AtFlags::empty(),
            };
            rig.run(missing);
            assert_eq!(rig.story, ["4", "ello", "2", "xxllo", "ENOENT"]);
        });
        thread.join().expect("no panic");
    }
}

/// From now on io_uring_setup fails in this thread.
fn forbid_io_uring(errno: i32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let refuse = libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
    let filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // The call's number.
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which is whole; it concerns this thread alone.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(set, 0, "seccomp");
}
