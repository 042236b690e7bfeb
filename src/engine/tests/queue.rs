//! The queue's promises, on real threads; `tests/loom.rs` has them in every order.

use std::sync::Arc;
use std::time::Duration;

use super::super::job::Priority::{Ahead, Background, Demand};
use super::super::queue::Queue;

#[test]
fn demand_overtakes_everything_in_the_background() {
    let q = Queue::new(8);
    q.push(1, Background, true).expect("open");
    q.push(2, Background, true).expect("open");
    q.push(3, Demand, true).expect("open");
    assert_eq!(q.pop(Some(Background)), Some(3));
    assert_eq!(q.pop(Some(Demand)), None);
    assert_eq!(q.pop(Some(Background)), Some(1));
    assert_eq!(q.pop(Some(Background)), Some(2));
    assert!(!q.has(Some(Background)));
}

#[test]
fn what_is_ahead_comes_after_demand_and_before_the_background_and_never_waits() {
    let q = Queue::new(1);
    q.push(1, Background, true).expect("open");
    for n in 2..9 {
        q.push(n, Ahead, true)
            .expect("no limit but the window of each");
    }
    q.push(9, Demand, true).expect("open");
    assert!(!q.has(None) && q.pop(None).is_none());
    assert_eq!(q.pop(Some(Demand)), Some(9));
    assert_eq!(q.pop(Some(Demand)), None);
    assert_eq!(q.pop(Some(Background)), Some(2));
    let ahead: Vec<i32> = std::iter::from_fn(|| q.pop(Some(Ahead))).collect();
    assert_eq!(ahead, [3, 4, 5, 6, 7, 8]);
    q.push(10, Ahead, true).expect("open");
    assert_eq!(q.close(), [10, 1], "nobody waits for those");
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
    let mut all: Vec<i32> = std::iter::from_fn(|| q.pop(Some(Background))).collect();
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
    assert_eq!(q.pop(Some(Background)), Some(2), "somebody waits for it");
}
