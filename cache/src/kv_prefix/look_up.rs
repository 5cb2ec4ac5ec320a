//! How much of a prefix is somewhere, and how soon it could be here. No payload is read.

use futures::future::join_all;
use tokio::time::Instant;

use super::{BlockName, Inner, KvHint};
use crate::store::Address;

impl Inner {
    pub(super) async fn look_up(&self, names: &[BlockName], deadline: Instant) -> KvHint {
        let mut depths = self.depths_in_memory(names);
        let missing: Vec<_> = (0..names.len()).filter(|&idx| depths[idx].is_none()).collect();
        if let Some(&first) = missing.first() {
            // The first alone: of a prefix that nobody has computed, one question is enough. A tier that hangs at it leaves half of
            // the time for the second question, and is not asked that one.
            let now = Instant::now();
            let half = now + deadline.saturating_duration_since(now) / 2;
            let answering = self.ask_slow(0..self.slow.len(), names, &[first], &mut depths, half).await;
            if depths[first].is_some() {
                self.ask_slow(answering, names, &missing[1..], &mut depths, deadline).await;
            } else {
                // Nobody asked for the others, which are about to be computed again: each is worth storing.
                self.slow.iter().for_each(|tier| tier.lost(missing.iter().map(|&idx| &names[idx])));
            }
        }
        let leading: Vec<usize> = depths.into_iter().map_while(|depth| depth).collect();
        if leading.is_empty() {
            return KvHint::default();
        }
        let now = Instant::now();
        let seconds: Option<f64> = leading.iter().map(|&depth| self.rates.get(depth, now)).sum();
        KvHint { num_blocks: leading.len(), seconds_per_block: seconds.map(|seconds| seconds / leading.len() as f64) }
    }

    /// The depth of the tier that has each block: 0 for those that memory has.
    fn depths_in_memory(&self, names: &[BlockName]) -> Vec<Option<usize>> {
        let has = |name| self.memory.as_ref().is_some_and(|memory| memory.contains(&self.address(name)));
        names.iter().map(|name| has(name).then_some(0)).collect()
    }

    /// Asks slow tiers at the same time, for one that hangs must not take the time of the others; the fastest that has a block counts.
    /// Gives those that answered.
    async fn ask_slow(
        &self,
        tiers: impl IntoIterator<Item = usize>,
        names: &[BlockName],
        idxs: &[usize],
        depths: &mut [Option<usize>],
        deadline: Instant,
    ) -> Vec<usize> {
        if idxs.is_empty() {
            return Vec::new();
        }
        let tiers: Vec<_> = tiers.into_iter().collect();
        let addresses: Vec<Address> = idxs.iter().map(|&idx| self.address(&names[idx])).collect();
        let questions = tiers.iter().map(|&tier| self.slow[tier].store().contains_many(&addresses, deadline));
        let answers = join_all(questions).await;
        let mut answering = Vec::new();
        for (tier, answer) in tiers.into_iter().zip(answers) {
            // One that fails has nothing, as far as this prefix is concerned.
            let Ok(answer) = answer else { continue };
            let (there, lost): (Vec<_>, Vec<_>) = idxs.iter().zip(answer).partition(|(_, is_there)| *is_there);
            for (&idx, _) in there {
                depths[idx].get_or_insert(1 + tier);
            }
            self.slow[tier].lost(lost.into_iter().map(|(&idx, _)| &names[idx]));
            answering.push(tier);
        }
        answering
    }
}
