//! `linear` in blocks of input rows and weight rows, one task each.

use super::Linear;
use crate::matmul::{Activations, BLOCK_OUTS, BLOCK_ROWS, RowBlock, part, with_blocks};
use crate::memory::Disjoint;
use crate::pool;

pub(crate) fn linear(op: &Linear<'_>, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let (num_tokens, weight) = (op.num_tokens, op.weight);
    let (in_features, out_features) = (weight.cols(), weight.rows());
    let activations = Activations::new(x, in_features, std::iter::once(weight.format()));
    let mut out = vec![0.0; num_tokens * out_features];
    let target = Disjoint::new(&mut out);
    let out_blocks = out_features.div_ceil(BLOCK_OUTS);
    let num_tasks = num_tokens.div_ceil(BLOCK_ROWS) * out_blocks;
    pool::parallel_if(num_tokens * out_features * in_features, num_tasks, |task_idx| {
        // Tasks that follow each other share input rows, so that those stay in the cache.
        let rows = part(task_idx / out_blocks, BLOCK_ROWS, num_tokens);
        let outs = part(task_idx % out_blocks, BLOCK_OUTS, out_features);
        let row_block = RowBlock::new(rows.clone());
        with_blocks(|[block, _]| {
            activations.multiply(&row_block, weight, outs.clone(), block);
            for (row, values) in rows.zip(block.chunks_exact(outs.len())) {
                // SAFETY: each (row, out) belongs to exactly one task.
                let target = unsafe { target.part(row * out_features + outs.start, outs.len()) };
                target.copy_from_slice(values);
                if let Some(bias) = bias {
                    target.iter_mut().zip(&bias[outs.clone()]).for_each(|(y, bias)| *y += bias);
                }
            }
        });
    });
    out
}
