//! What the kernels of products take, as they take it.

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::address::Address;
use crate::weight::{PackedWeight, WeightFormat};

/// `PRODUCT_THREADS` of `product.cuh`.
pub(crate) const PRODUCT_THREADS: usize = 128;

/// Tiles of products on matrix instructions: their name, outputs and tokens.
pub(crate) const TILES: [(&str, usize, usize); 2] = [("few", 64, 8), ("many", 128, 32)];

/// `PLAIN_OUTS` and `PLAIN_TOKENS` of `dense_product.cuh`.
pub(crate) const PLAIN_OUTS: usize = 32;
pub(crate) const PLAIN_TOKENS: usize = 8;

/// `struct QuantRows` of `quant_product.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct QuantRows {
    pub(crate) codes: Address,
    pub(crate) terms: Address,
}

/// `struct QuantWeight` of `quant.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct QuantWeight {
    pub(crate) bytes: Address,
    pub(crate) bias: Address,
    pub(crate) codes: u32,
    pub(crate) group: u32,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
}

impl QuantWeight {
    pub(crate) const NONE: Self =
        Self { bytes: Address::NULL, bias: Address::NULL, codes: 0, group: 16, rows: 0, cols: 0 };

    /// Of a weight whose bytes lie there. Panics if it is not quantized.
    pub(crate) fn new(weight: &PackedWeight, bytes: Address, bias: Address) -> Self {
        let WeightFormat::Quantized(format) = weight.format() else { panic!("{weight:?} is not quantized") };
        Self {
            bytes,
            bias,
            codes: format.codes as u32,
            group: format.group.into(),
            rows: weight.rows() as u32,
            cols: weight.cols() as u32,
        }
    }
}

/// `struct DenseWeight` of `dense_product.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct DenseWeight {
    pub(crate) values: Address,
    pub(crate) bias: Address,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
}

impl DenseWeight {
    pub(crate) const NONE: Self = Self { values: Address::NULL, bias: Address::NULL, rows: 0, cols: 0 };

    /// Of a weight whose numbers lie there.
    pub(crate) fn new(weight: &PackedWeight, values: Address, bias: Address) -> Self {
        Self { values, bias, rows: weight.rows() as u32, cols: weight.cols() as u32 }
    }
}

#[cfg(feature = "cuda")]
// SAFETY: two addresses.
unsafe impl DeviceRepr for QuantRows {}
#[cfg(feature = "cuda")]
// SAFETY: addresses and numbers without padding.
unsafe impl DeviceRepr for QuantWeight {}
#[cfg(feature = "cuda")]
// SAFETY: addresses and numbers without padding.
unsafe impl DeviceRepr for DenseWeight {}

/// What kernels call a type of weights. Panics if they are quantized.
pub(crate) fn dense_name(format: WeightFormat) -> &'static str {
    match format {
        WeightFormat::F32 => "float",
        WeightFormat::F16 => "f16",
        WeightFormat::Bf16 => "bf16",
        WeightFormat::Quantized(_) => panic!("{} has kernels of its own", format.name()),
    }
}
