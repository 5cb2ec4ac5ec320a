//! Bit layouts of the block-quantized formats of GGUF files.
//!
//! A block stores 32 or 256 consecutive elements of a row, in groups that share a scale. Layouts, little-endian, from ggml's
//! published format; `q` is an element's code:
//!
//! | format | elements | bytes | content | element |
//! |---|---|---|---|---|
//! | `Q4_0` | 32 | 18 | f16 `d`, 16 bytes of nibbles | `d * (q - 8)` |
//! | `Q4_1` | 32 | 20 | f16 `d`, f16 `m`, 16 bytes of nibbles | `d * q + m` |
//! | `Q5_0` | 32 | 22 | f16 `d`, 4 bytes of fifth bits, nibbles | `d * (q - 16)` |
//! | `Q5_1` | 32 | 24 | f16 `d`, f16 `m`, 4 bytes of fifth bits, nibbles | `d * q + m` |
//! | `Q8_0` | 32 | 34 | f16 `d`, 32 signed bytes | `d * q` |
//! | `Q4_K` | 256 | 144 | f16 `d`, f16 `dmin`, 12 bytes of 6-bit `s` and `m` per group of 32, nibbles | `d * s * q - dmin * m` |
//! | `Q5_K` | 256 | 176 | the same with 32 bytes of fifth bits before the nibbles | `d * s * q - dmin * m` |
//! | `Q6_K` | 256 | 210 | 128 bytes of low nibbles, 64 of high bit pairs, a signed byte `s` per group of 16, f16 `d` | `d * s * (q - 32)` |
//! | `MXFP4` | 32 | 17 | a biased exponent `e`, 16 bytes of nibbles | `2^(e - 127) * E2M1[q]` |
//!
//! Nibbles of blocks of 32: the low half of byte `j` is element `j`, the high half is element `j + 16`; of larger blocks,
//! see the functions that read them.

use half::f16;

/// Elements of the largest block.
pub const MAX_BLOCK_LEN: usize = 256;

/// Groups of the block that has most.
pub const MAX_GROUPS: usize = 16;

/// What the sixteen codes of 4-bit floats stand for.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A block-quantized storage format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    Mxfp4,
}

/// What the codes of a format stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// `scale * (code - center)`
    Centered { center: u8 },
    /// `scale * code + min`
    Shifted,
    /// `scale * E2M1[code]`
    Fp4,
}

/// A block taken apart; only the first [`BlockFormat::block_len`] codes and [`BlockFormat::num_groups`] scales are set.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// In the order of the elements.
    pub codes: [u8; MAX_BLOCK_LEN],
    /// One per group.
    pub scales: [f32; MAX_GROUPS],
    /// The same; only read for [`Levels::Shifted`].
    pub mins: [f32; MAX_GROUPS],
}

impl Default for Block {
    fn default() -> Self {
        Self { codes: [0; MAX_BLOCK_LEN], scales: [0.0; MAX_GROUPS], mins: [0.0; MAX_GROUPS] }
    }
}

impl BlockFormat {
    /// Every format, in the order of the table above.
    pub const ALL: [Self; 9] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K, Self::Mxfp4];

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Mxfp4 => "MXFP4",
        }
    }

    /// Elements of one block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Mxfp4 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
            Self::Mxfp4 => 1 + 16,
        }
    }

    /// Elements under one scale.
    pub const fn group_len(self) -> usize {
        match self {
            Self::Q6K => 16,
            _ => 32,
        }
    }

    /// Scales of one block.
    pub const fn num_groups(self) -> usize {
        self.block_len() / self.group_len()
    }

    /// What a code stands for.
    pub const fn levels(self) -> Levels {
        match self {
            Self::Q4_0 => Levels::Centered { center: 8 },
            Self::Q5_0 => Levels::Centered { center: 16 },
            Self::Q6K => Levels::Centered { center: 32 },
            Self::Q8_0 => Levels::Centered { center: 128 },
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => Levels::Shifted,
            Self::Mxfp4 => Levels::Fp4,
        }
    }

    /// Takes the block at the start of `bytes` apart.
    ///
    /// # Panics
    /// If `bytes` is shorter than a block.
    pub fn read(self, bytes: &[u8], block: &mut Block) {
        let bytes = &bytes[..self.block_bytes()];
        match self {
            Self::Q4_0 => {
                block.scales[0] = read_f16(bytes, 0);
                read_nibbles(&bytes[2..], &mut block.codes);
            }
            Self::Q4_1 => {
                (block.scales[0], block.mins[0]) = (read_f16(bytes, 0), read_f16(bytes, 2));
                read_nibbles(&bytes[4..], &mut block.codes);
            }
            Self::Q5_0 => {
                block.scales[0] = read_f16(bytes, 0);
                read_nibbles(&bytes[6..], &mut block.codes);
                add_fifth_bits(&bytes[2..6], &mut block.codes);
            }
            Self::Q5_1 => {
                (block.scales[0], block.mins[0]) = (read_f16(bytes, 0), read_f16(bytes, 2));
                read_nibbles(&bytes[8..], &mut block.codes);
                add_fifth_bits(&bytes[4..8], &mut block.codes);
            }
            Self::Q8_0 => {
                block.scales[0] = read_f16(bytes, 0);
                // Into the unsigned range, as if they were centered there.
                block.codes.iter_mut().zip(&bytes[2..]).for_each(|(code, byte)| *code = byte ^ 0x80);
            }
            Self::Q4K => {
                read_six_bit_scales(bytes, block);
                read_chunked_nibbles(&bytes[16..], &mut block.codes);
            }
            Self::Q5K => {
                read_six_bit_scales(bytes, block);
                read_chunked_nibbles(&bytes[48..], &mut block.codes);
                for (idx, code) in block.codes.iter_mut().enumerate() {
                    *code |= (bytes[16 + idx % 32] >> (idx / 32) & 1) << 4;
                }
            }
            Self::Q6K => read_q6k(bytes, block),
            Self::Mxfp4 => {
                block.scales[0] = exponent(bytes[0]);
                read_nibbles(&bytes[1..], &mut block.codes);
            }
        }
    }

    /// Widens whole blocks to f32.
    ///
    /// # Panics
    /// If `bytes` is not a whole number of blocks or `out` has another length than they hold.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len() % self.block_bytes(), 0, "{self:?} data ends inside a block");
        let num_blocks = bytes.len() / self.block_bytes();
        assert_eq!(num_blocks * self.block_len(), out.len(), "{self:?} output has the wrong length");
        let mut block = Block::default();
        for (bytes, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len())) {
            self.read(bytes, &mut block);
            let codes = block.codes.chunks_exact(self.group_len());
            for (group_idx, (out, codes)) in out.chunks_exact_mut(self.group_len()).zip(codes).enumerate() {
                let (scale, min) = (block.scales[group_idx], block.mins[group_idx]);
                let pairs = out.iter_mut().zip(codes);
                match self.levels() {
                    Levels::Centered { center } => pairs.for_each(|(value, &code)| {
                        *value = scale * f32::from(i16::from(code) - i16::from(center));
                    }),
                    Levels::Shifted => pairs.for_each(|(value, &code)| *value = scale * f32::from(code) + min),
                    Levels::Fp4 => pairs.for_each(|(value, &code)| *value = scale * E2M1[usize::from(code)]),
                }
            }
        }
    }
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `2^(e - 127)`; 255 stands for no number.
fn exponent(biased: u8) -> f32 {
    match biased {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(biased) << 23),
    }
}

/// 32 elements from 16 bytes, those of the low halves first.
fn read_nibbles(nibbles: &[u8], codes: &mut [u8]) {
    let (low, high) = codes[..32].split_at_mut(16);
    for ((byte, low), high) in nibbles.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 0x0f, byte >> 4);
    }
}

/// The fifth bit of 32 elements, in order.
fn add_fifth_bits(bits: &[u8], codes: &mut [u8]) {
    for (idx, code) in codes[..32].iter_mut().enumerate() {
        *code |= (bits[idx / 8] >> (idx % 8) & 1) << 4;
    }
}

/// 256 elements from four chunks of 32 bytes: each the low halves of 32 elements, then the high halves of the next 32.
fn read_chunked_nibbles(nibbles: &[u8], codes: &mut [u8; MAX_BLOCK_LEN]) {
    for (nibbles, codes) in nibbles.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        let (low, high) = codes.split_at_mut(32);
        for ((byte, low), high) in nibbles.iter().zip(low).zip(high) {
            (*low, *high) = (byte & 0x0f, byte >> 4);
        }
    }
}

/// Scales and minimums of eight groups, 6 bits each: those of the first four in the low bits of bytes 0..4 and 4..8, of the
/// last four in the nibbles of bytes 8..12 with the high bits of the others above them.
fn read_six_bit_scales(bytes: &[u8], block: &mut Block) {
    let (d, d_min, packed) = (read_f16(bytes, 0), read_f16(bytes, 2), &bytes[4..16]);
    for group in 0..8 {
        let (scale, min) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 0x0f | (packed[group - 4] >> 6) << 4,
                packed[group + 4] >> 4 | (packed[group] >> 6) << 4,
            ),
        };
        block.scales[group] = d * f32::from(scale);
        block.mins[group] = -(d_min * f32::from(min));
    }
}

/// Two halves of 128 elements, each 64 bytes of low nibbles and 32 of bit pairs. Quarter `k` of a half takes the nibbles of
/// 32 of the bytes, low halves for the first two quarters, and pair `k` of the bits.
fn read_q6k(bytes: &[u8], block: &mut Block) {
    let (low, rest) = bytes.split_at(128);
    let (high, rest) = rest.split_at(64);
    let d = read_f16(rest, 16);
    for (scale, &byte) in block.scales.iter_mut().zip(&rest[..16]) {
        *scale = d * f32::from(byte.cast_signed());
    }
    for (idx, code) in block.codes.iter_mut().enumerate() {
        let (half, quarter, at) = (idx / 128, idx % 128 / 32, idx % 32);
        let nibble = low[half * 64 + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 0x0f;
        *code = nibble | (high[half * 32 + at] >> (quarter * 2) & 3) << 4;
    }
}

#[cfg(test)]
#[path = "block_format_tests.rs"]
mod tests;
