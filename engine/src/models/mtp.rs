//! Where checkpoints keep multi-token-prediction (MTP) layers, and how many of them a model gets.

use crate::error::EngineError;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

use super::fine_grained;

/// How many there are, in the config of every family that is published with them.
const COUNT_KEY: &str = "num_nextn_predict_layers";

/// Where a family's MTP layers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtpStorage {
    /// Nowhere, or in a form that is not loaded.
    Unsupported,
    /// Behind the other layers: `model.layers.{num_hidden_layers}` and on (DeepSeek-V3, GLM-4.5, Ling 2.0).
    BehindLayers,
    /// Under `model.mtp.` (LongCat-Flash, whose published config leaves their number out: there is one).
    Apart,
}

/// Prefix of LongCat-Flash's MTP tensors.
pub(super) const APART: &str = "model.mtp.";

impl MtpStorage {
    /// How many layers the config has.
    pub fn count(self, config: &ModelConfig) -> Result<usize, EngineError> {
        match self {
            Self::Unsupported => Ok(0),
            Self::BehindLayers => config.count_or(COUNT_KEY, 0),
            Self::Apart => config.count_or(COUNT_KEY, 1),
        }
    }

    /// Whether a tensor belongs to them.
    pub fn holds(self, config: &ModelConfig, name: &str) -> bool {
        match self {
            Self::Unsupported => false,
            Self::BehindLayers => fine_grained::is_mtp_tensor(config, name),
            Self::Apart => name.starts_with(APART),
        }
    }

    /// The number of layers to load where they were asked for: all, and at least one.
    ///
    /// # Errors
    /// [`EngineError::NoMtp`] where the family, the config or the checkpoint has none.
    pub fn wanted(self, config: &ModelConfig, loader: &Loader) -> Result<usize, EngineError> {
        let model_type = config.model_type()?;
        let first = match self {
            Self::Unsupported => {
                return Err(EngineError::NoMtp(format!("they are not loaded for the architecture `{model_type}`")));
            }
            // Norms are stored plainly in quantized checkpoints too.
            Self::BehindLayers => format!("model.layers.{}.enorm.weight", config.size("num_hidden_layers")?),
            Self::Apart => format!("{APART}layers.0.enorm.m.weight"),
        };
        match self.count(config)? {
            0 => Err(EngineError::NoMtp(format!("`{COUNT_KEY}` in config.json is 0 or absent"))),
            count if count > 1 && self == Self::Apart => {
                Err(EngineError::NoMtp(format!("`{COUNT_KEY}` in config.json is {count}, and `{model_type}` has one")))
            }
            count if loader.has(&first) => Ok(count),
            count => {
                let reason = format!("the checkpoint has no tensor `{first}`, though `{COUNT_KEY}` means {count}");
                Err(EngineError::NoMtp(reason))
            }
        }
    }
}
