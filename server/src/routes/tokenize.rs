//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::body::{JsonBody, parse};
use super::prompt_ids;
use crate::app::App;
use crate::error::ApiError;
use crate::openai::error::ErrorResponse;
use crate::openai::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use crate::text::TextError;
use crate::validate::model_name;

/// Turn a prompt or a conversation into token ids
#[utoipa::path(
    post,
    path = "/tokenize",
    tag = "text",
    request_body = TokenizeRequest,
    responses(
        (status = 200, body = TokenizeResponse),
        (status = "4XX", description = "The request is at fault", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn tokenize(
    State(app): State<Arc<App>>,
    JsonBody(body): JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let model = app.model()?;
    let request: TokenizeRequest = parse(&body)?;
    model_name(request.model.as_deref(), &model.limits)?;
    let wants_strings = request.return_token_strs.unwrap_or(false);
    let tokens = match (request.prompt, &request.messages) {
        (Some(prompt), None) => prompt_ids::of_text(&app, model, prompt, request.add_special_tokens).await?,
        (None, Some(_)) => prompt_ids::of_conversation(&app, model, &body).await?,
        _ => return Err(ApiError::invalid("prompt", "give either `prompt` or `messages`")),
    };
    let name = |&id: &u32| model.tokenizer.id_to_token(id).unwrap_or_default();
    Ok(Json(TokenizeResponse {
        count: tokens.len(),
        max_model_len: model.limits.max_tokens,
        token_strs: wants_strings.then(|| tokens.iter().map(name).collect()),
        tokens,
    }))
}

/// Turn token ids into text
#[utoipa::path(
    post,
    path = "/detokenize",
    tag = "text",
    request_body = DetokenizeRequest,
    responses(
        (status = 200, body = DetokenizeResponse),
        (status = "4XX", description = "The request is at fault", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn detokenize(
    State(app): State<Arc<App>>,
    JsonBody(body): JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let model = app.model()?;
    let request: DetokenizeRequest = parse(&body)?;
    model_name(request.model.as_deref(), &model.limits)?;
    let tokens = request.tokens.ok_or_else(|| ApiError::invalid("tokens", "is missing"))?;
    let vocab_size = model.limits.vocab_size;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
        let reason = format!("token id {token} is out of range, the vocabulary has {vocab_size} tokens");
        return Err(ApiError::invalid("tokens", reason));
    }
    let tokenizer = Arc::clone(&model.tokenizer);
    let invalid = |error: TextError| ApiError::invalid("tokens", error.to_string());
    let prompt = app.limits.run_text(move || tokenizer.decode(&tokens, false).map_err(invalid)).await?;
    Ok(Json(DetokenizeResponse { prompt }))
}
