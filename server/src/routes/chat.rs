//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::stream::{self, StreamExt as _};

use super::body::{RawBody, parse};
use super::tell_origin;
use crate::answer::chat::ChatWriter;
use crate::answer::{Envelope, MoeTerms, StreamUsage, chunks, collect, written};
use crate::app::{App, Model, unix_seconds};
use crate::cache_salt::{Salt, Tenant};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::generate::{Batch, Job, num_told};
use crate::openai::chat::{ChatCompletion, ChatCompletionChunk, ChatCompletionRequest};
use crate::openai::error::ErrorResponse;
use crate::output_cache::Origin;
use crate::replay::{self, Asked, Asking, Stamp, Texts};
use crate::sse::to_json;
use crate::telemetry::http::RequestId;
use crate::validate;

/// Answer a conversation
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "inference",
    request_body = ChatCompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, chunks as server-sent events and `[DONE]`", content(
            (ChatCompletion = "application/json"),
            (ChatCompletionChunk = "text/event-stream"),
        )),
        (status = "4XX", description = "The request is at fault", body = ErrorResponse),
        (status = "5XX", description = "The server cannot answer now", body = ErrorResponse),
    )
)]
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    body: RawBody,
) -> Result<Response, ApiError> {
    let model = app.model()?;
    let permit = app.admit()?;
    let cache_deadline = app.cache_deadline();
    // Where answers are not cached, their bytes need no name.
    let asked = model.outputs().map(|_| Asked::new("chat", tenant, &body.0));
    let asking = Asking { permit: &permit, request_id: &id.0, cache_deadline };
    if let Some(response) = app.replays.answer(asked, model, &asking).await {
        return Ok(tell_origin(response, Some(Origin::Hit)));
    }
    let body = body.object()?;
    validate::unsupported(&body)?;
    validate::unsupported_in_chat(&body)?;
    let request = ChatCompletionRequest { chat: parse(&body)?, sampling: parse(&body)? };
    let valid = validate::chat(&request.chat, &request.sampling, &model.limits)?;
    let conversation = Conversation::new(&request.chat)?;
    let prompt = prompt_ids(&app, model, conversation, valid.truncate_prompt).await?;
    let prompts = [Arc::clone(&prompt)];
    let salt = Salt::new(tenant, valid.cache_salt.as_deref());
    let mut batch =
        Batch::start(model, Job { prompts: &prompts, valid: &valid, param: "messages", salt, permit, cache_deadline })
            .await?;
    let (origin, is_cached) = (batch.origin, batch.is_cached());
    let stamp = Stamp { prefix: "chatcmpl-", request_id: &id.0, created: unix_seconds() };
    let moe = MoeTerms::new(&valid, &model.limits.experts, model.engine.model().num_shared_parameters);
    let envelope = Envelope {
        id: stamp.id(),
        created: stamp.created,
        model: request.sampling.model.unwrap_or_else(|| app.model_names[0].clone()),
        output: valid.output,
        wants_logprobs: valid.sampling.logprobs.is_some(),
        vocabulary: Arc::clone(&model.tokenizer) as _,
        routed: model.engine.model().routed.clone(),
        is_cached,
        moe,
    };
    let (num_choices, own_prompt) = (valid.num_choices, Arc::clone(&prompt));
    let writer = move |plan, envelope| {
        let usage = StreamUsage::new(plan, own_prompt.len(), num_choices).cached(is_cached).moe(moe);
        let writer = ChatWriter { envelope, usage };
        (writer.opening(num_choices, &own_prompt), writer)
    };
    let whole =
        move |envelope: &Envelope, outputs| envelope.chat_completion(&prompt, collect(outputs, num_choices as usize));
    let response = match (origin, valid.stream) {
        (Some(Origin::Hit), plan) => {
            let outputs = batch.all().await?;
            let (num_tokens, sequences) = (num_told(&outputs), replay::sequences(&batch, &outputs));
            let write = move || match plan {
                None => Texts::Object(to_json(&whole(&envelope, outputs))),
                Some(plan) => Texts::Stream(written(writer(plan, envelope), outputs)),
            };
            let texts = app.limits.write(num_tokens, write).await?;
            app.replays.keep(asked, (batch.keys, sequences), (texts, &stamp))
        }
        (_, None) => {
            let outputs = batch.all().await?;
            let num_tokens = num_told(&outputs);
            let write = move || Json(whole(&envelope, outputs)).into_response();
            app.limits.write(num_tokens, write).await?
        }
        (_, Some(plan)) => {
            let (opening, writer) = writer(plan, envelope);
            let chunks = stream::iter(opening.into_iter().map(Ok)).chain(chunks(batch, writer));
            crate::sse::respond(chunks, app.keep_alive())
        }
    };
    Ok(tell_origin(response, origin))
}

/// Renders and tokenizes on the blocking pool; keeps the last `truncate` tokens where that is set.
async fn prompt_ids(
    app: &App,
    model: &Model,
    conversation: Conversation,
    truncate: Option<usize>,
) -> Result<Arc<[u32]>, ApiError> {
    let template = model.template.clone().ok_or_else(no_template)?;
    let tokenizer = Arc::clone(&model.tokenizer);
    let ids = app.limits.run_text(move || conversation.to_ids(&template, &tokenizer)).await?;
    let skipped = truncate.map_or(0, |keep| ids.len().saturating_sub(keep));
    Ok(Arc::from(&ids[skipped..]))
}

pub(super) fn no_template() -> ApiError {
    let hint = "the model has no chat template; start the server with --chat-template, or use /v1/completions";
    ApiError::Unsupported { param: "messages".to_owned(), hint: hint.to_owned() }
}
