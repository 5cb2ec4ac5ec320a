//! Rows of an embedding table, widened to f32.

use candle_core::{Device, Tensor};

use crate::check;
use crate::error::Result;
use crate::weight::PackedWeight;

const OP: &str = "embedding";

/// Row `ids[i]` of the table as row `i`. Fails if an id is not in the table.
pub fn embedding(
    ids: &[u32],          /* [num_tokens] */
    table: &PackedWeight, /* [vocab_size, hidden_size] */
) -> Result<Tensor /* [num_tokens, hidden_size] */> {
    for &id in ids {
        check::below(OP, "token id", id as usize, table.rows())?;
    }
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
        }
    }
}
