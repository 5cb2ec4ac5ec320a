//! The rows of one step, flat: prefill chunks and decodes side by side in one token dimension, without padding.

use kernels::PagedBatch;
use scheduler::BlockId;

/// Everything a model needs to know about the rows of a step. All sequences' rows are contiguous, in batch order.
#[derive(Debug, Default)]
pub struct ForwardInput {
    /// `[num_tokens]`
    pub input_ids: Vec<u32>,
    /// Position of each row in its sequence, `[num_tokens]`.
    pub positions: Vec<u32>,
    /// Where each row's keys and values go: `block * block_size + offset`, `[num_tokens]`.
    pub slot_mapping: Vec<u32>,
    /// Row ranges, context lengths and block tables of the sequences.
    pub paged: PagedBatch,
}

/// Rows `start..start + tokens.len()` of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct ChunkRows<'a> {
    pub start: usize,
    pub tokens: &'a [u32],
    /// Blocks of the whole sequence.
    pub blocks: &'a [BlockId],
}

impl ForwardInput {
    /// Forgets the rows and keeps the buffers.
    pub fn clear(&mut self) {
        self.input_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        for list in [&mut self.paged.cu_seqlens, &mut self.paged.block_offsets] {
            list.clear();
            list.push(0);
        }
        self.paged.context_lens.clear();
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
        input.clear();
        input.push(ChunkRows { start: 3, tokens: &[7, 8], blocks: &[BlockId(5), BlockId(2)] }, 4);
        input.push(ChunkRows { start: 0, tokens: &[9], blocks: &[BlockId(0), BlockId(1)] }, 4);
        assert_eq!(input.input_ids, [7, 8, 9]);
        assert_eq!(input.positions, [3, 4, 0]);
        assert_eq!(input.slot_mapping, [23, 8, 0]);
        assert_eq!(input.paged.cu_seqlens, [0, 2, 3]);
        assert_eq!(input.paged.context_lens, [5, 1]);
        assert_eq!(input.paged.block_tables, [5, 2, 0]);
        assert_eq!(input.paged.block_offsets, [0, 2, 3]);
    }
}
