//! Bit layouts of the block-quantized formats of GGUF files.
//!
//! A block stores 32 consecutive elements of a row. Layouts, little-endian, from ggml's published format:
//!
//! | format | bytes | content | element `i` |
//! |---|---|---|---|
//! | `Q4_0` | 18 | f16 `d`, 16 bytes of nibbles | `d * (q - 8)` |
//! | `Q4_1` | 20 | f16 `d`, f16 `m`, 16 bytes of nibbles | `d * q + m` |
//! | `Q8_0` | 34 | f16 `d`, 32 signed bytes | `d * q` |
//!
//! Nibbles: the low half of byte `j` is element `j`, the high half is element `j + 16`.

use half::f16;

/// Elements per block, in every format here.
pub const BLOCK_LEN: usize = 32;

/// A block-quantized storage format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q8_0,
}

impl BlockFormat {
    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + BLOCK_LEN / 2,
            Self::Q4_1 => 4 + BLOCK_LEN / 2,
            Self::Q8_0 => 2 + BLOCK_LEN,
        }
    }

    /// Widens whole blocks to f32.
    ///
    /// # Panics
    /// If `bytes` is not a whole number of blocks or `out` has another length than they hold.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len() % self.block_bytes(), 0, "{self:?} data ends inside a block");
        assert_eq!(bytes.len() / self.block_bytes() * BLOCK_LEN, out.len(), "{self:?} output has the wrong length");
        for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(BLOCK_LEN)) {
            let scale = read_f16(block, 0);
            match self {
                Self::Q4_0 => widen_nibbles(&block[2..], out, |q| scale * (f32::from(q) - 8.0)),
                Self::Q4_1 => {
                    let min = read_f16(block, 2);
                    widen_nibbles(&block[4..], out, |q| scale * f32::from(q) + min);
                }
                Self::Q8_0 => {
                    for (value, byte) in out.iter_mut().zip(&block[2..]) {
                        *value = scale * f32::from(byte.cast_signed());
                    }
                }
            }
        }
    }
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn widen_nibbles(nibbles: &[u8], out: &mut [f32], widen: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK_LEN / 2);
    for ((byte, low), high) in nibbles.iter().zip(low).zip(high) {
        *low = widen(byte & 0x0f);
        *high = widen(byte >> 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: BlockFormat, header: &[f32], payload: &[u8], expected: impl Fn(usize) -> f32) {
        let mut block: Vec<u8> = header.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        block.extend_from_slice(payload);
        assert_eq!(block.len(), format.block_bytes());
        // Two blocks: the second must not read the first.
        let bytes = [block.clone(), block].concat();
        let mut out = vec![0.0; 2 * BLOCK_LEN];
        format.dequantize(&bytes, &mut out);
        for (i, value) in out.iter().enumerate() {
            assert_eq!(*value, expected(i % BLOCK_LEN), "{format:?} element {i}");
        }
    }

    #[test]
    fn blocks_widen_as_the_layout_says() {
        // Byte j holds element j (value j) and element j + 16 (value 15 - j).
        let nibbles: Vec<u8> = (0..16).map(|j| j | ((15 - j) << 4)).collect();
        let nibble = |i: usize| if i < 16 { i as f32 } else { (31 - i) as f32 };
        check(BlockFormat::Q4_0, &[0.5], &nibbles, |i| 0.5 * (nibble(i) - 8.0));
        check(BlockFormat::Q4_1, &[0.25, -3.0], &nibbles, |i| 0.25 * nibble(i) - 3.0);
        let signed: Vec<u8> = (0..32).map(|i: i32| (i * 8 - 128) as i8 as u8).collect();
        check(BlockFormat::Q8_0, &[2.0], &signed, |i| 2.0 * (i as f32 * 8.0 - 128.0));
    }

    #[test]
    #[should_panic(expected = "ends inside a block")]
    fn a_partial_block_is_refused() {
        BlockFormat::Q8_0.dequantize(&[0; 33], &mut [0.0; 32]);
    }
}
