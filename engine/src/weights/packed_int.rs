//! Integers of 4 or 8 bits in little-endian words of 32 bits, the first in the lowest bits (compressed-tensors,
//! `pack-quantized`).

/// Unsigned codes of a matrix `[rows, cols]` whose rows are padded to whole words.
pub fn unpack(words: &[u8], num_bits: usize, [rows, cols]: [usize; 2]) -> Vec<u8> {
    let row_bytes = cols.div_ceil(32 / num_bits) * size_of::<u32>();
    let mut codes = Vec::with_capacity(rows * cols);
    for row in words.chunks_exact(row_bytes.max(1)) {
        match num_bits {
            4 => codes.extend(row.iter().flat_map(|byte| [byte & 0xf, byte >> 4]).take(cols)),
            _ => codes.extend_from_slice(&row[..cols]),
        }
    }
    codes
}

/// Unsigned codes of a matrix `[rows, cols]` packed along its columns: words `[rows / per word, cols]`.
pub fn unpack_columns(words: &[u8], num_bits: usize, [rows, cols]: [usize; 2]) -> Vec<u8> {
    let per_word = 32 / num_bits;
    let code = |row: usize, col: usize| {
        let word = (row / per_word * cols + col) * size_of::<u32>();
        let bit = row % per_word * num_bits;
        let byte = words[word + bit / 8];
        if num_bits == 4 { byte >> (bit % 8) & 0xf } else { byte }
    };
    (0..rows).flat_map(|row| (0..cols).map(move |col| code(row, col))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn the_lowest_bits_come_first_and_padding_is_dropped() {
        let words = bytes(&[0x8765_4321, 0xffff_ffa9, 0xfedc_ba98, 0x0000_0010]);
        let codes = unpack(&words, 4, [2, 10]);
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1]);
        assert_eq!(unpack(&bytes(&[0x0403_0201, 0xff]), 8, [1, 5]), [1, 2, 3, 4, 255]);
        assert_eq!(unpack(&[], 4, [0, 0]), [0u8; 0]);
    }

    #[test]
    fn zero_points_are_packed_down_their_columns() {
        let words = bytes(&[0x0000_0021, 0x8765_4343, 0x1, 0x2]);
        let codes = unpack_columns(&words, 4, [9, 2]);
        assert_eq!(codes, [1, 3, 2, 4, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 1, 2]);
        assert_eq!(unpack_columns(&bytes(&[0x0403_0201]), 8, [3, 1]), [1, 2, 3]);
    }
}
