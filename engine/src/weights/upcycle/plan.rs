//! The dense model inside a llama-architecture GGUF, and which of its tensors becomes which of the Mixtral layout's.

use crate::error::EngineError;
use crate::weights::gguf::{GgufFile, decimal};

/// Shape of the dense model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DenseModel {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rope_theta: f64,
    pub(super) rms_norm_eps: f64,
    pub(super) tie_word_embeddings: bool,
}

/// Where the values of an output tensor come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TensorSource {
    /// The GGUF tensor as it is.
    Copy(String),
    /// A query or key projection, whose rows GGUF stores in rotary pairs.
    Rotary { name: String, num_heads: usize },
    /// A fresh router.
    Router { layer_idx: u64 },
}

/// One tensor of the folder to be written.
#[derive(Clone, Debug)]
pub(super) struct PlannedTensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) source: TensorSource,
}

impl PlannedTensor {
    pub(super) fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

impl DenseModel {
    /// Reads and checks the metadata of a dense llama model.
    pub(super) fn read(gguf: &GgufFile) -> Result<Self, EngineError> {
        let architecture = gguf.opt_str("general.architecture")?.unwrap_or("(none)");
        if architecture != "llama" {
            return Err(
                gguf.invalid(format!("its architecture is `{architecture}`, upcycling reads dense `llama` models"))
            );
        }
        if gguf.opt_u64("llama.expert_count")?.unwrap_or(0) > 0 {
            return Err(gguf.invalid("the model has experts already"));
        }
        if let Some(scaling) = gguf.opt_str("llama.rope.scaling.type")?.filter(|kind| *kind != "none") {
            return Err(gguf.invalid(format!("rope scaling `{scaling}` has no counterpart in the Mixtral layout")));
        }
        if gguf.tensors().contains_key("rope_freqs.weight") {
            return Err(
                gguf.invalid("its rotary frequencies are scaled, which has no counterpart in the Mixtral layout")
            );
        }
        let hidden_size = size(gguf, "llama.embedding_length")?;
        let num_attention_heads = size(gguf, "llama.attention.head_count")?;
        let num_key_value_heads = opt_size(gguf, "llama.attention.head_count_kv")?.unwrap_or(num_attention_heads);
        let head_dim = opt_size(gguf, "llama.attention.key_length")?.unwrap_or(hidden_size / num_attention_heads);
        let rotary_dim = opt_size(gguf, "llama.rope.dimension_count")?.unwrap_or(head_dim);
        let value_dim = opt_size(gguf, "llama.attention.value_length")?.unwrap_or(head_dim);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || rotary_dim != head_dim || value_dim != head_dim {
            return Err(gguf.invalid(format!(
                "heads of {head_dim} with {rotary_dim} rotary and {value_dim} value dimensions: \
                 all three must be the same even number"
            )));
        }
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(
                gguf.invalid(format!("{num_key_value_heads} kv heads do not divide {num_attention_heads} heads"))
            );
        }
        let num_hidden_layers = size(gguf, "llama.block_count")?;
        // Each has tensors of its own; a plan for layers that are not there could take all memory.
        if num_hidden_layers > gguf.tensors().len() {
            return Err(gguf.invalid(format!("{num_hidden_layers} layers, but {} tensors", gguf.tensors().len())));
        }
        Ok(Self {
            vocab_size: gguf.tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: size(gguf, "llama.feed_forward_length")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: size(gguf, "llama.context_length")?,
            rope_theta: decimal(gguf.opt_f64("llama.rope.freq_base")?.unwrap_or(10_000.0)),
            rms_norm_eps: decimal(
                gguf.opt_f64("llama.attention.layer_norm_rms_epsilon")?
                    .ok_or_else(|| gguf.invalid("metadata `llama.attention.layer_norm_rms_epsilon` is missing"))?,
            ),
            tie_word_embeddings: !gguf.tensors().contains_key("output.weight"),
        })
    }

    /// All tensors of the Mixtral layout, in the order to write them: copies of one source follow each other.
    ///
    /// # Errors
    /// A missing, misshapen or unreadable tensor of the GGUF, or one that has no place in the layout.
    pub(super) fn plan(&self, gguf: &GgufFile, num_experts: usize) -> Result<Vec<PlannedTensor>, EngineError> {
        let (hidden, vocab) = (self.hidden_size, self.vocab_size);
        let mut plan = vec![copy("model.embed_tokens.weight".into(), vec![vocab, hidden], "token_embd.weight".into())];
        for layer_idx in 0..self.num_hidden_layers {
            self.plan_layer(layer_idx, num_experts, &mut plan);
        }
        plan.push(copy("model.norm.weight".into(), vec![hidden], "output_norm.weight".into()));
        if !self.tie_word_embeddings {
            plan.push(copy("lm_head.weight".into(), vec![vocab, hidden], "output.weight".into()));
        }
        check_sources(gguf, &plan)?;
        Ok(plan)
    }

    fn plan_layer(&self, layer_idx: usize, num_experts: usize, plan: &mut Vec<PlannedTensor>) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q_rows, kv_rows) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let hf = |name: &str| format!("model.layers.{layer_idx}.{name}.weight");
        let source = |name: &str| format!("blk.{layer_idx}.{name}.weight");
        let rotary = |name: &str, rows: usize, from: &str, num_heads: usize| PlannedTensor {
            name: hf(name),
            shape: vec![rows, hidden],
            source: TensorSource::Rotary { name: source(from), num_heads },
        };
        plan.extend([
            copy(hf("input_layernorm"), vec![hidden], source("attn_norm")),
            rotary("self_attn.q_proj", q_rows, "attn_q", self.num_attention_heads),
            rotary("self_attn.k_proj", kv_rows, "attn_k", self.num_key_value_heads),
            copy(hf("self_attn.v_proj"), vec![kv_rows, hidden], source("attn_v")),
            copy(hf("self_attn.o_proj"), vec![hidden, q_rows], source("attn_output")),
            copy(hf("post_attention_layernorm"), vec![hidden], source("ffn_norm")),
            PlannedTensor {
                name: hf("block_sparse_moe.gate"),
                shape: vec![num_experts, hidden],
                source: TensorSource::Router { layer_idx: layer_idx as u64 },
            },
        ]);
        let projections = [
            ("w1", [inner, hidden], "ffn_gate"),
            ("w3", [inner, hidden], "ffn_up"),
            ("w2", [hidden, inner], "ffn_down"),
        ];
        for (projection, shape, from) in projections {
            plan.extend((0..num_experts).map(|expert_idx| {
                let name = hf(&format!("block_sparse_moe.experts.{expert_idx}.{projection}"));
                copy(name, shape.to_vec(), source(from))
            }));
        }
    }
}

fn copy(name: String, shape: Vec<usize>, source: String) -> PlannedTensor {
    PlannedTensor { name, shape, source: TensorSource::Copy(source) }
}

/// Every source must be there, readable and of the planned shape, and no other tensor may be left over.
fn check_sources(gguf: &GgufFile, plan: &[PlannedTensor]) -> Result<(), EngineError> {
    let mut used = std::collections::BTreeSet::new();
    for planned in plan {
        let (TensorSource::Copy(name) | TensorSource::Rotary { name, .. }) = &planned.source else { continue };
        if !used.insert(name.as_str()) {
            continue;
        }
        let tensor = gguf.tensor(name)?;
        if tensor.ggml_type.unit().is_none() {
            let (name, dtype) = (name.clone(), tensor.ggml_type.to_string());
            return Err(EngineError::TensorDtype { name, dtype, path: gguf.path().to_owned() });
        }
        if tensor.shape != planned.shape {
            return Err(EngineError::TensorShape {
                name: name.clone(),
                found: tensor.shape.clone(),
                expected: planned.shape.clone(),
                path: gguf.path().to_owned(),
            });
        }
    }
    let extra: Vec<&str> = gguf.tensors().keys().map(String::as_str).filter(|name| !used.contains(name)).collect();
    if extra.is_empty() {
        return Ok(());
    }
    Err(EngineError::ExtraTensors { count: extra.len(), names: extra[..extra.len().min(5)].join(", ") })
}

fn opt_size(gguf: &GgufFile, key: &str) -> Result<Option<usize>, EngineError> {
    match gguf.opt_u64(key)? {
        None => Ok(None),
        // The bound keeps every product of two sizes far from overflow.
        Some(value) if (1..1 << 24).contains(&value) => Ok(Some(value as usize)),
        Some(value) => Err(gguf.invalid(format!("metadata `{key}` is {value}, expected 1 to 2^24"))),
    }
}

fn size(gguf: &GgufFile, key: &str) -> Result<usize, EngineError> {
    opt_size(gguf, key)?.ok_or_else(|| gguf.invalid(format!("metadata `{key}` is missing")))
}
