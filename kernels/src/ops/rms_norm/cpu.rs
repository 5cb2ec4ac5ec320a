//! `rms_norm` row by row in 16 lanes.

use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, sum_of_squares};
use crate::memory::Disjoint;
use crate::pool;

/// Rows of a task.
const TASK_ROWS: usize = 16;

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    if dim == 0 {
        return;
    }
    let target = Disjoint::new(out);
    pool::parallel_if(x.len(), x.len().div_ceil(TASK_ROWS * dim), |task_idx| {
        let x = &x[task_idx * TASK_ROWS * dim..x.len().min((task_idx + 1) * TASK_ROWS * dim)];
        // SAFETY: each row belongs to exactly one task.
        let out = unsafe { target.part(task_idx * TASK_ROWS * dim, x.len()) };
        dispatch::run(Rows { x, weight, eps, out });
    });
}

struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let dim = self.weight.len();
        for (x, out) in self.x.chunks_exact(dim).zip(self.out.chunks_exact_mut(dim)) {
            let scale = 1.0 / (sum_of_squares(lanes, x) / dim as f32 + self.eps).sqrt();
            for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(self.weight)) {
                *out = x * scale * weight;
            }
        }
    }
}
