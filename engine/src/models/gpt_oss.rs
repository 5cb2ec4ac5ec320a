//! gpt-oss: attention sinks, alternating windows, clamped and biased experts, stacked in bf16 or MXFP4, or apart.

use std::iter::repeat_n;

use kernels::{
    Expert, ExpertActivation, ExpertBiases, ExpertWeights, GluActivation, PackedWeight, Reach, RouterSpec, Scoring,
};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::linear::{Bias, Linear};
use crate::layers::moe::{self, ExpertShape, MoeParts, Weighting};
use crate::weights::Role;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;
use crate::weights::mxfp4::{self, Mxfp4};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let bias = config.flag_or("attention_bias", true)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        has_sinks: true,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let window = config.window("sliding_window")?;
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let top_k = config.size("num_experts_per_tok")?;
    let activation = ExpertActivation::Gated(GluActivation::ClampedSwish {
        alpha: config.float_or("swiglu_alpha", 1.702)? as f32,
        limit: config.positive_or("swiglu_limit", 7.0)? as f32,
    });
    let mixer = |prefix: &str, idx: usize| {
        let reach = if is_sliding(config, idx)? { window } else { Reach::Full };
        let attention = AttentionConfig { reach, ..attention.clone() };
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention, idx)?))
    };
    let feed_forward = |prefix: &str, _: usize| {
        let gate = format!("{prefix}.mlp.router");
        Ok(FeedForwardParts::moe(MoeParts {
            gate: Linear::load_router(loader, &gate, [shape.num_experts, shape.hidden_size], Bias::Yes)?,
            spec: RouterSpec::new(Scoring::SoftmaxTopK, top_k),
            experts: load_experts(loader, &format!("{prefix}.mlp.experts"), shape, activation)?,
            shared: None,
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// `layer_types`, by default sliding on even layers.
fn is_sliding(config: &ModelConfig, idx: usize) -> Result<bool, EngineError> {
    Ok(match config.layer_type(idx, &["full_attention", "sliding_attention"])? {
        Some(kind) => kind == "sliding_attention",
        None => idx.is_multiple_of(2),
    })
}

fn load_experts(
    loader: &Loader,
    prefix: &str,
    shape: ExpertShape,
    activation: ExpertActivation,
) -> Result<Vec<Expert>, EngineError> {
    if loader.has(&format!("{prefix}.0.gate_proj.weight")) {
        return load_apart(loader, prefix, shape, activation);
    }
    let ExpertShape { num_experts, hidden_size, width } = shape;
    check_blocks(loader, prefix, shape)?;
    let gate_up = Stacked {
        loader,
        name: format!("{prefix}.gate_up_proj"),
        shape: [num_experts, 2 * width, hidden_size],
        // Gate and up alternate.
        stored_row: &|row| if row < width { 2 * row } else { 2 * (row - width) + 1 },
    };
    let down = Stacked {
        loader,
        name: format!("{prefix}.down_proj"),
        shape: [num_experts, hidden_size, width],
        stored_row: &|row| row,
    };
    let gate_up_bias = loader.floats(&format!("{}_bias", gate_up.name), &[num_experts, 2 * width])?;
    let down_bias = loader.floats(&format!("{}_bias", down.name), &[num_experts, hidden_size])?;
    let weights = gate_up.load()?.into_iter().zip(down.load()?);
    let biases = gate_up_bias.chunks_exact(2 * width).zip(down_bias.chunks_exact(hidden_size));
    let expert = |((gate_up, down), (gate_up_bias, down_bias)): (_, (&[f32], &[f32]))| {
        let biases = ExpertBiases { gate_up: gate_first(gate_up_bias), down: down_bias.to_vec() };
        Expert::Glu(ExpertWeights { gate_up, down, biases: Some(biases), activation })
    };
    Ok(weights.zip(biases).map(expert).collect())
}

/// Experts as they are read from GGUF, gate and up already apart: `{prefix}.{idx}.{gate,up,down}_proj.weight` with
/// `{prefix}.{gate,up,down}_proj.bias [E, rows]`.
fn load_apart(
    loader: &Loader,
    prefix: &str,
    shape: ExpertShape,
    activation: ExpertActivation,
) -> Result<Vec<Expert>, EngineError> {
    let ExpertShape { num_experts, hidden_size, width } = shape;
    let bias = |part: &str, rows| loader.floats(&format!("{prefix}.{part}_proj.bias"), &[num_experts, rows]);
    let (gate_bias, up_bias, down_bias) = (bias("gate", width)?, bias("up", width)?, bias("down", hidden_size)?);
    (0..num_experts)
        .map(|idx| {
            let gate_up = ["gate", "up"].map(|part| (format!("{prefix}.{idx}.{part}_proj.weight"), width));
            let of_expert = |rows| idx * rows..(idx + 1) * rows;
            let gate_up_bias = [&gate_bias[of_expert(width)], &up_bias[of_expert(width)]].concat();
            let biases = ExpertBiases { gate_up: gate_up_bias, down: down_bias[of_expert(hidden_size)].to_vec() };
            Ok(Expert::Glu(ExpertWeights {
                gate_up: loader.fused_weight(&gate_up, hidden_size, Role::Expert)?,
                down: loader.expert_weight(&format!("{prefix}.{idx}.down_proj.weight"), hidden_size, width)?,
                biases: Some(biases),
                activation,
            }))
        })
        .collect()
}

/// Refuses MXFP4 of sizes that its blocks do not divide.
fn check_blocks(loader: &Loader, prefix: &str, shape: ExpertShape) -> Result<(), EngineError> {
    let parts = [("gate_up_proj_blocks", shape.hidden_size), ("down_proj_blocks", shape.width)];
    let is_cut =
        |(part, cols): &(&str, usize)| loader.has(&format!("{prefix}.{part}")) && !cols.is_multiple_of(mxfp4::BLOCK);
    match parts.into_iter().find(is_cut) {
        None => Ok(()),
        Some((_, cols)) => {
            let reason = format!("is mxfp4, whose blocks of {} do not divide rows of {cols} values", mxfp4::BLOCK);
            Err(EngineError::Config { key: "quantization_config", reason })
        }
    }
}

/// Gate and up alternating to all of the gate before all of up.
fn gate_first(values: &[f32]) -> Vec<f32> {
    let of = |parity: usize| values.iter().skip(parity).step_by(2).copied();
    of(0).chain(of(1)).collect()
}

/// Experts stacked in one tensor: bf16 as `[experts, in, out]`, MXFP4 as `[experts, out, in]`.
struct Stacked<'a, 'c> {
    loader: &'a Loader<'c>,
    name: String,
    /// `[experts, out, in]`
    shape: [usize; 3],
    /// Which stored row is which row of an expert's matrix.
    stored_row: &'a (dyn Fn(usize) -> usize + Sync),
}

impl Stacked<'_, '_> {
    /// Each expert's matrix `[out, in]`.
    fn load(&self) -> Result<Vec<PackedWeight>, EngineError> {
        let [num_experts, rows, cols] = self.shape;
        let shapes = repeat_n([rows, cols], num_experts);
        let blocks_name = format!("{}_blocks", self.name);
        if !self.loader.has(&blocks_name) {
            let open = || self.loader.borrow_stacked(&self.name, [num_experts, cols, rows]);
            return self.loader.made((&self.name, Role::Expert), shapes, open, |stored, idx| {
                let values = moe::transposed(&stored[idx].to_f32(), rows);
                let whole = PackedWeight::from_f32(stored[idx].format(), rows, cols, &values)?;
                Ok(whole.select_rows(&(0..rows).map(self.stored_row).collect::<Vec<_>>())?)
            });
        }
        let num_blocks = cols / mxfp4::BLOCK;
        let open = || {
            let blocks = self.loader.bytes(&blocks_name, &[num_experts, rows, num_blocks, mxfp4::BLOCK_BYTES])?;
            Ok((blocks, self.loader.bytes(&format!("{}_scales", self.name), &[num_experts, rows, num_blocks])?))
        };
        self.loader.made((&blocks_name, Role::Expert), shapes, open, |(blocks, scales), idx| {
            let per_expert = rows * num_blocks;
            let matrix = Mxfp4 {
                blocks: &blocks[idx * per_expert * mxfp4::BLOCK_BYTES..][..per_expert * mxfp4::BLOCK_BYTES],
                scales: &scales[idx * per_expert..][..per_expert],
                shape: [rows, cols],
            };
            self.loader.mxfp4_weight(&blocks_name, matrix, &|row| (self.stored_row)(row))
        })
    }
}
