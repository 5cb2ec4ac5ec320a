//! Values in this process: bounded in bytes, each with its own lifetime.

use std::time::{Duration, Instant as StdInstant};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use moka::Expiry;
use moka::future::Cache;
use moka::policy::EvictionPolicy;
use tokio::time::Instant;

use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Store, Tier, TierStats, Value, check_ttl};
use crate::telemetry::{self, Call, measured};

/// What the map keeps beside the payload of an entry, roughly: address, lifetime, list nodes.
const ENTRY_OVERHEAD: usize = 256;

/// A bounded map. What was used least recently goes first.
#[derive(Debug)]
pub struct MemoryStore {
    map: Cache<Address, Entry>,
    max_bytes: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    payload: Bytes,
    expires: StdInstant,
}

struct PerEntry;

impl Expiry<Address, Entry> for PerEntry {
    fn expire_after_create(&self, _: &Address, entry: &Entry, now: StdInstant) -> Option<Duration> {
        Some(entry.expires.saturating_duration_since(now))
    }

    fn expire_after_update(
        &self,
        _: &Address,
        entry: &Entry,
        now: StdInstant,
        _left: Option<Duration>,
    ) -> Option<Duration> {
        Some(entry.expires.saturating_duration_since(now))
    }
}

impl MemoryStore {
    /// Holds `max_bytes` of payloads with what the map needs for them.
    pub fn new(max_bytes: u64) -> Self {
        let map = Cache::builder()
            .max_capacity(max_bytes)
            .weigher(|_, entry: &Entry| u32::try_from(entry.payload.len() + ENTRY_OVERHEAD).unwrap_or(u32::MAX))
            // Not LFU: the answer to the request that was just sent must be there for the next one.
            .eviction_policy(EvictionPolicy::lru())
            .expire_after(PerEntry)
            .support_invalidation_closures()
            .build();
        Self { map, max_bytes }
    }

    /// Whether it is there. Looking does not count as use.
    pub fn contains(&self, address: &Address) -> bool {
        self.map.contains_key(address)
    }

    async fn find(&self, address: &Address) -> Option<Found> {
        let entry = self.map.get(address).await?;
        let ttl = entry.expires.saturating_duration_since(StdInstant::now());
        (!ttl.is_zero()).then_some(Found { payload: entry.payload, tier: Tier::Memory, ttl })
    }

    async fn keep(&self, address: &Address, value: Value) -> Result<(), CacheError> {
        check_ttl(value.ttl)?;
        let limit = usize::try_from(self.max_bytes).unwrap_or(usize::MAX).saturating_sub(ENTRY_OVERHEAD);
        let bytes = value.payload.len();
        if bytes > limit {
            return Err(CacheError::TooLarge { tier: Tier::Memory, bytes, limit });
        }
        self.map.insert(*address, Entry { payload: value.payload, expires: StdInstant::now() + value.ttl }).await;
        telemetry::written(Tier::Memory, address.kind, bytes);
        Ok(())
    }
}

impl Store for MemoryStore {
    fn get<'a>(&'a self, address: &'a Address, _: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        measured(Call::Get, Tier::Memory, address.kind, async { Ok(self.find(address).await) }).boxed()
    }

    fn put<'a>(&'a self, address: &'a Address, value: Value, _: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        measured(Call::Put, Tier::Memory, address.kind, self.keep(address, value)).boxed()
    }

    fn remove<'a>(&'a self, address: &'a Address, _: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        async {
            self.map.invalidate(address).await;
            Ok(())
        }
        .boxed()
    }

    fn contains_many<'a>(
        &'a self,
        addresses: &'a [Address],
        _: Instant,
    ) -> BoxFuture<'a, Result<Vec<bool>, CacheError>> {
        async { Ok(addresses.iter().map(|address| self.contains(address)).collect()) }.boxed()
    }

    fn clear(&self, kind: Option<Kind>, _: Instant) -> BoxFuture<'_, Result<(), CacheError>> {
        async move {
            match kind {
                None => self.map.invalidate_all(),
                Some(kind) => {
                    self.map
                        .invalidate_entries_if(move |address, _| address.kind == kind)
                        .expect("the map was built with support for predicates");
                }
            }
            self.map.run_pending_tasks().await;
            Ok(())
        }
        .boxed()
    }

    /// There is nothing that could be wrong with it.
    fn check(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }

    fn stats(&self, _: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async {
            self.map.run_pending_tasks().await;
            vec![TierStats {
                tier: Tier::Memory,
                is_available: true,
                num_entries: Some(self.map.entry_count()),
                bytes: Some(self.map.weighted_size()),
                max_bytes: Some(self.max_bytes),
            }]
        }
        .boxed()
    }

    fn stats_of(&self, kind: Kind, _: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            self.map.run_pending_tasks().await;
            let of_kind = self.map.iter().filter(|(address, _)| address.kind == kind);
            let (num_entries, bytes) = of_kind.fold((0, 0), |(num_entries, bytes), (_, entry)| {
                (num_entries + 1, bytes + (entry.payload.len() + ENTRY_OVERHEAD) as u64)
            });
            vec![TierStats {
                tier: Tier::Memory,
                is_available: true,
                num_entries: Some(num_entries),
                bytes: Some(bytes),
                max_bytes: Some(self.max_bytes),
            }]
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Digest, Fingerprint};

    const HOUR: Duration = Duration::from_secs(3600);

    fn address(kind: Kind, number: u64) -> Address {
        let key = Digest::new("test").number("n", number).key();
        Address { kind, key, fingerprint: Fingerprint::from_bytes([0; 32]) }
    }

    fn value(len: usize) -> Value {
        Value { payload: Bytes::from(vec![7; len]), ttl: HOUR }
    }

    fn now() -> Instant {
        Instant::now()
    }

    #[tokio::test]
    async fn a_value_is_found_until_it_is_removed() {
        let store = MemoryStore::new(1 << 20);
        let (a, b) = (address(Kind::Output, 1), address(Kind::Output, 2));
        store.put(&a, value(3), now()).await.unwrap();
        let found = store.get(&a, now()).await.unwrap().unwrap();
        assert_eq!((&found.payload[..], found.tier), (&[7, 7, 7][..], Tier::Memory));
        assert!(found.ttl <= HOUR && found.ttl > HOUR - Duration::from_secs(60));
        assert_eq!(store.get(&b, now()).await.unwrap(), None);
        let foreign = Address { fingerprint: Fingerprint::from_bytes([1; 32]), ..a };
        assert_eq!(store.get(&foreign, now()).await.unwrap(), None);
        store.remove(&a, now()).await.unwrap();
        assert_eq!(store.get(&a, now()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn clearing_takes_one_kind_or_all() {
        let store = MemoryStore::new(1 << 20);
        let (output, kv) = (address(Kind::Output, 1), address(Kind::Kv, 1));
        for address in [output, kv] {
            store.put(&address, value(3), now()).await.unwrap();
        }
        store.clear(Some(Kind::Output), now()).await.unwrap();
        assert_eq!(store.get(&output, now()).await.unwrap(), None);
        assert!(store.get(&kv, now()).await.unwrap().is_some());
        store.clear(None, now()).await.unwrap();
        assert_eq!(store.get(&kv, now()).await.unwrap(), None);
        assert_eq!(store.stats(now()).await[0].num_entries, Some(0));
        store.put(&output, value(3), now()).await.unwrap();
        assert!(store.get(&output, now()).await.unwrap().is_some(), "clearing is not for ever");
    }

    #[tokio::test]
    async fn bytes_are_bounded_and_the_newest_stay() {
        let max_bytes = 10_000;
        let store = MemoryStore::new(max_bytes);
        for number in 0..100 {
            store.put(&address(Kind::Output, number), value(1000), now()).await.unwrap();
        }
        let stats = store.stats(now()).await[0];
        assert!(stats.bytes.unwrap() <= max_bytes && stats.num_entries.unwrap() >= 5, "{stats:?}");
        assert!(store.get(&address(Kind::Output, 99), now()).await.unwrap().is_some());
        let refused = store.put(&address(Kind::Output, 100), value(10_001), now()).await;
        assert!(matches!(refused, Err(CacheError::TooLarge { bytes: 10_001, .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn a_lifetime_has_limits() {
        let store = MemoryStore::new(1 << 20);
        for ttl in [Duration::ZERO, Duration::MAX] {
            let refused = store.put(&address(Kind::Kv, 1), Value { ttl, ..value(1) }, now()).await;
            assert!(matches!(refused, Err(CacheError::Lifetime { .. })), "{refused:?}");
        }
    }
}
