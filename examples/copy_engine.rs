//! Copies the regular files of one directory into another one: data only, no metadata.
//!
//!     cargo run --release --example copy_engine -- SRC_DIR DST_DIR

use std::fs::{File, read_dir};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use mirrorfs::engine::job::{Completion, Copied, CopyJob, Durability, Priority, Span};
use mirrorfs::engine::{Engine, EngineConfig};
use mirrorfs::error::Result;
use mirrorfs::sys::name::{Name, RelPath};

struct Report(Sender<Result<Copied>>);

impl Completion for Report {
    fn done(self: Box<Self>, outcome: Result<Copied>) {
        let _ = self.0.send(outcome); // main has gone: nobody asks any more.
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(src), Some(dst)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: copy_engine SRC_DIR DST_DIR");
    };
    let engine = Engine::start(&EngineConfig::default())?;
    let src_dir = Arc::new(File::open(&src)?.into());
    let (report, reports) = channel();
    let since = Instant::now();
    for entry in read_dir(&src)?.filter_map(std::io::Result::ok) {
        let name = entry.file_name();
        let (Some(src_name), true) = (Name::new(name.as_bytes()), entry.file_type()?.is_file())
        else {
            continue;
        };
        engine.submit(CopyJob {
            src_dir: Arc::clone(&src_dir),
            dst: Arc::new(File::create(std::path::Path::new(&dst).join(&name))?.into()),
            path: RelPath::root().join(&src_name),
            src_name,
            span: Span::Whole,
            priority: Priority::Background,
            durability: Durability::Later,
            done: Box::new(Report(report.clone())),
        })?;
    }
    drop(report);
    let (mut files, mut bytes) = (0, 0);
    for outcome in reports {
        (files, bytes) = (files + 1, bytes + outcome?.bytes);
    }
    let secs = since.elapsed().as_secs_f64();
    anyhow::ensure!(files > 0, "nothing to copy");
    eprintln!("{files} files, {bytes} bytes, {secs:.2} s");
    Ok(())
}
