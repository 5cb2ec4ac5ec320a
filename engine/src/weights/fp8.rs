//! Block-scaled FP8 as DeepSeek-V3 publishes it: E4M3 values, one f32 scale per tile of 128 × 128.

/// Tiles are 128 wide whatever the matrix: those at the edges are partial.
const TILE: usize = 128;

/// Shape of `weight_scale_inv` for a matrix `[rows, cols]`.
pub fn scale_shape(rows: usize, cols: usize) -> [usize; 2] {
    [rows.div_ceil(TILE), cols.div_ceil(TILE)]
}

/// `value * scale_inv` of its tile, for a row-major matrix `[rows, cols]`.
pub fn expand(bytes: &[u8], shape: [usize; 2], scales: &[f32]) -> Vec<f32> {
    let [_, cols] = shape;
    let table: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
    let scale_cols = cols.div_ceil(TILE);
    let scale_of = |idx: usize| scales[idx / cols / TILE * scale_cols + idx % cols / TILE];
    bytes.iter().enumerate().map(|(idx, &byte)| table[byte as usize] * scale_of(idx)).collect()
}

/// OCP E4M3FN: 4 exponent bits (bias 7), 3 mantissa bits, no infinities, 0x7f is NaN.
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = i32::from(byte >> 3 & 0xf);
    let mantissa = f32::from(byte & 7);
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_format() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x08, 2f32.powi(-6))]
        {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan());
    }

    #[test]
    fn edge_tiles_are_partial() {
        assert_eq!(scale_shape(576, 100), [5, 1]);
        let values = expand(&[0x38; 130 * 129], [130, 129], &[1.0, 2.0, 3.0, 4.0]);
        let at = |row: usize, col: usize| values[row * 129 + col];
        assert_eq!([at(0, 0), at(127, 128), at(128, 127), at(129, 128)], [1.0, 2.0, 3.0, 4.0]);
    }
}
