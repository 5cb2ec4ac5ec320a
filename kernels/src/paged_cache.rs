//! Bytes of one cache site in blocks of token slots.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Device, Layout, Storage, Tensor};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::check::{self, Input};
use crate::error::{KernelError, Result};
use crate::memory::{Plain, view, view_mut};
use crate::slabs::Slabs;

const OP: &str = "paged cache";

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    F32,
    Bf16,
}

impl KvFormat {
    /// Bytes of one element.
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// What it is on a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// The name used in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Rows of `width` elements, one per token slot; `slot = block * block_size + offset`. Memory comes in slabs of blocks
/// that can be added and given back; it is zero, and on the CPU committed when first written.
pub struct PagedCache {
    format: KvFormat,
    block_size: usize,
    width: usize,
    blocks_per_slab: usize,
    slabs: Slabs,
}

impl PagedCache {
    /// A cache on the CPU without slabs. Fails if a size is zero or a slab does not fit the address space.
    pub fn new(format: KvFormat, block_size: usize, width: usize, blocks_per_slab: usize) -> Result<Self> {
        Self::on(&Device::Cpu, format, block_size, width, blocks_per_slab)
    }

    /// A cache on a device without slabs. On a CUDA device all blocks are to lie in one slab, as attention takes one
    /// address: there is no second one. Fails as [`Self::new`].
    pub fn on(
        device: &Device,
        format: KvFormat,
        block_size: usize,
        width: usize,
        blocks_per_slab: usize,
    ) -> Result<Self> {
        let slab_bytes = [block_size, width, blocks_per_slab]
            .iter()
            .try_fold(format.element_bytes(), |product, &size| product.checked_mul(size));
        match slab_bytes {
            Some(bytes) if bytes > 0 && bytes <= isize::MAX as usize => {
                Ok(Self { format, block_size, width, blocks_per_slab, slabs: Slabs::on(OP, device)? })
            }
            _ => Err(KernelError::Invalid {
                op: OP,
                reason: format!("no slab of {blocks_per_slab} blocks of {block_size} slots of {width} elements"),
            }),
        }
    }

    /// Adds `blocks_per_slab` blocks behind the others. Fails if there is no memory for them, or a slab on a CUDA
    /// device.
    pub fn add_slab(&mut self) -> Result<()> {
        self.slabs.add(OP, self.slab_slots() * self.row_len())
    }

    /// Gives the memory of the last slab back to the system; false if there was none.
    pub fn remove_last_slab(&mut self) -> bool {
        self.slabs.remove_last()
    }

    /// Blocks in all slabs.
    pub fn num_blocks(&self) -> usize {
        self.slabs.len() * self.blocks_per_slab
    }

    /// Token slots of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How the rows are stored.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Stores row `i` of `rows` (activations of the cache's device, rounded to nearest even) at slot `slots[i]`; slots
    /// that are named twice keep the last row, on a CUDA device any of them. Fails before writing anything if a slot
    /// does not exist.
    pub fn write(&mut self, rows: &Tensor /* [num_tokens, width] */, slots: &[u32]) -> Result<()> {
        Input { op: OP, what: "rows", tensor: rows }.has_dims(&[slots.len(), self.width])?;
        self.write_parts(&[rows], slots)
    }

    /// The same for rows whose parts lie apart, such as keys and values: part after part fills a row. The rows of a part may
    /// lie apart in turn, as columns of a wider matrix do.
    pub fn write_parts(&mut self, parts: &[&Tensor], slots: &[u32]) -> Result<()> {
        let num_slots = self.num_blocks() * self.block_size;
        for &slot in slots {
            check::below(OP, "slot", slot as usize, num_slots)?;
        }
        let mut width = 0;
        for part in parts {
            width += RowPart::check(part, slots.len())?;
            if !self.is_on(part.device()) {
                return Err(KernelError::OtherDevice { op: OP, what: "rows" });
            }
        }
        check::length(OP, "width of the rows", width, self.width)?;
        #[cfg(feature = "cuda")]
        if let Slabs::Device(_) = &self.slabs {
            return Ok(crate::ops::paged_attention::cache_write::cache_write(self, parts, slots)?);
        }
        let mut first = 0;
        for part in parts {
            let (storage, layout) = part.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else {
                return Err(KernelError::Device { op: OP, what: "rows" });
            };
            let part = RowPart { values: &storage.as_slice()?[layout.start_offset()..], layout };
            for (row_idx, &slot) in slots.iter().enumerate() {
                self.write_row(slot as usize, first, part.row(row_idx));
            }
            first += layout.dims()[1];
        }
        Ok(())
    }

    fn write_row(&mut self, slot: usize, first: usize, values: &[f32]) {
        let elements = first..first + values.len();
        let (format, bytes) = (self.format, self.row_bytes_mut(slot));
        match format {
            KvFormat::F32 => view_mut::<f32>(bytes)[elements].copy_from_slice(values),
            KvFormat::Bf16 => view_mut::<bf16>(bytes)[elements].convert_from_f32_slice(values),
        }
    }

    /// The stored rows at these slots, widened, on the CPU. For tests; fails if a slot does not exist.
    pub fn read(&self, slots: &[u32]) -> Result<Tensor /* [slots.len(), width] */> {
        let mut rows = vec![0.0; slots.len() * self.width];
        for (row, &slot) in rows.chunks_exact_mut(self.width).zip(slots) {
            check::below(OP, "slot", slot as usize, self.num_blocks() * self.block_size)?;
            let (slab, place) = self.place_of_row(slot as usize);
            let bytes = self.slabs.bytes(slab, place)?;
            match self.format {
                KvFormat::F32 => row.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| {
                    *value = f32::from_ne_bytes(*bytes);
                }),
                KvFormat::Bf16 => row.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| {
                    *value = bf16::from_ne_bytes(*bytes).to_f32();
                }),
            }
        }
        Ok(Tensor::from_vec(rows, (slots.len(), self.width), &Device::Cpu)?)
    }

    /// All bytes of a block that exists, `block_size` rows. Waits for a device. Fails if the device does.
    pub fn block_bytes(&self, block: usize) -> Result<Cow<'_, [u8]>> {
        let (slab, place) = self.place_of(block);
        self.slabs.bytes(slab, place)
    }

    /// Has `fill` write all bytes of a block that exists: what [`Self::block_bytes`] gave, of a cache of the same sizes
    /// and format. Fails if the device does.
    pub fn fill_block(&mut self, block: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let (slab, place) = self.place_of(block);
        self.slabs.fill(slab, place, fill)
    }

    fn place_of(&self, block: usize) -> (usize, Range<usize>) {
        let block_bytes = self.block_size * self.row_len();
        let start = block % self.blocks_per_slab * block_bytes;
        (block / self.blocks_per_slab, start..start + block_bytes)
    }

    fn place_of_row(&self, slot: usize) -> (usize, Range<usize>) {
        let start = slot % self.slab_slots() * self.row_len();
        (slot / self.slab_slots(), start..start + self.row_len())
    }

    pub(crate) fn is_on(&self, device: &Device) -> bool {
        self.slabs.is_on(device)
    }

    /// Where the first block is on a CUDA device; null if there is none.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> candle_core::Result<crate::cuda::address::Address> {
        self.slabs.address()
    }

    /// The bytes of the row at a slot that exists. Panics unless they are on the CPU.
    #[cfg(test)]
    pub(crate) fn row_bytes(&self, slot: usize) -> &[u8] {
        let (slab, place) = self.place_of_row(slot);
        &self.slabs.host()[slab][place]
    }

    /// The rows of a block that exists. Panics unless `T` is the type of the format, and they are on the CPU.
    pub(crate) fn block<T: Plain>(&self, block: usize) -> &[T] {
        assert!(size_of::<T>() == self.format.element_bytes(), "rows are read in their own format");
        let (slab, place) = self.place_of(block);
        view(&self.slabs.host()[slab][place])
    }

    fn row_bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        let (slab, place) = self.place_of_row(slot);
        &mut self.slabs.host_mut()[slab][place]
    }

    /// Bytes of a row.
    fn row_len(&self) -> usize {
        self.width * self.format.element_bytes()
    }

    fn slab_slots(&self) -> usize {
        self.blocks_per_slab * self.block_size
    }
}

/// Columns of a matrix, row by row.
struct RowPart<'a> {
    values: &'a [f32],
    layout: &'a Layout,
}

impl RowPart<'_> {
    /// Refuses what are not activations in so many rows without gaps; returns their width.
    fn check(part: &Tensor, num_rows: usize) -> Result<usize> {
        let input = Input { op: OP, what: "rows", tensor: part };
        let &[rows, width] = part.dims() else { return Err(input.shape_error("[num_tokens, part_width]".to_owned())) };
        if rows != num_rows {
            return Err(input.shape_error(format!("[{num_rows}, part_width]")));
        }
        if width > 1 && part.stride()[1] != 1 {
            return Err(KernelError::NotContiguous { op: OP, what: "rows" });
        }
        let is_known = part.dtype() == DType::F32 || part.device().is_cuda() && part.dtype() == DType::BF16;
        if !is_known {
            return Err(KernelError::DType { op: OP, what: "rows", got: part.dtype(), expected: DType::F32 });
        }
        Ok(width)
    }

    fn row(&self, row_idx: usize) -> &[f32] {
        let start = row_idx * self.layout.stride()[0];
        &self.values[start..start + self.layout.dims()[1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(num_rows: usize, width: usize) -> Tensor {
        let values: Vec<f32> = (0..num_rows * width).map(|i| i as f32 * 0.37 - 5.0).collect();
        Tensor::from_vec(values, (num_rows, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn rows_come_back_rounded_to_the_format() {
        for format in [KvFormat::F32, KvFormat::Bf16] {
            let mut cache = PagedCache::new(format, 4, 6, 2).unwrap();
            cache.add_slab().unwrap();
            cache.add_slab().unwrap();
            assert_eq!(cache.num_blocks(), 4);
            let slots = [15, 0, 7, 8];
            cache.write(&rows(4, 6), &slots).unwrap();
            let mut expected = rows(4, 6).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            if format == KvFormat::Bf16 {
                expected.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            }
            assert_eq!(cache.read(&slots).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
            assert_eq!(cache.read(&[3]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 6]);
        }
    }

    #[test]
    fn rows_in_parts_are_the_rows() {
        for format in [KvFormat::F32, KvFormat::Bf16] {
            let mut caches = [(); 2].map(|()| PagedCache::new(format, 4, 6, 2).unwrap());
            caches.iter_mut().for_each(|cache| cache.add_slab().unwrap());
            let (wide, slots) = (rows(3, 11), [5, 0, 7]);
            let columns = |first, len| wide.narrow(1, first, len).unwrap();
            caches[0].write(&columns(3, 6).contiguous().unwrap(), &slots).unwrap();
            caches[1].write_parts(&[&columns(3, 2), &columns(5, 1), &columns(6, 3)], &slots).unwrap();
            let read =
                |cache: &PagedCache| cache.read(&slots).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(read(&caches[0]), read(&caches[1]));
            let cache = &mut caches[1];
            assert!(cache.write_parts(&[&columns(0, 5)], &slots).is_err());
            assert!(cache.write_parts(&[&columns(0, 6)], &slots[..2]).is_err());
            assert!(cache.write_parts(&[&columns(0, 6)], &[0, 1, 8]).is_err());
            assert!(cache.write_parts(&[&rows(6, 3).t().unwrap()], &slots).is_err());
            assert!(cache.write_parts(&[&columns(0, 6).to_dtype(DType::F64).unwrap()], &slots).is_err());
        }
    }

    #[test]
    fn slabs_come_and_go() {
        let mut cache = PagedCache::new(KvFormat::F32, 4, 6, 2).unwrap();
        assert!(!cache.remove_last_slab());
        assert!(cache.write(&rows(1, 6), &[0]).is_err());
        cache.add_slab().unwrap();
        assert!(cache.write(&rows(1, 6), &[7]).is_ok());
        assert!(cache.write(&rows(1, 6), &[8]).is_err());
        assert!(cache.write(&rows(1, 5), &[0]).is_err());
        assert!(cache.remove_last_slab());
        cache.add_slab().unwrap();
        assert_eq!(cache.read(&[7]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 6]);
        assert!(PagedCache::new(KvFormat::F32, 0, 6, 2).is_err());
        assert!(PagedCache::new(KvFormat::F32, usize::MAX, 6, 2).is_err());
    }
}
