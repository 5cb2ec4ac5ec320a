//! Expert profiles: how much each expert of a model was used, kept in a file that later runs start from.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::loads::LoadSums;
use super::residency::ExpertId;
use super::routed_rows::MoeShape;
use crate::error::EngineError;
use crate::weights::read_bounded;

/// The value of [`ExpertProfile::format`] that is written and read.
const FORMAT: &str = "moesaic.expert_profile.v1";

/// A model of 61 layers with 384 experts takes some 250 KB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// What a model's routers chose over some texts, or some time.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ExpertProfile {
    /// Name and version of the form.
    format: String,
    /// As a user names it.
    pub model: String,
    /// [`crate::Fingerprint::sampled_weights`] in hex.
    pub weights: String,
    /// Tokens that passed the layer that saw most of them.
    pub num_tokens: u64,
    /// In the order in which a token meets the routers; none of multi-token prediction, which is loaded on request only.
    pub layers: Vec<ProfileLayer>,
}

/// One router's part.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ProfileLayer {
    pub top_k: usize,
    pub num_tokens: u64,
    /// Tokens that chose each expert.
    pub loads: Vec<u64>,
}

impl ExpertProfile {
    /// Of what was counted; `weights` is [`crate::Fingerprint::sampled_weights`].
    pub fn new((model, weights): (&str, [u8; 32]), sums: &LoadSums) -> Self {
        let num_own = sums.layers.len() - sums.num_mtp;
        let layers: Vec<ProfileLayer> = (sums.layers[..num_own].iter())
            .map(|layer| ProfileLayer { top_k: layer.top_k, num_tokens: layer.num_tokens, loads: layer.loads.clone() })
            .collect();
        Self {
            format: FORMAT.to_owned(),
            model: model.to_owned(),
            weights: hex(weights),
            num_tokens: layers.iter().map(|layer| layer.num_tokens).max().unwrap_or(0),
            layers,
        }
    }

    /// # Errors
    /// A file that cannot be read, is larger than 64 MiB, is no profile or one whose numbers cannot be.
    pub fn read(path: &Path) -> Result<Self, EngineError> {
        let read = |source| EngineError::Read { path: path.into(), source };
        let invalid = |reason| EngineError::Invalid { path: path.into(), reason };
        Self::parse(&read_bounded(path, MAX_FILE_BYTES).map_err(read)?).map_err(invalid)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
        }
        let head: Head =
            serde_json::from_slice(bytes).map_err(|error| format!("it is no expert profile in JSON: {error}"))?;
        if head.format != FORMAT {
            return Err(format!("its `format` is `{}`, this version reads `{FORMAT}`", head.format));
        }
        let profile: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        for (idx, layer) in profile.layers.iter().enumerate() {
            if layer.loads.is_empty() || layer.top_k == 0 || layer.top_k > layer.loads.len() {
                return Err(format!("layer {idx} has {} experts, {} per token", layer.loads.len(), layer.top_k));
            }
            if let Some((expert, load)) = layer.loads.iter().enumerate().find(|(_, load)| **load > layer.num_tokens) {
                return Err(format!("expert {expert} of layer {idx} has {load} of {} tokens", layer.num_tokens));
            }
        }
        Ok(profile)
    }

    /// In place of what was there, or not at all.
    ///
    /// # Errors
    /// The folder or the disk refuses.
    pub fn write(&self, path: &Path) -> Result<(), EngineError> {
        let error = |source| EngineError::Write { path: path.into(), source };
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        let written = std::fs::write(&partial, self.to_json()).and_then(|()| std::fs::rename(&partial, path));
        if written.is_err() {
            // Nothing of it is wanted, and the first error is the one that tells.
            let _ = std::fs::remove_file(&partial);
        }
        written.map_err(error)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a profile is plain JSON") + "\n"
    }

    /// Whether it is of a model with these routers, `ModelShape::own_moe_layers`; `Some` says why its weights may be others, which costs hits only.
    ///
    /// # Errors
    /// [`EngineError::ForeignProfile`] where layers, experts or experts per token differ.
    pub fn check(&self, shape: &[MoeShape], weights: [u8; 32]) -> Result<Option<String>, EngineError> {
        let foreign = |reason: String| Err(EngineError::ForeignProfile(reason));
        if self.layers.len() != shape.len() {
            return foreign(format!("it has {} MoE layers, the model has {}", self.layers.len(), shape.len()));
        }
        for (idx, (layer, shape)) in self.layers.iter().zip(shape).enumerate() {
            let found = MoeShape { num_experts: layer.loads.len(), top_k: layer.top_k };
            if found != *shape {
                return foreign(format!(
                    "its layer {idx} has {} experts, {} per token, the model's {} and {}",
                    found.num_experts, found.top_k, shape.num_experts, shape.top_k
                ));
            }
        }
        let is_same = self.weights == hex(weights);
        Ok((!is_same).then(|| format!("it was written for other weights, of `{}`", self.model)))
    }

    /// The experts that were used, by the share of their layer's tokens that they had, largest first; of these as many as fit.
    /// `expert_bytes` is `[moe layer][expert]`; experts without bytes, or that are not in it, are left out.
    pub fn hottest(&self, expert_bytes: &[Vec<u64>], capacity_bytes: u64) -> Vec<ExpertId> {
        let mut ranked = Vec::new();
        for (layer, (profile, bytes)) in (0..).zip(self.layers.iter().zip(expert_bytes)) {
            for (expert, (&load, &bytes)) in (0..).zip(profile.loads.iter().zip(bytes)) {
                if load > 0 && bytes > 0 {
                    ranked.push((load as f64 / profile.num_tokens as f64, ExpertId { layer, expert }, bytes));
                }
            }
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut room = capacity_bytes;
        ranked.retain(|&(_, _, bytes)| {
            let fits = bytes <= room;
            room -= if fits { bytes } else { 0 };
            fits
        });
        ranked.into_iter().map(|(_, id, _)| id).collect()
    }
}

fn hex(bytes: [u8; 32]) -> String {
    blake3::Hash::from_bytes(bytes).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::LayerLoads;

    const SHAPE: [MoeShape; 2] = [MoeShape { num_experts: 3, top_k: 2 }, MoeShape { num_experts: 2, top_k: 1 }];

    fn profile() -> ExpertProfile {
        let layer = |top_k, num_tokens, loads: &[u64]| LayerLoads {
            top_k,
            num_tokens,
            loads: loads.into(),
            num_places: 0,
            num_dropped: 0,
        };
        let layers = vec![layer(2, 10, &[10, 4, 6]), layer(1, 5, &[5, 0]), layer(1, 99, &[99])];
        let sums = LoadSums { seconds: 1.0, layers, num_mtp: 1 };
        ExpertProfile::new(("m", [7; 32]), &sums)
    }

    fn id(layer: u32, expert: u32) -> ExpertId {
        ExpertId { layer, expert }
    }

    #[test]
    fn what_is_written_is_read() {
        let path = std::env::temp_dir().join(format!("moesaic-profile-{}.json", std::process::id()));
        profile().write(&path).unwrap();
        profile().write(&path).unwrap();
        let found = ExpertProfile::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(found, profile());
        assert_eq!((found.num_tokens, found.weights.len()), (10, 64));
        let missing = Path::new("/nowhere/profile.json");
        let error = profile().write(missing).unwrap_err().to_string();
        assert!(error.starts_with("cannot write /nowhere/profile.json: "), "{error}");
        let error = ExpertProfile::read(missing).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/profile.json: "), "{error}");
    }

    #[test]
    fn the_hottest_come_first_and_fit() {
        let bytes = [vec![2, 2, 2], vec![3, 3]];
        assert_eq!(profile().hottest(&bytes, 100), [id(0, 0), id(1, 0), id(0, 2), id(0, 1)]);
        assert_eq!(profile().hottest(&bytes, 4), [id(0, 0), id(0, 2)]);
        assert_eq!(profile().hottest(&bytes, 1), []);
        assert_eq!(profile().hottest(&[vec![], vec![3]], 5), [id(1, 0)]);
        assert_eq!(profile().hottest(&[vec![0, 2, 2], vec![3, 3]], 5), [id(1, 0), id(0, 2)]);
    }

    #[test]
    fn a_profile_of_another_model_is_refused_and_of_other_weights_doubted() {
        assert_eq!(profile().check(&SHAPE, [7; 32]).unwrap(), None);
        let doubt = profile().check(&SHAPE, [8; 32]).unwrap();
        assert_eq!(doubt.as_deref(), Some("it was written for other weights, of `m`"));
        let refused = |shape: &[MoeShape]| profile().check(shape, [7; 32]).unwrap_err().to_string();
        let start = "the expert profile is of another model: ";
        assert_eq!(refused(&SHAPE[..1]), format!("{start}it has 2 MoE layers, the model has 1"));
        let wide = [SHAPE[0], MoeShape { num_experts: 4, top_k: 1 }];
        assert_eq!(refused(&wide), format!("{start}its layer 1 has 2 experts, 1 per token, the model's 4 and 1"));
    }

    #[test]
    fn what_is_no_profile_is_said_to_be_none() {
        let check = |text: &str, expected: &str| {
            let error = ExpertProfile::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("", "it is no expert profile in JSON");
        check("[1]", "it is no expert profile in JSON");
        check("{\"a\": 1}", "missing field `format`");
        check(&profile().to_json().replace(".v1", ".v2"), "its `format` is `moesaic.expert_profile.v2`");
        check(&profile().to_json().replace("\"layers\"", "\"rows\""), "missing field `layers`");
        check(&profile().to_json().replace("[5,0]", "[5,6]"), "expert 1 of layer 1 has 6 of 5 tokens");
        check(&profile().to_json().replace("[5,0]", "[]"), "layer 1 has 0 experts, 1 per token");
        check(&profile().to_json().replace("[5,0]", "[5,-1]"), "invalid value");
        check(&profile().to_json().replace("\"top_k\":2", "\"top_k\":9"), "layer 0 has 3 experts, 9 per token");
    }
}
