//! How much of a prefix is somewhere, and how soon it could be here. No payload is read.

use futures::future::join_all;
use tokio::time::Instant;

use super::{BlockName, Inner, KvHint};
use crate::store::Address;

impl Inner {
    pub(super) async fn look_up(&self, names: &[BlockName], deadline: Instant) -> KvHint {
        let mut depths = self.depths_in_memory(names);
        let missing: Vec<_> = (0..names.len()).filter(|&idx| depths[idx].is_none()).collect();
        // The first alone: of a prefix that nobody has computed, one question is enough.
        let (first, others) = missing.split_at(missing.len().min(1));
        for idxs in [first, others] {
            if idxs.is_empty() || self.slow.is_empty() {
                break;
            }
            self.ask_slow(names, idxs, &mut depths, deadline).await;
            if depths[idxs[0]].is_none() {
                break;
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

    /// Asks the slow tiers at the same time, for one that hangs must not take the time of the others; the fastest that has a block
    /// counts.
    async fn ask_slow(&self, names: &[BlockName], idxs: &[usize], depths: &mut [Option<usize>], deadline: Instant) {
        let addresses: Vec<Address> = idxs.iter().map(|&idx| self.address(&names[idx])).collect();
        let answers = join_all(self.slow.iter().map(|tier| tier.store().contains_many(&addresses, deadline))).await;
        for (depth, (tier, answer)) in self.slow.iter().zip(answers).enumerate() {
            // A tier that fails has nothing, as far as this prefix is concerned.
            let Ok(answer) = answer else { continue };
            for (&idx, is_there) in idxs.iter().zip(answer) {
                if is_there {
                    depths[idx].get_or_insert(depth + 1);
                } else {
                    tier.lost(&names[idx]);
                }
            }
        }
    }
}
