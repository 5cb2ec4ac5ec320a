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
        let GenerateRequest {
            prompt,
            sampling,
            stop: criteria,
            cache_salt,
            // Who wants to know the experts or what they cost, or changes them, does not ask the cache.
            wants_routed_experts: _,
            wants_expert_use: _,
            experts: _,
            // They change no answer.
            prefix: _,
            expected_experts: _,
        } = request;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    struct Case {
        request: GenerateRequest,
        stop: StopRules,
        output: OutputOptions,
        prompt_only: bool,
    }

    impl Case {
        fn key(&self) -> Key {
            let key = OutputKey {
                request: &self.request,
                stop: &self.stop,
                output: self.output,
                prompt_only: self.prompt_only,
            };
            key.digest(&Digest::new("fingerprint").fingerprint())
        }
    }

    prop_compose! {
        fn sampling()(
            temperature in prop_oneof![Just(0.0f32), 0.1f32..2.0],
            (top_k, seed, choice) in (0u32..50, any::<u64>(), 0u32..4),
            (top_p, min_p) in (0.1f32..1.0, 0.0f32..1.0),
            (presence_penalty, frequency_penalty, repetition_penalty) in (-2.0f32..2.0, -2.0f32..2.0, 0.1f32..2.0),
            logit_bias in prop::collection::btree_map(0u32..100, -100.0f32..100.0, 0..3),
            (logprobs, prompt_logprobs) in (prop::option::of(0u32..20), prop::option::of(0u32..20)),
        ) -> SamplingParams {
            SamplingParams {
                temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, logit_bias, seed,
                choice, logprobs, prompt_logprobs,
            }
        }
    }

    prop_compose! {
        fn case()(
            prompt in prop::collection::vec(0u32..1000, 1..20),
            sampling in sampling(),
            (max_tokens, min_tokens) in (1usize..100, 0usize..10),
            mut stop_token_ids in prop::collection::vec(0u32..100, 0..4),
            mut strings in prop::collection::vec("[a-c]{1,3}", 0..3),
            (include_in_output, prompt_only) in any::<(bool, bool)>(),
            (skip_special_tokens, spaces_between_special_tokens) in any::<(bool, bool)>(),
            cache_salt in any::<[u8; 32]>(),
        ) -> Case {
            stop_token_ids.sort_unstable();
            stop_token_ids.dedup();
            strings.sort_unstable();
            strings.dedup();
            let stop = StopCriteria { max_tokens, min_tokens, stop_token_ids };
            Case {
                request: GenerateRequest {
                    prompt: Arc::from(prompt),
                    sampling,
                    stop,
                    cache_salt,
                    prefix: engine::PrefixHint::default(),
                    wants_routed_experts: false,
                    wants_expert_use: false,
                    experts: engine::ExpertOptions::default(),
                    expected_experts: None,
                },
                stop: StopRules { strings, include_in_output, ..StopRules::default() },
                output: OutputOptions { skip_special_tokens, spaces_between_special_tokens, ..OutputOptions::default() },
                prompt_only,
            }
        }
    }

    /// Changes one field, and says whether that may change the answer.
    fn change(case: &mut Case, field: usize) -> bool {
        let Case { request, stop, output, prompt_only } = case;
        let GenerateRequest { prompt, sampling, stop: criteria, cache_salt, .. } = request;
        let is_drawn = sampling.temperature > 0.0;
        let has_strings = !stop.strings.is_empty();
        let add = |value: &mut f32| *value += 0.25;
        let next = |count: &mut Option<u32>| *count = count.map_or(Some(0), |count| count.checked_sub(1));
        match field {
            0 => *prompt = prompt.iter().copied().chain([7]).collect(),
            1 => *prompt = prompt.iter().map(|token| token ^ 1).collect(),
            2 => add(&mut sampling.temperature),
            3 => add(&mut sampling.presence_penalty),
            4 => add(&mut sampling.frequency_penalty),
            5 => add(&mut sampling.repetition_penalty),
            6 => drop(sampling.logit_bias.insert(1000, 1.0)),
            7 => next(&mut sampling.logprobs),
            8 => next(&mut sampling.prompt_logprobs),
            9 => criteria.max_tokens += 1,
            10 => criteria.min_tokens += 1,
            11 => criteria.stop_token_ids.push(1000),
            12 => stop.strings.push("d".to_owned()),
            13 => stop.include_in_output ^= true,
            14 => *prompt_only ^= true,
            15 => cache_salt[9] ^= 1,
            // What only says how a token is drawn, where one is drawn.
            16 => sampling.top_k += 1,
            17 => add(&mut sampling.top_p),
            18 => add(&mut sampling.min_p),
            19 => sampling.seed ^= 1,
            20 => sampling.choice += 1,
            // What only says how tokens become text, where stop strings are looked for in it.
            21 => output.skip_special_tokens ^= true,
            22 => output.spaces_between_special_tokens ^= true,
            // What never decides it.
            23 => output.token_ids ^= true,
            24 => criteria.stop_token_ids.reverse(),
            25 => stop.strings.reverse(),
            _ => unreachable!("there are {NUM_FIELDS} fields"),
        }
        match field {
            16..=20 => is_drawn,
            21 | 22 => has_strings,
            23..=25 => false,
            _ => true,
        }
    }

    const NUM_FIELDS: usize = 26;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn requests_meet_where_their_answer_must_be_the_same_and_nowhere_else(mut case in case(), field in 0..NUM_FIELDS) {
            let before = case.key();
            let may_differ = change(&mut case, field);
            prop_assert_eq!(case.key() != before, may_differ, "field {}", field);
        }
    }
}
