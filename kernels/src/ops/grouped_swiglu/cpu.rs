//! `grouped_swiglu` in three passes over tokens sorted by expert: gate and up, down, weighted sum per token. The first two
//! take experts as they come: a row of the buffers is a pair of token and slot, and each is written once.

use std::ops::Range;

use super::{Expert, ExpertActivation, ExpertWeights, GroupedSwiglu};
use crate::matmul::{Activations, BLOCK_OUTS, BLOCK_ROWS, RowBlock, part, with_blocks};
use crate::memory::Disjoint;
use crate::ops::glu;
use crate::ops::route::TopK;
use crate::pool;

/// Floats that the buffers between the passes may take (64 MiB); longer inputs go in parts.
pub(super) const MAX_BUFFER_FLOATS: usize = 16 << 20;
/// Tokens of a task of the last pass.
const TASK_TOKENS: usize = 4;

pub(crate) fn grouped_swiglu(op: &GroupedSwiglu<'_>, topk: &TopK, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; op.num_tokens * op.sizes.hidden];
    if out.is_empty() || topk.k == 0 {
        return out;
    }
    let token_floats = topk.k * (op.sizes.hidden + op.sizes.intermediate);
    let formats = topk.experts.iter().filter_map(|&expert| op.experts.get(expert as usize)?.glu());
    let activations = Activations::new(x, op.sizes.hidden, formats.map(|expert| expert.gate_up.format()));
    let is_identity: Vec<bool> = op.experts.iter().map(|expert| matches!(expert, Expert::Identity)).collect();
    let experts: Vec<_> =
        op.experts.iter().enumerate().filter_map(|(idx, expert)| Some((idx, expert.glu()?))).collect();
    let part_tokens = (MAX_BUFFER_FLOATS / token_floats).max(1);
    for (part_idx, out) in out.chunks_mut(part_tokens * op.sizes.hidden).enumerate() {
        let first = part_idx * part_tokens;
        let tokens = first..first + out.len() / op.sizes.hidden;
        let mut pairs = Pairs::new((topk, &is_identity), op.sizes, tokens);
        pairs.compute(&activations, &experts);
        pairs.combine(x, out);
    }
    out
}

/// Widths of the experts of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
}

/// The (token, slot) pairs of some tokens, sorted by expert, then by pair, and what their experts gave.
pub(super) struct Pairs<'a> {
    topk: &'a TopK,
    sizes: Sizes,
    is_identity: &'a [bool],
    /// First pair of the tokens in `topk`.
    first_pair: usize,
    /// Pair of each row.
    pairs: Vec<usize>,
    /// Row of each pair, counted from `first_pair`; of no meaning where its slot is empty.
    rows: Vec<usize>,
    /// Where the rows of each expert end; they begin where those of the one before it end.
    ends: Vec<usize>,
    /// `[num_rows, hidden]`; rows of experts that were not computed are zero.
    y: Vec<f32>,
}

/// Some rows of one expert.
struct Block<'a> {
    expert: &'a ExpertWeights,
    rows: Range<usize>,
    /// Where they are among the rows that are computed together.
    slot: usize,
}

impl<'a> Pairs<'a> {
    pub(super) fn new((topk, is_identity): (&'a TopK, &'a [bool]), sizes: Sizes, tokens: Range<usize>) -> Self {
        let pairs = tokens.start * topk.k..tokens.end * topk.k;
        let experts = &topk.experts[pairs.clone()];
        let mut starts = vec![0; is_identity.len() + 1];
        let in_use = || experts.iter().filter(|&&expert| expert != TopK::NO_EXPERT);
        for &expert in in_use() {
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..is_identity.len() {
            starts[expert + 1] += starts[expert];
        }
        let (mut sorted, mut rows) = (vec![0; in_use().count()], Vec::with_capacity(pairs.len()));
        for (pair, &expert) in pairs.clone().zip(experts) {
            if expert == TopK::NO_EXPERT {
                rows.push(0);
                continue;
            }
            let row = starts[expert as usize];
            starts[expert as usize] += 1;
            sorted[row] = pair;
            rows.push(row);
        }
        // Each start has moved to the end of its expert's rows.
        starts.truncate(is_identity.len());
        let y = vec![0.0; sorted.len() * sizes.hidden];
        Self { topk, sizes, is_identity, first_pair: pairs.start, pairs: sorted, rows, ends: starts, y }
    }

    pub(super) fn rows_of(&self, expert: usize) -> Range<usize> {
        let start = if expert == 0 { 0 } else { self.ends[expert - 1] };
        start..self.ends[expert]
    }

    /// Fills the rows of these experts; those without rows are not read. `x` holds the rows of all tokens of `topk`.
    pub(super) fn compute(&mut self, x: &Activations<'_>, experts: &[(usize, &ExpertWeights)]) {
        let most_rows = (MAX_BUFFER_FLOATS / self.sizes.intermediate.max(1)).max(BLOCK_ROWS);
        let (mut blocks, mut num_rows) = (Vec::new(), 0);
        for &(idx, expert) in experts {
            let of_expert = self.rows_of(idx);
            for start in of_expert.clone().step_by(BLOCK_ROWS) {
                let rows = start..of_expert.end.min(start + BLOCK_ROWS);
                if num_rows + rows.len() > most_rows {
                    self.compute_blocks(x, (&blocks, num_rows));
                    blocks.clear();
                    num_rows = 0;
                }
                num_rows += rows.len();
                blocks.push(Block { expert, slot: num_rows - rows.len(), rows });
            }
        }
        self.compute_blocks(x, (&blocks, num_rows));
    }

    fn compute_blocks(&mut self, x: &Activations<'_>, (blocks, num_rows): (&[Block<'_>], usize)) {
        if num_rows > 0 {
            let activated = self.gate_up(x, (blocks, num_rows));
            self.down(&activated, (blocks, num_rows));
        }
    }

    /// What an expert gave that is not there: no numbers.
    pub(super) fn poison(&mut self, expert: usize) {
        let rows = self.rows_of(expert);
        self.y[rows.start * self.sizes.hidden..rows.end * self.sizes.hidden].fill(f32::NAN);
    }

    /// `act(gate x, up x)` of each row that is computed together, `[num_rows, intermediate]`
    fn gate_up(&self, x: &Activations<'_>, (blocks, num_rows): (&[Block<'_>], usize)) -> Vec<f32> {
        let Sizes { hidden, intermediate } = self.sizes;
        let mut activated = vec![0.0; num_rows * intermediate];
        let target = Disjoint::new(&mut activated);
        let outs_per_block = intermediate.div_ceil(BLOCK_OUTS);
        let work = 2 * num_rows * intermediate * hidden;
        pool::parallel_if(work, blocks.len() * outs_per_block, |task_idx| {
            let Block { expert, rows, slot } = &blocks[task_idx / outs_per_block];
            let outs = part(task_idx % outs_per_block, BLOCK_OUTS, intermediate);
            let weight = &expert.gate_up;
            let input = RowBlock::new(self.pairs[rows.clone()].iter().map(|pair| pair / self.topk.k));
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
                for ((slot, gate), up) in (*slot..slot + rows.len()).zip(gate).zip(up) {
                    // SAFETY: each (slot, out) belongs to exactly one task.
                    let out = unsafe { target.part(slot * intermediate + outs.start, outs.len()) };
                    activate(expert.activation, (gate, up), out);
                }
            });
        });
        activated
    }

    /// The expert's output of each of these rows into `y`.
    fn down(&mut self, activated: &[f32], (blocks, num_rows): (&[Block<'_>], usize)) {
        let Sizes { hidden, intermediate } = self.sizes;
        let formats = blocks.iter().map(|block| block.expert.down.format());
        let activations = Activations::new(activated, intermediate, formats);
        let target = Disjoint::new(&mut self.y);
        let outs_per_block = hidden.div_ceil(BLOCK_OUTS);
        let work = num_rows * intermediate * hidden;
        pool::parallel_if(work, blocks.len() * outs_per_block, |task_idx| {
            let Block { expert, rows, slot } = &blocks[task_idx / outs_per_block];
            let outs = part(task_idx % outs_per_block, BLOCK_OUTS, hidden);
            with_blocks(|[block, _]| {
                let input = RowBlock::new(*slot..slot + rows.len());
                activations.multiply(&input, &expert.down, outs.clone(), block);
                if let Some(biases) = &expert.biases {
                    add_to_rows(&mut block[..rows.len() * outs.len()], &biases.down[outs.clone()]);
                }
                for (row, values) in rows.clone().zip(block.chunks_exact(outs.len())) {
                    // SAFETY: each (row, out) belongs to exactly one task.
                    unsafe { target.part(row * hidden + outs.start, outs.len()) }.copy_from_slice(values);
                }
            });
        });
    }

    /// Sums the weighted outputs of each token in slot order; `x` holds all tokens of `topk`, `out` is zero and holds these.
    pub(super) fn combine(&self, x: &[f32], out: &mut [f32]) {
        let (hidden, k) = (self.sizes.hidden, self.topk.k);
        let num_tokens = out.len() / hidden;
        let target = Disjoint::new(out);
        pool::parallel_if(self.y.len(), num_tokens.div_ceil(TASK_TOKENS), |task_idx| {
            for token in part(task_idx, TASK_TOKENS, num_tokens) {
                // SAFETY: each token belongs to exactly one task.
                let out = unsafe { target.part(token * hidden, hidden) };
                for pair in token * k..(token + 1) * k {
                    let expert = self.topk.experts[self.first_pair + pair];
                    if expert == TopK::NO_EXPERT {
                        continue;
                    }
                    let weight = self.topk.weights[self.first_pair + pair];
                    let y = match self.is_identity[expert as usize] {
                        false => &self.y[self.rows[pair] * hidden..][..hidden],
                        true => &x[(self.first_pair / k + token) * hidden..][..hidden],
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
