//! Slots: numbered places for open files that belong to one ring (direct descriptors).
//!
//! Where the kernel has every opcode that works on them (Linux 6.9), the table is the kernel's: a
//! file in a slot never enters the process's fd table. Elsewhere it is kept here, as fds, with the
//! same answers: ENXIO without a table, EINVAL behind its end, EBADF for an empty slot.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::op::{Reply, Slot, Target};
use crate::sys::Result;

/// Who keeps the files that are in slots.
pub(super) enum Slots {
    /// The kernel.
    Kernel,
    /// We.
    Here(Vec<Option<Arc<OwnedFd>>>),
}

impl Slots {
    /// A table of our own.
    pub(super) fn here(len: u32) -> Slots {
        Slots::Here((0..len).map(|_| None).collect())
    }

    /// What an operation works on: with a table of our own always an fd.
    pub(super) fn resolve(&self, target: &mut Target) -> Result<()> {
        if let (Slots::Here(files), Target::Slot(slot)) = (self, &*target) {
            let file = files.get(slot.0 as usize).and_then(Option::as_ref);
            *target = Target::Fd(Arc::clone(file.ok_or(Errno::BADF)?));
        }
        Ok(())
    }

    /// The answer of an opening, `into` a slot of ours if there is one; what was in it is closed, as
    /// the kernel does.
    pub(super) fn fill(&mut self, into: Option<Slot>, opened: Result<Reply>) -> Result<Reply> {
        match (into, opened) {
            (Some(slot), Ok(Reply::Fd(fd))) => self.put(slot, fd).map(|()| Reply::Slot(slot)),
            (_, opened) => opened,
        }
    }

    fn put(&mut self, slot: Slot, fd: OwnedFd) -> Result<()> {
        *self.place(slot)? = Some(Arc::new(fd));
        Ok(())
    }

    /// Empties a slot.
    pub(super) fn clear(&mut self, slot: Slot) -> Result<()> {
        self.place(slot)?.take().map(drop).ok_or(Errno::BADF)
    }

    fn place(&mut self, slot: Slot) -> Result<&mut Option<Arc<OwnedFd>>> {
        match self {
            Slots::Here(files) if !files.is_empty() => {
                files.get_mut(slot.0 as usize).ok_or(Errno::INVAL)
            }
            _ => Err(Errno::NXIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("open").into()
    }

    #[test]
    fn a_slot_is_full_until_it_is_cleared() {
        let mut slots = Slots::here(2);
        let mut target = Target::Slot(Slot(1));
        assert_eq!(slots.resolve(&mut target), Err(Errno::BADF));
        assert_eq!(slots.put(Slot(1), file()), Ok(()));
        assert_eq!(slots.resolve(&mut target), Ok(()));
        assert!(matches!(target, Target::Fd(_)));
        assert_eq!(slots.put(Slot(1), file()), Ok(()), "replaces");
        assert_eq!(slots.put(Slot(2), file()), Err(Errno::INVAL));
        assert_eq!(slots.clear(Slot(1)), Ok(()));
        assert_eq!(slots.clear(Slot(1)), Err(Errno::BADF));
        assert_eq!(Slots::here(0).put(Slot(0), file()), Err(Errno::NXIO));
        assert_eq!(Slots::here(0).clear(Slot(0)), Err(Errno::NXIO));
    }
}
