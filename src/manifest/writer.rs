//! Writer: a manifest that a run writes, and what an earlier one has left in it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::index::{self, Scan, io_trouble};
use super::{Entry, HEADER, Index, SIGNATURE, Trouble};
use crate::error::Errno;
use crate::sys::host;

/// Lines are written when there are this many bytes of them, or when the last time was this long ago.
const PENDING_MAX: usize = 64 << 10;
const PENDING_LONGEST: Duration = Duration::from_secs(1);

/// How long the lock of another run is waited for: a child that was just made by one that is over holds it
/// until it has become another program.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// A manifest that grows.
pub struct Writer {
    path: PathBuf,
    /// Where this run's lines begin.
    from: u64,
    state: Mutex<State>,
}

struct State {
    file: File,
    pending: Vec<u8>,
    written: Instant,
    entries: u64,
    /// Of what the file will hold when it has ended: header and this run's lines.
    hasher: blake3::Hasher,
    /// The first failure: from there on the manifest cannot be whole.
    failed: Option<io::Error>,
    closed: bool,
}

impl Writer {
    /// Opens the manifest to go on with it, or makes it. The lines of earlier runs can be asked for. What
    /// an earlier run could not write whole is cut off, and told.
    pub fn begin(path: &Path) -> Result<(Writer, Index, Option<Trouble>), Trouble> {
        let fail = |call, e: io::Error| io_trouble(path, call, &e);
        // At the end its directory gets a new file of that name: where it is, not where a symlink is.
        let path = &match path.canonicalize() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
            found => found.map_err(|e| fail("realpath", e))?,
        };
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| fail("open", e))?;
        let why = |why: &str| Trouble {
            path: path.clone(),
            line: 0,
            why: why.into(),
        };
        if !file.metadata().map_err(|e| fail("fstat", e))?.is_file() {
            return Err(why("it is not a regular file"));
        }
        match lock(&file) {
            Ok(()) | Err(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            Err(Errno::WOULDBLOCK) => return Err(why("another run is writing it")),
            Err(e) => return Err(fail("flock", e.into())),
        }
        if file.metadata().map_err(|e| fail("fstat", e))?.nlink() == 0 {
            return Err(why("another run has just written it"));
        }
        let reader = File::open(path).map_err(|e| fail("open", e))?;
        let Scan {
            index,
            mut good,
            bad,
        } = index::scan(reader, path)?;
        if bad.is_some() {
            file.set_len(good).map_err(|e| fail("ftruncate", e))?;
        }
        file.seek(SeekFrom::Start(good))
            .map_err(|e| fail("lseek", e))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(SIGNATURE).update(HEADER);
        if good == 0 {
            let header = [SIGNATURE, HEADER].concat();
            file.write_all(&header).map_err(|e| fail("write", e))?;
            good = header.len() as u64;
        }
        let state = State {
            file,
            pending: Vec::new(),
            written: Instant::now(),
            entries: 0,
            hasher,
            failed: None,
            closed: false,
        };
        let writer = Writer {
            path: path.clone(),
            from: good,
            state: Mutex::new(state),
        };
        Ok((writer, index, bad))
    }

    /// One more entry that is done. A failure is told at the end.
    pub fn add(&self, entry: &Entry) {
        let mut line = Vec::with_capacity(256);
        entry.write(&mut line);
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        state.hasher.update(&line);
        state.entries += 1;
        state.pending.extend_from_slice(&line);
        if state.pending.len() >= PENDING_MAX || state.written.elapsed() >= PENDING_LONGEST {
            state.flush();
        }
    }

    /// What was said so far goes to the file.
    pub fn flush(&self) {
        self.state.lock().flush();
    }

    /// The end of a run that leaves the end of the manifest to another one: nothing more is written, and the
    /// file is free.
    pub fn close(&self) -> Result<(), Trouble> {
        let ended = self.end(false);
        let mut state = self.state.lock();
        state.closed = true;
        // The file is only closed with the last who knows of this writer.
        let _ = host::unlock(state.file.as_fd()); // Then that does it.
        ended
    }

    /// The end of the run, when all that the lines speak of is durable. `whole`: they speak of all of the
    /// tree; then nothing of earlier runs stays. Else the manifest holds both, and has no end.
    pub fn end(&self, whole: bool) -> Result<(), Trouble> {
        let mut state = self.state.lock();
        state.flush();
        let fail = |call, e: io::Error| io_trouble(&self.path, call, &e);
        if let Some(e) = state.failed.take() {
            return Err(fail("write", e));
        }
        if !whole {
            return state.file.sync_all().map_err(|e| fail("fsync", e));
        }
        let last = index::end_line(state.entries, &state.hasher);
        let header = (SIGNATURE.len() + HEADER.len()) as u64;
        if self.from == header {
            let written = state.file.write_all(last.as_bytes());
            written.map_err(|e| fail("write", e))?;
            state.file.sync_all().map_err(|e| fail("fsync", e))?;
            return self.sync_dir().map_err(|e| fail("fsync", e));
        }
        self.replace(&mut state.file, &last)
            .map_err(|e| fail("replacing it", e))
    }

    /// This run's lines alone, in a new file that takes the place of the old one.
    fn replace(&self, old: &mut File, last: &str) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let name = PathBuf::from(name);
        // One that was left by a kill; nobody's symlink is followed.
        match std::fs::remove_file(&name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(true).mode(0o600);
        let mut new = options.open(&name)?;
        let copied = (|| {
            new.write_all(SIGNATURE)?;
            new.write_all(HEADER)?;
            old.seek(SeekFrom::Start(self.from))?;
            io::copy(old, &mut new)?;
            new.write_all(last.as_bytes())?;
            new.sync_all()?;
            std::fs::rename(&name, &self.path)
        })();
        if copied.is_err() {
            // The error is what counts; the next run writes over it.
            let _ = std::fs::remove_file(&name); // As said.
        }
        copied?;
        self.sync_dir()
    }

    #[cfg(test)]
    pub(super) fn same_open_file(&self) -> File {
        self.state.lock().file.try_clone().expect("dup")
    }

    fn sync_dir(&self) -> io::Result<()> {
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// Locks the file.
fn lock(file: &File) -> Result<(), Errno> {
    let since = Instant::now();
    loop {
        match host::try_lock(file.as_fd()) {
            Err(Errno::WOULDBLOCK) if since.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_WAIT / 50);
            }
            other => return other,
        }
    }
}

impl Drop for Writer {
    /// By closing the file the lock would stay for as long as a child that was made meanwhile has it open.
    fn drop(&mut self) {
        let _ = host::unlock(self.state.get_mut().file.as_fd()); // Closing it does that, in the end.
    }
}

impl State {
    fn flush(&mut self) {
        let lines = std::mem::take(&mut self.pending);
        self.written = Instant::now();
        if self.failed.is_none()
            && let Err(e) = self.file.write_all(&lines)
        {
            self.failed = Some(e);
        }
    }
}
