//! One small matrix product per head: the absorbed projections of multi-head latent attention.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};

use crate::check::{self, Input, f32_output, f32_slice};
#[cfg(feature = "cuda")]
use crate::cuda::memory::Address;
use crate::error::{KernelError, Result};
#[cfg(feature = "cuda")]
use crate::ops::linear::cuda::Product;
use crate::weight::{PackedWeight, WeightFormat};

const OP: &str = "head_linear";

/// Multiplies head `h` of each row by weight `h`. Each (row, head) is computed as by [`linear`](crate::linear). Fails
/// unless there is one weight per head, all of one shape, as wide as a head, and on a device all in a format of one kind.
pub fn head_linear(
    x: &Tensor,               /* [num_tokens, num_heads, in_features] */
    weights: &[PackedWeight], /* per head [out_features, in_features] */
) -> Result<Tensor /* [num_tokens, num_heads, out_features] */> {
    let input = Input { op: OP, what: "x", tensor: x };
    let [num_tokens, num_heads, in_features] = input.dims("[num_tokens, num_heads, in_features]")?;
    check::length(OP, "number of weights", weights.len(), num_heads)?;
    let out_features = weights.first().map_or(0, PackedWeight::rows);
    for weight in weights {
        check::length(OP, "width of a head's weight", weight.cols(), in_features)?;
        check::length(OP, "rows of a head's weight", weight.rows(), out_features)?;
        check::lies_on(OP, "a head's weight", weight, x.device())?;
    }
    if !x.device().is_cpu() {
        check_kinds(weights)?;
    }
    Ok(x.apply_op1_no_bwd(&HeadLinear { num_tokens, weights, out_features })?)
}

/// A launch on a device is for rows of one form.
fn check_kinds(weights: &[PackedWeight]) -> Result<()> {
    let is_alike = |pair: &[PackedWeight]| match (pair[0].format(), pair[1].format()) {
        (WeightFormat::Quantized(a), WeightFormat::Quantized(b)) => a.row_form() == b.row_form(),
        (a, b) => a == b,
    };
    match weights.windows(2).find(|pair| !is_alike(pair)) {
        None => Ok(()),
        Some(pair) => {
            let [a, b] = [0, 1].map(|idx: usize| pair[idx].format().name());
            let reason = format!("heads have {a} and {b} weights for which a device has no common kernel");
            Err(KernelError::Invalid { op: OP, reason })
        }
    }
}

struct HeadLinear<'a> {
    num_tokens: usize,
    weights: &'a [PackedWeight],
    out_features: usize,
}

impl CustomOp1 for HeadLinear<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = cpu::head_linear(self, f32_slice(x, x_layout)?);
        Ok(f32_output(out, (self.num_tokens, self.weights.len(), self.out_features)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, x_layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (num_tokens, weights, out_features) = (self.num_tokens, self.weights, self.out_features);
        let product = Product { x: (x, x_layout), num_tokens, weights, bias: Address::NULL, out: x.dtype() };
        Ok((product.compute()?, Shape::from((num_tokens, weights.len(), out_features))))
    }
}
