//! What a step left behind for others: the full blocks that were computed, by name.

use crate::kv::{BlockHash, BlockHashes, BlockId};
use crate::request::RequestId;

/// A full block whose last token was computed in the step that was completed last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputedBlock {
    /// Whose rows filled it.
    pub id: RequestId,
    /// Which of that sequence's blocks it is.
    pub idx: usize,
    /// Equal names stand for equal tokens, with equal ones before them, of one salt and under one fingerprint.
    pub name: [u8; 32],
    /// Where it is, until the next step is scheduled.
    pub block: BlockId,
}

/// The names of the full blocks of a prompt, as [`ComputedBlock::name`] will say them where `fingerprint` is that of
/// [`crate::SchedulerConfig::prefix_cache`].
pub fn block_names(fingerprint: &[u8; 32], salt: &[u8; 32], block_size: usize, tokens: &[u32]) -> Vec<[u8; 32]> {
    let mut names = BlockHashes::new(block_size, BlockHash::root(fingerprint, salt));
    names.extend(tokens);
    names.as_slice().iter().map(|name| name.bytes()).collect()
}
