//! Rows into the cache of a CUDA device: a block for each.

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
#[cfg(feature = "cuda")]
use candle_core::{Storage, Tensor, bail};

use crate::cuda::address::Address;
#[cfg(feature = "cuda")]
use crate::cuda::{
    ROW_THREADS,
    device::{Launch, launch},
    kept::upload_recent,
    memory::{first_activation, name_of},
};
#[cfg(feature = "cuda")]
use crate::paged_cache::PagedCache;

/// Of a launch.
const MOST_PARTS: usize = 3;

/// `struct Part` of `cache_write.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Part {
    pub(crate) rows: Address,
    pub(crate) stride: usize,
    pub(crate) width: u32,
}

/// `struct Parts`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Parts([Part; MOST_PARTS]);

// SAFETY: numbers and addresses; what lies between them no kernel reads.
#[cfg(feature = "cuda")]
unsafe impl DeviceRepr for Parts {}

impl Parts {
    /// As many as there can be at most.
    pub(crate) fn new(parts: &[Part]) -> Self {
        let mut all = [Part { rows: Address::NULL, stride: 0, width: 0 }; MOST_PARTS];
        all[..parts.len()].copy_from_slice(parts);
        Self(all)
    }
}

/// Parts of rows whose elements follow each other, which were checked to fit the slots, and these the cache.
#[cfg(feature = "cuda")]
pub(crate) fn cache_write(cache: &mut PagedCache, parts: &[&Tensor], slots: &[u32]) -> candle_core::Result<()> {
    let stored = name_of(cache.format().dtype())?;
    let Some(device) = parts.first().map(|part| part.device().as_cuda_device()).transpose()? else { return Ok(()) };
    let device_slots = upload_recent(device, slots)?;
    let (slots_start, width) = (device_slots.start(), cache.width() as i32);
    let mut target = cache.address()?;
    let of_one_type = parts.chunk_by(|a, b| a.dtype() == b.dtype());
    for parts in of_one_type.flat_map(|parts| parts.chunks(MOST_PARTS)) {
        // A storage may be borrowed twice, as two parts may be of one matrix.
        let borrowed: Vec<_> = parts.iter().map(|part| part.storage_and_layout()).collect();
        let mut all = Vec::new();
        for (storage, layout) in &borrowed {
            let Storage::Cuda(storage) = &**storage else { bail!("a part is not on the device") };
            let (rows, stride, width) = (first_activation((storage, layout))?, layout.stride()[0], layout.dims()[1]);
            all.push(Part { rows, stride, width: width as u32 });
        }
        let kernel = format!("cache_write_{}_{stored}", name_of(parts[0].dtype())?);
        let (shape, all) = (Launch::rows(slots.len(), ROW_THREADS), Parts::new(&all));
        // SAFETY: the arguments of the kernel; each part has a row for each slot and the cache each slot, whose rows
        // have room for all parts.
        unsafe { launch(device, &kernel, shape, &[&all, &slots_start, &target, &width]) }?;
        let written: usize = parts.iter().map(|part| part.dims()[1]).sum();
        target = target.plus(written * cache.format().element_bytes());
    }
    Ok(())
}
