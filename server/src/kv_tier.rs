//! Blocks of prompts beyond the KV cache: kept in memory, on disk and in Redis as the engine fills them, looked up before a
//! request is submitted, and loaded when it is its turn.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use cache::store::TierStats;
use cache::{Digest, Fingerprint, KvHint, KvPrefixCache, KvPrefixConfig};
use engine::{BlockName, EngineHandle, LoadTicket, PrefixHint, PrefixTier};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::cache_tiers::KvTiers;

/// The tier of one model.
#[derive(Debug)]
pub struct KvTier {
    /// Known once the weights' digest is.
    whole: Arc<OnceLock<KvPrefixCache>>,
}

/// How long blocks are kept and waited for.
#[derive(Clone, Copy, Debug)]
pub struct KvTierConfig {
    pub ttl: Duration,
    /// What a look-up may cost a request.
    pub lookup_timeout: Duration,
    /// What the load of a prompt may take in all.
    pub load_timeout: Duration,
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
        let tier = Arc::new(Self { whole: Arc::default() });
        let (whole, engine, runtime) = (Arc::clone(&tier.whole), engine.clone(), runtime.clone());
        std::thread::Builder::new().name("kv-digest".to_owned()).spawn(move || {
            let fingerprint = Fingerprint::from_bytes(engine.fingerprint().whole());
            let KvTierConfig { ttl, lookup_timeout, load_timeout } = config;
            let config = KvPrefixConfig { ttl, lookup_timeout, load_timeout, ..KvPrefixConfig::default() };
            let names = tiers.names;
            let _context = runtime.enter();
            let cache = KvPrefixCache::new(config, tiers.memory, tiers.slow, fingerprint);
            drop(whole.set(cache.clone()));
            let runtime = runtime.clone();
            engine.attach_prefix_tier(Box::new(EngineSide { cache, fingerprint, runtime }));
            tracing::info!("blocks of prompts are kept in {names}");
        })?;
        Ok(Some(tier))
    }

    /// What is known of a prompt. Waits for tiers no longer than a look-up may take.
    pub async fn hint(&self, engine: &EngineHandle, prompt: &[u32], salt: &[u8; 32]) -> PrefixHint {
        let Some(cache) = self.whole.get() else { return PrefixHint::default() };
        // The last token of a prompt is always computed.
        let names = engine.block_names(&prompt[..prompt.len().saturating_sub(1)], salt);
        if names.is_empty() {
            return PrefixHint::default();
        }
        let fingerprint = Fingerprint::from_bytes(engine.fingerprint().whole());
        let names: Vec<BlockName> = names.iter().map(|name| shared_name(&fingerprint, name)).collect();
        let num_tokens = names.len() * engine.model().block_size;
        metrics::counter!("vllm:external_prefix_cache_queries_total").increment(num_tokens as u64);
        let KvHint { num_blocks, seconds_per_block } = cache.look_up(&names).await;
        PrefixHint { num_blocks, seconds_per_block }
    }

    /// What the tiers hold; none before they are in use.
    pub async fn stats(&self, deadline: Instant) -> Vec<TierStats> {
        match self.whole.get() {
            Some(cache) => cache.stats(deadline).await,
            None => Vec::new(),
        }
    }

    /// Forgets all blocks, in every tier.
    ///
    /// # Errors
    /// A tier did not finish by the deadline: some may be left.
    pub async fn clear(&self, deadline: Instant) -> Result<(), cache::CacheError> {
        match self.whole.get() {
            Some(cache) => cache.clear(deadline).await,
            None => Ok(()),
        }
    }

    /// Waits until what was computed is written, or for the deadline.
    pub async fn settle(&self, deadline: Instant) {
        if let Some(cache) = self.whole.get() {
            cache.settle(deadline).await;
        }
    }
}

/// The name of a block among those of other models: an engine's own name says nothing of the weights.
fn shared_name(fingerprint: &Fingerprint, name: &BlockName) -> BlockName {
    *Digest::new("kv").fingerprint_field(fingerprint).field("block", name).key().as_bytes()
}

/// What the step loop calls.
struct EngineSide {
    cache: KvPrefixCache,
    fingerprint: Fingerprint,
    runtime: Handle,
}

impl PrefixTier for EngineSide {
    fn wants(&self, name: &BlockName) -> bool {
        !self.cache.is_known(&shared_name(&self.fingerprint, name))
    }

    fn store(&mut self, name: BlockName, bytes: Bytes) {
        let _context = self.runtime.enter();
        self.cache.store(shared_name(&self.fingerprint, &name), bytes);
    }

    fn load(&mut self, names: Vec<BlockName>, ticket: LoadTicket) {
        let names: Vec<BlockName> = names.iter().map(|name| shared_name(&self.fingerprint, name)).collect();
        let cache = self.cache.clone();
        self.runtime.spawn(async move { ticket.finish(cache.load(&names).await) });
    }
}
