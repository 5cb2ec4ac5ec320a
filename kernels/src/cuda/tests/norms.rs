//! Norms and rotation.

use emulator::Argument;
use half::bf16;

use super::{Number, assert_rounded, bits, for_activations, launch, outputs, stored, tolerance, widened};
use crate::ops::layer_norm::layer_norm;
use crate::ops::rms_norm::{rms_norm, rms_norm_residual};
use crate::ops::rope::{RopeStyle, RopeTable, rope};
use crate::testing::{Numbers, assert_close, tensor, values};

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
