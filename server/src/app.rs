//! The state that every handler shares, and the router over it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use cache::store::TieredStore;
use engine::{EngineHandle, ModelSummary};
use metrics_exporter_prometheus::PrometheusHandle;
use tower_http::catch_panic::CatchPanicLayer;

use crate::auth::{Auth, require_key};
use crate::config::Config;
use crate::error::ApiError;
use crate::kv_tier::KvTier;
use crate::limits::{Limits, Permit, cors};
use crate::output_cache::OutputCache;
use crate::replay::Replays;
use crate::routing_cache::Routing;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::rejected;
use crate::text::{ChatTemplate, Tokenizer};
use crate::validate::{ExpertLimits, ModelLimits};
use crate::{routes, telemetry};

/// Of the memory for answers, the part for answers as they were written.
pub const REPLAY_SHARE: u64 = 4;

/// One server.
pub struct App {
    pub config: Config,
    pub limits: Limits,
    pub shutdown: Shutdown,
    pub metrics: PrometheusHandle,
    /// Names that requests may use; the first one is the name in answers.
    pub model_names: Vec<String>,
    model: OnceLock<Model>,
    pub replays: Replays,
}

/// The output cache, once with what is known at once and once with what takes a while.
#[derive(Default)]
pub struct OutputCaches {
    /// In memory, under a fingerprint of this process; absent where answers are not cached.
    pub early: Option<OutputCache>,
    /// In all tiers, once the weights' digest is known.
    pub whole: Arc<OnceLock<OutputCache>>,
    /// Those that outlive the process.
    pub tiers: Option<Arc<TieredStore>>,
}

/// A loaded model with its text side.
pub struct Model {
    pub engine: EngineHandle,
    pub tokenizer: Arc<Tokenizer>,
    /// Absent where the model brings none and none was configured.
    pub template: Option<Arc<ChatTemplate>>,
    pub limits: ModelLimits,
    outputs: OutputCaches,
    routing: Option<Arc<Routing>>,
    kv_tier: Option<Arc<KvTier>>,
    /// Seconds since the epoch.
    pub created: u64,
}

impl Model {
    pub fn new(engine: EngineHandle, (tokenizer, template): (Tokenizer, Option<ChatTemplate>), app: &App) -> Self {
        let summary = engine.model();
        let limits = ModelLimits {
            names: app.model_names.clone(),
            vocab_size: summary.vocab_size,
            // A pool smaller than the model's context sets the limit: a longer sequence would never fit.
            max_tokens: summary.max_model_len.min(summary.num_blocks * summary.block_size),
            // All choices of a request are queued at once.
            max_sequences: app.config.max_queue,
            defaults: summary.generation_defaults.clone(),
            experts: expert_limits(summary, &app.config),
        };
        Self {
            limits,
            tokenizer: Arc::new(tokenizer),
            template: template.map(Arc::new),
            created: unix_seconds(),
            outputs: OutputCaches::default(),
            routing: None,
            kv_tier: None,
            engine,
        }
    }

    #[must_use]
    pub fn with_outputs(self, outputs: OutputCaches) -> Self {
        Self { outputs, ..self }
    }

    #[must_use]
    pub fn with_routing(self, routing: Option<Arc<Routing>>) -> Self {
        Self { routing, ..self }
    }

    #[must_use]
    pub fn with_kv_tier(self, kv_tier: Option<Arc<KvTier>>) -> Self {
        Self { kv_tier, ..self }
    }

    /// Where blocks of prompts are kept beyond the KV cache; `None` where they are not.
    pub fn kv_tier(&self) -> Option<&Arc<KvTier>> {
        self.kv_tier.as_ref()
    }

    /// What is known of the experts that prompts take; `None` where nothing is.
    pub fn routing(&self) -> Option<&Arc<Routing>> {
        self.routing.as_ref()
    }

    /// Waits until what was answered and learned is written to slow tiers, or for the deadline.
    pub async fn settle(&self, deadline: tokio::time::Instant) {
        if let Some(tiers) = &self.outputs.tiers {
            tiers.settle(deadline).await;
        }
        if let Some(routing) = &self.routing {
            routing.settle(deadline).await;
        }
        if let Some(kv_tier) = &self.kv_tier {
            kv_tier.settle(deadline).await;
        }
    }

    /// Where answers are found again; `None` where they are not.
    pub fn outputs(&self) -> Option<&OutputCache> {
        self.outputs.whole.get().or(self.outputs.early.as_ref())
    }
}

fn expert_limits(model: &ModelSummary, config: &Config) -> ExpertLimits {
    let chosen = model.routed.layers().iter().map(|layer| layer.top_k).max().unwrap_or(0);
    ExpertLimits {
        // Of a model with an encoder it is not known what was chosen.
        top_k: if model.num_experts == 0 { 0 } else { chosen.max(model.num_experts_per_tok).max(1) },
        top_p: config.expert_top_p as f32,
        routing: config.routing_options(),
    }
}

impl App {
    pub fn new(config: Config, model_names: Vec<String>, metrics: PrometheusHandle) -> Self {
        Self {
            limits: Limits::new(&config),
            shutdown: Shutdown::default(),
            metrics,
            model_names,
            model: OnceLock::new(),
            replays: Replays::new(config.output_cache_memory.0 / REPLAY_SHARE),
            config,
        }
    }

    /// Opens the API routes: the model is loaded.
    pub fn set_model(&self, model: Model) {
        assert!(self.model.set(model).is_ok(), "a server loads one model");
    }

    /// The model, once it is loaded.
    pub fn loaded(&self) -> Option<&Model> {
        self.model.get()
    }

    /// The model for a request that computes.
    ///
    /// # Errors
    /// The server is loading or shutting down.
    pub fn model(&self) -> Result<&Model, ApiError> {
        if self.shutdown.is_draining() {
            rejected("shutting_down");
            return Err(ApiError::ShuttingDown);
        }
        self.loaded().ok_or_else(|| {
            rejected("model_loading");
            ApiError::Loading
        })
    }

    /// Takes a place for a request that generates.
    ///
    /// # Errors
    /// All places are taken.
    pub fn admit(&self) -> Result<Permit, ApiError> {
        self.limits.admit().inspect_err(|_| rejected("queue_full"))
    }

    /// True when new requests would be served.
    pub fn is_ready(&self) -> bool {
        !self.shutdown.is_draining() && self.loaded().is_some_and(|model| model.engine.is_healthy())
    }

    /// True unless the process should be restarted.
    pub fn is_live(&self) -> bool {
        self.shutdown.is_draining() || self.loaded().is_none_or(|model| model.engine.is_healthy())
    }

    /// When a request that begins now stops waiting for caches.
    pub fn cache_deadline(&self) -> tokio::time::Instant {
        tokio::time::Instant::now() + Duration::from_millis(self.config.cache_timeout_ms)
    }

    pub fn keep_alive(&self) -> Duration {
        self.config.keep_alive_interval.duration()
    }
}

/// The whole HTTP interface. Outermost first: request id and metrics, panics, CORS, keys, body limit, routes.
pub fn router(app: &Arc<App>) -> Router {
    let auth = Arc::new(Auth::new(&app.config));
    let max_body_bytes = usize::try_from(app.limits.max_body_bytes).unwrap_or(usize::MAX);
    let mut router = routes::router()
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(Arc::clone(app))
        .layer(DefaultBodyLimit::max(max_body_bytes))
        .layer(from_fn_with_state(auth, require_key));
    if let Some(cors) = cors(&app.config.allowed_origins) {
        router = router.layer(cors);
    }
    router
        .layer(CatchPanicLayer::custom(|_| axum::response::IntoResponse::into_response(ApiError::Internal)))
        .layer(from_fn(telemetry::http::observe))
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::NoRoute { method: method.to_string(), path: uri.path().to_owned() }
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::NoMethod { method: method.to_string(), path: uri.path().to_owned() }
}

pub fn unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
