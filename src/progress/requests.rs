//! Requests: how many of each kind the kernel has sent.

use super::Counter;

/// The protocol's numbers are below this; what is not is counted as 0.
const KINDS: usize = 64;

/// A counter for each kind of request, by its number in the protocol.
#[derive(Debug)]
pub struct Requests([Counter; KINDS]);

impl Default for Requests {
    fn default() -> Requests {
        Requests(std::array::from_fn(|_| Counter::default()))
    }
}

impl Requests {
    /// One more of this kind.
    pub fn count(&self, kind: u32) {
        let at = usize::try_from(kind).unwrap_or(0);
        self.0.get(at).unwrap_or(&self.0[0]).add(1);
    }

    /// The kinds that came, and how often.
    pub fn all(&self) -> impl Iterator<Item = (u32, u64)> {
        let counted = (0..).zip(&self.0).map(|(kind, n)| (kind, n.get()));
        counted.filter(|(_, n)| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_number_of_its_own_is_counted_too() {
        let requests = Requests::default();
        for kind in [1, 3, 3, 4096, u32::MAX] {
            requests.count(kind);
        }
        let all: Vec<_> = requests.all().collect();
        assert_eq!(all, [(0, 2), (1, 1), (3, 2)]);
    }
}
