//! Gated DeltaNet.

use std::cell::RefCell;

use emulator::{Argument, Launch};
use half::bf16;

use super::{
    Number, ROW_THREADS, SEEDS, assert_rounded, bits, for_activations, outputs_in, stored, tolerance, widened,
};
use crate::cuda::address::Address;
use crate::ops::gated_delta::arguments::{COLUMNS, CONV_ROWS, Delta, Sequences, recurrence};
use crate::ops::gated_delta::{DeltaSpec, DeltaWeights, gated_delta};
use crate::ops::pointwise::Pointwise;
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::state_cache::StateCache;
use crate::testing::{Numbers, assert_close, tensor, values};

/// The first and the last are nobody's.
const NUM_SLOTS: usize = 5;
/// Rows of each sequence.
const LENS: [usize; 3] = [1, 35, 9];

/// Where the lists of a batch are.
fn sequences(batch: &PagedBatch) -> Sequences {
    let of = |numbers: &Vec<u32>| Address::of_host(numbers.as_ptr());
    Sequences {
        cu_seqlens: of(&batch.cu_seqlens),
        context_lens: of(&batch.context_lens),
        source_lens: of(&batch.source_lens),
        state_slots: of(&batch.state_slots),
        num_seqs: batch.num_seqs() as u32,
    }
}

/// A layer, and the inputs of sequences.
struct World<T> {
    spec: DeltaSpec,
    conv: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    /// `qkv` and gates of each sequence.
    sequences: Vec<[Vec<T>; 2]>,
}

/// Rows `first..end` of a sequence.
type Chunk = (usize, usize, usize);

impl<T: Number> World<T> {
    fn new(spec: DeltaSpec) -> Self {
        let mut numbers = Numbers::new(1);
        let (channels, heads) = (spec.num_channels(), spec.num_value_heads);
        let conv = numbers.normal(channels * spec.conv_kernel);
        let a_log = numbers.normal(heads).iter().map(|value| value * 0.5 - 1.0).collect();
        let mut dt_bias = numbers.normal(heads);
        dt_bias[0] = 25.0;
        let mut inputs = |len| {
            let gates = stored(&numbers.normal(len * 2 * heads));
            [stored(&numbers.with_outliers(len * channels)), gates]
        };
        Self { spec, conv, a_log, dt_bias, sequences: LENS.iter().map(|&len| inputs(len)).collect() }
    }

    fn widened(&self) -> World<f32> {
        let Self { spec, conv, a_log, dt_bias, sequences } = self;
        let sequences = sequences.iter().map(|inputs| inputs.each_ref().map(|input| widened(input))).collect();
        World { spec: *spec, conv: conv.clone(), a_log: a_log.clone(), dt_bias: dt_bias.clone(), sequences }
    }

    /// What slots hold before anything has run: what other sequences left there.
    fn states(&self) -> Vec<f32> {
        vec![3.0; NUM_SLOTS * self.spec.state_width()]
    }

    /// `qkv` and gates of some rows, and the batch that they are. Sequence `i` has its state in slot `3 - i`, and has
    /// read two positions of a source.
    fn step(&self, chunks: &[Chunk]) -> ([Vec<T>; 2], PagedBatch) {
        let mut batch = BatchLists { cu_seqlens: vec![0], ..BatchLists::default() };
        let mut inputs = [Vec::new(), Vec::new()];
        for &(seq, first, end) in chunks {
            for (input, of_seq) in inputs.iter_mut().zip(&self.sequences[seq]) {
                let width = of_seq.len() / LENS[seq];
                input.extend_from_slice(&of_seq[first * width..end * width]);
            }
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (end - first) as u32);
            batch.context_lens.push(end as u32 + 2);
            batch.source_lens.push(2);
            batch.state_slots.push(3 - seq as u32);
        }
        (inputs, batch.into())
    }

    /// Runs the rows on the device, in each order of threads; gives their outputs.
    fn run(&self, states: &mut Vec<f32>, chunks: &[Chunk], seeds: &[u32]) -> Vec<T> {
        let DeltaSpec { num_key_heads, num_value_heads, key_dim, value_dim, .. } = self.spec;
        let ([qkv, gates], batch) = self.step(chunks);
        let (spec, sequences) = (Delta::from(self.spec), sequences(&batch));
        let launch = |name: &str, grid: [usize; 3], threads: usize, seed, arguments: &[&dyn Argument]| {
            let block = [threads as u32, 1, 1];
            let shape = Launch { grid: grid.map(|size| size as u32), block, shared_bytes: 0, seed };
            // SAFETY: the calls below pass the kernels' arguments.
            unsafe { emulator::launch(&format!("{name}_{}", T::NAME), shape, arguments) }.unwrap();
        };
        let num_rows = gates.len() / (2 * num_value_heads);
        let channel_blocks = self.spec.num_channels().div_ceil(ROW_THREADS);
        let [convolved] = outputs_in(seeds, qkv.len(), |seed, [out]: [*mut f32; 1]| {
            let arguments: [&dyn Argument; 6] =
                [&qkv.as_ptr(), &self.conv.as_ptr(), &states.as_ptr(), &out, &spec, &sequences];
            let grid = [channel_blocks, num_rows.div_ceil(CONV_ROWS), 1];
            launch("gated_delta_convolve", grid, ROW_THREADS, seed, &arguments);
        });
        let decay: Vec<f32> = self.a_log.iter().map(|a_log| -a_log.exp()).collect();
        let scales_len = num_rows * 2 * (num_key_heads + num_value_heads);
        let [scales] = outputs_in(seeds, scales_len, |seed, [out]: [*mut f32; 1]| {
            let (inputs, vectors) = ([convolved.as_ptr(), decay.as_ptr(), self.dt_bias.as_ptr()], gates.as_ptr());
            let arguments: [&dyn Argument; 6] = [&inputs[0], &vectors, &inputs[1], &inputs[2], &out, &spec];
            launch("gated_delta_scales", [num_rows, 1, 1], ROW_THREADS, seed, &arguments);
        });
        let after: RefCell<Option<Vec<f32>>> = RefCell::default();
        let [out] = outputs_in(seeds, num_rows * num_value_heads * value_dim, |seed, [out]: [*mut T; 1]| {
            let mut own = states.clone();
            let own_states = own.as_mut_ptr();
            let arguments: [&dyn Argument; 4] = [&qkv.as_ptr(), &own_states, &spec, &sequences];
            launch("gated_delta_keep_inputs", [channel_blocks, chunks.len(), 1], ROW_THREADS, seed, &arguments);
            let arguments: [&dyn Argument; 6] =
                [&convolved.as_ptr(), &scales.as_ptr(), &own_states, &out, &spec, &sequences];
            let (name, threads) = recurrence(key_dim).unwrap();
            let grid = [value_dim.div_ceil(COLUMNS), num_value_heads, chunks.len()];
            launch(name, grid, threads, seed, &arguments);
            if let Some(before) = after.replace(Some(own.clone())) {
                assert_eq!(bits(&before), bits(&own), "another order of threads gives another state");
            }
        });
        *states = after.into_inner().unwrap();
        out
    }

    /// The same on the CPU.
    fn expected(&self, states: &mut StateCache, chunks: &[Chunk]) -> Vec<f32> {
        let ([qkv, gates], batch) = self.step(chunks);
        let weights = DeltaWeights::new(self.spec, self.conv.clone(), &self.a_log, self.dt_bias.clone()).unwrap();
        let rows = |input: &[T], width| tensor(&widened(input), &[input.len() / width, width]);
        let (qkv, gates) = (rows(&qkv, self.spec.num_channels()), rows(&gates, 2 * self.spec.num_value_heads));
        values(&gated_delta(&qkv, &gates, &weights, states, &batch).unwrap())
    }
}

fn small_specs() -> [DeltaSpec; 3] {
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
        // Keys that want the wider kernel, a convolution that looks further back than some chunks have rows.
        spec(1, 2, 131, 33, 7),
    ]
}

/// Heads as Qwen3-Next has them, of which there are more.
fn real_spec() -> DeltaSpec {
    DeltaSpec { num_key_heads: 1, num_value_heads: 2, key_dim: 128, value_dim: 128, ..small_specs()[0] }
}

fn check_parity<T: Number>() {
    for spec in small_specs().into_iter().chain([real_spec()]) {
        let world = World::<T>::new(spec);
        let exact = world.widened();
        let mut expected_states = StateCache::new(spec.state_width(), NUM_SLOTS).unwrap();
        expected_states.states_mut().fill(3.0);
        let (mut states, mut exact_states) = (world.states(), world.states());
        // A step that begins sequences, and one that goes on with one of them beside one without rows.
        for chunks in [&[(0, 0, 1), (1, 0, 22)][..], &[(1, 22, 35), (0, 1, 1), (2, 0, 9)]] {
            let expected = world.expected(&mut expected_states, chunks);
            let out = world.run(&mut states, chunks, &SEEDS);
            assert_close(&widened(&out), &expected, tolerance::<T>(5e-6));
            assert_close(&states, expected_states.states_mut(), 5e-6);
            assert_rounded(&out, &exact.run(&mut exact_states, chunks, &SEEDS[..1]));
            assert_eq!(bits(&states), bits(&exact_states));
        }
    }
}

#[test]
fn gated_delta_is_that_of_the_cpu() {
    for_activations!(check_parity);
}

fn check_cuts<T: Number>(spec: DeltaSpec, chunk_lens: &[usize]) {
    let world = World::<T>::new(spec);
    let width = spec.num_value_heads * spec.value_dim;
    let mut whole_states = world.states();
    let mut whole = Vec::new();
    for (seq, &len) in LENS.iter().enumerate() {
        whole.push(bits(&world.run(&mut whole_states, &[(seq, 0, len)], &[0])));
    }
    let mut states = world.states();
    let together = world.run(&mut states, &[(2, 0, LENS[2]), (0, 0, LENS[0]), (1, 0, LENS[1])], &[1]);
    assert_eq!(bits(&together), [&whole[2][..], &whole[0], &whole[1]].concat(), "{spec:?} together");
    assert_eq!(bits(&states), bits(&whole_states), "states of {spec:?} together");
    for &len in chunk_lens {
        let mut states = world.states();
        let mut pieces = vec![Vec::new(); LENS.len()];
        for first in (0..LENS[1]).step_by(len) {
            let of_seq = |seq: usize| (first < LENS[seq]).then(|| (seq, first, LENS[seq].min(first + len)));
            let chunks: Vec<Chunk> = (0..LENS.len()).filter_map(of_seq).collect();
            let mut rows = bits(&world.run(&mut states, &chunks, &[2])).into_iter();
            for (seq, first, end) in chunks {
                pieces[seq].extend(rows.by_ref().take((end - first) * width));
            }
        }
        assert!(pieces == whole, "{spec:?} in pieces of {len}");
        assert_eq!(bits(&states), bits(&whole_states), "states of {spec:?} in pieces of {len}");
    }
}

#[test]
fn rows_of_gated_delta_do_not_depend_on_cuts_or_company() {
    for spec in small_specs() {
        check_cuts::<f32>(spec, &[1, 5]);
    }
    check_cuts::<bf16>(real_spec(), &[11]);
}
