//! Pattern: rsync's wildcards, matched in time and memory that no pattern can blow up.
//!
//!   *      any bytes but a slash          **   any bytes
//!   ?      one byte, not a slash          [a-z] [!a] [[:digit:]]   one of a set, never a slash
//!   \x     x itself, in a pattern that has wildcards; else a backslash is a byte like others
//!
//! A pattern becomes a row of tokens; all places in the row where a match may be are followed at
//! once, byte by byte. So there is no backtracking.

/// One step of a pattern with wildcards.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// `?`
    One,
    /// `[...]`: a bit for each byte.
    Set([u64; 4]),
    /// `*`
    Star,
    /// `**`
    Stars,
    /// What is not well formed: matches nothing.
    Never,
}

/// Where a pattern is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    /// In the path below the root of the transfer.
    Transfer,
    /// A leading slash means this directory of the transfer (a rule of its merge file): the length of
    /// its path.
    Below(usize),
    /// In the path from the root of the system.
    Absolute,
}

/// What rules are asked about.
pub(super) struct Subject {
    /// `ROOT/PATH/`, without a slash in front.
    text: Vec<u8>,
    path_at: usize,
    name_at: usize,
    is_dir: bool,
}

impl Subject {
    /// The entry `path` below the root `root` (absolute).
    pub(super) fn new(root: &[u8], path: &[u8], is_dir: bool) -> Subject {
        let root = root.strip_prefix(b"/").unwrap_or(root);
        let mut text = Vec::with_capacity(root.len() + path.len() + 2);
        text.extend_from_slice(root);
        text.push(b'/');
        let path_at = text.len();
        text.extend_from_slice(path);
        let slash = path.iter().rposition(|b| *b == b'/');
        let name_at = path_at + slash.map_or(0, |at| at + 1);
        text.push(b'/');
        Subject {
            text,
            path_at,
            name_at,
            is_dir,
        }
    }
}

/// One pattern, ready to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    /// Without the slash in front, and without one at the end.
    text: Vec<u8>,
    /// `None`: there are no wildcards.
    tokens: Option<Vec<Token>>,
    base: Base,
    /// It began with a slash.
    anchored: bool,
    /// It ended with a slash: directories only.
    dirs_only: bool,
    /// Slashes, the one in front too.
    slashes: usize,
    /// There is a `**`; it begins with one; it ends with `***`.
    stars: bool,
    stars_first: bool,
    triple_last: bool,
}

impl Pattern {
    /// A pattern from its bytes: at least one.
    pub(super) fn new(bytes: &[u8], base: Base) -> Pattern {
        let dirs_only = bytes.len() > 1 && bytes.ends_with(b"/");
        let whole = if dirs_only {
            &bytes[..bytes.len() - 1]
        } else {
            bytes
        };
        let wild = whole.iter().any(|b| b"*[?".contains(b));
        let stars_at = whole.windows(2).position(|w| w == b"**");
        let anchored = whole.starts_with(b"/");
        let text = if anchored { &whole[1..] } else { whole };
        Pattern {
            text: text.to_vec(),
            tokens: wild.then(|| tokens(text)),
            base,
            anchored,
            dirs_only,
            slashes: whole.iter().filter(|b| **b == b'/').count(),
            stars: stars_at.is_some(),
            stars_first: stars_at == Some(0),
            triple_last: whole.ends_with(b"***"),
        }
    }

    /// A leading slash means the directory `dir` (absolute), which is above the root.
    pub(super) fn anchor_in(&mut self, dir: &[u8]) {
        if !self.anchored || self.base == Base::Absolute {
            return;
        }
        let mut all = dir.strip_prefix(b"/").unwrap_or(dir).to_vec();
        if !all.is_empty() {
            all.push(b'/');
        }
        if let Some(tokens) = &mut self.tokens {
            tokens.splice(0..0, all.iter().map(|b| Token::Byte(*b)));
        }
        all.extend_from_slice(&self.text);
        self.text = all;
        self.base = Base::Absolute;
    }

    /// Whether the pattern is about this entry.
    pub(super) fn matches(&self, on: &Subject) -> bool {
        if self.dirs_only && !on.is_dir {
            return false;
        }
        let end = on.text.len() - 1;
        let end = end + usize::from(on.is_dir && self.triple_last);
        let by_name = self.slashes == 0 && !self.stars;
        let begin = match self.base {
            _ if by_name => on.name_at,
            Base::Absolute if on.path_at > 1 => 0,
            Base::Absolute => on.path_at,
            Base::Below(0) | Base::Transfer if self.stars_first => on.path_at - 1,
            Base::Below(len) if self.anchored && len > 0 => on.path_at + len + 1,
            Base::Below(_) if self.stars_first => on.path_at - 1,
            Base::Below(_) | Base::Transfer => on.path_at,
        };
        let Some(text) = on.text.get(begin..end) else {
            return false;
        };
        match (&self.tokens, self.anchored) {
            (None, true) => text == self.text,
            (None, false) => {
                text.ends_with(&self.text)
                    && (text.len() == self.text.len()
                        || text[text.len() - self.text.len() - 1] == b'/')
            }
            (Some(tokens), false) if self.stars && !self.stars_first => {
                // At the start, or behind any slash.
                let starts = text.iter().enumerate().filter(|(_, b)| **b == b'/');
                std::iter::once(0)
                    .chain(starts.map(|(at, _)| at + 1))
                    .any(|at| follow(tokens, &text[at..]))
            }
            (Some(tokens), false) if self.slashes > 0 && !self.stars => {
                last_names(text, self.slashes + 1).is_some_and(|text| follow(tokens, text))
            }
            (Some(tokens), _) => follow(tokens, text),
        }
    }
}

/// The last `n` names of a path, `None` when it has fewer.
fn last_names(text: &[u8], n: usize) -> Option<&[u8]> {
    let mut slashes = text.iter().enumerate().rev().filter(|(_, b)| **b == b'/');
    match slashes.nth(n - 1) {
        Some((at, _)) => Some(&text[at + 1..]),
        None => (text.iter().filter(|b| **b == b'/').count() + 1 == n).then_some(text),
    }
}

/// Whether the tokens match all of a text.
fn follow(tokens: &[Token], text: &[u8]) -> bool {
    // Most names end with another byte than the pattern does.
    if let (Some(Token::Byte(last)), end) = (tokens.last(), text.last())
        && end != Some(last)
    {
        return false;
    }
    let mut now = vec![false; tokens.len() + 1];
    let mut next = now.clone();
    now[0] = true;
    skip_stars(tokens, &mut now);
    for byte in text {
        next.fill(false);
        let mut any = false;
        for (at, token) in tokens.iter().enumerate() {
            if !now[at] {
                continue;
            }
            let to = match token {
                Token::Byte(b) if b == byte => at + 1,
                Token::One if *byte != b'/' => at + 1,
                Token::Set(set) if *byte != b'/' && has(set, *byte) => at + 1,
                Token::Star if *byte != b'/' => at,
                Token::Stars => at,
                _ => continue,
            };
            next[to] = true;
            any = true;
        }
        if !any {
            return false;
        }
        skip_stars(tokens, &mut next);
        std::mem::swap(&mut now, &mut next);
    }
    now[tokens.len()]
}

/// A star may stand for nothing.
fn skip_stars(tokens: &[Token], at: &mut [bool]) {
    for (i, token) in tokens.iter().enumerate() {
        if at[i] && matches!(token, Token::Star | Token::Stars) {
            at[i + 1] = true;
        }
    }
}

fn tokens(text: &[u8]) -> Vec<Token> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        at += 1;
        out.push(match byte {
            b'?' => Token::One,
            b'*' => {
                let run = text[at..].iter().take_while(|b| **b == b'*').count();
                at += run;
                if run > 0 { Token::Stars } else { Token::Star }
            }
            b'[' => match set(text, at) {
                Some((set, next)) => {
                    at = next;
                    Token::Set(set)
                }
                None => Token::Never,
            },
            b'\\' => {
                at += 1;
                text.get(at - 1).map_or(Token::Never, |b| Token::Byte(*b))
            }
            other => Token::Byte(*other),
        });
    }
    out
}

fn has(set: &[u64; 4], byte: u8) -> bool {
    set[usize::from(byte >> 6)] >> (byte & 63) & 1 == 1
}

fn add(set: &mut [u64; 4], byte: u8) {
    set[usize::from(byte >> 6)] |= 1 << (byte & 63);
}

/// The set that begins behind a `[`, and where the pattern goes on; `None`: it is not well formed.
fn set(text: &[u8], begin: usize) -> Option<([u64; 4], usize)> {
    let mut set = [0; 4];
    let mut at = begin;
    let negated = matches!(text.get(at), Some(b'!' | b'^'));
    at += usize::from(negated);
    // What a range may begin with: a byte that is in the set for itself.
    let mut before = None;
    let mut first = true;
    loop {
        let byte = *text.get(at)?;
        if byte == b']' && !first {
            break;
        }
        first = false;
        match (byte, before) {
            (b'\\', _) => {
                at += 1;
                let byte = *text.get(at)?;
                add(&mut set, byte);
                before = Some(byte);
            }
            (b'-', Some(low)) if !matches!(text.get(at + 1), None | Some(b']')) => {
                at += 1;
                at += usize::from(text[at] == b'\\');
                (low..=*text.get(at)?).for_each(|b| add(&mut set, b));
                before = None;
            }
            (b'[', _) if text.get(at + 1) == Some(&b':') => {
                let from = at + 2;
                let end = from + text[from..].iter().position(|b| *b == b']')?;
                match text[from..end].split_last() {
                    Some((b':', name)) => {
                        let class = class(name)?;
                        (0..=127)
                            .filter(|b| class(*b))
                            .for_each(|b| add(&mut set, b));
                        at = end;
                        before = None;
                    }
                    // Not `:]`: a bracket like any byte.
                    _ => {
                        add(&mut set, byte);
                        before = Some(byte);
                    }
                }
            }
            _ => {
                add(&mut set, byte);
                before = Some(byte);
            }
        }
        at += 1;
    }
    if negated {
        set.iter_mut().for_each(|word| *word = !*word);
    }
    Some((set, at + 1))
}

fn class(name: &[u8]) -> Option<fn(u8) -> bool> {
    Some(match name {
        b"alnum" => |b| b.is_ascii_alphanumeric(),
        b"alpha" => |b| b.is_ascii_alphabetic(),
        b"blank" => |b| b == b' ' || b == b'\t',
        b"cntrl" => |b| b.is_ascii_control(),
        b"digit" => |b| b.is_ascii_digit(),
        b"graph" => |b| b.is_ascii_graphic(),
        b"lower" => |b| b.is_ascii_lowercase(),
        b"print" => |b| b.is_ascii_graphic() || b == b' ',
        b"punct" => |b| b.is_ascii_punctuation(),
        b"space" => |b| b.is_ascii_whitespace() || b == 0x0b,
        b"upper" => |b| b.is_ascii_uppercase(),
        b"xdigit" => |b| b.is_ascii_hexdigit(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_match(pattern: &str, path: &str) -> bool {
        let is_dir = path.ends_with('/');
        let path = path.trim_end_matches('/');
        let subject = Subject::new(b"/home/me", path.as_bytes(), is_dir);
        Pattern::new(pattern.as_bytes(), Base::Transfer).matches(&subject)
    }

    #[test]
    fn patterns_mean_what_rsyncs_manual_says() {
        for (pattern, yes, no) in [
            (
                "foo",
                &["foo", "a/foo", "a/foo/"][..],
                &["foo2", "a/xfoo"][..],
            ),
            ("/foo", &["foo", "foo/"], &["a/foo"]),
            ("foo/", &["foo/", "a/foo/"], &["foo"]),
            (
                "a/foo",
                &["a/foo", "x/a/foo"],
                &["foo", "xa/foo", "a/foo/b"],
            ),
            ("*.o", &["x.o", "a/x.o", ".o"], &["x.oo", "x.o/y"]),
            ("/*/x", &["a/x"], &["x", "a/b/x"]),
            ("a*/x", &["a/x", "b/ab/x"], &["a/b/x", "ba/x"]),
            ("a/**/x", &["a/b/x", "q/a/b/c/x"], &["a/x", "ab/x"]),
            ("**/x", &["x", "a/x", "a/b/x"], &["ax"]),
            ("/a/**", &["a/b", "a/b/c"], &["a", "a/", "b/a/c"]),
            ("/a/***", &["a/", "a/b", "a/b/c"], &["a", "b/a/"]),
            ("a/***", &["a/", "b/a/", "b/a/c"], &["a", "ba/c"]),
            ("a?c", &["abc"], &["a/c", "ac"]),
            ("[a-c]x", &["ax", "cx"], &["dx", "-x"]),
            ("[!a-c]x", &["dx"], &["ax"]),
            ("[^[:digit:]_]", &["a"], &["7", "_"]),
            ("[]x]", &["]", "x"], &["y"]),
            ("[a-]", &["a", "-"], &["b"]),
            ("[\\]a]", &["]", "a"], &["\\"]),
            ("a\\*b*", &["a*bc"], &["a\\*b", "axbc"]),
            ("a\\b", &["a\\b"], &["ab"]),
            ("[a", &[], &["a", "[a"]),
            ("[[:nope:]]", &[], &["n", ":"]),
            ("x*\\", &[], &["x\\", "x"]),
        ] {
            for path in yes {
                assert!(is_match(pattern, path), "{pattern} is about {path}");
            }
            for path in no {
                assert!(!is_match(pattern, path), "{pattern} is not about {path}");
            }
        }
    }

    #[test]
    fn absolute_patterns_and_those_of_a_directory_have_their_own_root() {
        let subject = Subject::new(b"/home/me", b"a/b", false);
        let on = |pattern: &[u8], base| Pattern::new(pattern, base).matches(&subject);
        assert!(on(b"/home/me/a/b", Base::Absolute));
        assert!(on(b"/home/*/a/b", Base::Absolute));
        assert!(!on(b"/a/b", Base::Absolute));
        assert!(on(b"/b", Base::Below(1)) && !on(b"/a/b", Base::Below(1)));
        assert!(on(b"/a/b", Base::Below(0)));
        let top = Subject::new(b"/", b"a", false);
        assert!(Pattern::new(b"/a", Base::Absolute).matches(&top));
    }

    #[test]
    fn many_stars_cost_no_more_than_their_number() {
        let pattern = "**a".repeat(200) + "b";
        let path = "a".repeat(4000);
        assert!(!is_match(&pattern, &path));
        assert!(is_match(&pattern, &(path + "b")));
    }
}
