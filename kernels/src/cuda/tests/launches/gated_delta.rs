//! Gated DeltaNet.

use candle_core::{DType, Device};

use super::{DEVICE, F32_TOLERANCE, assert_same, moved, on_both};
use crate::ops::gated_delta::{DeltaSpec, DeltaWeights, gated_delta};
use crate::ops::pointwise::Pointwise;
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::state_cache::StateCache;
use crate::testing::{Numbers, assert_close};

const NUM_SLOTS: usize = 5;

fn specs() -> [DeltaSpec; 4] {
    let spec = |num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel| DeltaSpec {
        num_key_heads,
        num_value_heads,
        key_dim,
        value_dim,
        conv_kernel,
        activation: Pointwise::Silu,
    };
    [
        spec(2, 4, 16, 40, 4),
        DeltaSpec { activation: Pointwise::Relu, ..spec(1, 3, 5, 7, 1) },
        // Wide keys, and more channels than a block has threads.
        spec(1, 2, 131, 33, 7),
        spec(1, 2, 128, 64, 4),
    ]
}

fn weights(numbers: &mut Numbers, spec: DeltaSpec) -> DeltaWeights {
    let conv = numbers.normal(spec.num_channels() * spec.conv_kernel);
    let a_log: Vec<f32> = numbers.normal(spec.num_value_heads).iter().map(|value| value * 0.5 - 1.0).collect();
    let mut dt_bias = numbers.normal(spec.num_value_heads);
    dt_bias[0] = 25.0;
    DeltaWeights::new(spec, conv, &a_log, dt_bias).unwrap()
}

/// Sequences by their state, rows before this step and rows of it.
fn batch(sequences: &[(u32, u32, u32)]) -> PagedBatch {
    let mut batch = BatchLists { cu_seqlens: vec![0], ..BatchLists::default() };
    for &(slot, before, num_rows) in sequences {
        batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + num_rows);
        batch.context_lens.push(before + num_rows + 2);
        batch.source_lens.push(2);
        batch.state_slots.push(slot);
    }
    batch.into()
}

#[test]
fn steps_are_those_of_the_cpu() {
    let mut numbers = Numbers::new(60);
    for spec in specs() {
        let weights = weights(&mut numbers, spec);
        for case in 0..2 {
            let left = numbers.normal(NUM_SLOTS * spec.state_width());
            let [mut states, mut device_states] = [&Device::Cpu, &*DEVICE].map(|device| {
                let mut states = StateCache::on(device, spec.state_width(), NUM_SLOTS).unwrap();
                states.fill(&left);
                states
            });
            // Sequences begin, then one goes on beside one without rows and a new one.
            for sequences in [&[(3, 0, 1), (1, 0, 38)][..], &[(1, 38, 5), (3, 1, 0), (0, 0, 9)]] {
                let batch = batch(sequences);
                let num_rows = batch.cu_seqlens[sequences.len()] as usize;
                let qkv = numbers.tensor(&[num_rows, spec.num_channels()]);
                let gates = numbers.tensor(&[num_rows, 2 * spec.num_value_heads]);
                let (qkv, device_qkv, tolerance) = on_both(&qkv)[case].clone();
                let (gates, device_gates, _) = on_both(&gates)[case].clone();
                let expected = gated_delta(&qkv, &gates, &weights, &mut states, &batch).unwrap();
                let found = gated_delta(&device_qkv, &device_gates, &weights, &mut device_states, &batch).unwrap();
                assert_same(&found, &expected, (device_qkv.dtype(), tolerance));
                assert_close(&device_states.read(), &states.read(), F32_TOLERANCE);
            }
        }
    }
}

#[test]
fn no_rows_give_none() {
    let mut numbers = Numbers::new(62);
    let spec = specs()[0];
    let weights = weights(&mut numbers, spec);
    let [qkv, gates] = [spec.num_channels(), 2 * spec.num_value_heads]
        .map(|width| moved(&numbers.tensor(&[1, width])).narrow(0, 0, 0).unwrap());
    let mut states = StateCache::on(&DEVICE, spec.state_width(), 1).unwrap();
    states.fill(&vec![3.0; spec.state_width()]);
    for sequences in [&[][..], &[(0, 5, 0)]] {
        let found = gated_delta(&qkv, &gates, &weights, &mut states, &batch(sequences)).unwrap();
        assert_eq!(found.dims(), [0, 160]);
        assert!(states.read().iter().all(|&value| value == 3.0));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut numbers = Numbers::new(61);
    let spec = specs()[0];
    let (weights, batch) = (weights(&mut numbers, spec), batch(&[(0, 0, 2)]));
    let (qkv, gates) = (numbers.tensor(&[2, spec.num_channels()]), numbers.tensor(&[2, 2 * spec.num_value_heads]));
    let mut states = StateCache::on(&DEVICE, spec.state_width(), 1).unwrap();
    let mut on_cpu = StateCache::new(spec.state_width(), 1).unwrap();
    let (qkv, gates, host_qkv, host_gates) = (moved(&qkv), moved(&gates), qkv, gates);
    assert!(gated_delta(&qkv, &gates, &weights, &mut states, &batch).is_ok());
    assert!(gated_delta(&qkv, &gates, &weights, &mut on_cpu, &batch).is_err());
    assert!(gated_delta(&host_qkv, &host_gates, &weights, &mut states, &batch).is_err());
    assert!(gated_delta(&qkv, &host_gates, &weights, &mut states, &batch).is_err());
    assert!(gated_delta(&qkv, &gates.to_dtype(DType::BF16).unwrap(), &weights, &mut states, &batch).is_err());
    let wide = DeltaSpec { key_dim: 257, ..spec };
    let weights = self::weights(&mut numbers, wide);
    let qkv = moved(&numbers.tensor(&[2, wide.num_channels()]));
    let mut states = StateCache::on(&DEVICE, wide.state_width(), 1).unwrap();
    assert!(gated_delta(&qkv, &gates, &weights, &mut states, &batch).is_err());
}
