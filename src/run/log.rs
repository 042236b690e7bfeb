//! Log: where tracing's lines go, and opening that again after a rotation.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::MultiProgress;
use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::out::quoted;
use super::{Failure, exit};
use crate::config::LogLevel;

/// The log of this process; clones write to the same place.
#[derive(Clone)]
pub(crate) struct Log(Arc<Target>);

enum Target {
    /// Standard error, above the progress bars.
    Stderr(MultiProgress),
    /// A file by its name.
    File { path: PathBuf, file: Mutex<File> },
}

impl Log {
    /// To standard error; `bars` step aside for each line.
    pub(crate) fn stderr(bars: MultiProgress) -> Log {
        Log(Arc::new(Target::Stderr(bars)))
    }

    /// To a file, appending.
    pub(crate) fn file(path: &Path) -> Result<Log, Failure> {
        let file = open(path)
            .map_err(|e| Failure::new(exit::FAILURE, format!("{}: open log: {e}", quoted(path))))?;
        Ok(Log(Arc::new(Target::File {
            path: path.to_path_buf(),
            file: Mutex::new(file),
        })))
    }

    /// The open file, for a standard error that survives the terminal.
    pub(crate) fn dup(&self) -> Option<File> {
        match &*self.0 {
            Target::Stderr(_) => None,
            Target::File { file, .. } => file.lock().try_clone().ok(),
        }
    }

    /// From now on tracing writes here. Once per process.
    pub(crate) fn install(&self, level: LogLevel) {
        let filter = EnvFilter::new(level.name());
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_target(false)
            .with_writer(self.clone())
            .finish();
        let _ = tracing::subscriber::set_global_default(subscriber); // The first one stays.
    }

    /// Opens the file again by its name: somebody has moved it away.
    pub(crate) fn reopen(&self) {
        if let Target::File { path, file } = &*self.0 {
            match open(path) {
                Ok(new) => *file.lock() = new,
                Err(e) => tracing::warn!("log: reopen {}: {e}", quoted(path)),
            }
        }
    }
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
        match &*self.0 {
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
