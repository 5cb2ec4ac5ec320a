//! Blocks that leave the pool and come back: what is said of them is compared with what they hold, and they come late, in
//! part, or for one that does not wait any more.

use scheduler::{Batch, block_names};

use crate::Simulation;

impl Simulation<'_> {
    /// Leading blocks of a prompt that are outside; now and then that is wrong.
    pub(super) fn num_loadable(&mut self, prompt: &[u32], salt: u8) -> usize {
        if self.rng.percent(5) {
            return self.rng.between(0, 30);
        }
        let names = block_names(&[9; 32], &[salt; 32], self.config.block_size, prompt);
        names.iter().take_while(|&name| self.outside.contains_key(name)).count()
    }

    /// Keeps the blocks that the step has filled.
    pub(super) fn store(&mut self) {
        for computed in self.scheduler.computed_blocks() {
            let start = computed.block.0 as usize * self.config.block_size;
            let entries = &self.memory[start..start + self.config.block_size];
            let kept = self.outside.entry(computed.name).or_insert_with(|| entries.to_vec());
            assert_eq!(kept, entries, "a block holds something else under the same name");
            self.coverage.stored += 1;
        }
    }

    /// Notes who waits.
    pub(super) fn take_loads(&mut self, batch: &Batch) {
        for load in &batch.loads {
            assert!(self.scheduler.can_load() && !load.names.is_empty());
            assert_eq!(self.scheduler.loading(load.id).len(), load.names.len());
            let (num_tokens, expected) = (self.sequence(load.id).num_computed(), &self.live[&load.id]);
            assert!(
                expected.may_reuse && expected.num_preemptions == 0,
                "{:?} waits for what it may not have",
                load.id
            );
            self.check_content(load.id, num_tokens);
            self.live.get_mut(&load.id).expect("it is live").num_computed = num_tokens;
        }
        self.loads.extend(batch.loads.iter().cloned());
    }

    /// Some of what is waited for comes.
    pub(super) fn answer_loads(&mut self) {
        for load in std::mem::take(&mut self.loads) {
            if self.trouble > 0 && self.rng.percent(60) {
                self.loads.push(load);
                continue;
            }
            let blocks = self.scheduler.loading(load.id).to_vec();
            if blocks.is_empty() {
                self.coverage.loads_unwanted += 1;
                self.scheduler.loaded(load.id, load.names.len());
                continue;
            }
            assert_eq!(blocks.len(), load.names.len(), "{:?} waits for other blocks", load.id);
            let is_cut = self.rng.percent(20);
            let most = if is_cut { self.rng.between(0, blocks.len()) } else { blocks.len() };
            let found: Vec<_> =
                load.names.iter().map_while(|name| self.outside.get(name)).take(most).cloned().collect();
            for (block, entries) in blocks.iter().zip(&found) {
                let start = block.0 as usize * self.config.block_size;
                self.memory.resize(self.memory.len().max(start + entries.len()), 0);
                self.memory[start..start + entries.len()].copy_from_slice(entries);
            }
            self.scheduler.loaded(load.id, found.len());
            self.scheduler.assert_invariants();
            let num_tokens = self.sequence(load.id).num_computed();
            let expected = self.live.get_mut(&load.id).expect("who waits is live");
            assert_eq!(num_tokens, expected.num_computed + found.len() * self.config.block_size, "{:?}", load.id);
            expected.num_computed = num_tokens;
            assert_eq!(self.sequence(load.id).num_cached_tokens(), num_tokens);
            self.check_content(load.id, num_tokens);
            self.coverage.loads += 1;
            self.coverage.loads_cut += u64::from(found.len() < blocks.len());
        }
    }
}

/// Entries of blocks by name.
pub type Outside = std::collections::HashMap<[u8; 32], Vec<u64>>;
