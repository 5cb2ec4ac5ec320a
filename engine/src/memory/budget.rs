//! How many KV blocks an engine gets.

use crate::config::{EngineConfig, KvDtype};
use crate::error::EngineError;
use crate::models::CacheSite;

/// Share of the memory left after the weights that the default KV cache may take.
const DEFAULT_SHARE: f64 = 0.4;

/// The size of the block pool and what it follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    pub bytes_per_token: u64,
    pub num_blocks: usize,
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
    let width: usize = demand.sites.iter().map(CacheSite::width).sum();
    let bytes_per_token = (width * element_bytes) as u64;
    let wanted_len = config.max_model_len.unwrap_or(demand.max_position_embeddings);
    let bytes = config.kv_cache_memory.unwrap_or_else(|| {
        let full = ((config.max_num_seqs * wanted_len) as u64).saturating_mul(bytes_per_token);
        full.min(most_bytes(config, demand.weight_bytes))
    });
    let block_bytes = bytes_per_token * config.block_size as u64;
    // Slots are numbered in 32 bits.
    let num_blocks = ((bytes / block_bytes.max(1)) as usize).min(u32::MAX as usize / config.block_size);
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
    Ok(KvBudget { bytes_per_token, num_blocks, max_model_len: wanted_len.min(capacity) })
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

    fn check(memory: Option<u64>, max_model_len: Option<usize>, expect: Result<(usize, usize), &str>) {
        let config = EngineConfig {
            kv_cache_memory: memory,
            max_model_len,
            available_memory: 1 << 20,
            max_num_seqs: 4,
            ..EngineConfig::new("")
        };
        let demand =
            KvDemand { sites: &SITES, dtype: KvDtype::Bf16, weight_bytes: 1 << 19, max_position_embeddings: 4096 };
        let found = plan(&config, &demand).map(|budget| (budget.num_blocks, budget.max_model_len));
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
}
