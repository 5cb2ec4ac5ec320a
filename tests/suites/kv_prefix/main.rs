//! The KV-prefix tier: what one engine stored, another loads, as far as it is whole and in time.

mod counters;
mod failing_tiers;
mod memory_and_disk;
mod real_redis;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cache::store::{DiskConfig, DiskStore, MemoryStore, Store};
use cache::{BlockName, BreakerConfig, Digest, Fingerprint, KvPrefixCache, KvPrefixConfig};
use harness::{Folder, PATIENCE};
use tokio::time::Instant;

/// What a busy machine with two cores may add to a deadline.
const SLACK: Duration = Duration::from_millis(500);

const HOUR: Duration = Duration::from_secs(3600);

const BLOCK_BYTES: usize = 100_000;

const FINGERPRINT: Fingerprint = Fingerprint::from_bytes([5; 32]);

/// One with time enough for a busy machine.
fn config() -> KvPrefixConfig {
    KvPrefixConfig {
        ttl: HOUR,
        load_timeout: PATIENCE,
        write_timeout: PATIENCE,
        max_block_bytes: BLOCK_BYTES,
        rate_lifetime: HOUR,
        ..KvPrefixConfig::default()
    }
}

fn memory() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(64 << 20))
}

/// One over `slow` tiers alone.
fn over(slow: Vec<Arc<dyn Store>>) -> KvPrefixCache {
    KvPrefixCache::new(config(), None, slow, FINGERPRINT)
}

fn late() -> Instant {
    Instant::now() + PATIENCE
}

fn name(number: usize) -> BlockName {
    *Digest::new("block").number("n", number as u64).key().as_bytes()
}

fn names(count: usize) -> Vec<BlockName> {
    (0..count).map(name).collect()
}

fn payload_of(number: usize) -> Bytes {
    (0..BLOCK_BYTES).map(|at| (at.wrapping_mul(31) ^ number.wrapping_mul(17)) as u8).collect()
}

/// Stores the first blocks, and waits until every tier has them.
async fn keep(cache: &KvPrefixCache, count: usize) {
    for number in (0..count).rev() {
        cache.store(name(number), payload_of(number));
    }
    cache.settle(late()).await;
}

/// How many of the first `count` blocks are loaded: all of them the right ones.
async fn load(cache: &KvPrefixCache, count: usize) -> usize {
    // As a server does: from a task.
    let (cache, names) = (cache.clone(), names(count));
    let blocks = tokio::spawn(async move { cache.load(&names).await }).await.expect("a load does not panic");
    for (number, block) in blocks.iter().enumerate() {
        assert_eq!(*block, payload_of(number), "block {number}");
    }
    blocks.len()
}

/// A directory that goes with the test.
struct Directory(Folder);

impl Directory {
    fn new() -> Self {
        Self(Folder::new("kv"))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    fn open(&self) -> Arc<DiskStore> {
        let config = DiskConfig {
            directory: self.0.to_path_buf(),
            max_bytes: 1 << 30,
            max_value_bytes: 1 << 20,
            scan_interval: HOUR,
            breaker: BreakerConfig::default(),
        };
        Arc::new(DiskStore::open(config).expect("the directory can be made"))
    }

    fn file(&self, number: usize) -> PathBuf {
        let hex = hex(number);
        self.0.join("kv").join(&hex[..2]).join(hex)
    }
}

fn hex(number: usize) -> String {
    cache::Key::from_bytes(name(number)).to_hex()
}
