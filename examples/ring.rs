//! The ring alone: the first bytes of a directory's files, 64 at a time.
//!
//!     cargo run --release --example ring -- [DIR]

#![allow(clippy::print_stdout)] // A program's output.

use std::fs::{File, read_dir};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use mirrorfs::engine::buffers::BufferPool;
use mirrorfs::engine::job::Priority;
use mirrorfs::engine::ring::{Op, Reply, Ring, RingConfig, Start};
use mirrorfs::sys::name::Name;

fn main() -> anyhow::Result<()> {
    let path = std::env::args_os().nth(1).unwrap_or(".".into());
    let dir: Arc<OwnedFd> = Arc::new(File::open(&path)?.into());
    let mut buffers = BufferPool::new(64, 1, 1 << 17);
    let mut ring = Ring::new(&RingConfig::default());
    if let Err(errno) = ring.register(&mut buffers) {
        eprintln!("buffers are not registered: {errno}"); // ENOSYS: there is no io_uring.
    }
    let list = read_dir(&path)?.filter_map(Result::ok);
    let names: Vec<_> = list
        .filter_map(|e| Name::new(e.file_name().as_bytes()))
        .collect();
    let mut todo = names.iter().zip(0..).peekable();
    while todo.peek().is_some() || ring.in_flight() > 0 {
        while ring.in_flight() < 64
            && let Some((name, token)) = todo.next()
        {
            let open = Op::open_src(Arc::clone(&dir), name, false);
            ring.push(token, open, Start::Elsewhere);
        }
        ring.enter(true)?;
        while let Some(mut done) = ring.pop() {
            let name = &names[done.token as usize];
            match (done.result, done.buffer.take()) {
                (Ok(Reply::Fd(fd)), _) => {
                    let buffer = buffers.take(8, Priority::Demand); // There are as many as files.
                    let read = Op::read(Arc::new(fd), buffer.expect("a buffer"), 0..8, 0);
                    ring.push(done.token, read, Start::Elsewhere);
                }
                (Ok(Reply::Count(n)), Some(buffer)) => {
                    println!("{:02x?} {name:?}", buffer.bytes(0..n));
                    buffers.give(buffer);
                }
                (Err(errno), buffer) => {
                    println!("{name:?}: {errno}"); // EISDIR: a directory opens, and is not read.
                    buffer.into_iter().for_each(|b| buffers.give(b));
                }
                (Ok(_), _) => {}
            }
        }
    }
    Ok(())
}
