//! What a model holds, from its config and the headers of its files; no weight is read.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::checkpoint::StoredDtype;
use super::model_config::ModelConfig;
use super::model_files::ModelFiles;
use super::quantization::Quantization;
use super::tally::{self, ClassSize, Tally, TensorClass, layer_number};
use crate::error::EngineError;
use crate::models;

/// Sizes of a model folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// `model_type` of config.json.
    pub architecture: String,
    pub num_layers: usize,
    /// Stored multi-token-prediction layers that `--load-mtp` loads, beside `num_layers`.
    pub num_mtp_layers: usize,
    /// What they take in memory with `--dtype auto`, beside `memory_bytes`.
    pub mtp_memory_bytes: u64,
    /// The same with `--dtype f32`.
    pub mtp_memory_bytes_f32: u64,
    /// Layers with routed experts.
    pub num_moe_layers: usize,
    /// Routed experts of each of those.
    pub num_experts: usize,
    /// Experts beside those that compute nothing (LongCat-Flash), which a router may choose all the same.
    pub num_zero_experts: usize,
    pub num_experts_per_tok: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// Tokens of a sequence that are served without `--max-model-len`, where the config says it.
    pub max_model_len: Option<usize>,
    /// Without tensors that serving ignores, such as multi-token-prediction layers, and without quantization scales.
    pub num_parameters: u64,
    /// Parameters that one token passes through: all but the experts it is not routed to. The most, where it depends.
    pub num_active_parameters: u64,
    /// The fewest: those of a token that is routed to as many experts that compute nothing as there can be.
    pub min_active_parameters: u64,
    /// Bytes of all tensors as stored.
    pub weight_bytes: u64,
    /// Bytes of the served weights in memory with `--dtype auto`, where FP8 is expanded to bf16.
    pub memory_bytes: u64,
    /// The same with `--dtype f32`.
    pub memory_bytes_f32: u64,
    /// `f32` where the checkpoint stores f32, else `bf16`: what `--kv-cache-dtype auto` takes.
    pub kv_dtype: String,
    /// Bytes of keys and values, or latents, that one token adds, over all layers; some give them back where they have a window.
    pub kv_bytes_per_token: u64,
    /// What a token is taken to keep at least, whatever windows leave behind.
    pub least_kv_bytes_per_token: u64,
    /// Bytes of recurrent state that one sequence has, over all layers.
    pub state_bytes_per_sequence: u64,
    /// Storage types of the tensors, most bytes first.
    pub dtypes: Vec<String>,
    /// In the order of [`TensorClass`], without empty ones.
    pub classes: Vec<ClassSize>,
}

/// Reads the sizes of the model at `path`, a Hugging Face folder or a GGUF file.
///
/// # Errors
/// Missing or malformed files, an architecture that is not supported, config keys that are missing.
pub fn inspect(path: &Path) -> Result<Inspection, EngineError> {
    let files = ModelFiles::open(path)?;
    inspect_files(&files).map_err(|error| files.explain(error))
}

/// The same for files that are open already.
pub fn inspect_files(files: &ModelFiles) -> Result<Inspection, EngineError> {
    let config = files.config()?;
    if let Some(packed) = files.packed(&config)? {
        return Ok(packed.inspection);
    }
    let model_type = config.model_type()?;
    let architecture = models::architecture(model_type)?;
    let checkpoint = files.checkpoint(&config)?;
    let is_ignored = |name: &str| (architecture.ignored)(&config, name) || models::is_ignored_everywhere(&config, name);

    let quantization = Quantization::from_config(&config)?;
    let tally = Tally::of(&checkpoint, quantization, is_ignored);
    let mtp_bytes = tally::memory_bytes(&checkpoint, quantization, |name| architecture.mtp.holds(&config, name));
    let num_mtp_layers = if mtp_bytes[0] > 0 { architecture.mtp.count(&config)? } else { 0 };
    let num_experts = config.first_count(&[
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "num_routed_experts",
        "moe_num_experts",
    ])?;
    let num_experts_per_tok = config.first_count(&CHOICE_KEYS)?;
    let num_zero_experts = config.count_or("zero_expert_num", 0)?;
    let num_parameters = tally.parameters(|class| class != TensorClass::Ignored);
    let dtypes = tally.dtypes_by_size();
    let (kv_dtype, kv_element_bytes) =
        if dtypes.first() == Some(&StoredDtype::Plain(Dtype::F32)) { ("f32", 4) } else { ("bf16", 2) };
    let footprint = (architecture.footprint)(&config)?;
    Ok(Inspection {
        architecture: model_type.to_owned(),
        num_layers: footprint.num_layers,
        num_mtp_layers,
        mtp_memory_bytes: mtp_bytes[0],
        mtp_memory_bytes_f32: mtp_bytes[1],
        num_moe_layers: tally.num_moe_layers(),
        num_experts,
        num_zero_experts,
        num_experts_per_tok,
        hidden_size: config.first_count(&["hidden_size", "d_model"])?,
        vocab_size: config.size("vocab_size")?,
        max_model_len: (architecture.positions)(&config).ok().map(|positions| positions.default),
        num_parameters,
        num_active_parameters: num_parameters - idle_parameters(&config, &tally, 0)?,
        min_active_parameters: num_parameters - idle_parameters(&config, &tally, num_zero_experts)?,
        weight_bytes: checkpoint.total_bytes(),
        memory_bytes: tally.memory_bytes[0],
        memory_bytes_f32: tally.memory_bytes[1],
        kv_dtype: kv_dtype.to_owned(),
        kv_bytes_per_token: footprint.token_width.saturating_mul(kv_element_bytes),
        least_kv_bytes_per_token: footprint.least_token_width.saturating_mul(kv_element_bytes),
        state_bytes_per_sequence: footprint.state_width.saturating_mul(size_of::<f32>() as u64),
        dtypes: dtypes.iter().map(|dtype| dtype.to_string().to_lowercase()).collect(),
        classes: tally.classes.into_values().collect(),
    })
}

/// Spellings of how many experts a token chooses.
const CHOICE_KEYS: [&str; 4] = ["num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk"];

/// Parameters of the experts that a token is not routed to, when it is routed to `num_zero` that compute nothing.
fn idle_parameters(config: &ModelConfig, tally: &Tally, num_zero: usize) -> Result<u64, EngineError> {
    let everywhere = config.first_count(&CHOICE_KEYS)?;
    let key = CHOICE_KEYS.into_iter().find(|key| config.get(key).is_some_and(serde_json::Value::is_array));
    let by_layer = key.map_or(Ok(Vec::new()), |key| config.counts(key))?;
    let idle = tally.expert_blocks.iter().map(|((layer, _), block)| {
        let chosen = layer_number(layer).and_then(|layer| by_layer.get(layer).copied()).unwrap_or(everywhere);
        let num_idle = block.num_experts.saturating_sub(chosen.saturating_sub(num_zero) as u64);
        block.num_parameters / block.num_experts.max(1) * num_idle
    });
    Ok(idle.sum())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::gguf_fixture::TempDir;
    use super::*;

    /// A folder with `config` and bf16 tensors of the given names and shapes, all zero.
    fn write_folder(dir: &TempDir, config: &serde_json::Value, tensors: &[(&str, Vec<usize>)]) {
        dir.write("config.json", config.to_string().as_bytes());
        let data: Vec<Vec<u8>> =
            tensors.iter().map(|(_, shape)| vec![0; 2 * shape.iter().product::<usize>()]).collect();
        let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
            (*name, safetensors::tensor::TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        dir.write("model.safetensors", &bytes);
    }

    fn check(name: &str, config: serde_json::Value, tensors: &[(&str, Vec<usize>)]) -> Inspection {
        let dir = TempDir::new(name);
        write_folder(&dir, &config, tensors);
        inspect(dir.path()).unwrap()
    }

    fn class_bytes(inspection: &Inspection, class: TensorClass) -> u64 {
        inspection.classes.iter().find(|size| size.class == class).map_or(0, |size| size.num_bytes)
    }

    #[test]
    fn mixtral_sizes_add_up() {
        let config = json!({
            "model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1, "vocab_size": 10,
            "tie_word_embeddings": true, "max_position_embeddings": 64,
        });
        let mut tensors = vec![
            ("model.embed_tokens.weight", vec![10, 8]),
            ("model.norm.weight", vec![8]),
            ("lm_head.weight", vec![10, 8]),
            ("model.layers.0.self_attn.q_proj.weight", vec![8, 8]),
            ("model.layers.0.post_attention_layernorm.weight", vec![8]),
            ("model.layers.0.block_sparse_moe.gate.weight", vec![4, 8]),
        ];
        let experts: Vec<String> =
            (0..4).map(|e| format!("model.layers.0.block_sparse_moe.experts.{e}.w1.weight")).collect();
        tensors.extend(experts.iter().map(|name| (name.as_str(), vec![16, 8])));
        let found = check("inspect-mixtral", config, &tensors);
        let dense = 80 + 8 + 64 + 8 + 32;
        assert_eq!((found.num_parameters, found.num_active_parameters), (dense + 4 * 128, dense + 128));
        assert_eq!(found.kv_bytes_per_token, 2 * 4 * 2);
        assert_eq!((found.num_experts, found.num_moe_layers, found.kv_dtype.as_str()), (4, 1, "bf16"));
        for (class, num_bytes) in [
            (TensorClass::Embedding, 160),
            (TensorClass::Attention, 128),
            (TensorClass::Router, 64),
            (TensorClass::Experts, 1024),
            (TensorClass::Norms, 32),
            (TensorClass::LmHead, 0),
            (TensorClass::Ignored, 160),
        ] {
            assert_eq!(class_bytes(&found, class), num_bytes, "{class:?}");
        }
    }

    #[test]
    fn latent_caches_and_shared_experts_are_seen() {
        let config = json!({
            "model_type": "deepseek_v3", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "kv_lora_rank": 16, "qk_rope_head_dim": 4, "n_routed_experts": 2, "num_experts_per_tok": 2, "vocab_size": 10,
        });
        let tensors = [
            ("model.layers.0.mlp.gate_proj.weight", vec![8, 8]),
            ("model.layers.1.self_attn.kv_a_layernorm.weight", vec![16]),
            ("model.layers.1.mlp.gate.e_score_correction_bias", vec![2]),
            ("model.layers.1.mlp.shared_experts.up_proj.weight", vec![4, 8]),
            ("model.layers.1.mlp.experts.1.down_proj.weight", vec![8, 4]),
            ("model.layers.2.enorm.weight", vec![8]),
        ];
        let found = check("inspect-deepseek", config, &tensors);
        assert_eq!(found.kv_bytes_per_token, 2 * (16 + 4) * 2);
        assert_eq!(found.num_moe_layers, 1);
        for (class, num_bytes) in [
            (TensorClass::DenseFfn, 128),
            (TensorClass::Norms, 32),
            (TensorClass::Router, 4),
            (TensorClass::SharedExperts, 64),
            (TensorClass::Experts, 64),
            (TensorClass::Ignored, 16),
        ] {
            assert_eq!(class_bytes(&found, class), num_bytes, "{class:?}");
        }
    }

    #[test]
    fn sizes_that_no_model_has_are_no_reason_to_panic() {
        let config = json!({
            "model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": i32::MAX, "num_attention_heads": 2,
            "num_key_value_heads": i32::MAX, "head_dim": i32::MAX, "num_local_experts": 4,
            "num_experts_per_tok": 1, "vocab_size": 10,
        });
        let found = check("inspect-huge", config, &[("model.norm.weight", vec![8])]);
        assert_eq!(found.kv_bytes_per_token, u64::MAX);
    }

    #[test]
    fn keys_of_other_families_do_not_make_a_cache_look_small() {
        let config = json!({
            "model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "num_local_experts": 4, "num_experts_per_tok": 1, "vocab_size": 10,
            "kv_lora_rank": 1, "qk_rope_head_dim": 1, "kv_channels": 1,
        });
        let found = check("inspect-foreign-keys", config, &[("model.norm.weight", vec![8])]);
        assert_eq!(found.kv_bytes_per_token, 2 * 2 * 4 * 2);
    }

    #[test]
    fn unsupported_architectures_are_refused_by_name() {
        let dir = TempDir::new("inspect-unknown");
        write_folder(&dir, &json!({ "model_type": "bert" }), &[("x", vec![1])]);
        let error = inspect(dir.path()).unwrap_err().to_string();
        assert!(error.contains("`bert`") && error.contains("kimi_k2"), "{error}");
    }
}
