//! Filter: which names of a tree are not copied, and which are not removed: rsync's rules.
//!
//!   Filter::new()    the options in their order, with the files that they name
//!   Filter::scope()  what counts in the root, for one side
//!   Scope::enter()   what counts in a subdirectory: with the rules of its merge files
//!   Scope::excludes()  the first rule that is about a name decides
//!
//! Pure but for what reads merge files, which callers hand in. A scope is shared by all that is in its
//! directory; the rules of a merge file live as long as somebody is below it.

mod pattern;
mod rule;

use std::borrow::Cow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::config::FilterArg;
use pattern::{Base, Pattern, Subject};
use rule::{Flags, Grammar, Line};

/// Merge files within merge files.
const DEPTH_MAX: usize = 32;
/// Merge files of one name each that a tree may have.
const PER_DIR_MAX: usize = 64;

/// Whom the rules are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Names of src: what is excluded is not copied.
    Copy,
    /// Names of dst: what is excluded is not removed.
    Remove,
}

/// One rule about names, or a place for the rules of a directory.
#[derive(Debug, Clone)]
enum Rule {
    Pattern {
        pattern: Pattern,
        include: bool,
        negate: bool,
        perishable: bool,
        for_copy: bool,
        for_remove: bool,
    },
    /// The rules of this merge file, by its number.
    PerDir(usize),
}

/// A merge file that is looked for in each directory.
#[derive(Debug, Clone)]
struct PerDir {
    name: Vec<u8>,
    flags: Flags,
    /// Also looked for in the directories above the root.
    above: bool,
}

/// All rules that were given.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    rules: Vec<Rule>,
    per_dir: Vec<PerDir>,
    how: How,
}

/// How rules are read.
#[derive(Debug, Clone, Copy, Default)]
pub struct How {
    /// `--delete-excluded`: what is not copied is removed.
    pub delete_excluded: bool,
    /// `-0`: lines of files end with NUL.
    pub from0: bool,
}

/// Reads a file that holds rules; `Ok(None)`: there is none.
pub type Read<'a> = &'a mut dyn FnMut(&Path) -> Result<Option<Vec<u8>>, String>;

/// Rules that are being read.
struct Reader<'a> {
    rules: Vec<Rule>,
    per_dir: Vec<PerDir>,
    how: How,
    /// What a leading slash means in them.
    base: Base,
    /// Merge files may be named: not in those of a directory.
    merges: Option<Read<'a>>,
    cleared: bool,
    /// Merge files that are not of these rules' own.
    inherited: usize,
}

impl Filter {
    /// The rules of the options, first to last; `read` gives the files that they name.
    pub fn new(args: &[FilterArg], how: How, read: Read<'_>) -> Result<Filter, String> {
        let mut reader = Reader {
            rules: Vec::new(),
            per_dir: Vec::new(),
            how,
            base: Base::Transfer,
            merges: Some(read),
            cleared: false,
            inherited: 0,
        };
        let mut f_given = false;
        for arg in args {
            let one = |include| Flags {
                include,
                ..Flags::default()
            };
            let (text, include, grammar) = match arg {
                FilterArg::Exclude(text) => (text.as_bytes(), false, Grammar::Patterns),
                FilterArg::Include(text) => (text.as_bytes(), true, Grammar::Patterns),
                FilterArg::Rule(text) => (text.as_bytes(), false, Grammar::Rules),
                FilterArg::PerDir if f_given => (&b"- .rsync-filter"[..], false, Grammar::Rules),
                FilterArg::PerDir => {
                    f_given = true;
                    (&b": /.rsync-filter"[..], false, Grammar::Rules)
                }
                FilterArg::ExcludeFrom(path) => {
                    reader.file(path, one(false), Grammar::Patterns, 0)?;
                    continue;
                }
                FilterArg::IncludeFrom(path) => {
                    reader.file(path, one(true), Grammar::Patterns, 0)?;
                    continue;
                }
            };
            reader.line(text, one(include), grammar, 0)?;
        }
        Ok(Filter {
            rules: reader.rules,
            per_dir: reader.per_dir,
            how,
        })
    }

    /// What counts in the root `root` (absolute) for one purpose; `None`: no rule is about it. `read`
    /// gives merge files above the root, by their absolute path.
    pub fn scope(
        &self,
        purpose: Purpose,
        root: &Path,
        read: Read<'_>,
    ) -> Result<Option<Scope>, String> {
        if self.rules.is_empty() {
            return Ok(None);
        }
        let mut scope = Scope {
            fixed: Arc::new(Fixed {
                rules: self.rules.clone(),
                root: root.as_os_str().as_bytes().to_vec(),
                purpose,
                how: self.how,
            }),
            lists: Arc::new(self.per_dir.iter().map(List::new).collect()),
        };
        let above: Vec<_> = root.ancestors().skip(1).collect();
        for dir in above.into_iter().rev() {
            scope = scope.with_files(
                |list| list.spec.above,
                |name| read(&dir.join(Path::new(std::ffi::OsStr::from_bytes(name)))),
                &Place::Above(dir.as_os_str().as_bytes()),
            )?;
        }
        Ok(Some(scope))
    }
}

impl Reader<'_> {
    fn line(
        &mut self,
        text: &[u8],
        template: Flags,
        grammar: Grammar,
        depth: usize,
    ) -> Result<(), String> {
        let shown = || String::from_utf8_lossy(text).escape_debug().to_string();
        let wrong = |why: &str| format!("filter rule \"{}\": {why}", shown());
        let parsed = rule::parse(text, template, grammar).map_err(|e| wrong(&e))?;
        match parsed {
            Line::Clear => {
                self.rules.clear();
                self.per_dir.truncate(self.inherited);
                self.cleared = true;
            }
            Line::Pattern(flags, pattern) => {
                let rule = self.pattern(flags, pattern);
                self.rules.push(rule);
            }
            Line::Merge(flags, name) => {
                if self.merges.is_none() {
                    return Err(wrong("a directory's rules cannot name other files"));
                }
                let path = Path::new(std::ffi::OsStr::from_bytes(name)).to_owned();
                self.exclude_self(flags, name);
                self.file(&path, flags, Grammar::Rules, depth + 1)?;
            }
            Line::PerDir(flags, name) => {
                let above = name.starts_with(b"/");
                let bare = name.strip_prefix(b"/").unwrap_or(name);
                if bare.is_empty() || bare.contains(&b'/') {
                    return Err(wrong("a directory's merge file is a name, or / and a name"));
                }
                if above && self.merges.is_none() {
                    return Err(wrong("a directory's rules cannot look above it"));
                }
                self.exclude_self(flags, bare);
                if self.per_dir.iter().any(|p| p.name == bare) {
                    return Ok(());
                }
                if self.per_dir.len() == PER_DIR_MAX {
                    return Err(wrong("too many merge files"));
                }
                self.rules.push(Rule::PerDir(self.per_dir.len()));
                self.per_dir.push(PerDir {
                    name: bare.to_vec(),
                    flags,
                    above,
                });
            }
        }
        Ok(())
    }

    fn pattern(&self, flags: Flags, text: &[u8]) -> Rule {
        let sided = flags.hide_only || flags.protect_only;
        let hide_only = flags.hide_only || !sided && self.how.delete_excluded;
        let base = match flags.absolute {
            true => Base::Absolute,
            false => self.base.clone(),
        };
        Rule::Pattern {
            pattern: Pattern::new(text, base),
            include: flags.include,
            negate: flags.negate,
            perishable: flags.perishable,
            for_copy: !flags.protect_only || flags.hide_only,
            for_remove: !hide_only || flags.protect_only,
        }
    }

    /// `e`: the merge file itself is excluded, as by a rule for both sides.
    fn exclude_self(&mut self, flags: Flags, name: &[u8]) {
        if flags.exclude_self {
            let name = name.rsplit(|b| *b == b'/').next().unwrap_or(name);
            self.rules.push(Rule::Pattern {
                pattern: Pattern::new(name, Base::Transfer),
                include: false,
                negate: false,
                perishable: false,
                for_copy: true,
                for_remove: !self.how.delete_excluded,
            });
        }
    }

    /// All rules of a file that must be there.
    fn file(
        &mut self,
        path: &Path,
        template: Flags,
        grammar: Grammar,
        depth: usize,
    ) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err(format!("{}: merge files name each other", path.display()));
        }
        let text = match self.merges.as_mut() {
            Some(read) => read(path)?,
            None => None,
        };
        let text = text.ok_or_else(|| format!("{}: there is no such file", path.display()))?;
        self.text(&text, template, grammar, depth)
    }

    fn text(
        &mut self,
        text: &[u8],
        template: Flags,
        grammar: Grammar,
        depth: usize,
    ) -> Result<(), String> {
        for line in rule::lines(text, template.words, self.how.from0) {
            self.line(line, template, grammar, depth)?;
        }
        Ok(())
    }
}

/// What is the same in all directories.
#[derive(Debug)]
struct Fixed {
    rules: Vec<Rule>,
    /// The tree's root, absolute.
    root: Vec<u8>,
    purpose: Purpose,
    how: How,
}

/// The rules of one merge file's name, in one directory.
#[derive(Debug, Clone)]
struct List {
    spec: Arc<PerDir>,
    /// This directory's, then those of the directories above.
    rules: Option<Arc<Inherited>>,
}

#[derive(Debug)]
struct Inherited {
    rules: Vec<Rule>,
    above: Option<Arc<Inherited>>,
}

impl Drop for Inherited {
    /// One after the other: a tree may be deeper than the stack.
    fn drop(&mut self) {
        let mut next = self.above.take();
        while let Some(mut last) = next.and_then(Arc::into_inner) {
            next = last.above.take();
        }
    }
}

impl List {
    fn new(spec: &PerDir) -> List {
        List {
            spec: Arc::new(spec.clone()),
            rules: None,
        }
    }
}

/// Where a merge file was found.
enum Place<'a> {
    /// Below the root.
    In(&'a [u8]),
    /// In a directory above the root: its absolute path.
    Above(&'a [u8]),
}

/// What counts in one directory.
#[derive(Debug, Clone)]
pub struct Scope {
    fixed: Arc<Fixed>,
    lists: Arc<Vec<List>>,
}

impl Scope {
    /// True when the rules want this entry left out: neither copied, or not removed. `path` is below the
    /// root; its parent is this scope's directory.
    pub fn excludes(&self, path: &[u8], is_dir: bool) -> bool {
        self.verdict(path, is_dir, false)
    }

    /// As `excludes`, in a directory that is being removed: perishable rules do not count.
    pub fn keeps(&self, path: &[u8], is_dir: bool) -> bool {
        self.verdict(path, is_dir, true)
    }

    fn verdict(&self, path: &[u8], is_dir: bool, removing: bool) -> bool {
        let subject = Subject::new(&self.fixed.root, path, is_dir);
        self.first(&self.fixed.rules, &subject, removing, 0) == Some(false)
    }

    /// What the first rule that is about a name says: include or not.
    fn first(
        &self,
        rules: &[Rule],
        subject: &Subject,
        removing: bool,
        depth: usize,
    ) -> Option<bool> {
        rules.iter().find_map(|rule| match rule {
            Rule::Pattern {
                pattern,
                include,
                negate,
                perishable,
                for_copy,
                for_remove,
            } => {
                let counts = match self.fixed.purpose {
                    Purpose::Copy => *for_copy,
                    Purpose::Remove => *for_remove,
                };
                let about =
                    counts && !(removing && *perishable) && pattern.matches(subject) != *negate;
                about.then_some(*include)
            }
            // A list may name another one that comes behind it, never itself.
            Rule::PerDir(n) if depth <= PER_DIR_MAX => {
                let mut at = self.lists.get(*n)?.rules.as_deref();
                while let Some(list) = at {
                    let said = self.first(&list.rules, subject, removing, depth + 1);
                    if said.is_some() {
                        return said;
                    }
                    at = list.above.as_deref();
                }
                None
            }
            Rule::PerDir(_) => None,
        })
    }

    /// True while directories may have rules of their own.
    pub fn reads_files(&self) -> bool {
        !self.lists.is_empty()
    }

    /// What counts in the directory `path` (below the root; empty: the root itself), whose parent's scope
    /// this is; the root's own is the one that [`Filter::scope`] gave. `read` gives the merge file of a
    /// name in that directory.
    pub fn enter(&self, path: &[u8], read: Read<'_>) -> Result<Scope, String> {
        if !self.reads_files() {
            return Ok(self.clone());
        }
        self.with_files(
            |_| true,
            |name| read(Path::new(std::ffi::OsStr::from_bytes(name))),
            &Place::In(path),
        )
    }

    /// This scope with the rules of the merge files in one more directory.
    fn with_files(
        &self,
        wanted: impl Fn(&List) -> bool,
        mut read: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, String>,
        place: &Place<'_>,
    ) -> Result<Scope, String> {
        let mut lists = Cow::Borrowed(&*self.lists);
        let mut n = 0;
        // A file may name another one: the list grows.
        while let Some(list) = lists.get(n) {
            let spec = Arc::clone(&list.spec);
            if !wanted(list) {
                n += 1;
                continue;
            }
            if spec.flags.no_inherit && list.rules.is_some() {
                lists.to_mut()[n].rules = None;
            }
            if let Some(text) = read(&spec.name)? {
                self.add(lists.to_mut(), n, &spec, &text, place)?;
            }
            n += 1;
        }
        Ok(match lists {
            Cow::Borrowed(_) => self.clone(),
            Cow::Owned(lists) => Scope {
                fixed: Arc::clone(&self.fixed),
                lists: Arc::new(lists),
            },
        })
    }

    /// The rules of one merge file go before those of the directories above.
    fn add(
        &self,
        lists: &mut Vec<List>,
        n: usize,
        spec: &PerDir,
        text: &[u8],
        place: &Place<'_>,
    ) -> Result<(), String> {
        let base = match place {
            Place::In(path) => Base::Below(path.len()),
            Place::Above(_) => Base::Transfer,
        };
        let mut reader = Reader {
            rules: Vec::new(),
            per_dir: lists.iter().map(|l| (*l.spec).clone()).collect(),
            how: self.fixed.how,
            base,
            merges: None,
            cleared: false,
            inherited: lists.len(),
        };
        let template = Flags {
            exclude_self: false,
            ..spec.flags
        };
        let named = |e: String| format!("{}: {e}", String::from_utf8_lossy(&spec.name));
        match place {
            Place::Above(dir) => {
                // A leading slash means that directory: the whole path is what matches it.
                for line in rule::lines(text, template.words, self.fixed.how.from0) {
                    let before = reader.rules.len();
                    reader
                        .line(line, template, Grammar::Rules, 0)
                        .map_err(named)?;
                    for rule in reader.rules.iter_mut().skip(before) {
                        if let Rule::Pattern { pattern, .. } = rule {
                            pattern.anchor_in(dir);
                        }
                    }
                }
            }
            Place::In(_) => reader
                .text(text, template, Grammar::Rules, 0)
                .map_err(named)?,
        }
        for more in &reader.per_dir[lists.len()..] {
            lists.push(List::new(more));
        }
        let above = match reader.cleared {
            true => None,
            false => lists[n].rules.take(),
        };
        lists[n].rules = Some(Arc::new(Inherited {
            rules: reader.rules,
            above,
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
