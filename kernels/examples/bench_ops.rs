//! Speed of the hot ops on this machine, beside a plain read of memory: `cargo run --release --example bench_ops`.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{Device, Tensor};
use kernels::{
    DeltaSpec, DeltaWeights, Expert, ExpertWeights, GqaSpec, KvFormat, LearnedScores, PackedWeight, PagedBatch,
    PagedCache, Reach, StateCache, TopK, WeightFormat, gated_delta, grouped_swiglu, linear, paged_attention, pool,
};

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> AnyResult<()> {
    println!("{} threads, {}", pool::init(None), kernels::isa());
    bench_read();
    for (rows, cols) in [(576, 576), (2048, 2048), (49152, 576), (8192, 4096)] {
        for num_tokens in [1, 4, 32, 256] {
            if num_tokens * rows * cols < 1 << 31 {
                bench_linear(num_tokens, rows, cols)?;
            }
        }
    }
    for shape in [[576, 1536, 8, 2], [1024, 512, 32, 8]] {
        for num_tokens in [1, 4, 32, 256] {
            bench_experts(num_tokens, shape)?;
        }
    }
    for (rows, context_len) in [(1, 1024), (256, 1024)] {
        bench_attention(rows, context_len)?;
    }
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
    println!("{name:<48} {:>10.1} us {:>7.1} GB/s {:>8.1} GFLOP/s", seconds * 1e6, gb / seconds, gflop / seconds);
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

fn bench_attention(rows: usize, context_len: usize) -> AnyResult<()> {
    let spec = GqaSpec { num_heads: 9, num_kv_heads: 3, head_dim: 64, scale: 0.125, reach: Reach::Full };
    let width = 2 * spec.num_kv_heads * spec.head_dim;
    let num_blocks = context_len / 16;
    let mut cache = PagedCache::new(KvFormat::F32, 16, width, num_blocks)?;
    cache.add_slab()?;
    cache.write(&tensor(&[context_len, width])?, &(0..context_len as u32).collect::<Vec<_>>())?;
    let batch = PagedBatch {
        cu_seqlens: vec![0, rows as u32],
        context_lens: vec![context_len as u32],
        source_lens: vec![0],
        state_slots: Vec::new(),
        block_tables: (0..num_blocks as u32).collect(),
        block_offsets: vec![0, num_blocks as u32],
    };
    let q = tensor(&[rows, spec.num_heads, spec.head_dim])?;
    let seconds = best_time(|| {
        black_box(paged_attention(&q, &cache, &batch, &spec, LearnedScores::default())?);
        Ok(())
    })?;
    let pairs = rows * context_len - rows * (rows - 1) / 2;
    let name = format!("attention f32 rows={rows} context={context_len} 9/3x64");
    report(&name, seconds, context_len * width * 4, pairs * spec.num_heads * 2 * spec.head_dim);
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
