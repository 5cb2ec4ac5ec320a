//! Sums over the tensors of a checkpoint, by what they are for.

use std::collections::{BTreeMap, BTreeSet};

use kernels::WeightFormat;
use kernels::block_format::BlockFormat;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, StoredDtype, TensorEntry};
use super::gguf_model::blocks;
use super::mxfp4::FORMAT;
use super::quantization::{Quantization, TransposedKind};

/// The tensors of one class together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassSize {
    pub class: TensorClass,
    pub num_tensors: usize,
    pub num_parameters: u64,
    /// As stored.
    pub num_bytes: u64,
    /// As `--dtype auto` keeps them in memory.
    pub memory_bytes: u64,
}

impl ClassSize {
    pub fn empty(class: TensorClass) -> Self {
        Self { class, num_tensors: 0, num_parameters: 0, num_bytes: 0, memory_bytes: 0 }
    }
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

/// One tensor, as the headers describe it.
struct TensorSize {
    num_parameters: u64,
    /// In memory, with `--dtype auto` and `--dtype f32`.
    memory_bytes: [u64; 2],
}

/// Routed experts of one block, all of one size.
#[derive(Debug, Default)]
pub struct ExpertBlock {
    pub num_parameters: u64,
    pub num_experts: u64,
    indices: BTreeSet<usize>,
}

/// Sums over the tensors of a checkpoint.
#[derive(Debug, Default)]
pub struct Tally {
    pub classes: BTreeMap<TensorClass, ClassSize>,
    /// By the name of their layer and its part: a layer may choose experts twice.
    pub expert_blocks: BTreeMap<(String, String), ExpertBlock>,
    /// Of the weights in memory, with `--dtype auto` and `--dtype f32`.
    pub memory_bytes: [u64; 2],
    bytes_by_dtype: Vec<(StoredDtype, u64)>,
}

impl Tally {
    /// `is_ignored` knows the tensors that serving has no use for.
    pub fn of(checkpoint: &Checkpoint, quantization: Quantization, is_ignored: impl Fn(&str) -> bool) -> Self {
        let mut tally = Self::default();
        for (name, entry) in checkpoint.iter() {
            let class = if is_ignored(name) { TensorClass::Ignored } else { classify(name) };
            let size = match class {
                TensorClass::Ignored => {
                    TensorSize { memory_bytes: [0; 2], ..size_of_tensor(checkpoint, quantization, (name, entry)) }
                }
                _ => size_of_tensor(checkpoint, quantization, (name, entry)),
            };
            tally.add((name, entry), class, size);
        }
        tally
    }

    fn add(&mut self, (name, entry): (&str, &TensorEntry), class: TensorClass, tensor: TensorSize) {
        let num_bytes = entry.num_bytes as u64;
        let size = self.classes.entry(class).or_insert_with(|| ClassSize::empty(class));
        size.num_tensors += 1;
        size.num_bytes += num_bytes;
        size.num_parameters += tensor.num_parameters;
        size.memory_bytes += tensor.memory_bytes[0];
        for (sum, bytes) in self.memory_bytes.iter_mut().zip(tensor.memory_bytes) {
            *sum += bytes;
        }
        match self.bytes_by_dtype.iter_mut().find(|(known, _)| *known == entry.dtype) {
            Some((_, bytes)) => *bytes += num_bytes,
            None => self.bytes_by_dtype.push((entry.dtype, num_bytes)),
        }
        if class == TensorClass::Experts {
            self.add_experts(name, &entry.shape, tensor.num_parameters);
        }
    }

    fn add_experts(&mut self, name: &str, shape: &[usize], num_parameters: u64) {
        let (block, rest) = split_experts(name);
        let index = rest.split('.').next().and_then(|part| part.trim_start_matches("expert_").parse::<usize>().ok());
        // A vector that no expert owns acts on what all of them give together.
        if index.is_none() && shape.len() < 2 {
            return;
        }
        let (layer, part) = block.rsplit_once('.').unwrap_or(("", block));
        let experts = self.expert_blocks.entry((layer.to_owned(), part.to_owned())).or_default();
        experts.num_parameters += num_parameters;
        match index {
            Some(index) => {
                experts.indices.insert(index);
                experts.num_experts = experts.indices.len() as u64;
            }
            None => experts.num_experts = shape[0] as u64,
        }
    }

    pub fn parameters(&self, counted: impl Fn(TensorClass) -> bool) -> u64 {
        self.classes.values().filter(|size| counted(size.class)).map(|size| size.num_parameters).sum()
    }

    /// Layers with routed experts.
    pub fn num_moe_layers(&self) -> usize {
        self.expert_blocks.keys().map(|(layer, _)| layer).collect::<BTreeSet<_>>().len()
    }

    pub fn dtypes_by_size(&self) -> Vec<StoredDtype> {
        let mut dtypes = self.bytes_by_dtype.clone();
        dtypes.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
        dtypes.into_iter().map(|(dtype, _)| dtype).collect()
    }
}

/// Bytes in memory of the tensors that `counted` picks, with `--dtype auto` and `--dtype f32`.
pub fn memory_bytes(checkpoint: &Checkpoint, quantization: Quantization, counted: impl Fn(&str) -> bool) -> [u64; 2] {
    let sizes = checkpoint.iter().filter(|(name, _)| counted(name));
    sizes.fold([0; 2], |sums, entry| {
        let bytes = size_of_tensor(checkpoint, quantization, entry).memory_bytes;
        [sums[0] + bytes[0], sums[1] + bytes[1]]
    })
}

/// `17` of `model.layers.17`.
pub fn layer_number(layer: &str) -> Option<usize> {
    layer.rsplit('.').find_map(|part| part.parse().ok())
}

/// The block that holds the experts, and what the name says after it: `(model.layers.1.mlp, 7.up_proj.weight)`.
fn split_experts(name: &str) -> (&str, &str) {
    let spellings = [".experts.", ".input_linear.", ".output_linear."];
    spellings.iter().find_map(|part| name.split_once(part)).unwrap_or((name, ""))
}

/// Parameters and memory of a tensor. Scales and the like are neither: they are used up when weights are expanded.
fn size_of_tensor(
    checkpoint: &Checkpoint,
    quantization: Quantization,
    (name, entry): (&str, &TensorEntry),
) -> TensorSize {
    const USED_UP: [&str; 10] = [
        "_scale_inv",
        "_scales",
        ".scales",
        ".qzeros",
        ".g_idx",
        ".weight_scale",
        ".weight_shape",
        ".weight_zero_point",
        ".input_scale",
        ".output_scale",
    ];
    const IN_F32: [&str; 3] = ["bias", "conv1d.weight", "relative_attention_bias.weight"];
    if USED_UP.iter().any(|ending| name.ends_with(ending)) {
        return TensorSize { num_parameters: 0, memory_bytes: [0; 2] };
    }
    let stored: u64 = entry.shape.iter().map(|&size| size as u64).product();
    let shape = match entry.dtype {
        // Two values in a byte.
        StoredDtype::Plain(Dtype::U8) if name.ends_with("_blocks") => {
            // `[experts, rows, blocks of a row, bytes of a block]`
            let cols = entry.shape.iter().rev().take(2).product::<usize>() as u64 * 2;
            Some([(2 * stored).checked_div(cols).unwrap_or(0), cols])
        }
        StoredDtype::Plain(Dtype::I32) if name.ends_with(".weight_packed") => {
            packed_shape(checkpoint, quantization, name, entry)
        }
        StoredDtype::Plain(Dtype::I32) if name.ends_with(".qweight") => transposed_shape(quantization, entry),
        _ => None,
    };
    if let Some(shape) = shape {
        let num_parameters = shape[0].saturating_mul(shape[1]);
        // Stacked matrices are packed each by itself.
        let (format, count) = match name.ends_with("_blocks") {
            true => (Some(FORMAT), entry.shape.first().map_or(1, |&count| count.max(1) as u64)),
            false => (quantization.packed_format(shape[1]), 1),
        };
        let bytes = match (format, [shape[0] / count, shape[1]].map(usize::try_from)) {
            (Some(format), [Ok(rows), Ok(cols)]) if num_parameters < 1 << 48 => {
                count * WeightFormat::Quantized(format).bytes_for(rows, cols) as u64
            }
            _ => num_parameters.saturating_mul(2),
        };
        return TensorSize { num_parameters, memory_bytes: [bytes, num_parameters.saturating_mul(4)] };
    }
    let (num_parameters, element_bytes) = match entry.dtype {
        StoredDtype::Plain(Dtype::F8_E4M3 | Dtype::I8) => (stored, 2),
        StoredDtype::Block(format) => return size_of_blocks(format, &entry.shape, stored),
        // Norms, biases and the like are kept in f32.
        _ if entry.shape.len() < 2 || IN_F32.iter().any(|part| name.ends_with(part)) => (stored, 4),
        _ => (stored, entry.num_bytes as u64 / stored.max(1)),
    };
    TensorSize {
        num_parameters,
        memory_bytes: [num_parameters.saturating_mul(element_bytes), num_parameters.saturating_mul(4)],
    }
}

/// Blocks stay quantized, in panels of rows.
fn size_of_blocks(format: BlockFormat, shape: &[usize], num_parameters: u64) -> TensorSize {
    let (count, rows, cols) = match *shape {
        [count, rows, cols] => (count, rows, cols),
        [rows, cols] => (1, rows, cols),
        _ => return TensorSize { num_parameters, memory_bytes: [num_parameters.saturating_mul(4); 2] },
    };
    let packed = blocks::joint_format(&[format]).map_or(WeightFormat::Bf16, WeightFormat::Quantized);
    let packed_bytes = (count as u64).saturating_mul(packed.bytes_for(rows, cols) as u64);
    TensorSize { num_parameters, memory_bytes: [packed_bytes, num_parameters.saturating_mul(4)] }
}

/// Packed rows may end in padding: how long they are is in `weight_shape`, which is believed where it can be true.
fn packed_shape(
    checkpoint: &Checkpoint,
    quantization: Quantization,
    name: &str,
    entry: &TensorEntry,
) -> Option<[u64; 2]> {
    let per_word = quantization.packing.map_or(8, |packing| packing.per_word()) as u64;
    let &[rows, words] = entry.shape.as_slice() else { return None };
    let (rows, words) = (rows as u64, words as u64);
    let shape = name.strip_suffix("_packed").and_then(|stem| checkpoint.get(&format!("{stem}_shape")));
    let cols = shape.and_then(|shape| {
        let bytes = checkpoint.bytes(shape);
        match shape.dtype {
            StoredDtype::Plain(Dtype::I64) => Some(i64::from_le_bytes(*bytes.as_chunks().0.get(1)?)),
            StoredDtype::Plain(Dtype::I32) => Some(i32::from_le_bytes(*bytes.as_chunks().0.get(1)?).into()),
            _ => None,
        }
    });
    let cols = cols.and_then(|cols| u64::try_from(cols).ok()).filter(|cols| cols.div_ceil(per_word) == words);
    Some([rows, cols.unwrap_or(words * per_word)])
}

/// AWQ packs outputs into words, GPTQ inputs; both store inputs by outputs.
fn transposed_shape(quantization: Quantization, entry: &TensorEntry) -> Option<[u64; 2]> {
    let &[inputs, outputs] = entry.shape.as_slice() else { return None };
    let (inputs, outputs) = (inputs as u64, outputs as u64);
    Some(match quantization.transposed?.kind {
        TransposedKind::Awq => [8 * outputs, inputs],
        TransposedKind::Gptq { .. } => [outputs, 8 * inputs],
    })
}

/// Sorts a tensor by its name, in the spellings of every supported architecture.
pub fn classify(name: &str) -> TensorClass {
    let has = |part: &str| name.contains(part);
    match () {
        () if name == "shared.weight" || has("embed_tokens.") || has("word_embeddings.") => TensorClass::Embedding,
        () if has("lm_head.") => TensorClass::LmHead,
        () if has("norm.") => TensorClass::Norms,
        () if has("Attention.")
            || has(".linear_attn.")
            || has(".self_attn.")
            || has(".attention.")
            || has(".self_attention.kv_proj.") =>
        {
            TensorClass::Attention
        }
        () if has(".shared_expert") || has(".shared_mlp.") => TensorClass::SharedExperts,
        () if has(".gate.") || has(".router.") || has("e_score_correction_bias") => TensorClass::Router,
        () if has(".experts.") || has(".input_linear.") || has(".output_linear.") => TensorClass::Experts,
        () if has(".mlp.") || has(".mlps.") || has(".feed_forward.") => TensorClass::DenseFfn,
        () => TensorClass::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_supported_expert_and_router_name_is_known() {
        for (name, class) in [
            ("model.layers.0.block_sparse_moe.input_linear.weight", TensorClass::Experts),
            ("model.layers.0.block_sparse_moe.output_linear.weight", TensorClass::Experts),
            ("model.layers.0.block_sparse_moe.router.layer.weight", TensorClass::Router),
            ("model.layers.0.self_attention.experts.router.layer.weight", TensorClass::Router),
            ("model.layers.0.self_attention.experts.input_linear.weight", TensorClass::Experts),
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
    fn experts_are_counted_in_the_block_that_chooses_them() {
        let mut tally = Tally::default();
        for (name, shape) in [
            ("model.layers.0.mlp.experts.0.up_proj.weight", &[2, 2][..]),
            ("model.layers.0.mlp.experts.0.down_proj.weight", &[2, 2]),
            ("model.layers.0.mlp.experts.1.up_proj.weight", &[2, 2]),
            ("model.layers.1.self_attention.experts.input_linear.weight", &[4, 2, 2]),
            ("model.layers.1.self_attention.experts.bias", &[2]),
            ("model.layers.1.mlp.output_linear.weight", &[3, 2, 2]),
        ] {
            tally.add_experts(name, shape, shape.iter().product::<usize>() as u64);
        }
        let found: Vec<(&str, &str, u64, u64)> = tally
            .expert_blocks
            .iter()
            .map(|((layer, part), block)| (layer.as_str(), part.as_str(), block.num_experts, block.num_parameters))
            .collect();
        assert_eq!(
            found,
            [
                ("model.layers.0", "mlp", 2, 12),
                ("model.layers.1", "mlp", 3, 12),
                ("model.layers.1", "self_attention", 4, 16)
            ]
        );
        assert_eq!((tally.num_moe_layers(), layer_number("language_model.model.layers.12")), (2, Some(12)));
    }
}
