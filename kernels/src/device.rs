//! Which device computes.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;

use crate::error::Result;

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

/// Opens what was chosen. Fails where a CUDA device is asked for and there is none, or the build knows none.
pub fn open_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(open_cuda(0).unwrap_or(Device::Cpu)),
        DeviceChoice::Cuda(ordinal) => open_cuda(ordinal),
    }
}

#[cfg(feature = "cuda")]
use crate::cuda::device::open as open_cuda;

#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: usize) -> Result<Device> {
    let reason = "this build computes on the CPU only; build with --features cuda for NVIDIA devices".to_owned();
    Err(crate::error::KernelError::Invalid { op: "device", reason })
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
