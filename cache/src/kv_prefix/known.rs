//! Which blocks a tier was given or had lately, so that one that is published again is not written again.

use std::collections::{HashMap, VecDeque};

use tokio::time::Instant;

use super::BlockName;

/// A bounded set of names; the oldest go first.
#[derive(Debug)]
pub(super) struct Known {
    entries: HashMap<BlockName, Entry>,
    /// Names as they came, each with its number; one whose entry has another number was taken in again or let go since.
    order: VecDeque<(BlockName, u64)>,
    num_added: u64,
    max_len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    number: u64,
    /// Absent while it waits to be written.
    until: Option<Instant>,
}

impl Known {
    pub fn new(max_len: usize) -> Self {
        Self { entries: HashMap::new(), order: VecDeque::new(), num_added: 0, max_len }
    }

    pub fn contains(&self, name: &BlockName, now: Instant) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.until.is_none_or(|until| now < until))
    }

    /// Takes `name` in until then, or while it waits to be written.
    pub fn add(&mut self, name: BlockName, until: Option<Instant>) {
        self.num_added += 1;
        self.entries.insert(name, Entry { number: self.num_added, until });
        self.order.push_back((name, self.num_added));
        while self.order.len() > self.max_len {
            let Some((oldest, number)) = self.order.pop_front() else { return };
            if self.entries.get(&oldest).is_some_and(|entry| entry.number == number) {
                self.entries.remove(&oldest);
            }
        }
    }

    pub fn remove(&mut self, name: &BlockName) {
        self.entries.remove(name);
    }

    /// Lets `name` go, unless it waits to be written.
    pub fn remove_written(&mut self, name: &BlockName) {
        if self.entries.get(name).is_some_and(|entry| entry.until.is_some()) {
            self.entries.remove(name);
        }
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn name(number: u8) -> BlockName {
        [number; 32]
    }

    #[test]
    fn names_are_known_for_their_time() {
        let (mut known, now) = (Known::new(10), Instant::now());
        known.add(name(1), Some(now + Duration::from_secs(1)));
        known.add(name(2), None);
        assert!(known.contains(&name(1), now) && !known.contains(&name(1), now + Duration::from_secs(1)));
        assert!(known.contains(&name(2), now + Duration::from_secs(1000)), "it waits");
        known.remove_written(&name(2));
        assert!(known.contains(&name(2), now));
        known.remove(&name(2));
        assert!(!known.contains(&name(2), now) && !known.contains(&name(3), now));
        known.clear();
        assert!(!known.contains(&name(1), now));
    }

    #[test]
    fn the_set_is_bounded_and_the_newest_stay() {
        let (mut known, now) = (Known::new(3), Instant::now());
        for number in [1, 2, 1, 3] {
            known.add(name(number), None);
        }
        let kept = |known: &Known| (1..=5).filter(|&number| known.contains(&name(number), now)).collect::<Vec<_>>();
        assert_eq!(kept(&known), [1, 2, 3], "the first of the two times goes, the name stays");
        known.remove(&name(2));
        known.add(name(2), None);
        assert_eq!(kept(&known), [1, 2, 3]);
        for _ in 0..100 {
            known.add(name(4), None);
            known.remove(&name(4));
        }
        assert_eq!((kept(&known), known.order.len()), (vec![], 3));
    }
}
