//! Checkpoints come from strangers: what cannot be served is refused when it is loaded, by name, without filling the memory.

use std::path::{Path, PathBuf};

use engine::sampling::params::SamplingParams;
use engine::{EngineConfig, Event, GenerateRequest, GenerationError, LoadedModel, StopCriteria, load, load_model};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint_edit::Edit;
use crate::driver::golden_dir;

/// A copy of a golden model with other keys in its config.json, removed on drop.
struct Changed(PathBuf);

impl Changed {
    fn new(folder: &str, name: &str, keys: &Value) -> Self {
        let (source, dir) =
            (golden_dir(folder), std::env::temp_dir().join(format!("moesaic-{name}-{}", std::process::id())));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        std::fs::copy(source.join("model.safetensors"), dir.join("model.safetensors")).expect("a copy");
        let text = std::fs::read(source.join("config.json")).expect("the config");
        let mut config: Value = serde_json::from_slice(&text).expect("JSON");
        for (key, value) in keys.as_object().expect("keys") {
            config[key] = value.clone();
        }
        std::fs::write(dir.join("config.json"), config.to_string()).expect("a config");
        Self(dir)
    }

    fn load(&self) -> Result<LoadedModel, String> {
        load_dir(&self.0)
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn load_dir(dir: &Path) -> Result<LoadedModel, String> {
    let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(dir) };
    load_model(&config, &mut |_| {}).map_err(|error| error.to_string())
}

#[test]
fn configs_that_cannot_be_served_are_refused_at_load() {
    for (folder, keys, expect) in [
        (
            "mixtral-base",
            json!({ "num_experts_per_tok": 9 }),
            "config.json: experts per token or expert groups do not fit the experts: route: cannot choose 9 of 8 experts",
        ),
        ("mixtral-base", json!({ "sliding_window": 0 }), "config.json: `sliding_window` is 0, expected at least 1"),
        (
            "deepseek_v3-noq",
            json!({ "scoring_func": "softmax" }),
            "config.json: `scoring_func` is `softmax`, supported is sigmoid",
        ),
        (
            "mixtral-base",
            json!({ "head_dim": 15 }),
            "config.json: the rotary width of a head (head_dim, kv_channels or qk_rope_head_dim) is 15, allowed are even numbers",
        ),
        (
            "mixtral-base",
            json!({ "head_dim": 0 }),
            "config.json: the rotary width of a head (head_dim, kv_channels or qk_rope_head_dim) is 0, allowed are even numbers",
        ),
        (
            "mixtral-base",
            json!({ "head_dim": 2_000_000_000 }),
            "config.json: the rotary width of a head (head_dim, kv_channels or qk_rope_head_dim) is 2000000000, allowed are",
        ),
        (
            "mixtral-base",
            json!({ "num_key_value_heads": 0 }),
            "config.json: `num_key_value_heads` is 0, expected at least 1",
        ),
        (
            "mixtral-base",
            json!({ "num_local_experts": 2_000_000_000 }),
            "tensor `model.layers.0.block_sparse_moe.gate.weight` has shape [8, 64], expected [2000000000, 64]",
        ),
        (
            "gpt_oss-mxfp4",
            json!({ "intermediate_size": 40 }),
            "config.json: `quantization_config` is mxfp4, whose blocks of 32 do not divide rows of 40 values",
        ),
        (
            "deepseek_v2-grouped",
            json!({ "n_group": 5 }),
            "config.json: experts per token or expert groups do not fit the experts: route: 12 experts do not form 5 groups",
        ),
        (
            "qwen3_next-base",
            json!({ "full_attention_interval": 100, "max_position_embeddings": 1 << 24, "head_dim": 16_384 }),
            "max_model_len (where not set, max_position_embeddings) is 1048576, allowed are at most 32768",
        ),
        ("mixtral-base", json!({ "rope_scaling": [1] }), "config.json: `rope_scaling` is [1], expected an object"),
        ("deepseek_v2-grouped", json!({ "num_attention_heads": i32::MAX, "qk_nope_head_dim": i32::MAX }), "tensor"),
    ] {
        let changed = Changed::new(folder, "hostile", &keys);
        let error = changed.load().map_or_else(|error| error, |_| "none".to_owned());
        assert!(error.starts_with(expect), "{keys}: {error}");
    }
}

#[test]
fn what_hunyuan_has_decides_and_not_what_its_config_says() {
    let keys = json!({ "use_cla": true, "cla_share_factor": 2, "use_qk_norm": false });
    let changed = Changed::new("hunyuan_v1_moe-base", "cla", &keys);
    changed.load().expect("every layer has keys of its own, and norms");
    let path = changed.0.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("tensors");
    let mut tensors = safetensors::SafeTensors::deserialize(&bytes).expect("tensors").tensors();
    tensors.retain(|(name, _)| name != "model.layers.1.self_attn.k_proj.weight");
    std::fs::write(&path, safetensors::serialize(tensors, None).expect("bytes")).expect("a checkpoint");
    let error = changed.load().map_or_else(|error| error, |_| "none".to_owned());
    assert_eq!(error, "config.json: `use_cla` is true: 2 layers share their keys and values, which is not supported");
}

#[test]
fn a_promised_length_costs_nothing_that_the_kv_cache_cannot_hold() {
    let changed = Changed::new("mixtral-base", "long", &json!({ "max_position_embeddings": i32::MAX }));
    let summary = changed.load().expect("loaded").summary;
    assert_eq!(summary.max_model_len, summary.num_blocks * summary.block_size);
}

#[test]
fn the_kv_cache_follows_the_tensors_whatever_the_config_says() {
    for (folder, torch_dtype, expect) in [("mixtral-base", "float32", "bf16"), ("mixtral-window", "bfloat16", "f32")] {
        let changed = Changed::new(folder, "kv-dtype", &json!({ "torch_dtype": torch_dtype }));
        assert_eq!(changed.load().expect("loaded").summary.kv_dtype, expect, "{folder}");
    }
}

/// What a request comes to whose model has `number` in every place of the tensors named `*{ending}`.
fn last_event(folder: &str, ending: &str, number: f32) -> Event {
    let mut edit = Edit::of(folder);
    edit.each(ending, |stored| {
        let bits = number.to_bits().to_le_bytes();
        let element = if stored.dtype == Dtype::F32 { &bits[..] } else { &bits[2..] };
        stored.bytes = element.iter().copied().cycle().take(stored.bytes.len()).collect();
    });
    let folder = edit.write();
    let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(folder.path()) };
    let engine = load(config, &mut |_| {}).expect("numbers are not read at load");
    let mut generation = engine
        .submit(GenerateRequest {
            prefix: engine::PrefixHint::default(),
            experts: engine::ExpertOptions::default(),
            wants_routed_experts: false,
            wants_expert_use: false,
            expected_experts: None,
            prompt: [5, 17, 200, 3, 91].into(),
            sampling: SamplingParams::default(),
            stop: StopCriteria { max_tokens: 4, ..StopCriteria::default() },
            cache_salt: [0; 32],
        })
        .expect("accepted");
    std::iter::from_fn(|| generation.next_blocking()).last().expect("an event")
}

#[test]
fn weights_that_are_no_numbers_fail_the_requests_that_meet_them() {
    for (folder, ending) in [
        ("mixtral-base", "embed_tokens.weight"),
        ("mixtral-base", "layers.0.input_layernorm.weight"),
        ("mixtral-base", "layers.1.self_attn.k_proj.weight"),
        ("mixtral-base", "layers.0.block_sparse_moe.gate.weight"),
        ("mixtral-base", ".w1.weight"),
        ("mixtral-base", "lm_head.weight"),
        ("deepseek_v3-base", "mlp.gate.weight"),
        ("deepseek_v3-base", "kv_b_proj.weight"),
        ("longcat_flash-base", "router.classifier.weight"),
        ("gpt_oss-bf16", "self_attn.sinks"),
        ("phimoe-base", "block_sparse_moe.gate.weight"),
    ] {
        let event = last_event(folder, ending, f32::NAN);
        assert_eq!(event, Event::Failed(GenerationError::CorruptedLogits), "{folder} {ending}");
    }
}

#[test]
fn numbers_without_end_and_choices_by_nan_end_every_request_all_the_same() {
    for (folder, ending, number) in [
        ("mixtral-base", "layers.0.block_sparse_moe.gate.weight", f32::INFINITY),
        ("mixtral-base", ".w2.weight", f32::NEG_INFINITY),
        ("mixtral-base", "lm_head.weight", f32::INFINITY),
        ("deepseek_v3-base", "e_score_correction_bias", f32::NAN),
        ("deepseek_v2-grouped", "mlp.gate.weight", f32::INFINITY),
        ("longcat_flash-bias", "e_score_correction_bias", f32::INFINITY),
    ] {
        let event = last_event(folder, ending, number);
        assert!(matches!(event, Event::Failed(_) | Event::Finished(_)), "{folder} {ending}: {event:?}");
    }
}
