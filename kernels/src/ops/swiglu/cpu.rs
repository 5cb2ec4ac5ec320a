//! `swiglu` row by row in 16 lanes.

use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, silu_mul};
use crate::memory::Disjoint;
use crate::pool;

/// An exponential and a division cost about as much as this many additions.
const ELEMENT_WORK: usize = 4;

pub(crate) fn swiglu(gate_up: &[f32], intermediate: usize) -> Vec<f32> {
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
        dispatch::run(SiluMul { gate, up, out });
    });
    out
}

/// `out = silu(gate) * up`
pub(crate) struct SiluMul<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        silu_mul(lanes, self.gate, self.up, self.out);
    }
}
