//! `/v1/moe/routing`: which experts a prompt took when its blocks were computed, here or on a server that shares a tier.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::{Extension, Json};
use cache::store::Tier;
use cache::{Profile, RoutedLayer};
use tokio::time::{Duration, Instant};

use super::body::{JsonBody, parse};
use super::chat::no_template;
use crate::app::{App, Model};
use crate::cache_salt::{Salt, Tenant};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::openai::chat::ChatOptions;
use crate::openai::completions::Prompt;
use crate::openai::error::ErrorResponse;
use crate::openai::routing::{BlocksByTier, ExpertShare, LayerRouting, RoutingProfile, RoutingQuery, RoutingRequest};
use crate::routing_cache::Routing;
use crate::text::{EncodeOptions, TextError};
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
    let model = app.model()?;
    let Query(query) = query.map_err(|rejection| ApiError::invalid("prompt", rejection.body_text()))?;
    model_name(query.model.as_deref(), &model.limits)?;
    let prompt = query.prompt.ok_or_else(|| ApiError::invalid("prompt", "is missing"))?;
    let salt = Salt::new(tenant, cache_salt(query.cache_salt.as_deref())?);
    let tokens = encode(&app, model, (prompt, query.add_special_tokens)).await?;
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
    let model = app.model()?;
    let request: RoutingRequest = parse(&body)?;
    model_name(request.model.as_deref(), &model.limits)?;
    let salt = Salt::new(tenant, cache_salt(request.cache_salt.as_deref())?);
    let tokens = match (request.prompt, &request.messages) {
        (Some(Prompt::Text(text)), None) => encode(&app, model, (text, request.add_special_tokens)).await?,
        (Some(Prompt::Tokens(tokens)), None) => tokens,
        (None, Some(_)) => {
            // The same fields as a chat's, so that the ids are those that the chat would be given.
            let conversation = Conversation::new(&parse::<ChatOptions>(&body)?)?;
            let template = model.template.clone().ok_or_else(no_template)?;
            let tokenizer = Arc::clone(&model.tokenizer);
            app.limits.run_text(move || conversation.to_ids(&template, &tokenizer)).await?
        }
        _ => return Err(ApiError::invalid("prompt", "give one text, one list of token ids, or `messages`")),
    };
    profile(&app, model, (tokens, salt)).await.map(Json)
}

async fn encode(
    app: &App,
    model: &Model,
    (prompt, add_special_tokens): (String, Option<bool>),
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = Arc::clone(&model.tokenizer);
    let options = EncodeOptions { add_special_tokens: add_special_tokens.unwrap_or(true) };
    let invalid = |error: TextError| ApiError::invalid("prompt", error.to_string());
    app.limits.run_text(move || tokenizer.encode(&prompt, options).map_err(invalid)).await
}

async fn profile(app: &App, model: &Model, (tokens, salt): (Vec<u32>, Salt)) -> Result<RoutingProfile, ApiError> {
    let routing = Arc::clone(model.routing().ok_or_else(not_kept)?);
    if tokens.len() > model.limits.max_tokens {
        let reason = format!("prompt has {} tokens, the limit is {}", tokens.len(), model.limits.max_tokens);
        return Err(ApiError::ContextLength { param: "prompt", reason });
    }
    let (num_tokens, engine) = (tokens.len(), model.engine.clone());
    let names = app.limits.run_text(move || Ok(engine.block_names(&tokens, &salt.bytes()))).await?;
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
