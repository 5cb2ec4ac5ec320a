//! Ops over rows of activations: norm, rotary embedding, router.

use std::hint::black_box;

use candle_core::Tensor;

use super::models::{MODELS, Model, NUM_TOKENS};
use super::session::{Session, Work};
use crate::error::Result;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::{RopeStyle, RopeTable, rope};
use crate::ops::route::{RouterSpec, Scoring, route};

pub(super) const RMS_NORM: &str = "rms_norm";
pub(super) const ROPE: &str = "rope";
pub(super) const ROUTE: &str = "route";

pub(super) fn measure(session: &mut Session<'_>) -> Result<()> {
    if ![RMS_NORM, ROPE, ROUTE].iter().any(|op| session.wants(op)) {
        return Ok(());
    }
    session.begin("activations")?;
    let num_bytes = session.num_copies("activations", size_of::<f32>()).unwrap_or(0) * size_of::<f32>();
    let values = session.floats(&[num_bytes / size_of::<f32>()])?;
    let inputs = Inputs { activations: values.to_dtype(session.activation_dtype())?, values };
    for model in MODELS {
        for (op, measure) in [(RMS_NORM, measure_norm as Measure), (ROPE, measure_rope), (ROUTE, measure_route)] {
            if session.wants(op) {
                session.begin(&format!("{op} {}", model.name))?;
                NUM_TOKENS.iter().try_for_each(|&num_tokens| measure(session, &inputs, model, num_tokens))?;
            }
        }
    }
    Ok(())
}

type Measure = fn(&mut Session<'_>, &Inputs, &Model, usize) -> Result<()>;

/// More activations than a cache holds.
struct Inputs {
    activations: Tensor,
    /// The same in f32.
    values: Tensor,
}

/// Those of one call; the next call has others.
fn part(values: &Tensor, call: usize, dims: &[usize]) -> Result<Tensor> {
    let len: usize = dims.iter().product();
    let start = call % (values.elem_count() / len) * len;
    Ok(values.narrow(0, start, len)?.reshape(dims)?)
}

fn measure_norm(session: &mut Session<'_>, inputs: &Inputs, model: &Model, num_tokens: usize) -> Result<()> {
    let size = model.hidden_size;
    let weight = session.floats(&[size])?;
    let work = Work {
        op: RMS_NORM,
        shape: format!("{} {size}", model.name),
        format: session.activation_dtype().as_str(),
        num_tokens,
        bytes: session.activation_dtype().size_in_bytes() * num_tokens * size,
        multiplications: num_tokens * 3 * size,
        units: &[],
    };
    session.time(work, |call| {
        black_box(rms_norm(&part(&inputs.activations, call, &[num_tokens, size])?, &weight, 1e-6)?);
        Ok(())
    })
}

fn measure_rope(session: &mut Session<'_>, inputs: &Inputs, model: &Model, num_tokens: usize) -> Result<()> {
    const POSITIONS: usize = 4096;
    let Model { num_heads, head_dim, .. } = *model;
    let angles = |turn: fn(f32) -> f32| (0..POSITIONS * head_dim / 2).map(|i| turn(i as f32)).collect::<Vec<_>>();
    let table = RopeTable::new(angles(f32::cos), angles(f32::sin), head_dim)?;
    let size = num_heads * head_dim;
    let work = Work {
        op: ROPE,
        shape: format!("{} {num_heads}x{head_dim}", model.name),
        format: session.activation_dtype().as_str(),
        num_tokens,
        bytes: session.activation_dtype().size_in_bytes() * num_tokens * size,
        multiplications: num_tokens * 2 * size,
        units: &[],
    };
    session.time(work, |call| {
        let x = part(&inputs.activations, call, &[num_tokens, num_heads, head_dim])?;
        let positions: Vec<u32> = (0..num_tokens).map(|token| ((call + token) % POSITIONS) as u32).collect();
        black_box(rope(&x, &table, &positions, RopeStyle::Halves)?);
        Ok(())
    })
}

fn measure_route(session: &mut Session<'_>, inputs: &Inputs, model: &Model, num_tokens: usize) -> Result<()> {
    let Model { num_experts, top_k, .. } = *model;
    let spec = RouterSpec::new(Scoring::SoftmaxTopK, top_k);
    let work = Work {
        op: ROUTE,
        shape: format!("{} {top_k} of {num_experts}", model.name),
        format: "f32",
        num_tokens,
        bytes: 4 * num_tokens * num_experts,
        multiplications: 0,
        units: &[],
    };
    session.time(work, |call| {
        black_box(route(&part(&inputs.values, call, &[num_tokens, num_experts])?, &spec)?);
        Ok(())
    })
}
