//! How many KV blocks and state slots an engine gets.

use crate::config::{EngineConfig, KvDtype};
use crate::error::EngineError;
use crate::models::CacheSite;

/// Share of the memory left after the weights that the default KV cache may take.
const DEFAULT_SHARE: f64 = 0.4;

/// Half of the pool's bytes is what recurrent states may take where not all sequences fit at their longest, but for the
/// first: a sequence needs both state and blocks.
const STATE_SHARE: u64 = 2;

/// One state of so many is kept for requests that begin alike, where not all have room.
const SNAPSHOT_SHARE: u64 = 4;

/// Kept states that come before all but as many running sequences: with fewer a conversation or two would push each other out.
const FEW_SNAPSHOTS: u64 = 4;

/// Blocks that hold nothing still have numbers to keep.
const MOST_EMPTY_BLOCKS: usize = 1 << 20;

/// The size of the block pool and what it follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    pub bytes_per_token: u64,
    pub num_blocks: usize,
    /// Of running sequences; 0 for models without recurrent sites.
    pub num_state_slots: usize,
    /// Of states that are kept for requests that begin alike; 0 also where nothing is reused, or where just one state fits.
    pub num_snapshot_slots: usize,
    pub max_model_len: usize,
}

/// What a model asks for.
pub struct KvDemand<'a> {
    pub sites: &'a [CacheSite],
    /// Never [`KvDtype::Auto`].
    pub dtype: KvDtype,
    pub weight_bytes: u64,
    /// The model's own limit, or [`longest_sequence`] if that is less.
    pub max_position_embeddings: usize,
}

/// Fits the pool to the configured or available bytes. Without a configured length, the model's own limit shrinks to what
/// the pool can hold; with one, a pool that cannot hold a single such sequence is an error.
pub fn plan(config: &EngineConfig, demand: &KvDemand) -> Result<KvBudget, EngineError> {
    let element_bytes = if demand.dtype == KvDtype::F32 { 4 } else { 2 };
    let width: usize = demand.sites.iter().map(CacheSite::token_width).sum();
    let bytes_per_token = (width * element_bytes) as u64;
    let state_bytes: u64 = demand.sites.iter().map(CacheSite::state_bytes).sum();
    let wanted_len = config.max_model_len.unwrap_or(demand.max_position_embeddings);
    let per_sequence = (wanted_len.next_multiple_of(config.block_size) as u64)
        .saturating_mul(bytes_per_token)
        .saturating_add(state_bytes);
    let max_num_seqs = config.max_num_seqs as u64;
    let wanted_snapshots = match config.enable_prefix_caching {
        true => FEW_SNAPSHOTS.max(max_num_seqs / SNAPSHOT_SHARE),
        false => 0,
    };
    let full = max_num_seqs.saturating_mul(per_sequence).saturating_add(wanted_snapshots.saturating_mul(state_bytes));
    let bytes = config.kv_cache_memory.unwrap_or_else(|| full.min(most_bytes(config, demand.weight_bytes)));
    let most_states = max_num_seqs + wanted_snapshots;
    let num_states = match state_bytes {
        0 => 0,
        _ if state_bytes > bytes => return Err(EngineError::StateTooLarge { state_bytes, capacity: bytes }),
        // There is room for every sequence at its longest.
        _ if bytes >= full => most_states,
        _ if bytes_per_token == 0 => (bytes / state_bytes).min(most_states),
        _ => (bytes / STATE_SHARE / state_bytes).clamp(1, most_states),
    };
    let bytes = bytes - num_states * state_bytes;
    let num_state_slots = (num_states - num_kept(num_states, wanted_snapshots)).min(max_num_seqs);
    let num_snapshot_slots = (num_states - num_state_slots) as usize;
    let num_blocks = match bytes_per_token * config.block_size as u64 {
        // Blocks that hold nothing: only their numbers are needed, of as many as can be in use.
        0 => {
            let longest = wanted_len.div_ceil(config.block_size);
            longest.saturating_mul(num_states as usize).min(longest.max(MOST_EMPTY_BLOCKS))
        }
        block_bytes => (bytes / block_bytes) as usize,
    };
    // Slots are numbered in 32 bits.
    let num_blocks = num_blocks.min(u32::MAX as usize / config.block_size);
    let capacity = num_blocks * config.block_size;
    if num_blocks == 0 {
        return Err(EngineError::KvTooSmall {
            capacity: (bytes / bytes_per_token) as usize,
            block_size: config.block_size,
        });
    }
    if config.max_model_len.is_some_and(|len| len > capacity) {
        let allowed = format!("at most {capacity}, the tokens the KV cache has room for (see --kv-cache-memory)");
        return Err(EngineError::Limit { what: "max_model_len", value: wanted_len as u64, allowed });
    }
    let (num_state_slots, max_model_len) = (num_state_slots as usize, wanted_len.min(capacity));
    Ok(KvBudget { bytes_per_token, num_blocks, num_state_slots, num_snapshot_slots, max_model_len })
}

/// How many of `num_states` are kept ones at least.
fn num_kept(num_states: u64, wanted: u64) -> u64 {
    let few = FEW_SNAPSHOTS.min(num_states / 2);
    few.max(num_states / SNAPSHOT_SHARE).min(wanted)
}

/// A length that no sequence passes in the pool that [`plan`] will make of tokens of at least `bytes_per_token`. Known
/// before the weights are loaded, it bounds what is made per position: a config may promise any length.
pub fn longest_sequence(config: &EngineConfig, bytes_per_token: u64) -> usize {
    let bytes = config.kv_cache_memory.unwrap_or_else(|| most_bytes(config, 0));
    (bytes / bytes_per_token.max(1)) as usize
}

/// What the pool may take where its size is not configured.
fn most_bytes(config: &EngineConfig, weight_bytes: u64) -> u64 {
    (config.available_memory.saturating_sub(weight_bytes) as f64 * DEFAULT_SHARE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITES: [CacheSite; 2] =
        [CacheSite::Gqa { num_kv_heads: 2, head_dim: 8 }, CacheSite::Mla { latent_dim: 24, rope_dim: 8 }];

    fn plan_for(
        sites: &[CacheSite],
        memory: Option<u64>,
        max_model_len: Option<usize>,
    ) -> Result<KvBudget, EngineError> {
        let config = EngineConfig {
            kv_cache_memory: memory,
            max_model_len,
            available_memory: 1 << 20,
            max_num_seqs: 4,
            ..EngineConfig::new("")
        };
        plan(&config, &KvDemand { sites, dtype: KvDtype::Bf16, weight_bytes: 1 << 19, max_position_embeddings: 4096 })
    }

    fn check(memory: Option<u64>, max_model_len: Option<usize>, expect: Result<(usize, usize), &str>) {
        let found = plan_for(&SITES, memory, max_model_len).map(|budget| (budget.num_blocks, budget.max_model_len));
        assert_eq!(found.as_ref().map_err(ToString::to_string), expect.as_ref().map_err(ToString::to_string));
    }

    #[test]
    fn fits_the_pool_to_the_memory() {
        // 64 elements of 2 bytes per token, 16 tokens per block: 2048 bytes per block.
        check(Some(20 * 2048), None, Ok((20, 320)));
        check(Some(300 * 2048), None, Ok((300, 4096)));
        check(None, Some(32), Ok((8, 32)));
        check(None, None, Ok((102, 1632)));
        check(Some(2047), None, Err("the KV cache has room for 15 tokens, fewer than one block of 16"));
        // 2^32 tokens at most, whatever the memory: 512 GiB here.
        check(Some(1 << 46), None, Ok(((1 << 28) - 1, 4096)));
        let too_long = "max_model_len is 321, allowed are at most 320, the tokens the KV cache has room for (see --kv-cache-memory)";
        check(Some(20 * 2048), Some(321), Err(too_long));
    }

    #[test]
    fn a_quarter_of_many_states_is_kept_where_something_is_reused() {
        let sites = [SITES[0], CacheSite::Recurrent { width: 256 }];
        let check = |enable_prefix_caching, memory, expect: [usize; 2]| {
            let config = EngineConfig {
                kv_cache_memory: Some(memory),
                max_num_seqs: 100,
                enable_prefix_caching,
                ..EngineConfig::new("")
            };
            let demand =
                KvDemand { sites: &sites, dtype: KvDtype::Bf16, weight_bytes: 0, max_position_embeddings: 4096 };
            let budget = plan(&config, &demand).unwrap();
            assert_eq!([budget.num_state_slots, budget.num_snapshot_slots], expect);
        };
        check(true, 160 << 10, [60, 20]);
        check(true, 16 << 20, [100, 25]);
        check(false, 160 << 10, [80, 0]);
        check(false, 16 << 20, [100, 0]);
    }

    #[test]
    fn states_and_blocks_share_the_memory() {
        // 1 KiB of state per sequence, and 64 elements per token as above.
        let sites = [SITES[0], CacheSite::Recurrent { width: 256 }, SITES[1]];
        let check = |memory, expect: [usize; 3]| {
            let budget = plan_for(&sites, memory, None).unwrap();
            assert_eq!([budget.num_state_slots, budget.num_snapshot_slots, budget.num_blocks], expect);
        };
        // The four sequences that run at once have their states, a few are kept, the rest is for blocks.
        check(Some(20 * 2048), [4, 4, 16]);
        // Of little, half, and of that half again while it is a few.
        check(Some(7 * 2048), [4, 3, 3]);
        check(Some(3 * 2048), [2, 1, 1]);
        check(Some(2 * 2048 - 1024), [1, 0, 1]);
        assert!(plan_for(&sites, Some(2048), None).is_err());
        // All that may run at once, each with its state and its longest context.
        let short = plan_for(&sites, None, Some(20)).unwrap();
        assert_eq!([short.num_state_slots, short.num_snapshot_slots, short.num_blocks], [4, 4, 4 * 2]);
        // A model of recurrent layers alone has blocks for no bytes.
        let budget = plan_for(&sites[1..2], Some(1 << 12), None).unwrap();
        assert_eq!((budget.num_state_slots, budget.num_snapshot_slots), (2, 2));
        assert_eq!((budget.bytes_per_token, budget.num_blocks), (0, 4 * 256));
        let error = plan_for(&sites[1..2], Some(1023), None).unwrap_err().to_string();
        assert_eq!(
            error,
            "the recurrent state of one sequence takes 1024 bytes, the KV cache has 1023 (see --kv-cache-memory)"
        );
        assert_eq!(budget.max_model_len, 4096);
    }
}
