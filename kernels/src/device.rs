//! Which device computes.

use std::fmt;
use std::str::FromStr;

use candle_core::{Device, Tensor};

use crate::error::{KernelError, Result};

/// Where a model computes, as an operator says it: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device of a build that knows them, where there is one; else the CPU.
    #[default]
    Auto,
    Cpu,
    /// By its number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let expected = || format!("`{text}` is no device; devices are auto, cpu, cuda and cuda:N");
        match text.split_once(':') {
            None => match text {
                "auto" => Ok(Self::Auto),
                "cpu" => Ok(Self::Cpu),
                "cuda" => Ok(Self::Cuda(0)),
                _ => Err(expected()),
            },
            Some(("cuda", ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| expected()),
            Some(_) => Err(expected()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Opens what was chosen. Fails where a CUDA device is asked for and there is none, where the build knows none, and where there
/// is one that does not work.
pub fn open_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto if cuda::count()? == 0 => Ok(Device::Cpu),
        DeviceChoice::Auto => cuda::open(0),
        DeviceChoice::Cuda(ordinal) => match cuda::count()? {
            count if ordinal >= count => Err(unknown(ordinal, count)),
            _ => cuda::open(ordinal),
        },
    }
}

fn unknown(ordinal: usize, count: usize) -> KernelError {
    let reason = match count {
        _ if !cfg!(feature = "cuda") => {
            "this build computes on the CPU only; build with --features cuda for NVIDIA devices".to_owned()
        }
        0 => format!("there is no device cuda:{ordinal}: the driver finds no GPU"),
        _ => format!("there is no device cuda:{ordinal}: the driver finds {count}, the last is cuda:{}", count - 1),
    };
    KernelError::Invalid { op: "device", reason }
}

/// What the bits of results depend on beside the version of the kernels; none on the CPU, whose instructions [`crate::isa`]
/// names.
pub fn device_kind(device: &Device) -> Result<Option<String>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Some(cuda::kind(device)?)),
        _ => Ok(None),
    }
}

/// As an operator knows it: `cpu`, or `cuda:0` with the name that its driver gives.
pub fn device_name(device: &Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(cuda::name(device)?),
        _ => Ok("cpu".to_owned()),
    }
}

/// A copy on the host that is there when this returns: one from a device may still be on its way.
pub fn to_host(tensor: &Tensor) -> Result<Tensor> {
    let copy = tensor.to_device(&Device::Cpu)?;
    tensor.device().synchronize()?;
    Ok(copy)
}

/// Memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// Memory that a device has of its own; none on the CPU. Waits until what was launched before is done.
pub fn device_memory(device: &Device) -> Result<Option<DeviceMemory>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let (free_bytes, total_bytes) = cuda::memory(device)?;
            Ok(Some(DeviceMemory { free_bytes: free_bytes as u64, total_bytes: total_bytes as u64 }))
        }
        _ => Ok(None),
    }
}

/// Most bytes of a device that steps like `step` take beside what is there, however long their contexts: what it holds while it
/// runs, and what attention may take to divide long contexts. `None` where a device does not say, and on the CPU. Waits until the
/// step is done; for when nobody else in this process uses the device.
///
/// # Errors
/// Those of `step`, and of the device.
pub fn device_step_bytes<E: From<KernelError>>(
    device: &Device,
    step: impl FnOnce() -> std::result::Result<(), E>,
) -> std::result::Result<Option<u64>, E> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let peak = cuda::peak_of(device, step)?;
            Ok(peak.map(|peak| (peak + crate::ops::attention::cuda::MOST_PARTIAL_BYTES) as u64))
        }
        _ => step().map(|()| None),
    }
}

#[cfg(feature = "cuda")]
use crate::cuda::device as cuda;

#[cfg(not(feature = "cuda"))]
mod cuda {
    pub(super) fn count() -> super::Result<usize> {
        Ok(0)
    }

    pub(super) fn open(ordinal: usize) -> super::Result<super::Device> {
        Err(super::unknown(ordinal, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(3)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(wrong.parse::<DeviceChoice>().unwrap_err().contains("devices are auto, cpu, cuda and cuda:N"));
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        assert!(open_device(DeviceChoice::Cpu).unwrap().is_cpu());
        open_device(DeviceChoice::Auto).unwrap();
        assert!(open_device(DeviceChoice::Cuda(999)).is_err());
    }
}
