//! The experts of a layer, together where they are computed.

use std::ops::Deref;

use candle_core::Device;

use super::cpu::Sizes;
#[cfg(feature = "cuda")]
use super::cuda::ExpertTable;
use super::{Expert, ExpertWeights, OP};
use crate::check;
use crate::error::Result;

/// Experts that fit each other and lie on one device, which then has a table of them.
#[derive(Debug)]
pub struct Experts {
    experts: Vec<Expert>,
    /// None where all give back their input.
    sizes: Option<Sizes>,
    device: Device,
    #[cfg(feature = "cuda")]
    table: Option<ExpertTable>,
}

impl Experts {
    /// Experts where their weights lie, on the CPU if they have none. Fails unless the weights are all there and of matching shapes.
    pub fn new(experts: Vec<Expert>) -> Result<Self> {
        let device = experts.iter().find_map(Expert::glu).map_or(Device::Cpu, |expert| expert.gate_up.device());
        Self::on(&device, experts)
    }

    /// The same experts on a device. Fails if it has no code or no memory.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Self::on(device, self.experts.iter().map(|expert| expert.to_device(device)).collect::<Result<_>>()?)
    }

    fn on(device: &Device, experts: Vec<Expert>) -> Result<Self> {
        let sizes = experts.iter().find_map(Expert::glu).map(ExpertWeights::sizes);
        if let Some(sizes) = sizes {
            experts.iter().filter_map(Expert::glu).try_for_each(|expert| expert.check(sizes, device))?;
        }
        Ok(Self {
            #[cfg(feature = "cuda")]
            table: match device {
                Device::Cuda(device) => Some(ExpertTable::new(device, &experts)?),
                _ => None,
            },
            experts,
            sizes,
            device: device.clone(),
        })
    }

    /// Where they lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// For rows of this width. Fails where the experts are for others.
    pub(super) fn sizes(&self, hidden: usize) -> Result<Sizes> {
        let sizes = self.sizes.unwrap_or(Sizes { hidden, intermediate: 0 });
        check::length(OP, "width of x", hidden, sizes.hidden)?;
        Ok(sizes)
    }

    #[cfg(feature = "cuda")]
    pub(super) fn table(&self) -> candle_core::Result<&ExpertTable> {
        match &self.table {
            Some(table) => Ok(table),
            None => candle_core::bail!("{OP}: the experts are not on a device"),
        }
    }
}

impl Deref for Experts {
    type Target = [Expert];

    fn deref(&self) -> &[Expert] {
        &self.experts
    }
}
