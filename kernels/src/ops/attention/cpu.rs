//! Attention cut into tasks: many rows of one head each, or few rows of many heads, or these over one segment each.
//!
//! How it is cut depends on the batch and the threads; what a task computes for a pair does not depend on the cut, see
//! [`super::tile`].

use std::ops::Range;

use half::bf16;

use super::scratch::{self, Sum};
use super::tile::{Partial, Task, TaskKernel, partial_len, segments};
use super::{Attention, HeadLayout};
use crate::dispatch::{self, Isa, Kernel};
use crate::memory::Disjoint;
use crate::paged_cache::KvFormat;
use crate::pool;

/// Numbers of the queries and sums of a task's pairs: a quarter of a second-level cache.
const TASK_NUMBERS: usize = 1 << 16;
/// Most pairs of a task; more would not share a tile's preparation to any effect.
const TASK_PAIRS: usize = 192;
/// Up to so many pairs of a sequence and head, a task may take several heads.
const FEW_PAIRS: usize = 16;
/// Tasks for each thread, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 6;

/// `[num_tokens, num_heads, value_dim]`
pub(crate) fn forward(op: &Attention<'_>) -> Vec<f32> {
    forward_with(op, None, pool::num_threads() * TASKS_PER_THREAD)
}

/// On this instruction set, or the one in use, in about so many tasks.
pub(super) fn forward_with(op: &Attention<'_>, isa: Option<Isa>, num_tasks: usize) -> Vec<f32> {
    let HeadLayout { num_heads, key_dim, value_dim, .. } = op.heads;
    let num_tokens = op.batch.cu_seqlens.last().map_or(0, |&rows| rows as usize);
    let mut out = vec![0.0; num_tokens * num_heads * value_dim];
    let Plan { tasks, splits, num_partials, work } = Plan::new(op, num_tasks);
    let mut partials = vec![0.0; num_partials * partial_len(&op.heads)];
    let target = Disjoint::new(&mut out);
    let partial_target = Disjoint::new(&mut partials);
    pool::parallel_if(work * (key_dim + value_dim), tasks.len(), |task_idx| {
        let task = &tasks[task_idx];
        scratch::with(|scratch| match op.cache.format() {
            KvFormat::F32 => run(isa, TaskKernel::<f32>::new(op, task, scratch, (&target, &partial_target))),
            KvFormat::Bf16 => run(isa, TaskKernel::<bf16>::new(op, task, scratch, (&target, &partial_target))),
        });
    });
    pool::parallel_if(num_partials * value_dim, splits.len(), |split_idx| {
        splits[split_idx].join(op, &partial_target, &target);
    });
    out
}

fn run<K: Kernel>(isa: Option<Isa>, kernel: K) -> K::Output {
    match isa {
        Some(isa) => isa.run(kernel),
        None => dispatch::run(kernel),
    }
}

#[derive(Default)]
struct Plan {
    tasks: Vec<Task>,
    splits: Vec<Split>,
    num_partials: usize,
    /// Pairs of a head and position, all in all.
    work: usize,
}

/// A sequence and key-value head whose segments are tasks of their own.
struct Split {
    seq_idx: usize,
    kv_head: usize,
    num_pairs: usize,
    /// Sums of the first segment; those of the next begin `stride` behind.
    first: Partial,
    first_segment: usize,
    stride: usize,
}

/// A sequence that has rows in the batch.
struct Rows {
    seq_idx: usize,
    /// Of each key-value head.
    num_pairs: usize,
    segments: Range<usize>,
}

impl Plan {
    fn new(op: &Attention<'_>, num_tasks: usize) -> Self {
        let HeadLayout { num_heads, group_size, key_dim, value_dim, .. } = op.heads;
        let num_kv_heads = num_heads / group_size;
        let sequences: Vec<Rows> = (0..op.batch.num_seqs()).filter_map(|seq_idx| op.rows(seq_idx)).collect();
        let task_pairs = (TASK_NUMBERS / (key_dim + 2 * value_dim).max(1)).clamp(1, TASK_PAIRS);
        let num_units = sequences.iter().map(|rows| rows.num_pairs.div_ceil(task_pairs)).sum::<usize>() * num_kv_heads;
        let is_split = num_units < num_tasks;
        let mut plan = Self::default();
        for rows in sequences {
            plan.work += rows.num_pairs * num_kv_heads * op.batch.context_lens[rows.seq_idx] as usize;
            let num_segments = rows.segments.len();
            let is_split = is_split && num_segments > 1 && rows.num_pairs <= task_pairs;
            let num_pieces = num_units * if is_split { num_segments } else { 1 };
            let task_heads = match rows.num_pairs {
                0..=FEW_PAIRS => (num_pieces / num_tasks).clamp(1, num_kv_heads),
                _ => 1,
            };
            if is_split {
                plan.split(&rows, num_kv_heads, task_heads);
            } else {
                plan.add(&rows, num_kv_heads, (task_heads, task_pairs));
            }
        }
        plan
    }

    fn add(&mut self, rows: &Rows, num_kv_heads: usize, (task_heads, task_pairs): (usize, usize)) {
        for kv_heads in parts(num_kv_heads, task_heads) {
            for pairs in parts(rows.num_pairs, task_pairs) {
                let (seq_idx, segments) = (rows.seq_idx, rows.segments.clone());
                self.tasks.push(Task { seq_idx, kv_heads: kv_heads.clone(), pairs, segments, partial: None });
            }
        }
    }

    fn split(&mut self, rows: &Rows, num_kv_heads: usize, task_heads: usize) {
        let &Rows { seq_idx, num_pairs, ref segments } = rows;
        let start = Partial { first: self.num_partials, num_pairs };
        for segment in segments.clone() {
            for kv_heads in parts(num_kv_heads, task_heads) {
                let partial = Some(Partial { first: self.num_partials, num_pairs });
                let pairs = 0..num_pairs;
                self.tasks.push(Task { seq_idx, kv_heads, pairs, segments: segment..segment + 1, partial });
            }
            self.num_partials += num_kv_heads * num_pairs;
        }
        self.splits.extend((0..num_kv_heads).map(|kv_head| Split {
            seq_idx,
            kv_head,
            num_pairs,
            first: start,
            first_segment: segments.start,
            stride: num_kv_heads * num_pairs,
        }));
    }
}

/// `0..len` in parts of `size`, the last one of what is left.
fn parts(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |first| first..len.min(first + size))
}

impl Split {
    /// Joins the segments of each pair as a task of them all would, and writes its output.
    fn join(&self, op: &Attention<'_>, partials: &Disjoint<'_, f32>, out: &Disjoint<'_, f32>) {
        let len = partial_len(&op.heads);
        for pair in 0..self.num_pairs {
            let sums = |segment: usize| {
                let place = self.first.of_pair(self.kv_head, pair) + (segment - self.first_segment) * self.stride;
                // SAFETY: all tasks have ended; of these parts each is taken once, by the one join of its pair.
                unsafe { partials.part(place * len, len) }
            };
            let position = op.position(self.seq_idx, pair);
            let mut segments = segments(&op.visible(self.seq_idx, position));
            let first = sums(segments.next().expect("a row sees something"));
            let (head, values) = first.split_at_mut(2);
            let mut total = Sum { max: head[0], sum: head[1], values };
            for segment in segments {
                let later = sums(segment);
                total.join(&Sum { max: later[0], sum: later[1], values: &later[2..] });
            }
            // SAFETY: each (row, head) belongs to one split, and to no task that writes output.
            let out = unsafe { out.part(op.out_start(self.seq_idx, self.kv_head, pair), len - 2) };
            let total = Sum { max: total.max, sum: total.sum, values: &*total.values };
            total.finish(op.sink(self.kv_head, pair), out);
        }
    }
}

impl Attention<'_> {
    fn rows(&self, seq_idx: usize) -> Option<Rows> {
        let num_rows = self.batch.seq_rows(seq_idx).len();
        let num_pairs = num_rows * self.heads.group_size;
        (num_pairs > 0).then(|| {
            let first = self.visible(seq_idx, self.position(seq_idx, 0));
            let last = self.visible(seq_idx, self.position(seq_idx, num_pairs - 1));
            Rows { seq_idx, num_pairs, segments: segments(&(first.start..last.end)) }
        })
    }
}
