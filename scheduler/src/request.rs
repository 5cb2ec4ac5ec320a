//! What a caller asks for.

use std::sync::Arc;

/// The caller's name for a request, unique among those the scheduler holds.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Ord, PartialOrd, Debug)]
pub struct RequestId(pub u64);

/// When a sequence ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopCriteria {
    /// Tokens to generate at most, at least 1; 0 is taken as 1, because a prompt's last row always samples.
    pub max_tokens: usize,
    /// Stop tokens among the first `min_tokens` generated ones do not end the sequence.
    pub min_tokens: usize,
    /// Tokens that end the sequence, end-of-sequence tokens included unless they are to be ignored.
    pub stop_token_ids: Vec<u32>,
}

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    /// Token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// Leading tokens of the prompt that an encoder reads: they are computed as one chunk, never cut, and the decoder's
    /// own tokens follow, at least one. 0 for models without an encoder.
    pub source_len: usize,
    pub stop: StopCriteria,
    /// Only requests of one salt share cached blocks.
    pub cache_salt: [u8; 32],
    /// Leading full blocks of the prompt that can be had from outside the pool, as far as the caller knows and if it is
    /// faster than computing them; 0 for none. See [`crate::Scheduler::can_load`].
    pub num_loadable: usize,
    /// Every position is to be computed, as its logits are wanted: cached blocks are given but not taken.
    pub computes_whole_prompt: bool,
}
