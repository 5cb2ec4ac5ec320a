//! Where operands of kernels lie.

use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, DeviceId, WrapErr};
use candle_core::{DType, Layout, bail};
use half::bf16;

pub(crate) use super::address::Address;
use super::staging;
use crate::memory::{Plain, bytes_of};

/// What candle hands to an op.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// The type of activations, by what kernels call it.
pub(crate) fn name_of(dtype: DType) -> candle_core::Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::BF16 => Ok("bf16"),
        other => bail!("activations are f32 or bf16, not {other:?}"),
    }
}

/// The first of a contiguous tensor's numbers, which are f32 or bf16.
pub(crate) fn activations((storage, layout): Operand<'_>) -> candle_core::Result<Address> {
    match name_of(storage.dtype())? {
        "float" => numbers::<f32>(storage, layout),
        _ => numbers::<bf16>(storage, layout),
    }
}

/// The same for kernels that want it at a multiple of 16 bytes: where it is not, that of a copy, which comes with it.
pub(crate) fn aligned_activations(x: Operand<'_>) -> candle_core::Result<(Address, Option<CudaStorage>)> {
    let (storage, layout) = x;
    let (dtype, len) = (storage.dtype(), layout.shape().elem_count());
    let address = activations(x)?;
    if (layout.start_offset() * dtype.size_in_bytes()).is_multiple_of(16) {
        return Ok((address, None));
    }
    let (mut copy, address) = output(storage.device(), dtype, len)?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok((address, Some(copy)))
}

/// The first of a tensor's numbers, which are f32 or bf16, wherever the others are.
pub(crate) fn first_activation((storage, layout): Operand<'_>) -> candle_core::Result<Address> {
    let offset = layout.start_offset() * storage.dtype().size_in_bytes();
    let first = match name_of(storage.dtype())? {
        "float" => Address::of(storage.as_cuda_slice::<f32>()?),
        _ => Address::of(storage.as_cuda_slice::<bf16>()?),
    };
    Ok(first.plus(offset))
}

/// The first of a contiguous tensor's f32.
pub(crate) fn floats((storage, layout): Operand<'_>) -> candle_core::Result<Address> {
    numbers::<f32>(storage, layout)
}

fn numbers<T: CudaDType>(storage: &CudaStorage, layout: &Layout) -> candle_core::Result<Address> {
    let Some((start, _)) = layout.contiguous_offsets() else { bail!("input is not contiguous") };
    Ok(Address::of(storage.as_cuda_slice::<T>()?).plus(start * size_of::<T>()))
}

/// Memory for a result, which a kernel is to write.
pub(crate) fn output(device: &CudaDevice, dtype: DType, len: usize) -> candle_core::Result<(CudaStorage, Address)> {
    fn typed<T: CudaDType + DeviceRepr>(
        device: &CudaDevice,
        len: usize,
    ) -> candle_core::Result<(CudaStorage, Address)> {
        let slice = scratch::<T>(device, len)?;
        let address = Address::of(&slice);
        Ok((CudaStorage::wrap_cuda_slice(slice, device.clone()), address))
    }
    match name_of(dtype)? {
        "float" => typed::<f32>(device, len),
        _ => typed::<bf16>(device, len),
    }
}

/// Memory that a kernel is to write; a number at least, as no device gives none.
pub(crate) fn scratch<T: DeviceRepr>(device: &CudaDevice, len: usize) -> candle_core::Result<CudaSlice<T>> {
    let len = len.max(1);
    // SAFETY: kernels write what others read.
    unsafe { device.cuda_stream().alloc::<T>(len) }.or_else(|error| {
        if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(error).w();
        }
        let (needed, (free, total)) = (len * size_of::<T>(), super::device::memory(device)?);
        bail!("the device has no memory for {needed} bytes: {free} of {total} bytes are free")
    })
}

/// A copy on the device.
pub(crate) fn upload<T: DeviceRepr>(device: &CudaDevice, values: &[T]) -> candle_core::Result<CudaSlice<T>> {
    let mut target = scratch(device, values.len())?;
    write(device, &mut target, 0, values)?;
    Ok(target)
}

/// Writes numbers from `start` on, behind what was launched before. Panics if there are not so many.
pub(crate) fn write<T: DeviceRepr>(
    device: &CudaDevice,
    target: &mut CudaSlice<T>,
    start: usize,
    values: &[T],
) -> candle_core::Result<()> {
    let to = place_of(target, start, values.len());
    let bytes = values.as_ptr().cast::<MaybeUninit<u8>>();
    // SAFETY: the bytes of the numbers, with any padding.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of_val(values)) };
    // SAFETY: there is room for them, and a device has one stream.
    unsafe { staging::upload(device, to, bytes) }
}

/// A copy on the host, when all that was launched before is done.
pub(crate) fn download<T: DeviceRepr + Plain + Default>(
    device: &CudaDevice,
    values: &CudaSlice<T>,
) -> candle_core::Result<Vec<T>> {
    let mut copy = vec![T::default(); values.len()];
    read(device, values, 0, &mut copy)?;
    Ok(copy)
}

/// Fills `values` with the numbers from `start` on, when all that was launched before is done. Panics if there are not so many.
pub(crate) fn read<T: DeviceRepr + Plain>(
    device: &CudaDevice,
    source: &CudaSlice<T>,
    start: usize,
    values: &mut [T],
) -> candle_core::Result<()> {
    read_all(device, [(source, start, values)])
}

/// The same of several places, for which it waits once.
pub(crate) fn read_all<'a, T: DeviceRepr + Plain>(
    device: &CudaDevice,
    places: impl IntoIterator<Item = (&'a CudaSlice<T>, usize, &'a mut [T])>,
) -> candle_core::Result<()> {
    let bytes = |(source, start, values): (&CudaSlice<T>, usize, &'a mut [T])| {
        (place_of(source, start, values.len()), bytes_of(values))
    };
    let mut targets: Vec<_> = places.into_iter().map(bytes).collect();
    // SAFETY: they are where somebody's numbers are, and a device has one stream.
    unsafe { staging::download(device, &mut targets) }
}

fn place_of<T>(slice: &CudaSlice<T>, start: usize, len: usize) -> Address {
    assert!(start <= slice.len() && len <= slice.len() - start, "{len} from {start} on of {} numbers", slice.len());
    Address::of(slice).plus(start * size_of::<T>())
}

/// Numbers that are uploaded when a device first asks for them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uploaded<T>(OnceLock<Arc<(DeviceId, CudaSlice<T>)>>);

impl<T: DeviceRepr + 'static> Uploaded<T> {
    /// Where they lie. Fails for another device than the first one.
    pub(crate) fn get(&self, device: &CudaDevice, values: &[T]) -> candle_core::Result<Address> {
        let found = match self.0.get() {
            Some(found) => found,
            None => {
                let uploaded = Arc::new((device.id(), upload(device, values)?));
                self.0.get_or_init(|| uploaded)
            }
        };
        if found.0 != device.id() {
            bail!("what lies on one device is asked for on another");
        }
        Ok(Address::of(&found.1))
    }
}
