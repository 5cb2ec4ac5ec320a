//! Writes safetensors shards tensor by tensor, so that memory holds one tensor at a time.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, json};

use super::UpcycleDtype;
use super::plan::PlannedTensor;
use crate::error::EngineError;

impl UpcycleDtype {
    /// Bytes of one element.
    pub(super) fn num_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// Little-endian bytes of `values`; `None` if a finite value is too large for the type.
    pub(super) fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        let fits = |original: f32, rounded: f32| rounded.is_finite() || !original.is_finite();
        match self {
            Self::F32 => Some(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            Self::Bf16 => {
                let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                let all_fit = values.iter().zip(&halves).all(|(&v, h)| fits(v, h.to_f32()));
                all_fit.then(|| halves.iter().flat_map(|h| h.to_le_bytes()).collect())
            }
            Self::F16 => {
                let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                let all_fit = values.iter().zip(&halves).all(|(&v, h)| fits(v, h.to_f32()));
                all_fit.then(|| halves.iter().flat_map(|h| h.to_le_bytes()).collect())
            }
        }
    }
}

/// Cuts the tensors, in order, into runs of at most `max_bytes` each; a larger tensor gets a shard of its own.
pub(super) fn split_into_shards(
    tensors: &[PlannedTensor],
    dtype: UpcycleDtype,
    max_bytes: u64,
) -> Vec<&[PlannedTensor]> {
    let mut shards = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (idx, tensor) in tensors.iter().enumerate() {
        let tensor_bytes = tensor.num_elements() * dtype.num_bytes();
        if idx > start && shard_bytes + tensor_bytes > max_bytes {
            shards.push(&tensors[start..idx]);
            (start, shard_bytes) = (idx, 0);
        }
        shard_bytes += tensor_bytes;
    }
    shards.push(&tensors[start..]);
    shards
}

/// One shard being written; tensors must follow in the order of the header.
pub(super) struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl ShardWriter {
    /// Creates the file and writes the header of `tensors`.
    pub(super) fn create(path: &Path, tensors: &[PlannedTensor], dtype: UpcycleDtype) -> Result<Self, EngineError> {
        let file = File::create(path).map_err(|source| EngineError::Write { path: path.into(), source })?;
        let mut writer = Self { path: path.into(), file: BufWriter::new(file) };
        let header = header(tensors, dtype);
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(&header)?;
        Ok(writer)
    }

    /// Appends the bytes of the next tensor.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), EngineError> {
        self.file.write_all(bytes).map_err(|source| EngineError::Write { path: self.path.clone(), source })
    }

    pub(super) fn finish(mut self) -> Result<(), EngineError> {
        self.file.flush().map_err(|source| EngineError::Write { path: self.path, source })
    }
}

fn header(tensors: &[PlannedTensor], dtype: UpcycleDtype) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.num_elements() * dtype.num_bytes();
        let entry = json!({ "dtype": dtype.safetensors_name(), "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&entries).expect("a map of plain values is always JSON");
    // The data starts on a multiple of 8, as other writers of the format do, so that mapped tensors are aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
