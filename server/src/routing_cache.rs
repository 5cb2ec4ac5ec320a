//! Which experts prompts take: learned from the engine block by block, remembered in all tiers, and said to it before a known
//! prefix is computed again.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cache::store::{Kind, MemoryStore, Store, Tier, TieredStore};
use cache::{Fingerprint, Profile, RoutedLayer, RoutingCache, RoutingCacheConfig};
use engine::{EngineHandle, ExpectedExperts, LearnedBlock};
use metrics::gauge;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::cache_tiers::{CacheTiers, SlowTiers};

/// Computed blocks that wait to be remembered.
const MAX_LEARNED: usize = 512;
/// Blocks of a prompt that are looked for before it is computed: what comes first is of use first.
const MAX_ANNOUNCED: usize = 256;
/// Requests for which slow tiers are asked at a time; those beyond do with memory.
const MAX_LOOKS: usize = 64;

/// The routing cache of one model.
#[derive(Debug)]
pub struct Routing {
    memory: Arc<MemoryStore>,
    /// In memory, under a fingerprint of this process.
    early: RoutingCache,
    /// In all tiers, once the weights' digest is known.
    whole: Arc<OnceLock<RoutingCache>>,
    tiers: Option<Arc<TieredStore>>,
    /// Time that slow tiers get for a request.
    budget: Duration,
    looks: Arc<Semaphore>,
}

impl Routing {
    /// Learns from now on; `None` where the engine's blocks have no names, or its model no experts.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn open(
        engine: &EngineHandle,
        tiers: CacheTiers,
        budget: Duration,
        runtime: &Handle,
    ) -> std::io::Result<Option<Arc<Self>>> {
        let Some(learned) = engine.learned_blocks(MAX_LEARNED) else { return Ok(None) };
        let layer = |layer: &engine::MoeShape| RoutedLayer { num_experts: layer.num_experts, top_k: layer.top_k };
        let layers: Arc<[RoutedLayer]> = engine.model().routed.layers().iter().map(layer).collect();
        let config = move |fingerprint| RoutingCacheConfig { fingerprint, layers: Arc::clone(&layers) };
        let CacheTiers { memory, all } = tiers;
        let of_process = config(Fingerprint::from_bytes(engine.fingerprint().numerics()));
        let routing = Arc::new(Self {
            early: RoutingCache::new(Arc::clone(&memory), Arc::clone(&memory) as Arc<dyn Store>, of_process),
            whole: Arc::default(),
            tiers: all.as_ref().map(|all| Arc::clone(&all.store)),
            budget,
            looks: Arc::new(Semaphore::new(MAX_LOOKS)),
            memory: Arc::clone(&memory),
        });
        runtime.spawn(Arc::clone(&routing).learn(learned));
        if let Some(SlowTiers { store, names }) = all {
            let (whole, engine) = (Arc::clone(&routing.whole), engine.clone());
            std::thread::Builder::new().name("routing-digest".to_owned()).spawn(move || {
                let config = config(Fingerprint::from_bytes(engine.fingerprint().whole()));
                drop(whole.set(RoutingCache::new(memory, store, config)));
                tracing::info!("the routing of prompts is looked for in {names}");
            })?;
        }
        Ok(Some(routing))
    }

    fn current(&self) -> &RoutingCache {
        self.whole.get().unwrap_or(&self.early)
    }

    pub fn layers(&self) -> &[RoutedLayer] {
        self.early.layers()
    }

    pub fn memory(&self) -> &Arc<MemoryStore> {
        &self.memory
    }

    async fn learn(self: Arc<Self>, mut learned: mpsc::Receiver<LearnedBlock>) {
        while let Some(LearnedBlock { name, experts }) = learned.recv().await {
            self.current().learn(&name, &experts, Instant::now() + self.budget).await;
        }
    }

    /// What the prompt's blocks are expected to take: what memory has of them now, and what slow tiers have as they say so,
    /// which nobody waits for. `None` where nothing can become known.
    pub async fn announce(
        &self,
        engine: &EngineHandle,
        prompt: &[u32],
        salt: &[u8; 32],
    ) -> Option<Arc<ExpectedExperts>> {
        let num_tokens = prompt.len().min(MAX_ANNOUNCED * engine.model().block_size);
        let names = engine.block_names(&prompt[..num_tokens], salt);
        let cache = self.current();
        let known = cache.remembered(&names).await;
        let has_more = self.whole.get().is_some() && known.len() < names.len();
        let look = has_more.then(|| Arc::clone(&self.looks).try_acquire_owned().ok()).flatten();
        if known.is_empty() && look.is_none() {
            return None;
        }
        let expected = Arc::new(ExpectedExperts::new(names.len()));
        for (idx, profile) in known.iter().enumerate() {
            expected.expect(idx, profile.used(cache.layers()));
        }
        if let Some(look) = look {
            let (cache, expected, deadline) = (cache.clone(), Arc::clone(&expected), Instant::now() + self.budget);
            let num_known = known.len();
            tokio::spawn(async move {
                for (idx, name) in names.iter().enumerate().skip(num_known) {
                    let Some((profile, _)) = cache.find(name, deadline).await else { break };
                    expected.expect(idx, profile.used(cache.layers()));
                }
                drop(look);
            });
        }
        Some(expected)
    }

    /// The leading blocks of these names that are known, and where each was, as far as the tiers say so by the deadline.
    pub async fn prefix(&self, names: &[[u8; 32]], deadline: Instant) -> Vec<(Profile, Tier)> {
        let mut known = Vec::new();
        for name in names {
            match self.current().find(name, deadline).await {
                Some(found) => known.push(found),
                None => break,
            }
        }
        known
    }

    /// Sets the gauges of what memory holds.
    pub async fn observe(&self) {
        for row in self.memory.stats(Instant::now() + self.budget).await {
            gauge!("moesaic_routing_cache_bytes").set(row.bytes.unwrap_or(0) as f64);
            gauge!("moesaic_routing_cache_entries").set(row.num_entries.unwrap_or(0) as f64);
        }
    }

    /// Forgets all of them, in every tier.
    ///
    /// # Errors
    /// A tier did not finish by the deadline: some may be left.
    pub async fn clear(&self, deadline: Instant) -> Result<(), cache::CacheError> {
        match &self.tiers {
            Some(tiers) => tiers.clear(Some(Kind::Routing), deadline).await,
            None => self.memory.clear(Some(Kind::Routing), deadline).await,
        }
    }

    /// Waits until what was learned is written to slow tiers, or for the deadline.
    pub async fn settle(&self, deadline: Instant) {
        if let Some(tiers) = &self.tiers {
            tiers.settle(deadline).await;
        }
    }
}
