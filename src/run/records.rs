//! Records: the files that a `sync` writes about itself: --log-file and --error-file.

use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::out::quoted;
use super::{Failure, exit};
use crate::config::SyncConfig;
use crate::sync::SyncError;

/// The two files, where they are wanted.
pub(super) struct Records {
    log: Option<File>,
    errors: Option<File>,
    /// What ends a path.
    end: u8,
}

impl Records {
    /// Opens the files: the log to go on with, the list of paths anew.
    pub(super) fn open(config: &SyncConfig) -> Result<Records, Failure> {
        let failed = |path: &Path, e: std::io::Error| {
            Failure::new(exit::FAILURE, format!("{}: open: {e}", quoted(path)))
        };
        let log = config.log_file.as_deref().map(|path| {
            let file = File::options().create(true).append(true).open(path);
            file.map_err(|e| failed(path, e))
        });
        let errors = config
            .error_file
            .as_deref()
            .map(|path| File::create(path).map_err(|e| failed(path, e)));
        Ok(Records {
            log: log.transpose()?,
            errors: errors.transpose()?,
            end: if config.from0 { 0 } else { b'\n' },
        })
    }

    /// One line of the log, with the time and the process id.
    pub(super) fn line(&mut self, text: &str) {
        if let Some(log) = &mut self.log {
            let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
            let line = format!("{now} [{}] {text}\n", std::process::id());
            let _ = log.write_all(line.as_bytes()); // Like a full disk under any log.
        }
    }

    /// One path that failed.
    pub(super) fn failed(&mut self, error: &SyncError) {
        if let Some(errors) = &mut self.errors {
            let path = error.path.as_os_str().as_bytes();
            // For --files-from such a line would be a comment.
            let comment = matches!(path.first(), Some(b'#' | b';'));
            let mut line = if comment { b"./".to_vec() } else { Vec::new() };
            line.extend_from_slice(path);
            line.push(self.end);
            let _ = errors.write_all(&line); // It was told on standard error too.
        }
        self.line(&error.message);
    }
}
