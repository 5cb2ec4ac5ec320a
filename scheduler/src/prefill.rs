//! The rows that decodes leave: running prompts go on, then waiting requests are admitted.

use std::time::Duration;

use crate::budget::TokenBudget;
use crate::kv::CachedPrefix;
use crate::queue::Arrival;
use crate::request::RequestId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Gives the rest of the budget to running prompts, oldest first. Their blocks were taken at admission.
    pub(crate) fn continue_prefills(&mut self, budget: &mut TokenBudget) {
        let mut next = Arrival::FIRST;
        while !budget.is_spent()
            && let Some((&arrival, &id)) = self.running.range(next..).next()
        {
            next = arrival.next();
            if self.seq(id).num_scheduled() + self.seq(id).num_loading == 0 {
                self.schedule_prefill(id, budget);
            }
        }
    }

    /// Admits waiting sequences in order while rows, places, state slots and blocks last, up to one with an encoder.
    ///
    /// All blocks of the known tokens are taken at once, so that only decodes can run out of blocks. One more block is
    /// left for each running sequence that may still grow: what is admitted now would be the first to be preempted.
    /// Who waits is admitted in order, whatever the kind, but for those that are held back (see `prefix`).
    pub(crate) fn admit(&mut self, budget: &mut TokenBudget) {
        let mut num_growing = self.num_growing();
        let mut next = Arrival::FIRST;
        while !budget.is_spent()
            && let Some((id, cached)) = self.next_waiting(&mut next)
            && !self.seq(id).awaits_encoder()
            && self.try_admit(id, cached, &mut num_growing)
        {
            if self.seq(id).num_loading == 0 {
                self.schedule_prefill(id, budget);
            }
        }
    }

    /// Running sequences that may need another block.
    pub(crate) fn num_growing(&self) -> usize {
        self.running.values().filter(|&&id| self.may_grow(id)).count()
    }

    /// True if one more may run, as far as places and state slots go.
    pub(crate) fn has_place(&self) -> bool {
        let most_running = self.config.max_num_seqs.min(self.config.max_num_batched_tokens);
        self.running.len() < most_running && self.state_slots.has_room()
    }

    /// Moves the next waiting sequence, for which there is a place, to the running ones, if there is room for its blocks.
    pub(crate) fn try_admit(&mut self, id: RequestId, cached: CachedPrefix, num_growing: &mut usize) -> bool {
        let num_needed = self.blocks.blocks_for(self.seq(id).tokens().len()) - cached.num_used;
        if num_needed + *num_growing > self.blocks.num_available() {
            return false;
        }
        self.start_from(id, cached);
        self.start_loading(id);
        let slot = self.state_slots.allocate();
        let sequence = self.seq_mut(id);
        sequence.state_slot = slot;
        let arrival = sequence.arrival;
        self.resume(id, cached);
        self.waiting.remove(arrival);
        self.running.insert(arrival, id);
        *num_growing += usize::from(self.may_grow(id));
        true
    }

    /// The end of the batch window, while it is open: nothing runs, and more requests may join the first step.
    pub(crate) fn open_window(&self, now: Duration) -> Option<Duration> {
        let num_fresh = self.waiting.num_fresh();
        let is_idle = self.running.is_empty() && self.waiting.len() == num_fresh;
        if !is_idle || num_fresh >= self.config.max_num_seqs.min(self.config.max_queue) {
            return None;
        }
        let (_, oldest) = self.waiting.first_from(Arrival::FIRST)?;
        let end = self.seq(oldest).arrived_at.saturating_add(self.config.batch_timeout);
        (now < end).then_some(end)
    }

    fn schedule_prefill(&mut self, id: RequestId, budget: &mut TokenBudget) {
        let num_rows = budget.take(self.num_wanted_rows(id));
        self.give_rows(id, num_rows);
    }

    fn may_grow(&self, id: RequestId) -> bool {
        let sequence = self.seq(id);
        sequence.blocks.blocks().len() < self.blocks.blocks_for(sequence.max_positions())
    }
}
