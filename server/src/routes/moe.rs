//! `/v1/moe/routing`: which experts a prompt took when its blocks were computed, here or on a server that shares a tier.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::{Extension, Json};
use cache::store::Tier;
use cache::{Profile, RoutedLayer};
use tokio::time::{Duration, Instant};

use super::body::{JsonBody, parse};
use super::{bad_query, prompt_ids};
use crate::app::{App, Model};
use crate::cache_salt::{Salt, Tenant};
use crate::error::ApiError;
use crate::openai::completions::Prompt;
use crate::openai::error::ErrorResponse;
use crate::openai::routing::{BlocksByTier, ExpertShare, LayerRouting, RoutingProfile, RoutingQuery, RoutingRequest};
use crate::routing_cache::Routing;
use crate::validate::{cache_salt, model_name};

/// Time that the tiers get for all blocks of a prompt.
const PATIENCE: Duration = Duration::from_secs(2);

/// The experts that a text prompt takes, as far as that is known
#[utoipa::path(
    get,
    path = "/v1/moe/routing",
    tag = "experts",
    params(RoutingQuery),
    responses(
        (status = 200, body = RoutingProfile),
        (status = "4XX", description = "The request is at fault, or no routing is kept", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn of_text(
    State(app): State<Arc<App>>,
    Extension(tenant): Extension<Tenant>,
    query: Result<Query<RoutingQuery>, QueryRejection>,
) -> Result<Json<RoutingProfile>, ApiError> {
    let Query(query) = query.map_err(|rejection| bad_query(&rejection))?;
    let (model, salt) = scope(&app, tenant, (query.model.as_deref(), query.cache_salt.as_deref()))?;
    let prompt = query.prompt.ok_or_else(|| ApiError::invalid("prompt", "is missing"))?;
    let tokens = prompt_ids::of_text(&app, model, prompt, query.add_special_tokens).await?;
    profile(&app, model, (tokens, salt)).await.map(Json)
}

/// The experts that a prompt or a conversation takes, as far as that is known
#[utoipa::path(
    post,
    path = "/v1/moe/routing",
    tag = "experts",
    request_body = RoutingRequest,
    responses(
        (status = 200, body = RoutingProfile),
        (status = "4XX", description = "The request is at fault, or no routing is kept", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn of_prompt(
    State(app): State<Arc<App>>,
    Extension(tenant): Extension<Tenant>,
    JsonBody(body): JsonBody,
) -> Result<Json<RoutingProfile>, ApiError> {
    let request: RoutingRequest = parse(&body)?;
    let (model, salt) = scope(&app, tenant, (request.model.as_deref(), request.cache_salt.as_deref()))?;
    let tokens = match (request.prompt, &request.messages) {
        (Some(Prompt::Text(text)), None) => prompt_ids::of_text(&app, model, text, request.add_special_tokens).await?,
        (Some(Prompt::Tokens(tokens)), None) => tokens,
        (None, Some(_)) => prompt_ids::of_conversation(&app, model, &body).await?,
        _ => return Err(ApiError::invalid("prompt", "give one text, one list of token ids, or `messages`")),
    };
    profile(&app, model, (tokens, salt)).await.map(Json)
}

/// Whose prompts are looked for in which model.
fn scope<'a>(
    app: &'a App,
    tenant: Tenant,
    (model, salt): (Option<&str>, Option<&str>),
) -> Result<(&'a Model, Salt), ApiError> {
    let loaded = app.model()?;
    model_name(model, &loaded.limits)?;
    Ok((loaded, Salt::new(tenant, cache_salt(salt)?)))
}

async fn profile(app: &App, model: &Model, (tokens, salt): (Vec<u32>, Salt)) -> Result<RoutingProfile, ApiError> {
    let routing = Arc::clone(model.routing().ok_or_else(not_kept)?);
    if tokens.len() > model.limits.max_tokens {
        let reason = format!("prompt has {} tokens, the limit is {}", tokens.len(), model.limits.max_tokens);
        return Err(ApiError::ContextLength { param: "prompt", reason });
    }
    let (num_tokens, engine) = (tokens.len(), model.engine.clone());
    // As a request's that has no options of its own, for which routers choose otherwise.
    let salt = model.limits.experts.of_silent().salt(salt.bytes());
    let names = app.limits.run_text(move || Ok(engine.block_names(&tokens, &salt))).await?;
    let known = routing.prefix(&names, Instant::now() + PATIENCE).await;
    let block_size = model.engine.model().block_size;
    let mut blocks = BlocksByTier::default();
    for (_, tier) in &known {
        *match tier {
            Tier::Memory => &mut blocks.memory,
            Tier::Disk => &mut blocks.disk,
            Tier::Redis => &mut blocks.redis,
        } += 1;
    }
    Ok(RoutingProfile {
        object: "moe.routing",
        model: app.model_names[0].clone(),
        num_prompt_tokens: num_tokens,
        num_covered_tokens: known.len() * block_size,
        block_size,
        blocks,
        layers: app.limits.run_text(move || Ok(sum(&routing, &known))).await?,
    })
}

/// What the blocks took together, layer by layer.
fn sum(routing: &Routing, known: &[(Profile, Tier)]) -> Vec<LayerRouting> {
    let layers = if known.is_empty() { &[] } else { routing.layers() };
    let mut sums: Vec<Vec<(f32, usize)>> = layers.iter().map(|layer| vec![(0.0, 0); layer.num_experts]).collect();
    for (profile, _) in known {
        for (sums, shares) in sums.iter_mut().zip(profile.shares(layers)) {
            for (expert, share) in shares {
                sums[expert].0 += share / known.len() as f32;
                sums[expert].1 += 1;
            }
        }
    }
    let layer = |(layer, sums): (&RoutedLayer, Vec<(f32, usize)>)| {
        let used = sums.into_iter().enumerate().filter(|(_, (_, num_blocks))| *num_blocks > 0);
        let share = |(expert, (share, num_blocks))| ExpertShare { expert, share, num_blocks };
        let mut experts: Vec<ExpertShare> = used.map(share).collect();
        experts.sort_by(|a, b| b.share.total_cmp(&a.share).then(a.expert.cmp(&b.expert)));
        LayerRouting { num_experts: layer.num_experts, top_k: layer.top_k, experts }
    };
    layers.iter().zip(sums).map(layer).collect()
}

fn not_kept() -> ApiError {
    let hint = "no routing is kept: the model has no experts, or an encoder, or --routing-cache-memory or \
                --enable-prefix-caching is off";
    ApiError::Unsupported { param: "prompt".to_owned(), hint: hint.to_owned() }
}
