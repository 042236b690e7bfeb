//! Tidiness: what docs/STYLE.md and the table of floors in docs/ARCHITECTURE.md promise about the
//! sources, checked on the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A file that is longer holds more than one idea.
const LINES_MAX: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a directory that ends as told, with its path relative to the project.
fn files(dir: &str, ends: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut todo = vec![root().join(dir)];
    while let Some(dir) = todo.pop() {
        let Ok(list) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in list.map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                todo.push(path);
            } else if ends.iter().any(|e| path.to_string_lossy().ends_with(e)) {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let all = files("src", &[".rs"]);
    assert!(!all.is_empty(), "no sources");
    all
}

/// A line without its comment; good enough for code that has no `//` in a string.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

#[track_caller]
fn expect_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn every_source_file_opens_with_its_story() {
    let bad: Vec<_> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(name, _)| name)
        .collect();
    expect_none("the first line must be `//! ...`", &bad);
}

#[test]
fn unsafe_lives_on_one_floor() {
    let mut bad = Vec::new();
    for (name, text) in sources() {
        let allowed = name.starts_with("src/sys") || name.starts_with("src/engine/ring");
        for (i, line) in text.lines().enumerate() {
            if !allowed && words(code(line)).any(|w| w == "unsafe") {
                bad.push(format!("{name}:{}", i + 1));
            }
        }
    }
    expect_none("unsafe outside src/sys and src/engine/ring", &bad);
}

#[test]
fn a_result_is_dropped_with_a_reason_on_the_line() {
    let mut bad = Vec::new();
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if code(line).contains("let _ =") && !line.contains("//") {
                bad.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    expect_none("`let _ =` without a reason", &bad);
}

#[test]
fn what_has_failed_is_told_with_a_path() {
    let mut bad = Vec::new();
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if ["Src", "Dst", "Host"]
                .iter()
                .any(|s| line.contains(&format!("Side::{s}, \"\")")))
            {
                bad.push(format!("{name}:{}: {line}", i + 1));
            }
        }
    }
    expect_none("an error without a path", &bad);
}

#[test]
fn no_source_file_holds_two_ideas() {
    let long: Vec<_> = sources()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(name, lines)| format!("{name}: {lines} lines"))
        .collect();
    expect_none("longer than 600 lines", &long);
}

#[test]
fn sources_are_ascii() {
    let mut bad = Vec::new();
    for dir in ["src", "tests", "benches", "examples", "scripts"] {
        for (name, text) in files(dir, &[".rs", ".py", ".sh"]) {
            for (i, line) in text.lines().enumerate() {
                if !line.is_ascii() {
                    bad.push(format!("{name}:{}: {line}", i + 1));
                }
            }
        }
    }
    expect_none("not ASCII", &bad);
}

/// The floors of docs/ARCHITECTURE.md: module -> (floor, floors it may import).
fn floors() -> BTreeMap<String, (u32, BTreeSet<u32>)> {
    let path = root().join("docs/ARCHITECTURE.md");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let cells: Vec<_> = line
            .trim()
            .trim_matches('|')
            .split('|')
            .map(str::trim)
            .collect();
        let Some(floor) = cells.first().and_then(|c| c.parse::<u32>().ok()) else {
            continue;
        };
        let [_, modules, _, imports] = cells[..] else {
            continue;
        };
        let may = match imports.split_whitespace().next().unwrap_or("") {
            "std" => BTreeSet::new(),
            "all" => (0..=floor).collect(),
            range => {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let number = |s: &str| s.trim_matches(',').parse::<u32>();
                let (Ok(first), Ok(last)) = (number(first), number(last)) else {
                    panic!("{}: which floors is {imports:?}?", path.display())
                };
                (first..=last).collect()
            }
        };
        for module in modules.split(',').map(|m| m.trim().trim_matches('`')) {
            all.insert(module.to_owned(), (floor, may.clone()));
        }
    }
    assert!(all.len() > 5, "{} has no table of floors", path.display());
    all
}

/// The top-level modules that a text names by a path from the crate's root.
fn named_modules(text: &str, prefix: &str) -> Vec<(usize, String)> {
    let ident = |s: &str| words(s).next().unwrap_or("").to_owned();
    let text: String = text.lines().map(|l| format!("{}\n", code(l))).collect();
    let mut found = Vec::new();
    for (at, _) in text.match_indices(prefix) {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let line = text[..at].lines().count().max(1);
        let rest = &text[at + prefix.len()..];
        match rest.strip_prefix('{') {
            None => found.push((line, ident(rest))),
            Some(group) => {
                // The names at the first level of the braces.
                let (mut depth, mut start) = (0, 0);
                for (i, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth > 0 => depth -= 1,
                        ',' | '}' if depth == 0 => {
                            found.push((line, ident(group[start..i].trim())));
                            start = i + 1;
                            if c == '}' {
                                break;
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

#[test]
fn modules_import_lower_floors_only() {
    let floors = floors();
    let mut bad = Vec::new();
    for (name, text) in sources() {
        let module = name["src/".len()..]
            .trim_end_matches(".rs")
            .split('/')
            .next()
            .unwrap()
            .to_owned();
        if module == "lib" {
            continue;
        }
        let Some((floor, may)) = floors.get(&module) else {
            bad.push(format!(
                "{name}: module {module} is in no row of the table of floors"
            ));
            continue;
        };
        let mut named = named_modules(&text, "crate::");
        named.extend(named_modules(&text, "mirrorfs::"));
        // In a file at the top, super is the crate's root.
        if PathBuf::from(&name).components().count() == 2 {
            named.extend(
                named_modules(&text, "super::")
                    .into_iter()
                    .filter(|(_, m)| floors.contains_key(m)),
            );
        }
        for (line, other) in named {
            let Some((to, _)) = floors.get(&other) else {
                continue;
            };
            if other != module && !may.contains(to) {
                bad.push(format!(
                    "{name}:{line}: {module} (floor {floor}) uses {other} (floor {to})"
                ));
            }
        }
    }
    expect_none("a floor uses what it must not know", &bad);
}

#[test]
fn every_test_that_a_document_names_exists() {
    let code: String = sources()
        .into_iter()
        .chain(files("tests", &[".rs"]))
        .map(|(_, text)| text)
        .collect();
    let mut named = 0;
    let mut missing = Vec::new();
    for (doc, text) in files("docs", &[".md"]) {
        for word in text.split('`').skip(1).step_by(2) {
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            // A sentence: no function of ours is called that otherwise.
            if word.matches('_').count() >= 4 && word.chars().all(is_name) {
                named += 1;
                if !code.contains(&format!("fn {word}(")) {
                    missing.push(format!("{doc}: {word}"));
                }
            }
        }
    }
    assert!(named > 20, "only {named}: the scanner sees nothing");
    expect_none("tests that do not exist", &missing);
}

#[test]
fn every_module_of_the_table_exists() {
    for module in floors().keys() {
        let file = root().join(format!("src/{module}.rs"));
        assert!(
            file.is_file(),
            "the table of floors names {module}, and there is no such module"
        );
    }
}

#[test]
fn the_scanner_sees_every_way_to_name_a_module() {
    let text = "use crate::error::Error;\nuse crate::{sys::{fd, dir}, mark};\n// crate::no\n\
        let x = crate::engine::start();\nuse other_crate::nothing;\n";
    let mut names: Vec<_> = named_modules(text, "crate::")
        .into_iter()
        .map(|(_, n)| n)
        .collect();
    names.sort();
    assert_eq!(names, ["engine", "error", "mark", "sys"]);
}
