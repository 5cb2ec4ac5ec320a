//! The free list of state slots: where models with recurrent layers keep what a sequence carries along.

/// The index of a slot in the engine's arena.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Ord, PartialOrd, Debug)]
pub struct StateSlot(pub u32);

/// One slot per running sequence, or none at all for models without recurrent layers.
#[derive(Debug)]
pub(crate) struct StateSlots {
    num_total: usize,
    /// Last in, first out, as for blocks.
    free: Vec<StateSlot>,
}

impl StateSlots {
    pub(crate) fn new(num_slots: usize) -> Self {
        let num_slots_u32 = u32::try_from(num_slots).expect("the config's limits keep it within u32");
        Self { num_total: num_slots, free: (0..num_slots_u32).rev().map(StateSlot).collect() }
    }

    /// Sequences need no slot.
    pub(crate) fn is_unused(&self) -> bool {
        self.num_total == 0
    }

    pub(crate) fn num_total(&self) -> usize {
        self.num_total
    }

    pub(crate) fn num_used(&self) -> usize {
        self.num_total - self.free.len()
    }

    /// True if one more sequence can run.
    pub(crate) fn has_room(&self) -> bool {
        self.is_unused() || !self.free.is_empty()
    }

    /// A slot for a sequence that is admitted, where the model has them.
    ///
    /// # Panics
    /// If [`Self::has_room`] is false.
    pub(crate) fn allocate(&mut self) -> Option<StateSlot> {
        assert!(self.has_room(), "a sequence was admitted without a state slot");
        self.free.pop()
    }

    pub(crate) fn release(&mut self, slot: Option<StateSlot>) {
        self.free.extend(slot);
        assert!(self.free.len() <= self.num_total, "a state slot was freed twice");
    }

    /// Panics unless every slot is free or in `held`, once.
    pub(crate) fn assert_accounts_for(&self, held: impl Iterator<Item = StateSlot>) {
        let mut slots: Vec<StateSlot> = self.free.iter().copied().chain(held).collect();
        slots.sort_unstable();
        let all = (0..self.num_total).map(|idx| idx as u32);
        assert!(slots.iter().map(|slot| slot.0).eq(all), "state slots are lost or have two owners: {slots:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_every_slot_once() {
        let mut slots = StateSlots::new(2);
        let held = [slots.allocate(), slots.allocate()];
        assert_eq!(held, [Some(StateSlot(0)), Some(StateSlot(1))]);
        assert!(!slots.has_room());
        slots.assert_accounts_for(held.into_iter().flatten());
        slots.release(held[0]);
        assert!(slots.has_room());
        assert_eq!(slots.num_used(), 1);
    }

    #[test]
    fn a_model_without_states_never_runs_out() {
        let mut slots = StateSlots::new(0);
        assert!(slots.has_room());
        assert_eq!(slots.allocate(), None);
        slots.release(None);
        slots.assert_accounts_for(std::iter::empty());
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_double_free() {
        let mut slots = StateSlots::new(1);
        let slot = slots.allocate();
        slots.release(slot);
        slots.release(slot);
    }
}
