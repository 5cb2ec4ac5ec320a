//! `glu` row by row: SiLU in 16 lanes, the rarer activations element by element.

use super::GluActivation;
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, silu_mul};
use crate::memory::Disjoint;
use crate::pool;

/// An exponential and a division cost about as much as this many additions.
const ELEMENT_WORK: usize = 4;

pub(crate) fn glu(gate_up: &[f32], intermediate: usize, activation: GluActivation) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    if out.is_empty() {
        return out;
    }
    let num_tokens = out.len() / intermediate;
    let num_elements = out.len();
    let target = Disjoint::new(&mut out);
    pool::parallel_if(ELEMENT_WORK * num_elements, num_tokens, |row| {
        let (gate, up) = gate_up[2 * row * intermediate..2 * (row + 1) * intermediate].split_at(intermediate);
        // SAFETY: each row is a task.
        let out = unsafe { target.part(row * intermediate, intermediate) };
        activate(activation, (gate, up), out);
    });
    out
}

/// `out = act(gate, up)`, element by element. Panics if the lengths differ.
pub(crate) fn activate(activation: GluActivation, (gate, up): (&[f32], &[f32]), out: &mut [f32]) {
    match activation {
        GluActivation::Silu => dispatch::run(SiluMul { gate, up, out }),
        GluActivation::Pointwise(function) => map(gate, up, out, |gate, up| function.apply(gate) * up),
        GluActivation::ClampedSwish { alpha, limit } => {
            map(gate, up, out, |gate, up| {
                // Not `min`, which would swallow a NaN.
                let (gate, up) = (if gate > limit { limit } else { gate }, up.clamp(-limit, limit));
                gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
            });
        }
    }
}

fn map(gate: &[f32], up: &[f32], out: &mut [f32], act: impl Fn(f32, f32) -> f32) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "rows of one length");
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = act(gate, up);
    }
}

/// `out = silu(gate) * up`
struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        silu_mul(lanes, self.gate, self.up, self.out);
    }
}
