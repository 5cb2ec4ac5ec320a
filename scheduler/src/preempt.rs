//! Who gives way when blocks run out: the youngest, so that the oldest always gets on.

use crate::prefix::release;
use crate::queue::Arrival;
use crate::request::RequestId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Takes the blocks of a running sequence. It goes back to the front of the queue and is computed again later, as
    /// far as its blocks are not found in the cache then; a row it has in the batch in flight is void. False where `id` is not running.
    pub fn preempt(&mut self, id: RequestId) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let arrival = sequence.arrival;
        if self.running.remove(&arrival).is_none() {
            return false;
        }
        release(&mut self.blocks, &mut self.in_flight, id, sequence);
        self.state_slots.release(sequence.state_slot.take());
        sequence.rewind();
        self.waiting.push_preempted(arrival, id);
        self.num_preemptions += 1;
        true
    }

    /// Gives `id` the blocks of all its known tokens, preempting the youngest until they fit. False if that was `id`.
    pub(crate) fn make_room(&mut self, id: RequestId, preempted: &mut Vec<RequestId>) -> bool {
        while !self.try_cover(id) {
            let (_, youngest) = self.youngest().expect("the sequence that needs blocks is running");
            assert!(youngest != id || self.running.len() > 1, "{id:?} was accepted but does not fit alone");
            self.preempt(youngest);
            preempted.push(youngest);
            if youngest == id {
                return false;
            }
        }
        true
    }

    fn youngest(&self) -> Option<(Arrival, RequestId)> {
        self.running.last_key_value().map(|(&arrival, &id)| (arrival, id))
    }

    /// Gives `id` the blocks of all its known tokens, if so many are available.
    fn try_cover(&mut self, id: RequestId) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("queues name only known sequences");
        let num_tokens = sequence.tokens().len();
        self.blocks.try_cover(&mut sequence.blocks, num_tokens)
    }
}
