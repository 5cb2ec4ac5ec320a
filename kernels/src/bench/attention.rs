//! Attention over the paged cache: decode of one and of many sequences, and prefill.

use std::hint::black_box;

use super::MatrixUnit;
use super::models::{DEEPSEEK_V2_LITE, LatentModel, MODELS, Model};
use super::session::{Session, Work};
use crate::error::Result;
use crate::ops::mla_attention::{MlaSpec, mla_attention};
use crate::ops::paged_attention::{GqaSpec, LearnedScores, Reach, paged_attention};
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::paged_cache::{KvFormat, PagedCache};

pub(super) const PAGED_ATTENTION: &str = "paged_attention";
pub(super) const MLA_ATTENTION: &str = "mla_attention";

const BLOCK_SIZE: usize = 16;
const FORMATS: [KvFormat; 2] = [KvFormat::F32, KvFormat::Bf16];

/// Rows of a step: so many sequences with the same context.
#[derive(Clone, Copy)]
struct Step {
    num_seqs: usize,
    rows: usize,
    context_len: usize,
}

const STEPS: [Step; 3] = [
    Step { num_seqs: 1, rows: 1, context_len: 1024 },
    Step { num_seqs: 32, rows: 1, context_len: 1024 },
    Step { num_seqs: 1, rows: 512, context_len: 512 },
];

impl Step {
    fn num_rows(self) -> usize {
        self.num_seqs * self.rows
    }

    /// Pairs of a row and a position that it sees.
    fn num_pairs(self) -> usize {
        self.num_seqs * (self.rows * self.context_len - self.rows * (self.rows - 1) / 2)
    }

    fn blocks_per_seq(self) -> usize {
        self.context_len.div_ceil(BLOCK_SIZE)
    }

    /// Sequences whose blocks were read longest ago.
    fn batch(self, call: usize, num_blocks: usize) -> PagedBatch {
        let per_step = self.num_seqs * self.blocks_per_seq();
        let first = call % (num_blocks / per_step) * per_step;
        let ends = |step: usize| (0..=self.num_seqs).map(|seq| (seq * step) as u32).collect();
        let lists = BatchLists {
            cu_seqlens: ends(self.rows),
            context_lens: vec![self.context_len as u32; self.num_seqs],
            source_lens: vec![0; self.num_seqs],
            block_tables: (first as u32..(first + per_step) as u32).collect(),
            block_offsets: ends(self.blocks_per_seq()),
            ..BatchLists::default()
        };
        lists.into()
    }
}

pub(super) fn measure(session: &mut Session<'_>) -> Result<()> {
    for format in FORMATS {
        for model in MODELS {
            if session.wants(PAGED_ATTENTION) {
                measure_gqa(session, model, format)?;
            }
        }
    }
    for format in FORMATS {
        if session.wants(MLA_ATTENTION) {
            measure_mla(session, &DEEPSEEK_V2_LITE, format)?;
        }
    }
    Ok(())
}

/// A cache full of numbers; `None` if the memory does not hold one step.
fn full_cache(session: &mut Session<'_>, what: &str, format: KvFormat, width: usize) -> Result<Option<PagedCache>> {
    let step_blocks = STEPS.iter().map(|step| step.num_seqs * step.blocks_per_seq()).max().unwrap_or(1);
    let slab_tokens = step_blocks * BLOCK_SIZE;
    let Some(num_slabs) = session.num_copies(what, slab_tokens * width * format.element_bytes()) else {
        return Ok(None);
    };
    let mut cache = PagedCache::on(session.device(), format, BLOCK_SIZE, width, step_blocks)?;
    let rows = session.activations(&[slab_tokens, width])?;
    for slab in 0..num_slabs {
        cache.add_slab()?;
        let slots: Vec<u32> = (slab * slab_tokens..(slab + 1) * slab_tokens).map(|slot| slot as u32).collect();
        cache.write(&rows, &slots)?;
    }
    Ok(Some(cache))
}

fn measure_gqa(session: &mut Session<'_>, model: &Model, format: KvFormat) -> Result<()> {
    let Model { name, num_heads, num_kv_heads, head_dim, .. } = *model;
    let heads = format!("{name} {num_heads}/{num_kv_heads}x{head_dim}");
    let what = format!("{PAGED_ATTENTION} {heads} {}", format.name());
    session.begin(&what)?;
    let width = 2 * num_kv_heads * head_dim;
    let Some(cache) = full_cache(session, &what, format, width)? else { return Ok(()) };
    let spec = GqaSpec { num_heads, num_kv_heads, head_dim, scale: 0.125, reach: Reach::Full };
    for step in STEPS {
        let q = session.activations(&[step.num_rows(), num_heads, head_dim])?;
        let kv_bytes = step.num_seqs * step.context_len * width * format.element_bytes();
        let work = Work {
            op: PAGED_ATTENTION,
            shape: format!("{heads}, context {}", step.context_len),
            format: format.name(),
            num_tokens: step.num_rows(),
            bytes: kv_bytes,
            multiplications: step.num_pairs() * num_heads * 2 * head_dim,
            units: &[MatrixUnit::TensorBf16],
        };
        session.time(work, |call| {
            let batch = step.batch(call, cache.num_blocks());
            black_box(paged_attention(&q, &cache, &batch, &spec, LearnedScores::default())?);
            Ok(())
        })?;
    }
    Ok(())
}

fn measure_mla(session: &mut Session<'_>, model: &LatentModel, format: KvFormat) -> Result<()> {
    let LatentModel { name, num_heads, latent_dim, rope_dim, .. } = *model;
    let heads = format!("{name} {num_heads}x({latent_dim}+{rope_dim})");
    let what = format!("{MLA_ATTENTION} {heads} {}", format.name());
    session.begin(&what)?;
    let width = latent_dim + rope_dim;
    let Some(cache) = full_cache(session, &what, format, width)? else { return Ok(()) };
    let spec = MlaSpec { num_heads, latent_dim, rope_dim, scale: 0.07 };
    for step in STEPS {
        let q_latent = session.activations(&[step.num_rows(), num_heads, latent_dim])?;
        let q_rope = session.activations(&[step.num_rows(), num_heads, rope_dim])?;
        let kv_bytes = step.num_seqs * step.context_len * width * format.element_bytes();
        let work = Work {
            op: MLA_ATTENTION,
            shape: format!("{heads}, context {}", step.context_len),
            format: format.name(),
            num_tokens: step.num_rows(),
            bytes: kv_bytes,
            multiplications: step.num_pairs() * num_heads * (width + latent_dim),
            units: &[MatrixUnit::TensorBf16],
        };
        session.time(work, |call| {
            let batch = step.batch(call, cache.num_blocks());
            black_box(mla_attention(&q_latent, &q_rope, &cache, &batch, &spec)?);
            Ok(())
        })?;
    }
    Ok(())
}
