//! The guard: a small process of its own that holds the fanotify group, so that nobody reads zeros
//! when the daemon dies.
//!
//!   Serving   the daemon is connected: it is asked about what carries a mark
//!   Holding   the daemon is gone: whoever wants a marked file waits for the next one
//!   Refusing  the daemon was stopped: marked files are EIO until the next one comes
//!
//! Whatever state: what carries no mark is let through without a word to anybody, for good. It opens
//! nothing once it watches: it would ask itself. D2 for a file whose mark has just gone: the daemon
//! says up to which second all removals are durable; a younger change is the daemon's to judge, and
//! without one the guard syncs the file itself.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::mark::MarkName;
use crate::sys::fanotify::{Event, Group};
use crate::sys::pass::{self, LEN};
use crate::sys::xattr::Target;
use crate::sys::{fd, host, stat};

/// How often the guard looks whether the migration is over.
const LOOK: Duration = Duration::from_secs(5);

/// What the guard and the daemon tell each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// To the guard, with the control directory, the listening socket, and perhaps the group of a
    /// guard that has died.
    Watch,
    /// From the guard, with the group: it watches.
    Watching,
    /// From the guard, with the file: somebody waits for it.
    Wanted(i32),
    /// To the guard: what becomes of the access; 0 or an errno.
    Answer(i32, i32),
    /// To the guard: what was unmarked before this second is unmarked for good.
    Settled(i64),
    /// To the guard: no daemon is going to come; or one is not wanted.
    Refuse,
    /// To the guard: nothing is pending, or a mount hides the tree.
    End,
    /// From the guard: it cannot watch; the errno.
    Failed(i32),
}

impl Message {
    pub(super) fn encode(self) -> [u8; LEN] {
        let (kind, id, value) = match self {
            Message::Watch => (1, 0, 0),
            Message::Watching => (2, 0, 0),
            Message::Wanted(id) => (3, id, 0),
            Message::Answer(id, errno) => (4, id, i64::from(errno)),
            Message::Settled(second) => (5, 0, second),
            Message::Refuse => (6, 0, 0),
            Message::End => (7, 0, 0),
            Message::Failed(errno) => (8, errno, 0),
        };
        let mut out = [0; LEN];
        out[..4].copy_from_slice(&i32::to_ne_bytes(kind));
        out[4..8].copy_from_slice(&i32::to_ne_bytes(id));
        out[8..].copy_from_slice(&i64::to_ne_bytes(value));
        out
    }

    pub(super) fn decode(bytes: &[u8; LEN]) -> Option<Message> {
        let int = |at: usize| Some(i32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let value = i64::from_ne_bytes(bytes.get(8..)?.try_into().ok()?);
        let id = int(4)?;
        Some(match int(0)? {
            1 => Message::Watch,
            2 => Message::Watching,
            3 => Message::Wanted(id),
            4 => Message::Answer(id, i32::try_from(value).ok()?),
            5 => Message::Settled(value),
            6 => Message::Refuse,
            7 => Message::End,
            8 => Message::Failed(id),
            _ => return None,
        })
    }
}

/// An access that the daemon has to judge.
struct Held {
    file: OwnedFd,
    /// The daemon that is connected knows of it.
    told: bool,
}

struct Guard {
    group: Group,
    control: OwnedFd,
    listener: OwnedFd,
    /// The daemon, and its process.
    daemon: Option<(OwnedFd, i32)>,
    refuses: bool,
    settled: i64,
    held: Vec<Held>,
}

/// The guard process: `first` is connected to the daemon that started it. Returns when it is over.
pub fn run(first: OwnedFd) -> Result<(), Errno> {
    host::raise_nofile();
    let (Some(message), fds) = (match pass::receive(first.as_fd())? {
        Some((bytes, fds)) => (Message::decode(&bytes), fds),
        None => return Ok(()),
    }) else {
        return Err(Errno::PROTO);
    };
    let mut fds = fds.into_iter();
    let (Message::Watch, Some(control), Some(listener)) = (message, fds.next(), fds.next()) else {
        return Err(Errno::PROTO);
    };
    // Memory is short: anybody else first. Without it the tree would show zeros.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000"); // A rootless container may not.
    let watched = match fds.next() {
        Some(group) => Ok(Group::from_fd(group)),
        None => Group::new().and_then(|group| {
            group.watch_filesystem(control.as_fd())?;
            Ok(group)
        }),
    };
    let group = match watched {
        Ok(group) => group,
        Err(errno) => {
            let failed = Message::Failed(errno.raw_os_error());
            return pass::send(first.as_fd(), &failed.encode(), &[], true);
        }
    };
    let daemon = rustix::net::sockopt::socket_peercred(&first)?.pid;
    let mut guard = Guard {
        group,
        control,
        listener,
        daemon: None,
        refuses: false,
        settled: i64::MIN,
        held: Vec::new(),
    };
    guard.welcome(first, daemon.as_raw_pid());
    guard.serve();
    Ok(())
}

impl Guard {
    /// Until it is over. Whatever fails is tried again: a guard that ends lets everybody through.
    fn serve(&mut self) {
        loop {
            let ready = self.wait().unwrap_or_default();
            let [asked, calls, told] = ready;
            if told && self.hear() {
                return;
            }
            if calls && let Ok(Some((socket, pid))) = pass::accept(self.listener.as_fd()) {
                self.welcome(socket, pid);
            }
            if asked {
                self.take();
            }
            self.tell();
            // The control directory is gone: somebody finished without us.
            let idle = ready == [false; 3];
            if idle && stat::stat_fd(self.control.as_fd()).is_ok_and(|s| s.nlink == 0) {
                return;
            }
        }
    }

    /// Waits until there is an event, a new daemon, or word from the one that is connected.
    fn wait(&self) -> Result<[bool; 3], Errno> {
        let mut of_daemon = PollFlags::IN;
        of_daemon.set(PollFlags::OUT, self.held.iter().any(|h| !h.told));
        let (group, listener) = (self.group.as_fd(), self.listener.as_fd());
        let mut fds = vec![
            PollFd::from_borrowed_fd(group, PollFlags::IN),
            PollFd::from_borrowed_fd(listener, PollFlags::IN),
        ];
        if let Some((socket, _)) = &self.daemon {
            fds.push(PollFd::new(socket, of_daemon));
        }
        let time = Timespec {
            tv_sec: LOOK.as_secs() as i64,
            tv_nsec: 0,
        };
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&time)))?;
        let ready = |n: usize| {
            let end = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
            fds.get(n).is_some_and(|f| f.revents().intersects(end))
        };
        Ok([ready(0), ready(1), ready(2)])
    }

    /// A daemon is here. It gets the group too: a guard that dies lets nobody through either.
    fn welcome(&mut self, socket: OwnedFd, pid: i32) {
        let watching = Message::Watching.encode();
        if self.daemon.is_some()
            || pass::send(socket.as_fd(), &watching, &[self.group.as_fd()], false).is_err()
        {
            return;
        }
        self.refuses = false;
        self.daemon = Some((socket, pid));
        self.held.iter_mut().for_each(|h| h.told = false);
        // What the last one had unmarked may not be durable; nor do we know what this one does.
        self.settled = i64::MIN;
    }

    /// One word of the daemon's. True: it is over.
    fn hear(&mut self) -> bool {
        let Some((socket, _)) = &self.daemon else {
            return false;
        };
        let heard = pass::receive(socket.as_fd()).unwrap_or(None);
        match heard.and_then(|(bytes, _)| Message::decode(&bytes)) {
            Some(Message::Answer(id, errno)) => {
                if let Some(at) = self.held.iter().position(|h| h.file.as_raw_fd() == id) {
                    let held = self.held.swap_remove(at);
                    match errno {
                        0 => self.let_through(held.file.as_fd()),
                        errno => self.refuse(held.file.as_fd(), Errno::from_raw_os_error(errno)),
                    }
                }
            }
            Some(Message::Settled(second)) => self.settled = second,
            Some(Message::Refuse) => self.refuses = true,
            Some(Message::End) => return true,
            _ => {
                self.daemon = None;
                if self.refuses {
                    for held in std::mem::take(&mut self.held) {
                        self.refuse(held.file.as_fd(), Errno::IO);
                    }
                }
            }
        }
        false
    }

    fn take(&mut self) {
        let mut events = Vec::new();
        let mut buf = [0; 4096];
        let _ = self.group.read(&mut buf, |event| events.push(event)); // The kernel has refused that one.
        events.into_iter().for_each(|event| self.judge(event));
    }

    fn judge(&mut self, Event { file, pid }: Event) {
        // What the daemon does is its own affair; waiting for it here would never end.
        if self
            .daemon
            .as_ref()
            .is_some_and(|(_, daemon)| *daemon == pid)
        {
            return self.answer(file.as_fd(), Ok(()));
        }
        let here = matches!(MarkName::Trusted.get(Target::Open(file.as_fd())), Ok(None));
        if here && self.is_settled(file.as_fd()) {
            return self.let_through(file.as_fd());
        }
        if self.daemon.is_none() && here {
            return match fd::fsync(file.as_fd()) {
                Ok(()) => self.let_through(file.as_fd()),
                Err(errno) => self.refuse(file.as_fd(), errno),
            };
        }
        if self.daemon.is_none() && self.refuses {
            return self.refuse(file.as_fd(), Errno::IO);
        }
        self.held.push(Held { file, told: false });
    }

    /// D2: a removal of the mark that may not be durable has changed the inode lately.
    fn is_settled(&self, file: BorrowedFd<'_>) -> bool {
        stat::stat_fd(file).is_ok_and(|s| s.ctime.sec < self.settled)
    }

    /// Tells the daemon of who waits, as far as there is room.
    fn tell(&mut self) {
        let Some((socket, _)) = &self.daemon else {
            return;
        };
        for held in self.held.iter_mut().filter(|h| !h.told) {
            let wanted = Message::Wanted(held.file.as_raw_fd()).encode();
            if pass::send(socket.as_fd(), &wanted, &[held.file.as_fd()], false).is_err() {
                return;
            }
            held.told = true;
        }
    }

    fn let_through(&self, file: BorrowedFd<'_>) {
        // Not ignored: it is asked about again, no more.
        let _ = self.group.ignore(file); // See above.
        self.answer(file, Ok(()));
    }

    fn refuse(&self, file: BorrowedFd<'_>, errno: Errno) {
        self.answer(file, Err(errno));
    }

    fn answer(&self, file: BorrowedFd<'_>, verdict: Result<(), Errno>) {
        // ENOENT: who waited was killed meanwhile.
        let _ = self.group.answer(file, verdict); // Anything else: he waits on, and sees no zeros.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_its_encoding() {
        for message in [
            Message::Watch,
            Message::Watching,
            Message::Wanted(7),
            Message::Answer(3, 5),
            Message::Settled(-1),
            Message::Refuse,
            Message::End,
            Message::Failed(22),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(&[0; LEN]), None);
    }
}
