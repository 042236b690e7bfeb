//! Rule: one line of rsync's filter language, as written.
//!
//! | rule | meaning |
//! | --- | --- |
//! | `-`, `+` | exclude, include |
//! | `P`, `R` | protect, risk: only what is removed |
//! | `H`, `S` | hide, show: only what is copied |
//! | `.`, `:` | merge, dir-merge |
//! | `!` | clear |
//!
//! Modifiers behind it: `/` `!` `s` `r` `p`, and for files `e` `n` `w` `-` `+`.

/// What a line may say beside its pattern, and what a merge file gives to the lines in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) include: bool,
    /// `/`: matched against the path from the root of the system.
    pub(super) absolute: bool,
    /// `!`: about what does not match.
    pub(super) negate: bool,
    /// `p`: does not keep a directory that is removed.
    pub(super) perishable: bool,
    /// `s`, H, S: only what is copied. `r`, P, R: only what is removed. Neither: both.
    pub(super) hide_only: bool,
    pub(super) protect_only: bool,
    /// `-`, `+`: lines are patterns without a prefix.
    pub(super) bare: bool,
    /// `w`: rules are words, not lines.
    pub(super) words: bool,
    /// `n`: subdirectories do not inherit them.
    pub(super) no_inherit: bool,
    /// `e`: the file itself is excluded.
    pub(super) exclude_self: bool,
}

/// What one line is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// `!`
    Clear,
    Pattern(Flags, &'a [u8]),
    /// Rules from a file, read now.
    Merge(Flags, &'a [u8]),
    /// Rules from a file in each directory.
    PerDir(Flags, &'a [u8]),
}

/// How a line is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grammar {
    /// `--filter` and merge files.
    Rules,
    /// `--exclude`, `--include` and their files: a pattern, or `- ` or `+ ` and one, or `!`.
    Patterns,
}

/// Reads a line; `Err` says what is wrong with it.
pub(super) fn parse(text: &[u8], template: Flags, grammar: Grammar) -> Result<Line<'_>, String> {
    let inherited = Flags {
        include: template.include,
        absolute: template.absolute,
        perishable: template.perishable,
        ..Flags::default()
    };
    let line = match grammar {
        _ if template.bare => Line::Pattern(inherited, text),
        Grammar::Patterns if text == b"!" => Line::Clear,
        Grammar::Patterns => match text {
            [sign @ (b'-' | b'+'), b' ', rest @ ..] => {
                let include = *sign == b'+';
                Line::Pattern(
                    Flags {
                        include,
                        ..inherited
                    },
                    rest,
                )
            }
            _ => Line::Pattern(inherited, text),
        },
        Grammar::Rules => prefixed(text, inherited)?,
    };
    let of_template = |mut flags: Flags| {
        if template.hide_only || template.protect_only {
            if flags.hide_only || flags.protect_only {
                return Err("the file's rule says already which side it is about".to_owned());
            }
            flags.hide_only = template.hide_only;
            flags.protect_only = template.protect_only;
        }
        Ok(flags)
    };
    let (flags, rest) = match &line {
        Line::Clear => return Ok(line),
        Line::Pattern(f, rest) | Line::Merge(f, rest) | Line::PerDir(f, rest) => (*f, *rest),
    };
    if rest.is_empty() {
        return Err("there is no pattern".to_owned());
    }
    let flags = of_template(flags)?;
    Ok(match line {
        Line::Pattern(..) => Line::Pattern(flags, rest),
        Line::Merge(..) => Line::Merge(flags, rest),
        Line::PerDir(..) | Line::Clear => Line::PerDir(flags, rest),
    })
}

const WORDS: [(&[u8], u8); 9] = [
    (b"clear", b'!'),
    (b"dir-merge", b':'),
    (b"exclude", b'-'),
    (b"hide", b'H'),
    (b"include", b'+'),
    (b"merge", b'.'),
    (b"protect", b'P'),
    (b"risk", b'R'),
    (b"show", b'S'),
];

/// A line that begins with a rule's name.
fn prefixed(text: &[u8], inherited: Flags) -> Result<Line<'_>, String> {
    let ends = |b: Option<&u8>| matches!(b, None | Some(b' ' | b'\t' | b'_' | b','));
    let word = WORDS
        .iter()
        .find(|(w, _)| text.starts_with(w) && ends(text.get(w.len())));
    let (kind, mut at) = match (word, text.first()) {
        (Some((word, kind)), _) => (*kind, word.len()),
        (None, Some(c)) if b"-+HSPR.:!".contains(c) => (*c, 1),
        _ => return Err("unknown rule".to_owned()),
    };
    at += usize::from(kind != b'!' && text.get(at) == Some(&b','));
    let mut flags = inherited;
    let file = kind == b'.' || kind == b':';
    let sided = b"HSPR".contains(&kind);
    flags.include |= b"+SR".contains(&kind);
    flags.hide_only = b"HS".contains(&kind);
    flags.protect_only = b"PR".contains(&kind);
    if kind == b'!' {
        return match text.len() == at {
            true => Ok(Line::Clear),
            false => Err("nothing may follow a '!'".to_owned()),
        };
    }
    while let Some(c) = text.get(at).filter(|c| !matches!(c, b' ' | b'_')) {
        match c {
            b'-' | b'+' if file && !flags.bare => {
                flags.bare = true;
                flags.include |= *c == b'+';
            }
            b'/' => flags.absolute = true,
            b'!' if !file => flags.negate = true,
            b'e' if file => flags.exclude_self = true,
            b'n' if file => flags.no_inherit = true,
            b'w' if file => flags.words = true,
            b'p' => flags.perishable = true,
            b'r' if !sided => flags.protect_only = true,
            b's' if !sided => flags.hide_only = true,
            b'x' => return Err("rules for xattrs (x) are not known: all are copied".to_owned()),
            b'C' => return Err("CVS rules (C) are not known: write them as excludes".to_owned()),
            other => {
                let shown = std::ascii::escape_default(*other);
                return Err(format!("'{shown}' is no modifier here"));
            }
        }
        at += 1;
    }
    let rest = text.get(at + 1..).unwrap_or_default();
    Ok(match kind {
        b'.' => Line::Merge(flags, rest),
        b':' => Line::PerDir(flags, rest),
        _ => Line::Pattern(flags, rest),
    })
}

/// The rules of a file: lines, or words.
pub(super) fn lines(text: &[u8], words: bool, nulls: bool) -> impl Iterator<Item = &[u8]> {
    let ends = move |b: &u8| match (nulls, words) {
        (true, _) if *b == 0 => true,
        (true, false) => false,
        (_, true) => b.is_ascii_whitespace() || *b == 0x0b,
        (false, false) => matches!(b, b'\n' | b'\r'),
    };
    text.split(ends)
        .filter(move |l| !l.is_empty() && (words || !matches!(l[0], b';' | b'#')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Line<'_>, String> {
        parse(text.as_bytes(), Flags::default(), Grammar::Rules)
    }

    #[test]
    fn the_long_and_the_short_form_are_the_same() {
        for (short, long) in [
            ("- a b", "exclude a b"),
            ("+ a", "include a"),
            ("H a", "hide a"),
            ("S a", "show a"),
            ("P a", "protect a"),
            ("R a", "risk a"),
            (". a", "merge a"),
            (": a", "dir-merge a"),
            ("!", "clear"),
            ("-! a", "exclude,! a"),
            ("-,s_a", "exclude,s_a"),
            (":en- a", "dir-merge,en- a"),
        ] {
            assert_eq!(read(short), read(long), "{short}");
            assert!(read(short).is_ok(), "{short}");
        }
        let rest = |line| match line {
            Ok(Line::Pattern(_, rest)) => rest.to_vec(),
            other => panic!("{other:?}"),
        };
        assert_eq!(rest(read("-   a ")), b"  a ");
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for bad in [
            "",
            "-",
            "- ",
            "foo",
            "-q a",
            "Pr a",
            "-e a",
            ":!x a",
            "! a",
            "excludes a",
            "-C",
            "-x a",
            ".--",
            "?a",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let sided = Flags {
            hide_only: true,
            ..Flags::default()
        };
        assert!(parse(b"P a", sided, Grammar::Rules).is_err());
    }

    #[test]
    fn comments_and_empty_lines_are_no_rules() {
        let all = |words, nulls| {
            let text = b"# x\n\n; y\n- a b\r\n+ c\0d";
            let each = lines(text, words, nulls).map(|l| String::from_utf8_lossy(l).into_owned());
            each.collect::<Vec<_>>()
        };
        assert_eq!(all(false, false), ["- a b", "+ c\0d"]);
        assert_eq!(all(true, false)[..4], ["#", "x", ";", "y"]);
        assert_eq!(all(false, true), ["d"]);
    }
}
