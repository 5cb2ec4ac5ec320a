//! Memory over disk over Redis: found below, kept above; a tier that fails is passed over.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::CacheError;
use crate::store::{Address, Found, Kind, MemoryStore, Store, TierStats, Value};
use crate::telemetry;

/// What waits to be written to slow tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TieredConfig {
    /// Bytes of values that wait; what comes when it is full is not written. At most `u32::MAX`.
    pub max_pending_bytes: u32,
    /// Time that a write may take.
    pub write_timeout: Duration,
}

impl Default for TieredConfig {
    fn default() -> Self {
        Self { max_pending_bytes: 64 << 20, write_timeout: Duration::from_secs(1) }
    }
}

/// What a value that waits costs beside its payload.
const PENDING_OVERHEAD: usize = 1024;

/// Looks go down the tiers until one has the value. Writes reach memory at once and the slow tiers in the background.
#[derive(Debug)]
pub struct TieredStore {
    memory: Arc<MemoryStore>,
    slow: Vec<Arc<dyn Store>>,
    config: TieredConfig,
    /// One permit per byte that may wait.
    pending: Arc<Semaphore>,
}

impl TieredStore {
    /// `slow` are the tiers under memory, fastest first.
    pub fn new(memory: Arc<MemoryStore>, slow: Vec<Arc<dyn Store>>, config: TieredConfig) -> Self {
        let pending = Arc::new(Semaphore::new(config.max_pending_bytes as usize));
        Self { memory, slow, config, pending }
    }

    /// Returns when nothing waits to be written, or at the deadline.
    pub async fn settle(&self, deadline: Instant) {
        let all = self.pending.acquire_many(self.config.max_pending_bytes);
        // Past the deadline the writes go on by themselves.
        drop(tokio::time::timeout_at(deadline, all).await);
    }

    async fn find(&self, address: &Address, deadline: Instant) -> Result<Option<Found>, CacheError> {
        // An error was counted by the tier: the next one is asked.
        if let Ok(Some(found)) = self.memory.get(address, deadline).await {
            return Ok(Some(found));
        }
        for (depth, tier) in self.slow.iter().enumerate() {
            let num_left = u32::try_from(self.slow.len() - depth).expect("there are few tiers");
            let now = Instant::now();
            let share = now + deadline.saturating_duration_since(now) / num_left;
            if let Ok(Some(found)) = tier.get(address, share).await {
                self.promote(address, &found, depth, deadline).await;
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Keeps what tier `depth` had in the tiers above it.
    async fn promote(&self, address: &Address, found: &Found, depth: usize, deadline: Instant) {
        if found.ttl < Duration::from_millis(1) {
            return;
        }
        let value = Value { payload: found.payload.clone(), ttl: found.ttl };
        for tier in &self.slow[..depth] {
            self.write_later(tier, address, value.clone());
        }
        // What memory refuses is found below again.
        drop(self.memory.put(address, value, deadline).await);
    }

    fn write_later(&self, tier: &Arc<dyn Store>, address: &Address, value: Value) {
        let Some(permit) = self.reserve(value.payload.len()) else {
            telemetry::dropped_write(address.kind);
            return;
        };
        let (tier, address) = (Arc::clone(tier), *address);
        let deadline = Instant::now() + self.config.write_timeout;
        tokio::spawn(async move {
            // An error was counted by the tier.
            drop(tier.put(&address, value, deadline).await);
            drop(permit);
        });
    }

    fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes.saturating_add(PENDING_OVERHEAD)).ok()?;
        Arc::clone(&self.pending).try_acquire_many_owned(bytes).ok()
    }

    fn tiers(&self) -> impl Iterator<Item = &dyn Store> {
        let memory: &dyn Store = &*self.memory;
        std::iter::once(memory).chain(self.slow.iter().map(AsRef::as_ref))
    }
}

impl Store for TieredStore {
    fn get<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        self.find(address, deadline).boxed()
    }

    /// Returns when memory has it. An error is memory's; the slow tiers are given the value all the same.
    fn put<'a>(
        &'a self,
        address: &'a Address,
        value: Value,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<(), CacheError>> {
        async move {
            for tier in &self.slow {
                self.write_later(tier, address, value.clone());
            }
            self.memory.put(address, value, deadline).await
        }
        .boxed()
    }

    fn remove<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        async move {
            let results = futures::future::join_all(self.tiers().map(|tier| tier.remove(address, deadline))).await;
            results.into_iter().collect()
        }
        .boxed()
    }

    fn clear(&self, kind: Option<Kind>, deadline: Instant) -> BoxFuture<'_, Result<(), CacheError>> {
        async move {
            // What waits would come back after.
            self.settle(deadline).await;
            let results = futures::future::join_all(self.tiers().map(|tier| tier.clear(kind, deadline))).await;
            results.into_iter().collect()
        }
        .boxed()
    }

    fn check(&self) -> BoxFuture<'_, ()> {
        futures::future::join_all(self.tiers().map(Store::check)).map(drop).boxed()
    }

    fn stats(&self, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            let rows = futures::future::join_all(self.tiers().map(|tier| tier.stats(deadline))).await;
            rows.into_iter().flatten().collect()
        }
        .boxed()
    }

    fn stats_of(&self, kind: Kind, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            let rows = futures::future::join_all(self.tiers().map(|tier| tier.stats_of(kind, deadline))).await;
            rows.into_iter().flatten().collect()
        }
        .boxed()
    }
}
