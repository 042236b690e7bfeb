//! `--record` and `--replay`: the files, opened before anything is mounted.

use std::fs::File;
use std::path::Path;

use super::out::quoted;
use super::{Failure, exit};
use crate::config::MountConfig;
use crate::mirror::{Traced, parse_trace};

/// What was asked for.
#[derive(Debug, Default)]
pub(super) struct Traces {
    pub(super) record: Option<File>,
    pub(super) replay: Option<Vec<Traced>>,
}

impl Traces {
    /// Opens both, or says in one line what is wrong with one.
    pub(super) fn open(config: &MountConfig) -> Result<Traces, Failure> {
        let fail = |what: &str, path: &Path, e: &dyn std::fmt::Display| {
            Failure::new(exit::UNUSABLE, format!("--{what} {}: {e}", quoted(path)))
        };
        // Read first: they may be the same file.
        let replay = config.replay.as_deref().map(|path| {
            let text = std::fs::read(path).map_err(|e| fail("replay", path, &e))?;
            parse_trace(&text).map_err(|e| {
                let line = format!("--replay {}: {e}", quoted(path));
                Failure::new(exit::USAGE, line)
            })
        });
        let replay = replay.transpose()?;
        let record = config.record.as_deref().map(|path| {
            // A daemon must not wait for itself; and in src nothing is written, ever.
            let inside = [&config.src, &config.dst, &config.mountpoint]
                .into_iter()
                .any(|tree| is_below(path, tree));
            if inside {
                let line = format!("--record {}: it must not be in these trees", quoted(path));
                return Err(Failure::new(exit::USAGE, line));
            }
            File::create(path).map_err(|e| fail("record", path, &e))
        });
        Ok(Traces {
            record: record.transpose()?,
            replay,
        })
    }

    /// After another program has served this mount: the record goes on, and nothing is replayed twice.
    pub(super) fn resumed(config: &MountConfig) -> Traces {
        let record = config.record.as_deref().and_then(|path| {
            let file = File::options().append(true).open(path);
            file.inspect_err(|e| {
                tracing::warn!("--record {}: {e}; nothing more is recorded", quoted(path))
            })
            .ok()
        });
        Traces {
            record,
            replay: None,
        }
    }
}

/// Without symlinks, as far as the way to it exists.
fn is_below(path: &Path, tree: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let parent = path.parent().map(real).unwrap_or_default();
    parent.starts_with(real(tree)) || real(path).starts_with(real(tree))
}
