//! `head_linear` in blocks of input rows and weight rows of one head, one task each.

use super::HeadLinear;
use crate::matmul::{Activations, BLOCK_OUTS, BLOCK_ROWS, RowBlock, part, with_blocks};
use crate::memory::Disjoint;
use crate::pool;
use crate::weight::PackedWeight;

pub(crate) fn head_linear(op: &HeadLinear<'_>, x: &[f32]) -> Vec<f32> {
    let (num_tokens, num_heads, out_features) = (op.num_tokens, op.weights.len(), op.out_features);
    let in_features = op.weights.first().map_or(0, PackedWeight::cols);
    let activations = Activations::new(x, in_features, op.weights.iter().map(PackedWeight::format));
    let mut out = vec![0.0; num_tokens * num_heads * out_features];
    let target = Disjoint::new(&mut out);
    let (row_blocks, out_blocks) = (num_tokens.div_ceil(BLOCK_ROWS), out_features.div_ceil(BLOCK_OUTS));
    pool::parallel_if(x.len() * out_features, num_heads * row_blocks * out_blocks, |task_idx| {
        let head = task_idx / (row_blocks * out_blocks);
        let rows = part(task_idx / out_blocks % row_blocks, BLOCK_ROWS, num_tokens);
        let outs = part(task_idx % out_blocks, BLOCK_OUTS, out_features);
        let input = RowBlock::new(rows.clone().map(|row| row * num_heads + head));
        with_blocks(|[block, _]| {
            activations.multiply(&input, &op.weights[head], outs.clone(), block);
            for (row, values) in rows.zip(block.chunks_exact(outs.len())) {
                let start = (row * num_heads + head) * out_features + outs.start;
                // SAFETY: each (row, head, out) belongs to exactly one task.
                unsafe { target.part(start, outs.len()) }.copy_from_slice(values);
            }
        });
    });
    out
}
