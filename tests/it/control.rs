//! Live control: a running migration is watched and steered over its socket and by signals.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{
    LIMIT, Mounted, Output, World, as_user, bytes, can_mount_on, fuse_mount_at, mirrorfs, run,
    status, wait_until,
};
use crate::messages;
use crate::raw;

const MIB: usize = 1 << 20;

fn world() -> Option<World> {
    can_mount_on("ext4").then(|| World::on("ext4"))
}

/// A file of src that no hole and no extent can make cheaper.
fn file(w: &World, name: &str, len: usize) {
    let path = w.src.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes(len as u64, len)).unwrap();
}

#[track_caller]
fn steer(args: &[&str], at: &Path) -> Output {
    run(mirrorfs().args(args).arg(at)).expect_code(0)
}

fn number(status: &Value, key: &str) -> u64 {
    status[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key}: {status:#}"))
}

/// The raw file below the mount carries a mark.
fn is_pending(path: &Path) -> bool {
    let mut value = [0; 256];
    rustix::fs::lgetxattr(path, "trusted.mirrorfs", &mut value).is_ok()
}

fn socket(pid: u32) -> PathBuf {
    let dir = std::env::var_os("MIRRORFS_RUN_DIR").unwrap_or_else(|| "/run/mirrorfs".into());
    Path::new(&dir).join(format!("{pid}.sock"))
}

fn call(pid: u32, method: &str, parameters: Value) -> Value {
    ask(&socket(pid), method, &parameters)
}

/// One message and its answer, as any Varlink client sends it.
fn ask(socket: &Path, method: &str, parameters: &Value) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut message = json!({ "method": method, "parameters": parameters }).to_string();
    message.push('\0');
    stream.write_all(message.as_bytes()).unwrap();
    let mut reply = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte[0] != 0 {
        reply.push(byte[0]);
    }
    let reply: Value = serde_json::from_slice(&reply).unwrap();
    let told = reply["parameters"]["message"].as_str();
    messages::heard(told.unwrap_or_default(), None);
    reply
}

#[test]
fn a_limit_holds_the_background_and_nobody_who_waits() {
    let Some(w) = world() else { return };
    for n in 0..40 {
        file(&w, &format!("small/{n}"), 32 << 10);
    }
    file(&w, "large", 24 * MIB);
    file(&w, "wanted", 6 * MIB);
    let begun = Instant::now();
    let m = w.mount_with(&["--bwlimit", "2M"], &[]);
    // Somebody waits for it, whether the background has begun it or not.
    let opened = Instant::now();
    assert_eq!(
        fs::read(m.path("wanted")).unwrap(),
        bytes(6 * MIB as u64, 6 * MIB)
    );
    assert!(
        opened.elapsed() < Duration::from_secs(2),
        "{:?}",
        opened.elapsed()
    );
    assert_eq!(number(&m.status(), "bwlimit"), 2 << 20);

    std::thread::sleep(Duration::from_secs(3).saturating_sub(begun.elapsed()));
    let pulled = number(&m.status(), "bytes_pulled") - 6 * MIB as u64;
    let most = (begun.elapsed().as_secs_f64() + 1.0) * 2.0 * MIB as f64;
    assert!(
        (pulled as f64) < most,
        "{pulled} bytes in {:?}",
        begun.elapsed()
    );
    assert!(is_pending(&w.dst.join("large")), "24 MiB at 2 MiB/s");

    steer(&["set", "--bwlimit", "off"], &m.at);
    m.wait_complete();
    assert_eq!(m.status()["bwlimit"], Value::Null);
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "{:?}",
        begun.elapsed()
    );
    m.finish();
    w.expect_finished_copy();
}

#[test]
fn a_pause_holds_the_background_and_serves_whoever_opens_something() {
    let Some(w) = world() else { return };
    for n in 0..200 {
        file(&w, &format!("d{}/f{n}", n % 7), 8 << 10);
    }
    file(&w, "large", 40 * MIB);
    let m = w.mount_with(&["--bwlimit", "1M"], &[]);
    steer(&["pause"], &m.at);
    steer(&["set", "--bwlimit", "0"], &m.at);
    wait_until("PAUSED", LIMIT, || m.status()["state"] == "PAUSED");
    // What was read already may still become durable.
    std::thread::sleep(Duration::from_millis(1500));
    let before = number(&m.status(), "bytes_pulled");
    std::thread::sleep(Duration::from_millis(1500));
    let status = m.status();
    assert_eq!(number(&status, "bytes_pulled"), before, "{status:#}");
    assert_eq!(status["background"], "paused");
    // All of it can be read all the same, though a part of it is in the background's hands.
    for n in 0..200 {
        let path = m.path(format!("d{}/f{n}", n % 7));
        assert_eq!(fs::read(path).unwrap(), bytes(8 << 10, 8 << 10), "{n}");
    }
    assert_eq!(
        fs::read(m.path("large")).unwrap(),
        bytes(40 * MIB as u64, 40 * MIB)
    );
    let mut large = fs::File::options()
        .append(true)
        .open(m.path("large"))
        .unwrap();
    large.write_all(b"more").unwrap();
    drop(large);
    steer(&["resume"], &m.at);
    m.wait_complete();
    assert_eq!(m.unmount(), 0);
    let read = fs::read(w.dst.join("large")).unwrap();
    assert_eq!(read.len(), 40 * MIB + 4);
    assert!(read.ends_with(b"more"));
}

/// The commit thread's last round, as its log says.
fn rounds(m: &Mounted) -> u64 {
    let log = m.log();
    let last = log.lines().rfind(|line| line.contains("synced number="));
    let number = |line: &str| {
        line.split("number=")
            .nth(1)?
            .split(' ')
            .next()?
            .parse()
            .ok()
    };
    last.map_or(0, |line| number(line).unwrap_or_else(|| panic!("{line}")))
}

#[test]
fn what_is_opened_while_nothing_else_is_pulled_is_synced_once_a_second() {
    for paused in [false, true] {
        let Some(w) = world() else { return };
        for n in 0..300 {
            file(&w, &format!("d{}/f{n}", n % 7), 4 << 10);
        }
        let m = w.mount_with(&["--no-background", "--log-level", "debug"], &[]);
        if paused {
            steer(&["pause"], &m.at);
        }
        let (begin, before) = (Instant::now(), rounds(&m));
        for n in 0..300 {
            fs::read(m.path(format!("d{}/f{n}", n % 7))).unwrap();
        }
        let raw = |n: usize| w.dst.join(format!("d{}/f{n}", n % 7));
        wait_until("no marks", LIMIT, || !(0..300).any(|n| is_pending(&raw(n))));
        let (rounds, most) = (rounds(&m) - before, begin.elapsed().as_secs() + 1);
        assert!(
            (1..=most).contains(&rounds),
            "{rounds} rounds, {most} at most"
        );
    }
}

#[test]
fn a_cancelled_background_leaves_everything_to_whoever_opens_it_until_it_is_resumed() {
    let Some(w) = world() else { return };
    for n in 0..300 {
        file(&w, &format!("d{}/f{n}", n % 11), 80 << 10);
    }
    file(&w, "large", 40 * MIB);
    let m = w.mount_with(&["--bwlimit", "1M"], &[]);
    wait_until("files under way", LIMIT, || {
        number(&m.status(), "entries_placed") > 5 && w.dst.join("large").exists()
    });
    steer(&["cancel"], &m.at);
    steer(&["set", "--bwlimit", "0"], &m.at);
    assert_eq!(m.status()["background"], "off");
    std::thread::sleep(Duration::from_millis(1500));
    let before = number(&m.status(), "files_pulled");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(number(&m.status(), "files_pulled"), before);
    assert!(is_pending(&w.dst.join("large")));
    // No failure: nobody has lost anything.
    assert_eq!(number(&m.status(), "errors"), 0);
    assert_eq!(
        fs::read(m.path("d3/f3")).unwrap(),
        bytes(80 << 10, 80 << 10)
    );
    assert_eq!(
        fs::read(m.path("large")).unwrap(),
        bytes(40 * MIB as u64, 40 * MIB)
    );
    steer(&["resume"], &m.at);
    m.finish();
    w.expect_finished_copy();
}

/// What hands a file from the background to a reader must never lose the reader.
#[test]
fn readers_are_served_while_the_background_is_steered_to_and_fro() {
    let Some(w) = world() else { return };
    for n in 0..400 {
        file(&w, &format!("f{n}"), (60 << 10) + n * 700);
    }
    let m = w.mount();
    let at = m.at.clone();
    let steering = std::thread::spawn(move || {
        for n in 0..30 {
            for command in ["cancel", "resume", "pause", "resume"] {
                steer(&[command], &at);
            }
            let rate = ["1M", "off", "20M"][n % 3];
            steer(
                &["set", "--bwlimit", rate, "--jobs", ["1", "0"][n % 2]],
                &at,
            );
        }
        steer(&["set", "--bwlimit", "off", "--jobs", "0"], &at);
    });
    let readers: Vec<_> = (0..4)
        .map(|k| {
            let at = m.at.clone();
            std::thread::spawn(move || {
                for n in (k..400).step_by(4) {
                    let len = (60 << 10) + n * 700;
                    let read = fs::read(at.join(format!("f{n}")));
                    assert_eq!(read.unwrap(), bytes(len as u64, len), "{n}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    steering.join().unwrap();
    assert_eq!(number(&m.status(), "errors"), 0, "{}", m.errors());
    m.finish();
    w.expect_finished_copy();
}

#[test]
fn a_paused_mount_stops_at_once() {
    let Some(w) = world() else { return };
    file(&w, "large", 64 * MIB);
    let mut m = w.mount_with(&["--bwlimit", "1M"], &[]);
    wait_until("seen", LIMIT, || number(&m.status(), "bytes_seen") > 0);
    std::thread::sleep(Duration::from_millis(300));
    steer(&["pause"], &m.at);
    let begun = Instant::now();
    raw::kill(m.pid, libc::SIGTERM);
    assert_eq!(m.wait_exit(LIMIT), Some(20));
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
pub(crate) fn pull_brings_files_and_trees_before_anybody_opens_them() {
    let Some(w) = world() else { return };
    for n in 0..50 {
        file(&w, &format!("tree/d{}/f{n}", n % 5), 3000 + n);
    }
    file(&w, "deep/er/large", 20 * MIB);
    file(&w, "other/a", 100);
    file(&w, "other/b", 100);
    std::os::unix::fs::symlink("a", w.src.join("other/link")).unwrap();
    let m = w.mount_lazy();
    let said = steer(&["pull"], &m.path("tree"));
    assert_eq!(said.out, "pulled 50 files\n");
    wait_until("durable", LIMIT, || {
        !(0..50).any(|n| is_pending(&w.dst.join(format!("tree/d{}/f{n}", n % 5))))
    });
    assert_eq!(steer(&["pull"], &m.path("tree")).out, "pulled 0 files\n");
    steer(&["pull", "-q"], &w.dst.join("deep/er/large"));
    // Here, and durable soon after; the others are not.
    wait_until("unmarked", LIMIT, || {
        !is_pending(&w.dst.join("deep/er/large"))
    });
    assert!(is_pending(&w.dst.join("other")), "not even populated");

    let mut list = mirrorfs();
    list.args(["pull", "-0", "-"]).stdin(Stdio::piped());
    let mut child = list.stdout(Stdio::piped()).spawn().unwrap();
    let link = m.path("other/link");
    let paths = format!("{}\0{}\0", w.src.join("other/b").display(), link.display());
    child
        .stdin
        .take()
        .unwrap()
        .write_all(paths.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "pulled 1 files\n");
    wait_until("b", LIMIT, || !is_pending(&w.dst.join("other/b")));
    assert!(is_pending(&w.dst.join("other/a")));

    let none = run(mirrorfs().arg("pull").arg(m.path("none"))).expect_code(23);
    assert!(none.err.contains("No such file"), "{}", none.err);
    let elsewhere = run(mirrorfs().args(["pull", "/usr/bin"])).expect_code(3);
    assert!(
        elsewhere.err.contains("no daemon serves it"),
        "{}",
        elsewhere.err
    );
    steer(&["pull"], &m.at);
    steer(&["wait", "--timeout", "60s"], &m.at);
    m.finish();
    w.expect_finished_copy();
}

#[test]
pub(crate) fn wait_tells_complete_from_stopped_and_from_too_late() {
    let Some(w) = world() else { return };
    file(&w, "a", 100);
    let m = w.mount_lazy();
    let late = run(mirrorfs().args(["wait", "--timeout", "100ms"]).arg(&m.at)).expect_code(30);
    assert!(late.err.contains("--timeout"), "{}", late.err);
    let mut waiting = mirrorfs();
    let waiting = waiting
        .arg("wait")
        .arg(&m.at)
        .stderr(Stdio::piped())
        .spawn();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(m.unmount(), 20);
    let output = waiting.unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(20));
    run(mirrorfs().arg("wait").arg(&w.dst)).expect_code(20);
    let m = w.mount();
    steer(&["wait"], &m.at);
    assert_eq!(m.status()["state"], "COMPLETE");
    m.finish();
}

#[test]
pub(crate) fn signals_toggle_the_limit_and_read_the_configuration_again() {
    let Some(w) = world() else { return };
    file(&w, "a", 20 * MIB);
    let conf = w.scratch_path("conf.toml");
    fs::write(&conf, "[mount]\nbwlimit = \"64K\"\njobs = 1\n").unwrap();
    let m = w.mount_with(&["--config", conf.to_str().unwrap()], &[]);
    let status = m.status();
    assert_eq!(
        (number(&status, "bwlimit"), number(&status, "jobs")),
        (64 << 10, 1)
    );
    fs::write(
        &conf,
        "[mount]\nbwlimit = \"128K\"\nlog-level = \"debug\"\n",
    )
    .unwrap();
    raw::kill(m.pid, libc::SIGHUP);
    wait_until("reread", LIMIT, || m.status()["bwlimit"] == 128 << 10);
    assert_eq!(m.status()["jobs"], Value::Null);
    // What cannot be read changes nothing.
    fs::write(&conf, "[mount]\nbwlimit = 3\n").unwrap();
    raw::kill(m.pid, libc::SIGHUP);
    wait_until("an error", LIMIT, || m.log().contains("limits stay"));
    assert_eq!(m.status()["bwlimit"], 128 << 10);
    raw::kill(m.pid, libc::SIGUSR2);
    wait_until("lifted", LIMIT, || m.status()["bwlimit_lifted"] == true);
    raw::kill(m.pid, libc::SIGUSR2);
    wait_until("applied", LIMIT, || m.status()["bwlimit_lifted"] == false);
    raw::kill(m.pid, libc::SIGUSR2);
    m.wait_complete();
}

#[test]
fn the_environment_comes_before_the_file_and_the_words_before_both() {
    let Some(w) = world() else { return };
    let conf = w.scratch_path("conf.toml");
    fs::write(&conf, "[mount]\nbwlimit = \"1M\"\njobs = 1\n").unwrap();
    let env = [
        ("MIRRORFS_CONFIG", conf.to_str().unwrap()),
        ("MIRRORFS_BWLIMIT", "2M"),
    ];
    let limit = |args: &[&str]| number(&w.mount_with(args, &env).status(), "bwlimit");
    assert_eq!(limit(&[]), 2 << 20);
    assert_eq!(limit(&["--bwlimit", "3M"]), 3 << 20);
    assert_eq!(limit(&["--bwlimit", "3M", "-o", "bwlimit=4M"]), 4 << 20);
    fs::write(&conf, "[mount]\n\nbandwidth = 3\n").unwrap();
    let refused = run(mirrorfs()
        .arg("mount")
        .args(["--config", env[0].1])
        .args([&w.src, &w.dst]));
    let refused = refused.expect_code(2);
    assert!(refused.err.contains("line 3"), "{}", refused.err);
}

#[test]
fn counters_go_on_where_the_last_daemon_ended() {
    let Some(w) = world() else { return };
    for n in 0..10 {
        file(&w, &format!("a/{n}"), 100_000);
    }
    file(&w, "b/late", 300_000);
    let m = w.mount_lazy();
    steer(&["pull"], &m.path("a"));
    wait_until("durable", LIMIT, || {
        number(&m.status(), "bytes_pulled") == 1_000_000
    });
    assert_eq!(m.unmount(), 20);
    let m = w.mount_lazy();
    let status = m.status();
    assert_eq!(number(&status, "bytes_pulled"), 1_000_000);
    assert_eq!(number(&status, "files_pulled"), 10);
    assert!(number(&status, "bytes_seen") >= 1_000_000);
    steer(&["resume"], &m.at);
    m.wait_complete();
    let status = m.status();
    assert_eq!(
        (
            number(&status, "bytes_pulled"),
            number(&status, "bytes_seen")
        ),
        (1_300_000, 1_300_000)
    );
    assert_eq!(
        (
            number(&status, "files_pulled"),
            number(&status, "files_seen")
        ),
        (11, 11)
    );
    assert_eq!(status["total"], "final");
    m.finish();
    w.expect_finished_copy();
}

/// Whoever looks again and again sees counters that only grow, and never a part above its whole.
#[test]
fn progress_never_runs_backwards() {
    let Some(w) = world() else { return };
    for n in 0..1500 {
        file(&w, &format!("d{}/f{n}", n % 40), 1000 + n * 13);
    }
    let m = w.mount_with(&["--bwlimit", "6M"], &[]);
    let mut before = [0; 4];
    loop {
        let status = m.status();
        let now = [
            "entries_placed",
            "files_pulled",
            "bytes_pulled",
            "bytes_seen",
        ];
        let now = now.map(|key| number(&status, key));
        assert!(
            now.iter().zip(&before).all(|(n, b)| n >= b),
            "{before:?} {now:?}"
        );
        assert!(number(&status, "bytes_total") >= now[2], "{status:#}");
        assert!(number(&status, "entries_total") >= now[0], "{status:#}");
        if status["walk_done"] == false {
            assert_ne!(status["total"], "final");
            let page = run(mirrorfs().arg("status").arg(&m.at)).out;
            assert!(
                page.contains("/ ~") || page.contains("COMPLETE") || page.contains("MIGRATING"),
                "{page}"
            );
        }
        before = now;
        if status["state"] == "COMPLETE" {
            break;
        }
    }
    m.finish();
}

#[test]
fn status_has_a_page_that_stays_and_a_line_for_scripts() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let m = w.mount();
    m.wait_complete();
    let line = steer(&["status", "-H"], &m.at).out;
    let fields: Vec<&str> = line.trim_end().split('\t').collect();
    assert_eq!(fields.len(), 16, "{line}");
    assert_eq!(fields[0], m.at.to_str().unwrap());
    assert_eq!(
        (fields[3], fields[8], fields[10]),
        ("COMPLETE", "1000", "1")
    );
    let mut watch = mirrorfs();
    watch
        .args(["status", "-w"])
        .arg(&m.at)
        .stdout(Stdio::piped());
    let watch = watch.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    m.finish();
    let output = watch.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.matches("COMPLETE").count() >= 2, "{text}");
    assert!(text.contains("has ended"), "{text}");
    assert!(!text.contains('\x1b'), "no terminal: {text}");
}

#[test]
fn a_varlink_client_finds_what_the_interface_promises() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let m = w.mount_lazy();
    let info = call(m.pid, "org.varlink.service.GetInfo", json!({}));
    assert_eq!(info["parameters"]["product"], "mirrorfs");
    let parameters = json!({ "interface": "org.mirrorfs" });
    let idl = call(
        m.pid,
        "org.varlink.service.GetInterfaceDescription",
        parameters,
    );
    let idl = idl["parameters"]["description"]
        .as_str()
        .unwrap()
        .to_owned();
    let status = call(m.pid, "org.mirrorfs.Status", json!({}))["parameters"].clone();
    // Every field of the answer is in the interface, and the reverse.
    let start = idl.find("method Status() -> (").unwrap();
    let fields = &idl[start + "method Status() -> (".len()..];
    let fields = &fields[..fields.find("\n)").unwrap()];
    let mut told: Vec<&str> = fields
        .split(',')
        .filter_map(|f| f.split(':').next())
        .map(str::trim)
        .collect();
    told.sort_unstable();
    let mut given: Vec<&str> = status
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    given.sort_unstable();
    assert_eq!(told, given);
    let wrong = call(m.pid, "org.mirrorfs.Set", json!({ "bwlimit": "fast" }));
    assert_eq!(wrong["error"], "org.varlink.service.InvalidParameter");
    let refused = call(m.pid, "org.mirrorfs.Finish", json!({}));
    assert_eq!(refused["error"], "org.mirrorfs.Refused");
    assert_eq!(refused["parameters"]["exit"], 1);
    call(m.pid, "org.mirrorfs.Pause", json!({}));
    assert_eq!(m.status()["background"], "paused");
}

/// docs/status.schema.json, checked by somebody else's validator.
#[test]
fn status_json_is_as_its_schema_says() {
    let Some(w) = world() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schema = fs::read_to_string(root.join("docs/status.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let check = |status: &Value| {
        let wrong: Vec<String> = validator
            .iter_errors(status)
            .map(|e| e.to_string())
            .collect();
        assert!(wrong.is_empty(), "{wrong:?}\n{status:#}");
    };
    file(&w, "a", 1000);
    file(&w, "large", 30 * MIB);
    let m = w.mount_with(&["--bwlimit", "1M", "-j", "1"], &[]);
    check(&m.status());
    let mut more = m.status();
    more["surprise"] = json!(1);
    assert!(
        !validator.is_valid(&more),
        "the schema would not notice a new field"
    );
    steer(&["set", "--bwlimit", "0"], &m.at);
    m.wait_complete();
    check(&m.status());
    assert_eq!(m.unmount(), 0);
    // Without a daemon there is less to tell.
    check(&status(&w.dst));
}

#[test]
pub(crate) fn only_root_and_the_daemons_user_may_steer() {
    let Some(w) = world() else { return };
    let dir = w.scratch_path("run");
    fs::create_dir(&dir).unwrap();
    let env = [("MIRRORFS_RUN_DIR", dir.to_str().unwrap())];
    let m = w.mount_with(&["--no-background"], &env);
    // Even with the door wide open the daemon asks who is there.
    let open = |path: &Path, mode| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let socket = dir.join(format!("{}.sock", m.pid));
    open(&dir, 0o755);
    open(&socket, 0o666);
    let said = as_user(65534, 65534, 0o022, || {
        ask(&socket, "org.mirrorfs.Stop", &json!({}))
    });
    assert_eq!(said["error"], "org.mirrorfs.Refused");
    assert_eq!(said["parameters"]["message"], "not allowed");
    assert!(fuse_mount_at(&m.at).is_some());
    let asked = run(mirrorfs()
        .arg("status")
        .arg(&m.at)
        .env("MIRRORFS_RUN_DIR", &dir));
    assert!(asked.expect_code(0).out.contains("PAUSED"));
}

/// The limit would hold its threads for minutes.
#[test]
fn a_stop_waits_for_no_limit_and_blames_no_src() {
    let Some(w) = world() else { return };
    for n in 0..400 {
        file(&w, &format!("d{}/f{n}", n / 40), 20_000);
    }
    let mut m = w.mount_with(&["--bwlimit", "20K"], &[]);
    let dirs: Vec<_> = (0..10).map(|n| w.dst.join(format!("d{n}"))).collect();
    wait_until("it has begun with some files", LIMIT, || {
        let in_dir = |dir| fs::read_dir(dir).map_or(0, Iterator::count);
        dirs.iter().map(in_dir).sum::<usize>() > 4
    });
    let begun = Instant::now();
    crate::raw::kill(m.pid, libc::SIGINT);
    assert_eq!(m.wait_exit(LIMIT), Some(20));
    eprintln!("stopped after {:?}", begun.elapsed());
    assert!(!m.log().contains("wait for src"), "{}", m.log());
}

#[test]
fn sync_goes_no_faster_than_its_limit() {
    let Some(w) = world() else { return };
    file(&w, "large", 5 * MIB);
    for n in 0..30 {
        file(&w, &format!("small/{n}"), 30_000);
    }
    let begun = Instant::now();
    run(mirrorfs()
        .args(["sync", "--bwlimit", "3M"])
        .args([&w.src, &w.dst]))
    .expect_code(0);
    let took = begun.elapsed();
    // 5.86 MiB at 3 MiB/s.
    assert!(took > Duration::from_millis(1700), "{took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    crate::compare::expect_equal(
        &crate::compare::manifest(&w.src),
        &crate::compare::manifest(&w.dst),
    );
}

/// Its queue is full: who connects waits until it takes somebody out, which it never does.
#[test]
fn a_daemon_that_hangs_keeps_nobody_from_mounting_or_asking() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let Some(w) = world() else { return };
    file(&w, "small", 10);
    let dir = w.scratch_path("run");
    fs::create_dir(&dir).unwrap();
    let socket = |flags| {
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let at = SocketAddrUnix::new(dir.join("1.sock")).unwrap();
    let hung = socket(SocketFlags::CLOEXEC);
    rustix::net::bind(&hung, &at).unwrap();
    rustix::net::listen(&hung, 1).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        match rustix::net::connect(&client, &at) {
            Ok(()) => waiting.push(client),
            Err(e) => break assert_eq!(e, rustix::io::Errno::AGAIN),
        }
    }
    let env = [("MIRRORFS_RUN_DIR", dir.to_str().unwrap())];
    let m = w.mount_with(&["--no-background"], &env);
    assert_eq!(fs::read(m.path("small")).unwrap().len(), 10);
    let asked = run(mirrorfs()
        .arg("status")
        .arg(&m.at)
        .env("MIRRORFS_RUN_DIR", &dir));
    assert!(asked.expect_code(0).out.contains("PAUSED"));
    assert!(dir.join("1.sock").exists(), "it may come to itself");
}
