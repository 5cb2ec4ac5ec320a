//! `grouped_swiglu` in three passes over tokens sorted by expert: gate and up, down, weighted sum per token.

use std::ops::Range;

use super::{Expert, ExpertActivation, ExpertWeights, GroupedSwiglu};
use crate::matmul::{Activations, BLOCK_OUTS, BLOCK_ROWS, RowBlock, part, with_blocks};
use crate::memory::Disjoint;
use crate::ops::glu;
use crate::pool;

/// Floats that the buffers between the passes may take (64 MiB); longer inputs go in parts.
const MAX_BUFFER_FLOATS: usize = 16 << 20;
/// Tokens of a task of the last pass.
const TASK_TOKENS: usize = 4;

pub(crate) fn grouped_swiglu(op: &GroupedSwiglu<'_>, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; op.num_tokens * op.hidden_size];
    if out.is_empty() || op.topk.k == 0 {
        return out;
    }
    let token_floats = op.topk.k * (op.hidden_size + op.intermediate);
    let formats = op.topk.experts.iter().filter_map(|&expert| op.experts[expert as usize].glu());
    let activations = Activations::new(x, op.hidden_size, formats.map(|expert| expert.gate_up.format()));
    let part_tokens = (MAX_BUFFER_FLOATS / token_floats).max(1);
    for (part_idx, out) in out.chunks_mut(part_tokens * op.hidden_size).enumerate() {
        let first = part_idx * part_tokens;
        let plan = Plan::new(op, first..first + out.len() / op.hidden_size);
        let activated = plan.gate_up(&activations);
        let y = plan.down(&activated);
        plan.combine(x, &y, out);
    }
    out
}

/// The (token, slot) pairs of some tokens, sorted by expert, then by pair; a row of the buffers is one pair.
struct Plan<'a> {
    op: &'a GroupedSwiglu<'a>,
    /// First pair of the tokens in `topk`.
    first_pair: usize,
    /// Pair of each row.
    pairs: Vec<usize>,
    /// Row of each pair, counted from `first_pair`.
    rows: Vec<usize>,
    /// Experts in use and their rows, cut into blocks.
    blocks: Vec<(&'a ExpertWeights, Range<usize>)>,
}

impl<'a> Plan<'a> {
    fn new(op: &'a GroupedSwiglu<'a>, tokens: Range<usize>) -> Self {
        let pairs = tokens.start * op.topk.k..tokens.end * op.topk.k;
        let experts = &op.topk.experts[pairs.clone()];
        let mut starts = vec![0; op.experts.len() + 1];
        for &expert in experts {
            starts[expert as usize + 1] += 1;
        }
        let mut blocks = Vec::new();
        for (expert, weights) in op.experts.iter().enumerate() {
            let end = starts[expert] + starts[expert + 1];
            // Identity experts keep their rows, so that the sort stays simple, but no block computes them.
            if let Expert::Glu(weights) = weights {
                let rows = (starts[expert]..end).step_by(BLOCK_ROWS);
                blocks.extend(rows.map(|row| (weights, row..end.min(row + BLOCK_ROWS))));
            }
            starts[expert + 1] = end;
        }
        let (mut sorted, mut rows) = (vec![0; pairs.len()], Vec::with_capacity(pairs.len()));
        for (pair, &expert) in pairs.clone().zip(experts) {
            let row = starts[expert as usize];
            starts[expert as usize] += 1;
            sorted[row] = pair;
            rows.push(row);
        }
        Self { op, first_pair: pairs.start, pairs: sorted, rows, blocks }
    }

    /// `act(gate x, up x)` of each row, `[num_rows, intermediate]`
    fn gate_up(&self, x: &Activations<'_>) -> Vec<f32> {
        let (hidden_size, intermediate) = (self.op.hidden_size, self.op.intermediate);
        let mut activated = vec![0.0; self.pairs.len() * intermediate];
        let target = Disjoint::new(&mut activated);
        let outs_per_block = intermediate.div_ceil(BLOCK_OUTS);
        let work = 2 * self.pairs.len() * intermediate * hidden_size;
        pool::parallel_if(work, self.blocks.len() * outs_per_block, |task_idx| {
            let (expert, rows) = &self.blocks[task_idx / outs_per_block];
            let outs = part(task_idx % outs_per_block, BLOCK_OUTS, intermediate);
            let weight = &expert.gate_up;
            let input = RowBlock::new(self.pairs[rows.clone()].iter().map(|pair| pair / self.op.topk.k));
            with_blocks(|blocks| {
                // A unit without a gate has its one matrix in the gate's place.
                for (part, block) in blocks.iter_mut().take(expert.activation.num_parts()).enumerate() {
                    let outs = part * intermediate + outs.start..part * intermediate + outs.end;
                    x.multiply(&input, weight, outs.clone(), block);
                    if let Some(biases) = &expert.biases {
                        add_to_rows(&mut block[..rows.len() * outs.len()], &biases.gate_up[outs]);
                    }
                }
                let [gate, up] = blocks.each_ref().map(|block| block.chunks_exact(outs.len()));
                for ((row, gate), up) in rows.clone().zip(gate).zip(up) {
                    // SAFETY: each (row, out) belongs to exactly one task.
                    let out = unsafe { target.part(row * intermediate + outs.start, outs.len()) };
                    activate(expert.activation, (gate, up), out);
                }
            });
        });
        activated
    }

    /// The expert's output of each row, `[num_rows, hidden_size]`
    fn down(&self, activated: &[f32]) -> Vec<f32> {
        let (hidden_size, intermediate) = (self.op.hidden_size, self.op.intermediate);
        let formats = self.blocks.iter().map(|(expert, _)| expert.down.format());
        let activations = Activations::new(activated, intermediate, formats);
        let mut y = vec![0.0; self.pairs.len() * hidden_size];
        let target = Disjoint::new(&mut y);
        let outs_per_block = hidden_size.div_ceil(BLOCK_OUTS);
        let work = self.pairs.len() * intermediate * hidden_size;
        pool::parallel_if(work, self.blocks.len() * outs_per_block, |task_idx| {
            let (expert, rows) = &self.blocks[task_idx / outs_per_block];
            let outs = part(task_idx % outs_per_block, BLOCK_OUTS, hidden_size);
            with_blocks(|[block, _]| {
                activations.multiply(&RowBlock::new(rows.clone()), &expert.down, outs.clone(), block);
                if let Some(biases) = &expert.biases {
                    add_to_rows(&mut block[..rows.len() * outs.len()], &biases.down[outs.clone()]);
                }
                for (row, values) in rows.clone().zip(block.chunks_exact(outs.len())) {
                    // SAFETY: each (row, out) belongs to exactly one task.
                    unsafe { target.part(row * hidden_size + outs.start, outs.len()) }.copy_from_slice(values);
                }
            });
        });
        y
    }

    /// Sums the weighted outputs of each token in slot order; `out` is zero and holds the tokens of this plan.
    fn combine(&self, x: &[f32], y: &[f32], out: &mut [f32]) {
        let (hidden_size, k) = (self.op.hidden_size, self.op.topk.k);
        let num_tokens = out.len() / hidden_size;
        let target = Disjoint::new(out);
        pool::parallel_if(y.len(), num_tokens.div_ceil(TASK_TOKENS), |task_idx| {
            for token in part(task_idx, TASK_TOKENS, num_tokens) {
                // SAFETY: each token belongs to exactly one task.
                let out = unsafe { target.part(token * hidden_size, hidden_size) };
                for pair in token * k..(token + 1) * k {
                    let weight = self.op.topk.weights[self.first_pair + pair];
                    let y = match self.op.experts[self.op.topk.experts[self.first_pair + pair] as usize] {
                        Expert::Glu(_) => &y[self.rows[pair] * hidden_size..][..hidden_size],
                        Expert::Identity => &x[(self.first_pair / k + token) * hidden_size..][..hidden_size],
                    };
                    out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
                }
            }
        });
    }
}

fn add_to_rows(rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

fn activate(activation: ExpertActivation, (gate, up): (&[f32], &[f32]), out: &mut [f32]) {
    match activation {
        ExpertActivation::Gated(activation) => glu::activate(activation, (gate, up), out),
        ExpertActivation::Plain(pointwise) => {
            out.iter_mut().zip(gate).for_each(|(out, &up)| *out = pointwise.apply(up));
        }
    }
}
