//! Out: words for people, on standard output and standard error, and numbers as people read them.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use crate::error::Printable;

/// One line on standard output.
pub(crate) fn say(line: &str) {
    raw(format!("{line}\n").as_bytes());
}

/// Bytes on standard output.
pub(crate) fn raw(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    // Who closed our output (`| head`) has read enough; the work and its exit code go on.
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush()); // As said.
}

/// One line on standard error: what went wrong. Whatever was given to us is in it: it may hold
/// newlines, and escape sequences for somebody's terminal.
pub(crate) fn complain(line: &str) {
    let escaped = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    let line: String = line.chars().map(escaped).collect();
    let _ = writeln!(std::io::stderr(), "mirrorfs: {line}"); // The exit code remains.
}

/// A path in quotes, as every message writes it.
pub(crate) fn quoted(path: &Path) -> String {
    format!("\"{}\"", Printable(path.as_os_str()))
}

/// `3,182,004`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `612.4 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    bytesize::ByteSize::b(n).display().iec().to_string()
}

/// `1 h 12 m`: two units at most.
pub(crate) fn duration(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} m {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} m", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86400, s % 86400 / 3600),
    }
}

/// `38 ms`, `0.4 s`, `12 s`, `3 m 20 s`.
pub(crate) fn seconds(ms: f64) -> String {
    match ms {
        ..1.0 => format!("{ms:.1} ms"),
        ..100.0 => format!("{ms:.0} ms"),
        ..10_000.0 => format!("{:.1} s", ms / 1e3),
        _ => duration(Duration::from_secs_f64(ms / 1e3)),
    }
}

/// `34 %`, rounded down: 100 % only when nothing is left.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    let percent = match whole {
        0 => 100,
        _ => u128::from(part.min(whole)) * 100 / u128::from(whole),
    };
    format!("{percent} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(3182004), "3,182,004");
        assert_eq!(percent(999, 1000), "99 %");
        assert_eq!(percent(0, 0), "100 %");
        assert_eq!(duration(Duration::from_secs(4320)), "1 h 12 m");
        assert_eq!(seconds(0.42), "0.4 ms");
        assert_eq!(seconds(38.4), "38 ms");
        assert_eq!(seconds(400.0), "0.4 s");
        assert_eq!(seconds(200_000.0), "3 m 20 s");
        assert_eq!(bytes(8 << 20), "8.0 MiB");
    }
}
