//! Memory of caches in slabs, on the CPU or on a CUDA device.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Device;
use memmap2::MmapMut;

#[cfg(feature = "cuda")]
use crate::cuda::slab::DeviceSlab;
use crate::error::{KernelError, Result};

/// All as long as each other, and zero when they come.
pub(crate) enum Slabs {
    /// Committed when first written.
    Host(Vec<MmapMut>),
    /// One at most: kernels take one address.
    #[cfg(feature = "cuda")]
    Device(DeviceSlab),
}

impl Slabs {
    /// Fails if there is no code for the device.
    pub(crate) fn on(op: &'static str, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Host(Vec::new())),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Device(DeviceSlab::none(device))),
            _ => Err(KernelError::Device { op, what: "memory" }),
        }
    }

    /// Fails if there is no memory, or on a CUDA device if there is a slab.
    pub(crate) fn add(&mut self, op: &'static str, bytes: usize) -> Result<()> {
        match self {
            Self::Host(slabs) => {
                let slab = MmapMut::map_anon(bytes).map_err(|source| KernelError::Memory { op, bytes, source })?;
                slabs.push(slab);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(slab) => slab.allocate(op, bytes),
        }
    }

    /// False if there was none.
    pub(crate) fn remove_last(&mut self) -> bool {
        match self {
            Self::Host(slabs) => slabs.pop().is_some(),
            #[cfg(feature = "cuda")]
            Self::Device(slab) => slab.give_back(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(slabs) => slabs.len(),
            #[cfg(feature = "cuda")]
            Self::Device(slab) => usize::from(slab.is_there()),
        }
    }

    pub(crate) fn is_on(&self, device: &Device) -> bool {
        match self {
            Self::Host(_) => device.is_cpu(),
            #[cfg(feature = "cuda")]
            Self::Device(slab) => slab.is_on(device),
        }
    }

    /// Those on the CPU. Panics if they are not.
    pub(crate) fn host(&self) -> &[MmapMut] {
        match self {
            Self::Host(slabs) => slabs,
            #[cfg(feature = "cuda")]
            Self::Device(_) => panic!("ops check that a cache is where their inputs are"),
        }
    }

    /// The same to write them.
    pub(crate) fn host_mut(&mut self) -> &mut [MmapMut] {
        match self {
            Self::Host(slabs) => slabs,
            #[cfg(feature = "cuda")]
            Self::Device(_) => panic!("ops check that a cache is where their inputs are"),
        }
    }

    /// Some bytes of a slab that exists.
    pub(crate) fn bytes(&self, slab: usize, place: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self {
            Self::Host(slabs) => Ok(Cow::Borrowed(&slabs[slab][place])),
            #[cfg(feature = "cuda")]
            Self::Device(slab) => Ok(Cow::Owned(slab.read(place)?)),
        }
    }

    /// Has `fill` write some bytes of a slab that exists, all of them.
    pub(crate) fn fill(&mut self, slab: usize, place: Range<usize>, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        match self {
            Self::Host(slabs) => {
                fill(&mut slabs[slab][place]);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(slab) => {
                let mut bytes = vec![0; place.len()];
                fill(&mut bytes);
                slab.write(place.start, &bytes)
            }
        }
    }

    /// Copies some bytes of a slab that exists to another place in it, the same or one that does not overlap.
    pub(crate) fn copy_within(&mut self, slab: usize, from: Range<usize>, to: usize) -> Result<()> {
        match self {
            Self::Host(slabs) => {
                slabs[slab].copy_within(from, to);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(slab) => slab.copy_within(from, to),
        }
    }

    /// Where the slab of a CUDA device begins, if there is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> candle_core::Result<crate::cuda::address::Address> {
        match self {
            Self::Host(_) => candle_core::bail!("the cache is not on the device"),
            Self::Device(slab) => Ok(slab.address()),
        }
    }
}
