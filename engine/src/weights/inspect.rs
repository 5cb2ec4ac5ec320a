//! What a model folder holds, from `config.json` and the headers of its safetensors files; no weight is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;
use serde::Serialize;

use super::checkpoint::Checkpoint;
use super::model_config::ModelConfig;
use crate::error::EngineError;
use crate::models;

/// Sizes of a model folder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// `model_type` of config.json.
    pub architecture: String,
    pub num_layers: usize,
    /// Layers with routed experts.
    pub num_moe_layers: usize,
    /// Routed experts of each of those.
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// `max_position_embeddings`, where the config has it.
    pub max_model_len: Option<usize>,
    /// Without tensors that serving ignores, such as multi-token-prediction layers, and without quantization scales.
    pub num_parameters: u64,
    /// Parameters that one token passes through: all but the experts it is not routed to.
    pub num_active_parameters: u64,
    /// Bytes of all tensors as stored.
    pub weight_bytes: u64,
    /// `f32` where the checkpoint stores f32, else `bf16`: what `--kv-cache-dtype auto` takes.
    pub kv_dtype: &'static str,
    /// Bytes of keys and values, or latents, that one token adds, over all layers.
    pub kv_bytes_per_token: u64,
    /// Storage types of the tensors, most bytes first.
    pub dtypes: Vec<String>,
    /// In the order of [`TensorClass`], without empty ones.
    pub classes: Vec<ClassSize>,
}

/// The tensors of one class together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClassSize {
    pub class: TensorClass,
    pub num_tensors: usize,
    pub num_parameters: u64,
    pub num_bytes: u64,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorClass {
    Embedding,
    Attention,
    Router,
    Experts,
    SharedExperts,
    DenseFfn,
    Norms,
    LmHead,
    Other,
    /// Stored, but of no use to serving.
    Ignored,
}

/// Reads the sizes of the model folder `model_dir`.
///
/// # Errors
/// Missing or malformed files, an architecture that is not supported, config keys that are missing.
pub fn inspect(model_dir: &Path) -> Result<Inspection, EngineError> {
    let config = ModelConfig::load(model_dir)?;
    let model_type = config.model_type()?;
    let architecture = models::architecture(model_type)?;
    let checkpoint = Checkpoint::open(model_dir)?;
    let is_ignored = |name: &str| (architecture.ignored)(&config, name) || models::is_ignored_everywhere(&config, name);

    let mut tally = Tally::default();
    for (name, entry) in checkpoint.iter() {
        let class = if is_ignored(name) { TensorClass::Ignored } else { classify(name) };
        tally.add(name, class, entry.dtype, &entry.shape, entry.num_bytes as u64);
    }
    let num_experts = first_count(
        &config,
        &["num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"],
    )?;
    let num_experts_per_tok = first_count(&config, &["num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk"])?;
    let num_parameters = tally.parameters(|class| class != TensorClass::Ignored);
    let num_idle = tally.parameters(|class| class == TensorClass::Experts) / num_experts as u64
        * num_experts.saturating_sub(num_experts_per_tok) as u64;
    let dtypes = tally.dtypes_by_size();
    let (kv_dtype, kv_element_bytes) = if dtypes.first() == Some(&Dtype::F32) { ("f32", 4) } else { ("bf16", 2) };
    let num_layers = first_count(&config, &["num_hidden_layers", "num_layers"])?;
    Ok(Inspection {
        architecture: model_type.to_owned(),
        num_layers,
        num_moe_layers: tally.moe_layers.len(),
        num_experts,
        num_experts_per_tok,
        hidden_size: config.size("hidden_size")?,
        vocab_size: config.size("vocab_size")?,
        max_model_len: config.opt_count("max_position_embeddings")?,
        num_parameters,
        num_active_parameters: num_parameters - num_idle,
        weight_bytes: checkpoint.total_bytes(),
        kv_dtype,
        kv_bytes_per_token: cache_width(&config, model_type)?
            .saturating_mul(architecture.sites_per_layer * num_layers as u64)
            .saturating_mul(kv_element_bytes),
        dtypes: dtypes.iter().map(|dtype| format!("{dtype:?}").to_lowercase()).collect(),
        classes: tally.classes.into_values().collect(),
    })
}

/// Sums over the tensors of a checkpoint.
#[derive(Default)]
struct Tally {
    classes: BTreeMap<TensorClass, ClassSize>,
    bytes_by_dtype: Vec<(Dtype, u64)>,
    moe_layers: BTreeSet<String>,
}

impl Tally {
    fn add(&mut self, name: &str, class: TensorClass, dtype: Dtype, shape: &[usize], num_bytes: u64) {
        let empty = ClassSize { class, num_tensors: 0, num_parameters: 0, num_bytes: 0 };
        let size = self.classes.entry(class).or_insert(empty);
        size.num_tensors += 1;
        size.num_bytes += num_bytes;
        // Scales are no parameters; a byte of MXFP4 holds two.
        let per_element = match () {
            () if name.ends_with("_scale_inv") || name.ends_with("_scales") => 0,
            () if name.ends_with("_blocks") => 2,
            () => 1,
        };
        size.num_parameters += per_element * shape.iter().map(|&size| size as u64).product::<u64>();
        match self.bytes_by_dtype.iter_mut().find(|(known, _)| *known == dtype) {
            Some((_, bytes)) => *bytes += num_bytes,
            None => self.bytes_by_dtype.push((dtype, num_bytes)),
        }
        if class == TensorClass::Experts {
            self.moe_layers.extend(layer_of(name).map(str::to_owned));
        }
    }

    fn parameters(&self, counted: impl Fn(TensorClass) -> bool) -> u64 {
        self.classes.values().filter(|size| counted(size.class)).map(|size| size.num_parameters).sum()
    }

    fn dtypes_by_size(&self) -> Vec<Dtype> {
        let mut dtypes = self.bytes_by_dtype.clone();
        dtypes.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
        dtypes.into_iter().map(|(dtype, _)| dtype).collect()
    }
}

/// `17` of `model.layers.17.mlp…`.
fn layer_of(name: &str) -> Option<&str> {
    name.split_once("model.layers.")?.1.split('.').next()
}

/// Sorts a tensor by its name, in the spellings of every supported architecture.
fn classify(name: &str) -> TensorClass {
    let has = |part: &str| name.contains(part);
    match () {
        () if has("embed_tokens.") || has("word_embeddings.") => TensorClass::Embedding,
        () if has("lm_head.") => TensorClass::LmHead,
        () if has("norm.") => TensorClass::Norms,
        () if has(".self_attn.") || has(".attention.") || has(".self_attention.kv_proj.") => TensorClass::Attention,
        () if has(".shared_expert") || has(".shared_mlp.") => TensorClass::SharedExperts,
        () if has(".experts.") || has(".input_linear.") || has(".output_linear.") => TensorClass::Experts,
        () if has(".gate.") || has(".router.") || has("e_score_correction_bias") => TensorClass::Router,
        () if has(".mlp.") || has(".mlps.") || has(".feed_forward.") => TensorClass::DenseFfn,
        () => TensorClass::Other,
    }
}

/// A count under the first of several spellings that is there; of a list with one entry per layer, the largest.
fn first_count(config: &ModelConfig, keys: &[&'static str]) -> Result<usize, EngineError> {
    let key = keys.iter().copied().find(|key| config.get(key).is_some()).unwrap_or(keys[0]);
    if config.get(key).is_some_and(serde_json::Value::is_array) {
        let reason = "is a list without a positive count".to_owned();
        let largest = config.counts(key)?.into_iter().max().filter(|&count| count > 0);
        return largest.ok_or(EngineError::Config { key, reason });
    }
    config.size(key)
}

/// Families whose attention keeps a latent and a rotary key.
const LATENT_TYPES: [&str; 5] = ["deepseek_v2", "deepseek_v3", "kimi_k2", "pangu_ultra_moe", "longcat_flash"];

/// Numbers that one layer keeps per token, from the keys that the family reads: what other keys say must not make a model
/// look small, because its longest sequence follows from this. The config may say anything: no tensor was compared with it.
fn cache_width(config: &ModelConfig, model_type: &str) -> Result<u64, EngineError> {
    if LATENT_TYPES.contains(&model_type) {
        let latent_keys = ["kv_lora_rank", "attention_kv_lora_dim"];
        let rotary = first_count(config, &["qk_rope_head_dim", "attention_qk_rope_dim"])?;
        return Ok((first_count(config, &latent_keys)? + rotary) as u64);
    }
    let num_kv_heads = first_count(config, &["num_key_value_heads", "num_attention_heads"])?;
    let head_dim = match model_type {
        "jetmoe" => config.size("kv_channels")?,
        _ => config.head_dim()?,
    };
    Ok((2 * num_kv_heads as u64).saturating_mul(head_dim as u64))
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
        assert_eq!((found.num_experts, found.num_moe_layers, found.kv_dtype), (4, 1, "bf16"));
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
    fn every_supported_expert_and_router_name_is_known() {
        for (name, class) in [
            ("model.layers.0.block_sparse_moe.input_linear.weight", TensorClass::Experts),
            ("model.layers.0.block_sparse_moe.output_linear.weight", TensorClass::Experts),
            ("model.layers.0.block_sparse_moe.router.layer.weight", TensorClass::Router),
            ("model.layers.0.mlp.experts.gate_up_proj", TensorClass::Experts),
            ("model.layers.0.mlp.gate.weight", TensorClass::Router),
            ("model.layers.0.mlp.shared_expert_gate.weight", TensorClass::SharedExperts),
            ("model.layers.0.mlp.shared_expert.gate_proj.weight", TensorClass::SharedExperts),
            ("model.layers.0.self_attn.q_norm.weight", TensorClass::Norms),
            ("model.layers.0.self_attn.q_proj.bias", TensorClass::Attention),
        ] {
            assert_eq!(classify(name), class, "{name}");
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
            "model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
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
