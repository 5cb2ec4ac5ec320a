//! Blocks of prompts beyond the KV cache: kept in memory, on disk and in Redis as the engine fills them, looked up before a
//! request is submitted, and loaded when it is its turn.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use cache::store::TierStats;
use cache::{Digest, Fingerprint, KvHint, KvPrefixCache, KvPrefixConfig};
use engine::{BlockCoding, BlockName, EngineHandle, GenerateRequest, LoadTicket, PrefixHint, PrefixTier};
use metrics::{counter, gauge};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::cache_tiers::{KvTiers, MAX_BLOCK_BYTES};

/// Time that a tier gets to tell what it holds.
const SCRAPE_PATIENCE: Duration = Duration::from_millis(50);
/// Bytes of prompts that may be on their way from slow tiers at once: of the longest one, within these bounds.
const MIN_LOAD_BYTES: usize = 256 << 20;
const MAX_LOAD_BYTES: usize = 2 << 30;

/// The tier of one model.
#[derive(Debug)]
pub struct KvTier {
    /// Known once the weights' digest is.
    blocks: Arc<OnceLock<Blocks>>,
}

/// How long blocks are kept and waited for.
#[derive(Clone, Copy, Debug)]
pub struct KvTierConfig {
    pub ttl: Duration,
    /// What the load of a prompt may take in all.
    pub load_timeout: Duration,
    pub coding: BlockCoding,
}

impl KvTier {
    /// Blocks leave and come back as soon as the weights' digest is known: others may share the tiers. `None` where blocks
    /// are not all that the model knows of a prompt.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn open(
        engine: &EngineHandle,
        tiers: KvTiers,
        config: KvTierConfig,
        runtime: &Handle,
    ) -> io::Result<Option<Arc<Self>>> {
        if !engine.model().can_load_prefixes {
            tracing::info!(
                "blocks of prompts stay in the KV cache: the model has recurrent states, windows or an encoder"
            );
            return Ok(None);
        }
        let block_bytes = engine.model().block_bytes;
        if block_bytes > MAX_BLOCK_BYTES {
            tracing::warn!(
                block_bytes,
                limit = MAX_BLOCK_BYTES,
                "blocks of prompts stay in the KV cache: they are too large; hint: a smaller --block-size"
            );
            return Ok(None);
        }
        let tier = Arc::new(Self { blocks: Arc::default() });
        let (blocks, engine, runtime) = (Arc::clone(&tier.blocks), engine.clone(), runtime.clone());
        std::thread::Builder::new().name("kv-digest".to_owned()).spawn(move || {
            let KvTierConfig { ttl, load_timeout, coding } = config;
            let fingerprint = fingerprint(&engine, coding);
            // A prompt as long as can be is one load.
            let longest = engine.model().max_model_len.div_ceil(engine.model().block_size) * block_bytes;
            let config = KvPrefixConfig {
                ttl,
                load_timeout,
                max_block_bytes: block_bytes,
                max_load_bytes: longest.clamp(MIN_LOAD_BYTES, MAX_LOAD_BYTES),
                ..KvPrefixConfig::default()
            };
            let KvTiers { memory, slow, names } = tiers;
            let context = runtime.enter();
            let own = Blocks { cache: KvPrefixCache::new(config, memory, slow, fingerprint), fingerprint };
            drop(context);
            drop(blocks.set(own.clone()));
            engine.attach_prefix_tier(Box::new(EngineSide { blocks: own, coding, runtime }));
            tracing::info!("blocks of prompts are kept in {names}");
        })?;
        Ok(Some(tier))
    }

    /// What is known of a prompt, as far as tiers say so by the deadline.
    pub async fn hint(&self, engine: &EngineHandle, request: &GenerateRequest, deadline: Instant) -> PrefixHint {
        let Some(blocks) = self.blocks.get() else { return PrefixHint::default() };
        // The last token of a prompt is always computed.
        let prompt = &request.prompt[..request.prompt.len().saturating_sub(1)];
        let names = engine.block_names(prompt, &request.block_salt());
        if names.is_empty() {
            return PrefixHint::default();
        }
        let num_tokens = names.len() * engine.model().block_size;
        counter!("vllm:external_prefix_cache_queries_total").increment(num_tokens as u64);
        let KvHint { num_blocks, seconds_per_block } =
            blocks.cache.look_up(&blocks.shared_names(&names), deadline).await;
        PrefixHint { num_blocks, seconds_per_block }
    }

    /// What the tiers hold; none before they are in use.
    pub async fn stats(&self, deadline: Instant) -> Vec<TierStats> {
        match self.blocks.get() {
            Some(blocks) => blocks.cache.stats(deadline).await,
            None => Vec::new(),
        }
    }

    /// Sets the gauges of what tiers hold, of those that can tell at once.
    pub async fn observe(&self) {
        for row in self.stats(Instant::now() + SCRAPE_PATIENCE).await {
            let set = |name: &'static str, value: Option<u64>| {
                if let Some(value) = value {
                    gauge!(name, "tier" => row.tier.as_str()).set(value as f64);
                }
            };
            set("moesaic_kv_tier_bytes", row.bytes);
            set("moesaic_kv_tier_entries", row.num_entries);
        }
    }

    /// Forgets all blocks, in every tier.
    ///
    /// # Errors
    /// A tier did not finish by the deadline: some may be left.
    pub async fn clear(&self, deadline: Instant) -> Result<(), cache::CacheError> {
        match self.blocks.get() {
            Some(blocks) => blocks.cache.clear(deadline).await,
            None => Ok(()),
        }
    }

    /// Waits until what was computed is written, or for the deadline.
    pub async fn settle(&self, deadline: Instant) {
        if let Some(blocks) = self.blocks.get() {
            blocks.cache.settle(deadline).await;
        }
    }
}

/// Of everything that decides the bytes of a block, how many there are included: layers that are loaded on request have some.
fn fingerprint(engine: &EngineHandle, coding: BlockCoding) -> Fingerprint {
    let mut digest = Digest::new("kv fingerprint");
    digest.field("engine", &engine.fingerprint().whole()).number("block_bytes", engine.model().block_bytes as u64);
    digest.text("coding", coding.name());
    digest.fingerprint()
}

/// The blocks of one model among those of others.
#[derive(Clone, Debug)]
struct Blocks {
    cache: KvPrefixCache,
    fingerprint: Fingerprint,
}

impl Blocks {
    /// An engine's own name says nothing of the weights.
    fn shared_name(&self, name: &BlockName) -> BlockName {
        *Digest::new("kv").fingerprint_field(&self.fingerprint).field("block", name).key().as_bytes()
    }

    fn shared_names(&self, names: &[BlockName]) -> Vec<BlockName> {
        names.iter().map(|name| self.shared_name(name)).collect()
    }
}

/// What the step loop calls.
struct EngineSide {
    blocks: Blocks,
    coding: BlockCoding,
    runtime: Handle,
}

impl PrefixTier for EngineSide {
    fn coding(&self) -> BlockCoding {
        self.coding
    }

    fn wants(&self, name: &BlockName) -> bool {
        !self.blocks.cache.is_known(&self.blocks.shared_name(name))
    }

    fn store(&mut self, name: BlockName, bytes: Bytes) {
        let _context = self.runtime.enter();
        self.blocks.cache.store(self.blocks.shared_name(&name), bytes);
    }

    fn load(&mut self, names: Vec<BlockName>, ticket: LoadTicket) {
        let blocks = self.blocks.clone();
        self.runtime.spawn(async move { ticket.finish(blocks.cache.load(&blocks.shared_names(&names)).await) });
    }
}
