//! Matrices of 4- or 8-bit integers under scales and zero points, in the orders that checkpoints pack them into words of
//! 32 bits.

use kernels::{Codes, GroupRow, QuantFormat};

/// Where the code of row `row` and column `col` of a matrix `[rows, cols]` lies, the first in the lowest bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordOrder {
    /// Words `[rows, cols / per word]`, each row padded to whole words (compressed-tensors).
    AlongRows,
    /// Words `[rows / per word, cols]` (zero points of compressed-tensors).
    DownColumns,
    /// Words `[cols / per word, rows]` (GPTQ).
    TransposedColumns,
    /// Words `[cols, rows / per word]` (zero points of GPTQ).
    TransposedRows,
    /// The same, rows in a word in the order 0, 2, 4, 6, 1, 3, 5, 7 (AWQ).
    Interleaved,
}

/// At which place of a word the row `idx % 8` lies where rows are interleaved.
const INTERLEAVED_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Packed unsigned codes of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct PackedCodes<'a> {
    pub order: WordOrder,
    /// 4 or 8; 4 where interleaved.
    pub num_bits: usize,
    /// Of the matrix, not of the words.
    pub shape: [usize; 2],
    /// Little-endian, as many as [`WordOrder::words_shape`] says.
    pub words: &'a [u8],
}

impl WordOrder {
    /// Shape of the words of a matrix `[rows, cols]`.
    pub fn words_shape(self, num_bits: usize, [rows, cols]: [usize; 2]) -> [usize; 2] {
        let per_word = 32 / num_bits;
        match self {
            Self::AlongRows => [rows, cols.div_ceil(per_word)],
            Self::DownColumns => [rows.div_ceil(per_word), cols],
            Self::TransposedColumns => [cols.div_ceil(per_word), rows],
            Self::TransposedRows | Self::Interleaved => [cols, rows.div_ceil(per_word)],
        }
    }
}

impl PackedCodes<'_> {
    /// Unpacks one row into `codes`, one a byte.
    pub fn read_row(&self, row: usize, codes: &mut [u8]) {
        let (per_word, words) = (32 / self.num_bits, self.words.as_chunks::<4>().0);
        let [_, width] = self.order.words_shape(self.num_bits, self.shape);
        let code = |word: [u8; 4], place: usize| {
            let bits = u32::from_le_bytes(word) >> (place * self.num_bits);
            (bits & ((1 << self.num_bits) - 1)) as u8
        };
        let place = row % per_word;
        match self.order {
            WordOrder::AlongRows => {
                for (codes, &word) in codes.chunks_mut(per_word).zip(&words[row * width..]) {
                    codes.iter_mut().enumerate().for_each(|(place, out)| *out = code(word, place));
                }
            }
            WordOrder::TransposedColumns => {
                for (idx, codes) in codes.chunks_mut(per_word).enumerate() {
                    let word = words[idx * width + row];
                    codes.iter_mut().enumerate().for_each(|(place, out)| *out = code(word, place));
                }
            }
            WordOrder::DownColumns => {
                let words = &words[row / per_word * width..];
                codes.iter_mut().zip(words).for_each(|(out, &word)| *out = code(word, place));
            }
            WordOrder::TransposedRows | WordOrder::Interleaved => {
                let place = if self.order == WordOrder::Interleaved { INTERLEAVED_PLACE[place] } else { place };
                for (col, out) in codes.iter_mut().enumerate() {
                    *out = code(words[col * width + row / per_word], place);
                }
            }
        }
    }

    /// All codes, row-major.
    pub fn read(&self) -> Vec<u8> {
        let [rows, cols] = self.shape;
        let mut codes = vec![0; rows * cols];
        codes.chunks_exact_mut(cols.max(1)).enumerate().for_each(|(row, codes)| self.read_row(row, codes));
        codes
    }
}

/// A matrix `[rows, cols]`: `value = scale * (code - zero)`.
#[derive(Debug)]
pub struct GroupedInts<'a> {
    pub codes: PackedCodes<'a>,
    /// Rows and columns that share a scale, at least 1 each; those at the edges are partial.
    pub tile: [usize; 2],
    /// One for each tile, row-major.
    pub scales: Vec<f32>,
    /// The same; where there are none, the middle of the range stands for all.
    pub zeros: Option<Vec<u8>>,
}

/// The format of ours that holds integers whose `group` of `cols` columns share a scale: scales as they are, and where
/// there are zero points, minimums rounded to the eleven bits of f16. None where the groups are not whole ones of ours.
pub fn grouped_format(num_bits: usize, has_zeros: bool, (group, cols): (usize, usize)) -> Option<QuantFormat> {
    let codes = match (num_bits, has_zeros) {
        (4, false) => Codes::Int4,
        (4, true) => Codes::Int4Min,
        (_, false) => Codes::Int8,
        (_, true) => Codes::Int8Min,
    };
    // A scale of a whole row may be repeated as often as the filling is least.
    let group = if group < cols { group } else { cols.next_multiple_of(16) };
    let fits = |ours: &u16| group.is_multiple_of((*ours).into());
    Some(QuantFormat { codes, group: [128, 64, 32, 16].into_iter().find(fits)? })
}

impl GroupedInts<'_> {
    /// See [`grouped_format`].
    pub fn format(&self) -> Option<QuantFormat> {
        let [_, tile_cols] = self.tile;
        grouped_format(self.codes.num_bits, self.zeros.is_some(), (tile_cols, self.codes.shape[1]))
    }

    /// One row in that format.
    pub fn read_row(&self, row: usize, out: &mut GroupRow) {
        self.codes.read_row(row, &mut out.codes);
        let [_, tile_cols] = self.tile;
        let group = usize::from(self.format().expect("a format of ours").group);
        let per_row = self.codes.shape[1].div_ceil(tile_cols);
        for (idx, (scale, min)) in out.scales.iter_mut().zip(&mut out.mins).enumerate() {
            let tile = row / self.tile[0] * per_row + idx * group / tile_cols;
            *scale = self.scales[tile];
            *min = -f32::from(self.zero(tile)) * *scale;
        }
    }

    /// All values, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let [rows, cols] = self.codes.shape;
        let mut values = Vec::with_capacity(rows * cols);
        let mut codes = vec![0; cols];
        for row in 0..rows {
            self.codes.read_row(row, &mut codes);
            for (tile, codes) in self.tiles_of(row).zip(codes.chunks(self.tile[1])) {
                let (scale, zero) = (self.scales[tile], f32::from(self.zero(tile)));
                values.extend(codes.iter().map(|&code| (f32::from(code) - zero) * scale));
            }
        }
        values
    }

    /// Indices of the tiles that a row crosses.
    fn tiles_of(&self, row: usize) -> impl Iterator<Item = usize> {
        let per_row = self.codes.shape[1].div_ceil(self.tile[1]);
        (0..per_row).map(move |idx| row / self.tile[0] * per_row + idx)
    }

    fn zero(&self, tile: usize) -> u8 {
        let middle = 1 << (self.codes.num_bits - 1);
        self.zeros.as_ref().map_or(middle, |zeros| zeros[tile])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(order: WordOrder, num_bits: usize, shape: [usize; 2], words: &[u32]) -> Vec<u8> {
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let [rows, cols] = order.words_shape(num_bits, shape);
        assert_eq!(words.len(), 4 * rows * cols);
        PackedCodes { order, num_bits, shape, words: &words }.read()
    }

    #[test]
    fn the_lowest_bits_come_first_and_padding_is_dropped() {
        let words = [0x8765_4321, 0xffff_ffa9, 0xfedc_ba98, 0x0000_0010];
        let codes = read(WordOrder::AlongRows, 4, [2, 10], &words);
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1]);
        assert_eq!(read(WordOrder::AlongRows, 8, [1, 5], &[0x0403_0201, 0xff]), [1, 2, 3, 4, 255]);
        assert_eq!(read(WordOrder::AlongRows, 4, [0, 0], &[]), [0u8; 0]);
    }

    #[test]
    fn zero_points_are_packed_down_their_columns() {
        let words = [0x0000_0021, 0x8765_4343, 0x1, 0x2];
        let codes = read(WordOrder::DownColumns, 4, [9, 2], &words);
        assert_eq!(codes, [1, 3, 2, 4, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 1, 2]);
        assert_eq!(read(WordOrder::DownColumns, 8, [3, 1], &[0x0403_0201]), [1, 2, 3]);
    }

    #[test]
    fn transposed_words_hold_columns_or_rows() {
        // Two rows of eight columns, one word each.
        let codes = read(WordOrder::TransposedColumns, 4, [2, 8], &[0x7654_3210, 0xfedc_ba98]);
        assert_eq!(codes, (0..16).collect::<Vec<u8>>());
        // Eight rows of two columns.
        let words = [0x7654_3210, 0xfedc_ba98];
        let codes = read(WordOrder::TransposedRows, 4, [8, 2], &words);
        assert_eq!(codes, [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]);
        // Places 0 to 7 of a word hold rows 0, 2, 4, 6, 1, 3, 5, 7.
        let codes = read(WordOrder::Interleaved, 4, [8, 1], &[0x7531_6420]);
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn each_tile_has_its_scale_and_zero() {
        let words: Vec<u8> = [0x7654_3210u32, 0xfedc_ba98].into_iter().flat_map(u32::to_le_bytes).collect();
        let codes = PackedCodes { order: WordOrder::AlongRows, num_bits: 4, shape: [2, 8], words: &words };
        let scales = vec![1.0, 2.0, 0.5, -1.0];
        let mut ints = GroupedInts { codes, tile: [1, 4], scales, zeros: Some(vec![0, 4, 8, 15]) };
        let expected = [0.0, 1.0, 2.0, 3.0, 0.0, 2.0, 4.0, 6.0, 0.0, 0.5, 1.0, 1.5, 3.0, 2.0, 1.0, 0.0];
        assert_eq!(ints.to_f32(), expected);
        ints.zeros = None;
        assert_eq!(ints.format(), None, "groups of 4");
        (ints.tile, ints.scales) = ([2, 8], vec![2.0]);
        assert_eq!(ints.to_f32(), (0..16).map(|code| 2.0 * (code as f32 - 8.0)).collect::<Vec<_>>());
    }
}
