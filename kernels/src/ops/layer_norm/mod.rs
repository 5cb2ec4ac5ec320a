//! Layer norm with weight and bias (Ba et al., 2016).

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice};
use crate::error::Result;

const OP: &str = "layer_norm";

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension. Fails unless all are f32 and contiguous,
/// and weight and bias as long as the last dimension.
pub fn layer_norm(
    x: &Tensor,      /* [.., D] */
    weight: &Tensor, /* [D] */
    bias: &Tensor,   /* [D] */
    eps: f32,
) -> Result<Tensor> {
    let input = Input { op: OP, what: "x", tensor: x };
    input.check()?;
    let Some(&dim) = x.dims().last() else {
        return Err(input.shape_error("[.., D]".to_owned()));
    };
    Input { op: OP, what: "weight", tensor: weight }.has_dims(&[dim])?;
    Input { op: OP, what: "bias", tensor: bias }.has_dims(&[dim])?;
    Ok(x.apply_op3_no_bwd(weight, bias, &LayerNorm { eps })?)
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (weight, bias) = (f32_slice(weight, weight_layout)?, f32_slice(bias, bias_layout)?);
        let mut out = f32_slice(x, x_layout)?.to_vec();
        out.chunks_exact_mut(weight.len().max(1)).for_each(|row| normalize(row, weight, bias, self.eps));
        Ok(f32_output(out, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::layer_norm(self, [(x, x_layout), (weight, weight_layout), (bias, bias_layout)])
    }
}

/// Plain loops with f64 sums: a few rows a layer in the one family that has it.
fn normalize(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let len = row.len() as f64;
    let mean = row.iter().map(|&value| f64::from(value)).sum::<f64>() / len;
    let variance = row.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / len;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    for ((value, &weight), &bias) in row.iter_mut().zip(weight).zip(bias) {
        *value = ((f64::from(*value) - mean) * scale) as f32 * weight + bias;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tensor, values};

    #[test]
    fn rows_have_the_mean_and_spread_of_the_parameters() {
        let x = tensor(&[1.0, 2.0, 3.0, 4.0, -8.0, 0.0, 0.0, 8.0], &[2, 4]);
        let y = layer_norm(&x, &tensor(&[2.0; 4], &[4]), &tensor(&[0.5; 4], &[4]), 0.0).unwrap();
        let y = values(&y);
        for row in y.chunks(4) {
            let mean = row.iter().sum::<f32>() / 4.0;
            let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / 4.0;
            assert!((mean - 0.5).abs() < 1e-6 && (variance - 4.0).abs() < 1e-5, "{row:?}");
        }
        assert!((y[0] - (0.5 - 2.0 * 1.5 / 1.25f32.sqrt())).abs() < 1e-6);
    }

    #[test]
    fn misfits_are_refused() {
        let (x, three) = (tensor(&[0.0; 8], &[2, 4]), tensor(&[1.0; 3], &[3]));
        assert!(layer_norm(&x, &three, &three, 1e-5).is_err());
    }
}
