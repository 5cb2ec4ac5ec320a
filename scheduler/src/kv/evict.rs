//! Which cached block goes next: the least recently used of those that no other cached block follows.

use std::collections::BTreeSet;

use crate::kv::block_pool::BlockId;

/// When a block was last used, in releases of sequences; later is greater.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Debug, Default)]
pub(crate) struct Tick(u64);

impl Tick {
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The leaves that nobody uses, oldest first; of one age the lower id.
#[derive(Debug, Default)]
pub(crate) struct EvictionOrder {
    leaves: BTreeSet<(Tick, BlockId)>,
}

impl EvictionOrder {
    pub(crate) fn insert(&mut self, used: Tick, block: BlockId) {
        assert!(self.leaves.insert((used, block)), "{block:?} became a leaf twice");
    }

    /// False if `block` was not a leaf.
    pub(crate) fn remove(&mut self, used: Tick, block: BlockId) -> bool {
        self.leaves.remove(&(used, block))
    }

    pub(crate) fn oldest(&self) -> Option<BlockId> {
        self.leaves.first().map(|&(_, block)| block)
    }

    pub(crate) fn len(&self) -> usize {
        self.leaves.len()
    }
}
