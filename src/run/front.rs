//! Front: where a daemon's log goes, and what is shown in front of it.

use std::path::Path;

use super::Failure;
use super::control;
use super::live::Screen;
use super::log::Log;
use super::watch::Watch;
use crate::config::MountConfig;

/// What a daemon has in front of it, or not.
pub(super) enum Front {
    /// A terminal, or what stands in for one.
    Screen(Screen),
    /// A log, and the last line of progress in it.
    Log(String),
}

impl Front {
    /// Where the log goes, and what is shown besides.
    pub(super) fn open(config: &MountConfig) -> Result<(Log, Front), Failure> {
        if config.foreground {
            let screen = Screen::new();
            let log = match &config.log_file {
                Some(path) => Log::file(path)?,
                None => Log::stderr(screen.bars()),
            };
            return Ok((log, Front::Screen(screen)));
        }
        let path = match &config.log_file {
            Some(path) => path.clone(),
            None => control::make_run_dir()?.join(file_name(&config.dst, "log")),
        };
        Ok((Log::file(&path)?, Front::Log(String::new())))
    }

    /// Shows the counters; called a few times a second.
    pub(super) fn show(&mut self, watch: &Watch, line_due: bool) {
        match self {
            Front::Screen(screen) => {
                let report = watch.report();
                screen.show(&report.state_text(), &report.counts);
            }
            Front::Log(last) if line_due => {
                let line = watch.report().line();
                if *last != line {
                    tracing::info!("{line}");
                    *last = line;
                }
            }
            Front::Log(_) => {}
        }
    }

    /// One line now.
    pub(super) fn line(&mut self, watch: &Watch) {
        let report = watch.report();
        match self {
            Front::Screen(screen) => screen.line(&report.state_text(), &report.counts),
            Front::Log(_) => tracing::info!("{}", report.line()),
        }
    }
}

/// A file for each dst: its last name for people, a hash for uniqueness.
pub(super) fn file_name(dst: &Path, ending: &str) -> String {
    use std::os::unix::ffi::OsStrExt;
    let hash = xxhash_rust::xxh3::xxh3_64(dst.as_os_str().as_bytes());
    let name = dst.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(48)
        .collect();
    format!("{name}-{hash:016x}.{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_name_is_one_safe_component() {
        let name = file_name(Path::new("/srv/a b\n"), "log");
        assert!(
            name.starts_with("a_b_-") && name.ends_with(".log"),
            "{name}"
        );
        assert_ne!(
            file_name(Path::new("/a/x"), "log"),
            file_name(Path::new("/b/x"), "log")
        );
    }
}
