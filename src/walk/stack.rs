//! Stack: the steps that are to be taken. The newest first, which makes the walk depth-first; before it
//! whatever leads to the directories that users work in.

use std::collections::{BTreeMap, HashMap};

use crate::mirror::Ino;

/// Steps by the directory that they are in, and by age.
pub(super) struct Stack<T> {
    next: u64,
    steps: BTreeMap<u64, (Ino, T)>,
    of_dir: HashMap<Ino, Vec<u64>>,
}

impl<T> Default for Stack<T> {
    fn default() -> Stack<T> {
        Stack {
            next: 0,
            steps: BTreeMap::new(),
            of_dir: HashMap::new(),
        }
    }
}

impl<T> Stack<T> {
    pub(super) fn push(&mut self, dir: Ino, step: T) {
        self.next += 1;
        self.steps.insert(self.next, (dir, step));
        self.of_dir.entry(dir).or_default().push(self.next);
    }

    /// The next step: in the first of the `used` directories that has one, else the newest.
    pub(super) fn pop(&mut self, used: &[Ino]) -> Option<T> {
        let of_dir = &self.of_dir;
        let wanted = used.iter().find_map(|dir| of_dir.get(dir)?.last().copied());
        let key = wanted.or_else(|| self.steps.last_key_value().map(|(key, _)| *key))?;
        let (dir, step) = self.steps.remove(&key)?;
        if let Some(keys) = self.of_dir.get_mut(&dir) {
            keys.retain(|k| *k != key);
            if keys.is_empty() {
                self.of_dir.remove(&dir);
            }
        }
        Some(step)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.steps.clear();
        self.of_dir.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_comes_first_unless_a_user_is_elsewhere_and_each_comes_once() {
        let mut stack = Stack::default();
        for (dir, step) in [(1, "a"), (2, "b"), (3, "c"), (2, "d"), (4, "e")] {
            stack.push(dir, step);
        }
        assert_eq!(stack.pop(&[9]), Some("e"), "nobody is in what is left");
        assert_eq!(stack.pop(&[9, 2, 1]), Some("d"));
        assert_eq!(stack.pop(&[9, 2, 1]), Some("b"));
        assert_eq!(stack.pop(&[9, 2, 1]), Some("a"));
        assert_eq!(stack.pop(&[9, 2, 1]), Some("c"));
        assert!(stack.is_empty() && stack.of_dir.is_empty());
        assert_eq!(stack.pop(&[2]), None);
    }
}
