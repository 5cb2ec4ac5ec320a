//! Engine events to text: one choice's tokens become deltas, the choices of a request become one bounded stream.

mod assembler;
mod source;

use std::pin::Pin;
use std::sync::Arc;

use cache::Key;
use engine::{Event, GenerateRequest, PrefixHint, PromptLogprob, StopCriteria};
use futures::StreamExt as _;
use futures::stream::{self, SelectAll, Stream};
use tokio::time::Instant;

pub use assembler::{Assembler, Delta, Finish, TokenRecord, TokenText};

use crate::app::Model;
use crate::cache_salt::Salt;
use crate::error::ApiError;
use crate::limits::Permit;
use crate::openai::FinishReason;
use crate::output_cache::Origin;
use crate::telemetry::metrics::{ChoiceMeter, RequestFacts};
use crate::text::{DetokenizeOptions, Detokenizer};
use crate::validate::{OutputOptions, ValidRequest};

use source::{Asked, Source};

/// What a choice yields: its start and prompt log-probs at most once, then deltas, the last of them with `finish`.
#[derive(Debug)]
pub enum Output {
    /// So many tokens of its prompt were computed before.
    Started {
        num_cached_tokens: usize,
    },
    Prompt(Vec<PromptLogprob>),
    Delta(Delta),
}

/// One output of choice `index` (prompt index times choices per prompt, plus choice).
#[derive(Debug)]
pub struct Indexed {
    pub index: u32,
    pub output: Output,
}

/// Tokens that a task may work on before others of its thread have a turn. To put one into an answer takes 1 to 6 µs, least without
/// log-probs and not streamed, as requests of 250 to 3000 tokens show (mixtral-base, one core of an EPYC): a millisecond or two in all.
pub const TOKENS_PER_TURN: usize = 256;

/// Ids of experts that take about as long to write as a token.
const IDS_LIKE_ONE_TOKEN: usize = 64;

/// Most ids of experts in the answer to one request, all choices together: some 16 MiB of JSON.
const MAX_ROUTED_EXPERTS: usize = 4 << 20;

/// Tokens that outputs tell of.
pub fn num_told(outputs: &[Indexed]) -> usize {
    let tokens = |indexed: &Indexed| match &indexed.output {
        Output::Started { .. } => 0,
        Output::Prompt(logprobs) => logprobs.len(),
        Output::Delta(delta) => 1 + (delta.prompt_experts.len() + delta.experts.len()) / IDS_LIKE_ONE_TOKEN,
    };
    outputs.iter().map(tokens).sum()
}

type ChoiceStream = Pin<Box<dyn Stream<Item = Result<Indexed, ApiError>> + Send>>;

/// All choices of a request. Dropping it aborts them and gives the request's place back.
pub struct Batch {
    choices: SelectAll<ChoiceStream>,
    permit: Permit,
    /// Where the answers come from, the dearest of them; absent where the output cache was not asked.
    pub origin: Option<Origin>,
    /// What the answers are stored under, of those that the output cache was asked for.
    pub keys: Vec<Key>,
    /// Of each sequence, by its index.
    pub facts: Vec<RequestFacts>,
}

/// A request ready for the engine.
pub struct Job<'a> {
    pub prompts: &'a [Arc<[u32]>],
    pub valid: &'a ValidRequest,
    /// The field that holds the prompt, for errors about it.
    pub param: &'static str,
    /// Who shares what is cached of prompts and answers.
    pub salt: Salt,
    pub permit: Permit,
    /// When the request stops waiting for caches.
    pub cache_deadline: Instant,
}

impl Batch {
    /// Submits every choice of every prompt, or none.
    ///
    /// # Errors
    /// A prompt that is empty or too long, a full queue, a server that is shutting down.
    pub async fn start(model: &Model, job: Job<'_>) -> Result<Self, ApiError> {
        check_num_experts(model, &job)?;
        let mut choices = SelectAll::new();
        let (mut origin, mut keys, mut facts) = (None, Vec::new(), Vec::new());
        for (prompt_idx, prompt) in job.prompts.iter().enumerate() {
            let max_tokens = token_budget(job.valid, prompt.len(), model.limits.max_tokens, job.param)?;
            for choice in 0..job.valid.num_choices {
                let index = u32::try_from(prompt_idx).expect("prompts are bounded") * job.valid.num_choices + choice;
                facts.push(RequestFacts {
                    arrival: job.permit.arrival,
                    num_prompt_tokens: prompt.len(),
                    num_choices: job.valid.num_choices,
                    max_tokens,
                });
                let plan = ChoicePlan { prompt, choice, index, max_tokens, facts: facts[index as usize] };
                let (outputs, found) = start_choice(model, &job, &plan).await?;
                choices.push(outputs);
                if let Some((from, key)) = found {
                    origin = origin.max(Some(from));
                    keys.push(key);
                }
            }
        }
        Ok(Self { choices, permit: job.permit, origin, keys, facts })
    }

    /// Nothing is computed for it.
    pub fn is_cached(&self) -> bool {
        self.origin.is_some_and(|origin| origin < Origin::Miss) && self.keys.len() == self.facts.len()
    }

    /// Everything that is to come, at once. What is there already is taken in steps, between which other requests have their turn.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn all(&mut self) -> Result<Vec<Indexed>, ApiError> {
        let mut outputs = Vec::new();
        while let Some(output) = self.next().await {
            outputs.push(output?);
            if outputs.len().is_multiple_of(TOKENS_PER_TURN) {
                tokio::task::yield_now().await;
            }
        }
        Ok(outputs)
    }

    /// The next output of any choice; `None` when all have ended.
    ///
    /// # Errors
    /// The request's deadline passed, or a choice failed; the batch is of no use after that.
    pub async fn next(&mut self) -> Option<Result<Indexed, ApiError>> {
        let deadline = self.permit.deadline.into();
        match tokio::time::timeout_at(deadline, self.choices.next()).await {
            Ok(output) => output,
            Err(_) => Some(Err(ApiError::Timeout { seconds: self.permit.timeout.as_secs_f64() })),
        }
    }
}

/// Tokens a choice may generate; what the context leaves where the request sets no limit.
///
/// # Errors
/// The prompt alone, or with `max_tokens`, is longer than a sequence can be.
fn token_budget(valid: &ValidRequest, prompt_len: usize, limit: usize, param: &'static str) -> Result<usize, ApiError> {
    if prompt_len == 0 {
        return Err(ApiError::invalid(param, "the prompt is empty"));
    }
    let rest = limit.saturating_sub(prompt_len);
    let too_long = |asked: usize| ApiError::ContextLength {
        param,
        reason: format!("prompt has {prompt_len} tokens and {asked} are to be generated, the limit is {limit} in all"),
    };
    match valid.stop.max_tokens {
        None if rest == 0 => Err(ApiError::ContextLength {
            param,
            reason: format!("prompt has {prompt_len} tokens, the limit is {limit} with at least one generated"),
        }),
        None if valid.stop.min_tokens > rest => {
            let reason = format!("is {}, the context leaves {rest} tokens", valid.stop.min_tokens);
            Err(ApiError::invalid("min_tokens", reason))
        }
        None => Ok(rest),
        Some(asked) if asked.max(1) > rest => Err(too_long(asked.max(1))),
        Some(asked) => Ok(asked),
    }
}

/// Bounds the answer where the experts of all tokens are wanted.
///
/// # Errors
/// They may be too many, or [`token_budget`]'s.
fn check_num_experts(model: &Model, job: &Job<'_>) -> Result<(), ApiError> {
    if !job.valid.output.routed_experts {
        return Ok(());
    }
    let per_token = model.engine.model().routed.ids_per_token() * job.valid.num_choices as usize;
    let mut num_ids = 0usize;
    for prompt in job.prompts {
        let max_tokens = token_budget(job.valid, prompt.len(), model.limits.max_tokens, job.param)?;
        num_ids = num_ids.saturating_add((prompt.len() + max_tokens).saturating_mul(per_token));
    }
    if num_ids > MAX_ROUTED_EXPERTS {
        let reason = format!(
            "asks for up to {num_ids} ids of experts, one answer has at most {MAX_ROUTED_EXPERTS}; hint: lower \
             `max_tokens`, or ask for fewer prompts and choices at once"
        );
        return Err(ApiError::invalid("return_routed_experts", reason));
    }
    Ok(())
}

struct ChoicePlan<'a> {
    prompt: &'a Arc<[u32]>,
    choice: u32,
    index: u32,
    /// 0 for a prompt that is only echoed.
    max_tokens: usize,
    facts: RequestFacts,
}

/// The outputs of a choice, and where they come from where the output cache was asked.
async fn start_choice(
    model: &Model,
    job: &Job<'_>,
    plan: &ChoicePlan<'_>,
) -> Result<(ChoiceStream, Option<(Origin, Key)>), ApiError> {
    let valid = job.valid;
    let index = plan.index;
    let prompt_only = plan.max_tokens == 0;
    let OutputOptions { routed_experts, expert_use, .. } = valid.output;
    if prompt_only && valid.sampling.prompt_logprobs.is_none() && !routed_experts && !expert_use {
        let delta = Delta::ended(Finish { reason: FinishReason::Length, stop_reason: None });
        return Ok((stream::iter([Ok(Indexed { index, output: Output::Delta(delta) })]).boxed(), None));
    }
    let mut sampling = valid.sampling.clone();
    sampling.choice = plan.choice;
    let stop_token_ids = valid.stop.model_token_ids.iter().chain(&valid.stop.token_ids).copied().collect();
    let request = GenerateRequest {
        prompt: Arc::clone(plan.prompt),
        sampling,
        stop: StopCriteria { max_tokens: plan.max_tokens.max(1), min_tokens: valid.stop.min_tokens, stop_token_ids },
        cache_salt: job.salt.bytes(),
        prefix: PrefixHint::default(),
        experts: valid.experts,
        wants_routed_experts: valid.output.routed_experts,
        wants_expert_use: valid.output.expert_use,
        expected_experts: None,
    };
    let assembler = new_assembler(model, valid, plan.prompt)?;
    let (source, found) = Source::open(model, Asked { request, job, prompt_only }).await?;
    let meter = ChoiceMeter::new(plan.facts).stored(matches!(found, Some((Origin::Hit, _))));
    let choice = Choice { source: Some(source), assembler, meter, prompt_only };
    let outputs = stream::unfold(choice, move |mut choice| async move {
        let output = choice.next().await?;
        Some((output.map(|output| Indexed { index, output }), choice))
    });
    // Nothing of the prompt is computed for an answer that is there, or that another request computes.
    let num_cached_tokens = plan.prompt.len();
    let started = matches!(found, Some((Origin::Hit | Origin::Shared, _)))
        .then_some(Ok(Indexed { index, output: Output::Started { num_cached_tokens } }));
    Ok((stream::iter(started).chain(outputs).boxed(), found))
}

/// Puts the text of one answer together.
fn new_assembler(model: &Model, valid: &ValidRequest, prompt: &[u32]) -> Result<Assembler<Detokenizer>, ApiError> {
    let options = DetokenizeOptions {
        skip_special_tokens: valid.output.skip_special_tokens,
        spaces_between_special_tokens: valid.output.spaces_between_special_tokens,
    };
    let decoder = Detokenizer::with_prompt(Arc::clone(&model.tokenizer), options, prompt).map_err(|error| {
        tracing::error!(%error, "the prompt cannot be detokenized");
        ApiError::Internal
    })?;
    Ok(Assembler::new(decoder, valid.stop.clone()))
}

/// One sequence on its way to the client.
struct Choice<D> {
    /// Gone as soon as nothing more is wanted: where it is the engine itself, that frees the sequence's blocks.
    source: Option<Source>,
    assembler: Assembler<D>,
    meter: ChoiceMeter,
    prompt_only: bool,
}

impl<D: TokenText> Choice<D> {
    async fn next(&mut self) -> Option<Result<Output, ApiError>> {
        let event = self.source.as_mut()?.next().await;
        let output = event.and_then(|event| self.on_event(event));
        if matches!(&output, Err(_) | Ok(Output::Delta(Delta { finish: Some(_), .. }))) {
            self.source = None;
        }
        Some(output)
    }

    /// What the event gives the client.
    fn on_event(&mut self, event: Event) -> Result<Output, ApiError> {
        let output = match event {
            Event::Scheduled { queue, num_cached_tokens } => {
                self.meter.scheduled(queue);
                Output::Started { num_cached_tokens }
            }
            Event::PromptLogprobs(logprobs) => Output::Prompt(logprobs),
            // The engine always samples one token; a prompt that is only echoed ends before it.
            event @ (Event::Token(_) | Event::Finished(_)) if self.prompt_only => {
                self.meter.finished("length");
                let end = Delta::ended(Finish { reason: FinishReason::Length, stop_reason: None });
                let (prompt_experts, expert_use) = match event {
                    Event::Token(sampled) => (sampled.routed_experts, sampled.expert_use),
                    _ => (Vec::new(), None),
                };
                Output::Delta(Delta { prompt_experts, expert_use, ..end })
            }
            Event::Token(sampled) => {
                self.meter.token();
                let delta = self.assembler.push(sampled)?;
                if delta.finish.is_some() {
                    self.meter.finished("stop");
                }
                Output::Delta(delta)
            }
            Event::Finished(reason) => {
                let delta = self.assembler.finish(reason);
                let stopped = matches!(&delta.finish, Some(finish) if finish.reason == FinishReason::Stop);
                self.meter.finished(if stopped { "stop" } else { "length" });
                Output::Delta(delta)
            }
            Event::Failed(error) => {
                self.meter.finished("error");
                return Err(ApiError::Generation(error));
            }
        };
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::StopRules;

    fn budget(prompt_len: usize, max_tokens: Option<usize>) -> Result<usize, ApiError> {
        budget_of(prompt_len, StopRules { max_tokens, ..StopRules::default() })
    }

    fn budget_of(prompt_len: usize, stop: StopRules) -> Result<usize, ApiError> {
        let valid = ValidRequest {
            sampling: engine::sampling::params::SamplingParams::default(),
            stop,
            experts: engine::ExpertOptions::default(),
            num_choices: 1,
            output: OutputOptions::default(),
            truncate_prompt: None,
            cache_salt: None,
            stream: None,
            cache: cache::Access { read: false, write: false },
        };
        token_budget(&valid, prompt_len, 10, "prompt")
    }

    #[test]
    fn the_budget_is_what_the_context_leaves() {
        assert_eq!(budget(4, None).unwrap(), 6);
        assert_eq!(budget(4, Some(6)).unwrap(), 6);
        assert_eq!(budget(4, Some(0)).unwrap(), 0);
        for (prompt_len, max_tokens) in [(4, Some(7)), (10, None), (10, Some(0)), (11, Some(1))] {
            let error = budget(prompt_len, max_tokens).unwrap_err();
            assert_eq!(error.code(), "context_length_exceeded", "{prompt_len} {max_tokens:?}");
        }
        assert_eq!(budget(0, None).unwrap_err().code(), "invalid_value");
        let at_least = |min_tokens| budget_of(4, StopRules { min_tokens, ..StopRules::default() });
        assert_eq!(at_least(6).unwrap(), 6);
        assert_eq!(at_least(7).unwrap_err().param(), Some("min_tokens"), "it could never be kept");
    }
}
