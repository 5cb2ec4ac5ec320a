//! Encoder passes: whole sources, in steps of their own, taking turns with decodes.

use crate::budget::TokenBudget;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Admits waiting sequences that have a source and schedules their encoder passes. The first runs whatever its
    /// length, for none can be cut; more join while they fit the budget as a whole. False if there was none to run.
    pub(crate) fn schedule_encoders(&mut self, budget: &mut TokenBudget) -> bool {
        let mut is_first = true;
        let mut num_growing = self.num_growing();
        while let Some(id) = self.front_if(|sequence| sequence.awaits_encoder()) {
            let source_len = self.seq(id).source_len();
            if !(is_first || budget.has(source_len)) || !self.try_admit(id, &mut num_growing) {
                break;
            }
            budget.take(source_len);
            self.seq_mut(id).schedule(source_len);
            is_first = false;
        }
        !is_first
    }
}
