//! What transformers' configuration classes read where a config.json says nothing: other spellings of a key, and values.

use serde_json::{Map, Value, json};

/// Completes the keys of a config.json as the class of its `model_type` would. A key that is there but null stays null:
/// to most classes that is a value of its own.
pub fn complete(keys: &mut Map<String, Value>) {
    let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
    for (alias, key) in aliases(&model_type) {
        if let (false, Some(value)) = (keys.contains_key(*key), keys.get(*alias)) {
            keys.insert((*key).to_owned(), value.clone());
        }
    }
    if let Value::Object(defaults) = defaults(&model_type) {
        for (key, value) in defaults {
            keys.entry(key).or_insert(value);
        }
    }
}

/// `attribute_map` of the classes: what else a key may be called, and the key.
fn aliases(model_type: &str) -> &'static [(&'static str, &'static str)] {
    match model_type {
        "jetmoe" => &[("head_dim", "kv_channels")],
        "gpt_oss" => &[("num_experts", "num_local_experts"), ("experts_per_token", "num_experts_per_tok")],
        "glm4_moe" | "dots1" => &[("num_local_experts", "n_routed_experts")],
        "ernie4_5_moe" => &[("num_experts", "moe_num_experts"), ("num_experts_per_tok", "moe_k")],
        "hunyuan_v1_moe" => &[("num_local_experts", "num_experts"), ("num_experts_per_tok", "moe_topk")],
        "minimax_m2" => &[("num_experts", "num_local_experts")],
        "switch_transformers" => {
            &[("hidden_size", "d_model"), ("num_attention_heads", "num_heads"), ("num_hidden_layers", "num_layers")]
        }
        "mixtral" => &[("num_experts", "num_local_experts")],
        "qwen3_moe" | "olmoe" => &[("num_local_experts", "num_experts")],
        "deepseek_v2" => &[("num_experts", "n_routed_experts")],
        "deepseek_v3" | "kimi_k2" | "kimi_k25" => &[("num_local_experts", "n_routed_experts")],
        "longcat_flash" => &[("num_local_experts", "n_routed_experts"), ("num_experts_per_tok", "moe_topk")],
        _ => &[],
    }
}

/// Defaults of a class that are not those of the code that reads the key, which serves many families.
fn defaults(model_type: &str) -> Value {
    match model_type {
        "jetmoe" => json!({
            "kv_channels": 128, "max_position_embeddings": 4096, "num_experts_per_tok": 2, "num_key_value_heads": 16,
            "tie_word_embeddings": true,
        }),
        "minicpm" => json!({
            "dim_model_base": 1, "max_position_embeddings": 2048, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true,
        }),
        "gpt_oss" => json!({
            "head_dim": 64, "max_position_embeddings": 131_072, "num_experts_per_tok": 4, "num_key_value_heads": 8,
            "rope_theta": 150_000.0, "sliding_window": 128,
            // Shadowed by a `rope_scaling`.
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096,
            },
        }),
        "glm4_moe" => json!({
            "first_k_dense_replace": 1, "max_position_embeddings": 131_072, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "topk_group": 1,
        }),
        "dots1" => json!({
            "max_position_embeddings": 2048, "max_window_layers": 62, "norm_topk_prob": false,
            "num_key_value_heads": 32, "sliding_window": 4096, "topk_group": 1,
        }),
        "ernie4_5_moe" => json!({
            "max_position_embeddings": 131_072, "moe_k": 6, "moe_layer_start_index": 1, "moe_num_shared_experts": 2,
            "num_key_value_heads": 4, "rope_theta": 500_000.0, "tie_word_embeddings": true,
        }),
        "hunyuan_v1_moe" => json!({ "max_position_embeddings": 2048, "moe_topk": 1, "num_experts": 1 }),
        "minimax_m2" => json!({
            "head_dim": 128, "max_position_embeddings": 196_608, "num_experts_per_tok": 8, "num_key_value_heads": 8,
            "rope_theta": 5_000_000.0,
        }),
        "phimoe" => json!({
            "max_position_embeddings": 131_072, "num_experts_per_tok": 2, "num_key_value_heads": 8,
            "rope_theta": 1_000_000.0,
        }),
        "llama4" | "llama4_text" => json!({
            "attention_chunk_size": 8192, "head_dim": 128, "max_position_embeddings": 131_072, "num_experts_per_tok": 1,
            "num_key_value_heads": 8, "rope_theta": 500_000.0,
        }),
        "qwen3_next" => json!({
            "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "intermediate_size": 5632,
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 32_768,
            "moe_intermediate_size": 512, "norm_topk_prob": true, "num_experts": 512, "num_experts_per_tok": 10,
            "num_key_value_heads": 2, "partial_rotary_factor": 0.25, "shared_expert_intermediate_size": 512,
        }),
        "switch_transformers" => json!({
            "d_ff": 2048, "d_kv": 64, "d_model": 768, "decoder_start_token_id": 0, "dense_act_fn": "relu",
            "expert_capacity": 64, "layer_norm_epsilon": 1e-6, "n_positions": 512, "num_experts": 8,
            "num_decoder_layers": 12, "num_experts_per_tok": 1, "num_heads": 12, "num_layers": 12, "num_sparse_decoder_layers": 3,
            "num_sparse_encoder_layers": 3, "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32, "tie_word_embeddings": true, "vocab_size": 32_128,
        }),
        "mixtral" => json!({
            "max_position_embeddings": 131_072, "num_experts_per_tok": 2, "num_key_value_heads": 8,
            "num_local_experts": 8, "rope_theta": 1_000_000.0,
        }),
        "qwen2_moe" => json!({
            "max_position_embeddings": 32_768, "max_window_layers": 28, "moe_intermediate_size": 1408,
            "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632, "sliding_window": 4096,
        }),
        "qwen3_moe" => json!({
            "max_position_embeddings": 32_768, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "num_key_value_heads": 4, "sliding_window": 4096,
        }),
        "olmoe" => json!({ "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8 }),
        "granitemoe" | "granitemoeshared" => json!({
            "max_position_embeddings": 2048, "num_experts_per_tok": 2, "num_local_experts": 8,
        }),
        "deepseek_v2" => json!({
            "max_position_embeddings": 2048, "n_routed_experts": 64, "n_shared_experts": 2, "q_lora_rank": 1536,
        }),
        "deepseek_v3" | "kimi_k2" | "kimi_k25" => json!({
            "first_k_dense_replace": 3, "max_position_embeddings": 4096, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "q_lora_rank": 1536, "routed_scaling_factor": 2.5,
            "topk_group": 4,
        }),
        "longcat_flash" => json!({
            "max_position_embeddings": 131_072, "moe_topk": 12, "n_routed_experts": 512, "q_lora_rank": 1536,
            "rope_theta": 10_000_000.0, "routed_scaling_factor": 6.0, "zero_expert_num": 256,
        }),
        // Of the published remote code.
        "pangu_ultra_moe" => json!({ "rope_theta": 25.6e6, "routed_scaling_factor": 2.5 }),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: Value, expected: &[(&str, Value)]) {
        let Value::Object(mut keys) = config else { panic!("an object") };
        complete(&mut keys);
        for (key, value) in expected {
            assert_eq!(keys.get(*key), Some(value), "{key}");
        }
    }

    #[test]
    fn absent_keys_are_completed_and_null_ones_are_not() {
        let config = json!({ "model_type": "dots1", "sliding_window": null, "norm_topk_prob": true });
        let expected =
            [("sliding_window", Value::Null), ("norm_topk_prob", json!(true)), ("max_window_layers", json!(62))];
        check(config, &expected);
    }

    #[test]
    fn a_key_wins_over_its_other_spelling_and_that_over_the_default() {
        let config = json!({ "model_type": "ernie4_5_moe", "num_experts": 7, "num_experts_per_tok": 3, "moe_k": 2 });
        check(config, &[("moe_num_experts", json!(7)), ("moe_k", json!(2))]);
        check(json!({ "model_type": "hunyuan_v1_moe", "num_experts_per_tok": 3 }), &[("moe_topk", json!(3))]);
    }
}
