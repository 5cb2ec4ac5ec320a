//! Oracle of `glu`: plain loops in f64, the error function by numeric integration.

use super::{GluActivation, Pointwise};

pub(crate) fn glu(gate_up: &[f32], intermediate: usize, activation: GluActivation) -> Vec<f32> {
    let mut out = Vec::with_capacity(gate_up.len() / 2);
    for row in gate_up.chunks_exact(2 * intermediate.max(1)) {
        let (gate, up) = row.split_at(intermediate);
        out.extend(gate.iter().zip(up).map(|(&gate, &up)| act(activation, gate, up)));
    }
    out
}

fn act(activation: GluActivation, gate: f32, up: f32) -> f32 {
    let (g, u) = (f64::from(gate), f64::from(up));
    let out = match activation {
        GluActivation::Pointwise(Pointwise::Sigmoid) => u / (1.0 + (-g).exp()),
        GluActivation::Silu | GluActivation::Pointwise(Pointwise::Silu) => g / (1.0 + (-g).exp()) * u,
        GluActivation::Pointwise(Pointwise::Gelu) => g * normal_cdf(g) * u,
        GluActivation::Pointwise(Pointwise::GeluTanh) => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            g / (1.0 + (-2.0 * inner).exp()) * u
        }
        GluActivation::Pointwise(Pointwise::Relu) => g.max(0.0) * u,
        GluActivation::Pointwise(other) => panic!("no oracle for {other:?}"),
        GluActivation::ClampedSwish { alpha, limit } => {
            let (g, u) = (f64::from(if gate > limit { limit } else { gate }), f64::from(up.clamp(-limit, limit)));
            g / (1.0 + (-f64::from(alpha) * g).exp()) * (u + 1.0)
        }
    };
    out as f32
}

/// Share of the normal distribution below `x`, by Simpson's rule from 0.
fn normal_cdf(x: f64) -> f64 {
    const STEPS: usize = 400;
    let end = x.clamp(-10.0, 10.0);
    let width = end / STEPS as f64;
    let density = |i: usize| (-(i as f64 * width).powi(2) / 2.0).exp();
    let inner: f64 = (1..STEPS).map(|i| density(i) * if i.is_multiple_of(2) { 2.0 } else { 4.0 }).sum();
    0.5 + (density(0) + inner + density(STEPS)) * width / 3.0 / (2.0 * std::f64::consts::PI).sqrt()
}
