//! Every golden checkpoint against the outputs that transformers gave for it, in f32.

use std::path::Path;

use crate::driver::Driver;
#[cfg(test)]
use crate::driver::golden_dir;
use engine::sampling::params::SamplingParams;
use engine::{EngineConfig, StopCriteria, WeightDtype};
use serde_json::Value;

/// Largest allowed difference of a logit, as a share of the largest logit.
const TOLERANCE: f32 = 1e-3;

pub fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

pub fn assert_close(name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let error = largest_error(found, expected);
    assert!(error <= TOLERANCE, "{name}: off by {error} of the largest logit");
}

/// Of a logit, as a share of the largest one that is expected; no number where one of those found is none.
pub fn largest_error(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, larger) / largest
}

/// What is no number is larger than any.
pub fn larger(max: f32, error: f32) -> f32 {
    if error > max || error.is_nan() { error } else { max }
}

/// `(expert, weight)` pairs by descending weight, as the reference lists them.
fn by_weight(experts: &[u32], weights: &[f32]) -> Vec<(u32, f32)> {
    let mut pairs: Vec<(u32, f32)> = experts.iter().copied().zip(weights.iter().copied()).collect();
    pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    pairs
}

/// Logits at every position of `prompt["ids"]`, or of its `decoder_ids` where an encoder reads the former: the start token
/// if it names none.
pub fn logits_of(driver: &mut Driver, prompt: &Value, reference: &Value) -> Vec<Vec<f32>> {
    let runner = &mut driver.model.runner;
    let ids_of_prompt = ids(&prompt["ids"]);
    let logits = match reference["decoder_start_token_id"].as_u64() {
        None => runner.logits_of(&ids_of_prompt),
        Some(start) if prompt["decoder_ids"].is_null() => runner.logits_after(&ids_of_prompt, &[start as u32]),
        Some(_) => runner.logits_after(&ids_of_prompt, &ids(&prompt["decoder_ids"])),
    };
    logits.expect("logits")
}

fn check_logits(name: &str, driver: &mut Driver, reference: &Value) {
    for prompt in reference["prompts"].as_array().expect("prompts") {
        let logits = logits_of(driver, prompt, reference);
        let last = logits.last().expect("a position");
        assert_close(&format!("{name} {} last", prompt["name"]), last, &numbers(&prompt["last_logits"]));
    }
    let full = &reference["full_logits"];
    let logits = logits_of(driver, full, reference);
    for (position, expected) in full["logits"].as_array().expect("rows").iter().enumerate() {
        assert_close(&format!("{name} position {position}"), &logits[position], &numbers(expected));
    }
}

fn check_routing(name: &str, driver: &mut Driver, reference: &Value) {
    driver.model.runner.routing().start_capture();
    logits_of(driver, &reference["routing"], reference);
    let calls = driver.model.runner.routing().take_capture();
    let expected = reference["routing"]["calls"].as_array().expect("calls");
    assert_eq!(calls.len(), expected.len(), "{name}: router calls");
    for (found, call) in calls.iter().zip(expected) {
        let rows = call["experts"].as_array().expect("rows").iter().zip(call["weights"].as_array().expect("rows"));
        for (token, (experts, weights)) in rows.enumerate() {
            let slots = token * found.k..(token + 1) * found.k;
            let found = by_weight(&found.experts[slots.clone()], &found.weights[slots]);
            let expected = by_weight(&ids(experts), &numbers(weights));
            let close =
                |(a, b): (&(u32, f32), &(u32, f32))| a.0 == b.0 && (a.1 - b.1).abs() <= 1e-4 * b.1.abs().max(1.0);
            assert!(
                found.len() == expected.len() && found.iter().zip(&expected).all(close),
                "{name} {} token {token}: {found:?}, expected {expected:?}",
                call["name"]
            );
        }
    }
}

fn check_greedy(name: &str, driver: &mut Driver, reference: &Value) {
    let prompts = reference["prompts"].as_array().expect("prompts");
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    for (id, prompt) in prompts.iter().enumerate() {
        let max_tokens = prompt["greedy_ids"].as_array().expect("ids").len();
        let stop = StopCriteria { max_tokens, ..StopCriteria::default() };
        driver.add(id as u64, &ids(&prompt["ids"]), greedy.clone(), stop);
    }
    driver.run();
    for (id, prompt) in prompts.iter().enumerate() {
        let found: Vec<u32> = driver.jobs[&(id as u64)].output.iter().map(|sampled| sampled.token).collect();
        assert_eq!(found, ids(&prompt["greedy_ids"]), "{name} {}", prompt["name"]);
    }
}

/// The experts that a request is told of its prompt, whose first blocks another one computed.
fn check_routed_experts(name: &str, driver: &mut Driver, reference: &Value) {
    const ID: u64 = 1000;
    let layout = driver.model.summary.routed.clone();
    if driver.model.summary.has_encoder {
        assert!(layout.is_empty(), "{name}");
        return;
    }
    let routing = &reference["routing"];
    let prompt = ids(&routing["ids"]);
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    driver.add(ID, &prompt, greedy, StopCriteria { max_tokens: 2, ..StopCriteria::default() });
    driver.run();
    let told = |idx: usize| driver.jobs[&ID].output[idx].routed_experts.as_slice();
    let (found, of_first) = (told(0), told(1));
    assert_eq!(found.len(), prompt.len() * layout.ids_per_token(), "{name}");
    assert_eq!(of_first.len(), layout.ids_per_token(), "{name}: of the first generated token");
    let calls = routing["calls"].as_array().expect("calls");
    assert_eq!(calls.len(), layout.layers().len(), "{name}");
    for (token, found) in found.chunks_exact(layout.ids_per_token()).enumerate() {
        let mut rest = found;
        for (call, layer) in calls.iter().zip(layout.layers()) {
            let (of_layer, behind) = rest.split_at(layer.top_k);
            rest = behind;
            let mut found: Vec<u32> = of_layer.iter().copied().map(u32::from).collect();
            let mut expected = ids(&call["experts"][token]);
            found.sort_unstable();
            expected.sort_unstable();
            assert_eq!(found, expected, "{name} {} token {token}", call["name"]);
        }
    }
}

/// What is compared, in turn; a failed check says nothing of the next.
pub const CHECKS: [fn(&str, &mut Driver, &Value); 4] =
    [check_logits, check_routing, check_greedy, check_routed_experts];

/// The model of a folder and what it must give.
pub fn open(dir: &Path) -> (Driver, Value) {
    open_with(dir, |_| {})
}

/// The same with other settings.
pub fn open_with(dir: &Path, change: impl Fn(&mut EngineConfig)) -> (Driver, Value) {
    let text = std::fs::read_to_string(dir.join("reference.json")).expect("reference.json");
    let reference: Value = serde_json::from_str(&text).expect("JSON");
    let config_json = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
    let config_json: Value = serde_json::from_str(&config_json).expect("JSON");
    let mut config = EngineConfig {
        dtype: WeightDtype::F32,
        // A device computes so many when it loads. An encoder reads its prompt whole, the longest of 200 tokens.
        max_num_batched_tokens: if config_json["is_encoder_decoder"] == true { 256 } else { 48 },
        kv_cache_memory: Some(16 << 20),
        // Where a reference depends on the served length.
        max_model_len: reference["max_model_len"].as_u64().map(|len| len as usize),
        ..EngineConfig::new(dir)
    };
    change(&mut config);
    (Driver::new(&config), reference)
}

#[cfg(test)]
fn check(name: &str) {
    let (mut driver, reference) = open(&golden_dir(name));
    CHECKS.iter().for_each(|check| check(name, &mut driver, &reference));
}

#[cfg(test)]
test_every_folder!();
