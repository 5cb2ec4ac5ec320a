//! Which blocks of a kernel attend to what: the rows of a batch in tasks, contexts in splits that begin at multiples of
//! their length. A row has the same bits whatever is planned.

use std::ops::Range;

use crate::ops::paged_attention::Reach;
use crate::paged_batch::PagedBatch;

/// Positions of a split: `SPLIT` of `attention.cuh`.
pub(crate) const SPLIT: usize = 512;
/// The slot of a task that has all splits.
pub(crate) const NONE: u32 = u32::MAX;

/// `struct Task` of `attention.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Task {
    pub(crate) seq_idx: u32,
    pub(crate) first_pair: u32,
    pub(crate) first_split: u32,
    pub(crate) end_split: u32,
    pub(crate) slot: u32,
    pub(crate) row_slots: u32,
}

/// `struct SplitRow` of `attention_merge.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SplitRow {
    pub(crate) row: u32,
    pub(crate) slot: u32,
    pub(crate) num_splits: u32,
}

/// What a plan is made for, beside the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) num_heads: usize,
    pub(crate) group_size: usize,
    pub(crate) reach: Reach,
    /// Pairs that a task of each kernel takes, the least first.
    pub(crate) pairs: Vec<usize>,
}

/// Where splits are tasks of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Splits of a task, which has all of them.
    pub(crate) most_splits: usize,
    /// Sums of splits that there is room for: sequences that have none left are not split.
    pub(crate) most_slots: usize,
}

/// How a batch becomes tasks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Of each kernel.
    pub(crate) tasks: Vec<Vec<Task>>,
    /// Rows whose splits are tasks of their own.
    pub(crate) split_rows: Vec<SplitRow>,
    /// Sums of splits, of a row's head each.
    pub(crate) num_slots: usize,
}

impl Plan {
    /// Of a batch that was checked.
    pub(crate) fn new(batch: &PagedBatch, shape: &Shape, limits: Limits) -> Self {
        let mut plan = Self { tasks: vec![Vec::new(); shape.pairs.len()], ..Self::default() };
        for seq_idx in 0..batch.num_seqs() {
            let seq = Sequence { batch, shape, seq_idx };
            let has_many = seq.tasks().any(|(_, splits)| splits.len() > limits.most_splits);
            if has_many && plan.num_slots + seq.num_rows() * seq.row_slots() <= limits.most_slots {
                plan.add_splits(&seq);
            } else {
                plan.add_whole(&seq);
            }
        }
        plan
    }

    fn add_whole(&mut self, seq: &Sequence<'_>) {
        let tasks = seq.tasks().map(|(first_pair, splits)| seq.task(first_pair, splits, NONE));
        self.tasks[seq.kernel()].extend(tasks);
    }

    fn add_splits(&mut self, seq: &Sequence<'_>) {
        let (first_slot, num_heads) = (self.num_slots, seq.shape.num_heads);
        let first_split = seq.splits(0..seq.num_rows()).start;
        // Of the first row, as far as a row's splits follow each other.
        let slot = |split: usize| first_slot + (split - first_split) * num_heads;
        for (first_pair, splits) in seq.tasks() {
            let tasks = splits.map(|split| seq.task(first_pair, split..split + 1, slot(split) as u32));
            self.tasks[seq.kernel()].extend(tasks);
        }
        let first_row = seq.batch.seq_rows(seq.seq_idx).start;
        for row in 0..seq.num_rows() {
            let own = seq.splits(row..row + 1);
            let slot = slot(own.start) + row * seq.row_slots();
            let (row, num_splits) = ((first_row + row) as u32, own.len() as u32);
            self.split_rows.push(SplitRow { row, slot: slot as u32, num_splits });
        }
        self.num_slots += seq.num_rows() * seq.row_slots();
    }
}

/// Splits that a task may have where sequences with larger ones are split, for all of the `num_blocks` that run at a
/// time to have as much to do.
pub(crate) fn fair_splits(batch: &PagedBatch, shape: &Shape, num_blocks: usize) -> usize {
    let of_sequence =
        |seq_idx| Sequence { batch, shape, seq_idx }.tasks().map(|(_, splits)| splits.len()).sum::<usize>();
    let all: usize = (0..batch.num_seqs()).map(of_sequence).sum();
    (all * (shape.num_heads / shape.group_size) / num_blocks).max(1)
}

/// One of a batch.
struct Sequence<'a> {
    batch: &'a PagedBatch,
    shape: &'a Shape,
    seq_idx: usize,
}

impl Sequence<'_> {
    fn num_rows(&self) -> usize {
        self.batch.seq_rows(self.seq_idx).len()
    }

    fn num_pairs(&self) -> usize {
        self.num_rows() * self.shape.group_size
    }

    /// The first one that has all pairs in a task, or else the one that has the most.
    fn kernel(&self) -> usize {
        let pairs = &self.shape.pairs;
        pairs.iter().position(|&pairs| pairs >= self.num_pairs()).unwrap_or(pairs.len() - 1)
    }

    /// Those that some rows of the sequence see something of.
    fn splits(&self, rows: Range<usize>) -> Range<usize> {
        let first_position = self.batch.context_lens[self.seq_idx] as usize - self.num_rows();
        let source_len = self.batch.source_lens[self.seq_idx] as usize;
        let visible = |row: usize| self.shape.reach.visible(first_position + row, source_len);
        visible(rows.start).start / SPLIT..visible(rows.end - 1).end.div_ceil(SPLIT)
    }

    /// The first pair of each task, and its splits. None if there are no rows.
    fn tasks(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (group_size, all, pairs) = (self.shape.group_size, self.num_pairs(), self.shape.pairs[self.kernel()]);
        (0..all).step_by(pairs).map(move |first| {
            let end = all.min(first + pairs);
            (first, self.splits(first / group_size..end.div_ceil(group_size)))
        })
    }

    /// Slots from a row of the sequence to the next.
    fn row_slots(&self) -> usize {
        self.splits(0..self.num_rows()).len() * self.shape.num_heads
    }

    fn task(&self, first_pair: usize, splits: Range<usize>, slot: u32) -> Task {
        Task {
            seq_idx: self.seq_idx as u32,
            first_pair: first_pair as u32,
            first_split: splits.start as u32,
            end_split: splits.end as u32,
            slot,
            row_slots: if slot == NONE { 0 } else { self.row_slots() as u32 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paged_batch::BatchLists;

    const NO_SPLITS: Limits = Limits { most_splits: usize::MAX, most_slots: usize::MAX };
    const SPLITS: Limits = Limits { most_splits: 1, ..NO_SPLITS };

    /// Sequences of so many rows in contexts that begin with sources.
    fn batch(sequences: &[(usize, usize, usize)]) -> PagedBatch {
        let mut batch = BatchLists { cu_seqlens: vec![0], ..BatchLists::default() };
        for &(num_rows, context_len, source_len) in sequences {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + num_rows as u32);
            batch.context_lens.push(context_len as u32);
            batch.source_lens.push(source_len as u32);
        }
        batch.into()
    }

    fn shape(num_heads: usize, group_size: usize, reach: Reach, pairs: &[usize]) -> Shape {
        Shape { num_heads, group_size, reach, pairs: pairs.to_vec() }
    }

    /// What every pair sees is in one task, or each split of it in one, whose sums are those that are merged.
    fn check(batch: &PagedBatch, shape: &Shape, limits: Limits) -> Plan {
        let plan = Plan::new(batch, shape, limits);
        let mut is_slot_used = vec![false; plan.num_slots];
        for seq_idx in 0..batch.num_seqs() {
            let rows = batch.seq_rows(seq_idx);
            for (idx, row) in rows.clone().enumerate() {
                let position = batch.context_lens[seq_idx] as usize - rows.len() + idx;
                let visible = shape.reach.visible(position, batch.source_lens[seq_idx] as usize);
                let splits = visible.start / SPLIT..visible.end.div_ceil(SPLIT);
                let merged: Vec<&SplitRow> = plan.split_rows.iter().filter(|split| split.row == row as u32).collect();
                for head in 0..shape.num_heads {
                    let pair = idx * shape.group_size + head % shape.group_size;
                    let own: Vec<&Task> = plan
                        .tasks
                        .iter()
                        .zip(&shape.pairs)
                        .flat_map(|(tasks, &pairs)| {
                            tasks.iter().filter(move |task| {
                                let first = task.first_pair as usize;
                                task.seq_idx as usize == seq_idx && (first..first + pairs).contains(&pair)
                            })
                        })
                        .collect();
                    if let [merged] = merged[..] {
                        assert_eq!(merged.num_splits as usize, splits.len());
                        for (i, split) in splits.clone().enumerate() {
                            let [task] =
                                own.iter().filter(|task| task.first_split as usize == split).collect::<Vec<_>>()[..]
                            else {
                                panic!("split {split} of row {row} is in no task or several");
                            };
                            assert_eq!(task.end_split as usize, split + 1);
                            let slot = task.slot as usize + idx * task.row_slots as usize + head;
                            assert_eq!(slot, merged.slot as usize + i * shape.num_heads + head);
                            assert!(!std::mem::replace(&mut is_slot_used[slot], true), "slot {slot} is used twice");
                        }
                    } else {
                        assert!(merged.is_empty());
                        let [task] = own[..] else { panic!("row {row} is in no task or several") };
                        assert_eq!(task.slot, NONE);
                        assert!(task.first_split as usize <= splits.start && splits.end <= task.end_split as usize);
                    }
                }
            }
        }
        let order: Vec<u32> = plan.split_rows.iter().map(|row| row.row).collect();
        assert!(order.is_sorted());
        plan
    }

    #[test]
    fn every_pair_is_in_one_task_of_each_split() {
        let batches = [
            batch(&[(1, 1, 0), (0, 7, 0), (37, 37, 0), (3, 1500, 0), (1, 2048, 0), (200, 900, 0)]),
            batch(&[(2, 1027, 0), (130, 1600, 40), (5, 600, 595), (40, 530, 0)]),
        ];
        for (num_heads, group_size, pairs) in [(4, 4, &[8][..]), (6, 3, &[16, 64]), (5, 5, &[8]), (40, 20, &[16, 32])] {
            for reach in [Reach::Full, Reach::Window(7), Reach::Window(600), Reach::Chunk(500)] {
                for batch in &batches {
                    for limits in [NO_SPLITS, SPLITS, Limits { most_splits: 2, most_slots: 4000 }] {
                        check(batch, &shape(num_heads, group_size, reach, pairs), limits);
                    }
                }
            }
        }
        let source = batch(&[(3, 1600, 1597), (600, 600, 600)]);
        check(&source, &shape(4, 2, Reach::Source, &[16, 64]), SPLITS);
    }

    #[test]
    fn few_pairs_are_in_a_small_task() {
        let shape = shape(8, 4, Reach::Full, &[16, 64]);
        let plan = check(&batch(&[(4, 90, 0), (5, 90, 0), (17, 90, 0)]), &shape, NO_SPLITS);
        let begins = |tasks: &[Task]| tasks.iter().map(|task| (task.seq_idx, task.first_pair)).collect::<Vec<_>>();
        assert_eq!(begins(&plan.tasks[0]), [(0, 0)]);
        assert_eq!(begins(&plan.tasks[1]), [(1, 0), (2, 0), (2, 64)]);
    }

    #[test]
    fn contexts_are_split_where_others_would_have_nothing_to_do() {
        let shape = shape(8, 4, Reach::Full, &[16, 64]);
        let one = batch(&[(1, 2000, 0)]);
        assert_eq!(fair_splits(&one, &shape, 16), 1);
        assert_eq!(check(&one, &shape, SPLITS).tasks[0].len(), 4);
        let alike = batch(&[(1, 2000, 0); 32]);
        // 32 sequences of 4 splits and 2 key-value heads, for 16 blocks.
        assert_eq!(fair_splits(&alike, &shape, 16), 16);
        let plan = check(&alike, &shape, Limits { most_splits: 16, ..NO_SPLITS });
        assert_eq!((plan.tasks[0].len(), plan.num_slots), (32, 0));
        for (most_splits, num_tasks) in [(4, 32), (3, 4 * 32)] {
            let plan = check(&alike, &shape, Limits { most_splits, ..NO_SPLITS });
            assert_eq!(plan.tasks[0].len(), num_tasks);
        }
        let one_is_long = [&[(1, 9000, 0)][..], &[(1, 300, 0); 32]].concat();
        let one_is_long = batch(&one_is_long);
        let most_splits = fair_splits(&one_is_long, &shape, 16);
        assert_eq!(most_splits, 6);
        let plan = check(&one_is_long, &shape, Limits { most_splits, ..NO_SPLITS });
        assert_eq!((plan.tasks[0].len(), plan.split_rows.len()), (18 + 32, 1));
        assert_eq!(fair_splits(&batch(&[]), &shape, 16), 1);
    }

    #[test]
    fn what_has_no_room_is_not_split() {
        let shape = shape(8, 4, Reach::Full, &[16, 64]);
        let batch = batch(&[(1, 1500, 0), (1, 2000, 0), (1, 1000, 0)]);
        for (most_slots, rows) in [(8 * (3 + 2), &[0, 2][..]), (8 * (3 + 2) - 1, &[0])] {
            let plan = check(&batch, &shape, Limits { most_splits: 1, most_slots });
            assert_eq!(plan.split_rows.iter().map(|row| row.row).collect::<Vec<_>>(), rows);
            assert!(plan.num_slots <= most_slots);
        }
    }

    /// Where a split begins does not depend on what else is computed.
    #[test]
    fn splits_begin_at_multiples_of_their_length() {
        let shape = shape(4, 2, Reach::Window(700), &[16, 64]);
        let plan = check(&batch(&[(1, 1700, 0)]), &shape, SPLITS);
        // Positions 1000 to 1699.
        assert_eq!(plan.tasks[0].iter().map(|task| task.first_split).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(plan.split_rows, [SplitRow { row: 0, slot: 0, num_splits: 3 }]);
    }
}
