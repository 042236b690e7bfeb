//! What judges the benches: a slower build fails, and only that does.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn script(name: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench");
    let mut command = Command::new("python3");
    command.arg(path.join(name));
    command
}

/// Made-up counts of one bench of ten files, as gungraun writes them: two threads.
fn counts(dir: &Path, bench: &str, per_file: u64) {
    for (id, total) in [("none", 1000), ("files_10", 1000 + 10 * per_file)] {
        let at = dir.join(format!("{bench}.{id}"));
        std::fs::create_dir_all(&at).expect("mkdir");
        let part = |n: u64| serde_json::json!({"metrics": {"Ir": {"values": {"new": n}}}});
        let summary = serde_json::json!({
            "function_name": bench,
            "id": id,
            "profiles": [{"data": {"parts": [part(400), part(total - 400)]}}],
        });
        std::fs::write(at.join("summary.json"), summary.to_string()).expect("write");
    }
}

struct Lab(tempfile::TempDir);

impl Lab {
    fn baseline(&self) -> PathBuf {
        self.0.path().join("baseline.json")
    }

    fn regress(&self, what: &str) -> Output {
        let mut command = script("regress.py");
        command.arg(what).arg(self.0.path().join("gungraun"));
        command.arg(self.baseline()).output().expect("python3")
    }

    /// The exit code of a comparison with `before` of counts of `now`.
    fn verdict(before: &[(&str, u64)], now: &[(&str, u64)]) -> (Lab, i32, String) {
        let lab = Lab(tempfile::tempdir().expect("tempdir"));
        let at = lab.0.path().join("gungraun");
        before.iter().for_each(|(b, n)| counts(&at, b, *n));
        assert!(lab.regress("write").status.success());
        std::fs::remove_dir_all(&at).expect("rm");
        now.iter().for_each(|(b, n)| counts(&at, b, *n));
        let output = lab.regress("compare");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (lab, output.status.code().expect("an exit"), said)
    }
}

#[test]
fn three_percent_more_instructions_fail_and_no_less_does() {
    let before = [("sync", 10_000), ("mark", 100)];
    for (sync, exit) in [(10_000, 0), (10_299, 0), (10_301, 1), (5000, 0)] {
        let (_, code, said) = Lab::verdict(&before, &[("sync", sync), ("mark", 100)]);
        assert_eq!(code, exit, "{said}");
        assert_eq!(said.contains("SLOWER"), exit == 1, "{said}");
    }
}

#[test]
fn the_least_of_several_runs_counts() {
    let lab = Lab(tempfile::tempdir().expect("tempdir"));
    let run = |n: &str| lab.0.path().join("gungraun").join(n);
    counts(&run("1"), "sync", 100);
    assert!(lab.regress("write").status.success());
    counts(&run("1"), "sync", 150);
    assert_eq!(lab.regress("compare").status.code(), Some(1));
    counts(&run("2"), "sync", 101);
    assert_eq!(lab.regress("compare").status.code(), Some(0));
}

#[test]
fn a_bench_that_is_gone_fails_and_a_new_one_is_told() {
    let (_, code, said) = Lab::verdict(&[("sync", 100), ("mark", 100)], &[("sync", 100)]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("not measured"), "{said}");
    let (_, code, said) = Lab::verdict(&[("sync", 100)], &[("sync", 100), ("mark", 100)]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("new"), "{said}");
}

#[test]
fn counts_of_another_compiler_are_not_compared() {
    let (lab, _, _) = Lab::verdict(&[("sync", 100)], &[("sync", 100)]);
    let text = std::fs::read_to_string(lab.baseline()).expect("read");
    let other = text.replace("rustc 1.", "rustc 0.");
    assert_ne!(text, other);
    std::fs::write(lab.baseline(), other).expect("write");
    assert_eq!(lab.regress("compare").status.code(), Some(3));
}

#[test]
fn the_plot_tells_who_is_slower_and_what_is_lost() {
    let dir = tempfile::tempdir().expect("tempdir");
    let row = |tool: &str, clock: [f64; 3], loses: &str| {
        serde_json::json!({
            "workload": "small", "fs": "ext4", "tool": tool, "rounds": 3, "scale": 1,
            "clock_s": clock, "exit": [0, 0, 0], "loses": loses,
        })
    };
    let rows = serde_json::json!([
        row("mirrorfs sync", [0.9, 1.0, 1.2], "nothing"),
        row("cp -a", [2.0, 2.5, 9.0], "nothing"),
        row(
            "a&b",
            [20.0, 22.0, 25.0],
            "acl, gid, hardlink, holes, mode, mtime, nlink"
        ),
    ]);
    let (from, to) = (dir.path().join("r.json"), dir.path().join("r.svg"));
    std::fs::write(&from, rows.to_string()).expect("write");
    let made = script("plot.py").arg(&from).arg(&to).status();
    assert!(made.expect("python3").success());
    let svg = std::fs::read_to_string(&to).expect("read");
    for words in [
        "1.00 s",
        "2.50 x",
        "22 x",
        "a&amp;b",
        "keeps everything",
        "loses acl, gid",
    ] {
        assert!(svg.contains(words), "{words}: {svg}");
    }
    let parse = "import sys, xml.dom.minidom as m; m.parse(sys.argv[1])";
    let whole = Command::new("python3")
        .args(["-c", parse])
        .arg(&to)
        .status();
    assert!(whole.expect("python3").success(), "well-formed");
}
