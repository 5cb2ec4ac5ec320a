//! One row for every running decode, before anything else.

use crate::budget::TokenBudget;
use crate::queue::Arrival;
use crate::request::RequestId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Gives each running decode its row, oldest first, and a block where the row starts one. Returns whom that cost
    /// their blocks: younger sequences, none of which has a row in this step yet, or the decode itself.
    pub(crate) fn schedule_decodes(&mut self, budget: &mut TokenBudget) -> Vec<RequestId> {
        let mut preempted = Vec::new();
        let mut next = Arrival::FIRST;
        while let Some((&arrival, &id)) = self.running.range(next..).next() {
            next = arrival.next();
            if self.seq(id).is_decoding() && self.make_room(id, &mut preempted) {
                let num_rows = budget.take(1);
                self.give_rows(id, num_rows);
            }
        }
        preempted
    }
}
