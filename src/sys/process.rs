//! Other processes, as far as their requests tell who they are.

use super::check;

/// IOPRIO_WHO_PROCESS, and how the class is in the value.
const WHO_PROCESS: libc::c_int = 1;
const CLASS_SHIFT: u32 = 13;
const CLASS_IDLE: i64 = 3;

/// True for a thread in the idle I/O class (`ionice -c3`); false when it is gone.
pub fn io_is_idle(pid: u32) -> bool {
    // SAFETY: two integers; the call reads and writes no memory of ours.
    let value = check(unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, pid) });
    value.is_ok_and(|value| value >> CLASS_SHIFT == CLASS_IDLE)
}

/// /proc/PID/cgroup of a thread: a line for each hierarchy, `N:CONTROLLERS:PATH`; empty when it is gone.
pub fn cgroups(pid: u32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_not_idle_and_are_in_a_cgroup() {
        let pid = std::process::id();
        assert!(!io_is_idle(pid));
        assert!(cgroups(pid).starts_with(b"0::/") || cgroups(pid).contains(&b':'));
        assert!(!io_is_idle(u32::MAX >> 1) && cgroups(u32::MAX >> 1).is_empty());
    }
}
