//! What sequences start from and what they leave for others, compared with what it should be.

use std::collections::BTreeSet;

use scheduler::{Batch, Chunk, RequestId};

use crate::coverage::Coverage;
use crate::fake_model::{all_of, entry, next_state, seen_at};
use crate::{Simulation, window_slot};

impl Simulation<'_> {
    /// Tokens from one place where a sequence may start to the next.
    fn start_interval(&self) -> usize {
        let num_blocks = if self.config.num_state_slots > 0 { self.config.snapshot_interval } else { 1 };
        num_blocks * self.config.block_size
    }

    /// True if a running sequence has yet to compute a full block that `id` could start from.
    pub(super) fn is_being_computed(&self, id: RequestId) -> bool {
        let interval = self.start_interval();
        let waiting = &self.live[&id];
        let useful = &self.sequence(id).tokens()[..self.sequence(id).tokens().len() - 1];
        waiting.may_reuse
            && self.live.iter().filter(|&(&other, _)| self.is_running(other)).any(|(&other, expected)| {
                let tokens = self.sequence(other).tokens();
                let num_common = useful.iter().zip(tokens).take_while(|(mine, theirs)| mine == theirs).count();
                expected.salt == waiting.salt && num_common / interval > expected.num_computed / interval
            })
    }

    /// Who was admitted now starts from whole blocks that hold what its tokens and salt say, and that were computed
    /// some time before.
    pub(super) fn check_reuse(&mut self, chunk: &Chunk) {
        let expected = &self.live[&chunk.id];
        if chunk.start == expected.num_computed {
            return;
        }
        let (salt, block_size) = (expected.salt, self.config.block_size);
        assert_eq!(expected.num_computed, 0, "{:?} skips rows in the middle", chunk.id);
        assert!(
            expected.may_reuse && chunk.start.is_multiple_of(self.start_interval()),
            "{:?} starts at {}",
            chunk.id,
            chunk.start
        );
        self.check_content(chunk.id, chunk.start);
        let sequence = self.sequence(chunk.id);
        let tokens = &sequence.tokens()[..chunk.start];
        let (mut before, mut state) = (None, 0);
        for (position, &token) in tokens.iter().enumerate() {
            state = next_state(state, token);
            before = Some(entry(before, (salt, all_of(std::iter::empty())), token));
            if self.config.window.is_some_and(|window| seen_at(chunk.start, window).contains(&position)) {
                let slot = window_slot(sequence.block_table(), position, block_size);
                assert_eq!(Some(self.window_memory[slot]), before, "{:?} at {position} in its window", chunk.id);
            }
        }
        let is_first = expected.num_preemptions == 0;
        assert!(!is_first || sequence.num_cached_tokens() == chunk.start);
        let state_slot = sequence.state_slot();
        if let Some(slot) = state_slot {
            let from = self.restored.remove(&(slot.0 as usize)).expect("who starts behind tokens is given their state");
            assert_eq!(self.states[from], state, "{:?} starts from the state of other tokens", chunk.id);
        }
        self.live.get_mut(&chunk.id).expect("it is live").num_computed = chunk.start;
        self.coverage.reused_windows += u64::from(self.config.window.is_some());
        let Coverage { reused, reused_after_preemption, resumed, resumed_after_preemption, .. } = self.coverage;
        *match (state_slot.is_some(), is_first) {
            (false, true) => reused,
            (false, false) => reused_after_preemption,
            (true, true) => resumed,
            (true, false) => resumed_after_preemption,
        } += 1;
    }

    /// The first `num_tokens` of a sequence were computed some time, and its blocks hold what they and the salt say.
    pub(super) fn check_content(&self, id: RequestId, num_tokens: usize) {
        let (sequence, salt, block_size) = (self.sequence(id), self.live[&id].salt, self.config.block_size);
        let tokens = &sequence.tokens()[..num_tokens];
        let is_known = tokens.is_empty() || self.computed.contains(&(salt, tokens.to_vec()));
        assert!(is_known, "{id:?} starts from what nobody computed");
        let mut before = None;
        for (position, &token) in tokens.iter().enumerate() {
            let slot = sequence.block_table().blocks()[position / block_size].0 as usize * block_size;
            before = Some(entry(before, (salt, all_of(std::iter::empty())), token));
            assert_eq!(Some(self.memory[slot + position % block_size]), before, "{id:?} at {position}");
        }
    }

    /// States are kept where somebody may start, each in a slot of its own behind those of sequences.
    pub(super) fn check_snapshots(&mut self, batch: &Batch) {
        let num_running = self.config.num_state_slots;
        let mut slots = BTreeSet::new();
        for copy in &batch.snapshots {
            let chunk = batch.chunks.iter().find(|chunk| self.sequence(chunk.id).state_slot() == Some(copy.from));
            let chunk = chunk.expect("a state is kept of one that has rows");
            assert!(
                (chunk.start + chunk.len).is_multiple_of(self.start_interval()),
                "{:?}: nobody starts here",
                chunk.id
            );
            assert!((num_running..self.states.len()).contains(&(copy.to.0 as usize)) && slots.insert(copy.to));
        }
        let has_states = self.config.prefix_cache.is_some() && num_running * self.config.num_snapshot_slots > 0;
        for chunk in &batch.chunks {
            if !has_states || self.sequence(chunk.id).source_len() > 0 {
                continue;
            }
            let before_last_row = chunk.start + chunk.len - 1;
            let interval = self.start_interval();
            assert_eq!(chunk.start / interval, before_last_row / interval, "{:?} passes a place of a state", chunk.id);
            let is_kept = batch.snapshots.iter().any(|copy| self.sequence(chunk.id).state_slot() == Some(copy.from));
            let is_place = (chunk.start + chunk.len).is_multiple_of(interval);
            self.coverage.without_a_snapshot += u64::from(is_place && !is_kept);
        }
    }
}
