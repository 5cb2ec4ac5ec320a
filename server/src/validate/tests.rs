//! Validation as tables: what is refused and by which name, what defaults mean.

use serde_json::json;

use super::*;

fn limits() -> ModelLimits {
    ModelLimits {
        names: vec!["m".to_owned(), "alias".to_owned()],
        vocab_size: 100,
        max_tokens: 64,
        max_sequences: 1000,
        defaults: GenerationDefaults {
            eos_token_ids: vec![2],
            temperature: Some(0.6),
            top_k: Some(20),
            ..GenerationDefaults::default()
        },
        experts: ExpertLimits { top_k: 4, top_p: 1.0, ..ExpertLimits::default() },
    }
}

fn check_chat(body: Value) -> Result<ValidRequest, ApiError> {
    unsupported(&body)?;
    unsupported_in_chat(&body)?;
    let (options, sampling) = (serde_json::from_value(body.clone()).unwrap(), serde_json::from_value(body).unwrap());
    chat(&options, &sampling, &limits())
}

fn check_completion(body: Value) -> Result<ValidRequest, ApiError> {
    unsupported(&body)?;
    let (options, sampling) = (serde_json::from_value(body.clone()).unwrap(), serde_json::from_value(body).unwrap());
    completion(&options, &sampling, &limits())
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for (body, param) in [
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 1.1}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"moe": {"top_p": 0}}), "moe.top_p"),
        (json!({"moe": {"max_experts": 0}}), "moe.max_experts"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"max_tokens": 2, "min_tokens": 3}), "min_tokens"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stop_token_ids": [100]}), "stop_token_ids"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"logit_bias": {"100": 1}}), "logit_bias.100"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"logit_bias": {"1": 1, "01": 2}}), "logit_bias.01"),
        (json!({"logit_bias": {"+1": 1}}), "logit_bias.+1"),
        (
            json!({"logit_bias": (0..4097).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()}),
            "logit_bias",
        ),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "continue_final_message"),
    ] {
        let error = check_chat(body.clone()).unwrap_err();
        assert_eq!((error.param(), error.code()), (Some(param), "invalid_value"), "{body}: {error}");
        assert_eq!(error.status(), 400, "{body}");
    }
}

#[test]
fn documented_fields_that_are_not_done_are_refused_by_name() {
    for (body, param) in [
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tools": [{"type": "function"}], "tool_choice": "auto"}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"structured_outputs": {"json": {}}}), "structured_outputs"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"guided_regex": "x"}), "guided_regex"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"store": true}), "store"),
        (json!({"prediction": {"type": "content"}}), "prediction"),
        (json!({"priority": 1}), "priority"),
        (json!({"echo": true}), "echo"),
        (json!({"bad_words": ["x"]}), "bad_words"),
        (json!({"truncation_side": "right"}), "truncation_side"),
        (json!({"include_reasoning": false}), "include_reasoning"),
        (json!({"return_prompt_text": true}), "return_prompt_text"),
        (json!({"stream_interval": 8}), "stream_interval"),
        (json!({"watermarking": true}), "watermarking"),
        (json!({"ec_transfer_params": {"a": 1}}), "ec_transfer_params"),
        (json!({"thinking_token_budget": 10}), "thinking_token_budget"),
        (json!({"request_id": "x"}), "request_id"),
        (json!({"service_tier": "priority"}), "service_tier"),
    ] {
        let error = check_chat(body.clone()).unwrap_err();
        assert_eq!((error.param(), error.code()), (Some(param), "unsupported_parameter"), "{body}: {error}");
    }
    for (body, param) in [(json!({"suffix": "x"}), "suffix"), (json!({"best_of": 2}), "best_of")] {
        assert_eq!(check_completion(body).unwrap_err().param(), Some(param));
    }
}

#[test]
fn the_same_fields_pass_where_they_ask_for_nothing() {
    check_chat(json!({
        "tools": [], "tool_choice": "none", "parallel_tool_calls": true, "response_format": {"type": "text"},
        "modalities": ["text"], "store": false, "priority": 0, "service_tier": "auto", "user": "u", "metadata": {"a": "b"},
        "logit_bias": {}, "audio": null, "guided_json": null, "echo": false, "nobody_knows_this": [1],
        "truncation_side": "left", "include_reasoning": true, "return_prompt_text": false, "stream_interval": 1,
        "watermarking": false, "thinking_token_budget": -1, "cache_salt": "x", "session_id": "y",
    }))
    .unwrap();
    check_chat(json!({"tools": [{"type": "function"}], "tool_choice": "none"})).unwrap();
    check_completion(json!({"n": 2, "best_of": 2, "suffix": null})).unwrap();
}

#[test]
fn silence_means_the_models_defaults() {
    let valid = check_chat(json!({})).unwrap();
    assert_eq!((valid.sampling.temperature, valid.sampling.top_k, valid.sampling.top_p), (0.6, 20, 1.0));
    assert_eq!((valid.stop.max_tokens, valid.num_choices, valid.sampling.logprobs), (None, 1, None));
    assert_eq!(valid.stop.model_token_ids, [2]);
    assert!(valid.output.skip_special_tokens && valid.stream.is_none());
    assert!(valid.output.spaces_between_special_tokens);
    assert!(!check_chat(json!({"spaces_between_special_tokens": false})).unwrap().output.spaces_between_special_tokens);
    assert_eq!(check_completion(json!({})).unwrap().stop.max_tokens, Some(16));

    let spoken =
        check_chat(json!({"temperature": 0, "top_k": -1, "ignore_eos": true, "seed": -1, "max_completion_tokens": 5}));
    let spoken = spoken.unwrap();
    assert_eq!((spoken.sampling.temperature, spoken.sampling.top_k, spoken.sampling.seed), (0.0, 0, u64::MAX));
    assert_eq!((spoken.stop.max_tokens, spoken.stop.model_token_ids.len()), (Some(5), 0));
}

#[test]
fn seeds_are_drawn_where_none_is_given() {
    let seed = || check_chat(json!({})).unwrap().sampling.seed;
    assert_ne!(seed(), seed());
}

#[test]
fn logprobs_are_counted_per_endpoint() {
    let chat = |body| check_chat(body).unwrap().sampling.logprobs;
    assert_eq!(chat(json!({"logprobs": true})), Some(0));
    assert_eq!(chat(json!({"logprobs": true, "top_logprobs": 3})), Some(3));
    assert_eq!(chat(json!({"logprobs": false})), None);
    let echoed = check_completion(json!({"logprobs": 2, "echo": true, "max_tokens": 0})).unwrap();
    assert_eq!((echoed.sampling.logprobs, echoed.sampling.prompt_logprobs), (Some(2), Some(2)));
    assert!(check_completion(json!({"max_tokens": 0})).is_err());
}

#[test]
fn a_checkpoint_with_impossible_defaults_is_told_by_field() {
    model_defaults(&limits().defaults).unwrap();
    let hot = GenerationDefaults { temperature: Some(f32::NAN), ..GenerationDefaults::default() };
    assert_eq!(model_defaults(&hot).unwrap_err().param(), Some("temperature"));
    let none = GenerationDefaults { top_p: Some(0.0), ..GenerationDefaults::default() };
    assert_eq!(model_defaults(&none).unwrap_err().param(), Some("top_p"));
}

#[test]
fn only_served_models_are_answered_for() {
    for name in ["m", "alias"] {
        check_chat(json!({ "model": name })).unwrap();
    }
    let error = check_chat(json!({"model": "other"})).unwrap_err();
    assert_eq!((error.status().as_u16(), error.code(), error.param()), (404, "model_not_found", Some("model")));
}

#[test]
fn prompts_are_cut_to_what_was_asked_or_to_what_fits() {
    let truncate = |keep: i64| check_chat(json!({ "truncate_prompt_tokens": keep })).unwrap().truncate_prompt;
    assert_eq!((truncate(5), truncate(-1)), (Some(5), Some(63)));
}
