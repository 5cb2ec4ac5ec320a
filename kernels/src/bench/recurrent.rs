//! Gated DeltaNet at Qwen3-Next's heads: states of sequences, read and written.

use std::hint::black_box;

use super::session::{Session, Work};
use crate::error::Result;
use crate::ops::gated_delta::{DeltaSpec, DeltaWeights, gated_delta};
use crate::ops::pointwise::Pointwise;
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::state_cache::StateCache;

pub(super) const GATED_DELTA: &str = "gated_delta";

const SPEC: DeltaSpec = DeltaSpec {
    num_key_heads: 16,
    num_value_heads: 32,
    key_dim: 128,
    value_dim: 128,
    conv_kernel: 4,
    activation: Pointwise::Silu,
};

/// Sequences, and rows of each.
const STEPS: [(usize, usize); 3] = [(1, 1), (32, 1), (1, 64)];

pub(super) fn measure(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GATED_DELTA) {
        return Ok(());
    }
    session.begin(GATED_DELTA)?;
    let (channels, heads, state_bytes) = (SPEC.num_channels(), SPEC.num_value_heads, 4 * SPEC.state_width());
    // One step at least, and states of as many others as fit.
    let most_seqs = STEPS.iter().map(|step| step.0).max().unwrap_or(1);
    let Some(num_steps) = session.num_copies(GATED_DELTA, most_seqs * state_bytes) else { return Ok(()) };
    let num_slots = num_steps * most_seqs;
    let mut states = StateCache::on(session.device(), SPEC.state_width(), num_slots)?;
    let weights = DeltaWeights::new(SPEC, vec![0.1; channels * SPEC.conv_kernel], &vec![0.0; heads], vec![0.0; heads])?;
    for (num_seqs, rows) in STEPS {
        let num_tokens = num_seqs * rows;
        let (qkv, gates) =
            (session.activations(&[num_tokens, channels])?, session.activations(&[num_tokens, 2 * heads])?);
        let head_state = heads * SPEC.key_dim * SPEC.value_dim;
        let work = Work {
            op: GATED_DELTA,
            shape: format!("qwen3-next {heads}x{}x{}", SPEC.key_dim, SPEC.value_dim),
            format: "f32",
            num_tokens,
            bytes: num_seqs * state_bytes,
            // Each row decays and reads a state, then corrects and reads it again.
            multiplications: num_tokens * head_state * 4,
            units: &[],
        };
        session.time(work, |call| {
            let first = call * num_seqs % (num_slots / num_seqs * num_seqs);
            let lists = BatchLists {
                cu_seqlens: (0..=num_seqs).map(|seq| (seq * rows) as u32).collect(),
                context_lens: vec![rows as u32 + 1; num_seqs],
                source_lens: vec![0; num_seqs],
                state_slots: (first as u32..(first + num_seqs) as u32).collect(),
                ..BatchLists::default()
            };
            black_box(gated_delta(&qkv, &gates, &weights, &mut states, &PagedBatch::from(lists))?);
            Ok(())
        })?;
    }
    Ok(())
}
