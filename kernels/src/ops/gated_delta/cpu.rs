//! `gated_delta` row after row: the convolution by rows, the recurrence by (sequence, value head).

use std::ops::Range;

use super::{DeltaSpec, Rows};
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, WIDTH, sum_of_squares};
use crate::memory::Disjoint;
use crate::pool;

/// Under the root, so that a zero vector stays one.
const NORM_EPS: f32 = 1e-6;
/// Vectors of a state's row that are worked on together.
const BAND: usize = 4;
/// Rows of a convolution task.
const TASK_ROWS: usize = 4;
/// An exponential and a division cost about as much as this many multiplications.
const ACTIVATION_WORK: usize = 8;

/// `[num_tokens, num_value_heads * value_dim]`
pub(crate) fn gated_delta(rows: &Rows<'_>, states: &mut [f32]) -> Vec<f32> {
    let spec = rows.weights.spec;
    let state_width = spec.state_width();
    for seq_idx in 0..rows.batch.num_seqs() {
        if rows.batch.is_first(seq_idx) {
            states[rows.batch.state_slots[seq_idx] as usize * state_width..][..state_width].fill(0.0);
        }
    }
    let convolved = rows.convolve(states);
    rows.keep_inputs(states);
    let num_tokens = rows.gates.len() / (2 * spec.num_value_heads);
    let mut out = vec![0.0; num_tokens * spec.num_value_heads * spec.value_dim];
    let (out_parts, state_parts) = (Disjoint::new(&mut out), Disjoint::new(states));
    let work = num_tokens * spec.num_value_heads * 4 * spec.head_width();
    pool::parallel_if(work, rows.batch.num_seqs() * spec.num_value_heads, |task_idx| {
        let (seq_idx, head) = (task_idx / spec.num_value_heads, task_idx % spec.num_value_heads);
        let slot = rows.batch.state_slots[seq_idx] as usize;
        let start = slot * state_width + spec.conv_width() + head * spec.head_width();
        // SAFETY: no two sequences have the same slot, so each (sequence, head) has a matrix of its own.
        let state = unsafe { state_parts.part(start, spec.head_width()) };
        let head = HeadRun {
            rows,
            convolved: &convolved,
            seq_rows: rows.batch.seq_rows(seq_idx),
            head,
            state,
            out: &out_parts,
        };
        dispatch::run(head);
    });
    out
}

impl Rows<'_> {
    /// `activation(conv(x))` of every row, `[num_tokens, num_channels]`.
    fn convolve(&self, states: &[f32]) -> Vec<f32> {
        let spec = self.weights.spec;
        let num_channels = spec.num_channels();
        let mut out = vec![0.0; self.qkv.len()];
        let num_tokens = self.qkv.len() / num_channels;
        let target = Disjoint::new(&mut out);
        let work = self.qkv.len() * (spec.conv_kernel + ACTIVATION_WORK);
        // Which sequence each row belongs to.
        let seqs: Vec<usize> =
            (0..self.batch.num_seqs()).flat_map(|seq_idx| self.batch.seq_rows(seq_idx).map(move |_| seq_idx)).collect();
        pool::parallel_if(work, num_tokens.div_ceil(TASK_ROWS), |task_idx| {
            let first_row = task_idx * TASK_ROWS;
            for (row, &seq_idx) in (first_row..num_tokens).zip(&seqs[first_row..]).take(TASK_ROWS) {
                // SAFETY: each row belongs to exactly one task.
                let out = unsafe { target.part(row * num_channels, num_channels) };
                for tap in 0..spec.conv_kernel {
                    let input = self.input(seq_idx, row, spec.conv_kernel - 1 - tap, states);
                    let taps = self.weights.conv[tap..].iter().step_by(spec.conv_kernel);
                    for ((out, input), weight) in out.iter_mut().zip(input).zip(taps) {
                        *out += weight * input;
                    }
                }
                out.iter_mut().for_each(|value| *value = spec.activation.apply(*value));
            }
        });
        out
    }

    /// The input `back` rows before `row`: of this step, or from the state.
    fn input<'a>(&'a self, seq_idx: usize, row: usize, back: usize, states: &'a [f32]) -> &'a [f32] {
        let spec = self.weights.spec;
        let num_channels = spec.num_channels();
        let first = self.batch.seq_rows(seq_idx).start;
        if row - first >= back {
            return &self.qkv[(row - back) * num_channels..][..num_channels];
        }
        let kept = spec.conv_kernel - 1 - (back - (row - first));
        let slot = self.batch.state_slots[seq_idx] as usize;
        &states[slot * spec.state_width() + kept * num_channels..][..num_channels]
    }

    /// Leaves the last inputs of every sequence in its state, oldest first.
    fn keep_inputs(&self, states: &mut [f32]) {
        let spec = self.weights.spec;
        let (num_channels, num_kept) = (spec.num_channels(), spec.conv_kernel - 1);
        for seq_idx in 0..self.batch.num_seqs() {
            let seq_rows = self.batch.seq_rows(seq_idx);
            let start = self.batch.state_slots[seq_idx] as usize * spec.state_width();
            let state = &mut states[start..start + spec.conv_width()];
            let num_new = seq_rows.len().min(num_kept);
            state.copy_within(num_new * num_channels.., 0);
            let newest = &self.qkv[(seq_rows.end - num_new) * num_channels..seq_rows.end * num_channels];
            state[(num_kept - num_new) * num_channels..].copy_from_slice(newest);
        }
    }
}

/// The recurrence of one value head over the rows of one sequence.
struct HeadRun<'a> {
    rows: &'a Rows<'a>,
    convolved: &'a [f32],
    seq_rows: Range<usize>,
    head: usize,
    /// `[key_dim, row_width]`
    state: &'a mut [f32],
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for HeadRun<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let DeltaSpec { num_key_heads, num_value_heads, key_dim, value_dim, .. } = self.rows.weights.spec;
        let spec = self.rows.weights.spec;
        let key_head = self.head / (num_value_heads / num_key_heads);
        let (mut query, mut key) = (vec![0.0; key_dim], vec![0.0; key_dim]);
        let (mut value, mut output) = (vec![0.0; spec.row_width()], vec![0.0; spec.row_width()]);
        for row in self.seq_rows.clone() {
            let channels = &self.convolved[row * spec.num_channels()..][..spec.num_channels()];
            let (queries, rest) = channels.split_at(num_key_heads * key_dim);
            let (keys, values) = rest.split_at(num_key_heads * key_dim);
            normalize(lanes, &queries[key_head * key_dim..][..key_dim], (key_dim as f32).sqrt().recip(), &mut query);
            normalize(lanes, &keys[key_head * key_dim..][..key_dim], 1.0, &mut key);
            value[..value_dim].copy_from_slice(&values[self.head * value_dim..][..value_dim]);
            let (beta, decay) = self.gates(row);
            let mut column = 0;
            while column + BAND * WIDTH <= spec.row_width() {
                step::<L, BAND>(lanes, self.state, (column, beta, decay), [&query, &key, &value], &mut output);
                column += BAND * WIDTH;
            }
            while column < spec.row_width() {
                step::<L, 1>(lanes, self.state, (column, beta, decay), [&query, &key, &value], &mut output);
                column += WIDTH;
            }
            let start = (row * num_value_heads + self.head) * value_dim;
            // SAFETY: each (row, head) belongs to exactly one task.
            unsafe { self.out.part(start, value_dim) }.copy_from_slice(&output[..value_dim]);
        }
    }
}

impl HeadRun<'_> {
    /// How much of the correction is taken, and what remains of the state.
    fn gates(&self, row: usize) -> (f32, f32) {
        let weights = self.rows.weights;
        let num_heads = weights.spec.num_value_heads;
        let gates = &self.rows.gates[row * 2 * num_heads..][..2 * num_heads];
        let (b, a) = (gates[self.head], gates[num_heads + self.head] + weights.dt_bias[self.head]);
        // Past 20 the softplus is its argument in f32.
        let softplus = if a > 20.0 { a } else { a.exp().ln_1p() };
        (1.0 / (1.0 + (-b).exp()), (weights.decay[self.head] * softplus).exp())
    }
}

/// `out = x / ‖x‖ * scale`
#[inline(always)]
fn normalize<L: Lanes>(lanes: L, x: &[f32], scale: f32, out: &mut [f32]) {
    let factor = 1.0 / (sum_of_squares(lanes, x) + NORM_EPS).sqrt() * scale;
    out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor);
}

/// One row's work on `NV` vectors of columns: decay, correction, output. The sums over `key_dim` run from the first row.
#[inline(always)]
fn step<L: Lanes, const NV: usize>(
    lanes: L,
    state: &mut [f32],
    (column, beta, decay): (usize, f32, f32),
    [query, key, value]: [&[f32]; 3],
    output: &mut [f32],
) {
    let row_width = value.len();
    let decay = lanes.splat(decay);
    let mut recalled = [lanes.splat(0.0); NV];
    for (row, &k) in state.chunks_exact_mut(row_width).zip(key) {
        let (vectors, _) = row[column..].as_chunks_mut::<WIDTH>();
        for n in 0..NV {
            let v = lanes.mul(lanes.load(&vectors[n]), decay);
            lanes.store(v, &mut vectors[n]);
            recalled[n] = lanes.fma(lanes.splat(k), v, recalled[n]);
        }
    }
    let (values, _) = value[column..].as_chunks::<WIDTH>();
    let mut correction = [lanes.splat(0.0); NV];
    for n in 0..NV {
        correction[n] = lanes.mul(lanes.splat(beta), lanes.sub(lanes.load(&values[n]), recalled[n]));
    }
    let mut sums = [lanes.splat(0.0); NV];
    for ((row, &k), &q) in state.chunks_exact_mut(row_width).zip(key).zip(query) {
        let (vectors, _) = row[column..].as_chunks_mut::<WIDTH>();
        for n in 0..NV {
            let v = lanes.fma(lanes.splat(k), correction[n], lanes.load(&vectors[n]));
            lanes.store(v, &mut vectors[n]);
            sums[n] = lanes.fma(lanes.splat(q), v, sums[n]);
        }
    }
    let (outputs, _) = output[column..].as_chunks_mut::<WIDTH>();
    for n in 0..NV {
        lanes.store(sums[n], &mut outputs[n]);
    }
}
