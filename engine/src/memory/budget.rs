//! How many KV blocks and state slots an engine gets.

use scheduler::{WindowConfig, WindowLimits};

use crate::config::{EngineConfig, KvDtype};
use crate::error::EngineError;
use crate::memory::room::Room;
use crate::models::CacheSite;

/// Half of the pool's bytes is what recurrent states may take where not all sequences fit at their longest, but for the
/// first: a sequence needs both state and blocks.
const STATE_SHARE: u64 = 2;

/// One state of so many is kept for requests that begin alike, where not all have room.
const SNAPSHOT_SHARE: u64 = 4;

/// Kept states that come before all but as many running sequences: with fewer a conversation or two would push each other out.
const FEW_SNAPSHOTS: u64 = 4;

/// One block of so many that windows could have is for windows of sequences that ended, beside those of running ones.
const KEPT_WINDOW_SHARE: usize = 4;

/// Blocks that hold nothing still have numbers to keep.
const MOST_EMPTY_BLOCKS: usize = 1 << 20;

/// The size of the block pool and what it follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    /// At the sites that keep every position.
    pub bytes_per_token: u64,
    pub num_blocks: usize,
    /// At the sites that keep a window, while the token is in it.
    pub window_bytes_per_token: u64,
    /// The longest window, and the blocks of the sites that have one; `None` where no window is shorter than a sequence.
    pub window: Option<WindowConfig>,
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
    /// Kept with every position, whatever the sites.
    pub routing_bytes_per_token: u64,
    /// What the pool may take where its size is not configured.
    pub most_bytes: u64,
    /// The model's own limit, or [`longest_sequence`] if that is less.
    pub max_position_embeddings: usize,
}

/// Fits the pool to the configured or available bytes. Without a configured length, the model's own limit shrinks to what
/// the pool can hold; with one, a pool that cannot hold a single such sequence is an error.
pub fn plan(config: &EngineConfig, demand: &KvDemand) -> Result<KvBudget, EngineError> {
    let wanted_len = config.max_model_len.unwrap_or(demand.max_position_embeddings);
    let widths = Widths::new(demand, wanted_len);
    let blocks = BlockDemand::new(config, &widths, wanted_len);
    let state_bytes: u64 = demand.sites.iter().map(CacheSite::state_bytes).sum();
    let max_num_seqs = config.max_num_seqs as u64;
    let wanted_snapshots = match config.caches_prefixes() {
        true => FEW_SNAPSHOTS.max(max_num_seqs / SNAPSHOT_SHARE),
        false => 0,
    };
    let most_states = max_num_seqs + wanted_snapshots;
    let full = blocks.most_bytes().saturating_add(most_states.saturating_mul(state_bytes));
    let bytes = config.kv_cache_memory.unwrap_or_else(|| full.min(demand.most_bytes));
    let num_states = match state_bytes {
        0 => 0,
        _ if state_bytes > bytes => return Err(EngineError::StateTooLarge { state_bytes, capacity: bytes }),
        // There is room for every sequence at its longest.
        _ if bytes >= full => most_states,
        _ if blocks.bytes_of_each() == 0 => (bytes / state_bytes).min(most_states),
        _ => (bytes / STATE_SHARE / state_bytes).clamp(1, most_states),
    };
    let bytes = bytes - num_states * state_bytes;
    let num_state_slots = (num_states - num_kept(num_states, wanted_snapshots)).min(max_num_seqs);
    let num_snapshot_slots = (num_states - num_state_slots) as usize;
    let num_window_blocks = blocks.num_window_blocks(bytes);
    let num_running = if state_bytes > 0 { num_states as usize } else { config.max_num_seqs };
    let num_blocks = blocks.num_blocks(bytes, num_window_blocks, num_running);
    let capacity = num_blocks * config.block_size;
    if num_blocks == 0 {
        let per_token = widths.bytes_per_token + demand.routing_bytes_per_token + widths.window_bytes_per_token;
        return Err(EngineError::KvTooSmall { capacity: (bytes / per_token) as usize, block_size: config.block_size });
    }
    if config.max_model_len.is_some_and(|len| len > capacity) {
        let allowed = format!("at most {capacity}, the tokens the KV cache has room for (see --kv-cache-memory)");
        return Err(EngineError::Limit { what: "max_model_len", value: wanted_len as u64, allowed });
    }
    Ok(KvBudget {
        bytes_per_token: widths.bytes_per_token,
        num_blocks,
        window_bytes_per_token: widths.window_bytes_per_token,
        window: widths.window.map(|len| WindowConfig { len, num_blocks: num_window_blocks }),
        num_state_slots: num_state_slots as usize,
        num_snapshot_slots,
        max_model_len: wanted_len.min(capacity),
    })
}

/// What the two kinds of blocks take, and how many can be of use.
struct BlockDemand {
    block_bytes: u64,
    window_block_bytes: u64,
    /// Of the longest sequence.
    longest: usize,
    max_num_seqs: usize,
    /// That running sequences hold at most; 0 without windows.
    most_in_windows: usize,
    keeps_windows: bool,
    /// Slots are numbered in 32 bits.
    most_blocks: usize,
}

impl BlockDemand {
    fn new(config: &EngineConfig, widths: &Widths, wanted_len: usize) -> Self {
        let EngineConfig { block_size, max_num_seqs, max_num_batched_tokens, .. } = *config;
        let limits = WindowLimits { block_size, max_num_seqs, max_num_batched_tokens, max_model_len: wanted_len };
        Self {
            block_bytes: (widths.bytes_per_token + widths.routing_bytes_per_token) * block_size as u64,
            window_block_bytes: widths.window_bytes_per_token * block_size as u64,
            longest: wanted_len.div_ceil(block_size),
            max_num_seqs,
            most_in_windows: widths.window.map_or(0, |len| limits.most_blocks(len)),
            keeps_windows: config.caches_prefixes(),
            most_blocks: u32::MAX as usize / block_size,
        }
    }

    /// Of a block of each kind.
    fn bytes_of_each(&self) -> u64 {
        self.block_bytes + self.window_block_bytes
    }

    /// Room for every sequence at its longest, and for as many windows of ended ones as of running ones.
    fn most_bytes(&self) -> u64 {
        let of_windows = self.most_in_windows as u64 * if self.keeps_windows { 2 } else { 1 };
        let of_others = (self.longest as u64).saturating_mul(self.max_num_seqs as u64);
        of_others.saturating_mul(self.block_bytes).saturating_add(of_windows.saturating_mul(self.window_block_bytes))
    }

    /// All that running sequences can hold, and a share of what is left for windows of ended ones as far as that leaves the
    /// longest sequence its blocks. Where there is not room for so many, as many as of the other kind: nobody needs more then.
    fn num_window_blocks(&self, bytes: u64) -> usize {
        let Some(of_each) = bytes.checked_div(self.bytes_of_each()).filter(|_| self.most_in_windows > 0) else {
            return 0;
        };
        let of_each = usize::try_from(of_each).map_or(self.most_blocks, |blocks| blocks.min(self.most_blocks));
        let Some(to_spare) = of_each.checked_sub(self.most_in_windows).filter(|_| self.keeps_windows) else {
            return of_each.min(self.most_in_windows);
        };
        let of_longest = (self.longest as u64).saturating_mul(self.block_bytes);
        let of_running = self.most_in_windows as u64 * self.window_block_bytes;
        let left = bytes.saturating_sub(of_longest).saturating_sub(of_running) / self.window_block_bytes;
        self.most_in_windows + usize::try_from(left).map_or(to_spare, |left| left.min(to_spare / KEPT_WINDOW_SHARE))
    }

    /// What is left for the other kind, where `num_running` sequences may run at once.
    fn num_blocks(&self, bytes: u64, num_window_blocks: usize, num_running: usize) -> usize {
        let left = bytes - num_window_blocks as u64 * self.window_block_bytes;
        let num_blocks = match left.checked_div(self.block_bytes) {
            _ if num_window_blocks < self.most_in_windows => num_window_blocks,
            Some(num_blocks) => usize::try_from(num_blocks).unwrap_or(self.most_blocks),
            // Blocks that hold nothing: only their numbers are needed, of as many as can be in use.
            None => self.longest.saturating_mul(num_running).min(self.longest.max(MOST_EMPTY_BLOCKS)),
        };
        num_blocks.min(self.most_blocks)
    }
}

/// What a token takes, at both kinds of sites.
struct Widths {
    bytes_per_token: u64,
    routing_bytes_per_token: u64,
    window_bytes_per_token: u64,
    /// The longest that is shorter than a sequence may be.
    window: Option<usize>,
}

impl Widths {
    fn new(demand: &KvDemand, longest: usize) -> Self {
        let window = demand.sites.iter().filter_map(CacheSite::window).filter(|&len| len < longest).max();
        let element_bytes = if demand.dtype == KvDtype::F32 { 4 } else { 2 };
        let bytes = |windowed: bool| {
            let sites = demand.sites.iter().filter(|site| site.has_window_within(window) == windowed);
            (sites.map(CacheSite::token_width).sum::<usize>() * element_bytes) as u64
        };
        Self {
            bytes_per_token: bytes(false),
            routing_bytes_per_token: demand.routing_bytes_per_token,
            window_bytes_per_token: bytes(true),
            window,
        }
    }
}

/// How many of `num_states` are kept ones at least.
fn num_kept(num_states: u64, wanted: u64) -> u64 {
    let few = FEW_SNAPSHOTS.min(num_states / 2);
    few.max(num_states / SNAPSHOT_SHARE).min(wanted)
}

/// A length that no sequence passes in the pool that [`plan`] will make of tokens of at least `bytes_per_token`. Known
/// before the weights are loaded, it bounds what is made per position: a config may promise any length.
pub fn longest_sequence(config: &EngineConfig, room: &Room, bytes_per_token: u64) -> usize {
    let bytes = config.kv_cache_memory.unwrap_or_else(|| room.for_cache(0));
    (bytes / bytes_per_token.max(1)) as usize
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use scheduler::SchedulerConfig;

    use super::*;

    const SITES: [CacheSite; 2] =
        [CacheSite::Gqa { num_kv_heads: 2, head_dim: 8, window: None }, CacheSite::Mla { latent_dim: 24, rope_dim: 8 }];

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
        plan(
            &config,
            &KvDemand {
                sites,
                dtype: KvDtype::Bf16,
                routing_bytes_per_token: 0,
                most_bytes: Room::of_host(config.available_memory).for_cache(1 << 19),
                max_position_embeddings: 4096,
            },
        )
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
    fn the_experts_of_a_token_take_room_beside_it() {
        let config = EngineConfig { kv_cache_memory: Some(20 * 2048), ..EngineConfig::new("") };
        let plan_with = |routing_bytes_per_token, sites: &[CacheSite]| {
            let (dtype, most_bytes, max_position_embeddings) = (KvDtype::Bf16, 0, 4096);
            plan(&config, &KvDemand { sites, dtype, routing_bytes_per_token, most_bytes, max_position_embeddings })
        };
        let budget = plan_with(32, &SITES).unwrap();
        // 2048 bytes of a block, and 32 for each of its tokens.
        assert_eq!((budget.num_blocks, budget.bytes_per_token), (16, 128));
        let windows = [CacheSite::Gqa { num_kv_heads: 2, head_dim: 8, window: Some(16) }];
        let [few, many] = [512, 0].map(|bytes| plan_with(bytes, &windows).unwrap().num_blocks);
        assert_eq!([few, many], [4, 40], "with windows alone, too");
        let refused = plan_with(20 * 2048, &SITES).unwrap_err().to_string();
        assert_eq!(refused, "the KV cache has room for 0 tokens, fewer than one block of 16");
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
            let demand = KvDemand {
                sites: &sites,
                dtype: KvDtype::Bf16,
                routing_bytes_per_token: 0,
                most_bytes: Room::of_host(config.available_memory).for_cache(0),
                max_position_embeddings: 4096,
            };
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

    #[test]
    fn windows_take_what_running_sequences_can_use_and_a_share_of_the_rest() {
        // 32 elements of 2 bytes a token at each kind of site, 16 tokens a block: 1024 bytes per block.
        let full = CacheSite::Gqa { num_kv_heads: 2, head_dim: 8, window: None };
        let of = |window| CacheSite::Gqa { num_kv_heads: 2, head_dim: 8, window: Some(window) };
        let check = |sites: &[CacheSite], num_kib: u64, enable_prefix_caching, expect: [usize; 4]| {
            let config = EngineConfig {
                kv_cache_memory: Some(num_kib << 10),
                max_num_seqs: 4,
                max_num_batched_tokens: 64,
                enable_prefix_caching,
                ..EngineConfig::new("")
            };
            let demand = KvDemand {
                sites,
                dtype: KvDtype::Bf16,
                routing_bytes_per_token: 0,
                most_bytes: Room::of_host(config.available_memory).for_cache(0),
                max_position_embeddings: 4096,
            };
            let budget = plan(&config, &demand).unwrap();
            let (len, num_window_blocks) = budget.window.map_or((0, 0), |window| (window.len, window.num_blocks));
            assert_eq!([budget.num_blocks, num_window_blocks, len, budget.max_model_len], expect, "{num_kib} KiB");
        };
        // Four windows of 8 + 2 blocks, and the rows of a step: 44.
        check(&[full, of(128)], 300, false, [256, 44, 128, 4096]);
        check(&[full, of(128)], 300, true, [256, 44, 128, 4096]);
        check(&[full, of(128)], 400, true, [317, 83, 128, 4096]);
        check(&[full, of(128), of(60)], 300, false, [212, 44, 128, 3392]);
        // As many of each where not all windows fit.
        check(&[full, of(128)], 20, true, [10, 10, 128, 160]);
        // No sequence is longer than this one.
        check(&[full, of(4096)], 20, true, [10, 0, 0, 160]);
        // Blocks that hold nothing are numbers.
        check(&[of(128)], 50, false, [4 * 256, 44, 128, 4096]);
        check(&[of(128)], 84, true, [4 * 256, 44 + 10, 128, 4096]);
        check(&[of(128)], 10, false, [10, 10, 128, 160]);
    }

    #[test]
    fn what_is_planned_can_be_scheduled() {
        let of = |window| CacheSite::Gqa { num_kv_heads: 2, head_dim: 8, window };
        let sites = [vec![of(None), of(Some(50))], vec![of(Some(50))], vec![of(None), of(Some(50)), of(Some(200))]];
        let mut num_planned = 0;
        for sites in &sites {
            for max_num_seqs in [1, 2, 7, 512] {
                for (max_model_len, num_kib) in [40, 64, 200, 513, 4096].into_iter().flat_map(|len| {
                    [None, Some(3), Some(9), Some(40), Some(90), Some(400), Some(1 << 20)].map(|num_kib| (len, num_kib))
                }) {
                    for enable_prefix_caching in [true, false] {
                        let config = EngineConfig {
                            kv_cache_memory: num_kib.map(|num_kib: u64| num_kib << 10),
                            available_memory: 1 << 40,
                            max_num_seqs,
                            max_num_batched_tokens: 64,
                            enable_prefix_caching,
                            ..EngineConfig::new("")
                        };
                        let demand = KvDemand {
                            sites,
                            dtype: KvDtype::Bf16,
                            routing_bytes_per_token: 0,
                            most_bytes: Room::of_host(config.available_memory).for_cache(0),
                            max_position_embeddings: max_model_len,
                        };
                        let budget = plan(&config, &demand).expect("a block fits");
                        let scheduler = SchedulerConfig {
                            block_size: config.block_size,
                            num_blocks: budget.num_blocks,
                            num_state_slots: 0,
                            num_snapshot_slots: 0,
                            snapshot_interval: 1,
                            window: budget.window,
                            max_num_seqs,
                            max_num_batched_tokens: config.max_num_batched_tokens,
                            max_model_len: budget.max_model_len,
                            max_queue: 1,
                            prefix_cache: None,
                            batch_timeout: Duration::ZERO,
                        };
                        assert_eq!(scheduler.validate(), Ok(()), "{config:?}");
                        // What is kept for others never shortens a sequence.
                        assert!(num_kib.is_some() || budget.max_model_len == max_model_len, "{config:?}: {budget:?}");
                        let uncached = plan(&EngineConfig { enable_prefix_caching: false, ..config }, &demand);
                        let longest = uncached.expect("a block fits").max_model_len;
                        assert_eq!(budget.max_model_len, longest, "{budget:?}");
                        num_planned += 1;
                    }
                }
            }
        }
        assert_eq!(num_planned, 3 * 4 * 5 * 7 * 2);
    }
}
