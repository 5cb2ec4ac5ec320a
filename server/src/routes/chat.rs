//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::stream::{self, StreamExt as _};

use super::body::{JsonBody, parse};
use super::tell_origin;
use crate::answer::chat::ChatWriter;
use crate::answer::{Collector, Envelope, StreamUsage, chunks};
use crate::app::{App, Model, unix_seconds};
use crate::cache_salt::{Salt, Tenant};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::generate::{Batch, Job};
use crate::openai::chat::{ChatCompletion, ChatCompletionChunk, ChatCompletionRequest};
use crate::openai::error::ErrorResponse;
use crate::telemetry::http::RequestId;
use crate::validate::{self, ValidRequest};

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
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let model = app.model()?;
    let permit = app.admit()?;
    validate::unsupported(&body)?;
    validate::unsupported_in_chat(&body)?;
    let request = ChatCompletionRequest { chat: parse(&body)?, sampling: parse(&body)? };
    let valid = validate::chat(&request.chat, &request.sampling, &model.limits)?;
    let conversation = Conversation::new(&request.chat)?;
    let prompt = prompt_ids(&app, model, conversation, valid.truncate_prompt).await?;
    let prompts = [Arc::clone(&prompt)];
    let salt = Salt::new(tenant, valid.cache_salt.as_deref());
    let batch = Batch::start(model, Job { prompts: &prompts, valid: &valid, param: "messages", salt, permit }).await?;
    let envelope = Envelope {
        id: format!("chatcmpl-{}", id.0),
        created: unix_seconds(),
        model: request.sampling.model.unwrap_or_else(|| app.model_names[0].clone()),
        output: valid.output,
        wants_logprobs: valid.sampling.logprobs.is_some(),
        vocabulary: Arc::clone(&model.tokenizer) as _,
    };
    let origin = batch.origin;
    let response = match valid.stream {
        None => collect(batch, &envelope, &valid, &prompt).await?,
        Some(plan) => {
            let usage = StreamUsage::new(plan, prompt.len(), valid.num_choices);
            let writer = ChatWriter { envelope, usage };
            stream_chunks(&app, batch, writer, valid.num_choices, &prompt)
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

async fn collect(
    mut batch: Batch,
    envelope: &Envelope,
    valid: &ValidRequest,
    prompt: &[u32],
) -> Result<Response, ApiError> {
    let mut collector = Collector::new(valid.num_choices as usize);
    while let Some(output) = batch.next().await {
        collector.add(output?);
    }
    Ok(Json(envelope.chat_completion(prompt, collector.into_choices())).into_response())
}

fn stream_chunks(app: &App, batch: Batch, writer: ChatWriter, num_choices: u32, prompt: &[u32]) -> Response {
    let opening = stream::iter(writer.opening(num_choices, prompt)).map(Ok);
    crate::sse::respond(opening.chain(chunks(batch, writer)), app.keep_alive())
}
