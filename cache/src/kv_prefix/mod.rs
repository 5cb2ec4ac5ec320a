//! The KV-prefix tier: full blocks of keys and values by name, in memory, on disk and in Redis.
//!
//! | file | what is in it |
//! |---|---|
//! | `look_up` | how much of a prefix is somewhere, and how soon it could be here |
//! | `load` | its blocks, batch by batch, from wherever they are |
//! | `writes` | blocks that wait to be written to a slow tier |
//! | `known` | which blocks a tier was given or had lately |
//! | `rates` | how long loading takes, as measured |

mod known;
mod load;
mod look_up;
mod rates;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{FutureExt as _, join_all};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::rates::Rates;
use self::writes::{Limits, SlowTier};
use crate::error::CacheError;
use crate::key::{Fingerprint, Key};
use crate::store::{Address, Kind, MemoryStore, Store, TierStats, Value};
use crate::telemetry;

/// What a block is stored under: a hash over every token before its end, the numerics fingerprint and the tenant's salt.
pub type BlockName = [u8; 32];

/// Payloads that are read or written by one call to a tier.
const BATCH_BYTES: usize = 4 << 20;
const MAX_BATCH_LEN: usize = 32;

/// What a KV-prefix tier is given besides its stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPrefixConfig {
    /// Lifetime of a stored block; between 1 ms and [`crate::store::MAX_TTL`].
    pub ttl: Duration,
    /// Time that loading a prefix may take, its wait for a turn included.
    pub load_timeout: Duration,
    /// Time that a slow tier may take for a batch of blocks that it is given.
    pub write_timeout: Duration,
    /// Bytes of a block's payload; larger ones are neither kept nor loaded. At least 1.
    pub max_block_bytes: usize,
    /// Bytes of blocks that wait to be written, shared out among the slow tiers. What comes beyond is not written.
    pub max_pending_bytes: usize,
    /// Prefixes that are loaded from slow tiers at once; the others wait for their turn. At least 1.
    pub max_loads: usize,
    /// Bytes of blocks on their way from slow tiers and not yet handed over, of all loads. A load gives no more than that at a time;
    /// one block always.
    pub max_load_bytes: usize,
    /// A measured rate is not believed for longer: what was slow may not be any more, and is found out by trying.
    pub rate_lifetime: Duration,
}

impl Default for KvPrefixConfig {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            load_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(2),
            max_block_bytes: 1 << 20,
            max_pending_bytes: 256 << 20,
            max_loads: 4,
            max_load_bytes: 256 << 20,
            rate_lifetime: Duration::from_secs(60),
        }
    }
}

/// What a look-up found. It may turn out wrong: blocks go, and may be bad.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvHint {
    /// Leading blocks that are somewhere.
    pub num_blocks: usize,
    /// Predicted time of loading one of them from where they are; `None` where a tier that has some was not measured lately.
    pub seconds_per_block: Option<f64>,
}

/// KV blocks that outlive their place in the engine's arena. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KvPrefixCache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: KvPrefixConfig,
    fingerprint: Fingerprint,
    memory: Option<Arc<MemoryStore>>,
    slow: Vec<SlowTier>,
    /// Of memory, then of the slow tiers.
    rates: Rates,
    /// One permit per load from slow tiers.
    loads: Semaphore,
    /// One permit per block on its way.
    room: Semaphore,
}

impl KvPrefixCache {
    /// `memory` holds nothing else; `slow` are the tiers under it, fastest first, which may hold other kinds too. Call within a
    /// runtime: what waits for slow tiers is written by tasks of it, which end with the last clone of the cache.
    pub fn new(
        config: KvPrefixConfig,
        memory: Option<Arc<MemoryStore>>,
        slow: Vec<Arc<dyn Store>>,
        fingerprint: Fingerprint,
    ) -> Self {
        let limits = Limits {
            max_pending_bytes: config.max_pending_bytes / slow.len().max(1),
            batch_len: config.batch_len(),
            timeout: config.write_timeout,
            fingerprint,
        };
        let slow: Vec<_> = slow.into_iter().map(|store| SlowTier::new(store, limits)).collect();
        let room = config.max_load_len().min(Semaphore::MAX_PERMITS);
        Self {
            inner: Arc::new(Inner {
                config,
                fingerprint,
                memory,
                rates: Rates::new(1 + slow.len(), config.rate_lifetime),
                slow,
                loads: Semaphore::new(config.max_loads.clamp(1, Semaphore::MAX_PERMITS)),
                room: Semaphore::new(room),
            }),
        }
    }

    /// How many leading blocks of `names` are somewhere, as many as one load gives, and how long loading one would take. Reads no
    /// payload; ends by the deadline.
    pub async fn look_up(&self, names: &[BlockName], deadline: Instant) -> KvHint {
        let most = self.inner.config.max_load_len();
        self.inner.look_up(&names[..names.len().min(most)], deadline).await
    }

    /// Payloads of the leading `names`, in their order, ending before the first that is missing, late or bad. Ends by the timeout of
    /// loads, with what is there by then.
    pub async fn load(&self, names: &[BlockName]) -> Vec<Bytes> {
        let start = Instant::now();
        let blocks = self.inner.load(names, start + self.inner.config.load_timeout).await;
        telemetry::loaded_blocks(start.elapsed());
        blocks
    }

    /// Keeps a block in every tier that is not known to have it. Never waits, and may be called from any thread; what finds no room is
    /// not kept, and counted.
    pub fn store(&self, name: BlockName, payload: Bytes) {
        self.inner.store(name, &payload);
    }

    /// Whether [`Self::store`] of this name would do nothing: every tier has it, or is about to be given it.
    pub fn is_known(&self, name: &BlockName) -> bool {
        let is_in_memory = self.inner.memory.as_ref().is_none_or(|memory| memory.contains(&self.inner.address(name)));
        is_in_memory && self.inner.slow.iter().all(|tier| tier.knows(name))
    }

    /// Returns when nothing waits to be written, or at the deadline.
    pub async fn settle(&self, deadline: Instant) {
        join_all(self.inner.slow.iter().map(|tier| tier.settle(deadline))).await;
    }

    /// Removes all KV blocks, of others that share a tier too.
    ///
    /// # Errors
    /// Some may be left.
    pub async fn clear(&self, deadline: Instant) -> Result<(), CacheError> {
        // What waits would come back after; a tier that takes its time leaves some for the rest.
        let now = Instant::now();
        self.settle(now + deadline.saturating_duration_since(now) / 2).await;
        let results = join_all(self.inner.stores().map(|store| store.clear(Some(Kind::Kv), deadline))).await;
        for tier in &self.inner.slow {
            tier.forget_all();
        }
        results.into_iter().collect()
    }

    /// One row per tier, fastest first: what of it is KV blocks, where the tier can tell.
    pub async fn stats(&self, deadline: Instant) -> Vec<TierStats> {
        let rows = join_all(self.inner.stores().map(|store| store.stats_of(Kind::Kv, deadline))).await;
        rows.into_iter().flatten().collect()
    }
}

impl Inner {
    fn address(&self, name: &BlockName) -> Address {
        Address { kind: Kind::Kv, key: Key::from_bytes(*name), fingerprint: self.fingerprint }
    }

    fn stores(&self) -> impl Iterator<Item = &dyn Store> {
        let memory = self.memory.iter().map(|memory| &**memory as &dyn Store);
        memory.chain(self.slow.iter().map(|tier| tier.store()))
    }

    fn store(&self, name: BlockName, payload: &Bytes) {
        if payload.len() > self.config.max_block_bytes {
            telemetry::dropped_write(Kind::Kv);
            return;
        }
        let value = Value { payload: payload.clone(), ttl: self.config.ttl };
        let address = self.address(&name);
        if let Some(memory) = self.memory.as_ref().filter(|memory| !memory.contains(&address)) {
            // Memory takes it at once, or is too busy; what it refuses is counted by it.
            if memory.put(&address, value.clone(), Instant::now()).now_or_never().is_none() {
                telemetry::dropped_write(Kind::Kv);
            }
        }
        for tier in &self.slow {
            tier.write_later(name, value.clone());
        }
    }
}

impl KvPrefixConfig {
    /// Blocks of one load from slow tiers.
    fn max_load_len(&self) -> usize {
        (self.max_load_bytes / self.max_block_bytes.max(1)).max(1)
    }

    /// Blocks of one call to a tier.
    fn batch_len(&self) -> usize {
        (BATCH_BYTES / self.max_block_bytes.max(1)).clamp(1, MAX_BATCH_LEN)
    }
}
