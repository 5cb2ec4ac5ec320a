//! What a CUDA device can do at most: bytes read from its memory, and operations of its tensor cores by the instructions that the
//! kernels of this crate use.

use std::time::Instant;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;

use super::limits::{Limits, Peak};
use super::peaks::MatrixUnit;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Argument, Launch, attribute, launch};
use crate::cuda::memory::{Address, scratch};
use crate::error::Result;

/// What is timed is made to take so long.
const LEAST_SECONDS: f64 = 5e-3;
const MOST_ROUNDS: u32 = 1 << 20;

/// Blocks of a multiprocessor: as many threads as one of sm_80 has.
const BLOCKS: usize = 8;
const WARPS: usize = ROW_THREADS / 32;
/// Of `limits.cu`.
const CHAINS: usize = 8;
const READ_BYTES: usize = 16;

pub(super) struct DeviceProbe {
    device: CudaDevice,
    memory: CudaSlice<u8>,
    out: CudaSlice<u32>,
    num_blocks: usize,
    best: Limits,
}

impl DeviceProbe {
    /// Takes the memory that is read. Fails if the device has none.
    pub(super) fn new(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let units = [MatrixUnit::FmaF32, MatrixUnit::TensorBf16, MatrixUnit::TensorInt8];
        let multiprocessors = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            device: device.clone(),
            memory: device.alloc_zeros(bytes / READ_BYTES * READ_BYTES)?,
            out: scratch(device, 1)?,
            num_blocks: BLOCKS * multiprocessors,
            best: Limits {
                read_bandwidth_1: None,
                read_bandwidth: 0.0,
                peaks: units.map(|unit| Peak { unit, operations_per_second: 0.0 }).to_vec(),
            },
        })
    }

    /// Keeps the best.
    pub(super) fn measure(&mut self) -> Result<()> {
        let found = self.read_bandwidth()?;
        self.best.read_bandwidth = self.best.read_bandwidth.max(found);
        for idx in 0..self.best.peaks.len() {
            let found = self.operations_per_second(self.best.peaks[idx].unit)?;
            let best = &mut self.best.peaks[idx].operations_per_second;
            *best = best.max(found);
        }
        Ok(())
    }

    pub(super) fn best(&self) -> &Limits {
        &self.best
    }

    fn read_bandwidth(&self) -> Result<f64> {
        let (values, count) = (Address::of(&self.memory), (self.memory.len() / READ_BYTES) as u64);
        let mut passes = 1;
        loop {
            // What was read is zeros.
            let seconds = self.seconds("limit_read", passes, &[&values, &count, &1u32, &Address::of(&self.out)])?;
            if seconds >= LEAST_SECONDS {
                return Ok(passes as f64 * self.memory.len() as f64 / seconds);
            }
            passes *= 2;
        }
    }

    fn operations_per_second(&self, unit: MatrixUnit) -> Result<f64> {
        // Of a round: of each thread, or of each warp.
        let (kernel, each) = match unit {
            MatrixUnit::TensorBf16 => ("limit_mma_bf16", WARPS * 2 * 16 * 16 * 8),
            MatrixUnit::TensorInt8 => ("limit_mma_int8", WARPS * 2 * 16 * 32 * 8),
            _ => ("limit_fma", ROW_THREADS * 2),
        };
        let (zero_factors, half, never) = (0u32, 0.5f32, f32::from_bits(0x7fc0_0001));
        let mut rounds = 1u32;
        loop {
            let factor: &dyn Argument = if unit == MatrixUnit::FmaF32 { &half } else { &zero_factors };
            // No sum of zeros is 1, and nothing is equal to what is not a number.
            let never: &dyn Argument = if unit == MatrixUnit::TensorInt8 { &1u32 } else { &never };
            let seconds = self.seconds(kernel, 1, &[&rounds, factor, never, &Address::of(&self.out)])?;
            if seconds >= LEAST_SECONDS || rounds >= MOST_ROUNDS {
                return Ok((self.num_blocks * CHAINS * each) as f64 * f64::from(rounds) / seconds);
            }
            rounds *= 2;
        }
    }

    /// Of so many launches one after the other.
    fn seconds(&self, kernel: &str, num_launches: usize, arguments: &[&dyn Argument]) -> Result<f64> {
        let stream = self.device.cuda_stream();
        let wait = || stream.synchronize().map_err(candle_core::Error::wrap);
        wait()?;
        let start = Instant::now();
        let shape = Launch { grid: [self.num_blocks, 1, 1], threads: ROW_THREADS, shared_bytes: 0 };
        for _ in 0..num_launches {
            // SAFETY: the arguments of the kernel; it writes one number at most.
            unsafe { launch(&self.device, kernel, shape, arguments) }?;
        }
        wait()?;
        Ok(start.elapsed().as_secs_f64())
    }
}
