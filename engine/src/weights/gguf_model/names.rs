//! The tensors of a GGUF file under Hugging Face's names: stacked experts one by one, fused rows apart, and the rows of
//! queries and keys in their order. No byte is read; names and layouts are those of llama.cpp's converter.

use std::ops::Range;

use safetensors::Dtype;

use super::arch::{Arch, MoeNames};
use crate::error::EngineError;
use crate::weights::checkpoint::{RowOrder, StoredDtype, TensorEntry};
use crate::weights::gguf::{GgmlType, GgufFile, GgufTensor};
use crate::weights::model_config::ModelConfig;

/// Names outside of layers. A tensor that became a part of the config has no name.
const ENDS: [(&str, Option<&str>); 4] = [
    ("token_embd.weight", Some("model.embed_tokens.weight")),
    ("output_norm.weight", Some("model.norm.weight")),
    ("output.weight", Some("lm_head.weight")),
    ("rope_freqs.weight", None),
];

/// Names within a layer, but for their ending (`.weight` or `.bias`).
const PLAIN: [(&str, &str); 21] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
];

/// Names within a layer that are taken whole.
const WHOLE: [(&str, &str); 2] =
    [("attn_sinks.weight", "self_attn.sinks"), ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias")];

/// What the names and places of a model's tensors follow from.
pub(super) struct Layout {
    arch: Arch,
    moe: MoeNames,
    num_experts: usize,
    q_rows: usize,
    kv_rows: usize,
    head_dim: usize,
}

/// A tensor of the file, where it lies, and how its numbers are stored.
struct Source<'a> {
    tensor: &'a GgufTensor,
    dtype: StoredDtype,
    file_idx: usize,
}

type Entries = Vec<(String, TensorEntry)>;

impl Layout {
    /// Sizes from the config that was made of the metadata.
    pub(super) fn new(arch: Arch, config: &ModelConfig) -> Result<Self, EngineError> {
        let head_dim = config.head_dim()?;
        let num_experts = config.first_count(&["num_local_experts", "num_experts", "n_routed_experts"])?;
        Ok(Self {
            arch,
            moe: arch.moe_names(),
            num_experts,
            q_rows: config.size("num_attention_heads")?.saturating_mul(head_dim),
            kv_rows: config.size("num_key_value_heads")?.saturating_mul(head_dim),
            head_dim,
        })
    }

    /// What the tensor `name` is to the models; under its own name, if it is nothing they know.
    ///
    /// # Errors
    /// A type that is not supported, or a tensor without elements.
    pub(super) fn entries(
        &self,
        gguf: &GgufFile,
        name: &str,
        (tensor, file_idx): (&GgufTensor, usize),
    ) -> Result<Entries, EngineError> {
        let dtype = match tensor.ggml_type {
            GgmlType::F32 => StoredDtype::Plain(Dtype::F32),
            GgmlType::F16 => StoredDtype::Plain(Dtype::F16),
            GgmlType::BF16 => StoredDtype::Plain(Dtype::BF16),
            GgmlType::Block(format) => StoredDtype::Block(format),
            GgmlType::Other(_) => {
                let dtype = tensor.ggml_type.to_string();
                return Err(EngineError::TensorDtype { name: name.into(), dtype, path: gguf.path().to_owned() });
            }
        };
        // What follows divides by sizes and multiplies them.
        if tensor.num_elements == 0 || tensor.shape.is_empty() {
            return Err(gguf.invalid(format!("tensor `{name}` has shape {:?}, which is empty", tensor.shape)));
        }
        let source = Source { tensor, dtype, file_idx };
        if let Some((_, hf_name)) = ENDS.iter().find(|(known, _)| *known == name) {
            return Ok(hf_name.iter().map(|hf_name| source.whole((*hf_name).to_owned())).collect());
        }
        let entries = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
            .filter(|(layer, _)| layer.parse::<usize>().is_ok_and(|number| number.to_string() == *layer))
            .and_then(|(layer, part)| self.layer_entries(&format!("model.layers.{layer}"), part, &source));
        Ok(entries.unwrap_or_else(|| vec![source.whole(name.to_owned())]))
    }

    /// `None` where the part has no place.
    fn layer_entries(&self, prefix: &str, part: &str, source: &Source) -> Option<Entries> {
        if let Some((_, hf_name)) = WHOLE.iter().find(|(known, _)| *known == part) {
            return Some(vec![source.whole(format!("{prefix}.{hf_name}"))]);
        }
        // Of multi-token prediction, which is not served from GGUF.
        if part.starts_with("nextn.") {
            return Some(vec![source.whole(format!("{prefix}.{part}"))]);
        }
        let (stem, ending) = part.rsplit_once('.').filter(|(_, ending)| matches!(*ending, "weight" | "bias"))?;
        let name = |hf_name: &str| format!("{prefix}.{hf_name}.{ending}");
        match stem {
            "attn_q" | "attn_k" => Some(vec![self.rotary(source.whole(name(plain(stem)?)))]),
            "attn_qkv" => self.fused_qkv(prefix, ending, source),
            "ffn_gate_inp" => Some(vec![source.whole(name(self.moe.router))]),
            "ffn_gate_inp_shexp" => Some(vec![source.as_row(name(plain(stem)?))]),
            "ffn_gate_exps" => self.experts(prefix, ending, (0, source)),
            "ffn_up_exps" => self.experts(prefix, ending, (1, source)),
            "ffn_down_exps" => self.experts(prefix, ending, (2, source)),
            "ffn_gate_up_exps" => self.fused_experts(prefix, ending, source),
            "ffn_gate_shexp" | "ffn_up_shexp" | "ffn_down_shexp" => {
                let projection = &stem["ffn_".len()..stem.len() - "_shexp".len()];
                Some(vec![source.whole(name(&format!("{}.{projection}_proj", self.moe.shared)))])
            }
            _ => Some(vec![source.whole(name(plain(stem)?))]),
        }
    }

    fn rotary(&self, (name, entry): (String, TensorEntry)) -> (String, TensorEntry) {
        let is_whole = entry.shape.first().is_some_and(|rows| rows.is_multiple_of(self.head_dim));
        let order = match self.arch.stores_rotary_pairs() && is_whole {
            true => RowOrder::RotaryPairs { head_dim: self.head_dim },
            false => RowOrder::AsStored,
        };
        (name, TensorEntry { order, ..entry })
    }

    /// Queries, keys and values one below the other.
    fn fused_qkv(&self, prefix: &str, ending: &str, source: &Source) -> Option<Entries> {
        let (q, kv) = (self.q_rows, self.kv_rows);
        if source.tensor.shape.first() != Some(&(q.saturating_add(kv.saturating_mul(2)))) {
            return None;
        }
        let name = |part: &str| format!("{prefix}.self_attn.{part}_proj.{ending}");
        Some(vec![
            self.rotary(source.rows(name("q"), 0..q)),
            self.rotary(source.rows(name("k"), q..q + kv)),
            source.rows(name("v"), q + kv..q + 2 * kv),
        ])
    }

    /// One projection of all experts; their biases stay together.
    fn experts(&self, prefix: &str, ending: &str, (projection, source): (usize, &Source)) -> Option<Entries> {
        let (block, projection) = (self.moe.block, self.moe.projections[projection]);
        if ending == "bias" {
            return Some(vec![source.whole(format!("{prefix}.{block}.experts.{projection}.bias"))]);
        }
        let name = |expert: usize| format!("{prefix}.{block}.experts.{expert}.{projection}.weight");
        let rows = source.expert_rows(self.num_experts)?;
        Some((0..self.num_experts).map(|expert| source.expert_part(name(expert), (expert, rows), 0..rows)).collect())
    }

    /// Gate and up of each expert one below the other.
    fn fused_experts(&self, prefix: &str, ending: &str, source: &Source) -> Option<Entries> {
        let block = self.moe.block;
        let rows = source.expert_rows(self.num_experts).filter(|rows| ending == "weight" && rows.is_multiple_of(2))?;
        let halves = [(self.moe.projections[0], 0..rows / 2), (self.moe.projections[1], rows / 2..rows)];
        let of_expert = |expert: usize| {
            halves.clone().map(|(projection, part)| {
                let name = format!("{prefix}.{block}.experts.{expert}.{projection}.weight");
                source.expert_part(name, (expert, rows), part)
            })
        };
        Some((0..self.num_experts).flat_map(of_expert).collect())
    }
}

fn plain(stem: &str) -> Option<&'static str> {
    PLAIN.iter().find(|(known, _)| *known == stem).map(|(_, hf_name)| *hf_name)
}

impl Source<'_> {
    fn entry(&self, shape: Vec<usize>, bytes: Range<usize>) -> TensorEntry {
        TensorEntry {
            dtype: self.dtype,
            shape,
            num_bytes: bytes.len(),
            order: RowOrder::AsStored,
            file_idx: self.file_idx,
            offset: self.tensor.offset + bytes.start,
        }
    }

    fn whole(&self, name: String) -> (String, TensorEntry) {
        (name, self.entry(self.tensor.shape.clone(), 0..self.tensor.num_bytes))
    }

    /// A vector as a matrix of one row.
    fn as_row(&self, name: String) -> (String, TensorEntry) {
        let shape = match self.tensor.shape.as_slice() {
            &[cols] => vec![1, cols],
            other => other.to_vec(),
        };
        (name, self.entry(shape, 0..self.tensor.num_bytes))
    }

    /// Some rows of a tensor that has that many.
    fn rows(&self, name: String, rows: Range<usize>) -> (String, TensorEntry) {
        let mut shape = self.tensor.shape.clone();
        let row_bytes = self.tensor.num_bytes / shape[0];
        shape[0] = rows.len();
        (name, self.entry(shape, rows.start * row_bytes..rows.end * row_bytes))
    }

    /// Rows of each expert's matrix in a tensor `[num_experts, rows, cols]`.
    fn expert_rows(&self, num_experts: usize) -> Option<usize> {
        match self.tensor.shape.as_slice() {
            &[experts, rows, _] if experts == num_experts => Some(rows),
            _ => None,
        }
    }

    /// Rows `part` of the `rows` of one expert's matrix.
    fn expert_part(&self, name: String, (expert, rows): (usize, usize), part: Range<usize>) -> (String, TensorEntry) {
        let cols = self.tensor.shape[2];
        let row_bytes = self.tensor.num_bytes / (self.tensor.shape[0] * rows);
        let first = expert * rows + part.start;
        (name, self.entry(vec![part.len(), cols], first * row_bytes..(first + part.len()) * row_bytes))
    }
}
