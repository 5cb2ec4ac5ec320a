//! `rope` head by head. Elementwise, so the compiler's own vectors give the same bits everywhere.

use super::{Rope, RopeStyle};
use crate::memory::Disjoint;
use crate::pool;

/// Rows of a task.
const TASK_ROWS: usize = 16;

pub(crate) fn rope(op: &Rope<'_>, out: &mut [f32]) {
    let (row_len, num_elements) = (op.num_heads * op.head_dim, out.len());
    if num_elements == 0 {
        return;
    }
    let target = Disjoint::new(out);
    pool::parallel_if(num_elements, op.positions.len().div_ceil(TASK_ROWS), |task_idx| {
        let first = task_idx * TASK_ROWS;
        let positions = &op.positions[first..op.positions.len().min(first + TASK_ROWS)];
        // SAFETY: each row belongs to exactly one task.
        let rows = unsafe { target.part(first * row_len, positions.len() * row_len) };
        for (row, &position) in rows.chunks_exact_mut(row_len).zip(positions) {
            let angles = op.table.angles(position as usize);
            for head in row.chunks_exact_mut(op.head_dim) {
                rotate(&mut head[..op.table.rotary_dim], angles, op.style);
            }
        }
    });
}

fn rotate(head: &mut [f32], (cos, sin): (&[f32], &[f32]), style: RopeStyle) {
    let angles = cos.iter().zip(sin);
    match style {
        RopeStyle::Halves => {
            let (first, second) = head.split_at_mut(cos.len());
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        RopeStyle::Pairs => {
            let (pairs, _) = head.as_chunks_mut();
            for ([a, b], (cos, sin)) in pairs.iter_mut().zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
