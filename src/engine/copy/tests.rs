//! The plan against a world of random events: short transfers, EINTR, a src that changes.

use proptest::prelude::*;

use super::*;
use crate::ranges::RangeSet;
use crate::sys::stat::{FileKey, Time};

const BLOCK: u64 = 8;

fn limits() -> Limits {
    Limits {
        small_bytes: 16,
        chunk_bytes: 16,
        chunks_max: 3,
        offload_bytes: 24,
    }
}

/// Two files, a kernel that answers as `choices` say, and what the owner was told.
#[derive(Debug)]
struct World {
    src: Vec<u8>,
    version: i64,
    changes_left: u32,
    dst: Vec<u8>,
    offer: Offer,
    can_punch: bool,
    choices: Vec<u8>,
    at: usize,
    buffers: Vec<Option<Vec<u8>>>,
    opened: bool,
    written: u64,
    landed: RangeSet,
    told: Vec<(u64, Vec<u8>)>,
    telling: bool,
}

impl World {
    /// The next random number; zeros, which mean "all is well", at the end.
    fn choice(&mut self) -> u8 {
        self.at += 1;
        self.choices.get(self.at - 1).copied().unwrap_or(0)
    }

    fn stat(&self) -> Stat {
        let time = Time {
            sec: self.version,
            nsec: 0,
        };
        let data = self
            .src
            .chunks(BLOCK as usize)
            .filter(|b| b.iter().any(|x| *x != 0))
            .count();
        // Dense only when no block is a hole; units of 512 bytes are enough to say so.
        let dense = data as u64 == (self.src.len() as u64).div_ceil(BLOCK);
        Stat {
            key: FileKey {
                dev: (0, 1),
                ino: 1,
            },
            mnt_id: 0,
            mode: libc::S_IFREG | 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            size: self.src.len() as u64,
            blocks: if dense { 8 } else { 0 },
            blksize: 4096,
            rdev: (0, 0),
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            immutable: false,
            append: false,
            mount_root: false,
        }
    }

    fn next_data(&self, from: u64, end: u64) -> Option<Range<u64>> {
        let is_data = |at: &u64| {
            let start = (at / BLOCK * BLOCK) as usize;
            let stop = (start + BLOCK as usize).min(self.src.len());
            self.src
                .get(start..stop)
                .is_some_and(|b| b.iter().any(|x| *x != 0))
        };
        let start = (from..end).find(is_data)?;
        Some(start..(start..end).find(|at| !is_data(at)).unwrap_or(end))
    }

    fn change_src(&mut self) {
        if self.changes_left == 0 {
            return;
        }
        self.changes_left -= 1;
        self.version += 1;
        match self.choice() % 4 {
            0 => self.src.truncate(self.src.len() / 2),
            1 => self.src.extend([7; 20]),
            2 => self.src.iter_mut().take(24).for_each(|b| *b = 0),
            _ => self.src.iter_mut().for_each(|b| *b ^= 1),
        }
    }

    fn answer(&mut self, action: Action) -> Event {
        let choice = self.choice();
        match choice {
            250.. => return Event::Failed(action, Errno::INTR),
            248..250 => return Event::Failed(action, Errno::AGAIN),
            240..248 => self.change_src(),
            _ => {}
        }
        let short = |len: usize| {
            if choice % 4 == 3 {
                len.div_ceil(2)
            } else {
                len
            }
        };
        match action {
            Action::Open { noatime: true } if choice % 4 == 2 => Event::Failed(action, Errno::PERM),
            Action::Open { .. } => {
                self.opened = true;
                Event::Opened
            }
            Action::StatSrc { .. } => Event::SrcStat(self.stat()),
            Action::StatDst => {
                let size = self.dst.len() as u64;
                Event::DstStat {
                    size,
                    used: self.dst.iter().any(|b| *b != 0),
                    device: (0, 2),
                    offer: self.offer,
                }
            }
            Action::Clone if choice % 4 == 1 => Event::Failed(action, Errno::IO),
            Action::Clone if choice % 4 == 2 => Event::Cloned(false),
            Action::Clone => {
                let src = self.src.clone();
                self.write(0, &src);
                Event::Cloned(true)
            }
            Action::SeekData { from, end } => Event::Extent(self.next_data(from, end)),
            Action::Preallocate { .. } => Event::Preallocated,
            Action::Punch(range) => {
                if self.can_punch {
                    for at in range {
                        if let Some(b) = self.dst.get_mut(at as usize) {
                            *b = 0;
                        }
                    }
                }
                Event::Punched(self.can_punch)
            }
            Action::CopyRange { offset, len } => {
                if choice % 8 == 5 {
                    return Event::Failed(action, Errno::XDEV);
                }
                let bytes = self.read_src(offset, short(len as usize));
                self.write(offset, &bytes);
                Event::CopiedRange(bytes.len() as u64)
            }
            Action::Read(p) => {
                let bytes = self.read_src(p.offset, short(p.len));
                let buffer = self.buffers[p.chunk].get_or_insert_default();
                assert_eq!(buffer.len(), p.at, "a chunk is filled in order");
                buffer.extend(&bytes);
                Event::Read {
                    chunk: p.chunk,
                    len: bytes.len(),
                }
            }
            Action::Write(p) => {
                let buffer = self.buffers[p.chunk]
                    .clone()
                    .expect("read before it is written");
                let len = short(p.len);
                self.write(p.offset, &buffer[p.at..p.at + len]);
                Event::Written {
                    chunk: p.chunk,
                    len,
                }
            }
            Action::Truncate { size } => {
                self.dst.resize(size as usize, 0);
                Event::Truncated
            }
            Action::Sync => Event::Synced,
            other => panic!("{other:?} has no answer"),
        }
    }

    fn read_src(&self, offset: u64, len: usize) -> Vec<u8> {
        let start = (offset as usize).min(self.src.len());
        self.src[start..(start + len).min(self.src.len())].to_vec()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset as usize + bytes.len();
        if self.dst.len() < end {
            self.dst.resize(end, 0);
        }
        self.dst[offset as usize..end].copy_from_slice(bytes);
        self.written += bytes.len() as u64;
    }

    /// Runs a plan to its end, completing what is in flight in random order.
    fn run(&mut self, span: Span, durability: Durability) -> Result<Done, Failure> {
        let mut plan = CopyPlan::new(span.clone(), durability, limits()).telling(self.telling);
        let (mut out, mut flying, mut outcome) = (Vec::new(), Vec::new(), None);
        let mut synced = false;
        plan.step(Event::Start, &mut out);
        for _ in 0..100_000 {
            for action in out.drain(..) {
                assert!(outcome.is_none(), "{action:?} after the end");
                match action {
                    Action::Finish(o) => {
                        assert!(flying.is_empty(), "ended with {flying:?} in flight");
                        outcome = Some(o);
                    }
                    Action::Landed(r) => self.landed.insert(r),
                    Action::Again => {
                        assert!(self.telling || span != Span::Whole);
                        self.told.clear();
                    }
                    Action::Zeros(r) | Action::Hole(r) => {
                        self.told
                            .push((r.start, vec![0; (r.end - r.start) as usize]));
                    }
                    Action::Data { chunk, offset, len } => {
                        assert!(self.telling || span != Span::Whole);
                        let bytes = self.buffers[chunk].as_ref().expect("a buffer")[..len].to_vec();
                        self.told.push((offset, bytes));
                    }
                    Action::Free { chunk } => {
                        let busy = |a: &Action| matches!(a, Action::Read(p) | Action::Write(p) if p.chunk == chunk);
                        assert!(!flying.iter().any(busy), "freed under the kernel's hands");
                        self.buffers[chunk] = None;
                    }
                    other => {
                        assert!(self.opened || matches!(other, Action::Open { .. }));
                        synced |= other == Action::Sync;
                        flying.push(other);
                    }
                }
            }
            if let Some(outcome) = outcome {
                assert!(
                    self.buffers.iter().all(Option::is_none),
                    "a buffer was lost"
                );
                assert!(outcome.is_err() || synced == (durability == Durability::Now));
                return outcome;
            }
            assert!(!flying.is_empty(), "nothing in flight and not at the end");
            let action = flying.swap_remove(usize::from(self.choice()) % flying.len());
            let event = self.answer(action);
            plan.step(event, &mut out);
        }
        panic!("the plan does not end");
    }
}

fn src_bytes() -> impl Strategy<Value = Vec<u8>> {
    // Blocks of data or hole, and a tail that ends anywhere.
    (prop::collection::vec(any::<bool>(), 0..24), 0usize..8).prop_map(|(blocks, cut)| {
        let mut bytes: Vec<u8> = (1..)
            .zip(blocks)
            .flat_map(|(i, data)| [if data { i as u8 } else { 0 }; BLOCK as usize])
            .collect();
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
}

prop_compose! {
    fn world()(
        src in src_bytes(),
        // Empty, or what an earlier try has left.
        dst in prop_oneof![Just(Vec::new()), prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..250)],
        clone in any::<bool>(),
        offload in any::<bool>(),
        can_punch in any::<bool>(),
        changes_left in 0u32..4,
        choices in prop::collection::vec(any::<u8>(), 0..300),
    ) -> World {
        World {
            src, version: 1, changes_left, dst,
            offer: Offer { clone, offload }, can_punch, choices, at: 0,
            buffers: vec![None; 3], opened: false, written: 0,
            landed: RangeSet::new(), told: Vec::new(), telling: false,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_whole_copy_that_says_ok_is_the_src_that_it_reports(mut w in world(), now in any::<bool>()) {
        let durability = if now { Durability::Now } else { Durability::Later };
        match w.run(Span::Whole, durability) {
            Ok(done) => {
                // A change after the last look is the next copy's business.
                if done.src.mtime.sec == w.version {
                    prop_assert_eq!(&w.dst, &w.src);
                }
                prop_assert_eq!(w.dst.len() as u64, done.src.size);
                prop_assert!(w.landed.contains(&(0..done.src.size)));
                prop_assert!(done.bytes <= w.written);
            }
            Err(failure) => {
                prop_assert_eq!(failure, Failure::SrcChanged);
                prop_assert!(w.version > 2, "changed once is copied again");
            }
        }
    }

    #[test]
    fn what_is_told_of_a_whole_file_is_all_of_it_once_or_not_all(mut w in world()) {
        w.telling = true;
        let Ok(done) = w.run(Span::Whole, Durability::Later) else {
            return Ok(());
        };
        if done.src.mtime.sec != w.version {
            return Ok(()); // It has changed again since, and nobody says to what.
        }
        w.told.sort();
        let mut all: Vec<u8> = Vec::new();
        for (offset, bytes) in &w.told {
            if *offset > all.len() as u64 {
                // Shared, or copied by a server.
                prop_assert!(w.offer.clone || w.offer.offload);
                return Ok(());
            }
            prop_assert_eq!(*offset, all.len() as u64, "told twice");
            all.extend(bytes);
        }
        if all.len() as u64 == done.src.size {
            prop_assert_eq!(&all, &w.src);
        } else {
            prop_assert!(w.offer.clone || w.offer.offload);
        }
    }

    #[test]
    fn a_range_copy_tells_its_reader_every_byte_and_keeps_the_size(
        mut w in world(), start in 0u64..220, len in 0u64..220,
    ) {
        w.changes_left = 0;
        w.dst.resize(300, 0);
        let before = w.dst.clone();
        let done = w.run(Span::Range(start..start + len), Durability::Later).expect("no failure");
        let size = w.src.len() as u64;
        let part = start.min(size)..(start + len).min(size);
        prop_assert_eq!(w.dst.len(), 300);
        prop_assert!(w.landed.contains(&part) && done.bytes <= len);
        let mut seen = RangeSet::new();
        for (offset, bytes) in &w.told {
            let end = offset + bytes.len() as u64;
            prop_assert_eq!(bytes, &w.src[*offset as usize..end as usize]);
            seen.insert(*offset..end);
        }
        prop_assert!(seen.contains(&part));
        for at in 0..300 {
            let inside = part.contains(&at);
            let want = if inside { &w.src } else { &before }[at as usize];
            prop_assert_eq!(w.dst[at as usize], want);
        }
    }

    #[test]
    fn after_any_failure_everything_comes_back_before_the_end(
        mut w in world(), nth in 0usize..40, errno in prop_oneof![Just(Errno::NOSPC), Just(Errno::IO)],
    ) {
        w.changes_left = 0;
        let mut plan = CopyPlan::new(Span::Whole, Durability::Now, limits());
        let (mut out, mut flying, mut ended) = (vec![], vec![], 0);
        plan.step(Event::Start, &mut out);
        for step in 0..10_000 {
            for action in out.drain(..) {
                match action {
                    Action::Finish(_) => {
                        prop_assert!(flying.is_empty());
                        ended += 1;
                    }
                    Action::Free { chunk } => w.buffers[chunk] = None,
                    Action::Landed(_) | Action::Data { .. } | Action::Zeros(_) => {}
                    other => flying.push(other),
                }
            }
            if ended > 0 {
                break;
            }
            let action = flying.swap_remove(usize::from(w.choice()) % flying.len());
            let event = match step == nth {
                true => Event::Failed(action, errno),
                false => w.answer(action),
            };
            plan.step(event, &mut out);
        }
        prop_assert_eq!(ended, 1);
        prop_assert!(w.buffers.iter().all(Option::is_none));
    }
}

#[test]
fn a_call_that_is_interrupted_for_ever_is_an_error_at_last() {
    let mut plan = CopyPlan::new(Span::Whole, Durability::Later, limits());
    let mut out = Vec::new();
    plan.step(Event::Start, &mut out);
    for _ in 0..1000 {
        let action = out.pop().expect("an action");
        if let Action::Finish(outcome) = action {
            let errno = Errno::INTR;
            assert_eq!(
                outcome,
                Err(Failure::Call {
                    call: "openat2",
                    side: Side::Src,
                    errno
                })
            );
            return;
        }
        plan.step(Event::Failed(action, Errno::INTR), &mut out);
    }
    panic!("no end");
}
