//! Which requests have one answer: everything that decides a choice's tokens, log-probs and end.

use cache::{Digest, Fingerprint, Key};
use engine::sampling::params::SamplingParams;
use engine::{GenerateRequest, StopCriteria};

use crate::validate::{OutputOptions, StopRules};

/// One choice of a request, as far as its answer depends on it.
#[derive(Clone, Copy, Debug)]
pub struct OutputKey<'a> {
    pub request: &'a GenerateRequest,
    /// Stop strings are found in the text, which the engine does not see.
    pub stop: &'a StopRules,
    pub output: OutputOptions,
    /// The prompt's log-probs are all that is wanted.
    pub prompt_only: bool,
}

impl OutputKey<'_> {
    /// Every field is named, so that a new one cannot be forgotten.
    pub(super) fn digest(&self, fingerprint: &Fingerprint) -> Key {
        let Self { request, stop, output, prompt_only } = self;
        let GenerateRequest { prompt, sampling, stop: criteria, cache_salt } = request;
        let mut digest = Digest::new("output");
        digest.fingerprint_field(fingerprint).field("salt", cache_salt).numbers("prompt", prompt);
        digest.number("prompt_only", u64::from(*prompt_only));
        add_sampling(&mut digest, sampling);
        add_stop(&mut digest, criteria, stop);
        if !stop.strings.is_empty() {
            // They decide the text, and with it where a stop string is found; else they only decide how tokens are shown.
            let OutputOptions { skip_special_tokens, spaces_between_special_tokens, .. } = *output;
            digest.number("skip_special_tokens", u64::from(skip_special_tokens));
            digest.number("spaces_between_special_tokens", u64::from(spaces_between_special_tokens));
        }
        digest.key()
    }
}

fn add_sampling(digest: &mut Digest, sampling: &SamplingParams) {
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed,
        choice,
        logprobs,
        prompt_logprobs,
    } = sampling;
    digest.float("presence_penalty", *presence_penalty).float("frequency_penalty", *frequency_penalty);
    digest.float("repetition_penalty", *repetition_penalty);
    let biased: Vec<u32> = logit_bias.iter().flat_map(|(&token, bias)| [token, bias.to_bits()]).collect();
    digest.numbers("logit_bias", &biased);
    for (name, count) in [("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)] {
        digest.number(name, count.map_or(0, |count| u64::from(count) + 1));
    }
    // Greedy choices are alike whatever else was asked for.
    if *temperature > 0.0 {
        digest.float("temperature", *temperature).number("top_k", u64::from(*top_k));
        digest.float("top_p", *top_p).float("min_p", *min_p);
        digest.number("seed", *seed).number("choice", u64::from(*choice));
    }
}

fn add_stop(digest: &mut Digest, criteria: &StopCriteria, rules: &StopRules) {
    let StopCriteria { max_tokens, min_tokens, stop_token_ids } = criteria;
    // The other fields of the rules are in the criteria.
    let StopRules { strings, include_in_output, .. } = rules;
    digest.number("max_tokens", *max_tokens as u64).number("min_tokens", *min_tokens as u64);
    let mut ids = stop_token_ids.clone();
    ids.sort_unstable();
    ids.dedup();
    digest.numbers("stop_token_ids", &ids);
    let mut strings: Vec<&str> = strings.iter().map(String::as_str).collect();
    strings.sort_unstable();
    strings.dedup();
    digest.number("num_stop_strings", strings.len() as u64);
    for string in strings {
        digest.text("stop", string);
    }
    // A stop token that is shown is part of the text in which stop strings are looked for.
    digest.number("include_in_output", u64::from(*include_in_output));
}
