//! What holds after every call, whatever came before it.

use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

impl Scheduler {
    /// Checks every invariant, in time linear in sequences and blocks.
    ///
    /// # Panics
    /// Names the first one that is broken.
    pub fn assert_invariants(&self) {
        let config = &self.config;
        let most_running = config.max_num_seqs.min(config.max_num_batched_tokens);
        let has_states = !self.state_slots.is_unused();
        assert!(self.running.len() <= most_running, "{} run, the limit is {most_running}", self.running.len());
        assert!(self.waiting.num_fresh() <= config.max_queue, "more wait than the queue holds");
        assert_eq!(
            self.running.len() + self.waiting.len(),
            self.sequences.len(),
            "a sequence is in no queue, or in two"
        );
        for (&arrival, &id) in &self.running {
            let sequence = self.seq(id);
            let num_tokens = sequence.tokens().len();
            assert_eq!(sequence.arrival, arrival, "{id:?} runs under another's arrival");
            assert!(sequence.num_computed() < num_tokens, "{id:?} has nothing left to compute");
            assert!(sequence.num_scheduled() <= sequence.num_uncomputed(), "{id:?} has more rows than tokens");
            assert_eq!(sequence.state_slot.is_some(), has_states, "{id:?} runs with the wrong state");
            // The newest token has no block until it is in a batch.
            let num_covered = self.blocks.blocks_for(if sequence.is_decoding() && sequence.num_scheduled() == 0 {
                sequence.num_computed()
            } else {
                num_tokens
            });
            let num_held = sequence.blocks.blocks().len();
            if let Some(prefix) = sequence.prefix() {
                let (published, block_size) = (prefix.published(), config.block_size);
                assert_eq!(published.len(), sequence.num_computed() / block_size, "{id:?} hides computed blocks");
                let shared = &sequence.blocks.blocks()[..published.len()];
                assert!(self.blocks.has_chain(published, shared), "{id:?} holds other blocks than those of its names");
            }
            if let Some(windows) = self.blocks.windows() {
                let end = self.blocks.blocks_for(sequence.num_computed() + sequence.num_scheduled());
                let num_published = sequence.prefix().map_or(0, |prefix| prefix.published().len());
                windows.assert_window(&sequence.blocks, sequence.num_computed(), [num_published, end]);
            }
            assert!(num_held >= num_covered, "{id:?} holds {num_held} blocks, its tokens need {num_covered}");
            assert!(num_held <= self.blocks.blocks_for(sequence.max_positions()), "{id:?} holds more than it may");
        }
        for (arrival, id) in self.waiting.iter() {
            let sequence = self.seq(id);
            assert_eq!(sequence.arrival, arrival, "{id:?} waits under another's arrival");
            assert_eq!(sequence.num_computed() + sequence.num_scheduled(), 0, "{id:?} waits but was computed");
            let table = &sequence.blocks;
            assert!(table.blocks.is_empty() && table.window.is_empty(), "{id:?} waits but holds blocks");
            assert!(sequence.state_slot.is_none(), "{id:?} waits but holds a state");
        }
        let is_waited_for =
            |id| self.sequences.get(&id).is_some_and(|owner: &Sequence| self.running.contains_key(&owner.arrival));
        assert!(self.in_flight.owners().all(is_waited_for), "somebody may wait for one that does not run");
        let is_loading = |id| self.sequences.get(&id).is_some_and(|sequence: &Sequence| sequence.num_loading() > 0);
        assert!(self.in_flight.loading().all(is_loading), "one that does not load is said to");
        let stats = self.stats();
        let num_free = self.blocks.num_free();
        let num_accounted = num_free + stats.num_used_blocks + stats.num_cached_blocks;
        assert_eq!(num_accounted, stats.num_total_blocks, "free + used + cached != total");
        self.state_slots.assert_accounts_for(self.sequences.values().filter_map(|sequence| sequence.state_slot));
        for sequence in self.sequences.values() {
            let is_reserved = sequence.prefix().is_some_and(|prefix| prefix.reserved.is_some());
            assert!(!is_reserved || sequence.num_scheduled() > 0, "a slot waits for a state that nobody computes");
        }
        let reserved = self.sequences.values().filter_map(|sequence| sequence.prefix()?.reserved);
        self.blocks.assert_snapshots(self.state_slots.num_total(), reserved);
        assert!(self.restores.is_empty(), "a state was to be copied in a batch that is made");
        self.blocks.assert_accounts_for(self.sequences.values().map(|sequence| &sequence.blocks));
    }
}
