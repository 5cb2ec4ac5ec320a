//! Answers from scripted outputs: what clients read, to the byte where it matters.

use std::sync::Arc;

use serde_json::{Value, json};

use super::chat::ChatWriter;
use super::completions::{CompletionPrompt, CompletionWriter};
use super::*;
use crate::openai::StopReason;
use engine::MoeShape;

const SPECIAL: u32 = 25;

/// Token `n` is the `n`-th letter.
struct Letters;

impl Vocabulary for Letters {
    fn token_bytes(&self, token: u32) -> Vec<u8> {
        vec![b'a' + u8::try_from(token).unwrap()]
    }

    fn is_special(&self, token: u32) -> bool {
        token == SPECIAL
    }
}

fn envelope(output: OutputOptions, wants_logprobs: bool) -> Envelope {
    let (id, model) = ("id-1".to_owned(), "m".to_owned());
    let routed = RoutedLayout::new(&[MoeShape { num_experts: 9, top_k: 2 }]);
    let (vocabulary, moe) = (Arc::new(Letters), MoeTerms::default());
    Envelope { id, created: 7, model, output, wants_logprobs, vocabulary, routed, is_cached: false, moe }
}

fn text(index: u32, text: &str, token: u32) -> Indexed {
    let record = TokenRecord { token, logprob: -0.5, top: vec![(token, -0.5), (9, f32::NEG_INFINITY)], text_offset: 0 };
    let delta = Delta { text: text.to_owned(), token_ids: vec![token], logprobs: vec![record], ..Delta::default() };
    Indexed { index, output: Output::Delta(delta) }
}

fn end(index: u32, stop_reason: Option<StopReason>) -> Indexed {
    let finish = Finish { reason: FinishReason::Stop, stop_reason };
    Indexed { index, output: Output::Delta(Delta::ended(finish)) }
}

fn values<C: serde::Serialize>(chunks: impl IntoIterator<Item = C>) -> Vec<Value> {
    chunks.into_iter().map(|chunk| serde_json::to_value(chunk).unwrap()).collect()
}

#[test]
fn a_streamed_chat_is_role_text_end_usage() {
    let plan = StreamPlan { include_usage: true, continuous_usage: false };
    let mut writer =
        ChatWriter { envelope: envelope(OutputOptions::default(), false), usage: StreamUsage::new(plan, 3, 1) };
    let mut chunks = values(writer.opening(1, &[1, 2, 3]));
    let started = Indexed { index: 0, output: Output::Started { num_cached_tokens: 2 } };
    for output in [started, text(0, "a", 0), text(0, "", 1), end(0, Some(StopReason::Text("!".into())))] {
        let mut output = output;
        if let Output::Delta(delta) = &mut output.output {
            delta.logprobs.clear();
        }
        chunks.extend(values(writer.write(output)));
    }
    chunks.extend(values(writer.closing()));

    assert_eq!(chunks.len(), 4, "the empty delta is not sent");
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["object"]), (&json!("id-1"), &json!("chat.completion.chunk")));
    }
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[1]["choices"][0]["delta"], json!({"content": "a"}));
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(chunks[1].get("usage"), Some(&Value::Null));
    assert_eq!(chunks[2]["choices"][0]["delta"], json!({}));
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[2]["choices"][0]["stop_reason"], "!");
    assert_eq!(chunks[3]["choices"], json!([]));
    let details = json!({"cached_tokens": 2});
    let usage =
        json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": details});
    assert_eq!(chunks[3]["usage"], usage);
}

#[test]
fn usage_is_absent_where_nobody_asked_and_running_where_asked_so() {
    let write = |plan| {
        let mut writer =
            ChatWriter { envelope: envelope(OutputOptions::default(), false), usage: StreamUsage::new(plan, 3, 1) };
        let chunks = values(writer.write(text(0, "a", 0)));
        assert!(writer.closing().is_none());
        chunks[0].get("usage").cloned()
    };
    assert_eq!(write(StreamPlan::default()), None);
    let running = write(StreamPlan { include_usage: false, continuous_usage: true }).unwrap();
    assert_eq!(running["completion_tokens"], 1);
}

#[test]
fn a_whole_chat_carries_logprobs_ids_and_usage_over_all_choices() {
    let output = OutputOptions { token_ids: true, ..OutputOptions::default() };
    let outputs = vec![text(1, "b", 1), text(0, "a", 0), end(0, None), end(1, Some(StopReason::Token(5)))];
    let answer = values([envelope(output, true).chat_completion(&[4], collect(outputs, 2))]).remove(0);
    assert_eq!(answer["choices"][0]["message"], json!({"role": "assistant", "content": "a", "refusal": null}));
    assert_eq!(answer["choices"][1]["index"], 1);
    assert_eq!(answer["choices"][1]["stop_reason"], 5);
    assert_eq!(answer["choices"][1]["token_ids"], json!([1]));
    assert_eq!(answer["prompt_token_ids"], json!([4]));
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    let logprob = &answer["choices"][0]["logprobs"]["content"][0];
    assert_eq!((&logprob["token"], &logprob["bytes"], &logprob["logprob"]), (&json!("a"), &json!([97]), &json!(-0.5)));
    assert_eq!(logprob["top_logprobs"][1]["logprob"], -9999.0, "minus infinity is not JSON");
}

#[test]
fn an_echoed_completion_puts_the_prompt_and_its_logprobs_first() {
    let prompts = [CompletionPrompt { ids: Arc::from([2, 3]), text: "cd".to_owned() }];
    let known = vec![engine::PromptLogprob { token: 3, logprob: -1.5, top: vec![(3, -1.5)] }];
    let outputs = || [Indexed { index: 0, output: Output::Prompt(known.clone()) }, text(0, "a", 0), end(0, None)];
    let output = OutputOptions { echo: true, ..OutputOptions::default() };
    let choices = collect(outputs().into(), 1);
    let answer = values([envelope(output, true).completion(&prompts, choices)]).remove(0);
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("cda"), &json!("stop")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["c", "d", "a"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -1.5, -0.5]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
    assert_eq!(choice["prompt_logprobs"], json!([null, {"3": {"logprob": -1.5, "rank": 1, "decoded_token": "d"}}]));

    let mut writer = CompletionWriter {
        envelope: envelope(output, true),
        usage: StreamUsage::new(StreamPlan::default(), 2, 1),
        prompts: prompts.to_vec(),
        num_choices: 1,
        opened: vec![false],
    };
    let chunks: Vec<Value> = outputs().into_iter().flat_map(|output| values(writer.write(output))).collect();
    let texts: Vec<_> = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["cd", "a", ""]);
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn special_tokens_of_an_echoed_prompt_take_no_room_in_its_text() {
    let output = OutputOptions { echo: true, skip_special_tokens: true, ..OutputOptions::default() };
    let logprobs = envelope(output, true).echo_logprobs(&[SPECIAL, 2, 3], &[]);
    assert_eq!(logprobs.text_offset, [0, 0, 1]);
}

#[test]
fn choices_of_many_prompts_are_numbered_through() {
    let prompt = |id: u32| CompletionPrompt { ids: Arc::from([id]), text: String::new() };
    let outputs = [3, 0, 2, 1].into_iter().flat_map(|index| {
        let num_cached_tokens = index as usize;
        [Indexed { index, output: Output::Started { num_cached_tokens } }, text(index, "x", index), end(index, None)]
    });
    let choices = collect(outputs.collect(), 4);
    let output = OutputOptions { token_ids: true, ..OutputOptions::default() };
    let answer = values([envelope(output, false).completion(&[prompt(7), prompt(8)], choices)]).remove(0);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 2, "of the first choice of each prompt");
    for (index, prompt) in [(0, 7), (1, 7), (2, 8), (3, 8)] {
        assert_eq!(answer["choices"][index]["prompt_token_ids"], json!([prompt]));
        assert_eq!(answer["choices"][index]["token_ids"], json!([index]));
    }
}

#[test]
fn tokens_can_be_written_as_ids() {
    let output = OutputOptions { tokens_as_ids: true, ..OutputOptions::default() };
    let mut writer =
        ChatWriter { envelope: envelope(output, true), usage: StreamUsage::new(StreamPlan::default(), 0, 1) };
    let chunks = values(writer.write(text(0, "a", 0)));
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["content"][0]["token"], "token_id:0");
}
