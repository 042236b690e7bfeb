//! Upgrade: what one program tells the next about a mirror that stays in use.
//!
//!   serving  -> drained   freeze()   users' requests end or are held, landed files get rid of their
//!                                    marks, one syncfs makes all of it durable
//!   drained  -> serving   thaw()     nothing came of it
//!   drained  -> (gone)    execve     whatever still runs may end anywhere, as in kill -9
//!   (new)    -> serving   resume()   from State, and from dst
//!
//! dst is the truth here as after a crash, so only that is told which the kernel relies on and dst does
//! not say: which inodes it holds, and which names of a P directory it was shown (a restart alone would
//! make those anew, under other inodes). Two things must not be half done: what a user asked for
//! (`requests`), and what of a mark is known in memory and not in dst (`marks`).

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Mirror;
use super::anchor::Anchor;
use super::asker;
use super::control::Control;
use super::hydrate::Stage;
use super::kept::Left;
use super::node::{Ino, Node, Origin, Phase, Place};
use super::partial::Partial;
use super::populate::DirRef;
use super::source::{Face, Source};
use crate::config::MountConfig;
use crate::error::{Context, Error, Result, Side};
use crate::gate::Gate;
use crate::progress::Progress;
use crate::sys::board::Board;
use crate::sys::handle::Handle;
use crate::sys::name::{Name, RelPath};
use crate::sys::view::View;
use crate::sys::{fd, host};
use crate::throttle::Background;

/// How long users are served on while what has landed becomes durable, and how long they then wait.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);

/// What the next program has to be told of a mirror.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// SRC without symlinks.
    src: PathBuf,
    face: Face,
    nodes: Vec<NodeState>,
    partials: Vec<PartialState>,
    /// 0 running, 1 paused, 2 off.
    background: u8,
    bwlimit: Option<u64>,
    lifted: bool,
    jobs: Option<usize>,
}

/// An inode that the kernel holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NodeState {
    ino: Ino,
    handle: String,
    kind: u32,
    phase: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    origin: Option<String>,
    place: Option<(Ino, String)>,
    lookups: u64,
}

/// A directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DirState {
    ino: Ino,
    handle: String,
    origin: String,
}

/// A directory that is P, with some of its names here.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PartialState {
    pub(super) dir: DirState,
    pub(super) unmarked: bool,
    pub(super) kept: bool,
    pub(super) large: bool,
    #[serde(default)]
    pub(super) named: bool,
    pub(super) asked: u64,
    pub(super) here: Vec<String>,
    pub(super) times: Option<(i64, u32, i64, u32)>,
    pub(super) default_acl: Option<Vec<u8>>,
    pub(super) carried: (u64, u64),
}

/// Any bytes as text: each one is the character with its number.
pub(super) fn text_of(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

/// The inverse of `text_of`.
pub(super) fn bytes_of(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|c| u8::try_from(c).ok()).collect()
}

fn path_of(text: &str) -> Option<RelPath> {
    RelPath::from_bytes(&bytes_of(text)?)
}

impl DirState {
    /// `None`: it is not known by a handle.
    pub(super) fn of(ino: Ino, anchor: &Anchor, origin: &RelPath) -> Option<DirState> {
        let Anchor::Handle(handle) = anchor else {
            return None;
        };
        Some(DirState {
            ino,
            handle: handle.to_text(),
            origin: text_of(origin.as_bytes()),
        })
    }

    /// Its number.
    pub(super) fn ino(&self) -> Ino {
        self.ino
    }

    pub(super) fn to_ref(&self) -> Option<DirRef> {
        Some(DirRef {
            ino: self.ino,
            anchor: Anchor::Handle(Handle::from_text(&self.handle)?),
            origin: Some(Arc::new(path_of(&self.origin)?)),
        })
    }
}

impl NodeState {
    pub(super) fn of(node: &Node, lookups: u64, stage: Option<Stage>) -> Option<NodeState> {
        let Anchor::Handle(handle) = &node.anchor else {
            return None;
        };
        let phase = match (node.kind, stage) {
            // The syncfs of `freeze` has made it durable.
            (FileType::RegularFile, Some(Stage::Unmarked(_))) => Phase::Unmarked,
            // Landed since: nobody was told, and its mark is there.
            (FileType::RegularFile, Some(_)) => Phase::Pending,
            _ => node.phase(),
        };
        Some(NodeState {
            ino: node.ino,
            handle: handle.to_text(),
            kind: node.kind.as_raw_mode(),
            phase: phase as u8,
            origin: node.origin().map(|o| text_of(o.path().as_bytes())),
            place: node.place().map(|p| (p.parent, text_of(p.name.as_bytes()))),
            lookups,
        })
    }

    pub(super) fn to_node(&self) -> Option<Node> {
        let phase = match self.phase {
            0 => Phase::Unmarked,
            1 => Phase::Pending,
            2 => Phase::Populated,
            _ => return None,
        };
        let origin = match &self.origin {
            Some(text) => Some(Origin::of(&path_of(text)?)),
            None => None,
        };
        let place = match &self.place {
            Some((parent, name)) => Some(Place {
                parent: *parent,
                name: Name::new(&bytes_of(name)?)?,
            }),
            None => None,
        };
        let anchor = Anchor::Handle(Handle::from_text(&self.handle)?);
        let kind = FileType::from_raw_mode(self.kind);
        Some(Node::new(self.ino, anchor, kind, phase, origin, place))
    }
}

fn busy(what: &str) -> Error {
    Error::Unusable(format!(
        "{what} for {} s: nothing was changed; try again",
        PATIENCE.as_secs()
    ))
}

impl Mirror {
    /// What users ask for passes here.
    pub fn requests(&self) -> &Gate {
        &self.requests
    }

    /// Runs `work` when it need not be half done: a change that cannot be asked for twice, and its
    /// answer. At once, unless another program is to take over.
    pub(super) fn acting<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Mirror>, T) + Send + 'static,
    ) -> impl FnOnce(T) + Send + 'static {
        let (mirror, again) = (Arc::clone(self), Arc::clone(self));
        move |ready| {
            let work = asker::kept(move |ready| work(&again, ready));
            mirror.requests.pass(move || work(ready));
        }
    }

    /// Why another program could not go on with this mirror.
    pub fn cannot_hand_over(&self) -> Option<&'static str> {
        let root = self.nodes.find(super::node::ROOT);
        match root.is_some_and(|root| matches!(root.anchor, Anchor::Handle(_))) {
            true => None,
            false => Some(
                "without root, or on a file system without file handles, inodes are known by name \
                 and cannot be handed over",
            ),
        }
    }

    /// Ends or holds everything that must not be half done. The background should be paused. `stop`
    /// keeps requests from being taken up, within a time, as far as the gate does not.
    pub fn freeze(&self, stop: impl FnOnce(Duration) -> bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        // Users are served meanwhile: the syncfs of a busy target takes its time.
        while !self.commit.is_idle() && Instant::now() < end {
            self.commit.hurry();
            std::thread::sleep(LOOK);
        }
        if !stop(PATIENCE) || !self.requests.close(PATIENCE) {
            return Err(busy("a request was in work"));
        }
        let frozen = self.freeze_marks();
        if frozen.is_err() {
            self.requests.open();
        }
        frozen
    }

    fn freeze_marks(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            if !self.marks.close(PATIENCE) {
                return Err(busy("marks were in work"));
            }
            let landed = |stage: &Stage| matches!(stage, Stage::Landed | Stage::Settling);
            if self.commit.is_settled() && !self.hydrations.stages().values().any(landed) {
                break;
            }
            self.marks.open();
            if Instant::now() >= end {
                return Err(busy("what was copied did not become durable"));
            }
            self.commit.hurry();
            std::thread::sleep(LOOK);
        }
        // D2: the removal of a mark must not be undone once the next program lets users write.
        let synced = fd::syncfs(self.dst.as_fd()).on("syncfs", Side::Dst, ".");
        let synced = synced.and_then(|()| self.ledger.sync(self.control.dir.as_fd()));
        if synced.is_err() {
            self.marks.open();
        }
        synced
    }

    /// Goes on after `freeze`, as if nothing had been.
    pub fn thaw(&self) {
        self.marks.open();
        self.requests.open();
    }

    /// What the next program has to know besides what is written down (kept.rs).
    pub fn bare_state(&self, background: Background) -> State {
        let jobs = self.throttle.jobs();
        State {
            src: self.control.identity.src.clone(),
            face: self.source.face(),
            nodes: Vec::new(),
            partials: Vec::new(),
            background: background as u8,
            bwlimit: self.throttle.limit(),
            lifted: self.throttle.is_lifted(),
            jobs: Some(jobs).filter(|n| *n != usize::MAX),
        }
    }

    /// After `freeze`: what the next program has to know.
    pub fn state(&self, background: Background) -> Result<State> {
        let named = || Error::Unusable(self.cannot_hand_over().unwrap_or_default().into());
        // In this order: a file is in the table of hydrations before its node's phase changes.
        let nodes = self.nodes.all();
        let stages: HashMap<Ino, Stage> = self.hydrations.stages();
        let nodes = nodes
            .iter()
            .map(|(node, lookups)| NodeState::of(node, *lookups, stages.get(&node.ino).copied()));
        let partials = self.partials.all();
        Ok(State {
            nodes: nodes.collect::<Option<_>>().ok_or_else(named)?,
            partials: partials
                .iter()
                .map(|p| p.save())
                .collect::<Option<_>>()
                .ok_or_else(named)?,
            ..self.bare_state(background)
        })
    }

    /// src's view, of which the original is told, and the lock: what stays open for the next program,
    /// besides `dst_root`.
    pub fn kept(&self) -> (Arc<View>, &OwnedFd) {
        (self.source.view(), &self.control.lock)
    }

    /// The mirror of the program before us in this process. src is not asked for anything: it may be
    /// what everybody waits for.
    pub fn resume(
        config: &MountConfig,
        (src, dst, lock): (OwnedFd, OwnedFd, OwnedFd),
        state: State,
        progress: Arc<Progress>,
        left: Option<(Arc<Board>, &mut Left)>,
    ) -> Result<Arc<Mirror>> {
        host::raise_nofile();
        let control = Control::inherited(dst.as_fd(), lock)?;
        let (path, mark) = (
            super::path_again(config, state.src),
            super::mark_name(config),
        );
        let source = Source::again(src, path, state.face, mark);
        let mirror = Mirror::assemble(config, (source, dst), control, progress)?;
        if let Some(line) = mirror.cannot_hand_over() {
            return Err(Error::Unusable(line.to_owned()));
        }
        let unreadable =
            || Error::Unusable("an inode in what was handed over makes no sense".into());
        if let Some((board, left)) = left {
            mirror.restore_left(board, left)?;
        }
        for saved in &state.nodes {
            let node = saved.to_node().ok_or_else(unreadable)?;
            mirror.nodes.restore(node, saved.lookups);
        }
        for saved in state.partials {
            let partial = Partial::of(saved).ok_or_else(unreadable)?;
            mirror.restore_partial(partial)?;
        }
        mirror.throttle.set_limit(state.bwlimit);
        if state.lifted {
            mirror.throttle.toggle_limit();
        }
        mirror.throttle.set_jobs(state.jobs);
        mirror.throttle.set_background(match state.background {
            0 => Background::Running,
            1 => Background::Paused,
            _ => Background::Off,
        });
        mirror.start_threads()?;
        Ok(mirror)
    }

    /// Only where dst says so too: a directory that is populated is the users'.
    pub(super) fn restore_partial(&self, partial: Partial) -> Result<()> {
        let dir = partial.dir();
        let opened = match self.open_dir(&dir) {
            Err(e) if [Errno::STALE, Errno::NOENT].contains(&e.errno()) => return Ok(()),
            opened => opened?,
        };
        match self.is_pending(opened.as_fd())? {
            true => self.partials.restore(partial),
            false => self.note_phase(&dir, Phase::Populated),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

    use super::*;
    use crate::gate;

    #[test]
    fn any_bytes_survive_as_text() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(bytes_of(&text_of(&all)), Some(all));
        assert_eq!(bytes_of("\u{20ac}"), None);
    }

    #[test]
    fn a_node_survives_with_its_place_and_origin() {
        let handle = Handle::from_text("1.00ff10").expect("a handle");
        let name = |text: &[u8]| Name::new(text).expect("a name");
        let node = Node::new(
            7,
            Anchor::Handle(handle),
            FileType::RegularFile,
            Phase::Pending,
            Some(Origin::of(
                &RelPath::root().join(&name(b"a\xff")).join(&name(b"b")),
            )),
            Some(Place {
                parent: 5,
                name: name(b"new\n"),
            }),
        );
        let told = |stage| {
            let saved = NodeState::of(&node, 3, stage).expect("by handle");
            let text = serde_json::to_string(&saved).expect("JSON");
            let back: NodeState = serde_json::from_str(&text).expect("JSON");
            assert_eq!(back.lookups, 3);
            back.to_node().expect("a node")
        };
        let back = told(None);
        assert_eq!(
            (back.ino, back.kind, back.phase()),
            (7, node.kind, Phase::Pending)
        );
        assert!(back.anchor.same_inode(&node.anchor));
        let path = |node: &Node| node.origin().expect("an origin").path();
        assert_eq!(path(&back), path(&node));
        assert_eq!(back.place().expect("a place").name, name(b"new\n"));
        node.set_phase(Phase::Unmarked);
        assert_eq!(told(None).phase(), Phase::Unmarked);
        assert_eq!(told(Some(Stage::Landed)).phase(), Phase::Pending);
        assert_eq!(told(Some(Stage::Unmarked(1))).phase(), Phase::Unmarked);
    }

    // The gate's own file is tests/loom.rs' too, and has no tests in it.

    #[test]
    fn who_closes_waits_for_who_is_inside_and_holds_who_comes() {
        let gate = Gate::new(gate::Place::Requests);
        let inside = gate.enter();
        let again = gate.enter();
        assert!(!gate.close(Duration::from_millis(5)), "we are inside");
        drop(again);
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(Duration::from_secs(10)));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!closing.is_finished());
            drop(gate.enter()); // Inside already: it does not wait.
            drop(inside);
            assert!(closing.join().expect("no panic"));
            let late = scope.spawn(|| drop(gate.enter()));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!late.is_finished());
            gate.open();
            late.join().expect("no panic");
        });
    }

    #[test]
    fn what_passes_a_closed_gate_is_done_when_it_opens_once() {
        let gate = Gate::new(gate::Place::Marks);
        let count = Arc::new(AtomicUsize::new(0));
        let add = || {
            let count = Arc::clone(&count);
            move || {
                count.fetch_add(1, SeqCst);
            }
        };
        gate.pass(add());
        assert!(gate.close(Duration::ZERO));
        gate.pass(add());
        assert_eq!(count.load(SeqCst), 1);
        gate.open();
        gate.pass(add());
        assert_eq!(count.load(SeqCst), 3);
    }

    #[test]
    fn nobody_is_inside_while_it_is_closed_however_many_come() {
        let (gate, busy) = (Gate::new(gate::Place::Requests), AtomicUsize::new(0));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !done.load(SeqCst) {
                        let _inside = gate.enter();
                        busy.fetch_add(1, SeqCst);
                        std::hint::spin_loop();
                        busy.fetch_sub(1, SeqCst);
                    }
                });
            }
            for _ in 0..500 {
                assert!(gate.close(Duration::from_secs(10)));
                assert_eq!(busy.load(SeqCst), 0);
                gate.open();
            }
            done.store(true, SeqCst);
        });
    }
}
