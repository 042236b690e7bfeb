//! Preflight: what must hold before anything is touched, each with a line of its own.
//!
//! Directories are opened once and compared as inodes, upwards along `..` and by their place inside
//! their file system, so that neither a symlink nor a bind mount hides that one tree is inside the
//! other. What only the trees' content tells (marks, identity, locks) is `Mirror::open`'s.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::out::quoted;
use super::{Failure, exit, finished};
use crate::config::{MountConfig, SyncConfig};
use crate::error::Errno;
use crate::fuse::session::{self, FS_TYPE, Over, Point};
use crate::mark::{CONTROL_DIR, SHARDS_DIR, SYNC_RECORD};
use crate::mirror::Trees;
use crate::sys::helper::Helper;
use crate::sys::stat::{Stat, stat_fd};
use crate::sys::{caps, host, local};

/// Dead mounts stacked on one directory that are taken away; more is somebody's mistake.
const DEAD_MOUNTS_MAX: usize = 16;
/// Symlinks that are followed to a dead mount, as the kernel does.
const SYMLINKS_MAX: usize = 40;

/// A directory that was opened as the user named it.
struct Root {
    role: &'static str,
    path: PathBuf,
    fd: OwnedFd,
    stat: Stat,
}

impl Root {
    fn open(role: &'static str, path: &Path) -> Result<Root, Failure> {
        Root::new(role, path, local::open_dir_path(path))
    }

    /// What is mounted on. An automount point does not start what may be this very mount.
    fn open_point(path: &Path) -> Result<Root, Failure> {
        Root::new("MOUNTPOINT", path, local::open_mount_point(path))
    }

    fn new(role: &'static str, path: &Path, fd: Result<OwnedFd, Errno>) -> Result<Root, Failure> {
        let fail = |call: &str, e: Errno| unusable(role, path, call, e);
        let fd = fd.map_err(|e| fail("open", e))?;
        alive(&fd).map_err(|e| {
            let line = format!(
                "{role} {}: statfs: {e}; the daemon of the mount on it has died: the same \
                 `mirrorfs mount` resumes",
                quoted(path)
            );
            Failure::new(exit::UNUSABLE, line)
        })?;
        let stat = stat_fd(fd.as_fd()).map_err(|e| fail("statx", e))?;
        local::may_list(fd.as_fd()).map_err(|e| fail("access", e))?;
        Ok(Root {
            role,
            path: path.to_path_buf(),
            fd,
            stat,
        })
    }

    /// Whether `other` is this directory or below it.
    fn contains(&self, other: &Root) -> Result<bool, Failure> {
        let above = local::ancestors(other.fd.as_fd())
            .map_err(|e| unusable(other.role, &other.path, "openat ..", e))?;
        if above.contains(&self.stat.key) {
            return Ok(true);
        }
        let place = |root: &Root| {
            local::place(root.fd.as_fd())
                .map_err(|e| unusable(root.role, &root.path, "readlink", e))
        };
        Ok(match (place(self)?, place(other)?) {
            (Some(this), Some(that)) => this.contains(&that),
            _ => false,
        })
    }

    /// Whoever an automount point was started for meets it as an empty directory.
    fn is_a_tree(&self) -> Result<(), Failure> {
        if self.fs_type() != "autofs" {
            return Ok(());
        }
        let (role, path) = (self.role, quoted(&self.path));
        let line = format!("{role} {path}: an automount point with nothing mounted on it");
        Err(Failure::new(exit::UNUSABLE, line))
    }

    fn is(&self, other: &Root) -> bool {
        self.stat.key == other.stat.key
    }

    /// The type of the file system whose root was mounted right on this directory.
    fn mounted_type(&self) -> Option<String> {
        self.stat.mount_root.then(|| self.fs_type())
    }

    /// The type of this directory's file system, as mountinfo calls it; `?` when it does not.
    fn fs_type(&self) -> String {
        let mounts = host::mounts().unwrap_or_default();
        let line = mounts.into_iter().find(|m| m.id == self.stat.mnt_id);
        line.map_or_else(|| "?".to_owned(), |m| m.fs_type)
    }
}

/// What `mount` works with, once all is well.
pub(crate) struct Ground {
    /// With absolute paths.
    pub(crate) config: MountConfig,
    /// Both roots, as they are below any dead mount.
    pub(crate) trees: Trees,
    /// Type of SRC's file system.
    pub(crate) src_fs: String,
    /// Type of DST's file system.
    pub(crate) dst_fs: String,
    /// Mounts of ours whose daemon has died.
    pub(crate) dead: Dead,
    /// Where the mount goes; `None`: there is one.
    pub(crate) point: Option<Point>,
}

/// Mounts of ours whose daemon is dead: every access through them is ENOTCONN, so they keep what is
/// below out of sight until the new mount is there.
#[derive(Debug, Default)]
pub(crate) struct Dead {
    /// A mount point that is not used any more, and how many are stacked on it.
    elsewhere: Option<(PathBuf, usize)>,
}

impl Dead {
    /// Takes away those that no new mount replaces.
    pub(crate) fn detach_elsewhere(&self) {
        let Some((path, count)) = &self.elsewhere else {
            return;
        };
        for _ in 0..*count {
            if let Err(e) = host::detach(path) {
                tracing::warn!("{}: umount of a dead mount: {e}", quoted(path));
                return;
            }
        }
    }
}

/// Everything that `mount` can know beforehand. Changes nothing.
pub(super) fn mount(mut config: MountConfig) -> Result<Ground, Failure> {
    config.helper = !caps::have_sys_admin();
    config.rootless = config.helper || !local::in_initial_user_namespace();
    if let Some(helper) = host_can_mount(&config)? {
        return mount_by(&helper, config);
    }
    let is_dead = |path: &Path| open_alive(path).is_err() && dead_mount_point(path).is_some();
    if !is_dead(&config.mountpoint) && !is_dead(&config.dst) {
        return look(config);
    }
    // The dead mounts stay where users can see them; below them is looked in private.
    let point = config.mountpoint.clone();
    local::in_private_mounts(|| {
        let take_off = |point: &Path| {
            host::detach(point).map_err(|e| unusable("MOUNTPOINT", point, "umount", e))
        };
        let on_mountpoint = clear_dead_mounts(&config.mountpoint, &take_off)?;
        let dst = dead_mount_point(&config.dst);
        let elsewhere = clear_dead_mounts(&config.dst, &take_off)?;
        let elsewhere = dst.filter(|_| elsewhere > 0).map(|at| (at, elsewhere));
        let mut ground = look(config)?;
        ground.dead = Dead { elsewhere };
        Ok((ground, on_mountpoint))
    })
    .unwrap_or_else(|e| Err(unusable("MOUNTPOINT", &point, "unshare", e)))
    .and_then(|(mut ground, dead)| {
        // What was opened there is in the private mounts.
        let over = match dead {
            0 => local::open_mount_point(&point)
                .map(Over::Directory)
                .map_err(|e| unusable("MOUNTPOINT", &point, "open", e))?,
            dead => Over::Dead(dead),
        };
        ground.point = ground.point.map(|point| Point { over, ..point });
        Ok(ground)
    })
}

/// Without CAP_SYS_ADMIN: nothing can be looked at below a dead mount, so that goes first.
fn mount_by(helper: &Helper, config: MountConfig) -> Result<Ground, Failure> {
    if config.mountpoint != config.src {
        // A mistake here must not uncover a half-filled DST.
        Root::open("SRC", &config.src)?;
    }
    let take_off = |point: &Path| {
        let gone = session::take_off(point, Some(helper));
        gone.map_err(|e| Failure::new(exit::UNUSABLE, e.to_string()))
    };
    for path in [&config.mountpoint, &config.dst] {
        clear_dead_mounts(path, &take_off)?;
    }
    let ground = look(config)?;
    let dst = Root::open("DST", &ground.config.dst)?;
    let point = Root::open_point(&ground.config.mountpoint)?;
    ours_to_mount_on(&dst, &point)?;
    Ok(ground)
}

/// The two trees and the mount point, as the calling thread sees them.
fn look(mut config: MountConfig) -> Result<Ground, Failure> {
    let src = Root::open("SRC", &config.src)?;
    let dst = Root::open("DST", &config.dst)?;
    let point = Root::open_point(&config.mountpoint)?;
    let place = std::fs::canonicalize(&point.path).unwrap_or_else(|_| point.path.clone());
    for root in [&dst, &point] {
        if root.mounted_type().as_deref() == Some(FS_TYPE) {
            let line = format!(
                "{} {}: busy: mirrorfs is mounted on it already (mirrorfs status {})",
                root.role,
                quoted(&root.path),
                quoted(&root.path)
            );
            return Err(Failure::new(exit::UNUSABLE, line));
        }
    }
    for root in [&src, &dst] {
        root.is_a_tree()?;
    }
    not_nested(&src, &dst)?;
    let resumes = dst.path.join(CONTROL_DIR).exists();
    if config.adopt && !resumes {
        finished::refuse("--adopt", &dst.path, &dst.fd)?;
    }
    if let Some(path) = &config.manifest {
        for root in [&src, &dst, &point] {
            outside("--manifest", path, root)?;
        }
    }
    if point.is(&dst) {
        config.mountpoint = config.dst.clone();
    } else if !point.is(&src) {
        // The daemon would meet its own mount below SRC or DST, and wait for itself.
        for root in [&src, &dst] {
            if root.contains(&point)? {
                let line = format!(
                    "MOUNTPOINT {}: inside {} {}",
                    quoted(&point.path),
                    root.role,
                    quoted(&root.path)
                );
                return Err(Failure::new(exit::UNUSABLE, line));
            }
        }
        // An automount point waits for exactly this mount.
        if let Some(fs_type) = point.mounted_type().filter(|t| t != "autofs") {
            let line = format!(
                "MOUNTPOINT {}: busy: {fs_type} is mounted on it",
                quoted(&point.path)
            );
            return Err(Failure::new(exit::UNUSABLE, line));
        }
    }
    Ok(Ground {
        trees: Trees::open(&config.src, &config.dst)?,
        src_fs: src.fs_type(),
        dst_fs: dst.fs_type(),
        config,
        dead: Dead::default(),
        point: Some(Point {
            path: place,
            over: Over::Directory(point.fd),
        }),
    })
}

/// Everything that `sync` can know beforehand.
pub(super) fn sync(config: &SyncConfig) -> Result<(), Failure> {
    let src = Root::open("SRC", &config.src)?;
    let apart = |root: &Root| match &config.manifest {
        Some(path) => outside("--manifest", path, root),
        None => Ok(()),
    };
    apart(&src)?;
    match Root::open("DST", &config.dst) {
        Ok(dst) => {
            apart(&dst)?;
            not_nested(&src, &dst)?;
            let busy = "a migration shows its tree there, and copies it by itself";
            match config.dry_run {
                true => Ok(()),
                false if dst.mounted_type().as_deref() == Some(FS_TYPE) => {
                    let line = format!("DST {}: {busy}", quoted(&dst.path));
                    Err(Failure::new(exit::UNUSABLE, line))
                }
                false => finished::refuse("sync", &dst.path, &dst.fd),
            }
        }
        // Missing: it will be made, unless its parent is missing too or lies inside SRC.
        Err(failure) => match std::fs::symlink_metadata(&config.dst) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let parent = match config.dst.parent() {
                    Some(p) if !p.as_os_str().is_empty() => p,
                    _ => Path::new("."),
                };
                let parent = Root::open("DST's parent", parent)?;
                match src.contains(&parent)? {
                    true => Err(nested(("DST", &config.dst), &src)),
                    false => Ok(()),
                }
            }
            // Another shard has just made it.
            Ok(_) if config.shard.is_some() => {
                Root::open("DST", &config.dst).and_then(|dst| not_nested(&src, &dst))
            }
            _ => Err(failure),
        },
    }
}

/// The manifest is in neither tree: SRC is not written, and it would be no part of what DST should be.
fn outside(what: &str, path: &Path, root: &Root) -> Result<(), Failure> {
    // Not there yet: then it is no symlink either.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = Root::open("the manifest's directory", parent.unwrap_or(Path::new(".")))?;
    match root.contains(&parent)? {
        true => {
            let (role, path) = (root.role, quoted(path));
            let line = format!("{what} {path}: it must not be inside {role}");
            Err(Failure::new(exit::UNUSABLE, line))
        }
        false => Ok(()),
    }
}

/// The root of a DST that no daemon serves.
pub(super) fn root_of(dst: &Path) -> Result<OwnedFd, Failure> {
    Root::open("PATH", dst).map(|root| root.fd)
}

/// A migration into `path` was finished, and nothing of ours is there.
pub(super) fn is_finished(path: &Path) -> bool {
    Root::open("PATH", path).is_ok_and(|root| {
        root.fs_type() != FS_TYPE
            && !path.join(CONTROL_DIR).exists()
            && finished::note(path, &root.fd).is_some()
    })
}

/// `path` is the DST of a migration that no daemon serves.
pub(super) fn migration(path: &Path) -> Result<(), Failure> {
    let root = Root::open("PATH", path)?;
    if root.fs_type() == FS_TYPE {
        // It lives, and was not among those that answer us.
        let line = format!(
            "PATH {}: a mirrorfs serves it that does not answer you: another user's (try as root), or one with \
             another MIRRORFS_RUN_DIR",
            quoted(path)
        );
        return Err(Failure::new(exit::UNUSABLE, line));
    }
    let control = path.join(CONTROL_DIR);
    for name in [SYNC_RECORD, SHARDS_DIR] {
        if control.join(name).exists() {
            let line = format!(
                "PATH {}: a sync into it did not end ({CONTROL_DIR}/{name}): run mirrorfs sync once more",
                quoted(path)
            );
            return Err(Failure::new(exit::UNUSABLE, line));
        }
    }
    match std::fs::symlink_metadata(control) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let line = match finished::note(path, &root.fd) {
                Some(note) => format!(
                    "PATH {}: a migration into it was finished on {}: it is a plain tree",
                    quoted(path),
                    note.at
                ),
                None => format!(
                    "PATH {}: no daemon serves it, and it is not the DST of a migration",
                    quoted(path)
                ),
            };
            Err(Failure::new(exit::UNUSABLE, line))
        }
        Err(e) => {
            let line = format!("PATH {}: lstat .mirrorfs: {e}", quoted(path));
            Err(Failure::new(exit::UNUSABLE, line))
        }
    }
}

/// Both trees of `verify` exist and are directories.
pub(super) fn verify(src: &Path, dst: &Path) -> Result<(), Failure> {
    Root::open("SRC", src)?;
    Root::open("DST", dst)?;
    Ok(())
}

/// The tree and the file of `manifest`.
pub(super) fn manifest(src: &Path, file: &Path) -> Result<(), Failure> {
    outside("FILE", file, &Root::open("SRC", src)?)
}

/// The tree of `verify --manifest`.
pub(super) fn verify_one(dst: &Path) -> Result<(), Failure> {
    Root::open("DST", dst).map(drop)
}

fn not_nested(src: &Root, dst: &Root) -> Result<(), Failure> {
    if src.is(dst) {
        let line = format!(
            "SRC {} and DST {} are the same directory",
            quoted(&src.path),
            quoted(&dst.path)
        );
        return Err(Failure::new(exit::UNUSABLE, line));
    }
    if src.contains(dst)? {
        return Err(nested((dst.role, &dst.path), src));
    }
    if dst.contains(src)? {
        return Err(nested((src.role, &src.path), dst));
    }
    Ok(())
}

fn nested((role, path): (&str, &Path), outer: &Root) -> Failure {
    let line = format!(
        "{role} {}: inside {} {}",
        quoted(path),
        outer.role,
        quoted(&outer.path)
    );
    Failure::new(exit::UNUSABLE, line)
}

/// An error only when the directory's file system is a mount without a daemon. Opening by O_PATH and
/// statx answer from the kernel's caches long after it died; statfs always asks.
fn alive(fd: &OwnedFd) -> Result<(), Errno> {
    match host::fs_stat(fd.as_fd()) {
        Err(e) if host::is_mount_gone(e) => Err(e),
        _ => Ok(()),
    }
}

fn open_alive(path: &Path) -> Result<(), Errno> {
    local::open_mount_point(path).and_then(|fd| alive(&fd))
}

/// Takes away mounts of ours whose daemon is dead, as far as the calling thread sees them; returns
/// how many there were.
fn clear_dead_mounts(
    path: &Path,
    take_off: &dyn Fn(&Path) -> Result<(), Failure>,
) -> Result<usize, Failure> {
    for count in 0..DEAD_MOUNTS_MAX {
        if open_alive(path).is_ok() {
            return Ok(count);
        }
        let Some(point) = dead_mount_point(path) else {
            return Ok(count); // Not ours: opening it says what is wrong.
        };
        take_off(&point)?;
    }
    Ok(DEAD_MOUNTS_MAX)
}

/// The mount point of ours that `path` names, found as text: the path itself cannot be resolved. It may be a
/// symlink: that one lies beside the mount, and can be read.
fn dead_mount_point(path: &Path) -> Option<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..SYMLINKS_MAX {
        let (parent, name) = (path.parent()?, path.file_name()?);
        let parent = std::fs::canonicalize(parent).ok()?;
        let real = parent.join(name);
        if let Ok(target) = std::fs::read_link(&real) {
            path = parent.join(target);
            continue;
        }
        let mounts = host::mounts().ok()?;
        let top = mounts.into_iter().rfind(|m| m.point == real)?;
        return (top.fs_type == FS_TYPE).then_some(real);
    }
    None
}

/// This machine has what a mount needs. The helper comes back when it has to mount for us.
fn host_can_mount(config: &MountConfig) -> Result<Option<Helper>, Failure> {
    // The helper opens it as its caller too.
    let mut options = std::fs::File::options();
    if let Err(e) = options.read(true).write(true).open("/dev/fuse") {
        let remedy = match e.kind() {
            std::io::ErrorKind::PermissionDenied => "users need it with mode 0666",
            _ => "load the module with `modprobe fuse`",
        };
        let line = format!("\"/dev/fuse\": open: {e}; {remedy}");
        return Err(Failure::new(exit::FAILURE, line));
    }
    if !config.helper {
        return Ok(None);
    }
    let helper = Helper::find().ok_or_else(|| Failure::new(exit::FAILURE, session::NO_HELPER))?;
    if config.allow_other && local::uid() != 0 && !conf_allows_other() {
        let line = "-o allow_other: \"/etc/fuse.conf\" has no line `user_allow_other`";
        return Err(Failure::new(exit::FAILURE, line));
    }
    Ok(Some(helper))
}

/// As the helper reads it: root lets users open their mounts to others.
fn conf_allows_other() -> bool {
    std::fs::read_to_string("/etc/fuse.conf").is_ok_and(|text| {
        text.lines()
            .any(|line| line.trim_end() == "user_allow_other")
    })
}

/// Without privilege: DST's modes, times and marks are only its owner's to set, and the helper
/// mounts only where its caller may write.
fn ours_to_mount_on(dst: &Root, point: &Root) -> Result<(), Failure> {
    let fail = |root: &Root, what: String| {
        let line = format!("{} {}: {what}", root.role, quoted(&root.path));
        Err(Failure::new(exit::UNUSABLE, line))
    };
    if dst.stat.uid != local::uid() && !caps::have_dac_override() {
        return fail(
            dst,
            format!(
                "owned by user {}: without root mirrorfs needs a DST of its own user",
                dst.stat.uid
            ),
        );
    }
    local::may_write(point.fd.as_fd()).map_err(|e| unusable(point.role, &point.path, "access", e))
}

fn unusable(role: &str, path: &Path, call: &str, errno: Errno) -> Failure {
    Failure::new(
        exit::UNUSABLE,
        format!("{role} {}: {call}: {errno}", quoted(path)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_refuses_trees_inside_each_other_and_what_is_no_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("src/inner")).expect("mkdir");
        std::fs::create_dir(at("dst")).expect("mkdir");
        std::fs::write(at("file"), "x").expect("write");
        std::os::unix::fs::symlink(at("src/inner"), at("link")).expect("symlink");
        let check = |src: &str, dst: &str| sync(&SyncConfig::new(at(src), at(dst)));
        assert_eq!(check("src", "dst"), Ok(()));
        assert_eq!(check("src", "new"), Ok(()));
        for (src, dst, word) in [
            ("none", "dst", "No such file"),
            ("file", "dst", "Not a directory"),
            ("src", "file", "Not a directory"),
            ("src", "src", "same"),
            ("src", "src/inner", "inside"),
            ("src", "src/inner/new", "inside"),
            ("src/inner", "src", "inside"),
            ("src", "link", "inside"),
            ("src", "none/new", "No such file"),
        ] {
            let failure = check(src, dst).expect_err(word);
            assert_eq!(failure.exit, exit::UNUSABLE, "{failure:?}");
            assert!(failure.line.contains(word), "{failure:?}");
            assert!(!failure.line.contains('\n'), "{failure:?}");
        }
    }
}
