//! How much memory a model may take: of the host, or of the device that it computes on.

use candle_core::Device;
use kernels::DeviceMemory;

use crate::config::EngineConfig;
use crate::error::EngineError;

/// Share of what weights leave that the default KV cache may take of the host, where others live too.
const HOST_SHARE: f64 = 0.4;

/// What a step may take where a device does not say what one took: with the sums of split attention, and for each token the activations
/// of the widest layer of known models and a part of what its experts leave between their products.
const STEP_BYTES: u64 = 512 << 20;
const TOKEN_BYTES: u64 = 1 << 20;

/// Memory for weights and KV cache, and on a device for steps until [`Self::without_steps`] takes that away.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    bytes: u64,
    /// Of what the weights leave, for a KV cache of no configured size.
    cache_share: f64,
    /// Of the device and how much of it may be used, where it is not the host's.
    device: Option<(DeviceMemory, f64)>,
}

impl Room {
    /// Fails where other processes have left nothing of the device.
    pub fn new(config: &EngineConfig, device: &Device) -> Result<Self, EngineError> {
        match kernels::device_memory(device)? {
            None => Ok(Self::of_host(config.available_memory)),
            Some(memory) => Self::of_device(config, memory),
        }
    }

    pub fn of_host(bytes: u64) -> Self {
        Self { bytes, cache_share: HOST_SHARE, device: None }
    }

    fn of_device(config: &EngineConfig, memory: DeviceMemory) -> Result<Self, EngineError> {
        let utilization = config.gpu_memory_utilization;
        let usable = (memory.total_bytes as f64 * utilization) as u64;
        let taken = memory.total_bytes - memory.free_bytes;
        let room = Self { bytes: usable.saturating_sub(taken), cache_share: 1.0, device: Some((memory, utilization)) };
        if room.bytes == 0 {
            room.check("a model wants", (1, 0), "a larger share, or --device cpu, which takes the host's memory")?;
        }
        Ok(room)
    }

    /// Without what steps take of a device beside weights of so many bytes; fails where that is more than there is.
    pub fn without_steps(self, step_bytes: u64, weight_bytes: u64) -> Result<Self, EngineError> {
        let hint = "fewer tokens at once (--max-num-batched-tokens, or --context) take less; --device cpu takes the host's memory";
        self.check("the steps want", (step_bytes, self.bytes.saturating_sub(weight_bytes)), hint)?;
        Ok(Self { bytes: self.bytes.saturating_sub(step_bytes), ..self })
    }

    /// What steps are taken to want where a device does not say.
    pub fn estimated_step_bytes(config: &EngineConfig) -> u64 {
        STEP_BYTES + config.max_num_batched_tokens as u64 * TOKEN_BYTES
    }

    /// What a KV cache of no configured size may take beside the weights.
    pub fn for_cache(&self, weight_bytes: u64) -> u64 {
        (self.bytes.saturating_sub(weight_bytes) as f64 * self.cache_share) as u64
    }

    /// Refuses weights that leave no room on a device, and a KV cache that does not fit beside them. The host's memory is not
    /// only ours: it is not refused.
    pub fn check_weights(&self, weight_bytes: u64, kv_cache_memory: Option<u64>) -> Result<(), EngineError> {
        let hint = "--quant int4 makes them smaller; --device cpu takes the host's memory";
        self.check("the weights want", (weight_bytes, self.bytes), hint)?;
        let left = self.bytes.saturating_sub(weight_bytes);
        self.check("the KV cache wants", (kv_cache_memory.unwrap_or(0), left), "a smaller --kv-cache-memory fits")
    }

    fn check(&self, what: &'static str, (needed, left): (u64, u64), hint: &'static str) -> Result<(), EngineError> {
        match self.device {
            Some((memory, utilization)) if needed > left => {
                Err(EngineError::DeviceMemory { what, needed, left, memory, utilization, hint })
            }
            _ => Ok(()),
        }
    }

    /// All of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: DeviceMemory = DeviceMemory { free_bytes: 7 << 30, total_bytes: 8 << 30 };

    fn on_device(gpu_memory_utilization: f64) -> Result<Room, EngineError> {
        let config = EngineConfig { gpu_memory_utilization, max_num_batched_tokens: 512, ..EngineConfig::new("") };
        Room::of_device(&config, MEMORY)
    }

    #[test]
    fn a_device_is_used_up_to_its_share() {
        // A half of 8 GiB, without the GiB of others.
        let room = on_device(0.5).unwrap();
        assert_eq!(room.bytes(), 3 << 30);
        let text = room.without_steps(3 << 30, 1 << 30).unwrap_err().to_string();
        assert!(text.starts_with("the steps want 3.00 GiB on the device, 2.00 GiB are left"), "{text}");
        let room = room.without_steps(1 << 30, 1 << 30).unwrap();
        assert_eq!(room.bytes(), 2 << 30);
        assert_eq!(room.for_cache(1 << 30), 1 << 30);
        assert_eq!(room.for_cache(3 << 30), 0);
        room.check_weights(1 << 30, Some(1 << 30)).unwrap();
        let text = room.check_weights(3 << 30, None).unwrap_err().to_string();
        let expected = "the weights want 3.00 GiB on the device, 2.00 GiB are left: it has 8.00 GiB, 7.00 GiB were free, and \
                        0.5 of all may be used";
        assert!(text.starts_with(expected), "{text}");
        let text = room.check_weights(1 << 30, Some(2 << 30)).unwrap_err().to_string();
        assert!(text.starts_with("the KV cache wants 2.00 GiB on the device, 1.00 GiB are left"), "{text}");
        assert!(on_device(0.1).unwrap_err().to_string().starts_with("a model wants"));
    }

    #[test]
    fn the_host_is_shared() {
        let room = Room::of_host(10 << 30);
        assert_eq!(room.for_cache(0), 4 << 30);
        room.check_weights(20 << 30, Some(20 << 30)).unwrap();
    }
}
