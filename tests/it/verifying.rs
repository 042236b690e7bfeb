//! `mirrorfs verify`: a line for each entry, and samples that cover everything.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::fixture::{Output, Scratch, find_program, mirrorfs, need, run, shell_as};

const FILES: usize = 60;

/// Two equal trees.
fn equal(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let (src, dst) = (scratch.dir("src"), scratch.dir("dst"));
    fs::create_dir(src.join("d")).unwrap();
    for n in 0..FILES {
        fs::write(src.join(format!("d/f{n}")), format!("bytes {n}")).unwrap();
    }
    std::os::unix::fs::symlink("f0", src.join("d/link")).unwrap();
    run(mirrorfs().arg("sync").arg(&src).arg(&dst)).expect_code(0);
    (src, dst)
}

/// Other bytes of the same size, and the mtime as it was.
fn corrupt(path: &Path) {
    let was = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[0] ^= 1;
    fs::write(path, bytes).unwrap();
    fs::File::open(path).unwrap().set_modified(was).unwrap();
}

#[test]
fn combined_has_a_symbol_for_each_entry() {
    let scratch = Scratch::new();
    let (src, dst) = equal(&scratch);
    let list = scratch.path().join("combined");
    let verify = |to: &Path| {
        let mut command = mirrorfs();
        command.arg("verify").arg(&src).arg(&dst);
        run(command.arg("--combined").arg(to))
    };
    verify(&list).expect_code(0);
    let text = fs::read_to_string(&list).unwrap();
    // The root, a directory, a symlink and the files, each once.
    assert_eq!(text.lines().count(), FILES + 3, "{text}");
    assert!(text.lines().all(|l| l.starts_with("= ")), "{text}");

    corrupt(&dst.join("d/f7"));
    fs::remove_file(dst.join("d/f8")).unwrap();
    fs::write(dst.join("d/new"), b"").unwrap();
    fs::remove_file(dst.join("d/link")).unwrap();
    fs::write(dst.join("d/link"), b"a file").unwrap();
    fs::set_permissions(dst.join("d/f9"), fs::Permissions::from_mode(0o400)).unwrap();
    let said = verify(&list).expect_code(9);
    assert!(said.out.contains("content: \"d/f7\""), "{}", said.out);
    let text = fs::read_to_string(&list).unwrap();
    let odd: BTreeSet<_> = text.lines().filter(|l| !l.starts_with("= ")).collect();
    let want = ["* d", "* d/f7", "* d/f9", "* d/link", "+ d/f8", "- d/new"];
    assert_eq!(odd, BTreeSet::from(want));
    assert_eq!(text.lines().count(), FILES + 4, "{text}");
    let out = verify(Path::new("-")).expect_code(9);
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(lines(&out.out), lines(&text));
    assert!(out.err.contains("differences"), "{}", out.err);
}

#[test]
fn what_cannot_be_read_is_neither_equal_nor_different() {
    let root = rustix::process::geteuid().is_root();
    if !need(
        root && find_program("setpriv").is_some(),
        "root and setpriv",
    ) {
        return;
    }
    let scratch = Scratch::new();
    let (src, dst) = equal(&scratch);
    for path in [scratch.path(), &src, &dst] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    for file in [src.join("d/f1"), dst.join("d/f1")] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    // A place where anybody may run it.
    let program = scratch.path().join("mirrorfs");
    fs::copy(mirrorfs().get_program(), &program).unwrap();
    let said = shell_as(
        65534,
        65534,
        scratch.path(),
        "./mirrorfs verify src dst --combined -",
    );
    assert!(said.out.contains("! d/f1\n"), "{}{}", said.out, said.err);
    assert!(said.out.contains("= d/f2\n"), "{}", said.out);
    said.expect_code(23);
}

#[test]
fn samples_find_each_damaged_file_in_exactly_one_of_n_runs() {
    let scratch = Scratch::new();
    let (src, dst) = equal(&scratch);
    for n in 0..FILES {
        corrupt(&dst.join(format!("d/f{n}")));
    }
    let sample = |sample: &str| {
        let mut command = mirrorfs();
        command
            .args(["verify", "--sample", sample])
            .arg(&src)
            .arg(&dst);
        let said = run(&mut command).expect_code(9);
        let found = said.out.lines().filter(|l| l.starts_with("content: "));
        let found = found.map(|l| l.split('"').nth(1).unwrap().to_owned());
        found.collect::<Vec<_>>()
    };
    let mut all = Vec::new();
    for number in 1..=4 {
        let mut found = sample(&format!("{number}/4"));
        assert!((1..FILES).contains(&found.len()), "{found:?}");
        let mut again = sample(&format!("{number}/4"));
        found.sort();
        again.sort();
        assert_eq!(found, again);
        all.extend(found);
    }
    assert_eq!(all.len(), FILES);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), FILES);
}

/// Its lines, each as docs/verify.schema.json says: the differences, and the sum.
#[track_caller]
fn json_lines(said: &Output) -> (Vec<Value>, Value) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schema = fs::read_to_string(root.join("docs/verify.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut all: Vec<Value> = Vec::new();
    for line in said.out.lines() {
        let mut value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let wrong: Vec<_> = validator
            .iter_errors(&value)
            .map(|e| e.to_string())
            .collect();
        assert!(wrong.is_empty(), "{wrong:?}: {line}");
        all.push(value.clone());
        value["surprise"] = true.into();
        assert!(
            !validator.is_valid(&value),
            "a new field is not seen: {line}"
        );
    }
    let sum = all
        .pop()
        .unwrap_or_else(|| panic!("nothing was said: {}", said.err));
    assert_eq!(sum["exit"], said.code());
    (all, sum["sum"].clone())
}

#[test]
fn json_says_what_the_lines_say() {
    let scratch = Scratch::new();
    let (src, dst) = equal(&scratch);
    let verify = |args: &[&str]| {
        let mut command = mirrorfs();
        run(command.arg("verify").arg(&src).arg(&dst).args(args))
    };
    let (lines, sum) = json_lines(&verify(&["--json"]).expect_code(0));
    assert!(lines.is_empty(), "{lines:?}");
    assert_eq!(sum["entries"], FILES + 2);
    assert_eq!(
        (&sum["manifest"], &sum["ignored"]),
        (&Value::Null, &0.into())
    );

    corrupt(&dst.join("d/f7"));
    fs::remove_file(dst.join("d/f8")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"d/n\xff\n\"");
    fs::write(dst.join(odd), b"").unwrap();
    fs::set_permissions(dst.join("d/f9"), fs::Permissions::from_mode(0o400)).unwrap();
    let (lines, sum) = json_lines(&verify(&["--json"]).expect_code(9));
    let mut told: Vec<_> = lines
        .iter()
        .map(|l| (l["kind"].as_str().unwrap(), l["path"].as_str().unwrap()))
        .collect();
    told.sort_unstable();
    let mut want = vec![
        ("content", "d/f7"),
        ("mode", "d/f9"),
        ("mtime", "d"),
        ("only_in_dst", "d/n\u{fffd}\n\""),
        ("only_in_src", "d/f8"),
    ];
    want.sort_unstable();
    assert_eq!(told, want);
    let extra = lines.iter().find(|l| l["kind"] == "only_in_dst").unwrap();
    assert_eq!(extra["path_hex"], "642f6eff0a22");
    assert_eq!(sum["differences"]["mtime"], 1);
    assert_eq!(sum["differences"].as_object().unwrap().len(), 5);

    // Beside a list in a file, and of a manifest.
    let list = scratch.path().join("list");
    let args = ["--json", "--combined", list.to_str().unwrap()];
    json_lines(&verify(&args).expect_code(9));
    assert_eq!(
        fs::read_to_string(&list).unwrap().lines().count(),
        FILES + 4
    );
    let manifest = scratch.path().join("manifest");
    run(mirrorfs().arg("manifest").arg(&src).arg(&manifest)).expect_code(0);
    let verify = |args: &[&str]| {
        let mut command = mirrorfs();
        command.arg("verify").arg("--manifest").arg(&manifest);
        run(command.arg(&dst).arg("--json").args(args))
    };
    let (lines, sum) = json_lines(&verify(&["--ignore-changed"]).expect_code(9));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(
        (&lines[0]["kind"], &lines[0]["path"]),
        (&"corrupt".into(), &"d/f7".into())
    );
    assert_eq!(sum["ignored"], 4, "{sum}");
    assert_eq!(sum["manifest"]["ended"], true);
}

/// Names of one inode, and bytes of it.
const NAMES: usize = 40;
const LARGE: usize = 20 << 20;

/// Two equal trees of one large file with many names, in many directories, and one without.
fn linked(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let (src, dst) = (scratch.dir("src"), scratch.dir("dst"));
    let content: Vec<u8> = (0..LARGE as u32 / 4)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    fs::write(src.join("n0"), content).unwrap();
    fs::write(src.join("single"), b"single").unwrap();
    for n in 1..NAMES {
        let dir = src.join(format!("d{}", n % 8));
        fs::create_dir_all(&dir).unwrap();
        fs::hard_link(src.join("n0"), dir.join(format!("n{n}"))).unwrap();
    }
    run(mirrorfs().args(["sync"]).arg(&src).arg(&dst)).expect_code(0);
    (src, dst)
}

/// Its JSON, and the bytes that its process has asked the kernel for (rchar of /proc/PID/io).
#[track_caller]
fn counted(args: &[&std::ffi::OsStr], want: i32) -> (Vec<Value>, Value, u64) {
    let program = mirrorfs().get_program().to_owned();
    let script = "\"$@\" & wait $!; code=$?; grep rchar /proc/$$/io >&2; exit $code";
    let mut shell = std::process::Command::new("bash");
    let said = run(shell.args(["-c", script, "bash"]).arg(program).args(args)).expect_code(want);
    let read = said
        .err
        .lines()
        .rev()
        .find_map(|l| l.strip_prefix("rchar: "));
    let read = read.unwrap_or_else(|| panic!("{}", said.err)).parse();
    let (lines, sum) = json_lines(&said);
    (lines, sum, read.unwrap())
}

#[test]
fn the_bytes_of_an_inode_are_read_once_for_all_its_names() {
    let scratch = Scratch::new();
    let (src, dst) = linked(&scratch);
    let manifest = scratch.path().join("manifest");
    let all = LARGE as u64 + "single".len() as u64;
    // Two trees: each is read once, and little else.
    let verify = ["verify", "--json"].map(std::ffi::OsStr::new);
    let two = [&verify[..], &[src.as_os_str(), dst.as_os_str()]].concat();
    let (_, sum, read) = counted(&two, 0);
    assert_eq!(
        (&sum["files"], &sum["bytes"]),
        (&(NAMES + 1).into(), &all.into())
    );
    assert!((2 * all..2 * all + (1 << 20)).contains(&read), "{read}");
    // One tree, written down and compared with that.
    let take = ["manifest".as_ref(), src.as_os_str(), manifest.as_os_str()];
    let said = run(mirrorfs().args(take)).expect_code(0);
    assert!(
        said.out.contains(" 20.0 MiB of 2 files read"),
        "{}",
        said.out
    );
    let mut one = verify.to_vec();
    one.extend(["--manifest".as_ref(), manifest.as_os_str(), dst.as_os_str()]);
    let (_, sum, read) = counted(&one, 0);
    assert_eq!(
        (&sum["files"], &sum["bytes"]),
        (&(NAMES + 1).into(), &all.into())
    );
    assert!((all..all + (1 << 20)).contains(&read), "{read}");

    // What differs is told of each name, as if each had been read.
    corrupt(&dst.join("n0"));
    let (lines, sum, read) = counted(&two, 9);
    assert!(read < all, "{read}");
    assert_eq!(sum["differences"]["content"], NAMES);
    let mut paths = BTreeSet::new();
    for line in lines {
        assert_eq!(line["detail"], "first difference at byte 0");
        assert!(paths.insert(line["path"].as_str().unwrap().to_owned()));
    }
    assert_eq!(paths.len(), NAMES);
    let (lines, sum, _) = counted(&one, 9);
    assert_eq!(sum["differences"]["corrupt"], NAMES);
    let details = lines.iter().map(|l| l["detail"].as_str().unwrap());
    assert_eq!(details.collect::<BTreeSet<_>>().len(), 1, "{lines:?}");
}

#[test]
fn a_name_that_is_an_inode_of_its_own_on_one_side_is_read_for_itself() {
    let scratch = Scratch::new();
    let (src, dst) = linked(&scratch);
    let (whole, alone) = (dst.join("n0"), dst.join("d3/n3"));
    fs::remove_file(&alone).unwrap();
    run(std::process::Command::new("cp")
        .arg("-a")
        .args([&whole, &alone]))
    .expect_code(0);
    corrupt(&alone);
    let args = [
        "verify".as_ref(),
        "--json".as_ref(),
        src.as_os_str(),
        dst.as_os_str(),
    ];
    let (lines, sum, _) = counted(&args, 9);
    let content: Vec<_> = lines.iter().filter(|l| l["kind"] == "content").collect();
    assert_eq!(content.len(), 1, "{lines:?}");
    assert_eq!(content[0]["path"], "d3/n3");
    assert!(sum["differences"]["links"].as_u64() >= Some(1), "{sum}");
}
