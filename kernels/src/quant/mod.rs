//! Quantized weights: small codes in groups that share a scale, and the product of int8 activations with them.
//!
//! Map: `layout` is where everything lies in the packed bytes, `pack` writes and reads rows, `rotation` turns them,
//! `activations` quantizes input rows, `block` multiplies on vectors, `tiles` many rows on matrix tiles.
//!
//! A product is exact in integers within a group; the groups of a row are added up in f32, first to last. So its bits
//! depend neither on the other rows nor on the instruction set.

mod activations;
mod block;
mod layout;
mod pack;
#[cfg(test)]
mod reference;
mod rotation;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use pack::GroupRow;

pub(crate) use activations::{QuantizedRows, RowForm};
pub(crate) use block::{QuantBlock, multiply};
pub(crate) use layout::Layout;
pub(crate) use pack::{copy_rows, pack, quantize, read_row};
#[cfg(test)]
pub(crate) use reference::product as reference;

/// What a code stands for. A scale, and a minimum where there is one, is an f16 times a power of two of its row, where
/// nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codes {
    /// `scale * (code - 128)`, codes 0 to 255
    Int8,
    /// `scale * code + min`, codes 0 to 255
    Int8Min,
    /// `scale * (code - 8)`, codes 0 to 15
    Int4,
    /// `scale * code + min`, codes 0 to 15
    Int4Min,
    /// As `Int8`, of rows that were turned by the Hadamard matrix in blocks of 64 columns; so are activations
    Int8Rotated,
    /// As `Int4Min`; scale and minimum are themselves 8 bits times an f32 of the row (double quantization, arXiv 2305.14314)
    Int4Double,
    /// `scale * E2M1[code]`, codes 0 to 15: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same negative (OCP MX, MXFP4)
    Fp4,
}

/// How a quantized weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    pub codes: Codes,
    /// Columns that share a scale: 16, 32, 64 or 128.
    pub group: u16,
}

/// Columns of the largest group.
const MAX_GROUP: usize = 128;

/// What the product uses in place of a code of `Fp4`: `2 * E2M1[code] + 12`.
const FP4_TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl QuantFormat {
    /// What quantizing to int8 gives: 8.3 bits per weight.
    pub const INT8: Self = Self { codes: Codes::Int8Rotated, group: 64 };
    /// What quantizing to int4 gives: 4.6 bits per weight.
    pub const INT4: Self = Self { codes: Codes::Int4Double, group: 32 };

    /// The name used in configuration and reports.
    pub fn name(self) -> &'static str {
        match self.codes {
            Codes::Int8 | Codes::Int8Min | Codes::Int8Rotated => "int8",
            Codes::Int4 | Codes::Int4Min | Codes::Int4Double => "int4",
            Codes::Fp4 => "fp4",
        }
    }

    /// What input rows must look like.
    pub(crate) fn row_form(self) -> RowForm {
        RowForm { group: self.group(), is_rotated: self.codes.are_rotated() }
    }

    pub(crate) fn group(self) -> usize {
        usize::from(self.group)
    }

    /// Whether the group is one that the kernels know.
    pub(crate) fn is_known(self) -> bool {
        let holds_blocks = !self.codes.are_rotated() || self.group().is_multiple_of(rotation::BLOCK);
        matches!(self.group, 16 | 32 | 64 | 128) && holds_blocks
    }
}

impl Codes {
    /// Whether two codes share a byte.
    pub(crate) fn are_nibbles(self) -> bool {
        matches!(self, Self::Int4 | Self::Int4Min | Self::Int4Double | Self::Fp4)
    }

    pub(crate) fn are_rotated(self) -> bool {
        self == Self::Int8Rotated
    }

    pub(crate) fn have_min(self) -> bool {
        matches!(self, Self::Int8Min | Self::Int4Min | Self::Int4Double)
    }

    pub(crate) fn largest(self) -> u8 {
        if self.are_nibbles() { 15 } else { 255 }
    }

    /// What the product takes off every number before scaling.
    pub(crate) fn offset(self) -> i32 {
        match self {
            Self::Int8 | Self::Int8Rotated => 128,
            Self::Int4 => 8,
            Self::Fp4 => 12,
            Self::Int8Min | Self::Int4Min | Self::Int4Double => 0,
        }
    }

    /// The number that the product uses for a code.
    pub(crate) fn number(self, code: u8) -> i32 {
        let code = if self == Self::Fp4 { FP4_TABLE[usize::from(code)] } else { code };
        i32::from(code) - self.offset()
    }

    /// The product's scale for a format's: numbers of `Fp4` are doubled.
    pub(crate) fn scale_factor(self) -> f32 {
        if self == Self::Fp4 { 0.5 } else { 1.0 }
    }
}
