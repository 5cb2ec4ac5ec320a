//! The description of a batch that reads caches, and what ops found out about it.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, PoisonError};

use crate::check;
use crate::error::{KernelError, Result};
use crate::ops::paged_attention::Reach;
use crate::paged_cache::PagedCache;

/// Which rows belong to which sequence, and where each sequence's context lies. Row `i` of a sequence with `n` rows in
/// this step has position `context_len - n + i` and sees the positions up to its own. Where a sequence has a source, its
/// first positions hold what an encoder made of it, and the decoder's own come after them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchLists {
    /// First row of each sequence, then the number of rows; `[num_seqs + 1]`.
    pub cu_seqlens: Vec<u32>,
    /// Positions of each sequence, this step's rows included; `[num_seqs]`.
    pub context_lens: Vec<u32>,
    /// Leading positions of each sequence that belong to its source, 0 without an encoder; `[num_seqs]`.
    pub source_lens: Vec<u32>,
    /// Where the recurrent state of each sequence is, `[num_seqs]`, no two the same; empty for models that have none.
    pub state_slots: Vec<u32>,
    /// Blocks of all sequences, one after the other; [`Self::NO_BLOCK`] where no row reaches.
    pub block_tables: Vec<u32>,
    /// First entry of each sequence in `block_tables`, then their number; `[num_seqs + 1]`.
    pub block_offsets: Vec<u32>,
}

/// The lists of a batch with what the ops of a step have found out about them: that they fit a cache, and where on a device they
/// are. Whoever may change the lists makes that forgotten; a copy of the batch has none of it.
#[derive(Default)]
pub struct PagedBatch {
    lists: BatchLists,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// What was checked and found good: one for each kind of layer.
    checked: Vec<Checked>,
    #[cfg(feature = "cuda")]
    on_device: Option<std::sync::Arc<crate::cuda::batch::DeviceBatch>>,
}

/// All that [`PagedBatch::check`] looks at beside the lists.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Checked {
    num_rows: usize,
    block_size: usize,
    num_blocks: usize,
    reach: Reach,
}

impl From<BatchLists> for PagedBatch {
    fn from(lists: BatchLists) -> Self {
        Self { lists, known: Mutex::default() }
    }
}

impl Deref for PagedBatch {
    type Target = BatchLists;

    fn deref(&self) -> &BatchLists {
        &self.lists
    }
}

impl DerefMut for PagedBatch {
    fn deref_mut(&mut self) -> &mut BatchLists {
        *self.known.get_mut().unwrap_or_else(PoisonError::into_inner) = Known::default();
        &mut self.lists
    }
}

impl Clone for PagedBatch {
    fn clone(&self) -> Self {
        self.lists.clone().into()
    }
}

impl PartialEq for PagedBatch {
    fn eq(&self, other: &Self) -> bool {
        self.lists == other.lists
    }
}

impl Eq for PagedBatch {}

impl fmt::Debug for PagedBatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lists.fmt(formatter)
    }
}

impl PagedBatch {
    /// Stands in a block table for a block that the sequence gave back.
    pub const NO_BLOCK: u32 = u32::MAX;

    /// On a device: what was copied before, unless the batch was changed since.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        &self,
        device: &candle_core::CudaDevice,
    ) -> candle_core::Result<std::sync::Arc<crate::cuda::batch::DeviceBatch>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.on_device.as_ref().filter(|found| found.is_on(device)) {
            return Ok(found.clone());
        }
        let made = std::sync::Arc::new(crate::cuda::batch::DeviceBatch::new(&self.lists, device)?);
        known.on_device = Some(made.clone());
        Ok(made)
    }

    /// Refuses a batch whose rows would read what does not exist, or nothing at all.
    pub(crate) fn check(&self, op: &'static str, num_rows: usize, cache: &PagedCache, reach: Reach) -> Result<()> {
        let (block_size, num_blocks) = (cache.block_size(), cache.num_blocks());
        let asked = Checked { num_rows, block_size, num_blocks, reach };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.checked.contains(&asked) {
            self.lists.check(op, asked)?;
            known.checked.push(asked);
        }
        Ok(())
    }
}

impl BatchLists {
    pub(crate) fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    /// Refuses a batch that does not describe `num_rows` rows of its sequences.
    pub(crate) fn check_rows(&self, op: &'static str, num_rows: usize) -> Result<()> {
        check_offsets(op, "cu_seqlens", &self.cu_seqlens, (self.num_seqs(), num_rows))?;
        check::length(op, "number of source lengths", self.source_lens.len(), self.num_seqs())?;
        for (seq_idx, &context_len) in self.context_lens.iter().enumerate() {
            let seq_rows = self.cu_seqlens[seq_idx + 1] - self.cu_seqlens[seq_idx];
            if seq_rows > context_len {
                let reason = format!("sequence {seq_idx} has {seq_rows} rows in a context of {context_len}");
                return Err(KernelError::Invalid { op, reason });
            }
        }
        Ok(())
    }

    /// Refuses a batch whose rows would read what does not exist, or nothing at all.
    fn check(&self, op: &'static str, wanted: Checked) -> Result<()> {
        let Checked { num_rows, block_size, num_blocks, reach } = wanted;
        self.check_rows(op, num_rows)?;
        check_offsets(op, "block_offsets", &self.block_offsets, (self.num_seqs(), self.block_tables.len()))?;
        for (seq_idx, (&context_len, &source_len)) in self.context_lens.iter().zip(&self.source_lens).enumerate() {
            let reaches_something = match reach {
                Reach::Source => (1..=context_len).contains(&source_len),
                _ => source_len <= context_len - self.seq_rows(seq_idx).len() as u32,
            };
            if !reaches_something {
                let reason = format!("sequence {seq_idx} has a source of {source_len} in a context of {context_len}");
                return Err(KernelError::Invalid { op, reason });
            }
            let num_held = (self.block_offsets[seq_idx + 1] - self.block_offsets[seq_idx]) as usize;
            if num_held * block_size < context_len as usize {
                let reason = format!("sequence {seq_idx} has {num_held} blocks for a context of {context_len}");
                return Err(KernelError::Invalid { op, reason });
            }
            let first_row = context_len as usize - self.seq_rows(seq_idx).len();
            let first_seen = reach.start(first_row, source_len as usize) / block_size;
            for (idx, &block) in self.block_table(seq_idx).iter().enumerate() {
                if block != PagedBatch::NO_BLOCK || idx >= first_seen {
                    check::below(op, "block", block as usize, num_blocks)?;
                }
            }
        }
        Ok(())
    }

    /// The rows of a sequence of a checked batch.
    pub(crate) fn seq_rows(&self, seq_idx: usize) -> Range<usize> {
        self.cu_seqlens[seq_idx] as usize..self.cu_seqlens[seq_idx + 1] as usize
    }

    /// Whether nothing of the sequence was computed before, its source apart.
    pub(crate) fn is_first(&self, seq_idx: usize) -> bool {
        self.context_lens[seq_idx] as usize - self.seq_rows(seq_idx).len() == self.source_lens[seq_idx] as usize
    }

    /// The blocks of a sequence of a checked batch.
    pub(crate) fn block_table(&self, seq_idx: usize) -> &[u32] {
        &self.block_tables[self.block_offsets[seq_idx] as usize..self.block_offsets[seq_idx + 1] as usize]
    }
}

/// Offsets of `shape.0` parts must rise from 0 to `shape.1`.
fn check_offsets(op: &'static str, what: &'static str, offsets: &[u32], shape: (usize, usize)) -> Result<()> {
    let (num_parts, total) = shape;
    check::length(op, what, offsets.len(), num_parts + 1)?;
    let rises = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if rises && offsets[0] == 0 && offsets[num_parts] as usize == total {
        Ok(())
    } else {
        Err(KernelError::Invalid { op, reason: format!("{what} must rise from 0 to {total}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paged_cache::KvFormat;

    fn lists() -> BatchLists {
        BatchLists {
            cu_seqlens: vec![0, 2],
            context_lens: vec![6],
            source_lens: vec![0],
            block_tables: vec![0, 1],
            block_offsets: vec![0, 2],
            ..BatchLists::default()
        }
    }

    #[test]
    fn what_was_checked_is_forgotten_with_a_change() {
        let mut cache = PagedCache::new(KvFormat::F32, 4, 8, 2).unwrap();
        cache.add_slab().unwrap();
        let mut batch = PagedBatch::from(lists());
        for _ in 0..2 {
            batch.check("op", 2, &cache, Reach::Full).unwrap();
            assert!(batch.check("op", 3, &cache, Reach::Full).is_err());
        }
        let kept = batch.clone();
        batch.block_tables[1] = 2;
        assert!(batch != kept);
        assert!(batch.check("op", 2, &cache, Reach::Full).is_err());
        kept.check("op", 2, &cache, Reach::Full).unwrap();
        let empty = PagedCache::new(KvFormat::F32, 4, 8, 2).unwrap();
        assert!(kept.check("op", 2, &empty, Reach::Full).is_err());
    }
}
