//! Sparse upcycling: a dense llama-architecture GGUF becomes a Mixtral-layout folder that computes the same.
//!
//! Every expert starts as the dense FFN (Komatsuzaki et al. 2022, "Sparse Upcycling"). The router is random, but
//! Mixtral's top-k weights sum to 1, so the weighted sum of equal experts is the dense output.
//!
//! `plan` maps tensors, `shards` writes them, `router_init` draws the routers.

mod plan;
mod router_init;
mod shards;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use self::plan::{DenseModel, PlannedTensor, TensorSource};
use self::shards::{ShardWriter, split_into_shards};
use super::gguf::GgufFile;
use crate::error::EngineError;

/// Largest number of experts; the routers of published models stay below it.
const MAX_EXPERTS: usize = 1024;
/// Data bytes of one shard: 1 GiB with room for the header.
const MAX_SHARD_BYTES: u64 = (1 << 30) - (4 << 20);

/// Storage type of the written weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UpcycleDtype {
    #[default]
    Bf16,
    F32,
    F16,
}

/// What to make of the dense model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpcycleOptions {
    /// Experts per layer, 1 to 1024. One expert gives the dense model in the Mixtral layout.
    pub num_experts: usize,
    /// Experts per token, 1 to `num_experts`.
    pub top_k: usize,
    /// Seed of the routers.
    pub seed: u64,
    pub dtype: UpcycleDtype,
}

impl Default for UpcycleOptions {
    fn default() -> Self {
        Self { num_experts: 8, top_k: 2, seed: 0, dtype: UpcycleDtype::Bf16 }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpcycleReport {
    pub num_tensors: usize,
    pub num_parameters: u64,
    /// Bytes of the tensors.
    pub num_bytes: u64,
    pub num_shards: usize,
}

/// Writes the Mixtral-layout folder `out` from the dense GGUF `source`. Memory holds one tensor at a time.
///
/// `out` appears complete or not at all: the files are written beside it and renamed. `progress` is told
/// `(bytes done, bytes in all)` after every tensor. Tokenizer files are the caller's to add.
///
/// # Errors
/// Options out of range, an `out` that exists, a source that is not a dense llama model, and I/O errors.
pub fn upcycle(
    source: &Path,
    out: &Path,
    options: &UpcycleOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<UpcycleReport, EngineError> {
    check_options(options)?;
    if out.exists() {
        return Err(EngineError::Invalid { path: out.into(), reason: "it exists already".into() });
    }
    let gguf = GgufFile::open(source)?;
    let dense = DenseModel::read(&gguf)?;
    let conversion = Conversion { gguf: &gguf, options, max_shard_bytes: MAX_SHARD_BYTES };
    let plan = dense.plan(&gguf, options.num_experts)?;
    let partial = partial_path(out)?;
    let written = conversion.write_folder(&partial, &dense, &plan, progress);
    if written.is_err() {
        // The error that stopped the conversion is the one to report.
        let _ = std::fs::remove_dir_all(&partial);
    }
    let report = written?;
    std::fs::rename(&partial, out).map_err(|source| EngineError::Write { path: out.into(), source })?;
    Ok(report)
}

fn check_options(options: &UpcycleOptions) -> Result<(), EngineError> {
    let UpcycleOptions { num_experts, top_k, .. } = *options;
    if num_experts == 0 || num_experts > MAX_EXPERTS {
        let allowed = format!("1 to {MAX_EXPERTS}");
        return Err(EngineError::Limit { what: "the number of experts", value: num_experts as u64, allowed });
    }
    if top_k == 0 || top_k > num_experts {
        let allowed = format!("1 to {num_experts}, the number of experts");
        return Err(EngineError::Limit { what: "the number of experts per token", value: top_k as u64, allowed });
    }
    Ok(())
}

/// A hidden sibling of `out`, fresh: a conversion that was killed leaves one behind.
pub(super) fn partial_path(out: &Path) -> Result<PathBuf, EngineError> {
    let name = out
        .file_name()
        .ok_or_else(|| EngineError::Invalid { path: out.into(), reason: "it does not name a folder".into() })?;
    let partial = out.with_file_name(format!(".{}.incomplete", name.to_string_lossy()));
    let write_error = |source| EngineError::Write { path: partial.clone(), source };
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(write_error)?;
    }
    std::fs::create_dir_all(&partial).map_err(write_error)?;
    Ok(partial)
}

struct Conversion<'a> {
    gguf: &'a GgufFile,
    options: &'a UpcycleOptions,
    max_shard_bytes: u64,
}

impl Conversion<'_> {
    fn write_folder(
        &self,
        dir: &Path,
        dense: &DenseModel,
        plan: &[PlannedTensor],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<UpcycleReport, EngineError> {
        let num_parameters: u64 = plan.iter().map(PlannedTensor::num_elements).sum();
        let num_bytes = num_parameters * self.options.dtype.num_bytes();
        let shards = split_into_shards(plan, self.options.dtype, self.max_shard_bytes);
        let mut weight_map = Map::new();
        let mut num_bytes_done = 0;
        for (shard_idx, shard) in shards.iter().enumerate() {
            let file_name = format!("model-{:05}-of-{:05}.safetensors", shard_idx + 1, shards.len());
            self.write_shard(&dir.join(&file_name), shard, &mut |num_tensor_bytes| {
                num_bytes_done += num_tensor_bytes;
                progress(num_bytes_done, num_bytes);
            })?;
            weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(file_name.as_str()))));
        }
        let index = json!({ "metadata": { "total_size": num_bytes }, "weight_map": weight_map });
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
        write_json(&dir.join("config.json"), &self.config(dense)?)?;
        write_json(&dir.join("generation_config.json"), &self.generation_config()?)?;
        Ok(UpcycleReport { num_tensors: plan.len(), num_parameters, num_bytes, num_shards: shards.len() })
    }

    fn write_shard(
        &self,
        path: &Path,
        tensors: &[PlannedTensor],
        tensor_done: &mut dyn FnMut(u64),
    ) -> Result<(), EngineError> {
        let mut writer = ShardWriter::create(path, tensors, self.options.dtype)?;
        let mut previous: Option<(&TensorSource, Vec<u8>)> = None;
        for tensor in tensors {
            let bytes = match previous.take() {
                Some((source, bytes)) if *source == tensor.source => bytes,
                _ => self.expand(tensor)?,
            };
            writer.write(&bytes)?;
            tensor_done(bytes.len() as u64);
            previous = Some((&tensor.source, bytes));
        }
        writer.finish()
    }

    /// The bytes of one output tensor.
    fn expand(&self, tensor: &PlannedTensor) -> Result<Vec<u8>, EngineError> {
        let values = match &tensor.source {
            TensorSource::Copy(name) => self.gguf.read_f32(name)?,
            TensorSource::Rotary { name, num_heads } => {
                rows_to_halves(&self.gguf.read_f32(name)?, *num_heads, &tensor.shape)
            }
            TensorSource::Router { layer_idx } => {
                router_init::router_weights(self.options.seed, *layer_idx, tensor.num_elements() as usize)
            }
        };
        self.options.dtype.encode(&values).ok_or_else(|| {
            self.gguf.invalid(format!("`{}` has values that {:?} cannot hold", tensor.name, self.options.dtype))
        })
    }

    fn config(&self, dense: &DenseModel) -> Result<Value, EngineError> {
        Ok(json!({
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self.gguf.opt_u64("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": self.gguf.opt_u64("tokenizer.ggml.eos_token_id")?,
            "head_dim": dense.head_dim,
            "hidden_act": "silu",
            "hidden_size": dense.hidden_size,
            "initializer_range": router_init::STANDARD_DEVIATION,
            "intermediate_size": dense.intermediate_size,
            "max_position_embeddings": dense.max_position_embeddings,
            "model_type": "mixtral",
            "num_attention_heads": dense.num_attention_heads,
            "num_experts_per_tok": self.options.top_k,
            "num_hidden_layers": dense.num_hidden_layers,
            "num_key_value_heads": dense.num_key_value_heads,
            "num_local_experts": self.options.num_experts,
            "output_router_logits": false,
            "rms_norm_eps": dense.rms_norm_eps,
            "rope_theta": dense.rope_theta,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "sliding_window": null,
            "tie_word_embeddings": dense.tie_word_embeddings,
            "torch_dtype": match self.options.dtype {
                UpcycleDtype::Bf16 => "bfloat16",
                UpcycleDtype::F32 => "float32",
                UpcycleDtype::F16 => "float16",
            },
            "use_cache": true,
            "vocab_size": dense.vocab_size,
        }))
    }

    /// Stop tokens: the end of the text and, where the model has another one, the end of a turn.
    fn generation_config(&self) -> Result<Value, EngineError> {
        let mut eos_ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            eos_ids.extend(self.gguf.opt_u64(key)?.filter(|id| !eos_ids.contains(id)));
        }
        let mut config = json!({ "_from_model_config": true });
        if let Some(id) = self.gguf.opt_u64("tokenizer.ggml.bos_token_id")? {
            config["bos_token_id"] = id.into();
        }
        if !eos_ids.is_empty() {
            config["eos_token_id"] = if let [only] = eos_ids[..] { only.into() } else { eos_ids.into() };
        }
        if let Some(id) = self.gguf.opt_u64("tokenizer.ggml.padding_token_id")? {
            config["pad_token_id"] = id.into();
        }
        Ok(config)
    }
}

/// Reorders the rows of each head from rotary pairs `(0, d/2, 1, d/2 + 1, …)`, as GGUF stores llama's queries and
/// keys, to halves `(0, 1, …, d - 1)`, as the Mixtral layout rotates them.
fn rows_to_halves(values: &[f32], num_heads: usize, shape: &[usize]) -> Vec<f32> {
    let (num_rows, row_len) = (shape[0], shape[1]);
    let head_dim = num_rows / num_heads;
    let half_dim = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..num_rows {
        let (head, dim) = (row / head_dim, row % head_dim);
        let source_row = head * head_dim + 2 * (dim % half_dim) + dim / half_dim;
        out.extend_from_slice(&values[source_row * row_len..(source_row + 1) * row_len]);
    }
    out
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), EngineError> {
    let text = serde_json::to_vec_pretty(value).expect("a JSON value is always JSON");
    std::fs::write(path, text).map_err(|source| EngineError::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests;
