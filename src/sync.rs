//! Sync: to come.
use std::sync::Arc;
/// To come.
#[derive(Debug)]
pub struct SyncReport;
/// To come.
pub fn run(
    _: &crate::config::SyncConfig,
    _: Arc<crate::progress::Progress>,
) -> crate::error::Result<SyncReport> {
    Err(crate::error::Error::Unusable(
        "sync is not there yet".into(),
    ))
}
