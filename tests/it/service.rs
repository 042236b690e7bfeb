//! mirrorfs as a service: the mount helper, systemd, metrics, and the status page in a browser.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::fixture::{
    LIMIT, Output, World, bytes, can_mount_on, find_program, fuse_mount_at, mirrorfs, need, run,
    status, wait_until,
};
use crate::messages;

fn world() -> Option<World> {
    can_mount_on("ext4").then(|| World::on("ext4"))
}

fn file(w: &World, name: &str, len: usize) {
    fs::write(w.src.join(name), bytes(len as u64, len)).unwrap();
}

/// The program under the helper's name.
fn helper(w: &World) -> PathBuf {
    let path = w.scratch_path("mount.mirrorfs");
    if !path.exists() {
        std::os::unix::fs::symlink(mirrorfs().get_program(), &path).unwrap();
    }
    path
}

fn stop(at: &Path) {
    run(Command::new("umount").arg(at)).expect_code(0);
    let mut status = mirrorfs();
    let status = status.args(["status", "-H"]);
    wait_until("the daemon has gone", LIMIT, || {
        !run(status).out.contains(at.to_str().unwrap())
    });
}

#[test]
fn the_helper_mounts_as_fstab_says_and_once() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let options = format!(
        "rw,nofail,_netdev,x-systemd.requires-mounts-for=/old,dst={},bwlimit=10M",
        w.dst.display()
    );
    let call = |options: &str| -> Output {
        run(Command::new(helper(&w))
            .args([&w.src, &w.at])
            .args(["-n", "-o", options]))
    };
    call(&format!("{options},bogus")).expect_code(1);
    call("dst=/nowhere/at/all").expect_code(32);
    run(Command::new(helper(&w)).arg(&w.src)).expect_code(1);
    assert!(fuse_mount_at(&w.at).is_none());
    // -f only looks; -s forgives what nobody knows.
    run(Command::new(helper(&w))
        .args([&w.src, &w.at])
        .args(["-f", "-o", &options]))
    .expect_code(0);
    assert!(fuse_mount_at(&w.at).is_none());
    let sloppy = format!("{options},bogus");
    run(Command::new(helper(&w))
        .args([&w.src, &w.at])
        .args(["-s", "-o", &sloppy]))
    .expect_code(0);
    let pid = status(&w.at)["pid"].clone();
    assert_eq!(status(&w.at)["bwlimit"], 10 << 20);
    // Again: it is there.
    call(&options).expect_code(0);
    assert_eq!(status(&w.at)["pid"], pid);
    assert_eq!(fs::read(w.at.join("a")).unwrap(), bytes(1000, 1000));
    stop(&w.at);
    // As mount.fuse3 calls it: over DST itself.
    run(mirrorfs()
        .args([&w.src, &w.dst])
        .args(["-o", "rw,dev,suid"]))
    .expect_code(0);
    assert_eq!(fs::read(w.dst.join("a")).unwrap(), bytes(1000, 1000));
    stop(&w.dst);
}

/// The daemon of the first mount still lives when the second one is asked for: 0 is a mount.
#[test]
fn what_was_unmounted_a_moment_ago_is_mounted_again() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let options = format!("dst={},nobackground", w.dst.display());
    let mut helper = Command::new(helper(&w));
    helper.args([&w.src, &w.at]).args(["-o", &options]);
    let mut plain = mirrorfs();
    plain
        .args(["mount", "--no-background"])
        .args([&w.src, &w.dst, &w.at]);
    run(&mut helper).expect_code(0);
    for n in 0..6 {
        let before = status(&w.at)["pid"].clone();
        run(Command::new("umount").arg(&w.at)).expect_code(0);
        run(if n % 2 == 0 { &mut helper } else { &mut plain }).expect_code(0);
        assert!(fuse_mount_at(&w.at).is_some(), "0, and nothing is mounted");
        assert_ne!(status(&w.at)["pid"], before);
        assert_eq!(fs::read(w.at.join("a")).unwrap(), bytes(1000, 1000));
    }
    stop(&w.at);
}

#[test]
fn a_remount_makes_the_mount_read_only_and_back_or_fails() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let options = format!("dst={},nodev", w.dst.display());
    let call = |options: &str| -> Output {
        run(Command::new(helper(&w))
            .args([&w.src, &w.at])
            .args(["-o", options]))
    };
    call(&format!("{options},remount,ro")).expect_code(32);
    call(&options).expect_code(0);
    // Something is mounted, and the words are as wrong as where nothing is.
    call(&format!("{options},foo")).expect_code(1);
    call("remount,foo").expect_code(1);
    // As mount(8) does it: with what the table of mounts says.
    call(
        "rw,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions,allow_other,remount,ro",
    )
    .expect_code(0);
    let made = fs::write(w.at.join("made"), "x").map_err(|e| e.raw_os_error());
    assert_eq!(made, Err(Some(libc::EROFS)));
    assert_eq!(fs::read(w.at.join("a")).unwrap(), bytes(1000, 1000));
    let flags = |w: &World| rustix::fs::statvfs(&w.at).unwrap().f_flag;
    assert!(flags(&w).contains(rustix::fs::StatVfsMountFlags::NODEV));
    call("ro,remount,rw").expect_code(0);
    let open = fs::File::create(w.at.join("made")).unwrap();
    let busy = call("remount,ro").expect_code(32);
    assert!(busy.err.contains("open for writing"), "{}", busy.err);
    drop(open);
    let other = call("rw,remount,bwlimit=1M").expect_code(32);
    assert!(
        other.err.contains("changes only ro and rw"),
        "{}",
        other.err
    );
    call("remount,rw").expect_code(0);
    // What fstab says is no change that somebody asks for.
    call(&format!("{options},bwlimit=1M,remount,rw")).expect_code(0);
    stop(&w.at);
}

/// The real mount(8) finds helpers in /sbin only, so this runs in a mount namespace of its own. What is
/// installed there is a link to a program outside of it: the link is replaced, not what it leads to.
#[test]
fn mount_a_may_be_run_again() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let fstab = w.scratch_path("fstab");
    let (src, dst, at) = (w.src.display(), w.dst.display(), w.at.display());
    fs::write(
        &fstab,
        format!("{src} {at} mirrorfs dst={dst},nofail,x-test=1 0 0\n"),
    )
    .unwrap();
    let script = format!(
        "set -e; mount -t tmpfs none /mnt; mkdir /mnt/up /mnt/work; mount -t overlay o -o lowerdir=$(readlink -f /sbin),upperdir=/mnt/up,workdir=/mnt/work $(readlink -f /sbin)\n\
         cp --remove-destination {helper} /sbin/mount.mirrorfs\n\
         mount -a -T {fstab}; cat {at}/a | wc -c\n\
         mount -a -T {fstab}; mirrorfs_pid=$(grep -c fuse.mirrorfs /proc/self/mountinfo); echo mounts $mirrorfs_pid\n\
         umount {at}",
        helper = mirrorfs().get_program().to_str().unwrap(),
        fstab = fstab.display(),
    );
    let output = run(Command::new("unshare").args(["--mount", "sh", "-c", &script]));
    if output.err.contains("overlay") {
        need(false, "overlayfs");
        return;
    }
    let output = output.expect_code(0);
    assert_eq!(output.out, "1000\nmounts 1\n", "{}", output.err);
}

#[test]
fn systemd_hears_when_the_mount_is_usable_and_how_far_it_is() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let path = w.scratch_path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let m = w.mount_with(&[], &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let heard = || {
        let mut buffer = [0; 4096];
        let n = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    assert_eq!(heard(), "READY=1\n");
    let line = heard();
    assert!(
        line.starts_with("STATUS=") && line.contains("files 1 / 1"),
        "{line}"
    );
    m.finish();
    let last = std::iter::repeat_with(heard).find(|line| !line.starts_with("STATUS="));
    assert_eq!(last.as_deref(), Some("STOPPING=1\n"));
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    if !need(find_program("systemd-analyze").is_some(), "systemd-analyze") {
        return;
    }
    let scratch = crate::fixture::Scratch::new();
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/systemd/mirrorfs@.service");
    let unit = fs::read_to_string(unit).unwrap();
    let program = mirrorfs().get_program().to_str().unwrap().to_owned();
    let copy = scratch.path().join("mirrorfs@test.service");
    fs::write(&copy, unit.replace("/usr/bin/mirrorfs", &program)).unwrap();
    let said = run(Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(copy));
    let said = said.expect_code(0);
    assert_eq!(said.err, "");
}

/// A port that nobody has.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Status and body of an answer.
fn http(port: u16, method: &str, path: &str, host: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\
         Content-Length: {length}\r\nContent-Type: application/json\r\n\r\n{body}"
    )
    .unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let code = line
        .split(' ')
        .nth(1)
        .and_then(|c| c.parse().ok())
        .unwrap_or(0);
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).unwrap();
        match line.trim_end().split_once(':') {
            Some((key, value)) if key.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap();
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let body = String::from_utf8_lossy(&body).into_owned();
    messages::heard(&body, None);
    (code, body)
}

fn get(port: u16, path: &str) -> String {
    let (code, body) = http(port, "GET", path, "localhost", "");
    assert_eq!(code, 200, "{path}: {body}");
    body
}

/// The value of a metric without its labels.
fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(&format!("{name}{{")));
    let line = line.unwrap_or_else(|| panic!("{name}: {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
pub(crate) fn metrics_say_what_status_says_and_to_this_machine_only() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    file(&w, "b", 3000);
    let prom = w.scratch_path("mirrorfs.prom");
    let port = port();
    let args = [
        "--metrics",
        &port.to_string(),
        "--metrics-file",
        prom.to_str().unwrap(),
    ];
    let m = w.mount_with(&args, &[]);
    assert_eq!(fs::read(m.path("a")).unwrap().len(), 1000);
    m.wait_complete();
    let text = get(port, "/metrics");
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert_eq!(metric(&text, "mirrorfs_pulled_bytes_total"), 4000.0);
    assert_eq!(metric(&text, "mirrorfs_entries_placed_total"), 2.0);
    assert!(text.contains("state=\"COMPLETE\"} 1\n") && text.contains("state=\"WALKING\"} 0\n"));
    assert!(text.contains("le=\"+Inf\""), "{text}");
    // Every metric is in the document, and the reverse.
    let doc = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/METRICS.md");
    let doc = fs::read_to_string(doc).unwrap();
    let mut given: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# TYPE "))
        .filter_map(|l| l.split(' ').next())
        .chain(["mirrorfs_eta_seconds"])
        .collect();
    let mut told: Vec<&str> = doc
        .split('`')
        .filter(|word| word.starts_with("mirrorfs_") && !word.contains(['{', ' ']))
        .map(|word| word.strip_suffix("_total").unwrap_or(word))
        .collect();
    given.sort_unstable();
    told.sort_unstable();
    given.dedup();
    told.dedup();
    assert_eq!(given, told);
    let page = get(port, "/");
    assert!(page.starts_with("<!doctype html>"));
    assert!(
        !page.contains("http://") && !page.contains("https://"),
        "all is in the page"
    );
    let status: Value = serde_json::from_str(&get(port, "/status.json")).unwrap();
    assert_eq!(status["bytes_pulled"], 4000);
    assert_eq!(http(port, "GET", "/status.json", "evil.example", "").0, 403);
    assert_eq!(http(port, "POST", "/", "localhost", "").0, 405);
    assert_eq!(http(port, "GET", "/nothing", "localhost", "").0, 404);
    // Somebody else has the port.
    let taken = run(mirrorfs()
        .args(["mount", "--metrics", &port.to_string()])
        .args([&w.src, &w.dst]));
    assert!(
        taken.code() != 0 && taken.err.lines().count() == 1,
        "{}",
        taken.err
    );
    m.finish();
    let last = fs::read_to_string(&prom).unwrap();
    assert_eq!(metric(&last, "mirrorfs_pulled_bytes_total"), 4000.0);
    assert!(last.contains("state=\"FINISHED\"} 1\n"), "{last}");
}

/// A headless Chromium, steered by WebDriver.
struct Browser {
    driver: Child,
    port: u16,
    session: String,
}

impl Browser {
    fn start() -> Browser {
        let port = port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("chromedriver", LIMIT, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        let mut browser = Browser {
            driver,
            port,
            session: String::new(),
        };
        let args = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": { "args": args } } } });
        let made = browser.ask("POST", "", &wanted);
        browser.session = format!("/{}", made["sessionId"].as_str().unwrap());
        browser
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("/session{}{path}", self.session);
        let (code, text) = http(self.port, method, &path, "localhost", &body.to_string());
        assert_eq!(code, 200, "{method} {path}: {text}");
        serde_json::from_str::<Value>(&text).unwrap()["value"].clone()
    }

    fn element(&self, id: &str) -> String {
        let by = json!({ "using": "css selector", "value": format!("#{id}") });
        let found = self.ask("POST", "/element", &by);
        found
            .as_object()
            .unwrap()
            .values()
            .next()
            .unwrap()
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// What a person sees: nothing while it is hidden.
    fn text(&self, id: &str) -> String {
        let path = format!("/element/{}/text", self.element(id));
        self.ask("GET", &path, &json!({}))
            .as_str()
            .unwrap()
            .to_owned()
    }

    fn click(&self, id: &str) {
        let path = format!("/element/{}/click", self.element(id));
        self.ask("POST", &path, &json!({}));
    }

    fn attribute(&self, id: &str, name: &str) -> String {
        let path = format!("/element/{}/attribute/{name}", self.element(id));
        self.ask("GET", &path, &json!({}))
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let path = format!("/session{}", self.session);
            http(self.port, "DELETE", &path, "localhost", "");
        }
        self.driver.kill().unwrap();
        self.driver.wait().unwrap();
    }
}

#[test]
fn the_status_page_shows_a_migration_in_a_browser() {
    let Some(w) = world() else { return };
    if !need(
        find_program("chromedriver").is_some(),
        "chromedriver and chromium",
    ) {
        return;
    }
    for n in 0..60 {
        file(&w, &format!("f{n}"), 100_000);
    }
    // A name that would be a tag, if anybody wrote it as HTML.
    let odd = "<img src=x onerror=document.title=1>";
    file(&w, odd, 10);
    let port = port();
    let m = w.mount_with(&["--metrics", &port.to_string(), "--bwlimit", "300K"], &[]);
    let browser = Browser::start();
    let url = json!({ "url": format!("http://127.0.0.1:{port}/") });
    browser.ask("POST", "/url", &url);
    wait_until("the state", LIMIT, || browser.text("state").len() > 3);
    assert!(
        ["WALKING", "MIGRATING"].contains(&browser.text("state").as_str()),
        "{}",
        browser.text("state")
    );
    assert!(browser.text("where").contains(w.src.to_str().unwrap()));
    assert!(
        browser.text("since").contains("limit 300.0 KiB/s"),
        "{}",
        browser.text("since")
    );
    wait_until("a rate", LIMIT, || {
        browser.attribute("curve", "d").contains('L')
    });
    assert!(
        browser.text("rate-max").contains("KiB/s"),
        "{}",
        browser.text("rate-max")
    );

    browser.click("tab-waiting");
    assert_eq!(browser.text("waiting-none"), "Nobody waits.");
    assert_eq!(browser.text("rate-max"), "", "the other tab is hidden");
    browser.click("tab-errors");
    assert_eq!(browser.text("errors-none"), "No errors.");
    browser.click("tab-rates");
    assert!(browser.text("rate-span").starts_with("from "));

    run(mirrorfs().args(["set", "--bwlimit", "off"]).arg(&m.at)).expect_code(0);
    m.wait_complete();
    wait_until("COMPLETE", LIMIT, || browser.text("state") == "COMPLETE");
    assert!(
        browser.text("data").contains("100 %"),
        "{}",
        browser.text("data")
    );
    assert!(browser.text("action").starts_with("mirrorfs finish"));
    m.finish();
    wait_until("GONE", LIMIT, || browser.text("state") == "GONE");
}

/// The labels of each series, by its name, and the values that they have.
type Series = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn exported(text: &str) -> Series {
    let mut all = Series::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (name, rest) = line.split_once('{').unwrap();
        let labels = all.entry(name.to_owned()).or_default();
        for label in rest.rsplit_once('}').unwrap().0.split("\",") {
            let (key, value) = label.split_once("=\"").unwrap();
            let value = value.trim_end_matches('"').to_owned();
            labels.entry(key.to_owned()).or_default().insert(value);
        }
    }
    all
}

/// An expression of PromQL, and what else is told of its result: `{{label}}`, `$labels.label`.
struct Asked {
    expr: String,
    told: String,
}

fn asked_by_the_dashboard(value: &Value, all: &mut Vec<Asked>) {
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    if let Some(expr) = text("expr") {
        let told = text("legendFormat").unwrap_or_default();
        all.push(Asked { expr, told });
    }
    if let Some(of) = text("query").and_then(|q| Some(q.strip_prefix("label_values(")?.to_owned()))
    {
        let (expr, label) = of.trim_end_matches(')').split_once(", ").unwrap();
        let (expr, told) = (expr.to_owned(), format!("{{{{{label}}}}}"));
        all.push(Asked { expr, told });
    }
    let inner: Vec<&Value> = match value {
        Value::Object(map) => map.values().collect(),
        Value::Array(list) => list.iter().collect(),
        _ => Vec::new(),
    };
    inner.iter().for_each(|v| asked_by_the_dashboard(v, all));
}

fn asked_by_the_alerts(text: &str) -> Vec<Asked> {
    let rules = text.split("- alert:").skip(1);
    let asked = rules.map(|rule| {
        let (_, expr) = rule.split_once("expr:").unwrap();
        let end = ["\n        for:", "\n        labels:"];
        let end = end.iter().filter_map(|key| expr.find(key)).min();
        let (expr, told) = expr.split_at(end.unwrap());
        let (expr, told) = (expr.to_owned(), told.to_owned());
        Asked { expr, told }
    });
    asked.collect()
}

/// The words of a text that could be names.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| !w.is_empty())
}

/// What is wrong with an expression: a series that is not exported, a label that it has not.
fn wrong(asked: &Asked, exported: &Series) -> Vec<String> {
    let mut wrong = Vec::new();
    // Prometheus' own.
    let mut labels: BTreeSet<&str> = ["instance", "job"].into();
    for (at, _) in asked.expr.match_indices("mirrorfs_") {
        let after = &asked.expr[at..];
        let name = words(after).next().unwrap();
        let Some(has) = exported.get(name) else {
            wrong.push(format!("{name} is not exported"));
            continue;
        };
        labels.extend(has.keys().map(String::as_str));
        let Some(selector) = after[name.len()..].strip_prefix('{') else {
            continue;
        };
        for one in selector.split_once('}').unwrap().0.split(',') {
            let (key, value) = one.split_once('=').unwrap();
            let Some(values) = has.get(key.trim_end_matches('!')) else {
                wrong.push(format!("{name} has no label {key}"));
                continue;
            };
            let unknown = |v: &&str| !v.starts_with("mountpoint") && !values.contains(*v);
            // `$mountpoint` is the dashboard's own.
            for value in words(value).filter(unknown) {
                wrong.push(format!("{name}: no {key} is ever {value}"));
            }
        }
    }
    let grouped = asked.expr.match_indices(['(']).filter_map(|(at, _)| {
        let by = words(&asked.expr[..at]).last()?;
        ["by", "on", "without"].contains(&by).then(|| {
            let inner = &asked.expr[at..];
            inner.split_once(')').map_or(inner, |(list, _)| list)
        })
    });
    let told = asked.told.split("{{").skip(1);
    let told = told.filter_map(|t| Some(t.split_once("}}")?.0.trim()));
    let told = told.map(|t| t.strip_prefix("$labels.").unwrap_or(t));
    let told = told.filter(|t| !t.starts_with("$value"));
    for label in grouped.flat_map(words).chain(told) {
        if !labels.contains(label) {
            wrong.push(format!("no label {label}"));
        }
    }
    wrong
}

#[test]
fn the_dashboard_and_the_alerts_ask_for_what_is_exported() {
    let Some(w) = world() else { return };
    file(&w, "a", 1000);
    let port = port();
    let m = w.mount_with(&["--metrics", &port.to_string()], &[]);
    m.wait_complete();
    let mut exported = exported(&get(port, "/metrics"));
    m.finish();
    // Missing while it cannot be told.
    let like = exported["mirrorfs_left_bytes"].clone();
    exported.insert("mirrorfs_eta_seconds".to_owned(), like);
    let example = |name: &str| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
        fs::read_to_string(root.join(name)).unwrap()
    };
    let mut asked = Vec::new();
    let dashboard = serde_json::from_str(&example("grafana/mirrorfs.json")).unwrap();
    asked_by_the_dashboard(&dashboard, &mut asked);
    assert!(asked.len() > 15, "{}", asked.len());
    let rules = example("prometheus/mirrorfs.rules.yml");
    let alerts = asked_by_the_alerts(&rules);
    assert_eq!(alerts.len(), rules.matches("expr:").count());
    for one in asked.iter().chain(&alerts) {
        assert_eq!(wrong(one, &exported), [""; 0], "{}", one.expr);
    }
    // What would be found.
    for (expr, told) in [
        ("mirrorfs_pulled_bytes", ""),
        ("rate(mirrorfs_waits_total[1m])", ""),
        ("mirrorfs_state{State=\"COMPLETE\"}", ""),
        ("mirrorfs_state{state=~\"COMPLETE|FAILED\"}", ""),
        ("sum by (device) (mirrorfs_errors)", ""),
        ("mirrorfs_errors", "{{ $labels.device }}"),
        ("mirrorfs_errors", "{{state}} of {{mountpoint}}"),
    ] {
        let (expr, told) = (expr.to_owned(), told.to_owned());
        assert_eq!(wrong(&Asked { expr, told }, &exported).len(), 1);
    }
}
