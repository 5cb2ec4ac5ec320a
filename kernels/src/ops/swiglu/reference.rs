//! Oracle of `swiglu`: plain loops in f64.

pub(crate) fn swiglu(gate_up: &[f32], intermediate: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(gate_up.len() / 2);
    for row in gate_up.chunks_exact(2 * intermediate.max(1)) {
        let (gate, up) = row.split_at(intermediate);
        out.extend(gate.iter().zip(up).map(|(&gate, &up)| silu_mul(gate, up)));
    }
    out
}

pub(crate) fn silu_mul(gate: f32, up: f32) -> f32 {
    let (gate, up) = (f64::from(gate), f64::from(up));
    (gate / (1.0 + (-gate).exp()) * up) as f32
}
