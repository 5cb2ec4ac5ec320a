//! Where the routed experts of a model go: all into memory with it, or into a store under a budget.

use crate::config::{EngineConfig, ExpertMemory, ExpertWarmup};
use crate::error::EngineError;
use crate::experts::{ExpertCatalog, ExpertPolicy, ExpertProfile, ExpertStore, StoreConfig};
use crate::models::ModelShape;
use crate::weights::loader::LoadProgress;

/// A model without its experts.
pub struct Host<'a> {
    pub shape: &'a ModelShape,
    /// See [`crate::Fingerprint::sampled_weights`].
    pub weights: [u8; 32],
    /// What else of it is in memory.
    pub weight_bytes: u64,
}

/// The store of the experts in `catalog`, warm; `None` where the budget has room for all.
///
/// # Errors
/// A budget that is too small, a profile of another model, a file that cannot be read.
pub fn open_store(
    config: &EngineConfig,
    memory: ExpertMemory,
    (catalog, host): (ExpertCatalog, &Host<'_>),
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Option<ExpertStore>, EngineError> {
    let all = catalog.num_bytes();
    let capacity_bytes = memory.bytes(all);
    if capacity_bytes >= all {
        tracing::info!(expert_bytes = all, "all experts have room: they stay in memory as without --expert-memory");
        return Ok(None);
    }
    let profile = config.experts.profile.as_deref().map(|path| read_profile(path, host)).transpose()?;
    let hottest = profile.map_or(Vec::new(), |profile| profile.hottest(&catalog.bytes(), capacity_bytes));
    let first = match config.experts.warmup {
        ExpertWarmup::Hot => hottest.clone(),
        // What is hot, and what is kept, must not find its room taken.
        ExpertWarmup::All => hottest.iter().copied().chain(catalog.ids()).collect(),
        ExpertWarmup::None => Vec::new(),
    };
    let kept = if config.experts.policy == ExpertPolicy::Pinned { hottest } else { Vec::new() };
    // What the page cache can hold is read from the disk once; what it cannot would only push other things out of it.
    let free = config.available_memory.saturating_sub(host.weight_bytes).saturating_sub(capacity_bytes);
    let cached = (free >= all).then_some(kernels::ReadMode::Cached);
    let store = StoreConfig {
        capacity_bytes,
        policy: config.experts.policy,
        kept,
        prefetch: config.experts.prefetch,
        read_mode: config.experts.read_mode.or(cached),
    };
    let mut store = ExpertStore::new(catalog, store)?;
    store.warm_up(&first, progress)?;
    Ok(Some(store))
}

fn read_profile(path: &std::path::Path, host: &Host<'_>) -> Result<ExpertProfile, EngineError> {
    let profile = ExpertProfile::read(path)?;
    if let Some(doubt) = profile.check(host.shape.own_moe_layers(), host.weights)? {
        tracing::warn!(path = %path.display(), doubt, "the expert profile may be of another model");
    }
    Ok(profile)
}
