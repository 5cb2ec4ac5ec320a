//! `/v1/cache`: what caches hold, and emptying them. Both want the admin key.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cache::store::{Store as _, TierStats};
use serde::Serialize;
use tokio::time::{Duration, Instant};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::ApiError;
use crate::openai::error::ErrorResponse;
use crate::output_cache::OutputCache;

/// Time that a tier gets for a count, or for emptying itself: an operator waits longer than a request may.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the caches hold.
#[derive(Serialize, ToSchema)]
pub struct CacheStats {
    /// Fastest first; empty where the output cache is off.
    tiers: Vec<TierReport>,
    /// Answers that are being computed and that other requests may join.
    num_flights: usize,
    /// The routing cache's own memory; null where it is off. In slow tiers its values are among the others.
    routing: Option<TierReport>,
    /// Where blocks of prompts are kept beyond the KV cache, fastest first; what slow tiers hold of other kinds is counted too.
    kv: Vec<TierReport>,
}

/// One place that keeps values.
#[derive(Serialize, ToSchema)]
pub struct TierReport {
    /// `memory`, `disk` or `redis`.
    tier: &'static str,
    /// It answers now.
    available: bool,
    /// Null where the tier does not tell, as Redis.
    entries: Option<u64>,
    bytes: Option<u64>,
    max_bytes: Option<u64>,
}

/// What was emptied.
#[derive(Serialize, ToSchema)]
pub struct CacheCleared {
    /// False where a tier did not finish: some values may be left in it.
    complete: bool,
}

/// Entries and bytes of each tier
#[utoipa::path(
    get,
    path = "/v1/cache",
    tag = "operation",
    responses(
        (status = 200, body = CacheStats),
        (status = "4XX", description = "No admin key, or a wrong one", body = ErrorResponse),
    )
)]
pub async fn stats(State(app): State<Arc<App>>) -> Result<Json<CacheStats>, ApiError> {
    let model = app.loaded().ok_or(ApiError::Loading)?;
    let outputs = model.outputs();
    let tiers = match outputs {
        None => Vec::new(),
        Some(outputs) => outputs.store().stats(Instant::now() + PATIENCE).await,
    };
    let num_flights = outputs.map_or(0, OutputCache::num_flights);
    let routing = match model.routing() {
        None => None,
        Some(routing) => routing.memory().stats(Instant::now() + PATIENCE).await.pop().map(TierReport::from),
    };
    let kv = match model.kv_tier() {
        None => Vec::new(),
        Some(kv_tier) => kv_tier.stats(Instant::now() + PATIENCE).await,
    };
    let reports = |rows: Vec<TierStats>| rows.into_iter().map(TierReport::from).collect();
    Ok(Json(CacheStats { tiers: reports(tiers), num_flights, routing, kv: reports(kv) }))
}

/// Remove every cached answer, what is known of routing and blocks of prompts, in all tiers; the KV cache itself stays
#[utoipa::path(
    post,
    path = "/v1/cache/clear",
    tag = "operation",
    responses(
        (status = 200, body = CacheCleared),
        (status = "4XX", description = "No admin key, or a wrong one", body = ErrorResponse),
    )
)]
pub async fn clear(State(app): State<Arc<App>>) -> Result<Json<CacheCleared>, ApiError> {
    app.replays.clear();
    let model = app.loaded().ok_or(ApiError::Loading)?;
    let deadline = Instant::now() + PATIENCE;
    let mut result = Ok(());
    if let Some(outputs) = model.outputs() {
        result = outputs.clear(deadline).await;
    }
    if let Some(routing) = model.routing() {
        result = result.and(routing.clear(deadline).await);
    }
    if let Some(kv_tier) = model.kv_tier() {
        result = result.and(kv_tier.clear(deadline).await);
    }
    if let Err(error) = &result {
        tracing::warn!(%error, "the cache was not emptied in whole");
    }
    Ok(Json(CacheCleared { complete: result.is_ok() }))
}

impl From<TierStats> for TierReport {
    fn from(stats: TierStats) -> Self {
        Self {
            tier: stats.tier.as_str(),
            available: stats.is_available,
            entries: stats.num_entries,
            bytes: stats.bytes,
            max_bytes: stats.max_bytes,
        }
    }
}
