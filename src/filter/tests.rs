//! What rules promise.

use super::*;
use std::collections::HashMap;

fn filter(rules: &[&str], delete_excluded: bool) -> Filter {
    let args: Vec<_> = rules.iter().map(|r| FilterArg::Rule(r.into())).collect();
    let how = How {
        delete_excluded,
        from0: false,
    };
    Filter::new(&args, how, &mut |_| Ok(None)).expect("rules")
}

fn scope(filter: &Filter, purpose: Purpose) -> Scope {
    let scope = filter.scope(purpose, Path::new("/r"), &mut |_| Ok(None));
    scope.expect("no file").expect("rules")
}

#[test]
fn the_first_rule_that_is_about_a_name_decides() {
    let f = filter(&["+ *.c", "- /keep", "+ */", "- *"], false);
    let s = scope(&f, Purpose::Copy);
    assert!(!s.excludes(b"a.c", false) && !s.excludes(b"d", true));
    assert!(s.excludes(b"keep", true) && s.excludes(b"x", false));
    assert!(!scope(&filter(&["-! *.c"], false), Purpose::Copy).excludes(b"x.c", false));
    assert!(scope(&filter(&["-! *.c"], false), Purpose::Copy).excludes(b"x.h", false));
}

#[test]
fn what_is_excluded_is_protected_unless_the_rule_says_one_side() {
    let sides = |rules: &[&str], delete_excluded| {
        let f = filter(rules, delete_excluded);
        let excludes = |p| scope(&f, p).excludes(b"a", false);
        (excludes(Purpose::Copy), excludes(Purpose::Remove))
    };
    assert_eq!(sides(&["- a"], false), (true, true));
    assert_eq!(sides(&["- a"], true), (true, false));
    assert_eq!(sides(&["H a"], false), (true, false));
    assert_eq!(sides(&["P a"], true), (false, true));
    assert_eq!(sides(&["R a", "- a"], false), (true, false));
    assert_eq!(sides(&["S a", "- a"], false), (false, true));
    assert_eq!(sides(&["-sr a"], true), (true, true));
}

#[test]
fn what_was_cleared_can_be_given_anew() {
    let f = filter(&[": .f", "!", ":r .f"], false);
    let enter = |purpose| {
        let s = scope(&f, purpose).enter(b"", &mut |_| Ok(Some(b"- a".to_vec())));
        s.expect("rules").excludes(b"a", false)
    };
    assert!(!enter(Purpose::Copy) && enter(Purpose::Remove));
}

#[test]
fn perishable_rules_do_not_keep_a_directory_that_goes() {
    let f = filter(&["-p a", "- b"], false);
    let s = scope(&f, Purpose::Remove);
    assert!(s.excludes(b"d/a", false) && !s.keeps(b"d/a", false) && s.keeps(b"d/b", false));
}

#[test]
fn directories_inherit_the_rules_above_them_and_their_own_come_first() {
    let files: HashMap<&str, &str> = [
        (".f", "- *.o\n- /top\n"),
        ("a/.f", "+ x.o\n- /here\n: .more\n"),
        ("a/.more", "- m\n"),
        ("a/b/.f", "!\n- z\n"),
    ]
    .into();
    let mut s = scope(&filter(&["dir-merge .f"], false), Purpose::Copy);
    let enter = |s: &Scope, dir: &str| {
        let read = |name: &Path| {
            let path = Path::new(dir).join(name);
            Ok(files
                .get(path.to_str().expect("text"))
                .map(|t| t.as_bytes().to_vec()))
        };
        s.enter(dir.as_bytes(), &mut { read }).expect("rules")
    };
    s = enter(&s, "");
    assert!(s.excludes(b"x.o", false) && s.excludes(b"top", false));
    let a = enter(&s, "a");
    assert!(!a.excludes(b"a/x.o", false) && a.excludes(b"a/y.o", false));
    assert!(a.excludes(b"a/here", false) && !a.excludes(b"a/top", false));
    assert!(a.excludes(b"a/m", false));
    let b = enter(&a, "a/b");
    assert!(b.excludes(b"a/b/z", false) && !b.excludes(b"a/b/y.o", false));
    assert!(
        !b.excludes(b"a/b/m", false),
        "`!` takes the nested list too"
    );
    assert!(!s.excludes(b"m", false));
}

#[test]
fn a_merge_file_with_a_slash_is_looked_for_above_the_root() {
    let f = filter(&[": /.f"], false);
    let mut read = |path: &Path| {
        Ok(match path.to_str() {
            Some("/home/.f") => Some(b"- /me/a*\n- b\n".to_vec()),
            _ => None,
        })
    };
    let s = f.scope(Purpose::Copy, Path::new("/home/me"), &mut read);
    let s = s.expect("rules").expect("rules");
    assert!(s.excludes(b"ax", false) && s.excludes(b"x/b", false));
    assert!(!s.excludes(b"x/ax", false));
}

#[test]
fn the_rules_of_a_deep_tree_go_without_a_deep_stack() {
    let mut s = scope(&filter(&[": .f"], false), Purpose::Copy);
    for _ in 0..200_000 {
        let entered = s.enter(b"x", &mut |_| Ok(Some(b"- a".to_vec())));
        s = entered.expect("rules");
    }
}
