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

/// Signals whose default is not to end the process: it goes on or is stopped.
const HARMLESS: [libc::c_int; 8] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// True for a thread that ends by a signal it has got as soon as it leaves the kernel, and for one that
/// is gone. False where only a handler of its own would run, or nothing at all.
pub fn is_ending(tid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{tid}/status")).map_or(true, |text| ends(&text))
}

/// As above, from /proc/TID/status. The kernel turns a signal that ends a process into SIGKILL for each
/// of its threads, except where a core is to be dumped.
fn ends(status: &str) -> bool {
    let set = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| u64::from_str_radix(l.trim_start_matches(':').trim(), 16).ok())
            .unwrap_or(0)
    };
    let bit = |signal: libc::c_int| 1u64 << (signal - 1);
    let pending = set("SigPnd") | set("ShdPnd");
    let harmless = HARMLESS.iter().fold(0, |all, signal| all | bit(*signal));
    let meant = pending & !set("SigBlk") & !set("SigIgn") & !set("SigCgt") & !harmless;
    pending & bit(libc::SIGKILL) != 0 || meant != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_catches_blocks_or_ignores_does_not_end_it() {
        let status = |pending: u64, cgt: u64| {
            format!(
                "SigPnd:\t{pending:016x}\nShdPnd:\t0000000000000000\nSigBlk:\t0000000000000200\nSigIgn:\t0000000000001000\nSigCgt:\t{cgt:016x}\n"
            )
        };
        assert!(!ends(&status(0, 0)), "nothing is pending");
        assert!(ends(&status(1 << 8, 0)), "SIGKILL");
        assert!(ends(&status(1 << 2, 0)), "SIGQUIT by default");
        assert!(!ends(&status(1 << 2, 1 << 2)), "SIGQUIT with a handler");
        assert!(!ends(&status(1 << 9, 0)), "SIGUSR1, blocked");
        assert!(!ends(&status(1 << 12, 0)), "SIGPIPE, ignored");
        assert!(!ends(&status(1 << 16, 0)), "SIGCHLD");
        assert!(!is_ending(std::process::id()));
        assert!(is_ending(u32::MAX >> 1), "nobody");
    }

    #[test]
    fn we_are_not_idle_and_are_in_a_cgroup() {
        let pid = std::process::id();
        assert!(!io_is_idle(pid));
        assert!(cgroups(pid).starts_with(b"0::/") || cgroups(pid).contains(&b':'));
        assert!(!io_is_idle(u32::MAX >> 1) && cgroups(u32::MAX >> 1).is_empty());
    }
}
