//! Gate: what `finish` keeps from happening while it looks at dst and gives up what was accepted as lost.
//!
//!   Open -> Shut   shut()      nothing more is asked of src for files that it cannot give whole; changes of
//!                              pending files wait
//!   Shut -> Open   open()      it was refused: they are made as ever
//!   Shut -> Over   over()      it has ended: they are made on what is left, or told that the file is gone
//!
//! A change looks at the gate under its hydration's state lock, where it takes its turn: `shut_rescues` shuts
//! the gate first, and then waits for those that have begun. Lock order: a hydration's state, then `held`.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::super::Mirror;
use super::super::node::{Ino, Node};
use super::super::populate::Waiter;
use crate::error::{Context, Side};

const OPEN: u8 = 0;
const SHUT: u8 = 1;
const OVER: u8 = 2;

/// See the module.
#[derive(Default)]
pub(in crate::mirror) struct Gate {
    state: AtomicU8,
    held: Mutex<Vec<(Arc<Node>, Waiter)>>,
    /// By `finish`, which has ended.
    removed: OnceLock<HashSet<Ino>>,
}

impl Gate {
    /// Nothing more is asked of src.
    pub(in crate::mirror) fn is_shut(&self) -> bool {
        self.state.load(Ordering::Acquire) != OPEN
    }

    /// A change of the pending file has to wait, or cannot be made any more: see `after`.
    pub(in crate::mirror) fn stops(&self, ino: Ino) -> bool {
        match self.state.load(Ordering::Acquire) {
            OPEN => false,
            SHUT => true,
            _ => self.is_removed(ino),
        }
    }

    fn is_removed(&self, ino: Ino) -> bool {
        self.removed.get().is_some_and(|all| all.contains(&ino))
    }

    pub(super) fn shut(&self) {
        self.state.store(SHUT, Ordering::Release);
    }

    fn pass_to(&self, state: u8) -> Vec<(Arc<Node>, Waiter)> {
        let mut held = self.held.lock();
        self.state.store(state, Ordering::Release);
        std::mem::take(&mut held)
    }

    /// Calls `then` when `finish` has ended, at once if it has: not under a lock. ESTALE: it has removed the
    /// file.
    pub(in crate::mirror) fn after(&self, node: &Arc<Node>, then: Waiter) {
        {
            let mut held = self.held.lock();
            if self.state.load(Ordering::Acquire) == SHUT {
                return held.push((Arc::clone(node), then));
            }
        }
        self.tell(node, then);
    }

    fn tell(&self, node: &Node, then: Waiter) {
        let there = match self.is_removed(node.ino) {
            true => Err(Errno::STALE),
            false => Ok(()),
        };
        then(there.on("finish", Side::Dst, node.display_name()));
    }
}

impl Mirror {
    /// `finish` was refused. Not under a lock: waiters are told.
    pub(in crate::mirror) fn open_gate(&self) {
        self.pass_gate(OPEN);
    }

    /// `finish` has ended, and has removed these.
    pub(super) fn end_gate(&self, removed: HashSet<Ino>) {
        let _ = self.spoiled.gate.removed.set(removed); // It ends once.
        self.pass_gate(OVER);
    }

    fn pass_gate(&self, state: u8) {
        let gate = &self.spoiled.gate;
        let held = gate.pass_to(state).into_iter();
        held.for_each(|(node, then)| gate.tell(&node, then));
    }
}
