//! Golden models as GGUF files, with the names, keys and layouts that llama.cpp's `convert_hf_to_gguf.py` gives them.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::checkpoint_edit::{Edit, Stored};
use crate::gguf_fixture::GgufBuilder;

const F32: u32 = 0;
const BF16: u32 = 30;
pub const Q8_0: u32 = 8;
const MXFP4: u32 = 39;

/// Choices that llama.cpp's converter and its users have.
#[derive(Clone, Copy, Default)]
pub struct Form {
    /// Queries, keys and values in one tensor, gate and up of the experts in one.
    pub fused: bool,
    /// `attn_kv_b` in one, and the keys of the time before it was split.
    pub joint_kv_b: bool,
    /// Matrices whose rows blocks of 32 divide.
    pub q8_0: bool,
}

/// A tensor on its way into the file, in f32 unless it is MXFP4.
#[derive(Clone)]
struct Matrix {
    shape: Vec<usize>,
    values: Vec<f32>,
    dtype: Dtype,
}

struct Writer<'a> {
    edit: &'a Edit,
    form: Form,
    arch: &'static str,
    /// By name, in no order that matters.
    tensors: BTreeMap<String, (Vec<u64>, u32, Vec<u8>)>,
}

/// Name, shape, ggml type and bytes of every tensor.
pub type Tensors = BTreeMap<String, (Vec<u64>, u32, Vec<u8>)>;

/// The tensors of the model as the file has them.
pub fn tensors(edit: &Edit, form: Form) -> Tensors {
    let mut writer = Writer { edit, form, arch: arch(edit), tensors: BTreeMap::new() };
    writer.add("token_embd.weight", writer.get("model.embed_tokens.weight"));
    writer.add("output_norm.weight", writer.get("model.norm.weight"));
    if edit.tensors.contains_key("lm_head.weight") {
        writer.add("output.weight", writer.get("lm_head.weight"));
    }
    for layer in 0..size(edit, "num_hidden_layers") {
        writer.attention(layer);
        writer.feed_forward(layer);
    }
    writer.tensors
}

/// The file, without a tokenizer.
pub fn file(edit: &Edit, form: Form) -> GgufBuilder {
    tensors(edit, form).into_iter().fold(metadata(edit, form), |file, (name, (shape, ggml_type, bytes))| {
        file.tensor(&name, &shape, ggml_type, bytes)
    })
}

pub fn arch(edit: &Edit) -> &'static str {
    match edit.config["model_type"].as_str().expect("a model type") {
        "mixtral" => "llama",
        "qwen2_moe" => "qwen2moe",
        "qwen3_moe" => "qwen3moe",
        "olmoe" => "olmoe",
        "granitemoe" | "granitemoeshared" => "granitemoe",
        "deepseek_v2" | "deepseek_v3" | "kimi_k2" => "deepseek2",
        "gpt_oss" => "gpt-oss",
        other => panic!("{other} has no GGUF layout here"),
    }
}

fn size(edit: &Edit, key: &str) -> usize {
    edit.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
}

fn head_dim(edit: &Edit) -> usize {
    edit.config["head_dim"]
        .as_u64()
        .map_or(size(edit, "hidden_size") / size(edit, "num_attention_heads"), |dim| dim as usize)
}

/// Keys of every architecture, then those of one.
pub fn metadata(edit: &Edit, form: Form) -> GgufBuilder {
    let (config, arch) = (&edit.config, arch(edit));
    let key = |name: &str| format!("{arch}.{name}");
    let mut file = GgufBuilder::default()
        .string("general.architecture", arch)
        .u32(&key("block_count"), size(edit, "num_hidden_layers") as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), config["rms_norm_eps"].as_f64().expect("a number") as f32)
        .u32("tokenizer.ggml.eos_token_id", 2);
    let counts = [
        ("max_position_embeddings", "context_length"),
        ("hidden_size", "embedding_length"),
        ("intermediate_size", "feed_forward_length"),
        ("num_attention_heads", "attention.head_count"),
        ("num_local_experts", "expert_count"),
        ("num_experts", "expert_count"),
        ("n_routed_experts", "expert_count"),
        ("num_experts_per_tok", "expert_used_count"),
        ("n_group", "expert_group_count"),
        ("topk_group", "expert_group_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ("shared_intermediate_size", "expert_shared_feed_forward_length"),
        ("n_shared_experts", "expert_shared_count"),
        ("first_k_dense_replace", "leading_dense_block_count"),
        ("kv_lora_rank", "attention.kv_lora_rank"),
        ("q_lora_rank", "attention.q_lora_rank"),
        ("sliding_window", "attention.sliding_window"),
    ];
    for (hf_key, name) in counts {
        if let Some(count) = config[hf_key].as_u64().filter(|_| hf_key != "sliding_window" || arch == "gpt-oss") {
            file = file.u32(&key(name), count as u32);
        }
    }
    let floats = [
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
        ("routed_scaling_factor", "expert_weights_scale"),
        ("rope_theta", "rope.freq_base"),
    ];
    for (hf_key, name) in floats {
        if let Some(number) = config[hf_key].as_f64() {
            file = file.f32(&key(name), number as f32);
        }
    }
    file = yarn(edit, file);
    if arch == "deepseek2" { deepseek_keys(edit, form, file) } else { plain_keys(edit, file) }
}

fn plain_keys(edit: &Edit, file: GgufBuilder) -> GgufBuilder {
    let arch = arch(edit);
    let file = file.u32(&format!("{arch}.attention.head_count_kv"), size(edit, "num_key_value_heads") as u32);
    match edit.config["head_dim"].as_u64() {
        Some(dim) => file
            .u32(&format!("{arch}.attention.key_length"), dim as u32)
            .u32(&format!("{arch}.attention.value_length"), dim as u32),
        None => file.u32(&format!("{arch}.rope.dimension_count"), head_dim(edit) as u32),
    }
}

fn deepseek_keys(edit: &Edit, form: Form, file: GgufBuilder) -> GgufBuilder {
    let key = |name: &str| format!("deepseek2.{name}");
    let [latent, nope, rotary, value] =
        ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|key| size(edit, key) as u32);
    let file = file.u32(&key("rope.dimension_count"), rotary);
    let file = match form.joint_kv_b {
        true => file
            .u32(&key("attention.key_length"), nope + rotary)
            .u32(&key("attention.value_length"), value)
            .u32(&key("attention.head_count_kv"), size(edit, "num_attention_heads") as u32),
        false => file
            .u32(&key("attention.key_length"), latent + rotary)
            .u32(&key("attention.value_length"), latent)
            .u32(&key("attention.key_length_mla"), nope + rotary)
            .u32(&key("attention.value_length_mla"), value)
            .u32(&key("attention.head_count_kv"), 1),
    };
    let gating = if edit.config["scoring_func"] == "sigmoid" { 2 } else { 1 };
    let file = file.u32(&key("expert_gating_func"), gating);
    match edit.config["norm_topk_prob"] == true {
        true => file.raw(&key("expert_weights_norm"), 7, &[1]),
        false => file,
    }
}

fn yarn(edit: &Edit, file: GgufBuilder) -> GgufBuilder {
    let scaling = &edit.config["rope_scaling"];
    if scaling["type"].as_str().or(scaling["rope_type"].as_str()) != Some("yarn") {
        return file;
    }
    let key = |name: &str| format!("{}.rope.scaling.{name}", arch(edit));
    let original = scaling["original_max_position_embeddings"].as_u64().expect("a count") as u32;
    let mut file = file.string(&key("type"), "yarn").u32(&key("original_context_length"), original);
    for (hf_key, name) in [
        ("factor", "factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
        ("attention_factor", "yarn_attn_factor"),
    ] {
        if let Some(number) = scaling[hf_key].as_f64() {
            file = file.f32(&key(name), number as f32);
        }
    }
    match scaling["mscale_all_dim"].as_f64() {
        Some(mscale) => file.f32(&key("yarn_log_multiplier"), (0.1 * mscale) as f32),
        None => file,
    }
}

impl Writer<'_> {
    fn get(&self, name: &str) -> Matrix {
        Matrix::of(self.edit.tensors.get(name).unwrap_or_else(|| panic!("{name}")))
    }

    fn has(&self, name: &str) -> bool {
        self.edit.tensors.contains_key(name)
    }

    fn add(&mut self, name: &str, matrix: Matrix) {
        let shape = matrix.shape.iter().map(|&size| size as u64).collect();
        let row_len = *matrix.shape.last().expect("a dimension");
        // Vectors and routers are always kept in f32.
        let is_plain = matrix.shape.len() < 2 || name.contains("ffn_gate_inp") || name.ends_with(".bias");
        let is_cut = name.contains("attn_k_b") || !row_len.is_multiple_of(32);
        let (ggml_type, bytes) = match matrix.dtype {
            _ if !is_plain && !is_cut && self.form.q8_0 => (Q8_0, q8_0(&matrix.values)),
            Dtype::BF16 if !is_plain => (
                BF16,
                matrix.values.iter().flat_map(|v| [(v.to_bits() >> 16) as u8, (v.to_bits() >> 24) as u8]).collect(),
            ),
            _ => (F32, matrix.values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        };
        assert!(self.tensors.insert(name.to_owned(), (shape, ggml_type, bytes)).is_none(), "{name} twice");
    }

    fn attention(&mut self, layer: usize) {
        let (hf, blk) = (format!("model.layers.{layer}"), format!("blk.{layer}"));
        let post = if self.arch == "gpt-oss" { "post_attention_norm" } else { "ffn_norm" };
        self.add(&format!("{blk}.attn_norm.weight"), self.get(&format!("{hf}.input_layernorm.weight")));
        self.add(&format!("{blk}.{post}.weight"), self.get(&format!("{hf}.post_attention_layernorm.weight")));
        let attention = format!("{hf}.self_attn");
        if self.has(&format!("{attention}.sinks")) {
            self.add(&format!("{blk}.attn_sinks.weight"), self.get(&format!("{attention}.sinks")));
        }
        for (hf_part, part) in [
            ("o_proj", "attn_output"),
            ("q_norm", "attn_q_norm"),
            ("k_norm", "attn_k_norm"),
            ("q_a_proj", "attn_q_a"),
            ("q_a_layernorm", "attn_q_a_norm"),
            ("q_b_proj", "attn_q_b"),
            ("kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            ("kv_a_layernorm", "attn_kv_a_norm"),
        ] {
            self.both(&format!("{attention}.{hf_part}"), &format!("{blk}.{part}"));
        }
        if self.has(&format!("{attention}.kv_b_proj.weight")) {
            self.both(&format!("{attention}.q_proj"), &format!("{blk}.attn_q"));
            return self.kv_b(&attention, &blk);
        }
        for ending in ["weight", "bias"] {
            if !self.has(&format!("{attention}.q_proj.{ending}")) {
                continue;
            }
            let part = |name: &str| self.get(&format!("{attention}.{name}_proj.{ending}"));
            let q = self.permuted(part("q"), size(self.edit, "num_attention_heads"));
            let k = self.permuted(part("k"), size(self.edit, "num_key_value_heads"));
            let v = part("v");
            if self.form.fused {
                self.add(&format!("{blk}.attn_qkv.{ending}"), Matrix::below(&[q, k, v], 0));
            } else {
                for (name, matrix) in [("q", q), ("k", k), ("v", v)] {
                    self.add(&format!("{blk}.attn_{name}.{ending}"), matrix);
                }
            }
        }
    }

    /// Weight and bias, where they are there.
    fn both(&mut self, hf_stem: &str, stem: &str) {
        for ending in ["weight", "bias"] {
            if self.has(&format!("{hf_stem}.{ending}")) {
                self.add(&format!("{stem}.{ending}"), self.get(&format!("{hf_stem}.{ending}")));
            }
        }
    }

    fn kv_b(&mut self, attention: &str, blk: &str) {
        let joint = self.get(&format!("{attention}.kv_b_proj.weight"));
        if self.form.joint_kv_b {
            return self.add(&format!("{blk}.attn_kv_b.weight"), joint);
        }
        let [heads, latent, nope, value] =
            ["num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"].map(|key| size(self.edit, key));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in joint.values.chunks_exact((nope + value) * latent) {
            for column in 0..latent {
                keys.extend((0..nope).map(|row| head[row * latent + column]));
            }
            values.extend_from_slice(&head[nope * latent..]);
        }
        let dtype = joint.dtype;
        self.add(&format!("{blk}.attn_k_b.weight"), Matrix { shape: vec![heads, latent, nope], values: keys, dtype });
        self.add(&format!("{blk}.attn_v_b.weight"), Matrix { shape: vec![heads, value, latent], values, dtype });
    }

    /// llama.cpp rotates neighbours: rows `(half, i)` of each head become `(i, half)`.
    fn permuted(&self, matrix: Matrix, num_heads: usize) -> Matrix {
        if !matches!(self.arch, "llama" | "granitemoe") {
            return matrix;
        }
        let row_len = matrix.shape.get(1).copied().unwrap_or(1);
        let half = matrix.shape[0] / num_heads / 2;
        let row = |head: usize, part: usize, idx: usize| {
            let row = (head * 2 + part) * half + idx;
            matrix.values[row * row_len..(row + 1) * row_len].iter().copied()
        };
        let values = (0..num_heads)
            .flat_map(|head| (0..half).flat_map(move |idx| [(head, 0, idx), (head, 1, idx)]))
            .flat_map(|(head, part, idx)| row(head, part, idx))
            .collect();
        Matrix { values, ..matrix }
    }

    fn feed_forward(&mut self, layer: usize) {
        let (hf, blk) = (format!("model.layers.{layer}"), format!("blk.{layer}"));
        if self.has(&format!("{hf}.mlp.up_proj.weight")) {
            for part in ["gate", "up", "down"] {
                self.both(&format!("{hf}.mlp.{part}_proj"), &format!("{blk}.ffn_{part}"));
            }
            return;
        }
        for router in ["mlp.gate", "mlp.router", "block_sparse_moe.gate", "block_sparse_moe.router.layer"] {
            self.both(&format!("{hf}.{router}"), &format!("{blk}.ffn_gate_inp"));
        }
        let choice_bias = format!("{hf}.mlp.gate.e_score_correction_bias");
        if self.has(&choice_bias) {
            self.add(&format!("{blk}.exp_probs_b.bias"), self.get(&choice_bias));
        }
        let gate = format!("{hf}.mlp.shared_expert_gate.weight");
        if self.has(&gate) {
            let row = self.get(&gate);
            self.add(&format!("{blk}.ffn_gate_inp_shexp.weight"), Matrix { shape: vec![row.values.len()], ..row });
        }
        for (shared, part) in ["mlp.shared_expert", "mlp.shared_experts"]
            .iter()
            .flat_map(|shared| ["gate", "up", "down"].map(|part| (shared, part)))
        {
            self.both(&format!("{hf}.{shared}.{part}_proj"), &format!("{blk}.ffn_{part}_shexp"));
        }
        if self.has(&format!("{hf}.shared_mlp.input_linear.weight")) {
            let [gate, up] = self.get(&format!("{hf}.shared_mlp.input_linear.weight")).halves(0);
            self.add(&format!("{blk}.ffn_gate_shexp.weight"), gate);
            self.add(&format!("{blk}.ffn_up_shexp.weight"), up);
            self.both(&format!("{hf}.shared_mlp.output_linear"), &format!("{blk}.ffn_down_shexp"));
        }
        match self.arch {
            "gpt-oss" => self.interleaved_experts(&format!("{hf}.mlp.experts"), &blk),
            _ => self.experts(&hf, &blk),
        }
    }

    fn experts(&mut self, hf: &str, blk: &str) {
        let [gate, up, down] = match self.arch {
            "granitemoe" => {
                let [gate, up] = self.get(&format!("{hf}.block_sparse_moe.input_linear.weight")).halves(1);
                [gate, up, self.get(&format!("{hf}.block_sparse_moe.output_linear.weight"))]
            }
            "llama" => ["w1", "w3", "w2"].map(|part| self.stack(&format!("{hf}.block_sparse_moe.experts"), part)),
            _ => ["gate_proj", "up_proj", "down_proj"].map(|part| self.stack(&format!("{hf}.mlp.experts"), part)),
        };
        if self.form.fused {
            self.add(&format!("{blk}.ffn_gate_up_exps.weight"), Matrix::below(&[gate, up], 1));
        } else {
            self.add(&format!("{blk}.ffn_gate_exps.weight"), gate);
            self.add(&format!("{blk}.ffn_up_exps.weight"), up);
        }
        self.add(&format!("{blk}.ffn_down_exps.weight"), down);
    }

    fn stack(&self, experts: &str, part: &str) -> Matrix {
        let matrices = (0..).map(|idx| format!("{experts}.{idx}.{part}.weight")).take_while(|name| self.has(name));
        let matrices: Vec<Matrix> = matrices.map(|name| self.get(&name)).collect();
        let shape = [&[matrices.len()], matrices[0].shape.as_slice()].concat();
        let dtype = matrices[0].dtype;
        Matrix { shape, values: matrices.into_iter().flat_map(|matrix| matrix.values).collect(), dtype }
    }

    /// gpt-oss stores the rows of gate and up in turn.
    fn interleaved_experts(&mut self, experts: &str, blk: &str) {
        for (part, rows) in [("gate", 0), ("up", 1)] {
            let bias = self.get(&format!("{experts}.gate_up_proj_bias")).every_other(rows, 1);
            self.add(&format!("{blk}.ffn_{part}_exps.bias"), bias);
            self.mxfp4(&format!("{experts}.gate_up_proj"), &format!("{blk}.ffn_{part}_exps.weight"), (rows, 2));
        }
        self.add(&format!("{blk}.ffn_down_exps.bias"), self.get(&format!("{experts}.down_proj_bias")));
        self.mxfp4(&format!("{experts}.down_proj"), &format!("{blk}.ffn_down_exps.weight"), (0, 1));
    }

    /// Every `step`-th row from `first` on, each block as its scale and the nibbles of elements `(i, i + 16)`.
    fn mxfp4(&mut self, hf_stem: &str, name: &str, (first, step): (usize, usize)) {
        let (blocks, scales) =
            (&self.edit.tensors[&format!("{hf_stem}_blocks")], &self.edit.tensors[&format!("{hf_stem}_scales")]);
        let [experts, rows, row_blocks, 16] = blocks.shape[..] else { panic!("{:?}", blocks.shape) };
        let mut bytes = Vec::new();
        for row in (0..experts * rows).skip(first).step_by(step) {
            for block in row * row_blocks..(row + 1) * row_blocks {
                bytes.push(scales.bytes[block]);
                let packed = &blocks.bytes[16 * block..16 * (block + 1)];
                let code = |idx: usize| packed[idx / 2] >> (idx % 2 * 4) & 0x0f;
                bytes.extend((0..16).map(|idx| code(idx) | code(idx + 16) << 4));
            }
        }
        let shape = vec![experts as u64, (rows / step) as u64, 32 * row_blocks as u64];
        assert!(self.tensors.insert(name.to_owned(), (shape, MXFP4, bytes)).is_none(), "{name} twice");
    }
}

impl Matrix {
    fn of(stored: &Stored) -> Self {
        let values = match stored.dtype {
            Dtype::BF16 => stored
                .bytes
                .chunks_exact(2)
                .map(|half| f32::from_bits(u32::from(u16::from_le_bytes([half[0], half[1]])) << 16))
                .collect(),
            _ => stored.to_f32(),
        };
        Self { shape: stored.shape.clone(), values, dtype: stored.dtype }
    }

    /// Parts joined along `axis`.
    fn below(parts: &[Self], axis: usize) -> Self {
        let count: usize = parts[0].shape[..axis].iter().product();
        let mut shape = parts[0].shape.clone();
        shape[axis] = parts.iter().map(|part| part.shape[axis]).sum();
        let chunk = |part: &Self, idx: usize| {
            let len = part.values.len() / count;
            part.values[idx * len..(idx + 1) * len].to_vec()
        };
        let values = (0..count).flat_map(|idx| parts.iter().flat_map(move |part| chunk(part, idx))).collect();
        Self { shape, values, dtype: parts[0].dtype }
    }

    /// Both halves along `axis`.
    fn halves(&self, axis: usize) -> [Self; 2] {
        let len: usize = self.shape[axis..].iter().product();
        let mut shape = self.shape.clone();
        shape[axis] /= 2;
        [0, 1].map(|half| {
            let values = self.values.chunks_exact(len).flat_map(|part| &part[half * len / 2..(half + 1) * len / 2]);
            Self { shape: shape.clone(), values: values.copied().collect(), dtype: self.dtype }
        })
    }

    /// Every other index of `axis`, the last one.
    fn every_other(&self, first: usize, axis: usize) -> Self {
        let mut shape = self.shape.clone();
        shape[axis] /= 2;
        Self { shape, values: self.values.iter().skip(first).step_by(2).copied().collect(), dtype: self.dtype }
    }
}

/// Blocks of 32 under one f16 scale.
fn q8_0(values: &[f32]) -> Vec<u8> {
    let block = |values: &[f32]| {
        let scale = half::f16::from_f32(values.iter().fold(0f32, |max, value| max.max(value.abs())) / 127.0);
        let codes = values.iter().map(|value| (value / scale.to_f32()).round().clamp(-128.0, 127.0) as i8 as u8);
        scale.to_le_bytes().into_iter().chain(codes).collect::<Vec<u8>>()
    };
    values.chunks_exact(32).flat_map(block).collect()
}

/// What a reader makes of [`q8_0`] of the same values.
pub fn through_q8_0(values: &[f32]) -> Vec<f32> {
    let bytes = q8_0(values);
    let block = |block: &[u8]| {
        let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
        block[2..].iter().map(|&code| scale * f32::from(code as i8)).collect::<Vec<f32>>()
    };
    bytes.chunks_exact(34).flat_map(block).collect()
}
