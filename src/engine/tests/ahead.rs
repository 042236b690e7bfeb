//! What is read ahead of somebody: no throttle holds it, and it costs the background nothing.

use super::*;
use crate::throttle::Background;

const LEN: usize = 3 << 20;

fn bench() -> Bench {
    let b = Bench::new(&config(), usize::MAX);
    std::fs::write(b.src("f"), noise(LEN, 1)).expect("write");
    b
}

const RANGE: Span = Span::Range(0..LEN as u64);

#[test]
fn neither_a_pause_nor_a_limit_holds_what_is_read_ahead() {
    let b = bench();
    let throttle = &b.engine.shared.throttle;
    throttle.set_background(Background::Paused);
    let (job, background) = b.job("f", RANGE, Priority::Background);
    b.engine.submit(job).expect("submitted");
    let heard = b.run("f", RANGE, Priority::Ahead);
    assert_eq!(heard.data.iter().map(|(_, d)| d.len()).sum::<usize>(), LEN);
    ok(heard);
    assert!(background.try_recv().is_err(), "that is held");
    throttle.set_background(Background::Running);
    b.engine.terms_changed();
    ok(wait(&background));
    // In debt for an hour.
    throttle.set_limit(Some(1 << 20));
    throttle.spend(1 << 32);
    assert!(!throttle.is_open());
    ok(b.run("f", RANGE, Priority::Ahead));
}

#[test]
fn what_is_read_ahead_is_not_counted_by_the_limit_and_not_cancelled_with_the_background() {
    let b = bench();
    let throttle = &b.engine.shared.throttle;
    throttle.set_limit(Some(1024));
    ok(b.run("f", RANGE, Priority::Ahead));
    assert!(throttle.is_open());
    let (job, heard) = b.job("f", RANGE, Priority::Ahead);
    b.engine.submit(job).expect("submitted");
    b.engine.cancel_background();
    ok(wait(&heard));
}
