//! Helper: mounts by fusermount3(1), the setuid program of libfuse, for whoever may not mount.
//!
//! The helper opens /dev/fuse, mounts it on a directory of its caller, and sends the open device
//! over the socket that `_FUSE_COMMFD` names. What it refuses it says in one line on its standard
//! error, which is passed on as it is. The file system exists from then on: whoever looks into it
//! waits for the session's handshake.

use std::ffi::{OsStr, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

/// libfuse 3's name of the program, then libfuse 2's: they understand the same words.
const NAMES: [&str; 2] = ["fusermount3", "fusermount"];
/// The helper's socket is its standard input: inherited without a change of flags.
const COMM_FD: &str = "0";

/// The helper of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    program: PathBuf,
}

/// What the mount is to be.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Shown as the mount's source.
    pub source: &'a Path,
    /// Flags and options besides those that every mount of ours has: `ro`, `allow_other` ...
    pub options: &'a [&'a str],
}

impl Helper {
    /// Looks for the helper in PATH; `None`: it is not installed.
    pub fn find() -> Option<Helper> {
        Helper::find_in(&std::env::var_os("PATH")?)
    }

    fn find_in(path: &OsStr) -> Option<Helper> {
        let dirs: Vec<PathBuf> = std::env::split_paths(path).collect();
        NAMES
            .iter()
            .flat_map(|name| dirs.iter().map(move |dir| dir.join(name)))
            .find(|program| program.is_absolute() && program.is_file())
            .map(|program| Helper { program })
    }

    /// Mounts on `at`, an absolute path without symlinks, and returns the open /dev/fuse.
    /// An error is one line: what the helper said.
    pub fn mount(&self, at: &Path, wanted: &Wanted<'_>) -> Result<OwnedFd, String> {
        let fail = |call: &str, e: &dyn std::fmt::Display| self.line(&format!("{call}: {e}"));
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| fail("socketpair", &e))?;
        let mut command = Command::new(&self.program);
        command
            .arg("-o")
            .arg(options(wanted))
            .arg("--")
            .arg(at)
            .env("_FUSE_COMMFD", COMM_FD)
            .stdin(theirs);
        self.run(command)?;
        // The command is gone, and our copy of its end of the socket with it.
        receive(&ours).map_err(|e| fail("recvmsg", &e))
    }

    /// `umount -l` of our own mount on `at`: open files live on.
    pub fn unmount(&self, at: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.program);
        command.args(["-u", "-z", "--"]).arg(at);
        command.stdin(Stdio::null());
        self.run(command)
    }

    fn run(&self, mut command: Command) -> Result<(), String> {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let said = command
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .map_err(|e| self.line(&format!("exec: {e}")))?;
        if said.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&said.stderr);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let text = lines.join("; ");
        // It begins its lines with its own name, as we do.
        let name = self.program.file_name().unwrap_or_default();
        let own = format!("{}: ", name.to_string_lossy());
        match text.strip_prefix(&own).unwrap_or(&text) {
            "" => Err(self.line(&said.status.to_string())),
            text => Err(self.line(text)),
        }
    }

    fn line(&self, what: &str) -> String {
        let name = self.program.file_name().unwrap_or_default();
        format!("{}: {what}", name.to_string_lossy())
    }
}

/// The helper's own list: in the value of fsname a backslash keeps the next byte as it is.
fn options(wanted: &Wanted<'_>) -> OsString {
    let mut all = b"default_permissions,subtype=mirrorfs".to_vec();
    for option in wanted.options {
        all.push(b',');
        all.extend_from_slice(option.as_bytes());
    }
    all.extend_from_slice(b",fsname=");
    for byte in wanted.source.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            all.push(b'\\');
        }
        all.push(*byte);
    }
    OsString::from_vec(all)
}

/// The one fd that comes with the helper's message.
fn receive(socket: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut parts, &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
            Ok(_) => break,
        }
    }
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    // It ended well and sent nothing: not a helper that we know.
    fds.next().ok_or(Errno::PROTO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_with_commas_cannot_add_an_option() {
        let wanted = Wanted {
            source: Path::new("/a,allow_other\\,b"),
            options: &["ro"],
        };
        assert_eq!(
            options(&wanted),
            "default_permissions,subtype=mirrorfs,ro,fsname=/a\\,allow_other\\\\\\,b"
        );
    }

    #[test]
    fn the_helper_is_looked_for_in_path_and_never_in_the_working_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let find = |path: &Path| Helper::find_in(path.as_os_str());
        assert_eq!(find(dir.path()), None);
        std::fs::write(dir.path().join("fusermount"), "").expect("write");
        let old = find(dir.path()).expect("libfuse 2's");
        std::fs::write(dir.path().join("fusermount3"), "").expect("write");
        assert_ne!(find(dir.path()), Some(old));
        assert_eq!(find(Path::new("")), None);
    }

    #[test]
    fn what_the_helper_says_is_one_line() {
        let helper = Helper {
            program: "/bin/sh".into(),
        };
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo 'sh: no' >&2; echo more >&2; exit 1"]);
        assert_eq!(helper.run(command), Err("sh: no; more".to_owned()));
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit 3"]);
        assert_eq!(helper.run(command), Err("sh: exit status: 3".to_owned()));
    }
}
