//! Parity of the device code with the ops on the CPU, in several orders of its threads, with guarded and poisoned outputs.

use emulator::{Argument, Launch};
use half::{bf16, f16};

use crate::ops::argmax::argmax;
use crate::ops::embedding::embedding;
use crate::ops::glu::{GluActivation, glu};
use crate::ops::layer_norm::layer_norm;
use crate::ops::pointwise::Pointwise;
use crate::ops::rms_norm::{rms_norm, rms_norm_residual};
use crate::ops::rope::{RopeStyle, RopeTable, rope};
use crate::ops::route::{GroupScore, Groups, RouterSpec, Scoring, route};
use crate::testing::{Numbers, assert_close, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

/// Threads of every block: `ROW_THREADS` of `device.cuh`.
const ROW_THREADS: usize = 256;
/// Numbers before and behind an output that nobody may touch.
const GUARD: usize = 64;
/// Of a result that is rounded to bf16.
const BF16_TOLERANCE: f32 = 1.0 / 256.0;

const FUNCTIONS: [Pointwise; 14] = [
    Pointwise::Relu,
    Pointwise::Gelu,
    Pointwise::GeluTanh,
    Pointwise::Silu,
    Pointwise::Sigmoid,
    Pointwise::SquaredRelu,
    Pointwise::Relu6,
    Pointwise::LeakyRelu,
    Pointwise::ClippedGelu,
    Pointwise::QuickGelu,
    Pointwise::HardSwish,
    Pointwise::Mish,
    Pointwise::Tanh,
    Pointwise::Identity,
];

/// What a kernel may write.
trait Output: Copy {
    const POISON: Self;

    fn bits(self) -> u32;
}

/// A type of activations.
trait Number: Output {
    const NAME: &str;

    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Output for f32 {
    const POISON: Self = Self::NAN;

    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Output for bf16 {
    const POISON: Self = Self::NAN;

    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Output for u32 {
    const POISON: Self = 0xdead_beef;

    fn bits(self) -> u32 {
        self
    }
}

impl Number for f32 {
    const NAME: &str = "float";

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    const NAME: &str = "bf16";

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

/// What a kernel writes into `N` outputs of `len` numbers, the same in every order of its threads. `call` passes the seed and
/// where the outputs begin.
fn outputs<T: Output, const N: usize>(len: usize, call: impl Fn(u32, [*mut T; N])) -> [Vec<T>; N] {
    let run = |seed| {
        let mut buffers: [Vec<T>; N] = std::array::from_fn(|_| vec![T::POISON; len + 2 * GUARD]);
        call(seed, buffers.each_mut().map(|buffer| buffer[GUARD..].as_mut_ptr()));
        for buffer in &buffers {
            let guards = buffer[..GUARD].iter().chain(&buffer[GUARD + len..]);
            assert!(guards.into_iter().all(|guard| guard.bits() == T::POISON.bits()), "written out of bounds");
        }
        buffers.map(|buffer| buffer[GUARD..GUARD + len].to_vec())
    };
    let first = run(0);
    for seed in 1..4 {
        for (found, first) in run(seed).iter().zip(&first) {
            let is_equal = found.iter().zip(first).all(|(a, b)| a.bits() == b.bits());
            assert!(is_equal, "another order of threads gives other bits");
        }
    }
    first
}

/// # Safety
/// As [`emulator::launch`].
unsafe fn launch(kernel: &str, blocks: usize, seed: u32, arguments: &[&dyn Argument]) {
    let shape = Launch { grid: [blocks as u32, 1, 1], block: [ROW_THREADS as u32, 1, 1], shared_bytes: 0, seed };
    // SAFETY: the caller's.
    unsafe { emulator::launch(kernel, shape, arguments) }.unwrap();
}

fn stored<T: Number>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

fn widened<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.to_f32()).collect()
}

fn tolerance<T: Number>(exact: f32) -> f32 {
    if T::NAME == "bf16" { BF16_TOLERANCE } else { exact }
}

/// For f32 and bf16 activations.
macro_rules! for_activations {
    ($check:ident) => {
        $check::<f32>();
        $check::<bf16>();
    };
}

fn device_rms_norm<T: Number>(x: &[T], weight: &[f32], eps: f32) -> Vec<T> {
    let [out] = outputs(x.len(), |seed, [out]: [*mut T; 1]| {
        let (kernel, width) = (format!("rms_norm_{}", T::NAME), weight.len() as i32);
        // SAFETY: the arguments of the kernel, with rows of `width`.
        unsafe { launch(&kernel, x.len() / weight.len(), seed, &[&x.as_ptr(), &weight.as_ptr(), &out, &width, &eps]) };
    });
    out
}

fn check_rms_norm<T: Number>() {
    let mut numbers = Numbers::new(1);
    for (rows, width) in [(1, 1), (3, 17), (20, 64), (5, 576), (2, 2049)] {
        let len = rows * width;
        let (x, residual) = (stored::<T>(&numbers.with_outliers(len)), stored::<T>(&numbers.normal(len)));
        let (weight, eps) = (numbers.normal(width), 1e-5f32);
        let dims = [rows, width];
        let cpu = |values: &[T]| tensor(&widened(values), &dims);
        let expected = rms_norm(&cpu(&x), &tensor(&weight, &[width]), eps).unwrap();
        let out = device_rms_norm(&x, &weight, eps);
        assert_close(&widened(&out), &values(&expected), tolerance::<T>(1e-6));
        assert_rounded(&out, &device_rms_norm(&widened(&x), &weight, eps));

        let [norm, sum] = outputs(len, |seed, [norm, sum]: [*mut T; 2]| {
            let (kernel, width) = (format!("rms_norm_residual_{}", T::NAME), width as i32);
            // SAFETY: the arguments of the kernel, with rows of `width`.
            unsafe {
                launch(
                    &kernel,
                    rows,
                    seed,
                    &[&x.as_ptr(), &residual.as_ptr(), &weight.as_ptr(), &norm, &sum, &width, &eps],
                )
            };
        });
        let (_, expected_sum) = rms_norm_residual(&cpu(&x), &cpu(&residual), &tensor(&weight, &[width]), eps).unwrap();
        assert_eq!(bits(&sum), bits(&stored::<T>(&values(&expected_sum))));
        // The norm is that of the sum as it is stored, to the bit.
        assert_eq!(bits(&norm), bits(&device_rms_norm(&sum, &weight, eps)));
    }
}

/// A kernel computes in f32 whatever it reads and writes.
#[track_caller]
fn assert_rounded<T: Number>(found: &[T], exact: &[f32]) {
    assert_eq!(bits(found), bits(&stored::<T>(exact)));
}

fn bits<T: Output>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}

#[test]
fn rms_norm_is_that_of_the_cpu() {
    for_activations!(check_rms_norm);
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    let (x, weight) = (numbers.with_outliers(40 * 1025), numbers.normal(1025));
    let all = device_rms_norm(&x, &weight, 1e-6);
    for (row, all) in x.chunks(1025).zip(all.chunks(1025)) {
        assert_eq!(bits(&device_rms_norm(row, &weight, 1e-6)), bits(all));
    }
}

fn device_layer_norm<T: Number>(x: &[T], weight: &[f32], bias: &[f32], eps: f32) -> Vec<T> {
    let [out] = outputs(x.len(), |seed, [out]: [*mut T; 1]| {
        let (kernel, rows, width) = (format!("layer_norm_{}", T::NAME), x.len() / weight.len(), weight.len() as i32);
        // SAFETY: the arguments of the kernel, with rows of `width`.
        unsafe { launch(&kernel, rows, seed, &[&x.as_ptr(), &weight.as_ptr(), &bias.as_ptr(), &out, &width, &eps]) };
    });
    out
}

fn check_layer_norm<T: Number>() {
    let mut numbers = Numbers::new(3);
    for (rows, width) in [(1, 1), (3, 17), (4, 64), (2, 1000)] {
        let x = stored::<T>(&numbers.with_outliers(rows * width));
        let (weight, bias, eps) = (numbers.normal(width), numbers.normal(width), 1e-5f32);
        let vector = |values: &[f32]| tensor(values, &[width]);
        let expected =
            layer_norm(&tensor(&widened(&x), &[rows, width]), &vector(&weight), &vector(&bias), eps).unwrap();
        let out = device_layer_norm(&x, &weight, &bias, eps);
        assert_close(&widened(&out), &values(&expected), tolerance::<T>(1e-6));
        assert_rounded(&out, &device_layer_norm(&widened(&x), &weight, &bias, eps));
    }
}

#[test]
fn layer_norm_is_that_of_the_cpu() {
    for_activations!(check_layer_norm);
}

/// What a rotation needs beside its input.
struct Rotation {
    cos: Vec<f32>,
    sin: Vec<f32>,
    positions: Vec<u32>,
    /// Heads, elements of a head, and of these how many turn.
    sizes: [usize; 3],
    style: RopeStyle,
}

fn device_rope<T: Number>(x: &[T], rotation: &Rotation) -> Vec<T> {
    let Rotation { cos, sin, positions, sizes, style } = rotation;
    let [out] = outputs(x.len(), |seed, [out]: [*mut T; 1]| {
        let ([num_heads, head_dim, rotary_dim], in_pairs) =
            (sizes.map(|size| size as i32), i32::from(*style == RopeStyle::Pairs));
        let tensors: [&dyn Argument; 5] = [&x.as_ptr(), &cos.as_ptr(), &sin.as_ptr(), &positions.as_ptr(), &out];
        let sizes: [&dyn Argument; 4] = [&num_heads, &head_dim, &rotary_dim, &in_pairs];
        let arguments = [&tensors[..], &sizes].concat();
        // SAFETY: the arguments of the kernel; all positions are in the table.
        unsafe { launch(&format!("rope_{}", T::NAME), positions.len(), seed, &arguments) };
    });
    out
}

fn check_rope<T: Number>() {
    let mut numbers = Numbers::new(4);
    for sizes in [[1, 2, 2], [3, 64, 64], [5, 24, 16], [16, 128, 64]] {
        let [num_heads, head_dim, rotary_dim] = sizes;
        let (num_tokens, max_positions) = (4, 9);
        let len = max_positions * rotary_dim / 2;
        let x = stored::<T>(&numbers.normal(num_tokens * num_heads * head_dim));
        for style in [RopeStyle::Halves, RopeStyle::Pairs] {
            let positions = (0..num_tokens).map(|_| numbers.below(max_positions) as u32).collect();
            let (cos, sin) = (numbers.normal(len), numbers.normal(len));
            let rotation = Rotation { cos, sin, positions, sizes, style };
            let table = RopeTable::new(rotation.cos.clone(), rotation.sin.clone(), rotary_dim).unwrap();
            let x_tensor = tensor(&widened(&x), &[num_tokens, num_heads, head_dim]);
            let expected = rope(&x_tensor, &table, &rotation.positions, style).unwrap();
            let out = device_rope(&x, &rotation);
            assert_close(&widened(&out), &values(&expected), tolerance::<T>(1e-6));
            assert_rounded(&out, &device_rope(&widened(&x), &rotation));
        }
    }
}

#[test]
fn rope_is_that_of_the_cpu() {
    for_activations!(check_rope);
}

/// What a kernel calls a function, with its two numbers.
fn code_of(activation: GluActivation) -> (u32, f32, f32) {
    match activation {
        GluActivation::Silu => (Pointwise::Silu as u32, 0.0, 0.0),
        GluActivation::Pointwise(function) => (function as u32, 0.0, 0.0),
        GluActivation::ClampedSwish { alpha, limit } => (u32::MAX, alpha, limit),
    }
}

fn device_glu<T: Number>(gate_up: &[T], width: usize, activation: GluActivation) -> Vec<T> {
    let len = gate_up.len() / 2;
    let [out] = outputs(len, |seed, [out]: [*mut T; 1]| {
        let (function, alpha, limit) = code_of(activation);
        let (kernel, num_tokens, width) = (format!("glu_{}", T::NAME), (len / width) as i32, width as i32);
        let arguments: [&dyn Argument; 7] = [&gate_up.as_ptr(), &out, &num_tokens, &width, &function, &alpha, &limit];
        // SAFETY: the arguments of the kernel, a thread for each number.
        unsafe { launch(&kernel, len.div_ceil(ROW_THREADS), seed, &arguments) };
    });
    out
}

fn check_glu<T: Number>() {
    let mut numbers = Numbers::new(5);
    let clamped = GluActivation::ClampedSwish { alpha: 1.702, limit: 1.5 };
    for activation in FUNCTIONS.map(GluActivation::Pointwise).into_iter().chain([GluActivation::Silu, clamped]) {
        for (num_tokens, width) in [(1, 1), (3, 17), (5, 515)] {
            let x = stored::<T>(&numbers.normal(num_tokens * 2 * width));
            let expected = glu(&tensor(&widened(&x), &[num_tokens, 2 * width]), activation).unwrap();
            let out = device_glu(&x, width, activation);
            assert_close(&widened(&out), &values(&expected), tolerance::<T>(1e-6));
            assert_rounded(&out, &device_glu(&widened(&x), width, activation));
        }
        let spoilt = [f32::NAN, 1.0, 1.0, f32::NAN].map(T::from_f32);
        assert!(device_glu(&spoilt, 2, activation).iter().all(|value| value.to_f32().is_nan()), "{activation:?}");
    }
}

#[test]
fn glu_is_that_of_the_cpu() {
    for_activations!(check_glu);
}

fn device_pointwise<T: Number>(x: &[T], function: Pointwise) -> Vec<T> {
    let [out] = outputs(x.len(), |seed, [out]: [*mut T; 1]| {
        let (kernel, len, code) = (format!("pointwise_{}", T::NAME), x.len() as u64, function as u32);
        // SAFETY: the arguments of the kernel, a thread for each number.
        unsafe { launch(&kernel, x.len().div_ceil(ROW_THREADS), seed, &[&x.as_ptr(), &out, &len, &code]) };
    });
    out
}

#[test]
fn functions_are_accurate_far_from_zero_and_keep_a_nan() {
    let mut x: Vec<f32> = (-400..=400).map(|idx| idx as f32 * 0.05).collect();
    x.extend([f32::NAN, f32::INFINITY, 1e-30, -1e-30]);
    for function in FUNCTIONS {
        for (&x, &found) in x.iter().zip(&device_pointwise(&x, function)) {
            let expected = function.apply(x);
            // Relative, but for what is lost in any tail.
            let is_close = (found - expected).abs() <= 4e-6 * expected.abs() + 1e-9;
            let is_same = found == expected || found.is_nan() && expected.is_nan();
            assert!(is_close || is_same, "{function:?} of {x}: {found}, expected {expected}");
        }
        let rounded = stored::<bf16>(&x);
        assert_rounded(&device_pointwise(&rounded, function), &device_pointwise(&widened(&rounded), function));
    }
}

fn check_embedding<Stored: Copy, T: Number>(format: WeightFormat, name: &str, table: &[Stored], rows: &[f32]) {
    let (width, ids) = (33, [4u32, 0, 4, 9]);
    let weight = PackedWeight::from_f32(format, rows.len() / width, width, rows).unwrap();
    let expected = embedding(&ids, &weight).unwrap();
    let [out] = outputs(ids.len() * width, |seed, [out]: [*mut T; 1]| {
        let (kernel, width) = (format!("embedding_{name}_{}", T::NAME), width as i32);
        // SAFETY: the arguments of the kernel; all ids are in the table.
        unsafe { launch(&kernel, ids.len(), seed, &[&ids.as_ptr(), &table.as_ptr(), &out, &width]) };
    });
    assert_eq!(bits(&out), bits(&stored::<T>(&values(&expected))), "{name} to {}", T::NAME);
}

#[test]
fn embeddings_are_the_rows_of_the_table() {
    let rows = Numbers::new(6).with_outliers(10 * 33);
    let halves: Vec<f16> = rows.iter().map(|&value| f16::from_f32(value)).collect();
    let brains = stored::<bf16>(&rows);
    check_embedding::<_, f32>(WeightFormat::F32, "float", &rows, &rows);
    check_embedding::<_, bf16>(WeightFormat::F32, "float", &rows, &rows);
    check_embedding::<_, f32>(WeightFormat::F16, "f16", &halves, &rows);
    check_embedding::<_, bf16>(WeightFormat::F16, "f16", &halves, &rows);
    check_embedding::<_, f32>(WeightFormat::Bf16, "bf16", &brains, &rows);
    check_embedding::<_, bf16>(WeightFormat::Bf16, "bf16", &brains, &rows);
}

/// Numbers through a table of one row.
fn converted<Stored, T: Number>(kernel: &str, table: &[Stored]) -> Vec<T> {
    let [out] = outputs(table.len(), |seed, [out]: [*mut T; 1]| {
        let (id, width) = (0u32, table.len() as i32);
        // SAFETY: the arguments of the kernel; the table has a first row.
        unsafe { launch(kernel, 1, seed, &[&std::ptr::from_ref(&id), &table.as_ptr(), &out, &width]) };
    });
    out
}

#[test]
fn every_half_is_widened_and_every_kind_of_number_rounded() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for (half, found) in halves.iter().zip(converted::<_, f32>("embedding_f16_float", &halves)) {
        let expected = half.to_f32();
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{half:?}: {found}");
    }
    // Around every number of bf16: what is just below and above a tie, and the tie.
    let rest = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let floats: Vec<f32> =
        (0..=u32::from(u16::MAX)).flat_map(|upper| rest.map(|lower| f32::from_bits(upper << 16 | lower))).collect();
    for (float, found) in floats.iter().zip(converted::<_, bf16>("embedding_float_bf16", &floats)) {
        let expected = bf16::from_f32(*float);
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{float:e}: {found}");
    }
}

#[test]
fn argmax_is_that_of_the_cpu() {
    let mut numbers = Numbers::new(7);
    for width in [1, 2, 255, 256, 257, 5000] {
        let mut rows: Vec<Vec<f32>> = (0..4).map(|_| numbers.normal(width)).collect();
        let (first, last) = (width / 3, width - 1);
        (rows[0][first], rows[0][last]) = (9.0, 9.0);
        rows[1][first] = f32::NAN;
        rows[2].fill(f32::NEG_INFINITY);
        (rows[3][first], rows[3][last]) = (f32::INFINITY, f32::INFINITY);
        rows.push(vec![f32::NAN; width]);
        rows.push(vec![-0.0; width]);
        let flat = rows.concat();
        let [out] = outputs(rows.len(), |seed, [out]: [*mut u32; 1]| {
            let width = width as i32;
            // SAFETY: the arguments of the kernel, with rows of `width`.
            unsafe { launch("argmax_float", rows.len(), seed, &[&flat.as_ptr(), &out, &width]) };
        });
        let expected: Vec<u32> = rows.iter().map(|row| argmax(row).map_or(u32::MAX, |idx| idx as u32)).collect();
        assert_eq!(out, expected, "rows of {width}");
    }
}

/// `struct Router` of `route.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DeviceRouter {
    num_experts: u32,
    top_k: u32,
    scoring: u32,
    jitter: f32,
    num_groups: u32,
    top_groups: u32,
    group_score: u32,
    masked: f32,
    renormalizes: u32,
    eps: f32,
    min_sum: f32,
    scale: f32,
}

impl DeviceRouter {
    fn new(spec: &RouterSpec, num_experts: usize) -> Self {
        let (scoring, jitter) = match spec.scoring {
            Scoring::Softmax => (0, 0.0),
            Scoring::SoftmaxTopK => (1, 0.0),
            Scoring::Sigmoid => (2, 0.0),
            Scoring::SparseMixer { jitter } => (3, jitter),
        };
        let groups = spec.groups.unwrap_or(Groups { num: 0, top: 0, score: GroupScore::Max, masked: 0.0 });
        Self {
            num_experts: num_experts as u32,
            top_k: spec.top_k as u32,
            scoring,
            jitter,
            num_groups: groups.num as u32,
            top_groups: groups.top as u32,
            group_score: u32::from(groups.score == GroupScore::TopTwoSum),
            masked: groups.masked,
            renormalizes: u32::from(spec.renormalize.is_some()),
            eps: spec.renormalize.unwrap_or(0.0),
            min_sum: spec.min_sum,
            scale: spec.scale,
        }
    }
}

fn device_route(logits: &[f32], num_experts: usize, spec: &RouterSpec) -> (Vec<u32>, Vec<f32>) {
    let num_tokens = logits.len() / num_experts;
    let len = num_tokens * spec.top_k;
    let bias = spec.bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr());
    let run = |seed, experts: *mut u32, weights: *mut f32| {
        let shape = Launch {
            grid: [num_tokens as u32, 1, 1],
            block: [ROW_THREADS as u32, 1, 1],
            shared_bytes: 9 * num_experts,
            seed,
        };
        let router = DeviceRouter::new(spec, num_experts);
        // SAFETY: the arguments of the kernel; the bias is as long as there are experts.
        let done = unsafe { emulator::launch("route", shape, &[&logits.as_ptr(), &bias, &experts, &weights, &router]) };
        done.unwrap();
    };
    // Whichever of the two is not looked at goes where there is room for it.
    let [experts] = outputs(len, |seed, [out]: [*mut u32; 1]| run(seed, out, vec![0f32; len].as_mut_ptr()));
    let [weights] = outputs(len, |seed, [out]: [*mut f32; 1]| run(seed, vec![0u32; len].as_mut_ptr(), out));
    (experts, weights)
}

#[test]
fn routers_choose_as_on_the_cpu() {
    const TOKENS: usize = 6;
    let mut numbers = Numbers::new(8);
    for num_experts in [8, 64, 384] {
        let spec = |top_k, scoring| RouterSpec::new(scoring, top_k);
        let groups = |score, masked| Some(Groups { num: 4, top: 2, score, masked });
        let specs = [
            spec(2, Scoring::SoftmaxTopK),
            spec(num_experts.min(16), Scoring::Softmax),
            RouterSpec { renormalize: Some(0.0), min_sum: 0.5, ..spec(4, Scoring::Softmax) },
            RouterSpec { groups: groups(GroupScore::Max, 0.0), scale: 16.0, ..spec(3, Scoring::Softmax) },
            RouterSpec {
                bias: Some(numbers.normal(num_experts)),
                groups: groups(GroupScore::TopTwoSum, f32::NEG_INFINITY),
                renormalize: Some(1e-20),
                scale: 2.5,
                ..spec(4, Scoring::Sigmoid)
            },
            spec(2, Scoring::SparseMixer { jitter: 0.01 }),
            spec(2, Scoring::SparseMixer { jitter: 0.5 }),
        ];
        for spec in specs {
            let mut logits = numbers.normal(TOKENS * num_experts);
            // Ties, and one token that a NaN spoils.
            logits[..num_experts].fill(0.5);
            logits[num_experts + 3] = f32::NAN;
            let expected = route(&tensor(&logits, &[TOKENS, num_experts]), &spec).unwrap();
            let (experts, weights) = device_route(&logits, num_experts, &spec);
            assert_eq!(experts, expected.experts, "{spec:?} of {num_experts}");
            for (found, expected) in weights.chunks(spec.top_k).zip(expected.weights.chunks(spec.top_k)) {
                let is_close =
                    |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-6 * b.abs().max(1e-3) || a.is_nan() && b.is_nan();
                assert!(found.iter().zip(expected).all(is_close), "{spec:?}: {found:?}, expected {expected:?}");
            }
            let (alone, _) = device_route(&logits[5 * num_experts..6 * num_experts], num_experts, &spec);
            assert_eq!(alone, experts[5 * spec.top_k..6 * spec.top_k]);
        }
    }
}

/// `pointwise.cuh` has them in this order.
#[test]
fn functions_are_numbered_as_they_are_listed() {
    for (place, function) in FUNCTIONS.into_iter().enumerate() {
        assert_eq!(function as usize, place);
    }
}
