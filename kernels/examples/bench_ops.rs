//! Speed of the hot ops on this machine, beside a plain read of memory:
//! `cargo run --release -p moesaic-kernels --example bench_ops [linear|experts|attention|small|gated_delta]..`.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{Device, Tensor};
use kernels::{
    DeltaSpec, DeltaWeights, Expert, ExpertWeights, GqaSpec, KvFormat, LearnedScores, MlaSpec, PackedWeight,
    PagedBatch, PagedCache, Reach, RopeStyle, RopeTable, RouterSpec, Scoring, StateCache, TopK, WeightFormat,
    gated_delta, grouped_swiglu, linear, mla_attention, paged_attention, pool, rms_norm_residual, rope, route,
};

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> AnyResult<()> {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    println!("{} threads, {}", pool::init(None), kernels::isa());
    bench_read();
    type Group = (&'static str, fn() -> AnyResult<()>);
    let groups: [Group; 5] = [
        ("linear", bench_linears),
        ("experts", bench_all_experts),
        ("attention", bench_attentions),
        ("small", bench_small_ops),
        ("gated_delta", bench_gated_deltas),
    ];
    for (name, bench) in groups {
        if chosen.is_empty() || chosen.iter().any(|chosen| chosen == name) {
            bench()?;
        }
    }
    Ok(())
}

fn bench_linears() -> AnyResult<()> {
    for (rows, cols) in [(576, 576), (2048, 2048), (49152, 576), (8192, 4096)] {
        for num_tokens in [1, 4, 32, 256] {
            if num_tokens * rows * cols < 1 << 31 {
                bench_linear(num_tokens, rows, cols)?;
            }
        }
    }
    Ok(())
}

fn bench_all_experts() -> AnyResult<()> {
    for shape in [[576, 1536, 8, 2], [1024, 512, 32, 8]] {
        for num_tokens in [1, 4, 32, 256] {
            bench_experts(num_tokens, shape)?;
        }
    }
    Ok(())
}

fn bench_gated_deltas() -> AnyResult<()> {
    for (num_seqs, rows) in [(1, 1), (8, 1), (1, 64)] {
        bench_gated_delta(num_seqs, rows)?;
    }
    Ok(())
}

/// Repeats for about a third of a second; the best time of a run in seconds.
fn best_time(mut run: impl FnMut() -> AnyResult<()>) -> AnyResult<f64> {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 5 || begin.elapsed().as_millis() < 300 {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}

fn report(name: &str, seconds: f64, bytes: usize, multiplications: usize) {
    let (gb, gflop) = (bytes as f64 / 1e9, 2.0 * multiplications as f64 / 1e9);
    println!("{name:<48} {:>10.2} us {:>7.1} GB/s {:>8.1} GFLOP/s", seconds * 1e6, gb / seconds, gflop / seconds);
}

/// Sums 256 MiB, which no cache of a small machine holds.
fn bench_read() {
    const PART: usize = 1 << 16;
    let words = vec![1u64; 32 << 20];
    let seconds = best_time(|| {
        pool::parallel_for(words.len() / PART, |task_idx| {
            let part = &words[task_idx * PART..(task_idx + 1) * PART];
            let (chunks, _) = part.as_chunks::<64>();
            let mut sums = [0u64; 64];
            for chunk in chunks {
                sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum |= word);
            }
            black_box(sums);
        });
        Ok(())
    });
    report("plain read of 256 MiB", seconds.unwrap_or(f64::INFINITY), words.len() * 8, 0);
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn tensor(dims: &[usize]) -> AnyResult<Tensor> {
    Ok(Tensor::from_vec(numbers(dims.iter().product()), dims, &Device::Cpu)?)
}

fn weight(rows: usize, cols: usize) -> AnyResult<PackedWeight> {
    Ok(PackedWeight::from_f32(WeightFormat::Bf16, rows, cols, &numbers(rows * cols))?)
}

fn bench_linear(num_tokens: usize, rows: usize, cols: usize) -> AnyResult<()> {
    // As many weights as a model has, so that they come from memory.
    let copies = ((128 << 20) / (rows * cols * 2)).clamp(1, 64);
    let weights: Vec<_> = (0..copies).map(|_| weight(rows, cols)).collect::<AnyResult<_>>()?;
    let x = tensor(&[num_tokens, cols])?;
    let seconds = best_time(|| {
        for weight in &weights {
            black_box(linear(&x, weight, None)?);
        }
        Ok(())
    })?;
    let name = format!("linear bf16 M={num_tokens} N={rows} K={cols}");
    report(&name, seconds / copies as f64, rows * cols * 2, num_tokens * rows * cols);
    Ok(())
}

fn bench_experts(num_tokens: usize, [hidden_size, intermediate, num_experts, k]: [usize; 4]) -> AnyResult<()> {
    const LAYERS: usize = 3;
    let expert = || {
        Ok(Expert::Glu(ExpertWeights::swiglu(
            weight(2 * intermediate, hidden_size)?,
            weight(hidden_size, intermediate)?,
        )))
    };
    let layers: Vec<Vec<_>> =
        (0..LAYERS).map(|_| (0..num_experts).map(|_| expert()).collect()).collect::<AnyResult<_>>()?;
    let chosen: Vec<u32> =
        (0..num_tokens).flat_map(|token| (0..k).map(move |slot| ((token * 5 + slot) % num_experts) as u32)).collect();
    let topk = TopK { weights: vec![1.0 / k as f32; chosen.len()], experts: chosen, k };
    let x = tensor(&[num_tokens, hidden_size])?;
    let seconds = best_time(|| {
        for experts in &layers {
            black_box(grouped_swiglu(&x, experts, &topk)?);
        }
        Ok(())
    })?;
    let in_use = (0..num_experts as u32).filter(|expert| topk.experts.contains(expert)).count();
    let name = format!("experts bf16 M={num_tokens} H={hidden_size} I={intermediate} top {k} of {num_experts}");
    let expert_size = 3 * hidden_size * intermediate;
    report(&name, seconds / LAYERS as f64, in_use * expert_size * 2, num_tokens * k * expert_size);
    Ok(())
}

/// Prefill of 512 tokens and decode of 1 and 16 sequences: the heads of granite-1b and olmoe, and DeepSeek's latent.
fn bench_attentions() -> AnyResult<()> {
    let gqa =
        |num_heads, num_kv_heads, head_dim| Heads { num_heads, num_kv_heads, key_dim: head_dim, is_latent: false };
    let latent = Heads { num_heads: 16, num_kv_heads: 1, key_dim: LATENT + LATENT_ROPE, is_latent: true };
    for heads in [gqa(16, 8, 64), gqa(16, 16, 128), latent] {
        for format in [KvFormat::Bf16, KvFormat::F32] {
            for (num_seqs, rows, context_len) in [(1, 64, 512), (1, 512, 512), (1, 1, 512), (1, 1, 8192), (16, 1, 2048)]
            {
                bench_attention(&heads, format, [num_seqs, rows, context_len])?;
            }
        }
    }
    Ok(())
}

const LATENT: usize = 512;
const LATENT_ROPE: usize = 64;

struct Heads {
    num_heads: usize,
    num_kv_heads: usize,
    key_dim: usize,
    /// Keys are a latent, whose values are its first part, and a rotary key.
    is_latent: bool,
}

fn bench_attention(heads: &Heads, format: KvFormat, [num_seqs, rows, context_len]: [usize; 3]) -> AnyResult<()> {
    let &Heads { num_heads, num_kv_heads, key_dim, is_latent } = heads;
    let (width, value_dim) = if is_latent { (key_dim, LATENT) } else { (2 * num_kv_heads * key_dim, key_dim) };
    let num_blocks = num_seqs * context_len / 16;
    let mut cache = PagedCache::new(format, 16, width, num_blocks)?;
    cache.add_slab()?;
    let num_slots = num_seqs * context_len;
    cache.write(&tensor(&[num_slots, width])?, &(0..num_slots as u32).collect::<Vec<_>>())?;
    let batch = PagedBatch {
        cu_seqlens: (0..=num_seqs).map(|seq| (seq * rows) as u32).collect(),
        context_lens: vec![context_len as u32; num_seqs],
        source_lens: vec![0; num_seqs],
        state_slots: Vec::new(),
        block_tables: (0..num_blocks as u32).collect(),
        block_offsets: (0..=num_seqs).map(|seq| (seq * context_len / 16) as u32).collect(),
    };
    let num_rows = num_seqs * rows;
    let (q, q_latent) = (tensor(&[num_rows, num_heads, key_dim])?, tensor(&[num_rows, num_heads, LATENT])?);
    let q_rope = tensor(&[num_rows, num_heads, LATENT_ROPE])?;
    let gqa = GqaSpec { num_heads, num_kv_heads, head_dim: key_dim, scale: 0.125, reach: Reach::Full };
    let mla = MlaSpec { num_heads, latent_dim: LATENT, rope_dim: LATENT_ROPE, scale: 0.07 };
    let seconds = best_time(|| {
        black_box(match is_latent {
            true => mla_attention(&q_latent, &q_rope, &cache, &batch, &mla)?,
            false => paged_attention(&q, &cache, &batch, &gqa, LearnedScores::default())?,
        });
        Ok(())
    })?;
    let pairs = num_seqs * (rows * context_len - rows * (rows - 1) / 2);
    let name = format!(
        "attention {} {num_heads}/{num_kv_heads}x{key_dim} seqs={num_seqs} rows={rows} context={context_len}",
        format.name(),
    );
    report(&name, seconds, num_slots * width * format.element_bytes(), pairs * num_heads * (key_dim + value_dim));
    Ok(())
}

/// Ops that only have to stay out of the way, with the sizes of granite-1b.
fn bench_small_ops() -> AnyResult<()> {
    let seconds = best_time(|| {
        for _ in 0..1000 {
            pool::parallel_for(pool::num_threads(), |task_idx| {
                black_box(task_idx);
            });
        }
        Ok(())
    })?;
    report("parallel_for of nothing", seconds / 1000.0, 0, 0);
    let angles = numbers(4096 * 32);
    let table = RopeTable::new(angles.clone(), angles, 64)?;
    for rows in [1, 16, 512] {
        let positions: Vec<u32> = (0..rows as u32).collect();
        let (x, weight) = (tensor(&[rows, 1024])?, tensor(&[1024])?);
        let q = tensor(&[rows, 16, 64])?;
        let logits = tensor(&[rows, 32])?;
        let spec = RouterSpec::new(Scoring::SoftmaxTopK, 8);
        let measure = |name: &str, bytes: usize, op: &dyn Fn() -> AnyResult<()>| -> AnyResult<()> {
            let seconds = best_time(|| (0..20).try_for_each(|_| op()))?;
            report(&format!("{name} rows={rows}"), seconds / 20.0, bytes, 0);
            Ok(())
        };
        measure("rope 16x64", 8 * rows * 1024, &|| {
            black_box(rope(&q, &table, &positions, RopeStyle::Halves)?);
            Ok(())
        })?;
        measure("rms_norm_residual 1024", 16 * rows * 1024, &|| {
            black_box(rms_norm_residual(&x, &x, &weight, 1e-6)?);
            Ok(())
        })?;
        measure("route 8 of 32", 4 * rows * 32, &|| {
            black_box(route(&logits, &spec)?);
            Ok(())
        })?;
    }
    Ok(())
}

/// Qwen3-Next's heads, each sequence with so many rows.
fn bench_gated_delta(num_seqs: usize, rows: usize) -> AnyResult<()> {
    let spec = DeltaSpec {
        num_key_heads: 16,
        num_value_heads: 32,
        key_dim: 128,
        value_dim: 128,
        conv_kernel: 4,
        activation: kernels::Pointwise::Silu,
    };
    let (channels, heads) = (spec.num_channels(), spec.num_value_heads);
    let weights = DeltaWeights::new(spec, vec![0.1; channels * 4], &vec![0.0; heads], vec![0.0; heads])?;
    let mut states = StateCache::new(spec.state_width(), num_seqs)?;
    let batch = PagedBatch {
        cu_seqlens: (0..=num_seqs).map(|seq| (seq * rows) as u32).collect(),
        context_lens: vec![rows as u32 + 1; num_seqs],
        source_lens: vec![0; num_seqs],
        state_slots: (0..num_seqs as u32).collect(),
        ..PagedBatch::default()
    };
    let (qkv, gates) = (tensor(&[num_seqs * rows, channels])?, tensor(&[num_seqs * rows, 2 * heads])?);
    let seconds = best_time(|| {
        black_box(gated_delta(&qkv, &gates, &weights, &mut states, &batch)?);
        Ok(())
    })?;
    // Each row decays and reads a state, then corrects and reads it again: four multiplications per number of it.
    let (num_rows, state) = (num_seqs * rows, heads * 128 * 128);
    report(
        &format!("gated_delta 32x128x128 seqs={num_seqs} rows={rows}"),
        seconds,
        num_rows * state * 16,
        num_rows * state * 4,
    );
    Ok(())
}
