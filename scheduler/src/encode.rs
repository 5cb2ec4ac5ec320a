//! Encoder passes: whole sources, in steps of their own, taking turns with decodes.

use crate::budget::TokenBudget;
use crate::queue::Arrival;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Admits waiting sequences that have a source and schedules their encoder passes. The first runs whatever its
    /// length, for none can be cut; more join while they fit the budget as a whole. False if there was none to run.
    pub(crate) fn schedule_encoders(&mut self, budget: &mut TokenBudget) -> bool {
        let mut is_first = true;
        let mut num_growing = self.num_growing();
        let mut next = Arrival::FIRST;
        while let Some((id, cached)) = self.next_waiting(&mut next)
            && self.seq(id).awaits_encoder()
        {
            let source_len = self.seq(id).source_len();
            if !(is_first || budget.has(source_len)) || !self.try_admit(id, cached, &mut num_growing) {
                break;
            }
            budget.take(source_len);
            self.give_rows(id, source_len);
            is_first = false;
        }
        !is_first
    }
}
