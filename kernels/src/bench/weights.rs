//! Ops that stream weights: each call takes other ones, so that they come from memory as in a model.

use std::hint::black_box;

use candle_core::Device;

use super::MatrixUnit;
use super::models::{DEEPSEEK_V2_LITE, GRANITE_1B, MODELS, Model, NUM_TOKENS};
use super::session::{Session, Work, numbers};
use crate::error::Result;
use crate::ops::embedding::embedding;
use crate::ops::grouped_swiglu::{Expert, ExpertWeights, Experts, grouped_swiglu};
use crate::ops::head_linear::head_linear;
use crate::ops::linear::linear;
use crate::ops::route::TopK;
use crate::quant::QuantFormat;
use crate::weight::{PackedWeight, WeightFormat};

pub(super) const LINEAR: &str = "linear";
pub(super) const HEAD_LINEAR: &str = "head_linear";
pub(super) const GROUPED_SWIGLU: &str = "grouped_swiglu";
pub(super) const EMBEDDING: &str = "embedding";

const FORMATS: [WeightFormat; 4] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::Quantized(QuantFormat::INT8),
    WeightFormat::Quantized(QuantFormat::INT4),
];

pub(super) fn measure(session: &mut Session<'_>) -> Result<()> {
    for format in FORMATS {
        if session.wants(LINEAR) {
            for model in MODELS {
                let (size, layer) =
                    (model.hidden_size, Linear { model: model.name, part: "o_proj", num_tokens: &NUM_TOKENS });
                layer.measure(session, format, [size, size])?;
            }
            let head = Linear { model: GRANITE_1B.name, part: "lm_head", num_tokens: &[1, 32] };
            head.measure(session, format, [GRANITE_1B.vocab_size, GRANITE_1B.hidden_size])?;
        }
    }
    for format in FORMATS {
        if session.wants(HEAD_LINEAR) {
            measure_heads(session, format)?;
        }
    }
    for model in MODELS {
        for format in FORMATS {
            if session.wants(GROUPED_SWIGLU) {
                measure_experts(session, model, format)?;
            }
        }
    }
    for format in FORMATS {
        if session.wants(EMBEDDING) {
            measure_embedding(session, format)?;
        }
    }
    Ok(())
}

/// Units that could multiply with weights of a format at its precision.
fn units(format: WeightFormat) -> &'static [MatrixUnit] {
    match format {
        WeightFormat::F32 | WeightFormat::F16 => &[],
        WeightFormat::Bf16 => &[MatrixUnit::VectorBf16, MatrixUnit::TileBf16, MatrixUnit::TensorBf16],
        WeightFormat::Quantized(_) => &[MatrixUnit::VectorInt8, MatrixUnit::TileInt8, MatrixUnit::TensorInt8],
    }
}

/// A weight, and its bytes again in other memory.
fn copies(
    device: &Device,
    format: WeightFormat,
    [rows, cols]: [usize; 2],
    num_copies: usize,
) -> Result<Vec<PackedWeight>> {
    let first = PackedWeight::from_f32(format, rows, cols, &numbers(rows * cols))?;
    let copy = |_| PackedWeight::from_bytes(format, rows, cols, first.as_bytes())?.to_device(device);
    (0..num_copies).map(copy).collect()
}

struct Linear {
    model: &'static str,
    part: &'static str,
    num_tokens: &'static [usize],
}

impl Linear {
    fn measure(&self, session: &mut Session<'_>, format: WeightFormat, [rows, cols]: [usize; 2]) -> Result<()> {
        let shape = format!("{} {} {rows}x{cols}", self.model, self.part);
        let what = format!("{LINEAR} {shape} {}", format.name());
        session.begin(&what)?;
        let weight_bytes = format.bytes_for(rows, cols);
        let Some(num_copies) = session.num_copies(&what, weight_bytes) else { return Ok(()) };
        let weights = copies(session.device(), format, [rows, cols], num_copies)?;
        for &num_tokens in self.num_tokens {
            let x = session.activations(&[num_tokens, cols])?;
            let work = Work {
                op: LINEAR,
                shape: shape.clone(),
                format: format.name(),
                num_tokens,
                bytes: weight_bytes,
                multiplications: num_tokens * rows * cols,
                units: units(format),
            };
            session.time(work, |call| {
                black_box(linear(&x, &weights[call % weights.len()], None)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The absorbed key projection of latent attention.
fn measure_heads(session: &mut Session<'_>, format: WeightFormat) -> Result<()> {
    let (heads, [rows, cols]) = (DEEPSEEK_V2_LITE.num_heads, [DEEPSEEK_V2_LITE.latent_dim, DEEPSEEK_V2_LITE.nope_dim]);
    let shape = format!("{} {heads}x{rows}x{cols}", DEEPSEEK_V2_LITE.name);
    let what = format!("{HEAD_LINEAR} {shape} {}", format.name());
    session.begin(&what)?;
    let layer_bytes = heads * format.bytes_for(rows, cols);
    let Some(num_copies) = session.num_copies(&what, layer_bytes) else { return Ok(()) };
    let weights = copies(session.device(), format, [rows, cols], num_copies * heads)?;
    let layers: Vec<_> = weights.chunks_exact(heads).collect();
    for num_tokens in NUM_TOKENS {
        let x = session.activations(&[num_tokens, heads, cols])?;
        let work = Work {
            op: HEAD_LINEAR,
            shape: shape.clone(),
            format: format.name(),
            num_tokens,
            bytes: layer_bytes,
            multiplications: num_tokens * heads * rows * cols,
            units: units(format),
        };
        session.time(work, |call| {
            black_box(head_linear(&x, layers[call % layers.len()])?);
            Ok(())
        })?;
    }
    Ok(())
}

fn measure_experts(session: &mut Session<'_>, model: &Model, format: WeightFormat) -> Result<()> {
    let Model { name, hidden_size, intermediate, num_experts, top_k, .. } = *model;
    let shape = format!("{name} {hidden_size}x{intermediate}, {top_k} of {num_experts}");
    let what = format!("{GROUPED_SWIGLU} {shape} {}", format.name());
    session.begin(&what)?;
    let expert_bytes = format.bytes_for(2 * intermediate, hidden_size) + format.bytes_for(hidden_size, intermediate);
    let Some(num_layers) = session.num_copies(&what, num_experts * expert_bytes) else { return Ok(()) };
    let gate_ups = copies(session.device(), format, [2 * intermediate, hidden_size], num_layers * num_experts)?;
    let downs = copies(session.device(), format, [hidden_size, intermediate], num_layers * num_experts)?;
    let experts: Vec<_> = gate_ups
        .into_iter()
        .zip(downs)
        .map(|(gate_up, down)| Expert::Glu(ExpertWeights::swiglu(gate_up, down)))
        .collect();
    let layers = experts.chunks_exact(num_experts).map(|of_layer| Experts::new(of_layer.to_vec()));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    for num_tokens in NUM_TOKENS {
        let x = session.activations(&[num_tokens, hidden_size])?;
        // One token takes other experts in each call; what many tokens take hardly changes.
        let choices: Vec<_> = (0..if num_tokens == 1 { 64 } else { 1 })
            .map(|seed| random_experts(num_tokens, num_experts, top_k, seed))
            .collect();
        let in_use = (0..num_experts as u32).filter(|expert| choices[0].experts.contains(expert)).count();
        let work = Work {
            op: GROUPED_SWIGLU,
            shape: shape.clone(),
            format: format.name(),
            num_tokens,
            bytes: in_use * expert_bytes,
            multiplications: num_tokens * top_k * 3 * hidden_size * intermediate,
            units: units(format),
        };
        session.time(work, |call| {
            black_box(grouped_swiglu(&x, &layers[call % layers.len()], &choices[call % choices.len()])?);
            Ok(())
        })?;
    }
    Ok(())
}

/// `k` different experts for each token, all equally likely.
fn random_experts(num_tokens: usize, num_experts: usize, k: usize, seed: u32) -> TopK {
    let mut state = 2 * seed + 1;
    let mut experts = Vec::with_capacity(num_tokens * k);
    for _ in 0..num_tokens {
        let mut left: Vec<u32> = (0..num_experts as u32).collect();
        for _ in 0..k {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            experts.push(left.swap_remove((state >> 8) as usize % left.len()));
        }
    }
    TopK { weights: vec![1.0 / k as f32; experts.len()], experts, k }
}

fn measure_embedding(session: &mut Session<'_>, format: WeightFormat) -> Result<()> {
    let [rows, cols] = [GRANITE_1B.vocab_size, GRANITE_1B.hidden_size];
    let shape = format!("{} {rows}x{cols}", GRANITE_1B.name);
    let what = format!("{EMBEDDING} {shape} {}", format.name());
    session.begin(&what)?;
    let Some(_) = session.num_copies(&what, format.bytes_for(rows, cols)) else { return Ok(()) };
    let table = PackedWeight::from_f32(format, rows, cols, &numbers(rows * cols))?.to_device(session.device())?;
    for num_tokens in NUM_TOKENS {
        let work = Work {
            op: EMBEDDING,
            shape: shape.clone(),
            format: format.name(),
            num_tokens,
            bytes: num_tokens * format.bytes_for(rows, cols) / rows,
            multiplications: 0,
            units: &[],
        };
        session.time(work, |call| {
            // A prime apart: neighbours in the batch are no neighbours in the table.
            let id = |token: usize| ((call * num_tokens + token) * 7919 % rows) as u32;
            let ids: Vec<u32> = (0..num_tokens).map(id).collect();
            black_box(embedding(&ids, &table)?);
            Ok(())
        })?;
    }
    Ok(())
}
