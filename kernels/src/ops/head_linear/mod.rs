//! One small matrix product per head: the absorbed projections of multi-head latent attention.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::check::{self, Input, f32_output, f32_slice};
use crate::error::Result;
use crate::weight::PackedWeight;

const OP: &str = "head_linear";

/// Multiplies head `h` of each row by weight `h`. Each (row, head) is computed as by [`linear`](crate::linear). Fails
/// unless there is one weight per head, all of one shape, as wide as a head.
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
    }
    Ok(x.apply_op1_no_bwd(&HeadLinear { num_tokens, weights, out_features })?)
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
}
