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
            inserts in prop::collection::vec((0u64..64, 0u64..64), 0..20),
            (a, b) in (0u64..64, 0u64..64),
        ) {
            let mut set = RangeSet::new();
            let mut bits = [false; 64];
            for (x, y) in inserts {
                set.insert(x..y);
                (x..y).for_each(|i| bits[i as usize] = true);
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
