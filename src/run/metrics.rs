//! Metrics: the counters as OpenMetrics, for whoever scrapes them and for a text file.
//!
//! Each scrape reads the counters that `status` shows; nothing is kept twice. docs/METRICS.md says
//! what each one means.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::counts::Counts;
use super::out::quoted;
use super::report::{Report, State};
use super::watch::Watch;
use super::web;
use crate::fuse::request_name;
use crate::progress::requests::Requests;
use crate::progress::waits::{BOUNDS_S, Histogram};

/// How often the text file is written.
const FILE_EVERY: Duration = Duration::from_secs(15);

/// What runs beside the mount to tell others about it.
pub(super) struct Exporter {
    /// Dropped, it ends the file's thread.
    file: Option<(Sender<()>, std::thread::JoinHandle<()>)>,
    web: Option<web::Running>,
}

impl Exporter {
    /// Starts what is asked for. What fails is told in the log: the mount matters more.
    pub(super) fn start(
        file: Option<PathBuf>,
        web: Option<web::Server>,
        watch: &Arc<Watch>,
    ) -> Exporter {
        Exporter {
            file: file.and_then(|path| write_often(path, watch)),
            web: web.and_then(|server| server.run(watch)),
        }
    }

    /// Ends it; the file is written a last time.
    pub(super) fn stop(&self) {
        if let Some((stop, _)) = &self.file {
            let _ = stop.try_send(()); // Full: it stops already.
        }
        if let Some(web) = &self.web {
            web.stop();
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.file.take() {
            drop(stop);
            if thread.join().is_err() {
                tracing::error!("the thread of --metrics-file panicked");
            }
        }
    }
}

fn write_often(
    path: PathBuf,
    watch: &Arc<Watch>,
) -> Option<(Sender<()>, std::thread::JoinHandle<()>)> {
    let (stop, stopped) = bounded(1);
    let watch = Arc::clone(watch);
    let mut told = false;
    let write = move || {
        loop {
            match write_file(&path, &watch) {
                Ok(()) => told = false,
                Err(e) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!("metrics file {}: {e}", quoted(&path));
                }
                Err(_) => {}
            }
            match stopped.recv_timeout(FILE_EVERY) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => {
                    let _ = write_file(&path, &watch); // Told already, if it fails.
                    return;
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("metrics".into());
    match thread.spawn(write) {
        Ok(thread) => Some((stop, thread)),
        Err(e) => {
            tracing::warn!("metrics file: thread: {e}");
            None
        }
    }
}

/// Under another name first: a collector must not read half of it.
fn write_file(path: &Path, watch: &Arc<Watch>) -> std::io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(name);
    std::fs::write(&new, text(watch))?;
    std::fs::rename(&new, path)
}

/// All metrics of this moment.
pub(super) fn text(watch: &Arc<Watch>) -> String {
    let report = watch.report();
    let labels = [
        ("mountpoint".into(), report.mountpoint.into()),
        ("src".into(), report.src.into()),
        ("dst".into(), report.dst.into()),
    ];
    let mut registry = Registry::with_prefix_and_labels("mirrorfs", labels.into_iter());
    registry.register_collector(Box::new(Scrape(Arc::downgrade(watch))));
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        tracing::error!("metrics: formatting failed"); // A String never fails.
    }
    text
}

struct Scrape(Weak<Watch>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

/// Labels of the requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    op: &'static str,
}

/// Labels of one family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(watch) = self.0.upgrade() else {
            return Ok(());
        };
        let report = watch.report();
        for (name, help, unit, value) in counters(&watch, &report.counts) {
            let mut metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        for (name, help, unit, value) in gauges(&report) {
            let Some(value) = value else { continue };
            let mut metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            metric.encode_gauge(&value)?;
        }
        encode_requests(&mut encoder, &watch.progress().requests)?;
        encode_state(&mut encoder, report.state)?;
        encode_waits(&mut encoder, &watch.progress().waits.histogram())
    }
}

/// Name, help, unit, value.
type Metric<V> = (&'static str, &'static str, Option<Unit>, V);

/// What only grows.
fn counters(watch: &Watch, c: &Counts) -> [Metric<u64>; 11] {
    [
        (
            "entries_seen",
            "Entries of SRC that were seen",
            None,
            c.entries_seen,
        ),
        (
            "entries_placed",
            "Entries that have their name in DST",
            None,
            c.entries_placed,
        ),
        (
            "files_seen",
            "Files of SRC that were seen",
            None,
            c.files_seen,
        ),
        (
            "files_pulled",
            "Files complete and durable in DST",
            None,
            c.files_pulled,
        ),
        (
            "seen",
            "Bytes of SRC's files that were seen",
            Some(Unit::Bytes),
            c.bytes_seen,
        ),
        (
            "pulled",
            "Bytes complete and durable in DST",
            Some(Unit::Bytes),
            c.bytes_pulled,
        ),
        (
            "demand_files",
            "Files pulled because somebody waited",
            None,
            c.demand_files,
        ),
        (
            "demand",
            "Bytes pulled because somebody waited",
            Some(Unit::Bytes),
            c.demand_bytes,
        ),
        (
            "prefetched_files",
            "Files pulled because their neighbours were opened, or by a trace",
            None,
            c.prefetched_files,
        ),
        (
            "prefetch_hits",
            "Of those, files that were opened then",
            None,
            c.prefetch_hits,
        ),
        (
            "dirs_populated",
            "Directories that were given their entries",
            None,
            watch.progress().dirs_populated.get(),
        ),
    ]
}

/// What is so now; `None`: it cannot be told.
fn gauges(report: &Report) -> [Metric<Option<f64>>; 15] {
    let c = &report.counts;
    let free = report.dst_free.map(|n| n as f64);
    let limit = report
        .bwlimit
        .filter(|_| !report.bwlimit_lifted)
        .unwrap_or(0);
    [
        (
            "left",
            "Bytes known to be left",
            Some(Unit::Bytes),
            Some(c.bytes_left as f64),
        ),
        (
            "expected",
            "Bytes in all, as far as is known",
            Some(Unit::Bytes),
            Some(c.bytes_total as f64),
        ),
        (
            "entries_expected",
            "Entries in all, as far as is known",
            None,
            Some(c.entries_total as f64),
        ),
        (
            "walk_done",
            "1 when every directory was seen: totals are final",
            None,
            Some(f64::from(u8::from(c.walk_done))),
        ),
        (
            "rate",
            "Bytes per second over the last half minute",
            Some(Unit::Bytes),
            Some(c.bytes_per_s as f64),
        ),
        (
            "eta",
            "Time until all is pulled, while it can be told",
            Some(Unit::Seconds),
            c.eta_s.map(|s| s as f64),
        ),
        (
            "bwlimit",
            "The background's limit per second; 0: none",
            Some(Unit::Bytes),
            Some(limit as f64),
        ),
        (
            "waiting",
            "Accesses that wait for SRC now",
            None,
            Some(c.waiting as f64),
        ),
        (
            "longest_wait",
            "How long the longest of them waits",
            Some(Unit::Seconds),
            Some(c.longest_wait_ms.unwrap_or(0) as f64 / 1e3),
        ),
        (
            "errors",
            "Failures in the ledger",
            None,
            Some(c.errors as f64),
        ),
        (
            "stuck",
            "1 when whole passes changed nothing",
            None,
            Some(f64::from(u8::from(report.stuck))),
        ),
        ("dst_free", "Free in DST", Some(Unit::Bytes), free),
        (
            "manifest_read",
            "Read of SRC for the manifest, in the end",
            Some(Unit::Bytes),
            Some(report.manifest_read.unwrap_or(0) as f64),
        ),
        (
            "manifest_found",
            "To be read for it, as far as is known",
            Some(Unit::Bytes),
            Some(report.manifest_found.unwrap_or(0) as f64),
        ),
        (
            "start_time",
            "When the daemon started, since 1970",
            Some(Unit::Seconds),
            Some(report.since_unix as f64),
        ),
    ]
}

/// One series for each kind of request that came.
fn encode_requests(encoder: &mut DescriptorEncoder<'_>, requests: &Requests) -> fmt::Result {
    let help = "Requests of the kernel's";
    let mut family = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
    for (kind, n) in requests.all() {
        let labels = OfKind {
            op: request_name(kind),
        };
        family
            .encode_family(&labels)?
            .encode_counter::<NoLabelSet, _, u64>(&n, None)?;
    }
    Ok(())
}

/// One series for each state, 1 for the one that is.
fn encode_state(encoder: &mut DescriptorEncoder<'_>, now: State) -> fmt::Result {
    let help = "1 for the state that the migration is in";
    let mut family = encoder.encode_descriptor("state", help, None, MetricType::Gauge)?;
    for state in State::ALL {
        let labels = InState {
            state: state.name(),
        };
        let is = i64::from(state == now);
        family.encode_family(&labels)?.encode_gauge(&is)?;
    }
    Ok(())
}

fn encode_waits(encoder: &mut DescriptorEncoder<'_>, waits: &Histogram) -> fmt::Result {
    let help = "How long accesses have waited for SRC";
    let unit = Unit::Seconds;
    let kind = MetricType::Histogram;
    let mut metric = encoder.encode_descriptor("wait", help, Some(&unit), kind)?;
    let bounds = BOUNDS_S.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(waits.counts.iter().copied()).collect();
    let count = waits.counts.iter().sum();
    metric.encode_histogram::<NoLabelSet>(waits.sum_s, count, &buckets, None)
}
