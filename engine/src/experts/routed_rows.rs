//! The experts of every token, kept beside its keys and values: who finds a token's block finds its routing too.

use std::ops::Range;
use std::sync::Arc;

use kernels::TopK;
use scheduler::BlockId;

use crate::models::{ModelShape, Prefill};

/// Ids are kept in two bytes at most, and one is none.
const MOST_EXPERTS: usize = NO_EXPERT as usize;

/// In place of an expert that a token's router chose and that did not run: options left it out, or it was full.
pub const NO_EXPERT: u16 = u16::MAX;
/// The same in one byte.
const NO_EXPERT_BYTE: u8 = u8::MAX;

/// One router of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeShape {
    /// Experts that it chooses among, zero-computation ones included.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// How the experts of one token follow each other: `[layer][slot]`, in the order in which the model asks its routers, the
/// best expert of a layer first, [`NO_EXPERT`] where one did not run. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedLayout {
    layers: Arc<[MoeShape]>,
    ids_per_token: usize,
}

impl RoutedLayout {
    /// The routers that every token passes once. None where an encoder reads a part of the tokens, or where ids do not fit.
    pub fn of(shape: &ModelShape) -> Self {
        let own = shape.own_moe_layers();
        let is_told = shape.prefill == Prefill::Causal && own.iter().all(|layer| layer.num_experts <= MOST_EXPERTS);
        Self::new(if is_told { own } else { &[] })
    }

    pub fn new(layers: &[MoeShape]) -> Self {
        Self { layers: layers.into(), ids_per_token: layers.iter().map(|layer| layer.top_k).sum() }
    }

    pub fn layers(&self) -> &[MoeShape] {
        &self.layers
    }

    /// True where no routing is kept.
    pub fn is_empty(&self) -> bool {
        self.ids_per_token == 0
    }

    /// Of all layers together.
    pub fn ids_per_token(&self) -> usize {
        self.ids_per_token
    }

    /// What a token takes in memory.
    pub fn bytes_per_token(&self) -> usize {
        self.ids_per_token * if self.fits_bytes() { 1 } else { 2 }
    }

    fn fits_bytes(&self) -> bool {
        self.layers.iter().all(|layer| layer.num_experts <= usize::from(NO_EXPERT_BYTE))
    }
}

/// Experts of the tokens in the blocks of sites that keep every position, by slot.
#[derive(Debug)]
pub struct RoutedRows {
    layout: RoutedLayout,
    /// Of each layer within a token's ids.
    offsets: Vec<usize>,
    block_size: usize,
    ids: Ids,
}

/// `[slot][layer][top_k]`, as narrow as the experts allow.
#[derive(Debug)]
enum Ids {
    Bytes(Vec<u8>),
    Words(Vec<u16>),
}

impl RoutedRows {
    /// For so many blocks; memory is committed by the system when it is first written.
    pub fn new(layout: RoutedLayout, num_blocks: usize, block_size: usize) -> Self {
        let len = num_blocks * block_size * layout.ids_per_token;
        let ids = if layout.fits_bytes() { Ids::Bytes(vec![0; len]) } else { Ids::Words(vec![0; len]) };
        let next = |offset: &mut usize, layer: &MoeShape| Some(std::mem::replace(offset, *offset + layer.top_k));
        let offsets = layout.layers.iter().scan(0, next).collect();
        Self { layout, offsets, block_size, ids }
    }

    pub fn layout(&self) -> &RoutedLayout {
        &self.layout
    }

    /// Keeps the choices of one router for the rows of a step, each of which goes to its slot. Layers that are not told of,
    /// those of multi-token prediction and of encoders, leave nothing.
    pub fn write(&mut self, moe_idx: usize, topk: &TopK, slots: &[u32]) {
        let Some(&offset) = self.offsets.get(moe_idx) else { return };
        assert_eq!(topk.k, self.layout.layers[moe_idx].top_k, "experts per token of layer {moe_idx}");
        let width = self.layout.ids_per_token;
        for (experts, &slot) in topk.experts.chunks_exact(topk.k).zip(slots) {
            let start = slot as usize * width + offset;
            let place = start..start + topk.k;
            // Both of the narrower ids of no expert are the last bits of the wider.
            match &mut self.ids {
                Ids::Bytes(ids) => ids[place].iter_mut().zip(experts).for_each(|(id, &expert)| *id = expert as u8),
                Ids::Words(ids) => ids[place].iter_mut().zip(experts).for_each(|(id, &expert)| *id = expert as u16),
            }
        }
    }

    /// Fills a block with what [`Self::read`] gave for all its tokens.
    pub fn write_block(&mut self, block: BlockId, experts: impl Iterator<Item = u16>) {
        let block_ids = self.block_size * self.layout.ids_per_token;
        let start = block.0 as usize * block_ids;
        let place = start..start + block_ids;
        match &mut self.ids {
            Ids::Bytes(ids) => ids[place].iter_mut().zip(experts).for_each(|(id, expert)| *id = expert as u8),
            Ids::Words(ids) => ids[place].iter_mut().zip(experts).for_each(|(id, expert)| *id = expert),
        }
    }

    /// Of the tokens at `positions` of a sequence that holds `blocks`: `[token][layer][top_k]`.
    pub fn read(&self, blocks: &[BlockId], positions: Range<usize>) -> Vec<u16> {
        let width = self.layout.ids_per_token;
        let mut found = Vec::with_capacity(positions.len() * width);
        for position in positions {
            let slot = blocks[position / self.block_size].0 as usize * self.block_size + position % self.block_size;
            let place = slot * width..(slot + 1) * width;
            match &self.ids {
                Ids::Bytes(ids) => found.extend(ids[place].iter().map(|&id| match id {
                    NO_EXPERT_BYTE => NO_EXPERT,
                    id => u16::from(id),
                })),
                Ids::Words(ids) => found.extend_from_slice(&ids[place]),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(num_experts: usize, bytes_per_token: usize) {
        let layout = RoutedLayout::new(&[MoeShape { num_experts: 4, top_k: 1 }, MoeShape { num_experts, top_k: 2 }]);
        assert_eq!((layout.ids_per_token(), layout.bytes_per_token()), (3, bytes_per_token));
        let mut rows = RoutedRows::new(layout, 3, 2);
        let (largest, none) = (num_experts as u32 - 1, TopK::NO_EXPERT);
        let topk = |experts: &[u32], k| TopK { experts: experts.into(), weights: vec![0.5; experts.len()], k };
        // Positions 1 and 2 of a sequence that holds blocks 2 and 0.
        rows.write(0, &topk(&[3, 1], 1), &[5, 0]);
        rows.write(1, &topk(&[largest, none, 2, largest], 2), &[5, 0]);
        rows.write(2, &topk(&[1, 1], 1), &[5, 0]);
        let last = largest as u16;
        let blocks = [BlockId(2), BlockId(0)];
        assert_eq!(rows.read(&blocks, 1..3), [3, last, NO_EXPERT, 1, 2, last]);
        assert_eq!(rows.read(&blocks, 2..3), [1, 2, last]);
        assert_eq!(rows.read(&blocks, 3..4), [0, 0, 0]);
        let block = rows.read(&[BlockId(2)], 0..2);
        rows.write_block(BlockId(1), block.iter().copied());
        assert_eq!(rows.read(&[BlockId(1)], 0..2), [0, 0, 0, 3, last, NO_EXPERT]);
        assert_eq!(rows.read(&[BlockId(2)], 0..2), block);
    }

    #[test]
    fn a_token_is_found_where_it_was_computed() {
        check(255, 3);
        check(256, 6);
        check(MOST_EXPERTS, 6);
    }

    #[test]
    fn nothing_is_kept_without_routers() {
        let layout = RoutedLayout::new(&[]);
        assert!(layout.is_empty() && layout.bytes_per_token() == 0);
        assert_eq!(RoutedRows::new(layout, 1 << 40, 256).read(&[BlockId(7)], 0..9), [0; 0]);
    }
}
