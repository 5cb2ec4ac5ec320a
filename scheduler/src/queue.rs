//! Who waits, in order of arrival.

use std::collections::BTreeMap;

use crate::request::RequestId;

/// The order in which requests were accepted; lower is older.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Debug)]
pub(crate) struct Arrival(pub(crate) u64);

impl Arrival {
    pub(crate) const FIRST: Self = Self(0);

    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Waiting sequences, new and preempted ones, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: BTreeMap<Arrival, Waiting>,
    num_fresh: usize,
}

#[derive(Debug)]
struct Waiting {
    id: RequestId,
    is_fresh: bool,
}

impl Queue {
    pub(crate) fn push_fresh(&mut self, arrival: Arrival, id: RequestId) {
        self.num_fresh += 1;
        self.push(arrival, Waiting { id, is_fresh: true });
    }

    pub(crate) fn push_preempted(&mut self, arrival: Arrival, id: RequestId) {
        self.push(arrival, Waiting { id, is_fresh: false });
    }

    /// The oldest that arrived at `next` or later.
    pub(crate) fn first_from(&self, next: Arrival) -> Option<(Arrival, RequestId)> {
        self.waiting.range(next..).next().map(|(&arrival, waiting)| (arrival, waiting.id))
    }

    /// True if `arrival` was waiting.
    pub(crate) fn remove(&mut self, arrival: Arrival) -> bool {
        let removed = self.waiting.remove(&arrival);
        self.num_fresh -= usize::from(removed.as_ref().is_some_and(|waiting| waiting.is_fresh));
        removed.is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Those that never held a block.
    pub(crate) fn num_fresh(&self) -> usize {
        self.num_fresh
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Arrival, RequestId)> {
        self.waiting.iter().map(|(&arrival, waiting)| (arrival, waiting.id))
    }

    fn push(&mut self, arrival: Arrival, waiting: Waiting) {
        let previous = self.waiting.insert(arrival, waiting);
        assert!(previous.is_none(), "{arrival:?} waits twice");
    }
}
