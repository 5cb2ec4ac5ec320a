//! Fields that OpenAI or vLLM document and that are not done here: refusing them is better than ignoring them.

use serde_json::Value;

use crate::error::ApiError;

/// A documented field that is not done yet, the values of it that ask for nothing, and what to do instead.
struct Refused {
    field: &'static str,
    harmless: fn(&Value) -> bool,
    hint: &'static str,
}

const NO_CONSTRAINT: &str = "structured output is not available yet; leave it out";
const NO_TOOLS: &str = "tool calls are not available yet; leave it out or set it to `none`";
const TEXT_ONLY: &str = "the model reads and writes text only; leave it out";
const NO_SEARCH: &str = "beam search is not available; sample with `n` instead";
const LEAVE_OUT: &str = "it is not available; leave it out";

/// Fields that OpenAI or vLLM document and that would be wrong to ignore.
const REFUSED: &[Refused] = &[
    Refused { field: "tool_choice", harmless: |value| value == "none" || value == "auto", hint: NO_TOOLS },
    Refused { field: "functions", harmless: is_empty, hint: NO_TOOLS },
    Refused { field: "function_call", harmless: |value| value == "none", hint: NO_TOOLS },
    Refused { field: "response_format", harmless: |value| value["type"] == "text", hint: NO_CONSTRAINT },
    Refused { field: "structured_outputs", harmless: is_empty, hint: NO_CONSTRAINT },
    Refused { field: "structural_tag", harmless: is_empty, hint: NO_CONSTRAINT },
    Refused { field: "guided_json", harmless: Value::is_null, hint: NO_CONSTRAINT },
    Refused { field: "guided_regex", harmless: Value::is_null, hint: NO_CONSTRAINT },
    Refused { field: "guided_choice", harmless: is_empty, hint: NO_CONSTRAINT },
    Refused { field: "guided_grammar", harmless: Value::is_null, hint: NO_CONSTRAINT },
    Refused { field: "guided_decoding_backend", harmless: Value::is_null, hint: NO_CONSTRAINT },
    Refused { field: "guided_whitespace_pattern", harmless: Value::is_null, hint: NO_CONSTRAINT },
    Refused { field: "audio", harmless: Value::is_null, hint: TEXT_ONLY },
    Refused { field: "modalities", harmless: |value| *value == serde_json::json!(["text"]), hint: TEXT_ONLY },
    Refused { field: "mm_processor_kwargs", harmless: is_empty, hint: TEXT_ONLY },
    Refused { field: "media_io_kwargs", harmless: is_empty, hint: TEXT_ONLY },
    Refused { field: "prompt_embeds", harmless: Value::is_null, hint: TEXT_ONLY },
    Refused { field: "use_beam_search", harmless: |value| *value == false, hint: NO_SEARCH },
    Refused { field: "length_penalty", harmless: |value| value.as_f64() == Some(1.0), hint: NO_SEARCH },
    Refused { field: "early_stopping", harmless: |value| *value == false, hint: NO_SEARCH },
    Refused { field: "suffix", harmless: |value| value == "", hint: "insertion is not available; leave it out" },
    Refused { field: "store", harmless: |value| *value == false, hint: "nothing is stored here; leave it out" },
    Refused { field: "prediction", harmless: Value::is_null, hint: LEAVE_OUT },
    Refused { field: "web_search_options", harmless: Value::is_null, hint: LEAVE_OUT },
    Refused { field: "verbosity", harmless: |value| value == "medium", hint: LEAVE_OUT },
    Refused { field: "logits_processors", harmless: is_empty, hint: LEAVE_OUT },
    Refused { field: "bad_words", harmless: is_empty, hint: "use `logit_bias` instead" },
    Refused { field: "allowed_token_ids", harmless: is_empty, hint: "use `logit_bias` instead" },
    Refused { field: "logprob_token_ids", harmless: is_empty, hint: "use `top_logprobs` instead" },
    Refused { field: "kv_transfer_params", harmless: is_empty, hint: LEAVE_OUT },
    Refused { field: "ec_transfer_params", harmless: is_empty, hint: LEAVE_OUT },
    Refused { field: "vllm_xargs", harmless: is_empty, hint: LEAVE_OUT },
    Refused { field: "repetition_detection", harmless: Value::is_null, hint: LEAVE_OUT },
    Refused { field: "thinking_token_budget", harmless: |value| *value == -1, hint: LEAVE_OUT },
    Refused {
        field: "include_reasoning",
        harmless: |value| *value == true,
        hint: "reasoning is not told from the answer",
    },
    Refused { field: "watermarking", harmless: |value| *value == false, hint: LEAVE_OUT },
    Refused { field: "stream_interval", harmless: |value| *value == 1, hint: "every token is sent as it comes" },
    Refused { field: "truncation_side", harmless: |value| value == "left", hint: "prompts keep their last tokens" },
    Refused { field: "return_prompt_text", harmless: |value| *value == false, hint: "use `return_token_ids` instead" },
    Refused { field: "routed_experts_prompt_start", harmless: |value| *value == 0, hint: LEAVE_OUT },
    Refused { field: "request_id", harmless: Value::is_null, hint: "send it as the header `X-Request-Id`" },
    Refused { field: "service_tier", harmless: is_default_tier, hint: "all requests are served alike; leave it out" },
    Refused { field: "lora_request", harmless: Value::is_null, hint: "adapters are not available; leave it out" },
    Refused { field: "priority", harmless: |value| *value == 0, hint: "requests are served in order; leave it out" },
];

/// Refuses documented fields that are not done yet; null always passes.
///
/// # Errors
/// [`ApiError::Unsupported`] for the first one.
pub fn unsupported(body: &Value) -> Result<(), ApiError> {
    let asks = |refused: &&Refused| {
        body.get(refused.field).is_some_and(|value| !value.is_null() && !(refused.harmless)(value))
    };
    match REFUSED.iter().find(asks) {
        None => Ok(()),
        Some(refused) => Err(ApiError::Unsupported { param: refused.field.to_owned(), hint: refused.hint.to_owned() }),
    }
}

/// Refuses what only text completions have: `echo` in a chat.
///
/// # Errors
/// [`ApiError::Unsupported`].
pub fn unsupported_in_chat(body: &Value) -> Result<(), ApiError> {
    match body.get("echo") {
        Some(Value::Bool(true)) => {
            let hint = "a chat cannot echo its messages; use /v1/completions".to_owned();
            Err(ApiError::Unsupported { param: "echo".to_owned(), hint })
        }
        _ => Ok(()),
    }
}

fn is_default_tier(tier: &Value) -> bool {
    tier == "auto" || tier == "default"
}

pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
