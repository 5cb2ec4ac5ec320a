//! Places in device memory, as kernels take them.

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

/// A place in device memory.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Address(u64);

// SAFETY: an address on the device is what kernels take for a pointer.
#[cfg(feature = "cuda")]
unsafe impl DeviceRepr for Address {}

impl Address {
    /// Of what is left out.
    pub(crate) const NULL: Self = Self(0);

    /// Of the first number.
    #[cfg(feature = "cuda")]
    pub(crate) fn of<T>(slice: &CudaSlice<T>) -> Self {
        // The guard records an event for other streams; there is one stream.
        let (address, _guard) = slice.device_ptr(slice.stream());
        Self(address)
    }

    /// For kernels that are emulated in this process, whose memory is the device's.
    #[cfg(test)]
    pub(crate) fn of_host<T>(pointer: *const T) -> Self {
        Self(pointer.expose_provenance() as u64)
    }

    /// Whether nothing is there.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_null(self) -> bool {
        self.0 == 0
    }

    /// As the driver takes it.
    #[cfg(feature = "cuda")]
    pub(crate) fn raw(self) -> u64 {
        self.0
    }

    /// So many bytes behind it.
    #[cfg(feature = "cuda")]
    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}
