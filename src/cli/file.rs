//! The configuration file: TOML, with a table for each command that has options to remember.
//!
//! What the command line or the environment says comes first.

use std::path::PathBuf;

use serde::Deserialize;

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// For `mount`.
    pub mount: MountFile,
    /// For `sync`.
    pub sync: SyncFile,
}

/// `[mount]`: values as on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct MountFile {
    /// `--bwlimit`.
    pub bwlimit: Option<String>,
    /// `--jobs`.
    pub jobs: Option<usize>,
    /// `--log-file`.
    pub log_file: Option<PathBuf>,
    /// `--log-level`.
    pub log_level: Option<String>,
    /// `--source-timeout`.
    pub source_timeout: Option<String>,
    /// `--on-error`.
    pub on_error: Option<String>,
    /// `--metrics`.
    pub metrics: Option<String>,
    /// `--metrics-file`.
    pub metrics_file: Option<PathBuf>,
    /// `--no-store`, a list.
    pub no_store: Option<Vec<String>>,
    /// `-o large`.
    pub large: Option<String>,
    /// `-o cache`.
    pub cache: Option<String>,
    /// `--transport`.
    pub transport: Option<String>,
    /// `--keep-mount`.
    pub keep_mount: Option<bool>,
    /// `-o threads`.
    pub threads: Option<usize>,
    /// `-o workers`.
    pub workers: Option<usize>,
}

/// `[sync]`: values as on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct SyncFile {
    /// `--bwlimit`.
    pub bwlimit: Option<String>,
    /// `--jobs`.
    pub jobs: Option<usize>,
}

impl ConfigFile {
    /// Reads a file's text, or says in one line what is wrong with it, and where.
    pub fn parse(text: &str) -> Result<ConfigFile, String> {
        toml::from_str(text).map_err(|e| {
            let line = e
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1);
            let message = e.message().lines().next().unwrap_or_default().to_owned();
            format!("line {line}: {message}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_what_is_wrong_with_it_is_told_with_its_line() {
        let file = ConfigFile::parse(
            "[mount]\nbwlimit = \"200M\"\njobs = 2\nlog-level = \"debug\"\n\n[sync]\njobs = 3\n",
        );
        let file = file.expect("parses");
        assert_eq!(file.mount.bwlimit.as_deref(), Some("200M"));
        assert_eq!((file.mount.jobs, file.sync.jobs), (Some(2), Some(3)));
        assert_eq!(ConfigFile::parse(""), Ok(ConfigFile::default()));
        for (text, line) in [
            ("[mount]\n\nbwlimits = 3\n", "line 3: "),
            ("[mount]\njobs = \"x\"\n", "line 2: "),
            ("mount = 3\n", "line 1: "),
            ("[mount\n", "line 1: "),
        ] {
            let told = ConfigFile::parse(text).expect_err(text);
            assert!(told.starts_with(line) && !told.contains('\n'), "{told}");
        }
    }
}
