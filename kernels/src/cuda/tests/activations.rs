//! Functions of single numbers, and of a gate and what it lets through.

use emulator::Argument;
use half::bf16;

use super::{Number, ROW_THREADS, assert_rounded, for_activations, launch, outputs, stored, tolerance, widened};
use crate::ops::glu::{GluActivation, glu};
use crate::ops::pointwise::Pointwise;
use crate::testing::{Numbers, assert_close, tensor, values};

/// `pointwise.cuh` has them in this order.
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

fn device_glu<T: Number>(gate_up: &[T], width: usize, activation: GluActivation) -> Vec<T> {
    let len = gate_up.len() / 2;
    let [out] = outputs(len, |seed, [out]: [*mut T; 1]| {
        let (function, alpha, limit) = activation.device_code();
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

#[test]
fn functions_are_numbered_as_they_are_listed() {
    for (place, function) in FUNCTIONS.into_iter().enumerate() {
        assert_eq!(function as usize, place);
    }
}
