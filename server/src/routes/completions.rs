//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::body::{RawBody, parse};
use super::tell_origin;
use crate::answer::completions::{CompletionPrompt, CompletionWriter};
use crate::answer::{Envelope, MoeTerms, StreamUsage, chunks, collect, written};
use crate::app::{App, Model, unix_seconds};
use crate::cache_salt::{Salt, Tenant};
use crate::error::ApiError;
use crate::generate::{Batch, Job, num_told};
use crate::openai::completions::{Completion, CompletionRequest, Prompt};
use crate::openai::error::ErrorResponse;
use crate::output_cache::Origin;
use crate::replay::{self, Asked, Asking, Stamp, Texts};
use crate::sse::to_json;
use crate::telemetry::http::RequestId;
use crate::text::{EncodeOptions, Tokenizer};
use crate::validate;

/// Most prompts of one request.
const MAX_PROMPTS: usize = 1024;

/// Continue one text or many
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "inference",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, chunks as server-sent events and `[DONE]`", content(
            (Completion = "application/json"),
            (Completion = "text/event-stream"),
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
    let asked = model.outputs().map(|_| Asked::new("completions", tenant, &body.0));
    let asking = Asking { permit: &permit, request_id: &id.0, cache_deadline };
    if let Some(response) = app.replays.answer(asked, model, &asking).await {
        return Ok(tell_origin(response, Some(Origin::Hit)));
    }
    let body = body.object()?;
    validate::unsupported(&body)?;
    let request = CompletionRequest { completion: parse(&body)?, sampling: parse(&body)? };
    let valid = validate::completion(&request.completion, &request.sampling, &model.limits)?;
    let source = check_prompt(request.completion.prompt, valid.num_choices, model)?;
    let plan = PromptPlan {
        add_special_tokens: request.completion.add_special_tokens.unwrap_or(true),
        truncate: valid.truncate_prompt,
        echo: valid.output.echo,
        skip_special_tokens: valid.output.skip_special_tokens,
    };
    let tokenizer = Arc::clone(&model.tokenizer);
    let prompts = app.limits.run_text(move || plan.prepare(source, &tokenizer)).await?;
    let ids: Vec<_> = prompts.iter().map(|prompt| Arc::clone(&prompt.ids)).collect();
    let salt = Salt::new(tenant, valid.cache_salt.as_deref());
    let mut batch =
        Batch::start(model, Job { prompts: &ids, valid: &valid, param: "prompt", salt, permit, cache_deadline })
            .await?;
    let (origin, is_cached) = (batch.origin, batch.is_cached());
    let stamp = Stamp { prefix: "cmpl-", request_id: &id.0, created: unix_seconds() };
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
    let num_sequences = prompts.len() * valid.num_choices as usize;
    let num_prompt_tokens = ids.iter().map(|ids| ids.len()).sum();
    let num_choices = valid.num_choices;
    let writer = move |plan, envelope, prompts| CompletionWriter {
        envelope,
        usage: StreamUsage::new(plan, num_prompt_tokens, num_choices).cached(is_cached).moe(moe),
        prompts,
        num_choices,
        opened: vec![false; num_sequences],
    };
    let response = match (origin, valid.stream) {
        (Some(Origin::Hit), plan) => {
            let outputs = batch.all().await?;
            let (num_tokens, sequences) = (num_told(&outputs), replay::sequences(&batch, &outputs));
            let write = move || match plan {
                None => Texts::Object(to_json(&envelope.completion(&prompts, collect(outputs, num_sequences)))),
                Some(plan) => Texts::Stream(written((Vec::new(), writer(plan, envelope, prompts)), outputs)),
            };
            let texts = app.limits.write(num_tokens, write).await?;
            app.replays.keep(asked, (batch.keys, sequences), (texts, &stamp))
        }
        (_, None) => {
            let outputs = batch.all().await?;
            let num_tokens = num_told(&outputs);
            let write = move || Json(envelope.completion(&prompts, collect(outputs, num_sequences))).into_response();
            app.limits.write(num_tokens, write).await?
        }
        (_, Some(plan)) => crate::sse::respond(chunks(batch, writer(plan, envelope, prompts)), app.keep_alive()),
    };
    Ok(tell_origin(response, origin))
}

/// How prompts become ids.
struct PromptPlan {
    add_special_tokens: bool,
    truncate: Option<usize>,
    echo: bool,
    skip_special_tokens: bool,
}

/// Prompts in one of the two forms they are written in.
enum PromptSource {
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// The prompts as a list whose length is in bounds.
fn check_prompt(prompt: Option<Prompt>, num_choices: u32, model: &Model) -> Result<PromptSource, ApiError> {
    let source = match prompt {
        None => return Err(ApiError::invalid("prompt", "is missing")),
        Some(Prompt::Text(text)) => PromptSource::Texts(vec![text]),
        Some(Prompt::Texts(texts)) => PromptSource::Texts(texts),
        Some(Prompt::Tokens(ids)) => PromptSource::TokenLists(vec![ids]),
        Some(Prompt::TokenLists(lists)) => PromptSource::TokenLists(lists),
    };
    let num_prompts = match &source {
        PromptSource::Texts(texts) => texts.len(),
        PromptSource::TokenLists(lists) => lists.len(),
    };
    let most = MAX_PROMPTS.min(model.limits.max_sequences / num_choices as usize);
    if !(1..=most).contains(&num_prompts) {
        let reason = format!("has {num_prompts} prompts, allowed are 1 to {most} with {num_choices} choices each");
        return Err(ApiError::invalid("prompt", reason));
    }
    if let PromptSource::TokenLists(lists) = &source {
        let vocab_size = model.limits.vocab_size;
        if let Some(token) = lists.iter().flatten().find(|token| **token as usize >= vocab_size) {
            let reason = format!("token id {token} is out of range, the vocabulary has {vocab_size} tokens");
            return Err(ApiError::invalid("prompt", reason));
        }
    }
    Ok(source)
}

impl PromptPlan {
    fn prepare(&self, source: PromptSource, tokenizer: &Tokenizer) -> Result<Vec<CompletionPrompt>, ApiError> {
        let invalid = |error: crate::text::TextError| ApiError::invalid("prompt", error.to_string());
        let options = EncodeOptions { add_special_tokens: self.add_special_tokens };
        let prepare = |(ids, text): (Vec<u32>, Option<String>)| {
            let skipped = self.truncate.map_or(0, |keep| ids.len().saturating_sub(keep));
            let text = match text.filter(|_| skipped == 0) {
                _ if !self.echo => String::new(),
                Some(text) => text,
                None => tokenizer.decode(&ids[skipped..], self.skip_special_tokens).map_err(invalid)?,
            };
            Ok(CompletionPrompt { ids: Arc::from(&ids[skipped..]), text })
        };
        match source {
            PromptSource::Texts(texts) => texts
                .into_iter()
                .map(|text| prepare((tokenizer.encode(&text, options).map_err(invalid)?, Some(text))))
                .collect(),
            PromptSource::TokenLists(lists) => lists.into_iter().map(|ids| prepare((ids, None))).collect(),
        }
    }
}
