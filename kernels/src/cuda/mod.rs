//! Device code: what the `.cu` files of all ops share, how it is launched, and its tests on the emulator of `kernels/emulator`.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod address;
#[cfg(feature = "cuda")]
pub(crate) mod batch;
#[cfg(feature = "cuda")]
pub(crate) mod device;
#[cfg(feature = "cuda")]
pub(crate) mod kept;
#[cfg(feature = "cuda")]
pub(crate) mod memory;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod products;
#[cfg(feature = "cuda")]
pub(crate) mod slab;
#[cfg(feature = "cuda")]
mod staging;

#[cfg(test)]
mod tests;

/// Threads of every block that has a row: `ROW_THREADS` of `device.cuh`.
#[cfg(any(test, feature = "cuda"))]
pub(crate) const ROW_THREADS: usize = 256;
