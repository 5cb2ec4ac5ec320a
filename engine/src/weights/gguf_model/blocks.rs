//! Block-quantized matrices of a GGUF file to weights: in their own bits where the kernels have such a format, else expanded.

use kernels::block_format::{Block, BlockFormat, Levels};
use kernels::{Codes, GroupRow, PackedWeight, QuantFormat};

use crate::config::WeightDtype;
use crate::error::EngineError;
use crate::weights::checkpoint::TensorEntry;
use crate::weights::loader::Loader;

/// What the centered codes of [`Codes::Int8`] are centered on.
const INT8_CENTER: u8 = 128;

/// The matrix `[rows, cols]` in blocks that starts `offset` bytes into a tensor.
#[derive(Clone, Copy)]
pub(in crate::weights) struct BlockMatrix<'a> {
    pub(in crate::weights) name: &'a str,
    pub(in crate::weights) entry: &'a TensorEntry,
    pub(in crate::weights) format: BlockFormat,
    pub(in crate::weights) offset: usize,
    pub(in crate::weights) shape: [usize; 2],
}

/// The format that holds each of these without requantizing, but for the rounding of products of scales to f16. Of unlike
/// ones it is one of eight bits.
pub(in crate::weights) fn joint_format(formats: &[BlockFormat]) -> Option<QuantFormat> {
    let own: Vec<QuantFormat> = formats.iter().map(|format| own_format(*format)).collect();
    let first = *own.first()?;
    if own.iter().all(|format| *format == first) {
        return Some(first);
    }
    let group = own.iter().map(|format| format.group).min()?;
    let mut codes = Codes::Int8;
    for format in formats {
        match format.levels() {
            Levels::Centered { .. } => {}
            Levels::Shifted => codes = Codes::Int8Min,
            // Its levels are not evenly spaced.
            Levels::Fp4 => return None,
        }
    }
    Some(QuantFormat { codes, group })
}

fn own_format(format: BlockFormat) -> QuantFormat {
    let codes = match format {
        BlockFormat::Q4_0 => Codes::Int4,
        BlockFormat::Q4_1 | BlockFormat::Q4K => Codes::Int4Min,
        BlockFormat::Q5_1 | BlockFormat::Q5K => Codes::Int8Min,
        BlockFormat::Q5_0 | BlockFormat::Q8_0 | BlockFormat::Q6K => Codes::Int8,
        BlockFormat::Mxfp4 => Codes::Fp4,
    };
    QuantFormat { codes, group: format.group_len() as u16 }
}

impl Loader<'_> {
    /// The matrix, its rows in their order: packed into the format that is common to `formats`, or expanded where there is
    /// none or another type was asked for.
    pub(in crate::weights) fn block_weight(
        &self,
        matrix: BlockMatrix,
        formats: &[BlockFormat],
    ) -> Result<PackedWeight, EngineError> {
        let BlockMatrix { name, entry, format, offset, shape: [rows, cols] } = matrix;
        let row_bytes = cols / format.block_len() * format.block_bytes();
        let bytes = &self.stored_bytes(entry)[offset..offset + rows * row_bytes];
        let row_at = |row: usize| {
            let start = entry.order.stored_row(row) * row_bytes;
            &bytes[start..start + row_bytes]
        };
        let target = joint_format(formats).filter(|_| self.storage().dtype == WeightDtype::Auto);
        let Some(target) = target else {
            let mut values = vec![0.0; rows * cols];
            for (row, out) in values.chunks_exact_mut(cols.max(1)).enumerate() {
                format.dequantize(row_at(row), out);
            }
            return self.expanded(name, [rows, cols], &values);
        };
        PackedWeight::from_groups(target, rows, cols, |row, out| repack(format, row_at(row), target, out))
            .map_err(|error| self.invalid(name, error.to_string()))
    }
}

/// One row of blocks as one of a packed weight.
fn repack(format: BlockFormat, bytes: &[u8], target: QuantFormat, row: &mut GroupRow) {
    let (block_len, group_len) = (format.block_len(), usize::from(target.group));
    let mut block = Block::default();
    for (idx, bytes) in bytes.chunks_exact(format.block_bytes()).enumerate() {
        format.read(bytes, &mut block);
        let codes = &mut row.codes[idx * block_len..(idx + 1) * block_len];
        codes.copy_from_slice(&block.codes[..block_len]);
        let center = match format.levels() {
            Levels::Centered { center } => center,
            Levels::Shifted | Levels::Fp4 => 0,
        };
        if target.codes == Codes::Int8 {
            codes.iter_mut().for_each(|code| *code += INT8_CENTER - center);
        }
        for group in 0..block_len / group_len {
            // A group of the target may be a part of one.
            let from = group * group_len / format.group_len();
            let at = idx * (block_len / group_len) + group;
            row.scales[at] = block.scales[from];
            row.mins[at] = match format.levels() {
                Levels::Shifted => block.mins[from],
                _ => -f32::from(center) * block.scales[from],
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::WeightFormat;

    use super::*;

    /// Random codes under scales of ordinary size: ggml's headers are f16s, and exponents in MXFP4.
    fn random_row(format: BlockFormat, num_blocks: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let mut bytes: Vec<u8> = (0..num_blocks * format.block_bytes()).map(|_| next()).collect();
        let halves: &[usize] = match format {
            BlockFormat::Mxfp4 => &[],
            BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 => &[0],
            BlockFormat::Q6K => &[208],
            _ => &[0, 2],
        };
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            if format == BlockFormat::Mxfp4 {
                block[0] = 115 + block[0] % 12;
            }
            for &at in halves {
                // Between 2^-7 and 2^-5, of either sign.
                block[at + 1] = 0x20 | block[at + 1] & 0x87;
            }
        }
        bytes
    }

    /// Largest error as a share of the largest value.
    fn error(format: BlockFormat, target: QuantFormat) -> f32 {
        let cols = 512;
        let rows: Vec<Vec<u8>> =
            (0..3).map(|seed| random_row(format, cols / format.block_len(), seed * 77 + 5)).collect();
        let mut expected = vec![0.0; rows.len() * cols];
        for (row, out) in rows.iter().zip(expected.chunks_exact_mut(cols)) {
            format.dequantize(row, out);
        }
        let fill = |row: usize, out: &mut GroupRow| repack(format, &rows[row], target, out);
        let found = PackedWeight::from_groups(target, rows.len(), cols, fill).unwrap();
        assert_eq!(found.format(), WeightFormat::Quantized(target));
        let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
        let worst = found.to_f32().iter().zip(&expected).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(largest > 0.0);
        worst / largest
    }

    #[test]
    fn a_format_of_its_own_changes_at_most_the_scales_last_bits() {
        for format in BlockFormat::ALL {
            let error = error(format, joint_format(&[format]).unwrap());
            // Products of f16 scales with 6 or 8 bits are rounded to f16.
            let is_exact = !matches!(format, BlockFormat::Q4K | BlockFormat::Q5K | BlockFormat::Q6K);
            assert!(if is_exact { error == 0.0 } else { error < 1e-3 }, "{format:?}: {error}");
        }
    }

    #[test]
    fn unlike_formats_meet_in_eight_bits() {
        use BlockFormat::{Mxfp4, Q4_0, Q4K, Q5_0, Q6K, Q8_0};
        let int8 = |codes, group| Some(QuantFormat { codes, group });
        for (formats, expected) in [
            ([Q4K, Q6K], int8(Codes::Int8Min, 16)),
            ([Q4K, Q8_0], int8(Codes::Int8Min, 32)),
            ([Q4_0, Q6K], int8(Codes::Int8, 16)),
            ([Q5_0, Q8_0], int8(Codes::Int8, 32)),
            ([Mxfp4, Q8_0], None),
        ] {
            assert_eq!(joint_format(&formats), expected, "{formats:?}");
            for (format, target) in formats.iter().zip(expected) {
                let error = error(*format, target);
                assert!(error < 1e-3, "{format:?} as {target:?}: {error}");
            }
        }
    }
}
