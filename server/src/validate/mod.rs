//! Request fields to what they mean: ranges and defaults. `experts` holds what is about experts, `unsupported` the fields that are refused by name.

mod experts;
#[cfg(test)]
mod tests;
mod unsupported;

use std::collections::{BTreeMap, HashMap};

use cache::Access;
use engine::sampling::params::SamplingParams;
use engine::{ExpertOptions, GenerationDefaults};
use serde_json::Value;

pub use experts::ExpertLimits;
use unsupported::is_empty;
pub use unsupported::{unsupported, unsupported_in_chat};

use crate::error::ApiError;
use crate::openai::chat::ChatOptions;
use crate::openai::completions::CompletionOptions;
use crate::openai::sampling::SamplingOptions;

const MAX_CHOICES: u32 = 128;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 4096;
const MAX_STOP_TOKENS: usize = 1024;
const MAX_TOP_LOGPROBS: u32 = 20;
/// Every choice of a request holds its biases, and applies them to every token.
const MAX_BIASES: usize = 4096;
const MAX_CACHE_SALT_BYTES: usize = 256;

/// What validation needs to know about the server.
#[derive(Clone, Debug)]
pub struct ModelLimits {
    pub names: Vec<String>,
    pub vocab_size: usize,
    /// Prompt plus output tokens that one sequence can hold.
    pub max_tokens: usize,
    /// Sequences that one request may ask for.
    pub max_sequences: usize,
    pub defaults: GenerationDefaults,
    pub experts: ExpertLimits,
}

/// A request whose fields are in range, prompt apart.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    pub sampling: SamplingParams,
    pub stop: StopRules,
    pub experts: ExpertOptions,
    /// Choices per prompt.
    pub num_choices: u32,
    pub output: OutputOptions,
    pub truncate_prompt: Option<usize>,
    pub cache_salt: Option<String>,
    pub stream: Option<StreamPlan>,
    /// What it may do with the output cache; nothing where its answer is not determined by the request.
    pub cache: Access,
}

/// When a choice ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopRules {
    pub strings: Vec<String>,
    /// Those of the request; the model's own come on top unless `ignore_eos`.
    pub token_ids: Vec<u32>,
    pub model_token_ids: Vec<u32>,
    pub include_in_output: bool,
    pub min_tokens: usize,
    pub max_tokens: Option<usize>,
}

/// What the answer shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputOptions {
    pub skip_special_tokens: bool,
    pub spaces_between_special_tokens: bool,
    pub token_ids: bool,
    pub tokens_as_ids: bool,
    /// The experts of every token.
    pub routed_experts: bool,
    /// What the experts cost.
    pub expert_use: bool,
    pub echo: bool,
}

/// How the answer is streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamPlan {
    pub include_usage: bool,
    pub continuous_usage: bool,
}

/// Endpoint-specific fields that the shared checks need.
struct Extras {
    max_tokens: Option<usize>,
    max_tokens_param: &'static str,
    /// Alternatives per generated token, where log-probs are asked for, and the field that asks.
    logprobs: Option<u32>,
    logprobs_param: &'static str,
    echo: bool,
}

/// Checks a chat completion.
///
/// # Errors
/// The first field that is out of range, with its name.
pub fn chat(chat: &ChatOptions, sampling: &SamplingOptions, limits: &ModelLimits) -> Result<ValidRequest, ApiError> {
    let wants_logprobs = chat.logprobs.unwrap_or(false);
    if chat.top_logprobs.is_some_and(|top| top > 0) && !wants_logprobs {
        return Err(ApiError::invalid("top_logprobs", "needs `logprobs` to be true"));
    }
    if chat.continue_final_message == Some(true) && chat.add_generation_prompt == Some(true) {
        return Err(ApiError::invalid("continue_final_message", "cannot go with `add_generation_prompt`"));
    }
    if chat.tools.as_ref().is_some_and(|tools| !is_empty(tools)) && chat.tool_choice != Some(Value::from("none")) {
        let hint = "calls are not parsed yet; leave `tools` out or set `tool_choice` to `none`".to_owned();
        return Err(ApiError::Unsupported { param: "tools".to_owned(), hint });
    }
    let (max_tokens, max_tokens_param) = match chat.max_completion_tokens {
        Some(limit) => (Some(limit), "max_completion_tokens"),
        None => (sampling.max_tokens, "max_tokens"),
    };
    let extras = Extras {
        max_tokens,
        max_tokens_param,
        logprobs: wants_logprobs.then(|| chat.top_logprobs.unwrap_or(0)),
        logprobs_param: "top_logprobs",
        echo: false,
    };
    shared(sampling, &extras, limits)
}

/// Checks a text completion. `max_tokens` is 16 where absent, as OpenAI has it; 0 is allowed with `echo`.
///
/// # Errors
/// The first field that is out of range, with its name.
pub fn completion(
    completion: &CompletionOptions,
    sampling: &SamplingOptions,
    limits: &ModelLimits,
) -> Result<ValidRequest, ApiError> {
    if completion.best_of.is_some_and(|best_of| best_of != sampling.n.unwrap_or(1)) {
        let hint = "candidates are not ranked; leave it out or set it to `n`".to_owned();
        return Err(ApiError::Unsupported { param: "best_of".to_owned(), hint });
    }
    let extras = Extras {
        max_tokens: Some(sampling.max_tokens.unwrap_or(16)),
        max_tokens_param: "max_tokens",
        logprobs: completion.logprobs,
        logprobs_param: "logprobs",
        echo: completion.echo.unwrap_or(false),
    };
    shared(sampling, &extras, limits)
}

/// Checks what the checkpoint would have sampled by where a request is silent.
///
/// # Errors
/// The first value that no request could name either.
pub fn model_defaults(defaults: &GenerationDefaults) -> Result<(), ApiError> {
    sampling_params(&SamplingOptions::default(), defaults).map(drop)
}

/// Checks that `model` names what is served; absent is fine.
///
/// # Errors
/// [`ApiError::UnknownModel`].
pub fn model_name(model: Option<&str>, limits: &ModelLimits) -> Result<(), ApiError> {
    match model {
        Some(name) if !limits.names.iter().any(|served| served == name) => Err(ApiError::UnknownModel {
            name: name.to_owned(),
            served: limits.names.iter().map(|served| format!("`{served}`")).collect::<Vec<_>>().join(", "),
        }),
        _ => Ok(()),
    }
}

fn shared(fields: &SamplingOptions, extras: &Extras, limits: &ModelLimits) -> Result<ValidRequest, ApiError> {
    model_name(fields.model.as_deref(), limits)?;
    let num_choices = fields.n.unwrap_or(1);
    let most_choices = MAX_CHOICES.min(u32::try_from(limits.max_sequences).unwrap_or(MAX_CHOICES));
    if !(1..=most_choices).contains(&num_choices) {
        return Err(ApiError::invalid("n", format!("is {num_choices}, allowed are 1 to {most_choices}")));
    }
    if extras.max_tokens == Some(0) && !extras.echo {
        return Err(ApiError::invalid(extras.max_tokens_param, "is 0, allowed are 1 and up"));
    }
    let min_tokens = fields.min_tokens.unwrap_or(0);
    if extras.max_tokens.is_some_and(|most| min_tokens > most) {
        return Err(ApiError::invalid(
            "min_tokens",
            format!("is {min_tokens}, more than `{}`", extras.max_tokens_param),
        ));
    }
    let stream = stream_plan(fields)?;
    let prompt_logprobs = prompt_logprobs(fields, extras, stream.is_some())?;
    let sampling = sampling_params(fields, &limits.defaults)?;
    let experts = experts::expert_options(fields.moe, sampling.seed, &limits.experts)?;
    let cache = match limits.experts.change(&experts) {
        true => Access { read: false, write: false },
        false => cache_access(fields, &sampling),
    };
    Ok(ValidRequest {
        sampling: SamplingParams {
            logit_bias: logit_bias(fields.logit_bias.as_ref(), limits.vocab_size)?,
            logprobs: top_count(extras.logprobs, extras.logprobs_param)?,
            prompt_logprobs,
            ..sampling
        },
        stop: StopRules { max_tokens: extras.max_tokens, min_tokens, ..stop_rules(fields, limits)? },
        experts,
        num_choices,
        output: OutputOptions {
            skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
            spaces_between_special_tokens: fields.spaces_between_special_tokens.unwrap_or(true),
            token_ids: fields.return_token_ids.unwrap_or(false),
            tokens_as_ids: fields.return_tokens_as_token_ids.unwrap_or(false),
            routed_experts: fields.return_routed_experts.unwrap_or(false),
            expert_use: wants_expert_use(fields),
            echo: extras.echo,
        },
        truncate_prompt: truncation(fields.truncate_prompt_tokens, limits.max_tokens)?,
        cache_salt: cache_salt(fields.cache_salt.as_deref())?.map(str::to_owned),
        stream,
        cache,
    })
}

fn wants_expert_use(fields: &SamplingOptions) -> bool {
    fields.moe.and_then(|moe| moe.usage) == Some(true)
}

/// Only what is greedy or seeded has one answer; and of that the experts are not stored, nor what they cost.
fn cache_access(fields: &SamplingOptions, sampling: &SamplingParams) -> Access {
    let is_determined = (sampling.temperature == 0.0 || fields.seed.is_some())
        && fields.return_routed_experts != Some(true)
        && !wants_expert_use(fields);
    let options = fields.cache.unwrap_or_default();
    Access {
        read: is_determined && options.read.unwrap_or(true),
        write: is_determined && options.write.unwrap_or(true),
    }
}

fn stream_plan(fields: &SamplingOptions) -> Result<Option<StreamPlan>, ApiError> {
    let streams = fields.stream.unwrap_or(false);
    match fields.stream_options {
        Some(_) if !streams => Err(ApiError::invalid("stream_options", "needs `stream` to be true")),
        options => Ok(streams.then(|| {
            let options = options.unwrap_or_default();
            StreamPlan {
                include_usage: options.include_usage.unwrap_or(false),
                continuous_usage: options.continuous_usage_stats.unwrap_or(false),
            }
        })),
    }
}

/// Alternatives per prompt token: those of `prompt_logprobs`, or of `logprobs` where the prompt is echoed.
fn prompt_logprobs(fields: &SamplingOptions, extras: &Extras, streams: bool) -> Result<Option<u32>, ApiError> {
    let asked = top_count(fields.prompt_logprobs, "prompt_logprobs")?;
    if asked.is_some() && streams {
        return Err(ApiError::invalid("prompt_logprobs", "is not available with `stream`"));
    }
    let echoed = extras.logprobs.filter(|_| extras.echo);
    Ok(asked.max(echoed))
}

fn sampling_params(fields: &SamplingOptions, defaults: &GenerationDefaults) -> Result<SamplingParams, ApiError> {
    let top_k = fields.top_k.or(defaults.top_k.map(i64::from)).unwrap_or(0);
    let top_k = match top_k {
        -1 => 0,
        keep => u32::try_from(keep)
            .map_err(|_| ApiError::invalid("top_k", format!("is {keep}, allowed are -1 to 4294967295")))?,
    };
    let within = |param: &'static str, value: Option<f32>, default: f32, low: f32, high: f32| {
        let value = value.unwrap_or(default);
        match (low..=high).contains(&value) {
            true => Ok(value),
            false => Err(ApiError::invalid(param, format!("is {value}, allowed are {low} to {high}"))),
        }
    };
    let above_zero = |param: &'static str, value: f32| match value > 0.0 {
        true => Ok(value),
        false => Err(ApiError::invalid(param, format!("is {value}, must be above 0"))),
    };
    let top_p = within("top_p", fields.top_p.or(defaults.top_p), 1.0, 0.0, 1.0)?;
    let repetition = fields.repetition_penalty.or(defaults.repetition_penalty);
    let repetition = within("repetition_penalty", repetition, 1.0, 0.0, 2.0)?;
    Ok(SamplingParams {
        temperature: within("temperature", fields.temperature.or(defaults.temperature), 1.0, 0.0, 2.0)?,
        top_k,
        top_p: above_zero("top_p", top_p)?,
        min_p: within("min_p", fields.min_p.or(defaults.min_p), 0.0, 0.0, 1.0)?,
        presence_penalty: within("presence_penalty", fields.presence_penalty, 0.0, -2.0, 2.0)?,
        frequency_penalty: within("frequency_penalty", fields.frequency_penalty, 0.0, -2.0, 2.0)?,
        repetition_penalty: above_zero("repetition_penalty", repetition)?,
        seed: fields.seed.map_or_else(rand::random, i64::cast_unsigned),
        ..SamplingParams::default()
    })
}

fn logit_bias(bias: Option<&HashMap<String, f32>>, vocab_size: usize) -> Result<BTreeMap<u32, f32>, ApiError> {
    let entry = |(key, value): (&String, &f32)| {
        let param = || format!("logit_bias.{key}");
        let token: Option<u32> = key.parse().ok();
        // One spelling per id: of two biases for a token neither could be said to win.
        let token = token.filter(|token| token.to_string() == *key);
        let token = token.ok_or_else(|| ApiError::invalid(param(), "the key is not a token id"))?;
        if token as usize >= vocab_size {
            return Err(ApiError::invalid(param(), format!("the vocabulary has {vocab_size} tokens")));
        }
        if !(-100.0..=100.0).contains(value) {
            return Err(ApiError::invalid(param(), format!("is {value}, allowed are -100 to 100")));
        }
        Ok((token, *value))
    };
    if let Some(count) = bias.map(HashMap::len).filter(|count| *count > MAX_BIASES) {
        return Err(ApiError::invalid("logit_bias", format!("has {count} tokens, at most {MAX_BIASES} are allowed")));
    }
    bias.into_iter().flatten().map(entry).collect()
}

fn stop_rules(fields: &SamplingOptions, limits: &ModelLimits) -> Result<StopRules, ApiError> {
    let strings = fields.stop.clone().map(crate::openai::OneOrMany::into_vec).unwrap_or_default();
    if strings.len() > MAX_STOP_STRINGS {
        return Err(ApiError::invalid(
            "stop",
            format!("has {} strings, at most {MAX_STOP_STRINGS} are allowed", strings.len()),
        ));
    }
    if let Some(string) = strings.iter().find(|string| string.is_empty() || string.len() > MAX_STOP_BYTES) {
        let reason = format!("has a string of {} bytes, allowed are 1 to {MAX_STOP_BYTES}", string.len());
        return Err(ApiError::invalid("stop", reason));
    }
    let token_ids = fields.stop_token_ids.clone().unwrap_or_default();
    if token_ids.len() > MAX_STOP_TOKENS {
        return Err(ApiError::invalid(
            "stop_token_ids",
            format!("has {} ids, at most {MAX_STOP_TOKENS} are allowed", token_ids.len()),
        ));
    }
    if let Some(token) = token_ids.iter().find(|token| **token as usize >= limits.vocab_size) {
        let reason = format!("token id {token} is out of range, the vocabulary has {} tokens", limits.vocab_size);
        return Err(ApiError::invalid("stop_token_ids", reason));
    }
    Ok(StopRules {
        strings,
        token_ids,
        model_token_ids: match fields.ignore_eos.unwrap_or(false) {
            true => Vec::new(),
            false => limits.defaults.eos_token_ids.clone(),
        },
        include_in_output: fields.include_stop_str_in_output.unwrap_or(false),
        ..StopRules::default()
    })
}

fn top_count(count: Option<u32>, param: &'static str) -> Result<Option<u32>, ApiError> {
    match count {
        Some(count) if count > MAX_TOP_LOGPROBS => {
            Err(ApiError::invalid(param, format!("is {count}, allowed are 0 to {MAX_TOP_LOGPROBS}")))
        }
        count => Ok(count),
    }
}

/// Checks the length of a `cache_salt`.
///
/// # Errors
/// It is empty or too long.
pub fn cache_salt(salt: Option<&str>) -> Result<Option<&str>, ApiError> {
    match salt.map(str::len) {
        Some(len) if !(1..=MAX_CACHE_SALT_BYTES).contains(&len) => {
            let reason = format!("has {len} bytes, allowed are 1 to {MAX_CACHE_SALT_BYTES}");
            Err(ApiError::invalid("cache_salt", reason))
        }
        _ => Ok(salt),
    }
}

fn truncation(keep: Option<i64>, max_tokens: usize) -> Result<Option<usize>, ApiError> {
    match keep {
        None => Ok(None),
        // One place is left for an answer.
        Some(-1) => Ok(Some(max_tokens.saturating_sub(1).max(1))),
        Some(keep) if keep >= 1 => Ok(Some(usize::try_from(keep).unwrap_or(usize::MAX))),
        Some(keep) => Err(ApiError::invalid("truncate_prompt_tokens", format!("is {keep}, allowed are -1, 1 and up"))),
    }
}
