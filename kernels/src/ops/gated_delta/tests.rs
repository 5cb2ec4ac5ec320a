//! Parity with the oracle, the same bits however the rows are cut and mixed, and refused inputs.

use candle_core::Tensor;

use super::{DeltaSpec, DeltaWeights, Pointwise, gated_delta, reference};
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::state_cache::StateCache;
use crate::testing::{Numbers, assert_close, bits, tensor, values};

fn specs() -> Vec<DeltaSpec> {
    let spec = |num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel| DeltaSpec {
        num_key_heads,
        num_value_heads,
        key_dim,
        value_dim,
        conv_kernel,
        activation: Pointwise::Silu,
    };
    vec![
        spec(2, 4, 16, 16, 4),
        spec(2, 2, 24, 20, 3),
        DeltaSpec { activation: Pointwise::Relu, ..spec(1, 3, 5, 7, 1) },
        spec(4, 8, 128, 128, 4),
    ]
}

/// Sequences with their inputs.
struct World {
    weights: DeltaWeights,
    /// `qkv` and gates of each sequence.
    sequences: Vec<[Tensor; 2]>,
}

const LENS: [usize; 3] = [1, 23, 9];

impl World {
    fn new(numbers: &mut Numbers, spec: DeltaSpec) -> Self {
        let (channels, heads) = (spec.num_channels(), spec.num_value_heads);
        let conv = numbers.normal(channels * spec.conv_kernel);
        let a_log: Vec<f32> = numbers.normal(heads).iter().map(|value| value * 0.5 - 1.0).collect();
        let mut dt_bias = numbers.normal(heads);
        dt_bias[0] = 25.0;
        let weights = DeltaWeights::new(spec, conv, &a_log, dt_bias).unwrap();
        let inputs = |len: usize| [numbers.tensor(&[len, channels]), numbers.tensor(&[len, 2 * heads])];
        Self { weights, sequences: LENS.map(inputs).into() }
    }

    /// Runs the rows `first..end` of some sequences together; sequence `i` has its state in slot `2 - i`.
    fn run(&self, states: &mut StateCache, chunks: &[(usize, usize, usize)]) -> Tensor {
        let mut batch = BatchLists { cu_seqlens: vec![0], ..BatchLists::default() };
        let part = |input: usize| {
            let parts: Vec<Tensor> = chunks
                .iter()
                .map(|&(seq, first, end)| self.sequences[seq][input].narrow(0, first, end - first).unwrap())
                .collect();
            Tensor::cat(&parts, 0).unwrap()
        };
        for &(seq, first, end) in chunks {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (end - first) as u32);
            batch.context_lens.push(end as u32);
            batch.source_lens.push(0);
            batch.state_slots.push(2 - seq as u32);
        }
        gated_delta(&part(0), &part(1), &self.weights, states, &batch.into()).unwrap()
    }

    fn states(&self) -> StateCache {
        let mut states = StateCache::new(self.weights.spec.state_width(), 3).unwrap();
        // What another sequence left behind.
        states.states_mut().fill(3.0);
        states
    }
}

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for spec in specs() {
        let world = World::new(&mut numbers, spec);
        for (seq, [qkv, gates]) in world.sequences.iter().enumerate() {
            let y = world.run(&mut world.states(), &[(seq, 0, LENS[seq])]);
            assert_eq!(y.dims(), [LENS[seq], spec.num_value_heads * spec.value_dim]);
            let expected = reference::gated_delta(&values(qkv), &values(gates), &world.weights);
            assert_close(&values(&y), &expected, 5e-6);
        }
    }
}

#[test]
fn rows_do_not_depend_on_cuts_or_company() {
    let mut numbers = Numbers::new(2);
    for spec in specs() {
        let world = World::new(&mut numbers, spec);
        let alone: Vec<Vec<u32>> =
            (0..3).map(|seq| bits(&world.run(&mut world.states(), &[(seq, 0, LENS[seq])]))).collect();
        let together = bits(&world.run(&mut world.states(), &[(0, 0, 1), (1, 0, 23), (2, 0, 9)]));
        assert!(together == alone.concat(), "{spec:?} together");
        for len in [1, 2, 3, 5, 8] {
            let mut states = world.states();
            let mut pieces = vec![Vec::new(); 3];
            for first in (0..23).step_by(len) {
                let chunks: Vec<_> = (0..3)
                    .filter(|&seq| first < LENS[seq])
                    .map(|seq| (seq, first, LENS[seq].min(first + len)))
                    .collect();
                let mut rows = bits(&world.run(&mut states, &chunks)).into_iter();
                for (seq, first, end) in chunks {
                    pieces[seq].extend(rows.by_ref().take((end - first) * spec.num_value_heads * spec.value_dim));
                }
            }
            assert!(pieces == alone, "{spec:?} in pieces of {len}");
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let spec = specs()[0];
    let world = World::new(&mut Numbers::new(3), spec);
    let [qkv, gates] = &world.sequences[2];
    let good = PagedBatch::from(BatchLists {
        cu_seqlens: vec![0, 4, 9],
        context_lens: vec![4, 5],
        source_lens: vec![0, 0],
        state_slots: vec![2, 0],
        ..BatchLists::default()
    });
    let run = |qkv: &Tensor, batch: &PagedBatch, width| {
        gated_delta(qkv, gates, &world.weights, &mut StateCache::new(width, 3).unwrap(), batch)
    };
    assert!(run(qkv, &good, spec.state_width()).is_ok());
    assert!(run(qkv, &good, spec.state_width() + 1).is_err());
    assert!(run(&tensor(&[0.0; 9], &[9, 1]), &good, spec.state_width()).is_err());
    for state_slots in [vec![0, 3], vec![1, 1], vec![0]] {
        assert!(
            run(qkv, &PagedBatch::from(BatchLists { state_slots, ..BatchLists::clone(&good) }), spec.state_width())
                .is_err()
        );
    }
    assert!(
        run(
            qkv,
            &PagedBatch::from(BatchLists { cu_seqlens: vec![0, 4, 8], ..BatchLists::clone(&good) }),
            spec.state_width()
        )
        .is_err()
    );
    let new = |spec, len| DeltaWeights::new(spec, vec![0.0; len], &[0.0; 4], vec![0.0; 4]);
    assert!(new(spec, spec.num_channels() * 4).is_ok());
    assert!(new(spec, 3).is_err());
    assert!(new(DeltaSpec { num_key_heads: 3, ..spec }, spec.num_channels() * 4).is_err());
    assert!(new(DeltaSpec { conv_kernel: 0, ..spec }, 0).is_err());
}
