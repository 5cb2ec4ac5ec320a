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

/// Waiting sequences. Preempted ones go first: they were admitted before any fresh one, so the whole is by arrival.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    preempted: BTreeMap<Arrival, RequestId>,
    fresh: BTreeMap<Arrival, RequestId>,
}

impl Queue {
    pub(crate) fn push_fresh(&mut self, arrival: Arrival, id: RequestId) {
        let previous = self.fresh.insert(arrival, id);
        assert!(previous.is_none(), "two requests arrived as {arrival:?}");
    }

    pub(crate) fn push_preempted(&mut self, arrival: Arrival, id: RequestId) {
        let previous = self.preempted.insert(arrival, id);
        assert!(previous.is_none(), "{arrival:?} was preempted twice");
    }

    /// The next to be admitted.
    pub(crate) fn front(&self) -> Option<(Arrival, RequestId)> {
        let first = self.preempted.first_key_value().or_else(|| self.fresh.first_key_value());
        first.map(|(&arrival, &id)| (arrival, id))
    }

    /// True if `arrival` was waiting.
    pub(crate) fn remove(&mut self, arrival: Arrival) -> bool {
        self.preempted.remove(&arrival).is_some() || self.fresh.remove(&arrival).is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.preempted.len() + self.fresh.len()
    }

    /// Those that never held a block.
    pub(crate) fn num_fresh(&self) -> usize {
        self.fresh.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Arrival, RequestId)> {
        self.preempted.iter().chain(&self.fresh).map(|(&arrival, &id)| (arrival, id))
    }
}
