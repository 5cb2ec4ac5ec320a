//! Lists of the host that are copied to a device once and asked for again: constants of a model by every step, lists of a step by
//! every layer. They are known by what is in them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::address::Address;
use super::device::PerDevice;
use super::memory::upload;

/// Constants of all models that were loaded in a process; what does not fit is copied whenever it is asked for.
const MOST_KEPT_BYTES: usize = 64 << 20;

/// Lists that the layers of a step share: positions and slots, each of one or two kinds.
const MOST_RECENT: usize = 8;

static KEPT: PerDevice<Mutex<Kept>> = PerDevice::new();
static RECENT: PerDevice<Mutex<Recent>> = PerDevice::new();

/// What was copied last comes first.
type Recent = VecDeque<(Vec<u32>, Copied)>;

/// A list on a device, as long as somebody needs it.
#[derive(Clone)]
pub(crate) struct Copied {
    words: Arc<CudaSlice<u32>>,
}

impl Copied {
    fn new(device: &CudaDevice, words: &[u32]) -> candle_core::Result<Self> {
        Ok(Self { words: Arc::new(upload(device, words)?) })
    }

    pub(crate) fn start(&self) -> Address {
        Address::of(&self.words)
    }
}

#[derive(Default)]
struct Kept {
    /// By their bits.
    lists: HashMap<Vec<u32>, Copied>,
    num_bytes: usize,
}

/// A copy of a model's constants, which stays on the device.
pub(crate) fn upload_kept(device: &CudaDevice, values: &[f32]) -> candle_core::Result<Copied> {
    let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    let kept = KEPT.get_or_make(device, || Ok(Mutex::default()))?;
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = kept.lists.get(&bits) {
        return Ok(found.clone());
    }
    let made = Copied::new(device, &bits)?;
    if kept.num_bytes + size_of_val(values) <= MOST_KEPT_BYTES {
        kept.num_bytes += size_of_val(values);
        kept.lists.insert(bits, made.clone());
    }
    Ok(made)
}

/// A copy of a list of a step, which the next ones who ask for the same list share.
pub(crate) fn upload_recent(device: &CudaDevice, values: &[u32]) -> candle_core::Result<Copied> {
    let recent = RECENT.get_or_make(device, || Ok(Mutex::default()))?;
    let mut recent = recent.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, found)) = recent.iter().find(|(list, _)| list == values) {
        return Ok(found.clone());
    }
    let made = Copied::new(device, values)?;
    recent.truncate(MOST_RECENT - 1);
    recent.push_front((values.to_vec(), made.clone()));
    Ok(made)
}
