//! Which recurrent states are kept, of what block's end each of them is, and which goes first.

use std::collections::{BTreeMap, HashMap};

use crate::kv::block_pool::BlockId;
use crate::kv::evict::Tick;
use crate::kv::state_slots::StateSlot;

/// Slots behind those of running sequences. Each is free, reserved for a state that the batch in flight computes, or holds
/// the state that a sequence has when it has read all tokens up to the end of a block in the tree. Who starts from a state
/// gets a copy, so that any of them can go at any time, its block in use or not.
#[derive(Debug)]
pub(crate) struct Snapshots {
    num_total: usize,
    free: Vec<StateSlot>,
    by_block: HashMap<BlockId, Snapshot>,
    /// Least recently used first.
    order: BTreeMap<Tick, BlockId>,
    /// Counts uses.
    now: Tick,
}

#[derive(Debug)]
struct Snapshot {
    slot: StateSlot,
    used: Tick,
}

impl Snapshots {
    /// Slots `first..first + num_slots`.
    pub(crate) fn new(first: usize, num_slots: usize) -> Self {
        let id = |idx: usize| StateSlot(u32::try_from(idx).expect("the config's limits keep it within u32"));
        Self {
            num_total: num_slots,
            free: (first..first + num_slots).rev().map(id).collect(),
            by_block: HashMap::new(),
            order: BTreeMap::new(),
            now: Tick::default(),
        }
    }

    /// No state is ever kept.
    pub(crate) fn is_unused(&self) -> bool {
        self.num_total == 0
    }

    pub(crate) fn num_total(&self) -> usize {
        self.num_total
    }

    pub(crate) fn num_kept(&self) -> usize {
        self.by_block.len()
    }

    pub(crate) fn has(&self, block: BlockId) -> bool {
        self.by_block.contains_key(&block)
    }

    /// A slot for a new state, which costs the least recently used one if none is free. `None` where all are reserved.
    pub(crate) fn reserve(&mut self) -> Option<StateSlot> {
        if self.free.is_empty() {
            let (_, &oldest) = self.order.first_key_value()?;
            self.forget(oldest);
        }
        self.free.pop()
    }

    /// A reserved slot will not be written, or nobody is to find what it holds.
    pub(crate) fn give_back(&mut self, slot: StateSlot) {
        self.free.push(slot);
        assert!(self.free.len() + self.by_block.len() <= self.num_total, "{slot:?} was freed twice");
    }

    /// A reserved slot holds the state at the end of `block` now, unless another does already.
    pub(crate) fn keep(&mut self, block: BlockId, slot: StateSlot) {
        if self.has(block) {
            return self.give_back(slot);
        }
        let used = self.tick();
        self.order.insert(used, block);
        self.by_block.insert(block, Snapshot { slot, used });
    }

    /// Where the state at the end of `block` is, for one who starts there.
    pub(crate) fn touch(&mut self, block: BlockId) -> StateSlot {
        let now = self.tick();
        let snapshot = self.by_block.get_mut(&block).expect("sequences start where a state is kept");
        self.order.remove(&std::mem::replace(&mut snapshot.used, now));
        self.order.insert(now, block);
        snapshot.slot
    }

    /// The state at the end of `block` goes, if one is kept.
    pub(crate) fn forget(&mut self, block: BlockId) {
        if let Some(snapshot) = self.by_block.remove(&block) {
            self.order.remove(&snapshot.used);
            self.free.push(snapshot.slot);
        }
    }

    /// Panics unless every slot is free, in `reserved` or kept for a block that `can_be_found`, once.
    pub(crate) fn assert_accounts_for(
        &self,
        first: usize,
        reserved: impl Iterator<Item = StateSlot>,
        can_be_found: impl Fn(BlockId) -> bool,
    ) {
        let kept = self.by_block.values().map(|snapshot| snapshot.slot);
        let mut slots: Vec<StateSlot> = self.free.iter().copied().chain(reserved).chain(kept).collect();
        slots.sort_unstable();
        let all = (first..first + self.num_total).map(|idx| idx as u32);
        assert!(slots.iter().map(|slot| slot.0).eq(all), "kept states are lost or have two owners: {slots:?}");
        assert!(self.by_block.keys().all(|&block| can_be_found(block)), "a state is kept where nobody can find it");
        let in_order = self.order.iter().map(|(&used, block)| (Some(used), block));
        assert!(in_order.clone().all(|(used, block)| self.by_block.get(block).map(|kept| kept.used) == used));
        assert_eq!(in_order.count(), self.by_block.len(), "kept states up for eviction");
    }

    fn tick(&mut self) -> Tick {
        self.now = self.now.next();
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: usize = 5;

    fn check(snapshots: &Snapshots, reserved: &[StateSlot], blocks: &[u32]) {
        snapshots.assert_accounts_for(FIRST, reserved.iter().copied(), |block| blocks.contains(&block.0));
        assert_eq!(snapshots.num_kept(), blocks.len());
        assert!(blocks.iter().all(|&block| snapshots.has(BlockId(block))));
    }

    fn keep(snapshots: &mut Snapshots, block: u32) -> StateSlot {
        let slot = snapshots.reserve().expect("not all are reserved");
        snapshots.keep(BlockId(block), slot);
        slot
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut snapshots = Snapshots::new(FIRST, 2);
        let slots = [7, 8].map(|block| keep(&mut snapshots, block));
        assert_eq!(slots, [StateSlot(5), StateSlot(6)]);
        assert_eq!(snapshots.touch(BlockId(7)), slots[0]);
        assert_eq!(keep(&mut snapshots, 9), slots[1]);
        check(&snapshots, &[], &[7, 9]);
        assert_eq!(keep(&mut snapshots, 4), slots[0]);
        check(&snapshots, &[], &[9, 4]);
    }

    #[test]
    fn what_is_reserved_cannot_go() {
        let mut snapshots = Snapshots::new(FIRST, 2);
        keep(&mut snapshots, 7);
        let reserved = [snapshots.reserve().unwrap(), snapshots.reserve().unwrap()];
        assert_eq!(snapshots.reserve(), None);
        check(&snapshots, &reserved, &[]);
        snapshots.give_back(reserved[0]);
        snapshots.keep(BlockId(3), reserved[1]);
        check(&snapshots, &[], &[3]);
    }

    #[test]
    fn of_two_states_of_one_block_one_is_kept() {
        let mut snapshots = Snapshots::new(FIRST, 2);
        let reserved = [snapshots.reserve().unwrap(), snapshots.reserve().unwrap()];
        reserved.into_iter().for_each(|slot| snapshots.keep(BlockId(3), slot));
        check(&snapshots, &[], &[3]);
        assert_eq!(snapshots.touch(BlockId(3)), reserved[0]);
        snapshots.forget(BlockId(3));
        snapshots.forget(BlockId(3));
        check(&snapshots, &[], &[]);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_double_free() {
        let mut snapshots = Snapshots::new(FIRST, 1);
        snapshots.give_back(StateSlot(5));
    }
}
