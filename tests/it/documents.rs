//! The documents: the commands that they show are run, in the order in which they stand there.
//!
//! `<!-- run -->` before a block says so; `<!-- run: mounted -->`: in a migration that has begun.
//! `/old` and `/srv/data` are directories of the test. A command of ours that stands elsewhere and names what
//! it works on is run by itself, on a tree that is as far as it has to be; what stands for a path is one then.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::fixture::{LoopFs, can_mount, can_mount_on, mirrorfs, need, run};

/// How many blocks there are: one that loses its mark is not lost silently.
const BLOCKS: &[(&str, usize)] = &[("README.md", 1), ("docs/OPERATIONS.md", 5)];

struct Block {
    mounted: bool,
    text: String,
}

fn blocks(document: &str) -> Vec<Block> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
    let text = fs::read_to_string(path).unwrap();
    let parts = text.split("<!-- run").skip(1);
    let block = |part: &str| {
        let (mark, rest) = part.split_once("-->\n```").unwrap();
        let (_, rest) = rest.split_once('\n').unwrap();
        Block {
            mounted: mark.contains("mounted"),
            text: rest.split("```").next().unwrap().to_owned(),
        }
    };
    parts.map(block).collect()
}

#[test]
fn commands_of_the_documents_do_what_they_say() {
    if !need(
        can_mount() && can_mount_on("ext4"),
        "root, /dev/fuse and mkfs.ext4",
    ) {
        return;
    }
    for (document, count) in BLOCKS {
        let blocks = blocks(document);
        assert_eq!(blocks.len(), *count, "{document}");
        for block in blocks {
            run_block(document, &block);
        }
    }
}

/// What follows `-o` and `--` in what the documents for users show as code.
fn options(document: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
    let text = fs::read_to_string(path).unwrap();
    let mut found = Vec::new();
    for code in text.split('`').skip(1).step_by(2) {
        let mut words = code.split_whitespace().peekable();
        while let Some(word) = words.next() {
            let end = |w: &str| w.split('=').next().unwrap_or_default().to_owned();
            match (word, words.peek()) {
                ("-o", Some(key)) => found.push(format!("-o {}", end(key))),
                _ if word.starts_with("--") => found.push(end(word)),
                _ => {}
            }
        }
    }
    found
}

#[test]
fn every_option_that_tuning_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let help = fs::read_to_string(root.join("tests/it/help.txt")).unwrap();
    let known = |option: &str| match option.strip_prefix("-o ") {
        Some(key) => help.contains(&format!("{key}=")) || help.contains(key),
        None => help
            .split(|c: char| c != '-' && !c.is_alphanumeric())
            .any(|word| word == option),
    };
    let all = options("docs/TUNING.md");
    assert!(all.len() > 15, "{all:?}");
    let unknown: Vec<_> = all.iter().filter(|o| !known(o)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert!(!known("--no-such-option") && !known("-o nosuchkey"));
}

/// The commands of ours that a document shows, in blocks and in its text, word by word.
fn commands(text: &str) -> Vec<Vec<String>> {
    let (mut found, mut in_block) = (Vec::new(), false);
    for line in text.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
            continue;
        }
        let pieces: Vec<&str> = match in_block {
            true => line.split(['|', ';', '&']).collect(),
            false => line.split('`').skip(1).step_by(2).collect(),
        };
        for piece in pieces {
            let piece = piece.trim_start_matches(|c: char| "$# ".contains(c));
            let piece = piece.strip_prefix("sudo ").unwrap_or(piece);
            let words = piece.split_whitespace().map(str::to_owned);
            let words: Vec<String> = words.take_while(|word| word != "#").collect();
            if words.first().is_some_and(|w| w == "mirrorfs") && words.len() > 1 {
                found.push(words);
            }
        }
    }
    found
}

/// What is wrong with a command, by what `--help` says.
fn wrong(words: &[String], help: &str) -> Option<String> {
    let (command, rest) = (&words[1], &words[2..]);
    // What it prints shows its version.
    let printed = command.starts_with(|c: char| c.is_ascii_digit());
    if printed || command.starts_with('-') || ["COMMAND", "..."].contains(&command.as_str()) {
        return None;
    }
    let title = format!("======== mirrorfs {command} --help\n");
    let Some((_, own)) = help.split_once(&title) else {
        return Some(format!("no such command: {words:?}"));
    };
    let own = own.split("========").next().unwrap();
    let knows = |option: &str| {
        let mut all = own.split(|c: char| c != '-' && !c.is_alphanumeric());
        all.any(|word| word == option)
    };
    let option = |w: &&String| w.starts_with('-') && w.len() > 1;
    let name = |w: &String| w.split(['=', ']']).next().unwrap_or_default().to_owned();
    let unknown = rest.iter().filter(option).map(name).find(|o| !knows(o));
    unknown.map(|option| format!("{option}: {words:?}"))
}

#[test]
fn every_command_that_the_documents_show_is_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let help = fs::read_to_string(root.join("tests/it/help.txt")).unwrap();
    let mut documents = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    let list = fs::read_dir(root.join("docs")).unwrap();
    documents.extend(list.map(|entry| entry.unwrap().path()));
    documents.retain(|path| path.extension().is_some_and(|e| e == "md"));
    let (mut seen, mut bad) = (0, Vec::new());
    for path in documents {
        for words in commands(&fs::read_to_string(&path).unwrap()) {
            seen += 1;
            let what = wrong(&words, &help);
            bad.extend(what.map(|what| format!("{}: {what}", path.display())));
        }
    }
    assert!(seen > 60, "{seen} commands");
    assert!(bad.is_empty(), "{bad:#?}");
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    for line in ["mirrorfs snyc SRC DST", "mirrorfs sync --no-such SRC DST"] {
        assert!(wrong(&words(line), &help).is_some(), "{line}");
    }
}

/// What is for users: their commands are run.
const FOR_USERS: &[&str] = &[
    "README.md",
    "docs/OPERATIONS.md",
    "docs/CONFIGURATION.md",
    "docs/TUNING.md",
    "docs/TROUBLESHOOTING.md",
];

/// A command with paths of the test, and how many there are; `None`: something in it stands for too much.
fn filled_in(words: &[String], dir: &Path) -> Option<(Vec<String>, usize)> {
    let mut places = 0;
    let mut place = |name: &str| {
        places += 1;
        Some(dir.join(name).display().to_string())
    };
    let word = |word: &String| match word.as_str() {
        "SRC" | "/old" => place("old"),
        "DST" | "PATH" | "[PATH]" | "PATH..." | "/srv/data" => place("data"),
        "FILE" | "/old.mtree" => place("manifest"),
        "K/N" => Some("1/1".to_owned()),
        "N" => Some("2".to_owned()),
        "SHELL" => Some("bash".to_owned()),
        "[COMMAND]" => Some("sync".to_owned()),
        text => match text.strip_prefix("/srv/data/") {
            Some(below) => place(&format!("data/{below}")),
            None => {
                let shown = text.chars().any(|c| "<>[]|".contains(c)) || text.ends_with("...");
                (!shown && !text.chars().all(char::is_uppercase)).then(|| text.to_owned())
            }
        },
    };
    let all: Option<Vec<String>> = words[1..].iter().map(word).collect();
    Some((all?, places))
}

/// How many paths make a command whole; `None`: it needs no tree.
fn places_of(command: &str) -> Option<usize> {
    match command {
        "man" | "completions" => None,
        "mount" | "sync" | "verify" | "manifest" => Some(2),
        _ => Some(1),
    }
}

#[test]
fn commands_that_stand_in_the_text_can_be_run() {
    if !need(
        can_mount() && can_mount_on("ext4"),
        "root, /dev/fuse and mkfs.ext4",
    ) {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = BTreeSet::new();
    for document in FOR_USERS {
        all.extend(commands(&fs::read_to_string(root.join(document)).unwrap()));
    }
    let disk = LoopFs::new("ext4");
    let (mut ran, mut failed) = (0, Vec::new());
    for (n, words) in all.iter().enumerate() {
        let dir = disk.dir(&n.to_string());
        let Some((args, places)) = filled_in(words, &dir) else {
            continue;
        };
        let wanted = places_of(&args[0]);
        if args[0].starts_with(|c: char| !c.is_alphabetic())
            || places < wanted.unwrap_or(0)
            || wanted.is_none() && args.len() < 2
            || args[0] == "set" && args.len() < 3
        {
            continue;
        }
        failed.extend(run_alone(&dir, &args).map(|why| format!("{}: {why}", words.join(" "))));
        ran += 1;
    }
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(ran > 25, "{ran} of {all:?}");
}

/// Runs a command on a small tree, which is mounted, copied, or neither, as the command needs it; what it has
/// said, if it fails.
fn run_alone(dir: &Path, args: &[String]) -> Option<String> {
    let (old, data, manifest) = (dir.join("old"), dir.join("data"), dir.join("manifest"));
    for path in [&old.join("today"), &data, &dir.join("run")] {
        fs::create_dir_all(path).unwrap();
    }
    for n in 0..3 {
        fs::write(old.join(format!("today/f{n}")), "today").unwrap();
    }
    let ours = |args: &[&std::ffi::OsStr]| {
        let mut command = mirrorfs();
        command.args(args).env("MIRRORFS_RUN_DIR", dir.join("run"));
        run(command.stdin(Stdio::null()))
    };
    let (old_, data_, manifest_) = (old.as_ref(), data.as_ref(), manifest.as_ref());
    let has = |word: &str| args.iter().any(|arg| arg == word);
    match args[0].as_str() {
        "verify" => {
            ours(&["sync".as_ref(), old_, data_]).expect_code(0);
            ours(&["manifest".as_ref(), old_, manifest_]).expect_code(0);
        }
        "mount" if has("--adopt") => {
            ours(&["sync".as_ref(), old_, data_]).expect_code(0);
        }
        "mount" | "sync" | "manifest" | "man" | "completions" => {}
        command => {
            ours(&["mount".as_ref(), old_, data_]).expect_code(0);
            if command == "finish" {
                ours(&["wait".as_ref(), data_]).expect_code(0);
            }
        }
    }
    let args: Vec<&std::ffi::OsStr> = args.iter().map(AsRef::as_ref).collect();
    let said = ours(&args);
    // Whatever has failed: no mount is left.
    for path in [&data, &old] {
        let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH); // As said.
    }
    (said.code() != 0).then_some(said.err)
}

fn run_block(document: &str, block: &Block) {
    let disk = LoopFs::new("ext4");
    let (old, data, control) = (disk.dir("old"), disk.dir("data"), disk.dir("run"));
    for name in ["today", "projects/a", "projects/b"] {
        fs::create_dir_all(old.join(name)).unwrap();
        for n in 0..20 {
            fs::write(old.join(name).join(format!("f{n}")), name.repeat(n)).unwrap();
        }
    }
    let here = |text: &str| {
        let text = text.replace("/srv/data", &data.display().to_string());
        text.replace("/old", &old.display().to_string())
    };
    let program = mirrorfs();
    let program = Path::new(program.get_program()).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mount = if block.mounted {
        "mirrorfs mount /old /srv/data\n"
    } else {
        ""
    };
    let script = here(&format!("set -ex\n{mount}{}", block.text));
    let said = run(Command::new("sh")
        .arg("-c")
        .arg(&script)
        .env("PATH", path)
        .env("MIRRORFS_RUN_DIR", &control));
    let code = said.code();
    // Whatever has failed: no mount is left.
    let _ = rustix::mount::unmount(&data, rustix::mount::UnmountFlags::DETACH); // As said.
    assert_eq!(
        code, 0,
        "{document}:\n{}\n{}\n{}",
        block.text, said.out, said.err
    );
    let copy = mirrorfs()
        .arg("verify")
        .arg(&old)
        .arg(&data)
        .output()
        .unwrap();
    assert!(copy.status.success(), "{document}: {copy:?}");
}
