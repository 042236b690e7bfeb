//! The mount helper: `mount.mirrorfs SRC DIR -o OPTIONS`, as mount(8) calls it for fstab.
//!
//! The same program, by the name that it was started under; also `mirrorfs SRC DIR -o OPTIONS`, as
//! mount.fuse3 calls it. `dst=` among the options says where to copy to; without it that is DIR.
//! What is mounted already is success: `mount -a` may be run again. What was mounted a moment ago, by a daemon
//! that is ending, is not: it is mounted again when that has gone (ending.rs).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::Parser;

use super::{Failure, client, ending, exit, mount, out, remount, steer};
use crate::cli::{self, Cli, Command};

/// mount(8)'s exit codes.
pub(super) mod code {
    pub(in super::super) const DONE: u8 = 0;
    /// Wrong words, or not allowed.
    pub(in super::super) const USAGE: u8 = 1;
    /// The system lacks something.
    pub(in super::super) const SYSTEM: u8 = 2;
    /// The mount failed.
    pub(in super::super) const FAILED: u8 = 32;
}

/// How mount(8) calls a helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    src: PathBuf,
    pub(super) dst: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) options: Vec<Vec<u8>>,
    /// `-f`: only say whether it could be done.
    pub(super) fake: bool,
    /// `-s`: what is not known is no error.
    sloppy: bool,
    wrong: Option<String>,
}

impl Call {
    /// The call, when the program was started as a helper.
    pub(super) fn of(words: &[OsString]) -> Option<Call> {
        let name = Path::new(words.first()?).file_name()?.as_bytes().to_vec();
        let by_name = name.starts_with(b"mount.");
        // `mirrorfs /old /srv/data -o ...`: no command begins with a slash.
        let by_words = || {
            let first = words.get(1).is_some_and(|w| w.as_bytes().starts_with(b"/"));
            first && words.iter().any(|w| w == "-o")
        };
        (by_name || by_words()).then(|| Call::parse(&words[1..]))
    }

    fn parse(words: &[OsString]) -> Call {
        let (mut places, mut wrong) = (Vec::new(), None);
        let (mut fake, mut sloppy) = (false, false);
        let mut options: Vec<Vec<u8>> = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            match bytes.strip_prefix(b"-") {
                None | Some(b"") => places.push(PathBuf::from(word)),
                Some(b"o") => match words.next() {
                    Some(list) => options.extend(split(list.as_bytes())),
                    None => wrong = Some("-o needs a value".to_owned()),
                },
                // The type and the namespace: nothing that we did not know.
                Some(b"t" | b"N") => {
                    words.next();
                }
                Some(flags) => {
                    for flag in flags {
                        match flag {
                            b'f' => fake = true,
                            b's' => sloppy = true,
                            b'n' | b'v' | b'w' => {}
                            b'r' => options.push(b"ro".to_vec()),
                            _ => wrong = Some(format!("{}: unknown", word.to_string_lossy())),
                        }
                    }
                }
            }
        }
        let mut places = places.into_iter();
        let (src, dir) = (places.next(), places.next());
        if dir.is_none() || places.next().is_some() {
            wrong
                .get_or_insert_with(|| "usage: mount.mirrorfs SRC DIR [-fnsv] [-o OPTIONS]".into());
        }
        let dir = dir.unwrap_or_default();
        let mut dst = dir.clone();
        options.retain(|option| match option.strip_prefix(b"dst=") {
            Some(path) => {
                dst = PathBuf::from(OsString::from_vec(path.to_vec()));
                false
            }
            None => true,
        });
        Call {
            src: src.unwrap_or_default(),
            dst,
            dir,
            options,
            fake,
            sloppy,
            wrong,
        }
    }

    /// Mounts, and returns an exit code of mount(8).
    pub(super) fn run(self) -> u8 {
        if let Some(wrong) = &self.wrong {
            out::complain(wrong);
            return code::USAGE;
        }
        if self.options.iter().any(|o| o == b"remount") {
            return remount::run(&self);
        }
        match self.words_say() {
            Ok(args) if self.is_there() => match steer::mount_config(&args) {
                Ok(_) => code::DONE,
                Err(failure) => failed(&failure),
            },
            Ok(args) => self.mount(args),
            Err(line) => {
                out::complain(&line);
                code::USAGE
            }
        }
    }

    /// The words as those of `mirrorfs mount`, all of them known.
    pub(super) fn words_say(&self) -> Result<cli::Mount, String> {
        let first = |e: clap::Error| e.to_string().lines().next().unwrap_or_default().to_owned();
        let cli = Cli::try_parse_from(self.words()).map_err(first)?;
        let Command::Mount(mut args) = cli.command else {
            return Err("usage: mount.mirrorfs SRC DIR".into()); // The words say `mount`.
        };
        args.sloppy = self.sloppy;
        Ok(*args)
    }

    fn mount(&self, args: cli::Mount) -> u8 {
        let outcome = match self.fake {
            true => steer::mount_config(&args).map(|_| exit::DONE),
            false => mount::run(args),
        };
        match outcome {
            Ok(_) => code::DONE,
            Err(failure) => failed(&failure),
        }
    }

    /// The same SRC and DST are mounted at DIR already.
    fn is_there(&self) -> bool {
        let Ok(Some(daemon)) = client::find(&self.dir) else {
            return false;
        };
        let report = &daemon.report;
        let is = |names: &[String], path: &Path| {
            let text = client::lexical(path);
            text.is_some_and(|t| names.contains(&client::printable(&t)))
        };
        let same = is(&report.src_names, &self.src) && is(&report.home_names, &self.dst);
        // A daemon may live on without its mount: what is there now the table of mounts says.
        report.usable && same && ending::mount_at(&self.places()).is_some()
    }

    /// DIR as text, and as the table of mounts has it.
    pub(super) fn places(&self) -> Vec<String> {
        let both = [client::lexical(&self.dir), client::resolved(&self.dir)];
        let both = both.iter().flatten();
        both.map(|path| client::printable(path)).collect()
    }

    /// The same as words of `mirrorfs mount`.
    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = ["mirrorfs", "mount"].map(OsString::from).into();
        for option in &self.options {
            words.push("-o".into());
            words.push(OsString::from_vec(option.clone()));
        }
        words.push("--".into());
        words.extend([&self.src, &self.dst, &self.dir].map(|p| p.clone().into_os_string()));
        words
    }
}

/// Says it; the exit code of mount(8).
fn failed(failure: &Failure) -> u8 {
    if !failure.line.is_empty() {
        out::complain(&failure.line);
    }
    match failure.exit {
        exit::USAGE => code::USAGE,
        exit::FAILURE => code::SYSTEM,
        _ => code::FAILED,
    }
}

/// Options are separated by commas; a backslash takes the meaning from the next one.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut options = vec![Vec::new()];
    let mut bytes = list.iter();
    while let Some(byte) = bytes.next() {
        let at = options.len() - 1; // There is always one.
        match byte {
            b'\\' => options[at].extend(bytes.next()),
            b',' => options.push(Vec::new()),
            byte => options[at].push(*byte),
        }
    }
    options.retain(|option| !option.is_empty());
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(words: &str) -> Option<Call> {
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        Call::of(&words)
    }

    #[test]
    fn a_helper_is_known_by_its_name_or_by_its_words() {
        for words in [
            "/sbin/mount.mirrorfs /old /srv -o rw",
            "mount.mirrorfs /old /srv -o dst=/new,nofail -n -v",
            "mirrorfs /old /srv -o rw,dev,suid",
        ] {
            let call = call(words).expect(words);
            assert_eq!(call.wrong, None);
            assert_eq!(
                (&*call.src, &*call.dir),
                (Path::new("/old"), Path::new("/srv"))
            );
        }
        for words in [
            "mirrorfs status /srv",
            "mirrorfs mount /old /srv -o rw",
            "mirrorfs",
        ] {
            assert_eq!(call(words), None, "{words}");
        }
    }

    #[test]
    fn dst_is_taken_out_of_the_options_and_is_dir_without_it() {
        let found = call("mount.mirrorfs /old /srv -o dst=/new,bwlimit=1M").expect("a helper");
        assert_eq!(found.dst, Path::new("/new"));
        assert_eq!(found.options, [b"bwlimit=1M"]);
        let found = call("mount.mirrorfs /old /srv -f").expect("a helper");
        assert!(found.fake && found.dst == Path::new("/srv"));
        let found = call("mount.mirrorfs /old /srv -o dst=/a\\,b").expect("a helper");
        assert_eq!(found.dst, Path::new("/a,b"));
        for words in [
            "mount.mirrorfs /old",
            "mount.mirrorfs /a /b /c",
            "mount.mirrorfs /a /b -q",
        ] {
            assert!(call(words).expect("a helper").wrong.is_some(), "{words}");
        }
    }
}
