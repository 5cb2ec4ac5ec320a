//! Checkpoints come from strangers: what cannot be served is refused when it is loaded, by name, without filling the memory.

use std::path::{Path, PathBuf};

use engine::{EngineConfig, LoadedModel, load_model};
use serde_json::{Value, json};

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
            "deepseek_v2-grouped",
            json!({ "n_group": 5 }),
            "config.json: experts per token or expert groups do not fit the experts: route: 12 experts do not form 5 groups",
        ),
        ("deepseek_v2-grouped", json!({ "num_attention_heads": i32::MAX, "qk_nope_head_dim": i32::MAX }), "tensor"),
    ] {
        let changed = Changed::new(folder, "hostile", &keys);
        let error = changed.load().map_or_else(|error| error, |_| "none".to_owned());
        assert!(error.starts_with(expect), "{keys}: {error}");
    }
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
