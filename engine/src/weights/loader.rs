//! Hands out the checkpoint's tensors by name in the form the layers want, and notices what nobody asked for.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use kernels::block_format::BlockFormat;
use kernels::{PackedWeight, WeightFormat};
use safetensors::Dtype;

use super::checkpoint::{Checkpoint, StoredDtype, TensorEntry};
use super::gguf_model::blocks::BlockMatrix;
use super::quantization::Quantization;
use crate::config::WeightDtype;
use crate::error::EngineError;

/// Where multimodal checkpoints keep the language model's tensors.
const NESTED_PREFIX: &str = "language_model.";

/// Bytes read so far and in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// One pass over a checkpoint: every tensor is taken by name, once.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    total_bytes: u64,
    /// Of every name: multimodal checkpoints keep their language model under one.
    prefix: &'static str,
    quantization: Quantization,
    dtype: WeightDtype,
    state: RefCell<LoadState<'a>>,
}

struct LoadState<'a> {
    taken: BTreeSet<String>,
    done_bytes: u64,
    weight_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
}

impl<'a> Loader<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        quantization: Quantization,
        dtype: WeightDtype,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let state = LoadState { taken: BTreeSet::new(), done_bytes: 0, weight_bytes: 0, progress };
        let is_nested = checkpoint.iter().any(|(name, _)| name.starts_with(NESTED_PREFIX));
        let prefix = if is_nested { NESTED_PREFIX } else { "" };
        let total_bytes = checkpoint.total_bytes();
        Self { checkpoint, total_bytes, prefix, quantization, dtype, state: RefCell::new(state) }
    }

    pub fn has(&self, name: &str) -> bool {
        self.checkpoint.get(&format!("{}{name}", self.prefix)).is_some()
    }

    /// A matrix `[rows, cols]` for [`kernels::linear`].
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<PackedWeight, EngineError> {
        self.fused_weight(&[(name.to_owned(), rows)], cols)
    }

    /// Several matrices over the same input, one below the other: `[Σ rows, cols]`.
    pub fn fused_weight(&self, parts: &[(String, usize)], cols: usize) -> Result<PackedWeight, EngineError> {
        let formats = self.block_formats(parts);
        let parts = parts.iter().map(|(name, rows)| match name.strip_suffix(".weight") {
            Some(stem) if !self.has(name) && self.is_packed(stem) => self.expand_packed(stem, [*rows, cols]),
            _ => {
                let shape = [*rows, cols];
                let entry = self.take(name, &shape)?;
                match entry.dtype {
                    StoredDtype::Block(format) => {
                        self.block_weight(BlockMatrix { name, entry, format, offset: 0, shape }, &formats)
                    }
                    StoredDtype::Plain(_) => self.stored(name, entry, 0, shape),
                }
            }
        });
        self.keep(parts.collect::<Result<_, _>>()?)
    }

    /// Matrices made of the rows of one tensor `[rows, cols]`, each in an order of its own.
    pub fn picked_weights(
        &self,
        name: &str,
        shape: [usize; 2],
        picks: &[Vec<usize>],
    ) -> Result<Vec<PackedWeight>, EngineError> {
        let stored = self.stored(name, self.take(name, &shape)?, 0, shape)?;
        picks.iter().map(|rows| self.keep(vec![stored.select_rows(rows)?])).collect()
    }

    /// The matrices of a stacked tensor `[count, rows, cols]`, apart.
    pub fn stacked_weights(&self, name: &str, shape: [usize; 3]) -> Result<Vec<PackedWeight>, EngineError> {
        let [count, rows, cols] = shape;
        let entry = self.take(name, &shape)?;
        self.expect_stackable(name, entry)?;
        let stride = entry.num_bytes / count;
        (0..count).map(|idx| self.keep(vec![self.stored(name, entry, idx * stride, [rows, cols])?])).collect()
    }

    /// The matrices of a stacked tensor `[count, rows, cols]`, borrowed: for those that change on their way in.
    pub fn borrow_stacked(
        &self,
        name: &str,
        [count, rows, cols]: [usize; 3],
    ) -> Result<Vec<PackedWeight>, EngineError> {
        let entry = self.take(name, &[count, rows, cols])?;
        self.expect_stackable(name, entry)?;
        let stride = entry.num_bytes / count;
        (0..count).map(|idx| self.stored(name, entry, idx * stride, [rows, cols])).collect()
    }

    /// The stored bytes of a tensor of bytes.
    pub fn bytes(&self, name: &str, shape: &[usize]) -> Result<&'a [u8], EngineError> {
        let entry = self.take(name, shape)?;
        match entry.dtype {
            StoredDtype::Plain(Dtype::U8) => Ok(self.checkpoint.bytes(entry)),
            _ => Err(self.dtype_error(name, entry)),
        }
    }

    /// A matrix that was made from others, in the format that was asked for, else in `format`.
    pub fn made(
        &self,
        format: WeightFormat,
        [rows, cols]: [usize; 2],
        values: &[f32],
    ) -> Result<PackedWeight, EngineError> {
        self.keep(vec![PackedWeight::from_f32(format, rows, cols, values)?])
    }

    /// A vector in f32: norm weights, biases.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_vec(self.floats(name, &[len])?, len, &Device::Cpu)?)
    }

    /// A small tensor in f32, row-major.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let entry = self.take(name, shape)?;
        let count = entry.shape.iter().product();
        let stored = self.checkpoint.matrix(entry, 0, self.weight_format(name, entry)?, [count, 1])?;
        self.state.borrow_mut().weight_bytes += (count * size_of::<f32>()) as u64;
        Ok(stored.to_f32())
    }

    /// Bytes the loaded weights take in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.state.borrow().weight_bytes
    }

    /// Every tensor was used, or is one that `ignored` knows to be of no use here.
    pub fn finish(self, ignored: impl Fn(&str) -> bool) -> Result<(), EngineError> {
        let taken = self.state.into_inner().taken;
        let extra: Vec<&str> = self
            .checkpoint
            .iter()
            .map(|(name, _)| name)
            .filter(|name| !taken.contains(*name) && !ignored(name))
            .collect();
        if extra.is_empty() {
            return Ok(());
        }
        let names = extra.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        Err(EngineError::ExtraTensors { count: extra.len(), names })
    }

    pub(super) fn quantization(&self) -> Quantization {
        self.quantization
    }

    pub(super) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    pub(super) fn stored_bytes(&self, entry: &TensorEntry) -> &'a [u8] {
        self.checkpoint.bytes(entry)
    }

    /// A small tensor of any shape in f32, for the caller to check; it is not kept, so its bytes are not counted.
    pub(super) fn any_floats(&self, name: &str) -> Result<(&'a TensorEntry, Vec<f32>), EngineError> {
        let entry = self.find(name)?;
        self.mark_taken(name, entry);
        let count = entry.shape.iter().product();
        let stored = self.checkpoint.matrix(entry, 0, self.weight_format(name, entry)?, [1, count])?;
        Ok((entry, stored.to_f32()))
    }

    /// Passes over a tensor that may be there and is of no use.
    pub fn skip(&self, name: &str) {
        if let Ok(entry) = self.find(name) {
            self.mark_taken(name, entry);
        }
    }

    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<&'a TensorEntry, EngineError> {
        let entry = self.find(name)?;
        if entry.shape != shape {
            return Err(self.shape_error(name, entry, shape));
        }
        self.mark_taken(name, entry);
        Ok(entry)
    }

    fn find(&self, name: &str) -> Result<&'a TensorEntry, EngineError> {
        let name = format!("{}{name}", self.prefix);
        self.checkpoint.get(&name).ok_or(EngineError::MissingTensor { name })
    }

    fn mark_taken(&self, name: &str, entry: &TensorEntry) {
        let mut state = self.state.borrow_mut();
        state.taken.insert(format!("{}{name}", self.prefix));
        state.done_bytes += entry.num_bytes as u64;
        let progress = LoadProgress { done_bytes: state.done_bytes, total_bytes: self.total_bytes };
        (state.progress)(progress);
    }

    /// Of those parts that are stored in blocks.
    fn block_formats(&self, parts: &[(String, usize)]) -> Vec<BlockFormat> {
        let entries = parts.iter().filter_map(|(name, _)| self.find(name).ok());
        entries
            .filter_map(|entry| match entry.dtype {
                StoredDtype::Block(format) => Some(format),
                StoredDtype::Plain(_) => None,
            })
            .collect()
    }

    /// The matrix as the file has it, borrowed where its format is one of ours.
    fn stored(
        &self,
        name: &str,
        entry: &TensorEntry,
        offset: usize,
        shape: [usize; 2],
    ) -> Result<PackedWeight, EngineError> {
        match entry.dtype {
            StoredDtype::Plain(Dtype::F8_E4M3 | Dtype::I8) => self.expand_scaled(name, entry, shape),
            StoredDtype::Block(format) => {
                self.block_weight(BlockMatrix { name, entry, format, offset, shape }, &[format])
            }
            _ => self.checkpoint.matrix(entry, offset, self.weight_format(name, entry)?, shape),
        }
    }

    /// Copies borrowed parts, one below the other, into memory of their own in the format that was asked for.
    fn keep(&self, parts: Vec<PackedWeight>) -> Result<PackedWeight, EngineError> {
        let same = parts.windows(2).all(|pair| pair[0].format() == pair[1].format());
        let format = match self.dtype {
            WeightDtype::Auto if same => None,
            // Parts of unlike formats are stored in the widest one, which holds all exactly.
            WeightDtype::Auto | WeightDtype::F32 => Some(WeightFormat::F32),
            WeightDtype::Bf16 => Some(WeightFormat::Bf16),
            WeightDtype::F16 => Some(WeightFormat::F16),
        };
        let parts: Vec<PackedWeight> = match format {
            None => parts,
            Some(format) => parts.into_iter().map(|part| part.convert(format)).collect::<Result<_, _>>()?,
        };
        let kept = PackedWeight::concat_rows(&parts.iter().collect::<Vec<_>>())?;
        self.state.borrow_mut().weight_bytes += kept.num_bytes() as u64;
        Ok(kept)
    }

    /// Refuses FP8: nothing published says how its scales would be stacked.
    fn expect_stackable(&self, name: &str, entry: &TensorEntry) -> Result<(), EngineError> {
        match entry.dtype {
            StoredDtype::Block(_) => Ok(()),
            StoredDtype::Plain(_) => self.weight_format(name, entry).map(drop),
        }
    }

    fn weight_format(&self, name: &str, entry: &TensorEntry) -> Result<WeightFormat, EngineError> {
        match entry.dtype {
            StoredDtype::Plain(Dtype::F32) => Ok(WeightFormat::F32),
            StoredDtype::Plain(Dtype::F16) => Ok(WeightFormat::F16),
            StoredDtype::Plain(Dtype::BF16) => Ok(WeightFormat::Bf16),
            _ => Err(self.dtype_error(name, entry)),
        }
    }

    pub(super) fn shape_error(&self, name: &str, entry: &TensorEntry, expected: &[usize]) -> EngineError {
        let (name, path) = (format!("{}{name}", self.prefix), self.checkpoint.path(entry).to_owned());
        EngineError::TensorShape { name, found: entry.shape.clone(), expected: expected.to_vec(), path }
    }

    pub(super) fn dtype_error(&self, name: &str, entry: &TensorEntry) -> EngineError {
        let (name, path) = (format!("{}{name}", self.prefix), self.checkpoint.path(entry).to_owned());
        EngineError::TensorDtype { name, dtype: entry.dtype.to_string(), path }
    }

    /// An error about what a tensor holds, naming its file.
    pub fn invalid(&self, name: &str, reason: String) -> EngineError {
        let name = format!("{}{name}", self.prefix);
        let path = self.checkpoint.get(&name).map(|entry| self.checkpoint.path(entry).to_owned());
        EngineError::Invalid { path: path.unwrap_or_default(), reason: format!("tensor `{name}` {reason}") }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::super::gguf_fixture::TempDir;
    use super::*;

    #[test]
    fn stacked_fp8_is_refused_and_not_misread() {
        let dir = TempDir::new("loader-stacked-fp8");
        let tensors = [
            ("experts", TensorView::new(Dtype::F8_E4M3, vec![200, 1, 2], &[0x38; 400]).unwrap()),
            ("experts_scale_inv", TensorView::new(Dtype::F32, vec![1, 1], &[0; 4]).unwrap()),
        ];
        dir.write("model.safetensors", &safetensors::serialize(tensors, None).unwrap());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let mut progress = |_| ();
        let loader = Loader::new(&checkpoint, Quantization::default(), WeightDtype::Auto, &mut progress);
        for error in [
            loader.stacked_weights("experts", [200, 1, 2]).unwrap_err(),
            loader.borrow_stacked("experts", [200, 1, 2]).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(error.starts_with("tensor `experts` is stored as F8_E4M3, which is not supported"), "{error}");
        }
    }
}
