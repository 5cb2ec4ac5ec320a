//! What a sequence's tokens found in memory, and what had to be read for them.

use std::collections::{BTreeMap, BTreeSet};

use kernels::TopK;

/// Of the experts that tokens of one sequence used, where experts lie in a store; counted once for each layer of each step.
///
/// An expert that tokens of several sequences wait for in one step is read once and counts for each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertTraffic {
    /// Experts that were there.
    pub num_hits: u64,
    /// Experts that were not there, or not yet.
    pub num_misses: u64,
    /// Bytes of those.
    pub num_bytes: u64,
}

impl ExpertTraffic {
    pub fn add(&mut self, other: Self) {
        self.num_hits += other.num_hits;
        self.num_misses += other.num_misses;
        self.num_bytes += other.num_bytes;
    }

    /// Adds what a layer did for the sequences of a step that want to know it. `missed` has the bytes of each expert that was not
    /// there; those that `is_free` lie nowhere.
    pub(crate) fn count(
        of_sequences: &mut [Option<Self>],
        cu_seqlens: &[u32],
        topk: &TopK,
        (missed, is_free): (&BTreeMap<u32, u64>, &[bool]),
    ) {
        for (rows, traffic) in cu_seqlens.windows(2).zip(of_sequences) {
            let Some(traffic) = traffic else { continue };
            let choices = &topk.experts[rows[0] as usize * topk.k..rows[1] as usize * topk.k];
            let lies_somewhere = |expert: &&u32| is_free.get(**expert as usize) == Some(&false);
            let used: BTreeSet<u32> = choices.iter().filter(lies_somewhere).copied().collect();
            for expert in used {
                match missed.get(&expert) {
                    None => traffic.num_hits += 1,
                    Some(bytes) => {
                        traffic.num_misses += 1;
                        traffic.num_bytes += bytes;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sequence_counts_what_its_own_tokens_used_and_only_if_it_wants_to_know() {
        // Three sequences of one, two and one rows; expert 3 computes nothing.
        let none = TopK::NO_EXPERT;
        let topk = TopK { experts: vec![0, 1, 2, 3, 2, none, 1, 2], weights: vec![0.5; 8], k: 2 };
        let missed = BTreeMap::from([(1, 10), (2, 30)]);
        let mut of_sequences = [Some(ExpertTraffic::default()), Some(ExpertTraffic::default()), None];
        let is_free = [false, false, false, true];
        for _ in 0..2 {
            ExpertTraffic::count(&mut of_sequences, &[0, 1, 3, 4], &topk, (&missed, &is_free));
        }
        let traffic = |num_hits, num_misses, num_bytes| Some(ExpertTraffic { num_hits, num_misses, num_bytes });
        assert_eq!(of_sequences, [traffic(2, 2, 20), traffic(0, 2, 60), None]);
    }
}
