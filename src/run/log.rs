//! Log: where tracing's lines go, how many of them, and opening that again after a rotation.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use indicatif::MultiProgress;
use parking_lot::Mutex;
use tracing::subscriber::set_global_default;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

use super::out::quoted;
use super::{Failure, exit};
use crate::config::LogLevel;

/// The log of this process; clones write to the same place.
#[derive(Clone)]
pub(crate) struct Log {
    target: Arc<Target>,
    level: Arc<OnceLock<reload::Handle<LevelFilter, Registry>>>,
}

enum Target {
    /// Standard error, above the progress bars.
    Stderr(MultiProgress),
    /// A file by its name.
    File { path: PathBuf, file: Mutex<File> },
    /// The journal of systemd, with fields.
    Journal,
}

impl Log {
    fn to(target: Target) -> Log {
        Log {
            target: Arc::new(target),
            level: Arc::default(),
        }
    }

    /// To standard error; `bars` step aside for each line. To the journal when that is behind it.
    pub(crate) fn stderr(bars: MultiProgress) -> Log {
        match stderr_is_the_journal() {
            true => Log::to(Target::Journal),
            false => Log::to(Target::Stderr(bars)),
        }
    }

    /// To a file, appending.
    pub(crate) fn file(path: &Path) -> Result<Log, Failure> {
        let file = open(path)
            .map_err(|e| Failure::new(exit::FAILURE, format!("{}: open log: {e}", quoted(path))))?;
        Ok(Log::to(Target::File {
            path: path.to_path_buf(),
            file: Mutex::new(file),
        }))
    }

    /// The open file, for a standard error that survives the terminal.
    pub(crate) fn dup(&self) -> Option<File> {
        match &*self.target {
            Target::Stderr(_) | Target::Journal => None,
            Target::File { file, .. } => file.lock().try_clone().ok(),
        }
    }

    /// From now on tracing writes here. Once per process.
    pub(crate) fn install(&self, level: LogLevel) {
        let (filter, handle) = reload::Layer::new(filter_of(level));
        let registry = tracing_subscriber::registry().with(filter);
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_target(false)
            .with_writer(self.clone());
        let journal = match &*self.target {
            Target::Journal => tracing_journald::layer().ok(),
            _ => None,
        };
        let done = match journal {
            Some(journal) => set_global_default(registry.with(journal)),
            None => set_global_default(registry.with(lines)),
        };
        if done.is_ok() {
            let _ = self.level.set(handle); // The first one stays.
        }
    }

    /// Logs more or less from now on.
    pub(crate) fn set_level(&self, level: LogLevel) {
        if let Some(handle) = self.level.get() {
            let _ = handle.reload(filter_of(level)); // Only fails when the subscriber is gone.
        }
    }

    /// Opens the file again by its name: somebody has moved it away.
    pub(crate) fn reopen(&self) {
        if let Target::File { path, file } = &*self.target {
            match open(path) {
                Ok(new) => *file.lock() = new,
                Err(e) => tracing::warn!("log: reopen {}: {e}", quoted(path)),
            }
        }
    }
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// systemd says which stream it has given us: device and inode.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Some((dev, ino)) = stream.split_once(':') else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|m| dev.parse() == Ok(m.dev()) && ino.parse() == Ok(m.ino()))
}

fn open(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &*self.target {
            Target::Journal => std::io::stderr().write(bytes),
            Target::Stderr(bars) => bars.suspend(|| std::io::stderr().write(bytes)),
            Target::File { file, .. } => file.lock().write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}
