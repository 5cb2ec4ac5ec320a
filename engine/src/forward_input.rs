//! The rows of one step, flat: prefill chunks and decodes side by side in one token dimension, without padding.

use kernels::PagedBatch;
use scheduler::{BlockId, StateSlot};

/// Everything a model needs to know about the rows of a step. All sequences' rows are contiguous, in batch order.
#[derive(Debug, Default)]
pub struct ForwardInput {
    /// `[num_tokens]`
    pub input_ids: Vec<u32>,
    /// Position of each row in its sequence, `[num_tokens]`.
    pub positions: Vec<u32>,
    /// Where each row's keys and values go: `block * block_size + offset`, `[num_tokens]`.
    pub slot_mapping: Vec<u32>,
    /// Row ranges, context lengths, block tables and state slots of the sequences.
    pub paged: PagedBatch,
    pub pass: Pass,
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
    pub state_slot: Option<StateSlot>,
}

impl ForwardInput {
    /// Forgets the rows and keeps the buffers.
    pub fn clear(&mut self, pass: Pass) {
        self.pass = pass;
        self.input_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        for list in [&mut self.paged.cu_seqlens, &mut self.paged.block_offsets] {
            list.clear();
            list.push(0);
        }
        for list in [&mut self.paged.context_lens, &mut self.paged.source_lens, &mut self.paged.state_slots] {
            list.clear();
        }
        self.paged.block_tables.clear();
    }

    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    pub fn push(&mut self, chunk: ChunkRows, block_size: usize) {
        let end = chunk.start + chunk.tokens.len();
        let num_blocks = end.div_ceil(block_size);
        assert!(num_blocks <= chunk.blocks.len(), "every row of a chunk has a block");
        self.input_ids.extend_from_slice(chunk.tokens);
        for position in chunk.start..end {
            let block = chunk.blocks[position / block_size].0 as usize;
            self.positions.push(position as u32);
            self.slot_mapping.push((block * block_size + position % block_size) as u32);
        }
        self.paged.cu_seqlens.push(self.input_ids.len() as u32);
        self.paged.context_lens.push(end as u32);
        self.paged.source_lens.push(chunk.source_len as u32);
        self.paged.state_slots.extend(chunk.state_slot.map(|slot| slot.0));
        self.paged.block_tables.extend(chunk.blocks[..num_blocks].iter().map(|block| block.0));
        self.paged.block_offsets.push(self.paged.block_tables.len() as u32);
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
            state_slot: Some(StateSlot(6)),
        };
        input.push(first, 4);
        let second = ChunkRows {
            start: 0,
            tokens: &[9],
            source_len: 0,
            blocks: &[BlockId(0), BlockId(1)],
            state_slot: Some(StateSlot(0)),
        };
        input.push(second, 4);
        assert_eq!(input.input_ids, [7, 8, 9]);
        assert_eq!(input.positions, [3, 4, 0]);
        assert_eq!(input.slot_mapping, [23, 8, 0]);
        assert_eq!(input.paged.cu_seqlens, [0, 2, 3]);
        assert_eq!(input.paged.context_lens, [5, 1]);
        assert_eq!(input.paged.source_lens, [2, 0]);
        assert_eq!(input.paged.state_slots, [6, 0]);
        assert_eq!(input.paged.block_tables, [5, 2, 0]);
        assert_eq!(input.paged.block_offsets, [0, 2, 3]);
    }
}
