//! Numbers and comparisons for the tests of this crate.

use candle_core::{Device, Tensor};

use crate::quant::{Codes, QuantFormat};

/// Every code, in groups of every size.
pub(crate) const QUANTIZED: [QuantFormat; 8] = [
    QuantFormat::INT8,
    QuantFormat::INT4,
    QuantFormat { codes: Codes::Int8, group: 64 },
    QuantFormat { codes: Codes::Int8, group: 16 },
    QuantFormat { codes: Codes::Int8Min, group: 32 },
    QuantFormat { codes: Codes::Int4, group: 32 },
    QuantFormat { codes: Codes::Int4Min, group: 128 },
    QuantFormat { codes: Codes::Fp4, group: 32 },
];

/// A fixed sequence of numbers (SplitMix64).
pub(crate) struct Numbers {
    state: u64,
}

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// About normal: mean 0, variance 1.
    pub(crate) fn normal(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let sum: f64 = (0..12).map(|_| self.next() as f64 / u64::MAX as f64).sum();
                (sum - 6.0) as f32
            })
            .collect()
    }

    /// Normal, with every 97th number 1000 times as large: what real activations look like.
    pub(crate) fn with_outliers(&mut self, len: usize) -> Vec<f32> {
        let mut values = self.normal(len);
        values.iter_mut().step_by(97).for_each(|value| *value *= 1000.0);
        values
    }

    pub(crate) fn tensor(&mut self, dims: &[usize]) -> Tensor {
        tensor(&self.normal(dims.iter().product()), dims)
    }
}

pub(crate) fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(values, dims, &Device::Cpu).unwrap()
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// Asserts that the numbers are within `tolerance` times the largest expected magnitude (1e-20 at least: the fast
/// exponential is never quite zero).
#[track_caller]
pub(crate) fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(1e-20f32, |largest, value| largest.max(value.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance * largest, "entry {i}: {got}, expected {expected} (max {largest})");
    }
}
