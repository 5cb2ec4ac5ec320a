//! Metadata to the keys of config.json. What llama.cpp fixes in code is fixed here; what Hugging Face's class would read
//! where config.json says nothing is always said.

use serde_json::{Map, Value, json};

use super::arch::Arch;
use super::{GgufModel, rope};
use crate::error::EngineError;

/// `expert_gating_func`: softmax over all experts, or a sigmoid for each.
const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;

/// More experts than any model has, so that a file of some bytes does not promise millions.
const MAX_EXPERTS: u64 = 1 << 14;

/// The whole configuration, a JSON object.
pub(super) fn config(model: &GgufModel) -> Result<Value, EngineError> {
    let mut config = shared_keys(model)?;
    let own = match model.arch {
        Arch::Llama => mixtral(model)?,
        Arch::Qwen2Moe => qwen2_moe(model)?,
        Arch::Qwen3Moe => qwen3_moe(model)?,
        Arch::Olmoe => olmoe(model)?,
        Arch::GraniteMoe => granite_moe(model)?,
        Arch::DeepSeek2 => deepseek(model)?,
        Arch::GptOss => gpt_oss(model)?,
    };
    let Value::Object(own) = own else { unreachable!("every architecture gives an object") };
    config.extend(own);
    Ok(config.into())
}

fn shared_keys(model: &GgufModel) -> Result<Map<String, Value>, EngineError> {
    let metadata = model.metadata();
    let num_heads = metadata.size("attention.head_count")?;
    let hidden_size = metadata.size("embedding_length")?;
    let embedding = model.tensor("token_embd.weight");
    let vocab_size = embedding
        .and_then(|tensor| tensor.shape.first().copied())
        .ok_or(EngineError::MissingTensor { name: "token_embd.weight".into() })?;
    let num_experts = metadata.count_or("expert_count", 0)?;
    if num_experts == 0 {
        let reason = "is missing or 0: dense models are not served; hint: `moesaic upcycle` makes a mixture of experts \
                      of a dense llama";
        return Err(metadata.unsupported("expert_count", reason));
    }
    if num_experts > MAX_EXPERTS {
        return Err(metadata.unsupported("expert_count", format!("is {num_experts}, the limit is {MAX_EXPERTS}")));
    }
    let keys = json!({
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers(model)?,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count_or("attention.head_count_kv", num_heads)?,
        "rms_norm_eps": metadata.float("attention.layer_norm_rms_epsilon")?,
        "max_position_embeddings": metadata.size("context_length")?,
        "rope_theta": metadata.float_or("rope.freq_base", 10_000.0)?,
        "rope_scaling": rope::scaling(model)?,
        "vocab_size": vocab_size,
        "tie_word_embeddings": !model.has("output.weight"),
        "num_experts_per_tok": metadata.size("expert_used_count")?,
        "hidden_act": "silu",
        "sliding_window": null,
        "use_sliding_window": false,
    });
    let Value::Object(mut keys) = keys else { unreachable!("written as an object") };
    if model.arch != Arch::DeepSeek2 {
        keys.insert("head_dim".into(), head_dim(model, hidden_size / num_heads)?.into());
    }
    Ok(keys)
}

/// Without multi-token-prediction layers, which are behind the others.
fn num_layers(model: &GgufModel) -> Result<u64, EngineError> {
    let metadata = model.metadata();
    let (num_blocks, num_mtp) = (metadata.size("block_count")?, metadata.count_or("nextn_predict_layers", 0)?);
    match num_blocks.checked_sub(num_mtp) {
        Some(num_layers) if num_layers > 0 => Ok(num_layers),
        _ => Err(metadata.unsupported("nextn_predict_layers", format!("is {num_mtp}, of {num_blocks} blocks"))),
    }
}

/// Of queries, keys and values alike; all of it rotates.
fn head_dim(model: &GgufModel, default: u64) -> Result<u64, EngineError> {
    let metadata = model.metadata();
    let head_dim = metadata.count_or("attention.key_length", default)?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        let found = metadata.count_or(key, head_dim)?;
        if found != head_dim {
            let reason = format!("is {found}, supported is that of `attention.key_length` ({head_dim})");
            return Err(metadata.unsupported(key, reason));
        }
    }
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        let reason = format!("(where missing, the width of a head) is {head_dim}, expected a positive even number");
        return Err(metadata.unsupported("attention.key_length", reason));
    }
    Ok(head_dim)
}

/// Inner width of an expert; `feed_forward_length` where it has no key of its own.
fn expert_width(model: &GgufModel) -> Result<u64, EngineError> {
    let metadata = model.metadata();
    match metadata.opt_count("expert_feed_forward_length")? {
        Some(width) => Ok(width),
        None => metadata.size("feed_forward_length"),
    }
}

fn has_attention_bias(model: &GgufModel) -> bool {
    model.has("blk.0.attn_q.bias") || model.has("blk.0.attn_qkv.bias")
}

/// Layers without a router are dense.
fn dense_layers(model: &GgufModel) -> Result<Vec<u64>, EngineError> {
    let (num_layers, num_tensors) = (num_layers(model)?, model.shards.iter().map(|shard| shard.tensors().len()).sum());
    // Each has tensors of its own; more layers than that fail when they are loaded.
    let num_layers = num_layers.min(usize::try_into(num_tensors).unwrap_or(u64::MAX));
    Ok((0..num_layers).filter(|layer| !model.has(&format!("blk.{layer}.ffn_gate_inp.weight"))).collect())
}

/// The llama architecture with experts is Mixtral.
fn mixtral(model: &GgufModel) -> Result<Value, EngineError> {
    Ok(json!({
        "model_type": "mixtral",
        "num_local_experts": model.metadata().size("expert_count")?,
        "intermediate_size": expert_width(model)?,
    }))
}

fn qwen2_moe(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    let dense_width = metadata.count_or("feed_forward_length", 0)?;
    let width = match metadata.opt_count("expert_feed_forward_length")? {
        Some(width) => width,
        None => dense_width / metadata.size("expert_used_count")?,
    };
    Ok(json!({
        "model_type": "qwen2_moe",
        "num_experts": metadata.size("expert_count")?,
        "intermediate_size": dense_width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": metadata.count_or("expert_shared_feed_forward_length", dense_width)?,
        "norm_topk_prob": metadata.flag_or("expert_weights_norm", false)?,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(model)?,
        "qkv_bias": has_attention_bias(model),
    }))
}

fn qwen3_moe(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    Ok(json!({
        "model_type": "qwen3_moe",
        "num_experts": metadata.size("expert_count")?,
        "intermediate_size": metadata.count_or("feed_forward_length", 0)?,
        "moe_intermediate_size": expert_width(model)?,
        "norm_topk_prob": metadata.flag_or("expert_weights_norm", true)?,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(model)?,
        "attention_bias": has_attention_bias(model),
    }))
}

fn olmoe(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    let clip = metadata.opt_float("attention.clamp_kqv")?.filter(|&limit| limit > 0.0);
    Ok(json!({
        "model_type": "olmoe",
        "num_experts": metadata.size("expert_count")?,
        "intermediate_size": expert_width(model)?,
        "norm_topk_prob": metadata.flag_or("expert_weights_norm", false)?,
        "attention_bias": has_attention_bias(model),
        "clip_qkv": clip,
    }))
}

fn granite_moe(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    let shared_width = metadata.count_or("expert_shared_feed_forward_length", 0)?;
    let head_dim = head_dim(model, metadata.size("embedding_length")? / metadata.size("attention.head_count")?)?;
    // 0 stands for what a missing key stands for.
    let factor = |key: &str, default: f64| {
        Ok::<_, EngineError>(metadata.opt_float(key)?.filter(|&factor| factor != 0.0).unwrap_or(default))
    };
    Ok(json!({
        "model_type": if shared_width > 0 { "granitemoeshared" } else { "granitemoe" },
        "num_local_experts": metadata.size("expert_count")?,
        "intermediate_size": expert_width(model)?,
        "shared_intermediate_size": shared_width,
        "attention_bias": has_attention_bias(model),
        "attention_multiplier": factor("attention.scale", (head_dim as f64).powf(-0.5))?,
        "embedding_multiplier": factor("embedding_scale", 1.0)?,
        "residual_multiplier": factor("residual_scale", 1.0)?,
        "logits_scaling": metadata.float("logit_scale")?,
    }))
}

/// DeepSeek-V2 and -V3 and what is built like them: the router tells which. Files from before latent attention was split
/// in two have the widths of heads under the keys that others use.
fn deepseek(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    let width = |mla: &str, older: &str| match metadata.opt_count(mla)? {
        Some(width) => Ok(width),
        None => metadata.size(older),
    };
    let key_width = width("attention.key_length_mla", "attention.key_length")?;
    let value_width = width("attention.value_length_mla", "attention.value_length")?;
    let rotary = metadata.size("rope.dimension_count")?;
    let Some(nope) = key_width.checked_sub(rotary).filter(|&nope| nope > 0) else {
        let reason = format!("is {rotary}, not less than the {key_width} dimensions of a key");
        return Err(metadata.unsupported("rope.dimension_count", reason));
    };
    // No tensor follows from it, but a factor on the scores would.
    if metadata.float_or("attention.temperature_scale", 0.0)? != 0.0 {
        return Err(metadata.unsupported("attention.temperature_scale", "is not supported"));
    }
    let q_lora_rank = metadata.opt_count("attention.q_lora_rank")?.filter(|_| model.has("blk.0.attn_q_a.weight"));
    // Converters write 0 where a model has no factor.
    let routed_scale = match metadata.float_or("expert_weights_scale", 1.0)? {
        0.0 => 1.0,
        scale => scale,
    };
    let mut config = json!({
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": metadata.size("attention.kv_lora_rank")?,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value_width,
        // Of a key, for the rows of matrices; the file counts the one latent that all heads share.
        "head_dim": key_width,
        "num_key_value_heads": metadata.size("attention.head_count")?,
        "n_routed_experts": metadata.size("expert_count")?,
        "n_shared_experts": metadata.count_or("expert_shared_count", 0)?,
        "moe_intermediate_size": metadata.size("expert_feed_forward_length")?,
        "intermediate_size": metadata.count_or("feed_forward_length", 0)?,
        "first_k_dense_replace": metadata.count_or("leading_dense_block_count", 0)?,
        "moe_layer_freq": 1,
        "routed_scaling_factor": routed_scale,
        "attention_bias": false,
        "mlp_bias": false,
    });
    let router = deepseek_router(model)?;
    for (key, value) in router {
        config[key] = value;
    }
    Ok(config)
}

fn deepseek_router(model: &GgufModel) -> Result<Vec<(&'static str, Value)>, EngineError> {
    let metadata = model.metadata();
    let num_groups = metadata.count_or("expert_group_count", 1)?.max(1);
    let open_groups = metadata.count_or("expert_group_used_count", num_groups)?;
    let renormalizes = metadata.flag_or("expert_weights_norm", false)?;
    let (model_type, scoring, method) = match metadata.count_or("expert_gating_func", SOFTMAX)? {
        // 0: not said, as in the first files.
        0 | SOFTMAX if renormalizes => {
            let reason = "is true, which is not supported for a softmax router (`expert_gating_func`)";
            return Err(metadata.unsupported("expert_weights_norm", reason));
        }
        0 | SOFTMAX if num_groups > 1 => ("deepseek_v2", "softmax", "group_limited_greedy"),
        0 | SOFTMAX => ("deepseek_v2", "softmax", "greedy"),
        SIGMOID => ("deepseek_v3", "sigmoid", "noaux_tc"),
        other => {
            let reason = format!("is {other}, supported are {SOFTMAX} (softmax) and {SIGMOID} (sigmoid)");
            return Err(metadata.unsupported("expert_gating_func", reason));
        }
    };
    Ok(vec![
        ("model_type", model_type.into()),
        ("scoring_func", scoring.into()),
        ("topk_method", method.into()),
        ("norm_topk_prob", renormalizes.into()),
        ("n_group", num_groups.into()),
        ("topk_group", open_groups.into()),
    ])
}

fn gpt_oss(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    Ok(json!({
        "model_type": "gpt_oss",
        "num_local_experts": metadata.size("expert_count")?,
        "intermediate_size": expert_width(model)?,
        "attention_bias": has_attention_bias(model),
        "sliding_window": metadata.size("attention.sliding_window")?,
    }))
}
