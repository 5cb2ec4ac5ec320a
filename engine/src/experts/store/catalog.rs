//! Where the experts of a packed folder lie: noted while its layers are loaded, which then go without them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use kernels::{Expert, ExpertActivation, ExpertBiases, ExpertSlots, ExpertWeights, PackedWeight, WeightFormat};

use crate::error::EngineError;
use crate::experts::ExpertId;
use crate::layers::linear::Linear;

/// All experts of a model that are not kept in memory.
#[derive(Debug, Default)]
pub struct ExpertCatalog {
    pub(super) layers: BTreeMap<usize, CatalogLayer>,
    /// Checksums by where a matrix lies.
    sums: HashMap<(PathBuf, u64), String>,
}

/// The router of a layer, to ask it before its turn.
#[derive(Clone, Debug)]
pub struct RouterParts {
    pub gate: Linear,
    pub spec: kernels::RouterSpec,
}

#[derive(Debug)]
pub(super) struct CatalogLayer {
    /// None for those that give back their input.
    pub(super) experts: Vec<Option<ExpertPlace>>,
    pub(super) slots: ExpertSlots,
    pub(super) router: RouterParts,
}

/// An expert but for its matrices.
#[derive(Debug)]
pub(super) struct ExpertPlace {
    pub(super) gate_up: MatrixPlace,
    pub(super) down: MatrixPlace,
    pub(super) biases: Option<ExpertBiases>,
    pub(super) activation: ExpertActivation,
}

/// A matrix in a file.
#[derive(Debug)]
pub(super) struct MatrixPlace {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) format: WeightFormat,
    pub(super) shape: [usize; 2],
    /// BLAKE3 of its bytes in hex, where the folder's index has it.
    pub(super) sum: Option<String>,
    /// Whether bytes that were read summed up to it.
    pub(super) is_checked: AtomicBool,
}

impl ExpertCatalog {
    /// What the bytes at a place must sum up to.
    pub(crate) fn note_sum(&mut self, path: &Path, offset: u64, sum: &str) {
        self.sums.insert((path.to_owned(), offset), sum.to_owned());
    }

    /// Takes the experts of a layer, which are mapped.
    ///
    /// # Errors
    /// One that is not: it was made of what the folder has, and is not there to be read again.
    pub(crate) fn add(&mut self, moe_idx: usize, router: RouterParts, experts: Vec<Expert>) -> Result<(), EngineError> {
        let glu = |expert: &Expert| match expert {
            Expert::Glu(weights) => Some((weights.gate_up.format(), weights.down.cols())),
            Expert::Identity => None,
        };
        let slots = ExpertSlots {
            formats: experts.iter().map(|expert| glu(expert).map(|(format, _)| format)).collect(),
            intermediate: experts.iter().find_map(glu).map_or(0, |(_, width)| width),
        };
        let place = |expert| match expert {
            Expert::Identity => Ok(None),
            Expert::Glu(ExpertWeights { gate_up, down, biases, activation }) => {
                let (gate_up, down) = (self.place_of(&gate_up)?, self.place_of(&down)?);
                Ok(Some(ExpertPlace { gate_up, down, biases, activation }))
            }
        };
        let experts = experts.into_iter().map(place).collect::<Result<_, EngineError>>()?;
        self.layers.insert(moe_idx, CatalogLayer { experts, slots, router });
        Ok(())
    }

    fn place_of(&self, weight: &PackedWeight) -> Result<MatrixPlace, EngineError> {
        let (path, offset) = weight.place().ok_or(EngineError::ExpertsNotPacked)?;
        Ok(MatrixPlace {
            path: path.to_owned(),
            offset,
            format: weight.format(),
            shape: [weight.rows(), weight.cols()],
            sum: self.sums.get(&(path.to_owned(), offset)).cloned(),
            is_checked: AtomicBool::new(false),
        })
    }

    /// Of all experts together.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.layers.values().flat_map(CatalogLayer::bytes).sum()
    }

    /// Of each expert, `[moe layer][expert]`: 0 of those that give back their input, none of layers that are elsewhere.
    pub(crate) fn bytes(&self) -> Vec<Vec<u64>> {
        let num_layers = self.layers.keys().last().map_or(0, |last| last + 1);
        let of_layer = |layer: usize| self.layers.get(&layer).map_or(Vec::new(), |layer| layer.bytes().collect());
        (0..num_layers).map(of_layer).collect()
    }

    /// All that have bytes, the first of each layer before the second ones.
    pub(crate) fn ids(&self) -> Vec<ExpertId> {
        let mut ids: Vec<ExpertId> = (self.layers.iter())
            .flat_map(|(&layer, experts)| experts.bytes().zip(0..).map(move |(bytes, expert)| (layer, expert, bytes)))
            .filter(|&(_, _, bytes)| bytes > 0)
            .map(|(layer, expert, _)| ExpertId { layer: layer as u32, expert })
            .collect();
        ids.sort_by_key(|id| (id.expert, id.layer));
        ids
    }

    /// Of the experts that one token may choose in one layer: nothing less will do.
    pub(crate) fn least_bytes(&self) -> u64 {
        let of_layer = |layer: &CatalogLayer| {
            let mut bytes: Vec<u64> = layer.bytes().collect();
            bytes.sort_unstable_by_key(|&bytes| std::cmp::Reverse(bytes));
            bytes.iter().take(layer.router.spec.top_k).sum()
        };
        self.layers.values().map(of_layer).max().unwrap_or(0)
    }
}

impl CatalogLayer {
    /// Of each expert; none of one that gives back its input.
    pub(super) fn bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.experts.iter().map(|expert| expert.as_ref().map_or(0, ExpertPlace::num_bytes))
    }
}

impl ExpertPlace {
    pub(super) fn num_bytes(&self) -> u64 {
        self.gate_up.num_bytes() + self.down.num_bytes()
    }
}

impl MatrixPlace {
    pub(super) fn num_bytes(&self) -> u64 {
        self.format.bytes_for(self.shape[0], self.shape[1]) as u64
    }
}
