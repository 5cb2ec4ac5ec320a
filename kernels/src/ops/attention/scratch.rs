//! Memory that the tasks of a thread use again and again, so that none of it is fetched from the system in a step.

use std::cell::RefCell;
use std::ops::Range;

use super::HeadLayout;
use super::tile::TILE;
use crate::lanes::WIDTH;
use crate::memory::{AlignedBytes, view, view_mut};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Gives the thread's scratch memory to a task, which must not ask for it again.
pub(super) fn with<R>(task: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(task)
}

/// Numbers on cache lines of their own, kept until more are needed.
#[derive(Default)]
pub(super) struct Floats {
    bytes: Option<AlignedBytes>,
    len: usize,
}

impl Floats {
    /// Makes it so long; what it holds is anything.
    fn resize(&mut self, len: usize) {
        let bytes = len * size_of::<f32>();
        if self.bytes.as_ref().is_none_or(|held| held.as_slice().len() < bytes) {
            self.bytes = Some(AlignedBytes::zeroed(bytes));
        }
        self.len = len;
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        self.bytes.as_ref().map_or(&[], |bytes| &view(bytes.as_slice())[..self.len])
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        self.bytes.as_mut().map_or(&mut [], |bytes| &mut view_mut(bytes.as_mut_slice())[..self.len])
    }
}

/// A task's memory; a sum per pair of each of its heads, the rest per pair of the head at hand.
#[derive(Default)]
pub(super) struct Scratch {
    /// Of each band `[key_dim, len]`, times the scale; bands of the first head, then of the next.
    pub(super) queries: Floats,
    /// `[TILE / WIDTH, key_dim, WIDTH]`
    pub(super) keys: Floats,
    /// `[value_len, TILE]` in slices.
    pub(super) values: Floats,
    /// One query, on its way to its band.
    pub(super) query: Vec<f32>,
    /// Scores, then weights.
    pub(super) scores: Vec<[f32; TILE]>,
    /// Positions of the tile that a pair sees: first and end.
    pub(super) ranges: Vec<(usize, usize)>,
    /// What a tile multiplies the sums before it with.
    pub(super) factors: Vec<f32>,
    /// Positions that a pair sees.
    pub(super) visible: Vec<Range<usize>>,
    pub(super) segment: Sums,
    pub(super) total: Sums,
}

impl Scratch {
    /// For so many heads with so many pairs each. `visible` is left empty.
    pub(super) fn lay_out(&mut self, heads: &HeadLayout, [num_heads, num_pairs]: [usize; 2]) {
        let value_len = heads.value_dim.next_multiple_of(WIDTH);
        self.queries.resize(num_heads * num_pairs * heads.key_dim);
        self.keys.resize(TILE * heads.key_dim);
        self.values.resize(TILE * value_len);
        self.query.resize(heads.key_dim, 0.0);
        self.scores.resize(num_pairs, [0.0; TILE]);
        self.ranges.resize(num_pairs, (0, 0));
        self.factors.resize(num_pairs, 1.0);
        self.visible.clear();
        for sums in [&mut self.segment, &mut self.total] {
            sums.lay_out(num_heads * num_pairs, value_len);
        }
    }
}

/// Softmax-weighted sums of values in the making, one per pair.
#[derive(Default)]
pub(super) struct Sums {
    /// The largest score so far.
    pub(super) max: Vec<f32>,
    /// Sum of the weights, which are relative to it.
    pub(super) sum: Vec<f32>,
    /// `[pairs, value_len]`
    pub(super) values: Floats,
    pub(super) value_len: usize,
}

impl Sums {
    fn lay_out(&mut self, len: usize, value_len: usize) {
        self.max.resize(len, 0.0);
        self.sum.resize(len, 0.0);
        self.values.resize(len * value_len);
        self.value_len = value_len;
    }

    /// Starts all sums from nothing.
    pub(super) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.values.as_mut_slice().fill(0.0);
    }

    /// What a pair has.
    pub(super) fn of(&self, idx: usize) -> Sum<&[f32]> {
        let values = &self.values.as_slice()[idx * self.value_len..(idx + 1) * self.value_len];
        Sum { max: self.max[idx], sum: self.sum[idx], values }
    }

    /// Gives a pair the sums of its first segment.
    pub(super) fn set(&mut self, idx: usize, segment: &Sum<&[f32]>) {
        (self.max[idx], self.sum[idx]) = (segment.max, segment.sum);
        self.values.as_mut_slice()[idx * self.value_len..(idx + 1) * self.value_len].copy_from_slice(segment.values);
    }

    /// Adds the sums of a pair's next segment.
    pub(super) fn join(&mut self, idx: usize, segment: &Sum<&[f32]>) {
        let values = &mut self.values.as_mut_slice()[idx * self.value_len..(idx + 1) * self.value_len];
        let mut total = Sum { max: self.max[idx], sum: self.sum[idx], values };
        total.join(segment);
        (self.max[idx], self.sum[idx]) = (total.max, total.sum);
    }
}

/// Softmax-weighted values of one pair.
pub(super) struct Sum<V> {
    pub(super) max: f32,
    pub(super) sum: f32,
    pub(super) values: V,
}

impl Sum<&mut [f32]> {
    /// Adds what later positions gave.
    pub(super) fn join(&mut self, later: &Sum<&[f32]>) {
        let max = self.max.max(later.max);
        let (own, other) = ((self.max - max).exp(), (later.max - max).exp());
        (self.max, self.sum) = (max, self.sum * own + later.sum * other);
        for (value, later) in self.values.iter_mut().zip(later.values) {
            *value = *value * own + later * other;
        }
    }
}

impl Sum<&[f32]> {
    /// The softmax's result, in whose sum a learned score may take part.
    pub(super) fn finish(&self, sink: Option<f32>, out: &mut [f32]) {
        let factor = match sink {
            None => 1.0 / self.sum,
            Some(sink) => {
                let max = self.max.max(sink);
                let own = (self.max - max).exp();
                own / (self.sum * own + (sink - max).exp())
            }
        };
        out.iter_mut().zip(self.values).for_each(|(out, value)| *out = value * factor);
    }
}
