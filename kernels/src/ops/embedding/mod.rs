//! Rows of an embedding table, widened.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Device, Tensor};

use crate::check;
use crate::error::{KernelError, Result};
use crate::weight::PackedWeight;

const OP: &str = "embedding";

/// Row `ids[i]` of the table as row `i`, in f32, where the table lies. Fails if an id is not in the table.
pub fn embedding(
    ids: &[u32],          /* [num_tokens] */
    table: &PackedWeight, /* [vocab_size, hidden_size] */
) -> Result<Tensor /* [num_tokens, hidden_size] */> {
    embedding_as(ids, table, DType::F32)
}

/// The same as activations of this type: f32, or on a device bf16, to nearest, ties to even.
pub fn embedding_as(
    ids: &[u32],          /* [num_tokens] */
    table: &PackedWeight, /* [vocab_size, hidden_size] */
    dtype: DType,
) -> Result<Tensor /* [num_tokens, hidden_size] */> {
    for &id in ids {
        check::below(OP, "token id", id as usize, table.rows())?;
    }
    let device = table.device();
    if dtype != DType::F32 && (device.is_cpu() || dtype != DType::BF16) {
        return Err(KernelError::DType { op: OP, what: "result", got: dtype, expected: DType::F32 });
    }
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(cuda::embedding(&device, ids, table, dtype)?),
        _ => on_cpu(ids, table),
    }
}

fn on_cpu(ids: &[u32], table: &PackedWeight) -> Result<Tensor> {
    let hidden_size = table.cols();
    let mut out = vec![0.0; ids.len() * hidden_size];
    for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size.max(1))) {
        table.row_f32(id as usize, row);
    }
    Ok(Tensor::from_vec(out, (ids.len(), hidden_size), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::WeightFormat;

    #[test]
    fn rows_in_the_order_of_the_ids() {
        let values: Vec<f32> = (0..15).map(|i| i as f32).collect();
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
            let table = PackedWeight::from_f32(format, 5, 3, &values).unwrap();
            let rows = embedding(&[4, 0, 4], &table).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(rows, [[12.0, 13.0, 14.0], [0.0, 1.0, 2.0], [12.0, 13.0, 14.0]]);
            assert_eq!(embedding(&[], &table).unwrap().dims(), [0, 3]);
            let error = embedding(&[1, 5], &table).unwrap_err();
            assert_eq!(error.to_string(), "embedding: token id is 5, it must be below 5");
            let error = embedding_as(&[1], &table, DType::BF16).unwrap_err();
            assert_eq!(error.to_string(), "embedding: result is BF16, expected F32");
        }
    }
}
