//! Hands out the checkpoint's tensors by name in the form the layers want, and notices what nobody asked for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use kernels::block_format::BlockFormat;
use kernels::{Expert, HugePages, KernelError, MappedParts, PackedWeight, WeightFormat};
use safetensors::Dtype;

use super::checkpoint::{Checkpoint, StoredDtype, TensorEntry};
use super::gguf_model::blocks::BlockMatrix;
use super::packed_folder::PackedIndex;
use super::quantization::Quantization;
use super::storage::Role;
use crate::config::{WeightDtype, WeightStorage};
use crate::error::EngineError;
use crate::experts::{ExpertCatalog, RouterParts};

/// Where multimodal checkpoints keep the language model's tensors.
const NESTED_PREFIX: &str = "language_model.";

/// Bytes read so far and in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub stage: LoadStage,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadStage {
    Weights,
    /// Those that stay in mapped files, before their first use.
    Mapped,
    /// Those that a store has at the start.
    Experts,
}

/// Source bytes after which their pages are given back: a mapped file that was read counts as memory of the process.
const RELEASE_BYTES: u64 = 256 << 20;

/// One pass over a checkpoint: every tensor is taken by name, once.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    total_bytes: u64,
    /// Of every name: multimodal checkpoints keep their language model under one.
    prefix: &'static str,
    quantization: Quantization,
    storage: WeightStorage,
    /// Of a folder that has everything as a loader made it before.
    packed: Option<&'a PackedIndex>,
    /// Where the model computes.
    device: Device,
    state: RefCell<LoadState<'a>>,
}

/// What becomes of each weight and vector that was made: its key, itself, and what the model gets in its place.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&str, PackedWeight) -> Result<PackedWeight, EngineError>;

struct LoadState<'a> {
    taken: BTreeSet<String>,
    /// Names that layers asked about and that are there.
    present: BTreeSet<String>,
    done_bytes: u64,
    released_bytes: u64,
    weight_bytes: u64,
    expert_bytes: u64,
    huge_pages: HugePages,
    mapped: MappedParts,
    /// Bytes of kept matrices by format, see [`Loader::formats`].
    format_bytes: BTreeMap<&'static str, u64>,
    progress: &'a mut dyn FnMut(LoadProgress),
    sink: Option<Sink<'a>>,
    /// Where experts lie that are left there.
    catalog: Option<ExpertCatalog>,
}

impl<'a> Loader<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        quantization: Quantization,
        storage: impl Into<WeightStorage>,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let state = LoadState {
            taken: BTreeSet::new(),
            present: BTreeSet::new(),
            done_bytes: 0,
            released_bytes: 0,
            weight_bytes: 0,
            expert_bytes: 0,
            huge_pages: HugePages::default(),
            mapped: MappedParts::default(),
            format_bytes: BTreeMap::new(),
            progress,
            sink: None,
            catalog: None,
        };
        let is_nested = checkpoint.iter().any(|(name, _)| name.starts_with(NESTED_PREFIX));
        let prefix = if is_nested { NESTED_PREFIX } else { "" };
        let (total_bytes, storage) = (checkpoint.total_bytes(), storage.into());
        let (packed, device, state) = (None, Device::Cpu, RefCell::new(state));
        Self { checkpoint, total_bytes, prefix, quantization, storage, packed, device, state }
    }

    /// For a model that computes there.
    pub(crate) fn on(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// What layers compute in: f32 on the CPU; on other devices bf16, unless weights are to be f32.
    pub fn activations(&self) -> DType {
        match self.device.is_cpu() || self.storage.dtype == WeightDtype::F32 {
            true => DType::F32,
            false => DType::BF16,
        }
    }

    /// Over a packed folder: everything is there under the key that it was asked for by.
    pub(crate) fn with_packed(self, packed: Option<&'a PackedIndex>) -> Self {
        Self { packed, ..self }
    }

    /// Leaves the experts of a packed folder where they lie, and takes everything else into memory: the files may change.
    pub(crate) fn leaving_experts(self) -> Self {
        self.state.borrow_mut().catalog = Some(ExpertCatalog::default());
        self
    }

    /// The experts that were left where they lie.
    pub(crate) fn take_catalog(&self) -> Option<ExpertCatalog> {
        self.state.borrow_mut().catalog.take()
    }

    /// What a layer keeps of its experts: all, or none where they are left where they lie.
    ///
    /// # Errors
    /// Experts that are to be left and lie nowhere.
    pub fn keep_experts(
        &self,
        moe_idx: usize,
        router: impl FnOnce() -> RouterParts,
        experts: Vec<Expert>,
    ) -> Result<Vec<Expert>, EngineError> {
        match &mut self.state.borrow_mut().catalog {
            None => Ok(experts),
            Some(catalog) => catalog.add(moe_idx, router(), experts).map(|()| Vec::new()),
        }
    }

    /// Gives `sink` each weight and vector.
    pub(super) fn with_sink(self, sink: Sink<'a>) -> Self {
        self.state.borrow_mut().sink = Some(sink);
        self
    }

    /// Whether the checkpoint has a tensor, in whatever form.
    pub fn has(&self, name: &str) -> bool {
        if let Some(packed) = self.packed {
            return packed.present.contains(name);
        }
        let is_there = self.contains(name) || name.strip_suffix(".weight").is_some_and(|stem| self.is_packed(stem));
        if is_there {
            self.state.borrow_mut().present.insert(name.to_owned());
        }
        is_there
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.checkpoint.get(&format!("{}{name}", self.prefix)).is_some()
    }

    /// Names that layers asked about with [`Self::has`] and that are there.
    pub(super) fn present(&self) -> BTreeSet<String> {
        self.state.borrow().present.clone()
    }

    /// A matrix `[rows, cols]` of a layer for [`kernels::linear`].
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<PackedWeight, EngineError> {
        self.fused_weight(&[(name.to_owned(), rows)], cols, Role::Layer)
    }

    /// A matrix `[rows, cols]` of a routed expert.
    pub fn expert_weight(&self, name: &str, rows: usize, cols: usize) -> Result<PackedWeight, EngineError> {
        self.fused_weight(&[(name.to_owned(), rows)], cols, Role::Expert)
    }

    /// The embedding, or the output projection.
    pub fn table(&self, name: &str, rows: usize, cols: usize) -> Result<PackedWeight, EngineError> {
        self.fused_weight(&[(name.to_owned(), rows)], cols, Role::Table)
    }

    /// Several matrices over the same input, one below the other: `[Σ rows, cols]`.
    pub fn fused_weight(
        &self,
        parts: &[(String, usize)],
        cols: usize,
        role: Role,
    ) -> Result<PackedWeight, EngineError> {
        let key = parts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join("+");
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        if let Some(packed) = self.packed_weight((&key, role), [rows, cols])? {
            return Ok(packed.to_device(&self.device)?);
        }
        let formats = self.block_formats(parts);
        let parts = parts.iter().map(|(name, rows)| self.borrow_beside(name, [*rows, cols], &formats));
        self.keep(&key, role, parts)
    }

    /// A matrix as it is stored, for those that change on their way in.
    pub fn borrow_weight(&self, name: &str, shape: [usize; 2]) -> Result<PackedWeight, EngineError> {
        self.borrow_beside(name, shape, &self.block_formats(&[(name.to_owned(), shape[0])]))
    }

    /// A matrix as it is stored; one in blocks in the format that it shares with the others it stands beside.
    fn borrow_beside(
        &self,
        name: &str,
        shape: [usize; 2],
        formats: &[BlockFormat],
    ) -> Result<PackedWeight, EngineError> {
        match name.strip_suffix(".weight") {
            Some(stem) if !self.contains(name) && self.is_packed(stem) => self.expand_packed(stem, shape),
            _ => {
                let entry = self.take(name, &shape)?;
                match entry.dtype {
                    StoredDtype::Block(format) => {
                        self.block_weight(BlockMatrix { name, entry, format, offset: 0, shape }, formats)
                    }
                    StoredDtype::Plain(_) => self.stored(name, entry, 0, shape),
                }
            }
        }
    }

    /// Matrices made of the rows of one tensor `[rows, cols]`, each in an order of its own.
    pub fn picked_weights(
        &self,
        (name, role): (&str, Role),
        shape: [usize; 2],
        picks: &[Vec<usize>],
    ) -> Result<Vec<PackedWeight>, EngineError> {
        let shapes = picks.iter().map(|rows| [rows.len(), shape[1]]);
        let open = || self.borrow_weight(name, shape);
        self.made((name, role), shapes, open, |stored, idx| Ok(stored.select_rows(&picks[idx])?))
    }

    /// The matrices of a stacked tensor `[count, rows, cols]`, apart.
    pub fn stacked_weights(
        &self,
        (name, role): (&str, Role),
        shape: [usize; 3],
    ) -> Result<Vec<PackedWeight>, EngineError> {
        let [count, rows, cols] = shape;
        let open = || {
            let entry = self.take(name, &shape)?;
            self.expect_stackable(name, entry)?;
            Ok(entry)
        };
        self.made((name, role), std::iter::repeat_n([rows, cols], count), open, |entry, idx| {
            self.stored(name, entry, idx * (entry.num_bytes / count), [rows, cols])
        })
    }

    /// Matrices of these `shapes` that `make(source, idx)` makes of what `open` finds stored, one at a time. They are known
    /// by `name` and their index: a packed folder has them as they came out.
    pub fn made<S>(
        &self,
        (name, role): (&str, Role),
        shapes: impl ExactSizeIterator<Item = [usize; 2]>,
        open: impl FnOnce() -> Result<S, EngineError>,
        make: impl Fn(&S, usize) -> Result<PackedWeight, EngineError>,
    ) -> Result<Vec<PackedWeight>, EngineError> {
        let key = |idx: usize| format!("{name}/{idx}");
        if self.packed.is_some() {
            let weights = shapes.enumerate().map(|(idx, shape)| self.packed_weight((&key(idx), role), shape));
            let placed = |weight: PackedWeight| Ok(weight.to_device(&self.device)?);
            return weights.map(|weight| placed(weight?.expect("a packed folder"))).collect();
        }
        let source = open()?;
        (0..shapes.len()).map(|idx| self.keep(&key(idx), role, std::iter::once(make(&source, idx)))).collect()
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

    /// The format to make a matrix in that is not merely rearranged: f32 where [`Self::made`] converts it, so that it is
    /// rounded once.
    pub fn making_format(&self, role: Role, stored: WeightFormat) -> WeightFormat {
        role.target(self.storage, stored).map_or(stored, |_| WeightFormat::F32)
    }

    /// A vector in f32: norm weights, biases.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor, EngineError> {
        self.on_device(self.floats(name, &[len])?)
    }

    /// A vector where the model computes.
    pub fn on_device(&self, values: Vec<f32>) -> Result<Tensor, EngineError> {
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &self.device)?)
    }

    /// A small tensor in f32, row-major.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let count = shape.iter().product();
        let stored = match self.packed_weight((name, Role::Layer), [1, count])? {
            Some(packed) => packed,
            None => {
                let entry = self.take(name, shape)?;
                self.checkpoint.matrix(entry, 0, self.weight_format(name, entry)?, [count, 1])?
            }
        };
        let values = stored.to_f32();
        let mut state = self.state.borrow_mut();
        if self.packed.is_none() {
            state.weight_bytes += (count * size_of::<f32>()) as u64;
        }
        if let Some(sink) = &mut state.sink {
            sink(name, PackedWeight::from_f32(WeightFormat::F32, 1, count, &values)?)?;
        }
        Ok(values)
    }

    /// The formats of the kept matrices, most bytes first.
    pub fn formats(&self) -> Vec<&'static str> {
        let mut formats: Vec<_> =
            self.state.borrow().format_bytes.iter().map(|(name, bytes)| (*name, *bytes)).collect();
        formats.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
        formats.into_iter().map(|(name, _)| name).collect()
    }

    /// Bytes the loaded weights take in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.state.borrow().weight_bytes
    }

    /// Bytes of all routed experts, wherever they are.
    pub fn expert_bytes(&self) -> u64 {
        self.state.borrow().expert_bytes
    }

    /// Where the weights lie, for when all are there.
    pub fn take_huge_pages(&self) -> HugePages {
        std::mem::take(&mut self.state.borrow_mut().huge_pages)
    }

    /// Of the matrices, what stays in mapped files.
    pub(crate) fn take_mapped(&self) -> MappedParts {
        std::mem::take(&mut self.state.borrow_mut().mapped)
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

    pub(super) fn storage(&self) -> WeightStorage {
        self.storage
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

    pub(super) fn find(&self, name: &str) -> Result<&'a TensorEntry, EngineError> {
        let name = format!("{}{name}", self.prefix);
        self.checkpoint.get(&name).ok_or(EngineError::MissingTensor { name })
    }

    fn mark_taken(&self, name: &str, entry: &TensorEntry) {
        let mut state = self.state.borrow_mut();
        if !state.taken.insert(format!("{}{name}", self.prefix)) {
            return;
        }
        state.done_bytes += entry.num_bytes as u64;
        let progress =
            LoadProgress { stage: LoadStage::Weights, done_bytes: state.done_bytes, total_bytes: self.total_bytes };
        (state.progress)(progress);
        // What is kept of a packed folder stays mapped, and in use.
        if self.packed.is_none() && state.done_bytes - state.released_bytes >= RELEASE_BYTES {
            state.released_bytes = state.done_bytes;
            self.checkpoint.release_pages();
        }
    }

    /// What a packed folder has under a key; none where there is no such folder.
    fn packed_weight(
        &self,
        (key, role): (&str, Role),
        [rows, cols]: [usize; 2],
    ) -> Result<Option<PackedWeight>, EngineError> {
        let Some(packed) = self.packed else { return Ok(None) };
        let entry = self.find(key)?;
        let format = packed.format_of(key, [rows, cols]).map_err(|reason| self.invalid(key, reason))?;
        let weight = self.checkpoint.matrix(entry, 0, format, [rows, cols])?;
        if weight.num_bytes() > entry.num_bytes {
            return Err(self.invalid(key, format!("has {} bytes, expected {}", entry.num_bytes, weight.num_bytes())));
        }
        self.mark_taken(key, entry);
        let weight = match &mut self.state.borrow_mut().catalog {
            None => weight,
            Some(catalog) if role == Role::Expert => {
                let place = weight.place().zip(packed.sum_of(key));
                place.into_iter().for_each(|((path, offset), sum)| catalog.note_sum(path, offset, sum));
                weight
            }
            Some(_) => PackedWeight::from_bytes(format, rows, cols, weight.as_bytes())?,
        };
        self.count((&weight, role));
        Ok(Some(weight))
    }

    fn count(&self, (weight, role): (&PackedWeight, Role)) {
        let mut state = self.state.borrow_mut();
        let bytes = weight.num_bytes() as u64;
        if role == Role::Expert {
            state.expert_bytes += bytes;
        }
        // Experts that are left where they lie take what their budget says.
        if role != Role::Expert || state.catalog.is_none() {
            state.weight_bytes += bytes;
        }
        // What goes to another device is read now, and once.
        if self.device.is_cpu() {
            state.huge_pages.add(weight);
            state.mapped.add(weight);
        }
        if weight.rows() > 1 {
            *state.format_bytes.entry(weight.format().name()).or_default() += bytes;
        }
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

    /// Copies borrowed parts, one below the other, into memory of their own in the format that was asked for; they are
    /// converted one by one.
    fn keep(
        &self,
        key: &str,
        role: Role,
        parts: impl Iterator<Item = Result<PackedWeight, EngineError>>,
    ) -> Result<PackedWeight, EngineError> {
        let named = |error: KernelError| self.invalid(key, error.to_string());
        let converted = parts.map(|part| {
            let part = part?;
            match role.target(self.storage, part.format()) {
                None => Ok(part),
                Some(format) => part.convert(format).map_err(named),
            }
        });
        let mut parts = converted.collect::<Result<Vec<_>, EngineError>>()?;
        if parts.windows(2).any(|pair| pair[0].format() != pair[1].format()) {
            // The widest one holds all exactly.
            parts = parts.into_iter().map(|part| part.convert(WeightFormat::F32)).collect::<Result<_, _>>()?;
        }
        let kept = match parts.as_slice() {
            // Nobody else has it, so it need not be copied.
            [only] if only.is_owned() => only.clone(),
            _ => PackedWeight::concat_rows(&parts.iter().collect::<Vec<_>>())?,
        };
        self.count((&kept, role));
        match &mut self.state.borrow_mut().sink {
            None => Ok(kept.to_device(&self.device)?),
            Some(sink) => sink(key, kept),
        }
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
#[path = "loader_tests.rs"]
mod tests;
