//! Rotary position embedding (Su et al., 2021) from a table of angles.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::check::{self, Input, f32_output, f32_slice};
#[cfg(feature = "cuda")]
use crate::cuda::memory::Uploaded;
use crate::error::{KernelError, Result};

const OP: &str = "rope";

/// Cosine and sine of each position and frequency, scaling included.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Vec<f32>, // [max_positions, rotary_dim / 2]
    sin: Vec<f32>,
    rotary_dim: usize,
    #[cfg(feature = "cuda")]
    device_cos: Uploaded<f32>,
    #[cfg(feature = "cuda")]
    device_sin: Uploaded<f32>,
}

impl RopeTable {
    /// Takes `[max_positions, rotary_dim / 2]` cosines and sines. Fails if `rotary_dim` is odd or 0, or if the lengths
    /// differ or are not whole positions.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, rotary_dim: usize) -> Result<Self> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(KernelError::Invalid { op: OP, reason: format!("rotary_dim {rotary_dim} is not even") });
        }
        check::length(OP, "number of sines", sin.len(), cos.len())?;
        if !cos.len().is_multiple_of(rotary_dim / 2) {
            let reason = format!("{} cosines are not whole positions of {}", cos.len(), rotary_dim / 2);
            return Err(KernelError::Invalid { op: OP, reason });
        }
        Ok(Self {
            cos,
            sin,
            rotary_dim,
            #[cfg(feature = "cuda")]
            device_cos: Uploaded::default(),
            #[cfg(feature = "cuda")]
            device_sin: Uploaded::default(),
        })
    }

    /// Positions below this one are in the table.
    pub fn max_positions(&self) -> usize {
        self.cos.len() / (self.rotary_dim / 2)
    }

    fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.rotary_dim / 2..(position + 1) * self.rotary_dim / 2;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Which elements of a head form the pair that one angle turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `i` and `i + rotary_dim / 2` (GPT-NeoX, Llama in Hugging Face's layout).
    Halves,
    /// `2i` and `2i + 1` (GPT-J, DeepSeek); the order is kept.
    Pairs,
}

/// Rotates the first `rotary_dim` elements of each head of row `i` by the angles of `positions[i]`; the rest passes.
/// Fails if a head is shorter than `rotary_dim`, or a position is not in the table.
pub fn rope(
    x: &Tensor, /* [num_tokens, num_heads, head_dim] */
    table: &RopeTable,
    positions: &[u32], /* [num_tokens] */
    style: RopeStyle,
) -> Result<Tensor> {
    let input = Input { op: OP, what: "x", tensor: x };
    let [num_tokens, num_heads, head_dim] = input.dims("[num_tokens, num_heads, head_dim]")?;
    check::length(OP, "number of positions", positions.len(), num_tokens)?;
    if head_dim < table.rotary_dim {
        return Err(input.shape_error(format!("head_dim of at least {}", table.rotary_dim)));
    }
    for &position in positions {
        check::below(OP, "position", position as usize, table.max_positions())?;
    }
    Ok(x.apply_op1_no_bwd(&Rope { table, positions, style, num_heads, head_dim })?)
}

struct Rope<'a> {
    table: &'a RopeTable,
    positions: &'a [u32],
    style: RopeStyle,
    num_heads: usize,
    head_dim: usize,
}

impl CustomOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut out = f32_slice(x, x_layout)?.to_vec();
        cpu::rope(self, &mut out);
        Ok(f32_output(out, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::rope(self, (x, layout))
    }
}
