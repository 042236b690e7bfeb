//! Memory that is free for more: the machine's, and what control groups leave of it.
//!
//! A control group's limit counts the page cache that its processes have filled; what is over it is
//! taken from them first. So in a small group on a large machine the machine's figure says nothing.

use std::path::{Path, PathBuf};

use super::host;

/// Bytes that could be had without swapping and within the limits of our control groups; `None` where
/// /proc does not say.
pub fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let machine = kib.saturating_mul(1024);
    Some(group_room().map_or(machine, |room| room.min(machine)))
}

/// What the control groups that we are in leave; `None`: they limit nothing.
fn group_room() -> Option<u64> {
    let ours = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = host::mounts().ok()?;
    let groups = mounts
        .iter()
        .filter(|m| m.fs_type == "cgroup" || m.fs_type == "cgroup2");
    groups
        .filter_map(|m| room_below(&m.point, m.fs_type == "cgroup2", &ours))
        .min()
}

/// The least that our group and those above it leave, in one hierarchy.
fn room_below(point: &Path, two: bool, ours: &str) -> Option<u64> {
    // cgroups(7): "ID:controllers:path", and version 2 has the ID 0 and no controllers.
    let path = ours.lines().find_map(|line| {
        let (id, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let is_it = match two {
            true => id == "0",
            false => controllers.split(',').any(|c| c == "memory"),
        };
        is_it.then_some(path)
    })?;
    let inside = path.trim_start_matches('/');
    let mut dir = point.join(inside);
    if inside.split('/').any(|name| name == "..") || !dir.is_dir() {
        // Seen from a container: what is mounted is our own group.
        dir = point.to_owned();
    }
    let mut least = None;
    while dir.starts_with(point) {
        let room = if two { room_two(&dir) } else { room_one(&dir) };
        least = [least, room].into_iter().flatten().min();
        if !dir.pop() {
            break;
        }
    }
    least
}

fn number(dir: &Path, file: &str) -> Option<u64> {
    let path: PathBuf = dir.join(file);
    std::fs::read_to_string(path).ok()?.trim().parse().ok() // "max" is no number.
}

/// Pages of files: they are given back before anybody has to wait.
fn given_back(dir: &Path, prefix: &str) -> u64 {
    let text = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let of = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| {
            line.strip_prefix(prefix)?
                .strip_prefix(name)?
                .strip_prefix(' ')
        });
        line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    };
    of("inactive_file").saturating_add(of("active_file"))
}

fn room_two(dir: &Path) -> Option<u64> {
    let limits = ["memory.max", "memory.high"].map(|file| number(dir, file));
    let limit = limits.into_iter().flatten().min()?;
    let used = number(dir, "memory.current")?;
    Some(limit.saturating_sub(used.saturating_sub(given_back(dir, ""))))
}

fn room_one(dir: &Path) -> Option<u64> {
    let limit = number(dir, "memory.limit_in_bytes")?;
    let used = number(dir, "memory.usage_in_bytes")?;
    Some(limit.saturating_sub(used.saturating_sub(given_back(dir, "total_"))))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn put(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).expect("mkdir");
        for (name, text) in files {
            fs::write(dir.join(name), text).expect("write");
        }
    }

    #[test]
    fn the_narrowest_limit_above_us_counts_and_cached_files_count_as_free() {
        let top = tempfile::tempdir().expect("tempdir");
        let top = top.path();
        let ours = "4:cpu,memory:/v1\n0::/a/b\n";
        put(&top.join("a/b"), &[("memory.max", "max\n")]);
        assert_eq!(room_below(top, true, ours), None);
        let stat = "anon 5\ninactive_file 300\nactive_file 100\nworkingset_refault_file 7\n";
        put(
            &top.join("a"),
            &[
                ("memory.max", "10000\n"),
                ("memory.high", "8000\n"),
                ("memory.current", "1000\n"),
                ("memory.stat", stat),
            ],
        );
        assert_eq!(room_below(top, true, ours), Some(8000 - 600));
        put(
            &top.join("a/b"),
            &[("memory.max", "2000"), ("memory.current", "1500")],
        );
        assert_eq!(room_below(top, true, ours), Some(500));
        // In a container only the group itself is seen, wherever it says that it is.
        assert_eq!(
            room_below(&top.join("a/b"), true, "0::/docker/1"),
            Some(500)
        );
        assert_eq!(room_below(&top.join("a/b"), true, "0::/../x"), Some(500));
    }

    #[test]
    fn version_1_is_known_too() {
        let top = tempfile::tempdir().expect("tempdir");
        let ours = "4:cpu,memory:/v1\n0::/\n";
        put(
            &top.path().join("v1"),
            &[
                ("memory.limit_in_bytes", "900"),
                ("memory.usage_in_bytes", "1000"),
                ("memory.stat", "total_inactive_file 400\ninactive_file 1\n"),
            ],
        );
        assert_eq!(room_below(top.path(), false, ours), Some(300));
        assert_eq!(room_below(top.path(), false, "4:cpu:/v1\n"), None);
    }

    #[test]
    fn some_memory_is_free() {
        assert!(available().expect("/proc/meminfo") > 1 << 20);
    }
}
