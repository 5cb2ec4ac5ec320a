//! Keys and values of a block as bytes that leave the engine: as they are, or rounded to eight bits.

use half::bf16;
use half::slice::HalfFloatSliceExt as _;
use kernels::{KvFormat, PagedCache};

/// Elements that share a scale.
const GROUP: usize = 64;

/// How blocks are written for other places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockCoding {
    /// Bit by bit.
    #[default]
    Exact,
    /// Codes -127 to 127 times the largest magnitude of 64 neighbours by 127: half the bytes of bf16, and other outputs than those that
    /// are computed without it.
    Int8,
}

impl BlockCoding {
    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "auto",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a block of `cache`.
    pub(crate) fn len(self, cache: &PagedCache) -> usize {
        let (rows, width) = (cache.block_size(), cache.width());
        match self {
            Self::Exact => rows * width * cache.format().element_bytes(),
            Self::Int8 => rows * (width + width.div_ceil(GROUP) * size_of::<f32>()),
        }
    }

    /// Adds a block to `bytes`. Fails if the cache's device does.
    pub(crate) fn read(self, cache: &PagedCache, block: usize, bytes: &mut Vec<u8>) -> kernels::Result<()> {
        let all = cache.block_bytes(block)?;
        match self {
            Self::Exact => bytes.extend_from_slice(&all),
            Self::Int8 => {
                let row_bytes = cache.width() * cache.format().element_bytes();
                let mut row = vec![0.0; cache.width()];
                for stored in all.chunks_exact(row_bytes) {
                    widen(cache.format(), stored, &mut row);
                    row.chunks(GROUP).for_each(|group| encode(group, bytes));
                }
            }
        }
        Ok(())
    }

    /// Fills a block with what [`Self::read`] gave, [`Self::len`] bytes. Fails if the cache's device does.
    pub(crate) fn write(self, cache: &mut PagedCache, block: usize, bytes: &[u8]) -> kernels::Result<()> {
        match self {
            Self::Exact => cache.fill_block(block, |all| all.copy_from_slice(bytes)),
            Self::Int8 => {
                let (format, row_bytes) = (cache.format(), cache.width() * cache.format().element_bytes());
                let mut row = vec![0.0; cache.width()];
                let mut rest = bytes;
                cache.fill_block(block, |all| {
                    for stored in all.chunks_exact_mut(row_bytes) {
                        for group in row.chunks_mut(GROUP) {
                            let (scale, codes) = rest.split_first_chunk().expect("the caller checked the length");
                            let (codes, behind) = codes.split_at(group.len());
                            decode(f32::from_le_bytes(*scale), codes, group);
                            rest = behind;
                        }
                        narrow(format, &row, stored);
                    }
                })
            }
        }
    }
}

/// A scale, then a byte for each number. Where one is no number the scale is NaN, and so is all that is read.
fn encode(group: &[f32], bytes: &mut Vec<u8>) {
    let largest = group.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let is_finite = group.iter().all(|value| value.is_finite());
    let scale = if is_finite { largest / 127.0 } else { f32::NAN };
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    bytes.extend(scale.to_le_bytes());
    bytes.extend(group.iter().map(|value| ((value * inverse).round_ties_even() as i8).cast_unsigned()));
}

fn decode(scale: f32, codes: &[u8], group: &mut [f32]) {
    for (value, code) in group.iter_mut().zip(codes) {
        *value = f32::from(code.cast_signed()) * scale;
    }
}

fn widen(format: KvFormat, stored: &[u8], row: &mut [f32]) {
    match format {
        KvFormat::F32 => {
            row.iter_mut().zip(stored.as_chunks().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes))
        }
        KvFormat::Bf16 => {
            row.iter_mut()
                .zip(stored.as_chunks().0)
                .for_each(|(value, bytes)| *value = bf16::from_le_bytes(*bytes).to_f32());
        }
    }
}

fn narrow(format: KvFormat, row: &[f32], stored: &mut [u8]) {
    match format {
        KvFormat::F32 => {
            stored.as_chunks_mut().0.iter_mut().zip(row).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
        }
        KvFormat::Bf16 => {
            let mut rounded = vec![bf16::ZERO; row.len()];
            rounded.convert_from_f32_slice(row);
            stored.as_chunks_mut().0.iter_mut().zip(rounded).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(format: KvFormat, width: usize, value: impl Fn(usize) -> f32) -> PagedCache {
        let mut cache = PagedCache::new(format, 4, width, 3).unwrap();
        cache.add_slab().unwrap();
        let row: Vec<f32> = (0..4 * width).map(value).collect();
        let fill = |all: &mut [u8]| {
            let rows = all.chunks_exact_mut(width * format.element_bytes());
            row.chunks(width).zip(rows).for_each(|(row, stored)| narrow(format, row, stored));
        };
        cache.fill_block(1, fill).unwrap();
        cache
    }

    fn numbers(cache: &PagedCache, block: usize) -> Vec<f32> {
        let mut values = vec![0.0; 4 * cache.width()];
        widen(cache.format(), &cache.block_bytes(block).unwrap(), &mut values);
        values
    }

    #[test]
    fn a_block_comes_back_as_it_was_or_within_half_a_step() {
        for (format, width) in [(KvFormat::Bf16, 80), (KvFormat::F32, 64), (KvFormat::Bf16, 7)] {
            let mut cache = filled(format, width, |idx| ((idx * 37) % 101) as f32 - 50.0);
            let stored = numbers(&cache, 1);
            for coding in [BlockCoding::Exact, BlockCoding::Int8] {
                let mut bytes = Vec::new();
                coding.read(&cache, 1, &mut bytes).unwrap();
                assert_eq!(bytes.len(), coding.len(&cache), "{format:?} {width} {coding:?}");
                coding.write(&mut cache, 2, &bytes).unwrap();
                let read = numbers(&cache, 2);
                // Half a step of 50 / 127, and the rounding to eight bits of a mantissa.
                let most = if coding == BlockCoding::Exact { 0.0 } else { 0.2 + 50.0 / 256.0 };
                let error = stored.iter().zip(&read).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error <= most, "{format:?} {width} {coding:?}: {error}");
            }
        }
    }

    #[test]
    fn zeros_stay_and_what_is_no_number_spoils_its_group_alone() {
        let mut cache = filled(KvFormat::F32, 128, |idx| if idx == 70 { f32::INFINITY } else { 0.0 });
        let mut bytes = Vec::new();
        BlockCoding::Int8.read(&cache, 1, &mut bytes).unwrap();
        BlockCoding::Int8.write(&mut cache, 2, &bytes).unwrap();
        let read = numbers(&cache, 2);
        assert!(read[64..128].iter().all(|value| value.is_nan()));
        assert!(read[..64].iter().chain(&read[128..]).all(|&value| value == 0.0));
    }
}
