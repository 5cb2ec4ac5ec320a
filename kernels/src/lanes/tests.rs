//! Every instruction set gives the same bits, and a tile gives the bits of its entries alone.

use half::{bf16, f16};

use super::{Element, Lanes, dot_tile, exp_scaled, exp_sum, max, silu_mul, sum_of_squares};
use crate::dispatch::{Isa, Kernel};
use crate::testing::Numbers;

struct Dots<'a, E> {
    x: &'a [Vec<f32>],
    w: &'a [Vec<E>],
}

impl<E: Element> Kernel for Dots<'_, E> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Vec<u32> {
        let mut bits = Vec::new();
        let tile = dot_tile::<L, E, 3, 4>(
            lanes,
            [&self.x[0], &self.x[1], &self.x[2]],
            [&self.w[0], &self.w[1], &self.w[2], &self.w[3]],
        );
        for (x, tile_row) in self.x.iter().zip(tile) {
            for (w, entry) in self.w.iter().zip(tile_row) {
                let [[alone]] = dot_tile::<L, E, 1, 1>(lanes, [x], [w]);
                assert_eq!(alone.to_bits(), entry.to_bits());
                bits.push(entry.to_bits());
            }
        }
        bits
    }
}

fn check_dots<E: Element>(from_f32: fn(f32) -> E) {
    let mut numbers = Numbers::new(7);
    for len in (0..70).chain([576, 1536, 1537]) {
        let x: Vec<_> = (0..3).map(|_| numbers.normal(len)).collect();
        let w: Vec<Vec<E>> = (0..4).map(|_| numbers.normal(len).into_iter().map(from_f32).collect()).collect();
        let results: Vec<_> = Isa::available().into_iter().map(|isa| isa.run(Dots { x: &x, w: &w })).collect();
        assert!(results.iter().all(|result| *result == results[0]), "length {len}");
    }
}

#[test]
fn dots_are_equal_on_every_path() {
    check_dots::<f32>(|value| value);
    check_dots(bf16::from_f32);
    check_dots(f16::from_f32);
}

struct Functions<'a> {
    x: &'a [f32],
}

impl Kernel for Functions<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Vec<f32> {
        let mut out = self.x.to_vec();
        let max = max(lanes, &out);
        let sum = exp_sum(lanes, &mut out, max);
        let mut silu = vec![0.0; self.x.len()];
        silu_mul(lanes, self.x, self.x, &mut silu);
        out.extend(silu);
        out.extend([max, sum, sum_of_squares(lanes, self.x)]);
        let mut scaled = self.x.to_vec();
        exp_scaled(lanes, &mut scaled, max, 0.7);
        out.extend(scaled);
        out
    }
}

#[test]
fn functions_are_equal_on_every_path_and_accurate() {
    let mut numbers = Numbers::new(8);
    for len in (1..40).chain([1000]) {
        let x: Vec<f32> = numbers.normal(len).into_iter().map(|value| value * 8.0).collect();
        let results: Vec<_> = Isa::available().into_iter().map(|isa| isa.run(Functions { x: &x })).collect();
        for result in &results {
            assert!(result.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits()), "length {len}");
        }
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(results[0][2 * len], max);
        for (&x, &exp) in x.iter().zip(&results[0]) {
            let expected = f64::from(x - max).exp();
            assert!((f64::from(exp) - expected).abs() <= 2e-7 * expected, "exp({}) = {exp}", x - max);
        }
    }
}

#[test]
fn a_nan_reaches_the_sum() {
    let mut x = vec![1.0; 20];
    x[17] = f32::NAN;
    for isa in Isa::available() {
        let result = isa.run(Functions { x: &x });
        assert!(result[17].is_nan() && result[37].is_nan() && result[41].is_nan());
        assert_eq!(result[40], 1.0);
    }
}
