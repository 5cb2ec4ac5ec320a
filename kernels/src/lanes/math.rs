//! Functions over slices of f32 in 16 lanes: fixed order from the first element, tails padded.

use super::{Lanes, load_tail, store_tail};

/// `e^x` to about 1 ulp (Cephes' polynomial). Clamped to -87..=88, so never subnormal, zero or infinite; NaN stays.
#[inline(always)]
fn exp<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let x = lanes.max(lanes.splat(-87.0), lanes.min(lanes.splat(88.0), x));
    let n = lanes.round(lanes.mul(x, lanes.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first exact in the products.
    let r = lanes.fma(n, lanes.splat(-0.693_359_4), x);
    let r = lanes.fma(n, lanes.splat(2.121_944_4e-4), r);
    let mut p = lanes.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = lanes.fma(p, r, lanes.splat(coefficient));
    }
    let p = lanes.fma(lanes.mul(r, r), p, r);
    lanes.scale_by_power(lanes.add(p, lanes.splat(1.0)), n)
}

/// The largest value that is not NaN; -inf if there is none.
#[inline(always)]
pub(crate) fn max<L: Lanes>(lanes: L, values: &[f32]) -> f32 {
    let (chunks, tail) = values.as_chunks();
    let mut best = lanes.splat(f32::NEG_INFINITY);
    for chunk in chunks {
        best = lanes.max(lanes.load(chunk), best);
    }
    let mut candidates = [0.0; super::WIDTH];
    lanes.store(best, &mut candidates);
    candidates.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each value by `e^(value - max)` and returns the sum of these.
#[inline(always)]
pub(crate) fn exp_sum<L: Lanes>(lanes: L, values: &mut [f32], max: f32) -> f32 {
    let max = lanes.splat(max);
    let mut sum = lanes.splat(0.0);
    let (chunks, tail) = values.as_chunks_mut();
    for chunk in chunks {
        let v = exp(lanes, lanes.sub(lanes.load(chunk), max));
        lanes.store(v, chunk);
        sum = lanes.add(sum, v);
    }
    if !tail.is_empty() {
        let v = exp(lanes, lanes.sub(load_tail(lanes, tail), max));
        store_tail(lanes, v, tail);
        sum = lanes.add(sum, load_tail(lanes, tail));
    }
    lanes.sum(sum)
}

/// Replaces each value by `e^((value - max) * factor)`.
#[inline(always)]
pub(crate) fn exp_scaled<L: Lanes>(lanes: L, values: &mut [f32], max: f32, factor: f32) {
    // No closure: what is not inlined does not have the instructions of its caller.
    let (max, factor) = (lanes.splat(max), lanes.splat(factor));
    let (chunks, tail) = values.as_chunks_mut();
    for chunk in chunks {
        let v = exp(lanes, lanes.mul(lanes.sub(lanes.load(chunk), max), factor));
        lanes.store(v, chunk);
    }
    if !tail.is_empty() {
        let v = exp(lanes, lanes.mul(lanes.sub(load_tail(lanes, tail), max), factor));
        store_tail(lanes, v, tail);
    }
}

/// Softmax in place.
#[inline(always)]
pub(crate) fn softmax<L: Lanes>(lanes: L, values: &mut [f32]) {
    let max = max(lanes, values);
    let sum = exp_sum(lanes, values, max);
    values.iter_mut().for_each(|value| *value /= sum);
}

/// `Σ x²`
#[inline(always)]
pub(crate) fn sum_of_squares<L: Lanes>(lanes: L, values: &[f32]) -> f32 {
    let (chunks, tail) = values.as_chunks();
    let mut sum = lanes.splat(0.0);
    for chunk in chunks {
        let v = lanes.load(chunk);
        sum = lanes.fma(v, v, sum);
    }
    let v = load_tail(lanes, tail);
    lanes.sum(lanes.fma(v, v, sum))
}

/// `out = silu(gate) * up`, element by element. Panics if the lengths differ.
#[inline(always)]
pub(crate) fn silu_mul<L: Lanes>(lanes: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "rows of one length");
    let (gate_chunks, gate_tail) = gate.as_chunks();
    let (up_chunks, up_tail) = up.as_chunks();
    let (out_chunks, out_tail) = out.as_chunks_mut();
    for ((gate, up), out) in gate_chunks.iter().zip(up_chunks).zip(out_chunks) {
        let v = silu(lanes, lanes.load(gate));
        lanes.store(lanes.mul(v, lanes.load(up)), out);
    }
    if !out_tail.is_empty() {
        let v = silu(lanes, load_tail(lanes, gate_tail));
        store_tail(lanes, lanes.mul(v, load_tail(lanes, up_tail)), out_tail);
    }
}

#[inline(always)]
fn silu<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let one = lanes.splat(1.0);
    let negated = lanes.sub(lanes.splat(0.0), x);
    lanes.div(x, lanes.add(one, exp(lanes, negated)))
}
