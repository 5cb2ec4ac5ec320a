//! The routing cache: which experts the tokens of a block took, found by the block's name before it is computed again.

mod profile;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

pub use profile::{NO_EXPERT, Profile, RoutedLayer};

use crate::key::{Digest, Fingerprint};
use crate::store::{Address, Kind, MemoryStore, Store, Tier, Value};
use crate::telemetry;

/// A profile is right as long as its block has its name, so this only clears away what nobody asks for.
const TTL: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a routing cache is given besides its stores.
#[derive(Clone, Debug)]
pub struct RoutingCacheConfig {
    pub fingerprint: Fingerprint,
    /// The routers of the model, in the order in which a token meets them.
    pub layers: Arc<[RoutedLayer]>,
}

/// Profiles of blocks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RoutingCache {
    memory: Arc<MemoryStore>,
    /// Memory, and what is below it.
    store: Arc<dyn Store>,
    config: RoutingCacheConfig,
}

impl RoutingCache {
    /// `store` has `memory` as its first tier, or is it.
    pub fn new(memory: Arc<MemoryStore>, store: Arc<dyn Store>, config: RoutingCacheConfig) -> Self {
        Self { memory, store, config }
    }

    pub fn layers(&self) -> &[RoutedLayer] {
        &self.config.layers
    }

    pub fn memory(&self) -> &Arc<MemoryStore> {
        &self.memory
    }

    /// Keeps what the tokens of a block took: `[token][layer][top_k]`. Slow tiers are written in the background, and not where
    /// memory has it already.
    pub async fn learn(&self, block: &[u8; 32], experts: &[u16], deadline: Instant) {
        let address = self.address(block);
        let payload = Profile::of_tokens(self.layers(), experts).to_bytes();
        if matches!(self.memory.get(&address, deadline).await, Ok(Some(found)) if found.payload == payload) {
            return;
        }
        // An error was counted by the tier.
        drop(self.store.put(&address, Value { payload, ttl: TTL }, deadline).await);
    }

    /// What is known of the leading blocks of these names, up to the first that nobody has seen; from memory alone.
    pub async fn remembered(&self, blocks: &[[u8; 32]]) -> Vec<Profile> {
        let now = Instant::now();
        let mut known = Vec::new();
        for block in blocks {
            match self.look_in(&*self.memory, block, now).await {
                Some((profile, _)) => known.push(profile),
                None => break,
            }
        }
        known
    }

    /// The profile of a block and where it was, from any tier that answers by the deadline.
    pub async fn find(&self, block: &[u8; 32], deadline: Instant) -> Option<(Profile, Tier)> {
        self.look_in(&*self.store, block, deadline).await
    }

    async fn look_in(&self, store: &dyn Store, block: &[u8; 32], deadline: Instant) -> Option<(Profile, Tier)> {
        let address = self.address(block);
        let found = store.get(&address, deadline).await.ok().flatten()?;
        match Profile::from_bytes(self.layers(), found.payload) {
            Ok(profile) => Some((profile, found.tier)),
            Err(bad) => {
                telemetry::bad_value(&bad, found.tier, Kind::Routing);
                drop(store.remove(&address, deadline).await);
                None
            }
        }
    }

    /// Block names say which numerics made them, not which weights.
    fn address(&self, block: &[u8; 32]) -> Address {
        let fingerprint = self.config.fingerprint;
        let key = Digest::new("routing").fingerprint_field(&fingerprint).field("block", block).key();
        Address { kind: Kind::Routing, key, fingerprint }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: [RoutedLayer; 2] =
        [RoutedLayer { num_experts: 16, top_k: 2 }, RoutedLayer { num_experts: 4, top_k: 1 }];

    fn cache(memory: &Arc<MemoryStore>, fingerprint: u8) -> RoutingCache {
        let fingerprint = Fingerprint::from_bytes([fingerprint; 32]);
        let config = RoutingCacheConfig { fingerprint, layers: LAYERS.into() };
        RoutingCache::new(Arc::clone(memory), Arc::clone(memory) as Arc<dyn Store>, config)
    }

    #[tokio::test]
    async fn a_prefix_is_known_up_to_the_first_unknown_block() {
        let memory = Arc::new(MemoryStore::new(1 << 20));
        let cache_of = |fingerprint| cache(&memory, fingerprint);
        let routing = cache_of(1);
        let now = Instant::now();
        let blocks = [[1; 32], [2; 32], [3; 32], [4; 32]];
        for idx in [0, 1, 3] {
            routing.learn(&blocks[idx], &[idx as u16, 15, 0, 7, 15, 3], now).await;
        }
        let known = routing.remembered(&blocks).await;
        let shares: Vec<_> = known.iter().map(|profile| profile.shares(&LAYERS)[0][0].0).collect();
        assert_eq!(shares, [0, 1]);
        assert_eq!(routing.find(&blocks[3], now).await.map(|(_, tier)| tier), Some(Tier::Memory));
        assert_eq!(cache_of(2).find(&blocks[3], now).await, None, "made by other weights");
    }

    #[tokio::test]
    async fn what_is_no_profile_is_a_miss_and_gone() {
        let memory = Arc::new(MemoryStore::new(1 << 20));
        let routing = cache(&memory, 1);
        let (address, now) = (routing.address(&[1; 32]), Instant::now());
        memory.put(&address, Value { payload: vec![1; 9].into(), ttl: TTL }, now).await.unwrap();
        assert_eq!(routing.find(&[1; 32], now).await, None);
        assert_eq!(memory.get(&address, now).await.unwrap(), None);
    }
}
