//! Slab: values under numbers that the kernel carries to and fro (user_data). Pure.
//!
//!   insert()   the value gets a key: its place, and how often the place was used before
//!   remove()   the value back, once; a key of long ago, or of nobody, finds nothing
//!
//! A value stays at its key until it is removed. Its place in memory may change: what the kernel
//! points to is heap memory that the value owns (`lent.rs`).

/// Values by key.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Place<T> {
    /// Counts the values that were here before; it may wrap after 2^32 of them.
    turn: u32,
    value: Option<T>,
}

impl<T> Slab<T> {
    /// An empty one with room for `len` values; it grows when there are more.
    pub(super) fn with_capacity(len: usize) -> Slab<T> {
        Slab {
            places: Vec::with_capacity(len),
            free: Vec::with_capacity(len),
        }
    }

    /// Puts a value in; its key is never `u64::MAX`.
    pub(super) fn insert(&mut self, value: T) -> u64 {
        let index = match self.free.pop() {
            Some(index) => {
                self.places[index as usize].value = Some(value);
                index
            }
            None => {
                self.places.push(Place {
                    turn: 0,
                    value: Some(value),
                });
                (self.places.len() - 1) as u32 // Memory ends long before 2^32 values.
            }
        };
        key(self.places[index as usize].turn, index)
    }

    /// Takes the value out.
    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let (turn, index) = ((key >> 32) as u32, key as u32); // By `key`.
        let place = self.places.get_mut(index as usize)?;
        if place.turn != turn {
            return None;
        }
        let value = place.value.take()?;
        place.turn = turn.wrapping_add(1);
        self.free.push(index);
        Some(value)
    }

    /// How many values there are.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// True without any value.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every value with its key.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(i, p)| Some((key(p.turn, i as u32), p.value.as_ref()?))) // By `insert`.
    }

    /// Forgets every value without dropping it: its memory stays as long as the process.
    pub(super) fn leak(&mut self) {
        for place in &mut self.places {
            std::mem::forget(place.value.take());
        }
        self.places.clear();
        self.free.clear();
    }
}

fn key(turn: u32, index: u32) -> u64 {
    u64::from(turn) << 32 | u64::from(index)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_finds_its_value_once() {
        let mut slab = Slab::with_capacity(2);
        let (a, b) = (slab.insert("a"), slab.insert("b"));
        assert_eq!(slab.remove(a), Some("a"));
        assert_eq!(slab.remove(a), None, "given back already");
        let c = slab.insert("c");
        assert_ne!(a, c, "the same place, another turn");
        assert_eq!(slab.remove(a), None, "a late completion finds nobody");
        assert_eq!((slab.remove(b), slab.remove(c)), (Some("b"), Some("c")));
        assert_eq!(slab.remove(u64::MAX), None);
        assert!(slab.is_empty());
    }

    #[test]
    fn what_is_leaked_is_not_dropped() {
        let value = Rc::new(());
        let mut slab = Slab::with_capacity(1);
        slab.insert(Rc::clone(&value));
        slab.leak();
        assert!(slab.is_empty());
        drop(slab);
        assert_eq!(Rc::strong_count(&value), 2);
        // SAFETY: the slab has forgotten its reference: this takes back the count that it left.
        unsafe { Rc::decrement_strong_count(Rc::as_ptr(&value)) };
        assert_eq!(Rc::strong_count(&value), 1);
    }

    proptest! {
        #[test]
        fn any_order_of_insertions_and_removals(steps in prop::collection::vec((any::<bool>(), any::<usize>()), 0..200)) {
            let (mut slab, mut model, mut gone) = (Slab::with_capacity(0), HashMap::new(), Vec::new());
            for (i, (add, pick)) in steps.into_iter().enumerate() {
                if add || model.is_empty() {
                    let key = slab.insert(Box::new(i));
                    prop_assert!(model.insert(key, i).is_none());
                } else {
                    let mut keys: Vec<u64> = model.keys().copied().collect();
                    keys.sort_unstable();
                    let key = keys[pick % keys.len()];
                    prop_assert_eq!(slab.remove(key).map(|b| *b), model.remove(&key));
                    gone.push(key);
                }
                prop_assert_eq!(slab.len(), model.len());
                prop_assert!(gone.iter().all(|key| slab.remove(*key).is_none()));
                prop_assert!(slab.iter().all(|(key, value)| model.get(&key) == Some(&**value)));
            }
        }
    }
}
