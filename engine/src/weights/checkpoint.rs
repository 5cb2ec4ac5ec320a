//! The files of a model as one table of tensors under their Hugging Face names: safetensors, or what a GGUF file maps to.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::block_format::BlockFormat;
use kernels::{MappedFile, PackedWeight, WeightFormat};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::bounded_read::read_bounded;
use crate::error::EngineError;

/// Of an index; the largest published ones have some 15 MB.
pub const MAX_INDEX_BYTES: u64 = 32 << 20;

/// Of a file's header, which takes several times as much when parsed.
const MAX_HEADER_BYTES: u64 = 32 << 20;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredDtype {
    /// One after the other, as safetensors has them.
    Plain(Dtype),
    /// In blocks, as ggml has them.
    Block(BlockFormat),
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => write!(f, "{dtype:?}"),
            Self::Block(format) => f.write_str(format.name()),
        }
    }
}

/// Which stored row is which row of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowOrder {
    #[default]
    AsStored,
    /// The rows of each head are stored in rotary pairs `(0, d/2, 1, d/2 + 1, …)`, as llama.cpp's converter leaves the
    /// queries and keys of some architectures.
    RotaryPairs { head_dim: usize },
}

impl RowOrder {
    /// Where row `row` is stored.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::RotaryPairs { head_dim } => {
                let (head, dim) = (row / head_dim, row % head_dim);
                head * head_dim + 2 * (dim % (head_dim / 2)) + dim / (head_dim / 2)
            }
        }
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
    pub num_bytes: usize,
    pub(super) order: RowOrder,
    pub(super) file_idx: usize,
    pub(super) offset: usize,
}

/// All tensors of a checkpoint, mapped and not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(PathBuf, Arc<MappedFile>)>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// `model.safetensors.index.json`: which shard holds which tensor.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A missing, unreadable or malformed file, and a shard that lacks a tensor the index promises.
    pub fn open(model_dir: &Path) -> Result<Self, EngineError> {
        let index_path = model_dir.join("model.safetensors.index.json");
        // Not `exists`: a link in a circle is there, and wrong.
        if std::fs::symlink_metadata(&index_path).is_err() {
            let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new() };
            checkpoint.add_file(&model_dir.join("model.safetensors"))?;
            return Ok(checkpoint);
        }
        let index: ShardIndex = read_json(&index_path, MAX_INDEX_BYTES)?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        if shards.is_empty() {
            return Err(EngineError::Invalid { path: index_path, reason: "it names no shards".into() });
        }
        let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for shard in shards {
            checkpoint.add_file(&shard_path(model_dir, shard, &index_path)?)?;
        }
        match index.weight_map.keys().find(|name| !checkpoint.tensors.contains_key(*name)) {
            Some(name) => Err(EngineError::MissingTensor { name: name.clone() }),
            None => Ok(checkpoint),
        }
    }

    /// A table over mapped files, whose entries lie inside them.
    pub(super) fn of_tensors(files: Vec<(PathBuf, Arc<MappedFile>)>, tensors: BTreeMap<String, TensorEntry>) -> Self {
        Self { files, tensors }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), EngineError> {
        let file = MappedFile::open(path).map_err(|source| EngineError::Read { path: path.into(), source })?;
        let invalid = |reason: String| EngineError::Invalid { path: path.into(), reason };
        let claimed = file.first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes));
        if claimed > MAX_HEADER_BYTES {
            return Err(invalid(format!("its header claims {claimed} bytes, the limit is {MAX_HEADER_BYTES}")));
        }
        let (header_len, metadata) = SafeTensors::read_metadata(&file)
            .map_err(|e| invalid(format!("{e}; hint: an incomplete download? Fetch the file again")))?;
        let data_start = header_len + size_of::<u64>();
        let file_idx = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let (offset, last) = (data_start + start, data_start + end);
            if end < start || last > file.len() {
                return Err(invalid(format!("tensor `{name}` lies outside the file")));
            }
            let entry = TensorEntry {
                dtype: StoredDtype::Plain(info.dtype),
                shape: info.shape.clone(),
                num_bytes: end - start,
                order: RowOrder::AsStored,
                file_idx,
                offset,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(invalid(format!("tensor `{name}` is in two files")));
            }
        }
        self.files.push((path.into(), Arc::new(file)));
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// The file that holds a tensor.
    pub fn path(&self, entry: &TensorEntry) -> &Path {
        &self.files[entry.file_idx].0
    }

    /// The stored bytes, little endian, row-major, in the stored order of rows.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        &self.files[entry.file_idx].1[entry.offset..entry.offset + entry.num_bytes]
    }

    /// Borrows the matrix `[rows, cols]` that starts `offset` bytes into a tensor, without reading it; where its rows are
    /// stored in another order, it is copied.
    pub fn matrix(
        &self,
        entry: &TensorEntry,
        offset: usize,
        format: WeightFormat,
        [rows, cols]: [usize; 2],
    ) -> Result<PackedWeight, EngineError> {
        let file = self.files[entry.file_idx].1.clone();
        let stored = PackedWeight::mapped(file, entry.offset + offset, format, rows, cols)?;
        match entry.order {
            RowOrder::AsStored => Ok(stored),
            order => Ok(stored.select_rows(&(0..rows).map(|row| order.stored_row(row)).collect::<Vec<_>>())?),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The files by name, for who wants all of their bytes.
    pub fn files(&self) -> Vec<(String, Arc<MappedFile>)> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.files.iter().map(|(path, file)| (name(path), file.clone())).collect()
    }

    /// Gives back the memory of what was read of the files, which may be read again.
    pub fn release_pages(&self) {
        self.files.iter().for_each(|(_, file)| file.release_pages());
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.num_bytes as u64).sum()
    }
}

/// A shard name may not lead out of the model's folder: checkpoints come from strangers.
fn shard_path(model_dir: &Path, shard: &str, index_path: &Path) -> Result<PathBuf, EngineError> {
    if Path::new(shard).file_name().is_none_or(|name| name != shard) {
        let reason = format!("shard `{shard}` is not a plain file name");
        return Err(EngineError::Invalid { path: index_path.into(), reason });
    }
    Ok(model_dir.join(shard))
}

/// Reads one JSON file of at most `max_bytes`.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<T, EngineError> {
    let text = read_bounded(path, max_bytes).map_err(|source| EngineError::Read { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|e| EngineError::Invalid { path: path.into(), reason: e.to_string() })
}
