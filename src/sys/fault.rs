//! Named fault points: places where a test makes the process exit as a power cut would.
//!
//! `MIRRORFS_FAULT=name:n` exits (status 99, no cleanup) at the n-th passage of point `name`.
//! Without the `fault` feature a point compiles to nothing.

/// Every point, in the order of a file's life. Tests walk this list.
pub const POINTS: &[&str] = &[
    "ahead-before",
    "ahead-placed",
    "own-named",
    "own-made",
    "own-marked",
    "own-linked",
    "populate-before-child",
    "populate-after-child",
    "carry-written",
    "carry-stamped",
    "unseen-linked",
    "unseen-placed",
    "unseen-aside",
    "unseen-revealed",
    "extra-before",
    "extra-removed",
    "populate-before-mark",
    "populate-after-mark",
    "publish-durable",
    "publish-marked",
    "hydrate-begin",
    "hydrate-landed",
    "hydrate-durable",
    "hydrate-unmarked",
    "mixed-map",
    "mixed-marked",
    "mixed-mature",
    "mixed-claimed",
    "mixed-written",
    "mixed-synced",
    "mixed-promoted",
    "mixed-cut",
    "mixed-punched",
    "mixed-full",
    "mixed-unmarked",
    "mixed-forgotten",
    "salvage-map",
    "salvage-marked",
    "salvage-synced",
    "salvage-kept",
    "salvage-owned",
    "salvage-dropped",
    "salvage-left",
    "salvage-given",
    "perm-unmarked",
    "rename-origin",
    "rename-done",
    "dir-unmark",
    "finish-synced",
    "finish-links",
    "finish-flags",
    "finish-control",
    "sync-made",
    "sync-piece",
    "sync-copied",
    "sync-stamped",
    "shard-made",
    "shard-shared",
    "shard-ended",
    "shard-moved",
];

/// Points where a test only holds somebody back (`MIRRORFS_FAULT_HOLD`): nothing is written there.
pub const HELD: &[&str] = &["walk-rest", "finish-shut", "read-here", "salvage-bad"];

/// Points that only a mount that is kept passes (`--keep-mount`).
pub const KEPT: &[&str] = &[
    "act-begun",
    "act-done",
    "open-written",
    "create-written",
    "left-taken",
];

/// A fault point: exits when the environment says so.
#[cfg(feature = "fault")]
pub fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    static WANT: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let known = [POINTS, KEPT, HELD].iter().any(|p| p.contains(&name));
    debug_assert!(known, "{name} is in no list");
    let want = WANT.get_or_init(|| {
        let text = std::env::var("MIRRORFS_FAULT").ok()?;
        let (name, n) = text.rsplit_once(':')?;
        Some((name.to_owned(), n.parse().ok()?))
    });
    if let Some((at, n)) = want
        && at == name
        && SEEN.fetch_add(1, Relaxed) + 1 == *n
    {
        if held() || killed_once() {
            return;
        }
        // SAFETY: _exit takes an integer and does not return; skipping cleanup is the point.
        unsafe { libc::_exit(99) }
    }
}

/// `MIRRORFS_FAULT_HOLD=FILE`: it stays here while the file is there, and goes on. FILE.met says that it
/// is here.
#[cfg(feature = "fault")]
fn held() -> bool {
    let Ok(file) = std::env::var("MIRRORFS_FAULT_HOLD") else {
        return false;
    };
    // A test that looks for it fails without.
    let _ = std::fs::File::create(format!("{file}.met")); // As said.
    while std::path::Path::new(&file).exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    true
}

/// `MIRRORFS_FAULT_KILL=FILE`: a SIGKILL instead, once: the file is made then.
#[cfg(feature = "fault")]
fn killed_once() -> bool {
    let Ok(file) = std::env::var("MIRRORFS_FAULT_KILL") else {
        return false;
    };
    if std::fs::File::create_new(&file).is_ok() {
        // SAFETY: kill takes integers.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    true
}

/// A limit that a test lowers: `MIRRORFS_FAULT_SLOTS=64`. Without the `fault` feature it is as given.
#[cfg(feature = "fault")]
pub fn lowered(what: &str, limit: usize) -> usize {
    let lower = std::env::var(format!("MIRRORFS_FAULT_{what}")).ok();
    lower.and_then(|n| n.parse().ok()).unwrap_or(limit)
}

/// As given, without the `fault` feature.
#[cfg(not(feature = "fault"))]
pub fn lowered(_what: &str, limit: usize) -> usize {
    limit
}

/// Threads that wait for each other's locks, or one for its own, end the process, with what each was doing in
/// the log: a test should not have to wait for it.
#[cfg(feature = "fault")]
pub fn end_at_a_deadlock() {
    use std::thread::sleep;
    let look = || loop {
        sleep(std::time::Duration::from_secs(1));
        let found = parking_lot::deadlock::check_deadlock();
        for thread in found.iter().flatten() {
            tracing::error!("deadlock: {:?}", thread.backtrace());
        }
        if !found.is_empty() {
            std::process::abort();
        }
    };
    std::thread::spawn(look);
}

/// Nobody looks, without the `fault` feature.
#[cfg(not(feature = "fault"))]
#[inline(always)]
pub fn end_at_a_deadlock() {}

/// True when the environment wants a rule of docs/DURABILITY.md broken: `MIRRORFS_BREAK=D1`. So is the
/// checker checked: it must see what is lost then (scripts/crash/powercut.sh).
#[cfg(feature = "fault")]
pub fn breaks(rule: &str) -> bool {
    use std::sync::OnceLock;
    static RULE: OnceLock<Option<String>> = OnceLock::new();
    let broken = RULE.get_or_init(|| std::env::var("MIRRORFS_BREAK").ok());
    broken.as_deref() == Some(rule)
}

/// No rule is ever broken without the `fault` feature.
#[cfg(not(feature = "fault"))]
#[inline(always)]
pub const fn breaks(_rule: &str) -> bool {
    false
}

/// Does what a rule asks for, unless that rule is to be broken.
pub fn unless_broken<E>(rule: &str, step: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
    match breaks(rule) {
        true => Ok(()),
        false => step(),
    }
}

/// A fault point: nothing without the `fault` feature.
#[cfg(not(feature = "fault"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// True when the environment wants this step to fail: `MIRRORFS_FAULT=refuse-NAME`.
pub fn refuses(name: &str) -> bool {
    let wants = |value: String| value.strip_prefix("refuse-") == Some(name);
    cfg!(feature = "fault") && std::env::var("MIRRORFS_FAULT").is_ok_and(wants)
}
