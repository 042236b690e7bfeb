//! The documents: the commands that they show are run, in the order in which they stand there.
//!
//! `<!-- run -->` before a block says so; `<!-- run: mounted -->`: in a migration that has begun.
//! `/old` and `/srv/data` are directories of the test.

use std::fs;
use std::path::Path;
use std::process::Command;

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
