//! The expert layer.

use emulator::{Argument, Launch};
use half::bf16;

use super::linear::{Aligned, assert_same, dense_weight, quant_weight, quantize_rows};
use super::{Buffer, Number, Output, ROW_THREADS, bits, for_activations, outputs, stored, widened};
use crate::cuda::products::{DenseWeight, PLAIN_OUTS, PRODUCT_THREADS, QuantWeight, TILES, dense_name};
use crate::ops::glu::GluActivation;
use crate::ops::grouped_swiglu::device_activation::DeviceActivation;
use crate::ops::grouped_swiglu::{Expert, ExpertActivation, ExpertBiases, ExpertWeights, Experts, grouped_swiglu};
use crate::ops::pointwise::Pointwise;
use crate::ops::route::TopK;
use crate::quant::{Codes, QuantFormat, RowForm};
use crate::testing::{Numbers, QUANTIZED, assert_close, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

/// Rows that are none: `NONE` and `INPUT_ROW` of the device code.
const NO_ROW: u32 = u32::MAX;
const INPUT_ROW: u32 = u32::MAX - 1;

/// `struct Tile` of `experts.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Tile {
    expert: u32,
    first: u32,
    end: u32,
}

impl Output for Tile {
    const POISON: Self = Self { expert: u32::POISON, first: u32::POISON, end: u32::POISON };

    fn bits(self) -> u32 {
        self.expert ^ self.first.rotate_left(11) ^ self.end.rotate_left(22)
    }
}

/// Where the rows of experts are.
#[derive(Debug, PartialEq)]
struct Alignment {
    pairs: Vec<u32>,
    rows: Vec<u32>,
    tiles: Vec<Tile>,
    /// Tiles and rows that there are.
    totals: [u32; 2],
}

fn launch(kernel: &str, grid: [usize; 2], threads: usize, seed: u32, arguments: &[&dyn Argument]) {
    if grid.contains(&0) {
        return;
    }
    let [x, y] = grid.map(|len| len as u32);
    let shape = Launch { grid: [x, y, 1], block: [threads as u32, 1, 1], shared_bytes: 0, seed };
    // SAFETY: every call is with the arguments of its kernel, and buffers of the sizes that its comment says.
    unsafe { emulator::launch(kernel, shape, arguments) }.unwrap();
}

fn align(chosen: &[u32], is_identity: &[bool], tile_rows: usize, seed: u32) -> Alignment {
    let (num_pairs, num_experts) = (chosen.len(), is_identity.len());
    let is_identity: Vec<u8> = is_identity.iter().map(|&is_identity| is_identity.into()).collect();
    let max_tiles = num_pairs / tile_rows + num_experts.min(num_pairs);
    let mut counts = Buffer::<u32>::new(num_experts);
    let (mut pairs, mut rows, mut totals) = (Buffer::new(num_pairs), Buffer::new(num_pairs), Buffer::new(2));
    let mut tiles = Buffer::new(max_tiles);
    let counted = counts.as_mut_ptr();
    let ins: [&dyn Argument; 4] = [&chosen.as_ptr(), &(num_pairs as u32), &is_identity.as_ptr(), &counted];
    launch("count_experts", [num_experts, 1], ROW_THREADS, seed, &ins);
    let outs: [&dyn Argument; 5] =
        [&(tile_rows as u32), &pairs.as_mut_ptr(), &rows.as_mut_ptr(), &tiles.as_mut_ptr(), &totals.as_mut_ptr()];
    let arguments = [&ins[..], &outs].concat();
    launch("align_experts", [num_experts, 1], ROW_THREADS, seed, &arguments);
    counts.into_vec();
    let totals: Vec<u32> = totals.into_vec();
    let (pairs, tiles) = (pairs.into_vec(), tiles.into_vec());
    Alignment { pairs, rows: rows.into_vec(), tiles, totals: totals.try_into().unwrap() }
}

/// The same with plain loops; what the device leaves alone is poison.
fn expected_alignment(chosen: &[u32], is_identity: &[bool], tile_rows: usize) -> Alignment {
    let (num_pairs, num_experts) = (chosen.len(), is_identity.len());
    let (mut pairs, mut rows, mut tiles) = (Vec::new(), vec![NO_ROW; num_pairs], Vec::new());
    for (expert, is_identity) in is_identity.iter().enumerate() {
        let own: Vec<usize> = (0..num_pairs).filter(|&pair| chosen[pair] as usize == expert).collect();
        let first = pairs.len();
        for &pair in &own {
            rows[pair] = if *is_identity { INPUT_ROW } else { pairs.len() as u32 };
            if !is_identity {
                pairs.push(pair as u32);
            }
        }
        for start in (first..pairs.len()).step_by(tile_rows) {
            let end = pairs.len().min(start + tile_rows);
            tiles.push(Tile { expert: expert as u32, first: start as u32, end: end as u32 });
        }
    }
    let totals = [tiles.len() as u32, pairs.len() as u32];
    pairs.resize(num_pairs, u32::POISON);
    tiles.resize(num_pairs / tile_rows + num_experts.min(num_pairs), Tile::POISON);
    Alignment { pairs, rows, tiles, totals }
}

#[test]
fn pairs_are_sorted_by_expert() {
    let mut numbers = Numbers::new(30);
    for (num_pairs, num_experts) in [(0, 3), (1, 1), (6, 8), (700, 5), (1030, 300)] {
        let mut chosen: Vec<u32> = (0..num_pairs)
            .map(|_| (numbers.below(num_experts) * numbers.below(num_experts) / num_experts) as u32)
            .collect();
        chosen.iter_mut().step_by(7).for_each(|expert| *expert = TopK::NO_EXPERT);
        let is_identity: Vec<bool> = (0..num_experts).map(|expert| expert % 4 == 2).collect();
        for tile_rows in [8, 32] {
            let expected = expected_alignment(&chosen, &is_identity, tile_rows);
            for seed in 0..3 {
                assert_eq!(align(&chosen, &is_identity, tile_rows, seed), expected, "{num_pairs} {num_experts}");
            }
        }
    }
}

/// The layer as the host runs it.
struct Layer<'a> {
    experts: &'a [Expert],
    topk: &'a TopK,
    tile: (&'a str, usize, usize),
    hidden: usize,
    intermediate: usize,
}

/// One of the two matrices of an expert, with its bias.
type Matrix<'a> = (&'a PackedWeight, Option<&'a [f32]>);

fn gate_up(expert: &ExpertWeights) -> Matrix<'_> {
    (&expert.gate_up, expert.biases.as_ref().map(|biases| biases.gate_up.as_slice()))
}

fn down(expert: &ExpertWeights) -> Matrix<'_> {
    (&expert.down, expert.biases.as_ref().map(|biases| biases.down.as_slice()))
}

/// Experts that one launch computes.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Of quantized weights for which inputs are quantized so.
    Quantized(RowForm),
    Dense(WeightFormat),
}

fn kind_of((weight, _): Matrix<'_>) -> Kind {
    match weight.format() {
        WeightFormat::Quantized(format) => Kind::Quantized(format.row_form()),
        format => Kind::Dense(format),
    }
}

impl<'a> Layer<'a> {
    fn weights(&self) -> impl Iterator<Item = Option<&'a ExpertWeights>> {
        self.experts.iter().map(|expert| match expert {
            Expert::Glu(weights) => Some(weights),
            Expert::Identity => None,
        })
    }

    /// One matrix of every expert, of each form of inputs in a launch.
    fn multiply<T: Number>(
        &self,
        (aligned, seed): (&Alignment, u32),
        (x, cols): (&[T], usize),
        pairs: *const u32,
        matrix: fn(&ExpertWeights) -> Matrix<'_>,
        out_width: usize,
    ) -> Vec<T> {
        let mut out = Buffer::new(self.topk.experts.len() * out_width);
        let (name, outs, _) = self.tile;
        let rest: [&dyn Argument; 6] = [
            &aligned.tiles.as_ptr(),
            &aligned.totals.as_ptr(),
            &pairs,
            &(self.topk.k as u32),
            &out.as_mut_ptr(),
            &(out_width as u32),
        ];
        let mut kinds: Vec<Kind> = Vec::new();
        for (weight, bias) in self.weights().flatten().map(matrix) {
            let kind = kind_of((weight, bias));
            if kinds.contains(&kind) {
                continue;
            }
            kinds.push(kind);
            let own = self.weights().map(|expert| expert.map(matrix).filter(|&matrix| kind_of(matrix) == kind));
            let num_tiles = aligned.tiles.len();
            if let WeightFormat::Quantized(format) = weight.format() {
                let num_rows = if pairs.is_null() { &raw const aligned.totals[1] } else { std::ptr::null() };
                let x = quantize_rows(x, cols, (format, num_rows), seed);
                let table: Vec<_> =
                    own.map(|own| own.map_or(QuantWeight::NONE, |(weight, bias)| quant_weight(weight, bias))).collect();
                let grid = [out_width.div_ceil(outs), num_tiles];
                let ins: [&dyn Argument; 2] = [&table.as_ptr(), &x.view()];
                let kernel = format!("quant_experts_{name}_{}", T::NAME);
                launch(&kernel, grid, PRODUCT_THREADS, seed, &[&ins[..], &rest].concat());
            } else {
                let table: Vec<_> =
                    own.map(|own| own.map_or(DenseWeight::NONE, |(weight, bias)| dense_weight(weight, bias))).collect();
                let x = Aligned::new(x);
                let ins: [&dyn Argument; 2] = [&table.as_ptr(), &x.as_ptr()];
                let (kernel, outs, threads) = match (dense_name(weight.format()), T::NAME) {
                    ("bf16", "bf16") => (format!("dense_experts_{name}_bf16"), outs, PRODUCT_THREADS),
                    (of_weight, _) => (format!("plain_experts_{of_weight}_{}", T::NAME), PLAIN_OUTS, ROW_THREADS),
                };
                launch(&kernel, [out_width.div_ceil(outs), num_tiles], threads, seed, &[&ins[..], &rest].concat());
            }
        }
        out.into_vec()
    }

    fn run<T: Number>(&self, x: &[T], seed: u32, out: *mut T) {
        let Self { experts, topk, tile: (_, _, tile_rows), hidden, intermediate } = *self;
        let is_identity: Vec<bool> = experts.iter().map(|expert| matches!(expert, Expert::Identity)).collect();
        let aligned = align(&topk.experts, &is_identity, tile_rows, seed);
        let width = 2 * intermediate;
        let gate_up = self.multiply((&aligned, seed), (x, hidden), aligned.pairs.as_ptr(), gate_up, width);
        let activations: Vec<DeviceActivation> = self
            .weights()
            .map(|expert| expert.map_or(DeviceActivation::NONE, |expert| DeviceActivation::new(expert.activation)))
            .collect();
        let mut activated = Buffer::new(topk.experts.len() * intermediate);
        let arguments: [&dyn Argument; 7] = [
            &gate_up.as_ptr(),
            &activations.as_ptr(),
            &aligned.tiles.as_ptr(),
            &aligned.totals.as_ptr(),
            &activated.as_mut_ptr(),
            &(width as u32),
            &(intermediate as u32),
        ];
        let grid = [intermediate.div_ceil(ROW_THREADS), aligned.tiles.len()];
        launch(&format!("activate_experts_{}", T::NAME), grid, ROW_THREADS, seed, &arguments);
        let activated: Vec<T> = activated.into_vec();
        let y = self.multiply((&aligned, seed), (&activated, intermediate), std::ptr::null(), down, hidden);
        let arguments: [&dyn Argument; 7] = [
            &y.as_ptr(),
            &x.as_ptr(),
            &aligned.rows.as_ptr(),
            &topk.weights.as_ptr(),
            &out,
            &(hidden as u32),
            &(topk.k as u32),
        ];
        launch(&format!("combine_experts_{}", T::NAME), [x.len() / hidden, 1], ROW_THREADS, seed, &arguments);
    }

    fn out<T: Number>(&self, x: &[T]) -> Vec<T> {
        let [out] = outputs(x.len(), |seed, [out]: [*mut T; 1]| self.run(x, seed, out));
        out
    }

    fn cpu<T: Number>(&self, x: &[T]) -> Vec<f32> {
        let x = tensor(&widened(x), &[x.len() / self.hidden, self.hidden]);
        let experts = Experts::new(self.experts.to_vec()).unwrap();
        values(&grouped_swiglu(&x, &experts, self.topk).unwrap())
    }
}

/// Experts of these formats in turn, with and without biases and a gate; the last one gives back its input.
pub(super) fn experts(
    numbers: &mut Numbers,
    formats: &[WeightFormat],
    [num, hidden, intermediate]: [usize; 3],
) -> Vec<Expert> {
    let mut experts: Vec<Expert> = (0..num - 1)
        .map(|idx| {
            let format = formats[idx % formats.len()];
            let is_plain = idx % 3 == 1;
            let mut weight = |rows: usize, cols: usize| {
                let values: Vec<f32> =
                    numbers.normal(rows * cols).iter().map(|value| value / (cols as f32).sqrt()).collect();
                PackedWeight::from_f32(format, rows, cols, &values).unwrap()
            };
            let gate_up_rows = if is_plain { intermediate } else { 2 * intermediate };
            let (gate_up, down) = (weight(gate_up_rows, hidden), weight(hidden, intermediate));
            let activation = match idx % 3 {
                1 => ExpertActivation::Plain(Pointwise::SquaredRelu),
                _ => ExpertActivation::Gated(GluActivation::Pointwise(Pointwise::Relu)),
            };
            let biases = (idx % 2 == 0)
                .then(|| ExpertBiases { gate_up: numbers.normal(gate_up_rows), down: numbers.normal(hidden) });
            Expert::Glu(ExpertWeights { gate_up, down, biases, activation })
        })
        .collect();
    experts.push(Expert::Identity);
    experts
}

/// Of skewed popularity, some slots empty, of one token all.
pub(super) fn choose(numbers: &mut Numbers, num_tokens: usize, num_experts: usize, k: usize) -> TopK {
    let mut chosen = Vec::new();
    for token in 0..num_tokens {
        let first = numbers.below(num_experts) * numbers.below(num_experts) / num_experts;
        chosen.extend((0..k).map(|slot| match (token * k + slot) % 11 {
            5 => TopK::NO_EXPERT,
            _ if token == 3 => TopK::NO_EXPERT,
            _ => ((first + slot * slot) % num_experts) as u32,
        }));
    }
    TopK { experts: chosen, weights: numbers.normal(num_tokens * k), k }
}

fn check_layer<T: Number>() {
    let mut numbers = Numbers::new(31);
    let rotated = QuantFormat { codes: Codes::Int8Rotated, group: 128 };
    let mixed = [QuantFormat::INT4, QUANTIZED[4], QuantFormat::INT8, QUANTIZED[7], QUANTIZED[3]];
    let cases: [(&[QuantFormat], [usize; 5]); 3] =
        [(&mixed, [45, 7, 70, 40, 3]), (&[rotated], [1, 4, 130, 33, 2]), (&[QuantFormat::INT4], [20, 3, 17, 1, 1])];
    for (formats, [num_tokens, num_experts, hidden, intermediate, k]) in cases {
        let formats: Vec<_> = formats.iter().copied().map(WeightFormat::Quantized).collect();
        let experts = experts(&mut numbers, &formats, [num_experts, hidden, intermediate]);
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        let mut x = numbers.with_outliers(num_tokens * hidden);
        if num_tokens > 1 {
            x[7 * hidden] = f32::NAN;
        }
        let x = stored::<T>(&x);
        for tile in TILES {
            let layer = Layer { experts: &experts, topk: &topk, tile, hidden, intermediate };
            if T::NAME == "float" {
                assert_same(&layer.out(&x), &layer.cpu(&x), &(&formats, tile));
            } else {
                // Rows between kernels are rounded: a number on the other side of a half is another code.
                let sound: Vec<T> = x.iter().map(|x| if x.to_f32().is_nan() { T::from_f32(1.0) } else { *x }).collect();
                assert_close(&widened(&layer.out(&sound)), &layer.cpu(&sound), 2e-2);
            }
        }
    }
}

#[test]
fn the_layer_is_that_of_the_cpu_to_the_bit() {
    check_layer::<f32>();
}

#[test]
fn the_layer_in_bf16_is_close() {
    check_layer::<bf16>();
}

/// Exponentials are not those of the CPU: one that falls on the other side of a half is another code.
#[test]
fn activations_with_exponentials_are_close() {
    let mut numbers = Numbers::new(32);
    let [num_tokens, num_experts, hidden, intermediate] = [9, 4, 64, 64];
    for activation in [GluActivation::Silu, GluActivation::ClampedSwish { alpha: 1.702, limit: 1.5 }] {
        let mut experts =
            experts(&mut numbers, &[WeightFormat::Quantized(QuantFormat::INT8)], [num_experts, hidden, intermediate]);
        for expert in &mut experts {
            if let Expert::Glu(weights) = expert {
                let is_gated = weights.gate_up.rows() == 2 * intermediate;
                weights.activation = if is_gated {
                    ExpertActivation::Gated(activation)
                } else {
                    ExpertActivation::Plain(Pointwise::Gelu)
                };
            }
        }
        let topk = choose(&mut numbers, num_tokens, num_experts, 2);
        let x = numbers.normal(num_tokens * hidden);
        let layer = Layer { experts: &experts, topk: &topk, tile: TILES[0], hidden, intermediate };
        assert_close(&layer.out(&x), &layer.cpu(&x), 5e-3);
    }
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(33);
    let [num_tokens, num_experts, hidden, intermediate, k] = [40, 4, 50, 20, 2];
    let formats = [WeightFormat::Quantized(QuantFormat::INT4), WeightFormat::Bf16];
    let experts = experts(&mut numbers, &formats, [num_experts, hidden, intermediate]);
    let topk = choose(&mut numbers, num_tokens, num_experts, k);
    let x = stored::<bf16>(&numbers.with_outliers(num_tokens * hidden));
    let layer = Layer { experts: &experts, topk: &topk, tile: TILES[1], hidden, intermediate };
    let all = layer.out(&x);
    for token in [0, 3, 17, 39] {
        let pairs = token * k..(token + 1) * k;
        let own = TopK { experts: topk.experts[pairs.clone()].to_vec(), weights: topk.weights[pairs].to_vec(), k };
        let alone = Layer { topk: &own, tile: TILES[0], ..layer }.out(&x[token * hidden..(token + 1) * hidden]);
        assert_eq!(bits(&alone), bits(&all[token * hidden..(token + 1) * hidden]));
    }
}

fn check_dense_layer<T: Number>() {
    let mut numbers = Numbers::new(34);
    let formats =
        [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::F16, WeightFormat::Quantized(QuantFormat::INT8)];
    let cases: [(&[WeightFormat], [usize; 5]); 3] =
        [(&formats[..1], [45, 5, 72, 40, 3]), (&formats[..3], [20, 7, 35, 19, 3]), (&formats, [1, 6, 16, 24, 5])];
    for (formats, [num_tokens, num_experts, hidden, intermediate, k]) in cases {
        let experts = experts(&mut numbers, formats, [num_experts, hidden, intermediate]);
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        let x = stored::<T>(&numbers.normal(num_tokens * hidden));
        // Products without matrix instructions have tiles of a few rows only.
        let num_tiles = if formats.len() == 1 && T::NAME == "bf16" { 2 } else { 1 };
        for tile in TILES[..num_tiles].iter().copied() {
            let layer = Layer { experts: &experts, topk: &topk, tile, hidden, intermediate };
            // Of bf16 all numbers between the kernels are rounded.
            let tolerance = if T::NAME == "bf16" { 2e-2 } else { 1e-5 };
            assert_close(&widened(&layer.out(&x)), &layer.cpu(&x), tolerance);
        }
    }
}

#[test]
fn experts_that_are_not_quantized_agree_with_the_cpu() {
    for_activations!(check_dense_layer);
}
