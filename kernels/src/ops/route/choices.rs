//! What a router chose, where its logits lie.

use super::TopK;
use crate::error::Result;

/// What a router chose, where its logits lie. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Choices {
    Host(TopK),
    /// On a CUDA device, perhaps still to be computed.
    #[cfg(feature = "cuda")]
    Device(DeviceChoices),
}

/// Experts of each token, then the bits of their weights.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
pub struct DeviceChoices {
    pub(super) device: candle_core::CudaDevice,
    /// `[2, num_tokens, k]`
    pub(super) words: std::sync::Arc<candle_core::cuda_backend::cudarc::driver::CudaSlice<u32>>,
    pub(super) num_tokens: usize,
    pub(super) k: usize,
    /// Of the router.
    pub(super) num_experts: usize,
}

/// Choices as an op takes them.
#[derive(Clone, Copy)]
pub enum Chosen<'a> {
    Host(&'a TopK),
    #[cfg(feature = "cuda")]
    Device(&'a DeviceChoices),
}

impl<'a> From<&'a TopK> for Chosen<'a> {
    fn from(topk: &'a TopK) -> Self {
        Self::Host(topk)
    }
}

impl<'a> From<&'a Choices> for Chosen<'a> {
    fn from(choices: &'a Choices) -> Self {
        match choices {
            Choices::Host(topk) => Self::Host(topk),
            #[cfg(feature = "cuda")]
            Choices::Device(choices) => Self::Device(choices),
        }
    }
}

impl<'a> Chosen<'a> {
    /// Those on the host.
    pub(crate) fn host(self) -> Option<&'a TopK> {
        match self {
            Self::Host(topk) => Some(topk),
            #[cfg(feature = "cuda")]
            Self::Device(_) => None,
        }
    }

    /// Experts of a token.
    #[cfg(feature = "cuda")]
    pub(crate) fn k(self) -> usize {
        match self {
            Self::Host(topk) => topk.k,
            Self::Device(choices) => choices.k,
        }
    }
}

impl Choices {
    /// Those on the host.
    pub fn host(&self) -> Option<&TopK> {
        match self {
            Self::Host(topk) => Some(topk),
            #[cfg(feature = "cuda")]
            Self::Device(_) => None,
        }
    }

    /// A copy on the host; of a device it is waited for. Fails if that does.
    pub fn into_host(self) -> Result<TopK> {
        match self {
            Self::Host(topk) => Ok(topk),
            #[cfg(feature = "cuda")]
            Self::Device(_) => Ok(Self::all_to_host([self])?.remove(0)),
        }
    }

    /// The same of many, for which a device is waited for once. Panics if they lie on several devices.
    pub fn all_to_host(all: impl IntoIterator<Item = Self>) -> Result<Vec<TopK>> {
        #[cfg(feature = "cuda")]
        return Ok(DeviceChoices::all_to_host(all.into_iter().collect())?);
        #[cfg(not(feature = "cuda"))]
        return Ok(all.into_iter().map(|Self::Host(topk)| topk).collect());
    }
}

#[cfg(feature = "cuda")]
impl DeviceChoices {
    /// Experts and weights of a token and of those behind it.
    pub(crate) fn starting_at(&self, token: usize) -> [crate::cuda::memory::Address; 2] {
        let start = crate::cuda::memory::Address::of(&self.words);
        [token, self.num_tokens + token].map(|row| start.plus(row * self.k * size_of::<u32>()))
    }

    /// Whether they are of so many tokens on the device, by a router of no more experts.
    pub(crate) fn is_of(&self, device: &candle_core::Device, num_tokens: usize, num_experts: usize) -> bool {
        let is_there = device.same_device(&candle_core::Device::Cuda(self.device.clone()));
        is_there && self.num_tokens == num_tokens && self.num_experts <= num_experts
    }

    fn all_to_host(all: Vec<Choices>) -> candle_core::Result<Vec<TopK>> {
        let mut copies: Vec<Vec<u32>> = all.iter().map(Choices::words_on_device).collect();
        let on_device = all.iter().zip(&mut copies).filter_map(|(choices, copy)| match choices {
            Choices::Host(_) => None,
            Choices::Device(found) => Some((found, copy)),
        });
        let on_device: Vec<_> = on_device.collect();
        if let Some(device) = on_device.first().map(|(found, _)| found.device.clone()) {
            let is_there = |(found, _): &(&Self, _)| found.device.id() == device.id();
            assert!(on_device.iter().all(is_there), "the choices of a step lie on one device");
            let places = on_device.into_iter().map(|(found, copy)| (&*found.words, 0, copy.as_mut_slice()));
            crate::cuda::memory::read_all(&device, places)?;
        }
        let host = all.into_iter().zip(copies).map(|(choices, mut words)| match choices {
            Choices::Host(topk) => topk,
            Choices::Device(DeviceChoices { k, .. }) => {
                let weights = words.split_off(words.len() / 2).into_iter().map(f32::from_bits).collect();
                TopK { experts: words, weights, k }
            }
        });
        Ok(host.collect())
    }
}

#[cfg(feature = "cuda")]
impl Choices {
    /// Room for what lies on a device.
    fn words_on_device(&self) -> Vec<u32> {
        match self {
            Self::Host(_) => Vec::new(),
            Self::Device(choices) => vec![0; 2 * choices.num_tokens * choices.k],
        }
    }
}
