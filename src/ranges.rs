//! RangeSet: which bytes of a file are present. Pure.
//!
//! Sorted, disjoint, never touching half-open ranges: what touches is merged.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of byte offsets, kept as ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// start -> end
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> RangeSet {
        RangeSet::default()
    }

    /// Adds every byte of `range`; an empty range adds nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.ranges.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.ranges.range(start..=end).next() {
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
    }

    /// True when every byte of `range` is present. An empty range is always present.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        range.start >= range.end
            || self
                .ranges
                .range(..=range.start)
                .next_back()
                .is_some_and(|(_, &e)| e >= range.end)
    }

    /// The first part of `range` that is not present.
    pub fn first_gap(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let mut at = range.start;
        if let Some((_, &e)) = self.ranges.range(..=at).next_back() {
            at = at.max(e);
        }
        if at >= range.end {
            return None;
        }
        let end = self
            .ranges
            .range(at..)
            .next()
            .map_or(range.end, |(&s, _)| s.min(range.end));
        Some(at..end)
    }

    /// Takes every byte of `range` out.
    pub fn remove(&mut self, range: &Range<u64>) {
        if range.start >= range.end {
            return;
        }
        while let Some(part) = self.next(range.start).filter(|p| p.start < range.end) {
            let (&start, &end) = match self.ranges.range(..=part.start).next_back() {
                Some(whole) => whole,
                None => return,
            };
            self.ranges.remove(&start);
            if start < range.start {
                self.ranges.insert(start, range.start);
            }
            if range.end < end {
                self.ranges.insert(range.end, end);
            }
        }
    }

    /// The first range that ends after `from`, without what is before it.
    pub fn next(&self, from: u64) -> Option<Range<u64>> {
        let around = self.ranges.range(..=from).next_back();
        match around.filter(|(_, e)| **e > from) {
            Some((_, &end)) => Some(from..end),
            None => self.ranges.range(from..).next().map(|(&s, &e)| s..e),
        }
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// How many bytes are present.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(s, e)| e - s).sum()
    }

    /// True when nothing is present.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_bitmap(
            inserts in prop::collection::vec((0u64..64, 0u64..64, prop::bool::weighted(0.2)), 0..20),
            (a, b) in (0u64..64, 0u64..64),
        ) {
            let mut set = RangeSet::new();
            let mut bits = [false; 64];
            for (x, y, out) in inserts {
                match out {
                    true => set.remove(&(x..y)),
                    false => set.insert(x..y),
                }
                (x..y).for_each(|i| bits[i as usize] = !out);
            }
            let all: Vec<u64> = set.iter().flatten().collect();
            prop_assert_eq!(all, (0..64).filter(|i| bits[*i as usize]).collect::<Vec<u64>>());
            let next = (a..64).find(|i| bits[*i as usize]);
            prop_assert_eq!(set.next(a).map(|r| r.start), next);
            if let Some(next) = set.next(a) {
                prop_assert!(next.clone().all(|i| bits[i as usize]));
                prop_assert!(next.end == 64 || !bits[next.end as usize]);
            }
            prop_assert_eq!(set.len(), bits.iter().filter(|b| **b).count() as u64);
            prop_assert_eq!(set.contains(&(a..b)), (a..b).all(|i| bits[i as usize]));
            let gap = (a..b).find(|i| !bits[*i as usize]);
            prop_assert_eq!(set.first_gap(&(a..b)).map(|r| r.start), gap);
            if let Some(gap) = set.first_gap(&(a..b)) {
                prop_assert!(gap.clone().all(|i| !bits[i as usize]));
                prop_assert!(gap.end == b || bits[gap.end as usize]);
            }
            let touching = set.ranges.iter().zip(set.ranges.iter().skip(1)).any(|(x, y)| x.1 >= y.0);
            prop_assert!(!touching);
        }
    }
}
