//! The messages of docs/TROUBLESHOOTING.md: each is printed by the program in this run, in a situation
//! that is real, and what is printed in one of these situations is in the document.
//!
//! The fixture hands over whatever a command or a daemon's log has said (`heard`). `SCENES` brings the
//! program into every situation; most of them are tests of their own. In the first column of the
//! document's tables each code span is a message, `...` in it stands for anything and `N` for a
//! number; a number in parentheses behind it is the exit code.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use predicates::Predicate;
use predicates::str::{RegexPredicate, is_match};

use crate::fixture::{can_mount, can_mount_on, kit, need};
use crate::scenes::SCENES;

/// Of those below: what a moment decides, so that a scene whose DST fails may print it.
const BY_CHANCE: &[&str] = &[
    "publish a directory: ...: setxattr dst: ...; it is tried again",
    "removexattr dst directory: ...",
];

/// Messages that cannot be had here, and why. Nothing else may be missing.
const NOT_HERE: &[(&str, &str)] = &[
    (
        "publish a directory: ...: setxattr dst: ...; it is tried again",
        "DST has to fail between two calls on one directory",
    ),
    ("removexattr dst directory: ...", "likewise"),
    ("this kernel's FUSE lacks ...", "a kernel before 6.18"),
    (
        "this kernel cannot mount beneath (before 6.5): ...",
        "a kernel before 6.5",
    ),
    (
        "upgrade: this kernel does not send requests again (before Linux 6.9)",
        "a kernel before 6.9",
    ),
    (
        "upgrade: ... io_uring: ...",
        "the kernel has to refuse what it has just done",
    ),
    ("requests may wait for a slot: ...", "likewise"),
    ("keeper: wait: ...", "likewise"),
    ("keeper: fcntl: ...", "likewise"),
    ("the mount is not kept: ...", "a kernel before 6.9"),
    (
        "upgrade: through io_uring only once a file was looked at: try again then",
        "the kernel has to forget every file of the mount",
    ),
    (
        "upgrade: the memory of io_uring is where another program may have its own",
        "it takes a program of another layout",
    ),
    (
        "no more than N slots for requests: ...",
        "memory has to be missing for one call of the kernel's and for nothing else",
    ),
];

/// The longest that a scene may take.
const SCENE: Duration = Duration::from_secs(300);

/// So many scenes at once: most of them wait.
const AT_ONCE: usize = 4;

/// Who has said a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// A command of ours, on standard error: the user has to know what it means.
    Command,
    /// A daemon's log, as a warning or an error: likewise.
    Warning,
    /// Another line, of ours or of a program that used the mount.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    who: Who,
    code: Option<i32>,
    /// In a scene of this test, not only while it ran.
    in_scene: bool,
    text: String,
}

static HEARD: Mutex<BTreeSet<Line>> = Mutex::new(BTreeSet::new());

thread_local!(static IN_SCENE: Cell<bool> = const { Cell::new(false) });

/// Takes note of what was said, with the exit code where there is one.
pub(crate) fn heard(text: &str, code: Option<i32>) {
    let mut all = HEARD.lock().unwrap_or_else(PoisonError::into_inner);
    for line in text.lines().filter(|l| l.len() < 4000) {
        let (who, said) = told_by(line);
        all.insert(Line {
            who,
            code,
            in_scene: IN_SCENE.get(),
            text: without_numbers(said),
        });
    }
}

/// `mirrorfs: text`, or a line of the log: `2026-11-22T20:55:14Z  WARN text`.
fn told_by(line: &str) -> (Who, &str) {
    if let Some(text) = line.strip_prefix("mirrorfs: ") {
        return (Who::Command, text);
    }
    for (level, who) in [
        ("Z ERROR ", Who::Warning),
        ("Z  WARN ", Who::Warning),
        ("Z  INFO ", Who::Other),
    ] {
        if let Some((time, text)) = line.split_once(level)
            && !time.contains(' ')
        {
            return (who, text);
        }
    }
    (Who::Other, line)
}

/// The document leaves out the number of an errno: `(os error 2)`.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut all = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        all += part.split_once(')').map_or("", |(_, rest)| rest);
    }
    all
}

/// A message of the document.
struct Message {
    text: String,
    code: Option<i32>,
    pattern: RegexPredicate,
}

impl Message {
    fn new(text: &str, code: Option<i32>) -> Message {
        let mut pattern = String::from("^");
        let mut word = String::new();
        let flush = |word: &mut String, pattern: &mut String| {
            match word.as_str() {
                // Some messages have the letter themselves.
                "N" => *pattern += "(N|[0-9][0-9,.]*)",
                other => *pattern += other,
            }
            word.clear();
        };
        for c in text.replace("...", "\0").chars() {
            if c.is_alphanumeric() {
                word.push(c);
                continue;
            }
            flush(&mut word, &mut pattern);
            match c {
                '\0' => pattern += ".*",
                c if c.is_ascii_punctuation() => pattern.extend(['\\', c]),
                c => pattern.push(c),
            }
        }
        flush(&mut word, &mut pattern);
        Message {
            text: text.to_owned(),
            code,
            pattern: is_match(pattern + "$").unwrap(),
        }
    }

    fn is(&self, line: &Line) -> bool {
        // What a daemon says about it later has no exit code.
        let code = self.code.is_none() || line.who != Who::Command || self.code == line.code;
        code && self.pattern.eval(&line.text)
    }
}

fn messages() -> Vec<Message> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/TROUBLESHOOTING.md");
    let text = fs::read_to_string(path).unwrap();
    let mut all = Vec::new();
    for line in text.lines() {
        let Some(cell) = line.strip_prefix("| ").and_then(|l| l.split(" | ").next()) else {
            continue;
        };
        // A symptom that is no message begins with a word.
        let Some(cell) = cell.strip_prefix('`') else {
            continue;
        };
        let mut parts = cell.split('`');
        let mut depth = 0;
        while let Some(span) = parts.next() {
            let after = parts.next().unwrap_or_else(|| panic!("{cell}"));
            if depth == 0 {
                let code = after.strip_prefix(" (").and_then(|a| a.split(')').next());
                all.push(Message::new(span, code.and_then(|n| n.parse().ok())));
            }
            depth += after.matches('(').count() as i32 - after.matches(')').count() as i32;
        }
    }
    assert!(all.len() > 100, "only {}", all.len());
    all
}

/// All scenes, `AT_ONCE` at a time; what has failed.
fn play() -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((name, scene)) = SCENES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    let (tell, told) = mpsc::channel();
                    // A thread, and so a mount namespace, for each. One that hangs is left to itself.
                    thread::spawn(move || {
                        IN_SCENE.set(true);
                        scene();
                        let _ = tell.send(()); // Nobody listens after the limit.
                    });
                    let outcome = told.recv_timeout(SCENE);
                    eprintln!("{:>8.1?}  {name}", begun.elapsed());
                    if let Err(e) = outcome {
                        let line = format!("the scene {name}: {e} after {:.1?}", begun.elapsed());
                        failed.lock().unwrap().push(line);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

#[test]
fn every_message_that_is_explained_is_printed_and_every_message_is_explained() {
    let all = [
        can_mount(),
        can_mount_on("ext4"),
        can_mount_on("xfs"),
        need(kit("badsrc.py").is_some(), "badsrc.py of the test kit"),
        need(cfg!(feature = "fault"), "the feature fault"),
    ];
    if all.contains(&false) {
        return;
    }
    let messages = messages();
    let mut wrong = play();
    let heard = HEARD.lock().unwrap_or_else(PoisonError::into_inner);
    for message in &messages {
        let not_here = NOT_HERE.iter().any(|(text, _)| *text == message.text);
        // What other tests bring about, at the same time and in this process, is no scene's.
        let counts = |line: &&Line| line.in_scene || !not_here;
        if not_here && BY_CHANCE.contains(&message.text.as_str()) {
            continue;
        }
        if not_here == heard.iter().filter(counts).any(|line| message.is(line)) {
            wrong.push(match not_here {
                false => format!("nobody has printed: {} {:?}", message.text, message.code),
                true => format!("can be printed here: {}", message.text),
            });
        }
    }
    for (text, _) in NOT_HERE {
        if !messages.iter().any(|m| m.text == *text) {
            wrong.push(format!("not in the document any more: {text}"));
        }
    }
    for line in heard.iter().filter(|l| l.in_scene && l.who != Who::Other) {
        if !messages.iter().any(|m| m.is(line)) {
            wrong.push(format!("not explained: {} {:?}", line.text, line.code));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\n{} messages, {} wrong",
        wrong.join("\n"),
        messages.len(),
        wrong.len()
    );
    eprintln!("{} messages, {} lines heard", messages.len(), heard.len());
}

#[test]
fn a_message_of_the_document_is_matched_as_a_whole() {
    let line = |text: &str| Line {
        who: Who::Command,
        code: Some(3),
        in_scene: true,
        text: without_numbers(told_by(text).1),
    };
    let message = Message::new("DST ...: busy: N of K/N (x)", Some(3));
    for (text, want) in [
        ("mirrorfs: DST \"a\": busy: 1,200 of K/N (x)", true),
        (
            "mirrorfs: DST \"a\": busy: 1,200 of K/N (x), and more",
            false,
        ),
        ("mirrorfs: a DST \"a\": busy: 12 of K/N (x)", false),
        ("mirrorfs: DST \"a\": busy: no of K/N (x)", false),
    ] {
        assert_eq!(message.is(&line(text)), want, "{text}");
    }
    let other = Message::new("DST ...: busy: N of K/N (x)", Some(1));
    assert!(!other.is(&line("mirrorfs: DST \"a\": busy: 1 of K/N (x)")));
    let log =
        "2026-11-22T20:55:14.1Z  WARN \"a\": open src: Permission denied (os error 13), twice";
    assert_eq!(told_by(log).0, Who::Warning);
    assert!(Message::new("...: open src: Permission denied, twice", None).is(&line(log)));
}
