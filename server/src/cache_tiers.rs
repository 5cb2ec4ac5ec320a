//! The tiers that the configuration asks for: memory of each cache's own, over a folder and a Redis that they share.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cache::store::{DiskConfig, DiskStore, MemoryStore, RedisConfig, RedisStore, Store, TieredConfig, TieredStore};
use cache::{BreakerConfig, CacheError};

use crate::app::REPLAY_SHARE;
use crate::config::{Config, DeepestTier, Secret};

/// Largest value on disk: the answer to a long context with many log-probs has a few MiB.
const MAX_DISK_VALUE_BYTES: usize = MAX_BLOCK_BYTES;
/// Largest block of a prompt: hundreds of KiB in most models, 4 MiB in Mixtral 8x22B.
pub const MAX_BLOCK_BYTES: usize = 16 << 20;
/// Largest value in Redis: what takes longer than a request may wait would only keep others from theirs.
const MAX_REDIS_VALUE_BYTES: usize = 2 << 20;
/// How often another process's files in a shared folder are noticed.
const SCAN_INTERVAL: Duration = Duration::from_secs(300);

/// Most bytes of profiles that wait to be written to slow tiers.
const MAX_PENDING_PROFILES: u32 = 4 << 20;

/// Where values are kept, for each cache that is on.
#[derive(Debug, Default)]
pub struct Tiers {
    pub outputs: Option<CacheTiers>,
    pub routing: Option<CacheTiers>,
    pub kv: Option<KvTiers>,
}

/// Where blocks of prompts are kept beyond the KV cache.
#[derive(Debug)]
pub struct KvTiers {
    pub memory: Option<Arc<MemoryStore>>,
    /// Those that outlive the process, fastest first.
    pub slow: Vec<Arc<dyn Store>>,
    /// In the order in which they are asked, for the log.
    pub names: String,
}

/// Where one cache keeps its values.
#[derive(Debug)]
pub struct CacheTiers {
    pub memory: Arc<MemoryStore>,
    /// Memory over those that outlive the process; absent where there are none.
    pub all: Option<SlowTiers>,
}

/// Memory over what outlives the process.
#[derive(Debug)]
pub struct SlowTiers {
    pub store: Arc<TieredStore>,
    /// In the order in which they are asked, for the log.
    pub names: String,
}

/// A tier that outlives the process; caches share it.
struct SlowTier {
    /// The least that [`Config::output_cache_depth`] must be for answers to be in it.
    depth: DeepestTier,
    name: &'static str,
    store: Arc<dyn Store>,
}

/// The tiers of every cache. Call within a runtime.
///
/// # Errors
/// A folder that cannot be made, an address of Redis that means nothing.
pub fn open(config: &Config) -> anyhow::Result<Tiers> {
    let depth = config.output_cache_depth();
    let keeps_routing = config.routing_cache_memory.0 > 0;
    let kv_depth = config.kv_tier_depth();
    let slow = open_slow(config, |tier| keeps_routing || depth >= tier || kv_depth >= tier)?;
    let answers: Vec<&SlowTier> = slow.iter().filter(|tier| depth >= tier.depth).collect();
    let outputs = (depth != DeepestTier::Off).then(|| {
        let bytes = config.output_cache_memory.0 - config.output_cache_memory.0 / REPLAY_SHARE;
        stack(bytes, &answers, TieredConfig::default())
    });
    let routing = keeps_routing.then(|| {
        let pending = TieredConfig { max_pending_bytes: MAX_PENDING_PROFILES, ..TieredConfig::default() };
        stack(config.routing_cache_memory.0, &slow.iter().collect::<Vec<_>>(), pending)
    });
    let kv = (kv_depth != DeepestTier::Off).then(|| open_kv(config, &slow));
    for SlowTier { store, .. } in slow {
        // What is wrong with a tier is to be read in the log before the first request meets it.
        tokio::spawn(async move { store.check().await });
    }
    Ok(Tiers { outputs, routing, kv })
}

fn open_kv(config: &Config, shared: &[SlowTier]) -> KvTiers {
    let memory = (config.kv_tier_memory.0 > 0).then(|| Arc::new(MemoryStore::new(config.kv_tier_memory.0)));
    let slow: Vec<_> = shared.iter().filter(|tier| config.kv_tier_depth() >= tier.depth).collect();
    let names: Vec<_> = memory.iter().map(|_| "memory").chain(slow.iter().map(|tier| tier.name)).collect();
    KvTiers { memory, slow: slow.iter().map(|tier| Arc::clone(&tier.store)).collect(), names: names.join(", ") }
}

fn stack(memory_bytes: u64, slow: &[&SlowTier], config: TieredConfig) -> CacheTiers {
    let memory = Arc::new(MemoryStore::new(memory_bytes));
    let all = (!slow.is_empty()).then(|| {
        let stores = slow.iter().map(|tier| Arc::clone(&tier.store)).collect();
        let names: Vec<_> = std::iter::once("memory").chain(slow.iter().map(|tier| tier.name)).collect();
        SlowTiers { store: Arc::new(TieredStore::new(Arc::clone(&memory), stores, config)), names: names.join(", ") }
    });
    CacheTiers { memory, all }
}

/// The tiers that are configured and `is_wanted`, fastest first.
fn open_slow(config: &Config, is_wanted: impl Fn(DeepestTier) -> bool) -> anyhow::Result<Vec<SlowTier>> {
    let mut slow = Vec::new();
    if let Some(directory) = config.cache_dir.as_ref().filter(|_| is_wanted(DeepestTier::Disk)) {
        let disk = DiskStore::open(DiskConfig {
            directory: directory.clone(),
            max_bytes: config.cache_disk.0,
            max_value_bytes: MAX_DISK_VALUE_BYTES,
            scan_interval: SCAN_INTERVAL,
            breaker: BreakerConfig::default(),
        });
        let store = Arc::new(disk.with_context(|| format!("--cache-dir {}", directory.display()))?);
        slow.push(SlowTier { depth: DeepestTier::Disk, name: "disk", store });
    }
    if let Some(url) = config.redis_url.as_ref().filter(|_| is_wanted(DeepestTier::Redis)) {
        let store = open_redis(config, url)?;
        slow.push(SlowTier { depth: DeepestTier::Redis, name: "Redis", store });
    }
    Ok(slow)
}

fn open_redis(config: &Config, url: &Secret) -> anyhow::Result<Arc<dyn Store>> {
    let read = |path: &PathBuf| fs::read(path).with_context(|| format!("--redis-ca-file {}", path.display()));
    let redis = RedisStore::open(&RedisConfig {
        url: url.expose_text().to_owned(),
        ca: config.redis_ca_file.as_ref().map(read).transpose()?,
        key_prefix: config.redis_prefix.clone(),
        max_value_bytes: MAX_REDIS_VALUE_BYTES,
        max_block_bytes: MAX_BLOCK_BYTES,
        breaker: BreakerConfig::default(),
    });
    Ok(Arc::new(redis.map_err(|error| anyhow!("{}: {error}", flag_of(&error)))?))
}

/// The flag that an error in the settings of Redis is about.
fn flag_of(error: &CacheError) -> &'static str {
    match error {
        CacheError::Prefix { .. } => "--redis-prefix",
        CacheError::Ca { .. } => "--redis-ca-file",
        _ => "--redis-url",
    }
}
