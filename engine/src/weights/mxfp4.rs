//! MXFP4 (OCP microscaling): 32 values of 4 bits (E2M1) under one power of two.

use kernels::{Codes, PackedWeight, QuantFormat, WeightFormat};

use super::loader::Loader;
use crate::config::WeightDtype;
use crate::error::EngineError;

/// Values of a block, and bytes they take.
pub const BLOCK: usize = 32;
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// Ours, with the same numbers.
pub const FORMAT: QuantFormat = QuantFormat { codes: Codes::Fp4, group: BLOCK as u16 };

/// Magnitudes of the three low bits; the fourth is the sign.
const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Blocks of 16 bytes, the low nibble first, each under its scale `2^(s - 127)`.
pub fn expand(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    let value = |nibble: u8| {
        let magnitude = MAGNITUDES[usize::from(nibble & 7)];
        if nibble & 8 != 0 { -magnitude } else { magnitude }
    };
    let mut out = Vec::with_capacity(2 * blocks.len());
    for (block, &scale) in blocks.chunks_exact(BLOCK_BYTES).zip(scales) {
        let factor = 2f32.powi(i32::from(scale) - 127);
        out.extend(block.iter().flat_map(|byte| [value(byte & 0xf) * factor, value(byte >> 4) * factor]));
    }
    out
}

/// A matrix `[rows, cols]` of whole blocks.
#[derive(Clone, Copy, Debug)]
pub struct Mxfp4<'a> {
    pub blocks: &'a [u8],
    pub scales: &'a [u8],
    pub shape: [usize; 2],
}

impl Loader<'_> {
    /// The matrix of tensor `{name}`, row `row` being the stored row `stored_row(row)`: as it is, or expanded where another
    /// type was asked for.
    pub fn mxfp4_weight(
        &self,
        name: &str,
        matrix: Mxfp4,
        stored_row: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<PackedWeight, EngineError> {
        let Mxfp4 { blocks, scales, shape: [rows, cols] } = matrix;
        let num_blocks = cols / BLOCK;
        let row_of = |row: usize| {
            let blocks = &blocks[stored_row(row) * num_blocks * BLOCK_BYTES..][..num_blocks * BLOCK_BYTES];
            (blocks, &scales[stored_row(row) * num_blocks..][..num_blocks])
        };
        if self.storage().dtype != WeightDtype::Auto {
            let values: Vec<f32> = (0..rows).map(row_of).flat_map(|(blocks, scales)| expand(blocks, scales)).collect();
            self.expect_finite(name, cols, &values)?;
            return Ok(PackedWeight::from_f32(WeightFormat::F32, rows, cols, &values)?);
        }
        let packed = PackedWeight::from_groups(FORMAT, rows, cols, |row, out| {
            let (blocks, scales) = row_of(row);
            for (codes, byte) in out.codes.as_chunks_mut::<2>().0.iter_mut().zip(blocks) {
                *codes = [byte & 0xf, byte >> 4];
            }
            for (out, &scale) in out.scales.iter_mut().zip(scales) {
                *out = 2f32.powi(i32::from(scale) - 127);
            }
        });
        packed.map_err(|error| self.invalid(name, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_signed_magnitudes_under_their_scale() {
        let mut blocks = vec![0; 2 * BLOCK_BYTES];
        blocks[0] = 0xf1; // 0.5, -6
        blocks[BLOCK_BYTES] = 0x2b; // -1.5, 1
        let values = expand(&blocks, &[127, 129]);
        assert_eq!((values.len(), &values[..3]), (64, &[0.5, -6.0, 0.0][..]));
        assert_eq!(values[32..34], [-6.0, 4.0]);
    }
}
