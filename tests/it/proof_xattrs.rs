//! Manifests and extended attributes: `verify --manifest` names what differs, ACLs among them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::XattrFlags;

use crate::fixture::{
    LoopFs, Output, Scratch, World, bytes, can_mount_on, mirrorfs, run, shell_as,
};
use crate::nasty::{self, At};
use crate::proof;

/// A tree on a file system of its own, with an entry of each kind that has xattrs.
struct Trees {
    fs: LoopFs,
    scratch: Scratch,
    src: PathBuf,
    dst: PathBuf,
    manifest: PathBuf,
}

impl Trees {
    fn on(kind: &str) -> Trees {
        let fs = LoopFs::new(kind);
        let scratch = Scratch::new();
        let (src, dst) = (fs.dir("src"), fs.path().join("dst"));
        let manifest = scratch.path().join("manifest");
        fill(&src);
        Trees {
            fs,
            scratch,
            src,
            dst,
            manifest,
        }
    }

    fn sync(&self) -> Output {
        let mut command = mirrorfs();
        command.arg("sync").arg("--manifest").arg(&self.manifest);
        run(command.arg(&self.src).arg(&self.dst))
    }

    fn verify(&self, args: &[&str]) -> Output {
        proof::verify(&self.manifest, &self.dst, args)
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.manifest).unwrap()
    }

    /// The lines of entries.
    fn lines(&self) -> BTreeSet<String> {
        lines(&self.text())
    }
}

fn lines(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|l| l.starts_with('.'));
    lines.map(str::to_owned).collect()
}

fn fill(src: &Path) {
    let d = At::open(src);
    d.file("file", &bytes(1, 5000));
    d.xattr("file", "user.note", b"hello");
    d.xattr("file", b"user.a=b \xff", b"");
    d.xattr("file", "user.long", &[7; 2000]);
    d.xattr("file", "trusted.ours", b"t");
    d.file("acl", b"acl");
    d.xattr("acl", "system.posix_acl_access", &nasty::named_acl());
    d.file("program", &bytes(2, 300_000));
    d.xattr("program", "security.capability", &nasty::capability());
    d.file("plain", b"plain");
    d.symlink("plain", "link");
    d.xattr("link", "trusted.of the link", b"l");
    let below = d.dir("dir");
    below.xattr(".", "system.posix_acl_default", &nasty::named_acl());
    below.xattr(".", "user.dir", b"d");
    d.xattr(".", "user.root", b"r");
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn remove(path: &Path, name: &str) {
    rustix::fs::lremovexattr(path, name).unwrap();
}

/// What was told of each path, the summary left out.
fn told(said: &Output) -> BTreeSet<&str> {
    let lines = said.out.lines();
    lines.filter(|l| !l.starts_with("verified ")).collect()
}

#[test]
pub(crate) fn a_changed_xattr_or_acl_is_named_and_is_never_corrupt() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if !can_mount_on(kind) {
            return;
        }
        let t = Trees::on(kind);
        t.sync().expect_code(0);
        let text = t.text();
        assert!(text.contains(" xattr.user.note=aGVsbG8="), "{text}");
        assert!(text.contains(" xattrblake3.user.long="), "{text}");
        assert!(text.contains(" xattr.system.posix_acl_default="), "{text}");
        assert!(!text.contains("mirrorfs="), "{text}");
        assert!(!text.contains("SGI_ACL"), "{text}");
        // All of them, and the same where the tree is only read.
        let other = t.scratch.path().join("other");
        run(mirrorfs().arg("manifest").arg(&t.src).arg(&other)).expect_code(0);
        let without_ctime = |lines: BTreeSet<String>| {
            let lines = lines.into_iter().map(|line| {
                let words = line.split(' ').filter(|w| !w.starts_with("ctime="));
                words.collect::<Vec<_>>().join(" ")
            });
            lines.collect::<BTreeSet<_>>()
        };
        let taken = lines(&fs::read_to_string(&other).unwrap());
        assert_eq!(without_ctime(taken), without_ctime(t.lines()));
        let said = t.verify(&[]).expect_code(0);
        assert_eq!(said.err, "");

        let at = |name: &str| t.dst.join(name);
        set(&at("file"), "user.note", b"other");
        remove(&at("file"), "user.long");
        set(&at("file"), "user.new", b"");
        remove(&at("file"), "trusted.ours");
        set(&at("program"), "security.capability", &{
            let mut other = nasty::capability();
            other[4] ^= 1;
            other
        });
        remove(&at("acl"), "system.posix_acl_access");
        remove(&at("dir"), "system.posix_acl_default");
        set(&at("link"), "trusted.of the link", b"other");
        remove(&t.dst, "user.root");
        let said = t.verify(&[]).expect_code(9);
        // The mask of an ACL is the mode's, too.
        let acl = said.out.lines().find(|l| l.starts_with("changed: \"acl\""));
        let acl = acl.unwrap_or_else(|| panic!("{}", said.out));
        assert!(
            acl.contains("xattr system.posix_acl_access is gone"),
            "{acl}"
        );
        let want = [
            "changed: \".\": xattr user.root is gone",
            acl,
            "changed: \"dir\": xattr system.posix_acl_default is gone",
            "changed: \"file\": xattr trusted.ours is gone; xattr user.long is gone; \
             xattr user.note has another value; xattr user.new is new",
            "changed: \"link\": xattr trusted.of the link has another value",
            "changed: \"program\": xattr security.capability has another value",
        ];
        assert_eq!(told(&said), BTreeSet::from(want), "{kind}");
        assert!(
            said.out.contains("0 corrupt, 6 changed since"),
            "{}",
            said.out
        );
        t.verify(&["--ignore-changed"]).expect_code(0);
        drop(t.fs);
    }
}

#[test]
pub(crate) fn a_manifest_of_the_older_form_says_that_xattrs_were_not_compared() {
    if !can_mount_on("ext4") {
        return;
    }
    let t = Trees::on("ext4");
    std::thread::sleep(std::time::Duration::from_millis(3100));
    t.sync().expect_code(0);
    let new = t.lines();
    // As it was written before: the same words, without these.
    let mut old: String = t
        .text()
        .lines()
        .filter(|l| !l.starts_with("# end"))
        .map(|line| {
            let words = line.split(' ').filter(|w| !w.starts_with("xattr"));
            words.collect::<Vec<_>>().join(" ") + "\n"
        })
        .collect();
    let hash = blake3::hash(old.as_bytes()).to_hex();
    old += &format!("# end {} entries, blake3 {hash}\n", new.len());
    fs::write(&t.manifest, &old).unwrap();
    let said = t.verify(&[]).expect_code(0);
    let line = format!(
        "mirrorfs: the manifest tells no xattrs and ACLs of {} entries: these were not compared\n",
        new.len()
    );
    assert_eq!(said.err, line);
    remove(&t.dst.join("file"), "user.note");
    t.verify(&[]).expect_code(0);
    // The next run reads no file again, and writes all of it in the new form.
    set(&t.dst.join("file"), "user.note", b"hello");
    t.sync().expect_code(0);
    assert_eq!(t.lines(), new);
    let said = t.verify(&[]).expect_code(0);
    assert_eq!(said.err, "");
}

#[test]
pub(crate) fn who_is_not_root_compares_what_he_can_see_and_is_told_of_the_rest() {
    if !can_mount_on("ext4") {
        return;
    }
    let t = Trees::on("ext4");
    t.sync().expect_code(0);
    let program = t.scratch.path().join("mirrorfs");
    fs::copy(mirrorfs().get_program(), &program).unwrap();
    for tree in [&t.src, &t.dst] {
        run(Command::new("chmod").args(["-R", "a+rX"]).arg(tree)).expect_code(0);
    }
    // What root's manifest has and a user cannot see.
    run(mirrorfs().arg("manifest").arg(&t.src).arg(&t.manifest)).expect_code(0);
    t.sync().expect_code(0);
    for (path, mode) in [(t.scratch.path(), 0o755), (&t.manifest, 0o644)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    remove(&t.dst.join("link"), "trusted.of the link");
    let script = format!(
        "./mirrorfs verify --manifest manifest '{}'",
        t.dst.display()
    );
    let said = shell_as(65534, 65534, t.scratch.path(), &script).expect_code(0);
    let line = "xattrs of 3 entries were not compared: security.* and trusted.* are for root";
    assert!(said.err.contains(line), "{}", said.err);
    set(&t.dst.join("file"), "user.note", b"other");
    let said = shell_as(65534, 65534, t.scratch.path(), &script).expect_code(9);
    assert!(
        said.out
            .contains("changed: \"file\": xattr user.note has another value\n"),
        "{}",
        said.out
    );
    // A user's manifest says nothing of what he could not see.
    fs::set_permissions(t.scratch.dir("theirs"), fs::Permissions::from_mode(0o777)).unwrap();
    let script = format!("./mirrorfs manifest '{}' theirs/manifest", t.src.display());
    shell_as(65534, 65534, t.scratch.path(), &script).expect_code(0);
    let theirs = t.scratch.path().join("theirs/manifest");
    let text = fs::read_to_string(&theirs).unwrap();
    assert!(text.contains(" xattr.user.dir=ZA=="), "{text}");
    assert!(text.contains(" xattrs=user") && !text.contains("xattrs=all"));
    assert!(
        !text.contains("trusted.") && !text.contains("security."),
        "{text}"
    );
    set(&t.dst.join("file"), "user.note", b"hello");
    let mut verify = mirrorfs();
    verify.args(["verify", "--manifest"]).arg(&theirs);
    let said = run(verify.arg(&t.dst)).expect_code(0);
    assert_eq!(said.err, "");
}

#[test]
fn a_mark_and_what_comes_with_the_bytes_are_no_changes() {
    if !can_mount_on("ext4") {
        return;
    }
    let w = World::on("ext4");
    fill(&w.src);
    let scratch = Scratch::new();
    let manifest = scratch.path().join("manifest");
    run(mirrorfs().arg("manifest").arg(&w.src).arg(&manifest)).expect_code(0);
    let verify = |at: &Path| {
        let mut command = mirrorfs();
        command.args(["verify", "--manifest"]).arg(&manifest);
        run(command.arg(at))
    };
    let m = w.mount_lazy();
    fs::read_dir(m.path(".")).unwrap().count();
    fs::read_dir(m.path("dir")).unwrap().count();
    m.unmount();
    let said = verify(&w.dst).expect_code(9);
    let told: Vec<_> = said
        .out
        .lines()
        .filter(|l| l.starts_with("changed"))
        .collect();
    assert_eq!(told, Vec::<&str>::new(), "{}", said.out);
    let m = w.mount();
    m.wait_complete();
    let said = verify(&m.path(".")).expect_code(0);
    assert_eq!(said.err, "");
    m.finish();
    verify(&w.dst).expect_code(0);
}
