//! The rows of one step, flat: prefill chunks and decodes side by side in one token dimension, without padding.

use kernels::{BatchLists, PagedBatch};
use scheduler::{BlockId, StateSlot};

use crate::experts::ExpertOptions;

/// Everything a model needs to know about the rows of a step. All sequences' rows are contiguous, in batch order.
#[derive(Debug, Default)]
pub struct ForwardInput {
    /// `[num_tokens]`
    pub input_ids: Vec<u32>,
    /// Position of each row in its sequence, `[num_tokens]`.
    pub positions: Vec<u32>,
    /// For sites that keep every position.
    pub paged: PagedRows,
    /// For sites that keep a window; of no use where the model has none.
    pub windowed: PagedRows,
    pub pass: Pass,
    /// Of each sequence.
    pub experts: Vec<ExpertOptions>,
    /// Some of them may leave experts out.
    pub leaves_experts_out: bool,
}

/// Rows and sequences of a step in one kind of cache.
#[derive(Debug, Default)]
pub struct PagedRows {
    /// Where each row's keys and values go: `block * block_size + offset`, `[num_tokens]`.
    pub slot_mapping: Vec<u32>,
    /// Row ranges, context lengths, block tables and state slots of the sequences.
    pub batch: PagedBatch,
}

/// Which half of the model the rows of a step are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pass {
    #[default]
    Decoder,
    /// Every sequence is there with the whole of its source.
    Encoder,
}

/// Rows `start..start + tokens.len()` of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct ChunkRows<'a> {
    pub start: usize,
    pub tokens: &'a [u32],
    /// Leading tokens of the sequence that belong to its source; 0 without an encoder.
    pub source_len: usize,
    /// Blocks of the whole sequence.
    pub blocks: &'a [BlockId],
    /// Of the blocks that hold its window; `None` for models without windows.
    pub window: Option<WindowRows<'a>>,
    pub state_slot: Option<StateSlot>,
    pub experts: ExpertOptions,
}

/// The blocks of a sequence for sites with a window.
#[derive(Clone, Copy, Debug)]
pub struct WindowRows<'a> {
    /// Leading blocks that no row sees any more.
    pub start: usize,
    pub blocks: &'a [BlockId],
}

impl ForwardInput {
    /// Forgets the rows and keeps the buffers.
    pub fn clear(&mut self, pass: Pass) {
        self.pass = pass;
        self.input_ids.clear();
        self.positions.clear();
        self.paged.clear();
        self.windowed.clear();
        self.experts.clear();
        self.leaves_experts_out = false;
    }

    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    pub fn push(&mut self, chunk: ChunkRows, block_size: usize) {
        let end = chunk.start + chunk.tokens.len();
        self.input_ids.extend_from_slice(chunk.tokens);
        self.positions.extend(chunk.start as u32..end as u32);
        self.experts.push(chunk.experts);
        self.leaves_experts_out |= chunk.experts.leaves_out();
        self.paged.push(&chunk, WindowRows { start: 0, blocks: chunk.blocks }, block_size);
        if let Some(window) = chunk.window {
            self.windowed.push(&chunk, window, block_size);
        }
    }
}

impl PagedRows {
    fn clear(&mut self) {
        self.slot_mapping.clear();
        let batch: &mut BatchLists = &mut self.batch;
        for list in [&mut batch.cu_seqlens, &mut batch.block_offsets] {
            list.clear();
            list.push(0);
        }
        for list in [&mut batch.context_lens, &mut batch.source_lens, &mut batch.state_slots, &mut batch.block_tables] {
            list.clear();
        }
    }

    fn push(&mut self, chunk: &ChunkRows, table: WindowRows, block_size: usize) {
        let end = chunk.start + chunk.tokens.len();
        let num_held = end.div_ceil(block_size).saturating_sub(table.start);
        assert!(num_held <= table.blocks.len(), "every row of a chunk has a block");
        for position in chunk.start..end {
            let block = table.blocks[position / block_size - table.start].0 as usize;
            self.slot_mapping.push((block * block_size + position % block_size) as u32);
        }
        let batch: &mut BatchLists = &mut self.batch;
        batch.cu_seqlens.push(self.slot_mapping.len() as u32);
        batch.context_lens.push(end as u32);
        batch.source_lens.push(chunk.source_len as u32);
        batch.state_slots.extend(chunk.state_slot.map(|slot| slot.0));
        batch.block_tables.extend(std::iter::repeat_n(PagedBatch::NO_BLOCK, table.start));
        batch.block_tables.extend(table.blocks[..num_held].iter().map(|block| block.0));
        batch.block_offsets.push(batch.block_tables.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_two_sequences_lie_side_by_side() {
        let mut input = ForwardInput::default();
        input.clear(Pass::Decoder);
        let first = ChunkRows {
            start: 3,
            tokens: &[7, 8],
            source_len: 2,
            blocks: &[BlockId(5), BlockId(2)],
            window: Some(WindowRows { start: 0, blocks: &[BlockId(1), BlockId(3)] }),
            state_slot: Some(StateSlot(6)),
            experts: ExpertOptions { max_experts: Some(1), ..ExpertOptions::default() },
        };
        input.push(first, 4);
        let second = ChunkRows {
            start: 8,
            tokens: &[9],
            source_len: 0,
            blocks: &[BlockId(0), BlockId(1), BlockId(4)],
            window: Some(WindowRows { start: 1, blocks: &[BlockId(7), BlockId(0)] }),
            state_slot: Some(StateSlot(0)),
            experts: ExpertOptions::default(),
        };
        input.push(second, 4);
        assert_eq!(input.input_ids, [7, 8, 9]);
        assert_eq!(input.positions, [3, 4, 8]);
        assert_eq!((&input.experts[..], input.leaves_experts_out), (&[first.experts, second.experts][..], true));
        assert_eq!(input.paged.slot_mapping, [23, 8, 16]);
        let batch = &input.paged.batch;
        assert_eq!(batch.cu_seqlens, [0, 2, 3]);
        assert_eq!(batch.context_lens, [5, 9]);
        assert_eq!(batch.source_lens, [2, 0]);
        assert_eq!(batch.state_slots, [6, 0]);
        assert_eq!(batch.block_tables, [5, 2, 0, 1, 4]);
        assert_eq!(batch.block_offsets, [0, 2, 5]);
        assert_eq!(input.windowed.slot_mapping, [7, 12, 0]);
        let expected = PagedBatch::from(BatchLists {
            block_tables: vec![1, 3, PagedBatch::NO_BLOCK, 7, 0],
            ..BatchLists::clone(batch)
        });
        assert_eq!(input.windowed.batch, expected);
    }
}
