//! What the settings say about the choices of routers.

use clap::ValueEnum;
use engine::{Capacity, Overflow, RoutingOptions};
use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, in_range};

/// `--capacity-mode`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CapacityMode {
    /// The weights of all its tokens are multiplied by limit over tokens.
    Scale,
    /// Those of least weight get nothing from it.
    Drop,
}

impl From<CapacityMode> for Overflow {
    fn from(mode: CapacityMode) -> Self {
        match mode {
            CapacityMode::Scale => Self::Scale,
            CapacityMode::Drop => Self::Drop,
        }
    }
}

impl Config {
    /// What acts on the rows of every request.
    pub fn routing_options(&self) -> RoutingOptions {
        let overflow = self.capacity_mode.into();
        RoutingOptions {
            capacity: self.capacity_factor.map(|factor| Capacity { factor: factor as f32, overflow }),
            noise: self.router_noise as f32,
            overload_decay: self.overload_decay as f32,
        }
    }

    pub(super) fn check_routing(&self) -> Result<(), ConfigError> {
        in_range("capacity_factor", self.capacity_factor.unwrap_or(1.0), (0.01..=1000.0, "0.01 to 1000"))?;
        in_range("router_noise", self.router_noise, (0.0..=100.0, "0 to 100"))?;
        in_range("overload_decay", self.overload_decay, (0.0..=100.0, "0 to 100"))?;
        in_range("expert_top_p", self.expert_top_p, (0.001..=1.0, "0.001 to 1"))
    }
}
