//! Oracle of attention: one row and head at a time, f64 sums.

use half::bf16;

use super::Attention;
use crate::memory::view;
use crate::paged_cache::KvFormat;

pub(crate) fn forward(op: &Attention<'_>) -> Vec<f32> {
    let (heads, batch) = (op.heads, op.batch);
    let num_tokens = batch.cu_seqlens.last().map_or(0, |&rows| rows as usize);
    let mut out = Vec::with_capacity(num_tokens * heads.num_heads * heads.value_dim);
    for seq_idx in 0..batch.num_seqs() {
        let rows = batch.cu_seqlens[seq_idx] as usize..batch.cu_seqlens[seq_idx + 1] as usize;
        let first_position = batch.context_lens[seq_idx] as usize - rows.len();
        for (row_idx, row) in rows.enumerate() {
            let position = first_position + row_idx;
            for head in 0..heads.num_heads {
                out.extend(attend(op, (seq_idx, row, position), head));
            }
        }
    }
    out
}

fn attend(op: &Attention<'_>, (seq_idx, row, position): (usize, usize, usize), head: usize) -> Vec<f32> {
    let (heads, kv_head) = (op.heads, head / op.heads.group_size);
    let mut query = vec![0.0; heads.key_dim];
    op.gather_query(row, head, &mut query);
    let context: Vec<Vec<f64>> = op
        .visible(seq_idx, position)
        .map(|position| cache_row(op, slot(op, op.batch.block_table(seq_idx), position)))
        .collect();
    let key_start = heads.key_start + kv_head * heads.key_dim;
    let value_start = heads.value_start + kv_head * heads.value_dim;
    let score = |row: &Vec<f64>| {
        let key = &row[key_start..key_start + heads.key_dim];
        query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum::<f64>() * f64::from(op.scale)
    };
    let bias = |key: usize| {
        op.learned.position_bias.map_or(0.0, |bias| {
            let limit = bias.max_distance as i64;
            let distance = (key as i64 - position as i64).clamp(-limit, limit);
            f64::from(bias.table[head * (2 * bias.max_distance + 1) + (distance + limit) as usize])
        })
    };
    let scores: Vec<f64> =
        context.iter().zip(op.visible(seq_idx, position)).map(|(row, key)| score(row) + bias(key)).collect();
    let sink = op.learned.sinks.map(|sinks| f64::from(sinks[head]));
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum = exps.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
    (0..heads.value_dim)
        .map(|i| exps.iter().zip(&context).map(|(exp, row)| exp * row[value_start + i]).sum::<f64>() / sum)
        .map(|value| value as f32)
        .collect()
}

fn slot(op: &Attention<'_>, block_table: &[u32], position: usize) -> usize {
    let block_size = op.cache.block_size();
    block_table[position / block_size] as usize * block_size + position % block_size
}

fn cache_row(op: &Attention<'_>, slot: usize) -> Vec<f64> {
    let bytes = op.cache.row_bytes(slot);
    match op.cache.format() {
        KvFormat::F32 => view::<f32>(bytes).iter().map(|&value| f64::from(value)).collect(),
        KvFormat::Bf16 => view::<bf16>(bytes).iter().map(|value| value.to_f64()).collect(),
    }
}
