//! The experts of a layer on a device: pairs of token and slot are sorted by expert, and each of the two matrices of all experts is one
//! launch for each kind of weights.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaStorage, DType, Shape};

use super::cpu::Sizes;
use super::device_activation::DeviceActivation;
use super::{Expert, ExpertWeights, GroupedSwiglu};
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Argument, Launch, launch};
use crate::cuda::memory::{Address, Operand, aligned_activations, name_of, output, scratch, upload};
use crate::cuda::products::{DenseWeight, PLAIN_OUTS, PRODUCT_THREADS, QuantWeight, TILES, dense_name};
use crate::ops::linear::cuda::{Rows, is_on_matrix_instructions};
use crate::ops::route::Chosen;
use crate::quant::RowForm;
use crate::weight::{PackedWeight, WeightFormat};

/// Numbers that the rows between the products may have; longer inputs go in parts. Tests have parts of a few tokens.
const PART_NUMBERS: usize = if cfg!(test) { 1 << 14 } else { 1 << 28 };
/// Pairs of a part: a grid has at most 65535 tiles of rows.
const PART_PAIRS: usize = 1 << 18;

const WORD: usize = size_of::<u32>();
/// Words of `struct Tile` of `experts.cuh`.
const TILE_WORDS: usize = 3;

/// What a device has to know of the experts of a layer.
#[derive(Debug)]
pub(super) struct ExpertTable {
    /// A byte of each.
    is_identity: CudaSlice<u8>,
    activations: CudaSlice<DeviceActivation>,
    gate_up: Matrices,
    down: Matrices,
}

/// One of the two matrices of each expert.
#[derive(Debug)]
struct Matrices {
    /// What a launch each computes: of every expert its weight, or none.
    kinds: Vec<OfKind>,
    /// Outputs of the expert that has most.
    width: usize,
    /// What the weights point to.
    _biases: CudaSlice<f32>,
}

#[derive(Debug)]
enum OfKind {
    Quantized(RowForm, CudaSlice<QuantWeight>),
    Dense(WeightFormat, CudaSlice<DenseWeight>),
}

/// Weights that one launch can multiply with.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Quantized(RowForm),
    Dense(WeightFormat),
}

impl Kind {
    fn of(weight: &PackedWeight) -> Self {
        match weight.format() {
            WeightFormat::Quantized(format) => Self::Quantized(format.row_form()),
            format => Self::Dense(format),
        }
    }
}

/// A matrix with its bias.
type Matrix<'a> = (&'a PackedWeight, Option<&'a [f32]>);

fn gate_up(expert: &ExpertWeights) -> Matrix<'_> {
    (&expert.gate_up, expert.biases.as_ref().map(|biases| biases.gate_up.as_slice()))
}

fn down(expert: &ExpertWeights) -> Matrix<'_> {
    (&expert.down, expert.biases.as_ref().map(|biases| biases.down.as_slice()))
}

impl ExpertTable {
    /// Of experts whose weights lie on the device.
    pub(super) fn new(device: &CudaDevice, experts: &[Expert]) -> candle_core::Result<Self> {
        let is_identity: Vec<u8> = experts.iter().map(|expert| expert.glu().is_none().into()).collect();
        let activation = |expert: &Expert| {
            expert.glu().map_or(DeviceActivation::NONE, |expert| DeviceActivation::new(expert.activation))
        };
        let activations: Vec<_> = experts.iter().map(activation).collect();
        Ok(Self {
            is_identity: upload(device, &is_identity)?,
            activations: upload(device, &activations)?,
            gate_up: Matrices::new(device, experts, gate_up)?,
            down: Matrices::new(device, experts, down)?,
        })
    }

    /// Whether all products are of matrix instructions, which alone have tiles of many rows.
    fn may_have_many_rows(&self, dtype: DType) -> bool {
        let is_plain = |kind: &OfKind| match kind {
            OfKind::Quantized(..) => false,
            OfKind::Dense(format, _) => !is_on_matrix_instructions(*format, dtype),
        };
        !self.gate_up.kinds.iter().chain(&self.down.kinds).any(is_plain)
    }
}

impl Matrices {
    fn new(device: &CudaDevice, experts: &[Expert], of: fn(&ExpertWeights) -> Matrix<'_>) -> candle_core::Result<Self> {
        let matrices: Vec<Option<Matrix<'_>>> = experts.iter().map(|expert| expert.glu().map(of)).collect();
        let all_biases: Vec<f32> = matrices.iter().flatten().filter_map(|matrix| matrix.1).flatten().copied().collect();
        let biases = upload(device, &all_biases)?;
        let mut next_bias = Address::of(&biases);
        let mut kinds: Vec<Kind> = Vec::new();
        let mut placed = Vec::with_capacity(matrices.len());
        for matrix in &matrices {
            let Some((weight, bias)) = matrix else {
                placed.push(None);
                continue;
            };
            let of_weight = bias.map_or(Address::NULL, |_| next_bias);
            next_bias = next_bias.plus(size_of::<f32>() * bias.map_or(0, <[f32]>::len));
            placed.push(Some((*weight, weight.address()?, of_weight)));
            if !kinds.contains(&Kind::of(weight)) {
                kinds.push(Kind::of(weight));
            }
        }
        let of_kind = |kind: Kind| {
            let own = placed.iter().map(|placed| placed.filter(|(weight, ..)| Kind::of(weight) == kind));
            Ok(match kind {
                Kind::Quantized(form) => {
                    let described =
                        own.map(|own| own.map_or(QuantWeight::NONE, |(w, at, b)| QuantWeight::new(w, at, b)));
                    OfKind::Quantized(form, upload(device, &described.collect::<Vec<_>>())?)
                }
                Kind::Dense(format) => {
                    let described =
                        own.map(|own| own.map_or(DenseWeight::NONE, |(w, at, b)| DenseWeight::new(w, at, b)));
                    OfKind::Dense(format, upload(device, &described.collect::<Vec<_>>())?)
                }
            })
        };
        let width = matrices.iter().flatten().map(|(weight, _)| weight.rows()).max().unwrap_or(0);
        let kinds = kinds.into_iter().map(of_kind).collect::<candle_core::Result<_>>()?;
        Ok(Self { kinds, width, _biases: biases })
    }
}

pub(super) fn grouped_swiglu(op: &GroupedSwiglu<'_>, x: Operand<'_>) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype, table) = (x.0.device(), x.0.dtype(), op.experts.table()?);
    let GroupedSwiglu { num_tokens, sizes, chosen, .. } = *op;
    // Where there are no experts all slots are empty.
    let k = if op.experts.is_empty() { 0 } else { chosen.k() };
    let (out, target) = output(device, dtype, num_tokens * sizes.hidden)?;
    let (x, _copy) = aligned_activations(x)?;
    let pair_numbers = table.gate_up.width + sizes.intermediate + sizes.hidden;
    let part_tokens = ((PART_NUMBERS / pair_numbers.max(1)).min(PART_PAIRS) / k.max(1)).max(1);
    for first in (0..num_tokens).step_by(part_tokens) {
        let part = Part {
            device,
            dtype,
            table,
            sizes,
            num_experts: op.experts.len(),
            num_tokens: part_tokens.min(num_tokens - first),
            k,
        };
        // Rows of whole multiples of 16 bytes stay at such; others may lie anywhere.
        let start = first * sizes.hidden * dtype.size_in_bytes();
        let pairs = first * k..(first + part.num_tokens) * k;
        let (_choices, choices) = match chosen {
            Chosen::Device(choices) => (None, choices.starting_at(first)),
            Chosen::Host(topk) => {
                // The experts, and behind them the bits of their weights.
                let weights = topk.weights[pairs.clone()].iter().map(|weight| weight.to_bits());
                let words: Vec<u32> = topk.experts[pairs.clone()].iter().copied().chain(weights).collect();
                let words = upload(device, &words)?;
                let experts = Address::of(&words);
                (Some(words), [experts, experts.plus(pairs.len() * WORD)])
            }
        };
        part.compute(choices, x.plus(start), target.plus(start))?;
    }
    Ok((out, Shape::from((num_tokens, sizes.hidden))))
}

/// Some tokens on their way through the experts.
struct Part<'a> {
    device: &'a CudaDevice,
    dtype: DType,
    table: &'a ExpertTable,
    sizes: Sizes,
    num_experts: usize,
    num_tokens: usize,
    k: usize,
}

/// Which expert computes which rows.
struct Alignment {
    /// Name, outputs and rows of a tile.
    tile: (&'static str, usize, usize),
    max_tiles: usize,
    /// What `align_experts` gave.
    pairs: Address,
    rows: Address,
    tiles: Address,
    totals: Address,
    _memory: CudaSlice<u32>,
}

impl Part<'_> {
    /// `choices` are where the experts and the weights of the tokens begin.
    fn compute(&self, [experts, weights]: [Address; 2], x: Address, target: Address) -> candle_core::Result<()> {
        let Self { device, dtype, table, sizes, num_tokens, k, .. } = *self;
        let aligned = self.align(experts)?;
        let tokens = Rows { start: x, dtype, count: num_tokens, cols: sizes.hidden };
        let (_gate_up, gate_up) = self.multiply(&table.gate_up, &tokens, &aligned, aligned.pairs)?;
        let (_activated, activated) = self.activate(gate_up, &aligned)?;
        let rows = Rows { start: activated, dtype, count: num_tokens * k, cols: sizes.intermediate };
        let (_y, y) = self.multiply(&table.down, &rows, &aligned, Address::NULL)?;
        let arguments: [&dyn Argument; 7] =
            [&y, &x, &aligned.rows, &weights, &target, &(sizes.hidden as u32), &(k as u32)];
        let kernel = format!("combine_experts_{}", name_of(dtype)?);
        // SAFETY: the arguments of the kernel; every pair has a row, its input, or nothing.
        unsafe { launch(device, &kernel, Launch::rows(num_tokens, ROW_THREADS), &arguments) }
    }

    fn align(&self, experts: Address) -> candle_core::Result<Alignment> {
        let (device, num_pairs) = (self.device, self.num_tokens * self.k);
        let [few, many] = TILES;
        let are_many = num_pairs > few.2 * self.num_experts && self.table.may_have_many_rows(self.dtype);
        let tile = if are_many { many } else { few };
        let max_tiles = num_pairs / tile.2 + self.num_experts.min(num_pairs);
        let memory = scratch::<u32>(device, self.num_experts + 2 * num_pairs + 2 + TILE_WORDS * max_tiles)?;
        let counts = Address::of(&memory);
        let pairs = counts.plus(self.num_experts * WORD);
        let rows = pairs.plus(num_pairs * WORD);
        let totals = rows.plus(num_pairs * WORD);
        let tiles = totals.plus(2 * WORD);
        let (shape, num_pairs) = (Launch::rows(self.num_experts, ROW_THREADS), num_pairs as u32);
        let is_identity = Address::of(&self.table.is_identity);
        // SAFETY: the arguments of the kernel, a block for each expert.
        unsafe { launch(device, "count_experts", shape, &[&experts, &num_pairs, &is_identity, &counts]) }?;
        let arguments: [&dyn Argument; 9] =
            [&experts, &num_pairs, &is_identity, &counts, &(tile.2 as u32), &pairs, &rows, &tiles, &totals];
        // SAFETY: the arguments of the kernel, a block for each expert; there is room for all pairs and as many tiles as there may be.
        unsafe { launch(device, "align_experts", shape, &arguments) }?;
        Ok(Alignment { tile, max_tiles, pairs, rows, tiles, totals, _memory: memory })
    }

    /// One matrix of every expert, `[num_rows, width]`. Inputs are tokens where `pairs` says which, and else rows.
    fn multiply(
        &self,
        matrices: &Matrices,
        x: &Rows,
        aligned: &Alignment,
        pairs: Address,
    ) -> candle_core::Result<(CudaStorage, Address)> {
        let (device, name) = (self.device, name_of(self.dtype)?);
        let (out, target) = output(device, self.dtype, self.num_tokens * self.k * matrices.width)?;
        let (k, width) = (self.k as u32, matrices.width as u32);
        let rest: [&dyn Argument; 6] = [&aligned.tiles, &aligned.totals, &pairs, &k, &target, &width];
        let (tile, outs, _) = aligned.tile;
        let launch = |kernel: &str, (outs, threads): (usize, usize), ins: [&dyn Argument; 2]| {
            let grid = [matrices.width.div_ceil(outs), aligned.max_tiles, 1];
            let shape = Launch { grid, threads, shared_bytes: 0 };
            // SAFETY: the arguments of the kernel, with blocks for all outputs and as many tiles as there may be.
            unsafe { launch(device, kernel, shape, &[&ins[..], &rest].concat()) }
        };
        for kind in &matrices.kinds {
            match kind {
                OfKind::Quantized(form, weights) => {
                    // Behind the number of tiles there is that of rows.
                    let num_rows = if pairs.is_null() { aligned.totals.plus(WORD) } else { Address::NULL };
                    let x = x.quantized(device, *form, num_rows)?;
                    let kernel = format!("quant_experts_{tile}_{name}");
                    launch(&kernel, (outs, PRODUCT_THREADS), [&Address::of(weights), &x.view])?;
                }
                OfKind::Dense(format, weights) if is_on_matrix_instructions(*format, self.dtype) => {
                    let kernel = format!("dense_experts_{tile}_{name}");
                    launch(&kernel, (outs, PRODUCT_THREADS), [&Address::of(weights), &x.start])?;
                }
                OfKind::Dense(format, weights) => {
                    let kernel = format!("plain_experts_{}_{name}", dense_name(*format));
                    launch(&kernel, (PLAIN_OUTS, ROW_THREADS), [&Address::of(weights), &x.start])?;
                }
            }
        }
        Ok((out, target))
    }

    /// What lies between the matrices, `[num_rows, intermediate]`
    fn activate(&self, gate_up: Address, aligned: &Alignment) -> candle_core::Result<(CudaStorage, Address)> {
        let intermediate = self.sizes.intermediate;
        let (out, target) = output(self.device, self.dtype, self.num_tokens * self.k * intermediate)?;
        let activations = Address::of(&self.table.activations);
        let (width, narrow) = (self.table.gate_up.width as u32, intermediate as u32);
        let arguments: [&dyn Argument; 7] =
            [&gate_up, &activations, &aligned.tiles, &aligned.totals, &target, &width, &narrow];
        let shape = Launch {
            grid: [intermediate.div_ceil(ROW_THREADS), aligned.max_tiles, 1],
            threads: ROW_THREADS,
            shared_bytes: 0,
        };
        // SAFETY: the arguments of the kernel, a thread for each column of as many tiles as there may be.
        unsafe { launch(self.device, &format!("activate_experts_{}", name_of(self.dtype)?), shape, &arguments) }?;
        Ok((out, target))
    }
}
