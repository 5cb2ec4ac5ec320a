//! MXFP4 (OCP microscaling): 32 values of 4 bits (E2M1) under one power of two.

/// Values of a block, and bytes they take.
pub const BLOCK: usize = 32;
pub const BLOCK_BYTES: usize = BLOCK / 2;

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
