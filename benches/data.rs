//! The ways to copy the bytes of one large file, side by side on this kernel.
//!
//! `DATA_SRC` and `DATA_DST` are directories on the file systems to be measured (default: the temporary
//! one), `DATA_MIB` is the size of the file (256), `DATA_ROUNDS` how many rounds (5), each of which
//! runs all ways in turn. `DATA_COLD=1` forgets src's pages before each copy, `DATA_SYNC=1` counts
//! until fdatasync has returned. A word on the command line chooses the ways that have it in their
//! names. Prints medians: seconds for one thread and for two on the halves, processor seconds, and
//! how much of src and dst is in the page cache afterwards.
#![allow(unsafe_code)] // mmap and io_uring as they are: what the program itself does not use.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A program's output.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Result};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Instant;

use rustix::io::ReadWriteFlags;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

type Copy = fn(&File, &File, Range<u64>) -> Result<()>;

/// One way to copy.
struct Way {
    name: &'static str,
    /// O_DIRECT on src, on dst.
    direct: (bool, bool),
    /// Reserve the room first.
    reserve: bool,
    copy: Copy,
}

const fn way(name: &'static str, copy: Copy) -> Way {
    Way {
        name,
        direct: (false, false),
        reserve: false,
        copy,
    }
}

const fn direct(name: &'static str, src: bool, dst: bool, copy: Copy) -> Way {
    Way {
        name,
        direct: (src, dst),
        reserve: dst,
        copy,
    }
}

const WAYS: &[Way] = &[
    way("read write 128K", |s, d, r| read_write(s, d, r, 128 * KIB)),
    way("read write 1M", |s, d, r| read_write(s, d, r, MIB)),
    Way {
        reserve: true,
        ..way("read write 128K, KEEP_SIZE", |s, d, r| {
            read_write(s, d, r, 128 * KIB)
        })
    },
    way("splice 128K", |s, d, r| splice(s, d, r, 128 * KIB)),
    way("splice 1M", |s, d, r| splice(s, d, r, MIB)),
    Way {
        reserve: true,
        ..way("splice 1M, KEEP_SIZE", |s, d, r| splice(s, d, r, MIB))
    },
    way("copy_file_range 128K", |s, d, r| {
        copy_range(s, d, r, 128 * KIB)
    }),
    way("copy_file_range 4M", |s, d, r| copy_range(s, d, r, 4 * MIB)),
    way("copy_file_range 1G", |s, d, r| copy_range(s, d, r, 1 << 30)),
    way("sendfile 4M", sendfile),
    way("mmap src, write", |s, d, r| mapped(s, d, r, false)),
    way("mmap both", |s, d, r| mapped(s, d, r, true)),
    way("RWF_DONTCACHE 1M", |s, d, r| {
        flagged(s, d, r, MIB, DONTCACHE, DONTCACHE)
    }),
    way("RWF_DONTCACHE 256K", |s, d, r| {
        flagged(s, d, r, 256 * KIB, DONTCACHE, DONTCACHE)
    }),
    way("RWF_DONTCACHE dst, 1M", |s, d, r| {
        flagged(s, d, r, MIB, ReadWriteFlags::empty(), DONTCACHE)
    }),
    way("read write, then dropped", dropped),
    direct("O_DIRECT src 1M", true, false, |s, d, r| {
        read_write(s, d, r, MIB)
    }),
    direct("O_DIRECT dst 1M", false, true, |s, d, r| {
        read_write(s, d, r, MIB)
    }),
    direct("O_DIRECT both 1M", true, true, |s, d, r| {
        read_write(s, d, r, MIB)
    }),
    way("ring 8 x 512K", |s, d, r| ring(s, d, r, 8, false)),
    way("ring 8 x 512K async", |s, d, r| ring(s, d, r, 8, true)),
    direct("ring 8 x 512K O_DIRECT", true, true, |s, d, r| {
        ring(s, d, r, 8, false)
    }),
];

/// Aligned memory for O_DIRECT.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Aligned {
        let memory = vec![1u8; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Aligned(memory, start)
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

/// Calls `piece` for the next bytes until the range is done; it says how many it did.
fn pieces(
    range: Range<u64>,
    len: usize,
    mut piece: impl FnMut(u64, usize) -> Result<usize>,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let n = piece(at, len.min((range.end - at) as usize))?;
        assert!(n > 0, "the file ended early");
        at += n as u64;
    }
    Ok(())
}

fn read_write(src: &File, dst: &File, range: Range<u64>, len: usize) -> Result<()> {
    let mut memory = Aligned::new(len);
    pieces(range, len, |at, n| {
        let n = src.read_at(memory.get(n), at)?;
        dst.write_all_at(memory.get(n), at)?;
        Ok(n)
    })
}

fn splice(src: &File, dst: &File, range: Range<u64>, len: usize) -> Result<()> {
    use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};
    let (out, into) = pipe()?;
    fcntl_setpipe_size(&into, len)?;
    pieces(range, len, |at, n| {
        let (mut from, mut to) = (at, at);
        let filled = splice(src, Some(&mut from), &into, None, n, SpliceFlags::empty())?;
        let mut left = filled;
        while left > 0 {
            left -= splice(&out, None, dst, Some(&mut to), left, SpliceFlags::empty())?;
        }
        Ok(filled)
    })
}

fn copy_range(src: &File, dst: &File, range: Range<u64>, len: usize) -> Result<()> {
    pieces(range, len, |at, n| {
        let (mut from, mut to) = (at, at);
        let n = rustix::fs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), n)?;
        Ok(n)
    })
}

fn sendfile(src: &File, dst: &File, range: Range<u64>) -> Result<()> {
    // sendfile writes at the file's own position: an open of its own for each thread.
    let dst = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", dst.as_raw_fd()))?;
    rustix::fs::seek(&dst, rustix::fs::SeekFrom::Start(range.start))?;
    pieces(range, 4 * MIB, |at, n| {
        let mut from = at;
        Ok(rustix::fs::sendfile(&dst, src, Some(&mut from), n)?)
    })
}

fn mapped(src: &File, dst: &File, range: Range<u64>, both: bool) -> Result<()> {
    let len = (range.end - range.start) as usize;
    let map = |file: &File, access: i32| {
        let (none, at) = (std::ptr::null_mut(), range.start as i64);
        // SAFETY: a fresh mapping where the kernel likes; both files keep their size while it lives.
        let at = unsafe { libc::mmap(none, len, access, libc::MAP_SHARED, file.as_raw_fd(), at) };
        match at == libc::MAP_FAILED {
            true => Err(std::io::Error::last_os_error()),
            false => Ok(at.cast::<u8>()),
        }
    };
    let from = map(src, libc::PROT_READ)?;
    // SAFETY: the mapping has that many bytes, and nobody changes src.
    let bytes = unsafe {
        libc::madvise(from.cast(), len, libc::MADV_SEQUENTIAL);
        std::slice::from_raw_parts(from, len)
    };
    if both {
        let to = map(dst, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: as above; the slice is gone before it is unmapped, once.
        unsafe {
            std::slice::from_raw_parts_mut(to, len).copy_from_slice(bytes);
            libc::munmap(to.cast(), len);
        }
    } else {
        pieces(range.clone(), MIB, |at, n| {
            let start = (at - range.start) as usize;
            dst.write_at(&bytes[start..start + n], at)
        })?;
    }
    // SAFETY: mapped above, unmapped once; `bytes` is not used any more.
    unsafe { libc::munmap(from.cast(), len) };
    Ok(())
}

fn flagged(
    src: &File,
    dst: &File,
    range: Range<u64>,
    len: usize,
    read: ReadWriteFlags,
    write: ReadWriteFlags,
) -> Result<()> {
    let mut memory = Aligned::new(len);
    pieces(range, len, |at, n| {
        let got = rustix::io::preadv2(src, &mut [IoSliceMut::new(memory.get(n))], at, read)?;
        let mut done = 0;
        while done < got {
            let rest = IoSlice::new(&memory.get(got)[done..]);
            done += rustix::io::pwritev2(dst, &[rest], at + done as u64, write)?;
        }
        Ok(got)
    })
}

/// Written back early (sync_file_range) and forgotten (fadvise), 16 MiB behind.
fn dropped(src: &File, dst: &File, range: Range<u64>) -> Result<()> {
    const WINDOW: u64 = 16 << 20;
    let mut memory = Aligned::new(128 * KIB);
    let begin = |at: u64| {
        let (at, len) = (at as i64, WINDOW as i64);
        // SAFETY: integers only; the file is open.
        unsafe {
            libc::sync_file_range(dst.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE);
        }
    };
    let end = |at: u64| {
        let (at, len) = (at as i64, WINDOW as i64);
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        // SAFETY: as above.
        unsafe {
            libc::sync_file_range(dst.as_raw_fd(), at, len, all);
            libc::posix_fadvise(dst.as_raw_fd(), at, len, libc::POSIX_FADV_DONTNEED);
            libc::posix_fadvise(src.as_raw_fd(), at, len, libc::POSIX_FADV_DONTNEED);
        }
    };
    let mut at = range.start;
    while at < range.end {
        let next = (at + WINDOW).min(range.end);
        pieces(at..next, 128 * KIB, |at, n| {
            let n = src.read_at(memory.get(n), at)?;
            dst.write_all_at(memory.get(n), at)?;
            Ok(n)
        })?;
        begin(at);
        if at > range.start {
            end(at - WINDOW);
        }
        at = next;
    }
    end(range.end.saturating_sub(WINDOW).max(range.start));
    Ok(())
}

/// Registered buffers, `depth` in flight, each read and then written.
fn ring(src: &File, dst: &File, range: Range<u64>, depth: usize, wait: bool) -> Result<()> {
    use io_uring::{IoUring, opcode, squeue::Flags, types::Fixed};
    const LEN: usize = 512 * KIB;
    let mut ring = IoUring::new(depth as u32 * 2)?;
    let mut buffers: Vec<Aligned> = (0..depth).map(|_| Aligned::new(LEN)).collect();
    let pointers: Vec<*mut u8> = buffers
        .iter_mut()
        .map(|b| b.get(LEN).as_mut_ptr())
        .collect();
    let vectors: Vec<libc::iovec> = pointers
        .iter()
        .map(|p| libc::iovec {
            iov_base: p.cast(),
            iov_len: LEN,
        })
        .collect();
    // SAFETY: the buffers outlive the ring: both are dropped here, the ring after its last completion.
    unsafe { ring.submitter().register_buffers(&vectors)? };
    ring.submitter()
        .register_files(&[src.as_raw_fd(), dst.as_raw_fd()])?;
    let flags = if wait { Flags::ASYNC } else { Flags::empty() };
    let mut place = vec![(0u64, 0usize); depth];
    let (mut next, mut flying) = (range.start, 0);
    let mut start = |slot: usize, place: &mut [(u64, usize)], flying: &mut usize| {
        let n = LEN.min((range.end - next) as usize);
        if n == 0 {
            return None;
        }
        place[slot] = (next, n);
        next += n as u64;
        *flying += 1;
        let read = opcode::ReadFixed::new(Fixed(0), pointers[slot], n as u32, slot as u16);
        let entry = read.offset(place[slot].0).build().flags(flags);
        Some(entry.user_data(slot as u64 * 2))
    };
    let mut ready: Vec<_> = (0..depth)
        .filter_map(|slot| start(slot, &mut place, &mut flying))
        .collect();
    while flying > 0 {
        for entry in ready.drain(..) {
            // SAFETY: the buffer is registered and nobody else touches it until its completion.
            unsafe { ring.submission().push(&entry).expect("room for all") };
        }
        ring.submit_and_wait(1)?;
        let done: Vec<_> = ring
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect();
        for (data, result) in done {
            let slot = (data / 2) as usize;
            let (at, n) = place[slot];
            if result < 0 {
                return Err(std::io::Error::from_raw_os_error(-result));
            }
            assert_eq!(result as usize, n, "whole pieces");
            flying -= 1;
            if data % 2 == 0 {
                let write =
                    opcode::WriteFixed::new(Fixed(1), pointers[slot], n as u32, slot as u16);
                let entry = write.offset(at).build().flags(flags);
                ready.push(entry.user_data(data + 1));
                flying += 1;
            } else {
                ready.extend(start(slot, &mut place, &mut flying));
            }
        }
    }
    Ok(())
}

/// Bytes of a file in the page cache (cachestat(2), Linux 6.5).
fn cached(file: &File) -> u64 {
    let (range, mut stat) = ([0u64; 2], [0u64; 5]);
    // SAFETY: struct cachestat_range and struct cachestat are two and five u64.
    unsafe { libc::syscall(451, file.as_raw_fd(), &range, &mut stat, 0) };
    stat[0] * 4096
}

fn forget(file: &File) {
    let _ = rustix::fs::fdatasync(file); // Of no use only to this measurement.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed); // As above.
}

fn processor_s() -> f64 {
    let clock = rustix::time::ClockId::ProcessCPUTime;
    let t = rustix::time::clock_gettime(clock);
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

struct Setting {
    src: PathBuf,
    dst: PathBuf,
    bytes: u64,
    cold: bool,
    sync: bool,
}

/// Seconds, processor seconds, and how much of src and dst is cached afterwards.
type Figures = [f64; 4];

impl Setting {
    fn open(&self, way: &Way) -> Result<(File, File)> {
        let flag = |on: bool| if on { libc::O_DIRECT } else { 0 };
        let src = OpenOptions::new()
            .read(true)
            .custom_flags(flag(way.direct.0))
            .open(&self.src)?;
        let dst = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(flag(way.direct.1))
            .open(&self.dst)?;
        Ok((src, dst))
    }

    fn measure(&self, way: &Way, threads: u64) -> Result<Figures> {
        let plain = File::open(&self.src)?;
        if self.cold {
            forget(&plain);
        } else {
            std::io::copy(&mut &plain, &mut std::io::sink())?;
        }
        let _ = std::fs::remove_file(&self.dst); // There is none the first time.
        rustix::fs::syncfs(File::open(self.dst.parent().expect("a parent"))?)?;
        let (begin, cpu) = (Instant::now(), processor_s());
        let (src, dst) = self.open(way)?;
        if way.reserve {
            let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&dst, flags, 0, self.bytes)?;
        }
        if threads > 1 || way.name == "mmap both" {
            dst.set_len(self.bytes)?;
        }
        let part = self.bytes / threads;
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads)
                .map(|i| {
                    let (src, dst) = (&src, &dst);
                    scope.spawn(move || (way.copy)(src, dst, i * part..(i + 1) * part))
                })
                .collect();
            all.into_iter()
                .try_for_each(|t| t.join().expect("no panic"))
        })?;
        if self.sync {
            rustix::fs::fdatasync(dst.as_fd())?;
        }
        let took = begin.elapsed().as_secs_f64();
        Ok([
            took,
            processor_s() - cpu,
            cached(&src) as f64 / MIB as f64,
            cached(&dst) as f64 / MIB as f64,
        ])
    }
}

fn median(all: &mut [Figures], i: usize) -> f64 {
    all.sort_by(|a, b| a[i].total_cmp(&b[i]));
    all.get(all.len() / 2).map_or(f64::NAN, |f| f[i])
}

fn main() -> Result<()> {
    let number = |name: &str, default: u64| {
        let text = std::env::var(name).ok();
        text.and_then(|t| t.parse().ok()).unwrap_or(default)
    };
    let dir = |name: &str| std::env::var_os(name).map_or_else(std::env::temp_dir, PathBuf::from);
    let unique = format!("mirrorfs-data.{}", std::process::id());
    let setting = Setting {
        src: dir("DATA_SRC").join(unique.clone() + ".src"),
        dst: dir("DATA_DST").join(unique + ".dst"),
        bytes: number("DATA_MIB", 256) * MIB as u64,
        cold: number("DATA_COLD", 0) > 0,
        sync: number("DATA_SYNC", 0) > 0,
    };
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|w| !w.starts_with('-'))
        .collect();
    let ways: Vec<&Way> = WAYS
        .iter()
        .filter(|way| words.is_empty() || words.iter().any(|w| way.name.contains(w)))
        .collect();
    let src = File::create(&setting.src)?;
    let piece: Vec<u8> = (0..MIB).map(|i| (i * 7 % 251) as u8).collect();
    pieces(0..setting.bytes, MIB, |at, n| src.write_at(&piece[..n], at))?;
    forget(&src);
    // The first copy of all would pay for what the others find done.
    setting.measure(&WAYS[0], 2)?;
    let mut figures = vec![[Vec::new(), Vec::new()]; ways.len()];
    for _ in 0..number("DATA_ROUNDS", 5) {
        for (way, figures) in ways.iter().zip(&mut figures) {
            for threads in [1, 2] {
                match setting.measure(way, threads) {
                    Ok(f) => figures[threads as usize - 1].push(f),
                    Err(e) => eprintln!("{}: {e}", way.name),
                }
            }
        }
    }
    println!("| way | 1 thread s | processor s | 2 threads s | processor s | cached src | dst |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (way, [one, two]) in ways.iter().zip(&mut figures) {
        println!(
            "| {} | {:.3} | {:.3} | {:.3} | {:.3} | {:.0} | {:.0} |",
            way.name,
            median(one, 0),
            median(one, 1),
            median(two, 0),
            median(two, 1),
            median(one, 2),
            median(one, 3),
        );
    }
    for file in [&setting.src, &setting.dst] {
        let _ = std::fs::remove_file(file); // Nothing more to do about it.
    }
    Ok(())
}
