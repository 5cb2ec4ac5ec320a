//! The tiers that the configuration asks for.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cache::store::{DiskConfig, DiskStore, MemoryStore, RedisConfig, RedisStore, Store, TieredConfig, TieredStore};
use cache::{BreakerConfig, CacheError};

use crate::app::REPLAY_SHARE;
use crate::config::{Config, OutputCacheType};

/// Largest value on disk: the answer to a long context with many log-probs has a few MiB.
const MAX_DISK_VALUE_BYTES: usize = 16 << 20;
/// Largest value in Redis: what takes longer than a request may wait would only keep others from theirs.
const MAX_REDIS_VALUE_BYTES: usize = 2 << 20;
/// How often another process's files in a shared folder are noticed.
const SCAN_INTERVAL: Duration = Duration::from_secs(300);

/// Where answers are kept.
#[derive(Debug)]
pub struct Tiers {
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

/// The tiers; `None` where answers are not cached. Call within a runtime.
///
/// # Errors
/// A folder that cannot be made, an address of Redis that means nothing.
pub fn open(config: &Config) -> anyhow::Result<Option<Tiers>> {
    let depth = config.output_cache_depth();
    if depth == OutputCacheType::Off {
        return Ok(None);
    }
    let memory = Arc::new(MemoryStore::new(config.output_cache_memory.0 - config.output_cache_memory.0 / REPLAY_SHARE));
    let mut slow: Vec<Arc<dyn Store>> = Vec::new();
    let mut names = vec!["memory"];
    if let Some(directory) = config.cache_dir.as_ref().filter(|_| depth >= OutputCacheType::Disk) {
        let disk = DiskStore::open(DiskConfig {
            directory: directory.clone(),
            max_bytes: config.cache_disk.0,
            max_value_bytes: MAX_DISK_VALUE_BYTES,
            scan_interval: SCAN_INTERVAL,
            breaker: BreakerConfig::default(),
        });
        names.push("disk");
        slow.push(Arc::new(disk.with_context(|| format!("--cache-dir {}", directory.display()))?));
    }
    if let Some(url) = config.redis_url.as_ref().filter(|_| depth >= OutputCacheType::Redis) {
        let read = |path: &PathBuf| fs::read(path).with_context(|| format!("--redis-ca-file {}", path.display()));
        let redis = RedisStore::open(&RedisConfig {
            url: url.expose_text().to_owned(),
            ca: config.redis_ca_file.as_ref().map(read).transpose()?,
            key_prefix: config.redis_prefix.clone(),
            max_value_bytes: MAX_REDIS_VALUE_BYTES,
            breaker: BreakerConfig::default(),
        });
        names.push("Redis");
        slow.push(Arc::new(redis.map_err(|error| anyhow!("{}: {error}", flag_of(&error)))?));
    }
    if slow.is_empty() {
        return Ok(Some(Tiers { memory, all: None }));
    }
    let all = Arc::new(TieredStore::new(Arc::clone(&memory), slow, TieredConfig::default()));
    let checked = Arc::clone(&all);
    // What is wrong with a tier is to be read in the log before the first request meets it.
    tokio::spawn(async move { checked.check().await });
    Ok(Some(Tiers { memory, all: Some(SlowTiers { store: all, names: names.join(", ") }) }))
}

/// The flag that an error in the settings of Redis is about.
fn flag_of(error: &CacheError) -> &'static str {
    match error {
        CacheError::Prefix { .. } => "--redis-prefix",
        CacheError::Ca { .. } => "--redis-ca-file",
        _ => "--redis-url",
    }
}
