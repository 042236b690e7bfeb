//! The queue's promises, on real threads; `tests/loom.rs` has them in every order.

use std::sync::Arc;
use std::time::Duration;

use super::super::job::Priority::{Background, Demand};
use super::super::queue::Queue;

#[test]
fn demand_overtakes_everything_in_the_background() {
    let q = Queue::new(8);
    q.push(1, Background, true).expect("open");
    q.push(2, Background, true).expect("open");
    q.push(3, Demand, true).expect("open");
    assert_eq!(q.pop(true, true), Some(3));
    assert_eq!(q.pop(true, false), None);
    assert_eq!(q.pop(true, true), Some(1));
    assert_eq!(q.pop(true, true), Some(2));
    assert!(!q.has(true, true));
}

#[test]
fn a_full_background_lane_makes_its_callers_wait_and_nobody_else() {
    let q = Arc::new(Queue::new(1));
    q.push(1, Background, true).expect("open");
    q.push(2, Demand, true).expect("demand never waits");
    q.push(3, Background, false).expect("a worker never waits");
    let waiter = std::thread::spawn({
        let q = Arc::clone(&q);
        move || q.push(4, Background, true)
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!waiter.is_finished());
    // The waiter is woken on the way, so its item may be among those that are popped here.
    let mut all: Vec<i32> = std::iter::from_fn(|| q.pop(true, true)).collect();
    assert!(waiter.join().expect("no panic").is_ok());
    all.extend(q.drain());
    assert_eq!(all, [2, 1, 3, 4]);
}

#[test]
fn closing_wakes_who_waits_and_gives_every_item_back() {
    let q = Arc::new(Queue::new(1));
    q.push(1, Background, true).expect("open");
    q.push(2, Demand, true).expect("open");
    let waiter = std::thread::spawn({
        let q = Arc::clone(&q);
        move || q.push(3, Background, true)
    });
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(q.close(), vec![1]);
    assert_eq!(waiter.join().expect("no panic"), Err(3));
    assert_eq!(q.push(4, Demand, true), Err(4));
    assert_eq!(q.pop(true, true), Some(2), "somebody waits for it");
}
