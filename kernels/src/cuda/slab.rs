//! One piece of device memory that holds a cache.

use std::ops::Range;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use super::address::Address;
use super::memory::{read, write};
use crate::error::{KernelError, Result};

pub(crate) struct DeviceSlab {
    device: CudaDevice,
    bytes: Option<CudaSlice<u8>>,
}

impl DeviceSlab {
    pub(crate) fn none(device: &CudaDevice) -> Self {
        Self { device: device.clone(), bytes: None }
    }

    pub(crate) fn allocate(&mut self, op: &'static str, bytes: usize) -> Result<()> {
        if self.is_there() {
            return Err(KernelError::Invalid { op, reason: "a device has one slab at most".to_owned() });
        }
        self.bytes = Some(self.device.alloc_zeros(bytes)?);
        Ok(())
    }

    pub(crate) fn give_back(&mut self) -> bool {
        self.bytes.take().is_some()
    }

    pub(crate) fn is_there(&self) -> bool {
        self.bytes.is_some()
    }

    pub(crate) fn is_on(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.id() == self.device.id())
    }

    /// Null if there is none.
    pub(crate) fn address(&self) -> Address {
        self.bytes.as_ref().map_or(Address::NULL, Address::of)
    }

    /// Waits for what was launched before.
    pub(crate) fn read(&self, place: Range<usize>) -> Result<Vec<u8>> {
        let mut target = vec![0; place.len()];
        read(&self.device, self.slice(), place.start, &mut target)?;
        Ok(target)
    }

    /// Behind what was launched before.
    pub(crate) fn write(&mut self, start: usize, bytes: &[u8]) -> Result<()> {
        let device = self.device.clone();
        Ok(write(&device, self.slice_mut(), start, bytes)?)
    }

    pub(crate) fn copy_within(&mut self, from: Range<usize>, to: usize) -> Result<()> {
        let (len, stream) = (from.len(), self.device.cuda_stream());
        if from.start == to {
            return Ok(());
        }
        // Two views that the compiler sees to be apart.
        let (mut below, mut above) = self.slice_mut().split_at_mut(from.start.max(to));
        if from.start < to {
            stream.memcpy_dtod(&below.slice(from), &mut above.slice_mut(..len)).w()?;
        } else {
            stream.memcpy_dtod(&above.slice(..len), &mut below.slice_mut(to..to + len)).w()?;
        }
        Ok(())
    }

    fn slice(&self) -> &CudaSlice<u8> {
        self.bytes.as_ref().expect("callers ask for blocks that exist")
    }

    fn slice_mut(&mut self) -> &mut CudaSlice<u8> {
        self.bytes.as_mut().expect("callers ask for blocks that exist")
    }
}
